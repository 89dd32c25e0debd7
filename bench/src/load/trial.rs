//! One trial: every port sends and receives for a time, on one thread or several, and then what was found is added up.

use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use crossbeam::utils::CachePadded;
use ringway::dataplane::clock::tsc;

use super::drive::{Run, Spent, drive, watch};
use super::fleet::{Fleet, Lane};
use super::outcome::{Outcome, counted};
use super::sender::{Pace, Sender};
use super::sink::Found;
use crate::results::Count;

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
