//! Whether a request fits a unikernel: the rules.
//!
//! A rule speaks about the request or about the program, and is one of two kinds. *Impossible*: a unikernel cannot do it,
//! whoever asks. *Doubtful*: it may go wrong; `auto` then takes Linux, and who asked for `nanovms` is warned. Where the only
//! doubt is whether the program makes processes, `auto` may try it provisionally ([`crate::ProvisionalRun`]).

use super::{Request, known};
use vistara_model::{
    Architecture, Confidence, HostFacts, ImageFacts, MayCreate, Payload, ProgramFacts, ProgramKind,
    Runtime, Signal,
};

/// Of what speaks against a program, so much is said.
const SHOWN_MAX: usize = 3;

/// Why a unikernel cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct No {
    pub(super) reason: String,
    pub(super) hint: &'static str,
}

const LINUX: &str = "use --hypervisor firecracker, or leave --hypervisor out";

/// What the rules found.
#[derive(Debug, Default)]
struct Findings {
    impossible: Vec<No>,
    doubtful: Vec<String>,
    /// What speaks for it.
    fitting: Vec<String>,
    /// The doubts about processes, where a provisional run would settle them.
    to_be_seen: Vec<String>,
    /// What speaks for it in spite of a doubt about processes, where the task may be run twice: one for each such doubt.
    retryable: Vec<String>,
}

/// Why a unikernel fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fit {
    pub(super) why: Vec<String>,
    pub(super) provisional: bool,
}

impl Findings {
    fn never(&mut self, reason: impl Into<String>) {
        self.never_but(reason, LINUX);
    }

    fn never_but(&mut self, reason: impl Into<String>, hint: &'static str) {
        let reason = reason.into();
        self.impossible.push(No { reason, hint });
    }

    fn doubt(&mut self, reason: impl Into<String>) {
        self.doubtful.push(reason.into());
    }

    /// A doubt that goes away when the program is tried.
    fn try_it(&mut self, reason: impl Into<String>) {
        self.to_be_seen.push(reason.into());
    }

    /// Whether a second run settles all the doubts that a provisional run would.
    fn may_be_run_twice(&self) -> bool {
        self.retryable.len() == self.to_be_seen.len()
    }
}

/// For `auto`: the reasons why a unikernel fits, or all those why it does not.
pub(super) fn fits(
    request: &Request,
    image: Option<&ImageFacts>,
    host: &HostFacts,
) -> Result<Fit, Vec<String>> {
    let Some(kernel) = &host.nanos_kernel else {
        return Err(vec![
            "it runs any image, and there is no Nanos kernel on this node to choose".to_owned(),
        ]);
    };
    let findings = judge(request, image);
    let twice = findings.may_be_run_twice();
    let Findings {
        impossible,
        doubtful,
        fitting,
        to_be_seen,
        retryable,
    } = findings;
    let there = format!("a Nanos kernel is on this node ({kernel})");
    let clean = impossible.is_empty() && doubtful.is_empty();
    if clean && to_be_seen.is_empty() {
        return Ok(Fit {
            why: [fitting, vec![there]].concat(),
            provisional: false,
        });
    }
    let why_not = match clean {
        true => not_tried(request, image, host),
        false => None,
    };
    if clean && why_not.is_none() {
        let seen = to_be_seen.join("; ");
        let why = vec![
            format!("Nanos unikernel, provisionally: {seen}"),
            "nothing of the run is shown until it has ended without needing more than a unikernel has; else it never was, and it is run on Linux".to_owned(),
            there,
        ];
        return Ok(Fit {
            why,
            provisional: true,
        });
    }
    if clean && twice {
        // The lesser protection, where the better one cannot be had.
        return Ok(Fit {
            why: [fitting, retryable, vec![there]].concat(),
            provisional: false,
        });
    }
    Err(impossible
        .into_iter()
        .map(|no| no.reason)
        .chain(doubtful)
        .chain(to_be_seen)
        .chain(why_not)
        .collect())
}

