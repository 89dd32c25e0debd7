//! `ringway port`.

use std::path::Path;

use clap::{Args, Subcommand};

use super::client::{Client, escape};
use super::table::{Output, count, duration, size, table};
use crate::control::spec::parse_port;
use crate::control::state::{
    Counters, Direction, PortSpec, PortState, PortStatus, QueueMove, QueueStatus, RingKind,
    SocketMode, UplinkStatus,
};

/// What to do with ports.
#[derive(Debug, Subcommand)]
pub(super) enum PortCommand {
    /// Add a port: type:name,key=value,...
    #[command(after_help = "\
Keys: socket (needed), mode=server|client, queues=1..16, bridge, mtu, hugepages=any|required, socket-mode=0660,
socket-owner=user:group, workers=2+3; of an uplink (ixgbevf): device or vfio-user in place of socket, queues=1|2|4.
configs/all-options.toml explains each.

Examples:
  ringway port add vhost-user:blue,socket=/run/ringway/ports/blue/vhost.sock
  ringway port add vhost-user:green,socket=/run/r/green.sock,mode=client,queues=2
  ringway port add ixgbevf:uplink,device=0000:81:10.0")]
    Add {
        /// The port.
        #[arg(value_name = "TYPE:NAME,KEY=VALUE,...")]
        port: String,
    },
    /// Delete a port; its guest loses its link at once.
    Del {
        /// The port.
        name: String,
    },
    /// List ports with state and counters.
    List,
    /// Show all there is to know about a port.
    Show {
        /// The port.
        name: String,
    },
    /// Let another worker poll a queue pair of a port.
    #[command(after_help = "Example:\n  ringway port move blue --pair 0 --worker 3")]
    Move(MoveArgs),
}

/// Which queue pair, and where.
#[derive(Debug, Args)]
pub(super) struct MoveArgs {
    /// The port.
    name: String,
    /// Queue pair, from 0.
    #[arg(long, default_value_t = 0)]
    pair: u16,
    /// CPU of the worker.
    #[arg(long, value_name = "CPU")]
    worker: usize,
}

pub(super) fn run(command: &PortCommand, client: &Client, output: Output) -> anyhow::Result<()> {
    let at = |name: &str| format!("/v1/ports/{}", escape(name));
    match command {
        PortCommand::Add { port } => {
            let spec = parse_port(
                &absolute_socket(port, &std::env::current_dir()?),
                "port add",
            )?;
            let added: PortStatus = client.post("/v1/ports", &spec)?;
            output.show(&added, |port| {
                let (state, place) = (port.state, port.spec.place());
                let at = match state {
                    PortState::Connecting => "to",
                    _ => "at",
                };
                format!("added port {:?}: {state} {at} {place}\n", port.spec.name)
            })
        }
        PortCommand::Del { name } => {
            client.delete::<()>(&at(name))?;
            output.show(&serde_json::json!({ "deleted": name }), |_| {
                format!("deleted port {name:?}\n")
            })
        }
        PortCommand::List => output.show(&client.get::<Vec<PortStatus>>("/v1/ports")?, |ports| {
            list(ports)
        }),
        PortCommand::Show { name } => output.show(&client.get::<PortStatus>(&at(name))?, show),
        PortCommand::Move(MoveArgs { name, pair, worker }) => {
            let to = QueueMove {
                pair: *pair,
                worker: *worker,
            };
            let moved: PortStatus = client.post(&format!("{}/move", at(name)), &to)?;
            output.show(&moved, |port| queues(&port.queues))
        }
    }
}

/// The port text with the socket's path whole: the switch may run in another directory than this command.
pub(super) fn absolute_socket(text: &str, directory: &Path) -> String {
    let parts = text.split(',').map(|part| match part.split_once('=') {
        Some((key @ ("socket" | "vfio-user"), path))
            if !path.is_empty() && !path.contains("..") =>
        {
            format!("{key}={}", directory.join(path).display())
        }
        _ => part.to_owned(),
    });
    parts.collect::<Vec<_>>().join(",")
}

