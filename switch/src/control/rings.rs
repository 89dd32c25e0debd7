//! Carries rings between the ports' sessions and the workers.

use std::any::Any;
use std::sync::{Arc, Weak};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::port_handle::{FileId, PeerId, PortHandle, Rings, SessionReport};
use super::ports::{Port, State};
use super::state::PortState;
use super::switch::{Switch, lock};
use crate::dataplane::eth::Mac;
use crate::dataplane::fdb::Flush;
use crate::dataplane::mailbox::QueueId;
use crate::dataplane::port_set::{PortId, Topology};
use crate::dataplane::queue::{RxQueue, TxQueue};
use crate::dataplane::worker::{RxSlot, Source};
use crate::port::ixgbevf::{FromWire, ToWire};
use crate::port::shared;
use crate::port::vhost::{FromGuest, ToGuest};

impl Switch {
    /// Shows the workers which ports can be sent to now. When it returns, nobody uses the old picture.
    fn show(&self, state: &mut State) -> Result<()> {
        let exits = state
            .ports
            .iter()
            .map(|port| port.as_ref().and_then(Port::exit))
            .collect();
        state.topology = Arc::new(Topology::new(exits));
        for worker in &self.workers {
            drop(worker.mailbox.show(state.topology.clone())?);
        }
        Ok(())
    }

    fn attach(&self, id: PortId, rings: Rings) -> Result<()> {
        let mut state = lock(&self.state);
        let Some(port) = state.port(id) else {
            bail!("the port is gone")
        };
        let mut slots = Vec::new();
        for (pair, mut queue) in rings.from_guest {
            let poison = queue.poison().clone();
            if let Some(alarm) = &self.alarm {
                queue.set_alarm(alarm.clone());
            }
            if let Some(slot) = port.slot(pair, Box::new(queue)) {
                port.poison = Some(poison);
                slots.push(slot);
            }
        }
        for (pair, queue) in rings.from_wire {
            slots.extend(port.slot(pair, Box::new(queue)));
        }
        for (pair, queue) in rings.to_guest {
            let Some(entry) = port.pairs.get_mut(usize::from(pair)) else {
                continue;
            };
            port.poison = Some(queue.poison().clone());
            let shared = shared::Shared::new(queue, entry.tx.clone());
            entry.exit = Some(WayOut::Guest(Arc::new(shared)));
        }
        for (pair, queue) in rings.to_wire {
            if let Some(entry) = port.pairs.get_mut(usize::from(pair)) {
                let shared = shared::Shared::new(queue, entry.tx.clone());
                entry.exit = Some(WayOut::Wire(Arc::new(shared)));
            }
        }
        self.show(&mut state)?;
        for (worker, slot) in slots {
            self.workers[worker].mailbox.attach(slot)?;
        }
        Ok(())
    }

    /// Takes a port's rings back: first nobody sends to it any more, then nobody polls it.
    pub(super) fn detach(&self, id: PortId) -> Rings {
        let mut rings = Rings::default();
        let mut state = lock(&self.state);
        let Some(port) = state.port(id) else {
            return rings;
        };
        port.poison = None;
        let mut exits = Vec::new();
        for (number, pair) in port.pairs.iter_mut().enumerate() {
            exits.extend(pair.exit.take().map(|exit| (number as u16, exit)));
            if std::mem::take(&mut pair.polled) {
                let queue = QueueId {
                    port: id,
                    pair: number as u16,
                };
                if let Ok(Some(slot)) = self.workers[pair.worker].mailbox.detach(queue) {
                    rings.take(number as u16, slot.queue);
                }
            }
        }
        if !exits.is_empty() && self.show(&mut state).is_err() {
            return rings; // the workers have stopped: whatever they hold goes with them
        }
        for (number, exit) in exits {
            // The workers have handed back every picture in which this exit stood.
            match exit {
                WayOut::Guest(exit) => rings
                    .to_guest
                    .extend(Arc::into_inner(exit).map(|exit| (number, exit.into_inner()))),
                WayOut::Wire(exit) => rings
                    .to_wire
                    .extend(Arc::into_inner(exit).map(|exit| (number, exit.into_inner()))),
            }
        }
        rings
    }

    /// Notes whose memory is at a port. A file of shared memory belongs to one process, however many ports that one has.
    fn claim(
        &self,
        id: PortId,
        peer: Option<PeerId>,
        files: &[FileId],
    ) -> std::result::Result<(), String> {
        let mut state = lock(&self.state);
        let honest = |other: &Claim| other.port == id || (peer.is_some() && other.peer == peer);
        let mut claims = files.iter().filter_map(|file| state.files.get(file));
        if let Some(other) = claims.find_map(|claims| claims.iter().find(|other| !honest(other))) {
            let other = other.port;
            let name = state.port(other).map(|port| port.spec.name.clone());
            return Err(format!(
                "the memory it shares is that of the guest of port {:?}, another process: each would read the other's frames; \
                 give each container memory of its own (a hugetlbfs mount per container, or --in-memory)",
                name.unwrap_or_default()
            ));
        }
        state.forget_files(id);
        for file in files {
            let claims = state.files.entry(*file).or_default();
            claims.push(Claim { port: id, peer });
        }
        if let Some(port) = state.port(id) {
            port.files = files.to_vec();
        }
        Ok(())
    }

