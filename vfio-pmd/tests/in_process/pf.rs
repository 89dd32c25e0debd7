//! What VF and PF settle, and what happens when the PF changes its mind.

use super::*;
use std::time::Duration;
use vf_model::{Api as ModelApi, CastMode, Inject};
use vfio_pmd::Health;
use vfio_pmd::mailbox::{Api, Cast, MailboxError};

#[test]
fn every_version_of_the_mailbox_works() {
    for (spoken, agreed) in [
        (ModelApi::V10, Api::V1_0),
        (ModelApi::V11, Api::V1_1),
        (ModelApi::V12, Api::V1_2),
        (ModelApi::V13, Api::V1_3),
        (ModelApi::V14, Api::V1_4),
        (ModelApi::V15, Api::V1_5),
    ] {
        let nic = nic();
        nic.set_port_policy(|port| port.api = spoken);
        let mut a = End::new(&nic, 0, &Options::default());
        let mut b = End::new(&nic, 1, &Options::default());
        assert_eq!(a.vf.api(), agreed);
        a.send(&nic, &frame(B, A, 64, 0));
        assert_eq!(b.receive().len(), 1, "API {agreed}");
        drop((a, b));
        clean(&nic);
    }
}

#[test]
fn the_conversation_is_the_one_other_drivers_have() {
    let nic = nic();
    let end = End::new(&nic, 0, &Options::default());
    let said: Vec<_> = nic
        .take_conversation(0)
        .iter()
        .map(|exchange| {
            (
                exchange.request[0],
                exchange.request.get(1).copied().unwrap_or(0),
                exchange.answer[0],
            )
        })
        .collect();
    // RESET; 1.5 refused, 1.4 taken; queues; own address; longest frame; no further addresses; multicast mode.
    assert_eq!(
        said.iter().map(|said| said.0).collect::<Vec<_>>(),
        [1, 8, 8, 9, 2, 5, 6, 0xC]
    );
    assert_eq!(said[0].2, 0x8000_0001, "no CTS in the answer to RESET");
    assert_eq!((said[1].1, said[1].2), (6, 0x6000_0008));
    assert_eq!((said[2].1, said[2].2), (5, 0xA000_0008));
    assert_eq!(said[3].2, 0xA000_0009);
    assert_eq!(said[4].1, u32::from_le_bytes([2, 0, 0, 0]));
    assert_eq!(said[5].1, 1518);
    assert_eq!(said[7].1, 1);
    drop(end);
    clean(&nic);
}

#[test]
fn the_address_is_the_operators_or_the_pfs_or_random_and_then_stays() {
    let nic = Nic::new(Config::for_tests(vec![
        policy(A),
        VfPolicy::default(),
        VfPolicy {
            mac: Some(B),
            ..VfPolicy::default()
        },
    ]));
    let mut given = open(&nic, 0, &Options::default()).unwrap();
    assert_eq!((given.mac(), given.mac_from_pf()), (A, true));
    given.reset().unwrap();
    assert_eq!(nic.vf_state(0).mac, Some(A));
    let mut random = open(&nic, 1, &Options::default()).unwrap();
    let mac = random.mac();
    assert!(mac[0] & 3 == 2 && !random.mac_from_pf());
    assert_eq!(nic.vf_state(1).mac, Some(mac));
    random.reset().unwrap();
    assert_eq!((random.mac(), nic.vf_state(1).mac), (mac, Some(mac)));
    let own = Options {
        mac: Some([2, 7, 7, 7, 7, 7]),
        ..Options::default()
    };
    // An untrusted VF with an address of the PF may not change it.
    let error = open(&nic, 2, &own).err().unwrap().to_string();
    assert!(
        error.contains("setting the VF's address: the PF refused"),
        "{error}"
    );
    drop((given, random));
    clean(&nic);
}

