//! The engine: owns ports and workers, and carries queues between their sessions and the workers.
//!
//! Three parties: the operator (API, configuration) adds and removes ports; each port's session attaches and detaches its
//! guest's rings; the workers poll them. All shared state is behind one mutex, held while workers answer their mail, never
//! while a session is started or stopped (its thread may be waiting for that mutex).

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::api::Refusal;
use super::config::Config;
use super::cpu;
use super::plan::{self, Action};
use super::port_handle::{FileId, SessionReport};
use super::rings::{Claim, Handle, WayOut};
use super::sandbox;
use super::session::Session;
use super::spec::check_beside;
use super::state::{self, Counters, PortSpec, PutOut};
use super::status::{received, sent};
use crate::dataplane::clock::tsc;
use crate::dataplane::counters::{QueueCounters, WorkerCounters};
use crate::dataplane::fdb::{Fdb, FdbSettings, Flush, Key};
use crate::dataplane::guard::{Guard, Rate};
use crate::dataplane::mailbox::{self, Mailbox, QueueId};
use crate::dataplane::port_set::{Domain, Exit, PORTS_MAX, PortId, Topology};
use crate::dataplane::queue::TxQueue;
use crate::dataplane::worker::{Idle, RxSlot, Shared, Worker};
use crate::port::call::Call;
use crate::port::doze::Bed;
use crate::virtio::guest_mem::Poison;

/// How often broken attachments are looked for that no worker has told of, and the coarse clock is moved.
const WATCH: Duration = Duration::from_millis(5);
/// How long a worker that may sleep goes on polling after the last frame.
const IDLE_AFTER: Duration = Duration::from_millis(1);

/// A running switch.
///
/// Threads: any control thread may call any method.
pub struct Switch {
    /// This very switch, for the handles of its ports.
    pub(super) me: Weak<Switch>,
    pub(super) shared: Arc<Shared>,
    pub(super) workers: Vec<WorkerHandle>,
    /// One change at a time, from the decision to its end.
    pub(super) change: Mutex<Config>,
    pub(super) state: Mutex<State>,
    /// Stations the forwarding database can hold.
    pub(super) fdb_capacity: u64,
    pub(super) started: (Instant, u64),
    pub(super) watch: Mutex<Option<JoinHandle<()>>>,
    /// Ends the watch's pause: an attachment broke. None if this host has no means that cannot block.
    pub(super) alarm: Option<Arc<Call>>,
}

pub(super) struct WorkerHandle {
    pub(super) cpu: usize,
    /// NUMA node of that CPU, where known.
    pub(super) node: Option<usize>,
    pub(super) mailbox: Mailbox,
    pub(super) counters: Arc<WorkerCounters>,
    pub(super) thread: Mutex<Option<JoinHandle<Vec<RxSlot>>>>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) ports: Vec<Option<Port>>,
    /// How many owners each port number has had.
    pub(super) generations: Vec<u16>,
    pub(super) bridges: Vec<String>,
    /// What ports that were deleted have counted.
    pub(super) departed: Counters,
    pub(super) topology: Arc<Topology>,
    pub(super) age: u32,
    pub(super) stopped: bool,
    /// Files of guests' memory that is mapped now, with the ports that have them.
    pub(super) files: HashMap<FileId, Vec<Claim>>,
}

pub(super) struct Port {
    pub(super) spec: PortSpec,
    pub(super) id: PortId,
    pub(super) generation: u16,
    pub(super) domain: Domain,
    pub(super) pairs: Vec<Pair>,
    pub(super) report: SessionReport,
    pub(super) since: Instant,
    pub(super) connects: u64,
    pub(super) put_out: PutOut,
    pub(super) poison: Option<Arc<Poison>>,
    pub(super) session: Option<Arc<Session>>,
    /// Its limits, if it has any.
    pub(super) guard: Option<Arc<Guard>>,
    /// Files its guest's memory is made of.
    pub(super) files: Vec<FileId>,
}

/// A queue pair of a port, attached or not.
pub(super) struct Pair {
    /// Index of the worker that polls it.
    pub(super) worker: usize,
    pub(super) rx: Arc<QueueCounters>,
    pub(super) tx: Arc<QueueCounters>,
    pub(super) polled: bool,
    pub(super) exit: Option<WayOut>,
}

