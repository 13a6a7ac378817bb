//! Images made to do harm. Each is refused with an error that says why, and leaves nothing in the store.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod support;

use serde_json::json;
use support::{
    CONFIG, Head, INDEX, MANIFEST, Made, Tar, contents, descriptor, gzip, gzipped, image, import,
    plain, sha, small,
};
use vistara_image::{ErrorKind, ImageStore, Limits, ProgressSink, Refusal};

async fn refused_with(made: &Made, limits: Limits, says: &str) {
    let directory = tempfile::tempdir().unwrap();
    let layout = made.layout(directory.path());
    // `import` asserts that nothing was left.
    let error = import(&layout, limits).await.map(|_| ()).unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Refused,
        "{}",
        support::chain(&error)
    );
    let text = support::chain(&error);
    assert!(text.contains(says), "{text:?} does not say {says:?}");
}

async fn layers_refused(tars: Vec<Vec<u8>>, says: &str) {
    let layers: Vec<_> = tars.into_iter().map(plain).collect();
    refused_with(&image(&layers), small(), says).await;
}

async fn refused(tar: Tar, says: &str) {
    layers_refused(vec![tar.end()], says).await;
}

#[tokio::test]
async fn a_path_with_dot_dot_is_refused() {
    refused(
        Tar::new().file("a/../../etc/passwd", b"x"),
        "leads out of the image",
    )
    .await;
}

#[tokio::test]
async fn an_absolute_path_is_refused() {
    refused(Tar::new().file("/etc/passwd", b"x"), "is an absolute path").await;
}

#[tokio::test]
async fn a_path_through_an_absolute_link_of_its_own_layer_is_refused() {
    refused(
        Tar::new().symlink("x", "/etc").file("x/passwd", b"x"),
        "goes through an absolute link of its own layer",
    )
    .await;
}

#[tokio::test]
async fn a_path_through_a_link_that_climbs_above_the_root_is_refused() {
    refused(
        Tar::new().symlink("x", "../../etc").file("x/passwd", b"x"),
        "leads out of the image through a link",
    )
    .await;
    layers_refused(
        vec![
            Tar::new().dir("a").symlink("a/x", "../../..").end(),
            Tar::new().file("a/x/passwd", b"x").end(),
        ],
        "leads out of the image through a link",
    )
    .await;
}

#[tokio::test]
async fn a_path_through_a_loop_of_links_is_refused() {
    refused(
        Tar::new()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/x", b"x"),
        "goes through too many links",
    )
    .await;
}

#[tokio::test]
async fn a_path_below_a_file_is_refused() {
    refused(
        Tar::new().file("a", b"x").file("a/b", b"x"),
        "lies below something that is no directory",
    )
    .await;
}

#[tokio::test]
async fn a_hard_link_to_something_outside_is_refused() {
    refused(
        Tar::new().hard_link("x", "../../etc/shadow"),
        "hard link to something outside",
    )
    .await;
}

#[tokio::test]
async fn a_hard_link_to_something_missing_is_refused_even_if_the_host_has_it() {
    refused(
        Tar::new().hard_link("x", "/etc/passwd"),
        "hard link to something missing",
    )
    .await;
}

#[tokio::test]
async fn a_hard_link_to_a_directory_is_refused() {
    refused(
        Tar::new().dir("d").hard_link("x", "d"),
        "hard link to a directory",
    )
    .await;
    refused(Tar::new().hard_link("x", "./"), "hard link to a directory").await;
}

#[tokio::test]
async fn a_hard_link_to_itself_is_refused() {
    refused(
        Tar::new().file("x", b"1").hard_link("x", "x"),
        "hard link to itself",
    )
    .await;
}

#[tokio::test]
async fn a_whiteout_that_leaves_the_image_is_refused() {
    refused(Tar::new().file("../.wh.etc", b""), "leads out of the image").await;
    refused(Tar::new().file("a/.wh...", b""), "is a whiteout of no name").await;
    refused(Tar::new().file("a/.wh.", b""), "is a whiteout of no name").await;
    refused(Tar::new().file(".wh.a/b", b""), "lies below a whiteout").await;
}

#[tokio::test]
async fn a_file_in_the_place_of_the_root_directory_is_refused() {
    refused(
        Tar::new().file("./", b"x"),
        "would replace the root directory",
    )
    .await;
}

#[tokio::test]
async fn a_gzip_bomb_is_refused() {
    let tar = Tar::new().file("zeros", &vec![0; 4 << 20]).end();
    refused_with(
        &image(&[gzipped(&tar)]),
        small(),
        "as a decompression bomb does",
    )
    .await;
}