/// Why a program that could be tried is not: what the run would do could be seen, or nothing would tell whether it went well.
fn not_tried(request: &Request, image: Option<&ImageFacts>, host: &HostFacts) -> Option<String> {
    let shell = image.is_some_and(|image| image.program.runtimes.contains(&Runtime::Shell));
    if request.ports {
        Some(
            "its ports are published, and what a server did for others cannot be undone".to_owned(),
        )
    } else if request.named_volumes {
        Some("a volume is mounted, and what is written to it stays written".to_owned())
    } else if shell {
        Some("it is a shell, and running commands is what it is for".to_owned())
    } else if !host.nanos_tells_calls {
        Some("it would be tried with a Nanos kernel that has its modules: vistara kernel add nanos FILE --klibs DIR".to_owned())
    } else if host.linux_kernel.is_none() {
        Some(
            "it could not be run on Linux afterwards: there is no Linux guest kernel on this node"
                .to_owned(),
        )
    } else {
        super::monitor(Payload::Linux, request, host, &mut Vec::new())
            .err()
            .map(|why| format!("it could not be run on Linux afterwards: {why}"))
    }
}

/// For `nanovms`: the warnings, or the first reason why it cannot be.
pub(super) fn asked_for(
    request: &Request,
    image: Option<&ImageFacts>,
    host: &HostFacts,
) -> Result<Vec<String>, No> {
    if host.nanos_kernel.is_none() {
        return Err(No {
            reason: "there is no Nanos kernel on this node".to_owned(),
            hint: "vistara kernel add nanos FILE, or leave --hypervisor out to run it in a Linux guest",
        });
    }
    if image.is_none() {
        return Err(No {
            reason: "the image has not been looked at".to_owned(),
            hint: LINUX,
        });
    }
    let findings = judge(request, image);
    let to_be_seen = match findings.may_be_run_twice() {
        true => Vec::new(),
        false => findings.to_be_seen,
    };
    match findings.impossible.into_iter().next() {
        Some(no) => Err(no),
        None => Ok(findings
            .doubtful
            .into_iter()
            .chain(to_be_seen)
            .map(|doubt| format!("warning: {doubt}"))
            .collect()),
    }
}

fn judge(request: &Request, image: Option<&ImageFacts>) -> Findings {
    let mut findings = Findings::default();
    wishes(request, &mut findings);
    match image {
        Some(image) => {
            program(&image.program, &mut findings);
            processes(request, image, &mut findings);
        }
        None => findings.doubt("the image has not been looked at"),
    }
    findings
}

/// What the request wants.
fn wishes(request: &Request, findings: &mut Findings) {
    let impossible = [
        (
            request.tty,
            "a terminal was asked for, and a unikernel has none",
        ),
        (
            request.stdin,
            "standard input was asked for, and a unikernel's is at its end from the start",
        ),
        (
            request.exec,
            "further programs are to run in the machine, and a unikernel runs one",
        ),
        (
            request.host_directories,
            "directories of this host were asked for, and a unikernel cannot share them",
        ),
        (request.gpu, "a GPU was asked for"),
    ];
    for (wanted, reason) in impossible {
        if wanted {
            findings.never(reason);
        }
    }
    if let Some(kernel) = &request.linux_kernel {
        findings.never(format!("the Linux kernel {kernel:?} was asked for"));
    }
    if let Some(floor) = request.unikernel_memory_min
        && request.memory < floor
    {
        findings.never_but(
            format!(
                "a unikernel of this program needs {floor} of memory, more than {}",
                request.memory
            ),
            "raise --memory, or leave --hypervisor out",
        );
    }
    if !is_root(&request.user) {
        findings.doubt(format!(
            "it is to run as the user {:?}, and in a unikernel all is root",
            request.user
        ));
    }
    if request.stop_signal != Signal::TERM {
        findings.doubt(format!(
            "it is to be stopped by {}, and a unikernel is told by SIGTERM only",
            request.stop_signal
        ));
    }
}

/// Whether this user, in the OCI form, is root. A group beside it changes nothing in a unikernel.
fn is_root(user: &str) -> bool {
    matches!(user.split(':').next(), None | Some("" | "root" | "0"))
}

