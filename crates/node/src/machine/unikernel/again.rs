//! After a unikernel: what its end teaches about its program, and whether it is run again on Linux.

use super::super::Record;
use super::super::prepare::told;
use crate::fault::{Answer, chain};
use crate::node::Node;
use vistara_control::{AfterUnikernel, Choice, Ended, Request, after_unikernel, choose};
use vistara_image::Asked;
use vistara_model::{Bytes, Correction, ImageFacts, MachineSpec, Payload};

/// A second run.
pub(crate) struct Again {
    /// For the user, as a sentence.
    pub(crate) reason: String,
    pub(crate) choice: Choice,
    /// The kernel and the memory that it gets now.
    pub(crate) kernel: Option<String>,
    pub(crate) memory: Bytes,
}

/// Draws the conclusions from the end of a machine: corrects the image's facts where they were wrong, and gives the second
/// run, if there is to be one. `console` is the end of what the kernel and the program printed.
pub(crate) async fn after(node: &Node, record: &Record, console: &str) -> Option<Again> {
    let ended = Ended {
        asked: record.spec.hypervisor,
        payload: record.backend.payload,
        end: record.end.as_ref()?,
        console,
        retry_safe: record.spec.retry_safe,
        retried: record.retried,
    };
    let (reason, correction) = match after_unikernel(&ended) {
        AfterUnikernel::Stands => return None,
        AfterUnikernel::Learned { correction } => (None, correction),
        AfterUnikernel::RetryOnLinux { reason, correction } => (Some(reason), correction),
    };
    let facts = match correct(node, record, correction, About::Program).await {
        Ok(facts) => Some(facts),
        Err(message) => {
            tracing::warn!(machine = %record.id, message, "what was learned of a program could not be kept");
            None
        }
    };
    match second(node, record, facts, reason?) {
        Ok(again) => again,
        Err(fault) => {
            tracing::warn!(machine = %record.id, error = fault.0.message, "a program cannot be run again on Linux");
            None
        }
    }
}

/// Why a provisional run never was.
#[derive(Debug, Clone)]
pub(crate) struct Undone {
    /// What was seen, as a sentence.
    pub(crate) seen: String,
    /// Whether it speaks against the command.
    pub(crate) learned: bool,
}

/// The run in the place of one that never was, or why there is none, as a sentence for the user.
pub(crate) async fn undone(node: &Node, record: &Record, undone: Undone) -> Result<Again, String> {
    let Undone { seen, learned } = undone;
    let correction = Correction { seen: seen.clone() };
    let about = match learned {
        true => About::Command,
        false => About::Nothing,
    };
    let facts = match correct(node, record, correction.clone(), about).await {
        Ok(mut facts) => {
            facts.correction.get_or_insert(correction);
            Some(facts)
        }
        Err(message) => {
            tracing::warn!(machine = %record.id, message, "what was learned of a command could not be kept");
            None
        }
    };
    let why = format!("as a unikernel it was undone before anything of it was shown ({seen})");
    match second(
        node,
        record,
        facts,
        format!("{why}, and it is run on Linux"),
    ) {
        Ok(Some(again)) => Ok(again),
        Ok(None) => Err(format!("{why}, and no Linux guest was chosen for it")),
        Err(fault) => Err(format!(
            "{why}, and it cannot be run on Linux: {}",
            told(fault)
        )),
    }
}

/// Chooses Linux for a second run; none where the choice is another.
fn second(
    node: &Node,
    record: &Record,
    facts: Option<ImageFacts>,
    reason: String,
) -> Answer<Option<Again>> {
    let request = Request::of(
        &record.spec,
        &vistara_control::Program {
            argv: record.argv.clone(),
            env: record.env.clone(),
            user: record.user.clone(),
            working_dir: record.working_dir.clone(),
            stop_signal: record.stop_signal,
        },
    );
    let choice = choose(&request, facts.as_ref(), &node.facts())?;
    match choice.backend.payload {
        Payload::Linux => on_linux(node, record, reason, choice).map(Some),
        Payload::Nanos => Ok(None),
    }
}

/// What the second run takes, where this node has it.
fn on_linux(node: &Node, record: &Record, reason: String, choice: Choice) -> Answer<Again> {
    let memory = record.linux_memory.unwrap_or(record.spec.memory);
    let spec = MachineSpec {
        memory,
        ..record.spec.clone()
    };
    node.admit_on_linux(&spec, choice.backend.vmm)?;
    Ok(Again {
        kernel: node.kernel(&spec, choice.backend, &node.facts())?,
        reason,
        choice,
        memory,
    })
}

/// Whom a correction is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    Program,
    Command,
    /// It is not kept.
    Nothing,
}

/// Keeps what was seen with the image, and gives its facts as they are now.
async fn correct(
    node: &Node,
    record: &Record,
    correction: Correction,
    about: About,
) -> Result<ImageFacts, String> {
    let images = node.mechanisms().images;
    let record = record.clone();
    let work = move || {
        let image = images
            .find(record.image_id.as_ref())
            .map_err(|error| chain(&error))?
            .ok_or("the image is gone")?;
        let asked = Asked::new(&record.argv, &record.env, &record.working_dir);
        let known = images.program_facts(&image, &asked);
        let known = known.map_err(|error| chain(&error))?;
        let only = match about {
            About::Program => None,
            About::Command => Some(&asked),
            About::Nothing => return Ok(known),
        };
        images
            .correct(&record.image_id, &known.program.file, only, &correction)
            .map_err(|error| chain(&error))?;
        images
            .program_facts(&image, &asked)
            .map_err(|error| chain(&error))
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| error.to_string())?
}
