//! One trial: every port sends and receives for a time, on one thread or several, and then what was found is added up.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam::utils::CachePadded;
use ringway::dataplane::clock::tsc;
use ringway::guest::Guest;

use super::fleet::{Fleet, Lane};
use super::outcome::{Outcome, counted};
use super::sender::{Pace, Sender};
use super::sink::Found;
use crate::interrupt;
use crate::process::pin;
use crate::results::Count;

/// Turns between two looks at the flags.
const TURNS: u32 = 64;
/// How often the coordinator looks whether the switch is still there. Every wake-up may preempt the switch.
const LOOK: Duration = Duration::from_millis(100);
/// From starting the threads to the first frame.
const LEAD: Duration = Duration::from_millis(2);

/// What to do.
#[derive(Clone, Debug)]
pub(crate) struct Trial {
    pub(crate) pace: Pace,
    pub(crate) time: Duration,
    /// How long after the end, without any frame, until nothing more will come.
    pub(crate) quiet: Duration,
    /// So long without any frame: the switch does not forward.
    pub(crate) stall: Duration,
    /// A backlog that the switch takes so soon after the end was no refusal.
    pub(crate) grace: Duration,
}

impl Trial {
    pub(crate) fn new(pace: Pace, seconds: f64) -> Self {
        Self {
            pace,
            time: Duration::from_secs_f64(seconds),
            quiet: Duration::from_millis(200),
            stall: Duration::from_secs(3),
            grace: Duration::from_millis(1),
        }
    }
}

impl Trial {
    /// Its pace, for a progress bar.
    pub(crate) fn describe(&self, tsc_hz: f64) -> String {
        match self.pace {
            Pace::Window(frames) => format!("{frames} in flight"),
            Pace::Every(cycles) => format!("{:.0} frames/s per sender", tsc_hz / cycles),
            Pace::Burst(frames) => format!("bursts of {frames}"),
            Pace::Flood => "as fast as it takes them".to_owned(),
            Pace::Silent => "silent".to_owned(),
        }
    }
}

/// What the threads share.
struct Run<'t> {
    trial: &'t Trial,
    start: u64,
    end: u64,
    hz: f64,
    stop: AtomicBool,
    lied: AtomicBool,
    received: Vec<CachePadded<AtomicU64>>,
    ready: Barrier,
}

/// What a thread did.
#[derive(Clone, Copy, Default)]
struct Spent {
    busy: u64,
    all: u64,
    /// Frames received and frames sent within the time.
    received: u64,
    offered: u64,
    ended: u64,
}

impl Run<'_> {
    fn cycles(&self, time: Duration) -> u64 {
        (time.as_secs_f64() * self.hz) as u64
    }
}

impl Fleet {
    /// Runs a trial. It ends early, and says why, if somebody asks for that or the switch leaves or stops forwarding.
    pub(crate) fn run(
        &mut self,
        trial: &Trial,
        progress: &mut dyn FnMut(f64, f64),
    ) -> Result<Outcome> {
        let hz = self.tsc_hz;
        let (threads, per_thread) = shares(self.lanes.len(), self.cpus.len());
        let start = tsc() + (LEAD.as_secs_f64() * hz) as u64;
        let end = start + (trial.time.as_secs_f64() * hz) as u64;
        let before = self.begin(trial.pace, start, end);
        let run = Run {
            trial,
            start,
            end,
            hz,
            stop: AtomicBool::new(false),
            lied: AtomicBool::new(false),
            received: (0..threads).map(|_| CachePadded::default()).collect(),
            ready: Barrier::new(threads),
        };
        let (guests, cpus) = (&self.guests, &self.cpus);
        let (spent, watched) = std::thread::scope(|scope| {
            let handles: Vec<_> = self
                .lanes
                .chunks_mut(per_thread)
                .enumerate()
                .map(|(number, lanes)| {
                    let (run, cpu) = (&run, cpus.get(number).copied());
                    scope.spawn(move || drive(lanes, run, number, cpu))
                })
                .collect();
            let watched = watch(&run, guests, progress, || {
                handles
                    .iter()
                    .all(std::thread::ScopedJoinHandle::is_finished)
            });
            let spent: Vec<_> = handles.into_iter().map(|handle| handle.join()).collect();
            (spent, watched)
        });
        let mut all = Spent::default();
        for one in spent {
            let one = one.map_err(|_| anyhow::anyhow!("a thread of the generator panicked"))??;
            all.busy += one.busy;
            all.all += one.all;
            all.received += one.received;
            all.offered += one.offered;
            all.ended = all.ended.max(one.ended);
        }
        let (steps, partial) = watched;
        Ok(self.outcome(&before, all, start, steps, partial))
    }

