//! `vistara kernel …`: guest kernels.

use crate::arguments::KernelCommand;
use crate::failure::Failure;
use crate::listing::{self, Form, remove_each};
use crate::output::print;
use crate::text::visible;
use std::path::Path;
use vistara_api::{AddKernelRequest, Client, Kernel};
use vistara_model::Bytes;

/// `vistara kernel`.
pub(crate) async fn kernel(client: &Client, command: &KernelCommand) -> Result<u8, Failure> {
    match command {
        KernelCommand::Ls { json } => list(&client.kernels().await?, Form::of(false, *json)),
        KernelCommand::Add {
            name,
            modules,
            klibs,
            default,
            source,
        } => {
            let (payload, source) = source_of(source)?;
            let request = AddKernelRequest {
                source,
                payload: payload.map(str::to_owned),
                name: name.clone(),
                // The node has another working directory.
                modules_dir: modules.as_deref().map(absolute).transpose()?,
                klibs_dir: klibs.as_deref().map(absolute).transpose()?,
                default: *default,
            };
            let kernel = client
                .add_kernel(&request)
                .await
                .map_err(Failure::at("cannot add the kernel"))?;
            print(&format!("{}\n", visible(&kernel.name, false)))?;
            Ok(0)
        }
        // Done before a node was asked for: `kernel_build`.
        KernelCommand::Build(_) => Ok(0),
        KernelCommand::Rm { names } => {
            remove_each(names, async |name| {
                client.remove_kernel(name).await?;
                Ok(name.to_owned())
            })
            .await
        }
        KernelCommand::Default { name } => {
            let kernel = client.default_kernel(name).await?;
            print(&format!("{}\n", visible(&kernel.name, false)))?;
            Ok(0)
        }
    }
}

/// What `kernel add` is to add: its payload, where that is not Linux, and where it comes from.
fn source_of(words: &[String]) -> Result<(Option<&'static str>, String), Failure> {
    match words {
        [one] if one == "debian" => Ok((None, one.clone())),
        [one] if one == "nanos" => {
            Err(Failure::new("a Nanos kernel is added from a file, and none was named")
                .hint("vistara kernel add nanos FILE; for a Linux kernel in a file of that name, write ./nanos"))
        }
        [file] => Ok((None, absolute(Path::new(file))?)),
        [kind, file] if kind == "nanos" => Ok((Some("nanos"), absolute(Path::new(file))?)),
        _ => Err(Failure::new("one kernel is added at a time")
            .hint("vistara kernel add debian, vistara kernel add FILE, or vistara kernel add nanos FILE")),
    }
}

fn list(kernels: &[Kernel], form: Form) -> Result<u8, Failure> {
    let head = ["NAME", "KIND", "VERSION", "SIZE", "DEFAULT"];
    listing::list(
        kernels,
        form,
        |kernel| &kernel.name,
        &head,
        |kernel| {
            vec![
                kernel.name.clone(),
                kernel.payload.clone(),
                kernel.version.clone(),
                Bytes(kernel.size_bytes).to_string(),
                if kernel.default { "yes" } else { "" }.to_owned(),
            ]
        },
    )
}

fn absolute(path: &Path) -> Result<String, Failure> {
    let what = || format!("cannot use {}", path.display());
    let path = std::fs::canonicalize(path).map_err(|error| Failure::because(what(), error))?;
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::because(what(), "its path is not UTF-8"))
}
