//! One Nanos machine under QEMU without KVM: a disk of this crate, booted once.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Cursor};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use vistara_nanos::disk::{BootDisk, DiskOptions, Volume};
use vistara_nanos::kernel::neutralise_pvh_note;
use vistara_nanos::klog::{self, Record};
use vistara_nanos::tfs::{self, Directory, Label, VolumeId, Writer};
use vistara_nanos::{KernelFacts, Manifest};

/// How long a machine may take; a busy host without KVM needs some seconds.
const TIME_LIMIT_S: &str = "100";

/// What the tests need, and a directory for their files.
pub(crate) struct Lab {
    kernel: PathBuf,
    directory: tempfile::TempDir,
    files: AtomicU32,
}

/// What one machine has.
pub(crate) struct Boot {
    pub(crate) manifest: Manifest,
    pub(crate) files: Vec<(String, Vec<u8>)>,
    pub(crate) directories: Vec<String>,
    pub(crate) symlinks: Vec<(String, String)>,
    pub(crate) hard_links: Vec<(String, String)>,
    pub(crate) volumes: Vec<PathBuf>,
    pub(crate) memory_mib: u32,
    /// A network device with QEMU's own user-mode network.
    pub(crate) network: bool,
    /// What the boot file system has, if there is to be one.
    pub(crate) boot_files: Vec<(String, Vec<u8>)>,
}

/// How it ended.
pub(crate) struct End {
    pub(crate) console: String,
    pub(crate) status: Option<i32>,
    pub(crate) record: Option<Record>,
}

impl Boot {
    pub(crate) fn new(manifest: Manifest) -> Boot {
        Boot {
            manifest,
            files: Vec::new(),
            directories: Vec::new(),
            symlinks: Vec::new(),
            hard_links: Vec::new(),
            volumes: Vec::new(),
            memory_mib: 64,
            network: false,
            boot_files: Vec::new(),
        }
    }

    pub(crate) fn with_program(mut self, name: &str, program: &[u8]) -> Boot {
        self.files.push((format!("bin/{name}"), program.to_vec()));
        self
    }
}

impl End {
    /// The exact code, from the record; checks that QEMU's own status agrees as far as it can.
    pub(crate) fn exit_code(&self) -> i32 {
        let code = self.record.as_ref().map_or(0, |record| record.exit_code);
        assert_eq!(self.status, Some((code << 1 | 1) & 255), "{}", self.console);
        code
    }
}

impl Lab {
    /// None, with the reason on stdout, where something is missing.
    pub(crate) fn find() -> Option<Lab> {
        let kernel = std::env::var_os("VISTARA_NANOS_KERNEL").map_or_else(
            || PathBuf::from("/opt/vistara/nanos/kernel.img"),
            PathBuf::from,
        );
        if !kernel.exists() {
            println!(
                "SKIP: no Nanos kernel at {} (VISTARA_NANOS_KERNEL)",
                kernel.display()
            );
            return None;
        }
        for tool in ["qemu-system-x86_64", "gcc"] {
            let found = Command::new(tool)
                .arg("--version")
                .stdout(Stdio::null())
                .status();
            if !found.is_ok_and(|status| status.success()) {
                println!("SKIP: no {tool} here");
                return None;
            }
        }
        let file = fs::read(&kernel).unwrap();
        assert!(KernelFacts::read(&file).unwrap().pvh_entry.is_some());
        let copy = neutralise_pvh_note(&file).unwrap();
        assert_eq!(KernelFacts::read(&copy).unwrap().pvh_entry, None);
        Some(Lab {
            kernel,
            directory: tempfile::tempdir().unwrap(),
            files: AtomicU32::new(0),
        })
    }

    fn path(&self, kind: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        self.directory.path().join(format!("{number}.{kind}"))
    }

    /// The kernel.
    pub(crate) fn kernel_file(&self) -> Vec<u8> {
        fs::read(&self.kernel).unwrap()
    }

    /// A module of the kernel, which lies in `klibs` beside it; none, with the reason on stdout, if it does not.
    pub(crate) fn klib(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.kernel.with_file_name("klibs").join(name);
        let read = fs::read(&path);
        if let Err(error) = &read {
            println!("SKIP: no module {}: {error}", path.display());
        }
        read.ok()
    }

    /// A static program out of C.
    pub(crate) fn compile(&self, source: &str) -> Vec<u8> {
        let (code, program) = (self.path("c"), self.path("elf"));
        fs::write(&code, source).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.args(["-static", "-O1", "-w", "-o"])
            .arg(&program)
            .arg(&code);
        assert!(gcc.status().unwrap().success());
        fs::read(program).unwrap()
    }

