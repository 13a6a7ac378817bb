//! Tests of a machine's network without a machine: a sleeping program stands where Firecracker would.

use super::*;
use crate::{Fence, LinuxBoot, Nic, Start};
use std::process::{Command, Stdio};
use vistara_model::{Accelerator, Bytes, MachineId, Rates};

#[test]
fn a_port_is_asked_for_in_the_helpers_words_and_a_refusal_is_none() {
    let port = PortMapping {
        host_address: Ipv4Addr::LOCALHOST,
        host_port: 8080,
        guest_port: 80,
        protocol: Protocol::Udp,
    };
    let request = add(&port);
    assert_eq!(request["execute"], "add_hostfwd");
    let arguments = &request["arguments"];
    assert_eq!(arguments["proto"], "udp");
    assert_eq!(arguments["host_addr"], "127.0.0.1");
    assert_eq!(arguments["host_port"], 8080);
    assert_eq!(arguments["guest_addr"], "10.0.2.15");
    assert_eq!(arguments["guest_port"], 80);
    assert!(added(br#"{"return":{"id":1}}"#));
    for refusal in [
        br#"{"error":{"desc":"bad request: add_hostfwd: slirp_add_hostfwd failed"}}"#.as_slice(),
        b"",
        b"nonsense",
    ] {
        assert!(!added(refusal));
    }
}

fn plan(dir: &Path, ports: Vec<PortMapping>) -> LaunchPlan {
    LaunchPlan {
        id: MachineId::from_random([1; 16]),
        dir: dir.to_owned(),
        accelerator: Accelerator::Kvm,
        vcpus: 1,
        memory: Bytes::mib(64),
        start: Start::Linux(LinuxBoot {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: String::new(),
        }),
        huge_pages: false,
        capturable: false,
        disks: vec![],
        nic: Some(Nic {
            ports,
            mac: [2, 0, 0, 0, 0, 1],
        }),
        shares: vec![],
        rates: Rates::default(),
        fence: Fence {
            uid_gid: Some((61_004, 61_005)),
            memory_max: Bytes::mib(128),
            pids_max: 10,
            cpu_millis: None,
        },
    }
}

/// In Firecracker's place: the first of its own process and network namespaces.
fn stand_in() -> ProcessHandle {
    let mut launch = Launch::new("/bin/sleep");
    launch.args = vec!["120".into()];
    (launch.own_processes, launch.own_network) = (true, true);
    launch.start().unwrap().process
}

async fn network() -> Option<UserNetwork> {
    match UserNetwork::find(None).await {
        Ok(network) => Some(network),
        Err(reason) => {
            println!("SKIP: {reason}");
            None
        }
    }
}

fn start(network: &UserNetwork, plan: &LaunchPlan, process: &ProcessHandle) -> Helper {
    let started = network.start(plan, 61_004, process, None, 0).unwrap();
    started.unwrap()
}

/// Runs a command in the namespace, where the bridge itself has the guest's address.
fn inside(process: &ProcessHandle, command: &str) -> Command {
    let mut nsenter = Command::new("nsenter");
    nsenter
        .args(["--net", "--target", &process.identity().pid.to_string()])
        .args(["sh", "-ec", command]);
    nsenter
}

fn become_guest(process: &ProcessHandle) {
    let script = format!("ip addr add {GUEST}/24 dev {BRIDGE}; ip route add default via 10.0.2.2");
    assert!(inside(process, &script).status().unwrap().success());
}

fn free_port() -> PortMapping {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    PortMapping {
        host_address: Ipv4Addr::LOCALHOST,
        host_port: listener.local_addr().unwrap().port(),
        guest_port: 7,
        protocol: Protocol::Tcp,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_published_port_leads_in_a_guest_gets_out_and_nothing_outlives_the_monitor() {
    let Some(network) = network().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let process = stand_in();
    let port = free_port();
    let plan = plan(dir.path(), vec![port.clone()]);
    let begin = std::time::Instant::now();
    let helper = start(&network, &plan, &process);
    let started = begin.elapsed();
    let published = helper.publish(dir.path(), &plan.nic.as_ref().unwrap().ports);
    published.await.unwrap();
    println!(
        "started after {started:?}, published after {:?}",
        begin.elapsed()
    );
    become_guest(&process);
    let mut server = inside(&process, "exec busybox nc -l -p 7 -e cat")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let at = ("127.0.0.1", port.host_port);
    let mut answer = [0; 4];
    let begin = std::time::Instant::now();
    // It takes connections before the guest listens, and ends them then.
    loop {
        let mut stream = tokio::net::TcpStream::connect(at).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        if stream.read_exact(&mut answer).await.is_ok() {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "no answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(&answer, b"ping");
    server.kill().unwrap();
    server.wait().unwrap();
    // The host's own loopback is not the guest's to reach.
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = held.local_addr().unwrap().port();
    let dial = format!("timeout 3 busybox nc 10.0.2.2 {number} </dev/null");
    assert!(!inside(&process, &dial).status().unwrap().success());
    // But what others reach the host by is, as anything else that the host can reach.
    match address_of_host() {
        None => println!("nothing outside was tried: this host has no address"),
        Some(address) => {
            let outside = std::net::TcpListener::bind((address, 0)).unwrap();
            let number = outside.local_addr().unwrap().port();
            let dial = format!("echo out | timeout 5 busybox nc {address} {number}");
            let mut dialling = inside(&process, &dial).spawn().unwrap();
            let (mut stream, _) = outside.accept().unwrap();
            let mut said = [0; 3];
            std::io::Read::read_exact(&mut stream, &mut said).unwrap();
            assert_eq!(&said, b"out");
            drop(stream);
            dialling.wait().unwrap();
        }
    }
    // What it may still do, and see.
    let pid = helper.process.identity().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in [
        "CapEff:\t0000000000000400",
        "CapBnd:\t0000000000000400",
        "Seccomp:\t2",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    let mut seen: Vec<_> = walk(Path::new(&format!("/proc/{pid}/root")));
    seen.sort();
    assert_eq!(seen, ["etc", "etc/resolv.conf", "run"]);
    // The monitor's end is the helper's, with nobody's help, and the port is free at once.
    process.kill().unwrap();
    process.wait().await.unwrap();
    assert_eq!(facts::start_ticks(pid), None);
    std::net::TcpListener::bind(at).unwrap();
    remove(dir.path());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// An address of this host that is no loopback's, as far as it has a way out.
fn address_of_host() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: the system only says from where it would be.
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn walk(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            found.push(path.strip_prefix(root).unwrap().display().to_string());
            if path.is_dir() {
                todo.push(path);
            }
        }
    }
    found
}

/// Whether somebody in the namespace reaches this listener at this address.
fn reaches(process: &ProcessHandle, address: &str, listener: &std::net::TcpListener) -> bool {
    let port = listener.local_addr().unwrap().port();
    let dial = format!("echo in | timeout 2 busybox nc {address} {port}");
    inside(process, &dial).status().unwrap();
    listener.set_nonblocking(true).unwrap();
    match listener.accept() {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            false
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_in_a_guest_does_not_reach_the_hosts_loopback_whatever_it_sends() {
    let Some(network) = network().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let process = stand_in();
    let plan = plan(dir.path(), vec![free_port()]);
    let helper = start(&network, &plan, &process);
    let ports = &plan.nic.as_ref().unwrap().ports;
    helper.publish(dir.path(), ports).await.unwrap();
    // A host whose name server is its own: 10.0.2.3 leads to it, but to no other port there.
    let resolver = dir.path().join(DIR).join(RESOLVER_DIR).join(resolver::NAME);
    std::fs::write(resolver, "nameserver 127.0.0.1\n").unwrap();
    become_guest(&process);
    // What a guest's root can do to its own kernel, to have it send what no kernel sends by itself.
    let script = format!(
        "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet; ip route add 127.0.0.0/8 via 10.0.2.2 src {GUEST}"
    );
    assert!(inside(&process, &script).status().unwrap().success());
    let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let any = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    for address in ["127.0.0.1", "10.0.2.2", "10.0.2.3"] {
        assert!(!reaches(&process, address, &own), "{address}");
    }
    assert!(!reaches(&process, "127.9.9.9", &any));
    // There is no IPv6 at all: neither an address of the guest's, nor anybody who would answer.
    let pid = process.identity().pid;
    let addresses = std::fs::read_to_string(format!("/proc/{pid}/net/if_inet6"));
    assert_eq!(addresses.unwrap_or_default(), "");
    process.kill().unwrap();
    process.wait().await.unwrap();
    // It is the filter that holds: with a tap that has none, the helper connects to the host's 127.0.0.1.
    let process = stand_in();
    let namespace = NetworkNamespace::of(&process).unwrap();
    let open = taps(61_004, &network.filter).map(|tap| Tap {
        filter: None,
        ..tap
    });
    namespace.make_joined_taps(BRIDGE, &open).unwrap();
    let mut unfenced = Command::new(&network.program)
        .args(["--disable-host-loopback", "--ready-fd=1"])
        .args([&process.identity().pid.to_string(), HELPERS_TAP])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut ready = [0];
    let mut said = unfenced.stdout.take().unwrap();
    std::io::Read::read_exact(&mut said, &mut ready).unwrap();
    become_guest(&process);
    assert!(inside(&process, &script).status().unwrap().success());
    assert!(reaches(&process, "127.0.0.1", &own));
    assert!(reaches(&process, "127.9.9.9", &any));
    unfenced.kill().unwrap();
    unfenced.wait().unwrap();
    process.kill().unwrap();
    process.wait().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_port_is_named_and_a_helper_that_cannot_work_says_why() {
    let Some(network) = network().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let process = stand_in();
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = PortMapping {
        host_port: held.local_addr().unwrap().port(),
        ..free_port()
    };
    let plan = plan(dir.path(), vec![free_port(), taken.clone()]);
    let helper = start(&network, &plan, &process);
    let ports = &plan.nic.as_ref().unwrap().ports;
    match helper.publish(dir.path(), ports).await {
        Err(NetworkFailure::Port(port)) => assert_eq!(port, taken),
        other => panic!("{other:?}"),
    }
    process.kill().unwrap();
    process.wait().await.unwrap();
    // Another program in its place ends at once, or does not understand.
    let odd = UserNetwork {
        program: "/bin/false".into(),
        ..network
    };
    let process = stand_in();
    let helper = start(&odd, &plan, &process);
    match helper.publish(&dir.path().join("nowhere"), ports).await {
        Err(NetworkFailure::Other(message)) => assert!(message.contains("ended"), "{message}"),
        other => panic!("{other:?}"),
    }
    process.kill().unwrap();
    process.wait().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_to_be_captured_has_the_device_and_no_helper() {
    let Some(network) = network().await else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let process = stand_in();
    let mut plan = plan(dir.path(), vec![]);
    plan.capturable = true;
    let started = network.start(&plan, 61_004, &process, None, 0).unwrap();
    assert!(started.is_none());
    let devices = format!("/proc/{}/net/dev", process.identity().pid);
    assert!(std::fs::read_to_string(devices).unwrap().contains(TAP));
    process.kill().unwrap();
    process.wait().await.unwrap();
}

#[test]
fn new_name_servers_of_the_host_reach_a_running_machine() {
    let dir = tempfile::tempdir().unwrap();
    make_dir(dir.path()).unwrap();
    let path = dir.path().join(DIR).join(RESOLVER_DIR).join(resolver::NAME);
    std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
    keep_resolver(dir.path());
    let of_host = std::fs::read("/etc/resolv.conf").unwrap_or_default();
    assert_eq!(std::fs::read(&path).unwrap(), of_host);
}
