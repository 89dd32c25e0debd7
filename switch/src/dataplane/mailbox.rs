//! What control may ask of a worker between two passes, and how it gets its things back.
//!
//! Queues and pictures of the topology are *moved*: whoever holds them owns them. Control waits for the answer to each
//! letter, so that when `detach` has returned no worker touches the queue any more, and when `show` has returned none uses
//! the old picture: only then does control unmap, close or free.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::port_set::{PortId, Topology};
use super::worker::{Idle, RxSlot};

/// Names one receive queue of a port.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct QueueId {
    /// The port.
    pub port: PortId,
    /// The queue pair's number within the port.
    pub pair: u16,
}

/// One request to a worker.
pub(super) enum Letter {
    Attach(Box<RxSlot>),
    Detach(QueueId, Sender<Option<Box<RxSlot>>>),
    Show(Arc<Topology>, Sender<Arc<Topology>>),
    Idle(Idle),
    Stop,
}

/// Wakes a worker that sleeps; built by whoever built the worker's [`super::worker::Doze`].
pub trait Wake: Send + Sync {
    /// Makes the worker's present or next sleep end at once.
    fn wake(&self);
}

/// Control's end: writes letters.
///
/// Threads: any number of control threads.
#[derive(Clone)]
pub struct Mailbox {
    letters: Sender<Letter>,
    flag: Arc<AtomicBool>,
    wake: Arc<dyn Wake>,
}

/// The worker's end: looks whether there is a letter.
pub struct Slot {
    letters: Receiver<Letter>,
    flag: Arc<AtomicBool>,
}

/// A mailbox and its slot.
pub fn mailbox(wake: Arc<dyn Wake>) -> (Mailbox, Slot) {
    let (sender, receiver) = bounded(64);
    let flag = Arc::new(AtomicBool::new(false));
    (
        Mailbox {
            letters: sender,
            flag: flag.clone(),
            wake,
        },
        Slot {
            letters: receiver,
            flag,
        },
    )
}

/// The worker is gone (it was stopped, or its thread ended).
#[derive(Debug, thiserror::Error)]
#[error("the worker has stopped")]
pub struct Stopped;

impl Mailbox {
    fn post(&self, letter: Letter) -> Result<(), Stopped> {
        self.letters.send(letter).map_err(|_| Stopped)?;
        // Release: pairs with the Acquire in `Slot::next`; a worker that sees the flag finds the letter. A swap like that in
        // `open`: of two swaps one comes first, and the model shows that neither order loses a letter.
        self.flag.swap(true, Ordering::Release);
        self.wake.wake();
        Ok(())
    }

    /// Gives a queue to the worker.
    pub fn attach(&self, slot: Box<RxSlot>) -> Result<(), Stopped> {
        self.post(Letter::Attach(slot))
    }

    /// Takes a queue back; `None` if the worker does not have it. The worker does not touch it any more.
    pub fn detach(&self, queue: QueueId) -> Result<Option<Box<RxSlot>>, Stopped> {
        let (sender, receiver) = bounded(1);
        self.post(Letter::Detach(queue, sender))?;
        receiver.recv().map_err(|_| Stopped)
    }

    /// Shows the worker a new picture of the ports and takes the old one back: the worker does not use it any more.
    pub fn show(&self, topology: Arc<Topology>) -> Result<Arc<Topology>, Stopped> {
        let (sender, receiver) = bounded(1);
        self.post(Letter::Show(topology, sender))?;
        receiver.recv().map_err(|_| Stopped)
    }

    /// Changes when the worker may sleep.
    pub fn idle(&self, idle: Idle) -> Result<(), Stopped> {
        self.post(Letter::Idle(idle))
    }

    /// Ends the worker after its present pass.
    pub fn stop(&self) {
        let _ = self.post(Letter::Stop);
    }
}

impl Slot {
    /// The next letter, if there is one. Without letters this costs one load of a line nobody writes.
    #[inline]
    pub(super) fn next(&self) -> Option<Letter> {
        if !self.flag.load(Ordering::Acquire) {
            return None;
        }
        self.open()
    }

    #[cold]
    fn open(&self) -> Option<Letter> {
        // Cleared before the look: a letter that comes after the look sets it again. A swap, not a store: it reads whichever
        // flag it overwrites, so the letter of that flag is seen below. A store could lose it on a machine of weak order
        // (`switch/tests/hand_overs.rs`). Acquire: pairs with the Release in `post`.
        self.flag.swap(false, Ordering::Acquire);
        let letter = self.letters.try_recv().ok();
        if !self.letters.is_empty() {
            self.flag.store(true, Ordering::Release);
        }
        letter
    }

    /// True if a letter waits; the last look before a sleep.
    pub fn waiting(&self) -> bool {
        !self.letters.is_empty()
    }
}
