//! testpmd with two vhost ports and `io` forwarding: the vhost library, buffers and bursts of 32, and no lookup. It is
//! the switch that does not switch.

use anyhow::{Result, bail};

use super::{Common, Peer, Place, Runs, Setup, Switch, Work};
use crate::console::{Console, TESTPMD, TESTPMD_MISSING};
use crate::process::find;
use crate::rows::Row;

/// DPDK has room for 32 devices in a process.
const PORTS_MAX: usize = 32;

pub(crate) struct Testpmd;

impl Peer for Testpmd {
    fn name(&self) -> &'static str {
        "testpmd"
    }

    fn missing(&self) -> Option<String> {
        find(TESTPMD).is_none().then(|| TESTPMD_MISSING.to_owned())
    }

    fn cannot(&self, row: &Row) -> Option<String> {
        (row.ports > PORTS_MAX).then(|| format!("DPDK has room for {PORTS_MAX} ports in a process"))
    }

    fn start(&self, setup: Setup, place: &Place) -> Result<Box<dyn Switch>> {
        let directory = place.own("t", setup)?;
        let sockets = place.sockets(&directory, setup);
        let cpu = place.cpus.switch;
        let mut arguments: Vec<_> = format!(
            "--lcores 0@{cpu},1@{cpu} --main-lcore 0 --no-pci --in-memory --socket-mem 256 --file-prefix=rwbs{} --no-telemetry",
            setup.tag()
        )
        .split_whitespace()
        .map(str::to_owned)
        .collect();
        let (client, queues) = (u32::from(place.switch_connects()), setup.queues);
        for (port, socket) in sockets.iter().enumerate() {
            arguments.push(format!(
                "--vdev=net_vhost{port},iface={},queues={queues},client={client}",
                socket.display()
            ));
        }
        let common = [
            "--",
            "-i",
            "--nb-cores=1",
            "--txd=1024",
            "--rxd=1024",
            "--forward-mode=io",
        ];
        arguments.extend(common.map(str::to_owned));
        arguments.extend([format!("--rxq={queues}"), format!("--txq={queues}")]);
        if setup.jumbo {
            // By default it would take 160,000 buffers: 1.6 GB of hugepages, and never a warm one.
            arguments.extend(["--mbuf-size=9728", "--total-num-mbufs=16384"].map(str::to_owned));
        }
        let mut console = Console::start("testpmd (as a switch)", &[cpu], &arguments, &directory)?;
        console.tell("start")?;
        let version = console.version().to_owned();
        Ok(Box::new(Running {
            common: Common {
                runs: Runs::Console(Box::new(console)),
                sockets,
                version,
            },
            records: false,
        }))
    }
}

struct Running {
    common: Common,
    records: bool,
}

impl Running {
    fn console(&mut self) -> Result<&mut Console> {
        match &mut self.common.runs {
            Runs::Console(console) => Ok(console),
            _ => bail!("testpmd runs on a terminal"),
        }
    }
}

impl Switch for Running {
    fn common(&self) -> &Common {
        &self.common
    }

    fn prepare(&mut self, row: &Row) -> Result<()> {
        // Two readings of the clock per burst are nothing for a burst of 32 and a good part of a burst of one.
        self.records = !row.traffic.is_hop();
        let record = if self.records { "on" } else { "off" };
        self.console()?
            .tell(&format!("set record-core-cycles {record}"))
    }

    fn work(&mut self) -> Result<Option<Work>> {
        if !self.records {
            return Ok(None);
        }
        Ok(self.console()?.forwarded()?.work())
    }
}
