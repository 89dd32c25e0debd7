//! Open vSwitch with its userspace datapath (OVS-DPDK): a bridge that learns, one polling thread. Of this system, or of another one
//! below a directory (a newer release by debootstrap, say), whose programs run in a chroot.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Common, Peer, Place, Runs, Setup, Switch, Work, output, wait_for_sockets};
use crate::client::DESTINATION;
use crate::process::{Proc, command, find};
use crate::rows::{Row, Traffic};

const DAEMON: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const PACKAGE: &str = "openvswitch-switch-dpdk";

/// Goes into another system with this one's devices and a directory of ours. The mounts are in a namespace that ends with the program.
const ENTER: &str = r#"set -e
root=$1 directory=$2
shift 2
for mount in proc sys dev; do mkdir -p "$root/$mount"; mount --rbind "/$mount" "$root/$mount"; done
top=${directory#/}
mkdir -p "$root/${top%%/*}"
mount -t tmpfs ringway-bench "$root/${top%%/*}"
mkdir -p "$root$directory"
mount --bind "$directory" "$root$directory"
exec chroot "$root" "$@""#;

/// OVS-DPDK of this system, or of another one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ovs {
    root: Option<PathBuf>,
}

impl Ovs {
    /// The one of the system below `root`.
    pub(crate) fn of(root: &Path) -> Self {
        Self {
            root: Some(root.to_owned()),
        }
    }

    /// Whether its system has this program or file: an absolute path, or a name.
    fn has(&self, program: &str) -> bool {
        let Some(root) = &self.root else {
            return find(program).is_some();
        };
        let places = ["/usr/bin/", "/usr/sbin/", ""];
        places.iter().any(|place| {
            let path = format!("{place}{program}");
            path.starts_with('/') && root.join(&path[1..]).is_file()
        })
    }

    /// The arguments that run `program` in its system, which sees `directory` where it is.
    fn inside(&self, directory: &Path, program: &str) -> Vec<OsString> {
        let Some(root) = &self.root else {
            let program = find(program).unwrap_or_else(|| program.into());
            return vec![program.into()];
        };
        let enter = ["unshare", "--mount", "sh", "-c", ENTER, "sh"];
        let mut words: Vec<OsString> = enter.map(OsString::from).into();
        words.extend([root.into(), directory.into(), program.into()]);
        words
    }

    /// A helper program of its system.
    fn helper(&self, directory: &Path, program: &str) -> Command {
        let words = self.inside(directory, program);
        let mut helper = Command::new(&words[0]);
        helper.args(&words[1..]).envs(environment(directory));
        helper
    }

    fn vsctl(&self, directory: &Path) -> Command {
        let mut vsctl = self.helper(directory, "ovs-vsctl");
        vsctl
            .arg(format!("--db=unix:{}", directory.join("db.sock").display()))
            .arg("--timeout=15");
        vsctl
    }
}

impl Peer for Ovs {
    fn name(&self) -> &'static str {
        match self.root {
            None => "ovs",
            Some(_) => "ovs-root",
        }
    }

    fn missing(&self) -> Option<String> {
        let programs = [DAEMON, SCHEMA, "ovs-vsctl", "ovsdb-server", "ovsdb-tool"];
        let absent = programs.iter().find(|program| !self.has(program));
        if let (Some(absent), Some(root)) = (absent, &self.root) {
            let root = root.display();
            return Some(format!(
                "--ovs-root {root}: no {absent} in it: chroot {root} apt-get install {PACKAGE}"
            ));
        }
        if absent.is_some() {
            return Some(format!(
                "OVS-DPDK is not installed: apt-get install {PACKAGE}"
            ));
        }
        // Two OVS of one network namespace fight over the taps of their bridges; a chroot takes mounts.
        let own = output(Command::new("unshare").args(["-n", "-m", "true"]));
        own.err()
            .map(|_| "OVS-DPDK needs root (namespaces of its own): run with sudo".to_owned())
    }

    fn start(&self, setup: Setup, place: &Place) -> Result<Box<dyn Switch>> {
        let tag = if self.root.is_some() { "n" } else { "o" };
        let directory = place.own(tag, setup)?;
        let database = self.start_database(&directory, place)?;
        self.configure(&directory, place.cpus.switch)?;

        let log = directory.join("vs.log");
        let control = directory.join("vs.ctl");
        let mut daemon = command("unshare");
        daemon
            .arg("-n")
            .args(self.inside(&directory, DAEMON))
            .arg(format!("unix:{}", directory.join("db.sock").display()));
        daemon
            .arg(format!("--unixctl={}", control.display()))
            .arg(format!("--log-file={}", log.display()));
        daemon
            .envs(environment(&directory))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut proc = Proc::start("OVS-DPDK", &[place.cpus.switch], &mut daemon)?;
        wait_for_sockets(&mut proc, std::slice::from_ref(&control), &log)?;

        let names: Vec<_> = (0..setup.ports).map(interface).collect();
        self.add_ports(&directory, &names, setup.jumbo, &place.containers)?;
        let sockets = match place.switch_connects() {
            true => place.containers.clone(),
            false => names.iter().map(|name| directory.join(name)).collect(),
        };
        place.wait_for(&mut proc, &sockets, &log)?;
        let version = ask(&control, "version", &[])?;
        let dpdk = std::fs::read_to_string(&log).ok().and_then(|log| {
            let (_, after) = log.split_once("Using DPDK ")?;
            Some(after.lines().next()?.to_owned())
        });
        let version = format!(
            "{} with DPDK {}",
            version
                .trim()
                .replace("ovs-vswitchd-dpdk (Open vSwitch)", "Open vSwitch"),
            dpdk.as_deref().unwrap_or("?")
        );
        Ok(Box::new(Running {
            common: Common {
                runs: Runs::Daemon(proc),
                sockets,
                version,
            },
            database,
            control,
            ovs: self.clone(),
            directory,
        }))
    }
}

