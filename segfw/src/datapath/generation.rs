//! From tables to a generation the kernel uses: fill aside, freeze, read back, compare, switch.
//!
//! The order never opens a hole: `CONTROL` names a slot only when everything in it was proven, and the old slot stays
//! whole until no program can be in it any more.
//!
//! Each write to an outer map costs a grace period of RCU, so none is on the way of a revision: empty inner maps wait in
//! the next slot, where no program looks before `CONTROL` says so ([`Datapath::settle`] puts them there, after the switch
//! before). A revision that needs larger ones has them put there first.

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

/// What lies ready for the next revision, and what the last one left to do.
#[derive(Debug, Default)]
pub struct Next {
    /// Empty and not frozen, in a slot that `CONTROL` does not name.
    waiting: Option<Inner>,
    /// Programs may still be in another slot than the one in force, or other slots are not emptied.
    unsettled: bool,
    /// Room that the last revision needed.
    needed: Room,
}

/// One inner map for each of [`OUTER`], in one slot.
#[derive(Debug)]
struct Inner {
    slot: u32,
    room: Room,
    maps: Vec<OwnedFd>,
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
        let mut next = self.next();
        let old = self.active()?;
        let slot = (old.slot + 1) % bounds::SLOTS;
        let needed = Room::of(tables);
        // What somebody put there in place of ours is not used.
        let ready =
            |inner: &Inner| inner.slot == slot && inner.room.holds(needed) && self.is_in(inner).unwrap_or(false);
        let inner = match next.waiting.take().filter(ready) {
            Some(inner) => inner,
            None => {
                // Programs of the generation before this one may be in any slot but the one in force.
                self.settle_now(&mut next, None)?;
                self.install(slot, needed.ahead())?
            }
        };
        inner.fill(tables)?;
        inner.freeze()?;
        if !inner.read()?.holds(tables) {
            let (want, have) = (tables.digest(), self.read_back(slot)?.digest());
            return Err(Error::ReadBack { want: hex(&want), have: hex(&have) });
        }
        // What was written into the maps is there for whoever reads the word.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let new = Active { generation: after(old.generation), slot };
        self.set_active(new)?;
        next.unsettled = true;
        next.needed = needed;
        Ok(new)
    }

    /// Returns when no program judges by an older slot any more; then those are empty, and maps for the next revision wait
    /// in the one after. Costs two grace periods if there is something to do.
    pub fn settle(&self) -> Result<(), Error> {
        let mut next = self.next();
        let active = self.active()?;
        if active.generation == 0 {
            return Ok(());
        }
        let slot = (active.slot + 1) % bounds::SLOTS;
        if next.unsettled || next.waiting.as_ref().is_none_or(|inner| inner.slot != slot) {
            let room = next.needed.ahead();
            self.settle_now(&mut next, Some((slot, room)))?;
        }
        Ok(())
    }

    fn next(&self) -> MutexGuard<'_, Next> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Self::settle`]; `ahead` = where to put maps for the next revision, and how large.
    fn settle_now(&self, next: &mut Next, ahead: Option<(u32, Room)>) -> Result<(), Error> {
        next.waiting = None;
        let active = self.active()?;
        // A plain array write, as that of `CONTROL`, waits for nobody. Writing to an outer slot waits for a grace period:
        // after it no program that read the old word is still running, and the old slot can go.
        match ahead {
            Some((slot, room)) => next.waiting = Some(self.install(slot, room)?),
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
        let keep = [Some(active.slot), ahead.map(|(slot, _)| slot)];
        let others = || (0..bounds::SLOTS).filter(|slot| !keep.contains(&Some(*slot)));
        let cleared = self.on_each(|_, outer| others().try_for_each(|slot| sys::outer_clear(outer, slot)));
        if let Err(error) = cleared {
            tracing::warn!("old generations are kept: {error}");
        }
        Ok(())
    }

    /// Makes empty maps and puts them into a slot that `CONTROL` does not name.
    fn install(&self, slot: u32, room: Room) -> Result<Inner, Error> {
        let inner = Inner { slot, room, maps: make(room)? };
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
        Ok(Inner { slot, room: Room::default(), maps }.read()?.tables())
    }
}

