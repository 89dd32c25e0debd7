//! The program under test: the `ringway` binary with its files in a folder of its own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use ringway::control::config::{Config, Workers};
use ringway::control::state::{
    Counters, Permissions, PortKind, PortSpec, PortState, PortStatus, SocketMode, StatsReport,
};

use crate::process::{Launch, Process, run, target_dir, wait_until};

/// Names the binary to test; without it the release build of the target folder, else the debug build.
pub const BINARY: &str = "RINGWAY_BIN";

/// Sockets must listen within 100 ms on a quiet machine; a test machine is not quiet.
const START: Duration = Duration::from_secs(20);
const COMMAND: Duration = Duration::from_secs(20);
/// SIGTERM must end the switch within 100 ms; a busy machine gets ten times that.
const STOP: Duration = Duration::from_secs(1);
/// Frames on their way when the traffic stops are through within this.
const SETTLE: Duration = Duration::from_secs(10);

/// A `ringway run` with its sockets and configuration in a temporary folder; ended on drop.
pub struct Ringway {
    process: Process,
    config: Config,
    arguments: Vec<String>,
    dir: tempfile::TempDir,
}

/// Where the binary is.
pub fn binary() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(BINARY) {
        let named = PathBuf::from(named);
        ensure!(
            named.is_file(),
            "{BINARY} names {}, which does not exist",
            named.display()
        );
        return Ok(named);
    }
    let built = ["release", "debug"].map(|profile| target_dir().join(profile).join("ringway"));
    let found = built.iter().find(|path| path.is_file());
    found.cloned().ok_or_else(|| {
        anyhow!(
            "{} does not exist: cargo build --release",
            built[0].display()
        )
    })
}

impl Ringway {
    /// Starts a switch with one worker on CPU 0 and a listening port per name; their sockets let everybody in.
    pub fn with_ports(names: &[&str]) -> Result<Self> {
        Self::start(names.iter().map(|name| server_port(name)).collect())
    }

    /// Starts a switch with one worker on CPU 0 and these ports. A relative socket is meant in the switch's folder.
    pub fn start(ports: Vec<PortSpec>) -> Result<Self> {
        Self::start_with(Config {
            workers: Workers::Cpus(vec![0]),
            ports,
            ..Config::default()
        })
    }

    /// Starts a switch with this configuration; its `api` is replaced, and relative sockets are meant in its folder.
    pub fn start_with(config: Config) -> Result<Self> {
        Self::start_told(config, &[])
    }

    /// The same, with further arguments of `ringway run`.
    pub fn start_told(mut config: Config, arguments: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ringway-").tempdir()?;
        crate::open_to_all(dir.path())?;
        config.api = Some(dir.path().join("api.sock"));
        for port in config.ports.iter_mut().filter(|port| has_socket(port)) {
            port.socket = dir.path().join(&port.socket);
        }
        std::fs::write(dir.path().join("ringway.toml"), config.to_toml())?;
        let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        let process = launch(dir.path(), &arguments)?;
        let mut switch = Self {
            process,
            config,
            arguments,
            dir,
        };
        switch.wait_started()?;
        Ok(switch)
    }

    fn wait_started(&mut self) -> Result<()> {
        let listening = self
            .config
            .ports
            .iter()
            .filter(|port| has_socket(port) && port.mode == SocketMode::Server);
        let mut sockets: Vec<PathBuf> = listening.map(|port| port.socket.clone()).collect();
        sockets.push(self.api());
        let process = &mut self.process;
        let all = || sockets.iter().all(|s| s.exists());
        wait_until("ringway listens", START, || !process.alive() || all())?;
        ensure!(
            self.process.alive() && all(),
            "ringway did not start:\n{}",
            self.process.output()
        );
        Ok(())
    }

    /// The folder with the switch's sockets.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The socket of a port.
    pub fn socket(&self, port: &str) -> PathBuf {
        self.dir.path().join(format!("{port}.sock"))
    }

    /// The control socket.
    pub fn api(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// The process, for its pid, log and signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Runs a subcommand against this switch and returns what it printed.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        let binary = binary()?;
        let api = self.api();
        let fixed = [binary.as_os_str(), "--api".as_ref(), api.as_os_str()];
        run(
            fixed.into_iter().chain(arguments.iter().map(AsRef::as_ref)),
            COMMAND,
        )
    }