#[test]
fn addresses_are_registered_until_the_pool_is_empty_and_again_after_a_reset() {
    let nic = nic();
    let mut vf = open(&nic, 0, &Options::default()).unwrap();
    let wanted: Vec<Mac> = (0..150).map(|i| [2, 1, 0, 0, 0, i]).collect();
    let granted = vf.set_addresses(&wanted).unwrap();
    let count = granted.iter().filter(|granted| **granted).count();
    assert!((100..150).contains(&count), "{count}");
    assert_eq!(nic.vf_state(0).macvlans, vf.addresses());
    assert!(vf.add_address(wanted[0]).unwrap());
    let kept = vf.set_addresses(&wanted[..5]).unwrap();
    assert_eq!(kept, [true; 5]);
    assert!(vf.add_address([2, 2, 2, 2, 2, 2]).unwrap());
    assert_eq!(nic.vf_state(0).macvlans.len(), 6);
    vf.reset().unwrap();
    assert_eq!(nic.vf_state(0).macvlans.len(), 6);
    vf.set_addresses(&[]).unwrap();
    assert!(nic.vf_state(0).macvlans.is_empty());
    drop(vf);
    clean(&nic);
}

#[test]
fn an_untrusted_vf_with_an_address_of_the_pf_is_refused_others() {
    let untrusted = VfPolicy {
        mac: Some(A),
        ..VfPolicy::default()
    };
    let nic = Nic::new(Config::for_tests(vec![untrusted]));
    let mut vf = open(&nic, 0, &Options::default()).unwrap();
    assert_eq!(vf.set_addresses(&[B]).unwrap(), [false]);
    assert!(matches!(vf.health(), Health::Up(10_000)));
    drop(vf);
    clean(&nic);
}

#[test]
fn promiscuous_mode_becomes_what_the_pf_allows() {
    let plain = VfPolicy::default();
    let nic = Nic::new(Config::for_tests(vec![policy(A), plain]));
    let mut trusted = open(&nic, 0, &Options::default()).unwrap();
    let mut plain = open(&nic, 1, &Options::default()).unwrap();
    assert_eq!(trusted.set_cast(Cast::Promiscuous).unwrap(), Cast::AllMulti);
    assert_eq!(nic.vf_state(0).cast, CastMode::AllMulti);
    assert_eq!(plain.set_cast(Cast::AllMulti).unwrap(), Cast::Multi);
    trusted.reset().unwrap();
    assert_eq!(nic.vf_state(0).cast, CastMode::AllMulti);
    drop((trusted, plain));
    clean(&nic);
}

#[test]
fn multicast_arrives_where_it_is_registered_whatever_bits_the_pf_hashes() {
    let group = [1, 0, 0x5E, 0x12, 0x34, 0x56];
    for filter in 0..4 {
        let nic = nic();
        nic.set_port_policy(|port| port.multicast_filter = filter);
        let mut a = End::new(&nic, 0, &Options::default());
        let mut b = End::new(&nic, 1, &Options::default());
        a.send(&nic, &frame(group, A, 64, 0));
        assert_eq!(b.receive().len(), 0);
        b.vf.set_multicast(&[group]).unwrap();
        a.send(&nic, &frame(group, A, 64, 1));
        assert_eq!(b.receive(), vec![frame(group, A, 64, 1)]);
        drop((a, b));
        clean(&nic);
    }
}

#[test]
fn more_groups_than_the_pf_keeps_ask_for_all_multicast() {
    let nic = nic();
    let mut vf = open(&nic, 0, &Options::default()).unwrap();
    let groups: Vec<Mac> = (0..50).map(|i| [1, 0, 0x5E, i, i, i * 3]).collect();
    vf.set_multicast(&groups).unwrap();
    assert_eq!(nic.vf_state(0).cast, CastMode::AllMulti);
    drop(vf);
    clean(&nic);
}

