//! Puts Debian's kernel into the store in the directory given, unless it holds one that has all this version wants; the
//! real-machine tests boot it. Where a new one cannot be had the old one serves, with a warning.

use std::error::Error;
use vistara_machine::boot::KernelStore;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os()
        .nth(1)
        .ok_or("usage: fetch_kernel DIRECTORY")?;
    let store = KernelStore::open(dir.as_ref())?;
    let kernel = match store.default_kernel()? {
        Some(kernel) if kernel.stages_not_looked_for().is_empty() => kernel,
        Some(kernel) => {
            eprintln!(
                "{} was added without looking for modules of {}: fetching Debian's kernel again",
                kernel.record.name,
                kernel.stages_not_looked_for().join(", ")
            );
            match store.fetch_debian(None) {
                Ok(fresh) => {
                    store.set_default(&fresh.record.name)?;
                    fresh
                }
                Err(error) => {
                    eprintln!("warning: it cannot be had now, so the old one serves: {error}");
                    kernel
                }
            }
        }
        None => store.fetch_debian(None)?,
    };
    println!("{}", kernel.record.name);
    Ok(())
}
