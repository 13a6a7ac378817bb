//! What is started for a run, and what its machine is told: pure, so that it can be tested.

use super::host::{Dialect, Programs, Virtiofsd};
use super::options::Cgroup;
use anyhow::{Result, bail};
use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// SVM without the two features that make string instructions slow where code is translated. AVX and XSAVE must stay:
/// Firecracker wants them.
const CPU: &str = "max,-erms,-fsrm";
/// `reboot=t` is the reset that QEMU ends at; the tests of the crypto code take a quarter of a second; the mitigations
/// cost and protect nobody here.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off cryptomgr.notests no_timer_check noreplace-smp";
/// Its tag for the guest.
const ROOT_TAG: &str = "root";
/// How much longer than the host the machine itself waits before it goes off: it is the last resort.
const GRACE: Duration = Duration::from_secs(30);

/// Everything about a run but this host's programs.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) memory_mib: u32,
    pub(super) cpus: u32,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) modules: PathBuf,
    pub(super) cgroup: Cgroup,
    /// Whether `/tmp` is empty inside, or the host's.
    pub(super) fresh_tmp: bool,
    pub(super) shares: Vec<PathBuf>,
    /// The whole run, its boot included.
    pub(super) limit: Duration,
    /// What `/bin/sh` runs inside.
    pub(super) script: Vec<u8>,
}

/// A directory that is served to the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) tag: String,
    pub(super) dir: PathBuf,
    /// Whether the host's changes must be seen, and may be made.
    pub(super) writable: bool,
}

/// The descriptors that QEMU inherits, each one end of a pair of sockets.
#[derive(Debug, Clone)]
pub(super) struct Descriptors {
    pub(super) control: RawFd,
    pub(super) out: RawFd,
    pub(super) err: RawFd,
    /// As many as there are shares.
    pub(super) shares: Vec<RawFd>,
}

impl Plan {
    /// The root first.
    pub(super) fn all_shares(&self) -> Vec<Share> {
        let root = Share {
            tag: ROOT_TAG.to_owned(),
            dir: "/".into(),
            writable: false,
        };
        let others = self.shares.iter().enumerate();
        let others = others.map(|(number, dir)| Share {
            tag: format!("share{number}"),
            dir: dir.clone(),
            writable: true,
        });
        std::iter::once(root).chain(others).collect()
    }

    /// QEMU's arguments. Its standard output is the machine's console.
    pub(super) fn qemu(&self, fds: &Descriptors) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![];
        let mut option = |name: &str, value: OsString| words.extend([name.into(), value]);
        let memory = self.memory_mib;
        option("-name", "vistara-lab".into());
        option("-machine", "q35,hpet=off,memory-backend=memory".into());
        option("-accel", "tcg,thread=multi".into());
        option("-cpu", CPU.into());
        option("-smp", self.cpus.to_string().into());
        option("-m", format!("{memory}M").into());
        // virtiofsd reads and writes the machine's memory.
        option(
            "-object",
            format!("memory-backend-memfd,id=memory,size={memory}M,share=on").into(),
        );
        option("-display", "none".into());
        option("-chardev", "stdio,id=console,signal=off".into());
        option("-serial", "chardev:console".into());
        option("-device", "virtio-serial-pci,max_ports=4".into());
        let ports = [("control", fds.control), ("out", fds.out), ("err", fds.err)];
        for (number, (name, fd)) in ports.iter().enumerate() {
            option("-chardev", format!("socket,id={name},fd={fd}").into());
            let port = number + 1;
            option(
                "-device",
                format!("virtserialport,nr={port},name={name},chardev={name}").into(),
            );
        }
        for (share, fd) in self.all_shares().iter().zip(&fds.shares) {
            let tag = &share.tag;
            option("-chardev", format!("socket,id=fs-{tag},fd={fd}").into());
            option(
                "-device",
                format!("vhost-user-fs-pci,queue-size=1024,tag={tag},chardev=fs-{tag}").into(),
            );
        }
        option("-kernel", self.kernel.clone().into());
        option("-initrd", self.initramfs.clone().into());
        let clock = if self.cpus > 1 { " tsc=reliable" } else { "" };
        option("-append", format!("{KERNEL_OPTIONS}{clock}").into());
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            words.push(flag.into());
        }
        words
    }

    /// The settings for the second stage, which sources them.
    pub(super) fn settings(&self, now: Duration) -> Vec<u8> {
        let mut text = Vec::new();
        let mut line = |parts: &[&[u8]]| {
            text.extend(parts.concat());
            text.push(b'\n');
        };
        // What sets the clock knows whole seconds.
        let time = (now + Duration::from_millis(500)).as_secs().to_string();
        line(&[b"time=", time.as_bytes()]);
        line(&[b"modules=", &quoted(self.modules.as_os_str())]);
        line(&[match self.cgroup {
            Cgroup::V1 => b"cgroup=v1",
            Cgroup::V2 => b"cgroup=v2",
        }]);
        let limit = (self.limit + GRACE).as_secs().to_string();
        line(&[b"limit_s=", limit.as_bytes()]);
        if self.fresh_tmp {
            line(&[b"fresh_tmp"]);
        }
        for share in self.all_shares().iter().skip(1) {
            line(&[
                b"share ",
                share.tag.as_bytes(),
                b" ",
                &quoted(share.dir.as_os_str()),
            ]);
        }
        text
    }
}

