//! A processor template: what of the host's processor guests are to see, in Firecracker's own form.
//!
//! It makes guests alike on hosts that differ: a program finds the same processor on all of them. (Captures still go on only on
//! hosts with the same one.) The file is what Firecracker's `cpu-template-helper` writes; what is in it is Firecracker's to judge.

use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most bytes of a file: the largest of Firecracker's own is 20 KiB.
const BYTES_MAX: u64 = 1 << 20;

/// Why a file is no template.
#[derive(Debug, thiserror::Error)]
pub enum CpuTemplateError {
    /// It cannot be read.
    #[error("the processor template {path:?} cannot be read")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It has another form.
    #[error(
        "{path:?} is no processor template ({reason}); it takes a JSON object as Firecracker's cpu-template-helper writes it"
    )]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A template that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuTemplate {
    body: Arc<Value>,
    digest: String,
}

impl CpuTemplate {
    /// Reads a file of Firecracker's form, of at most 1 MiB.
    ///
    /// # Errors
    /// It cannot be read, or is no JSON object.
    pub fn read(path: &Path) -> Result<CpuTemplate, CpuTemplateError> {
        let form = |reason: String| CpuTemplateError::Form {
            path: path.to_owned(),
            reason,
        };
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes))
            .map_err(|source| CpuTemplateError::Io {
                path: path.to_owned(),
                source,
            })?;
        if bytes.len() as u64 > BYTES_MAX {
            return Err(form(format!("it has more than {BYTES_MAX} bytes")));
        }
        let body: Value =
            serde_json::from_slice(&bytes).map_err(|error| form(error.to_string()))?;
        if !body.is_object() {
            return Err(form("it is no object".to_owned()));
        }
        // Of the value, not the bytes: spaces and the order of names change nothing.
        let digest = blake3::hash(body.to_string().as_bytes()).to_hex()[..16].to_owned();
        Ok(CpuTemplate {
            body: Arc::new(body),
            digest,
        })
    }

    pub(super) fn body(&self) -> &Value {
        &self.body
    }

    /// What tells it from others.
    pub(super) fn digest(&self) -> &str {
        &self.digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_an_object_and_known_by_what_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("template.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            CpuTemplate::read(&path)
        };
        let one = read(r#"{"cpuid_modifiers": [], "msr_modifiers": []}"#).unwrap();
        let same = read("{\"msr_modifiers\":[],\n\"cpuid_modifiers\":[]}").unwrap();
        assert_eq!(one.digest(), same.digest());
        let other = read(r#"{"kvm_capabilities": ["!171"]}"#).unwrap();
        assert_ne!(one.digest(), other.digest());
        for (text, why) in [("[1]", "object"), ("T2S", "expected"), ("", "EOF")] {
            let refused = read(text).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(1 << 20));
        let refused = read(&long).unwrap_err().to_string();
        assert!(refused.contains("more than"), "{refused}");
        let absent = CpuTemplate::read(Path::new("/no/such/file")).unwrap_err();
        assert!(matches!(absent, CpuTemplateError::Io { .. }));
    }
}
