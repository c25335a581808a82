//! From tables to a generation the kernel uses: fill aside, freeze, read back, compare, switch.
//!
//! The order never opens a hole: `CONTROL` names a slot only when everything in it was proven, and the old slot stays
//! whole until no program can be in it any more.
//!
//! A generation is a set of maps, and the rules of a large policy are divided among many. A map that says what the tables
//! say is used again: it is frozen, and was read back when it was made. So a change of one rule makes one map of some
//! thousand rules, and two generations that differ little need little more memory than one.
//!
//! To put a map into a slot is done at once, but the call returns only after a grace period of RCU. A thread waits for that:
//! no program looks into the slot before `CONTROL` says so.

use super::{Datapath, Error, sys};
use crate::policy::Tables;
use segfw_common::rule::{PrefixKey, Proto};
use segfw_common::{Addr, Identity, LocalEntry, RuleEntry, RuleKey, bounds, control};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The outer maps, and how many inner maps each has at most per generation.
const OUTER: [(&str, u32); 6] =
    [("PREFIXES", 1), ("HOSTS", 1), ("CLASSES", 1), ("TIMELINE", 1), ("LOCALS", 1), ("RULES", bounds::RULE_SHARDS)];
/// Index into it.
const RULES: usize = 5;

/// Entries that a map of rules holds on average, before there are more of them: to make one takes two milliseconds, and
/// most policies need no more than one.
const RULES_PER_MAP: usize = 4_096;

/// Binary logarithm of how many maps so many rules are divided among.
fn bits(rules: usize) -> u32 {
    let maps = u32::try_from(rules.div_ceil(RULES_PER_MAP)).unwrap_or(u32::MAX).min(bounds::RULE_SHARDS);
    maps.next_power_of_two().trailing_zeros()
}

/// From so many entries on, maps are made by several threads: to fill fewer takes a millisecond.
const MANY: usize = 4_096;

/// Threads that make maps. More would take the processors from what is served here.
const MAKERS: usize = 4;

/// How often a thread looks whether a map is in its slot; it is there some microseconds after the call began.
const LOOK: Duration = Duration::from_micros(20);

/// A look at a slot that takes this long waited for a grace period.
const SLOW: Duration = Duration::from_millis(1);

/// Threads that look at slots where each look waits: enough for a few grace periods in all.
const READERS: usize = 64;

/// Stack of a thread that makes one system call (bytes).
const STACK: usize = 64 << 10;

/// Where an inner map of a generation belongs: index into [`OUTER`], and which of its maps.
#[derive(Clone, Copy, Debug)]
struct Place {
    outer: usize,
    shard: u32,
}

impl Place {
    /// All of a generation whose rules are in `2^bits` maps; those of rules come last.
    fn all(bits: u32) -> impl Iterator<Item = Self> {
        let number = move |outer: usize| if outer == RULES { 1 << bits } else { 1 };
        (0..OUTER.len()).flat_map(move |outer| (0..number(outer)).map(move |shard| Self { outer, shard }))
    }
    const fn name(self) -> &'static str {
        OUTER[self.outer].0
    }
    /// Index into the outer map.
    const fn index(self, slot: u32) -> u32 {
        slot * OUTER[self.outer].1 + self.shard
    }
}

/// A frozen map that was read back.
#[derive(Clone, Debug)]
struct Part {
    map: Arc<OwnedFd>,
    /// The kernel's number of it.
    id: u32,
    print: Print,
}

impl Part {
    /// Reads it back.
    fn of(place: Place, map: OwnedFd, sum: &Sum) -> Result<Self, Error> {
        let print = print(place, map.as_fd(), sum)?;
        let id = sys::map_info(map.as_fd()).map_err(reading(place))?.id;
        Ok(Self { map: Arc::new(map), id, print })
    }
}

/// What this agent put in force, and what that left to do.
#[derive(Debug, Default)]
pub struct Held {
    /// In the order of [`Place::all`]; `None` = no entries, no map. Empty = nothing was put in force yet.
    parts: Vec<Option<Part>>,
    /// No program is in another slot than the one in force, and the others are empty.
    settled: bool,
    /// What was written since all slots but the one in force were empty, that one included; `None` = nobody looked yet.
    filled: Option<Vec<Active>>,
    /// Calls that wait for a grace period.
    writers: Vec<Writer>,
    sum: Sum,
}

