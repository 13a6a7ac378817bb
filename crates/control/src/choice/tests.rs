//! The choice as a specification: tables of what is asked and known, and what is chosen.

use super::*;
use vistara_model::{
    Architecture, Confidence, Correction, Evidence, Linkage, MayCreate, ProcessFacts, ProgramFacts,
    ProgramKind, Runtime,
};

fn host(kvm: KvmVerdict, qemu: bool, firecracker: bool, nanos: bool) -> HostFacts {
    HostFacts {
        kvm,
        qemu: qemu.then(|| "7.2".to_owned()),
        firecracker: firecracker.then(|| "1.7".to_owned()),
        firecracker_no_network: None,
        nanos_kernel: nanos.then(|| "0.1.54".to_owned()),
        nanos_tells_calls: false,
        linux_kernel: Some("6.1".to_owned()),
        cpus: 2,
        memory_available: Bytes::gib(8),
    }
}

fn works() -> KvmVerdict {
    KvmVerdict::Works
}
fn broken() -> KvmVerdict {
    KvmVerdict::Broken("guests hang".to_owned())
}
fn absent() -> KvmVerdict {
    KvmVerdict::Absent("there is no /dev/kvm".to_owned())
}

fn asked(hypervisor: Hypervisor) -> Request {
    Request {
        hypervisor,
        argv: vec!["p".to_owned()],
        tty: false,
        stdin: false,
        host_directories: false,
        network: true,
        named_volumes: false,
        ports: false,
        exec: false,
        gpu: false,
        user: String::new(),
        stop_signal: Signal::TERM,
        linux_kernel: None,
        memory: Bytes::mib(512),
        unikernel_memory_min: Some(Bytes::mib(64)),
        network_rate: false,
        retry_safe: false,
    }
}

/// A program of which nothing speaks against a unikernel.
fn plain() -> ImageFacts {
    ImageFacts {
        program: ProgramFacts {
            path: "/usr/bin/p".to_owned(),
            file: "/usr/bin/p".to_owned(),
            kind: ProgramKind::Elf,
            executable: "/usr/bin/p".to_owned(),
            architecture: Some(Architecture("amd64".to_owned())),
            linkage: Some(Linkage::Dynamic),
            loader: Some("/lib64/ld-linux-x86-64.so.2".to_owned()),
            libraries: Vec::new(),
            missing: Vec::new(),
            runtimes: Vec::new(),
            processes: ProcessFacts {
                may_create: MayCreate::No,
                confidence: Confidence::Certain,
                doubt: None,
                evidence: Vec::new(),
            },
            whole_system: Vec::new(),
            size: Bytes::mib(2),
        },
        correction: None,
        entries: 100,
        size: Bytes::mib(3),
    }
}

fn evidence(what: &str) -> Vec<Evidence> {
    vec![Evidence {
        what: what.to_owned(),
        file: "/usr/bin/p".to_owned(),
    }]
}

#[test]
fn firecracker_is_passed_over_where_it_lacks_what_is_asked_for() {
    let all = host(works(), true, true, false);
    let directories = Request {
        host_directories: true,
        ..asked(Hypervisor::Auto)
    };
    let no_network = HostFacts {
        firecracker_no_network: Some("slirp4netns is not installed".to_owned()),
        ..all.clone()
    };
    let plain = asked(Hypervisor::Auto);
    let unplugged = Request {
        network: false,
        ..plain.clone()
    };
    for (request, host, vmm, reason) in [
        (&directories, &all, VmmKind::Qemu, "directories of the host"),
        (&plain, &no_network, VmmKind::Qemu, "slirp4netns"),
        (&unplugged, &no_network, VmmKind::Firecracker, "present"),
    ] {
        let choice = choose(request, None, host).unwrap();
        assert_eq!(choice.backend.vmm, vmm);
        assert_eq!(choice.backend.accelerator, Accelerator::Kvm);
        let reasons = choice.reasons.join("; ");
        assert!(reasons.contains(reason), "{reasons}");
        // By name it is refused, for the same reason.
        let by_name = Request {
            hypervisor: Hypervisor::Firecracker,
            ..request.clone()
        };
        match choose(&by_name, None, host) {
            Ok(choice) => assert_eq!((choice.backend.vmm, vmm), (vmm, VmmKind::Firecracker)),
            Err(error) => assert!(error.to_string().contains(reason), "{error}"),
        }
    }
}

