//! A receive queue: lends the frames the device wrote, gives their descriptors back, one tail write per burst (82599 §7.1).
//!
//! The device fills buffers in ring order. Positions run free: `next` is the first descriptor that was not given back, the
//! device owns everything from there to the tail, which stays one slot behind: equal to the head it would mean "no free buffer"
//! (§7.1.9).

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering::Acquire, fence};
use std::time::Duration;

use crate::desc::{Checksum, RxDone};
use crate::dma::{Piece, Ring, Room};
use crate::mmio::Bar;
use crate::regs;
use crate::transport::Transport;

/// Frames of one burst.
pub const BURST_MAX: usize = 64;
/// Pieces of a frame: the longest the device passes (9728 bytes) takes five buffers.
pub const PIECES_MAX: usize = 8;

/// Frames come from here. One thread at a time; dropping it stops the queue and takes its memory from the device.
pub struct RxQueue {
    ring: Ring,
    bar: Bar,
    queue: u32,
    next: u32,
    /// The rest of a frame with too many pieces is still to come.
    skipping: bool,
    /// Descriptors the last burst took.
    usual: u32,
    count: usize,
    lent: Box<[Lent; BURST_MAX]>,
    /// Lengths of the pieces of frames that have several, in the order of `lent`.
    pieces: Box<[u16; BURST_MAX * PIECES_MAX]>,
    /// How many of them are in use.
    pieces_used: usize,
    vector: u32,
    wake: Option<Arc<OwnedFd>>,
    transport: Arc<dyn Transport>,
    _lease: Arc<()>,
}

/// A frame of the current burst.
#[derive(Clone, Copy)]
struct Lent {
    /// Its first descriptor.
    position: u32,
    /// Bytes of the whole frame.
    len: u32,
    /// What the device said of its last piece.
    done: RxDone,
    descs: u16,
    /// Where in `pieces` its lengths are, if it has several.
    pieces: u16,
    fault: Option<RxFault>,
    /// The device ended the frame in its last descriptor.
    ends: bool,
}

/// Why a frame must not be used. Its bytes cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxFault {
    /// The device says that the frame arrived damaged.
    Damaged,
    /// A length that no buffer has.
    Length,
    /// More pieces than the longest frame has.
    Chain,
}

impl RxQueue {
    pub(crate) fn new(
        ring: Ring,
        bar: Bar,
        queue: u32,
        (vector, wake): (u32, Option<Arc<OwnedFd>>),
        transport: Arc<dyn Transport>,
        lease: Arc<()>,
    ) -> RxQueue {
        let nothing = Lent {
            position: 0,
            len: 0,
            done: RxDone(0),
            descs: 0,
            pieces: 0,
            fault: None,
            ends: true,
        };
        RxQueue {
            ring,
            bar,
            queue,
            next: 0,
            skipping: false,
            usual: 0,
            count: 0,
            lent: Box::new([nothing; BURST_MAX]),
            pieces: Box::new([0; BURST_MAX * PIECES_MAX]),
            pieces_used: 0,
            vector,
            wake,
            transport,
            _lease: lease,
        }
    }

