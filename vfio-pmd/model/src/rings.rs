//! The rings: descriptors in guest memory, advanced format.

use crate::dma::DmaFault;
use crate::inject::spend;
use crate::packet::{Context, Offload, parse};
use crate::regs::{
    DCTL, HEAD, PSRTYPE, PSRTYPE_RQPL, QUEUES, RXDCTL_VME, SRRCTL, SRRCTL_BSIZE, TDWBAH, TDWBAL,
};
use crate::report::Misuse;
use crate::vf::{Ring, Vf, queue_base};

// Receive write-back, second word (status and error, length, VLAN tag).
const RX_DD: u64 = 1 << 0;
const RX_EOP: u64 = 1 << 1;
const RX_VP: u64 = 1 << 3;
const RX_UDPCS: u64 = 1 << 4;
const RX_L4CS: u64 = 1 << 5;
const RX_IPCS: u64 = 1 << 6;
const RX_LB: u64 = 1 << 18;
const RX_TCPE: u64 = 1 << 30;
const RX_IPE: u64 = 1 << 31;

// Transmit, second word: DTALEN, command; and above it POPTS, PAYLEN.
const TX_TYPE: u64 = 15 << 20;
const TX_CONTEXT: u64 = 2 << 20;
const TX_DATA: u64 = 3 << 20;
const TX_EOP: u64 = 1 << 24;
const TX_RS: u64 = 1 << 27;
const TX_DEXT: u64 = 1 << 29;
const TX_VLE: u64 = 1 << 30;
const TX_TSE: u64 = 1 << 31;
const TX_IXSM: u64 = 1 << 40;
const TX_TXSM: u64 = 1 << 41;
/// Data descriptors of one frame.
const CHAIN_MAX: u32 = 40;

/// What became of a frame on its way to a receive ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    Done,
    NoDescriptors,
    QueueOff,
}

/// A frame taken from a transmit ring.
pub(crate) enum Taken {
    /// Its bytes are in the buffer.
    Frame(Offload),
    /// A frame the device throws away.
    Malformed,
    /// Nothing that is whole.
    Nothing,
}

impl Vf {
    /// Writes a frame into the ring RSS chooses. `from_vf`: it came from another VF of the port.
    pub(crate) fn receive(&mut self, frame: &[u8], from_vf: bool, pf_queues: u32) -> Delivery {
        let parsed = parse(frame);
        let (rss_type, hash) = parsed.rss(frame);
        let bits = self.get(PSRTYPE) >> PSRTYPE_RQPL;
        // Entry i of the redirection table is queue i modulo the PF's number; PSRTYPE says how many bits of it count.
        let entry = if rss_type == 0 {
            0
        } else {
            (hash & 127) % pf_queues.max(1)
        };
        let queue = (entry & ((1 << bits) - 1)) as usize % QUEUES;
        if !self.runs(false, queue) {
            return Delivery::QueueOff;
        }
        let Some(ring) = self.ring(false, queue) else {
            return Delivery::QueueOff;
        };
        let base = queue_base(false, queue);
        let room = ((self.get(base + SRRCTL) & SRRCTL_BSIZE) * 1024) as usize;
        if room == 0 {
            self.report.misuse(Misuse::NoBuffer { queue });
            return Delivery::QueueOff;
        }
        let tag = crate::packet::be16(frame, 12)
            .filter(|kind| *kind == 0x8100)
            .and_then(|_| crate::packet::be16(frame, 14));
        let strip = self.get(base + DCTL) & RXDCTL_VME != 0;
        let mut status = if from_vf { RX_LB } else { 0 };
        let mut owned = Vec::new();
        let mut bytes = frame;
        if let Some(tag) = tag.filter(|_| strip) {
            status |= RX_VP | u64::from(tag) << 48;
            owned.extend_from_slice(&frame[..12]);
            owned.extend_from_slice(&frame[16..]);
            bytes = &owned;
        }
        status |= checksum_status(frame, &parsed);
        let word = u64::from(rss_type | parsed.packet_type()) | u64::from(hash) << 32;
        match self.fill(queue, ring, room, bytes, status, word) {
            Ok(Delivery::Done) => {}
            Ok(other) => return other,
            Err(fault) => {
                self.fault(false, queue, fault);
                return Delivery::QueueOff;
            }
        }
        self.counters.rx_frames += 1;
        self.counters.rx_bytes += frame.len() as u64;
        self.counters.rx_multicast += u64::from(frame[0] & 1 == 1 && frame[..6] != [0xff; 6]);
        self.interrupt_queue(false, queue);
        Delivery::Done
    }