/// What the program is.
fn program(facts: &ProgramFacts, findings: &mut Findings) {
    match &facts.kind {
        ProgramKind::Elf => {}
        ProgramKind::Script { words } => findings.never(format!(
            "{} is a script for {}, and a unikernel runs one executable, not an interpreter with it",
            facts.path,
            words.join(" ")
        )),
        ProgramKind::Missing => findings.never(format!("the image has no {:?}", facts.path)),
        ProgramKind::Other { why } => findings.never(format!("{} {why}", facts.path)),
    }
    if facts.kind != ProgramKind::Elf {
        return;
    }
    if let Some(architecture) = &facts.architecture
        && *architecture != Architecture("amd64".to_owned())
        && *architecture != Architecture("arm64".to_owned())
    {
        findings.never(format!(
            "{} is made for {architecture}, and Nanos runs programs of 64 bits for amd64 and arm64",
            facts.path
        ));
    }
    if !facts.missing.is_empty() {
        findings.never(format!(
            "{} needs {}, which the image does not have",
            facts.path,
            list(&facts.missing)
        ));
    }
    if !facts.whole_system.is_empty() {
        findings.try_it(format!(
            "it uses what only a whole Linux system has: {}",
            list(&facts.whole_system)
        ));
    }
}

/// Whether it makes processes.
fn processes(request: &Request, image: &ImageFacts, findings: &mut Findings) {
    let facts = &image.program;
    if facts.kind != ProgramKind::Elf {
        return;
    }
    if let Some(correction) = &image.correction {
        findings.doubt(format!(
            "it was tried as a unikernel before, and {}",
            correction.seen
        ));
        return;
    }
    let processes = &facts.processes;
    let seen = list(&processes.evidence);
    let about = match (facts.linkage, &facts.runtimes[..]) {
        (Some(linkage), []) => format!("one {linkage} program"),
        (Some(linkage), runtimes) => format!("one {linkage} program ({})", list(runtimes)),
        (None, _) => "one program".to_owned(),
    };
    if processes.may_create != MayCreate::No
        && let Some(why) = known::makes_none(facts, request.argv.get(1..).unwrap_or_default())
    {
        let seen = match processes.evidence.is_empty() {
            true => String::new(),
            false => format!(" ({seen})"),
        };
        findings.fitting.push(format!(
            "Nanos unikernel: {about}; it could make processes{seen}, but {why}"
        ));
        return;
    }
    match processes.may_create {
        MayCreate::Yes if processes.evidence.is_empty() => findings.try_it(format!(
            "whether it makes processes cannot be told: {}",
            processes.doubt.as_deref().unwrap_or("it cannot be seen")
        )),
        MayCreate::Yes => findings.try_it(format!(
            "it may make processes, which a unikernel cannot: {seen} ({})",
            processes.confidence
        )),
        MayCreate::OnDemand | MayCreate::InLibraries => {
            let what = if processes.may_create == MayCreate::OnDemand {
                format!("it runs shell commands if it is told to: {seen}")
            } else {
                format!("a library that it loads may make processes: {seen}")
            };
            if request.retry_safe {
                findings.retryable.push(format!(
                    "Nanos unikernel: {about}; {what}, but it may be run again on Linux if it does"
                ));
            }
            findings.try_it(what);
        }
        MayCreate::No if processes.confidence >= Confidence::Likely => {
            findings.fitting.push(format!(
                "Nanos unikernel: {about}, and nothing in it or its {} libraries makes processes ({})",
                facts.libraries.len(),
                processes.confidence
            ));
        }
        MayCreate::No => findings.try_it(format!(
            "nothing that makes processes was found in it, but {}",
            processes.doubt.as_deref().unwrap_or("that is a guess")
        )),
    }
}

fn list(items: &[impl std::fmt::Display]) -> String {
    let shown: Vec<String> = items
        .iter()
        .take(SHOWN_MAX)
        .map(ToString::to_string)
        .collect();
    let more = items.len().saturating_sub(SHOWN_MAX);
    let shown = shown.join(", ");
    if more == 0 {
        shown
    } else {
        format!("{shown} and {more} more")
    }
}
