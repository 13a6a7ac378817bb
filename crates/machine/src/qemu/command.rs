//! QEMU's command line: from a plan and the descriptors that go with it to arguments. Pure, so that it is tested as text.
//!
//! Every option stands here with its reason. `docs/internals/qemu.md` has the measurements.

use crate::{LaunchPlan, LinuxBoot, Nic, Start};
use serde_json::{Value, json};
use std::ffi::OsString;
use vistara_model::{Accelerator, PortMapping, Protocol, Rates};

/// Bytes of console output that QEMU keeps: the last words of a panic take about 3 KiB. A power of two.
pub(super) const CONSOLE_RING: usize = 64 << 10;

/// Name of the ring among QEMU's character devices.
pub(super) const CONSOLE: &str = "console";

/// The guest's name for the agent's channel (`/sys/class/virtio-ports/*/name`).
pub(super) const CHANNEL_NAME: &str = "vistara.agent";

/// Translated code kept by TCG, in MiB. QEMU would take up to 1 GiB; a Linux boot and a busy program stay below this, and
/// what goes beyond is translated again.
pub(super) const TRANSLATION_CACHE_MIB: u32 = 128;

/// Descriptors that QEMU inherits, by number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Handles {
    /// Listening socket of the machine protocol.
    pub(super) qmp: i32,
    /// Listening socket of the agent's channel, where there is an agent.
    pub(super) channel: Option<i32>,
    /// The kernel, where one is booted.
    pub(super) kernel: Option<i32>,
    /// The initramfs, where there is one.
    pub(super) initramfs: Option<i32>,
    /// The writer's end of a unikernel's output.
    pub(super) output: Option<i32>,
    /// The file that is the guest's memory, where it is one.
    pub(super) memory: Option<i32>,
    /// One for each disk of the plan.
    pub(super) disks: Vec<i32>,
    /// One connected socket for each share of the plan.
    pub(super) shares: Vec<i32>,
}

