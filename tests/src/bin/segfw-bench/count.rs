//! `--count`: fixed work, for `cargo xtask guard`, which keeps how many instructions it takes. Each figure is a line
//! `count NAME NUMBER`.
//!
//! `programs` is for a guest whose clock counts instructions: a nanosecond there is one. `compile` and `events` are for
//! callgrind, which counts between the begin and the end of [`compile_rules`] and [`write_events`].

use crate::control::{self, Built};
use crate::rules::{self, OPEN, SHUT, sentence};
use crate::traffic::{come_from, frame};
use anyhow::{Context, Result, bail, ensure};
use segfw::datapath::security::CHECKS;
use segfw::datapath::{Datapath, sys};
use segfw::flow::decode::EVENT_LEN;
use segfw::flow::line::Lines;
use segfw::flow::{Item, Names, Sequences, decode, enrich};
use segfw::policy::HostPolicy;
use segfw::policy::host_policy::{PeerSpec, PortSpec};
use segfw_common::probe::{Answer, Question};
use segfw_common::rule::ipproto;
use segfw_common::{
    Addr, AddressEntry, CgroupEntry, Direction, EndpointEntry, EndpointKey, Flow, Identity, Proto, Verdict,
    control as flags,
};
use segfw_tests::policy::CGROUP;
use segfw_tests::scratch::{Scratch, cgroup_id, own_cgroup};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::Ipv4Addr;

/// Rules in the policies that are asked: a decision is to cost the same with both.
const SIZES: [u32; 2] = [10, 10_000];
/// Runs of a program in one measurement, of which the kernel gives the mean.
const REPEAT: u32 = 1_000;
/// Measurements, of which the smallest counts: the others were interrupted.
const ROUNDS: usize = 5;
/// Rules that are compiled, and events that are written down.
const RULES: u32 = 1_000;
const EVENTS: u64 = 10_000;

/// Without a context the kernel runs an XDP program as if the frame came in on the loopback device.
const LOOPBACK: u32 = 1;
/// A namespace, as far as the maps say.
const NETNS: u64 = 7;
const HERE: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
/// An address of the client's.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);
/// Nobody's, and in no rule.
const STRANGER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// May send datagrams to the server.
const SENDER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const UDP_PORT: u16 = 6_000;

/// Does what was asked for.
pub(crate) fn run(what: &str) -> Result<()> {
    match what {
        "programs" => programs(),
        "compile" => {
            let built = compile_rules(&policy(RULES))?;
            ensure!(built.tables.rules.len() >= RULES as usize, "{} entries", built.tables.rules.len());
            Ok(())
        }
        "events" => {
            let (events, names) = events()?;
            let written = write_events(&events, &names)?;
            ensure!(written.iter().filter(|b| **b == b'\n').count() as u64 == EVENTS, "not every event became a line");
            Ok(())
        }
        _ => bail!("there is nothing called {what} to count: programs, compile, events"),
    }
}

fn told(name: &str, count: u32) {
    println!("count {name} {count}");
}

fn policy(n: u32) -> Vec<(String, String)> {
    let mut files = rules::files(n);
    files.push(("access.yaml".to_owned(), rules::access(&[OPEN])));
    files.push((
        "datagrams.yaml".to_owned(),
        format!(
            "apiVersion: segfw.dev/v1\nkind: Policy\nmetadata: {{name: datagrams}}\nspec:\n  tier: application\n  rules:\n    \
             - {{name: datagrams, from: [{{addresses: [203.0.113.0/24]}}], to: [srv], ports: [udp/{UDP_PORT}], action: allow}}\n"
        ),
    ));
    for (_, text) in &mut files {
        *text = text.replace(CGROUP, "/bench");
    }
    files
}

/// Parse, resolve and compile. Of a name that callgrind finds.
#[inline(never)]
fn compile_rules(files: &[(String, String)]) -> Result<Built> {
    control::build(black_box(files), 2)
}

/// What the agent does with each entry of the ring buffer, and the line that the spool writes.
#[inline(never)]
fn write_events(events: &[[u8; EVENT_LEN]], names: &Names) -> Result<Vec<u8>> {
    let (mut sequences, mut lines, mut out) = (Sequences::default(), Lines::default(), Vec::new());
    for raw in black_box(events) {
        let event = decode(raw)?;
        ensure!(sequences.observe(&event).is_empty(), "a gap in the numbers that has not been made");
        lines.write(&Item::Flow(Box::new(enrich(&event, names))), &mut out);
    }
    Ok(black_box(out))
}

