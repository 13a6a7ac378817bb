//! The network of a machine, and the bound on it.

use super::*;

fn port(host_port: u16, guest_port: u16) -> PortMapping {
    PortMapping {
        host_address: std::net::Ipv4Addr::LOCALHOST,
        host_port,
        guest_port,
        protocol: Protocol::Tcp,
    }
}

/// Whether machines have a network here; said on stdout where not.
async fn networked() -> Option<Arc<dyn Vmm>> {
    let vmm = Firecracker.vmm().await?;
    if let Err(reason) = &vmm.capabilities().user_network {
        println!("SKIP: machines have no network here: {reason}");
        return None;
    }
    Some(vmm)
}

const ADDRESS: &str = "ifconfig eth0 10.0.2.15 up; route add default gw 10.0.2.2";

/// What comes back on a connection to a port of the host, made until something does: it is accepted before the guest listens.
async fn echoed(number: u16, text: &[u8]) -> Vec<u8> {
    let answer = async {
        loop {
            let dialled = tokio::net::TcpStream::connect(("127.0.0.1", number)).await;
            let mut stream = dialled.unwrap();
            stream.write_all(text).await.unwrap();
            let mut answer = vec![0; text.len()];
            if stream.read_exact(&mut answer).await.is_ok() {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("an answer by the network", answer).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_published_port_leads_into_the_guest_and_a_taken_one_is_named() {
    let Some(vmm) = networked().await else { return };
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = held.local_addr().unwrap().port();
    let dir = tempfile::tempdir().unwrap();
    let mut plan = Firecracker.plan(dir.path());
    plan.nic = Some(nic(vec![port(number, 7)]));
    match soon("launching", vmm.launch(&plan)).await {
        Err(VmmError::PortTaken(taken)) => assert_eq!(taken, port(number, 7)),
        other => panic!("{:?}", other.err()),
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    drop(held);
    let mut machine = run(|plan| plan.nic = Some(nic(vec![port(number, 7)])))
        .await
        .unwrap();
    machine.load_drivers().await;
    machine
        .sh(&format!("{ADDRESS}; nc -ll -p 7 -e cat >/dev/null 2>&1 &"))
        .await;
    assert_eq!(echoed(number, b"ping").await, b"ping");
    let mac = machine.sh("cat /sys/class/net/eth0/address").await;
    assert_eq!(mac, "52:54:00:00:00:07");
    // Another process takes the machine over: its network has gone on.
    let record = machine.vm.record().clone();
    let record: VmRecord = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
    drop((machine.vm, machine.lines));
    let adopted = soon("adopting", vmm.adopt(machine.dir.path(), &record)).await;
    let Adoption::Running(vm) = adopted.unwrap() else {
        panic!("it runs");
    };
    assert_eq!(echoed(number, b"pong").await, b"pong");
    assert_eq!(vm.trouble(), None);
    let helper = helper(&record);
    assert!(facts::start_ticks(helper).is_some());
    soon("killing", vm.kill()).await.unwrap();
    assert_eq!(facts::start_ticks(helper), None);
    assert_eq!(left_of(&record), [] as [&str; 0]);
    assert!(!machine.dir.path().join("network").exists());
    std::net::TcpListener::bind(("127.0.0.1", number)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_reaches_what_the_host_reaches_but_not_its_loopback() {
    if networked().await.is_none() {
        return;
    }
    // An address of the host that is no loopback's, whatever network it has.
    let ip = |words: &[&str]| {
        let run = Command::new("ip").args(words).output();
        run.is_ok_and(|output| output.status.success())
    };
    let name = format!("vst{}", std::process::id());
    let made = ip(&["link", "add", &name, "type", "dummy"])
        && ip(&["addr", "add", "198.51.100.77/32", "dev", &name])
        && ip(&["link", "set", &name, "up"]);
    if !made {
        ip(&["link", "del", &name]);
        return println!("SKIP: this host can have no further address");
    }
    let tested = async {
        let outside = std::net::TcpListener::bind("198.51.100.77:0").unwrap();
        let inner = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut machine = run(|plan| plan.nic = Some(nic(vec![]))).await.unwrap();
        machine.load_drivers().await;
        machine.sh(ADDRESS).await;
        let number = inner.local_addr().unwrap().port();
        let dial = format!("nc -w 3 10.0.2.2 {number} </dev/null && echo INSIDE");
        let said = machine.sh(&dial).await;
        assert!(!said.contains("INSIDE"), "{said}");
        let number = outside.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = outside.accept().unwrap();
            std::io::Write::write_all(&mut stream, b"from outside").unwrap();
        });
        let dial = format!("nc -w 10 198.51.100.77 {number} </dev/null");
        assert_eq!(machine.sh(&dial).await, "from outside");
        machine.end_of(&Firecracker).await;
    };
    let done = tokio::time::timeout(2 * limit(), tested).await;
    assert!(ip(&["link", "del", &name]));
    done.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_whose_helper_dies_is_told_and_the_machine_goes_on() {
    if networked().await.is_none() {
        return;
    }
    let mut machine = run(|plan| plan.nic = Some(nic(vec![]))).await.unwrap();
    assert_eq!(machine.vm.trouble(), None);
    signal(helper(machine.vm.record()), "-9");
    let told = async {
        loop {
            if let Some(trouble) = machine.vm.trouble() {
                return trouble;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let trouble = soon("telling", told).await;
    assert!(trouble.contains("network"), "{trouble}");
    machine.lines.echo("still here").await;
    machine.end_of(&Firecracker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forks_have_a_network_each() {
    let Some(vmm) = networked().await else { return };
    let mut machine = run(|plan| {
        plan.capturable = true;
        plan.nic = Some(nic(vec![]));
    })
    .await
    .unwrap();
    machine.load_drivers().await;
    machine
        .sh(&format!("{ADDRESS}; nc -ll -p 7 -e cat >/dev/null 2>&1 &"))
        .await;
    drop(machine.lines);
    let capture = Arc::new(soon("capturing", machine.vm.capture()).await.unwrap());
    let mut forks = Vec::new();
    for _ in 0..2 {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = free.local_addr().unwrap().port();
        drop(free);
        let dir = tempfile::tempdir().unwrap();
        let mut plan = Firecracker.plan(dir.path());
        plan.nic = Some(nic(vec![port(number, 7)]));
        plan.start = Start::Fork(Arc::clone(&capture));
        let begin = Instant::now();
        let vm = launch(&*vmm, &plan).await;
        println!("fork: launch call {:?}", begin.elapsed());
        forks.push((vm, number, dir));
    }
    for (_, number, _) in &forks {
        let word = format!("to {number}");
        assert_eq!(echoed(*number, word.as_bytes()).await, word.as_bytes());
    }
    for (vm, _, _) in &forks {
        soon("killing", vm.kill()).await.unwrap();
        assert_eq!(left_of(vm.record()), [] as [&str; 0]);
    }
}

/// How long 400,000 bytes take out of a machine whose network has this rate.
async fn fetching(rate: Option<Bytes>) -> Duration {
    let number = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let mut machine = run(|plan| {
        plan.nic = Some(nic(vec![port(number, 7)]));
        plan.rates.network_per_s = rate;
    })
    .await
    .unwrap();
    machine.load_drivers().await;
    machine
        .sh(&format!(
            "{ADDRESS}; nc -ll -p 7 -e head -c 400000 /dev/zero >/dev/null 2>&1 &"
        ))
        .await;
    let fetched = async {
        loop {
            let begin = Instant::now();
            let dialled = tokio::net::TcpStream::connect(("127.0.0.1", number)).await;
            let mut text = Vec::new();
            // It is accepted before the guest listens.
            if dialled.unwrap().read_to_end(&mut text).await.is_ok() && text.len() == 400_000 {
                return begin.elapsed();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let took = soon("fetching", fetched).await;
    machine.end_of(&Firecracker).await;
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_networks_rate_holds() {
    if networked().await.is_none() {
        return;
    }
    let free = fetching(None).await;
    let (rate, least) = slower(400_000, free);
    let rate = Bytes(rate);
    let bounded = fetching(Some(rate)).await;
    println!("free {free:?}, at {rate} a second {bounded:?}, at least {least:?}");
    assert!(bounded > least, "{bounded:?}");
}
