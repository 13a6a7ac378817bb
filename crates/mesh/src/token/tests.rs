//! What a token allows, and that nothing makes it allow more.

use super::*;

const NOW: u64 = 1_800_000_000;

struct House {
    _dirs: Vec<tempfile::TempDir>,
    owner: Identity,
    holder: Identity,
    third: Identity,
    authority: Authority,
}

fn house() -> House {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let [owner, holder, third] =
        [0, 1, 2].map(|index: usize| Identity::open(dirs[index].path()).unwrap());
    House {
        authority: Authority::new(&owner).unwrap(),
        _dirs: dirs,
        owner,
        holder,
        third,
    }
}

impl House {
    fn terms(&self) -> GrantTerms {
        GrantTerms {
            id: GrantId::from_random([7; 8]),
            node: self.owner.id(),
            holder: self.holder.id(),
            rights: BTreeSet::from([Right::Run, Right::Images]),
            until_s: NOW + 100,
            limits: GrantLimits {
                memory_max: Some(Bytes(1 << 30)),
                machines_max: Some(3),
                disk_max: Some(Bytes(5 << 30)),
            },
        }
    }

    fn token(&self) -> Token {
        self.authority.give(&self.terms()).unwrap()
    }

    fn ambient(&self) -> Ambient {
        Ambient {
            caller: self.holder.id(),
            now_s: NOW,
            right: Some(Right::Run),
            memory: Bytes(0),
            machines: 0,
            disk: Bytes(0),
        }
    }

    fn allows(&self, token: &Token, ambient: Ambient) -> bool {
        self.authority
            .verify(token)
            .unwrap()
            .permits(&ambient)
            .is_ok()
    }
}

#[test]
fn a_token_says_what_was_written_into_it_also_as_text() {
    let house = house();
    let token: Token = house.token().to_string().parse().unwrap();
    assert_eq!(token.unchecked_terms().unwrap(), house.terms());
    assert_eq!(
        *house.authority.verify(&token).unwrap().terms(),
        house.terms()
    );
}

#[test]
fn it_counts_for_its_holder_its_rights_and_its_time_only() {
    let house = house();
    let token = house.token();
    let good = house.ambient();
    assert!(house.allows(&token, good));
    assert!(house.allows(
        &token,
        Ambient {
            now_s: NOW + 100,
            ..good
        }
    ));
    for bad in [
        Ambient {
            caller: house.third.id(),
            ..good
        },
        Ambient {
            caller: house.owner.id(),
            ..good
        },
        Ambient {
            now_s: NOW + 101,
            ..good
        },
        Ambient {
            right: Some(Right::Admin),
            ..good
        },
    ] {
        assert!(!house.allows(&token, bad), "{bad:?}");
    }
}

#[test]
fn an_admin_has_every_right_and_what_needs_none_is_open_to_any_grant() {
    let house = house();
    let terms = GrantTerms {
        rights: [Right::Admin].into(),
        ..house.terms()
    };
    let token = house.authority.give(&terms).unwrap();
    for right in [
        None,
        Some(Right::Run),
        Some(Right::Images),
        Some(Right::Admin),
    ] {
        let ambient = Ambient {
            right,
            ..house.ambient()
        };
        assert!(house.allows(&token, ambient), "{right:?}");
    }
    let ambient = Ambient {
        right: None,
        ..house.ambient()
    };
    assert!(house.allows(&house.token(), ambient));
}

#[test]
fn another_nodes_token_and_a_changed_one_are_refused() {
    let house = house();
    let other = Authority::new(&house.third).unwrap();
    // Signed by another, and saying that it is for that other.
    let foreign = other
        .give(&GrantTerms {
            node: house.third.id(),
            ..house.terms()
        })
        .unwrap();
    assert!(matches!(
        house.authority.verify(&foreign),
        Err(TokenError::Signature)
    ));
    // Signed by another, and claiming to be ours.
    let claimed = other.give(&house.terms()).unwrap();
    assert!(matches!(
        house.authority.verify(&claimed),
        Err(TokenError::Signature)
    ));
    let good = house.token();
    for index in 0..good.as_bytes().len() {
        let mut bytes = good.as_bytes().to_vec();
        bytes[index] ^= 1;
        let changed = Token::from_bytes(bytes).unwrap();
        if let Ok(verified) = house.authority.verify(&changed) {
            // Only bytes that mean nothing may change.
            assert_eq!(*verified.terms(), house.terms(), "byte {index}");
        }
    }
}

