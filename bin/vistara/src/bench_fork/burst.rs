//! `vistara bench burst`: many machines at once.

use super::{Bare, Bench, Conditions, Hypervisor, load, told};
use crate::bench_command::millis;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::places::Places;
use serde::Serialize;
use std::time::Instant;
use vistara_api::{Client, ForkRequest, Machine};

/// Raw forks that are launched at once in a burst: more take each other's processors.
const RAW_WORKERS: usize = 4;

/// One size of a burst.
#[derive(Debug, Serialize)]
struct Burst {
    machines: u32,
    /// Milliseconds until all bare forks had answered.
    raw_ms: f64,
    /// Milliseconds until all programs ran.
    run_ms: f64,
    /// The same where a burst of this size was just before, and the stock has been filled since; absent where the node keeps
    /// none. Of the machines so many were from the stock.
    stocked_ms: Option<f64>,
    from_stock: u32,
    /// Milliseconds until all copies of a running machine ran.
    live_ms: f64,
    /// Machines in a second, by ours, with the stock, and by the raw ones.
    run_per_s: f64,
    stocked_per_s: Option<f64>,
    raw_per_s: f64,
    /// `run_ms` by `raw_ms`.
    ratio: f64,
}

#[derive(Debug, Serialize)]
struct BurstReport {
    conditions: Conditions,
    bursts: Vec<Burst>,
}

/// `vistara bench burst`.
pub(crate) async fn burst(
    client: &Client,
    places: &Places,
    hypervisor: Hypervisor,
    image: Option<&str>,
    sizes: &[u32],
    json: bool,
) -> Result<u8, Failure> {
    let mut bench = Bench::prepare(client, places, hypervisor, image).await?;
    let source = bench.forked().await?;
    let mut bursts = Vec::new();
    let mut failed = None;
    // Caches are warm afterwards.
    for (index, size) in std::iter::once(&1).chain(sizes).enumerate() {
        match one_burst(&bench, &source, *size).await {
            Ok(burst) if index > 0 => bursts.push(burst),
            Ok(_) => {}
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    client.remove_machine(&source.id, true).await?;
    if let Some(error) = failed {
        return Err(error);
    }
    bench.conditions.load[1] = load();
    let report = BurstReport {
        conditions: bench.conditions,
        bursts,
    };
    if json {
        print_json(&report)?;
    } else {
        print(&burst_table(&report))?;
    }
    Ok(0)
}

async fn one_burst(bench: &Bench<'_>, source: &Machine, size: u32) -> Result<Burst, Failure> {
    let begin = Instant::now();
    let raw = raw_burst(bench, size)?;
    let raw_time = begin.elapsed();
    drop(raw);
    let (run_time, forked) = all_run(bench, size, false).await?;
    remove_all(bench, &forked).await?;
    // What is learned from is not what is measured.
    let (_, before) = all_run(bench, size, true).await?;
    remove_all(bench, &before).await?;
    let mut stocked_time = None;
    let mut from_stock = 0;
    if size > 1 && bench.stocked(size).await? > 0 {
        let (time, machines) = all_run(bench, size, true).await?;
        for machine in &machines {
            let detail = bench.client.machine(&machine.id).await;
            from_stock += u32::from(detail.is_ok_and(|detail| detail.warm));
        }
        stocked_time = Some(time);
        remove_all(bench, &machines).await?;
        // Until it is whole again it would be filled beside what is measured next.
        bench.stocked(size).await?;
    }
    let request = ForkRequest {
        count: size,
        ..ForkRequest::default()
    };
    let begin = Instant::now();
    let forked = bench.client.fork(&source.id, &request).await?;
    let live_time = begin.elapsed();
    remove_all(bench, &forked.machines).await?;
    let seconds = |time: std::time::Duration| time.as_secs_f64().max(f64::MIN_POSITIVE);
    Ok(Burst {
        machines: size,
        raw_ms: millis(raw_time),
        run_ms: millis(run_time),
        stocked_ms: stocked_time.map(millis),
        from_stock,
        live_ms: millis(live_time),
        run_per_s: f64::from(size) / seconds(run_time),
        stocked_per_s: stocked_time.map(|time| f64::from(size) / seconds(time)),
        raw_per_s: f64::from(size) / seconds(raw_time),
        ratio: seconds(run_time) / seconds(raw_time),
    })
}

/// How long it takes until so many programs run that are asked for at once, from the stock where that is wanted and there is
/// one.
async fn all_run(
    bench: &Bench<'_>,
    size: u32,
    stock: bool,
) -> Result<(std::time::Duration, Vec<Machine>), Failure> {
    let begin = Instant::now();
    let asked = (0..size).map(|_| async move {
        match stock {
            true => bench.usual().await,
            false => bench.forked().await,
        }
    });
    let made = futures_util::future::join_all(asked).await;
    let took = begin.elapsed();
    let mut machines = Vec::new();
    let mut failed = None;
    for one in made {
        match one {
            Ok(machine) => machines.push(machine),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) => {
            remove_all(bench, &machines).await?;
            Err(error)
        }
        None => Ok((took, machines)),
    }
}

async fn remove_all(bench: &Bench<'_>, machines: &[Machine]) -> Result<(), Failure> {
    let removed = machines
        .iter()
        .map(|machine| bench.client.remove_machine(&machine.id, true));
    for result in futures_util::future::join_all(removed).await {
        result?;
    }
    Ok(())
}

/// So many bare forks, all of which have answered.
fn raw_burst(bench: &Bench<'_>, size: u32) -> Result<Vec<Bare>, Failure> {
    let next = std::sync::atomic::AtomicU32::new(0);
    let work = || {
        let mut mine = Vec::new();
        while next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < size {
            mine.push(bench.fork_raw()?);
        }
        Ok(mine)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..RAW_WORKERS).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::new();
        for worker in workers {
            let mine: Result<Vec<Bare>, Failure> = worker
                .join()
                .unwrap_or_else(|_| Err(Failure::new("a worker of the bench failed")));
            all.extend(mine?);
        }
        Ok(all)
    })
}

fn burst_table(report: &BurstReport) -> String {
    let rows: String = report
        .bursts
        .iter()
        .map(|burst| {
            format!(
                "| {:>8} | {:>8.0} | {:>8.0} | {:>8} | {:>10} | {:>8} | {:>8.1} | {:>8.1} | {:>8} | {:>6.2} |\n",
                burst.machines,
                burst.raw_ms,
                burst.run_ms,
                burst.stocked_ms.map_or_else(String::new, |ms| format!("{ms:.0}")),
                burst.from_stock,
                format!("{:.0}", burst.live_ms),
                burst.raw_per_s,
                burst.run_per_s,
                burst.stocked_per_s.map_or_else(String::new, |rate| format!("{rate:.1}")),
                burst.ratio
            )
        })
        .collect();
    format!(
        "{}. Until the last of so many answers (raw) or its program runs.\n\n| machines | raw, ms | run, forked, ms | run, with a stock, ms | of them from it | fork, ms | raw, 1/s | run, forked, 1/s | with a stock, 1/s | ratio |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n{rows}",
        told(&report.conditions)
    )
}
