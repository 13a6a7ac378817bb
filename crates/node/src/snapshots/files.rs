//! A snapshot's directory: what is written to it, and what is believed of it when it is read. All of this blocks on files.

use super::delta;
use crate::fault::chain;
use crate::machine::Record;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vistara_guest_client::PROTOCOL_VERSION;
use vistara_machine::{Capture, CaptureInfo, sparse_digest, sparse_pieces};

/// Version of `snapshot.json`.
const FORMAT: u32 = 1;
const ABOUT: &str = "snapshot.json";
const CAPTURE: &str = "capture.json";
const OVERLAY: &str = "overlay.img";
const MEMORY: &str = "memory";
/// All files of a snapshot; the descriptions first.
pub(super) const ALL: [&str; 5] = [ABOUT, CAPTURE, "state", OVERLAY, MEMORY];
/// What lies beside each long file of an incremental snapshot ([`delta`]).
const SAME: &str = "same";
/// How many snapshots one may rest on: each is read anew for it.
const BASES_MAX: usize = 8;
/// Most bytes of a description: a command line and an environment may be long.
const ABOUT_MAX: u64 = 16 << 20;

/// Whether a file of a snapshot may have gigabytes.
pub(super) fn is_long(name: &str) -> bool {
    name == OVERLAY || name == MEMORY
}

/// What `snapshot.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    pub(crate) created_ns: u64,
    /// How long the machine was held still.
    pub(crate) pause_us: u64,
    /// The agent in the guest: its version, and that of what it speaks.
    pub(crate) agent: String,
    pub(crate) protocol: u8,
    /// The machine as it was.
    pub(crate) record: Record,
    /// The snapshot of this node that has what is not kept here, where it is an incremental one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) base: Option<String>,
    /// BLAKE3 of `capture.json`, which has those of memory and state.
    pub(crate) capture_blake3: String,
    /// [`sparse_digest`] of the writable disk.
    pub(crate) overlay_blake3: String,
    /// [`sparse_digest`] of the image's root disk, which is the image's and not kept here.
    pub(crate) root_blake3: String,
}

/// A description on disk.
#[derive(Serialize, Deserialize)]
struct Sealed {
    format: u32,
    /// BLAKE3 of `about` as JSON without spaces, its keys sorted. Of what is written, not of what this version makes of it:
    /// a record with fewer fields than today's is none the worse.
    blake3: String,
    about: Value,
}

/// Why a snapshot cannot be used, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unusable(pub(crate) String);

/// What a snapshot holds.
pub(crate) struct Parts {
    pub(crate) about: About,
    pub(crate) capture: Capture,
    pub(crate) overlay: File,
}

/// The agent that this program puts into guests.
pub(super) fn agent_version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

/// Makes the directory of a new snapshot.
pub(super) fn begin(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(dir)
}

pub(super) fn overlay_in(dir: &Path) -> PathBuf {
    dir.join(OVERLAY)
}

/// What is to be said of a snapshot beside its digests.
pub(super) struct Words {
    pub(super) id: String,
    pub(super) name: Option<String>,
    pub(super) created_ns: u64,
    pub(super) pause_us: u64,
    pub(super) record: Record,
    /// Of which only what differs is kept.
    pub(super) base: Option<String>,
}

/// Writes all of a snapshot whose writable disk lies in `dir` already.
pub(super) fn write(
    dir: &Path,
    capture: &Capture,
    root: &Path,
    words: Words,
) -> Result<About, String> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| format!("{what}: {error}")
    };
    capture.write(dir).map_err(|error| chain(&error))?;
    let overlay = File::open(overlay_in(dir)).map_err(io("its disk"))?;
    overlay.sync_all().map_err(io("its disk"))?;
    let mut record = words.record;
    // What is the other machine's alone.
    record.vm = None;
    record.timings = Vec::new();
    let about = About {
        id: words.id,
        name: words.name,
        created_ns: words.created_ns,
        pause_us: words.pause_us,
        agent: agent_version(),
        protocol: PROTOCOL_VERSION,
        record,
        base: words.base,
        capture_blake3: whole_digest(&dir.join(CAPTURE)).map_err(io("its description"))?,
        overlay_blake3: sparse_digest(&overlay).map_err(io("its disk"))?,
        root_blake3: File::open(root)
            .and_then(|file| sparse_digest(&file))
            .map_err(io("the image's disk"))?,
    };
    if let Some(base) = &about.base {
        share(dir, base).map_err(|Unusable(why)| why)?;
    }
    write_about(dir, &about).map_err(io("its description"))?;
    Ok(about)
}

