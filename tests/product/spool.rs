//! Flow records on disk: they survive the agent, all that is missing is told, and a full disk stops nothing.

use crate::scene::{OPEN, SHUT, Scene, until};
use crate::{Test, skip};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("spool: records survive kill -9 and are found again", survive),
        ("spool: overdriven, records and losses are the kernel's counters", overdriven),
        ("spool: a full disk stops nothing, is told, and heals", full_disk),
        ("spool: every output format of one flood", formats),
        ("spool: a query over 64 MiB of records holds little of it", large),
    ]
}

const SETTINGS: &str = "flows: {spool: {dir: \"@FOLDER@/flows\", maxBytes: 67108864, fileBytes: 16777216}}\n";

/// Every line of every file, in the order of writing. `torn` = the last line may be cut off.
fn lines(dir: &Path) -> Result<Vec<Value>> {
    let mut files: Vec<_> = std::fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.sort();
    let mut all = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file)?;
        for line in text.lines() {
            all.push(serde_json::from_str(line).with_context(|| format!("{}: {line}", file.display()))?);
        }
    }
    Ok(all)
}

/// What the files say: numbered records, denials in sums, numbered events lost, denials in lost sums.
#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
struct Sum {
    records: u64,
    sums: u64,
    lost: u64,
    lost_sums: u64,
}

fn sum(lines: &[Value]) -> Sum {
    let mut sum = Sum::default();
    for line in lines {
        let number = |key: &str| line[key].as_u64().unwrap_or(0);
        if line.get("lost_in").is_some() {
            sum.lost += number("lost");
            sum.lost_sums += number("denials");
        } else {
            sum.records += u64::from(line.get("sequence").is_some());
            sum.sums += number("count");
        }
    }
    sum
}

/// Events the kernel numbered, and denials it counted by key.
fn kernel(scene: &Scene) -> Result<(u64, u64)> {
    let sent = scene.counter("events-sent")? + scene.counter("events-lost")?;
    Ok((sent, scene.counter("denials-aggregated")? - scene.counter("denials-uncounted")?))
}

/// Waits until the files account for all the kernel has counted, from what it had counted before.
fn balance(scene: &Scene, seconds: u64) -> Result<Sum> {
    let mut last = String::new();
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        let (events, denials) = kernel(scene)?;
        let told = sum(&lines(&scene.flows_dir())?);
        if told.records + told.lost == events && told.sums + told.lost_sums == denials {
            return Ok(told);
        }
        last = format!("{told:?}, the kernel counted {events} events and {denials} denials by key");
        std::thread::sleep(Duration::from_millis(300));
    }
    anyhow::bail!("the files do not account for everything: {last}")
}

/// A refused connect on each CPU: that an event is missing shows when its CPU writes the next one.
fn every_cpu(scene: &mut Scene) -> Result<()> {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    let pid = nix::unistd::Pid::from_raw(i32::try_from(scene.cli.pid())?);
    let all = sched_getaffinity(pid)?;
    for cpu in (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap_or(false)) {
        let mut one = CpuSet::new();
        one.set(cpu)?;
        sched_setaffinity(pid, &one)?;
        scene.connect(SHUT, 1)?;
    }
    Ok(sched_setaffinity(pid, &all)?)
}

