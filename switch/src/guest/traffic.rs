//! Frames that can be checked: who sent them, as which one, when, and whether a bit changed on the way.
//!
//! A frame: Ethernet header (14 bytes, EtherType 0x88b5, the one for local experiments: IEEE 802 §9.2.3), the low 16 bits of its length, flow (u32),
//! a check over all of this (u32), sequence number (u64) and TSC stamp (u64); then a part of one fixed pseudo-random
//! string, chosen by the flow. So a sender whose buffers hold frames already rewrites 24 bytes to send one again.

use std::collections::VecDeque;
use std::sync::OnceLock;

use hdrhistogram::Histogram;

use super::frame::{Frame, Slot};

/// Bytes before the pattern; the shortest frame.
pub const HEAD: usize = 40;
/// The longest frame that can be built.
pub const FRAME_MAX: usize = 65_535;
/// Windows of the pattern that payloads are cut from: a prime, so that neighbours differ.
pub const WINDOWS: usize = 4093;
/// Gaps remembered per flow, to tell a late frame from a duplicate.
const GAPS_MAX: usize = 64;
/// EtherType of our frames, as it stands in a word read little end first.
pub const ETHERTYPE: u16 = u16::from_be_bytes([0xb5, 0x88]);

/// A MAC address.
pub type Mac = [u8; 6];

/// The address of station `number`: locally administered, unicast.
pub fn station(number: u32) -> Mac {
    let [a, b, c, d] = number.to_be_bytes();
    [0x02, 0x52, a, b, c, d]
}

/// The fixed pseudo-random string all payloads are cut from.
fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        (0..(FRAME_MAX + WINDOWS).div_ceil(8))
            .flat_map(|_| {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                mix(state).to_le_bytes()
            })
            .collect()
    })
}

/// SplitMix64's finalizer.
#[inline]
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What follows the head of a frame of `len` bytes ([`HEAD`] to [`FRAME_MAX`]) whose payload is cut from `window`.
pub fn payload(window: u32, len: usize) -> &'static [u8] {
    let from = window as usize % WINDOWS;
    &pattern()[from..from + len - HEAD]
}

/// Covers both addresses, length, flow, sequence and stamp.
#[inline]
pub fn check(first: u64, second: u64, flow: u32, sequence: u64, stamp: u64) -> u32 {
    let sum = first
        .wrapping_mul(0xff51_afd7_ed55_8ccd)
        .wrapping_add(second.wrapping_mul(0xc4ce_b9fe_1a85_ec53))
        .wrapping_add(u64::from(flow).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        ^ sequence.wrapping_mul(0xd6e8_feb8_6659_fd93)
        ^ stamp.wrapping_mul(0xa076_1d64_78bd_642f);
    (sum ^ (sum >> 32)) as u32
}

/// A stream of frames from one station to another, all of one length.
#[derive(Clone, Debug)]
pub struct Flow {
    id: u32,
    len: usize,
    first: u64,
    second: u64,
    sequence: u64,
}

impl Flow {
    /// Frames of `len` bytes ([`HEAD`] to [`FRAME_MAX`]; others are brought into that range) from `source` to `destination`.
    pub fn new(id: u32, source: Mac, destination: Mac, len: usize) -> Flow {
        let len = len.clamp(HEAD, FRAME_MAX);
        let mut header = [0; 16];
        header[..6].copy_from_slice(&destination);
        header[6..12].copy_from_slice(&source);
        header[12..14].copy_from_slice(&ETHERTYPE.to_le_bytes());
        header[14..].copy_from_slice(&(len as u16).to_le_bytes());
        let whole = u128::from_le_bytes(header);
        Flow {
            id,
            len,
            first: whole as u64,
            second: (whole >> 64) as u64,
            sequence: 0,
        }
    }

    /// Frames sent so far; the next one has this number.
    pub fn sent(&self) -> u64 {
        self.sequence
    }

    /// Takes numbers back: the last `count` frames were not sent after all.
    pub fn unsend(&mut self, count: u64) {
        self.sequence -= count;
    }

    /// Length of the frames.
    pub fn frame_len(&self) -> usize {
        self.len
    }

    /// Writes the whole next frame into a buffer.
    pub fn write(&mut self, slot: &mut Slot<'_>, stamp: u64) -> usize {
        slot.write(HEAD, payload(self.id, self.len));
        slot.put(0, self.first);
        slot.put(8, self.second);
        self.renew(slot, stamp)
    }

    /// Makes the frame that an earlier [`Flow::write`] left in this buffer the next one.
    #[inline]
    pub fn renew(&mut self, slot: &mut Slot<'_>, stamp: u64) -> usize {
        let check = check(self.first, self.second, self.id, self.sequence, stamp);
        slot.put(16, u64::from(check) << 32 | u64::from(self.id));
        slot.put(24, self.sequence);
        slot.put(32, stamp);
        self.sequence += 1;
        self.len
    }
}

/// What a receiver found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Tally {
    /// Frames with a right check, duplicates included.
    pub received: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Sequence numbers skipped and not seen since.
    pub missing: u64,
    /// Frames seen before.
    pub duplicated: u64,
    /// Frames that came after a later one.
    pub reordered: u64,
    /// Frames of ours with a wrong check, length or content.
    pub corrupted: u64,
    /// Frames that are not ours, or of a flow not expected here.
    pub foreign: u64,
    /// Frames whose whole content was compared.
    pub verified: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.received += other.received;
        self.bytes += other.bytes;
        self.missing += other.missing;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
        self.corrupted += other.corrupted;
        self.foreign += other.foreign;
        self.verified += other.verified;
    }
}