impl Switch {
    /// Starts workers on `cpus` and the ports of `config`; all or nothing.
    pub fn start(config: Config, cpus: &[usize]) -> Result<Arc<Switch>> {
        crate::virtio::guest_fault::install();
        raise_open_files();
        let fdb = Fdb::new(FdbSettings {
            capacity: config.fdb.capacity as usize,
            reserved_per_port: config.fdb.reserved,
            ports_max: PORTS_MAX,
            ..FdbSettings::default()
        });
        let shared = Arc::new(Shared {
            fdb,
            seconds: 1.into(),
        });
        let (idle, host) = (when_idle(config.idle), cpu::HostCpus::read("/".as_ref()));
        let workers = cpus
            .iter()
            .enumerate()
            .map(|(number, cpu)| spawn_worker(number, *cpu, host.node(*cpu), &shared, idle))
            .collect::<Result<Vec<_>>>()?;
        let ports = config.ports.clone();
        let fdb_capacity = u64::from(config.fdb.capacity);
        let switch = Arc::new_cyclic(|me| Switch {
            me: me.clone(),
            shared,
            workers,
            state: Mutex::new(State {
                age: config.fdb.age,
                ..State::default()
            }),
            change: Mutex::new(Config {
                ports: Vec::new(),
                ..config
            }),
            fdb_capacity,
            started: (Instant::now(), tsc()),
            watch: Mutex::new(None),
            alarm: alarm(),
        });
        *lock(&switch.watch) = Some(spawn_watch(&switch)?);
        for spec in ports {
            if let Err(error) = switch.add_port(spec) {
                switch.stop();
                return Err(error.into());
            }
        }
        Ok(switch)
    }

    /// Adds a port and starts to serve it.
    pub fn add_port(&self, spec: PortSpec) -> Result<(), Refusal> {
        let mut config = lock(&self.change);
        let cpus: Vec<usize> = self.workers.iter().map(|worker| worker.cpu).collect();
        check_beside(&spec, &config.ports, Some(&cpus))
            .map_err(|error| Refusal::Conflict(error.0))?;
        self.start_port(&spec)?;
        config.ports.push(spec);
        Ok(())
    }

    /// Ends a port: its guest is disconnected, its socket removed, its stations forgotten.
    pub fn del_port(&self, name: &str) -> Result<(), Refusal> {
        let mut config = lock(&self.change);
        self.end_port(name)?;
        config.ports.retain(|port| port.name != name);
        Ok(())
    }

    /// Changes what runs into what `new` says; ports that are the same in both lose no frame. Refused as a whole if any
    /// part of it cannot be done while the switch runs.
    pub fn apply(&self, new: &Config) -> Result<Vec<Action>, Refusal> {
        let mut config = lock(&self.change);
        let actions = plan::plan(&config, new)?;
        for action in &actions {
            self.act(action).map_err(|error| {
                Refusal::Failed(format!(
                    "could not {action}: {error}; what stands before it in the plan was done"
                ))
            })?;
            plan::apply(&mut config, action);
        }
        Ok(actions)
    }

