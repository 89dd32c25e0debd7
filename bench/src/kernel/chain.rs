//! Containers in a row: the first sends, each passes on to the next, the last one checks. Two polling threads share them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use ringway::dataplane::clock::tsc;

use super::circle::open;
use super::socket::{BURST_MAX, Burst, Packets};
use super::wire;
use crate::interrupt;
use crate::load::outcome::distribution;
use crate::load::stream::{Expected, Head, Stream, Target, Verdict};
use crate::process::pin;
use crate::results::{Count, Distribution};

/// A chain with nothing in it for so long has lost what was in flight: it starts anew.
const LOST_AFTER: Duration = Duration::from_millis(100);
/// After the end nothing is sent any more; what is on its way comes, or has not moved for so long.
const SETTLE: Duration = Duration::from_millis(100);
const QUIET: Duration = Duration::from_secs(1);
/// Frames per system call.
const BURST: usize = 32;
const _: () = assert!(BURST <= BURST_MAX);

/// What came of it.
pub(crate) struct Passed {
    pub(crate) count: Count,
    pub(crate) mpps: f64,
    pub(crate) latency: Distribution,
    pub(crate) jitter_ns: f64,
}

/// Containers in a row with their sockets open.
pub(crate) struct Chain {
    links: Vec<Packets>,
    cpus: [usize; 2],
    frame: usize,
    tsc_hz: f64,
}

/// What the two threads share.
#[derive(Default)]
struct Shared {
    arrived: AtomicU64,
    sent: AtomicU64,
    stop: AtomicBool,
}

/// The last container's account.
struct Arrivals {
    expected: Expected,
    count: Count,
    latency: Histogram<u64>,
    jitter: u64,
    before: Option<u64>,
}

impl Chain {
    /// Opens the containers' sockets.
    pub(crate) fn open(
        containers: &[String],
        cpus: [usize; 2],
        frame: usize,
        tsc_hz: f64,
    ) -> Result<Self> {
        let links = containers.iter().map(|path| open(&PathBuf::from(path)));
        let chain = Self {
            links: links.collect::<Result<_>>()?,
            cpus,
            frame: frame.max(wire::HEAD),
            tsc_hz,
        };
        // A broadcast from each: a bridge knows them all from now on.
        let mut burst = Burst::new(chain.frame);
        for at in 0..chain.links.len() {
            wire::write_to_all(burst.resize(0, chain.frame), at);
            chain.send(at, &mut burst, 1)?;
        }
        Ok(chain)
    }

    /// Keeps so many frames in flight for so long.
    pub(crate) fn run(&self, window: u64, time: Duration) -> Result<Passed> {
        let (shared, began) = (Shared::default(), Instant::now());
        let end = began + time;
        let mut arrivals = Arrivals::new();
        std::thread::scope(|scope| -> Result<()> {
            let other = scope.spawn(|| self.play(1, window, end, &shared, None));
            let own = scope.spawn(|| self.play(0, window, end, &shared, Some(&mut arrivals)));
            let mut seen = (0, Instant::now());
            while !own.is_finished() && !other.is_finished() && interrupt::check().is_ok() {
                std::thread::sleep(Duration::from_millis(20));
                let arrived = shared.arrived.load(Ordering::Relaxed);
                if arrived != seen.0 {
                    seen = (arrived, Instant::now());
                }
                let all = arrived == shared.sent.load(Ordering::Relaxed);
                if Instant::now() > end + SETTLE && (all || seen.1.elapsed() > QUIET) {
                    break;
                }
            }
            // Relaxed: a flag alone.
            shared.stop.store(true, Ordering::Relaxed);
            for thread in [own, other] {
                thread
                    .join()
                    .map_err(|_| anyhow::anyhow!("a thread of the chain ended"))??;
            }
            Ok(())
        })?;
        interrupt::check()?;
        let seconds = time.as_secs_f64();
        let sent = shared.sent.load(Ordering::Relaxed);
        let received = arrivals.count.received;
        Ok(Passed {
            count: Count {
                seconds,
                offered: sent,
                sent,
                lost: sent.saturating_sub(received),
                ..arrivals.count
            },
            mpps: received as f64 / seconds / 1e6,
            latency: distribution("one in flight", &arrivals.latency, self.tsc_hz),
            jitter_ns: arrivals.jitter as f64 / received.saturating_sub(1).max(1) as f64 * 1e9
                / self.tsc_hz,
        })
    }

