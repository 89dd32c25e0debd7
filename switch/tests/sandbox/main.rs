//! The sandbox: everything the switch does can be done in it, and what it gave up cannot.
//!
//! The list of system calls is kept exact from both sides: `every_command_works_under_the_strict_sandbox` dies of a call that is
//! missing, and `tests/syscalls` shows by strace what this very test calls, by kind of thread.

mod deeds;
mod switch;

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ringway::cli::Client;
use ringway::control::sandbox::{self, Mode};
use ringway::control::security::SecurityReport;
use rustix::process::{Pid, Signal, kill_process};

use deeds::{operate, traffic, uplink, vanishing_memory};
use switch::Switch;

const PATIENCE: Duration = Duration::from_secs(30);

fn port(dir: &Path, name: &str, more: &str) -> String {
    format!(
        "[[port]]\nname = \"{name}\"\ntype = \"vhost-user\"\nsocket = {:?}\n{more}\n",
        dir.join(name)
    )
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

#[test]
fn every_command_works_under_the_strict_sandbox() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = port(dir.path(), "blue", "queues = 2") + &port(dir.path(), "red", "");
    fs::write(
        dir.path().join("r.toml"),
        format!("workers = [0]\nidle = \"adaptive\"\n{text}"),
    )
    .expect("written");
    let mut switch = Switch::start(dir.path(), &["--config", "r.toml"]);
    traffic(&mut switch, false);
    traffic(&mut switch, true);
    vanishing_memory(&mut switch);
    operate(&mut switch);
    uplink(&mut switch);
    traffic(&mut switch, false);
    switch.end();
    // After a crash its sockets are taken over.
    let mut killed = Switch::start(dir.path(), &["--config", "r.toml"]);
    killed.signal(Signal::KILL);
    killed.child.wait().expect("ended");
    let mut again = Switch::start(dir.path(), &["--config", "r.toml"]);
    traffic(&mut again, false);
    again.end();
}

#[test]
fn every_thread_has_given_up_what_it_does_not_need() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = port(dir.path(), "blue", "");
    fs::write(
        dir.path().join("r.toml"),
        format!("workers = [0]\nidle = \"adaptive\"\n{text}"),
    )
    .expect("written");
    let switch = Switch::start(dir.path(), &["--config", "r.toml"]);
    let report: SecurityReport = switch.client().get("/v1/security").expect("answers");
    assert!(report.no_new_privs, "{report:?}");
    let kept = [0u8, 1, 14]; // CHOWN, DAC_OVERRIDE, IPC_LOCK
    assert!(
        report
            .capabilities
            .iter()
            .chain(&report.bounding)
            .all(|number| uid() != 0 || kept.contains(number)),
        "{report:?}"
    );
    let sandbox = report.sandbox.as_ref().expect("given up");
    assert!(
        sandbox.seccomp && report.threads.iter().all(|thread| thread.filtered),
        "{report:?}"
    );
    let names = |start: &str| {
        report
            .threads
            .iter()
            .filter(|thread| thread.name.starts_with(start))
            .count()
    };
    assert_eq!(
        (names("worker-"), names("port-"), names("watch")),
        (1, 1, 1),
        "{report:?}"
    );
    for thread in &report.threads {
        let more = u32::from(thread.name.starts_with("worker-"));
        assert!(
            thread.filters.is_none_or(|filters| filters >= 2 + more),
            "{thread:?}"
        );
    }
    assert_eq!(
        sandbox.landlock.is_some(),
        sandbox::landlock_abi().is_some(),
        "{sandbox:?}"
    );
    let told = String::from_utf8(switch.output("doctor --security").stdout).expect("text");
    for line in [
        "host: seccomp",
        "host: Landlock",
        "host: userfaultfd",
        "kernel AIO",
        "switch: user",
        "switch: seccomp",
        "switch: Landlock",
    ] {
        assert!(told.contains(line), "{line} is not in\n{told}");
    }
    switch.end();
}

#[test]
fn a_socket_outside_of_the_directories_it_kept_is_refused_with_the_remedy() {
    if sandbox::landlock_abi().is_none() {
        eprintln!("SKIPPED: this kernel has no Landlock");
        return;
    }
    let (dir, other) = (
        tempfile::tempdir().expect("a directory"),
        tempfile::tempdir().expect("another"),
    );
    let add = format!(
        "port add vhost-user:green,socket={}/green",
        other.path().display()
    );
    let switch = Switch::start(dir.path(), &[]);
    let refused = switch.output(&add);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success()
            && said.contains("name the new one with --socket-dir and restart"),
        "{said}"
    );
    switch.end();
    let kept = other.path().display().to_string();
    let mut switch = Switch::start(dir.path(), &["--socket-dir", &kept]);
    switch.command(&add);
    switch.end();
}

