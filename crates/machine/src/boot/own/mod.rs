//! Our own Linux guest kernel: built on this host out of Debian's kernel source with a small configuration of ours, for the
//! machines of QEMU and Firecracker, with everything built in (docs/internals/kernel.md).
//!
//! ```text
//! <cache>/vistara-kernel/  made here; the rest is in it
//!   CACHEDIR.TAG           says so: a directory that has none is refused, and nothing is removed there
//!   lock                   held while a build runs
//!   work-*/                one build: source, objects; removed when it ends, or by the next one if it was killed
//!   built-<key>/           the last result, renamed to this place when it is whole; the key names all that went into it
//! ```
//! What a build leaves is some 20 MB. It needs nothing of the caller's environment but where programs are, and changes
//! nothing on the host outside the cache. Putting the result into a [`super::KernelStore`] is the caller's.

mod cache;
mod config;
mod needs;

use super::BootError;
use super::debian;
use super::program::Program;
use super::unpack::read_bounded;
use cache::{Cache, Work};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// The end of our kernels' release: by it the store knows them.
const OWN_RELEASE: &str = "-vistara";
/// The package that depends on the source of Debian's current kernel, and how that one's name begins.
const META_PACKAGE: &str = "linux-source";
const SOURCE_PACKAGE: &str = "linux-source-";
/// Raised when a build of the same source and options would come out otherwise.
const BUILD_FORMAT: u32 = 1;
/// What a build takes at its fullest: the package twice (140 MB), its source (about 1 GB) and the objects.
const ROOM: u64 = 2500 << 20;
/// With so little left, a build that failed did so for want of room: what a program could not write it removes.
const ROOM_MIN: u64 = 64 << 20;
/// The directory that builds make for themselves: whatever else the owner keeps beside it is safe from them.
const OWN_DIR: &str = "vistara-kernel";
/// Unpacking and configuring take seconds.
const STEP_TIME_MAX: Duration = Duration::from_secs(900);
/// Compiling took half an hour of one busy processor; a slow host may need several times that.
const COMPILE_TIME_MAX: Duration = Duration::from_secs(4 * 3600);
/// Programs that `make` starts for a build, nearly one for each file: for telling how far it is.
const FILES_EXPECTED: u32 = 1900;
/// Longest small file that is read of what a build makes.
const SMALL_FILE_MAX: u64 = 1 << 20;
/// Parts of the source that no guest of ours is made of. Their Kconfig and Makefiles stay, as the build reads them.
const LEFT_OUT: &[&str] = &[
    "--exclude=*/drivers/gpu/*.[ch]",
    "--exclude=*/drivers/media/*.[ch]",
    "--exclude=*/drivers/net/ethernet/*.[ch]",
    "--exclude=*/drivers/net/wireless/*.[ch]",
    "--exclude=*/drivers/staging/*.[ch]",
    "--exclude=*/sound/*/*.[ch]",
    "--exclude=*/Documentation/*.rst",
    "--exclude=*/Documentation/*.yaml",
    "--exclude=*/Documentation/*.svg",
];

/// Whether a kernel of this release is one that [`build`] made.
pub(crate) fn is_own(release: &str) -> bool {
    release.ends_with(OWN_RELEASE)
}

/// How a kernel is built.
#[derive(Debug, Clone)]
pub struct OwnKernel {
    /// Directory in which a `vistara-kernel` is made, for what a build needs meanwhile and for its result. Made if absent;
    /// nothing else in it is touched.
    pub cache: PathBuf,
    /// How many programs of the compiler run at once.
    pub jobs: usize,
}

/// How far a build is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildStep {
    /// Another build holds the cache.
    Waiting,
    /// The source's package is downloaded: its name and version.
    Downloading(String),
    /// The source is unpacked.
    Unpacking,
    /// The options are worked out.
    Configuring,
    /// The kernel is compiled: per cent, by a guess that stays below 100.
    Compiling(u8),
    /// Nothing is to be done: the same kernel was built before.
    Found,
}

