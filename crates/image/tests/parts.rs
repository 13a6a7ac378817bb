//! Images that stores get from one another: what is missing, in pieces, cut off, broken, hostile.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod support;

use bytes::Bytes;
use std::sync::Arc;
use support::{Tar, gzipped, has_packer, image, import, noise, small};
use tokio::sync::mpsc;
use vistara_image::{Admission, ErrorKind, ImageError, ImageStore, Parts, ProgressSink};
use vistara_model::Digest;

const PIECE: usize = 10_000;

async fn send(
    to: &ImageStore,
    digest: &Digest,
    bytes: u64,
    from: u64,
    data: &[u8],
) -> Result<u64, ImageError> {
    let (sender, receiver) = mpsc::channel(1);
    let pieces: Vec<Bytes> = data.chunks(PIECE).map(Bytes::copy_from_slice).collect();
    let sending = tokio::spawn(async move {
        for piece in pieces {
            if sender.send(piece).await.is_err() {
                return;
            }
        }
    });
    let received = to.receive(digest, bytes, from, receiver).await;
    sending.await.unwrap();
    received
}

struct Two {
    roots: [tempfile::TempDir; 2],
    to: ImageStore,
    parts: Parts,
    blobs: Vec<Vec<u8>>,
}

/// An image of two layers in one store, and another store that has the first of them, of another image.
async fn two() -> Option<Two> {
    if !has_packer() {
        return None;
    }
    let base = gzipped(&Tar::new().file("base", &noise(1, 50_000)).end());
    let top = gzipped(&Tar::new().file("top", &noise(2, 50_000)).end());
    let dir = tempfile::tempdir().unwrap();
    let layout = image(&[base.clone(), top.clone()]).layout(dir.path());
    let (from_root, from, whole) = import(&layout, small()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let layout = image(std::slice::from_ref(&base)).layout(dir.path());
    let (to_root, to, _) = import(&layout, small()).await.unwrap();
    let parts = from.parts(&whole).unwrap();
    assert_eq!(parts.id(), whole.id);
    Some(Two {
        roots: [from_root, to_root],
        to,
        parts,
        blobs: vec![base.blob, top.blob],
    })
}

#[tokio::test]
async fn only_what_is_missing_is_taken_and_a_cut_is_gone_on_from() {
    let Some(two) = two().await else { return };
    let missing = two.to.missing(&two.parts).unwrap();
    assert_eq!(missing.len(), 1, "the base layer is there");
    let (digest, data) = (missing[0].digest.clone(), &two.blobs[1]);
    assert_eq!(missing[0].bytes, data.len() as u64);
    let sink = ProgressSink::default();
    let early = two.to.assemble(two.parts.clone(), Vec::new(), &sink).await;
    assert_eq!(early.unwrap_err().kind(), ErrorKind::Refused);

    let half = data.len() / 2;
    let here = send(&two.to, &digest, data.len() as u64, 0, &data[..half]).await;
    assert_eq!(here.unwrap(), half as u64);
    assert_eq!(
        two.to.missing(&two.parts).unwrap()[0].have_bytes,
        half as u64
    );
    // From anywhere else nothing is taken.
    let here = send(&two.to, &digest, data.len() as u64, 7, &data[7..]).await;
    assert_eq!(here.unwrap(), half as u64);
    let here = send(
        &two.to,
        &digest,
        data.len() as u64,
        half as u64,
        &data[half..],
    )
    .await;
    assert_eq!(here.unwrap(), data.len() as u64);
    assert_eq!(two.to.missing(&two.parts).unwrap(), []);

    let name = "sent:1".parse().unwrap();
    let image = (two.to)
        .assemble(two.parts.clone(), vec![name], &sink)
        .await
        .unwrap();
    assert_eq!(image.id, two.parts.id());
    assert!(image.manifest.is_some());
    assert_eq!(two.to.find("sent:1").unwrap().unwrap().id, image.id);
    assert!(two.to.root_disk(&image, &sink).await.unwrap().bytes > 0);
}

#[tokio::test]
async fn garbage_is_refused_and_leaves_nothing() {
    let Some(two) = two().await else { return };
    let missing = two.to.missing(&two.parts).unwrap().remove(0);
    let mut wrong = two.blobs[1].clone();
    wrong[100] ^= 1;
    let refused = send(&two.to, &missing.digest, missing.bytes, 0, &wrong).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(two.to.blob_bytes(&missing.digest), 0);
    let mut long = two.blobs[1].clone();
    long.push(0);
    let refused = send(&two.to, &missing.digest, missing.bytes, 0, &long).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(two.to.blob_bytes(&missing.digest), 0);
}

#[tokio::test]
async fn parts_that_make_no_image_are_refused_before_anything_is_taken() {
    let Some(two) = two().await else { return };
    let sizes = |parts: &mut Parts| parts.layers[0].1 += 1;
    let fewer = |parts: &mut Parts| drop(parts.layers.pop());
    let garbage = |parts: &mut Parts| parts.config = b"{".to_vec();
    let manifest = |parts: &mut Parts| parts.manifest = Some(vec![0xff; 10]);
    let huge = |parts: &mut Parts| parts.layers[0].1 = u64::MAX;
    let changes: [&dyn Fn(&mut Parts); 5] = [&sizes, &fewer, &garbage, &manifest, &huge];
    for (index, change) in changes.into_iter().enumerate() {
        let mut parts = two.parts.clone();
        change(&mut parts);
        let refused = two.to.missing(&parts).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused, "{index}: {refused}");
    }
}

