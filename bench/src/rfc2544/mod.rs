//! `ringway-bench rfc2544` and `latency`: the tests of RFC 2544 §26, for switches whose wires are rings.
//!
//! A ring pushes back where a wire cannot: a switch that is too slow leaves frames in it. What was due and was not taken by the
//! end of a trial (and a millisecond) therefore counts as lost, and is told apart as "refused".

mod search;

use std::time::Duration;

use anyhow::{Result, bail};

use crate::interrupt;
use crate::load::frames::Frames;
use crate::load::frontends::Frontends;
use crate::load::outcome::Outcome;
use crate::load::sender::{Lengths, Pace};
use crate::load::target::{self, Session, Target};
use crate::load::trial::Trial;
use crate::load::{placement_name, rate, seconds, times};
use crate::report::Output;
use crate::results::{BackToBack, Latency, LossCurve, Measurement, Saved, Step, Work};
use crate::summary::digits;
use search::{Search, find};

/// The tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Test {
    /// §26.1: the highest rate that loses no more than --threshold, by binary search
    Throughput,
    /// §26.2: latency at 10, 50 and 90 per cent of the throughput, and with one frame in flight
    Latency,
    /// §26.3: loss at 10 to 120 per cent of the throughput
    Loss,
    /// §26.4: the longest burst at twice the throughput without loss
    BackToBack,
    /// §26.5: after overload at 110 per cent, the time until the last loss at 50
    Recovery,
}

/// Measures a switch by RFC 2544: throughput (§26.1), latency (§26.2), frame loss (§26.3), back-to-back frames (§26.4),
/// recovery from overload (§26.5). Reset (§26.6) is `ringway-bench outage`.
///
/// The RFC asks for trials of 60 s and latency from 20 runs; the defaults here are short. All rates are those of all senders together.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Rfc2544 {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    frontends: Frontends,
    #[command(flatten)]
    frames: Frames,
    /// Which tests
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "throughput,latency,loss,back-to-back,recovery"
    )]
    tests: Vec<Test>,
    /// Frame sizes in turn, instead of --size (RFC 2544 §9.1: 64,128,256,512,1024,1280,1518)
    #[arg(long, value_name = "BYTES,...", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(40..=65_000))]
    sizes: Vec<u16>,
    /// Length of a trial
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// The share of the frames that may be lost: 0 is the RFC's throughput, 0.005 a common "partial drop rate"
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    threshold: f64,
    /// The search ends when it knows the rate to this share
    #[arg(long, value_name = "SHARE", default_value_t = 0.02, value_parser = share)]
    resolution: f64,
    /// A trial that lost too much is repeated so often: on a shared machine somebody else may have been at fault
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    repeat: u32,
    /// Do not search: the throughput is this, in frames/s
    #[arg(long, value_name = "FRAMES/S", value_parser = rate)]
    throughput: Option<f64>,
    #[command(flatten)]
    output: Output,
}

/// Measures how long frames take (RFC 2544 §26.2): with one frame in flight, and at 10, 50 and 90 per cent of the throughput,
/// which is searched for first (§26.1) unless --throughput names it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LatencyArgs {
    #[command(flatten)]
    all: Rfc2544,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..1.0).contains(&share) => Ok(share),
        _ => Err("must be at least 0 and less than 1".to_owned()),
    }
}

/// Runs `rfc2544`.
pub(crate) fn run(options: &Rfc2544) -> Result<()> {
    if options.resolution <= 0.0 {
        bail!("--resolution: must be more than 0");
    }
    target::for_each(&options.target, &options.output, |target| {
        one(options, target)
    })
}

/// Runs `latency`.
pub(crate) fn run_latency(options: &LatencyArgs) -> Result<()> {
    run(&Rfc2544 {
        tests: vec![Test::Latency],
        ..options.all.clone()
    })
}

/// One switch.
fn one(options: &Rfc2544, target: &Target) -> Result<(Saved, String)> {
    let sizes: Vec<Lengths> = match options.sizes.as_slice() {
        [] => vec![options.frames.lengths()],
        sizes => sizes.iter().copied().map(Lengths::one).collect(),
    };
    let longest = sizes.iter().map(Lengths::longest).max().unwrap_or(64);
    let attach = Frames {
        size: Lengths::one(longest),
        ..options.frames.clone()
    };
    let mut session = Session::open(target, &options.frontends, &attach)?;
    let wires = options.frames.wires(session.ports)?;
    let mut text = String::new();
    let mut complete = true;
    for size in sizes {
        let frames = Frames {
            size: size.clone(),
            ..options.frames.clone()
        };
        session.fleet.set_lengths(size);
        session
            .fleet
            .wire(&wires, frames.stations, frames.broadcast)?;
        let work = frames.work(&options.frontends, session.ports);
        let mut bench = Bench {
            session: &mut session,
            options,
            work,
            text: String::new(),
        };
        let done = bench.all();
        text += &bench.text;
        if let Err(error) = done {
            complete = false;
            if interrupt::check().is_ok() {
                session
                    .saved
                    .caveats
                    .push(format!("ended early: {error:#}"));
            }
            break;
        }
    }
    Ok((session.close(complete), text))
}

/// The tests of one frame size on one switch.
struct Bench<'s> {
    session: &'s mut Session,
    options: &'s Rfc2544,
    work: Work,
    text: String,
}

impl Bench<'_> {
    fn all(&mut self) -> Result<()> {
        self.line(&format!("{}: {}", self.session.peer, self.work.title));
        let throughput = match self.options.throughput {
            Some(pps) => pps,
            None => self.throughput()?,
        };
        for test in &self.options.tests {
            match test {
                Test::Throughput => {}
                Test::Latency => self.latency(throughput)?,
                Test::Loss => self.loss(throughput)?,
                Test::BackToBack => self.back_to_back(throughput)?,
                Test::Recovery => self.recovery(throughput)?,
            }
        }
        Ok(())
    }

    fn line(&mut self, line: &str) {
        self.text += line;
        self.text.push('\n');
    }

    fn keep(&mut self, measurement: Measurement) {
        self.session.saved.measurements.push(measurement);
    }

    /// A trial at so many frames per second.
    fn at(&mut self, pps: f64, seconds: f64) -> Result<Outcome> {
        let trial = Trial::new(self.session.fleet.every(pps)?, seconds);
        self.session.trial(&trial)
    }

    fn step(&self, outcome: &Outcome, pps: f64) -> Step {
        Step {
            offered_mpps: pps / 1e6,
            received_mpps: outcome.mpps,
            loss: outcome.loss(),
            refused: outcome.refused() as f64 / outcome.count.offered.max(1) as f64,
            passed: outcome.loss() <= self.options.threshold && outcome.partial.is_none(),
            placement: self.session.placement,
        }
    }

    /// §26.1: a closed loop says where to begin, then the interval between a rate that passed and one that failed is halved.
    fn throughput(&mut self) -> Result<f64> {
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
        self.keep(Measurement::Search(crate::results::Search {
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
    fn latency(&mut self, throughput: f64) -> Result<()> {
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
    fn loss(&mut self, throughput: f64) -> Result<()> {
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
    fn back_to_back(&mut self, throughput: f64) -> Result<()> {
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
    fn recovery(&mut self, throughput: f64) -> Result<()> {
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
        self.keep(Measurement::Recovery(crate::results::Recovery {
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