    /// Plays every other container, the last one among them if `arrivals` are given.
    fn play(
        &self,
        me: usize,
        window: u64,
        end: Instant,
        shared: &Shared,
        mut arrivals: Option<&mut Arrivals>,
    ) -> Result<()> {
        pin(&[self.cpus[me]]).context("a CPU of the chain")?;
        let last = self.links.len() - 1;
        let mut burst = Burst::new(self.frame);
        let mut source = Source::default();
        // Counted from the end, so that the one with the arrivals is the last container's.
        let mine: Vec<_> = (0..=last).filter(|at| (last - at) % 2 == me).collect();
        while !shared.stop.load(Ordering::Relaxed) {
            for &at in &mine {
                if at == 0 {
                    if Instant::now() < end {
                        source.send(self, &mut burst, window, shared)?;
                    }
                    continue;
                }
                let got = self.links[at].receive(&mut burst, BURST)?;
                if got == 0 {
                    continue;
                }
                if at < last {
                    // What is not addressed to this container is not passed on: a flooded frame would go round.
                    let mine = burst.keep(got, |frame| wire::is_to(frame, at));
                    for frame in 0..mine {
                        wire::write(burst.frame(frame), at, at + 1);
                    }
                    self.send(at, &mut burst, mine)?;
                } else if let Some(arrivals) = &mut arrivals {
                    let now = tsc();
                    let mine = burst.keep(got, |frame| wire::is_to(frame, at));
                    for frame in 0..mine {
                        arrivals.judge(burst.frame(frame), now);
                    }
                    shared.arrived.fetch_add(mine as u64, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    fn send(&self, at: usize, burst: &mut Burst, count: usize) -> Result<()> {
        let mut sent = 0;
        while sent < count {
            sent += self.links[at].send(burst, sent..count)?;
        }
        Ok(())
    }
}

/// The first container.
#[derive(Default)]
struct Source {
    sequence: u64,
    forgiven: u64,
    moved: Option<(u64, Instant)>,
}

impl Source {
    fn send(
        &mut self,
        chain: &Chain,
        burst: &mut Burst,
        window: u64,
        shared: &Shared,
    ) -> Result<()> {
        let arrived = shared.arrived.load(Ordering::Relaxed);
        let flying = self.sequence.saturating_sub(arrived + self.forgiven);
        let (known, since) = *self.moved.get_or_insert((arrived, Instant::now()));
        if known != arrived {
            self.moved = None;
        } else if flying >= window && since.elapsed() > LOST_AFTER {
            (self.forgiven, self.moved) = (self.forgiven + flying, None);
        }
        let room = window.saturating_sub(flying).min(BURST as u64) as usize;
        if room == 0 {
            return Ok(());
        }
        let now = tsc();
        for at in 0..room {
            let frame = burst.resize(at, chain.frame);
            wire::write(frame, 0, 1);
            wire::stamp(frame, self.sequence, now);
            self.sequence += 1;
        }
        shared.sent.store(self.sequence, Ordering::Relaxed);
        chain.send(0, burst, room)
    }
}

impl Arrivals {
    fn new() -> Self {
        let stream = Stream::new(0, 0, Target::All, 1);
        Self {
            expected: Expected::new(&stream),
            count: Count::default(),
            latency: Histogram::new_with_bounds(1, 1 << 42, 2).expect("bounds are in order"),
            jitter: 0,
            before: None,
        }
    }

    fn judge(&mut self, frame: &[u8], now: u64) {
        let Some((sequence, stamp)) = wire::read(frame) else {
            self.count.foreign += 1;
            return;
        };
        match self.expected.judge(&Head::numbered(sequence, stamp)) {
            Verdict::Next { .. } => {}
            Verdict::Late => self.count.reordered += 1,
            Verdict::Again => {
                self.count.duplicated += 1;
                return;
            }
            Verdict::Stale => {
                self.count.foreign += 1;
                return;
            }
        }
        self.count.received += 1;
        self.count.bytes += frame.len() as u64;
        let cycles = now.saturating_sub(stamp).max(1);
        self.latency.saturating_record(cycles);
        if let Some(before) = self.before.replace(cycles) {
            self.jitter += cycles.abs_diff(before);
        }
    }
}