impl Held {
    /// What the maps of rules and that of prefixes are to hold after a change of these keys; `None` = not known.
    fn after(&self, tables: &Tables, bits: u32, before: &[(RuleKey, Option<RuleEntry>)]) -> Option<Known> {
        let mut prints = self.parts.iter().map(|part| part.as_ref().map_or(Print::default(), |part| part.print));
        let (prefixes, hosts) = (prints.next()?, prints.next()?);
        let mut shards: Vec<Print> = prints.skip(RULES - 2).collect();
        if shards.len() != 1 << bits {
            return None;
        }
        for (key, before) in before {
            let shard = &mut shards[key.shard(bits) as usize];
            if let Some(entry) = before {
                shard.remove(&self.sum, key, entry);
            }
            if let Some(entry) = tables.rules.get(key) {
                shard.add(&self.sum, key, entry);
            }
        }
        Some(Known { prefixes, hosts, shards })
    }
}

/// What the large maps are to hold.
struct Known {
    prefixes: Print,
    hosts: Print,
    shards: Vec<Print>,
}

type Writer = JoinHandle<io::Result<()>>;

/// What `CONTROL` says is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// 0 = no policy yet.
    pub generation: u32,
    /// Slot of the outer maps.
    pub slot: u32,
    /// The rules are in `2^bits` maps.
    pub bits: u32,
}

impl Datapath {
    /// The generation in force.
    pub fn active(&self) -> Result<Active, Error> {
        let word = sys::map_lookup::<u32, u64>(self.map("CONTROL")?, &control::ACTIVE)
            .map_err(|e| Error::sys("read CONTROL", e))?
            .unwrap_or(0);
        let (generation, place) = ((word >> 32) as u32, word as u32);
        let bits = place >> control::SHARDS_SHIFT & 31;
        Ok(Active {
            generation,
            slot: place & (bounds::SLOTS - 1),
            bits: bits.min(bounds::RULE_SHARDS.trailing_zeros()),
        })
    }

    fn set_active(&self, active: Active) -> Result<(), Error> {
        let word = u64::from(active.generation) << 32 | u64::from(active.bits << control::SHARDS_SHIFT | active.slot);
        sys::map_update(self.map("CONTROL")?, &control::ACTIVE, &word).map_err(|e| Error::sys("write CONTROL", e))
    }

    /// Bits of `control::HOST_*`.
    pub fn set_host_flags(&self, flags: u64) -> Result<(), Error> {
        sys::map_update(self.map("CONTROL")?, &control::FLAGS, &flags).map_err(|e| Error::sys("write CONTROL", e))
    }

    /// Makes every cached verdict stale without a new policy: who is who has changed.
    pub fn touch(&self) -> Result<Active, Error> {
        let active = self.active()?;
        let next = Active { generation: after(active.generation), ..active };
        if active.generation != 0 {
            self.set_active(next)?;
        }
        Ok(next)
    }

    /// Puts tables in force. On any error the generation in force stays as it is. Programs that had begun may still judge
    /// by the old one; [`Self::settle`] waits for them.
    pub fn publish(&self, tables: &Tables) -> Result<Active, Error> {
        self.publish_as(tables, None)
    }

    /// [`Self::publish`] of tables whose prefixes are those in force, and whose rules too, but for some keys: these, and what
    /// they said before.
    pub fn publish_change(&self, tables: &Tables, before: &[(RuleKey, Option<RuleEntry>)]) -> Result<Active, Error> {
        self.publish_as(tables, Some(before))
    }

