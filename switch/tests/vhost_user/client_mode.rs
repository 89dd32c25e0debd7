//! The switch connects: to a guest that listens, or once did, and to nobody else.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use ringway::control::state::{PortState, SocketMode};

use crate::SOON;
use crate::frontend::*;

#[test]
fn is_there_soon_after_a_guest_listens_and_each_time_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vhost.sock");
    let port = Port::new(|spec| (spec.mode, spec.socket) = (SocketMode::Client, path.clone()));
    let report = port.switch.wait_state(PortState::Connecting);
    assert!(report.reason.unwrap().contains("is not there yet"));
    std::thread::sleep(Duration::from_millis(300));
    let mut times = Vec::new();
    for _ in 0..5 {
        let listener = UnixListener::bind(&path).unwrap();
        let start = Instant::now();
        let mut guest = Frontend::new(listener.accept().unwrap().0);
        guest.sync();
        times.push(start.elapsed());
        drop((guest, listener));
        std::fs::remove_file(&path).unwrap();
    }
    // The best of them: the machine may have other things to do.
    assert!(
        times.iter().min() < Some(&Duration::from_millis(30)),
        "{times:?}"
    );
}

#[test]
fn tells_a_dead_listener_from_one_that_never_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vhost.sock");
    drop(UnixListener::bind(&path).unwrap());
    let port = Port::new(|spec| (spec.mode, spec.socket) = (SocketMode::Client, path));
    let report = port
        .switch
        .wait("a reason", |report| report.reason.is_some());
    assert_eq!(report.state, PortState::Connecting);
    assert!(report.reason.unwrap().contains("nobody listens there"));
}

#[test]
fn follows_no_symbolic_link_to_another_guests_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (victim, planted) = (
        dir.path().join("victim.sock"),
        dir.path().join("planted.sock"),
    );
    let listener = UnixListener::bind(&victim).unwrap();
    listener.set_nonblocking(true).unwrap();
    symlink(&victim, &planted).unwrap();
    let port = Port::new(|spec| (spec.mode, spec.socket) = (SocketMode::Client, planted.clone()));
    assert!(
        port.switch
            .wait_state(PortState::Error)
            .reason
            .unwrap()
            .contains("is a symbolic link")
    );
    assert!(listener.accept().is_err(), "nobody came");
    // What will not do is told as such, and what comes in its place is taken.
    std::fs::remove_file(&planted).unwrap();
    std::fs::create_dir(&planted).unwrap();
    let report = port.switch.wait("a reason", |r| {
        r.reason
            .as_ref()
            .is_some_and(|why| why.contains("is no socket"))
    });
    assert_eq!(report.state, PortState::Error);
    std::fs::remove_dir(&planted).unwrap();
    let honest = UnixListener::bind(&planted).unwrap();
    Frontend::new(honest.accept().unwrap().0).sync();
}

#[test]
fn follows_no_symbolic_link_in_a_directory_on_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let (theirs, mine) = (dir.path().join("theirs"), dir.path().join("mine"));
    std::fs::create_dir(&theirs).unwrap();
    let listener = UnixListener::bind(theirs.join("vhost.sock")).unwrap();
    listener.set_nonblocking(true).unwrap();
    symlink(&theirs, &mine).unwrap();
    let path = mine.join("vhost.sock");
    let port = Port::new(|spec| (spec.mode, spec.socket) = (SocketMode::Client, path));
    let why = port.switch.wait_state(PortState::Error).reason.unwrap();
    assert!(
        why.contains(&format!("{} is a symbolic link", mine.display())),
        "{why}"
    );
    assert!(listener.accept().is_err(), "nobody came");
}

#[test]
fn reaches_a_socket_whose_path_is_too_long_for_an_address() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120));
    std::fs::create_dir(&deep).unwrap();
    let path = deep.join("vhost.sock");
    let short = dir.path().join("s");
    let listener = UnixListener::bind(&short).unwrap();
    std::fs::rename(&short, &path).unwrap();
    let _port = Port::new(|spec| (spec.mode, spec.socket) = (SocketMode::Client, path));
    Frontend::new(listener.accept().unwrap().0).sync();
}

#[test]
fn asks_who_listens_before_it_says_a_word_to_a_guest_it_connects_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vhost.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let us = rustix::process::getuid().as_raw();
    let port = Port::new(|spec| {
        (spec.mode, spec.socket, spec.peer_uid) = (SocketMode::Client, path, Some(us + 1));
    });
    assert!(Frontend::new(listener.accept().unwrap().0).hung_up_within(SOON));
    port.switch
        .wait("a reason", |report| report.reason.is_some());
}
