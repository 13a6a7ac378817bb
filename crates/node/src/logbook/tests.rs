//! Tests of the log book: what is written is read, whatever is torn, rotated or slow.

use super::*;
use proptest::prelude::*;

fn small() -> Limits {
    Limits {
        segment_bytes: 4 << 10,
        segments_max: 4,
    }
}

fn text(entries: &[Entry], wanted: Stream) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        if let Entry::Output { stream, bytes, .. } = entry
            && *stream == wanted
        {
            out.extend_from_slice(bytes);
        }
    }
    out
}

async fn all(book: &Arc<LogBook>, start: Start) -> Vec<Entry> {
    let mut reader = book.reader(start, false);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next(false).await.unwrap() {
        entries.push(entry);
    }
    entries
}

#[tokio::test]
async fn both_streams_come_back_apart_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), Limits::default()).unwrap();
    book.append(Stream::Stdout, 0, 1, b"one ").unwrap();
    book.append(Stream::Stderr, 0, 2, b"bad").unwrap();
    book.append(Stream::Stdout, 4, 3, b"two").unwrap();
    let entries = all(&book, Start::Oldest).await;
    assert_eq!(text(&entries, Stream::Stdout), b"one two");
    assert_eq!(text(&entries, Stream::Stderr), b"bad");
}

#[tokio::test]
async fn bytes_sent_twice_are_recorded_once_and_missing_ones_are_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), Limits::default()).unwrap();
    book.append(Stream::Stdout, 0, 1, b"abcdef").unwrap();
    book.append(Stream::Stdout, 3, 1, b"defghi").unwrap();
    book.append(Stream::Stdout, 0, 1, b"abc").unwrap();
    book.append(Stream::Stdout, 12, 1, b"!").unwrap();
    let entries = all(&book, Start::Oldest).await;
    assert_eq!(text(&entries, Stream::Stdout), b"abcdefghi!");
    assert!(
        entries
            .iter()
            .any(|entry| matches!(entry, Entry::Gap { bytes: 3, .. })),
        "{entries:?}"
    );
    assert_eq!(
        book.offsets(),
        Offsets {
            stdout: 13,
            stderr: 0
        }
    );
}

#[tokio::test]
async fn a_torn_last_record_is_cut_off_and_the_offsets_are_exact() {
    let dir = tempfile::tempdir().unwrap();
    {
        let book = LogBook::open(dir.path(), Limits::default()).unwrap();
        book.append(Stream::Stdout, 0, 1, b"kept").unwrap();
        book.append(Stream::Stderr, 0, 1, b"torn").unwrap();
    }
    let path = dir.path().join("00000000.log");
    let len = std::fs::metadata(&path).unwrap().len();
    for cut in 1..20 {
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(len - cut)
            .unwrap();
        let book = LogBook::open(dir.path(), Limits::default()).unwrap();
        assert_eq!(
            book.offsets(),
            Offsets {
                stdout: 4,
                stderr: 0
            }
        );
        book.append(Stream::Stderr, 0, 1, b"torn").unwrap();
        assert_eq!(
            text(&all(&book, Start::Oldest).await, Stream::Stderr),
            b"torn"
        );
    }
}

#[tokio::test]
async fn the_oldest_segments_go_and_a_reader_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), small()).unwrap();
    for index in 0..64u64 {
        book.append(Stream::Stdout, index * 1000, 1, &[b'x'; 1000])
            .unwrap();
    }
    assert!(segment::list(dir.path()).unwrap().len() <= 4);
    let entries = all(&book, Start::Oldest).await;
    let Some(Entry::Gap { bytes, .. }) = entries.first() else {
        panic!("{:?}", entries.first())
    };
    assert_eq!(*bytes + text(&entries, Stream::Stdout).len() as u64, 64_000);
    let book = LogBook::open(dir.path(), small()).unwrap();
    assert_eq!(book.offsets().stdout, 64_000);
}

