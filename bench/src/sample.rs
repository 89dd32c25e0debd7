//! One visit to a switch: a new client, the sentinel before and after, a few seconds of counting in between, and the
//! rule that says which samples may be used.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::client::{Cpus, Generator};
use crate::console::PortStats;
use crate::interrupt;
use crate::peers::{Switch, Work};
use crate::process::{Thread, busiest};
use crate::rows::{Row, Traffic};
use crate::sentinel::{Placement, Reading, look};

/// How long the sentinel plays (its clock chain takes another 10 ms).
const SENTINEL: Duration = Duration::from_millis(15);
/// From stopping both processes to the sentinel.
const SETTLE: Duration = Duration::from_millis(20);
/// A sample is cut into steps of about this length: a placement that flips and flips back shows as an uneven rate.
const STEP: Duration = Duration::from_millis(500);
/// The least share of its CPU that a polling thread must have got.
const CPU_SHARE_MIN: f64 = 0.955;
/// The most that the steps of a sample may differ: near and far differ by 1.4 and more.
const UNEVEN_MAX: f64 = 1.25;

/// Which placement is worth waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Wanted {
    /// The CPUs share a cache.
    Near,
    /// They do not.
    Far,
    /// Whatever there is, as long as it stays.
    Any,
}

impl Wanted {
    fn is(self, placement: Placement) -> bool {
        match self {
            Self::Near => placement == Placement::Near,
            Self::Far => placement == Placement::Far,
            Self::Any => placement != Placement::Mixed,
        }
    }
}

/// What is the same for all samples of a run.
#[derive(Clone, Debug)]
pub(crate) struct Rig {
    pub(crate) cpus: Cpus,
    /// Length of a sample.
    pub(crate) time: Duration,
    pub(crate) wanted: Wanted,
    /// For the client's files.
    pub(crate) directory: PathBuf,
    /// Cycles per second of the time stamp counter.
    pub(crate) tsc_hz: f64,
    /// Attempts until a clean sample of the wanted placement.
    pub(crate) attempts: u32,
    /// How long to wait for the wanted placement before an attempt.
    pub(crate) patience: Duration,
    /// The most preemptions of a polling thread per second.
    pub(crate) preempted_max: f64,
}

/// One sample.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    pub(crate) row: &'static str,
    pub(crate) peer: &'static str,
    pub(crate) round: u32,
    pub(crate) attempt: u32,
    pub(crate) placement: Placement,
    /// Why it must not be used.
    pub(crate) discarded: Option<String>,
    /// The sentinel's nanoseconds per round trip.
    pub(crate) before_ns: f64,
    pub(crate) after_ns: f64,
    /// The real clocks of the switch's and the client's core.
    pub(crate) clock_ghz: [f64; 2],
    #[serde(flatten)]
    pub(crate) seen: Seen,
}

/// What was counted.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Seen {
    /// Million frames per second that the client received, both ports added.
    pub(crate) mpps: f64,
    /// The same for each step of the sample.
    pub(crate) steps: Vec<f64>,
    /// TSC cycles per frame of the switch's turns with frames.
    pub(crate) switch_cycles: Option<f64>,
    /// The share of its time that the switch spent on them.
    pub(crate) switch_busy: Option<f64>,
    /// The same of the client.
    pub(crate) client_cycles: Option<f64>,
    pub(crate) client_busy: Option<f64>,
    /// Frames under way at the end: what is missing was lost.
    pub(crate) in_flight: Option<u64>,
    /// The share of its CPU that the switch's polling thread got.
    pub(crate) switch_cpu: f64,
    pub(crate) client_cpu: f64,
    /// Preemptions per second of the switch's polling thread.
    pub(crate) switch_preempted: f64,
    pub(crate) client_preempted: f64,
}

