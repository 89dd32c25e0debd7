//! Nanoseconds per 64-byte frame, ring to ring, on one thread: a guest posts, the device's two rings forward with one
//! copy, another guest takes. `device` times the forwarding alone, `both` the guests too.
//!
//! `cargo bench -p ringway-bench --bench ring`
#![allow(unsafe_code)] // copies between buffers the rings have checked

use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ringway::virtio::buffers::{BATCH, Buffers};
use ringway::virtio::driver::{DriverRing, DriverSetup, Used};
use ringway::virtio::guest_mem::{GuestMem, MapOptions, Poison};
use ringway::virtio::net;
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::{Ring, RingSetup, Way, feature};

/// Descriptors per ring, DPDK's default.
const SIZE: u16 = 256;
/// Bytes between buffers: DPDK's mbufs of 2 KiB with their head.
const STRIDE: u64 = 2304;
/// DPDK's header ends where a line does, the frame starts a line.
const HEADROOM: u64 = 116;

/// One guest's ring, both sides.
struct Line {
    guest: DriverRing,
    device: Ring,
    buffers: Vec<(u64, u32)>,
}

fn line(way: Way, features: u64, regions: u64, frame: u32) -> Line {
    let pool = u64::from(SIZE) * STRIDE;
    let len = (1 << 20) + pool;
    let mem = OwnMem::new(len, 0x4000_0000, true) // hugepages, if the host has some
        .or_else(|_| OwnMem::new(len, 0x4000_0000, false))
        .expect("memory");
    let setup = DriverSetup {
        mem: mem.clone(),
        at: mem.gpa(),
        size: SIZE,
        features,
        way,
    };
    let guest = DriverRing::new(setup).expect("driver");
    let mut specs = vec![mem.region().expect("region")];
    let others: Vec<_> = (1..regions)
        .map(|n| OwnMem::new(4096, n << 32, false).expect("memory"))
        .collect();
    specs.extend(others.iter().map(|mem| mem.region().expect("region")));
    let (poison, options) = (Arc::new(Poison::default()), MapOptions::default());
    let table = GuestMem::map(specs, &poison, &options).expect("map");
    let (desc, avail, used) = guest.addresses();
    let device = Ring::new(RingSetup {
        mem: Arc::new(table),
        size: SIZE,
        desc,
        avail,
        used,
        base: guest.base(),
        features,
        way,
    });
    let len = match way {
        Way::FromGuest => frame + net::HEADER_LEN as u32,
        Way::ToGuest => 2048,
    };
    let first = mem.gpa() + (1 << 20) + HEADROOM;
    Line {
        guest,
        device: device.expect("device"),
        buffers: (0..u64::from(SIZE))
            .map(|n| (first + n * STRIDE, len))
            .collect(),
    }
}

/// Forwards what is there, up to a batch; returns how many frames.
fn forward(from: &mut Line, to: &mut Line, bufs: &mut (Box<Buffers>, Box<Buffers>)) -> usize {
    let count = from.device.fetch(&mut bufs.0, BATCH).expect("honest");
    let count = to.device.fetch(&mut bufs.1, count).expect("honest");
    let header = net::header(1);
    let mut written = [0; BATCH];
    for (index, written) in written.iter_mut().enumerate().take(count) {
        let (rx, tx) = (bufs.0.buffer(index), bufs.1.buffer(index));
        // One that cannot be used has length 0.
        assert!(rx.len <= tx.len && rx.len >= 12);
        // SAFETY: both rings checked `len` bytes at `at`; the receiver's are no fewer, and the guests do not overlap.
        unsafe {
            tx.at.cast::<[u8; 12]>().write(header);
            ptr::copy_nonoverlapping(rx.at.add(12), tx.at.add(12), rx.len as usize - 12);
        }
        *written = rx.len;
    }
    from.device.complete(count, &[]);
    to.device.complete(count, &written[..count]);
    count
}

fn bench(criterion: &mut Criterion) {
    let base = feature::VERSION_1;
    let layouts = [
        ("split", base),
        ("split in-order", base | feature::IN_ORDER),
        ("packed", base | feature::RING_PACKED),
        (
            "packed in-order",
            base | feature::RING_PACKED | feature::IN_ORDER,
        ),
    ];
    for (name, features) in layouts {
        for (regions, frame) in [(1, 64), (8, 64), (1, 1518)] {
            let mut group = criterion.benchmark_group(name);
            group.throughput(Throughput::Elements(1));
            let mut from = line(Way::FromGuest, features, regions, frame);
            let mut to = line(Way::ToGuest, features, regions, frame);
            let mut bufs = (Buffers::new(), Buffers::new());
            let ready = to.buffers.clone();
            assert_eq!(to.guest.post(&ready), ready.len());
            let label = format!("{frame} B, {regions} regions");
            for whole in [false, true] {
                let part = if whole { "both" } else { "device" };
                group.bench_function(BenchmarkId::new(part, &label), |bencher| {
                    bencher
                        .iter_custom(|frames| rounds(frames, &mut from, &mut to, &mut bufs, whole));
                });
            }
        }
    }
}

/// Forwards `frames` frames in batches; the time of the device's part, or of the whole.
fn rounds(
    frames: u64,
    from: &mut Line,
    to: &mut Line,
    bufs: &mut (Box<Buffers>, Box<Buffers>),
    whole: bool,
) -> Duration {
    let (mut done, mut device, mut at) = (0, Duration::ZERO, 0);
    let mut used = [Used::default(); BATCH];
    let start = Instant::now();
    while done < frames {
        let batch = &from.buffers[at..at + BATCH];
        at = (at + BATCH) % from.buffers.len();
        assert_eq!(from.guest.post(batch), BATCH);
        let before = if whole { start } else { Instant::now() };
        let count = forward(from, to, bufs);
        if !whole {
            device += before.elapsed();
        }
        assert_eq!(count, BATCH);
        assert_eq!(from.guest.reclaim(), count);
        assert_eq!(to.guest.take(&mut used), count);
        let mut again = [(0, 0); BATCH];
        for (again, used) in again.iter_mut().zip(&used) {
            *again = (used.addr, 2048);
        }
        to.guest.post(&again);
        done += count as u64;
    }
    let all = if whole { start.elapsed() } else { device };
    // Whole batches only: scale to what was asked.
    all.mul_f64(frames as f64 / done as f64)
}

criterion_group!(benches, bench);
criterion_main!(benches);
