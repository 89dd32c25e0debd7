//! One trial: every port sends and receives for a time, on one thread or several, and then what was found is added up.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam::utils::CachePadded;
use hdrhistogram::Histogram;
use ringway::dataplane::clock::tsc;
use ringway::guest::Guest;

use super::fleet::{Fleet, Lane};
use super::sender::Pace;
use super::sink::Found;
use crate::interrupt;
use crate::process::pin;
use crate::results::{Count, Distribution};

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

/// What came of it.
pub(crate) struct Outcome {
    pub(crate) count: Count,
    /// Received within the time, million frames per second.
    pub(crate) mpps: f64,
    pub(crate) steps: Vec<f64>,
    /// By port: latencies in TSC cycles.
    pub(crate) latencies: Vec<Histogram<u64>>,
    /// By port: what it sent and received.
    pub(crate) offered: Vec<u64>,
    pub(crate) sent: Vec<u64>,
    pub(crate) found: Vec<Found>,
    /// By port: the longest time without a frame between two frames, nanoseconds.
    pub(crate) gaps_ns: Vec<f64>,
    pub(crate) jitter_ns: f64,
    /// TSC cycles of the generator per frame received, without idle turns, and the share of its time.
    pub(crate) cycles: f64,
    pub(crate) busy: f64,
    /// Why it ended early.
    pub(crate) partial: Option<String>,
    tsc_hz: f64,
}

