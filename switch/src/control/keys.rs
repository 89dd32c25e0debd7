//! One reader of `key = value` for the configuration file, port texts on the command line and JSON of the API: strict, and every
//! refusal is one sentence with the place, the key and the remedy.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// Why an input was refused: one sentence that names the place and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// A value before it has a meaning.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Raw {
    /// From `key=value` on a command line: numbers and lists are still text.
    Text(String),
    /// A quoted string.
    Str(String),
    /// An integer.
    Int(i64),
    /// A list.
    List(Vec<Raw>),
    /// Something no key takes; its kind in words.
    Other(&'static str),
}

impl fmt::Display for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Raw::Text(text) | Raw::Str(text) => write!(f, "{text:?}"),
            Raw::Int(number) => write!(f, "{number}"),
            Raw::List(_) => f.write_str("a list"),
            Raw::Other(kind) => f.write_str(kind),
        }
    }
}

/// A key, its value, and where it stands (`ringway.toml:12`, `--port 2`).
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) at: String,
    pub(crate) key: String,
    pub(crate) value: Raw,
}

impl Entry {
    /// A refusal of this entry. `why` goes on after "`at`: `key` ".
    pub(crate) fn refuse(&self, why: impl fmt::Display) -> ConfigError {
        ConfigError(format!("{}: {} {why}", self.at, self.key))
    }

    /// A refusal for a wrong value; `remedy` says what to write.
    fn wrong(&self, remedy: impl fmt::Display) -> ConfigError {
        self.refuse(format_args!("cannot be {}: {remedy}", self.value))
    }

    /// The value as a string that is not empty.
    pub(crate) fn text(&self, remedy: &str) -> Result<&str, ConfigError> {
        match &self.value {
            Raw::Text(text) | Raw::Str(text) if !text.is_empty() => Ok(text),
            _ => Err(self.wrong(remedy)),
        }
    }

    /// The value as a number in `range`.
    pub(crate) fn number(
        &self,
        range: RangeInclusive<i64>,
        unit: &str,
    ) -> Result<i64, ConfigError> {
        let number = match &self.value {
            Raw::Int(number) => Some(*number),
            Raw::Text(text) => text.parse().ok(),
            _ => None,
        };
        number
            .filter(|number| range.contains(number))
            .ok_or_else(|| {
                self.wrong(format_args!(
                    "write a number from {} to {}{unit}",
                    range.start(),
                    range.end()
                ))
            })
    }

    /// The value as one of a few words.
    pub(crate) fn choice<T: Copy>(&self, words: &[(&str, T)]) -> Result<T, ConfigError> {
        let names: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
        let remedy = format!("write {}", quoted(&names));
        let text = self.text(&remedy)?;
        words
            .iter()
            .find(|(name, _)| *name == text)
            .map(|(_, meaning)| *meaning)
            .ok_or_else(|| self.wrong(did_you_mean(text, &names).unwrap_or(remedy)))
    }

    /// The value as a path.
    pub(crate) fn path(&self) -> Result<PathBuf, ConfigError> {
        self.text("write a path").map(PathBuf::from)
    }

    /// The value as CPU numbers, none twice: a list, or `2+3` on a command line.
    pub(crate) fn cpus(&self) -> Result<Vec<usize>, ConfigError> {
        let refusal =
            || self.wrong("write a list of CPU numbers like [2, 3] (2+3 on a command line)");
        let numbers: Option<Vec<usize>> = match &self.value {
            Raw::List(items) => items
                .iter()
                .map(|item| match item {
                    Raw::Int(number) => usize::try_from(*number).ok(),
                    _ => None,
                })
                .collect(),
            Raw::Text(text) => text.split('+').map(|part| part.parse().ok()).collect(),
            _ => None,
        };
        let numbers = numbers
            .filter(|numbers| !numbers.is_empty())
            .ok_or_else(refusal)?;
        match first_repeated(&numbers) {
            Some(cpu) => {
                Err(self.refuse(format_args!("names CPU {cpu} twice: write each CPU once")))
            }
            None => Ok(numbers),
        }
    }

