//! The agent as PID 1 of a real guest under QEMU's emulation.
//!
//! Wants a directory in `VISTARA_TEST_GUEST` with `kernel`, `initramfs` (the agent as `/init`, `/modules`) and
//! `root.squashfs` (with busybox); without it the tests say so and are skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test fails by panicking, in its helpers too.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use vistara_guest_client::*;

struct Machine {
    qemu: Child,
    dir: tempfile::TempDir,
    started: Instant,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            let console = std::fs::read(self.dir.path().join("console")).unwrap_or_default();
            eprintln!("console:\n{}", String::from_utf8_lossy(&console));
        }
    }
}

fn tsc_khz() -> u64 {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("cpu MHz"))
        .unwrap();
    (line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() * 1000.0) as u64
}

impl Machine {
    fn start(files: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let overlay = dir.path().join("overlay");
        std::fs::File::create(&overlay)
            .unwrap()
            .set_len(256 << 20)
            .unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-O", "^has_journal"])
            .arg(&overlay)
            .status();
        assert!(made.unwrap().success());
        let show = |path: PathBuf| path.display().to_string();
        let words = format!(
            "console=ttyS0 tsc_early_khz={} tsc=reliable cryptomgr.notests noreplace-smp quiet panic=-1 reboot=t \
             vistara.root=/dev/vda vistara.overlay=/dev/vdb vistara.channel=virtio-serial",
            tsc_khz()
        );
        let arguments = [
            "-M microvm,acpi=on -accel tcg -cpu max,-erms -m 256 -nodefaults -no-user-config -no-reboot -display none",
            &format!("-serial file:{}", show(dir.path().join("console"))),
            &format!("-drive if=none,id=root,format=raw,readonly=on,file={}", show(files.join("root.squashfs"))),
            &format!("-drive if=none,id=overlay,format=raw,file={}", show(overlay)),
            "-device virtio-blk-device,drive=root -device virtio-blk-device,drive=overlay",
            &format!("-chardev socket,id=agent,server=on,wait=off,path={}", show(dir.path().join("agent"))),
            "-device virtio-serial-device -device virtserialport,chardev=agent,name=vistara.agent",
            "-netdev user,id=net -device virtio-net-device,netdev=net",
        ]
        .join(" ");
        let started = Instant::now();
        let qemu = Command::new("qemu-system-x86_64")
            .args(arguments.split_whitespace())
            .arg("-kernel")
            .arg(files.join("kernel"))
            .arg("-initrd")
            .arg(files.join("initramfs"))
            .args(["-append", &words])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { qemu, dir, started }
    }

    async fn connect(&self) -> (Agent, Welcome) {
        let socket = self.dir.path().join("agent");
        let stream = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        };
        connect(stream, ConnectOptions::default()).await.unwrap()
    }
}

fn files() -> Option<PathBuf> {
    let files = std::env::var_os("VISTARA_TEST_GUEST").map(PathBuf::from);
    if files.is_none() {
        println!("SKIPPED: VISTARA_TEST_GUEST names no directory with a guest");
    }
    files
}

fn config() -> GuestConfig {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    GuestConfig {
        hostname: "booted".into(),
        wall_clock_ns: u64::try_from(now.as_nanos()).unwrap(),
        entropy: (0..64).collect(),
        network: Some(NetworkConfig {
            mac: None,
            addresses: vec![("10.0.2.15".parse().unwrap(), 24)],
            gateways: vec!["10.0.2.2".parse().unwrap()],
            dns: vec!["10.0.2.3".parse().unwrap()],
            search: vec![],
            mtu: None,
        }),
        ..GuestConfig::default()
    }
}

fn sh(script: &str) -> ProcessSpec {
    ProcessSpec {
        argv: vec!["sh".into(), "-c".into(), script.into()],
        ..ProcessSpec::default()
    }
}

