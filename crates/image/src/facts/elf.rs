//! Reads one ELF file: what it needs, what it imports, and the marks that it bears.
//!
//! The file is from an image, so that nothing in it is believed: every offset goes through `object`'s checked reads, every
//! list has a bound here, and what cannot be read becomes a doubt instead of an error. A 32-bit file is told as such and not
//! looked into: only 64-bit ones can run in a unikernel, and a Linux guest does not ask.

use super::evidence::{self, Group};
use super::scan;
use memchr::memmem;
use object::Endianness;
use object::elf;
use object::read::elf::{
    Dyn as _, FileHeader as _, ProgramHeader as _, SectionHeader as _, Sym as _,
};
use std::collections::BTreeSet;
use vistara_model::{Architecture, Linkage, Runtime};

type Header = elf::FileHeader64<Endianness>;

/// Libraries that one file may name: Chromium, the largest known, names about 60.
const NEEDED_MAX: usize = 512;
/// Symbols of one table that are looked at; the largest known (LLVM, WebKit with symbols) are below.
const SYMBOLS_MAX: usize = 4_000_000;
/// Program headers that are looked at: linkers make about a dozen.
const SEGMENTS_MAX: usize = 256;
/// Entries of a dynamic section that are looked at: linkers make some thirty, and one for each library.
const DYNAMIC_MAX: usize = 4096;
/// Bytes of a symbol's name that are looked at: one more than the longest of interest.
const SYMBOL_BYTES_MAX: usize = 32;
/// Bytes of one name or path in a file: the kernel's PATH_MAX.
const TEXT_BYTES_MAX: usize = 4096;

/// What one file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) architecture: Architecture,
    /// It is 64-bit, and the rest was read.
    pub(super) wide: bool,
    pub(super) linkage: Linkage,
    pub(super) loader: Option<String>,
    pub(super) needed: Vec<String>,
    pub(super) rpath: Vec<String>,
    pub(super) runpath: Vec<String>,
    /// Symbols of interest: imported by a dynamic file, defined in a static one.
    pub(super) symbols: Vec<(Group, &'static str)>,
    /// A table of symbols was there to be read.
    pub(super) has_symbols: bool,
    /// Patterns in the code.
    pub(super) code: BTreeSet<scan::Hit>,
    /// The code could be scanned: the processor is one whose patterns are known.
    pub(super) scanned: bool,
    /// It is packed, so that its code cannot be seen.
    pub(super) packed: bool,
    pub(super) go: Option<Go>,
    pub(super) rust: bool,
    /// Marks of runtimes that are found in the file's text.
    pub(super) runtimes: Vec<Runtime>,
}

/// What a Go program's table of functions says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Go {
    /// The table is there.
    pub(super) has_table: bool,
    /// A function that starts processes is in it. Go's linker leaves out what nothing reaches.
    pub(super) starts: Option<&'static str>,
}

