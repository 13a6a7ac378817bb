//! A disk's partition table and log record, and a record alone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io::Cursor;
use vistara_nanos::klog::{self, Record};

fuzz_target!(|disk: &[u8]| {
    let _ = Record::parse(disk);
    let _ = klog::read(&mut Cursor::new(disk));
});
