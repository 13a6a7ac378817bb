//! From what a client asked for to a validated [`MachineSpec`]. Every word is read here, once.

use crate::fault::{Answer, Fault};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;
use vistara_api::RunRequest;
use vistara_host::hugepages;
use vistara_model::{
    Bytes, Cpus, Hypervisor, ImageRef, MachineSpec, NamedVolume, Network, PortMapping, Rates,
    TtySize,
};

/// Memory of a machine whose user names none: enough for an interpreter, little enough for dozens on a laptop.
const MEMORY_DEFAULT: Bytes = Bytes::mib(512);
/// Writable layer of a machine whose user names none. Sparse: what is not written costs nothing.
const DISK_DEFAULT: Bytes = Bytes::gib(10);
/// Longest host name that Linux takes.
const HOSTNAME_MAX: usize = 64;
/// Most words, variables, volumes and ports of one machine each; far above any use, far below any harm.
const LIST_MAX: usize = 4096;
/// Longest time limit: a year.
const TIMEOUT_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

fn parse<T: FromStr>(text: &str) -> Answer<T>
where
    T::Err: std::error::Error,
{
    text.parse()
        .map_err(|error: T::Err| Fault::user(error.to_string()))
}

fn parse_all<T: FromStr>(list: &[String]) -> Answer<Vec<T>>
where
    T::Err: std::error::Error,
{
    if list.len() > LIST_MAX {
        return Err(Fault::user(format!(
            "a list in the request has more than {LIST_MAX} members"
        )));
    }
    list.iter().map(|text| parse(text)).collect()
}

fn parse_or<T: FromStr>(text: Option<&String>, default: T) -> Answer<T>
where
    T::Err: std::error::Error,
{
    text.map_or(Ok(default), |text| parse(text))
}

/// The memory that a request gets.
pub(crate) fn memory(text: Option<&String>) -> Answer<Bytes> {
    parse_or(text, MEMORY_DEFAULT)
}

/// The CPUs that a request gets.
pub(crate) fn cpus(text: Option<&String>) -> Answer<Cpus> {
    parse_or(text, Cpus::ONE)
}

/// What a request wants to run it.
pub(crate) fn hypervisor(text: Option<&String>) -> Answer<Hypervisor> {
    parse_or(text, Hypervisor::default())
}

/// The bounds that were asked for. Below the least of each a guest would not come up in time, and none is above what monitors
/// can count with.
fn rates(request: &RunRequest, network: Network) -> Answer<Rates> {
    let rate = |name: &str, text: Option<&String>, least: Bytes| -> Answer<Option<Bytes>> {
        let rate: Option<Bytes> = text.map(|text| parse(text)).transpose()?;
        match rate {
            Some(rate) if rate < least => Err(Fault::user(format!(
                "{rate} a second is too little for {name}: the least is {least}"
            ))),
            Some(rate) if rate > Rates::PER_S_MAX => Err(Fault::user(format!(
                "{rate} a second is too much for {name}: the most is {}; leave it out for no bound",
                Rates::PER_S_MAX
            ))),
            rate => Ok(rate),
        }
    };
    if network == Network::None && request.network_rate.is_some() {
        return Err(Fault::user(
            "a machine without a network has no network rate; leave out one of the two",
        ));
    }
    let least = Rates::DISK_OPS_PER_S_MIN;
    if let Some(ops) = request.disk_ops.filter(|ops| *ops < least) {
        return Err(Fault::user(format!(
            "{ops} operations a second are too few for a disk: the least is {least}"
        )));
    }
    Ok(Rates {
        disk_per_s: rate("a disk", request.disk_rate.as_ref(), Rates::DISK_PER_S_MIN)?,
        disk_ops_per_s: request.disk_ops,
        network_per_s: rate(
            "a network",
            request.network_rate.as_ref(),
            Rates::NETWORK_PER_S_MIN,
        )?,
    })
}

