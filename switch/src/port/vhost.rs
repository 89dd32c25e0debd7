//! The queue pairs of a guest's net device: rings in its memory as queues of the switch.
//!
//! Every frame in a ring has a 12-byte virtio-net header in front (virtio 1.2 §5.1.6). No offload is negotiated, so what a
//! sender writes there is never read (it would cost a cache line, 11 cycles per frame) and a receiver gets zeros and the
//! number of buffers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use super::call::Call;
use super::shared::{Sender, Sent};
use crate::dataplane::clock::tsc;
use crate::dataplane::counters::Reason;
use crate::dataplane::frame::{BURST_MAX, Burst, SEGMENTS_MAX, Segment, Slots};
use crate::dataplane::queue::RxQueue;
use crate::virtio::buffers::{BATCH, Buffers, Fault, NET_HEADER, Piece};
use crate::virtio::guest_mem::Poison;
use crate::virtio::ring::{Lie, Ring};

const _: () = assert!(BURST_MAX <= BATCH);

/// Fetches per burst: 64 frames of 64 KiB take one each, and as many again for useless buffers. Bounds the work of a turn.
const ROUNDS: usize = 2 * BURST_MAX;

/// Cycles of the time-stamp counter, some 0.6 µs, that a packed transmit ring is left alone after it gave part of a burst. Its driver
/// is probably writing the rest, and each look takes the line of descriptors away from it: far, frames then travel 15 % more
/// slowly. (Split rings announce a burst at once, elsewhere.) Not measured where the counter is another one.
const REST: u64 = if cfg!(target_arch = "x86_64") {
    1500
} else {
    0
};
/// Cycles of the time-stamp counter, some 5 ms, without a frame after which a guest gets all its used buffers back, see
/// [`Ring::complete_lazily`]. A client that the switch waits for is silent for 80 µs hundreds of times a second: to give all back each
/// time would cost a quarter of the gain.
const HOLD_FOR: u64 = if cfg!(target_arch = "x86_64") {
    13_000_000
} else {
    0
};
/// Cycles, some 0.1 ms: a guest that sends so soon after a silence in which it got all its buffers back was probably waiting for them.
const SOON: u64 = 260_000;
/// A guest that waits so many times in a row has too few buffers for any to be held back.
const WAITS_MAX: u8 = 16;
/// Fewer frames are no burst: nobody may be made to wait who sends them one by one.
const BURST_MIN: usize = 8;

/// A ring with what belongs to it: the descriptors for notification, and what went wrong.
struct Side {
    ring: Ring,
    buffers: Box<Buffers>,
    poison: Arc<Poison>,
    call: Option<Call>,
    lie: Option<Lie>,
}

impl Side {
    fn new(ring: Ring, call: Option<Call>) -> Side {
        let poison = ring.mem().poison().clone();
        Side {
            ring,
            buffers: Buffers::new(),
            poison,
            call,
            lie: None,
        }
    }

    /// The whole attachment leaves service: control finds the flag and asks for the reason.
    #[cold]
    fn broken(&mut self, lie: Lie) {
        self.lie = Some(lie);
        self.poison.set();
    }

    #[inline]
    fn call_guest(&mut self) {
        if self.ring.call_wanted()
            && let Some(call) = &self.call
        {
            call.signal();
        }
    }

    /// Gives the guest back whatever it did not get yet.
    #[cold]
    fn settle(&mut self) {
        self.ring.settle();
        self.call_guest();
    }
}

/// A guest's transmit ring: the switch receives from it.
pub struct FromGuest {
    side: Side,
    kick: Option<OwnedFd>,
    frame_max: u32,
    /// Whom to tell that the attachment is broken, until it was done.
    alarm: Option<Arc<Call>>,
    told: bool,
    /// The ring is not looked at before this time; 0: at any time. See [`REST`].
    rest_until: u64,
    /// When the ring was found empty while used buffers are held back; 0: it was not. See [`HOLD_FOR`].
    silent_since: u64,
    /// When a silence ended that gave the guest its buffers back; 0: the guest has sent since.
    settled_at: u64,
    /// How often in a row it sent [`SOON`] after that.
    waits: u8,
}

