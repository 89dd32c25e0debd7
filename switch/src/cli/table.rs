//! Tables for people, JSON for scripts, both without a panic when the reader has gone.

use std::io::{self, Write as _};

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

/// Where answers go, and in which form.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
}

impl Output {
    /// JSON, or text.
    pub fn new(json: bool) -> Self {
        Output { json }
    }

    /// True if stdout is for JSON alone.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// Prints `data` as JSON, or what `text` makes of it.
    pub fn show<T: Serialize>(
        self,
        data: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            print(&(serde_json::to_string_pretty(data)? + "\n"))
        } else {
            print(&text(data))
        }
    }

    /// Prints `data` as one line of JSON, or what `text` makes of it on a cleared screen.
    pub fn refresh<T: Serialize>(
        self,
        data: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            return print(&(serde_json::to_string(data)? + "\n"));
        }
        // Home, then clear to the end: no flicker.
        let clear = if io::IsTerminal::is_terminal(&io::stdout()) {
            "\x1b[H\x1b[J"
        } else {
            ""
        };
        print(&format!("{clear}{}", text(data)))
    }
}

/// Writes to stdout. A reader that has seen enough (`| head`) ends the program, quietly.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

/// Lines and columns; a column of numbers stands to the right.
pub(super) fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = rows.into_iter().collect();
    let numbers = |column: usize| {
        rows.iter()
            .all(|row| row.get(column).is_none_or(|text| is_number(text)))
    };
    let right: Vec<bool> = (0..head.len()).map(numbers).collect();
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(head);
    for row in &rows {
        table.add_row(row.iter().zip(&right).map(|(text, right)| {
            Cell::new(text).set_alignment(if *right {
                CellAlignment::Right
            } else {
                CellAlignment::Left
            })
        }));
    }
    table.trim_fmt() + "\n"
}

/// `-` stands for a number that is not there.
fn is_number(text: &str) -> bool {
    text == "-"
        || (!text.is_empty()
            && text
                .chars()
                .all(|c| c.is_ascii_digit() || matches!(c, ',' | '.' | '%')))
}

/// `1,234,567`
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap_or_default())
        .collect();
    groups.join(",")
}

/// `1h 02m`, `3m 04s`, `5s`
pub(super) fn duration(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m {s:02}s"),
        (h, m, _) if h < 48 => format!("{h}h {m:02}m"),
        (h, ..) => format!("{}d {}h", h / 24, h % 24),
    }
}

/// `64 MiB`
pub(super) fn size(bytes: u64) -> String {
    let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units
        .iter()
        .find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit))
    {
        Some((name, unit)) => format!("{} {name}", bytes / unit),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_numbers_as_people_read_them() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(duration(59), "59s");
        assert_eq!(duration(184), "3m 04s");
        assert_eq!(duration(3720), "1h 02m");
        assert_eq!(duration(49 * 3600), "2d 1h");
        assert_eq!(size(2 << 20), "2 MiB");
        assert_eq!(size(3 << 29), "1536 MiB");
        assert_eq!(size(1000), "1000 B");
    }

    #[test]
    fn aligns_numbers_to_the_right_and_words_to_the_left() {
        let text = table(
            &["NAME", "FRAMES"],
            [
                vec!["blue".into(), "1,234".into()],
                vec!["r".into(), "5".into()],
            ],
        );
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        assert_eq!(lines, [" NAME  FRAMES", " blue   1,234", " r          5"]);
    }
}