/// Asked, KVM, QEMU there, Firecracker there → monitor and accelerator; no facts of an image, so a Linux guest.
#[test]
fn the_monitor_follows_the_table() {
    use Accelerator::{Kvm, Tcg};
    use Hypervisor::{Auto, Firecracker, Qemu};
    use VmmKind::{Firecracker as Fc, Qemu as Qm};
    let table = [
        (Auto, works(), true, true, Some((Fc, Kvm))),
        (Auto, works(), false, true, Some((Fc, Kvm))),
        (Auto, works(), true, false, Some((Qm, Kvm))),
        (Auto, broken(), true, true, Some((Qm, Tcg))),
        (Auto, absent(), true, true, Some((Qm, Tcg))),
        (Auto, absent(), true, false, Some((Qm, Tcg))),
        (Auto, broken(), false, true, None),
        (Auto, works(), false, false, None),
        (Qemu, works(), true, true, Some((Qm, Kvm))),
        (Qemu, broken(), true, false, Some((Qm, Tcg))),
        (Qemu, works(), false, true, None),
        (Firecracker, works(), true, true, Some((Fc, Kvm))),
        (Firecracker, broken(), true, true, None),
        (Firecracker, absent(), true, true, None),
        (Firecracker, works(), true, false, None),
    ];
    for nanos in [false, true] {
        for (hypervisor, kvm, qemu, firecracker, expected) in table.clone() {
            let facts = host(kvm, qemu, firecracker, nanos);
            let choice = choose(&asked(hypervisor), None, &facts).ok();
            let chosen = choice
                .as_ref()
                .map(|it| (it.backend.vmm, it.backend.accelerator));
            assert_eq!(chosen, expected, "{hypervisor} on {facts:?}");
            assert!(choice.is_none_or(|it| it.backend.payload == Payload::Linux));
        }
    }
}

/// A unikernel is booted by the same monitor by the same rule.
#[test]
fn a_unikernel_takes_the_best_monitor_too() {
    use Accelerator::{Kvm, Tcg};
    for (kvm, firecracker, expected) in [
        (works(), true, (VmmKind::Firecracker, Kvm)),
        (works(), false, (VmmKind::Qemu, Kvm)),
        (broken(), true, (VmmKind::Qemu, Tcg)),
    ] {
        for hypervisor in [Hypervisor::Auto, Hypervisor::Nanovms] {
            let host = host(kvm.clone(), true, firecracker, true);
            let choice = choose(&asked(hypervisor), Some(&plain()), &host).unwrap();
            assert_eq!(choice.hypervisor, Hypervisor::Nanovms);
            assert_eq!(choice.backend.payload, Payload::Nanos);
            assert_eq!((choice.backend.vmm, choice.backend.accelerator), expected);
        }
    }
}

/// What a row changes of a plain request and a plain program.
type Change = fn(&mut Request, &mut ImageFacts);

#[derive(Debug, PartialEq, Eq)]
enum ByName {
    Runs,
    Warned,
    Refused,
}

