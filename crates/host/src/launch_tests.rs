//! Tests of fenced processes, with the small programs every system has.

use super::*;
use crate::files::OutputBox;
use crate::process::{ProcessEnd, ProcessIdentity};

fn shell(script: &str) -> (Launch, OutputBox) {
    let output = OutputBox::new(64 << 10).unwrap();
    let mut launch = Launch::new("/bin/sh");
    launch.args = vec!["-c".into(), script.into()];
    launch.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    launch.output = Some(output.writer().unwrap());
    (launch, output)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

async fn printed(launch: Launch, output: &OutputBox) -> String {
    let launched = launch.start().unwrap();
    let end = launched.process.wait().await.unwrap();
    assert_eq!(end, ProcessEnd::Exited(0), "{}", output.tail(2000));
    output.tail(10_000)
}

#[tokio::test]
async fn only_the_named_descriptors_are_inherited_under_their_own_numbers() {
    let (mut launch, output) = shell("ls /proc/$$/fd; cat /proc/self/fd/$FD");
    let kept = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut &kept, b"handed over").unwrap();
    std::io::Seek::rewind(&mut &kept).unwrap();
    let number = kept.as_raw_fd();
    // A descriptor of ours that was opened to be inherited must still not get through.
    let stray = kept.try_clone().unwrap();
    fcntl_setfd(&stray, FdFlags::empty()).unwrap();
    launch.env.push(("FD".into(), number.to_string().into()));
    launch.inherit.push(kept.into());
    let text = printed(launch, &output).await;
    let (numbers, content) = text.rsplit_once('\n').unwrap();
    assert_eq!(content, "handed over");
    let mut numbers: Vec<i32> = numbers.lines().map(|line| line.parse().unwrap()).collect();
    numbers.retain(|fd| *fd > 2);
    assert_eq!(numbers, [number]);
}

#[tokio::test]
async fn a_launched_program_has_no_privileges_and_a_session_of_its_own() {
    let (mut launch, output) = shell("cat /proc/$$/status; cut -d' ' -f1,6 /proc/$$/stat; umask");
    if is_root() {
        launch.uid_gid = Some((61234, 61235));
    }
    let text = printed(launch, &output).await;
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':')
            .unwrap()
            .1
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    if is_root() {
        assert_eq!(field("CapBnd"), "0000000000000000");
        assert_eq!(field("Uid"), "61234 61234 61234 61234");
        assert_eq!(field("Gid"), "61235 61235 61235 61235");
        assert_eq!(field("Groups"), "");
    } else {
        println!("SKIP: user, group and bounding set need root");
    }
    let ids: Vec<&str> = text.lines().rev().nth(1).unwrap().split(' ').collect();
    assert_eq!(ids[0], ids[1], "leads its session");
    assert!(text.ends_with("0077"));
}

#[tokio::test]
async fn a_read_only_directory_is_so_for_the_program_alone() {
    if !is_root() {
        return println!("SKIP: making a directory read-only needs root");
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut launch, output) = shell("touch \"$DIR/x\" 2>/dev/null || echo refused");
    launch.env.push(("DIR".into(), dir.path().into()));
    launch.keep_capabilities = true;
    launch.read_only.push(dir.path().to_owned());
    assert_eq!(printed(launch, &output).await, "refused");
    std::fs::write(dir.path().join("y"), "").unwrap();
}

/// Runs a test in a mount namespace of its own, with `outer` and a file system of its own at `outer/inner`; both hold
/// a `here`. Only the thread is there: nothing of it is seen elsewhere, and it goes with the thread.
fn with_a_mount_below(test: impl FnOnce(&std::path::Path) + Send + 'static) {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    if !is_root() {
        return println!("SKIP: mounting a file system needs root");
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: CLONE_NEWNS changes no descriptor table.
        if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) } {
            return println!("SKIP: no mount namespace can be made here: {error}");
        }
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        mount_change(c"/", private).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        mount("none", &inner, "tmpfs", MountFlags::empty(), None).unwrap();
        std::fs::write(inner.join("here"), "").unwrap();
        std::fs::write(dir.path().join("here"), "").unwrap();
        test(dir.path());
        rustix::mount::unmount(&inner, rustix::mount::UnmountFlags::DETACH).unwrap();
    });
    thread.join().unwrap();
}

