//! The rows of `compare`: rates, cycles per frame, shares, samples that do not count.

use std::fmt::Write;

use super::cells::{Cell, cells, peers, throughputs};
use super::plot::{BarRow, Key, Plot, Shape};
use super::throughput::{NONE, some};
use super::{Grid, Section};
use crate::kernel::Way;
use crate::results::Saved;
use crate::sentinel::Placement;
use crate::summary::{Spread, digits};

/// What a switch spends on a frame.
pub(super) fn cycles(saved: &Saved) -> Section {
    let cells = cells(saved);
    let mut plots = Vec::new();
    let mut grids = Vec::new();
    for placement in [Placement::Near, Placement::Far] {
        let here = cells.iter().filter(|cell| cell.placement == placement);
        plots.extend(bars(
            &format!("cycles-{}", placement.name()),
            &format!(
                "The switch's cycles per frame, {} (medians, line: least to most)",
                placement.name()
            ),
            "cycles of the time stamp counter per frame, without idle turns",
            here.map(|cell| (cell, cell.switch_cycles)),
        ));
        grids.extend(costs(placement, saved, &cells));
    }
    Section {
        id: "cycles",
        title: "Cycles per frame".to_owned(),
        about: "What the switch's core spends on a frame, as far as the switch tells; lower is better. It holds where the client is the limit, \
                too: a switch that is busy for a third of the time would do three times the work for more clients.",
        plots,
        grids,
    }
}

/// Bars of the cells that have such a figure.
pub(super) fn bars<'c>(
    id: &str,
    title: &str,
    label: &str,
    figures: impl Iterator<Item = (&'c Cell<'c>, Option<Spread>)>,
) -> Option<Plot> {
    let mut rows: Vec<BarRow> = Vec::new();
    for (cell, spread) in figures {
        let Some(spread) = spread else { continue };
        // Near and far have plots of their own.
        let bar = (Key::new(&cell.of.peer, None), spread);
        match rows.iter_mut().find(|row| row.name == cell.of.row) {
            Some(row) => row.bars.push(bar),
            None => rows.push(BarRow {
                name: cell.of.row.clone(),
                bars: vec![bar],
            }),
        }
    }
    (!rows.is_empty()).then(|| Plot {
        id: id.to_owned(),
        title: title.to_owned(),
        table: None,
        shape: Shape::Bars {
            label: label.to_owned(),
            rows,
        },
    })
}

/// Rates, and the ratios of the first switch to the others.
pub(super) fn rates(placement: Placement, saved: &Saved, cells: &[Cell]) -> Option<Grid> {
    let peers = peers(saved);
    let others = || peers.iter().skip(1);
    let mut head = format!("work | {}", columns(&peers));
    for peer in others() {
        let _ = write!(head, " | {} / {peer}", peers[0]);
    }
    let mut grid = Grid::new(
        format!(
            "{}: Mpps received by the client (one frame in flight: µs per hop), median [min–max]; ratios of rates",
            placement.name()
        ),
        &head,
    );
    for row in rows(placement, cells) {
        let mut line = line(row, &peers, |peer| {
            let cell = find(placement, cells, &row.of.row, peer)?;
            Some(match cell.hop_us {
                Some(hop) => hop.show(" µs"),
                None => cell.mpps.show(""),
            })
        });
        let first = find(placement, cells, &row.of.row, peers[0]);
        line.extend(others().map(|peer| {
            let other = find(placement, cells, &row.of.row, peer);
            first.zip(other).map_or(NONE.to_owned(), |(one, other)| {
                format!("{:.2}", one.mpps.median / other.mpps.median)
            })
        }));
        grid.lines.push(line);
    }
    some(grid)
}

