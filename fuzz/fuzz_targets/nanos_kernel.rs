//! A file that is said to be a Nanos kernel.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vistara_nanos::kernel::{KernelFacts, neutralise_pvh_note};

fuzz_target!(|file: &[u8]| {
    let _ = KernelFacts::read(file);
    let _ = neutralise_pvh_note(file);
});
