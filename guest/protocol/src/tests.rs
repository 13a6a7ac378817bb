//! Properties of frames and messages: nothing that arrives does harm, and nothing whole is lost.

use crate::*;
use proptest::prelude::*;

fn message(number: u32) -> ToGuest {
    ToGuest::Ping { request: number }
}

fn frames(decoder: &mut Decoder, bytes: &[u8], piece: usize) -> Vec<Frame> {
    let mut found = Vec::new();
    for part in bytes.chunks(piece.max(1)) {
        decoder.push(part);
        found.extend(std::iter::from_fn(|| decoder.next_frame()));
    }
    found
}

/// Bytes that look like frames more often than chance has it.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        Just(vec![0xF5, 0x56, 0x41, 0x9B]),
        Just(vec![0xF5, 0x56, 0x41, 0x9B, PROTOCOL_VERSION, 2, 0, 0]),
        (0usize..300, 0usize..300).prop_map(|(length, cut)| {
            // A frame cut off: its header is right, and the payload is what follows.
            let mut frame = Vec::new();
            let payload = vec![0; length];
            encode_data(
                &mut frame,
                FrameKind::Stdout,
                &mut Sequence::new(3),
                1,
                0,
                (&payload, &[]),
            );
            frame.truncate(frame::HEADER_LEN + cut.min(length));
            frame
        }),
        Just(vec![0xF5, 0xF5, 0x56]),
        Just(vec![0; 30]),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in garbage(), piece in 1usize..100) {
        let mut decoder = Decoder::new();
        for frame in frames(&mut decoder, &bytes, piece) {
            let _ = decode_message::<ToGuest>(&frame.payload);
        }
        let _ = decode_message::<ToGuest>(&bytes);
        let _ = decode_message::<ToHost>(&bytes);
        let _ = decode_message::<Hello>(&bytes);
        fuzz(&bytes);
    }

    #[test]
    fn frames_survive_any_splitting(count in 0u32..20, piece in 1usize..200, data in prop::collection::vec(any::<u8>(), 0..500)) {
        let mut sequence = Sequence::new(7);
        let mut bytes = Vec::new();
        for number in 0..count {
            encode_frame(&mut bytes, FrameKind::Message, &mut sequence, &message(number)).unwrap();
            let (front, back) = data.split_at(data.len() / 3);
            encode_data(&mut bytes, FrameKind::Stdout, &mut sequence, number, 9, (front, back));
        }
        let mut decoder = Decoder::new();
        let found = frames(&mut decoder, &bytes, piece);
        prop_assert_eq!(found.len(), 2 * count as usize);
        prop_assert_eq!(decoder.skipped(), 0);
        let mut expected = Sequence::new(7);
        for (index, pair) in found.chunks(2).enumerate() {
            prop_assert!(expected.accept(&pair[0]) && expected.accept(&pair[1]));
            prop_assert_eq!(decode_message::<ToGuest>(&pair[0].payload), Ok(message(index as u32)));
            prop_assert_eq!(pair[1].data(), Some((9, &data[..])));
        }
    }

    #[test]
    fn frames_are_found_after_garbage_and_a_flush(before in garbage(), piece in 1usize..5000) {
        let mut bytes = before;
        bytes.resize(bytes.len() + FLUSH_LEN, 0);
        // One that distrusts may have given up; whether it has is told.
        let mut distrustful = Decoder::distrustful();
        prop_assert!(frames(&mut distrustful, &bytes, piece).len() <= 12);
        encode_frame(&mut bytes, FrameKind::Message, &mut Sequence::new(1), &message(5)).unwrap();
        let found = frames(&mut Decoder::new(), &bytes, piece);
        let last = found.last().unwrap();
        prop_assert_eq!(decode_message::<ToGuest>(&last.payload), Ok(message(5)));
    }

    #[test]
    fn a_changed_byte_makes_no_other_frame(at in 0usize..40, bit in 0u8..8) {
        let mut bytes = Vec::new();
        encode_frame(&mut bytes, FrameKind::Message, &mut Sequence::new(1), &message(5)).unwrap();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        bytes.resize(bytes.len() + FLUSH_LEN, 0);
        prop_assert_eq!(Decoder::new().next_frame(), None);
        prop_assert_eq!(frames(&mut Decoder::new(), &bytes, 1000), vec![]);
    }

    #[test]
    fn a_decoder_holds_no_more_than_a_frame(bytes in garbage(), times in 1usize..200) {
        let mut decoder = Decoder::new();
        for _ in 0..times {
            decoder.push(&bytes);
            while decoder.next_frame().is_some() {}
            prop_assert!(decoder.held() <= PAYLOAD_MAX + frame::HEADER_LEN);
        }
    }
}

#[test]
fn a_distrustful_decoder_gives_up_after_a_few_right_headers_with_wrong_payloads() {
    let mut cut_off = Vec::new();
    let bytes = vec![7; DATA_MAX];
    encode_data(
        &mut cut_off,
        FrameKind::Stdout,
        &mut Sequence::new(1),
        1,
        0,
        (&bytes, &[]),
    );
    cut_off.truncate(frame::HEADER_LEN);
    let mut good = Vec::new();
    encode_frame(
        &mut good,
        FrameKind::Message,
        &mut Sequence::new(1),
        &message(5),
    )
    .unwrap();
    let after = |times: usize, mut decoder: Decoder| {
        let mut bytes = cut_off.repeat(times);
        bytes.resize(bytes.len() + FLUSH_LEN, 0);
        bytes.extend_from_slice(&good);
        (
            frames(&mut decoder, &bytes, 4096).len(),
            decoder.has_given_up(),
            decoder.held(),
        )
    };
    assert_eq!(after(16, Decoder::distrustful()), (1, false, 0));
    assert_eq!(after(17, Decoder::distrustful()), (0, true, 0));
    assert_eq!(after(17, Decoder::new()), (1, false, 0));
}

#[test]
fn a_message_that_does_not_fit_is_refused_and_uses_up_no_number() {
    let mut sequence = Sequence::new(1);
    let mut out = Vec::new();
    let huge = ToGuest::Stat {
        request: 1,
        path: "x".repeat(PAYLOAD_MAX),
        follow: true,
    };
    let refused = encode_frame(&mut out, FrameKind::Message, &mut sequence, &huge);
    assert_eq!(refused, Err(MessageError::TooLong));
    assert!(out.is_empty());
    assert_eq!(sequence, Sequence::new(1));
}

#[test]
fn the_bytes_of_version_one_stay_as_they_are() {
    let mut out = Vec::new();
    let mut sequence = Sequence::new(0x0102_0304_0506_0708);
    encode_frame(&mut out, FrameKind::Message, &mut sequence, &message(300)).unwrap();
    let header = [
        0xF5, 0x56, 0x41, 0x9B, 1, 2, 0x3C, 0x45, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0,
        3, 0, 0, 0,
    ];
    assert_eq!(out[..28], header);
    // The eighteenth request of the list, then 300 in groups of seven bits.
    assert_eq!(out[32..], [17, 0xAC, 0x02]);
}