/// What is different → what `auto` boots, and what becomes of `--hypervisor nanovms`; a word that the reason must have.
#[test]
fn the_payload_follows_the_table() {
    use ByName::{Refused, Runs, Warned};
    use Payload::{Linux, Nanos};
    let table: &[(&str, Change, Payload, ByName, &str)] = &[
        ("a plain program", |_, _| {}, Nanos, Runs, "nothing in it"),
        (
            "a terminal",
            |r, _| r.tty = true,
            Linux,
            Refused,
            "terminal",
        ),
        (
            "standard input",
            |r, _| r.stdin = true,
            Linux,
            Refused,
            "standard input",
        ),
        (
            "host directories",
            |r, _| r.host_directories = true,
            Linux,
            Refused,
            "directories",
        ),
        (
            "exec",
            |r, _| r.exec = true,
            Linux,
            Refused,
            "further programs",
        ),
        ("a GPU", |r, _| r.gpu = true, Linux, Refused, "GPU"),
        (
            "a Linux kernel by name",
            |r, _| r.linux_kernel = Some("6.1".into()),
            Linux,
            Refused,
            "kernel",
        ),
        (
            "the user root",
            |r, _| r.user = "root".into(),
            Nanos,
            Runs,
            "nothing in it",
        ),
        (
            "the user 0:0",
            |r, _| r.user = "0:0".into(),
            Nanos,
            Runs,
            "nothing in it",
        ),
        (
            "another user",
            |r, _| r.user = "www-data".into(),
            Linux,
            Warned,
            "www-data",
        ),
        (
            "another stop signal",
            |r, _| r.stop_signal = Signal::INT,
            Linux,
            Warned,
            "SIGTERM",
        ),
        (
            "little memory",
            |r, _| r.memory = Bytes::mib(20),
            Linux,
            Refused,
            "memory",
        ),
        (
            "a missing program",
            |_, i| i.program.kind = ProgramKind::Missing,
            Linux,
            Refused,
            "has no",
        ),
        (
            "a script",
            |_, i| {
                i.program.kind = ProgramKind::Script {
                    words: vec!["/bin/sh".into()],
                }
            },
            Linux,
            Refused,
            "script",
        ),
        (
            "no executable",
            |_, i| {
                i.program.kind = ProgramKind::Other {
                    why: "is not a file".into(),
                }
            },
            Linux,
            Refused,
            "not a file",
        ),
        (
            "a 32-bit program",
            |_, i| i.program.architecture = Some(Architecture("386".into())),
            Linux,
            Refused,
            "386",
        ),
        (
            "a missing library",
            |_, i| i.program.missing = vec!["libz.so.1".into()],
            Linux,
            Refused,
            "libz",
        ),
        (
            "mounts",
            |_, i| i.program.whole_system = evidence("mount"),
            Linux,
            Warned,
            "mount",
        ),
        (
            "forks",
            |_, i| may(i, MayCreate::Yes, Confidence::Certain, "fork"),
            Linux,
            Warned,
            "fork",
        ),
        (
            "forks, safe to retry",
            |r, i| {
                r.retry_safe = true;
                may(i, MayCreate::Yes, Confidence::Likely, "fork");
            },
            Linux,
            Warned,
            "fork",
        ),
        (
            "cannot be seen",
            |_, i| {
                may(i, MayCreate::Yes, Confidence::Guess, "x");
                i.program.processes.evidence.clear();
            },
            Linux,
            Warned,
            "cannot be told",
        ),
        (
            "runs commands",
            |_, i| may(i, MayCreate::OnDemand, Confidence::Certain, "system"),
            Linux,
            Warned,
            "system",
        ),
        (
            "runs commands, safe to retry",
            |r, i| {
                r.retry_safe = true;
                may(i, MayCreate::OnDemand, Confidence::Certain, "system");
            },
            Nanos,
            Runs,
            "again on Linux",
        ),
        (
            "a library forks",
            |_, i| may(i, MayCreate::InLibraries, Confidence::Likely, "fork"),
            Linux,
            Warned,
            "library",
        ),
        (
            "a library forks, safe to retry",
            |r, i| {
                r.retry_safe = true;
                may(i, MayCreate::InLibraries, Confidence::Likely, "fork");
            },
            Nanos,
            Runs,
            "library",
        ),
        (
            "likely no processes",
            |_, i| i.program.processes.confidence = Confidence::Likely,
            Nanos,
            Runs,
            "likely",
        ),
        (
            "a guess",
            |_, i| i.program.processes.confidence = Confidence::Guess,
            Linux,
            Warned,
            "but",
        ),
        (
            "corrected",
            |_, i| {
                i.correction = Some(Correction {
                    seen: "it tried to make a process".into(),
                })
            },
            Linux,
            Warned,
            "tried",
        ),
        (
            "corrected, safe to retry",
            |r, i| {
                r.retry_safe = true;
                i.correction = Some(Correction {
                    seen: "it said \"ENOSYS\"".into(),
                });
            },
            Linux,
            Warned,
            "before",
        ),
    ];
    let host = host(works(), true, false, true);
    for (what, change, payload, by_name, word) in table {
        let (mut request, mut image) = (asked(Hypervisor::Auto), plain());
        change(&mut request, &mut image);
        let choice = choose(&request, Some(&image), &host).unwrap();
        assert_eq!(
            choice.backend.payload, *payload,
            "{what}: {:?}",
            choice.reasons
        );
        let said = choice.reasons.join("; ");
        assert!(said.contains(word), "{what}: {said}");
        request.hypervisor = Hypervisor::Nanovms;
        let named = match choose(&request, Some(&image), &host) {
            Err(error) => {
                assert!(!error.hint().is_empty(), "{what}");
                Refused
            }
            Ok(choice) if choice.reasons.iter().any(|it| it.starts_with("warning")) => Warned,
            Ok(_) => Runs,
        };
        assert_eq!(named, *by_name, "{what} by name");
    }
}

