//! What is done about the machine of a deployment's name: a decision over what was asked for and the labels of what is there. Pure.

use crate::failure::Failure;
use serde::Serialize;
use sha2::{Digest, Sha256};
use vistara_api::{Machine, RunRequest};

/// Label with the digest of all that was asked for.
pub(super) const CONTENT: &str = "vistara.deploy";
/// Label with the name as it stands in the file.
pub(super) const NAME: &str = "hac.name";

/// What was or would be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// There was none.
    Created,
    /// There was another.
    Replaced,
    /// It is there as it has to be.
    Unchanged,
}

impl State {
    pub(super) fn words(self, dry: bool) -> &'static str {
        match (self, dry) {
            (State::Created, false) => "created",
            (State::Created, true) => "would be created",
            (State::Replaced, false) => "replaced",
            (State::Replaced, true) => "would be replaced",
            (State::Unchanged, _) => "unchanged",
        }
    }
}

/// All that has an effect, in a form of its own: a version that knows more options must not take an old machine for another.
#[derive(Serialize)]
struct Content<'a> {
    image: &'a str,
    command: &'a [String],
    cpus: &'a Option<String>,
    memory: &'a Option<String>,
    disk: &'a Option<String>,
    env: &'a [String],
    ports: &'a [String],
    hypervisor: &'a Option<String>,
    stop_signal: &'a Option<String>,
}

/// The value of [`CONTENT`]. It tells equal from different, and hides no secret that can be guessed.
pub(super) fn content(request: &RunRequest) -> Result<String, Failure> {
    let content = Content {
        image: &request.image,
        command: &request.command,
        cpus: &request.cpus,
        memory: &request.memory,
        disk: &request.disk,
        env: &request.env,
        ports: &request.ports,
        hypervisor: &request.hypervisor,
        stop_signal: &request.stop_signal,
    };
    let text = serde_json::to_vec(&content)
        .map_err(|error| Failure::because("cannot write JSON", error))?;
    let digest = Sha256::digest(&text);
    let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("1-{digits}"))
}

/// What there is to do about the machine of this name. `image_id` is what the image's name means now, where that is known.
pub(super) fn plan(
    existing: Option<&Machine>,
    content: &str,
    file_name: Option<&str>,
    image_id: Option<&str>,
    replace: bool,
) -> Result<State, Failure> {
    let Some(machine) = existing else {
        return Ok(State::Created);
    };
    if replace {
        return Ok(State::Replaced);
    }
    let name = &machine.name;
    let Some(deployed) = machine.labels.get(CONTENT) else {
        return Err(
            Failure::new(format!("the machine {name} was not deployed, and is left alone")).hint(
                "`vistara deploy --name OTHER` takes another name, `vistara deploy --replace` replaces it",
            ),
        );
    };
    let theirs = machine.labels.get(NAME).map(String::as_str);
    if theirs != file_name {
        return Err(Failure::new(format!(
            "the machine {name} was deployed for {:?}, and this is {:?}",
            theirs.unwrap_or("(no name)"),
            file_name.unwrap_or("(no name)")
        ))
        .hint("`vistara deploy --name OTHER` takes another name, `vistara deploy --replace` replaces it"));
    }
    let same_image = image_id.is_none_or(|id| id == machine.image_id);
    if deployed == content && same_image && machine.state != "ended" {
        Ok(State::Unchanged)
    } else {
        Ok(State::Replaced)
    }
}
