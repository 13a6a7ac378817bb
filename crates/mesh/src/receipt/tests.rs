//! Receipts as they are written, and everything that is near one and is none.

use super::*;
use proptest::prelude::*;
use vistara_model::{
    Architecture, Digest, GrantId, Hypervisor, MachineId, NodeId, RECEIPT_FORMAT, ReceiptEnd,
    ReceiptHow, ReceiptOutput, ReceiptRan, ReceiptRequest, ReceiptStream, ReceiptTimes,
    ReceiptUsage,
};

/// The secret key of the golden receipt: bytes 1 to 32.
const GOLDEN_KEY: &str =
    "vistara-key-1\n0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20\n";
const GOLDEN: &str = include_str!("golden.receipt");

fn digest(byte: u8) -> Digest {
    Digest::from_sha256([byte; 32])
}

fn identity(key: &str) -> Identity {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    if !key.is_empty() {
        let path = dir.path().join("identity");
        std::fs::write(&path, key).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    Identity::open(dir.path()).unwrap()
}

fn stream(byte: u8, bytes: u64) -> ReceiptStream {
    ReceiptStream {
        digest: Some(digest(byte)),
        bytes,
        missing_bytes: 0,
    }
}

fn receipt(node: NodeId) -> Receipt {
    Receipt {
        format: RECEIPT_FORMAT,
        node,
        machine: MachineId::from_random([7; 16]),
        generation: 1,
        request: ReceiptRequest {
            digest: Some(digest(1)),
            nonce: Some("5".repeat(32)),
            caller: Some(NodeId::from_bytes([9; 32])),
            grant: Some(GrantId::from_random([3; 8])),
            image: "docker.io/library/debian:latest".to_owned(),
            image_id: digest(2),
            manifest: Some(digest(3)),
            architecture: Some(Architecture("amd64".to_owned())),
            command: Some(vec![
                "/bin/sh".to_owned(),
                "-c".to_owned(),
                "é \"\n".to_owned(),
            ]),
            command_digest: digest(4),
            cpu_millis: 1500,
            memory_bytes: 268_435_456,
            disk_bytes: 10_737_418_240,
            network: false,
            stdin: false,
            timeout_ms: Some(60_000),
        },
        ran: ReceiptRan {
            hypervisor: Hypervisor::Qemu,
            vmm: "qemu".to_owned(),
            vmm_version: Some("7.2.22".to_owned()),
            payload: "linux".to_owned(),
            accelerator: "tcg".to_owned(),
            kernel: Some("6.1.0-49-cloud-amd64".to_owned()),
            kernel_digest: Some(digest(5)),
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
            stdout: stream(6, 12),
            stderr: stream(7, 0),
            complete: true,
            terminal: false,
            merged: false,
        },
        usage: ReceiptUsage {
            cpu_ms: Some(120),
            memory_bytes: Some(90_000_000),
            memory_peak_bytes: None,
            run_ms: 250,
        },
        times: ReceiptTimes {
            asked_ms: 1_795_000_000_000,
            began_ms: Some(1_795_000_000_030),
            ended_ms: 1_795_000_000_280,
        },
    }
}

/// Another body under the signature of the key, however wrong it is: what a node that lies could sign.
fn forged(identity: &Identity, head: &str, line: &str) -> String {
    let signature = identity.secret().sign(&signed(line.as_bytes())).to_bytes();
    let digits: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{head}\n{line}\n{digits}\n")
}

#[test]
fn the_golden_receipt_is_written_and_read_as_ever() {
    let identity = identity(GOLDEN_KEY);
    let receipt = receipt(identity.id());
    assert_eq!(sign(&identity, &receipt).unwrap(), GOLDEN);
    assert_eq!(read(GOLDEN.as_bytes()).unwrap(), receipt);
}

#[test]
fn no_bit_of_a_receipt_can_be_changed_and_no_byte_be_missing_or_more() {
    let bytes = GOLDEN.as_bytes();
    for place in 0..bytes.len() {
        // One bit of each byte: a signature takes milliseconds without optimization.
        let mut changed = bytes.to_vec();
        changed[place] ^= 1 << (place % 8);
        assert!(read(&changed).is_err(), "byte {place}");
        assert!(read(&bytes[..place]).is_err(), "{place}");
    }
    for more in ["\n", " ", "x", "x\n", "\0"] {
        assert!(read(format!("{GOLDEN}{more}").as_bytes()).is_err());
        assert!(read(format!("{more}{GOLDEN}").as_bytes()).is_err());
    }
    assert_eq!(
        read(&vec![b'x'; RECEIPT_BYTES_MAX + 1]),
        Err(ReceiptError::Length(RECEIPT_BYTES_MAX + 1))
    );
}

#[test]
fn nobody_signs_for_another() {
    let (one, other) = (identity(GOLDEN_KEY), identity(""));
    let about_one = receipt(one.id());
    assert_eq!(sign(&other, &about_one), Err(ReceiptError::Signature));
    let line = body(&about_one).unwrap();
    let text = forged(&other, HEAD, &line);
    assert_eq!(read(text.as_bytes()), Err(ReceiptError::Signature));
}

#[test]
fn a_signature_over_the_same_bytes_for_another_purpose_counts_for_nothing() {
    let identity = identity(GOLDEN_KEY);
    let line = body(&receipt(identity.id())).unwrap();
    let bare = identity.secret().sign(line.as_bytes()).to_bytes();
    let digits: String = bare.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = format!("{HEAD}\n{line}\n{digits}\n");
    assert_eq!(read(text.as_bytes()), Err(ReceiptError::Signature));
}

#[test]
fn what_is_signed_in_another_form_is_none() {
    let identity = identity(GOLDEN_KEY);
    let line = body(&receipt(identity.id())).unwrap();
    let told = |line: &str| read(forged(&identity, HEAD, line).as_bytes());
    assert!(told(&line).is_ok());
    let changed = |from: &str, to: &str| {
        assert!(line.contains(from), "{from}");
        line.replacen(from, to, 1)
    };
    for wrong in [
        changed("\"generation\":1", "\"generation\":1,\"generation\":1"),
        changed("\"generation\":1", "\"generation\":2,\"generation\":1"),
        changed("\"generation\":1", "\"generation\":1,\"more\":1"),
        changed("\"generation\":1", "\"generation\": 1"),
        changed("\"generation\":1", "\"generation\":1.0"),
        changed("\"generation\":1", "\"generation\":-1"),
        changed("\"generation\":1,", ""),
        changed("\"signal\":null,", ""),
        changed("/bin/sh", "\\u002fbin/sh"),
        changed("\"exited\"", "\"vanished\""),
        changed("\"exit_code\":3", "\"exit_code\":256"),
        format!("{line} "),
        format!("[{line}]"),
        "[".repeat(4000),
        String::new(),
    ] {
        assert!(
            matches!(told(&wrong), Err(ReceiptError::Malformed(_))),
            "{wrong}"
        );
    }
    let other = changed("\"format\":1", "\"format\":2");
    assert_eq!(
        told(&other),
        Err(ReceiptError::Receipt(ReceiptFault::Format(2)))
    );
    for (head, version) in [("vistara-receipt-2", "2"), ("vistara-receipt-1 ", "1 ")] {
        assert_eq!(
            read(forged(&identity, head, &line).as_bytes()),
            Err(ReceiptError::Version(version.to_owned()))
        );
    }
}

#[test]
fn what_contradicts_itself_is_neither_signed_nor_read() {
    let identity = identity(GOLDEN_KEY);
    type Change = fn(&mut Receipt);
    let changes: [Change; 12] = [
        |receipt| receipt.end.signal = Some(9),
        |receipt| receipt.end.how = ReceiptHow::Signaled,
        |receipt| receipt.times.began_ms = None,
        |receipt| receipt.end.how = ReceiptHow::StartFailed,
        |receipt| receipt.request.caller = None,
        |receipt| receipt.output.stdout.digest = None,
        |receipt| receipt.output.stderr.missing_bytes = 1,
        |receipt| receipt.request.nonce = Some("F".repeat(32)),
        |receipt| receipt.request.image = "i".repeat(513),
        |receipt| receipt.ran.vmm = String::new(),
        |receipt| receipt.request.command = Some(vec!["x".repeat(4097)]),
        |receipt| receipt.request.command = Some(vec![String::new(); 129]),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut receipt = receipt(identity.id());
        change(&mut receipt);
        assert!(
            matches!(sign(&identity, &receipt), Err(ReceiptError::Receipt(_))),
            "{number}"
        );
        let line = serde_json::to_string(&receipt).unwrap();
        assert!(
            read(forged(&identity, HEAD, &line).as_bytes()).is_err(),
            "{number}"
        );
    }
}

#[test]
fn the_longest_receipt_is_written_and_read() {
    let identity = identity(GOLDEN_KEY);
    let mut receipt = receipt(identity.id());
    // The worst that JSON makes of a byte.
    let long = || "\u{1}".repeat(512);
    receipt.request.command = Some(vec!["\u{1}".repeat(32); 128]);
    receipt.request.image = long();
    receipt.request.architecture = Some(Architecture(long()));
    let ran = &mut receipt.ran;
    (ran.vmm, ran.payload, ran.accelerator) = (long(), long(), long());
    (ran.vmm_version, ran.kernel) = (Some(long()), Some(long()));
    (ran.template, ran.parent) = (Some(long()), Some(long()));
    let text = sign(&identity, &receipt);
    // Nobody's names are like that; what matters is that it is refused where it is written, and not where it is read.
    match text {
        Ok(text) => assert_eq!(read(text.as_bytes()).unwrap(), receipt),
        Err(error) => assert!(matches!(error, ReceiptError::Length(_)), "{error}"),
    }
    receipt.ran = self::receipt(identity.id()).ran;
    receipt.request.architecture = None;
    receipt.request.image = "i".repeat(512);
    let text = sign(&identity, &receipt).unwrap();
    assert_eq!(read(text.as_bytes()).unwrap(), receipt);
}

proptest! {
    #[test]
    fn nothing_makes_reading_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(read(&bytes).is_err());
        let mut text = b"vistara-receipt-1\n".to_vec();
        text.extend_from_slice(&bytes);
        prop_assert!(read(&text).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_signed_is_read_as_it_was(
        code in any::<u8>(),
        words in proptest::collection::vec(".{0,20}", 0..6),
        bytes in any::<u64>(),
        at in any::<u64>(),
    ) {
        let identity = identity(GOLDEN_KEY);
        let mut receipt = receipt(identity.id());
        receipt.end.exit_code = code;
        receipt.request.command = Some(words);
        receipt.output.stdout.bytes = bytes;
        receipt.times.ended_ms = at;
        let text = sign(&identity, &receipt).unwrap();
        prop_assert_eq!(read(text.as_bytes()).unwrap(), receipt);
    }
}
