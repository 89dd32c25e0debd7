//! Saved runs for people: tables on the terminal, and a page with plots.

/// The measurements of one kind, by the name of the kind.
macro_rules! all {
    ($saved:expr, $kind:ident) => {
        $crate::report::of_kind($saved, |one| match one {
            $crate::results::Measurement::$kind(one) => Some(one),
            _ => None,
        })
    };
}

mod cells;
mod compared;
mod diff;
mod figures;
mod latency;
mod life;
mod page;
mod palette;
mod plot;
mod scenarios;
mod sections;
mod svg;
mod throughput;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::results::{Measurement, Saved};
use plot::Plot;

pub(crate) use cells::each;

/// Where a run goes, besides the tables on the terminal.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct Output {
    /// Save the run as JSON (`-`: print it, instead of the tables); `ringway-bench report` reads it again
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Draw the run as a page: one file with plots and tables, for any browser, with or without a network
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

impl Output {
    /// Whether the terminal is the JSON's.
    pub(crate) fn quiet(&self) -> bool {
        self.json.as_deref().is_some_and(is_dash)
    }

    /// Fails if a file could not be written in the end: before a measurement of minutes, not after it.
    pub(crate) fn check(&self) -> Result<()> {
        for path in [&self.json, &self.html].into_iter().flatten() {
            check_place(path)?;
        }
        Ok(())
    }

    /// Writes what was asked for.
    pub(crate) fn write(&self, saved: &Saved) -> Result<()> {
        match &self.json {
            Some(path) if is_dash(path) => println!("{}", serde_json::to_string_pretty(saved)?),
            Some(path) => saved.write(path)?,
            None => {}
        }
        self.html
            .as_ref()
            .map_or(Ok(()), |path| write_page(path, saved, None))
    }
}

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// The folder of a file to be written must be there.
pub(crate) fn check_place(path: &Path) -> Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let there = is_dash(path) || folder.is_none_or(Path::is_dir);
    ensure!(
        there && !path.is_dir(),
        "{}: cannot be written: its folder does not exist, or it is a folder itself",
        path.display()
    );
    Ok(())
}

