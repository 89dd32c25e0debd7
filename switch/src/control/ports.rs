//! What the engine knows of its ports, behind its mutex.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::api::Refusal;
use super::port_handle::{FileId, SessionReport};
use super::rings::{Claim, WayOut};
use super::session::Session;
use super::state::{Counters, PortKind, PortSpec, PortState, PutOut, SocketMode};
use super::status::{received, sent};
use super::threads::WorkerHandle;
use crate::dataplane::counters::QueueCounters;
use crate::dataplane::guard::{Guard, Rate};
use crate::dataplane::port_set::{Domain, Exit, PORTS_MAX, PortId, Topology};
use crate::dataplane::queue::TxQueue;
use crate::virtio::guest_mem::Poison;

/// All ports, by number, and what they share.
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

/// One port: what was asked for, its queues, and what is known of its guest.
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
    pub(super) fn enter(
        &mut self,
        spec: &PortSpec,
        workers: &[WorkerHandle],
    ) -> Result<PortId, Refusal> {
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
            report: SessionReport {
                state: first_state(spec),
                ..SessionReport::default()
            },
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

    /// Gives it back; what it has counted stays.
    pub(super) fn leave(&mut self, id: PortId) {
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

/// Before the port's own thread has said anything.
fn first_state(spec: &PortSpec) -> PortState {
    match (spec.kind, spec.mode) {
        (PortKind::VhostUser, SocketMode::Server) => PortState::Listening,
        _ => PortState::Connecting,
    }
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
