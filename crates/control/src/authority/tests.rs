//! The table of who may do what.

// A failure in a helper is the test's.
#![allow(clippy::unwrap_used)]

use super::*;
use std::collections::BTreeSet;
use vistara_model::{GrantId, GrantLimits};

const NOW: u64 = 1_000;

fn node() -> NodeId {
    NodeId::from_bytes([1; 32])
}

fn terms(rights: &[Right]) -> GrantTerms {
    GrantTerms {
        id: GrantId::from_random([3; 8]),
        node: node(),
        holder: NodeId::from_bytes([2; 32]),
        rights: rights.iter().copied().collect::<BTreeSet<_>>(),
        until_s: NOW,
        limits: GrantLimits::default(),
    }
}

fn ask<'a>(terms: Option<&'a GrantTerms>, requirement: Requirement) -> Question<'a> {
    Question {
        node: node(),
        terms,
        standing: Standing::Live,
        now_s: NOW,
        requirement,
    }
}

#[test]
fn each_request_needs_what_the_table_says() {
    use Requirement::{Any, OwnMachine, OwnerOnly};
    let run = Requirement::Right(Right::Run);
    let images = Requirement::Right(Right::Images);
    let admin = Requirement::Right(Right::Admin);
    for (method, path, needed) in [
        ("GET", "version", Any),
        ("GET", "machines", run),
        ("POST", "machines", run),
        ("POST", "explain", run),
        ("GET", "machines/m", OwnMachine),
        ("DELETE", "machines/m", OwnMachine),
        ("POST", "machines/m/stop", OwnMachine),
        ("POST", "machines/m/kill", OwnMachine),
        ("GET", "machines/m/wait", OwnMachine),
        ("GET", "machines/m/logs", OwnMachine),
        ("GET", "machines/m/stats", OwnMachine),
        ("GET", "machines/m/attach", OwnMachine),
        ("GET", "machines/m/exec", OwnMachine),
        ("GET", "machines/m/archive", OwnMachine),
        ("PUT", "machines/m/archive", OwnMachine),
        ("GET", "images", run),
        ("POST", "images/pull", images),
        ("POST", "images/import", images),
        ("POST", "services/message", Requirement::Partner),
        ("POST", "services", OwnerOnly),
        ("GET", "services/message", OwnerOnly),
        ("DELETE", "services/web", OwnerOnly),
        ("POST", "offers", run),
        ("POST", "offers/00/take", run),
        ("DELETE", "offers/00", run),
        ("GET", "facts", Requirement::Any),
        ("POST", "place", Requirement::OwnerOnly),
        ("POST", "mesh/terms", Requirement::OwnerOnly),
        ("POST", "forwards", Requirement::OwnerOnly),
        ("POST", "images/offer", images),
        ("POST", "images/assemble", images),
        ("PUT", "blobs/sha256:0", images),
        ("GET", "blobs/sha256:0", run),
        ("GET", "image/parts", run),
        ("DELETE", "image", admin),
        ("POST", "images/prune", admin),
        ("GET", "doctor", admin),
        ("POST", "templates", admin),
        ("GET", "snapshots", admin),
        ("DELETE", "snapshots/s", admin),
        ("POST", "snapshots/offer", admin),
        ("POST", "snapshots/import", admin),
        ("POST", "snapshots/s/pack", admin),
        ("POST", "snapshots/s/restore", admin),
        ("POST", "machines/m/snapshots", OwnerOnly),
        ("POST", "machines/m/fork", OwnerOnly),
        ("POST", "tasks", OwnerOnly),
        ("POST", "shutdown", OwnerOnly),
        ("POST", "kernels", OwnerOnly),
        ("POST", "grants", OwnerOnly),
        ("GET", "grants", OwnerOnly),
        ("GET", "nodes", OwnerOnly),
        ("GET", "nodes/n/stream", OwnerOnly),
        ("POST", "mesh", OwnerOnly),
        ("DELETE", "machines", OwnerOnly),
        ("GET", "machines/m/wait/more", OwnerOnly),
        ("GET", "machines/m/new", OwnerOnly),
        ("TRACE", "version", OwnerOnly),
        ("GET", "", OwnerOnly),
    ] {
        let parts: Vec<&str> = path.split('/').collect();
        assert_eq!(requirement(method, &parts), needed, "{method} {path}");
    }
}

