//! The jail, from inside.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_monitor_is_jailed_and_sees_nothing_of_others() {
    if !facts::is_root() {
        return println!("SKIP: the jail takes root");
    }
    let files = tempfile::tempdir().unwrap();
    let root_disk = disk(files.path(), "root", "ROOT", 0o644);
    let shared = vec![Disk {
        path: root_disk,
        read_only: true,
    }];
    let Some(machine) = run(|plan| plan.disks = shared.clone()).await else {
        return;
    };
    let other = run(|plan| plan.disks = shared).await.unwrap();
    println!("fences: {:#?}", machine.vm.record().fences);
    let pid = machine.vm.record().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let words = line.split_whitespace().skip(1);
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("Uid:"), ["61004"; 4]);
    assert_eq!(field("Gid:"), ["61005"; 4]);
    assert_eq!(field("Groups:"), [] as [&str; 0]);
    assert_eq!(field("NSpid:"), [pid.to_string(), "1".to_owned()]);
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/{kind}")).unwrap();
        assert_ne!(namespace(&pid.to_string()), namespace("self"), "{kind}");
    }
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
    {
        let target = std::fs::read_link(fd.path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        let own = [
            "/dev/null",
            "/memfd:output",
            "socket:",
            "anon_inode:",
            "/log",
            "/disk0",
            "/dev/kvm",
            "/dev/net/tun",
            "/kernel",
            "/dev/urandom",
            "pipe:",
        ];
        let console = target.ends_with("/console.live");
        assert!(
            console || own.iter().any(|start| target.starts_with(start)),
            "{target}"
        );
    }
    // A program that shares everything with the monitor: user, root directory and namespaces.
    let (host, port) = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    };
    let busybox = root(&machine).join("busybox");
    std::fs::copy("/bin/busybox", &busybox).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&busybox, mode).unwrap();
    let inside = |script: &str| {
        let output = Command::new("nsenter")
            .stdin(Stdio::null())
            .args(["--target", &pid.to_string()])
            .args([
                "--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd",
            ])
            .args(["--setuid", "61004", "--setgid", "61005"])
            .args(["--", "/busybox", "sh", "-c", script])
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&text).trim().to_owned(),
        )
    };
    let (code, listing) = inside("/busybox ls /");
    assert_eq!(code, Some(0), "{listing}");
    let mut names: Vec<&str> = listing.split_whitespace().collect();
    names.sort_unstable();
    println!("in the jail: {names:?}");
    let expected = [
        "agent.sock",
        "api.sock",
        "busybox",
        "dev",
        "disk0",
        "firecracker",
        "firecracker.pid",
        "initramfs",
        "kernel",
        "log",
        "run",
    ];
    assert_eq!(names, expected);
    let other_root = root(&other);
    for (what, script) in [
        ("the host's files", "/busybox ls /etc".to_owned()),
        ("the way up", "/busybox ls /../etc".to_owned()),
        (
            "another's files",
            format!("/busybox ls {}", other_root.display()),
        ),
        (
            "another's process",
            format!("/busybox kill -0 {}", other.vm.record().pid),
        ),
        (
            "this test's process",
            format!("/busybox kill -0 {}", std::process::id()),
        ),
        ("processes at all", "/busybox ls /proc/1".to_owned()),
        (
            "the host's network",
            format!("/busybox nc -w 2 127.0.0.1 {port}"),
        ),
        (
            "a new mount",
            "/busybox mkdir /m && /busybox mount -t tmpfs m /m".to_owned(),
        ),
        ("another root", "/busybox chroot / /busybox true".to_owned()),
        (
            "a disk of the host",
            "/busybox mknod /dev/sda b 8 0".to_owned(),
        ),
        ("the shared root disk", "echo x >> /disk0".to_owned()),
        ("the shared kernel", "echo x >> /kernel".to_owned()),
        ("the console's file", "/busybox ls /console.live".to_owned()),
    ] {
        let (code, text) = inside(&script);
        println!("{what}: {code:?} {text}");
        assert_ne!(code, Some(0), "{what}: {text}");
    }
    drop(host);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains("/jail/"),
        "the host's mounts are as they were"
    );
    machine.end_of(&Firecracker).await;
    other.end_of(&Firecracker).await;
}
