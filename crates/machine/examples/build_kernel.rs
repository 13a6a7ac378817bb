//! Builds our own kernel, as `vistara kernel build` does, and puts it into the store in the directory given; the real-machine
//! tests of it boot it from there. Takes minutes the first time.

use std::error::Error;
use std::path::Path;
use vistara_machine::boot::KernelStore;
use vistara_machine::boot::own::{OwnKernel, build};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os()
        .nth(1)
        .ok_or("usage: build_kernel DIRECTORY")?;
    let store = KernelStore::open(dir.as_ref())?;
    let options = OwnKernel {
        cache: Path::new(&dir).with_extension("cache"),
        jobs: std::thread::available_parallelism()?.get(),
    };
    let built = build(&options, &mut |step| eprintln!("{step:?}")).map_err(|error| {
        let hint = error.hint().unwrap_or_default();
        eprintln!("{error}\n{hint}");
        error
    })?;
    let kernel = store.add(&built.vmlinux, Some(&built.modules), None)?;
    println!("{}", kernel.record.name);
    Ok(())
}
