//! The task that keeps the stock: it ends what is too much, and makes what is missing, one at a time, when nobody waits.

use super::make::make;
use super::{Pattern, Stock};
use crate::node::Node;
use crate::templates::Template;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use vistara_control::{Bustle, Memory, QUIET, Room, may_fill};
use vistara_model::{Bytes, MachineState};

/// How often a stock is gone over of which nothing is missing, and memory is looked at while one is made: it can be taken
/// quickly.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps the stock of a node until that leaves or is gone.
pub(crate) async fn keep(node: Weak<Node>) {
    let mut missing_since = None;
    loop {
        let Some(strong) = node.upgrade() else { return };
        let stock = strong.stock();
        if stock.is_closed() {
            return;
        }
        let next = go_over(&strong, &stock, &mut missing_since).await;
        drop(strong);
        match next {
            Next::Now => {}
            Next::In(pause) => {
                let rung = stock.bell.notified();
                // Whether it rang or not, it is gone over again.
                let _ = tokio::time::timeout(pause, rung).await;
            }
            Next::WhenAsked => stock.bell.notified().await,
        }
    }
}

enum Next {
    Now,
    In(Duration),
    WhenAsked,
}

async fn go_over(node: &Arc<Node>, stock: &Stock, missing_since: &mut Option<Instant>) -> Next {
    let room = room();
    if room == Room::Empty && stock.count() > 0 {
        empty(stock);
        return Next::In(LOOK);
    }
    let plan = stock.plan();
    // Each ends by itself, and nothing waits for it here.
    drop(plan.surplus);
    let Some((key, pattern)) = plan.missing else {
        *missing_since = None;
        return match plan.busy {
            true => Next::In(LOOK),
            false => Next::WhenAsked,
        };
    };
    let bustle = Bustle {
        starting: starting(node),
        quiet_for: stock.quiet_for(),
        missing_for: missing_since.get_or_insert_with(Instant::now).elapsed(),
    };
    if room != Room::Fill {
        return Next::In(LOOK);
    }
    if !may_fill(bustle) {
        return Next::In(QUIET);
    }
    let template = match node.templates().in_memory(&key) {
        Ok(Some(template)) => template,
        // Others are missing, too.
        Ok(None) => {
            stock.template_absent(&key);
            return Next::Now;
        }
        Err(_) => {
            stock.template_busy(&key);
            return Next::Now;
        }
    };
    *missing_since = None;
    make_one(node, stock, key, pattern, template).await;
    Next::Now
}

/// Makes a machine and puts it into the stock, unless the node leaves or memory is wanted before it is done.
async fn make_one(
    node: &Arc<Node>,
    stock: &Stock,
    key: String,
    pattern: Pattern,
    template: Arc<Template>,
) {
    let begin = Instant::now();
    let cancel = stock.closing.child_token();
    // A task, so that its panic is a failure like any other.
    let mut task = {
        let (node, cancel) = (Arc::clone(node), cancel.clone());
        tokio::spawn(async move { make(&node, &pattern, &template, &cancel).await })
    };
    let made = loop {
        match tokio::time::timeout(LOOK, &mut task).await {
            Ok(made) => {
                break made
                    .unwrap_or_else(|error| Err(format!("a task of the node failed: {error}")));
            }
            Err(_) if room() == Room::Empty => {
                cancel.cancel();
                empty(stock);
            }
            Err(_) => {}
        }
    };
    match made {
        // It is ended where it is dropped.
        Ok((warm, _)) if cancel.is_cancelled() => drop(warm),
        Ok((warm, each)) => {
            let watched = warm.watched();
            if let Some((id, _)) = &watched {
                tracing::debug!(machine = %id, template = key, took = ?begin.elapsed(), each = each.0, "a machine was made for the stock");
            }
            stock.add(&key, warm, each);
            // After it is there: what ends now is found.
            if let Some((id, vm)) = watched {
                node.watch_warm(id, vm);
            }
        }
        Err(_) if cancel.is_cancelled() => {}
        Err(message) => {
            tracing::warn!(
                template = key,
                message,
                "no machine could be made for the stock"
            );
            stock.failed(&key);
        }
    }
}

fn empty(stock: &Stock) {
    let all = stock.empty(false);
    if !all.is_empty() {
        tracing::info!(
            machines = all.len(),
            "the host is short of memory: the stock is emptied"
        );
    }
}

/// Machines of users that are on their way.
fn starting(node: &Node) -> usize {
    let all = node.all();
    let starting = all.iter().filter(|handle| {
        matches!(
            handle.state(),
            MachineState::Preparing | MachineState::Booting
        )
    });
    starting.count()
}

fn room() -> Room {
    use vistara_host::facts;
    let memory = || {
        Some(Memory {
            available: Bytes(facts::memory_available().ok()?),
            total: Bytes(facts::memory_total().ok()?),
            stalled: facts::memory_stalled(),
        })
    };
    // Where it cannot be told nothing changes.
    memory().map_or(Room::Keep, |memory| memory.room())
}
