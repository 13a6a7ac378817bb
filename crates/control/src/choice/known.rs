//! Programs that have what makes processes in them, and are known to leave it alone when they are called in a certain way.
//!
//! A program says by its symbols what it could do, and its command line what it will. Nobody can read the second for programs
//! in general; for some that unikernels are there for, servers above all, their manuals say it. Each rule names the words that
//! keep the program from making processes, and every word that would make it do so after all, and is silent when in doubt.
//!
//! What a rule cannot see is the program's own configuration file. A rule stands here only where a setting there would be
//! contrary to the command line, where the file knows none, or where nobody would put it there: `curl`, `wget` and
//! `sqlite3` read files of the user's or the system's, in which authentication by NTLM or `background = on` would be found.
//! Should the program die of a process that it cannot make, the facts are corrected, and the command is for Linux from then on.

use vistara_model::{ProgramFacts, Runtime};

/// Why this program makes no processes when called with these words, where that is known. `arguments` are those after the
/// program's own name.
pub(super) fn makes_none(facts: &ProgramFacts, arguments: &[String]) -> Option<&'static str> {
    // One file under many names is another program than the one that a rule speaks of.
    let many = [Runtime::Busybox, Runtime::Shell];
    if facts.runtimes.iter().any(|runtime| many.contains(runtime)) {
        return None;
    }
    let name = file_name(&facts.path);
    let rule = RULES.iter().find(|rule| rule.program == name)?;
    let file = file_name(&facts.file);
    if file != name && !rule.files.contains(&file) {
        return None;
    }
    (rule.applies)(&Words(arguments)).then_some(rule.why)
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

struct Rule {
    program: &'static str,
    /// Names of files that are this program although a link leads to them.
    files: &'static [&'static str],
    applies: fn(&Words<'_>) -> bool,
    why: &'static str,
}

/// Settings of redis that leave it one process, without its data being saved in the background.
const REDIS_SETTINGS: &[&str] = &[
    "bind",
    "loglevel",
    "maxclients",
    "maxmemory",
    "maxmemory-policy",
    "port",
    "protected-mode",
    "requirepass",
    "tcp-backlog",
    "tcp-keepalive",
    "timeout",
];

const RULES: &[Rule] = &[
    Rule {
        program: "caddy",
        files: &[],
        // Not `run`, and no domain: making a certificate of its own known calls `sudo`.
        applies: |words| {
            matches!(words.first(), Some("file-server" | "respond"))
                && !words.option("domain")
                && !words.letter('d')
        },
        why: "caddy makes processes in other commands than this one",
    },
    Rule {
        program: "curl",
        files: &[],
        applies: |words| {
            let options = [
                "ntlm",
                "ntlm-wb",
                "anyauth",
                "proxy-ntlm",
                "proxy-anyauth",
                "config",
            ];
            !options.iter().any(|option| words.option(option)) && !words.letter('K')
        },
        why: "curl makes processes for NTLM only",
    },
    Rule {
        program: "gawk",
        files: &[],
        applies: awk_runs_nothing,
        why: "an awk program makes processes by a pipe or by system() only",
    },
    Rule {
        program: "mawk",
        files: &[],
        applies: awk_runs_nothing,
        why: "an awk program makes processes by a pipe or by system() only",
    },
    Rule {
        program: "memcached",
        files: &[],
        applies: |words| !words.letter('d') && !words.option("daemon"),
        why: "memcached makes a process only to go to the background",
    },
    Rule {
        program: "mosquitto",
        files: &[],
        applies: |words| !words.letter('d') && !words.option("daemon"),
        why: "mosquitto makes a process only to go to the background",
    },
    Rule {
        program: "nginx",
        files: &[],
        applies: |words| {
            words.directive("master_process", "off") && words.directive("daemon", "off")
        },
        why: "with master_process off and daemon off nginx stays one process",
    },
    Rule {
        program: "redis-server",
        // Debian's is a link to one of the others, which are all the same program.
        files: &["redis-check-rdb", "redis-check-aof"],
        applies: redis_saves_nothing,
        why: "without snapshots and append-only file redis makes no process to save its data",
    },
    Rule {
        program: "sqlite3",
        files: &[],
        // A command with a dot may run one of the system's, and so may the function that calls an editor.
        applies: |words| {
            words.0.iter().all(|word| {
                !word.starts_with('-')
                    && !word.to_ascii_lowercase().contains("edit")
                    && !word.lines().any(|line| line.trim_start().starts_with('.'))
            })
        },
        why: "SQL alone has sqlite3 make no process",
    },
    Rule {
        program: "wget",
        files: &[],
        applies: |words| {
            let options = ["background", "use-askpass", "execute", "config"];
            !options.iter().any(|option| words.option(option))
                && !words.letter('b')
                && !words.letter('e')
        },
        why: "wget makes processes only to go to the background or to ask for a password",
    },
];

