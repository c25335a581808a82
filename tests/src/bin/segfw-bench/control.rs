//! The control path: from a file to the kernel, and what the agent costs while nothing happens.

use crate::Options;
use crate::result::Results;
use crate::rules::{self, CHANGED, OPEN};
use crate::stage::{Stage, connect};
use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use segfw::agent::revision;
use segfw::datapath::{Datapath, load, sys};
use segfw::policy::compile::compile;
use segfw::policy::document::Document;
use segfw::policy::host_policy::Labels;
use segfw::policy::tables::Numbers;
use segfw::policy::{HostPolicy, HostSettings, Inventory, Known, Tables};
use segfw_common::{ABI_VERSION, CgroupEntry, Identity};
use segfw_tests::policy::CGROUP;
use segfw_tests::scratch::{Scratch, cgroup_id, enter};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Idle CPU is taken over so long: several rounds of everything the agent does by the clock (8 s at most).
const IDLE: Duration = Duration::from_secs(20);

/// Workloads that are on this host where rules are by label; the others are on other hosts.
const HERE: usize = 100;

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Text to tables, as the agent does it: nothing of it needs root.
pub(crate) fn compile_rules(options: &Options, results: &mut Results) -> Result<()> {
    let n = options.large();
    let by_address: Vec<_> = rules::files(n)
        .into_iter()
        .chain([("policy.yaml".to_owned(), rules::access(&[OPEN]))])
        .map(|(name, text)| (name, text.replace(CGROUP, "/bench")))
        .collect();
    for (shape, files, here) in [("by address", by_address, 2), ("by label", by_label(n), HERE)] {
        let mut steps: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        let mut entries = 0;
        for _ in 0..options.few() {
            let begun = Instant::now();
            let Built { parsed, resolved, tables, .. } = build(&files, here)?;
            let all = begun.elapsed();
            entries = tables.rules.len();
            // As many rules as asked for are in the tables, or they would be compiled to nothing.
            ensure!(entries >= n as usize / 2, "{n} rules {shape} became {entries} entries");
            let mut add = |what, time| steps.entry(what).or_default().push(ms(time));
            add("parse", parsed - begun);
            add("resolve", resolved - parsed);
            add("compile", (begun + all).duration_since(resolved));
            add("all", all);
        }
        for (step, what) in
            [("parse", "parse"), ("resolve", "resolve"), ("compile", "compile"), ("all", "parse + resolve + compile")]
        {
            results.figure(
                "compile",
                &format!("{what}, rules {shape}"),
                n.into(),
                "ms",
                steps.remove(step).unwrap_or_default(),
            );
        }
        eprintln!("             ({n} rules {shape}: {entries} entries)");
    }
    Ok(())
}

/// Rules between segments of workloads: 1,000 segments of which a host has 100.
fn by_label(n: u32) -> Vec<(String, String)> {
    const SEGMENTS: usize = 1_000;
    let n = n as usize;
    let mut base = String::new();
    for s in 0..SEGMENTS {
        let _ = write!(
            base,
            "---\napiVersion: segfw.dev/v1\nkind: Segment\nmetadata: {{name: s{s}}}\nspec:\n  select: {{app: a{s}}}\n  default: {{ingress: deny, egress: deny}}\n"
        );
        let _ = write!(
            base,
            "---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {{name: a{s}}}\nspec:\n  match: [{{cgroup: \"/bench/a{s}\"}}]\n  labels: {{app: a{s}}}\n"
        );
    }
    let mut files = vec![("base.yaml".to_owned(), base)];
    for first in (0..n).step_by(1_000) {
        let mut text = format!(
            "apiVersion: segfw.dev/v1\nkind: Policy\nmetadata: {{name: bulk-{first}}}\nspec:\n  tier: application\n  rules:\n"
        );
        for i in first..n.min(first + 1_000) {
            // Every rule is one that this host has to know: one end is here.
            let (from, to, port) = (i % HERE, (i / HERE + i) % SEGMENTS, 10_000 + i % 500);
            let _ = writeln!(
                text,
                "    - {{name: r{i}, from: [s{from}], to: [s{to}], ports: [tcp/{port}], action: allow}}"
            );
        }
        files.push((format!("bulk-{first:06}.yaml"), text));
    }
    files
}

/// Files as tables, with what is needed to use them.
pub(crate) struct Built {
    parsed: Instant,
    resolved: Instant,
    pub(crate) tables: Tables,
    pub(crate) numbers: Numbers,
    /// Label sets of the workloads of this host, in the order of their documents.
    pub(crate) local: Vec<Labels>,
}

/// What `agent::revision::build` does with files, step by step. The first `here` workloads are of this host.
pub(crate) fn build(files: &[(String, String)], here: usize) -> Result<Built> {
    build_with(files, here, |_| ())
}

