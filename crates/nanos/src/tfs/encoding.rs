//! The two encodings everything in a TFS log is made of: variable-length integers and value headers.
//!
//! A **varint** is a number in groups of 7 bits, the highest first; 0x80 marks a group that another one follows.
//!
//! A **value header** is one byte `immediate << 7 | kind << 4 | more << 3 | top`, where `top` is the length's highest three
//! bits, and, if `more` is set, the rest of the length as a varint's groups.

use super::error::Damage;

/// First bytes of every piece of a log.
pub(crate) const MAGIC: &[u8; 6] = b"NVMTFS";
/// The version that is read and written here. Version 4 has other value headers.
pub(crate) const VERSION: u64 = 5;

/// Groups of 7 bits that 64 bits need.
const VARINT_BYTES_MAX: usize = 10;

/// What kind of value follows a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A symbol, the absence of a value, or untyped bytes.
    Symbol,
    /// Keys with values.
    Tuple,
    /// Values in order.
    Vector,
    /// A number; the length is 1 for a negative one.
    Integer,
    /// Bytes.
    Text,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Symbol => 0,
            Kind::Tuple => 1,
            Kind::Vector => 2,
            Kind::Integer => 3,
            Kind::Text => 4,
        }
    }

    fn from_code(code: u8) -> Result<Kind, Damage> {
        match code {
            0 => Ok(Kind::Symbol),
            1 => Ok(Kind::Tuple),
            2 => Ok(Kind::Vector),
            3 => Ok(Kind::Integer),
            4 => Ok(Kind::Text),
            other => Err(Damage::Kind(other)),
        }
    }
}

/// A decoded value header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// The value itself follows; otherwise it is referred to by its number in the dictionary.
    pub(crate) immediate: bool,
    pub(crate) kind: Kind,
    /// Bytes, entries, a sign or a number in the dictionary, by kind.
    pub(crate) length: u64,
}

/// Appends `value` as a varint.
pub(crate) fn put_varint(out: &mut Vec<u8>, value: u64) {
    let groups = significant_bits(value).div_ceil(7).max(1);
    put_groups(out, value, groups);
}

/// Appends a value header.
pub(crate) fn put_header(out: &mut Vec<u8>, header: Header) {
    let groups = significant_bits(header.length)
        .saturating_sub(3)
        .div_ceil(7);
    let top = match groups {
        0 => header.length,
        // Nine groups hold 63 bits, so that the shift is always below 64.
        more => header.length >> (7 * more),
    };
    let first = u8::from(header.immediate) << 7
        | header.kind.code() << 4
        | u8::from(groups > 0) << 3
        | (top & 7) as u8;
    out.push(first);
    put_groups(out, header.length, groups);
}

fn put_groups(out: &mut Vec<u8>, value: u64, groups: u32) {
    for group in (0..groups).rev() {
        let more = if group > 0 { 0x80 } else { 0 };
        out.push(((value >> (7 * group)) & 0x7f) as u8 | more);
    }
}

fn significant_bits(value: u64) -> u32 {
    u64::BITS - value.leading_zeros()
}

/// Bytes that are read from front to end, never beyond it.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(data: &'a [u8]) -> Cursor<'a> {
        Cursor { data, at: 0 }
    }

    /// Bytes read so far.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.at == self.data.len()
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Damage> {
        let byte = *self.data.get(self.at).ok_or(Damage::CutShort)?;
        self.at += 1;
        Ok(byte)
    }

    pub(crate) fn take(&mut self, length: u64) -> Result<&'a [u8], Damage> {
        let length = usize::try_from(length).map_err(|_| Damage::CutShort)?;
        let end = self.at.checked_add(length).ok_or(Damage::CutShort)?;
        let taken = self.data.get(self.at..end).ok_or(Damage::CutShort)?;
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn varint(&mut self) -> Result<u64, Damage> {
        self.groups(0, VARINT_BYTES_MAX)
    }

    pub(crate) fn header(&mut self) -> Result<Header, Damage> {
        let first = self.byte()?;
        let top = u64::from(first & 7);
        let length = if first & 8 == 0 {
            top
        } else {
            self.groups(top, VARINT_BYTES_MAX)?
        };
        Ok(Header {
            immediate: first & 0x80 != 0,
            kind: Kind::from_code(first >> 4 & 7)?,
            length,
        })
    }

    fn groups(&mut self, start: u64, groups_max: usize) -> Result<u64, Damage> {
        let mut value = start;
        for _ in 0..groups_max {
            let group = self.byte()?;
            if value > u64::MAX >> 7 {
                return Err(Damage::Number);
            }
            value = value << 7 | u64::from(group & 0x7f);
            if group & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Damage::Number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn varint(value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, value);
        out
    }

    fn header(immediate: bool, kind: Kind, length: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let header = Header {
            immediate,
            kind,
            length,
        };
        put_header(&mut out, header);
        out
    }

    #[test]
    fn numbers_are_groups_of_seven_bits_with_the_highest_first() {
        assert_eq!(varint(0), [0x00]);
        assert_eq!(varint(5), [0x05]);
        assert_eq!(varint(127), [0x7f]);
        assert_eq!(varint(128), [0x81, 0x00]);
        assert_eq!(varint(1024), [0x88, 0x00]);
        assert_eq!(varint(u64::MAX).len(), 10);
        assert_eq!(varint(u64::MAX)[0], 0x81);
    }

    #[test]
    fn a_header_holds_three_bits_of_the_length_and_the_rest_follows() {
        assert_eq!(header(true, Kind::Tuple, 7), [0x97]);
        assert_eq!(header(true, Kind::Symbol, 8), [0x88, 0x08]);
        assert_eq!(header(false, Kind::Symbol, 2), [0x02]);
        assert_eq!(header(true, Kind::Vector, 0), [0xa0]);
        assert_eq!(header(true, Kind::Integer, 1), [0xb1]);
        assert_eq!(header(true, Kind::Text, 1023), [0xcf, 0x7f]);
        assert_eq!(header(true, Kind::Text, 1024), [0xc8, 0x88, 0x00]);
    }

    #[test]
    fn a_number_that_needs_more_than_64_bits_is_refused() {
        assert!(Cursor::new(&[0xff; 11]).varint().is_err());
        let mut wide = vec![0x83];
        wide.extend([0x80; 8]);
        wide.push(0);
        assert!(Cursor::new(&wide).varint().is_err());
        assert!(Cursor::new(&[0x81]).varint().is_err());
    }

    proptest! {
        #[test]
        fn what_is_put_is_read(value: u64, immediate: bool, code in 0u8..5) {
            prop_assert_eq!(Cursor::new(&varint(value)).varint().unwrap(), value);
            let kind = Kind::from_code(code).unwrap();
            let bytes = header(immediate, kind, value);
            let mut cursor = Cursor::new(&bytes);
            let read = cursor.header().unwrap();
            prop_assert_eq!(read, Header { immediate, kind, length: value });
            prop_assert!(cursor.is_at_end());
        }
    }
}
