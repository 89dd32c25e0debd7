//! Resets, mistakes, faults on purpose, old protocols.

use super::*;

#[test]
fn what_no_driver_should_do_is_noted() {
    let nic = Nic::new(Config::for_tests(vec![VfPolicy::default()]));
    let a = Bare::open(&nic, 0);
    a.write(0x1018, 0);
    a.write(0x1018, 7);
    a.write(0x1028, 1 << 25);
    a.start(false);
    let misuses = nic.report(0).misuses;
    assert_eq!(
        misuses[0],
        Misuse::TailOfDisabledQueue {
            transmits: false,
            queue: 0
        }
    );
    assert_eq!(
        misuses[1],
        Misuse::RingLayout {
            transmits: false,
            queue: 0
        }
    );
    assert_eq!(misuses[2], Misuse::BufferType { queue: 0 });
    a.write(0x2018, RING);
    nic.settle();
    assert!(matches!(
        nic.report(0).misuses.last(),
        Some(Misuse::RingIndices { tail: RING, .. })
    ));
    let b = Bare {
        nic: Arc::clone(&nic),
        vf: 0,
        memory: a.memory.try_clone().unwrap(),
        rx_next: 0,
        tx_next: 0,
    };
    b.write(0x2028, 0);
    b.write(0x2018, 0);
    b.write(0x2010, 0);
    b.write(0x2028, 1 << 25);
    b.put_descriptor(TX_RING, 0, [BASE, 60 | 3 << 24]);
    b.write(0x2018, 1);
    nic.settle();
    assert!(
        matches!(
            nic.report(0).misuses.last(),
            Some(Misuse::DescriptorType { .. })
        ),
        "legacy descriptors"
    );
}

#[test]
fn a_driver_that_forgets_what_a_reset_leaves_meets_its_predecessor() {
    let (nic, mut a, _b, _wire) = pair(VfPolicy::default());
    assert_eq!(a.read(0x2038), 0, "written at start");
    let next = Nic::new(Config::for_tests(vec![VfPolicy::default()]));
    let b = Bare::open(&next, 0);
    assert_eq!(
        (b.read(0x2038), b.read(0x1018), b.read(0x1028) >> 25 & 1),
        (0xdead_0001, 5, 0)
    );
    // Head write-back to the predecessor's address.
    a.write(0x2038, 0xdead_0001);
    a.send(&frame(9, 1, 60));
    assert_eq!(nic.report(0).faults[0].access.iova, 0xdead_0000);
}

