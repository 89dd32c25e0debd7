//! The switches under test: how each is started and asked. A new one is a file here and a line in [`all`].

pub(crate) mod kernel;
mod ovs;
mod reference;
mod ringway;
mod testpmd;
mod vpp;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::client::{Client, Cpus, Generator};
use crate::console::Console;
use crate::kernel::Way;
use crate::kernel::remote::Remote;
use crate::process::Proc;
use crate::rows::{Row, Traffic};

/// A kind of switch that may or may not be on this machine.
pub(crate) trait Peer {
    /// What stands in `--only` and in the tables.
    fn name(&self) -> &'static str;

    /// Why it cannot be started here, with the command that changes this; none if it can.
    fn missing(&self) -> Option<String>;

    /// Whether it takes part where nobody said who shall.
    fn by_default(&self) -> bool {
        true
    }

    /// Whether it serves vhost-user sockets: what does not has a generator of its own.
    fn vhost_user(&self) -> bool {
        true
    }

    /// Why it cannot do this row; none if it can.
    fn cannot(&self, _row: &Row) -> Option<String> {
        None
    }

    /// Starts it and waits until it listens.
    fn start(&self, setup: Setup, place: &Place) -> Result<Box<dyn Switch>>;
}

/// A switch that runs; dropping it ends it.
pub(crate) trait Switch {
    /// What every switch has.
    fn common(&self) -> &Common;

    /// Its sockets, in the order of its ports.
    fn sockets(&self) -> &[PathBuf] {
        &self.common().sockets
    }

    /// Its process, with the polling thread.
    fn proc(&self) -> &Proc {
        self.common().runs.proc()
    }

    /// What the binary says that it is.
    fn version(&self) -> &str {
        &self.common().version
    }

    /// Whether it polls: one that sleeps need not get all of its CPU.
    fn polls(&self) -> bool {
        true
    }

    /// Ends it without a word, as a crash does.
    fn kill(&mut self) -> Result<()> {
        self.proc().kill()
    }

    /// Connects a client for this row. `directory` takes its files.
    fn client(&self, row: Row, cpus: Cpus, directory: &Path) -> Result<Box<dyn Generator>> {
        Ok(Box::new(Client::connect(
            row,
            self.sockets(),
            cpus,
            directory,
        )?))
    }

    /// Called before a client connects.
    fn prepare(&mut self, _row: &Row) -> Result<()> {
        Ok(())
    }

    /// Called when its first `ports` ports are connected: waits until it takes frames from all of them to all of them. Most do at once.
    fn settle(&mut self, _ports: usize) -> Result<()> {
        Ok(())
    }

    /// What it did since its start, if it tells.
    fn work(&mut self) -> Result<Option<Work>> {
        Ok(None)
    }
}

/// What every switch that runs has. Dropping it ends the process.
pub(crate) struct Common {
    pub(crate) runs: Runs,
    pub(crate) sockets: Vec<PathBuf>,
    pub(crate) version: String,
}

/// How a switch runs.
pub(crate) enum Runs {
    /// By itself.
    Daemon(Proc),
    /// On a terminal.
    Console(Box<Console>),
    /// In the kernel, for a process that holds its links.
    Helper(Box<Remote>),
}

impl Runs {
    fn proc(&self) -> &Proc {
        match self {
            Self::Daemon(proc) => proc,
            Self::Console(console) => console.proc(),
            Self::Helper(helper) => helper.proc(),
        }
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        match self {
            Self::Daemon(proc) => proc.terminate(),
            Self::Console(console) => console.quit(),
            Self::Helper(_) => {} // it has nothing to say: dropping it ends it
        }
    }
}

/// Frames, and the cycles they took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Work {
    /// Frames received from clients.
    pub(crate) frames: u64,
    /// TSC cycles of turns in which there were frames.
    pub(crate) busy: f64,
    /// TSC cycles of all turns, where the switch counts them.
    pub(crate) all: Option<f64>,
}

/// What an instance of a switch must have room for; rows with the same needs share an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Setup {
    pub(crate) ports: usize,
    pub(crate) jumbo: bool,
    /// A table for a million stations.
    pub(crate) stations: bool,
    /// Queue pairs per port.
    pub(crate) queues: u16,
}

impl Setup {
    pub(crate) fn of(row: &Row) -> Self {
        Self {
            ports: row.ports,
            jumbo: row.jumbo(),
            stations: matches!(row.traffic, Traffic::Stations(_)),
            queues: 1,
        }
    }

    /// Letters and a number that tell instances apart in file names (which must stay short).
    fn tag(self) -> String {
        let letter = |wanted, letter| if wanted { letter } else { "" };
        format!(
            "{}{}{}",
            letter(self.jumbo, "j"),
            letter(self.stations, "s"),
            self.ports
        )
    }
}

