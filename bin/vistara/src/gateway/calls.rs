//! What the calls do, as a client of the node's public interface.
//!
//! A machine belongs to the token that it was made with, by its label [`OWNER`]; who has another token, or none, is told the same
//! as of a machine that does not exist. Nothing is remembered here, so a gateway that is started again knows them all.

use super::tokens::Token;
use super::wire::{self, Call, Publishing, Spawn};
use crate::connect;
use crate::failure::{Failure, eprint_line};
use crate::image_commands;
use crate::image_transfer;
use crate::places::Places;
use crate::published;
use crate::run_command;
use crate::run_options::PullPolicy;
use crate::text::visible;
use crate::{environment, forward};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use vistara_api::{Client, ErrorKind, LogEvent, Machine, PullRequest, RunRequest, StopRequest};

/// Label with the id of the token that a machine was made with.
pub(crate) const OWNER: &str = "vistara.gateway";
/// Label with the ports that were asked for, as `443:8080,80:3000`.
const PORTS: &str = "vistara.gateway.ports";
/// How much of a machine's output `/logs` gives, in bytes: its end.
const LOG_BYTES_MAX: usize = 1 << 20;
/// How many lines of it are read: a line of one byte is an event of some hundred.
const LOG_LINES_MAX: u64 = 20_000;

/// How the gateway does what it is asked.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) places: Places,
    /// Another node, where the machines are to be there.
    pub(crate) on: Option<String>,
    pub(crate) publishing: Publishing,
    pub(crate) pull: PullPolicy,
    /// Whether registries are asked with the gateway's user's credentials.
    pub(crate) credentials: bool,
    /// Most machines that one token may have at a time.
    pub(crate) machines_max: usize,
}

/// The gateway's hand.
#[derive(Debug)]
pub(crate) struct Calls {
    settings: Settings,
    /// Held from counting a token's machines until there is one more.
    counting: tokio::sync::Mutex<()>,
}

/// Why a call failed, for whoever asked.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) String);

impl Refused {
    fn new(message: impl Into<String>) -> Refused {
        Refused(message.into())
    }

    fn no_machine() -> Refused {
        Refused::new("no machine of yours has this id")
    }
}

impl From<Failure> for Refused {
    /// What a client may know of a failure; the gateway's owner is told all of it.
    fn from(failure: Failure) -> Refused {
        eprint_line(&format!("vistara: {}", visible(&failure.message, false)));
        let has_path = failure.message.contains(" /") || failure.message.contains("\"/");
        let tell = match failure.kind {
            // About what was asked: a path in it is one of the guest.
            Some(ErrorKind::User | ErrorKind::ImageNotFound | ErrorKind::StartFailed) => true,
            // A path says how the host is made; a sentence about room does not.
            Some(ErrorKind::Host | ErrorKind::Peer | ErrorKind::Conflict | ErrorKind::NotFound) => {
                !has_path
            }
            Some(ErrorKind::Internal | ErrorKind::Denied) | None => false,
        };
        if tell {
            return Refused(failure.message);
        }
        Refused::new(
            "the host cannot do this now: its owner finds the reason in the gateway's output",
        )
    }
}

impl From<vistara_api::ClientError> for Refused {
    fn from(error: vistara_api::ClientError) -> Refused {
        Failure::from(error).into()
    }
}

type Answer = Result<Value, Refused>;

impl Calls {
    pub(crate) fn new(settings: Settings) -> Calls {
        Calls {
            settings,
            counting: tokio::sync::Mutex::new(()),
        }
    }

    /// Does what is asked. `reached_at` is the address of ours that the client came to.
    pub(crate) async fn answer(
        &self,
        call: &Call,
        body: &[u8],
        token: &Token,
        reached_at: Option<IpAddr>,
    ) -> Answer {
        match call {
            Call::Spawn => {
                let spawn = Spawn::read(body).map_err(Refused)?;
                let client = self.client().await?;
                self.spawn(&client, &spawn, token, reached_at).await
            }
            Call::Stop(id) => {
                let client = self.client().await?;
                let machine = own(&client, id, token).await?;
                client.stop(&machine.id, &StopRequest::default()).await?;
                Ok(wire::response(self.node(), &[]))
            }
            Call::List => {
                let client = self.client().await?;
                self.list(&client, token).await
            }
            Call::Logs(id) => {
                let client = self.client().await?;
                let machine = own(&client, id, token).await?;
                Ok(wire::response(
                    logs(&client, &machine.id).await?.into(),
                    &[],
                ))
            }
        }
    }

