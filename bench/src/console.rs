//! A testpmd on a terminal of its own: commands in, answers out.
//!
//! A pipe would not do: testpmd's output into a pipe arrives when it exits. Its numbers come from two commands only,
//! `show port stats all` and `show fwd stats all`, and **never** after a `clear`: that one races with the forwarding
//! core, and testpmd divides the frames since the clear, minus those before it, by the time between the two `show`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::peers::Work;
use crate::process::{Proc, command};

/// The program, and the Debian package it comes in.
pub(crate) const TESTPMD: &str = "dpdk-testpmd";
/// How to get it.
pub(crate) const TESTPMD_MISSING: &str = "dpdk-testpmd is not installed: apt-get install dpdk-dev";

const PROMPT: &str = "testpmd> ";
/// testpmd answers within milliseconds; a busy switch on the same CPU can hold it up for some scheduling slices.
const PATIENCE: Duration = Duration::from_secs(10);
/// Hugepages, devices and rings take a second or two.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// A running testpmd.
pub(crate) struct Console {
    name: String,
    proc: Proc,
    terminal: File,
    heard: Arc<Heard>,
    version: String,
}

/// What it said since the last command, filled by a thread that does nothing but read.
#[derive(Default)]
struct Heard {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    text: String,
    closed: bool,
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with this lock")
    }
}

impl Console {
    /// Starts a testpmd with these arguments on these CPUs and waits for its first prompt. What DPDK leaves behind in
    /// the file system stays in `directory`.
    pub(crate) fn start(
        name: &str,
        cpus: &[usize],
        arguments: &[String],
        directory: &Path,
    ) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .context("a terminal")?;
        grantpt(&master)
            .and_then(|()| unlockpt(&master))
            .context("a terminal")?;
        let path = ptsname(&master, Vec::new()).context("a terminal")?;
        let slave = File::options()
            .read(true)
            .write(true)
            .open(path.to_str()?)?;
        let mut mode = tcgetattr(&slave)?;
        mode.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &mode)?;

        let mut testpmd = command(TESTPMD);
        testpmd
            .arg("-v")
            .args(arguments)
            .env("RUNTIME_DIRECTORY", directory);
        testpmd
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave));
        let proc = Proc::start(name, cpus, &mut testpmd)?;
        drop(testpmd); // holds the slave side: the reader would never see its end

        let terminal = File::from(master);
        let heard = Arc::<Heard>::default();
        let (from, to) = (terminal.try_clone()?, Arc::clone(&heard));
        std::thread::spawn(move || listen(from, &to));
        let mut console = Self {
            name: name.to_owned(),
            proc,
            terminal,
            heard,
            version: String::new(),
        };
        let greeting = console.until_prompt("", START_PATIENCE)?;
        console.version = version(&greeting).unwrap_or("DPDK").to_owned();
        Ok(console)
    }

    /// Types a command and returns the answer.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String> {
        self.heard.lock().text.clear();
        writeln!(self.terminal, "{command}")
            .with_context(|| format!("{}: typing {command:?}", self.name))?;
        self.until_prompt(command, PATIENCE)
    }

    /// Like [`Console::ask`]; fails when testpmd finds the command wrong.
    pub(crate) fn tell(&mut self, command: &str) -> Result<()> {
        let answer = self.ask(command)?;
        if [
            "Bad arguments",
            "Command not found",
            "Ambiguous command",
            "Invalid",
        ]
        .iter()
        .any(|no| answer.contains(no))
        {
            bail!("{}: {command:?} was refused: {}", self.name, answer.trim());
        }
        Ok(())
    }

    /// The ports' counters.
    pub(crate) fn ports(&mut self) -> Result<Vec<PortStats>> {
        let answer = self.ask("show port stats all")?;
        port_stats(&answer)
            .with_context(|| format!("{}: cannot read its statistics:\n{answer}", self.name))
    }

    /// What the forwarding core did since `start`.
    pub(crate) fn forwarded(&mut self) -> Result<Forwarded> {
        let answer = self.ask("show fwd stats all")?;
        forwarded(&answer)
            .with_context(|| format!("{}: cannot read its statistics:\n{answer}", self.name))
    }

    pub(crate) fn proc(&self) -> &Proc {
        &self.proc
    }

    /// The version of its DPDK.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Leaves politely, so that the other side sees rings stop before the socket closes; `drop` does the rest.
    pub(crate) fn quit(&mut self) {
        let _ = self.proc.resume();
        let _ = writeln!(self.terminal, "quit");
        let _ = self.proc.wait(Duration::from_secs(5));
    }

    /// Waits for the prompt behind the echo of `command`.
    fn until_prompt(&mut self, command: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            let mut state = self.heard.lock();
            if let Some(answer) = answer(&state.text, command) {
                return Ok(answer.to_owned());
            }
            if state.closed {
                let last: Vec<_> = state
                    .text
                    .lines()
                    .rev()
                    .filter(|line| !line.trim().is_empty())
                    .take(3)
                    .collect();
                bail!(
                    "{} ended: {}",
                    self.name,
                    last.into_iter().rev().collect::<Vec<_>>().join(" / ")
                );
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "{}: no answer to {command:?} within {patience:?}; it said {:?}",
                    self.name,
                    state.text
                );
            }
            state = self
                .heard
                .news
                .wait_timeout(state, left.min(Duration::from_millis(500)))
                .expect("nobody panics")
                .0;
            drop(state);
            crate::interrupt::check()?;
        }
    }
}