/// The arguments after the program's name.
pub(super) fn arguments(
    plan: &LaunchPlan,
    handles: &Handles,
    tsc_khz: Option<u32>,
) -> Vec<OsString> {
    let mut args: Vec<String> = Vec::new();
    let mut option = |name: &str, value: String| {
        args.push(name.to_owned());
        args.push(value);
    };
    let memory_mib = super::guest_memory(plan).to_mib_ceil();
    // ACPI stays on: distributions' kernels find virtio-mmio devices only through it.
    let mut machine = "microvm,acpi=on,dump-guest-core=off,mem-merge=off".to_owned();
    let fork = matches!(plan.start, Start::Fork(_));
    let nanos = matches!(plan.start, Start::Nanos(_));
    if nanos {
        // It finds its devices' interrupts at the first controller only.
        machine.push_str(",ioapic2=off");
    }
    if let Some(fd) = handles.memory {
        // The captured machine writes to the file; its forks keep what they change to themselves.
        let share = if fork { "off" } else { "on" };
        option(
            "-object",
            format!(
                "memory-backend-file,id=memory,size={memory_mib}M,mem-path=/proc/self/fd/{fd},share={share}"
            ),
        );
        machine.push_str(",memory-backend=memory");
    } else if plan.huge_pages {
        // Taken at once: what is taken when it is first touched may be gone by then, and that kills the monitor.
        let share = if handles.shares.is_empty() {
            "off"
        } else {
            "on"
        };
        option(
            "-object",
            format!(
                "memory-backend-memfd,id=memory,size={memory_mib}M,hugetlb=on,hugetlbsize=2M,prealloc=on,share={share}"
            ),
        );
        machine.push_str(",memory-backend=memory");
    } else if !handles.shares.is_empty() {
        // The share's server works on the guest's memory, so the two have it in common.
        option(
            "-object",
            format!("memory-backend-memfd,id=memory,size={memory_mib}M,share=on"),
        );
        machine.push_str(",memory-backend=memory");
    }
    option("-M", machine);
    match plan.accelerator {
        Accelerator::Kvm => {
            option("-accel", "kvm".to_owned());
            option("-cpu", "host".to_owned());
        }
        Accelerator::Tcg => {
            option(
                "-accel",
                format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"),
            );
            // Without `erms` the guest copies with plain moves, which translate better than string instructions.
            option("-cpu", "max,-erms".to_owned());
        }
    }
    option("-smp", plan.vcpus.to_string());
    option("-m", format!("{memory_mib}M"));
    option("-display", "none".to_owned());
    // The guest's end stops QEMU instead of ending it: the console is read first, even if no node runs just then.
    option("-action", "reboot=shutdown,shutdown=pause".to_owned());
    option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned(),
    );
    if let Some(kernel) = handles.kernel {
        option("-kernel", format!("/proc/self/fd/{kernel}"));
    }
    if let Some(initramfs) = handles.initramfs {
        option("-initrd", format!("/proc/self/fd/{initramfs}"));
    }
    if let Start::Linux(boot) = &plan.start {
        option("-append", kernel_command_line(plan, boot, tsc_khz));
    }
    if fork {
        // It waits for the captured state, and then to be told to go on.
        option("-incoming", "defer".to_owned());
    }
    match handles.output {
        Some(fd) => {
            let set = plan.disks.len();
            option("-add-fd", format!("fd={fd},set={set}"));
            option(
                "-chardev",
                format!("file,id={CONSOLE},path=/dev/fdset/{set},append=on"),
            );
            // By this it tells failures of its kernel from ends of its program, which restart the machine instead.
            option("-device", "isa-debug-exit".to_owned());
        }
        None => option(
            "-chardev",
            format!("ringbuf,id={CONSOLE},size={CONSOLE_RING}"),
        ),
    }
    option("-serial", format!("chardev:{CONSOLE}"));
    option(
        "-chardev",
        format!("socket,id=qmp,fd={},server=on,wait=off", handles.qmp),
    );
    option("-mon", "chardev=qmp,mode=control".to_owned());
    option("-global", "virtio-mmio.force-legacy=false".to_owned());
    if let Some(channel) = handles.channel {
        option(
            "-chardev",
            format!("socket,id=agent,fd={channel},server=on,wait=off"),
        );
        option("-device", "virtio-serial-device".to_owned());
        option(
            "-device",
            format!("virtserialport,chardev=agent,name={CHANNEL_NAME}"),
        );
    }
    option("-device", "virtio-rng-device".to_owned());
    if let Some(nic) = &plan.nic {
        option("-netdev", user_network(nic));
        let mac: Vec<String> = nic.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        option(
            "-device",
            format!("virtio-net-device,netdev=net,mac={}", mac.join(":")),
        );
    }
    for (index, fd) in handles.shares.iter().enumerate() {
        option("-chardev", format!("socket,id=share{index},fd={fd}"));
        // A tag is no QEMU syntax: commas in it are doubled.
        let tag = plan.shares[index].tag.replace(',', ",,");
        option(
            "-device",
            format!("vhost-user-fs-device,queue-size=1024,chardev=share{index},tag={tag}"),
        );
    }
    // The guest finds them in the order in which they are given (seen with ACPI on; a test of real machines watches it).
    for (index, fd) in handles.disks.iter().enumerate() {
        let disk = &plan.disks[index];
        option("-add-fd", format!("fd={fd},set={index}"));
        // A writable disk lives as long as its machine: after a crash of the host nobody reads it, so flushes are
        // ignored. Blocks that the guest discards are given back.
        let mode = if disk.read_only {
            "read-only=on"
        } else {
            "cache.no-flush=on,discard=unmap,detect-zeroes=off"
        };
        option(
            "-blockdev",
            format!(
                "driver=file,node-name=file{index},filename=/dev/fdset/{index},locking=off,{mode}"
            ),
        );
        option(
            "-blockdev",
            format!("driver=raw,node-name=disk{index},file=file{index},{mode}"),
        );
        let mut top = format!("disk{index}");
        if let Some(limits) = limits(&plan.rates) {
            // The bounds are the process's: what goes on from a capture has its own.
            let group = json!({"qom-type": "throttle-group", "id": format!("bound{index}"), "limits": limits});
            option("-object", group.to_string());
            let bounded = format!("bounded{index}");
            option(
                "-blockdev",
                format!(
                    "driver=throttle,node-name={bounded},throttle-group=bound{index},file={top},{mode}"
                ),
            );
            top = bounded;
        }
        // A full host stops the guest until there is room again; any other error is the guest's to handle.
        let errors = if disk.read_only {
            ""
        } else {
            ",werror=enospc,rerror=report"
        };
        option("-device", format!("virtio-blk-device,drive={top}{errors}"));
    }
    if fork {
        args.push("-S".to_owned());
    }
    args.push("-nodefaults".to_owned());
    args.push("-no-user-config".to_owned());
    args.into_iter().map(OsString::from).collect()
}

/// What QEMU is to hold a disk to; nothing where nothing bounds it. A tenth of a second's worth may come at once.
fn limits(rates: &Rates) -> Option<Value> {
    let mut limits = serde_json::Map::new();
    if let Some(bytes) = rates.disk_per_s {
        limits.insert("bps-total".to_owned(), bytes.0.into());
    }
    if let Some(ops) = rates.disk_ops_per_s {
        limits.insert("iops-total".to_owned(), ops.into());
    }
    (!limits.is_empty()).then_some(Value::Object(limits))
}

fn kernel_command_line(plan: &LaunchPlan, boot: &LinuxBoot, tsc_khz: Option<u32>) -> String {
    let mut line = format!("{} console=ttyS0", boot.cmdline);
    if plan.accelerator == Accelerator::Tcg
        && let Some(khz) = tsc_khz
    {
        // Translation shows the guest the host's counter. Left to measure it, a kernel with ACPI hangs in 3 boots of 5;
        // not trusted as a clock, it costs a watchdog and half as much idle CPU again.
        line.push_str(&format!(" tsc_early_khz={khz} tsc=reliable"));
    }
    // QEMU's option syntax ends a value at a comma only in suboptions; `-append` takes it as it is.
    line
}

