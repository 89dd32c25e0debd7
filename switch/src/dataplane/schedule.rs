//! Which of a worker's receive queues are polled in which pass. All memory is taken at start: nothing grows.

use super::mailbox::QueueId;
use super::worker::RxSlot;

/// Receive queues a worker can hold.
pub(super) const QUEUES_MAX: usize = 8192;
/// Empty polls in a row after which a queue is polled only each [`WHEEL`]th pass.
const PATIENCE: u32 = 256;
/// Passes from one poll of an idle queue to the next: 256 idle ports cost −26 % at 16, −21 % at 64, −70 % if polled always.
const WHEEL: usize = 64;

/// No queue; ends a list.
pub(super) const NONE: u16 = u16::MAX;

/// The receive queues of a worker: busy ones are polled in every pass, idle ones now and then.
pub(super) struct Schedule {
    slots: Box<[Option<Entry>]>,
    /// Slots used so far, the free ones included.
    used: usize,
    free: List,
    busy: List,
    /// Idle queues, in lists: those of `wheel[w]` are polled in passes with `pass % WHEEL == w`.
    wheel: [u16; WHEEL],
}

struct Entry {
    slot: Box<RxSlot>,
    empty_polls: u32,
    /// The next entry in the same spoke of the wheel.
    next: u16,
}

impl Schedule {
    pub(super) fn new() -> Schedule {
        Schedule {
            slots: (0..QUEUES_MAX).map(|_| None).collect(),
            used: 0,
            free: List::new(),
            busy: List::new(),
            wheel: [NONE; WHEEL],
        }
    }

    /// The number of the busy queue at place `at`.
    #[inline]
    pub(super) fn busy_at(&self, at: usize) -> Option<u16> {
        self.busy.at(at)
    }

    /// The queue of that number.
    #[inline]
    pub(super) fn slot(&mut self, index: u16) -> Option<&mut RxSlot> {
        self.entry(index).map(|entry| &mut *entry.slot)
    }

    /// All queues.
    pub(super) fn slots(&mut self) -> impl Iterator<Item = &mut RxSlot> {
        self.slots
            .iter_mut()
            .flatten()
            .map(|entry| &mut *entry.slot)
    }

    /// All queues, for control to drop.
    pub(super) fn into_slots(self) -> Vec<RxSlot> {
        let left = self.slots.into_iter().flatten();
        left.map(|entry| *entry.slot).collect()
    }

    #[inline]
    fn entry(&mut self, index: u16) -> Option<&mut Entry> {
        self.slots.get_mut(usize::from(index))?.as_mut()
    }

    /// Takes a queue in, as a busy one.
    pub(super) fn insert(&mut self, slot: Box<RxSlot>) {
        let entry = Some(Entry {
            slot,
            empty_polls: 0,
            next: NONE,
        });
        let index = self.free.pop().unwrap_or_else(|| {
            self.used += 1;
            (self.used - 1) as u16
        });
        let Some(place) = self.slots.get_mut(usize::from(index)) else {
            // Control attaches no more: see `QUEUES_MAX`.
            debug_assert!(false, "more than {QUEUES_MAX} queues");
            return;
        };
        *place = entry;
        self.busy.push(index);
    }

    /// Takes a queue out.
    pub(super) fn remove(&mut self, id: QueueId) -> Option<Box<RxSlot>> {
        let index = self
            .slots
            .iter()
            .position(|slot| slot.as_ref().is_some_and(|e| e.slot.source.id == id))?;
        let number = index as u16;
        if let Some(at) = self.busy.position(number) {
            self.busy.swap_remove(at);
        } else {
            for spoke in 0..WHEEL {
                self.unlink(spoke, number);
            }
        }
        self.free.push(number);
        self.slots.get_mut(index)?.take().map(|entry| entry.slot)
    }

    fn unlink(&mut self, spoke: usize, number: u16) {
        let mut index = self.unhook(spoke);
        while index != NONE {
            let next = self.next(index);
            if index != number {
                self.hook(index, spoke, false);
            }
            index = next;
        }
    }

    /// Notes the outcome of polling the busy queue at place `at`; true if it became an idle one and another has its place.
    #[inline]
    pub(super) fn rest(&mut self, at: usize, busy: bool) -> bool {
        let Some(index) = self.busy.at(at) else {
            return false;
        };
        let Some(entry) = self.entry(index) else {
            return false;
        };
        if busy {
            entry.empty_polls = 0;
            return false;
        }
        entry.empty_polls += 1;
        if entry.empty_polls < PATIENCE {
            return false;
        }
        self.busy.swap_remove(at);
        self.hook(index, usize::from(index), false);
        true
    }

    /// Takes the list of the idle queues that are due in this pass: the number of the first one.
    #[inline]
    pub(super) fn unhook(&mut self, pass: usize) -> u16 {
        std::mem::replace(&mut self.wheel[pass % WHEEL], NONE)
    }

    /// The next one in such a list.
    #[inline]
    pub(super) fn next(&self, index: u16) -> u16 {
        let entry = self.slots.get(usize::from(index));
        entry.and_then(Option::as_ref).map_or(NONE, |e| e.next)
    }

    /// Puts a queue of such a list back for another round of passes, or among the busy ones if it had frames.
    #[inline]
    pub(super) fn hook(&mut self, index: u16, pass: usize, busy: bool) {
        let Some(Some(entry)) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        if busy {
            entry.empty_polls = 0;
            self.busy.push(index);
        } else {
            entry.next = std::mem::replace(&mut self.wheel[pass % WHEEL], index);
        }
    }

    /// After a sleep every queue may have frames.
    pub(super) fn wake_all(&mut self) {
        for spoke in 0..WHEEL {
            let mut index = self.unhook(spoke);
            while index != NONE {
                let next = self.next(index);
                self.hook(index, spoke, true);
                index = next;
            }
        }
    }
}

/// Numbers of queues.
struct List {
    items: Box<[u16; QUEUES_MAX]>,
    len: usize,
}

impl List {
    fn new() -> List {
        List {
            items: Box::new([NONE; QUEUES_MAX]),
            len: 0,
        }
    }

    /// Each number is in one list at most once, so there is room for it.
    fn push(&mut self, number: u16) {
        if let Some(place) = self.items.get_mut(self.len) {
            *place = number;
            self.len += 1;
        }
    }

    fn pop(&mut self) -> Option<u16> {
        self.len = self.len.checked_sub(1)?;
        self.items.get(self.len).copied()
    }

    #[inline]
    fn at(&self, at: usize) -> Option<u16> {
        (at < self.len).then(|| self.items[at % QUEUES_MAX])
    }

    fn position(&self, number: u16) -> Option<usize> {
        (0..self.len).find(|at| self.at(*at) == Some(number))
    }

    fn swap_remove(&mut self, at: usize) {
        if let Some(last) = self.pop()
            && at < self.len
        {
            self.items[at % QUEUES_MAX] = last;
        }
    }
}
