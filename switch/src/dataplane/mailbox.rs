//! What control may ask of a worker between two passes, and how it gets its things back.
//!
//! Queues and pictures of the topology are *moved*: whoever holds them owns them. Control waits for the answer to each
//! letter, so that when `detach` has returned no worker touches the queue any more, and when `show` has returned none uses
//! the old picture: only then does control unmap, close or free.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Thread;
use std::time::Duration;

use crossbeam::queue::ArrayQueue;

use super::port_set::{PortId, Topology};
use super::schedule::QUEUES_MAX;
use super::worker::{Idle, RxSlot};

/// Letters that wait; control waits for a place.
const LETTERS: usize = 64;
/// How long control waits before it looks again, in case the worker ended without an answer.
const LOOK: Duration = Duration::from_millis(10);

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
    Detach(QueueId, Answer<Option<Box<RxSlot>>>),
    Show(Arc<Topology>, Answer<Arc<Topology>>),
    Idle(Idle),
    Stop,
}

/// The place for one answer, and who waits for it. Given without a lock and without memory of its own: a worker gives it.
pub(super) struct Answer<T> {
    place: Arc<ArrayQueue<T>>,
    waits: Thread,
}

impl<T> Answer<T> {
    /// Gives the answer.
    #[cold]
    pub(super) fn give(self, answer: T) {
        let _ = self.place.push(answer); // there is one letter, one place, one answer
        self.waits.unpark();
    }
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
    shared: Arc<Shared>,
    wake: Arc<dyn Wake>,
}

/// The worker's end: looks whether there is a letter.
pub struct Slot {
    shared: Arc<Shared>,
}

struct Shared {
    letters: ArrayQueue<Letter>,
    /// There may be a letter.
    flag: AtomicBool,
    /// The worker's end is gone.
    stopped: AtomicBool,
    /// Queues that the worker has or will have.
    queues: AtomicUsize,
}

/// A mailbox and its slot.
pub fn mailbox(wake: Arc<dyn Wake>) -> (Mailbox, Slot) {
    let shared = Arc::new(Shared {
        letters: ArrayQueue::new(LETTERS),
        flag: AtomicBool::new(false),
        stopped: AtomicBool::new(false),
        queues: AtomicUsize::new(0),
    });
    (
        Mailbox {
            shared: shared.clone(),
            wake,
        },
        Slot { shared },
    )
}

/// A letter that the worker will not answer.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The worker is gone (it was stopped, or its thread ended).
    #[error("the worker has stopped")]
    Stopped,
    /// It has as many queues as it can have.
    #[error("the worker has {QUEUES_MAX} queues, as many as it can have")]
    Full,
}

impl Mailbox {
    fn post(&self, letter: Letter) -> Result<(), Refused> {
        let shared = &*self.shared;
        let mut letter = letter;
        loop {
            if shared.stopped.load(Ordering::Acquire) {
                return Err(Refused::Stopped);
            }
            match shared.letters.push(letter) {
                Ok(()) => break,
                Err(back) => letter = back,
            }
            std::thread::park_timeout(LOOK); // full: the worker takes all of them between two passes
        }
        // Release: pairs with the Acquire in `Slot::next`; a worker that sees the flag finds the letter. A swap like that in
        // `open`: of two swaps one comes first, and the model shows that neither order loses a letter.
        shared.flag.swap(true, Ordering::Release);
        self.wake.wake();
        Ok(())
    }

    /// Posts a letter that `write` addresses to this thread, and waits for the answer.
    fn ask<T>(&self, write: impl FnOnce(Answer<T>) -> Letter) -> Result<T, Refused> {
        let place = Arc::new(ArrayQueue::new(1));
        self.post(write(Answer {
            place: place.clone(),
            waits: std::thread::current(),
        }))?;
        loop {
            // Acquire: pairs with the Release in `Slot::drop`: after it comes no answer that is not here.
            let stopped = self.shared.stopped.load(Ordering::Acquire);
            if let Some(answer) = place.pop() {
                return Ok(answer);
            }
            if stopped {
                return Err(Refused::Stopped);
            }
            std::thread::park_timeout(LOOK);
        }
    }

    /// Gives a queue to the worker.
    pub fn attach(&self, slot: Box<RxSlot>) -> Result<(), Refused> {
        // Relaxed: a count that stands for itself.
        if self.shared.queues.fetch_add(1, Ordering::Relaxed) >= QUEUES_MAX {
            self.shared.queues.fetch_sub(1, Ordering::Relaxed);
            return Err(Refused::Full);
        }
        self.post(Letter::Attach(slot))
    }

    /// Takes a queue back; `None` if the worker does not have it. The worker does not touch it any more.
    pub fn detach(&self, queue: QueueId) -> Result<Option<Box<RxSlot>>, Refused> {
        let slot = self.ask(|answer| Letter::Detach(queue, answer))?;
        if slot.is_some() {
            self.shared.queues.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(slot)
    }

    /// Shows the worker a new picture of the ports and takes the old one back: the worker does not use it any more.
    pub fn show(&self, topology: Arc<Topology>) -> Result<Arc<Topology>, Refused> {
        self.ask(|answer| Letter::Show(topology, answer))
    }

    /// Changes when the worker may sleep.
    pub fn idle(&self, idle: Idle) -> Result<(), Refused> {
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
        if !self.shared.flag.load(Ordering::Acquire) {
            return None;
        }
        self.open()
    }

    #[cold]
    fn open(&self) -> Option<Letter> {
        let Shared { letters, flag, .. } = &*self.shared;
        // Cleared before the look: a letter that comes after the look sets it again. A swap, not a store: it reads whichever
        // flag it overwrites, so the letter of that flag is seen below. A store could lose it on a machine of weak order
        // (`switch/tests/hand_overs.rs`). Acquire: pairs with the Release in `post`.
        flag.swap(false, Ordering::Acquire);
        let letter = letters.pop();
        if !letters.is_empty() {
            flag.store(true, Ordering::Release);
        }
        letter
    }

    /// True if a letter waits; the last look before a sleep.
    pub fn waiting(&self) -> bool {
        !self.shared.letters.is_empty()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `ask`: answers given before are seen.
        self.shared.stopped.store(true, Ordering::Release);
    }
}