fn may(image: &mut ImageFacts, may_create: MayCreate, confidence: Confidence, what: &str) {
    image.program.processes = ProcessFacts {
        may_create,
        confidence,
        doubt: None,
        evidence: evidence(what),
    };
}

#[test]
fn without_a_nanos_kernel_auto_uses_linux_and_says_so_in_one_line() {
    let host = host(works(), true, true, false);
    let choice = choose(&asked(Hypervisor::Auto), Some(&plain()), &host).unwrap();
    assert_eq!(choice.backend.payload, Payload::Linux);
    let said = choice.reasons.iter().filter(|it| it.contains("Nanos"));
    assert_eq!(said.count(), 1, "{:?}", choice.reasons);
    let error = choose(&asked(Hypervisor::Nanovms), Some(&plain()), &host).unwrap_err();
    assert!(error.hint().contains("vistara kernel add nanos"), "{error}");
}

#[test]
fn a_refusal_of_nanovms_names_the_reason_and_the_other_way() {
    let mut request = asked(Hypervisor::Nanovms);
    request.tty = true;
    let host = host(works(), true, true, true);
    let error = choose(&request, Some(&plain()), &host).unwrap_err();
    assert!(error.to_string().contains("terminal"), "{error}");
    assert!(error.hint().contains("--hypervisor firecracker"), "{error}");
}

#[test]
fn an_image_that_nobody_has_looked_at_gets_a_linux_guest() {
    let host = host(works(), true, true, true);
    let choice = choose(&asked(Hypervisor::Auto), None, &host).unwrap();
    assert_eq!(choice.backend.payload, Payload::Linux);
    assert!(choose(&asked(Hypervisor::Nanovms), None, &host).is_err());
}

#[test]
fn a_broken_kvm_is_named_in_the_reasons() {
    let host = host(broken(), true, true, false);
    let choice = choose(&asked(Hypervisor::Auto), None, &host).unwrap();
    let named = choice.reasons.iter().any(|it| it.contains("guests hang"));
    assert!(named, "{:?}", choice.reasons);
}

#[test]
fn a_refusal_says_what_to_type_next() {
    let host = host(absent(), false, false, false);
    let error = choose(&asked(Hypervisor::Auto), None, &host).unwrap_err();
    assert!(error.hint().contains("apt-get install"), "{error}");
}

#[test]
fn a_named_volume_is_refused_where_the_program_gets_a_linux_guest() {
    let with_volume = |hypervisor| Request {
        named_volumes: true,
        ..asked(hypervisor)
    };
    let host = host(KvmVerdict::Works, true, true, true);
    for hypervisor in [Hypervisor::Qemu, Hypervisor::Firecracker] {
        let error = choose(&with_volume(hypervisor), Some(&plain()), &host).unwrap_err();
        assert!(error.hint().contains("-v /DIR"), "{error}");
    }
    let fits = choose(&with_volume(Hypervisor::Auto), Some(&plain()), &host).unwrap();
    assert_eq!(fits.backend.payload, Payload::Nanos);
    let terminal = Request {
        tty: true,
        ..with_volume(Hypervisor::Auto)
    };
    let error = choose(&terminal, Some(&plain()), &host).unwrap_err();
    assert!(error.to_string().contains("terminal"), "{error}");
}

