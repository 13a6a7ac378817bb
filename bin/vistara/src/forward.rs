//! `-p` of machines on other nodes: ports of this host, which lead there through the local node.

use crate::failure::Failure;
use vistara_api::{Client, Forward, ForwardRequest, Machine, RunRequest};
use vistara_model::PortMapping;

/// Has the ports that were asked for lead into a machine that was made on another node; nothing where it is on this one.
pub(crate) async fn publish(
    client: &Client,
    request: &RunRequest,
    machine: &Machine,
) -> Result<(), Failure> {
    let Some(node) = client.node() else {
        return Ok(());
    };
    let local = client.local();
    for text in &request.ports {
        let port: PortMapping = text
            .parse()
            .map_err(|error| Failure::because("cannot publish", error))?;
        let forward = ForwardRequest {
            node: node.to_owned(),
            machine: machine.id.clone(),
            listen: format!("{}:{}", port.host_address, port.host_port),
            guest_port: port.guest_port,
        };
        local.forward(&forward).await.map_err(Failure::at(format!(
            "cannot publish {}:{}",
            port.host_address, port.host_port
        )))?;
    }
    Ok(())
}

/// The forwards of this host into machines on the other node; none where it is this one, or where they cannot be had.
pub(crate) async fn known(client: &Client) -> Vec<Forward> {
    match client.node() {
        Some(_) => client.local().forwards().await.unwrap_or_default(),
        None => Vec::new(),
    }
}

/// Shows a machine's ports as those of this host, where they lead there.
pub(crate) fn show(forwards: &[Forward], machine: &mut Machine) {
    for port in &mut machine.ports {
        let Some((_, guest)) = port.rsplit_once("->") else {
            continue;
        };
        let leads = |forward: &&Forward| {
            forward.machine == machine.id && format!("{}/tcp", forward.guest_port) == guest
        };
        if let Some(forward) = forwards.iter().find(leads) {
            let trouble = match &forward.trouble {
                Some(trouble) => format!(" ({trouble})"),
                None => String::new(),
            };
            *port = format!("{}->{guest}{trouble}", forward.listen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_shown_where_this_host_leads_to_them() {
        let mut machine = crate::machine_commands::tests::machine();
        machine.id = "m1".to_owned();
        machine.ports = vec![
            "127.0.0.1:4000->80/tcp".to_owned(),
            "127.0.0.1:4001->81/tcp".to_owned(),
        ];
        let forward = |machine: &str, guest_port| Forward {
            id: "f".to_owned(),
            node: "n".to_owned(),
            machine: machine.to_owned(),
            listen: "127.0.0.1:8080".to_owned(),
            guest_port,
            trouble: None,
        };
        show(&[forward("m2", 81), forward("m1", 80)], &mut machine);
        assert_eq!(
            machine.ports,
            ["127.0.0.1:8080->80/tcp", "127.0.0.1:4001->81/tcp"]
        );
    }
}
