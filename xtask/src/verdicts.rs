//! Whether `auto` is right about unikernels: real programs out of Debian's packages, what `vistara explain` says of each,
//! and what became of it when it really ran under Nanos. What `auto` would only try provisionally is run with `auto`, too.
//! Writes the table to `docs/unikernels.md`.
//!
//! All run with the network and the memory that nobody asked for, from one image, one after the other, on a node of their
//! own; a command must do what it is there for (`verdicts_cases`), not merely end.

use crate::verdicts_cases::{CASES, Case, Check, FILES, HOST, PACKAGES};
use crate::{demo_image, tests};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const IMAGE: &str = "local/verdicts:1";
/// Where the table stands in the document: between these lines.
const BEGIN: &str = "<!-- begin: cargo xtask verdicts -->";
const END: &str = "<!-- end: cargo xtask verdicts -->";
/// Where a Nanos kernel is looked for, unless the variable says otherwise; as the tests do.
const KERNEL_VARIABLE: &str = "VISTARA_NANOS_KERNEL";
const KERNEL: &str = "/opt/vistara/nanos/kernel.img";
/// Longest that one program may take: the slowest takes some seconds where processors are emulated.
const BOUND_S: u64 = 60;
/// Pause between two looks at whether a server answers.
const PAUSE: Duration = Duration::from_millis(300);
/// How the guest reaches the host.
const GATEWAY: &str = "10.0.2.2";
/// Evidence that is shown of one program.
const EVIDENCE_MAX: usize = 2;
/// Longest account of a failure.
const FAILURE_MAX: usize = 90;

/// What was found of one program.
struct Row {
    argv: Vec<String>,
    verdict: String,
    /// What `auto` says of it when it may be run again.
    retry_safe: String,
    statement: String,
    evidence: String,
    /// Nothing where it did its work.
    failure: Option<String>,
    /// What became of it with `auto`, where that tries it provisionally.
    tried: Option<Tried>,
}

/// A provisional run, and what came after it.
struct Tried {
    /// What it ran on in the end.
    payload: String,
    /// Why it was undone, where it was.
    undone: Option<String>,
    /// Nothing where it did its work in the end.
    failure: Option<String>,
    took: Duration,
}

/// What a verdict was worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judgement {
    /// A unikernel did the work, or none could.
    Right,
    /// None could: it was tried, undone, and done on Linux. That costs a start, once.
    Undone,
    /// Linux did what a unikernel could have done.
    Slower,
    /// The work was lost.
    Wrong,
}

impl Judgement {
    fn of(verdict: &str, failure: Option<&String>, tried: Option<&Tried>) -> Judgement {
        match (verdict, failure, tried) {
            (_, _, Some(tried)) if tried.failure.is_some() => Judgement::Wrong,
            (_, None, Some(tried)) if tried.payload != "nanos" => Judgement::Slower,
            (_, Some(_), Some(tried)) if tried.payload != "nanos" => Judgement::Undone,
            (_, _, Some(_)) | ("nanos", None, None) | ("linux", Some(_), None) => Judgement::Right,
            ("linux", None, None) => Judgement::Slower,
            _ => Judgement::Wrong,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Judgement::Right => "right",
            Judgement::Undone => "undone",
            Judgement::Slower => "slower",
            Judgement::Wrong => "**WRONG**",
        }
    }
}

impl Row {
    fn judgement(&self) -> Judgement {
        Judgement::of(&self.verdict, self.failure.as_ref(), self.tried.as_ref())
    }

    /// As it would be for a task that is safe to retry. A program that fails as a unikernel and is not tried provisionally
    /// counts as lost: it is run again only where its failure can be seen, and that has not been run here.
    fn judgement_if_safe(&self) -> Judgement {
        match (self.retry_safe.as_str(), &self.failure) {
            ("nanos, tried", _) => self.judgement(),
            (verdict, failure) => Judgement::of(verdict, failure.as_ref(), None),
        }
    }
}