/// A kernel that was built.
#[derive(Debug)]
pub struct BuiltKernel {
    /// The uncompressed kernel.
    pub vmlinux: PathBuf,
    /// A directory that lists what is built into it, as [`super::KernelStore::add`] takes one of modules.
    pub modules: PathBuf,
    /// What `uname -r` will say.
    pub release: String,
    /// Package and version of its source.
    pub source: String,
    /// Optional options of ours that this source does not know.
    pub unknown_options: Vec<String>,
    /// Keeps others from clearing it away.
    _cache: Cache,
}

/// Why no kernel was built. Nothing is left then but what the next build clears away.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Of another architecture.
    #[error(
        "this host's processor is {0}, and our own kernel is made for x86_64 only: that of other processors has not been tried"
    )]
    Architecture(&'static str),
    /// The host lacks packages.
    #[error("to build a kernel, this host lacks: {}", .0.join(" "))]
    Packages(Vec<&'static str>),
    /// Too little room.
    #[error("{dir:?} has {free_mib} MiB free, and building a kernel takes up to {needed_mib} MiB")]
    Room {
        /// The cache.
        dir: PathBuf,
        /// What is free.
        free_mib: u64,
        /// What is needed.
        needed_mib: u64,
    },
    /// The room was used up on the way.
    #[error(
        "{dir:?} is full: {free_mib} MiB are left, and building a kernel takes up to {needed_mib} MiB"
    )]
    Full {
        /// The cache.
        dir: PathBuf,
        /// What is free.
        free_mib: u64,
        /// What is needed.
        needed_mib: u64,
        /// What failed for it.
        #[source]
        source: Box<BuildError>,
    },
    /// The kernel's build cannot be done in a directory of such a name.
    #[error(
        "a kernel cannot be built in {0:?}: its build takes only letters, digits and _ . + - in the name of a directory"
    )]
    Place(PathBuf),
    /// Options that this source does not take.
    #[error("{source_package} does not take these options of ours: {}", .lost.join(" "))]
    Options {
        /// Package and version.
        source_package: String,
        /// The options.
        lost: Vec<String>,
    },
    /// A step failed.
    #[error("{step}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: BootError,
    },
}

impl BuildError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            BuildError::Architecture(_) => Some("vistara kernel add debian".to_owned()),
            BuildError::Packages(packages) => Some(format!(
                "sudo apt-get install --no-install-recommends {}",
                packages.join(" ")
            )),
            BuildError::Room { .. } | BuildError::Full { .. } | BuildError::Place(_) => {
                Some("vistara kernel build --cache DIR, with a directory elsewhere".to_owned())
            }
            BuildError::Options { .. } => Some(
                "this version of Vistara knows the source of Debian 12's kernel (linux-source-6.1); vistara kernel add debian works with any"
                    .to_owned(),
            ),
            BuildError::Step { step, .. } if [LOOKUP, DOWNLOAD].contains(step) => Some(
                "sudo apt-get update, and try again; where Debian's packages are out of reach, build it on another host and bring the vmlinux: vistara kernel add FILE"
                    .to_owned(),
            ),
            BuildError::Step {
                step: CACHE,
                source: BootError::Malformed { .. },
            } => Some("vistara kernel build --cache DIR, with a directory elsewhere".to_owned()),
            BuildError::Step { .. } => None,
        }
    }
}

const CACHE: &str = "cannot use the cache";
const LOOKUP: &str = "cannot find the kernel's source";
const DOWNLOAD: &str = "cannot download the kernel's source";

fn step(step: &'static str) -> impl Fn(BootError) -> BuildError {
    move |source| BuildError::Step { step, source }
}

/// Builds the kernel, or finds that it was built before. Blocks for as long as that takes; `told` hears how far it is.
///
/// Two builds in one cache: the second waits for the first, and finds its result. Killed half way: the next one begins anew.
///
/// # Errors
/// [`BuildError`].
pub fn build(
    options: &OwnKernel,
    told: &mut dyn FnMut(BuildStep),
) -> Result<BuiltKernel, BuildError> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(BuildError::Architecture(std::env::consts::ARCH));
    }
    let missing = needs::missing();
    if !missing.is_empty() {
        return Err(BuildError::Packages(missing));
    }
    let dir = std::path::absolute(options.cache.join(OWN_DIR))
        .map_err(BootError::io("find", &options.cache))
        .map_err(step(CACHE))?;
    check_place(&dir)?;
    let cache = Cache::hold(&dir, &mut || told(BuildStep::Waiting)).map_err(step(CACHE))?;
    // What `make` sees of it: without symbolic links.
    check_place(cache.path())?;
    let work = cache.work().map_err(step(CACHE))?;
    // Asked while the work still fills the disk: what a program had to say of it could not be written there either.
    build_in(&cache, &work, options.jobs, told).map_err(|error| blame_room(cache.path(), error))
}

