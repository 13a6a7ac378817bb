//! The agent's program as bytes, compiled for this host's architecture and linked statically.
//!
//! The build script does the work. Left to others: putting it into an initial RAM disk (the machine crate).

/// The program: a static executable, to be `/init` of an initial RAM disk.
pub const AGENT: &[u8] = include_bytes!(env!("VISTARA_AGENT_FILE"));

/// SHA-256 of [`AGENT`] in hexadecimal digits: changes whenever the program does.
pub const AGENT_SHA256: &str = env!("VISTARA_AGENT_SHA256");

/// The agent's version.
pub const AGENT_VERSION: &str = env!("CARGO_PKG_VERSION");

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_program_runs_here_and_says_that_it_is_for_guests() {
        assert_eq!(AGENT_SHA256.len(), 64);
        let path = std::env::temp_dir().join(format!("vistara-agent-{}", std::process::id()));
        std::fs::write(&path, AGENT).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let output = std::process::Command::new(&path).output().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(!output.status.success());
        assert!(String::from_utf8(output.stderr).unwrap().contains("PID 1"));
    }
}
