//! The guest's one network interface, set up by rtnetlink messages written by hand: a few dozen bytes each.

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use vistara_guest_protocol::NetworkConfig;

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const REMOVE_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
const CREATE_AND_REPLACE: u16 = 0x400 | 0x100;
const ERROR: u16 = 2;
const LINK_UP: u32 = 1;
/// An address that is used at once, without asking the network whether somebody else has it.
const NO_DUPLICATE_CHECK: u8 = 2;

/// Index of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;

/// Whether the monitor gave the guest a network device, its driver loaded or not.
pub(super) fn has_device() -> bool {
    let Ok(devices) = fs::read_dir("/sys/bus/virtio/devices") else {
        return false;
    };
    devices.flatten().any(|device| {
        fs::read_to_string(device.path().join("device"))
            .is_ok_and(|kind| kind.trim_end() == "0x0001")
    })
}

/// The first interface that is not the loopback.
fn interface() -> Option<u32> {
    let entries = fs::read_dir("/sys/class/net").ok()?;
    let indices = entries.flatten().filter_map(|entry| {
        fs::read_to_string(entry.path().join("ifindex"))
            .ok()?
            .trim_end()
            .parse::<u32>()
            .ok()
    });
    indices.filter(|index| *index != LOOPBACK).min()
}

/// What does not depend on which machine this is: the loopback is up, the interface is known, and has these addresses.
#[derive(Debug)]
pub(super) struct Ready {
    interface: Option<u32>,
    addresses: Vec<(IpAddr, u8)>,
}

fn open() -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        // Protocol 0 is routing.
        None,
    )?;
    Ok(socket)
}

fn named(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Does what every machine does. The interface stays down: it would take its IPv6 address from a hardware address that is
/// not a machine's own. The addresses that every machine will most likely have are none's own either.
pub(super) fn get_ready(likely: Option<&NetworkConfig>) -> io::Result<Ready> {
    let socket = open()?;
    ask(&socket, &link(LOOPBACK, &[])).map_err(named("the loopback"))?;
    let interface = interface();
    let mut addresses = Vec::new();
    if let Some(index) = interface {
        // As containers have it: programs that are not root's may serve port 80. Kernels without this lack nothing else.
        let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
        // An IPv6 address may be lost when the interface comes up.
        let likely = likely.map_or(&[][..], |config| &config.addresses);
        for (address, prefix) in likely.iter().filter(|(address, _)| address.is_ipv4()) {
            ask(&socket, &new_address(index, *address, *prefix)).map_err(named("the address"))?;
            addresses.push((*address, *prefix));
        }
    }
    Ok(Ready {
        interface,
        addresses,
    })
}

/// Brings the loopback up, unless that was done, and, where there is a configuration, the interface.
pub(super) fn configure(ready: Option<&Ready>, config: Option<&NetworkConfig>) -> io::Result<()> {
    let now;
    let ready = match ready {
        Some(ready) => ready,
        None => {
            now = get_ready(None)?;
            &now
        }
    };
    let Some(config) = config else { return Ok(()) };
    let socket = open()?;
    let index = ready
        .interface
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no interface"))?;
    let mut attributes = Vec::new();
    if let Some(mac) = &config.mac {
        attribute(&mut attributes, 1, mac);
    }
    if let Some(mtu) = config.mtu {
        attribute(&mut attributes, 4, &mtu.to_ne_bytes());
    }
    ask(&socket, &link(index, &attributes)).map_err(named("bringing the interface up"))?;
    let stale = (ready.addresses.iter()).filter(|ahead| !config.addresses.contains(ahead));
    for (address, prefix) in stale {
        let message = remove_address(index, *address, *prefix);
        ask(&socket, &message).map_err(named("removing an address"))?;
    }
    let missing = (config.addresses.iter()).filter(|address| !ready.addresses.contains(address));
    for (address, prefix) in missing {
        ask(&socket, &new_address(index, *address, *prefix)).map_err(named("the address"))?;
    }
    for gateway in &config.gateways {
        ask(&socket, &default_route(index, *gateway)).map_err(named("the gateway"))?;
    }
    Ok(())
}

/// Takes the interface down and gives it what another machine has, its hardware address above all. Connections that the
/// guest had are dead: nobody else has the other half of them.
pub(super) fn renew(config: &NetworkConfig) -> io::Result<()> {
    let index = interface()
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no interface"))?;
    ask(&open()?, &link_down(index)).map_err(named("taking the interface down"))?;
    let ready = Ready {
        interface: Some(index),
        addresses: Vec::new(),
    };
    configure(Some(&ready), Some(config))
}

fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (libc::AF_INET as u8, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6 as u8, address.octets().to_vec()),
    }
}

fn attribute(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    to.extend_from_slice(&length.to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 16).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(body.len() + 16);
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(REQUEST_AND_ACK | flags).to_ne_bytes());
    // Sequence number and sender: one question at a time needs neither.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(body);
    message
}

/// Changes an interface and brings it up.
fn link(index: u32, attributes: &[u8]) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend_from_slice(&index.to_ne_bytes());
    body.extend_from_slice(&LINK_UP.to_ne_bytes());
    body.extend_from_slice(&LINK_UP.to_ne_bytes());
    body.extend_from_slice(attributes);
    message(NEW_LINK, 0, &body)
}

/// Takes an interface down.
fn link_down(index: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend_from_slice(&index.to_ne_bytes());
    // No flags, of which "up" is to be changed.
    body.extend_from_slice(&[0; 4]);
    body.extend_from_slice(&LINK_UP.to_ne_bytes());
    message(NEW_LINK, 0, &body)
}

fn new_address(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    message(
        NEW_ADDRESS,
        CREATE_AND_REPLACE,
        &address_body(index, address, prefix),
    )
}

fn remove_address(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    message(REMOVE_ADDRESS, 0, &address_body(index, address, prefix))
}

fn address_body(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    let (family, octets) = octets(address);
    let mut body = vec![family, prefix, NO_DUPLICATE_CHECK, 0];
    body.extend_from_slice(&index.to_ne_bytes());
    // The address of the interface and, the same without a peer, of its end of the link.
    attribute(&mut body, 2, &octets);
    attribute(&mut body, 1, &octets);
    body
}

fn default_route(index: u32, gateway: IpAddr) -> Vec<u8> {
    let (family, octets) = octets(gateway);
    // Family, no prefixes, no type of service, main table, set at boot, everywhere, unicast, no flags.
    let mut body = vec![family, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
    attribute(&mut body, 5, &octets);
    attribute(&mut body, 4, &index.to_ne_bytes());
    message(NEW_ROUTE, CREATE_AND_REPLACE, &body)
}

/// Sends one message and takes the kernel's answer.
fn ask(socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
    rustix::net::send(socket, message, SendFlags::empty())?;
    let mut answer = [0; 1024];
    let (length, _) = rustix::net::recv(socket, &mut answer, RecvFlags::empty())?;
    let answer = &answer[..length];
    let kind = answer
        .get(4..6)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u16::from_ne_bytes);
    let code = answer
        .get(16..20)
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(ERROR), Some(0)) => Ok(()),
        (Some(ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(io::Error::other("the kernel gave an answer that is none")),
    }
}