/// A program and its arguments that serve a share; the listening socket is its standard input. They end when this process
/// does, and when QEMU closes its end.
pub(super) fn server(programs: &Programs, share: &Share) -> (PathBuf, Vec<OsString>) {
    let mut words: Vec<OsString> = ["--pdeathsig", "KILL", "--"].map(OsString::from).into();
    let Virtiofsd { program, dialect } = &programs.virtiofsd;
    words.push(program.into());
    words.push("--fd=0".into());
    let cache = if share.writable { "auto" } else { "always" };
    match dialect {
        Dialect::C => {
            let mut source = OsString::from("source=");
            source.push(without_commas(&share.dir));
            words.extend(["-f".into(), "-o".into(), source]);
            let options = format!("sandbox=chroot,xattr,log_level=err,cache={cache}");
            words.extend(["-o".into(), options.into()]);
        }
        Dialect::Rust => {
            words.extend(["--shared-dir".into(), share.dir.clone().into()]);
            words.extend(["--sandbox=chroot", "--xattr", "--log-level=error"].map(OsString::from));
            words.push(format!("--cache={cache}").into());
            if !share.writable {
                words.push("--readonly".into());
            }
        }
    }
    (programs.setpriv.clone(), words)
}

/// A path in an option whose parts commas divide; a backslash takes their meaning.
fn without_commas(path: &Path) -> OsString {
    let mut bytes = vec![];
    for byte in path.as_os_str().as_bytes() {
        if b",\\".contains(byte) {
            bytes.push(b'\\');
        }
        bytes.push(*byte);
    }
    OsString::from_vec(bytes)
}

/// The script that becomes the command: in its directory, with these variables and no others.
pub(super) fn script(
    dir: &Path,
    environment: &[(String, String)],
    words: &[String],
) -> Result<Vec<u8>> {
    let mut text = b"echo $$ >/run/lab/pid\ncd ".to_vec();
    text.extend(quoted(dir.as_os_str()));
    text.extend(b" || exit 125\nexec /usr/bin/env -i");
    for (name, value) in environment {
        if name.is_empty() || name.starts_with('-') || name.contains('=') {
            bail!("{name:?} is no name of an environment variable");
        }
        text.push(b' ');
        text.extend(quoted(format!("{name}={value}").as_ref()));
    }
    if words.first().is_some_and(|word| word.contains('=')) {
        bail!("a command with a = in its name would pass for a variable");
    }
    for word in words {
        text.push(b' ');
        text.extend(quoted(word.as_ref()));
    }
    text.push(b'\n');
    Ok(text)
}

/// One word for a shell, whatever is in it.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut text = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => text.extend(b"'\\''"),
            byte => text.push(*byte),
        }
    }
    text.push(b'\'');
    text
}

/// What the command sees of the caller's variables, and those that were asked for.
pub(super) fn environment(
    caller: impl Iterator<Item = (OsString, OsString)>,
    asked: &[(String, Option<String>)],
) -> Vec<(String, String)> {
    let mut found = vec![];
    for (name, value) in caller {
        let (Ok(name), Ok(value)) = (name.into_string(), value.into_string()) else {
            continue;
        };
        let by_name = asked
            .iter()
            .any(|(asked, value)| *asked == name && value.is_none());
        let replaced = asked
            .iter()
            .any(|(asked, value)| *asked == name && value.is_some());
        if (by_name || passes(&name)) && !replaced {
            found.push((name, value));
        }
    }
    for (name, value) in asked {
        if let Some(value) = value {
            found.push((name.clone(), value.clone()));
        }
    }
    found
}

