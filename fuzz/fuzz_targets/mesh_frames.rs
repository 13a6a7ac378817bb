//! What another node may send before HTTP: greetings, the first frame of a stream, and the token in it, what nodes state about themselves; and what a user may be
//! given to type, tickets and tokens.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vistara_mesh::{Ticket, Token, facts, frame};

fuzz_target!(|bytes: &[u8]| {
    let _ = frame::decode_hello(bytes);
    if let Ok(open) = frame::decode_open(bytes) {
        // What was read is written back as it was.
        let again = frame::encode(&open).expect("it came in a frame");
        assert_eq!(frame::decode_open(&again[4..]).expect("it was read before"), open);
    }
    let _ = facts::read(bytes);
    if let Ok(token) = Token::from_bytes(bytes.to_vec()) {
        let _ = token.unchecked_terms();
        let _ = token.is_passed_on();
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Ok(ticket) = text.parse::<Ticket>() {
            assert_eq!(ticket.to_string().parse(), Ok(ticket));
        }
        let _ = text.parse::<Token>();
    }
});
