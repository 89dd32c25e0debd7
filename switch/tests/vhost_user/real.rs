//! Real frontends: traces of DPDK and QEMU byte by byte, and the frontend of the `vhost` crate.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use ringway::control::state::{Direction, PortState, RingKind, SocketMode};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend as VhostFrontend, VhostUserFrontend};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::frontend::*;

#[test]
fn takes_a_dpdk_client_from_its_first_message_to_its_last() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    let report = port.switch.wait_state(PortState::Forwarding);
    assert_eq!(
        report.features,
        [
            "MRG_RXBUF",
            "INDIRECT_DESC",
            "PROTOCOL_FEATURES",
            "VERSION_1",
            "IN_ORDER"
        ]
    );
    assert_eq!(report.protocol_features, ["MQ", "REPLY_ACK", "STATUS"]);
    assert_eq!(
        report.peer.map(|peer| peer.pid),
        Some(std::process::id() as i32)
    );
    assert_eq!(
        (report.memory[0].guest_address, report.memory[0].size),
        (memory.gpa, memory.len)
    );
    let rings: Vec<_> = report
        .rings
        .iter()
        .map(|ring| {
            (
                ring.pair,
                ring.direction,
                ring.kind,
                ring.size,
                ring.enabled,
            )
        })
        .collect();
    let split = |direction| (0, direction, RingKind::Split, 256, true);
    assert_eq!(
        rings,
        [split(Direction::ToGuest), split(Direction::FromGuest)]
    );
    assert_eq!(port.switch.attached().1, 2);

    for index in [0, 1] {
        guest.ring(req::SET_VRING_ENABLE, index, 0);
    }
    assert_eq!((guest.ask_base(0), guest.ask_base(1)), (0, 0));
    assert_eq!(port.switch.attached().1, 0);
    drop(guest);
    let report = port.switch.wait_state(PortState::Listening);
    assert_eq!((report.reason, report.peer), (None, None));
}

#[test]
fn serves_one_guest_after_the_other_without_limit() {
    let port = Port::server();
    for round in 0..50 {
        let (mut guest, memory) = (port.connect(), Memory::dpdk());
        dpdk_start(
            &mut guest,
            &memory,
            1,
            if round % 2 == 0 {
                DPDK_SPLIT
            } else {
                DPDK_PACKED
            },
        );
        port.switch.wait_state(PortState::Forwarding);
        drop(guest); // as by kill -9
        port.switch.wait_state(PortState::Listening);
        assert_eq!(port.switch.attached().1, 0);
    }
}

#[test]
fn offers_a_guest_that_comes_again_exactly_the_same() {
    let port = Port::new(|spec| spec.queues = 4);
    let offer = || {
        let mut guest = port.connect();
        (
            guest.ask(req::GET_FEATURES),
            guest.ask(req::GET_PROTOCOL_FEATURES),
        )
    };
    let first = offer();
    // At once: the last connection's end may not have been read when the next one knocks.
    for _ in 0..10 {
        assert_eq!(first, offer());
    }
    assert_eq!(first.0 & 1 << 22, 1 << 22, "several queues: MQ");
}

#[test]
fn carries_sixteen_pairs() {
    let port = Port::new(|spec| spec.queues = 16);
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 16, DPDK_PACKED | 1 << 22);
    let report = port.switch.wait("all rings", |report| {
        report.rings.iter().filter(|ring| ring.enabled).count() == 32
    });
    assert_eq!(report.state, PortState::Forwarding);
    assert_eq!(port.switch.attached().1, 32);
    assert!(
        report
            .rings
            .iter()
            .all(|ring| ring.kind == RingKind::Packed)
    );
    guest.ring(req::SET_VRING_ENABLE, 7, 0);
    guest.sync();
    assert_eq!(port.switch.attached().1, 31);
    assert!(port.switch.look(|seen| {
        seen.rings
            .as_ref()
            .unwrap()
            .from_guest
            .iter()
            .all(|(pair, _)| *pair != 3)
    }));
}