    /// Programs the queue and hands it all its buffers (§4.6.7). The device must have been reset.
    pub(crate) fn start(&mut self, strip_vlan: bool) -> Result<(), &'static str> {
        let (bar, q) = (&self.bar, self.queue);
        bar.modify(regs::vfrxdctl(q), regs::DCTL_ENABLE, 0);
        self.wait_enabled(false)?;
        let table = self.ring.table_iova();
        bar.write(regs::vfrdbal(q), table as u32);
        bar.write(regs::vfrdbah(q), (table >> 32) as u32);
        bar.write(regs::vfrdlen(q), self.ring.table_len());
        bar.write(regs::vfrdh(q), 0);
        bar.write(regs::vfrdt(q), 0);
        bar.write(
            regs::vfsrrctl(q),
            Ring::BUFFER >> 10 & regs::SRRCTL_KIB_MASK
                | regs::SRRCTL_ADV_ONE_BUFFER
                | regs::SRRCTL_DROP_EN,
        );
        for position in 0..self.ring.size() {
            self.offer(position);
        }
        let vme = if strip_vlan { regs::RXDCTL_VME } else { 0 };
        bar.modify(regs::vfrxdctl(q), regs::RXDCTL_VME, regs::DCTL_ENABLE | vme);
        self.wait_enabled(true)?;
        // Only now: an 82599 ignores a tail that is written while the queue is off.
        bar.write(regs::vfrdt(q), self.ring.size() - 1);
        Ok(())
    }

    /// Waits until the queue runs or rests; ten times a millisecond, as the vendor's driver does.
    fn wait_enabled(&self, on: bool) -> Result<(), &'static str> {
        for _ in 0..10 {
            let state = self.bar.read(regs::vfrxdctl(self.queue));
            if (state & regs::DCTL_ENABLE != 0) == on {
                return Ok(());
            }
            self.transport.pause(Duration::from_millis(1));
        }
        Err("a receive queue did not start or stop within 10 ms")
    }

    /// Lends up to `most` frames, at most [`BURST_MAX`]. They stay where the device wrote them until they are given back; asked
    /// again without that, the queue lends the same frames again.
    #[inline]
    pub fn lend(&mut self, most: usize) -> Frames<'_> {
        let most = most.min(BURST_MAX);
        // 1. Look at the descriptors of the whole burst, and ask for the first line of each buffer.
        let mut words = [RxDone(0); BURST_MAX];
        let mut ready = 0;
        if RxDone(self.ring.high(self.next)).done() {
            // The device had their lines last, and they are written when they are given back. As many as the last burst had: 62 →
            // 59 cycles per frame of a burst of 64, received and sent (`benches/burst.rs`).
            for ahead in 0..self.usual.min(most as u32) {
                self.ring.own(self.next.wrapping_add(ahead));
            }
        }
        while ready < most {
            let word = RxDone(self.ring.high(self.next.wrapping_add(ready as u32)));
            if !word.done() {
                break;
            }
            self.ring.prefetch(self.next.wrapping_add(ready as u32));
            words[ready % BURST_MAX] = word;
            ready += 1;
        }
        self.usual = ready as u32;
        // Acquire: pairs with the device, which writes a frame before the descriptor that says so (§7.1.9, PCIe ordering).
        fence(Acquire);
        // 2. Make frames of them.
        self.count = 0;
        self.pieces_used = 0;
        let mut at = 0;
        while at < ready {
            let word = words[at % BURST_MAX];
            if !word.end() || self.skipping {
                return self.lend_chains(words.get(..ready).unwrap_or(&[]), at);
            }
            let len = word.length();
            let fault = if len == 0 || len > Ring::BUFFER {
                Some(RxFault::Length)
            } else if word.damaged() {
                Some(RxFault::Damaged)
            } else {
                None
            };
            self.lent[self.count % BURST_MAX] = Lent {
                position: self.next.wrapping_add(at as u32),
                len,
                done: word,
                descs: 1,
                pieces: 0,
                fault,
                ends: true,
            };
            self.count += 1;
            at += 1;
        }
        Frames { queue: self }
    }

    /// True if the next descriptor continues a frame that was given up.
    fn skips(&self) -> bool {
        match self.count.checked_sub(1) {
            Some(last) => !self.lent[last % BURST_MAX].ends,
            None => self.skipping,
        }
    }

    /// The rest of a burst from a frame in several descriptors on; `words` are the descriptors seen so far, all done. The last
    /// frame may reach beyond them, or not be complete yet: then it is left for the next burst.
    #[cold]
    fn lend_chains(&mut self, words: &[RxDone], mut at: usize) -> Frames<'_> {
        while at < words.len() {
            let (first, continued) = (at, self.skips());
            let from = self.pieces_used;
            let (mut len, mut damaged, mut absurd) = (0, false, false);
            let last = loop {
                let word = match words.get(at) {
                    Some(word) => *word,
                    None => {
                        let word = RxDone(self.ring.high(self.next.wrapping_add(at as u32)));
                        fence(Acquire);
                        word
                    }
                };
                if !word.done() {
                    self.pieces_used = from;
                    return Frames { queue: self };
                }
                at += 1;
                len += word.length();
                absurd |= word.length() == 0 || word.length() > Ring::BUFFER;
                damaged |= word.damaged();
                // At most a burst of frames of at most so many pieces.
                if let Some(piece) = self.pieces.get_mut(self.pieces_used) {
                    *piece = word.length() as u16;
                    self.pieces_used += 1;
                }
                if word.end() || at - first == PIECES_MAX {
                    break word;
                }
            };
            let fault = if continued || !last.end() {
                Some(RxFault::Chain)
            } else if absurd {
                Some(RxFault::Length)
            } else {
                damaged.then_some(RxFault::Damaged)
            };
            self.lent[self.count % BURST_MAX] = Lent {
                position: self.next.wrapping_add(first as u32),
                len,
                done: last,
                descs: (at - first) as u16,
                pieces: from as u16,
                fault,
                ends: last.end(),
            };
            self.count += 1;
        }
        Frames { queue: self }
    }

    /// Returns the first `frames` frames of the last burst to the device.
    #[inline]
    pub fn give_back(&mut self, frames: usize) {
        let frames = frames.min(self.count);
        let Some(last) = frames
            .checked_sub(1)
            .map(|last| self.lent[last % BURST_MAX])
        else {
            return;
        };
        let end = last.position.wrapping_add(u32::from(last.descs));
        while self.next != end {
            self.offer(self.next);
            self.next = self.next.wrapping_add(1);
        }
        self.skipping = !last.ends;
        self.count = 0;
        // One slot behind: descriptor `next - 1` is free, too, but stays ours.
        let tail = self.ring.slot(self.next.wrapping_sub(1));
        self.bar.write(regs::vfrdt(self.queue), tail);
    }

    /// Gives the device the buffer at `position` (again); clears DD.
    #[inline]
    fn offer(&self, position: u32) {
        self.ring.set(position, self.ring.buffer_iova(position), 0);
    }

    /// Asks for an interrupt when a frame arrives; true if one is there already.
    pub fn arm(&mut self) -> bool {
        self.bar.write(regs::VTEIMS, 1 << self.vector);
        RxDone(self.ring.high(self.next)).done()
    }

    /// The eventfd that becomes readable when an armed queue has frames. The interrupt masks itself when it fires.
    pub fn wake_fd(&self) -> Option<RawFd> {
        self.wake.as_ref().map(|fd| fd.as_raw_fd())
    }

    /// The same eventfd, kept open for whoever waits on it.
    pub fn wake_signal(&self) -> Option<Arc<OwnedFd>> {
        self.wake.clone()
    }

    /// Number of this queue in its device.
    pub fn index(&self) -> u32 {
        self.queue
    }
}