impl Ovs {
    fn start_database(&self, directory: &Path, place: &Place) -> Result<Proc> {
        let file = directory.join("conf.db");
        output(
            self.helper(directory, "ovsdb-tool")
                .arg("create")
                .arg(&file)
                .arg(SCHEMA),
        )?;
        let socket = directory.join("db.sock");
        let log = directory.join("db.log");
        let words = self.inside(directory, "ovsdb-server");
        let mut server = command(&words[0]);
        server.args(&words[1..]);
        server
            .arg(&file)
            .arg(format!("--remote=punix:{}", socket.display()));
        server.arg(format!("--unixctl={}", directory.join("db.ctl").display()));
        server
            .envs(environment(directory))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let mut proc = Proc::start("ovsdb-server", &[place.cpus.control], &mut server)?;
        wait_for_sockets(&mut proc, &[socket], &log)?;
        Ok(proc)
    }

    fn configure(&self, directory: &Path, cpu: usize) -> Result<()> {
        let mask = format!("0x{:x}", 1u128 << cpu);
        let options = [
            "dpdk-init=true".to_owned(),
            "dpdk-socket-mem=512".to_owned(),
            // With large frames it would take every hugepage there is, and leave none for the client.
            "dpdk-socket-limit=1024".to_owned(),
            format!("dpdk-lcore-mask={mask}"),
            format!("pmd-cpu-mask={mask}"),
            format!(
                "dpdk-extra=\"--no-pci --in-memory --file-prefix=rwb{}\"",
                std::process::id()
            ),
        ];
        let mut set = self.vsctl(directory);
        set.args(["--no-wait", "set", "Open_vSwitch", "."]);
        set.args(options.map(|option| format!("other_config:{option}")));
        output(&mut set).map(drop)
    }

    /// Ports that listen, or that connect to these sockets.
    fn add_ports(
        &self,
        directory: &Path,
        names: &[String],
        jumbo: bool,
        containers: &[PathBuf],
    ) -> Result<()> {
        let mut add = self.vsctl(directory);
        add.args(
            "add-br br0 -- set bridge br0 datapath_type=netdev other_config:mac-table-size=262144"
                .split(' '),
        );
        for (port, name) in names.iter().enumerate() {
            add.args(["--", "add-port", "br0", name]);
            add.args(["--", "set", "interface", name]);
            match containers.get(port) {
                None => add.arg("type=dpdkvhostuser"),
                Some(socket) => add
                    .arg("type=dpdkvhostuserclient")
                    .arg(format!("options:vhost-server-path={}", socket.display())),
            };
            if jumbo {
                add.arg("mtu_request=9000");
            }
        }
        output(&mut add).map(drop)
    }
}

/// The name of a port.
fn interface(port: usize) -> String {
    format!("vhu{port}")
}

fn environment(directory: &Path) -> [(&'static str, PathBuf); 4] {
    // The last one is DPDK's.
    ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "RUNTIME_DIRECTORY"]
        .map(|key| (key, directory.to_owned()))
}

struct Running {
    // Dropped in this order: the daemon before its database.
    common: Common,
    #[allow(dead_code, reason = "lives as long as the daemon")]
    database: Proc,
    control: PathBuf,
    ovs: Ovs,
    directory: PathBuf,
}

