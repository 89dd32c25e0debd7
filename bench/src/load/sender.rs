//! The sending end of a transmit ring: which frame is next, and when.

use std::sync::atomic::Ordering;

use ringway::dataplane::clock::tsc;
use ringway::guest::Tx;

use super::sink::Arrived;
use super::stream::{Stream, Target};

/// Frames per call.
pub(crate) const BURST: u64 = 64;
/// A closed loop that has not moved for so long has lost what was in flight: it starts anew. In TSC cycles of 2.5 GHz: 80 ms.
const LOST_AFTER: u64 = 200_000_000;
/// Fractional bits of the time between two frames.
const FRACTION: u32 = 16;

/// Lengths of frames: a buffer of the ring always carries the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lengths(Vec<u16>);

impl Lengths {
    pub(crate) fn one(len: u16) -> Self {
        Self(vec![len])
    }

    /// The simple Internet mix: seven small frames, four middle ones, a large one (RFC 6985 calls such a list a genome).
    pub(crate) fn imix() -> Self {
        Self(vec![64, 594, 64, 64, 594, 64, 1518, 64, 594, 64, 64, 594])
    }

    pub(crate) fn longest(&self) -> u16 {
        self.0.iter().copied().max().unwrap_or(64)
    }

    /// The only length there is.
    pub(crate) fn only(&self) -> Option<u16> {
        (self.0.len() == 1).then(|| self.0[0])
    }

    #[inline]
    fn of(&self, buffer: u16) -> usize {
        match self.0.as_slice() {
            [one] => usize::from(*one),
            many => usize::from(many[usize::from(buffer) % many.len()]),
        }
    }
}

/// When frames are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Pace {
    /// Closed loop: so many frames of each sender in flight.
    Window(u64),
    /// Open loop: so many TSC cycles from one frame of a sender to its next.
    Every(f64),
    /// As fast as the ring takes them: so many frames of each sender, then silence.
    #[cfg_attr(not(test), allow(dead_code, reason = "tests count known frames"))]
    Burst(u64),
    /// As fast as the ring takes them, all the time.
    Flood,
    Silent,
}

/// The sending end of a ring.
pub(crate) struct Sender {
    streams: Vec<Stream>,
    /// The streams take turns in this order.
    turns: Vec<u16>,
    turn: usize,
    lengths: Lengths,
    salt: u32,
    arrived: Arrived,
    pace: Pace,
    /// What it does whatever the trial's pace is.
    own_pace: Option<Pace>,
    /// Frames of this trial.
    sent: u64,
    /// Open loop: the beginning, the time between frames (fixed point), the end.
    start: u64,
    interval: u64,
    end: u64,
    /// Closed loop: frames given up, and what `arrived` was at the beginning and when it last moved.
    forgiven: u64,
    before: u64,
    moved: (u64, u64),
}

impl Sender {
    pub(crate) fn new(
        streams: Vec<Stream>,
        turns: Vec<u16>,
        lengths: Lengths,
        salt: u32,
        arrived: Arrived,
    ) -> Self {
        Self {
            streams,
            turns,
            turn: 0,
            lengths,
            salt,
            arrived,
            pace: Pace::Silent,
            own_pace: None,
            sent: 0,
            start: 0,
            interval: 0,
            end: 0,
            forgiven: 0,
            before: 0,
            moved: (0, 0),
        }
    }

    /// Sends at a pace of its own from the next trial on.
    pub(crate) fn set_pace(&mut self, pace: Pace) {
        self.own_pace = Some(pace);
    }

    /// Sends its first stream elsewhere; nobody is told to expect it there.
    pub(crate) fn retarget(&mut self, target: Target, flows: u32) {
        if let Some(stream) = self.streams.first_mut() {
            stream.retarget(target, flows);
        }
    }

    /// All frames are from the first station of the port.
    pub(crate) fn one_source(&mut self) {
        self.streams.iter_mut().for_each(Stream::one_source);
    }

    pub(crate) fn has_own_pace(&self) -> bool {
        self.own_pace.is_some()
    }

    pub(crate) fn streams(&self) -> &[Stream] {
        &self.streams
    }

