//! The commands about whole machines: ps, stop, kill, rm, wait, inspect.

use crate::arguments::{
    InspectKind, InspectOptions, KillOptions, MachinesOptions, PsOptions, RmOptions, StopOptions,
    WaitOptions,
};
use crate::failure::Failure;
use crate::forward;
use crate::listing::Failures;
use crate::output::{print, print_json};
use crate::text::{ago, command_line, seconds_since, short_id, shorten, span, table, visible};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use jiff::Timestamp;
use vistara_api::{Client, ErrorKind, KillRequest, Machine, StopRequest};

/// Longest command in a listing, in characters.
const COMMAND_SHOWN_MAX: usize = 32;

/// `vistara ps`.
pub(crate) async fn ps(client: &Client, options: &PsOptions) -> Result<u8, Failure> {
    let filters = options
        .filters
        .iter()
        .map(|text| Filter::parse(text))
        .collect::<Result<Vec<_>, _>>()?;
    // Whoever asks for ended machines means those that are not shown without --all.
    let all = options.all
        || filters
            .iter()
            .any(|filter| matches!(filter, Filter::State(state) if state == "ended"));
    let mut machines: Vec<Machine> = client
        .machines(all)
        .await?
        .into_iter()
        .filter(|machine| Filter::all_match(&filters, machine))
        .collect();
    let forwards = forward::known(client).await;
    for machine in &mut machines {
        forward::show(&forwards, machine);
    }
    if options.json {
        print_json(&machines)?;
        return Ok(0);
    }
    let id = |machine: &Machine| {
        if options.no_trunc {
            machine.id.clone()
        } else {
            short_id(&machine.id).to_owned()
        }
    };
    if options.quiet {
        let ids: String = machines.iter().map(|machine| id(machine) + "\n").collect();
        print(&ids)?;
        return Ok(0);
    }
    let now = Timestamp::now();
    // Which copy of which service: where there is one.
    let serve = machines.iter().any(|machine| machine.service.is_some());
    let rows: Vec<Vec<String>> = machines
        .iter()
        .map(|machine| {
            let command = command_line(&machine.command);
            vec![
                id(machine),
                machine.name.clone(),
                machine.image.clone(),
                if options.no_trunc {
                    command
                } else {
                    shorten(&command, COMMAND_SHOWN_MAX)
                },
                ago(&machine.created_at, now),
                status(machine, now),
                machine
                    .choice
                    .as_ref()
                    .map_or_else(|| "-".to_owned(), |choice| choice.hypervisor.clone()),
                machine.ports.join(", "),
            ]
            .into_iter()
            .chain(serve.then(|| copy_of(machine)))
            .collect()
        })
        .collect();
    let mut head = vec![
        "ID",
        "NAME",
        "IMAGE",
        "COMMAND",
        "CREATED",
        "STATUS",
        "HYPERVISOR",
        "PORTS",
    ];
    head.extend(serve.then_some("SERVICE"));
    print(&table(&head, &rows))?;
    Ok(0)
}

/// Which copy of a service it is: the service, the slot, and the slot's generation.
fn copy_of(machine: &Machine) -> String {
    let service = machine.service.as_ref();
    service.map_or_else(String::new, |copy| {
        format!("{}/{} generation {}", copy.name, copy.slot, copy.generation)
    })
}

/// The state in words, with how long or how it ended.
fn status(machine: &Machine, now: Timestamp) -> String {
    match (machine.state.as_str(), machine.exit_code) {
        ("ended", Some(code)) => {
            let when = machine
                .ended_at
                .as_deref()
                .map_or_else(String::new, |time| format!(" {}", ago(time, now)));
            format!("ended ({code}){when}")
        }
        ("running", _) => match machine
            .started_at
            .as_deref()
            .and_then(|time| seconds_since(time, now))
        {
            Some(seconds) => format!("running {}", span(seconds)),
            None => "running".to_owned(),
        },
        (state, _) => state.to_owned(),
    }
}

/// `ps --filter`.
#[derive(Debug, PartialEq, Eq)]
enum Filter {
    Name(String),
    State(String),
    Image(String),
    Id(String),
    Label(String, Option<String>),
}

