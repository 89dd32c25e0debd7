//! The receiving end of a port: every frame judged, every latency kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;
use hdrhistogram::Histogram;
use ringway::dataplane::clock::tsc;
use ringway::guest::traffic::{HEAD, Tally};
use ringway::guest::{Frame, Rx};

use super::stream::{Expected, Head, Read, Verdict};

/// The stream of announcements: they teach the switch where stations live, and nobody counts on them.
pub(crate) const ANNOUNCEMENTS: u16 = u16::MAX;

/// How many frames of a sender have come, or will never come: its closed loop goes on by this.
pub(crate) type Arrived = Arc<CachePadded<AtomicU64>>;

/// What was found at a port, or at all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// `received` are frames of ours, unchanged, for the first time.
    pub(crate) tally: Tally,
    pub(crate) announcements: u64,
    /// Frames of an earlier trial.
    pub(crate) stale: u64,
}

impl std::ops::AddAssign for Found {
    fn add_assign(&mut self, other: Self) {
        self.tally += other.tally;
        self.announcements += other.announcements;
        self.stale += other.stale;
    }
}

/// One stream as a port knows it.
struct Known {
    expected: Expected,
    /// Whom to tell of what came; none where another port does (broadcast).
    sender: Option<Arrived>,
}

/// The receiving end of a port.
pub(crate) struct Sink {
    /// By number of the stream.
    known: Vec<Option<Known>>,
    verify_every: u64,
    until_verify: u64,
    found: Found,
    latency: Histogram<u64>,
    /// Frames of one burst mostly have one latency: recorded as one.
    run: (u64, u64),
    /// Arrivals not yet told: stream and number.
    news: (u16, u64),
    /// The last frame came at (TSC).
    last: u64,
    /// The longest time without a frame since the first, with the time it ended.
    gap: u64,
    /// Sum and number of the differences between the latencies of consecutive frames.
    jitter: (u64, u64),
    before: u64,
}

impl Sink {
    /// Compares the whole payload of every `verify_every`-th frame (1: of all), the head of every frame.
    pub(crate) fn new(verify_every: u64) -> Self {
        // 1 cycle to 2^42 (half an hour), two digits: percentiles to 1 %.
        let latency =
            Histogram::new_with_bounds(1, 1 << 42, 2).expect("constant bounds are in order");
        Self {
            known: Vec::new(),
            verify_every: verify_every.max(1),
            until_verify: 1,
            found: Found::default(),
            latency,
            run: (0, 0),
            news: (0, 0),
            last: 0,
            gap: 0,
            jitter: (0, 0),
            before: 0,
        }
    }

    /// Expects a stream from now on.
    pub(crate) fn expect(&mut self, id: u16, expected: Expected, sender: Option<Arrived>) {
        let at = usize::from(id);
        if self.known.len() <= at {
            self.known.resize_with(at + 1, || None);
        }
        self.known[at] = Some(Known { expected, sender });
    }

    /// Gives up what it expects of a stream.
    pub(crate) fn release(&mut self, id: u16) -> Option<(Expected, Option<Arrived>)> {
        let known = self.known.get_mut(usize::from(id))?.take()?;
        Some((known.expected, known.sender))
    }

    /// Expects nothing any more.
    pub(crate) fn forget(&mut self) {
        self.known.clear();
    }

    /// A new trial: `sequence` gives each stream's next number.
    pub(crate) fn begin(&mut self, sequence: impl Fn(u16) -> Option<u64>) {
        for (id, known) in self.known.iter_mut().enumerate() {
            if let (Some(known), Some(next)) = (known, sequence(id as u16)) {
                known.expected.begin(next);
            }
        }
        self.found = Found::default();
        self.latency.reset();
        (self.run, self.jitter, self.before) = ((0, 0), (0, 0), 0);
        (self.last, self.gap) = (0, 0);
    }

