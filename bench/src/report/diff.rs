//! Two runs beside each other: which figures differ by more than they scatter.

use anyhow::{Result, bail};

use super::figures::{Figure, figures};
use super::{Grid, marked_down, palette, tables};
use crate::host::Host;
use crate::results::Saved;
use crate::summary::{Spread, digits};

/// Differences below this mean nothing, whatever the spreads say: a repeated baseline at both ends of a run moves by half of it.
const NOTHING_BELOW: f64 = 0.08;

/// What came of it.
pub(crate) struct Compared {
    pub(crate) grid: Grid,
    /// Why the figures may differ for other reasons than the switches.
    pub(crate) warnings: Vec<String>,
    /// Which two runs, their versions, figures that only one of them has.
    pub(crate) notes: Vec<String>,
}

impl Compared {
    /// For a terminal.
    pub(crate) fn text(&self) -> String {
        tables(std::slice::from_ref(&self.grid), &self.lines())
    }

    /// The same as Markdown.
    pub(crate) fn markdown(&self) -> String {
        marked_down(std::slice::from_ref(&self.grid), &self.lines())
    }

    fn lines(&self) -> Vec<String> {
        let warnings = self
            .warnings
            .iter()
            .map(|warning| format!("WARNING: {warning}"));
        warnings.chain(self.notes.iter().cloned()).collect()
    }
}

/// Compares a run with an earlier one; fails where they have nothing in common.
pub(crate) fn compare(old: &Saved, new: &Saved) -> Result<Compared> {
    let (before, after) = (figures(old), figures(new));
    let mut grid = Grid::new(
        "then and now: median [least–most] of n samples",
        "figure | switch | placement | unit | then | now | difference | verdict",
    );
    let mut common = 0;
    for new in &after {
        let Some(old) = before.iter().find(|old| old.what == new.what) else {
            continue;
        };
        common += 1;
        grid.lines.extend(line(old, new));
    }
    if common == 0 {
        bail!(
            "they have no figure in common, so there is nothing to compare: the same command with the same switches, sizes and rows \
             makes two runs comparable (and a placement, near or far, that both of them met)"
        );
    }
    Ok(Compared {
        grid,
        warnings: warnings(old, new),
        notes: notes(old, new, common, [before.len(), after.len()]),
    })
}

fn line(old: &Figure, new: &Figure) -> Option<Vec<String>> {
    let before = Spread::of(old.samples.iter().copied())?;
    let after = Spread::of(new.samples.iter().copied())?;
    let what = &new.what;
    let change = change(before.median, after.median);
    Some(vec![
        what.row.clone(),
        what.peer.clone(),
        what.placement.to_owned(),
        what.unit.to_owned(),
        before.show(""),
        after.show(""),
        change.map_or_else(
            || format!("{} → {}", digits(before.median), digits(after.median)),
            |change| format!("{:+.1} %", change * 100.0),
        ),
        verdict(&before, &after, what.more_is_better, what.placement).to_owned(),
    ])
}

/// By which share it grew; none from 0.
fn change(before: f64, after: f64) -> Option<f64> {
    if before == after {
        return Some(0.0);
    }
    (before != 0.0).then(|| after / before - 1.0)
}

/// Whether it got better, and whether one may say so.
fn verdict(before: &Spread, after: &Spread, more_is_better: bool, placement: &str) -> &'static str {
    let small =
        change(before.median, after.median).is_some_and(|change| change.abs() < NOTHING_BELOW);
    let better = (after.median > before.median) == more_is_better;
    let overlap = before.min <= after.max && after.min <= before.max;
    match () {
        () if placement == "mixed" => "placement unclear: says nothing",
        () if small => "less than 8 %: means nothing",
        () if before.n < 2 || after.n < 2 => {
            if better {
                "better? too few samples for a spread"
            } else {
                "worse? too few samples for a spread"
            }
        }
        () if overlap => "spreads overlap",
        () if better => "better, spreads apart",
        () => "WORSE, spreads apart",
    }
}

/// In what two machines differ; empty if they may be one.
pub(crate) fn other_machine(one: &Host, other: &Host) -> Vec<String> {
    let mut found = Vec::new();
    let mut differ = |what: &str, one: String, other: String| {
        // What an older version did not save is not known to differ.
        if one != other && !one.is_empty() && !other.is_empty() {
            found.push(format!("{what} {one}, then {other}"));
        }
    };
    differ("machine", one.name.clone(), other.name.clone());
    differ("processor", one.cpu.clone(), other.cpu.clone());
    differ("CPUs", one.cpus.to_string(), other.cpus.to_string());
    // The clock is measured at each start.
    if (one.tsc_ghz / other.tsc_ghz.max(1e-9) - 1.0).abs() > 0.01 {
        differ(
            "TSC (GHz)",
            one.tsc_ghz.to_string(),
            other.tsc_ghz.to_string(),
        );
    }
    found
}

