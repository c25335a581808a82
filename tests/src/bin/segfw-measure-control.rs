//! Where the time of the control path goes: for who changes it. The figures that are kept are those of `cargo xtask bench`.
//!
//! `phases`: files in memory to tables in the kernel, phase by phase. `change`: the real agent, from the rename of one file
//! to the switch in the kernel. Both with `--rules N --files N --apps N --rounds N`; times are the least of all rounds.
#![allow(clippy::print_stdout, reason = "a command-line tool")]

use anyhow::{Context, Result, bail, ensure};
use segfw::agent::registry::Registry;
use segfw::agent::revision;
use segfw::datapath::{Datapath, load, sys};
use segfw::policy::tables::Numbers;
use segfw::policy::{self, HostSettings, Inventory};
use segfw_common::{ABI_VERSION, control};
use segfw_tests::scratch::{self, Scratch};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug)]
struct Size {
    rules: usize,
    files: usize,
    apps: usize,
    rounds: usize,
}

fn main() -> Result<()> {
    let mut size = Size { rules: 100_000, files: 1_000, apps: 1_000, rounds: 5 };
    let mut what = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a number"));
        match arg.as_str() {
            "--rules" => size.rules = value()?.parse()?,
            "--files" => size.files = value()?.parse()?,
            "--apps" => size.apps = value()?.parse()?,
            "--rounds" => size.rounds = value()?.parse()?,
            word => what = Some(word.to_owned()),
        }
    }
    match what.as_deref() {
        Some("phases") => phases(size),
        Some("change") => change(size),
        _ => bail!("phases or change"),
    }
}

/// Applications that talk to each other, to networks and to the world: mostly one segment to another, one rule in five
/// with prefixes, one in ten with a selector, services from a pool.
fn files(size: Size, marked: usize) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut seed = 20_261_102u64;
    let mut pick = |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % n
    };
    for first in (0..size.apps).step_by(50) {
        let mut text = String::new();
        for i in first..(first + 50).min(size.apps) {
            let tier = ["front", "middle", "data"][i % 3];
            let _ = write!(
                text,
                "apiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {{name: app-{i}}}\nspec:\n  match:\n    - systemdUnit: app-{i}.service\n  labels: {{app: app-{i}, tier: {tier}}}\n---\n\
                 apiVersion: segfw.dev/v1\nkind: Segment\nmetadata: {{name: app-{i}}}\nspec:\n  select: {{app: app-{i}}}\n  default: {{ingress: deny, egress: deny}}\n---\n"
            );
        }
        files.push((format!("apps/{first:05}.yaml"), text));
    }
    let mut made = 0;
    for file in 0..size.files {
        let count = (size.rules * (file + 1) / size.files) - made;
        let app = file % size.apps;
        let mut text = format!(
            "# Who may reach app-{app}, and whom it may reach.\napiVersion: segfw.dev/v1\nkind: Policy\nmetadata:\n  name: access-{file}\n  owner: team-{}\nspec:\n  rules:\n",
            app % 40
        );
        for i in 0..count {
            let other = pick(size.apps);
            let net = format!("10.{}.{}.0/24", pick(64), pick(256));
            let (from, to) = match i % 10 {
                0..=5 => (format!("app-{other}"), format!("app-{app}")),
                6 => (format!("{{addresses: [{net}, 172.{}.0.0/16]}}", 16 + pick(16)), format!("app-{app}")),
                7 => (format!("app-{app}"), format!("{{addresses: [192.0.2.{}/32]}}", pick(256))),
                8 => (format!("app-{app}"), format!("app-{other}")),
                _ => (
                    format!("{{select: {{app: app-{other}, tier: {}}}}}", ["front", "middle", "data"][other % 3]),
                    format!("app-{app}"),
                ),
            };
            let ports = match pick(8) {
                0 => format!("tcp/{0}, udp/{0}", 53 + pick(100)),
                1 => {
                    let first = 30_000 + pick(40) * 10;
                    format!("tcp/{first}-{}", first + 9)
                }
                _ => format!("tcp/{}", 8_000 + pick(300)),
            };
            let action = if pick(20) == 0 { "deny" } else { "allow" };
            let _ = write!(
                text,
                "    - name: rule-{i}\n      from: [{from}]\n      to: [{to}]\n      ports: [{ports}]\n      action: {action}\n"
            );
        }
        if file == size.files / 2 && marked > 0 {
            let _ = write!(
                text,
                "    - name: marked\n      from: [app-0]\n      to: [app-{app}]\n      ports: [tcp/{}]\n      action: allow\n",
                8_000 + marked % 300
            );
        }
        made += count;
        files.push((format!("access/{file:05}.yaml"), text));
    }
    files
}

