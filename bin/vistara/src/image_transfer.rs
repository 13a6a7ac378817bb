//! Images and snapshots from nodes to a node: what it lacks, by digest, in pieces from all that have it, gone on from after a cut.
//!
//! The bytes go through here, the caller's host: the nodes need not know one another. What arrives is checked where it
//! arrives; a source that sends anything else costs its transfer, never the image.

use crate::failure::{Failure, eprint_line};
use crate::progress;
use crate::text::visible;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use vistara_api::{
    Client, ClientError, ErrorKind, Image, ImageEvent, ImageParts, PackedSnapshot, Snapshot,
    WantedLayer,
};
use vistara_model::ImageRef;

/// Bytes of one piece: a fraction of a second on most lines, and some tens of milliseconds on fast ones.
const PIECE_BYTES: u64 = 4 << 20;
/// Pieces asked for ahead: for each source, and all together (64 MiB of memory).
const AHEAD_EACH: usize = 2;
const AHEAD_MAX: usize = 8;
/// Layers on their way at a time.
const LAYERS_AT_ONCE: usize = 2;
/// Times that a layer is taken up again without anything having arrived.
const ATTEMPTS_MAX: u32 = 6;
/// First pause before that, doubled each time.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest that a node is asked whether it has an image.
const ASK_BOUND: Duration = Duration::from_secs(5);
/// Longest that one piece may take: it is taken up by another source then.
const PIECE_BOUND: Duration = Duration::from_secs(120);
/// From so many bytes on other nodes are asked, too.
const SEVERAL_MIN: u64 = 8 << 20;
/// Events on their way to the screen.
const EVENTS_MAX: usize = 64;

struct Source {
    called: String,
    client: Client,
    /// Pieces asked of it and not yet here.
    busy: AtomicUsize,
    failed: AtomicBool,
}

/// Nodes that have an image.
struct Sources(Vec<Source>);

impl Sources {
    fn of(list: impl IntoIterator<Item = (String, Client)>) -> Sources {
        let source = |(called, client)| Source {
            called,
            client,
            busy: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        };
        Sources(list.into_iter().map(source).collect())
    }

    /// One piece, from whichever source has least to do; from another where that one fails.
    async fn piece(&self, digest: &str, from: u64, length: u64) -> io::Result<Bytes> {
        let mut last = io::Error::other("nobody has it");
        for _ in 0..self.0.len() {
            let usable = |source: &&Source| !source.failed.load(Ordering::Relaxed);
            let busy = |source: &&Source| source.busy.load(Ordering::Relaxed);
            let Some(source) = self.0.iter().filter(usable).min_by_key(busy) else {
                break;
            };
            source.busy.fetch_add(1, Ordering::Relaxed);
            let asked = source.client.blob(digest, from, length);
            let piece = tokio::time::timeout(PIECE_BOUND, asked).await;
            source.busy.fetch_sub(1, Ordering::Relaxed);
            match piece {
                Ok(Ok(piece)) if piece.len() as u64 == length => return Ok(piece),
                Ok(Ok(_)) => {
                    last = io::Error::other(format!("{}: it sent too little", source.called));
                }
                Ok(Err(error)) => last = io::Error::other(format!("{}: {error}", source.called)),
                Err(_) => last = io::Error::other(format!("{}: it stalls", source.called)),
            }
            source.failed.store(true, Ordering::Relaxed);
        }
        Err(last)
    }

    /// Lets those that failed try again.
    fn forgive(&self) {
        for source in &self.0 {
            source.failed.store(false, Ordering::Relaxed);
        }
    }

    /// A layer from here on, in order, asked for ahead.
    fn pieces(
        self: &Arc<Self>,
        layer: &WantedLayer,
        report: impl Fn(u64) + Send + 'static,
    ) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        let ahead = (self.0.len() * AHEAD_EACH).min(AHEAD_MAX);
        let (sources, digest, bytes) = (Arc::clone(self), layer.digest.clone(), layer.bytes);
        let starts =
            std::iter::successors(Some(layer.have_bytes), move |from| Some(from + PIECE_BYTES))
                .take_while(move |from| *from < bytes);
        futures_util::stream::iter(starts)
            .map(move |from| {
                let (sources, digest) = (Arc::clone(&sources), digest.clone());
                let length = PIECE_BYTES.min(bytes - from);
                async move {
                    let piece = sources.piece(&digest, from, length).await?;
                    Ok((from + length, piece))
                }
            })
            .buffered(ahead)
            .map_ok(move |(done, piece)| {
                report(done);
                piece
            })
    }
}