fn list(ports: &[PortStatus]) -> String {
    if ports.is_empty() {
        return "no ports: add one with ringway port add vhost-user:blue,socket=/run/r/blue.sock\n"
            .to_owned();
    }
    let head = [
        "NAME", "STATE", "BRIDGE", "PAIRS", "RECEIVED", "SENT", "DROPPED", "SOCKET",
    ];
    let mut text = table(
        &head,
        ports.iter().map(|port| {
            vec![
                port.spec.name.clone(),
                port.state.to_string(),
                port.spec.bridge.clone(),
                format!("{}/{}", running_pairs(&port.queues), port.spec.queues),
                count(port.counters.received),
                count(port.counters.sent),
                count(port.counters.dropped_total()),
                socket(&port.spec),
            ]
        }),
    );
    for port in ports {
        if let Some(reason) = &port.reason {
            text += &format!("{}: {reason}\n", port.spec.name);
        }
    }
    text
}

fn running_pairs(queues: &[QueueStatus]) -> usize {
    queues
        .iter()
        .filter(|queue| queue.direction.inward() && queue.enabled)
        .count()
}

fn socket(spec: &PortSpec) -> String {
    let who = match spec.mode {
        SocketMode::Server => "",
        SocketMode::Client => " (guest listens)",
    };
    format!("{}{who}", spec.place())
}

fn show(port: &PortStatus) -> String {
    let spec = &port.spec;
    let joined = |names: &[String]| {
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(" ")
        }
    };
    let mut lines = vec![
        ("port", spec.name.clone()),
        (
            "state",
            format!("{} for {}", port.state, duration(port.since_seconds)),
        ),
        ("socket", socket(spec)),
        ("bridge", spec.bridge.clone()),
        ("mtu", spec.mtu.to_string()),
        ("connects", port.connects.to_string()),
        ("features", joined(&port.features)),
        ("protocol", joined(&port.protocol_features)),
    ];
    if let Some(reason) = &port.reason {
        lines.insert(2, ("reason", reason.clone()));
    }
    if let Some(last) = &port.put_out.last {
        lines.push((
            "put out",
            format!("{}, the last: {last}", port.put_out.guests),
        ));
    }
    if let Some(peer) = &port.peer {
        lines.push((
            "peer",
            format!("pid {} uid {} gid {}", peer.pid, peer.uid, peer.gid),
        ));
    }
    let mut text: String = lines
        .iter()
        .map(|(key, value)| format!("{key:<10} {value}\n"))
        .collect();
    if !port.memory.is_empty() {
        text += "\n";
        text += &table(
            &["MEMORY AT", "SIZE", "PAGES", "ARMED"],
            port.memory.iter().map(|region| {
                let armed = if region.armed { "yes" } else { "no" };
                vec![
                    format!("{:#x}", region.guest_address),
                    size(region.size),
                    size(region.page_size),
                    armed.to_owned(),
                ]
            }),
        );
    }
    if !port.queues.is_empty() {
        text += "\n";
        text += &queues(&port.queues);
    }
    if let Some(status) = &port.uplink {
        text += &uplink(status);
    }
    text + &drops(&port.counters)
}

fn uplink(status: &UplinkStatus) -> String {
    let mac = status.mac.map_or("-".to_owned(), |mac| mac.to_string());
    let link = match status.link_mbit {
        0 => "none".to_owned(),
        mbit => format!("{} Mbit/s", count(mbit.into())),
    };
    let mut text = format!(
        "\nVF {mac}, mailbox {}, link {link}, frames up to {} bytes; the PF delivers {} stations, refused {} times; started over {} times\n",
        status.api,
        status.frame_max,
        count(status.registered),
        count(status.refusals),
        count(status.restarts),
    );
    if !status.refused.is_empty() {
        text += "\n";
        let refused = status.refused.iter();
        text += &table(
            &["REFUSED BY THE PF", "REMEDY"],
            refused.map(|address| vec![address.mac.to_string(), address.remedy.clone()]),
        );
    }
    text
}