/// Measures a row on a switch with a new client: up to three attempts, all of them returned. The switch must be
/// stopped; it is again afterwards.
pub(crate) fn visit(
    rig: &Rig,
    row: Row,
    peer: &'static str,
    round: u32,
    switch: &mut dyn Switch,
    client_version: &mut String,
) -> Result<Vec<Sample>> {
    switch.proc().resume()?;
    let client = switch
        .prepare(&row)
        .and_then(|()| switch.client(row, rig.cpus, &rig.directory));
    let samples = client.and_then(|mut client| {
        client.version().clone_into(client_version);
        let samples = switch
            .settle(row.ports)
            .and_then(|()| attempts(rig, row, peer, round, switch, &mut *client));
        // Also after an error: the switch answers the client's farewell only while it runs.
        let _ = client.proc().resume();
        let _ = switch.proc().resume();
        client.leave();
        samples
    });
    // Also after an error: else it would poll beside the one that is measured next.
    let paused = switch.proc().pause();
    let samples = samples?;
    paused?;
    Ok(samples)
}

fn attempts(
    rig: &Rig,
    row: Row,
    peer: &'static str,
    round: u32,
    switch: &mut dyn Switch,
    client: &mut dyn Generator,
) -> Result<Vec<Sample>> {
    client.begin()?;
    let many = matches!(row.traffic, Traffic::Stations(_));
    interrupt::sleep(Duration::from_millis(if many { 2500 } else { 800 }))?;
    let mut samples = Vec::new();
    for attempt in 1..=rig.attempts {
        let before = wait_for_placement(rig, switch, client)?;
        let seen = count(rig, &row, switch, client)?;
        let after = stopped_look(rig, switch, client)?;
        let placement = Placement::between(before.round_trip_ns, after.round_trip_ns);
        let sample = Sample {
            row: row.name,
            peer,
            round,
            attempt,
            placement,
            discarded: objection(&row, placement, &seen, rig.preempted_max, switch.polls()),
            before_ns: before.round_trip_ns,
            after_ns: after.round_trip_ns,
            clock_ghz: after.clock_ghz,
            seen,
        };
        let done = sample.discarded.is_none() && rig.wanted.is(placement);
        samples.push(sample);
        if done {
            break;
        }
    }
    Ok(samples)
}

/// Looks with client and switch stopped, and lets both go on.
fn stopped_look(rig: &Rig, switch: &dyn Switch, client: &dyn Generator) -> Result<Reading> {
    client.proc().pause()?;
    switch.proc().pause()?;
    std::thread::sleep(SETTLE);
    let reading = look(rig.cpus.pair(), SENTINEL);
    switch.proc().resume()?;
    client.proc().resume()?;
    interrupt::check()?;
    reading
}

fn wait_for_placement(rig: &Rig, switch: &dyn Switch, client: &dyn Generator) -> Result<Reading> {
    let begin = Instant::now();
    loop {
        let reading = stopped_look(rig, switch, client)?;
        if rig.wanted.is(Placement::of(reading.round_trip_ns)) || begin.elapsed() > rig.patience {
            return Ok(reading);
        }
        interrupt::sleep(Duration::from_millis(100))?;
    }
}

/// Counts for the time of a sample.
fn count(
    rig: &Rig,
    row: &Row,
    switch: &mut dyn Switch,
    client: &mut dyn Generator,
) -> Result<Seen> {
    // What came to rest while both were stopped gets going again.
    interrupt::sleep(SETTLE)?;
    let switch_threads = switch.proc().threads();
    let client_threads = client.proc().threads();
    let begin = Instant::now();
    let switch_work = switch.work()?;
    let switch_begin = Instant::now();
    let client_work = client.forwarded()?;
    let client_begin = Instant::now();
    let mut shows = vec![client.received()?];
    let steps = (rig.time.as_secs_f64() / STEP.as_secs_f64())
        .round()
        .max(1.0) as u32;
    for _ in 0..steps {
        interrupt::sleep(rig.time / steps)?;
        shows.push(client.received()?);
    }
    let client_done = client.forwarded()?;
    let client_time = client_begin.elapsed();
    let switch_done = switch.work()?;
    let switch_time = switch_begin.elapsed();
    let time = begin.elapsed();
    let switch_thread = busiest(&switch_threads, &switch.proc().threads());
    let client_thread = busiest(&client_threads, &client.proc().threads());

    let (mpps, steps) = rate(&shows);
    let (switch_cycles, switch_busy) = cost(switch_work, switch_done, switch_time, rig.tsc_hz);
    let (client_cycles, client_busy) = cost(
        client_work.work(),
        client_done.work(),
        client_time * client_done.cores,
        rig.tsc_hz,
    );
    let per_second = |thread: Thread| thread.preempted as f64 / time.as_secs_f64();
    let share = |thread: Thread| thread.cpu.as_secs_f64() / time.as_secs_f64();
    Ok(Seen {
        mpps,
        steps,
        switch_cycles,
        switch_busy,
        client_cycles,
        client_busy,
        in_flight: row
            .traffic
            .in_flight()
            .map(|_| client_done.tx.saturating_sub(client_done.rx)),
        switch_cpu: share(switch_thread),
        client_cpu: share(client_thread),
        switch_preempted: per_second(switch_thread),
        client_preempted: per_second(client_thread),
    })
}

