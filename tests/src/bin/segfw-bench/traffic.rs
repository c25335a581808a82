//! `cargo xtask bench`: what segfw costs where nothing else costs anything, on the loopback device.
//!
//! One thread is client and server, on one CPU: a request and its response are a handful of function calls in the
//! kernel, so the ratio shown here is the worst case of any network. Rounds with and without segfw take turns. CPU time
//! is that of this process; a kernel that accounts softirqs apart (`CONFIG_IRQ_TIME_ACCOUNTING`) leaves the receiving
//! half out of it. Wall time has all of it, and on an idle machine nothing else: there the minima count. Events are read
//! between the rounds, not in them. JSON goes to stdout.
#![allow(clippy::print_stdout, reason = "a command-line tool")]

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use segfw::datapath::attach::HOOKS;
use segfw::datapath::{Datapath, sys};
use segfw::policy::compile::testing::{labels, rule, segment};
use segfw::policy::compile::{Clock, compile};
use segfw::policy::host_policy::HostPolicy;
use segfw::policy::tables::Numbers;
use segfw_common::{CgroupEntry, Identity};
use segfw_tests::scratch::{self, Scratch, cgroup_id, enter};
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

const PORT: u16 = 5432;
const EXCHANGES: u32 = 20_000;
const CONNECTIONS: u32 = 2_000;

/// What is attached during a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setup {
    Without,
    /// One program of two instructions at `cgroup_skb/ingress`: the least that any such firewall costs.
    EmptyHook,
    Segfw,
}

const SETUPS: [Setup; 3] = [Setup::Without, Setup::EmptyHook, Setup::Segfw];

impl Setup {
    fn name(self) -> &'static str {
        match self {
            Self::Without => "without",
            Self::EmptyHook => "empty_cgroup_skb",
            Self::Segfw => "segfw",
        }
    }
}

/// Nanoseconds for one exchange or connection.
#[derive(Clone, Copy, Debug)]
struct Cost {
    cpu: f64,
    wall: f64,
}

fn main() -> Result<()> {
    let mut rounds = 16usize;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--rounds" => rounds = args.next().context("--rounds needs a number")?.parse()?,
            _ => bail!("unknown option {arg}; there is --rounds N"),
        }
    }
    ensure!(rounds >= 2, "at least two rounds");
    ensure!(nix::unistd::geteuid().is_root(), "this loads eBPF programs: run it as root");
    scratch::clean_up_on_signals()?;
    let _ = scratch::sweep_stale();
    let mut bench = Bench::new()?;
    // Not counted: caches, lazily allocated memory.
    for setup in SETUPS {
        let _ = bench.round(setup)?;
    }
    let mut costs: Vec<(Setup, Cost, Cost)> = Vec::new();
    for round in 0..rounds {
        // Each order in turn, so that none is always the first.
        for i in 0..SETUPS.len() {
            let setup = SETUPS[(i + round) % SETUPS.len()];
            let (exchange, connection) = bench.round(setup)?;
            costs.push((setup, exchange, connection));
        }
        eprint!(".");
    }
    eprintln!();
    let judged = bench.judged()?;
    ensure!(judged >= u64::from(CONNECTIONS) * rounds as u64, "segfw judged {judged} connections only");
    let result = json!({
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "release_build": !cfg!(debug_assertions),
        "rounds": rounds,
        "connections_judged": judged,
        "request_response": report("request-response, 1 byte each way", EXCHANGES, &costs, |c| c.1),
        "connect_accept_close": report("connect, accept, close", CONNECTIONS, &costs, |c| c.2),
    });
    println!("{}", serde_json::to_string_pretty(&result)?);
    Ok(())
}

type Pick = fn(Cost) -> f64;

