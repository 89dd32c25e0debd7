//! Nanoseconds and cycles per frame of a worker that forwards between two guests' rings: no sockets, no client process.
//!
//! `cargo bench --bench forward [-- ROW...]`. The worker is pinned to the first CPU, the guest of both ports to the second; the guest resends
//! frames in place, looks at the payload of each received frame and posts its buffer again. Cycles are TSC cycles of the
//! worker's busy passes; "gaps" are frames that did not arrive in sequence (0, or the worker dropped some under `tx_full`).

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringway::dataplane::counters::{QueueCounters, Reason, WorkerCounters};
use ringway::dataplane::eth::Mac;
use ringway::dataplane::fdb::{Fdb, FdbSettings, Key};
use ringway::dataplane::mailbox::{Mailbox, QueueId, mailbox};
use ringway::dataplane::port_set::{Domain, Exit, PortId, Topology};
use ringway::dataplane::queue::TxQueue;
use ringway::dataplane::worker::{Idle, RxSlot, Shared, Source, Worker};
use ringway::port::doze::Bed;
use ringway::port::shared;
use ringway::port::vhost::{FromGuest, ToGuest};
use ringway::virtio::buffers::NET_HEADER;
use ringway::virtio::driver::{DriverRing, DriverSetup, Used};
use ringway::virtio::guest_mem::{GuestMem, MapOptions, Poison};
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::{Ring, RingSetup, Way, feature};

const SIZE: u16 = 1024;
const GUEST: u64 = 0x1000_0000;
/// Header at 116, frame at 128 of each buffer, as DPDK's mbufs have it.
const HEADROOM: u64 = 116;

struct Row {
    name: &'static str,
    features: u64,
    frame: u32,
    /// Source stations per port, in turn.
    stations: u32,
}

const BASE: u64 = feature::VERSION_1 | feature::MRG_RXBUF | feature::IN_ORDER;
const ROWS: &[Row] = &[
    Row {
        name: "split 64 B",
        features: BASE,
        frame: 64,
        stations: 1,
    },
    Row {
        name: "split, not in order 64 B",
        features: feature::VERSION_1,
        frame: 64,
        stations: 1,
    },
    Row {
        name: "packed 64 B",
        features: BASE | feature::RING_PACKED,
        frame: 64,
        stations: 1,
    },
    Row {
        name: "split 64 B, 10,000 stations",
        features: BASE,
        frame: 64,
        stations: 10_000,
    },
    Row {
        name: "split 64 B, 100,000 stations",
        features: BASE,
        frame: 64,
        stations: 100_000,
    },
    Row {
        name: "split 1518 B",
        features: BASE,
        frame: 1518,
        stations: 1,
    },
    Row {
        name: "packed 1518 B",
        features: BASE | feature::RING_PACKED,
        frame: 1518,
        stations: 1,
    },
];

/// One queue pair, the guest's side.
struct Guest {
    mem: Arc<OwnMem>,
    tx: DriverRing,
    rx: DriverRing,
    frames: u64,
    stride: u64,
    sent: u64,
    received: u64,
    gaps: u64,
    number: u8,
    stations: u32,
}

fn mac(port: u8, station: u32) -> [u8; 6] {
    let s = station.to_be_bytes();
    [2, port, s[0], s[1], s[2], s[3]]
}

impl Guest {
    fn new(number: u8, row: &Row, hugepages: bool) -> (Guest, Arc<GuestMem>) {
        let stride = if row.frame <= 1900 { 2304 } else { 9728 + 256 };
        let pool = u64::from(SIZE) * stride;
        let mem = OwnMem::new((4 << 20) + 2 * pool, GUEST, hugepages).expect("guest memory");
        let ring = |at, way| {
            let setup = DriverSetup {
                mem: mem.clone(),
                at: GUEST + at,
                size: SIZE,
                features: row.features,
                way,
            };
            DriverRing::new(setup).expect("driver ring")
        };
        let (tx, mut rx) = (ring(0, Way::FromGuest), ring(1 << 20, Way::ToGuest));
        let frames = GUEST + (4 << 20);
        for index in 0..u64::from(SIZE) {
            let at = frames + index * stride + HEADROOM;
            let header = [0u8; NET_HEADER as usize];
            let frame = [
                &mac(1 - number, 0)[..],
                &mac(number, 0),
                &[8, 0],
                &vec![0x5a; row.frame as usize - 14],
            ]
            .concat();
            assert!(mem.write(at, &header) && mem.write(at + u64::from(NET_HEADER), &frame));
            let buffer = frames + pool + index * stride + HEADROOM;
            assert_eq!(rx.post(&[(buffer, (stride - HEADROOM) as u32)]), 1);
        }
        let region = vec![mem.region().expect("region")];
        let seen =
            GuestMem::map(region, &Poison::new(), &MapOptions::default()).expect("switch maps it");
        let guest = Guest {
            mem,
            tx,
            rx,
            frames,
            stride,
            sent: 0,
            received: 0,
            gaps: 0,
            number,
            stations: row.stations,
        };
        (guest, Arc::new(seen))
    }

