//! hypercore's requests and answers on the wire, read with bounds. Pure.

use crate::run_options::ImageSource;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use vistara_api::RunRequest;
use vistara_model::{ImageRef, MachineId};

/// Largest body of a request, in bytes: environments are the largest part of one, and programs take little more.
pub(crate) const BODY_BYTES_MAX: usize = 64 << 10;
/// Most ports of a machine.
const PORTS_MAX: usize = 32;
/// Most variables of a machine.
const ENV_MAX: usize = 512;

/// `POST /spawn` as it comes. Numbers are wide so that what is too large is said to be so.
#[derive(Debug, Deserialize)]
struct SpawnBody {
    cores: Option<u64>,
    memory: Option<u64>,
    image_ref: Option<String>,
    #[serde(default)]
    ports: BTreeMap<String, u64>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    dry_run: bool,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// `POST /spawn`, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spawn {
    cores: Option<u32>,
    memory_mebibytes: Option<u32>,
    image: String,
    /// Ports that were asked for, and those in the guest behind them.
    pub(crate) ports: BTreeMap<u16, u16>,
    env: Vec<String>,
    /// Whether nothing is to be made.
    pub(crate) dry_run: bool,
    /// Fields that are not known.
    pub(crate) unknown: Vec<String>,
}

/// How the gateway publishes ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Publishing {
    /// Address of the host.
    pub(crate) address: Ipv4Addr,
    /// Whether a host port is the one asked for; any free one otherwise.
    pub(crate) exact: bool,
}

impl Spawn {
    /// Reads a body. The error repeats no value of `env`, only what is said of it.
    pub(crate) fn read(body: &[u8]) -> Result<Spawn, String> {
        let body: SpawnBody = serde_json::from_slice(body).map_err(|error| {
            use serde_json::error::Category;
            let at = format!("line {}, column {}", error.line(), error.column());
            match error.classify() {
                Category::Syntax | Category::Eof => format!("the body is not JSON: {at}"),
                // Its words would repeat what was sent, which may be a secret.
                Category::Data | Category::Io => format!(
                    "a field is of another kind than it has to be ({at}): cores and memory are numbers, image_ref is text, ports an object such as {{\"443\": 8080}}, env a list such as [\"NAME=value\"], dry_run true or false"
                ),
            }
        })?;
        let image = body
            .image_ref
            .filter(|image| !image.is_empty())
            .ok_or("image_ref is missing: it names the image to run")?;
        // A name alone: no path of the host is ever read for a request.
        let is_path = matches!(ImageSource::parse(&image), ImageSource::Path(_));
        if is_path || !image.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err("image_ref is not the name of an image".to_owned());
        }
        image
            .parse::<ImageRef>()
            .map_err(|error| format!("image_ref: {error}"))?;
        let size = |what: &str, number: Option<u64>| match number {
            None => Ok(None),
            Some(number) => match u32::try_from(number) {
                Ok(number @ 1..) => Ok(Some(number)),
                _ => Err(format!("{what} is {number}, which is none")),
            },
        };
        if body.ports.len() > PORTS_MAX || body.env.len() > ENV_MAX {
            return Err(format!(
                "at most {PORTS_MAX} ports and {ENV_MAX} variables are taken"
            ));
        }
        let mut ports = BTreeMap::new();
        for (host, guest) in &body.ports {
            let pair = (host.parse::<u16>(), u16::try_from(*guest));
            let (Ok(host @ 1..), Ok(guest @ 1..)) = pair else {
                return Err(
                    "ports are written {\"443\": 8080}, each from 1 to 65535: a port of the host, and one of the guest"
                        .to_owned(),
                );
            };
            ports.insert(host, guest);
        }
        for (index, line) in body.env.iter().enumerate() {
            let good = line
                .split_once('=')
                .is_some_and(|(name, _)| !name.is_empty());
            if !good || line.contains('\0') {
                return Err(format!(
                    "env[{index}] is not NAME=value (its value is not repeated here)"
                ));
            }
        }
        Ok(Spawn {
            cores: size("cores", body.cores)?,
            memory_mebibytes: size("memory", body.memory)?,
            image,
            ports,
            env: body.env,
            dry_run: body.dry_run,
            unknown: body.others.into_keys().collect(),
        })
    }

    /// The request to the node.
    pub(crate) fn request(
        &self,
        publishing: Publishing,
        labels: BTreeMap<String, String>,
    ) -> RunRequest {
        RunRequest {
            image: self.image.clone(),
            cpus: self.cores.map(|cores| cores.to_string()),
            memory: self.memory_mebibytes.map(|count| format!("{count}m")),
            env: self.env.clone(),
            ports: self
                .ports
                .iter()
                .map(|(host, guest)| {
                    let host = if publishing.exact { *host } else { 0 };
                    format!("{}:{host}:{guest}", publishing.address)
                })
                .collect(),
            labels,
            attach: true,
            ..RunRequest::default()
        }
    }

    /// The port whose address is the machine's url: hypercore's own is of 443.
    pub(crate) fn main_port(&self) -> Option<u16> {
        let known = [443, 80]
            .into_iter()
            .find(|port| self.ports.contains_key(port));
        known.or_else(|| self.ports.keys().next().copied())
    }
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    /// `POST /spawn`; the body follows.
    Spawn,
    /// `/stop?id=`
    Stop(String),
    /// `/list`
    List,
    /// `/logs?id=`
    Logs(String),
}

