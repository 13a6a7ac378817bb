//! `vistara stats`: what machines use, once or continuously.

use crate::arguments::StatsOptions;
use crate::failure::{Failure, eprint_line};
use crate::listing::Failures;
use crate::output::{print, print_json, print_json_line};
use crate::text::{short_id, table, visible};
use futures_util::StreamExt;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;
use tokio::sync::mpsc;
use vistara_api::{Client, ClientError, Stats};
use vistara_model::Bytes;

/// How often the table is drawn anew.
const DRAW_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for the two samples of `--no-stream`: a machine that is busy or stuck still gets its line or is left out.
const ONCE_TIME_MAX: Duration = Duration::from_secs(5);
/// Samples that may wait for the table: some for each machine.
const SAMPLES_MAX: usize = 256;

/// `vistara stats`.
pub(crate) async fn stats(client: &Client, options: &StatsOptions) -> Result<u8, Failure> {
    let mut failures = Failures::default();
    let machines: Vec<String> = if options.machines.is_empty() {
        client
            .machines(false)
            .await?
            .into_iter()
            .filter(|machine| machine.state == "running")
            .map(|machine| machine.id)
            .collect()
    } else {
        options.machines.clone()
    };
    let mut streams = Vec::new();
    for machine in machines {
        match client.stats(&machine, true).await {
            Ok(stream) => streams.push((machine, stream)),
            Err(error) => failures.add(&machine, error.into()),
        }
    }
    if options.no_stream || streams.is_empty() {
        let samples = once(streams).await;
        show(&samples, options, false)?;
    } else {
        continuously(streams, options).await?;
    }
    failures.code()
}

type Stream = (String, vistara_api::client::Events<Stats>);

/// The second sample of each, which has a CPU share; or the first where there is no second.
async fn once(streams: Vec<Stream>) -> Vec<Stats> {
    let each = streams.into_iter().map(|(_, mut stream)| async move {
        let mut last = None;
        let _ = tokio::time::timeout(ONCE_TIME_MAX, async {
            while let Some(Ok(sample)) = stream.next().await {
                let complete = sample.cpu_percent.is_some();
                last = Some(sample);
                if complete {
                    break;
                }
            }
        })
        .await;
        last
    });
    futures_util::future::join_all(each)
        .await
        .into_iter()
        .flatten()
        .collect()
}

async fn continuously(streams: Vec<Stream>, options: &StatsOptions) -> Result<(), Failure> {
    let (sender, mut samples) =
        mpsc::channel::<(String, Option<Result<Stats, ClientError>>)>(SAMPLES_MAX);
    for (machine, mut stream) in streams {
        let sender = sender.clone();
        // Ends with its stream, or with the receiver.
        tokio::spawn(async move {
            loop {
                let item = stream.next().await;
                let over = item.is_none();
                if sender.send((machine.clone(), item)).await.is_err() || over {
                    return;
                }
            }
        });
    }
    drop(sender);
    let mut latest: BTreeMap<String, Stats> = BTreeMap::new();
    let mut tick = tokio::time::interval(DRAW_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick.tick().await;
    let redraw = !options.json && std::io::stdout().is_terminal();
    loop {
        tokio::select! {
            sample = samples.recv() => match sample {
                None => return Ok(()),
                Some((machine, Some(Ok(sample)))) => {
                    latest.insert(machine, sample);
                }
                Some((machine, Some(Err(error)))) => {
                    latest.remove(&machine);
                    eprint_line(&format!("vistara: {}: {error}", visible(&machine, false)));
                }
                Some((machine, None)) => {
                    latest.remove(&machine);
                }
            },
            _ = tick.tick() => {
                let all: Vec<Stats> = latest.values().cloned().collect();
                show(&all, options, redraw)?;
            }
        }
    }
}

fn show(samples: &[Stats], options: &StatsOptions, redraw: bool) -> Result<(), Failure> {
    if options.json {
        return if options.no_stream {
            print_json(samples)
        } else {
            print_json_line(samples)
        };
    }
    let rows: Vec<Vec<String>> = samples.iter().map(row).collect();
    let text = table(
        &[
            "ID",
            "NAME",
            "CPU %",
            "MEMORY",
            "OF",
            "HOST",
            "DISK",
            "NET IN",
            "NET OUT",
            "PROCESSES",
        ],
        &rows,
    );
    if redraw {
        // Home, the table, and clear what is left of the last one.
        let text = text.replace('\n', "\x1b[K\n");
        print(&format!("\x1b[H{text}\x1b[J"))
    } else {
        print(&text)
    }
}

fn row(sample: &Stats) -> Vec<String> {
    let bytes = |count: u64| Bytes(count).to_string();
    vec![
        short_id(&sample.id).to_owned(),
        sample.name.clone(),
        sample
            .cpu_percent
            .map_or_else(|| "-".to_owned(), |percent| format!("{percent:.1}")),
        bytes(sample.memory_used_bytes),
        bytes(sample.memory_total_bytes),
        bytes(sample.host_resident_bytes),
        bytes(sample.disk_used_bytes),
        bytes(sample.net_rx_bytes),
        bytes(sample.net_tx_bytes),
        sample.processes.to_string(),
    ]
}
