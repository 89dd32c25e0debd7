//! Calls a guest, that is signals its call eventfd, from a worker and without ever blocking.
//!
//! The eventfd belongs to the guest too. `write(2)` on it blocks for as long as the guest likes once its counter is full,
//! and `O_NONBLOCK` is no help: the flag sits in the file description, where the guest can clear it. So nothing is written:
//! an asynchronous request that is complete at once (no bytes to `/dev/null`) names the eventfd as the one to be
//! signalled (`IOCB_FLAG_RESFD`), and the kernel's own `eventfd_signal` saturates instead of blocking.
//!
//! ns per call, one thread, nobody waiting at the other end (Linux 6.18, in a VM; `cargo bench --bench call`):
//!
//! | way | ns | |
//! |---|---|---|
//! | `write(2)` | 210–300 | blocks |
//! | io_uring, NOP with a registered eventfd | 550–620 | a ring per eventfd: a descriptor and two mappings each; forbidden by Docker's default seccomp profile |
//! | AIO, nothing to `/dev/null` | 760 | one context per process, no further descriptors; allowed by that profile |
//!
//! The 0.2 µs are not worth the second mechanism: a polling guest asks for no calls at all, and one that sleeps asks for some ten thousand a second at most.
#![allow(unsafe_code)] // three system calls that no crate wraps, and the completion ring they share with us

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{Mode, OFlags};

/// Completions the context has room for at least. They are thrown away together when it is full.
const EVENTS: u32 = 64;
/// `linux/aio_abi.h`.
const IOCB_CMD_PREAD: u16 = 0;
const IOCB_CMD_PWRITE: u16 = 1;
const IOCB_FLAG_RESFD: u32 = 1;
/// What the kernel writes into the head of a completion ring whose layout is the one below.
const RING_MAGIC: u32 = 0xa10a_10a1;
/// Tries until a call is given up. The second one succeeds: only requests that run at this moment take room then, and
/// there are fewer workers than [`EVENTS`].
const TRIES: usize = 4;

/// A guest's call eventfd.
///
/// Threads: any thread may signal, several at once.
#[derive(Debug)]
pub struct Call {
    fd: OwnedFd,
    aio: &'static Aio,
}

impl Call {
    /// Takes a descriptor that was checked to be an eventfd. Refused: any other file (`InvalidInput`), or every file if this
    /// host has no kernel AIO.
    pub fn new(fd: OwnedFd) -> io::Result<Call> {
        let aio = Aio::of_process()?;
        if aio.is_eventfd(fd.as_fd()) {
            Ok(Call { fd, aio })
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is no eventfd",
            ))
        }
    }

    /// Adds one to the eventfd's counter, or leaves it if it is full. Costs one system call.
    #[inline]
    pub fn signal(&self) {
        self.aio.signal(self.fd.as_fd());
    }
}

impl AsFd for Call {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether a descriptor is an eventfd. Asks the kernel's own type check, which calls nothing of the file's: a file system
/// that never answers cannot hold us here.
pub fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    match Aio::of_process() {
        Ok(aio) => aio.is_eventfd(fd),
        Err(_) => is_named_eventfd(fd),
    }
}

/// The same where there is no AIO: the kernel's name for it, which asks no file system either. Nobody else can make one
/// that reads like this: a path begins with a slash.
fn is_named_eventfd(fd: BorrowedFd<'_>) -> bool {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::readlink(link, Vec::new())
        .is_ok_and(|name| name.as_bytes() == b"anon_inode:[eventfd]")
}

/// Gets the means to call guests ready, before a sandbox forbids to open what they need.
pub fn prepare() -> io::Result<()> {
    Aio::of_process().map(drop)
}

/// The head of the completion ring (`struct aio_ring`, fs/aio.c; libaio relies on it too).
#[repr(C)]
struct RingHead {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
}

/// The process's AIO context.
#[derive(Debug)]
struct Aio {
    /// The kernel's name for the context: the address of its completion ring.
    context: libc::c_ulong,
    null: OwnedFd,
}

