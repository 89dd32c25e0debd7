//! Chains, idle ports, stations.

use super::cells::{Cell, cells};
use super::plot::{Axis, Key, Plot, Scale, Shape, curves, time};
use super::throughput::{NONE, has_points, some};
use super::{Grid, Section};
use crate::load::placement_name;
use crate::results::{Chain, IdlePorts, Saved};
use crate::summary::digits;

pub(super) fn chains(saved: &Saved) -> Vec<&Chain> {
    all!(saved, Chain)
}

pub(super) fn idles(saved: &Saved) -> Vec<&IdlePorts> {
    all!(saved, IdlePorts)
}

/// Points of whatever has a switch, a placement, and two numbers.
type Points = Vec<(Key, f64, f64)>;

fn figure(id: &str, title: &str, x: (&str, Scale), y: (&str, Scale), points: Points) -> Plot {
    let marks: Vec<_> = points.iter().map(|point| point.1).collect();
    Plot {
        id: id.to_owned(),
        title: title.to_owned(),
        table: None,
        shape: Shape::Curves {
            x: Axis::new(x.0, x.1).marked(marks),
            y: Axis::new(y.0, y.1),
            curves: curves(points),
        },
    }
}

impl Chain {
    /// A time, where there was anything to be timed.
    fn or_none(&self, ns: f64) -> String {
        if self.latency.count > 0 {
            time(ns)
        } else {
            NONE.to_owned()
        }
    }
}

/// Frames through several containers.
pub(super) fn chain(saved: &Saved) -> Section {
    let chains = chains(saved);
    // A switch through which nothing came (one that does not look at addresses) has no times.
    let through = || chains.iter().filter(|one| one.mpps > 0.0);
    let points = |value: fn(&Chain) -> f64| -> Points {
        let point = |one: &&Chain| {
            (
                Key::new(&one.peer, one.placement),
                f64::from(one.length),
                value(one),
            )
        };
        through().map(point).collect()
    };
    let x = ("containers between the first and the last", Scale::Log);
    let plot = |id: &str, title: &str, y: (&str, Scale), value: fn(&Chain) -> f64| {
        figure(id, title, x, y, points(value))
    };
    let plots = vec![
        plot(
            "chain-latency",
            "Chain: latency, median, one frame in flight",
            ("time", Scale::LogTime),
            |one| one.latency.p50,
        ),
        plot(
            "chain-jitter",
            "Chain: jitter, one frame in flight",
            ("time", Scale::LogTime),
            |one| one.jitter_ns.max(1.0),
        ),
        plot(
            "chain-rate",
            "Chain: frames through all of it",
            ("million frames per second", Scale::Linear),
            |one| one.mpps,
        ),
    ];
    let mut grid = Grid::new(
        "chains of containers (latency and jitter with one frame in flight)",
        "containers | switch | frames | Mpps | lost | p50 | p90 | p99 | jitter | placement",
    );
    for one in &chains {
        grid.lines.push(vec![
            one.length.to_string(),
            one.peer.clone(),
            one.work.title.clone(),
            if one.mpps > 0.0 {
                digits(one.mpps)
            } else {
                "nothing came through".to_owned()
            },
            one.count.lost.to_string(),
            one.or_none(one.latency.p50),
            one.or_none(one.latency.p90),
            one.or_none(one.latency.p99),
            one.or_none(one.jitter_ns),
            placement_name(one.placement).to_owned(),
        ]);
    }
    Section {
        id: "chain",
        title: "Chains of containers".to_owned(),
        about: "Each container passes a frame on to the next, so a frame crosses the switch once more than there are containers. All containers run on \
                the generator's core: the rate of a long chain is theirs, the latency with one frame in flight is the switch's. Jitter: the mean \
                difference between the latencies of consecutive frames. After Anderson et al., ICNC 2016.",
        plots: plots.into_iter().filter(has_points).collect(),
        grids: some(grid).into_iter().collect(),
    }
}

/// The rates of all rows of `compare` that belong to a base, over something that differs.
fn group(saved: &Saved, base: &str, x: fn(&Cell) -> u32) -> Points {
    let cells = cells(saved);
    let these = cells
        .iter()
        .filter(|cell| cell.of.base.as_deref().unwrap_or(&cell.of.row) == base);
    let point = |cell: &Cell| {
        let key = Key::new(&cell.of.peer, Some(cell.placement));
        (key, f64::from(x(cell)), cell.mpps.median)
    };
    these.map(point).collect()
}

/// Two busy ports among silent ones.
pub(super) fn idle(saved: &Saved) -> Section {
    let idles = idles(saved);
    let mut rates: Points = Vec::new();
    let mut cycles: Points = Vec::new();
    let mut grid = Grid::new(
        "two busy ports among silent ones",
        "silent ports | switch | frames | Mpps | cycles per frame | placement",
    );
    for one in &idles {
        let key = Key::new(&one.peer, one.placement);
        rates.push((key.clone(), f64::from(one.idle), one.mpps));
        cycles.extend(
            one.switch_cycles
                .map(|cycles| (key, f64::from(one.idle), cycles)),
        );
        grid.lines.push(vec![
            one.idle.to_string(),
            one.peer.clone(),
            one.work.title.clone(),
            digits(one.mpps),
            one.switch_cycles.map_or(NONE.to_owned(), digits),
            placement_name(one.placement).to_owned(),
        ]);
    }
    let closed = group(saved, "idle2", |cell| cell.of.work.ports.saturating_sub(2));
    let x = ("connected, silent ports beside two busy ones", Scale::Count);
    let mpps = ("million frames per second", Scale::Linear);
    let plots = vec![
        figure(
            "idle",
            "Idle ports: closed loop between two busy ports",
            x,
            mpps,
            rates,
        ),
        figure(
            "idle-compare",
            "Idle ports: closed loop, testpmd as client",
            x,
            mpps,
            closed,
        ),
        figure(
            "idle-cycles",
            "Idle ports: the switch's cycles per frame",
            x,
            ("cycles per frame", Scale::Linear),
            cycles,
        ),
    ];
    Section {
        id: "idle",
        title: "Idle ports".to_owned(),
        about: "A poll-mode switch looks at every ring, whether something is there or not: what connected, silent containers cost the two that \
                work. Flat is better.",
        plots: plots.into_iter().filter(has_points).collect(),
        grids: some(grid).into_iter().collect(),
    }
}

/// Many stations.
pub(super) fn stations(saved: &Saved) -> Section {
    let points = group(saved, "stations1", |cell| cell.of.work.stations);
    let plots = vec![figure(
        "stations",
        "Stations: open loop to one station",
        ("source addresses, in random order", Scale::Log),
        ("million frames per second", Scale::Linear),
        points,
    )];
    let mut grid = Grid::new(
        "addresses (RFC 2889)",
        "test | switch | stations | stations/s | frames flooded | lost | found",
    );
    for one in all!(saved, Addresses) {
        for step in &one.steps {
            grid.lines.push(vec![
                one.test.clone(),
                one.peer.clone(),
                step.stations.to_string(),
                format!("{:.0}", step.rate),
                step.flooded.to_string(),
                step.lost.to_string(),
                one.found
                    .map_or(NONE.to_owned(), |found| format!("{found:.0}")),
            ]);
        }
    }
    Section {
        id: "stations",
        title: "Many stations".to_owned(),
        about: "What many source addresses cost, how many a switch keeps, and how fast it learns them. A frame to a station that the switch does \
                not know is flooded.",
        plots: plots.into_iter().filter(has_points).collect(),
        grids: some(grid).into_iter().collect(),
    }
}
