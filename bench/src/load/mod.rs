//! `ringway-bench load`: the generator and sink, on sockets of any vhost-user switch.

mod drive;
pub(crate) mod fleet;
pub(crate) mod frames;
pub(crate) mod frontends;
pub(crate) mod outcome;
pub(crate) mod relay;
pub(crate) mod sender;
pub(crate) mod session;
pub(crate) mod sink;
pub(crate) mod stream;
pub(crate) mod target;
pub(crate) mod trial;
pub(crate) mod wiring;

#[cfg(test)]
#[path = "tests.rs"]
mod against_backends;

use std::path::PathBuf;

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::report::Output;
use crate::results::{Count, Distribution, Load, Measurement, Saved};
use crate::sentinel::Placement;
use crate::summary::digits;
use fleet::Fleet;
use frames::Frames;
use frontends::Frontends;
use outcome::Outcome;
use sender::Pace;
use session::Session;
use target::Target;
use trial::Trial;

/// Sends frames through a switch as containers do, and checks every frame that comes back.
///
/// Plays a container (a virtio_user driver) at each socket. Every frame carries a sequence number and a time stamp; loss,
/// duplication, reordering and corruption are counted, latencies kept. Without --rate it is a closed loop: a new frame is
/// sent when an earlier one arrived. With --rate it is an open loop: frames have due times and their latency counts from
/// then on, however late the switch took them (no coordinated omission).
#[derive(Debug, clap::Args)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    frontends: Frontends,
    #[command(flatten)]
    frames: Frames,
    /// Closed loop: frames that each sender has in flight; 1 measures the bare latency
    #[arg(
        long,
        value_name = "FRAMES",
        default_value_t = 256,
        conflicts_with = "rate"
    )]
    window: u64,
    /// Open loop: frames per second, all senders together; with k, M or G: 1.5M
    #[arg(long, value_name = "FRAMES/S", value_parser = rate)]
    rate: Option<f64>,
    /// Send only, as fast as the switch takes frames, and expect nothing back (a switch that consumes)
    #[arg(long, conflicts_with_all = ["rate", "window"])]
    flood: bool,
    /// How long
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    seconds: f64,
    /// How long it may send before the measurement begins
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5, value_parser = seconds)]
    warm_up: f64,
    #[command(flatten)]
    output: Output,
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.01..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be between 0.01 and 86400".to_owned()),
    }
}

/// Frames per second, with k, M or G behind the number.
pub(crate) fn rate(text: &str) -> Result<f64, String> {
    let (number, factor) = match text.trim().char_indices().next_back() {
        Some((at, 'k')) => (&text[..at], 1e3),
        Some((at, 'M')) => (&text[..at], 1e6),
        Some((at, 'G')) => (&text[..at], 1e9),
        _ => (text, 1.0),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number * factor),
        _ => Err("must be a positive number of frames per second, like 250000 or 1.5M".to_owned()),
    }
}

/// Runs the subcommand.
pub(crate) fn run(options: &LoadArgs) -> Result<()> {
    target::for_each(&options.target, &options.output, |target| {
        one(options, target)
    })
}

/// One switch.
fn one(options: &LoadArgs, target: &Target) -> Result<(Saved, String)> {
    let mut session = Session::open(target, &options.frontends, &options.frames)?;
    let pace = match (options.rate, options.flood) {
        (Some(rate), _) => session.fleet.every(rate)?,
        (None, true) => Pace::Flood,
        (None, false) => {
            Pace::Window((options.window / u64::from(options.frontends.queues)).max(1))
        }
    };
    let described = match (options.rate, pace) {
        (Some(rate), _) => format!("{rate} frames/s"),
        (None, Pace::Window(_)) => format!("window of {}", options.window),
        _ => "flood".to_owned(),
    };
    let outcome = measure(&mut session, options, pace)?;
    if let Some(why) = &outcome.partial
        && outcome.count.received == 0
        && !options.flood
    {
        bail!("nothing was received: {why}");
    }
    let mut latencies = vec![outcome.latency("all")];
    latencies.extend(outcome.by_port());
    let work = options.frames.work(&options.frontends, session.ports);
    let load = session.load(work, described, &outcome, latencies);
    note_limits(&mut session, options, &outcome);
    let text = show(&load, outcome.mpps);
    session.saved.measurements.push(Measurement::Load(load));
    Ok((session.close(outcome.partial.is_none()), text))
}

