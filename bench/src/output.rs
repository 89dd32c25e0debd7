//! A comparison in the form that all runs are saved in.

use std::fmt::Write;

use crate::compare::Report;
use crate::kernel::{GENERATOR, Way};
use crate::results::{self, FORMAT, Measurement, Saved, Throughput};
use crate::rows::ROWS;
use crate::sample::Sample;
use crate::summary::digits;

/// Every sample, the discarded ones too.
pub(crate) fn saved(report: &Report) -> Saved {
    let mut measurements = Vec::new();
    for row in &ROWS {
        for peer in peers(&report.samples) {
            let of_cell = report
                .samples
                .iter()
                .filter(|sample| (sample.row, sample.peer) == (row.name, peer));
            let samples: Vec<_> = of_cell.map(saved_sample).collect();
            if !samples.is_empty() {
                measurements.push(Measurement::Throughput(Throughput {
                    peer: peer.to_owned(),
                    row: row.name.to_owned(),
                    work: row.work(),
                    base: row.base.map(str::to_owned),
                    hop: row.traffic.is_hop(),
                    samples,
                }));
            }
        }
    }
    let mut caveats = vec![format!(
        "{} rounds of {} s per switch and row",
        report.rounds, report.seconds
    )];
    caveats.extend(
        report
            .left_out
            .iter()
            .map(|line| format!("left out: {line}")),
    );
    caveats.extend(report.failures.iter().map(|line| format!("failed: {line}")));
    caveats.extend(generators(&report.samples));
    caveats.extend(losses(&report.samples));
    Saved {
        format: FORMAT,
        version: report.version.to_owned(),
        command: report.command.clone(),
        started: report.started,
        host: report.host.clone(),
        cpus: report.cpus,
        nice: report.nice,
        complete: report.complete,
        versions: report
            .peers
            .iter()
            .map(|peer| results::Version {
                name: peer.name.to_owned(),
                version: peer.version.clone(),
            })
            .collect(),
        caveats,
        measurements,
    }
}

/// The switches in the order of their first sample.
fn peers(samples: &[Sample]) -> Vec<&'static str> {
    crate::report::each(samples.iter().map(|sample| sample.peer))
}

fn saved_sample(sample: &Sample) -> results::Sample {
    results::Sample {
        round: sample.round,
        mpps: sample.seen.mpps,
        placement: sample.placement,
        discarded: sample.discarded.clone(),
        switch_cycles: sample.seen.switch_cycles,
        switch_busy: sample.seen.switch_busy,
        client_cycles: sample.seen.client_cycles,
        client_busy: sample.seen.client_busy,
        sentinel_ns: [sample.before_ns, sample.after_ns],
        steps: sample.seen.steps.clone(),
    }
}

/// The ways through the kernel among these switches: what their figures are worth beside the others'.
fn generators(samples: &[Sample]) -> Option<String> {
    let mut ways = peers(samples);
    ways.retain(|peer| Way::named(peer).is_some());
    (!ways.is_empty()).then(|| format!("{}: {GENERATOR}", ways.join(", ")))
}

/// Rows in which a switch lost frames: its closed loop then runs with less depth than that of the others.
fn losses(samples: &[Sample]) -> Vec<String> {
    let mut lines = Vec::new();
    for row in &ROWS {
        let Some(sent) = row.traffic.in_flight() else {
            continue;
        };
        for peer in peers(samples) {
            let of_cell = samples
                .iter()
                .filter(|sample| (sample.row, sample.peer) == (row.name, peer));
            let least = of_cell.filter_map(|sample| sample.seen.in_flight).min();
            // A burst per port may be between two counters.
            if let Some(least) = least.filter(|&least| least + sent / 8 < sent) {
                lines.push(format!(
                    "{peer} lost frames in {}: {least} of {sent} were left in the circle",
                    row.name
                ));
            }
        }
    }
    lines
}

/// A sample in one line.
pub(crate) fn line(sample: &Sample) -> String {
    let cycles = |cycles: Option<f64>| cycles.map_or("–".to_owned(), digits);
    let seen = &sample.seen;
    let mut line = format!(
        "round {} {} {}: {} Mpps, {} + {} cycles, {} ({:.0} → {:.0} ns)",
        sample.round,
        sample.row,
        sample.peer,
        digits(seen.mpps),
        cycles(seen.switch_cycles),
        cycles(seen.client_cycles),
        sample.placement.name(),
        sample.before_ns,
        sample.after_ns,
    );
    if let Some(reason) = &sample.discarded {
        let _ = write!(line, "; discarded: {reason}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::Version;
    use crate::host::Host;
    use crate::sample::Seen;
    use crate::sentinel::Placement;

    fn sample(row: &'static str, peer: &'static str, mpps: f64, placement: Placement) -> Sample {
        Sample {
            row,
            peer,
            round: 1,
            attempt: 1,
            placement,
            discarded: None,
            before_ns: 80.0,
            after_ns: 81.0,
            clock_ghz: [4.3, 4.3],
            seen: Seen {
                mpps,
                in_flight: Some(1024),
                ..Seen::default()
            },
        }
    }

    fn report(samples: Vec<Sample>) -> Report {
        Report {
            version: "0.1.0",
            command: vec!["ringway-bench".to_owned(), "compare".to_owned()],
            started: 0,
            host: Host::look(2.6e9),
            cpus: [0, 1, 0],
            nice: 0,
            rounds: 1,
            seconds: 2.0,
            complete: true,
            peers: vec![Version {
                name: "ovs",
                version: "3.1".to_owned(),
            }],
            left_out: vec!["VPP: no such file".to_owned()],
            failures: vec![],
            samples,
        }
    }

    #[test]
    fn a_run_is_saved_with_every_sample_and_read_back_as_it_was() {
        let saved = saved(&report(vec![
            sample("idle2", "ovs", 16.0, Placement::Near),
            sample("idle64", "ovs", 8.0, Placement::Mixed),
            sample("hop", "ringway", 6.0, Placement::Far),
        ]));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.json");
        saved.write(&path).unwrap();
        let read = Saved::read(&path).unwrap();
        assert_eq!(read.measurements, saved.measurements);
        assert_eq!(read.measurements.len(), 3);
        let unknown = std::fs::read_to_string(&path)
            .unwrap()
            .replace("\"kind\": \"throughput\"", "\"kind\": \"from-the-future\"");
        std::fs::write(&path, unknown).unwrap();
        assert_eq!(
            Saved::read(&path).unwrap().measurements[0],
            Measurement::Unknown
        );
    }

    #[test]
    fn figures_of_another_generator_say_so() {
        let both = [("ringway", 16.0), ("bridge", 0.7)]
            .map(|(peer, mpps)| sample("split64", peer, mpps, Placement::Near));
        let saved = saved(&report(both.to_vec()));
        let named = |line: &String| line.starts_with("bridge: own generator (AF_PACKET");
        assert!(saved.caveats.iter().any(named), "{:?}", saved.caveats);
        let text = crate::report::text(&saved);
        assert!(text.contains("bridge (own generator)"), "{text}");
    }

    #[test]
    fn losses_are_named() {
        let mut lossy = sample("split64", "ovs", 16.0, Placement::Near);
        lossy.seen.in_flight = Some(300);
        let caveats = saved(&report(vec![lossy])).caveats;
        assert!(
            caveats.contains(
                &"ovs lost frames in split64: 300 of 1024 were left in the circle".to_owned()
            ),
            "{caveats:?}"
        );
    }
}
