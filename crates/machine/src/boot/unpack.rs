//! Taking kernels out of what they come in: compressed streams, Debian packages, bzImages.
//!
//! Formats: RFC 1952 (gzip), the xz and zstd frame formats, the legacy LZ4 frame of the kernel's own tools, `ar` with
//! `data.tar.*` (deb(5)), and the x86 boot protocol (the kernel's `Documentation/x86/boot.rst`). All output is bounded.

use super::BootError;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Longest kernel image, compressed or not. Debian's is 53 MB; one with debug information can have several hundred.
pub(crate) const KERNEL_BYTES_MAX: u64 = 1 << 30;
/// Longest single module. The largest in Debian have a few MB; with debug information some tens.
pub(crate) const MODULE_BYTES_MAX: u64 = 256 << 20;
/// Longest unpacked package in all. Debian's full kernel has about 500 MB.
const PACKAGE_BYTES_MAX: u64 = 4 << 30;
/// The kernel's own tools write legacy LZ4 in blocks of this many bytes.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// How a stream is compressed, told by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Xz,
    Lzma,
    Zstd,
    Lz4Legacy,
    None,
}

impl Compression {
    fn of(head: &[u8]) -> Compression {
        match head {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
            [0x5d, 0, 0, ..] => Compression::Lzma,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            [0x02, 0x21, 0x4c, 0x18, ..] => Compression::Lz4Legacy,
            _ => Compression::None,
        }
    }
}

/// The content of `data`, decompressed if its first bytes say that it is compressed, at most `limit` bytes.
pub(crate) fn decompress(data: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let bounded = |reader: &mut dyn Read| {
        let mut out = Vec::new();
        reader.take(limit + 1).read_to_end(&mut out)?;
        if out.len() as u64 > limit {
            return Err(io::Error::other(format!(
                "it unpacks to more than {limit} bytes"
            )));
        }
        Ok(out)
    };
    match Compression::of(data) {
        Compression::Gzip => bounded(&mut flate2::read::GzDecoder::new(data)),
        Compression::Xz => bounded(&mut liblzma::read::XzDecoder::new(data)),
        Compression::Lzma => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(LZMA_MEMORY_MAX)?;
            bounded(&mut liblzma::read::XzDecoder::new_stream(data, stream))
        }
        // One frame: in a bzImage the payload is followed by its length, which is no frame.
        Compression::Zstd => bounded(&mut zstd::Decoder::new(data)?.single_frame()),
        Compression::Lz4Legacy => lz4_legacy(data, limit),
        Compression::None => bounded(&mut &*data),
    }
}

/// Memory that an LZMA stream may ask for; `xz -9` needs 65 MiB.
const LZMA_MEMORY_MAX: u64 = 128 << 20;

/// The legacy LZ4 frame: magic, then blocks of a 32-bit length and that many bytes, to the end of the file. The kernel's
/// build appends the unpacked length, which looks like one more block that is cut short.
fn lz4_legacy(data: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "its LZ4 stream is damaged");
    let mut rest = data.get(4..).ok_or_else(damaged)?;
    let mut out = Vec::new();
    while let Some((size, tail)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        let Some(block) = tail.get(..size) else {
            if tail.is_empty() && size == out.len() {
                break;
            }
            return Err(damaged());
        };
        let block =
            lz4_flex::block::decompress(block, LZ4_LEGACY_BLOCK).map_err(io::Error::other)?;
        if block.is_empty() || (out.len() + block.len()) as u64 > limit {
            return Err(damaged());
        }
        out.extend_from_slice(&block);
        rest = &tail[size..];
    }
    Ok(out)
}