/// Connections that are opened, refused and closed, by turns, from many addresses, all with words for their numbers.
fn events() -> Result<(Vec<[u8; EVENT_LEN]>, Names)> {
    let Built { tables, numbers, local, .. } = control::build(&policy(RULES), 2)?;
    let mut numbers = numbers;
    let identities: Vec<u32> = local.iter().map(|set| numbers.labels(set).0).collect();
    let mut names = Names { host: "host".into(), ..Names::default() };
    names.learn(&tables.identities, &tables.rule_names, &[], None);
    let rules: Vec<u32> = tables.rule_names.keys().copied().collect();
    let events = (0..EVENTS)
        .map(|i| {
            let mut event = decode(&[0; EVENT_LEN])?;
            event.time = i * 50_000;
            event.sequence = i;
            event.local_addr = Addr::from(std::net::IpAddr::V4(HERE));
            event.remote_addr = Addr::from(std::net::IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + i as u32)));
            event.local = identities[1];
            event.remote = identities[0];
            event.rule = rules[i as usize % rules.len()];
            event.generation = 1;
            event.pid = 1_000 + (i % 100) as u32;
            event.local_port = OPEN;
            event.remote_port = 20_000 + (i % 20_000) as u16;
            event.protocol = ipproto::TCP;
            event.kind = (i % 3) as u8;
            event.verdict = if i % 3 == 1 { Verdict::Denied } else { Verdict::Allowed } as u8;
            event.bytes_sent = i * 100;
            event.bytes_received = i * 10;
            event.duration = i * 1_000;
            // SAFETY: plain data without padding, as the ring buffer holds it.
            Ok(unsafe { std::mem::transmute::<segfw_common::FlowEvent, [u8; EVENT_LEN]>(event) })
        })
        .collect::<Result<_>>()?;
    Ok((events, names))
}

/// Every program's size, and what the judge costs.
fn programs() -> Result<()> {
    for size in SIZES {
        let Built { tables, mut numbers, local, .. } = control::build_with(&policy(1), 2, |p| enlarge(p, size))?;
        ensure!(tables.rules.len() >= size as usize, "{size} rules became {} entries", tables.rules.len());
        let identities: Vec<Identity> = local.iter().map(|set| numbers.labels(set)).collect();
        let [client, server] = identities[..] else { bail!("{} workloads instead of two", identities.len()) };
        let scratch = Scratch::new()?;
        let datapath = Datapath::load(scratch.pins())?;
        if size == SIZES[0] {
            sizes(&datapath)?;
        }
        let _ = datapath.publish(&tables)?;
        decisions(&datapath, client, server, size)?;
        packets(&datapath, server, size)?;
    }
    Ok(())
}

/// As many rules as `rules::files` would have, without their text: reading 10,000 rules takes a counting guest a minute.
fn enlarge(policy: &mut HostPolicy, size: u32) {
    let Some(first) = policy.rules.iter().find(|r| *r.name == *"r0").cloned() else { return };
    for i in 1..size {
        let (addr, port) = sentence(i);
        let mut rule = first.clone();
        rule.name = format!("r{i}").into();
        rule.index = i;
        rule.from = vec![PeerSpec::Addresses(vec![std::net::IpAddr::V4(addr).into()])];
        rule.ports = vec![PortSpec { proto: Proto::Tcp, first: port, last: port }];
        policy.rules.push(rule);
    }
}

/// Instructions of each program after the kernel's own rewriting, and those that its verifier walked.
fn sizes(datapath: &Datapath) -> Result<()> {
    let mut all = BTreeMap::new();
    for name in datapath.programs() {
        // Those that other kernels use are not loaded.
        if let Ok(program) = datapath.program(name) {
            let _ = all.insert(name.to_owned(), sys::program_info(program)?);
        }
    }
    // Security checks are asked everywhere: what is not ours passes.
    datapath.set_host_flags(flags::HOST_PART)?;
    let _ = datapath.attach_checks(Ok(()));
    for check in CHECKS {
        let info = datapath.check_info(check).with_context(|| format!("{} is not attached", check.program))?;
        let _ = all.insert(check.program.to_owned(), info);
        datapath.drop_check(check)?;
    }
    datapath.set_host_flags(0)?;
    for (name, info) in all {
        told(&format!("program/{name}/translated"), info.instructions);
        told(&format!("program/{name}/walked"), info.verified);
    }
    Ok(())
}

