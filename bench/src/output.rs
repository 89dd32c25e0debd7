//! The tables of a comparison: for people, as Markdown, and as JSON.

use std::fmt::Write;

use crate::compare::Report;
use crate::results::{self, FORMAT, Measurement, Saved, Throughput};
use crate::rows::{ROWS, Row};
use crate::sample::Sample;
use crate::sentinel::Placement;
use crate::summary::{Cell, Spread, cells, digits, peers};
use comfy_table::{CellAlignment, Table, presets};

/// One table, still without a form.
struct Grid {
    title: String,
    lines: Vec<Vec<String>>,
}

const NONE: &str = "–";

fn grids(report: &Report) -> Vec<Grid> {
    let cells = cells(&report.samples);
    let peers = peers(&report.samples);
    let mut grids = Vec::new();
    for placement in [Placement::Near, Placement::Far] {
        let find = |row: &Row, peer: &str| {
            cells
                .iter()
                .find(|cell| (cell.row, cell.peer, cell.placement) == (row.name, peer, placement))
        };
        let rows: Vec<_> = ROWS
            .iter()
            .filter(|row| peers.iter().any(|peer| find(row, peer).is_some()))
            .collect();
        if rows.is_empty() {
            continue;
        }
        grids.push(rates(placement, &rows, &peers, &find));
        grids.push(costs(placement, &rows, &peers, &find));
        grids.extend(shares(placement, &rows, &peers, &find));
    }
    grids
}

/// Rates, and the ratios of the first switch to the others.
fn rates<'c>(
    placement: Placement,
    rows: &[&Row],
    peers: &[&str],
    find: &impl Fn(&Row, &str) -> Option<&'c Cell>,
) -> Grid {
    let mut head = vec!["work".to_owned()];
    head.extend(peers.iter().map(|&peer| peer.to_owned()));
    head.extend(
        peers
            .iter()
            .skip(1)
            .map(|peer| format!("{} / {peer}", peers[0])),
    );
    let mut lines = vec![head];
    for row in rows {
        let mut line = vec![row.title.to_owned()];
        line.extend(peers.iter().map(|peer| match find(row, peer) {
            None => NONE.to_owned(),
            Some(Cell {
                hop_us: Some(hop), ..
            }) => hop.show(" µs"),
            Some(cell) => cell.mpps.show(""),
        }));
        line.extend(peers.iter().skip(1).map(|peer| {
            match (find(row, peers[0]), find(row, peer)) {
                (Some(one), Some(other)) => format!("{:.2}", one.mpps.median / other.mpps.median),
                _ => NONE.to_owned(),
            }
        }));
        lines.push(line);
    }
    let title = format!(
        "{}: Mpps received by the client (one frame in flight: µs per hop), median [min–max]; ratios of rates",
        placement.name()
    );
    Grid { title, lines }
}

/// Cycles per frame and busy shares of switch and client.
fn costs<'c>(
    placement: Placement,
    rows: &[&Row],
    peers: &[&str],
    find: &impl Fn(&Row, &str) -> Option<&'c Cell>,
) -> Grid {
    let side = |cycles: Option<Spread>, busy: Option<Spread>| match (cycles, busy) {
        (Some(cycles), Some(busy)) => {
            format!("{} ({:.0} %)", digits(cycles.median), busy.median * 100.0)
        }
        _ => NONE.to_owned(),
    };
    let mut head = vec!["work".to_owned()];
    head.extend(peers.iter().map(|&peer| peer.to_owned()));
    let mut lines = vec![head];
    for row in rows {
        let mut line = vec![row.title.to_owned()];
        line.extend(peers.iter().map(|peer| match find(row, peer) {
            None => NONE.to_owned(),
            Some(cell) => format!(
                "{} + {}",
                side(cell.switch_cycles, cell.switch_busy),
                side(cell.client_cycles, cell.client_busy)
            ),
        }));
        lines.push(line);
    }
    let title = format!(
        "{}: TSC cycles per frame (and busy share) of the switch + of the client, medians",
        placement.name()
    );
    Grid { title, lines }
}

/// What is left of a row's base under idle ports or many stations.
fn shares<'c>(
    placement: Placement,
    rows: &[&Row],
    peers: &[&str],
    find: &impl Fn(&Row, &str) -> Option<&'c Cell>,
) -> Option<Grid> {
    let mut head = vec!["work, as a share of its base".to_owned()];
    head.extend(peers.iter().map(|&peer| peer.to_owned()));
    let mut lines = vec![head];
    for row in rows {
        let Some(base) = row
            .base
            .and_then(|name| ROWS.iter().find(|row| row.name == name))
        else {
            continue;
        };
        let mut line = vec![row.title.to_owned()];
        line.extend(
            peers
                .iter()
                .map(|peer| match (find(row, peer), find(base, peer)) {
                    (Some(cell), Some(base)) => {
                        format!("{:.2}", cell.mpps.median / base.mpps.median)
                    }
                    _ => NONE.to_owned(),
                }),
        );
        lines.push(line);
    }
    (lines.len() > 1).then(|| Grid {
        title: format!("{}: shares", placement.name()),
        lines,
    })
}

