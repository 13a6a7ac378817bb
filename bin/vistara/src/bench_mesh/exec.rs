//! A command in a machine that is ready, asked for at another node and at its own, in turn.

use super::nodes::Two;
use super::{EXEC_OVER_MS_AIM, row, verdict};
use crate::bench_command::{Series, chosen, millis};
use crate::failure::Failure;
use crate::image_transfer;
use crate::progress;
use serde::Serialize;
use std::time::{Duration, Instant};
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{Client, ExecRequest, RunRequest};

/// The machine's name, and what it does meanwhile.
const NAME: &str = "bench-mesh";
const WAITS: [&str; 2] = ["sleep", "100000"];
/// What is executed: as little as there is.
const COMMAND: &str = "true";
/// Commands on each way that are not counted.
const WARM_UP: u32 = 3;
/// How long the machine may take until it takes commands.
const READY_LIMIT: Duration = Duration::from_secs(180);

/// Milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Exec {
    count: u32,
    hypervisor: String,
    accelerator: String,
    /// From the call of the interface to the command's end, at the machine's own node.
    local: Series,
    /// The same at the other node.
    remote: Series,
    /// Of each command over there, by how much it took longer than the one here beside it.
    difference: Series,
    /// `remote` by `local`, of the medians.
    ratio: f64,
    /// The least question and its answer (which version a node is), at its own node and at the other one.
    asked_local: Series,
    asked_remote: Series,
    /// A datagram there and back, as the link between the nodes measures it.
    round_trip: f64,
    /// What `difference` is in the median beyond one round trip. Commands in a guest vary more than this.
    over: f64,
    /// The same of the question.
    asked_over: f64,
}

impl Exec {
    pub(super) fn describe(&self, text: &mut String) {
        row(text, "exec at its own node, ms", &self.local);
        row(text, "exec at the other node, ms", &self.remote);
        row(text, "  longer than its neighbour, ms", &self.difference);
        row(text, "a question at its own node, ms", &self.asked_local);
        row(text, "a question at the other node, ms", &self.asked_remote);
        text.push_str(&format!(
            "  ratio {:.3}; {:.2} ms beyond a round trip of {:.2} ms, of a question {:.2} ms; aim {EXEC_OVER_MS_AIM} ms: {}\n",
            self.ratio,
            self.over,
            self.round_trip,
            self.asked_over,
            verdict(self.over < EXEC_OVER_MS_AIM)
        ));
    }
}

/// Measures with an image of the user's node.
pub(super) async fn exec(
    user: &Client,
    two: &Two,
    image: Option<&str>,
    count: u32,
) -> Result<Exec, Failure> {
    let image = chosen(user.images().await?, image)?;
    let far = &two.far.client;
    let (mut parts, _) = image_transfer::layers(user, far, &image.id).await?;
    parts.names = Vec::new();
    progress::show(far.assemble_image(&parts).await?, true).await?;
    let request = RunRequest {
        image: image.id.clone(),
        command: WAITS.map(str::to_owned).to_vec(),
        name: Some(NAME.to_owned()),
        hypervisor: Some("qemu".to_owned()),
        network: Some("none".to_owned()),
        ..RunRequest::default()
    };
    // By the near node, so that both may ask for it.
    let machine = two.across().run(&request).await?.id;
    ready(far, &machine).await?;
    measure(two, &machine, count).await
}

/// Waits until the machine takes commands.
async fn ready(far: &Client, machine: &str) -> Result<(), Failure> {
    let begin = Instant::now();
    loop {
        match one(far, machine).await {
            Ok(_) => return Ok(()),
            Err(failure) if begin.elapsed() > READY_LIMIT => return Err(failure),
            Err(failure) => {
                if let Some(message) = far.machine(machine).await?.machine.message {
                    return Err(Failure::because("a machine did not start", message));
                }
                drop(failure);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn measure(two: &Two, machine: &str, count: u32) -> Result<Exec, Failure> {
    let (here, there) = (two.far.client.clone(), two.across());
    let [mut local, mut remote, mut difference] = [const { Vec::new() }; 3];
    let [mut asked_local, mut asked_remote] = [const { Vec::new() }; 2];
    for round in 0..WARM_UP + count {
        // Who comes second finds the host as the first has left it, so they take turns.
        let (first, second) = if round % 2 == 0 {
            (&here, &there)
        } else {
            (&there, &here)
        };
        let (one_ms, other_ms) = (one(first, machine).await?, one(second, machine).await?);
        let (one_asked, other_asked) = (asked(first).await?, asked(second).await?);
        if round < WARM_UP {
            continue;
        }
        let swap = round % 2 == 1;
        let order = |pair: (f64, f64)| if swap { (pair.1, pair.0) } else { pair };
        let (own, other) = order((one_ms, other_ms));
        local.push(own);
        remote.push(other);
        difference.push(other - own);
        let (own, other) = order((one_asked, other_asked));
        asked_local.push(own);
        asked_remote.push(other);
    }
    let nodes = two.near.client.nodes().await?;
    let round_trip = (nodes.iter())
        .find_map(|node| node.facts.as_ref()?.rtt_us)
        .map(|us| us as f64 / 1000.0)
        .ok_or_else(|| Failure::new("the nodes do not say how far they are from each other"))?;
    let choice = two.far.client.machine(machine).await?.machine.choice;
    let (hypervisor, accelerator) = choice.map_or_else(Default::default, |choice| {
        (choice.hypervisor, choice.accelerator)
    });
    let (local, remote) = (Series::of(local), Series::of(remote));
    let difference = Series::of(difference);
    let (asked_local, asked_remote) = (Series::of(asked_local), Series::of(asked_remote));
    Ok(Exec {
        count,
        hypervisor,
        accelerator,
        ratio: remote.median / local.median,
        over: difference.median - round_trip,
        asked_over: asked_remote.median - asked_local.median - round_trip,
        local,
        remote,
        difference,
        asked_local,
        asked_remote,
        round_trip,
    })
}

/// Milliseconds of one command from the call to its end.
async fn one(client: &Client, machine: &str) -> Result<f64, Failure> {
    let request = ExecRequest {
        command: vec![COMMAND.to_owned()],
        ..ExecRequest::default()
    };
    let begin = Instant::now();
    let mut streams = client.exec(machine, &request).await?;
    loop {
        match streams.output.next().await? {
            Some(StreamItem::Event(StreamEvent::Exited { exit_code: 0, .. })) => {
                return Ok(millis(begin.elapsed()));
            }
            Some(StreamItem::Event(StreamEvent::Exited { exit_code, .. })) => {
                return Err(Failure::new(format!("`{COMMAND}` ended with {exit_code}")));
            }
            Some(StreamItem::Event(StreamEvent::Failed { error })) => {
                return Err(Failure::refused(&error));
            }
            Some(_) => {}
            None => return Err(Failure::new("a command ended without saying how")),
        }
    }
}

/// Milliseconds of the least question.
async fn asked(client: &Client) -> Result<f64, Failure> {
    let begin = Instant::now();
    client.version().await?;
    Ok(millis(begin.elapsed()))
}