fn report(
    title: &str,
    operations: u32,
    costs: &[(Setup, Cost, Cost)],
    of: fn(&(Setup, Cost, Cost)) -> Cost,
) -> serde_json::Value {
    let sorted = |setup: Setup, pick: Pick| {
        let mut all: Vec<f64> = costs.iter().filter(|c| c.0 == setup).map(|c| pick(of(c))).collect();
        all.sort_by(f64::total_cmp);
        all
    };
    let minimum = |all: &[f64]| all[0];
    let median = |all: &[f64]| (all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2.0;
    let pick: [(&str, Pick); 2] = [("cpu", |c| c.cpu), ("wall", |c| c.wall)];
    let mut out = serde_json::Map::new();
    let _ = out.insert("operations_per_round".into(), operations.into());
    eprintln!("\n{title}");
    for (what, pick) in pick {
        let base = sorted(Setup::Without, pick);
        for setup in SETUPS {
            let all = sorted(setup, pick);
            let ratios = (minimum(&all) / minimum(&base), median(&all) / median(&base));
            let name = setup.name();
            eprintln!(
                "  {what:4} {name:17} min {:8.0} ns ({:.3}x)   median {:8.0} ns ({:.3}x)",
                minimum(&all),
                ratios.0,
                median(&all),
                ratios.1
            );
            let value = json!({
                "min_ns": minimum(&all).round(),
                "median_ns": median(&all).round(),
                "ratio_of_minima": (ratios.0 * 1000.0).round() / 1000.0,
                "ratio_of_medians": (ratios.1 * 1000.0).round() / 1000.0,
            });
            let _ = out.insert(format!("{what}_{name}"), value);
        }
    }
    out.into()
}

struct Bench {
    datapath: Datapath,
    events: aya::maps::RingBuf<aya::maps::MapData>,
    rule: u32,
    top: File,
    client: PathBuf,
    server: PathBuf,
    empty: OwnedFd,
    // Last: it goes when everything that uses it has gone.
    scratch: Scratch,
}

impl Bench {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let mut datapath = Datapath::load(scratch.pins())?;
        let events = datapath.take_events()?;
        // A network of its own, so that nobody else's packets are in it; and one CPU.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare")?;
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("starting ip")?;
        ensure!(up.success(), "ip link set lo up");
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10000 65000")?;
        std::fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")?;
        let mut one = nix::sched::CpuSet::new();
        one.set(0)?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one)?;

        let (client, server) = (scratch.cgroup("client")?, scratch.cgroup("server")?);
        let top = File::open(scratch.cgroup("")?)?;
        let rule = publish(&datapath, &client, &server)?;
        Ok(Self { datapath, events, rule, top, client, server, empty: empty_hook()?, scratch })
    }

    fn round(&mut self, setup: Setup) -> Result<(Cost, Cost)> {
        let mut empty = None;
        match setup {
            Setup::Without => {}
            Setup::EmptyHook => {
                empty = Some(sys::link_create(self.empty.as_fd(), self.top.as_raw_fd() as u32, 0, 0)?);
            }
            Setup::Segfw => {
                for hook in HOOKS {
                    let _ = self.datapath.attach(hook, &self.top)?;
                }
            }
        }
        let result = self.both();
        drop(empty);
        if setup == Setup::Segfw {
            for hook in HOOKS {
                std::fs::remove_file(self.datapath.dir.join(format!("link-{}", hook.program)))?;
            }
            // A worker of the kernel ends the links, a little later: until then half of the hooks would judge the next round.
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        while self.events.next().is_some() {}
        result
    }

    /// The server's socket is made in the server's cgroup, everything else in the client's.
    fn both(&self) -> Result<(Cost, Cost)> {
        enter(&self.server)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let listener = TcpListener::bind(address)?;
        enter(&self.client)?;
        let mut there = TcpStream::connect(address)?;
        let (mut here, _) = listener.accept()?;
        there.set_nodelay(true)?;
        here.set_nodelay(true)?;
        let mut byte = [7];
        let exchange = measure(EXCHANGES, || {
            there.write_all(&byte)?;
            here.read_exact(&mut byte)?;
            here.write_all(&byte)?;
            Ok(there.read_exact(&mut byte)?)
        })?;
        drop((there, here));
        let connection = measure(CONNECTIONS, || {
            let there = TcpStream::connect(address)?;
            let (here, _) = listener.accept()?;
            drop((there, here));
            Ok(())
        })?;
        Ok((exchange, connection))
    }

    /// How often the rule was what decided.
    fn judged(&self) -> Result<u64> {
        let counters = self.datapath.counters()?;
        let count = counters.by_rule.get(&self.rule).copied().unwrap_or_default();
        ensure!(count.denied == 0 && self.scratch.pins().exists(), "{count:?}");
        Ok(count.allowed)
    }
}

/// Both segments deny by default; one rule of twenty lets the client in. Its number.
fn publish(datapath: &Datapath, client: &std::path::Path, server: &std::path::Path) -> Result<u32> {
    let mut policy = HostPolicy {
        segments: vec![segment("client", "app=client"), segment("server", "app=server")],
        ..HostPolicy::default()
    };
    for segment in &mut policy.segments {
        segment.default_egress_allow = false;
    }
    for i in 0..19 {
        rule(&mut policy, &format!("allow 10.{i}.0.0/16 -> server tcp/{}", 8000 + i));
    }
    rule(&mut policy, &format!("allow client -> server tcp/{PORT}"));
    let sets = [labels("app=client"), labels("app=server")];
    let mut numbers = Numbers::default();
    let clock = Clock { wall: "2026-11-02T09:00:00Z".parse()?, boot_ns: 1 };
    let tables = compile(&policy, &sets, &[], &mut numbers, clock).map_err(|p| anyhow::anyhow!("{p:?}"))?;
    let _ = datapath.publish(&tables)?;
    for (i, (path, set)) in [client, server].into_iter().zip(&sets).enumerate() {
        let Identity(identity) = numbers.labels(set);
        let entry = CgroupEntry { identity, workload: i as u32 + 1, flags: 0, pad: 0 };
        datapath.set_cgroup(cgroup_id(path)?, &entry)?;
    }
    Ok(numbers.rule("p", "r19"))
}

fn measure(count: u32, mut operation: impl FnMut() -> Result<()>) -> Result<Cost> {
    let cpu = || -> Result<f64> {
        let usage = getrusage(UsageWho::RUSAGE_SELF)?;
        let ns = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 * 1e9 + t.tv_usec() as f64 * 1e3;
        Ok(ns(usage.user_time()) + ns(usage.system_time()))
    };
    let (start, start_cpu) = (Instant::now(), cpu()?);
    for _ in 0..count {
        operation()?;
    }
    let (wall, cpu) = (start.elapsed().as_nanos() as f64, cpu()? - start_cpu);
    Ok(Cost { cpu: cpu / f64::from(count), wall: wall / f64::from(count) })
}

/// `return 1`, as a program for `cgroup_skb`.
fn empty_hook() -> Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
    // r0 = 1; exit (struct bpf_insn, include/uapi/linux/bpf.h).
    let code: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let license = c"GPL";
    let mut attr = [0u64; 16];
    attr[0] = u64::from(BPF_PROG_TYPE_CGROUP_SKB) | 2 << 32;
    attr[1] = code.as_ptr() as u64;
    attr[2] = license.as_ptr() as u64;
    // SAFETY: the attribute is as long as we say; the pointers in it are to live buffers.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, attr.as_mut_ptr(), size_of_val(&attr)) };
    if fd < 0 {
        bail!("the empty program: {}", std::io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