/// The tables, the discarded samples and the circumstances, for a terminal.
pub(crate) fn text(report: &Report) -> String {
    let mut text = String::new();
    for grid in grids(report) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let mut lines = grid.lines.into_iter();
        table.set_header(lines.next().unwrap_or_default());
        table.add_rows(lines);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let _ = writeln!(text, "\n{}\n{table}", grid.title);
    }
    let _ = writeln!(text);
    for note in notes(report) {
        let _ = writeln!(text, "{note}");
    }
    text
}

/// The same as Markdown.
pub(crate) fn markdown(report: &Report) -> String {
    let mut text = String::new();
    for grid in grids(report) {
        let _ = writeln!(text, "**{}**\n", grid.title);
        for (number, line) in grid.lines.iter().enumerate() {
            let _ = writeln!(text, "| {} |", line.join(" | "));
            if number == 0 {
                let _ = writeln!(text, "|---|{}", "--:|".repeat(line.len() - 1));
            }
        }
        let _ = writeln!(text);
    }
    for note in notes(report) {
        let _ = writeln!(text, "- {note}");
    }
    text
}

/// The run in the form that all runs are saved in: every sample, the discarded ones too.
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
    let mut caveats: Vec<String> = Vec::new();
    caveats.extend(
        report
            .left_out
            .iter()
            .map(|line| format!("left out: {line}")),
    );
    caveats.extend(report.failures.iter().map(|line| format!("failed: {line}")));
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

fn saved_sample(sample: &Sample) -> results::Sample {
    results::Sample {
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

/// What has to be known to trust the tables, a line each.
fn notes(report: &Report) -> Vec<String> {
    let host = &report.host;
    let mut notes = vec![
        format!(
            "{}, {} CPUs{}, TSC {} GHz, Linux {}, {}",
            host.cpu,
            host.cpus,
            if host.virtual_machine {
                " (virtual machine)"
            } else {
                ""
            },
            host.tsc_ghz,
            host.kernel,
            host.system
        ),
        format!(
            "switch on CPU {}, client on CPU {}, all else on CPU {}, nice {}",
            report.cpus[0], report.cpus[1], report.cpus[2], report.nice
        ),
        format!(
            "{} rounds of {} s per switch and row; {}",
            report.rounds,
            report.seconds,
            report.command.join(" ")
        ),
    ];
    notes.extend(
        report
            .peers
            .iter()
            .map(|peer| format!("{}: {}", peer.name, peer.version)),
    );
    if !report.complete {
        notes.push("INCOMPLETE: the run ended early; this is what was measured so far".to_owned());
    }
    notes.extend(
        report
            .left_out
            .iter()
            .map(|line| format!("left out: {line}")),
    );
    notes.extend(report.failures.iter().map(|line| format!("failed: {line}")));
    notes.extend(losses(&report.samples));
    let discarded: Vec<_> = report
        .samples
        .iter()
        .filter(|sample| sample.discarded.is_some())
        .collect();
    notes.push(format!(
        "{} samples, {} of them discarded",
        report.samples.len(),
        discarded.len()
    ));
    notes.extend(discarded.into_iter().map(line));
    notes
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
    let cycles = |cycles: Option<f64>| cycles.map_or(NONE.to_owned(), digits);
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
    use crate::summary::tests::sample;

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
            rows: vec![],
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
    fn ratios_compare_ringway_with_each_other_switch() {
        let report = report(vec![
            sample("split64", "ovs", 16.0, Placement::Near),
            sample("split64", "ringway", 40.0, Placement::Near),
        ]);
        let text = markdown(&report);
        assert!(
            text.contains("| work | ringway | ovs | ringway / ovs |"),
            "{text}"
        );
        assert!(text.contains("| 2.50 |"), "{text}");
        assert!(text.contains("40.0 (50 %) + 57.0 (98 %)"), "{text}");
        assert!(text.contains("left out: VPP: no such file"), "{text}");
    }

    #[test]
    fn shares_are_taken_within_one_placement() {
        let text = text(&report(vec![
            sample("idle2", "ovs", 16.0, Placement::Near),
            sample("idle64", "ovs", 8.0, Placement::Near),
            sample("idle64", "ovs", 7.6, Placement::Far),
        ]));
        assert_eq!(text.matches("0.50").count(), 1, "{text}");
        assert!(
            text.contains("near: shares") && text.contains("far: shares"),
            "{text}"
        );
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
    fn discarded_samples_and_losses_are_named() {
        let mut lossy = sample("split64", "ovs", 16.0, Placement::Near);
        lossy.seen.in_flight = Some(300);
        let text = text(&report(vec![
            lossy,
            sample("split64", "ovs", 13.0, Placement::Mixed),
        ]));
        assert!(text.contains("2 samples, 1 of them discarded"), "{text}");
        assert!(
            text.contains(
                "13.0 Mpps, 40.0 + 57.0 cycles, mixed (80 → 81 ns); discarded: the placement"
            ),
            "{text}"
        );
        assert!(
            text.contains("ovs lost frames in split64: 300 of 1024 were left in the circle"),
            "{text}"
        );
    }
}
