//! The generator's frames: streams of numbered, stamped frames from one transmit ring to one port or to all.
//!
//! A frame: Ethernet header (EtherType 0x88b5) with the low 16 bits of its length behind it, flow (20 bits) and window of the payload
//! pattern (12), a check over all of the head (32), sequence number within its stream (48) and stream (16), TSC stamp; then
//! the payload, a piece of one fixed pseudo-random string. A buffer keeps length and payload, so a sender whose buffers are
//! filled once rewrites 40 bytes of one cache line per frame.
//!
//! The flows of a stream (station pairs) take turns in a scattered but fixed order: a stream's sequence number says which flow
//! a frame belongs to, so neither side keeps more than one number per flow, and frames of different flows may overtake each other.

use ringway::guest::Slot;
use ringway::guest::traffic::{ETHERTYPE, HEAD, WINDOWS, check, payload};

/// Bits of the flow in a frame: 1,048,576 flows per stream.
const FLOW_BITS: u32 = 20;
/// The most flows of a stream.
pub(crate) const FLOWS_MAX: u32 = 1_000_000;
const _: () = assert!(FLOWS_MAX <= 1 << FLOW_BITS && WINDOWS <= 1 << (32 - FLOW_BITS));
/// Bits of the sequence number.
const SEQUENCE_BITS: u32 = 48;
/// Stations begin with 02:52, locally administered and unicast.
const STATION: u64 = 0x5202;
const BROADCAST: u64 = 0xffff_ffff_ffff;

/// The address of a station as the low 48 bits of a word read little end first.
#[inline]
pub(crate) fn address(station: u32) -> u64 {
    STATION | u64::from(station.swap_bytes()) << 16
}

/// Where the frames of a stream go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// To one port; its stations begin here.
    Stations(u32),
    /// To all other ports.
    All,
}

/// The order in which the flows of a stream take turns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    flows: u32,
    stride: u32,
}

impl Order {
    pub(crate) fn new(flows: u32) -> Self {
        let flows = flows.clamp(1, FLOWS_MAX);
        // Near the golden section, so that neighbours in time are far apart, and coprime, so that every flow has its turn.
        let mut stride = (f64::from(flows) * 0.618_034) as u32 | 1;
        while gcd(stride, flows) != 1 {
            stride += 2;
        }
        Self {
            flows,
            stride: stride % flows,
        }
    }

    /// The flow after `flow`.
    #[inline]
    fn after(self, flow: u32) -> u32 {
        let next = flow + self.stride;
        if next >= self.flows {
            next - self.flows
        } else {
            next
        }
    }

    /// The flow of frame number `sequence`.
    fn at(self, sequence: u64) -> u32 {
        let round = sequence % u64::from(self.flows);
        (round * u64::from(self.stride) % u64::from(self.flows)) as u32
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The sending end of a stream.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    /// Number of the stream, the same at its receivers.
    pub(crate) id: u16,
    /// First station of the sending port.
    source: u32,
    /// 1: the stations take turns; 0: all frames are from the first.
    step: u32,
    target: Target,
    order: Order,
    flow: u32,
    sequence: u64,
}

impl Stream {
    /// A stream of `flows` flows between stations counted from `source` on and the target's.
    pub(crate) fn new(id: u16, source: u32, target: Target, flows: u32) -> Self {
        Self {
            id,
            source,
            step: 1,
            target,
            order: Order::new(flows),
            flow: 0,
            sequence: 0,
        }
    }

    /// All frames are from the first station.
    pub(crate) fn one_source(&mut self) {
        self.step = 0;
    }

    /// Goes elsewhere from now on.
    pub(crate) fn retarget(&mut self, target: Target, flows: u32) {
        (self.target, self.order, self.flow) = (target, Order::new(flows), 0);
    }

    /// Number of the next frame: so many were sent.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Both words of addresses, EtherType and length of the next frame.
    #[inline]
    fn head(&self, len: usize) -> (u64, u64) {
        let source = address(self.source.wrapping_add(self.flow * self.step));
        let destination = match self.target {
            Target::Stations(first) => address(first.wrapping_add(self.flow)),
            Target::All => BROADCAST,
        };
        let rest = u64::from(ETHERTYPE) << 32 | (len as u64 & 0xffff) << 48;
        (destination | source << 48, source >> 16 | rest)
    }

