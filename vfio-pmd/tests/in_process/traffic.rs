//! Frames of every shape, both ways.

use super::*;
use vf_model::{Inject, Wire};
use vfio_pmd::desc::{Checksum, L4, TxChecksum, TxOffload, TxSegments};
use vfio_pmd::rx::RxFault;
use vfio_pmd::tx::TxError;

#[test]
fn frames_of_every_length_arrive_whole_and_short_ones_padded() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    for len in 18..=1514 {
        let sent = frame(B, A, len, len as u32);
        a.send(&nic, &sent);
        assert_eq!(b.receive(), vec![padded(sent)]);
    }
    let counters = nic.counters(1);
    assert_eq!(counters.rx_frames, 1497);
    assert_eq!(b.vf.statistics().rx_frames, 1497);
    assert_eq!(a.vf.statistics().tx_frames, 1497);
    assert_eq!(a.vf.statistics().tx_bytes, nic.counters(0).tx_bytes);
    drop((a, b));
    clean(&nic);
}

#[test]
fn bytes_of_the_frame_before_never_pad_a_short_one() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    for _ in 0..512 {
        a.send(&nic, &frame(B, A, 1000, 0));
    }
    b.receive();
    for _ in 0..512 {
        a.send(&nic, &frame(B, A, 20, 1));
        let got = b.receive();
        assert_eq!(got, vec![padded(frame(B, A, 20, 1))]);
    }
    drop((a, b));
    clean(&nic);
}

fn jumbo_nic() -> Arc<Nic> {
    let nic = nic();
    nic.set_port_policy(|port| port.mtu = 9000);
    nic
}

fn jumbo() -> Options {
    Options {
        max_frame: 9014,
        ..Options::default()
    }
}

#[test]
fn frames_longer_than_a_buffer_go_through_several_in_both_directions() {
    let nic = jumbo_nic();
    let mut a = End::new(&nic, 0, &jumbo());
    let mut b = End::new(&nic, 1, &jumbo());
    assert_eq!(a.vf.max_frame(), 9014);
    for len in [1515, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 6145, 9014] {
        // One among others: chains and plain frames in the same burst.
        let sent: Vec<_> = (0..9)
            .map(|i| frame(B, A, if i % 3 == 1 { len } else { 64 }, i))
            .collect();
        for frame in &sent {
            a.tx.push_bytes(frame).unwrap();
        }
        a.tx.publish();
        nic.settle();
        assert_eq!(b.receive(), sent, "length {len}");
    }
    assert_eq!(a.tx.push_bytes(&vec![0; 9019]), Err(TxError::Length));
    assert_eq!(a.tx.push_bytes(&[]), Err(TxError::Length));
    drop((a, b));
    clean(&nic);
}

#[test]
fn a_chain_is_forwarded_frame_to_frame() {
    let nic = jumbo_nic();
    let mut a = End::new(&nic, 0, &jumbo());
    let mut b = End::new(&nic, 1, &jumbo());
    let sent: Vec<_> = [60, 2048, 2049, 9014].map(|len| frame(A, A, len, 3)).into();
    for frame in &sent {
        let mut there = frame.clone();
        there[..6].copy_from_slice(&B);
        a.send(&nic, &there);
    }
    let frames = b.rx.lend(64);
    assert_eq!(frames.count(), 4);
    for frame in frames.iter() {
        b.tx.push_frame(&frame).unwrap();
    }
    b.rx.give_back(4);
    b.tx.publish();
    nic.settle();
    // They are still for B, and the sender gets its own back only as broadcast: the device gave them to B again.
    let back = b.receive();
    assert_eq!(back.len(), 4);
    for (got, frame) in back.iter().zip(&sent) {
        assert_eq!(got[6..], frame[6..]);
    }
    drop((a, b));
    clean(&nic);
}

#[test]
fn a_frame_is_lent_again_until_it_is_given_back() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    for number in 0..3 {
        a.send(&nic, &frame(B, A, 64, number));
    }
    for _ in 0..3 {
        assert_eq!(b.rx.lend(64).count(), 3);
    }
    assert_eq!(b.rx.lend(2).count(), 2);
    b.rx.lend(64);
    b.rx.give_back(1);
    let frames = b.rx.lend(64);
    assert_eq!(
        frames.iter().map(|f| bytes(&f)).collect::<Vec<_>>(),
        vec![frame(B, A, 64, 1), frame(B, A, 64, 2)]
    );
    b.rx.give_back(99);
    b.rx.give_back(1);
    assert_eq!(b.rx.lend(64).count(), 0);
    drop((a, b));
    clean(&nic);
}

