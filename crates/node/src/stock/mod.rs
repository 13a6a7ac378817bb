//! A small stock of machines that are ready for a request that has not come yet: forked from a template, told who they are,
//! and held still. Whoever runs an image again and again gets one of them instead of a fork.
//!
//! How many there are is `vistara_control`'s to say (`Arrivals`, `Memory`, `allot`, `may_fill`); here it is counted, made and
//! ended. A machine of the stock
//! - has run nothing of anybody's, the image's programs included: it is its template's fork and the agent's only;
//! - has an id, a slot and a directory among the machines', and **no record**, but a note of its monitor and its slot. So a node
//!   that is killed leaves what a launch leaves that was cut short, and the next node that can use that monitor ends it and clears
//!   it away as such. A node that leaves ends its stock;
//! - is given away once, to a request whose template has the same key and is the very same one.

mod keeper;
mod make;
mod note;
mod shelf;

pub(crate) use keeper::keep;
pub(crate) use note::Note;
pub(crate) use shelf::{Ready, Stock, Warm};

use crate::machine::Record;
use vistara_model::{MachineSpec, Payload};

/// Whether a machine of the stock can stand in for one of this specification: everything that a monitor is told at its start,
/// and a guest before its program, is the same for all of a template.
pub(crate) fn suits(spec: &MachineSpec, payload: Payload) -> bool {
    // Taken apart, so that whoever adds something says on which side it stands.
    let MachineSpec {
        ports,
        volumes,
        named_volumes,
        hostname,
        read_only,
        no_template,
        cpus,
        rates,
        huge_pages,
        console,
        // Of the template's key, and so the same.
        image: _,
        memory: _,
        disk: _,
        network: _,
        hypervisor: _,
        kernel: _,
        // The program's, which has not begun, or the record's.
        command: _,
        entrypoint: _,
        name: _,
        env: _,
        user: _,
        working_dir: _,
        tty: _,
        stdin: _,
        auto_remove: _,
        timeout: _,
        stop_signal: _,
        retry_safe: _,
        labels: _,
    } = spec;
    ports.is_empty()
        && volumes.is_empty()
        && named_volumes.is_empty()
        && hostname.is_none()
        && !read_only
        && !no_template
        && cpus.millis.is_multiple_of(1000)
        && *rates == Default::default()
        && !huge_pages
        && !console
        && payload == Payload::Linux
}

/// What a machine of the stock is made like: the record of the last that was asked for, without what was its user's.
#[derive(Debug, Clone)]
pub(crate) struct Pattern(Record);

impl Pattern {
    /// The pattern of a machine that was asked for, if one of the stock can stand in for it.
    pub(crate) fn of(record: &Record) -> Option<Pattern> {
        let suits = suits(&record.spec, record.backend.payload);
        let spec = MachineSpec {
            command: Vec::new(),
            entrypoint: None,
            name: None,
            env: Vec::new(),
            user: None,
            working_dir: None,
            labels: Default::default(),
            ..record.spec.clone()
        };
        suits.then(|| {
            Pattern(Record {
                spec,
                argv: Vec::new(),
                env: Vec::new(),
                user: String::new(),
                working_dir: String::new(),
                program_file: None,
                owner: None,
                ..record.clone()
            })
        })
    }
}