#[tokio::test]
async fn a_zstd_bomb_is_refused() {
    let tar = Tar::new().file("zeros", &vec![0; 4 << 20]).end();
    let mut layer = plain(tar.clone());
    layer.media_type = support::ZSTD.to_owned();
    layer.blob = zstd::encode_all(&tar[..], 3).unwrap();
    refused_with(&image(&[layer]), small(), "as a decompression bomb does").await;
}

#[tokio::test]
async fn layers_that_are_too_large_together_are_refused() {
    let tar = |name: &str| {
        // Hexadecimal digits pack to half their size: the blobs alone are within the bound.
        let noise: String = support::noise(1, 3 << 19)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        gzipped(&Tar::new().file(name, noise.as_bytes()).end())
    };
    let layers = [tar("a"), tar("b"), tar("c")];
    let limits = Limits {
        bomb_ratio_max: 1 << 40,
        ..small()
    };
    refused_with(&image(&layers), limits, "8388608 bytes uncompressed").await;
}

#[tokio::test]
async fn a_sparse_file_is_refused() {
    let old = Tar::new().entry("sparse", b'S', "", b"");
    refused(old, "a file is sparse").await;
    let new = Tar::new()
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.realsize", b"99999999999999"),
        ])
        .file("sparse", b"x");
    refused(new, "a file is sparse").await;
}

#[tokio::test]
async fn too_many_entries_are_refused() {
    let tar = (0..1001).fold(Tar::new(), |tar, n| tar.file(&format!("f{n}"), b""));
    refused(tar, "more than 1000 files and directories").await;
}

#[tokio::test]
async fn too_many_implied_directories_are_refused() {
    let tar = (0..50).fold(Tar::new(), |tar, n| {
        tar.file(&format!("{n}/{}x", "d/".repeat(30)), b"")
    });
    refused(tar, "more than 1000 files and directories").await;
}

#[tokio::test]
async fn too_deep_a_path_is_refused_also_when_links_make_it_deep() {
    let deep = "d/".repeat(300);
    let tar = Tar::new()
        .pax(&[("path", format!("{deep}x").as_bytes())])
        .file("x", b"");
    refused(tar, "256 directories in one path").await;
    let half = "d/".repeat(200);
    let tar = Tar::new()
        .pax(&[("path", format!("{half}x").as_bytes())])
        .file("x", b"")
        .pax(&[("linkpath", half.as_bytes())])
        .symlink("l", "")
        .pax(&[("path", format!("l/{}x", "e/".repeat(100)).as_bytes())])
        .file("x", b"");
    refused(tar, "256 directories in one path").await;
}

#[tokio::test]
async fn too_long_a_path_and_too_long_a_name_are_refused() {
    let tar = Tar::new().pax(&[("path", &[b'a'; 5000])]).file("x", b"");
    refused(tar, "4096 bytes in one path").await;
    let tar = Tar::new().pax(&[("path", &[b'a'; 256])]).file("x", b"");
    refused(tar, "a name of more than 255 bytes").await;
}

#[tokio::test]
async fn names_that_would_fill_the_memory_are_refused_before_they_are_all_read() {
    const SAYS: &str = "more than 100000 bytes of paths, link targets and extended attributes";
    // Each ends with something that is refused for itself: it is not reached.
    let path = |n: usize| format!("{}{n}", "d/".repeat(100));
    let paths = (0..600).fold(Tar::new(), |tar, n| {
        tar.pax(&[("path", path(n).as_bytes())]).file("x", b"")
    });
    refused(paths.file("../x", b""), SAYS).await;
    let links = (0..30).fold(Tar::new(), |tar, n| {
        tar.pax(&[("linkpath", &[b'a'; 4000])])
            .symlink(&format!("l{n}"), "")
    });
    refused(links.file("../x", b""), SAYS).await;
    // Attributes that no disk would get, and tiny ones: many to a header.
    let dropped = (0..130).fold(Tar::new(), |tar, n| {
        tar.pax(&[("SCHILY.xattr.system.x", &[1; 900])])
            .file(&format!("f{n}"), b"")
    });
    refused(dropped.file("../x", b""), SAYS).await;
    let keys: Vec<String> = (0..1100).map(|n| format!("SCHILY.xattr.{n}")).collect();
    let records: Vec<(&str, &[u8])> = keys.iter().map(|key| (key.as_str(), &b""[..])).collect();
    refused(
        Tar::new().pax(&records).file("x", b"").file("../x", b""),
        SAYS,
    )
    .await;
}