/// Leaves out of a snapshot that is not finished what its base has.
fn share(dir: &Path, base: &str) -> Result<(), Unusable> {
    let of_base = dir.with_file_name(base);
    let under = bases(&of_base, &read_about(&of_base)?)?;
    // One more is to rest on it.
    if under.len() >= BASES_MAX {
        return Err(Unusable(format!(
            "snapshot {base} rests on {BASES_MAX} others; make a whole one, without a base"
        )));
    }
    for name in ALL.into_iter().filter(|name| is_long(name)) {
        let failed = |error: io::Error| Unusable(format!("{name} could not be written: {error}"));
        let theirs = whole_file(&of_base, &under, name)?;
        let path = dir.join(name);
        let opened = File::options().read(true).write(true).open(&path);
        let same = opened
            .and_then(|file| {
                let same = delta::leave_out(&file, &theirs)?;
                file.sync_all()?;
                Ok(same)
            })
            .map_err(failed)?;
        let written = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path.with_extension(SAME))
            .and_then(|mut file| {
                file.write_all(&same)?;
                file.sync_all()
            });
        written.map_err(failed)?;
    }
    Ok(())
}

/// The snapshots that the one in `dir` rests on, the nearest first.
pub(super) fn bases(dir: &Path, about: &About) -> Result<Vec<PathBuf>, Unusable> {
    let mut all: Vec<PathBuf> = Vec::new();
    let mut next = about.base.clone();
    while let Some(id) = next {
        let base = dir.with_file_name(&id);
        // A number of digits, and none of those that were met: the description was sealed by somebody, perhaps elsewhere.
        let is_id = id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_id || all.len() >= BASES_MAX || all.contains(&base) || base == *dir {
            return Err(Unusable("what it rests on makes no sense".to_owned()));
        }
        let about = read_about(&base).map_err(|Unusable(why)| {
            Unusable(format!("snapshot {id}, on which it rests: {why}"))
        })?;
        next = about.base;
        all.push(base);
    }
    Ok(all)
}

/// One of the long files with all that is in it and in its [`bases`]; not to be written to.
pub(super) fn whole_file(dir: &Path, bases: &[PathBuf], name: &str) -> Result<File, Unusable> {
    let failed = |error: io::Error| Unusable(format!("{name} cannot be read: {error}"));
    let Some(first) = bases.last() else {
        return File::open(dir.join(name)).map_err(failed);
    };
    let whole = || {
        // Without a name: its room goes with whoever has it open, and no two readers meet.
        let whole = tempfile::tempfile_in(dir)?;
        let from = File::open(first.join(name))?;
        whole.set_len(from.metadata()?.len())?;
        sparse_pieces(&from, |place, piece| whole.write_all_at(piece, place))?;
        let later = bases.iter().rev().skip(1).map(PathBuf::as_path);
        for dir in later.chain([dir]) {
            let same = read_same(&dir.join(name).with_extension(SAME))?;
            delta::lay_over(&whole, &File::open(dir.join(name))?, same)?;
        }
        Ok(whole)
    };
    whole().map_err(failed)
}