impl Filter {
    fn parse(text: &str) -> Result<Filter, Failure> {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        let value = value.to_owned();
        match key {
            "name" => Ok(Filter::Name(value)),
            // Docker's words for the same states.
            "state" | "status" => Ok(Filter::State(
                match value.as_str() {
                    "exited" | "dead" => "ended",
                    "created" => "preparing",
                    other => other,
                }
                .to_owned(),
            )),
            "image" | "ancestor" => Ok(Filter::Image(value)),
            "id" => Ok(Filter::Id(value)),
            "label" => Ok(match value.split_once('=') {
                Some((name, value)) => Filter::Label(name.to_owned(), Some(value.to_owned())),
                None => Filter::Label(value, None),
            }),
            _ => Err(Failure::new(format!("{text:?} is not a filter"))
                .hint("write name=…, state=…, image=…, id=… or label=NAME[=value]")),
        }
    }

    fn matches(&self, machine: &Machine) -> bool {
        match self {
            Filter::Name(part) => machine.name.contains(part),
            Filter::State(state) => machine.state == *state,
            Filter::Image(image) => {
                machine.image == *image
                    || machine.image.split([':', '@']).next() == Some(image)
                    || machine.image_id == *image
            }
            Filter::Id(id) => machine.id.starts_with(id),
            Filter::Label(name, value) => match (machine.labels.get(name), value) {
                (Some(found), Some(value)) => found == value,
                (found, None) => found.is_some(),
                (None, Some(_)) => false,
            },
        }
    }

    /// As docker: of filters with the same key one must match, and of each key.
    fn all_match(filters: &[Filter], machine: &Machine) -> bool {
        filters.iter().all(|filter| {
            filters
                .iter()
                .filter(|other| std::mem::discriminant(*other) == std::mem::discriminant(filter))
                .any(|other| other.matches(machine))
        })
    }
}

/// `vistara stop`: all at the same time, as each may take its whole grace.
pub(crate) async fn stop(client: &Client, options: &StopOptions) -> Result<u8, Failure> {
    let request = StopRequest {
        grace_ms: options
            .time
            .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        signal: options.signal.clone(),
    };
    let request = &request;
    each(&options.machines, async |machine| {
        client.stop(machine, request).await?;
        Ok(())
    })
    .await
}

/// `vistara kill`.
pub(crate) async fn kill(client: &Client, options: &KillOptions) -> Result<u8, Failure> {
    let request = KillRequest {
        signal: Some(options.signal.clone()),
    };
    let request = &request;
    each(&options.machines, async |machine| {
        client.kill(machine, request).await?;
        Ok(())
    })
    .await
}

/// `vistara pause`.
pub(crate) async fn pause(client: &Client, options: &MachinesOptions) -> Result<u8, Failure> {
    each(&options.machines, async |machine| {
        client.pause(machine).await?;
        Ok(())
    })
    .await
}

/// `vistara resume`.
pub(crate) async fn resume(client: &Client, options: &MachinesOptions) -> Result<u8, Failure> {
    each(&options.machines, async |machine| {
        client.resume(machine).await?;
        Ok(())
    })
    .await
}

/// `vistara rm`.
pub(crate) async fn rm(client: &Client, options: &RmOptions) -> Result<u8, Failure> {
    each(&options.machines, async |machine| {
        match client.remove_machine(machine, options.force).await {
            Ok(()) => Ok(()),
            Err(error) => {
                let failure = Failure::from(error);
                match failure.kind {
                    Some(ErrorKind::NotFound) if options.force => Ok(()),
                    Some(ErrorKind::Conflict) if failure.hint.is_none() && !options.force => {
                        Err(failure.hint(format!(
                            "`vistara stop {machine}` ends it, `vistara rm -f {machine}` kills and removes it"
                        )))
                    }
                    _ => Err(failure),
                }
            }
        }
    })
    .await
}

/// Does something with each machine at the same time, and prints the names of those for which it went well, in order.
async fn each(
    machines: &[String],
    action: impl AsyncFn(&str) -> Result<(), Failure>,
) -> Result<u8, Failure> {
    let mut failures = Failures::default();
    let action = &action;
    let mut results: FuturesOrdered<_> = machines
        .iter()
        .map(|machine| async move { (machine, action(machine).await) })
        .collect();
    while let Some((machine, result)) = results.next().await {
        match result {
            Ok(()) => print(&format!("{machine}\n"))?,
            Err(failure) => failures.add(machine, failure),
        }
    }
    failures.code()
}

