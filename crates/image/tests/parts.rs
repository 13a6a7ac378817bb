//! Images that stores get from one another: what is missing, in pieces, cut off, broken, hostile.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod support;

use bytes::Bytes;
use support::{Tar, gzipped, has_packer, image, import, noise, small};
use tokio::sync::mpsc;
use vistara_image::{ErrorKind, ImageError, ImageStore, Parts, ProgressSink};
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
    _roots: [tempfile::TempDir; 2],
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
        _roots: [from_root, to_root],
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
