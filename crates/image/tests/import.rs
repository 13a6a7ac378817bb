//! Imports of every kind of source, and what is in the root disk afterwards.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod support;

use serde_json::json;
use std::path::Path;
use support::{
    Head, Layer, Made, Tar, ZSTD, contents, gzip, gzipped, has_packer, image, import, plain, sha,
    small,
};
use vistara_image::{ErrorKind, Image, ImageStore, Limits, ProgressSink};
use vistara_model::{Architecture, ImageConfig};

/// Lines of a root disk's listing without the times, which are tested on their own: `mode owner size path`.
async fn listed(layers: &[Layer]) -> Option<Vec<String>> {
    if !has_packer() {
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let layout = image(layers).layout(directory.path());
    let (_root, store, image) = import(&layout, small())
        .await
        .map_err(|it| support::chain(&it))
        .unwrap();
    let listing = support::listing(&store, &image).await?;
    Some(lines(&listing))
}

fn lines(listing: &str) -> Vec<String> {
    listing
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

fn line<'a>(lines: &'a [String], path: &str) -> Option<&'a str> {
    let ends = format!(" {path}");
    let link = format!(" {path} -> ");
    lines
        .iter()
        .find(|line| line.ends_with(&ends) || line.contains(&link))
        .map(String::as_str)
}

#[track_caller]
fn has(lines: &[String], path: &str, begins: &str) {
    let found = line(lines, path).unwrap_or_else(|| panic!("{path} is not in {lines:#?}"));
    assert!(found.starts_with(begins), "{found}");
}

#[track_caller]
fn lacks(lines: &[String], path: &str) {
    assert_eq!(line(lines, path), None, "in {lines:#?}");
}

#[tokio::test]
async fn whiteouts_hide_lower_layers_and_not_their_own() {
    let low = Tar::new()
        .dir("a")
        .file("a/x", b"low")
        .file("a/y", b"low")
        .dir("b")
        .file("b/z", b"low")
        .file("c", b"low");
    let high = Tar::new()
        .file("a/.wh.x", b"")
        .file("a/n", b"new")
        .file(".wh.b", b"")
        .file("b/own", b"1")
        .file(".wh.c", b"")
        .file("c", b"newer");
    let Some(lines) = listed(&[gzipped(&low.end()), plain(high.end())]).await else {
        return;
    };
    lacks(&lines, "/a/x");
    has(&lines, "/a/y", "-rw-r--r-- 0/0 3");
    has(&lines, "/a/n", "-rw");
    lacks(&lines, "/b/z");
    has(&lines, "/b/own", "-rw");
    has(&lines, "/c", "-rw-r--r-- 0/0 5");
    assert!(
        !lines.iter().any(|line| line.contains(".wh.")),
        "{lines:#?}"
    );
}

#[tokio::test]
async fn an_opaque_directory_keeps_only_its_own_layers_files_wherever_the_mark_stands() {
    let low = Tar::new()
        .dir("d")
        .file("d/old", b"1")
        .dir("d/sub")
        .file("d/sub/old", b"1");
    let high = Tar::new()
        .dir("d")
        .file("d/new", b"1")
        .file("d/.wh..wh..opq", b"");
    let Some(lines) = listed(&[plain(low.end()), plain(high.end())]).await else {
        return;
    };
    has(&lines, "/d/new", "-rw");
    lacks(&lines, "/d/old");
    lacks(&lines, "/d/sub");
}

#[tokio::test]
async fn a_later_layer_may_change_what_a_name_is() {
    let low = Tar::new()
        .dir("a")
        .file("a/x", b"1")
        .file("b", b"1")
        .symlink("c", "a")
        .dir("d");
    let high = Tar::new()
        .file("a", b"22")
        .dir("b")
        .file("b/y", b"1")
        .dir("c")
        .symlink("d", "b");
    let Some(lines) = listed(&[plain(low.end()), plain(high.end())]).await else {
        return;
    };
    has(&lines, "/a", "-rw-r--r-- 0/0 2");
    lacks(&lines, "/a/x");
    has(&lines, "/b", "drwxr-xr-x");
    has(&lines, "/b/y", "-rw");
    has(&lines, "/c", "drwx");
    has(&lines, "/d", "lrwx");
}

