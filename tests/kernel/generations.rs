//! From one generation to the next: whole answers, rising numbers, frozen tables, and failures that change nothing.

use crate::memory::{Known, Memory, ask};
use crate::{Options, Tally};
use anyhow::{Context, Result, bail, ensure};
use segfw::datapath::generation::Active;
use segfw::datapath::{Datapath, Error, sys};
use segfw::policy::Tables;
use segfw::policy::compile::random::{ADDRESSES, PROBES, Rng, World};
use segfw_common::probe::Answer;
use segfw_common::rule::PrefixKey;
use segfw_common::{Addr, Direction, Flow, Identity, RuleEntry, RuleKey, bounds};
use segfw_tests::scratch::Scratch;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

const SWITCHES: usize = 200;
/// The outer maps and their inner maps per slot, in the order of `Datapath::inner_maps`.
const OUTER: [(&str, u32); 6] =
    [("PREFIXES", 1), ("HOSTS", 1), ("CLASSES", 1), ("TIMELINE", 1), ("LOCALS", 1), ("RULES", bounds::RULE_SHARDS)];
/// Index of the first map of rules in it.
const RULES: usize = 5;

/// What it does to tables, and how.
type Change = (&'static str, fn(&mut Tables));

pub(crate) fn run(options: &Options, tally: &mut Tally) -> Result<()> {
    let scratch = Scratch::new()?;
    let datapath = Datapath::load(scratch.pins())?;
    let pair = Pair::new(options.seed)?;
    tally.count("generations: an answer is of one generation, whole", switching(&datapath, &pair));
    tally.count("generations: what is read back is what was computed", reads_back(&datapath, &pair));
    tally.count("generations: tables in force cannot be written", frozen(&datapath));
    tally.count("generations: touch raises the number and nothing else", touched(&datapath, &pair));
    for (what, break_it) in failures() {
        tally.count(format!("generations: {what} changes nothing"), failing(&datapath, &pair, break_it));
    }
    tally.count("generations: no free descriptor changes nothing", starved(&datapath, &pair));
    tally.count("generations: what says the same is used again, and nothing else", again(&datapath, &scratch, &pair));
    tally.count("generations: what somebody else put into a slot is not used", foreign(&datapath, &pair));
    tally.count("generations: the next agent finds it in force", found_again(&datapath, &scratch, &pair));
    Ok(())
}

/// Two sets of tables, and flows to which each gives another answer.
struct Pair {
    tables: [Tables; 2],
    flows: Vec<(Flow, [Answer; 2])>,
}

impl Pair {
    fn new(seed: u64) -> Result<Self> {
        let known = Known::default();
        for attempt in 0..200 {
            let mut rng = Rng(seed ^ (attempt << 40));
            let tables = [(); 2].map(|()| World::new(&mut rng).compile().0);
            let timed = |t: &Tables| t.rules.values().any(|e| e.until != 0);
            if tables.iter().any(|t| timed(t) || t.rules.len() < 50 || t.prefixes.is_empty()) {
                continue;
            }
            let mut flows = Vec::new();
            for _ in 0..2000 {
                let locals: Vec<Identity> = tables.iter().flat_map(|t| t.locals.keys().copied()).collect();
                let flow = Flow {
                    direction: *rng.pick(&[Direction::Ingress, Direction::Egress]),
                    protocol: *rng.pick(&[6, 6, 6, 17]),
                    local: *rng.pick(&locals),
                    workload: 0,
                    netns: 7,
                    local_addr: Addr::v4([10, 80, 0, 1]),
                    remote_addr: rng.pick(&ADDRESSES).parse()?,
                    local_port: *rng.pick(&PROBES),
                    remote_port: *rng.pick(&PROBES),
                };
                let answers = [0, 1].map(|i| Memory::new(&tables[i], &known, 0).answer(&flow));
                if answers[0].rule != answers[1].rule && answers[0].verdict != answers[1].verdict {
                    flows.push((flow, answers));
                }
            }
            if flows.len() >= 100 {
                flows.truncate(100);
                return Ok(Self { tables, flows });
            }
        }
        bail!("no two policies differ enough")
    }
}

fn switching(datapath: &Datapath, pair: &Pair) -> Result<()> {
    let first = datapath.publish(&pair.tables[0])?;
    let done = AtomicBool::new(false);
    let generation = || datapath.active().map(|a| a.generation);
    let which = |generation: u32| (generation - first.generation) as usize % 2;
    let (asked, exact, of_each) = std::thread::scope(|scope| -> Result<_> {
        let reader = scope.spawn(|| -> Result<(u64, u64, [u64; 2])> {
            let (mut asked, mut exact, mut of_each, mut highest) = (0, 0, [0; 2], 0);
            while !done.load(Ordering::Relaxed) {
                for (flow, answers) in &pair.flows {
                    let before = generation()?;
                    let got = ask(datapath, flow)?;
                    let after = generation()?;
                    ensure!(highest <= before && before <= after, "{highest}, then {before}, then {after}");
                    highest = after;
                    asked += 1;
                    let Some(i) = answers.iter().position(|a| *a == got) else {
                        bail!("{got:?} is of neither generation: {answers:?} for {flow:?}");
                    };
                    of_each[i] += 1;
                    if before == after {
                        exact += 1;
                        ensure!(i == which(before), "generation {before} was in force all the time, {flow:?}: {got:?}");
                    }
                }
            }
            Ok((asked, exact, of_each))
        });
        let mut last = first;
        let published = (1..=SWITCHES).try_for_each(|i| {
            let next = datapath.publish(&pair.tables[i % 2])?;
            ensure!(next.generation == last.generation + 1 && next.slot != last.slot, "{last:?}, then {next:?}");
            // Every other one has to wait for the programs of the one before.
            if i % 2 == 0 {
                datapath.settle()?;
                empty_but(datapath, next.slot)?;
            }
            last = next;
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        let read = reader.join().unwrap_or_else(|_| bail!("the reader panicked"));
        published?;
        read
    })?;
    ensure!(of_each.iter().all(|n| *n > 1000), "{of_each:?} answers of each");
    println!("generations: {SWITCHES} switches under {asked} questions, {exact} with one generation before and after");
    Ok(())
}

fn reads_back(datapath: &Datapath, pair: &Pair) -> Result<()> {
    for tables in &pair.tables {
        let active = datapath.publish(tables)?;
        ensure!(active == datapath.active()?);
        let back = datapath.read_back(active)?;
        ensure!(back.digest() == tables.digest(), "the digest differs");
        ensure!(back.rules == tables.rules && back.locals == tables.locals && back.prefixes == tables.prefixes);
        ensure!(back.timeline == tables.timeline && back.classes == tables.classes);
    }
    // And a difference anywhere is one in the digest.
    let tables = &pair.tables[0];
    let want = tables.digest();
    let changes: [Change; 6] = [
        ("a class", |t| t.classes[0][80] ^= 1),
        ("a rule's number", |t| t.rules.values_mut().for_each(|e| e.rule ^= 1)),
        ("an action", |t| t.rules.values_mut().for_each(|e| e.action ^= 3)),
        ("a default", |t| t.locals.values_mut().for_each(|l| l.default[1] ^= 3)),
        ("a prefix", |t| t.prefixes.values_mut().for_each(|i| i.0 ^= 1)),
        ("the timeline", |t| t.timeline.push(RuleEntry { until: 1, ..*t.rules.values().next().expect("rules") })),
    ];
    for (what, change) in changes {
        let mut other = tables.clone();
        change(&mut other);
        ensure!(other.digest() != want, "{what} is not in the digest");
    }
    Ok(())
}

fn frozen(datapath: &Datapath) -> Result<()> {
    let active = datapath.active()?;
    let refused = |what: &str, result: std::io::Result<()>| match result {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(()),
        other => bail!("{what}: {other:?}"),
    };
    let mut maps = 0;
    for (name, index) in OUTER.iter().flat_map(|(name, n)| (0..*n).map(move |shard| (name, active.slot * n + shard))) {
        // No entries, no map.
        let Some(map) = sys::outer_get(datapath.map(name)?, index)? else { continue };
        maps += 1;
        // As large as the largest key and value; the kernel looks at the map's mode before it reads either.
        let (key, value) = ([0u64; 3], vec![0u8; 65536 * 2]);
        refused(&format!("write {name}"), sys::map_update_slice(map.as_fd(), &key, &value))?;
        refused(&format!("delete from {name}"), sys::map_delete(map.as_fd(), &key).map(drop))?;
    }
    ensure!(maps >= 4, "{maps} maps are in force");
    Ok(())
}

fn empty_but(datapath: &Datapath, used: u32) -> Result<()> {
    for slot in (0..bounds::SLOTS).filter(|slot| *slot != used) {
        let bits = bounds::RULE_SHARDS.trailing_zeros();
        let maps = datapath.inner_maps(Active { generation: 0, slot, bits })?;
        ensure!(maps.iter().all(|id| *id == 0), "slot {slot} is not empty: {maps:?}");
    }
    Ok(())
}

fn touched(datapath: &Datapath, pair: &Pair) -> Result<()> {
    let before = datapath.publish(&pair.tables[0])?;
    let after = datapath.touch()?;
    ensure!(after == Active { generation: before.generation + 1, ..before }, "{before:?}, then {after:?}");
    same(datapath, pair, after)
}

/// The first tables of the pair are in force, as this generation.
fn same(datapath: &Datapath, pair: &Pair, active: Active) -> Result<()> {
    ensure!(datapath.active()? == active, "{:?} is in force, not {active:?}", datapath.active()?);
    ensure!(datapath.read_back(active)?.digest() == pair.tables[0].digest(), "other tables are in force");
    for (flow, answers) in &pair.flows {
        let got = ask(datapath, flow)?;
        ensure!(got == answers[0], "{flow:?}: {got:?} instead of {:?}", answers[0]);
    }
    Ok(())
}

fn failures() -> [Change; 6] {
    fn key(bits: u32, last: u8) -> PrefixKey {
        PrefixKey { bits, addr: Addr::v4([203, 0, 113, last]) }
    }
    [
        ("a row of classes that is too short", |t| t.classes[3].truncate(65_535)),
        ("a row of classes that is too long", |t| t.classes[3].push(0)),
        ("a missing row of classes", |t| drop(t.classes.pop())),
        ("one row of classes too many", |t| t.classes.push(vec![0; 65_536])),
        ("a prefix longer than an address", |t| {
            let _ = t.prefixes.insert(key(129, 0), Identity(300));
        }),
        // One entry of the kernel's trie: what is read back is not what was computed.
        ("two prefixes that are the same", |t| {
            let _ = t.prefixes.insert(key(120, 1), Identity(300));
            let _ = t.prefixes.insert(key(120, 2), Identity(301));
        }),
    ]
}

fn failing(datapath: &Datapath, pair: &Pair, break_it: fn(&mut Tables)) -> Result<()> {
    let active = datapath.publish(&pair.tables[0])?;
    let mut tables = pair.tables[1].clone();
    break_it(&mut tables);
    let result = datapath.publish(&tables);
    let Err(error) = result else { bail!("it was published") };
    ensure!(matches!(error, Error::Sys { .. } | Error::ReadBack { .. }), "{error}");
    same(datapath, pair, active).with_context(|| format!("after: {error}"))?;
    // And the road is free again.
    let next = datapath.publish(&pair.tables[0])?;
    ensure!(next.generation == active.generation + 1, "{active:?}, then {next:?}");
    same(datapath, pair, next)
}

/// The kernel refuses in the middle: no descriptor for the next map.
fn starved(datapath: &Datapath, pair: &Pair) -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let active = datapath.publish(&pair.tables[0])?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let free = std::fs::File::open("/dev/null")?;
    let next = std::os::fd::AsRawFd::as_raw_fd(&free) as u64;
    drop(free);
    let before = datapath.inner_maps(active)?;
    for room in 0..64 {
        setrlimit(Resource::RLIMIT_NOFILE, next + room, hard)?;
        let result = datapath.publish(&pair.tables[1]);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
        let active = match result {
            Ok(active) => active,
            Err(error) => {
                ensure!(error.to_string().contains("os error 24"), "with {room} descriptors: {error}");
                same(datapath, pair, active).with_context(|| format!("with {room} descriptors, after: {error}"))?;
                continue;
            }
        };
        let made = datapath.inner_maps(active)?.into_iter().filter(|id| *id != 0 && !before.contains(id)).count();
        ensure!(room >= made as u64 && made > 3, "{room} descriptors were enough for {made} maps");
        return Ok(());
    }
    bail!("64 descriptors are not enough")
}

/// A map is made where its entries are others, and only there.
fn again(datapath: &Datapath, scratch: &Scratch, pair: &Pair) -> Result<()> {
    let mut tables = pair.tables[1].clone();
    let (key, entry) = tables.rules.iter().next().map(|(k, e)| (*k, *e)).context("no rules")?;
    for i in 0..6_000u32 {
        let _ = tables.rules.insert(RuleKey { local: Identity(100_000 + i), ..key }, entry);
        let addr = Addr::v4((0x0b00_0000 + i).to_be_bytes());
        let _ = tables.prefixes.insert(PrefixKey { bits: 128, addr }, Identity(300));
    }
    let later = Datapath::load(scratch.pins())?;
    let mut active = datapath.publish(&tables)?;
    ensure!(active.bits == 1, "6,000 rules are in 2^{} maps", active.bits);
    for round in 0..11u32 {
        // Also where programs of the generation before may still run.
        if round % 2 == 0 {
            if round <= 8 { datapath } else { &later }.settle()?;
            empty_but(datapath, active.slot)?;
        }
        let before = datapath.inner_maps(active)?;
        // One more, one less, one with another answer.
        let keys = [
            RuleKey { local: Identity(200_000 + round), ..key },
            RuleKey { local: Identity(100_000 + round), ..key },
            RuleKey { local: Identity(105_000 + round), ..key },
        ];
        let mut changed: Vec<usize> = keys.iter().map(|key| RULES + key.shard(active.bits) as usize).collect();
        match round {
            0 => changed.clear(),
            1 => {
                let _ = tables.prefixes.insert(PrefixKey { bits: 128, addr: Addr::v4([12, 0, 0, 1]) }, Identity(301));
                changed = vec![1];
            }
            2 => {
                tables.classes[1][8080] ^= 1;
                changed = vec![2];
            }
            3 => {
                tables.timeline.push(RuleEntry { until: 1, ..entry });
                changed = vec![3];
            }
            // A prefix of more than one address.
            4 => {
                let _ = tables.prefixes.insert(PrefixKey { bits: 120, addr: Addr::v4([12, 0, 1, 0]) }, Identity(301));
                changed = vec![0];
            }
            5 => {
                let _ = tables.locals.insert(Identity(100_000), segfw_common::LocalEntry::default());
                changed = vec![4];
            }
            // So many that they are divided among more maps.
            10 => {
                let more = (0..20_000u32).map(|i| (RuleKey { local: Identity(300_000 + i), ..key }, entry));
                tables.rules.extend(more);
                changed = (RULES..RULES + 8).collect();
            }
            _ => {
                let _ = tables.rules.insert(keys[0], entry);
                ensure!(tables.rules.remove(&keys[1]).is_some());
                let _ = tables.rules.insert(keys[2], RuleEntry { rule: 77, ..entry });
            }
        }
        // The last ones by an agent that found these maps: it takes them for its own once it has read them.
        let by = if round < 8 { datapath } else { &later };
        if round == 8 {
            ensure!(!later.holds(&tables)?, "a difference is not seen");
            let mut old = tables.clone();
            let _ = old.rules.remove(&keys[0]);
            let _ = old.rules.insert(keys[1], entry);
            let _ = old.rules.insert(keys[2], entry);
            ensure!(later.holds(&old)?, "what is in force is not found");
        }
        let old = match round {
            6 | 7 | 9 => vec![(keys[0], None), (keys[1], Some(entry)), (keys[2], Some(entry))],
            _ => Vec::new(),
        };
        let next = if old.is_empty() { by.publish(&tables)? } else { by.publish_change(&tables, &old)? };
        ensure!(next.generation == active.generation + 1 && next.slot != active.slot, "{active:?}, then {next:?}");
        ensure!(datapath.active()? == next, "{next:?} is not in force");
        ensure!(datapath.read_back(next)?.digest() == tables.digest(), "not what was computed");
        let after = datapath.inner_maps(next)?;
        let differ: Vec<usize> = (0..after.len()).filter(|i| before.get(*i) != Some(&after[*i])).collect();
        changed.sort_unstable();
        changed.dedup();
        ensure!(differ == changed, "round {round}: the maps {differ:?} were made, {changed:?} say something else");
        frozen(datapath)?;
        active = next;
    }
    // Where nobody read what is in force, all is made.
    let before = datapath.inner_maps(active)?;
    let next = Datapath::load(scratch.pins())?.publish(&tables)?;
    let after = datapath.inner_maps(next)?;
    ensure!(before.iter().zip(&after).all(|(before, after)| before != after), "{before:?}, then {after:?}");
    let _ = datapath.publish(&pair.tables[0])?;
    Ok(())
}

/// Maps that others put into the slots: not used again, and not in force with the next revision.
fn foreign(datapath: &Datapath, pair: &Pair) -> Result<()> {
    let active = datapath.publish(&pair.tables[0])?;
    datapath.settle()?;
    let kernel =
        |key: usize, value: usize| sys::map_create(sys::MAP_TYPE_HASH, key, value, 1, sys::F_RDONLY_PROG, "foreign");
    let rules = kernel(size_of::<RuleKey>(), size_of::<RuleEntry>())?;
    let locals = kernel(4, size_of::<segfw_common::LocalEntry>())?;
    // In the slot in force: LOCALS, which becomes empty, so every workload would be open.
    sys::outer_set(datapath.map("LOCALS")?, active.slot, locals.as_fd())?;
    ensure!(datapath.read_back(active)?.digest() != pair.tables[0].digest(), "the foreign map is not there");
    // In the next slot: one for a place that will have entries, and one for a place that will have none.
    let slot = (active.slot + 1) % bounds::SLOTS;
    let mut few = pair.tables[0].clone();
    few.prefixes.clear();
    let flags = sys::F_RDONLY_PROG | sys::F_NO_PREALLOC;
    let prefixes = sys::map_create(sys::MAP_TYPE_LPM_TRIE, size_of::<PrefixKey>(), 4, 1, flags, "foreign")?;
    sys::outer_set(datapath.map("RULES")?, slot * bounds::RULE_SHARDS, rules.as_fd())?;
    sys::outer_set(datapath.map("PREFIXES")?, slot, prefixes.as_fd())?;
    let after = datapath.publish(&few)?;
    ensure!(after.slot == slot && datapath.read_back(after)?.digest() == few.digest(), "not what was computed");
    let maps = datapath.inner_maps(after)?;
    ensure!(maps[0] == 0 && maps[RULES] != 0, "{maps:?} are in use");
    for foreign in [&rules, &locals, &prefixes] {
        let id = sys::map_info(foreign.as_fd())?.id;
        ensure!(!maps.contains(&id), "the foreign map {id} is in use: {maps:?}");
    }
    // All others stay as they were.
    let next = datapath.publish(&pair.tables[0])?;
    same(datapath, pair, next)?;
    // Nor by a change that says of the rules in force that they stay.
    sys::outer_set(datapath.map("RULES")?, next.slot * bounds::RULE_SHARDS, rules.as_fd())?;
    ensure!(datapath.read_back(next)?.rules.is_empty(), "the foreign map is not there");
    let last = datapath.publish_change(&pair.tables[0], &[])?;
    same(datapath, pair, last)
}

fn found_again(datapath: &Datapath, scratch: &Scratch, pair: &Pair) -> Result<()> {
    let active = datapath.publish(&pair.tables[0])?;
    let second = Datapath::load(scratch.pins())?;
    same(&second, pair, active)
}
