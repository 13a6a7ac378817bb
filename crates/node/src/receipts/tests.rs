//! What a receipt says of records as runs of every kind leave them.

use super::*;
use crate::logbook::Offsets;
use crate::machine::Continues;
use crate::mesh::Owner;
use vistara_model::{
    Accelerator, Backend, Generation, GrantId, Hypervisor, MachineId, MachineState, Signal,
};

/// A unikernel that has ended well, and was followed to its last byte.
fn record() -> Record {
    let request = vistara_api::RunRequest::default();
    Record {
        format: Record::FORMAT,
        id: MachineId::from_random([1; 16]),
        name: "web".parse().unwrap(),
        generation: Generation(1),
        spec: crate::request::spec(&request, "debian".parse().unwrap()).unwrap(),
        image_id: Digest::from_sha256([2; 32]),
        argv: vec!["sh".to_owned()],
        env: Vec::new(),
        user: String::new(),
        working_dir: String::new(),
        hostname: "web".to_owned(),
        stop_signal: Signal::TERM,
        hypervisor: Hypervisor::Qemu,
        backend: Backend {
            vmm: VmmKind::Qemu,
            payload: Payload::Nanos,
            accelerator: Accelerator::Tcg,
        },
        reasons: Vec::new(),
        kernel: None,
        program_file: None,
        linux_memory: None,
        owner: Some(Owner {
            node: NodeId::from_bytes([3; 32]),
            grant: GrantId::from_random([4; 8]),
        }),
        slot: 0,
        state: MachineState::Ended,
        end: Some(EndReason::Exited {
            status: ExitStatus::Code(0),
            out_of_memory: false,
        }),
        created_ns: 1_000_000_000,
        started_ns: Some(2_000_000_000),
        ended_ns: Some(5_000_000_000),
        vm: None,
        retried: false,
        provisional: false,
        undone: None,
        undone_boot_id: None,
        log_base: Offsets::default(),
        template: None,
        warm: false,
        continues: None,
        copy_of: None,
        held: false,
        proof: Proof {
            exit_heard: true,
            ..Proof::default()
        },
        timings: Vec::new(),
    }
}

fn said(record: &Record) -> Receipt {
    let end = ended(record).unwrap();
    let node = NodeId::from_bytes([5; 32]);
    state(node, record, end, &Tallies::begin(), None)
}

#[test]
fn output_that_nobody_may_have_read_to_its_end_is_never_called_complete() {
    let mut record = record();
    assert!(said(&record).output.complete);
    record.proof.cut = true;
    assert!(!said(&record).output.complete);
    // A later node reads that from the disk.
    let text = serde_json::to_string(&record.proof).unwrap();
    record.proof = serde_json::from_str(&text).unwrap();
    assert!(!said(&record).output.complete);
    record.proof = Proof {
        exit_heard: false,
        ..Proof::default()
    };
    assert!(!said(&record).output.complete);
}

#[test]
fn nothing_of_the_first_run_but_what_was_asked_is_left_to_the_second() {
    let asked = Asked {
        nonce: Some("ab".repeat(16)),
        ..Asked::default()
    };
    let mut proof = Proof {
        exit_heard: true,
        cut: true,
        unseen: true,
        began_again_ns: Some(1),
        ..Proof::of(asked.clone())
    };
    proof.begin_again();
    assert_eq!(proof, Proof::of(asked));
}

#[test]
fn times_are_of_the_run_that_was_and_not_of_an_undone_one() {
    let mut record = record();
    assert_eq!(said(&record).times.began_ms, Some(2000));
    record.undone = Some("it forked".to_owned());
    let never = ended(&record).unwrap_err();
    assert!(never.contains("never began"), "{never}");
    record.proof.began_again_ns = Some(4_000_000_000);
    let receipt = said(&record);
    assert_eq!(receipt.times.began_ms, Some(4000));
    assert_eq!(receipt.usage.run_ms, 1000);
}

#[test]
fn a_copy_names_nobody_as_who_asked_for_it() {
    let mut record = record();
    let asked = said(&record).request;
    assert_eq!(asked.caller, Some(NodeId::from_bytes([3; 32])));
    assert!(asked.grant.is_some());
    record.continues = Some(Continues {
        parent: "machine web".to_owned(),
        renewed: true,
        printed_before: Offsets::default(),
    });
    let asked = said(&record).request;
    assert_eq!((asked.caller, asked.grant), (None, None));
}
