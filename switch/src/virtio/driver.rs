//! Both ring layouts, driver side: the engine of the guests that demo, benchmark and tests play.
//!
//! A ring lies in an [`OwnMem`] that the device maps too. The device is trusted not to lie: one that gives back what was
//! never given ends in a panic, for it is a bug of the switch; a ring of kept buffers only notes it ([`DriverRing::lied`]).
//!
//! ```
//! # use ringway::virtio::{driver::{DriverRing, DriverSetup}, own_mem::OwnMem, ring::{Way, feature}};
//! let features = feature::VERSION_1 | feature::RING_PACKED | feature::IN_ORDER;
//! let mem = OwnMem::new(1 << 20, 0x4000_0000, false)?;
//! let setup = DriverSetup { mem: mem.clone(), at: mem.gpa(), size: 256, features, way: Way::FromGuest };
//! let mut ring = DriverRing::new(setup)?;
//! let frame = mem.gpa() + DriverRing::bytes(256, features);
//! assert_eq!(ring.post(&[(frame, 12 + 64)]), 1);      // the device can see it now
//! assert_eq!(ring.reclaim(), 0);                      // nobody took it yet
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::sync::Arc;

use super::own_mem::OwnMem;
use super::ring::{BadSetup, Way, feature, prefetch_read};

mod packed;
mod raw;
mod split;

use packed::PackedDriver;
pub use raw::Raw;
use split::SplitDriver;

/// Where a ring lies and how both sides agreed to use it.
pub struct DriverSetup {
    /// The memory of ring and buffers.
    pub mem: Arc<OwnMem>,
    /// Guest address of [`DriverRing::bytes`] bytes for the ring, aligned to 64. They are zeroed.
    pub at: u64,
    /// Descriptors: a power of two up to 32768 for split rings, 1 to 32768 for packed ones.
    pub size: u16,
    /// Negotiated features: layout, IN_ORDER, EVENT_IDX and MRG_RXBUF matter here.
    pub features: u64,
    /// Direction.
    pub way: Way,
}

/// A buffer the device gave back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Used {
    /// Its first byte, as it was posted.
    pub addr: u64,
    /// Bytes the device wrote: header and frame, or a part of it.
    pub len: u32,
    /// Its id in the ring.
    pub id: u16,
    /// From [`DriverRing::take_frames`]: buffers of the frame that begins here, 0 for one that goes on.
    pub buffers: u16,
}

/// What the ring remembers of a buffer in flight, by id.
#[derive(Clone, Copy, Default)]
struct Held {
    addr: u64,
    /// Descriptors it takes; 0: not in flight.
    descs: u16,
}

/// A ring of either layout, used by one thread at a time.
pub struct DriverRing {
    side: Side,
    mem: Arc<OwnMem>,
    merge: bool,
    /// The beginning of a frame whose other buffers did not fit into the last `take_frames`.
    cut: Vec<Used>,
}

enum Side {
    Split(SplitDriver),
    Packed(PackedDriver),
}

/// Runs the same on either layout.
macro_rules! side {
    ($ring:expr, $side:ident => $run:expr) => {
        match $ring {
            Side::Split($side) => $run,
            Side::Packed($side) => $run,
        }
    };
}

impl DriverRing {
    /// Bytes a ring takes.
    pub fn bytes(size: u16, features: u64) -> u64 {
        if features & feature::RING_PACKED != 0 {
            packed::layout(size).2
        } else {
            split::layout(size).2
        }
    }

    /// Lays an empty ring out. Calls are off until [`DriverRing::arm`] asks for one.
    pub fn new(setup: DriverSetup) -> Result<DriverRing, BadSetup> {
        let bytes = DriverRing::bytes(setup.size, setup.features);
        if !setup.at.is_multiple_of(64) {
            return Err(BadSetup::Align(setup.at));
        }
        if !setup.mem.write(setup.at, &vec![0; bytes as usize]) {
            return Err(BadSetup::Outside(setup.at));
        }
        let (mem, features) = (setup.mem.clone(), setup.features);
        Ok(DriverRing {
            side: if features & feature::RING_PACKED != 0 {
                Side::Packed(PackedDriver::new(setup)?)
            } else {
                Side::Split(SplitDriver::new(setup)?)
            },
            mem,
            merge: features & feature::MRG_RXBUF != 0,
            cut: Vec::new(),
        })
    }

    /// What SET_VRING_ADDR names: descriptors, available ring or driver area, used ring or device area. They are
    /// addresses of this process ([`OwnMem::uva`]).
    pub fn addresses(&self) -> (u64, u64, u64) {
        side!(&self.side, side => side.addresses())
    }

    /// What SET_VRING_BASE says: the device goes on there.
    pub fn base(&self) -> u32 {
        side!(&self.side, side => side.base())
    }

    /// Descriptors in the ring.
    pub fn size(&self) -> u16 {
        side!(&self.side, side => side.size())
    }

    /// Descriptors that can be posted.
    #[inline]
    pub fn free(&self) -> usize {
        usize::from(side!(&self.side, side => side.free()))
    }

    /// The memory of ring and buffers.
    pub fn mem(&self) -> &Arc<OwnMem> {
        &self.mem
    }