/// The program stands in the first word, and has nothing that runs a command or asks which groups the user is in, which a
/// unikernel cannot tell; `@` calls functions by a made-up name.
fn awk_runs_nothing(words: &Words<'_>) -> bool {
    let risky = ["|", "system", "@", "PROCINFO", "SYMTAB"];
    words
        .first()
        .is_some_and(|program| !program.starts_with('-'))
        && !words
            .0
            .iter()
            .any(|word| risky.iter().any(|risk| word.contains(risk)))
}

/// Each setting is one word and its value the next, as redis reads them; any that is not known here may be a file with others.
fn redis_saves_nothing(words: &Words<'_>) -> bool {
    let mut saves = true;
    let mut pairs = words.0.chunks_exact(2);
    let known = pairs.all(|pair| {
        let Some(name) = pair[0].strip_prefix("--") else {
            return false;
        };
        let (name, value) = (name.to_ascii_lowercase(), pair[1].to_ascii_lowercase());
        // A value that looks like a setting is taken for one by some versions.
        !value.starts_with("--")
            && match &*name {
                "save" => {
                    saves = !value.is_empty();
                    true
                }
                "appendonly" | "daemonize" => value == "no",
                _ => REDIS_SETTINGS.contains(&&*name),
            }
    });
    known && words.0.len().is_multiple_of(2) && !saves
}

/// Arguments, read in the ways in which programs do.
struct Words<'a>(&'a [String]);