fn build_in(
    cache: &Cache,
    work: &Work,
    jobs: usize,
    told: &mut dyn FnMut(BuildStep),
) -> Result<BuiltKernel, BuildError> {
    let package =
        debian::newest(META_PACKAGE, SOURCE_PACKAGE, work.path()).map_err(step(LOOKUP))?;
    let version = debian::version(&package, work.path()).map_err(step(LOOKUP))?;
    let source = format!("{package} {version}");
    let compiler = make_runs("gcc", &["--version"], work.path(), STEP_TIME_MAX, &[])
        .run()
        .map_err(step("cannot ask the compiler for its version"))?;
    let key = key(&source, &compiler);
    if let Some(found) = finished(cache, &key, &source)? {
        told(BuildStep::Found);
        return Ok(found);
    }
    cache.clear_results(&key).map_err(step(CACHE))?;
    room(cache.path())?;

    told(BuildStep::Downloading(source.clone()));
    // By its version, too: apt's lists may have become others since.
    let deb =
        debian::fetch(&format!("{package}={version}"), work.path()).map_err(step(DOWNLOAD))?;
    told(BuildStep::Unpacking);
    let (tree, time) =
        unpack(work, &deb, &package).map_err(step("cannot unpack the kernel's source"))?;
    told(BuildStep::Configuring);
    let build = Build {
        tree: &tree,
        objects: &work.path().join("objects"),
        time: &time,
        jobs: jobs.max(1),
    };
    let unknown = build.configure(&source)?;
    told(BuildStep::Compiling(0));
    build
        .compile(told)
        .map_err(step("cannot compile the kernel"))?;
    let keep = step("cannot keep the kernel");
    build
        .collect(work, &cache.result(&key), &unknown)
        .map_err(&keep)?;
    finished(cache, &key, &source)?.ok_or_else(|| {
        keep(BootError::malformed(
            &cache.result(&key),
            "built kernel",
            "a file of it is missing or empty",
        ))
    })
}

/// Whether a name can be a kernel's in the store: asked before a build, rather than learnt after it.
///
/// # Errors
/// [`BootError::Name`].
pub fn check_name(name: &str) -> Result<(), BootError> {
    super::shelf::check_name(name)
}

/// Make, its shell and what they call would take other characters for their own.
fn check_place(dir: &Path) -> Result<(), BuildError> {
    let plain = |c: char| c.is_alphanumeric() || "/_.+-".contains(c);
    match dir.to_str() {
        Some(text) if text.chars().all(plain) => Ok(()),
        _ => Err(BuildError::Place(dir.to_owned())),
    }
}

/// Says of a step that failed on a full disk that the disk is full.
fn blame_room(dir: &Path, error: BuildError) -> BuildError {
    let free = vistara_host::facts::disk_free(dir).unwrap_or(u64::MAX);
    if free >= ROOM_MIN || !matches!(error, BuildError::Step { .. }) {
        return error;
    }
    BuildError::Full {
        dir: dir.to_owned(),
        free_mib: free >> 20,
        needed_mib: ROOM >> 20,
        source: Box::new(error),
    }
}

/// Names everything that goes into a kernel.
fn key(source: &str, compiler: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(BUILD_FORMAT.to_le_bytes());
    for part in [
        source,
        compiler.lines().next().unwrap_or_default(),
        config::TEXT,
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..12])
}

fn room(dir: &Path) -> Result<(), BuildError> {
    let free = vistara_host::facts::disk_free(dir)
        .map_err(BootError::io("look for room in", dir))
        .map_err(step(CACHE))?;
    if free < ROOM {
        return Err(BuildError::Room {
            dir: dir.to_owned(),
            free_mib: free >> 20,
            needed_mib: ROOM >> 20,
        });
    }
    Ok(())
}

