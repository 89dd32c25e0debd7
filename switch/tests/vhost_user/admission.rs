//! Who is let in: one at a time, the right user, and after a pause who was put out.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use ringway::control::state::PortState;

use crate::SOON;
use crate::frontend::*;

#[test]
fn lets_in_the_user_it_is_for_and_nobody_else() {
    let us = rustix::process::getuid().as_raw();
    let port = Port::new(|spec| spec.peer_uid = Some(us + 1));
    for _ in 0..3 {
        assert!(
            port.connect().hung_up_within(SOON),
            "no pause grows: nobody is punished"
        );
    }
    let report = port
        .switch
        .wait("a reason", |report| report.reason.is_some());
    assert_eq!(report.state, PortState::Listening);
    let why = report.reason.unwrap();
    assert!(
        why.ends_with(&format!(
            "of user {us} was sent away: the port is for user {} (peer-uid)",
            us + 1
        )),
        "{why}"
    );
    let port = Port::new(|spec| spec.peer_uid = Some(us));
    port.connect().sync();
}

#[test]
fn lets_who_is_put_out_again_and_again_wait() {
    let port = Port::server();
    let offend = || {
        let guest = port.connect();
        guest.tell(77, 0);
        guest
    };
    assert!(offend().hung_up_within(SOON));
    assert!(offend().hung_up_within(SOON));
    let report = port.switch.wait_state(PortState::Quarantined);
    assert!(
        report
            .reason
            .unwrap()
            .ends_with("the next guest is let in 1 s later")
    );
    let start = Instant::now();
    port.connect().sync();
    let waited = start.elapsed();
    assert!(
        (Duration::from_millis(700)..Duration::from_millis(1600)).contains(&waited),
        "{waited:?}"
    );
}

#[test]
fn sends_others_away_while_a_guest_is_there() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    let mut others: Vec<_> = (0..64).map(|_| port.connect()).collect();
    assert!(others.iter_mut().all(|other| other.hung_up_within(SOON)));
    guest.sync();
    assert_eq!(port.switch.attached().1, 2);
}

/// The child of the next test: it connects, hands the connection to its parent, and is dead.
#[test]
fn child_that_connects_and_dies() {
    let Ok(paths) = std::env::var("RINGWAY_TEST_CHILD") else {
        return;
    };
    let (socket, parent) = paths.split_once(' ').unwrap();
    let connection = UnixStream::connect(socket).unwrap();
    let parent = Frontend::new(UnixStream::connect(parent).unwrap());
    parent.raw(&[1], &[connection.as_fd()]).unwrap();
    std::process::exit(0);
}

#[test]
fn lets_the_newest_in_if_the_process_that_connected_is_dead() {
    let port = Port::server();
    let path = port.dir.path().join("parent");
    let listener = UnixListener::bind(&path).unwrap();
    let paths = format!("{} {}", port.spec.socket.display(), path.display());
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let child = child.args(["--exact", "admission::child_that_connects_and_dies"]);
    let mut child = child.env("RINGWAY_TEST_CHILD", paths).spawn().unwrap();
    let (parent, _) = listener.accept().unwrap();
    let pid = child.id() as i32;
    port.switch.wait("the child", |report| {
        report.peer.is_some_and(|peer| peer.pid == pid)
    });
    child.wait().unwrap();
    // The connection is still open: its other end is on its way to us.
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    port.switch.wait_state(PortState::Forwarding);
    drop(parent);
}

#[test]
fn is_not_kept_from_its_guest_by_a_flood_of_connections() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    let path = port.spec.socket.clone();
    let end = Instant::now() + Duration::from_millis(1500);
    let flood = std::thread::spawn(move || {
        let mut count = 0;
        while Instant::now() < end {
            count += u32::from(UnixStream::connect(&path).is_ok());
        }
        count
    });
    let mut rounds = 0;
    while Instant::now() < end {
        dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
        rounds += 1;
    }
    assert!(flood.join().unwrap() > 100);
    assert!(rounds > 10, "{rounds} handshakes");
}
