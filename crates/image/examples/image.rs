//! Imports or pulls one image into a store and says what came of it: `image STORE import FILE` or `image STORE pull NAME`.

use std::path::Path;
use std::time::Instant;
use vistara_image::{ImageStore, Limits, ProgressSink, PullOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, store, verb, what, ..] = &arguments[..] else {
        return Err("usage: image STORE import|pull WHAT [NAME]".into());
    };
    let store = ImageStore::open(Path::new(store), Limits::default())?;
    let begun = Instant::now();
    let progress = ProgressSink::new(|progress| eprintln!("{progress:?}"));
    let name = arguments.get(4).map(|name| name.parse()).transpose()?;
    let done = match verb.as_str() {
        "import" => {
            store
                .import(Path::new(what), name.as_ref(), None, &progress)
                .await
        }
        _ => {
            store
                .pull(&what.parse()?, &PullOptions::default(), &progress)
                .await
        }
    };
    match done {
        Ok(image) => {
            println!("{:.2} s: {image:#?}", begun.elapsed().as_secs_f64());
            println!(
                "{:?}",
                store.root_disk(&image, &ProgressSink::none()).await?
            );
            Ok(())
        }
        Err(error) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = cause {
                eprintln!("{error}");
                cause = error.source();
            }
            Err(error.into())
        }
    }
}