    /// A volume with some files in its root, and room for `free_bytes` more.
    pub(crate) fn volume(&self, label: &str, free_bytes: u64, files: &[(&str, &[u8])]) -> PathBuf {
        let path = self.path("volume");
        let options = DiskOptions {
            id: VolumeId([0x77; 16]),
            label: Label::new(label).unwrap(),
            free_bytes,
        };
        let mut volume = Volume::create(create(&path), &options).unwrap();
        let root = volume.tree().root();
        for (name, content) in files {
            let length = content.len() as u64;
            let mut content = *content;
            volume
                .tree()
                .file(root, name.as_bytes(), length, &mut content)
                .unwrap();
        }
        volume.finish().unwrap();
        path
    }

    /// Builds the disk, boots it, waits for its end.
    pub(crate) fn run(&self, boot: Boot) -> End {
        let disk = self.path("disk");
        let options = DiskOptions {
            id: VolumeId([0x55; 16]),
            label: Label::none(),
            free_bytes: 0,
        };
        let out = create(&disk);
        let mut image = match boot.boot_files.is_empty() {
            true => BootDisk::create(out, &options, &boot.manifest),
            false => BootDisk::with_boot_files(out, &options, &boot.manifest, |tree| {
                add_files(tree, &mut HashMap::new(), &boot.boot_files);
                Ok(())
            }),
        }
        .unwrap();
        fill(image.tree(), &boot);
        image.finish().unwrap();
        // An old record must not be taken for this run's.
        let mut file = File::options().read(true).write(true).open(&disk).unwrap();
        klog::clear(&mut file).unwrap();

        let mut qemu = Command::new("timeout");
        qemu.args([
            TIME_LIMIT_S,
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-cpu",
            "max",
        ])
        .args([
            "-M",
            "microvm,ioapic2=off",
            "-global",
            "virtio-mmio.force-legacy=false",
        ])
        .args([
            "-device",
            "isa-debug-exit",
            "-display",
            "none",
            "-serial",
            "stdio",
        ])
        .args([
            "-monitor",
            "none",
            "-no-reboot",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-m", &format!("{}M", boot.memory_mib)])
        .arg("-kernel")
        .arg(&self.kernel);
        for (index, path) in std::iter::once(&disk).chain(&boot.volumes).enumerate() {
            let file = path.display();
            qemu.args([
                "-drive",
                &format!("if=none,id=hd{index},format=raw,file={file}"),
            ])
            .args(["-device", &format!("virtio-blk-device,drive=hd{index}")]);
        }
        if boot.network {
            qemu.args(["-netdev", "user,id=n0,restrict=on"])
                .args(["-device", "virtio-net-device,netdev=n0"]);
        }
        let output = qemu.stdin(Stdio::null()).output().unwrap();
        let mut console = String::from_utf8_lossy(&output.stdout).into_owned();
        console.push_str(&String::from_utf8_lossy(&output.stderr));
        End {
            console,
            status: output.status.code(),
            record: klog::read(&mut file).unwrap(),
        }
    }
}

fn create(path: &Path) -> BufWriter<File> {
    BufWriter::with_capacity(1 << 20, File::create_new(path).unwrap())
}

fn fill(tree: &mut Writer<BufWriter<File>>, boot: &Boot) {
    let mut directories = HashMap::new();
    for path in &boot.directories {
        directory(tree, &mut directories, path);
    }
    let files = add_files(tree, &mut directories, &boot.files);
    for (path, target) in &boot.symlinks {
        let (parent, name) = split(path);
        let parent = directory(tree, &mut directories, parent);
        tree.symlink(parent, name.as_bytes(), target.as_bytes())
            .unwrap();
    }
    for (path, target) in &boot.hard_links {
        let (parent, name) = split(path);
        let parent = directory(tree, &mut directories, parent);
        tree.hard_link(parent, name.as_bytes(), files[target.as_str()])
            .unwrap();
    }
}

fn add_files<'a>(
    tree: &mut Writer<BufWriter<File>>,
    directories: &mut HashMap<String, Directory>,
    contents: &'a [(String, Vec<u8>)],
) -> HashMap<&'a str, tfs::File> {
    let mut files = HashMap::new();
    for (path, content) in contents {
        let (parent, name) = split(path);
        let parent = directory(tree, directories, parent);
        let length = content.len() as u64;
        let mut content = Cursor::new(content);
        let file = tree.file(parent, name.as_bytes(), length, &mut content);
        files.insert(path.as_str(), file.unwrap());
    }
    files
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn directory(
    tree: &mut Writer<BufWriter<File>>,
    known: &mut HashMap<String, Directory>,
    path: &str,
) -> Directory {
    if path.is_empty() {
        return tree.root();
    }
    if let Some(directory) = known.get(path) {
        return *directory;
    }
    let (parent, name) = split(path);
    let parent = directory(tree, known, parent);
    let made = tree.directory(parent, name.as_bytes()).unwrap();
    known.insert(path.to_string(), made);
    made
}
