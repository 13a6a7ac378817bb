//! Tests of root directories, with the small programs every system has.

use super::*;
use crate::files::OutputBox;
use crate::launch::Launch;
use crate::mounts::Bind;
use crate::process::ProcessEnd;
use std::sync::Arc;

/// What a shell needs of a system, as far as it is there.
fn system() -> Vec<PathBuf> {
    ["/usr", "/bin", "/lib", "/lib64"]
        .map(PathBuf::from)
        .into_iter()
        .filter(|dir| dir.exists())
        .collect()
}

async fn printed(root: &Arc<Root>, script: &str) -> String {
    let output = OutputBox::new(64 << 10).unwrap();
    let mut launch = Launch::new("/bin/sh");
    launch.args = vec!["-c".into(), script.into()];
    launch.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    launch.output = Some(output.writer().unwrap());
    launch.root = Some(root.clone());
    launch.own_processes = true;
    launch.proc_at = Some("/proc".into());
    launch.uid_gid = Some((61_236, 61_236));
    let launched = launch.start().unwrap();
    let end = launched.process.wait().await.unwrap();
    assert_eq!(end, ProcessEnd::Exited(0), "{}", output.tail(2000));
    output.tail(10_000)
}

#[tokio::test]
async fn a_program_finds_what_it_is_shown_and_nothing_else() {
    if !crate::facts::is_root() {
        return println!("SKIP: a root directory takes root");
    }
    let host = tempfile::tempdir().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(host.path(), mode).unwrap();
    let (dir, file) = (host.path().join("dir"), host.path().join("file"));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("inner"), "inner").unwrap();
    std::fs::write(&file, "file").unwrap();
    std::fs::write(host.path().join("hidden"), "hidden").unwrap();
    let mut shown = Shown {
        dirs: system(),
        files: vec![file.clone(), "/dev/null".into(), "/dev/urandom".into()],
        places: vec!["/etc".into(), "/proc".into()],
        links: vec![("/run/link".into(), dir.join("inner"))],
        ..Shown::default()
    };
    shown.dirs.push(dir.clone());
    let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = Arc::new(Root::prepare(&shown).unwrap());
    let at = host.path().display();
    let script = format!(
        "cat {at}/file /run/link; echo; ls {at}; ls /etc; head -c 9 /dev/urandom | wc -c; echo x >/dev/null || exit 1;
        for at in / /etc {at} {at}/dir /usr /dev; do touch $at/x 2>/dev/null && echo wrote $at; done; echo x 2>/dev/null >>{at}/file && echo wrote;
        ls -d /root /home /var /sys 2>/dev/null; echo /proc/[0-9]*; ls /.. | wc -l"
    );
    let text = printed(&root, &script).await;
    let lines: Vec<&str> = text.lines().collect();
    let entries = std::fs::read_dir("/").unwrap().flatten();
    assert!(entries.count() > 9, "or the last line says nothing");
    assert_eq!(lines[..4], ["fileinner", "dir", "file", "9"], "{text}");
    assert!(lines[4].starts_with("/proc/1"), "{text}");
    assert!(lines[5].parse::<u32>().unwrap() < 10, "{text}");
    assert_eq!(lines.len(), 6, "{text}");
    assert_eq!(
        std::fs::read_to_string("/proc/self/mountinfo").unwrap(),
        before
    );
}

#[tokio::test]
async fn what_a_launch_shows_at_a_place_is_its_own_and_stays_the_hosts() {
    if !crate::facts::is_root() {
        return println!("SKIP: a root directory takes root");
    }
    let host = tempfile::tempdir().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(host.path(), mode).unwrap();
    std::fs::write(host.path().join("words"), "old").unwrap();
    let shown = Shown {
        dirs: system(),
        places: vec!["/etc".into(), "/proc".into()],
        file_places: vec!["/dev/zero".into()],
        ..Shown::default()
    };
    let root = Arc::new(Root::prepare(&shown).unwrap());
    let output = OutputBox::new(4096).unwrap();
    let mut launch = Launch::new("/bin/sh");
    let script = "until grep -q new /etc/words; do sleep 0.02; done; cat /etc/words; (touch /etc/x) 2>&1 | grep -c Read-only; head -c 3 /dev/zero | wc -c";
    launch.args = vec!["-c".into(), script.into()];
    launch.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    launch.output = Some(output.writer().unwrap());
    let dir = File::open(host.path()).unwrap();
    let zero = Path::new("/dev/zero");
    launch.binds = vec![
        Bind::new(&dir, Path::new("/etc"), true).unwrap(),
        Bind::of_device(zero, zero).unwrap(),
    ];
    launch.root = Some(root.clone());
    let launched = launch.start().unwrap();
    std::fs::write(host.path().join("words"), "new words").unwrap();
    launched.process.wait().await.unwrap();
    assert_eq!(output.tail(100).trim_end(), "new words1\n3");
    assert_eq!(printed(&root, "ls /etc").await, "");
}

#[test]
fn what_cannot_be_shown_is_told_by_name() {
    if !crate::facts::is_root() {
        return println!("SKIP: a root directory takes root");
    }
    let shown = Shown {
        files: vec!["/no/such/file".into()],
        ..Shown::default()
    };
    let error = Root::prepare(&shown).unwrap_err();
    assert!(error.step.contains("/no/such/file"), "{error}");
    assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
}

/// Prints what each fence adds to the start of a program: `… -- --ignored --nocapture measure`.
#[tokio::test]
#[ignore = "a measurement, of use on a quiet machine only"]
async fn measure_what_the_fences_add_to_a_start() {
    const ROUNDS: usize = 101;
    let shown = Shown {
        dirs: system(),
        files: vec!["/dev/null".into()],
        places: vec!["/proc".into()],
        ..Shown::default()
    };
    let root = Arc::new(Root::prepare(&shown).unwrap());
    let kinds = [
        "as before",
        "and processes",
        "and a /proc",
        "and a network",
        "and a root",
    ];
    let mut times = vec![Vec::new(); kinds.len()];
    for _ in 0..ROUNDS {
        // In turn, so that a host that is busy for a moment is so for all.
        for (kind, times) in times.iter_mut().enumerate() {
            let mut launch = Launch::new("/usr/bin/true");
            launch.uid_gid = Some((61_236, 61_236));
            launch.own_processes = kind > 0;
            launch.proc_at = (kind > 1).then(|| "/proc".into());
            launch.own_network = kind > 2;
            launch.root = (kind > 3).then(|| root.clone());
            let begin = std::time::Instant::now();
            let launched = launch.start().unwrap();
            times.push(begin.elapsed());
            launched.process.wait().await.unwrap();
        }
    }
    for (kind, mut times) in kinds.into_iter().zip(times) {
        times.sort();
        println!(
            "{kind}: median {:?}, least {:?}",
            times[ROUNDS / 2],
            times[0]
        );
    }
}
