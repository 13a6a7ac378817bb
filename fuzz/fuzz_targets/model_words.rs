//! Words that users, images and other nodes write: names, quantities, digests, ports, volumes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fmt::{Debug, Display};
use std::str::FromStr;
use vistara_model::*;

/// What is read is written in one form, which is read as the same.
fn one_form<T: FromStr + Display + PartialEq + Debug>(text: &str)
where
    T::Err: Debug,
{
    if let Ok(value) = text.parse::<T>() {
        let again: T = value.to_string().parse().expect("it was written by us");
        assert_eq!(again, value);
    }
}

fuzz_target!(|text: &str| {
    one_form::<ImageRef>(text);
    one_form::<Digest>(text);
    one_form::<NodeId>(text);
    one_form::<GrantId>(text);
    one_form::<MachineId>(text);
    one_form::<MachineName>(text);
    // Shown in another form than it is written in.
    let _ = text.parse::<PortMapping>();
    let _ = text.parse::<Bytes>();
    let _ = text.parse::<Cpus>();
    let _ = text.parse::<VolumeMount>();
    let _ = text.parse::<NamedVolume>();
    let _ = text.parse::<EnvVar>();
    let _ = text.parse::<Signal>();
    let _ = text.parse::<Hypervisor>();
});
