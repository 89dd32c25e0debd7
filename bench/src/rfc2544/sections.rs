//! The tests, a section of RFC 2544 §26 each.

use std::time::Duration;

use anyhow::{Result, bail};

use super::Bench;
use super::search::{Search, find};
use crate::load::sender::Pace;
use crate::load::trial::Trial;
use crate::load::{placement_name, times};
use crate::results::{self, BackToBack, Latency, LossCurve, Measurement, Recovery, Step};
use crate::summary::digits;

impl Bench<'_> {
    /// §26.1: a closed loop says where to begin, then the interval between a rate that passed and one that failed is halved.
    pub(super) fn throughput(&mut self) -> Result<f64> {
        let first = Trial::new(Pace::Window(256), self.options.seconds.min(1.0));
        let closed = self.session.trial(&first)?;
        if closed.mpps <= 0.0 {
            let why = closed
                .partial
                .unwrap_or_else(|| "no frame came back".to_owned());
            bail!("{why}");
        }
        let search = Search {
            start: closed.mpps * 1e6,
            resolution: self.options.resolution,
            repeat: self.options.repeat,
        };
        let (mut steps, mut partial) = (Vec::new(), None);
        let found = find(&search, |pps| {
            let outcome = self.at(pps, self.options.seconds)?;
            let step = self.step(&outcome, pps);
            let passed = step.passed;
            self.session.say(&show_step(&step));
            steps.push(step);
            match outcome.partial {
                Some(why) => bail!("{why}"),
                None => Ok(passed),
            }
        });
        let found = found.unwrap_or_else(|error| {
            partial = Some(format!("{error:#}"));
            let passed = steps.iter().filter(|step| step.passed);
            passed.map(|step| step.offered_mpps * 1e6).reduce(f64::max)
        });
        let end = partial.clone();
        self.line(&match found {
            Some(pps) => format!(
                "  §26.1 throughput  {} Mpps at a loss of at most {} (closed loop: {}), {} trials of {} s, {}",
                digits(pps / 1e6),
                self.options.threshold,
                digits(closed.mpps),
                steps.len(),
                self.options.seconds,
                placement_name(self.session.placement)
            ),
            None => format!(
                "  §26.1 throughput  no rate passed{}",
                partial.as_ref().map_or(String::new(), |why| format!(" until then ({why})"))
            ),
        });
        self.keep(Measurement::Search(results::Search {
            peer: self.session.peer.clone(),
            work: self.work.clone(),
            threshold: self.options.threshold,
            seconds: self.options.seconds,
            steps,
            found_mpps: found.map(|pps| pps / 1e6),
            partial,
        }));
        match (end, found) {
            (Some(why), _) => bail!("{why}"),
            (None, Some(pps)) => Ok(pps),
            (None, None) => bail!(
                "no rate passed with a loss of at most {}",
                self.options.threshold
            ),
        }
    }

    /// §26.2.
    pub(super) fn latency(&mut self, throughput: f64) -> Result<()> {
        for percent in [None, Some(10.0), Some(50.0), Some(90.0)] {
            let outcome = match percent {
                None => {
                    let trial = Trial::new(Pace::Window(1), self.options.seconds);
                    self.session.trial(&trial)?
                }
                Some(percent) => self.at(throughput * percent / 100.0, self.options.seconds)?,
            };
            let all = outcome.latency("all");
            let what = percent.map_or("one frame in flight".to_owned(), |percent| {
                format!(
                    "at {percent} % ({} Mpps)",
                    digits(throughput * percent / 1e8)
                )
            });
            self.line(&format!(
                "  §26.2 latency     {what}, loss {:.6}, {}\n{}",
                outcome.loss(),
                placement_name(self.session.placement),
                times(&all)
            ));
            let mut latencies = vec![all];
            latencies.extend(outcome.by_port());
            self.keep(Measurement::Latency(Latency {
                peer: self.session.peer.clone(),
                work: self.work.clone(),
                percent,
                offered_mpps: percent.map(|percent| throughput * percent / 1e8),
                count: outcome.count.clone(),
                placement: self.session.placement,
                latencies,
                partial: outcome.partial.clone(),
            }));
            if let Some(why) = outcome.partial {
                self.line(&format!(
                    "  PARTIAL: {why}; the last line is what was measured until then"
                ));
                bail!("{why}");
            }
        }
        Ok(())
    }

    /// §26.3.
    pub(super) fn loss(&mut self, throughput: f64) -> Result<()> {
        let (mut steps, mut partial) = (Vec::new(), None);
        for percent in (1..=12).rev().map(|tenth| f64::from(tenth) * 10.0) {
            let pps = throughput * percent / 100.0;
            let outcome = match self.at(pps, self.options.seconds) {
                Ok(outcome) => outcome,
                Err(error) => {
                    partial = Some(format!("{error:#}"));
                    break;
                }
            };
            let step = self.step(&outcome, pps);
            self.line(&format!(
                "  §26.3 loss        {percent:3} %: {}",
                show_step(&step)
            ));
            steps.push(step);
            if outcome.partial.is_some() {
                partial = outcome.partial;
                break;
            }
        }
        self.keep(Measurement::LossCurve(LossCurve {
            peer: self.session.peer.clone(),
            work: self.work.clone(),
            steps,
            partial: partial.clone(),
        }));
        partial.map_or(Ok(()), |why| bail!("{why}"))
    }

    /// §26.4: a burst is a trial at twice the throughput that ends after so many frames.
    pub(super) fn back_to_back(&mut self, throughput: f64) -> Result<()> {
        let rate = 2.0 * throughput;
        let limit = rate * self.options.seconds;
        let mut bursts = Vec::new();
        for time in 0..3 {
            let (mut low, mut high) = (0.0, limit);
            while high - low > (low * self.options.resolution).max(16.0) {
                let frames = if low == 0.0 && high == limit {
                    limit.min(4096.0)
                } else {
                    (low + high) / 2.0
                };
                let known = 1.0 - (high - low) / limit;
                self.session.progress(
                    (f64::from(time) + known) / 3.0,
                    &format!("§26.4, a burst of {frames:.0} frames"),
                );
                let mut trial = Trial::new(self.session.fleet.every(rate)?, frames / rate);
                (trial.grace, trial.quiet) = (Duration::ZERO, Duration::from_millis(20));
                // Without the sentinel: a trial of microseconds.
                let outcome = self.session.fleet.run(&trial, &mut |_, _| ())?;
                if let Some(why) = outcome.partial {
                    bail!("{why}");
                }
                // What is due in the last turn of the loop is not late.
                let late = outcome.refused().saturating_sub(128);
                if late + outcome.count.lost == 0 {
                    low = frames;
                } else {
                    high = frames;
                }
            }
            bursts.push(low as u64);
        }
        self.line(&format!(
            "  §26.4 back-to-back  {bursts:?} frames at {} Mpps (tried up to {})",
            digits(rate / 1e6),
            limit as u64
        ));
        self.keep(Measurement::BackToBack(BackToBack {
            peer: self.session.peer.clone(),
            work: self.work.clone(),
            frames: bursts,
            limit: limit as u64,
        }));
        Ok(())
    }

    /// §26.5, by steps of 10 ms at half the throughput.
    pub(super) fn recovery(&mut self, throughput: f64) -> Result<()> {
        let over = self.at(throughput * 1.1, self.options.seconds)?;
        let mut last = 0.0;
        for step in 1..=20 {
            self.session
                .progress(f64::from(step) / 20.0, "§26.5, recovery");
            let mut trial = Trial::new(self.session.fleet.every(throughput * 0.5)?, 0.01);
            trial.quiet = Duration::from_millis(20);
            let outcome = self.session.fleet.run(&trial, &mut |_, _| ())?;
            if outcome.loss() > 0.0 {
                last = f64::from(step) * 10.0;
            }
            if let Some(why) = outcome.partial {
                bail!("{why}");
            }
        }
        self.line(&format!(
            "  §26.5 recovery    the last loss at 50 % was {} after the overload (110 %, loss {:.4})",
            if last > 0.0 { format!("at most {last} ms") } else { "none".to_owned() },
            over.loss()
        ));
        self.keep(Measurement::Recovery(Recovery {
            peer: self.session.peer.clone(),
            work: self.work.clone(),
            overload_loss: over.loss(),
            last_loss_ms: last,
        }));
        Ok(())
    }
}

fn show_step(step: &Step) -> String {
    format!(
        "offered {} Mpps, received {}, loss {:.6} (refused {:.6}) {}, {}",
        digits(step.offered_mpps),
        digits(step.received_mpps),
        step.loss,
        step.refused,
        if step.passed { "passed" } else { "failed" },
        placement_name(step.placement)
    )
}
