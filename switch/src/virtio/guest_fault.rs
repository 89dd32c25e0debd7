//! SIGBUS: what happens when a page of a guest's memory is not there.
//!
//! A guest can truncate its memory file, or punch holes into it, while we read it. The kernel then raises SIGBUS on
//! the worker that touched the page. The handler here finds the mapping the address belongs to and
//!
//! 1. **fills** an honest hole, that is a page nobody has touched yet, while the port's [`FillBudget`] lasts. Only armed
//!    mappings ([`Uffd`]) raise a signal for a hole; unarmed ones let the kernel allocate, at our expense, without end;
//! 2. else **patches** the granule with zeros of our own, sets the attachment's [`Poison`] and returns: the worker goes
//!    on with zeros it will not publish, sees the poison and drops that port alone;
//! 3. for any other address restores the default action and returns: the access is repeated and the process dies with
//!    an honest core.
//!
//! **Threads.** The handler runs on whichever thread faulted and uses only atomics and the system calls `mmap`, `ioctl`
//! and (for case 3) `rt_sigaction` and `tgkill`: no lock, no allocation. It finds mappings in a fixed table of slots,
//! each a seqlock written by control threads. Why a slot cannot vanish under the handler that matched it: a slot
//! matches only addresses of its own mapping; a thread that faults there is using a [`GuestMem`] that holds the mapping;
//! and the mapping takes its slot out of the table only when the last `GuestMem` that holds it is dropped, which is
//! after every worker has left it. A slot that changes during the scan therefore belongs to somebody else: the sequence
//! number keeps its half-written fields from matching, and it is skipped.
//!
//! **Stack.** The handler needs less than 1 KiB and touches only our own memory. `SA_ONSTACK` puts it on the alternate
//! stack that Rust's `std` gives every thread it starts (and `main`); a thread without one runs it on its own stack,
//! which is as good, since a stack overflow raises SIGSEGV and never comes here. Nobody needs to prepare a thread.
//!
//! [`GuestMem`]: super::guest_mem::GuestMem
#![allow(unsafe_code)] // a signal handler: raw system calls, and pointers found by address

use std::cell::UnsafeCell;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, Once, PoisonError};

use super::guest_budget::FillBudget;
use super::guest_poison::{Poison, PoisonCause};
use super::guest_uffd::{HUGE, Uffd};

/// What the handler needs to know of one mapping.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) start: usize,
    pub(super) len: usize,
    /// Page size of the mapping: the unit that can be filled or patched.
    pub(super) granule: usize,
    /// The file, open as long as the mapping lives, and where in it the mapping starts.
    pub(super) file: (RawFd, u64),
    pub(super) poison: Arc<Poison>,
    pub(super) budget: Arc<FillBudget>,
    /// `None`: the kernel offers no userfaultfd, holes fill themselves.
    pub(super) uffd: Option<Arc<Uffd>>,
}

impl Watched {
    /// Whether the granule at `addr` lies within the file as it is now. Async-signal-safe.
    fn in_file(&self, addr: usize) -> bool {
        // SAFETY: stat is plain data for which all-zero is valid.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the fd is open while the mapping lives, and passed the gate: shmem and hugetlbfs answer at once.
        let done = unsafe { libc::fstat(self.file.0, &mut stat) };
        let at = self.file.1 + (addr - self.start) as u64;
        done == 0 && u64::try_from(stat.st_size).is_ok_and(|size| at < size)
    }
}

/// Keeps a mapping in the handler's table; dropping it takes the mapping out, which must happen before it is unmapped.
#[derive(Debug)]
pub(super) struct Watch {
    slot: usize,
    // The table holds a pointer to it. UnsafeCell: other threads read through that pointer while we own the box.
    watched: NonNull<UnsafeCell<Watched>>,
}

// SAFETY: `watched` is a box of `Send + Sync` data, never written after `new`, freed by `drop` alone.
unsafe impl Send for Watch {}
// SAFETY: as above; `&Watch` gives access to nothing.
unsafe impl Sync for Watch {}

/// Mappings the process can watch. The kernel's default limit of 65,530 areas per process allows for about as many
/// mappings with their guards. 40 bytes each, in pages that stay untouched until used.
const SLOTS: usize = 32 * 1024;

