//! Three nodes that know each other, of which the first may run machines on the other two.

use super::two::said;
use super::{System, text};
use std::time::{Duration, Instant};

/// A lease, a search, and a boot under emulation on a busy machine.
pub(crate) const BOUND: Duration = Duration::from_secs(180);

/// What becomes true within the bound.
pub(crate) fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    while begin.elapsed() < BOUND {
        if let Some(found) = found() {
            return found;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("it does not come to be: {what}");
}

/// They leave when the test ends.
pub(crate) struct Three {
    pub(crate) systems: Vec<System>,
    pub(crate) ids: Vec<String>,
}

impl Drop for Three {
    fn drop(&mut self) {
        for kind in ["service", "task"] {
            let all = text(&self.systems[0].vistara(&[kind, "ls", "-q"]).stdout);
            for one in all.split_whitespace() {
                self.systems[0].vistara(&[kind, "rm", one]);
            }
        }
        for system in &self.systems {
            for machine in text(&system.vistara(&["ps", "-aq"]).stdout).split_whitespace() {
                system.vistara(&["rm", "-f", machine]);
            }
            system.vistara(&["node", "leave"]);
            system.vistara(&["node", "stop"]);
        }
    }
}

impl Three {
    /// Their names begin with this one.
    pub(crate) fn joined(name: &str) -> Option<Three> {
        let mut systems = Vec::new();
        for letter in ["a", "b", "c"] {
            systems.push(System::ready_as(&format!("{name}-{letter}"))?);
        }
        let ids = systems.iter().map(|system| said(system, &["id"])).collect();
        let three = Three { systems, ids };
        let a = &three.systems[0];
        let listen = ["node", "ticket", "--listen", "127.0.0.1:0"];
        for other in &three.systems[1..] {
            let ticket = said(other, &listen);
            let grant = [
                "grant",
                "--to",
                &three.ids[0],
                "--for",
                "run",
                "--until",
                "1h",
            ];
            let token = said(other, &grant);
            said(a, &["node", "join", &ticket, "--grant", &token]);
        }
        // The joined two hear of each other by the first.
        for system in &three.systems {
            until("everybody knows everybody", || {
                let nodes: serde_json::Value =
                    serde_json::from_str(&said(system, &["nodes", "--json"])).unwrap();
                let alive = nodes
                    .as_array()?
                    .iter()
                    .filter(|node| node["life"] == "alive");
                (alive.count() == 2).then_some(())
            });
        }
        Some(three)
    }

    /// Which of them has this id.
    pub(crate) fn index(&self, id: &str) -> usize {
        self.ids.iter().position(|one| one == id).unwrap()
    }
}