fn read_same(path: &Path) -> io::Result<Vec<u8>> {
    // A bit for each page: a terabyte has 32 MiB of them.
    const SAME_MAX: u64 = 256 << 20;
    let file = File::open(path)?;
    if file.metadata()?.len() > SAME_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = Vec::new();
    file.take(SAME_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes what a snapshot is of, the last of it.
fn write_about(dir: &Path, about: &About) -> io::Result<()> {
    let text = seal(about)?;
    let fresh = dir.join("snapshot.json.new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&fresh, dir.join(ABOUT))?;
    // The names are to be on the disk, too.
    File::open(dir)?.sync_all()?;
    match dir.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Where a file lies that comes from another node, until all of them are there.
pub(super) fn arriving(dir: &Path, name: &str) -> PathBuf {
    dir.join(name).with_extension("arriving")
}

/// Makes the snapshot whose files have arrived in `dir` one of this node, under this name.
pub(super) fn adopt(dir: &Path, name: Option<String>) -> Result<About, Unusable> {
    let sent = arriving(dir, ABOUT);
    let mut about = read_about_at(dir, &sent)?;
    about.name = name;
    // A grant of the other node is none here.
    about.record.owner = None;
    // What was sent is whole.
    about.base = None;
    let written = || {
        for name in ALL.iter().filter(|name| **name != ABOUT) {
            std::fs::rename(arriving(dir, name), dir.join(name))?;
        }
        std::fs::remove_file(sent)
    };
    let failed = |error: io::Error| Unusable(format!("it could not be written: {error}"));
    written().map_err(failed)?;
    read_info(dir, &about)?;
    write_about(dir, &about).map_err(failed)?;
    Ok(about)
}

fn seal(about: &About) -> io::Result<Vec<u8>> {
    let about = serde_json::to_value(about)?;
    let sealed = Sealed {
        format: FORMAT,
        blake3: digest(&about)?,
        about,
    };
    Ok(serde_json::to_vec_pretty(&sealed)?)
}

fn digest(about: &Value) -> io::Result<String> {
    let text = serde_json::to_vec(about)?;
    Ok(blake3::hash(&text).to_hex().to_string())
}

fn whole_digest(path: &Path) -> io::Result<String> {
    let bytes = read_bounded(path)?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = File::open(path)?.take(ABOUT_MAX + 1);
    file.read_to_end(&mut bytes)?;
    if bytes.len() as u64 > ABOUT_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Whether a directory's snapshot was finished, damaged or not. One of which that cannot be told is kept.
pub(super) fn is_finished(dir: &Path) -> bool {
    dir.join(ABOUT).try_exists().unwrap_or(true)
}

/// What the snapshot in `dir` is of; its memory and disks are not looked at.
pub(super) fn read_about(dir: &Path) -> Result<About, Unusable> {
    read_about_at(dir, &dir.join(ABOUT))
}

fn read_about_at(dir: &Path, path: &Path) -> Result<About, Unusable> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let damaged = |why: String| Unusable(format!("its description is damaged: {why}"));
    let bytes = read_bounded(path).map_err(|error| damaged(error.to_string()))?;
    let Format { format } =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if format != FORMAT {
        return Err(Unusable(format!(
            "it has format {format}, and this version reads {FORMAT}"
        )));
    }
    let Sealed { blake3, about, .. } =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if digest(&about).ok().as_ref() != Some(&blake3) {
        return Err(damaged("it is not what was written".to_owned()));
    }
    let about: About = serde_json::from_value(about).map_err(|error| damaged(error.to_string()))?;
    if dir.file_name().is_none_or(|name| *name != *about.id) {
        return Err(damaged("it is of another snapshot".to_owned()));
    }
    if about.record.format != Record::FORMAT {
        return Err(Unusable(format!(
            "its machine's record has format {}, and this version reads {}",
            about.record.format,
            Record::FORMAT
        )));
    }
    Ok(about)
}

/// What a machine that goes on from it must have in common with it.
pub(super) fn read_info(dir: &Path, about: &About) -> Result<CaptureInfo, Unusable> {
    let of_capture = whole_digest(&dir.join(CAPTURE));
    if of_capture.ok().as_ref() != Some(&about.capture_blake3) {
        return Err(Unusable(
            "the description of its memory is not what was written".to_owned(),
        ));
    }
    Capture::read_info(dir).map_err(|error| Unusable(chain(&error)))
}

/// Everything in `dir`, every byte of it checked, and the image's root disk that goes with it.
pub(super) fn read(dir: &Path, root: &Path) -> Result<Parts, Unusable> {
    let about = read_about(dir)?;
    let agent = agent_version();
    if (about.agent.as_str(), about.protocol) != (agent.as_str(), PROTOCOL_VERSION) {
        return Err(Unusable(format!(
            "the agent in its guest has version {} and speaks version {}; this node's has {agent} and speaks {PROTOCOL_VERSION}",
            about.agent, about.protocol
        )));
    }
    read_info(dir, &about)?;
    let digest_of =
        |path: &Path| File::open(path).and_then(|file| Ok((sparse_digest(&file)?, file)));
    let (root_blake3, _) =
        digest_of(root).map_err(|error| Unusable(format!("the image's disk: {error}")))?;
    if root_blake3 != about.root_blake3 {
        return Err(Unusable(
            "the image's disk is not the one that its guest knows".to_owned(),
        ));
    }
    let bases = bases(dir, &about)?;
    let overlay = whole_file(dir, &bases, OVERLAY)?;
    let overlay_blake3 =
        sparse_digest(&overlay).map_err(|error| Unusable(format!("its writable disk: {error}")))?;
    if overlay_blake3 != about.overlay_blake3 {
        return Err(Unusable(
            "its writable disk is not what was written".to_owned(),
        ));
    }
    let memory = whole_file(dir, &bases, MEMORY)?;
    let capture = Capture::read_with(dir, &memory).map_err(|error| Unusable(chain(&error)))?;
    Ok(Parts {
        about,
        capture,
        overlay,
    })
}

/// Bytes that a directory's files really take.
pub(super) fn size_on_disk(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let sizes = entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok().map(|data| data.blocks() * 512));
    sizes.sum()
}

/// Removes a snapshot: first its description, so that half of it is never taken for one.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(dir.join(ABOUT)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::remove_dir_all(dir)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::machine::now_ns;
    use std::os::unix::fs::FileExt;
    use vistara_model::{
        Accelerator, Backend, Bytes, Generation, Hypervisor, MachineId, MachineState, Signal,
        VmmKind,
    };

    fn record() -> Record {
        let request = vistara_api::RunRequest::default();
        let spec = crate::request::spec(&request, "debian".parse().unwrap()).unwrap();
        Record {
            format: Record::FORMAT,
            id: MachineId::from_random([1; 16]),
            name: "web".parse().unwrap(),
            generation: Generation(1),
            spec,
            image_id: format!("sha256:{}", "a".repeat(64)).parse().unwrap(),
            argv: vec!["sh".to_owned()],
            env: vec!["A=b".parse().unwrap()],
            user: String::new(),
            working_dir: String::new(),
            hostname: "web".to_owned(),
            stop_signal: Signal::TERM,
            hypervisor: Hypervisor::Qemu,
            backend: Backend {
                vmm: VmmKind::Qemu,
                payload: vistara_model::Payload::Linux,
                accelerator: Accelerator::Tcg,
            },
            reasons: Vec::new(),
            kernel: None,
            program_file: None,
            linux_memory: None,
            owner: None,
            slot: 0,
            state: MachineState::Running,
            end: None,
            created_ns: now_ns(),
            started_ns: None,
            ended_ns: None,
            vm: None,
            retried: false,
            provisional: false,
            undone: None,
            undone_boot_id: None,
            log_base: crate::logbook::Offsets::default(),
            template: None,
            warm: false,
            continues: None,
            copy_of: None,
            held: false,
            proof: Default::default(),
            timings: Vec::new(),
        }
    }

    /// A directory with a snapshot in it, and the root disk that goes with it.
    pub(crate) fn made() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("0123");
        begin(&dir).unwrap();
        let root = parent.path().join("root");
        std::fs::write(&root, b"the image").unwrap();
        std::fs::write(overlay_in(&dir), vec![7; 100_000]).unwrap();
        let capture = Capture::of_bytes(
            CaptureInfo {
                kind: VmmKind::Qemu,
                version: "7".to_owned(),
                accelerator: Accelerator::Tcg,
                cpu: String::new(),
                counter_khz: None,
                vcpus: 1,
                memory: Bytes::mib(1),
                disks: vec![true, false],
                nic: true,
                without_bounds: true,
            },
            b"memory",
            b"state",
        )
        .unwrap();
        let words = Words {
            id: "0123".to_owned(),
            name: Some("one".to_owned()),
            created_ns: now_ns(),
            pause_us: 1,
            record: record(),
            base: None,
        };
        write(&dir, &capture, &root, words).unwrap();
        (parent, dir, root)
    }

    /// One more in the same place, of which only what differs from `base` is kept.
    pub(crate) fn made_on(base: &Path, root: &Path, id: &str, memory: &[u8]) -> PathBuf {
        let dir = base.with_file_name(id);
        begin(&dir).unwrap();
        let mut overlay = vec![7; 100_000];
        overlay[50_000] = id.as_bytes()[0];
        std::fs::write(overlay_in(&dir), overlay).unwrap();
        let info = Capture::read_info(base).unwrap();
        let capture = Capture::of_bytes(info, memory, b"other").unwrap();
        let words = Words {
            id: id.to_owned(),
            name: None,
            created_ns: now_ns(),
            pause_us: 1,
            record: record(),
            base: Some(base.file_name().unwrap().to_str().unwrap().to_owned()),
        };
        write(&dir, &capture, root, words).unwrap();
        dir
    }

    #[test]
    fn an_incremental_snapshot_is_whole_with_its_bases_and_no_bit_of_them_may_be_another() {
        let (_parent, dir, root) = made();
        let memory = [b"memory".to_vec(), vec![5; 200_000]].concat();
        let second = made_on(&dir, &root, "4567", &memory);
        let third = made_on(
            &second,
            &root,
            "89ab",
            &[memory.as_slice(), b"more"].concat(),
        );
        assert!(size_on_disk(&third) < size_on_disk(&second));
        for (dir, byte) in [(&second, b'4'), (&third, b'8')] {
            let parts = read(dir, &root).unwrap();
            let mut overlay = vec![0; 100_000];
            parts.overlay.read_exact_at(&mut overlay, 0).unwrap();
            assert_eq!((overlay[0], overlay[50_000]), (7, byte));
        }
        // Whole again, it is what was captured.
        let under = bases(&third, &read_about(&third).unwrap()).unwrap();
        assert_eq!(under, [second.clone(), dir.clone()]);
        let whole = whole_file(&third, &under, MEMORY).unwrap();
        let mut bytes = vec![0; memory.len() + 5];
        whole.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [memory.as_slice(), b"more\0"].concat());

        // Of the first one's memory nothing is needed: what it has there is another's in both.
        for path in [
            dir.join(OVERLAY),
            second.join(MEMORY),
            second.join("memory.same"),
            third.join("overlay.same"),
        ] {
            let kept = std::fs::read(&path).unwrap();
            let mut other = kept.clone();
            other[0] ^= 2;
            std::fs::write(&path, other).unwrap();
            assert!(read(&third, &root).is_err(), "{path:?}");
            std::fs::remove_file(&path).unwrap();
            assert!(read(&third, &root).is_err(), "{path:?} gone");
            std::fs::write(&path, kept).unwrap();
        }
        assert!(read(&third, &root).is_ok());
        std::fs::remove_dir_all(&second).unwrap();
        let why = reason(&third, &root);
        assert!(why.contains("4567, on which it rests"), "{why}");
    }

    #[test]
    fn a_base_that_is_no_snapshots_number_or_goes_in_a_circle_is_not_followed() {
        let (_parent, dir, root) = made();
        let second = made_on(&dir, &root, "4567", b"memory");
        for base in ["../4567", "4567"] {
            let mut about = read_about(&second).unwrap();
            about.base = Some(base.to_owned());
            std::fs::write(second.join(ABOUT), seal(&about).unwrap()).unwrap();
            let why = reason(&second, &root);
            assert!(why.contains("makes no sense"), "{why}");
        }
    }

    fn reason(dir: &Path, root: &Path) -> String {
        read(dir, root).err().expect("it was used").0
    }

    #[test]
    fn no_bit_of_a_snapshot_may_be_another_and_no_byte_may_be_missing() {
        let (_parent, dir, root) = made();
        let files = [ABOUT, CAPTURE, OVERLAY, "memory", "state"].map(|name| dir.join(name));
        for path in files.iter().chain([&root]) {
            let whole = std::fs::read(path).unwrap();
            for at in [0, whole.len() / 3, whole.len() / 2, whole.len() - 2] {
                let mut bytes = whole.clone();
                bytes[at] ^= 4;
                std::fs::write(path, &bytes).unwrap();
                // White space between the words of a description says nothing.
                let harmless = path.ends_with(ABOUT) && read_about(&dir) == read_about_of(&whole);
                assert!(harmless || read(&dir, &root).is_err(), "{path:?} {at}");
            }
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(&whole, 0).unwrap();
            file.set_len(whole.len() as u64 - 1).unwrap();
            assert!(read(&dir, &root).is_err(), "{path:?} cut");
            std::fs::remove_file(path).unwrap();
            assert!(read(&dir, &root).is_err(), "{path:?} gone");
            std::fs::write(path, &whole).unwrap();
        }
        let parts = read(&dir, &root).unwrap();
        assert_eq!(parts.about.record.name.as_ref(), "web");
    }

    fn read_about_of(bytes: &[u8]) -> Result<About, Unusable> {
        let sealed: Sealed = serde_json::from_slice(bytes).unwrap();
        Ok(serde_json::from_value(sealed.about).unwrap())
    }

    #[test]
    fn a_snapshot_of_before_a_field_was_added_is_not_damaged() {
        let (_parent, dir, root) = made();
        let bytes = std::fs::read(dir.join(ABOUT)).unwrap();
        let mut sealed: Sealed = serde_json::from_slice(&bytes).unwrap();
        let record = sealed.about["record"].as_object_mut().unwrap();
        record.remove("held").unwrap();
        sealed.blake3 = digest(&sealed.about).unwrap();
        std::fs::write(dir.join(ABOUT), serde_json::to_vec(&sealed).unwrap()).unwrap();
        assert!(read(&dir, &root).is_ok());
    }

    #[test]
    fn another_version_of_anything_is_told_before_it_is_used() {
        let (_parent, dir, root) = made();
        let about = read_about(&dir).unwrap();
        let with = |change: &dyn Fn(&mut About)| {
            let mut other = about.clone();
            change(&mut other);
            std::fs::write(dir.join(ABOUT), seal(&other).unwrap()).unwrap();
            reason(&dir, &root)
        };
        let agent = with(&|about| about.agent = "0.0.0".to_owned());
        assert!(
            agent.contains("agent") && agent.contains("0.0.0"),
            "{agent}"
        );
        let protocol = with(&|about| about.protocol += 1);
        assert!(protocol.contains("speaks version"), "{protocol}");
        let record = with(&|about| about.record.format += 1);
        assert!(record.contains("record has format"), "{record}");
        let moved = with(&|about| about.id = "4567".to_owned());
        assert!(moved.contains("another snapshot"), "{moved}");
        let text = String::from_utf8(seal(&about).unwrap()).unwrap();
        let later = text.replacen("\"format\": 1", "\"format\": 2", 1);
        std::fs::write(dir.join(ABOUT), later).unwrap();
        let format = reason(&dir, &root);
        assert!(format.contains("format 2"), "{format}");
        std::fs::write(dir.join(ABOUT), text).unwrap();
        assert!(read(&dir, &root).is_ok());
    }
}