    /// Sends and receives what it can; returns the frames received.
    fn turn(&mut self, frame: u32) -> u64 {
        self.tx.reclaim();
        let room = self.tx.free().min(64);
        if room >= 32 {
            let mut posts = [(0u64, 0u32); 64];
            for (index, post) in posts[..room].iter_mut().enumerate() {
                let sequence = self.sent + index as u64;
                let at = self.frames + (sequence % u64::from(SIZE)) * self.stride + HEADROOM;
                let source = mac(self.number, (sequence % u64::from(self.stations)) as u32);
                if self.stations > 1 {
                    self.mem.write(at + u64::from(NET_HEADER) + 6, &source);
                }
                self.mem
                    .write(at + u64::from(NET_HEADER) + 14, &sequence.to_le_bytes());
                *post = (at, frame + NET_HEADER);
            }
            self.sent += self.tx.post(&posts[..room]) as u64;
        }
        let mut used = [Used::default(); 64];
        let count = self.rx.take(&mut used);
        let mut posts = [(0u64, 0u32); 64];
        for (used, post) in used[..count].iter().zip(&mut posts) {
            let mut sequence = [0; 8];
            self.mem
                .read(used.addr + u64::from(NET_HEADER) + 14, &mut sequence);
            let sequence = u64::from_le_bytes(sequence);
            self.gaps += u64::from(sequence != self.received);
            self.received = sequence + 1;
            *post = (used.addr, (self.stride - HEADROOM) as u32);
        }
        self.rx.post(&posts[..count]);
        count as u64
    }
}

fn ring(driver: &DriverRing, mem: &Arc<GuestMem>, row: &Row, way: Way) -> Ring {
    let (desc, avail, used) = driver.addresses();
    let setup = RingSetup {
        mem: mem.clone(),
        size: SIZE,
        desc,
        avail,
        used,
        base: driver.base(),
        features: row.features,
        way,
    };
    Ring::new(setup).expect("ring")
}

struct Outcome {
    mpps: f64,
    cycles: f64,
    busy: f64,
    gaps: u64,
    dropped: u64,
}

/// A worker on the first CPU, and the guests at its two ports.
struct Rig {
    guests: Vec<Guest>,
    mail: Mailbox,
    counters: Arc<WorkerCounters>,
    books: Vec<Arc<QueueCounters>>,
    thread: JoinHandle<Vec<RxSlot>>,
}

impl Rig {
    fn new(row: &Row, hugepages: bool) -> Rig {
        let settings = FdbSettings {
            capacity: 200_000,
            ..FdbSettings::default()
        };
        let shared = Arc::new(Shared {
            fdb: Fdb::new(settings),
            seconds: 1.into(),
        });
        let (bed, bell) = Bed::new().expect("epoll");
        let (mail, slot) = mailbox(bell);
        let counters = Arc::<WorkerCounters>::default();
        let (theirs, mine) = (shared.clone(), counters.clone());
        let worker = Worker::new(0, theirs, mine, slot, Idle::Poll, Box::new(bed));
        let thread = std::thread::spawn(move || {
            core_affinity::set_for_current(core_affinity::CoreId { id: 0 });
            worker.run()
        });
        let (mut guests, mut books) = (Vec::new(), Vec::new());
        let (mut exits, mut slots) = (Vec::new(), Vec::new());
        for number in 0..2u8 {
            let (guest, mem) = Guest::new(number, row, hugepages);
            let (exit, slot) = port(&guest, &mem, row, &mut books);
            let key = Key::new(Domain(0), Mac::from_bytes(mac(number, 0)));
            let hash = shared.fdb.hash(key);
            shared.fdb.learn(key, hash, PortId(u16::from(number)), 1, 1);
            exits.push(Some(exit));
            slots.push(slot);
            guests.push(guest);
        }
        let topology = Arc::new(Topology::new(exits));
        drop(mail.show(topology).expect("worker runs"));
        for slot in slots {
            mail.attach(slot).expect("worker runs");
        }
        Rig {
            guests,
            mail,
            counters,
            books,
            thread,
        }
    }

