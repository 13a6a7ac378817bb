//! A cpio archive in the kernel's format ("newc", the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`).

/// Directories and files, owned by root, in the order given.
#[derive(Debug, Default)]
pub(super) struct Archive(Vec<u8>);

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

impl Archive {
    pub(super) fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY | 0o755, b"");
    }

    pub(super) fn program(&mut self, name: &str, data: &[u8]) {
        self.entry(name, FILE | 0o755, data);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, b"");
        self.0
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        let name_size = name.len() + 1;
        let (inode, owner, group, links, time, device) = (0, 0, 0, 1, 0, 0);
        self.0.extend_from_slice(b"070701");
        for field in [inode, mode as usize, owner, group, links, time, data.len()] {
            self.0.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        for field in [device, device, device, device, name_size, 0] {
            self.0.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn headers_have_110_bytes_and_everything_is_aligned() {
        let mut archive = Archive::default();
        archive.directory("d");
        archive.program("d/x", b"12345");
        let bytes = archive.finish();
        // 110 + "d\0" is 112; 110 + "d/x\0" is 114, padded to 116, and five bytes to eight.
        assert_eq!(&bytes[112..118], b"070701");
        assert_eq!(&bytes[112 + 116..112 + 116 + 8], b"12345\0\0\0");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn cpio_reads_it() {
        let mut archive = Archive::default();
        archive.directory("d");
        archive.program("d/x", b"12345");
        let child = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            return println!("SKIP: no cpio (apt-get install cpio)");
        };
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(&archive.finish()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(output.status.success());
        assert!(
            lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" d"),
            "{text}"
        );
        assert!(
            lines[1].starts_with("-rwxr-xr-x") && lines[1].ends_with(" d/x"),
            "{text}"
        );
        assert!(lines[1].contains(" 5 "), "{text}");
    }
}