#[tokio::test]
async fn the_names_of_all_layers_count_together() {
    let layer = |first: usize| {
        (first..first + 15)
            .fold(Tar::new(), |tar, n| {
                tar.pax(&[("linkpath", &[b'a'; 4000])])
                    .symlink(&format!("l{n}"), "")
            })
            .end()
    };
    layers_refused(
        vec![layer(0), layer(100)],
        "more than 100000 bytes of paths, link targets",
    )
    .await;
}

#[tokio::test]
async fn directories_that_are_made_and_hidden_again_count_with_their_names() {
    let target = vec!["n".repeat(250); 10].join("/");
    let tar = Tar::new()
        .pax(&[("linkpath", target.as_bytes())])
        .symlink("l", "");
    let tar = (0..60).fold(tar, |tar, n| {
        tar.file(&format!("l/{n}"), b"")
            .pax(&[("path", &target.as_bytes()[..250])])
            .file("x", b"")
            .pax(&[("path", &target.as_bytes()[..250])])
            .dir("x")
    });
    refused(tar, "more than 100000 bytes of names").await;
}

#[tokio::test]
async fn a_layer_that_is_not_what_its_digest_says_is_refused() {
    let mut made = image(&[plain(Tar::new().file("a", b"1").end())]);
    let digest = sha(&made.layers[0].blob);
    made.blobs.insert(digest, Tar::new().file("a", b"2").end());
    refused_with(&made, small(), "its digest is sha256:").await;
}

#[tokio::test]
async fn a_layer_of_another_size_than_announced_is_refused() {
    let mut made = image(&[plain(Tar::new().file("a", b"1").end())]);
    made.manifest["layers"][0]["size"] = json!(512);
    refused_with(&made, small(), "not the 512 announced").await;
    made.manifest["layers"][0]["size"] = json!(5000);
    refused_with(&made, small(), "not the 5000 announced").await;
}

#[tokio::test]
async fn a_layer_whose_tar_is_not_the_one_of_the_configuration_is_refused() {
    let mut layer = gzipped(&Tar::new().file("a", b"1").end());
    layer.diff_id = sha(b"something else");
    refused_with(&image(&[layer]), small(), "the unpacked layer").await;
}

#[tokio::test]
async fn data_hidden_behind_the_end_of_a_tar_counts_for_its_digest() {
    let tar = Tar::new().file("a", b"1").end();
    let mut layer = plain([&tar[..], b"hidden"].concat());
    layer.diff_id = sha(&tar);
    refused_with(&image(&[layer]), small(), "the unpacked layer").await;
}

#[tokio::test]
async fn unknown_media_types_are_refused() {
    let mut made = image(&[plain(Tar::new().end())]);
    made.manifest["layers"][0]["mediaType"] = json!("application/x-executable");
    refused_with(
        &made,
        small(),
        "\"application/x-executable\" is not supported",
    )
    .await;
    let mut made = image(&[plain(Tar::new().end())]);
    made.manifest["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json");
    refused_with(&made, small(), "helm.config.v1+json\" is not supported").await;
}

#[tokio::test]
async fn a_foreign_layer_is_refused() {
    let mut made = image(&[plain(Tar::new().end())]);
    made.manifest["layers"][0]["mediaType"] =
        json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
    refused_with(&made, small(), "a foreign layer").await;
}

#[tokio::test]
async fn a_manifest_that_is_an_index_at_once_is_refused() {
    let mut made = image(&[plain(Tar::new().end())]);
    made.manifest["manifests"] = json!([]);
    refused_with(&made, small(), "a manifest and an index at once").await;
    let mut made = image(&[plain(Tar::new().end())]);
    made.manifest["mediaType"] = json!(INDEX);
    refused_with(&made, small(), "sent as").await;
}

#[tokio::test]
async fn truncated_compression_is_refused() {
    let tar = Tar::new().file("a", &[7; 10_000]).end();
    let mut layer = gzipped(&tar);
    layer.blob.truncate(layer.blob.len() - 9);
    refused_with(&image(&[layer]), small(), "its compression is broken").await;
    let mut layer = plain(tar.clone());
    layer.media_type = support::ZSTD.to_owned();
    layer.blob = zstd::encode_all(&tar[..], 3).unwrap();
    layer.blob.truncate(layer.blob.len() - 5);
    refused_with(&image(&[layer]), small(), "its compression is broken").await;
}

#[tokio::test]
async fn a_truncated_tar_is_refused() {
    let mut tar = Tar::new().file("a", &[7; 10_000]).0;
    tar.truncate(5000);
    layers_refused(vec![tar.clone()], "it ends within a file").await;
    tar.truncate(300);
    layers_refused(vec![tar], "it ends within a header").await;
}

