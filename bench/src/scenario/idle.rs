//! `ringway-bench idle-ports`: what connected, silent containers cost the two that work.

use anyhow::{Context, Result};

use super::{gather, own_switch, room_for, with_ports};
use crate::load::fleet::Fleet;
use crate::load::frames::Frames;
use crate::load::frontends::{Frontends, Memory};
use crate::load::sender::Pace;
use crate::load::session::Session;
use crate::load::target::{self, Target};
use crate::load::trial::Trial;
use crate::load::{placement_name, seconds};
use crate::report::Output;
use crate::results::{IdlePorts, Measurement, Saved};
use crate::summary::digits;

/// Measures two busy ports among more and more connected, silent ones.
#[derive(Debug, clap::Args)]
pub(crate) struct IdleArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    frontends: Frontends,
    #[command(flatten)]
    frames: Frames,
    /// Numbers of silent ports
    #[arg(long, value_name = "NUMBER,...", value_delimiter = ',', default_value = "0,16,64,256,1000", value_parser = clap::value_parser!(u16).range(0..=4000))]
    counts: Vec<u16>,
    /// How long, for each number
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    #[command(flatten)]
    output: Output,
}

/// Runs the subcommand.
pub(crate) fn run(options: &IdleArgs) -> Result<()> {
    target::for_each(&options.target, &options.output, |target| {
        own_switch(target, "idle-ports")?;
        // Some switches have room for 32 ports: what was measured before counts.
        gather(&options.counts, |&count| {
            one(options, target, usize::from(count))
                .with_context(|| format!("{count} silent ports"))
        })
    })
}

fn one(options: &IdleArgs, target: &Target, count: usize) -> Result<(Saved, String)> {
    room_for(count + 2);
    let target = with_ports(target, count + 2);
    let mut session = Session::attached(&target, &options.frontends, &options.frames, Some(2))?;
    let sockets = match &session.started {
        Some(started) => started.switch.sockets()[2..].to_vec(),
        None => Vec::new(),
    };
    // Small rings of ordinary memory: silent ports shall not take the hugepages of those that work.
    let silent = Frontends {
        ring_size: 64,
        memory: Memory::Memfd,
        queues: 1,
        ..options.frontends.clone()
    };
    let silent = Fleet::attach(&silent, &sockets, &options.frames.lengths(), 64)
        .context("connecting the silent ports")?;
    let wires = options.frames.wires(2)?;
    session.fleet.wire(&wires, options.frames.stations, 0)?;
    session.fleet.announce(options.frames.stations)?;
    session.trial(&Trial::new(Pace::Window(512), 0.5))?;
    let before = session.work();
    let outcome = session.trial(&Trial::new(Pace::Window(512), options.seconds))?;
    let cycles = session.cycles_since(before);
    silent.detach();
    let text = format!(
        "{}: {count:4} silent ports: {} Mpps, switch {} cycles per frame, {}\n",
        session.peer,
        digits(outcome.mpps),
        cycles.map_or("–".to_owned(), digits),
        placement_name(session.placement)
    );
    let measurement = IdlePorts {
        peer: session.peer.clone(),
        work: options.frames.work(&options.frontends, 2),
        idle: count as u32,
        mpps: outcome.mpps,
        switch_cycles: cycles,
        placement: session.placement,
    };
    session
        .saved
        .measurements
        .push(Measurement::IdlePorts(measurement));
    Ok((session.close(outcome.partial.is_none()), text))
}
