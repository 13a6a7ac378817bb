//! Packets of membership as bytes (`docs/formats/mesh.md`). Reading is bounded by the bytes that there are, and total.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use vistara_control::membership::{Age, Body, Life, News, Packet, Stated, Told};
use vistara_model::NodeId;

/// The first byte of each packet. Others are thrown away. Before 2, news had no ages.
const VERSION: u8 = 2;

type Key = [u8; 32];

#[derive(Serialize, Deserialize)]
enum WireBody {
    Ping { number: u64, version: u64 },
    Ack { number: u64 },
    PingFor { number: u64, target: Key },
    AckFor { number: u64, target: Key },
    Gossip,
    Pull { number: u64, from: u64 },
    Page { number: u64, next: Option<u64> },
}

#[derive(Serialize, Deserialize)]
enum WireLife {
    Alive,
    Suspect,
    Dead,
}

#[derive(Serialize, Deserialize)]
struct WireNews {
    node: Key,
    incarnation: u64,
    life: WireLife,
    age: u8,
}

#[derive(Serialize, Deserialize)]
struct WireStated<'a> {
    node: Key,
    version: u64,
    bytes: &'a [u8],
}

#[derive(Serialize, Deserialize)]
struct Wire<'a> {
    body: WireBody,
    news: Vec<WireNews>,
    #[serde(borrow)]
    facts: Vec<WireStated<'a>>,
}

fn body_out(body: Body) -> WireBody {
    match body {
        Body::Ping { number, version } => WireBody::Ping { number, version },
        Body::Ack { number } => WireBody::Ack { number },
        Body::PingFor { number, target } => WireBody::PingFor {
            number,
            target: *target.as_bytes(),
        },
        Body::AckFor { number, target } => WireBody::AckFor {
            number,
            target: *target.as_bytes(),
        },
        Body::Gossip => WireBody::Gossip,
        Body::Pull { number, from } => WireBody::Pull { number, from },
        Body::Page { number, next } => WireBody::Page { number, next },
    }
}

fn body_in(body: WireBody) -> Body {
    match body {
        WireBody::Ping { number, version } => Body::Ping { number, version },
        WireBody::Ack { number } => Body::Ack { number },
        WireBody::PingFor { number, target } => Body::PingFor {
            number,
            target: NodeId::from_bytes(target),
        },
        WireBody::AckFor { number, target } => Body::AckFor {
            number,
            target: NodeId::from_bytes(target),
        },
        WireBody::Gossip => Body::Gossip,
        WireBody::Pull { number, from } => Body::Pull { number, from },
        WireBody::Page { number, next } => Body::Page { number, next },
    }
}

fn life_out(life: Life) -> WireLife {
    match life {
        Life::Alive => WireLife::Alive,
        Life::Suspect => WireLife::Suspect,
        Life::Dead => WireLife::Dead,
    }
}

fn life_in(life: WireLife) -> Life {
    match life {
        WireLife::Alive => Life::Alive,
        WireLife::Suspect => Life::Suspect,
        WireLife::Dead => Life::Dead,
    }
}

/// A packet's bytes; nothing only where the encoder fails, which it does for no packet.
pub(super) fn encode(packet: &Packet) -> Option<Vec<u8>> {
    let news = |told: &Told| WireNews {
        node: *told.news.node.as_bytes(),
        incarnation: told.news.incarnation,
        life: life_out(told.news.life),
        age: told.age.0,
    };
    let wire = Wire {
        body: body_out(packet.body),
        news: packet.news.iter().map(news).collect(),
        facts: (packet.facts.iter())
            .map(|one| WireStated {
                node: *one.node.as_bytes(),
                version: one.version,
                bytes: &one.bytes,
            })
            .collect(),
    };
    postcard::to_extend(&wire, vec![VERSION]).ok()
}

/// The packet that these bytes are; nothing where they are none.
pub(super) fn decode(bytes: &[u8]) -> Option<Packet> {
    let (&VERSION, bytes) = bytes.split_first()? else {
        return None;
    };
    let (wire, rest) = postcard::take_from_bytes::<Wire<'_>>(bytes).ok()?;
    let news = |news: WireNews| Told {
        news: News {
            node: NodeId::from_bytes(news.node),
            incarnation: news.incarnation,
            life: life_in(news.life),
        },
        age: Age(news.age),
    };
    rest.is_empty().then(|| Packet {
        body: body_in(wire.body),
        news: wire.news.into_iter().map(news).collect(),
        facts: (wire.facts.into_iter())
            .map(|one| Stated {
                node: NodeId::from_bytes(one.node),
                version: one.version,
                bytes: Arc::from(one.bytes),
            })
            .collect(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;

    /// One of each kind, with numbers that take the most room.
    fn packets() -> Vec<Packet> {
        let target = NodeId::from_bytes([0xff; 32]);
        let number = u64::MAX;
        let bodies = [
            Body::Ping {
                number,
                version: number,
            },
            Body::Ack { number },
            Body::PingFor { number, target },
            Body::AckFor { number, target },
            Body::Gossip,
            Body::Pull {
                number,
                from: number,
            },
            Body::Page {
                number,
                next: Some(number),
            },
        ];
        let news = [Life::Alive, Life::Suspect, Life::Dead].map(|life| Told {
            news: News {
                node: target,
                incarnation: number,
                life,
            },
            age: Age::OLD,
        });
        let facts = vec![Stated {
            node: target,
            version: number,
            bytes: Arc::from(vec![7; 640]),
        }];
        bodies
            .map(|body| Packet {
                body,
                news: news.to_vec(),
                facts: facts.clone(),
            })
            .to_vec()
    }

    #[test]
    fn a_packet_is_read_as_it_was_written_and_is_no_longer_than_was_counted() {
        for packet in packets() {
            let bytes = encode(&packet).unwrap();
            assert_eq!(decode(&bytes).unwrap(), packet);
            assert!(bytes.len() <= packet.bytes(), "{:?}", packet.body);
        }
    }

    #[test]
    fn what_is_cut_short_or_has_more_behind_it_is_no_packet() {
        for packet in packets() {
            let bytes = encode(&packet).unwrap();
            for end in 0..bytes.len() {
                assert_eq!(decode(&bytes[..end]), None, "{end}");
            }
            let mut more = bytes.clone();
            more.push(0);
            assert_eq!(decode(&more), None);
            let mut other = bytes;
            other[0] = VERSION + 1;
            assert_eq!(decode(&other), None);
        }
        // A length beyond all memory.
        assert_eq!(decode(&[VERSION, 4, 0xff, 0xff, 0xff, 0xff, 0x7f]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_packet_that_was_changed_is_another_or_none(
            which in 0..7_usize,
            changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 1..6),
        ) {
            let mut bytes = encode(&packets()[which]).unwrap();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some(packet) = decode(&bytes) {
                prop_assert_eq!(decode(&encode(&packet).unwrap()), Some(packet));
            }
        }
    }
}
