//! Frames: who hears them, what the rings do with them, and what the device does to them.

use super::*;

#[test]
fn a_frame_between_two_vfs_stays_off_the_wire_and_an_unknown_one_goes_there_alone() {
    let (nic, mut a, mut b, wire) = pair(VfPolicy::default());
    a.send(&frame(2, 1, 60));
    assert!(a.done(0));
    let (got, status) = b.receive().unwrap();
    assert_eq!(got, frame(2, 1, 60));
    assert_ne!(status & 1 << 18, 0, "looped back");
    assert_eq!(from_wire(&wire), None);
    a.send(&frame(9, 1, 60));
    assert_eq!(from_wire(&wire), Some(frame(9, 1, 60)));
    assert!(b.receive().is_none());
    wire.send(&frame(1, 9, 100));
    nic.settle();
    let (got, status) = a.receive().unwrap();
    assert_eq!((got, status & 1 << 18), (frame(1, 9, 100), 0));
    a.assert_clean();
    b.assert_clean();
    assert_eq!((a.read(0x201c), a.read(0x101c), b.read(0x101c)), (2, 1, 1));
    assert_eq!((a.read(0x2020), b.read(0x1020)), (120, 60));
}

#[test]
fn a_broadcast_reaches_everybody_its_sender_too() {
    let (_nic, mut a, mut b, wire) = pair(VfPolicy::default());
    let mut broadcast = frame(1, 1, 60);
    broadcast[..6].fill(0xff);
    a.send(&broadcast);
    assert!(a.receive().is_some() && b.receive().is_some() && from_wire(&wire).is_some());
    assert_eq!(b.read(0x1034), 0, "a broadcast is no multicast");
}