#[tokio::test]
async fn a_follower_sees_what_is_appended_later_and_ends_with_the_book() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), small()).unwrap();
    let mut reader = book.reader(Start::Oldest, false);
    let follower = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Some(entry) = reader.next(true).await.unwrap() {
            seen.push(entry);
        }
        seen
    });
    for index in 0..100u64 {
        book.append(Stream::Stdout, index * 100, 1, &[b'a'; 100])
            .unwrap();
        tokio::task::yield_now().await;
    }
    book.finish();
    assert_eq!(
        follower
            .await
            .unwrap()
            .iter()
            .filter(|e| matches!(e, Entry::Output { .. }))
            .count(),
        100
    );
}

#[tokio::test]
async fn a_pacing_reader_holds_the_writer_back_until_it_has_read() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), Limits::default()).unwrap();
    let mut reader = book.reader(Start::Oldest, true);
    let bytes = vec![b'x'; 1 << 20];
    for index in 0..9u64 {
        book.append(Stream::Stdout, index << 20, 1, &bytes).unwrap();
    }
    let waiting = tokio::time::timeout(
        std::time::Duration::from_millis(50),
        book.wait_for_readers(),
    )
    .await;
    assert!(waiting.is_err(), "nothing was read yet");
    let (_, read) = tokio::join!(book.wait_for_readers(), async {
        for _ in 0..32 {
            reader.next(false).await.unwrap();
        }
        reader
    });
    drop(read);
    book.wait_for_readers().await;
}

#[tokio::test]
async fn the_tail_is_the_last_lines_with_or_without_a_last_line_end() {
    for (whole, lines, expected) in [
        ("a\nb\nc\n", 2, "b\nc\n"),
        ("a\nb\nc", 2, "b\nc"),
        ("a\nb\nc\n", 9, "a\nb\nc\n"),
        ("a\nb\nc\n", 0, ""),
        ("abc", 1, "abc"),
    ] {
        for piece in 1..=whole.len() {
            let dir = tempfile::tempdir().unwrap();
            let book = LogBook::open(dir.path(), small()).unwrap();
            for (index, bytes) in whole.as_bytes().chunks(piece).enumerate() {
                book.append(Stream::Stdout, (index * piece) as u64, 1, bytes)
                    .unwrap();
            }
            let tail = text(&all(&book, Start::Tail(lines)).await, Stream::Stdout);
            assert_eq!(
                String::from_utf8_lossy(&tail),
                expected,
                "{whole:?} by {piece}, last {lines}"
            );
        }
    }
}

#[tokio::test]
async fn a_damaged_record_costs_the_rest_of_its_segment_only() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), small()).unwrap();
    for index in 0..8u64 {
        book.append(Stream::Stdout, index * 1000, 1, &[b'x'; 1000])
            .unwrap();
    }
    let path = dir.path().join("00000000.log");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[60] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let entries = all(&book, Start::Oldest).await;
    assert!(
        entries
            .iter()
            .any(|entry| matches!(entry, Entry::Gap { .. }))
    );
    assert_eq!(
        text(&entries, Stream::Stdout).len(),
        3000,
        "the second segment is whole"
    );
}

proptest! {
    #[test]
    fn no_bytes_make_the_record_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = segment::parse(&bytes);
    }
}

#[tokio::test]
async fn a_reader_that_is_cancelled_in_the_middle_loses_and_repeats_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), Limits::default()).unwrap();
    let mut reader = book.reader(Start::Oldest, false);
    let mut seen = Vec::new();
    for index in 0..50u64 {
        book.append(Stream::Stdout, index, 1, b"x").unwrap();
        tokio::select! {
            biased;
            entry = reader.next(true) => seen.extend(entry.unwrap()),
            () = tokio::task::yield_now() => {}
        }
    }
    while let Some(entry) = reader.next(false).await.unwrap() {
        seen.push(entry);
    }
    assert_eq!(text(&seen, Stream::Stdout).len(), 50);
}

#[tokio::test]
async fn a_segment_without_its_header_is_passed_over_and_a_closed_book_can_still_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), small()).unwrap();
    book.append(Stream::Stdout, 0, 1, b"kept").unwrap();
    std::fs::write(dir.path().join("00000001.log"), b"").unwrap();
    let book = LogBook::open(dir.path(), small()).unwrap();
    assert_eq!(book.offsets().stdout, 4);
    book.append(Stream::Stdout, 4, 1, b" too").unwrap();
    book.finish();
    assert!(book.append(Stream::Stdout, 8, 1, b"late").is_err());
    let closed = LogBook::closed(dir.path(), small());
    assert_eq!(
        text(&all(&closed, Start::Oldest).await, Stream::Stdout),
        b"kept too"
    );
    let reader = closed.reader(Start::Oldest, false);
    let unread = tokio::time::timeout(
        std::time::Duration::from_millis(20),
        closed.wait_until_unread(),
    )
    .await;
    assert!(unread.is_err(), "somebody reads");
    drop(reader);
    closed.wait_until_unread().await;
}

