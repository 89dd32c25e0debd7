//! `ringway-bench footprint`: memory and CPU of a switch whose containers are silent.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{own_switch, room_for, with_ports};
use crate::interrupt;
use crate::load::frames::Frames;
use crate::load::frontends::Frontends;
use crate::load::seconds;
use crate::load::session::Session;
use crate::load::target::{self, Target};
use crate::report::Output;
use crate::results::{Footprint, Measurement, Saved};

/// Measures memory, CPU time and threads of a switch that has containers and nothing to do.
#[derive(Debug, clap::Args)]
pub(crate) struct FootprintArgs {
    #[command(flatten)]
    target: Target,
    /// Silent containers
    #[arg(long, value_name = "NUMBER", default_value_t = 16, value_parser = clap::value_parser!(u16).range(2..=1000))]
    containers: u16,
    /// How long to watch
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    #[command(flatten)]
    output: Output,
}

/// A switch may still be busy with its containers' arrival.
const SETTLE: Duration = Duration::from_secs(1);

/// Runs the subcommand.
pub(crate) fn run(options: &FootprintArgs) -> Result<()> {
    target::for_each(&options.target, &options.output, |target| {
        own_switch(target, "footprint")?;
        one(options, target)
    })
}

fn one(options: &FootprintArgs, target: &Target) -> Result<(Saved, String)> {
    let count = usize::from(options.containers);
    room_for(count);
    let frontends = Frontends::plain();
    let target = with_ports(target, count);
    let mut session = Session::attached(&target, &frontends, &Frames::plain(64), None)?;
    interrupt::sleep(SETTLE)?;
    let started = session.started.as_ref().context("a switch of ours")?;
    let proc = started.switch.proc();
    let before = proc.threads();
    let watched = std::time::Instant::now();
    let interrupted = watch(&session, Duration::from_secs_f64(options.seconds));
    let after = proc.threads();
    let grown = after.iter().map(|(id, after)| {
        let before = before.get(id).map_or(Duration::ZERO, |before| before.cpu);
        after.cpu.saturating_sub(before).as_secs_f64()
    });
    let cpu = grown.sum::<f64>() / watched.elapsed().as_secs_f64();
    let (resident_mib, hugepages_mib) = memory(proc.pid());
    let mut text = format!(
        "{}: {count} silent containers: {resident_mib:.1} MiB resident (the containers' shared memory as far as it is mapped \
         included), {hugepages_mib:.0} MiB of hugepages, {:.2} CPUs, {} threads\n",
        session.peer,
        cpu,
        after.len()
    );
    let footprint = Footprint {
        peer: session.peer.clone(),
        ports: count as u32,
        resident_mib,
        hugepages_mib,
        cpu,
        threads: after.len() as u32,
    };
    session
        .saved
        .measurements
        .push(Measurement::Footprint(footprint));
    if let Err(why) = &interrupted {
        text += &format!("  PARTIAL: {why:#}; this is of the time until then\n");
        let caveats = &mut session.saved.caveats;
        caveats.push(format!("footprint: watched for a shorter time: {why:#}"));
    }
    Ok((session.close(interrupted.is_ok()), text))
}

/// Waits, with a bar that moves twice a second at most: every wake-up is one of this machine's.
fn watch(session: &Session, time: Duration) -> Result<()> {
    let steps = (time.as_secs_f64() * 2.0).ceil().clamp(1.0, 20.0) as u32;
    for step in 0..steps {
        session.progress(f64::from(step) / f64::from(steps), "watching it rest");
        interrupt::sleep(time / steps)?;
    }
    Ok(())
}

/// Resident memory and hugepages of a process, MiB.
fn memory(pid: u32) -> (f64, f64) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let kib = |label: &str| -> f64 {
        let lines = text.lines().filter_map(|line| line.strip_prefix(label));
        lines
            .filter_map(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
            .sum()
    };
    let huge = kib("Private_Hugetlb:") + kib("Shared_Hugetlb:");
    (kib("Rss:") / 1024.0, huge / 1024.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_has_memory() {
        let (resident, _) = super::memory(std::process::id());
        assert!(resident > 0.5, "{resident}");
    }
}
