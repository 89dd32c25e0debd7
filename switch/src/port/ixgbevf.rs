//! The queues of a NIC's Virtual Function: the way to the wire.
//!
//! Frames are lent from the buffers the device wrote and copied into those it reads; each burst costs one register write per
//! direction. The 82599 sends a VF's own broadcast back to it: a station would seem to have moved to the wire. Such echoes are
//! dropped, recognised by source addresses that just left.
#![allow(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use vfio_pmd::rx::{self, RxFault};
use vfio_pmd::tx::{self, TxError};

use super::shared::{Sender, Sent};
use crate::dataplane::clock::tsc;
use crate::dataplane::counters::Reason;
use crate::dataplane::frame::{BURST_MAX, Burst, Segment, Slots};
use crate::dataplane::queue::RxQueue;

const _: () = assert!(BURST_MAX <= rx::BURST_MAX);

/// Places for source addresses; two that fall into one place forget each other, which only matters within [`EPOCH`].
const ECHOES: usize = 4096;
/// How long an address is remembered: one to two times 2^31 cycles, about a second. An echo comes within microseconds.
const EPOCH: u32 = 31;
/// EtherType of an 802.1Q tag.
const TAGGED: [u8; 2] = [0x81, 0x00];

/// Source addresses of the group-addressed frames that left lately.
///
/// Threads: written by whoever sends, read by whoever receives. Relaxed: each entry is one word that stands for itself.
pub struct Echoes(Box<[AtomicU64; ECHOES]>);

impl Echoes {
    /// Nothing left yet.
    pub fn new() -> Arc<Echoes> {
        Arc::new(Echoes(Box::new([const { AtomicU64::new(0) }; ECHOES])))
    }

    /// The entry for `source`: 48 bits of address, 16 of time.
    fn entry(source: [u8; 6], epoch: u64) -> u64 {
        let [a, b, c, d, e, f] = source;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0]) | epoch << 48
    }

    fn place(&self, source: [u8; 6]) -> &AtomicU64 {
        let word = Self::entry(source, 0).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        &self.0[(word >> 52) as usize % ECHOES]
    }

    fn note(&self, source: [u8; 6], epoch: u64) {
        self.place(source)
            .store(Self::entry(source, epoch), Relaxed);
    }

    fn knows(&self, source: [u8; 6], epoch: u64) -> bool {
        let noted = self.place(source).load(Relaxed);
        noted == Self::entry(source, epoch) || noted == Self::entry(source, epoch.wrapping_sub(1))
    }
}

fn epoch() -> u64 {
    tsc() >> EPOCH
}

/// A VF's receive queue.
pub struct FromWire {
    queue: rx::RxQueue,
    echoes: Arc<Echoes>,
    /// Never set: the device's buffers are our own memory.
    gone: AtomicBool,
}

impl FromWire {
    /// Frames whose sources are in `echoes` come from here.
    pub fn new(queue: rx::RxQueue, echoes: Arc<Echoes>) -> FromWire {
        FromWire {
            queue,
            echoes,
            gone: AtomicBool::new(false),
        }
    }
}

impl RxQueue for FromWire {
    #[inline]
    fn lend<'a>(&'a mut self, slots: &'a mut Slots) -> Burst<'a> {
        slots.clear();
        for frame in self.queue.lend(BURST_MAX).iter() {
            let Some(piece) = frame.whole() else {
                if push_odd(slots, &frame) {
                    continue;
                }
                break;
            };
            let mut head = [0; 12];
            if piece.copy_to(&mut head) == head.len() && head[0] & 1 == 1 {
                let [.., a, b, c, d, e, f] = head;
                if self.echoes.knows([a, b, c, d, e, f], epoch()) {
                    slots.push_fault(Reason::Echo);
                    continue;
                }
            }
            // SAFETY: `piece` has `readable() >= len()` bytes in a buffer of the queue, which stays borrowed with the burst; the
            // queue lends at most BURST_MAX frames.
            unsafe { slots.push(piece.as_ptr(), piece.len(), piece.readable()) };
        }
        slots.lend(&self.gone)
    }

    #[inline]
    fn give_back(&mut self, done: usize) {
        self.queue.give_back(done);
    }

