//! A vhost-user port's session: one thread that lets guests in, one after the other, and serves the one that is there.
//!
//! The thread may block in the kernel, on a guest's file for instance: then this port stands still, and no other. It owns
//! the connection, the guest's memory and its rings while no worker has them.
//!
//! A guest that breaks the rules is put out: its rings are taken back, its memory is unmapped, its connection closed, and the
//! next one waits for 0, 1, 2, 4 ... 60 seconds.

mod host;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use self::host::Host;
use super::keys::ConfigError;
use super::port_handle::PortHandle;
use super::socket::OwnedSocket;
use super::state::PortSpec;
use super::vhost_door::Door;

/// The thread's stack: nothing here is deep or large.
const STACK: usize = 256 << 10;
/// What a session may take to end before nobody waits for it any longer.
const STOP_TIME: Duration = Duration::from_millis(50);

/// A vhost-user port's session.
///
/// Threads: any thread may call any method.
pub struct Session {
    shared: Arc<Shared>,
    ended: Receiver<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
    asked: Mutex<Option<Instant>>,
}

/// What the session's thread and those who ask things of it both see.
struct Shared {
    stopping: Arc<AtomicBool>,
    /// Makes the thread look.
    wake: OwnedFd,
    /// The listening socket, so that its file can be removed even if the thread stands still.
    socket: Mutex<Option<Arc<OwnedSocket>>>,
}

impl Session {
    /// Opens the port's socket, or gets ready to connect, and starts to serve guests.
    pub fn start(spec: &PortSpec, handle: Arc<dyn PortHandle>) -> Result<Session, ConfigError> {
        let name = &spec.name;
        let fail = |error: &dyn std::fmt::Display| {
            ConfigError(format!(
                "port {name:?}: cannot be served: {error}: see `ringway doctor` for the limits of this host"
            ))
        };
        let door = Door::new(spec)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| fail(&error))?;
        let shared = Arc::new(Shared {
            stopping: Arc::default(),
            wake,
            socket: Mutex::new(door.socket().cloned()),
        });
        let (sender, ended) = bounded(1);
        let host = Host::new(spec, handle, shared.clone(), door);
        let thread = std::thread::Builder::new()
            .name(format!("port-{name}"))
            .stack_size(STACK)
            .spawn(move || host.run(&sender))
            .map_err(|error| fail(&error))?;
        Ok(Session {
            shared,
            ended,
            thread: Mutex::new(Some(thread)),
            asked: Mutex::new(None),
        })
    }

    /// Asks the session to end; does not wait.
    pub fn ask_to_stop(&self) {
        lock(&self.asked).get_or_insert_with(Instant::now);
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.ring();
    }

    /// Ends the session: its rings are detached, its socket is closed and removed, its guest disconnected. Returns within
    /// 50 ms of the first request, even if the thread stands still: then it does the rest when it comes back.
    ///
    /// The thread calls the port's handle for the last time meanwhile: hold no lock the handle needs.
    pub fn stop(&self) {
        self.ask_to_stop();
        let left =
            lock(&self.asked).map_or(STOP_TIME, |asked| STOP_TIME.saturating_sub(asked.elapsed()));
        let Some(thread) = lock(&self.thread).take() else {
            return;
        };
        // An ended thread drops its end of the channel: an error is as good.
        if let Err(crossbeam::channel::RecvTimeoutError::Timeout) = self.ended.recv_timeout(left) {
            log::warn!(
                "{}: stands still; left behind",
                thread.thread().name().unwrap_or_default()
            );
            if let Some(socket) = lock(&self.shared.socket).take() {
                socket.remove_file();
            }
            return;
        }
        drop(thread.join());
    }

    /// The attachment's memory is not to be trusted any more (its poison is set): the guest is put out.
    pub fn poisoned(&self) {
        self.shared.ring();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.ask_to_stop();
    }
}

impl Shared {
    fn ring(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Waits until one of `fds` is ready, somebody rings, or it is `until`. Says which are ready.
    fn wait<const N: usize>(
        &self,
        fds: [Option<(BorrowedFd<'_>, PollFlags)>; N],
        until: Instant,
    ) -> [bool; N] {
        let mut polled = Vec::with_capacity(N + 1);
        polled.push(PollFd::new(&self.wake, PollFlags::IN));
        for (fd, flags) in fds.iter().flatten() {
            polled.push(PollFd::from_borrowed_fd(*fd, *flags));
        }
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up: a deadline that is asked about just before it is due is asked about again and again.
        let timeout = Timespec::try_from(left + Duration::from_micros(100)).ok();
        let _ = poll(&mut polled, timeout.as_ref()); // interrupted: as if it were time
        if !polled[0].revents().is_empty() {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        let mut ready = polled[1..].iter().map(|fd| !fd.revents().is_empty());
        fds.map(|fd| fd.is_some() && ready.next().unwrap_or(false))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
