//! Pulls, from Debian's `docker-registry` and from servers that misbehave.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

#[path = "support/net.rs"]
mod net;
mod support;

use net::{Answer, Daemon, Proxy, answer, answer_image, serve};
use serde_json::json;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use support::{
    INDEX, MANIFEST, Made, Tar, contents, gzipped, has_packer, image, plain, sha, small,
};
use vistara_image::{
    ErrorKind, Image, ImageError, ImageStore, Limits, Progress, ProgressSink, PullOptions,
};
use vistara_model::{Architecture, Bytes, ImageRef};

fn name(address: SocketAddr, rest: &str) -> ImageRef {
    format!("{address}/{rest}").parse().unwrap()
}

fn store(root: &Path) -> ImageStore {
    ImageStore::open(root, small()).unwrap()
}

fn anonymous() -> PullOptions {
    PullOptions {
        anonymous: true,
        ..PullOptions::default()
    }
}

fn sample() -> Made {
    image(&[
        gzipped(&Tar::new().dir("etc").file("etc/hello", b"world").end()),
        plain(
            Tar::new()
                .dir("srv")
                .file("srv/big", &support::noise(1, 2 << 20))
                .end(),
        ),
    ])
}

async fn pull_error(address: SocketAddr, limits: Limits) -> ImageError {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path(), limits).unwrap();
    let before = contents(root.path());
    let error = store
        .pull(&name(address, "a/b:1"), &anonymous(), &ProgressSink::none())
        .await
        .unwrap_err();
    if error.kind() != ErrorKind::Peer {
        assert_eq!(before, contents(root.path()), "something was left behind");
    }
    error
}

#[tokio::test]
async fn an_image_is_pulled_without_credentials_and_a_second_pull_fetches_no_layer() {
    let Some(daemon) = Daemon::start(false).await.filter(|_| has_packer()) else {
        return;
    };
    let proxy = Proxy::start(daemon.address).await;
    let made = sample();
    daemon.push(&made, "team/app", "v1").await;
    let root = tempfile::tempdir().unwrap();
    let store = store(root.path());
    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let log = Arc::clone(&seen);
    let sink = ProgressSink::new(move |progress| log.lock().unwrap().push(progress));
    let name = name(proxy.address, "team/app:v1");
    let pulled = store.pull(&name, &anonymous(), &sink).await.unwrap();
    assert_eq!(pulled.names, std::slice::from_ref(&name));
    assert_eq!(pulled.config.entrypoint, ["/bin/sh", "-c"]);
    assert_eq!(pulled.config.exposed_ports, ["80/tcp"]);
    assert_eq!(pulled.config.stop_signal, "SIGINT");
    assert_eq!(pulled.config.user, "1000:1000");
    assert!(pulled.disk_bytes > 0);
    let reports = seen.lock().unwrap().clone();
    assert_eq!(reports.first(), Some(&Progress::Resolving));
    assert_eq!(reports.last(), Some(&Progress::Done));
    let whole = |report: &Progress| matches!(report, Progress::Layer { done_bytes, total_bytes, .. } if done_bytes == total_bytes);
    assert!(reports.iter().filter(|report| whole(report)).count() >= 2);
    if let Some(listing) = support::listing(&store, &pulled).await {
        assert!(
            listing.contains("/etc/hello")
                && listing.contains("/srv/big")
                && listing.contains("/proc")
        );
    }
    let again = store.pull(&name, &anonymous(), &sink).await.unwrap();
    assert_eq!(again, pulled);
    for layer in &made.layers {
        assert_eq!(proxy.requests_of(&layer.blob).len(), 1);
    }
    for text in [
        name.to_string(),
        pulled.id.to_string(),
        pulled.id.short().to_owned(),
        pulled.manifest.clone().unwrap().to_string(),
    ] {
        assert_eq!(store.find(&text).unwrap().as_ref(), Some(&pulled), "{text}");
    }
    let removed = store.remove(&name.to_string(), &|_| false, false).unwrap();
    assert!(removed.image.is_some() && removed.bytes > 2 << 20 && !removed.deferred);
    let left: Vec<_> = contents(root.path()).into_keys().collect();
    assert_eq!(left, [root.path().join("names.json")]);
}

