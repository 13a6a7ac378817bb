//! What a log says: tuples and vectors that refer to one another, built record by record as the kernel builds them.
//!
//! Memory is bounded by [`Limits::entries_max`](super::Limits) and the log's length. Nothing recurses: what refers to itself
//! or nests without end is found by those who walk the graph.

use super::encoding::{Cursor, Header, Kind};
use super::error::Damage;
use std::collections::HashMap;
use std::sync::Arc;

/// The number of something in the dictionary, from 0 (the disk counts from 1).
pub(crate) type Id = u32;

/// One value. Texts are positions in [`Graph`]'s bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cell {
    Object(Id),
    Integer { negative: bool, magnitude: u64 },
    Text { start: u32, length: u32 },
    Null,
}

#[derive(Debug, Clone)]
enum Entry {
    Tuple,
    Vector,
    /// A symbol, and the number of the first symbol with the same name.
    Symbol(Arc<[u8]>, Id),
}

/// A tuple or vector whose values are being read.
struct Open {
    object: Id,
    vector: bool,
    next: u64,
    length: u64,
}

/// The dictionary and all that stands in it.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    dictionary: Vec<Entry>,
    symbols: HashMap<Arc<[u8]>, Id>,
    /// By object and by symbol or index.
    cells: HashMap<(Id, u32), Cell>,
    bytes: Vec<u8>,
    /// Where the name of a symbol stands in `bytes` that has been used as a text: once, however often it is.
    texts: HashMap<Id, Cell>,
    entries: u64,
    entries_max: u64,
}

impl Graph {
    pub(crate) fn new(entries_max: u64) -> Graph {
        Graph {
            // The dictionary's numbers have 32 bits here.
            entries_max: entries_max.min(u64::from(u32::MAX) / 2),
            ..Graph::default()
        }
    }

    /// Takes up one record. Returns the record's byte at which it failed with what was wrong there.
    pub(crate) fn record(&mut self, record: &[u8]) -> Result<(), (usize, Damage)> {
        let mut cursor = Cursor::new(record);
        self.values(&mut cursor)
            .and_then(|()| match cursor.is_at_end() {
                true => Ok(()),
                false => Err(Damage::Length),
            })
            .map_err(|damage| (cursor.position(), damage))
    }

    fn values(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Damage> {
        let mut open = Vec::new();
        let first = self.value(cursor, &mut open)?;
        let tuple = matches!(first, Some(Cell::Object(id)) if self.is_tuple(id));
        if !tuple {
            return Err(Damage::Unexpected);
        }
        while let Some(top) = open.last_mut() {
            if top.next == top.length {
                open.pop();
                continue;
            }
            let (object, index, vector) = (top.object, top.next, top.vector);
            top.next += 1;
            let key = if vector {
                u32::try_from(index).map_err(|_| Damage::Limit("entries"))?
            } else {
                self.symbol(cursor)?
            };
            self.count()?;
            match self.value(cursor, &mut open)? {
                Some(cell) => self.cells.insert((object, key), cell),
                None => self.cells.remove(&(object, key)),
            };
        }
        Ok(())
    }

    fn count(&mut self) -> Result<(), Damage> {
        self.entries += 1;
        if self.entries > self.entries_max {
            return Err(Damage::Limit("entries"));
        }
        Ok(())
    }

    fn define(&mut self, entry: Entry) -> Result<Id, Damage> {
        self.count()?;
        let id = Id::try_from(self.dictionary.len()).map_err(|_| Damage::Limit("entries"))?;
        self.dictionary.push(entry);
        Ok(id)
    }

    fn find(&self, reference: u64) -> Result<(Id, &Entry), Damage> {
        reference
            .checked_sub(1)
            .and_then(|index| Id::try_from(index).ok())
            .and_then(|id| Some((id, self.dictionary.get(id as usize)?)))
            .ok_or(Damage::Reference(reference))
    }

    fn symbol(&mut self, cursor: &mut Cursor<'_>) -> Result<Id, Damage> {
        let header = cursor.header()?;
        // The kernel does not look at the kind of what stands where a symbol must.
        if !header.immediate {
            return match self.find(header.length)? {
                (_, Entry::Symbol(_, first)) => Ok(*first),
                (_, Entry::Tuple | Entry::Vector) => Err(Damage::Reference(header.length)),
            };
        }
        let name: Arc<[u8]> = cursor.take(header.length)?.into();
        let known = self.symbols.get(&name).copied();
        let next = Id::try_from(self.dictionary.len()).map_err(|_| Damage::Limit("entries"))?;
        let first = known.unwrap_or(next);
        let id = self.define(Entry::Symbol(name.clone(), first))?;
        if known.is_none() {
            self.symbols.insert(name, id);
        }
        Ok(first)
    }

    /// Reads a value; that of a tuple or vector remains to be read and is put on `open`. `None` removes what was there.
    fn value(
        &mut self,
        cursor: &mut Cursor<'_>,
        open: &mut Vec<Open>,
    ) -> Result<Option<Cell>, Damage> {
        let Header {
            immediate,
            kind,
            length,
        } = cursor.header()?;
        match kind {
            Kind::Tuple | Kind::Vector => {
                let vector = kind == Kind::Vector;
                let object = if immediate {
                    self.define(if vector { Entry::Vector } else { Entry::Tuple })?
                } else {
                    let reference = cursor.varint()?;
                    match self.find(reference)? {
                        (id, Entry::Tuple) if !vector => id,
                        (id, Entry::Vector) if vector => id,
                        _ => return Err(Damage::Reference(reference)),
                    }
                };
                open.push(Open {
                    object,
                    vector,
                    next: 0,
                    length,
                });
                Ok(Some(Cell::Object(object)))
            }
            Kind::Integer => Ok(Some(Cell::Integer {
                negative: length > 0,
                magnitude: cursor.varint()?,
            })),
            Kind::Text | Kind::Symbol if !immediate && length > 0 => {
                let (first, name) = match self.find(length)? {
                    (_, Entry::Symbol(name, first)) => (*first, name.clone()),
                    (_, Entry::Tuple | Entry::Vector) => return Err(Damage::Reference(length)),
                };
                if let Some(known) = self.texts.get(&first) {
                    return Ok(Some(*known));
                }
                let text = self.text(&name)?;
                self.texts.insert(first, text);
                Ok(Some(text))
            }
            Kind::Text => Ok(Some(self.text(cursor.take(length)?)?)),
            Kind::Symbol if length == 0 => Ok(None),
            Kind::Symbol => match cursor.take(length)? {
                [0] => Ok(Some(Cell::Null)),
                untyped => Ok(Some(self.text(untyped)?)),
            },
        }
    }

    fn text(&mut self, text: &[u8]) -> Result<Cell, Damage> {
        let start = u32::try_from(self.bytes.len()).map_err(|_| Damage::Limit("bytes of text"))?;
        let length = u32::try_from(text.len()).map_err(|_| Damage::Limit("bytes of text"))?;
        self.bytes.extend_from_slice(text);
        Ok(Cell::Text { start, length })
    }

    fn is_tuple(&self, id: Id) -> bool {
        matches!(self.dictionary.get(id as usize), Some(Entry::Tuple))
    }

    /// Ends the reading: what is there can now be asked for.
    pub(crate) fn finish(self) -> Objects {
        let mut cells: Vec<((Id, u32), Cell)> = self.cells.into_iter().collect();
        cells.sort_unstable_by_key(|(key, _)| *key);
        Objects {
            dictionary: self.dictionary,
            symbols: self.symbols,
            cells,
            bytes: self.bytes,
        }
    }
}

/// A log that has been read: tuples and vectors by their numbers.
#[derive(Debug)]
pub(crate) struct Objects {
    dictionary: Vec<Entry>,
    symbols: HashMap<Arc<[u8]>, Id>,
    /// Ordered by object, then by symbol or index.
    cells: Vec<((Id, u32), Cell)>,
    bytes: Vec<u8>,
}

impl Objects {
    pub(crate) fn is_tuple(&self, id: Id) -> bool {
        matches!(self.dictionary.get(id as usize), Some(Entry::Tuple))
    }