/// Validates a request for an image that has been found under `image`.
pub(crate) fn spec(request: &RunRequest, image: ImageRef) -> Answer<MachineSpec> {
    if let Some(hostname) = &request.hostname {
        let good = !hostname.is_empty()
            && hostname.len() <= HOSTNAME_MAX
            && hostname
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
        if !good {
            return Err(Fault::user(format!(
                "{hostname:?} is not a host name: it takes 1 to {HOSTNAME_MAX} of a-z A-Z 0-9 . - _"
            )));
        }
    }
    let network = match request.network.as_deref() {
        None | Some("user") => Network::User,
        Some("none") => Network::None,
        Some(other) => {
            return Err(Fault::user(format!(
                "{other:?} is not a network: write user or none"
            )));
        }
    };
    let ports: Vec<PortMapping> = parse_all(&request.ports)?;
    if network == Network::None && !ports.is_empty() {
        return Err(Fault::user(
            "a machine without a network cannot publish ports; leave out one of the two",
        ));
    }
    let (paths, names): (Vec<String>, Vec<String>) = (request.volumes.iter().cloned())
        .partition(|text| text.starts_with('/') || !text.contains(':'));
    let volumes: Vec<vistara_model::VolumeMount> = parse_all(&paths)?;
    let named_volumes: Vec<NamedVolume> = parse_all(&names)?;
    for (index, volume) in named_volumes.iter().enumerate() {
        let same = |other: &NamedVolume| {
            other.name == volume.name || other.guest_path == volume.guest_path
        };
        if named_volumes[..index].iter().any(same) {
            return Err(Fault::user(format!(
                "the volume {volume} is mounted twice, or where another one is"
            )));
        }
    }
    for volume in &volumes {
        if !Path::new(&volume.host_path).is_dir() {
            return Err(Fault::user(format!(
                "{:?} is not a directory of this host",
                volume.host_path
            ))
            .hint("only directories can be volumes; make it first, or mount the one above it"));
        }
    }
    let timeout = request.timeout_ms.map(Duration::from_millis);
    if timeout.is_some_and(|timeout| timeout.is_zero() || timeout > TIMEOUT_MAX) {
        return Err(Fault::user(
            "a time limit must be above zero and at most a year",
        ));
    }
    let size = |tty: vistara_api::TerminalSize| TtySize {
        rows: tty.rows,
        columns: tty.columns,
    };
    Ok(MachineSpec {
        image,
        command: request.command.clone(),
        entrypoint: request.entrypoint.clone(),
        name: request.name.as_deref().map(parse).transpose()?,
        cpus: cpus(request.cpus.as_ref())?,
        memory: match memory(request.memory.as_ref())? {
            memory if request.huge_pages => Bytes(
                memory
                    .0
                    .checked_next_multiple_of(hugepages::PAGE)
                    .ok_or_else(|| Fault::user(format!("{memory} of memory are too much")))?,
            ),
            memory => memory,
        },
        disk: parse_or(request.disk.as_ref(), DISK_DEFAULT)?,
        env: parse_all(&request.env)?,
        user: request.user.clone(),
        working_dir: request.working_dir.clone(),
        hostname: request.hostname.clone(),
        read_only: request.read_only,
        volumes,
        named_volumes,
        ports,
        network,
        tty: request.tty.map(size),
        stdin: request.stdin,
        auto_remove: request.auto_remove,
        timeout,
        hypervisor: hypervisor(request.hypervisor.as_ref())?,
        stop_signal: request.stop_signal.as_deref().map(parse).transpose()?,
        kernel: request.kernel.clone(),
        no_template: request.no_template,
        retry_safe: request.retry_safe,
        rates: rates(request, network)?,
        huge_pages: request.huge_pages,
        console: request.console,
        labels: request.labels.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_what_no_guest_comes_up_with_is_refused() {
        let request = RunRequest {
            disk_rate: Some("10m".to_owned()),
            disk_ops: Some(500),
            network_rate: Some("256k".to_owned()),
            ..RunRequest::default()
        };
        let image = || "debian".parse().unwrap();
        let rates = spec(&request, image()).unwrap().rates;
        assert_eq!(rates.disk_per_s, Some(Bytes::mib(10)));
        assert_eq!(rates.disk_ops_per_s, Some(500));
        assert_eq!(rates.network_per_s, Some(Bytes(256 << 10)));
        for bad in [
            RunRequest {
                disk_rate: Some("10k".to_owned()),
                ..RunRequest::default()
            },
            RunRequest {
                disk_ops: Some(1),
                ..RunRequest::default()
            },
            RunRequest {
                network_rate: Some("1k".to_owned()),
                ..RunRequest::default()
            },
        ] {
            assert!(refused(bad).contains("the least is"));
        }
        for rate in ["200000t", "1025g"] {
            for bad in [
                RunRequest {
                    disk_rate: Some(rate.to_owned()),
                    ..RunRequest::default()
                },
                RunRequest {
                    network_rate: Some(rate.to_owned()),
                    ..RunRequest::default()
                },
            ] {
                assert!(refused(bad).contains("the most is 1"));
            }
        }
        let neither = RunRequest {
            network: Some("none".to_owned()),
            network_rate: Some("1m".to_owned()),
            ..RunRequest::default()
        };
        assert!(refused(neither).contains("leave out one"));
    }

    fn refused(request: RunRequest) -> String {
        spec(&request, "debian".parse().unwrap())
            .unwrap_err()
            .0
            .message
    }

    #[test]
    fn every_bad_word_is_refused_with_what_to_write_instead() {
        let base = RunRequest::default;
        for (request, hint) in [
            (
                RunRequest {
                    memory: Some("lots".into()),
                    ..base()
                },
                "512m",
            ),
            (
                RunRequest {
                    cpus: Some("0".into()),
                    ..base()
                },
                "0.5",
            ),
            (
                RunRequest {
                    name: Some("a/b".into()),
                    ..base()
                },
                "a-z",
            ),
            (
                RunRequest {
                    env: vec!["NOVALUE".into()],
                    ..base()
                },
                "NAME=value",
            ),
            (
                RunRequest {
                    ports: vec!["80".into()],
                    ..base()
                },
                "HOST:GUEST",
            ),
            (
                RunRequest {
                    volumes: vec!["x/z:/y".into()],
                    ..base()
                },
                "NAME:GUESTDIR",
            ),
            (
                RunRequest {
                    volumes: vec!["x:/y".into(), "x:/z".into()],
                    ..base()
                },
                "mounted twice",
            ),
            (
                RunRequest {
                    volumes: vec!["/nonexistent-dir:/y".into()],
                    ..base()
                },
                "not a directory",
            ),
            (
                RunRequest {
                    network: Some("host".into()),
                    ..base()
                },
                "user or none",
            ),
            (
                RunRequest {
                    hypervisor: Some("xen".into()),
                    ..base()
                },
                "auto, firecracker",
            ),
            (
                RunRequest {
                    hostname: Some("a b".into()),
                    ..base()
                },
                "host name",
            ),
            (
                RunRequest {
                    stop_signal: Some("SIGFOO".into()),
                    ..base()
                },
                "SIGTERM",
            ),
            (
                RunRequest {
                    timeout_ms: Some(0),
                    ..base()
                },
                "above zero",
            ),
            (
                RunRequest {
                    network: Some("none".into()),
                    ports: vec!["1:2".into()],
                    ..base()
                },
                "publish",
            ),
        ] {
            let message = refused(request);
            assert!(message.contains(hint), "{message:?} does not say {hint:?}");
        }
    }

    #[test]
    fn a_request_of_an_image_alone_has_dockers_defaults() {
        let spec = spec(&RunRequest::default(), "debian".parse().unwrap()).unwrap();
        assert_eq!(
            (spec.cpus, spec.memory, spec.network),
            (Cpus::ONE, MEMORY_DEFAULT, Network::User)
        );
    }
}