#[tokio::test]
async fn a_password_from_dockers_configuration_opens_a_registry() {
    let Some(daemon) = Daemon::start(true).await.filter(|_| has_packer()) else {
        return;
    };
    daemon.push(&sample(), "team/app", "v1").await;
    let root = tempfile::tempdir().unwrap();
    let docker = tempfile::tempdir().unwrap();
    let store = store(root.path());
    let name = name(daemon.address, "team/app:v1");
    let sink = ProgressSink::none();
    let error = store.pull(&name, &anonymous(), &sink).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert_eq!(
        error.hint().unwrap(),
        format!("docker login {}", daemon.address)
    );
    let options = PullOptions {
        docker_config: Some(docker.path().to_owned()),
        ..PullOptions::default()
    };
    let write = |auth: &str| {
        let config = json!({ "auths": { daemon.address.to_string(): { "auth": auth } } });
        std::fs::write(docker.path().join("config.json"), config.to_string()).unwrap();
    };
    // user:wrong
    write("dXNlcjp3cm9uZw==");
    let error = store.pull(&name, &options, &sink).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("with the credentials of docker's config.json")
    );
    // user:secret
    write("dXNlcjpzZWNyZXQ=");
    store.pull(&name, &options, &sink).await.unwrap();
}

#[tokio::test]
async fn a_credential_helper_opens_a_registry() {
    let Some(daemon) = Daemon::start(true).await.filter(|_| has_packer()) else {
        return;
    };
    daemon.push(&sample(), "team/app", "v1").await;
    let docker = tempfile::tempdir().unwrap();
    let config = json!({ "credHelpers": { daemon.address.to_string(): "vistaratest" } });
    std::fs::write(docker.path().join("config.json"), config.to_string()).unwrap();
    let helper = docker.path().join("docker-credential-vistaratest");
    std::fs::write(
        &helper,
        "#!/bin/sh\ncat >/dev/null\necho '{\"Username\":\"user\",\"Secret\":\"secret\"}'\n",
    )
    .unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    // Helpers are found by the PATH, which a process must not change under its threads: hence a second one.
    let path = format!(
        "{}:{}",
        docker.path().display(),
        std::env::var("PATH").unwrap()
    );
    let status = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "pulls_with_what_the_environment_says",
            "--ignored",
        ])
        .env("PATH", path)
        .env("DOCKER_CONFIG", docker.path())
        .env("TEST_IMAGE", format!("{}/team/app:v1", daemon.address))
        .status()
        .await
        .unwrap();
    assert!(status.success());
}

#[tokio::test]
#[ignore = "run by the test of credential helpers"]
async fn pulls_with_what_the_environment_says() {
    let root = tempfile::tempdir().unwrap();
    let name = std::env::var("TEST_IMAGE").unwrap().parse().unwrap();
    store(root.path())
        .pull(&name, &PullOptions::default(), &ProgressSink::none())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_download_that_is_cut_goes_on_where_it_stopped() {
    let Some(daemon) = Daemon::start(false).await.filter(|_| has_packer()) else {
        return;
    };
    let made = sample();
    daemon.push(&made, "team/app", "v1").await;
    let proxy = Proxy::start(daemon.address).await;
    proxy.cut_after(1 << 20);
    let root = tempfile::tempdir().unwrap();
    let name = name(proxy.address, "team/app:v1");
    store(root.path())
        .pull(&name, &anonymous(), &ProgressSink::none())
        .await
        .unwrap();
    let requests = proxy.requests_of(&made.layers[1].blob);
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert!(requests[1].contains("range: bytes="), "{requests:?}");
}

#[tokio::test]
async fn a_pull_that_failed_goes_on_where_it_stopped_when_asked_again() {
    let Some(daemon) = Daemon::start(false).await.filter(|_| has_packer()) else {
        return;
    };
    let made = sample();
    daemon.push(&made, "team/app", "v1").await;
    let proxy = Proxy::start(daemon.address).await;
    proxy.cut_after(1 << 20);
    let root = tempfile::tempdir().unwrap();
    let name = name(proxy.address, "team/app:v1");
    let impatient = Limits {
        download_attempts: 1,
        ..small()
    };
    let sink = ProgressSink::none();
    let first = ImageStore::open(root.path(), impatient).unwrap();
    // What came was more than a mebibyte at most once: one attempt is all there is.
    let error = first.pull(&name, &anonymous(), &sink).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Peer, "{error}");
    let partial = root
        .path()
        .join("partial")
        .join(&sha(&made.layers[1].blob)[7..]);
    let kept = std::fs::metadata(&partial).unwrap().len();
    assert!(kept > 0);
    drop(first);
    store(root.path())
        .pull(&name, &anonymous(), &sink)
        .await
        .unwrap();
    let requests = proxy.requests_of(&made.layers[1].blob);
    assert!(
        requests
            .last()
            .unwrap()
            .contains(&format!("range: bytes={kept}-")),
        "{requests:?}"
    );
    assert!(!partial.exists());
}