    /// `ringway stats --json`.
    pub fn stats(&self) -> Result<StatsReport> {
        let text = self.command(&["stats", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("`ringway stats --json` said {text}"))
    }

    /// `ringway port show NAME --json`.
    pub fn port(&self, name: &str) -> Result<PortStatus> {
        let text = self.command(&["port", "show", name, "--json"])?;
        serde_json::from_str(&text)
            .with_context(|| format!("`ringway port show {name} --json` said {text}"))
    }

    /// Waits until a port is in `state`, and returns what it says of itself.
    pub fn wait_port(&self, name: &str, state: PortState, within: Duration) -> Result<PortStatus> {
        let end = Instant::now() + within;
        loop {
            let port = self.port(name)?;
            if port.state == state {
                return Ok(port);
            }
            ensure!(
                Instant::now() < end,
                "port {name:?} is {} after {within:?}, not {state}: {}\n{}",
                port.state,
                port.reason.unwrap_or_default(),
                self.process.output()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until all traffic has come to rest, asserts that every frame is accounted for, and returns the sums.
    pub fn balanced_books(&self) -> Result<Counters> {
        let end = Instant::now() + SETTLE;
        let mut last = self.stats()?;
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.stats()?;
            if now.total == last.total {
                ensure!(
                    now.total.balanced(),
                    "received + replicated != sent + dropped: {:?}",
                    now.total
                );
                ensure!(
                    now.ports_total() == now.total,
                    "the ports do not add up to the total: {now:?}"
                );
                return Ok(now.total);
            }
            ensure!(
                Instant::now() < end,
                "frames still move {SETTLE:?} after the traffic stopped: {:?}",
                now.total
            );
            last = now;
        }
    }

    /// Asks the switch to end (SIGTERM); it must leave in time, with success and without its sockets.
    pub fn stop(mut self) -> Result<Duration> {
        let (status, took) = self.process.terminate(STOP)?;
        ensure!(
            status.success(),
            "ringway left with {status}:\n{}",
            self.process.output()
        );
        let listening = self
            .config
            .ports
            .iter()
            .filter(|port| has_socket(port) && port.mode == SocketMode::Server);
        let mut left = listening
            .map(|port| port.socket.clone())
            .chain([self.api()]);
        if let Some(socket) = left.find(|socket| socket.exists()) {
            anyhow::bail!("ringway left {} behind", socket.display());
        }
        Ok(took)
    }

    /// Ends it as a crash would, and starts it again with the same configuration; sockets may be left over.
    pub fn crash_and_restart(&mut self) -> Result<()> {
        self.process.kill();
        self.process = launch(self.dir.path(), &self.arguments)?;
        let process = &mut self.process;
        let api = self.dir.path().join("api.sock");
        // The api socket of the dead switch may still be there: ask it.
        let binary = binary()?;
        let answers = || {
            run(
                [
                    binary.as_os_str(),
                    "--api".as_ref(),
                    api.as_os_str(),
                    "stats".as_ref(),
                ],
                COMMAND,
            )
            .is_ok()
        };
        wait_until("ringway answers after a restart", START, || {
            !process.alive() || answers()
        })?;
        ensure!(
            self.process.alive(),
            "ringway did not start again:\n{}",
            self.process.output()
        );
        Ok(())
    }
}

/// A port on which Ringway listens, open to every user.
pub fn server_port(name: &str) -> PortSpec {
    PortSpec {
        socket_mode: Some(Permissions(0o666)),
        ..PortSpec::vhost_user(name, format!("{name}.sock"))
    }
}

/// A port on which the guest listens.
pub fn client_port(name: &str) -> PortSpec {
    PortSpec {
        mode: SocketMode::Client,
        ..PortSpec::vhost_user(name, format!("{name}.sock"))
    }
}

/// An uplink has none.
fn has_socket(port: &PortSpec) -> bool {
    port.kind == PortKind::VhostUser
}

fn launch(dir: &Path, arguments: &[String]) -> Result<Process> {
    let (binary, config) = (binary()?, dir.join("ringway.toml"));
    let fixed = [
        binary.as_os_str(),
        "run".as_ref(),
        "--config".as_ref(),
        config.as_os_str(),
    ];
    let all = fixed.into_iter().chain(arguments.iter().map(AsRef::as_ref));
    Launch::new("ringway", all).start()
}
