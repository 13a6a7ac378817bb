//! Streams that are not what they should be, and tokens in the wrong hands.

use super::*;
use std::collections::BTreeSet;
use vistara_control::{Requirement, requirement};
use vistara_model::{GrantLimits, GrantTerms, Right};

struct House {
    _dirs: [tempfile::TempDir; 2],
    mesh: Arc<Mesh>,
    open: Arc<Open>,
    caller: Arc<Open>,
    _visits: mpsc::Receiver<Visit>,
}

async fn house() -> House {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (mesh, visits) = Mesh::new(dirs[0].path());
    let (other, _) = Mesh::new(dirs[1].path());
    House {
        open: mesh.open().await.ok().unwrap(),
        caller: other.open().await.ok().unwrap(),
        mesh,
        _dirs: dirs,
        _visits: visits,
    }
}

impl House {
    fn terms(&self) -> GrantTerms {
        GrantTerms {
            id: GrantId::from_random([1; 8]),
            node: self.open.identity.id(),
            holder: self.caller.identity.id(),
            rights: BTreeSet::from([Right::Run]),
            until_s: now_s() + 1000,
            limits: GrantLimits::default(),
        }
    }

    fn first(&self, nonce: u8, token: Option<&Token>) -> FirstFrame {
        FirstFrame {
            target: *self.open.identity.id().as_bytes(),
            generation: self.open.identity.generation(),
            nonce: [nonce; 16],
            deadline_ms: (now_s() + 30) * 1000,
            token: token.map(|token| token.as_bytes().to_vec()),
        }
    }

    fn why(&self, peer: NodeId, first: &FirstFrame) -> Option<String> {
        let judged = self.mesh.judge(&self.open, peer, first);
        judged.err().map(|fault| fault.0.message)
    }

    /// Whether a caller with this token may list machines.
    fn may(&self, peer: NodeId, first: &FirstFrame) -> Result<(), String> {
        let needed = requirement("GET", &["machines"]);
        assert_eq!(needed, Requirement::Right(Right::Run));
        self.mesh
            .judge(&self.open, peer, first)
            .and_then(|foreign| foreign.authorize(&self.mesh, self.open.identity.id(), needed))
            .map_err(|fault| fault.0.message)
    }
}

#[tokio::test]
async fn a_stream_is_taken_once_and_only_by_whom_and_when_it_is_meant_for() {
    let house = house().await;
    let peer = house.caller.identity.id();
    lock(&house.open.ledger).give(house.terms()).ok().unwrap();
    let token = house.open.authority.give(&house.terms()).unwrap();
    let good = house.first(1, Some(&token));
    assert_eq!(house.why(peer, &good), None);
    let again = house.why(peer, &good).unwrap();
    assert!(again.contains("already"), "{again}");
    let elsewhere = FirstFrame {
        target: [9; 32],
        ..house.first(2, Some(&token))
    };
    assert!(
        house
            .why(peer, &elsewhere)
            .unwrap()
            .contains("another node")
    );
    let earlier = FirstFrame {
        generation: house.open.identity.generation() - 1,
        ..house.first(3, Some(&token))
    };
    assert!(house.why(peer, &earlier).unwrap().contains("earlier start"));
    let late = |token| FirstFrame {
        deadline_ms: (now_s() - 120) * 1000,
        ..house.first(4, token)
    };
    for late in [late(None), late(Some(&token))] {
        assert!(house.why(peer, &late).unwrap().contains("deadline"));
    }
    let garbage = FirstFrame {
        token: Some(vec![0xff; 100]),
        ..house.first(5, None)
    };
    assert!(house.why(peer, &garbage).is_some());
}

#[tokio::test]
async fn nothing_is_remembered_of_who_has_no_grant_of_its_own() {
    let house = house().await;
    let peer = house.caller.identity.id();
    lock(&house.open.ledger).give(house.terms()).ok().unwrap();
    let token = house.open.authority.give(&house.terms()).unwrap();
    let stranger = NodeId::from_bytes([7; 32]);
    // Who shows nothing is let in to be told so; who shows another's token is refused.
    for _ in 0..2 {
        assert_eq!(house.why(stranger, &house.first(1, None)), None);
        assert!(house.why(stranger, &house.first(2, Some(&token))).is_some());
    }
    let good = house.first(2, Some(&token));
    assert_eq!(house.why(peer, &good), None, "its nonce was not used up");
    assert!(house.why(peer, &good).unwrap().contains("already"));
}

#[tokio::test]
async fn a_token_counts_for_its_holder_while_it_stands_in_the_books() {
    let house = house().await;
    let peer = house.caller.identity.id();
    let token = house.open.authority.give(&house.terms()).unwrap();
    let unknown = house.may(peer, &house.first(1, Some(&token))).unwrap_err();
    assert!(unknown.contains("does not know"), "{unknown}");
    lock(&house.open.ledger).give(house.terms()).ok().unwrap();
    assert_eq!(house.may(peer, &house.first(2, Some(&token))), Ok(()));
    let stranger = NodeId::from_bytes([7; 32]);
    let stolen = house.may(stranger, &house.first(3, Some(&token)));
    assert!(
        stolen
            .unwrap_err()
            .contains("does not allow this to this caller")
    );
    assert!(house.may(peer, &house.first(4, None)).is_err());
    let own = house.caller.authority.give(&GrantTerms {
        rights: Right::ALL.into(),
        ..house.terms()
    });
    let forged = house.may(peer, &house.first(5, Some(&own.unwrap())));
    assert!(forged.unwrap_err().contains("not given by this node"));
    house.mesh.revoke(house.terms().id).await.ok().unwrap();
    let revoked = house.may(peer, &house.first(6, Some(&token))).unwrap_err();
    assert!(revoked.contains("revoked"), "{revoked}");
}

#[tokio::test]
async fn the_books_are_read_as_they_were_written_and_damaged_ones_let_nobody_in() {
    let house = house().await;
    lock(&house.open.ledger).give(house.terms()).ok().unwrap();
    house.mesh.revoke(house.terms().id).await.ok().unwrap();
    let dir = house.mesh.dir().to_owned();
    let again = Ledger::open(&dir).ok().unwrap();
    assert_eq!(again.all(), lock(&house.open.ledger).all());
    assert_eq!(again.standing(&house.terms().id), Standing::Revoked);
    std::fs::write(dir.join("grants.json"), "{").unwrap();
    assert!(Ledger::open(&dir).is_err());
    assert_eq!(
        std::fs::read_to_string(dir.join("grants.json")).unwrap(),
        "{"
    );
}
