//! The only place that prints. Styles are taken out where they do not belong: not a terminal, `NO_COLOR`, `--color`.

use super::CliError;
use crate::flow::render::{BAD, clean};
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// To standard output. A reader that has gone (`segfw flows | head`) ends the program quietly, as SIGPIPE would.
pub(super) fn out(text: &str) -> Result<(), CliError> {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(CliError::system(format!("cannot write the output: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// To standard error. Nobody is left to be told if that fails.
pub(super) fn error(message: &str) {
    let message = message.lines().map(clean).collect::<Vec<_>>().join("\n");
    let _ = writeln!(anstream::stderr(), "{BAD}segfw:{BAD:#} {message}");
}

/// One document, for reading and for programs.
pub(super) fn json<T: Serialize>(value: &T) -> Result<String, CliError> {
    serde_json::to_string_pretty(value).map(|s| s + "\n").map_err(CliError::system)
}

/// One line.
pub(super) fn json_line<T: Serialize>(value: &T) -> Result<String, CliError> {
    serde_json::to_string(value).map(|s| s + "\n").map_err(CliError::system)
}
