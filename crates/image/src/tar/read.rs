//! A streaming tar reader: v7, ustar, GNU long names, PAX.
//!
//! Follows Go's `archive/tar` where dialects differ, since nearly every image was written and is read by it: links,
//! devices and directories have no data whatever their size field says, and global PAX headers are skipped. Sparse files
//! are refused: no image builder writes them, and they are a cheap way to ask for a huge file.

use crate::{Limits, Refusal};
use std::io::{self, Read};

const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file; its data follows.
    File,
    /// Another name of the file at `link`.
    HardLink,
    /// A symbolic link to `link`.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One entry's header, long names and attributes joined in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The path as it stands in the tar, not normalized. No NUL, not empty.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Target of a link, else empty. No NUL.
    pub link: Vec<u8>,
    /// Permission bits with set-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970, held within what a root disk can say.
    pub mtime: u32,
    /// Bytes of data; 0 for anything but a file.
    pub size: u64,
    /// Device numbers, major and minor; 0 for anything but a device.
    pub device: (u32, u32),
    /// Extended attributes in the order of the tar.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where its data begins in the tar.
    pub data_offset: u64,
}

impl Entry {
    /// Bytes of memory that it holds beside its fixed part. An attribute counts with its own fixed part and what the
    /// allocator adds, so that many tiny ones are not free.
    pub(crate) fn names_bytes(&self) -> u64 {
        const PER_XATTR: usize = 96;
        let xattrs = self.xattrs.iter();
        let xattrs: usize = xattrs
            .map(|(name, value)| name.len() + value.len() + PER_XATTR)
            .sum();
        (self.path.len() + self.link.len() + xattrs) as u64
    }
}

