//! The wanted state: one TOML file, read strictly and as a whole, or not at all.
//!
//! Every refusal is one sentence: `ringway.toml:12: port "blue": queues cannot be 99: write a number from 1 to 16 queue pairs`.

use std::path::{Path, PathBuf};

use serde::Serialize;
use toml::de::DeTable;
use utoipa::ToSchema;

pub use super::keys::ConfigError;
use super::keys::{Entry, Raw, check_keys};
use super::spec::{check_beside, check_socket_path, list, port_from_entries, read_owner};
use super::state::{Idle, Owner, Permissions, PortSpec};
use super::toml_file::{Below, File};
use crate::control::cpu::HostCpus;
use crate::dataplane::port_set::PORTS_MAX;

/// Stations the forwarding table holds unless told otherwise.
pub const FDB_CAPACITY: u32 = 65_536;
/// Most stations it can be told to hold.
pub const FDB_CAPACITY_MAX: u32 = 1_000_000;
/// Seconds until a silent station is forgotten (802.1Q-2018 table 8-6).
pub const FDB_AGE: u32 = 300;
/// Most seconds of that (802.1Q-2018 table 8-6).
pub const FDB_AGE_MAX: u32 = 1_000_000;
/// Stations each port may always have, whatever the others send.
pub const FDB_RESERVED: u32 = 64;

/// All that an operator may want of a switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Config {
    /// Where the workers run.
    pub workers: Workers,
    /// What they do when there is nothing to do.
    pub idle: Idle,
    /// The control socket; none: [`default_api_path`].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub api: Option<PathBuf>,
    /// Permission bits of the control socket, `"0600"` unless told.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub api_mode: Option<Permissions>,
    /// Owner of the control socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub api_owner: Option<Owner>,
    /// The forwarding table.
    pub fdb: FdbSpec,
    /// The ports, in the order of the file.
    #[serde(rename = "port", skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortSpec>,
}

/// Where the workers run: one pinned worker per CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Workers {
    /// So many, on CPUs that Ringway chooses.
    Count(usize),
    /// On these CPUs.
    Cpus(Vec<usize>),
}

impl Default for Workers {
    fn default() -> Self {
        Workers::Count(1)
    }
}

/// Size and habits of the forwarding table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FdbSpec {
    /// Stations it holds.
    pub capacity: u32,
    /// Seconds until a silent station is forgotten; 0: never.
    pub age: u32,
    /// Stations each port may always have; beyond, the port with most stations loses one first.
    pub reserved: u32,
}

impl Default for FdbSpec {
    fn default() -> Self {
        FdbSpec {
            capacity: FDB_CAPACITY,
            age: FDB_AGE,
            reserved: FDB_RESERVED,
        }
    }
}

impl Config {
    /// Reads a file. `host` says which CPUs there are.
    pub fn load(path: &Path, host: &HostCpus) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            ConfigError(format!(
                "{}: cannot be read: {error}: name a configuration file that you may read",
                path.display()
            ))
        })?;
        Config::parse(&text, &path.display().to_string(), host)
    }

    /// Reads a text; `name` stands for the file in refusals.
    pub fn parse(text: &str, name: &str, host: &HostCpus) -> Result<Config, ConfigError> {
        let file = File { name, text };
        let table = DeTable::parse(text).map_err(|error| {
            let at = file.at(error.span().map_or(0, |span| span.start));
            ConfigError(format!(
                "{at}: this is not TOML: {}",
                error.message().replace('\n', ", ")
            ))
        })?;
        let entries = file.entries(table.get_ref());
        check_keys(
            &entries.plain,
            &[
                "workers",
                "idle",
                "api",
                "api-mode",
                "api-owner",
                "fdb",
                "port",
            ],
            "the file",
        )?;
        let mut draft = Draft::default();
        for entry in &entries.plain {
            match (entry.key.as_str(), entries.below(&entry.key)) {
                ("fdb", Below::Table(fdb)) => draft.config.fdb = read_fdb(&fdb.entries)?,
                ("fdb", _) => {
                    return Err(entry.refuse("must be one table: write [fdb] on a line of its own"));
                }
                ("port", Below::List(ports)) => {
                    for port in ports {
                        let spec = port_from_entries(&port.entries, &port.at)?;
                        draft.ports.push((port.at.clone(), spec));
                    }
                }
                ("port", _) => {
                    return Err(
                        entry.refuse("must be a list of tables: write [[port]] above each port")
                    );
                }
                (_, Below::Table(_)) => return Err(entry.refuse("is no table: write a value")),
                _ => draft.set(entry)?,
            }
        }
        draft.finish(host)
    }

    /// Builds a configuration without a file, from flags of the command line.
    pub fn from_flags(
        workers: Workers,
        idle: Idle,
        ports: Vec<(String, PortSpec)>,
        host: &HostCpus,
    ) -> Result<Config, ConfigError> {
        let config = Config {
            workers,
            idle,
            ..Config::default()
        };
        Draft {
            config,
            workers_at: "--cpus".to_owned(),
            ports,
            ..Draft::default()
        }
        .finish(host)
    }

    /// The file that reads as this configuration.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a Config has only what TOML can say")
    }

    /// The CPUs the workers run on: those named, or those chosen.
    pub fn worker_cpus(&self, host: &HostCpus) -> Vec<usize> {
        match &self.workers {
            Workers::Cpus(cpus) => cpus.clone(),
            Workers::Count(count) => host.choose(*count),
        }
    }

    /// Puts the control socket here, from now on for good.
    pub fn listen_at(&mut self, api: PathBuf) -> Result<(), ConfigError> {
        check_socket_path(&api)
            .map_err(|why| ConfigError(format!("the control socket (api) {why}")))?;
        match self.ports.iter().find(|port| port.socket == api) {
            Some(port) => Err(ConfigError(taken_by_api(port))),
            None => {
                self.api = Some(api);
                Ok(())
            }
        }
    }

    /// The control socket.
    pub fn api_path(&self) -> PathBuf {
        self.api.clone().unwrap_or_else(default_api_path)
    }
}

