//! What nodes that look after a service may send each other: questions, answers, and the document of a service.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vistara_control::services::wire::{Answer, Request};
use vistara_mesh::service::SealedDocument;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = Request::decode(bytes) {
        // What was read is written back as it was.
        let again = request.encode().expect("it came in a message");
        assert_eq!(Request::decode(&again).expect("it was read before"), request);
    }
    if let Ok(answer) = Answer::decode(bytes) {
        let again = answer.encode().expect("it came in a message");
        assert_eq!(Answer::decode(&again).expect("it was read before"), answer);
    }
    let _ = SealedDocument::read(bytes);
});