fn survive() -> Result<()> {
    let mut scene = Scene::new(SETTINGS, &[])?;
    scene.connect(OPEN, 20)?;
    scene.connect(SHUT, 20)?;
    // The next agent goes on with the CPUs that are in the files.
    every_cpu(&mut scene)?;
    let before = balance(&scene, 10)?;
    ensure!(before.records >= 60 && before.lost == 0, "{before:?}");
    let mode = |path: &Path| path.metadata().map(|m| m.permissions().mode() & 0o777);
    ensure!(mode(&scene.flows_dir())? == 0o700, "the folder is not 0700");
    for file in std::fs::read_dir(scene.flows_dir())? {
        ensure!(mode(&file?.path())? == 0o600, "a file is not 0600");
    }
    // These may be in the agent's memory only when it dies, and more come while none runs: the ring keeps those.
    scene.connect(SHUT, 30)?;
    scene.agent.kill()?;
    scene.connect(SHUT, 10)?;
    scene.agent.launch()?;
    every_cpu(&mut scene)?;
    let after = balance(&scene, 10)?;
    println!("        kill -9 cost {} records, and the files say so", after.lost);
    let found = scene.flows(&["--since", "10m", "--verdict", "DENIED", "--kind", "new"])?;
    let denied = found.iter().filter(|r| r["destination"]["port"] == SHUT).count() as u64;
    ensure!(denied >= 30 && denied + after.lost >= 60, "{denied} of 60 found, {} lost", after.lost);
    // None twice: each has its number.
    let mut numbers: Vec<_> = found
        .iter()
        .filter(|r| r.get("lost").is_none())
        .map(|r| (r["cpu"].to_string(), r["sequence"].to_string(), r["time"].to_string()))
        .collect();
    let all = numbers.len();
    numbers.sort();
    numbers.dedup();
    ensure!(numbers.len() == all, "{} records came twice", all - numbers.len());
    let times: Vec<_> = found.iter().filter_map(|r| r["time"].as_str()).collect();
    ensure!(times.first() <= times.last(), "not oldest first");
    // The newest 30 reach back beyond this agent: some ten were refused since the other one died.
    let status = scene.agent.status()?;
    let started = status["agent"]["started_at"].as_str().context("no start")?;
    let last = scene.flows(&["--last", "30", "--verdict", "DROPPED", "--kind", "new"])?;
    let records: Vec<_> = last.iter().filter(|r| r.get("lost").is_none()).collect();
    ensure!(records.len() == 30, "{} of the last 30", records.len());
    let oldest = records[0]["time"].as_str().context("no time")?;
    ensure!(oldest < started, "nothing of the agent before this one");
    let first = scene.flows(&["--first", "3"])?;
    let all = lines(&scene.flows_dir())?;
    ensure!(first[..] == all[..3], "the first three are not those of the oldest file");
    // A follower gets the past first, from the files too, and ends when it has what it asked for.
    let followed = scene.flows(&["-f", "--first", "5"])?;
    ensure!(followed[..] == all[..5], "a follower's first five are others");
    let shown = String::from_utf8(scene.agent.cli(&["status"])?.stdout)?;
    let line = shown.lines().find(|l| l.contains("on disk: ")).context("the status says nothing of the files")?;
    println!("        {}", line.trim());
    let bytes: u64 = std::fs::read_dir(scene.flows_dir())?.map(|f| Ok(f?.metadata()?.len())).sum::<Result<u64>>()?;
    println!("        {} bytes a line on average", bytes / all.len() as u64);
    Ok(())
}

/// Refused datagrams, as fast as one process can: above 256 a second and CPU the kernel counts them by key.
fn flood(scene: &mut Scene, times: usize) -> Result<()> {
    let to = SocketAddr::new(scene.world.v4("b").into(), SHUT);
    let h = scene.cli.socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?.map_err(anyhow::Error::msg)?;
    for _ in 0..times {
        let _ = scene.cli.send_to(h, to, "x")?;
    }
    scene.cli.close(h)
}

fn overdriven() -> Result<()> {
    let mut scene = Scene::new(SETTINGS, &[])?;
    // The drain stands still while the ring fills.
    scene.agent.signal(nix::sys::signal::Signal::SIGSTOP)?;
    let rounds = scene.connect(OPEN, 25_000);
    flood(&mut scene, 2_000)?;
    scene.agent.signal(nix::sys::signal::Signal::SIGCONT)?;
    rounds?;
    until("all is accounted for", 60, || {
        every_cpu(&mut scene)?;
        balance(&scene, 3).map(Some)
    })
    .map(|told| println!("        {told:?}"))?;
    let (lost, queue) = (scene.counter("events-lost")?, scene.counter("spool-lost")?);
    println!("        {lost} lost in the ring, {queue} records before the disk");
    ensure!(lost > 0, "the ring was never full: the test proves nothing");
    Ok(())
}

fn full_disk() -> Result<()> {
    let world_dir = tempfile::tempdir()?;
    let disk = world_dir.path().join("disk");
    std::fs::create_dir(&disk)?;
    let options = Some("size=256k,mode=0700");
    if let Err(e) = nix::mount::mount(Some("tmpfs"), &disk, Some("tmpfs"), nix::mount::MsFlags::empty(), options) {
        return skip(format!("no tmpfs can be mounted here: {e}"));
    }
    let ended = fill_and_heal(&disk);
    let _ = nix::mount::umount2(&disk, nix::mount::MntFlags::MNT_DETACH);
    ended
}

fn fill_and_heal(disk: &Path) -> Result<()> {
    let settings = format!("flows: {{spool: {{dir: \"{}/flows\"}}}}\n", disk.display());
    let mut scene = Scene::new(&settings, &[])?;
    scene.connect(OPEN, 5)?;
    std::fs::write(disk.join("filler"), vec![0; 160 << 10])?;
    // Enforcement goes on, on a full disk: every connect ends as it should.
    until("the disk is full", 30, || {
        scene.connect(OPEN, 60)?;
        scene.connect(SHUT, 60)?;
        Ok((scene.counter("spool-lost")? > 0).then_some(()))
    })?;
    let status = scene.agent.status()?;
    ensure!(status["state"] == "DEGRADED", "{}", status["state"]);
    ensure!(status["reasons"].to_string().contains("No space left on device"), "{}", status["reasons"]);
    scene.connect(OPEN, 20)?;
    scene.connect(SHUT, 20)?;
    std::fs::remove_file(disk.join("filler"))?;
    scene.agent.wait_until("writes records again", |status| status["state"] == "ENFORCING")?;
    scene.connect(SHUT, 3)?;
    let lost = scene.counter("spool-lost")?;
    let told = until("the loss is told in the files", 10, || {
        let (events, denials) = kernel(&scene)?;
        let told = sum(&lines(&disk.join("flows"))?);
        let all = told.records + told.lost == events && told.sums + told.lost_sums == denials;
        Ok(all.then_some(told))
    })?;
    println!("        {told:?}, of {lost} records that did not fit");
    ensure!(told.lost > 0 && lost >= told.lost, "{told:?} of {lost}");
    let shown = scene.agent.cli(&["flows", "--since", "10m"])?;
    let shown = String::from_utf8(shown.stdout)?;
    ensure!(shown.contains("RECORDS not written to disk"), "the loss is not shown:\n{shown}");
    Ok(())
}