    /// A node that was started in the background may have left since it was last asked.
    async fn client(&self) -> Result<Client, Refused> {
        let client = connect::or_start(&self.settings.places).await?;
        Ok(match &self.settings.on {
            Some(node) => client.on(node),
            None => client,
        })
    }

    /// hypercore's word for a node.
    fn node(&self) -> Value {
        json!({"id": self.settings.on.as_deref().unwrap_or("local"), "ip": ""})
    }

    async fn spawn(
        &self,
        client: &Client,
        spawn: &Spawn,
        token: &Token,
        reached_at: Option<IpAddr>,
    ) -> Answer {
        let warnings: Vec<String> = spawn
            .unknown
            .iter()
            .map(|field| format!("{} is not known and has no effect", visible(field, false)))
            .collect();
        let mut labels = BTreeMap::from([(OWNER.to_owned(), token.id.clone())]);
        if !spawn.ports.is_empty() {
            let pairs: Vec<String> = (spawn.ports.iter())
                .map(|(host, guest)| format!("{host}:{guest}"))
                .collect();
            labels.insert(PORTS.to_owned(), pairs.join(","));
        }
        let request = spawn.request(self.settings.publishing, labels);
        if spawn.dry_run {
            return self.dry_run(client, &request, token, warnings).await;
        }
        let machine = self.create(client, &request, token).await?;
        // Published on this host before anybody is told where.
        if let Err(failure) = forward::publish(client, &request, &machine).await {
            return Err(run_command::abandon(client, &machine, failure).await.into());
        }
        let mut machine = match run_command::started(client, machine.clone()).await {
            Ok(machine) => machine,
            Err(failure) => {
                // It never ran: nobody has its id, and nobody would remove it.
                let _ = client.remove_machine(&machine.id, true).await;
                return Err(failure.into());
            }
        };
        forward::show(&forward::known(client).await, &mut machine);
        let addresses = published::addresses(&machine.ports);
        let at = |guest: u16| {
            let address = addresses.iter().find(|address| address.guest_port == guest);
            address.map(std::slice::from_ref)
        };
        let main = spawn.main_port().and_then(|port| spawn.ports.get(&port));
        let url = main
            .and_then(|guest| at(*guest))
            .and_then(|address| published::url(address, reached_at))
            .unwrap_or_default();
        let ports: BTreeMap<String, String> = (spawn.ports.iter())
            .filter_map(|(host, guest)| {
                let [address] = at(*guest)? else { return None };
                let seen = published::seen_from(address.host, reached_at);
                Some((host.to_string(), seen.to_string()))
            })
            .collect();
        let response = json!({"id": machine.id, "url": url, "ports": ports});
        Ok(wire::response(response, &warnings))
    }

    /// Makes a machine where the token may have one more, with its image pulled where that is allowed.
    async fn create(
        &self,
        client: &Client,
        request: &RunRequest,
        token: &Token,
    ) -> Result<Machine, Refused> {
        match self.create_counted(client, request, token).await {
            Err(error) if self.may_pull(&error) => {
                self.pull(client, &request.image).await?;
                Ok(self.create_counted(client, request, token).await?)
            }
            result => Ok(result?),
        }
    }

    async fn create_counted(
        &self,
        client: &Client,
        request: &RunRequest,
        token: &Token,
    ) -> Result<Machine, Failure> {
        let _held = self.counting.lock().await;
        self.make_room(client, token).await?;
        Ok(client.run(request).await?)
    }

    fn may_pull(&self, failure: &Failure) -> bool {
        self.settings.pull != PullPolicy::Never && failure.kind == Some(ErrorKind::ImageNotFound)
    }

    async fn pull(&self, client: &Client, image: &str) -> Result<(), Failure> {
        if client.node().is_some()
            && (image_transfer::send_own(client, image, true).await?).is_some()
        {
            return Ok(());
        }
        let request = PullRequest {
            image: image.to_owned(),
            insecure: false,
            // Credentials are the owner's; what they open is not for everybody with a token.
            docker_config_dir: (self.settings.credentials)
                .then(environment::docker_config_dir)
                .flatten()
                .map(|dir| dir.to_string_lossy().into_owned()),
        };
        image_commands::pull_image(client, &request, true).await?;
        Ok(())
    }

