//! `cargo test -p segfw-tests --test product`: what surrounds enforcement, with the real agent and the tools of others.
//!
//! Options after `--`: words = only tests whose name has one of them; `--list`; `--long` = the full counts of kills,
//! upgrades and restarts instead of a tenth. A test that cannot run here ends with
//! [`skip`], which names the reason.

#![allow(clippy::print_stdout, reason = "the lines are the result")]

mod absence;
mod cli;
mod discovery;
mod docs;
mod gate;
mod lifecycle;
mod machine;
mod monitoring;
mod pack;
mod runtimes;
mod scene;
mod spool;
mod tamper;

use anyhow::{Context, Result, bail};
use segfw_tests::{binary, world};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::time::Instant;

/// A name, and what it does.
pub(crate) type Test = (&'static str, fn() -> Result<()>);

/// Why a test cannot run here. Not a failure.
#[derive(Debug)]
struct Skipped(String);

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Skipped {}

/// Ends a test that cannot run here: `return skip("no prometheus")`.
pub(crate) fn skip(why: impl Into<String>) -> Result<()> {
    Err(skipped(why))
}

/// The same for functions that return something.
pub(crate) fn skipped(why: impl Into<String>) -> anyhow::Error {
    Skipped(why.into()).into()
}

/// Every module of this target.
fn tests() -> Vec<Test> {
    [
        absence::tests(),
        cli::tests(),
        discovery::tests(),
        docs::tests(),
        gate::tests(),
        lifecycle::tests(),
        monitoring::tests(),
        pack::tests(),
        runtimes::tests(),
        spool::tests(),
        tamper::tests(),
    ]
    .concat()
}

fn main() -> Result<ExitCode> {
    let (mut words, mut list) = (Vec::new(), false);
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "--list" => list = true,
            "--long" => lifecycle::long(),
            // What `cargo test` passes on to every test.
            "--nocapture" | "--quiet" | "-q" => {}
            text if !text.starts_with('-') => words.push(text.to_owned()),
            _ => bail!("unknown option {arg}"),
        }
    }
    let mut chosen = tests();
    chosen.retain(|(name, _)| words.is_empty() || words.iter().any(|w| name.contains(w.as_str())));
    if list {
        chosen.iter().for_each(|(name, _)| println!("{name}"));
        return Ok(ExitCode::SUCCESS);
    }
    if !nix::unistd::geteuid().is_root() {
        println!("These tests make network namespaces and cgroups and load eBPF programs: they need root.");
        println!("0 passed, 0 failed, {} skipped", chosen.len());
        return Ok(ExitCode::SUCCESS);
    }
    world::clean_up_on_signals()?;
    let swept = world::sweep_stale();
    if swept > 0 {
        println!("removed {swept} leftovers of runs that were killed");
    }
    build()?;
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    for (name, test) in chosen {
        let start = Instant::now();
        // A panic is a failed test; what the test made goes as its values are dropped.
        let ended = catch_unwind(AssertUnwindSafe(test)).unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")));
        let took = start.elapsed().as_secs_f64();
        match ended {
            Ok(()) => {
                println!("ok      {name} ({took:.1} s)");
                passed += 1;
            }
            Err(e) if e.is::<Skipped>() => {
                println!("skipped {name}: {e}");
                skipped += 1;
            }
            Err(e) => {
                println!("FAILED  {name}: {e:#}");
                failed.push(name);
            }
        }
    }
    for name in &failed {
        println!("failed: {name}");
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failed.len());
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `cargo test -p segfw-tests` alone does not build the product's binary.
fn build() -> Result<()> {
    if std::env::var_os("SEGFW_BIN").is_none()
        && let Some(cargo) = std::env::var_os("CARGO")
    {
        let built = Command::new(cargo).args(["build", "--quiet", "--package", "segfw"]).status()?;
        anyhow::ensure!(built.success(), "segfw does not build");
    }
    binary("segfw").map(drop).context("the product's binary")
}