/// The least time of each phase.
#[derive(Default)]
struct Least(BTreeMap<&'static str, (usize, Duration)>);

impl Least {
    fn time<T>(&mut self, what: &'static str, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let value = work();
        self.note(what, begun.elapsed());
        value
    }
    fn note(&mut self, what: &'static str, took: Duration) {
        let at = self.0.len();
        let entry = self.0.entry(what).or_insert((at, took));
        entry.1 = entry.1.min(took);
    }
    fn print(&self) {
        let mut all: Vec<_> = self.0.iter().collect();
        all.sort_by_key(|(_, (at, _))| *at);
        for (what, (_, took)) in all {
            println!("  {what:44} {:9.2} ms", took.as_secs_f64() * 1e3);
        }
    }
}

fn rss() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap_or_default();
    line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
}

fn phases(size: Size) -> Result<()> {
    scratch::clean_up_on_signals()?;
    let scratch = Scratch::new()?;
    let datapath = Datapath::load(scratch.pins())?;
    let texts = files(size, 0);
    let bytes: usize = texts.iter().map(|f| f.1.len()).sum();
    println!("{} rules, {} files, {bytes} bytes, {} apps", size.rules, texts.len(), size.apps);
    let clock = revision::clock()?;
    let mut least = Least::default();
    let mut entries = 0;
    for round in 0..size.rounds {
        let (docs, problems) = least.time("parse", || policy::document::parse(&texts));
        ensure!(problems.is_empty(), "{problems:?}");
        let (resolved, warnings) = least.time("resolve", || {
            policy::resolve::resolve(&docs, &Inventory::default(), &HostSettings::default(), clock.wall)
        });
        if round == 0 {
            println!("{} warnings; RSS {}", warnings.len(), rss());
        }
        let mut registry = Registry::default();
        least.time("registry: documents", || registry.set_documents(revision::workload_documents(&docs)));
        let sets = registry.label_sets();
        let mut numbers = Numbers::default();
        let tables = least
            .time("compile, first time", || policy::compile::compile(&resolved, &sets, &[], &mut numbers, clock))
            .map_err(|p| anyhow::anyhow!("{p:?}"))?;
        entries = tables.rules.len();
        let again = least
            .time("compile, numbers known", || policy::compile::compile(&resolved, &sets, &[], &mut numbers, clock))
            .map_err(|p| anyhow::anyhow!("{p:?}"))?;
        let digest = least.time("digest of the tables", || tables.digest());
        ensure!(digest == again.digest());
        let _ = least.time("digest of the files", || policy::digest(&texts));
        let active = least.time("publish", || datapath.publish(&tables))?;
        let back = least.time("read back", || datapath.read_back(active))?;
        ensure!(back.digest() == digest);
        if round == 0 {
            println!(
                "{entries} entries, {} prefixes, {} locals; RSS {}",
                tables.prefixes.len(),
                tables.locals.len(),
                rss()
            );
        }
        least.time("drop of documents and tables", move || drop((docs, resolved, tables, again, back)));
        let mut files: revision::Files =
            texts.iter().map(|(name, text)| (name.clone(), text.as_str().into())).collect();
        let (mut read, mut registry) = (policy::document::Cache::default(), Registry::default());
        let candidate = least.time("build (all of it but the kernel)", || {
            revision::build(files.clone(), &mut read, &mut registry, &mut numbers, false, clock)
        });
        let candidate = candidate.map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
        // One rule more, in a file of its own.
        let text = "apiVersion: segfw.dev/v1\nkind: Policy\nmetadata: {name: one-more}\nspec:\n  rules:\n    - {name: r, from: [app-0], to: [app-1], ports: [tcp/8000], action: allow}\n";
        files.push(("one-more.yaml".into(), text.into()));
        let (documents, problems) =
            least.time("change of a rule: parse", || policy::document::parse_again(&files, &mut read));
        ensure!(problems.is_empty(), "{problems:?}");
        let held = (&candidate.policy, &candidate.tables, &candidate.basis);
        let change = least.time("change of a rule: find it and compile it", || {
            revision::change(&documents, held, &registry, &mut numbers, clock)
        });
        let mut change = change.context("the change is not compiled alone")?;
        let (mut resolved, mut tables, mut basis) = (candidate.policy, candidate.tables, candidate.basis);
        least.time("change of a rule: into tables and policy", || {
            change.amendment.swap(&mut tables);
            basis.ends.replace_rules(&mut resolved, change.rules);
        });
    }
    ensure!(entries > 0);
    least.print();
    Ok(())
}