    /// What stands at `key` of the tuple `id`.
    pub(crate) fn get(&self, id: Id, key: &[u8]) -> Option<Cell> {
        let symbol = *self.symbols.get(key)?;
        let at = self
            .cells
            .binary_search_by_key(&(id, symbol), |(key, _)| *key)
            .ok()?;
        self.cells.get(at).map(|(_, cell)| *cell)
    }

    /// Everything in the tuple or vector `id`: the symbol's or the index's number, and the value.
    pub(crate) fn cells(&self, id: Id) -> impl Iterator<Item = (u32, Cell)> {
        let start = self.cells.partition_point(|((object, _), _)| *object < id);
        self.cells
            .iter()
            .skip(start)
            .take_while(move |((object, _), _)| *object == id)
            .map(|((_, key), cell)| (*key, *cell))
    }

    /// The name of the symbol `id`; empty if it is none.
    pub(crate) fn name(&self, id: Id) -> &[u8] {
        match self.dictionary.get(id as usize) {
            Some(Entry::Symbol(name, _)) => name,
            Some(Entry::Tuple | Entry::Vector) | None => &[],
        }
    }

    /// The bytes of a text.
    pub(crate) fn text(&self, start: u32, length: u32) -> &[u8] {
        let start = start as usize;
        let end = start.saturating_add(length as usize);
        self.bytes.get(start..end).unwrap_or_default()
    }

    /// A number, from an integer or, as the kernel allows, from decimal text.
    pub(crate) fn number(&self, cell: Cell) -> Option<u64> {
        match cell {
            Cell::Integer {
                negative: false,
                magnitude,
            } => Some(magnitude),
            Cell::Text { start, length } => decimal(self.text(start, length)),
            Cell::Integer { .. } | Cell::Object(_) | Cell::Null => None,
        }
    }
}

/// Reads decimal digits and nothing else.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tfs::encoding::put_header;

    #[test]
    fn a_name_that_is_a_text_many_times_takes_its_bytes_once() {
        let mut record = Vec::new();
        let mut put = |immediate, kind, length| {
            let header = Header {
                immediate,
                kind,
                length,
            };
            put_header(&mut record, header);
        };
        put(true, Kind::Tuple, 500);
        put(true, Kind::Symbol, 1000);
        // The symbol is the dictionary's second entry, after the tuple.
        let values = |record: &mut Vec<u8>| {
            let header = |kind| Header {
                immediate: false,
                kind,
                length: 2,
            };
            record.extend([b'a'; 1000]);
            put_header(record, header(Kind::Text));
            for _ in 1..500 {
                put_header(record, header(Kind::Symbol));
                put_header(record, header(Kind::Text));
            }
        };
        values(&mut record);
        let mut graph = Graph::new(10_000);
        assert_eq!(graph.record(&record), Ok(()));
        assert_eq!(graph.bytes.len(), 1000);
    }
}
