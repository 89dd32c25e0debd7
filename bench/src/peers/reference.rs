//! The reference switch, which is a subcommand of this very program.

use std::fs::File;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use super::{Common, Peer, Place, Runs, Setup, Switch};
use crate::process::{Proc, command};
use crate::rows::{Row, Traffic, Variant};

pub(crate) struct Reference;

impl Peer for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn by_default(&self) -> bool {
        false
    }

    fn missing(&self) -> Option<String> {
        None
    }

    fn cannot(&self, row: &Row) -> Option<String> {
        if matches!(row.variant, Variant::Packed | Variant::PackedVec) {
            return Some("virtio-queue knows no packed rings".to_owned());
        }
        if row.jumbo() {
            return Some("it does not merge receive buffers".to_owned());
        }
        matches!(row.traffic, Traffic::Stations(_)).then(|| "it has no static stations".to_owned())
    }

    fn start(&self, setup: Setup, place: &Place) -> Result<Box<dyn Switch>> {
        if place.switch_connects() {
            bail!("reference: it only listens; its containers cannot");
        }
        if setup.queues > 1 {
            bail!("reference: it has one queue pair per port");
        }
        let directory = place.own("f", setup)?;
        let sockets = place.sockets(&directory, setup);
        let log = directory.join("log");
        let own = std::env::current_exe().context("the path of this program")?;
        let mut reference = command(own);
        reference.arg("reference");
        for socket in &sockets {
            reference.arg("--socket").arg(socket);
        }
        reference
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?);
        let cpus = [place.cpus.switch, place.cpus.control];
        let mut proc = Proc::start("the reference", &cpus, &mut reference)?;
        place.wait_for(&mut proc, &sockets, &log)?;
        let version = format!(
            "ringway-bench {} (vhost-user-backend, virtio-queue, vm-memory)",
            env!("CARGO_PKG_VERSION")
        );
        Ok(Box::new(Running {
            common: Common {
                runs: Runs::Daemon(proc),
                sockets,
                version,
            },
        }))
    }
}

struct Running {
    common: Common,
}

impl Switch for Running {
    fn common(&self) -> &Common {
        &self.common
    }

    fn polls(&self) -> bool {
        false
    }
}
