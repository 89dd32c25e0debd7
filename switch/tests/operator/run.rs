//! `ringway run`: the real switch, from the start to the end of its process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ringway::cli::Client;
use ringway::control::state::PortStatus;
use rustix::process::{Pid, Signal, kill_process};

struct Switch {
    child: Child,
    dir: tempfile::TempDir,
}

impl Switch {
    /// Runs with these arguments in a directory of its own, and waits until it answers.
    fn start(prepare: impl FnOnce(&Path), line: &str) -> Switch {
        let dir = tempfile::tempdir().expect("a directory");
        prepare(dir.path());
        let child = Command::new(env!("CARGO_BIN_EXE_ringway"))
            .current_dir(dir.path())
            .env("RINGWAY_API", dir.path().join("api.sock"))
            .args(line.split_whitespace())
            .stderr(Stdio::null())
            .spawn()
            .expect("ran");
        let switch = Switch { child, dir };
        let end = Instant::now() + Duration::from_secs(10);
        while switch.ports().is_none() {
            assert!(Instant::now() < end, "it answers in time");
            std::thread::sleep(Duration::from_millis(5));
        }
        switch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn ports(&self) -> Option<Vec<String>> {
        let ports: Vec<PortStatus> = Client::new(self.path("api.sock")).get("/v1/ports").ok()?;
        Some(ports.into_iter().map(|port| port.spec.name).collect())
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("it runs");
    }

    /// How long it took to end well after this signal.
    fn end(&mut self, signal: Signal) -> Duration {
        let before = Instant::now();
        self.signal(signal);
        let status = self.child.wait().expect("ended");
        assert!(status.success(), "{status}");
        before.elapsed()
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const TWO_PORTS: &str = "run --idle adaptive --port vhost-user:blue,socket=ports/blue/s --port vhost-user:red,socket=red";

#[test]
fn ends_within_100_ms_and_leaves_no_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut switch = Switch::start(|_| (), TWO_PORTS);
        let sockets = ["api.sock", "ports/blue/s", "red"].map(|name| switch.path(name));
        assert!(sockets.iter().all(|socket| socket.exists()), "{sockets:?}");
        let took = switch.end(signal);
        // 100 ms, and as much again for a machine that runs other tests meanwhile.
        assert!(took < Duration::from_millis(200), "{signal:?}: {took:?}");
        assert!(sockets.iter().all(|socket| !socket.exists()), "{sockets:?}");
    }
}

#[test]
fn starts_over_the_sockets_of_a_killed_one() {
    let mut killed = Switch::start(|_| (), TWO_PORTS);
    killed.child.kill().expect("it runs");
    killed.child.wait().expect("ended");
    assert!(killed.path("red").exists(), "kill -9 leaves its sockets");
    let again = Command::new(env!("CARGO_BIN_EXE_ringway"))
        .current_dir(killed.dir.path())
        .env("RINGWAY_API", killed.path("api.sock"))
        .args(TWO_PORTS.split_whitespace())
        .stderr(Stdio::null())
        .spawn()
        .expect("ran");
    killed.child = again;
    let end = Instant::now() + Duration::from_secs(10);
    while killed.ports().is_none() {
        assert!(Instant::now() < end, "it answers in time");
        std::thread::sleep(Duration::from_millis(5));
    }
    killed.end(Signal::TERM);
}

#[test]
fn hangup_loads_the_file_again_and_a_broken_file_changes_nothing() {
    let port = |dir: &Path, name: &str| {
        let socket = dir.join(name);
        format!("[[port]]\nname = \"{name}\"\ntype = \"vhost-user\"\nsocket = {socket:?}\n")
    };
    let write = |dir: &Path, text: &str| {
        std::fs::write(dir.join("r.toml"), format!("idle = \"adaptive\"\n{text}"))
            .expect("written");
    };
    let mut switch = Switch::start(|dir| write(dir, &port(dir, "blue")), "run --config r.toml");
    let dir = switch.dir.path().to_owned();
    write(&dir, &(port(&dir, "blue") + &port(&dir, "red")));
    switch.signal(Signal::HUP);
    let end = Instant::now() + Duration::from_secs(5);
    while switch.ports() != Some(vec!["blue".to_owned(), "red".to_owned()]) {
        assert!(Instant::now() < end, "{:?}", switch.ports());
        std::thread::sleep(Duration::from_millis(5));
    }
    write(&dir, "colour = 1");
    switch.signal(Signal::HUP);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(switch.ports().map(|ports| ports.len()), Some(2));
    switch.end(Signal::TERM);
}

#[test]
fn a_bad_port_on_the_command_line_starts_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let output = Command::new(env!("CARGO_BIN_EXE_ringway"))
        .current_dir(dir.path())
        .env("RINGWAY_API", dir.path().join("api.sock"))
        .args(
            "run --port vhost-user:blue,socket=blue --port vhost-user:red,sokcet=red"
                .split_whitespace(),
        )
        .output()
        .expect("ran");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(
        said,
        "ringway: --port 2: unknown key \"sokcet\": did you mean \"socket\"?\n"
    );
    assert_eq!(
        std::fs::read_dir(dir.path()).expect("there").count(),
        0,
        "nothing was made"
    );
}