/// One flow as its receiver knows it: the next number, and the gaps before it.
#[derive(Clone, Debug, Default)]
struct Seen {
    next: u64,
    gaps: VecDeque<(u64, u64)>,
}

impl Seen {
    #[cold]
    fn jump(&mut self, sequence: u64, tally: &mut Tally) {
        if sequence > self.next {
            tally.missing += sequence - self.next;
            if self.gaps.len() == GAPS_MAX {
                self.gaps.pop_front();
            }
            self.gaps.push_back((self.next, sequence));
            self.next = sequence + 1;
            return;
        }
        let gap = self
            .gaps
            .iter()
            .position(|&(from, to)| (from..to).contains(&sequence));
        let Some(gap) = gap else {
            tally.duplicated += 1;
            return;
        };
        let (from, to) = self.gaps.remove(gap).unwrap_or_default();
        for part in [(sequence + 1, to), (from, sequence)] {
            if part.0 < part.1 {
                self.gaps.insert(gap, part);
            }
        }
        tally.missing -= 1;
        tally.reordered += 1;
    }
}

/// The receiving end of flows: checks every frame, and keeps the latencies.
pub struct Checker {
    first_flow: u32,
    flows: Vec<Seen>,
    verify_every: u64,
    until_verify: u64,
    tally: Tally,
    latency: Histogram<u64>,
    run: (u64, u64),
}

impl Checker {
    /// Expects flows `first..first + count`. Compares the whole content of every `verify_every`-th frame (1: of all), the
    /// head of every frame.
    pub fn new(first: u32, count: u32, verify_every: u64) -> Checker {
        // 1 cycle to 2^40 (minutes), two digits: percentiles to 1 %.
        let latency =
            Histogram::new_with_bounds(1, 1 << 40, 2).expect("constant bounds are in order");
        Checker {
            first_flow: first,
            flows: vec![Seen::default(); count as usize],
            verify_every,
            until_verify: 1,
            tally: Tally::default(),
            latency,
            run: (0, 0),
        }
    }

    /// Checks a frame that was received at `now` (TSC).
    #[inline]
    pub fn check(&mut self, frame: &Frame<'_>, now: u64) {
        let Some([first, second, third, sequence, stamp]) = frame.words::<5>() else {
            self.tally.foreign += 1;
            return;
        };
        let (flow, sum) = (third as u32, (third >> 32) as u32);
        let Some(seen) = self
            .flows
            .get_mut(flow.wrapping_sub(self.first_flow) as usize)
        else {
            self.tally.foreign += 1;
            return;
        };
        if (second >> 32) as u16 != ETHERTYPE {
            self.tally.foreign += 1;
            return;
        }
        let len = frame.len();
        if sum != check(first, second, flow, sequence, stamp) || (second >> 48) as u16 != len as u16
        {
            self.tally.corrupted += 1;
            return;
        }
        self.until_verify -= 1;
        if self.until_verify == 0 {
            self.until_verify = self.verify_every.max(1);
            self.tally.verified += 1;
            if !frame.matches(HEAD, payload(flow, len)) {
                self.tally.corrupted += 1;
                return;
            }
        }
        self.tally.received += 1;
        self.tally.bytes += len as u64;
        if sequence == seen.next {
            seen.next += 1;
        } else {
            seen.jump(sequence, &mut self.tally);
        }
        let cycles = now.saturating_sub(stamp).max(1);
        if cycles == self.run.0 {
            self.run.1 += 1;
        } else {
            self.record();
            self.run = (cycles, 1);
        }
    }

