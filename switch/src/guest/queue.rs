//! A guest's queues: [`Tx`] sends bursts from buffers of its own, [`Rx`] receives bursts and gives the buffers back at once.
//!
//! An island of `unsafe`: buffers in shared memory, at the addresses the driver side of the rings hands back.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::frame::{Frame, Part, Slot};
use super::layout::{Buffers, DESC};
use super::session::readable;
use crate::virtio::buffers::PIECES_MAX;
use crate::virtio::driver::{DriverRing, Raw, Used};
use crate::virtio::net::{HEADER_LEN, NUM_BUFFERS};
use crate::virtio::ring::{prefetch_read, prefetch_write};

/// Frames per call.
pub const BURST: usize = 64;
/// Buffers whose lines are fetched before the first is used.
const AHEAD: usize = 16;

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
    /// Where the buffers are mapped here.
    pub(super) first: *mut u8,
}

// SAFETY: `first` is a plain address in the memory that the ring keeps mapped.
unsafe impl Send for Side {}

impl Side {
    /// Where the header of buffer `id` is mapped here.
    #[inline]
    fn header(&self, id: u16) -> *mut u8 {
        debug_assert!(id < self.ring.size());
        self.first
            .wrapping_add((self.buffers.header(id) - self.buffers.base) as usize)
    }

    #[inline]
    fn kick_if_wanted(&mut self) {
        if self.ring.kick_wanted() {
            self.kick();
        }
    }

    /// Makes buffers available, each in one piece or in several.
    #[inline]
    fn post(&mut self, buffers: &[(u64, u32)]) -> usize {
        let posted = if self.piece == 0 {
            self.ring.post(buffers)
        } else {
            self.post_pieces(buffers)
        };
        self.kick_if_wanted();
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
    /// Not IN_ORDER: free buffers, the one that is free longest first.
    free: VecDeque<u16>,
    /// Length of the frame last sent from each buffer.
    lens: Box<[u32]>,
    used: [Used; BURST],
    back: [(u16, u32); BURST],
}

impl Tx {
    pub(super) fn new(side: Side, in_order: bool) -> Tx {
        let size = side.ring.size();
        Tx {
            in_order,
            next: 0,
            free: if in_order {
                VecDeque::new()
            } else {
                (0..size).collect()
            },
            lens: vec![0; usize::from(size)].into(),
            used: [Used::default(); BURST],
            back: [(0, 0); BURST],
            side,
        }
    }

