//! What a plot shows, without a drawing: scales, curves, bars.

use super::Grid;
use crate::sentinel::Placement;
use crate::summary::{Spread, digits};

/// A plot.
#[derive(Clone, Debug)]
pub(crate) struct Plot {
    /// For links and tests; unique on a page.
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) shape: Shape,
    /// What stands under it on the page, if it has a table of its own.
    pub(crate) table: Option<Grid>,
}

/// Its kind.
#[derive(Clone, Debug)]
pub(crate) enum Shape {
    Curves {
        x: Axis,
        y: Axis,
        curves: Vec<Curve>,
    },
    /// A row of bars per kind of work, one for each switch.
    Bars { label: String, rows: Vec<BarRow> },
}

/// Bars of one kind of work.
#[derive(Clone, Debug)]
pub(crate) struct BarRow {
    pub(crate) name: String,
    pub(crate) bars: Vec<(Key, Spread)>,
}

/// Whose curve it is, and where the two CPUs were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) peer: String,
    pub(crate) look: Look,
}

/// How a curve is drawn: figures of different placements cannot be compared, and must not look as if they could.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Look {
    /// Nobody looked: a line.
    Unknown,
    /// Near: a line.
    Solid,
    /// Far: dashes.
    Dashed,
    /// The placement changed or is unclear: dots.
    Dotted,
}

impl Look {
    pub(crate) fn of(placement: Option<Placement>) -> Self {
        match placement {
            None => Self::Unknown,
            Some(Placement::Near) => Self::Solid,
            Some(Placement::Far) => Self::Dashed,
            Some(Placement::Mixed) => Self::Dotted,
        }
    }
}

impl Key {
    pub(crate) fn new(peer: &str, placement: Option<Placement>) -> Self {
        Self {
            peer: peer.to_owned(),
            look: Look::of(placement),
        }
    }

    /// For the legend.
    pub(crate) fn name(&self) -> String {
        match self.look {
            Look::Unknown => self.peer.clone(),
            Look::Solid => format!("{}, near", self.peer),
            Look::Dashed => format!("{}, far", self.peer),
            Look::Dotted => format!("{}, placement unclear", self.peer),
        }
    }
}

/// A line with points.
#[derive(Clone, Debug)]
pub(crate) struct Curve {
    pub(crate) key: Key,
    /// Sorted by x.
    pub(crate) points: Vec<Point>,
    /// Whether each point is a figure of its own, or just a part of the line.
    pub(crate) marked: bool,
}

/// A figure with its spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Point {
    /// A single sample.
    pub(crate) fn at(x: f64, y: f64) -> Self {
        Self {
            x,
            y,
            low: y,
            high: y,
        }
    }

    /// The median of several, with the least and the most.
    pub(crate) fn of(x: f64, spread: Spread) -> Self {
        Self {
            x,
            y: spread.median,
            low: spread.min,
            high: spread.max,
        }
    }
}

impl Plot {
    /// The switches on it, each once, in the order of the legend.
    pub(crate) fn keys(&self) -> Vec<Key> {
        let mut keys: Vec<Key> = Vec::new();
        let all: Vec<&Key> = match &self.shape {
            Shape::Curves { curves, .. } => curves.iter().map(|curve| &curve.key).collect(),
            Shape::Bars { rows, .. } => rows
                .iter()
                .flat_map(|row| row.bars.iter().map(|(key, _)| key))
                .collect(),
        };
        for key in all {
            if !keys.contains(key) {
                keys.push(key.clone());
            }
        }
        keys
    }
}

/// Joins points to curves by switch and placement, in the order of their first point; points with the same x become one with a spread.
pub(crate) fn curves(points: impl IntoIterator<Item = (Key, f64, f64)>) -> Vec<Curve> {
    let mut curves: Vec<(Key, Vec<(f64, Vec<f64>)>)> = Vec::new();
    for (key, x, y) in points {
        let at = curves.iter().position(|(known, _)| *known == key);
        let at = at.unwrap_or_else(|| {
            curves.push((key, Vec::new()));
            curves.len() - 1
        });
        let groups = &mut curves[at].1;
        match groups.iter_mut().find(|(known, _)| *known == x) {
            Some((_, values)) => values.push(y),
            None => groups.push((x, vec![y])),
        }
    }
    let point = |(x, values): (f64, Vec<f64>)| Some(Point::of(x, Spread::of(values.into_iter())?));
    curves
        .into_iter()
        .map(|(key, mut groups)| {
            groups.sort_by(|a, b| a.0.total_cmp(&b.0));
            Curve {
                key,
                points: groups.into_iter().filter_map(point).collect(),
                marked: true,
            }
        })
        .collect()
}

