//! A node that serves and one that asks, and what is done with both.

use super::{System, state_dir, text};
use std::io::Read;

/// What a command printed, which must have gone well.
pub(crate) fn said(system: &System, words: &[&str]) -> String {
    let output = system.vistara(words);
    assert!(
        output.status.success(),
        "{words:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout).trim().to_owned()
}

/// What a command complained, which must have failed.
pub(crate) fn complained(system: &System, words: &[&str]) -> String {
    let output = system.vistara(words);
    assert!(
        !output.status.success(),
        "{words:?}: {}",
        text(&output.stdout)
    );
    text(&output.stderr)
}

/// A node that serves, and one that asks; both leave when the test ends.
pub(crate) struct Two {
    pub(crate) far: System,
    pub(crate) near: System,
    pub(crate) ticket: String,
    pub(crate) id: String,
}

impl Two {
    /// With machines at the far node, which listens and was joined, and has granted nothing.
    pub(crate) fn with_machines(name: &str) -> Option<Two> {
        let far = System::ready_as(&format!("mesh-{name}-far"))?;
        Some(Two::of(far, name))
    }

    /// Without machines, kernels or images.
    pub(crate) fn without_machines(name: &str) -> Two {
        let far = bare(&format!("mesh-{name}-far"));
        Two::of(far, name)
    }

    pub(crate) fn of(far: System, name: &str) -> Two {
        let near = bare(&format!("mesh-{name}-near"));
        let ticket = said(&far, &["node", "ticket", "--listen", "127.0.0.1:0"]);
        let id = said(&near, &["id"]);
        said(&near, &["node", "join", &ticket, "--name", "far"]);
        Two {
            far,
            near,
            ticket,
            id,
        }
    }

    /// Grants the near node this; it is kept there.
    pub(crate) fn grant(&self, rights: &str, more: &[&str]) -> String {
        let words = ["grant", "--to", &self.id, "--for", rights, "--until", "1h"];
        let token = said(&self.far, &[&words[..], more].concat());
        said(&self.near, &["grant", "keep", &token]);
        token
    }
}

impl Drop for Two {
    fn drop(&mut self) {
        for system in [&self.near, &self.far] {
            for machine in text(&system.vistara(&["ps", "-aq"]).stdout).split_whitespace() {
                system.vistara(&["rm", "-f", machine]);
            }
            system.vistara(&["node", "leave"]);
            system.vistara(&["node", "stop"]);
        }
    }
}

/// A node that has nothing.
pub(crate) fn bare(name: &str) -> System {
    let state = state_dir(name);
    std::fs::create_dir_all(&state).unwrap();
    System { state }
}

/// A root file system as an archive, of files that do not compress.
pub(crate) fn archive(path: &std::path::Path, bytes: usize) {
    let mut noise = vec![0; bytes];
    std::fs::File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut noise)
        .unwrap();
    let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes as u64);
    header.set_mode(0o755);
    header.set_cksum();
    tar.append_data(&mut header, "noise", noise.as_slice())
        .unwrap();
    tar.finish().unwrap();
}
