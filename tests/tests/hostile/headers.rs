//! H63 to H70: virtio-net headers, none of which the switch believes.

use std::time::Instant;

use anyhow::{Result, ensure};
use ringway::guest::{Layout, Options};
use testkit::topology::frame;

use super::api::PATIENCE;
use super::case::Case;
use super::rig::friend_mac;
use super::rings::{Hand, lay, room};

/// Checksum to complete, any GSO type, lengths beyond the frame: all at the sender's pleasure.
#[test]
pub(super) fn h63_to_h68_whatever_a_sender_writes_there_the_receiver_sees_zeros() -> Result<()> {
    Case::of("H63-H68").at_once(1).run(|x| {
        let options = Options {
            in_order: false,
            ..x.options()
        };
        let mut hand = Hand::new(&options);
        let mut wild = x.attach(options)?;
        let memory = wild.memory()?;
        let bytes = frame(friend_mac(), x.mac(), &x.any().to_le_bytes());
        let mut header = [0u8; 12];
        header[..8].copy_from_slice(&x.any().to_le_bytes());
        header[8..].copy_from_slice(&(x.any() as u32).to_le_bytes());
        let piece = lay(&memory, room(&memory), header, &bytes);
        x.with_friend(|guest, friend| {
            let raw = friend.rx.raw();
            let (mut next, end) = (raw.used_idx(), Instant::now() + PATIENCE);
            hand.post(&mut wild.queues.tx, &[piece]);
            let mut seen = vec![0; 12 + bytes.len()];
            // Others may send to the friend too.
            while seen[12..] != bytes {
                ensure!(Instant::now() < end, "the frame does not come");
                if raw.used_idx() == next {
                    std::thread::yield_now();
                    continue;
                }
                let (id, len) = raw.used(next);
                let (at, ..) = raw.desc(id as u16);
                let there = guest
                    .memory()
                    .is_some_and(|memory| memory.read(at, &mut seen));
                ensure!(there, "{len} bytes at {at:#x}");
                next = next.wrapping_add(1);
            }
            let expected = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
            ensure!(seen[..12] == expected, "a header of {:x?}", &seen[..12]);
            Ok(())
        })?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h69_beyond_a_frame_nothing_is_written_into_its_buffer() -> Result<()> {
    Case::of("H69").run(|x| {
        let options = Options {
            layout: Layout::Split,
            in_order: false,
            ..x.options()
        };
        let mut wild = x.attach(options)?;
        wild.announce(x)?;
        while wild.queues.rx.receive(|_| ()) > 0 {}
        let (memory, raw) = (wild.memory()?, wild.queues.rx.raw());
        let buffers: Vec<u64> = (0..256).map(|slot| raw.desc(slot).0).collect();
        for at in &buffers {
            memory.write(*at, &[0xaa; 2048]);
        }
        let (before, len) = (raw.used_idx(), 60 + x.below(1000) as usize);
        x.gets_frames(1, len)?;
        let end = Instant::now() + PATIENCE;
        // Others flood now and then: the one with this length is ours.
        let at = loop {
            let came = raw.used_idx().wrapping_sub(before);
            let ours = (0..came).map(|n| raw.used(before.wrapping_add(n)));
            if let Some((id, _)) = { ours }.find(|(_, bytes)| *bytes as usize == 12 + len) {
                break raw.desc(id as u16).0;
            }
            ensure!(Instant::now() < end, "the frame does not come");
            std::thread::yield_now();
        };
        let mut bytes = vec![0; 2048];
        memory.read(at, &mut bytes);
        ensure!(
            bytes[12 + len..].iter().all(|byte| *byte == 0xaa),
            "bytes behind the frame were written"
        );
        Ok(())
    })
}
