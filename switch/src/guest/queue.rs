//! A guest's queues: [`Tx`] sends bursts from buffers of its own, [`Rx`] receives bursts and gives the buffers back at once.
//!
//! An island of `unsafe`: buffers in shared memory, at the addresses the driver side of the rings hands back.
#![allow(unsafe_code)]

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::frame::{Frame, Part, Slot};
use super::layout::{Buffers, DESC};
use super::session::readable;
use crate::virtio::driver::{DriverRing, Raw, Used};
use crate::virtio::net::HEADER_LEN;
use crate::virtio::ring::{PIECES_MAX, prefetch_read, prefetch_write};

/// Frames per call.
pub const BURST: usize = 64;
/// One pair of queues, to be moved to the threads that use them.
#[derive(Debug)]
pub struct QueuePair {
    /// Frames to the switch.
    pub tx: Tx,
    /// Frames from the switch.
    pub rx: Rx,
}

/// Queues go to the threads that use them.
const _: fn() = || {
    fn can_move<T: Send>() {}
    can_move::<QueuePair>();
};

/// What both kinds of queue have.
pub(super) struct Side {
    pub(super) ring: DriverRing,
    pub(super) buffers: Buffers,
    /// Longest piece of a buffer; 0: no limit.
    pub(super) piece: u32,
    /// Guest address of indirect tables, one per buffer; 0: chains.
    pub(super) tables: u64,
    pub(super) kick: Arc<OwnedFd>,
    pub(super) call: Arc<OwnedFd>,
    pub(super) kicks: u64,
}

impl Side {
    /// Makes buffers available, each in one piece or in several.
    #[inline]
    fn post(&mut self, buffers: &[(u64, u32)]) -> usize {
        let posted = if self.piece == 0 {
            self.ring.post(buffers)
        } else {
            self.post_pieces(buffers)
        };
        if self.ring.kick_wanted() {
            self.kick();
        }
        posted
    }

    #[cold]
    fn post_pieces(&mut self, buffers: &[(u64, u32)]) -> usize {
        for (done, &(at, len)) in buffers.iter().enumerate() {
            let mut pieces = [(0, 0); PIECES_MAX];
            // A frame of more pieces than a switch need accept has longer ones.
            let most = self.piece.max(len.div_ceil(PIECES_MAX as u32));
            let count = len.div_ceil(most) as usize;
            for (number, piece) in pieces[..count].iter_mut().enumerate() {
                let from = most * number as u32;
                *piece = (at + u64::from(from), most.min(len - from));
            }
            let posted = match self.tables {
                0 => self.ring.post_chain(&pieces[..count]),
                tables => {
                    let index = u64::from(self.buffers.index(at));
                    let table = tables + index * (PIECES_MAX * DESC) as u64;
                    self.ring.post_indirect(table, &pieces[..count])
                }
            };
            if !posted {
                return done;
            }
        }
        buffers.len()
    }

    #[cold]
    fn kick(&mut self) {
        self.kicks += 1;
        // A counter that is full says the same as one more; the descriptor is non-blocking.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    fn sleep(&self, within: Duration) -> bool {
        let called = readable(&self.call, within);
        self.forget_calls();
        called
    }

    fn forget_calls(&self) {
        // Nothing to forget is an error of no interest.
        let _ = rustix::io::read(&self.call, &mut [0u8; 8]);
    }
}

/// Sends frames to the switch.
///
/// Each descriptor's worth of ring has a buffer, and buffers keep what was written to them: a sender that always sends the same frames
/// need not write them again.
pub struct Tx {
    side: Side,
    in_order: bool,
    /// IN_ORDER: the next buffer; else unused.
    next: u16,
    /// Not IN_ORDER: free buffers.
    free: Vec<u16>,
    /// Length of the frame last sent from each buffer.
    lens: Box<[u32]>,
    used: [Used; BURST],
}

impl Tx {
    pub(super) fn new(side: Side, in_order: bool) -> Tx {
        let size = side.ring.size();
        Tx {
            side,
            in_order,
            next: 0,
            free: (0..size).rev().collect(),
            lens: vec![0; usize::from(size)].into(),
            used: [Used::default(); BURST],
        }
    }