    /// Refuses one more than a token may have, and removes those of its ended machines, oldest first, that are more than that.
    async fn make_room(&self, client: &Client, token: &Token) -> Result<(), Failure> {
        let max = self.settings.machines_max;
        let own: Vec<Machine> = client
            .machines(true)
            .await?
            .into_iter()
            .filter(|machine| is_of(machine, token))
            .collect();
        let (mut ended, live): (Vec<Machine>, Vec<Machine>) = own
            .into_iter()
            .partition(|machine| machine.state == "ended");
        if live.len() >= max {
            return Err(Failure {
                kind: Some(ErrorKind::Conflict),
                ..Failure::new(format!(
                    "this token has {max} machines already, which is all that it may have: stop one first"
                ))
            });
        }
        ended.sort_by(|one, other| other.ended_at.cmp(&one.ended_at));
        for machine in ended.iter().skip(max) {
            // Somebody else may have removed it; the next request tries again.
            let _ = client.remove_machine(&machine.id, false).await;
        }
        Ok(())
    }

    async fn dry_run(
        &self,
        client: &Client,
        request: &RunRequest,
        token: &Token,
        mut warnings: Vec<String>,
    ) -> Answer {
        self.make_room(client, token).await?;
        let reasons = match client.explain(request).await.map_err(Failure::from) {
            Ok(explanation) => explanation.choice.reasons,
            Err(failure) if self.may_pull(&failure) => {
                warnings.push(
                    "the image is not here yet, and has not been looked for in its registry"
                        .to_owned(),
                );
                Vec::new()
            }
            Err(failure) => return Err(failure.into()),
        };
        let response = json!({"id": "", "url": "", "dry_run": true, "reasons": reasons});
        Ok(wire::response(response, &warnings))
    }

    async fn list(&self, client: &Client, token: &Token) -> Answer {
        let mut workloads = Vec::new();
        for machine in client.machines(false).await? {
            if !is_of(&machine, token) {
                continue;
            }
            // It may be gone by now.
            let Ok(detail) = client.machine(&machine.id).await else {
                continue;
            };
            let ports: BTreeMap<&str, u16> = (machine.labels.get(PORTS).into_iter())
                .flat_map(|pairs| pairs.split(','))
                .filter_map(|pair| pair.split_once(':'))
                .filter_map(|(host, guest)| Some((host, guest.parse().ok()?)))
                .collect();
            workloads.push(json!({
                "id": machine.id,
                // Without `env`: values may be secrets.
                "source_request": {
                    "cores": detail.cpus.ceil() as u64,
                    "memory": detail.memory_bytes >> 20,
                    "image_ref": machine.image,
                    "ports": ports,
                },
                "state": machine.state,
            }));
        }
        let states = json!([{"node": self.node(), "workloads": workloads}]);
        Ok(wire::response(json!({"states": states}), &[]))
    }
}

fn is_of(machine: &Machine, token: &Token) -> bool {
    machine.labels.get(OWNER) == Some(&token.id)
}

/// The machine of this whole id, where it was made with this token.
async fn own(client: &Client, id: &str, token: &Token) -> Result<Machine, Refused> {
    match client.machine(id).await {
        // A node also takes names and beginnings of ids.
        Ok(detail) if detail.machine.id == id && is_of(&detail.machine, token) => {
            Ok(detail.machine)
        }
        Ok(_) => Err(Refused::no_machine()),
        Err(error)
            if error
                .body()
                .is_some_and(|body| matches!(body.kind, ErrorKind::NotFound | ErrorKind::User)) =>
        {
            Err(Refused::no_machine())
        }
        Err(error) => Err(error.into()),
    }
}

/// The end of what a machine printed, standard output and standard error as they came.
async fn logs(client: &Client, id: &str) -> Result<String, Refused> {
    let mut events = client.logs(id, false, None, Some(LOG_LINES_MAX)).await?;
    let mut end: VecDeque<u8> = VecDeque::new();
    while let Some(event) = events.next().await {
        match event? {
            LogEvent::Output { data, .. } => {
                let data = BASE64_STANDARD.decode(&data).unwrap_or_default();
                end.extend(data);
            }
            LogEvent::Gap { bytes, .. } => {
                end.extend(format!("\n({bytes} bytes are missing here)\n").bytes());
            }
        }
        let over = end.len().saturating_sub(LOG_BYTES_MAX);
        end.drain(..over);
    }
    Ok(String::from_utf8_lossy(end.make_contiguous()).into_owned())
}
