//! Random policies and random flows: the kernel and user space must give the same answer, to the last field.

use crate::memory::{Known, Memory, boot_ns, probe};
use crate::{Options, Tally};
use anyhow::{Result, bail};
use segfw::datapath::Datapath;
use segfw::policy::Tables;
use segfw::policy::compile::random::{ADDRESSES, PROBES, Rng, World};
use segfw::policy::compile::testing::BOOT;
use segfw_common::decide::origin_key;
use segfw_common::probe::Answer;
use segfw_common::rule::ipproto;
use segfw_common::{Addr, AddressEntry, Direction, EndpointKey, Flow, Identity, Party, Proto, Verdict, control};
use segfw_tests::scratch::Scratch;
use std::fmt::Write as _;

/// Flows per policy.
const FLOWS: usize = 600;

/// Seconds after the moment at which the policies are compiled: deadlines lie before and behind these.
const LATER: [u64; 8] = [30, 25 * 60, 2 * 3600, 7 * 3600, 30 * 3600, 40 * 3600, 6 * 86_400, 8 * 86_400];

#[derive(Debug, Default)]
struct Seen {
    pairs: u64,
    verdicts: [u64; 3],
    reasons: [u64; segfw_common::Reason::ALL.len()],
    evidence: [u64; 5],
    timed: u64,
    pending: u64,
    policies_with_time: u64,
}

pub(crate) fn run(options: &Options, tally: &mut Tally) -> Result<()> {
    let scratch = Scratch::new()?;
    let datapath = Datapath::load(scratch.pins())?;
    let mut seen = Seen::default();
    for run in 0..options.policies {
        let mut rng = Rng(options.seed.wrapping_add((run as u64) << 20));
        let world = World::new(&mut rng);
        let mut trial = Trial::new(&mut rng, &world);
        datapath.publish(&trial.tables)?;
        datapath.set_host_flags(trial.host_flags)?;
        trial.known.enter(&datapath)?;
        seen.policies_with_time += u64::from(!trial.tables.timeline.is_empty());
        let flows = std::mem::take(&mut trial.flows);
        for flow in &flows {
            let memory = Memory::new(&trial.tables, &trial.known, trial.host_flags);
            let want = memory.answer(flow);
            let got = probe(&datapath, flow)?;
            seen.note(&want);
            if want != got {
                bail!("{}", reproduction(&datapath, &world, &trial, flow, run, options.seed)?);
            }
        }
        trial.known.leave(&datapath)?;
    }
    println!(
        "differential: {} pairs of tables and flow judged alike, {} policies ({} with a timeline)",
        seen.pairs, options.policies, seen.policies_with_time
    );
    println!(
        "  verdicts {:?}, reasons {:?}, evidence {:?}, {} with a deadline, {} pending",
        seen.verdicts, seen.reasons, seen.evidence, seen.timed, seen.pending
    );
    tally.count("differential: kernel and user space judge alike", Ok(()));
    let enough = seen.pairs >= 100_000
        && seen.verdicts.iter().all(|n| *n > 1000)
        && seen.evidence.iter().all(|n| *n > 1000)
        && seen.timed > 1000
        && seen.pending > 500;
    if options.policies >= 200 {
        let result = if enough { Ok(()) } else { Err(anyhow::anyhow!("{seen:?}")) };
        tally.count("differential: every kind of answer was seen", result);
    }
    Ok(())
}

impl Seen {
    fn note(&mut self, answer: &Answer) {
        self.pairs += 1;
        self.verdicts[usize::from(answer.verdict) - 1] += 1;
        self.reasons[usize::from(answer.reason)] += 1;
        self.evidence[usize::from(answer.evidence)] += 1;
        self.timed += u64::from(answer.until != 0);
        self.pending += u64::from(answer.pending != 0);
    }
}

/// Tables, peers and flows that fit together.
#[derive(Debug)]
struct Trial {
    tables: Tables,
    /// Added to every deadline: the policies are compiled for another moment.
    shift: i128,
    host_flags: u64,
    known: Known,
    flows: Vec<Flow>,
}

impl Trial {
    fn new(rng: &mut Rng, world: &World) -> Self {
        let (mut tables, numbers) = world.compile();
        let shift = shift(rng, &tables);
        move_deadlines(&mut tables, shift);
        let mut identities: Vec<u32> = numbers.identities.values().copied().collect();
        identities.extend([0, 1, 2, 3, Identity::ANY.0, 4_000_000, u32::MAX]);
        let locals: Vec<u32> = tables.locals.keys().map(|id| id.0).collect();
        let flows: Vec<Flow> = (0..FLOWS).map(|_| flow(rng, &locals, &identities)).collect();
        let mut known = Known::default();
        let party =
            |rng: &mut Rng| Party { identity: *rng.pick(&identities), workload: *rng.pick(&[0, 0, 1, 2, u32::MAX]) };
        for flow in &flows {
            if rng.one_in(4) {
                let _ = known.origins.insert(origin_key(flow), party(rng));
            }
            if rng.one_in(4) {
                let addr = match rng.below(4) {
                    0 | 1 => flow.remote_addr,
                    2 => flow.remote_addr.any_of_family(),
                    _ => Addr::UNSPECIFIED,
                };
                let netns = *rng.pick(&NAMESPACES);
                let key = EndpointKey { netns, addr, port: flow.remote_port, protocol: flow.protocol, pad: 0 };
                let _ = known.endpoints.insert(key, party(rng));
            }
            if rng.one_in(60) {
                let entry = AddressEntry {
                    netns: *rng.pick(&NAMESPACES),
                    as_destination: *rng.pick(&identities),
                    as_source: *rng.pick(&identities),
                };
                let _ = known.addresses.insert(flow.remote_addr, entry);
            }
        }
        let mut host_flags = if rng.one_in(10) { control::HOST_MONITOR } else { 0 };
        if rng.one_in(2) {
            host_flags |= control::HOST_GONE_OPEN;
        }
        // The agent has been gone since boot, or is not yet.
        if rng.one_in(10) {
            host_flags |= control::gone_after(0);
        } else if rng.one_in(4) {
            host_flags |= control::gone_after(u64::MAX >> 8);
        }
        Self { tables, shift, host_flags, known, flows }
    }
}

