//! The agent as a product: what an administrator meets. Sections are files; each test is a name and a function.
//!
//! Options after `--`: words = only tests whose name has one of them; `--long` = the full counts of the issue.

#![allow(clippy::print_stdout, reason = "the lines are the result")]

mod absence;
mod lifecycle;
mod machine;
mod pack;
mod runtimes;
mod tamper;

use anyhow::{Result, bail};
use segfw_tests::world;
use std::process::{Command, ExitCode};
use std::time::Instant;

/// A test: `Err` that begins with `skip:` is a skip with its reason.
type Test = (&'static str, fn() -> Result<()>);

fn main() -> Result<ExitCode> {
    let mut words = Vec::new();
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "--long" => lifecycle::long(),
            "--nocapture" | "--quiet" | "-q" => {}
            word if !word.starts_with('-') => words.push(word.to_owned()),
            _ => bail!("unknown option {arg}"),
        }
    }
    let sections: [Vec<Test>; 5] =
        [absence::tests(), lifecycle::tests(), pack::tests(), runtimes::tests(), tamper::tests()];
    let chosen = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let tests: Vec<Test> = sections.into_iter().flatten().filter(|(name, _)| chosen(name)).collect();
    if !nix::unistd::geteuid().is_root() {
        println!("These tests make network namespaces and cgroups and load eBPF programs: they need root.");
        println!("0 passed, 0 failed, {} skipped", tests.len());
        return Ok(ExitCode::SUCCESS);
    }
    world::clean_up_on_signals()?;
    let _ = world::sweep_stale();
    build()?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, test) in tests {
        let begun = Instant::now();
        let result = std::panic::catch_unwind(test).unwrap_or_else(|_| bail!("panicked"));
        let took = begun.elapsed().as_secs_f32();
        match result {
            Ok(()) => {
                passed += 1;
                println!("ok   {name} ({took:.1} s)");
            }
            Err(error) if error.to_string().starts_with("skip") => {
                skipped += 1;
                println!("skip {name}: {}", error.to_string().split_once(':').map_or("", |(_, why)| why.trim()));
            }
            Err(error) => {
                failed += 1;
                println!("FAIL {name} ({took:.1} s): {error:#}");
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `cargo test -p segfw-tests` alone does not build the product's binary.
fn build() -> Result<()> {
    if std::env::var_os("SEGFW_BIN").is_none()
        && let Some(cargo) = std::env::var_os("CARGO")
    {
        let built = Command::new(cargo).args(["build", "--quiet", "--package", "segfw"]).status()?;
        anyhow::ensure!(built.success(), "segfw does not build");
    }
    segfw_tests::binary("segfw").map(drop)
}