#[tokio::test]
async fn negative_and_huge_sizes_are_refused() {
    let head = |size: &'static [u8]| Head {
        name: "a",
        flag: b'0',
        link: "",
        size,
        mode: 0o644,
        owner: (0, 0),
        device: (0, 0),
    };
    let negative = Tar::new().raw(&head(&[0xff; 12]), b"");
    refused(negative, "size is negative").await;
    let huge = Tar::new().raw(&head(b"77777777777"), b"");
    refused(huge, "bytes in one file").await;
    let huger = Tar::new().raw(
        &head(&[0x80, 0, 0, 0, 0x7f, 255, 255, 255, 255, 255, 255, 255]),
        b"",
    );
    refused(huger, "bytes in one file").await;
    let broken = Tar::new().raw(&head(b"12x"), b"");
    refused(broken, "a number is malformed").await;
    let pax = Tar::new()
        .pax(&[("size", b"18446744073709551615")])
        .file("a", b"");
    refused(pax, "bytes in one file").await;
}

#[tokio::test]
async fn a_nul_within_a_name_is_refused() {
    let tar = Tar::new().pax(&[("path", b"etc/pass\0wd")]).file("x", b"");
    refused(tar, "a NUL within it").await;
    let tar = Tar::new().pax(&[("linkpath", b"a\0b")]).symlink("x", "");
    refused(tar, "a NUL within it").await;
    refused(
        Tar::new().entry("L", b'L', "", b"a\0b\0").file("x", b""),
        "a NUL within it",
    )
    .await;
}

#[tokio::test]
async fn huge_attributes_are_refused() {
    let tar = Tar::new()
        .pax(&[("SCHILY.xattr.user.x", &[1; 2000])])
        .file("x", b"");
    refused(tar, "1000 bytes in one extended attribute").await;
    let many = (0..40).fold(Tar::new(), |tar, n| {
        tar.pax(&[("SCHILY.xattr.user.x", &[1; 900])])
            .file(&format!("{n}"), b"")
    });
    refused(many, "20000 bytes of extended attributes").await;
    let header = Tar::new()
        .pax(&[("comment", &vec![b'a'; 2 << 20])])
        .file("x", b"");
    refused(header, "bytes in one extended header").await;
}

#[tokio::test]
async fn a_flood_of_devices_is_refused() {
    let tar = (0..11).fold(Tar::new(), |tar, n| tar.device(&format!("d{n}"), (1, n)));
    refused(tar, "more than 10 device nodes").await;
}

#[tokio::test]
async fn malformed_headers_are_refused() {
    let mut tar = Tar::new().file("a", b"1").end();
    tar[0] = b'b';
    layers_refused(vec![tar], "checksum is wrong").await;
    refused(Tar::new().entry("a", b'?', "", b""), "of an unknown type").await;
    refused(
        Tar::new()
            .entry("pax", b'x', "", b"999 path=x\n")
            .file("a", b""),
        "header is malformed",
    )
    .await;
    layers_refused(
        vec![Tar::new().pax(&[("path", b"x")]).end()],
        "ends after an extended header",
    )
    .await;
    layers_refused(
        vec![b"this is no tar at all".repeat(100)],
        "a number is malformed",
    )
    .await;
}

#[tokio::test]
async fn indexes_within_indexes_end() {
    let made = image(&[plain(Tar::new().end())]);
    let manifest = made.manifest.to_string().into_bytes();
    let mut blobs = made.blobs.clone();
    let mut inner = descriptor(MANIFEST, &manifest);
    blobs.insert(sha(&manifest), manifest);
    for _ in 0..10 {
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [inner] });
        let bytes = index.to_string().into_bytes();
        inner = descriptor(INDEX, &bytes);
        blobs.insert(sha(&bytes), bytes);
    }
    let directory = tempfile::tempdir().unwrap();
    let top = json!({ "schemaVersion": 2, "manifests": [inner] });
    let layout = support::write_layout(directory.path(), &blobs, &top);
    let error = import(&layout, small()).await.map(|_| ()).unwrap_err();
    assert!(support::chain(&error).contains("3 indexes within one another"));
}

#[tokio::test]
async fn a_huge_manifest_and_a_huge_configuration_are_refused() {
    let mut made = image(&[plain(Tar::new().end())]);
    made.manifest["annotations"] = json!({ "x": "y".repeat(100_000) });
    refused_with(&made, small(), "65536 bytes in one document").await;
    let mut made = image(&[plain(Tar::new().end())]);
    let mut config = made.config.clone();
    config["comment"] = json!("y".repeat(100_000));
    made.set_config(config);
    refused_with(&made, small(), "65536 bytes of configuration").await;
}

