//! The page: one file, without scripts and without anything from elsewhere.

use std::fmt::Write;

use anyhow::Result;

use super::diff::Compared;
use super::plot::Plot;
use super::sections::sections;
use super::svg::{Width, draw};
use super::{Grid, PARTIAL, Section, circumstances, compared, palette};
use crate::results::Saved;

/// Nothing may be loaded, whatever a saved run says.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

const STYLE: &str = include_str!("page.css");

/// Text as it may stand in an element or an attribute.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '&' => escaped += "&amp;",
            '"' => escaped += "&quot;",
            '\t' | '\n' => escaped.push(letter),
            // XML has no place for them.
            control if control.is_control() => escaped.push('\u{FFFD}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// The whole page.
pub(super) fn render(saved: &Saved, comparison: Option<&Compared>) -> Result<String> {
    let sections = sections(saved);
    let title = title(saved);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{0}</title>\n<style>\n{STYLE}\n{1}</style>\n</head>\n<body>\n<header>\n<h1>{0}</h1>\n",
        escape(&title),
        palette::rules()
    );
    if !saved.complete {
        let _ = writeln!(
            page,
            "<p class=\"warning\"><strong>{}</strong></p>",
            escape(PARTIAL)
        );
    }
    page += "<dl>\n";
    for (what, value) in circumstances(saved) {
        let _ = writeln!(page, "<dt>{}</dt><dd>{}</dd>", escape(what), escape(&value));
    }
    page += "</dl>\n</header>\n";
    page += &navigation(&sections, comparison.is_some());
    page += "<main>\n";
    if let Some(comparison) = comparison {
        page += &then_and_now(comparison);
    }
    for part in &sections {
        page += &section(part)?;
    }
    page += &caveats(saved);
    let _ = write!(
        page,
        "</main>\n<footer>ringway-bench {}; drawn from the saved run by {}</footer>\n</body>\n</html>\n",
        escape(&saved.version),
        env!("CARGO_PKG_VERSION")
    );
    Ok(page)
}

/// The switches that were measured.
fn title(saved: &Saved) -> String {
    let names = saved.versions.iter().map(|version| version.name.as_str());
    let names: Vec<_> = super::cells::each(names.filter(|&name| name != "client"));
    match names.as_slice() {
        [] => "A switch, measured".to_owned(),
        [one] => format!("{one}, measured"),
        [most @ .., last] => format!("{} and {last}, measured", most.join(", ")),
    }
}

fn navigation(sections: &[Section], compared: bool) -> String {
    let mut links = String::from("<nav>");
    if compared {
        links += "<a href=\"#compared\">Then and now</a> ";
    }
    for section in sections {
        let _ = write!(
            links,
            "<a href=\"#{}\">{}</a> ",
            section.id,
            escape(&section.title)
        );
    }
    links + "<a href=\"#caveats\">Caveats</a></nav>\n"
}

fn section(section: &Section) -> Result<String> {
    let mut text = format!(
        "<section id=\"{}\">\n<h2>{}</h2>\n<p class=\"about\">{}</p>\n",
        section.id,
        escape(&section.title),
        escape(section.about)
    );
    for plot in &section.plots {
        text += &figure(plot)?;
    }
    if section.plots.iter().all(|plot| plot.table.is_none()) {
        section.grids.iter().for_each(|grid| text += &table(grid));
    }
    Ok(text + "</section>\n")
}

/// A plot with its legend: drawn twice, the style sheet shows the one that fits.
fn figure(plot: &Plot) -> Result<String> {
    let mut text = format!(
        "<figure id=\"{}\">\n<figcaption>{}</figcaption>\n<ul class=\"legend\">",
        plot.id,
        escape(&plot.title)
    );
    for key in plot.keys() {
        // A line as long as it takes to tell dashes from dots.
        let _ = write!(
            text,
            "<li><svg viewBox=\"0 0 108 30\" class=\"swatch\"><polyline points=\"0,15 108,15\" fill=\"none\" stroke-width=\"8\" stroke=\"{}\"/></svg>{}</li>",
            palette::hex(palette::colour(&key)),
            escape(&key.name())
        );
    }
    text += "</ul>\n";
    text += &draw(plot, Width::Wide)?;
    text += &draw(plot, Width::Narrow)?;
    text += "</figure>\n";
    text += &plot.table.as_ref().map(table).unwrap_or_default();
    Ok(text)
}