#[test]
fn narrowing_takes_away_and_never_adds() {
    let house = house();
    let good = house.ambient();
    let narrow = |narrowing: Narrowing| house.token().narrow(&narrowing, &house.holder).unwrap();
    let rights = narrow(Narrowing {
        rights: Some([Right::Images, Right::Admin].into()),
        ..Narrowing::default()
    });
    assert!(!house.allows(&rights, good));
    assert!(house.allows(
        &rights,
        Ambient {
            right: Some(Right::Images),
            ..good
        }
    ));
    assert!(!house.allows(
        &rights,
        Ambient {
            right: Some(Right::Admin),
            ..good
        }
    ));
    let time = narrow(Narrowing {
        until_s: Some(NOW + 5000),
        ..Narrowing::default()
    });
    assert!(house.allows(&time, good));
    assert!(!house.allows(
        &time,
        Ambient {
            now_s: NOW + 101,
            ..good
        }
    ));
    let short = narrow(Narrowing {
        until_s: Some(NOW - 1),
        ..Narrowing::default()
    });
    assert!(!house.allows(&short, good));
    let limits = GrantLimits {
        memory_max: Some(Bytes(100)),
        machines_max: Some(1),
        disk_max: Some(Bytes(10)),
    };
    let small = narrow(Narrowing {
        limits,
        ..Narrowing::default()
    });
    assert!(house.allows(
        &small,
        Ambient {
            memory: Bytes(100),
            machines: 1,
            ..good
        }
    ));
    assert!(!house.allows(
        &small,
        Ambient {
            memory: Bytes(101),
            machines: 1,
            ..good
        }
    ));
    assert!(!house.allows(
        &small,
        Ambient {
            memory: Bytes(1),
            machines: 2,
            ..good
        }
    ));
    for (bytes, allowed) in [(10, true), (11, false)] {
        let disk = Bytes(bytes);
        assert_eq!(house.allows(&small, Ambient { disk, ..good }), allowed);
    }
    // The terms stay those of the first block.
    assert_eq!(
        *house.authority.verify(&small).unwrap().terms(),
        house.terms()
    );
}

#[test]
fn the_holder_can_pass_it_on_to_one_other_who_cannot() {
    let house = house();
    let good = house.ambient();
    let to = Narrowing {
        to: Some(house.third.id()),
        rights: Some([Right::Run].into()),
        ..Narrowing::default()
    };
    let passed = house.token().narrow(&to, &house.holder).unwrap();
    assert!(house.allows(
        &passed,
        Ambient {
            caller: house.third.id(),
            ..good
        }
    ));
    assert!(!house.allows(
        &passed,
        Ambient {
            caller: house.third.id(),
            right: Some(Right::Images),
            ..good
        }
    ));
    assert!(!house.allows(
        &passed,
        Ambient {
            caller: house.owner.id(),
            ..good
        }
    ));
    assert!(
        !house.allows(&passed, good),
        "what was passed on is for one caller"
    );
    assert!(house.token().narrow(&to, &house.third).is_err());
    // Somebody who has the token, and signs with a key of their own that they pass it on to themselves.
    let stolen = house.token();
    let own = private(&house.third.secret().to_bytes()).unwrap();
    let block = BlockBuilder::new()
        .code(format!("delegate(\"{}\");", house.third.id()))
        .unwrap();
    let parsed = stolen.parse().unwrap();
    let signed = parsed
        .third_party_request()
        .unwrap()
        .create_block(&own, block)
        .unwrap();
    let forged = parsed
        .append_third_party(&signed.serialize().unwrap())
        .unwrap();
    let forged = Token::from_bytes(forged.to_vec().unwrap()).unwrap();
    assert!(!house.allows(
        &forged,
        Ambient {
            caller: house.third.id(),
            ..good
        }
    ));
    // And one who appends facts without signing.
    let block = BlockBuilder::new()
        .code(format!(
            "delegate(\"{0}\"); holder(\"{0}\"); caller(\"{1}\"); right(\"admin\");",
            house.third.id(),
            house.holder.id()
        ))
        .unwrap();
    let forged = Token::from_bytes(parsed.append(block).unwrap().to_vec().unwrap()).unwrap();
    assert!(!house.allows(
        &forged,
        Ambient {
            caller: house.third.id(),
            ..good
        }
    ));
    assert!(!house.allows(
        &forged,
        Ambient {
            right: Some(Right::Admin),
            ..good
        }
    ));
}

#[test]
fn a_check_on_something_unknown_fails_and_endless_work_ends() {
    let house = house();
    let parsed = house.token().parse().unwrap();
    for code in [
        "check if moon(\"full\");",
        // Doubles a set of facts with each round.
        "n(0); n(1); p($a, $b, $c, $d) <- n($a), n($b), n($c), n($d); q($a,$b,$c,$d,$e,$f,$g,$h) <- p($a,$b,$c,$d), p($e,$f,$g,$h); r($a, $h, $i, $p) <- q($a,$b,$c,$d,$e,$f,$g,$h), q($i,$j,$k,$l,$m,$n,$o,$p); check if r(2, 2, 2, 2);",
    ] {
        let block = BlockBuilder::new().code(code).unwrap();
        let token = Token::from_bytes(parsed.append(block).unwrap().to_vec().unwrap()).unwrap();
        assert!(!house.allows(&token, house.ambient()), "{code}");
    }
}

#[test]
fn a_token_narrowed_too_often_or_too_large_is_refused() {
    let house = house();
    let mut token = house.token();
    let narrowing = Narrowing {
        until_s: Some(NOW + 1),
        ..Narrowing::default()
    };
    for _ in 1..BLOCKS_MAX {
        token = token.narrow(&narrowing, &house.holder).unwrap();
    }
    assert!(house.allows(&token, house.ambient()));
    assert!(matches!(
        token.narrow(&narrowing, &house.holder),
        Err(TokenError::TooLarge)
    ));
    assert!(matches!(
        Token::from_bytes(vec![0; TOKEN_BYTES_MAX + 1]),
        Err(TokenError::TooLarge)
    ));
    assert!("vistara-grant-AAAA".parse::<Token>().is_err());
    assert!("x".parse::<Token>().is_err());
}
