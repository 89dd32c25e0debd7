//! `ringway-bench neighbour`: what an innocent pair loses by a container that behaves badly.

use anyhow::{Result, bail};
use ringway::guest::traffic::Tally;

use super::with_ports;
use crate::load::fleet::Fleet;
use crate::load::frames::Frames;
use crate::load::frontends::Frontends;
use crate::load::outcome::{Outcome, counted};
use crate::load::sender::Pace;
use crate::load::session::Session;
use crate::load::target::{self, Target};
use crate::load::trial::Trial;
use crate::load::wiring::Wire;
use crate::load::{faults, placement_name, seconds, times};
use crate::report::Output;
use crate::results::{Count, Distribution, Measurement, Neighbour, Saved};
use crate::summary::digits;

/// Measures what the first two containers lose by what the other two do: one floods its partner, one floods everybody, one never
/// refills its receive ring, one sends every frame from and to another unknown station, and one sends worst-case frames only.
///
/// A worst-case frame is short and costs a switch the most it can: it lies in as many descriptors as a chain may have (a frame of 64
/// bytes with its header in 38 pieces of 2 bytes; in a table of their own where the switch offers INDIRECT_DESC, which is one jump
/// more), comes from a station never seen before, which has to be learnt, and goes to one that nobody knows, so that it is
/// flooded. The container's receive buffers are in pieces too.
///
/// The innocent pair sends at --percent of what it can reach alone. All four containers run on the generator's CPU: a part of what is lost
/// is the generator's own time; the refused frames tell it.
#[derive(Debug, clap::Args)]
pub(crate) struct NeighbourArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    frontends: Frontends,
    #[command(flatten)]
    frames: Frames,
    /// How long, for each behaviour
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// The innocents' rate in per cent of what they reach alone in a closed loop
    #[arg(long, value_name = "PERCENT", default_value_t = 30.0)]
    percent: f64,
    #[command(flatten)]
    output: Output,
}

/// What the third and fourth containers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behaviour {
    Floods,
    FloodsAll,
    NeverRefills,
    Strangers,
    WorstFrames,
}

impl Behaviour {
    /// The last one changes the container itself.
    const ALL: [Self; 5] = [
        Self::Floods,
        Self::FloodsAll,
        Self::NeverRefills,
        Self::Strangers,
        Self::WorstFrames,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Floods => "floods its partner",
            Self::FloodsAll => "floods everybody (broadcast)",
            Self::NeverRefills => "never refills its receive ring while it is sent to",
            Self::Strangers => "sends from and to unknown stations only",
            Self::WorstFrames => {
                "sends worst-case frames only: in the most descriptors, from and to unknown stations"
            }
        }
    }
}

/// Runs the subcommand.
pub(crate) fn run(options: &NeighbourArgs) -> Result<()> {
    target::for_each(&options.target, &options.output, |target| {
        one(options, target)
    })
}

fn one(options: &NeighbourArgs, target: &Target) -> Result<(Saved, String)> {
    let target = with_ports(target, 4);
    let mut session = Session::attached(&target, &options.frontends, &options.frames, Some(4))?;
    if session.ports < 4 {
        bail!(
            "neighbour: four ports are needed, there are {}",
            session.ports
        );
    }
    let innocent = [Wire { from: 0, to: 1 }, Wire { from: 1, to: 0 }];
    session.fleet.wire(&innocent, 1, 0)?;
    session.fleet.announce(1)?;
    let closed = session.trial(&Trial::new(Pace::Window(256), options.seconds.min(1.0)))?;
    let pps = closed.mpps * 1e6 * options.percent / 100.0;
    if pps <= 0.0 {
        bail!("{}", closed.partial.unwrap_or_default());
    }
    let pace = session.fleet.every(pps)?;
    let alone = session.trial(&Trial::new(pace, options.seconds))?;
    let (alone_count, alone_latency) = of_innocents(&alone);
    let mut text = format!(
        "{}: an innocent pair at {} Mpps, {}\n  alone\n{}\n{}\n",
        session.peer,
        digits(pps / 1e6),
        placement_name(session.placement),
        faults(&alone_count),
        times(&alone_latency)
    );
    for behaviour in Behaviour::ALL {
        prepare(&mut session.fleet, behaviour, &innocent)?;
        let beside = session.trial(&Trial::new(pace, options.seconds))?;
        let (count, latency) = of_innocents(&beside);
        text += &format!(
            "  beside one that {} ({} frames), {}\n{}\n{}\n",
            behaviour.name(),
            beside.sent[2] + beside.sent[3],
            placement_name(session.placement),
            faults(&count),
            times(&latency)
        );
        session
            .saved
            .measurements
            .push(Measurement::Neighbour(Neighbour {
                peer: session.peer.clone(),
                work: options.frames.work(&options.frontends, 4),
                behaviour: behaviour.name().to_owned(),
                alone: alone_count.clone(),
                beside: count,
                alone_latency: alone_latency.clone(),
                beside_latency: latency,
            }));
        if let Some(why) = beside.partial {
            text += &format!("  PARTIAL: {why}\n");
            return Ok((session.close(false), text));
        }
    }
    Ok((session.close(true), text))
}

/// Wires the innocents, and the others to their behaviour.
fn prepare(fleet: &mut Fleet, behaviour: Behaviour, innocent: &[Wire]) -> Result<()> {
    if behaviour == Behaviour::WorstFrames {
        fleet.attach_again(2, |options| {
            options.piece = 1;
            options.indirect = true;
        })?;
    }
    let mut wires = innocent.to_vec();
    wires.push(match behaviour {
        Behaviour::NeverRefills => Wire { from: 3, to: 2 },
        _ => Wire { from: 2, to: 3 },
    });
    fleet.wire(&wires, 1, 0)?;
    fleet.announce(1)?;
    let hostile = if behaviour == Behaviour::NeverRefills {
        3
    } else {
        2
    };
    fleet.set_pace(hostile, Pace::Flood);
    fleet.lanes[2].deaf = behaviour == Behaviour::NeverRefills;
    match behaviour {
        Behaviour::FloodsAll => fleet.retarget(2, crate::load::stream::Target::All, 1),
        // A million stations that nobody has announced: each frame is learnt from and flooded.
        Behaviour::Strangers | Behaviour::WorstFrames => fleet.retarget(
            2,
            crate::load::stream::Target::Stations(u32::MAX / 2),
            crate::load::stream::FLOWS_MAX,
        ),
        _ => {}
    }
    Ok(())
}

/// What the first two ports sent, received, lost.
fn of_innocents(outcome: &Outcome) -> (Count, Distribution) {
    let sum = |values: &[u64]| values.iter().take(2).sum::<u64>();
    let mut tally = Tally::default();
    for found in &outcome.found[..2] {
        tally += found.tally;
    }
    let sent = sum(&outcome.sent);
    let count = Count {
        seconds: outcome.count.seconds,
        offered: sum(&outcome.offered),
        sent,
        ..counted(&tally, sent)
    };
    (count, outcome.latency_of("innocents", &[0, 1]))
}
