//! The buffers of one fetch: where the frames of a ring are, checked against the guest's memory.
#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr;

use super::guest_mem::{GuestMem, Hit, Window};
use super::ring::{Desc, Lie, Way, flag, prefetch_read, prefetch_write};

/// Buffers per fetch.
pub const BATCH: usize = 64;
/// Pieces (descriptors) one buffer may have: 64 KiB in 2 KiB pieces, and its header.
pub const PIECES_MAX: usize = 41;
/// Descriptors of one chain that are followed. A loop is longer, and so is what nobody needs: DPDK chains five for a
/// 9000-byte frame, Linux at most nineteen.
pub const CHAIN_MAX: u16 = 128;
/// Descriptors of chains that one fetch follows before it ends early: bounds the work of a turn.
const WALK_MAX: usize = 512;
/// Bytes of `struct virtio_net_hdr_v1` in front of every frame (virtio 1.2 §5.1.6).
pub const NET_HEADER: u32 = 12;

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

/// One buffer of a ring, checked. 16 bytes: what only few have stands elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Its first byte, as mapped here.
    pub at: *mut u8,
    /// Bytes at `at`; 0 if it is not simply one piece: see [`Buffers::pieces`] and [`Buffers::fault`].
    pub len: u32,
    /// Mapped bytes from `at` to the end of its region; at least `len`.
    pub room: u32,
}

impl Buffer {
    /// Makes this the buffer of one descriptor, if that lies in `window` and is not empty, and starts to fetch it.
    #[inline]
    pub(super) fn put(&mut self, window: &Window<'_>, desc: &Desc, way: Way) -> bool {
        let Some((at, room)) = window.translate(desc.addr, desc.len) else {
            return false;
        };
        *self = Buffer {
            at: at.as_ptr(),
            len: desc.len,
            room,
        };
        self.prefetch(way);
        true
    }

    /// Starts to fetch what a frame in this buffer needs: its first bytes, and in a receive ring the header. At once, while the
    /// descriptors behind it are still being read: the first line is there when they all are.
    #[inline]
    fn prefetch(&self, way: Way) {
        // DPDK puts the header before a line's end and the frame's first byte at the next line's start.
        let payload = self.at.wrapping_add(NET_HEADER as usize);
        match way {
            Way::FromGuest => prefetch_read(payload),
            Way::ToGuest => {
                prefetch_read(self.at); // mostly right already, see `put_header` in `port/vhost.rs`
                prefetch_write(payload);
            }
        }
    }
}

const NO_BUFFER: Buffer = Buffer {
    at: ptr::null_mut(),
    len: 0,
    room: 0,
};

/// What there is to a [`Buffer`] whose `len` is 0.
#[derive(Clone, Copy, Debug)]
struct Odd {
    /// Its pieces: `spill[from..from + pieces]`; none if it is empty or cannot be used.
    pieces: u16,
    from: u16,
    fault: Option<Fault>,
}

const EMPTY: Odd = Odd {
    pieces: 0,
    from: 0,
    fault: None,
};

/// The buffers of one fetch.
pub struct Buffers {
    list: [Buffer; BATCH],
    /// Means something where `list` has length 0.
    odd: [Odd; BATCH],
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
            odd: [EMPTY; BATCH],
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

    /// The first `count` buffers of the last fetch.
    #[inline]
    pub fn first(&self, count: usize) -> &[Buffer] {
        self.list.get(..count).unwrap_or(&self.list)
    }

    /// The pieces of buffer `index` if it has several; else none.
    #[inline]
    pub fn pieces(&self, index: usize) -> &[Piece] {
        let Some(odd) = self.odd(index) else {
            return &[];
        };
        let from = usize::from(odd.from);
        let pieces = self.spill.get(from..from + usize::from(odd.pieces));
        debug_assert!(pieces.is_some(), "`Chain::end` put them there");
        pieces.unwrap_or(&[])
    }

    /// Why buffer `index` cannot be used, if it cannot.
    #[inline]
    pub fn fault(&self, index: usize) -> Option<Fault> {
        self.odd(index)?.fault
    }

    #[inline]
    fn odd(&self, index: usize) -> Option<&Odd> {
        (self.buffer(index).len == 0).then(|| &self.odd[index % BATCH])
    }

    /// Where some buffers of this fetch go.
    #[inline]
    pub(super) fn places(&mut self, range: Range<usize>) -> &mut [Buffer] {
        self.list.get_mut(range).unwrap_or(&mut [])
    }

    /// Makes buffer `index` of one descriptor, wherever it points.
    pub(super) fn put(
        &mut self,
        index: usize,
        mem: &GuestMem,
        hit: &mut Hit,
        desc: &Desc,
        way: Way,
    ) {
        match mem.translate(hit, desc.addr, desc.len) {
            Some(_) if desc.len == 0 => self.put_odd(index, EMPTY),
            Some(_) => {
                let found = self.list[index % BATCH].put(&mem.window(hit), desc, way);
                debug_assert!(found, "`translate` has just been there");
            }
            None => self.put_fault(index, Fault::BadAddress),
        }
    }

    fn put_fault(&mut self, index: usize, fault: Fault) {
        let fault = Some(fault);
        self.put_odd(index, Odd { fault, ..EMPTY });
    }

    fn put_odd(&mut self, index: usize, odd: Odd) {
        let pieces = usize::from(odd.from)..usize::from(odd.from + odd.pieces);
        let first = self.spill.get(pieces).and_then(<[Piece]>::first);
        self.list[index % BATCH] = Buffer {
            at: first.map_or(ptr::null_mut(), |piece| piece.at),
            ..NO_BUFFER
        };
        self.odd[index % BATCH] = odd;
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

    /// Makes buffer `index` of what was added.
    pub(super) fn end(self, index: usize) -> Result<(), BatchFull> {
        let count = self.buffers.spilled - self.from;
        let full = self.buffers.spilled == self.buffers.spill.len();
        if let Some(fault) = self.fault {
            self.buffers.spilled = self.from;
            if full && self.from != 0 {
                return Err(BatchFull);
            }
            self.buffers.put_fault(index, fault);
            return Ok(());
        }
        match self.buffers.spill.get(self.from) {
            // One piece after all: empty links are none.
            Some(&Piece { at, len }) if count == 1 => {
                let room = len;
                self.buffers.list[index % BATCH] = Buffer { at, len, room };
            }
            _ => {
                let (pieces, from) = (count as u16, self.from as u16);
                let fault = None;
                self.buffers.put_odd(
                    index,
                    Odd {
                        pieces,
                        from,
                        fault,
                    },
                );
            }
        }
        self.buffers.list[index % BATCH].prefetch(self.way);
        Ok(())
    }
}
