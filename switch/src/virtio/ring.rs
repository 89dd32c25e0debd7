//! Virtqueues in a guest's memory, seen by the device: one interface to both layouts, chosen once per burst.
//!
//! A turn at a ring is `fetch`, use the buffers, `complete`. `fetch` does not consume: asked again, it fetches the same
//! buffers again. Everything the guest wrote is read once, checked, and used from the copy; a guest that breaks the rules of
//! the layout gets a [`Lie`], which ends its ring, and a buffer that merely cannot be used becomes a [`super::buffers::Fault`].
#![allow(unsafe_code)]

use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::buffers::Buffers;
use super::guest_mem::GuestMem;
use super::packed::PackedRing;
use super::split::SplitRing;

/// Descriptor flags (virtio 1.2 §2.7.5, §2.8.6).
pub mod flag {
    /// The chain goes on.
    pub const NEXT: u16 = 1;
    /// For the device to write.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
    /// Packed: available if equal to the driver's wrap counter, and [`USED`] is not.
    pub const AVAIL: u16 = 1 << 7;
    /// Packed: used if equal to the device's wrap counter.
    pub const USED: u16 = 1 << 15;
}

/// Feature bits this crate knows (virtio 1.2 §5.1.3, §6; vhost-user protocol).
pub mod feature {
    /// Buffers for reception can be merged (VIRTIO_NET_F_MRG_RXBUF).
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The frontend serves a control queue (VIRTIO_NET_F_CTRL_VQ).
    pub const CTRL_VQ: u64 = 1 << 17;
    /// The guest can announce itself (VIRTIO_NET_F_GUEST_ANNOUNCE).
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// Several queue pairs (VIRTIO_NET_F_MQ).
    pub const MQ: u64 = 1 << 22;
    /// Indirect descriptor tables (VIRTIO_F_INDIRECT_DESC).
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notification by index (VIRTIO_F_EVENT_IDX).
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user protocol features (VHOST_USER_F_PROTOCOL_FEATURES).
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.0 and later (VIRTIO_F_VERSION_1).
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed layout (VIRTIO_F_RING_PACKED).
    pub const RING_PACKED: u64 = 1 << 34;
    /// Buffers are used in the order they were made available (VIRTIO_F_IN_ORDER).
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Which way the frames of a ring go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// The guest's transmit ring: buffers are read.
    FromGuest,
    /// The guest's receive ring: buffers are written.
    ToGuest,
}

impl Way {
    /// The flags of a descriptor that stands alone; in a packed ring besides those that say that it is available.
    #[inline]
    pub(super) fn plain(self) -> u16 {
        match self {
            Way::ToGuest => flag::WRITE,
            Way::FromGuest => 0,
        }
    }
}

/// The guest broke the layout's rules: the ring cannot be used any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Lie {
    /// More buffers available than the ring has descriptors.
    #[error("available index is {pending} ahead in a ring of {size}")]
    AvailIdx {
        /// Buffers announced.
        pending: u16,
        /// Descriptors in the ring.
        size: u16,
    },
    /// A descriptor number beyond the table.
    #[error("descriptor {index} in a table of {size}")]
    Index {
        /// The number.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// A chain longer than its table or than [`super::buffers::CHAIN_MAX`]: it loops, or might as well.
    #[error("descriptor chain loops or has more than 128 descriptors")]
    Loop,
    /// A writable buffer in a transmit ring, or a readable one in a receive ring.
    #[error("descriptor for the wrong direction")]
    Direction,
    /// An indirect table that is nested, chained on, empty, of odd length, outside memory, or was not negotiated.
    #[error("malformed indirect table")]
    Indirect,
}

/// A descriptor as it stood in memory when it was read (virtio 1.2 §2.7.5; the packed layout differs in the last words).
#[derive(Clone, Copy)]
pub(super) struct Desc {
    pub(super) addr: u64,
    pub(super) len: u32,
    /// Split: flags; packed: buffer id.
    pub(super) third: u16,
    /// Split: next; packed: flags.
    pub(super) fourth: u16,
}

impl Desc {
    /// Reads a descriptor's two words, each once.
    ///
    /// # Safety
    /// 16 bytes at `at` are mapped; `at` is aligned to 16.
    #[inline]
    pub(super) unsafe fn read(at: *const u64) -> Desc {
        // SAFETY: the caller's promise.
        let (addr, rest) = unsafe { (ptr::read_volatile(at), ptr::read_volatile(at.add(1))) };
        Desc {
            addr,
            len: rest as u32,
            third: (rest >> 32) as u16,
            fourth: (rest >> 48) as u16,
        }
    }

