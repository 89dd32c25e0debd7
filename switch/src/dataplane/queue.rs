//! The waist of the switch: what a worker asks of a port's queues.
//!
//! Names are the switch's side: it receives from an [`RxQueue`] and transmits to a [`TxQueue`].

use std::any::Any;
use std::os::fd::RawFd;

use super::counters::Reason;
use super::frame::{Burst, Slots};

/// Frames come from here. Owned by one worker at a time: ownership is the lock.
pub trait RxQueue: Any + Send {
    /// Lends up to a burst of frames. They stay in their owner's buffers until `give_back`; asked again without it, the
    /// queue lends the same frames again.
    fn lend<'a>(&'a mut self, slots: &'a mut Slots) -> Burst<'a>;

    /// Returns the first `done` frames of the last burst to their owner and tells it.
    fn give_back(&mut self, done: usize);

    /// Asks the peer to announce its next frame through [`RxQueue::wake_fd`]; true if frames wait already.
    fn arm(&mut self) -> bool;

    /// Asks the peer not to announce frames any more.
    fn disarm(&mut self);

    /// The descriptor that becomes readable when an armed queue has frames.
    fn wake_fd(&self) -> Option<RawFd>;
}

/// What became of the frames picked from a burst: sent, or dropped for one of two reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Frames the receiver has now.
    pub sent: u32,
    /// Frames that no free buffer of the receiver can hold ([`Reason::TxBufferSmall`]).
    pub small: u32,
    /// Frames dropped for `reason`.
    pub left: u32,
    /// Why.
    pub reason: Reason,
}

/// Frames go here. Shared by all workers; keeps its own books.
pub trait TxQueue: Send + Sync {
    /// Copies the frames whose bits are set in `picks` to the receiver, in order, and tells it.
    fn send(&self, burst: &Burst<'_>, picks: u64) -> Outcome;
}