impl Aio {
    fn of_process() -> io::Result<&'static Aio> {
        static AIO: OnceLock<Aio> = OnceLock::new();
        static ONE: Mutex<()> = Mutex::new(());
        if let Some(aio) = AIO.get() {
            return Ok(aio);
        }
        // Tried again each time: what is short now may be plenty after an operator has raised the limit.
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        match AIO.get() {
            Some(aio) => Ok(aio),
            None => Aio::new().map(|aio| AIO.get_or_init(|| aio)),
        }
    }

    fn new() -> io::Result<Aio> {
        // Write-only, which `is_eventfd` relies on.
        let null = rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: `context` is valid for the kernel to write to, and 0 as io_setup(2) demands.
        let done = unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        let aio = Aio { context, null };
        if aio.ring().magic != RING_MAGIC {
            // SAFETY: the context just made, which nobody uses.
            unsafe { libc::syscall(libc::SYS_io_destroy, context) };
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        Ok(aio)
    }

    fn ring(&self) -> &RingHead {
        // SAFETY: a context's name is the address at which the kernel mapped its completion ring, page aligned and for as
        // long as the context lives, which is never destroyed. `head` and `tail` change under us: they are atomics; the
        // rest stays.
        unsafe { &*std::ptr::with_exposed_provenance::<RingHead>(self.context as usize) }
    }

    fn request(&self, opcode: u16, signal: BorrowedFd<'_>) -> libc::iocb {
        // SAFETY: all fields are integers.
        let mut request: libc::iocb = unsafe { std::mem::zeroed() };
        request.aio_lio_opcode = opcode;
        request.aio_fildes = self.null.as_raw_fd() as u32;
        request.aio_flags = IOCB_FLAG_RESFD;
        request.aio_resfd = signal.as_raw_fd() as u32;
        request
    }

    fn submit(&self, request: &mut libc::iocb) -> io::Result<()> {
        let mut list: *mut libc::iocb = request;
        // SAFETY: a list of one request, both valid for the call; the kernel copies the request and keeps no pointer to it,
        // and the request names no buffer (0 bytes).
        let done = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, &raw mut list) };
        if done == 1 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn is_eventfd(&self, fd: BorrowedFd<'_>) -> bool {
        // The kernel looks at the eventfd first (EINVAL if it is none), then finds that /dev/null is not open for reading
        // (EBADF): nothing is ever signalled.
        let mut request = self.request(IOCB_CMD_PREAD, fd);
        loop {
            match self.submit(&mut request).map_err(|e| e.raw_os_error()) {
                Err(Some(libc::EAGAIN)) => self.reap(),
                other => return other == Err(Some(libc::EBADF)),
            }
        }
    }

    #[inline]
    fn signal(&self, fd: BorrowedFd<'_>) {
        let mut request = self.request(IOCB_CMD_PWRITE, fd);
        for _ in 0..TRIES {
            if self.submit(&mut request).is_ok() {
                return;
            }
            self.reap();
        }
    }

    /// Throws all completions away, without a system call: by moving the head of the ring to its tail. Threads may do so
    /// at the same time: a head set back by the slower one only leaves some completions for the next time.
    #[cold]
    fn reap(&self) {
        let ring = self.ring();
        // Acquire and Release: the kernel takes a new head for "everything before was read"; we read nothing.
        ring.head
            .store(ring.tail.load(Ordering::Acquire), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

    use super::*;

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")
    }

    fn read(fd: impl AsFd) -> u64 {
        let mut value = [0; 8];
        rustix::io::read(fd, &mut value).expect("signalled");
        u64::from_ne_bytes(value)
    }

    #[test]
    fn counts_every_call_far_beyond_the_room_for_completions() {
        let call = Call::new(event()).expect("an eventfd");
        for _ in 0..10_000 {
            call.signal();
        }
        assert_eq!(read(&call), 10_000);
    }

    #[test]
    fn does_not_block_on_a_full_eventfd() {
        let fd = event(); // without O_NONBLOCK
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).expect("filled");
        let mut writable = [PollFd::new(&fd, PollFlags::OUT)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        assert_eq!(
            poll(&mut writable, Some(&now)),
            Ok(0),
            "write(2) would block"
        );
        let call = Call::new(fd).expect("an eventfd");
        let start = Instant::now();
        for _ in 0..1_000 {
            call.signal();
        }
        assert!(start.elapsed() < Duration::from_secs(1));
        assert_eq!(read(&call), u64::MAX, "saturated");
        call.signal();
        assert_eq!(read(&call), 1, "works again once the guest has read");
    }

    #[test]
    fn checks_a_descriptor_without_signalling_it() {
        let fd = event();
        assert!(is_eventfd(fd.as_fd()) && is_named_eventfd(fd.as_fd()));
        let mut readable = [PollFd::new(&fd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut readable, Some(&now)), Ok(0));
    }

    #[test]
    fn refuses_what_is_no_eventfd() {
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        let (one, two) = std::os::unix::net::UnixStream::pair().expect("sockets");
        let others = [
            read,
            write,
            one.into(),
            two.into(),
            rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd"),
            std::fs::File::open("/dev/zero").expect("a device").into(),
            std::fs::File::open("/").expect("a directory").into(),
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
                .expect("an epoll"),
        ];
        for fd in others {
            assert!(!is_named_eventfd(fd.as_fd()));
            let refusal = Call::new(fd).expect_err("no eventfd");
            assert_eq!(refusal.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn two_threads_lose_no_call() {
        let call = Arc::new(Call::new(event()).expect("an eventfd"));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..20_000).for_each(|_| call.signal()));
            }
        });
        assert_eq!(read(&*call), 40_000);
    }
}