#[tokio::test]
async fn a_file_below_a_lower_layers_link_lands_where_the_link_points() {
    let low = Tar::new()
        .dir("usr/lib")
        .symlink("lib", "usr/lib")
        .symlink("run", "/var/run");
    let high = Tar::new()
        .file("lib/x", b"1")
        .file("run/pid", b"1")
        .file("lib/.wh.none", b"");
    let Some(lines) = listed(&[plain(low.end()), plain(high.end())]).await else {
        return;
    };
    has(&lines, "/usr/lib/x", "-rw");
    has(&lines, "/lib", "lrwx");
    has(&lines, "/var/run/pid", "-rw");
}

#[tokio::test]
async fn of_duplicate_entries_the_last_wins() {
    let tar = Tar::new()
        .file("a", b"1")
        .file("a", b"22")
        .file("./a", b"333");
    let Some(lines) = listed(&[plain(tar.end())]).await else {
        return;
    };
    has(&lines, "/a", "-rw-r--r-- 0/0 3");
}

#[tokio::test]
async fn mount_points_are_made_where_they_are_missing_and_left_where_they_are_not() {
    let tar = Tar::new().symlink("run", "var/run").dir("etc");
    let Some(lines) = listed(&[plain(tar.end())]).await else {
        return;
    };
    has(&lines, "/tmp", "drwxrwxrwt 0/0");
    has(&lines, "/proc", "dr-xr-xr-x 0/0");
    for path in ["/sys", "/dev", "/etc"] {
        has(&lines, path, "d");
    }
    has(&lines, "/run", "lrwx");
    let Some(lines) = listed(&[]).await else {
        return;
    };
    has(&lines, "/dev", "d");
}

#[tokio::test]
async fn owners_modes_devices_long_names_attributes_and_hard_links_survive() {
    if !has_packer() {
        return;
    }
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(250));
    let head = |name: &'static str, flag: u8, device: (u32, u32)| Head {
        name,
        flag,
        link: "",
        size: b"0",
        mode: 0o4755,
        owner: (1234, 70_000),
        device,
    };
    let low = Tar::new()
        .raw(&head("./", b'5', (0, 0)), b"")
        .raw(&head("suid", b'0', (0, 0)), b"")
        .raw(&head("char", b'3', (5, 1)), b"")
        .raw(&head("block", b'4', (259, 1000)), b"")
        .entry("pipe", b'6', "", b"")
        .pax(&[("path", long.as_bytes())])
        .file("x", b"long")
        .pax(&[("linkpath", long.as_bytes())])
        .symlink("to-long", "")
        .pax(&[("uid", b"4000000000"), ("gid", b"3000000000")])
        .file("far", b"1")
        .pax(&[
            ("SCHILY.xattr.user.note", b"hello\0\nworld"),
            (
                "SCHILY.xattr.security.capability",
                b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            ),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ])
        .file("noted", b"1")
        .file("one", b"shared data")
        .hard_link("two", "one")
        .pax(&[("path", "naïve\nname".as_bytes())])
        .file("x", b"1");
    let high = Tar::new()
        .hard_link("three", "./one")
        .dir("z")
        .hard_link("z/four", "/three")
        .file("one", b"changed");
    let directory = tempfile::tempdir().unwrap();
    let layout = image(&[gzipped(&low.end()), gzipped(&high.end())]).layout(directory.path());
    let (_root, store, image) = import(&layout, small())
        .await
        .map_err(|it| support::chain(&it))
        .unwrap();
    let Some(listing) = support::listing(&store, &image).await else {
        return;
    };
    let lines = lines(&listing);
    has(&lines, "/suid", "-rwsr-xr-x 1234/70000");
    has(&lines, "/char", "crwsr-xr-x 1234/70000 5, 1");
    // 259, 1000: the lister shows the upper bits of a minor number, which lie above the major's, with the major.
    has(&lines, "/block", "brwsr-xr-x 1234/70000 12547,232");
    has(&lines, "/pipe", "prw-r--r--");
    has(&lines, &format!("/{long}"), "-rw-r--r-- 0/0 4");
    has(&lines, &format!("/to-long -> {long}"), "lrwx");
    has(&lines, "/far", "-rw-r--r-- 4000000000/3000000000");
    has(&lines, "/one", "-rw-r--r-- 0/0 7");
    // The root directory's own owner and time, which the packer loses.
    assert!(
        lines[0].starts_with("drwsr-xr-x 1234/70000") && lines[0].contains("1970-01-01"),
        "{}",
        lines[0]
    );
    let disk = store
        .root_disk(&image, &ProgressSink::none())
        .await
        .unwrap();
    // Reading back needs no privileges but for devices, hence a choice of names.
    let out = directory.path().join("out");
    let status = std::process::Command::new("unsquashfs")
        .args(["-no-progress", "-quiet", "-user-xattrs", "-d"])
        .arg(&out)
        .arg(&disk.path)
        .args(["two", "three", "z", "noted"])
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    use std::os::unix::fs::MetadataExt;
    let two = std::fs::metadata(out.join("two")).unwrap();
    assert_eq!((two.nlink(), two.len()), (3, 11));
    assert_eq!(
        two.ino(),
        std::fs::metadata(out.join("z/four")).unwrap().ino()
    );
    let mut value = [0; 64];
    match rustix::fs::getxattr(out.join("noted"), "user.note", &mut value[..]) {
        Ok(length) => assert_eq!(&value[..length], b"hello\0\nworld"),
        Err(error) => println!("SKIP: attributes cannot be read back here: {error}"),
    }
}

