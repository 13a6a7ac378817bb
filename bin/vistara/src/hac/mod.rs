//! `hac.toml`, hypercore's description of a machine, in both of its dialects (`docs/formats/hac.md`).
//!
//! Read strictly: what is wrong is an error with its line, and what has no effect here, known to hypercore or to nobody, is named
//! in a note. Nothing is read but the text; what it leads to is [`crate::deploy_command`]'s.

mod section;
mod words;

use crate::run_options::ImageSource;
use section::{Entry, Section};
use std::fmt::Display;
use toml::de::DeTable;
use vistara_model::{Bytes, Cpus, ImageRef, MachineName, Signal};

/// Largest file that is read, in bytes: hypercore's own have some hundred.
pub(crate) const FILE_BYTES_MAX: usize = 64 << 10;

/// What a file asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hac {
    /// Which dialect it is in.
    pub(crate) dialect: Dialect,
    /// Its name as it stands there.
    pub(crate) name: Option<String>,
    /// What it says of itself.
    pub(crate) description: Option<String>,
    /// The version that it gives itself.
    pub(crate) version: Option<String>,
    /// Image, as `vistara run` takes it.
    pub(crate) image: String,
    /// CPUs, as `--cpus` takes them.
    pub(crate) cpus: Option<String>,
    /// Memory, as `--memory` takes it.
    pub(crate) memory: Option<String>,
    /// Writable layer, as `--disk` takes it.
    pub(crate) disk: Option<String>,
    /// The whole command line; the image's own where empty.
    pub(crate) command: Vec<String>,
    /// Signal that asks the program to end.
    pub(crate) stop_signal: Option<String>,
    /// What has no effect, in the order of its lines.
    pub(crate) notes: Vec<Note>,
}

/// The two dialects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `[hardware]`, as `hypercore spawn` reads it.
    Hardware,
    /// `[resources]` and `[commands]`.
    Resources,
}

/// Something that a file says and that has no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    /// Its line.
    pub(crate) line: usize,
    /// What, and what to do instead.
    pub(crate) text: String,
}

/// Why a file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HacFault {
    /// The line, where it is one line's fault.
    pub(crate) line: Option<usize>,
    /// What is wrong.
    pub(crate) message: String,
    /// What to write.
    pub(crate) hint: Option<String>,
}

impl HacFault {
    fn at(line: usize, message: impl Into<String>) -> HacFault {
        HacFault {
            line: Some(line),
            message: message.into(),
            hint: None,
        }
    }

    fn hint(self, hint: impl Into<String>) -> HacFault {
        HacFault {
            hint: Some(hint.into()),
            ..self
        }
    }
}

/// Reads a file's text.
pub(crate) fn read(text: &str) -> Result<Hac, HacFault> {
    let table = DeTable::parse(text).map_err(|error| HacFault {
        line: error.span().map(|span| section::line(text, span.start)),
        message: format!("it is not TOML: {}", error.message()),
        hint: None,
    })?;
    let mut notes = Vec::new();
    let mut sections = Section::all(
        text,
        table.get_ref(),
        &["spacecore", "hardware", "resources", "commands"],
        &mut notes,
    )?;
    let mut spacecore = sections.remove("spacecore").unwrap_or_default();
    let hardware = sections.remove("hardware");
    let resources = sections.remove("resources");
    let commands = sections.remove("commands");
    let name = spacecore.text("name")?.map(|name| name.value);
    let description = spacecore.text("description")?.map(|text| text.value);
    let mut hac = Hac {
        dialect: Dialect::Hardware,
        name,
        description,
        version: None,
        image: String::new(),
        cpus: None,
        memory: None,
        disk: None,
        command: Vec::new(),
        stop_signal: None,
        notes: Vec::new(),
    };
    match hardware {
        Some(hardware) => {
            if let Some(other) = resources.as_ref().or(commands.as_ref()) {
                return Err(HacFault::at(
                    other.line,
                    format!("[{}] and [hardware] are of two dialects", other.name),
                )
                .hint("keep [hardware], or [resources] and [commands]"));
            }
            of_hardware(&mut hac, hardware, &mut notes)?;
            spacecore.finish(&["name", "description"], &mut notes);
        }
        None => {
            hac.dialect = Dialect::Resources;
            of_spacecore(&mut hac, spacecore, &mut notes)?;
            of_resources(&mut hac, resources.unwrap_or_default(), &mut notes)?;
            of_commands(&mut hac, commands.unwrap_or_default(), &mut notes)?;
        }
    }
    notes.sort_by_key(|note| note.line);
    hac.notes = notes;
    Ok(hac)
}

