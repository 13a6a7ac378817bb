//! Shows what a Nanos disk or volume has: `cargo run -p vistara-nanos --example tfs -- DISK`.

use std::error::Error;
use std::fs::File;
use std::io;
use vistara_nanos::tfs::{Limits, Node};
use vistara_nanos::{PartitionTable, disk, klog};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("which disk?")?;
    let mut file = File::open(path)?;
    if let Some(table) = PartitionTable::read(&mut file)? {
        println!("{table:?}");
        println!("{:?}", klog::read(&mut file)?);
    }
    let mut reader = disk::open(file, &Limits::default())?;
    let (id, label, log) = (reader.id(), reader.label(), reader.log_bytes());
    println!("{id}, label {:?}, log of {log} bytes", label.to_string());
    for (key, value) in reader.keys()? {
        println!("{}: {value:?}", String::from_utf8_lossy(&key));
    }
    let mut files = Vec::new();
    reader.walk(|path, node| {
        files.push((String::from_utf8_lossy(path).into_owned(), node.clone()));
        Ok(())
    })?;
    for (path, node) in files {
        match node {
            Node::Directory(_) => println!("{path}/"),
            Node::File(handle) => {
                let read = io::copy(&mut reader.content(handle)?, &mut io::sink())?;
                println!("{path}  {read} bytes");
            }
            Node::Symlink(target) => println!("{path} -> {}", String::from_utf8_lossy(&target)),
            Node::Other => println!("{path}  something else"),
        }
    }
    Ok(())
}