/// A cell of each row that has one in this placement.
fn rows<'c, 's>(placement: Placement, cells: &'c [Cell<'s>]) -> Vec<&'c Cell<'s>> {
    let mut rows: Vec<&Cell> = Vec::new();
    for cell in cells.iter().filter(|cell| cell.placement == placement) {
        if !rows.iter().any(|row| row.of.row == cell.of.row) {
            rows.push(cell);
        }
    }
    rows
}

/// The switches' names, those that had a generator of their own marked.
fn columns(peers: &[&str]) -> String {
    let columns = peers.iter().map(|peer| match Way::named(peer) {
        None => (*peer).to_owned(),
        Some(_) => format!("{peer} (own generator)"),
    });
    columns.collect::<Vec<_>>().join(" | ")
}

/// The line of a row: its title, then what there is to say of each switch.
fn line(row: &Cell, peers: &[&str], say: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut line = vec![row.of.work.title.clone()];
    line.extend(
        peers
            .iter()
            .map(|peer| say(peer).unwrap_or_else(|| NONE.to_owned())),
    );
    line
}

fn find<'c, 's>(
    placement: Placement,
    cells: &'c [Cell<'s>],
    row: &str,
    peer: &str,
) -> Option<&'c Cell<'s>> {
    let here = |cell: &&Cell| cell.placement == placement && cell.of.row == row;
    cells.iter().filter(here).find(|cell| cell.of.peer == peer)
}

/// Cycles per frame and busy shares of switch and client.
fn costs(placement: Placement, saved: &Saved, cells: &[Cell]) -> Option<Grid> {
    let side = |cycles: Option<Spread>, busy: Option<Spread>| match (cycles, busy) {
        (Some(cycles), Some(busy)) => {
            format!("{} ({:.0} %)", digits(cycles.median), busy.median * 100.0)
        }
        _ => NONE.to_owned(),
    };
    let peers = peers(saved);
    let head = format!("work | {}", columns(&peers));
    let mut grid = Grid::new(
        format!(
            "{}: TSC cycles per frame (and busy share) of the switch + of the client, medians",
            placement.name()
        ),
        &head,
    );
    for row in rows(placement, cells) {
        grid.lines.push(line(row, &peers, |peer| {
            let cell = find(placement, cells, &row.of.row, peer)?;
            Some(format!(
                "{} + {}",
                side(cell.switch_cycles, cell.switch_busy),
                side(cell.client_cycles, cell.client_busy)
            ))
        }));
    }
    some(grid)
}

/// What is left of a row's base under idle ports or many stations.
pub(super) fn shares(placement: Placement, saved: &Saved, cells: &[Cell]) -> Option<Grid> {
    let peers = peers(saved);
    let head = format!("work, as a share of its base | {}", columns(&peers));
    let mut grid = Grid::new(format!("{}: shares", placement.name()), &head);
    for row in rows(placement, cells) {
        let Some(base) = &row.of.base else { continue };
        grid.lines.push(line(row, &peers, |peer| {
            let cell = find(placement, cells, &row.of.row, peer)?;
            let base = find(placement, cells, base, peer)?;
            Some(format!("{:.2}", cell.mpps.median / base.mpps.median))
        }));
    }
    some(grid)
}

/// The samples that do not count, a line each.
pub(super) fn discarded(saved: &Saved) -> Vec<String> {
    let all = throughputs(saved);
    let samples: usize = all.iter().map(|one| one.samples.len()).sum();
    let mut lines = Vec::new();
    for one in all {
        for sample in &one.samples {
            if let Some(reason) = &sample.discarded {
                lines.push(format!(
                    "round {} {} {}: {} Mpps, {} ({:.0} → {:.0} ns); discarded: {reason}",
                    sample.round,
                    one.row,
                    one.peer,
                    digits(sample.mpps),
                    sample.placement.name(),
                    sample.sentinel_ns[0],
                    sample.sentinel_ns[1],
                ));
            }
        }
    }
    if samples > 0 {
        lines.insert(
            0,
            format!("{samples} samples, {} of them discarded", lines.len()),
        );
    }
    lines
}