#[tokio::test]
async fn layers_that_hold_something_else_are_taken_away_with_the_image() {
    let Some(two) = two().await else { return };
    // A blob as announced, but not what the configuration says is in it.
    let other = gzipped(&Tar::new().file("other", b"x").end());
    let digest: Digest = support::sha(&other.blob).parse().unwrap();
    let bytes = other.blob.len() as u64;
    let mut parts = two.parts.clone();
    parts.manifest = None;
    parts.layers[1] = (digest.clone(), bytes);
    send(&two.to, &digest, bytes, 0, &other.blob).await.unwrap();
    let refused = (two.to)
        .assemble(parts, Vec::new(), &ProgressSink::default())
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    assert_eq!(two.to.blob_bytes(&digest), 0);
}

#[tokio::test]
async fn nobody_erases_what_arrived_and_a_bad_beginning_is_passed_over() {
    let Some(two) = two().await else { return };
    let missing = two.to.missing(&two.parts).unwrap().remove(0);
    let (digest, bytes, data) = (missing.digest.clone(), missing.bytes, &two.blobs[1]);
    let half = data.len() / 2;
    let sent = send(&two.to, &digest, bytes, 0, &data[..half]).await;
    assert_eq!(sent.unwrap(), half as u64);
    // Another length, nothing, or less from the start: what there is stays.
    assert_eq!(send(&two.to, &digest, 1, 0, &[]).await.unwrap(), 0);
    assert_eq!(send(&two.to, &digest, 1, 1, &[]).await.unwrap(), 0);
    let less = send(&two.to, &digest, bytes, 0, &data[..100]).await;
    assert_eq!(less.unwrap(), half as u64);
    // A wrong end costs that end.
    let wrong = vec![0; data.len() - half];
    let refused = send(&two.to, &digest, bytes, half as u64, &wrong).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(two.to.blob_bytes(&digest), half as u64);
    let wrong = vec![0; data.len()];
    let refused = send(&two.to, &digest, bytes, 0, &wrong).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(two.to.blob_bytes(&digest), half as u64);
    // Somebody's garbage in the beginning: all of it from the start takes its place.
    let garbage = send(&two.to, &digest, bytes, half as u64, &[7; 10]).await;
    assert_eq!(garbage.unwrap(), half as u64 + 10);
    let rest = &data[half + 10..];
    let refused = send(&two.to, &digest, bytes, half as u64 + 10, rest).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused);
    let whole = send(&two.to, &digest, bytes, 0, data).await;
    assert_eq!(whole.unwrap(), bytes);
    assert_eq!(two.to.missing(&two.parts).unwrap(), []);
}

#[derive(Debug, Default)]
struct Guest {
    refuses: bool,
    /// Refuses what is asked for after so many times.
    patience: Option<usize>,
    brought: Vec<Digest>,
    asked: std::sync::Mutex<Vec<(Digest, u64)>>,
    times: std::sync::Mutex<usize>,
}

impl Admission for Guest {
    fn admit(&self, blobs: &[(Digest, u64)], _arrived: bool) -> Result<(), ImageError> {
        self.asked.lock().unwrap().extend_from_slice(blobs);
        let mut times = self.times.lock().unwrap();
        *times += 1;
        match self.refuses || self.patience.is_some_and(|most| *times > most) {
            true => Err(ImageError::NotAdmitted {
                why: "no".to_owned(),
                hint: None,
            }),
            false => Ok(()),
        }
    }

    fn brought(&self, digest: &Digest) -> bool {
        self.brought.contains(digest)
    }
}

