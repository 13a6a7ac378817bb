//! From a plan to Firecracker's settings. Pure, so that it is tested as text.
//!
//! Every file is named as it lies in Firecracker's own directory (see `stage.rs`), which is its root where it is jailed and
//! its working directory where it is not: names are the same in both, and in every fork of a captured machine.

use super::types::{
    Balloon, BootSource, Drive, Entropy, MachineConfig, RateLimiter, Serial, SnapshotLoad,
    TokenBucket, Vsock,
};
use super::types::{MemoryBackend, NetworkInterface};
use super::version::Version;
use crate::{CaptureInfo, LaunchPlan, LinuxBoot, Start};
use serde::Serialize;
use serde_json::{Value, json};
use vistara_model::Rates;

/// Port on which the agent in a guest listens.
pub(super) const AGENT_PORT: u32 = 1024;
/// The guest's address on its vsock. Each Firecracker has sockets of its own, so all guests may have the same.
const GUEST_CID: u32 = 3;

/// Names in Firecracker's directory.
pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRAMFS: &str = "initramfs";
pub(super) const CHANNEL_SOCKET: &str = "agent.sock";
pub(super) const SNAPSHOT_STATE: &str = "state";
pub(super) const SNAPSHOT_MEMORY: &str = "memory";
/// What a machine that goes on is captured to. A fork has files of the names above already.
pub(super) const TAKEN_STATE: &str = "taken.state";
pub(super) const TAKEN_MEMORY: &str = "taken.memory";
/// Where a fork finds the captured memory: its standard input.
pub(super) const INHERITED_MEMORY: &str = "proc/self/fd/0";

/// Firecracker's name for the network interface.
const NIC: &str = "net0";

/// How often the guest's balloon reports, in seconds: a report wakes the guest, and nobody asks more often.
const BALLOON_REPORT_S: u32 = 10;

/// Bytes that a guest may write to its serial console at once, and in how many milliseconds as many again. A panic takes
/// some 3 KiB; what an idle node would let a guest write in a day stays below 7 MiB.
const CONSOLE_BURST: TokenBucket = TokenBucket {
    size: 256 << 10,
    refill_time: 3_600_000,
    one_time_burst: None,
};

/// Words for every Linux guest in Firecracker: there is one serial port, no PCI, and of the keyboard controller only the
/// line that resets the machine, so that the kernel need not look for more. That line is how a reboot shall end the machine:
/// a triple fault, which is what our payloads ask for elsewhere, is an error to Firecracker.
const DEVICE_WORDS: &str =
    "reboot=k console=ttyS0 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd pci=off";

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Setting {
    pub(super) path: String,
    pub(super) body: Value,
}

/// The name of a disk of the plan in Firecracker's directory.
pub(super) fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// So much in a second, of which a tenth may come at once, as QEMU has it.
fn bucket(per_s: u64) -> TokenBucket {
    // At least one, and then so seldom that the rate is what was asked for.
    let size = (per_s / 10).max(1);
    TokenBucket {
        size,
        refill_time: size.saturating_mul(1000).div_ceil(per_s.max(1)),
        one_time_burst: None,
    }
}

fn disk_limiter(rates: &Rates) -> Option<RateLimiter> {
    rates.of_disks().then(|| RateLimiter {
        bandwidth: rates.disk_per_s.map(|bytes| bucket(bytes.0)),
        ops: rates.disk_ops_per_s.map(|ops| bucket(ops.into())),
    })
}

fn network_limiter(rates: &Rates) -> Option<RateLimiter> {
    rates.network_per_s.map(|bytes| RateLimiter {
        bandwidth: Some(bucket(bytes.0)),
        ops: None,
    })
}

/// No bound at all, in a request that changes a device that may have one: where nothing is said there, all stays as it was.
const UNBOUNDED: TokenBucket = TokenBucket {
    size: 0,
    refill_time: 0,
    one_time_burst: None,
};

