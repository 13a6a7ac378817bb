//! Users and groups, read from `/etc/passwd` and `/etc/group` alone: a static program has no name service.

use std::path::Path;
use vistara_guest_protocol::SpawnFailed;

/// Who a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// User.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Further groups.
    pub(crate) groups: Vec<u32>,
    /// Home directory.
    pub(crate) home: String,
}

/// Most bytes read of either file: more users than any image has.
const FILE_MAX: u64 = 4 << 20;

fn read(path: &Path) -> String {
    use std::io::Read;
    let mut text = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        // A file that cannot be read has no entries.
        let _ = file.take(FILE_MAX).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Resolves a user as an OCI image names one, with the files of the running root.
pub(crate) fn resolve(user: &str) -> Result<Identity, SpawnFailed> {
    let wants_groups = !user.is_empty() && user != "0" && user != "root";
    let group = if wants_groups {
        read(Path::new("/etc/group"))
    } else {
        String::new()
    };
    resolve_in(user, &read(Path::new("/etc/passwd")), &group)
}

fn failed(message: String) -> SpawnFailed {
    SpawnFailed { code: 125, message }
}

fn resolve_in(spec: &str, passwd: &str, group: &str) -> Result<Identity, SpawnFailed> {
    let (user, group_name) = match spec.split_once(':') {
        Some((user, group)) => (user, (!group.is_empty()).then_some(group)),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let numeric = user.parse::<u32>().ok();
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else {
            return None;
        };
        let (uid, gid) = (uid.parse::<u32>().ok()?, gid.parse::<u32>().ok()?);
        // The first line wins that has the name or the number, as container runtimes do it.
        (name == user || Some(uid) == numeric).then(|| (name.to_owned(), uid, gid, home.to_owned()))
    });
    let (name, uid, gid, home) = match (entry, numeric) {
        (Some((name, uid, gid, home)), _) => (Some(name), uid, gid, home),
        (None, Some(0)) => (None, 0, 0, "/root".to_owned()),
        (None, Some(uid)) => (None, uid, 0, "/".to_owned()),
        (None, None) => {
            return Err(failed(format!(
                "unable to find user {user}: no entry in /etc/passwd"
            )));
        }
    };
    let home = if home.is_empty() {
        "/".to_owned()
    } else {
        home
    };
    let groups = group.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, gid, members, ..] = fields[..] else {
            return None;
        };
        Some((name, gid.parse::<u32>().ok()?, members))
    });
    if let Some(wanted) = group_name {
        let numeric = wanted.parse::<u32>().ok();
        let found = groups
            .into_iter()
            .find(|(name, gid, _)| *name == wanted || Some(*gid) == numeric)
            .map(|(_, gid, _)| gid)
            .or(numeric);
        let Some(gid) = found else {
            return Err(failed(format!(
                "unable to find group {wanted}: no entry in /etc/group"
            )));
        };
        return Ok(Identity {
            uid,
            gid,
            groups: Vec::new(),
            home,
        });
    }
    let groups = groups
        .filter(|(_, _, members)| {
            name.as_deref()
                .is_some_and(|name| members.split(',').any(|member| member == name))
        })
        .map(|(_, gid, _)| gid)
        .collect();
    Ok(Identity {
        uid,
        gid,
        groups,
        home,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nada:x:1000:100:Ada:/home/ada:/bin/sh\nbad line\n7:x:70:71::/seven:\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\naudio:x:29:bob,ada\nvideo:x:44:ada\n";

    fn of(spec: &str) -> (u32, u32, Vec<u32>, String) {
        let id = resolve_in(spec, PASSWD, GROUP).unwrap();
        (id.uid, id.gid, id.groups, id.home)
    }

    #[test]
    fn users_are_found_as_oci_images_name_them() {
        assert_eq!(of(""), (0, 0, vec![], "/root".into()));
        assert_eq!(of("ada"), (1000, 100, vec![29, 44], "/home/ada".into()));
        assert_eq!(of("1000"), (1000, 100, vec![29, 44], "/home/ada".into()));
        assert_eq!(of("ada:video"), (1000, 44, vec![], "/home/ada".into()));
        assert_eq!(of("12:34"), (12, 34, vec![], "/".into()));
        assert_eq!(of("12"), (12, 0, vec![], "/".into()));
        assert_eq!(of("7"), (70, 71, vec![], "/seven".into()));
    }

    #[test]
    fn an_unknown_name_is_exit_code_125_and_says_which() {
        let error = resolve_in("eve", PASSWD, GROUP).unwrap_err();
        assert_eq!((error.code, error.message.contains("eve")), (125, true));
        assert!(
            resolve_in("ada:nogroup", PASSWD, GROUP)
                .unwrap_err()
                .message
                .contains("nogroup")
        );
    }
}
