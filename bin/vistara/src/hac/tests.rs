//! The format as a table: what is taken, what is noted, what is refused and with which line.

use super::*;

const HARDWARE: &str = include_str!("../../tests/hac/hardware.toml");
const RESOURCES: &str = include_str!("../../tests/hac/resources.toml");
const UNKNOWN: &str = include_str!("../../tests/hac/unknown.toml");

fn lines(hac: &Hac) -> Vec<(usize, &str)> {
    let first = |note: &str| note.find(" has no effect").or(note.find(" is not known"));
    hac.notes
        .iter()
        .map(|note| (note.line, &note.text[..first(&note.text).unwrap()]))
        .collect()
}

#[test]
fn the_first_dialect_gives_an_image_and_its_size() {
    let hac = read(HARDWARE).unwrap();
    assert_eq!(hac.dialect, Dialect::Hardware);
    assert_eq!(hac.name.as_deref(), Some("Test Node"));
    assert_eq!(hac.image, "docker.io/library/alpine:3.20");
    assert_eq!(hac.cpus.as_deref(), Some("2"));
    assert_eq!(hac.memory.as_deref(), Some("512m"));
    assert_eq!((hac.disk.as_ref(), hac.command.len()), (None, 0));
    assert_eq!(
        lines(&hac),
        [
            (9, "hardware.kernel"),
            (10, "hardware.drive"),
            (12, "hardware.interface")
        ]
    );
}

#[test]
fn the_second_dialect_gives_a_command_too() {
    let hac = read(RESOURCES).unwrap();
    assert_eq!(hac.dialect, Dialect::Resources);
    assert_eq!(hac.version.as_deref(), Some("1.2.0"));
    assert_eq!(hac.image, "ghcr.io/example/hello:1.2");
    assert_eq!(hac.cpus.as_deref(), Some("1"));
    assert_eq!(hac.memory.as_deref(), Some("512MB"));
    assert_eq!(hac.disk.as_deref(), Some("1GB"));
    assert_eq!(hac.command, ["python3", "-m", "http.server", "8000"]);
    assert_eq!(hac.stop_signal, None);
    assert_eq!(
        lines(&hac),
        [
            (16, "commands.stop"),
            (17, "commands.status"),
            (18, "commands.logs")
        ]
    );
}

#[test]
fn what_nobody_knows_is_named_with_its_line() {
    let hac = read(UNKNOWN).unwrap();
    let found = lines(&hac);
    assert_eq!(
        found.iter().map(|(line, _)| *line).collect::<Vec<_>>(),
        [2, 6, 10, 12, 14]
    );
    let text = |index: usize| hac.notes[index].text.as_str();
    assert!(
        text(0).starts_with("region is not known here"),
        "{}",
        text(0)
    );
    assert!(text(2).contains("hardware.memroy") && text(2).contains("memory"));
    assert!(text(4).starts_with("[policy]"));
    // What was misspelled had no effect.
    assert_eq!(hac.memory, None);
}