/// Whether the layer that arrived was not the one that was asked for.
fn is_garbage(error: &ClientError) -> bool {
    error
        .body()
        .is_some_and(|body| body.kind == ErrorKind::User)
}

/// Whether another attempt would be told the same.
fn is_final(error: &ClientError) -> bool {
    error
        .body()
        .is_some_and(|body| body.kind != ErrorKind::Peer)
}

type Report = mpsc::Sender<Result<ImageEvent, ClientError>>;

/// What goes from node to node.
#[derive(Clone, Copy)]
enum Cargo<'a> {
    Image(&'a ImageParts),
    Snapshot(&'a PackedSnapshot),
}

impl Cargo<'_> {
    /// What of it a node lacks now.
    async fn lacking(self, target: &Client) -> Result<Vec<WantedLayer>, ClientError> {
        match self {
            Cargo::Image(parts) => Ok(offered(parts, target.offer_image(parts).await?.layers)),
            Cargo::Snapshot(packed) => {
                let wanted = target.offer_snapshot(packed).await?;
                let file = WantedLayer {
                    digest: packed.digest.clone(),
                    bytes: packed.bytes,
                    have_bytes: wanted.have_bytes,
                };
                let whole = wanted.is_here || wanted.have_bytes == packed.bytes;
                Ok(Vec::from_iter((!whole).then_some(file)))
            }
        }
    }
}

/// Has a layer, or a snapshot's file, arrive.
async fn send_layer(
    sources: &Arc<Sources>,
    target: &Client,
    cargo: Cargo<'_>,
    mut layer: WantedLayer,
    report: &Report,
) -> Result<(), ClientError> {
    let mut attempts = 0;
    loop {
        let (digest, total_bytes, report) = (layer.digest.clone(), layer.bytes, report.clone());
        let pieces = sources.pieces(&layer, move |done_bytes| {
            let event = ImageEvent::Layer {
                digest: digest.clone(),
                done_bytes,
                total_bytes,
            };
            // A screen that is slow misses some.
            let _ = report.try_send(Ok(event));
        });
        let sent = target
            .send_blob(&layer.digest, layer.bytes, layer.have_bytes, pieces)
            .await;
        let before = layer.have_bytes;
        let failure = match sent {
            Ok(received) if received.have_bytes >= layer.bytes => return Ok(()),
            Ok(received) => {
                layer.have_bytes = received.have_bytes;
                None
            }
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => Some(error),
        };
        if failure.is_none() && layer.have_bytes > before {
            attempts = 0;
        }
        attempts += 1;
        if attempts >= ATTEMPTS_MAX {
            let cut = || ClientError::Broken {
                operation: "sending a layer",
                message: "it was cut off again and again".to_owned(),
            };
            return Err(failure.unwrap_or_else(cut));
        }
        tokio::time::sleep(PAUSE * 2_u32.pow(attempts - 1)).await;
        sources.forgive();
        // What there is now, after whatever happened.
        match cargo.lacking(target).await {
            Err(error) if is_final(&error) => return Err(error),
            // It may be back at the next attempt.
            Err(_) => {}
            Ok(wanted) => match (wanted.into_iter()).find(|wanted| wanted.digest == layer.digest) {
                None => return Ok(()),
                Some(wanted) => {
                    if wanted.have_bytes > before {
                        attempts = 0;
                    }
                    layer = wanted;
                }
            },
        }
    }
}

