//! Draws a plot as SVG, with `plotters`.
//!
//! The page's style sheet gives colours, dashes and fonts: what is drawn here names them by colour only (see
//! [`palette`](super::palette)). Everything is drawn at [`FINE`] times its size, as `plotters` places things on whole pixels.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::palette;
use super::plot::{Axis, BarRow, Curve, Key, Look, Plot, Shape};
use crate::summary::digits;

/// Pixels of the drawing per pixel on the page.
const FINE: i32 = 3;
/// The style sheet knows these.
const INK: RGBColor = RGBColor(0, 0, 0);
const LINE: RGBColor = RGBColor(0xDD, 0xDD, 0xDD);
/// Size of letters, pixels on the page.
const LETTERS: i32 = 15;

/// How wide the plot is on the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Wide,
    Narrow,
}

impl Width {
    fn pixels(self) -> i32 {
        match self {
            Self::Wide => 860,
            Self::Narrow => 380,
        }
    }

    /// For the style sheet.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Wide => "wide",
            Self::Narrow => "narrow",
        }
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The plot as an `svg` element.
pub(crate) fn draw(plot: &Plot, width: Width) -> Result<String> {
    let height = match &plot.shape {
        Shape::Curves { .. } => 360,
        Shape::Bars { rows, .. } => {
            let bars: usize = rows.iter().map(|row| row.bars.len()).sum();
            66 + bars as i32 * 20 + rows.len() as i32 * 12
        }
    };
    let size = (width.pixels() * FINE, height * FINE);
    let mut text = String::new();
    {
        let backend = SVGBackend::with_string(&mut text, (size.0 as u32, size.1 as u32));
        let area = backend.into_drawing_area();
        let drawn = match &plot.shape {
            Shape::Curves { x, y, curves } => draw_curves(&area, (x, y), curves, size),
            Shape::Bars { label, rows } => draw_bars(&area, label, rows, width),
        };
        drawn.map_err(|why| anyhow!("{}: {why}", plot.title))?;
        area.present()
            .map_err(|why| anyhow!("{}: {why}", plot.title))?;
    }
    // Its size on the page is the style sheet's, and inside of HTML it needs no name space.
    let inside = text
        .split_once("<svg")
        .and_then(|(_, rest)| rest.split_once('>'))
        .map_or(text.as_str(), |(_, inside)| inside);
    Ok(format!(
        "<svg class=\"{}\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">{inside}",
        width.name(),
        size.0,
        size.1,
        super::page::escape(&plot.title)
    ))
}

fn letters() -> TextStyle<'static> {
    ("sans-serif", LETTERS * FINE).into_font().color(&INK)
}

fn rgb(key: &Key) -> RGBColor {
    let colour = palette::colour(key);
    RGBColor((colour >> 16) as u8, (colour >> 8) as u8, colour as u8)
}

/// Leaves out marks whose labels would run into each other.
fn thin(ticks: Vec<(f64, String)>, per_unit: f64, vertical: bool) -> Vec<(f64, String)> {
    let room = |label: &str| {
        let letters = if vertical {
            2.0
        } else {
            label.chars().count() as f64 * 0.62 + 1.0
        };
        letters * f64::from(LETTERS * FINE) / 2.0
    };
    let mut kept: Vec<(f64, String)> = Vec::new();
    for (number, tick) in ticks.iter().enumerate() {
        let gap = |other: &(f64, String)| {
            (tick.0 - other.0).abs() * per_unit - room(&tick.1) - room(&other.1)
        };
        // The last mark matters more than the one before it.
        if number + 1 == ticks.len()
            && kept.len() > 1
            && kept.last().is_some_and(|last| gap(last) < 0.0)
        {
            kept.pop();
        }
        if kept.last().is_none_or(|last| gap(last) >= 0.0) {
            kept.push(tick.clone());
        }
    }
    kept
}

/// Places between two ends, with marks of our own.
struct Places {
    ends: (f64, f64),
    marks: Vec<(f64, String)>,
}

impl Ranged for Places {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, limit: (i32, i32)) -> i32 {
        let share = (place - self.ends.0) / (self.ends.1 - self.ends.0);
        // Saturating: a place that is no number is drawn at the edge.
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.marks.iter().map(|mark| mark.0).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.ends.0..self.ends.1
    }
}

impl ValueFormatter<f64> for Places {
    fn format(place: &f64) -> String {
        place.to_string()
    }

    fn format_ext(&self, place: &f64) -> String {
        let found = self.marks.iter().find(|mark| (mark.0 - place).abs() < 1e-9);
        found.map(|mark| mark.1.clone()).unwrap_or_default()
    }
}

