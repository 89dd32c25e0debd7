//! What goes wrong with honest guests, and with the socket they come to.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use ringway::control::state::{PortSpec, PortState};
use ringway::control::vhost_user::Session;

use crate::SOON;
use crate::frontend::*;

#[test]
fn tells_a_legacy_guest_what_it_lacks_and_lets_it_try_again() {
    let port = Port::server();
    let mut guest = port.connect();
    let offered = guest.ask(req::GET_FEATURES);
    guest.tell(req::SET_FEATURES, 1 << 15);
    let report = port.switch.wait_state(PortState::Error);
    assert!(
        report
            .reason
            .unwrap()
            .contains("no VERSION_1): use a driver of virtio 1.0")
    );
    guest.tell(req::SET_STATUS, 0xb);
    assert_eq!(
        guest.ask(req::GET_STATUS),
        0x3,
        "FEATURES_OK is not confirmed"
    );
    guest.tell(req::SET_FEATURES, offered);
    assert_eq!(port.switch.wait_state(PortState::Connected).reason, None);
}

#[test]
fn tells_who_shares_no_memory_how_to_and_lets_it_go_on() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    guest.sync();
    let report = port.switch.wait("a hint", |report| report.reason.is_some());
    assert_eq!(report.state, PortState::Connected);
    assert!(report.reason.unwrap().contains("--single-file-segments"));
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    assert_eq!(port.switch.wait_state(PortState::Forwarding).reason, None);
}

#[test]
fn names_the_queues_a_port_lacks() {
    let port = Port::server();
    let mut guest = port.connect();
    guest.ring_fd(req::SET_VRING_CALL, 2, &event());
    assert!(guest.hung_up_within(SOON));
    let report = port
        .switch
        .wait("a reason", |report| report.reason.is_some());
    assert!(
        report
            .reason
            .unwrap()
            .contains("ring 2, but the port has 1 queue pair")
    );
}

#[test]
fn serves_a_guest_that_sets_up_more_queue_pairs_than_it_uses() {
    let port = Port::new(|spec| spec.queues = 2);
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    let order = [0, 2, 4, 6, 1, 3, 5, 7];
    for index in order {
        guest.ring_fd(req::SET_VRING_CALL, index, &event());
    }
    guest.tell(req::SET_PROTOCOL_FEATURES, DPDK_PROTOCOL);
    guest.tell(req::SET_FEATURES, DPDK_SPLIT | 1 << 22);
    dpdk_rings(
        &mut guest,
        &memory,
        &order.map(|index| index as u32),
        DPDK_SPLIT,
    );
    for index in 0..8 {
        guest.ring(req::SET_VRING_ENABLE, index, u32::from(index < 4));
    }
    guest.sync();
    let report = port.switch.wait("both pairs", |report| {
        report.rings.len() == 4 && report.state == PortState::Forwarding
    });
    let why = report.reason.expect("told");
    assert!(
        why.contains("has set up 4 queue pairs, the port has 2")
            && why.ends_with("queues=4 gives it all"),
        "{why}"
    );
    assert_eq!(port.switch.attached().1, 4);
    assert_eq!(guest.ask_base(6), 0);
    // A pair that is used and not polled would swallow frames without a word.
    guest.ring(req::SET_VRING_ENABLE, 5, 1);
    assert!(guest.hung_up_within(SOON));
    // The first offence costs no pause: who looks late sees the port listen again, with the reason.
    port.switch.wait("the reason", |report| {
        let why = report.reason.as_deref().unwrap_or_default();
        why.contains("ring 5, but the port has 2 queue pairs")
    });
}

#[test]
fn refuses_a_socket_in_use_and_takes_that_of_the_dead() {
    let port = Port::server();
    let same = PortSpec {
        name: "red".into(),
        ..port.spec.clone()
    };
    let refusal = Session::start(&same, port.switch.clone())
        .err()
        .expect("in use")
        .to_string();
    assert!(
        refusal.starts_with("port \"red\": ") && refusal.contains("address already in use"),
        "{refusal}"
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let port = Port::new(|spec| spec.socket = path);
    port.connect().sync();
}

#[test]
fn finds_its_socket_again_when_somebody_removed_it() {
    let port = Port::server();
    port.switch.wait_state(PortState::Listening);
    std::fs::remove_file(&port.spec.socket).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    while !exists(&port.spec.socket) {
        assert!(Instant::now() < end, "the socket is not made again");
        std::thread::sleep(Duration::from_millis(20));
    }
    port.connect().sync();
}

#[test]
fn stops_at_once_and_leaves_nothing_behind() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    let start = Instant::now();
    port.session.stop();
    assert!(
        start.elapsed() < Duration::from_millis(50),
        "{:?}",
        start.elapsed()
    );
    assert!(!exists(&port.spec.socket));
    assert_eq!(port.switch.attached().1, 0);
    assert!(guest.hung_up_within(SOON));
}
