//! Whether `auto` is right about unikernels: real programs out of Debian's packages, what `vistara explain` says of each,
//! and what became of it when it really ran under Nanos. Writes the table to `docs/unikernels.md`.
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
}

impl Row {
    fn judgement(verdict: &str, failure: Option<&String>) -> &'static str {
        match (verdict, failure) {
            ("nanos", None) | ("linux", Some(_)) => "right",
            ("linux", None) => "slower",
            _ => "**WRONG**",
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
        node.done(&["kernel", "add", "nanos", kernel])?;
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
        let judgement = Row::judgement(&row.verdict, row.failure.as_ref());
        eprintln!(
            "{judgement:10} auto: {:6} {} — {truth}",
            row.verdict,
            row.argv.join(" ")
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
    let wrong = |row: &&Row| row.verdict == "nanos" && row.failure.is_some();
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
    let explained = node.explain(&[], &argv)?;
    let retry_safe = node.explain(&["--retry-safe"], &argv)?;
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
    let failure = match case.check {
        Check::Ends(code, words) => ends(node, &argv, code, words)?,
        Check::Answers(port, request, words) => answers(node, &argv, port, request, words)?,
    };
    Ok(Row {
        argv: case.argv.iter().map(|word| (*word).to_owned()).collect(),
        verdict: text(&explained["choice"]["payload"]),
        retry_safe: text(&retry_safe["choice"]["payload"]),
        statement: format!(
            "{}, {}",
            text(&program["may_create"]).replace('_', " "),
            text(&program["confidence"])
        ),
        evidence: evidence.join(", "),
        failure,
    })
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
    let output = node.run(&[&options, argv].concat())?;
    let all = [output.stdout, output.stderr].concat();
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
        "Kernel {kernel}, {} programs, one image.\n\n| command | `auto` | if safe to retry | may make processes | evidence | truth under Nanos | judgement |\n|---|---|---|---|---|---|---|\n",
        rows.len()
    );
    let (mut counts, mut retried) = (Vec::new(), Vec::new());
    for row in rows {
        let judgement = Row::judgement(&row.verdict, row.failure.as_ref());
        counts.push(judgement);
        retried.push(Row::judgement(&row.retry_safe, row.failure.as_ref()));
        let words: Vec<String> = row
            .argv
            .iter()
            .map(|word| match word.contains([' ', '`']) || word.is_empty() {
                true => format!("'{word}'"),
                false => word.clone(),
            })
            .collect();
        text.push_str(&format!(
            "| `` {} `` | {} | {} | {} | {} | {} | {judgement} |\n",
            cell(&words.join(" ")),
            row.verdict,
            row.retry_safe,
            row.statement,
            cell(&row.evidence),
            cell(row.failure.as_deref().unwrap_or("ran")),
        ));
    }
    let sums = |all: &[&str]| {
        let count = |wanted: &str| all.iter().filter(|found| **found == wanted).count();
        format!(
            "{} right, {} slower, {} wrong",
            count("right"),
            count("slower"),
            count("**WRONG**")
        )
    };
    text.push_str(&format!(
        "\nIn sum: {}. Marked safe to retry: {}",
        sums(&counts),
        sums(&retried)
    ));
    text.push_str(" (a wrong one is then run again on Linux).\n");
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
        let judge = |verdict, failure: &Option<String>| Row::judgement(verdict, failure.as_ref());
        assert_eq!(judge("nanos", &None), "right");
        assert_eq!(judge("linux", &failed), "right");
        assert_eq!(judge("linux", &None), "slower");
        assert_eq!(judge("nanos", &failed), "**WRONG**");
    }

    #[test]
    fn the_table_comes_between_its_lines_and_nothing_else_changes() {
        let document = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = replaced(&document, "new\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\nnew\n{END}\nb\n"));
        assert!(replaced("nothing", "new").is_err());
    }
}