/// Of both kinds what there is to be, also where that is nothing.
fn whole(limiter: Option<RateLimiter>) -> RateLimiter {
    let (bandwidth, ops) = limiter.map_or((None, None), |limiter| (limiter.bandwidth, limiter.ops));
    RateLimiter {
        bandwidth: Some(bandwidth.unwrap_or(UNBOUNDED)),
        ops: Some(ops.unwrap_or(UNBOUNDED)),
    }
}

/// What a fork of this capture is told of its bounds before it runs: nothing where neither has any.
pub(super) fn bounds_of_fork(plan: &LaunchPlan, captured: &CaptureInfo) -> Vec<Setting> {
    match captured.without_bounds && plan.rates == Rates::default() {
        true => Vec::new(),
        false => bounds(plan),
    }
}

/// The bounds of a fork, made before it runs. A snapshot has the captured machine's with its devices, so that each is told anew,
/// and taken away where the fork has none.
fn bounds(plan: &LaunchPlan) -> Vec<Setting> {
    let mut bounds = Vec::new();
    let limiter = whole(disk_limiter(&plan.rates));
    for index in 0..plan.disks.len() {
        let name = disk_name(index);
        bounds.push(Setting {
            path: format!("/drives/{name}"),
            body: json!({"drive_id": name, "rate_limiter": limiter}),
        });
    }
    if plan.nic.is_some() {
        let limiter = whole(network_limiter(&plan.rates));
        bounds.push(Setting {
            path: format!("/network-interfaces/{NIC}"),
            body: json!({"iface_id": NIC, "rx_rate_limiter": limiter, "tx_rate_limiter": limiter}),
        });
    }
    bounds
}

/// What a fork loads; it is let go on by that, or afterwards.
pub(super) fn load(resume_vm: bool) -> SnapshotLoad {
    SnapshotLoad {
        snapshot_path: SNAPSHOT_STATE.to_owned(),
        mem_backend: MemoryBackend {
            backend_type: "File",
            backend_path: INHERITED_MEMORY.to_owned(),
        },
        resume_vm,
    }
}

/// The settings of a machine that boots, in the order in which they are made; `tap` is the plan's network interface in the
/// monitor's network namespace, where it has one.
pub(super) fn settings(
    plan: &LaunchPlan,
    version: Version,
    tap: Option<&str>,
    cpu_template: Option<&Value>,
) -> Result<Vec<Setting>, serde_json::Error> {
    let mut settings = Vec::new();
    let mut set = |path: &str, body: &dyn erased::Body| -> Result<(), serde_json::Error> {
        settings.push(Setting {
            path: path.to_owned(),
            body: body.value()?,
        });
        Ok(())
    };
    set(
        "/machine-config",
        &MachineConfig {
            vcpu_count: plan.vcpus,
            mem_size_mib: plan.memory.to_mib_ceil(),
            smt: false,
            track_dirty_pages: false,
            huge_pages: plan.huge_pages.then_some("2M"),
        },
    )?;
    if let Some(template) = cpu_template {
        set("/cpu-config", template)?;
    }
    let linux = match &plan.start {
        Start::Linux(boot) => Some(boot),
        Start::Nanos(_) | Start::Fork(_) => None,
    };
    set(
        "/boot-source",
        &BootSource {
            kernel_image_path: KERNEL.to_owned(),
            initrd_path: linux.map(|_| INITRAMFS.to_owned()),
            boot_args: linux.map_or_else(|| "console=ttyS0".to_owned(), kernel_command_line),
        },
    )?;
    for (index, disk) in plan.disks.iter().enumerate() {
        let name = disk_name(index);
        set(
            &format!("/drives/{name}"),
            &Drive {
                drive_id: name.clone(),
                path_on_host: name,
                // Which disk is the root is told by our own words on the command line.
                is_root_device: false,
                is_read_only: disk.read_only,
                // A writable disk lives as long as its machine: after a crash of the host nobody reads it.
                cache_type: "Unsafe",
                io_engine: "Sync",
                rate_limiter: disk_limiter(&plan.rates),
            },
        )?;
    }
    if let (Some(nic), Some(tap)) = (&plan.nic, tap) {
        let mac: Vec<String> = nic.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        set(
            &format!("/network-interfaces/{NIC}"),
            &NetworkInterface {
                iface_id: NIC.to_owned(),
                host_dev_name: tap.to_owned(),
                guest_mac: mac.join(":"),
                rx_rate_limiter: network_limiter(&plan.rates),
                tx_rate_limiter: network_limiter(&plan.rates),
            },
        )?;
    }
    if linux.is_some() {
        set(
            "/vsock",
            &Vsock {
                guest_cid: GUEST_CID,
                uds_path: CHANNEL_SOCKET.to_owned(),
            },
        )?;
        set(
            "/balloon",
            &Balloon {
                amount_mib: 0,
                deflate_on_oom: true,
                stats_polling_interval_s: BALLOON_REPORT_S,
            },
        )?;
        if version.limits_serial() {
            set(
                "/serial",
                &Serial {
                    rate_limiter: CONSOLE_BURST,
                },
            )?;
        }
    }
    set("/entropy", &Entropy { rate_limiter: None })?;
    Ok(settings)
}