/// Reads the terminal until the last process on it is gone.
fn listen(mut terminal: File, heard: &Heard) {
    let mut buffer = [0; 4096];
    loop {
        let read = terminal.read(&mut buffer).unwrap_or(0); // EIO: the other side is closed
        let mut state = heard.lock();
        state.text.extend(
            String::from_utf8_lossy(&buffer[..read])
                .chars()
                .filter(|&c| c != '\r'),
        );
        state.closed = read == 0;
        heard.news.notify_all();
        if read == 0 {
            return;
        }
    }
}

/// The text between the echo of a command and the next prompt, once the prompt is there.
fn answer<'t>(text: &'t str, command: &str) -> Option<&'t str> {
    let (_, after) = text.split_once(command)?;
    after.split_once(PROMPT).map(|(answer, _)| answer)
}

fn version(greeting: &str) -> Option<&str> {
    greeting
        .split_once("RTE Version: '")?
        .1
        .split_once('\'')
        .map(|(version, _)| version)
}

/// The counters of one port, by `show port stats all`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortStats {
    /// Frames received since the port started.
    pub(crate) rx_packets: u64,
    /// Frames received per second since the last `show`, by testpmd's own clock.
    pub(crate) rx_pps: u64,
}

fn port_stats(text: &str) -> Option<Vec<PortStats>> {
    let ports = text.split("NIC statistics for port").skip(1);
    let ports: Option<Vec<_>> = ports
        .map(|port| {
            Some(PortStats {
                rx_packets: number(port, "RX-packets:")?,
                rx_pps: number(port, "Rx-pps:")?,
            })
        })
        .collect();
    ports.filter(|ports| !ports.is_empty())
}

/// The forwarding core's sum over all ports, by `show fwd stats all`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forwarded {
    /// Frames received.
    pub(crate) rx: u64,
    /// Frames sent.
    pub(crate) tx: u64,
    /// TSC cycles spent with frames in hand; with `set record-core-cycles on`.
    pub(crate) cycles: Option<u64>,
    /// The cores that these cycles are of.
    pub(crate) cores: u32,
}

impl Forwarded {
    /// The same as it is asked of a switch, where cycles are counted.
    pub(crate) fn work(&self) -> Option<Work> {
        Some(Work {
            frames: self.rx,
            busy: self.cycles? as f64,
            all: None,
        })
    }
}

fn forwarded(text: &str) -> Option<Forwarded> {
    let (_, sum) = text.split_once("Accumulated forward statistics")?;
    Some(Forwarded {
        rx: number(sum, "RX-packets:")?,
        tx: number(sum, "TX-packets:")?,
        cycles: number(sum, "(total cycles="),
        cores: 1,
    })
}

/// The number that follows `label`.
fn number(text: &str, label: &str) -> Option<u64> {
    let (_, after) = text.split_once(label)?;
    let after = after.trim_start();
    let end = after
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(after.len());
    after[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = include_str!("../testdata/testpmd-22.11-port-stats.txt");
    const FORWARDED: &str = include_str!("../testdata/testpmd-22.11-fwd-stats.txt");

    #[test]
    fn reads_counters_and_rates_of_both_ports() {
        let port = |rx_packets, rx_pps| PortStats { rx_packets, rx_pps };
        assert_eq!(
            port_stats(SHOWN),
            Some(vec![
                port(22_791_104, 5_310_310),
                port(22_791_168, 5_310_367)
            ])
        );
    }

    #[test]
    fn reads_the_forwarding_cores_frames_and_cycles() {
        let expected = Forwarded {
            rx: 56_285_344,
            tx: 56_286_368,
            cycles: Some(6_999_089_796),
            cores: 1,
        };
        assert_eq!(forwarded(FORWARDED), Some(expected));
        assert_eq!(expected.tx - expected.rx, 1024, "what circulates");
    }

    #[test]
    fn without_recorded_cycles_frames_are_still_read() {
        let without = FORWARDED.split("CPU cycles/packet").next().unwrap();
        assert_eq!(forwarded(without).unwrap().cycles, None);
    }

    #[test]
    fn an_answer_is_what_stands_between_the_echo_and_the_next_prompt() {
        let text = "Port 0: link state change event\nset burst 32\n\nNumber of packets per burst set to 32\ntestpmd> ";
        assert_eq!(
            answer(text, "set burst 32"),
            Some("\n\nNumber of packets per burst set to 32\n")
        );
        assert_eq!(answer("set burst 32\nNumber of", "set burst 32"), None);
        assert_eq!(
            answer("testpmd> set burst 32\n", "set burst 32"),
            None,
            "the old prompt does not count"
        );
    }

    #[test]
    fn garbage_is_refused() {
        assert_eq!(port_stats(""), None);
        assert_eq!(
            port_stats("NIC statistics for port 0\nRX-packets: lots"),
            None
        );
        assert_eq!(forwarded("Bad arguments"), None);
    }

    #[test]
    fn the_version_of_dpdk_is_read_from_the_greeting() {
        assert_eq!(
            version("EAL: RTE Version: 'DPDK 22.11.11'\nEAL: x"),
            Some("DPDK 22.11.11")
        );
    }
}
