//! The command line as a specification: what each form means.

use super::*;
use crate::run_options::{ImageSource, PullPolicy, Surroundings, head_and_command};
use crate::task_commands::TaskCommand;
use clap::CommandFactory;
use vistara_api::{RunRequest, TerminalSize};

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace()
        .map(|word| if word == "''" { "" } else { word })
        .collect()
}

fn parse(line: &str) -> Result<Command, clap::Error> {
    CommandLine::try_parse_from(words(line)).map(|line| line.command)
}

fn run(line: &str) -> RunOptions {
    match parse(line).unwrap_or_else(|error| panic!("{line}: {error}")) {
        Command::Run(options) => *options,
        other => panic!("{line}: {other:?}"),
    }
}

fn request(line: &str) -> RunRequest {
    let around = Surroundings {
        variable: &|name| (name == "HOME").then(|| "/home/u".to_owned()),
        working_dir: "/home/u/w".into(),
        terminal: TerminalSize {
            rows: 24,
            columns: 80,
        },
        stdin: false,
    };
    run(line)
        .request(&around)
        .unwrap_or_else(|error| panic!("{line}: {error:?}"))
}

#[test]
fn the_whole_tree_of_commands_is_consistent() {
    CommandLine::command().debug_assert();
}

#[test]
fn everything_after_the_image_is_the_command() {
    for (line, image, command) in [
        ("vistara run debian", "debian", vec![]),
        (
            "vistara run debian ls -l /",
            "debian",
            vec!["ls", "-l", "/"],
        ),
        ("vistara run debian -- ls -l", "debian", vec!["ls", "-l"]),
        ("vistara run -- debian ls", "debian", vec!["ls"]),
        (
            "vistara run debian -d -it --rm",
            "debian",
            vec!["-d", "-it", "--rm"],
        ),
        (
            "vistara run debian ls -- -x",
            "debian",
            vec!["ls", "--", "-x"],
        ),
        ("vistara run debian -- -- x", "debian", vec!["--", "x"]),
        ("vistara run debian --help", "debian", vec!["--help"]),
        (
            "vistara run debian --socket x",
            "debian",
            vec!["--socket", "x"],
        ),
        ("vistara run debian sh ''", "debian", vec!["sh", ""]),
        ("vistara run -e A=1 --rm debian env", "debian", vec!["env"]),
    ] {
        let options = run(line);
        let (head, rest) = head_and_command(&options.words);
        assert_eq!(
            (head, rest),
            (
                image,
                &command.iter().map(|&w| w.to_owned()).collect::<Vec<_>>()[..]
            ),
            "{line}"
        );
        assert!(!options.detach && !options.tty, "{line}");
    }
}

#[test]
fn dockers_short_forms_mean_what_they_mean_there() {
    let options = run("vistara run -it --rm -m 512m debian");
    assert!(options.interactive && options.tty && options.rm);
    assert_eq!(options.memory.as_deref(), Some("512m"));
    assert!(run("vistara run -dq debian").detach);
    assert_eq!(
        run("vistara run --pull=never debian").pull,
        PullPolicy::Never
    );
    assert_eq!(run("vistara run debian").pull, PullPolicy::Missing);
}

