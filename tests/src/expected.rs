//! What a kernel of the matrix lacks: `tests/kernels.expected`. Without that table a skipped row would look like a passed one.

use crate::table::{End, Report};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

/// Kinds of rows that one kernel cannot run, with the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected(Vec<(String, String)>);

impl Expected {
    /// The lines of the table for a kernel (`6.1`).
    pub fn read(file: &Path, kernel: &str) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        Self::parse(&text, kernel).with_context(|| file.display().to_string())
    }

    /// [`Self::read`] of a text.
    pub fn parse(text: &str, kernel: &str) -> Result<Self> {
        let mut all = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.starts_with('#') && !l.trim().is_empty()) {
            let mut words = line.split_whitespace();
            let (Some(kernels), Some(kind)) = (words.next(), words.next()) else {
                bail!("line {}: kernels, a kind of row and a reason are needed", number + 1);
            };
            let why = words.collect::<Vec<_>>().join(" ");
            anyhow::ensure!(!why.is_empty(), "line {}: {kind} needs a reason", number + 1);
            if kernels.split(',').any(|k| k == kernel) {
                all.push((kind.to_owned(), why));
            }
        }
        Ok(Self(all))
    }

    /// Makes a failure of each row that was skipped without being expected, and of each that ran against expectation.
    pub fn apply(&self, reports: &mut [Report]) {
        for report in reports {
            let named = self.0.iter().find(|(kind, _)| report.row.split(' ').any(|word| word == kind));
            match (report.end, named) {
                (End::Skipped, Some((_, why))) => report.note.clone_from(why),
                (End::Skipped, None) => {
                    report.end = End::Failed;
                    report.note += ", and tests/kernels.expected does not say so";
                }
                (End::Passed, Some((_, why))) => {
                    report.end = End::Failed;
                    report.note = format!("it runs, but tests/kernels.expected says: {why}");
                }
                (End::Passed, None) | (End::Failed, _) => {}
            }
        }
    }
}
