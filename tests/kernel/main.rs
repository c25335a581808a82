//! `cargo test -p segfw-tests --test kernel`: the eBPF programs against the same judgement in user space, without an
//! agent and without a network. Needs root.
//!
//! Options after `--`: a word = only sections whose name has it; `--seed N`, `--policies N` for `differential`.

#![allow(clippy::print_stdout, reason = "the lines are the result")]

mod adoption;
mod differential;
mod expected;
mod frames;
mod generations;
mod memory;
mod older;
mod packets;
mod verifier;

use anyhow::{Context, Result, bail};
use segfw_tests::scratch;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

/// What the command line says.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    seed: u64,
    policies: usize,
    filter: Option<String>,
}

/// What became of the tests so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
}

impl Tally {
    /// Counts a test that this kernel cannot pass.
    pub(crate) fn skip(&mut self, name: impl AsRef<str>, why: &str) {
        println!("skipped {}: {why}", name.as_ref());
        self.skipped += 1;
    }

    /// Counts a test, and says so where it failed.
    pub(crate) fn count(&mut self, name: impl Into<String>, result: Result<()>) {
        match result {
            Ok(()) => self.passed += 1,
            Err(e) => {
                let name = name.into();
                println!("FAILED {name}: {e:#}");
                self.failed.push(name);
            }
        }
    }
}

type Section = (&'static str, fn(&Options, &mut Tally) -> Result<()>);

const SECTIONS: [Section; 7] = [
    ("expected", expected::run),
    ("verifier", verifier::run),
    ("differential", differential::run),
    ("packets", packets::run),
    ("generations", generations::run),
    ("adoption", adoption::run),
    ("older", older::run),
];

fn main() -> Result<ExitCode> {
    let mut options = Options { seed: 20_261_102, policies: 200, filter: None };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--seed" => options.seed = value()?.parse().context("--seed")?,
            "--policies" => options.policies = value()?.parse().context("--policies")?,
            // What `cargo test` passes on to every test.
            "--nocapture" | "--quiet" | "-q" => {}
            text if !text.starts_with('-') => options.filter = Some(text.to_owned()),
            _ => bail!("unknown option {arg}"),
        }
    }
    let chosen: Vec<&Section> =
        SECTIONS.iter().filter(|(name, _)| options.filter.as_ref().is_none_or(|f| name.contains(f.as_str()))).collect();
    if !nix::unistd::geteuid().is_root() {
        println!("These tests load eBPF programs and run them: they need root.");
        println!("0 passed, 0 failed, {} skipped", chosen.len());
        return Ok(ExitCode::SUCCESS);
    }
    scratch::clean_up_on_signals()?;
    let swept = scratch::sweep_stale();
    if swept > 0 {
        println!("removed {swept} leftovers of runs that were killed");
    }
    let mut tally = Tally::default();
    for (name, section) in chosen {
        let start = Instant::now();
        // A panic is a failed test; what the section made goes as its values are dropped.
        let result = catch_unwind(AssertUnwindSafe(|| section(&options, &mut tally)))
            .unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")));
        if let Err(e) = result {
            tally.count(*name, Err(e));
        }
        println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
    }
    for name in &tally.failed {
        println!("failed: {name}");
    }
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed.len(), tally.skipped);
    Ok(if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
