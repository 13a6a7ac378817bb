//! Packets and pages of membership, as others send them: first the bytes, then the table that they come to. The input is a row of
//! packets, each behind one byte for its sender and the time that has passed, and two for its length.
#![no_main]

#[path = "../../crates/node/src/mesh/gossip/wire.rs"]
mod wire;

use libfuzzer_sys::fuzz_target;
use std::time::Duration;
use vistara_control::membership::{Config, Membership, Output};
use vistara_model::NodeId;

const SENDERS: u8 = 8;
/// A table that the input can fill.
const MEMBERS_MAX: usize = 6;

fuzz_target!(|bytes: &[u8]| {
    let config = Config {
        members_max: MEMBERS_MAX,
        ..Config::default()
    };
    let mut now = Duration::ZERO;
    let mut table = Membership::new(config, NodeId::from_bytes([0xee; 32]), 1, 7, now);
    let _ = wire::decode(bytes);
    let mut rest = bytes;
    while let [who, low, high, more @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(more.len());
        let (one, after) = more.split_at(length);
        rest = after;
        now += Duration::from_millis(u64::from(who / SENDERS) * 100);
        let from = NodeId::from_bytes([who % SENDERS; 32]);
        if let Some(packet) = wire::decode(one) {
            // What was read is written back as it was.
            let again = wire::encode(&packet).expect("it came as bytes");
            assert_eq!(wire::decode(&again).as_ref(), Some(&packet));
            if table.takes(now, from, &packet) {
                sendable(table.handle(now, from, packet));
            }
        }
        if table.wake_at() <= now {
            sendable(table.poll(now));
        }
        assert!(table.members().count() <= MEMBERS_MAX);
    }
});

/// What it sends in answer can be sent, and is read by others.
fn sendable(outputs: Vec<Output>) {
    for output in outputs {
        if let Output::Send(_, packet) = output {
            let bytes = wire::encode(&packet).expect("our own packets are encoded");
            assert_eq!(wire::decode(&bytes), Some(packet));
        }
    }
}
