//! `vistara run --replicas-agree M/N`: one program on several nodes, and the answer that enough of them give.
//!
//! An answer is the image that ran, the exit code and standard output. Each comes with a receipt, which must be of the node
//! that was asked, of the very request that it got, and of what arrived from it: so that whoever differs has signed that it
//! does. Nodes are told apart by their keys; that different keys have different owners is what their user has to see to when
//! joining them.

mod vote;

use crate::failure::{Failure, OWN_FAULT, eprint_line};
use crate::place;
use crate::receipts::{Expected, Heard, Seen, check_run};
use crate::run_command::{first_end, prepare, with_image};
use crate::run_options::RunOptions;
use crate::session::signals::Signals;
use crate::text::visible;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{AttachRequest, Client, RunRequest, StopRequest};
pub(crate) use vote::Quorum;
use vote::{Answer, Gave, Outcome, count, is_mixed, may_agree};

/// Most that one node's program may print, both streams together: everybody's output is held until it is known whose counts.
const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// When enough agree, the others get as long again as it took until then, and at least this.
const OTHERS_MIN: Duration = Duration::from_secs(10);
/// Until enough agree, the others get so many times as long as the first answer took, and at least this: they may have to
/// fetch the image first, and be slower.
const UNDECIDED_TIMES: u32 = 4;
const UNDECIDED_MIN: Duration = Duration::from_secs(300);
/// With `--timeout`, a node has so much longer before its program's time begins and after it is over.
const TIMEOUT_GRACE: Duration = UNDECIDED_MIN;
/// How long machines have to end that nobody waits for any more.
const GRACE: Duration = Duration::from_secs(3);

/// A node that takes part.
struct Asked {
    name: String,
    node: String,
    offer: String,
    client: Client,
    request: RunRequest,
    expected: Expected,
}

/// Machines that run: they are stopped where nobody waits for them.
#[derive(Default)]
struct Running {
    machines: Mutex<Vec<(Client, String)>>,
    /// Requests that may be making one.
    asking: watch::Sender<usize>,
}

impl Running {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Client, String)>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self) -> Asking<'_> {
        self.asking.send_modify(|count| *count += 1);
        Asking(self)
    }
}

/// While it is there, a request may be making a machine.
struct Asking<'a>(&'a Running);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.asking.send_modify(|count| *count -= 1);
    }
}

/// What came from a node.
struct Came {
    index: usize,
    gave: Result<Full, String>,
}

/// All of it.
struct Full {
    answer: Answer,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    receipt: String,
}

/// `vistara run --replicas-agree`.
pub(crate) async fn run(client: &Client, options: &RunOptions) -> Result<u8, Failure> {
    let Some(quorum) = options.replicas_agree else {
        return Err(Failure::new("how many nodes are to agree was not said"));
    };
    if let Some(dir) = &options.receipt {
        std::fs::create_dir_all(dir).map_err(|error| {
            Failure::because(
                format!("cannot make the directory {}", dir.display()),
                error,
            )
        })?;
    }
    let mut request = prepare(client, options).await?;
    // Nobody can read their streams again, and their places are somebody's.
    request.stdin = false;
    request.auto_remove = true;
    // The very same everywhere, where it is known here.
    if let Ok(image) = client.image(&request.image).await {
        request.image = image.id;
    }
    let asked = choose(client, options, quorum, &request).await?;
    let names: Vec<String> = asked.iter().map(|asked| asked.name.clone()).collect();
    let running = Running::default();
    let mut signals =
        Signals::install().map_err(|error| Failure::because("cannot start", error))?;
    let gathered = gather(asked, options, quorum, &running, &mut signals).await;
    stop_all(&running).await;
    let came = gathered.map_err(|number| Failure::silent(128u8.saturating_add(number)))?;
    conclude(options.receipt.as_deref(), quorum, &names, came)
}

/// Has as many nodes chosen as are to take part.
async fn choose(
    client: &Client,
    options: &RunOptions,
    quorum: Quorum,
    request: &RunRequest,
) -> Result<Vec<Asked>, Failure> {
    // What this node says is no other's word.
    let mut apart_from = vec![client.mesh().await?.id];
    let mut asked: Vec<Asked> = Vec::new();
    while asked.len() < quorum.of {
        let placed = match place::choose(client, options, apart_from.clone()).await {
            Ok(placed) => placed,
            Err(failure) => {
                for asked in &asked {
                    // An offer that cannot be given back ends by itself.
                    let _ = asked.client.release_offer(&asked.offer).await;
                }
                return Err(Failure {
                    message: format!(
                        "{} joined nodes are to run it, and only {} take it: {}",
                        quorum.of,
                        asked.len(),
                        failure.message
                    ),
                    code: Some(OWN_FAULT),
                    ..failure
                });
            }
        };
        apart_from.push(placed.node.clone());
        let mut request = request.clone();
        let expected = Expected::of(&mut request)?;
        asked.push(Asked {
            client: (client.on(placed.node.clone())).under(placed.offer.clone()),
            offer: placed.offer,
            name: placed.name,
            node: placed.node,
            request,
            expected,
        });
    }
    Ok(asked)
}

