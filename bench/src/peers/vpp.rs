//! VPP: one L2 bridge domain, one thread that polls. It is in no Debian release: `--vpp` names its binary.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Common, Peer, Place, Runs, Setup, Switch, Work, output, wait_for_sockets};
use crate::client::DESTINATION;
use crate::process::{Proc, command, find};
use crate::rows::{Row, Traffic};

pub(crate) struct Vpp {
    binary: PathBuf,
}

impl Vpp {
    pub(crate) fn new(binary: &Path) -> Self {
        Self {
            binary: binary.to_owned(),
        }
    }

    /// `vppctl` lies beside `vpp` or in `PATH`.
    fn control(&self) -> Option<PathBuf> {
        let beside = self.binary.with_file_name("vppctl");
        if beside.is_file() {
            Some(beside)
        } else {
            find("vppctl")
        }
    }
}

impl Peer for Vpp {
    fn name(&self) -> &'static str {
        "vpp"
    }

    fn missing(&self) -> Option<String> {
        if !self.binary.is_file() {
            return Some(format!("VPP: {}: no such file", self.binary.display()));
        }
        let absent = self.control().is_none();
        absent.then(|| {
            format!(
                "VPP: no vppctl beside {} nor in PATH",
                self.binary.display()
            )
        })
    }

    fn start(&self, setup: Setup, place: &Place) -> Result<Box<dyn Switch>> {
        let directory = place.own("v", setup)?;
        let cli = directory.join("cli");
        let log = directory.join("vpp.log");
        let configuration = directory.join("startup.conf");
        std::fs::write(&configuration, startup(&cli, place.cpus.switch))?;
        let mut vpp = command(&self.binary);
        vpp.arg("-c").arg(&configuration);
        vpp.stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?);
        let mut proc = Proc::start("VPP", &[place.cpus.switch, place.cpus.control], &mut vpp)?;
        wait_for_sockets(&mut proc, std::slice::from_ref(&cli), &log)?;

        let control = Control {
            program: self.control().context("vppctl")?,
            socket: cli,
        };
        let version = control.until_it_answers()?;
        let sockets = place.sockets(&directory, setup);
        for (port, socket) in sockets.iter().enumerate() {
            let server = if place.switch_connects() {
                ""
            } else {
                " server"
            };
            control.ask(&format!(
                "create vhost-user socket {}{server}",
                socket.display()
            ))?;
            control.ask(&format!(
                "set interface l2 bridge VirtualEthernet0/0/{port} 1"
            ))?;
            control.ask(&format!("set interface state VirtualEthernet0/0/{port} up"))?;
            control.ask(&format!(
                "set interface rx-mode VirtualEthernet0/0/{port} polling"
            ))?;
        }
        place.wait_for(&mut proc, &sockets, &log)?;
        Ok(Box::new(Running {
            common: Common {
                runs: Runs::Daemon(proc),
                sockets,
                version,
            },
            control,
        }))
    }
}

fn startup(cli: &Path, cpu: usize) -> String {
    format!(
        "unix {{ nodaemon cli-listen {} }}\ncpu {{ main-core {cpu} }}\n\
         buffers {{ buffers-per-numa 65536 default data-size 2048 page-size default-hugepage }}\n\
         plugins {{ plugin dpdk_plugin.so {{ disable }} }}\n",
        cli.display()
    )
}

struct Control {
    program: PathBuf,
    socket: PathBuf,
}

impl Control {
    fn ask(&self, line: &str) -> Result<String> {
        output(
            Command::new(&self.program)
                .arg("-s")
                .arg(&self.socket)
                .args(line.split(' ')),
        )
    }

    /// The socket exists before anybody listens; the first answer is the version.
    fn until_it_answers(&self) -> Result<String> {
        for _ in 0..50 {
            if let Ok(version) = self.ask("show version") {
                let words: Vec<_> = version.split_whitespace().take(2).collect();
                return Ok(words.join(" "));
            }
            crate::interrupt::sleep(Duration::from_millis(100))?;
        }
        bail!("VPP: its control socket does not answer")
    }
}

struct Running {
    common: Common,
    control: Control,
}

impl Switch for Running {
    fn common(&self) -> &Common {
        &self.common
    }

    fn prepare(&mut self, row: &Row) -> Result<()> {
        if let Traffic::Stations(_) = row.traffic {
            let mac = DESTINATION.to_string();
            self.control.ask("l2fib flush-mac bridge-domain 1")?;
            self.control
                .ask(&format!("l2fib add {mac} 1 VirtualEthernet0/0/1 static"))?;
        }
        // The averages have three digits: let them begin with this client.
        self.control.ask("clear runtime").map(drop)
    }

    fn work(&mut self) -> Result<Option<Work>> {
        Ok(work(&self.control.ask("show runtime")?))
    }
}

/// Sums up the cycles of the nodes that frames went through; none before the first frame. The columns are name, state
/// (one word or two, sometimes glued to the name), calls, vectors, suspends, clocks per vector, vectors per call.
fn work(text: &str) -> Option<Work> {
    let mut frames = 0.0;
    let mut busy = 0.0;
    for line in text.lines() {
        let columns: Vec<_> = line.split_whitespace().collect();
        let [name, .., _, vectors, _, clocks, _] = columns[..] else {
            continue;
        };
        let (Ok(vectors), Ok(clocks)) = (vectors.parse::<f64>(), clocks.parse::<f64>()) else {
            continue;
        };
        busy += vectors * clocks;
        if name.starts_with("vhost-user-input") {
            frames += vectors;
        }
    }
    (frames > 0.0).then_some(Work {
        frames: frames as u64,
        busy,
        all: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // The layout of `show runtime` with round numbers.
    const RUNTIME: &str = "Time 3.0, 10 sec internal node vector rate 0.00 loops/sec 503787.45
  vector rates in 1.0000e3, out 1.0000e3, drop 0.0000e0, punt 0.0000e0
             Name                 State         Calls          Vectors        Suspends         Clocks       Vectors/Call
VirtualEthernet0/0/1-output      active               1000           32000               0          4.50e0           32.00
acl-plugin-fa-worker-cleaner-pinterrupt wa              18               0               0          3.68e3            0.00
dpdk-process                    any wait                 0               0               3          1.31e5            0.00
l2-learn                         active               1000           32000               0          8.00e0           32.00
vhost-user-input                 polling              9000           32000               0          2.60e1            3.56
";

    #[test]
    fn sums_the_cycles_of_the_nodes_that_frames_went_through() {
        let work = work(RUNTIME).unwrap();
        assert_eq!(work.frames, 32_000);
        assert!((work.busy / 32_000.0 - 38.5).abs() < 1e-9, "{work:?}");
    }

    #[test]
    fn without_a_frame_there_are_no_cycles_per_frame() {
        assert_eq!(
            work("vhost-user-input  polling  9000  0  0  8.7e1  0.00"),
            None
        );
        assert_eq!(work(""), None);
    }
}
