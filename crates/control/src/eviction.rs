//! Which of the things that are kept for speed must go so that the rest keeps to a bound.

/// One kept thing: what it takes, and when it was of use last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its name.
    pub key: String,
    /// What it takes, in bytes.
    pub bytes: u64,
    /// When it was used last, in nanoseconds since 1970.
    pub used_ns: u64,
}

/// The names of what must go so that the rest takes at most `limit` bytes: those used longest ago, no more of them than
/// needed, and never `fresh`, however much it takes. The first to go comes first.
pub fn evict(mut held: Vec<Held>, limit: u64, fresh: Option<&str>) -> Vec<String> {
    let mut total: u128 = held.iter().map(|held| u128::from(held.bytes)).sum();
    held.sort_by_key(|held| held.used_ns);
    let mut gone = Vec::new();
    for held in held {
        if total <= u128::from(limit) {
            break;
        }
        if Some(held.key.as_str()) == fresh {
            continue;
        }
        total -= u128::from(held.bytes);
        gone.push(held.key);
    }
    gone
}

/// The names of what was not used since `before_ns` (nanoseconds since 1970).
pub fn unused_since(held: &[Held], before_ns: u64) -> Vec<String> {
    let unused = held.iter().filter(|held| held.used_ns < before_ns);
    unused.map(|held| held.key.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(key: &str, bytes: u64, used_ns: u64) -> Held {
        Held {
            key: key.to_owned(),
            bytes,
            used_ns,
        }
    }

    #[test]
    fn those_used_longest_ago_go_first_and_no_more_than_needed() {
        let all = vec![
            held("new", 50, 9),
            held("old", 50, 1),
            held("middle", 50, 5),
        ];
        assert_eq!(evict(all.clone(), 150, None), [] as [&str; 0]);
        assert_eq!(evict(all.clone(), 149, None), ["old"]);
        assert_eq!(evict(all.clone(), 60, None), ["old", "middle"]);
        assert_eq!(evict(all, 0, None), ["old", "middle", "new"]);
    }

    #[test]
    fn the_one_just_made_stays_even_where_it_is_too_large_alone() {
        let all = vec![held("fresh", 500, 1), held("other", 10, 2)];
        assert_eq!(evict(all, 100, Some("fresh")), ["other"]);
    }

    #[test]
    fn sizes_that_nobody_has_do_not_overflow() {
        let all = vec![held("one", u64::MAX, 1), held("two", u64::MAX, 2)];
        assert_eq!(evict(all, u64::MAX - 1, None), ["one", "two"]);
    }

    #[test]
    fn what_was_used_at_the_moment_itself_counts_as_used() {
        let all = vec![held("before", 1, 9), held("at", 1, 10)];
        assert_eq!(unused_since(&all, 10), ["before"]);
    }
}