#[test]
fn lengths_no_buffer_has_are_faults_and_the_next_frame_is_fine() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    for length in [0, 2049, 4096, 0xFFFF] {
        nic.inject(1, Inject::ReceiveLength(1, length));
        a.send(&nic, &frame(B, A, 200, 1));
        a.send(&nic, &frame(B, A, 200, 2));
        let frames = b.rx.lend(64);
        assert_eq!(frames.count(), 2);
        let first = frames.iter().next().unwrap();
        assert_eq!(first.fault(), Some(RxFault::Length), "length {length}");
        assert!(first.is_empty() && first.whole().is_none() && first.pieces().next().is_none());
        assert_eq!(bytes(&frames.iter().nth(1).unwrap()), frame(B, A, 200, 2));
        b.rx.give_back(2);
    }
    drop((a, b));
    clean(&nic);
}

#[test]
fn chains_without_an_end_are_given_up_and_the_queue_goes_on() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    for endless in [1u32, 7, 8, 9, 16, 63, 64, 200, 600] {
        nic.inject(1, Inject::NoEnd(endless));
        let mut got = Vec::new();
        for number in 0..endless + 2 {
            a.send(&nic, &frame(B, A, 200, number));
            // Taken while it grows: an unfinished chain is lent to nobody and kept.
            if number % 5 == 0 {
                got.extend(b.receive());
            }
        }
        got.extend(b.receive());
        assert_eq!(
            got.last(),
            Some(&frame(B, A, 200, endless + 1)),
            "{endless} frames without an end"
        );
        assert!(got.len() >= 2);
        if endless >= 9 {
            assert!(got[..got.len() - 1].iter().all(Vec::is_empty));
        }
    }
    drop((a, b));
    clean(&nic);
}

#[test]
fn a_device_that_reports_nothing_fills_the_ring_and_no_more() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    nic.inject(0, Inject::NoDone(true));
    let mut taken = 0;
    while a.tx.push_bytes(&frame(B, A, 64, taken)).is_ok() {
        taken += 1;
        a.tx.publish();
        nic.settle();
        b.receive();
        assert!(taken < 10_000);
    }
    assert_eq!(taken, 511);
    assert_eq!(a.tx.push_bytes(&frame(B, A, 64, 0)), Err(TxError::Full));
    drop((a, b));
    clean(&nic);
}

#[test]
fn frames_leave_by_the_wire_and_come_from_it() {
    let nic = nic();
    let (inner, outer) = Wire::pair().unwrap();
    nic.attach_wire(inner);
    let mut a = End::new(&nic, 0, &Options::default());
    let station = [2, 9, 9, 9, 9, 9];
    a.send(&nic, &frame(station, A, 100, 7));
    let mut buffer = [0; 2048];
    assert_eq!(
        outer.receive(&mut buffer),
        Some(&frame(station, A, 100, 7)[..])
    );
    assert!(outer.send(&frame(A, station, 100, 8)));
    nic.settle();
    assert_eq!(a.receive(), vec![frame(A, station, 100, 8)]);
    drop(a);
    clean(&nic);
}

#[test]
fn two_devices_are_joined_by_their_wires() {
    let nics = [nic(), nic()];
    let (left, right) = Wire::pair().unwrap();
    nics[0].attach_wire(left);
    nics[1].attach_wire(right);
    let far = [2, 0, 0, 0, 0, 0xF];
    let mut a = End::new(&nics[0], 0, &Options::default());
    let options = Options {
        mac: Some(far),
        ..Options::default()
    };
    let mut b = End::new(&nics[1], 1, &options);
    for (len, number) in [(60, 0), (1514, 1)] {
        a.send(&nics[0], &frame(far, A, len, number));
        nics[1].settle();
        assert_eq!(b.receive(), vec![frame(far, A, len, number)]);
        b.send(&nics[1], &frame(A, far, len, number));
        nics[0].settle();
        assert_eq!(a.receive(), vec![frame(A, far, len, number)]);
    }
    nics[0].set_cable(false);
    b.send(&nics[1], &frame(A, far, 60, 2));
    nics[0].settle();
    assert!(a.receive().is_empty());
    drop((a, b));
    nics.iter().for_each(|nic| clean(nic));
}

