use super::*;
use std::fs;

fn info(memory: u64) -> CaptureInfo {
    CaptureInfo {
        kind: VmmKind::Fake,
        version: "1".to_owned(),
        accelerator: Accelerator::Tcg,
        cpu: String::new(),
        counter_khz: Some(2_445_425),
        vcpus: 1,
        memory: Bytes(memory),
        disks: vec![true, false],
        nic: true,
        without_bounds: true,
    }
}

/// A capture with a few bytes here and there in 8 MiB, the last one included.
fn sample() -> Capture {
    let memory = files::sealable_memory_file(8 << 20).unwrap();
    for (at, text) in [
        (0, "first"),
        ((1 << 20) - 2, "across pieces"),
        ((8 << 20) - 4, "last"),
    ] {
        memory.write_all_at(text.as_bytes(), at).unwrap();
    }
    let state = files::sealable_memory_file(6).unwrap();
    state.write_all_at(b"device", 0).unwrap();
    Capture::seal(info(8 << 20), memory, state).unwrap()
}

fn bytes(mut file: File) -> Vec<u8> {
    use std::io::Seek;
    let mut all = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut all).unwrap();
    all
}

#[test]
fn what_was_written_is_read_again_and_takes_no_more_room_than_its_data() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let capture = sample();
    capture.write(dir.path()).unwrap();
    let again = Capture::read(dir.path()).unwrap();
    assert_eq!(again.info(), capture.info());
    assert!(bytes(again.memory().unwrap()) == bytes(capture.memory().unwrap()));
    assert_eq!(bytes(again.state().unwrap()), b"device");
    let held = fs::metadata(dir.path().join(MEMORY)).unwrap().blocks() * 512;
    assert!(held <= 4 * PIECE as u64, "{held} bytes");
}

#[test]
fn nobody_can_write_to_what_forks_read() {
    let capture = sample();
    let memory = capture.memory().unwrap();
    assert!(memory.write_all_at(b"x", 0).is_err());
    assert!(memory.set_len(0).is_err());
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
    let opened = File::options().read(true).write(true).open(path).unwrap();
    assert!(opened.write_all_at(b"x", 0).is_err());
}

#[test]
fn every_flipped_bit_and_every_cut_is_found_before_use() {
    let dir = tempfile::tempdir().unwrap();
    sample().write(dir.path()).unwrap();
    for (name, at) in [
        (MEMORY, 0),
        (MEMORY, 4 << 20),
        (MEMORY, (8 << 20) - 1),
        (STATE, 3),
    ] {
        let path = dir.path().join(name);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[at] ^= 4;
        fs::write(&path, &bad).unwrap();
        let error = Capture::read(dir.path()).unwrap_err();
        assert!(
            matches!(error, CaptureError::Damaged { .. }),
            "{name} {at}: {error}"
        );
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        let error = Capture::read(dir.path()).unwrap_err();
        assert!(
            matches!(error, CaptureError::Damaged { .. }),
            "{name} cut: {error}"
        );
        fs::write(&path, &good).unwrap();
    }
    Capture::read(dir.path()).unwrap();
}

#[test]
fn what_is_longer_than_may_be_read_is_refused_and_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    let memory = files::sealable_memory_file(1 << 20).unwrap();
    let state = files::sealable_memory_file(STATE_MAX + 1).unwrap();
    let long = Capture::seal(info(1 << 20), memory, state).unwrap();
    match long.write(dir.path()) {
        Err(CaptureError::Io { source, .. }) => {
            assert_eq!(source.kind(), io::ErrorKind::FileTooLarge);
        }
        other => panic!("{other:?}"),
    }
    sample().write(dir.path()).unwrap();
    for (name, limit) in [(STATE, STATE_MAX), (ABOUT, ABOUT_MAX)] {
        let path = dir.path().join(name);
        let good = fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(limit + 1).unwrap();
        match Capture::read(dir.path()) {
            Err(CaptureError::Damaged { reason, .. }) => {
                assert!(
                    reason.contains(&format!("more than {limit} bytes")),
                    "{reason}"
                );
            }
            other => panic!("{name}: {other:?}"),
        }
        fs::write(&path, &good).unwrap();
    }
    Capture::read(dir.path()).unwrap();
}

#[test]
fn a_description_of_another_version_or_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = Capture::read(dir.path()).unwrap_err();
    assert!(matches!(nothing, CaptureError::Io { .. }), "{nothing}");
    sample().write(dir.path()).unwrap();
    let path = dir.path().join(ABOUT);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"format\": 2", "\"format\": 3")).unwrap();
    let foreign = Capture::read(dir.path()).unwrap_err();
    assert!(
        matches!(foreign, CaptureError::Foreign { found: 3, .. }),
        "{foreign}"
    );
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    let damaged = Capture::read(dir.path()).unwrap_err();
    assert!(matches!(damaged, CaptureError::Damaged { .. }), "{damaged}");
}

#[test]
fn a_fork_of_another_shape_is_told_what_differs() {
    let one = info(8 << 20);
    let mut other = one.clone();
    assert_eq!(one.difference(&other), None);
    other.vcpus = 2;
    assert!(one.difference(&other).unwrap().contains("CPUs"));
    let mut other = one.clone();
    other.version = "2".to_owned();
    assert!(one.difference(&other).unwrap().contains("version"));
}

#[test]
fn a_files_digest_follows_its_content_and_not_its_holes() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join(name))
            .unwrap()
    };
    let sparse = file("sparse");
    sparse.set_len(4 << 20).unwrap();
    sparse.write_all_at(b"content", 3 << 20).unwrap();
    let dense = file("dense");
    dense.write_all_at(&vec![0; 4 << 20], 0).unwrap();
    dense.write_all_at(b"content", 3 << 20).unwrap();
    let digest = sparse_digest(&sparse).unwrap();
    assert_eq!(digest, sparse_digest(&dense).unwrap());
    dense.write_all_at(b"C", 3 << 20).unwrap();
    assert_ne!(digest, sparse_digest(&dense).unwrap());
    sparse.set_len((4 << 20) + 1).unwrap();
    assert_ne!(digest, sparse_digest(&sparse).unwrap());
    let moved = file("moved");
    moved.set_len(4 << 20).unwrap();
    moved.write_all_at(b"content", 2 << 20).unwrap();
    assert_ne!(digest, sparse_digest(&moved).unwrap());
}

#[test]
fn two_measurements_of_one_counter_are_one_and_another_counter_is_told() {
    let one = info(8 << 20);
    let with = |counter_khz| CaptureInfo {
        counter_khz,
        ..one.clone()
    };
    // As two nodes measured it, one after the other on one host.
    assert_eq!(one.difference(&with(Some(2_445_426))), None);
    assert_eq!(one.difference(&with(Some(2_446_647))), None);
    for other in [Some(2_446_700), Some(2_000_000), None] {
        assert!(one.difference(&with(other)).unwrap().contains("counter"));
    }
}
