//! `vistara deploy` and `vistara gateway` as users run them, against the real node with machines that are fake: their guests are
//! the real agent with the host's programs.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "../../../crates/node/tests/support/mod.rs"]
mod support;

mod http;
mod oci;

use futures_util::StreamExt;
use http::{Gateway, answer};
use serde_json::{Value, json};
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use support::TestNode;
use vistara_api::ImageEvent;

struct Scene {
    // Before the directory in which it lives.
    node: TestNode,
    dir: tempfile::TempDir,
}

impl Scene {
    async fn new() -> Option<Scene> {
        if !support::can_make_disks() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let node = TestNode::start(dir.path(), support::fake()).await;
        let scene = Scene { node, dir };
        scene
            .image(
                "app",
                &["sh", "-c", "echo \"started with $WORD\"; exec sleep 600"],
            )
            .await;
        scene.image("short", &["true"]).await;
        scene.image("wrong", &["/no/such/program"]).await;
        Some(scene)
    }

    async fn image(&self, name: &str, command: &[&str]) {
        let archive = std::io::Cursor::new(oci::with_only(command));
        let mut events = self.node.client.import(Some(name), archive).await.unwrap();
        let mut last = None;
        while let Some(event) = events.next().await {
            last = Some(event.unwrap());
        }
        assert!(matches!(last, Some(ImageEvent::Done { .. })), "{last:?}");
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vistara"));
        command
            .arg("--socket")
            .arg(self.dir.path().join("node.sock"))
            .arg("--state-dir")
            .arg(self.dir.path().join("state"))
            .args(words)
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// What a command that goes well prints.
    fn out(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {err}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn token(&self, name: &str) -> String {
        self.out(&["gateway", "token", "create", name])
    }

    fn gateway(&self, options: &[&str]) -> Gateway {
        let words = [&["gateway", "--listen", "127.0.0.1:0"], options].concat();
        Gateway::start(self.command(&words))
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

const SPAWN: &str = r#"{"cores": 1, "memory": 128, "image_ref": "app", "ports": {"443": 8080}, "env": ["WORD=hunter2"]}"#;

fn id(answer: &Value) -> String {
    answer["response"]["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_nothing_is_answered_and_a_revoked_one_is_none() {
    let Some(scene) = Scene::new().await else {
        return;
    };
    let gateway = scene.gateway(&[]);
    gateway.heard("there is no token yet");
    let token = scene.token("ci");
    for line in [
        "GET /list",
        "GET /",
        "POST /spawn",
        "GET /logs?id=../../etc/passwd",
    ] {
        let bare = format!("{line} HTTP/1.1\r\nhost: x\r\n\r\n");
        let (status, body) = gateway.raw(bare.as_bytes());
        assert_eq!(status, 401, "{line}: {body}");
        for wrong in ["", "x", &token[..token.len() - 1], &format!("{token}0")] {
            let (status, body) = gateway.ask(wrong, line, "");
            assert_eq!(status, 401, "{line} {wrong}: {body}");
        }
    }
    assert_eq!(gateway.ask(&token, "GET /list", "").0, 200);
    let kept = scene.dir.path().join("state/gateway-tokens.json");
    let kept = std::fs::read_to_string(kept).unwrap();
    assert!(!kept.contains(token.rsplit('-').next().unwrap()));
    assert!(scene.out(&["gateway", "token", "ls"]).contains("ci"));
    scene.out(&["gateway", "token", "rm", "ci"]);
    assert_eq!(gateway.ask(&token, "GET /list", "").0, 401);
    let said = gateway.heard("ci GET /list 200");
    assert!(!said.contains(token.rsplit('-').next().unwrap()), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_are_spawned_listed_read_and_stopped_by_their_token_alone() {
    let Some(scene) = Scene::new().await else {
        return;
    };
    let (one, two) = (scene.token("one"), scene.token("two"));
    let gateway = scene.gateway(&[]);
    let (status, spawned) = gateway.ask(&one, "POST /spawn", SPAWN);
    assert_eq!(status, 200, "{spawned}");
    let machine = id(&spawned);
    let url = spawned["response"]["url"].as_str().unwrap();
    let port = spawned["response"]["ports"]["443"].as_str().unwrap();
    assert_eq!(url, format!("http://{port}"));
    let detail = scene.node.client.machine(&machine).await.unwrap();
    assert_eq!(detail.machine.ports, [format!("{port}->8080/tcp")]);

    let (status, list) = gateway.ask(&one, "GET /list", "");
    assert_eq!(status, 200);
    let workload = &list["response"]["states"][0]["workloads"][0];
    assert_eq!(workload["id"], machine.as_str());
    assert_eq!(
        workload["source_request"],
        json!({"cores": 1, "memory": 128, "image_ref": "app:latest", "ports": {"443": 8080}})
    );
    let logs = |token: &str, id: &str| gateway.ask(token, &format!("GET /logs?id={id}"), "");
    let (_, printed) = logs(&one, &machine);
    assert_eq!(printed["response"], "started with hunter2\n");

    // Another token's, somebody's own, one that never was: there is no difference to be seen.
    let own = scene.out(&["run", "-d", "--memory", "128m", "app"]);
    let stranger = "0".repeat(32);
    for (token, id) in [(&two, &machine), (&one, &own), (&one, &stranger)] {
        for call in ["logs", "stop"] {
            let (status, body) = gateway.ask(token, &format!("GET /{call}?id={id}"), "");
            assert_eq!(status, 400);
            assert_eq!(body, json!({"error": "no machine of yours has this id"}));
        }
    }
    let (_, empty) = gateway.ask(&two, "GET /list", "");
    assert_eq!(empty["response"]["states"][0]["workloads"], json!([]));

    let (status, stopped) = gateway.ask(&one, &format!("GET /stop?id={machine}"), "");
    assert_eq!((status, &stopped["response"]["id"]), (200, &json!("local")));
    let (_, list) = gateway.ask(&one, "GET /list", "");
    assert_eq!(list["response"]["states"][0]["workloads"], json!([]));
    assert_eq!(logs(&one, &machine).1["response"], "started with hunter2\n");
    // The one that was not the gateway's goes on.
    let detail = scene.node.client.machine(&own).await.unwrap();
    assert_eq!(detail.machine.state, "running");
    let said = gateway.heard("one GET /logs 200");
    assert!(said.contains("one POST /spawn 200"), "{said}");
    assert!(
        !said.contains("hunter2") && !said.contains(&machine),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_makes_nothing_and_bounds_hold() {
    let Some(scene) = Scene::new().await else {
        return;
    };
    let token = scene.token("t");
    let gateway = scene.gateway(&["--max-machines", "1", "--pull", "never"]);
    let spawn = |body: &str| gateway.ask(&token, "POST /spawn", body);
    let (status, body) = spawn(r#"{"image_ref": "app", "dry_run": true, "Policy": "x"}"#);
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["response"]["id"], "");
    assert!(!body["response"]["reasons"].as_array().unwrap().is_empty());
    assert_eq!(
        body["warnings"],
        json!(["Policy is not known and has no effect"])
    );
    assert!(scene.node.client.machines(true).await.unwrap().is_empty());

    // What cannot start is not left behind.
    let (status, body) = spawn(r#"{"image_ref": "wrong", "memory": 128}"#);
    assert_eq!(status, 400, "{body}");
    assert!(
        body["error"].as_str().unwrap().contains("/no/such/program"),
        "{body}"
    );
    assert!(scene.node.client.machines(true).await.unwrap().is_empty());
    let (status, body) = spawn(r#"{"image_ref": "absent"}"#);
    assert_eq!(status, 400, "{body}");
    assert!(body["error"].as_str().unwrap().contains("absent"), "{body}");

    let (status, first) = spawn(SPAWN);
    assert_eq!(status, 200, "{first}");
    let (status, body) = spawn(SPAWN);
    assert_eq!(status, 400);
    assert!(
        body["error"].as_str().unwrap().contains("stop one first"),
        "{body}"
    );
    gateway.ask(&token, &format!("POST /stop?id={}", id(&first)), "");
    // Each ended one beyond the bound goes when another comes.
    for _ in 0..2 {
        let (status, body) = spawn(SPAWN);
        assert_eq!(status, 200, "{body}");
        gateway.ask(&token, &format!("POST /stop?id={}", id(&body)), "");
    }
    let all = scene.node.client.machines(true).await.unwrap();
    assert_eq!(all.len(), 2, "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_answered_and_reach_nothing() {
    let Some(scene) = Scene::new().await else {
        return;
    };
    let token = scene.token("t");
    let gateway = scene.gateway(&[]);
    for (line, body, status) in [
        ("POST /spawn", "", 400),
        ("POST /spawn", "{", 400),
        ("POST /spawn", "[1]", 400),
        ("POST /spawn", r#"{"image_ref": "../../etc/passwd"}"#, 400),
        ("POST /spawn", r#"{"image_ref": "rootfs:/etc"}"#, 400),
        (
            "POST /spawn",
            r#"{"image_ref": "app", "ports": {"70000": 1}}"#,
            400,
        ),
        (
            "POST /spawn",
            r#"{"image_ref": "app", "env": ["hunter2"]}"#,
            400,
        ),
        ("GET /spawn", "", 405),
        ("PUT /stop?id=0", "", 405),
        ("GET /logs", "", 400),
        ("GET /logs?id=", "", 400),
        ("GET /logs?id=../../../../etc/shadow", "", 400),
        ("GET /logs?id=..%2f..%2f..%2fetc%2fshadow", "", 400),
        ("GET /logs?id=%00", "", 400),
        ("GET /stop?id=app", "", 400),
        ("GET /logs/../../etc/passwd", "", 404),
        ("GET //etc/passwd", "", 404),
        ("GET /v1/machines", "", 404),
    ] {
        let (found, answer) = gateway.ask(&token, line, body);
        assert_eq!(found, status, "{line} {body}: {answer}");
        let error = answer["error"].as_str().unwrap();
        assert!(
            !error.contains("hunter2") && !error.contains("root:"),
            "{error}"
        );
    }
    // A body that is announced as too large, one that turns out to be, and a head that is.
    let head = format!("POST /spawn HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n");
    let announced = format!("{head}content-length: 1000000000000\r\n\r\n");
    assert_eq!(gateway.raw(announced.as_bytes()).0, 413);
    let mut stream = gateway.connect();
    stream
        .write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes())
        .unwrap();
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
    for _ in 0..1000 {
        if stream.write_all(chunk.as_bytes()).is_err() {
            break;
        }
    }
    let (status, _) = answer(stream);
    assert!(matches!(status, 0 | 413), "{status}");
    let long = format!("{head}x: {}\r\n\r\n", "y".repeat(1 << 20));
    let mut stream = gateway.connect();
    let _ = stream.write_all(long.as_bytes());
    let (status, _) = answer(stream);
    assert!(matches!(status, 0 | 431), "{status}");
    for garbage in [
        &b"\x16\x03\x01\x02\x00"[..],
        b"GET",
        b"\r\n\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ] {
        let mut stream = gateway.connect();
        stream.write_all(garbage).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert!(matches!(answer(stream).0, 0 | 400 | 401 | 505));
    }
    assert!(scene.node.client.machines(true).await.unwrap().is_empty());
    assert_eq!(gateway.ask(&token, "GET /list", "").0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_cut_off_and_one_address_does_not_take_all() {
    let Some(scene) = Scene::new().await else {
        return;
    };
    let token = scene.token("t");
    let gateway = scene.gateway(&[]);
    let begin = Instant::now();
    let silent = gateway.connect();
    let mut head = gateway.connect();
    let mut body = gateway.connect();
    let start = format!(
        "POST /spawn HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: 60000\r\n\r\n"
    );
    body.write_all(start.as_bytes()).unwrap();
    head.write_all(b"GET /list HTTP/1.1\r\n").unwrap();
    // A byte a second keeps nobody in.
    let trickle = |mut stream: TcpStream, byte: &'static [u8]| {
        std::thread::spawn(move || {
            while begin.elapsed() < Duration::from_secs(60) && stream.write_all(byte).is_ok() {
                std::thread::sleep(Duration::from_millis(500));
            }
        })
    };
    let trickles = [
        trickle(head.try_clone().unwrap(), b"x"),
        trickle(body.try_clone().unwrap(), b" "),
    ];
    assert!(matches!(answer(silent).0, 0 | 408));
    assert!(matches!(answer(head).0, 0 | 408));
    assert!(matches!(answer(body).0, 0 | 408));
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(45), "{took:?}");
    for trickle in trickles {
        trickle.join().unwrap();
    }
    // Sixteen from one address that say nothing, and the next is turned away until they are cut off.
    let idle: Vec<TcpStream> = (0..16).map(|_| gateway.connect()).collect();
    assert_eq!(gateway_status(&gateway, &token), 0);
    for stream in idle {
        answer(stream);
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while gateway_status(&gateway, &token) != 200 {
        assert!(Instant::now() < deadline, "nobody is let in again");
    }
}

/// As [`Gateway::ask`], of one that may close at once.
fn gateway_status(gateway: &Gateway, token: &str) -> u16 {
    let mut stream = gateway.connect();
    let request = format!("GET /list HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\r\n");
    let _ = stream.write_all(request.as_bytes());
    answer(stream).0
}

const FILE: &str = "[spacecore]\nname = \"My App\"\n[hardware]\ncores = 1\nmemory = 128\nref = \"app\"\ninterface = \"eth0\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_deployed_left_alone_and_replaced() {
    let Some(scene) = Scene::new().await else {
        return;
    };
    scene.write("hac.toml", FILE);
    let deploy = |words: &[&str]| -> Value {
        let words = [&["deploy", "--json"], words].concat();
        serde_json::from_str(&scene.out(&words)).unwrap()
    };
    // Nothing is there, and a dry run makes nothing.
    let dry = deploy(&["--dry-run", "-e", "WORD=hunter2"]);
    assert_eq!(
        (&dry["state"], &dry["id"]),
        (&json!("created"), &Value::Null)
    );
    let command = dry["command"].as_str().unwrap();
    assert!(
        command.starts_with("vistara run -d --name=my-app"),
        "{command}"
    );
    assert!(!command.contains("hunter2"), "{command}");
    assert!(scene.node.client.machines(true).await.unwrap().is_empty());

    let first = deploy(&["-p", "0:8080"]);
    assert_eq!(first["state"], "created");
    assert_eq!(first["warnings"][0]["line"], 7);
    let url = first["url"].as_str().unwrap();
    let port = first["ports"][0].as_str().unwrap();
    assert_eq!(format!("{}->8080/tcp", &url["http://".len()..]), port);
    let again = deploy(&["-p", "0:8080"]);
    assert_eq!(
        (&again["state"], &again["id"]),
        (&json!("unchanged"), &first["id"])
    );
    assert_eq!(again["url"], first["url"]);

    // Another image of the same name, more memory, no port: each is another machine.
    let mut ids = vec![first["id"].clone()];
    scene
        .image("app", &["sh", "-c", "echo other; exec sleep 600"])
        .await;
    let mut replaced = |words: &[&str]| {
        let dry = deploy(&[&["--dry-run"], words].concat());
        assert_eq!(
            (&dry["state"], &dry["id"]),
            (&json!("replaced"), &Value::Null)
        );
        let now = deploy(words);
        assert_eq!(now["state"], "replaced");
        assert!(!ids.contains(&now["id"]));
        ids.push(now["id"].clone());
    };
    replaced(&["-p", "0:8080"]);
    replaced(&[]);
    scene.write("hac.toml", &FILE.replace("128", "160"));
    replaced(&[]);
    replaced(&["--replace"]);
    let all = scene.node.client.machines(true).await.unwrap();
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(all[0].name, "my-app");
    // One that ended is deployed anew.
    scene.out(&["stop", "my-app"]);
    replaced(&[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_that_cannot_be_leaves_what_runs_alone() {
    let Some(scene) = Scene::new().await else {
        return;
    };
    scene.write("hac.toml", FILE);
    let fails = |words: &[&str]| {
        let output = scene.run(&[&["deploy"], words].concat());
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let id = scene.out(&["deploy"]);
    // An image that is not there is found out before the old machine goes.
    scene.write("bad.toml", &FILE.replace("\"app\"", "\"absent\""));
    assert!(fails(&["--pull", "never", "bad.toml"]).contains("absent"));
    // A name that the same letters make of another one.
    scene.write("other.toml", &FILE.replace("My App", "my app"));
    let said = fails(&["other.toml"]);
    assert!(
        said.contains("was deployed for \"My App\"") && said.contains("--replace"),
        "{said}"
    );
    // What somebody ran by hand is nobody's to replace.
    scene.out(&["run", "-d", "--name", "hand", "--memory", "128m", "app"]);
    assert!(fails(&["--name", "hand"]).contains("was not deployed"));
    // Errors of the file come with their line.
    scene.write("wrong.toml", "[hardware]\nref = \"app\"\ncores = \"two\"\n");
    let said = fails(&["--name", "x", "wrong.toml"]);
    assert!(
        said.contains("wrong.toml:3: hardware.cores") && said.contains("hint:"),
        "{said}"
    );
    assert!(fails(&["none.toml"]).contains("cannot read none.toml"));
    let detail = scene.node.client.machine(&id).await.unwrap();
    assert_eq!(detail.machine.state, "running");

    // What hypercore's users type.
    let output = scene.run(&["spawn", "--hac", "hac.toml"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("hint: hypercore's command is `vistara deploy"),
        "{said}"
    );
    assert!(said.contains("my-app unchanged"), "{said}");
    let words = [
        "cluster",
        "spawn",
        "--image-ref",
        "app",
        "--mem",
        "128",
        "--env",
        "WORD=hunter2",
    ];
    let output = scene.run(&words);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && !said.contains("hunter2"),
        "{said}"
    );
    let spawned = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let printed = scene.run(&["cluster", "logs", "--id", &spawned]);
    assert_eq!(printed.stdout, b"started with hunter2\n");
    assert!(
        scene
            .run(&["cluster", "stop", "--id", &spawned])
            .status
            .success()
    );
}
