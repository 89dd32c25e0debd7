//! A backend of our own that measures the generator instead of the other way round: it consumes frames, or it passes them on
//! with faults at known places. Made of the switch's own sessions and rings, without the switch.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ringway::control::port_handle::{PortHandle, Rings, SessionReport};
use ringway::control::state::PortSpec;
use ringway::control::vhost_user::Session;
use ringway::dataplane::frame::Slots;
use ringway::dataplane::queue::RxQueue;
use ringway::port::mem::{FromVec, ToVec, Wire};
use ringway::port::shared::Sender;
use ringway::port::vhost::FromGuest;
use ringway::virtio::buffers::{BATCH, Buffers};

use crate::interrupt;
use crate::process::pin;

/// Serves vhost-user sockets with a backend that only consumes: it gives every buffer back, unread, as fast as it can.
///
/// Shows what a generator can send at most: the backend does less than any switch.
#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// A socket to serve; again for each port
    #[arg(long = "socket", value_name = "PATH", required = true)]
    sockets: Vec<PathBuf>,
    /// The CPU to poll on
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    cpu: usize,
    /// Pass frames between the ports of a pair instead, with one copy and no lookup
    #[arg(long)]
    cross: bool,
}

/// Runs the subcommand until somebody ends it.
pub(crate) fn run(options: &Serve) -> Result<()> {
    let kind = if options.cross {
        Kind::Cross
    } else {
        Kind::Consume
    };
    let backend = Backend::start(&options.sockets, kind, Some(options.cpu))?;
    loop {
        let before = backend.moved();
        if interrupt::sleep(Duration::from_secs(1)).is_err() {
            return Ok(());
        }
        let moved = backend.moved() - before;
        if moved > 0 {
            println!("{:.2} Mpps", moved as f64 / 1e6);
        }
    }
}

/// What happens to a frame on its way. Given: its number among the frames from its port, announcements not counted, and its bytes.
pub(crate) type Fate = Box<dyn FnMut(u64, &mut Vec<u8>) -> Action + Send>;

/// See [`Fate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "most of them are for tests")]
pub(crate) enum Action {
    Pass,
    Drop,
    Twice,
    /// Behind the next frame.
    Hold,
}

/// What a backend does.
pub(crate) enum Kind {
    /// Gives every buffer back, unread.
    Consume,
    /// From each port to the other of its pair, with one copy.
    Cross,
    /// The same through memory of its own, so much later, and what else `Fate` says.
    #[allow(dead_code, reason = "for tests")]
    Faulty(Duration, Vec<Fate>),
}

/// A running backend.
pub(crate) struct Backend {
    sessions: Vec<Session>,
    stop: Arc<AtomicBool>,
    moved: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// The rings of a port while its guest lets them run.
#[derive(Default)]
struct Port {
    rings: Mutex<Rings>,
}

impl Port {
    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortHandle for Port {
    fn attach(&self, mut rings: Rings) -> Result<()> {
        for (_, from) in &mut rings.from_guest {
            from.disarm();
        }
        *self.rings() = rings;
        Ok(())
    }

    fn detach(&self) -> Rings {
        std::mem::take(&mut *self.rings())
    }

    fn report(&self, _: SessionReport) {}
}

impl Backend {
    /// Serves these sockets from a thread, pinned if a CPU is given.
    pub(crate) fn start(sockets: &[PathBuf], kind: Kind, cpu: Option<usize>) -> Result<Self> {
        if !matches!(kind, Kind::Consume) && !sockets.len().is_multiple_of(2) {
            bail!("{} sockets cannot be paired", sockets.len());
        }
        let ports: Vec<_> = sockets.iter().map(|_| Arc::new(Port::default())).collect();
        let sessions = sockets
            .iter()
            .zip(&ports)
            .enumerate()
            .map(|(number, (socket, port))| {
                let spec = PortSpec::vhost_user(format!("p{number}"), socket.clone());
                Session::start(&spec, port.clone()).map_err(Into::into)
            })
            .collect::<Result<Vec<_>>>()?;
        let (stop, moved) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (theirs, count) = (stop.clone(), moved.clone());
        let thread = std::thread::Builder::new()
            .name("backend".to_owned())
            .spawn(move || {
                if let Some(cpu) = cpu
                    && let Err(error) = pin(&[cpu])
                {
                    eprintln!("{error:#}");
                }
                work(kind, &ports, &theirs, &count, cpu.is_some());
            })
            .context("a thread")?;
        Ok(Self {
            sessions,
            stop,
            moved,
            thread: Some(thread),
        })
    }

