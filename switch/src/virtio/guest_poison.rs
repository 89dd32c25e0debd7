//! What becomes of an attachment whose memory cannot be trusted.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, compiler_fence};

/// Says that an attachment's memory cannot be trusted any more. Set once, by the SIGBUS handler or by whoever finds a
/// lie about memory; never cleared. One per attachment, shared by all its queues.
///
/// Any thread may set and read it.
#[derive(Debug, Default)]
pub struct Poison {
    set: AtomicBool,
    cause: AtomicU8,
    pub(super) patched: AtomicU64,
    pub(super) filled: AtomicU64,
}

/// Why an attachment was poisoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoisonCause {
    /// Somebody on our side found a lie and called [`Poison::set`].
    Lie,
    /// The guest took memory away: its file was truncated or a page of it removed.
    Withdrawn,
    /// The guest has more untouched pages than its [`FillBudget`] allows us to fill.
    OverBudget,
    /// The machine reported a memory error in one of the guest's pages.
    Hardware,
}

impl PoisonCause {
    fn from_code(code: u8) -> PoisonCause {
        match code {
            2 => PoisonCause::Withdrawn,
            3 => PoisonCause::OverBudget,
            4 => PoisonCause::Hardware,
            _ => PoisonCause::Lie,
        }
    }

    fn code(self) -> u8 {
        match self {
            PoisonCause::Lie => 1,
            PoisonCause::Withdrawn => 2,
            PoisonCause::OverBudget => 3,
            PoisonCause::Hardware => 4,
        }
    }
}

impl fmt::Display for PoisonCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PoisonCause::Lie => "it lied about its memory",
            PoisonCause::Withdrawn => {
                "it took memory away that it had shared (file truncated or page removed)"
            }
            PoisonCause::OverBudget => {
                "its buffers lie in pages it never touched, more than we fill on our account; \
                 let it lock or preallocate its memory"
            }
            PoisonCause::Hardware => "the machine reported a memory error in one of its pages",
        })
    }
}

impl Poison {
    /// Not set.
    #[must_use]
    pub fn new() -> Arc<Poison> {
        Arc::new(Poison::default())
    }

    /// Whether the attachment is lost. Ask after every copy from or to its memory, before anything is published.
    #[inline]
    #[must_use]
    pub fn is_set(&self) -> bool {
        // The handler interrupts this very thread in the middle of a copy: no reordering by the processor is visible,
        // but the compiler must not move the copy behind this load.
        compiler_fence(Ordering::SeqCst);
        // Acquire: pairs with the Release in `set_for`, so that the cause is there with the flag.
        self.set.load(Ordering::Acquire)
    }

    /// The bare flag, for a data plane that knows nothing of guests. Read it as [`Poison::is_set`] does.
    #[inline]
    #[must_use]
    pub fn flag(&self) -> &AtomicBool {
        &self.set
    }

    /// Gives the attachment up, because its peer lied.
    pub fn set(&self) {
        self.set_for(PoisonCause::Lie);
    }

    /// Gives the attachment up. The first cause stays.
    pub fn set_for(&self, cause: PoisonCause) {
        // Relaxed: ordered by the Release store below.
        let _ = self
            .cause
            .compare_exchange(0, cause.code(), Ordering::Relaxed, Ordering::Relaxed);
        // Release: pairs with the Acquire in `is_set`.
        self.set.store(true, Ordering::Release);
    }

    /// Why it is set, if it is.
    #[must_use]
    pub fn cause(&self) -> Option<PoisonCause> {
        self.is_set()
            .then(|| PoisonCause::from_code(self.cause.load(Ordering::Relaxed)))
    }

    /// Granules replaced by zeros of our own.
    #[must_use]
    pub fn patched(&self) -> u64 {
        self.patched.load(Ordering::Relaxed)
    }

    /// Honest holes filled.
    #[must_use]
    pub fn filled(&self) -> u64 {
        self.filled.load(Ordering::Relaxed)
    }
}