    fn act(&self, action: &Action) -> Result<(), Refusal> {
        match action {
            Action::DelPort(name) => self.end_port(name)?,
            Action::ReplacePort(spec) => {
                self.end_port(&spec.name)?;
                self.start_port(spec)?;
            }
            Action::AddPort(spec) => self.start_port(spec)?,
            Action::SetFdbAge(age) => lock(&self.state).age = *age,
            Action::SetFdbReserved(stations) => self.shared.fdb.set_reserved(*stations),
            Action::SetIdle(idle) => {
                let idle = when_idle(*idle);
                for worker in &self.workers {
                    worker.mailbox.idle(idle).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    fn start_port(&self, spec: &PortSpec) -> Result<(), Refusal> {
        let id = lock(&self.state).enter(spec, &self.workers)?;
        let here = lock(&self.state)
            .port(id)
            .map(|port| (port.domain, port.generation));
        let (domain, generation) = here.unwrap_or_default();
        for mac in &spec.mac {
            // Nobody else can have been given it for good: that was checked before.
            if let Err(error) = self
                .shared
                .fdb
                .add_static(Key::new(domain, *mac), id, generation)
            {
                self.shared.fdb.flush(Flush::Gone(id));
                lock(&self.state).leave(id);
                return Err(Refusal::Conflict(format!(
                    "port {:?}: mac {mac}: {error}",
                    spec.name
                )));
            }
        }
        let handle = Arc::new(Handle {
            switch: self.me.clone(),
            id,
            generation,
        });
        match Session::start(spec, handle) {
            Ok(session) => {
                if let Some(port) = lock(&self.state).port(id) {
                    port.session = Some(Arc::new(session));
                }
                Ok(())
            }
            Err(error) => {
                self.shared.fdb.flush(Flush::Gone(id));
                lock(&self.state).leave(id);
                Err(Refusal::Conflict(error.to_string()))
            }
        }
    }

    fn end_port(&self, name: &str) -> Result<(), Refusal> {
        let (id, session) = {
            let mut state = lock(&self.state);
            let port = state.by_name(name)?;
            (port.id, port.session.take())
        };
        if let Some(session) = session {
            session.stop();
        }
        let rings = self.detach(id); // a session that stops has detached; nothing is left here, unless it failed
        drop(rings);
        self.shared.fdb.flush(Flush::Gone(id));
        lock(&self.state).leave(id);
        Ok(())
    }

    /// Gives a queue pair to another worker.
    pub fn move_queue(&self, name: &str, pair: u16, cpu: usize) -> Result<(), Refusal> {
        let Some(worker) = self.workers.iter().position(|worker| worker.cpu == cpu) else {
            let cpus: Vec<String> = self
                .workers
                .iter()
                .map(|worker| worker.cpu.to_string())
                .collect();
            return Err(Refusal::Invalid(format!(
                "no worker runs on CPU {cpu}: choose one of {}",
                cpus.join(", ")
            )));
        };
        let mut state = lock(&self.state);
        let port = state.by_name(name)?;
        let (id, queues) = (port.id, port.pairs.len());
        let Some(entry) = port.pairs.get_mut(usize::from(pair)) else {
            return Err(Refusal::NotFound(format!(
                "port {name:?} has no queue pair {pair}: it has {queues}, from 0"
            )));
        };
        let queue = QueueId { port: id, pair };
        if entry.polled
            && let Some(slot) = self.workers[entry.worker]
                .mailbox
                .detach(queue)
                .map_err(failed)?
        {
            self.workers[worker].mailbox.attach(slot).map_err(failed)?;
        }
        entry.worker = worker;
        Ok(())
    }

    /// Stops everything: sessions, sockets, workers.
    pub fn stop(&self) {
        let sessions: Vec<Arc<Session>> = {
            let mut state = lock(&self.state);
            state.stopped = true;
            state
                .ports
                .iter_mut()
                .flatten()
                .filter_map(|port| port.session.take())
                .collect()
        };
        sessions.iter().for_each(|session| session.ask_to_stop());
        sessions.iter().for_each(|session| session.stop());
        for worker in &self.workers {
            worker.mailbox.stop();
        }
        for worker in &self.workers {
            if let Some(thread) = lock(&worker.thread).take() {
                drop(thread.join());
            }
        }
        if let Some(watch) = lock(&self.watch).take() {
            drop(watch.join());
        }
    }

    /// The configuration as it is now.
    pub fn config(&self) -> Config {
        lock(&self.change).clone()
    }

    /// The forwarding database.
    pub fn fdb(&self) -> &Fdb {
        &self.shared.fdb
    }

    /// The coarse clock, seconds.
    pub fn seconds(&self) -> u32 {
        self.shared.seconds.load(Relaxed)
    }

    /// Runs `look` with the ports' names, numbers, generations and bridges.
    pub fn with_ports<T>(
        &self,
        look: impl FnOnce(&mut dyn Iterator<Item = PortName<'_>>) -> T,
    ) -> T {
        let state = lock(&self.state);
        let mut names = state.ports.iter().flatten().map(|port| PortName {
            name: &port.spec.name,
            bridge: &port.spec.bridge,
            id: port.id,
            generation: port.generation,
            domain: port.domain,
        });
        look(&mut names)
    }

    /// Tells sessions whose attachment broke, moves the clock, forgets old stations. False: the switch has stopped.
    fn look_after(&self) -> bool {
        let (broken, age) = {
            let mut state = lock(&self.state);
            if state.stopped {
                return false;
            }
            let mut broken = Vec::new();
            for port in state.ports.iter_mut().flatten() {
                if port.poison.as_ref().is_some_and(|poison| poison.is_set()) {
                    port.poison = None;
                    broken.extend(port.session.clone());
                }
            }
            (broken, state.age)
        };
        broken.iter().for_each(|session| session.poisoned());
        let now = self.started.0.elapsed().as_secs() as u32 + 1;
        if self.shared.seconds.swap(now, Relaxed) != now {
            self.shared.fdb.age(now, age);
        }
        true
    }
}

/// A port's name with its numbers.
#[derive(Clone, Copy, Debug)]
pub struct PortName<'a> {
    /// Its name.
    pub name: &'a str,
    /// The bridge it belongs to.
    pub bridge: &'a str,
    /// Its number.
    pub id: PortId,
    /// The number's present owner.
    pub generation: u16,
    /// The bridge's domain.
    pub domain: Domain,
}

impl State {
    pub(super) fn port(&mut self, id: PortId) -> Option<&mut Port> {
        self.ports.get_mut(usize::from(id.0))?.as_mut()
    }

    pub(super) fn by_name(&mut self, name: &str) -> Result<&mut Port, Refusal> {
        let known: Vec<&str> = self
            .ports
            .iter()
            .flatten()
            .map(|port| port.spec.name.as_str())
            .collect();
        if !known.contains(&name) {
            return Err(Refusal::no_port(name, &known));
        }
        let port = self
            .ports
            .iter_mut()
            .flatten()
            .find(|port| port.spec.name == name);
        port.ok_or_else(|| Refusal::NotFound(format!("there is no port {name:?}")))
    }

    /// Takes a number for a new port.
    fn enter(&mut self, spec: &PortSpec, workers: &[WorkerHandle]) -> Result<PortId, Refusal> {
        let number = self
            .ports
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.ports.len());
        if number == PORTS_MAX {
            return Err(Refusal::Conflict(format!(
                "port {:?}: the switch has its {PORTS_MAX} ports: delete one first",
                spec.name
            )));
        }
        if number == self.ports.len() {
            self.ports.push(None);
            self.generations.push(0);
        }
        let bridge = self
            .bridges
            .iter()
            .position(|name| *name == spec.bridge)
            .unwrap_or_else(|| {
                self.bridges.push(spec.bridge.clone());
                self.bridges.len() - 1
            });
        self.generations[number] = self.generations[number].wrapping_add(1);
        let id = PortId(number as u16);
        let pairs = (0..usize::from(spec.queues)).map(|pair| Pair {
            worker: worker_for(spec, number, pair, workers),
            rx: Arc::default(),
            tx: Arc::default(),
            polled: false,
            exit: None,
        });
        self.ports[number] = Some(Port {
            spec: spec.clone(),
            id,
            generation: self.generations[number],
            domain: Domain(bridge as u16),
            pairs: pairs.collect(),
            report: SessionReport::default(),
            since: Instant::now(),
            connects: 0,
            put_out: PutOut::default(),
            poison: None,
            session: None,
            guard: guard(spec),
            files: Vec::new(),
        });
        Ok(id)
    }

    fn leave(&mut self, id: PortId) {
        self.forget_files(id);
        if let Some(port) = self.ports.get_mut(usize::from(id.0)).and_then(Option::take) {
            self.departed += &port.counters();
        }
    }
}

/// What the workers watch for, if the operator wants anything watched.
fn guard(spec: &PortSpec) -> Option<Arc<Guard>> {
    let wanted = !spec.mac.is_empty() || spec.stations + spec.moves + spec.floods > 0;
    wanted.then(|| {
        Arc::new(Guard {
            macs: spec.mac.clone().into(),
            stations: spec.stations,
            moves: Rate::new(spec.moves),
            floods: Rate::new(spec.floods),
        })
    })
}

/// The worker for a queue pair: the one asked for, or the next in turn.
fn worker_for(spec: &PortSpec, number: usize, pair: usize, workers: &[WorkerHandle]) -> usize {
    let asked = spec.workers.get(pair).or(spec.workers.last());
    asked
        .and_then(|cpu| workers.iter().position(|worker| worker.cpu == *cpu))
        .unwrap_or((number + pair) % workers.len())
}

impl Port {
    pub(super) fn exit(&self) -> Option<Exit> {
        let queues: Vec<Arc<dyn TxQueue>> = self
            .pairs
            .iter()
            .filter_map(|pair| pair.exit.clone())
            .map(WayOut::queue)
            .collect();
        (!queues.is_empty()).then_some(Exit {
            generation: self.generation,
            domain: self.domain,
            queues,
        })
    }

    pub(super) fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        for pair in &self.pairs {
            sum += &received(&pair.rx);
            sum += &sent(&pair.tx);
        }
        sum
    }
}

fn when_idle(idle: state::Idle) -> Idle {
    match idle {
        state::Idle::Poll => Idle::Poll,
        state::Idle::Adaptive => {
            let (start, at) = (tsc(), Instant::now());
            std::thread::sleep(Duration::from_millis(5));
            let hz = tsc().wrapping_sub(start) as f64 / at.elapsed().as_secs_f64();
            Idle::Adaptive {
                after: (hz * IDLE_AFTER.as_secs_f64()) as u64,
            }
        }
    }
}

fn spawn_worker(
    number: usize,
    cpu: usize,
    node: Option<usize>,
    shared: &Arc<Shared>,
    idle: Idle,
) -> Result<WorkerHandle> {
    let (bed, bell) = Bed::new().context("a worker cannot sleep: epoll or eventfd failed")?;
    let (mailbox, slot) = mailbox::mailbox(bell);
    let counters = Arc::<WorkerCounters>::default();
    let worker = (shared.clone(), counters.clone(), idle);
    let (told, pinned) = crossbeam::channel::bounded(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{cpu}"))
        .spawn(move || {
            let here = cpu::pin(cpu).map_err(anyhow::Error::from);
            // On its processor, whose memory is near, and before it may ask for none.
            let worker = Worker::new(number, worker.0, worker.1, slot, worker.2, Box::new(bed));
            let here = here.and_then(|()| {
                sandbox::restrict_worker().context("a worker cannot give up its system calls")
            });
            let ready = here.is_ok();
            let _ = told.send(here);
            if !ready {
                return Vec::new();
            }
            worker.run()
        })?;
    pinned.recv().context("a worker ended at once")??;
    Ok(WorkerHandle {
        cpu,
        node,
        mailbox,
        counters,
        thread: Mutex::new(Some(thread)),
    })
}

/// A port takes some 12 descriptors, so the usual soft limit of 1024 ends at about 80 ports: up to the hard one, then.
fn raise_open_files() {
    let now = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: now.maximum,
        ..now
    };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        log::warn!(
            "the limit of open files stays at {:?}: {error}",
            now.current
        );
    }
}

/// What workers call the watch with. Without AIO it finds out by itself.
fn alarm() -> Option<Arc<Call>> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    Some(Arc::new(Call::new(event.ok()?).ok()?))
}

/// Until the alarm is raised, or for as long as the watch may sleep.
fn pause(alarm: &Call) {
    let mut polled = [PollFd::new(alarm, PollFlags::IN)];
    let _ = poll(&mut polled, Timespec::try_from(WATCH).ok().as_ref());
    let _ = rustix::io::read(alarm, &mut [0; 8]);
}

fn spawn_watch(switch: &Arc<Switch>) -> Result<JoinHandle<()>> {
    let switch = Arc::downgrade(switch);
    let alarm = switch.upgrade().and_then(|switch| switch.alarm.clone());
    let watch = move || {
        while switch.upgrade().is_some_and(|switch| switch.look_after()) {
            match &alarm {
                Some(alarm) => pause(alarm),
                None => std::thread::sleep(WATCH),
            }
        }
    };
    Ok(std::thread::Builder::new()
        .name("watch".into())
        .spawn(watch)?)
}

fn failed(error: impl std::fmt::Display) -> Refusal {
    Refusal::Failed(error.to_string())
}

/// A control thread that panicked has changed nothing half: every change below a lock is a plain assignment.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
