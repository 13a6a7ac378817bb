//! What a guest or a host may send on the agent's channel.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vistara_guest_protocol::fuzz(bytes));
