//! A gateway that runs, and requests to it, byte by byte where a test needs that.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longest that an answer may take on a busy machine without KVM.
pub(crate) const ANSWER_BOUND: Duration = Duration::from_secs(150);

/// A gateway; it ends with the test.
pub(crate) struct Gateway {
    child: Child,
    pub(crate) address: SocketAddr,
    /// What it has said on standard error.
    pub(crate) said: Arc<Mutex<String>>,
}

impl Gateway {
    /// Starts the command, which is a `vistara gateway --listen …`, and waits until it listens.
    pub(crate) fn start(mut command: Command) -> Gateway {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (heard, stderr) = (said.clone(), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                heard.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .strip_prefix("http://")
            .unwrap_or_else(|| panic!("no address: {line:?} {}", said.lock().unwrap()));
        Gateway {
            address: address.parse().unwrap(),
            child,
            said,
        }
    }

    /// What it has said on standard error, once this is in it.
    pub(crate) fn heard(&self, word: &str) -> String {
        let deadline = Instant::now() + ANSWER_BOUND;
        loop {
            let said = self.said.lock().unwrap().clone();
            if said.contains(word) {
                return said;
            }
            assert!(Instant::now() < deadline, "{word:?} is not said: {said}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(ANSWER_BOUND)).unwrap();
        stream
    }

    /// Sends these bytes and gives the status and the body.
    pub(crate) fn raw(&self, bytes: &[u8]) -> (u16, Value) {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        answer(stream)
    }

    /// One request.
    pub(crate) fn ask(&self, token: &str, line: &str, body: &str) -> (u16, Value) {
        self.raw(
            format!(
                "{line} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The status and the body of what comes; status 0 where nothing does.
pub(crate) fn answer(mut stream: TcpStream) -> (u16, Value) {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let status = text
        .split(' ')
        .nth(1)
        .map_or(0, |word| word.parse().unwrap_or(0));
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}
