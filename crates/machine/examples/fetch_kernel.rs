//! Puts Debian's kernel into the store in the directory given, unless it holds one; the real-machine tests boot it.

use std::error::Error;
use vistara_machine::boot::KernelStore;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os()
        .nth(1)
        .ok_or("usage: fetch_kernel DIRECTORY")?;
    let store = KernelStore::open(dir.as_ref())?;
    let kernel = match store.default_kernel()? {
        Some(kernel) => kernel,
        None => store.fetch_debian(None)?,
    };
    println!("{}", kernel.record.name);
    Ok(())
}