/// What the threads share.
struct Run<'t> {
    trial: &'t Trial,
    start: u64,
    end: u64,
    hz: f64,
    stop: AtomicBool,
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
        let seconds = spent.ended.saturating_sub(start) as f64 / self.tsc_hz;
        let ns = 1e9 / self.tsc_hz;
        let (mut expected, mut sent) = (0, Vec::new());
        for lane in &self.lanes {
            for stream in lane.queues.iter().flat_map(|queue| queue.sender.streams()) {
                let id = usize::from(stream.id);
                expected += (stream.sequence() - before[id]) * self.receivers[id];
            }
            sent.push(lane.queues.iter().map(|queue| queue.sender.sent()).sum());
        }
        let found: Vec<_> = self.lanes.iter().map(|lane| lane.sink.found()).collect();
        let mut sum = Found::default();
        found.iter().for_each(|&one| sum += one);
        let silences = self.lanes.iter().map(|lane| lane.sink.silence());
        let gaps_ns = silences.map(|(_, gap)| gap as f64 * ns).collect();
        let jitters: Vec<_> = self
            .lanes
            .iter()
            .map(|lane| lane.sink.jitter())
            .filter(|&jitter| jitter > 0.0)
            .collect();
        let latencies = self
            .lanes
            .iter_mut()
            .map(|lane| lane.sink.latencies().clone())
            .collect();
        let offered: Vec<u64> = self
            .lanes
            .iter()
            .map(|lane| {
                let queues = lane.queues.iter();
                queues.map(|queue| queue.sender.offered(u64::MAX)).sum()
            })
            .collect();
        let all_sent: u64 = sent.iter().sum();
        Outcome {
            mpps: if seconds > 0.0 {
                spent.received as f64 / seconds / 1e6
            } else {
                0.0
            },
            count: Count {
                seconds,
                offered: spent.offered.max(all_sent),
                sent: all_sent,
                received: sum.received,
                bytes: sum.bytes,
                lost: expected.saturating_sub(sum.received + sum.corrupted),
                duplicated: sum.duplicated,
                reordered: sum.reordered,
                corrupted: sum.corrupted,
                foreign: sum.foreign,
                verified: sum.verified,
            },
            steps,
            latencies,
            offered,
            sent,
            found,
            gaps_ns,
            jitter_ns: jitters.iter().sum::<f64>() / jitters.len().max(1) as f64 * ns,
            cycles: spent.busy as f64 / spent.received.max(1) as f64,
            busy: spent.busy as f64 / spent.all.max(1) as f64,
            partial,
            tsc_hz: self.tsc_hz,
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
            if run.stop.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    spent.ended = turn;
    spent.all = turn - run.start;
    spent.received = lanes.iter().map(|lane| lane.sink.found().received).sum();
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
        partial = if interrupt::check().is_err() {
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

impl Outcome {
    /// Frames offered per second, in millions.
    pub(crate) fn offered_mpps(&self) -> f64 {
        self.count.offered as f64 / self.count.seconds.max(1e-9) / 1e6
    }

    /// Frames that were due and that the switch did not take.
    pub(crate) fn refused(&self) -> u64 {
        self.count.offered - self.count.sent
    }

    /// The share of the offered frames that was not received.
    pub(crate) fn loss(&self) -> f64 {
        let lost = self.refused() + self.count.lost + self.count.corrupted;
        lost as f64 / self.count.offered.max(1) as f64
    }

    /// Latencies of all ports.
    pub(crate) fn latency(&self, name: &str) -> Distribution {
        let mut all = self.latencies[0].clone();
        for one in &self.latencies[1..] {
            all.add(one).expect("all have the same bounds");
        }
        distribution(name, &all, self.tsc_hz)
    }

    /// Latencies of some ports.
    pub(crate) fn latency_of(&self, name: &str, ports: &[usize]) -> Distribution {
        let mut some = Histogram::new_from(&self.latencies[0]);
        for &port in ports {
            some.add(&self.latencies[port])
                .expect("all have the same bounds");
        }
        distribution(name, &some, self.tsc_hz)
    }

    /// Latencies of each port that received something.
    pub(crate) fn by_port(&self) -> Vec<Distribution> {
        let ports = self.latencies.iter().enumerate();
        ports
            .filter(|(_, latencies)| !latencies.is_empty())
            .map(|(port, latencies)| {
                distribution(&format!("to port {port}"), latencies, self.tsc_hz)
            })
            .collect()
    }
}

/// A histogram of TSC cycles in nanoseconds.
pub(crate) fn distribution(name: &str, cycles: &Histogram<u64>, tsc_hz: f64) -> Distribution {
    let ns = |cycles: f64| round(cycles * 1e9 / tsc_hz);
    let quantile = |quantile| ns(cycles.value_at_quantile(quantile) as f64);
    let count = cycles.len();
    let mut cdf: Vec<[f64; 2]> = Vec::new();
    if count > 0 {
        // A point per bucket of the logarithmic axis, finer towards the tail.
        for value in cycles.iter_quantiles(12) {
            let point = [ns(value.value_iterated_to() as f64), value.quantile()];
            if cdf.last().is_none_or(|last| last[0] < point[0]) {
                cdf.push(point);
            } else if let Some(last) = cdf.last_mut() {
                last[1] = point[1];
            }
        }
    }
    Distribution {
        name: name.to_owned(),
        count,
        min: if count > 0 {
            ns(cycles.min() as f64)
        } else {
            0.0
        },
        mean: ns(cycles.mean()),
        stdev: ns(cycles.stdev()),
        p50: quantile(0.5),
        p90: quantile(0.9),
        p99: quantile(0.99),
        p999: quantile(0.999),
        p9999: quantile(0.9999),
        max: ns(cycles.max() as f64),
        cdf,
    }
}

/// A tenth of a nanosecond is more than any clock here has.
fn round(ns: f64) -> f64 {
    (ns * 10.0).round() / 10.0
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

    #[test]
    fn a_distribution_is_in_nanoseconds_and_its_curve_ends_at_one() {
        let mut cycles = Histogram::new_with_bounds(1, 1 << 42, 2).unwrap();
        for value in 1..=10_000 {
            cycles.record(value).unwrap();
        }
        let found = distribution("all", &cycles, 2e9);
        assert_eq!(found.count, 10_000);
        assert!((found.p50 - 2500.0).abs() < 30.0, "{found:?}");
        assert!((found.p99 - 4950.0).abs() < 60.0, "{found:?}");
        assert_eq!(found.cdf.last().unwrap()[1], 1.0);
        assert!(found.cdf.is_sorted_by(|a, b| a[0] < b[0] && a[1] <= b[1]));
        assert!(
            distribution("none", &Histogram::new_from(&cycles), 2e9)
                .cdf
                .is_empty()
        );
    }
}
