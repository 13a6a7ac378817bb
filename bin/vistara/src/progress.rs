//! Progress of a pull or an import: bars where standard error is a terminal, a few plain lines where it is not.

use crate::failure::{Failure, eprint_line};
use crate::text::{short_id, visible};
use futures_util::StreamExt;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;
use tokio::sync::mpsc;
use vistara_api::client::Events;
use vistara_api::{ClientError, Image, ImageEvent};
use vistara_model::Bytes;

/// Plain lines at most: what an event stream says must not fill somebody's log.
const LINES_MAX: u32 = 200;
/// Bars at most at a time; more than a screen holds would scroll away.
const BARS_MAX: usize = 16;

/// Shows the events and gives the image in the end.
pub(crate) async fn show(mut events: Events<ImageEvent>, quiet: bool) -> Result<Image, Failure> {
    let mut view = View::new(quiet);
    while let Some(event) = events.next().await {
        match event? {
            ImageEvent::Step { step } => view.step(&step),
            ImageEvent::Layer {
                digest,
                done_bytes,
                total_bytes,
            } => view.layer(&digest, done_bytes, total_bytes),
            ImageEvent::Done { image } => {
                view.clear();
                return Ok(image);
            }
            ImageEvent::Failed { error } => {
                view.clear();
                return Err(Failure::refused(&error));
            }
        }
    }
    view.clear();
    Err(ClientError::Broken {
        operation: "reading an event",
        message: "the node ended the answer early".to_owned(),
    }
    .into())
}

/// Shows how far something gets that nothing comes out of; until nobody reports any more.
pub(crate) async fn show_parts(
    mut events: mpsc::Receiver<Result<ImageEvent, ClientError>>,
    quiet: bool,
) {
    let mut view = View::new(quiet);
    while let Some(event) = events.recv().await {
        if let Ok(ImageEvent::Layer {
            digest,
            done_bytes,
            total_bytes,
        }) = event
        {
            view.layer(&digest, done_bytes, total_bytes);
        }
    }
    view.clear();
}

enum View {
    Quiet,
    Plain {
        lines_left: u32,
        last: String,
        done: HashMap<String, bool>,
    },
    Bars {
        all: MultiProgress,
        step: ProgressBar,
        layers: HashMap<String, ProgressBar>,
    },
}

impl View {
    fn new(quiet: bool) -> View {
        if quiet {
            View::Quiet
        } else if std::io::stderr().is_terminal() {
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
            let step = all.add(ProgressBar::new_spinner());
            step.enable_steady_tick(Duration::from_millis(120));
            View::Bars {
                all,
                step,
                layers: HashMap::new(),
            }
        } else {
            View::Plain {
                lines_left: LINES_MAX,
                last: String::new(),
                done: HashMap::new(),
            }
        }
    }

    fn step(&mut self, name: &str) {
        let name = visible(name, false);
        match self {
            View::Quiet => {}
            View::Plain {
                lines_left, last, ..
            } => {
                if *last != name {
                    say(lines_left, &name);
                    *last = name;
                }
            }
            View::Bars { step, .. } => step.set_message(name),
        }
    }

    fn layer(&mut self, digest: &str, done_bytes: u64, total_bytes: u64) {
        let id = visible(short_id(digest), false);
        match self {
            View::Quiet => {}
            View::Plain {
                lines_left, done, ..
            } => {
                let over = done_bytes >= total_bytes;
                if done.len() as u32 <= LINES_MAX
                    && !done.get(digest).copied().unwrap_or(false)
                    && over
                {
                    say(lines_left, &format!("layer {id}: {}", Bytes(total_bytes)));
                    done.insert(digest.to_owned(), true);
                }
            }
            View::Bars { all, layers, .. } => {
                if !layers.contains_key(digest) {
                    if layers.values().filter(|bar| !bar.is_finished()).count() >= BARS_MAX {
                        return;
                    }
                    let bar = all.add(ProgressBar::new(total_bytes));
                    if let Ok(style) = ProgressStyle::with_template(
                        "{prefix:12}  {bar:30}  {binary_bytes:>10} of {binary_total_bytes:<10} {eta}",
                    ) {
                        bar.set_style(style);
                    }
                    bar.set_prefix(id);
                    layers.insert(digest.to_owned(), bar);
                }
                if let Some(bar) = layers.get(digest) {
                    bar.set_length(total_bytes);
                    bar.set_position(done_bytes);
                    if done_bytes >= total_bytes {
                        bar.finish_and_clear();
                    }
                }
            }
        }
    }

    fn clear(&self) {
        if let View::Bars { all, step, .. } = self {
            step.finish_and_clear();
            let _ = all.clear();
        }
    }
}

fn say(lines_left: &mut u32, line: &str) {
    if *lines_left > 0 {
        *lines_left -= 1;
        eprint_line(line);
    }
}

/// A bar for bytes whose number is not known, such as a tree being copied; nothing where it should be quiet.
pub(crate) fn byte_counter(quiet: bool, what: &str) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{msg}  {binary_bytes}  {binary_bytes_per_sec}")
    {
        bar.set_style(style);
    }
    bar.set_message(visible(what, false));
    bar
}