impl Switch for Running {
    fn common(&self) -> &Common {
        &self.common
    }

    fn prepare(&mut self, row: &Row) -> Result<()> {
        if let Traffic::Stations(_) = row.traffic {
            let mac = DESTINATION.to_string();
            ask(&self.control, "fdb/flush", &["br0"])?;
            ask(&self.control, "fdb/add", &["br0", "vhu1", "0", &mac])?;
        }
        Ok(())
    }

    /// A port that was just connected is no way out until the main thread has seen its link come up: until then every frame to it
    /// is dropped. That thread shares its CPU with a polling one, so it may take its time.
    fn settle(&mut self, ports: usize) -> Result<()> {
        if ports == 0 {
            return Ok(()); // vsctl wants a command
        }
        let mut wait = self.ovs.vsctl(&self.directory);
        for port in 0..ports {
            wait.args(["--", "wait-until", "interface", &interface(port)]);
            wait.arg("link_state=up");
        }
        output(&mut wait)
            .map(drop)
            .context("OVS: its ports' links do not come up")
    }

    fn work(&mut self) -> Result<Option<Work>> {
        let text = ask(&self.control, "dpif-netdev/pmd-stats-show", &[])?;
        Ok(Some(work(&text).with_context(|| {
            format!("OVS: cannot read its statistics:\n{text}")
        })?))
    }
}

/// What `ovs-appctl` does, without starting a process on a CPU that is being measured.
fn ask(control: &Path, method: &str, arguments: &[&str]) -> Result<String> {
    let conversation = || -> Result<Value> {
        let mut stream = UnixStream::connect(control)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(
            json!({"id": 0, "method": method, "params": arguments})
                .to_string()
                .as_bytes(),
        )?;
        let mut answers = serde_json::Deserializer::from_reader(stream).into_iter::<Value>();
        Ok(answers.next().context("no answer")??)
    };
    let answer = conversation().with_context(|| format!("OVS: {method}"))?;
    match &answer["error"] {
        Value::Null => Ok(answer["result"].as_str().unwrap_or_default().to_owned()),
        error => bail!("OVS: {method}: {error}"),
    }
}

/// Sums the polling threads of `pmd-stats-show` up.
fn work(text: &str) -> Option<Work> {
    let threads = text.split("pmd thread").skip(1);
    threads
        .map(|thread| {
            let thread = thread.split("main thread").next().unwrap_or_default();
            let value = |label: &str| {
                let (_, after) = thread.split_once(label)?;
                after.split_whitespace().next()?.parse::<u64>().ok()
            };
            let busy = value("processing cycles:")? as f64;
            Some(Work {
                frames: value("packets received:")?,
                busy,
                all: Some(busy + value("idle cycles:")? as f64),
            })
        })
        .reduce(|sum, thread| {
            let (sum, thread) = (sum?, thread?);
            let all = sum.all.zip(thread.all).map(|(a, b)| a + b);
            Some(Work {
                frames: sum.frames + thread.frames,
                busy: sum.busy + thread.busy,
                all,
            })
        })
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = include_str!("../../testdata/ovs-pmd-stats-1.txt");
    const SECOND: &str = include_str!("../../testdata/ovs-pmd-stats-2.txt");

    #[test]
    fn reads_frames_and_cycles_of_the_polling_thread_only() {
        let first = work(FIRST).unwrap();
        assert_eq!((first.frames, first.busy), (2_289_440, 691_845_959.0));
        assert_eq!(first.all, Some(691_845_959.0 + 571_992_383_119.0));
    }

    #[test]
    fn two_looks_give_the_cycles_per_frame_in_between() {
        let (first, second) = (work(FIRST).unwrap(), work(SECOND).unwrap());
        let cycles = (second.busy - first.busy) / (second.frames - first.frames) as f64;
        assert!((cycles - 231.98).abs() < 0.01, "{cycles}");
    }

    #[test]
    fn two_polling_threads_are_added() {
        let threads = FIRST.split("main thread").next().unwrap();
        let both = work(&format!(
            "{threads}{threads}main thread:\n  packets received: 7\n"
        ))
        .unwrap();
        assert_eq!((both.frames, both.busy), (4_578_880, 1_383_691_918.0));
    }

    #[test]
    fn garbage_is_refused() {
        assert_eq!(work("no such command"), None);
        assert_eq!(
            work("pmd thread numa_id 0 core_id 0:\n  packets received: many"),
            None
        );
    }
}
