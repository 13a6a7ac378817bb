//! What a kernel file must be, and the copy of it that Firecracker can start.
//!
//! Nanos' PVH entry uses the stack before it sets one, and Firecracker prefers that entry to the Linux boot protocol. Where
//! the note that names it is out of sight, the Linux protocol is used, and the command line is heard.

/// Bytes of the largest kernel that is taken; the real one has about two million.
pub const KERNEL_BYTES_MAX: usize = 64 << 20;
const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const PHDRS_MAX: usize = 64;
const MACHINE_X86_64: u16 = 62;
const PT_NULL: u32 = 0;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note that names the PVH entry.
const NOTE_PVH_ENTRY: u32 = 18;
/// The first bytes of a TFS log: every kernel that reads TFS has them.
const TFS_MAGIC: &[u8] = b"NVMTFS";
/// The first bytes of the kernel's log record.
const KLOG_MAGIC: &[u8] = b"KLOG";

/// Why a file is no kernel that could be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// Not ELF, or not of 64 bits.
    #[error("it is not a 64-bit little-endian ELF file")]
    NotElf,
    /// For another processor.
    #[error("it is for another processor than x86-64 (ELF machine {0})")]
    Processor(u16),
    /// Cut short or damaged.
    #[error("it is cut short or damaged: its {0} lie outside the file")]
    OutOfBounds(&'static str),
    /// It is ELF, but nothing in it speaks of Nanos.
    #[error("it does not look like a Nanos kernel: it knows nothing of {0}")]
    NotNanos(&'static str),
    /// Larger than [`KERNEL_BYTES_MAX`].
    #[error("it is larger than any kernel")]
    TooLarge,
}

/// What was found in a kernel file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFacts {
    /// The address of the PVH entry; QEMU's `-kernel` needs one.
    pub pvh_entry: Option<u32>,
    /// Bytes that the kernel takes in memory when it is loaded.
    pub loaded_bytes: u64,
}

impl KernelFacts {
    /// Looks at a kernel file.
    pub fn read(file: &[u8]) -> Result<KernelFacts, KernelError> {
        if file.len() > KERNEL_BYTES_MAX {
            return Err(KernelError::TooLarge);
        }
        let mut facts = KernelFacts {
            pvh_entry: None,
            loaded_bytes: 0,
        };
        let mut loaded = false;
        for header in program_headers(file)? {
            let outside = || KernelError::OutOfBounds("segments");
            let field = |at| u64_at(file, header + at).ok_or_else(outside);
            let (offset, size) = (field(8)?, field(32)?);
            let segment = usize::try_from(offset)
                .ok()
                .zip(usize::try_from(size).ok())
                .and_then(|(start, size)| file.get(start..start.checked_add(size)?))
                .ok_or_else(outside)?;
            match u32_at(file, header).ok_or_else(outside)? {
                PT_LOAD => {
                    loaded = true;
                    facts.loaded_bytes = facts.loaded_bytes.saturating_add(field(40)?);
                }
                PT_NOTE => facts.pvh_entry = facts.pvh_entry.or(pvh_entry(segment)),
                _ => {}
            }
        }
        if !loaded {
            return Err(KernelError::OutOfBounds("segments"));
        }
        for (magic, what) in [
            (TFS_MAGIC, "its file system"),
            (KLOG_MAGIC, "its log record"),
        ] {
            if !file.windows(magic.len()).any(|bytes| bytes == magic) {
                return Err(KernelError::NotNanos(what));
            }
        }
        Ok(facts)
    }
}

/// A copy of a kernel file whose PVH entry no monitor sees, for Firecracker. A kernel without the note is returned as it is.
pub fn neutralise_pvh_note(file: &[u8]) -> Result<Vec<u8>, KernelError> {
    let headers = program_headers(file)?;
    let mut copy = file.to_vec();
    for header in headers {
        if u32_at(&copy, header) == Some(PT_NOTE)
            && let Some(kind) = copy.get_mut(header..header + 4)
        {
            kind.copy_from_slice(&PT_NULL.to_le_bytes());
        }
    }
    Ok(copy)
}