/// A node of our own, ended with this.
struct Node {
    program: PathBuf,
    state: tempfile::TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        // Whatever else went wrong says more.
        let _ = self.command(&["node", "stop"]).output();
    }
}

impl Node {
    fn start(root: &Path) -> Result<Node> {
        let built = crate::lint::cargo(root, &["build", "--quiet", "--package", "vistara"])
            .status()
            .context("build vistara")?;
        ensure!(built.success(), "vistara does not build");
        let state = tempfile::Builder::new()
            .prefix("vistara-verdicts-")
            .tempdir()
            .context("make a state directory")?;
        if let Some(kernels) = tests::kernel_store(root) {
            std::os::unix::fs::symlink(kernels, state.path().join("kernels"))
                .context("link the kernels")?;
        }
        // A copy: the program may be built again while it runs.
        let program = state.path().join("vistara");
        fs::copy(root.join("target/debug/vistara"), &program).context("copy vistara")?;
        let node = Node { program, state };
        let kernel = std::env::var_os(KERNEL_VARIABLE).map_or_else(|| KERNEL.into(), PathBuf::from);
        ensure!(
            kernel.exists(),
            "there is no Nanos kernel at {kernel:?}; name one with {KERNEL_VARIABLE}"
        );
        let kernel = kernel.to_str().context("the kernel's path is not UTF-8")?;
        let modules = Path::new(kernel).with_file_name("klibs");
        ensure!(
            modules.is_dir(),
            "there are no modules of the kernel at {modules:?}"
        );
        let modules = modules.to_str().context("the path is not UTF-8")?;
        node.done(&["kernel", "add", "nanos", kernel, "--klibs", modules])?;
        Ok(node)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env("VISTARA_STATE_DIR", self.state.path())
            .env_remove("VISTARA_SOCKET")
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        self.command(arguments).output().context("run vistara")
    }

    fn done(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments)?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "vistara {arguments:?}: {told}");
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn explain(&self, options: &[&str], argv: &[&str]) -> Result<Value> {
        let arguments = [&["explain", "--json"], options, &[IMAGE], argv].concat();
        serde_json::from_str(&self.done(&arguments)?).context("read what explain says")
    }
}

/// Makes the image, runs everything, writes the table.
pub(crate) fn run(root: &Path) -> Result<()> {
    let archive = image(&root.join("target/verdicts"))?;
    let node = Node::start(root)?;
    let archive = archive.to_str().context("the path is not UTF-8")?;
    node.done(&["images", "import", archive, "--name", IMAGE])?;
    let host = serve()?;
    let mut rows = Vec::new();
    for case in CASES {
        let row = look(&node, case, host)?;
        let truth = row.failure.as_deref().unwrap_or("ran");
        eprintln!(
            "{:10} auto: {:12} {} — {truth}; {}",
            row.judgement().name(),
            row.verdict,
            row.argv.join(" "),
            row.tried.as_ref().map_or_else(String::new, Tried::shown),
        );
        rows.push(row);
    }
    let kernel = node.done(&["kernel", "ls"])?;
    let kernel = kernel.lines().find(|line| line.contains(" nanos "));
    let kernel = kernel.and_then(|line| line.split_whitespace().next());
    let document = root.join("docs/unikernels.md");
    let text = fs::read_to_string(&document).with_context(|| format!("read {document:?}"))?;
    let text = replaced(&text, &table(&rows, kernel.unwrap_or("unknown")))?;
    fs::write(&document, text).with_context(|| format!("write {document:?}"))?;
    let wrong = |row: &&Row| row.judgement() == Judgement::Wrong;
    let wrong: Vec<&Row> = rows.iter().filter(wrong).collect();
    ensure!(wrong.is_empty(), "{} verdicts are wrong", wrong.len());
    Ok(())
}

