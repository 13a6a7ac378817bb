//! Finding the node, and starting one in the background where none runs.
//!
//! Two command lines may start nodes at once: a node holds a lock on its state directory, and one that does not get it
//! leaves with code 0; here one simply goes on trying to connect.

use crate::failure::{Failure, eprint_line};
use crate::places::Places;
use std::io::ErrorKind;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use vistara_api::Client;

/// How long a node that was started in the background stays without work.
const IDLE_EXIT: &str = "60s";
/// How long a new node has to answer: it asks its programs for their versions, probes KVM and reads its records first. Some
/// milliseconds; much more for the first one on a busy host.
const START_TIME_MAX: Duration = Duration::from_secs(60);
/// How long to wait for the other one after a node left because another holds the lock.
const LOCK_TIME_MAX: Duration = Duration::from_secs(3);
/// Time between tries to connect: a node takes some milliseconds, and a try some microseconds.
const RETRY_EVERY: Duration = Duration::from_millis(1);
/// Size at which the log of background nodes is put aside (one older is kept).
const LOG_BYTES_MAX: u64 = 4 << 20;
/// How much of a log's end is shown after a failure.
const LOG_TAIL_BYTES: u64 = 2048;

/// Whether a node answers.
async fn answers(places: &Places) -> Result<bool, Failure> {
    match UnixStream::connect(&places.socket).await {
        Ok(_) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(error) => {
            let failure = Failure::because(
                format!("cannot connect to the node at {}", places.socket.display()),
                &error,
            );
            Err(if error.kind() == ErrorKind::PermissionDenied {
                failure.hint("it belongs to another user: run as that user, or leave --socket and VISTARA_SOCKET out to use a node of your own")
            } else {
                failure
            })
        }
    }
}

/// The running node, or none.
pub(crate) async fn running(places: &Places) -> Result<Option<Client>, Failure> {
    places.check_socket_dir()?;
    Ok(answers(places)
        .await?
        .then(|| Client::new(places.socket.clone())))
}

/// The running node, or one started now.
pub(crate) async fn or_start(places: &Places) -> Result<Client, Failure> {
    if let Some(client) = running(places).await? {
        return Ok(client);
    }
    let idle = ["--idle-exit".to_owned(), IDLE_EXIT.to_owned()];
    start(places, &idle).await
}

/// A node in the background, with these options. None runs, as far as is known.
pub(crate) async fn start(places: &Places, options: &[String]) -> Result<Client, Failure> {
    begin(places, options).await?;
    Ok(Client::new(places.socket.clone()))
}

async fn begin(places: &Places, options: &[String]) -> Result<(), Failure> {
    places.prepare()?;
    let begin = Instant::now();
    let mut child = spawn(places, options)?;
    let mut left_at: Option<Instant> = None;
    loop {
        if answers(places).await? {
            return Ok(());
        }
        if left_at.is_none()
            && let Ok(Some(status)) = child.try_wait()
        {
            if !status.success() {
                return Err(failed(places, &format!("it ended at once ({status})")));
            }
            left_at = Some(Instant::now());
        }
        if left_at.is_some_and(|at| at.elapsed() > LOCK_TIME_MAX) {
            // The one that held the lock may have been on its way out: its place is free now, or is held for good.
            child = spawn(places, options)?;
            left_at = None;
            tokio::time::sleep(Duration::from_millis(500)).await;
            if !answers(places).await? && matches!(child.try_wait(), Ok(Some(_))) {
                return Err(Failure::new(format!(
                    "a node already runs on {}, and does not listen at {}",
                    places.state_dir.display(),
                    places.socket.display()
                ))
                .hint("leave --socket and VISTARA_SOCKET out, or give another --state-dir too"));
            }
        }
        if begin.elapsed() > START_TIME_MAX {
            let seconds = START_TIME_MAX.as_secs();
            return Err(failed(
                places,
                &format!("it does not answer after {seconds} s"),
            ));
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}

fn spawn(places: &Places, options: &[String]) -> Result<Child, Failure> {
    let what = "cannot start a node in the background";
    let log = places.log_file();
    if std::fs::metadata(&log).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX) {
        // Losing the older half of a log is no reason not to start.
        let _ = std::fs::rename(&log, log.with_extension("log.1"));
    }
    let open = || {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&log)
    };
    let (out, err) = match (open(), open()) {
        (Ok(out), Ok(err)) => (out, err),
        (Err(error), _) | (_, Err(error)) => {
            return Err(Failure::because(
                format!("{what}: cannot open {}", log.display()),
                error,
            ));
        }
    };
    // A pipe of the caller's shell that the node kept open would never end. Where the kernel cannot, nothing is lost.
    let _ = vistara_node::close_descriptors_on_exec();
    // Not in a process group of its own: a group's leader could not leave our session, which `--background` does first.
    Command::new("/proc/self/exe")
        .arg0("vistara")
        .args(["node", "--background"])
        .args(options)
        .arg("--socket")
        .arg(&places.socket)
        .arg("--state-dir")
        .arg(&places.state_dir)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .map_err(|error| Failure::because(what, error))
}

fn failed(places: &Places, why: &str) -> Failure {
    let log = places.log_file();
    let mut end = Vec::new();
    let read = std::fs::File::open(&log).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        file.take(LOG_TAIL_BYTES).read_to_end(&mut end)
    });
    let end = String::from_utf8_lossy(&end);
    let last = end.trim_end().rsplit('\n').next().unwrap_or_default();
    let said = match read {
        Ok(_) if !last.is_empty() => format!("; its last words: {last}"),
        _ => String::new(),
    };
    Failure::new(format!(
        "cannot start a node in the background: {why}{said}"
    ))
    .hint(format!(
        "its log is {}; `vistara node` runs it in the foreground",
        log.display()
    ))
}

/// Says once that the node is of another version.
pub(crate) fn warn_of_other_version(client: &Client) {
    let own = env!("CARGO_PKG_VERSION");
    if let Some(version) = client.server_version().filter(|version| *version != own) {
        eprint_line(&format!(
            "vistara: the running node is version {}, this program is {own}: `vistara node stop` lets the next command start the new one (machines go on)",
            crate::text::visible(version, false)
        ));
    }
}
