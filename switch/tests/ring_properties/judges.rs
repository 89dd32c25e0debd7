//! What a ring in memory must be read as: by `virtio-queue`, and by the letter of the specification.

use ringway::virtio::buffers::{BATCH, CHAIN_MAX};
use ringway::virtio::ring::{Way, flag};
use virtio_queue::QueueOwnedT;

use super::rig::Rig;

/// What `virtio-queue` makes of one available buffer.
pub(super) struct Oracle {
    pub(super) head: u16,
    /// Address, length, writable.
    pub(super) descs: Vec<(u64, u32, bool)>,
    /// It was walked to its end: an error ends the walk without a word.
    pub(super) whole: bool,
}

/// All available buffers from `next` on; nothing if the index is wrong.
pub(super) fn ask_oracle(rig: &Rig, next: u16) -> Option<Vec<Oracle>> {
    let mut queue = rig.oracle_queue(next);
    let chains = queue.iter(&rig.oracle).ok()?;
    let judge = chains.map(|chain| {
        let head = chain.head_index();
        let descs: Vec<_> = chain.collect();
        Oracle {
            head,
            whole: descs.last().is_some_and(|d| !d.has_next()),
            descs: descs
                .iter()
                .map(|d| (d.addr().0, d.len(), d.is_write_only()))
                .collect(),
        }
    });
    Some(judge.collect())
}

type Expected = Result<Vec<Expect>, ()>;

/// What a buffer must turn out to be.
#[derive(Debug, PartialEq)]
pub(super) struct Expect {
    /// Nothing: a fault.
    pub(super) pieces: Option<Vec<(u64, u32)>>,
    pub(super) id: u16,
    pub(super) slots: u16,
}

/// The packed ring by the letter: what `fetch` must find, or that it must call the guest a liar.
pub(super) fn packed_model(rig: &Rig, place: u32) -> Expected {
    let (size, to_guest) = (u32::from(rig.size), rig.way == Way::ToGuest);
    let (mut at, mut wrap) = (place & 0x7fff, place & 0x8000 != 0);
    let (mut found, mut left) = (Vec::new(), size);
    while left > 0 && found.len() < BATCH {
        let available = |flags: u16| (flags & 0x80 != 0) == wrap && (flags & 0x8000 != 0) != wrap;
        if !available(rig.guest.raw().desc(at as u16).3) {
            break;
        }
        let (mut descs, mut slots) = (Vec::new(), 0);
        let id = loop {
            if slots == left {
                return Err(());
            }
            let (addr, len, id, flags) = rig.guest.raw().desc(((at + slots) % size) as u16);
            slots += 1;
            if flags & flag::INDIRECT != 0 {
                if both(flags) || slots > 1 {
                    return Err(());
                }
                descs = table_model(rig, addr, len)?;
                break id;
            }
            descs.push((addr, len, flags & flag::WRITE != 0));
            if flags & flag::NEXT == 0 {
                break id;
            }
        };
        if descs.len() > usize::from(CHAIN_MAX) || descs.iter().any(|d| d.2 != to_guest) {
            return Err(());
        }
        found.push(Expect {
            pieces: usable(rig, &descs),
            id,
            slots: slots as u16,
        });
        left -= slots;
        at += slots;
        if at >= size {
            (at, wrap) = (at - size, !wrap);
        }
    }
    Ok(found)
}

fn table_model(rig: &Rig, addr: u64, len: u32) -> Result<Vec<(u64, u32, bool)>, ()> {
    if len == 0 || !len.is_multiple_of(16) || !rig.inside(addr, len) {
        return Err(());
    }
    let mut bytes = vec![0; len as usize];
    let _ = rig.mem.read(addr, &mut bytes); // else in the second region, where all is zero
    let mut descs = Vec::new();
    for desc in bytes.chunks_exact(16) {
        let flags = u16::from_le_bytes([desc[14], desc[15]]);
        if flags & flag::INDIRECT != 0 && descs.len() < usize::from(CHAIN_MAX) {
            return Err(());
        }
        // A transmit table's flags are not believed: DPDK leaves garbage there.
        let write = rig.way == Way::ToGuest && flags & flag::WRITE != 0;
        let addr = u64::from_le_bytes(desc[..8].try_into().expect("8"));
        let len = u32::from_le_bytes(desc[8..12].try_into().expect("4"));
        descs.push((addr, len, write));
    }
    Ok(descs)
}

/// The pieces of a legal chain, if all of them are in memory and not too many.
pub(super) fn usable(rig: &Rig, descs: &[(u64, u32, bool)]) -> Option<Vec<(u64, u32)>> {
    let pieces: Vec<_> = descs
        .iter()
        .filter(|d| d.1 > 0)
        .map(|d| (d.0, d.1))
        .collect();
    // A single descriptor is looked up whatever its length, the links of a chain only if they have one.
    let alone = descs.len() == 1 && !rig.inside(descs[0].0, descs[0].1);
    let fits = pieces.len() <= 41 && pieces.iter().all(|p| rig.inside(p.0, p.1));
    (fits && !alone).then_some(pieces)
}

/// True if descriptor flags say "table" and "goes on": virtio-queue follows the table, we call it a lie.
pub(super) fn both(flags: u16) -> bool {
    flags & (flag::INDIRECT | flag::NEXT) == flag::INDIRECT | flag::NEXT
}
