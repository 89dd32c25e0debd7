//! A vhost-user port's session: one thread that lets guests in, one after the other, and serves the one that is there.
//!
//! The thread may block in the kernel, on a guest's file for instance: then this port stands still, and no other. It owns
//! the connection, the guest's memory and its rings while no worker has them.
//!
//! A guest that breaks the rules is put out: its rings are taken back, its memory is unmapped, its connection closed, and the
//! next one waits for 0, 1, 2, 4 ... 60 seconds.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::keys::ConfigError;
use super::peer_cred::peer_of;
use super::port_handle::{PortHandle, SessionReport};
use super::socket::OwnedSocket;
use super::state::{Peer, PortSpec, PortState};
use super::vhost_device::Device;
use super::vhost_door::{Door, Look};
use super::vhost_filter::{Broken, Filter, Heard};
use crate::virtio::guest_mem::MapOptions;

/// The thread's stack: nothing here is deep or large.
const STACK: usize = 256 << 10;
/// What a session may take to end before nobody waits for it any longer.
const STOP_TIME: Duration = Duration::from_millis(50);
/// When a guest that shares no memory is told how to.
const MEMORY_TIME: Duration = Duration::from_secs(2);
/// How often a guest's attachment is looked at when nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// Longest pause after a guest that was put out.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A guest that has behaved for so long starts with a clean sheet.
const FORGIVEN: Duration = Duration::from_secs(60);
/// Messages and connections per second and port that are dealt with; the rest waits in the kernel. A guest with 16 queue
/// pairs starts with some 300 messages.
const MESSAGES: u32 = 1000;
const CONNECTIONS: u32 = 1000;
/// Lines of log per second and port.
const LINES: u32 = 5;

const NO_MEMORY: &str = "the guest is connected but shares no memory: start a DPDK container with --single-file-segments \
    (without it each 2 MiB page is a file and DPDK gives up at 8), or 1 GiB pages; a VM shares it when its driver starts";

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

/// Allows so many things a second, and as many at once.
struct Bucket {
    rate: u32,
    left: f64,
    at: Instant,
}

impl Bucket {
    fn new(rate: u32) -> Bucket {
        Bucket {
            rate,
            left: rate.into(),
            at: Instant::now(),
        }
    }

