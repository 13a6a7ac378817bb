//! Finding a machine by what a user typed: a whole id, a name, or the beginning of an id.

/// Why a text leads to no machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// None has it.
    #[error("there is no machine {0:?}")]
    NotFound(String),
    /// Several ids begin so.
    #[error("{prefix:?} is the beginning of {count} machines' ids; type more of it")]
    Ambiguous {
        /// What was typed.
        prefix: String,
        /// How many begin so.
        count: usize,
    },
}

/// The id that `typed` means among `(id, name)` pairs. A name wins over an id prefix, a whole id over both.
///
/// # Errors
/// [`LookupError`].
pub fn lookup<'a>(
    typed: &str,
    machines: impl Iterator<Item = (&'a str, &'a str)> + Clone,
) -> Result<&'a str, LookupError> {
    if let Some((id, _)) = machines.clone().find(|(id, _)| *id == typed) {
        return Ok(id);
    }
    if let Some((id, _)) = machines.clone().find(|(_, name)| *name == typed) {
        return Ok(id);
    }
    let mut matches = machines.filter(|(id, _)| !typed.is_empty() && id.starts_with(typed));
    match (matches.next(), matches.count()) {
        (None, _) => Err(LookupError::NotFound(typed.to_owned())),
        (Some((id, _)), 0) => Ok(id),
        (Some(_), more) => Err(LookupError::Ambiguous {
            prefix: typed.to_owned(),
            count: more + 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINES: [(&str, &str); 3] = [("aa11", "web"), ("aa22", "db"), ("bb33", "aa")];

    #[test]
    fn a_name_wins_over_a_prefix_and_prefixes_must_be_unambiguous() {
        let find = |typed| lookup(typed, MACHINES.into_iter());
        assert_eq!(find("aa11"), Ok("aa11"));
        assert_eq!(find("db"), Ok("aa22"));
        assert_eq!(find("aa"), Ok("bb33"));
        assert_eq!(find("b"), Ok("bb33"));
        assert_eq!(
            find("a"),
            Err(LookupError::Ambiguous {
                prefix: "a".into(),
                count: 2
            })
        );
        assert_eq!(find("zz"), Err(LookupError::NotFound("zz".into())));
        assert_eq!(find(""), Err(LookupError::NotFound(String::new())));
    }
}
