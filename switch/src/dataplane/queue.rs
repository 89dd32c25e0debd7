//! The waist of the switch: what a worker asks of a port's queues.
//!
//! Names are the switch's side: it receives from an [`RxQueue`] and transmits to a [`TxQueue`].

use std::any::Any;
use std::os::fd::RawFd;

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

/// What became of the picked frames of a burst. Picked frames that are in none of these found no free buffer.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Frames the receiver has now.
    pub frames: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Frames no free buffer can hold.
    pub too_long: u32,
    /// The receiver is broken: none of the others was sent.
    pub broken: bool,
    /// The sender's memory vanished: none of the others was sent.
    pub sender_gone: bool,
}

/// Frames go here. Shared by all workers; counts what it sends and what it drops.
pub trait TxQueue: Send + Sync {
    /// Copies the frames whose bits are set in `picks` to the receiver, in order, and tells it. Every one of them is
    /// counted as sent or dropped.
    fn send(&self, burst: &Burst<'_>, picks: u64);
}