/// Why reading stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// The stream below failed. May carry a [`Refusal`] of a layer of readers in between.
    #[error("cannot read the tar")]
    Io(#[from] io::Error),
    /// The tar itself is not acceptable.
    #[error("the tar is refused")]
    Refused(#[from] Refusal),
}

/// Reads entries one after another.
#[derive(Debug)]
pub struct TarReader<R> {
    reader: R,
    limits: Limits,
    offset: u64,
    /// Data of the current entry not read yet.
    data_left: u64,
    /// Padding after that data.
    padding: u64,
    end_marker: bool,
}

/// What PAX and GNU headers said of the entry that follows them.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<u32>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> TarReader<R> {
    /// Reads from the start of a tar.
    pub fn new(reader: R, limits: &Limits) -> TarReader<R> {
        TarReader {
            reader,
            limits: limits.clone(),
            offset: 0,
            data_left: 0,
            padding: 0,
            end_marker: false,
        }
    }

    /// Whether the tar was ended properly, with a block of zeros.
    pub fn saw_end_marker(&self) -> bool {
        self.end_marker
    }

    fn bad(&self, why: &'static str) -> TarError {
        TarError::Refused(Refusal::Tar {
            offset: self.offset,
            why,
        })
    }

    /// The next entry, for the crate's users outside: errors are turned into I/O errors that carry the [`Refusal`].
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        self.next().map_err(|error| match error {
            TarError::Io(error) => error,
            TarError::Refused(why) => io::Error::other(why),
        })
    }

    /// The next entry; what is left of the previous one's data is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_data()?;
        if self.end_marker {
            return Ok(None);
        }
        let mut extension = Extension::default();
        let mut extended = false;
        loop {
            let Some(block) = self.read_block()? else {
                return if extended {
                    Err(self.bad("it ends after an extended header"))
                } else {
                    Ok(None)
                };
            };
            if block.iter().all(|byte| *byte == 0) {
                if extended {
                    return Err(self.bad("it ends after an extended header"));
                }
                self.end_marker = true;
                return Ok(None);
            }
            self.check_sum(&block)?;
            match block[156] {
                b'x' => {
                    let body = self.read_extension(&block)?;
                    // As Go does: a second PAX header replaces the first, GNU names stand beside it.
                    let fresh = self.parse_pax(&body)?;
                    extension = Extension {
                        path: fresh.path.or(extension.path),
                        link: fresh.link.or(extension.link),
                        ..fresh
                    };
                    extended = true;
                }
                b'g' => {
                    self.read_extension(&block)?;
                }
                b'L' => {
                    let body = self.read_extension(&block)?;
                    extension.path = Some(self.c_string(body)?);
                    extended = true;
                }
                b'K' => {
                    let body = self.read_extension(&block)?;
                    extension.link = Some(self.c_string(body)?);
                    extended = true;
                }
                _ => return self.entry(&block, extension).map(Some),
            }
        }
    }

    /// Reads data of the current entry; 0 at its end. A tar that ends within the data is an error.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let want = buffer
            .len()
            .min(usize::try_from(self.data_left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let got = retrying(|| self.reader.read(&mut buffer[..want]))?;
        if got == 0 {
            return Err(self.bad("it ends within a file"));
        }
        self.data_left -= got as u64;
        self.offset += got as u64;
        Ok(got)
    }

    /// Reads what follows the last entry, so that the streams below see their ends.
    pub(crate) fn drain(&mut self) -> Result<(), TarError> {
        while self.next()?.is_some() {}
        let mut scratch = [0; 16 << 10];
        loop {
            if retrying(|| self.reader.read(&mut scratch))? == 0 {
                return Ok(());
            }
        }
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let mut scratch = [0; 16 << 10];
        while self.data_left > 0 {
            self.read_data(&mut scratch)?;
        }
        while self.padding > 0 {
            let want = usize::try_from(self.padding).map_or(BLOCK, |left| left.min(BLOCK));
            let got = retrying(|| self.reader.read(&mut scratch[..want]))?;
            if got == 0 {
                return Err(self.bad("it ends within a file's padding"));
            }
            self.padding -= got as u64;
            self.offset += got as u64;
        }
        Ok(())
    }

    fn read_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let got = retrying(|| self.reader.read(&mut block[filled..]))?;
            if got == 0 {
                return if filled == 0 {
                    Ok(None)
                } else {
                    Err(self.bad("it ends within a header"))
                };
            }
            filled += got;
        }
        self.offset += BLOCK as u64;
        Ok(Some(block))
    }

    fn check_sum(&self, block: &[u8; BLOCK]) -> Result<(), TarError> {
        let wanted = self.number(&block[148..156])?;
        // The sum is taken with the field itself as blanks; old tars took it over signed bytes.
        let blanked = |index: usize| {
            if (148..156).contains(&index) {
                b' '
            } else {
                block[index]
            }
        };
        let unsigned: i64 = (0..BLOCK).map(|index| i64::from(blanked(index))).sum();
        let signed: i64 = (0..BLOCK)
            .map(|index| i64::from(i8::from_ne_bytes([blanked(index)])))
            .sum();
        if wanted == unsigned || wanted == signed {
            Ok(())
        } else {
            Err(self.bad("a header's checksum is wrong"))
        }
    }

    fn read_extension(&mut self, block: &[u8; BLOCK]) -> Result<Vec<u8>, TarError> {
        let size = self.size_field(block)?;
        let limit = self.limits.tar_header_bytes_max as u64;
        if size > limit {
            return Err(TarError::Refused(Refusal::Limit {
                what: "bytes in one extended header",
                limit,
            }));
        }
        self.data_left = size;
        self.padding = padding(size);
        let mut body = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            let got = self.read_data(&mut chunk)?;
            if got == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..got]);
        }
        self.skip_data()?;
        Ok(body)
    }

    fn c_string(&self, mut body: Vec<u8>) -> Result<Vec<u8>, TarError> {
        while body.last() == Some(&0) {
            body.pop();
        }
        if body.contains(&0) {
            return Err(self.bad("a name has a NUL within it"));
        }
        Ok(body)
    }

    fn parse_pax(&self, mut body: &[u8]) -> Result<Extension, TarError> {
        let mut extension = Extension::default();
        let broken = || self.bad("an extended header is malformed");
        while !body.is_empty() && body != [0] {
            let space = body
                .iter()
                .take(20)
                .position(|byte| *byte == b' ')
                .ok_or_else(broken)?;
            let length = decimal(&body[..space])
                .and_then(|length| usize::try_from(length).ok())
                .ok_or_else(broken)?;
            if length > body.len() || length < space + 4 || body[length - 1] != b'\n' {
                return Err(broken());
            }
            let record = &body[space + 1..length - 1];
            body = &body[length..];
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or_else(broken)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => extension.path = Some(value.to_vec()),
                b"linkpath" => extension.link = Some(value.to_vec()),
                b"size" => extension.size = Some(decimal(value).ok_or_else(broken)?),
                b"uid" => extension.uid = Some(self.id(decimal(value))?),
                b"gid" => extension.gid = Some(self.id(decimal(value))?),
                b"mtime" => {
                    let negative = value.first() == Some(&b'-');
                    let whole = value.split(|byte| *byte == b'.').next().unwrap_or(&[]);
                    let seconds = if negative {
                        0
                    } else {
                        decimal(whole).ok_or_else(broken)?
                    };
                    extension.mtime = Some(u32::try_from(seconds).unwrap_or(u32::MAX));
                }
                _ if key.starts_with(b"GNU.sparse.") => {
                    return Err(self.bad("a file is sparse; pack it without --sparse"));
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        if name.is_empty() || name.len() > 255 || name.contains(&0) {
                            return Err(self.bad("an extended attribute's name is not one"));
                        }
                        if value.len() > self.limits.xattr_bytes_max {
                            return Err(TarError::Refused(Refusal::Limit {
                                what: "bytes in one extended attribute",
                                limit: self.limits.xattr_bytes_max as u64,
                            }));
                        }
                        extension.xattrs.retain(|(known, _)| known != name);
                        extension.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(extension)
    }

    fn entry(&mut self, block: &[u8; BLOCK], extension: Extension) -> Result<Entry, TarError> {
        let ustar = &block[257..263] == b"ustar\0";
        let mut path = match extension.path {
            Some(path) => path,
            None => {
                let name = until_nul(&block[..100]);
                let prefix = if ustar {
                    until_nul(&block[345..500])
                } else {
                    &[]
                };
                if prefix.is_empty() {
                    name.to_vec()
                } else {
                    [prefix, b"/", name].concat()
                }
            }
        };
        let kind = match block[156] {
            0 if path.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'S' => return Err(self.bad("a file is sparse; pack it without --sparse")),
            _ => return Err(self.bad("an entry is of an unknown type")),
        };
        let has_link = matches!(kind, EntryKind::HardLink | EntryKind::Symlink);
        let mut link = match extension.link {
            _ if !has_link => Vec::new(),
            Some(link) => link,
            None => until_nul(&block[157..257]).to_vec(),
        };
        if path.is_empty() {
            return Err(self.bad("an entry has no name"));
        }
        if path.contains(&0) || link.contains(&0) {
            return Err(self.bad("a name has a NUL within it"));
        }
        if path.len() > self.limits.path_bytes_max || link.len() > self.limits.path_bytes_max {
            return Err(TarError::Refused(Refusal::Limit {
                what: "bytes in one path",
                limit: self.limits.path_bytes_max as u64,
            }));
        }
        // An extended header may have been much larger than the name that was in it.
        path.shrink_to_fit();
        link.shrink_to_fit();
        let size = match kind {
            EntryKind::File => match extension.size {
                Some(size) => size,
                None => self.size_field(block)?,
            },
            _ => 0,
        };
        if size > self.limits.image_bytes_max.0 {
            return Err(TarError::Refused(Refusal::Limit {
                what: "bytes in one file",
                limit: self.limits.image_bytes_max.0,
            }));
        }
        let device = match kind {
            EntryKind::CharDevice | EntryKind::BlockDevice => (
                self.id(u64::try_from(self.number(&block[329..337])?).ok())?,
                self.id(u64::try_from(self.number(&block[337..345])?).ok())?,
            ),
            _ => (0, 0),
        };
        // Linux has 12 bits of major and 20 of minor.
        if device.0 >= 1 << 12 || device.1 >= 1 << 20 {
            return Err(self.bad("a device number is out of range"));
        }
        let mtime = match extension.mtime {
            Some(mtime) => mtime,
            None => clamp_time(self.number(&block[136..148])?),
        };
        let field_id = |range| self.id(u64::try_from(self.number(range)?).ok());
        let entry = Entry {
            path,
            kind,
            link,
            // Only the low twelve bits are permissions; some writers put the file type above them.
            mode: (self.number(&block[100..108])? & 0o7777) as u32,
            uid: match extension.uid {
                Some(uid) => uid,
                None => field_id(&block[108..116])?,
            },
            gid: match extension.gid {
                Some(gid) => gid,
                None => field_id(&block[116..124])?,
            },
            mtime,
            size,
            device,
            xattrs: extension.xattrs,
            data_offset: self.offset,
        };
        self.data_left = size;
        self.padding = padding(size);
        Ok(entry)
    }

    fn size_field(&self, block: &[u8; BLOCK]) -> Result<u64, TarError> {
        u64::try_from(self.number(&block[124..136])?)
            .map_err(|_| self.bad("an entry's size is negative"))
    }

    fn id(&self, value: Option<u64>) -> Result<u32, TarError> {
        value
            .and_then(|value| u32::try_from(value).ok())
            .ok_or_else(|| self.bad("an owner or device number is out of range"))
    }

    /// A numeric field: octal text, or base 256 where the first bit is set.
    fn number(&self, field: &[u8]) -> Result<i64, TarError> {
        let broken = || self.bad("a number is malformed");
        let first = field.first().copied().unwrap_or(0);
        if first & 0x80 != 0 {
            let mut value: i128 = if first & 0x40 != 0 { -1 } else { 0 };
            for (index, byte) in field.iter().enumerate() {
                let byte = if index == 0 && first & 0x40 == 0 {
                    byte & 0x7f
                } else {
                    *byte
                };
                value = value.checked_mul(256).ok_or_else(broken)? | i128::from(byte);
            }
            return i64::try_from(value).map_err(|_| broken());
        }
        let text = until_nul(field).trim_ascii();
        let mut value: i64 = 0;
        for byte in text {
            if !(b'0'..=b'7').contains(byte) {
                return Err(broken());
            }
            value = value
                .checked_mul(8)
                .and_then(|value| value.checked_add(i64::from(byte - b'0')))
                .ok_or_else(broken)?;
        }
        Ok(value)
    }
}

fn retrying(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn until_nul(field: &[u8]) -> &[u8] {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    &field[..end]
}

fn clamp_time(seconds: i64) -> u32 {
    u32::try_from(seconds.max(0)).unwrap_or(u32::MAX)
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, byte| {
        if !byte.is_ascii_digit() {
            return None;
        }
        value.checked_mul(10)?.checked_add(u64::from(byte - b'0'))
    })
}