#[test]
fn a_reset_stops_queues_and_takes_the_leave_to_send() {
    let (nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    nic.reset(1);
    assert_eq!(b.read(0x1028) & 1 << 25, 0);
    assert_eq!(b.read(0x1000), 0);
    a.send(&frame(2, 1, 60));
    assert!(b.receive().is_none());
    assert_eq!(b.ask(&[5, 1518]).unwrap()[0], 0x4000_0005);
    b.agree(2);
    b.start(false);
    b.rx_next = 0;
    a.send(&frame(2, 1, 60));
    assert!(b.receive().is_some());
}

#[test]
fn a_pf_reset_shows_in_the_mailbox_and_needs_everything_again() {
    let (nic, a, _b, _wire) = pair(VfPolicy::default());
    assert_eq!(a.read(0x010), 0x7000_0000);
    a.write(0x140, 0x82);
    a.write(0x108, 7);
    nic.reset_pf(Duration::from_millis(50));
    assert_eq!(
        (a.read(0x010), a.read(0x2fc) & 0x50, a.read(0x200)),
        (0, 0x50, 0x100)
    );
    assert_eq!(nic.interrupts(0)[2], 1);
    // Nobody answers; what comes is the PF's own word when it is back.
    assert_eq!(a.ask(&[5, 1518]).map(|words| words[0]), Some(0x100));
    assert_eq!(a.ask(&[5, 1518]).map(|words| words[0]), Some(0x4000_0005));
    assert_eq!(a.read(0x010), 0x7000_0000);
    // A VF that reads without leave to send is refused once more: from that Linux's learns that it has to start over.
    a.write(0x2fc, 2);
    assert_eq!((a.read(0x2fc) & 0x10, a.read(0x200)), (0x10, 0x4000_0000));
    a.agree(1);
}

#[test]
fn a_mailbox_that_is_busy_or_loses_answers_can_be_asked_again() {
    let (nic, a, _b, _wire) = pair(VfPolicy::default());
    nic.inject(0, Inject::BusyMailbox(2));
    assert_eq!((a.ask(&[9]), a.ask(&[9])), (None, None));
    assert_eq!(a.ask(&[9]).unwrap()[..3], [0xa000_0009, 4, 4]);
    nic.inject(0, Inject::LoseAnswers(1));
    assert_eq!(a.ask(&[9]), None);
    nic.inject(0, Inject::Delay(Duration::from_millis(30)));
    assert!(a.ask(&[9]).is_some());
    nic.inject(0, Inject::Delay(Duration::ZERO));
    nic.inject(0, Inject::Refuse(1));
    assert_eq!(a.ask(&[9]).unwrap()[0], 0x6000_0009);
    nic.inject(0, Inject::Queues(0));
    assert_eq!(a.ask(&[9]).unwrap()[1..3], [0, 0]);
    nic.inject(0, Inject::LoseCts);
    assert_eq!((a.read(0x2fc) & 0x10, a.read(0x200)), (0x10, 0x100));
}

#[test]
fn a_device_that_is_gone_reads_all_ones_and_does_nothing() {
    let (nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    nic.inject(0, Inject::Removed(true));
    assert_eq!(
        (a.read(0), a.read(0x2fc), a.read(0x1018)),
        (u32::MAX, u32::MAX, u32::MAX)
    );
    a.send(&frame(2, 1, 60));
    assert!(b.receive().is_none());
    nic.inject(0, Inject::Removed(false));
    a.send(&frame(2, 1, 60));
    assert!(b.receive().is_some() && b.receive().is_some());
}

#[test]
fn descriptors_lie_when_they_are_told_to() {
    let (nic, mut a, mut b, _wire) = pair(VfPolicy::default());
    nic.inject(1, Inject::ReceiveLength(1, 0xffff));
    a.send(&frame(2, 1, 60));
    assert_eq!(b.descriptor(RX_RING, 0)[1] >> 32 & 0xffff, 0xffff);
    nic.inject(1, Inject::NoEnd(1));
    a.send(&frame(2, 1, 60));
    assert_eq!(b.descriptor(RX_RING, 1)[1] & 3, 1);
    nic.inject(1, Inject::NoDone(true));
    a.send(&frame(2, 1, 60));
    assert_eq!(b.descriptor(RX_RING, 2)[1], 0);
    nic.inject(0, Inject::NoDone(true));
    a.send(&frame(9, 1, 60));
    assert!(!a.done(3));
    nic.inject(1, Inject::CountersNearWrap);
    nic.inject(1, Inject::NoDone(false));
    b.rx_next = 3;
    for _ in 0..3 {
        a.send(&frame(2, 1, 60));
    }
    assert_eq!(b.read(0x101c), 1, "32 bits");
    assert_eq!((b.read(0x1024), b.read(0x1020)), (0, 80), "36 bits");
}

#[test]
fn the_oldest_protocol_is_enough_for_a_small_pf() {
    let config = Config {
        pf: PfPolicy {
            api: Api::V10,
            ..PfPolicy::default()
        },
        ..Config::for_tests(vec![VfPolicy::default()])
    };
    let a = Bare::open(&Nic::new(config), 0);
    a.ask(&[1]).unwrap();
    assert_eq!(a.ask(&[8, 2]).unwrap()[0], 0x6000_0008);
    assert_eq!(a.ask(&[8, 0]).unwrap()[0], 0xa000_0008);
    assert_eq!(a.ask(&[5, 1518]).unwrap()[0], 0xa000_0005);
}
