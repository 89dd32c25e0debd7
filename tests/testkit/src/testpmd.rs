//! A real `dpdk-testpmd`: the client in a container (`net_virtio_user`), or a backend that does not switch (`net_vhost`).
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use testkit::testpmd::{Config, VirtioUser};
//! let ports = [VirtioUser::new("/tmp/blue.sock", 1), VirtioUser::new("/tmp/red.sock", 2)];
//! let mut client = Config::pair(ports).start()?;
//! client.command("start tx_first 16")?;
//! let ports = client.stats()?;
//! # Ok(()) }
//! ```
//!
//! In a *pair* the two ports face each other through the switch: what one receives the other sends on unchanged, so a
//! closed loop of frames circulates in both directions and the addresses stay right for a switch that learns.

mod config;

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::process::{Launch, Process};

pub use config::{Config, Memory, Variant, VirtioUser};

const PROMPT: &str = "testpmd> ";

/// EAL start with hugepages takes 1-2 s on a quiet machine, with two busy polls on two cores far more.
const START: Duration = Duration::from_secs(60);
/// Every command but `quit` answers at once; `start tx_first` and `stop` wait for a core that may have to share its CPU.
const COMMAND: Duration = Duration::from_secs(30);

impl Config {
    /// Starts testpmd and waits for its prompt.
    pub fn start(&self) -> Result<Testpmd> {
        let mut testpmd = self.launch()?;
        testpmd.wait_prompt(0, START).context("start")?;
        Ok(testpmd)
    }

    /// Starts testpmd and does not wait: a `server=1` port blocks until the switch has connected.
    pub fn launch(&self) -> Result<Testpmd> {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        // Relaxed: only uniqueness is wanted.
        let prefix = format!(
            "testkit{}-{}",
            std::process::id(),
            SERIAL.fetch_add(1, Ordering::Relaxed)
        );
        let testpmd = self.command_line(&prefix);
        let mut launch = if self.inside.is_empty() {
            Launch::new("testpmd", testpmd)
        } else {
            let buffered = ["stdbuf".to_owned(), "-oL".to_owned()];
            Launch::new(
                "testpmd",
                self.inside.iter().chain(&buffered).chain(&testpmd),
            )
        };
        launch.uid = self.uid;
        launch.line_buffered = self.inside.is_empty();
        Ok(Testpmd {
            process: launch.start()?,
            prefix,
        })
    }
}

/// A running testpmd with its prompt.
pub struct Testpmd {
    process: Process,
    prefix: String,
}

/// Counters of one port, from `show port stats`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Frames received.
    pub rx_packets: u64,
    /// Bytes received, without CRC.
    pub rx_bytes: u64,
    /// Frames the port lost before the application saw them.
    pub rx_missed: u64,
    /// Bad frames.
    pub rx_errors: u64,
    /// Frames lost for want of a buffer.
    pub rx_nombuf: u64,
    /// Frames sent.
    pub tx_packets: u64,
    /// Bytes sent, without CRC.
    pub tx_bytes: u64,
    /// Frames not sent.
    pub tx_errors: u64,
    /// Frames received per second since the last `show`, by testpmd's own clock. Never `clear` in between.
    pub rx_pps: u64,
    /// Frames sent per second since the last `show`.
    pub tx_pps: u64,
}

impl Testpmd {
    /// Waits for the prompt after [`Config::launch`].
    pub fn wait_started(&mut self) -> Result<()> {
        self.wait_prompt(0, START).context("start").map(drop)
    }

    /// Types a command and returns what it printed.
    pub fn command(&mut self, command: &str) -> Result<String> {
        let mark = self.process.mark();
        self.process.write(&format!("{command}\n"))?;
        self.wait_prompt(mark, COMMAND)
            .with_context(|| format!("command {command:?}"))
    }

    /// Counters of all ports, by port number.
    pub fn stats(&mut self) -> Result<Vec<PortStats>> {
        let text = self.command("show port stats all")?;
        parse_stats(&text).with_context(|| format!("`show port stats all` said\n{text}"))
    }

    /// Frames per second each port receives, measured over `time` by testpmd's own clock.
    pub fn receive_rates(&mut self, time: Duration) -> Result<Vec<u64>> {
        self.stats()?;
        std::thread::sleep(time);
        Ok(self.stats()?.iter().map(|port| port.rx_pps).collect())
    }

    /// Link state of all ports, by port number.
    pub fn links_up(&mut self) -> Result<Vec<bool>> {
        let text = self.command("show port summary all")?;
        let rows = text
            .lines()
            .filter(|line| line.starts_with(|c: char| c.is_ascii_digit()));
        let links: Vec<bool> = rows
            .map(|row| row.split_whitespace().nth(4) == Some("up"))
            .collect();
        ensure!(
            !links.is_empty(),
            "`show port summary all` named no port:\n{text}"
        );
        Ok(links)
    }