/// The sum of 16-bit words that all of IP's checksums rest on, folded; a right packet sums to 0xFFFF.
fn fold(bytes: &[u8], start: u32) -> u16 {
    let mut sum = bytes.chunks(2).fold(start, |sum, pair| {
        sum + (u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
    });
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}

fn pseudo(packet: &[u8], len: usize) -> u32 {
    u32::from(fold(&packet[26..34], 0)) + u32::from(packet[23]) + len as u32
}

/// Ethernet, IPv4 without a header checksum, TCP or UDP with only the pseudo header's sum (of `counted` bytes) in its field.
fn packet(protocol: u8, payload: usize, counted: usize) -> Vec<u8> {
    let l4 = if protocol == 6 { 20 } else { 8 };
    let total = (20 + l4 + payload) as u16;
    let mut packet = [&B[..], &A, &[8, 0, 0x45, 0]].concat();
    packet.extend(total.to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.resize(14 + 20 + l4, 0);
    packet[34..38].copy_from_slice(&[0x12, 0x34, 0, 80]);
    if protocol == 6 {
        packet[46] = 0x50;
    } else {
        packet[38..40].copy_from_slice(&((8 + payload) as u16).to_be_bytes());
    }
    packet.extend((0..payload).map(|i| (i * 31 % 251) as u8));
    let sum = fold(&[], pseudo(&packet, counted));
    let field = 34 + if protocol == 6 { 16 } else { 6 };
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn sums_are_right(packet: &[u8]) -> bool {
    fold(&packet[14..34], 0) == 0xFFFF
        && fold(&packet[34..], pseudo(packet, packet.len() - 34)) == 0xFFFF
}

fn checksum(l4: L4) -> TxChecksum {
    TxChecksum {
        mac_len: 14,
        ip_len: 20,
        ipv4: true,
        l4,
    }
}

fn push(tx: &mut TxQueue, frame: &[u8], offload: &TxOffload) {
    tx.push_with(frame.len() as u32, offload, |from, room| {
        room.write(0, &frame[from as usize..]);
    })
    .unwrap();
}

#[test]
fn the_device_completes_checksums_and_the_receiver_is_told() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    for (l4, protocol) in [(L4::Tcp, 6), (L4::Udp, 17), (L4::Tcp, 6)] {
        for payload in [18, 100, 1000] {
            let len = payload + if protocol == 6 { 20 } else { 8 };
            let offload = TxOffload {
                checksum: Some(checksum(l4)),
                ..TxOffload::default()
            };
            push(&mut a.tx, &packet(protocol, payload, len), &offload);
            a.tx.publish();
            nic.settle();
            let frames = b.rx.lend(64);
            let frame = frames.iter().next().unwrap();
            assert!(sums_are_right(&bytes(&frame)));
            assert_eq!(frame.l4_checksum(), Checksum::Good);
            assert_eq!(frame.ip_checksum(), Checksum::Good);
            b.rx.give_back(1);
        }
    }
    // A wrong sum is reported, not dropped.
    let mut bad = packet(17, 64, 72);
    bad[24] = 1;
    a.send(&nic, &bad);
    let frames = b.rx.lend(64);
    let frame = frames.iter().next().unwrap();
    assert_eq!(frame.fault(), None);
    assert_eq!(frame.ip_checksum(), Checksum::Bad);
    b.rx.give_back(1);
    drop((a, b));
    clean(&nic);
}

#[test]
fn the_device_cuts_a_long_tcp_frame_into_segments() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    let offload = TxOffload {
        vlan: None,
        checksum: Some(checksum(L4::Tcp)),
        mss: Some(TxSegments {
            mss: 1460,
            tcp_len: 20,
        }),
    };
    for payload in [1, 1460, 1461, 20_000, 60_000] {
        let mut long = packet(6, payload, 0);
        // The device fills in each segment's length.
        long[16..18].fill(0);
        push(&mut a.tx, &long, &offload);
        a.tx.publish();
        nic.settle();
        let got = b.receive();
        assert_eq!(got.len(), payload.div_ceil(1460));
        let mut joined = Vec::new();
        for segment in &got {
            let total = usize::from(u16::from_be_bytes([segment[16], segment[17]]));
            let segment = &segment[..14 + total];
            assert!(sums_are_right(segment));
            joined.extend_from_slice(&segment[54..]);
        }
        assert_eq!(joined, long[54..]);
    }
    drop((a, b));
    clean(&nic);
}

#[test]
fn tags_are_inserted_stripped_and_filtered() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let strip = Options {
        strip_vlan: true,
        ..Options::default()
    };
    let mut b = End::new(&nic, 1, &strip);
    assert!(a.vf.set_vlan(100, true).unwrap());
    let offload = TxOffload {
        vlan: Some(0x2064),
        ..TxOffload::default()
    };
    let sent = frame(B, A, 200, 1);
    push(&mut a.tx, &sent, &offload);
    a.tx.publish();
    nic.settle();
    assert_eq!(b.rx.lend(64).count(), 0, "VLAN 100 is not B's yet");
    assert!(b.vf.set_vlan(100, true).unwrap());
    push(&mut a.tx, &sent, &offload);
    // Equal offloads share a context; another frame in between changes nothing.
    a.tx.push_bytes(&sent).unwrap();
    push(&mut a.tx, &sent, &offload);
    a.tx.publish();
    nic.settle();
    let frames = b.rx.lend(64);
    let got: Vec<_> = frames.iter().map(|f| (bytes(&f), f.vlan())).collect();
    assert_eq!(
        got,
        vec![
            (sent.clone(), Some(0x2064)),
            (sent.clone(), None),
            (sent.clone(), Some(0x2064))
        ]
    );
    b.rx.give_back(3);
    assert!(b.vf.set_vlan(100, false).unwrap());
    push(&mut a.tx, &sent, &offload);
    a.tx.publish();
    nic.settle();
    assert_eq!(b.rx.lend(64).count(), 0);
    drop((a, b));
    clean(&nic);
}

