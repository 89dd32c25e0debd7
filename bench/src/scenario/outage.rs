//! `ringway-bench outage`: the switch is killed and started again (RFC 2544 §26.6, reset; RFC 6201).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{own_switch, room_for, settle, with_ports};
use crate::interrupt;
use crate::load::fleet::Fleet;
use crate::load::frames::Frames;
use crate::load::frontends::Frontends;
use crate::load::sender::Pace;
use crate::load::target::{self, Session, Target};
use crate::load::trial::Trial;
use crate::peers::Setup;
use crate::report::Output;
use crate::results::{Measurement, Outage, Saved};

/// Kills the switch under traffic (SIGKILL), starts it again, and measures for each container the time without frames (RFC 2544
/// §26.6).
///
/// The containers are clients that try to connect again every 5 ms, with fresh rings. The time a switch takes to start is part of
/// the outage.
#[derive(Debug, clap::Args)]
pub(crate) struct OutageArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    frontends: Frontends,
    #[command(flatten)]
    frames: Frames,
    /// How often
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    times: u32,
    #[command(flatten)]
    output: Output,
}

/// A container without a frame after this does not come back.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the subcommand.
pub(crate) fn run(options: &OutageArgs) -> Result<()> {
    target::for_each(&options.target, &options.output, |target| {
        own_switch(target, "outage")?;
        one(options, target)
    })
}

fn one(options: &OutageArgs, target: &Target) -> Result<(Saved, String)> {
    let ports = target.ports as usize;
    room_for(ports);
    let target = with_ports(target, ports);
    let mut session = Session::open(&target, &options.frontends, &options.frames)?;
    settle(&session)?;
    let mut text = String::new();
    for time in 1..=options.times {
        let gaps_ms = match reset(options, &target, &mut session) {
            Err(error) if time > 1 => {
                text += &format!("  PARTIAL: {error:#}\n");
                return Ok((session.close(false), text));
            }
            other => other?,
        };
        let shown: Vec<_> = gaps_ms
            .iter()
            .map(|gap| gap.map_or("never".to_owned(), |gap| format!("{gap:.1}")))
            .collect();
        text += &format!(
            "{}: outage {time}: {} ms without frames, by port\n",
            session.peer,
            shown.join(", ")
        );
        session.saved.measurements.push(Measurement::Outage(Outage {
            peer: session.peer.clone(),
            event: "killed and started again".to_owned(),
            gaps_ms,
            reconnect: "the containers connect again, trying every 5 ms, with fresh rings"
                .to_owned(),
        }));
    }
    Ok((session.close(true), text))
}

/// Kills and starts the switch; returns each port's milliseconds without frames.
fn reset(options: &OutageArgs, target: &Target, session: &mut Session) -> Result<Vec<Option<f64>>> {
    interrupt::check()?;
    let flowing = session
        .fleet
        .run(&Trial::new(Pace::Window(64), 0.3), &mut |_, _| ())?;
    ensure!(
        flowing.count.received > 0,
        "no frames before the outage: {}",
        flowing.partial.unwrap_or_default()
    );
    // 1. The end.
    let began = Instant::now();
    let mut old = session.started.take().context("a switch of ours")?;
    old.switch.kill()?;
    drop(old);
    // 2. The beginning.
    let setup = Setup {
        ports: session.ports,
        jumbo: options.frames.lengths().longest() > 1518,
        stations: options.frames.stations > 8000,
    };
    let started = target.start(&session.peer, setup)?;
    let sockets = started.switch.sockets().to_vec();
    session.started = Some(started);
    let mut frontends = options.frontends.clone();
    frontends.cpus.clone_from(&session.fleet.cpus);
    frontends.patience = frontends.patience.max(PATIENCE.as_secs_f64());
    session.fleet = crate::load::attach(&frontends, &sockets, &options.frames)?;
    // 3. The first frames: everybody sends to everybody, as ARP would.
    let mut gaps = vec![None; session.ports];
    while gaps.contains(&None) && began.elapsed() < PATIENCE {
        interrupt::check()?;
        session.fleet.hello();
        for (port, lane) in session.fleet.lanes.iter_mut().enumerate() {
            if Fleet::look_at(lane) > 0 {
                gaps[port].get_or_insert(began.elapsed().as_secs_f64() * 1e3);
            }
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    let wires = options.frames.wires(session.ports)?;
    session
        .fleet
        .wire(&wires, options.frames.stations, options.frames.broadcast)?;
    session.fleet.announce(options.frames.stations)?;
    Ok(gaps)
}