/// [`build`], with a change between the resolver and the compiler.
pub(crate) fn build_with(
    files: &[(String, String)],
    here: usize,
    change: impl FnOnce(&mut HostPolicy),
) -> Result<Built> {
    let (documents, problems) = segfw::policy::parse(files);
    ensure!(problems.is_empty(), "{problems:?}");
    let parsed = Instant::now();
    let workloads = documents.iter().filter_map(|d| match d {
        Document::Workload(w) => Some(w),
        Document::Segment(_) | Document::Policy(_) | Document::Test(_) => None,
    });
    let known: Vec<Known> = workloads
        .map(|w| Known {
            name: w.meta.name.clone(),
            cgroup: format!("/bench/{}", w.meta.name),
            labels: w.labels.clone(),
        })
        .collect();
    let mut local: Vec<_> = known.iter().map(|k| k.labels.clone()).collect();
    let remote = local.split_off(here.min(local.len()));
    let clock = revision::clock()?;
    let inventory = Inventory { workloads: known };
    let (mut policy, _) = segfw::policy::resolve(&documents, &inventory, &HostSettings { monitor: false }, clock.wall);
    change(&mut policy);
    let resolved = Instant::now();
    let mut numbers = Numbers::default();
    let tables = compile(&policy, &local, &remote, &mut numbers, clock).map_err(|p| anyhow::anyhow!("{p:?}"))?;
    Ok(Built { parsed, resolved, tables, numbers, local })
}

/// Tables into the kernel: filled, frozen, read back, compared, switched.
pub(crate) fn publish(options: &Options, results: &mut Results) -> Result<()> {
    let n = options.large();
    let mut files = rules::files(n);
    files.push(("policy.yaml".to_owned(), rules::access(&[OPEN])));
    for (_, text) in &mut files {
        *text = text.replace(CGROUP, "/bench");
    }
    let tables = build(&files, 2)?.tables;
    ensure!(tables.rules.len() >= n as usize, "{} entries", tables.rules.len());
    let scratch = Scratch::new()?;
    let mut all = Vec::new();
    for _ in 0..options.few() {
        // One that has put nothing in force yet: it makes every map.
        let datapath = Datapath::load(scratch.pins())?;
        datapath.settle()?;
        let begun = Instant::now();
        let active = datapath.publish(&tables)?;
        all.push(ms(begun.elapsed()));
        ensure!(datapath.active()? == active, "the tables are not in force");
    }
    let what = format!("publish {} entries and {} prefixes", tables.rules.len(), tables.prefixes.len());
    results.figure("publish", &what, n.into(), "ms", all);
    Ok(())
}

/// One rule more, one rule less: from the file to the first connection that fares otherwise.
pub(crate) fn change(options: &Options, results: &mut Results) -> Result<()> {
    for n in [10, options.large()] {
        let stage = Stage::new(n, "")?;
        let listener = stage.listen(CHANGED)?;
        let (mut opened, mut shut, mut apply) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..options.few() {
            let begun = stage.allow(&[OPEN, CHANGED])?;
            opened.push(ms(stage.until(&listener, true, begun)?));
            // The agent goes on with what comes after the switch; that is part of what it takes, not of the next sample.
            settle(&stage)?;
            apply.push(stage.metric("segfw_policy_apply_seconds")? * 1e3);
            let begun = stage.allow(&[OPEN])?;
            shut.push(ms(stage.until(&listener, false, begun)?));
            settle(&stage)?;
            apply.push(stage.metric("segfw_policy_apply_seconds")? * 1e3);
        }
        drop(listener);
        results.figure("change", "file changed to rule enforced (a connection opens)", n.into(), "ms", opened);
        results.figure("change", "file changed to rule enforced (a connection is refused)", n.into(), "ms", shut);
        results.figure("change", "of that the agent's own work, sweep included", n.into(), "ms", apply);
        stage.proof()?;
    }
    Ok(())
}

/// Waits until the agent answers: it does so between its steps.
fn settle(stage: &Stage) -> Result<()> {
    let status = stage.agent.status()?;
    ensure!(status["state"] == "ENFORCING", "{}", status["state"]);
    std::thread::sleep(Duration::from_millis(500));
    Ok(())
}