    /// Frames taken from the ports so far.
    pub(crate) fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        for session in &self.sessions {
            session.stop();
        }
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn work(kind: Kind, ports: &[Arc<Port>], stop: &AtomicBool, moved: &AtomicU64, pinned: bool) {
    let (mut buffers, mut slots) = (Buffers::new(), Slots::new());
    let cross = matches!(kind, Kind::Cross);
    let (delay, fates, faulty) = match kind {
        Kind::Faulty(delay, fates) => (delay, fates, true),
        _ => (Duration::ZERO, Vec::new(), false),
    };
    let mut ways: Vec<Way> = fates
        .into_iter()
        .map(|fate| Way::new(fate, delay))
        .collect();
    while !stop.load(Ordering::Relaxed) {
        let mut count = 0;
        for (number, port) in ports.iter().enumerate() {
            count += if faulty {
                ways[number].turn(port, &ports[number ^ 1], &mut slots)
            } else if cross {
                pass(port, &ports[number ^ 1], &mut slots)
            } else {
                consume(port, &mut buffers)
            };
        }
        if count > 0 {
            moved.fetch_add(count, Ordering::Relaxed);
        } else if !pinned {
            std::thread::yield_now();
        }
    }
}

/// Gives back what there is, unread.
fn consume(port: &Port, buffers: &mut Buffers) -> u64 {
    let mut rings = port.rings();
    let mut done = 0;
    for (pair, from) in std::mem::take(&mut rings.from_guest) {
        let (mut ring, call, kick) = from.into_parts();
        if let Ok(count) = ring.fetch(buffers, BATCH) {
            ring.complete(count, &[]);
            done += count as u64;
        }
        let from = FromGuest::new(ring, call, kick, u32::from(u16::MAX));
        rings.from_guest.push((pair, from));
    }
    done
}

/// Frames of `port` to the other port of its pair, queue by queue; what does not fit stays.
fn pass(port: &Port, other: &Port, slots: &mut Slots) -> u64 {
    let (mut rings, mut others) = (port.rings(), other.rings());
    let mut done = 0;
    for ((_, from), (_, to)) in rings.from_guest.iter_mut().zip(&mut others.to_guest) {
        let burst = from.lend(slots);
        let count = burst.count();
        if count == 0 {
            continue;
        }
        let sent = to.send(&burst, u64::MAX >> (64 - count)).frames as usize;
        from.give_back(sent);
        done += sent as u64;
    }
    done
}

/// The way from one port to another, with its faults.
struct Way {
    fate: Fate,
    delay: Duration,
    number: u64,
    /// Frames as they were taken.
    taken: Wire,
    into: ToVec,
    /// Frames with the time they are due.
    later: VecDeque<(Instant, Vec<u8>)>,
    held: Option<(Instant, Vec<u8>)>,
    due: Wire,
    from: FromVec,
    slots: Box<Slots>,
}

impl Way {
    fn new(fate: Fate, delay: Duration) -> Self {
        let (taken, due) = (Wire::default(), Wire::default());
        Self {
            fate,
            delay,
            number: 0,
            into: ToVec::new(taken.clone(), usize::MAX),
            taken,
            later: VecDeque::new(),
            held: None,
            from: FromVec::new(due.clone()),
            due,
            slots: Slots::new(),
        }
    }

    fn turn(&mut self, port: &Port, other: &Port, slots: &mut Slots) -> u64 {
        // 1. Take.
        let mut count = 0;
        for (_, from) in &mut port.rings().from_guest {
            let burst = from.lend(slots);
            let frames = burst.count();
            if frames > 0 {
                let _ = self.into.send(&burst, u64::MAX >> (64 - frames));
                from.give_back(frames);
                count += frames as u64;
            }
        }
        // 2. Decide.
        let due = Instant::now() + self.delay;
        let mut taken = std::mem::take(&mut *lock(&self.taken));
        for mut frame in taken.drain(..) {
            let action = if announcement(&frame) {
                Action::Pass
            } else {
                self.number += 1;
                (self.fate)(self.number - 1, &mut frame)
            };
            match action {
                Action::Drop => {}
                Action::Hold => self.held = Some((due, frame)),
                Action::Pass | Action::Twice => {
                    if action == Action::Twice {
                        self.later.push_back((due, frame.clone()));
                    }
                    self.later.push_back((due, frame));
                    self.later.extend(self.held.take());
                }
            }
        }
        // 3. Send what is due.
        let now = Instant::now();
        while self.later.front().is_some_and(|(due, _)| *due <= now) {
            let (_, frame) = self.later.pop_front().unwrap_or((now, Vec::new()));
            lock(&self.due).push_back(frame);
        }
        if let Some((_, to)) = other.rings().to_guest.first_mut() {
            let burst = self.from.lend(&mut self.slots);
            let frames = burst.count();
            if frames > 0 {
                let sent = to.send(&burst, u64::MAX >> (64 - frames)).frames;
                self.from.give_back(sent as usize);
            }
        }
        count
    }
}

/// Whether a frame is one of the generator's announcements: their stream number is all ones.
fn announcement(frame: &[u8]) -> bool {
    frame.get(30..32) == Some(&[0xff, 0xff])
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
