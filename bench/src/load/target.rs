//! What is measured: sockets that somebody else serves, or a switch that the harness starts itself.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::client::Cpus;
use crate::host::hugepages_hint;
use crate::interrupt::{self, Interrupted};
use crate::peers::{self, Binaries, Place, Setup, Switch};
use crate::process::cpus;
use crate::report::Output;
use crate::results::Saved;

/// The switch to measure.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "The switch")]
pub(crate) struct Target {
    /// A vhost-user socket that a switch serves, one per port; again for each port
    #[arg(
        long = "socket",
        value_name = "PATH",
        required_unless_present = "switch"
    )]
    pub(crate) sockets: Vec<PathBuf>,
    /// Or start these, one after the other: ringway, ovs, testpmd, reference, vpp (chain: bridge and macvlan too)
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub(crate) switch: Vec<String>,
    /// Ports of a switch that is started
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=1024))]
    pub(crate) ports: u32,
    /// The CPU of a switch that is started
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    pub(crate) switch_cpu: usize,
    /// The CPU of the generator [default: 1, or the only one there is]
    #[arg(long, value_name = "CPU")]
    pub(crate) client_cpu: Option<usize>,
    #[command(flatten)]
    pub(crate) binaries: Binaries,
    /// The priority of switch and generator, as root
    #[arg(long, default_value_t = -20, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-20..=0))]
    pub(crate) nice: i32,
}

/// A started switch, its directory, and where things run.
pub(crate) struct Started {
    // Dropped in this order.
    pub(crate) switch: Box<dyn Switch>,
    #[allow(dead_code, reason = "lives as long as the switch")]
    pub(crate) directory: TempDir,
    pub(crate) cpus: Cpus,
}

impl Target {
    /// The switch to start, if one is to be started.
    pub(crate) fn name(&self) -> Option<&str> {
        self.switch.first().map(String::as_str)
    }

    /// This target with each of its switches alone.
    fn each(&self) -> Vec<Self> {
        if self.switch.is_empty() {
            return vec![self.clone()];
        }
        let alone = |name: &String| Self {
            switch: vec![name.clone()],
            ..self.clone()
        };
        self.switch.iter().map(alone).collect()
    }

    /// The switch's CPU, the generator's, that of all else.
    pub(crate) fn cpus(&self) -> Result<Cpus> {
        let count = cpus();
        let client = self.client_cpu.unwrap_or(usize::from(count > 1));
        let third = (0..count).find(|cpu| ![self.switch_cpu, client].contains(cpu));
        Ok(Cpus {
            switch: self.switch_cpu,
            client,
            control: third.unwrap_or(self.switch_cpu),
        })
    }

    /// Starts the switch that was named, with room for `setup`. If containers listen, it connects to their sockets.
    pub(crate) fn start(
        &self,
        name: &str,
        setup: Setup,
        containers: &[PathBuf],
    ) -> Result<Started> {
        let cpus = self.cpus()?;
        let all = peers::all(&self.binaries);
        let names: Vec<_> = all.iter().map(|peer| peer.name()).collect();
        let Some(peer) = all.iter().find(|peer| peer.name() == name) else {
            let hint = if name == "vpp" {
                " (--vpp PATH names its binary)"
            } else {
                ""
            };
            bail!(
                "--switch: there is no switch {name:?}; there are: {}{hint}",
                names.join(", ")
            );
        };
        if !peer.vhost_user() {
            bail!("--switch {name}: it has no vhost-user sockets; compare and chain measure it");
        }
        if let Some(missing) = peer.missing() {
            bail!("{missing}");
        }
        let directory = tempfile::Builder::new()
            .prefix("rwb")
            .tempdir()
            .context("a directory for sockets")?;
        let place = Place {
            directory: directory.path().to_owned(),
            cpus,
            containers: containers.to_vec(),
        };
        let switch = peer
            .start(setup, &place)
            .with_context(|| format!("{name}: cannot be started{}", hugepages_hint()))?;
        Ok(Started {
            switch,
            directory,
            cpus,
        })
    }
}

/// Does `work` for each of the target's switches; it returns what it found, and a text for people. Prints, and writes what `output` asks for.
pub(crate) fn for_each(
    target: &Target,
    output: &Output,
    mut work: impl FnMut(&Target) -> Result<(Saved, String)>,
) -> Result<()> {
    output.check()?;
    let targets = target.each();
    let mut all: Option<Saved> = None;
    let mut failed = None;
    for one in &targets {
        match work(one) {
            Ok((saved, text)) => {
                if !output.quiet() {
                    print!("{text}");
                    if !saved.complete && !text.contains("PARTIAL") {
                        println!("  PARTIAL: it ended early; this is what was measured until then");
                    }
                    saved
                        .caveats
                        .iter()
                        .for_each(|caveat| println!("  note: {caveat}"));
                }
                match &mut all {
                    Some(all) => all.add(saved),
                    None => all = Some(saved),
                }
            }
            Err(error) => {
                let name = one.name().unwrap_or("switch");
                if targets.len() > 1 && !error.is::<Interrupted>() {
                    eprintln!("{name}: {error:#}");
                }
                failed = Some((name.to_owned(), error));
            }
        }
        if interrupt::check().is_err() {
            break;
        }
    }
    let Some(mut all) = all else {
        return failed.map_or(Ok(()), |(_, error)| Err(error));
    };
    if let Some((name, error)) = failed {
        all.complete = false;
        all.caveats.push(format!("{name} failed: {error:#}"));
    }
    output.write(&all)
}