/// Why a request leads to no call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoCall {
    /// There is nothing at this path.
    Path,
    /// It takes this method.
    Method(&'static str),
    /// Its id is none.
    Id,
}

/// What a request line asks.
pub(crate) fn call(method: &str, path: &str, query: Option<&str>) -> Result<Call, NoCall> {
    let id = || {
        let mut ids = query
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.strip_prefix("id="));
        match (ids.next(), ids.next()) {
            // 32 digits need no decoding, and anything else is no machine's.
            (Some(id), None) if id.parse::<MachineId>().is_ok() => Ok(id.to_owned()),
            _ => Err(NoCall::Id),
        }
    };
    match (path, method) {
        ("/spawn", "POST") => Ok(Call::Spawn),
        ("/spawn", _) => Err(NoCall::Method("POST")),
        // hypercore stops with GET, which nothing on the way may repeat or fetch ahead; POST is taken as well.
        ("/stop", "GET" | "POST") => id().map(Call::Stop),
        ("/stop", _) => Err(NoCall::Method("GET")),
        ("/list", "GET") => Ok(Call::List),
        ("/logs", "GET") => id().map(Call::Logs),
        ("/list" | "/logs", _) => Err(NoCall::Method("GET")),
        _ => Err(NoCall::Path),
    }
}

/// The body of a good answer.
pub(crate) fn response(value: Value, warnings: &[String]) -> Value {
    if warnings.is_empty() {
        json!({"response": value})
    } else {
        json!({"response": value, "warnings": warnings})
    }
}