    /// Makes `slot` the next frame, of `len` bytes, due or sent at `stamp`. `salt` tells ports' payloads apart.
    #[inline]
    pub(crate) fn fill(&mut self, slot: &mut Slot<'_>, len: usize, salt: u32, stamp: u64) -> usize {
        let window = (salt + u32::from(slot.index())) % WINDOWS as u32;
        if slot.sent_len() != len {
            slot.write(HEAD, payload(window, len));
        }
        let (first, second) = self.head(len);
        let place = self.flow | window << FLOW_BITS;
        let number = self.sequence | u64::from(self.id) << SEQUENCE_BITS;
        let sum = check(first, second, place, number, stamp);
        slot.put(0, first);
        slot.put(8, second);
        slot.put(16, u64::from(sum) << 32 | u64::from(place));
        slot.put(24, number);
        slot.put(32, stamp);
        self.sequence += 1;
        self.flow = self.order.after(self.flow);
        len
    }
}

/// A frame's head as its receiver reads it, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) stream: u16,
    pub(crate) flow: u32,
    pub(crate) sequence: u64,
    pub(crate) stamp: u64,
    window: u32,
}

impl Head {
    /// That of a frame of the only flow of the first stream.
    pub(crate) fn numbered(sequence: u64, stamp: u64) -> Self {
        Self {
            stream: 0,
            flow: 0,
            sequence,
            stamp,
            window: 0,
        }
    }
}

/// What a frame's first words say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Ours(Head),
    /// Ours, changed on the way.
    Corrupted,
    Foreign,
}

impl Head {
    /// Judges the first words of a frame of `len` bytes.
    #[inline]
    pub(crate) fn read(words: Option<[u64; 5]>, len: usize) -> Read {
        let Some([first, second, third, number, stamp]) = words else {
            return Read::Foreign;
        };
        if (second >> 32) as u16 != ETHERTYPE {
            return Read::Foreign;
        }
        let place = third as u32;
        let sum = (third >> 32) as u32;
        if sum != check(first, second, place, number, stamp) || (second >> 48) as u16 != len as u16
        {
            return Read::Corrupted;
        }
        Read::Ours(Head {
            stream: (number >> SEQUENCE_BITS) as u16,
            flow: place & ((1 << FLOW_BITS) - 1),
            sequence: number & ((1 << SEQUENCE_BITS) - 1),
            stamp,
            window: place >> FLOW_BITS,
        })
    }

    /// What has to follow the head.
    pub(crate) fn payload(&self, len: usize) -> &'static [u8] {
        payload(self.window, len)
    }
}

/// Gaps remembered per receiver and stream, to tell a late frame from a duplicate.
const GAPS_MAX: usize = 16_384;

/// What one frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The next one of its flow, after so many that are missing until now.
    Next { skipped: u64 },
    /// Came after a later one of its flow.
    Late,
    /// Was here before.
    Again,
    /// Of an earlier trial, or a number that was never sent.
    Stale,
}

/// The receiving end of a stream at one port.
#[derive(Debug)]
pub(crate) struct Expected {
    order: Order,
    /// Numbers below belong to an earlier trial.
    base: u64,
    /// By flow: the next number.
    next: Vec<u64>,
    /// Missing numbers: flow, first, one past the last; all of one step.
    gaps: Vec<(u32, u64, u64)>,
}

impl Expected {
    pub(crate) fn new(stream: &Stream) -> Self {
        let mut expected = Self {
            order: stream.order,
            base: 0,
            next: vec![0; stream.order.flows as usize],
            gaps: Vec::new(),
        };
        expected.begin(stream.sequence);
        expected
    }

    /// From now on frames from number `sequence` on count.
    pub(crate) fn begin(&mut self, sequence: u64) {
        self.base = sequence;
        self.gaps.clear();
        let mut flow = self.order.at(sequence);
        for number in sequence..sequence + u64::from(self.order.flows) {
            self.next[flow as usize] = number;
            flow = self.order.after(flow);
        }
    }

    /// Judges a frame.
    #[inline]
    pub(crate) fn judge(&mut self, head: &Head) -> Verdict {
        let Some(next) = self.next.get_mut(head.flow as usize) else {
            return Verdict::Stale;
        };
        if head.sequence == *next {
            *next += u64::from(self.order.flows);
            return Verdict::Next { skipped: 0 };
        }
        self.odd(head)
    }