async fn output(agent: &Agent, id: u32, spec: ProcessSpec) -> (i32, String) {
    let mut process = agent.spawn(ProcessId(id), spec).await.unwrap();
    let mut text = Vec::new();
    while let Some(chunk) = process.output.next().await {
        text.extend_from_slice(&chunk.bytes);
        process.output.ack(chunk.stream, chunk.end());
    }
    let exit = process.handle.exited().await.unwrap();
    process.handle.forget().await.unwrap();
    (exit.code(), String::from_utf8_lossy(&text).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_boots_serves_and_switches_itself_off() {
    let Some(files) = files() else { return };
    let mut machine = Machine::start(&files);
    let (agent, welcome) = machine.connect().await;
    println!("welcome after {:?}", machine.started.elapsed());
    assert!(!welcome.configured);
    let configured = agent.configure(config()).await.unwrap();
    assert_eq!(configured.warnings, Vec::<String>::new());
    println!("configured after {:?}", machine.started.elapsed());
    let mut main = agent
        .spawn(
            ProcessId::MAIN,
            sh("echo first; trap 'echo last; exit 6' TERM; sleep 1000 & wait"),
        )
        .await
        .unwrap();
    let first = main.output.next().await.unwrap();
    println!("first output after {:?}", machine.started.elapsed());
    assert_eq!(first.bytes, b"first\n");
    let mut before = None;
    for mark in &configured.timings {
        let since = before.map_or(0, |at| mark.at_us - at);
        println!(
            "  {:15} {:8} µs  +{since}",
            mark.stage.to_string(),
            mark.at_us
        );
        before = Some(mark.at_us);
    }
    println!("  {:15} {:8} µs", "spawned", main.handle.spawned_at_us());

    let look = "hostname; cat /etc/hostname /etc/resolv.conf; grep booted /etc/hosts; ip addr show eth0 | grep inet; \
                ip route; mount; ls -l /dev/fd/0 /dev/ptmx; cat /proc/self/oom_score_adj; date +%Y; touch /written && echo rw";
    let (code, text) = output(&agent, 1, sh(look)).await;
    println!("{text}");
    assert_eq!(code, 0);
    for words in [
        "booted\nbooted\nnameserver 10.0.2.3",
        "10.0.2.15\tbooted",
        "10.0.2.15/24",
        "default via 10.0.2.2",
        "cgroup2",
        "/dev/shm",
        "\n0\n20",
        "\nrw\n",
    ] {
        assert!(text.contains(words), "{words:?}");
    }
    let ada = ProcessSpec {
        user: "ada".into(),
        ..sh("id; echo $HOME")
    };
    assert_eq!(
        output(&agent, 2, ada).await.1,
        "uid=1000(ada) gid=1000(ada) groups=29(audio)\n/home/ada\n"
    );
    let tty = ProcessSpec {
        tty: Some(TtySize {
            rows: 11,
            columns: 22,
        }),
        stdin: true,
        ..sh("stty size; ps | head -n1")
    };
    assert!(output(&agent, 3, tty).await.1.starts_with("11 22\r\n"));
    let started = Instant::now();
    for _ in 0..20 {
        agent.ping().await.unwrap();
    }
    println!("round trip {:?}", started.elapsed() / 20);
    let started = Instant::now();
    assert_eq!(output(&agent, 4, sh("true")).await.0, 0);
    println!("exec of true {:?}", started.elapsed());
    let started = Instant::now();
    assert_eq!(
        output(&agent, 4, sh("head -c 10000000 /dev/zero"))
            .await
            .1
            .len(),
        10_000_000
    );
    println!("10 MB in {:?}", started.elapsed());
    let eater = agent
        .spawn(
            ProcessId(5),
            sh("exec dd if=/dev/zero of=/dev/null bs=190M count=1"),
        )
        .await
        .unwrap();
    let exit = eater.handle.exited().await.unwrap();
    println!("eating memory ends so: {exit:?}");
    assert!(exit.oom && exit.code() == 137);
    eater.handle.forget().await.unwrap();
    println!("{:?}", agent.stats().await.unwrap());

    // The host goes and another comes.
    main.output.ack(OutputStream::Stdout, 6);
    agent.ping().await.unwrap();
    // A session lasts as long as anything of it is held.
    drop((main, eater, agent));
    let (agent, welcome) = machine.connect().await;
    assert!(welcome.configured && welcome.processes.len() == 1);
    let mut main = agent
        .resume(
            ProcessId::MAIN,
            Offsets {
                stdout: 6,
                stderr: 0,
            },
        )
        .await
        .unwrap();
    let asked = agent.clone();
    let off = tokio::spawn(async move {
        let started = Instant::now();
        asked.shutdown(Duration::from_secs(10), 15).await.unwrap();
        println!("bye after {:?}", started.elapsed());
    });
    let last = main.output.next().await.unwrap();
    assert_eq!(last.bytes, b"last\n");
    main.output.ack(OutputStream::Stdout, last.end());
    assert_eq!(main.handle.exited().await.unwrap().code(), 6);
    off.await.unwrap();
    assert_eq!(agent.closed().await, AgentError::Off);
    assert!(machine.qemu.wait().unwrap().success());
    let console = std::fs::read(machine.dir.path().join("console")).unwrap();
    println!("console:\n{}", String::from_utf8_lossy(&console));
}
