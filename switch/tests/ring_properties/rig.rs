//! A ring with both its sides, and the same memory as `virtio-queue` sees it.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::select;
use ringway::virtio::buffers::Buffers;
use ringway::virtio::driver::{DriverRing, DriverSetup};
use ringway::virtio::guest_mem::{GuestMem, MapOptions, Poison};
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::{Ring, RingSetup, Way, feature};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

pub(super) const GPA: u64 = 0x4000_0000;
/// Bytes behind the ring for tables and buffers.
pub(super) const POOL: u64 = 64 << 10;
/// A second region follows the first without a gap.
pub(super) const SECOND: u64 = 4096;

/// A ring with both its sides, and the same memory as `virtio-queue` sees it.
pub(super) struct Rig {
    pub(super) guest: DriverRing,
    pub(super) device: Ring,
    pub(super) buffers: Box<Buffers>,
    pub(super) mem: Arc<OwnMem>,
    pub(super) oracle: GuestMemoryMmap,
    pub(super) regions: [Range<u64>; 2],
    pub(super) size: u16,
    pub(super) way: Way,
    /// Tables written so far.
    pub(super) tables: u64,
}

impl Rig {
    pub(super) fn new(size: u16, features: u64, way: Way) -> Rig {
        let bytes = DriverRing::bytes(size, features) + POOL;
        let mem = OwnMem::new(bytes, GPA, false).expect("memory");
        let end = GPA + mem.len();
        let second = OwnMem::new(SECOND, end, false).expect("memory");
        let setup = DriverSetup {
            mem: mem.clone(),
            at: GPA,
            size,
            features,
            way,
        };
        let guest = DriverRing::new(setup).expect("driver side");
        let region = |mem: &OwnMem| {
            let file = File::from(mem.fd().try_clone_to_owned().expect("fd"));
            let map = MmapRegion::from_file(FileOffset::new(file, 0), mem.len() as usize);
            GuestRegionMmap::new(map.expect("mapping"), GuestAddress(mem.gpa())).expect("region")
        };
        let oracle = GuestMemoryMmap::from_regions(vec![region(&mem), region(&second)]);
        let specs = [&mem, &second].map(|mem| mem.region().expect("region"));
        let (poison, options) = (Arc::new(Poison::default()), MapOptions::default());
        let map = GuestMem::map(specs.into(), &poison, &options).expect("map");
        let (desc, avail, used) = guest.addresses();
        let device = Ring::new(RingSetup {
            mem: Arc::new(map),
            size,
            desc,
            avail,
            used,
            base: guest.base(),
            features,
            way,
        });
        Rig {
            guest,
            device: device.expect("device side"),
            buffers: Buffers::new(),
            mem,
            oracle: oracle.expect("oracle"),
            regions: [GPA..end, end..end + SECOND],
            size,
            way,
            tables: 0,
        }
    }

    pub(super) fn pool(&self) -> u64 {
        self.regions[0].end - POOL
    }

    pub(super) fn inside(&self, addr: u64, len: u32) -> bool {
        let end = addr.checked_add(u64::from(len));
        end.is_some_and(|end| {
            let holds = |r: &Range<u64>| r.start <= addr && addr < r.end && end <= r.end;
            self.regions.iter().any(holds)
        })
    }

    /// Guest address of a pointer of the device's mapping, which must have `len` bytes in one region.
    pub(super) fn guest_addr(&self, at: *mut u8, len: u32) -> u64 {
        let map = self.device.mem();
        for region in map.regions() {
            let host = map.translate_uva(region.uva(), 1).expect("mapped");
            let offset = (at.addr() as u64).wrapping_sub(host.as_ptr().addr() as u64);
            if offset < region.len() && u64::from(len) <= region.len() - offset {
                return region.gpa() + offset;
            }
        }
        panic!("{at:?} + {len} is outside the guest's memory");
    }

    /// The pieces of fetched buffer `index` in guest addresses, or nothing if it has a fault. Checks every pointer.
    pub(super) fn pieces(&self, index: usize) -> Option<Vec<(u64, u32)>> {
        let buffer = self.buffers.buffer(index);
        if self.buffers.fault(index).is_some() {
            return None;
        }
        let pieces = self.buffers.pieces(index);
        if !pieces.is_empty() {
            assert_eq!((buffer.at, buffer.len), (pieces[0].at, 0));
            return Some(
                pieces
                    .iter()
                    .map(|p| (self.guest_addr(p.at, p.len), p.len))
                    .collect(),
            );
        }
        if buffer.len == 0 {
            return Some(Vec::new());
        }
        assert!(buffer.room >= buffer.len);
        self.guest_addr(buffer.at, buffer.room);
        Some(vec![(self.guest_addr(buffer.at, buffer.len), buffer.len)])
    }

    /// Guest address of a ring part.
    pub(super) fn part(&self, uva: u64) -> u64 {
        uva - self.mem.uva() + GPA
    }

    /// The split ring as `virtio-queue` has it, next to go at `next`.
    pub(super) fn oracle_queue(&self, next: u16) -> Queue {
        let (desc, avail, used) = self.guest.addresses();
        let halves = |uva| {
            let at = self.part(uva);
            (Some(at as u32), Some((at >> 32) as u32))
        };
        let mut queue = Queue::new(32768).expect("queue");
        queue.set_size(self.size);
        let (low, high) = halves(desc);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(avail);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(used);
        queue.set_used_ring_address(low, high);
        queue.set_next_avail(next);
        queue.set_next_used(next);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.oracle));
        queue
    }
}

pub(super) fn ways() -> impl Strategy<Value = Way> {
    select(vec![Way::FromGuest, Way::ToGuest])
}

pub(super) fn features(packed: bool, in_order: bool, event_idx: bool) -> u64 {
    let bit = |on, bit| if on { bit } else { 0 };
    feature::VERSION_1
        | feature::INDIRECT_DESC
        | bit(packed, feature::RING_PACKED)
        | bit(in_order, feature::IN_ORDER)
        | bit(event_idx, feature::EVENT_IDX)
}
