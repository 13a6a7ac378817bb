//! Small kernels, modules and packages, made up for the tests.

use std::io::Write as _;
use std::path::Path;

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn header(program_headers: (u64, u16), section_headers: (u64, u16, u16)) -> Vec<u8> {
    let mut out = vec![0; 64];
    put(&mut out, 0, b"\x7fELF\x02\x01\x01");
    put(&mut out, 32, &program_headers.0.to_le_bytes());
    put(&mut out, 40, &section_headers.0.to_le_bytes());
    put(&mut out, 54, &56u16.to_le_bytes());
    put(&mut out, 56, &program_headers.1.to_le_bytes());
    put(&mut out, 58, &64u16.to_le_bytes());
    put(&mut out, 60, &section_headers.1.to_le_bytes());
    put(&mut out, 62, &section_headers.2.to_le_bytes());
    out
}

fn program_header(kind: u32, offset: u64, address: u64, file: u64, memory: u64) -> Vec<u8> {
    let mut out = vec![0; 56];
    put(&mut out, 0, &kind.to_le_bytes());
    for (at, value) in [
        (8, offset),
        (16, address),
        (24, address),
        (32, file),
        (40, memory),
    ] {
        put(&mut out, at, &value.to_le_bytes());
    }
    out
}

/// One loadable segment with a banner, a note and many zeros, then bytes that no segment covers.
pub(crate) fn vmlinux(release: &str, pvh: bool) -> Vec<u8> {
    const ZEROS: usize = 100_000;
    let mut body =
        format!("%s version %s\0Linux version %s\0Linux version {release} (x@y)\0").into_bytes();
    body.resize(body.len().next_multiple_of(4), 1);
    let note_at = 4096 + body.len() as u64;
    let mut note = Vec::new();
    for (kind, data) in [
        (6u32, &b"linux\0\0\0"[..]),
        (if pvh { 18 } else { 3 }, b"\x00\x00\x00\x01"),
    ] {
        for word in [4u32, data.len() as u32, kind] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(data);
    }
    body.extend_from_slice(&note);
    body.resize(body.len() + ZEROS, 0);
    let mut out = header((64, 2), (0, 0, 0));
    let size = body.len() as u64;
    out.extend(program_header(1, 4096, 0x100_0000, size, size + 4096));
    out.extend(program_header(
        4,
        note_at,
        0x100_0000,
        note.len() as u64,
        note.len() as u64,
    ));
    out.resize(4096, 0);
    out.extend(body);
    out.extend(b"symbols that nobody needs".repeat(100));
    out
}

/// The legacy LZ4 stream that a kernel's build makes, its length appended.
pub(crate) fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    let mut out = b"\x02\x21\x4c\x18".to_vec();
    for chunk in data.chunks(8 << 20) {
        let block = lz4_flex::block::compress(chunk);
        out.extend_from_slice(&(block.len() as u32).to_le_bytes());
        out.extend(block);
    }
    out.extend_from_slice(&(data.len() as u32).to_le_bytes());
    out
}

/// A bzImage around this payload.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 3 * 512 + 100];
    out[0x1f1] = 2;
    put(&mut out, 0x202, b"HdrS");
    put(&mut out, 0x206, &0x20fu16.to_le_bytes());
    put(&mut out, 0x248, &100u32.to_le_bytes());
    put(&mut out, 0x24c, &(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(payload);
    out.extend_from_slice(b"tail");
    out
}

/// A module with this `depends=`, a section of debug information, and a signature.
pub(crate) fn module(depends: &str) -> Vec<u8> {
    let names = b"\0.shstrtab\0.modinfo\0.debug_info\0.text\0";
    let modinfo = format!("license=GPL\0depends={depends}\0name=x\0");
    let bodies: [(u32, u64, &[u8]); 4] = [
        (1, 0, names),
        (11, 2, modinfo.as_bytes()),
        (20, 0, &[7; 5000]),
        (32, 6, b"code"),
    ];
    let mut out = vec![0; 64];
    let mut headers = vec![0; 64];
    for (name, flags, body) in bodies {
        let mut entry = vec![0; 64];
        put(&mut entry, 0, &name.to_le_bytes());
        put(&mut entry, 4, &1u32.to_le_bytes());
        put(&mut entry, 8, &flags.to_le_bytes());
        put(&mut entry, 24, &(out.len() as u64).to_le_bytes());
        put(&mut entry, 32, &(body.len() as u64).to_le_bytes());
        put(&mut entry, 48, &1u64.to_le_bytes());
        headers.extend(entry);
        out.extend_from_slice(body);
    }
    let head = header((0, 0), (out.len() as u64, 5, 1));
    put(&mut out, 0, &head);
    out.extend(headers);
    let signature = [9; 300];
    out.extend_from_slice(&signature);
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&(signature.len() as u32).to_be_bytes());
    out.extend_from_slice(b"~Module signature appended~\n");
    out
}

