//! The session's thread: waits for guests, serves the one that is there, and puts out those that break the rules.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::super::peer_cred::{identity_of, peer_of};
use super::super::port_handle::{PortHandle, SessionReport};
use super::super::state::{Peer, PortSpec, PortState};
use super::super::vhost_device::Device;
use super::super::vhost_door::{Door, Look};
use super::super::vhost_filter::{Broken, Filter, Heard};
use super::{Shared, lock};
use crate::virtio::guest_mem::MapOptions;

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
/// Messages per second and port that take rings from the workers and give them back: each costs everybody's worker some microseconds. A
/// guest with 16 queue pairs starts with 32.
const HANDOVERS: u32 = 100;
/// How long a guest may go on sending more messages than that. No honest one comes near.
const FLOOD_TIME: Duration = Duration::from_secs(5);
/// How long a port that has no more messages to deal with waits.
const SLOWED: Duration = Duration::from_millis(10);
/// Between two looks at a listening process of the wrong user.
const STRANGER_PAUSE: Duration = Duration::from_secs(1);
/// Lines of log per second and port.
const LINES: u32 = 5;

const NO_MEMORY: &str = "the guest is connected but shares no memory: start a DPDK container with --single-file-segments \
    (without it each 2 MiB page is a file and DPDK gives up at 8), or 1 GiB pages; a VM shares it when its driver starts";

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
pub(super) struct Host {
    spec: PortSpec,
    handle: Arc<dyn PortHandle>,
    shared: Arc<Shared>,
    door: Door,
    options: MapOptions,
    connections: Bucket,
    messages: Bucket,
    handovers: Bucket,
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
    pub(super) fn new(
        spec: &PortSpec,
        handle: Arc<dyn PortHandle>,
        shared: Arc<Shared>,
        door: Door,
    ) -> Host {
        Host {
            spec: spec.clone(),
            handle,
            shared,
            door,
            options: Device::map_options(spec),
            connections: Bucket::new(CONNECTIONS),
            messages: Bucket::new(MESSAGES),
            handovers: Bucket::new(HANDOVERS),
            lines: Bucket::new(LINES),
            untold: 0,
            reported: None,
            last: None,
            strikes: 0,
        }
    }

    /// The thread. `_ended` is dropped at its end, when all the rest is.
    pub(super) fn run(mut self, _ended: &Sender<()>) {
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
                Look::Guest(stream) => match self.stranger(&stream) {
                    None => return Some(stream),
                    Some(why) => {
                        drop(stream);
                        self.send_away(why);
                    }
                },
                Look::Nobody(state, why, until) => {
                    self.wait_outside(state, why.or_else(|| self.last.clone()), until);
                }
            }
        }
    }

    /// Why this process may not have the port, if so.
    fn stranger(&self, stream: &UnixStream) -> Option<String> {
        let wanted = self.spec.peer_uid?;
        let peer = peer_of(stream);
        if peer.is_some_and(|peer| peer.uid == wanted) {
            return None;
        }
        let who = peer.map_or_else(
            || "a process of an unknown user".to_owned(),
            |peer| format!("process {} of user {}", peer.pid, peer.uid),
        );
        Some(format!(
            "{who} was sent away: the port is for user {wanted} (peer-uid)"
        ))
    }

    /// Whoever knocks next is heard at once; whoever listens where a guest should be is asked again after a while.
    fn send_away(&mut self, why: String) {
        if let Door::Theirs(_) = self.door {
            let later = Instant::now() + STRANGER_PAUSE;
            self.wait_outside(PortState::Error, Some(why), later);
        } else {
            self.tell(log::Level::Warn, &why);
            self.last = Some(why);
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
        let who = identity_of(&stream, peer);
        let device = Device::new(
            &self.spec,
            self.handle.clone(),
            stopping,
            who,
            &self.options,
        );
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
        if !self.handovers.has() {
            // Only slowed down: honest guests may have a reason for many.
            self.shared.wait([], Instant::now() + SLOWED);
            return None;
        }
        if !self.messages.take() {
            let now = Instant::now();
            let since = *visit.flooding.get_or_insert(now);
            if now.duration_since(since) >= FLOOD_TIME {
                let seconds = FLOOD_TIME.as_secs();
                return Some(End::PutOut(format!(
                    "more than {MESSAGES} messages a second for {seconds} s; the frontend is at fault"
                )));
            }
            self.shared.wait([], now + SLOWED);
            return None;
        }
        let heard = visit.filter.listen();
        if visit.filter.device().take_handed_over() {
            self.handovers.take();
        }
        match heard {
            Ok(Heard::Message) => None,
            Ok(Heard::Nothing) => {
                visit.flooding = None; // it waits for us, not we for it
                self.wait_inside(visit)
            }
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

    /// Somebody else wants in. The newest wins if the one that was let in has hung up or is dead, else it is sent away.
    fn turn_away(&mut self, visit: &mut Visit) -> Option<End> {
        if visit.left() || visit.dead() {
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
    /// Since when it has sent more than it may.
    flooding: Option<Instant>,
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
            flooding: None,
            deaf_until: now,
        }
    }

    /// Whether the guest has closed its end, even if we have not read all it said before. Asked after a knock was heard: a container that
    /// is started again at once must not be sent away because of its own last connection.
    fn left(&self) -> bool {
        says(self.filter.waits_for().0, PollFlags::RDHUP | PollFlags::HUP)
    }

    /// Whether the process that connected is known to be dead.
    fn dead(&self) -> bool {
        let process = self.process.as_ref();
        process.is_some_and(|process| says(process.as_fd(), PollFlags::IN))
    }
}

/// Whether a descriptor is in one of these states now.
fn says(fd: BorrowedFd<'_>, states: PollFlags) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut asked = [PollFd::from_borrowed_fd(fd, states)];
    poll(&mut asked, Some(&now)) == Ok(1) && asked[0].revents().intersects(states)
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

    fn has(&mut self) -> bool {
        let now = Instant::now();
        let more = now.duration_since(self.at).as_secs_f64() * f64::from(self.rate);
        self.at = now;
        self.left = (self.left + more).min(self.rate.into());
        self.left >= 1.0
    }

    fn take(&mut self) -> bool {
        let has = self.has();
        if has {
            self.left -= 1.0;
        }
        has
    }
}
