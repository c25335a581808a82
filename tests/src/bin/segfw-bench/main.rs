//! `cargo xtask bench`: what segfw costs, side by side with what else does the job, and what its agent needs.
//!
//! Runs in a network namespace of its own, with cgroups of its own. Results are files (`--out`); progress goes to stderr.
#![allow(clippy::print_stdout, reason = "a command-line tool")]

mod control;
mod count;
mod flows;
mod goals;
mod machine;
mod page;
mod peers;
mod result;
mod rules;
mod stage;
mod traffic;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use result::Results;
use segfw_tests::world;
use std::path::PathBuf;
use std::process::Command;

const HELP: &str = "\
cargo xtask bench [--quick] [--only WORK,..] [--peers PEER,..] [--places loopback,veth] [--sizes N,..] [--rounds N]
                  [--instructions] [--out DIR]

  --quick          small and short: to see that it works, not to publish
  --only           compile, publish, change, start, memory, sweep, rate, agent-cpu (the agent);
                   rr, crr, udp, stream, syn-flood, udp-flood (traffic, side by side)
  --peers          none-again, nftables, iptables-legacy, iptables-legacy-ipset, iptables-nft, iptables-nft-ipset,
                   empty-cgroup-skb, segfw-skb, segfw-skb-quiet, segfw-skb-xdp, segfw-conn, segfw-conn-quiet
  --sizes          rules in the policy (10,1000,10000,100000)
  --rounds         turns of each peer (21), and repetitions of what takes seconds (7)
  --instructions   in a guest that counts instructions (cargo xtask vm); rr,crr,udp over loopback unless told otherwise
  --out            where bench.json, README.md and the plots go (target/bench)
  --render         no measurement: page and plots from the JSON files in --out
  --count WHAT     programs, compile, events: fixed work, for cargo xtask guard";

