//! How much templates may take, and which go first.

use vistara_host::facts;

/// Share of the host's memory that templates may hold: forks use the same pages, so that it is not lost to them.
const MEMORY_SHARE: u64 = 8;
/// Bytes on disk: some forty templates of usual machines.
const DISK_BYTES: u64 = 4 << 30;

/// What templates may take together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) memory_bytes: u64,
    pub(super) disk_bytes: u64,
}

impl Limits {
    pub(super) fn of_this_host() -> Limits {
        Limits {
            memory_bytes: facts::memory_total().unwrap_or(0) / MEMORY_SHARE,
            disk_bytes: DISK_BYTES,
        }
    }
}

/// What one template takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) key: String,
    pub(super) bytes: u64,
    pub(super) used_ns: u64,
}

/// The templates that must go so that the others keep to the limit: those used longest ago, and never `fresh`.
pub(super) fn beyond(mut held: Vec<Held>, limit: u64, fresh: Option<&str>) -> Vec<String> {
    let mut total: u64 = held.iter().map(|held| held.bytes).sum();
    held.sort_by_key(|held| held.used_ns);
    let mut gone = Vec::new();
    for held in held {
        if total <= limit {
            break;
        }
        if Some(held.key.as_str()) == fresh {
            continue;
        }
        total = total.saturating_sub(held.bytes);
        gone.push(held.key);
    }
    gone
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
        assert_eq!(beyond(all.clone(), 150, None), [] as [&str; 0]);
        assert_eq!(beyond(all.clone(), 149, None), ["old"]);
        assert_eq!(beyond(all.clone(), 60, None), ["old", "middle"]);
        assert_eq!(beyond(all, 0, None), ["old", "middle", "new"]);
    }

    #[test]
    fn the_one_just_made_stays_even_where_it_is_too_large_alone() {
        let all = vec![held("fresh", 500, 1), held("other", 10, 2)];
        assert_eq!(beyond(all, 100, Some("fresh")), ["other"]);
    }
}