async fn send_all(
    sources: &Arc<Sources>,
    target: &Client,
    parts: &ImageParts,
    wanted: Vec<WantedLayer>,
    report: &Report,
) -> Result<(), ClientError> {
    let cargo = Cargo::Image(parts);
    futures_util::stream::iter(wanted)
        .map(|layer| async move {
            let anew = || WantedLayer {
                have_bytes: 0,
                ..layer.clone()
            };
            let mut sent = send_layer(sources, target, cargo, layer.clone(), report).await;
            // What lay there may have been wrong, by whomever it was brought: once more, all of it.
            if layer.have_bytes > 0 && sent.as_ref().is_err_and(is_garbage) {
                sent = send_layer(sources, target, cargo, anew(), report).await;
            }
            match sent {
                // Who of several sent something else is not known: one after another, each by itself.
                Err(error) if is_garbage(&error) && sources.0.len() > 1 => {
                    let mut last = error;
                    for source in &sources.0 {
                        let alone = [(source.called.clone(), source.client.clone())];
                        let alone = Arc::new(Sources::of(alone));
                        match send_layer(&alone, target, cargo, anew(), report).await {
                            Ok(()) => return Ok(()),
                            Err(error) => last = error,
                        }
                    }
                    Err(last)
                }
                sent => sent,
            }
        })
        .buffer_unordered(LAYERS_AT_ONCE)
        .try_collect::<Vec<()>>()
        .await
        .map(drop)
}

/// Of these nodes, those that have this very image.
async fn who_has(candidates: Vec<(String, Client)>, id: &str) -> Vec<(String, Client)> {
    let asked = candidates.into_iter().map(|(called, client)| async move {
        let asked = tokio::time::timeout(ASK_BOUND, client.image(id)).await;
        matches!(asked, Ok(Ok(image)) if image.id == id).then_some((called, client))
    });
    let found = futures_util::future::join_all(asked).await;
    found.into_iter().flatten().collect()
}

/// The joined nodes that answer and have granted something, but for the target.
async fn others(local: &Client, target: &Client) -> Result<Vec<(String, Client)>, ClientError> {
    let nodes = local.nodes().await?;
    Ok(nodes
        .into_iter()
        .filter(|node| node.state == "connected" && node.grant.is_some())
        .filter(|node| {
            target
                .node()
                .is_none_or(|on| !(node.id.starts_with(on) || node.name.as_deref() == Some(on)))
        })
        .map(|node| {
            let called = node.name.unwrap_or_else(|| node.id[..12].to_owned());
            (called, local.on(node.id))
        })
        .collect())
}

/// Whether the parts are those of the image that was asked for, as far as what was typed says so.
fn is_asked(image: &str, id: &str) -> bool {
    let typed = image.strip_prefix("sha256:").unwrap_or(image);
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let whole = typed.len() == 64 && typed.bytes().all(hex);
    // A word such as `cafe` is a name, too; a whole id, or one that says what it is, is none.
    let is_id = whole || image.starts_with("sha256:");
    !is_id
        || id
            .strip_prefix("sha256:")
            .is_some_and(|id| id.starts_with(typed))
}

/// The name that was typed, where it is one that the source's image bears: of its other names it may say what it likes.
fn asked_names(image: &str, names: &[String]) -> Vec<String> {
    let Ok(asked) = image.parse::<ImageRef>() else {
        return Vec::new();
    };
    let same = |name: &&String| name.parse::<ImageRef>().is_ok_and(|name| name == asked);
    names.iter().filter(same).take(1).cloned().collect()
}

/// Of the layers that a node wants, those that are the image's: nobody hears of other blobs by asking for them.
fn offered(parts: &ImageParts, wanted: Vec<WantedLayer>) -> Vec<WantedLayer> {
    let is_ours = |wanted: &WantedLayer| {
        wanted.have_bytes <= wanted.bytes
            && (parts.layers.iter())
                .any(|layer| layer.digest == wanted.digest && layer.bytes == wanted.bytes)
    };
    let mut ours: Vec<WantedLayer> = Vec::new();
    for layer in wanted.into_iter().filter(is_ours) {
        if !ours.iter().any(|one| one.digest == layer.digest) {
            ours.push(layer);
        }
    }
    ours
}

