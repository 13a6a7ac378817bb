//! Tests of the QMP client against a scripted peer.

use super::*;

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

/// A client whose peer greets, accepts the handshake and then does as the test says.
async fn connected() -> (Qmp, BufReader<UnixStream>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = BufReader::new(theirs);
    peer.write_all(GREETING.as_bytes()).await.unwrap();
    let (qmp, ()) = tokio::join!(Qmp::handshake(ours), async {
        let request = request(&mut peer).await;
        assert_eq!(request["execute"], "qmp_capabilities");
        say(&mut peer, &json!({"return": {}, "id": request["id"]})).await;
    });
    (qmp.unwrap(), peer)
}

async fn request(peer: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    peer.read_line(&mut line).await.unwrap();
    serde_json::from_str(&line).unwrap()
}

async fn say(peer: &mut BufReader<UnixStream>, line: &Value) {
    peer.write_all(format!("{line}\n").as_bytes())
        .await
        .unwrap();
}

#[tokio::test]
async fn events_and_late_answers_do_not_confuse_a_request() {
    let (qmp, mut peer) = connected().await;
    qmp.changed().await;
    let (state, ()) = tokio::join!(qmp.status(), async {
        let request = request(&mut peer).await;
        say(&mut peer, &json!({"event": "SHUTDOWN"})).await;
        say(
            &mut peer,
            &json!({"return": {"status": "running"}, "id": 0}),
        )
        .await;
        say(
            &mut peer,
            &json!({"return": {"status": "shutdown"}, "id": request["id"]}),
        )
        .await;
    });
    assert_eq!(state.unwrap(), RunState::Ended);
    qmp.changed().await;
}

#[tokio::test]
async fn a_flood_of_events_rings_one_bell_and_is_not_kept() {
    let (qmp, mut peer) = connected().await;
    for _ in 0..10_000 {
        say(&mut peer, &json!({"event": "BLOCK_IO_ERROR"})).await;
    }
    let (answer, ()) = tokio::join!(qmp.cont(), async {
        let request = request(&mut peer).await;
        say(
            &mut peer,
            &json!({"error": {"class": "GenericError", "desc": "no"}, "id": request["id"]}),
        )
        .await;
    });
    assert!(matches!(answer, Err(QmpError::Refused(text)) if text == "no"));
    qmp.changed().await;
}

#[tokio::test]
async fn a_peer_that_goes_away_ends_requests_and_rings() {
    let (qmp, peer) = connected().await;
    drop(peer);
    assert!(matches!(qmp.stop().await, Err(QmpError::Closed)));
    qmp.quit().await.unwrap();
    qmp.changed().await;
}

#[tokio::test]
async fn a_line_without_end_and_one_that_is_no_json_end_the_connection() {
    for line in [
        vec![b'x'; LINE_MAX as usize + 10],
        b"{\"return\": \n".to_vec(),
    ] {
        let (qmp, mut peer) = connected().await;
        let (answer, _) = tokio::join!(qmp.status(), peer.write_all(&line));
        assert!(matches!(answer, Err(QmpError::Closed)), "{answer:?}");
    }
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"{\"hello\": 1}\n").await.unwrap();
    assert!(matches!(
        Qmp::handshake(ours).await,
        Err(QmpError::Malformed(_))
    ));
}

#[test]
fn base64_is_decoded_as_the_standard_has_it() {
    for (text, bytes) in [
        ("", ""),
        ("Zg==", "f"),
        ("Zm8=", "fo"),
        ("Zm9v", "foo"),
        ("Zm9vYmE=", "fooba"),
    ] {
        assert_eq!(from_base64(text).unwrap(), bytes.as_bytes());
    }
    assert_eq!(from_base64("/+8="), Some(vec![0xff, 0xef]));
    for bad in ["Z", "Zm9v!", "Zm 9"] {
        assert_eq!(from_base64(bad), None, "{bad:?}");
    }
}

#[tokio::test]
async fn a_fork_is_told_all_at_once_and_goes_on_when_its_state_is_there() {
    let (qmp, mut peer) = connected().await;
    let migration = |status: &str| json!({"event": "MIGRATION", "data": {"status": status}});
    let (loaded, ()) = tokio::join!(qmp.load_state_and_cont(7), async {
        let (set, load) = (request(&mut peer).await, request(&mut peer).await);
        assert_eq!(set["execute"], "migrate-set-capabilities");
        assert_eq!(load["arguments"]["uri"], "fd:7");
        for answered in [set, load] {
            say(&mut peer, &json!({"return": {}, "id": answered["id"]})).await;
        }
        say(&mut peer, &migration("active")).await;
        say(&mut peer, &migration("completed")).await;
        let cont = request(&mut peer).await;
        assert_eq!(cont["execute"], "cont", "nothing is asked between");
        say(&mut peer, &json!({"return": {}, "id": cont["id"]})).await;
    });
    loaded.unwrap();
}

#[tokio::test]
async fn a_fork_whose_state_does_not_fit_does_not_go_on_and_says_why() {
    let refused = |id: &Value, desc: &str| json!({"error": {"class": "GenericError", "desc": desc}, "id": id});
    let (qmp, mut peer) = connected().await;
    let (loaded, ()) = tokio::join!(qmp.load_state_and_cont(7), async {
        for _ in 0..2 {
            let asked = request(&mut peer).await;
            say(&mut peer, &json!({"return": {}, "id": asked["id"]})).await;
        }
        say(
            &mut peer,
            &json!({"event": "MIGRATION", "data": {"status": "failed"}}),
        )
        .await;
        let query = request(&mut peer).await;
        assert_eq!(query["execute"], "query-migrate");
        let answer = json!({"status": "failed", "error-desc": "another machine's"});
        say(&mut peer, &json!({"return": answer, "id": query["id"]})).await;
    });
    assert!(matches!(loaded, Err(QmpError::Refused(why)) if why == "another machine's"));

    // The answer to what came after the refusal is nobody's.
    let (qmp, mut peer) = connected().await;
    let (loaded, ()) = tokio::join!(qmp.load_state_and_cont(7), async {
        let (set, load) = (request(&mut peer).await, request(&mut peer).await);
        say(&mut peer, &refused(&set["id"], "no such capability")).await;
        say(&mut peer, &json!({"return": {}, "id": load["id"]})).await;
    });
    assert!(matches!(loaded, Err(QmpError::Refused(why)) if why == "no such capability"));
    let (state, ()) = tokio::join!(qmp.status(), async {
        let asked = request(&mut peer).await;
        let answer = json!({"status": "running"});
        say(&mut peer, &json!({"return": answer, "id": asked["id"]})).await;
    });
    assert_eq!(state.unwrap(), RunState::Running);
}