    /// Receives a burst; returns how many frames it had.
    #[inline]
    pub(crate) fn receive(&mut self, rx: &mut Rx) -> usize {
        let mut now = 0;
        let got = rx.receive(|frame| {
            if now == 0 {
                now = tsc();
            }
            self.check(frame, now);
        });
        if got > 0 {
            self.tell();
            if self.last > 0 {
                self.gap = self.gap.max(now - self.last);
            }
            self.last = now;
        }
        got
    }

    #[inline]
    fn check(&mut self, frame: &Frame<'_>, now: u64) {
        let len = frame.len();
        let head = match Head::read(frame.words::<5>(), len) {
            Read::Ours(head) => head,
            Read::Corrupted => {
                self.found.tally.corrupted += 1;
                return;
            }
            Read::Foreign => {
                self.found.tally.foreign += 1;
                return;
            }
        };
        let Some(Some(known)) = self.known.get_mut(usize::from(head.stream)) else {
            self.stranger(head);
            return;
        };
        let verdict = known.expected.judge(&head);
        if let Verdict::Next { skipped } = verdict {
            if head.stream != self.news.0 {
                self.tell();
                self.news.0 = head.stream;
            }
            self.news.1 += 1 + skipped;
            self.found.tally.missing += skipped;
        } else if !self.odd(verdict) {
            return;
        }
        self.until_verify -= 1;
        if self.until_verify == 0 {
            self.until_verify = self.verify_every;
            self.found.tally.verified += 1;
            if !frame.matches(HEAD, head.payload(len)) {
                self.found.tally.corrupted += 1;
                return;
            }
        }
        self.found.tally.received += 1;
        self.found.tally.bytes += len as u64;
        self.latency(now.saturating_sub(head.stamp).max(1));
    }

    /// True if the frame counts as received.
    #[cold]
    fn odd(&mut self, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Late => {
                self.found.tally.missing -= 1;
                self.found.tally.reordered += 1;
                return true;
            }
            Verdict::Again => self.found.tally.duplicated += 1,
            Verdict::Stale => self.found.stale += 1,
            Verdict::Next { .. } => {}
        }
        false
    }

    #[cold]
    fn stranger(&mut self, head: Head) {
        if head.stream == ANNOUNCEMENTS {
            self.found.announcements += 1;
        } else {
            self.found.tally.foreign += 1;
        }
    }

    #[inline]
    fn latency(&mut self, cycles: u64) {
        if cycles == self.run.0 {
            self.run.1 += 1;
        } else {
            self.record();
            self.run = (cycles, 1);
        }
    }

    #[inline]
    fn record(&mut self) {
        let (cycles, count) = self.run;
        if count > 0 {
            self.latency.saturating_record_n(cycles, count);
            if self.before > 0 {
                self.jitter.0 += cycles.abs_diff(self.before);
            }
            self.jitter.1 += count;
            self.before = cycles;
            self.run.1 = 0;
        }
    }

    /// Tells the sender what has come.
    #[inline]
    fn tell(&mut self) {
        let (stream, count) = self.news;
        if count == 0 {
            return;
        }
        self.news.1 = 0;
        if let Some(Some(known)) = self.known.get(usize::from(stream))
            && let Some(sender) = &known.sender
        {
            // Relaxed: a count alone, nothing is published with it.
            sender.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// What was found in this trial.
    pub(crate) fn found(&self) -> Found {
        self.found
    }

    /// Latencies of this trial, in TSC cycles.
    pub(crate) fn latencies(&mut self) -> &Histogram<u64> {
        self.record();
        &self.latency
    }

    /// Mean difference between the latencies of consecutive frames, cycles.
    pub(crate) fn jitter(&self) -> f64 {
        let (sum, count) = self.jitter;
        sum as f64 / count.saturating_sub(1).max(1) as f64
    }

    /// When the last frame came, and the longest time without one, in TSC cycles.
    pub(crate) fn silence(&self) -> (u64, u64) {
        (self.last, self.gap)
    }
}