#[test]
fn without_the_sandbox_it_says_so_loudly() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut child = Command::new(env!("CARGO_BIN_EXE_ringway"))
        .current_dir(dir.path())
        .env("RINGWAY_API", dir.path().join("api.sock"))
        .args(["run", "--sandbox", "off"])
        .stderr(Stdio::from(
            fs::File::create(dir.path().join("log")).expect("a log"),
        ))
        .spawn()
        .expect("ran");
    let client = Client::new(dir.path().join("api.sock"));
    let end = Instant::now() + PATIENCE;
    let report: SecurityReport = loop {
        match client.get("/v1/security") {
            Ok(report) => break report,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(
        report
            .sandbox
            .is_some_and(|sandbox| sandbox.mode == Mode::Off && !sandbox.seccomp)
    );
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    child.wait().expect("ended");
    let log = fs::read_to_string(dir.path().join("log")).expect("there");
    assert!(log.contains("THE SANDBOX IS OFF"), "{log}");
}

/// What an intruder would try; each must end as said. The child of the next test.
#[test]
fn child_that_tries_what_it_gave_up() {
    let Ok(act) = std::env::var("RINGWAY_TEST_CHILD") else {
        return;
    };
    let dir = PathBuf::from(std::env::var_os("RINGWAY_TEST_DIR").expect("set"));
    fs::write(dir.join("before"), "").expect("nothing is given up yet");
    let mode = if act == "strict worker" {
        Mode::Strict
    } else {
        Mode::On
    };
    let in_force = sandbox::enter(mode, vec![dir.clone()], &[]);
    assert!(in_force.missing.is_empty(), "{in_force:?}");
    let denied = |what: std::io::Result<()>| {
        let error = what.expect_err("was given up");
        let errno = error.raw_os_error();
        assert!(
            matches!(errno, Some(libc::EACCES | libc::ENOSYS | libc::EPERM)),
            "{error}"
        );
    };
    match act.as_str() {
        "socket" => drop(std::os::unix::net::UnixListener::bind(dir.join("s")).expect("kept")),
        "read" => denied(fs::read("/etc/hosts").map(drop)),
        "write" => denied(fs::write(dir.join("after"), "")),
        "truncate" => denied(
            fs::File::options()
                .write(true)
                .truncate(true)
                .open(dir.join("before"))
                .map(drop),
        ),
        "remove" => denied(fs::remove_dir(&dir)),
        "tcp" => denied(std::net::TcpStream::connect("127.0.0.1:9").map(drop)),
        "udp" => denied(std::net::UdpSocket::bind("127.0.0.1:0").map(drop)),
        "setuid" => denied(
            rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(1)).map_err(Into::into),
        ),
        "execute" => drop(Command::new("/bin/true").exec()),
        "worker" | "strict worker" => {
            sandbox::restrict_worker().expect("restricted");
            denied(fs::File::open(dir.join("before")).map(drop));
        }
        other => panic!("{other}?"),
    }
    std::process::exit(0);
}

fn tried(act: &str) -> std::process::ExitStatus {
    let dir = tempfile::tempdir().expect("a directory");
    let output = Command::new(std::env::current_exe().expect("known"))
        .args(["--exact", "child_that_tries_what_it_gave_up", "--nocapture"])
        .env("RINGWAY_TEST_CHILD", act)
        .env("RINGWAY_TEST_DIR", dir.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .output()
        .expect("ran");
    eprintln!(
        "{act}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output.status
}

#[test]
fn what_was_given_up_cannot_be_done_from_inside() {
    let mut acts = vec!["socket", "tcp", "udp", "setuid", "worker"];
    if sandbox::landlock_abi().is_some_and(|version| version >= 3) {
        acts.extend(["read", "write", "truncate", "remove"]);
    } else {
        eprintln!("SKIPPED in part: this kernel's Landlock is older than version 3");
    }
    for act in acts {
        assert!(tried(act).success(), "{act}");
    }
    // An intruder's calls end the process, and where that was asked for any that is not listed.
    for act in ["execute", "strict worker"] {
        assert_eq!(tried(act).signal(), Some(libc::SIGSYS), "{act}");
    }
}