    /// Sends up to `most` frames (no more than [`BURST`] per call): `fill` writes each and returns its length. Returns how many
    /// were sent: fewer than `most` if the ring has no room. `fill` is asked only for frames that have room.
    #[inline]
    pub fn send(&mut self, most: usize, mut fill: impl FnMut(&mut Slot<'_>) -> usize) -> usize {
        // 1. Buffers the switch is done with.
        let room = self.room(most.min(BURST));
        // 2. The frames' lines are in the switch's cache: ask for some of them before the first is needed.
        for ahead in 0..room.min(AHEAD) {
            self.prefetch(ahead);
        }
        // 3. Fill. A descriptor is written only if the length has changed.
        for ahead in 0..room {
            if ahead + AHEAD < room {
                self.prefetch(ahead + AHEAD);
            }
            let index = self.upcoming(ahead);
            let before = self.lens[usize::from(index)];
            let frame_room = self.side.buffers.len as usize - HEADER_LEN;
            let at = self.side.header(index).wrapping_add(HEADER_LEN);
            // SAFETY: `layout::build` gave every buffer `len` bytes from its header on, the frame begins at a cache line, and nobody else
            // writes it: the switch only reads these buffers, and this one is not in flight.
            let mut slot = unsafe { Slot::new(at, frame_room, index, before as usize) };
            let len = fill(&mut slot).min(frame_room) as u32;
            if len != before {
                self.lens[usize::from(index)] = len;
                let header = self.side.buffers.header(index);
                if self.side.piece == 0 {
                    self.side
                        .ring
                        .keep(index, (header, HEADER_LEN as u32 + len));
                }
            }
        }
        // 4. Publish.
        let sent = self.publish(room);
        self.forward(sent);
        sent
    }

    #[inline]
    fn prefetch(&self, ahead: usize) {
        let at = self.side.header(self.upcoming(ahead));
        prefetch_write(at.wrapping_add(HEADER_LEN));
    }

    #[inline]
    fn publish(&mut self, count: usize) -> usize {
        if self.side.piece > 0 {
            return self.publish_pieces(count);
        }
        let (next, size) = (usize::from(self.next), self.lens.len());
        let (free, lens, buffers) = (&self.free, &self.lens, self.side.buffers);
        let kept = |index: u16| {
            let len = HEADER_LEN as u32 + lens[usize::from(index)];
            (index, buffers.header(index), len)
        };
        if self.in_order {
            self.side
                .ring
                .post_kept(count, |ahead| kept(around(next + ahead, size)));
        } else {
            self.side.ring.post_kept(count, |ahead| kept(free[ahead]));
        }
        self.side.kick_if_wanted();
        count
    }

    #[cold]
    fn publish_pieces(&mut self, count: usize) -> usize {
        let mut posts = [(0u64, 0u32); BURST];
        for (ahead, post) in posts[..count].iter_mut().enumerate() {
            let index = self.upcoming(ahead);
            let len = self.lens[usize::from(index)];
            *post = (self.side.buffers.header(index), HEADER_LEN as u32 + len);
        }
        self.side.post(&posts[..count])
    }

    /// Free buffers, at most `most`.
    #[inline]
    fn room(&mut self, most: usize) -> usize {
        if self.in_order {
            if self.side.ring.free() < most {
                self.side.ring.reclaim_kept();
            }
            return most.min(self.side.ring.free());
        }
        if self.free.len() < most {
            self.take_back();
        }
        most.min(self.free.len()).min(self.side.ring.free())
    }

    fn take_back(&mut self) {
        loop {
            let count = if self.side.piece > 0 {
                let count = self.side.ring.take(&mut self.used);
                let headers = self.used[..count].iter().map(|used| used.addr);
                self.free
                    .extend(headers.map(|header| self.side.buffers.index(header)));
                count
            } else {
                let count = self.side.ring.take_kept(&mut self.back);
                self.free
                    .extend(self.back[..count].iter().map(|back| back.0));
                count
            };
            if count < BURST {
                return;
            }
        }
    }

    /// The buffer after the next `ahead` ones.
    #[inline]
    fn upcoming(&self, ahead: usize) -> u16 {
        if self.in_order {
            around(usize::from(self.next) + ahead, self.lens.len())
        } else {
            self.free[ahead]
        }
    }

    #[inline]
    fn forward(&mut self, sent: usize) {
        if self.in_order {
            self.next = self.upcoming(sent);
        } else {
            self.free.drain(..sent);
        }
    }

    /// Frames that were sent and that the switch has not given back yet.
    pub fn in_flight(&mut self) -> usize {
        if self.in_order {
            self.side.ring.reclaim_kept();
        } else {
            self.take_back();
        }
        usize::from(self.side.ring.size()) - self.side.ring.free()
    }

    /// True once the switch has given back a buffer that it did not have.
    pub fn lied(&self) -> bool {
        self.side.ring.lied()
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

/// `index` in a ring of `size`, at most one lap ahead.
#[inline]
fn around(index: usize, size: usize) -> u16 {
    if index < size {
        index as u16
    } else if index < 2 * size {
        (index - size) as u16
    } else {
        (index % size) as u16 // a burst on a ring that is smaller
    }
}

/// Receives frames from the switch.
pub struct Rx {
    side: Side,
    mergeable: bool,
    /// Buffers that came, number and bytes; the first `left` are the beginning of a frame whose other buffers had not come.
    came: Box<[(u16, u32)]>,
    left: usize,
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
            mergeable,
            came: vec![(0, 0); room].into(),
            left: 0,
            used: vec![Used::default(); room].into(),
            parts: Vec::with_capacity(room),
        };
        rx.fill();
        rx
    }

    fn fill(&mut self) {
        let buffers = self.side.buffers;
        for index in 0..self.side.ring.size() {
            let (header, len) = (buffers.header(index), buffers.len);
            if self.side.piece == 0 {
                self.side.ring.keep(index, (header, len));
                self.side.ring.post_kept(1, |_| (index, header, len));
                self.side.kick_if_wanted();
            } else if self.side.post(&[(header, len)]) == 0 {
                break; // chains: fewer buffers than descriptors
            }
        }
    }

    /// Receives a burst: `visit` sees each frame where the switch put it, before the buffers are given back. Returns how many.
    #[inline]
    pub fn receive(&mut self, mut visit: impl FnMut(&Frame<'_>)) -> usize {
        if self.side.piece > 0 {
            return self.receive_pieces(&mut visit);
        }
        // 1. What came, behind what was left.
        let count = self.left + self.side.ring.take_kept(&mut self.came[self.left..]);
        if count == self.left {
            return 0;
        }
        for ahead in 0..count.min(AHEAD) {
            self.prefetch(ahead);
        }
        // 2. Look at it.
        let (mut index, mut frames) = (0, 0);
        while index < count {
            if index + AHEAD < count {
                self.prefetch(index + AHEAD);
            }
            let buffers = self.buffers_of(self.came[index].0);
            if index + buffers > count {
                break;
            }
            if buffers > 1 {
                self.gather(index + 1, index + buffers, index + AHEAD..count);
            }
            let more = if buffers > 1 { &self.parts[..] } else { &[] };
            let first = frame_of(self.part(self.came[index]));
            // SAFETY: each part lies in a buffer of ours that the device has given back and that is posted again only below.
            visit(&unsafe { Frame::new(first, more) });
            index += buffers;
            frames += 1;
        }
        // 3. Give the buffers back.
        let (came, buffers) = (&self.came, self.side.buffers);
        self.side.ring.post_kept(index, |at| {
            let id = came[at].0;
            (id, buffers.header(id), buffers.len)
        });
        self.side.kick_if_wanted();
        if index < count {
            self.came.copy_within(index..count, 0);
        }
        self.left = count - index;
        frames
    }

    #[inline]
    fn prefetch(&self, at: usize) {
        let header = self.side.header(self.came[at].0);
        if self.mergeable {
            prefetch_read(header);
        }
        prefetch_read(header.wrapping_add(HEADER_LEN));
    }

    /// Buffers of the frame whose first one is `id`; at least one, and no more than there is room for.
    #[inline]
    fn buffers_of(&self, id: u16) -> usize {
        if !self.mergeable {
            return 1;
        }
        let header = self.side.header(id).cast_const();
        // SAFETY: the 12 bytes of a buffer's header are mapped (`layout::build`) and 2-aligned; volatile: the switch may write here.
        let count = unsafe { header.add(NUM_BUFFERS).cast::<u16>().read_volatile() };
        usize::from(u16::from_le(count)).clamp(1, self.came.len())
    }

    /// Puts the further buffers of a frame together.
    #[cold]
    fn gather(&mut self, from: usize, to: usize, later: std::ops::Range<usize>) {
        self.parts.clear();
        for at in from..to {
            let part = self.part(self.came[at]);
            self.parts.push(part);
        }
        // The frame's buffers were skipped by the loop's own looking ahead.
        for at in later.take(to - from) {
            self.prefetch(at);
        }
    }

    /// The bytes the device wrote to a kept buffer, as far as they can be there.
    #[inline]
    fn part(&self, (id, len): (u16, u32)) -> Part {
        Part {
            at: self.side.header(id),
            len: len.min(self.side.buffers.len) as usize,
        }
    }

    #[cold]
    fn receive_pieces(&mut self, visit: &mut dyn FnMut(&Frame<'_>)) -> usize {
        // 1. What came.
        let count = self.side.ring.take_frames(&mut self.used);
        for used in &self.used[..count] {
            prefetch_read(frame_of(part_at(&self.side, used)).at);
        }
        // 2. Look at it.
        let (mut index, mut frames) = (0, 0);
        while index < count {
            let first = &self.used[index];
            let buffers = usize::from(first.buffers.max(1));
            self.parts.clear();
            let further = &self.used[index + 1..index + buffers];
            self.parts
                .extend(further.iter().map(|used| part_at(&self.side, used)));
            // SAFETY: each part lies in a buffer of ours that the device has given back and that is posted again only below.
            visit(&unsafe { Frame::new(frame_of(part_at(&self.side, first)), &self.parts) });
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

    /// True once the switch has given back a buffer that it did not have.
    pub fn lied(&self) -> bool {
        self.side.ring.lied()
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
fn frame_of(part: Part) -> Part {
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