/// Runs it everywhere, and waits for all answers; for the last ones not for ever, and for none when no answer can count any
/// more. The error is the number of a signal that came first.
async fn gather(
    asked: Vec<Asked>,
    options: &RunOptions,
    quorum: Quorum,
    running: &Running,
    signals: &mut Signals,
) -> Result<Vec<Gave<Full>>, u8> {
    let begin = Instant::now();
    let late = || Gave::Nothing("it has not answered in time".to_owned());
    let mut all: Vec<Gave<Full>> = asked.iter().map(|_| late()).collect();
    let mut came_in = vec![false; all.len()];
    let mut tasks = Vec::new();
    for (index, asked) in asked.into_iter().enumerate() {
        tasks.push(async move {
            let gave = ask(asked, options, running).await;
            Came { index, gave }
        });
    }
    let mut tasks: futures_util::stream::FuturesUnordered<_> = tasks.into_iter().collect();
    let mut bound = options
        .timeout
        .map(|time| time.saturating_add(TIMEOUT_GRACE));
    let (mut answered, mut agreed) = (false, false);
    let gathered = loop {
        let deadline = bound.and_then(|bound| begin.checked_add(bound));
        let next = futures_util::StreamExt::next(&mut tasks);
        let came = tokio::select! {
            came = next => came,
            () = until(deadline) => break Ok(()),
            number = first_end(signals) => break Err(number),
        };
        let Some(Came { index, gave }) = came else {
            break Ok(());
        };
        if let Some(place) = all.get_mut(index) {
            *place = match gave {
                Ok(full) => Gave::Answer(full.answer.clone(), full),
                Err(why) => Gave::Nothing(why),
            };
        }
        if let Some(came) = came_in.get_mut(index) {
            *came = true;
        }
        if !may_agree(&all, tasks.len(), quorum) {
            for (place, _) in all.iter_mut().zip(&came_in).filter(|(_, came)| !**came) {
                let why = "it was not waited for: no answer could count any more";
                *place = Gave::Nothing(why.to_owned());
            }
            break Ok(());
        }
        let took = begin.elapsed();
        if !answered && all.iter().any(|gave| matches!(gave, Gave::Answer(..))) {
            answered = true;
            let more = took.saturating_mul(UNDECIDED_TIMES).max(UNDECIDED_MIN);
            bound = sooner(bound, took.saturating_add(more));
        }
        if !agreed && matches!(count(&all, quorum), Outcome::Agreed { .. }) {
            agreed = true;
            bound = sooner(bound, took.saturating_add(took.max(OTHERS_MIN)));
        }
    };
    // A request that is under way may be making a machine that would be left behind unseen.
    let mut asking = running.asking.subscribe();
    let settled = async {
        tokio::select! {
            () = async {
                // Only its own sender's end is an error.
                let _ = asking.wait_for(|count| *count == 0).await;
            } => {}
            () = async { while futures_util::StreamExt::next(&mut tasks).await.is_some() {} } => {}
            _ = first_end(signals) => {}
        }
    };
    let _ = tokio::time::timeout(GRACE, settled).await;
    gathered.map(|()| all)
}

