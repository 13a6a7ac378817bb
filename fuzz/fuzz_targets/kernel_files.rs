//! A kernel or a module of one, as a user gives it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| vistara_machine::boot::fuzz_kernel(bytes));
