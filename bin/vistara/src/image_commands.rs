//! `vistara images …`, and what `run` does with images.

use crate::arguments::{
    ImagesCommand, ImagesOptions, ImportOptions, ListImagesOptions, PruneOptions, PullOptions,
    RemoveImageOptions, TagOptions,
};
use crate::copy::pack;
use crate::environment;
use crate::failure::Failure;
use crate::image_transfer;
use crate::listing::Failures;
use crate::output::{print, print_json};
use crate::progress;
use crate::text::{ago, short_id, table, visible};
use std::path::Path;
use vistara_api::{Client, ErrorKind, Image, PullRequest};
use vistara_model::Bytes;

/// `vistara images`.
pub(crate) async fn images(client: &Client, options: ImagesOptions) -> Result<u8, Failure> {
    match options.command {
        None => list(client, &options.list).await,
        Some(ImagesCommand::Ls(options)) => list(client, &options).await,
        Some(ImagesCommand::Pull(options)) => pull(client, &options).await,
        Some(ImagesCommand::Fetch(options)) => {
            let image =
                image_transfer::fetch(client, &options.image, &options.from, options.quiet).await?;
            print_image(&image, options.json)
        }
        Some(ImagesCommand::Import(options)) => import(client, &options).await,
        Some(ImagesCommand::Rm(options)) => remove(client, &options).await,
        Some(ImagesCommand::Prune(options)) => prune(client, &options).await,
        Some(ImagesCommand::Tag(options)) => tag(client, &options).await,
        Some(ImagesCommand::Inspect(options)) => {
            let mut found = Vec::new();
            let mut failures = Failures::default();
            for name in &options.images {
                match client.image(name).await {
                    Ok(image) => found.push(image),
                    Err(error) => failures.add(name, error.into()),
                }
            }
            print_json(&found)?;
            failures.code()
        }
    }
}

async fn list(client: &Client, options: &ListImagesOptions) -> Result<u8, Failure> {
    let images = client.images().await?;
    if options.json {
        print_json(&images)?;
        return Ok(0);
    }
    let id = |image: &Image| {
        if options.no_trunc {
            image.id.clone()
        } else {
            short_id(&image.id).to_owned()
        }
    };
    if options.quiet {
        let ids: String = images.iter().map(|image| id(image) + "\n").collect();
        print(&ids)?;
        return Ok(0);
    }
    let now = jiff::Timestamp::now();
    let mut rows = Vec::new();
    for image in &images {
        let created = image
            .created
            .as_deref()
            .map_or_else(|| "-".to_owned(), |time| ago(time, now));
        let names = if image.names.is_empty() {
            vec!["<none>".to_owned()]
        } else {
            image.names.clone()
        };
        for name in names {
            rows.push(vec![
                name,
                id(image),
                image.architecture.clone(),
                created.clone(),
                Bytes(image.size_bytes).to_string(),
                Bytes(image.disk_bytes).to_string(),
                image.machines.to_string(),
            ]);
        }
    }
    print(&table(
        &["NAME", "ID", "ARCH", "CREATED", "SIZE", "DISK", "MACHINES"],
        &rows,
    ))?;
    Ok(0)
}

/// Pulls an image and shows its progress.
pub(crate) async fn pull_image(
    client: &Client,
    request: &PullRequest,
    quiet: bool,
) -> Result<Image, Failure> {
    let what = format!("cannot pull {}", request.image);
    let events = client.pull(request).await.map_err(Failure::at(&what))?;
    progress::show(events, quiet)
        .await
        .map_err(|failure| Failure {
            message: format!("{what}: {}", failure.message),
            ..failure
        })
}

/// `vistara images pull`.
pub(crate) async fn pull(client: &Client, options: &PullOptions) -> Result<u8, Failure> {
    let request = PullRequest {
        image: options.image.clone(),
        insecure: options.insecure,
        docker_config_dir: environment::docker_config_dir()
            .map(|dir| dir.to_string_lossy().into_owned()),
    };
    let image = pull_image(client, &request, options.quiet).await?;
    print_image(&image, options.json)
}

fn print_image(image: &Image, json: bool) -> Result<u8, Failure> {
    if json {
        print_json(image)?;
    } else {
        print(&format!("{}\n", visible(&image.id, false)))?;
    }
    Ok(0)
}

/// Imports an archive or a directory of this host and shows the progress.
pub(crate) async fn import_path(
    client: &Client,
    path: &Path,
    name: Option<&str>,
    quiet: bool,
) -> Result<Image, Failure> {
    let what = format!("cannot import {}", path.display());
    let failed = |error: std::io::Error| Failure::because(&what, error);
    let shown = if path.is_dir() {
        let (reader, packing) = pack::directory(path.to_owned()).map_err(failed)?;
        let shown = match client.import(name, reader).await {
            Ok(events) => progress::show(events, quiet).await,
            Err(error) => Err(error.into()),
        };
        // Where packing failed, the broken request is only its echo.
        packing.finish().map_err(failed)?;
        shown
    } else {
        let file = tokio::fs::File::open(path).await.map_err(failed)?;
        match client.import(name, file).await {
            Ok(events) => progress::show(events, quiet).await,
            Err(error) => Err(error.into()),
        }
    };
    shown.map_err(|failure| Failure {
        message: format!("{what}: {}", failure.message),
        ..failure
    })
}

/// `vistara images import`.
pub(crate) async fn import(client: &Client, options: &ImportOptions) -> Result<u8, Failure> {
    let name = options.name.as_deref().or(options.reference.as_deref());
    let image = if options.source == "-" {
        let events = client
            .import(name, tokio::io::stdin())
            .await
            .map_err(Failure::at("cannot import standard input"))?;
        progress::show(events, options.quiet).await?
    } else {
        // The forms that `run` takes are understood here, too.
        let path = match crate::run_options::ImageSource::parse(&options.source) {
            crate::run_options::ImageSource::Path(path) => path,
            crate::run_options::ImageSource::Named(path) => path.into(),
        };
        import_path(client, &path, name, options.quiet).await?
    };
    print_image(&image, options.json)
}

/// `vistara images rm`.
pub(crate) async fn remove(client: &Client, options: &RemoveImageOptions) -> Result<u8, Failure> {
    let mut failures = Failures::default();
    for name in &options.images {
        match client.remove_image(name, options.force).await {
            Ok(removed) => {
                let mut text = String::new();
                for name in &removed.untagged {
                    text.push_str(&format!("untagged {}\n", visible(name, false)));
                }
                if let Some(id) = &removed.deleted {
                    text.push_str(&format!("deleted {}\n", visible(id, false)));
                }
                print(&text)?;
            }
            Err(error) => {
                let failure = Failure::from(error);
                let gone = matches!(
                    failure.kind,
                    Some(ErrorKind::NotFound | ErrorKind::ImageNotFound)
                );
                if !(options.force && gone) {
                    failures.add(name, failure);
                }
            }
        }
    }
    failures.code()
}

async fn prune(client: &Client, options: &PruneOptions) -> Result<u8, Failure> {
    let pruned = client.prune_images(options.all).await?;
    if options.json {
        print_json(&pruned)?;
        return Ok(0);
    }
    let mut text = String::new();
    for id in &pruned.deleted {
        text.push_str(&format!("deleted {}\n", visible(id, false)));
    }
    text.push_str(&format!("freed {}\n", Bytes(pruned.freed_bytes)));
    print(&text)?;
    Ok(0)
}

/// `vistara images tag`.
pub(crate) async fn tag(client: &Client, options: &TagOptions) -> Result<u8, Failure> {
    client.tag_image(&options.image, &options.name).await?;
    Ok(0)
}