#[tokio::test]
async fn the_same_layers_give_the_same_disk_to_the_byte() {
    if !has_packer() {
        return;
    }
    let tar = Tar::new()
        .dir("a")
        .file("a/b", &[1; 300_000])
        .file("c", b"1")
        .symlink("d", "c")
        .end();
    let mut digests = Vec::new();
    for layer in [plain(tar.clone()), gzipped(&tar)] {
        let directory = tempfile::tempdir().unwrap();
        let layout = image(&[layer]).layout(directory.path());
        let (_root, store, image) = import(&layout, small()).await.unwrap();
        let disk = store
            .root_disk(&image, &ProgressSink::none())
            .await
            .unwrap();
        digests.push((
            disk.path.file_name().unwrap().to_owned(),
            sha(&std::fs::read(&disk.path).unwrap()),
        ));
        // Times are whole seconds: the second disk is to be made in another one.
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    }
    assert_eq!(digests[0], digests[1]);
}

fn saved(made: &Made, tags: &serde_json::Value) -> Vec<u8> {
    let config = made.config.to_string().into_bytes();
    let config_name = format!("{}.json", &sha(&config)[7..]);
    let mut tar = Tar::new().file(&config_name, &config);
    let mut names = Vec::new();
    for (n, layer) in made.layers.iter().enumerate() {
        let name = format!("{n}/layer.tar");
        // As docker of old did when two layers are the same.
        let first = made
            .layers
            .iter()
            .position(|it| it.diff_id == layer.diff_id)
            .unwrap();
        tar = if first == n {
            tar.file(&name, &layer.blob)
        } else {
            tar.symlink(&name, &format!("../{first}/layer.tar"))
        };
        names.push(name);
    }
    let manifest = json!([{ "Config": config_name, "RepoTags": tags, "Layers": names }]);
    tar.file("manifest.json", manifest.to_string().as_bytes())
        .end()
}

async fn import_bytes(bytes: &[u8], limits: Limits) -> (tempfile::TempDir, ImageStore, Image) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("source");
    std::fs::write(&path, bytes).unwrap();
    import(&path, limits)
        .await
        .map_err(|it| support::chain(&it))
        .unwrap()
}

#[tokio::test]
async fn a_saved_archive_is_imported_plain_and_packed_with_its_names() {
    if !has_packer() {
        return;
    }
    let layer = plain(Tar::new().file("hello", b"1").end());
    let made = image(&[
        layer.clone(),
        plain(Tar::new().file("x", b"2").end()),
        layer,
    ]);
    let bytes = saved(&made, &json!(["team/app:v1", "team/app:v2"]));
    for bytes in [
        bytes.clone(),
        gzip(&bytes),
        zstd::encode_all(&bytes[..], 3).unwrap(),
    ] {
        let (root, store, image) = import_bytes(&bytes, small()).await;
        let names: Vec<String> = image.names.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["docker.io/team/app:v1", "docker.io/team/app:v2"]);
        assert_eq!(image.config.working_dir, "/srv");
        assert_eq!(store.find("team/app:v2").unwrap().unwrap().id, image.id);
        let tmp = root.path().join("tmp");
        assert!(
            !contents(root.path())
                .keys()
                .any(|path| path.starts_with(&tmp))
        );
    }
}

