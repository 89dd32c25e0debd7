//! A TOML text as keys with their places.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{Entry, Raw};

/// A text with a name, to turn offsets into places.
pub(super) struct File<'a> {
    pub(super) name: &'a str,
    pub(super) text: &'a str,
}

/// The keys of the top table by their order in the file, and what stands below them.
pub(super) struct Entries {
    pub(super) plain: Vec<Entry>,
    below: Vec<(String, Below)>,
}

/// What a key holds.
pub(super) enum Below {
    /// `key = value`
    Value,
    /// `[key]`
    Table(Table),
    /// `[[key]]`
    List(Vec<Table>),
}

pub(super) struct Table {
    pub(super) at: String,
    pub(super) entries: Vec<Entry>,
}

impl Entries {
    /// What stands below a key.
    pub(super) fn below(&self, key: &str) -> &Below {
        let found = self.below.iter().find(|(name, _)| name == key);
        found.map_or(&Below::Value, |(_, below)| below)
    }
}

impl File<'_> {
    /// The place of an offset.
    pub(super) fn at(&self, offset: usize) -> String {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        format!(
            "{}:{}",
            self.name,
            1 + before.iter().filter(|byte| **byte == b'\n').count()
        )
    }

    /// All that is in the top table.
    pub(super) fn entries(&self, table: &DeTable<'_>) -> Entries {
        let below = table
            .iter()
            .map(|(key, value)| (key.get_ref().to_string(), self.below(value)));
        Entries {
            plain: self.plain(table),
            below: below.collect(),
        }
    }

    fn below(&self, value: &Spanned<DeValue<'_>>) -> Below {
        match value.get_ref() {
            DeValue::Table(inner) => Below::Table(self.table(value.span().start, inner)),
            DeValue::Array(items) => {
                let tables = items
                    .iter()
                    .map(|item| Some(self.table(item.span().start, item.get_ref().as_table()?)));
                tables
                    .collect::<Option<Vec<Table>>>()
                    .map_or(Below::Value, Below::List)
            }
            _ => Below::Value,
        }
    }

    fn table(&self, offset: usize, table: &DeTable<'_>) -> Table {
        Table {
            at: self.at(offset),
            entries: self.plain(table),
        }
    }

    fn plain(&self, table: &DeTable<'_>) -> Vec<Entry> {
        let mut entries: Vec<_> = table
            .iter()
            .map(|(key, value)| {
                let at = key.span().start;
                (
                    at,
                    Entry {
                        at: self.at(at),
                        key: key.get_ref().to_string(),
                        value: raw_toml(value.get_ref()),
                    },
                )
            })
            .collect();
        entries.sort_by_key(|(offset, _)| *offset);
        entries.into_iter().map(|(_, entry)| entry).collect()
    }
}

fn raw_toml(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Str(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or(Raw::Other("so large a number"), Raw::Int),
        DeValue::Array(items) => {
            Raw::List(items.iter().map(|item| raw_toml(item.get_ref())).collect())
        }
        DeValue::Boolean(_) => Raw::Other("a boolean"),
        DeValue::Float(_) => Raw::Other("a number with a point"),
        DeValue::Datetime(_) => Raw::Other("a date"),
        DeValue::Table(_) => Raw::Other("a table"),
    }
}