#[test]
fn multicast_is_heard_by_its_hash() {
    let (_nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    let mut multicast = frame(1, 1, 60);
    multicast[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
    a.send(&multicast);
    assert!(b.receive().is_none());
    b.ask(&[0x0001_0003, 0x010]).unwrap();
    a.send(&multicast);
    assert!(b.receive().is_some());
    assert_eq!(b.read(0x1034), 1);
}

#[test]
fn a_foreign_source_address_is_dropped_until_a_macvlan_is_registered() {
    let (nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    a.send(&frame(2, 7, 60));
    assert!(a.done(0), "the driver does not see that");
    assert_eq!((nic.drops(0).spoofed, b.receive()), (1, None));
    let high = u32::from_le_bytes([0, 7, 0, 0]);
    assert_eq!(a.ask(&[0x0001_0006, 2, high]).unwrap()[0], 0xa001_0006);
    a.send(&frame(2, 7, 60));
    assert!(b.receive().is_some());
    b.send(&frame(7, 2, 60));
    assert_eq!(a.receive().map(|(frame, _)| frame.len()), Some(60));
}

#[test]
fn a_frame_larger_than_a_buffer_fills_several_and_only_the_last_ends_it() {
    let config = Config {
        pf: PfPolicy {
            mtu: 9000,
            ..PfPolicy::default()
        },
        ..Config::for_tests(vec![VfPolicy::default()])
    };
    let nic = Nic::new(config);
    let (near, wire) = Wire::pair().unwrap();
    nic.attach_wire(near);
    let mut a = Bare::open(&nic, 0);
    a.ask(&[1]).unwrap();
    a.ask(&[8, 5]).unwrap();
    a.ask(&[2, 2, u32::from_le_bytes([0, 1, 0, 0])]).unwrap();
    a.start(false);
    wire.send(&frame(1, 9, 9000));
    nic.settle();
    assert_eq!(
        (a.receive(), nic.drops(0).receive_closed),
        (None, 1),
        "the receive path opens with SET_LPE"
    );
    a.ask(&[5, 9018]).unwrap();
    wire.send(&frame(1, 9, 9000));
    wire.send(&frame(1, 9, 9500));
    nic.settle();
    let (got, _) = a.receive().unwrap();
    assert_eq!(got, frame(1, 9, 9000));
    assert_eq!(a.rx_next, 9, "1 KiB each");
    assert_eq!(nic.drops(0).too_long, 1);
    a.assert_clean();
}

#[test]
fn a_ring_without_room_drops_and_goes_on_when_there_is_some() {
    let (nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    for _ in 0..70 {
        a.send(&frame(2, 1, 60));
    }
    assert_eq!(nic.drops(1).no_descriptors, 70 - 63);
    let mut seen = 0;
    while b.receive().is_some() {
        seen += 1;
    }
    assert_eq!(seen, 63);
    a.send(&frame(2, 1, 60));
    assert!(b.receive().is_some());
}

#[test]
fn tags_are_stripped_where_the_queue_says_so_and_inserted_from_the_context() {
    let (nic, mut a, mut b, wire) = pair(VfPolicy::default());
    for driver in [&a, &b] {
        assert_eq!(driver.ask(&[0x0001_0004, 7]).unwrap()[0], 0xa001_0004);
    }
    // A context with tag 7 of priority 5, then a frame with VLE.
    a.context([0xa007 << 16 | 14 << 9, 2 << 20 | 1 << 29]);
    a.send_as(&[&frame(2, 1, 60)], 1 << 30, 60);
    let (got, status) = b.receive().unwrap();
    assert_eq!(
        (&got[12..16], got.len(), status & 8),
        (&[0x81, 0, 0xa0, 7][..], 64, 0)
    );
    b.write(0x1028, 1 << 25 | 1 << 30);
    a.send_as(&[&frame(2, 1, 60)], 1 << 30, 60);
    let (got, status) = b.receive().unwrap();
    assert_eq!(
        (got, status & 8, status >> 48),
        (frame(2, 1, 60), 8, 0xa007)
    );
    // VLAN 8 belongs to nobody here.
    let mut tagged = frame(2, 1, 60);
    tagged.splice(12..12, [0x81, 0, 0, 8]);
    tagged[11] = 9;
    wire.send(&tagged);
    nic.settle();
    assert_eq!((b.receive(), nic.unwanted()), (None, 1));
}

#[test]
fn a_port_vlan_is_hidden_from_its_vf() {
    let (nic, mut a, mut b, wire) = pair(VfPolicy {
        port_vlan: Some(100),
        ..VfPolicy::default()
    });
    a.send(&frame(2, 1, 60));
    assert_eq!(b.receive().unwrap().0, frame(2, 1, 60));
    a.send(&frame(9, 1, 60));
    assert_eq!(from_wire(&wire).unwrap()[12..16], [0x81, 0, 0, 100]);
    wire.send(&frame(1, 9, 60));
    nic.settle();
    assert!(
        a.receive().is_none(),
        "untagged frames are not for this VLAN"
    );
}

#[test]
fn a_begun_checksum_is_finished_by_the_device_and_judged_by_the_receiver() {
    let (_nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    let mut udp = frame(2, 1, 14);
    udp[12..14].copy_from_slice(&[8, 0]);
    udp.extend([
        0x45, 0, 0, 38, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    // The pseudo header's sum: addresses, protocol, length.
    let seed = 0x0a00u32 + 1 + 0x0a00 + 2 + 17 + 18;
    udp.extend([0, 1, 0, 2, 0, 18, (seed >> 8) as u8, seed as u8]);
    udp.extend([7; 10]);
    a.context([14 << 9 | 20, 2 << 20 | 1 << 29 | 0x400]);
    a.send_as(&[&udp[..20], &udp[20..]], 1 << 40 | 1 << 41, udp.len());
    let (got, status) = b.receive().unwrap();
    let errors = 1 << 30 | 1 << 31;
    assert_eq!((got.len(), status & 0x70, status & errors), (52, 0x70, 0));
    a.send_as(&[&udp], 0, udp.len());
    let (_, status) = b.receive().unwrap();
    assert_eq!(
        (status & 0x70, status & errors),
        (0x70, errors),
        "unfinished checksums are wrong"
    );
    a.assert_clean();
}

#[test]
fn frames_wait_for_their_last_descriptor() {
    let (_nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    let whole = frame(2, 1, 200);
    a.poke(TX_BUFFERS, &whole);
    let word = 100 | 3 << 20 | 1 << 29 | 200 << 46;
    a.put_descriptor(TX_RING, 0, [BASE + TX_BUFFERS, word]);
    a.put_descriptor(
        TX_RING,
        1,
        [BASE + TX_BUFFERS + 100, word | 1 << 24 | 1 << 27],
    );
    a.write(0x2018, 1);
    a.nic.settle();
    assert!(b.receive().is_none() && a.read(0x2010) == 0);
    a.write(0x2018, 2);
    a.nic.settle();
    assert_eq!((b.receive().unwrap().0, a.read(0x2010)), (whole, 2));
    assert!(!a.done(0) && a.done(1), "only what asked for it is marked");
    a.tx_next = 2;
    a.assert_clean();
}

#[test]
fn memory_that_was_taken_back_is_a_fault_and_the_queue_stands_still() {
    let (nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    assert!(nic.unmap(1, BASE, MEMORY));
    a.send(&frame(2, 1, 60));
    a.send(&frame(2, 1, 60));
    let faults = nic.report(1).faults;
    assert_eq!(faults.len(), 1, "{faults:x?}");
    assert!(!faults[0].transmits && faults[0].access.iova == BASE + RX_RING);
    assert_eq!(nic.drops(1).queue_off, 2);
    assert!(b.receive().is_none());
    // An address that never was: the sender's queue stops, nobody else's.
    a.put_descriptor(
        TX_RING,
        2,
        [0xbad_0000, 60 | 3 << 20 | 3 << 24 | 1 << 29 | 60 << 46],
    );
    a.write(0x2018, 3);
    nic.settle();
    let faults = nic.report(0).faults;
    assert_eq!(
        (
            faults[0].transmits,
            faults[0].access.iova,
            faults[0].access.len
        ),
        (true, 0xbad_0000, 60)
    );
    a.tx_next = 3;
    a.send(&frame(2, 1, 60));
    assert!(!a.done(3));
}

#[test]
fn two_queues_share_what_rss_spreads() {
    let (nic, mut a, b, _wire) = pair(VfPolicy::default());
    // A second receive queue in memory of its own, and one bit of the table counts.
    let second = 0x2000;
    for index in 0..RING {
        b.put_descriptor(
            second,
            index,
            [BASE + RX_BUFFERS + u64::from(index) * 2048, 0],
        );
    }
    let at = (BASE + second) as u32;
    for (offset, value) in [
        (0x1040, at),
        (0x1044, 0),
        (0x1048, RING * 16),
        (0x1050, 0),
        (0x1058, 0),
        (0x1054, 1 << 25 | 2),
        (0x1068, 1 << 25),
        (0x1058, RING - 1),
        (0x300, 1 << 29),
    ] {
        b.write(offset, value);
    }
    let mut ip = frame(2, 1, 14);
    ip[12..14].copy_from_slice(&[8, 0]);
    ip.extend([
        0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    ip.extend([0; 20]);
    for port in 0..32 {
        ip[35] = port;
        a.send(&ip);
    }
    let received = |ring| {
        (0..RING)
            .filter(|&index| b.descriptor(ring, index)[1] & 1 == 1)
            .count()
    };
    let (first, second) = (received(RX_RING), received(second));
    assert!(
        first >= 4 && second >= 4 && first + second == 32,
        "{first} {second}"
    );
    assert_eq!(nic.counters(1).rx_frames, 32);
}
