//! `vistara deploy` and `vistara gateway` with real machines: what is printed as a url answers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod http;
mod oci;
mod vm;

use http::Gateway;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use vm::{IMAGE, System, target, text, until};

/// What stands at a url, once something answers there.
fn fetch(url: &str) -> String {
    let address = url.strip_prefix("http://").unwrap();
    let mut found = String::new();
    until(url, || {
        found.clear();
        let Ok(mut stream) = TcpStream::connect(address) else {
            return false;
        };
        // A monitor's network accepts before the guest listens.
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let asked = stream.write_all(b"GET /hello HTTP/1.0\r\n\r\n");
        asked.is_ok() && stream.read_to_string(&mut found).is_ok() && found.contains("200 OK")
    });
    found
}

const SERVE: &str = "echo greeting $WORD > /tmp/hello; cd /tmp; exec python3 -m http.server 8000";

#[test]
fn what_is_deployed_and_what_is_spawned_answers_at_its_url() {
    let Some(system) = System::ready() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hac.toml");
    let write = |word: &str| {
        let start = SERVE.replace("$WORD", word);
        let text = format!(
            "[spacecore]\nname = \"vm deploy\"\ncontainer_image = \"{IMAGE}\"\nbackend = \"containerd\"\n[resources]\ncpu = \"1\"\nmemory = \"256MB\"\n[commands]\nstart = \"{start}\"\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    let deploy = || -> Value {
        let path = file.to_str().unwrap();
        let output = system.vistara(&["deploy", "--json", "-p", "0:8000", path]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    write("one");
    let first = deploy();
    let _removed = system.adopt("vm-deploy");
    assert_eq!(first["state"], "created");
    assert!(fetch(first["url"].as_str().unwrap()).ends_with("greeting one\n"));
    assert_eq!(
        (&deploy()["state"], &deploy()["id"]),
        (&json!("unchanged"), &first["id"])
    );
    write("two");
    let second = deploy();
    assert_eq!(second["state"], "replaced");
    assert!(fetch(second["url"].as_str().unwrap()).ends_with("greeting two\n"));

    // An image that serves by itself, as hypercore's users have them.
    let archive = dir.path().join("app.tar");
    let command = ["sh", "-c", SERVE];
    let image = oci::with_command(&target().join("demo/python3.oci.tar"), &command);
    std::fs::write(&archive, image).unwrap();
    let name = "vistara-test/serves";
    let done = system.vistara(&[
        "images",
        "import",
        archive.to_str().unwrap(),
        "--name",
        name,
    ]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    // One of a run that failed.
    system.vistara(&["gateway", "token", "rm", "vm-deploy"]);
    let token = system.vistara(&["gateway", "token", "create", "vm-deploy"]);
    let token = text(&token.stdout).trim().to_owned();
    let gateway = Gateway::start(system.command(&["gateway", "--listen", "127.0.0.1:0"]));
    let body = json!({
        "cores": 1, "memory": 256, "image_ref": name, "ports": {"443": 8000}, "env": ["WORD=three"],
    });
    let (status, spawned) = gateway.ask(&token, "POST /spawn", &body.to_string());
    assert_eq!(status, 200, "{spawned} {}", gateway.said.lock().unwrap());
    let id = spawned["response"]["id"].as_str().unwrap().to_owned();
    let _removed = system.adopt(&id);
    assert!(fetch(spawned["response"]["url"].as_str().unwrap()).ends_with("greeting three\n"));
    let (_, logs) = gateway.ask(&token, &format!("GET /logs?id={id}"), "");
    assert!(
        logs["response"].as_str().unwrap().contains("GET /hello"),
        "{logs}"
    );
    let (status, _) = gateway.ask(&token, &format!("GET /stop?id={id}"), "");
    assert_eq!(status, 200);
    let (_, list) = gateway.ask(&token, "GET /list", "");
    assert_eq!(list["response"]["states"][0]["workloads"], json!([]));
    let done = system.vistara(&["gateway", "token", "rm", "vm-deploy"]);
    assert!(done.status.success());
}