/// Whether a variable of the caller's is passed on unasked. Those that `cargo run` sets are about xtask itself.
fn passes(name: &str) -> bool {
    const NAMES: [&str; 6] = ["PATH", "HOME", "TERM", "LANG", "USER", "LOGNAME"];
    const PREFIXES: [&str; 5] = ["VISTARA_", "RUST", "CARGO", "NEXTEST", "LC_"];
    const OF_XTASK: [&str; 5] = [
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_",
        "CARGO_CRATE_",
        "CARGO_PRIMARY_",
    ];
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    NAMES.contains(&name) || (begins(&PREFIXES) && !begins(&OF_XTASK))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn plan() -> Plan {
        Plan {
            memory_mib: 1024,
            cpus: 1,
            kernel: "/k/vmlinuz".into(),
            initramfs: "/k/initramfs".into(),
            modules: "/it's here/modules".into(),
            cgroup: Cgroup::V2,
            fresh_tmp: true,
            shares: vec!["/a b".into()],
            limit: Duration::from_secs(600),
            script: vec![],
        }
    }

    fn programs(dialect: Dialect) -> Programs {
        Programs {
            qemu: "/q".into(),
            virtiofsd: Virtiofsd {
                program: "/v".into(),
                dialect,
            },
            setpriv: "/setpriv".into(),
            depmod: "/d".into(),
            busybox: "/b".into(),
        }
    }

    fn joined(words: &[OsString]) -> String {
        let words: Vec<&str> = words.iter().map(|word| word.to_str().unwrap()).collect();
        words.join(" ")
    }

    #[test]
    fn qemu_translates_emulates_svm_and_serves_each_port_and_share() {
        let fds = Descriptors {
            control: 10,
            out: 11,
            err: 12,
            shares: vec![13, 14],
        };
        let line = joined(&plan().qemu(&fds));
        for part in [
            "-machine q35,hpet=off,memory-backend=memory -accel tcg,thread=multi -cpu max,-erms,-fsrm -smp 1 -m 1024M",
            "memory-backend-memfd,id=memory,size=1024M,share=on",
            "-chardev socket,id=control,fd=10 -device virtserialport,nr=1,name=control,chardev=control",
            "-chardev socket,id=err,fd=12 -device virtserialport,nr=3,name=err,chardev=err",
            "-chardev socket,id=fs-root,fd=13 -device vhost-user-fs-pci,queue-size=1024,tag=root,chardev=fs-root",
            "socket,id=fs-share0,fd=14",
            "-kernel /k/vmlinuz -initrd /k/initramfs -append console=ttyS0 quiet",
            "-nodefaults -no-user-config -no-reboot",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(!line.contains("tsc=reliable"));
        let two = Plan { cpus: 2, ..plan() };
        assert!(joined(&two.qemu(&fds)).contains("tsc=reliable"));
    }

    #[test]
    fn a_server_dies_with_us_and_only_the_root_is_cached_for_good() {
        let shares = plan().all_shares();
        let (program, words) = server(&programs(Dialect::C), &shares[0]);
        assert_eq!(program, Path::new("/setpriv"));
        assert_eq!(
            joined(&words),
            "--pdeathsig KILL -- /v --fd=0 -f -o source=/ -o sandbox=chroot,xattr,log_level=err,cache=always"
        );
        let (program, words) = server(&programs(Dialect::Rust), &shares[1]);
        assert_eq!(program, Path::new("/setpriv"));
        assert_eq!(
            joined(&words),
            "--pdeathsig KILL -- /v --fd=0 --shared-dir /a b --sandbox=chroot --xattr --log-level=error --cache=auto"
        );
        assert_eq!(without_commas(Path::new("/a,b\\c")), "/a\\,b\\\\c");
    }

    #[test]
    fn a_shell_reads_back_the_settings() {
        let settings = plan().settings(Duration::from_micros(1_500_000));
        let mut script = b"fresh_tmp() { echo fresh; }; share() { echo \"$1=$2\"; }\n".to_vec();
        script.extend(settings);
        script.extend(b"echo $time $modules $cgroup $limit_s\n");
        let script = String::from_utf8(script).unwrap();
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "fresh\nshare0=/a b\n2 /it's here/modules v2 630\n"
        );
    }

    #[test]
    fn the_command_keeps_its_words_whatever_is_in_them() {
        let words = ["printf", "%s|", "a b", "it's", "$HOME", "", "\"\n*"].map(str::to_owned);
        let environment = [("PATH".to_owned(), std::env::var("PATH").unwrap())];
        let script = script(Path::new("/"), &environment, &words).unwrap();
        // Its first line is for the machine only.
        let script = String::from_utf8(script).unwrap();
        let script = script.split_once('\n').unwrap().1;
        let output = Command::new("sh").args(["-c", script]).output().unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "a b|it's|$HOME||\"\n*|"
        );
    }

    #[test]
    fn what_would_be_read_as_something_else_is_refused() {
        let refused = |name: &str, word: &str| {
            let environment = [(name.to_owned(), String::new())];
            script(Path::new("/"), &environment, &[word.to_owned()]).is_err()
        };
        assert!(refused("A", "x=y"));
        assert!(refused("-u", "true"));
        assert!(refused("", "true"));
        assert!(!refused("A", "true"));
    }

    #[test]
    fn the_projects_variables_are_passed_and_those_about_xtask_are_not() {
        let caller = [
            ("VISTARA_X", "1"),
            ("RUST_LOG", "debug"),
            ("RUSTUP_TOOLCHAIN", "stable"),
            ("CARGO_MANIFEST_DIR", "/xtask"),
            ("CARGO_TERM_COLOR", "never"),
            ("SECRET", "s"),
            ("ASKED", "a"),
            ("PATH", "/bin"),
        ];
        let caller = caller.map(|(name, value)| (name.into(), value.into()));
        let asked = [
            ("ASKED".to_owned(), None),
            ("RUST_LOG".to_owned(), Some("info".to_owned())),
            ("GONE".to_owned(), None),
        ];
        let found = environment(caller.into_iter(), &asked);
        let found: Vec<String> = found.iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(
            found,
            [
                "VISTARA_X=1",
                "RUSTUP_TOOLCHAIN=stable",
                "CARGO_TERM_COLOR=never",
                "ASKED=a",
                "PATH=/bin",
                "RUST_LOG=info",
            ]
        );
    }
}
