//! The program as a person or script types it, against a real API.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use crate::memory::{Memory, Running, start};

fn ringway(running: &Running, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringway"));
    command
        .env("RINGWAY_API", running.api.path())
        .current_dir(running.dir.path());
    command.args(line.split_whitespace()).output().expect("ran")
}

/// What it printed, if it went well.
fn fine(running: &Running, line: &str) -> String {
    let output = ringway(running, line);
    assert!(output.status.success(), "{line}: {output:?}");
    assert!(output.stderr.is_empty(), "{line}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// What it said, if it went wrong.
fn wrong(running: &Running, line: &str) -> String {
    let output = ringway(running, line);
    assert!(!output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stderr).expect("text")
}

fn json(running: &Running, line: &str) -> serde_json::Value {
    serde_json::from_str(&fine(running, &format!("{line} --json"))).expect("JSON")
}

#[test]
fn ports_are_added_listed_shown_moved_and_deleted() {
    let running = start(Memory::default());
    assert!(fine(&running, "port list").starts_with("no ports: add one with"));
    let added = fine(
        &running,
        "port add vhost-user:blue,socket=blue.sock,queues=2",
    );
    let socket = running
        .dir
        .path()
        .canonicalize()
        .expect("there")
        .join("blue.sock");
    assert_eq!(
        added,
        format!("added port \"blue\": listening at {}\n", socket.display())
    );
    let list = fine(&running, "port list");
    assert!(
        list.contains("blue")
            && list.contains("0/2")
            && list.contains("no guest has connected yet"),
        "{list}"
    );
    assert_eq!(json(&running, "port list")[0]["spec"]["queues"], 2);
    assert!(fine(&running, "port show blue").contains("VERSION_1"));
    fine(&running, "port move blue --pair 1 --worker 3");
    assert_eq!(running.memory.moves().len(), 1);
    assert_eq!(fine(&running, "port del blue"), "deleted port \"blue\"\n");
    assert_eq!(
        wrong(&running, "port show blue"),
        "ringway: there is no port \"blue\": ringway port list shows those there are\n"
    );
    assert!(wrong(&running, "port add vhost-user:blue").contains("socket is missing"));
}

#[test]
fn stations_are_shown_added_flushed_and_deleted() {
    let running = start(Memory::default());
    fine(&running, "port add vhost-user:blue,socket=/b");
    assert_eq!(
        fine(&running, "fdb add 02:00:00:00:00:01 blue"),
        "added 02:00:00:00:00:01 at port \"blue\"\n"
    );
    let shown = fine(&running, "fdb show --port blue");
    assert!(
        shown.contains("02:00:00:00:00:01")
            && shown.contains("static")
            && shown.contains("1 of 65,536"),
        "{shown}"
    );
    assert_eq!(json(&running, "fdb show --limit 1")["matching"], 1);
    assert_eq!(fine(&running, "fdb flush"), "0 stations removed\n");
    assert_eq!(
        fine(&running, "fdb del 02:00:00:00:00:01"),
        "1 stations removed\n"
    );
    assert!(wrong(&running, "fdb add 02:00 blue").contains("02:00"));
}

#[test]
fn a_file_is_loaded_again_after_a_look_at_the_plan() {
    let running = start(Memory::default());
    let text = "[[port]]\nname = \"red\"\ntype = \"vhost-user\"\nsocket = \"/red\"\n";
    std::fs::write(running.dir.path().join("r.toml"), text).expect("written");
    assert_eq!(
        fine(&running, "reload --config r.toml --dry-run"),
        "add port \"red\" at /red\n0 ports unchanged\n"
    );
    fine(&running, "reload --config r.toml");
    assert_eq!(
        fine(&running, "reload --config r.toml"),
        "nothing to do\n1 ports unchanged\n"
    );
    std::fs::write(
        running.dir.path().join("r.toml"),
        text.replace("red\"\nt", "red\"\ncolour = 1\nt"),
    )
    .expect("written");
    assert!(
        wrong(&running, "reload --config r.toml")
            .starts_with("ringway: r.toml:3: unknown key \"colour\": a port has")
    );
}

#[test]
fn counters_versions_and_advice_come_as_table_and_json() {
    let running = start(Memory::default());
    assert!(fine(&running, "stats").contains("total"));
    assert_eq!(json(&running, "stats")["total"]["received"], 0);
    assert!(fine(&running, "version").contains("running: "));
    assert!(fine(&running, "doctor").contains("isolated CPUs"));
    assert!(
        json(&running, "doctor")
            .as_array()
            .is_some_and(|checks| checks.len() > 10)
    );
}

#[test]
fn says_how_to_start_a_switch_when_none_runs() {
    let running = start(Memory::default());
    let said = wrong(&running, "port list --api /nowhere/api.sock");
    let start = "start one with `ringway run --config FILE`, or name its socket with --api PATH";
    assert_eq!(
        said,
        format!("ringway: no ringway runs at /nowhere/api.sock: {start}\n")
    );
}

#[test]
fn a_second_switch_on_the_same_socket_is_refused() {
    let running = start(Memory::default());
    assert!(
        wrong(&running, "run --port vhost-user:blue,socket=blue.sock")
            .contains("address already in use")
    );
    assert!(
        !running.dir.path().join("blue.sock").exists(),
        "nothing was touched"
    );
}

#[test]
fn checks_a_configuration_without_running_it() {
    let running = start(Memory::default());
    let fine = fine(
        &running,
        "run --check --port vhost-user:b,socket=b --port vhost-user:r,socket=r",
    );
    assert!(fine.starts_with("fine: 2 ports, workers on CPU"), "{fine}");
    let said = wrong(&running, "run --check --cpus 1023");
    assert!(
        said.starts_with("ringway: --cpus names CPU 1023, but this host has CPU"),
        "{said}"
    );
    let said = wrong(
        &running,
        "run --check --port vhost-user:b,socket=b --port vhost-user:b,socket=r",
    );
    assert_eq!(
        said,
        "ringway: --port 2: port \"b\" is there already: give each port its own name\n"
    );
}

#[test]
fn a_reader_that_has_seen_enough_ends_it_quietly() {
    let running = start(Memory::default());
    let mut child = Command::new(env!("CARGO_BIN_EXE_ringway"))
        .env("RINGWAY_API", running.api.path())
        .args(["stats", "--json", "--watch", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ran");
    drop(child.stdout.take());
    let mut said = String::new();
    child
        .stderr
        .take()
        .expect("piped")
        .read_to_string(&mut said)
        .expect("text");
    let status = child.wait().expect("ended");
    assert!(status.success() && said.is_empty(), "{status}: {said}");
}

/// A card with SR-IOV whose files nobody may write to, and the program where another user can run it.
fn read_only_card() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let card = dir.path().join("sys/bus/pci/devices/0000:81:00.0");
    std::fs::create_dir_all(&card).expect("made");
    for (name, text) in [
        ("class", "0x020000"),
        ("vendor", "0x8086"),
        ("device", "0x10fb"),
        ("sriov_totalvfs", "63"),
        ("sriov_numvfs", "0"),
    ] {
        std::fs::write(card.join(name), text).expect("written");
        let mode = std::fs::Permissions::from_mode(0o444);
        std::fs::set_permissions(card.join(name), mode).expect("set");
    }
    std::fs::copy(env!("CARGO_BIN_EXE_ringway"), dir.path().join("ringway")).expect("copied");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(dir.path(), mode).expect("set");
    dir
}

#[test]
fn who_may_not_write_to_a_card_is_told_that_it_takes_root_and_may_look_all_the_same() {
    let dir = read_only_card();
    let run = |line: &str| {
        let mut command = Command::new(dir.path().join("ringway"));
        command
            .args(line.split_whitespace())
            .arg("--root")
            .arg(dir.path());
        if rustix::process::getuid().is_root() {
            command.uid(65534);
        }
        command.output().expect("ran")
    };
    let refused = run("nic vf create 0000:81:00.0 4");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success()
            && said.contains("sriov_numvfs: Permission denied")
            && said.contains("this needs root"),
        "{said}"
    );
    for (line, what) in [
        ("nic vf create 0000:81:00.0 4 --dry-run", "echo 4 > "),
        ("nic list", "PF, 0 of 63 VFs"),
    ] {
        let output = run(line);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && said.contains(what),
            "{line}: {output:?}"
        );
    }
}