    /// The value as permission bits: `"660"` or `0o660`'s text, read as octal.
    pub(crate) fn permissions(&self) -> Result<u32, ConfigError> {
        let remedy = "write octal permission bits in quotes, like \"0660\"";
        let text = self.text(remedy)?;
        let digits = text.strip_prefix("0o").unwrap_or(text);
        match u32::from_str_radix(digits, 8) {
            Ok(bits) if bits <= 0o777 && !digits.starts_with('+') => Ok(bits),
            _ => Err(self.wrong(remedy)),
        }
    }
}

fn first_repeated(numbers: &[usize]) -> Option<usize> {
    numbers
        .iter()
        .enumerate()
        .find(|(at, number)| numbers[..*at].contains(number))
        .map(|(_, number)| *number)
}

/// Refuses a key that is not in `known`, and a key that stands there twice.
pub(crate) fn check_keys(entries: &[Entry], known: &[&str], of: &str) -> Result<(), ConfigError> {
    for (at, entry) in entries.iter().enumerate() {
        if !known.contains(&entry.key.as_str()) {
            let remedy = did_you_mean(&entry.key, known)
                .unwrap_or_else(|| format!("{of} has {}", quoted(known)));
            return Err(ConfigError(format!(
                "{}: unknown key {:?}: {remedy}",
                entry.at, entry.key
            )));
        }
        if entries[..at].iter().any(|earlier| earlier.key == entry.key) {
            return Err(entry.refuse("stands there twice: leave one"));
        }
    }
    Ok(())
}

/// `"a", "b" or "c"`.
pub(crate) fn quoted(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

/// `did you mean "socket"?`, if one of the words is near.
pub(crate) fn did_you_mean(typed: &str, words: &[&str]) -> Option<String> {
    let near = words
        .iter()
        .map(|word| (edits(typed, word), *word))
        .filter(|(edits, word)| *edits <= 1 + word.len() / 4)
        .min_by_key(|(edits, _)| *edits)?;
    Some(format!("did you mean {:?}?", near.1))
}

/// Letters to insert, delete, replace, or swap with a neighbour, to make one word of the other.
fn edits(left: &str, right: &str) -> usize {
    let (left, right): (Vec<char>, Vec<char>) = (left.chars().collect(), right.chars().collect());
    let mut rows = vec![vec![0; right.len() + 1]; left.len() + 1];
    for l in 0..=left.len() {
        for r in 0..=right.len() {
            if l == 0 || r == 0 {
                rows[l][r] = l + r;
                continue;
            }
            let changed = usize::from(left[l - 1] != right[r - 1]);
            let mut best = (rows[l - 1][r] + 1)
                .min(rows[l][r - 1] + 1)
                .min(rows[l - 1][r - 1] + changed);
            if l > 1 && r > 1 && left[l - 1] == right[r - 2] && left[l - 2] == right[r - 1] {
                best = best.min(rows[l - 2][r - 2] + 1);
            }
            rows[l][r] = best;
        }
    }
    rows[left.len()][right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_the_nearest_word_and_nothing_when_all_are_far() {
        let words = ["socket", "socket-mode", "queues", "mode"];
        assert_eq!(
            did_you_mean("sokcet", &words).as_deref(),
            Some("did you mean \"socket\"?")
        );
        assert_eq!(
            did_you_mean("queue", &words).as_deref(),
            Some("did you mean \"queues\"?")
        );
        assert_eq!(did_you_mean("colour", &words), None);
    }

    #[test]
    fn counts_edits_as_a_typist_makes_them() {
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("abc", "abc"), 0);
        assert_eq!(edits("acb", "abc"), 1);
        assert_eq!(edits("kitten", "sitting"), 3);
    }

    #[test]
    fn reads_permissions_as_octal_only() {
        let entry = |value| Entry {
            at: "t".into(),
            key: "socket-mode".into(),
            value,
        };
        assert_eq!(entry(Raw::Str("0660".into())).permissions(), Ok(0o660));
        assert_eq!(entry(Raw::Text("600".into())).permissions(), Ok(0o600));
        assert!(entry(Raw::Int(660)).permissions().is_err());
        assert!(entry(Raw::Str("0888".into())).permissions().is_err());
        assert!(entry(Raw::Str("1777".into())).permissions().is_err());
    }
}