/// What is different → whether `auto` tries it provisionally where the kernel tells of calls; a word that the reasons have.
#[test]
fn what_is_tried_provisionally_follows_the_table() {
    let table: &[(&str, Change, bool, &str)] = &[
        ("a plain program", |_, _| {}, false, "nothing in it"),
        (
            "forks",
            |_, i| may(i, MayCreate::Yes, Confidence::Certain, "fork"),
            true,
            "provisionally: it may make processes",
        ),
        (
            "commands",
            |_, i| may(i, MayCreate::OnDemand, Confidence::Certain, "system"),
            true,
            "provisionally: it runs shell commands",
        ),
        (
            "libraries",
            |_, i| may(i, MayCreate::InLibraries, Confidence::Likely, "fork"),
            true,
            "provisionally: a library",
        ),
        (
            "a guess",
            |_, i| i.program.processes.confidence = Confidence::Guess,
            true,
            "provisionally: nothing that makes",
        ),
        (
            "mounts",
            |_, i| i.program.whole_system = evidence("mount"),
            true,
            "mount in",
        ),
        (
            "forks, with a port",
            |r, i| {
                r.ports = true;
                may(i, MayCreate::Yes, Confidence::Certain, "fork");
            },
            false,
            "ports are published",
        ),
        (
            "a shell",
            |_, i| {
                i.program.runtimes = vec![Runtime::Shell];
                may(i, MayCreate::Yes, Confidence::Certain, "fork");
            },
            false,
            "it is a shell",
        ),
        (
            "forks, as another user",
            |r, i| {
                r.user = "www-data".into();
                may(i, MayCreate::Yes, Confidence::Certain, "fork");
            },
            false,
            "www-data",
        ),
        (
            "forks, with a terminal",
            |r, i| {
                r.tty = true;
                may(i, MayCreate::Yes, Confidence::Certain, "fork");
            },
            false,
            "terminal",
        ),
        (
            "forks, was tried",
            |_, i| {
                may(i, MayCreate::Yes, Confidence::Certain, "fork");
                let seen = "it used the network".to_owned();
                i.correction = Some(Correction { seen });
            },
            false,
            "used the network",
        ),
        (
            "forks, with host directories",
            |r, i| {
                r.host_directories = true;
                may(i, MayCreate::Yes, Confidence::Certain, "fork");
            },
            false,
            "directories",
        ),
    ];
    let mut telling = host(works(), true, false, true);
    telling.nanos_tells_calls = true;
    let (mut request, mut image) = (asked(Hypervisor::Auto), plain());
    request.named_volumes = true;
    may(&mut image, MayCreate::Yes, Confidence::Certain, "fork");
    let refused = choose(&request, Some(&image), &telling).unwrap_err();
    assert!(refused.to_string().contains("stays written"), "{refused}");
    // What is safe to retry is tried all the same: a second run helps only where the first one fails.
    let (mut request, mut image) = (asked(Hypervisor::Auto), plain());
    request.retry_safe = true;
    may(
        &mut image,
        MayCreate::InLibraries,
        Confidence::Certain,
        "fork",
    );
    let tried = choose(&request, Some(&image), &telling).unwrap();
    assert!(tried.provisional, "{tried:?}");
    // Nothing is tried that could not be run on Linux afterwards; what may be run twice is run as before.
    telling.linux_kernel = None;
    let risked = choose(&request, Some(&image), &telling).unwrap();
    assert_eq!(
        (risked.backend.payload, risked.provisional),
        (Payload::Nanos, false)
    );
    request.retry_safe = false;
    let linux = choose(&request, Some(&image), &telling).unwrap();
    assert_eq!(linux.backend.payload, Payload::Linux);
    let reasons = linux.reasons.join("\n");
    assert!(reasons.contains("no Linux guest kernel"), "{reasons}");
    for tells in [false, true] {
        let mut host = host(works(), true, false, true);
        host.nanos_tells_calls = tells;
        for (what, change, tried, word) in table {
            let (mut request, mut image) = (asked(Hypervisor::Auto), plain());
            change(&mut request, &mut image);
            let choice = choose(&request, Some(&image), &host).unwrap();
            assert_eq!(choice.provisional, *tried && tells, "{what}: {choice:?}");
            if *tried {
                let linux = choice.backend.payload == Payload::Linux;
                assert_eq!(linux, !tells, "{what}");
            }
            let reasons = choice.reasons.join("\n");
            assert!(!tells || reasons.contains(word), "{what}: {reasons}");
            request.hypervisor = Hypervisor::Nanovms;
            let by_name = choose(&request, Some(&image), &host);
            assert!(by_name.is_ok_and(|it| !it.provisional) || !tried, "{what}");
        }
    }
}

