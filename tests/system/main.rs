//! `cargo test -p segfw-tests`: the conformance table against the real agent and the real kernel. Needs root.
//!
//! Options after `--`: `--baseline-only` (no agent: what must work without segfw), `--filter TEXT`, `--jobs N`,
//! `--list`, `--check-rules`, `--json FILE`; `--expected FILE --kernel NAME` (what a kernel lacks: every other skip fails),
//! `--part K/N` (every Nth group from the Kth on, counted from 0); `--gate skb|conn` (every agent must have that gate);
//! `--same-as FILE` (a row that answers differently from that result file fails).

#![allow(clippy::print_stdout, reason = "the lines are the result")]

use anyhow::{Context, Result, bail};
use segfw_tests::expected::Expected;
use segfw_tests::table::{self, End, Options, Report, run, select};
use segfw_tests::{binary, rows, world};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> Result<ExitCode> {
    let mut options = Options { baseline_only: false, filter: None, jobs: 6, check_rules: false };
    let (mut list, mut json) = (false, None);
    let (mut expected, mut kernel, mut part) = (None, String::new(), (0, 1));
    let mut same_as: Option<PathBuf> = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--baseline-only" => options.baseline_only = true,
            "--check-rules" => options.check_rules = true,
            "--list" => list = true,
            "--filter" => options.filter = Some(value()?),
            "--jobs" => options.jobs = value()?.parse().context("--jobs")?,
            "--expected" => expected = Some(PathBuf::from(value()?)),
            "--kernel" => kernel = value()?,
            "--part" => {
                let text = value()?;
                let (first, every) = text.split_once('/').context("--part needs K/N")?;
                part = (first.parse::<usize>().context("--part")?, every.parse::<usize>().context("--part")?.max(1));
            }
            "--gate" => segfw_tests::agent::demand_gate(value()?),
            "--same-as" => same_as = Some(PathBuf::from(value()?)),
            "--json" => json = Some(PathBuf::from(value()?)),
            // What `cargo test` passes on to every test.
            "--nocapture" | "--quiet" | "-q" => {}
            text if !text.starts_with('-') => options.filter = Some(text.to_owned()),
            _ => bail!("unknown option {arg}"),
        }
    }
    let expected = expected.map(|file| Expected::read(&file, &kernel)).transpose()?;
    let groups: Vec<_> =
        select(rows::all(), options.filter.as_deref()).into_iter().skip(part.0).step_by(part.1).collect();
    let count: usize = groups.iter().map(|g| g.rows.len()).sum();
    if list {
        for group in &groups {
            for row in &group.rows {
                println!("{} {row} [{}] expects {:?}", row.id, group.name, row.expect);
            }
        }
        println!("{count} rows in {} groups", groups.len());
        return Ok(ExitCode::SUCCESS);
    }
    if !nix::unistd::geteuid().is_root() {
        println!("These tests make network namespaces and cgroups and load eBPF programs: they need root.");
        println!("0 passed, 0 failed, {count} skipped");
        return Ok(ExitCode::SUCCESS);
    }
    world::clean_up_on_signals()?;
    let swept = world::sweep_stale();
    if swept > 0 {
        println!("removed {swept} leftovers of runs that were killed");
    }
    if !options.baseline_only {
        build_segfw()?;
    }
    let mut reports = run(groups, &options);
    if let Some(expected) = expected {
        expected.apply(&mut reports);
    }
    if let Some(file) = same_as {
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let others: Vec<Report> = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        table::compare(&mut reports, &others);
    }

    let json = json.unwrap_or_else(default_json);
    let draft = json.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&draft, serde_json::to_vec_pretty(&reports)?)?;
    std::fs::rename(&draft, &json).with_context(|| json.display().to_string())?;

    let total = |end| reports.iter().filter(|r| r.end == end).count();
    let failed = total(End::Failed);
    if failed > 0 {
        println!("\nfailed:");
        for report in reports.iter().filter(|r| r.end == End::Failed) {
            println!("  {} {} [{}]: {}", report.id, report.row, report.group, report.note);
        }
    }
    // Once each, as `expected` has it: the lines above were written before that.
    let why: BTreeSet<&str> = reports.iter().filter(|r| r.end == End::Skipped).map(|r| r.note.as_str()).collect();
    why.iter().for_each(|why| println!("skipped: {why}"));
    println!("results: {}", json.display());
    println!("{} passed, {failed} failed, {} skipped", total(End::Passed), total(End::Skipped));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `cargo test -p segfw-tests` alone does not build the product's binary.
fn build_segfw() -> Result<()> {
    if std::env::var_os("SEGFW_BIN").is_none()
        && let Some(cargo) = std::env::var_os("CARGO")
    {
        let built = Command::new(cargo).args(["build", "--quiet", "--package", "segfw"]).status()?;
        anyhow::ensure!(built.success(), "segfw does not build");
    }
    binary("segfw").map(drop)
}

/// In the target folder, beside what was built.
fn default_json() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.ancestors().nth(3).unwrap_or(&own).join("segfw-tests.json")
}