/// What was asked for.
pub(crate) struct Options {
    /// Smaller and shorter: to see that it works, not to publish.
    pub(crate) quick: bool,
    /// Empty = everything.
    pub(crate) only: Vec<String>,
    pub(crate) peers: Vec<peers::Kind>,
    /// Empty = both.
    pub(crate) places: Vec<String>,
    sizes: Vec<u32>,
    /// 0 = as many as usual.
    rounds: usize,
    /// The clock counts instructions.
    pub(crate) instructions: bool,
    pub(crate) out: PathBuf,
    /// Only the page and the plots, from the files that are there.
    render: bool,
    /// Of an earlier run in `out`, where only a part is measured again: it takes its place among the others.
    pub(crate) earlier: Option<Results>,
    /// Nothing but this fixed work.
    count: Option<String>,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            quick: false,
            only: Vec::new(),
            peers: Vec::new(),
            places: Vec::new(),
            sizes: Vec::new(),
            rounds: 0,
            instructions: false,
            out: "target/bench".into(),
            render: false,
            earlier: None,
            count: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value\n{HELP}"));
            match arg.as_str() {
                "--quick" => options.quick = true,
                "--only" => options.only = value()?.split(',').map(str::to_owned).collect(),
                "--peers" => {
                    let kind =
                        |name: &str| peers::Kind::by_name(name).with_context(|| format!("no peer {name}\n{HELP}"));
                    options.peers = value()?.split(',').map(kind).collect::<Result<_>>()?;
                }
                "--places" => options.places = value()?.split(',').map(str::to_owned).collect(),
                "--sizes" => options.sizes = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--render" => options.render = true,
                "--count" => options.count = Some(value()?),
                "--instructions" => options.instructions = true,
                "--rounds" => options.rounds = value()?.parse()?,
                "--out" => options.out = value()?.into(),
                "help" | "--help" | "-h" => {
                    println!("{HELP}");
                    std::process::exit(0);
                }
                other => bail!("unknown option {other}\n{HELP}"),
            }
        }
        // An emulated processor is slow: what is worth counting there, unless asked for more.
        if options.instructions && options.only.is_empty() {
            options.only = ["rr", "crr", "udp"].map(str::to_owned).to_vec();
        }
        if options.instructions && options.places.is_empty() {
            options.places = vec!["loopback".to_owned()];
        }
        for work in &options.only {
            ensure!(
                WORKS.iter().map(|(name, _)| *name).chain(traffic::names()).any(|name| name == work),
                "there is no work {work}\n{HELP}"
            );
        }
        let path = options.out.join(options.file());
        if !options.only.is_empty()
            && let Ok(bytes) = std::fs::read(&path)
        {
            let earlier = serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is of another version: name another --out", path.display()))?;
            options.earlier = Some(earlier);
        }
        Ok(options)
    }

    /// Name of the file with the results.
    fn file(&self) -> &'static str {
        if self.instructions { page::COUNTS } else { page::TIMES }
    }

    /// Whether this work was asked for.
    pub(crate) fn wants(&self, work: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|o| o == work)
    }

    /// Rules of the policies that traffic meets.
    pub(crate) fn sizes(&self) -> Vec<u32> {
        match &self.sizes[..] {
            [] if self.quick || self.instructions => vec![10, 1_000],
            [] => vec![10, 1_000, 10_000, 100_000],
            given => given.to_vec(),
        }
    }

    /// Turns of each peer.
    pub(crate) fn turns(&self) -> usize {
        match self.rounds {
            0 if self.instructions => 3,
            0 if self.quick => 5,
            0 => 21,
            n => n,
        }
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
    if options.render {
        return page::render(&options.out);
    }
    if let Some(what) = &options.count {
        return count::run(what);
    }
    ensure!(nix::unistd::geteuid().is_root(), "this makes cgroups and loads eBPF programs: run it as root");
    world::clean_up_on_signals()?;
    let _ = world::sweep_stale();
    alone()?;
    let mut results = Results { machine: machine::describe(&options), ..Results::default() };
    for (name, work) in WORKS {
        if !options.wants(name) {
            continue;
        }
        eprintln!("{name}");
        if let Err(error) = work(&options, &mut results) {
            eprintln!("  FAILED {name}: {error:#}");
            results.failed.push(format!("{name}: {error:#}"));
        }
        let _ = save(&options, &results)?;
    }
    if let Err(error) = traffic::run(&options, &mut results) {
        eprintln!("  FAILED traffic: {error:#}");
        results.failed.push(format!("traffic: {error:#}"));
    }
    if let Some(run) = results.machine.runs.last_mut() {
        run.load.push(machine::load());
    }
    for goal in goals::all(&results, None).iter().filter(|g| !g.measured.is_empty()) {
        eprintln!("{:<12} {}: {}", goal.verdict().trim_matches('*'), goal.what, goal.measured);
    }
    eprintln!("{}", save(&options, &results)?.display());
    // Counts come out of a guest alone; the page is made where the times are.
    if options.out.join(page::TIMES).is_file() {
        page::render(&options.out)?;
    }
    ensure!(results.failed.is_empty(), "{} works failed", results.failed.len());
    Ok(())
}

/// Writes what there is so far: a run that is ended keeps what it has.
pub(crate) fn save(options: &Options, results: &Results) -> Result<PathBuf> {
    let mut results = results.clone();
    if let Some(earlier) = &options.earlier {
        results.keep_from(earlier.clone());
    }
    std::fs::create_dir_all(&options.out).with_context(|| options.out.display().to_string())?;
    let path = options.out.join(options.file());
    std::fs::write(&path, serde_json::to_string_pretty(&results)? + "\n")
        .with_context(|| path.display().to_string())?;
    Ok(path)
}

/// A network of our own, so that nobody else's packets are in it, with ports enough.
fn alone() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("starting ip")?;
    ensure!(up.success(), "ip link set lo up");
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "16000 64999")?;
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
