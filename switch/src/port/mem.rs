//! Frames from and to a `Vec`: a port without a guest, for tests and benchmarks of everything above the rings.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use super::shared::{Sender, Sent};
use crate::dataplane::counters::Reason;
use crate::dataplane::frame::{BURST_MAX, Burst, Slots};
use crate::dataplane::queue::RxQueue;

/// A wire of frames with two ends, seen by whoever holds a clone.
pub type Wire = Arc<Mutex<VecDeque<Vec<u8>>>>;

/// Lends copies of the first frames of a [`Wire`]; they leave it when they are given back.
pub struct FromVec {
    wire: Wire,
    lent: Vec<Vec<u8>>,
    gone: AtomicBool,
}

/// Puts frames on a [`Wire`], at most `room` at a time.
pub struct ToVec {
    wire: Wire,
    room: usize,
}

impl FromVec {
    /// Takes its frames from `wire`.
    pub fn new(wire: Wire) -> FromVec {
        FromVec {
            wire,
            lent: Vec::new(),
            gone: AtomicBool::new(false),
        }
    }
}

impl ToVec {
    /// Puts frames on `wire` while fewer than `room` are there.
    pub fn new(wire: Wire, room: usize) -> ToVec {
        ToVec { wire, room }
    }
}

impl RxQueue for FromVec {
    #[allow(unsafe_code)]
    fn lend<'a>(&'a mut self, slots: &'a mut Slots) -> Burst<'a> {
        slots.clear();
        let wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        self.lent = wire.iter().take(BURST_MAX).cloned().collect();
        drop(wire);
        for frame in &self.lent {
            let len = frame.len() as u32;
            if len == 0 {
                slots.push_fault(Reason::Runt);
            } else {
                // SAFETY: `lent` holds at most BURST_MAX frames, and keeps them while the burst borrows it.
                unsafe { slots.push(frame.as_ptr(), len, len) };
            }
        }
        slots.lend(&self.gone)
    }

    fn give_back(&mut self, done: usize) {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        wire.drain(..done.min(self.lent.len()));
    }

    fn arm(&mut self) -> bool {
        !self
            .wire
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
    }

    fn disarm(&mut self) {}

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
}

impl Sender for ToVec {
    #[allow(unsafe_code)]
    fn send(&mut self, burst: &Burst<'_>, mut picks: u64) -> Sent {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sent = Sent {
            frames: 0,
            bytes: 0,
            small: 0,
            reason: Reason::TxFull,
        };
        while picks != 0 && wire.len() < self.room {
            let index = picks.trailing_zeros() as usize;
            let len = burst.frame_len(index);
            let mut frame = vec![0; len as usize];
            // SAFETY: `frame` has the frame's length.
            unsafe { burst.copy(index, frame.as_mut_ptr()) };
            wire.push_back(frame);
            sent.frames += 1;
            sent.bytes += u64::from(len);
            picks &= picks - 1;
        }
        sent
    }
}
