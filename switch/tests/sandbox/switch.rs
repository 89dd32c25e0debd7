//! The program, started under the strict sandbox, and what is asked of it. If it dies meanwhile, its log says of what.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ringway::cli::Client;
use ringway::control::state::{PortState, PortStatus};
use rustix::process::{Pid, Signal, kill_process};

use super::PATIENCE;

pub(super) struct Switch {
    pub(super) child: Child,
    pub(super) dir: PathBuf,
}

impl Switch {
    pub(super) fn start(dir: &Path, more: &[&str]) -> Switch {
        let ringway = env!("CARGO_BIN_EXE_ringway");
        // For `tests/syscalls`: the same, watched instead of confined.
        let traced = std::env::var("RINGWAY_TEST_TRACE").ok();
        let mut command = match &traced {
            Some(file) => {
                let mut strace = Command::new("strace");
                strace.args(["-D", "-f", "-A", "--decode-pids=comm", "-o", file, ringway]);
                strace
            }
            None => Command::new(ringway),
        };
        command
            .current_dir(dir)
            .env("RINGWAY_API", dir.join("api.sock"))
            .arg("run");
        if traced.is_some() {
            command.args(["--sandbox", "off"]);
        } else {
            command.args(["--sandbox", "strict"]);
        }
        let log = fs::File::create(dir.join("log")).expect("a log");
        let child = command
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("ran");
        let mut switch = Switch {
            child,
            dir: dir.to_owned(),
        };
        switch.wait("it answers", |switch| {
            switch
                .client()
                .get::<serde_json::Value>("/v1/version")
                .is_ok()
        });
        switch
    }

    pub(super) fn client(&self) -> Client {
        Client::new(self.dir.join("api.sock"))
    }

    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub(super) fn wait(&mut self, what: &str, mut done: impl FnMut(&Switch) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            let dead = self.child.try_wait().expect("a child");
            assert!(
                dead.is_none(),
                "{what}: the switch ended with {dead:?}:\n{}",
                self.log()
            );
            assert!(
                Instant::now() < end,
                "{what}: not within {PATIENCE:?}:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(super) fn port(&self, name: &str) -> Option<PortStatus> {
        self.client().get(&format!("/v1/ports/{name}")).ok()
    }

    pub(super) fn wait_state(&mut self, name: &str, state: PortState) {
        self.wait(&format!("{name} is {state}"), |switch| {
            switch.port(name).is_some_and(|port| port.state == state)
        });
    }

    pub(super) fn output(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ringway"))
            .current_dir(&self.dir)
            .env("RINGWAY_API", self.dir.join("api.sock"))
            .args(line.split_whitespace())
            .output()
            .expect("ran")
    }

    pub(super) fn command(&mut self, line: &str) -> String {
        let output = self.output(line);
        let dead = self.child.try_wait().expect("a child");
        assert!(
            dead.is_none(),
            "ringway {line}: the switch ended with {dead:?}:\n{}",
            self.log()
        );
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "ringway {line}: {said}\n{}",
            self.log()
        );
        String::from_utf8(output.stdout).expect("text")
    }

    pub(super) fn signal(&self, signal: Signal) {
        // Under strace the switch is its child.
        let version: ringway::control::state::Version =
            self.client().get("/v1/version").expect("it answers");
        kill_process(Pid::from_raw(version.pid as i32).expect("a pid"), signal).expect("it runs");
    }

    pub(super) fn end(mut self) {
        self.signal(Signal::TERM);
        let status = self.child.wait().expect("ended");
        assert!(status.success(), "{status}:\n{}", self.log());
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