#[tokio::test]
async fn a_broken_partial_download_is_fetched_anew() {
    let Some(daemon) = Daemon::start(false).await.filter(|_| has_packer()) else {
        return;
    };
    let made = sample();
    daemon.push(&made, "team/app", "v1").await;
    let root = tempfile::tempdir().unwrap();
    let store = store(root.path());
    let partial = root
        .path()
        .join("partial")
        .join(&sha(&made.layers[1].blob)[7..]);
    std::fs::write(&partial, vec![0; 5000]).unwrap();
    store
        .pull(
            &name(daemon.address, "team/app:v1"),
            &anonymous(),
            &ProgressSink::none(),
        )
        .await
        .unwrap();
}

#[tokio::test]
async fn concurrent_pulls_fetch_each_layer_once() {
    let Some(daemon) = Daemon::start(false).await.filter(|_| has_packer()) else {
        return;
    };
    let made = sample();
    let shared = image(&[
        made.layers[1].clone(),
        plain(Tar::new().file("x", b"1").end()),
    ]);
    daemon.push(&made, "team/app", "v1").await;
    daemon.push(&shared, "team/other", "v1").await;
    let proxy = Proxy::start(daemon.address).await;
    let root = tempfile::tempdir().unwrap();
    // Two stores on one directory stand for two processes.
    let (one, two) = (store(root.path()), store(root.path()));
    let (app, other) = (
        name(proxy.address, "team/app:v1"),
        name(proxy.address, "team/other:v1"),
    );
    let (options, sink) = (anonymous(), ProgressSink::none());
    let (a, b, c, d) = tokio::join!(
        one.pull(&app, &options, &sink),
        one.pull(&app, &options, &sink),
        two.pull(&app, &options, &sink),
        two.pull(&other, &options, &sink),
    );
    let images: Vec<Image> = [a, b, c].into_iter().map(Result::unwrap).collect();
    assert!(images.iter().all(|image| image.id == images[0].id));
    d.unwrap();
    for layer in made.layers.iter().chain(&shared.layers) {
        assert_eq!(proxy.requests_of(&layer.blob).len(), 1);
    }
    assert_eq!(one.list().unwrap().len(), 2);
}

#[tokio::test]
async fn what_a_registry_does_not_have_is_not_found() {
    let Some(daemon) = Daemon::start(false).await else {
        return;
    };
    let error = pull_error(daemon.address, small()).await;
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("a/b:1"), "{error}");
}

#[tokio::test]
async fn a_registry_that_cannot_be_reached_is_a_peers_failure() {
    let address = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let error = pull_error(
        address,
        Limits {
            download_attempts: 1,
            ..small()
        },
    )
    .await;
    assert_eq!(error.kind(), ErrorKind::Peer);
    assert!(error.to_string().contains("cannot be reached"), "{error}");
}

