//! The suite's guest as a unikernel: one program on a Nanos kernel, which prints and to which nobody can say anything.
//!
//! Kernel: `VISTARA_NANOS_KERNEL`, or `/opt/vistara/nanos/kernel.img`.

use super::{GREETING, guest};
use std::fs::File;
use std::path::{Path, PathBuf};
use vistara_host::facts;
use vistara_machine::{Disk, Fence, LaunchPlan, NanosBoot, Start};
use vistara_model::{Accelerator, Bytes, MachineId, Rates};
use vistara_nanos::KernelFacts;
use vistara_nanos::disk::{BootDisk, DiskOptions};
use vistara_nanos::manifest::Manifest;
use vistara_nanos::tfs::{Label, VolumeId};

/// Tests of the suite that a unikernel cannot pass, and why.
pub(crate) const LACKS: [(&str, &str); 7] = [
    (
        "a_guest_that_reboots_has_switched_itself_off",
        "a unikernel that restarts has ended: `output_and_exit_codes_are_exact` has its ends",
    ),
    (
        "a_kernels_panic_is_told_with_its_words",
        "nobody can make its kernel panic; the codes of its failures are among `output_and_exit_codes_are_exact`",
    ),
    (
        "the_console_gives_its_end_and_no_more_than_asked",
        "a unikernel's console is its output",
    ),
    (
        "a_captured_machine_is_gone_and_its_forks_answer",
        "unikernels are not captured",
    ),
    (
        "a_capture_is_refused_where_it_was_not_planned_or_does_not_fit",
        "unikernels are not captured",
    ),
    (
        "a_machine_beyond_its_memory_limit_is_ended_with_that_reason",
        "a unikernel that only waits takes less than its monitor does",
    ),
    (
        "a_kvm_that_refuses_after_it_was_found_fails_the_launch_with_the_reason",
        "what is started plays no part: the tests with Linux guests have it",
    ),
];

/// `wait` and `end` are the suite's: they answer by printing, `end` only for a moment.
const PROGRAM: &str = r#"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <arpa/inet.h>
#include <sys/socket.h>
static void term(int s) { printf("asked to end\n"); exit(9); }
int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IOLBF, 0);
    if (!strcmp(argv[1], "exit")) { printf("code %s\n", argv[2]); return atoi(argv[2]); }
    if (!strcmp(argv[1], "flood")) {
        for (int i = 0; i < atoi(argv[2]); i++) printf("line %06d of a flood that fills any pipe\n", i);
        return 0;
    }
    if (!strcmp(argv[1], "wait")) { signal(SIGTERM, term); printf("waiting\n"); for (;;) pause(); }
    if (!strcmp(argv[1], "answer")) {
        printf("GREETING\n");
        for (int i = 0; argc < 3 || i < atoi(argv[2]); i++) { printf("answer %d\n", i); usleep(300000); }
        return 0;
    }
    if (!strcmp(argv[1], "echo")) {
        int l = socket(AF_INET, SOCK_STREAM, 0), on = 1;
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(7)};
        setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(l, (struct sockaddr *)&a, sizeof a) || listen(l, 4)) return 2;
        printf("listening\n");
        for (;;) {
            char b[64];
            int c = accept(l, 0, 0);
            ssize_t n = read(c, b, sizeof b);
            if (n > 0) write(c, b, n);
            close(c);
        }
    }
    if (!strcmp(argv[1], "abort")) { printf("dying\n"); abort(); }
    return 1;
}
"#;

/// Arguments of a program that answers as long as it runs, and of one that does so for a second.
pub(crate) const ANSWERS: [&str; 1] = ["answer"];
pub(crate) const ENDS: [&str; 2] = ["answer", "3"];

/// What a unikernel's plan has that another's has not.
pub(crate) struct Shape {
    pub(crate) accelerator: Accelerator,
    /// The user as which it runs when the tests do as root.
    pub(crate) user: (u32, u32),
    /// What its monitor takes beside its memory.
    pub(crate) overhead: Bytes,
}

fn kernel() -> PathBuf {
    std::env::var_os("VISTARA_NANOS_KERNEL").map_or_else(
        || PathBuf::from("/opt/vistara/nanos/kernel.img"),
        PathBuf::from,
    )
}

fn program() -> Result<Vec<u8>, String> {
    guest::compiled("unikernel", &PROGRAM.replace("GREETING", GREETING))
}

/// Whether a unikernel can be made here, or why not.
pub(crate) fn can_be_made() -> Result<(), String> {
    let kernel = kernel();
    let bytes =
        std::fs::read(&kernel).map_err(|_| format!("no Nanos kernel at {}", kernel.display()))?;
    KernelFacts::read(&bytes).unwrap();
    program().map(drop)
}

/// A machine whose program is called so. Its disk lies in `dir`, and is made anew.
pub(crate) fn plan(
    dir: &Path,
    shape: &Shape,
    arguments: &[&str],
    manifest: Manifest,
) -> LaunchPlan {
    let program = program().unwrap();
    let disk = dir.join("disk");
    let manifest = Manifest {
        program: b"/p".to_vec(),
        arguments: std::iter::once("p")
            .chain(arguments.iter().copied())
            .map(|word| word.as_bytes().to_vec())
            .collect(),
        debug_exit: true,
        ..manifest
    };
    let options = DiskOptions {
        id: VolumeId([1; 16]),
        label: Label::none(),
        free_bytes: 0,
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&disk)
        .unwrap();
    let mut boot = BootDisk::create(file, &options, &manifest).unwrap();
    let root = boot.tree().root();
    let length = program.len() as u64;
    boot.tree()
        .file(root, b"p", length, &mut program.as_slice())
        .unwrap();
    boot.finish().unwrap();
    let mut random = [0; 16];
    std::io::Read::read_exact(&mut File::open("/dev/urandom").unwrap(), &mut random).unwrap();
    LaunchPlan {
        id: MachineId::from_random(random),
        dir: dir.to_owned(),
        accelerator: shape.accelerator,
        vcpus: 1,
        memory: Bytes::mib(64),
        start: Start::Nanos(NanosBoot { kernel: kernel() }),
        huge_pages: false,
        capturable: false,
        disks: vec![Disk {
            path: disk,
            read_only: false,
        }],
        nic: None,
        shares: vec![],
        rates: Rates::default(),
        fence: Fence {
            uid_gid: facts::is_root().then_some(shape.user),
            memory_max: Bytes(Bytes::mib(64).0 + shape.overhead.0),
            pids_max: 64,
            cpu_millis: None,
        },
    }
}