/// The compressed kernel within a bzImage, or nothing where `data` is no bzImage.
///
/// Boot protocol 2.08 and later: `payload_offset` (0x248) counts from the protected-mode code, which follows the setup
/// sectors; `payload_length` is at 0x24c.
pub(crate) fn bzimage_payload(data: &[u8]) -> Option<Result<&[u8], &'static str>> {
    let word = |at: usize| {
        let bytes = data.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    if data.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let version = u16::from_le_bytes([*data.get(0x206)?, *data.get(0x207)?]);
    if version < 0x208 {
        return Some(Err("its boot protocol is older than 2.08"));
    }
    let setup_sectors = match data.get(0x1f1)? {
        0 => 4,
        count => usize::from(*count),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let payload = start
        .checked_add(word(0x24c)?)
        .and_then(|end| data.get(start..end))
        .filter(|payload| !payload.is_empty());
    Some(payload.ok_or("it is cut short: its compressed kernel lies outside the file"))
}

/// What is taken out of a Debian kernel package.
#[derive(Debug)]
pub(crate) struct Package {
    /// The bzImage, in the scratch directory.
    pub(crate) bzimage: PathBuf,
    /// The modules, in the scratch directory; also `modules.builtin`.
    pub(crate) modules: PathBuf,
}

/// Whether `data` begins like a Debian package.
pub(crate) fn is_deb(head: &[u8]) -> bool {
    head.starts_with(b"!<arch>\n")
}

/// Unpacks the kernel and its modules from the package `deb` into `scratch`, flat: a member's directory is ignored, its
/// name checked, so nothing is written elsewhere.
pub(crate) fn deb(deb: &Path, scratch: &Path) -> Result<Package, BootError> {
    let malformed = |reason: String| BootError::malformed(deb, "Debian kernel package", reason);
    let mut file = File::open(deb).map_err(BootError::io("open", deb))?;
    let (name, size) = find_data_member(&mut file)
        .map_err(|error| malformed(error.to_string()))?
        .ok_or_else(|| malformed("it has no data.tar member".to_owned()))?;
    let data = io::BufReader::with_capacity(1 << 20, file.take(size));
    let reader: Box<dyn Read> = match name.as_str() {
        "data.tar.xz" => Box::new(liblzma::read::XzDecoder::new(data)),
        "data.tar.zst" => Box::new(zstd::Decoder::new(data).map_err(BootError::io("read", deb))?),
        "data.tar.gz" => Box::new(flate2::read::GzDecoder::new(data)),
        "data.tar" => Box::new(data),
        other => return Err(malformed(format!("its {other} has an unknown compression"))),
    };
    let modules = scratch.join("modules");
    std::fs::create_dir_all(&modules).map_err(BootError::io("make directory", &modules))?;
    let mut kernel = None;
    let mut archive = tar::Archive::new(reader.take(PACKAGE_BYTES_MAX));
    let entries = archive
        .entries()
        .map_err(|error| malformed(error.to_string()))?;
    for entry in entries {
        let cut = |error: io::Error| malformed(format!("it is damaged or cut short: {error}"));
        let mut entry = entry.map_err(cut)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path().map_err(cut)?.into_owned();
        let Some(file_name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        let is_module = path.extension().is_some_and(|e| e == "ko")
            || [".ko.xz", ".ko.zst", ".ko.gz"]
                .iter()
                .any(|end| file_name.ends_with(end));
        let dest = if file_name.starts_with("vmlinuz-") {
            let dest = scratch.join("vmlinuz");
            kernel = Some(dest.clone());
            dest
        } else if is_module || file_name == "modules.builtin" {
            modules.join(file_name)
        } else {
            continue;
        };
        let mut out = File::create(&dest).map_err(BootError::io("create", &dest))?;
        io::copy(&mut entry, &mut out).map_err(cut)?;
    }
    let bzimage = kernel.ok_or_else(|| {
        malformed(
            "it holds no vmlinuz; a meta-package such as linux-image-cloud-amd64 only names the real one".to_owned(),
        )
    })?;
    Ok(Package { bzimage, modules })
}

/// Leaves `file` at the beginning of the `data.tar*` member and gives its name and length.
fn find_data_member(file: &mut File) -> io::Result<Option<(String, u64)>> {
    /// A package has three or four members.
    const MEMBERS_MAX: usize = 16;
    let mut magic = [0; 8];
    file.read_exact(&mut magic)?;
    if !is_deb(&magic) {
        return Err(io::Error::other("it does not begin with an ar header"));
    }
    let total = file.metadata()?.len();
    for _ in 0..MEMBERS_MAX {
        let mut header = [0u8; 60];
        match file.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let text = |part: &[u8]| String::from_utf8_lossy(part).trim().to_owned();
        let name = text(&header[..16]).trim_end_matches('/').to_owned();
        let size: u64 = text(&header[48..58])
            .parse()
            .map_err(|_| io::Error::other("an ar header in it is damaged"))?;
        let here = file.stream_position()?;
        if here.saturating_add(size) > total {
            return Err(io::Error::other(format!("it is cut short within {name}")));
        }
        if name.starts_with("data.tar") {
            return Ok(Some((name, size)));
        }
        file.seek(SeekFrom::Start(here + size.next_multiple_of(2)))?;
    }
    Ok(None)
}

/// A file's content, at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, BootError> {
    let file = File::open(path).map_err(BootError::io("open", path))?;
    let mut data = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut data)
        .map_err(BootError::io("read", path))?;
    if data.len() as u64 > limit {
        return Err(BootError::malformed(
            path,
            "kernel or module",
            format!("it is longer than {limit} bytes"),
        ));
    }
    Ok(data)
}

#[cfg(test)]
mod tests;