const NAMESPACES: [u64; 3] = [0, 7, u64::MAX - 1];

/// From the time of the compiler to one around now, with no deadline near enough to pass meanwhile.
fn shift(rng: &mut Rng, tables: &Tables) -> i128 {
    let now = i128::from(boot_ns());
    let near = |shift: i128| {
        let entries = tables.rules.values().chain(&tables.timeline);
        entries.filter(|e| e.until != 0).any(|e| (i128::from(e.until) + shift - now).abs() < 15_000_000_000)
    };
    let first = rng.below(LATER.len());
    let offsets = (0..LATER.len()).map(|i| LATER[(first + i) % LATER.len()]);
    let shifts = offsets.map(|later| now - i128::from(BOOT) - i128::from(later) * 1_000_000_000);
    let fit: Vec<i128> = shifts.filter(|s| !near(*s)).collect();
    *fit.first().expect("no policy has deadlines everywhere")
}

fn move_deadlines(tables: &mut Tables, shift: i128) {
    for entry in tables.rules.values_mut().chain(&mut tables.timeline) {
        if entry.until != 0 {
            entry.until = u64::try_from((i128::from(entry.until) + shift).max(1)).unwrap_or(u64::MAX);
        }
    }
}

fn flow(rng: &mut Rng, locals: &[u32], identities: &[u32]) -> Flow {
    const MORE: [&str; 10] = [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.1.2.3",
        "0.0.0.0",
        "::",
        "ff02::1",
        "224.0.0.251",
        "255.255.255.255",
    ];
    let addr = |rng: &mut Rng| -> Addr {
        match rng.below(8) {
            0..=4 => rng.pick(&ADDRESSES).parse().expect("an address"),
            5 | 6 => rng.pick(&MORE).parse().expect("an address"),
            _ if rng.one_in(2) => Addr::from_v4_be(rng.word() as u32),
            _ => Addr([rng.word() as u32, rng.word() as u32, rng.word() as u32, rng.word() as u32]),
        }
    };
    let protocol = match rng.below(8) {
        0..=3 => ipproto::TCP,
        4 => ipproto::UDP,
        5 => {
            *rng.pick(&[ipproto::ICMP, ipproto::ICMPV6, ipproto::SCTP, ipproto::UDPLITE, ipproto::DCCP, ipproto::MPTCP])
        }
        6 => *rng.pick(&[0, 2, 47, 50, 89, 103, 255]),
        _ => rng.word() as u16,
    };
    let port = |rng: &mut Rng| match rng.below(8) {
        0..=5 => *rng.pick(&PROBES),
        6 => *rng.pick(&[67, 68, 546, 547, 133 << 8, 135 << 8, 137 << 8 | 255, 138 << 8, 8 << 8]),
        _ => rng.word() as u16,
    };
    let direction = *rng.pick(&[Direction::Ingress, Direction::Egress]);
    let local = match rng.below(10) {
        0 => 0,
        1 => *rng.pick(identities),
        _ if locals.is_empty() => 0,
        _ => *rng.pick(locals),
    };
    Flow {
        direction,
        protocol,
        local: Identity(local),
        workload: *rng.pick(&[0, 0, 1, 2]),
        netns: *rng.pick(&NAMESPACES),
        local_addr: addr(rng),
        remote_addr: addr(rng),
        local_port: port(rng),
        remote_port: port(rng),
    }
}

/// The smallest policy (by dropping rules) for which the two still differ.
fn reproduction(
    datapath: &Datapath,
    world: &World,
    trial: &Trial,
    flow: &Flow,
    run: usize,
    seed: u64,
) -> Result<String> {
    let differ = |world: &World| -> Result<Option<(Answer, Answer)>> {
        let (mut tables, _) = world.compile();
        move_deadlines(&mut tables, trial.shift);
        datapath.publish(&tables)?;
        let want = Memory::new(&tables, &trial.known, trial.host_flags).answer(flow);
        let got = probe(datapath, flow)?;
        Ok((want != got).then_some((want, got)))
    };
    let mut least = world.clone();
    let mut i = 0;
    while i < least.policy.rules.len() {
        let mut less = least.clone();
        let _ = less.policy.rules.remove(i);
        if differ(&less)?.is_some() {
            least = less;
        } else {
            i += 1;
        }
    }
    let mut text = format!("kernel and user space differ (--seed {seed}, policy {run})\n{flow:#?}\n");
    let memory = Memory::new(&trial.tables, &trial.known, trial.host_flags);
    let _ = writeln!(text, "peer in user space {:?}", segfw_common::identify(&memory, flow));
    let _ = writeln!(text, "proto {:?}, host flags {}", Proto::from_ip(flow.protocol), trial.host_flags);
    let _ = writeln!(text, "{:#?}\n{:#?}\nlocal {:?}", least.policy.segments, least.policy.rules, least.local);
    match differ(&least)? {
        Some((want, got)) => {
            let _ = writeln!(text, "user space {want:?}\nkernel     {got:?}");
        }
        None => text.push_str("not seen again with freshly compiled tables\n"),
    }
    let _ = writeln!(text, "{:?} = allowed, {:?} = denied", Verdict::Allowed as u8, Verdict::Denied as u8);
    Ok(text)
}