/// Gives the target an image that one of the first sources has; these and the further ones send what it lacks.
async fn transfer(
    target: &Client,
    image: &str,
    first: Vec<(String, Client)>,
    quiet: bool,
) -> Result<Image, Failure> {
    let local = target.local();
    let mut found = None;
    let mut refusal = None;
    for (called, client) in &first {
        match client.image_parts(image).await {
            Ok(parts) if !is_asked(image, &parts.id) => {
                refusal = Some(Failure::new(format!("{called} gives another image")));
            }
            Ok(mut parts) => {
                parts.names = asked_names(image, &parts.names);
                found = Some((called.clone(), client.clone(), parts));
                break;
            }
            Err(error) => refusal = Some(Failure::from(error)),
        }
    }
    let Some((called, client, parts)) = found else {
        return Err(refusal.unwrap_or_else(|| {
            Failure::new(format!(
                "no node that was joined and has granted something has {image}"
            ))
            .hint("`vistara nodes` lists them; `--from NODE` says which to ask")
        }));
    };
    let wanted = Cargo::Image(&parts).lacking(target).await?;
    let lacking: u64 = (wanted.iter())
        .map(|layer| layer.bytes.saturating_sub(layer.have_bytes))
        .sum();
    let mut sources = vec![(called.clone(), client)];
    if lacking >= SEVERAL_MIN {
        let mut more: Vec<_> = first
            .into_iter()
            .filter(|(name, _)| *name != called)
            .collect();
        for (name, client) in others(&local, target).await.unwrap_or_default() {
            let known = |(other, _): &(String, Client)| *other == name;
            if !more.iter().any(known) && name != called {
                more.push((name, client));
            }
        }
        sources.extend(who_has(more, &parts.id).await);
    }
    if !quiet && lacking > 0 {
        let names: Vec<&str> = sources.iter().map(|(called, _)| called.as_str()).collect();
        eprint_line(&format!(
            "{} from {}",
            vistara_model::Bytes(lacking),
            visible(&names.join(", "), false)
        ));
    }
    let (report, mut events) = mpsc::channel(EVENTS_MAX);
    let target = target.clone();
    let sources = Arc::new(Sources::of(sources));
    tokio::spawn(async move {
        let sent = async {
            send_all(&sources, &target, &parts, wanted, &report).await?;
            target.assemble_image(&parts).await
        };
        match sent.await {
            Ok(mut events) => {
                while let Some(event) = events.next().await {
                    if report.send(event).await.is_err() {
                        return;
                    }
                }
            }
            // Nobody is left to be told where this fails.
            Err(error) => drop(report.send(Err(error)).await),
        }
    });
    let events = futures_util::stream::poll_fn(move |cx| events.poll_recv(cx));
    progress::show(Box::pin(events), quiet).await
}

/// Has the layers of an image go from one node to another that lacks them, and nothing more: what `vistara bench mesh` times.
/// Gives the image's parts, to be put together there, and how many bytes were on their way.
pub(crate) async fn layers(
    source: &Client,
    target: &Client,
    image: &str,
) -> Result<(ImageParts, u64), Failure> {
    let parts = source.image_parts(image).await?;
    let wanted = Cargo::Image(&parts).lacking(target).await?;
    let lacking = (wanted.iter())
        .map(|layer| layer.bytes.saturating_sub(layer.have_bytes))
        .sum();
    let sources = Arc::new(Sources::of([("the source".to_owned(), source.clone())]));
    let (report, _events) = mpsc::channel(EVENTS_MAX);
    send_all(&sources, target, &parts, wanted, &report).await?;
    Ok((parts, lacking))
}