fn table(grid: &Grid) -> String {
    let mut text = format!(
        "<h3>{}</h3>\n<div class=\"table\"><table>\n",
        escape(&grid.title)
    );
    for (number, line) in grid.lines.iter().enumerate() {
        let kind = if number == 0 { "th" } else { "td" };
        let (open, close) = match number {
            0 => ("<thead>", "</thead>\n<tbody>"),
            _ => ("", ""),
        };
        text += open;
        text += "<tr>";
        for (column, cell) in line.iter().enumerate() {
            // Numbers stand under each other; words begin at the left.
            let class = if is_number(&grid.lines[0], column, cell) {
                " class=\"number\""
            } else {
                ""
            };
            let _ = write!(text, "<{kind}{class}>{}</{kind}>", escape(cell));
        }
        text += "</tr>";
        text += close;
        text.push('\n');
    }
    text + "</tbody>\n</table></div>\n"
}

/// Columns of words, whatever a cell in them begins with.
const WORDS: [&str; 9] = [
    "frames",
    "switch",
    "test",
    "placement",
    "how",
    "verdict",
    "pace",
    "direction",
    "unit",
];

fn is_number(head: &[String], column: usize, cell: &str) -> bool {
    let words = |name: &String| WORDS.contains(&name.as_str());
    let number = cell.starts_with(|first: char| first.is_ascii_digit() || "+-–".contains(first));
    // A head stands over its numbers.
    column > 0
        && !head.get(column).is_some_and(words)
        && (number || head.get(column).is_some_and(|name| name == cell))
}

fn then_and_now(compared: &Compared) -> String {
    let mut text = String::from("<section id=\"compared\">\n<h2>Then and now</h2>\n");
    for warning in &compared.warnings {
        let _ = writeln!(text, "<p class=\"warning\">{}</p>", escape(warning));
    }
    text += "<p class=\"about\">A difference counts where the spreads of both runs do not overlap and the medians differ by 8 % or more. Figures of \
             different placements are never compared. All that follows below is of the later run.</p>\n";
    text += &table(&compared.grid);
    text += "<ul>\n";
    for note in &compared.notes {
        let _ = writeln!(text, "<li>{}</li>", escape(note));
    }
    text + "</ul>\n</section>\n"
}

/// What limits the figures.
fn caveats(saved: &Saved) -> String {
    let mut text = String::from("<section id=\"caveats\">\n<h2>Caveats</h2>\n<ul>\n");
    let mut say = |line: &str| {
        let _ = writeln!(text, "<li>{}</li>", escape(line));
    };
    if saved.host.virtual_machine {
        say(
            "Measured on a virtual machine: its CPUs move between physical cores, some of which share a cache (“near”) and some of which do not \
             (“far”). That changes every figure by 1.4 to 3 times, and the ranking too; so the two are never joined.",
        );
    }
    say(
        "Trust ratios within one run and one placement; differences below 8 % mean nothing. The longest times are often the machine's, not the switch's.",
    );
    saved.caveats.iter().for_each(|caveat| say(caveat));
    text += "</ul>\n";
    let discarded = compared::discarded(saved);
    if let Some((summary, lines)) = discarded.split_first() {
        let _ = writeln!(text, "<details><summary>{}</summary><ul>", escape(summary));
        for line in lines {
            let _ = writeln!(text, "<li>{}</li>", escape(line));
        }
        text += "</ul></details>\n";
    }
    text + "</section>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_a_file_stays_text() {
        assert_eq!(
            escape("<script src=\"x\">&\u{1}"),
            "&lt;script src=&quot;x&quot;&gt;&amp;\u{FFFD}"
        );
    }
}
