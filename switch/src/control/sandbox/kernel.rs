//! What the sandbox needs of kernel and C library and no crate has.
#![allow(unsafe_code)] // seccomp(2) with SPEC_ALLOW, the version of Landlock, mallopt(3), signal masks

use std::io;

use seccompiler::BpfProgram;

/// `linux/landlock.h`
const LANDLOCK_CREATE_RULESET_VERSION: libc::c_uint = 1;

/// The kernel's version of Landlock; none: it has none, or it is switched off.
pub fn landlock_abi() -> Option<u32> {
    let (attributes, flags) = (std::ptr::null::<u8>(), LANDLOCK_CREATE_RULESET_VERSION);
    // SAFETY: with this flag the kernel reads no attributes; null and 0 are what it asks for.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, attributes, 0usize, flags) };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// One heap for all threads. glibc gives threads heaps of their own and, when the end of such a heap is freed, reads
/// /proc/sys/vm/overcommit_memory: an `openat` that a worker's filter refuses.
pub(super) fn one_heap() {
    // SAFETY: mallopt takes two numbers; there is one thread yet.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Leaves the signals that tell of nothing this thread did to other threads: no handler of theirs runs here.
pub(super) fn keep_signals_away() {
    // SAFETY: a sigset is plain data, filled before it is used; numbers are of signals that exist. What the set says of this
    // thread's mask concerns no memory.
    unsafe {
        let mut away: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut away);
        for own in [
            libc::SIGBUS,
            libc::SIGSEGV,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGSYS,
            libc::SIGABRT,
        ] {
            libc::sigdelset(&raw mut away, own);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const away, std::ptr::null_mut());
    }
}

/// `linux/filter.h`
#[repr(C)]
struct Program {
    len: u16,
    filter: *const seccompiler::sock_filter,
}

/// Puts a filter on this thread. SPEC_ALLOW: kernels before 5.16 otherwise switch speculative store bypass off for filtered
/// threads, which costs a worker far more than the filter; a worker runs nobody's code but ours.
pub(super) fn install(filter: &BpfProgram) -> io::Result<()> {
    let program = Program {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr(),
    };
    // SAFETY: `program` and the instructions it points to are valid for the call; the kernel copies them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            &raw const program,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