/// Whether these bytes begin as an ELF file does.
pub(super) fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Reads a file. `own`: it is a program rather than a library, so that its code and text are searched too.
pub(super) fn read(bytes: &[u8], own: bool) -> Result<Summary, &'static str> {
    if !is_elf(bytes) {
        return Err("is not in the ELF format");
    }
    if bytes.get(4) == Some(&1) {
        return Ok(narrow(bytes));
    }
    let broken = "is a broken ELF file";
    let header = Header::parse(bytes).map_err(|_| broken)?;
    let endian = header.endian().map_err(|_| broken)?;
    let kind = header.e_type(endian);
    if kind != elf::ET_EXEC && kind != elf::ET_DYN {
        return Err("is an ELF file that is no program");
    }
    let segments = header.program_headers(endian, bytes).map_err(|_| broken)?;
    let segments = segments.get(..SEGMENTS_MAX).unwrap_or(segments);
    let mut summary = Summary {
        architecture: architecture(header.e_machine(endian).0),
        wide: true,
        linkage: Linkage::Static,
        loader: None,
        needed: Vec::new(),
        rpath: Vec::new(),
        runpath: Vec::new(),
        symbols: Vec::new(),
        has_symbols: false,
        code: BTreeSet::new(),
        scanned: false,
        packed: false,
        go: None,
        rust: false,
        runtimes: Vec::new(),
    };
    for segment in segments {
        if segment.p_type(endian) == elf::PT_INTERP
            && let Ok(path) = segment.data(endian, bytes)
        {
            summary.loader = until_nul(path, TEXT_BYTES_MAX).and_then(text);
        }
    }
    dynamic(&mut summary, endian, segments, bytes);
    summary.linkage = if !own || summary.loader.is_some() || !summary.needed.is_empty() {
        Linkage::Dynamic
    } else if kind == elf::ET_DYN {
        Linkage::StaticPie
    } else {
        Linkage::Static
    };
    symbols(&mut summary, header, endian, bytes);
    if own {
        if summary.architecture.0 == "amd64" {
            summary.scanned = true;
            // Segments may overlap in a hostile file; all code of a real one is there once.
            let mut left = bytes.len();
            for segment in segments {
                if segment.p_type(endian) == elf::PT_LOAD
                    && segment.p_flags(endian).contains(elf::PF_X)
                    && let Ok(code) = segment.data(endian, bytes)
                {
                    summary.scanned &= code.len() <= left && scan::amd64(code, &mut summary.code);
                    left = left.saturating_sub(code.len());
                    if !summary.scanned {
                        break;
                    }
                }
            }
        }
        marks(&mut summary, bytes);
    }
    Ok(summary)
}

fn narrow(bytes: &[u8]) -> Summary {
    let machine = match bytes.get(18..20) {
        Some([3, 0]) => "386",
        Some([40, 0]) => "arm",
        _ => "of 32 bits",
    };
    Summary {
        architecture: Architecture(machine.to_owned()),
        wide: false,
        linkage: Linkage::Dynamic,
        loader: None,
        needed: Vec::new(),
        rpath: Vec::new(),
        runpath: Vec::new(),
        symbols: Vec::new(),
        has_symbols: false,
        code: BTreeSet::new(),
        scanned: false,
        packed: false,
        go: None,
        rust: false,
        runtimes: Vec::new(),
    }
}

fn architecture(machine: u16) -> Architecture {
    Architecture(match machine {
        62 => "amd64".to_owned(),
        183 => "arm64".to_owned(),
        243 => "riscv64".to_owned(),
        22 => "s390x".to_owned(),
        21 => "ppc64le".to_owned(),
        other => format!("machine {other}"),
    })
}

/// The bytes before the first NUL, which must be within the bound: a search through the whole file for each of many
/// names would take for ever.
fn until_nul(bytes: &[u8], bytes_max: usize) -> Option<&[u8]> {
    let start = bytes.get(..bytes_max).unwrap_or(bytes);
    start.get(..memchr::memchr(0, start)?)
}

fn text(bytes: &[u8]) -> Option<String> {
    if bytes.is_empty() || bytes.len() > TEXT_BYTES_MAX {
        return None;
    }
    String::from_utf8(bytes.to_vec()).ok()
}

/// The dynamic section by way of the program headers, as the loader reads it: section headers may be missing.
fn dynamic(
    summary: &mut Summary,
    endian: Endianness,
    segments: &[elf::ProgramHeader64<Endianness>],
    bytes: &[u8],
) {
    let entries = segments
        .iter()
        .find_map(|segment| segment.dynamic(endian, bytes).ok().flatten());
    let Some(entries) = entries else { return };
    let entries = entries.get(..DYNAMIC_MAX).unwrap_or(entries);
    let value = |wanted: elf::DynamicTag| {
        entries
            .iter()
            .take_while(|entry| entry.d_tag(endian) != elf::DT_NULL)
            .find(|entry| entry.d_tag(endian) == wanted)
            .map(|entry| entry.d_val(endian))
    };
    let (Some(address), Some(length)) = (value(elf::DT_STRTAB), value(elf::DT_STRSZ)) else {
        return;
    };
    let offset = segments.iter().find_map(|segment| {
        let start = segment.p_vaddr(endian);
        let within = address.checked_sub(start)?;
        (segment.p_type(endian) == elf::PT_LOAD && within < segment.p_filesz(endian))
            .then(|| segment.p_offset(endian).checked_add(within))?
    });
    let Some(offset) = offset else { return };
    let strings = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
    let Some(strings) = strings else { return };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let strings = strings.get(..length).unwrap_or(strings);
    for entry in entries {
        let tag = entry.d_tag(endian);
        if tag == elf::DT_NULL {
            break;
        }
        let list = if tag == elf::DT_NEEDED {
            &mut summary.needed
        } else if tag == elf::DT_RPATH {
            &mut summary.rpath
        } else if tag == elf::DT_RUNPATH {
            &mut summary.runpath
        } else {
            continue;
        };
        let Some(found) = usize::try_from(entry.d_val(endian))
            .ok()
            .and_then(|at| strings.get(at..))
            .and_then(|rest| until_nul(rest, TEXT_BYTES_MAX))
            .and_then(text)
        else {
            continue;
        };
        if list.len() >= NEEDED_MAX {
            break;
        }
        if tag == elf::DT_NEEDED {
            list.push(found);
        } else {
            list.extend(found.split(':').take(NEEDED_MAX).map(str::to_owned));
        }
    }
}

