//! Writes the one tar dialect that the packer is given: ustar, with a PAX header where ustar cannot say it.
//!
//! The same entries always give the same bytes.

use std::io::{self, Write};

const BLOCK: usize = 512;

/// What the header of an entry says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a> {
    /// Relative path without a leading `./`; directories without the trailing slash.
    pub(crate) path: &'a [u8],
    pub(crate) type_flag: u8,
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: u32,
    pub(crate) size: u64,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

/// Writes entries one after another.
#[derive(Debug)]
pub(crate) struct TarWriter<W> {
    writer: W,
}

impl<W: Write> TarWriter<W> {
    pub(crate) fn new(writer: W) -> TarWriter<W> {
        TarWriter { writer }
    }

    /// Writes a header. `size` bytes must follow by [`TarWriter::data`], then [`TarWriter::pad`].
    pub(crate) fn header(&mut self, fields: &Fields<'_>) -> io::Result<()> {
        let mut pax = Vec::new();
        for (name, value) in fields.xattrs {
            record(
                &mut pax,
                &[b"SCHILY.xattr.", name.as_slice()].concat(),
                value,
            );
        }
        if fields.path.len() > 100 || !fields.path.is_ascii() {
            record(&mut pax, b"path", fields.path);
        }
        if fields.link.len() > 100 || !fields.link.is_ascii() {
            record(&mut pax, b"linkpath", fields.link);
        }
        let mut number = |name: &[u8], value: u64, digits: u32| {
            if value >= 1 << (3 * digits) {
                record(&mut pax, name, value.to_string().as_bytes());
                0
            } else {
                value
            }
        };
        let size = number(b"size", fields.size, 11);
        let uid = number(b"uid", u64::from(fields.uid), 7);
        let gid = number(b"gid", u64::from(fields.gid), 7);
        if !pax.is_empty() {
            let block = header_block(
                b"pax",
                b'x',
                b"",
                0o644,
                [0, 0],
                0,
                pax.len() as u64,
                (0, 0),
            );
            self.writer.write_all(&block)?;
            self.writer.write_all(&pax)?;
            self.pad(pax.len() as u64)?;
        }
        let block = header_block(
            fields.path,
            fields.type_flag,
            fields.link,
            fields.mode,
            [uid, gid],
            fields.mtime,
            size,
            fields.device,
        );
        self.writer.write_all(&block)
    }

    /// Writes a part of the data of the current entry.
    pub(crate) fn data(&mut self, data: &[u8]) -> io::Result<()> {
        self.writer.write_all(data)
    }

    /// Fills the last block of data of this length.
    pub(crate) fn pad(&mut self, length: u64) -> io::Result<()> {
        let rest = (length % BLOCK as u64) as usize;
        if rest > 0 {
            self.writer.write_all(&[0; BLOCK][rest..])?;
        }
        Ok(())
    }

    /// Ends the tar.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.writer.write_all(&[0; 2 * BLOCK])?;
        self.writer.flush()?;
        Ok(self.writer)
    }
}

fn record(pax: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // The length counts its own digits.
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while body + length.to_string().len() != length {
        length = body + length.to_string().len();
    }
    pax.extend_from_slice(length.to_string().as_bytes());
    pax.push(b' ');
    pax.extend_from_slice(key);
    pax.push(b'=');
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

#[expect(
    clippy::too_many_arguments,
    reason = "these are the fields of the format, used twice here"
)]
fn header_block(
    path: &[u8],
    type_flag: u8,
    link: &[u8],
    mode: u32,
    owner: [u64; 2],
    mtime: u32,
    size: u64,
    device: (u32, u32),
) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    // A longer path stands in the PAX header; what is here then only serves readers that know none.
    let path = &path[..path.len().min(100)];
    block[..path.len()].copy_from_slice(path);
    octal(&mut block[100..108], u64::from(mode));
    octal(&mut block[108..116], owner[0]);
    octal(&mut block[116..124], owner[1]);
    octal(&mut block[124..136], size);
    octal(&mut block[136..148], u64::from(mtime));
    block[148..156].fill(b' ');
    block[156] = type_flag;
    let link = &link[..link.len().min(100)];
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    octal(&mut block[329..337], u64::from(device.0));
    octal(&mut block[337..345], u64::from(device.1));
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    octal(&mut block[148..155], sum);
    block
}

/// Right-aligned octal digits and a NUL. The value must fit.
fn octal(field: &mut [u8], mut value: u64) {
    let digits = field.len() - 1;
    for place in field[..digits].iter_mut().rev() {
        *place = b'0' + (value & 7) as u8;
        value >>= 3;
    }
    field[digits] = 0;
}