/// All modules that a guest wants but `except`, as files of a package.
pub(crate) fn modules(release: &str, except: &[&str]) -> Vec<(String, Vec<u8>)> {
    [
        ("drivers/virtio/virtio_ring", ""),
        ("drivers/virtio/virtio", "virtio_ring"),
        ("drivers/virtio/virtio_mmio", "virtio,virtio_ring"),
        ("drivers/char/virtio_console", "virtio,virtio_ring"),
        ("drivers/block/virtio_blk", "virtio,virtio_ring"),
        ("fs/squashfs/squashfs", ""),
        ("fs/overlayfs/overlay", ""),
        ("net/core/failover", ""),
        ("drivers/net/net_failover", "failover"),
        ("drivers/net/virtio_net", "net_failover,virtio,virtio_ring"),
        ("fs/fuse/fuse", ""),
        ("fs/fuse/virtiofs", "fuse,virtio,virtio_ring"),
        ("drivers/char/hw_random/virtio-rng", "rng-core,virtio"),
        ("drivers/virtio/virtio_balloon", "virtio"),
        ("net/vmw_vsock/vsock", ""),
        ("net/vmw_vsock/vmw_vsock_virtio_transport_common", "vsock"),
        (
            "net/vmw_vsock/vmw_vsock_virtio_transport",
            "vmw_vsock_virtio_transport_common,virtio,virtio_ring,vsock",
        ),
        ("drivers/unneeded", ""),
    ]
    .iter()
    .filter(|(path, _)| !except.iter().any(|name| path.ends_with(name)))
    .map(|(path, depends)| {
        (
            format!("lib/modules/{release}/kernel/{path}.ko"),
            module(depends),
        )
    })
    .collect()
}

/// A Debian package of these files, its data compressed as `compression` says.
pub(crate) fn deb(path: &Path, files: &[(String, Vec<u8>)], compression: &str) {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut entry = tar::Header::new_gnu();
        entry.set_size(data.len() as u64);
        entry.set_mode(0o644);
        tar.append_data(&mut entry, name, &data[..]).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let data = match compression {
        "xz" => {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(&tar).unwrap();
            encoder.finish().unwrap()
        }
        "zst" => zstd::encode_all(&tar[..], 1).unwrap(),
        _ => tar,
    };
    let mut out = b"!<arch>\n".to_vec();
    let data_name = format!("data.tar.{compression}");
    for (name, body) in [
        ("debian-binary", &b"2.0\n"[..]),
        ("control.tar.xz", b"odd"),
        (&data_name, &data),
    ] {
        writeln!(
            out,
            "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`",
            0,
            0,
            0,
            100_644,
            body.len()
        )
        .unwrap();
        out.extend_from_slice(body);
        if body.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    std::fs::write(path, out).unwrap();
}

/// A whole kernel package of this release.
pub(crate) fn kernel_deb(path: &Path, release: &str, except: &[&str]) {
    let mut files = modules(release, except);
    let kernel = bzimage(&lz4_legacy(&vmlinux(release, true)));
    files.push((format!("boot/vmlinuz-{release}"), kernel));
    let builtin = "kernel/fs/ext4/ext4.ko\nkernel/drivers/char/hw_random/rng-core.ko\n";
    files.push((
        format!("lib/modules/{release}/modules.builtin"),
        builtin.into(),
    ));
    deb(path, &files, "xz");
}

/// What is taken for a Nanos kernel, with this text in it.
pub(crate) fn nanos_kernel(text: &str) -> Vec<u8> {
    let body = format!("\0{text}\0NVMTFS\0KLOG\0").into_bytes();
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0\x23\x01\x20\x00");
    let mut out = header((64, 2), (0, 0, 0));
    put(&mut out, 18, &62u16.to_le_bytes());
    let (size, note_size) = (body.len() as u64, note.len() as u64);
    let at = 64 + 2 * 56;
    out.extend(program_header(1, at, 0x20_0000, size, size));
    out.extend(program_header(4, at + size, 0, note_size, note_size));
    out.extend(body);
    out.extend(note);
    out
}
