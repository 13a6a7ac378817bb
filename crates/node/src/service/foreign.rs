//! What other nodes ask: the same interface as the owner's, behind a gate that refuses whatever is not granted.
//!
//! The gate knows each request's method and path. It lets a request through to a machine only under that machine's whole
//! id, after finding it among those that the caller may see: handlers behind it never look a name up for a stranger.

use crate::fault::{Answer, Fault};
use crate::mesh::{Caller, Foreign, Guarded, Mesh, Visit};
use crate::node::Node;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::Uri;
use axum::http::uri::PathAndQuery;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use std::io;
use std::sync::Arc;
use tokio::sync::mpsc;
use vistara_api::RunRequest;
use vistara_control::{Refusal, Requirement, lookup, requirement};
use vistara_model::{PortMapping, Protocol, Right};

/// Streams of other nodes, as something to be served.
pub(super) struct Visits(mpsc::Receiver<Visit>);

impl Visits {
    pub(super) fn new(visits: mpsc::Receiver<Visit>) -> Visits {
        Visits(visits)
    }
}

impl axum::serve::Listener for Visits {
    type Io = Guarded;
    type Addr = Caller;

    async fn accept(&mut self) -> (Guarded, Caller) {
        match self.0.recv().await {
            Some(Visit { stream, caller }) => (stream, caller),
            // The mesh has what sends them as long as the node lives.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Caller> {
        Err(io::Error::other("others come by key, not by address"))
    }
}

impl Connected<IncomingStream<'_, Visits>> for Caller {
    fn connect_info(stream: IncomingStream<'_, Visits>) -> Caller {
        stream.remote_addr().clone()
    }
}

/// Makes of a request for a machine what its caller may ask for. What names something of the host is refused before anybody
/// looks whether it exists.
pub(crate) fn tame(caller: &Caller, request: &mut RunRequest) -> Answer<()> {
    let Some(foreign) = caller.foreign() else {
        return Ok(());
    };
    if !request.volumes.is_empty() {
        return Err(Refusal::Host("directories and volumes").into());
    }
    if request.huge_pages {
        return Err(Refusal::Host("huge pages").into());
    }
    let may_use_network = foreign.may(Right::Network);
    for text in &mut request.ports {
        let port: PortMapping = text
            .parse()
            .map_err(|error: vistara_model::SpecError| Fault::user(error.to_string()))?;
        if !may_use_network {
            return Err(Refusal::Network.into());
        }
        if port.protocol != Protocol::Tcp {
            return Err(
                Fault::user("only TCP ports are published on another node's host")
                    .hint("leave out the ports with /udp"),
            );
        }
        // The port that the caller named is one of its own host, which leads to this one through the mesh.
        *text = format!("0:{}", port.guest_port);
    }
    if !may_use_network {
        // What somebody without the right gets who does not ask for any; who asks for one is refused.
        request.network.get_or_insert_with(|| "none".to_owned());
    }
    Ok(())
}

/// What the gate needs.
#[derive(Clone)]
pub(super) struct Gate {
    pub(super) node: Arc<Node>,
    pub(super) mesh: Arc<Mesh>,
}

/// Lets a request through, or answers why not.
pub(super) async fn gate(
    State(gate): State<Gate>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    mut request: Request,
    next: Next,
) -> Response {
    let passed = match &caller {
        Caller::Foreign(foreign) => pass(&gate, foreign, &caller, &mut request).await,
        Caller::Refused(fault) => Err(fault.clone()),
        // Nobody is the owner over the mesh.
        Caller::Owner => Err(Fault::new(
            vistara_api::ErrorKind::Internal,
            "the owner does not come over the mesh",
        )),
    };
    match passed {
        Ok(()) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(fault) => fault.into_response(),
    }
}

async fn pass(
    gate: &Gate,
    foreign: &Foreign,
    caller: &Caller,
    request: &mut Request,
) -> Answer<()> {
    let path = request.uri().path().to_owned();
    // What lies elsewhere is in no table, and so nobody's but the owner's.
    let parts: Vec<&str> = match path.strip_prefix("/v1/") {
        Some(rest) => rest.split('/').collect(),
        None => vec![""],
    };
    let needed = requirement(request.method().as_str(), &parts);
    if needed == Requirement::Partner {
        // Who that is, the handler finds in what it is shown.
        return Ok(());
    }
    let own = gate.mesh.open().await?.identity.id();
    foreign.authorize(&gate.mesh, own, needed)?;
    if let (Requirement::OwnMachine, ["machines", typed, rest @ ..]) = (needed, parts.as_slice()) {
        let id = own_machine(gate, caller, &decode(typed)?)?;
        let mut whole = format!("/v1/machines/{id}");
        for part in rest {
            whole.push('/');
            whole.push_str(part);
        }
        if let Some(query) = request.uri().query() {
            whole.push('?');
            whole.push_str(query);
        }
        let bad = |error: axum::http::Error| Fault::user(error.to_string());
        let whole = PathAndQuery::try_from(whole).map_err(|error| bad(error.into()))?;
        *request.uri_mut() = Uri::builder().path_and_query(whole).build().map_err(bad)?;
    }
    Ok(())
}

/// The whole id of the machine that a stranger typed, among those that it may see. One that it may not see is not there.
fn own_machine(gate: &Gate, caller: &Caller, typed: &str) -> Answer<String> {
    let seen: Vec<(String, String)> = gate
        .node
        .all()
        .iter()
        .map(|handle| handle.record())
        .filter(|record| caller.sees(record))
        .map(|record| (record.id.to_string(), record.name.to_string()))
        .collect();
    let pairs = seen.iter().map(|(id, name)| (id.as_str(), name.as_str()));
    Ok(lookup(typed, pairs)?.to_owned())
}

/// A path's segment without its percent signs.
fn decode(segment: &str) -> Answer<String> {
    let bad = || Fault::user("the path is not well formed");
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        if byte == b'%' {
            let digits = after
                .get(..2)
                .and_then(|digits| std::str::from_utf8(digits).ok());
            let value =
                digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
            let value = value.and_then(|digits| u8::from_str_radix(digits, 16).ok());
            bytes.push(value.ok_or_else(bad)?);
            rest = &after[2..];
        } else {
            bytes.push(byte);
            rest = after;
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::decode;

    #[test]
    fn segments_are_decoded_as_the_client_encodes_them_and_nothing_panics() {
        for (segment, text) in [("a-b_1", "a-b_1"), ("%41%2e%2F", "A./"), ("", "")] {
            assert_eq!(decode(segment).ok().as_deref(), Some(text));
        }
        for segment in ["%", "%4", "%zz", "%+1", "%ff", "%é"] {
            assert!(decode(segment).is_err(), "{segment}");
        }
    }
}
