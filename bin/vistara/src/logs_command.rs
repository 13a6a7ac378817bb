//! `vistara logs`: what a machine printed, standard output and standard error apart.

use crate::arguments::{LogsOptions, Tail};
use crate::failure::{Failure, eprint_line};
use crate::output::print_json_line;
use crate::text::visible;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::{Stream, StreamExt};
use jiff::{SignedDuration, Timestamp};
use std::io::Write;
use vistara_api::{Client, ClientError, LogEvent};

/// `vistara logs`.
pub(crate) async fn logs(client: &Client, options: &LogsOptions) -> Result<u8, Failure> {
    if options.console {
        let text = client.console(&options.machine).await?;
        let mut out = std::io::stdout().lock();
        out.write_all(&text)?;
        out.flush()?;
        return Ok(0);
    }
    let since = options
        .since
        .as_deref()
        .map(|text| since(text, Timestamp::now()))
        .transpose()?;
    let tail = match options.tail {
        Some(Tail::Lines(count)) => Some(count),
        Some(Tail::All) | None => None,
    };
    let events = client
        .logs(&options.machine, options.follow, since.as_deref(), tail)
        .await?;
    show(events, options.timestamps, options.json).await?;
    Ok(0)
}

/// All that a machine printed until now.
pub(crate) async fn printed(client: &Client, machine: &str) -> Result<(), Failure> {
    let events = client.logs(machine, false, None, None).await?;
    show(events, false, false).await
}

async fn show(
    mut events: impl Stream<Item = Result<LogEvent, ClientError>> + Unpin,
    timestamps: bool,
    json: bool,
) -> Result<(), Failure> {
    let mut stdout = Stamper::default();
    let mut stderr = Stamper::default();
    while let Some(event) = events.next().await {
        let event = event?;
        if json {
            print_json_line(&event)?;
            continue;
        }
        match event {
            LogEvent::Output { stream, time, data } => {
                let data = BASE64_STANDARD
                    .decode(&data)
                    .map_err(|error| Failure::because("the node's log makes no sense", error))?;
                let stamp = timestamps.then_some(time.as_str());
                if stream == "stderr" {
                    let mut err = std::io::stderr().lock();
                    err.write_all(&stderr.stamp(data, stamp))?;
                } else {
                    let mut out = std::io::stdout().lock();
                    out.write_all(&stdout.stamp(data, stamp))?;
                    out.flush()?;
                }
            }
            LogEvent::Gap { bytes, reason } => eprint_line(&format!(
                "vistara: {bytes} bytes are missing here: {}",
                visible(&reason, false)
            )),
        }
    }
    Ok(())
}

/// Puts the time before each line of one stream, however the stream is cut into pieces.
#[derive(Debug, Default)]
struct Stamper {
    inside_line: bool,
}

impl Stamper {
    fn stamp(&mut self, data: Vec<u8>, time: Option<&str>) -> Vec<u8> {
        let Some(time) = time else {
            return data;
        };
        let mut out = Vec::with_capacity(data.len() + 64);
        for line in data.split_inclusive(|&byte| byte == b'\n') {
            if !self.inside_line {
                out.extend_from_slice(time.as_bytes());
                out.push(b' ');
            }
            out.extend_from_slice(line);
            self.inside_line = line.last() != Some(&b'\n');
        }
        out
    }
}

/// `--since`: a time, or an age before now, as RFC 3339.
fn since(text: &str, now: Timestamp) -> Result<String, Failure> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time.to_string());
    }
    // Docker also takes seconds since 1970.
    if let Ok(seconds) = text.parse::<i64>()
        && let Ok(time) = Timestamp::from_second(seconds)
    {
        return Ok(time.to_string());
    }
    text.parse::<SignedDuration>()
        .ok()
        .and_then(|age| now.checked_sub(age).ok())
        .map(|time| time.to_string())
        .ok_or_else(|| {
            Failure::new(format!("--since {text:?} is neither a time nor an age"))
                .hint("write 2026-01-31T12:00:00Z or 10m")
                .code(2)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_time_or_an_age() {
        let now: Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        for (text, want) in [
            ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
            ("2026-01-01T02:00:00+02:00", "2026-01-01T00:00:00Z"),
            ("10m", "2026-01-01T00:50:00Z"),
            ("1h30m", "2025-12-31T23:30:00Z"),
            ("0", "1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(since(text, now).unwrap(), want, "{text}");
        }
        assert!(since("yesterday", now).is_err());
    }

    #[test]
    fn each_line_gets_one_time_however_it_is_cut() {
        let mut stamper = Stamper::default();
        let mut out = stamper.stamp(b"a\nb".to_vec(), Some("T"));
        out.extend(stamper.stamp(b"c\nd\n".to_vec(), Some("U")));
        assert_eq!(out, b"T a\nT bc\nU d\n");
    }
}