fn queues(queues: &[QueueStatus]) -> String {
    let head = [
        "PAIR",
        "DIRECTION",
        "RING",
        "SIZE",
        "ENABLED",
        "WORKER",
        "FRAMES",
        "BYTES",
        "DROPPED",
    ];
    table(
        &head,
        queues.iter().map(|queue| {
            let counters = &queue.counters;
            let direction = match queue.direction {
                Direction::FromGuest => "from guest",
                Direction::ToGuest => "to guest",
                Direction::FromWire => "from wire",
                Direction::ToWire => "to wire",
            };
            let (frames, bytes) = match queue.direction.inward() {
                true => (counters.received, counters.received_bytes),
                false => (counters.sent, counters.sent_bytes),
            };
            let ring = match queue.ring {
                RingKind::Split => "split",
                RingKind::Packed => "packed",
                RingKind::Nic => "82599",
            };
            vec![
                queue.pair.to_string(),
                direction.to_owned(),
                ring.to_owned(),
                queue.size.to_string(),
                if queue.enabled { "yes" } else { "no" }.to_owned(),
                queue.worker.map_or("any".to_owned(), |cpu| cpu.to_string()),
                count(frames),
                count(bytes),
                count(counters.dropped_total()),
            ]
        }),
    )
}

fn drops(counters: &Counters) -> String {
    let rows: Vec<_> = counters
        .dropped
        .iter()
        .filter(|(_, frames)| **frames > 0)
        .map(|(reason, frames)| vec![reason.clone(), count(*frames)])
        .collect();
    if rows.is_empty() {
        String::new()
    } else {
        format!("\n{}", table(&["DROPPED BECAUSE", "FRAMES"], rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::state::{PortState, PutOut, RefusedAddress};
    use crate::dataplane::eth::Mac;

    #[test]
    fn makes_a_relative_socket_whole() {
        let text = absolute_socket("vhost-user:b,socket=b.sock,queues=2", Path::new("/run/x"));
        assert_eq!(text, "vhost-user:b,socket=/run/x/b.sock,queues=2");
        assert_eq!(
            absolute_socket("vhost-user:b,socket=/b", Path::new("/run")),
            "vhost-user:b,socket=/b"
        );
    }

    #[test]
    fn shows_the_reason_why_a_port_does_not_forward() {
        let port = PortStatus {
            spec: PortSpec {
                mode: SocketMode::Client,
                ..PortSpec::vhost_user("blue", "/run/blue")
            },
            state: PortState::Connecting,
            reason: Some("nobody listens: start the container".into()),
            since_seconds: 61,
            connects: 0,
            put_out: PutOut {
                guests: 3,
                last: Some("descriptor for the wrong direction".into()),
            },
            peer: None,
            features: vec![],
            protocol_features: vec![],
            memory: vec![],
            queues: vec![],
            counters: Counters {
                dropped: [("port_down".to_owned(), 4321)].into(),
                ..Counters::default()
            },
            uplink: None,
        };
        let text = show(&port);
        for part in [
            "connecting for 1m 01s",
            "nobody listens: start the container",
            "(guest listens)",
            "port_down",
            "4,321",
            "3, the last: descriptor for the wrong direction",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(list(&[port]).ends_with("blue: nobody listens: start the container\n"));
        let refused = UplinkStatus {
            link_mbit: 10_000,
            refused: vec![RefusedAddress {
                mac: Mac::from_bytes([2, 0, 0, 0, 0, 7]),
                remedy: "set trust on".to_owned(),
            }],
            refusals: 3,
            ..UplinkStatus::default()
        };
        let text = uplink(&refused);
        for part in [
            "10,000 Mbit/s",
            "refused 3 times",
            "02:00:00:00:00:07",
            "set trust on",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