#[tokio::test]
async fn invalid_json_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let layout = image(&[plain(Tar::new().end())]).layout(directory.path());
    for bad in [
        "{",
        "[]",
        "null",
        r#"{"schemaVersion":2,"manifests":{}}"#,
        &"[".repeat(5000),
    ] {
        std::fs::write(layout.join("index.json"), bad).unwrap();
        let error = import(&layout, small()).await.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{bad}");
        assert!(
            support::chain(&error).contains("not the JSON document"),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn schema_one_is_refused_by_name() {
    let mut made = image(&[plain(Tar::new().end())]);
    made.manifest = json!({ "schemaVersion": 1, "name": "x", "fsLayers": [] });
    refused_with(&made, small(), "schema 1").await;
}

#[tokio::test]
async fn a_configuration_with_another_number_of_layers_is_refused() {
    let mut made = image(&[plain(Tar::new().end())]);
    let mut config = made.config.clone();
    config["rootfs"]["diff_ids"] = json!([sha(b"a"), sha(b"b")]);
    made.set_config(config);
    refused_with(&made, small(), "lists 1 layers and its configuration 2").await;
}

#[tokio::test]
async fn too_many_layers_are_refused() {
    let layers = vec![plain(Tar::new().end()); 11];
    refused_with(&image(&layers), small(), "more than 10 layers").await;
}

#[tokio::test]
async fn digests_that_would_be_paths_are_refused() {
    let mut made = image(&[plain(Tar::new().end())]);
    made.manifest["layers"][0]["digest"] = json!("sha256:../../../../etc/passwd");
    refused_with(&made, small(), "not the JSON document").await;
}

#[tokio::test]
async fn a_layout_whose_blobs_are_links_to_host_files_is_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let made = image(&[plain(Tar::new().end())]);
    let layout = made.layout(directory.path());
    let blob = layout
        .join("blobs")
        .join(sha(&made.layers[0].blob).replace(':', "/"));
    std::fs::remove_file(&blob).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &blob).unwrap();
    assert!(import(&layout, small()).await.is_err());
}

#[tokio::test]
async fn a_saved_archive_that_names_files_outside_it_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let tar = directory.path().join("saved.tar");
    let config = image(&[plain(Tar::new().end())]).config.to_string();
    for (layer, config_name) in [
        ("../../../etc/passwd", "c.json"),
        ("l/layer.tar", "/etc/passwd"),
    ] {
        let manifest = json!([{ "Config": config_name, "RepoTags": null, "Layers": [layer] }]);
        let bytes = Tar::new()
            .file("c.json", config.as_bytes())
            .symlink("l/layer.tar", "../../../../etc/passwd")
            .file("manifest.json", manifest.to_string().as_bytes())
            .end();
        std::fs::write(&tar, bytes).unwrap();
        let error = import(&tar, small()).await.map(|_| ()).unwrap_err();
        assert!(
            support::chain(&error).contains("which is not in it"),
            "{}",
            support::chain(&error)
        );
    }
}

#[tokio::test]
async fn a_plain_tar_that_is_cut_at_a_block_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    for (name, packed) in [("a.tar", false), ("a.tgz", true)] {
        let path = directory.path().join(name);
        let tar = Tar::new().dir("usr").file("usr/a", b"1").0;
        std::fs::write(&path, if packed { gzip(&tar) } else { tar }).unwrap();
        let error = import(&path, small()).await.map(|_| ()).unwrap_err();
        assert!(support::chain(&error).contains("no end marker"));
    }
}

#[tokio::test]
async fn a_refused_image_leaves_what_others_share_with_it() {
    if !support::has_packer() {
        return;
    }
    let shared = plain(Tar::new().file("a", b"1").end());
    let evil = plain(Tar::new().file("../x", b"1").end());
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let good = image(std::slice::from_ref(&shared)).layout(directories[0].path());
    let bad = image(&[shared, evil]).layout(directories[1].path());
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path(), small()).unwrap();
    let sink = ProgressSink::none();
    store.import(&good, None, None, &sink).await.unwrap();
    let before = contents(root.path());
    let error = store.import(&bad, None, None, &sink).await.unwrap_err();
    assert!(matches!(
        error,
        vistara_image::ImageError::Refused {
            why: Refusal::Entry { .. },
            ..
        }
    ));
    assert_eq!(before, contents(root.path()));
    let _ = CONFIG;
}
