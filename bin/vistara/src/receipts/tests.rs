//! What of a receipt is compared with what was seen, each thing by itself.

use super::*;
use vistara_model::{
    Hypervisor, MachineId, NodeId, ReceiptEnd, ReceiptOutput, ReceiptRan, ReceiptStream,
    ReceiptTimes, ReceiptUsage,
};

fn own() -> NodeId {
    NodeId::from_bytes([1; 32])
}

fn far() -> NodeId {
    NodeId::from_bytes([2; 32])
}

fn heard() -> Heard {
    let mut heard = Heard::default();
    heard.stdout(b"hel");
    heard.stdout(b"lo\n");
    heard.stderr(b"bad\n");
    heard
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn wish() -> RunRequest {
    RunRequest {
        image: Digest::from_sha256([7; 32]).to_string(),
        command: words(&["sh", "-c", "echo hello"]),
        ..RunRequest::default()
    }
}

fn stream(bytes: &[u8]) -> ReceiptStream {
    ReceiptStream {
        digest: Some(sha256(bytes)),
        bytes: bytes.len() as u64,
        missing_bytes: 0,
    }
}

/// What an honest node says of it.
fn receipt(expected: &Expected) -> Receipt {
    let command = words(&["sh", "-c", "echo hello"]);
    Receipt {
        format: vistara_model::RECEIPT_FORMAT,
        node: far(),
        machine: MachineId::from_random([4; 16]),
        generation: 1,
        request: ReceiptRequest {
            digest: Some(expected.digest.clone()),
            nonce: Some(expected.nonce.clone()),
            caller: Some(own()),
            grant: None,
            image: "debian".to_owned(),
            image_id: Digest::from_sha256([7; 32]),
            manifest: None,
            architecture: None,
            command_digest: sha256(b"sh\0-c\0echo hello\0"),
            command: Some(command),
            cpu_millis: 1000,
            memory_bytes: 1 << 27,
            disk_bytes: 1 << 30,
            network: false,
            stdin: false,
            timeout_ms: None,
        },
        ran: ReceiptRan {
            hypervisor: Hypervisor::Qemu,
            vmm: "qemu".to_owned(),
            vmm_version: None,
            payload: "linux".to_owned(),
            accelerator: "kvm".to_owned(),
            kernel: None,
            kernel_digest: None,
            template: None,
            parent: None,
            undone: false,
            second_run: false,
        },
        end: ReceiptEnd {
            how: ReceiptHow::Exited,
            exit_code: 3,
            signal: None,
            out_of_memory: false,
        },
        output: ReceiptOutput {
            stdout: stream(b"hello\n"),
            stderr: stream(b"bad\n"),
            complete: true,
            terminal: false,
            merged: false,
        },
        usage: ReceiptUsage {
            cpu_ms: None,
            memory_bytes: None,
            memory_peak_bytes: None,
            run_ms: 1,
        },
        times: ReceiptTimes {
            asked_ms: 1,
            began_ms: Some(1),
            ended_ms: 2,
        },
    }
}

fn verified(node: NodeId, is_node: Option<bool>) -> VerifiedReceipt {
    VerifiedReceipt {
        receipt: serde_json::Value::Null,
        node: node.to_string(),
        known_as: Some("far".to_owned()),
        is_node,
    }
}

fn told(verified: &VerifiedReceipt, receipt: &Receipt, expected: &Expected) -> Option<String> {
    let heard = heard();
    let seen = Seen {
        node: Some("far"),
        expected,
        exit_code: Some(3),
        heard: &heard,
    };
    misfit(verified, receipt, &own().to_string(), &seen)
}

#[test]
fn whatever_a_node_says_otherwise_than_it_was_seen_is_a_misfit() {
    let expected = Expected::of(&mut wish()).unwrap();
    let by_far = verified(far(), Some(true));
    assert_eq!(told(&by_far, &receipt(&expected), &expected), None);

    type Change = fn(&mut Receipt);
    let changes: [(&str, Change); 14] = [
        ("nonce", |it| it.request.nonce = Some("0".repeat(32))),
        ("nonce", |it| it.request.nonce = None),
        ("another request", |it| it.request.digest = None),
        ("somebody else", |it| it.request.caller = None),
        ("somebody else", |it| it.request.caller = Some(far())),
        ("another image", |it| {
            it.request.image_id = Digest::from_sha256([8; 32]);
        }),
        ("another command", |it| {
            it.request.command = Some(words(&["sh", "-c", "echo bye"]));
        }),
        ("another command", |it| {
            it.request.command_digest = sha256(b"");
        }),
        ("exit code is 0", |it| it.end.exit_code = 0),
        ("standard output arrived", |it| {
            it.output.stdout = stream(b"other\n");
        }),
        ("standard error arrived", |it| {
            it.output.stderr = stream(b"");
        }),
        ("what standard output was", |it| {
            it.output.stdout.digest = None;
        }),
        ("what standard error was", |it| {
            it.output.stderr.digest = None;
        }),
        ("standard output arrived", |it| it.output.stdout.bytes = 7),
    ];
    for (says, change) in changes {
        let mut receipt = receipt(&expected);
        change(&mut receipt);
        let what = told(&by_far, &receipt, &expected).unwrap_or_default();
        assert!(what.contains(says), "{says}: {what:?}");
    }
}

#[test]
fn it_must_be_of_the_node_that_was_asked() {
    let expected = Expected::of(&mut wish()).unwrap();
    let other = "of another node";
    for is_node in [Some(false), None] {
        let what = told(&verified(far(), is_node), &receipt(&expected), &expected);
        assert!(what.unwrap_or_default().contains(other));
    }
    // Nobody was named: it must be the node here, whose owner has no key of his own.
    let heard = heard();
    let seen = Seen {
        node: None,
        expected: &expected,
        exit_code: Some(3),
        heard: &heard,
    };
    let mut said = receipt(&expected);
    said.request.caller = None;
    let here = |node| misfit(&verified(node, None), &said, &own().to_string(), &seen);
    assert_eq!(here(own()), None);
    assert!(here(far()).unwrap_or_default().contains(other));
}

#[test]
fn a_long_command_is_compared_as_far_as_it_is_known_here() {
    let by_far = verified(far(), Some(true));
    let mut wish = wish();
    wish.entrypoint = Some(words(&["sh"]));
    wish.command = words(&["-c", "echo hello"]);
    let expected = Expected::of(&mut wish).unwrap();
    let mut said = receipt(&expected);
    said.request.command = None;
    assert_eq!(told(&by_far, &said, &expected), None);
    said.request.command_digest = sha256(b"");
    let what = told(&by_far, &said, &expected).unwrap_or_default();
    assert!(what.contains("another command"), "{what}");
    // The image's own words come first where none were given in their place.
    wish.entrypoint = None;
    let expected = Expected::of(&mut wish).unwrap();
    assert_eq!(told(&by_far, &receipt(&expected), &expected), None);
    let mut said = receipt(&expected);
    said.request.command = None;
    assert_eq!(told(&by_far, &said, &expected), None);
}

#[test]
fn an_end_by_itself_with_output_cut_off_is_told() {
    let expected = Expected::of(&mut wish()).unwrap();
    let mut receipt = receipt(&expected);
    assert!(!is_partial(&receipt));
    receipt.output.complete = false;
    assert!(is_partial(&receipt));
    receipt.end.how = ReceiptHow::Stopped;
    assert!(!is_partial(&receipt));
}
