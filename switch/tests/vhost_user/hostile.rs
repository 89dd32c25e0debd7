//! Hostile messages: who sends them is put out, with a reason, or told no.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ringway::control::state::PortState;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::SOON;
use crate::frontend::*;

/// Runs `act` on a fresh port; its guest must be put out, the rings gone, the reason told.
fn is_put_out_for(why: &str, within: Duration, act: impl FnOnce(&mut Frontend)) {
    let port = Port::server();
    let mut guest = port.connect();
    act(&mut guest);
    assert!(guest.hung_up_within(within), "still connected: {why}");
    // A hint of before (no memory yet) may stand there for a moment.
    port.switch.wait(why, |report| {
        report
            .reason
            .as_ref()
            .is_some_and(|told| told.contains(why))
    });
    assert_eq!(port.switch.attached().1, 0);
    // The first offence costs no pause: an honest guest gets in.
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    port.switch.wait_state(PortState::Forwarding);
}

#[test]
fn gives_half_a_message_one_second_and_others_none_of_it() {
    let other = Port::server();
    for half in [3, 11, 12, 17] {
        is_put_out_for(
            "did not end it within 1 s",
            Duration::from_millis(1500),
            |guest| {
                let message = Frontend::message(req::SET_FEATURES, 0, &[0; 8]);
                guest.raw(&message[..half], &[]).unwrap();
                let start = Instant::now();
                let (mut neighbour, memory) = (other.connect(), Memory::dpdk());
                dpdk_start(&mut neighbour, &memory, 1, DPDK_SPLIT);
                assert!(start.elapsed() < SOON);
            },
        );
    }
}

#[test]
fn puts_together_what_comes_byte_by_byte_or_all_at_once() {
    let port = Port::server();
    let mut guest = port.connect();
    let fd = event();
    let kick = Frontend::message(req::SET_VRING_KICK, 0, &0u64.to_ne_bytes());
    for (number, byte) in kick.iter().enumerate() {
        // The descriptor rides on the second byte.
        let fds = if number == 1 {
            vec![fd.as_fd()]
        } else {
            vec![]
        };
        guest.raw(&[*byte], &fds).unwrap();
    }
    let ask = Frontend::message(req::GET_FEATURES, 0, &[]);
    guest.raw(&ask.repeat(20), &[]).unwrap();
    let first = guest.answer_u64(req::GET_FEATURES);
    assert!((1..20).all(|_| guest.answer_u64(req::GET_FEATURES) == first));
}

#[test]
fn puts_out_who_breaks_the_framing() {
    let header = |words: [u32; 3]| words.map(u32::to_ne_bytes).concat();
    let raw = |words: [u32; 3]| {
        move |guest: &mut Frontend| assert_eq!(guest.raw(&header(words), &[]), Ok(12))
    };
    is_put_out_for(
        "announces 4294967295 bytes",
        SOON,
        raw([req::SET_FEATURES, VERSION, u32::MAX]),
    );
    is_put_out_for(
        "announces 4097 bytes",
        SOON,
        raw([req::SET_FEATURES, VERSION, 4097]),
    );
    is_put_out_for("speaks version 2", SOON, raw([req::GET_FEATURES, 2, 0]));
    is_put_out_for(
        "an answer nobody asked for",
        SOON,
        raw([req::GET_FEATURES, VERSION | REPLY, 0]),
    );
    is_put_out_for(
        "reserved flags",
        SOON,
        raw([req::GET_FEATURES, VERSION | 0x100, 0]),
    );
    is_put_out_for(
        "SET_FEATURES: invalid message",
        SOON,
        raw([req::SET_FEATURES, VERSION, 0]),
    );
    is_put_out_for(
        "SET_STATUS has 0 bytes",
        SOON,
        raw([req::SET_STATUS, VERSION, 0]),
    );
    is_put_out_for("hung up in the middle", SOON, |guest| {
        guest.raw(&[1, 0], &[]).unwrap();
        guest.stream.shutdown(std::net::Shutdown::Write).unwrap();
    });
}