    fn report(&self, id: PortId, report: SessionReport) {
        let mut state = lock(&self.state);
        let Some(port) = state.port(id) else { return };
        let up = |state| matches!(state, PortState::Connected | PortState::Forwarding);
        if port.report.state != report.state {
            port.since = Instant::now();
            port.connects += u64::from(up(report.state) && !up(port.report.state));
            if up(port.report.state) && !up(report.state) {
                self.shared.fdb.flush(Flush::Port(id));
            }
        }
        if report.state == PortState::Quarantined {
            port.put_out.guests += 1;
            port.put_out.last.clone_from(&report.reason);
        }
        port.report = report;
    }
}

/// A port's transmit queue, of either kind.
#[derive(Clone)]
pub(super) enum WayOut {
    /// A guest's receive ring.
    Guest(Arc<shared::Shared<ToGuest>>),
    /// A NIC's transmit queue.
    Wire(Arc<shared::Shared<ToWire>>),
}

impl WayOut {
    /// The queue as workers see it.
    pub(super) fn queue(self) -> Arc<dyn TxQueue> {
        match self {
            WayOut::Guest(queue) => queue,
            WayOut::Wire(queue) => queue,
        }
    }
}

impl Rings {
    /// A receive queue that came back from a worker.
    fn take(&mut self, pair: u16, queue: Box<dyn RxQueue>) {
        let queue: Box<dyn Any> = queue;
        match queue.downcast::<FromGuest>() {
            Ok(queue) => self.from_guest.push((pair, *queue)),
            Err(queue) => self.from_wire.extend(
                queue
                    .downcast::<FromWire>()
                    .ok()
                    .map(|queue| (pair, *queue)),
            ),
        }
    }
}

impl Port {
    /// A receive queue, with the number of the worker that shall poll it; none if the port has no such pair.
    fn slot(&mut self, pair: u16, queue: Box<dyn RxQueue>) -> Option<(usize, Box<RxSlot>)> {
        let entry = self.pairs.get_mut(usize::from(pair))?;
        entry.polled = true;
        let source = Source {
            id: QueueId {
                port: self.id,
                pair,
            },
            domain: self.domain,
            generation: self.generation,
            counters: entry.rx.clone(),
            guard: self.guard.clone(),
        };
        Some((entry.worker, Box::new(RxSlot::new(source, queue))))
    }
}

/// A port that has a file of shared memory, and the process behind it.
pub(super) struct Claim {
    port: PortId,
    peer: Option<PeerId>,
}

impl State {
    /// The memory at a port has gone.
    pub(super) fn forget_files(&mut self, id: PortId) {
        let files = self.port(id).map(|port| std::mem::take(&mut port.files));
        for file in files.unwrap_or_default() {
            if let Some(claims) = self.files.get_mut(&file) {
                claims.retain(|claim| claim.port != id);
                if claims.is_empty() {
                    self.files.remove(&file);
                }
            }
        }
    }
}

/// What a port's session holds of the switch.
pub(super) struct Handle {
    pub(super) switch: Weak<Switch>,
    pub(super) id: PortId,
    pub(super) generation: u16,
}

impl Handle {
    /// The switch, if this port is still the owner of its number.
    fn switch(&self) -> Option<Arc<Switch>> {
        let switch = self.switch.upgrade()?;
        let mine = lock(&switch.state)
            .port(self.id)
            .is_some_and(|port| port.generation == self.generation);
        mine.then_some(switch)
    }
}

impl PortHandle for Handle {
    fn attach(&self, rings: Rings) -> Result<()> {
        self.switch()
            .context("the port is gone")?
            .attach(self.id, rings)
    }

    fn detach(&self) -> Rings {
        match self.switch() {
            Some(switch) => switch.detach(self.id),
            None => Rings::default(),
        }
    }

    fn claim(&self, peer: Option<PeerId>, files: &[FileId]) -> std::result::Result<(), String> {
        match self.switch() {
            Some(switch) => switch.claim(self.id, peer, files),
            None => Ok(()),
        }
    }

    fn stations(&self) -> Vec<Mac> {
        let Some(switch) = self.switch() else {
            return Vec::new();
        };
        let domain = lock(&switch.state).port(self.id).map(|port| port.domain);
        let mut stations = Vec::new();
        switch.fdb().for_each(switch.seconds(), |key, station, _| {
            if Some(key.domain()) == domain && station.port != self.id {
                stations.push(key.mac());
            }
        });
        stations
    }

    fn report(&self, report: SessionReport) {
        if let Some(switch) = self.switch() {
            switch.report(self.id, report);
        }
    }
}
