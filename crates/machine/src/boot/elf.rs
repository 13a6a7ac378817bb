//! A reader for the little of 64-bit little-endian ELF that kernels and their modules need: the PVH note, the loadable
//! segments, the module's `.modinfo`; and the two rewritings that make them smaller.
//!
//! Everything read here may come from a damaged or hostile file: every offset is checked, nothing panics, and memory is
//! bounded by the input's size.

/// Why bytes are not the ELF file they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ElfError {
    /// No ELF magic, or not 64-bit little-endian.
    #[error("it is not a 64-bit little-endian ELF file")]
    NotElf64,
    /// A table or segment lies outside the file.
    #[error("it is cut short or damaged: its {0} lie outside the file")]
    OutOfBounds(&'static str),
    /// More program headers than any kernel has.
    #[error("it has more segments than any kernel")]
    TooMany,
}

const EHDR: usize = 64;
const PHDR: usize = 56;
const SHDR: usize = 64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const SHT_NOBITS: u32 = 8;
const SHF_ALLOC: u64 = 2;
/// `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's public `elfnote.h`: the address of a kernel's PVH entry.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(
        data.get(at..at.checked_add(2)?)?.try_into().ok()?,
    ))
}
fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        data.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}
fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        data.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}
fn range(data: &[u8], offset: u64, size: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(size).ok()?)?;
    data.get(start..end)
}

/// One program header, with its bytes.
#[derive(Debug, Clone, Copy)]
struct Segment<'a> {
    header: &'a [u8],
    kind: u32,
    offset: u64,
    data: &'a [u8],
}

/// One section header, with its bytes (none for `SHT_NOBITS`).
#[derive(Debug, Clone, Copy)]
struct Section<'a> {
    header: &'a [u8],
    name: &'a [u8],
    kind: u32,
    flags: u64,
    align: u64,
    data: &'a [u8],
}

/// An ELF file whose header has been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Elf<'a> {
    data: &'a [u8],
}

impl<'a> Elf<'a> {
    /// Checks the file header.
    pub(crate) fn parse(data: &'a [u8]) -> Result<Elf<'a>, ElfError> {
        let ident_ok = data.len() >= EHDR && data.starts_with(b"\x7fELF\x02\x01");
        if ident_ok {
            Ok(Elf { data })
        } else {
            Err(ElfError::NotElf64)
        }
    }

    fn segments(&self) -> Result<Vec<Segment<'a>>, ElfError> {
        let error = ElfError::OutOfBounds("program headers");
        let table = u64_at(self.data, 32).ok_or(error)?;
        let size = u16_at(self.data, 54).ok_or(error)?;
        let count = u16_at(self.data, 56).ok_or(error)?;
        if count > 0 && usize::from(size) < PHDR {
            return Err(error);
        }
        let headers = range(self.data, table, u64::from(size) * u64::from(count)).ok_or(error)?;
        headers
            .chunks_exact(usize::from(size).max(1))
            .map(|header| {
                let offset = u64_at(header, 8).ok_or(error)?;
                let filesz = u64_at(header, 32).ok_or(error)?;
                Ok(Segment {
                    header,
                    kind: u32_at(header, 0).ok_or(error)?,
                    offset,
                    data: range(self.data, offset, filesz)
                        .ok_or(ElfError::OutOfBounds("segments"))?,
                })
            })
            .collect()
    }