fn kernel_command_line(boot: &LinuxBoot) -> String {
    // Of words of one kind the agent takes the last.
    format!(
        "{} {DEVICE_WORDS} vistara.channel=vsock:{AGENT_PORT}",
        boot.cmdline
    )
}

/// Bodies of different types in one list.
mod erased {
    use super::{Serialize, Value};

    pub(super) trait Body {
        fn value(&self) -> Result<Value, serde_json::Error>;
    }

    impl<T: Serialize> Body for T {
        fn value(&self) -> Result<Value, serde_json::Error> {
            serde_json::to_value(self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disk, Fence, NanosBoot};
    use vistara_model::{Accelerator, Bytes, MachineId, VmmKind};

    fn plan() -> LaunchPlan {
        LaunchPlan {
            id: MachineId::from_random([1; 16]),
            dir: "/d".into(),
            accelerator: Accelerator::Kvm,
            vcpus: 2,
            memory: Bytes::mib(256),
            start: Start::Linux(LinuxBoot {
                kernel: "/secret/k".into(),
                initramfs: "/secret/i".into(),
                cmdline: "quiet vistara.channel=virtio-serial".to_owned(),
            }),
            huge_pages: false,
            capturable: false,
            disks: vec![
                Disk {
                    path: "/secret/a".into(),
                    read_only: true,
                },
                Disk {
                    path: "/secret/b".into(),
                    read_only: false,
                },
            ],
            nic: None,
            shares: vec![],
            rates: Rates::default(),
            fence: Fence {
                uid_gid: None,
                memory_max: Bytes::mib(512),
                pids_max: 100,
                cpu_millis: None,
            },
        }
    }

    fn find<'a>(settings: &'a [Setting], path: &str) -> Option<&'a Value> {
        let found = settings.iter().find(|setting| setting.path == path);
        found.map(|setting| &setting.body)
    }

    #[test]
    fn a_linux_machine_is_told_in_order_and_without_a_path_of_the_host() {
        let settings = settings(&plan(), Version::NEWEST_TRIED, None, None).unwrap();
        let text = format!("{settings:?}");
        assert!(!text.contains("secret"), "{text}");
        assert!(!text.contains("mmds"), "no metadata service: {text}");
        let at = |path: &str| settings.iter().position(|one| one.path == path).unwrap();
        assert!(at("/drives/disk0") < at("/drives/disk1"), "in their order");
        let words = find(&settings, "/boot-source").unwrap()["boot_args"].clone();
        let words = words.as_str().unwrap();
        assert!(words.ends_with("vistara.channel=vsock:1024"), "{words}");
        let second = find(&settings, "/drives/disk1").unwrap();
        assert_eq!(second["is_read_only"], false);
        assert_eq!(second.get("rate_limiter"), None, "not even null");
    }

