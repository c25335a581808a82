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
const OUTER: [&str; 5] = ["CLASSES", "RULES", "TIMELINE", "LOCALS", "PREFIXES"];

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
    tally.count("generations: maps that wait are used as they were left", waiting(&datapath, &pair));
    tally.count("generations: after a large revision a change is written as what differs", ahead(&datapath, &pair));
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
            // Every other one finds no maps that wait for it.
            if i % 2 == 0 {
                datapath.settle()?;
                let waiting = (next.slot + 1) % bounds::SLOTS;
                for slot in (0..bounds::SLOTS).filter(|s| *s != next.slot && *s != waiting) {
                    ensure!(sys::outer_get(datapath.map("RULES")?, slot)?.is_none(), "slot {slot} is not empty");
                }
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
        let back = datapath.read_back(active.slot)?;
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
    let slot = datapath.active()?.slot;
    let refused = |what: &str, result: std::io::Result<()>| match result {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(()),
        other => bail!("{what}: {other:?}"),
    };
    for name in OUTER {
        let map = sys::outer_get(datapath.map(name)?, slot)?.with_context(|| format!("{name} is empty"))?;
        // As large as the largest key and value; the kernel looks at the map's mode before it reads either.
        let (key, value) = ([0u64; 3], vec![0u8; 65536 * 2]);
        refused(&format!("write {name}"), sys::map_update_slice(map.as_fd(), &key, &value))?;
        refused(&format!("delete from {name}"), sys::map_delete(map.as_fd(), &key).map(drop))?;
    }
    Ok(())
}

fn touched(datapath: &Datapath, pair: &Pair) -> Result<()> {
    let before = datapath.publish(&pair.tables[0])?;
    let after = datapath.touch()?;
    ensure!(after == Active { generation: before.generation + 1, slot: before.slot }, "{before:?}, then {after:?}");
    same(datapath, pair, after)
}

/// The first tables of the pair are in force, as this generation.
fn same(datapath: &Datapath, pair: &Pair, active: Active) -> Result<()> {
    ensure!(datapath.active()? == active, "{:?} is in force, not {active:?}", datapath.active()?);
    ensure!(datapath.read_back(active.slot)?.digest() == pair.tables[0].digest(), "other tables are in force");
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
    for room in 0..32 {
        setrlimit(Resource::RLIMIT_NOFILE, next + room, hard)?;
        let result = datapath.publish(&pair.tables[1]);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
        let Err(error) = result else {
            ensure!(room >= 5, "{room} descriptors were enough for five maps");
            return Ok(());
        };
        ensure!(error.to_string().contains("os error 24"), "with {room} descriptors: {error}");
        same(datapath, pair, active).with_context(|| format!("with {room} descriptors, after: {error}"))?;
    }
    bail!("32 descriptors are not enough")
}

/// Maps for the next revision wait in a slot nobody looks at. What somebody else does to them is never in force.
fn waiting(datapath: &Datapath, pair: &Pair) -> Result<()> {
    let empty = |slot: u32| -> Result<bool> { Ok(sys::outer_id(datapath.map("RULES")?, slot)? == 0) };
    let ready = |active: Active| (active.slot + 1) % bounds::SLOTS;
    // They are taken, and nothing is made.
    let active = datapath.publish(&pair.tables[1])?;
    datapath.settle()?;
    let maps = datapath.inner_maps(ready(active))?;
    ensure!(maps.iter().all(|id| *id != 0), "{maps:?}");
    let next = datapath.publish(&pair.tables[0])?;
    ensure!(datapath.inner_maps(next.slot)? == maps, "other maps than those that waited");
    same(datapath, pair, next)?;
    datapath.settle()?;
    datapath.settle()?;
    // An entry that somebody wrote into them: what is read back is not what was computed.
    let map = sys::outer_get(datapath.map("LOCALS")?, ready(next))?.context("nothing waits")?;
    let foreign = segfw_common::LocalEntry { flags: segfw_common::LocalEntry::OPEN, ..Default::default() };
    sys::map_update(map.as_fd(), &4_000_000_000u32, &foreign)?;
    ensure!(matches!(datapath.publish(&pair.tables[1]), Err(Error::ReadBack { .. })), "a foreign entry is in force");
    same(datapath, pair, next)?;
    // Other maps in their place are not used.
    datapath.settle()?;
    let classes = sys::outer_get(datapath.map("CLASSES")?, next.slot)?.context("nothing is in force")?;
    sys::outer_set(datapath.map("CLASSES")?, ready(next), classes.as_fd())?;
    let after = datapath.publish(&pair.tables[0])?;
    same(datapath, pair, after)?;
    // Too small for what comes: larger ones are made.
    datapath.settle()?;
    let mut large = pair.tables[1].clone();
    for i in 0..5_000u32 {
        let _ = large
            .prefixes
            .insert(PrefixKey { bits: 128, addr: Addr::v4((0x0b00_0000 + i).to_be_bytes()) }, Identity(300));
        let _ = large.locals.insert(Identity(100_000 + i), segfw_common::LocalEntry::default());
    }
    let active = datapath.publish(&large)?;
    ensure!(datapath.read_back(active.slot)?.digest() == large.digest(), "not what was computed");
    datapath.settle()?;
    ensure!(empty(after.slot)? && !empty(ready(active))?, "slots are not emptied");
    let _ = datapath.publish(&pair.tables[0])?;
    Ok(())
}

