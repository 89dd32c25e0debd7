//! The innocent pairs: two guests with split rings and two with packed ones, each sending to its partner as fast as answers come.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use hdrhistogram::Histogram;
use ringway::dataplane::clock::tsc;
use ringway::guest::traffic::{Checker, Flow, station};
use ringway::guest::{Guest, QueuePair};

use super::api::PATIENCE;
use super::quiet;
use super::rig::lock;

/// Frames of each flow on their way: far fewer than a ring holds, so that none may be lost.
const WINDOW: u64 = 48;
/// Bytes of a frame.
const LEN: usize = 200;
/// Between two looks at the clock, in microseconds: beyond, somebody else had our processor. A look at each way takes some 5.
const PAUSE: f64 = 15.0;

/// One innocent guest.
pub(super) struct Innocent {
    pub(super) guest: Guest,
    pub(super) queues: QueuePair,
}

/// What the innocents saw.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) frames: u64,
    /// 99th percentile of the way through the switch, in microseconds, without their own pauses.
    pub(super) p99: f64,
    /// Longest way through the switch, in milliseconds, without their own pauses.
    pub(super) longest: f64,
    /// Longest time without a frame, in milliseconds, own pauses included.
    pub(super) gap: f64,
}

/// Times on the way through the switch, of those frames that were not on it while their owners' processor did something else.
struct Watch {
    ticks: Histogram<u64>,
    pause: u64,
    looked: u64,
    /// When the last pause ended.
    awake: u64,
}

impl Watch {
    fn new() -> Watch {
        Watch {
            // A cycle to some minutes, two digits.
            ticks: Histogram::new_with_bounds(1, 1 << 40, 2).expect("bounds in order"),
            pause: (PAUSE * ticks_per_microsecond()) as u64,
            looked: tsc(),
            awake: tsc(),
        }
    }

    /// The time.
    fn look(&mut self) -> u64 {
        let now = tsc();
        if now.saturating_sub(self.looked) > self.pause {
            self.awake = now;
        }
        self.looked = now;
        now
    }

    fn saw(&mut self, stamp: u64, now: u64) {
        if stamp >= self.awake {
            self.ticks
                .saturating_record(now.saturating_sub(stamp).max(1));
        }
    }

    fn take(&mut self) -> Histogram<u64> {
        let empty = Histogram::new_from(&self.ticks);
        std::mem::replace(&mut self.ticks, empty)
    }
}

/// In microseconds.
pub(super) fn quantile(ticks: &Histogram<u64>, quantile: f64) -> f64 {
    ticks.value_at_quantile(quantile) as f64 / ticks_per_microsecond()
}

/// The pairs, sending from a thread of their own.
pub(super) struct Innocents {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<Seen>>,
}

/// What the thread and those who ask see.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    frames: AtomicU64,
    /// Somebody wants the times so far.
    asked: AtomicBool,
    times: Mutex<Option<Histogram<u64>>>,
}

impl Innocents {
    /// Guest 0 sends to guest 1 and back, 2 to 3 and back.
    pub(super) fn start(guests: [Innocent; 4]) -> Innocents {
        let shared = Arc::<Shared>::default();
        let told = shared.clone();
        let thread = std::thread::spawn(move || send_on(guests, &told));
        Innocents { shared, thread }
    }

    /// Frames that came so far.
    pub(super) fn frames(&self) -> u64 {
        self.shared.frames.load(Ordering::Relaxed)
    }

    /// Times on the way through the switch since they were last taken, in ticks.
    pub(super) fn take_times(&self) -> Result<Histogram<u64>> {
        self.shared.asked.store(true, Ordering::Relaxed);
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(times) = lock(&self.shared.times).take() {
                return Ok(times);
            }
            ensure!(Instant::now() < end, "the innocents do not answer");
            std::thread::sleep(Duration::from_millis(1));
        }
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
        self.shared.stop.store(true, Ordering::Relaxed);
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

fn send_on(mut guests: [Innocent; 4], shared: &Shared) -> Result<Seen> {
    quiet::leave_the_worker_alone()?;
    let (mut ways, mut watch) = (ways(), Watch::new());
    loop {
        let over = shared.stop.load(Ordering::Relaxed);
        let (mut moved, mut open) = (0, 0);
        for way in &mut ways {
            moved += step(way, &mut guests, &mut watch, over)?;
            open += way.flow.sent() - way.checker.tally().received;
        }
        shared.frames.fetch_add(moved, Ordering::Relaxed);
        if over && open == 0 {
            break;
        }
        if shared.asked.swap(false, Ordering::Relaxed) {
            *lock(&shared.times) = Some(watch.take());
        }
        if moved == 0 {
            std::thread::yield_now();
        }
    }
    let times = watch.take();
    let mut seen = Seen {
        frames: shared.frames.load(Ordering::Relaxed),
        p99: quantile(&times, 0.99),
        longest: quantile(&times, 1.0) / 1e3,
        gap: 0.0,
    };
    for way in &ways {
        let tally = way.checker.tally();
        let wrong = tally.missing + tally.corrupted + tally.duplicated + tally.reordered;
        ensure!(wrong == 0, "{} sent, found {tally:?}", way.flow.sent());
        seen.gap = seen.gap.max(way.gap.as_secs_f64() * 1e3);
    }
    drop(guests.map(|innocent| innocent.guest));
    Ok(seen)
}

/// Sends what the window allows and takes what has come; says how much that was.
fn step(way: &mut Way, guests: &mut [Innocent; 4], watch: &mut Watch, over: bool) -> Result<u64> {
    let received = way.checker.tally().received;
    let room = if over {
        0
    } else {
        WINDOW - (way.flow.sent() - received)
    };
    let (flow, now) = (&mut way.flow, watch.look());
    guests[way.from]
        .queues
        .tx
        .send(room as usize, |slot| flow.write(slot, now));
    let (checker, now) = (&mut way.checker, watch.look());
    guests[way.to].queues.rx.receive(|frame| {
        checker.check(frame, now);
        if let Some([_, _, _, _, stamp]) = frame.words::<5>() {
            watch.saw(stamp, now);
        }
    });
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
pub(super) fn ticks_per_microsecond() -> f64 {
    static TICKS: std::sync::OnceLock<f64> = std::sync::OnceLock::new();
    *TICKS.get_or_init(|| {
        let (from, since) = (tsc(), Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        (tsc() - from) as f64 / since.elapsed().as_secs_f64() / 1e6
    })
}