    fn sections(&self) -> Result<Vec<Section<'a>>, ElfError> {
        let error = ElfError::OutOfBounds("section headers");
        let table = u64_at(self.data, 40).ok_or(error)?;
        let size = u16_at(self.data, 58).ok_or(error)?;
        let count = u16_at(self.data, 60).ok_or(error)?;
        let names = usize::from(u16_at(self.data, 62).ok_or(error)?);
        if count > 0 && usize::from(size) != SHDR {
            return Err(error);
        }
        let headers = range(self.data, table, u64::from(size) * u64::from(count)).ok_or(error)?;
        let mut sections = Vec::with_capacity(usize::from(count));
        for header in headers.chunks_exact(SHDR) {
            let kind = u32_at(header, 4).ok_or(error)?;
            let offset = u64_at(header, 24).ok_or(error)?;
            let length = u64_at(header, 32).ok_or(error)?;
            // The first header is null, and NOBITS sections have no bytes, whatever their size says.
            let data = if kind == SHT_NOBITS || kind == 0 {
                &[][..]
            } else {
                range(self.data, offset, length).ok_or(ElfError::OutOfBounds("sections"))?
            };
            sections.push(Section {
                header,
                name: &[],
                kind,
                flags: u64_at(header, 8).ok_or(error)?,
                align: u64_at(header, 48).ok_or(error)?,
                data,
            });
        }
        let strings = sections.get(names).map_or(&[][..], |section| section.data);
        for section in &mut sections {
            let at = u32_at(section.header, 0).ok_or(error)? as usize;
            section.name = strings
                .get(at..)
                .and_then(|rest| rest.split(|byte| *byte == 0).next())
                .unwrap_or(&[]);
        }
        Ok(sections)
    }

    /// Whether one of its notes names a PVH entry.
    pub(crate) fn has_pvh_entry(&self) -> Result<bool, ElfError> {
        let segments = self.segments()?;
        let mut notes = segments.iter().filter(|segment| segment.kind == PT_NOTE);
        Ok(notes.any(|segment| has_pvh_note(segment.data)))
    }

    /// The bytes of the first section of this name.
    pub(crate) fn section(&self, name: &str) -> Result<Option<&'a [u8]>, ElfError> {
        let sections = self.sections()?;
        let found = sections.iter().find(|s| s.name == name.as_bytes());
        Ok(found.map(|section| section.data))
    }
}

/// Walks a note segment: `namesz`, `descsz`, `type`, then name and description, each padded to 4 bytes.
fn has_pvh_note(mut notes: &[u8]) -> bool {
    loop {
        let (Some(name_size), Some(desc_size), Some(kind)) =
            (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
        else {
            return false;
        };
        let name = range(notes, 12, u64::from(name_size)).unwrap_or(&[]);
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return true;
        }
        let pad = |size: u32| u64::from(size).next_multiple_of(4);
        let next = 12 + pad(name_size) + pad(desc_size);
        let Some(rest) = usize::try_from(next).ok().and_then(|n| notes.get(n..)) else {
            return false;
        };
        notes = rest;
    }
}

/// The same kernel with what no loader reads left out: section headers, symbols, debug information, and the zeros at a
/// segment's end (`.bss`), which the loader would otherwise copy into the guest page by page.
///
/// Segments keep their addresses and sizes in memory; only their place and size in the file change.
pub(crate) fn compact_kernel(data: &[u8]) -> Result<Vec<u8>, ElfError> {
    /// Segments begin at page boundaries of the file so that a loader may map them.
    const PAGE: usize = 4096;
    /// Kernels have about five; without a bound, overlapping segments would multiply the output.
    const SEGMENTS_MAX: usize = 32;
    let elf = Elf::parse(data)?;
    let segments = elf.segments()?;
    if segments.len() > SEGMENTS_MAX {
        return Err(ElfError::TooMany);
    }
    let mut out = data[..EHDR].to_vec();
    let mut headers = Vec::new();
    let mut bodies: Vec<(u64, u64, usize)> = Vec::new();
    out[32..40].copy_from_slice(&(EHDR as u64).to_le_bytes());
    out[40..48].fill(0);
    out[54..56].copy_from_slice(&(PHDR as u16).to_le_bytes());
    out[58..64].fill(0);
    out.resize(EHDR + PHDR * segments.len(), 0);
    for segment in segments.iter().filter(|segment| segment.kind == PT_LOAD) {
        let used = segment
            .data
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        out.resize(out.len().next_multiple_of(PAGE), 0);
        bodies.push((segment.offset, segment.data.len() as u64, out.len()));
        out.extend_from_slice(&segment.data[..used]);
    }
    // A note lies within a loaded segment, and must be found at the same bytes there. Its bytes are not all zero, so
    // they are before the cut; a note elsewhere is copied.
    for segment in &segments {
        let mut header = segment.header[..PHDR].to_vec();
        let size = segment.data.len() as u64;
        let home = bodies.iter().find(|(offset, length, _)| {
            segment.offset >= *offset && segment.offset + size <= offset + length
        });
        let (place, size) = match home {
            Some((offset, _, place)) if segment.kind == PT_LOAD => {
                let used = segment.data.iter().rposition(|byte| *byte != 0);
                debug_assert_eq!(*offset, segment.offset);
                (*place, used.map_or(0, |last| last as u64 + 1))
            }
            Some((offset, _, place)) => (*place + (segment.offset - offset) as usize, size),
            None => {
                out.resize(out.len().next_multiple_of(8), 0);
                out.extend_from_slice(segment.data);
                (out.len() - segment.data.len(), size)
            }
        };
        header[8..16].copy_from_slice(&(place as u64).to_le_bytes());
        header[32..40].copy_from_slice(&size.to_le_bytes());
        headers.extend_from_slice(&header);
    }
    // A note that reaches into the zeros at its segment's end keeps them.
    let end = headers
        .chunks_exact(PHDR)
        .filter_map(|header| Some((u64_at(header, 8)? + u64_at(header, 32)?) as usize))
        .max()
        .unwrap_or(0);
    out.resize(out.len().max(end), 0);
    out[EHDR..EHDR + headers.len()].copy_from_slice(&headers);
    Ok(out)
}

