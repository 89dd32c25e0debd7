//! Both layouts: a memory image that the fuzzer writes and goes on writing while the device fetches and completes.

use std::cell::OnceCell;
use std::sync::Arc;

use ringway::virtio::buffers::{BATCH, Buffers};
use ringway::virtio::guest_mem::{GuestMem, Hit, MapOptions, Poison};
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::{Ring, RingSetup, Way, feature};

const GPA: u64 = 0x4000_0000;
const LEN: u64 = 32 << 10;

thread_local! {
    static MEMORY: OnceCell<(Arc<OwnMem>, Arc<GuestMem>)> = const { OnceCell::new() };
}

fn memory() -> (Arc<OwnMem>, Arc<GuestMem>) {
    MEMORY.with(|cell| {
        let made = cell.get_or_init(|| {
            let own = OwnMem::new(LEN, GPA, false).expect("memory");
            let options = MapOptions {
                arm: false,
                ..MapOptions::default()
            };
            let region = own.region().expect("a descriptor");
            let mapped = GuestMem::map(vec![region], &Poison::new(), &options).expect("a mapping");
            (own, Arc::new(mapped))
        });
        made.clone()
    })
}

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }
}

/// Runs a script; every piece that a fetch lends must lie in the memory that was shared.
pub fn lie(data: &[u8], layout: u64) {
    let (own, mapped) = memory();
    own.write(GPA, &[0; LEN as usize]);
    let _ = run(Script(data), layout, &own, &mapped);
}

fn run(mut script: Script<'_>, layout: u64, own: &OwnMem, mapped: &Arc<GuestMem>) -> Option<()> {
    let bits = script.byte()?;
    let mut features = feature::VERSION_1 | layout;
    for (bit, feature) in [
        feature::IN_ORDER,
        feature::EVENT_IDX,
        feature::INDIRECT_DESC,
    ]
    .iter()
    .enumerate()
    {
        features |= if bits >> bit & 1 == 1 { *feature } else { 0 };
    }
    let way = if bits & 8 == 0 {
        Way::FromGuest
    } else {
        Way::ToGuest
    };
    let size = match bits >> 4 {
        0 => 1,
        1..=3 => 1 << (bits >> 4),
        4 => 7,
        5..=11 => 64,
        _ => 512, // holds used buffers back
    };
    let base = u32::from(script.word()?);
    let setup = RingSetup {
        mem: mapped.clone(),
        size,
        desc: own.uva(),
        avail: own.uva() + 8192,
        used: own.uva() + 16384,
        base,
        features,
        way,
    };
    let (mut ring, mut buffers) = (Ring::new(setup).ok()?, Buffers::new());
    let first = mapped
        .translate(&mut Hit::default(), GPA, 1)?
        .as_ptr()
        .addr();
    loop {
        match script.byte()? {
            // 1. The driver writes: anywhere, a descriptor whose address means something, an index.
            0..=99 => {
                let (at, len) = (
                    u64::from(script.word()?) % LEN,
                    usize::from(script.byte()? % 32),
                );
                let (bytes, rest) = script.0.split_at(len.min(script.0.len()));
                script.0 = rest;
                own.write(GPA + at, bytes);
            }
            100..=159 => {
                let slot = u64::from(script.byte()? % 64);
                let addr = GPA + u64::from(script.word()?) % (LEN + 64);
                let len = u32::from(script.word()?) % 3000;
                let (third, fourth) = (script.word()?, script.word()?);
                let tail = u64::from(len) | u64::from(third) << 32 | u64::from(fourth) << 48;
                own.write(GPA + slot * 16, &addr.to_le_bytes());
                own.write(GPA + slot * 16 + 8, &tail.to_le_bytes());
            }
            160..=179 => {
                own.write(GPA + 8192 + 2, &script.word()?.to_le_bytes());
            }
            // 2. The device's turn.
            choice @ 180..=239 => {
                let Ok(count) = ring.fetch(&mut buffers, BATCH) else {
                    return None;
                };
                assert!(count <= BATCH && count <= usize::from(size));
                let written: Vec<u32> =
                    (0..count).map(|n| touch(&buffers, n, first, way)).collect();
                let done = count.min(usize::from(script.byte()?));
                match way {
                    Way::ToGuest => ring.complete(done, &written[..done]),
                    Way::FromGuest if choice < 210 => ring.complete(done, &[]),
                    Way::FromGuest => ring.complete_lazily(done),
                }
            }
            240..=246 => {
                ring.arm();
            }
            247..=248 => ring.disarm(),
            249..=250 => {
                ring.settle();
                assert!(!ring.holds());
            }
            _ => {
                ring.call_wanted();
            }
        }
    }
}

/// Uses all of a buffer, as a port would.
fn touch(buffers: &Buffers, index: usize, first: usize, way: Way) -> u32 {
    let buffer = buffers.buffer(index);
    if buffers.fault(index).is_some() {
        return 0;
    }
    let whole = (buffer.at, buffer.len);
    let several: Vec<_> = buffers
        .pieces(index)
        .iter()
        .map(|piece| (piece.at, piece.len))
        .collect();
    assert!(several.is_empty() || (several.len() > 1 && buffer.len == 0));
    let pieces = if several.is_empty() {
        vec![whole]
    } else {
        several
    };
    let mut sum = 0;
    for (at, len) in pieces {
        if len == 0 {
            continue;
        }
        let offset = at.addr().wrapping_sub(first);
        assert!(
            offset < LEN as usize && len as usize <= LEN as usize - offset,
            "outside the memory"
        );
        sum += len;
        // SAFETY: inside the mapping, just checked, which `MEMORY` keeps.
        unsafe {
            match way {
                Way::FromGuest => {
                    std::hint::black_box(at.read_volatile());
                }
                Way::ToGuest => at.add(len as usize - 1).write_volatile(0x5a),
            }
        }
    }
    sum
}
