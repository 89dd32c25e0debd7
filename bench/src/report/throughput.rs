//! Frames per second: over frame sizes, of searches, of single loads.

use super::cells::{Cell, cells, each};
use super::compared::{bars, rates, shares};
use super::plot::{Axis, Curve, Key, Plot, Scale, Shape, curves, time};
use super::{Grid, Section};
use crate::load::placement_name;
use crate::results::{Load, LossCurve, Saved, Search, Step, Work};
use crate::sentinel::Placement;
use crate::summary::digits;

pub(super) const NONE: &str = "–";

/// Frames per second over frame size; rates of rows.
pub(super) fn section(saved: &Saved) -> Section {
    let cells = cells(saved);
    let mut plots = Vec::new();
    plots.extend(search_plots(saved));
    plots.extend(closed_plots(saved, &cells));
    for placement in [Placement::Near, Placement::Far] {
        let plain = |cell: &&Cell| cell.placement == placement && !cell.of.hop;
        plots.extend(bars(
            &format!("rates-{}", placement.name()),
            &format!(
                "Closed loop by kind of work, {} (medians, line: least to most)",
                placement.name()
            ),
            "million frames per second",
            cells
                .iter()
                .filter(plain)
                .map(|cell| (cell, Some(cell.mpps))),
        ));
    }
    let mut grids = Vec::new();
    grids.extend(search_grid(saved));
    for placement in [Placement::Near, Placement::Far] {
        grids.extend(rates(placement, saved, &cells));
        grids.extend(shares(placement, saved, &cells));
    }
    grids.extend(load_grid(saved));
    Section {
        id: "throughput",
        title: "Throughput".to_owned(),
        about: "Frames per second that arrived, all receivers together; higher is better. “RFC 2544” is the highest rate that lost no more \
                than allowed, in an open loop. In a closed loop a frame is sent when another one arrived: where the client is the limit, it \
                says little about the switch (look at the cycles per frame). Lines join figures of one placement only.",
        plots,
        grids,
    }
}

/// What a line over frame sizes has in common.
fn kind(work: &Work) -> String {
    match work.stations {
        0 | 1 => work.rings.clone(),
        stations => format!("{}, {stations} stations", work.rings),
    }
}

pub(super) fn over_sizes(id: &str, title: String, curves: Vec<Curve>) -> Plot {
    let marks: Vec<_> = curves
        .iter()
        .flat_map(|curve| curve.points.iter().map(|point| point.x))
        .collect();
    Plot {
        id: id.to_owned(),
        title,
        table: None,
        shape: Shape::Curves {
            x: Axis::new("bytes of a frame on the ring, without CRC", Scale::Log).marked(marks),
            y: Axis::new("million frames per second", Scale::Linear),
            curves,
        },
    }
}

fn searches(saved: &Saved) -> Vec<&Search> {
    all!(saved, Search)
}

/// One placement for all of them, or none.
pub(super) fn common(placements: impl Iterator<Item = Option<Placement>>) -> Option<Placement> {
    let found = each(placements);
    match found.as_slice() {
        [one] => *one,
        [] => None,
        _ => Some(Placement::Mixed),
    }
}

pub(super) fn of_steps(steps: &[Step]) -> Option<Placement> {
    common(steps.iter().map(|step| step.placement))
}

fn search_plots(saved: &Saved) -> Vec<Plot> {
    let searches = searches(saved);
    let kinds = each(
        searches
            .iter()
            .map(|one| (kind(&one.work), one.threshold.to_bits())),
    );
    let plots = kinds
        .iter()
        .enumerate()
        .map(|(number, (rings, threshold))| {
            let these = searches
                .iter()
                .filter(|one| kind(&one.work) == *rings && one.threshold.to_bits() == *threshold);
            let points = these.filter_map(|one| {
                let key = Key::new(&one.peer, of_steps(&one.steps));
                Some((key, f64::from(one.work.frame?), one.found_mpps?))
            });
            let loss = Scale::Loss.label(f64::from_bits(*threshold));
            over_sizes(
                &format!("sizes-search-{number}"),
                format!("RFC 2544 §26.1, {rings}: the highest rate with a loss of at most {loss}"),
                curves(points),
            )
        });
    plots.filter(has_points).collect()
}

pub(super) fn has_points(plot: &Plot) -> bool {
    match &plot.shape {
        Shape::Curves { curves, .. } => curves.iter().any(|curve| !curve.points.is_empty()),
        Shape::Bars { rows, .. } => !rows.is_empty(),
    }
}