/// The kernel of this key, if it has been built. One of which a file is missing or empty has not been.
fn finished(cache: &Cache, key: &str, source: &str) -> Result<Option<BuiltKernel>, BuildError> {
    let dir = cache.result(key);
    let whole = ["vmlinux", "modules/modules.builtin", "config", "release"]
        .iter()
        .all(|name| {
            fs::metadata(dir.join(name)).is_ok_and(|file| file.is_file() && file.len() > 0)
        });
    let read = |name: &str| {
        let bytes = read_bounded(&dir.join(name), SMALL_FILE_MAX).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    let (true, Some(release), Some(unknown)) = (whole, read("release"), read("unknown-options"))
    else {
        return Ok(None);
    };
    Ok(Some(BuiltKernel {
        vmlinux: dir.join("vmlinux"),
        modules: dir.join("modules"),
        release,
        source: source.to_owned(),
        unknown_options: unknown.lines().map(str::to_owned).collect(),
        _cache: cache.again().map_err(step(CACHE))?,
    }))
}

/// Unpacks the source out of its package: its directory, and when it was made, as a kernel's banner has it.
fn unpack(work: &Work, deb: &Path, package: &str) -> Result<(PathBuf, String), BootError> {
    let text = |path: &Path| path.display().to_string();
    let (unpacked, tree) = (work.path().join("deb"), work.path().join("source"));
    fs::create_dir(&tree).map_err(BootError::io("make directory", &tree))?;
    let words = ["-x", &text(deb), &text(&unpacked)];
    make_runs("dpkg-deb", &words, work.path(), STEP_TIME_MAX, &[]).run()?;
    let archive = unpacked.join(format!("usr/src/{package}.tar.xz"));
    let made = fs::metadata(&archive)
        .and_then(|data| data.modified())
        .map_err(BootError::io(
            "find the source in the package, as",
            &archive,
        ))?;
    let (from, to) = (text(&archive), text(&tree));
    let mut words = vec!["-x", "-J", "-f", &from, "-C", &to];
    words.extend(["--strip-components=1", "--no-same-owner"]);
    words.extend(LEFT_OUT);
    make_runs("tar", &words, work.path(), STEP_TIME_MAX, &[]).run()?;
    for done in [deb, &unpacked] {
        // Only room is won by it: what stays goes with the work.
        let _ = fs::remove_dir_all(done).or_else(|_| fs::remove_file(done));
    }
    let seconds = made
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let seconds = format!("@{seconds}");
    let words = ["-u", "-d", &seconds];
    let time = make_runs("date", &words, work.path(), STEP_TIME_MAX, &[]).run()?;
    let time = time.trim().to_owned();
    Ok((tree, time))
}

/// A program of a build, which is to come out the same whoever builds.
fn make_runs<'a>(
    name: &'static str,
    arguments: &'a [&'a str],
    dir: &'a Path,
    time_max: Duration,
    environment: &'a [(&'a str, &'a str)],
) -> Program<'a> {
    Program {
        name,
        arguments,
        dir,
        time_max,
        environment,
        bare: true,
        mend: "install it with apt-get",
    }
}

/// The build of an unpacked source.
struct Build<'a> {
    tree: &'a Path,
    objects: &'a Path,
    /// When the source was made, in words.
    time: &'a str,
    jobs: usize,
}

