//! A program in an image: an executable, a script, and what was remembered of one.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vistara_image::fuzz_program(bytes));