#[test]
fn small_files_are_taken_as_they_are_meant() {
    let image = |text: &str| read(text).unwrap().image;
    assert_eq!(image("[hardware]\nref = 'alpine'"), "alpine");
    assert_eq!(image("[spacecore]\ncontainer_image='a/b:1'"), "a/b:1");
    assert_eq!(image("[hardware]\nref='rootfs:./r.tar'"), "rootfs:./r.tar");
    let hac = read("[spacecore]\ncontainer_image='a'\n[resources]\ncpu=1.5\n").unwrap();
    assert_eq!(hac.cpus.as_deref(), Some("1.5"));
    let hac = read("[spacecore]\ncontainer_image='a'\n[resources]\ncpu=2\n").unwrap();
    assert_eq!(hac.cpus.as_deref(), Some("2"));
    let hac = read("[spacecore]\ncontainer_image='a'\n[commands]\nstop='SIGINT'\n").unwrap();
    assert_eq!(hac.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(hac.notes, []);
    let hac = read("[hardware]\nref='a'\nmemory=0x200\r\ncores=1_0").unwrap();
    assert_eq!(
        (hac.memory.as_deref(), hac.cpus.as_deref()),
        (Some("512m"), Some("10"))
    );
}

#[test]
fn what_is_wrong_is_an_error_with_its_line() {
    for (text, line, word) in [
        ("[hardware", Some(1), "not TOML"),
        ("[hardware]\nref = 'a'\nref = 'b'", Some(3), "not TOML"),
        ("a = 1\n[hardware]\n[hardware]", Some(3), "not TOML"),
        ("hardware = 3", Some(1), "is a table"),
        ("[[hardware]]\nref='a'", Some(1), "a list"),
        (
            "[spacecore]\nname = 3\n[hardware]\nref='a'",
            Some(2),
            "spacecore.name",
        ),
        (
            "[spacecore]\nname = ' '\n[hardware]\nref='a'",
            Some(2),
            "empty",
        ),
        ("[hardware]\ncores = 1", Some(1), "no ref"),
        ("[hardware]\nref = ''", Some(2), "empty"),
        ("[hardware]\nref = 'A B'", Some(2), "hardware.ref"),
        ("[hardware]\nref = ['a']", Some(2), "a list"),
        ("[hardware]\nref='a'\ncores = '4'", Some(3), "whole number"),
        ("[hardware]\nref='a'\ncores = 4.5", Some(3), "whole number"),
        ("[hardware]\nref='a'\ncores = 0", Some(3), "hardware.cores"),
        ("[hardware]\nref='a'\ncores = -1", Some(3), "hardware.cores"),
        (
            "[hardware]\nref='a'\ncores = 99999999999999999999",
            Some(3),
            "larger",
        ),
        (
            "[hardware]\nref='a'\nmemory = '512MB'",
            Some(3),
            "whole number",
        ),
        ("[hardware]\nref='a'\nmemory = -5", Some(3), "no size"),
        (
            "[hardware]\nref='a'\nmemory = 4294967296",
            Some(3),
            "no size",
        ),
        (
            "[hardware]\nref='a'\nkernel = 5",
            Some(3),
            "hardware.kernel",
        ),
        (
            "[hardware]\nref='a'\n\n[resources]\ncpu='1'",
            Some(4),
            "two dialects",
        ),
        ("[hardware]\nref='a'\n[commands]", Some(3), "two dialects"),
        ("", None, "no image"),
        ("[spacecore]\nname='a'", None, "no image"),
        (
            "[spacecore]\nbackend='binary'\ncontainer_image='a'",
            Some(2),
            "binary",
        ),
        (
            "[spacecore]\nbackend='docker'\ncontainer_image='a'",
            Some(2),
            "docker",
        ),
        (
            "[spacecore]\ncontainer_image='a'\n[resources]\nmemory=512",
            Some(4),
            "whole number",
        ),
        (
            "[spacecore]\ncontainer_image='a'\n[resources]\nmemory='512'",
            Some(4),
            "unit",
        ),
        (
            "[spacecore]\ncontainer_image='a'\n[resources]\nmemory='lots'",
            Some(4),
            "resources.memory",
        ),
        (
            "[spacecore]\ncontainer_image='a'\n[resources]\ndisk='1XB'",
            Some(4),
            "resources.disk",
        ),
        (
            "[spacecore]\ncontainer_image='a'\n[resources]\ncpu='two'",
            Some(4),
            "resources.cpu",
        ),
        (
            "[spacecore]\ncontainer_image='a'\n[resources]\ncpu=inf",
            Some(4),
            "resources.cpu",
        ),
        (
            "[spacecore]\ncontainer_image='a'\n[commands]\nstart=\"a 'b\"",
            Some(4),
            "not closed",
        ),
        (
            "[spacecore]\ncontainer_image='a'\n[commands]\nstart=\"a\\u0000b\"",
            Some(4),
            "zero byte",
        ),
    ] {
        let fault = read(text).unwrap_err();
        assert_eq!(fault.line, line, "{text:?}: {fault:?}");
        assert!(fault.message.contains(word), "{text:?}: {fault:?}");
    }
}

#[test]
fn nothing_that_a_file_holds_makes_reading_it_panic() {
    // Each example cut off at every byte, and with each byte replaced by those that mean something.
    for text in [HARDWARE, RESOURCES, UNKNOWN] {
        for at in 0..text.len() {
            let _ = text.get(..at).map(read);
            for other in ["\"", "[", "]", "=", "\n", "'", "\0", "{", "ü"] {
                if let (Some(head), Some(tail)) = (text.get(..at), text.get(at + 1..)) {
                    let _ = read(&format!("{head}{other}{tail}"));
                }
            }
        }
    }
    let deep = format!("[hardware]\nref = {}", "[".repeat(30_000));
    assert!(read(&deep).is_err());
}

#[test]
fn names_become_machines_names() {
    for (name, want) in [
        ("web-1", Some("web-1")),
        ("Web.A_b", Some("Web.A_b")),
        ("Test Node", Some("test-node")),
        ("  (My) App!! ", Some("my-app")),
        ("größe", Some("gr-e")),
        ("-x", Some("x")),
        ("日本", None),
        ("...", None),
    ] {
        assert_eq!(machine_name(name).as_deref(), want, "{name}");
    }
    assert_eq!(machine_name(&"x ".repeat(60)), None);
}