fn of_hardware(
    hac: &mut Hac,
    mut hardware: Section<'_>,
    notes: &mut Vec<Note>,
) -> Result<(), HacFault> {
    if let Some(cores) = hardware.integer("cores")? {
        hac.cpus = Some(checked::<Cpus>(cores.line, "hardware.cores", cores.value)?);
    }
    if let Some(memory) = hardware.integer("memory")? {
        let mebibytes = u32::try_from(memory.value).ok().filter(|&count| count > 0);
        let Some(mebibytes) = mebibytes else {
            return Err(HacFault::at(
                memory.line,
                format!("hardware.memory is {}, which is no size", memory.value),
            )
            .hint("it is a number of megabytes, such as 512"));
        };
        hac.memory = Some(format!("{mebibytes}m"));
    }
    for (key, instead) in [
        (
            "kernel",
            "machines boot the node's own guest kernels: `vistara kernel add FILE --default` adds one",
        ),
        (
            "drive",
            "the root file system is the image's: `vistara images import` takes a file system as a tar file",
        ),
        (
            "interface",
            "each machine has a network of its own, and nothing is bridged with the host's: `vistara deploy -p HOST:GUEST` publishes a port",
        ),
    ] {
        if let Some(value) = hardware.text(key)? {
            notes.push(Note {
                line: value.line,
                text: format!("hardware.{key} has no effect: {instead}"),
            });
        }
    }
    match hardware.text("ref")? {
        Some(image) => hac.image = checked_image("hardware.ref", &image)?,
        None => {
            return Err(HacFault::at(
                hardware.line,
                "[hardware] has no ref, and so no image to run",
            )
            .hint("write ref = \"docker.io/library/alpine:latest\" below [hardware]"));
        }
    }
    hardware.finish(
        &["cores", "memory", "kernel", "drive", "ref", "interface"],
        notes,
    );
    Ok(())
}

fn of_spacecore(
    hac: &mut Hac,
    mut spacecore: Section<'_>,
    notes: &mut Vec<Note>,
) -> Result<(), HacFault> {
    hac.version = spacecore.text("version")?.map(|version| version.value);
    if let Some(backend) = spacecore.text("backend")? {
        match backend.value.as_str() {
            // What it means is what happens anyway: an image is run.
            "containerd" => {}
            "binary" => {
                return Err(HacFault::at(
                    backend.line,
                    "backend = \"binary\" runs a program of the host, and here everything runs from an image",
                )
                .hint("put the program into an image, name that as container_image, and write backend = \"containerd\""));
            }
            other => {
                return Err(
                    HacFault::at(backend.line, format!("spacecore.backend is {other:?}"))
                        .hint("write backend = \"containerd\", or leave it out"),
                );
            }
        }
    }
    match spacecore.text("container_image")? {
        Some(image) => hac.image = checked_image("spacecore.container_image", &image)?,
        None => {
            return Err(HacFault {
                line: None,
                message: "it names no image to run".to_owned(),
                hint: Some(
                    "write container_image = \"docker.io/library/alpine:latest\" below [spacecore], or ref = … below [hardware]"
                        .to_owned(),
                ),
            });
        }
    }
    spacecore.finish(
        &[
            "name",
            "description",
            "version",
            "container_image",
            "backend",
        ],
        notes,
    );
    Ok(())
}