/// What else than the switches is not the same.
fn warnings(old: &Saved, new: &Saved) -> Vec<String> {
    let mut found = Vec::new();
    let other = other_machine(&old.host, &new.host);
    if !other.is_empty() {
        found.push(format!(
            "not the same machine: {}; only ratios within one run mean something",
            other.join("; ")
        ));
    }
    let mut differ = |what: &str, old: String, new: String| {
        if old != new {
            found.push(format!("{what}: {old}, then {new}"));
        }
    };
    let (before, after) = (&old.host, &new.host);
    differ("kernel", before.kernel.clone(), after.kernel.clone());
    differ("system", before.system.clone(), after.system.clone());
    differ(
        "hugepages of 2 MB",
        before.hugepages_2m.to_string(),
        after.hugepages_2m.to_string(),
    );
    differ(
        "CPUs of switch, client and all else",
        format!("{:?}", old.cpus),
        format!("{:?}", new.cpus),
    );
    differ("priority", old.nice.to_string(), new.nice.to_string());
    let client = |saved: &Saved| -> Vec<String> {
        let clients = saved
            .versions
            .iter()
            .filter(|version| version.name == "client");
        clients.map(|version| version.version.clone()).collect()
    };
    differ("client", client(old).join(", "), client(new).join(", "));
    for (when, saved) in [("the earlier run", old), ("the later run", new)] {
        if !saved.complete {
            found.push(format!("{when} is partial: it ended early"));
        }
    }
    found
}

fn notes(old: &Saved, new: &Saved, common: usize, counts: [usize; 2]) -> Vec<String> {
    let mut notes = Vec::new();
    for (when, saved) in [("then", old), ("now", new)] {
        notes.push(format!(
            "{when}: {}, {}",
            palette::date(saved.started),
            saved.command.join(" ")
        ));
        for version in &saved.versions {
            notes.push(format!("{when}: {}: {}", version.name, version.version));
        }
    }
    notes.push(format!(
        "{common} figures compared; {} stand in the earlier run only, {} in the later one only",
        counts[0] - common,
        counts[1] - common
    ));
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{sample, saved};
    use crate::results::Throughput;
    use crate::sentinel::Placement::{Far, Mixed, Near};

    fn rates(mpps: &[f64]) -> Saved {
        saved(
            mpps.iter()
                .map(|&mpps| sample("split64", "ovs", mpps, Near))
                .collect::<Vec<Throughput>>(),
        )
    }

    fn verdicts(old: &[f64], new: &[f64]) -> String {
        let compared = compare(&rates(old), &rates(new)).unwrap();
        compared.grid.lines[1].last().unwrap().clone()
    }

    #[test]
    fn a_difference_counts_when_spreads_do_not_overlap() {
        assert_eq!(
            verdicts(&[10.0, 11.0], &[13.0, 14.0]),
            "better, spreads apart"
        );
        assert_eq!(
            verdicts(&[13.0, 14.0], &[10.0, 11.0]),
            "WORSE, spreads apart"
        );
        assert_eq!(verdicts(&[10.0, 14.0], &[13.0, 16.0]), "spreads overlap");
        assert_eq!(
            verdicts(&[10.0, 10.1], &[10.5, 10.6]),
            "less than 8 %: means nothing"
        );
        assert_eq!(
            verdicts(&[10.0], &[14.0]),
            "better? too few samples for a spread"
        );
    }

    #[test]
    fn near_is_never_compared_with_far_and_mixed_says_nothing() {
        let near = saved([sample("split64", "ovs", 16.0, Near)]);
        let far = saved([sample("split64", "ovs", 11.0, Far)]);
        let error = compare(&near, &far).err().unwrap().to_string();
        assert!(error.contains("no figure in common"), "{error}");
        let spread = Spread::of([1.0, 2.0].into_iter()).unwrap();
        assert_eq!(
            verdict(&spread, &spread, true, Mixed.name()),
            "placement unclear: says nothing"
        );
    }

    #[test]
    fn another_machine_is_named() {
        let (old, mut new) = (rates(&[10.0]), rates(&[10.0]));
        assert!(compare(&old, &new).unwrap().warnings.is_empty());
        new.host.name = "somewhere-else".to_owned();
        new.host.cpu = "another processor".to_owned();
        let warnings = compare(&old, &new).unwrap().warnings;
        assert!(
            warnings[0].contains("somewhere-else") && warnings[0].contains("another processor"),
            "{warnings:?}"
        );
    }

    #[test]
    fn less_is_better_for_cycles() {
        let compared = compare(&rates(&[10.0]), &rates(&[10.0])).unwrap();
        let rows: Vec<_> = compared
            .grid
            .lines
            .iter()
            .map(|line| line[0].as_str())
            .collect();
        assert_eq!(rows[1..], ["closed loop: 64 B split", "switch: 64 B split"]);
        let (little, much) = (
            Spread::of([1.0, 1.1].into_iter()).unwrap(),
            Spread::of([2.0, 2.1].into_iter()).unwrap(),
        );
        assert_eq!(
            verdict(&little, &much, false, "near"),
            "WORSE, spreads apart"
        );
    }
}