fn measure(session: &mut Session, options: &LoadArgs, pace: Pace) -> Result<Outcome> {
    let mut trial = Trial::new(pace, options.warm_up);
    if options.flood {
        trial.stall = std::time::Duration::MAX;
    }
    let warm = session.trial(&trial)?;
    if warm.partial.is_some() {
        return Ok(warm);
    }
    trial.time = std::time::Duration::from_secs_f64(options.seconds);
    session.trial(&trial)
}

/// What the figures do not say by themselves.
fn note_limits(session: &mut Session, options: &LoadArgs, outcome: &Outcome) {
    let caveats = &mut session.saved.caveats;
    if outcome.refused() * 100 > outcome.count.offered {
        let why = if outcome.busy > 0.99 {
            "the generator's own limit, or the switch's rings were full"
        } else {
            "the switch's rings were full"
        };
        caveats.push(format!(
            "{} of {} frames due could not be sent: {why}",
            outcome.refused(),
            outcome.count.offered
        ));
    }
    if options.rate.is_none() && outcome.busy > 0.97 && !options.flood {
        caveats.push(
            "the generator was busy all the time: it, not the switch, may be the limit".to_owned(),
        );
    }
}

/// A bar for a trial; hidden where nobody looks.
pub(crate) fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {elapsed}  {msg}");
    let bar = ProgressBar::new(1000);
    style
        .map(|style| bar.clone().with_style(style))
        .unwrap_or(bar)
}

/// For a terminal.
fn show(load: &Load, mpps: f64) -> String {
    let count = &load.count;
    let mut lines = vec![
        format!(
            "{}: {}, {}, {:.2} s",
            load.peer, load.work.title, load.pace, count.seconds
        ),
        format!(
            "  received   {} Mpps, {} Gbit/s  (steps: {})",
            digits(mpps),
            digits(count.bytes as f64 * 8.0 / count.seconds.max(1e-9) / 1e9),
            load.steps
                .iter()
                .map(|step| digits(*step))
                .collect::<Vec<_>>()
                .join(", ")
        ),
        faults(count),
        format!(
            "  generator  {} cycles per frame, {:.0} % busy",
            digits(load.generator_cycles),
            load.generator_busy * 100.0
        ),
    ];
    if let Some(placement) = load.placement {
        lines.push(format!("  placement  {}", placement.name()));
    }
    lines.extend(load.latencies.iter().filter(|one| one.count > 0).map(times));
    if let Some(why) = &load.partial {
        lines.push(format!(
            "  PARTIAL: {why}; this is what was measured until then"
        ));
    }
    lines.join("\n") + "\n"
}

/// Loss and worse, in one line.
pub(crate) fn faults(count: &Count) -> String {
    let unsent = count.offered.saturating_sub(count.sent);
    let due = if unsent > 0 {
        format!(" ({unsent} more were due)")
    } else {
        String::new()
    };
    format!(
        "  frames     {} sent{due}, {} received, {} lost, {} duplicated, {} reordered, {} corrupted, {} foreign; {} compared whole",
        count.sent,
        count.received,
        count.lost,
        count.duplicated,
        count.reordered,
        count.corrupted,
        count.foreign,
        count.verified
    )
}

/// A distribution in one line.
pub(crate) fn times(times: &Distribution) -> String {
    let us = |ns: f64| digits(ns / 1000.0);
    format!(
        "  latency    {:<12} p50 {} µs, p90 {}, p99 {}, p99.9 {}, p99.99 {}, max {}  (mean {}, n {})",
        times.name,
        us(times.p50),
        us(times.p90),
        us(times.p99),
        us(times.p999),
        us(times.p9999),
        us(times.max),
        us(times.mean),
        times.count
    )
}

/// Near, far, or not known.
pub(crate) fn placement_name(placement: Option<Placement>) -> &'static str {
    placement.map_or("–", Placement::name)
}

/// The generator's ports again, for those who need a fleet of their own.
pub(crate) fn attach(frontends: &Frontends, sockets: &[PathBuf], frames: &Frames) -> Result<Fleet> {
    Fleet::attach(frontends, sockets, &frames.lengths(), frames.verify_every())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_units() {
        assert_eq!(rate("1.5M"), Ok(1_500_000.0));
        assert_eq!(rate("200k"), Ok(200_000.0));
        assert_eq!(rate("17"), Ok(17.0));
        for bad in ["", "M", "0", "-3", "inf", "1.5T"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }
}
