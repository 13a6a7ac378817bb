//! `vistara cp`: files and trees between a machine and this host.

pub(crate) mod pack;
pub(crate) mod rules;
mod unpack;

use crate::arguments::CpOptions;
use crate::failure::{Failure, eprint_line};
use crate::progress;
use futures_util::StreamExt;
use rules::{Named, Plan, Side, There};
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::Path;
use tokio::io::AsyncWriteExt;
use vistara_api::{Client, PathStat};

/// `vistara cp`.
pub(crate) async fn cp(client: &Client, options: &CpOptions) -> Result<u8, Failure> {
    let source = Side::parse(&options.source);
    let destination = Side::parse(&options.destination);
    match (source, destination) {
        (Side::Guest { machine, path }, Side::Here(to)) => {
            out_of_guest(client, options, &machine, &path, &to).await
        }
        (Side::Guest { machine, path }, Side::Stream) => {
            let stdout = std::io::stdout();
            if stdout.is_terminal() {
                return Err(Failure::new("cp: a tar stream does not go to a terminal")
                    .hint("send it to a file or to tar: `vistara cp MACHINE:PATH - | tar x`"));
            }
            to_stream(client, options, &machine, &path).await
        }
        (Side::Here(from), Side::Guest { machine, path }) => {
            into_guest(client, options, &from, &machine, &path).await
        }
        (Side::Stream, Side::Guest { machine, path }) => {
            let there = client.stat(&machine, &Named::parse(&path).path).await?;
            if !(there.exists && there.is_dir) {
                return Err(Failure::new(format!(
                    "cp: {path} is not a directory of {machine}: a tar stream needs one"
                )));
            }
            client
                .archive_in(&machine, &path, tokio::io::stdin())
                .await
                .map_err(Failure::at("cp"))?;
            Ok(0)
        }
        (Side::Guest { .. }, Side::Guest { .. }) => Err(Failure::new(
            "cp: it copies between a machine and this host, not between machines",
        )
        .hint("`vistara cp A:PATH - | vistara cp - B:DIR` does that")),
        (Side::Here(_) | Side::Stream, Side::Here(_) | Side::Stream) => {
            Err(Failure::new("cp: one of the two must be in a machine")
                .hint("write MACHINE:PATH")
                .code(2))
        }
    }
}

/// What a source in a guest is, once links are followed or not.
struct GuestSource {
    named: Named,
    follow: bool,
    is_dir: bool,
}

async fn guest_source(
    client: &Client,
    options: &CpOptions,
    machine: &str,
    path: &str,
) -> Result<GuestSource, Failure> {
    let named = Named::parse(path);
    let follow = options.follow_link || named.directory;
    let stat: PathStat = client.stat(machine, &named.path).await?;
    if !stat.exists {
        return Err(Failure::new(format!("cp: {machine} has no {}", named.path)));
    }
    Ok(GuestSource {
        follow,
        is_dir: stat.is_dir && (follow || stat.link_target.is_none()),
        named,
    })
}

async fn to_stream(
    client: &Client,
    options: &CpOptions,
    machine: &str,
    path: &str,
) -> Result<u8, Failure> {
    let source = guest_source(client, options, machine, path).await?;
    let mut tar = client
        .archive_out(machine, &source.named.path, source.follow)
        .await
        .map_err(Failure::at("cp"))?;
    let mut out = tokio::io::stdout();
    while let Some(data) = tar.next().await {
        out.write_all(&data.map_err(Failure::at("cp"))?).await?;
    }
    out.flush().await?;
    Ok(0)
}

