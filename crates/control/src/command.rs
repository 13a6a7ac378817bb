//! What runs in a machine: the image's configuration with the user's words laid over it, as docker does it.

use vistara_model::{EnvVar, ImageConfig, MachineSpec, Signal};

/// `PATH` in a guest whose image sets none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program with everything it starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The command line; never empty.
    pub argv: Vec<String>,
    /// Environment, each name once.
    pub env: Vec<EnvVar>,
    /// User in the OCI form; empty for root.
    pub user: String,
    /// Absolute working directory.
    pub working_dir: String,
    /// The signal that asks it to end.
    pub stop_signal: Signal,
}

/// Why there is nothing to run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    /// Neither the image nor the user names a command.
    #[error("the image names no command, and none was given; add one: vistara run IMAGE COMMAND")]
    NoCommand,
    /// A NUL byte in a word.
    #[error("the command line has a NUL byte in it")]
    Nul,
    /// The working directory is relative.
    #[error("the working directory {0:?} must begin with /")]
    RelativeDirectory(String),
}

/// Lays the user's words over the image's configuration.
///
/// # Errors
/// [`ProgramError`] where nothing that can run comes out.
pub fn program(spec: &MachineSpec, image: &ImageConfig) -> Result<Program, ProgramError> {
    let mut argv = match &spec.entrypoint {
        Some(words) => words.clone(),
        None => image.entrypoint.clone(),
    };
    if !spec.command.is_empty() {
        argv.extend(spec.command.iter().cloned());
    } else if spec.entrypoint.is_none() {
        // A new entry point drops the image's command: it was written for the old one.
        argv.extend(image.cmd.iter().cloned());
    }
    if argv.first().is_none_or(String::is_empty) {
        return Err(ProgramError::NoCommand);
    }
    if argv.iter().any(|word| word.contains('\0')) {
        return Err(ProgramError::Nul);
    }
    let working_dir = match spec.working_dir.as_deref().unwrap_or(&image.working_dir) {
        "" => "/".to_owned(),
        dir if dir.starts_with('/') => dir.to_owned(),
        dir => return Err(ProgramError::RelativeDirectory(dir.to_owned())),
    };
    Ok(Program {
        argv,
        env: environment(spec, image),
        user: spec.user.clone().unwrap_or_else(|| image.user.clone()),
        working_dir,
        stop_signal: spec
            .stop_signal
            .or_else(|| image.stop_signal.parse().ok())
            .unwrap_or(Signal::TERM),
    })
}

fn environment(spec: &MachineSpec, image: &ImageConfig) -> Vec<EnvVar> {
    let mut env: Vec<EnvVar> = Vec::new();
    let from_image = image.env.iter().filter_map(|text| text.parse().ok());
    for variable in from_image.chain(spec.env.iter().cloned()) {
        match env.iter_mut().find(|known| known.name == variable.name) {
            Some(known) => known.value = variable.value,
            None => env.push(variable),
        }
    }
    if !env.iter().any(|variable| variable.name == "PATH") {
        env.insert(
            0,
            EnvVar {
                name: "PATH".to_owned(),
                value: DEFAULT_PATH.to_owned(),
            },
        );
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;
    use vistara_model::{Bytes, Cpus, Hypervisor, Network};

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| (*word).to_owned()).collect()
    }

    fn spec(entrypoint: Option<&[&str]>, command: &[&str]) -> MachineSpec {
        MachineSpec {
            image: "debian".parse().unwrap(),
            command: words(command),
            entrypoint: entrypoint.map(words),
            name: None,
            cpus: Cpus::ONE,
            memory: Bytes::mib(512),
            disk: Bytes::gib(10),
            env: Vec::new(),
            user: None,
            working_dir: None,
            hostname: None,
            read_only: false,
            volumes: Vec::new(),
            named_volumes: Vec::new(),
            ports: Vec::new(),
            network: Network::User,
            tty: None,
            stdin: false,
            auto_remove: false,
            timeout: None,
            hypervisor: Hypervisor::Auto,
            stop_signal: None,
            kernel: None,
            no_template: false,
            retry_safe: false,
            rates: Default::default(),
            huge_pages: false,
            console: false,
            labels: Default::default(),
        }
    }

    fn image(entrypoint: &[&str], cmd: &[&str]) -> ImageConfig {
        ImageConfig {
            entrypoint: words(entrypoint),
            cmd: words(cmd),
            ..ImageConfig::default()
        }
    }

    /// Image entry point, image command, user entry point, user command → command line, as docker has it.
    #[test]
    fn the_command_line_follows_dockers_table() {
        type Row<'a> = (
            &'a [&'a str],
            &'a [&'a str],
            Option<&'a [&'a str]>,
            &'a [&'a str],
            &'a [&'a str],
        );
        let table: [Row<'_>; 7] = [
            (&["e"], &["c"], None, &[], &["e", "c"]),
            (&["e"], &["c"], None, &["u"], &["e", "u"]),
            (&[], &["c"], None, &[], &["c"]),
            (&[], &["c"], None, &["u", "v"], &["u", "v"]),
            (&["e"], &["c"], Some(&["x"]), &[], &["x"]),
            (&["e"], &["c"], Some(&["x"]), &["u"], &["x", "u"]),
            (&["e"], &["c"], Some(&[]), &["u"], &["u"]),
        ];
        for (entrypoint, cmd, user_entrypoint, user_cmd, expected) in table {
            let program =
                program(&spec(user_entrypoint, user_cmd), &image(entrypoint, cmd)).unwrap();
            assert_eq!(program.argv, words(expected));
        }
    }

    #[test]
    fn an_image_without_a_command_needs_one_from_the_user() {
        assert_eq!(
            program(&spec(None, &[]), &image(&[], &[])),
            Err(ProgramError::NoCommand)
        );
        assert_eq!(
            program(&spec(Some(&[]), &[]), &image(&["e"], &["c"])),
            Err(ProgramError::NoCommand)
        );
    }

    #[test]
    fn the_users_environment_wins_and_path_is_always_there() {
        let mut spec = spec(None, &["x"]);
        spec.env = vec!["A=2".parse().unwrap()];
        let mut image = image(&[], &[]);
        image.env = words(&["A=1", "B=b"]);
        let env = program(&spec, &image).unwrap().env;
        let text: Vec<String> = env
            .iter()
            .map(|v| format!("{}={}", v.name, v.value))
            .collect();
        assert_eq!(text[1..], words(&["A=2", "B=b"]));
        assert!(text[0].starts_with("PATH="));
    }

    #[test]
    fn a_relative_working_directory_is_refused() {
        let mut spec = spec(None, &["x"]);
        spec.working_dir = Some("tmp".to_owned());
        assert!(matches!(
            program(&spec, &image(&[], &[])),
            Err(ProgramError::RelativeDirectory(_))
        ));
    }
}
