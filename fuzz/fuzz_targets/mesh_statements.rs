//! What nodes sign and others pass on: facts, members' cards, receipts. Signatures are looked at last, so that a fuzzer gets far
//! without any.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vistara_mesh::card::Card;
use vistara_mesh::{facts, receipt};

fuzz_target!(|bytes: &[u8]| {
    let _ = facts::read(bytes);
    let _ = Card::read(bytes);
    let _ = receipt::read(bytes);
    // Behind a sound head, which a fuzzer would spend its time on finding.
    let _ = receipt::read(&[b"vistara-receipt-1\n", bytes].concat());
});