async fn out_of_guest(
    client: &Client,
    options: &CpOptions,
    machine: &str,
    path: &str,
    to: &str,
) -> Result<u8, Failure> {
    let source = guest_source(client, options, machine, path).await?;
    let mut destination = Named::parse(to);
    let there = match std::fs::metadata(&destination.path) {
        Ok(meta) if meta.is_dir() => There::Dir,
        Ok(_) => {
            // What a link leads to is replaced, not the link.
            if let Ok(real) = std::fs::canonicalize(&destination.path)
                && let Some(real) = real.to_str()
            {
                destination.path = real.to_owned();
                destination.name = Named::parse(real).name;
            }
            There::File
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => There::Missing,
        Err(error) => return Err(Failure::because(format!("cp: {to}"), error)),
    };
    let Plan { into, top } = rules::plan(&source.named, source.is_dir, &destination, there)
        .map_err(|why| Failure::because("cp", why))?;
    let dir = std::fs::File::open(&into)
        .map_err(|error| Failure::because(format!("cp: {into}"), error))?;
    if !dir.metadata().is_ok_and(|meta| meta.is_dir()) {
        return Err(Failure::new(format!("cp: {into} is not a directory")));
    }
    let mut tar = client
        .archive_out(machine, &source.named.path, source.follow)
        .await
        .map_err(Failure::at("cp"))?;
    let (mut feed, reader) = std::os::unix::net::UnixStream::pair()
        .and_then(|(feed, reader)| {
            feed.set_nonblocking(true)?;
            Ok((tokio::net::UnixStream::from_std(feed)?, reader))
        })
        .map_err(|error| Failure::because("cp", error))?;
    let rules = unpack::Rules {
        top,
        keep_ids: options.archive,
        counter: progress::byte_counter(options.quiet, path),
    };
    let unpacking = tokio::task::spawn_blocking(move || {
        let result = unpack::unpack(&reader, dir.as_fd(), &rules);
        rules.counter.finish_and_clear();
        if result.is_ok() {
            // What follows the archive's end is not data; it must still flow, or its sender would see a broken pipe.
            let _ = std::io::copy(&mut &reader, &mut std::io::sink());
        }
        result
    });
    let mut broken = None;
    while let Some(data) = tar.next().await {
        match data {
            Ok(data) => {
                if feed.write_all(&data).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                broken = Some(error);
                break;
            }
        }
    }
    drop(feed);
    let unpacked = unpacking
        .await
        .map_err(|error| Failure::because("cp", error))?;
    // A stream that broke off explains an archive that ended early.
    if let Some(error) = broken {
        return Err(Failure::at("cp: incomplete")(error).hint(
            "something there may not be readable as a file, such as what is in /proc and /sys",
        ));
    }
    let unpacked = unpacked.map_err(|error| Failure::because("cp", error))?;
    if unpacked.left_out > 0 {
        eprint_line(&format!(
            "vistara: cp: left out {} devices, pipes or sockets",
            unpacked.left_out
        ));
    }
    Ok(0)
}

async fn into_guest(
    client: &Client,
    options: &CpOptions,
    from: &str,
    machine: &str,
    path: &str,
) -> Result<u8, Failure> {
    let source = Named::parse(from);
    let follow = options.follow_link || source.directory;
    let meta = if follow {
        std::fs::metadata(&source.path)
    } else {
        std::fs::symlink_metadata(&source.path)
    }
    .map_err(|error| Failure::because(format!("cp: {from}"), error))?;
    // `cp ..` and `cp .` have a name after all, where they stand; as docker, their contents are meant.
    let destination = Named::parse(path);
    let stat = client.stat(machine, &destination.path).await?;
    let there = match (stat.exists, stat.is_dir) {
        (false, _) => There::Missing,
        (true, true) => There::Dir,
        (true, false) => There::File,
    };
    let Plan { into, top } = rules::plan(&source, meta.is_dir(), &destination, there)
        .map_err(|why| Failure::because("cp", why))?;
    let (reader, packing) = pack::start(pack::Source {
        path: Path::new(&source.path).to_owned(),
        top,
        follow,
        keep_ids: options.archive,
        counter: progress::byte_counter(options.quiet, from),
    })
    .map_err(|error| Failure::because("cp", error))?;
    let sent = client.archive_in(machine, &into, reader).await;
    // Where packing failed, the broken request is only its echo.
    packing
        .finish()
        .map_err(|error| Failure::because("cp", error))?;
    sent.map_err(Failure::at("cp"))?;
    Ok(0)
}