impl FromGuest {
    /// Frames longer than `frame_max` bytes are dropped.
    pub fn new(ring: Ring, call: Option<Call>, kick: Option<OwnedFd>, frame_max: u32) -> FromGuest {
        FromGuest {
            side: Side::new(ring, call),
            kick,
            frame_max,
            alarm: None,
            told: false,
            rest_until: 0,
            silent_since: 0,
            settled_at: 0,
            waits: 0,
        }
    }

    /// Tells somebody at once when the attachment breaks: else control finds out when it looks.
    pub fn set_alarm(&mut self, alarm: Arc<Call>) {
        self.alarm = Some(alarm);
    }

    #[cold]
    fn raise_alarm(&mut self) {
        if let Some(alarm) = self.alarm.as_ref().filter(|_| !self.told) {
            alarm.signal();
        }
        self.told = true;
    }

    #[inline]
    fn is_resting(&mut self) -> bool {
        if self.rest_until == 0 {
            return false;
        }
        let left = self.rest_until.wrapping_sub(tsc());
        let resting = (1..=REST).contains(&left);
        if !resting {
            self.rest_until = 0;
        }
        resting
    }

    /// The ring is empty and used buffers are held back. A guest that waits for them gets them now, one that sends no more in the end.
    #[inline]
    fn hear_silence(&mut self) {
        self.side.call_guest();
        let now = tsc().max(1);
        if self.silent_since == 0 {
            self.silent_since = now;
        } else if now.wrapping_sub(self.silent_since) > HOLD_FOR {
            self.side.settle();
            self.settled_at = now;
        }
    }

    /// The first frames after such a silence: did the guest wait for its buffers?
    #[cold]
    fn end_silence(&mut self) {
        let soon = tsc().wrapping_sub(self.settled_at) < SOON;
        self.settled_at = 0;
        self.waits = if soon {
            self.waits.saturating_add(1)
        } else {
            0
        };
        if self.waits == WAITS_MAX {
            self.side.ring.hold_none();
        }
    }

    /// The flag that this attachment is broken.
    pub fn poison(&self) -> &Arc<Poison> {
        &self.side.poison
    }

    /// The rule the guest broke in this ring, if it did.
    pub fn lie(&self) -> Option<Lie> {
        self.side.lie
    }

    /// Takes the queue apart: the ring's position, and the descriptors. All used buffers are with the guest then.
    pub fn into_parts(mut self) -> (Ring, Option<Call>, Option<OwnedFd>) {
        if !self.side.poison.is_set() {
            self.side.settle();
        }
        (self.side.ring, self.side.call, self.kick)
    }

    /// Lends the `count` frames that were fetched.
    #[inline]
    fn push(&self, slots: &mut Slots, count: usize) {
        let buffers = self.side.buffers.first(count);
        for (index, buffer) in buffers.iter().enumerate() {
            let len = buffer.len.wrapping_sub(NET_HEADER);
            // A length of 0, or below the header's, wraps to more than any `frame_max`.
            if len.wrapping_sub(1) < self.frame_max {
                // SAFETY: `len + 12 <= room` bytes are mapped at `at` (checked by the ring) as long as the ring lives;
                // `index < BURST_MAX`.
                unsafe {
                    let at = buffer.at.add(NET_HEADER as usize);
                    slots.put(index, at, len, buffer.room - NET_HEADER);
                }
            } else {
                // SAFETY: each was put, or pushed, in this loop.
                unsafe { slots.set_count(index) };
                if !self.push_odd(slots, index) {
                    return;
                }
            }
        }
        // SAFETY: as above.
        unsafe { slots.set_count(buffers.len()) };
    }

    /// A buffer that is not simply one piece with a header and a frame in it. False: the burst is full.
    #[cold]
    fn push_odd(&self, slots: &mut Slots, index: usize) -> bool {
        let buffers = &self.side.buffers;
        match (buffers.fault(index), buffers.pieces(index)) {
            (Some(Fault::BadAddress), _) => slots.push_fault(Reason::BadAddress),
            (Some(Fault::TooManyPieces), _) => slots.push_fault(Reason::TooManySegments),
            (None, []) if buffers.buffer(index).len <= NET_HEADER => slots.push_fault(Reason::Runt),
            (None, []) => slots.push_fault(Reason::Oversize),
            (None, pieces) => return self.push_chain(slots, pieces),
        }
        true
    }