/// What anybody would get for these bytes.
fn sha256(bytes: &[u8]) -> Option<vistara_model::Digest> {
    use sha2::{Digest as _, Sha256};
    Some(vistara_model::Digest::from_sha256(
        Sha256::digest(bytes).into(),
    ))
}

#[test]
fn the_digest_is_of_all_output_though_the_log_has_only_its_end_and_nodes_came_and_went() {
    let dir = tempfile::tempdir().unwrap();
    let (mut out, mut bad) = (Vec::new(), Vec::new());
    let mut book = LogBook::open(dir.path(), small()).unwrap();
    for round in 0..400u32 {
        let (one, two) = (format!("line {round}\n").repeat(7), format!("{round}?"));
        book.append(Stream::Stdout, out.len() as u64, 1, one.as_bytes())
            .unwrap();
        book.append(Stream::Stderr, bad.len() as u64, 1, two.as_bytes())
            .unwrap();
        out.extend_from_slice(one.as_bytes());
        bad.extend_from_slice(two.as_bytes());
        if round % 23 == 0 {
            drop(book);
            book = LogBook::open(dir.path(), small()).unwrap();
        }
    }
    assert!(!dir.path().join("00000000.log").exists(), "nothing rotated");
    let sums = std::fs::read_dir(dir.path()).unwrap();
    let sums = sums.filter(|entry| {
        let path = entry.as_ref().unwrap().path();
        path.extension().is_some_and(|end| end == "sum")
    });
    assert!(sums.count() as u64 <= small().segments_max);
    book.finish();
    let tallies = book.tallies();
    assert_eq!(tallies.stdout.digest(), sha256(&out));
    assert_eq!(tallies.stderr.digest(), sha256(&bad));
    assert_eq!(tallies.stdout.bytes, out.len() as u64);
    assert_eq!((tallies.stdout.missing, tallies.stderr.missing), (0, 0));
}

#[test]
fn what_was_lost_is_counted_apart_and_a_torn_record_is_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), Limits::default()).unwrap();
    book.append(Stream::Stdout, 0, 1, b"abc").unwrap();
    book.append(Stream::Stdout, 10, 1, b"xyz").unwrap();
    book.append(Stream::Stdout, 13, 1, b"torn").unwrap();
    drop(book);
    let path = dir.path().join("00000000.log");
    let len = std::fs::metadata(&path).unwrap().len();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(len - 1).unwrap();
    let book = LogBook::open(dir.path(), Limits::default()).unwrap();
    assert_eq!(book.tallies().stdout.digest(), sha256(b"abcxyz"));
    book.append(Stream::Stdout, 13, 1, b"torn").unwrap();
    let tally = book.tallies().stdout;
    assert_eq!(tally.digest(), sha256(b"abcxyztorn"));
    assert_eq!((tally.bytes, tally.missing), (10, 7));
}

#[test]
fn where_count_was_lost_there_is_no_digest() {
    let dir = tempfile::tempdir().unwrap();
    let book = LogBook::open(dir.path(), small()).unwrap();
    let mut at = 0;
    while !dir.path().join("00000002.sum").exists() {
        book.append(Stream::Stdout, at, 1, &[b'x'; 1000]).unwrap();
        at += 1000;
    }
    drop(book);
    for damage in [None, Some(&b"{"[..])] {
        match damage {
            None => std::fs::remove_file(dir.path().join("00000002.sum")).unwrap(),
            Some(bytes) => std::fs::write(dir.path().join("00000002.sum"), bytes).unwrap(),
        }
        let book = LogBook::open(dir.path(), small()).unwrap();
        book.append(Stream::Stdout, at, 1, b"more").unwrap();
        at += 4;
        assert_eq!(book.tallies().stdout.digest(), None);
    }
}