    /// A new trial, from `start` to `end` (TSC).
    pub(crate) fn begin(&mut self, pace: Pace, start: u64, end: u64) {
        let pace = self.own_pace.unwrap_or(pace);
        self.pace = if self.turns.is_empty() {
            Pace::Silent
        } else {
            pace
        };
        (self.sent, self.forgiven) = (0, 0);
        self.before = self.arrived.load(Ordering::Relaxed);
        self.moved = (self.before, start);
        (self.start, self.end) = (start, end);
        if let Pace::Every(cycles) = pace {
            self.interval = (cycles * f64::from(1 << FRACTION)) as u64;
        }
    }

    /// Frames sent in this trial.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Frames due in this trial by `now`.
    pub(crate) fn offered(&self, now: u64) -> u64 {
        match self.pace {
            Pace::Every(_) => self.due(now),
            Pace::Burst(count) => count,
            _ => self.sent,
        }
    }

    #[inline]
    fn due(&self, now: u64) -> u64 {
        let time = now.min(self.end).saturating_sub(self.start);
        if time == 0 {
            return 0;
        }
        // `interval` is at least one cycle's: see `trial::Trial`.
        (time << FRACTION) / self.interval + 1
    }

    /// Frames on their way that may still come, those that the closed loop has given up among them.
    pub(crate) fn in_flight(&self) -> u64 {
        let arrived = self.arrived.load(Ordering::Relaxed) - self.before;
        self.sent.saturating_sub(arrived)
    }

    /// Sends what is due at `now`; returns how many.
    #[inline]
    pub(crate) fn send(&mut self, tx: &mut Tx, now: u64) -> u64 {
        match self.pace {
            Pace::Window(window) => {
                let room = self.room(window, now);
                if room == 0 {
                    return 0;
                }
                self.now(tx, room)
            }
            Pace::Every(_) => {
                let due = self.due(now).saturating_sub(self.sent).min(BURST);
                if due == 0 {
                    return 0;
                }
                self.scheduled(tx, due)
            }
            Pace::Burst(count) => {
                let left = count.saturating_sub(self.sent).min(BURST);
                if left == 0 {
                    return 0;
                }
                self.now(tx, left)
            }
            Pace::Flood => self.now(tx, BURST),
            Pace::Silent => 0,
        }
    }

    /// Room in the window. Half bursts at least where the window allows: a loop of single frames would measure its own overhead.
    #[inline]
    fn room(&mut self, window: u64, now: u64) -> u64 {
        let arrived = self.arrived.load(Ordering::Relaxed);
        if arrived != self.moved.0 {
            self.moved = (arrived, now);
        }
        let flying = self
            .sent
            .saturating_sub(arrived - self.before + self.forgiven);
        let room = window.saturating_sub(flying).min(BURST);
        if room >= (BURST / 2).min(window.div_ceil(4)) {
            return room;
        }
        if now.saturating_sub(self.moved.1) > LOST_AFTER {
            self.forgiven += flying;
            self.moved.1 = now;
        }
        0
    }

    /// Sends frames that are stamped with the present.
    #[inline]
    fn now(&mut self, tx: &mut Tx, most: u64) -> u64 {
        let stamp = tsc();
        self.stamped(tx, most, || stamp)
    }

    /// Sends frames that are stamped with the time they were due: what they had to wait for is part of their latency.
    #[inline]
    fn scheduled(&mut self, tx: &mut Tx, most: u64) -> u64 {
        let (mut number, start, interval) = (self.sent, self.start, self.interval);
        self.stamped(tx, most, || {
            let stamp = start + ((number * interval) >> FRACTION);
            number += 1;
            stamp
        })
    }

    /// Sends frames of the streams in turn, each with the next `stamp`.
    #[inline]
    fn stamped(&mut self, tx: &mut Tx, most: u64, mut stamp: impl FnMut() -> u64) -> u64 {
        let Self {
            streams,
            turns,
            turn,
            lengths,
            salt,
            ..
        } = self;
        let sent = tx.send(most as usize, |slot| {
            let stream = next(streams, turns, turn);
            stream.fill(slot, lengths.of(slot.index()), *salt, stamp())
        }) as u64;
        self.sent += sent;
        sent
    }
}

/// The stream whose turn it is.
#[inline]
fn next<'s>(streams: &'s mut [Stream], turns: &[u16], turn: &mut usize) -> &'s mut Stream {
    let stream = match turns {
        [one] => *one,
        many => {
            let stream = many[*turn];
            *turn = if *turn + 1 == many.len() {
                0
            } else {
                *turn + 1
            };
            stream
        }
    };
    &mut streams[usize::from(stream)]
}
