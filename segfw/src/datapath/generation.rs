//! From tables to a generation the kernel uses: fill aside, freeze, read back, compare, switch.
//!
//! The order never opens a hole: `CONTROL` names a slot only when everything in it was proven, and the old slot stays
//! whole until no program can be in it any more.
//!
//! Each write to an outer map costs a grace period of RCU, so none is on the way of a revision: empty inner maps wait in
//! the next slot, where no program looks before `CONTROL` says so ([`Datapath::settle`] puts them there, after the switch
//! before). A revision that needs larger ones has them put there first.
//!
//! After a large revision the maps that wait are not empty ([`Datapath::settle_on`]): `RULES` holds what is in force
//! already, so that a change writes what differs, and `PREFIXES` is the very map in force. That one is frozen, and was read
//! back when it was made; `RULES` is frozen after the last write and then read back whole, as any other.

use super::{Datapath, Error, sys};
use crate::policy::Tables;
use segfw_common::rule::{PrefixKey, Proto};
use segfw_common::{Identity, LocalEntry, RuleEntry, RuleKey, bounds, control};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{MutexGuard, PoisonError};

/// The outer maps, each with one inner map per generation.
const OUTER: [&str; 5] = ["CLASSES", "RULES", "TIMELINE", "LOCALS", "PREFIXES"];

/// Entries that waiting maps of a small policy hold: a hundred kilobytes of kernel memory.
const ROOM: u32 = 1_024;

/// From so many entries on a map is made ready with what is in force: to fill a smaller one takes a millisecond.
const AHEAD: usize = 4_096;

/// What lies ready for the next revision, and what the last one left to do.
#[derive(Debug, Default)]
pub struct Next {
    /// Empty and not frozen, in a slot that `CONTROL` does not name.
    waiting: Option<Inner>,
    /// Programs may still be in another slot than the one in force, or other slots are not emptied.
    unsettled: bool,
    /// Room that the last revision needed.
    needed: Room,
    /// The prefixes in force, where this agent published them.
    prefixes: Option<Prefixes>,
}

/// A frozen map of prefixes that was read back.
#[derive(Debug)]
struct Prefixes {
    map: OwnedFd,
    room: u32,
    /// [`Tables::prefixes_digest`] of what it holds.
    digest: [u8; 32],
}

/// One inner map for each of [`OUTER`], in one slot.
#[derive(Debug)]
struct Inner {
    slot: u32,
    room: Room,
    maps: Vec<OwnedFd>,
    /// `RULES` holds what is in force.
    rules_ahead: bool,
    /// `PREFIXES` is the frozen map in force.
    prefixes_ahead: bool,
}

/// Most entries of the inner maps whose size differs from policy to policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Room {
    rules: u32,
    timeline: u32,
    locals: u32,
    prefixes: u32,
}

impl Room {
    fn of(tables: &Tables) -> Self {
        let n = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).max(1);
        Self {
            rules: n(tables.rules.len()),
            timeline: n(tables.timeline.len()),
            locals: n(tables.locals.len()),
            prefixes: n(tables.prefixes.len()),
        }
    }
    fn holds(self, other: Self) -> bool {
        self.rules >= other.rules
            && self.timeline >= other.timeline
            && self.locals >= other.locals
            && self.prefixes >= other.prefixes
    }
    /// For a revision that is somewhat larger: policies grow rule by rule.
    fn ahead(self) -> Self {
        let more = |n: u32, most: u32| n.saturating_add(n / 8).max(ROOM).min(most.max(n));
        Self {
            rules: more(self.rules, bounds::RULES),
            timeline: more(self.timeline, bounds::TIMELINE),
            locals: more(self.locals, bounds::LOCALS),
            prefixes: more(self.prefixes, bounds::PREFIXES),
        }
    }
}

/// What `CONTROL` says is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// 0 = no policy yet.
    pub generation: u32,
    /// Slot of the outer maps.
    pub slot: u32,
}