impl Build<'_> {
    /// Makes the configuration, and sees that it has all of ours. Gives the optional ones that it does not have.
    fn configure(&self, source: &str) -> Result<Vec<String>, BuildError> {
        let step = step("cannot configure the kernel");
        let wanted = config::wanted();
        fs::create_dir(self.objects)
            .map_err(BootError::io("make directory", self.objects))
            .map_err(&step)?;
        let file = self.objects.join("wanted.config");
        fs::write(&file, wanted.fragment())
            .map_err(BootError::io("write", &file))
            .map_err(&step)?;
        self.make(
            &["allnoconfig"],
            &[("KCONFIG_ALLCONFIG", &file.display().to_string())],
            STEP_TIME_MAX,
            &mut |_| {},
        )
        .map_err(&step)?;
        let made = read_bounded(&self.objects.join(".config"), SMALL_FILE_MAX).map_err(&step)?;
        let (lost, unknown) = wanted.lost(&String::from_utf8_lossy(&made));
        if lost.is_empty() {
            return Ok(unknown);
        }
        Err(BuildError::Options {
            source_package: source.to_owned(),
            lost,
        })
    }

    fn compile(&self, told: &mut dyn FnMut(BuildStep)) -> Result<(), BootError> {
        let jobs = format!("-j{}", self.jobs);
        let mut last = 0;
        let mut lines = LineCount::default();
        self.make(&[&jobs, "vmlinux"], &[], COMPILE_TIME_MAX, &mut |output| {
            let per_cent = percent(lines.of(output));
            if per_cent > last {
                last = per_cent;
                told(BuildStep::Compiling(per_cent));
            }
        })
    }

    fn make(
        &self,
        words: &[&str],
        more: &[(&str, &str)],
        time_max: Duration,
        watch: &mut dyn FnMut(&Path),
    ) -> Result<(), BootError> {
        let (tree, objects) = (
            self.tree.display().to_string(),
            format!("O={}", self.objects.display()),
        );
        // When this process is killed, make is told to end: by TERM, which it hands on to all that it started, while KILL
        // would leave them at work. Polite (nice): it is long, and nobody waits for it with a machine.
        let mut arguments = vec!["--pdeathsig", "TERM", "--", "nice", "-n", "10"];
        arguments.extend(["make", "-C", &tree, &objects]);
        arguments.extend(words);
        // Without these a kernel tells who built it, where, when and how often.
        let mut environment = vec![
            ("KBUILD_BUILD_TIMESTAMP", self.time),
            ("KBUILD_BUILD_USER", "vistara"),
            ("KBUILD_BUILD_HOST", "vistara"),
            ("KBUILD_BUILD_VERSION", "1"),
        ];
        environment.extend(more);
        make_runs("setpriv", &arguments, self.objects, time_max, &environment)
            .watched(watch)
            .map(drop)
    }

    /// Puts what is kept together, and in its place in one step.
    fn collect(&self, work: &Work, result: &Path, unknown: &[String]) -> Result<(), BootError> {
        let fresh = work.path().join("result");
        let modules = fresh.join("modules");
        fs::create_dir_all(&modules).map_err(BootError::io("make directory", &modules))?;
        for (from, to) in [
            ("vmlinux", "vmlinux"),
            ("modules.builtin", "modules/modules.builtin"),
            (".config", "config"),
            ("include/config/kernel.release", "release"),
        ] {
            let (from, to) = (self.objects.join(from), fresh.join(to));
            fs::copy(&from, &to).map_err(BootError::io("copy", &from))?;
            fs::File::open(&to)
                .and_then(|file| file.sync_all())
                .map_err(BootError::io("write", &to))?;
        }
        let list = fresh.join("unknown-options");
        super::shelf::write_synced(&list, unknown.join("\n").as_bytes())?;
        fs::rename(&fresh, result).map_err(BootError::io("put in place", result))
    }
}

fn percent(lines: u32) -> u8 {
    u8::try_from(lines.saturating_mul(100) / FILES_EXPECTED).map_or(99, |value| value.min(99))
}

/// Counts the lines of a file that grows, reading each byte once.
#[derive(Default)]
struct LineCount {
    at: u64,
    lines: u32,
}

impl LineCount {
    fn of(&mut self, path: &Path) -> u32 {
        use std::io::{Read as _, Seek as _, SeekFrom};
        let mut fresh = Vec::new();
        let read = fs::File::open(path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.at))?;
            file.take(SMALL_FILE_MAX).read_to_end(&mut fresh)
        });
        // It only tells how far a build is; what cannot be read is not counted.
        if let Ok(bytes) = read {
            self.at += bytes as u64;
            let lines = fresh.iter().filter(|byte| **byte == b'\n').count();
            self.lines = self
                .lines
                .saturating_add(u32::try_from(lines).unwrap_or(u32::MAX));
        }
        self.lines
    }
}

#[cfg(test)]
mod tests;