/// The decision alone: who is the peer, and what does the policy say.
fn decisions(datapath: &Datapath, client: Identity, server: Identity, size: u32) -> Result<()> {
    let addr = |a: Ipv4Addr| Addr::from(std::net::IpAddr::V4(a));
    let entry = AddressEntry { netns: NETNS, as_destination: client.0, as_source: client.0 };
    datapath.set_address(&addr(CLIENT), &entry)?;
    let (prefix, port) = sentence(size / 2);
    for (name, remote, port, verdict) in [
        ("by-label", CLIENT, OPEN, Verdict::Allowed),
        ("by-prefix", prefix, port, Verdict::Allowed),
        ("denied-by-default", STRANGER, SHUT, Verdict::Denied),
    ] {
        let question = Question::from(Flow {
            direction: Direction::Ingress,
            protocol: ipproto::TCP,
            local: server,
            workload: 1,
            netns: NETNS,
            local_addr: addr(HERE),
            remote_addr: addr(remote),
            local_port: port,
            remote_port: 40_000,
        });
        // An Ethernet header, which the kernel takes off, and the question.
        let mut packet = [0u8; 14 + size_of::<Question>()];
        // SAFETY: `Question` is plain data without padding.
        let bytes: [u8; size_of::<Question>()] = unsafe { std::mem::transmute(question) };
        packet[14..].copy_from_slice(&bytes);
        sys::map_update(datapath.map("PROBE")?, &0u32, &Answer::default())?;
        let least = least(datapath, "probe_decide", &packet, 1)?;
        let answer: Answer = sys::map_lookup(datapath.map("PROBE")?, &0u32)?.context("PROBE is empty")?;
        ensure!(answer.verdict == verdict as u8, "{name}, {size} rules: {answer:?} instead of {verdict:?}");
        told(&format!("decide/{name}/{size}"), least);
    }
    Ok(())
}

/// Whole programs on packets: the outer wall on a SYN, and the receiving hook on a datagram of a flow that is open.
fn packets(datapath: &Datapath, server: Identity, size: u32) -> Result<()> {
    const DROP: u32 = 1;
    const PASS: u32 = 2;
    let addr = |a: Ipv4Addr| Addr::from(std::net::IpAddr::V4(a));
    let here = AddressEntry { netns: NETNS, as_destination: Identity::HOST.0, as_source: Identity::UNRESOLVED.0 };
    datapath.set_address(&addr(HERE), &here)?;
    datapath.set_xdp_netns(LOOPBACK, NETNS)?;
    let (prefix, port) = sentence(size / 2);
    let key = EndpointKey { netns: NETNS, addr: addr(HERE), port, protocol: ipproto::TCP, pad: 0 };
    datapath.set_endpoint(&key, &EndpointEntry { identity: server.0, workload: 1, sockets: 1 })?;
    for (name, from, answer) in [("passed", prefix, PASS), ("dropped", STRANGER, DROP)] {
        let mut syn = frame(&[2, 0, 0, 0, 0, 2], HERE, port, libc::IPPROTO_TCP as u8);
        come_from(&mut syn, from, 40_000);
        told(&format!("outer-wall/{name}/{size}"), least(datapath, "outer_wall", &syn, answer)?);
    }
    // The kernel's test socket belongs to the cgroup of this process.
    let cgroup = cgroup_id(&own_cgroup()?)?;
    datapath.set_cgroup(cgroup, &CgroupEntry { identity: server.0, workload: 1, flags: 0, pad: 0 })?;
    let mut datagram = frame(&[2, 0, 0, 0, 0, 2], HERE, UDP_PORT, libc::IPPROTO_UDP as u8);
    come_from(&mut datagram, SENDER, 40_000);
    told(&format!("skb-ingress/open-flow/{size}"), least(datapath, "skb_ingress", &datagram, 1)?);
    Ok(())
}

/// The least mean of nanoseconds that a run of the program took; each time its answer must be this.
fn least(datapath: &Datapath, program: &str, input: &[u8], answer: u32) -> Result<u32> {
    let mut all = Vec::new();
    for _ in 0..ROUNDS {
        let (returned, mean) = sys::test_runs(datapath.program(program)?, input, REPEAT)?;
        ensure!(returned == answer, "{program} returned {returned} instead of {answer}");
        all.push(mean);
    }
    eprintln!("{program}: {all:?}");
    all.into_iter().min().context("no rounds")
}
