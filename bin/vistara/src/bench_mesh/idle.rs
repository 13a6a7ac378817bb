//! What a node costs that does nothing and knows many: the processor time of the near node's daemon, by itself with one
//! joined node, and then in a network of real nodes without machines, which run in this process.

use super::nodes::Two;
use super::{IDLE_PERCENT_AIM, verdict};
use crate::bench_command::resident;
use crate::failure::Failure;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};
use vistara_api::{JoinRequest, ListenRequest, PeerNode};
use vistara_node::QuietNodes;

/// How long the peers may take to answer and to be known.
const KNOWN_LIMIT: Duration = Duration::from_secs(120);
/// How long nothing is measured after the last of them was heard of: what is new to everybody has been told by then.
const SETTLE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);
/// What `/proc` counts processor time in, whatever the kernel's own clock: hundredths of a second.
const TICK: Duration = Duration::from_millis(10);

/// Shares of a core in percent.
#[derive(Debug, Serialize)]
pub(super) struct Idle {
    /// Peers that it takes for alive, the other node of the benchmark among them.
    peers: usize,
    watched_s: f64,
    /// With one peer, before the others came.
    alone_percent: f64,
    /// With all of them.
    percent: f64,
    resident_bytes: u64,
}

impl Idle {
    pub(super) fn describe(&self, text: &mut String) {
        text.push_str(&format!(
            "an idle node with {} peers, {:.0} s: {:.2} % of a core ({:.2} % with one peer), {} resident; aim {IDLE_PERCENT_AIM} %: {}\n",
            self.peers,
            self.watched_s,
            self.percent,
            self.alone_percent,
            vistara_model::Bytes(self.resident_bytes),
            verdict(self.percent < IDLE_PERCENT_AIM)
        ));
    }
}

/// Measures with so many peers beside the other node.
pub(super) async fn idle(
    two: &Two,
    scratch: &Path,
    count: usize,
    watch: Duration,
) -> Result<Idle, Failure> {
    let pid = two.near.pid();
    let alone_percent = share(pid, watch).await?;
    let dir = scratch.join("peers");
    let peers = std::fs::create_dir(&dir)
        .and_then(|()| QuietNodes::start(count, &dir))
        .map_err(|error| Failure::because("cannot start the peers", error))?;
    let ticket = two.ticket(true).await?;
    let begin = Instant::now();
    for client in &peers.clients {
        while client.version().await.is_err() {
            if begin.elapsed() > KNOWN_LIMIT {
                return Err(Failure::new("a peer of the benchmark does not answer"));
            }
            tokio::time::sleep(LOOK).await;
        }
        let listen = ListenRequest {
            listen: Some(format!("{}:0", two.address(true))),
        };
        client.mesh_listen(&listen).await?;
        let join = JoinRequest {
            ticket: ticket.clone(),
            ..JoinRequest::default()
        };
        client.join(&join).await?;
    }
    let alive = |nodes: &[PeerNode]| {
        let lives = |node: &&PeerNode| node.life.as_deref() == Some("alive");
        nodes.iter().filter(lives).count()
    };
    let mut known = 0;
    while known < count {
        known = alive(&two.near.client.nodes().await?);
        if begin.elapsed() > KNOWN_LIMIT {
            return Err(Failure::new(format!(
                "the node knows {known} of {count} peers only"
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
    tokio::time::sleep(SETTLE).await;
    let percent = share(pid, watch).await?;
    let idle = Idle {
        peers: alive(&two.near.client.nodes().await?),
        watched_s: watch.as_secs_f64(),
        alone_percent,
        percent,
        resident_bytes: resident(pid)?,
    };
    if idle.peers < count {
        return Err(Failure::new(format!(
            "only {} of {count} peers lived to the end of the measurement",
            idle.peers
        )));
    }
    Ok(idle)
}

/// The part of a core in percent that a process uses over a while.
async fn share(pid: u32, watch: Duration) -> Result<f64, Failure> {
    let (begin, before) = (Instant::now(), processor_time(pid)?);
    tokio::time::sleep(watch).await;
    let used = processor_time(pid)?.saturating_sub(before);
    Ok(100.0 * used.as_secs_f64() / begin.elapsed().as_secs_f64())
}

/// What a process has used of processors so far.
fn processor_time(pid: u32) -> Result<Duration, Failure> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| Failure::because(format!("cannot read {path}"), error))?;
    ticks(&text)
        .map(|ticks| TICK * ticks)
        .ok_or_else(|| Failure::new(format!("{path} names no processor time")))
}

/// The fields 14 and 15, in user and in kernel mode. The second field is a name, which may have anything in it but ends the
/// last bracket.
fn ticks(stat: &str) -> Option<u32> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u32>().ok();
    Some(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_though_the_name_has_brackets_and_blanks() {
        let stat = "7 (a) (b 1) S 1 7 7 0 -1 4194560 900 0 0 0 250 50 0 0 20 0 9 0 100";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("7 (a"), None);
    }
}
