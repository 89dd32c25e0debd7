//! Virtqueues in a guest's memory, seen by the device: one interface to both layouts, chosen once per burst.
//!
//! A turn at a ring is `fetch`, use the buffers, `complete`. `fetch` does not consume: asked again, it fetches the same
//! buffers again. Everything the guest wrote is read once, checked, and used from the copy; a guest that breaks the rules of
//! the layout gets a [`Lie`], which ends its ring, and a buffer that merely cannot be used becomes a [`Fault`].
#![allow(unsafe_code)]

use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::guest_mem::{GuestMem, Hit};
use super::packed::PackedRing;
use super::split::SplitRing;

/// Buffers per fetch.
pub const BATCH: usize = 64;
/// Buffers whose lines are fetched before the first is used. 6, 12, 24 and 64 measured alike when caches are near; far, 12
/// to 24 were best.
pub const AHEAD: usize = 16;
/// Pieces (descriptors) one buffer may have: 64 KiB in 2 KiB pieces, and its header.
pub const PIECES_MAX: usize = 41;
/// Descriptors of one chain that are followed. A loop is longer, and so is what nobody needs: DPDK chains five for a
/// 9000-byte frame, Linux at most nineteen.
pub const CHAIN_MAX: u16 = 128;
/// Descriptors of chains that one fetch follows before it ends early: bounds the work of a turn.
const WALK_MAX: usize = 512;
/// Bytes of `struct virtio_net_hdr_v1` in front of every frame (virtio 1.2 §5.1.6).
pub const NET_HEADER: u32 = 12;

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
    /// A chain longer than its table or than [`CHAIN_MAX`]: it loops, or might as well.
    #[error("descriptor chain loops or has more than 128 descriptors")]
    Loop,
    /// A writable buffer in a transmit ring, or a readable one in a receive ring.
    #[error("descriptor for the wrong direction")]
    Direction,
    /// An indirect table that is nested, chained on, empty, of odd length, outside memory, or was not negotiated.
    #[error("malformed indirect table")]
    Indirect,
}

/// This buffer cannot be used, the ring can.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Outside the memory the guest shared.
    BadAddress,
    /// More than [`PIECES_MAX`] pieces.
    TooManyPieces,
}

/// One piece of a buffer, checked against the guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where it is mapped here.
    pub at: *mut u8,
    /// Its length in bytes.
    pub len: u32,
}

/// One buffer of a ring: a checked piece of memory, or several.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Its first byte, as mapped here.
    pub at: *mut u8,
    /// Bytes at `at`.
    pub len: u32,
    /// Mapped bytes from `at` to the end of its region; at least `len`.
    pub room: u32,
    /// All pieces, if there are several: `spill[from..from + pieces]`; 0 for a buffer in one piece.
    pub pieces: u16,
    /// See `pieces`.
    pub from: u16,
    /// Why it cannot be used.
    pub fault: Option<Fault>,
}

pub(super) const NO_BUFFER: Buffer = Buffer {
    at: ptr::null_mut(),
    len: 0,
    room: 0,
    pieces: 0,
    from: 0,
    fault: None,
};

/// The buffers of one fetch.
pub struct Buffers {
    pub(super) list: [Buffer; BATCH],
    spill: [Piece; BATCH * 8],
    spilled: usize,
    /// Descriptors of chains followed in this fetch.
    walked: usize,
}

// SAFETY: the pointers go into a guest's memory, which the ring's `Arc<GuestMem>` keeps mapped; they are plain addresses.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Room for one fetch, on the heap.
    pub fn new() -> Box<Buffers> {
        Box::new(Buffers {
            list: [NO_BUFFER; BATCH],
            spill: [Piece {
                at: ptr::null_mut(),
                len: 0,
            }; BATCH * 8],
            spilled: 0,
            walked: 0,
        })
    }

    /// Forgets the last fetch.
    #[inline]
    pub(super) fn begin(&mut self) {
        (self.spilled, self.walked) = (0, 0);
    }

    /// True if this fetch has followed enough chains: the next one waits for the next fetch.
    #[inline]
    pub(super) fn walked_enough(&self) -> bool {
        self.walked >= WALK_MAX
    }

    /// Buffer number `index` of the last fetch.
    #[inline]
    pub fn buffer(&self, index: usize) -> &Buffer {
        &self.list[index % BATCH]
    }

    /// Starts to fetch what a frame in buffer `index` needs: its first bytes, and in a receive ring the header. Ask for
    /// [`AHEAD`] buffers first, then for one more with each that is used: more at once than the processor can have under
    /// way are lost.
    #[inline]
    pub fn prefetch(&self, index: usize, way: Way) {
        let at = self.buffer(index).at;
        // DPDK puts the header before a line's end and the frame's first byte at the next line's start.
        let payload = at.wrapping_add(NET_HEADER as usize);
        match way {
            Way::FromGuest => prefetch_read(payload),
            Way::ToGuest => {
                prefetch_read(at); // mostly right already, see `put_header` in `port/vhost.rs`
                prefetch_write(payload);
            }
        }
    }

    /// All pieces of a buffer that has several.
    #[inline]
    pub fn pieces(&self, buffer: &Buffer) -> &[Piece] {
        let from = usize::from(buffer.from);
        self.spill
            .get(from..from + usize::from(buffer.pieces))
            .unwrap_or(&[])
    }
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

    /// Fetches up to `most` (≤ [`BATCH`]) buffers in order, without consuming them; returns how many.
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

    /// True if the guest wants to be called about what was completed since the last time this was asked.
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