    fn fill(
        &mut self,
        queue: usize,
        mut ring: Ring,
        room: usize,
        bytes: &[u8],
        status: u64,
        word: u64,
    ) -> Result<Delivery, DmaFault> {
        let need = bytes.len().div_ceil(room) as u32;
        if ring.pending() < need {
            return Ok(Delivery::NoDescriptors);
        }
        let forged = if spend(&mut self.injected.length.0) {
            Some(self.injected.length.1)
        } else {
            None
        };
        let endless = spend(&mut self.injected.no_end);
        for (at, part) in bytes.chunks(room).enumerate() {
            let descriptor = ring.descriptor(ring.head);
            // The second word is not read: Linux leaves the last write-back in it.
            let [buffer, _] = self.dma.descriptor(descriptor)?;
            self.dma.write(buffer, part)?;
            let last = at as u32 + 1 == need;
            let length = forged.unwrap_or(part.len() as u16);
            // All but DD and the length stand only in the last descriptor of a frame.
            let end = if last && !endless { RX_EOP | status } else { 0 };
            if !self.injected.no_done {
                let second = RX_DD | end | u64::from(length) << 32;
                self.dma
                    .write_back(descriptor, [if last { word } else { 0 }, second])?;
            }
            ring.head = ring.next(ring.head);
            self.set(queue_base(false, queue) + HEAD, ring.head);
        }
        Ok(Delivery::Done)
    }

    /// Takes the next whole frame from a transmit ring into `buffer`.
    pub(crate) fn take(&mut self, queue: usize, buffer: &mut Vec<u8>) -> Taken {
        if !self.runs(true, queue) {
            return Taken::Nothing;
        }
        loop {
            let Some(ring) = self.ring(true, queue) else {
                return Taken::Nothing;
            };
            if ring.pending() == 0 {
                return Taken::Nothing;
            }
            buffer.clear();
            match self.take_chain(queue, ring, buffer) {
                Ok(Some(Chain::Context)) => {}
                Ok(Some(Chain::Frame(offload))) => return Taken::Frame(offload),
                Ok(Some(Chain::Malformed)) => return Taken::Malformed,
                Ok(None) => return Taken::Nothing,
                Err(fault) => {
                    self.fault(true, queue, fault);
                    return Taken::Nothing;
                }
            }
        }
    }

