//! What an attack adds to the innocents' time on the way through the switch, on a machine where nothing else runs.
//!
//! With `HOSTILE_LATENCY` set (`tests/run --hostile-latency`) each case is run twice on one switch, for about a second each: first
//! its port's guests behave, then they attack. The worker has a processor for itself; all others share the rest, so a frame whose owners'
//! thread had to wait meanwhile says nothing and is not counted ([`super::innocents`]). What a worker was busy with for longer than
//! usual, whoever waited for it, stands in the lengths of its passes.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use ringway::control::state::Idle;
use ringway::dataplane::counters::LENGTHS;
use rustix::thread::{CpuSet, sched_setaffinity};
use testkit::topology::last_cpu;

use super::api;
use super::case::{Case, report};
use super::innocents::quantile;
use super::rig::Rig;
use super::x::X;

/// Names the wish.
pub(super) const LATENCY: &str = "HOSTILE_LATENCY";
/// They take turns of this length, so that what the machine does meanwhile falls on both.
const TIME: Duration = Duration::from_millis(300);
/// Turns of each.
const TURNS: usize = 4;
/// Passes of the worker that are looked at: of 2^21 TSC cycles (0.8 ms at 2.6 GHz) or longer.
const LONG: usize = 21;

/// While latencies are compared: not on the last processor, which the switch's worker has.
pub(super) fn leave_the_worker_alone() -> Result<()> {
    if std::env::var_os(LATENCY).is_none() {
        return Ok(());
    }
    let mut rest = CpuSet::new();
    (0..CPUS.get().copied().unwrap_or(1)).for_each(|cpu| rest.set(cpu));
    sched_setaffinity(None, &rest).context("leave a processor to the worker")
}

/// The last processor, as it was before anybody left it to the worker.
pub(super) fn worker_cpu() -> usize {
    *CPUS.get_or_init(last_cpu)
}

/// While latencies are compared, a worker that sleeps would look like one that is held up.
pub(super) fn idle() -> Idle {
    match std::env::var_os(LATENCY) {
        Some(_) => Idle::Poll,
        None => Idle::Adaptive,
    }
}

/// Processors but the last one, as they were before anybody left one.
static CPUS: std::sync::OnceLock<usize> = std::sync::OnceLock::new();

/// What was seen in the turns of one of the two.
struct Seen {
    times: Histogram<u64>,
    /// Passes of the worker, by length.
    passes: Vec<u64>,
    visits: u64,
}

impl Seen {
    fn nothing() -> Seen {
        Seen {
            times: Histogram::new_with_bounds(1, 1 << 40, 2).expect("bounds in order"),
            passes: vec![0; LENGTHS],
            visits: 0,
        }
    }

    fn p99(&self) -> f64 {
        quantile(&self.times, 0.99)
    }

    /// p50, p99, p99.9 and the longest way in microseconds; long passes per visit, and the exponent of the longest one.
    fn figures(&self) -> String {
        let [a, b, c, d] = [0.5, 0.99, 0.999, 1.0].map(|at| quantile(&self.times, at));
        let long: u64 = self.passes.iter().skip(LONG).sum();
        let longest = self.passes.iter().rposition(|count| *count > 0);
        format!(
            "{a:.1}\t{b:.1}\t{c:.1}\t{d:.0}\t{:.2}\t2^{}",
            long as f64 / self.visits as f64,
            longest.unwrap_or(0)
        )
    }
}

/// One turn: visits, one after the other, each with a seed of its own.
fn turn(
    rig: &Rig,
    case: &Case,
    seen: &mut Seen,
    attack: impl Fn(&mut X<'_>) -> Result<()>,
) -> Result<()> {
    let before = passes(rig)?;
    rig.innocents().take_times()?;
    let began = Instant::now();
    while began.elapsed() < TIME {
        seen.visits += 1;
        let seed = seen.visits;
        rig.visit(case.bridge, seed, &attack)
            .with_context(|| format!("seed {seed}"))?;
    }
    seen.times.add(rig.innocents().take_times()?)?;
    let after = passes(rig)?;
    for ((sum, now), before) in seen.passes.iter_mut().zip(after).zip(before) {
        *sum += now - before;
    }
    Ok(())
}

fn passes(rig: &Rig) -> Result<Vec<u64>> {
    let stats = api::stats(&rig.api)?;
    let worker = stats.workers.first().context("a worker")?;
    Ok(worker.passes.clone())
}

/// A container that behaves, as long as an attack.
fn behave(x: &mut X<'_>) -> Result<()> {
    let mut tame = x.attach(x.options())?;
    tame.announce(x)?;
    x.gets_frames(100, 200)?;
    x.innocents_go_on()?;
    tame.guest.detach()?;
    Ok(())
}

/// Both, and a line in `target/hostile-latency.tsv`: case, p99 more in percent, and the figures of both.
pub(super) fn compare(case: &Case, attack: impl Fn(&mut X<'_>) -> Result<()>) -> Result<()> {
    worker_cpu();
    let rig = Rig::start(case)?;
    leave_the_worker_alone()?;
    let (mut tame, mut wild) = (Seen::nothing(), Seen::nothing());
    turn(&rig, case, &mut Seen::nothing(), behave)?; // to warm up
    for _ in 0..TURNS {
        turn(&rig, case, &mut tame, behave)?;
        turn(&rig, case, &mut wild, &attack)?;
    }
    rig.end()?;
    let more = 100.0 * (wild.p99() / tame.p99() - 1.0);
    let (number, visits) = (case.number, wild.visits);
    let (tame, wild) = (tame.figures(), wild.figures());
    report(
        "hostile-latency.tsv",
        &format!("{number}\t{visits}\t{more:+.0} %\t{tame}\t{wild}\n"),
    )
}