fn image(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("make {dir:?}"))?;
    let mut script = "set -e; cd \"$1\"".to_owned();
    for (path, content) in FILES {
        let content = content.replace('%', "%%").replace('\'', "\\047");
        script.push_str(&format!(
            "; mkdir -p .$(dirname {path}); printf -- '{content}' > .{path}"
        ));
    }
    script.push_str(
        "; chroot \"$1\" sh -c 'git init -q /srv/repo && cd /srv/repo && git -c user.name=n -c user.email=e@x commit -q --allow-empty -m first'",
    );
    demo_image::root_tar(dir, "verdicts.tar", &PACKAGES.join(","), &script)
}

/// Serves a line to whoever asks, until the process ends. Gives the port.
fn serve() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
    let port = listener.local_addr().context("listen")?.port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            // A client that has gone away needs no answer.
            let _ = stream.read(&mut request);
            let _ = stream
                .write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 18\r\n\r\nserved by the host");
        }
    });
    Ok(port)
}

fn look(node: &Node, case: &Case, host: u16) -> Result<Row> {
    let address = format!("http://{GATEWAY}:{host}/");
    let argv: Vec<&str> = (case.argv.iter())
        .map(|word| if *word == HOST { &address } else { *word })
        .collect();
    // A server is run with its port, and asked about with it.
    let published = match case.check {
        Check::Answers(port, ..) => vec!["-p".to_owned(), port.to_string()],
        Check::Ends(..) => Vec::new(),
    };
    let published: Vec<&str> = published.iter().map(String::as_str).collect();
    let explained = node.explain(&published, &argv)?;
    let retry_safe = node.explain(&[&["--retry-safe"], &published[..]].concat(), &argv)?;
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let program = &explained["program"];
    let kind = text(&program["kind"]);
    ensure!(
        kind == "elf",
        "{argv:?}: the image has no such program ({kind})"
    );
    let evidence: Vec<String> = program["evidence"]
        .as_array()
        .into_iter()
        .flatten()
        .take(EVIDENCE_MAX)
        .map(text)
        .collect();
    let verdict = |explained: &Value| {
        let reasons = explained["choice"]["reasons"].to_string();
        match reasons.contains("provisionally") {
            true => "nanos, tried".to_owned(),
            false => text(&explained["choice"]["payload"]),
        }
    };
    let tried = match case.check {
        Check::Ends(code, words) if verdict(&explained) == "nanos, tried" => {
            Some(try_it(node, &argv, code, words)?)
        }
        Check::Ends(..) | Check::Answers(..) => None,
    };
    let failure = match case.check {
        Check::Ends(code, words) => ends(node, &argv, code, words)?,
        Check::Answers(port, request, words) => answers(node, &argv, port, request, words)?,
    };
    Ok(Row {
        argv: case.argv.iter().map(|word| (*word).to_owned()).collect(),
        verdict: verdict(&explained),
        retry_safe: verdict(&retry_safe),
        statement: format!(
            "{}, {}",
            text(&program["may_create"]).replace('_', " "),
            text(&program["confidence"])
        ),
        evidence: evidence.join(", "),
        failure,
        tried,
    })
}

/// Runs a command as `auto` would.
fn try_it(node: &Node, argv: &[&str], code: i32, words: &str) -> Result<Tried> {
    const NAME: &str = "tried";
    let begin = Instant::now();
    let bound = format!("{}s", 2 * BOUND_S);
    let options = ["run", "-q", "--name", NAME, "--timeout", &bound, IMAGE];
    let output = node.run(&[&options, argv].concat())?;
    let took = begin.elapsed();
    let inspected: Value =
        serde_json::from_str(&node.done(&["inspect", NAME])?).context("read what inspect says")?;
    node.done(&["rm", NAME])?;
    let choice = &inspected[0]["choice"];
    let reasons = choice["reasons"].as_array().into_iter().flatten();
    let undone = reasons.filter_map(Value::as_str).find_map(|reason| {
        let (_, rest) = reason.split_once("undone before anything of it was shown (")?;
        Some(
            rest.split_once("), and it")
                .map_or(rest, |(why, _)| why)
                .to_owned(),
        )
    });
    Ok(Tried {
        payload: choice["payload"].as_str().unwrap_or("?").to_owned(),
        undone,
        failure: failure(argv, &output, code, words)?,
        took,
    })
}

