//! The innocent pairs: two guests with split rings and two with packed ones, each sending to its partner as fast as answers come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use ringway::dataplane::clock::tsc;
use ringway::guest::traffic::{Checker, Flow, station};
use ringway::guest::{Guest, QueuePair};

use super::api::PATIENCE;

/// Frames of each flow on their way: far fewer than a ring holds, so that none may be lost.
const WINDOW: u64 = 48;
/// Bytes of a frame.
const LEN: usize = 200;

/// One innocent guest.
pub(super) struct Innocent {
    pub(super) guest: Guest,
    pub(super) queues: QueuePair,
}

/// What the innocents saw.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) frames: u64,
    /// 99th percentile of the way through the switch, in microseconds, their own pauses included.
    pub(super) p99: f64,
    /// Longest time without a frame, in milliseconds.
    pub(super) gap: f64,
}

/// The pairs, sending from a thread of their own.
pub(super) struct Innocents {
    stop: Arc<AtomicBool>,
    frames: Arc<AtomicU64>,
    thread: JoinHandle<Result<Seen>>,
}

impl Innocents {
    /// Guest 0 sends to guest 1 and back, 2 to 3 and back.
    pub(super) fn start(guests: [Innocent; 4]) -> Innocents {
        let (stop, frames) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (told, counted) = (stop.clone(), frames.clone());
        let thread = std::thread::spawn(move || send_on(guests, &told, &counted));
        Innocents {
            stop,
            frames,
            thread,
        }
    }

    /// Frames that came so far.
    pub(super) fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Waits until so many frames more have come.
    pub(super) fn wait_more(&self, frames: u64) -> Result<()> {
        let (goal, end) = (self.frames() + frames, Instant::now() + PATIENCE);
        while self.frames() < goal {
            ensure!(
                Instant::now() < end && !self.thread.is_finished(),
                "the innocents' frames stand still"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Stops sending; every frame must have come, once, in order and unchanged.
    pub(super) fn finish(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let seen = self.thread.join().map_err(|_| anyhow!("a panic"));
        seen.and_then(|seen| seen).context("the innocent pairs")
    }
}

/// One direction of a pair.
struct Way {
    flow: Flow,
    checker: Checker,
    from: usize,
    to: usize,
    last: Instant,
    gap: Duration,
}

/// Guest `number`'s address.
pub(super) fn address(number: u32) -> [u8; 6] {
    station(0x1000 + number)
}

fn ways() -> Vec<Way> {
    let way = |(id, from, to): (u32, u32, u32)| Way {
        flow: Flow::new(id, address(from), address(to), LEN),
        checker: Checker::new(id, 1, 1),
        from: from as usize,
        to: to as usize,
        last: Instant::now(),
        gap: Duration::ZERO,
    };
    [(1, 0, 1), (2, 1, 0), (3, 2, 3), (4, 3, 2)].map(way).into()
}

fn send_on(mut guests: [Innocent; 4], stop: &AtomicBool, frames: &AtomicU64) -> Result<Seen> {
    let mut ways = ways();
    loop {
        let over = stop.load(Ordering::Relaxed);
        let (mut moved, mut open) = (0, 0);
        for way in &mut ways {
            moved += step(way, &mut guests, over)?;
            open += way.flow.sent() - way.checker.tally().received;
        }
        frames.fetch_add(moved, Ordering::Relaxed);
        if over && open == 0 {
            break;
        }
        if moved == 0 {
            std::thread::yield_now();
        }
    }
    let mut seen = Seen {
        frames: frames.load(Ordering::Relaxed),
        ..Seen::default()
    };
    for way in &mut ways {
        let tally = way.checker.tally();
        let wrong = tally.missing + tally.corrupted + tally.duplicated + tally.reordered;
        ensure!(wrong == 0, "{} sent, found {tally:?}", way.flow.sent());
        let p99 = way.checker.take_latency().value_at_quantile(0.99) as f64;
        seen.p99 = seen.p99.max(p99 / ticks_per_microsecond());
        seen.gap = seen.gap.max(way.gap.as_secs_f64() * 1e3);
    }
    drop(guests.map(|innocent| innocent.guest));
    Ok(seen)
}

/// Sends what the window allows and takes what has come; says how much that was.
fn step(way: &mut Way, guests: &mut [Innocent; 4], over: bool) -> Result<u64> {
    let received = way.checker.tally().received;
    let room = if over {
        0
    } else {
        WINDOW - (way.flow.sent() - received)
    };
    let (flow, now) = (&mut way.flow, tsc());
    guests[way.from]
        .queues
        .tx
        .send(room as usize, |slot| flow.write(slot, now));
    let (checker, now) = (&mut way.checker, tsc());
    guests[way.to]
        .queues
        .rx
        .receive(|frame| checker.check(frame, now));
    let came = way.checker.tally().received - received;
    let waited = way.last.elapsed();
    if came > 0 {
        (way.gap, way.last) = (way.gap.max(waited), Instant::now());
    }
    let tally = way.checker.tally();
    let wrong = tally.missing + tally.corrupted + tally.duplicated + tally.reordered;
    ensure!(
        waited < PATIENCE && wrong == 0,
        "{} sent, nothing for {waited:?}, found {tally:?}",
        way.flow.sent()
    );
    Ok(came)
}

/// TSC ticks, measured once.
fn ticks_per_microsecond() -> f64 {
    static TICKS: std::sync::OnceLock<f64> = std::sync::OnceLock::new();
    *TICKS.get_or_init(|| {
        let (from, since) = (tsc(), Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        (tsc() - from) as f64 / since.elapsed().as_secs_f64() / 1e6
    })
}
