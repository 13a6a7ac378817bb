//! Bodies and messages of the interface, in both directions: other nodes ask with them and answer with them. The first byte
//! says which kind.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::de::DeserializeOwned;
use serde::Serialize;
use vistara_api::stream::{ClientSignal, StreamEvent};
use vistara_api::*;

/// What is read is written, and read again as it was.
fn both_ways<T: DeserializeOwned + Serialize>(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(bytes) {
        let text = serde_json::to_vec(&value).expect("it came as JSON");
        serde_json::from_slice::<T>(&text).expect("it was written by us");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    match kind % 16 {
        0 => both_ways::<RunRequest>(bytes),
        1 => both_ways::<ExecRequest>(bytes),
        2 => both_ways::<AttachRequest>(bytes),
        3 => both_ways::<ClientSignal>(bytes),
        4 => both_ways::<StreamEvent>(bytes),
        5 => both_ways::<ImageParts>(bytes),
        6 => both_ways::<WantedParts>(bytes),
        7 => both_ways::<PlaceRequest>(bytes),
        8 => both_ways::<OfferRequest>(bytes),
        9 => both_ways::<OfferAnswer>(bytes),
        10 => both_ways::<NodeStatement>(bytes),
        11 => both_ways::<GrantRequest>(bytes),
        12 => both_ways::<JoinRequest>(bytes),
        13 => both_ways::<ErrorBody>(bytes),
        14 => both_ways::<ImageEvent>(bytes),
        _ => both_ways::<MachineDetail>(bytes),
    }
});