    fn take(&mut self) -> bool {
        let now = Instant::now();
        let more = now.duration_since(self.at).as_secs_f64() * f64::from(self.rate);
        self.at = now;
        self.left = (self.left + more).min(self.rate.into());
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

/// Why a guest's visit ended.
enum End {
    /// We stop.
    Stopped,
    /// It left, and this was wrong with it at the end.
    HungUp(Option<String>),
    /// It had to leave.
    PutOut(String),
}

/// The thread's side.
struct Host {
    spec: PortSpec,
    handle: Arc<dyn PortHandle>,
    shared: Arc<Shared>,
    door: Door,
    options: MapOptions,
    connections: Bucket,
    lines: Bucket,
    /// Lines that were not written since the last one.
    untold: u64,
    /// What was last reported while nobody was there.
    reported: Option<(PortState, Option<String>)>,
    /// What was wrong with the last guest.
    last: Option<String>,
    /// Guests put out in a row.
    strikes: u32,
}

impl Host {
    fn new(spec: &PortSpec, handle: Arc<dyn PortHandle>, shared: Arc<Shared>, door: Door) -> Host {
        Host {
            spec: spec.clone(),
            handle,
            shared,
            door,
            options: Device::map_options(spec),
            connections: Bucket::new(CONNECTIONS),
            lines: Bucket::new(LINES),
            untold: 0,
            reported: None,
            last: None,
            strikes: 0,
        }
    }

    /// The thread. `_ended` is dropped at its end, when all the rest is.
    fn run(mut self, _ended: &Sender<()>) {
        while let Some(stream) = self.next_guest() {
            self.reported = None;
            let since = Instant::now();
            let end = self.serve(stream);
            if since.elapsed() >= FORGIVEN {
                self.strikes = 0;
            }
            match end {
                End::Stopped => break,
                End::HungUp(why) => {
                    self.tell(log::Level::Info, "the guest has left");
                    self.last = why;
                }
                End::PutOut(why) => self.quarantine(why),
            }
        }
        lock(&self.shared.socket).take();
    }

    /// Waits for a guest; none: we stop.
    fn next_guest(&mut self) -> Option<UnixStream> {
        loop {
            if self.shared.stopping() {
                return None;
            }
            if !self.connections.take() {
                let soon = Instant::now() + Duration::from_millis(10);
                self.shared.wait([], soon);
                continue;
            }
            match self.door.look() {
                Look::Guest(stream) => return Some(stream),
                Look::Nobody(state, why, until) => {
                    self.wait_outside(state, why.or_else(|| self.last.clone()), until);
                }
            }
        }
    }

    fn wait_outside(&mut self, state: PortState, why: Option<String>, until: Instant) {
        if let Door::Ours(_) = self.door {
            *lock(&self.shared.socket) = self.door.socket().cloned();
        }
        self.report_absence(state, why);
        let bell = self.door.bell().map(|bell| (bell, PollFlags::IN));
        self.shared.wait([bell], until);
    }

    fn report_absence(&mut self, state: PortState, reason: Option<String>) {
        let now = Some((state, reason.clone()));
        if self.reported == now {
            return;
        }
        self.reported = now;
        match &reason {
            Some(why) if state == PortState::Error => self.tell(log::Level::Warn, why),
            Some(why) => self.tell(log::Level::Debug, &format!("{state}: {why}")),
            None => self.tell(log::Level::Info, &state.to_string()),
        }
        self.handle.report(SessionReport {
            state,
            reason,
            ..SessionReport::default()
        });
    }

    /// Serves one guest until it leaves or must.
    fn serve(&mut self, stream: UnixStream) -> End {
        let peer = peer_of(&stream);
        let stopping = self.shared.stopping.clone();
        let device = Device::new(&self.spec, self.handle.clone(), stopping, &self.options);
        let filter = match Filter::new(stream, device) {
            Ok(filter) => filter,
            Err(error) => {
                return End::PutOut(format!(
                    "no guest can be served: {error}: see `ringway doctor`"
                ));
            }
        };
        self.greet(peer);
        let mut visit = Visit::new(filter, peer);
        let end = loop {
            if let Some(end) = self.turn(&mut visit) {
                break end;
            }
        };
        visit.filter.device().leave();
        self.door.left(visit.forwarded);
        end
    }

    /// One message, or one wait.
    fn turn(&mut self, visit: &mut Visit) -> Option<End> {
        if self.shared.stopping() {
            return Some(End::Stopped);
        }
        if let Some(why) = visit.filter.device().broken() {
            return Some(End::PutOut(why));
        }
        self.report(visit);
        if !visit.messages.take() {
            self.shared
                .wait([], Instant::now() + Duration::from_millis(10));
            return None;
        }
        match visit.filter.listen() {
            Ok(Heard::Message) => None,
            Ok(Heard::Nothing) => self.wait_inside(visit),
            Ok(Heard::End) => {
                let why = visit.filter.device().complaint().map(str::to_owned);
                Some(End::HungUp(why))
            }
            Err(Broken(why)) => Some(End::PutOut(why)),
        }
    }

    fn wait_inside(&mut self, visit: &mut Visit) -> Option<End> {
        let now = Instant::now();
        let (fd, writes) = visit.filter.waits_for();
        let guest = (
            fd,
            if writes {
                PollFlags::OUT
            } else {
                PollFlags::IN
            },
        );
        // Others knock at our own socket only; a guest's is ours alone while we are connected.
        let bell = match &self.door {
            Door::Ours(_) if now >= visit.deaf_until => {
                self.door.bell().map(|bell| (bell, PollFlags::IN))
            }
            _ => None,
        };
        let memory = (!visit.told_of_memory).then(|| visit.since + MEMORY_TIME);
        let deaf = (now < visit.deaf_until).then_some(visit.deaf_until);
        let until = [visit.filter.deadline(), memory, deaf]
            .into_iter()
            .flatten()
            .fold(now + TICK, Instant::min);
        let [_, knocked] = self.shared.wait([Some(guest), bell], until);
        if knocked { self.turn_away(visit) } else { None }
    }

    /// Somebody else wants in. The newest wins if the process that was let in is dead, else it is sent away.
    fn turn_away(&mut self, visit: &mut Visit) -> Option<End> {
        if visit.dead() {
            return Some(End::HungUp(None));
        }
        if self.connections.take() {
            if let Look::Guest(other) = self.door.look() {
                drop(other);
            }
        } else {
            visit.deaf_until = Instant::now() + Duration::from_millis(50);
        }
        None
    }

    /// Tells what has changed.
    fn report(&mut self, visit: &mut Visit) {
        let (report, complaint) = {
            let mut device = visit.filter.device();
            let late = !device.has_memory()
                && !visit.told_of_memory
                && visit.since.elapsed() >= MEMORY_TIME;
            visit.told_of_memory |= late || device.has_memory();
            if !device.take_changed() && !late {
                return;
            }
            let mut report = device.report(visit.peer);
            let complaint = report.reason.clone();
            if !device.has_memory() && visit.since.elapsed() >= MEMORY_TIME {
                report.reason.get_or_insert_with(|| NO_MEMORY.to_owned());
            }
            (report, complaint)
        };
        if report.reason != visit.reason {
            visit.reason.clone_from(&report.reason);
            if let Some(why) = complaint.or_else(|| report.reason.clone()) {
                self.tell(log::Level::Warn, &why);
            }
        }
        if report.state == PortState::Forwarding && !visit.forwarded {
            visit.forwarded = true;
            let (rings, features) = (report.rings.len(), report.features.join(" "));
            self.tell(
                log::Level::Info,
                &format!("frames flow: {rings} rings, {features}"),
            );
        }
        self.handle.report(report);
    }

    /// Keeps others out for a while, after a guest that broke the rules.
    fn quarantine(&mut self, why: String) {
        let pause = match self.strikes {
            0 => Duration::ZERO,
            strikes => Duration::from_secs(1 << (strikes - 1).min(6)).min(PAUSE_MAX),
        };
        self.strikes = self.strikes.saturating_add(1);
        self.tell(log::Level::Warn, &format!("guest put out: {why}"));
        let reason = match pause.as_secs() {
            0 => why.clone(),
            seconds => format!("{why}; the next guest is let in {seconds} s later"),
        };
        let state = PortState::Quarantined;
        self.handle.report(SessionReport {
            state,
            reason: Some(reason),
            ..SessionReport::default()
        });
        self.last = Some(why);
        let until = Instant::now() + pause;
        while Instant::now() < until && !self.shared.stopping() {
            self.shared.wait([], until);
        }
    }

    fn greet(&mut self, peer: Option<Peer>) {
        let who = peer.map_or_else(
            || "a guest".to_owned(),
            |peer| format!("process {} of user {}", peer.pid, peer.uid),
        );
        self.tell(log::Level::Info, &format!("connected with {who}"));
    }

    /// Writes a line of log, unless there were too many.
    fn tell(&mut self, level: log::Level, what: &str) {
        if !log::log_enabled!(level) {
            return;
        }
        if !self.lines.take() {
            self.untold += 1;
            return;
        }
        let name = &self.spec.name;
        match std::mem::take(&mut self.untold) {
            0 => log::log!(level, "port {name:?}: {what}"),
            untold => log::log!(
                level,
                "port {name:?}: {what} ({untold} lines left out before)"
            ),
        }
    }
}

/// One guest's visit.
struct Visit {
    filter: Filter,
    peer: Option<Peer>,
    /// The process that connected, to see whether it still lives.
    process: Option<OwnedFd>,
    since: Instant,
    /// Memory came, or the guest's user was told how it would.
    told_of_memory: bool,
    forwarded: bool,
    /// The reason last reported.
    reason: Option<String>,
    messages: Bucket,
    /// Others who knock are not heard before.
    deaf_until: Instant,
}

impl Visit {
    fn new(filter: Filter, peer: Option<Peer>) -> Visit {
        let now = Instant::now();
        let pid = peer.and_then(|peer| Pid::from_raw(peer.pid));
        Visit {
            filter,
            peer,
            process: pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()),
            since: now,
            told_of_memory: false,
            forwarded: false,
            reason: None,
            messages: Bucket::new(MESSAGES),
            deaf_until: now,
        }
    }

    /// Whether the process that connected is known to be dead.
    fn dead(&self) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        self.process.as_ref().is_some_and(|process| {
            poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)) == Ok(1)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