#[test]
fn keeps_rings_where_they_are_when_memory_is_added_under_them() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    // DPDK's hot-plug: pause, new table, go on; neither addresses nor indices are sent again.
    memory.set_used_idx(1, 300);
    guest.ring(req::SET_VRING_ENABLE, 0, 0);
    guest.ring(req::SET_VRING_ENABLE, 1, 0);
    let more = Memory::at(0x2_0000_0000, 0x2_0000_0000);
    let regions = [
        &2u64.to_ne_bytes()[..],
        &memory.table()[8..],
        &more.table()[8..],
    ]
    .concat();
    guest.send(
        req::SET_MEM_TABLE,
        NEED_REPLY,
        &regions,
        &[memory.file.as_fd(), more.file.as_fd()],
    );
    assert_eq!(guest.answer_u64(req::SET_MEM_TABLE), 0);
    guest.ring(req::SET_VRING_ENABLE, 0, 1);
    guest.ring(req::SET_VRING_ENABLE, 1, 1);
    guest.sync();
    let report = port.switch.wait("both regions", |report| {
        report.memory.len() == 2 && report.state == PortState::Forwarding
    });
    assert_eq!(report.memory[1].guest_address, more.gpa);
    let rings = port.switch.look(|seen| seen.rings.take().unwrap());
    let (ring, call, kick) = rings.from_guest.into_iter().next().unwrap().1.into_parts();
    assert_eq!(ring.base(), 300);
    assert_eq!(ring.mem().regions().len(), 2);
    assert!(call.is_some() && kick.is_some(), "descriptors go along");
}

#[test]
fn takes_a_new_table_while_rings_run() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_PACKED);
    let before = port.switch.attached().0;
    send_table(&mut guest, &memory);
    assert_eq!(
        port.switch.attached(),
        (before + 1, 2),
        "detached before, attached again"
    );
    assert_eq!(
        guest.ask_base(0),
        0x8000_8000,
        "index 0, wrap 1, in both halves"
    );
}

#[test]
fn goes_on_with_a_dpdk_server_whose_rings_are_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vhost.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let port = Port::new(|spec| (spec.mode, spec.socket) = (SocketMode::Client, path));
    let memory = Memory::dpdk();
    for round in 0..3u16 {
        let mut guest = Frontend::new(listener.accept().unwrap().0);
        if round > 0 {
            // A reconnection: nothing is negotiated yet.
            guest.ring(req::SET_VRING_ENABLE, 0, 0);
            guest.ring(req::SET_VRING_ENABLE, 1, 0);
            assert_eq!((guest.ask_base(0), guest.ask_base(1)), (0, 0));
        }
        memory.set_used_idx(0, 7 * round);
        memory.set_used_idx(1, 100 * round);
        dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
        port.switch.wait_state(PortState::Forwarding);
        assert_eq!(
            (guest.ask_base(0), guest.ask_base(1)),
            (u32::from(7 * round), u32::from(100 * round))
        );
    }
}

