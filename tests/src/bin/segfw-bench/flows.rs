//! The flow path: what the agent can write down, what that costs, and whether it says what it could not.

use crate::Options;
use crate::result::Results;
use crate::rules::OPEN;
use crate::stage::Stage;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::socket::{self, sockopt};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Records on disk, with room for every round.
const SPOOLED: &str = "flows: {spool: {dir: @FOLDER@/flows, maxBytes: 4294967296}}\n";
/// One rate is held for so long.
const HELD: Duration = Duration::from_secs(5);
/// New connections per second, without pause at the end of the list.
const RATES: [u32; 5] = [2_000, 5_000, 10_000, 15_000, 20_000];
/// The rate of the goal.
const BUSY: u32 = 10_000;

/// Opens, accepts and closes connections; as many a second as asked for, or as fast as it goes. How many, in which time.
fn connections(listener: &TcpListener, rate: Option<u32>, held: Duration) -> Result<(u64, Duration)> {
    let begun = Instant::now();
    let mut made = 0u64;
    while begun.elapsed() < held {
        let due = rate.map_or(u64::MAX, |r| (begun.elapsed().as_secs_f64() * f64::from(r)) as u64);
        if made >= due {
            std::thread::sleep(Duration::from_micros(500));
            continue;
        }
        let there = TcpStream::connect((Ipv4Addr::LOCALHOST, OPEN))?;
        // No TIME_WAIT: a minute of these rates would use up the ports.
        socket::setsockopt(&there, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        let (here, _) = listener.accept()?;
        drop((there, here));
        made += 1;
    }
    Ok((made, begun.elapsed()))
}

/// What the files say.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    /// Of a new connection or of the end of one, from the ring buffer: each has a number of its CPU.
    records: u64,
    /// Told as lost, by the kernel side and by the queue to the disk.
    lost: u64,
}

/// Reads the files themselves, not what the agent counts.
fn written(folder: &Path) -> Result<Written> {
    let mut sum = Written::default();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "jsonl") && !path.is_file() {
            continue;
        }
        for line in BufReader::new(File::open(&path)?).lines() {
            let line = line?;
            // Values are read only where they matter: 100 MB of JSON are slow to take apart.
            if line.contains("\"lost\":") {
                let value: serde_json::Value = serde_json::from_str(&line).with_context(|| line.clone())?;
                sum.lost += value["lost"].as_u64().context("a loss mark without a number")?;
            } else if line.contains("\"sequence\":") {
                sum.records += 1;
            }
        }
    }
    Ok(sum)
}

/// Events the kernel side numbered, and those of them for which the ring had no room.
fn kernel(stage: &Stage) -> Result<(u64, u64)> {
    let lost = stage.counter("events-lost")?;
    Ok((stage.counter("events-sent")? + lost, lost))
}

/// Waits until files, agent and kernel stand still.
fn quiet(stage: &Stage) -> Result<Written> {
    let folder = stage.world.folder().join("flows");
    let mut before = 0.0;
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        std::thread::sleep(Duration::from_millis(1500));
        let now = stage.metric("segfw_flow_spool_written_total")?;
        if now == before {
            return written(&folder);
        }
        ensure!(Instant::now() < end, "the agent still writes after a minute");
        before = now;
    }
}

/// Which rate of new connections is written down without a loss, at which cost to the agent.
pub(crate) fn rate(options: &Options, results: &mut Results) -> Result<()> {
    let stage = Stage::new(10, SPOOLED)?;
    let listener = stage.listen(OPEN)?;
    let held = if options.quick { HELD / 5 } else { HELD };
    // Not counted: the first records, lazily allocated memory.
    let _ = connections(&listener, Some(100), Duration::from_secs(1))?;
    let mut best = 0.0;
    let mut per_connection = None;
    for rate in RATES.into_iter().map(Some).chain([None]) {
        let before = quiet(&stage)?;
        let (events, dropped) = kernel(&stage)?;
        let used = stage.agent_cpu_us()?;
        let (made, took) = connections(&listener, rate, held)?;
        // What is still in the ring and in the queue belongs to it; what the questions below cost does not.
        std::thread::sleep(Duration::from_millis(1500));
        let cpu = (stage.agent_cpu_us()? - used) as f64 / took.as_micros() as f64 * 100.0;
        let after = quiet(&stage)?;
        let (events, dropped) = {
            let now = kernel(&stage)?;
            (now.0 - events, now.1 - dropped)
        };
        let reached = made as f64 / took.as_secs_f64();
        let (records, lost) = (after.records - before.records, after.lost - before.lost);
        ensure!(
            records + lost == events,
            "{made} connections: {events} events, {records} records + {lost} lost in the files"
        );
        let name = rate.map_or("as fast as one thread can".to_owned(), |r| format!("asked for {r}/s"));
        results.figure("rate", &format!("new connections, {name}"), made, "1/s", vec![reached]);
        results.figure("rate", &format!("records lost, {name} (kernel {dropped})"), made, "count", vec![lost as f64]);
        results.figure("rate", &format!("CPU of the agent, files included, {name}"), made, "% of a core", vec![cpu]);
        if lost == 0 {
            best = reached.max(best);
            let each = records as f64 / made as f64;
            let first: &mut f64 = per_connection.get_or_insert(each);
            ensure!((*first - each).abs() < 0.01, "{first} records per connection became {each}");
        }
    }
    results.figure("rate", "highest rate tried at which nothing was lost", 0, "1/s", vec![best]);
    results.figure(
        "rate",
        "records per connection (both ends, begin and end)",
        0,
        "count",
        per_connection.into_iter().collect(),
    );
    overdriven(&stage, &listener, per_connection.context("every rate lost records")?, results)
}

