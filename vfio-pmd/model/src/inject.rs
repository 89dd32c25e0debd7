//! Faults on purpose.

use std::time::Duration;

/// What goes wrong next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inject {
    /// The PF handles so many requests, but neither its acknowledgement nor its answer arrives.
    LoseAnswers(u32),
    /// The PF refuses so many requests, whatever they are (a refused RESET still resets).
    Refuse(u32),
    /// The PF answers that much later.
    Delay(Duration),
    /// So many attempts to take the mailbox fail.
    BusyMailbox(u32),
    /// The PF takes the leave to send away and says so.
    LoseCts,
    /// GET_QUEUES answers this.
    Queues(u32),
    /// Descriptors are used but not marked as done, until this is set to false.
    NoDone(bool),
    /// So many received frames claim this length in their descriptors.
    ReceiveLength(u32, u16),
    /// So many received frames lack the mark of their last descriptor.
    NoEnd(u32),
    /// The device is gone: every register reads all ones; false brings it back.
    Removed(bool),
    /// The counters stand just below the point where their registers wrap.
    CountersNearWrap,
}

/// What was injected into one VF and has not happened yet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Injected {
    pub(crate) lose_answers: u32,
    pub(crate) refuse: u32,
    pub(crate) delay: Duration,
    pub(crate) queues: Option<u32>,
    pub(crate) no_done: bool,
    pub(crate) length: (u32, u16),
    pub(crate) no_end: u32,
    pub(crate) removed: bool,
}

/// Takes one from a budget; true if there was one.
pub(crate) fn spend(budget: &mut u32) -> bool {
    let some = *budget > 0;
    *budget = budget.saturating_sub(1);
    some
}