/// Gets a snapshot for a node, the local one or another, from this one or from `from`, with its image where that lacks.
pub(crate) async fn fetch_snapshot(
    target: &Client,
    snapshot: &str,
    from: Option<&str>,
    name: Option<&str>,
    quiet: bool,
) -> Result<Snapshot, Failure> {
    let local = target.local();
    let (called, source) = match (from, target.node()) {
        (Some(node), _) => (node.to_owned(), local.on(node)),
        (None, Some(_)) => ("here".to_owned(), local),
        (None, None) => {
            return Err(Failure::new("from which node?").hint(
                "vistara snapshot fetch --from NODE …; or, to give one of this node's: vistara --on NODE snapshot fetch …",
            ));
        }
    };
    let mut packed = source.pack_snapshot(snapshot).await?;
    if let Some(name) = name {
        packed.name = Some(name.to_owned());
    }
    if target.image(&packed.image_id).await.is_err() {
        let sources = vec![(called.clone(), source.clone())];
        transfer(target, &packed.image_id, sources, quiet).await?;
    }
    let cargo = Cargo::Snapshot(&packed);
    let (report, events) = mpsc::channel(EVENTS_MAX);
    let shown = tokio::spawn(progress::show_parts(events, quiet));
    for file in cargo.lacking(target).await? {
        if !quiet {
            eprint_line(&format!(
                "{} from {}",
                vistara_model::Bytes(file.bytes.saturating_sub(file.have_bytes)),
                visible(&called, false)
            ));
        }
        let sources = Arc::new(Sources::of([(called.clone(), source.clone())]));
        send_layer(&sources, target, cargo, file, &report).await?;
    }
    drop(report);
    // What it showed is no part of the outcome.
    let _ = shown.await;
    Ok(target.import_snapshot(&packed).await?)
}

/// Gives another node an image that this one has; none where this one has it not.
pub(crate) async fn send_own(
    target: &Client,
    image: &str,
    quiet: bool,
) -> Result<Option<Image>, Failure> {
    let local = target.local();
    match local.image(image).await {
        Ok(_) => {}
        Err(error) => {
            return match error.body().map(|body| body.kind) {
                Some(ErrorKind::ImageNotFound | ErrorKind::NotFound | ErrorKind::User) => Ok(None),
                _ => Err(error.into()),
            };
        }
    }
    let sources = vec![("here".to_owned(), local)];
    transfer(target, image, sources, quiet).await.map(Some)
}

/// Gets an image for a node, the local one or another, from these nodes, or from all that have it.
pub(crate) async fn fetch(
    target: &Client,
    image: &str,
    from: &[String],
    quiet: bool,
) -> Result<Image, Failure> {
    let local = target.local();
    let sources = if from.is_empty() {
        let mut sources = others(&local, target).await?;
        if target.node().is_some() {
            sources.insert(0, ("here".to_owned(), local));
        }
        sources
    } else {
        (from.iter())
            .map(|node| (node.clone(), local.on(node.clone())))
            .collect()
    };
    transfer(target, image, sources, quiet).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_api::LayerPart;

    fn layer(digest: &str, bytes: u64, have_bytes: u64) -> WantedLayer {
        WantedLayer {
            digest: digest.to_owned(),
            bytes,
            have_bytes,
        }
    }

    #[test]
    fn a_whole_id_that_was_typed_is_what_the_source_must_give() {
        let id = format!("sha256:{}", "ab".repeat(32));
        assert!(is_asked(&id, &id));
        assert!(is_asked("sha256:abab", &id));
        assert!(is_asked("debian", &id), "names say nothing of the id");
        assert!(!is_asked(&"cd".repeat(32), &id));
        assert!(!is_asked("sha256:cd", &id));
    }

    #[test]
    fn of_a_sources_names_only_the_one_that_was_typed_is_kept() {
        let names = ["docker.io/library/debian:latest", "docker.io/library/own:1"];
        let names = names.map(str::to_owned);
        assert_eq!(asked_names("debian", &names), names[..1]);
        assert!(asked_names("other", &names).is_empty());
    }

    #[test]
    fn a_node_gets_no_layer_that_was_not_offered() {
        let parts = ImageParts {
            id: String::new(),
            names: Vec::new(),
            config: String::new(),
            manifest: None,
            layers: vec![LayerPart {
                digest: "a".to_owned(),
                bytes: 10,
            }],
        };
        let wanted = vec![
            layer("secret", 10, 0),
            layer("a", 11, 0),
            layer("a", 10, 11),
            layer("a", 10, 3),
            layer("a", 10, 0),
        ];
        let kept = offered(&parts, wanted);
        assert_eq!(kept.len(), 1);
        assert_eq!((kept[0].bytes, kept[0].have_bytes), (10, 3));
    }
}
