//! `cargo xtask bench`: what segfw costs, side by side with what else does the job, and what its agent needs.
//!
//! Runs in a network namespace of its own, with cgroups of its own. Results are files (`--out`); progress goes to stderr.
#![allow(clippy::print_stdout, reason = "a command-line tool")]

mod control;
mod flows;
mod result;
mod rules;
mod stage;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use result::Results;
use segfw_tests::world;
use std::path::PathBuf;
use std::process::Command;

const HELP: &str = "\
segfw-bench [--quick] [--only WORK[,WORK]] [--rounds N] [--out DIR]";

/// What was asked for.
pub(crate) struct Options {
    /// Smaller and shorter: to see that it works, not to publish.
    pub(crate) quick: bool,
    /// Empty = everything.
    pub(crate) only: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) out: PathBuf,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self { quick: false, only: Vec::new(), rounds: 0, out: "target/bench".into() };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value\n{HELP}"));
            match arg.as_str() {
                "--quick" => options.quick = true,
                "--only" => options.only = value()?.split(',').map(str::to_owned).collect(),
                "--rounds" => options.rounds = value()?.parse()?,
                "--out" => options.out = value()?.into(),
                other => bail!("unknown option {other}\n{HELP}"),
            }
        }
        for work in &options.only {
            ensure!(WORKS.iter().any(|(name, _)| name == work), "there is no work {work}\n{HELP}");
        }
        Ok(options)
    }

    /// Rules of a large policy.
    pub(crate) fn large(&self) -> u32 {
        if self.quick { 10_000 } else { 100_000 }
    }

    /// Rounds of what takes seconds.
    pub(crate) fn few(&self) -> usize {
        match self.rounds {
            0 if self.quick => 3,
            0 => 7,
            n => n,
        }
    }
}

type Work = fn(&Options, &mut Results) -> Result<()>;
const WORKS: [(&str, Work); 8] = [
    ("compile", control::compile_rules),
    ("publish", control::publish),
    ("change", control::change),
    ("start", control::start),
    ("memory", control::memory),
    ("sweep", control::sweep),
    ("rate", flows::rate),
    ("agent-cpu", flows::agent_cpu),
];

fn main() -> Result<()> {
    let options = Options::parse()?;
    ensure!(nix::unistd::geteuid().is_root(), "this makes cgroups and loads eBPF programs: run it as root");
    world::clean_up_on_signals()?;
    let _ = world::sweep_stale();
    alone()?;
    let mut results = Results::default();
    for (name, work) in WORKS {
        if !options.only.is_empty() && !options.only.iter().any(|o| o == name) {
            continue;
        }
        eprintln!("{name}");
        if let Err(error) = work(&options, &mut results) {
            eprintln!("  FAILED {name}: {error:#}");
            results.failed.push(format!("{name}: {error:#}"));
        }
    }
    std::fs::create_dir_all(&options.out).with_context(|| options.out.display().to_string())?;
    let path = options.out.join("bench.json");
    std::fs::write(&path, serde_json::to_string_pretty(&results)? + "\n")?;
    eprintln!("{}", path.display());
    ensure!(results.failed.is_empty(), "{} works failed", results.failed.len());
    Ok(())
}

/// A network of our own, so that nobody else's packets are in it, with ports enough.
fn alone() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("starting ip")?;
    ensure!(up.success(), "ip link set lo up");
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "16000 65000")?;
    std::fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(())
}

/// This thread to one CPU.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut one = nix::sched::CpuSet::new();
    one.set(cpu)?;
    Ok(nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one)?)
}

/// This thread to any CPU.
pub(crate) fn unpin() -> Result<()> {
    let mut all = nix::sched::CpuSet::new();
    for cpu in 0..std::thread::available_parallelism()?.get() {
        all.set(cpu)?;
    }
    Ok(nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &all)?)
}
