//! OVS-DPDK with its daemons in a folder of their own: a peer of the benchmark and a proof of the rig.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::{Launch, Process, run, wait_until};
use crate::skip::{Missing, file, hugepages, root, tool};

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const VSWITCHD: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";

/// From nothing to DPDK initialised: 0.1 s on a quiet machine.
const START: Duration = Duration::from_secs(60);
const COMMAND: Duration = Duration::from_secs(30);

/// A running OVS-DPDK with one learning bridge; stopped on drop.
pub struct Ovs {
    // Dropped in this order: the switch before its database.
    vswitchd: Process,
    _database: Process,
    dir: PathBuf,
}

/// Pairs of queues and frame size of a port.
#[derive(Debug, Clone, Copy)]
pub struct PortOptions {
    /// Queue pairs.
    pub queues: u16,
    /// MTU asked for; 9000 for jumbo frames.
    pub mtu: u16,
}

impl Default for PortOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            mtu: 1500,
        }
    }
}

/// All that OVS-DPDK needs of the machine: it takes about 0.8 GB of hugepages whatever it is told.
pub fn available() -> Result<(), Missing> {
    root()?;
    tool("ovs-vsctl", "openvswitch-switch-dpdk")?;
    file(VSWITCHD, "openvswitch-switch-dpdk")?;
    hugepages(450)
}

impl Ovs {
    /// Starts the daemons in `dir` with all threads on `cpu`, and adds the bridge `br0` with MAC learning.
    ///
    /// The folder's path counts towards the 107 bytes of a socket path.
    pub fn start(dir: &Path, cpu: usize) -> Result<Self> {
        let dir = std::path::absolute(dir)?;
        std::fs::create_dir_all(&dir)?;
        let at = |name: &str| dir.join(name).display().to_string();
        let env: Vec<(String, String)> = ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"]
            .map(|v| (v.to_owned(), dir.display().to_string()))
            .into();
        run(["ovsdb-tool", "create", &at("conf.db"), SCHEMA], COMMAND)?;
        let server = [
            "ovsdb-server".to_owned(),
            at("conf.db"),
            format!("--remote=punix:{}", at("db.sock")),
            format!("--pidfile={}", at("db.pid")),
            format!("--unixctl={}", at("db.ctl")),
        ];
        let database = Launch {
            env: env.clone(),
            ..Launch::new("ovsdb-server", server)
        }
        .start()?;
        wait_until("ovsdb-server listens", START, || {
            dir.join("db.sock").exists()
        })?;
        configure(&dir, cpu)?;
        // A network namespace of its own: two OVS on one host fight over the taps ovs-netdev and br0.
        let switch = [
            "unshare".to_owned(),
            "-n".to_owned(),
            VSWITCHD.to_owned(),
            format!("unix:{}", at("db.sock")),
            format!("--pidfile={}", at("vs.pid")),
            format!("--unixctl={}", at("vs.ctl")),
        ];
        let vswitchd = Launch {
            env,
            ..Launch::new("ovs-vswitchd", switch)
        }
        .start()?;
        let ovs = Self {
            vswitchd,
            _database: database,
            dir,
        };
        let bridge = [
            "add-br",
            "br0",
            "--",
            "set",
            "bridge",
            "br0",
            "datapath_type=netdev",
        ];
        ovs.vsctl(&bridge.map(str::to_owned))
            .with_context(|| ovs.vswitchd.output())?;
        ovs.vsctl(
            &["set", "bridge", "br0", "other_config:mac-table-size=262144"].map(str::to_owned),
        )?;
        let ready =
            ovs.vsctl(&["get", "Open_vSwitch", ".", "dpdk_initialized"].map(str::to_owned))?;
        ensure!(
            ready.trim() == "true",
            "OVS has no DPDK: {}",
            ovs.vswitchd.output()
        );
        Ok(ovs)
    }

    /// Adds a vhost-user port on which OVS listens, and returns its socket.
    pub fn add_port(&self, name: &str, options: PortOptions) -> Result<PathBuf> {
        let mut command: Vec<String> = ["add-port", "br0", name, "--", "set", "interface", name]
            .map(str::to_owned)
            .into();
        command.push("type=dpdkvhostuser".to_owned());
        if options.queues > 1 {
            command.push(format!("options:n_rxq={}", options.queues));
        }
        if options.mtu != 1500 {
            command.push(format!("mtu_request={}", options.mtu));
        }
        self.vsctl(&command)?;
        let socket = self.dir.join(name);
        wait_until(
            &format!("OVS listens on {}", socket.display()),
            COMMAND,
            || socket.exists(),
        )?;
        Ok(socket)
    }

    /// `ovs-vsctl` on this instance.
    pub fn vsctl(&self, command: &[String]) -> Result<String> {
        vsctl(&self.dir, command)
    }

    /// `ovs-appctl` on this instance's switch, for example `dpif-netdev/pmd-stats-show`.
    pub fn appctl(&self, command: &[&str]) -> Result<String> {
        let control = self.dir.join("vs.ctl").display().to_string();
        run(
            ["ovs-appctl", "-t", &control].iter().chain(command),
            COMMAND,
        )
    }

    /// The daemon that forwards.
    pub fn vswitchd(&mut self) -> &mut Process {
        &mut self.vswitchd
    }
}

/// DPDK's own options, which OVS reads once at its start.
fn configure(dir: &Path, cpu: usize) -> Result<()> {
    let mask = format!("0x{:x}", 1u64 << cpu);
    let prefix = format!("ovs{}", std::process::id());
    let set = [
        "dpdk-init=true".to_owned(),
        "dpdk-socket-mem=512".to_owned(),
        format!("dpdk-lcore-mask={mask}"),
        format!("pmd-cpu-mask={mask}"),
        format!("dpdk-extra=\"--no-pci --in-memory --file-prefix={prefix}\""),
    ];
    let mut command = vec![
        "--no-wait".to_owned(),
        "set".to_owned(),
        "Open_vSwitch".to_owned(),
        ".".to_owned(),
    ];
    command.extend(set.map(|pair| format!("other_config:{pair}")));
    vsctl(dir, &command).map(drop)
}

fn vsctl(dir: &Path, command: &[String]) -> Result<String> {
    let db = format!("--db=unix:{}", dir.join("db.sock").display());
    let timeout = "--timeout=25".to_owned();
    run(
        ["ovs-vsctl".to_owned(), db, timeout].iter().chain(command),
        COMMAND,
    )
}
