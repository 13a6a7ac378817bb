//! A command as a line of text, as words: without a shell where it needs none, so that images without one run it, too.

/// What only a shell understands, where it stands outside quotes.
const SHELLS: &str = "|&;<>()$`*?[]{}~#\n";

/// The words of a line, or `/bin/sh -c` with the line where it is more than words.
pub(super) fn command(line: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut letters = line.trim().chars();
    let mut needs_shell = false;
    while let Some(letter) = letters.next() {
        match letter {
            ' ' | '\t' => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match letters.next() {
                        Some('\'') => break,
                        Some(letter) => word.push(letter),
                        None => return Err("a ' is not closed"),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match letters.next() {
                        Some('"') => break,
                        Some('\\') => match letters.next() {
                            Some(letter @ ('"' | '\\')) => word.push(letter),
                            // What a shell makes of the others is left to a shell.
                            Some(_) => needs_shell = true,
                            None => return Err("a \" is not closed"),
                        },
                        Some('$' | '`') => needs_shell = true,
                        Some(letter) => word.push(letter),
                        None => return Err("a \" is not closed"),
                    }
                }
            }
            '\\' => match letters.next() {
                Some(letter) => word.get_or_insert_default().push(letter),
                None => return Err("it ends with a \\"),
            },
            letter if SHELLS.contains(letter) => needs_shell = true,
            letter => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    // `NAME=value program` sets a variable only in a shell.
    let assigns = words.first().is_some_and(|word| word.contains('='));
    if needs_shell || assigns {
        return Ok(vec!["/bin/sh".to_owned(), "-c".to_owned(), line.to_owned()]);
    }
    match words.first() {
        Some(program) if !program.is_empty() => Ok(words),
        _ => Err("it names no program"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_words_need_no_shell_and_anything_else_gets_one() {
        for (line, words) in [
            (
                "python3 -m http.server 8000",
                vec!["python3", "-m", "http.server", "8000"],
            ),
            ("  a\t b  ", vec!["a", "b"]),
            (
                "echo 'a b' \"c \\\"d\\\"\" e\\ f ''",
                vec!["echo", "a b", "c \"d\"", "e f", ""],
            ),
            ("echo 'a|b $x'", vec!["echo", "a|b $x"]),
        ] {
            assert_eq!(command(line).unwrap(), words, "{line}");
        }
        for line in [
            "a | b",
            "a && b",
            "echo $HOME",
            "echo \"$HOME\"",
            "A=1 env",
            "ls *.txt",
            "a; b",
            "echo \"\\n\"",
        ] {
            assert_eq!(command(line).unwrap(), ["/bin/sh", "-c", line], "{line}");
        }
        for line in ["echo 'a", "echo \"a", "echo \"a\\", "a\\", "''"] {
            assert!(command(line).is_err(), "{line}");
        }
    }
}