#[test]
fn takes_qemu_which_enables_rings_before_it_has_features() {
    let port = Port::new(|spec| spec.queues = 2);
    let (mut guest, memory) = (port.connect(), Memory::at(0x10_0000, 0x7f00_0000_0000));
    let offered = guest.ask(req::GET_FEATURES);
    let protocol = guest.ask(req::GET_PROTOCOL_FEATURES);
    guest.tell(req::SET_PROTOCOL_FEATURES, protocol);
    assert_eq!(guest.ask(req::GET_QUEUE_NUM), 2);
    assert_eq!(guest.ask(req::GET_MAX_MEM_SLOTS), 64);
    guest.send(req::SET_OWNER, 0, &[], &[]);
    for index in 0..4 {
        guest.ring_fd(req::SET_VRING_CALL, index, &event());
        guest.ring_fd(req::SET_VRING_ERR, index, &event());
    }
    for round in 0..5 {
        for index in 0..4 {
            // Newer versions ask for an acknowledgement here too.
            let flags = if round == 4 { NEED_REPLY } else { 0 };
            let payload = [index, u32::from(index < 2)].map(u32::to_ne_bytes).concat();
            guest.send(req::SET_VRING_ENABLE, flags, &payload, &[]);
            if flags != 0 {
                assert_eq!(guest.answer_u64(req::SET_VRING_ENABLE), 0);
            }
        }
    }
    guest.tell(req::SET_FEATURES, offered & !(1 << 34));
    assert_eq!(guest.ask(req::GET_STATUS), 0);
    guest.tell(req::SET_STATUS, 8);
    for _ in 0..2 {
        // Once per queue pair.
        let (region, file) = (memory.single(), memory.file.as_fd());
        guest.send(req::ADD_MEM_REG, NEED_REPLY, &region, &[file]);
        assert_eq!(guest.answer_u64(req::ADD_MEM_REG), 0);
    }
    for index in 0..2 {
        guest.ring(req::SET_VRING_NUM, index, 256);
        guest.ring(req::SET_VRING_BASE, index, 0);
        guest.send(req::SET_VRING_ADDR, 0, &memory.addr(index), &[]);
        guest.ring_fd(req::SET_VRING_KICK, u64::from(index), &event());
        guest.ring_fd(req::SET_VRING_CALL, u64::from(index), &event());
    }
    assert_eq!(guest.ask(req::GET_STATUS), 8);
    guest.tell(req::SET_STATUS, 0xf);
    guest.sync();
    let report = port.switch.wait_state(PortState::Forwarding);
    assert_eq!(
        (report.rings.len(), port.switch.attached().1),
        (2, 2),
        "the unused pair stays out"
    );
    // Stop: the indices survive the reset.
    memory.set_used_idx(0, 9);
    send_kick_again(&guest);
    guest.tell(req::SET_STATUS, 0);
    assert_eq!(guest.ask_base(0), 9);
    assert_eq!(port.switch.attached().1, 0);
    for _ in 0..2 {
        guest.send(req::REM_MEM_REG, NEED_REPLY, &memory.single(), &[]);
        assert_eq!(guest.answer_u64(req::REM_MEM_REG), 0);
    }
    port.switch
        .wait("no memory", |report| report.memory.is_empty());
}

/// Makes the switch take the ring anew, so that it sees the index in memory.
fn send_kick_again(guest: &Frontend) {
    guest.ring_fd(req::SET_VRING_KICK, 0, &event());
}

#[test]
fn runs_rings_at_once_for_a_frontend_without_protocol_features() {
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    guest.open_plainly(&memory);
    for index in 0..2 {
        guest.ring(req::SET_VRING_NUM, index, 64);
        guest.send(req::SET_VRING_ADDR, 0, &memory.addr(index), &[]);
        guest.tell(req::SET_VRING_KICK, u64::from(index) | 0x100); // no descriptor: the switch polls anyway
    }
    guest.sync();
    assert_eq!(port.switch.attached().1, 2);
}

#[test]
fn understands_the_frontend_of_the_vhost_crate() {
    let port = Port::server();
    let mut guest = VhostFrontend::connect(&port.spec.socket, 2).unwrap();
    guest.set_owner().unwrap();
    let features = guest.get_features().unwrap() & !(1 << 34);
    let protocol = guest.get_protocol_features().unwrap();
    guest
        .set_protocol_features(protocol & !VhostUserProtocolFeatures::STATUS)
        .unwrap();
    guest.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    guest.set_features(features).unwrap();
    let memory = Memory::dpdk();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: memory.gpa,
        memory_size: memory.len,
        userspace_addr: memory.uva,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&memory.file),
    };
    guest.set_mem_table(&[region]).unwrap();
    let (call, kick) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    for index in 0..2 {
        let at = memory.uva + Memory::offset(index);
        guest.set_vring_num(index as usize, 128).unwrap();
        let config = VringConfigData {
            queue_max_size: 128,
            queue_size: 128,
            flags: 0,
            desc_table_addr: at,
            used_ring_addr: at + 0x8000,
            avail_ring_addr: at + 0x4000,
            log_addr: None,
        };
        guest.set_vring_addr(index as usize, &config).unwrap();
        guest.set_vring_base(index as usize, 0).unwrap();
        guest.set_vring_call(index as usize, &call).unwrap();
        guest.set_vring_kick(index as usize, &kick).unwrap();
        guest.set_vring_enable(index as usize, true).unwrap();
    }
    assert_eq!(port.switch.wait_state(PortState::Forwarding).rings.len(), 2);
    assert_eq!(guest.get_vring_base(1).unwrap(), 0);
    assert_eq!(port.switch.attached().1, 1);
    assert!(
        guest.set_vring_num(9, 128).is_err(),
        "told, and still connected"
    );
    assert_eq!(guest.get_max_mem_slots().unwrap(), 64);
}