impl Tried {
    fn shown(&self) -> String {
        let seconds = self.took.as_secs_f64();
        match (&self.failure, &self.undone) {
            (Some(failure), _) => format!("**{failure}** on {}", self.payload),
            (None, Some(why)) => {
                format!("undone: {why}; done on {} in {seconds:.1} s", self.payload)
            }
            (None, None) => format!("done on {} in {seconds:.1} s", self.payload),
        }
    }
}

/// What a program printed, on one line and not too much of it.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let last = text.lines().rev().find(|line| {
        let own = line.starts_with("vistara:");
        !own && !line.trim().is_empty()
    });
    let plain = |c: &char| !c.is_control() && *c != '|';
    last.unwrap_or_default()
        .chars()
        .filter(plain)
        .take(FAILURE_MAX)
        .collect()
}

fn ends(node: &Node, argv: &[&str], code: i32, words: &str) -> Result<Option<String>> {
    let bound = format!("{BOUND_S}s");
    let options = [
        "run",
        "--rm",
        "-q",
        "--hypervisor",
        "nanovms",
        "--timeout",
        &bound,
        IMAGE,
    ];
    failure(argv, &node.run(&[&options, argv].concat())?, code, words)
}

/// What is wrong with this end.
fn failure(argv: &[&str], output: &Output, code: i32, words: &str) -> Result<Option<String>> {
    let all = [&output.stdout[..], &output.stderr].concat();
    let found = output.status.code();
    let has_words = String::from_utf8_lossy(&all).contains(words);
    Ok(match found {
        Some(found) if found == code && has_words => None,
        Some(found) if found == code => Some(format!("without its output: {}", shown(&all))),
        Some(124) => Some(format!("hung: {}", shown(&all))),
        Some(found) => Some(format!("exit {found}: {}", shown(&all))),
        None => bail!("{argv:?}: vistara itself was ended by a signal"),
    })
}

fn answers(
    node: &Node,
    argv: &[&str],
    port: u16,
    request: &str,
    words: &str,
) -> Result<Option<String>> {
    let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    let outside = probe.local_addr().context("find a free port")?.port();
    drop(probe);
    let published = format!("{outside}:{port}");
    let options = [
        "run",
        "-d",
        "-q",
        "--hypervisor",
        "nanovms",
        "-p",
        &published,
        IMAGE,
    ];
    let machine = node.done(&[&options, argv].concat())?;
    // Text of a protocol, byte by byte: all of it is below 256.
    let bytes = |text: &str| -> Vec<u8> { text.chars().map(|c| c as u32 as u8).collect() };
    let (request, words) = (bytes(request), bytes(words));
    let deadline = Instant::now() + Duration::from_secs(BOUND_S);
    let failure = loop {
        if ask(outside, &request, &words).is_ok_and(|answered| answered) {
            break None;
        }
        let inspected: Value = serde_json::from_str(&node.done(&["inspect", &machine])?)
            .context("read what inspect says")?;
        if inspected[0]["state"] == "ended" {
            let said = node.run(&["logs", &machine])?;
            let said = shown(&[said.stdout, said.stderr].concat());
            break Some(format!("exit {}: {said}", inspected[0]["exit_code"]));
        }
        if Instant::now() > deadline {
            let said = node.run(&["logs", &machine])?;
            break Some(format!(
                "did not answer: {}",
                shown(&[said.stdout, said.stderr].concat())
            ));
        }
        std::thread::sleep(PAUSE);
    };
    node.done(&["rm", "-f", &machine])?;
    Ok(failure)
}

