//! `ringway-bench rfc2889`: the parts of RFC 2889 that apply to a switch whose ports are rings.

use anyhow::{Result, ensure};

use crate::interrupt;
use crate::load::frames::Frames;
use crate::load::frontends::Frontends;
use crate::load::outcome::Outcome;
use crate::load::seconds;
use crate::load::sender::Pace;
use crate::load::session::Session;
use crate::load::stream::FLOWS_MAX;
use crate::load::target::{self, Target};
use crate::load::trial::Trial;
use crate::load::wiring::Wire;
use crate::report::Output;
use crate::results::{AddressStep, Addresses, Count, HeadOfLine, Measurement, Saved};
use crate::scenario::{gather, own_switch, with_ports};
use crate::summary::digits;

/// The tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Test {
    /// §5.5: does a port that takes nothing cost frames to a free one?
    HeadOfLine,
    /// §5.7: how many stations does the switch keep?
    Caching,
    /// §5.8: how fast may they appear?
    Learning,
    /// §5.10: broadcast frames received per second, all receivers together
    Broadcast,
}

/// Measures a switch by RFC 2889: head-of-line blocking (§5.5), address caching capacity (§5.7), address learning rate (§5.8),
/// broadcast forwarding (§5.10).
///
/// For §5.1 to §5.3 (meshes) see `rfc2544 --pattern mesh`. The switch is started anew for every number of stations.
#[derive(Debug, clap::Args)]
pub(crate) struct Rfc2889 {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    frontends: Frontends,
    /// Which tests
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "head-of-line,caching,learning,broadcast"
    )]
    tests: Vec<Test>,
    /// §5.7: numbers of stations to try
    #[arg(long, value_name = "NUMBER,...", value_delimiter = ',', default_value = "1000,8000,64000,256000,1000000", value_parser = clap::value_parser!(u32).range(1..=i64::from(FLOWS_MAX)))]
    stations: Vec<u32>,
    /// §5.8: stations per second to try, with 8000 stations each
    #[arg(
        long,
        value_name = "STATIONS/S,...",
        value_delimiter = ',',
        default_value = "10000,100000,1000000,5000000"
    )]
    rates: Vec<u32>,
    /// Length of a trial
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    #[command(flatten)]
    output: Output,
}

/// Stations that the learning rate is measured with.
const LEARNT: u32 = 8000;
/// Frames per second of a probe, slow enough for any switch: what is flooded is not known.
const PROBE: f64 = 200_000.0;
/// Announcements per second where the learning rate is not what is measured.
const CALM: f64 = 100_000.0;

/// Runs the subcommand.
pub(crate) fn run(options: &Rfc2889) -> Result<()> {
    target::for_each(&options.target, &options.output, |target| {
        own_switch(target, "rfc2889")?;
        gather(&options.tests, |test| match test {
            Test::HeadOfLine => head_of_line(options, target),
            Test::Caching => caching(options, target),
            Test::Learning => learning(options, target),
            Test::Broadcast => broadcast(options, target),
        })
    })
}

fn open(options: &Rfc2889, target: &Target, ports: usize, stations: u32) -> Result<Session> {
    let frames = Frames {
        stations,
        ..Frames::plain(64)
    };
    let target = with_ports(target, ports);
    Session::attached(&target, &options.frontends, &frames, Some(ports))
}

/// Announces so many stations behind port 1 at a rate, sends to each of them from one station at port 0, and counts at port 2
/// what the switch flooded.
fn probe(
    options: &Rfc2889,
    target: &Target,
    stations: u32,
    rate: f64,
) -> Result<(Session, AddressStep)> {
    let mut session = open(options, target, 3, stations)?;
    session
        .fleet
        .wire(&[Wire { from: 0, to: 1 }], stations, 0)?;
    session.fleet.one_source(0);
    session.fleet.announce_port(1, stations, Some(rate))?;
    let pace = session.fleet.every(PROBE)?;
    let time = f64::from(stations) / PROBE;
    let outcome = session.trial(&Trial::new(pace, time.max(0.01)))?;
    let step = AddressStep {
        stations: u64::from(stations),
        rate,
        flooded: outcome.found[2].tally.foreign,
        lost: outcome.count.lost,
    };
    Ok((session, step))
}

fn show(step: &AddressStep) -> String {
    format!(
        "  {} stations at {:.0}/s: {} frames flooded, {} lost\n",
        step.stations, step.rate, step.flooded, step.lost
    )
}

/// §5.7.
fn caching(options: &Rfc2889, target: &Target) -> Result<(Saved, String)> {
    let tries = options
        .stations
        .iter()
        .map(|&count| (count, CALM.max(f64::from(count) / 5.0)));
    addresses(
        options,
        target,
        "caching capacity (RFC 2889 §5.7)",
        tries.collect(),
        |step| step.stations as f64,
    )
}

/// §5.8.
fn learning(options: &Rfc2889, target: &Target) -> Result<(Saved, String)> {
    let tries = options.rates.iter().map(|&rate| (LEARNT, f64::from(rate)));
    addresses(
        options,
        target,
        "learning rate (RFC 2889 §5.8)",
        tries.collect(),
        |step| step.rate,
    )
}

