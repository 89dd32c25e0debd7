//! Ringway itself, as a user starts it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Common, Peer, Place, Runs, Setup, Switch, Work, output, wait_for_sockets};
use crate::client::DESTINATION;
use crate::process::{Proc, command, find};
use crate::rows::{Row, Traffic};

pub(crate) struct Ringway {
    binary: Option<PathBuf>,
}

impl Ringway {
    /// With the binary named, or the one beside the running `ringway-bench`, or the one in `PATH`.
    pub(crate) fn new(named: Option<&Path>) -> Self {
        let beside = std::env::current_exe()
            .ok()
            .map(|own| own.with_file_name("ringway"));
        let binary = match named {
            Some(path) => Some(path.to_owned()),
            None => beside
                .filter(|path| path.is_file())
                .or_else(|| find("ringway")),
        };
        Self { binary }
    }
}

impl Peer for Ringway {
    fn name(&self) -> &'static str {
        "ringway"
    }

    fn missing(&self) -> Option<String> {
        match &self.binary {
            None => Some(
                "ringway is not built: cargo build --release (or name it with --ringway PATH)"
                    .to_owned(),
            ),
            Some(path) if !path.is_file() => {
                Some(format!("ringway: {}: no such file", path.display()))
            }
            Some(_) => None,
        }
    }

    fn start(&self, setup: Setup, place: &Place) -> Result<Box<dyn Switch>> {
        let Some(binary) = self.binary.clone() else {
            bail!("ringway is not built")
        };
        let directory = place.own("r", setup)?;
        let sockets = place.sockets(&directory, setup);
        let api = directory.join("api");
        let log = directory.join("log");
        let file = directory.join("ringway.toml");
        std::fs::write(&file, configuration(&sockets, setup, place))?;
        let mut ringway = command(&binary);
        ringway
            .arg("run")
            .arg("--config")
            .arg(&file)
            .arg("--api")
            .arg(&api);
        ringway
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?);
        let mut proc = Proc::start(
            "ringway",
            &[place.cpus.switch, place.cpus.control],
            &mut ringway,
        )?;
        place.wait_for(&mut proc, &sockets, &log)?;
        wait_for_sockets(&mut proc, std::slice::from_ref(&api), &log)?;
        let version = output(Command::new(&binary).arg("--version"))?
            .trim()
            .to_owned();
        Ok(Box::new(Running {
            common: Common {
                runs: Runs::Daemon(proc),
                sockets,
                version,
            },
            binary,
            api,
        }))
    }
}

/// What an operator would write; only the table for many stations, and what a row asks for, are not the default.
fn configuration(sockets: &[PathBuf], setup: Setup, place: &Place) -> String {
    let mut text = format!("workers = [{}]\n", place.cpus.switch);
    if setup.stations {
        text += "[fdb]\ncapacity = 1000000\n";
    }
    for (port, socket) in sockets.iter().enumerate() {
        text += &format!(
            "[[port]]\nname = \"p{port}\"\ntype = \"vhost-user\"\nsocket = \"{}\"\n",
            socket.display()
        );
        if place.switch_connects() {
            text += "mode = \"client\"\n";
        }
        if setup.queues > 1 {
            text += &format!("queues = {}\n", setup.queues);
        }
    }
    text
}

struct Running {
    common: Common,
    binary: PathBuf,
    api: PathBuf,
}

impl Running {
    fn ask(&self, arguments: &[&str]) -> Result<String> {
        output(
            Command::new(&self.binary)
                .args(arguments)
                .arg("--api")
                .arg(&self.api),
        )
    }
}

impl Switch for Running {
    fn common(&self) -> &Common {
        &self.common
    }

    fn prepare(&mut self, row: &Row) -> Result<()> {
        if let Traffic::Stations(_) = row.traffic {
            let mac = DESTINATION.to_string();
            self.ask(&["fdb", "flush"])?;
            self.ask(&["fdb", "add", &mac, "p1"])?;
        }
        Ok(())
    }

    fn work(&mut self) -> Result<Option<Work>> {
        let answer = fetch(&self.api, "/v1/workers")?;
        Ok(Some(work(&answer).with_context(|| {
            format!("ringway: cannot read its workers:\n{answer}")
        })?))
    }
}

/// What `curl --unix-socket` does, without starting a process on a CPU that is being measured.
fn fetch(api: &Path, path: &str) -> Result<Value> {
    let conversation = || -> Result<Value> {
        let mut stream = UnixStream::connect(api)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(
            stream,
            "GET {path} HTTP/1.0\r\nHost: ringway\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        if !head
            .lines()
            .next()
            .is_some_and(|line| line.contains(" 200 "))
        {
            bail!("{}", head.lines().next().unwrap_or_default());
        }
        Ok(serde_json::from_str(body)?)
    };
    conversation().with_context(|| format!("ringway: {path}"))
}

/// Adds the workers up.
fn work(workers: &Value) -> Option<Work> {
    let mut sum = Work {
        frames: 0,
        busy: 0.0,
        all: Some(0.0),
    };
    for worker in workers.as_array()? {
        sum.frames += worker["counters"]["received"].as_u64()?;
        sum.busy += worker["busy_cycles"].as_f64()?;
        sum.all = Some(sum.all? + worker["cycles"].as_f64()?);
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn adds_the_workers_frames_and_cycles_up() {
        let worker = json!({"cpu": 0, "cycles": 1000, "busy_cycles": 400, "counters": {"received": 10, "sent": 9}});
        let expected = Work {
            frames: 20,
            busy: 800.0,
            all: Some(2000.0),
        };
        assert_eq!(work(&json!([worker, worker])), Some(expected));
        assert_eq!(work(&json!([{"cpu": 0}])), None);
        assert_eq!(work(&json!({"error": "no"})), None);
    }

    #[test]
    fn the_configuration_names_every_port_and_a_large_table_only_where_needed() {
        let sockets = [PathBuf::from("/t/0"), PathBuf::from("/t/1")];
        let mut place = Place {
            directory: PathBuf::new(),
            cpus: crate::client::Cpus {
                switch: 3,
                client: 1,
                control: 0,
            },
            containers: Vec::new(),
        };
        let mut setup = Setup {
            ports: 2,
            jumbo: false,
            stations: false,
            queues: 1,
        };
        let plain = configuration(&sockets, setup, &place);
        assert_eq!(plain.matches("[[port]]").count(), 2);
        assert!(
            plain.starts_with("workers = [3]\n") && plain.contains("socket = \"/t/1\""),
            "{plain}"
        );
        assert!(
            !["[fdb]", "mode", "queues"]
                .iter()
                .any(|key| plain.contains(key))
        );
        (setup.stations, setup.queues) = (true, 4);
        place.containers = sockets.to_vec();
        let more = configuration(&sockets, setup, &place);
        assert!(more.contains("[fdb]"), "{more}");
        for key in ["mode = \"client\"", "queues = 4"] {
            assert_eq!(more.matches(key).count(), 2, "{more}");
        }
    }
}
