//! From what is to what is wanted: pure, so that it can be shown before it is done, and tested without a switch.

use std::fmt;

use serde::Serialize;

use super::config::{Config, ConfigError, FdbSpec};
use super::state::{Idle, PortSpec};

/// One step. The steps of a plan are done in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Takes a port away.
    DelPort(String),
    /// Takes a port away and brings it back with other options: its guest has to connect again.
    ReplacePort(PortSpec),
    /// Brings a port.
    AddPort(PortSpec),
    /// Seconds until a silent station is forgotten.
    SetFdbAge(u32),
    /// Stations each port may always have.
    SetFdbReserved(u32),
    /// What workers do when there is nothing to do.
    SetIdle(Idle),
}

impl Action {
    /// True if a port of the new configuration is touched by it.
    pub fn adds_a_port(&self) -> bool {
        matches!(self, Action::AddPort(_) | Action::ReplacePort(_))
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::DelPort(name) => write!(f, "delete port {name:?}"),
            Action::ReplacePort(spec) => {
                write!(f, "replace port {:?}: its guest connects again", spec.name)
            }
            Action::AddPort(spec) => {
                write!(f, "add port {:?} at {}", spec.name, spec.place())
            }
            Action::SetFdbAge(0) => f.write_str("never forget stations"),
            Action::SetFdbAge(seconds) => write!(f, "forget stations after {seconds} s"),
            Action::SetFdbReserved(stations) => {
                write!(f, "reserve {stations} stations for each port")
            }
            Action::SetIdle(Idle::Poll) => f.write_str("poll when idle"),
            Action::SetIdle(Idle::Adaptive) => f.write_str("sleep when idle"),
        }
    }
}

/// The steps from `old` to `new`, or a sentence that names the key which needs a restart. Ports that are equal in both are not touched.
pub fn plan(old: &Config, new: &Config) -> Result<Vec<Action>, ConfigError> {
    let fixed = [
        ("workers", old.workers == new.workers),
        ("api", old.api == new.api),
        ("api-mode", old.api_mode == new.api_mode),
        ("api-owner", old.api_owner == new.api_owner),
        ("fdb.capacity", old.fdb.capacity == new.fdb.capacity),
    ];
    if let Some((key, _)) = fixed.iter().find(|(_, same)| !same) {
        return Err(ConfigError(format!(
            "{key} cannot change while the switch runs: set it back, or restart ringway; nothing was changed"
        )));
    }
    let was = |name: &str| old.ports.iter().find(|port| port.name == name);
    let gone = old
        .ports
        .iter()
        .filter(|port| !new.ports.iter().any(|new| new.name == port.name));
    let mut actions: Vec<Action> = gone
        .map(|port| Action::DelPort(port.name.clone()))
        .collect();
    let (mut replaced, mut added) = (Vec::new(), Vec::new());
    for port in &new.ports {
        match was(&port.name) {
            None => added.push(Action::AddPort(port.clone())),
            Some(old_port) if old_port == port => {}
            // Its new socket is another port's until that one is gone or has moved: leave first, come back last.
            Some(_)
                if old
                    .ports
                    .iter()
                    .any(|other| other.name != port.name && other.place() == port.place()) =>
            {
                actions.push(Action::DelPort(port.name.clone()));
                added.push(Action::AddPort(port.clone()));
            }
            Some(_) => replaced.push(Action::ReplacePort(port.clone())),
        }
    }
    actions.extend(replaced);
    actions.extend(added);
    actions.extend((old.fdb.age != new.fdb.age).then_some(Action::SetFdbAge(new.fdb.age)));
    actions.extend(
        (old.fdb.reserved != new.fdb.reserved).then_some(Action::SetFdbReserved(new.fdb.reserved)),
    );
    actions.extend((old.idle != new.idle).then_some(Action::SetIdle(new.idle)));
    Ok(actions)
}

