//! The switch as the API's [`Operator`]: names to numbers, and refusals in sentences.

use super::api::{Operator, Refusal};
use super::config::Config;
use super::state::{
    Applied, FdbAdd, FdbEntry, FdbFilter, FdbKind, FdbPage, FdbUse, PortSpec, PortStatus,
    QueueMove, StatsReport, WorkerStatus,
};
use super::switch::Switch;
use crate::dataplane::eth::Mac;
use crate::dataplane::fdb::{Key, Station};
use crate::dataplane::port_set::{Domain, PortId};

impl Operator for Switch {
    fn config(&self) -> Config {
        Switch::config(self)
    }

    fn apply(&self, wanted: Config) -> Result<Applied, Refusal> {
        let actions = Switch::apply(self, &wanted)?;
        let touched = actions.iter().filter(|action| action.adds_a_port()).count();
        Ok(Applied {
            unchanged: wanted.ports.len().saturating_sub(touched),
            actions: actions.iter().map(ToString::to_string).collect(),
        })
    }

    fn ports(&self) -> Vec<PortStatus> {
        Switch::ports(self)
    }

    fn port(&self, name: &str) -> Result<PortStatus, Refusal> {
        Switch::port(self, name)
    }

    fn add_port(&self, spec: PortSpec) -> Result<PortStatus, Refusal> {
        let name = spec.name.clone();
        Switch::add_port(self, spec)?;
        Switch::port(self, &name)
    }

    fn del_port(&self, name: &str) -> Result<(), Refusal> {
        Switch::del_port(self, name)
    }

    fn move_queue(&self, port: &str, to: &QueueMove) -> Result<PortStatus, Refusal> {
        Switch::move_queue(self, port, to.pair, to.worker)?;
        Switch::port(self, port)
    }

    fn fdb(&self, filter: &FdbFilter, limit: usize) -> Result<FdbPage, Refusal> {
        let names = Names::of(self);
        names.check(filter)?;
        let mut page = FdbPage {
            table: self.stats().fdb,
            ..FdbPage::default()
        };
        Switch::fdb(self).for_each(self.seconds(), |key, station, age| {
            if let Some(entry) = names.entry(key, station, age)
                && matches(filter, &entry)
            {
                page.matching += 1;
                if page.entries.len() < limit {
                    page.entries.push(entry);
                }
            }
        });
        page.entries
            .sort_by(|a, b| (&a.bridge, a.mac).cmp(&(&b.bridge, b.mac)));
        Ok(page)
    }

    fn fdb_flush(&self, filter: &FdbFilter) -> Result<u64, Refusal> {
        self.remove(filter, |entry| entry.kind == FdbKind::Learned)
    }

    fn fdb_add(&self, station: &FdbAdd) -> Result<(), Refusal> {
        if station.vlan != 0 {
            return Err(Refusal::Invalid(format!(
                "station {}: bridges do not tell VLANs apart yet: leave vlan out",
                station.mac
            )));
        }
        let names = Names::of(self);
        let port = names.by_name(&station.port)?;
        let key = Key::new(port.domain, station.mac);
        Switch::fdb(self)
            .add_static(key, port.id, port.generation)
            .map_err(|error| Refusal::Conflict(format!("station {}: {error}", station.mac)))
    }

    fn fdb_del(&self, mac: Mac, filter: &FdbFilter) -> Result<u64, Refusal> {
        let filter = FdbFilter {
            mac: Some(mac),
            ..filter.clone()
        };
        match self.remove(&filter, |_| true)? {
            0 => Err(Refusal::NotFound(format!(
                "there is no station {mac}: `ringway fdb show` lists those there are"
            ))),
            removed => Ok(removed),
        }
    }

    fn stats(&self) -> StatsReport {
        Switch::stats(self)
    }

    fn workers(&self) -> Vec<WorkerStatus> {
        Switch::stats(self).workers
    }
}

impl Switch {
    /// Removes the stations that match `filter` and `also`.
    fn remove(&self, filter: &FdbFilter, also: impl Fn(&FdbEntry) -> bool) -> Result<u64, Refusal> {
        let names = Names::of(self);
        names.check(filter)?;
        let mut keys = Vec::new();
        Switch::fdb(self).for_each(self.seconds(), |key, station, age| {
            let entry = names.entry(key, station, age);
            // Stations of a port that is gone match a flush without conditions.
            let wanted = match &entry {
                Some(entry) => matches(filter, entry) && also(entry),
                None => *filter == FdbFilter::default(),
            };
            if wanted {
                keys.push(key);
            }
        });
        Ok(keys
            .into_iter()
            .filter(|key| Switch::fdb(self).remove(*key))
            .count() as u64)
    }

    /// How full the forwarding database is.
    pub(super) fn fdb_use(&self, age: u32) -> FdbUse {
        let mut fixed = 0;
        let fdb = Switch::fdb(self);
        fdb.for_each(self.seconds(), |_, station, _| {
            fixed += u64::from(station.is_static)
        });
        FdbUse {
            capacity: self.fdb_capacity,
            used: fdb.len() as u64,
            fixed,
            age,
        }
    }
}

fn matches(filter: &FdbFilter, entry: &FdbEntry) -> bool {
    filter
        .bridge
        .as_ref()
        .is_none_or(|bridge| *bridge == entry.bridge)
        && filter.port.as_ref().is_none_or(|port| *port == entry.port)
        && filter.vlan.is_none_or(|vlan| vlan == entry.vlan)
        && filter.mac.is_none_or(|mac| mac == entry.mac)
}

struct Named {
    name: String,
    bridge: String,
    id: PortId,
    generation: u16,
    domain: Domain,
}

/// The names that stand behind the numbers of the forwarding database.
struct Names(Vec<Named>);

impl Names {
    fn of(switch: &Switch) -> Names {
        Names(switch.with_ports(|ports| {
            ports
                .map(|port| Named {
                    name: port.name.to_owned(),
                    bridge: port.bridge.to_owned(),
                    id: port.id,
                    generation: port.generation,
                    domain: port.domain,
                })
                .collect()
        }))
    }

    fn by_name(&self, name: &str) -> Result<&Named, Refusal> {
        let names: Vec<&str> = self.0.iter().map(|port| port.name.as_str()).collect();
        self.0
            .iter()
            .find(|port| port.name == name)
            .ok_or_else(|| Refusal::no_port(name, &names))
    }

    fn check(&self, filter: &FdbFilter) -> Result<(), Refusal> {
        if let Some(port) = &filter.port {
            self.by_name(port)?;
        }
        match &filter.bridge {
            Some(bridge) if !self.0.iter().any(|port| port.bridge == *bridge) => Err(
                Refusal::NotFound(format!("no port belongs to a bridge {bridge:?}")),
            ),
            _ => Ok(()),
        }
    }

    fn entry(&self, key: Key, station: Station, age: u32) -> Option<FdbEntry> {
        let port = self
            .0
            .iter()
            .find(|port| port.id == station.port && port.generation == station.generation)?;
        Some(FdbEntry {
            bridge: port.bridge.clone(),
            vlan: 0,
            mac: key.mac(),
            port: port.name.clone(),
            age_seconds: (!station.is_static).then_some(age),
            kind: if station.is_static {
                FdbKind::Static
            } else {
                FdbKind::Learned
            },
        })
    }
}