#[test]
fn a_read_only_directory_is_so_with_what_is_mounted_below() {
    with_a_mount_below(|dir| {
        let (mut launch, output) = shell(
            "cd \"$DIR\"; ls inner; for at in . inner; do touch $at/x 2>/dev/null && echo wrote $at; done; :",
        );
        launch.env.push(("DIR".into(), dir.into()));
        launch.keep_capabilities = true;
        launch.read_only.push(dir.to_owned());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        assert_eq!(runtime.block_on(printed(launch, &output)), "here");
        // For others it is as before.
        std::fs::write(dir.join("inner/y"), "").unwrap();
    });
}

#[test]
fn what_is_mounted_below_is_not_shown_where_the_kernel_cannot_make_it_read_only() {
    with_a_mount_below(|dir| {
        let path = CString::new(dir.as_os_str().as_bytes()).unwrap();
        // As a kernel before 5.12.
        mounts::make_read_only(&path, |_| Err(rustix::io::Errno::NOSYS)).unwrap();
        let refused = |path: &str| std::fs::write(dir.join(path), "").unwrap_err().kind();
        assert_eq!(refused("x"), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(refused("inner/x"), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(std::fs::read_dir(dir.join("inner")).unwrap().count(), 0);
        rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH).unwrap();
    });
}

#[tokio::test]
async fn a_program_that_is_not_there_is_told_by_step_and_leaves_nothing() {
    let error = Launch::new("/no/such/program").start().unwrap_err();
    assert_eq!(error.step, "loading the program");
    assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
    let mut launch = Launch::new("/bin/true");
    launch.read_only.push("/no/such/directory".into());
    let error = launch.start().unwrap_err();
    if is_root() {
        assert_eq!(error.step, "making a directory read-only");
    }
}

#[tokio::test]
async fn every_waiter_hears_the_same_end() {
    let (launch, _output) = shell("exit 7");
    let launched = launch.start().unwrap();
    let (one, two) = tokio::join!(launched.process.wait(), launched.process.wait());
    assert_eq!(
        (one.unwrap(), two.unwrap()),
        (ProcessEnd::Exited(7), ProcessEnd::Exited(7))
    );
    assert_eq!(launched.process.known_end(), Some(ProcessEnd::Exited(7)));
    launched.process.kill().unwrap();
}

#[tokio::test]
async fn a_process_is_adopted_by_its_identity_and_by_nothing_less() {
    let launched = {
        let mut launch = Launch::new("/bin/sleep");
        launch.args = vec!["100".into()];
        launch.start().unwrap()
    };
    let identity = launched.process.identity().clone();
    let adopted = ProcessHandle::adopt(&identity).unwrap().unwrap();
    for wrong in [
        ProcessIdentity {
            start_ticks: identity.start_ticks + 1,
            ..identity.clone()
        },
        ProcessIdentity {
            boot_id: "another boot".to_owned(),
            ..identity.clone()
        },
        ProcessIdentity {
            pid: 0,
            ..identity.clone()
        },
    ] {
        assert!(ProcessHandle::adopt(&wrong).unwrap().is_none(), "{wrong:?}");
    }
    adopted.kill().unwrap();
    assert_eq!(adopted.wait().await.unwrap(), ProcessEnd::Signaled(9));
    // The first handle comes too late for the status, and says so rather than hang.
    assert_eq!(launched.process.wait().await.unwrap(), ProcessEnd::Unknown);
    assert!(ProcessHandle::adopt(&identity).unwrap().is_none());
}
