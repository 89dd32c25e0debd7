//! The model as a driver sees it, driven register by register.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vf_model::{Api, Config, Inject, Misuse, Nic, PfPolicy, VfPolicy, Wire};

/// Where the test's memory appears to the device.
const BASE: u64 = 0x10_0000;
const MEMORY: u64 = 1 << 20;
const RING: u32 = 64;
// Places in that memory.
const RX_RING: u64 = 0;
const TX_RING: u64 = 0x1000;
const RX_BUFFERS: u64 = 0x10000;
const TX_BUFFERS: u64 = 0x80000;

/// The smallest driver: one queue each way, registers written by number.
struct Bare {
    nic: Arc<Nic>,
    vf: usize,
    memory: OwnedFd,
    rx_next: u32,
    tx_next: u32,
}

impl Bare {
    fn open(nic: &Arc<Nic>, vf: usize) -> Bare {
        let memory = memfd_create("bare", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, MEMORY).unwrap();
        nic.map(vf, &memory, 0, MEMORY, BASE, true).unwrap();
        let bare = Bare {
            nic: Arc::clone(nic),
            vf,
            memory,
            rx_next: 0,
            tx_next: 0,
        };
        bare.write(0x000, 1 << 26);
        bare
    }

    fn read(&self, offset: u32) -> u32 {
        self.nic.read(self.vf, offset)
    }

    fn write(&self, offset: u32, value: u32) {
        self.nic.write(self.vf, offset, value);
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        assert_eq!(
            rustix::io::pwrite(&self.memory, bytes, at).unwrap(),
            bytes.len()
        );
    }

    fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(
            rustix::io::pread(&self.memory, &mut bytes, at).unwrap(),
            len
        );
        bytes
    }

    fn descriptor(&self, ring: u64, index: u32) -> [u64; 2] {
        let bytes = self.peek(ring + u64::from(index) * 16, 16);
        [0, 8].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
    }

    fn put_descriptor(&self, ring: u64, index: u32, words: [u64; 2]) {
        self.poke(
            ring + u64::from(index) * 16,
            &words.map(u64::to_le_bytes).concat(),
        );
    }

    /// A message in the old manner; the answer's words.
    fn ask(&self, words: &[u32]) -> Option<Vec<u32>> {
        self.write(0x2fc, 4);
        if self.read(0x2fc) & 4 == 0 {
            return None;
        }
        for (at, word) in words.iter().enumerate() {
            self.write(0x200 + 4 * at as u32, *word);
        }
        self.write(0x2fc, 1);
        (0..100).find(|_| {
            self.nic.advance(Duration::from_millis(1));
            self.read(0x2fc) & 0x10 != 0
        })?;
        Some((0..16).map(|at| self.read(0x200 + 4 * at)).collect())
    }

    /// Reset, version, address and frame size, as every driver does.
    fn agree(&self, mac: u8) {
        self.ask(&[1]).unwrap();
        assert_eq!(self.ask(&[8, 5]).unwrap()[0], 0xa000_0008);
        let low = u32::from_le_bytes([2, 0, 0, 0]);
        assert_eq!(
            self.ask(&[2, low, u32::from_le_bytes([0, mac, 0, 0])])
                .unwrap()[0],
            0xa000_0002
        );
        assert_eq!(self.ask(&[5, 1518]).unwrap()[0], 0xa000_0005);
    }

    fn start(&self, strip: bool) {
        let at = (BASE + RX_RING) as u32;
        for (offset, value) in [
            (0x1000, at),
            (0x1004, 0),
            (0x1008, RING * 16),
            (0x1010, 0),
            (0x1018, 0),
            (0x1014, 1 << 25 | 1),
            (0x300, 0),
        ] {
            self.write(offset, value);
        }
        for index in 0..RING {
            self.put_descriptor(
                RX_RING,
                index,
                [BASE + RX_BUFFERS + u64::from(index) * 2048, 0],
            );
        }
        self.write(0x1028, 1 << 25 | if strip { 1 << 30 } else { 0 });
        self.write(0x1018, RING - 1);
        let at = (BASE + TX_RING) as u32;
        for (offset, value) in [
            (0x2000, at),
            (0x2004, 0),
            (0x2008, RING * 16),
            (0x2010, 0),
            (0x2018, 0),
            (0x2038, 0),
            (0x203c, 0),
            (0x2028, 1 << 25),
        ] {
            self.write(offset, value);
        }
    }

    /// Sends pieces as one frame with these options in its data descriptors.
    fn send_as(&mut self, pieces: &[&[u8]], options: u64, payload: usize) {
        for (at, piece) in pieces.iter().enumerate() {
            let place = TX_BUFFERS + u64::from(self.tx_next) * 4096;
            self.poke(place, piece);
            let end = if at + 1 == pieces.len() {
                1 << 24 | 1 << 27
            } else {
                0
            };
            let word = piece.len() as u64
                | 3 << 20
                | 1 << 25
                | 1 << 29
                | end
                | options
                | (payload as u64) << 46;
            self.put_descriptor(TX_RING, self.tx_next, [BASE + place, word]);
            self.tx_next = (self.tx_next + 1) % RING;
        }
        self.write(0x2018, self.tx_next);
        self.nic.settle();
    }

    fn send(&mut self, frame: &[u8]) {
        self.send_as(&[frame], 0, frame.len());
    }

    fn context(&mut self, words: [u64; 2]) {
        self.put_descriptor(TX_RING, self.tx_next, words);
        self.tx_next = (self.tx_next + 1) % RING;
    }

    /// The next received frame with its status word; its buffer goes back to the device.
    fn receive(&mut self) -> Option<(Vec<u8>, u64)> {
        let mut frame = Vec::new();
        loop {
            let [_, status] = self.descriptor(RX_RING, self.rx_next);
            if status & 1 == 0 {
                assert!(frame.is_empty(), "a frame without an end");
                return None;
            }
            let len = (status >> 32 & 0xffff) as usize;
            let place = RX_BUFFERS + u64::from(self.rx_next) * 2048;
            frame.extend(self.peek(place, len));
            self.put_descriptor(RX_RING, self.rx_next, [BASE + place, 0]);
            self.write(0x1018, self.rx_next);
            self.rx_next = (self.rx_next + 1) % RING;
            if status & 2 != 0 {
                return Some((frame, status));
            }
        }
    }

    fn done(&self, index: u32) -> bool {
        self.descriptor(TX_RING, index)[1] >> 32 & 1 == 1
    }

    fn assert_clean(&self) {
        let report = self.nic.report(self.vf);
        assert!(
            report.faults.is_empty() && report.misuses.is_empty(),
            "{report:x?}"
        );
    }
}

/// Two VFs that have agreed with the PF and run, with the MACs 02:..:01 and 02:..:02, and the other end of their wire.
fn pair(policy: VfPolicy) -> (Arc<Nic>, Bare, Bare, Wire) {
    let nic = Nic::new(Config::for_tests(vec![policy.clone(), policy]));
    let (near, far) = Wire::pair().unwrap();
    nic.attach_wire(near);
    let drivers = [0, 1].map(|vf| {
        let bare = Bare::open(&nic, vf);
        bare.agree(vf as u8 + 1);
        bare.start(false);
        bare
    });
    let [a, b] = drivers;
    (nic, a, b, far)
}

fn frame(to: u8, from: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    frame.extend((14..len).map(|n| n as u8));
    frame
}

fn from_wire(wire: &Wire) -> Option<Vec<u8>> {
    wire.receive(&mut [0; 10000]).map(<[u8]>::to_vec)
}

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
