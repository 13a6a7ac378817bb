//! The options of our kernel, and whether a source takes them.

/// The options, each with its reason where that is not plain.
pub(super) const TEXT: &str = include_str!("x86_64.config");

/// Marks an option without which a kernel is a good one still: sources name it differently.
const OPTIONAL: &str = "#? ";

/// What the text asks for, each `CONFIG_X=value`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    required: Vec<&'a str>,
    optional: Vec<&'a str>,
}

/// Our options.
pub(super) fn wanted() -> Wanted<'static> {
    Wanted::parse(TEXT)
}

impl<'a> Wanted<'a> {
    fn parse(text: &'a str) -> Wanted<'a> {
        let options = |prefix: &'static str| {
            let lines = text
                .lines()
                .filter_map(move |line| line.strip_prefix(prefix));
            lines.filter(|line| line.starts_with("CONFIG_")).collect()
        };
        Wanted {
            required: options(""),
            optional: options(OPTIONAL),
        }
    }

    /// What Kconfig is told.
    pub(super) fn fragment(&self) -> String {
        let lines = self.required.iter().chain(&self.optional);
        lines.map(|line| format!("{line}\n")).collect()
    }

    /// Which options Kconfig has not taken: those that are required, and those that are not.
    pub(super) fn lost(&self, made: &str) -> (Vec<String>, Vec<String>) {
        let made: std::collections::BTreeSet<&str> = made.lines().collect();
        let of = |wanted: &[&str]| {
            let lost = wanted.iter().filter(|line| !made.contains(*line));
            lost.map(|line| (*line).to_owned()).collect()
        };
        (of(&self.required), of(&self.optional))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_required_option_that_was_not_taken_is_told_from_an_optional_one() {
        let wanted = Wanted::parse("# why\nCONFIG_A=y\nCONFIG_B=7\n#? CONFIG_C=y\n#? CONFIG_D=y\n");
        assert_eq!(
            wanted.fragment(),
            "CONFIG_A=y\nCONFIG_B=7\nCONFIG_C=y\nCONFIG_D=y\n"
        );
        let (lost, unknown) =
            wanted.lost("CONFIG_A=y\nCONFIG_B=8\n# CONFIG_D is not set\nCONFIG_C=y\n");
        assert_eq!(lost, ["CONFIG_B=7"]);
        assert_eq!(unknown, ["CONFIG_D=y"]);
    }

    #[test]
    fn every_line_of_ours_is_an_option_that_is_built_in_or_a_comment() {
        let wanted = wanted();
        for line in wanted.required.iter().chain(&wanted.optional) {
            let (name, value) = line.split_once('=').unwrap();
            assert!(!value.is_empty() && value != "m" && value != "n", "{line}");
            let again = wanted.required.iter().chain(&wanted.optional);
            let same = again.filter(|other| other.split_once('=').unwrap().0 == name);
            assert_eq!(same.count(), 1, "{name} stands there more than once");
        }
        for line in TEXT.lines() {
            let known = line.is_empty() || line.starts_with("# ") || line.starts_with("#? CONFIG_");
            assert!(known || line.starts_with("CONFIG_"), "{line}");
        }
    }

    #[test]
    fn kernels_that_are_built_are_known_by_their_release() {
        let release = wanted();
        let suffix = format!("CONFIG_LOCALVERSION=\"{}\"", super::super::OWN_RELEASE);
        assert!(release.required.contains(&suffix.as_str()));
    }
}
