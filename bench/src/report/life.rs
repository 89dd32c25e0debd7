//! Neighbours, attaching, outages, footprints, bursts: tables mostly.

use super::latency::{cdf, curve, quantiles};
use super::plot::{Key, Plot, Shape, time};
use super::throughput::{NONE, has_points, some};
use super::{Grid, Section};
use crate::results::{Attach, Count, Neighbour, Saved};
use crate::summary::digits;

pub(super) fn neighbours(saved: &Saved) -> Vec<&Neighbour> {
    all!(saved, Neighbour)
}

pub(super) fn attaches(saved: &Saved) -> Vec<&Attach> {
    all!(saved, Attach)
}

/// The share of the frames due that never came.
pub(super) fn share_lost(count: &Count) -> f64 {
    count.offered.saturating_sub(count.received) as f64 / count.offered.max(1) as f64
}

fn per_cent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}

/// Neighbours, and ports that are congested.
pub(super) fn neighbour(saved: &Saved) -> Section {
    let mut beside = Grid::new(
        "an innocent pair beside a container that …",
        "behaviour | switch | lost alone | lost beside | p50 alone | p50 beside | p99 alone | p99 beside",
    );
    for one in neighbours(saved) {
        beside.lines.push(vec![
            one.behaviour.clone(),
            one.peer.clone(),
            per_cent(share_lost(&one.alone)),
            per_cent(share_lost(&one.beside)),
            time(one.alone_latency.p50),
            time(one.beside_latency.p50),
            time(one.alone_latency.p99),
            time(one.beside_latency.p99),
        ]);
    }
    let mut blocking = Grid::new(
        "head-of-line blocking (RFC 2889 §5.5)",
        "switch | lost to the free port | lost to the congested port | blocked",
    );
    for one in all!(saved, HeadOfLine) {
        blocking.lines.push(vec![
            one.peer.clone(),
            per_cent(share_lost(&one.free)),
            per_cent(share_lost(&one.congested)),
            if one.blocked { "yes" } else { "no" }.to_owned(),
        ]);
    }
    Section {
        id: "neighbour",
        title: "Bad neighbours".to_owned(),
        about: "What others lose by one container's behaviour. Lost are frames due that did not arrive, also those that the switch left in the ring.",
        plots: Vec::new(),
        grids: some(beside).into_iter().chain(some(blocking)).collect(),
    }
}

/// Attaching, outages, footprints.
pub(super) fn life(saved: &Saved) -> Section {
    let attaches = attaches(saved);
    Section {
        id: "life",
        title: "Coming, going, resting".to_owned(),
        about: "How long a container takes to its first frame, how long a killed and restarted switch is felt, and what a switch takes while \
                nobody talks.",
        plots: attach_plot(&attaches)
            .into_iter()
            .filter(has_points)
            .collect(),
        grids: [attach(&attaches), outage(saved), footprint(saved)]
            .into_iter()
            .filter_map(some)
            .collect(),
    }
}

fn attach(attaches: &[&Attach]) -> Grid {
    let mut attach = Grid::new(
        "from connecting a container to its first frame",
        "containers | switch | p50 | p90 | p99 | p99.9 | p99.99 | max | all of them | failed",
    );
    for one in attaches {
        let mut line = vec![one.ports.to_string(), one.peer.clone()];
        line.extend(quantiles(&one.first_frame));
        line.extend([time(one.total_ms * 1e6), one.failed.to_string()]);
        attach.lines.push(line);
    }
    attach
}

/// Of the largest number of containers.
fn attach_plot(attaches: &[&Attach]) -> Option<Plot> {
    let most = attaches
        .iter()
        .map(|one| one.ports)
        .max()
        .filter(|&most| most > 1)?;
    let largest = attaches.iter().filter(|one| one.ports == most);
    let curves = largest
        .filter_map(|one| curve(Key::new(&one.peer, None), &one.first_frame))
        .collect();
    let title = format!("{most} containers, from connecting to the first frame");
    let mut plot = cdf("attach", &title, curves);
    if let Shape::Curves { x, .. } = &mut plot.shape {
        "share of the containers that took no longer".clone_into(&mut x.label);
    }
    plot.title = format!("Attaching: {title}");
    Some(plot)
}

fn outage(saved: &Saved) -> Grid {
    let mut outage = Grid::new(
        "outages: milliseconds without frames, by port",
        "event | switch | ports | least | most | never came back | how",
    );
    for one in all!(saved, Outage) {
        let gaps: Vec<f64> = one.gaps_ms.iter().copied().flatten().collect();
        let least = gaps.iter().copied().reduce(f64::min);
        let most = gaps.iter().copied().reduce(f64::max);
        outage.lines.push(vec![
            one.event.clone(),
            one.peer.clone(),
            one.gaps_ms.len().to_string(),
            least.map_or(NONE.to_owned(), digits),
            most.map_or(NONE.to_owned(), digits),
            (one.gaps_ms.len() - gaps.len()).to_string(),
            one.reconnect.clone(),
        ]);
    }
    outage
}

fn footprint(saved: &Saved) -> Grid {
    let mut footprint = Grid::new(
        "a switch whose containers are silent",
        "containers | switch | resident, MiB | hugepages, MiB | CPUs | threads",
    );
    for one in all!(saved, Footprint) {
        footprint.lines.push(vec![
            one.ports.to_string(),
            one.peer.clone(),
            digits(one.resident_mib),
            format!("{:.0}", one.hugepages_mib),
            format!("{:.2}", one.cpu),
            one.threads.to_string(),
        ]);
    }
    footprint
}

/// Bursts and recovery.
pub(super) fn bursts(saved: &Saved) -> Section {
    let mut bursts = Grid::new(
        "back-to-back frames (RFC 2544 §26.4): the longest burst without loss",
        "frames | switch | bursts | tried up to",
    );
    for one in all!(saved, BackToBack) {
        let each: Vec<_> = one.frames.iter().map(u64::to_string).collect();
        bursts.lines.push(vec![
            one.work.title.clone(),
            one.peer.clone(),
            each.join(", "),
            one.limit.to_string(),
        ]);
    }
    let mut recovery = Grid::new(
        "recovery from overload (RFC 2544 §26.5)",
        "frames | switch | loss at 110 % | last loss at 50 %, ms after it",
    );
    for one in all!(saved, Recovery) {
        recovery.lines.push(vec![
            one.work.title.clone(),
            one.peer.clone(),
            per_cent(one.overload_loss),
            if one.last_loss_ms > 0.0 {
                digits(one.last_loss_ms)
            } else {
                "none".to_owned()
            },
        ]);
    }
    Section {
        id: "bursts",
        title: "Bursts and overload".to_owned(),
        about: "How many frames at twice the throughput a switch and its rings take without loss, and how long an overload is felt.",
        plots: Vec::new(),
        grids: some(bursts).into_iter().chain(some(recovery)).collect(),
    }
}