#[test]
fn puts_out_who_asks_for_what_was_not_offered() {
    is_put_out_for("request 77 was not offered", SOON, |guest| {
        guest.tell(77, 0)
    });
    is_put_out_for("request 0 was not offered", SOON, |guest| guest.tell(0, 0));
    is_put_out_for("GET_CONFIG was not offered", SOON, |guest| {
        guest.send(req::GET_CONFIG, 0, &[0; 12], &[])
    });
    is_put_out_for("SET_LOG_BASE was not offered", SOON, |guest| {
        guest.send(6, 0, &[0; 16], &[])
    });
    is_put_out_for("GET_INFLIGHT_FD was not offered", SOON, |guest| {
        guest.send(31, 0, &[0; 24], &[])
    });
    is_put_out_for("SET_BACKEND_REQ_FD was not offered", SOON, |guest| {
        guest.send(21, 0, &[], &[event().as_fd()])
    });
    is_put_out_for("features that were not offered", SOON, |guest| {
        guest.tell(req::SET_FEATURES, 1 << 32 | 1 << 26)
    });
    is_put_out_for("protocol features that were not offered", SOON, |guest| {
        guest.tell(req::SET_PROTOCOL_FEATURES, 1 << 12);
    });
}

#[test]
fn refuses_rings_that_no_port_has() {
    for index in [2, 255, 0x1_0000, u32::MAX] {
        for request in [
            req::SET_VRING_NUM,
            req::SET_VRING_BASE,
            req::GET_VRING_BASE,
            req::SET_VRING_ENABLE,
        ] {
            is_put_out_for("but the port has 1 queue pair", SOON, |guest| {
                guest.ring(request, index, 1)
            });
        }
        is_put_out_for("but the port has 1 queue pair", SOON, |guest| {
            let mut addr = Memory::dpdk().addr(0);
            addr[..4].copy_from_slice(&index.to_ne_bytes());
            guest.send(req::SET_VRING_ADDR, 0, &addr, &[]);
        });
    }
    is_put_out_for("ring 255, but the port has 1 queue pair", SOON, |guest| {
        guest.ring_fd(req::SET_VRING_KICK, 255, &event());
    });
}

#[test]
fn answers_no_to_who_asks_and_stays_connected() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    let mut refused = |request: u32, payload: &[u8], fds: &[&OwnedFd]| {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        guest.send(request, NEED_REPLY, payload, &fds);
        assert_ne!(guest.answer_u64(request), 0, "request {request}");
    };
    let ring = |index: u32, number: u32| [index, number].map(u32::to_ne_bytes).concat();
    refused(77, &[], &[]);
    refused(req::SET_VRING_NUM, &ring(u32::MAX, 256), &[]);
    for size in [0, 3, 32769, 65536] {
        refused(req::SET_VRING_NUM, &ring(0, size), &[]);
    }
    let mut outside = memory.addr(0);
    outside[8..16].copy_from_slice(&0xffff_8000_0000_0000u64.to_ne_bytes());
    refused(req::SET_VRING_ADDR, &outside, &[]);
    let file: OwnedFd = std::fs::File::open("/dev/zero").unwrap().into();
    refused(req::SET_VRING_KICK, &0u64.to_ne_bytes(), &[&file]);
    refused(req::SET_VRING_CALL, &0u64.to_ne_bytes(), &[&file]);
    refused(req::SET_MEM_TABLE, &memory.table(), &[&file]);
    refused(req::NET_SET_MTU, &1_000_000u64.to_ne_bytes(), &[]);
    guest.sync();
    assert_eq!(port.switch.attached().1, 2, "what ran before runs on");
    let report = port
        .switch
        .wait("a reason", |report| report.reason.is_some());
    assert_eq!(report.state, PortState::Forwarding);
}

#[test]
fn puts_out_who_does_not_read_its_answers() {
    is_put_out_for("did not read an answer", Duration::from_secs(4), |guest| {
        let ask = Frontend::message(req::GET_FEATURES, 0, &[]).repeat(100);
        guest
            .stream
            .set_write_timeout(Some(Duration::from_millis(1500)))
            .unwrap();
        while guest.raw(&ask, &[]) == Ok(ask.len()) {}
    });
}