    /// Waits until every port has its link.
    pub fn wait_links_up(&mut self, within: Duration) -> Result<()> {
        let end = Instant::now() + within;
        loop {
            let links = self.links_up()?;
            if links.iter().all(|&up| up) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "links {links:?} after {within:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Starts to send to `other`, which sends back, and stops both once `frames` have come back.
    pub fn exchange(&mut self, other: &mut Testpmd, frames: u64, within: Duration) -> Result<()> {
        self.wait_links_up(within)?;
        other.wait_links_up(within)?;
        other.command("start")?;
        self.command("start tx_first 4")?;
        self.wait_received(frames, within)?;
        self.command("stop")?;
        other.command("stop").map(drop)
    }

    /// Waits until each port has received `frames` more than it had.
    pub fn wait_received(&mut self, frames: u64, within: Duration) -> Result<Vec<PortStats>> {
        let end = Instant::now() + within;
        let before = self.stats()?;
        loop {
            let now = self.stats()?;
            if now
                .iter()
                .zip(&before)
                .all(|(now, before)| now.rx_packets >= before.rx_packets + frames)
            {
                return Ok(now);
            }
            ensure!(
                Instant::now() < end,
                "not every port received {frames} frames within {within:?}: first {before:?}, at last {now:?}\n{}",
                self.process.log().display()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Leaves by `quit`, as an orderly container would.
    pub fn quit(mut self) -> Result<()> {
        self.process.write("quit\n")?;
        let status = self.process.wait_exit(COMMAND).context("quit")?;
        ensure!(
            status.success(),
            "testpmd left with {status}; {}",
            self.process.log().display()
        );
        Ok(())
    }

    /// Ends it like a crash: SIGKILL.
    pub fn kill(mut self) {
        self.process.kill();
    }

    /// The process, for its pid, output and signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    fn wait_prompt(&mut self, mark: usize, within: Duration) -> Result<String> {
        // One prompt per command; a link event may stand behind it.
        self.process
            .wait_for(mark, within, |text| text.contains(PROMPT))
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        self.process.kill();
        // What a killed DPDK leaves: its run-time folder, and page files unless --in-memory.
        for base in ["/var/run/dpdk", "/tmp/dpdk"] {
            let _ = std::fs::remove_dir_all(Path::new(base).join(&self.prefix));
        }
        let pages = std::fs::read_dir("/dev/hugepages")
            .into_iter()
            .flatten()
            .flatten();
        for page in pages.filter(|file| {
            file.file_name()
                .to_string_lossy()
                .starts_with(&format!("{}map_", self.prefix))
        }) {
            let _ = std::fs::remove_file(page.path());
        }
    }
}

fn parse_stats(text: &str) -> Result<Vec<PortStats>> {
    let mut ports = Vec::new();
    for (number, block) in text.split("NIC statistics for port ").skip(1).enumerate() {
        let named: String = block.chars().take_while(char::is_ascii_digit).collect();
        ensure!(
            named.parse() == Ok(number),
            "port {number} expected, found {named:?}"
        );
        let value = |key: &str| -> Result<u64> {
            let (_, rest) = block
                .split_once(&format!("{key}:"))
                .with_context(|| format!("no {key} for port {number}"))?;
            let word = rest.split_whitespace().next().unwrap_or_default();
            word.parse()
                .with_context(|| format!("{key} of port {number} is {word:?}"))
        };
        ports.push(PortStats {
            rx_packets: value("RX-packets")?,
            rx_bytes: value("RX-bytes")?,
            rx_missed: value("RX-missed")?,
            rx_errors: value("RX-errors")?,
            rx_nombuf: value("RX-nombuf")?,
            tx_packets: value("TX-packets")?,
            tx_bytes: value("TX-bytes")?,
            tx_errors: value("TX-errors")?,
            rx_pps: value("Rx-pps")?,
            tx_pps: value("Tx-pps")?,
        });
    }
    ensure!(!ports.is_empty(), "no port");
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATS: &str = "show port stats all\r\n
  ######################## NIC statistics for port 0  ########################
  RX-packets: 5168160    RX-missed: 1          RX-bytes:  330762240
  RX-errors: 2
  RX-nombuf:  3         
  TX-packets: 5168224    TX-errors: 4          TX-bytes:  330766336

  Throughput (since last show)
  Rx-pps:      2512984          Rx-bps:   1286648056
  Tx-pps:      2513016          Tx-bps:   1286664440
  ############################################################################
testpmd> ";

    #[test]
    fn reads_the_counters_testpmd_prints() {
        let expected = PortStats {
            rx_packets: 5_168_160,
            rx_bytes: 330_762_240,
            rx_missed: 1,
            rx_errors: 2,
            rx_nombuf: 3,
            tx_packets: 5_168_224,
            tx_bytes: 330_766_336,
            tx_errors: 4,
            rx_pps: 2_512_984,
            tx_pps: 2_513_016,
        };
        assert_eq!(parse_stats(STATS).unwrap(), [expected]);
        assert!(parse_stats("testpmd> ").is_err());
    }
}