    /// Reads a descriptor of an indirect table, which need not be aligned.
    ///
    /// # Safety
    /// 16 bytes at `at` are mapped.
    pub(super) unsafe fn read_anywhere(at: *const u8) -> Desc {
        #[derive(Clone, Copy)]
        #[repr(C, packed)]
        struct Word(u64);
        // SAFETY: the caller's promise; volatile: read exactly once.
        let words = unsafe {
            let at = at.cast::<Word>();
            [ptr::read_volatile(at).0, ptr::read_volatile(at.add(1)).0]
        };
        // SAFETY: an aligned private copy.
        unsafe { Desc::read(words.as_ptr()) }
    }
}

/// A ring's descriptors.
#[derive(Clone, Copy)]
pub(super) struct Table {
    first: *mut u8,
    pub(super) size: u16,
}

impl Table {
    /// `size` descriptors at `first`, where they must be mapped, aligned to 16.
    pub(super) fn new(first: *mut u8, size: u16) -> Table {
        Table { first, size }
    }

    /// Where descriptor `index` is.
    ///
    /// # Safety
    /// `index < size`.
    #[inline]
    pub(super) unsafe fn at(self, index: u16) -> *mut u8 {
        debug_assert!(index < self.size);
        // SAFETY: the caller's promise, and that of `new`.
        unsafe { self.first.add(size_of::<[u64; 2]>() * usize::from(index)) }
    }

    /// Reads descriptor `index`.
    ///
    /// # Safety
    /// `index < size`.
    #[inline]
    pub(super) unsafe fn read(self, index: u16) -> Desc {
        // SAFETY: the caller's promise; mapped and aligned by that of `new`.
        unsafe { Desc::read(self.at(index).cast()) }
    }
}

/// Where a guest put a ring, and how both sides agreed to use it.
pub struct RingSetup {
    /// The guest's memory; the ring keeps it mapped.
    pub mem: Arc<GuestMem>,
    /// Descriptors: a power of two up to 32768 for split rings, 1 to 32768 for packed ones.
    pub size: u16,
    /// Descriptor table or packed ring (frontend's address space).
    pub desc: u64,
    /// Available ring; packed: driver event suppression area.
    pub avail: u64,
    /// Used ring; packed: device event suppression area.
    pub used: u64,
    /// SET_VRING_BASE. Split: next available index. Packed: bits 0 to 14 next descriptor, bit 15 wrap counter.
    pub base: u32,
    /// Negotiated features.
    pub features: u64,
    /// Direction.
    pub way: Way,
}

/// A ring cannot be set up as the frontend asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadSetup {
    /// The size is not allowed.
    #[error("ring size {0} is not allowed")]
    Size(u16),
    /// An address is not aligned as the layout demands.
    #[error("ring address {0:#x} is misaligned")]
    Align(u64),
    /// A part of the ring lies outside the shared memory, or across two regions.
    #[error("ring part at {0:#x} is outside the shared memory")]
    Outside(u64),
    /// A packed ring cannot go on there.
    #[error("ring base {0:#x} is outside the ring")]
    Base(u32),
}

impl RingSetup {
    /// Finds a part of the ring in our address space.
    pub(super) fn part(&self, at: u64, len: u64, align: u64) -> Result<*mut u8, BadSetup> {
        if !at.is_multiple_of(align) {
            return Err(BadSetup::Align(at));
        }
        let part = self
            .mem
            .translate_uva(at, len)
            .map(NonNull::as_ptr)
            .ok_or(BadSetup::Outside(at))?;
        if !(part.addr() as u64).is_multiple_of(align) {
            return Err(BadSetup::Align(at));
        }
        Ok(part)
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }
}

/// A ring of either layout.
pub enum Ring {
    /// virtio 1.2 §2.7.
    Split(SplitRing),
    /// virtio 1.2 §2.8.
    Packed(PackedRing),
}

impl Ring {
    /// Sets a ring up as negotiated.
    pub fn new(setup: RingSetup) -> Result<Ring, BadSetup> {
        if setup.has(feature::RING_PACKED) {
            PackedRing::new(setup).map(Ring::Packed)
        } else {
            SplitRing::new(setup).map(Ring::Split)
        }
    }

    /// True if the descriptors themselves say what is available (virtio 1.2 §2.8).
    #[inline]
    pub fn is_packed(&self) -> bool {
        matches!(self, Ring::Packed(_))
    }

