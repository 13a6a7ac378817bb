//! `vistara gateway`: hypercore's HTTP calls, for programs that know them, in front of a node.
//!
//! A client of the public interface like any other command; off unless it runs. Whoever asks shows a token
//! ([`tokens`]); see `docs/guide/hypercore.md`, and decision 0021 for what is deliberately not as in hypercore.

mod calls;
mod server;
mod tokens;
mod wire;

use crate::failure::{Failure, eprint_line};
use crate::listing::{self, Form};
use crate::output::print;
use crate::place;
use crate::places::Places;
use crate::run_options::PullPolicy;
use crate::text::visible;
use crate::{connect, output};
use calls::{Calls, Settings};
use clap::{Args, Subcommand};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokens::Tokens;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use wire::Publishing;

/// `gateway`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct GatewayOptions {
    #[command(subcommand)]
    pub(crate) command: Option<GatewayCommand>,
    /// Where to listen; port 0 takes any
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8001")]
    pub(crate) listen: SocketAddr,
    /// Address of this host on which machines' ports are published
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) publish: Ipv4Addr,
    /// Publish on the very host ports that are asked for, instead of free ones: then each can be had once, and whoever has a
    /// token takes any
    #[arg(long)]
    pub(crate) exact_ports: bool,
    /// When to fetch images: missing or never
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pub(crate) pull: PullPolicy,
    /// Fetch images with your registry credentials, for whoever has a token
    #[arg(long)]
    pub(crate) registry_credentials: bool,
    /// Most machines that one token may have at a time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) max_machines: u32,
}

/// `gateway …`.
#[derive(Debug, Subcommand)]
pub(crate) enum GatewayCommand {
    /// Manage the tokens that open the gateway
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
}

