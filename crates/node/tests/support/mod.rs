//! A real node in this process, whose machines are fake: their guests are the real agent, running plain host processes.

// Helpers of tests: a failure here is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use futures_util::StreamExt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vistara_api::client::StreamItem;
use vistara_api::stream::StreamEvent;
use vistara_api::{AttachRequest, Client, ImageEvent, Machine, RunRequest};
use vistara_guest_agent::Channel;
use vistara_machine::fake::{FakeEnd, FakeGuest, FakeVmm};
use vistara_node::{NodeOptions, Vmms};

/// Longest that anything here may take on a busy machine.
pub(crate) const BOUND: Duration = Duration::from_secs(60);

fn splice(mut from: impl Read + Send + 'static, mut to: std::os::unix::net::UnixStream) {
    std::thread::spawn(move || {
        let mut buffer = [0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
}

/// The real agent as the guest of a fake machine.
pub(crate) fn guest(guest: &FakeGuest) -> FakeEnd {
    let (connector, channel) = Channel::in_process().unwrap();
    let agent = std::thread::spawn(move || vistara_guest_agent::serve(channel, Default::default()));
    while let Some(host) = guest.next_channel() {
        let Ok(ours) = connector.connect() else { break };
        splice(host.try_clone().unwrap(), ours.try_clone().unwrap());
        splice(ours, host);
    }
    drop(connector);
    agent.join().unwrap().unwrap();
    FakeEnd::Off
}

pub(crate) fn fake() -> Arc<FakeVmm> {
    Arc::new(FakeVmm::new(Arc::new(guest)))
}

/// A running node and its client.
pub(crate) struct TestNode {
    runtime: Option<tokio::runtime::Runtime>,
    pub(crate) client: Client,
    pub(crate) dir: PathBuf,
}

impl TestNode {
    pub(crate) async fn start(dir: &Path, vmm: Arc<FakeVmm>) -> TestNode {
        TestNode::start_with(dir, vmm, |_| {}).await
    }

    pub(crate) async fn start_with(
        dir: &Path,
        vmm: Arc<FakeVmm>,
        change: impl FnOnce(&mut NodeOptions),
    ) -> TestNode {
        let mut options = NodeOptions {
            state_dir: dir.join("state"),
            socket: dir.join("node.sock"),
            idle_exit: None,
            version: "test".to_owned(),
            vmms: Vmms::Given(vmm),
            qemu: None,
            virtiofsd: None,
            firecracker: None,
            jailer: None,
            slirp4netns: None,
            cpu_template: None,
            boot_bound: Duration::from_secs(30),
            template_limits: None,
            // Fake machines are threads of this process, and so are their guards.
            guard: None,
            // No stock where a test does not ask for it: machines are counted.
            warm_memory: Some(vistara_model::Bytes(0)),
        };
        change(&mut options);
        let client = Client::new(options.socket.clone());
        // A runtime of its own, so that the node can be made to vanish with all its tasks in one moment.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(async move { vistara_node::run(options).await.unwrap() });
        let node = TestNode {
            runtime: Some(runtime),
            client,
            dir: dir.to_owned(),
        };
        node.answers().await;
        node
    }

    pub(crate) async fn answers(&self) {
        let asked = async {
            while self.client.version().await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(BOUND, asked)
            .await
            .expect("the node answers");
    }

    /// As `kill -9` would: no task of the node runs any further, nothing is said goodbye to.
    pub(crate) fn vanish(mut self) {
        let lock = self.dir.join("state/lock");
        let runtime = self.runtime.take().unwrap();
        // A killed process is gone at once, with its sockets; a runtime's tasks go one after the other.
        let gone = std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5)));
        gone.join().unwrap();
        let deadline = std::time::Instant::now() + BOUND;
        while std::fs::File::open(&lock).unwrap().try_lock().is_err() {
            assert!(
                std::time::Instant::now() < deadline,
                "the node does not vanish"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// An image whose only content is an empty `/etc/passwd`: fake machines run the host's programs.
    pub(crate) async fn image(&self, name: &str) {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_mode(0o644);
        tar.append_data(&mut header, "etc/passwd", std::io::empty())
            .unwrap();
        let bytes = std::io::Cursor::new(tar.into_inner().unwrap());
        let mut events = self.client.import(Some(name), bytes).await.unwrap();
        let mut last = None;
        while let Some(event) = events.next().await {
            last = Some(event.unwrap());
        }
        assert!(matches!(last, Some(ImageEvent::Done { .. })), "{last:?}");
    }

    pub(crate) async fn run(&self, command: &[&str]) -> Machine {
        self.client.run(&request(command)).await.unwrap()
    }

    /// Attaches from the start and gives stdout, stderr and the last event.
    pub(crate) async fn follow(&self, machine: &str) -> (Vec<u8>, Vec<u8>, StreamEvent) {
        let request = AttachRequest {
            from_start: true,
            stdin: false,
            ..Default::default()
        };
        let mut streams = self.client.attach(machine, &request).await.unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let read = async {
            loop {
                match streams.output.next().await.unwrap() {
                    Some(StreamItem::Stdout(bytes)) => out.extend_from_slice(&bytes),
                    Some(StreamItem::Stderr(bytes)) => err.extend_from_slice(&bytes),
                    Some(StreamItem::Event(
                        event @ (StreamEvent::Exited { .. } | StreamEvent::Failed { .. }),
                    )) => {
                        return event;
                    }
                    Some(StreamItem::Event(
                        StreamEvent::Started { .. }
                        | StreamEvent::Notice { .. }
                        | StreamEvent::Receipt { .. },
                    )) => {}
                    None => panic!("the stream ended without saying how the program did"),
                }
            }
        };
        let event = tokio::time::timeout(BOUND, read)
            .await
            .expect("the program ends");
        (out, err, event)
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(crate) fn request(command: &[&str]) -> RunRequest {
    RunRequest {
        image: "test".to_owned(),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        memory: Some("128m".to_owned()),
        disk: Some("64m".to_owned()),
        ..RunRequest::default()
    }
}

/// Whether the tools that make disks are here; says so where not.
pub(crate) fn can_make_disks() -> bool {
    for program in ["mksquashfs", "mkfs.ext4"] {
        let dirs = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
        if !dirs.iter().any(|dir| Path::new(dir).join(program).exists()) {
            println!("SKIP: {program} is not installed");
            return false;
        }
    }
    true
}
