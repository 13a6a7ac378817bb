//! What a file becomes, and what is done about a machine of its name.

use super::*;
use clap::Parser;

fn options(line: &str) -> DeployOptions {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: DeployOptions,
    }
    Line::try_parse_from(line.split_whitespace())
        .unwrap()
        .options
}

const FILE: &str = "[spacecore]\nname='My Web'\ncontainer_image='a/web:1'\nversion='2'\n[resources]\ncpu='2'\nmemory='512MB'\ndisk='1GB'\n[commands]\nstart='serve --all -- x'\nstop='SIGINT'\n";

fn request(text: &str, line: &str) -> RunRequest {
    let hac = hac::read(text).unwrap();
    let options = options(line);
    let name = name(&hac, &options).unwrap();
    let run = run_options(&words(&hac, &name, &options, Shown::Whole).unwrap()).unwrap();
    run_command::request(&run).unwrap()
}

#[test]
fn a_file_becomes_the_request_that_run_would_make() {
    let request = request(FILE, "deploy -p 8080:80 -e A=1 --hypervisor qemu");
    assert_eq!(request.image, "a/web:1");
    assert_eq!(request.name.as_deref(), Some("my-web"));
    assert_eq!(request.cpus.as_deref(), Some("2"));
    assert_eq!(request.memory.as_deref(), Some("512MB"));
    assert_eq!(request.disk.as_deref(), Some("1GB"));
    assert_eq!(request.command, ["serve", "--all", "--", "x"]);
    assert_eq!(request.entrypoint, Some(Vec::new()));
    assert_eq!(request.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(request.ports, ["8080:80"]);
    assert_eq!(request.env, ["A=1"]);
    assert_eq!(request.labels["hac.name"], "My Web");
    assert_eq!(request.labels["hac.version"], "2");
    assert!(!request.stdin && !request.auto_remove);
}

#[test]
fn values_that_look_like_options_stay_values() {
    let text =
        "[spacecore]\nname='x'\ndescription='--privileged -v /:/host'\n[hardware]\nref='alpine'";
    let request = request(text, "deploy --env=A=--volume=/:/h");
    assert_eq!(request.volumes, Vec::<String>::new());
    assert_eq!(request.labels["hac.description"], "--privileged -v /:/host");
    assert_eq!(request.env, ["A=--volume=/:/h"]);
}

#[test]
fn the_words_that_are_shown_hold_no_secret() {
    let hac = hac::read(FILE).unwrap();
    let options = options("deploy -e TOKEN=secret -e HOME");
    let words = words(&hac, "n", &options, Shown::WithoutValues).unwrap();
    let line = command_line(&words);
    assert!(
        line.contains("TOKEN=…") && line.contains("--env=HOME"),
        "{line}"
    );
    assert!(!line.contains("secret"), "{line}");
}

#[test]
fn the_content_is_another_exactly_where_something_with_an_effect_is() {
    let base = content(&request(FILE, "deploy")).unwrap();
    let other = |text: &str, line: &str| content(&request(text, line)).unwrap() != base;
    assert!(!other(
        &format!("# a comment\n{FILE}"),
        "deploy --quiet --explain"
    ));
    assert!(!other(
        &FILE.replace("version='2'", "version='3'"),
        "deploy"
    ));
    assert!(other(&FILE.replace("web:1", "web:2"), "deploy"));
    assert!(other(&FILE.replace("cpu='2'", "cpu='1'"), "deploy"));
    assert!(other(FILE, "deploy -p 80"));
    assert!(other(FILE, "deploy -e A=1"));
    assert!(other(FILE, "deploy --hypervisor qemu"));
}

#[test]
fn a_machine_is_left_alone_replaced_or_refused() {
    let machine = |content: Option<&str>, state: &str| {
        let mut machine = crate::machine_commands::tests::machine();
        machine.state = state.to_owned();
        machine.labels.insert(NAME.to_owned(), "Web".to_owned());
        if let Some(content) = content {
            machine
                .labels
                .insert(CONTENT.to_owned(), content.to_owned());
        }
        machine
    };
    let old = machine(Some("1-a"), "running");
    let plan = |machine: &Machine, content: &str, name: &str, image: &str, replace: bool| {
        plan(Some(machine), content, Some(name), Some(image), replace).ok()
    };
    let image = "sha256:aa";
    assert_eq!(
        super::plan(None, "1-a", None, None, false).ok(),
        Some(State::Created)
    );
    assert_eq!(
        plan(&old, "1-a", "Web", image, false),
        Some(State::Unchanged)
    );
    assert_eq!(plan(&old, "1-a", "Web", image, true), Some(State::Replaced));
    assert_eq!(
        plan(&old, "1-b", "Web", image, false),
        Some(State::Replaced)
    );
    assert_eq!(
        plan(&old, "1-a", "Web", "sha256:bb", false),
        Some(State::Replaced)
    );
    // One that is over is no deployment.
    let ended = machine(Some("1-a"), "ended");
    assert_eq!(
        plan(&ended, "1-a", "Web", image, false),
        Some(State::Replaced)
    );
    // Another file's, and one that somebody ran.
    assert_eq!(plan(&old, "1-a", "web", image, false), None);
    let own = machine(None, "running");
    assert_eq!(plan(&own, "1-a", "Web", image, false), None);
    assert_eq!(plan(&own, "1-a", "Web", image, true), Some(State::Replaced));
}

#[test]
fn a_file_without_a_name_needs_one() {
    let nameless = hac::read("[hardware]\nref='a'").unwrap();
    let failure = name(&nameless, &options("deploy")).unwrap_err();
    assert!(failure.hint.is_some_and(|hint| hint.contains("--name")));
    assert_eq!(name(&nameless, &options("deploy --name x")).unwrap(), "x");
    let strange = hac::read("[spacecore]\nname='日本'\n[hardware]\nref='a'").unwrap();
    assert!(name(&strange, &options("deploy")).is_err());
}