/// `$XDG_RUNTIME_DIR/ringway/api.sock` for a user who has such a directory, else (root, containers) `/run/ringway/api.sock`.
pub fn default_api_path() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let own = runtime.filter(|dir| dir.is_absolute() && !rustix::process::geteuid().is_root());
    own.unwrap_or_else(|| PathBuf::from("/run"))
        .join("ringway/api.sock")
}

fn taken_by_api(port: &PortSpec) -> String {
    let (name, socket) = (&port.name, port.socket.display());
    format!("port {name:?}: socket {socket} is the control socket's: give the port its own")
}

/// A configuration that is being read, with the places its parts came from.
#[derive(Default)]
struct Draft {
    config: Config,
    workers_at: String,
    api_at: String,
    ports: Vec<(String, PortSpec)>,
}

impl Draft {
    fn set(&mut self, entry: &Entry) -> Result<(), ConfigError> {
        match entry.key.as_str() {
            "workers" => {
                self.workers_at = format!("{}: workers", entry.at);
                self.config.workers = match entry.value {
                    Raw::Int(_) => Workers::Count(
                        entry.number(1..=1024, " workers, or a list of CPUs")? as usize,
                    ),
                    _ => Workers::Cpus(entry.cpus()?),
                };
            }
            "idle" => {
                self.config.idle =
                    entry.choice(&[("poll", Idle::Poll), ("adaptive", Idle::Adaptive)])?
            }
            "api" => {
                let path = entry.path()?;
                check_socket_path(&path).map_err(|why| entry.refuse(why))?;
                self.api_at = entry.at.clone();
                self.config.api = Some(path);
            }
            "api-mode" => self.config.api_mode = Some(Permissions(entry.permissions()?)),
            "api-owner" => self.config.api_owner = Some(read_owner(entry, Path::new("/etc"))?),
            _ => {} // tables are read by `Config::parse`
        }
        Ok(())
    }

    /// Checks what only the whole can tell.
    fn finish(self, host: &HostCpus) -> Result<Config, ConfigError> {
        let Draft {
            mut config,
            workers_at,
            api_at,
            ports,
        } = self;
        match &config.workers {
            Workers::Count(count) if *count > host.allowed.len() => {
                return Err(ConfigError(format!(
                    "{workers_at} asks for {count} workers, but this process may use {} only: ask for at most {}",
                    list(&host.allowed),
                    host.allowed.len()
                )));
            }
            Workers::Count(_) => {}
            Workers::Cpus(cpus) => host
                .check(cpus)
                .map_err(|why| ConfigError(format!("{workers_at} {why}")))?,
        }
        let worker_cpus = match &config.workers {
            Workers::Cpus(cpus) => Some(cpus.as_slice()),
            Workers::Count(_) => None,
        };
        for (at, spec) in ports {
            if worker_cpus.is_none() && !spec.workers.is_empty() {
                return Err(ConfigError(format!(
                    "{at}: port {:?}: workers names CPUs, but the switch chooses its own: set the top-level workers = {:?}",
                    spec.name, spec.workers
                )));
            }
            check_beside(&spec, &config.ports, worker_cpus)
                .map_err(|error| ConfigError(format!("{at}: {error}")))?;
            if config.api.as_ref() == Some(&spec.socket) {
                return Err(ConfigError(format!(
                    "{at}: {} (api at {api_at})",
                    taken_by_api(&spec)
                )));
            }
            config.ports.push(spec);
        }
        if config.ports.len() > PORTS_MAX {
            return Err(ConfigError(format!(
                "{} ports are too many: one switch has at most {PORTS_MAX}",
                config.ports.len()
            )));
        }
        Ok(config)
    }
}

