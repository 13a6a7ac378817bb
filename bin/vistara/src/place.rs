//! `--on any`: a node is chosen for a machine, among this one and those that have given a grant.

use crate::failure::{Failure, eprint_line};
use crate::run_options::{ImageSource, RunOptions, head_and_command};
use crate::text::visible;
use clap::Args;
use vistara_api::{Client, PlaceRequest, Placed};

/// What `--on` takes in place of a node.
pub(crate) const ANY: &str = "any";

/// How a node is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Args)]
pub(crate) struct PlaceOptions {
    /// With --on any: spread, pack, nearest, cheapest, image-local, or a file with hypercore's policy
    #[arg(long, value_name = "POLICY", help_heading = "Choice of a node")]
    pub(crate) place: Option<String>,
    /// With --on any: in one of these regions
    #[arg(
        long,
        value_name = "REGION",
        value_delimiter = ',',
        help_heading = "Choice of a node"
    )]
    pub(crate) region: Vec<String>,
    /// With --on any: on a node with these labels or capabilities (kvm, ssd, …)
    #[arg(
        long,
        value_name = "LABEL",
        value_delimiter = ',',
        help_heading = "Choice of a node"
    )]
    pub(crate) capable: Vec<String>,
    /// With --on any: for at most so much (millionths for a GiB of memory and hour)
    #[arg(long, value_name = "PRICE", help_heading = "Choice of a node")]
    pub(crate) max_price: Option<u64>,
}

impl PlaceOptions {
    /// Whether anything was said.
    pub(crate) fn any(&self) -> bool {
        *self != PlaceOptions::default()
    }
}

/// The policy's name, or what stands in the file of this name.
pub(crate) fn policy(text: Option<&String>) -> Result<(Option<String>, Option<String>), Failure> {
    match text {
        Some(path) if path.contains(['/', '.']) => {
            let rules = std::fs::read_to_string(path).map_err(|error| {
                Failure::because(format!("cannot read the policy {path}"), error)
            })?;
            Ok((None, Some(rules)))
        }
        name => Ok((name.cloned(), None)),
    }
}

/// Chooses, and says whom where that is asked for.
pub(crate) async fn choose(
    local: &Client,
    options: &RunOptions,
    apart_from: Vec<String>,
) -> Result<Placed, Failure> {
    let (image, _) = head_and_command(&options.words);
    let image = match ImageSource::parse(image) {
        ImageSource::Named(name) => Some(name),
        ImageSource::Path(_) => None,
    };
    let (policy, rules) = policy(options.place.place.as_ref())?;
    let request = PlaceRequest {
        image,
        memory: options.memory.clone(),
        cpus: options.cpus.clone(),
        hypervisor: options.hypervisor.clone(),
        policy,
        rules,
        regions: options.place.region.clone(),
        capabilities: options.place.capable.clone(),
        price_micros_max: options.place.max_price,
        apart_from,
    };
    let placed = local.place(&request).await?;
    for field in &placed.ignored {
        eprint_line(&format!(
            "vistara: {} in the policy is not known and has no effect",
            visible(field, false)
        ));
    }
    if options.explain {
        for line in &placed.reasons {
            eprint_line(&visible(line, false));
        }
    } else if !options.quiet {
        eprint_line(&format!("on {}", visible(&placed.name, false)));
    }
    Ok(placed)
}

/// A client of the chosen node, under its offer; and its name, where it is another.
pub(crate) async fn place(
    local: &Client,
    options: &RunOptions,
) -> Result<(Client, Option<String>), Failure> {
    let placed = choose(local, options, Vec::new()).await?;
    if placed.here {
        return Ok((local.local().under(placed.offer), None));
    }
    let client = local.on(placed.node).under(placed.offer);
    Ok((client, Some(placed.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_a_name_or_a_file() {
        assert_eq!(
            policy(Some(&"pack".to_owned())).ok(),
            Some((Some("pack".to_owned()), None))
        );
        assert!(policy(Some(&"./none.json".to_owned())).is_err());
        let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
        let file = dir.path().join("p.json");
        let written = std::fs::write(&file, "{}");
        assert!(written.is_ok());
        let found = policy(Some(&file.to_string_lossy().into_owned())).ok();
        assert_eq!(found, Some((None, Some("{}".to_owned()))));
    }
}
