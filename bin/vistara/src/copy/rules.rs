//! What `cp` means: docker's rules for names, trailing slashes, `/.` and destinations that exist. Pure.

/// One side of a copy, as typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Side {
    /// A path in a machine.
    Guest {
        /// The machine.
        machine: String,
        /// The path, absolute.
        path: String,
    },
    /// A path here.
    Here(String),
    /// A tar stream.
    Stream,
}

impl Side {
    /// `MACHINE:PATH`, `-`, or a path here. What begins with `/` or `.` is a path here whatever follows.
    pub(crate) fn parse(text: &str) -> Side {
        if text == "-" {
            return Side::Stream;
        }
        if text.starts_with(['/', '.']) {
            return Side::Here(text.to_owned());
        }
        match text.split_once(':') {
            Some((machine, path)) if !machine.is_empty() && !machine.contains('/') => Side::Guest {
                machine: machine.to_owned(),
                // A guest has no working directory for us: paths count from its root.
                path: format!("/{}", path.trim_start_matches('/')),
            },
            _ => Side::Here(text.to_owned()),
        }
    }
}

/// A path without what only says how it is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    /// The path itself.
    pub(crate) path: String,
    /// Its last name; absent for `/`, `.` and `..`.
    pub(crate) name: Option<String>,
    /// It ended in `/.` (or has no name): what is in it is meant, not itself.
    pub(crate) contents: bool,
    /// It ended in `/` or `/.`: it must be a directory, and a link to one is followed.
    pub(crate) directory: bool,
}

impl Named {
    /// Takes a path apart.
    pub(crate) fn parse(text: &str) -> Named {
        let mut path = text;
        let (mut contents, mut directory) = (false, false);
        loop {
            if path.len() > 1
                && let Some(rest) = path.strip_suffix('/')
            {
                path = rest;
                directory = true;
            } else if let Some(rest) = path.strip_suffix("/.") {
                path = if rest.is_empty() { "/" } else { rest };
                (contents, directory) = (true, true);
            } else {
                break;
            }
        }
        let name = match path.rsplit('/').next() {
            None | Some("" | "." | "..") => None,
            Some(name) => Some(name.to_owned()),
        };
        Named {
            path: path.to_owned(),
            contents: contents || name.is_none(),
            directory: directory || name.is_none(),
            name,
        }
    }

    /// The directory that holds it.
    fn parent(&self) -> String {
        match self.path.rsplit_once('/') {
            Some(("", _)) => "/".to_owned(),
            Some((parent, _)) => parent.to_owned(),
            None => ".".to_owned(),
        }
    }
}

/// What is at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum There {
    /// Nothing.
    Missing,
    /// Something that is no directory.
    File,
    /// A directory.
    Dir,
}

/// Under which name the top of a tree arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Top {
    /// Under this one.
    Named(String),
    /// Under none: what is in it arrives.
    Contents,
}

/// Where a copy goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The directory, which must exist.
    pub(crate) into: String,
    /// Under which name.
    pub(crate) top: Top,
}

