//! A transmit queue for several workers: a try-lock per burst, the only lock near packets.
//!
//! Uncontended (one worker, or a queue per worker) it costs one locked instruction per burst. A worker that finds it taken
//! tries for about as long as a burst takes and then drops its frames under `tx_contended`: it never waits through
//! somebody else's page fault.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::dataplane::counters::{QueueCounters, Reason};
use crate::dataplane::frame::Burst;
use crate::dataplane::queue::{Outcome, TxQueue};

/// Tries before a worker gives up: about 10 µs, some two bursts of large frames.
const TRIES: u32 = 400;

/// What a [`Sender`] did with the picked frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Frames the receiver has now.
    pub frames: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that no free buffer can hold.
    pub small: u32,
    /// Why all the others were dropped.
    pub reason: Reason,
}

/// A transmit queue with one user at a time.
pub trait Sender: Send {
    /// Copies the frames whose bits are set in `picks` to the receiver and tells it; says what became of them.
    fn send(&mut self, burst: &Burst<'_>, picks: u64) -> Sent;
}

/// Lends a [`Sender`] to one worker at a time and keeps its books.
#[repr(align(128))]
pub struct Shared<S> {
    taken: AtomicBool,
    counters: Arc<QueueCounters>,
    sender: UnsafeCell<S>,
}

// SAFETY: `sender` is reached only by whoever changed `taken` from false to true, and by the owner of the whole value.
unsafe impl<S: Send> Sync for Shared<S> {}

impl<S: Sender> Shared<S> {
    /// Shares `sender`, which counts in `counters`.
    pub fn new(sender: S, counters: Arc<QueueCounters>) -> Shared<S> {
        Shared {
            taken: AtomicBool::new(false),
            counters,
            sender: UnsafeCell::new(sender),
        }
    }

    /// The sender, for its last user.
    pub fn into_inner(self) -> S {
        self.sender.into_inner()
    }

    #[inline]
    fn take(&self) -> bool {
        for _ in 0..TRIES {
            // Acquire: pairs with the Release in `send`: we see the ring as its last user left it.
            if self
                .taken
                .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
            {
                return true;
            }
            spin_loop();
        }
        false
    }

    #[inline]
    fn account(&self, sent: &Sent, picked: u32) -> Outcome {
        let (counters, left) = (&self.counters, picked - sent.frames - sent.small);
        counters.count(u64::from(sent.frames), sent.bytes);
        if sent.small > 0 {
            counters.count_drop(Reason::TxBufferSmall, u64::from(sent.small));
        }
        if left > 0 {
            counters.count_drop(sent.reason, u64::from(left));
        }
        Outcome {
            sent: sent.frames,
            small: sent.small,
            left,
            reason: sent.reason,
        }
    }
}

impl<S: Sender> TxQueue for Shared<S> {
    #[inline]
    fn send(&self, burst: &Burst<'_>, picks: u64) -> Outcome {
        let picked = picks.count_ones();
        if !self.take() {
            self.counters
                .count_drop_shared(Reason::TxContended, u64::from(picked));
            return Outcome {
                sent: 0,
                small: 0,
                left: picked,
                reason: Reason::TxContended,
            };
        }
        // SAFETY: `take` made us the only user until `taken` is false again.
        let sent = unsafe { (*self.sender.get()).send(burst, picks) };
        let outcome = self.account(&sent, picked);
        // Release: pairs with the Acquire in `take`.
        self.taken.store(false, Ordering::Release);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::frame::Slots;

    /// Takes every frame; notices if two threads are inside at once.
    struct Alone {
        inside: AtomicBool,
        frames: u64,
    }

    impl Sender for Alone {
        fn send(&mut self, _: &Burst<'_>, picks: u64) -> Sent {
            assert!(
                !self.inside.swap(true, Ordering::SeqCst),
                "two workers in one queue"
            );
            self.frames += u64::from(picks.count_ones());
            self.inside.store(false, Ordering::SeqCst);
            Sent {
                frames: picks.count_ones(),
                bytes: 0,
                small: 0,
                reason: Reason::TxFull,
            }
        }
    }

    #[test]
    fn two_workers_never_use_a_queue_at_once_and_every_frame_is_in_the_books() {
        const BURSTS: u64 = 20_000;
        let counters = Arc::new(QueueCounters::default());
        let shared = Shared::new(
            Alone {
                inside: AtomicBool::new(false),
                frames: 0,
            },
            counters.clone(),
        );
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let gone = AtomicBool::new(false);
                    let mut slots = Slots::new();
                    for _ in 0..BURSTS {
                        slots.clear();
                        shared.send(&slots.lend(&gone), 0b1011);
                    }
                });
            }
        });
        let contended = counters.dropped(Reason::TxContended);
        assert_eq!(shared.into_inner().frames, counters.frames());
        assert_eq!(counters.frames() + contended, 2 * BURSTS * 3);
    }
}
