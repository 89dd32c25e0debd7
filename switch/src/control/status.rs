//! What the switch tells of itself: ports, queues, workers, and the books.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use super::api::Refusal;
use super::ports::{Port, State};
use super::state::{Counters, PortStatus, QueueRef, QueueStatus, StatsReport, WorkerStatus};
use super::switch::{Switch, lock};
use crate::dataplane::clock::tsc;
use crate::dataplane::counters::{QueueCounters, Reason};

impl Switch {
    /// All ports, by name.
    pub fn ports(&self) -> Vec<PortStatus> {
        let state = lock(&self.state);
        let mut all: Vec<_> = state
            .ports
            .iter()
            .flatten()
            .map(|port| self.status(port))
            .collect();
        all.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        all
    }

    /// One port.
    pub fn port(&self, name: &str) -> Result<PortStatus, Refusal> {
        let mut state = lock(&self.state);
        Ok(self.status(state.by_name(name)?))
    }

    fn status(&self, port: &Port) -> PortStatus {
        let mut queues = Vec::new();
        for (pair, entry) in port.pairs.iter().enumerate() {
            for ring in port
                .report
                .rings
                .iter()
                .filter(|ring| usize::from(ring.pair) == pair)
            {
                let inward = ring.direction.inward();
                queues.push(QueueStatus {
                    pair: ring.pair,
                    direction: ring.direction,
                    ring: ring.kind,
                    size: ring.size,
                    enabled: ring.enabled,
                    worker: inward.then(|| self.workers[entry.worker].cpu),
                    counters: if inward {
                        received(&entry.rx)
                    } else {
                        sent(&entry.tx)
                    },
                });
            }
        }
        PortStatus {
            spec: port.spec.clone(),
            state: port.report.state,
            reason: port.report.reason.clone(),
            since_seconds: port.since.elapsed().as_secs(),
            connects: port.connects,
            put_out: port.put_out.clone(),
            peer: port.report.peer,
            features: port.report.features.clone(),
            protocol_features: port.report.protocol_features.clone(),
            memory: port.report.memory.clone(),
            queues,
            counters: port.counters(),
            uplink: port.report.uplink.clone(),
        }
    }

    /// All counters.
    pub fn stats(&self) -> StatsReport {
        let state = lock(&self.state);
        let elapsed = self.started.0.elapsed().as_secs_f64();
        let ports: BTreeMap<String, Counters> = state
            .ports
            .iter()
            .flatten()
            .map(|port| (port.spec.name.clone(), port.counters()))
            .collect();
        let mut total = state.departed.clone();
        ports.values().for_each(|port| total += port);
        let workers = (0..self.workers.len())
            .map(|number| self.worker(&state, number))
            .collect();
        let (departed, age) = (state.departed.clone(), state.age);
        drop(state); // a walk over the whole forwarding database follows: no session shall wait for it
        StatsReport {
            uptime_seconds: elapsed,
            tsc_hz: (tsc().wrapping_sub(self.started.1) as f64 / elapsed) as u64,
            total,
            departed,
            ports,
            workers,
            fdb: self.fdb_use(age),
        }
    }

    fn worker(&self, state: &State, number: usize) -> WorkerStatus {
        let (worker, mut queues) = (&self.workers[number], Vec::new());
        for port in state.ports.iter().flatten() {
            for (pair, _) in port
                .pairs
                .iter()
                .enumerate()
                .filter(|(_, pair)| pair.polled && pair.worker == number)
            {
                queues.push(QueueRef {
                    port: port.spec.name.clone(),
                    pair: pair as u16,
                });
            }
        }
        let counted = &worker.counters;
        WorkerStatus {
            cpu: worker.cpu,
            numa_node: worker.node,
            queues,
            turns: counted.passes.load(Relaxed),
            busy_turns: counted.bursts.load(Relaxed),
            cycles: counted.total_cycles.load(Relaxed),
            busy_cycles: counted.busy_cycles.load(Relaxed),
            sleeps: counted.sleeps.load(Relaxed),
            passes: counted.lengths.iter().map(|n| n.load(Relaxed)).collect(),
            counters: Counters {
                sent: counted.sent.load(Relaxed),
                ..received(&counted.received)
            },
        }
    }
}

pub(super) fn received(counted: &QueueCounters) -> Counters {
    Counters {
        received: counted.frames(),
        received_bytes: counted.bytes(),
        replicated: counted.replicated(),
        dropped: dropped(counted),
        ..Counters::default()
    }
}

pub(super) fn sent(counted: &QueueCounters) -> Counters {
    Counters {
        sent: counted.frames(),
        sent_bytes: counted.bytes(),
        dropped: dropped(counted),
        ..Counters::default()
    }
}

fn dropped(counted: &QueueCounters) -> BTreeMap<String, u64> {
    let named = Reason::ALL
        .iter()
        .map(|reason| (reason.name().to_owned(), counted.dropped(*reason)));
    named.filter(|(_, frames)| *frames > 0).collect()
}