/// After a large revision the maps that wait hold it already: a change of it writes what differs, and nothing else is in
/// force than what was computed, whatever somebody did to what lay open.
fn ahead(datapath: &Datapath, pair: &Pair) -> Result<()> {
    let mut tables = pair.tables[1].clone();
    let (key, entry) = tables.rules.iter().next().map(|(k, e)| (*k, *e)).context("no rules")?;
    for i in 0..6_000u32 {
        let _ = tables.rules.insert(RuleKey { local: Identity(100_000 + i), ..key }, entry);
        let addr = Addr::v4((0x0b00_0000 + i).to_be_bytes());
        let _ = tables.prefixes.insert(PrefixKey { bits: 128, addr }, Identity(300));
    }
    let holds = |active: Active, tables: &Tables| -> Result<()> {
        ensure!(datapath.active()? == active, "{active:?} is not in force");
        ensure!(datapath.read_back(active.slot)?.digest() == tables.digest(), "not what was computed");
        Ok(())
    };
    let ready = |active: Active| (active.slot + 1) % bounds::SLOTS;
    let mut active = datapath.publish(&tables)?;
    holds(active, &tables)?;
    let prefixes = |slot: u32| sys::outer_id(datapath.map("PREFIXES")?, slot).context("PREFIXES");
    for round in 0..8u32 {
        datapath.settle_on(&tables)?;
        let waiting = datapath.inner_maps(ready(active))?;
        ensure!(prefixes(active.slot)? == prefixes(ready(active))?, "the prefixes were made anew");
        // One more, one less, one with another answer.
        let keys = [
            RuleKey { local: Identity(200_000 + round), ..key },
            RuleKey { local: Identity(100_000 + round), ..key },
            RuleKey { local: Identity(105_000 + round), ..key },
        ];
        let _ = tables.rules.insert(keys[0], entry);
        let _ = tables.rules.remove(&keys[1]);
        let _ = tables.rules.insert(keys[2], RuleEntry { rule: 77, ..entry });
        let next = match round {
            // Whoever does not know what differs finds out.
            3 => datapath.publish(&tables)?,
            // Somebody wrote into what lay open, or took something out: other maps are made.
            4 | 5 => {
                let map = sys::outer_get(datapath.map("RULES")?, ready(active))?.context("nothing waits")?;
                match round {
                    4 => sys::map_update(map.as_fd(), &RuleKey { local: Identity(999_999), ..key }, &entry)?,
                    _ => ensure!(sys::map_delete(map.as_fd(), &RuleKey { local: Identity(104_000), ..key })?),
                }
                datapath.publish_change(&tables, &keys)?
            }
            // Other prefixes: those in force are not.
            6 => {
                let _ = tables.prefixes.insert(PrefixKey { bits: 128, addr: Addr::v4([12, 0, 0, 1]) }, Identity(301));
                datapath.publish(&tables)?
            }
            _ => datapath.publish_change(&tables, &keys)?,
        };
        let used = datapath.inner_maps(next.slot)?;
        ensure!(next.generation == active.generation + 1, "{active:?}, then {next:?}");
        ensure!(
            (used == waiting) != matches!(round, 4..=6),
            "round {round}: {waiting:?} waited, {used:?} are in force"
        );
        holds(next, &tables)?;
        active = next;
        frozen(datapath)?;
    }
    // A difference that is not told is found when the maps are read back, and then all is written.
    datapath.settle_on(&tables)?;
    let _ = tables.rules.insert(RuleKey { local: Identity(300_000), ..key }, entry);
    let next = datapath.publish_change(&tables, &[])?;
    holds(next, &tables)?;
    // Back to small ones.
    datapath.settle_on(&tables)?;
    let next = datapath.publish(&pair.tables[0])?;
    datapath.settle_on(&pair.tables[0])?;
    same(datapath, pair, next)
}

fn found_again(datapath: &Datapath, scratch: &Scratch, pair: &Pair) -> Result<()> {
    let active = datapath.publish(&pair.tables[0])?;
    let second = Datapath::load(scratch.pins())?;
    same(&second, pair, active)
}