#[test]
fn what_the_device_cannot_do_is_refused_and_the_queue_is_as_before() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    let offload = TxOffload {
        checksum: Some(checksum(L4::Udp)),
        mss: Some(TxSegments {
            mss: 100,
            tcp_len: 20,
        }),
        ..TxOffload::default()
    };
    let refused =
        a.tx.push_with(500, &offload, |_, _| panic!("nothing to copy"));
    assert!(matches!(refused, Err(TxError::Offload(_))));
    let long = TxOffload {
        mss: Some(TxSegments {
            mss: 1460,
            tcp_len: 20,
        }),
        checksum: Some(checksum(L4::Tcp)),
        vlan: None,
    };
    let refused =
        a.tx.push_with(90_000, &long, |_, _| panic!("nothing to copy"));
    assert_eq!(refused, Err(TxError::Length));
    a.send(&nic, &frame(B, A, 64, 0));
    assert_eq!(b.receive(), vec![frame(B, A, 64, 0)]);
    drop((a, b));
    clean(&nic);
}

#[test]
fn four_queues_receive_what_the_device_spreads_over_them() {
    let nic = nic();
    nic.set_port_policy(|port| port.rss_queues = 4);
    let mut a = End::new(&nic, 0, &Options::default());
    let four = Options {
        queues: 4,
        ..Options::default()
    };
    let mut vf = open(&nic, 1, &four).unwrap();
    let mut pairs = vf.start().unwrap();
    assert_eq!(pairs.len(), 4);
    for number in 0..400u16 {
        let mut sent = packet(17, 20, 28);
        sent[28..30].copy_from_slice(&number.to_be_bytes());
        a.send(&nic, &sent);
    }
    let mut per_queue = Vec::new();
    for pair in &mut pairs {
        let mut got = 0;
        loop {
            let count = pair.rx.lend(64).count();
            pair.rx.give_back(count);
            got += count;
            if count == 0 {
                break;
            }
        }
        per_queue.push(got);
        // And each sends.
        pair.tx.push_bytes(&frame(A, B, 64, 0)).unwrap();
        pair.tx.publish();
    }
    nic.settle();
    assert_eq!(per_queue.iter().sum::<usize>(), 400);
    assert!(
        per_queue.iter().filter(|got| **got > 20).count() >= 2,
        "{per_queue:?}"
    );
    assert_eq!(a.receive().len(), 4);
    drop((a, pairs, vf));
    clean(&nic);
}

#[test]
fn an_armed_queue_is_woken_by_one_frame_and_once() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    let before = nic.interrupts(1)[0];
    a.send(&nic, &frame(B, A, 64, 0));
    assert_eq!(nic.interrupts(1)[0], before, "nobody asked");
    assert!(b.rx.arm(), "a frame is there already");
    b.receive();
    assert!(!b.rx.arm());
    for number in 0..3 {
        a.send(&nic, &frame(B, A, 64, number));
    }
    let woken = nic.interrupts(1)[0];
    assert!(woken > before && woken <= before + 2, "{before} {woken}");
    assert!(b.rx.wake_fd().is_some());
    assert_eq!(b.receive().len(), 3);
    drop((a, b));
    clean(&nic);
}