/// Where the program headers are, each whole within the file.
fn program_headers(file: &[u8]) -> Result<Vec<usize>, KernelError> {
    // Class 2: 64 bits; data 1: little-endian.
    let elf = file.len() >= EHDR_BYTES && file.starts_with(b"\x7fELF\x02\x01");
    if !elf {
        return Err(KernelError::NotElf);
    }
    let outside = || KernelError::OutOfBounds("program headers");
    let machine = u16_at(file, 18).ok_or_else(outside)?;
    if machine != MACHINE_X86_64 {
        return Err(KernelError::Processor(machine));
    }
    let start = u64_at(file, 32).and_then(|start| usize::try_from(start).ok());
    let start = start.ok_or_else(outside)?;
    let size = usize::from(u16_at(file, 54).ok_or_else(outside)?);
    let count = usize::from(u16_at(file, 56).ok_or_else(outside)?);
    let end = count
        .checked_mul(size)
        .and_then(|bytes| bytes.checked_add(start));
    let inside = end.is_some_and(|end| end <= file.len());
    if !inside || size < PHDR_BYTES || count > PHDRS_MAX {
        return Err(outside());
    }
    Ok((0..count).map(|index| start + index * size).collect())
}

/// Finds the PVH entry among a segment's notes.
fn pvh_entry(notes: &[u8]) -> Option<u32> {
    let mut at = 0;
    loop {
        let name_bytes = u32_at(notes, at)? as usize;
        let value_bytes = u32_at(notes, at + 4)? as usize;
        let kind = u32_at(notes, at + 8)?;
        let name = at + 12;
        let value = name.checked_add(name_bytes.checked_next_multiple_of(4)?)?;
        let next = value.checked_add(value_bytes.checked_next_multiple_of(4)?)?;
        let xen = notes.get(name..name.checked_add(name_bytes)?)? == b"Xen\0";
        if xen && kind == NOTE_PVH_ENTRY && value_bytes >= 4 {
            return u32_at(notes, value);
        }
        at = next;
    }
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    let bytes = data.get(at..at.checked_add(2)?)?.try_into().ok()?;
    Some(u16::from_le_bytes(bytes))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?.try_into().ok()?;
    Some(u32::from_le_bytes(bytes))
}

fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    let bytes = data.get(at..at.checked_add(8)?)?.try_into().ok()?;
    Some(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file with one loaded segment that holds `text`, and a note with the PVH entry 0x200123.
    fn kernel(text: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for number in [4_u32, 4, NOTE_PVH_ENTRY] {
            note.extend(number.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(0x20_0123_u32.to_le_bytes());
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(EHDR_BYTES, 0);
        file[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        file[32..40].copy_from_slice(&64_u64.to_le_bytes());
        file[54..56].copy_from_slice(&(PHDR_BYTES as u16).to_le_bytes());
        file[56..58].copy_from_slice(&2_u16.to_le_bytes());
        let mut offset = EHDR_BYTES + 2 * PHDR_BYTES;
        for (kind, length) in [(PT_LOAD, text.len()), (PT_NOTE, note.len())] {
            let mut header = vec![0; PHDR_BYTES];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&(offset as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
            header[40..48].copy_from_slice(&(length as u64).to_le_bytes());
            file.extend(header);
            offset += length;
        }
        file.extend(text);
        file.extend(note);
        file
    }

    #[test]
    fn a_nanos_kernel_is_known_by_what_it_knows() {
        let facts = KernelFacts::read(&kernel(b"..NVMTFS..KLOG..")).unwrap();
        assert_eq!(facts.pvh_entry, Some(0x20_0123));
        assert_eq!(facts.loaded_bytes, 16);
        let linux = KernelFacts::read(&kernel(b"Linux version 6.1"));
        assert!(matches!(linux, Err(KernelError::NotNanos(_))));
        assert_eq!(KernelFacts::read(b"#!/bin/sh\n"), Err(KernelError::NotElf));
    }

    #[test]
    fn the_copy_for_firecracker_differs_in_the_note_s_header_alone() {
        let file = kernel(b"NVMTFS KLOG");
        let copy = neutralise_pvh_note(&file).unwrap();
        let changed: Vec<usize> = (0..file.len())
            .filter(|at| file[*at] != copy[*at])
            .collect();
        assert_eq!(changed, [EHDR_BYTES + PHDR_BYTES]);
        assert_eq!(KernelFacts::read(&copy).unwrap().pvh_entry, None);
    }

    proptest! {
        #[test]
        fn a_damaged_kernel_is_refused_or_read_but_never_panics(
            flips in prop::collection::vec((0usize..240, any::<u8>()), 0..8), cut in 0usize..240,
        ) {
            let mut file = kernel(b"NVMTFS KLOG");
            for (at, byte) in flips {
                if let Some(there) = file.get_mut(at) {
                    *there = byte;
                }
            }
            file.truncate(file.len().saturating_sub(cut));
            let _ = KernelFacts::read(&file);
            let _ = neutralise_pvh_note(&file);
        }
    }
}