    #[cold]
    fn odd(&mut self, head: &Head) -> Verdict {
        let step = u64::from(self.order.flows);
        let next = &mut self.next[head.flow as usize];
        let (number, expected) = (head.sequence, *next);
        if number < self.base {
            return Verdict::Stale;
        }
        if number > expected {
            if !(number - expected).is_multiple_of(step) {
                return Verdict::Stale;
            }
            if self.gaps.len() == GAPS_MAX {
                self.gaps.drain(..GAPS_MAX / 4);
            }
            self.gaps.push((head.flow, expected, number));
            *next = number + step;
            return Verdict::Next {
                skipped: (number - expected) / step,
            };
        }
        let gap = self
            .gaps
            .iter()
            .rposition(|&(flow, from, to)| flow == head.flow && (from..to).contains(&number));
        let Some(gap) = gap else {
            return Verdict::Again;
        };
        let (flow, from, to) = self.gaps.remove(gap);
        for (from, to) in [(number + step, to), (from, number)] {
            if from < to {
                self.gaps.insert(gap, (flow, from, to));
            }
        }
        Verdict::Late
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(flow: u32, sequence: u64) -> Head {
        Head {
            stream: 0,
            flow,
            sequence,
            stamp: 0,
            window: 0,
        }
    }

    #[test]
    fn every_flow_has_its_turn_once_per_round_in_scattered_order() {
        for flows in [1, 2, 3, 10, 97, 1000, 65_536, 1_000_000] {
            let order = Order::new(flows);
            let mut seen = vec![false; flows as usize];
            let mut flow = 0;
            for sequence in 0..u64::from(flows) {
                assert_eq!(flow, order.at(sequence), "{flows} flows");
                assert!(!std::mem::replace(&mut seen[flow as usize], true));
                flow = order.after(flow);
            }
            assert_eq!(flow, 0);
        }
        let order = Order::new(1000);
        assert!(order.after(0).abs_diff(0) > 100);
    }

    #[test]
    fn loss_reordering_and_duplication_are_told_apart_within_a_flow() {
        let stream = Stream::new(0, 0, Target::All, 1);
        let mut expected = Expected::new(&stream);
        let verdicts: Vec<_> = [0, 4, 2, 2, 1, 5]
            .iter()
            .map(|&number| expected.judge(&head(0, number)))
            .collect();
        assert_eq!(
            verdicts,
            [
                Verdict::Next { skipped: 0 },
                Verdict::Next { skipped: 3 },
                Verdict::Late,
                Verdict::Again,
                Verdict::Late,
                Verdict::Next { skipped: 0 },
            ]
        );
    }

    #[test]
    fn frames_of_different_flows_may_overtake_each_other() {
        let stream = Stream::new(0, 0, Target::All, 3);
        let mut expected = Expected::new(&stream);
        let order = stream.order;
        let mut sequence: Vec<u64> = (0..9).collect();
        sequence.sort_by_key(|number| order.at(*number));
        for number in sequence {
            let verdict = expected.judge(&head(order.at(number), number));
            assert_eq!(verdict, Verdict::Next { skipped: 0 }, "{number}");
        }
        assert_eq!(
            expected.judge(&head(order.at(12), 12)),
            Verdict::Next { skipped: 1 }
        );
    }

    #[test]
    fn frames_of_an_earlier_trial_do_not_count() {
        let stream = Stream::new(0, 0, Target::All, 4);
        let mut expected = Expected::new(&stream);
        expected.begin(1000);
        assert_eq!(
            expected.judge(&head(stream.order.at(998), 998)),
            Verdict::Stale
        );
        for number in 1000..1010 {
            let verdict = expected.judge(&head(stream.order.at(number), number));
            assert_eq!(verdict, Verdict::Next { skipped: 0 });
        }
    }

    #[test]
    fn a_head_that_changed_in_any_bit_is_noticed() {
        let stream = Stream::new(3, 7, Target::Stations(9), 1);
        let (first, second) = stream.head(64);
        let sum = check(first, second, 0, 3 << 48, 77);
        let words = [first, second, u64::from(sum) << 32, 3 << 48, 77];
        assert!(
            matches!(Head::read(Some(words), 64), Read::Ours(head) if head.stream == 3 && head.stamp == 77)
        );
        assert_eq!(Head::read(Some(words), 65), Read::Corrupted);
        for bit in 0..320 {
            let mut changed = words;
            changed[bit / 64] ^= 1 << (bit % 64);
            assert!(
                !matches!(Head::read(Some(changed), 64), Read::Ours(_)),
                "bit {bit}"
            );
        }
    }
}