/// The agent stands still while the ring runs over; then what it says is lost must be what is lost.
fn overdriven(stage: &Stage, listener: &TcpListener, each: f64, results: &mut Results) -> Result<()> {
    /// More than the ring buffer's 16 MiB hold.
    const CONNECTIONS: u64 = 60_000;
    let before = quiet(stage)?;
    let (_, dropped) = kernel(stage)?;
    stage.agent.signal(Signal::SIGSTOP)?;
    let mut made = 0;
    let held = Instant::now();
    let mut run = || -> Result<()> {
        while made < CONNECTIONS {
            ensure!(held.elapsed() < Duration::from_secs(120), "{made} connections only");
            made += connections(listener, None, Duration::from_millis(200))?.0;
        }
        Ok(())
    };
    let ran = run();
    stage.agent.signal(Signal::SIGCONT)?;
    ran?;
    // A gap shows when the next event of that CPU comes.
    for cpu in 0..std::thread::available_parallelism()?.get() {
        crate::pin(cpu)?;
        made += connections(listener, Some(100), Duration::from_millis(200))?.0;
    }
    crate::unpin()?;
    let after = quiet(stage)?;
    let dropped = kernel(stage)?.1 - dropped;
    let (records, said) = (after.records - before.records, after.lost - before.lost);
    // What this process did, not what segfw counted.
    let truth = (made as f64 * each).round() - records as f64;
    ensure!(dropped > 0, "the ring held everything: nothing was overdriven");
    results.figure("rate", "overdriven: connections while the agent stood still", made, "count", vec![made as f64]);
    results.figure("rate", "overdriven: records truly lost (made - in the files)", made, "count", vec![truth]);
    results.figure("rate", "overdriven: records said to be lost", made, "count", vec![said as f64]);
    results.figure("rate", "overdriven: of those the ring had no room for", made, "count", vec![dropped as f64]);
    Ok(())
}

/// What the agent costs while connections come in at the rate of the goal: records in memory, and in files too.
pub(crate) fn agent_cpu(options: &Options, results: &mut Results) -> Result<()> {
    let held = if options.quick { HELD / 5 } else { HELD };
    for (what, settings) in [("records in memory", ""), ("records in memory and files", SPOOLED)] {
        let stage = Stage::new(10, settings)?;
        let listener = stage.listen(OPEN)?;
        let (mut cpu, mut reached) = (Vec::new(), Vec::new());
        let (_, dropped) = kernel(&stage)?;
        for _ in 0..options.few().min(5) {
            let used = stage.agent_cpu_us()?;
            let (made, took) = connections(&listener, Some(BUSY), held)?;
            // What is still in the ring belongs to it.
            std::thread::sleep(Duration::from_secs(2));
            // A busy machine reaches less than was asked for: the figure is for the rate of the goal all the same.
            let each_us = (stage.agent_cpu_us()? - used) as f64 / made as f64;
            cpu.push(each_us * f64::from(BUSY) / 1e6 * 100.0);
            reached.push(made as f64 / took.as_secs_f64());
        }
        let lost = kernel(&stage)?.1 - dropped;
        results.figure("agent-cpu", &format!("new connections reached, {what}"), BUSY.into(), "1/s", reached);
        results.figure("agent-cpu", &format!("CPU of the agent at 10,000/s, {what}"), BUSY.into(), "% of a core", cpu);
        results.figure("agent-cpu", &format!("events lost, {what}"), BUSY.into(), "count", vec![lost as f64]);
    }
    Ok(())
}