/// The same module without its signature, its debug information and its BTF: the kernel reads none of them when it
/// loads a module for a guest that enforces no signatures.
///
/// Section numbers stay, as symbols and relocations refer to them; a dropped section becomes an empty one without
/// bytes.
pub(crate) fn slim_module(data: &[u8]) -> Result<Vec<u8>, ElfError> {
    let data = without_signature(data);
    let elf = Elf::parse(data)?;
    let sections = elf.sections()?;
    let mut out = data[..EHDR].to_vec();
    let mut headers = Vec::with_capacity(sections.len() * SHDR);
    for section in &sections {
        let mut header = section.header.to_vec();
        let dropped = section.flags & SHF_ALLOC == 0
            && [
                &b".debug"[..],
                b".rela.debug",
                b".BTF",
                b".rela.BTF",
                b".comment",
            ]
            .iter()
            .any(|prefix| section.name.starts_with(prefix));
        if dropped {
            header[4..8].copy_from_slice(&SHT_NOBITS.to_le_bytes());
            header[24..40].fill(0);
        } else if section.kind != 0 && section.kind != SHT_NOBITS {
            let align = usize::try_from(section.align.clamp(1, 4096)).unwrap_or(1);
            out.resize(out.len().next_multiple_of(align), 0);
            header[24..32].copy_from_slice(&(out.len() as u64).to_le_bytes());
            out.extend_from_slice(section.data);
        }
        headers.extend_from_slice(&header);
    }
    out.resize(out.len().next_multiple_of(8), 0);
    let table = out.len() as u64;
    out[40..48].copy_from_slice(&table.to_le_bytes());
    out.extend_from_slice(&headers);
    Ok(out)
}

/// The module before its appended signature: `…signature, struct module_signature (12 bytes), magic`; the structure ends
/// in the signature's length, big-endian (the kernel's `include/linux/module_signature.h`).
fn without_signature(data: &[u8]) -> &[u8] {
    const MAGIC: &[u8] = b"~Module signature appended~\n";
    let Some(signed) = data.strip_suffix(MAGIC) else {
        return data;
    };
    let length = signed
        .len()
        .checked_sub(4)
        .and_then(|at| signed.get(at..))
        .and_then(|bytes| Some(u32::from_be_bytes(bytes.try_into().ok()?) as usize));
    length
        .and_then(|length| signed.len().checked_sub(length.checked_add(12)?))
        .map_or(data, |end| &data[..end])
}

/// The modules that a module's `.modinfo` says it depends on, with `-` written as `_`.
pub(crate) fn module_depends(data: &[u8]) -> Result<Vec<String>, ElfError> {
    let info = Elf::parse(data)?.section(".modinfo")?.unwrap_or(&[]);
    let mut names = Vec::new();
    for field in info.split(|byte| *byte == 0) {
        if let Some(list) = field.strip_prefix(b"depends=") {
            let list = String::from_utf8_lossy(list);
            let parts = list.split(',').filter(|name| !name.is_empty());
            names.extend(parts.map(|name| name.replace('-', "_")));
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
