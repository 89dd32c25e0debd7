//! Latencies: distributions at each load, and loss over the offered rate.

use super::cells::each;
use super::plot::{Axis, Curve, Key, Plot, Point, Scale, Shape, curves, time};
use super::throughput::{has_points, loads, loss_curves, of_steps, partial, some};
use super::{Grid, Section};
use crate::load::placement_name;
use crate::results::{Count, Distribution, Latency, LossCurve, Saved, Step};
use crate::sentinel::Placement;
use crate::summary::digits;

/// One distribution with its circumstances.
struct Times<'s> {
    peer: &'s str,
    title: String,
    placement: Option<Placement>,
    count: &'s Count,
    partial: bool,
    times: &'s [Distribution],
}

fn latencies(saved: &Saved) -> Vec<&Latency> {
    all!(saved, Latency)
}

/// How much of its throughput a switch had to bear.
pub(super) fn burden(latency: &Latency) -> String {
    latency
        .percent
        .map_or("one frame in flight".to_owned(), |percent| {
            format!("at {percent} % of its throughput")
        })
}

fn all(saved: &Saved) -> Vec<Times<'_>> {
    let measured = latencies(saved).into_iter().map(|one| Times {
        peer: &one.peer,
        title: format!("{}, {}", one.work.title, burden(one)),
        placement: one.placement,
        count: &one.count,
        partial: one.partial.is_some(),
        times: &one.latencies,
    });
    let loaded = loads(saved).into_iter().map(|one| Times {
        peer: &one.peer,
        title: format!("{}, {}", one.work.title, one.pace),
        placement: one.placement,
        count: &one.count,
        partial: one.partial.is_some(),
        times: &one.latencies,
    });
    measured
        .chain(loaded)
        .filter(|one| one.times.iter().any(|times| times.count > 0))
        .collect()
}

/// Distributions.
pub(super) fn section(saved: &Saved) -> Section {
    let all = all(saved);
    let titles = each(all.iter().map(|one| one.title.clone()));
    let plots = titles.iter().enumerate().map(|(number, title)| {
        let these = || all.iter().filter(|one| one.title == *title);
        let curves =
            these().filter_map(|one| curve(Key::new(one.peer, one.placement), one.times.first()?));
        let mut plot = cdf(&format!("latency-{number}"), title, curves.collect());
        let mut table = Grid::new(title.as_str(), COLUMNS);
        table.lines.extend(these().flat_map(lines));
        plot.table = Some(table);
        plot
    });
    let plots = plots.filter(has_points).collect();
    let mut grid = Grid::new(
        "latency (once through the switch, from the time a frame was due)",
        &format!("frames and load | {COLUMNS}"),
    );
    for one in &all {
        grid.lines.extend(lines(one).into_iter().map(|mut line| {
            line.insert(0, one.title.clone());
            line
        }));
    }
    Section {
        id: "latency",
        title: "Latency".to_owned(),
        about: "Each curve shows the time (upwards) within which a share of all frames (to the right) came through; lower is better. \
                Each step to the right is a nine more: 99 % means that one frame in a hundred took longer. In an open loop time counts from \
                when a frame was due, however late the switch took it.",
        plots,
        grids: some(grid).into_iter().collect(),
    }
}

const COLUMNS: &str = "switch | direction | p50 | p90 | p99 | p99.9 | p99.99 | max | mean | received | loss | placement";

/// A line for each direction.
fn lines(one: &Times) -> Vec<Vec<String>> {
    let lost = one.count.offered.saturating_sub(one.count.received);
    let loss = Scale::Loss.label(round(lost as f64 / one.count.offered.max(1) as f64));
    let mark = if one.partial { " (partial)" } else { "" };
    let line = |times: &Distribution| {
        let mut line = vec![one.peer.to_owned(), times.name.clone()];
        line.extend(quantiles(times));
        line.push(time(times.mean));
        line.push(times.count.to_string());
        line.push(loss.clone());
        line.push(format!("{}{mark}", placement_name(one.placement)));
        line
    };
    one.times.iter().map(line).collect()
}

/// Two digits of a small share.
fn round(share: f64) -> f64 {
    if share <= 0.0 {
        return 0.0;
    }
    let unit = 10f64.powf(share.log10().floor() - 1.0);
    (share / unit).round() * unit
}

pub(super) fn quantiles(times: &Distribution) -> Vec<String> {
    let found = [
        times.p50,
        times.p90,
        times.p99,
        times.p999,
        times.p9999,
        times.max,
    ];
    found.map(time).to_vec()
}

/// A plot of distributions.
pub(super) fn cdf(id: &str, title: &str, curves: Vec<Curve>) -> Plot {
    Plot {
        id: id.to_owned(),
        title: format!("Latency: {title}"),
        table: None,
        shape: Shape::Curves {
            x: Axis::new("share of the frames that took no longer", Scale::Nines),
            y: Axis::new("time", Scale::LogTime),
            curves,
        },
    }
}

/// More points than this nobody sees.
const POINTS_MAX: usize = 600;