    fn push_chain(&self, slots: &mut Slots, pieces: &[Piece]) -> bool {
        let mut segments = [Segment {
            at: std::ptr::null(),
            len: 0,
        }; SEGMENTS_MAX];
        let (mut count, mut len, mut header) = (0, 0u64, NET_HEADER);
        for piece in pieces {
            let skip = header.min(piece.len);
            header -= skip;
            if piece.len == skip {
                continue;
            }
            let Some(segment) = segments.get_mut(count) else {
                slots.push_fault(Reason::TooManySegments);
                return true;
            };
            *segment = Segment {
                at: piece.at.wrapping_add(skip as usize),
                len: piece.len - skip,
            };
            count += 1;
            len += u64::from(piece.len - skip);
        }
        if count == 0 {
            slots.push_fault(Reason::Runt);
        } else if len > u64::from(self.frame_max) {
            slots.push_fault(Reason::Oversize);
        } else {
            // SAFETY: each piece was checked against the guest's memory, which the ring keeps mapped; `skip <= len`.
            return unsafe { slots.push_pieces(segments.get(..count).unwrap_or(&[])) };
        }
        true
    }
}

impl RxQueue for FromGuest {
    #[inline]
    fn lend<'a>(&'a mut self, slots: &'a mut Slots) -> Burst<'a> {
        slots.clear();
        if self.is_resting() {
            return slots.lend(self.side.poison.flag());
        }
        if !self.side.poison.is_set() {
            match self.side.ring.fetch(&mut self.side.buffers, BURST_MAX) {
                Ok(0) if self.side.ring.holds() => self.hear_silence(),
                Ok(count) => self.push(slots, count),
                Err(lie) => self.side.broken(lie),
            }
        } else {
            self.raise_alarm();
        }
        slots.lend(self.side.poison.flag())
    }

    #[inline]
    fn give_back(&mut self, done: usize) {
        if self.side.poison.is_set() {
            return; // a ring whose memory vanished is never published to
        }
        self.side.ring.complete_lazily(done);
        self.side.call_guest();
        self.silent_since = 0;
        if self.settled_at != 0 {
            self.end_silence();
        }
        if (BURST_MIN..BURST_MAX).contains(&done) && self.side.ring.is_packed() {
            self.rest_until = tsc().wrapping_add(REST).max(1);
        }
    }

    fn arm(&mut self) -> bool {
        if self.side.poison.is_set() {
            return false;
        }
        self.side.settle();
        self.side.ring.arm()
    }

    fn disarm(&mut self) {
        if !self.side.poison.is_set() {
            self.side.ring.disarm();
        }
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(AsRawFd::as_raw_fd)
    }
}

/// A guest's receive ring: the switch transmits to it.
pub struct ToGuest {
    side: Side,
    mergeable: bool,
    written: [u32; BATCH],
}

/// One batch of buffers being filled.
#[derive(Default)]
struct Filled {
    /// Buffers used.
    buffers: usize,
    frames: u32,
    bytes: u64,
    /// Frames that fit no buffer.
    small: u32,
    /// A long frame needs more buffers than were fetched.
    short: bool,
}

impl ToGuest {
    /// `mergeable`: a frame may be spread over several buffers (VIRTIO_NET_F_MRG_RXBUF was negotiated).
    pub fn new(ring: Ring, call: Option<Call>, mergeable: bool) -> ToGuest {
        ToGuest {
            side: Side::new(ring, call),
            mergeable,
            written: [0; BATCH],
        }
    }

    /// The flag that this attachment is broken.
    pub fn poison(&self) -> &Arc<Poison> {
        &self.side.poison
    }

    /// The rule the guest broke in this ring, if it did.
    pub fn lie(&self) -> Option<Lie> {
        self.side.lie
    }

    /// Takes the queue apart: the ring's position, and the descriptor.
    pub fn into_parts(self) -> (Ring, Option<Call>) {
        (self.side.ring, self.side.call)
    }

    /// Looks at the first buffer, which else nobody does until a frame comes: a guest that lies here is put out before.
    pub fn look(&mut self) {
        if let Err(lie) = self.side.ring.fetch(&mut self.side.buffers, 1) {
            self.side.broken(lie);
        }
    }