fn of_resources(
    hac: &mut Hac,
    mut resources: Section<'_>,
    notes: &mut Vec<Note>,
) -> Result<(), HacFault> {
    if let Some(cpu) = resources.number_or_text("cpu")? {
        hac.cpus = Some(checked::<Cpus>(cpu.line, "resources.cpu", cpu.value)?);
    }
    for (key, field) in [("memory", &mut hac.memory), ("disk", &mut hac.disk)] {
        let Some(size) = resources.text(key)? else {
            continue;
        };
        let what = format!("resources.{key}");
        let unit = size
            .value
            .trim_end()
            .ends_with(|c: char| c.is_ascii_alphabetic());
        if !unit {
            return Err(HacFault::at(
                size.line,
                format!("{what} is {:?}, without a unit", size.value),
            )
            .hint(format!("write {key} = \"512MB\" or {key} = \"2GB\"")));
        }
        *field = Some(checked::<Bytes>(size.line, &what, size.value)?);
    }
    resources.finish(&["cpu", "memory", "disk"], notes);
    Ok(())
}

fn of_commands(
    hac: &mut Hac,
    mut commands: Section<'_>,
    notes: &mut Vec<Note>,
) -> Result<(), HacFault> {
    if let Some(start) = commands.text("start")? {
        hac.command = words::command(&start.value).map_err(|message| {
            HacFault::at(
                start.line,
                format!("commands.start cannot be run: {message}"),
            )
        })?;
    }
    if let Some(stop) = commands.text("stop")? {
        match stop.value.parse::<Signal>() {
            Ok(_) => hac.stop_signal = Some(stop.value),
            Err(_) => notes.push(Note {
                line: stop.line,
                text: "commands.stop has no effect: `vistara stop` sends the image's signal, or the one that stands here, such as stop = \"SIGINT\"".to_owned(),
            }),
        }
    }
    for (key, instead) in [
        (
            "status",
            "`vistara ps` and `vistara exec NAME -- COMMAND` tell how it is",
        ),
        ("logs", "`vistara logs NAME` shows what it printed"),
    ] {
        if let Some(value) = commands.text(key)? {
            notes.push(Note {
                line: value.line,
                text: format!("commands.{key} has no effect: {instead}"),
            });
        }
    }
    commands.finish(&["start", "stop", "status", "logs"], notes);
    Ok(())
}

/// A value that the model must be able to read, as text.
fn checked<T: std::str::FromStr<Err: Display>>(
    line: usize,
    what: &str,
    value: impl Display,
) -> Result<String, HacFault> {
    let text = value.to_string();
    match text.parse::<T>() {
        Ok(_) => Ok(text),
        Err(error) => Err(HacFault::at(line, format!("{what}: {error}"))),
    }
}

fn checked_image(what: &str, image: &Entry<String>) -> Result<String, HacFault> {
    match ImageSource::parse(&image.value) {
        ImageSource::Path(_) => Ok(image.value.clone()),
        ImageSource::Named(name) => checked::<ImageRef>(image.line, what, name),
    }
}

/// The machine's name for a name of a file's: itself where it is one, else its letters and digits in lower case, with dashes between.
pub(crate) fn machine_name(name: &str) -> Option<String> {
    if name.parse::<MachineName>().is_ok() {
        return Some(name.to_owned());
    }
    let mut out = String::new();
    for c in name.chars() {
        match c {
            c if c.is_ascii_alphanumeric() => out.push(c.to_ascii_lowercase()),
            '.' | '_' if !out.is_empty() => out.push(c),
            _ if !out.is_empty() && !out.ends_with('-') => out.push('-'),
            _ => {}
        }
    }
    let out = out.trim_end_matches('-');
    out.parse::<MachineName>().is_ok().then(|| out.to_owned())
}

#[cfg(test)]
mod tests;