    #[test]
    fn bounds_are_the_disks_and_the_networks_own_also_in_a_fork() {
        let mut plan = plan();
        plan.nic = Some(crate::Nic {
            ports: vec![],
            mac: [2; 6],
        });
        // A captured machine may have had some: they are taken away, and not left as they were.
        let none = json!({"size": 0, "refill_time": 0});
        let forks = bounds(&plan);
        for (path, ways) in [
            ("/drives/disk0", &["rate_limiter"][..]),
            ("/drives/disk1", &["rate_limiter"]),
            (
                "/network-interfaces/net0",
                &["rx_rate_limiter", "tx_rate_limiter"],
            ),
        ] {
            for way in ways {
                let limiter = &find(&forks, path).unwrap()[way];
                assert_eq!(*limiter, json!({"bandwidth": none, "ops": none}), "{path}");
            }
        }
        plan.rates = Rates {
            disk_per_s: Some(Bytes::mib(10)),
            disk_ops_per_s: Some(55),
            network_per_s: Some(Bytes(1_000_000)),
        };
        let made = settings(&plan, Version::NEWEST_TRIED, Some("tap"), None).unwrap();
        let forks = bounds(&plan);
        assert_eq!(forks.len(), 3);
        for (settings, in_fork) in [(&made, false), (&forks, true)] {
            for name in ["disk0", "disk1"] {
                let limiter = &find(settings, &format!("/drives/{name}")).unwrap()["rate_limiter"];
                assert_eq!(
                    limiter["bandwidth"],
                    json!({"size": 1_048_576, "refill_time": 100})
                );
                assert_eq!(limiter["ops"], json!({"size": 5, "refill_time": 91}));
            }
            let nic = find(settings, "/network-interfaces/net0").unwrap();
            for way in ["rx_rate_limiter", "tx_rate_limiter"] {
                assert_eq!(
                    nic[way]["bandwidth"],
                    json!({"size": 100_000, "refill_time": 100})
                );
                assert_eq!(nic[way].get("ops"), in_fork.then_some(&none));
            }
        }
    }

    #[test]
    fn a_fork_is_told_of_bounds_unless_it_is_known_that_there_never_were_any() {
        let mut plan = plan();
        let mut captured = CaptureInfo {
            kind: VmmKind::Firecracker,
            version: "1.16.1".to_owned(),
            accelerator: plan.accelerator,
            cpu: String::new(),
            counter_khz: None,
            vcpus: plan.vcpus,
            memory: plan.memory,
            disks: vec![],
            nic: false,
            without_bounds: true,
        };
        assert_eq!(bounds_of_fork(&plan, &captured), []);
        captured.without_bounds = false;
        assert_eq!(bounds_of_fork(&plan, &captured), bounds(&plan));
        captured.without_bounds = true;
        plan.rates.disk_ops_per_s = Some(55);
        assert_eq!(bounds_of_fork(&plan, &captured), bounds(&plan));
        // One that an earlier version of this program wrote says nothing of it.
        let mut words = serde_json::to_value(&captured).unwrap();
        words.as_object_mut().unwrap().remove("without_bounds");
        let before: CaptureInfo = serde_json::from_value(words).unwrap();
        assert!(!before.without_bounds);
    }

    #[test]
    fn an_older_version_hears_nothing_new() {
        let old = Version::parse("Firecracker v1.8.0").unwrap();
        let settings = settings(&plan(), old, None, None).unwrap();
        assert_eq!(find(&settings, "/serial"), None);
    }

    #[test]
    fn a_unikernel_has_neither_channel_nor_balloon_and_its_output_is_not_limited() {
        let mut plan = plan();
        plan.start = Start::Nanos(NanosBoot {
            kernel: "/k".into(),
        });
        let settings = settings(&plan, Version::NEWEST_TRIED, None, None).unwrap();
        for path in ["/vsock", "/balloon", "/serial"] {
            assert_eq!(find(&settings, path), None, "{path}");
        }
        assert_eq!(
            find(&settings, "/boot-source").unwrap().get("initrd_path"),
            None
        );
    }
}