fn addresses(
    options: &Rfc2889,
    target: &Target,
    test: &str,
    tries: Vec<(u32, f64)>,
    value: impl Fn(&AddressStep) -> f64,
) -> Result<(Saved, String)> {
    let (mut steps, mut last): (Vec<AddressStep>, Option<Saved>) = (Vec::new(), None);
    let mut text = String::new();
    let mut ended = None;
    for (stations, rate) in tries {
        let probed = interrupt::check().and_then(|()| probe(options, target, stations, rate));
        let (session, step) = match probed {
            Ok(probed) => probed,
            // What was tried before counts.
            Err(error) if !steps.is_empty() => {
                ended = Some(error);
                break;
            }
            Err(error) => return Err(error),
        };
        text += &show(&step);
        steps.push(step);
        last = Some(match last.take() {
            None => session.close(true),
            Some(mut saved) => {
                let last = session.close(true);
                saved.complete &= last.complete;
                saved.caveats.extend(last.caveats);
                saved
            }
        });
    }
    let mut saved = last.ok_or_else(|| anyhow::anyhow!("{test}: nothing to try"))?;
    let known = steps.iter().take_while(|step| step.flooded == 0);
    let found = known.last().map(value);
    let peer = target.name().unwrap_or("switch").to_owned();
    let most = found.map_or("none".to_owned(), |found| format!("{found:.0}"));
    let mut text = format!("{peer}: {test}: {most} without flooding, of those tried\n{text}");
    if let Some(error) = ended {
        text += &format!("  PARTIAL: {error:#}\n");
        saved.complete = false;
        saved
            .caveats
            .push(format!("{test}: ended early: {error:#}"));
    }
    saved.measurements.push(Measurement::Addresses(Addresses {
        peer,
        test: test.to_owned(),
        steps,
        found,
    }));
    Ok((saved, text))
}

/// §5.5: port 0 sends to port 1, which is free, and to port 2, which takes nothing.
fn head_of_line(options: &Rfc2889, target: &Target) -> Result<(Saved, String)> {
    let mut session = open(options, target, 3, 1)?;
    let wires = [Wire { from: 0, to: 1 }, Wire { from: 0, to: 2 }];
    session.fleet.wire(&wires, 1, 0)?;
    session.fleet.announce(1)?;
    let closed = session.trial(&Trial::new(Pace::Window(128), options.seconds.min(1.0)))?;
    ensure!(closed.mpps > 0.0, "no frame came back");
    let pace = session.fleet.every(closed.mpps * 1e6 * 0.3)?;
    let calm = session.trial(&Trial::new(pace, options.seconds))?;
    session.fleet.lanes[2].deaf = true;
    let outcome = session.trial(&Trial::new(pace, options.seconds))?;
    let half = |outcome: &Outcome, port: usize| Count {
        seconds: outcome.count.seconds,
        offered: outcome.count.offered / 2,
        sent: outcome.count.sent / 2,
        received: outcome.found[port].tally.received,
        bytes: outcome.found[port].tally.bytes,
        lost: (outcome.count.sent / 2).saturating_sub(outcome.found[port].tally.received),
        ..Count::default()
    };
    let (free, congested) = (half(&outcome, 1), half(&outcome, 2));
    let blocked = free.received < free.offered - free.offered / 1000
        && half(&calm, 1).received >= free.offered - free.offered / 1000;
    let text = format!(
        "{}: head-of-line blocking (RFC 2889 §5.5) at {} Mpps: {} of {} frames to the free port came: {}\n",
        session.peer,
        digits(closed.mpps * 0.3),
        free.received,
        free.offered,
        if blocked { "blocked" } else { "not blocked" }
    );
    session
        .saved
        .measurements
        .push(Measurement::HeadOfLine(HeadOfLine {
            peer: session.peer.clone(),
            work: Frames::plain(64).work(&options.frontends, 3),
            free,
            congested,
            blocked,
        }));
    Ok((session.close(outcome.partial.is_none()), text))
}

/// §5.10: every port sends broadcast frames only.
fn broadcast(options: &Rfc2889, target: &Target) -> Result<(Saved, String)> {
    let mut session = open(options, target, 4, 1)?;
    let frames = Frames {
        broadcast: 100,
        one_way: true,
        ..Frames::plain(64)
    };
    let wires = frames.wires(4)?;
    session.fleet.wire(&wires, 1, 100)?;
    session.fleet.announce(1)?;
    let outcome = session.trial(&Trial::new(Pace::Window(64), options.seconds))?;
    let text = format!(
        "{}: broadcast forwarding (RFC 2889 §5.10), 4 ports: {} million copies received per second of {} million frames sent, {} lost\n",
        session.peer,
        digits(outcome.mpps),
        digits(outcome.count.sent as f64 / outcome.count.seconds / 1e6),
        outcome.count.lost
    );
    let work = frames.work(&options.frontends, 4);
    let latencies = vec![outcome.latency("all")];
    let load = session.load(work, "window of 64".to_owned(), &outcome, latencies);
    session.saved.measurements.push(Measurement::Load(load));
    Ok((session.close(outcome.partial.is_none()), text))
}