#[test]
fn long_frames_are_only_what_the_pf_has() {
    let nic = nic();
    let jumbo = Options {
        max_frame: 9014,
        ..Options::default()
    };
    let vf = open(&nic, 0, &jumbo).unwrap();
    assert_eq!(vf.max_frame(), 1514, "the port has an MTU of 1500");
    drop(vf);
    nic.set_port_policy(|port| port.mtu = 9000);
    // A port with a larger MTU lets a VF receive only once it named its longest frame: here at 1500, too.
    let mut a = End::new(&nic, 0, &jumbo);
    let mut b = End::new(&nic, 1, &jumbo);
    assert_eq!(a.vf.max_frame(), 9014);
    a.send(&nic, &frame(B, A, 9014, 0));
    assert_eq!(b.receive(), vec![frame(B, A, 9014, 0)]);
    drop((a, b));
    clean(&nic);
}

#[test]
fn queues_are_what_the_pf_grants() {
    for (said, started) in [(4, 4), (2, 2), (1, 1), (3, 2), (0, 4), (100, 4)] {
        let nic = nic();
        nic.inject(0, Inject::Queues(said));
        let four = Options {
            queues: 4,
            ..Options::default()
        };
        let mut vf = open(&nic, 0, &four).unwrap();
        let pairs = vf.start().unwrap();
        assert_eq!(pairs.len(), started, "the PF said {said}");
        assert!(vf.start().is_err(), "the queues are in use");
        assert!(vf.reset().is_err(), "the queues are in use");
        drop(pairs);
        assert_eq!(vf.start().unwrap().len(), started);
        drop(vf);
        clean(&nic);
    }
}

fn recover(end: End) -> End {
    let End { mut vf, rx, tx } = end;
    drop((rx, tx));
    vf.reset().unwrap();
    let QueuePair { rx, tx } = vf.start().unwrap().remove(0);
    End { vf, rx, tx }
}

#[test]
fn after_a_reset_of_the_pf_everything_is_as_before() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    let other = [2, 3, 3, 3, 3, 3];
    assert_eq!(b.vf.set_addresses(&[other]).unwrap(), [true]);
    b.vf.set_vlan(7, true).unwrap();
    for round in 1..4 {
        a.send(&nic, &frame(other, A, 64, 0));
        assert_eq!(b.receive().len(), 1);
        nic.reset_pf(Duration::from_millis(20));
        assert!(matches!(
            b.vf.health(),
            Health::Lost(MailboxError::Forgotten)
        ));
        assert!(
            matches!(b.vf.health(), Health::Lost(_)),
            "until it is reset"
        );
        // Traffic meanwhile hurts nobody.
        a.tx.push_bytes(&frame(other, A, 64, 0)).unwrap();
        a.tx.publish();
        nic.settle();
        b.rx.lend(64);
        nic.advance(Duration::from_millis(30));
        a = recover(a);
        b = recover(b);
        assert!(matches!(b.vf.health(), Health::Up(10_000)));
        assert_eq!(nic.vf_state(1).macvlans, [other]);
        assert!(nic.vf_state(1).vlans.contains(&7));
        assert!(b.vf.statistics().rx_frames >= round, "counts go on");
    }
    a.send(&nic, &frame(other, A, 64, 0));
    assert_eq!(b.receive().len(), 1);
    drop((a, b));
    clean(&nic);
}

#[test]
fn a_pf_in_reset_is_an_error_now_and_none_later() {
    let nic = nic();
    nic.reset_pf(Duration::from_secs(5));
    let error = open(&nic, 0, &Options::default())
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("in reset") || error.contains("did not answer"),
        "{error}"
    );
    nic.advance(Duration::from_secs(6));
    drop(open(&nic, 0, &Options::default()).unwrap());
    clean(&nic);
}

