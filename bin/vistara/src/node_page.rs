//! `vistara node status`: the node on one page.

use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::places::Places;
use crate::text::visible;
use vistara_api::{Client, MeshStatus, NodeStatus};

/// Prints it; the exit code is 1 where none runs.
pub(crate) async fn status(
    client: Option<Client>,
    json: bool,
    places: &Places,
) -> Result<u8, Failure> {
    let Some(client) = client else {
        if json {
            print_json(&serde_json::Value::Null)?;
        } else {
            print("no node runs; the next command that needs one starts it\n")?;
        }
        return Ok(1);
    };
    let status = client.status().await?;
    if json {
        print_json(&status)?;
    } else {
        print(&page(&status, &places.socket.display().to_string()))?;
    }
    Ok(0)
}

fn page(status: &NodeStatus, socket: &str) -> String {
    let version = &status.version;
    let mut lines = vec![
        ("version", version.version.clone()),
        ("pid", version.pid.to_string()),
        ("started", version.started_at.clone()),
        ("socket", socket.to_owned()),
        ("state", version.state_dir.clone()),
        (
            "machines",
            format!(
                "{} running, {} ended and kept",
                version.machines_active, status.machines_ended
            ),
        ),
    ];
    match &status.mesh {
        None => lines.push(("id", "none yet: `vistara node init` makes it".to_owned())),
        Some(mesh) => lines.extend(among_others(status, mesh)),
    }
    let takes = if status.terms.draining {
        "nothing new (drained; `vistara node undrain` ends that)"
    } else {
        "what is placed here"
    };
    lines.push(("takes", takes.to_owned()));
    lines
        .iter()
        .map(|(name, value)| format!("{name:<9} {value}\n"))
        .collect()
}

fn among_others(status: &NodeStatus, mesh: &MeshStatus) -> Vec<(&'static str, String)> {
    let list = |words: &[String]| words.join(", ");
    let listens = match (mesh.on, mesh.addresses.is_empty()) {
        (false, _) => "no: `vistara node ticket` has it do so".to_owned(),
        (true, true) => "at no address of this host".to_owned(),
        (true, false) => list(&mesh.addresses),
    };
    let relay = match (&mesh.relay, &mesh.relay_trouble) {
        (Some(relay), _) => format!("{relay} (connected)"),
        (None, _) if mesh.relays.is_empty() && status.terms.relays.is_empty() => "none".to_owned(),
        (None, trouble) => {
            let named = if mesh.relays.is_empty() {
                &status.terms.relays
            } else {
                &mesh.relays
            };
            let why = trouble.as_deref().map(|why| visible(why, false));
            let why = why.unwrap_or_else(|| "not connected".to_owned());
            format!("{} ({why})", list(named))
        }
    };
    let near = if mesh.local_discovery {
        "this node tells where it is, and hears others"
    } else {
        "nothing is said in it"
    };
    let network = if status.terms.private {
        "keeps to itself (private)".to_owned()
    } else if status.members.is_empty() {
        "nobody else".to_owned()
    } else {
        let counts = status.members.iter();
        let counts = counts.map(|(word, count)| format!("{count} {word}"));
        counts.collect::<Vec<_>>().join(", ")
    };
    vec![
        ("id", mesh.id.clone()),
        ("listens", listens),
        ("relay", relay),
        ("local net", near.to_owned()),
        (
            "joined",
            format!(
                "{} nodes, {} connected, {} of them through a relay",
                status.joined, status.connected, status.relayed
            ),
        ),
        ("network", network),
        ("grants", format!("{} given and live", status.grants_live)),
    ]
}