/// One mapping of the table, a seqlock: odd `seq` while it is being written.
struct Slot {
    seq: AtomicU32,
    start: AtomicUsize,
    len: AtomicUsize,
    watched: AtomicPtr<Watched>,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        seq: AtomicU32::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        watched: AtomicPtr::new(ptr::null_mut()),
    }
}; SLOTS];

/// Slots from here on were never used. Grows only.
static IN_USE: AtomicUsize = AtomicUsize::new(0);
/// Slots below `IN_USE` that are free again. For control threads; the handler never takes it.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
/// 2 MiB of zeros, the source for holes in hugetlb memory; set by `install`.
static ZEROS: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

impl Slot {
    fn write(&self, start: usize, len: usize, watched: *mut Watched) {
        let seq = self.seq.load(Ordering::Relaxed); // one writer: the owner of the slot
        self.seq.store(seq.wrapping_add(1), Ordering::Relaxed);
        // Release: the odd number is visible before any new field; pairs with the Acquire fence in `read`.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.watched.store(watched, Ordering::Relaxed);
        // Release: the fields are visible before the even number; pairs with the Acquire load in `read`.
        self.seq.store(seq.wrapping_add(2), Ordering::Release);
    }

    /// The mapping of this slot, if `addr` lies in it.
    fn read(&self, addr: usize) -> Option<*const Watched> {
        let before = self.seq.load(Ordering::Acquire); // pairs with the last store of `write`
        let start = self.start.load(Ordering::Relaxed);
        if addr.wrapping_sub(start) >= self.len.load(Ordering::Relaxed) {
            return None;
        }
        let watched = self.watched.load(Ordering::Relaxed);
        // Acquire: the fields were read before the number is read again; pairs with the Release fence in `write`.
        fence(Ordering::Acquire);
        let stable = before.is_multiple_of(2) && self.seq.load(Ordering::Relaxed) == before;
        (stable && !watched.is_null()).then_some(watched.cast_const())
    }
}

impl Watch {
    /// Puts a mapping into the table, or gives it back if the table is full.
    pub(super) fn new(watched: Watched) -> Option<Watch> {
        install();
        let (start, len) = (watched.start, watched.len);
        let slot = {
            let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
            match free.pop() {
                Some(slot) => slot,
                None => {
                    let next = IN_USE.load(Ordering::Relaxed); // written under the lock only
                    if next == SLOTS {
                        return None;
                    }
                    // Release: pairs with the Acquire in `find`. Whoever touches the mapping got it after this.
                    IN_USE.store(next + 1, Ordering::Release);
                    next
                }
            }
        };
        let watched = NonNull::from(Box::leak(Box::new(UnsafeCell::new(watched))));
        TABLE[slot].write(start, len, watched.as_ptr().cast());
        Some(Watch { slot, watched })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        TABLE[self.slot].write(0, 0, ptr::null_mut());
        FREE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self.slot);
        // SAFETY: `new` leaked this box; the table no longer names it; and no handler still uses it: one that matched
        // this slot runs on a thread that uses the mapping, which our owner outlives (see the head of this file).
        drop(unsafe { Box::from_raw(self.watched.as_ptr()) });
    }
}

/// Installs the SIGBUS handler, once per process. Called at start, and by every mapping in case it was not.
///
/// No thread that touches a guest's memory may block SIGBUS: the kernel kills for a fault whose signal is blocked.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a fresh anonymous mapping, owned by the process for ever.
        let zeros = unsafe {
            libc::mmap(
                ptr::null_mut(),
                HUGE,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if zeros != libc::MAP_FAILED {
            // Release: pairs with the Acquire in `fill`.
            ZEROS.store(zeros.cast(), Ordering::Release);
        }
        // SAFETY: sigaction is plain data for which all-zero is valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
        // NODEFER: a blocked SIGBUS raised by a fault kills at once, without the handler.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: `on_sigbus` has the signature SA_SIGINFO asks for and is async-signal-safe (head of this file).
        let done = unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) };
        assert_eq!(
            done, 0,
            "sigaction(SIGBUS) is refused only for a bad signal number"
        );
    });
}