#[tokio::test]
async fn an_oci_layout_is_imported_as_directory_and_as_tar_with_each_compression() {
    if !has_packer() {
        return;
    }
    let tar = Tar::new().file("hello", b"1").end();
    let zstd_layer = Layer {
        media_type: ZSTD.to_owned(),
        diff_id: sha(&tar),
        blob: zstd::encode_all(&tar[..], 3).unwrap(),
    };
    let made = image(&[
        gzipped(&Tar::new().dir("a").end()),
        zstd_layer,
        plain(Tar::new().file("y", b"2").end()),
    ]);
    let directory = tempfile::tempdir().unwrap();
    let layout = made.layout(directory.path());
    let (_root, _store, from_directory) = import(&layout, small()).await.unwrap();
    assert!(from_directory.manifest.is_some());
    let mut packed = Tar::new();
    for (path, _) in contents(&layout) {
        let name = path
            .strip_prefix(&layout)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        packed = packed.file(&format!("./{name}"), &std::fs::read(&path).unwrap());
    }
    let packed = packed.end();
    for bytes in [packed.clone(), gzip(&packed)] {
        let (_root, _store, from_tar) = import_bytes(&bytes, small()).await;
        assert_eq!(from_tar, from_directory);
    }
}

#[tokio::test]
async fn a_plain_root_file_system_is_imported_with_a_given_configuration() {
    if !has_packer() {
        return;
    }
    let tar = Tar::new()
        .dir("./")
        .dir("./usr")
        .file("./usr/hello", b"1")
        .end();
    let directory = tempfile::tempdir().unwrap();
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path(), small()).unwrap();
    let sink = ProgressSink::none();
    let config = ImageConfig {
        cmd: vec!["/usr/hello".into()],
        ..ImageConfig::default()
    };
    for (n, bytes) in [
        tar.clone(),
        gzip(&tar),
        zstd::encode_all(&tar[..], 3).unwrap(),
    ]
    .iter()
    .enumerate()
    {
        let path = directory.path().join("root");
        std::fs::write(&path, bytes).unwrap();
        let name = format!("mine:{n}").parse().unwrap();
        let image = store
            .import(&path, Some(&name), Some(config.clone()), &sink)
            .await
            .unwrap();
        assert_eq!(image.config, config);
        assert_eq!(image.architecture, Architecture::host());
        assert!(image.names.contains(&name));
    }
    // One disk for all three, since they unpack to the same tar.
    assert_eq!(
        std::fs::read_dir(root.path().join("disks"))
            .unwrap()
            .count(),
        1
    );
    let saved = directory.path().join("saved");
    std::fs::write(&saved, self::saved(&image(&[plain(tar)]), &json!(null))).unwrap();
    let error = store
        .import(&saved, None, Some(config), &sink)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::User);
}

#[tokio::test]
async fn what_cannot_be_imported_is_refused_with_advice() {
    let directory = tempfile::tempdir().unwrap();
    let error = import(directory.path(), small())
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::User);
    assert!(
        error.to_string().contains("tar -C DIR -cf FILE ."),
        "{error}"
    );
    let error = import(Path::new("/dev/null"), small())
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::User);
    let error = import(Path::new("/no/such/file"), small())
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Host);
}

#[tokio::test]
async fn an_image_for_another_processor_is_refused_with_what_it_is_for() {
    let mut made = image(&[plain(Tar::new().end())]);
    let mut config = made.config.clone();
    config["architecture"] = json!("s390x");
    made.set_config(config);
    let directory = tempfile::tempdir().unwrap();
    let error = import(&made.layout(directory.path()), small())
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Architecture);
    assert!(
        error.to_string().contains("only for linux/s390x"),
        "{error}"
    );
}