/// Draws saved runs again: tables on the terminal, with --html a page with plots. With --baseline they are compared with others.
///
/// Several files of one machine are drawn together: one may hold the latencies, another the chains. What was measured
/// several times becomes several samples of one figure.
#[derive(Debug, clap::Args)]
pub(crate) struct ReportArgs {
    /// Runs that `--json` saved (`-`: from standard input)
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Compare with this run, saved earlier (again for several files)
    #[arg(long, value_name = "FILE")]
    baseline: Vec<PathBuf>,
    /// Write a page with plots and tables
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the tables as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// Runs the subcommand.
pub(crate) fn run(options: &ReportArgs) -> Result<()> {
    for path in [&options.html, &options.markdown].into_iter().flatten() {
        check_place(path)?;
    }
    let saved = read(&options.files)?;
    let compared = match options.baseline.as_slice() {
        [] => None,
        files => {
            let old = read(files)?;
            Some(
                diff::compare(&old, &saved)
                    .with_context(|| format!("{} and {}", names(files), names(&options.files)))?,
            )
        }
    };
    match &compared {
        None => print!("{}", text(&saved)),
        Some(compared) => print!("{}", compared.text()),
    }
    if let Some(path) = &options.markdown {
        let text = compared
            .as_ref()
            .map_or_else(|| markdown(&saved), diff::Compared::markdown);
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    options
        .html
        .as_ref()
        .map_or(Ok(()), |path| write_page(path, &saved, compared.as_ref()))
}

fn names(files: &[PathBuf]) -> String {
    let names: Vec<_> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    names.join(", ")
}

/// Several files as one run; they must be of one machine.
fn read(files: &[PathBuf]) -> Result<Saved> {
    let mut all: Option<Saved> = None;
    for path in files {
        let saved = Saved::read(path)?;
        match &mut all {
            None => all = Some(saved),
            Some(all) => {
                let other = diff::other_machine(&all.host, &saved.host);
                ensure!(
                    other.is_empty(),
                    "{}: of another machine than {} ({}): one page shows one machine; compare them with --baseline",
                    path.display(),
                    files[0].display(),
                    other.join("; ")
                );
                all.command.push("&&".to_owned());
                all.command.extend(saved.command.iter().cloned());
                all.add(saved);
            }
        }
    }
    all.context("no file")
}

fn write_page(path: &Path, saved: &Saved, compared: Option<&diff::Compared>) -> Result<()> {
    let page = page::render(saved, compared)
        .with_context(|| format!("{}: cannot be drawn", path.display()))?;
    std::fs::write(path, page).with_context(|| path.display().to_string())
}

/// One table, still without a form: the first line is its head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) title: String,
    pub(crate) lines: Vec<Vec<String>>,
}

impl Grid {
    /// A table with this head, its columns divided by ` | `.
    pub(crate) fn new(title: impl Into<String>, head: &str) -> Self {
        Self {
            title: title.into(),
            lines: vec![head.split(" | ").map(str::to_owned).collect()],
        }
    }
}

/// What belongs to one question: how to read it, its plots, its tables.
pub(crate) struct Section {
    /// For links.
    pub(crate) id: &'static str,
    pub(crate) title: String,
    pub(crate) about: &'static str,
    pub(crate) plots: Vec<Plot>,
    pub(crate) grids: Vec<Grid>,
}

/// The tables and the circumstances of a run, for a terminal.
pub(crate) fn text(saved: &Saved) -> String {
    let grids: Vec<_> = grids(saved);
    tables(&grids, &notes(saved))
}

/// The same as Markdown.
pub(crate) fn markdown(saved: &Saved) -> String {
    marked_down(&grids(saved), &notes(saved))
}

fn grids(saved: &Saved) -> Vec<Grid> {
    let sections = sections::sections(saved);
    sections
        .into_iter()
        .flat_map(|section| section.grids)
        .collect()
}

fn tables(grids: &[Grid], notes: &[String]) -> String {
    let mut text = String::new();
    for grid in grids {
        let mut table = Table::new();
        table
            .load_style(presets::UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Dynamic);
        let mut lines = grid.lines.iter();
        table.set_header(lines.next().into_iter().flatten());
        table.add_rows(lines);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let _ = writeln!(text, "\n{}\n{table}", grid.title);
    }
    let _ = writeln!(text);
    for note in notes {
        let _ = writeln!(text, "{note}");
    }
    text
}

fn marked_down(grids: &[Grid], notes: &[String]) -> String {
    let mut text = String::new();
    for grid in grids {
        let _ = writeln!(text, "**{}**\n", grid.title);
        for (number, line) in grid.lines.iter().enumerate() {
            let _ = writeln!(text, "| {} |", line.join(" | "));
            if number == 0 {
                let _ = writeln!(text, "|---|{}", "--:|".repeat(line.len().max(1) - 1));
            }
        }
        let _ = writeln!(text);
    }
    for note in notes {
        let _ = writeln!(text, "- {note}");
    }
    text
}

/// What has to be known to trust the tables, a line each.
fn notes(saved: &Saved) -> Vec<String> {
    let mut notes: Vec<_> = circumstances(saved)
        .into_iter()
        .map(|(what, value)| format!("{what}: {value}"))
        .collect();
    if !saved.complete {
        notes.push(PARTIAL.to_owned());
    }
    notes.extend(saved.caveats.iter().cloned());
    notes.extend(compared::discarded(saved));
    notes
}

/// What stands on everything that ended early.
const PARTIAL: &str = "PARTIAL: the run ended early or something failed; this is what was measured";

/// Machine, versions, command line.
fn circumstances(saved: &Saved) -> Vec<(&str, String)> {
    let host = &saved.host;
    let mut found = vec![
        (
            "machine",
            format!(
                "{}{}, {} CPUs{}, TSC {} GHz, {} hugepages of 2 MB",
                if host.name.is_empty() {
                    String::new()
                } else {
                    format!("{}: ", host.name)
                },
                host.cpu,
                host.cpus,
                if host.virtual_machine {
                    " (virtual machine)"
                } else {
                    ""
                },
                host.tsc_ghz,
                host.hugepages_2m,
            ),
        ),
        ("system", format!("Linux {}, {}", host.kernel, host.system)),
        (
            "CPUs",
            format!(
                "switch on CPU {}, client on CPU {}, all else on CPU {}, nice {}",
                saved.cpus[0], saved.cpus[1], saved.cpus[2], saved.nice
            ),
        ),
        ("measured", palette::date(saved.started)),
        ("command", saved.command.join(" ")),
    ];
    found.extend(
        saved
            .versions
            .iter()
            .map(|version| (version.name.as_str(), version.version.clone())),
    );
    found
}

/// The measurements of one kind.
pub(crate) fn of_kind<'s, T: 's>(
    saved: &'s Saved,
    pick: impl Fn(&'s Measurement) -> Option<&'s T>,
) -> Vec<&'s T> {
    saved.measurements.iter().filter_map(pick).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::host::Host;
    use crate::results::{FORMAT, Sample, Throughput, Version, Work};
    use crate::rows::ROWS;
    use crate::sentinel::Placement;

    pub(crate) fn sample(row: &str, peer: &str, mpps: f64, placement: Placement) -> Throughput {
        let known = ROWS.iter().find(|known| known.name == row);
        Throughput {
            peer: peer.to_owned(),
            row: row.to_owned(),
            work: known.map_or_else(Work::default, crate::rows::Row::work),
            base: known.and_then(|known| known.base.map(str::to_owned)),
            hop: row == "hop",
            samples: vec![Sample {
                round: 1,
                mpps,
                placement,
                discarded: (placement == Placement::Mixed)
                    .then(|| "the placement changed or is unclear".to_owned()),
                switch_cycles: Some(40.0),
                switch_busy: Some(0.5),
                client_cycles: Some(57.0),
                client_busy: Some(0.98),
                sentinel_ns: [80.0, 81.0],
                steps: vec![],
            }],
        }
    }

    pub(crate) fn saved(rates: impl IntoIterator<Item = Throughput>) -> Saved {
        Saved {
            format: FORMAT,
            version: "0.1.0".to_owned(),
            command: vec!["ringway-bench".to_owned(), "compare".to_owned()],
            started: 0,
            host: Host::look(2.6e9),
            cpus: [0, 1, 0],
            nice: 0,
            complete: true,
            versions: vec![Version {
                name: "ovs".to_owned(),
                version: "3.1".to_owned(),
            }],
            caveats: vec!["left out: VPP: no such file".to_owned()],
            measurements: rates.into_iter().map(Measurement::Throughput).collect(),
        }
    }

    #[test]
    fn ratios_compare_ringway_with_each_other_switch() {
        let text = markdown(&saved([
            sample("split64", "ovs", 16.0, Placement::Near),
            sample("split64", "ringway", 40.0, Placement::Near),
        ]));
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
        let text = text(&saved([
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
    fn discarded_samples_are_named() {
        let text = text(&saved([
            sample("split64", "ovs", 16.0, Placement::Near),
            sample("split64", "ovs", 13.0, Placement::Mixed),
        ]));
        assert!(text.contains("2 samples, 1 of them discarded"), "{text}");
        assert!(
            text.contains("13.0 Mpps, mixed (80 → 81 ns); discarded: the placement"),
            "{text}"
        );
    }
}