    /// Fetches up to `most` (≤ [`super::buffers::BATCH`]) buffers in order, without consuming them; returns how many.
    #[inline]
    pub fn fetch(&mut self, buffers: &mut Buffers, most: usize) -> Result<usize, Lie> {
        match self {
            Ring::Split(ring) => ring.fetch(buffers, most),
            Ring::Packed(ring) => ring.fetch(buffers, most),
        }
    }

    /// Gives the first `count` fetched buffers back. `written[i]` bytes were written to buffer `i` of a receive ring;
    /// shorter or empty: 0.
    #[inline]
    pub fn complete(&mut self, count: usize, written: &[u32]) {
        match self {
            Ring::Split(ring) => ring.complete(count, written),
            Ring::Packed(ring) => ring.complete(count, written),
        }
    }

    /// As [`Ring::complete`], of a transmit ring, but the guest may learn of it later: with later buffers, by [`Ring::call_wanted`] if it
    /// wants calls, or by [`Ring::settle`].
    ///
    /// A split ring of 512 and more holds some used buffers back from a driver that polls: a sixteenth of the ring, at most 64, or up to
    /// twice as many; none with EVENT_IDX, and none while buffers are chains. DPDK's driver takes used buffers back only when it has
    /// no others, or when all but 32 of the ring are used: then a thousand at once, which its pool gives out again when they
    /// lie in nobody's cache. This way it takes one for each that it sends.
    #[inline]
    pub fn complete_lazily(&mut self, count: usize) {
        match self {
            Ring::Split(ring) => ring.complete_lazily(count),
            Ring::Packed(ring) => ring.complete(count, &[]),
        }
    }

    /// True if the guest was not told of all used buffers.
    #[inline]
    pub fn holds(&self) -> bool {
        match self {
            Ring::Split(ring) => ring.held() != 0,
            Ring::Packed(_) => false,
        }
    }

    /// Holds no more used buffers back from now on: the guest cannot do without them.
    pub fn hold_none(&mut self) {
        if let Ring::Split(ring) = self {
            ring.hold_none();
        }
    }

    /// Tells the guest of all used buffers. It may want a call then: see [`Ring::call_wanted`].
    #[inline]
    pub fn settle(&mut self) {
        if let Ring::Split(ring) = self {
            ring.settle();
        }
    }

    /// True if the guest wants to be called about what was completed since the last time this was asked. Then it is told of all of it.
    #[inline]
    pub fn call_wanted(&mut self) -> bool {
        match self {
            Ring::Split(ring) => ring.call_wanted(),
            Ring::Packed(ring) => ring.call_wanted(),
        }
    }

    /// Asks the guest to kick when it makes the next buffer available; true if one is available already.
    pub fn arm(&mut self) -> bool {
        match self {
            Ring::Split(ring) => ring.arm(),
            Ring::Packed(ring) => ring.arm(),
        }
    }

    /// Asks the guest not to kick.
    pub fn disarm(&mut self) {
        match self {
            Ring::Split(ring) => ring.disarm(),
            Ring::Packed(ring) => ring.disarm(),
        }
    }

    /// What GET_VRING_BASE answers, and what a ring that goes on here is set up with.
    pub fn base(&self) -> u32 {
        match self {
            Ring::Split(ring) => ring.base(),
            Ring::Packed(ring) => ring.base(),
        }
    }

    /// The guest's memory.
    pub fn mem(&self) -> &Arc<GuestMem> {
        match self {
            Ring::Split(ring) => &ring.mem,
            Ring::Packed(ring) => &ring.mem,
        }
    }

    /// "split" or "packed".
    pub fn layout(&self) -> &'static str {
        match self {
            Ring::Split(_) => "split",
            Ring::Packed(_) => "packed",
        }
    }
}

/// The rule of notification by index (virtio 1.2 §2.7.10): did `event` lie in the `since` steps that led to `new`?
/// Wrong answers to garbage are the guest's own loss.
#[inline]
pub(super) fn passed(event: u16, new: u16, since: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < since
}

/// A fence as `fence(SeqCst)`, for the data path: MFENCE takes 28 ns here, a locked instruction on our own stack 5.
#[inline]
pub(super) fn full_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the value below the stack pointer stays what it is. A locked instruction orders all loads and stores before it
    // with all after it (AMD64 volume 2, §7.4.2), and the compiler moves no memory access across the block.
    unsafe {
        core::arch::asm!("lock or dword ptr [rsp - 4], 0", options(nostack));
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// Fetches the line at `at` for reading.
#[inline]
pub fn prefetch_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults and changes nothing but caches.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Fetches the line at `at` for writing: takes it away from the other side's cache at once.
#[inline]
pub fn prefetch_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHW never faults; processors without it treat it as a no-op.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