#[test]
fn refuses_more_descriptors_than_a_message_may_have() {
    is_put_out_for("more than 32 descriptors", SOON, |guest| {
        let fd = event();
        let message = Frontend::message(req::SET_MEM_TABLE, 0, &Memory::dpdk().table());
        guest.raw(&message, &vec![fd.as_fd(); 253]).unwrap();
    });
    let without = [
        (req::GET_FEATURES, "GET_FEATURES"),
        (req::SET_OWNER, "SET_OWNER"),
        (req::SET_STATUS, "SET_STATUS"),
        (req::NET_SET_MTU, "NET_SET_MTU"),
        (req::SEND_RARP, "SEND_RARP"),
        (req::SET_VRING_ENABLE, "SET_VRING_ENABLE"),
        (77, "request 77"),
    ];
    for (request, name) in without {
        let mark = format!("kept-{request}-by-the-switch");
        is_put_out_for(
            &format!("{name} came with 1 descriptors, it may have 0"),
            SOON,
            |guest| {
                let fd = memfd_create(&mark, MemfdFlags::CLOEXEC).unwrap();
                guest.send(request, 0, &[0; 8], &[fd.as_fd()]);
            },
        );
        let since = Instant::now();
        while open_files().iter().any(|file| file.contains(&mark)) {
            assert!(since.elapsed() < SOON, "{name}: its descriptor is kept");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    is_put_out_for("SET_VRING_KICK came with 2 descriptors", SOON, |guest| {
        let fd = event();
        guest.send(req::SET_VRING_KICK, 0, &[0; 8], &[fd.as_fd(), fd.as_fd()]);
    });
}

#[test]
fn puts_out_who_goes_on_flooding_with_messages() {
    is_put_out_for(
        "more than 1000 messages a second for 5 s",
        Duration::from_secs(20),
        |guest| {
            let message =
                Frontend::message(req::SET_VRING_NUM, 0, &[0, 0, 0, 0, 0, 1, 0, 0]).repeat(20);
            while guest.raw(&message, &[]) == Ok(message.len()) {}
        },
    );
}

/// Runs `act`, which the switch must slow down to `least` or longer.
fn is_slowed_down(least: Duration, limits: &str, act: impl FnOnce()) {
    let start = Instant::now();
    act();
    let took = start.elapsed();
    assert!(took > least, "{limits}: took only {took:?}");
}

/// Sends `count` messages and waits until the last one has been dealt with.
fn flood(guest: &mut Frontend, count: u32) {
    for _ in 0..count {
        guest.ring(req::SET_VRING_NUM, 0, 256);
    }
    guest.sync();
}

const MESSAGES: &str = "1000 messages at once, 1000 a second";

#[test]
fn slows_a_flood_of_messages_down() {
    let port = Port::server();
    let mut guest = port.connect();
    is_slowed_down(Duration::from_millis(800), MESSAGES, || {
        flood(&mut guest, 2000);
    });
}

#[test]
fn has_no_more_messages_for_who_comes_again() {
    let port = Port::server();
    is_slowed_down(Duration::from_millis(800), MESSAGES, || {
        for _ in 0..4 {
            flood(&mut port.connect(), 500);
        }
    });
}

#[test]
fn slows_a_guest_down_whose_rings_change_hands_too_often_and_keeps_it() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    port.switch.wait_state(PortState::Forwarding);
    let limits = "100 changes at once, 100 a second";
    is_slowed_down(Duration::from_millis(600), limits, || {
        for round in 0..180 {
            guest.ring(req::SET_VRING_ENABLE, 0, round % 2);
        }
        guest.sync();
    });
    port.switch.wait_state(PortState::Forwarding);
}

#[test]
fn puts_a_guest_out_whose_memory_is_poisoned() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    port.switch.wait_state(PortState::Forwarding);
    port.switch
        .look(|seen| seen.rings.as_ref().unwrap().to_guest[0].1.poison().set());
    port.session.poisoned();
    assert!(guest.hung_up_within(SOON));
    assert_eq!(port.switch.attached().1, 0);
    let report = port
        .switch
        .wait("a reason", |report| report.reason.is_some());
    assert!(report.reason.unwrap().contains("the guest is at fault"));
}

#[test]
fn puts_out_who_takes_its_memory_away_in_the_middle_of_the_handshake() {
    ringway::virtio::guest_fault::install();
    is_put_out_for("it took memory away", SOON, |guest| {
        let memory = Memory::dpdk();
        guest.open_plainly(&memory);
        guest.ring(req::SET_VRING_NUM, 0, 256);
        guest.send(req::SET_VRING_ADDR, 0, &memory.addr(0), &[]);
        guest.sync();
        memory.file.set_len(0).unwrap();
        guest.ring_fd(req::SET_VRING_KICK, 0, &event());
    });
}
