//! A run as a list of single figures with their samples: what two runs can be compared by.

use super::cells::{cells, throughputs};
use super::latency::burden;
use super::life::{attaches, neighbours, share_lost};
use super::scenarios::{chains, idles};
use super::throughput::{load_mpps, loads, of_steps};
use crate::load::placement_name;
use crate::results::{Measurement, Saved};
use crate::sentinel::Placement;

/// What a figure is of: equal keys can be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct What {
    /// `closed loop: 64 B split`.
    pub(crate) row: String,
    pub(crate) peer: String,
    /// `near`, `far`, `mixed`, or `–` where nobody looked.
    pub(crate) placement: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) more_is_better: bool,
}

/// A figure with all of its samples.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Figure {
    pub(crate) what: What,
    pub(crate) samples: Vec<f64>,
}

/// Collects figures; what was measured several times becomes several samples.
#[derive(Default)]
struct Collection(Vec<Figure>);

impl Collection {
    fn add(
        &mut self,
        row: String,
        peer: &str,
        placement: Option<Placement>,
        unit: (&'static str, bool),
        value: f64,
    ) {
        let what = What {
            row,
            peer: peer.to_owned(),
            placement: placement_name(placement),
            unit: unit.0,
            more_is_better: unit.1,
        };
        match self.0.iter_mut().find(|figure| figure.what == what) {
            Some(figure) => figure.samples.push(value),
            None => self.0.push(Figure {
                what,
                samples: vec![value],
            }),
        }
    }
}

const MPPS: (&str, bool) = ("Mpps", true);
const CYCLES: (&str, bool) = ("cycles per frame", false);
const MICROSECONDS: (&str, bool) = ("µs", false);
const MILLISECONDS: (&str, bool) = ("ms", false);
const PER_CENT: (&str, bool) = ("% lost", false);
const MIB: (&str, bool) = ("MiB", false);

/// All figures of a run.
pub(crate) fn figures(saved: &Saved) -> Vec<Figure> {
    let mut all = Collection::default();
    rates(saved, &mut all);
    times(saved, &mut all);
    scenes(saved, &mut all);
    all.0
}

fn rates(saved: &Saved, all: &mut Collection) {
    // The order of the tables, with every usable sample.
    for cell in cells(saved) {
        let these = throughputs(saved);
        let these = these
            .iter()
            .filter(|one| one.row == cell.of.row && one.peer == cell.of.peer);
        for sample in these.flat_map(|one| &one.samples) {
            if sample.placement != cell.placement || sample.discarded.is_some() {
                continue;
            }
            let (peer, at) = (&cell.of.peer, Some(cell.placement));
            let title = &cell.of.work.title;
            if cell.of.hop {
                all.add(
                    format!("hop: {title}"),
                    peer,
                    at,
                    MICROSECONDS,
                    2.0 / sample.mpps,
                );
            } else {
                all.add(format!("closed loop: {title}"), peer, at, MPPS, sample.mpps);
            }
            if let Some(cycles) = sample.switch_cycles {
                all.add(format!("switch: {title}"), peer, at, CYCLES, cycles);
            }
        }
    }
    for one in &saved.measurements {
        match one {
            Measurement::Search(one) => {
                let row = format!(
                    "§26.1 throughput at a loss of {}: {}",
                    one.threshold, one.work.title
                );
                if let Some(found) = one.found_mpps {
                    all.add(row, &one.peer, of_steps(&one.steps), MPPS, found);
                }
            }
            Measurement::LossCurve(one) => {
                let clean = one.steps.iter().filter(|step| step.loss <= 0.0);
                if let Some(most) = clean.map(|step| step.offered_mpps).reduce(f64::max) {
                    let row = format!("§26.3 highest rate tried without loss: {}", one.work.title);
                    all.add(row, &one.peer, of_steps(&one.steps), MPPS, most);
                }
            }
            Measurement::BackToBack(one) => {
                for &frames in &one.frames {
                    let row = format!("§26.4 longest burst: {}", one.work.title);
                    all.add(row, &one.peer, None, ("frames", true), frames as f64);
                }
            }
            Measurement::Recovery(one) => {
                let row = format!("§26.5 last loss after overload: {}", one.work.title);
                all.add(row, &one.peer, None, MILLISECONDS, one.last_loss_ms);
            }
            Measurement::Addresses(one) => {
                if let Some(found) = one.found {
                    all.add(one.test.clone(), &one.peer, None, ("stations", true), found);
                }
            }
            _ => {}
        }
    }
}

fn times(saved: &Saved, all: &mut Collection) {
    for load in loads(saved) {
        let row = format!("load: {}, {}", load.work.title, load.pace);
        all.add(
            row.clone(),
            &load.peer,
            load.placement,
            MPPS,
            load_mpps(load),
        );
        if let Some(times) = load.latencies.first().filter(|times| times.count > 0) {
            all.add(
                format!("{row}, p50"),
                &load.peer,
                load.placement,
                MICROSECONDS,
                times.p50 / 1e3,
            );
            all.add(
                format!("{row}, p99"),
                &load.peer,
                load.placement,
                MICROSECONDS,
                times.p99 / 1e3,
            );
        }
    }
    let latencies = all!(saved, Latency);
    for one in latencies {
        let Some(times) = one.latencies.first().filter(|times| times.count > 0) else {
            continue;
        };
        let row = format!("latency: {}, {}", one.work.title, burden(one));
        for (name, ns) in [
            ("p50", times.p50),
            ("p99", times.p99),
            ("p99.9", times.p999),
        ] {
            all.add(
                format!("{row}, {name}"),
                &one.peer,
                one.placement,
                MICROSECONDS,
                ns / 1e3,
            );
        }
    }
}

fn scenes(saved: &Saved, all: &mut Collection) {
    for one in chains(saved) {
        let (row, at) = (format!("chain of {}", one.length), one.placement);
        all.add(row.clone(), &one.peer, at, MPPS, one.mpps);
        all.add(
            format!("{row}, p50"),
            &one.peer,
            at,
            MICROSECONDS,
            one.latency.p50 / 1e3,
        );
        all.add(
            format!("{row}, jitter"),
            &one.peer,
            at,
            MICROSECONDS,
            one.jitter_ns / 1e3,
        );
    }
    for one in idles(saved) {
        let row = format!("{} silent ports", one.idle);
        all.add(row.clone(), &one.peer, one.placement, MPPS, one.mpps);
        if let Some(cycles) = one.switch_cycles {
            all.add(row, &one.peer, one.placement, CYCLES, cycles);
        }
    }
    for one in neighbours(saved) {
        let row = format!("beside one that {}", one.behaviour);
        all.add(
            row,
            &one.peer,
            None,
            PER_CENT,
            share_lost(&one.beside) * 100.0,
        );
    }
    for one in attaches(saved) {
        let row = format!("attach, {} containers, p50", one.ports);
        all.add(
            row,
            &one.peer,
            None,
            MILLISECONDS,
            one.first_frame.p50 / 1e6,
        );
    }
    rest(saved, all);
}

fn rest(saved: &Saved, all: &mut Collection) {
    for one in &saved.measurements {
        match one {
            Measurement::Outage(one) => {
                for gap in one.gaps_ms.iter().flatten() {
                    all.add(
                        format!("outage: {}", one.event),
                        &one.peer,
                        None,
                        MILLISECONDS,
                        *gap,
                    );
                }
            }
            Measurement::Footprint(one) => {
                let row = format!("{} silent containers", one.ports);
                all.add(
                    format!("{row}, resident"),
                    &one.peer,
                    None,
                    MIB,
                    one.resident_mib,
                );
                all.add(
                    format!("{row}, hugepages"),
                    &one.peer,
                    None,
                    MIB,
                    one.hugepages_mib,
                );
                all.add(row, &one.peer, None, ("CPUs", false), one.cpu);
            }
            _ => {}
        }
    }
}