/// Kills the agent it was given, also on failure.
struct Running(std::process::Child);
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn cpu_ticks(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(')').context("stat")?.1;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || -> Result<u64> { Ok(fields.next().context("stat")?.parse()?) };
    Ok(next()? + next()?)
}

fn change(size: Size) -> Result<()> {
    scratch::clean_up_on_signals()?;
    let scratch = Scratch::new()?;
    let dir = tempfile::tempdir()?;
    let folder = dir.path().join("policy");
    let write = |name: &str, text: &str| -> Result<()> {
        let at = folder.join(name);
        std::fs::create_dir_all(at.parent().context("a folder")?)?;
        Ok(std::fs::write(at, text)?)
    };
    let texts = files(size, 0);
    for (name, text) in &texts {
        write(name, text)?;
    }
    let log = std::fs::File::create(dir.path().join("log"))?;
    let begun = Instant::now();
    let agent = Running(
        Command::new(segfw_tests::binary("segfw")?)
            .args(["agent", "--config", "/dev/null", "--socket"])
            .arg(dir.path().join("socket"))
            .arg("--policy")
            .arg(&folder)
            .arg("--pin-dir")
            .arg(scratch.pins())
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--cgroup-root")
            .arg(scratch.cgroup("")?)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?,
    );
    let pid = agent.0.id();
    let pinned = load::layout_dir(scratch.pins(), ABI_VERSION).join("CONTROL");
    let word = |at: &Path| -> Result<u64> {
        Ok(match sys::get(at)? {
            Some(map) => sys::map_lookup::<u32, u64>(map.as_fd(), &control::ACTIVE)?.unwrap_or(0),
            None => 0,
        })
    };
    while word(&pinned)? == 0 {
        ensure!(begun.elapsed() < Duration::from_secs(60), "{}", std::fs::read_to_string(dir.path().join("log"))?);
        std::thread::sleep(Duration::from_millis(1));
    }
    println!(
        "{} rules, {} files: start to first generation {:.0} ms",
        size.rules,
        texts.len(),
        begun.elapsed().as_secs_f64() * 1e3
    );
    let map = sys::get(&pinned)?.context("CONTROL")?;
    let slot =
        || -> Result<u32> { Ok(sys::map_lookup::<u32, u64>(map.as_fd(), &control::ACTIVE)?.unwrap_or(0) as u32) };
    let mut least = Least::default();
    let mut most = Duration::ZERO;
    let name = format!("access/{:05}.yaml", size.files / 2);
    for round in 1..=size.rounds {
        std::thread::sleep(Duration::from_millis(3000));
        let changed = files(size, round);
        let text = &changed.iter().find(|(n, _)| *n == name).context("the file")?.1;
        let draft = dir.path().join("draft");
        std::fs::write(&draft, text)?;
        let before = slot()?;
        let begun = Instant::now();
        std::fs::rename(&draft, folder.join(&name))?;
        while slot()? == before {
            ensure!(begun.elapsed() < Duration::from_secs(30), "{}", std::fs::read_to_string(dir.path().join("log"))?);
            std::thread::sleep(Duration::from_micros(100));
        }
        least.note("rename of one file to the switch", begun.elapsed());
        most = most.max(begun.elapsed());
    }
    least.print();
    println!("  {:44} {:9.2} ms", "  (the slowest)", most.as_secs_f64() * 1e3);
    std::thread::sleep(Duration::from_secs(3));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    for line in status.lines().filter(|l| {
        l.starts_with("VmRSS") || l.starts_with("VmHWM") || l.starts_with("Rss") || l.starts_with("Threads")
    }) {
        println!("  {line}");
    }
    let ticks = cpu_ticks(pid)?;
    let idle = Duration::from_secs(20);
    std::thread::sleep(idle);
    println!("  idle: {:.3} % of a core", (cpu_ticks(pid)? - ticks) as f64 / idle.as_secs_f64());
    if let Ok(keep) = std::env::var("KEEP_LOG") {
        let _ = std::fs::copy(dir.path().join("log"), keep)?;
    }
    Ok(())
}
