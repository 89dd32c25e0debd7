//! Where a guest's rings and buffers lie in its memory.

use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use super::queue::{QueuePair, Rx, Side, Tx};
use super::session::RingPlace;
use super::{GuestError, MemoryKind, Options};
use crate::virtio::buffers::PIECES_MAX;
use crate::virtio::driver::{DriverRing, DriverSetup};
use crate::virtio::net::HEADER_LEN;
use crate::virtio::own_mem::OwnMem;
use crate::virtio::ring::{Way, feature};

/// Where the memory begins for the guest's descriptors. Not where it is mapped: a switch that confuses the two address
/// spaces must fail with these guests as it would with QEMU's.
const GUEST_BASE: u64 = 0x1_0000_0000;
/// The header ends a cache line and the frame begins the next, as in DPDK's mbufs: whoever does not read headers touches
/// one line less.
const HEADER_AT: u64 = 64 - HEADER_LEN as u64;
/// Bytes of a descriptor in an indirect table.
pub(super) const DESC: usize = 16;

/// What `build` makes.
pub(super) type Built = (Arc<OwnMem>, Vec<RingPlace>, Vec<QueuePair>);

/// Lays rings and buffers out in fresh memory. Ring 2·n is pair n's receive ring, 2·n+1 its transmit ring.
pub(super) fn build(options: &Options, features: u64) -> Result<Built, GuestError> {
    let size = options.ring_size;
    let ring_bytes = DriverRing::bytes(size, features).next_multiple_of(4096);
    let kinds = [
        (Way::ToGuest, options.receive_buffer),
        (Way::FromGuest, options.frame_max + HEADER_LEN as u32),
    ];
    // Offsets of ring, buffers and tables, for every ring.
    let (mut plan, mut used) = (Vec::new(), GUEST_BASE);
    for _ in 0..options.queue_pairs {
        for (way, len) in kinds {
            let buffers = Buffers::new(used + ring_bytes, len);
            let tables = buffers.base + buffers.stride * u64::from(size);
            plan.push((way, used, buffers, tables));
            let tables_bytes = match options.piece {
                0 => 0,
                _ => (u64::from(size) * (PIECES_MAX * DESC) as u64).next_multiple_of(64),
            };
            used = (tables + tables_bytes).next_multiple_of(4096);
        }
    }
    let hugepages = options.memory == MemoryKind::Hugepages;
    let bytes = used - GUEST_BASE;
    let mem = OwnMem::new(bytes, GUEST_BASE, hugepages)
        .map_err(|cause| GuestError::memory(bytes, hugepages, cause))?;
    let (mut places, mut sides) = (Vec::new(), Vec::new());
    for (way, at, buffers, tables) in plan {
        let setup = DriverSetup {
            mem: mem.clone(),
            at,
            size,
            features,
            way,
        };
        let ring = DriverRing::new(setup)
            .map_err(|bad| GuestError::Options(format!("a ring of {size}: {bad}")))?;
        let (side, place) = notified(options, features, (ring, buffers, tables))?;
        places.push(place);
        sides.push(side);
    }
    let mut sides = sides.into_iter();
    let pairs = std::iter::from_fn(|| {
        let (rx, tx) = (sides.next()?, sides.next()?);
        Some(QueuePair {
            rx: Rx::new(rx, features & feature::MRG_RXBUF != 0),
            tx: Tx::new(tx, features & feature::IN_ORDER != 0 && options.piece == 0),
        })
    });
    Ok((mem, places, pairs.collect()))
}

/// Gives a ring its event descriptors.
fn notified(
    options: &Options,
    features: u64,
    (ring, buffers, tables): (DriverRing, Buffers, u64),
) -> Result<(Side, RingPlace), GuestError> {
    let new = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let fd = || match new() {
        Ok(fd) => Ok(Arc::new(fd)),
        Err(errno) => Err(GuestError::Eventfd(errno.into())),
    };
    let (kick, call) = (fd()?, fd()?);
    let (desc, avail, used) = ring.addresses();
    let place = RingPlace {
        size: ring.size(),
        base: ring.base(),
        desc,
        avail,
        used,
        kick: kick.clone(),
        call: call.clone(),
    };
    let indirect = features & feature::INDIRECT_DESC != 0;
    let size = buffers.stride * u64::from(ring.size());
    let first = ring.mem().ptr(buffers.base, size);
    let first = first.expect("`build` made room for all buffers").as_ptr();
    let side = Side {
        ring,
        buffers,
        piece: options.piece,
        tables: if indirect { tables } else { 0 },
        kick,
        call,
        kicks: 0,
        first,
    };
    Ok((side, place))
}

/// The buffers of one ring, as many as it has descriptors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffers {
    /// Guest address of the first.
    pub(super) base: u64,
    /// From one to the next.
    pub(super) stride: u64,
    /// Bytes of a buffer, the virtio-net header included.
    pub(super) len: u32,
}

impl Buffers {
    /// An odd number of cache lines apart, so that the heads of neighbours fall into different sets of the cache.
    fn new(base: u64, len: u32) -> Buffers {
        let lines = (HEADER_AT + u64::from(len)).div_ceil(64);
        Buffers {
            base,
            stride: 64 * (lines | 1),
            len,
        }
    }

    /// Where the header of buffer `index` is for the device.
    #[inline]
    pub(super) fn header(&self, index: u16) -> u64 {
        self.base + u64::from(index) * self.stride + HEADER_AT
    }

    /// Which buffer begins there.
    #[inline]
    pub(super) fn index(&self, header: u64) -> u16 {
        // 32-bit division is a third of the 64-bit one's cost; `Options::check` bounds the memory.
        (((header - self.base) as u32) / self.stride as u32) as u16
    }
}
