//! Registries for tests: Debian's `docker-registry`, a proxy that counts and cuts, and a server that says what it is told.

#![allow(unreachable_pub, reason = "a module of test binaries")]

use crate::support::{MANIFEST, Made, sha};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// `docker-registry` on a loopback port; killed when dropped.
pub struct Daemon {
    child: Child,
    pub address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// `user` with the password `secret`, as `htpasswd -B` writes it.
const HTPASSWD: &str = "user:$2b$04$k7mqw6dimP7A9R2vuKR4ou5caqwg..E6GrnRdPPYLnrzEc49BMsuS\n";

impl Daemon {
    /// Starts one; `None`, said aloud, where it is not installed.
    pub async fn start(auth: bool) -> Option<Daemon> {
        let directory = tempfile::tempdir().unwrap();
        // The daemon does not tell a port of its own choice: ours is free until just before it starts.
        let address = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let root = directory.path().display();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: \"{root}/data\"}}}}\nhttp: {{addr: \"{address}\"}}\n"
        );
        if auth {
            std::fs::write(directory.path().join("htpasswd"), HTPASSWD).unwrap();
            config += &format!("auth: {{htpasswd: {{realm: test, path: \"{root}/htpasswd\"}}}}\n");
        }
        std::fs::write(directory.path().join("config.yml"), config).unwrap();
        let spawned = Command::new("docker-registry")
            .arg("serve")
            .arg(directory.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = spawned else {
            println!("SKIP: docker-registry is not installed (apt-get install docker-registry)");
            return None;
        };
        let daemon = Daemon {
            child,
            address,
            _directory: directory,
        };
        let begun = Instant::now();
        while TcpStream::connect(address).await.is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "docker-registry does not start"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Some(daemon)
    }

    /// Pushes an image.
    pub async fn push(&self, made: &Made, repository: &str, tag: &str) {
        // It wants to be told of TLS even where it uses none.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let client = reqwest::Client::builder()
            .no_proxy()
            .tls_backend_preconfigured(tls)
            .build()
            .unwrap();
        let base = format!("http://{}/v2/{repository}", self.address);
        let auth = |request: reqwest::RequestBuilder| request.basic_auth("user", Some("secret"));
        for (digest, bytes) in &made.blobs {
            let begun = auth(client.post(format!("{base}/blobs/uploads/")))
                .send()
                .await
                .unwrap();
            assert!(begun.status().is_success(), "{begun:?}");
            let location = begun.headers()["location"].to_str().unwrap();
            let put = client
                .put(location)
                .query(&[("digest", digest)])
                .body(bytes.clone());
            let put = auth(put).send().await.unwrap();
            assert!(put.status().is_success(), "{put:?}");
        }
        let put = client
            .put(format!("{base}/manifests/{tag}"))
            .header("content-type", MANIFEST)
            .body(made.manifest.to_string());
        let put = auth(put).send().await.unwrap();
        assert!(put.status().is_success(), "{put:?}");
    }
}

/// A proxy that counts requests by their line, and may cut the line once.
pub struct Proxy {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    budget: Arc<AtomicI64>,
}

impl Proxy {
    pub async fn start(upstream: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            budget: Arc::new(AtomicI64::new(i64::MAX)),
        };
        let (requests, budget) = (Arc::clone(&proxy.requests), Arc::clone(&proxy.budget));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (requests, budget) = (Arc::clone(&requests), Arc::clone(&budget));
                tokio::spawn(async move {
                    let server = TcpStream::connect(upstream).await.unwrap();
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    let up = async {
                        let mut chunk = [0; 16 << 10];
                        let mut text = String::new();
                        while let Ok(got @ 1..) = from_client.read(&mut chunk).await {
                            text.push_str(&String::from_utf8_lossy(&chunk[..got]));
                            while let Some((head, rest)) = text.split_once("\r\n\r\n") {
                                requests.lock().unwrap().push(head.to_lowercase());
                                text = rest.to_owned();
                            }
                            if to_server.write_all(&chunk[..got]).await.is_err() {
                                break;
                            }
                        }
                    };
                    let down = async {
                        let mut chunk = [0; 16 << 10];
                        while let Ok(got @ 1..) = from_server.read(&mut chunk).await {
                            let left = budget.fetch_sub(got as i64, Ordering::SeqCst);
                            if left < got as i64 {
                                budget.store(i64::MAX, Ordering::SeqCst);
                                break;
                            }
                            if to_client.write_all(&chunk[..got]).await.is_err() {
                                break;
                            }
                        }
                    };
                    tokio::select! { () = up => {}, () = down => {} }
                });
            }
        });
        proxy
    }

    /// Cuts the connection that brings the byte after this many.
    pub fn cut_after(&self, bytes: i64) {
        self.budget.store(bytes, Ordering::SeqCst);
    }

    /// Requests for this blob, heads in lower case.
    pub fn requests_of(&self, blob: &[u8]) -> Vec<String> {
        let path = format!("/blobs/{}", sha(blob));
        let requests = self.requests.lock().unwrap();
        requests
            .iter()
            .filter(|it| it.contains(&path))
            .cloned()
            .collect()
    }
}

/// What a scripted server answers.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

pub fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer {
        status,
        headers: Vec::new(),
        body: body.into(),
    }
}

/// Serves what `respond` says to each request head (in lower case).
pub async fn serve(respond: impl Fn(&str) -> Answer + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let respond = Arc::new(respond);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let respond = Arc::clone(&respond);
            tokio::spawn(async move {
                let mut head = Vec::new();
                let mut chunk = [0; 4096];
                while !head.windows(4).any(|window| window == b"\r\n\r\n") {
                    match stream.read(&mut chunk).await {
                        Ok(got @ 1..) => head.extend_from_slice(&chunk[..got]),
                        _ => return,
                    }
                }
                let answer = respond(&String::from_utf8_lossy(&head).to_lowercase());
                let mut text = format!(
                    "HTTP/1.1 {} X\r\nContent-Length: {}\r\nConnection: close\r\n",
                    answer.status,
                    answer.body.len()
                );
                for (name, value) in &answer.headers {
                    text += &format!("{name}: {value}\r\n");
                }
                // The client may have gone; that is its own matter.
                let _ = stream.write_all(format!("{text}\r\n").as_bytes()).await;
                let _ = stream.write_all(&answer.body).await;
            });
        }
    });
    address
}

/// Serves an image's blobs and manifest, whatever the name.
pub fn answer_image(made: &Made, head: &str) -> Answer {
    let path = head.split(' ').nth(1).unwrap_or("");
    let blobs: &BTreeMap<String, Vec<u8>> = &made.blobs;
    let last = path.rsplit('/').next().unwrap_or("");
    if path.contains("/manifests/") {
        let mut answer = answer(200, made.manifest.to_string());
        answer.headers.push(("Content-Type", MANIFEST.to_owned()));
        answer
    } else {
        match blobs.get(last) {
            Some(blob) => answer(200, blob.clone()),
            None => answer(404, "{}"),
        }
    }
}
