//! The task that keeps the stock: it ends what is too much, and makes what is missing, one at a time, when nobody waits.

use super::make::make;
use crate::node::Node;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vistara_control::{Bustle, Memory, QUIET, Room, may_fill};
use vistara_model::{Bytes, MachineState};

/// How often a stock is gone over of which nothing is missing. Memory can be taken quickly.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps the stock of a node until that is gone.
pub(crate) async fn keep(node: Weak<Node>) {
    loop {
        let Some(strong) = node.upgrade() else { return };
        if strong.stock().is_closed() {
            return;
        }
        let next = go_over(&strong).await;
        let stock = strong.stock();
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

async fn go_over(node: &std::sync::Arc<Node>) -> Next {
    let stock = node.stock();
    let room = memory().map_or(Room::Keep, |memory| memory.room());
    if room == Room::Empty && stock.count() > 0 {
        tracing::info!(
            machines = stock.count(),
            "the host is short of memory: the stock is emptied"
        );
        node.empty_stock().await;
        return Next::In(LOOK);
    }
    let bustle = Bustle {
        starting: starting(node),
        quiet_for: stock.quiet_for(),
    };
    let fill = room == Room::Fill && may_fill(bustle);
    let templates = node.templates();
    let plan = stock.plan(fill);
    for warm in plan.surplus {
        warm.end().await;
    }
    let Some((key, pattern)) = plan.make else {
        return match plan.busy {
            true if room == Room::Fill && !may_fill(bustle) => Next::In(QUIET),
            true => Next::In(LOOK),
            false => Next::WhenAsked,
        };
    };
    let Some(template) = templates.in_memory(&key).await else {
        // It is being written or was dropped: the next request makes it, or reads it again.
        return Next::In(LOOK);
    };
    stock.making.store(true, Ordering::Release);
    let begin = Instant::now();
    let made = make(node, &pattern, &template).await;
    match made {
        Ok((warm, _)) if stock.is_closed() => warm.end().await,
        Ok((warm, each)) => {
            if let Some((id, _)) = warm.identity() {
                tracing::debug!(machine = %id, template = key, took = ?begin.elapsed(), each = each.0, "a machine was made for the stock");
            }
            node.watch_warm(&warm);
            stock.add(&key, warm, each);
        }
        Err(message) => {
            tracing::warn!(
                template = key,
                message,
                "no machine could be made for the stock"
            );
            stock.failed(&key);
        }
    }
    stock.making.store(false, Ordering::Release);
    Next::Now
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

fn memory() -> Option<Memory> {
    use vistara_host::facts;
    Some(Memory {
        available: Bytes(facts::memory_available().ok()?),
        total: Bytes(facts::memory_total().ok()?),
        stalled: facts::memory_stalled(),
    })
}
