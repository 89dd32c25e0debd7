//! The buffers of one fetch: where the frames of a ring are, checked against the guest's memory.
#![allow(unsafe_code)]

use std::ptr;

use super::guest_mem::{GuestMem, Hit};
use super::ring::{Desc, Lie, Way, flag, prefetch_read, prefetch_write};

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
