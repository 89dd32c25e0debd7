//! The driver against a model of its device in the same process: an implementation of the other side that shares nothing with it
//! but the transport. Time is the model's own, so that waits take none.

mod pf;
mod rings;
mod traffic;

use std::sync::Arc;

use vf_model::{Config, InProcess, Nic, VfPolicy};
use vfio_pmd::mailbox::Mac;
use vfio_pmd::rx::RxQueue;
use vfio_pmd::tx::TxQueue;
use vfio_pmd::{Options, QueuePair, Result, Vf};

const A: Mac = [2, 0, 0, 0, 0, 0xA];
const B: Mac = [2, 0, 0, 0, 0, 0xB];

fn policy(mac: Mac) -> VfPolicy {
    VfPolicy {
        mac: Some(mac),
        trusted: true,
        spoof_check: false,
        ..VfPolicy::default()
    }
}

/// Two VFs of one port, whose frames go to one another inside the device.
fn nic() -> Arc<Nic> {
    Nic::new(Config::for_tests(vec![policy(A), policy(B)]))
}

fn open(nic: &Arc<Nic>, vf: usize, options: &Options) -> Result<Vf> {
    Vf::open(InProcess::open(nic, vf).unwrap(), options)
}

/// A VF with one pair of queues.
struct End {
    vf: Vf,
    rx: RxQueue,
    tx: TxQueue,
}

impl End {
    fn new(nic: &Arc<Nic>, vf: usize, options: &Options) -> End {
        let mut vf = open(nic, vf, options).unwrap();
        let QueuePair { rx, tx } = vf.start().unwrap().remove(0);
        End { vf, rx, tx }
    }

    fn send(&mut self, nic: &Nic, frame: &[u8]) {
        self.tx.push_bytes(frame).unwrap();
        self.tx.publish();
        nic.settle();
    }

    /// Takes and gives back all frames that wait; a fault is an empty frame.
    fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let frames = self.rx.lend(64);
            let count = frames.count();
            all.extend(frames.iter().map(|frame| bytes(&frame)));
            if count == 0 {
                return all;
            }
            self.rx.give_back(count);
        }
    }
}

fn bytes(frame: &vfio_pmd::rx::RxFrame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in frame.pieces() {
        let mut part = vec![0; piece.len() as usize];
        assert_eq!(piece.copy_to(&mut part), part.len());
        out.append(&mut part);
    }
    assert_eq!(out.len(), frame.len() as usize);
    out
}

/// A frame from one address to another; its bytes tell its length and number.
fn frame(to: Mac, from: Mac, len: usize, number: u32) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x88, 0xB5], &number.to_be_bytes()].concat();
    frame.extend((18..len).map(|i| (i as u32 * 7 + number) as u8));
    frame.truncate(len.max(18));
    frame
}

fn padded(mut frame: Vec<u8>) -> Vec<u8> {
    frame.resize(frame.len().max(60), 0);
    frame
}

/// What must hold at the end of every test: no rule of the device was broken, and nothing is left mapped.
fn clean(nic: &Nic) {
    for vf in 0..nic.vfs() {
        let report = nic.report(vf);
        assert!(report.faults.is_empty(), "{:x?}", report.faults);
        assert!(report.misuses.is_empty(), "{:x?}", report.misuses);
        assert_eq!(nic.mappings(vf), 0, "VF {vf} left memory mapped");
    }
}