/// Closed loops over frame sizes, where there is more than one size.
fn closed_plots(saved: &Saved, cells: &[Cell]) -> Vec<Plot> {
    let plain: Vec<_> = cells
        .iter()
        .filter(|cell| !cell.of.hop && cell.of.base.is_none() && cell.of.work.stations <= 1)
        .collect();
    let mut plots = Vec::new();
    for (number, rings) in each(plain.iter().map(|cell| kind(&cell.of.work)))
        .iter()
        .enumerate()
    {
        let these = plain.iter().filter(|cell| kind(&cell.of.work) == *rings);
        let points = these.filter_map(|cell| {
            let key = Key::new(&cell.of.peer, Some(cell.placement));
            Some((key, f64::from(cell.of.work.frame?), cell))
        });
        let samples = points.flat_map(|(key, size, cell)| {
            [cell.mpps.min, cell.mpps.median, cell.mpps.max].map(|mpps| (key.clone(), size, mpps))
        });
        plots.push(over_sizes(
            &format!("sizes-closed-{number}"),
            format!("Closed loop, {rings}: testpmd's 1024 frames in flight (fewer of 9000 B)"),
            curves(samples),
        ));
    }
    let loads: Vec<_> = loads(saved)
        .into_iter()
        .filter(|load| load.pace.starts_with("window"))
        .collect();
    let kinds = each(
        loads
            .iter()
            .map(|load| (kind(&load.work), load.pace.clone())),
    );
    for (number, (rings, pace)) in kinds.iter().enumerate() {
        let these = loads
            .iter()
            .filter(|load| kind(&load.work) == *rings && load.pace == *pace);
        let points = these.filter_map(|load| {
            let key = Key::new(&load.peer, load.placement);
            Some((key, f64::from(load.work.frame?), load_mpps(load)))
        });
        plots.push(over_sizes(
            &format!("sizes-load-{number}"),
            format!("Closed loop, {rings}: {pace}"),
            curves(points),
        ));
    }
    plots.retain(|plot| sizes(plot) > 1);
    plots
}

fn sizes(plot: &Plot) -> usize {
    match &plot.shape {
        Shape::Curves { x, .. } => x.marks.len(),
        Shape::Bars { .. } => 0,
    }
}

fn search_grid(saved: &Saved) -> Option<Grid> {
    let mut grid = Grid::new(
        "RFC 2544 §26.1: the highest rate that passed",
        "frames | switch | Mpps | Gbit/s | loss allowed | trials | placement",
    );
    for one in searches(saved) {
        let gbit = |mpps: f64| {
            one.work
                .frame
                .map(|bytes| mpps * f64::from(bytes) * 8.0 / 1e3)
        };
        let trials = format!("{} of {} s", one.steps.len(), one.seconds);
        grid.lines.push(vec![
            one.work.title.clone(),
            one.peer.clone(),
            one.found_mpps.map_or("none passed".to_owned(), digits) + partial(&one.partial),
            one.found_mpps
                .and_then(gbit)
                .map_or(NONE.to_owned(), digits),
            Scale::Loss.label(one.threshold),
            trials,
            placement_name(of_steps(&one.steps)).to_owned(),
        ]);
    }
    some(grid)
}

/// A table that has lines.
pub(super) fn some(grid: Grid) -> Option<Grid> {
    (grid.lines.len() > 1).then_some(grid)
}

/// What stands behind a figure that is not the last word.
pub(super) fn partial(why: &Option<String>) -> &'static str {
    if why.is_some() { " (partial)" } else { "" }
}

pub(super) fn loads(saved: &Saved) -> Vec<&Load> {
    all!(saved, Load)
}

/// Million frames per second that a load received.
pub(super) fn load_mpps(load: &Load) -> f64 {
    if load.steps.is_empty() {
        return load.count.received as f64 / load.count.seconds.max(1e-9) / 1e6;
    }
    load.steps.iter().sum::<f64>() / load.steps.len() as f64
}

fn load_grid(saved: &Saved) -> Option<Grid> {
    let mut grid = Grid::new(
        "single loads",
        "frames | switch | pace | Mpps | lost | duplicated | reordered | corrupted | foreign | longest silence | generator: cycles per frame (busy) | placement",
    );
    for load in loads(saved) {
        let count = &load.count;
        let mut line = vec![
            load.work.title.clone(),
            load.peer.clone(),
            load.pace.clone(),
            digits(load_mpps(load)) + partial(&load.partial),
        ];
        let faults = [
            count.lost,
            count.duplicated,
            count.reordered,
            count.corrupted,
            count.foreign,
        ];
        line.extend(faults.map(|fault| fault.to_string()));
        let silence = load.gaps_ns.iter().copied().reduce(f64::max);
        line.push(silence.map_or(NONE.to_owned(), time));
        line.push(format!(
            "{} ({:.0} %)",
            digits(load.generator_cycles),
            load.generator_busy * 100.0
        ));
        line.push(placement_name(load.placement).to_owned());
        grid.lines.push(line);
    }
    some(grid)
}

pub(super) fn loss_curves(saved: &Saved) -> Vec<&LossCurve> {
    all!(saved, LossCurve)
}
