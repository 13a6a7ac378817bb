//! Tests of the supervisor against a scripted monitor; what takes a real one is in `tests/vm_qemu.rs`.

use super::*;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use vistara_host::launch::Launch;
use vistara_model::VmmKind;

/// A monitor that greets, and answers the questions for the machine's state in turn; every other request succeeds. Ends
/// with `quit`, and tells how often it was asked for the state.
async fn monitor(stream: UnixStream, statuses: Vec<Value>) -> usize {
    let mut stream = BufReader::new(stream);
    let mut say = json!({"QMP": {}});
    let mut asked = 0;
    loop {
        stream
            .write_all(format!("{say}\n").as_bytes())
            .await
            .unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        let request: Value = serde_json::from_str(&line).unwrap();
        say = match request["execute"].as_str().unwrap() {
            "quit" => return asked,
            "query-status" => {
                asked += 1;
                statuses[(asked - 1).min(statuses.len() - 1)].clone()
            }
            "ringbuf-read" => json!({"return": ""}),
            _ => json!({"return": {}}),
        };
        say["id"] = request["id"].clone();
    }
}

/// A machine whose monitor is scripted to answer so; its process sleeps.
async fn machine(dir: &std::path::Path, statuses: Vec<Value>) -> (QemuVm, JoinHandle<usize>) {
    let mut launch = Launch::new("/bin/sleep");
    launch.args = vec!["100".into()];
    let process = launch.start().unwrap().process;
    let (ours, theirs) = UnixStream::pair().unwrap();
    let monitor = tokio::spawn(monitor(theirs, statuses));
    let parts = Parts {
        dir: dir.to_owned(),
        record: VmRecord {
            kind: VmmKind::Qemu,
            pid: process.identity().pid,
            pid_start_ticks: process.identity().start_ticks,
            boot_id: process.identity().boot_id.clone(),
            fences: vec![],
            backend: Value::Null,
        },
        backend: BackendRecord::default(),
        process,
        helpers: vec![],
        output: None,
        printed: None,
        capture: None,
    };
    let qmp = Qmp::handshake(ours).await.unwrap();
    (QemuVm::new(parts, qmp, false), monitor)
}

#[tokio::test]
async fn a_guest_whose_end_was_asked_for_in_vain_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    // The only bell is the one at the beginning: no event follows.
    let refused = json!({"error": {"class": "GenericError", "desc": "busy"}});
    let ended = json!({"return": {"status": "shutdown"}});
    let (vm, monitor) = machine(dir.path(), vec![refused.clone(), refused, ended]).await;
    let asked = tokio::time::timeout(Duration::from_secs(30), monitor).await;
    assert_eq!(asked.unwrap().unwrap(), 3);
    vm.inner.parts.process.kill().unwrap();
    assert_eq!(vm.wait().await, VmEnd::GuestOff);
}

#[tokio::test]
async fn a_guest_with_which_the_accelerator_cannot_go_on_has_crashed_with_that_reason() {
    let dir = tempfile::tempdir().unwrap();
    let stuck = json!({"return": {"status": "internal-error"}});
    let (vm, monitor) = machine(dir.path(), vec![stuck]).await;
    // It was told to quit after its first answer, and does not: it is killed then.
    let asked = tokio::time::timeout(Duration::from_secs(30), monitor).await;
    assert_eq!(asked.unwrap().unwrap(), 1);
    let end = tokio::time::timeout(QUIT_LIMIT * 2, vm.wait()).await;
    match end.unwrap() {
        VmEnd::Crashed { message } => {
            assert!(message.contains("KVM internal error"), "{message}");
            // Whoever comes later hears the same.
            assert_eq!(
                state::read_end(dir.path()),
                Some(VmEnd::Crashed { message })
            );
        }
        other => panic!("{other:?}"),
    }
    let killed = vm.inner.parts.process.known_end();
    assert_eq!(killed, Some(ProcessEnd::Signaled(9)));
}