/// The next generation number; 0 means "no policy" and is never used again.
fn after(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

/// Empty inner maps, in the order of [`OUTER`].
fn make(room: Room) -> Result<Vec<OwnedFd>, Error> {
    const READ_ONLY: u32 = sys::F_RDONLY_PROG;
    let make = |kind, key, value, n, flags, name: &str| {
        sys::map_create(kind, key, value, n, flags, name)
            .map_err(|e| Error::sys(format!("make the map {name} with room for {n} entries"), e))
    };
    let entry = size_of::<RuleEntry>();
    Ok(vec![
        make(sys::MAP_TYPE_ARRAY, 4, 65536 * 2, Proto::COUNT, READ_ONLY, OUTER[0])?,
        make(sys::MAP_TYPE_HASH, size_of::<RuleKey>(), entry, room.rules, READ_ONLY, OUTER[1])?,
        make(sys::MAP_TYPE_HASH, 4, entry, room.timeline, READ_ONLY, OUTER[2])?,
        make(sys::MAP_TYPE_HASH, 4, size_of::<LocalEntry>(), room.locals, READ_ONLY, OUTER[3])?,
        make(
            sys::MAP_TYPE_LPM_TRIE,
            size_of::<PrefixKey>(),
            4,
            room.prefixes,
            READ_ONLY | sys::F_NO_PREALLOC,
            OUTER[4],
        )?,
    ])
}

impl Inner {
    /// In the order of [`OUTER`].
    fn map(&self, index: usize) -> BorrowedFd<'_> {
        self.maps[index].as_fd()
    }

    fn fill(&self, tables: &Tables) -> Result<(), Error> {
        let write = |index: usize| {
            let what = format!("fill the map {}", OUTER[index]);
            move |e| Error::sys(what, e)
        };
        for (proto, of_ports) in tables.classes.iter().enumerate() {
            // The kernel reads as much as the map's values hold, however long this is.
            if of_ports.len() != 65536 {
                return Err(Error::sys(
                    format!("{} classes of ports instead of 65536", of_ports.len()),
                    std::io::ErrorKind::InvalidInput.into(),
                ));
            }
            sys::map_update_slice(self.map(0), &(proto as u32), of_ports).map_err(write(0))?;
        }
        let (keys, values): (Vec<_>, Vec<_>) = tables.rules.iter().map(|(k, v)| (*k, *v)).unzip();
        sys::map_fill(self.map(1), &keys, &values).map_err(write(1))?;
        let keys: Vec<u32> = (0..tables.timeline.len() as u32).collect();
        sys::map_fill(self.map(2), &keys, &tables.timeline).map_err(write(2))?;
        let (keys, values): (Vec<_>, Vec<_>) = tables.locals.iter().map(|(k, v)| (k.0, *v)).unzip();
        sys::map_fill(self.map(3), &keys, &values).map_err(write(3))?;
        let (keys, values): (Vec<_>, Vec<_>) = tables.prefixes.iter().map(|(k, v)| (*k, v.0)).unzip();
        sys::map_fill(self.map(4), &keys, &values).map_err(write(4))
    }

    fn freeze(&self) -> Result<(), Error> {
        self.maps.iter().zip(OUTER).try_for_each(|(map, name)| {
            sys::map_freeze(map.as_fd()).map_err(|e| Error::sys(format!("freeze the map {name}"), e))
        })
    }

    fn read(&self) -> Result<Held, Error> {
        let size = |index: usize| sys::map_info(self.map(index)).map(|i| i.max_entries as usize).unwrap_or(0);
        let read = |index: usize| {
            let what = format!("read back {}", OUTER[index]);
            move |e| Error::sys(what, e)
        };
        let mut held = Held {
            rules: sys::map_dump(self.map(1), size(1)).map_err(read(1))?,
            timeline: sys::map_dump(self.map(2), size(2)).map_err(read(2))?,
            locals: sys::map_dump(self.map(3), size(3)).map_err(read(3))?,
            prefixes: sys::map_dump(self.map(4), size(4)).map_err(read(4))?,
            classes: Vec::new(),
        };
        held.rules.sort_unstable_by_key(|e| e.0);
        held.timeline.sort_unstable_by_key(|e| e.0);
        held.locals.sort_unstable_by_key(|e| e.0);
        held.prefixes.sort_unstable_by_key(|e| e.0);
        for proto in 0..Proto::COUNT {
            let mut bytes = vec![0u8; 65536 * 2];
            let found = sys::map_lookup_into(self.map(0), &proto, &mut bytes).map_err(read(0))?;
            debug_assert!(found);
            held.classes.push(bytes.chunks_exact(2).map(|c| u16::from_ne_bytes([c[0], c[1]])).collect());
        }
        Ok(held)
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
    /// Exactly what these tables say, no more and no less?
    fn holds(&self, tables: &Tables) -> bool {
        let Self { classes, rules, timeline, locals, prefixes } = self;
        *classes == tables.classes
            && rules.iter().map(|(k, v)| (k, v)).eq(tables.rules.iter())
            && timeline.iter().map(|(k, v)| (*k as usize, v)).eq(tables.timeline.iter().enumerate())
            && locals.iter().map(|(k, v)| (Identity(*k), v)).eq(tables.locals.iter().map(|(k, v)| (*k, v)))
            && prefixes.iter().map(|(k, v)| (*k, Identity(*v))).eq(tables.prefixes.iter().map(|(k, v)| (*k, *v)))
    }

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