/// A distribution as a curve: from the whole histogram, where it was saved.
pub(super) fn curve(key: Key, times: &Distribution) -> Option<Curve> {
    let histogram = times
        .histogram
        .as_ref()
        .and_then(|it| Some((it.ns_per_unit, it.histogram()?)));
    let mut steps: Vec<(f64, f64)> = match &histogram {
        Some((ns, histogram)) => histogram
            .iter_recorded()
            .map(|step| (step.value_iterated_to() as f64 * ns, step.quantile()))
            .collect(),
        None => times.cdf.iter().map(|&[ns, share]| (ns, share)).collect(),
    };
    if steps.len() > POINTS_MAX {
        let every = steps.len().div_ceil(POINTS_MAX);
        let last = steps.len() - 1;
        let kept = steps
            .iter()
            .enumerate()
            .filter(|(at, _)| at % every == 0 || *at == last);
        steps = kept.map(|(_, step)| *step).collect();
    }
    let first = steps.first()?.0;
    // The longest of n frames stands where one in 2 n would: there is no place for 100 %.
    let most = 1.0 - 0.5 / times.count.max(1) as f64;
    let mut points = vec![Point::at(0.0, times.min.max(0.1).min(first))];
    points.extend(
        steps
            .into_iter()
            .map(|(ns, share)| Point::at(share.min(most), ns)),
    );
    Some(Curve {
        key,
        points,
        marked: false,
    })
}

const LOSS_COLUMNS: &str =
    "switch | offered, Mpps | received, Mpps | loss | of it refused | placement";

/// A line for each rate.
fn loss_lines(one: &LossCurve) -> Vec<Vec<String>> {
    let line = |step: &Step| {
        vec![
            one.peer.clone(),
            digits(step.offered_mpps),
            digits(step.received_mpps) + partial(&one.partial),
            Scale::Loss.label(round(step.loss)),
            Scale::Loss.label(round(step.refused)),
            placement_name(step.placement).to_owned(),
        ]
    };
    one.steps.iter().map(line).collect()
}

/// Loss over the offered rate.
pub(super) fn loss(saved: &Saved) -> Section {
    let all = loss_curves(saved);
    let titles = each(all.iter().map(|one| one.work.title.clone()));
    let plots = titles.iter().enumerate().map(|(number, title)| {
        let these = || all.iter().filter(|one| one.work.title == *title);
        let points = these().flat_map(|one| {
            let key = Key::new(&one.peer, of_steps(&one.steps));
            let step = move |step: &Step| (key.clone(), step.offered_mpps, step.loss);
            one.steps.iter().map(step)
        });
        let mut table = Grid::new(title.as_str(), LOSS_COLUMNS);
        table.lines.extend(these().flat_map(|one| loss_lines(one)));
        Plot {
            id: format!("loss-{number}"),
            title: format!("RFC 2544 §26.3, {title}: loss over the offered rate"),
            shape: Shape::Curves {
                x: Axis::new("million frames per second offered", Scale::Linear),
                y: Axis::new("share lost", Scale::Loss),
                curves: curves(points),
            },
            table: Some(table),
        }
    });
    let plots = plots.filter(has_points).collect();
    let mut grid = Grid::new("loss (RFC 2544 §26.3)", &format!("frames | {LOSS_COLUMNS}"));
    for one in &all {
        grid.lines
            .extend(loss_lines(one).into_iter().map(|mut line| {
                line.insert(0, one.work.title.clone());
                line
            }));
    }
    Section {
        id: "loss",
        title: "Loss".to_owned(),
        about: "The share of the offered frames that did not arrive, by offered rate; further right and lower is better. “Refused” are frames \
                that the switch left in the ring: a ring pushes back where a wire cannot.",
        plots,
        grids: some(grid).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::outcome::distribution;
    use hdrhistogram::Histogram;

    fn times() -> Distribution {
        let mut cycles = Histogram::new_with_bounds(1, 1 << 42, 2).unwrap();
        for value in 1..=10_000 {
            cycles.record(value).unwrap();
        }
        distribution("all", &cycles, 2e9)
    }

    #[test]
    fn a_curve_is_drawn_from_the_saved_histogram() {
        let times = times();
        let text = serde_json::to_string(&times).unwrap();
        let read: Distribution = serde_json::from_str(&text).unwrap();
        let curve = curve(Key::new("ovs", None), &read).unwrap();
        assert!(curve.points.len() > 300, "{}", curve.points.len());
        let half = curve.points.iter().find(|point| point.x >= 0.5).unwrap();
        assert!((half.y - 2500.0).abs() < 40.0, "{half:?}");
        assert!(curve.points.is_sorted_by(|a, b| a.x <= b.x && a.y <= b.y));
        assert_eq!(curve.points.last().unwrap().x, 1.0 - 0.5 / 10_000.0);
    }

    #[test]
    fn without_a_histogram_or_with_a_damaged_one_the_saved_curve_is_drawn() {
        let mut times = times();
        times.histogram.as_mut().unwrap().v2_deflate.truncate(20);
        let damaged = curve(Key::new("ovs", None), &times).unwrap();
        times.histogram = None;
        let without = curve(Key::new("ovs", None), &times).unwrap();
        assert_eq!(damaged.points, without.points);
        assert!(without.points.len() > 20);
        times.cdf.clear();
        assert!(curve(Key::new("ovs", None), &times).is_none());
    }

    #[test]
    fn shares_keep_two_digits() {
        assert_eq!(Scale::Loss.label(round(0.012_345)), "1.2 %");
        assert_eq!(Scale::Loss.label(round(0.0)), "0 %");
    }
}
