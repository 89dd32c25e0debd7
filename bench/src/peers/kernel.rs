//! The kernel's own ways, with their own generator in the client's place.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Common, Peer, Place, Runs, Setup, Switch};
use crate::client::{Cpus, Generator};
use crate::console::{Forwarded, PortStats};
use crate::kernel::circle::Look;
use crate::kernel::namespaces::Ready;
use crate::kernel::remote::Remote;
use crate::kernel::{GENERATOR, Way};
use crate::process::Proc;
use crate::rows::{Row, Traffic, Variant};
use crate::sentinel::tsc_hz;

/// A link or a thousand: the kernel makes each in some milliseconds.
const SET_UP: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(5);

impl Peer for Way {
    fn name(&self) -> &'static str {
        Self::name(*self)
    }

    fn missing(&self) -> Option<String> {
        Self::missing(*self)
    }

    fn vhost_user(&self) -> bool {
        false
    }

    fn cannot(&self, row: &Row) -> Option<String> {
        if row.variant != Variant::Split {
            return Some("it has no virtio rings; the rows of split rings stand for it".to_owned());
        }
        (row.ports > 2).then(|| "silent links cost the kernel nothing".to_owned())
    }

    fn start(&self, setup: Setup, place: &Place) -> Result<Box<dyn Switch>> {
        Ok(Box::new(Running::start(*self, setup, place)?))
    }
}

/// Containers that are linked.
pub(crate) struct Running {
    common: Common,
    directory: PathBuf,
    /// Their namespaces.
    pub(crate) containers: Vec<String>,
}

impl Running {
    /// Makes the namespaces and links.
    pub(crate) fn start(way: Way, setup: Setup, place: &Place) -> Result<Self> {
        let directory = place.own(way.name(), setup)?;
        // 1518 bytes without CRC are four more than a packet of 1500 has.
        let mtu = if setup.jumbo { 9000 } else { 1504 };
        let arguments = format!(
            "namespaces --way {} --containers {} --mtu {mtu}",
            way.name(),
            setup.ports
        );
        let arguments: Vec<_> = arguments.split(' ').map(str::to_owned).collect();
        let mut holder = Remote::start(way.name(), &arguments, &[place.cpus.control], &directory)?;
        let ready: Ready = serde_json::from_str(&holder.hear(SET_UP)?).context("its namespaces")?;
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let kind = match way {
            Way::Bridge => "bridge and veth pairs",
            Way::Macvlan => "macvlan in bridge mode",
        };
        Ok(Self {
            common: Common {
                runs: Runs::Helper(Box::new(holder)),
                sockets: Vec::new(),
                version: format!(
                    "Linux {}, {kind}; {GENERATOR}; each container's thread does the kernel's work of what it sends, on the switch's \
                     CPU and on the client's",
                    kernel.trim()
                ),
            },
            directory,
            containers: ready.containers,
        })
    }
}

impl Switch for Running {
    fn common(&self) -> &Common {
        &self.common
    }

    fn polls(&self) -> bool {
        false
    }

    fn client(&self, row: Row, cpus: Cpus, _: &std::path::Path) -> Result<Box<dyn Generator>> {
        let (burst, in_flight, stations) = match row.traffic {
            Traffic::Circle { burst, bursts } => (burst, burst * bursts, 0),
            Traffic::Stations(count) => (32, 0, count),
        };
        let arguments = format!(
            "packets --container {} --container {} --cpu {} --cpu {} --control-cpu {} --frame {} --burst {burst} --in-flight {in_flight} \
             --stations {stations}",
            self.containers[0],
            self.containers[1],
            cpus.switch,
            cpus.client,
            cpus.control,
            row.frame
        );
        let arguments: Vec<_> = arguments.split_whitespace().map(str::to_owned).collect();
        let mut remote = Remote::start(
            "the client (packet sockets)",
            &arguments,
            &[cpus.switch, cpus.client, cpus.control],
            &self.directory,
        )?;
        let greeting = remote.hear(ANSWER)?;
        ensure!(
            greeting == "ready",
            "the client (packet sockets): {greeting}"
        );
        Ok(Box::new(Packets {
            remote,
            counted_from: usize::from(stations > 0),
            before: None,
            tsc_hz: tsc_hz(),
        }))
    }
}

/// The generator's helper in the client's place.
struct Packets {
    remote: Remote,
    /// The first container whose received frames count.
    counted_from: usize,
    before: Option<Look>,
    tsc_hz: f64,
}

impl Packets {
    fn look(&mut self, command: &str) -> Result<Look> {
        let answer = self.remote.ask(command, ANSWER)?;
        let look: Look = serde_json::from_str(&answer).context("the client (packet sockets)")?;
        ensure!(
            look.failed.is_none(),
            "the client (packet sockets): {}",
            look.failed.unwrap_or_default()
        );
        Ok(look)
    }
}

impl Generator for Packets {
    fn begin(&mut self) -> Result<()> {
        self.look("begin").map(drop)
    }

    fn received(&mut self) -> Result<Vec<PortStats>> {
        let look = self.look("look")?;
        let before = self.before.replace(look.clone()).unwrap_or_default();
        let seconds = (look.now - before.now) as f64 / self.tsc_hz;
        let containers = look.received.iter().enumerate().skip(self.counted_from);
        let stats = containers.map(|(container, &received)| {
            let step = received - before.received.get(container).copied().unwrap_or_default();
            PortStats {
                rx_packets: received,
                rx_pps: (step as f64 / seconds) as u64,
            }
        });
        Ok(stats.collect())
    }

    fn forwarded(&mut self) -> Result<Forwarded> {
        let look = self.look("look")?;
        Ok(Forwarded {
            rx: look.received.iter().sum(),
            tx: look.sent,
            cycles: Some(look.busy),
            cores: 2,
        })
    }

    fn proc(&self) -> &Proc {
        self.remote.proc()
    }

    fn version(&self) -> &str {
        ""
    }

    fn leave(self: Box<Self>) {}
}