    /// Sends up to `most` frames (no more than [`BURST`] per call): `fill` writes each and returns its length. Returns how many
    /// were sent: fewer than `most` if the ring has no room. `fill` is asked only for frames that have room.
    #[inline]
    pub fn send(&mut self, most: usize, mut fill: impl FnMut(&mut Slot<'_>) -> usize) -> usize {
        // 1. Buffers the switch is done with.
        let room = self.room(most.min(BURST));
        // 2. The frames' lines are in the switch's cache: ask for all of them before the first is needed.
        let mut posts = [(0u64, 0u32); BURST];
        for (ahead, post) in posts[..room].iter_mut().enumerate() {
            post.0 = self.side.buffers.header(self.upcoming(ahead));
            prefetch_write(self.frame(post.0));
        }
        // 3. Fill.
        for (ahead, post) in posts[..room].iter_mut().enumerate() {
            let index = self.upcoming(ahead);
            let (at, len) = (self.frame(post.0), self.lens[usize::from(index)]);
            let frame_room = self.side.buffers.len as usize - HEADER_LEN;
            // SAFETY: `layout::build` gave every buffer `len` bytes from its header on, the frame begins at a cache line, and nobody else
            // writes it: the switch only reads these buffers, and this one is not in flight.
            let mut slot = unsafe { Slot::new(at, frame_room, index, len as usize) };
            let len = fill(&mut slot).min(frame_room);
            self.lens[usize::from(index)] = len as u32;
            post.1 = (HEADER_LEN + len) as u32;
        }
        // 4. Publish.
        let sent = self.side.post(&posts[..room]);
        self.forward(sent);
        sent
    }

    /// Free buffers, at most `most`.
    #[inline]
    fn room(&mut self, most: usize) -> usize {
        if self.in_order {
            if self.side.ring.free() < most {
                self.side.ring.reclaim();
            }
        } else if self.free.len() < most {
            self.take_back();
        }
        let buffers = if self.in_order {
            BURST
        } else {
            self.free.len()
        };
        most.min(buffers).min(self.side.ring.free())
    }

    fn take_back(&mut self) {
        loop {
            let count = self.side.ring.take(&mut self.used);
            let headers = self.used[..count].iter().map(|used| used.addr);
            self.free
                .extend(headers.map(|header| self.side.buffers.index(header)));
            if count < BURST {
                return;
            }
        }
    }

    /// The buffer after the next `ahead` ones.
    #[inline]
    fn upcoming(&self, ahead: usize) -> u16 {
        if self.in_order {
            let (index, size) = (usize::from(self.next) + ahead, self.lens.len());
            (if index < size { index } else { index % size }) as u16
        } else {
            self.free[self.free.len() - 1 - ahead]
        }
    }

    #[inline]
    fn forward(&mut self, sent: usize) {
        if self.in_order {
            self.next = self.upcoming(sent);
        } else {
            self.free.truncate(self.free.len() - sent);
        }
    }

    #[inline]
    fn frame(&self, header: u64) -> *mut u8 {
        let at = self
            .side
            .ring
            .mem()
            .ptr(header, u64::from(self.side.buffers.len));
        let at = at.expect("`layout::build` put all buffers into the memory");
        at.as_ptr().wrapping_add(HEADER_LEN)
    }

    /// Frames that were sent and that the switch has not given back yet.
    pub fn in_flight(&mut self) -> usize {
        if self.in_order {
            self.side.ring.reclaim();
        } else {
            self.take_back();
        }
        usize::from(self.side.ring.size()) - self.side.ring.free()
    }

    /// Times the switch had to be kicked.
    pub fn kicks(&self) -> u64 {
        self.side.kicks
    }

    /// The ring's memory, for guests that lie.
    pub fn raw(&self) -> Raw<'_> {
        self.side.ring.raw()
    }

    /// Kicks the switch although it did not ask for it.
    pub fn kick_anyway(&mut self) {
        self.side.kick();
    }
}

