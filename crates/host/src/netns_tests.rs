//! Tests of network namespaces, with programs that live in them. They take root.

use super::*;
use crate::files::OutputBox;
use crate::launch::Launch;
use std::time::Duration;

fn may_make() -> bool {
    if !crate::facts::is_root() {
        println!("SKIP: network namespaces take root");
        return false;
    }
    if !std::fs::exists("/dev/net/tun").unwrap() {
        println!("SKIP: there is no /dev/net/tun");
        return false;
    }
    true
}

/// The first process of its own process and network namespaces.
fn first_process() -> ProcessHandle {
    let mut launch = Launch::new("/bin/sleep");
    launch.args = vec!["60".into()];
    (launch.own_processes, launch.own_network) = (true, true);
    launch.start().unwrap().process
}

#[tokio::test]
async fn taps_are_made_in_a_processs_namespace_and_nowhere_else() {
    if !may_make() {
        return;
    }
    let process = first_process();
    let taps = [
        Tap {
            name: "vst-test0",
            owner: 61_004,
            filter: None,
        },
        Tap {
            name: "vst-test1",
            owner: 0,
            filter: None,
        },
    ];
    let namespace = NetworkNamespace::of(&process).unwrap();
    namespace.make_joined_taps("vst-bridge", &taps).unwrap();
    let seen_by = |of: &str| std::fs::read_to_string(format!("/proc/{of}/net/dev")).unwrap();
    let (there, here) = (
        seen_by(&process.identity().pid.to_string()),
        seen_by("self"),
    );
    for name in ["vst-test0:", "vst-test1:", "vst-bridge:"] {
        assert!(there.contains(name), "{there}");
        assert!(!here.contains(name), "{here}");
    }
    let again = namespace.make_joined_taps("vst-bridge", &taps).unwrap_err();
    assert!(again.step.starts_with("making a bridge"), "{again}");
    let long = namespace.make_joined_taps("a-name-that-is-too-long", &[]);
    assert_eq!(long.unwrap_err().source.kind(), io::ErrorKind::InvalidInput);
    process.kill().unwrap();
    process.wait().await.unwrap();
}

#[tokio::test]
async fn a_process_in_anothers_process_namespace_ends_with_that_ones_first() {
    if !may_make() {
        return;
    }
    let first = first_process();
    let output = OutputBox::new(4096).unwrap();
    let mut launch = Launch::new("/bin/sh");
    launch.args = vec!["-c".into(), "echo here; exec sleep 60".into()];
    launch.output = Some(output.writer().unwrap());
    launch.processes_of = Some(first.process_namespace().unwrap());
    let second = launch.start().unwrap().process;
    while output.tail(100).is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let pid = second.identity().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = format!("PPid:\t{}\n", first.identity().pid);
    assert!(status.contains(&parent), "{status}");
    let spaces = status.lines().find(|line| line.starts_with("NSpid:"));
    assert_eq!(spaces.unwrap().split_whitespace().count(), 3, "{status}");
    let end = tokio::time::timeout(Duration::from_millis(50), second.wait()).await;
    assert!(end.is_err(), "it runs");
    first.kill().unwrap();
    first.wait().await.unwrap();
    // By then the kernel has ended and collected the other, too: nobody had to.
    assert_eq!(crate::facts::start_ticks(pid), None);
    second.wait().await.unwrap();
}

#[tokio::test]
async fn a_program_that_is_not_there_is_told_of_in_anothers_process_namespace_too() {
    if !may_make() {
        return;
    }
    let first = first_process();
    let mut launch = Launch::new("/no/such/program");
    launch.processes_of = Some(first.process_namespace().unwrap());
    let error = launch.start().unwrap_err();
    assert_eq!(error.step, "loading the program");
    assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
    first.kill().unwrap();
    first.wait().await.unwrap();
}

/// A frame of this kind with an IPv4 packet in it, to this address.
fn frame(tags: &[[u8; 4]], kind: u16, to: [u8; 4], payload: usize) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 2, 15];
    packet.extend(to);
    packet[2..4].copy_from_slice(&(20 + payload as u16).to_be_bytes());
    // Where bridges look at packets, they drop those with a wrong sum before any filter does.
    let words = packet
        .chunks(2)
        .map(|two| u32::from_be_bytes([0, 0, two[0], two[1]]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2, 2, 0, 0, 0, 0, 1];
    frame.extend(tags.iter().flatten());
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame.resize(frame.len() + payload, 9);
    frame
}

