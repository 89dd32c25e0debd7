//! Ring arithmetic: whatever the order of pushing, publishing, lending and giving back, frames arrive whole, once and in order.

use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;
use vfio_pmd::tx::TxError;

#[derive(Clone, Debug)]
enum Step {
    Push(Vec<u16>),
    Publish,
    Device(u8),
    Take { lend: usize, back: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => prop::collection::vec(prop_oneof![8 => 60u16..200, 1 => 200u16..9014], 1..70)
            .prop_map(Step::Push),
        2 => Just(Step::Publish),
        2 => (1u8..4).prop_map(Step::Device),
        3 => (1usize..80, 0usize..80).prop_map(|(lend, back)| Step::Take { lend, back }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn frames_arrive_whole_once_and_in_order(
        steps in prop::collection::vec(step(), 1..120), ring in prop_oneof![Just(128u32), Just(256)]
    ) {
        let nic = nic();
        nic.set_port_policy(|port| port.mtu = 9000);
        let options = Options { rx_ring: ring, tx_ring: ring, max_frame: 9014, ..Options::default() };
        let mut a = End::new(&nic, 0, &options);
        let mut b = End::new(&nic, 1, &options);
        let mut expected: VecDeque<Vec<u8>> = VecDeque::new();
        let (mut number, mut sent, mut got) = (0, 0, 0);
        for step in steps.into_iter().chain([Step::Publish, Step::Device(255), Step::Take { lend: 64, back: 64 }]) {
            match step {
                Step::Push(lengths) => for len in lengths {
                    let bytes = frame(B, A, len.into(), number);
                    match a.tx.push_bytes(&bytes) {
                        Ok(()) => expected.push_back(bytes),
                        Err(error) => prop_assert_eq!(error, TxError::Full),
                    }
                    sent += 1;
                    number += 1;
                },
                Step::Publish => a.tx.publish(),
                Step::Device(turns) => (0..turns).for_each(|_| { nic.step(); }),
                Step::Take { lend, back } => {
                    let frames = b.rx.lend(lend);
                    let count = frames.count().min(back);
                    for frame in frames.iter().take(count) {
                        let bytes = bytes(&frame);
                        // The device drops what finds no free descriptors, never anything else.
                        while expected.front().is_some_and(|next| *next != bytes) {
                            expected.pop_front();
                        }
                        prop_assert!(expected.pop_front().is_some(), "a frame nobody sent, or twice");
                        got += 1;
                    }
                    b.rx.give_back(count);
                }
            }
        }
        let drops = nic.drops(1);
        let sent_by_device = nic.counters(0).tx_frames;
        prop_assert!(sent_by_device <= sent);
        let waiting = b.receive().len() as u64;
        prop_assert_eq!(got + waiting + drops.no_descriptors, sent_by_device);
        drop((a, b));
        clean(&nic);
    }
}

#[test]
fn rings_of_every_size_carry_more_frames_than_their_indices_count() {
    for ring in [128, 512, 4096] {
        let nic = nic();
        let options = Options {
            rx_ring: ring,
            tx_ring: ring,
            ..Options::default()
        };
        let mut a = End::new(&nic, 0, &options);
        let mut b = End::new(&nic, 1, &options);
        let mut next = 0;
        // Several times round, with bursts that do not divide the ring.
        for _ in 0..(4 * ring / 61 + 3) {
            for number in next..next + 61 {
                a.tx.push_bytes(&frame(B, A, 64, number)).unwrap();
            }
            a.tx.publish();
            nic.settle();
            let got = b.receive();
            let want: Vec<_> = (next..next + 61).map(|n| frame(B, A, 64, n)).collect();
            assert_eq!(got, want);
            next += 61;
        }
        drop((a, b));
        clean(&nic);
    }
}

#[test]
fn a_full_receive_ring_loses_frames_and_no_descriptor() {
    let nic = nic();
    let options = Options {
        rx_ring: 128,
        ..Options::default()
    };
    let mut a = End::new(&nic, 0, &Options::default());
    let mut b = End::new(&nic, 1, &options);
    for round in 0..5 {
        for number in 0..300 {
            a.send(&nic, &frame(B, A, 64, number));
        }
        assert_eq!(b.receive().len(), 127, "round {round}");
        assert_eq!(nic.drops(1).no_descriptors, 173 * (round + 1));
    }
    drop((a, b));
    clean(&nic);
}
