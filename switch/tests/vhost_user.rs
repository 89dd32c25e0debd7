//! Sessions against frontends: the traces of real ones byte by byte, the `vhost` crate's own, and hostile ones.

mod frontend;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use frontend::*;
use ringway::control::state::{Direction, PortSpec, PortState, RingKind, SocketMode};
use ringway::control::vhost_user::Session;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend as VhostFrontend, VhostUserFrontend};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

const SOON: Duration = Duration::from_millis(500);

// ---- real frontends ----

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
    guest.ask(req::GET_FEATURES);
    guest.tell(req::SET_FEATURES, 1 << 32);
    guest.send(
        req::SET_MEM_TABLE,
        0,
        &memory.table(),
        &[memory.file.as_fd()],
    );
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

// ---- what goes wrong with honest guests ----

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

// ---- client mode ----

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

// ---- hostile guests ----

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
    let child = child.args(["--exact", "child_that_connects_and_dies"]);
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

#[test]
fn slows_a_flood_of_messages_down() {
    let port = Port::server();
    let mut guest = port.connect();
    let start = Instant::now();
    for _ in 0..2000 {
        guest.ring(req::SET_VRING_NUM, 0, 256);
    }
    guest.sync();
    assert!(
        start.elapsed() > Duration::from_millis(800),
        "1000 at once, 1000 a second: {:?}",
        start.elapsed()
    );
}

/// Small random numbers that a seed repeats (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len() as u64) as usize]
    }
}

/// One message of a guest that knows the protocol but not the order.
fn random_message(dice: &mut Dice, guest: &Frontend, memory: &Memory) -> rustix::io::Result<usize> {
    let index = dice.pick(&[0u32, 0, 0, 1, 1, 1, 2, 3, 4, u32::MAX]);
    let ring = |number: u32| [index, number].map(u32::to_ne_bytes).concat();
    let with_fd = dice.roll(8) > 0;
    let (request, payload) = match dice.roll(16) {
        0 => (
            req::SET_FEATURES,
            dice.pick(&[DPDK_SPLIT, DPDK_PACKED, 1 << 32, 1 << 15, u64::MAX])
                .to_ne_bytes()
                .to_vec(),
        ),
        1 => (
            req::SET_PROTOCOL_FEATURES,
            DPDK_PROTOCOL.to_ne_bytes().to_vec(),
        ),
        2 | 3 => (req::SET_MEM_TABLE, memory.table()),
        4 => (
            req::SET_VRING_NUM,
            ring(dice.pick(&[256, 256, 256, 1, 0, 3, 32768, 65535])),
        ),
        5 => (
            req::SET_VRING_BASE,
            ring(dice.pick(&[0, 0x8000, 0xffff, u32::MAX])),
        ),
        6 | 7 => (req::SET_VRING_ADDR, memory.addr(index % 4)),
        8 | 9 => (req::SET_VRING_KICK, u64::from(index).to_ne_bytes().to_vec()),
        10 => (req::SET_VRING_CALL, u64::from(index).to_ne_bytes().to_vec()),
        11 | 12 => (req::SET_VRING_ENABLE, ring(dice.pick(&[1, 1, 1, 0, 2]))),
        13 => (req::GET_VRING_BASE, ring(0)),
        14 => (
            req::SET_STATUS,
            dice.pick(&[0u64, 0xf]).to_ne_bytes().to_vec(),
        ),
        _ => (dice.roll(45) as u32, vec![0; dice.roll(80) as usize]),
    };
    let event = event();
    let fds = match request {
        req::SET_MEM_TABLE => vec![memory.file.as_fd()],
        req::SET_VRING_KICK | req::SET_VRING_CALL => vec![event.as_fd()],
        _ => vec![],
    };
    let flags = dice.pick(&[0, NEED_REPLY, NEED_REPLY, NEED_REPLY]);
    guest.raw(
        &Frontend::message(request, flags, &payload),
        if with_fd { &fds } else { &[] },
    )
}

#[test]
fn has_an_answer_to_messages_in_any_order() {
    let seed = std::env::var("RINGWAY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1);
    let mut attached = 0;
    for case in 0..200u64 {
        let mut dice = Dice((seed << 32 | case) * 2 + 1);
        let port = Port::new(|spec| spec.queues = 2);
        let (mut guest, memory) = (port.connect(), Memory::dpdk());
        let chaos = dice.roll(3) > 0;
        if !chaos {
            dpdk_start(
                &mut guest,
                &memory,
                2,
                dice.pick(&[DPDK_SPLIT, DPDK_PACKED]),
            );
        }
        for _ in 0..dice.roll(60) {
            if random_message(&mut dice, &guest, &memory).is_err() {
                break; // put out
            }
        }
        guest.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(
            guest.hung_up_within(Duration::from_secs(3)),
            "case {case} of seed {seed}"
        );
        attached += port.switch.attached().0;
        // The recorder panics at an attachment without a detachment, which would be the end of the session.
        let mut honest = port.connect();
        dpdk_start(&mut honest, &memory, 2, DPDK_SPLIT);
        assert_eq!(port.switch.attached().1, 4, "case {case} of seed {seed}");
    }
    assert!(attached > 200, "rings ran in between: {attached}");
}

#[test]
fn survives_any_bytes() {
    let seed = std::env::var("RINGWAY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1);
    for case in 0..100u64 {
        let mut dice = Dice((seed << 32 | case) * 2 + 1);
        let port = Port::server();
        let mut guest = port.connect();
        for _ in 0..dice.roll(10) + 1 {
            let mut bytes: Vec<u8> = (0..dice.roll(64) + 1)
                .map(|_| dice.roll(256) as u8)
                .collect();
            if dice.roll(2) == 0 && bytes.len() >= 12 {
                bytes[..12].copy_from_slice(
                    &[dice.roll(45) as u32, VERSION, dice.roll(60) as u32]
                        .map(u32::to_ne_bytes)
                        .concat(),
                );
            }
            let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
            let fds = vec![file.as_fd(); dice.roll(4) as usize];
            if guest.raw(&bytes, &fds).is_err() {
                break;
            }
        }
        guest.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(
            guest.hung_up_within(Duration::from_secs(2)),
            "case {case} of seed {seed}"
        );
        port.connect().sync();
    }
}

#[test]
fn puts_out_who_takes_its_memory_away_in_the_middle_of_the_handshake() {
    ringway::virtio::guest_fault::install();
    is_put_out_for("it took memory away", SOON, |guest| {
        let memory = Memory::dpdk();
        guest.ask(req::GET_FEATURES);
        guest.tell(req::SET_FEATURES, 1 << 32);
        guest.send(
            req::SET_MEM_TABLE,
            0,
            &memory.table(),
            &[memory.file.as_fd()],
        );
        guest.ring(req::SET_VRING_NUM, 0, 256);
        guest.send(req::SET_VRING_ADDR, 0, &memory.addr(0), &[]);
        guest.sync();
        memory.file.set_len(0).unwrap();
        guest.ring_fd(req::SET_VRING_KICK, 0, &event());
    });
}