impl Datapath {
    /// The generation in force.
    pub fn active(&self) -> Result<Active, Error> {
        let word = sys::map_lookup::<u32, u64>(self.map("CONTROL")?, &control::ACTIVE)
            .map_err(|e| Error::sys("read CONTROL", e))?
            .unwrap_or(0);
        Ok(Active { generation: (word >> 32) as u32, slot: word as u32 & (bounds::SLOTS - 1) })
    }

    fn set_active(&self, active: Active) -> Result<(), Error> {
        let word = u64::from(active.generation) << 32 | u64::from(active.slot);
        sys::map_update(self.map("CONTROL")?, &control::ACTIVE, &word).map_err(|e| Error::sys("write CONTROL", e))
    }

    /// Bits of `control::HOST_*`.
    pub fn set_host_flags(&self, flags: u64) -> Result<(), Error> {
        sys::map_update(self.map("CONTROL")?, &control::FLAGS, &flags).map_err(|e| Error::sys("write CONTROL", e))
    }

    /// Makes every cached verdict stale without a new policy: who is who has changed.
    pub fn touch(&self) -> Result<Active, Error> {
        let active = self.active()?;
        let next = Active { generation: after(active.generation), slot: active.slot };
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

    /// [`Self::publish`] of tables that differ from those in force in these keys of `rules`, and not in `prefixes`.
    pub fn publish_change(&self, tables: &Tables, keys: &[RuleKey]) -> Result<Active, Error> {
        self.publish_as(tables, Some(keys))
    }

    fn publish_as(&self, tables: &Tables, keys: Option<&[RuleKey]>) -> Result<Active, Error> {
        let mut next = self.next();
        let old = self.active()?;
        let slot = (old.slot + 1) % bounds::SLOTS;
        let needed = Room::of(tables);
        // What somebody put there in place of ours is not used.
        let ready =
            |inner: &Inner| inner.slot == slot && inner.room.holds(needed) && self.is_in(inner).unwrap_or(false);
        let waiting = match next.waiting.take().filter(ready) {
            Some(inner) => self.fill_ahead(inner, tables, keys, &mut next)?,
            None => None,
        };
        let inner = match waiting {
            Some(inner) => inner,
            None => {
                // Programs of the generation before this one may be in any slot but the one in force.
                self.settle_now(&mut next, None)?;
                let inner = self.install(slot, make(needed.ahead())?, needed.ahead())?;
                if !inner.take(tables)? {
                    let (want, have) = (tables.digest(), self.read_back(slot)?.digest());
                    return Err(Error::ReadBack { want: hex(&want), have: hex(&have) });
                }
                inner
            }
        };
        // What was written into the maps is there for whoever reads the word.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let new = Active { generation: after(old.generation), slot };
        self.set_active(new)?;
        next.unsettled = true;
        next.needed = needed;
        if !inner.prefixes_ahead {
            // For the next one: these are frozen, and were read back.
            next.prefixes = (tables.prefixes.len() >= AHEAD)
                .then(|| inner.maps.into_iter().nth(PREFIXES))
                .flatten()
                .map(|map| Prefixes { map, room: inner.room.prefixes, digest: tables.prefixes_digest() });
        }
        Ok(new)
    }

    /// Makes maps that waited say what the tables say; `None` = they do not, and others are to be made, since what lay open
    /// for long may have been changed by anybody.
    fn fill_ahead(
        &self,
        mut inner: Inner,
        tables: &Tables,
        keys: Option<&[RuleKey]>,
        next: &mut Next,
    ) -> Result<Option<Inner>, Error> {
        let open_long = inner.rules_ahead;
        if inner.prefixes_ahead
            && keys.is_none()
            && next.prefixes.as_ref().is_none_or(|known| known.digest != tables.prefixes_digest())
        {
            let room = inner.room.prefixes;
            let map = make_prefixes(room)?;
            sys::outer_set(self.map(OUTER[PREFIXES])?, inner.slot, map.as_fd())
                .map_err(|e| Error::sys(format!("put a new map into slot {} of {}", inner.slot, OUTER[PREFIXES]), e))?;
            inner.maps[PREFIXES] = map;
            inner.prefixes_ahead = false;
        }
        if inner.rules_ahead {
            match keys {
                Some(keys) => inner.amend(tables, keys)?,
                None => {
                    let held = inner.dump_rules()?;
                    let keys = differing(held, tables);
                    inner.amend(tables, &keys)?;
                }
            }
        }
        if inner.take(tables)? {
            return Ok(Some(inner));
        }
        if open_long {
            tracing::warn!("the maps that were ready for the next revision were changed by somebody: others are made");
            return Ok(None);
        }
        let (want, have) = (tables.digest(), self.read_back(inner.slot)?.digest());
        Err(Error::ReadBack { want: hex(&want), have: hex(&have) })
    }

    /// Returns when no program judges by an older slot any more; then those are empty, and maps for the next revision wait
    /// in the one after. Costs two grace periods if there is something to do.
    pub fn settle(&self) -> Result<(), Error> {
        self.settle_as(None)
    }

    /// [`Self::settle`]; where these tables, which are in force, are large, the maps that wait hold already what they say.
    pub fn settle_on(&self, tables: &Tables) -> Result<(), Error> {
        self.settle_as(Some(tables).filter(|t| t.rules.len() >= AHEAD))
    }

    fn settle_as(&self, held: Option<&Tables>) -> Result<(), Error> {
        let mut next = self.next();
        let active = self.active()?;
        if active.generation == 0 {
            return Ok(());
        }
        let slot = (active.slot + 1) % bounds::SLOTS;
        let is_ready = |inner: &Inner| inner.slot == slot && (held.is_none() || inner.rules_ahead);
        if next.unsettled || !next.waiting.as_ref().is_some_and(is_ready) {
            let room = held.map_or(next.needed, Room::of).ahead();
            self.settle_now(&mut next, Some((slot, room, held)))?;
        }
        Ok(())
    }

    fn next(&self) -> MutexGuard<'_, Next> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Self::settle`]; `ahead` = where to put maps for the next revision, how large, and what they hold.
    fn settle_now(&self, next: &mut Next, ahead: Option<(u32, Room, Option<&Tables>)>) -> Result<(), Error> {
        next.waiting = None;
        let active = self.active()?;
        // A plain array write, as that of `CONTROL`, waits for nobody. Writing to an outer slot waits for a grace period:
        // after it no program that read the old word is still running, and the old slot can go.
        match ahead {
            Some((slot, mut room, held)) => {
                let mut maps = make(room)?;
                let shared =
                    next.prefixes.as_ref().filter(|known| held.is_some_and(|t| t.prefixes_digest() == known.digest));
                if let Some(known) = shared {
                    maps[PREFIXES] = known.map.try_clone().map_err(|e| Error::sys("keep the map of prefixes", e))?;
                    room.prefixes = known.room;
                }
                if let Some(tables) = held {
                    fill_rules(maps[RULES].as_fd(), tables)?;
                }
                let (rules_ahead, prefixes_ahead) = (held.is_some(), shared.is_some());
                let inner = self.install(slot, maps, room)?;
                next.waiting = Some(Inner { rules_ahead, prefixes_ahead, ..inner });
            }
            None if next.unsettled => {
                if let Some(map) = sys::outer_get(self.map(OUTER[0])?, active.slot)
                    .map_err(|e| Error::sys(format!("open slot {} of {}", active.slot, OUTER[0]), e))?
                {
                    sys::outer_set(self.map(OUTER[0])?, active.slot, map.as_fd())
                        .map_err(|e| Error::sys("wait for the programs of the last generation", e))?;
                }
            }
            None => {}
        }
        next.unsettled = false;
        // What is not cleared costs memory, and the next one comes by again.
        let keep = [Some(active.slot), ahead.map(|(slot, _, _)| slot)];
        let others = || (0..bounds::SLOTS).filter(|slot| !keep.contains(&Some(*slot)));
        let cleared = self.on_each(|_, outer| others().try_for_each(|slot| sys::outer_clear(outer, slot)));
        if let Err(error) = cleared {
            tracing::warn!("old generations are kept: {error}");
        }
        Ok(())
    }

    /// Puts maps into a slot that `CONTROL` does not name.
    fn install(&self, slot: u32, maps: Vec<OwnedFd>, room: Room) -> Result<Inner, Error> {
        let inner = Inner { slot, room, maps, rules_ahead: false, prefixes_ahead: false };
        self.on_each(|i, outer| sys::outer_set(outer, slot, inner.maps[i].as_fd()))
            .map_err(|e| Error::sys(format!("put new maps into slot {slot}"), e))?;
        Ok(inner)
    }

    /// Does the same to all outer maps at once, so that they wait for the same grace period.
    fn on_each(&self, work: impl Fn(usize, BorrowedFd<'_>) -> std::io::Result<()> + Sync) -> std::io::Result<()> {
        let outer: Vec<BorrowedFd<'_>> =
            OUTER.iter().map(|name| self.map(name)).collect::<Result<_, _>>().map_err(std::io::Error::other)?;
        std::thread::scope(|scope| {
            let work = &work;
            let all: Vec<_> = outer.into_iter().enumerate().map(|(i, map)| scope.spawn(move || work(i, map))).collect();
            let ended = all.into_iter().map(|one| one.join().unwrap_or_else(|_| Err(std::io::Error::other("panic"))));
            // All are waited for, also after the first that failed.
            ended.fold(Ok(()), std::io::Result::and)
        })
    }

    /// Are these the maps of their slot?
    fn is_in(&self, inner: &Inner) -> Result<bool, Error> {
        let ours: Result<Vec<u32>, _> = inner.maps.iter().map(|m| sys::map_info(m.as_fd()).map(|i| i.id)).collect();
        Ok(ours.is_ok_and(|ours| self.inner_maps(inner.slot).is_ok_and(|there| there == ours)))
    }

    /// Numbers of the inner maps of a slot: the maps are frozen, so the same numbers are the same tables.
    pub fn inner_maps(&self, slot: u32) -> Result<Vec<u32>, Error> {
        let id = |name: &str| -> Result<u32, Error> {
            let read = sys::outer_id(self.map(name)?, slot);
            read.map_err(|e| Error::sys(format!("read slot {slot} of {name}"), e))
        };
        OUTER.iter().map(|name| id(name)).collect()
    }

    /// The word of `control::FLAGS`.
    pub fn host_flags(&self) -> Result<u64, Error> {
        let word = sys::map_lookup::<u32, u64>(self.map("CONTROL")?, &control::FLAGS);
        Ok(word.map_err(|e| Error::sys("read CONTROL", e))?.unwrap_or(0))
    }

    /// Makes the word that says what is in force say so again.
    pub fn restore_active(&self, active: Active) -> Result<Active, Error> {
        let next = Active { generation: after(active.generation), slot: active.slot };
        self.set_active(next)?;
        Ok(next)
    }

    /// What the kernel holds in a slot, as tables (without the names, which it never sees).
    pub fn read_back(&self, slot: u32) -> Result<Tables, Error> {
        let open = |name: &str| -> Result<OwnedFd, Error> {
            sys::outer_get(self.map(name)?, slot)
                .map_err(|e| Error::sys(format!("open slot {slot} of {name}"), e))?
                .ok_or_else(|| {
                    Error::sys(format!("slot {slot} of {name} is empty"), std::io::ErrorKind::NotFound.into())
                })
        };
        let maps = OUTER.iter().map(|name| open(name)).collect::<Result<_, _>>()?;
        let inner = Inner { slot, room: Room::default(), maps, rules_ahead: false, prefixes_ahead: false };
        Ok(inner.read()?.tables())
    }
}

/// The next generation number; 0 means "no policy" and is never used again.
fn after(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

/// Index into [`OUTER`].
const RULES: usize = 1;
/// Index into [`OUTER`].
const PREFIXES: usize = 4;

fn make_one(kind: u32, key: usize, value: usize, n: u32, flags: u32, name: &str) -> Result<OwnedFd, Error> {
    sys::map_create(kind, key, value, n, flags, name)
        .map_err(|e| Error::sys(format!("make the map {name} with room for {n} entries"), e))
}

fn make_prefixes(room: u32) -> Result<OwnedFd, Error> {
    let flags = sys::F_RDONLY_PROG | sys::F_NO_PREALLOC;
    make_one(sys::MAP_TYPE_LPM_TRIE, size_of::<PrefixKey>(), 4, room, flags, OUTER[PREFIXES])
}

fn fill_rules(map: BorrowedFd<'_>, tables: &Tables) -> Result<(), Error> {
    let (keys, values): (Vec<_>, Vec<_>) = tables.rules.iter().map(|(k, v)| (*k, *v)).unzip();
    sys::map_fill(map, &keys, &values).map_err(|e| Error::sys(format!("fill the map {}", OUTER[RULES]), e))
}

/// The keys of which these entries and the tables do not say the same.
fn differing(mut held: Vec<(RuleKey, RuleEntry)>, tables: &Tables) -> Vec<RuleKey> {
    held.sort_unstable_by_key(|e| e.0);
    let find = |key: &RuleKey| held.binary_search_by_key(key, |e| e.0).ok().and_then(|i| held.get(i));
    let gone = held.iter().map(|(key, _)| *key).filter(|key| !tables.rules.contains_key(key));
    let other = tables.rules.iter().filter(|(key, entry)| find(key).is_none_or(|(_, held)| held != *entry));
    gone.chain(other.map(|(key, _)| *key)).collect()
}

/// Empty inner maps, in the order of [`OUTER`].
fn make(room: Room) -> Result<Vec<OwnedFd>, Error> {
    const READ_ONLY: u32 = sys::F_RDONLY_PROG;
    let entry = size_of::<RuleEntry>();
    Ok(vec![
        make_one(sys::MAP_TYPE_ARRAY, 4, 65536 * 2, Proto::COUNT, READ_ONLY, OUTER[0])?,
        make_one(sys::MAP_TYPE_HASH, size_of::<RuleKey>(), entry, room.rules, READ_ONLY, OUTER[RULES])?,
        make_one(sys::MAP_TYPE_HASH, 4, entry, room.timeline, READ_ONLY, OUTER[2])?,
        make_one(sys::MAP_TYPE_HASH, 4, size_of::<LocalEntry>(), room.locals, READ_ONLY, OUTER[3])?,
        make_prefixes(room.prefixes)?,
    ])
}

impl Inner {
    /// In the order of [`OUTER`].
    fn map(&self, index: usize) -> BorrowedFd<'_> {
        self.maps[index].as_fd()
    }

    /// Fills, freezes and reads back: `true` = the maps hold what the tables say. `RULES` and `PREFIXES`, which can be large,
    /// each by a thread.
    fn take(&self, tables: &Tables) -> Result<bool, Error> {
        if tables.rules.len() + tables.prefixes.len() < AHEAD {
            return Ok(self.take_small(tables)? & self.take_rules(tables)? & self.take_prefixes(tables)?);
        }
        std::thread::scope(|scope| {
            let prefixes = scope.spawn(|| self.take_prefixes(tables));
            let others = self.take_small(tables).and_then(|same| Ok(same & self.take_rules(tables)?));
            let panicked = || Error::sys("fill the maps", std::io::Error::other("panic"));
            Ok(prefixes.join().map_err(|_| panicked())?? & others?)
        })
    }

    fn take_small(&self, tables: &Tables) -> Result<bool, Error> {
        for (proto, of_ports) in tables.classes.iter().enumerate() {
            // The kernel reads as much as the map's values hold, however long this is.
            if of_ports.len() != 65536 {
                return Err(Error::sys(
                    format!("{} classes of ports instead of 65536", of_ports.len()),
                    std::io::ErrorKind::InvalidInput.into(),
                ));
            }
            sys::map_update_slice(self.map(0), &(proto as u32), of_ports).map_err(filling(0))?;
        }
        let keys: Vec<u32> = (0..tables.timeline.len() as u32).collect();
        sys::map_fill(self.map(2), &keys, &tables.timeline).map_err(filling(2))?;
        let (keys, values): (Vec<_>, Vec<_>) = tables.locals.iter().map(|(k, v)| (k.0, *v)).unzip();
        sys::map_fill(self.map(3), &keys, &values).map_err(filling(3))?;
        [0, 2, 3].into_iter().try_for_each(|i| self.freeze(i))?;
        let classes = self.read_classes()?;
        let timeline: Vec<(u32, RuleEntry)> = self.dump(2)?;
        let locals: Vec<(u32, LocalEntry)> = self.dump(3)?;
        Ok(classes == tables.classes
            && timeline.iter().map(|(k, v)| (*k as usize, v)).eq(tables.timeline.iter().enumerate())
            && locals.iter().map(|(k, v)| (Identity(*k), v)).eq(tables.locals.iter().map(|(k, v)| (*k, v))))
    }

    fn take_rules(&self, tables: &Tables) -> Result<bool, Error> {
        if !self.rules_ahead {
            fill_rules(self.map(RULES), tables)?;
        }
        self.freeze(RULES)?;
        let begun = std::time::Instant::now();
        let held = self.dump_rules()?;
        tracing::debug!(took = ?begun.elapsed(), "rules read back");
        let sum = Sum::new();
        let same =
            held.len() == tables.rules.len() && sum.of(held.iter().map(|(k, v)| (k, v))) == sum.of(tables.rules.iter());
        tracing::debug!(took = ?begun.elapsed(), "rules compared");
        Ok(same)
    }

    fn take_prefixes(&self, tables: &Tables) -> Result<bool, Error> {
        if self.prefixes_ahead {
            return Ok(true);
        }
        let (keys, values): (Vec<_>, Vec<_>) = tables.prefixes.iter().map(|(k, v)| (*k, v.0)).unzip();
        sys::map_fill(self.map(PREFIXES), &keys, &values).map_err(filling(PREFIXES))?;
        self.freeze(PREFIXES)?;
        let held: Vec<(PrefixKey, u32)> = self.dump(PREFIXES)?;
        Ok(held.iter().map(|(k, v)| (*k, Identity(*v))).eq(tables.prefixes.iter().map(|(k, v)| (*k, *v))))
    }

    /// Makes these keys of `RULES` say what the tables say.
    fn amend(&self, tables: &Tables, keys: &[RuleKey]) -> Result<(), Error> {
        let (mut at, mut entries) = (Vec::new(), Vec::new());
        for key in keys {
            match tables.rules.get(key) {
                Some(entry) => {
                    at.push(*key);
                    entries.push(*entry);
                }
                None => drop(sys::map_delete(self.map(RULES), key).map_err(filling(RULES))?),
            }
        }
        sys::map_fill(self.map(RULES), &at, &entries).map_err(filling(RULES))
    }

    fn freeze(&self, index: usize) -> Result<(), Error> {
        sys::map_freeze(self.map(index)).map_err(|e| Error::sys(format!("freeze the map {}", OUTER[index]), e))
    }

    /// In no order.
    fn dump_rules(&self) -> Result<Vec<(RuleKey, RuleEntry)>, Error> {
        let size = sys::map_info(self.map(RULES)).map(|i| i.max_entries as usize).unwrap_or(0);
        sys::map_dump(self.map(RULES), size).map_err(reading(RULES))
    }

    /// In the order of the keys.
    fn dump<K: aya::Pod + Ord, V: aya::Pod>(&self, index: usize) -> Result<Vec<(K, V)>, Error> {
        let size = sys::map_info(self.map(index)).map(|i| i.max_entries as usize).unwrap_or(0);
        let mut all: Vec<(K, V)> = sys::map_dump(self.map(index), size).map_err(reading(index))?;
        all.sort_unstable_by_key(|e| e.0);
        Ok(all)
    }

    fn read_classes(&self) -> Result<Vec<Vec<u16>>, Error> {
        let mut classes = Vec::new();
        for proto in 0..Proto::COUNT {
            let mut bytes = vec![0u8; 65536 * 2];
            let found = sys::map_lookup_into(self.map(0), &proto, &mut bytes).map_err(reading(0))?;
            debug_assert!(found);
            classes.push(bytes.chunks_exact(2).map(|c| u16::from_ne_bytes([c[0], c[1]])).collect());
        }
        Ok(classes)
    }

    fn read(&self) -> Result<Held, Error> {
        Ok(Held {
            classes: self.read_classes()?,
            rules: self.dump(RULES)?,
            timeline: self.dump(2)?,
            locals: self.dump(3)?,
            prefixes: self.dump(PREFIXES)?,
        })
    }
}

fn filling(index: usize) -> impl FnOnce(std::io::Error) -> Error {
    move |e| Error::sys(format!("fill the map {}", OUTER[index]), e)
}

fn reading(index: usize) -> impl FnOnce(std::io::Error) -> Error {
    move |e| Error::sys(format!("read back {}", OUTER[index]), e)
}

/// A sum over entries in any order, under keys that nobody knows before: two sets of the same size that differ have the same
/// sum once in about 2^64. To sort a hundred thousand entries takes ten times as long.
struct Sum([u64; 4]);

impl Sum {
    fn new() -> Self {
        use std::hash::BuildHasher;
        let state = std::hash::RandomState::new();
        // Odd, so that no multiplication forgets what it was given.
        Self([0u64, 1, 2, 3].map(|i| state.hash_one(i) | 1))
    }

    fn of<'e>(&self, entries: impl Iterator<Item = (&'e RuleKey, &'e RuleEntry)>) -> u128 {
        entries.fold(0, |sum, (key, entry)| sum.wrapping_add(self.term(key, entry)))
    }

    fn term(&self, key: &RuleKey, entry: &RuleEntry) -> u128 {
        let RuleKey { local, remote, class, proto, direction } = *key;
        let RuleEntry { until, rule, pending_rule, next, action, reason, pending, flags } = *entry;
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let words = [
            pair(local.0, remote.0),
            pair(u32::from(class), u32::from_be_bytes([0, 0, proto, direction])),
            until,
            pair(rule, pending_rule),
            pair(next, u32::from_be_bytes([action, reason, pending, flags])),
        ];
        let [a, b, c, d] = self.0;
        let mix = |from: u64, by: u64| {
            words.iter().fold(from, |state, word| {
                let wide = u128::from(state ^ word) * u128::from(by);
                (wide as u64) ^ ((wide >> 64) as u64)
            })
        };
        u128::from(mix(a, b)) << 64 | u128::from(mix(c, d))
    }
}

/// What the kernel holds in a slot, each map in the order of its keys.
struct Held {
    classes: Vec<Vec<u16>>,
    rules: Vec<(RuleKey, RuleEntry)>,
    timeline: Vec<(u32, RuleEntry)>,
    locals: Vec<(u32, LocalEntry)>,
    prefixes: Vec<(PrefixKey, u32)>,
}

impl Held {
    /// Without the names, which the kernel never sees.
    fn tables(self) -> Tables {
        let Self { classes, rules, timeline, locals, prefixes } = self;
        Tables {
            classes,
            rules: rules.into_iter().collect(),
            timeline: timeline.into_iter().map(|(_, entry)| entry).collect(),
            locals: locals.into_iter().map(|(k, v)| (Identity(k), v)).collect(),
            prefixes: prefixes.into_iter().map(|(k, v)| (k, Identity(v))).collect(),
            ..Tables::default()
        }
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
