//! The least that QEMU needs to run something: the baseline that our own start is measured against.
//!
//! The same machine, accelerator, kernel and kernel words as a Vistara guest's, with neither disk, network nor channel, and
//! an initramfs that holds one program of some forty bytes, which prints a line on the console.

use super::command::TRANSLATION_CACHE_MIB;
use crate::VmmError;
use crate::boot::{Archive, CMDLINE};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vistara_host::facts;
use vistara_model::{Accelerator, Bytes};

/// What the program prints.
pub(super) const LINE: &[u8; 12] = b"vistara: up\n";
/// Longest that a boot may take.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// A static program for x86-64 that prints a line and then waits for ever: what the baselines run, and what is measured
/// against them. Assembled by hand: `write(1, LINE, 12)`, then `pause()` in a loop.
pub fn bare_program() -> Vec<u8> {
    program(&[
        0xb8, 34, 0, 0, 0, // mov eax, 34 (pause)
        0x0f, 0x05, // syscall
        0xeb, 0xf7, // jmp to the mov
    ])
}

/// As [`bare_program`], which instead of waiting for ever waits for its input, and prints its line for each piece of it.
fn echo_program() -> Vec<u8> {
    program(&[
        0x31, 0xc0, // xor eax, eax (read)
        0x31, 0xff, // xor edi, edi: standard input
        0x48, 0x8d, 0x74, 0x24, 0x80, // lea rsi, [rsp - 128]
        0xba, 64, 0, 0, 0, // mov edx, 64
        0x0f, 0x05, // syscall
        0xeb, 0xd6, // jmp to the beginning
    ])
}

/// A program that prints the line and goes on with `rest`.
fn program(rest: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut code: Vec<u8> = vec![
        0xb8,
        1,
        0,
        0,
        0, // mov eax, 1 (write)
        0xbf,
        1,
        0,
        0,
        0, // mov edi, 1
        0x48,
        0x8d,
        0x35,
        7 + rest.len() as u8,
        0,
        0,
        0, // lea rsi, [rip + …]: the line, after the code
        0xba,
        12,
        0,
        0,
        0, // mov edx, 12
        0x0f,
        0x05, // syscall
    ];
    code.extend_from_slice(rest);
    code.extend_from_slice(LINE);
    let size = HEADERS + code.len() as u64;
    let mut elf = Vec::new();
    elf.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend_from_slice(&2u16.to_le_bytes()); // executable
    elf.extend_from_slice(&62u16.to_le_bytes()); // x86-64
    elf.extend_from_slice(&1u32.to_le_bytes());
    elf.extend_from_slice(&(BASE + HEADERS).to_le_bytes()); // entry
    elf.extend_from_slice(&64u64.to_le_bytes()); // program headers
    elf.extend_from_slice(&[0; 12]); // no sections, no flags
    for field in [64u16, 56, 1, 0, 0, 0] {
        elf.extend_from_slice(&field.to_le_bytes());
    }
    elf.extend_from_slice(&1u32.to_le_bytes()); // load
    elf.extend_from_slice(&5u32.to_le_bytes()); // read, execute
    for field in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend_from_slice(&u64::to_le_bytes(field));
    }
    elf.extend_from_slice(&code);
    elf
}

/// Starts QEMU with this kernel and takes the time from its start to the first line of the guest's program. Blocks.
///
/// # Errors
/// [`VmmError::Launch`] where it does not come up.
pub fn raw_boot(
    qemu: &Path,
    kernel: &Path,
    accelerator: Accelerator,
    memory: Bytes,
    scratch: &Path,
) -> Result<Duration, VmmError> {
    let launch = |step: &'static str| {
        move |error: std::io::Error| VmmError::Launch {
            step,
            message: error.to_string(),
        }
    };
    let initramfs = archive(scratch, &bare_program()).map_err(launch("writing the initramfs"))?;
    let words = bare_words(accelerator);
    let mut command = bare(qemu, "microvm,acpi=on", accelerator, memory);
    command.args(["-append", &words]).arg("-kernel").arg(kernel);
    command.arg("-initrd").arg(&initramfs);
    time_to_line(command)
}

/// An initramfs with this program and nothing else.
fn archive(scratch: &Path, program: &[u8]) -> std::io::Result<PathBuf> {
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, program);
    let path = scratch.join("raw-initramfs.cpio");
    std::fs::write(&path, archive.finish())?;
    Ok(path)
}

/// An initramfs whose program answers each line with its own.
pub(super) fn bare_archive(scratch: &Path) -> std::io::Result<PathBuf> {
    archive(scratch, &echo_program())
}

