//! Programs that have what makes processes in them, and are known to leave it alone when they are called in a certain way.
//!
//! A program says by its symbols what it could do, and its command line what it will. Nobody can read the second for programs
//! in general; for some that unikernels are there for, servers above all, their manuals say it. Each rule names the words that
//! keep the program from making processes, and every word that would make it do so after all, and is silent when in doubt.
//!
//! What a rule cannot see is the program's own configuration file, where one may say the contrary. A rule stands here only
//! where such a setting would be contrary to the command line, or where the file knows none.
//! Should the program die of a process that it cannot make, the facts are corrected, and the command is for Linux from then on.

/// Why the program of this name makes no processes when called with these words, where that is known. `arguments` are those
/// after the program's own name.
pub(super) fn makes_none(name: &str, arguments: &[String]) -> Option<&'static str> {
    let words = Words(arguments);
    let rule = RULES.iter().find(|rule| rule.program == name)?;
    (rule.applies)(&words).then_some(rule.why)
}

struct Rule {
    program: &'static str,
    applies: fn(&Words<'_>) -> bool,
    why: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        program: "caddy",
        // Not `run`: a site with a certificate of its own making calls `sudo` to make it known.
        applies: |words| {
            matches!(words.first(), Some("file-server" | "respond")) && !words.option("domain")
        },
        why: "caddy makes processes in other commands than this one",
    },
    Rule {
        program: "curl",
        applies: |words| {
            !words.option("ntlm")
                && !words.option("ntlm-wb")
                && !words.option("config")
                && !words.letter('K')
        },
        why: "curl makes processes for NTLM only",
    },
    Rule {
        program: "memcached",
        applies: |words| !words.letter('d') && !words.option("daemon"),
        why: "memcached makes a process only to go to the background",
    },
    Rule {
        program: "mosquitto",
        applies: |words| !words.letter('d') && !words.option("daemon"),
        why: "mosquitto makes a process only to go to the background",
    },
    Rule {
        program: "nginx",
        applies: |words| {
            words.directive("master_process", "off") && words.directive("daemon", "off")
        },
        why: "with master_process off and daemon off nginx stays one process",
    },
    Rule {
        program: "redis-server",
        // A file of settings may turn on what these words do not speak of.
        applies: |words| {
            words.first().is_some_and(|word| word.starts_with("--"))
                && words.value("save") == Some("")
                && matches!(words.value("appendonly"), None | Some("no"))
                && matches!(words.value("daemonize"), None | Some("no"))
        },
        why: "without snapshots and append-only file redis makes no process to save its data",
    },
    Rule {
        program: "wget",
        applies: |words| {
            !words.letter('b')
                && !words.option("background")
                && !words.option("use-askpass")
                && !words.letter('e')
                && !words.option("execute")
                && !words.option("config")
        },
        why: "wget makes processes only to go to the background or to ask for a password",
    },
];

/// Arguments, read in the ways in which programs do.
struct Words<'a>(&'a [String]);

impl Words<'_> {
    fn first(&self) -> Option<&str> {
        self.0.first().map(String::as_str)
    }

    /// Whether `--name` or a beginning of it is there, alone or with a value: programs take options by any beginning that
    /// is no other's.
    fn option(&self, name: &str) -> bool {
        self.0.iter().any(|word| {
            let Some(long) = word.strip_prefix("--") else {
                return false;
            };
            let long = long.split('=').next().unwrap_or_default();
            !long.is_empty() && name.starts_with(long)
        })
    }

    /// Whether a group of short options may have this letter. What follows a letter in its word may be that one's value: it is
    /// taken for options all the same.
    fn letter(&self, letter: char) -> bool {
        self.0
            .iter()
            .any(|word| word.starts_with('-') && !word.starts_with("--") && word.contains(letter))
    }

    /// The last value of `--name VALUE`.
    fn value(&self, name: &str) -> Option<&str> {
        let mut found = None;
        for pair in self.0.windows(2) {
            if pair[0].strip_prefix("--") == Some(name) {
                found = Some(pair[1].as_str());
            }
        }
        found
    }

    /// Whether this is set by the directives after `-g`, and not set otherwise there.
    fn directive(&self, name: &str, value: &str) -> bool {
        let given = self.0.windows(2).filter(|pair| pair[0] == "-g");
        let mut found = given
            .flat_map(|pair| pair[1].split(';'))
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

    fn known(line: &[&str]) -> bool {
        let words: Vec<String> = line[1..].iter().map(ToString::to_string).collect();
        makes_none(line[0], &words).is_some()
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
            &["nginx", "-g", "daemon off;", "-g", "master_process  off"],
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
            &["memcached", "-u", "root", "-m", "64"],
            &["mosquitto", "-c", "/m.conf"],
            &["caddy", "file-server", "--root", "/srv", "--listen", ":80"],
            &["curl", "-s", "http://host/"],
            &["wget", "-q", "-O", "-", "http://host/"],
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
            &["redis-server"],
            &["redis-server", "/etc/redis.conf", "--save", ""],
            &["redis-server", "--save", "", "--save", "60 1"],
            &["redis-server", "--save", "", "--appendonly", "yes"],
            &["redis-server", "--save", "", "--daemonize", "yes"],
            &["memcached", "-d"],
            &["memcached", "-vd"],
            &["memcached", "--daemon"],
            &["memcached", "--daem"],
            &["haproxy", "-f", "/h.cfg"],
            &["mosquitto", "-d", "-c", "/m.conf"],
            &["caddy", "run"],
            &["caddy", "start"],
            &["caddy", "file-server", "--domain", "example.com"],
            &["curl", "--ntlm", "http://host/"],
            &["curl", "-sKfile"],
            &["curl", "--config=/x", "http://host/"],
            &["wget", "-b", "http://host/"],
            &["wget", "-qb", "http://host/"],
            &["wget", "--background", "http://host/"],
            &["wget", "-e", "background=on", "http://host/"],
            &["wget", "--use-ask=/bin/ask", "http://host/"],
            &["lighttpd", "-D"],
            &["bash", "-c", "true"],
        ] {
            assert!(!known(line), "{line:?}");
        }
    }
}