#[tokio::test]
async fn a_guest_takes_no_name_away_and_removes_nothing_that_others_brought() {
    let Some(two) = two().await else { return };
    let owners = two.to.list().unwrap().remove(0);
    let names = ["owner:1", "guest:1"].map(|name| name.parse().unwrap());
    two.to.tag(owners.id.as_ref(), &names[0]).unwrap();
    let missing = two.to.missing(&two.parts).unwrap().remove(0);
    let sent = send(&two.to, &missing.digest, missing.bytes, 0, &two.blobs[1]).await;
    assert_eq!(sent.unwrap(), missing.bytes);
    let sink = ProgressSink::default();

    let refusing = Arc::new(Guest {
        refuses: true,
        ..Guest::default()
    });
    let refused = (two.to.for_guest(refusing))
        .assemble(two.parts.clone(), names.to_vec(), &sink)
        .await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Denied);
    assert!(two.to.has_blob(&missing.digest), "it was another's");
    assert!(!two.to.has_blob(&two.parts.id()));

    let guest = Arc::new(Guest::default());
    let store = two.to.for_guest(guest.clone());
    let image = store
        .assemble(two.parts.clone(), names.to_vec(), &sink)
        .await
        .unwrap();
    assert_eq!(image.names, [names[1].clone()]);
    assert_eq!(two.to.get(&names[0]).unwrap().unwrap().id, owners.id);
    let asked = guest.asked.lock().unwrap().clone();
    assert!(asked.iter().any(|(digest, _)| *digest == image.id));
    // The owner takes what name it likes.
    let image = (two.to)
        .assemble(two.parts.clone(), vec![names[0].clone()], &sink)
        .await
        .unwrap();
    assert_eq!(two.to.get(&names[0]).unwrap().unwrap().id, image.id);
}

#[tokio::test]
async fn a_guests_archive_takes_no_name_away_and_goes_again_where_it_is_not_admitted() {
    let Some(two) = two().await else { return };
    let owners = two.to.list().unwrap().remove(0);
    let name = "owner:1".parse().unwrap();
    two.to.tag(owners.id.as_ref(), &name).unwrap();
    let layer = gzipped(&Tar::new().file("guest", &noise(3, 5_000)).end());
    let dir = tempfile::tempdir().unwrap();
    let layout = image(std::slice::from_ref(&layer)).layout(dir.path());
    let digest: Digest = support::sha(&layer.blob).parse().unwrap();
    let sink = ProgressSink::default();
    let refusing = Arc::new(Guest {
        refuses: true,
        ..Guest::default()
    });
    let refused = (two.to.for_guest(refusing))
        .import(&layout, Some(&name), None, &sink)
        .await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Denied);
    assert!(!two.to.has_blob(&digest));
    let guest = Arc::new(Guest::default());
    let imported = (two.to.for_guest(guest.clone()))
        .import(&layout, Some(&name), None, &sink)
        .await
        .unwrap();
    assert!(imported.names.is_empty(), "{:?}", imported.names);
    assert_eq!(two.to.get(&name).unwrap().unwrap().id, owners.id);
    let asked = guest.asked.lock().unwrap().clone();
    assert!(asked.contains(&(digest, layer.blob.len() as u64)));
}

#[tokio::test]
async fn a_guest_is_charged_for_the_disk_that_its_layers_make_once() {
    let Some(two) = two().await else { return };
    let layer = gzipped(&Tar::new().file("guest", &noise(4, 50_000)).end());
    let archive = tempfile::tempdir().unwrap();
    let layout = image(std::slice::from_ref(&layer)).layout(archive.path());
    let sink = ProgressSink::default();
    let dir = two.roots[1].path().join("disks");
    let disks = || std::fs::read_dir(&dir).unwrap().count();
    let before = disks();
    // Its blobs are admitted, and the disk is not: nothing of it stays.
    let refusing = Arc::new(Guest {
        patience: Some(1),
        ..Guest::default()
    });
    let refused = (two.to.for_guest(refusing.clone()))
        .import(&layout, None, None, &sink)
        .await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(disks(), before);
    let asked = refusing.asked.lock().unwrap().clone();
    let (disk, bytes) = asked.last().unwrap().clone();
    assert!(bytes > 50_000, "noise does not shrink: {bytes}");
    assert_eq!(two.to.blob_bytes(&disk), 0);

    let guest = Arc::new(Guest::default());
    let store = two.to.for_guest(guest.clone());
    store.import(&layout, None, None, &sink).await.unwrap();
    assert!(guest.asked.lock().unwrap().contains(&(disk.clone(), bytes)));
    assert_eq!(two.to.blob_bytes(&disk), bytes);
    // Whoever brings the same finds the disk made.
    let again = Arc::new(Guest::default());
    let store = two.to.for_guest(again.clone());
    store.import(&layout, None, None, &sink).await.unwrap();
    let asked = again.asked.lock().unwrap().clone();
    assert!(asked.iter().all(|one| one.0 != disk), "{asked:?}");
}