/// The body of any other.
pub(crate) fn error(message: &str) -> Value {
    json!({"error": message})
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHING: Publishing = Publishing {
        address: Ipv4Addr::LOCALHOST,
        exact: false,
    };

    #[test]
    fn hypercores_own_example_is_understood() {
        let body =
            br#"{"image_ref": "your-registry/agent-image:latest", "cores": 2, "memory": 2048,
            "ports": {"443": 8080}, "env": ["API_KEY=x"]}"#;
        let spawn = Spawn::read(body).unwrap();
        let request = spawn.request(PUBLISHING, BTreeMap::new());
        assert_eq!(request.image, "your-registry/agent-image:latest");
        assert_eq!(request.cpus.as_deref(), Some("2"));
        assert_eq!(request.memory.as_deref(), Some("2048m"));
        assert_eq!(request.ports, ["127.0.0.1:0:8080"]);
        assert_eq!(request.env, ["API_KEY=x"]);
        assert!(!spawn.dry_run && spawn.unknown.is_empty());
        let exact = Publishing {
            exact: true,
            ..PUBLISHING
        };
        let request = spawn.request(exact, BTreeMap::new());
        assert_eq!(request.ports, ["127.0.0.1:443:8080"]);
        assert_eq!(spawn.main_port(), Some(443));
    }

    #[test]
    fn bodies_are_refused_with_a_reason_that_repeats_no_secret() {
        for (body, word) in [
            ("", "not JSON"),
            ("{", "not JSON"),
            ("[]", "another kind"),
            ("{}", "image_ref is missing"),
            (r#"{"image_ref": ""}"#, "image_ref is missing"),
            (r#"{"image_ref": 3}"#, "another kind"),
            (r#"{"image_ref": "../../etc/passwd"}"#, "image_ref"),
            (r#"{"image_ref": "/etc/passwd"}"#, "image_ref"),
            (r#"{"image_ref": "oci:/etc"}"#, "image_ref"),
            (r#"{"image_ref": "-v"}"#, "image_ref"),
            (r#"{"image_ref": "a", "cores": 0}"#, "cores"),
            (r#"{"image_ref": "a", "cores": -1}"#, "another kind"),
            (r#"{"image_ref": "a", "cores": "2"}"#, "another kind"),
            (r#"{"image_ref": "a", "memory": 99999999999}"#, "memory"),
            (r#"{"image_ref": "a", "ports": {"0": 80}}"#, "ports"),
            (r#"{"image_ref": "a", "ports": {"80": 0}}"#, "ports"),
            (r#"{"image_ref": "a", "ports": {"80": 65536}}"#, "ports"),
            (
                r#"{"image_ref": "a", "ports": {"0.0.0.0:80": 80}}"#,
                "ports",
            ),
            (r#"{"image_ref": "a", "ports": [443]}"#, "another kind"),
            (
                r#"{"image_ref": "a", "env": "SECRET=hunter2"}"#,
                "another kind",
            ),
            (r#"{"image_ref": "a", "env": ["hunter2"]}"#, "env[0]"),
            (r#"{"image_ref": "a", "env": ["=hunter2"]}"#, "env[0]"),
            (
                r#"{"image_ref": "a", "env": ["A=hunter2\u0000"]}"#,
                "env[0]",
            ),
            (
                r#"{"image_ref": "a", "env": [{"hunter2": 1}]}"#,
                "another kind",
            ),
        ] {
            let error = Spawn::read(body.as_bytes()).unwrap_err();
            assert!(error.contains(word), "{body}: {error}");
            assert!(!error.contains("hunter2"), "{body}: {error}");
        }
        let many: Vec<String> = (0..600).map(|index| format!("A{index}=1")).collect();
        let body = json!({"image_ref": "a", "env": many}).to_string();
        assert!(Spawn::read(body.as_bytes()).is_err());
        let deep = format!("{{\"image_ref\": \"a\", \"x\": {}", "[".repeat(60_000));
        assert!(Spawn::read(deep.as_bytes()).is_err());
        let spawn = Spawn::read(br#"{"image_ref":"a","Policy":{"x":1},"privileged":true}"#);
        assert_eq!(spawn.unwrap().unknown, ["Policy", "privileged"]);
    }

    #[test]
    fn only_whole_ids_of_machines_pass_and_no_path_does() {
        let id = "00112233445566778899aabbccddeeff";
        let query = format!("id={id}");
        let logs = |query: &str| call("GET", "/logs", Some(query));
        assert_eq!(logs(&query), Ok(Call::Logs(id.to_owned())));
        assert_eq!(
            call("GET", "/stop", Some(&query)),
            Ok(Call::Stop(id.to_owned()))
        );
        assert_eq!(
            call("POST", "/stop", Some(&query)),
            Ok(Call::Stop(id.to_owned()))
        );
        assert_eq!(call("GET", "/list", None), Ok(Call::List));
        assert_eq!(call("POST", "/spawn", None), Ok(Call::Spawn));
        for query in [
            "",
            "id=",
            "id=..",
            "id=../../../etc/shadow",
            "id=..%2f..%2fetc%2fshadow",
            "id=%2e%2e%2fetc%2fpasswd",
            "id=00112233",
            "id=00112233445566778899AABBCCDDEEFF",
            "id=swift-otter",
            "id=00112233445566778899aabbccddeeff/../x",
            "id=00112233445566778899aabbccddeef%66",
            "ID=00112233445566778899aabbccddeeff",
        ] {
            assert_eq!(logs(query), Err(NoCall::Id), "{query}");
        }
        assert_eq!(logs(&format!("{query}&{query}")), Err(NoCall::Id));
        assert_eq!(call("GET", "/logs", None), Err(NoCall::Id));
        assert_eq!(call("GET", "/spawn", None), Err(NoCall::Method("POST")));
        assert_eq!(
            call("DELETE", "/stop", Some(&query)),
            Err(NoCall::Method("GET"))
        );
        for path in [
            "/",
            "/logs/",
            "//logs",
            "/logs/../list",
            "/v1/machines",
            "/LIST",
            "",
        ] {
            assert_eq!(call("GET", path, Some(&query)), Err(NoCall::Path), "{path}");
        }
    }
}