/// The rate over all looks at the counters, and the rate of each step, in million frames per second. testpmd's own
/// rate has testpmd's own clock: the commands reach it late on a CPU that it shares with a busy switch.
fn rate(shows: &[Vec<PortStats>]) -> (f64, Vec<f64>) {
    let ports = shows.first().map_or(0, Vec::len);
    let mut total = 0.0;
    for port in 0..ports {
        let (mut frames, mut seconds) = (0.0, 0.0);
        for (before, after) in shows.iter().zip(&shows[1..]) {
            let step = after[port]
                .rx_packets
                .saturating_sub(before[port].rx_packets) as f64;
            if after[port].rx_pps > 0 {
                frames += step;
                seconds += step / after[port].rx_pps as f64;
            }
        }
        total += if seconds > 0.0 { frames / seconds } else { 0.0 };
    }
    let step =
        |ports: &Vec<PortStats>| ports.iter().map(|port| port.rx_pps as f64).sum::<f64>() / 1e6;
    (total / 1e6, shows.iter().skip(1).map(step).collect())
}

/// Cycles per frame and the share of the time spent busy, between two looks that lie `time` apart.
fn cost(
    before: Option<Work>,
    after: Option<Work>,
    time: Duration,
    tsc_hz: f64,
) -> (Option<f64>, Option<f64>) {
    let (Some(before), Some(after)) = (before, after) else {
        return (None, None);
    };
    let frames = after.frames.saturating_sub(before.frames);
    let busy = after.busy - before.busy;
    let all = match (before.all, after.all) {
        (Some(before), Some(after)) => after - before,
        _ => time.as_secs_f64() * tsc_hz,
    };
    (
        (frames > 0).then(|| busy / frames as f64),
        (all > 0.0).then(|| busy / all),
    )
}