#[test]
fn lost_leave_to_send_and_a_pulled_cable_are_noticed() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    assert_eq!(a.vf.health(), Health::Up(10_000));
    nic.set_cable(false);
    assert_eq!(a.vf.health(), Health::Down);
    nic.set_cable(true);
    assert_eq!(a.vf.health(), Health::Up(10_000));
    nic.inject(0, Inject::LoseCts);
    assert!(matches!(
        a.vf.health(),
        Health::Lost(MailboxError::Forgotten)
    ));
    let mut a = recover(a);
    assert_eq!(a.vf.health(), Health::Up(10_000));
    // Changed trust is withdrawn leave, too.
    nic.set_policy(0, |policy| policy.trusted = false);
    assert!(matches!(a.vf.health(), Health::Lost(_)));
    drop(recover(a));
    clean(&nic);
}

#[test]
fn a_pf_that_never_answers_is_a_sentence_and_leaves_nothing_mapped() {
    for fault in [
        Inject::LoseAnswers(u32::MAX),
        Inject::BusyMailbox(u32::MAX),
        Inject::Delay(Duration::from_secs(60)),
        Inject::Removed(true),
    ] {
        let nic = nic();
        nic.inject(0, fault);
        let error = open(&nic, 0, &Options::default())
            .err()
            .unwrap()
            .to_string();
        assert!(error.starts_with("model VF 0: "), "{error}");
        clean(&nic);
    }
}

#[test]
fn a_pf_that_refuses_what_it_never_should_is_a_sentence_and_the_next_open_works() {
    for refusals in 1..12 {
        let nic = nic();
        nic.inject(0, Inject::Refuse(refusals));
        match open(&nic, 0, &Options::default()) {
            Ok(vf) => assert!(vf.max_frame() >= 1514, "{refusals} refusals"),
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("the PF refused"), "{error}");
            }
        }
        nic.inject(0, Inject::Refuse(0));
        let mut vf = open(&nic, 0, &Options::default()).unwrap();
        assert_eq!((vf.health(), vf.mac()), (Health::Up(10_000), A));
        drop(vf);
        clean(&nic);
    }
}

#[test]
fn a_port_vlan_is_not_seen_and_vlans_of_ones_own_are_refused() {
    let inside = |mac| VfPolicy {
        port_vlan: Some(100),
        ..policy(mac)
    };
    let nic = Nic::new(Config::for_tests(vec![inside(A), inside(B)]));
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    assert!(!a.vf.set_vlan(7, true).unwrap());
    a.send(&nic, &frame(B, A, 64, 0));
    assert_eq!(b.receive(), vec![frame(B, A, 64, 0)]);
    // Refused things are not asked for again.
    drop((a.rx, a.tx));
    a.vf.reset().unwrap();
    assert!(nic.vf_state(0).vlans.is_empty());
    drop((a.vf, b));
    clean(&nic);
}

#[test]
fn one_lost_answer_or_a_busy_mailbox_is_survived() {
    let nic = nic();
    nic.inject(0, Inject::BusyMailbox(50));
    let mut vf = open(&nic, 0, &Options::default()).unwrap();
    nic.inject(0, Inject::LoseAnswers(1));
    let error = vf.set_addresses(&[B]).unwrap_err().to_string();
    assert!(error.contains("did not answer within a second"), "{error}");
    assert!(matches!(vf.health(), Health::Lost(MailboxError::Silent)));
    vf.reset().unwrap();
    assert_eq!(vf.health(), Health::Up(10_000));
    nic.inject(0, Inject::Delay(Duration::from_millis(300)));
    assert_eq!(vf.set_addresses(&[B]).unwrap(), [true]);
    drop(vf);
    clean(&nic);
}

#[test]
fn a_device_that_is_pulled_out_ends_quietly() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    a.send(&nic, &frame(B, A, 64, 0));
    let before = b.vf.statistics();
    nic.inject(1, Inject::Removed(true));
    assert_eq!(b.vf.health(), Health::Lost(MailboxError::Gone));
    assert_eq!(b.vf.statistics(), before, "ones are no counts");
    assert_eq!(b.receive().len(), 1);
    assert!(!b.rx.arm());
    b.tx.push_bytes(&frame(A, B, 64, 0)).unwrap();
    b.tx.publish();
    let End { mut vf, rx, tx } = b;
    drop((rx, tx));
    assert!(vf.reset().is_err());
    drop((vf, a));
    clean(&nic);
}

