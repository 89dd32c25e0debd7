//! userfaultfd in SIGBUS mode: a hole in a guest's memory raises a signal instead of being allocated on our account.
//!
//! Reading a hole of a shared file allocates the page and charges it to the reader. A guest whose file is one large
//! hole could so use up our memory by announcing buffers in it.
#![allow(unsafe_code)] // ioctls of userfaultfd

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use super::guest_spec::PAGE;

/// Pages up to this size can be filled, in bytes.
pub(super) const HUGE: usize = 2 << 20;

/// A userfaultfd in SIGBUS mode: in the ranges it arms, touching a hole raises SIGBUS and allocates nothing.
/// Works without privilege. Closing it disarms.
#[derive(Debug)]
pub(super) struct Uffd(OwnedFd);

// include/uapi/linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_API: u64 = iowr(0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = iowr(0x00, size_of::<UffdioRegister>());
const UFFDIO_COPY: u64 = iowr(0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: u64 = iowr(0x04, size_of::<UffdioZeropage>());

/// `_IOWR(UFFDIO, number, size)`.
const fn iowr(number: u64, size: usize) -> u64 {
    (3 << 30) | ((size as u64) << 16) | (0xaa << 8) | number
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}

const _: () = assert!(UFFDIO_API == 0xc018_aa3f && UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03 && UFFDIO_ZEROPAGE == 0xc020_aa04);

impl Uffd {
    /// `None` where the kernel has none or a sandbox forbids it (Docker's default seccomp profile does).
    pub(super) fn new() -> Option<Uffd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: no pointers; the result is a new fd or -1.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: a new fd of ours.
        let uffd = Uffd(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = UffdioApi {
            api: UFFD_API,
            features: UFFD_FEATURE_SIGBUS
                | UFFD_FEATURE_MISSING_SHMEM
                | UFFD_FEATURE_MISSING_HUGETLBFS,
            ioctls: 0,
        };
        uffd.ioctl(UFFDIO_API, &mut api).ok()?;
        Some(uffd)
    }

    /// Arms a whole mapping; `false` if the kernel refuses.
    pub(super) fn arm(&self, start: usize, len: usize) -> bool {
        let mut register = UffdioRegister {
            start: start as u64,
            len: len as u64,
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register).is_ok()
    }

    /// Fills the hole at `start`, a page of `len` bytes, if need be by a copy of `zeros`, which has [`HUGE`] of them.
    /// Async-signal-safe.
    pub(super) fn fill(
        &self,
        start: usize,
        len: usize,
        zeros: *const u8,
    ) -> Result<(), libc::c_int> {
        let (start, len) = (start as u64, len as u64);
        if len == PAGE {
            return self.ioctl(
                UFFDIO_ZEROPAGE,
                &mut UffdioZeropage {
                    start,
                    len,
                    mode: 0,
                    zeropage: 0,
                },
            );
        }
        // hugetlb knows no ZEROPAGE.
        if zeros.is_null() || len > HUGE as u64 {
            return Err(libc::EINVAL);
        }
        let src = zeros as u64;
        self.ioctl(
            UFFDIO_COPY,
            &mut UffdioCopy {
                dst: start,
                src,
                len,
                mode: 0,
                copy: 0,
            },
        )
    }

    fn ioctl<T>(&self, request: u64, argument: &mut T) -> Result<(), libc::c_int> {
        // SAFETY: each caller pairs the request with the struct its number was made from; the kernel writes only
        // into that struct and, for COPY and ZEROPAGE, maps pages into ranges this fd has armed.
        let done = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                request as libc::Ioctl,
                ptr::from_mut(argument),
            )
        };
        if done == 0 {
            return Ok(());
        }
        // SAFETY: thread-local, set by the call above.
        Err(unsafe { *libc::__errno_location() })
    }
}

/// Whether this process can arm memory against holes; `doctor` says what that means.
#[must_use]
pub fn can_arm() -> bool {
    Uffd::new().is_some()
}
