//! The engine: owns ports and workers, and carries queues between their sessions and the workers.
//!
//! Three parties: the operator (API, configuration) adds and removes ports; each port's session attaches and detaches its
//! guest's rings; the workers poll them. All shared state is behind one mutex, held while workers answer their mail, never
//! while a session is started or stopped (its thread may be waiting for that mutex).

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Result;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::api::Refusal;
use super::config::Config;
use super::cpu;
use super::plan::{self, Action};
use super::ports::{PortName, State};
use super::rings::Handle;
use super::session::Session;
use super::spec::check_beside;
use super::state::PortSpec;
use super::threads::{WorkerHandle, alarm, spawn_watch, spawn_worker, when_idle};
use crate::dataplane::clock::tsc;
use crate::dataplane::fdb::{Fdb, FdbSettings, Flush, Key};
use crate::dataplane::mailbox::QueueId;
use crate::dataplane::port_set::PORTS_MAX;
use crate::dataplane::worker::Shared;
use crate::port::call::Call;

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
        if let Some(alarm) = &self.alarm {
            alarm.signal(); // ends the watch's pause
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
    pub(super) fn look_after(&self) -> bool {
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

fn failed(error: impl std::fmt::Display) -> Refusal {
    Refusal::Failed(error.to_string())
}

/// A control thread that panicked has changed nothing half: every change below a lock is a plain assignment.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