/// Receives frames from the switch.
pub struct Rx {
    side: Side,
    used: Box<[Used]>,
    parts: Vec<Part>,
}

impl Rx {
    pub(super) fn new(side: Side, mergeable: bool) -> Rx {
        // Room for the buffers of the longest frame (`DriverRing::take_frames`).
        let longest = 65_536 / side.buffers.len as usize + 2;
        let room = if mergeable { longest.max(BURST) } else { BURST };
        let mut rx = Rx {
            side,
            used: vec![Used::default(); room].into(),
            parts: Vec::with_capacity(room),
        };
        rx.fill();
        rx
    }

    fn fill(&mut self) {
        let buffers = self.side.buffers;
        for index in 0..self.side.ring.size() {
            if self.side.post(&[(buffers.header(index), buffers.len)]) == 0 {
                break; // chains: fewer buffers than descriptors
            }
        }
    }

    /// Receives a burst: `visit` sees each frame where the switch put it, before the buffers are given back. Returns how many.
    #[inline]
    pub fn receive(&mut self, mut visit: impl FnMut(&Frame<'_>)) -> usize {
        // 1. What came.
        let count = self.side.ring.take_frames(&mut self.used);
        for used in &self.used[..count] {
            prefetch_read(frame_at(&self.side, used).at);
        }
        // 2. Look at it.
        let (mut index, mut frames) = (0, 0);
        while index < count {
            let first = &self.used[index];
            let buffers = usize::from(first.buffers.max(1));
            if buffers > 1 {
                self.parts.clear();
                let further = &self.used[index + 1..index + buffers];
                self.parts
                    .extend(further.iter().map(|used| part_at(&self.side, used)));
            }
            let more = if buffers > 1 { &self.parts[..] } else { &[] };
            // SAFETY: each part lies in a buffer of ours that the device has given back and that is posted again only below.
            visit(&unsafe { Frame::new(frame_at(&self.side, first), more) });
            index += buffers;
            frames += 1;
        }
        // 3. Give the buffers back.
        let mut posts = [(0u64, 0u32); BURST];
        for some in self.used[..count].chunks(BURST) {
            for (post, used) in posts.iter_mut().zip(some) {
                *post = (used.addr, self.side.buffers.len);
            }
            self.side.post(&posts[..some.len()]);
        }
        frames
    }

    /// Asks to be called when the next frame comes; true if one is there already.
    pub fn arm(&mut self) -> bool {
        self.side.ring.arm()
    }

    /// Asks not to be called any more.
    pub fn disarm(&mut self) {
        self.side.ring.disarm();
    }

    /// Sleeps until the switch calls, for at most `within`; true if it called.
    pub fn sleep(&self, within: Duration) -> bool {
        self.side.sleep(within)
    }

    /// Forgets calls that came so far.
    pub fn forget_calls(&self) {
        self.side.forget_calls();
    }

    /// The descriptor the switch calls through, for guests that fill it.
    pub fn call(&self) -> &OwnedFd {
        &self.side.call
    }

    /// The ring's memory, for guests that lie.
    pub fn raw(&self) -> Raw<'_> {
        self.side.ring.raw()
    }
}

/// The bytes the device wrote to a buffer, as far as they can be there.
#[inline]
fn part_at(side: &Side, used: &Used) -> Part {
    let len = used.len.min(side.buffers.len);
    let at = side.ring.mem().ptr(used.addr, u64::from(len));
    let at = at.expect("a buffer that was posted is in the memory");
    Part {
        at: at.as_ptr(),
        len: len as usize,
    }
}

/// The same without the virtio-net header.
#[inline]
fn frame_at(side: &Side, used: &Used) -> Part {
    let part = part_at(side, used);
    let header = part.len.min(HEADER_LEN);
    Part {
        at: part.at.wrapping_add(header),
        len: part.len - header,
    }
}

impl fmt::Debug for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = self.ring.size();
        write!(f, "ring of {size}, {} free", self.ring.free())
    }
}

impl fmt::Debug for Tx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tx: {:?}", self.side)
    }
}

impl fmt::Debug for Rx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rx: {:?}", self.side)
    }
}