/// The shorter time; where there was none, this.
fn sooner(bound: Option<Duration>, other: Duration) -> Option<Duration> {
    Some(bound.map_or(other, |bound| bound.min(other)))
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Runs it on one node.
async fn ask(asked: Asked, options: &RunOptions, running: &Running) -> Result<Full, String> {
    let Asked {
        node,
        client,
        request,
        expected,
        ..
    } = asked;
    let told = |failure: Failure| failure.message;
    let asking = running.ask();
    let machine = with_image(&client, options, &request, async |request| {
        client.run(request).await
    })
    .await
    .map_err(told)?;
    let entry = (client.clone(), machine.id.clone());
    running.lock().push(entry);
    drop(asking);
    let attach = AttachRequest {
        from_start: true,
        stdin: false,
        receipt: true,
    };
    let lost = |error: vistara_api::ClientError| Failure::from(error).message;
    let mut streams = client.attach(&machine.id, &attach).await.map_err(lost)?;
    let (mut stdout, mut stderr, mut heard) = (Vec::new(), Vec::new(), Heard::default());
    let mut receipt = Err("it sent no receipt".to_owned());
    let exit_code = loop {
        match streams.output.next().await.map_err(lost)? {
            Some(StreamItem::Stdout(bytes)) => {
                heard.stdout(&bytes);
                stdout.extend_from_slice(&bytes);
            }
            Some(StreamItem::Stderr(bytes)) => {
                heard.stderr(&bytes);
                stderr.extend_from_slice(&bytes);
            }
            Some(StreamItem::Event(StreamEvent::Receipt {
                receipt: text,
                missing,
            })) => {
                receipt = text.ok_or_else(|| missing.unwrap_or_else(|| "no receipt".to_owned()));
            }
            Some(StreamItem::Event(StreamEvent::Exited { exit_code, .. })) => break exit_code,
            Some(StreamItem::Event(StreamEvent::Failed { error })) => match error.exit_code {
                Some(code) => break code,
                None => return Err(error.message),
            },
            Some(StreamItem::Event(StreamEvent::Started { .. } | StreamEvent::Notice { .. })) => {}
            None => return Err("it closed the stream before the end".to_owned()),
        }
        if stdout.len() + stderr.len() > OUTPUT_BYTES_MAX {
            return Err(format!(
                "its program printed more than {} MiB, which is more than is compared",
                OUTPUT_BYTES_MAX >> 20
            ));
        }
    };
    running.lock().retain(|(_, id)| *id != machine.id);
    let receipt = receipt?;
    let seen = Seen {
        node: Some(&node),
        expected: &expected,
        exit_code: Some(exit_code),
        heard: &heard,
    };
    let said = check_run(&client, &receipt, &seen).await.map_err(told)?;
    if !said.output.complete {
        return Err("by its own word it does not know whether the output is complete".to_owned());
    }
    Ok(Full {
        answer: Answer {
            image: said.request.image_id,
            exit_code,
            stdout: heard.stdout_digest(),
            stdout_bytes: stdout.len(),
            merged: said.output.merged,
        },
        stdout,
        stderr,
        receipt,
    })
}

/// Ends what runs still, with a bound: a node that does not answer is not waited for.
async fn stop_all(running: &Running) {
    let left = std::mem::take(&mut *running.lock());
    let mut stops = JoinSet::new();
    for (client, machine) in left {
        stops.spawn(async move {
            let request = StopRequest {
                grace_ms: Some(0),
                signal: None,
            };
            // It ends by its program or by its node's owner then.
            let _ = tokio::time::timeout(GRACE, client.stop(&machine, &request)).await;
        });
    }
    while stops.join_next().await.is_some() {}
}

/// Prints the answer that counts, says who differed, and keeps the receipts.
fn conclude(
    receipts: Option<&Path>,
    quorum: Quorum,
    names: &[String],
    came: Vec<Gave<Full>>,
) -> Result<u8, Failure> {
    let name = |index: usize| names.get(index).map_or("?", String::as_str);
    for (index, gave) in came.iter().enumerate() {
        if let (Some(dir), Gave::Answer(_, full)) = (receipts, gave) {
            let path = dir.join(format!("{index}-{}.receipt", file_name(name(index))));
            crate::receipt_commands::write(&path, &full.receipt)?;
        }
    }
    let outcome = count(&came, quorum);
    for line in vote::words(&came, &outcome, quorum, &name) {
        eprint_line(&format!("vistara: {}", visible(&line, false)));
    }
    let Outcome::Agreed { whose, .. } = outcome else {
        let hint = match is_mixed(&came) {
            true => {
                "some ran it as a unikernel, whose standard error is part of its output: --hypervisor qemu (or firecracker) has all run it on Linux"
            }
            false => {
                "a program whose output depends on the time, on chance or on its host never agrees"
            }
        };
        return Err(Failure::new(format!(
            "no answer counts: {} of {} nodes were to agree",
            quorum.agree, quorum.of
        ))
        .hint(hint)
        .code(OWN_FAULT));
    };
    let first = whose.first().and_then(|index| came.get(*index));
    let Some(Gave::Answer(answer, full)) = first else {
        return Err(Failure::new("no answer counts").code(OWN_FAULT));
    };
    // Whoever closed standard error still gets the answer.
    let _ = std::io::stderr().lock().write_all(&full.stderr);
    let mut out = std::io::stdout().lock();
    out.write_all(&full.stdout)?;
    out.flush()?;
    Ok(answer.exit_code)
}

/// A node's name as a part of a file's.
fn file_name(name: &str) -> String {
    let plain = |letter: char| match letter {
        letter if letter.is_ascii_alphanumeric() || "-_".contains(letter) => letter,
        _ => '_',
    };
    name.chars().take(64).map(plain).collect()
}