/// The next frame of the guest's, waited for as long as this.
fn next(mut tap: &File, limit: Duration) -> Option<Vec<u8>> {
    let begin = std::time::Instant::now();
    let mut seen = [0; 2000];
    while begin.elapsed() < limit {
        match io::Read::read(&mut tap, &mut seen) {
            // The bridge has words of its own.
            Ok(count) if seen[6..12] == [2, 0, 0, 0, 0, 1] => return Some(seen[..count].to_vec()),
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    None
}

#[test]
fn a_filtered_tap_gives_its_reader_arp_and_ipv4_that_is_not_to_its_own_loopback() {
    if !may_make() {
        return;
    }
    let filter = match FrameFilter::no_loopback() {
        Ok(filter) => filter,
        Err(error) => {
            println!("SKIP: no filter may be loaded here: {error}");
            return;
        }
    };
    let tap = |name, filter| Tap {
        name,
        owner: 0,
        filter,
    };
    let namespace = NetworkNamespace::new().unwrap();
    let names = ["vst-from", "vst-all", "vst-some"];
    let taps = [
        tap(names[0], None),
        tap(names[1], None),
        tap(names[2], Some(&filter)),
    ];
    namespace.make_joined_taps("vst-bridge", &taps).unwrap();
    // The devices keep it, with nobody holding it here, and for whoever opens them.
    drop(filter);
    let opened = in_thread(|| {
        move_into_link_name_space(namespace.0.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(at("entering"))?;
        let opened = names.map(|name| open_tap(name).map_err(at("opening")));
        opened.into_iter().collect::<Result<Vec<_>, _>>()
    });
    let [mut from, all, some] = <[File; 3]>::try_from(opened.unwrap()).unwrap();
    for tap in [&all, &some] {
        rustix::io::ioctl_fionbio(tap, true).unwrap();
    }
    let outside = [192, 0, 2, 1];
    // The bridge passes frames once it has heard that its ports are up, and refuses them until it is.
    let knock = frame(&[], 0x0800, outside, 8);
    for tap in [&all, &some] {
        let begin = std::time::Instant::now();
        loop {
            let _ = io::Write::write(&mut from, &knock);
            if next(tap, Duration::from_millis(5)).is_some() {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(10), "nothing passes");
        }
    }
    let vlan = [0x81, 0, 0, 5];
    let priority = [0x81, 0, 0, 0];
    let dropped = [
        frame(&[], 0x0800, [127, 0, 0, 1], 8),
        frame(&[], 0x0800, [127, 255, 255, 255], 8),
        frame(&[], 0x0800, [0, 0, 0, 0], 8),
        frame(&[], 0x0800, [0, 255, 0, 1], 8),
        frame(&[], 0x88b5, outside, 8),
        frame(&[vlan], 0x0800, [127, 0, 0, 1], 8),
        frame(&[priority], 0x0800, [127, 0, 0, 1], 8),
        frame(&[vlan], 0x0800, [0, 0, 0, 0], 8),
        frame(&[vlan, priority], 0x0800, outside, 8),
        // It ends before its destination does.
        frame(&[], 0x0800, outside, 8)[..33].to_vec(),
        frame(&[], 0x86dd, outside, 8),
    ];
    let passed = [
        frame(&[], 0x0806, outside, 8),
        frame(&[], 0x0806, [127, 0, 0, 1], 8),
        frame(&[], 0x0800, [1, 0, 0, 0], 8),
        frame(&[], 0x0800, [126, 255, 255, 255], 8),
        frame(&[], 0x0800, [128, 0, 0, 0], 8),
        frame(&[], 0x0800, [255, 255, 255, 255], 8),
        frame(&[], 0x0800, [10, 0, 2, 2], 8),
        frame(&[], 0x0800, outside, 1480),
    ];
    for frame in dropped.iter().chain(&passed) {
        io::Write::write_all(&mut from, frame).unwrap();
    }
    // Frames keep their order; only those that knocked may still come.
    let after_knocks = |tap| {
        let waited = move || next(tap, Duration::from_secs(10)).unwrap();
        std::iter::repeat_with(waited).skip_while(|seen| *seen == knock)
    };
    for (frame, seen) in passed.iter().zip(after_knocks(&some)) {
        assert_eq!(&seen, frame);
    }
    // And it is the filter that held them: where there is none they come, but for the last two, which are no packets.
    for (frame, seen) in dropped[..9].iter().zip(after_knocks(&all)) {
        assert_eq!(&seen, frame);
    }
}
