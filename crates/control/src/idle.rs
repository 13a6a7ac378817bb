//! When a node that nobody needs may leave.

use std::time::Duration;

/// How long a node stays without anything to do. Absent: for ever, as a service does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdlePolicy {
    /// The time without need after which it leaves.
    pub leave_after: Option<Duration>,
}

/// What may need a node at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    /// Machines that have not ended.
    pub machines_active: usize,
    /// Requests and streams under way.
    pub requests_open: usize,
    /// Time since either of the two was last above zero.
    pub quiet_for: Duration,
}

impl IdlePolicy {
    /// Whether to leave now.
    pub fn leaves(self, presence: Presence) -> bool {
        match self.leave_after {
            None => false,
            Some(limit) => {
                presence.machines_active == 0
                    && presence.requests_open == 0
                    && presence.quiet_for >= limit
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_leaves_only_when_nothing_needs_it_for_long_enough() {
        let policy = IdlePolicy {
            leave_after: Some(Duration::from_secs(60)),
        };
        let quiet = Presence {
            machines_active: 0,
            requests_open: 0,
            quiet_for: Duration::from_secs(60),
        };
        assert!(policy.leaves(quiet));
        assert!(!policy.leaves(Presence {
            machines_active: 1,
            ..quiet
        }));
        assert!(!policy.leaves(Presence {
            requests_open: 1,
            ..quiet
        }));
        assert!(!policy.leaves(Presence {
            quiet_for: Duration::from_secs(59),
            ..quiet
        }));
        assert!(!IdlePolicy { leave_after: None }.leaves(quiet));
    }
}