/// A buffer of one descriptor; the lines that will be used are on their way.
#[inline]
pub(super) fn one_piece(mem: &GuestMem, hit: &mut Hit, desc: &Desc) -> Buffer {
    let Some(at) = mem.translate(hit, desc.addr, desc.len) else {
        return Buffer {
            fault: Some(Fault::BadAddress),
            ..NO_BUFFER
        };
    };
    let at = at.as_ptr();
    Buffer {
        at,
        len: desc.len,
        room: hit.room(at),
        ..NO_BUFFER
    }
}

/// Collects the pieces of one chained or indirect buffer.
pub(super) struct Chain<'a> {
    buffers: &'a mut Buffers,
    mem: &'a GuestMem,
    hit: &'a mut Hit,
    way: Way,
    from: usize,
    steps: u16,
    fault: Option<Fault>,
}

/// No room for the pieces of this buffer in this batch: it comes first in the next one.
pub(super) struct BatchFull;

impl<'a> Chain<'a> {
    pub(super) fn new(
        buffers: &'a mut Buffers,
        mem: &'a GuestMem,
        hit: &'a mut Hit,
        way: Way,
    ) -> Chain<'a> {
        let from = buffers.spilled;
        Chain {
            buffers,
            mem,
            hit,
            way,
            from,
            steps: 0,
            fault: None,
        }
    }

    /// Adds one descriptor's memory.
    pub(super) fn add(&mut self, addr: u64, len: u32, flags: u16) -> Result<(), Lie> {
        if self.steps == CHAIN_MAX {
            return Err(Lie::Loop);
        }
        self.steps += 1;
        self.buffers.walked += 1;
        if (flags & flag::WRITE != 0) != (self.way == Way::ToGuest) {
            return Err(Lie::Direction);
        }
        if self.fault.is_some() || len == 0 {
            return Ok(()); // the chain is walked to its end all the same: a loop is worse than a fault
        }
        let count = self.buffers.spilled - self.from;
        if count == PIECES_MAX {
            self.fault = Some(Fault::TooManyPieces);
            return Ok(());
        }
        match (
            self.mem.translate(self.hit, addr, len),
            self.buffers.spill.get_mut(self.buffers.spilled),
        ) {
            (None, _) => self.fault = Some(Fault::BadAddress),
            (Some(_), None) => self.fault = Some(Fault::TooManyPieces),
            (Some(at), Some(slot)) => {
                *slot = Piece {
                    at: at.as_ptr(),
                    len,
                };
                self.buffers.spilled += 1;
            }
        }
        Ok(())
    }

    /// Finds an indirect table: its first byte and how many descriptors it has (virtio 1.2 §2.7.5.3, §2.8.7).
    pub(super) fn table(&mut self, addr: u64, len: u32) -> Result<(*const u8, usize), Lie> {
        let (count, rest) = (len as usize / 16, len % 16);
        if count == 0 || rest != 0 {
            return Err(Lie::Indirect);
        }
        let at = self.mem.translate(self.hit, addr, len);
        at.map_or(Err(Lie::Indirect), |at| {
            Ok((at.as_ptr().cast_const(), count))
        })
    }

    /// The finished buffer.
    pub(super) fn end(self) -> Result<Buffer, BatchFull> {
        let count = self.buffers.spilled - self.from;
        let full = self.buffers.spilled == self.buffers.spill.len();
        if let Some(fault) = self.fault {
            self.buffers.spilled = self.from;
            if full && self.from != 0 {
                return Err(BatchFull);
            }
            return Ok(Buffer {
                fault: Some(fault),
                ..NO_BUFFER
            });
        }
        match self.buffers.spill.get(self.from) {
            Some(first) if count > 0 => Ok(Buffer {
                at: first.at,
                len: first.len,
                room: first.len,
                pieces: if count == 1 { 0 } else { count as u16 },
                from: self.from as u16,
                fault: None,
            }),
            _ => Ok(NO_BUFFER),
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
