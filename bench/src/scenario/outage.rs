//! `ringway-bench outage`: the switch is killed and started again (RFC 2544 §26.6, reset; RFC 6201).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{own_switch, room_for, settle, with_ports};
use crate::interrupt;
use crate::load::fleet::Fleet;
use crate::load::frames::Frames;
use crate::load::frontends::{Frontends, Rings};
use crate::load::sender::Pace;
use crate::load::session::Session;
use crate::load::target::{self, Target};
use crate::load::trial::Trial;
use crate::peers::Setup;
use crate::report::Output;
use crate::results::{Measurement, Outage, Saved};

/// Kills the switch under traffic (SIGKILL), starts it again, and measures for each container the time without frames (RFC 2544
/// §26.6).
///
/// The containers are clients that try to connect again every 5 ms, with fresh rings. With --listen they listen (virtio_user's
/// server mode), keep their memory and rings, and wait for the switch to find them again. The time a switch takes to start is part of
/// the outage; a container without a frame after 30 s does not come back.
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
    if options.frontends.listen && options.frontends.rings == Rings::Packed {
        bail!(
            "outage --listen: takes split rings; a container gives up packed ones when its switch goes"
        );
    }
    let ports = target.ports as usize;
    room_for(ports);
    let target = with_ports(target, ports);
    let mut session = Session::open(&target, &options.frontends, &options.frames)?;
    settle(&session)?;
    let mut text = String::new();
    for time in 1..=options.times {
        session.progress(
            f64::from(time - 1) / f64::from(options.times),
            &format!("outage {time} of {}", options.times),
        );
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
        let back = gaps_ms.iter().flatten().count();
        text += &format!(
            "{}: outage {time}: {} ms without frames, by port; {back} of {} came back\n",
            session.peer,
            shown.join(", "),
            gaps_ms.len()
        );
        session.saved.measurements.push(Measurement::Outage(Outage {
            peer: session.peer.clone(),
            event: "killed and started again".to_owned(),
            gaps_ms,
            reconnect: match options.frontends.listen {
                false => "the containers connect again, trying every 5 ms, with fresh rings",
                true => "the containers listen and keep their rings; the switch connects again",
            }
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
        queues: options.frontends.queues,
    };
    let listening = session.listening.as_ref();
    let containers = listening.map_or(&[][..], |it| &it.sockets);
    let started = target.start(&session.peer, setup, containers)?;
    let sockets = started.switch.sockets().to_vec();
    session.started = Some(started);
    // 3. The first frames: everybody sends to everybody, as ARP would.
    let gaps = if session.listening.is_some() {
        resumed(&mut session.fleet, began)?
    } else {
        let mut frontends = options.frontends.clone();
        frontends.cpus.clone_from(&session.fleet.cpus);
        frontends.patience = frontends.patience.max(PATIENCE.as_secs_f64());
        session.fleet = crate::load::attach(&frontends, &sockets, &options.frames)?;
        let mut gaps = vec![None; session.ports];
        while gaps.contains(&None) && began.elapsed() < PATIENCE {
            first_frames(&mut session.fleet, &mut gaps, began)?;
        }
        gaps
    };
    let wires = options.frames.wires(session.ports)?;
    session
        .fleet
        .wire(&wires, options.frames.stations, options.frames.broadcast)?;
    if gaps.contains(&None) {
        // The next outage would measure those that are left: the run ends here, with what it found.
        return Ok(gaps);
    }
    session.fleet.announce(options.frames.stations)?;
    Ok(gaps)
}

/// Everybody says hello; notes when each port hears the first.
fn first_frames(fleet: &mut Fleet, gaps: &mut [Option<f64>], began: Instant) -> Result<()> {
    interrupt::check()?;
    fleet.hello();
    for (port, lane) in fleet.lanes.iter_mut().enumerate() {
        if Fleet::look_at(lane) > 0 {
            gaps[port].get_or_insert(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    std::thread::sleep(Duration::from_micros(100));
    Ok(())
}

/// Every container waits for the switch to connect again, each on a thread of its own, with the rings it has.
fn resumed(fleet: &mut Fleet, began: Instant) -> Result<Vec<Option<f64>>> {
    let mut gaps = vec![None; fleet.lanes.len()];
    // What came before the end is still in the rings.
    fleet.look();
    let mut guests = std::mem::take(&mut fleet.guests);
    let listened = std::thread::scope(|scope| -> Result<()> {
        let waits: Vec<_> = guests
            .iter_mut()
            .map(|guest| scope.spawn(|| guest.resume()))
            .collect();
        while gaps.contains(&None) && began.elapsed() < PATIENCE {
            first_frames(fleet, &mut gaps, began)?;
            let failed = waits.iter().filter(|wait| wait.is_finished()).count();
            if failed == waits.len() && began.elapsed() > PATIENCE / 2 {
                break; // all of them are connected, or never will be
            }
        }
        Ok(())
    });
    fleet.guests = guests;
    listened.map(|()| gaps)
}