#[test]
fn counters_go_on_where_their_registers_wrap() {
    let nic = nic();
    nic.inject(1, Inject::CountersNearWrap);
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    nic.inject(1, Inject::CountersNearWrap);
    let start = b.vf.statistics();
    let mut bytes = 0;
    for number in 0..400 {
        a.send(&nic, &frame(B, A, 1500, number));
        bytes += 1500;
        b.receive();
    }
    let end = b.vf.statistics();
    assert_eq!(end.rx_frames - start.rx_frames, 400);
    assert_eq!(end.rx_bytes - start.rx_bytes, bytes);
    drop((a, b));
    clean(&nic);
}

#[test]
fn the_mailbox_has_an_interrupt_of_its_own() {
    let nic = nic();
    let mut vf = open(&nic, 0, &Options::default()).unwrap();
    drop(vf.start().unwrap());
    vf.health();
    let before = nic.interrupts(0)[2];
    nic.set_cable(false);
    assert!(nic.interrupts(0)[2] > before);
    assert!(vf.mailbox_signal().is_some());
    assert_eq!(vf.health(), Health::Down);
    drop(vf);
    clean(&nic);
}

#[test]
fn a_predecessor_that_was_killed_leaves_a_device_that_opens() {
    let nic = nic();
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &Options::default());
    b.vf.set_vlan(9, true).unwrap();
    // Killed: nothing is dropped in order; the kernel closes the device, which ends its mappings.
    assert!(nic.mappings(1) > 0);
    std::mem::forget(b);
    nic.unmap_all(1);
    let mut b = End::new(&nic, 1, &Options::default());
    a.send(&nic, &frame(B, A, 64, 0));
    assert_eq!(b.receive().len(), 1);
    assert!(!nic.vf_state(1).vlans.contains(&9));
    drop((a, b));
    clean(&nic);
}

#[test]
fn a_restarted_process_gives_its_rings_the_same_addresses_whatever_lies_where() {
    // Base and length of both rings, as the device has them.
    let rings =
        |nic: &Nic| [0x1000, 0x1004, 0x1008, 0x2000, 0x2004, 0x2008].map(|at| nic.read(0, at));
    let nic = nic();
    let first = End::new(&nic, 0, &Options::default());
    let before = rings(&nic);
    assert_ne!((before[0], before[1]), (0, 0));
    // The first life's memory is still mapped here: the second's lies elsewhere.
    std::mem::forget(first);
    nic.unmap_all(0);
    let mut second = End::new(&nic, 0, &Options::default());
    assert_eq!(rings(&nic), before);
    let mut b = End::new(&nic, 1, &Options::default());
    b.send(&nic, &frame(A, B, 64, 0));
    assert_eq!(second.receive(), vec![frame(A, B, 64, 0)]);
    drop((second, b));
    clean(&nic);
}

#[test]
fn options_no_device_has_are_refused() {
    let nic = nic();
    let with = |change: fn(&mut Options)| {
        let mut options = Options::default();
        change(&mut options);
        open(&nic, 0, &options).err().map(|error| error.to_string())
    };
    for error in [
        with(|o| o.queues = 3),
        with(|o| o.rx_ring = 100),
        with(|o| o.tx_ring = 64),
        with(|o| o.tx_ring = 8192),
        with(|o| o.max_frame = 9725),
        with(|o| o.mac = Some([1, 0, 0, 0, 0, 1])),
    ] {
        let error = error.expect("refused");
        assert!(error.starts_with("model VF 0: "), "{error}");
    }
    clean(&nic);
}
