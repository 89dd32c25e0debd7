//! `ringway-bench rfc2544` and `latency`: the tests of RFC 2544 §26, for switches whose wires are rings.
//!
//! A ring pushes back where a wire cannot: a switch that is too slow leaves frames in it. What was due and was not taken by the
//! end of a trial (and a millisecond) therefore counts as lost, and is told apart as "refused".

mod search;
mod sections;

use anyhow::{Result, bail};

use crate::interrupt;
use crate::load::frames::Frames;
use crate::load::frontends::Frontends;
use crate::load::outcome::Outcome;
use crate::load::sender::Lengths;
use crate::load::session::Session;
use crate::load::target::{self, Target};
use crate::load::trial::Trial;
use crate::load::{rate, seconds};
use crate::report::Output;
use crate::results::{Measurement, Saved, Step, Work};

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
}
