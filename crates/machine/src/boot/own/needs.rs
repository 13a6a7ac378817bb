//! What a host needs to build a kernel, by the names of Debian's packages.

use std::path::Path;

/// A package, and a program of it or, with its path, a file.
const NEEDS: &[(&str, &str)] = &[
    ("apt", "apt-get"),
    ("dpkg", "dpkg-deb"),
    ("tar", "tar"),
    ("util-linux", "setpriv"),
    ("xz-utils", "xz"),
    ("make", "make"),
    ("gcc", "gcc"),
    ("libc6-dev", "/usr/include/stdlib.h"),
    ("binutils", "ld"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    // The kernel's own tool that looks through its objects.
    ("libelf-dev", "/usr/include/gelf.h"),
];

/// Packages that are missing.
pub(super) fn missing() -> Vec<&'static str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<_> = std::env::split_paths(&path).collect();
    missing_of(|thing| {
        if thing.starts_with('/') {
            return Path::new(thing).exists();
        }
        dirs.iter().any(|dir| dir.join(thing).is_file())
    })
}

fn missing_of(is_there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let missing = NEEDS.iter().filter(|(_, thing)| !is_there(thing));
    missing.map(|(package, _)| *package).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_by_its_package() {
        assert_eq!(missing_of(|_| true), [""; 0]);
        let missing = missing_of(|thing| thing != "flex" && thing != "/usr/include/gelf.h");
        assert_eq!(missing, ["flex", "libelf-dev"]);
    }
}
