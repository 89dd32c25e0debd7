//! What the threads of a trial do: each drives its ports until the time is over, one watches.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam::utils::CachePadded;
use ringway::dataplane::clock::tsc;
use ringway::guest::Guest;

use super::fleet::{Fleet, Lane};
use super::sender::Pace;
use super::trial::Trial;
use crate::interrupt;
use crate::process::pin;

/// Turns between two looks at the flags.
const TURNS: u32 = 64;
/// How often the coordinator looks whether the switch is still there. Every wake-up may preempt the switch.
const LOOK: Duration = Duration::from_millis(100);

/// What the threads share.
pub(super) struct Run<'t> {
    pub(super) trial: &'t Trial,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) hz: f64,
    pub(super) stop: AtomicBool,
    pub(super) lied: AtomicBool,
    pub(super) received: Vec<CachePadded<AtomicU64>>,
    pub(super) ready: Barrier,
}

impl Run<'_> {
    fn cycles(&self, time: Duration) -> u64 {
        (time.as_secs_f64() * self.hz) as u64
    }
}

/// What a thread did.
#[derive(Clone, Copy, Default)]
pub(super) struct Spent {
    pub(super) busy: u64,
    pub(super) all: u64,
    /// Frames received and frames sent within the time.
    pub(super) received: u64,
    pub(super) offered: u64,
    pub(super) ended: u64,
}

/// A thread's part.
pub(super) fn drive(
    lanes: &mut [Lane],
    run: &Run<'_>,
    number: usize,
    cpu: Option<usize>,
) -> Result<Spent> {
    let pinned = match cpu {
        Some(cpu) => pin(&[cpu]).with_context(|| format!("CPU {cpu}: cannot be used")),
        None => Ok(()),
    };
    if pinned.is_err() {
        run.stop.store(true, Ordering::Relaxed);
    }
    run.ready.wait();
    pinned?;
    let mut spent = Spent::default();
    let (mut turn, mut turns) = (tsc(), 0u32);
    while turn < run.start {
        std::hint::spin_loop();
        turn = tsc();
    }
    // 1. Receive and send until the time is over.
    let mut received = 0;
    while turn < run.end {
        let mut moved = 0;
        for lane in &mut *lanes {
            for queue in &mut lane.queues {
                if let Some(relay) = &mut lane.relay {
                    moved += relay.turn(&mut queue.pair);
                    continue;
                }
                if !lane.deaf {
                    let got = lane.sink.receive(&mut queue.pair.rx) as u64;
                    received += got;
                    moved += got;
                }
                moved += queue.sender.send(&mut queue.pair.tx, turn);
            }
        }
        let now = tsc();
        if moved > 0 {
            spent.busy += now - turn;
        } else if cpu.is_none() {
            // Not pinned: the switch may be waiting for this CPU.
            std::thread::yield_now();
        }
        turn = now;
        turns = turns.wrapping_add(1);
        if turns.is_multiple_of(TURNS) {
            // Relaxed: a number for the progress bar.
            run.received[number].store(received, Ordering::Relaxed);
            let mut queues = lanes.iter().flat_map(|lane| &lane.queues);
            if queues.any(|queue| queue.pair.rx.lied() || queue.pair.tx.lied()) {
                run.lied.store(true, Ordering::Relaxed);
                break;
            }
            if run.stop.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    spent.ended = turn;
    spent.all = turn - run.start;
    spent.received = lanes
        .iter()
        .map(|lane| lane.sink.found().tally.received)
        .sum();
    let queues = lanes.iter().flat_map(|lane| &lane.queues);
    spent.offered = queues.map(|queue| queue.sender.offered(turn)).sum();
    // 2. Receive what is still on its way.
    drain(lanes, run, turn);
    run.received[number].store(received, Ordering::Relaxed);
    Ok(spent)
}

fn drain(lanes: &mut [Lane], run: &Run<'_>, ended: u64) {
    let (quiet, short) = (
        run.cycles(run.trial.quiet),
        run.cycles(Duration::from_millis(1)),
    );
    let grace = ended + run.cycles(run.trial.grace);
    let (mut now, mut last) = (ended, ended);
    loop {
        let (mut moved, mut flying) = (0, 0);
        for lane in &mut *lanes {
            for queue in &mut lane.queues {
                if let Some(relay) = &mut lane.relay {
                    moved += relay.turn(&mut queue.pair);
                    continue;
                }
                if !lane.deaf {
                    moved += lane.sink.receive(&mut queue.pair.rx) as u64;
                }
                let open = matches!(run.trial.pace, Pace::Every(_) | Pace::Burst(_));
                // A burst has no other end than its last frame; a ring that never drains ends it by silence.
                if open && (now < grace || matches!(run.trial.pace, Pace::Burst(_))) {
                    moved += queue.sender.send(&mut queue.pair.tx, ended);
                }
                if !queue.sender.has_own_pace() {
                    flying += queue.sender.in_flight();
                }
            }
        }
        now = tsc();
        if moved > 0 {
            last = now;
            continue;
        }
        let silence = now - last;
        if silence > quiet || (flying == 0 && silence > short) {
            return;
        }
        std::thread::yield_now();
    }
}

/// Watches while the threads work: the rate of each step, and why it ended early.
pub(super) fn watch(
    run: &Run<'_>,
    guests: &[Guest],
    progress: &mut dyn FnMut(f64, f64),
    done: impl Fn() -> bool,
) -> (Vec<f64>, Option<String>) {
    let total = || -> u64 {
        let counts = run.received.iter();
        counts.map(|count| count.load(Ordering::Relaxed)).sum()
    };
    let step = run
        .trial
        .time
        .mul_f64(0.25)
        .clamp(LOOK, Duration::from_millis(500));
    let began = Instant::now();
    let (mut steps, mut at, mut before) = (Vec::new(), began, 0);
    let mut moved = began;
    let mut partial = None;
    let mut seen = 0;
    while !done() {
        std::thread::sleep(LOOK.min(run.trial.time / 4).max(Duration::from_millis(1)));
        let (now, count) = (Instant::now(), total());
        if count != seen {
            (seen, moved) = (count, now);
        }
        if now - at >= step && began.elapsed() <= run.trial.time + LOOK {
            let rate = (count - before) as f64 / (now - at).as_secs_f64() / 1e6;
            steps.push(rate);
            (at, before) = (now, count);
            progress(
                began.elapsed().as_secs_f64() / run.trial.time.as_secs_f64(),
                rate,
            );
        }
        if partial.is_some() {
            continue;
        }
        let during = began.elapsed() < run.trial.time;
        partial = if run.lied.load(Ordering::Relaxed) {
            Some("the switch gave back a buffer that it did not have".to_owned())
        } else if interrupt::check().is_err() {
            Some("interrupted".to_owned())
        } else if let Some(port) = Fleet::gone(guests) {
            Some(format!("the switch closed the connection of port {port}"))
        } else if during && run.trial.pace != Pace::Silent && moved.elapsed() > run.trial.stall {
            let why = if seen == 0 {
                "no frame came back"
            } else {
                "the traffic stood still"
            };
            Some(format!("{why} for {:.1} s", run.trial.stall.as_secs_f64()))
        } else {
            None
        };
        if partial.is_some() {
            run.stop.store(true, Ordering::Relaxed);
        }
    }
    (steps, partial)
}