#[test]
fn a_caller_is_served_with_a_live_grant_for_it_only() {
    let run = terms(&[Right::Run]);
    let elsewhere = GrantTerms {
        node: NodeId::from_bytes([9; 32]),
        ..run.clone()
    };
    let need = Requirement::Right(Right::Run);
    let good = ask(Some(&run), need);
    let images = Requirement::Right(Right::Images);
    for (question, refusal) in [
        (good, None),
        (ask(Some(&run), Requirement::OwnMachine), None),
        (ask(Some(&run), Requirement::Any), None),
        (ask(None, Requirement::Any), Some(Refusal::NoGrant)),
        (ask(Some(&elsewhere), need), Some(Refusal::OtherNode)),
        (
            Question {
                standing: Standing::Revoked,
                ..good
            },
            Some(Refusal::Revoked),
        ),
        (
            Question {
                standing: Standing::Unknown,
                ..good
            },
            Some(Refusal::Unknown),
        ),
        (
            Question {
                now_s: NOW + 1,
                ..good
            },
            Some(Refusal::Expired),
        ),
        (ask(Some(&run), images), Some(Refusal::Right(Right::Images))),
        (
            ask(Some(&run), Requirement::OwnerOnly),
            Some(Refusal::OwnerOnly),
        ),
    ] {
        assert_eq!(authorize(&question).err(), refusal, "{question:?}");
    }
    let admin = terms(&[Right::Admin]);
    assert!(authorize(&ask(Some(&admin), images)).is_ok());
    let owners = authorize(&ask(Some(&admin), Requirement::OwnerOnly));
    assert_eq!(owners, Err(Refusal::OwnerOnly));
    let none = terms(&[]);
    assert_eq!(
        authorize(&ask(Some(&none), need)),
        Err(Refusal::Right(Right::Run))
    );
}

#[test]
fn a_quota_is_for_all_machines_of_a_grant_together() {
    let mut terms = terms(&[Right::Run]);
    let usage = Usage {
        machines: 2,
        memory: Bytes(200),
    };
    assert!(within_quota(&terms, usage, Bytes(u64::MAX)).is_ok());
    terms.limits = GrantLimits {
        memory_max: Some(Bytes(300)),
        machines_max: Some(3),
        disk_max: Some(Bytes(1000)),
    };
    let after = within_quota(&terms, usage, Bytes(100)).unwrap();
    assert_eq!((after.machines, after.memory), (3, Bytes(300)));
    let refusal = within_quota(&terms, usage, Bytes(101)).unwrap_err();
    assert!(matches!(refusal, Refusal::Memory { .. }));
    let refusal = within_quota(&terms, after, Bytes(0)).unwrap_err();
    assert_eq!(
        refusal,
        Refusal::Machines {
            allowed: 3,
            used: 3
        }
    );
    // Nothing overflows into what is allowed.
    assert!(within_quota(&terms, usage, Bytes(u64::MAX)).is_err());
    assert_eq!(within_disk(&terms, Bytes(1), Bytes(999)), Ok(Bytes(1000)));
    for (used, asked) in [(1, 1000), (u64::MAX, u64::MAX), (1, u64::MAX)] {
        let refusal = within_disk(&terms, Bytes(used), Bytes(asked)).unwrap_err();
        assert!(matches!(refusal, Refusal::Disk { .. }));
    }
    terms.limits.disk_max = None;
    assert!(within_disk(&terms, Bytes(1), Bytes(u64::MAX)).is_ok());
}