    /// Fills the `count` fetched buffers with the frames in `picks`, and clears the bits of those that are dealt with.
    #[inline]
    fn fill(&mut self, burst: &Burst<'_>, picks: &mut u64, count: usize) -> Filled {
        let mut filled = Filled::default();
        loop {
            self.fill_plain(burst, picks, count, &mut filled);
            if *picks == 0 || filled.buffers >= count {
                break;
            }
            let index = picks.trailing_zeros() as usize;
            if !self.fill_odd(burst, index, count, &mut filled) {
                break;
            }
            *picks &= *picks - 1;
        }
        filled
    }

    /// Frames that fit the next buffer in one piece, up to the first one that does not.
    ///
    /// Two stores a frame, its line and its length; the sums are kept in registers. A store to a line that is far away waits
    /// hundreds of cycles in the processor's store queue (64 places), all later ones behind it: each further store a frame would be one
    /// frame less on its way at the same time.
    #[inline]
    fn fill_plain(
        &mut self,
        burst: &Burst<'_>,
        picks: &mut u64,
        count: usize,
        filled: &mut Filled,
    ) {
        let buffers = self.side.buffers.first(count);
        let (mut left, mut at, mut bytes) = (*picks, filled.buffers, 0);
        while let Some(buffer) = buffers.get(at)
            && left != 0
        {
            let index = left.trailing_zeros() as usize;
            let len = burst.frame_len(index);
            if buffer.len < len + NET_HEADER {
                break;
            }
            // SAFETY: the buffer has room for header and frame (just compared; a faulty one has length 0).
            unsafe {
                put_header(buffer.at, 1);
                burst.copy(index, buffer.at.add(NET_HEADER as usize));
            }
            self.written[at % BATCH] = len + NET_HEADER;
            at += 1;
            bytes += u64::from(len);
            left &= left - 1;
        }
        filled.frames += (at - filled.buffers) as u32;
        filled.bytes += bytes;
        filled.buffers = at;
        *picks = left;
    }

    /// A frame that does not fit the next buffer in one piece. False: more buffers are needed, fetch again.
    #[cold]
    fn fill_odd(
        &mut self,
        burst: &Burst<'_>,
        index: usize,
        count: usize,
        filled: &mut Filled,
    ) -> bool {
        let need = u64::from(burst.frame_len(index)) + u64::from(NET_HEADER);
        let first = filled.buffers;
        // How many buffers does the frame take?
        let (mut room, mut last) = (0u64, first);
        while room < need {
            if last == count {
                filled.short = true;
                return false;
            }
            let size = self.size(last);
            if last == first && size < u64::from(NET_HEADER) {
                // Useless even for a header: back to the guest with length 0, and on to the next one.
                self.written[first % BATCH] = 0;
                filled.buffers += 1;
                return self.fill_odd_again(burst, index, count, filled);
            }
            if !self.mergeable && size < need {
                filled.small += 1;
                return true; // the buffer stays for a shorter frame
            }
            room += size;
            last += 1;
        }
        self.scatter(burst, index, first..last);
        filled.buffers = last;
        filled.frames += 1;
        filled.bytes += need - u64::from(NET_HEADER);
        true
    }

    fn fill_odd_again(
        &mut self,
        burst: &Burst<'_>,
        index: usize,
        count: usize,
        filled: &mut Filled,
    ) -> bool {
        // At most `count` times in a row: each has used up one buffer.
        if filled.buffers == count {
            false
        } else {
            self.fill_odd(burst, index, count, filled)
        }
    }

    /// Bytes that buffer `index` takes; 0 for one that cannot be used.
    fn size(&self, index: usize) -> u64 {
        let buffers = &self.side.buffers;
        let pieces = buffers.pieces(index).iter();
        let spread: u64 = pieces.map(|piece| u64::from(piece.len)).sum();
        spread + u64::from(buffers.buffer(index).len)
    }