fn user_network(nic: &Nic) -> String {
    let mut value = "user,id=net".to_owned();
    for port in &nic.ports {
        value.push_str(&format!(",hostfwd={}", forward_rule(port)));
    }
    value
}

/// One forwarding rule, as QEMU takes it and as it repeats it in its complaint.
pub(super) fn forward_rule(port: &PortMapping) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!(
        "{protocol}:{}:{}-:{}",
        port.host_address, port.host_port, port.guest_port
    )
}

/// The port of the plan that QEMU could not forward, if that is what it complains of.
pub(super) fn taken_port(plan: &LaunchPlan, complaint: &str) -> Option<PortMapping> {
    let ports = &plan.nic.as_ref()?.ports;
    ports
        .iter()
        .find(|port| {
            complaint.contains(&format!(
                "Could not set up host forwarding rule '{}'",
                forward_rule(port)
            ))
        })
        .cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disk, Fence, GuestShare};
    use std::net::Ipv4Addr;
    use vistara_model::{Bytes, MachineId};

    fn plan() -> LaunchPlan {
        LaunchPlan {
            id: MachineId::from_random([1; 16]),
            dir: "/d".into(),
            accelerator: Accelerator::Tcg,
            vcpus: 2,
            memory: Bytes::mib(256),
            start: Start::Linux(LinuxBoot {
                kernel: "/k".into(),
                initramfs: "/i".into(),
                cmdline: "quiet a,b".to_owned(),
            }),
            huge_pages: false,
            capturable: false,
            disks: vec![],
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

    fn text(plan: &LaunchPlan, handles: &Handles) -> String {
        let args = arguments(plan, handles, Some(2_000_000));
        let args: Vec<&str> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        args.join(" ")
    }

    #[test]
    fn files_are_named_by_descriptor_only() {
        let mut plan = plan();
        plan.disks = vec![
            Disk {
                path: "/secret/a".into(),
                read_only: true,
            },
            Disk {
                path: "/secret/b".into(),
                read_only: false,
            },
        ];
        let handles = Handles {
            disks: vec![8, 9],
            kernel: Some(5),
            ..Handles::default()
        };
        let text = text(&plan, &handles);
        assert!(!text.contains("secret"), "{text}");
        assert!(text.contains("-kernel /proc/self/fd/5"), "{text}");
        assert!(text.contains("-add-fd fd=8,set=0"), "{text}");
        let first = text.find("drive=disk0").unwrap();
        assert!(first < text.find("drive=disk1").unwrap(), "in their order");
    }

    #[test]
    fn a_bounded_disk_is_throttled_each_for_itself_and_another_is_not() {
        let mut plan = plan();
        plan.disks = vec![
            Disk {
                path: "/a".into(),
                read_only: true,
            };
            2
        ];
        let handles = Handles {
            disks: vec![8, 9],
            ..Handles::default()
        };
        assert!(!text(&plan, &handles).contains("throttle"));
        plan.rates.disk_per_s = Some(Bytes::mib(1));
        plan.rates.disk_ops_per_s = Some(77);
        let text = text(&plan, &handles);
        let limits = r#""limits":{"bps-total":1048576,"iops-total":77}"#;
        assert_eq!(text.matches(limits).count(), 2, "{text}");
        assert!(text.contains("throttle-group=bound1,file=disk1"), "{text}");
        assert!(
            text.contains("drive=bounded0") && !text.contains("drive=disk"),
            "{text}"
        );
    }

    #[test]
    fn only_translation_is_told_the_counters_frequency() {
        let mut plan = plan();
        assert!(text(&plan, &Handles::default()).contains("tsc_early_khz=2000000"));
        plan.accelerator = Accelerator::Kvm;
        let text = text(&plan, &Handles::default());
        assert!(!text.contains("tsc"), "{text}");
        assert!(text.contains("-accel kvm -cpu host"), "{text}");
    }

    #[test]
    fn a_tag_with_a_comma_cannot_add_an_option() {
        let mut plan = plan();
        plan.shares = vec![GuestShare {
            tag: "a,b=c".into(),
            path: "/x".into(),
            read_only: true,
        }];
        let text = text(
            &plan,
            &Handles {
                shares: vec![7],
                ..Handles::default()
            },
        );
        assert!(text.contains("tag=a,,b=c"), "{text}");
        assert!(text.contains("share=on"), "{text}");
    }

    #[test]
    fn the_taken_port_is_told_from_qemus_words() {
        let mut plan = plan();
        let port = |host_port| PortMapping {
            host_address: Ipv4Addr::LOCALHOST,
            host_port,
            guest_port: 80,
            protocol: Protocol::Tcp,
        };
        plan.nic = Some(Nic {
            ports: vec![port(81), port(8080)],
            mac: [2, 0, 0, 0, 0, 1],
        });
        let words = "qemu-system-x86_64: -netdev user,id=net,hostfwd=tcp:127.0.0.1:81-:80,hostfwd=tcp:127.0.0.1:8080-:80: Could not set up host forwarding rule 'tcp:127.0.0.1:8080-:80'";
        assert_eq!(taken_port(&plan, words), Some(port(8080)));
        assert_eq!(taken_port(&plan, "out of memory"), None);
    }
}
