//! The model as a driver sees it, driven register by register.

mod frames;
mod golden;
mod states;

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