impl Words<'_> {
    fn first(&self) -> Option<&str> {
        self.0.first().map(String::as_str)
    }

    /// Whether `--name` or a beginning of it is there, alone or with a value: programs take options by any beginning that
    /// is no other's, and some with one dash.
    fn option(&self, name: &str) -> bool {
        self.0.iter().any(|word| {
            let long = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
            let long = long.and_then(|long| long.split('=').next());
            long.is_some_and(|long| !long.is_empty() && name.starts_with(long))
        })
    }

    /// Whether a group of short options may have this letter. What follows a letter in its word may be that one's value: it is
    /// taken for options all the same.
    fn letter(&self, letter: char) -> bool {
        self.0
            .iter()
            .any(|word| word.starts_with('-') && !word.starts_with("--") && word.contains(letter))
    }

    /// Whether this is set by the directives after the one `-g`, and not set otherwise there. Of several `-g` only the last
    /// counts, and one may hide in a group of options: then nothing is said.
    fn directive(&self, name: &str, value: &str) -> bool {
        let mut given = (self.0.iter().enumerate())
            .filter(|(_, word)| word.starts_with('-') && word.contains('g'));
        let (Some((at, only)), None) = (given.next(), given.next()) else {
            return false;
        };
        let Some(text) = self.0.get(at + 1).filter(|_| only == "-g") else {
            return false;
        };
        let mut found = text
            .split(';')
            .filter_map(|directive| directive.trim().split_once(char::is_whitespace))
            .filter(|(key, _)| *key == name)
            .map(|(_, set)| set.trim() == value)
            .peekable();
        found.peek().is_some() && found.all(|as_wished| as_wished)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_model::{Bytes, Confidence, Linkage, MayCreate, ProcessFacts, ProgramKind};

    fn facts(path: &str, file: &str, runtimes: &[Runtime]) -> ProgramFacts {
        ProgramFacts {
            path: path.to_owned(),
            file: file.to_owned(),
            kind: ProgramKind::Elf,
            executable: file.to_owned(),
            architecture: None,
            linkage: Some(Linkage::Dynamic),
            loader: None,
            libraries: Vec::new(),
            missing: Vec::new(),
            runtimes: runtimes.to_vec(),
            processes: ProcessFacts {
                may_create: MayCreate::Yes,
                confidence: Confidence::Certain,
                doubt: None,
                evidence: Vec::new(),
            },
            whole_system: Vec::new(),
            size: Bytes::mib(1),
        }
    }

    fn known_as(facts: &ProgramFacts, arguments: &[&str]) -> bool {
        let words: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        makes_none(facts, &words).is_some()
    }

    fn known(line: &[&str]) -> bool {
        let path = format!("/usr/bin/{}", line[0]);
        known_as(&facts(&path, &path, &[]), &line[1..])
    }

    #[test]
    fn words_that_keep_a_program_to_one_process() {
        for line in [
            &[
                "nginx",
                "-c",
                "/n.conf",
                "-g",
                "daemon off; master_process off;",
            ][..],
            &["nginx", "-g", "master_process  off;daemon off"],
            &["redis-server", "--save", "", "--protected-mode", "no"],
            &[
                "redis-server",
                "--save",
                "60 1",
                "--save",
                "",
                "--appendonly",
                "no",
            ],
            &["redis-server", "--SAVE", "", "--maxmemory", "100mb"],
            &["memcached", "-u", "root", "-m", "64"],
            &["mosquitto", "-c", "/m.conf"],
            &["caddy", "file-server", "--root", "/srv", "--listen", ":80"],
            &["curl", "-s", "http://host/"],
            &["wget", "-q", "-O", "-", "http://host/"],
            &["gawk", "BEGIN { print 6*7; exit 5 }"],
            &["mawk", "{ print $1 }", "/etc/passwd"],
            &[
                "sqlite3",
                "/tmp/x.db",
                "create table t(a); select sum(a) from t;",
            ],
        ] {
            assert!(known(line), "{line:?}");
        }
    }

    #[test]
    fn other_words_and_other_programs_are_not_known() {
        for line in [
            &["nginx"][..],
            &["nginx", "-g", "daemon off;"],
            &[
                "nginx",
                "-g",
                "daemon off; master_process off; master_process on;",
            ],
            &["nginx", "-c", "daemon off; master_process off;"],
            // Only the last counts.
            &["nginx", "-g", "daemon off;", "-g", "master_process off;"],
            &[
                "nginx",
                "-g",
                "daemon off; master_process off;",
                "-gworker_processes 1;",
            ],
            &["nginx", "-qg", "daemon off; master_process off;"],
            &["redis-server"],
            &["redis-server", "/etc/redis.conf", "--save", ""],
            &["redis-server", "--save", "", "--save", "60 1"],
            &["redis-server", "--save", "", "--save 60 1"],
            &["redis-server", "--save", "", "--save 60 1", "--port", "1"],
            &["redis-server", "--save", "", "--appendonly", "yes"],
            &["redis-server", "--save", "", "--Appendonly", "yes"],
            &["redis-server", "--save", "", "--daemonize", "yes"],
            &["redis-server", "--save", "", "--include", "/etc/redis.conf"],
            &["redis-server", "--save", "", "--replicaof", "h 1"],
            &["redis-server", "--port", "--save"],
            &["memcached", "-d"],
            &["memcached", "-vd"],
            &["memcached", "--daemon"],
            &["memcached", "--daem"],
            &["haproxy", "-db", "-f", "/h.cfg"],
            &["mosquitto", "-d", "-c", "/m.conf"],
            &["caddy", "run"],
            &["caddy", "start"],
            &["caddy", "file-server", "--domain", "example.com"],
            &["caddy", "file-server", "-d", "example.com"],
            &["caddy", "file-server", "-domain=example.com"],
            &["curl", "--ntlm", "http://host/"],
            &["curl", "--anyauth", "http://host/"],
            &["curl", "-sKfile"],
            &["curl", "--config=/x", "http://host/"],
            &["wget", "-b", "http://host/"],
            &["wget", "-qb", "http://host/"],
            &["wget", "--background", "http://host/"],
            &["wget", "-e", "background=on", "http://host/"],
            &["wget", "--use-ask=/bin/ask", "http://host/"],
            &["gawk", "BEGIN { \"ls\" | getline }"],
            &["gawk", "BEGIN { system(\"ls\") }"],
            &["gawk", "BEGIN { f = \"sys\" \"tem\"; @f(\"ls\") }"],
            &["gawk", "-f", "/x.awk"],
            &["gawk"],
            &["mawk", "-W", "exec", "/x.awk"],
            &["sqlite3", "/tmp/x.db", ".shell ls"],
            &["sqlite3", "/tmp/x.db", "select 1;\n .system ls"],
            &["sqlite3", "/tmp/x.db", "select EDIT('x')"],
            &["sqlite3", "-cmd", ".shell ls", "/tmp/x.db"],
            &["sqlite3", "-init", "/x", "/tmp/x.db"],
            &["lighttpd", "-D"],
            &["bash", "-c", "true"],
        ] {
            assert!(!known(line), "{line:?}");
        }
    }

    #[test]
    fn a_rule_speaks_of_the_program_itself_not_of_a_link_to_another() {
        let url = ["-q", "https://host/"];
        let wget = facts("/usr/bin/wget", "/usr/bin/wget", &[]);
        assert!(known_as(&wget, &url));
        let applet = facts("/usr/bin/wget", "/bin/busybox", &[Runtime::Busybox]);
        assert!(!known_as(&applet, &url));
        // Copied there, not linked.
        let copy = facts("/usr/bin/wget", "/usr/bin/wget", &[Runtime::Busybox]);
        assert!(!known_as(&copy, &url));
        let link = facts("/usr/bin/wget", "/usr/bin/wget2", &[]);
        assert!(!known_as(&link, &url));
        let debians = facts("/usr/bin/redis-server", "/usr/bin/redis-check-rdb", &[]);
        assert!(known_as(&debians, &["--save", ""]));
    }
}
