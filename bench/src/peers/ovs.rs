//! Open vSwitch with its userspace datapath (OVS-DPDK): a bridge that learns, one polling thread.

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
use crate::process::{Proc, command, find, wait_for_paths};
use crate::rows::{Row, Traffic};

const DAEMON: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

pub(crate) struct Ovs;

impl Peer for Ovs {
    fn name(&self) -> &'static str {
        "ovs"
    }

    fn missing(&self) -> Option<String> {
        let complete =
            find(DAEMON).is_some() && find("ovs-vsctl").is_some() && find("ovsdb-server").is_some();
        if !complete {
            return Some(
                "OVS-DPDK is not installed: apt-get install openvswitch-switch-dpdk".to_owned(),
            );
        }
        // Two OVS of one network namespace fight over the taps of their bridges.
        let own = output(Command::new("unshare").args(["-n", "true"]));
        own.err().map(|_| {
            "OVS-DPDK needs root (a network namespace of its own): run with sudo".to_owned()
        })
    }

    fn start(&self, setup: Setup, place: &Place) -> Result<Box<dyn Switch>> {
        let directory = place.own("o", setup)?;
        let database = start_database(&directory, place)?;
        configure(&directory, place.cpus.switch)?;

        let log = directory.join("vs.log");
        let control = directory.join("vs.ctl");
        let mut daemon = command("unshare");
        daemon
            .args(["-n", DAEMON])
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

        let names: Vec<_> = (0..setup.ports).map(|port| format!("vhu{port}")).collect();
        add_ports(&directory, &names, setup.jumbo)?;
        let sockets: Vec<_> = names.iter().map(|name| directory.join(name)).collect();
        wait_for_sockets(&mut proc, &sockets, &log)?;
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
        }))
    }
}

fn environment(directory: &Path) -> [(&'static str, PathBuf); 4] {
    // The last one is DPDK's.
    ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "RUNTIME_DIRECTORY"]
        .map(|key| (key, directory.to_owned()))
}

fn start_database(directory: &Path, place: &Place) -> Result<Proc> {
    let file = directory.join("conf.db");
    output(
        Command::new("ovsdb-tool")
            .arg("create")
            .arg(&file)
            .arg(SCHEMA)
            .envs(environment(directory)),
    )?;
    let socket = directory.join("db.sock");
    let log = File::create(directory.join("db.log"))?;
    let mut server = command(find("ovsdb-server").context("ovsdb-server")?);
    server
        .arg(&file)
        .arg(format!("--remote=punix:{}", socket.display()));
    server.arg(format!("--unixctl={}", directory.join("db.ctl").display()));
    server
        .envs(environment(directory))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let mut proc = Proc::start("ovsdb-server", &[place.cpus.control], &mut server)?;
    wait_for_paths(&[socket], Duration::from_secs(10), || match proc.ended() {
        None => Ok(()),
        Some(status) => bail!("ovsdb-server ended: {status}"),
    })?;
    Ok(proc)
}

fn vsctl(directory: &Path) -> Command {
    let mut vsctl = Command::new("ovs-vsctl");
    vsctl
        .arg(format!("--db=unix:{}", directory.join("db.sock").display()))
        .arg("--timeout=15");
    vsctl
}

fn configure(directory: &Path, cpu: usize) -> Result<()> {
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
    let mut set = vsctl(directory);
    set.args(["--no-wait", "set", "Open_vSwitch", "."]);
    set.args(options.map(|option| format!("other_config:{option}")));
    output(&mut set).map(drop)
}

fn add_ports(directory: &Path, names: &[String], jumbo: bool) -> Result<()> {
    let mut add = vsctl(directory);
    add.args(
        "add-br br0 -- set bridge br0 datapath_type=netdev other_config:mac-table-size=262144"
            .split(' '),
    );
    for name in names {
        add.args([
            "--",
            "add-port",
            "br0",
            name,
            "--",
            "set",
            "interface",
            name,
            "type=dpdkvhostuser",
        ]);
        if jumbo {
            add.arg("mtu_request=9000");
        }
    }
    output(&mut add).map(drop)
}

struct Running {
    // Dropped in this order: the daemon before its database.
    common: Common,
    #[allow(dead_code, reason = "lives as long as the daemon")]
    database: Proc,
    control: PathBuf,
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