/// Symbols of interest. What a static program was linked with it defines; what a dynamic one uses it imports.
fn symbols(summary: &mut Summary, header: &Header, endian: Endianness, bytes: &[u8]) {
    let Ok(sections) = header.sections(endian, bytes) else {
        return;
    };
    let dynamic = summary.linkage == Linkage::Dynamic;
    let table = if dynamic {
        elf::SHT_DYNSYM
    } else {
        elf::SHT_SYMTAB
    };
    let Ok(table) = sections.symbols(endian, bytes, table) else {
        return;
    };
    let strings = sections
        .section(table.string_section())
        .and_then(|section| section.data(endian, bytes))
        .unwrap_or_default();
    let mut found = BTreeSet::new();
    for symbol in table.iter().take(SYMBOLS_MAX) {
        // The first, empty entry of a table says nothing.
        summary.has_symbols |= symbol.st_name(endian) != 0;
        let undefined = symbol.st_shndx(endian) == elf::SHN_UNDEF;
        if undefined != dynamic {
            continue;
        }
        let name = strings.get(symbol.st_name(endian) as usize..);
        if let Some(name) = name.and_then(|rest| until_nul(rest, SYMBOL_BYTES_MAX))
            && let Some(known) = evidence::known(name, dynamic)
        {
            found.insert(known);
        }
    }
    summary.symbols = found.into_iter().collect();
}

/// Marks in the text of a program.
fn marks(summary: &mut Summary, bytes: &[u8]) {
    let has = |mark: &[u8]| memmem::find(bytes, mark).is_some();
    summary.packed = has(b"UPX!") && has(b"http://upx.sf.net");
    if has(b"\xff Go buildinf:") {
        // Names in the table of functions end with a NUL; `syscall.Exec` alone would fit other texts too.
        let starts = [
            ("syscall.forkExec", &b"syscall.forkExec\0"[..]),
            (
                "syscall.forkAndExecInChild",
                b"syscall.forkAndExecInChild\0",
            ),
            ("syscall.Exec", b"syscall.Exec\0"),
        ];
        let found = starts.iter().find(|(_, mark)| has(mark));
        summary.go = Some(Go {
            has_table: has(b"runtime.main\0"),
            starts: found.map(|(name, _)| *name),
        });
        summary.runtimes.push(Runtime::Go);
    }
    if summary.go.is_none() && (has(b"/rustc/") || has(b"rustc version ")) {
        summary.rust = true;
        summary.runtimes.push(Runtime::Rust);
    }
    let table: [(Runtime, &[u8]); 5] = [
        (Runtime::Busybox, b"BusyBox is a multi-call binary"),
        (Runtime::Python, b"PYTHONHOME"),
        (Runtime::Node, b"NODE_OPTIONS"),
        (Runtime::Ruby, b"RUBYOPT"),
        (Runtime::Perl, b"PERL5LIB"),
    ];
    for (runtime, mark) in table {
        if has(mark) {
            summary.runtimes.push(runtime);
        }
    }
}