#[tokio::test]
async fn a_registry_that_lies_about_a_layer_is_caught() {
    let mut made = sample();
    let digest = sha(&made.layers[0].blob);
    let mut blob = made.layers[0].blob.clone();
    *blob.last_mut().unwrap() ^= 1;
    made.blobs.insert(digest, blob);
    let address = serve(move |head| answer_image(&made, head)).await;
    let error = pull_error(address, small()).await;
    assert!(support::chain(&error).contains("its digest is"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[tokio::test]
async fn a_registry_that_sends_more_than_announced_is_caught() {
    let mut made = sample();
    let digest = sha(&made.layers[0].blob);
    made.blobs
        .get_mut(&digest)
        .unwrap()
        .extend_from_slice(&[0; 100_000]);
    let address = serve(move |head| answer_image(&made, head)).await;
    let error = pull_error(address, small()).await;
    assert!(support::chain(&error).contains("announced"), "{error}");
}

#[tokio::test]
async fn a_registry_that_lies_about_a_pinned_manifest_or_a_configuration_is_caught() {
    let made = sample();
    let mut lying = made.clone();
    let config = lying.manifest["config"]["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    lying.blobs.insert(config, b"{}".to_vec());
    let address = serve(move |head| answer_image(&lying, head)).await;
    let error = pull_error(address, small()).await;
    assert!(
        error.to_string().contains("the configuration of"),
        "{error}"
    );
    let address = serve(move |head| answer_image(&made, head)).await;
    let root = tempfile::tempdir().unwrap();
    let pinned = name(address, &format!("a/b@{}", sha(b"another")));
    let error = store(root.path())
        .pull(&pinned, &anonymous(), &ProgressSink::none())
        .await
        .unwrap_err();
    assert!(support::chain(&error).contains("its digest is"), "{error}");
}

#[tokio::test]
async fn an_endless_manifest_is_cut_off() {
    let address = serve(|_| answer(200, vec![b' '; 1 << 20])).await;
    let error = pull_error(address, small()).await;
    assert!(
        support::chain(&error).contains("65536 bytes in one document"),
        "{error}"
    );
}

#[tokio::test]
async fn a_registry_without_ranges_is_read_from_the_start() {
    if !has_packer() {
        return;
    }
    let made = sample();
    let blob = made.layers[1].blob.clone();
    let address = serve(move |head| answer_image(&made, head)).await;
    let root = tempfile::tempdir().unwrap();
    let store = store(root.path());
    let partial = root.path().join("partial").join(&sha(&blob)[7..]);
    std::fs::write(&partial, &blob[..1000]).unwrap();
    store
        .pull(&name(address, "a/b:1"), &anonymous(), &ProgressSink::none())
        .await
        .unwrap();
}

#[tokio::test]
async fn an_index_is_chosen_from_by_architecture_and_attestations_are_passed_over() {
    if !has_packer() {
        return;
    }
    let made = sample();
    let manifest = made.manifest.to_string();
    let entry = |os: &str, architecture: &str, digest: String| json!({ "mediaType": MANIFEST, "digest": digest, "size": manifest.len(), "platform": { "os": os, "architecture": architecture } });
    let digest = sha(manifest.as_bytes());
    let host = Architecture::host().0;
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [
        entry("unknown", "unknown", sha(b"note")), entry("linux", "s390x", sha(b"no")),
        entry("windows", &host, sha(b"no")), entry("linux", &host, digest.clone()),
    ]});
    let respond = move |head: &str| {
        if head.contains("/manifests/1 ") {
            return Answer {
                headers: vec![("Content-Type", INDEX.to_owned())],
                ..answer(200, index.to_string())
            };
        }
        answer_image(&made, head)
    };
    let address = serve(respond).await;
    let root = tempfile::tempdir().unwrap();
    let store = store(root.path());
    let image = store
        .pull(&name(address, "a/b:1"), &anonymous(), &ProgressSink::none())
        .await
        .unwrap();
    assert_eq!(image.manifest.unwrap().to_string(), digest);
    let options = PullOptions {
        architecture: Some(Architecture("riscv64".into())),
        ..anonymous()
    };
    let error = store
        .pull(&name(address, "a/b:1"), &options, &ProgressSink::none())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Architecture);
    let text = error.to_string();
    assert!(
        text.contains("linux/riscv64") && text.contains("linux/s390x") && !text.contains("unknown"),
        "{text}"
    );
}

#[tokio::test]
async fn a_token_is_fetched_with_the_password_and_shown() {
    if !has_packer() {
        return;
    }
    let made = sample();
    let own: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
    let known = Arc::clone(&own);
    let address = serve(move |head| {
        if head.starts_with("get /token?") {
            let allowed = head.contains("authorization: basic dxnlcjpzzwnyzxq=")
                && head.contains("scope=repository%3aa%2fb%3apull");
            return if allowed {
                answer(200, r#"{"token":"T1"}"#)
            } else {
                answer(401, "")
            };
        }
        if !head.contains("authorization: bearer t1") {
            let realm = known.lock().unwrap().unwrap();
            let challenge = format!(
                "Bearer realm=\"http://{realm}/token\",service=\"s\",scope=\"repository:a/b:pull\""
            );
            return Answer {
                headers: vec![("WWW-Authenticate", challenge)],
                ..answer(401, "")
            };
        }
        answer_image(&made, head)
    })
    .await;
    *own.lock().unwrap() = Some(address);
    let root = tempfile::tempdir().unwrap();
    let docker = tempfile::tempdir().unwrap();
    let config = json!({ "auths": { address.to_string(): { "auth": "dXNlcjpzZWNyZXQ=" } } });
    std::fs::write(docker.path().join("config.json"), config.to_string()).unwrap();
    let options = PullOptions {
        docker_config: Some(docker.path().to_owned()),
        ..PullOptions::default()
    };
    let store = store(root.path());
    store
        .pull(&name(address, "a/b:1"), &options, &ProgressSink::none())
        .await
        .unwrap();
    let error = store
        .pull(&name(address, "a/b:1"), &anonymous(), &ProgressSink::none())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn an_image_larger_than_the_disk_is_refused_before_it_is_fetched() {
    let mut made = sample();
    made.manifest["layers"][0]["size"] = json!(1u64 << 50);
    let address = serve(move |head| answer_image(&made, head)).await;
    let error = pull_error(
        address,
        Limits {
            image_bytes_max: Bytes(1 << 60),
            ..small()
        },
    )
    .await;
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(error.to_string().contains("needed"));
}