    /// Lets the guests send and receive for `time`; returns the frames received.
    fn drive(&mut self, frame: u32, time: Duration) -> u64 {
        let (start, mut frames) = (Instant::now(), 0);
        while start.elapsed() < time {
            for _ in 0..32 {
                frames += self.guests.iter_mut().map(|g| g.turn(frame)).sum::<u64>();
            }
        }
        frames
    }

    /// Busy cycles, all cycles, frames received.
    fn snapshot(&self) -> (u64, u64, u64) {
        let counters = &self.counters;
        (
            counters.busy_cycles.load(Relaxed),
            counters.total_cycles.load(Relaxed),
            counters.received.frames(),
        )
    }
}

/// Both queues of a guest's port.
fn port(
    guest: &Guest,
    mem: &Arc<GuestMem>,
    row: &Row,
    books: &mut Vec<Arc<QueueCounters>>,
) -> (Exit, Box<RxSlot>) {
    let (rx, tx) = (Arc::<QueueCounters>::default(), Arc::default());
    let mergeable = row.features & feature::MRG_RXBUF != 0;
    let to = ToGuest::new(ring(&guest.rx, mem, row, Way::ToGuest), None, mergeable);
    let from = ring(&guest.tx, mem, row, Way::FromGuest);
    let from = FromGuest::new(from, None, None, 65_535);
    let queue: Arc<dyn TxQueue> = Arc::new(shared::Shared::new(to, Arc::clone(&tx)));
    let source = Source {
        id: QueueId {
            port: PortId(u16::from(guest.number)),
            pair: 0,
        },
        domain: Domain(0),
        generation: 1,
        counters: rx.clone(),
        guard: None,
    };
    books.extend([rx, tx]);
    let exit = Exit {
        generation: 1,
        domain: Domain(0),
        queues: vec![queue],
    };
    (exit, Box::new(RxSlot::new(source, Box::new(from))))
}

fn run(row: &Row, time: Duration, hugepages: bool) -> Outcome {
    let mut rig = Rig::new(row, hugepages);
    core_affinity::set_for_current(core_affinity::CoreId { id: 1 });
    rig.drive(row.frame, Duration::from_millis(300));
    let (before, start) = (rig.snapshot(), Instant::now());
    let frames = rig.drive(row.frame, time);
    let (after, seconds) = (rig.snapshot(), start.elapsed().as_secs_f64());
    rig.mail.stop();
    drop(rig.thread.join());
    let dropped = |book: &Arc<QueueCounters>| -> u64 {
        Reason::ALL.iter().map(|reason| book.dropped(*reason)).sum()
    };
    Outcome {
        mpps: frames as f64 / seconds / 1e6,
        cycles: (after.0 - before.0) as f64 / (after.2 - before.2).max(1) as f64,
        busy: (after.0 - before.0) as f64 / (after.1 - before.1).max(1) as f64,
        gaps: rig.guests.iter().map(|guest| guest.gaps).sum(),
        dropped: rig.books.iter().map(dropped).sum(),
    }
}

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"))
        .collect();
    let hugepages = OwnMem::new(16 << 20, GUEST, true).is_ok();
    println!(
        "guest memory: {}",
        if hugepages {
            "2 MiB pages"
        } else {
            "4 KiB pages (no hugepages are free)"
        }
    );
    println!(
        "{:<32} {:>8} {:>13} {:>6} {:>8} {:>9}",
        "", "Mpps", "cycles/frame", "busy", "gaps", "dropped"
    );
    for row in ROWS.iter().filter(|row| {
        wanted.is_empty() || wanted.iter().any(|word| row.name.contains(word.as_str()))
    }) {
        for _ in 0..3 {
            let o = run(row, Duration::from_millis(700), hugepages);
            println!(
                "{:<32} {:>8.1} {:>13.1} {:>5.0}% {:>8} {:>9}",
                row.name,
                o.mpps,
                o.cycles,
                o.busy * 100.0,
                o.gaps,
                o.dropped
            );
        }
    }
}