fn read_fdb(entries: &[Entry]) -> Result<FdbSpec, ConfigError> {
    check_keys(entries, &["capacity", "age", "reserved"], "[fdb]")?;
    let mut fdb = FdbSpec::default();
    for entry in entries {
        let number = |max: u32, unit: &str| {
            entry
                .number(0..=i64::from(max), unit)
                .map(|number| number as u32)
        };
        match entry.key.as_str() {
            "capacity" => {
                fdb.capacity = entry.number(64..=i64::from(FDB_CAPACITY_MAX), " stations")? as u32;
            }
            "age" => fdb.age = number(FDB_AGE_MAX, " seconds (0: never)")?,
            _ => fdb.reserved = number(FDB_CAPACITY_MAX, " stations")?,
        }
    }
    if fdb.reserved > fdb.capacity {
        let at = entries
            .iter()
            .find(|entry| entry.key == "reserved")
            .or(entries.first());
        let at = at.map_or_else(String::new, |entry| entry.at.clone());
        return Err(ConfigError(format!(
            "{at}: reserved is {} stations for each port, but the table holds {}: lower it, or raise capacity",
            fdb.reserved, fdb.capacity
        )));
    }
    Ok(fdb)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::state::{Hugepages, SocketMode};
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, "r.toml", &HostCpus::of_size(8))
    }

    #[test]
    fn an_empty_file_is_a_switch_with_one_worker_and_no_port() {
        assert_eq!(parse(""), Ok(Config::default()));
    }

    #[test]
    fn reads_ports_in_the_order_of_the_file() {
        let text = "
            workers = [2, 3]
            idle = \"adaptive\"
            [fdb]
            age = 0
            [[port]]
            name = \"red\"
            type = \"vhost-user\"
            socket = \"/run/red\"
            [[port]]
            name = \"blue\"
            type = \"vhost-user\"
            socket = \"/run/blue\"
            mode = \"client\"
            workers = [3]";
        let config = parse(text).expect("legal");
        assert_eq!(config.workers, Workers::Cpus(vec![2, 3]));
        assert_eq!(
            (config.idle, config.fdb.age, config.fdb.capacity),
            (Idle::Adaptive, 0, FDB_CAPACITY)
        );
        let blue = PortSpec {
            mode: SocketMode::Client,
            workers: vec![3],
            ..PortSpec::vhost_user("blue", "/run/blue")
        };
        assert_eq!(
            config.ports,
            [PortSpec::vhost_user("red", "/run/red"), blue]
        );
    }

    prop_compose! {
        pub(crate) fn any_port(name: String)(
            socket in "/run/[a-z]{1,6}/[a-z]{1,6}",
            client in any::<bool>(),
            queues in 1u16..=16,
            mtu in 68u32..=65_535,
            huge in any::<bool>(),
            bits in proptest::option::of(0u32..=0o777),
            uid in proptest::option::of(any::<u32>()),
            worker in proptest::option::of(0usize..8),
        ) -> PortSpec {
            PortSpec {
                mode: if client { SocketMode::Client } else { SocketMode::Server },
                queues,
                mtu,
                hugepages: if huge { Hugepages::Required } else { Hugepages::Any },
                socket_mode: bits.filter(|_| !client).map(Permissions),
                socket_owner: uid.filter(|_| !client).map(|uid| Owner { uid: Some(uid), gid: None }),
                workers: worker.into_iter().collect(),
                ..PortSpec::vhost_user(name.clone(), format!("{socket}-{name}"))
            }
        }
    }

    proptest! {
        #[test]
        fn reads_back_what_it_writes(
            blue in any_port("blue".into()),
            red in any_port("red".into()),
            capacity in 64u32..=FDB_CAPACITY_MAX,
            age in 0u32..1000,
        ) {
            let config = Config {
                workers: Workers::Cpus((0..8).collect()),
                idle: Idle::Adaptive,
                api: Some("/run/ringway/api.sock".into()),
                api_mode: Some(Permissions(0o660)),
                api_owner: Some(Owner { uid: None, gid: Some(7) }),
                fdb: FdbSpec { capacity, age, reserved: 3 },
                ports: vec![blue, red],
            };
            prop_assert_eq!(parse(&config.to_toml()), Ok(config));
        }

        #[test]
        fn no_text_makes_it_panic(text in "[a-z\\[\\]=\"\n .{},0-9]{0,60}") {
            let _ = parse(&text);
        }
    }
}
