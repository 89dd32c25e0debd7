//! Whose memory is whose: a file of shared memory belongs to one process, whatever sockets it is sent through.

mod frontend;

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use frontend::*;
use ringway::control::config::{Config, Workers};
use ringway::control::state::{PortSpec, PortState, PortStatus};
use ringway::control::switch::Switch;

fn switch(dir: &Path, ports: &[&str]) -> Arc<Switch> {
    let spec = |name: &&str| PortSpec::vhost_user(*name, dir.join(format!("{name}.sock")));
    let config = Config {
        workers: Workers::Cpus(vec![0]),
        ports: ports.iter().map(spec).collect(),
        ..Config::default()
    };
    Switch::start(config, &[0]).expect("starts")
}

fn wait(switch: &Switch, port: &str, wanted: impl Fn(&PortStatus) -> bool) -> PortStatus {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let status = switch.port(port).expect("there");
        if wanted(&status) {
            return status;
        }
        assert!(Instant::now() < end, "{status:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Agrees on acknowledgements, then tells the memory table; the answer is to be read.
fn tell_table(guest: &mut Frontend, memory: &Memory) {
    guest.ask(req::GET_FEATURES);
    guest.ask(req::GET_PROTOCOL_FEATURES);
    guest.tell(req::SET_PROTOCOL_FEATURES, DPDK_PROTOCOL);
    let fds = [memory.file.as_fd()];
    guest.send(req::SET_MEM_TABLE, NEED_REPLY, &memory.table(), &fds);
}

/// The process that shares somebody else's memory. Ends when its standard input does.
#[test]
fn child_that_shares_anothers_memory() {
    let Ok(args) = std::env::var("RINGWAY_TEST_CHILD") else {
        return;
    };
    let (socket, memory) = args.split_once(' ').expect("two words");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(memory)
        .expect("the parent's");
    let memory = Memory {
        file,
        ..Memory::dpdk()
    };
    let mut guest = Frontend::new(UnixStream::connect(socket).expect("listens"));
    tell_table(&mut guest, &memory);
    let refused = guest.answer_u64(req::SET_MEM_TABLE);
    println!("answer {refused}");
    let _ = std::io::stdin().read_line(&mut String::new());
    std::process::exit(0);
}

fn other_process(dir: &Path, port: &str, memory: &Memory) -> Child {
    let fd = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        memory.file.as_raw_fd()
    );
    Command::new(std::env::current_exe().expect("known"))
        .args([
            "--exact",
            "child_that_shares_anothers_memory",
            "--nocapture",
        ])
        .env(
            "RINGWAY_TEST_CHILD",
            format!("{} {fd}", dir.join(format!("{port}.sock")).display()),
        )
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("ran")
}

#[test]
fn one_process_may_share_its_memory_on_two_ports() {
    let dir = tempfile::tempdir().expect("a directory");
    let switch = switch(dir.path(), &["blue", "red"]);
    let memory = Memory::dpdk();
    let guests = ["blue", "red"].map(|port| {
        let stream = UnixStream::connect(dir.path().join(format!("{port}.sock"))).expect("listens");
        let mut guest = Frontend::new(stream);
        dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
        wait(&switch, port, |status| {
            status.state == PortState::Forwarding
        });
        guest
    });
    drop(guests);
    switch.stop();
}

#[test]
fn another_process_may_not_share_it_until_its_owner_has_left() {
    let dir = tempfile::tempdir().expect("a directory");
    let switch = switch(dir.path(), &["blue", "red"]);
    let memory = Memory::dpdk();
    let mut guest =
        Frontend::new(UnixStream::connect(dir.path().join("blue.sock")).expect("listens"));
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    wait(&switch, "blue", |status| {
        status.state == PortState::Forwarding
    });

    let mut thief = other_process(dir.path(), "red", &memory);
    let red = wait(&switch, "red", |status| status.reason.is_some());
    let why = red.reason.expect("just seen");
    assert!(
        why.contains("the guest of port \"blue\", another process"),
        "{why}"
    );
    assert_eq!(red.memory, [], "not a byte of it stays mapped");
    thief.kill().expect("runs");
    thief.wait().expect("ended");
    let blue = switch.port("blue").expect("there");
    assert_eq!((blue.state, blue.reason), (PortState::Forwarding, None));

    // The owner has gone, its file lives on: now it is whoever's has it.
    drop(guest);
    wait(&switch, "blue", |status| {
        status.state == PortState::Listening
    });
    let mut heir = other_process(dir.path(), "red", &memory);
    let red = wait(&switch, "red", |status| !status.memory.is_empty());
    assert_eq!(red.peer.map(|peer| peer.pid), Some(heir.id() as i32));
    // The other way round, and after the port has been deleted it is nobody's again.
    let mut guest =
        Frontend::new(UnixStream::connect(dir.path().join("blue.sock")).expect("listens"));
    tell_table(&mut guest, &memory);
    assert_eq!(guest.answer_u64(req::SET_MEM_TABLE), 1, "refused");
    switch.del_port("red").expect("deleted");
    send_table(&mut guest, &memory);
    heir.kill().expect("runs");
    heir.wait().expect("ended");
    switch.stop();
}