    fn arm(&mut self) -> bool {
        self.queue.arm()
    }

    /// The interrupt masks itself when it fires.
    fn disarm(&mut self) {}

    fn wake_fd(&self) -> Option<RawFd> {
        self.queue.wake_fd()
    }
}

/// A frame in several buffers, or none at all. False: the burst has no room for its pieces.
#[cold]
fn push_odd(slots: &mut Slots, frame: &rx::RxFrame<'_>) -> bool {
    match frame.fault() {
        Some(RxFault::Chain) => slots.push_fault(Reason::TooManySegments),
        Some(_) => slots.push_fault(Reason::Damaged),
        None => {
            let mut segments = [Segment {
                at: std::ptr::null(),
                len: 0,
            }; rx::PIECES_MAX];
            let mut count = 0;
            for (segment, piece) in segments.iter_mut().zip(frame.pieces()) {
                *segment = Segment {
                    at: piece.as_ptr(),
                    len: piece.len(),
                };
                count += 1;
            }
            // SAFETY: the pieces lie in buffers of the queue, which stays borrowed with the burst of at most BURST_MAX frames.
            return unsafe { slots.push_pieces(segments.get(..count).unwrap_or(&[])) };
        }
    }
    true
}

/// A VF's transmit queue.
pub struct ToWire {
    queue: tx::TxQueue,
    echoes: Arc<Echoes>,
    /// Longest frame without a tag.
    frame_max: u32,
}

impl ToWire {
    /// Untagged frames longer than `frame_max` bytes are dropped, as the PF would without a word.
    pub fn new(queue: tx::TxQueue, echoes: Arc<Echoes>, frame_max: u32) -> ToWire {
        ToWire {
            queue,
            echoes,
            frame_max,
        }
    }
}

impl Sender for ToWire {
    #[inline]
    fn send(&mut self, burst: &Burst<'_>, mut picks: u64) -> Sent {
        let mut sent = Sent {
            frames: 0,
            bytes: 0,
            small: 0,
            reason: Reason::TxFull,
        };
        while picks != 0 {
            let index = picks.trailing_zeros() as usize;
            let (len, head) = (burst.frame_len(index), &burst.head(index).0);
            let tag = if head[12..14] == TAGGED { 4 } else { 0 };
            if len > self.frame_max + tag {
                sent.small += 1;
                picks &= picks - 1;
                continue;
            }
            if head[0] & 1 == 1 {
                let source = [head[6], head[7], head[8], head[9], head[10], head[11]];
                self.echoes.note(source, epoch());
            }
            let pushed = self.queue.push(len, |from, room| {
                if room.len() == len {
                    // SAFETY: the room takes the whole frame.
                    unsafe { burst.copy(index, room.as_mut_ptr()) };
                } else {
                    // SAFETY: the queue asks for `room.len()` of the frame's bytes from `from` on, which the room takes.
                    unsafe {
                        burst.copy_part(
                            index,
                            from as usize,
                            room.len() as usize,
                            room.as_mut_ptr(),
                        );
                    }
                }
            });
            match pushed {
                Ok(()) => {
                    sent.frames += 1;
                    sent.bytes += u64::from(len);
                }
                Err(TxError::Length) => sent.small += 1,
                Err(TxError::Full | TxError::Offload(_)) => break,
            }
            picks &= picks - 1;
        }
        if burst.sender_gone() {
            // Zeros may have been copied: nothing of this burst leaves.
            self.queue.take_back();
            return Sent {
                frames: 0,
                bytes: 0,
                small: sent.small,
                reason: Reason::SenderGone,
            };
        }
        self.queue.publish();
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_is_known_for_a_moment_and_nobody_elses_frame() {
        let echoes = Echoes::new();
        let (mine, other) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        assert!(!echoes.knows([0; 6], 5) && !echoes.knows(mine, 5));
        echoes.note(mine, 5);
        assert!(echoes.knows(mine, 5) && echoes.knows(mine, 6));
        assert!(!echoes.knows(mine, 7) && !echoes.knows(other, 5));
        // 16 bits of time: it comes round.
        echoes.note(mine, 0xFFFF);
        assert!(echoes.knows(mine, 0x1_0000));
    }
}