impl Drop for RxQueue {
    fn drop(&mut self) {
        self.bar
            .modify(regs::vfrxdctl(self.queue), regs::DCTL_ENABLE, 0);
        // A device that does not stop cannot hurt: its mappings end with the ring.
        let _ = self.wait_enabled(false);
    }
}

/// The frames of one burst, in the device's buffers. They are given back with [`RxQueue::give_back`].
pub struct Frames<'a> {
    queue: &'a RxQueue,
}

/// One frame of a burst.
#[derive(Clone, Copy)]
pub struct RxFrame<'a> {
    queue: &'a RxQueue,
    lent: &'a Lent,
}

impl<'a> Frames<'a> {
    /// Frames in the burst.
    #[inline]
    pub fn count(&self) -> usize {
        self.queue.count
    }

    /// The frames, oldest first.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = RxFrame<'a>> + use<'a> {
        let queue = self.queue;
        let lent = queue.lent.get(..queue.count).unwrap_or(&[]);
        lent.iter().map(move |lent| RxFrame { queue, lent })
    }
}

impl<'a> RxFrame<'a> {
    /// Why the frame must not be used, if so.
    #[inline]
    pub fn fault(&self) -> Option<RxFault> {
        self.lent.fault
    }

    /// Bytes without FCS; 0 with a fault.
    #[inline]
    pub fn len(&self) -> u32 {
        if self.lent.fault.is_some() {
            0
        } else {
            self.lent.len
        }
    }

    /// True if there is nothing to be had: the frame carries a fault.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the frame is, if it lies in one piece and has no fault.
    #[inline]
    pub fn whole(&self) -> Option<Piece<'a>> {
        (self.lent.descs == 1 && self.lent.fault.is_none())
            .then(|| self.queue.ring.piece(self.lent.position, self.lent.len))
    }

    /// The frame's pieces; none with a fault.
    pub fn pieces(&self) -> impl Iterator<Item = Piece<'a>> + use<'a> {
        let (queue, lent) = (self.queue, self.lent);
        let count = if lent.fault.is_some() { 0 } else { lent.descs };
        (0..count).map(move |index| {
            let place = usize::from(lent.pieces) + usize::from(index);
            let len = match queue.pieces.get(place) {
                Some(len) if count != 1 => u32::from(*len),
                _ => lent.len,
            };
            queue
                .ring
                .piece(lent.position.wrapping_add(u32::from(index)), len)
        })
    }

    /// Copies the frame from its byte `from` on, as much as `room` takes.
    #[inline]
    pub fn copy_part(&self, from: u32, room: &mut Room<'_>) {
        match self.whole() {
            Some(piece) => {
                room.copy(0, &piece, from, Ring::BUFFER);
            }
            None => self.copy_pieces(from, room),
        }
    }

    #[cold]
    fn copy_pieces(&self, from: u32, room: &mut Room<'_>) {
        let (mut skip, mut at) = (from, 0);
        for piece in self.pieces() {
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            at += room.copy(at, &piece, skip, Ring::BUFFER);
            skip = 0;
        }
    }

    /// The VLAN tag the device stripped.
    #[inline]
    pub fn vlan(&self) -> Option<u16> {
        self.lent.done.vlan()
    }

    /// The checksum of TCP, UDP or SCTP.
    pub fn l4_checksum(&self) -> Checksum {
        self.lent.done.l4_checksum()
    }

    /// The IPv4 header's checksum.
    pub fn ip_checksum(&self) -> Checksum {
        self.lent.done.ip_checksum()
    }

    /// The frame came from another VF of the same port.
    pub fn looped_back(&self) -> bool {
        self.lent.done.looped_back()
    }
}