    fn publish_as(&self, tables: &Tables, before: Option<&[(RuleKey, Option<RuleEntry>)]>) -> Result<Active, Error> {
        let mut held = self.held();
        let old = self.active()?;
        // Programs of the generation before this one may be in any slot but the one in force.
        self.settle_now(&mut held, old)?;
        let slot = (old.slot + 1) % bounds::SLOTS;
        let new = Active { generation: after(old.generation), slot, bits: bits(tables.rules.len()) };
        let known = before.and_then(|before| held.after(tables, new.bits, before));
        let wanted = wanted(tables, new.bits, &held.sum, known);
        // Only what is still where we put it.
        let there = if old.generation == 0 { Vec::new() } else { self.inner_maps(old)? };
        let again = |i: usize| {
            let part = held.parts.get(i)?.as_ref()?;
            (there.get(i) == Some(&part.id) && wanted[i] == part.print).then(|| part.clone())
        };
        let mut parts: Vec<Option<Part>> = (0..wanted.len()).map(again).collect();
        let missing: Vec<usize> =
            (0..wanted.len()).filter(|i| parts[*i].is_none() && wanted[*i].entries != 0).collect();
        for (i, part) in make(tables, new.bits, &missing, &wanted, &held.sum)? {
            parts[i] = Some(part);
        }
        tracing::debug!(made = missing.len(), of = wanted.len(), "maps are ready");
        if let Some(filled) = &mut held.filled {
            filled.push(new);
        }
        self.install(&mut held.writers, new, &parts)?;
        // What was written into the maps is there for whoever reads the word.
        std::sync::atomic::fence(Ordering::SeqCst);
        self.set_active(new)?;
        held.settled = false;
        held.parts = parts;
        Ok(new)
    }