fn formats() -> Result<()> {
    let mut scene = Scene::new(SETTINGS, &[])?;
    flood(&mut scene, 6_000)?;
    let told = balance(&scene, 15)?;
    ensure!(told.sums > 0, "nothing was aggregated: {told:?}");
    let ask = |words: &[&str]| -> Result<String> {
        let output = scene.agent.cli(&[&["flows", "--since", "10m", "--kind", "denials"], words].concat())?;
        ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let count = |text: &str, of: &dyn Fn(&Value) -> u64| -> Result<u64> {
        text.lines().map(|line| Ok(of(&serde_json::from_str(line)?))).sum()
    };
    ensure!(count(&ask(&["-o", "json"])?, &|v| v["count"].as_u64().unwrap_or(0))? == told.sums, "json");
    ensure!(count(&ask(&["-o", "ocsf"])?, &|v| v["count"].as_u64().unwrap_or(0))? == told.sums, "ocsf");
    let summary = |v: &Value| {
        let text = v["flow"]["Summary"].as_str().unwrap_or_default().to_owned();
        text.split("count=").nth(1).and_then(|t| t.split(' ').next()?.parse().ok()).unwrap_or(0)
    };
    ensure!(count(&ask(&["-o", "jsonpb"])?, &summary)? == told.sums, "jsonpb");
    for format in ["compact", "table"] {
        let text = ask(&["-o", format])?;
        let shown: u64 = text.split_whitespace().filter_map(|word| word.strip_prefix('x')?.parse::<u64>().ok()).sum();
        ensure!(shown == told.sums, "{format} shows {shown} of {}", told.sums);
    }
    // Bytes per record, for the documentation.
    let (mut bytes, mut records) = (0, 0);
    for file in std::fs::read_dir(scene.flows_dir())? {
        let text = std::fs::read_to_string(file?.path())?;
        bytes += text.len();
        records += text.lines().count();
    }
    println!("        {records} lines of {} bytes on average", bytes / records.max(1));
    Ok(())
}

/// Bytes of made-up records, and what the agent may need more than before to read them all.
const LARGE: usize = 64 << 20;
const LARGE_COSTS_KIB: u64 = 24 << 10;

/// A number of `/proc/PID/status`, KiB.
fn memory(pid: u64, key: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|l| l.starts_with(key)).context("no such line")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
}

fn large() -> Result<()> {
    let mut scene = Scene::new(SETTINGS, &[])?;
    scene.connect(SHUT, 1)?;
    let _ = balance(&scene, 10)?;
    scene.agent.stop()?;
    let template = lines(&scene.flows_dir())?.pop().context("no record")?;
    let mut made: u64 = 0;
    for file in 0..4 {
        let mut text = String::new();
        let path = scene.flows_dir().join(format!("flows-{:020}-20200101T000000Z.jsonl", 1000 + made));
        while text.len() < LARGE / 4 {
            let mut record = template.clone();
            record["time"] = format!("2020-01-01T{file:02}:00:00.{made:09}Z").into();
            record["source"]["port"] = (made % 10_000).into();
            text += &format!("{record}\n");
            made += 1;
        }
        std::fs::write(path, text)?;
    }
    scene.agent.launch()?;
    let pid = scene.agent.status()?["agent"]["pid"].as_u64().context("no pid")?;
    // The peak from here on.
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
    let before = memory(pid, "VmRSS")?;
    let start = Instant::now();
    let output = scene.agent.cli(&["flows", "--until", "2020-01-02T00:00:00Z", "-o", "compact"])?;
    let took = start.elapsed();
    let shown = output.stdout.iter().filter(|b| **b == b'\n').count() as u64;
    ensure!(shown == made, "{shown} of {made} records");
    let costs = memory(pid, "VmHWM")?.saturating_sub(before);
    println!("        {made} records in {:.1} s; the agent's peak was {costs} KiB above", took.as_secs_f64());
    ensure!(costs < LARGE_COSTS_KIB, "the agent held {costs} KiB");
    let start = Instant::now();
    let last = scene.flows(&["--until", "2020-01-02T00:00:00Z", "--last", "3", "--from-port", "7"])?;
    ensure!(last.len() == 3 && last.iter().all(|r| r["source"]["port"] == 7), "{last:?}");
    println!("        the last 3 with a rare port in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