    /// Makes buffers of one descriptor each available, (guest address, length) with the virtio-net header in front, all
    /// at once; returns how many had room. In a receive ring they are empty buffers.
    #[inline]
    pub fn post(&mut self, buffers: &[(u64, u32)]) -> usize {
        side!(&mut self.side, side => side.post(buffers))
    }

    /// Makes one buffer of several pieces available, as a chain; false if it has no room.
    pub fn post_chain(&mut self, pieces: &[(u64, u32)]) -> bool {
        !pieces.is_empty() && side!(&mut self.side, side => side.post_chain(pieces))
    }

    /// Makes one buffer of several pieces available through a table, which is written to guest address `table`
    /// (16 bytes a piece); false if it has no room.
    pub fn post_indirect(&mut self, table: u64, pieces: &[(u64, u32)]) -> bool {
        let room = self.mem.ptr(table, 16 * pieces.len() as u64).is_some();
        room && !pieces.is_empty()
            && side!(&mut self.side, side => side.post_indirect(table, pieces))
    }

    /// Takes back buffers the device is done with, in the order it used them; returns how many. In a receive ring the
    /// device must have given each one back by itself, IN_ORDER or not, as DPDK's driver demands.
    #[inline]
    pub fn take(&mut self, out: &mut [Used]) -> usize {
        side!(&mut self.side, side => side.take(out))
    }

    /// Like `take`, and tells frames apart by the header's num_buffers: only whole frames are returned. `out` must
    /// have room for the longest.
    #[inline]
    pub fn take_frames(&mut self, out: &mut [Used]) -> usize {
        let before = self.cut.len().min(out.len());
        out[..before].copy_from_slice(&self.cut[..before]);
        self.cut.drain(..before);
        let count = before + self.take(&mut out[before..]);
        if self.merge {
            // Headers come from the device's cache, one miss each: ask for all before the first is read.
            for used in &out[before..count] {
                if let Some(header) = self.mem.ptr(used.addr, 0) {
                    prefetch_read(header.as_ptr());
                }
            }
        }
        let mut index = 0;
        while index < count {
            let buffers = usize::from(self.buffers_of(&out[index]));
            if index + buffers > count {
                debug_assert!(index > 0 || count < out.len(), "frame of {buffers} buffers");
                self.cut.extend_from_slice(&out[index..count]);
                return index;
            }
            out[index].buffers = buffers as u16;
            for further in &mut out[index + 1..index + buffers] {
                further.buffers = 0;
            }
            index += buffers;
        }
        count
    }

    /// Buffers of the frame that begins in `first`.
    #[inline]
    fn buffers_of(&self, first: &Used) -> u16 {
        if !self.merge {
            return 1;
        }
        super::net::num_buffers(&self.mem, first.addr).max(1)
    }

    /// Takes back all buffers the device is done with without looking at them; returns how many. In a transmit ring
    /// with IN_ORDER they are the oldest ones.
    #[inline]
    pub fn reclaim(&mut self) -> usize {
        side!(&mut self.side, side => side.reclaim())
    }

    /// Writes down buffer `id` (address and length), which stays with its number: a ring is used either through buffers that
    /// are kept, or through all the other functions, never both. The device must not have the buffer.
    ///
    /// Kept buffers cost the least lines: a split ring's descriptors are written once, not once per frame.
    #[inline]
    pub fn keep(&mut self, id: u16, buffer: (u64, u32)) {
        if let Side::Split(split) = &mut self.side {
            split.keep(id, buffer);
        } // A packed ring's descriptors do not outlive their use.
    }

    /// Makes `count` kept buffers available at once: `buffer` gives number, address and length of each, as they were kept.
    /// With IN_ORDER those of a transmit ring are numbered as they come: 0, 1, …, size − 1, 0, ….
    ///
    /// # Panics
    /// If they are more than [`DriverRing::free`].
    #[inline]
    pub fn post_kept(&mut self, count: usize, buffer: impl Fn(usize) -> (u16, u64, u32)) {
        side!(&mut self.side, side => side.post_kept(count, buffer));
    }

    /// Takes back kept buffers, number and bytes the device wrote; returns how many.
    #[inline]
    pub fn take_kept(&mut self, out: &mut [(u16, u32)]) -> usize {
        side!(&mut self.side, side => side.take_kept(out))
    }

    /// Takes back all kept buffers of a transmit ring with IN_ORDER that the device is done with: the oldest ones.
    #[inline]
    pub fn reclaim_kept(&mut self) {
        side!(&mut self.side, side => side.reclaim_kept());
    }

    /// True once the device has given back a kept buffer that it did not have: nothing it says can be believed any more.
    #[inline]
    pub fn lied(&self) -> bool {
        side!(&self.side, side => side.lied())
    }

    /// True if the device wants to be kicked about what was posted since the last time this was asked.
    #[inline]
    pub fn kick_wanted(&mut self) -> bool {
        side!(&mut self.side, side => side.kick_wanted())
    }

    /// Asks the device to call when it gives the next buffer back; true if one is back already.
    pub fn arm(&mut self) -> bool {
        side!(&mut self.side, side => side.arm())
    }

    /// Asks the device not to call. With EVENT_IDX a split ring cannot say so: one call in 65,536 buffers remains.
    pub fn disarm(&mut self) {
        side!(&mut self.side, side => side.disarm());
    }

    /// Direct access to the ring's memory, for guests that lie.
    pub fn raw(&self) -> Raw<'_> {
        side!(&self.side, side => side.raw())
    }
}