    /// Returns when no program judges by an older slot any more, and those are empty. Costs two grace periods if there is
    /// something to do.
    pub fn settle(&self) -> Result<(), Error> {
        let mut held = self.held();
        let active = self.active()?;
        self.settle_now(&mut held, active)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Self::settle`].
    fn settle_now(&self, held: &mut Held, active: Active) -> Result<(), Error> {
        // Where one failed, the revision it was for was refused.
        let _ = wait(std::mem::take(&mut held.writers));
        if held.settled || active.generation == 0 {
            return Ok(());
        }
        // A plain array write, as that of `CONTROL`, waits for nobody. Writing to an outer slot waits for a grace period:
        // after it no program that read the old word is still running, and the old slots can go.
        for (place, id) in Place::all(active.bits).zip(self.inner_maps(active)?) {
            if let Some(map) = opened(place, id)? {
                sys::outer_set(self.map(place.name())?, place.index(active.slot), map.as_fd())
                    .map_err(|e| Error::sys("wait for the programs of the last generation", e))?;
                break;
            }
        }
        held.settled = true;
        // What is not cleared costs memory, and the next one comes by again.
        match self.clear(held, active) {
            Ok(()) => held.filled = Some(vec![active]),
            Err(error) => tracing::warn!("old generations are kept: {error}"),
        }
        Ok(())
    }

    /// Empties all slots but that in force.
    fn clear(&self, held: &mut Held, active: Active) -> Result<(), Error> {
        let old: Vec<(Place, u32)> = match &held.filled {
            Some(filled) => {
                let old = filled.iter().filter(|one| one.slot != active.slot);
                old.flat_map(|one| Place::all(one.bits).map(|place| (place, one.slot))).collect()
            }
            None => {
                let most = bounds::RULE_SHARDS.trailing_zeros();
                let old = (0..bounds::SLOTS).filter(|slot| *slot != active.slot);
                let all: Vec<_> = old.flat_map(|slot| Place::all(most).map(move |place| (place, slot))).collect();
                let there = self.ids(&all)?;
                all.into_iter().zip(there).filter(|(_, id)| *id != 0).map(|(at, _)| at).collect()
            }
        };
        let cleared = old.into_iter().map(|(place, slot)| {
            let (outer, index) = (self.outer(place)?, place.index(slot));
            held.writers.push(writer(move || sys::outer_clear(outer.as_fd(), index))?);
            Ok(())
        });
        let cleared = cleared.fold(Ok(()), Result::and);
        let waited = wait(std::mem::take(&mut held.writers)).map_err(|e| Error::sys("empty a slot", e));
        cleared.and(waited)
    }

    /// Puts maps into a slot that `CONTROL` does not name, and returns when they are there.
    fn install(&self, writers: &mut Vec<Writer>, new: Active, parts: &[Option<Part>]) -> Result<(), Error> {
        let slot = new.slot;
        let failed = |e| Error::sys(format!("put new maps into slot {slot}"), e);
        let there = self.inner_maps(new)?;
        for ((place, part), there) in Place::all(new.bits).zip(parts).zip(there) {
            let (outer, index) = (self.outer(place)?, place.index(slot));
            match part {
                Some(part) => {
                    let map = Arc::clone(&part.map);
                    writers.push(writer(move || sys::outer_set(outer.as_fd(), index, map.as_fd()))?);
                }
                // Settled slots are empty, unless that failed.
                None if there != 0 => {
                    writers.push(writer(move || sys::outer_clear(outer.as_fd(), index))?);
                }
                None => {}
            }
        }
        let want: Vec<u32> = parts.iter().map(|part| part.as_ref().map_or(0, |part| part.id)).collect();
        loop {
            // Asked before the look: what has ended was written before it.
            let ended = writers.iter().all(JoinHandle::is_finished);
            if self.inner_maps(new)? == want {
                return Ok(());
            }
            if ended {
                wait(std::mem::take(writers)).map_err(failed)?;
                return Err(failed(io::Error::other("somebody else writes there")));
            }
            std::thread::sleep(LOOK);
        }
    }

    fn outer(&self, place: Place) -> Result<Arc<OwnedFd>, Error> {
        let missing = || Error::Missing { kind: "map", name: place.name().to_owned() };
        self.maps.get(place.name()).cloned().ok_or_else(missing)
    }

    /// Numbers of the inner maps of a generation, 0 = none: the maps are frozen, so the same numbers are the same tables.
    pub fn inner_maps(&self, of: Active) -> Result<Vec<u32>, Error> {
        let all: Vec<(Place, u32)> = Place::all(of.bits).map(|place| (place, of.slot)).collect();
        self.ids(&all)
    }

    /// Numbers of the inner maps at these places of slots, 0 = none.
    fn ids(&self, all: &[(Place, u32)]) -> Result<Vec<u32>, Error> {
        let id = |(place, slot): &(Place, u32)| -> Result<u32, Error> {
            let read = sys::outer_id(self.map(place.name())?, place.index(*slot));
            read.map_err(|e| Error::sys(format!("read slot {slot} of {}", place.name()), e))
        };
        let Some((first, rest)) = all.split_first() else { return Ok(Vec::new()) };
        let begun = Instant::now();
        let first = [id(first)];
        if begun.elapsed() < SLOW {
            return first.into_iter().chain(rest.iter().map(id)).collect();
        }
        // Before 6.8 such a read waits for a grace period (`bpf_map_copy_value` in kernel/bpf/syscall.c), and 261 of them would
        // take seconds. Many that wait at once wait for the same one.
        std::thread::scope(|scope| {
            let share = rest.len().div_ceil(READERS).max(1);
            let read = |some: &[(Place, u32)]| some.iter().map(id).collect::<Vec<_>>();
            let readers: Result<Vec<_>, Error> = rest
                .chunks(share)
                .map(|some| {
                    let reader = std::thread::Builder::new().name("grace".into()).stack_size(STACK);
                    reader.spawn_scoped(scope, move || read(some)).map_err(|e| Error::sys("start a thread", e))
                })
                .collect();
            let panicked = || vec![Err(Error::sys("read the maps in force", io::Error::other("panic")))];
            let rest = readers?.into_iter().flat_map(|reader| reader.join().unwrap_or_else(|_| panicked()));
            first.into_iter().chain(rest).collect()
        })
    }

    /// Where these maps are, as [`Self::inner_maps`] tells them; the generation is 0.
    pub fn find(&self, maps: &[u32]) -> Option<Active> {
        let bits = maps.len().checked_sub(RULES)?.checked_ilog2()?;
        let mut places = (0..bounds::SLOTS).map(|slot| Active { generation: 0, slot, bits });
        places.find(|place| self.inner_maps(*place).is_ok_and(|there| there == maps))
    }

    /// The word of `control::FLAGS`.
    pub fn host_flags(&self) -> Result<u64, Error> {
        let word = sys::map_lookup::<u32, u64>(self.map("CONTROL")?, &control::FLAGS);
        Ok(word.map_err(|e| Error::sys("read CONTROL", e))?.unwrap_or(0))
    }

    /// Makes the word that says what is in force say so again.
    pub fn restore_active(&self, active: Active) -> Result<Active, Error> {
        let next = Active { generation: after(active.generation), ..active };
        self.set_active(next)?;
        Ok(next)
    }

    /// Do the maps in force, which an earlier agent left, say what these tables say? Then they are ours.
    pub fn holds(&self, tables: &Tables) -> Result<bool, Error> {
        let mut held = self.held();
        let active = self.active()?;
        if active.generation == 0 || active.bits != bits(tables.rules.len()) {
            return Ok(false);
        }
        let wanted = wanted(tables, active.bits, &held.sum, None);
        let mut parts = Vec::new();
        for ((place, id), want) in Place::all(active.bits).zip(self.inner_maps(active)?).zip(wanted) {
            let part = match opened(place, id)? {
                Some(map) => {
                    // They should be: then this says that it cannot be done twice.
                    let _ = sys::map_freeze(map.as_fd());
                    Some(Part::of(place, map, &held.sum)?)
                }
                None => None,
            };
            if part.as_ref().map_or(Print::default(), |part| part.print) != want {
                return Ok(false);
            }
            parts.push(part);
        }
        held.parts = parts;
        Ok(true)
    }

    /// What the kernel holds of a generation, as tables (without the names, which it never sees).
    pub fn read_back(&self, of: Active) -> Result<Tables, Error> {
        let mut tables = Tables::default();
        for (place, id) in Place::all(of.bits).zip(self.inner_maps(of)?) {
            let Some(map) = opened(place, id)? else { continue };
            let map = map.as_fd();
            match place.name() {
                "CLASSES" => tables.classes = read_classes(place, map)?,
                "RULES" => tables.rules.extend(dump::<RuleKey, RuleEntry>(place, map)?),
                "TIMELINE" => {
                    let parts: BTreeMap<u32, RuleEntry> = dump(place, map)?.into_iter().collect();
                    tables.timeline = parts.into_values().collect();
                }
                "LOCALS" => tables.locals.extend(dump(place, map)?.into_iter().map(|(k, v)| (Identity(k), v))),
                "HOSTS" => {
                    let prefix = |addr| PrefixKey { bits: 128, addr };
                    tables.prefixes.extend(dump(place, map)?.into_iter().map(|(k, v)| (prefix(k), Identity(v))));
                }
                _ => tables.prefixes.extend(dump(place, map)?.into_iter().map(|(k, v)| (k, Identity(v)))),
            }
        }
        Ok(tables)
    }
}

/// The map with this number; `None` for 0.
fn opened(place: Place, id: u32) -> Result<Option<OwnedFd>, Error> {
    if id == 0 {
        return Ok(None);
    }
    sys::map_by_id(id).map(Some).map_err(|e| Error::sys(format!("open a map of {}", place.name()), e))
}

/// The next generation number; 0 means "no policy" and is never used again.
fn after(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

fn writer(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<Writer, Error> {
    let started = std::thread::Builder::new().name("grace".into()).stack_size(STACK).spawn(work);
    started.map_err(|e| Error::sys("start a thread", e))
}

/// All are waited for, also after the first that failed.
fn wait(writers: Vec<Writer>) -> io::Result<()> {
    let ended = writers.into_iter().map(|one| one.join().unwrap_or_else(|_| Err(io::Error::other("panic"))));
    ended.fold(Ok(()), io::Result::and)
}

/// Prefixes that are one address, with their identities.
fn hosts(tables: &Tables) -> impl Iterator<Item = (Addr, u32)> {
    tables.prefixes.iter().filter(|(prefix, _)| prefix.bits == 128).map(|(prefix, identity)| (prefix.addr, identity.0))
}

/// All others.
fn prefixes(tables: &Tables) -> impl Iterator<Item = (PrefixKey, u32)> {
    tables.prefixes.iter().filter(|(prefix, _)| prefix.bits != 128).map(|(prefix, identity)| (*prefix, identity.0))
}

/// What each map is to hold, in the order of [`Place::all`].
fn wanted(tables: &Tables, bits: u32, sum: &Sum, known: Option<Known>) -> Vec<Print> {
    let Known { prefixes, hosts, shards } = known.unwrap_or_else(|| {
        let mut shards = vec![Print::default(); 1 << bits];
        for (key, entry) in &tables.rules {
            shards[key.shard(bits) as usize].add(sum, key, entry);
        }
        Known { prefixes: Print::of(sum, prefixes(tables)), hosts: Print::of(sum, hosts(tables)), shards }
    });
    let of = |place: Place| match place.name() {
        "CLASSES" => classes_print(&tables.classes, sum),
        "TIMELINE" => Print::of(sum, tables.timeline.iter().zip(0u32..).map(|(entry, i)| (i, *entry))),
        "LOCALS" => Print::of(sum, tables.locals.iter().map(|(k, v)| (k.0, *v))),
        "RULES" => shards[place.shard as usize],
        "HOSTS" => hosts,
        _ => prefixes,
    };
    Place::all(bits).map(of).collect()
}

/// Makes the maps of these places (indices into [`Place::all`]): filled, frozen, read back, and no other than wanted.
fn make(
    tables: &Tables,
    bits: u32,
    places: &[usize],
    wanted: &[Print],
    sum: &Sum,
) -> Result<Vec<(usize, Part)>, Error> {
    let all: Vec<Place> = Place::all(bits).collect();
    let mut shards: Vec<Option<(Vec<RuleKey>, Vec<RuleEntry>)>> = vec![None; 1 << bits];
    for (place, want) in places.iter().map(|i| (all[*i], wanted[*i])).filter(|(place, _)| place.name() == "RULES") {
        let room = want.entries as usize;
        shards[place.shard as usize] = Some((Vec::with_capacity(room), Vec::with_capacity(room)));
    }
    if shards.iter().any(Option::is_some) {
        for (key, entry) in &tables.rules {
            if let Some((keys, entries)) = &mut shards[key.shard(bits) as usize] {
                keys.push(*key);
                entries.push(*entry);
            }
        }
    }
    let make_one = |i: usize| -> Result<(usize, Part), Error> {
        let (place, want) = (all[i], wanted[i]);
        let map = match place.name() {
            "CLASSES" => filled_classes(place, &tables.classes)?,
            "TIMELINE" => {
                let keys: Vec<u32> = (0..want.entries).collect();
                filled(place, sys::MAP_TYPE_HASH, &keys, &tables.timeline)?
            }
            "LOCALS" => {
                let (keys, values): (Vec<_>, Vec<_>) = tables.locals.iter().map(|(k, v)| (k.0, *v)).unzip();
                filled(place, sys::MAP_TYPE_HASH, &keys, &values)?
            }
            "RULES" => {
                let (keys, entries) = shards[place.shard as usize].as_ref().map_or((&[][..], &[][..]), |(k, e)| (k, e));
                filled(place, sys::MAP_TYPE_HASH, keys, entries)?
            }
            "HOSTS" => {
                let (keys, values): (Vec<_>, Vec<_>) = hosts(tables).unzip();
                filled(place, sys::MAP_TYPE_HASH, &keys, &values)?
            }
            _ => {
                let (keys, values): (Vec<_>, Vec<_>) = prefixes(tables).unzip();
                filled(place, sys::MAP_TYPE_LPM_TRIE, &keys, &values)?
            }
        };
        sys::map_freeze(map.as_fd()).map_err(|e| Error::sys(format!("freeze the map {}", place.name()), e))?;
        let part = Part::of(place, map, sum)?;
        if part.print != want {
            return Err(Error::ReadBack { map: place.name(), want: want.to_string(), have: part.print.to_string() });
        }
        Ok((i, part))
    };
    let entries: usize = places.iter().map(|i| wanted[*i].entries as usize).sum();
    if entries < MANY {
        return places.iter().map(|i| make_one(*i)).collect();
    }
    // Tries and hosts, which take longest, come first.
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Part)>, Error> {
        std::iter::from_fn(|| places.get(next.fetch_add(1, Ordering::Relaxed))).map(|i| make_one(*i)).collect()
    };
    let makers = std::thread::available_parallelism().map_or(1, usize::from).min(MAKERS);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..makers).map(|_| scope.spawn(work)).collect();
        let mut made = work()?;
        for other in others {
            let panicked = |_| Error::sys("fill the maps", io::Error::other("panic"));
            made.extend(other.join().map_err(panicked)??);
        }
        Ok(made)
    })
}

/// A new map with these entries, and room for no more.
fn filled<K: aya::Pod, V: aya::Pod>(place: Place, kind: u32, keys: &[K], values: &[V]) -> Result<OwnedFd, Error> {
    let tree = if kind == sys::MAP_TYPE_LPM_TRIE { sys::F_NO_PREALLOC } else { 0 };
    let n = u32::try_from(keys.len()).unwrap_or(u32::MAX);
    let map = sys::map_create(kind, size_of::<K>(), size_of::<V>(), n, sys::F_RDONLY_PROG | tree, place.name())
        .map_err(|e| Error::sys(format!("make the map {} with room for {n} entries", place.name()), e))?;
    sys::map_fill(map.as_fd(), keys, values).map_err(|e| Error::sys(format!("fill the map {}", place.name()), e))?;
    Ok(map)
}

fn filled_classes(place: Place, classes: &[Vec<u16>]) -> Result<OwnedFd, Error> {
    let failed = |e| Error::sys(format!("fill the map {}", place.name()), e);
    let map = sys::map_create(sys::MAP_TYPE_ARRAY, 4, PORTS * 2, Proto::COUNT, sys::F_RDONLY_PROG, place.name())
        .map_err(failed)?;
    for (proto, of_ports) in classes.iter().enumerate() {
        // The kernel reads as much as the map's values hold, however long this is.
        if of_ports.len() != PORTS {
            let what = format!("{} classes of ports instead of {PORTS}", of_ports.len());
            return Err(Error::sys(what, io::ErrorKind::InvalidInput.into()));
        }
        sys::map_update_slice(map.as_fd(), &(proto as u32), of_ports).map_err(failed)?;
    }
    Ok(map)
}

/// Ports, each with a class.
const PORTS: usize = 1 << 16;

/// Reads a map back.
fn print(place: Place, map: BorrowedFd<'_>, sum: &Sum) -> Result<Print, Error> {
    Ok(match place.name() {
        "CLASSES" => classes_print(&read_classes(place, map)?, sum),
        "TIMELINE" => Print::of(sum, dump::<u32, RuleEntry>(place, map)?),
        "LOCALS" => Print::of(sum, dump::<u32, LocalEntry>(place, map)?),
        "RULES" => Print::of(sum, dump::<RuleKey, RuleEntry>(place, map)?),
        "HOSTS" => Print::of(sum, dump::<Addr, u32>(place, map)?),
        _ => Print::of(sum, dump::<PrefixKey, u32>(place, map)?),
    })
}

/// In no order.
fn dump<K: aya::Pod, V: aya::Pod>(place: Place, map: BorrowedFd<'_>) -> Result<Vec<(K, V)>, Error> {
    let size = sys::map_info(map).map(|i| i.max_entries as usize).unwrap_or(0);
    sys::map_dump(map, size).map_err(reading(place))
}

fn read_classes(place: Place, map: BorrowedFd<'_>) -> Result<Vec<Vec<u16>>, Error> {
    let mut classes = Vec::new();
    for proto in 0..Proto::COUNT {
        let mut bytes = vec![0u8; PORTS * 2];
        let found = sys::map_lookup_into(map, &proto, &mut bytes).map_err(reading(place))?;
        debug_assert!(found);
        classes.push(bytes.chunks_exact(2).map(|c| u16::from_ne_bytes([c[0], c[1]])).collect());
    }
    Ok(classes)
}

fn reading(place: Place) -> impl FnOnce(io::Error) -> Error {
    move |e| Error::sys(format!("read back {}", place.name()), e)
}

/// What a map holds, in any order: two sets of entries that differ have the same print once in about 2^64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Print {
    entries: u32,
    sum: u128,
}

impl Print {
    fn of<K: aya::Pod, V: aya::Pod>(sum: &Sum, entries: impl IntoIterator<Item = (K, V)>) -> Self {
        let mut print = Self::default();
        entries.into_iter().for_each(|(key, value)| print.add(sum, &key, &value));
        print
    }
    fn add<K: aya::Pod, V: aya::Pod>(&mut self, sum: &Sum, key: &K, value: &V) {
        self.entries = self.entries.saturating_add(1);
        self.sum = self.sum.wrapping_add(sum.term([bytes(key), bytes(value)]));
    }
    /// Takes out an entry that was added.
    fn remove<K: aya::Pod, V: aya::Pod>(&mut self, sum: &Sum, key: &K, value: &V) {
        self.entries = self.entries.saturating_sub(1);
        self.sum = self.sum.wrapping_sub(sum.term([bytes(key), bytes(value)]));
    }
}

impl std::fmt::Display for Print {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} entries with sum {:032x}", self.entries, self.sum)
    }
}

fn classes_print(classes: &[Vec<u16>], sum: &Sum) -> Print {
    let mut print = Print::default();
    for (proto, of_ports) in (0u32..).zip(classes) {
        // SAFETY: as many bytes as the slice has, of plain numbers.
        let row = unsafe { std::slice::from_raw_parts(of_ports.as_ptr().cast::<u8>(), size_of_val(&**of_ports)) };
        print.entries += 1;
        print.sum = print.sum.wrapping_add(sum.term([bytes(&proto), row]));
    }
    print
}

fn bytes<T: aya::Pod>(value: &T) -> &[u8] {
    // SAFETY: what maps hold is plain data without padding: the kernel takes and gives every byte of it.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) }
}

/// Keys that nobody knows before, so that nobody can make two different maps with the same [`Print`]. A sum needs no order:
/// to sort a hundred thousand entries takes ten times as long.
#[derive(Debug)]
struct Sum([u64; 4]);

impl Default for Sum {
    fn default() -> Self {
        use std::hash::BuildHasher;
        let state = std::hash::RandomState::new();
        // Odd, so that no multiplication forgets what it was given.
        Self([0u64, 1, 2, 3].map(|i| state.hash_one(i) | 1))
    }
}

impl Sum {
    /// Of one entry: its key and its value.
    fn term(&self, entry: [&[u8]; 2]) -> u128 {
        let [a, b, c, d] = self.0;
        let (mut first, mut second) = (a, c);
        let mut add = |word: u64| {
            let mix = |state: u64, by: u64| {
                let wide = u128::from(state ^ word) * u128::from(by);
                (wide as u64) ^ ((wide >> 64) as u64)
            };
            (first, second) = (mix(first, b), mix(second, d));
        };
        for bytes in entry {
            let (words, rest) = bytes.as_chunks::<8>();
            words.iter().for_each(|word| add(u64::from_ne_bytes(*word)));
            if !rest.is_empty() {
                let mut last = [0; 8];
                last[..rest.len()].copy_from_slice(rest);
                add(u64::from_ne_bytes(last));
            }
        }
        u128::from(first) << 64 | u128::from(second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_print_is_of_the_entries_and_not_of_their_order() {
        let sum = Sum::default();
        let print = |entries: &[(u64, u32)]| Print::of(&sum, entries.iter().copied());
        let all = [(1, 2), (3, 4), (5, 6)];
        assert_eq!(print(&all), print(&[all[2], all[0], all[1]]));
        let others: [&[(u64, u32)]; 6] = [
            &all[..2],
            &[(1, 2), (3, 4), (5, 7)],
            &[(1, 4), (3, 2), (5, 6)],
            &[all[0], all[0], all[2]],
            &[],
            &[(0, 0)],
        ];
        for (i, other) in others.iter().enumerate() {
            assert_ne!(print(&all).sum, print(other).sum, "{other:?}");
            assert!(others[..i].iter().all(|before| print(before).sum != print(other).sum), "{other:?}");
        }
        // Every bit counts, in the key and in the value.
        let one = print(&[(0, 0)]);
        (0..64).for_each(|bit| assert_ne!(print(&[(1 << bit, 0)]), one));
        (0..32).for_each(|bit| assert_ne!(print(&[(0, 1 << bit)]), one));
        // And nobody knows it before.
        assert_ne!(print(&all), Print::of(&Sum::default(), all));
    }
}