/// `gateway token …`.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token, and print it this once
    Create {
        /// What to call it here
        #[arg(value_parser = crate::run_options::checked::<vistara_model::MachineName>)]
        name: String,
    },
    /// List tokens
    #[command(visible_alias = "list")]
    Ls {
        /// A JSON array
        #[arg(long)]
        json: bool,
    },
    /// Revoke tokens; machines that were made with them go on
    #[command(visible_alias = "revoke")]
    Rm {
        /// Tokens, by name or id
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// `vistara gateway`.
pub(crate) async fn gateway(
    options: GatewayOptions,
    places: &Places,
    on: Option<String>,
) -> Result<u8, Failure> {
    let tokens = Tokens::of(places);
    match &options.command {
        Some(_) if on.is_some() => Err(Failure::new("tokens are this host's: leave --on out")),
        Some(GatewayCommand::Token { command }) => manage(command, &tokens, places),
        None => serve(options, places, on, tokens).await,
    }
}

fn manage(command: &TokenCommand, tokens: &Tokens, places: &Places) -> Result<u8, Failure> {
    match command {
        TokenCommand::Create { name } => {
            places.prepare()?;
            let token = tokens.create(name, jiff::Timestamp::now().to_string())?;
            print(&format!("{token}\n"))?;
            eprint_line(
                "hint: it is shown this once; send it as the header Authorization: Bearer TOKEN",
            );
            Ok(0)
        }
        TokenCommand::Ls { json } => {
            let all = tokens.all()?;
            if *json {
                let shown: Vec<_> = all
                    .iter()
                    .map(|token| {
                        serde_json::json!({
                            "name": token.name, "id": token.id, "created_at": token.created_at,
                        })
                    })
                    .collect();
                output::print_json(&shown)?;
                return Ok(0);
            }
            let now = jiff::Timestamp::now();
            let form = Form::of(false, false);
            listing::list(
                &all,
                form,
                |token| &token.name,
                &["NAME", "ID", "CREATED"],
                |token| {
                    vec![
                        token.name.clone(),
                        token.id.clone(),
                        crate::text::ago(&token.created_at, now),
                    ]
                },
            )
        }
        TokenCommand::Rm { names } => {
            let mut failures = listing::Failures::default();
            for name in names {
                match tokens.remove(name) {
                    Ok(()) => print(&format!("{name}\n"))?,
                    Err(failure) => failures.add(name, failure),
                }
            }
            failures.code()
        }
    }
}

async fn serve(
    options: GatewayOptions,
    places: &Places,
    on: Option<String>,
    tokens: Tokens,
) -> Result<u8, Failure> {
    if on.as_deref() == Some(place::ANY) {
        return Err(Failure::new("the gateway serves one node, and any is none")
            .hint("leave --on out for this node, or name one that `vistara nodes` lists"));
    }
    if options.pull == PullPolicy::Always {
        return Err(Failure::new(
            "--pull always is not for the gateway: every request would ask the registry",
        )
        .hint("`vistara images pull IMAGE` fetches an image anew")
        .code(2));
    }
    // Before anybody is served: what is wrong with the file of tokens, or with the node, is said here.
    let known = tokens.all()?;
    connect::or_start(places).await?;
    let listener = TcpListener::bind(options.listen).await.map_err(|error| {
        Failure::because(format!("cannot listen at {}", options.listen), error)
            .hint("--listen 127.0.0.1:0 takes any free port")
    })?;
    let address = listener
        .local_addr()
        .map_err(|error| Failure::because("cannot listen", error))?;
    for warning in warnings(&options, known.is_empty()) {
        eprint_line(&format!("vistara: WARNING: {warning}"));
    }
    let calls = Arc::new(Calls::new(Settings {
        places: places.clone(),
        on: on.clone(),
        publishing: Publishing {
            address: options.publish,
            exact: options.exact_ports,
        },
        pull: options.pull,
        credentials: options.registry_credentials,
        machines_max: usize::try_from(options.max_machines).unwrap_or(usize::MAX),
    }));
    let failed = |error| Failure::because("cannot start", error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    print(&format!("http://{address}\n"))?;
    let on = on.map_or_else(String::new, |node| {
        format!(" for the node {}", visible(&node, false))
    });
    eprint_line(&format!(
        "the gateway answers{on}; machines go on when it ends"
    ));
    tokio::select! {
        () = server::serve(listener, calls, tokens) => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(0)
}

/// What whoever starts the gateway so should know.
fn warnings(options: &GatewayOptions, no_tokens: bool) -> Vec<String> {
    let mut all = Vec::new();
    if !options.listen.ip().is_loopback() {
        all.push(format!(
            "{} is reached from other hosts, and nothing is encrypted: tokens and secrets in env can be read on the way. Listen on 127.0.0.1, with a proxy that speaks TLS in front",
            options.listen
        ));
    }
    if !options.publish.is_loopback() {
        all.push(format!(
            "machines' ports are published on {}, where other hosts may reach them: no token is asked there",
            options.publish
        ));
    }
    if no_tokens {
        all.push(
            "there is no token yet, and so everybody is refused: `vistara gateway token create NAME` makes one"
                .to_owned(),
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: GatewayOptions,
    }

    fn warned(line: &str, no_tokens: bool) -> Vec<String> {
        let line = Line::try_parse_from(line.split_whitespace()).unwrap();
        warnings(&line.options, no_tokens)
    }

    #[test]
    fn what_others_can_reach_is_warned_of() {
        assert_eq!(warned("gateway", false), Vec::<String>::new());
        assert_eq!(
            warned("gateway --listen [::1]:0", false),
            Vec::<String>::new()
        );
        assert!(warned("gateway", true)[0].contains("token create"));
        for line in [
            "gateway --listen 0.0.0.0:8001",
            "gateway --listen [::]:8001",
            "gateway --listen 192.0.2.1:80",
        ] {
            let warnings = warned(line, false);
            assert_eq!(warnings.len(), 1);
            assert!(warnings[0].contains("nothing is encrypted"), "{warnings:?}");
        }
        assert!(warned("gateway --publish 0.0.0.0", false)[0].contains("published"));
    }
}
