//! Which workspace crate may depend on which: `layers.toml` against what cargo sees.

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// `layers.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Layers {
    /// Every workspace crate, with those that it may depend on.
    crates: BTreeMap<String, BTreeSet<String>>,
    /// What its tests may use beside these.
    #[serde(default)]
    dev: BTreeMap<String, BTreeSet<String>>,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    /// Set for dependencies within the workspace.
    path: Option<String>,
}

/// Fails with one line for each disagreement.
pub(crate) fn check(root: &Path) -> Result<()> {
    let path = root.join("layers.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path:?}"))?;
    let layers: Layers = toml::from_str(&text).context("layers.toml")?;
    let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("run cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let faults = faults(&layers, &metadata);
    if !faults.is_empty() {
        bail!(
            "layers.toml and the crates disagree:\n  {}",
            faults.join("\n  ")
        );
    }
    let edges: usize = layers.crates.values().map(BTreeSet::len).sum();
    println!(
        "layers: {} crates, {edges} edges, as layers.toml says",
        layers.crates.len()
    );
    Ok(())
}

fn faults(layers: &Layers, metadata: &Metadata) -> Vec<String> {
    let mut faults = Vec::new();
    for package in &metadata.packages {
        let name = &package.name;
        let Some(allowed) = layers.crates.get(name) else {
            faults.push(format!(
                "{name} is not listed: add `{name} = [...]` under [crates]"
            ));
            continue;
        };
        let mut used = BTreeSet::new();
        for dependency in package.dependencies.iter().filter(|d| d.path.is_some()) {
            let target = &dependency.name;
            let dev = dependency.kind.as_deref() == Some("dev");
            let dev_allowed = layers
                .dev
                .get(name)
                .is_some_and(|names| names.contains(target));
            if !dev {
                used.insert(target);
            }
            if allowed.contains(target) || (dev && (dev_allowed || target == name)) {
                continue;
            }
            faults.push(if dev {
                format!(
                    "{name}'s tests use {target}: if they must, add `{name} = [\"{target}\"]` under [dev]"
                )
            } else {
                format!(
                    "{name} depends on {target}: remove the dependency, or make the new edge a commit of its own that gives the reason and adds it to {name}'s line"
                )
            });
        }
        for unused in allowed.iter().filter(|target| !used.contains(target)) {
            // An edge that is allowed and not there yet is no fault, but one to a crate that is gone is.
            if metadata
                .packages
                .iter()
                .all(|package| package.name != *unused)
            {
                faults.push(format!(
                    "{name} may use {unused}, which does not exist: remove it"
                ));
            }
        }
    }
    for name in layers.crates.keys().chain(layers.dev.keys()) {
        if metadata
            .packages
            .iter()
            .all(|package| package.name != *name)
        {
            faults.push(format!(
                "{name} is listed and does not exist: remove its line"
            ));
        }
    }
    if let Some(circle) = circle(layers) {
        faults.push(format!("there is a circle: {}", circle.join(" -> ")));
    }
    faults
}

/// A chain of allowed edges that ends where it began, if there is one.
fn circle(layers: &Layers) -> Option<Vec<String>> {
    fn walk(layers: &Layers, trail: &mut Vec<String>, done: &mut BTreeSet<String>) -> bool {
        let Some(name) = trail.last().cloned() else {
            return false;
        };
        for next in layers.crates.get(&name).into_iter().flatten() {
            let again = trail.contains(next);
            if !again && done.contains(next) {
                continue;
            }
            trail.push(next.clone());
            if again || walk(layers, trail, done) {
                return true;
            }
            trail.pop();
        }
        done.insert(name);
        false
    }
    let mut done = BTreeSet::new();
    layers.crates.keys().find_map(|name| {
        let mut trail = vec![name.clone()];
        walk(layers, &mut trail, &mut done).then_some(trail)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(layers: &str, packages: &str) -> Vec<String> {
        let layers: Layers = toml::from_str(layers).unwrap();
        faults(&layers, &serde_json::from_str(packages).unwrap())
    }

    const TWO: &str = r#"{"packages":[
        {"name":"low","dependencies":[{"name":"serde","kind":null}]},
        {"name":"high","dependencies":[
            {"name":"low","kind":null,"path":"/x"},
            {"name":"fake","kind":"dev","path":"/y"}]},
        {"name":"fake","dependencies":[]}]}"#;

    #[test]
    fn what_is_listed_is_allowed() {
        let layers = "[crates]\nlow=[]\nfake=[]\nhigh=['low']\n[dev]\nhigh=['fake']";
        assert_eq!(found(layers, TWO), Vec::<String>::new());
    }

    #[test]
    fn a_new_edge_a_test_edge_and_an_unlisted_crate_are_told_with_what_to_do() {
        let faults = found("[crates]\nlow=[]\nhigh=[]\ngone=[]", TWO).join("\n");
        for part in [
            "high depends on low: remove",
            "high's tests use fake",
            "under [dev]",
            "fake is not listed",
            "gone is listed and does not exist",
        ] {
            assert!(faults.contains(part), "{part} in {faults}");
        }
    }

    #[test]
    fn a_circle_is_found() {
        let faults = found(
            "[crates]\nlow=['high']\nfake=[]\nhigh=['low']\n[dev]\nhigh=['fake']",
            TWO,
        );
        assert_eq!(faults, ["there is a circle: high -> low -> high"]);
    }
}
