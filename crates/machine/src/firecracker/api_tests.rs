//! The client against servers that behave, and against such as do not. Where a server waits for the connection's end, the test has
//! a thread besides the one that waits for the server.

use super::*;
use std::io::{Read, Write};
use std::thread::JoinHandle;

/// A server that reads one request and writes these bytes.
fn serve(answer: Vec<u8>) -> (tempfile::TempDir, Api, JoinHandle<String>) {
    let dir = tempfile::tempdir().unwrap();
    let listener = sockets::listen_in(dir.path(), API_SOCKET).unwrap();
    let api = Api::new(dir.path());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let got = stream.read(&mut piece).unwrap();
            request.extend_from_slice(&piece[..got]);
            let text = String::from_utf8_lossy(&request).into_owned();
            let whole = text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length: "))
                    .map_or(0, |length| length.parse().unwrap());
                body.len() >= length
            });
            if whole || got == 0 {
                break;
            }
        }
        // The client may have had enough.
        let _ = stream.write_all(&answer);
        String::from_utf8(request).unwrap()
    });
    (dir, api, server)
}

#[tokio::test]
async fn a_request_is_what_firecracker_expects_and_an_empty_answer_is_consent() {
    let (_dir, api, server) = serve(b"HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n".to_vec());
    api.pause().await.unwrap();
    let request = server.join().unwrap();
    assert!(request.starts_with("PATCH /vm HTTP/1.1\r\n"), "{request}");
    assert!(request.ends_with(r#"{"state":"Paused"}"#), "{request}");
}

#[tokio::test]
async fn a_refusal_is_told_in_firecrackers_words() {
    let body = r#"{"fault_message":"The kernel file cannot be opened: No such file"}"#;
    let answer = format!(
        "HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (_dir, api, server) = serve(answer.into_bytes());
    let mut session = api.connect().await.unwrap();
    match session.start_instance().await.unwrap_err() {
        ApiError::Refused(message) => assert!(message.starts_with("The kernel file")),
        other => panic!("{other}"),
    }
    server.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_answer_without_end_or_sense_is_an_error() {
    let huge = [
        b"HTTP/1.1 200 \r\nContent-Length: 10000000\r\n\r\n".to_vec(),
        vec![b'x'; 10_000_000],
    ]
    .concat();
    for answer in [huge, b"SSH-2.0-OpenSSH\r\n".to_vec(), Vec::new()] {
        let (_dir, api, server) = serve(answer);
        let error = api.pause().await.unwrap_err();
        assert!(
            matches!(error, ApiError::Odd(_) | ApiError::Gone(_)),
            "{error}"
        );
        server.join().unwrap();
    }
}

#[tokio::test]
async fn a_server_that_is_silent_or_gone_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let api = Api::new(dir.path());
    assert!(matches!(api.pause().await.unwrap_err(), ApiError::Gone(_)));
    let _listener = sockets::listen_in(dir.path(), API_SOCKET).unwrap();
    let limit = Duration::from_millis(50);
    let asked = api.put("/vsock", &(), limit).await;
    assert!(matches!(asked.unwrap_err(), ApiError::Slow(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_session_says_all_over_one_connection_and_never_takes_a_late_answer_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let listener = sockets::listen_in(dir.path(), API_SOCKET).unwrap();
    let api = Api::new(dir.path());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut piece = [0; 4096];
        let body = r#"{"fault_message":"no"}"#;
        let refusal = format!(
            "HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        for answer in ["HTTP/1.1 204 \r\n\r\n", &refusal, "HTTP/1.1 204 \r\n\r\n"] {
            assert!(stream.read(&mut piece).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        }
        // One that is not answered in time.
        assert!(stream.read(&mut piece).unwrap() > 0);
        assert_eq!(stream.read(&mut piece).unwrap(), 0, "it is closed then");
    });
    let mut session = api.connect().await.unwrap();
    let bound = Duration::from_secs(10);
    session.put("/vsock", &(), bound).await.unwrap();
    let refused = session.put("/balloon", &(), bound).await.unwrap_err();
    assert!(matches!(refused, ApiError::Refused(_)), "{refused}");
    session.put("/entropy", &(), bound).await.unwrap();
    let slow = session.put("/serial", &(), Duration::from_millis(50)).await;
    assert!(matches!(slow.unwrap_err(), ApiError::Slow(_)));
    let after = session.put("/actions", &(), bound).await.unwrap_err();
    assert!(matches!(after, ApiError::Gone(_)), "{after}");
    drop(session);
    server.join().unwrap();
}

#[tokio::test]
async fn its_socket_is_waited_for_and_found_whatever_else_gets_a_name_before() {
    let dir = tempfile::tempdir().unwrap();
    let api = Api::new(dir.path());
    let waiting = tokio::spawn(async move { api.listening().await });
    for name in ["dev", "firecracker.pid"] {
        tokio::time::sleep(Duration::from_millis(5)).await;
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert!(!waiting.is_finished());
    let _listener = sockets::listen_in(dir.path(), API_SOCKET).unwrap();
    let limit = Duration::from_secs(10);
    let session = tokio::time::timeout(limit, waiting).await.unwrap();
    assert!(session.unwrap().is_ok());
}
