//! The layers of an image from node to node, each way, against iperf3 over the same link, in turn.
//!
//! The bytes go through the caller, as with `vistara images fetch`: from a node to this program, and from it to a node. What
//! arrives is checked by its digest and lies on a disk when the clock is stopped; the root disk is made later.

use super::nodes::Two;
use super::{IMAGES_AIM, row, verdict};
use crate::bench_command::Series;
use crate::failure::Failure;
use crate::image_transfer;
use crate::progress;
use serde::Serialize;
use std::io::Cursor;
use std::process::Stdio;
use std::time::{Duration, Instant};
use vistara_api::Client;
use vistara_model::Bytes;

/// Name of the image that travels.
const IMAGE: &str = "vistara-bench-mesh";
const IPERF: &str = "iperf3";
/// How long each of its measurements lasts.
const IPERF_SECONDS: &str = "3";
/// How long iperf3 may take to listen.
const IPERF_LISTEN_LIMIT: Duration = Duration::from_secs(5);
/// Transfers each way that are not counted.
const WARM_UP: u32 = 1;

/// MB/s (10⁶ bytes).
#[derive(Debug, Serialize)]
pub(super) struct Images {
    transfers: u32,
    size_bytes: u64,
    /// From the near node, at which the caller sits, to the far one.
    sent: Series,
    /// From the far node to the near one.
    fetched: Series,
    /// One TCP stream of iperf3, near to far; absent where it is not installed.
    iperf: Option<Series>,
    /// The slower of both ways by iperf3, of the medians.
    ratio: Option<f64>,
}

impl Images {
    pub(super) fn describe(&self, text: &mut String) {
        row(text, "image to the other node, MB/s", &self.sent);
        row(text, "image from the other node, MB/s", &self.fetched);
        if let (Some(iperf), Some(ratio)) = (&self.iperf, self.ratio) {
            row(text, "iperf3 over the same link, MB/s", iperf);
            text.push_str(&format!(
                "  ratio {ratio:.3}; aim {IMAGES_AIM}: {}\n",
                verdict(ratio >= IMAGES_AIM)
            ));
        }
    }
}

/// Measures, and says why there is no baseline where there is none.
pub(super) async fn images(
    two: &Two,
    size: Bytes,
    transfers: u32,
) -> Result<(Images, Option<Failure>), Failure> {
    let (near, far) = (&two.near.client, &two.far.client);
    for node in [near, far] {
        import(node, size).await?;
    }
    let [mut sent, mut fetched, mut iperf] = [const { Vec::new() }; 3];
    let mut missing = None;
    for round in 0..WARM_UP + transfers {
        let there = one(near, &two.across(), far).await?;
        let back = one(&two.across(), near, near).await?;
        let base = match missing {
            None => base(two).await,
            Some(_) => Ok(None),
        };
        match base {
            Ok(rate) if round >= WARM_UP => iperf.extend(rate),
            Ok(_) => {}
            Err(why) => missing = Some(why),
        }
        if round >= WARM_UP {
            sent.push(there);
            fetched.push(back);
        }
    }
    let (sent, fetched) = (Series::of(sent), Series::of(fetched));
    let iperf = (!iperf.is_empty()).then(|| Series::of(iperf));
    let ratio = iperf.map(|iperf| sent.median.min(fetched.median) / iperf.median);
    let images = Images {
        transfers,
        size_bytes: size.0,
        sent,
        fetched,
        iperf,
        ratio,
    };
    Ok((images, missing))
}

/// Makes an image of one file that does not compress, another one at each node.
async fn import(node: &Client, size: Bytes) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::because("cannot make the image", error);
    let length = usize::try_from(size.0).map_err(|_| Failure::new("--size is too large"))?;
    let mut noise = vec![0; length];
    getrandom::fill(&mut noise).map_err(|error| failed(error.into()))?;
    let mut archive = tar::Builder::new(Vec::with_capacity(length + 2048));
    let mut header = tar::Header::new_gnu();
    header.set_size(size.0);
    header.set_mode(0o644);
    archive
        .append_data(&mut header, "noise", noise.as_slice())
        .map_err(failed)?;
    drop(noise);
    let bytes = archive.into_inner().map_err(failed)?;
    let events = node.import(Some(IMAGE), Cursor::new(bytes)).await?;
    progress::show(events, true).await?;
    Ok(())
}

/// MB/s of one transfer, of which nothing stays. `to` is the target under whose own eyes it is cleared away.
async fn one(source: &Client, target: &Client, to: &Client) -> Result<f64, Failure> {
    let begin = Instant::now();
    let (parts, bytes) = image_transfer::layers(source, target, IMAGE).await?;
    let took = begin.elapsed();
    let all: u64 = parts.layers.iter().map(|layer| layer.bytes).sum();
    to.prune_images(false).await?;
    if bytes != all {
        let here = Bytes(all.saturating_sub(bytes));
        return Err(Failure::new(format!(
            "{here} of the image were there before they were sent"
        )));
    }
    Ok(bytes as f64 / 1e6 / took.as_secs_f64())
}

/// MB/s of iperf3 from the near end to the far one.
async fn base(two: &Two) -> Result<Option<f64>, Failure> {
    let failed = |error: std::io::Error| {
        Failure::because("cannot run iperf3", error).hint("apt-get install iperf3")
    };
    let port = free_port()?;
    let (address, port) = (two.address(false).to_string(), port.to_string());
    let mut server = two.command(false, IPERF);
    server
        .args(["-s", "-1", "-B", &address, "-p", &port])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut server = tokio::process::Command::from(server);
    let mut server = server.kill_on_drop(true).spawn().map_err(failed)?;
    let begin = Instant::now();
    loop {
        let mut client = two.command(true, IPERF);
        client
            .args(["-c", &address, "-p", &port, "-t", IPERF_SECONDS, "-J"])
            .stdin(Stdio::null());
        let mut client = tokio::process::Command::from(client);
        let output = client.kill_on_drop(true).output().await.map_err(failed)?;
        let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let bits = &said["end"]["sum_received"]["bits_per_second"];
        if let Some(bits) = bits.as_f64() {
            let _ = server.wait().await;
            return Ok(Some(bits / 8e6));
        }
        if begin.elapsed() > IPERF_LISTEN_LIMIT {
            let why = said["error"].as_str().unwrap_or("it gives no rate");
            return Err(Failure::because("iperf3 does not measure", why));
        }
        // It may not listen yet.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A port that nobody listens at. In the namespaces of a cable all but two or three are such.
fn free_port() -> Result<u16, Failure> {
    std::net::TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|error| Failure::because("no port is free", error))
}
