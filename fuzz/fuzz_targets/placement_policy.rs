//! A policy file, as a user may have been given one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vistara_control::placement::read_policy;

fuzz_target!(|bytes: &[u8]| {
    let _ = read_policy(bytes);
});
