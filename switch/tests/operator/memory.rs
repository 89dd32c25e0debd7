//! A switch that only remembers what it was told: what the API and the command line are tested against.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ringway::control::api::{Operator, Origin, Refusal};
use ringway::control::config::Config;
use ringway::control::plan::{apply, plan};
use ringway::control::serve::{Api, ApiSettings};
use ringway::control::spec::check_beside;
use ringway::control::state::{
    Applied, Counters, FdbAdd, FdbEntry, FdbFilter, FdbKind, FdbPage, FdbUse, PortSpec, PortState,
    PortStatus, PutOut, QueueMove, StatsReport, WorkerStatus,
};
use ringway::dataplane::eth::Mac;

#[derive(Default)]
struct State {
    config: Config,
    stations: Vec<FdbEntry>,
    moves: Vec<(String, QueueMove)>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Memory {
    state: Mutex<State>,
    /// How long `workers` takes to answer.
    slow: Duration,
}

/// A running API in a directory of its own.
pub(crate) struct Running {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) memory: Arc<Memory>,
    pub(crate) api: Api,
}

/// Starts an API with nothing behind it.
pub(crate) fn start(memory: Memory) -> Running {
    let dir = tempfile::tempdir().expect("a directory");
    let origin = Origin {
        file: Some(dir.path().join("ringway.toml")),
        ..Origin::default()
    };
    let settings = ApiSettings {
        origin,
        ..ApiSettings::private(dir.path().join("run/api.sock"))
    };
    let memory = Arc::new(memory);
    let api = Api::listen(settings)
        .and_then(|waiting| waiting.serve(memory.clone()))
        .expect("serves");
    Running { dir, memory, api }
}

fn status(spec: &PortSpec) -> PortStatus {
    PortStatus {
        spec: spec.clone(),
        state: PortState::Listening,
        reason: Some("no guest has connected yet: start the container".to_owned()),
        since_seconds: 1,
        connects: 0,
        put_out: PutOut::default(),
        peer: None,
        features: vec!["VERSION_1".to_owned()],
        protocol_features: vec![],
        memory: vec![],
        queues: vec![],
        counters: Counters::default(),
        uplink: None,
    }
}

impl Memory {
    /// One that takes its time.
    pub(crate) fn slow(slow: Duration) -> Memory {
        Memory {
            slow,
            ..Memory::default()
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn need(&self, name: &str) -> Result<PortSpec, Refusal> {
        let state = self.state();
        let names: Vec<&str> = state
            .config
            .ports
            .iter()
            .map(|port| port.name.as_str())
            .collect();
        let found = state.config.ports.iter().find(|port| port.name == name);
        found.cloned().ok_or_else(|| Refusal::no_port(name, &names))
    }

    /// Queue moves asked for so far.
    pub(crate) fn moves(&self) -> Vec<(String, QueueMove)> {
        self.state().moves.clone()
    }
}

impl FdbMatch for FdbFilter {
    fn matches(&self, entry: &FdbEntry) -> bool {
        self.bridge
            .as_ref()
            .is_none_or(|bridge| *bridge == entry.bridge)
            && self.port.as_ref().is_none_or(|port| *port == entry.port)
            && self.vlan.is_none_or(|vlan| vlan == entry.vlan)
            && self.mac.is_none_or(|mac| mac == entry.mac)
    }
}

trait FdbMatch {
    fn matches(&self, entry: &FdbEntry) -> bool;
}

impl Operator for Memory {
    fn config(&self) -> Config {
        self.state().config.clone()
    }

    fn apply(&self, wanted: Config) -> Result<Applied, Refusal> {
        let mut state = self.state();
        let actions = plan(&state.config, &wanted)?;
        let unchanged = wanted
            .ports
            .iter()
            .filter(|port| state.config.ports.contains(port))
            .count();
        actions
            .iter()
            .for_each(|action| apply(&mut state.config, action));
        Ok(Applied {
            actions: actions.iter().map(ToString::to_string).collect(),
            unchanged,
        })
    }

    fn ports(&self) -> Vec<PortStatus> {
        self.state().config.ports.iter().map(status).collect()
    }

    fn port(&self, name: &str) -> Result<PortStatus, Refusal> {
        self.need(name).map(|spec| status(&spec))
    }

    fn add_port(&self, spec: PortSpec) -> Result<PortStatus, Refusal> {
        let mut state = self.state();
        check_beside(&spec, &state.config.ports, None)
            .map_err(|error| Refusal::Conflict(error.0))?;
        state.config.ports.push(spec.clone());
        Ok(status(&spec))
    }

    fn del_port(&self, name: &str) -> Result<(), Refusal> {
        self.need(name)?;
        self.state().config.ports.retain(|port| port.name != name);
        Ok(())
    }

    fn move_queue(&self, port: &str, to: &QueueMove) -> Result<PortStatus, Refusal> {
        let spec = self.need(port)?;
        self.state().moves.push((port.to_owned(), to.clone()));
        Ok(status(&spec))
    }

    fn fdb(&self, filter: &FdbFilter, limit: usize) -> Result<FdbPage, Refusal> {
        let state = self.state();
        let matching: Vec<&FdbEntry> = state
            .stations
            .iter()
            .filter(|entry| filter.matches(entry))
            .collect();
        Ok(FdbPage {
            table: FdbUse {
                capacity: 65_536,
                used: state.stations.len() as u64,
                ..FdbUse::default()
            },
            matching: matching.len() as u64,
            entries: matching.into_iter().take(limit).cloned().collect(),
        })
    }

    fn fdb_flush(&self, filter: &FdbFilter) -> Result<u64, Refusal> {
        let mut state = self.state();
        let before = state.stations.len();
        state
            .stations
            .retain(|entry| entry.kind == FdbKind::Static || !filter.matches(entry));
        Ok((before - state.stations.len()) as u64)
    }

    fn fdb_add(&self, station: &FdbAdd) -> Result<(), Refusal> {
        let spec = self.need(&station.port)?;
        self.state().stations.push(FdbEntry {
            bridge: spec.bridge,
            vlan: station.vlan,
            mac: station.mac,
            port: station.port.clone(),
            age_seconds: None,
            kind: FdbKind::Static,
        });
        Ok(())
    }

    fn fdb_del(&self, mac: Mac, filter: &FdbFilter) -> Result<u64, Refusal> {
        let mut state = self.state();
        let before = state.stations.len();
        state
            .stations
            .retain(|entry| entry.mac != mac || !filter.matches(entry));
        Ok((before - state.stations.len()) as u64)
    }

    fn stats(&self) -> StatsReport {
        let state = self.state();
        let ports = state
            .config
            .ports
            .iter()
            .map(|port| (port.name.clone(), Counters::default()));
        StatsReport {
            uptime_seconds: 3.0,
            ports: ports.collect(),
            ..StatsReport::default()
        }
    }

    fn workers(&self) -> Vec<WorkerStatus> {
        std::thread::sleep(self.slow);
        Vec::new()
    }
}