/// Where switches put their files and threads.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// An existing directory with a short absolute path.
    pub(crate) directory: PathBuf,
    pub(crate) cpus: Cpus,
    /// Sockets on which the containers listen, for the switch to connect to; none: it listens on sockets of its own.
    pub(crate) containers: Vec<PathBuf>,
}

impl Place {
    /// Whether the switch connects to its containers.
    fn switch_connects(&self) -> bool {
        !self.containers.is_empty()
    }

    /// The socket of each port.
    fn sockets(&self, directory: &Path, setup: Setup) -> Vec<PathBuf> {
        if self.switch_connects() {
            return self.containers.clone();
        }
        let own = (0..setup.ports).map(|port| directory.join(port.to_string()));
        own.collect()
    }

    /// Waits until the switch listens, if it is the one who does.
    fn wait_for(&self, proc: &mut Proc, sockets: &[PathBuf], log: &Path) -> Result<()> {
        if self.switch_connects() {
            return Ok(());
        }
        wait_for_sockets(proc, sockets, log)
    }

    /// A directory of its own for an instance.
    fn own(&self, peer: &str, setup: Setup) -> Result<PathBuf> {
        let directory = self.directory.join(format!("{peer}{}", setup.tag()));
        std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        Ok(directory)
    }
}

/// Where the switches are.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "The switches' binaries")]
pub(crate) struct Binaries {
    /// The ringway binary [default: the one beside ringway-bench, then PATH]
    #[arg(long, value_name = "PATH")]
    pub(crate) ringway: Option<PathBuf>,
    /// The vpp binary: VPP joins in
    #[arg(long, value_name = "PATH")]
    pub(crate) vpp: Option<PathBuf>,
    /// Another system with an OVS-DPDK, a newer one by debootstrap say: it joins in as ovs-root, run in a chroot
    #[arg(long, value_name = "DIRECTORY", value_parser = directory)]
    pub(crate) ovs_root: Option<PathBuf>,
}

/// A directory by its absolute name: daemons go elsewhere.
fn directory(text: &str) -> Result<PathBuf, String> {
    match std::fs::canonicalize(text) {
        Ok(path) if path.is_dir() => Ok(path),
        Ok(_) => Err("is no directory".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The switches of a run.
pub(crate) fn all(binaries: &Binaries) -> Vec<Box<dyn Peer>> {
    let mut peers: Vec<Box<dyn Peer>> = vec![
        Box::new(ringway::Ringway::new(binaries.ringway.as_deref())),
        Box::new(ovs::Ovs::default()),
        Box::new(testpmd::Testpmd),
        Box::new(reference::Reference),
    ];
    peers.extend(Way::ALL.map(|way| Box::new(way) as Box<dyn Peer>));
    if let Some(root) = &binaries.ovs_root {
        peers.push(Box::new(ovs::Ovs::of(root)));
    }
    if let Some(vpp) = &binaries.vpp {
        peers.push(Box::new(vpp::Vpp::new(vpp)));
    }
    peers
}

/// Runs a helper program to its end, at most 20 s, and returns what it printed.
fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let arguments: Vec<_> = command
        .get_args()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let what = format!("{program} {}", arguments.join(" "));
    // `timeout` is in coreutils; no helper is worth a thread of our own.
    let mut bounded = Command::new("timeout");
    bounded
        .args(["-k", "1", "20"])
        .arg(command.get_program())
        .args(command.get_args());
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            bounded.env(key, value);
        }
    }
    let output = bounded.output().with_context(|| what.clone())?;
    if !output.status.success() {
        bail!(
            "{what}: {} {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits for a switch's sockets while its process lives; `log` is where the reason for its end stands.
fn wait_for_sockets(proc: &mut Proc, sockets: &[PathBuf], log: &Path) -> Result<()> {
    crate::process::wait_for_paths(sockets, Duration::from_secs(30), || match proc.ended() {
        None => Ok(()),
        Some(status) => {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<_> = text
                .lines()
                .filter(|line| !line.trim().is_empty())
                .collect();
            bail!(
                "it ended ({status}): {}",
                lines[lines.len().saturating_sub(3)..].join(" / ")
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_that_fails_says_what_it_said() {
        let error = output(Command::new("sh").args(["-c", "echo broken >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("broken") && error.contains('3'), "{error}");
        assert_eq!(output(Command::new("echo").arg("fine")).unwrap(), "fine\n");
    }

    #[test]
    fn rows_with_equal_needs_share_an_instance() {
        let rows = crate::rows::parse("split64,packedvec64,split9000").unwrap();
        let setups: Vec<_> = rows.iter().map(Setup::of).collect();
        assert_eq!(setups[0], setups[1]);
        assert_eq!(
            setups[2],
            Setup {
                ports: 2,
                jumbo: true,
                stations: false,
                queues: 1
            }
        );
    }
}
