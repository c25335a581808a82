//! `cargo test -p segfw-tests --test product`: segfw beside real programs of a host. Needs root. A word after `--`
//! chooses the tests whose names contain it.
//!
//! A test ends in an error that begins with `skipped: ` where this machine lacks a program.

#![allow(clippy::print_stdout, reason = "the lines are the result")]

use anyhow::Result;
use std::process::ExitCode;

mod runtimes;

/// Its name, and what it does.
type Test = (&'static str, fn() -> Result<()>);

fn main() -> ExitCode {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let tests: Vec<Test> = runtimes::tests().into_iter().filter(|(name, _)| name.contains(&filter)).collect();
    if !nix::unistd::geteuid().is_root() {
        println!("These tests start container runtimes: they need root.");
        println!("0 passed, 0 failed, {} skipped", tests.len());
        return ExitCode::SUCCESS;
    }
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, test) in tests {
        let begin = std::time::Instant::now();
        // A panic in one is no end of the others.
        let end = std::panic::catch_unwind(test).unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked")));
        match end {
            Ok(()) => {
                passed += 1;
                println!("ok {name} ({:.1} s)", begin.elapsed().as_secs_f32());
            }
            Err(error) if error.to_string().starts_with("skipped: ") => {
                skipped += 1;
                println!("skip {name}: {error:#}");
            }
            Err(error) => {
                failed += 1;
                println!("FAILED {name}: {error:#}");
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
