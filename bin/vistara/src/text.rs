//! Words and numbers as people read them: tables, ages, and text of a guest's choosing made harmless.

use jiff::Timestamp;

/// The text with control characters spelled out, so that what a guest or an image says cannot drive the terminal.
/// Line ends stay where `lines` is set.
pub(crate) fn visible(text: &str, lines: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // Beside C0 and C1: marks that turn the direction of writing, with which one name can be shown as another.
        let turns = matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (c.is_control() && !(lines && c == '\n')) || turns {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// At most so many characters, the last an ellipsis where something was cut.
pub(crate) fn shorten(text: &str, count_max: usize) -> String {
    if text.chars().count() <= count_max {
        return text.to_owned();
    }
    let mut out: String = text.chars().take(count_max.saturating_sub(1)).collect();
    out.push('…');
    out
}

/// Rows in columns of equal width, two spaces apart, without trailing blanks.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut lines: Vec<Vec<String>> = vec![head.iter().map(|&cell| cell.to_owned()).collect()];
    lines.extend(
        rows.iter()
            .map(|row| row.iter().map(|cell| visible(cell, false)).collect()),
    );
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            lines
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    for row in &lines {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// How long ago, or how long, in the largest whole unit: `45 seconds`, `3 minutes`, `2 days`.
pub(crate) fn span(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (count, unit) = match seconds {
        ..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// Seconds between a time as the interface gives it and now; `None` where it makes no sense.
pub(crate) fn seconds_since(time: &str, now: Timestamp) -> Option<i64> {
    let then: Timestamp = time.parse().ok()?;
    Some(now.as_second() - then.as_second())
}

/// `3 minutes ago`, or the text itself where it is no time.
pub(crate) fn ago(time: &str, now: Timestamp) -> String {
    match seconds_since(time, now) {
        Some(seconds) => format!("{} ago", span(seconds)),
        None => time.to_owned(),
    }
}

/// A command line as one would type it.
pub(crate) fn command_line(words: &[String]) -> String {
    let plain = |word: &String| {
        !word.is_empty()
            && word
                .chars()
                .all(|c| c.is_alphanumeric() || "-_./:=,@%+".contains(c))
    };
    words
        .iter()
        .map(|word| {
            if plain(word) {
                word.clone()
            } else {
                format!("'{}'", word.replace('\'', r"'\''"))
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// The first twelve digits of an id, without its algorithm.
pub(crate) fn short_id(id: &str) -> &str {
    let digits = id.strip_prefix("sha256:").unwrap_or(id);
    digits.get(..12).unwrap_or(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_without_blanks() {
        let rows = vec![
            vec!["a".to_owned(), "long name".to_owned(), String::new()],
            vec!["bcd".to_owned(), "x".to_owned(), "y".to_owned()],
        ];
        assert_eq!(
            table(&["ID", "NAME", "PORTS"], &rows),
            "ID   NAME       PORTS\na    long name\nbcd  x          y\n"
        );
    }

    #[test]
    fn what_a_guest_says_cannot_drive_the_terminal() {
        assert_eq!(visible("a\u{1b}[2J\nb", false), "a\\u{1b}[2J\\nb");
        assert_eq!(visible("a\r\nb", true), "a\\r\nb");
        assert_eq!(visible("\u{202e}exe.txt", false), "\\u{202e}exe.txt");
        assert_eq!(visible("größe ✓", false), "größe ✓");
    }

    #[test]
    fn ages_use_their_largest_whole_unit() {
        for (seconds, text) in [
            (-3, "0 seconds"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "1 minute"),
            (7_300, "2 hours"),
            (200_000, "2 days"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn words_that_a_shell_would_split_are_quoted() {
        let words = ["sh", "-c", "echo 'x'", ""].map(str::to_owned);
        assert_eq!(command_line(&words), r"sh -c 'echo '\''x'\''' ''");
    }
}
