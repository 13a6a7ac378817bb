//! One table of a `hac.toml`: values with their lines, each of the kind that it has to be, and what is left over.

use super::{HacFault, Note};
use std::collections::{BTreeMap, BTreeSet};
use toml::de::{DeTable, DeValue};

/// The line, from 1, in which the byte at this offset stands.
pub(super) fn line(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    before.iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// A value and its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry<T> {
    pub(super) line: usize,
    pub(super) value: T,
}

/// A table; an empty one where the file has none of this name.
#[derive(Debug, Default)]
pub(super) struct Section<'a> {
    pub(super) name: &'a str,
    pub(super) line: usize,
    entries: BTreeMap<&'a str, Entry<&'a DeValue<'a>>>,
    asked: BTreeSet<&'static str>,
}

impl<'a> Section<'a> {
    /// The file's tables by name; those that are not known are noted.
    pub(super) fn all(
        text: &str,
        file: &'a DeTable<'a>,
        known: &[&'static str],
        notes: &mut Vec<Note>,
    ) -> Result<BTreeMap<&'a str, Section<'a>>, HacFault> {
        let mut sections = BTreeMap::new();
        for (key, value) in file {
            let name: &str = key.get_ref();
            let at = line(text, key.span().start);
            match (known.contains(&name), value.get_ref()) {
                (true, DeValue::Table(table)) => {
                    let entries = table.iter().map(|(key, value)| {
                        let entry = Entry {
                            line: line(text, key.span().start),
                            value: value.get_ref(),
                        };
                        (key.get_ref().as_ref(), entry)
                    });
                    let section = Section {
                        name,
                        line: at,
                        entries: entries.collect(),
                        asked: BTreeSet::new(),
                    };
                    sections.insert(name, section);
                }
                (true, other) => {
                    return Err(HacFault::at(
                        at,
                        format!("{name} is a table, and here it is {}", kind(other)),
                    )
                    .hint(format!("write [{name}] on a line of its own")));
                }
                (false, value) => notes.push(Note {
                    line: at,
                    text: match value {
                        DeValue::Table(_) => format!("[{name}] is not known and has no effect"),
                        _ => format!("{name} is not known here and has no effect: it stands in none of the file's tables"),
                    },
                }),
            }
        }
        Ok(sections)
    }

    fn get(&mut self, key: &'static str) -> Option<Entry<&'a DeValue<'a>>> {
        self.asked.insert(key);
        self.entries.get(key).cloned()
    }

    fn wrong(&self, key: &str, entry: &Entry<&DeValue<'_>>, want: &str) -> HacFault {
        HacFault::at(
            entry.line,
            format!(
                "{}.{key} is {}, and has to be {want}",
                self.name,
                kind(entry.value)
            ),
        )
    }

    /// A string with something in it.
    pub(super) fn text(&mut self, key: &'static str) -> Result<Option<Entry<String>>, HacFault> {
        let Some(entry) = self.get(key) else {
            return Ok(None);
        };
        match entry.value {
            DeValue::String(value) if value.trim().is_empty() => Err(HacFault::at(
                entry.line,
                format!("{}.{key} is empty", self.name),
            )
            .hint("leave the line out, or write something")),
            DeValue::String(value) if value.contains('\0') => Err(HacFault::at(
                entry.line,
                format!("{}.{key} has a zero byte in it", self.name),
            )),
            DeValue::String(value) => Ok(Some(Entry {
                line: entry.line,
                value: value.trim().to_owned(),
            })),
            _ => Err(self
                .wrong(key, &entry, "text")
                .hint(format!("write {key} = \"…\", in quotes"))),
        }
    }

    /// A whole number.
    pub(super) fn integer(&mut self, key: &'static str) -> Result<Option<Entry<i64>>, HacFault> {
        let Some(entry) = self.get(key) else {
            return Ok(None);
        };
        let DeValue::Integer(number) = entry.value else {
            return Err(self
                .wrong(key, &entry, "a whole number")
                .hint(format!("write {key} = 4, without quotes or unit")));
        };
        match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(value) => Ok(Some(Entry {
                line: entry.line,
                value,
            })),
            Err(_) => Err(HacFault::at(
                entry.line,
                format!("{}.{key} is larger than any number here", self.name),
            )),
        }
    }

    /// A number, bare or as text.
    pub(super) fn number_or_text(
        &mut self,
        key: &'static str,
    ) -> Result<Option<Entry<String>>, HacFault> {
        let Some(entry) = self.get(key) else {
            return Ok(None);
        };
        match entry.value {
            DeValue::Float(number) => Ok(Some(Entry {
                line: entry.line,
                value: number.as_str().to_owned(),
            })),
            DeValue::Integer(_) => Ok(self.integer(key)?.map(|number| Entry {
                line: number.line,
                value: number.value.to_string(),
            })),
            _ => self.text(key),
        }
    }

    /// Notes what nobody asked for. `known` is what the table may have.
    pub(super) fn finish(self, known: &[&str], notes: &mut Vec<Note>) {
        for (key, entry) in &self.entries {
            if !self.asked.contains(key) {
                notes.push(Note {
                    line: entry.line,
                    text: format!(
                        "{}.{key} is not known and has no effect: [{}] takes {}",
                        self.name,
                        self.name,
                        known.join(", ")
                    ),
                });
            }
        }
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