/// A server that can fork and is called so that it does not: its published ports are then no matter.
#[test]
fn a_server_that_is_known_to_stay_one_process_as_it_is_called_is_a_unikernel() {
    let nanos = host(absent(), true, false, true);
    let server = |words: &[&str]| Request {
        argv: words.iter().map(ToString::to_string).collect(),
        ports: true,
        ..asked(Hypervisor::Auto)
    };
    let mut facts = plain();
    facts.program.path = "/usr/bin/memcached".to_owned();
    facts.program.file = "/usr/bin/memcached".to_owned();
    facts.program.processes.may_create = MayCreate::Yes;
    facts.program.processes.evidence = evidence("fork");
    let alone = server(&["/usr/bin/memcached", "-u", "root"]);
    let choice = choose(&alone, Some(&facts), &nanos).unwrap();
    assert_eq!(choice.backend.payload, Payload::Nanos);
    assert!(!choice.provisional);
    let why = choice.reasons.join("\n");
    assert!(
        why.contains("fork in /usr/bin/p") && why.contains("background"),
        "{why}"
    );

    let master = server(&["memcached", "-d"]);
    let choice = choose(&master, Some(&facts), &nanos).unwrap();
    assert_eq!(choice.backend.payload, Payload::Linux);

    // What practice showed counts for more than what is known of the program.
    facts.correction = Some(Correction {
        seen: "it tried to make a process".to_owned(),
    });
    let choice = choose(&alone, Some(&facts), &nanos).unwrap();
    assert_eq!(choice.backend.payload, Payload::Linux);
}

#[test]
fn a_bound_on_the_network_takes_firecracker_and_nothing_stands_in_for_it() {
    let bounded = |hypervisor| Request {
        network_rate: true,
        ..asked(hypervisor)
    };
    let both = host(works(), true, true, false);
    let choice = choose(&bounded(Hypervisor::Auto), None, &both).unwrap();
    assert_eq!(choice.backend.vmm, VmmKind::Firecracker);
    let refused = choose(&bounded(Hypervisor::Qemu), None, &both).unwrap_err();
    assert!(refused.to_string().contains("no bound"), "{refused}");
    let without = host(works(), true, false, false);
    let refused = choose(&bounded(Hypervisor::Auto), None, &without).unwrap_err();
    assert!(refused.to_string().contains("no bound"), "{refused}");
    // What is installed need not be, and what is not does not come by leaving out a bound.
    assert!(!refused.hint().contains("install"), "{}", refused.hint());
    assert!(refused.hint().contains("--network-rate"));
    let mut neither = without;
    neither.qemu = None;
    for hypervisor in [Hypervisor::Auto, Hypervisor::Qemu] {
        let refused = choose(&bounded(hypervisor), None, &neither).unwrap_err();
        assert!(refused.hint().contains("leave out --network-rate"));
        let installs = refused.hint().contains("install qemu");
        assert_eq!(installs, hypervisor == Hypervisor::Qemu);
    }
}