/// The handler. See the head of this file.
extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let fault = matches!(
        code,
        libc::BUS_ADRERR | libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO
    );
    // SAFETY: errno is thread-local; the interrupted code must find it as it was.
    let errno = unsafe { *libc::__errno_location() };
    let repaired = fault
        && find(addr).is_some_and(|watched| {
            // SAFETY: `find` matched a live slot and this thread uses its mapping: it stays (head of this file).
            repair(unsafe { &*watched }, addr, code)
        });
    if !repaired {
        die(signal, code);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

fn find(addr: usize) -> Option<*const Watched> {
    let in_use = IN_USE.load(Ordering::Acquire); // pairs with the Release in `Watch::new`
    TABLE.iter().take(in_use).find_map(|slot| slot.read(addr))
}

/// Makes the granule at `addr` accessible; `false` if that failed.
fn repair(watched: &Watched, addr: usize, code: libc::c_int) -> bool {
    let granule = watched.start + (addr - watched.start) / watched.granule * watched.granule;
    let poison = &*watched.poison;
    let cause = if code != libc::BUS_ADRERR {
        PoisonCause::Hardware
    } else if poison.is_set() {
        PoisonCause::Lie // the first cause stays
    } else {
        match fill(watched, granule) {
            Fill::Done => {
                poison.filled.fetch_add(1, Ordering::Relaxed);
                return true;
            }
            Fill::OverBudget => PoisonCause::OverBudget,
            Fill::Refused => PoisonCause::Withdrawn,
        }
    };
    // Before the zeros can be read.
    poison.set_for(cause);
    poison.patched.fetch_add(1, Ordering::Relaxed);
    // A patch splits an area, and the process may have as many as the kernel allows: replacing the whole mapping never
    // needs more areas, so that is the second try. It costs up to 200 us for live page tables.
    patch(granule, watched.granule) || patch(watched.start, watched.len)
}

/// Replaces `[start, start + len)`, which lies in a watched mapping, by zeros of our own.
fn patch(start: usize, len: usize) -> bool {
    // SAFETY: the range lies in a mapping that `guest_map` made and that stays while this thread uses it. Replacing
    // its pages changes bytes that the guest could change at any time; nobody holds a reference into it.
    let at = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    at != libc::MAP_FAILED
}

enum Fill {
    Done,
    OverBudget,
    /// No hole: the page lies beyond the end of the file, or there is no memory for it.
    Refused,
}

/// Gives the guest the page it never touched. 4 KiB: some 10 us; 2 MiB must be copied: some 100 us, which buys virtual
/// machines whose hugepages were not preallocated. Larger pages are left alone: a copy would take a tenth of a second.
fn fill(watched: &Watched, granule: usize) -> Fill {
    let Some(uffd) = watched.uffd.as_ref().filter(|_| watched.granule <= HUGE) else {
        return Fill::Refused;
    };
    // The kernel would say so too, for a hugepage only after it has copied it.
    if !watched.in_file(granule) {
        return Fill::Refused;
    }
    let bytes = watched.granule as u64;
    if !watched.budget.take(bytes) {
        return Fill::OverBudget;
    }
    let zeros = ZEROS.load(Ordering::Acquire); // pairs with the Release in `install`
    // The address space may be changing: a few tries.
    for _ in 0..8 {
        match uffd.fill(granule, watched.granule, zeros) {
            // EEXIST: another thread, or the guest, was faster. Not given back: so even that is bounded.
            Ok(()) | Err(libc::EEXIST) => return Fill::Done,
            Err(libc::EAGAIN) => {}
            Err(_) => break,
        }
    }
    watched.budget.give_back(bytes);
    Fill::Refused
}

/// Lets the process die of a SIGBUS that is none of ours.
fn die(signal: libc::c_int, code: libc::c_int) {
    // SAFETY: restoring the default action is async-signal-safe; all-zero is SIG_DFL without flags.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, &default, ptr::null_mut());
    }
    if code != libc::BUS_ADRERR && code != libc::BUS_ADRALN && code != libc::BUS_MCEERR_AR {
        // Sent by a process, or about a page nobody touches now: it would not come again by itself.
        // SAFETY: raise is async-signal-safe.
        unsafe { libc::raise(signal) };
    }
}
