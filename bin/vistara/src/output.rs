//! Data on standard output. A reader that went away ends the command quietly (see [`Failure`]).

use crate::failure::Failure;
use serde::Serialize;
use std::io::Write;

/// Writes text as it is.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes one JSON value, laid out for reading.
pub(crate) fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::because("cannot write JSON", error))?;
    print(&format!("{text}\n"))
}

/// Writes one JSON value on one line.
pub(crate) fn print_json_line<T: Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::because("cannot write JSON", error))?;
    print(&format!("{text}\n"))
}