fn draw_curves(
    area: &Area<'_>,
    (x, y): (&Axis, &Axis),
    curves: &[Curve],
    size: (i32, i32),
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let across = x.range(points().map(|point| point.x));
    let up = y.range(points().flat_map(|point| [point.low, point.y, point.high]));
    // 1. The frame.
    let (left, below, margin) = (84 * FINE, 54 * FINE, 12 * FINE);
    let per_unit = |span: i32, (low, high): (f64, f64)| f64::from(span) / (high - low);
    let marks_x = thin(
        x.ticks(across.0, across.1),
        per_unit(size.0 - left - 2 * margin, across),
        false,
    );
    let marks_y = thin(
        y.ticks(up.0, up.1),
        per_unit(size.1 - below - 2 * margin, up),
        true,
    );
    let mut chart = ChartBuilder::on(area)
        .margin(margin)
        .x_label_area_size(below)
        .y_label_area_size(left)
        .build_cartesian_2d(
            Places {
                ends: across,
                marks: marks_x,
            },
            Places {
                ends: up,
                marks: marks_y,
            },
        )?;
    chart
        .configure_mesh()
        .x_desc(x.label.as_str())
        .y_desc(y.label.as_str())
        .label_style(letters())
        .axis_desc_style(letters())
        .axis_style(INK)
        .bold_line_style(LINE.stroke_width(FINE as u32))
        .draw()?;
    // 2. The curves, the first (ours) on top.
    for curve in curves.iter().rev() {
        let colour = rgb(&curve.key);
        let place = |at: f64, value: f64| (x.scale.place(at), y.scale.place(value));
        let line: Vec<_> = curve
            .points
            .iter()
            .map(|point| place(point.x, point.y))
            .collect();
        chart.draw_series([PathElement::new(line, colour.stroke_width(2 * FINE as u32))])?;
        if !curve.marked {
            continue;
        }
        for point in &curve.points {
            let whisker = vec![place(point.x, point.low), place(point.x, point.high)];
            let solid = rgb(&Key {
                look: Look::Solid,
                ..curve.key.clone()
            });
            chart.draw_series([PathElement::new(whisker, solid.stroke_width(FINE as u32))])?;
            let style = match curve.key.look {
                Look::Unknown | Look::Solid => solid.filled(),
                _ => solid.stroke_width(2 * FINE as u32),
            };
            let at = place(point.x, point.y);
            match curve.key.look {
                Look::Dotted => chart.draw_series([Cross::new(at, 4 * FINE, style)])?,
                _ => chart.draw_series([Circle::new(at, 4 * FINE, style)])?,
            };
        }
    }
    Ok(())
}

fn draw_bars(
    area: &Area<'_>,
    axis: &str,
    rows: &[BarRow],
    width: Width,
) -> Result<(), Box<dyn std::error::Error>> {
    let most = rows
        .iter()
        .flat_map(|row| row.bars.iter().map(|(_, spread)| spread.max))
        .fold(0.0, f64::max)
        .max(1e-9);
    let longest = rows
        .iter()
        .map(|row| row.name.chars().count())
        .max()
        .unwrap_or(0);
    let left = (longest as i32 * LETTERS * 6 / 10 + 12).min(width.pixels() / 3) * FINE;
    // 1. The frame: a unit of height is a bar, half a unit stands between rows.
    let height: f64 = rows.iter().map(|row| row.bars.len() as f64 + 0.6).sum();
    let mut top = height;
    let mut names = Vec::new();
    for row in rows {
        let tall = row.bars.len() as f64 + 0.6;
        names.push((top - tall / 2.0, row.name.clone()));
        top -= tall;
    }
    let scale = Axis::new(axis, super::plot::Scale::Linear);
    // Room for the figure behind the longest bar.
    let across = most * 1.22;
    let per_unit = f64::from(width.pixels() * FINE - left) / across;
    let marks = thin(scale.ticks(0.0, across), per_unit, false);
    let mut chart = ChartBuilder::on(area)
        .margin(8 * FINE)
        .x_label_area_size(50 * FINE)
        .y_label_area_size(left)
        .build_cartesian_2d(
            Places {
                ends: (0.0, across),
                marks,
            },
            Places {
                ends: (0.0, height),
                marks: names,
            },
        )?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc(axis)
        .label_style(letters())
        .axis_desc_style(letters())
        .axis_style(INK)
        .bold_line_style(LINE.stroke_width(FINE as u32))
        .draw()?;
    // 2. The bars, each with its spread and its figure.
    let mut top = height;
    let behind = letters().pos(Pos::new(HPos::Left, VPos::Center));
    for row in rows {
        top -= 0.3;
        for (key, spread) in &row.bars {
            let (high, low, middle) = (top - 0.1, top - 0.9, top - 0.5);
            let style = rgb(key).filled();
            chart.draw_series([Rectangle::new([(0.0, high), (spread.median, low)], style)])?;
            let whisker = vec![(spread.min, middle), (spread.max, middle)];
            chart.draw_series([PathElement::new(whisker, INK.stroke_width(FINE as u32))])?;
            let at = (spread.max + most * 0.012, middle);
            chart.draw_series([Text::new(digits(spread.median), at, behind.clone())])?;
            top -= 1.0;
        }
        top -= 0.3;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::plot::{Scale, curves};
    use crate::sentinel::Placement;

    fn plot() -> Plot {
        let near = Key::new("ringway", Some(Placement::Near));
        let far = Key::new("ovs", Some(Placement::Far));
        Plot {
            id: "p".to_owned(),
            title: "a \"plot\" & more".to_owned(),
            table: None,
            shape: Shape::Curves {
                x: Axis::new("bytes", Scale::Log).marked([64.0, 1024.0, 1280.0, 1518.0]),
                y: Axis::new("Mpps", Scale::Linear),
                curves: curves([
                    (near.clone(), 64.0, 20.0),
                    (near, 1518.0, 9.0),
                    (far, 64.0, 10.0),
                ]),
            },
        }
    }

    #[test]
    fn a_drawing_has_its_curves_labels_and_no_address() {
        let text = draw(&plot(), Width::Wide).unwrap();
        for part in [
            "bytes",
            "Mpps",
            "1518",
            "#0B62C4",
            "#D45D01",
            "<polyline",
            "a &quot;plot&quot; &amp; more",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("http"), "{text}");
        assert!(text.starts_with("<svg class=\"wide\"") && text.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn marks_that_would_overlap_are_left_out_but_not_the_last() {
        let text = draw(&plot(), Width::Narrow).unwrap();
        assert!(text.contains("64") && text.contains("1518"), "{text}");
        assert!(!text.contains("1280"), "{text}");
    }
}
