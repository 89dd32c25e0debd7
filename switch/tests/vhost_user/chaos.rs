//! Messages in any order, and bytes that are none; RINGWAY_SEED repeats them.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::frontend::*;

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
        let (mut honest, memory) = (port.connect(), Memory::dpdk());
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