    /// Writes header and frame over all pieces of `buffers`, which together have room for them.
    fn scatter(&mut self, burst: &Burst<'_>, index: usize, buffers: std::ops::Range<usize>) {
        let len = burst.frame_len(index) as usize;
        let mut header = [0u8; NET_HEADER as usize];
        // SAFETY: 12 bytes.
        unsafe { put_header(header.as_mut_ptr(), buffers.len() as u16) };
        let mut at = 0; // position in header + frame
        for number in buffers {
            let before = at;
            let buffer = *self.side.buffers.buffer(number);
            let alone = [Piece {
                at: buffer.at,
                len: buffer.len,
            }];
            let pieces = match self.side.buffers.pieces(number) {
                [] => &alone[..],
                several => several,
            };
            for piece in pieces {
                let (mut to, mut room) = (piece.at, piece.len as usize);
                if at < header.len() {
                    let take = room.min(header.len() - at);
                    // SAFETY: `take` bytes are left of the header, and `take <= room` fit at `to`.
                    unsafe {
                        std::ptr::copy_nonoverlapping(header.as_ptr().add(at), to, take);
                        to = to.add(take);
                    }
                    at += take;
                    room -= take;
                }
                let take = room.min(header.len() + len - at);
                if take > 0 {
                    // SAFETY: `at - 12 + take <= len`, and `take <= room` bytes fit at `to`.
                    unsafe { burst.copy_part(index, at - header.len(), take, to) };
                    at += take;
                }
            }
            self.written[number % BATCH] = (at - before) as u32;
        }
    }

    /// Publishes what was filled, unless memory vanished under it meanwhile: zeros are never delivered.
    #[inline]
    fn publish(&mut self, burst: &Burst<'_>, filled: &Filled, total: &mut Sent) -> bool {
        if self.side.poison.is_set() {
            total.reason = Reason::TxBroken;
            return false;
        }
        if burst.sender_gone() {
            total.reason = Reason::SenderGone;
            return false;
        }
        self.side.ring.complete(filled.buffers, &self.written);
        total.frames += filled.frames;
        total.bytes += filled.bytes;
        total.small += filled.small;
        true
    }
}

impl Sender for ToGuest {
    #[inline]
    fn send(&mut self, burst: &Burst<'_>, mut picks: u64) -> Sent {
        let mut total = Sent {
            frames: 0,
            bytes: 0,
            small: 0,
            reason: Reason::TxFull,
        };
        if self.side.poison.is_set() {
            return Sent {
                reason: Reason::TxBroken,
                ..total
            };
        }
        let mut most = picks.count_ones() as usize;
        let mut returned = 0;
        for _ in 0..ROUNDS {
            let count = match self.side.ring.fetch(&mut self.side.buffers, most) {
                Ok(count) => count,
                Err(lie) => {
                    self.side.broken(lie);
                    total.reason = Reason::TxBroken;
                    break;
                }
            };
            if count == 0 {
                break;
            }
            let filled = self.fill(burst, &mut picks, count);
            if !self.publish(burst, &filled, &mut total) {
                break;
            }
            returned += filled.buffers;
            if filled.short && filled.buffers == 0 {
                if most == BATCH {
                    picks &= picks - 1; // a whole batch cannot hold it: dropped, the next ones may fit
                }
                most = BATCH;
            }
            if picks == 0 {
                break;
            }
        }
        // Buffers without a frame count too: a guest whose ring held nothing but useless ones would never bring better.
        if returned > 0 {
            self.side.call_guest();
        }
        total
    }
}

/// Makes sure that a virtio-net header without offloads stands at `at`: zeros, and the number of buffers (virtio 1.2 §5.1.6: le16
/// at byte 10).
///
/// A buffer that is used again mostly has this very header from the last time. Then it is not written: the line stays
/// shared between both caches and need not travel at all, the largest lever of all where the caches are far apart. If the
/// guest changes it afterwards, it deceives nobody but itself.
///
/// # Safety
/// 12 bytes at `at` are valid for reads and writes.
#[inline]
unsafe fn put_header(at: *mut u8, buffers: u16) {
    let (zeros, last) = (
        at.cast::<Unaligned<u64>>(),
        at.wrapping_add(8).cast::<Unaligned<u32>>(),
    );
    let wanted = (u32::from(buffers) << 16).to_le();
    // SAFETY: bytes 0 to 7, then 8 to 11.
    unsafe {
        let (zeros_there, last_there) = (zeros.read_volatile().0, last.read_volatile().0);
        if zeros_there != 0 || last_there != wanted {
            zeros.write(Unaligned(0));
            last.write(Unaligned(wanted));
        }
    }
}

/// A number at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T: Copy>(T);