/// Whether a server answers with these words.
fn ask(port: u16, request: &[u8], words: &[u8]) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.write_all(request)?;
    let mut answer = Vec::new();
    let mut piece = [0; 16 << 10];
    loop {
        if answer.windows(words.len()).any(|part| part == words) {
            return Ok(true);
        }
        match stream.read(&mut piece)? {
            0 => return Ok(false),
            count => answer.extend_from_slice(&piece[..count]),
        }
    }
}

fn table(rows: &[Row], kernel: &str) -> String {
    let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    let mut text = format!(
        "Kernel {kernel}, {} programs, one image.\n\n| command | `auto` | if safe to retry | may make processes | evidence | truth under Nanos | with `auto` | judgement |\n|---|---|---|---|---|---|---|---|\n",
        rows.len()
    );
    let (mut counts, mut retried) = (Vec::new(), Vec::new());
    for row in rows {
        counts.push(row.judgement());
        retried.push(row.judgement_if_safe());
        let words: Vec<String> = row
            .argv
            .iter()
            .map(|word| match word.contains([' ', '`']) || word.is_empty() {
                true => format!("'{word}'"),
                false => word.clone(),
            })
            .collect();
        text.push_str(&format!(
            "| `` {} `` | {} | {} | {} | {} | {} | {} | {} |\n",
            cell(&words.join(" ")),
            row.verdict,
            row.retry_safe,
            row.statement,
            cell(&row.evidence),
            cell(row.failure.as_deref().unwrap_or("ran")),
            cell(&row.tried.as_ref().map_or_else(String::new, Tried::shown)),
            row.judgement().name(),
        ));
    }
    let sums = |all: &[Judgement]| {
        let count = |wanted| all.iter().filter(|found| **found == wanted).count();
        let names = [
            Judgement::Right,
            Judgement::Undone,
            Judgement::Slower,
            Judgement::Wrong,
        ];
        let sums = names.map(|it| {
            format!(
                "{} {}",
                count(it),
                it.name().trim_matches('*').to_lowercase()
            )
        });
        sums.join(", ")
    };
    text.push_str(&format!(
        "\nIn sum: {}. Marked safe to retry: {}.\n",
        sums(&counts),
        sums(&retried)
    ));
    text
}

/// The document with another table.
fn replaced(document: &str, table: &str) -> Result<String> {
    let parts = document.split_once(BEGIN).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(END)?;
        Some((before, after))
    });
    let (before, after) = parts.context("docs/unikernels.md has no place for the table")?;
    Ok(format!("{before}{BEGIN}\n{table}{END}{after}"))
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_verdict_is_wrong_only_where_work_is_lost() {
        let failed = Some("exit 1".to_owned());
        let judge =
            |verdict, failure: &Option<String>| Judgement::of(verdict, failure.as_ref(), None);
        assert_eq!(judge("nanos", &None), Judgement::Right);
        assert_eq!(judge("linux", &failed), Judgement::Right);
        assert_eq!(judge("linux", &None), Judgement::Slower);
        assert_eq!(judge("nanos", &failed), Judgement::Wrong);
        let tried = |payload: &str, failure: &Option<String>, after: &Option<String>| {
            let tried = Tried {
                payload: payload.to_owned(),
                undone: None,
                failure: after.clone(),
                took: Duration::ZERO,
            };
            Judgement::of("nanos, tried", failure.as_ref(), Some(&tried))
        };
        assert_eq!(tried("nanos", &None, &None), Judgement::Right);
        assert_eq!(tried("linux", &failed, &None), Judgement::Undone);
        assert_eq!(tried("linux", &None, &None), Judgement::Slower);
        assert_eq!(tried("linux", &failed, &failed), Judgement::Wrong);
        assert_eq!(tried("nanos", &failed, &failed), Judgement::Wrong);
    }

    #[test]
    fn the_table_comes_between_its_lines_and_nothing_else_changes() {
        let document = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = replaced(&document, "new\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\nnew\n{END}\nb\n"));
        assert!(replaced("nothing", "new").is_err());
    }
}
