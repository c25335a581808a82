//! The only place that prints. Styles are taken out where they do not belong: not a terminal, `NO_COLOR`, `--color`.

use super::CliError;
use crate::flow::render::{BAD, DIM, clean};
use serde::Serialize;
use std::io::{ErrorKind, IsTerminal, Write};

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

/// A remark on standard error: what was done, where a program reads standard output.
pub(super) fn note(message: &str) {
    let message = message.lines().map(clean).collect::<Vec<_>>().join("\n");
    let _ = writeln!(anstream::stderr(), "{message}");
}

/// What is going on, on a line that the next one replaces. Only for a person who waits: nothing without a terminal.
pub(super) fn progress(message: &str) {
    if std::io::stderr().is_terminal() {
        let _ = write!(anstream::stderr(), "\r\x1b[K{DIM}{}{DIM:#}", clean(message));
        let _ = anstream::stderr().flush();
    }
}

/// Takes the line of [`progress`] away.
pub(super) fn progress_ends() {
    if std::io::stderr().is_terminal() {
        let _ = write!(anstream::stderr(), "\r\x1b[K");
        let _ = anstream::stderr().flush();
    }
}

/// Is there somebody to ask?
pub(super) fn interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks; the answer is what was typed, trimmed, in lower case.
pub(super) fn ask(question: &str) -> Result<String, CliError> {
    let _ = write!(anstream::stderr(), "{question} ");
    let _ = anstream::stderr().flush();
    let mut answer = String::new();
    let _ = std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim().to_lowercase())
}

/// One document, for reading and for programs.
pub(super) fn json<T: Serialize>(value: &T) -> Result<String, CliError> {
    serde_json::to_string_pretty(value).map(|s| s + "\n").map_err(CliError::system)
}

/// One line.
pub(super) fn json_line<T: Serialize>(value: &T) -> Result<String, CliError> {
    serde_json::to_string(value).map(|s| s + "\n").map_err(CliError::system)
}
