//! A small stock of machines that are ready for a request that has not come yet: forked from a template, told who they are,
//! and held still. Whoever runs an image again and again gets one of them instead of a fork.
//!
//! How many there are is `vistara_control`'s to say (`Arrivals`, `Memory`, `allot`, `may_fill`); here it is counted, made and
//! ended. A machine of the stock
//! - has run nothing of anybody's, the image's programs included: it is its template's fork and the agent's only;
//! - has an id, a slot and a directory among the machines', and **no record**. So a node that is killed leaves what a launch
//!   leaves that was cut short, and the next node ends it and clears it away as such. A node that leaves ends its stock;
//! - is given away once, to a request whose template has the same key and is the very same one.

mod keeper;
mod make;
mod shelf;

pub(crate) use keeper::keep;
pub(crate) use shelf::{Ready, Stock, Warm};

use crate::machine::Record;
use vistara_model::{MachineSpec, Payload};

/// Whether a machine of the stock can stand in for one of this specification: everything that a monitor is told at its start,
/// and a guest before its program, is the same for all of a template.
pub(crate) fn suits(spec: &MachineSpec, payload: Payload) -> bool {
    spec.ports.is_empty()
        && spec.volumes.is_empty()
        && spec.named_volumes.is_empty()
        && spec.hostname.is_none()
        && !spec.read_only
        && !spec.no_template
        && spec.cpus.millis.is_multiple_of(1000)
        && spec.rates == Default::default()
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