/// Decides where `source` goes.
pub(crate) fn plan(
    source: &Named,
    source_is_dir: bool,
    destination: &Named,
    there: There,
) -> Result<Plan, String> {
    if source.directory && !source_is_dir {
        return Err(format!("{} is not a directory", source.path));
    }
    let renamed = || match &destination.name {
        Some(name) => Ok(Plan {
            into: destination.parent(),
            top: Top::Named(name.clone()),
        }),
        None => Err(format!("{} does not exist", destination.path)),
    };
    match (there, source_is_dir) {
        (There::Dir, _) => Ok(Plan {
            into: destination.path.clone(),
            top: match &source.name {
                Some(name) if !source.contents => Top::Named(name.clone()),
                _ => Top::Contents,
            },
        }),
        (There::File, true) => Err(format!(
            "{} is a file: a directory cannot replace it",
            destination.path
        )),
        (There::File, false) if destination.directory => {
            Err(format!("{} is not a directory", destination.path))
        }
        (There::Missing, false) if destination.directory => {
            Err(format!("the directory {} does not exist", destination.path))
        }
        (There::File, false) | (There::Missing, _) => renamed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_makes_a_machine_unless_the_path_says_otherwise() {
        let guest = |machine: &str, path: &str| Side::Guest {
            machine: machine.into(),
            path: path.into(),
        };
        for (text, want) in [
            ("web:/etc/passwd", guest("web", "/etc/passwd")),
            ("web:etc", guest("web", "/etc")),
            ("web:", guest("web", "/")),
            ("web:a:b", guest("web", "/a:b")),
            ("-", Side::Stream),
            ("file", Side::Here("file".into())),
            ("./a:b", Side::Here("./a:b".into())),
            ("/a:b", Side::Here("/a:b".into())),
            ("dir/a:b", Side::Here("dir/a:b".into())),
        ] {
            assert_eq!(Side::parse(text), want, "{text}");
        }
    }

    #[test]
    fn the_end_of_a_path_says_how_it_is_meant() {
        for (text, path, name, contents, directory) in [
            ("/a/b", "/a/b", Some("b"), false, false),
            ("/a/b/", "/a/b", Some("b"), false, true),
            ("/a/b/.", "/a/b", Some("b"), true, true),
            ("/a/b/./", "/a/b", Some("b"), true, true),
            ("/", "/", None, true, true),
            ("/.", "/", None, true, true),
            (".", ".", None, true, true),
            ("..", "..", None, true, true),
            ("a", "a", Some("a"), false, false),
            ("a/..", "a/..", None, true, true),
        ] {
            let want = Named {
                path: path.into(),
                name: name.map(str::to_owned),
                contents,
                directory,
            };
            assert_eq!(Named::parse(text), want, "{text}");
        }
    }

    #[test]
    fn copies_land_where_docker_puts_them() {
        use There::{Dir, File, Missing};
        for (source, is_dir, destination, there, want) in [
            // A file.
            ("/s/f", false, "d", Missing, Ok((".", Some("d")))),
            ("/s/f", false, "/x/d", Missing, Ok(("/x", Some("d")))),
            ("/s/f", false, "/d", Missing, Ok(("/", Some("d")))),
            ("/s/f", false, "d/", Missing, Err("does not exist")),
            ("/s/f", false, "d", File, Ok((".", Some("d")))),
            ("/s/f", false, "d/", File, Err("not a directory")),
            ("/s/f", false, "d", Dir, Ok(("d", Some("f")))),
            ("/s/f", false, ".", Dir, Ok((".", Some("f")))),
            ("/s/f/", false, "d", Dir, Err("not a directory")),
            // A directory.
            ("/s/t", true, "d", Missing, Ok((".", Some("d")))),
            ("/s/t", true, "d/", Missing, Ok((".", Some("d")))),
            ("/s/t/.", true, "d", Missing, Ok((".", Some("d")))),
            ("/s/t", true, "d", File, Err("cannot replace")),
            ("/s/t", true, "d", Dir, Ok(("d", Some("t")))),
            ("/s/t/", true, "d/", Dir, Ok(("d", Some("t")))),
            ("/s/t/.", true, "d", Dir, Ok(("d", None))),
            ("/", true, "d", Dir, Ok(("d", None))),
            ("/", true, "d", Missing, Ok((".", Some("d")))),
        ] {
            let got = plan(
                &Named::parse(source),
                is_dir,
                &Named::parse(destination),
                there,
            );
            let case = format!("{source} to {destination} ({there:?}): {got:?}");
            match (got, want) {
                (Ok(plan), Ok((into, name))) => {
                    let top = name.map_or(Top::Contents, |name| Top::Named(name.to_owned()));
                    assert_eq!((plan.into.as_str(), plan.top), (into, top), "{case}");
                }
                (Err(error), Err(part)) => assert!(error.contains(part), "{case}"),
                _ => panic!("{case}"),
            }
        }
    }
}