/// An axis.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) label: String,
    pub(crate) scale: Scale,
    /// Where something was measured, if that is where the marks shall be.
    pub(crate) marks: Vec<f64>,
}

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From 0.
    Linear,
    /// Numbers, logarithmic.
    Log,
    /// Nanoseconds, logarithmic.
    LogTime,
    /// Numbers from 0 on, logarithmic beyond 1.
    Count,
    /// Shares below 1: each further nine takes as much room as the one before.
    Nines,
    /// Shares from 0 on, logarithmic; 0 has a place of its own below all others.
    Loss,
}

/// The least share of loss that has a place of its own.
const LOSS_FLOOR: f64 = 1e-7;

impl Axis {
    pub(crate) fn new(label: &str, scale: Scale) -> Self {
        Self {
            label: label.to_owned(),
            scale,
            marks: Vec::new(),
        }
    }

    /// With marks at these values.
    pub(crate) fn marked(mut self, marks: impl IntoIterator<Item = f64>) -> Self {
        self.marks = marks.into_iter().collect();
        self.marks.sort_by(f64::total_cmp);
        self.marks.dedup();
        self
    }

    /// Where the drawing begins and ends for such values.
    pub(crate) fn range(&self, values: impl IntoIterator<Item = f64>) -> (f64, f64) {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values {
            let place = self.scale.place(value);
            (low, high) = (low.min(place), high.max(place));
        }
        if !low.is_finite() || !high.is_finite() {
            return (0.0, 1.0);
        }
        match self.scale {
            Scale::Linear if self.marks.is_empty() => {
                (0.0, if high > 0.0 { high * 1.06 } else { 1.0 })
            }
            Scale::Nines => (0.0, high.max(2.0) * 1.01),
            Scale::Loss => (self.scale.place(0.0) - 0.2, 0.1),
            _ => {
                let room = ((high - low) * 0.05).max(0.02);
                (low - room, high + room)
            }
        }
    }

    /// The marks between two places: place and label.
    pub(crate) fn ticks(&self, low: f64, high: f64) -> Vec<(f64, String)> {
        let values = if self.marks.is_empty() {
            self.scale.values(low, high)
        } else {
            self.marks.clone()
        };
        let marks = values
            .into_iter()
            .map(|value| (self.scale.place(value), self.scale.label(value)));
        marks
            .filter(|(place, _)| (low - 1e-9..=high + 1e-9).contains(place))
            .collect()
    }
}

impl Scale {
    /// A value's place.
    pub(crate) fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log | Self::LogTime => value.max(1e-9).log10(),
            Self::Count => (value.max(0.0) + 1.0).log10(),
            Self::Nines => -(1.0 - value).max(1e-12).log10(),
            Self::Loss if value < LOSS_FLOOR => LOSS_FLOOR.log10() - 0.5,
            Self::Loss => value.log10(),
        }
    }

    /// Round values between two places.
    fn values(self, low: f64, high: f64) -> Vec<f64> {
        match self {
            Self::Linear | Self::Count => {
                let top = if self == Self::Count {
                    10f64.powf(high) - 1.0
                } else {
                    high
                };
                let step = round_step(top / 5.0);
                let count = (top / step + 1e-9).floor() as u32;
                (0..=count).map(|number| f64::from(number) * step).collect()
            }
            Self::Log | Self::LogTime => {
                let factors: &[f64] = if high - low < 1.2 {
                    &[1.0, 2.0, 3.0, 5.0, 7.0]
                } else if high - low < 3.0 {
                    &[1.0, 2.0, 5.0]
                } else {
                    &[1.0]
                };
                (low.floor() as i32..=high.ceil() as i32)
                    .flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)))
                    .collect()
            }
            Self::Nines => {
                let mut values = vec![0.0, 0.5];
                values.extend((1..=high as i32).map(|nines| 1.0 - 10f64.powi(-nines)));
                values
            }
            Self::Loss => {
                let mut values = vec![0.0];
                values.extend((-6..=0).step_by(2).map(|power| 10f64.powi(power)));
                values
            }
        }
    }

    /// For people.
    pub(crate) fn label(self, value: f64) -> String {
        match self {
            Self::Nines | Self::Loss => share(value),
            Self::LogTime => time(value),
            _ => short(value),
        }
    }
}

fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.max(1e-9).log10().floor());
    let factors = [1.0, 2.0, 2.5, 5.0, 10.0];
    let fits = factors
        .into_iter()
        .find(|factor| factor * power >= step * 0.999);
    fits.unwrap_or(10.0) * power
}

/// As few digits as a mark needs.
fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    text.to_owned()
}

/// A share in per cent, with as many digits as it has nines or noughts.
fn share(value: f64) -> String {
    let text = format!("{:.8}", value * 100.0);
    format!("{} %", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Nanoseconds in a unit that suits them.
pub(crate) fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        large if large >= 0.9995e9 => (large / 1e9, "s"),
        large if large >= 0.9995e6 => (large / 1e6, "ms"),
        middle if middle >= 999.5 => (middle / 1e3, "µs"),
        small => (small, "ns"),
    };
    let text = digits(value);
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    };
    format!("{text} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_nine_takes_the_same_room() {
        let place = |share| Scale::Nines.place(share);
        assert!((place(0.99) - place(0.9) - 1.0).abs() < 1e-9);
        assert!((place(0.999) - place(0.99) - 1.0).abs() < 1e-9);
        assert_eq!(place(0.0), 0.0);
        assert_eq!(Scale::Nines.label(1.0 - 1e-5), "99.999 %");
    }

    #[test]
    fn no_loss_stands_below_the_smallest_loss() {
        assert!(Scale::Loss.place(0.0) < Scale::Loss.place(1.1e-7));
        assert_eq!(Scale::Loss.label(1e-6), "0.0001 %");
        assert_eq!(Scale::Loss.label(0.0), "0 %");
    }

    #[test]
    fn linear_axes_begin_at_zero_and_have_round_marks() {
        let axis = Axis::new("Mpps", Scale::Linear);
        let (low, high) = axis.range([7.0, 23.0]);
        let labels: Vec<_> = axis
            .ticks(low, high)
            .into_iter()
            .map(|tick| tick.1)
            .collect();
        assert_eq!(
            (low, labels),
            (
                0.0,
                ["0", "5", "10", "15", "20"].map(str::to_owned).to_vec()
            )
        );
    }

    #[test]
    fn times_carry_their_unit() {
        assert_eq!(
            [500.0, 1000.0, 2.5e6, 1e9].map(time),
            ["500 ns", "1 µs", "2.5 ms", "1 s"]
        );
    }

    #[test]
    fn points_of_one_switch_and_placement_are_one_curve_and_samples_a_spread() {
        let near = || Key::new("ovs", Some(Placement::Near));
        let far = || Key::new("ovs", Some(Placement::Far));
        let found = curves([
            (near(), 64.0, 1.0),
            (far(), 64.0, 9.0),
            (near(), 16.0, 3.0),
            (near(), 64.0, 2.0),
        ]);
        assert_eq!(found.len(), 2);
        assert_eq!(
            found[0].points,
            [
                Point::at(16.0, 3.0),
                Point {
                    x: 64.0,
                    y: 1.5,
                    low: 1.0,
                    high: 2.0
                }
            ]
        );
        assert_eq!(found[1].key.name(), "ovs, far");
    }

    #[test]
    fn values_of_nothing_still_have_an_axis() {
        for scale in [
            Scale::Linear,
            Scale::Log,
            Scale::LogTime,
            Scale::Count,
            Scale::Nines,
            Scale::Loss,
        ] {
            let axis = Axis::new("", scale);
            for values in [vec![], vec![0.0], vec![f64::NAN]] {
                let (low, high) = axis.range(values);
                assert!(low < high, "{scale:?}");
                assert!(axis.ticks(low, high).len() < 100);
            }
        }
    }
}