/// Why a sample must not be used.
fn objection(
    row: &Row,
    placement: Placement,
    seen: &Seen,
    preempted_max: f64,
    polls: bool,
) -> Option<String> {
    if placement == Placement::Mixed {
        return Some("the placement changed or is unclear".to_owned());
    }
    if seen.mpps <= 0.0 || seen.steps.contains(&0.0) {
        return Some("the traffic stood still".to_owned());
    }
    for (who, cpu, preempted) in [
        ("switch", seen.switch_cpu, seen.switch_preempted),
        ("client", seen.client_cpu, seen.client_preempted),
    ] {
        if who == "switch" && !polls {
            continue; // it sleeps when it has nothing to do, and has several threads
        }
        if cpu < CPU_SHARE_MIN {
            return Some(format!("the {who} got {:.1} % of its CPU", cpu * 100.0));
        }
        if preempted > preempted_max {
            return Some(format!(
                "the {who} was preempted {preempted:.0} times a second"
            ));
        }
    }
    let least = seen.steps.iter().copied().fold(f64::INFINITY, f64::min);
    let most = seen.steps.iter().copied().fold(0.0, f64::max);
    // With many stations tables fill and age: there the rate may move by itself.
    if row.traffic.in_flight().is_some() && most > least * UNEVEN_MAX {
        return Some(format!(
            "the rate moved between {least:.2} and {most:.2} Mpps"
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Seen {
        Seen {
            mpps: 20.0,
            steps: vec![19.5, 20.5],
            switch_cpu: 0.99,
            client_cpu: 0.97,
            switch_preempted: 12.0,
            client_preempted: 3.0,
            ..Seen::default()
        }
    }

    fn row(name: &str) -> Row {
        *crate::rows::parse(name).unwrap().last().unwrap()
    }

    fn objections(change: impl Fn(&mut Seen)) -> Option<String> {
        let mut seen = good();
        change(&mut seen);
        objection(&row("split64"), Placement::Near, &seen, 60.0, true)
    }

    #[test]
    fn a_clean_sample_is_kept_near_and_far() {
        assert_eq!(
            objection(&row("split64"), Placement::Near, &good(), 60.0, true),
            None
        );
        assert_eq!(
            objection(&row("split64"), Placement::Far, &good(), 60.0, true),
            None
        );
    }

    #[test]
    fn a_sample_of_changing_placement_is_not_used() {
        assert!(
            objection(&row("split64"), Placement::Mixed, &good(), 60.0, true)
                .unwrap()
                .contains("placement")
        );
    }

    #[test]
    fn a_sample_without_its_cpu_is_not_used() {
        assert_eq!(
            objections(|seen| seen.switch_cpu = 0.954).unwrap(),
            "the switch got 95.4 % of its CPU"
        );
        assert_eq!(
            objections(|seen| seen.client_cpu = 0.5).unwrap(),
            "the client got 50.0 % of its CPU"
        );
        assert!(
            objections(|seen| seen.switch_preempted = 61.0)
                .unwrap()
                .contains("preempted 61")
        );
    }

    #[test]
    fn a_flip_and_back_within_a_sample_shows_in_its_steps() {
        let moved = objections(|seen| seen.steps = vec![29.0, 15.0, 29.0]);
        assert_eq!(
            moved.unwrap(),
            "the rate moved between 15.00 and 29.00 Mpps"
        );
    }

    #[test]
    fn with_many_stations_the_rate_may_move() {
        let seen = Seen {
            steps: vec![0.9, 4.7],
            ..good()
        };
        assert_eq!(
            objection(&row("stations10k"), Placement::Near, &seen, 60.0, true),
            None
        );
    }

    #[test]
    fn traffic_that_stands_still_is_named() {
        assert!(
            objections(|seen| seen.steps = vec![20.0, 0.0])
                .unwrap()
                .contains("stood still")
        );
    }

    #[test]
    fn rates_of_both_ports_are_added_and_steps_weigh_by_their_time() {
        let show = |packets, pps| {
            vec![
                PortStats {
                    rx_packets: packets,
                    rx_pps: pps
                };
                2
            ]
        };
        // A second at 2 Mpps and three at 6 Mpps: 5 Mpps on each port.
        let (mpps, steps) = rate(&[
            show(100, 0),
            show(2_000_100, 2_000_000),
            show(20_000_100, 6_000_000),
        ]);
        assert!((mpps - 10.0).abs() < 1e-9, "{mpps}");
        assert_eq!(steps, [4.0, 12.0]);
    }

    #[test]
    fn cycles_per_frame_come_from_the_difference_of_two_looks() {
        let look = |frames, busy, all| Some(Work { frames, busy, all });
        let (cycles, busy) = cost(
            look(10, 1000.0, None),
            look(110, 6000.0, None),
            Duration::from_secs(1),
            10_000.0,
        );
        assert_eq!((cycles, busy), (Some(50.0), Some(0.5)));
        let (_, busy) = cost(
            look(0, 0.0, Some(0.0)),
            look(1, 20.0, Some(80.0)),
            Duration::from_secs(1),
            1.0,
        );
        assert_eq!(busy, Some(0.25));
        assert_eq!(
            cost(None, look(1, 1.0, None), Duration::from_secs(1), 1.0),
            (None, None)
        );
        assert_eq!(
            cost(
                look(1, 1.0, None),
                look(1, 1.0, None),
                Duration::from_secs(1),
                1.0
            )
            .0,
            None
        );
    }
}