    /// One context, or the descriptors of one frame. None: the frame's end has not been handed over yet, or the queue has stopped.
    fn take_chain(
        &mut self,
        queue: usize,
        ring: Ring,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Chain>, DmaFault> {
        let mut at = ring.head;
        let mut first = None;
        for count in 1..=ring.pending() {
            let [address, word] = self.dma.descriptor(ring.descriptor(at))?;
            if word & TX_DEXT == 0 || !matches!(word & TX_TYPE, TX_CONTEXT | TX_DATA) {
                self.report.misuse(Misuse::DescriptorType { queue, word });
                self.stopped[1][queue] = true;
                return Ok(None);
            }
            if word & TX_TYPE == TX_CONTEXT {
                if first.is_some() {
                    self.report.misuse(Misuse::DescriptorType { queue, word });
                }
                let index = (word >> 36 & 1) as usize;
                self.tx[queue].contexts[index] = context(address, word);
                self.complete(queue, ring, ring.head, ring.next(at))?;
                return Ok(Some(Chain::Context));
            }
            let first = *first.get_or_insert(word);
            let len = (word & 0xffff) as usize;
            let start = buffer.len();
            buffer.resize(start + len, 0);
            self.dma.read(address, &mut buffer[start..])?;
            at = ring.next(at);
            if word & TX_EOP != 0 {
                if count > CHAIN_MAX {
                    self.report.misuse(Misuse::ChainTooLong { queue });
                }
                let taken = self.check(queue, first, buffer.len());
                self.complete(queue, ring, ring.head, at)?;
                return Ok(Some(taken));
            }
        }
        Ok(None)
    }

    fn check(&mut self, queue: usize, word: u64, found: usize) -> Chain {
        let said = (word >> 46) as u32;
        let context = self.tx[queue].contexts[(word >> 36 & 1) as usize];
        let segment = word & TX_TSE != 0;
        let headers = if segment {
            context.mac_len + context.ip_len + context.l4_len
        } else {
            0
        };
        if said as usize + headers != found {
            self.report.misuse(Misuse::PayloadLength {
                queue,
                said,
                found: found as u32,
            });
        }
        if found < 17 {
            return Chain::Malformed;
        }
        Chain::Frame(Offload {
            ip_checksum: word & TX_IXSM != 0,
            l4_checksum: word & TX_TXSM != 0,
            segment,
            vlan: (word & TX_VLE != 0).then_some(context.vlan),
            context,
        })
    }

    /// Marks the descriptors from `from` up to `to` as done where the driver asked for it, and moves the head.
    fn complete(&mut self, queue: usize, ring: Ring, from: u32, to: u32) -> Result<(), DmaFault> {
        let base = queue_base(true, queue);
        let (low, high) = (self.get(base + TDWBAL), self.get(base + TDWBAH));
        let mut at = from;
        let mut report = false;
        while at != to {
            let place = ring.descriptor(at);
            let [_, word] = self.dma.descriptor(place)?;
            if word & TX_RS != 0 {
                report = true;
                if low & 1 == 0 && !self.injected.no_done {
                    self.dma.store_word(place + 12, 1)?;
                }
            }
            at = ring.next(at);
        }
        self.set(base + HEAD, to);
        if report && low & 1 == 1 && !self.injected.no_done {
            self.dma
                .store_word(u64::from(high) << 32 | u64::from(low & !3), to)?;
        }
        if report {
            self.interrupt_queue(true, queue);
        }
        Ok(())
    }

    /// Transmit queues that have something to do.
    pub(crate) fn wants_transmit(&self, queue: usize) -> bool {
        let base = queue_base(true, queue);
        self.runs(true, queue)
            && self
                .bells
                .tail(true, queue)
                .load(std::sync::atomic::Ordering::Acquire)
                != self.get(base + HEAD)
    }
}

enum Chain {
    Context,
    Frame(Offload),
    Malformed,
}

fn checksum_status(frame: &[u8], parsed: &crate::packet::Parsed) -> u64 {
    let mut status = 0;
    if let Some(good) = parsed.ip_checksum_good(frame) {
        status |= RX_IPCS | if good { 0 } else { RX_IPE };
    }
    if let Some(good) = parsed.l4_checksum_good(frame) {
        status |= RX_L4CS | if good { 0 } else { RX_TCPE };
        status |= if parsed.protocol == 17 { RX_UDPCS } else { 0 };
    }
    status
}

fn context(first: u64, second: u64) -> Context {
    Context {
        ip_len: (first & 0x1ff) as usize,
        mac_len: (first >> 9 & 0x7f) as usize,
        vlan: (first >> 16) as u16,
        ipv4: second & 0x400 != 0,
        protocol: match second >> 11 & 3 {
            0 => 17,
            1 => 6,
            _ => 132,
        },
        l4_len: (second >> 40 & 0xff) as usize,
        mss: (second >> 48 & 0xffff) as usize,
    }
}