/// The kernel's words of a bare guest.
pub(super) fn bare_words(accelerator: Accelerator) -> String {
    let mut words = format!("{CMDLINE} console=ttyS0");
    if let (Accelerator::Tcg, Some(khz)) = (accelerator, facts::tsc_khz()) {
        words.push_str(&format!(" tsc_early_khz={khz} tsc=reliable"));
    }
    words
}

/// Starts QEMU with this Nanos kernel and this disk, whose program is [`bare_program`], and takes the time from its start to
/// the program's line. The disk is written to. Blocks.
///
/// # Errors
/// [`VmmError::Launch`] where it does not come up.
pub fn raw_nanos_boot(
    qemu: &Path,
    kernel: &Path,
    accelerator: Accelerator,
    memory: Bytes,
    disk: &Path,
    network: bool,
) -> Result<Duration, VmmError> {
    let mut command = bare(qemu, "microvm,ioapic2=off", accelerator, memory);
    command.arg("-kernel").arg(kernel);
    command.args(["-global", "virtio-mmio.force-legacy=false"]);
    command.args(["-device", "isa-debug-exit"]);
    let drive = format!("if=none,id=hd0,format=raw,file={}", disk.display());
    command.args(["-drive", &drive, "-device", "virtio-blk-device,drive=hd0"]);
    if network {
        command.args(["-netdev", "user,id=n0"]);
        command.args(["-device", "virtio-net-device,netdev=n0"]);
    }
    time_to_line(command)
}

/// What every bare monitor has: the tuning of our own, and its serial line on standard output.
pub(super) fn bare(qemu: &Path, machine: &str, accelerator: Accelerator, memory: Bytes) -> Command {
    let (accel, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm".to_owned(), "host"),
        Accelerator::Tcg => (
            format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"),
            "max,-erms",
        ),
    };
    let mut command = Command::new(qemu);
    command
        .args(["-M", machine, "-accel", &accel, "-cpu", cpu, "-smp", "1"])
        .args(["-m", &format!("{}M", memory.to_mib_ceil())])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-serial", "stdio"]);
    command
}

/// From the start of the monitor to [`LINE`] on its standard output. It is ended then.
fn time_to_line(mut command: Command) -> Result<Duration, VmmError> {
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| VmmError::Launch {
            step: "starting QEMU",
            message: error.to_string(),
        })?;
    let found = child.stdout.take().map(|mut out| {
        let (told, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut piece) {
                text.extend_from_slice(&piece[..count]);
                if text
                    .windows(LINE.len() - 1)
                    .any(|window| window == &LINE[..LINE.len() - 1])
                {
                    // The other end waits, or has given up.
                    let _ = told.send(Ok(begin.elapsed()));
                    return;
                }
            }
            let _ = told.send(Err(String::from_utf8_lossy(&text).into_owned()));
        });
        heard.recv_timeout(BOOT_LIMIT)
    });
    // Both can only fail where it has ended by itself.
    let _ = child.kill();
    let _ = child.wait();
    match found {
        Some(Ok(Ok(took))) => Ok(took),
        Some(Ok(Err(text))) => Err(VmmError::Launch {
            step: "booting the bare guest",
            message: text,
        }),
        Some(Err(_)) | None => {
            let message = format!("no sign of life within {} s", BOOT_LIMIT.as_secs());
            Err(VmmError::Launch {
                step: "booting the bare guest",
                message,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bare_program_runs_and_prints_its_line() {
        if !cfg!(target_arch = "x86_64") {
            println!("SKIP: the program is for x86-64");
            return;
        }
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("init");
        std::fs::write(&path, bare_program()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).stdout(Stdio::piped()).spawn().unwrap();
        let mut text = [0; LINE.len()];
        child.stdout.take().unwrap().read_exact(&mut text).unwrap();
        assert_eq!(&text, LINE);
        // It waits then, until somebody ends it: a program that crashed after its line would be gone.
        let state = format!("/proc/{}/stat", child.id());
        while !std::fs::read_to_string(&state).unwrap().contains(") S ") {
            assert_eq!(child.try_wait().unwrap(), None);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // The other one prints it again for what it is told.
        std::fs::write(&path, echo_program()).unwrap();
        let mut child = Command::new(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut input = child.stdin.take().unwrap();
        for _ in 0..3 {
            out.read_exact(&mut text).unwrap();
            assert_eq!(&text, LINE);
            std::io::Write::write_all(&mut input, b"\n").unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