/// What a configuration is after a step.
pub fn apply(config: &mut Config, action: &Action) {
    match action {
        Action::DelPort(name) => config.ports.retain(|port| port.name != *name),
        Action::ReplacePort(spec) => config
            .ports
            .iter_mut()
            .filter(|port| port.name == spec.name)
            .for_each(|port| {
                *port = spec.clone();
            }),
        Action::AddPort(spec) => config.ports.push(spec.clone()),
        Action::SetFdbAge(age) => {
            config.fdb = FdbSpec {
                age: *age,
                ..config.fdb.clone()
            }
        }
        Action::SetFdbReserved(reserved) => {
            config.fdb = FdbSpec {
                reserved: *reserved,
                ..config.fdb.clone()
            }
        }
        Action::SetIdle(idle) => config.idle = *idle,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::config::Workers;
    use super::super::spec::check_beside;
    use super::*;

    /// Few names and few sockets, so that ports take over each other's.
    fn any_config() -> impl Strategy<Value = Config> {
        let ports = proptest::collection::vec((0usize..6, 0usize..6, 1u16..3), 0..6);
        (ports, 0u32..3, 0u32..3, any::<bool>()).prop_map(|(ports, age, reserved, sleep)| {
            let mut config = Config {
                idle: if sleep { Idle::Adaptive } else { Idle::Poll },
                ..Config::default()
            };
            config.fdb = FdbSpec {
                age,
                reserved,
                ..config.fdb
            };
            for (name, socket, queues) in ports {
                let spec = PortSpec {
                    queues,
                    ..PortSpec::vhost_user(format!("p{name}"), format!("/s{socket}"))
                };
                if check_beside(&spec, &config.ports, None).is_ok() {
                    config.ports.push(spec);
                }
            }
            config
        })
    }

    fn by_name(config: &Config) -> BTreeMap<&str, &PortSpec> {
        config
            .ports
            .iter()
            .map(|port| (port.name.as_str(), port))
            .collect()
    }

    proptest! {
        #[test]
        fn nothing_to_do_for_what_is_there(config in any_config()) {
            prop_assert_eq!(plan(&config, &config), Ok(vec![]));
        }

        #[test]
        fn leads_to_what_is_wanted_without_two_ports_on_one_socket_on_the_way(old in any_config(), new in any_config()) {
            let mut now = old.clone();
            for action in plan(&old, &new).expect("no fixed key differs") {
                if let Action::AddPort(spec) | Action::ReplacePort(spec) = &action {
                    let others = now.ports.iter().filter(|port| matches!(action, Action::AddPort(_)) || port.name != spec.name);
                    prop_assert_eq!(check_beside(spec, others, None), Ok(()));
                }
                let before = now.clone();
                apply(&mut now, &action);
                prop_assert_ne!(before, now.clone(), "{} changed nothing", action);
            }
            prop_assert_eq!(by_name(&now), by_name(&new));
            prop_assert_eq!((now.fdb, now.idle), (new.fdb, new.idle));
        }

        #[test]
        fn never_touches_an_unchanged_port(old in any_config(), new in any_config()) {
            for action in plan(&old, &new).expect("no fixed key differs") {
                let name = match &action {
                    Action::DelPort(name) => name,
                    Action::AddPort(spec) | Action::ReplacePort(spec) => &spec.name,
                    _ => continue,
                };
                let (was, wanted) = (by_name(&old), by_name(&new));
                prop_assert_ne!(was.get(name.as_str()), wanted.get(name.as_str()));
            }
        }
    }

    #[test]
    fn names_the_key_that_needs_a_restart() {
        let old = Config::default();
        let refusal = |new: Config| plan(&old, &new).expect_err("needs a restart").to_string();
        assert_eq!(
            refusal(Config {
                workers: Workers::Count(2),
                ..old.clone()
            }),
            "workers cannot change while the switch runs: set it back, or restart ringway; nothing was changed"
        );
        assert!(
            refusal(Config {
                api: Some("/a".into()),
                ..old.clone()
            })
            .starts_with("api cannot change")
        );
        let fdb = FdbSpec {
            capacity: 64,
            ..old.fdb.clone()
        };
        assert!(refusal(Config { fdb, ..old.clone() }).starts_with("fdb.capacity cannot change"));
    }
}