    /// Prepares senders and sinks; returns the first number of each stream.
    fn begin(&mut self, pace: Pace, start: u64, end: u64) -> Vec<u64> {
        let mut first = vec![0; self.receivers.len()];
        let senders = self.senders().max(1) as u64;
        let mut number = 0;
        for queue in self.lanes.iter_mut().flat_map(|lane| &mut lane.queues) {
            for stream in queue.sender.streams() {
                first[usize::from(stream.id)] = stream.sequence();
            }
            // Senders take turns within the time between two frames.
            let phase = match pace {
                Pace::Every(cycles) => (cycles * number as f64 / senders as f64) as u64,
                _ => 0,
            };
            number += u64::from(!queue.sender.streams().is_empty());
            queue.sender.begin(pace, start + phase, end);
        }
        // What an earlier trial left behind.
        while self.look() > 0 {}
        for lane in &mut self.lanes {
            lane.sink.begin(|id| first.get(usize::from(id)).copied());
        }
        first
    }

    fn outcome(
        &mut self,
        before: &[u64],
        spent: Spent,
        start: u64,
        steps: Vec<f64>,
        partial: Option<String>,
    ) -> Outcome {
        let ns = 1e9 / self.tsc_hz;
        let count = self.count(before, spent, start);
        let lanes = self.lanes.iter();
        let per_port = |value: fn(&Sender) -> u64| -> Vec<u64> {
            let sum = |lane: &Lane| {
                lane.queues
                    .iter()
                    .map(|queue| value(&queue.sender))
                    .sum::<u64>()
            };
            self.lanes.iter().map(sum).collect()
        };
        let jitters: Vec<_> = lanes
            .map(|lane| lane.sink.jitter())
            .filter(|&jitter| jitter > 0.0)
            .collect();
        let silences = self.lanes.iter().map(|lane| lane.sink.silence());
        // Where nothing comes back, sending is all there is.
        let frames = if spent.received > 0 {
            spent.received
        } else {
            count.sent
        };
        Outcome {
            mpps: if count.seconds > 0.0 {
                spent.received as f64 / count.seconds / 1e6
            } else {
                0.0
            },
            steps,
            offered: per_port(|sender| sender.offered(u64::MAX)),
            sent: per_port(Sender::sent),
            found: self.lanes.iter().map(|lane| lane.sink.found()).collect(),
            gaps_ns: silences.map(|(_, gap)| gap as f64 * ns).collect(),
            jitter_ns: jitters.iter().sum::<f64>() / jitters.len().max(1) as f64 * ns,
            latencies: self
                .lanes
                .iter_mut()
                .map(|lane| lane.sink.latencies().clone())
                .collect(),
            cycles: spent.busy as f64 / frames.max(1) as f64,
            busy: spent.busy as f64 / spent.all.max(1) as f64,
            partial,
            tsc_hz: self.tsc_hz,
            count,
        }
    }

    /// All ports together.
    fn count(&self, before: &[u64], spent: Spent, start: u64) -> Count {
        let (mut expected, mut sent, mut sum) = (0, 0, Found::default());
        for lane in &self.lanes {
            for queue in &lane.queues {
                sent += queue.sender.sent();
                for stream in queue.sender.streams() {
                    let id = usize::from(stream.id);
                    expected += (stream.sequence() - before[id]) * self.receivers[id];
                }
            }
            sum += lane.sink.found();
        }
        Count {
            seconds: spent.ended.saturating_sub(start) as f64 / self.tsc_hz,
            offered: spent.offered.max(sent),
            sent,
            ..counted(&sum.tally, expected)
        }
    }
}

/// Threads, and ports per thread.
fn shares(ports: usize, cpus: usize) -> (usize, usize) {
    let per_thread = ports.div_ceil(cpus.max(1)).max(1);
    (ports.div_ceil(per_thread), per_thread)
}

/// A thread's part.
fn drive(lanes: &mut [Lane], run: &Run<'_>, number: usize, cpu: Option<usize>) -> Result<Spent> {
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
fn watch(
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_shared_among_threads() {
        assert_eq!(shares(2, 0), (1, 2));
        assert_eq!(shares(2, 1), (1, 2));
        assert_eq!(shares(5, 2), (2, 3));
        assert_eq!(shares(1, 4), (1, 1));
        assert_eq!(shares(0, 1), (0, 1));
    }
}
