//! `ringway-bench chain`: frames through several containers one after the other, as service chains have them.

use anyhow::{Context, Result, bail, ensure};

use super::{gather, with_ports};
use crate::kernel::{GENERATOR, Way, chain as row};
use crate::load::frames::Frames;
use crate::load::frontends::Frontends;
use crate::load::sender::Pace;
use crate::load::session::{self, Session};
use crate::load::target::{self, Target};
use crate::load::trial::Trial;
use crate::load::{faults, placement_name, seconds, times};
use crate::peers::kernel::Running;
use crate::peers::{Place, Setup, Switch};
use crate::process::Priority;
use crate::report::Output;
use crate::results::{Chain, Measurement, Saved, Version, Work};
use crate::sentinel::{Placement, look, tsc_hz};
use crate::summary::digits;

/// Sends frames through chains of containers, each of which passes them on to the next, and measures rate, latency and jitter
/// from the first to the last.
///
/// After Anderson et al., Performance Considerations of Network Functions Virtualization using Containers (ICNC 2016). A container
/// here is a port of its own: it takes each frame, addresses it to the next container and sends it, with one copy. All of
/// them run on the generator's CPU, so the rate of a long chain is theirs; the latency with one frame in flight is the switch's.
///
/// --switch bridge and macvlan are what plain Docker does, with a generator of their own (packet sockets): there every other container
/// runs on the switch's CPU, and the kernel's work is done by the thread that sends.
#[derive(Debug, clap::Args)]
pub(crate) struct ChainArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    frontends: Frontends,
    #[command(flatten)]
    frames: Frames,
    /// Numbers of containers between the first and the last
    #[arg(long, value_name = "NUMBER,...", value_delimiter = ',', default_value = "1,2,4,8", value_parser = clap::value_parser!(u16).range(1..=64))]
    lengths: Vec<u16>,
    /// How long, for each length
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    #[command(flatten)]
    output: Output,
}

/// Runs the subcommand.
pub(crate) fn run(options: &ChainArgs) -> Result<()> {
    target::for_each(&options.target, &options.output, |target| {
        gather(&options.lengths, |&length| {
            one(options, target, usize::from(length))
        })
    })
}

fn one(options: &ChainArgs, target: &Target, length: usize) -> Result<(Saved, String)> {
    let ports = length + 2;
    if let Some(way) = target.name().and_then(Way::named) {
        return through_the_kernel(options, target, way, length);
    }
    let target = with_ports(target, ports);
    let mut session = Session::attached(&target, &options.frontends, &options.frames, Some(ports))?;
    ensure!(
        session.ports == ports,
        "a chain of {length} takes {ports} ports, there are {}",
        session.ports
    );
    session.fleet.wire_chain()?;
    session.fleet.announce(1)?;
    let mut trial = Trial::new(Pace::Window(256), 0.3);
    session.trial(&trial)?;
    trial.time = std::time::Duration::from_secs_f64(options.seconds);
    let loaded = session.trial(&trial)?;
    trial.pace = Pace::Window(1);
    let single = session.trial(&trial)?;
    let latency = single.latency("one in flight");
    let text = format!(
        "{}: a chain of {length}: {} Mpps, jitter {:.2} µs, {}\n{}\n{}\n",
        session.peer,
        digits(loaded.mpps),
        single.jitter_ns / 1e3,
        placement_name(session.placement),
        faults(&loaded.count),
        times(&latency)
    );
    session.saved.measurements.push(Measurement::Chain(Chain {
        peer: session.peer.clone(),
        work: options.frames.work(&options.frontends, ports),
        length: length as u32,
        mpps: loaded.mpps,
        latency,
        jitter_ns: single.jitter_ns,
        count: loaded.count.clone(),
        placement: session.placement,
    }));
    let complete = loaded.partial.is_none() && single.partial.is_none();
    Ok((session.close(complete), text))
}

/// The same on links of the kernel.
fn through_the_kernel(
    options: &ChainArgs,
    target: &Target,
    way: Way,
    length: usize,
) -> Result<(Saved, String)> {
    if let Some(missing) = way.missing() {
        bail!("{missing}");
    }
    let frame = options
        .frames
        .size
        .only()
        .filter(|&len| (40..=9000).contains(&len))
        .with_context(|| format!("--switch {}: one frame size of 40 to 9000", way.name()))?;
    let (cpus, hz) = (target.cpus()?, tsc_hz());
    let priority = Priority::raise(target.nice);
    let mut saved = session::saved(hz, cpus, priority.nice());
    let directory = tempfile::Builder::new().prefix("rwb").tempdir()?;
    let place = Place {
        directory: directory.path().to_owned(),
        cpus,
        containers: Vec::new(),
    };
    let setup = Setup {
        ports: length + 2,
        jumbo: frame > 1518,
        stations: false,
        queues: 1,
    };
    let links = Running::start(way, setup, &place)?;
    let chain = row::Chain::open(&links.containers, cpus.pair(), frame.into(), hz)?;
    let time = std::time::Duration::from_secs_f64(options.seconds);
    let sentinel = || Ok::<_, anyhow::Error>(look(cpus.pair(), session::SENTINEL)?.round_trip_ns);
    chain.run(256, time / 4)?;
    let loaded = chain.run(256, time)?;
    let before = sentinel()?;
    let single = chain.run(1, time)?;
    let placement = Some(Placement::between(before, sentinel()?));
    let peer = way.name().to_owned();
    let text = format!(
        "{peer}, {GENERATOR}: a chain of {length}: {} Mpps, jitter {:.2} µs, {}\n{}\n{}\n",
        digits(loaded.mpps),
        single.jitter_ns / 1e3,
        placement_name(placement),
        faults(&loaded.count),
        times(&single.latency)
    );
    saved.caveats.push(format!("{peer}: {GENERATOR}"));
    saved.versions.push(Version {
        name: peer.clone(),
        version: links.version().to_owned(),
    });
    saved.measurements.push(Measurement::Chain(Chain {
        peer,
        work: Work {
            title: format!("{frame} B, no rings; {GENERATOR}"),
            frame: Some(frame.into()),
            rings: "none".to_owned(),
            ports: length as u32 + 2,
            stations: 1,
        },
        length: length as u32,
        mpps: loaded.mpps,
        latency: single.latency,
        jitter_ns: single.jitter_ns,
        count: loaded.count,
        placement,
    }));
    Ok((saved, text))
}