/// `vistara wait`.
pub(crate) async fn wait(client: &Client, options: &WaitOptions) -> Result<u8, Failure> {
    let mut failures = Failures::default();
    let mut rows = Vec::new();
    let mut results: FuturesOrdered<_> = options
        .machines
        .iter()
        .map(|machine| async move { (machine, client.wait(machine).await) })
        .collect();
    while let Some((machine, result)) = results.next().await {
        match result {
            Ok(answer) if options.json => rows.push(serde_json::json!({
                "machine": machine,
                "exit_code": answer.exit_code,
                "message": answer.message,
            })),
            Ok(answer) => print(&format!("{}\n", answer.exit_code))?,
            Err(error) => failures.add(machine, error.into()),
        }
    }
    if options.json {
        print_json(&rows)?;
    }
    failures.code()
}

/// `vistara inspect`.
pub(crate) async fn inspect(client: &Client, options: &InspectOptions) -> Result<u8, Failure> {
    let mut failures = Failures::default();
    let mut found = Vec::new();
    for name in &options.names {
        match inspect_one(client, name, options.kind).await {
            Ok(value) => found.push(value),
            Err(failure) => failures.add(name, failure),
        }
    }
    print_json(&found)?;
    failures.code()
}

async fn inspect_one(
    client: &Client,
    name: &str,
    kind: Option<InspectKind>,
) -> Result<serde_json::Value, Failure> {
    let json = |value: Result<serde_json::Value, serde_json::Error>| {
        value.map_err(|error| Failure::because("cannot write JSON", error))
    };
    if kind != Some(InspectKind::Image) {
        match client.machine(name).await {
            Ok(mut detail) => {
                forward::show(&forward::known(client).await, &mut detail.machine);
                return json(serde_json::to_value(detail));
            }
            Err(error) => {
                let failure = Failure::from(error);
                // What is no machine's name may still be an image's.
                let perhaps = matches!(failure.kind, Some(ErrorKind::NotFound | ErrorKind::User));
                if kind.is_some() || !perhaps {
                    return Err(failure);
                }
            }
        }
    }
    match client.image(name).await {
        Ok(image) => json(serde_json::to_value(image)),
        Err(error) => {
            let failure = Failure::from(error);
            let gone = matches!(
                failure.kind,
                Some(ErrorKind::NotFound | ErrorKind::ImageNotFound)
            );
            Err(if gone && kind.is_none() {
                Failure::new(format!(
                    "no machine and no image is called {}",
                    visible(name, false)
                ))
                .hint("`vistara ps -a` lists machines, `vistara images` lists images")
            } else {
                failure
            })
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn machine() -> Machine {
        serde_json::from_value(serde_json::json!({
            "id": "00112233445566778899aabbccddeeff", "name": "web-1", "image": "debian:12",
            "image_id": "sha256:aa", "command": ["sh"], "state": "running", "generation": 0,
            "created_at": "2026-01-01T00:00:00Z", "started_at": "2026-01-01T00:00:10Z",
            "ended_at": null, "exit_code": null, "message": null, "ports": [], "choice": null,
            "labels": {"tier": "front"}
        }))
        .unwrap()
    }

    #[test]
    fn filters_of_one_key_are_alternatives_and_keys_add_up() {
        for (filters, want) in [
            (vec![], true),
            (vec!["name=web"], true),
            (vec!["name=db"], false),
            (vec!["name=db", "name=web"], true),
            (vec!["name=web", "state=ended"], false),
            (vec!["status=running", "ancestor=debian"], true),
            (vec!["image=debian:12", "id=0011"], true),
            (vec!["image=debian:13"], false),
            (vec!["label=tier"], true),
            (vec!["label=tier=front"], true),
            (vec!["label=tier=back"], false),
            (vec!["label=other"], false),
        ] {
            let parsed: Vec<Filter> = filters
                .iter()
                .map(|text| Filter::parse(text).unwrap())
                .collect();
            assert_eq!(Filter::all_match(&parsed, &machine()), want, "{filters:?}");
        }
        assert!(Filter::parse("size=1").is_err());
        assert_eq!(
            Filter::parse("status=exited").unwrap(),
            Filter::State("ended".to_owned())
        );
    }

    #[test]
    fn a_status_says_how_long_or_how_it_ended() {
        let now: Timestamp = "2026-01-01T00:05:10Z".parse().unwrap();
        let mut machine = machine();
        assert_eq!(status(&machine, now), "running 5 minutes");
        machine.state = "ended".to_owned();
        machine.exit_code = Some(3);
        machine.ended_at = Some("2026-01-01T00:05:00Z".to_owned());
        assert_eq!(status(&machine, now), "ended (3) 10 seconds ago");
    }
}
