//! What all `… ls` and `… rm` have in common.

use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::text::{table, visible};
use serde::Serialize;
use vistara_api::ClientError;

/// Failures of a command that goes on with the next name.
#[derive(Debug, Default)]
pub(crate) struct Failures(bool);

impl Failures {
    /// Reports one.
    pub(crate) fn add(&mut self, name: &str, failure: Failure) {
        self.0 = true;
        Failure {
            message: format!("{name}: {}", failure.message),
            ..failure
        }
        .print();
    }

    /// The command's exit code.
    pub(crate) fn code(&self) -> Result<u8, Failure> {
        Ok(u8::from(self.0))
    }
}

/// Removes one after the other, and prints what is gone as the node calls it.
pub(crate) async fn remove_each(
    names: &[String],
    remove: impl AsyncFn(&str) -> Result<String, ClientError>,
) -> Result<u8, Failure> {
    let mut failures = Failures::default();
    for name in names {
        match remove(name).await {
            Ok(gone) => print(&format!("{}\n", visible(&gone, false)))?,
            Err(error) => failures.add(name, error.into()),
        }
    }
    failures.code()
}

/// How a list is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A JSON array.
    Json,
    /// What names each, a line each.
    Names,
    /// A table.
    Table,
}

impl Form {
    /// From the options `--quiet` and `--json`, of which the latter says more.
    pub(crate) fn of(quiet: bool, json: bool) -> Form {
        match (json, quiet) {
            (true, _) => Form::Json,
            (false, true) => Form::Names,
            (false, false) => Form::Table,
        }
    }
}

/// Shows a list. `name` is what its commands know an item by; `row` has a cell for each word of `head`.
pub(crate) fn list<T: Serialize>(
    items: &[T],
    form: Form,
    name: impl Fn(&T) -> &str,
    head: &[&str],
    row: impl Fn(&T) -> Vec<String>,
) -> Result<u8, Failure> {
    match form {
        Form::Json => print_json(&items)?,
        Form::Names => {
            let lines = items.iter().map(|item| visible(name(item), false) + "\n");
            print(&lines.collect::<String>())?;
        }
        Form::Table => {
            let rows: Vec<Vec<String>> = items.iter().map(row).collect();
            print(&table(head, &rows))?;
        }
    }
    Ok(0)
}