/// Workloads that start: cgroups that are made, and the first connection from each.
pub(crate) fn start(options: &Options, results: &mut Results) -> Result<()> {
    let n: u32 = if options.quick { 200 } else { 1_000 };
    let stage = Stage::new(10, "")?;
    stage.write(
        "fleet.yaml",
        "---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {name: fleet}\nspec:\n  match: [{cgroup: \"@CGROUP@/fleet/*\"}]\n  labels: {app: cli, fleet: one}\n",
    )?;
    std::thread::sleep(Duration::from_secs(2));
    let fleet = stage.world.cgroup("managed/fleet")?;
    let plain = stage.world.cgroup("outside/fleet")?;
    let listener = stage.listen(OPEN)?;
    let (mut with, mut burst, mut first, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut without = Vec::new();
    for _ in 0..options.few().min(5) {
        without.push(make_all(&plain, n)?.as_secs_f64() * 1e6 / f64::from(n));
        remove_all(&plain, n)?;
        let used = stage.agent_cpu_us()?;
        let begun = Instant::now();
        with.push(make_all(&fleet, n)?.as_secs_f64() * 1e6 / f64::from(n));
        let ids: Vec<u64> = (0..n).map(|i| cgroup_id(&fleet.join(i.to_string()))).collect::<Result<_>>()?;
        while !all_known(&stage, &ids)? {
            ensure!(begun.elapsed() < Duration::from_secs(60), "after a minute not all {n} workloads are known");
            std::thread::sleep(Duration::from_millis(5));
        }
        burst.push(ms(begun.elapsed()));
        std::thread::sleep(Duration::from_secs(1));
        cpu.push((stage.agent_cpu_us()? - used) as f64 / 1e3);
        remove_all(&fleet, n)?;
        std::thread::sleep(Duration::from_secs(2));
        for i in 0..20 {
            let path = fleet.join(format!("one-{i}"));
            let begun = Instant::now();
            std::fs::create_dir(&path)?;
            enter(&path)?;
            first.push(ms(stage.until(&listener, true, begun)?));
            stage.as_client()?;
            std::fs::remove_dir(&path)?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    drop(listener);
    results.figure("start", "mkdir of a cgroup, not below segfw", n.into(), "us", without);
    results.figure("start", "mkdir of a cgroup that is a workload", n.into(), "us", with);
    results.figure("start", "all workloads made at once to all known to the kernel", n.into(), "ms", burst);
    results.figure("start", "CPU of the agent for that", n.into(), "ms", cpu);
    results.figure("start", "one workload made to its first connection", 1, "ms", first);
    Ok(())
}

fn make_all(folder: &std::path::Path, n: u32) -> Result<Duration> {
    let begun = Instant::now();
    for i in 0..n {
        std::fs::create_dir(folder.join(i.to_string()))?;
    }
    Ok(begun.elapsed())
}

fn remove_all(folder: &std::path::Path, n: u32) -> Result<()> {
    for i in 0..n {
        std::fs::remove_dir(folder.join(i.to_string()))?;
    }
    Ok(())
}

/// Whether the kernel's registry has an identity of labels for each of these cgroups.
fn all_known(stage: &Stage, ids: &[u64]) -> Result<bool> {
    let pin = load::layout_dir(stage.world.pins(), ABI_VERSION).join("CGROUPS");
    let map = sys::get(&pin)?.context("no map CGROUPS is pinned")?;
    let known: BTreeMap<u64, CgroupEntry> = sys::map_dump(map.as_fd(), 1024)?.into_iter().collect();
    Ok(ids.iter().all(|id| known.get(id).is_some_and(|e| e.identity >= Identity::FIRST_DYNAMIC)))
}

/// What the agent and the maps hold, and what the agent uses while nothing happens.
pub(crate) fn memory(options: &Options, results: &mut Results) -> Result<()> {
    for n in [10, options.large()] {
        let mut stage = Stage::new(n, "")?;
        results.figure(
            "memory",
            "agent, resident, after its first revision",
            n.into(),
            "MiB",
            vec![resident(&stage, "VmRSS")?],
        );
        results.figure(
            "memory",
            "of that its own (the rest: its file, the ring)",
            n.into(),
            "MiB",
            vec![resident(&stage, "RssAnon")?],
        );
        // What was needed to build a revision and is not given back shows here.
        let listener = stage.listen(CHANGED)?;
        let begun = stage.allow(&[OPEN, CHANGED])?;
        let _ = stage.until(&listener, true, begun)?;
        drop(listener);
        std::thread::sleep(Duration::from_secs(2));
        results.figure(
            "memory",
            "agent, resident, after its second revision",
            n.into(),
            "MiB",
            vec![resident(&stage, "VmRSS")?],
        );
        let (fixed, of_policy) = maps(&stage)?;
        results.figure("memory", "maps that every policy has", n.into(), "MiB", vec![fixed]);
        results.figure("memory", "maps of the generation in force", n.into(), "MiB", vec![of_policy]);
        let idle = if options.quick { IDLE / 4 } else { IDLE };
        let used = stage.agent_cpu_us()?;
        std::thread::sleep(idle);
        let share = (stage.agent_cpu_us()? - used) as f64 / idle.as_micros() as f64 * 100.0;
        results.figure("memory", "agent, CPU while nothing happens", n.into(), "% of a core", vec![share]);
        stage.agent.stop()?;
        let took = stage.start()?;
        results.figure("memory", "restart of the agent to ENFORCING", n.into(), "ms", vec![ms(took)]);
    }
    Ok(())
}

/// MiB; `field` of /proc/PID/status.
fn resident(stage: &Stage, field: &str) -> Result<f64> {
    let pid = stage.agent.pid().context("the agent does not run")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix(field)).with_context(|| format!("no {field}"))?;
    Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}

/// MiB as the kernel accounts them (`memlock` in fdinfo): pinned maps, and inner maps of all slots.
fn maps(stage: &Stage) -> Result<(f64, f64)> {
    let dir = load::layout_dir(stage.world.pins(), ABI_VERSION);
    let (mut fixed, mut inner) = (0, 0);
    for name in load::PINNED_MAPS {
        let map = sys::get(&dir.join(name))?.with_context(|| format!("no map {name} is pinned"))?;
        fixed += memlock(map.as_fd())?;
        if !["CLASSES", "RULES", "TIMELINE", "LOCALS", "HOSTS", "PREFIXES"].contains(&name) {
            continue;
        }
        for slot in 0..sys::map_info(map.as_fd())?.max_entries {
            if let Some(map) = sys::outer_get(map.as_fd(), slot)? {
                inner += memlock(map.as_fd())?;
            }
        }
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    ensure!(inner != 0, "no generation is in force");
    Ok((mib(fixed), mib(inner)))
}

fn memlock(map: BorrowedFd<'_>) -> Result<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))?;
    let line = info.lines().find_map(|l| l.strip_prefix("memlock:")).context("no memlock in fdinfo")?;
    Ok(line.trim().parse()?)
}

/// Live connections that a new revision no longer allows: how long until the last of them is gone.
pub(crate) fn sweep(options: &Options, results: &mut Results) -> Result<()> {
    // Both ends are ours; a machine that allows fewer files gets fewer connections, and the figure says how many.
    let files = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?.0;
    let most = usize::try_from(files / 2).unwrap_or(usize::MAX).saturating_sub(100);
    let n: usize = if options.quick { 1_000 } else { most.min(10_000) };
    let stage = Stage::new(10, "")?;
    let (mut cut, mut refused, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..options.few().min(5) {
        let listener = stage.listen(CHANGED)?;
        let begun = stage.allow(&[OPEN, CHANGED])?;
        let _ = stage.until(&listener, true, begun)?;
        let listener = {
            // Those that the wait had opened go with it.
            drop(listener);
            stage.listen(CHANGED)?
        };
        let mut pairs = Vec::with_capacity(n);
        for _ in 0..n {
            let there = TcpStream::connect((Ipv4Addr::LOCALHOST, CHANGED))?;
            pairs.push((there, listener.accept()?.0));
        }
        std::thread::sleep(Duration::from_secs(1));
        ensure!(alive(&pairs)? == n, "round {round}: {} of {n} connections stand before the change", alive(&pairs)?);
        let begun = stage.allow(&[OPEN])?;
        let first = stage.until(&listener, false, begun)?;
        while alive(&pairs)? != 0 {
            ensure!(
                begun.elapsed() < Duration::from_secs(60),
                "after a minute {} of {n} connections stand",
                alive(&pairs)?
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        refused.push(ms(first));
        all.push(ms(begun.elapsed()));
        cut.push(ms(begun.elapsed() - first));
        drop((pairs, listener));
        std::thread::sleep(Duration::from_secs(1));
    }
    let n = n as u64;
    results.figure("sweep", "file changed to new connections refused", n, "ms", refused);
    results.figure("sweep", "new connections refused to the last live one cut", n, "ms", cut);
    results.figure("sweep", "file changed to the last live one cut", n, "ms", all);
    ensure!(!connect(CHANGED).unwrap_or(false), "the port is open again");
    Ok(())
}

/// Connections of which neither end was told that it is over.
fn alive(pairs: &[(TcpStream, TcpStream)]) -> Result<usize> {
    let mut fds: Vec<_> =
        pairs.iter().flat_map(|(a, b)| [a, b]).map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)).collect();
    let _ = poll(&mut fds, PollTimeout::ZERO)?;
    let over = |fd: &PollFd<'_>| {
        fd.revents().is_some_and(|r| r.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLIN))
    };
    Ok(fds.chunks(2).filter(|pair| !pair.iter().any(over)).count())
}