#[tokio::test]
async fn names_are_given_taken_and_removed() {
    if !has_packer() {
        return;
    }
    let (root, store, image) = import_bytes(
        &saved(
            &image(&[plain(Tar::new().file("a", b"1").end())]),
            &json!(["a:1"]),
        ),
        small(),
    )
    .await;
    let id = image.id.to_string();
    store.tag("a:1", &"b:2".parse().unwrap()).unwrap();
    assert_eq!(
        store.find(image.id.short()).unwrap().unwrap().names.len(),
        2
    );
    let error = store.remove(&id, &|_| false, false).unwrap_err();
    assert!(error.to_string().contains("several names"), "{error}");
    assert_eq!(store.remove("a:1", &|_| true, false).unwrap().image, None);
    let error = store.remove("b:2", &|_| true, false).unwrap_err();
    assert_eq!(error.hint().as_deref(), Some("vistara ps --all"));
    let forced = store.remove("b:2", &|_| true, true).unwrap();
    assert_eq!((forced.image, forced.names.len()), (None, 1));
    assert_eq!(store.list().unwrap()[0].names, []);
    assert_eq!(store.prune(&|_| true, false).unwrap().images, []);
    let pruned = store.prune(&|_| false, false).unwrap();
    assert_eq!(pruned.images, std::slice::from_ref(&image.id));
    assert!(pruned.bytes > 0 && !pruned.deferred);
    assert_eq!(contents(root.path()).len(), 1);
    assert!(store.find(&id).unwrap().is_none());
    assert_eq!(
        store.remove(&id, &|_| false, false).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn a_missing_disk_is_built_again_and_what_a_crash_left_is_cleared() {
    if !has_packer() {
        return;
    }
    let (root, store, image) = import_bytes(
        &saved(
            &image(&[plain(Tar::new().file("a", b"1").end())]),
            &json!(["a:1"]),
        ),
        small(),
    )
    .await;
    let sink = ProgressSink::none();
    let disk = store.root_disk(&image, &sink).await.unwrap();
    let before = std::fs::read(&disk.path).unwrap();
    std::fs::remove_file(&disk.path).unwrap();
    std::fs::write(root.path().join("tmp/1-2"), b"half").unwrap();
    drop(store);
    let store = ImageStore::open(root.path(), small()).unwrap();
    assert!(!root.path().join("tmp/1-2").exists());
    assert_eq!(store.root_disk(&image, &sink).await.unwrap(), disk);
    assert_eq!(std::fs::read(&disk.path).unwrap(), before);
}

#[tokio::test]
async fn a_record_of_a_newer_version_is_not_guessed_at() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path(), small()).unwrap();
    std::fs::write(root.path().join("names.json"), r#"{"version":99}"#).unwrap();
    let error = store.list().unwrap_err();
    assert!(error.to_string().contains("its version is 99"), "{error}");
}

#[tokio::test]
async fn a_full_disk_is_told_and_nothing_half_made_stays() {
    if !has_packer() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let noise = support::noise(1, 3 << 20);
    for (name, megabytes) in [("blob", 2), ("disk", 4)] {
        // Two MiB do not hold the layer; four hold it and not its disk.
        let made = image(&[plain(Tar::new().file("noise", &noise).end())]);
        let layout = made.layout(&directory.path().join(name));
        let output = std::process::Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-ec"])
            .arg(format!("mkdir -p '{0}/mnt'; mount -t tmpfs -o size={megabytes}m none '{0}/mnt'; exec \"$0\" --exact imports_into_a_small_file_system --ignored --nocapture", directory.path().display()))
            .arg(std::env::current_exe().unwrap())
            .env("TEST_LAYOUT", layout)
            .env("TEST_STORE", directory.path().join("mnt/store"))
            .output();
        match output {
            Ok(output) if String::from_utf8_lossy(&output.stdout).contains("running 1 test") => {
                assert!(output.status.success(), "{output:?}");
            }
            _ => {
                println!("SKIP: no user namespace to mount a small file system in");
                return;
            }
        }
    }
}

#[tokio::test]
#[ignore = "run by the test of full disks"]
async fn imports_into_a_small_file_system() {
    let root = std::path::PathBuf::from(std::env::var("TEST_STORE").unwrap());
    let store = ImageStore::open(&root, small()).unwrap();
    let layout = std::env::var("TEST_LAYOUT").unwrap();
    let error = store
        .import(Path::new(&layout), None, None, &ProgressSink::none())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    assert_eq!(error.hint().as_deref(), Some("vistara images prune --all"));
    assert!(contents(&root).is_empty(), "{:?}", contents(&root));
}