    /// The frames of one sender's burst have one stamp, those of one receiver's burst one arrival: recorded as one.
    #[inline]
    fn record(&mut self) {
        if self.run.1 > 0 {
            self.latency.saturating_record_n(self.run.0, self.run.1);
            self.run.1 = 0;
        }
    }

    /// What was found so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Latencies in TSC cycles since they were last taken.
    pub fn take_latency(&mut self) -> Histogram<u64> {
        self.record();
        let empty = Histogram::new_from(&self.latency);
        std::mem::replace(&mut self.latency, empty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::frame::tests::Bytes;

    const LEN: usize = 100;

    fn flow() -> Flow {
        Flow::new(7, station(1), station(2), LEN)
    }

    fn next(flow: &mut Flow) -> Bytes {
        let mut bytes = Bytes::new(LEN);
        flow.write(&mut bytes.slot(), 1000);
        bytes
    }

    fn frames(count: usize) -> Vec<Bytes> {
        let mut flow = flow();
        (0..count).map(|_| next(&mut flow)).collect()
    }

    fn received(order: &[usize]) -> Tally {
        let frames = frames(16);
        let mut checker = Checker::new(7, 1, 1);
        for &index in order {
            checker.check(&frames[index].frame(), 1500);
        }
        checker.tally()
    }

    #[test]
    fn frames_in_order_are_received_and_nothing_else() {
        let tally = received(&[0, 1, 2, 3]);
        assert_eq!(
            tally,
            Tally {
                received: 4,
                bytes: 4 * LEN as u64,
                verified: 4,
                ..Tally::default()
            }
        );
    }

    #[test]
    fn loss_reordering_and_duplication_are_told_apart() {
        let tally = received(&[0, 4, 2, 2, 1, 5]);
        assert_eq!(
            (tally.missing, tally.reordered, tally.duplicated),
            (1, 2, 1)
        );
        let tally = received(&[0, 1, 1, 2]);
        assert_eq!(
            (tally.missing, tally.reordered, tally.duplicated),
            (0, 0, 1)
        );
        let tally = received(&[3, 0, 1, 2]);
        assert_eq!(
            (tally.missing, tally.reordered, tally.duplicated),
            (0, 3, 0)
        );
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        for at in 0..LEN {
            let frame = frames(1).remove(0);
            frame.flip(at);
            let mut checker = Checker::new(7, 1, 1);
            checker.check(&frame.frame(), 1500);
            let tally = checker.tally();
            assert_eq!(tally.received, 0, "byte {at}");
            assert_eq!(tally.corrupted + tally.foreign, 1, "byte {at}");
        }
    }

    #[test]
    fn a_frame_cut_short_or_in_pieces_is_still_judged_rightly() {
        let mut frame = frames(1).remove(0);
        for cut in 1..LEN {
            let mut checker = Checker::new(7, 1, 1);
            checker.check(&frame.cut(&[cut]), 1500);
            assert_eq!(checker.tally().received, 1, "cut at {cut}");
            let mut checker = Checker::new(7, 1, 1);
            checker.check(&frame.short(cut), 1500);
            assert_eq!(checker.tally().received, 0, "short of {cut}");
        }
    }

    #[test]
    fn a_buffer_sent_again_carries_the_next_number() {
        let mut flow = flow();
        let mut bytes = next(&mut flow);
        let mut checker = Checker::new(7, 1, 1);
        checker.check(&bytes.frame(), 1500);
        flow.renew(&mut bytes.slot(), 1400);
        checker.check(&bytes.frame(), 1500);
        assert_eq!((checker.tally().received, checker.tally().missing), (2, 0));
        let latency = checker.take_latency();
        assert_eq!(
            (latency.len(), latency.max() / 10, latency.min() / 10),
            (2, 50, 10)
        );
    }

    #[test]
    fn stations_are_unicast_and_distinct() {
        assert_eq!(station(1)[0] & 3, 2);
        assert_ne!(station(1), station(1 << 24));
    }
}