#[test]
fn options_become_the_request() {
    for (line, want) in [
        ("vistara run a", RunRequest { ..base() }),
        (
            "vistara run -d a",
            RunRequest {
                attach: true,
                ..base()
            },
        ),
        (
            "vistara run --cpus 1.5 a",
            RunRequest {
                cpus: Some("1.5".into()),
                ..base()
            },
        ),
        (
            "vistara run --memory=2g a",
            RunRequest {
                memory: Some("2g".into()),
                ..base()
            },
        ),
        (
            "vistara run -m2g a",
            RunRequest {
                memory: Some("2g".into()),
                ..base()
            },
        ),
        (
            "vistara run -e A=b -e C= a",
            RunRequest {
                env: vec!["A=b".into(), "C=".into()],
                ..base()
            },
        ),
        (
            "vistara run -e HOME -e NOT_SET a",
            RunRequest {
                env: vec!["HOME=/home/u".into()],
                ..base()
            },
        ),
        (
            "vistara run -w /x -u 1:2 a",
            RunRequest {
                working_dir: Some("/x".into()),
                user: Some("1:2".into()),
                ..base()
            },
        ),
        (
            "vistara run --entrypoint /bin/sh a -c x",
            RunRequest {
                entrypoint: Some(vec!["/bin/sh".into()]),
                command: vec!["-c".into(), "x".into()],
                ..base()
            },
        ),
        (
            "vistara run --entrypoint '' a",
            RunRequest {
                entrypoint: Some(vec![]),
                ..base()
            },
        ),
        (
            "vistara run -v ./d:/g a",
            RunRequest {
                volumes: vec!["/home/u/w/d:/g".into()],
                ..base()
            },
        ),
        (
            "vistara run -v /d/:/g:ro,z a",
            RunRequest {
                volumes: vec!["/d:/g:ro".into()],
                ..base()
            },
        ),
        (
            "vistara run -v /d:/g:rw a",
            RunRequest {
                volumes: vec!["/d:/g".into()],
                ..base()
            },
        ),
        (
            "vistara run -p 8080:80 -p 53/udp a",
            RunRequest {
                ports: vec!["8080:80".into(), "0:53/udp".into()],
                ..base()
            },
        ),
        (
            "vistara run --ports 1:2 a",
            RunRequest {
                ports: vec!["1:2".into()],
                ..base()
            },
        ),
        (
            "vistara run --timeout 30s a",
            RunRequest {
                timeout_ms: Some(30_000),
                ..base()
            },
        ),
        (
            "vistara run --timeout 5m a",
            RunRequest {
                timeout_ms: Some(300_000),
                ..base()
            },
        ),
        (
            "vistara run --timeout 2 a",
            RunRequest {
                timeout_ms: Some(2_000),
                ..base()
            },
        ),
        (
            "vistara run -l x=1 -l y a",
            RunRequest {
                labels: [("x".into(), "1".into()), ("y".into(), String::new())].into(),
                ..base()
            },
        ),
        (
            "vistara run --rm --read-only --hostname h a",
            RunRequest {
                auto_remove: true,
                read_only: true,
                hostname: Some("h".into()),
                ..base()
            },
        ),
        (
            "vistara run -t a",
            RunRequest {
                tty: Some(TerminalSize {
                    rows: 24,
                    columns: 80,
                }),
                env: vec!["TERM=xterm".into()],
                ..base()
            },
        ),
        (
            "vistara run -te TERM=dumb a",
            RunRequest {
                tty: Some(TerminalSize {
                    rows: 24,
                    columns: 80,
                }),
                env: vec!["TERM=dumb".into()],
                ..base()
            },
        ),
        (
            "vistara run --network none --hypervisor qemu --kernel k --stop-signal INT --name n a",
            RunRequest {
                network: Some("none".into()),
                hypervisor: Some("qemu".into()),
                kernel: Some("k".into()),
                stop_signal: Some("INT".into()),
                name: Some("n".into()),
                ..base()
            },
        ),
    ] {
        assert_eq!(request(line), want, "{line}");
    }
    fn base() -> RunRequest {
        RunRequest {
            image: "a".into(),
            attach: true,
            ..RunRequest::default()
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_runs() {
    for line in [
        "vistara run",
        "vistara run --no-such-option debian",
        "vistara run --cpus 0 debian",
        "vistara run -m lots debian",
        "vistara run --name -x debian",
        "vistara run --hypervisor xen debian",
        "vistara run --timeout never debian",
        "vistara run --timeout -3s debian",
        "vistara run --pull sometimes debian",
        "vistara run --network host debian",
        "vistara exec",
        "vistara exec -dt m x",
        "vistara rm",
        "vistara cp a",
        "vistara logs --tail few m",
        "vistara logs --console -f m",
        "vistara completion cmd",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
    let around = Surroundings {
        variable: &|_| None,
        working_dir: "/home/u/w".into(),
        terminal: TerminalSize {
            rows: 1,
            columns: 1,
        },
        stdin: false,
    };
    for line in [
        "vistara run -v /d debian",
        "vistara run -v /d:g debian",
        "vistara run -v /d:/ debian",
        "vistara run -v /d:/g:rx debian",
        "vistara run -v :/g debian",
        "vistara run -p 0 debian",
        "vistara run -p a:b debian",
        "vistara run -e =x debian",
        "vistara run --env-file /no/such/file debian",
    ] {
        assert!(run(line).request(&around).is_err(), "{line}");
    }
}

#[test]
fn an_image_may_be_a_path_in_four_forms() {
    for (text, want) in [
        ("debian:12", ImageSource::Named("debian:12".into())),
        ("oci:dir", ImageSource::Path("dir".into())),
        ("oci-archive:a.tar", ImageSource::Path("a.tar".into())),
        ("docker-archive:/b.tar", ImageSource::Path("/b.tar".into())),
        ("rootfs:./r.tar.gz", ImageSource::Path("./r.tar.gz".into())),
        ("ocicat/x:1", ImageSource::Named("ocicat/x:1".into())),
    ] {
        assert_eq!(ImageSource::parse(text), want, "{text}");
    }
}

#[test]
fn execs_options_end_at_the_machine() {
    for (line, machine, command, tty) in [
        ("vistara exec m ls -l", "m", vec!["ls", "-l"], false),
        ("vistara exec -it m sh", "m", vec!["sh"], true),
        ("vistara exec m -- ls -it", "m", vec!["ls", "-it"], false),
        (
            "vistara exec -e A=1 -w /x -u 0 m id",
            "m",
            vec!["id"],
            false,
        ),
    ] {
        let Ok(Command::Exec(options)) = parse(line) else {
            panic!("{line}");
        };
        let (head, rest) = head_and_command(&options.words);
        assert_eq!((head, options.tty), (machine, tty), "{line}");
        assert_eq!(rest, command, "{line}");
    }
}

#[test]
fn environment_files_have_comments_and_callers_values() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "# note\n\n A=1 2\nHOME\nNOT_SET\nB=\"q\"\n").unwrap();
    let env =
        crate::run_options::environment_of(&[file.path().into()], &["A=3".to_owned()], &|name| {
            (name == "HOME").then(|| "/h".to_owned())
        })
        .unwrap();
    assert_eq!(env, ["A=1 2", "HOME=/h", "B=\"q\"", "A=3"]);
}

#[test]
fn every_command_has_the_forms_that_users_of_docker_type() {
    for line in [
        "vistara ps",
        "vistara ps -aq",
        "vistara ps -a --filter name=x --filter state=ended --json",
        "vistara logs -f -t --tail 10 --since 10m m",
        "vistara logs -n all m",
        "vistara attach --no-stdin m",
        "vistara cp m:/etc/passwd .",
        "vistara cp - m:/tmp",
        "vistara cp -L m:/x -",
        "vistara stop -t 3 a b",
        "vistara kill -s HUP a",
        "vistara rm -f a b",
        "vistara inspect --type image a",
        "vistara stats --no-stream --json",
        "vistara wait a b",
        "vistara images",
        "vistara images -q --json",
        "vistara images ls --json",
        "vistara images pull --insecure localhost:5000/x",
        "vistara images import --name x -",
        "vistara images import f.tar x:1",
        "vistara images rm -f a",
        "vistara images prune -a",
        "vistara images tag a b",
        "vistara images inspect a",
        "vistara pull debian",
        "vistara rmi debian",
        "vistara kernel ls --json",
        "vistara kernel add debian --default",
        "vistara kernel add --name x --modules ./m ./vmlinux",
        "vistara kernel add nanos ./kernel.img --klibs ./klibs",
        "vistara kernel rm x",
        "vistara kernel default x",
        "vistara doctor --json --fresh",
        "vistara explain debian sh -c x",
        "vistara completion fish",
        "vistara version --json",
        "vistara node",
        "vistara node --idle-exit 60s --socket /s --state-dir /d",
        "vistara node stop",
        "vistara node init",
        "vistara node start",
        "vistara node start -d --warm-memory 1g",
        "vistara node start --idle-exit 5m",
        "vistara node drain",
        "vistara node undrain",
        "vistara node terms --relay X@192.0.2.1:7443 --local-discovery",
        "vistara relay --listen 0.0.0.0:7443 --max-nodes 9 --rate 1m --address 192.0.2.7",
        "vistara node status --json",
        "vistara bench run --json -n 3",
        "vistara --socket /s ps",
        "vistara ps --socket /s",
    ] {
        if let Err(error) = parse(line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn a_task_is_declared_one_way_and_what_comes_after_its_image_is_its_commands() {
    let line = "vistara task run --at-least-once --key k -d -m 64m debian -- prog --key other -d";
    let Ok(Command::Task(options)) = parse(line) else {
        panic!("{line}");
    };
    let TaskCommand::Run(options) = options.command else {
        panic!("{line}");
    };
    assert!(options.at_least_once && options.detach && !options.at_most_once);
    assert_eq!(options.key.as_deref(), Some("k"));
    let (image, command) = head_and_command(&options.program.words);
    assert_eq!(image, "debian");
    assert_eq!(command, ["prog", "--key", "other", "-d"]);
    assert!(parse("vistara task run --at-least-once --at-most-once debian").is_err());
    assert!(parse("vistara task run").is_err());
}
