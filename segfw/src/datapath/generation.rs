//! From tables to a generation the kernel uses: fill aside, freeze, read back, compare, switch, wait.
//!
//! The order never opens a hole: `CONTROL` names a slot only when everything in it was proven, and the old slot stays
//! whole until no program can be in it any more.

use super::{Datapath, Error, sys};
use crate::policy::Tables;
use segfw_common::rule::{PrefixKey, Proto};
use segfw_common::{Identity, LocalEntry, RuleEntry, RuleKey, bounds, control};
use std::os::fd::{AsFd, OwnedFd};

/// The outer maps, each with one inner map per generation.
const OUTER: [&str; 5] = ["CLASSES", "RULES", "TIMELINE", "LOCALS", "PREFIXES"];

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
        let next = Active { generation: next(active.generation), slot: active.slot };
        if active.generation != 0 {
            self.set_active(next)?;
        }
        Ok(next)
    }

    /// Puts tables in force. On any error the generation in force stays as it is.
    pub fn publish(&self, tables: &Tables) -> Result<Active, Error> {
        let old = self.active()?;
        let slot = (old.slot + 1) % bounds::SLOTS;
        let inner = fill(tables)?;
        for (name, map) in OUTER.iter().zip(&inner) {
            sys::outer_set(self.map(name)?, slot, map.as_fd())
                .map_err(|e| Error::sys(format!("put the new {name} into slot {slot}"), e))?;
        }
        let (want, have) = (tables.digest(), self.read_back(slot)?.digest());
        if want != have {
            return Err(Error::ReadBack { want: hex(&want), have: hex(&have) });
        }
        let new = Active { generation: next(old.generation), slot };
        self.set_active(new)?;
        // A plain array write waits for nobody. Setting an outer slot again waits for a grace period: after it no program
        // that read the old word is still running, and the old slot can go.
        // The new generation is in force by now, so nothing below may fail the call: what is not cleared costs memory, and
        // the next publish comes by again.
        match sys::outer_set(self.map(OUTER[0])?, slot, inner[0].as_fd()) {
            Ok(()) => {
                for other in (0..bounds::SLOTS).filter(|s| *s != slot) {
                    for name in OUTER {
                        if let Err(error) = sys::outer_clear(self.map(name)?, other) {
                            tracing::warn!("slot {other} of {name} is not emptied: {error}");
                        }
                    }
                }
            }
            Err(error) => tracing::warn!("old generations are kept: {error}"),
        }
        Ok(new)
    }

    /// Numbers of the inner maps of a slot: the maps are frozen, so the same numbers are the same tables.
    pub fn inner_maps(&self, slot: u32) -> Result<Vec<u32>, Error> {
        let id = |name: &str| -> Result<u32, Error> {
            let open = |e| Error::sys(format!("open slot {slot} of {name}"), e);
            let Some(map) = sys::outer_get(self.map(name)?, slot).map_err(open)? else { return Ok(0) };
            sys::map_info(map.as_fd()).map(|info| info.id).map_err(open)
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
        let next = Active { generation: next(active.generation), slot: active.slot };
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
        let size = |map: &OwnedFd| sys::map_info(map.as_fd()).map(|i| i.max_entries as usize).unwrap_or(0);
        let read = |what: &str| {
            let what = format!("read back {what}");
            move |e| Error::sys(what, e)
        };
        let mut tables = Tables::default();
        let map = open("RULES")?;
        tables.rules =
            sys::map_dump::<RuleKey, RuleEntry>(map.as_fd(), size(&map)).map_err(read("RULES"))?.into_iter().collect();
        let map = open("TIMELINE")?;
        let mut parts = sys::map_dump::<u32, RuleEntry>(map.as_fd(), size(&map)).map_err(read("TIMELINE"))?;
        parts.sort_by_key(|(index, _)| *index);
        tables.timeline = parts.into_iter().map(|(_, entry)| entry).collect();
        let map = open("LOCALS")?;
        tables.locals = sys::map_dump::<u32, LocalEntry>(map.as_fd(), size(&map))
            .map_err(read("LOCALS"))?
            .into_iter()
            .map(|(id, entry)| (Identity(id), entry))
            .collect();
        let map = open("PREFIXES")?;
        tables.prefixes = sys::map_dump::<PrefixKey, u32>(map.as_fd(), size(&map))
            .map_err(read("PREFIXES"))?
            .into_iter()
            .map(|(key, id)| (key, Identity(id)))
            .collect();
        let map = open("CLASSES")?;
        for proto in 0..Proto::COUNT {
            let mut bytes = vec![0u8; 65536 * 2];
            let found = sys::map_lookup_into(map.as_fd(), &proto, &mut bytes).map_err(read("CLASSES"))?;
            debug_assert!(found);
            tables.classes.push(bytes.chunks_exact(2).map(|c| u16::from_ne_bytes([c[0], c[1]])).collect());
        }
        Ok(tables)
    }
}

/// The next generation number; 0 means "no policy" and is never used again.
fn next(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

/// Inner maps with everything in them, frozen, in the order of [`OUTER`].
fn fill(tables: &Tables) -> Result<Vec<OwnedFd>, Error> {
    let hash = sys::F_RDONLY_PROG;
    let entries = |n: usize| n.max(1) as u32;
    let make = |kind, key, value, n, flags, name: &str| {
        sys::map_create(kind, key, value, n, flags, name)
            .map_err(|e| Error::sys(format!("make the map {name} with room for {n} entries"), e))
    };
    let write = |name: &str| {
        let what = format!("fill the map {name}");
        move |e| Error::sys(what, e)
    };
    let classes = make(sys::MAP_TYPE_ARRAY, 4, 65536 * 2, Proto::COUNT, hash, "CLASSES")?;
    for (proto, of_ports) in tables.classes.iter().enumerate() {
        // The kernel reads as much as the map's values hold, however long this is.
        if of_ports.len() != 65536 {
            return Err(Error::sys(
                format!("{} classes of ports instead of 65536", of_ports.len()),
                std::io::ErrorKind::InvalidInput.into(),
            ));
        }
        sys::map_update_slice(classes.as_fd(), &(proto as u32), of_ports).map_err(write("CLASSES"))?;
    }
    let n = entries(tables.rules.len());
    let rules = make(sys::MAP_TYPE_HASH, size_of::<RuleKey>(), size_of::<RuleEntry>(), n, hash, "RULES")?;
    let (keys, values): (Vec<_>, Vec<_>) = tables.rules.iter().map(|(k, v)| (*k, *v)).unzip();
    sys::map_fill(rules.as_fd(), &keys, &values).map_err(write("RULES"))?;

    let n = entries(tables.timeline.len());
    let timeline = make(sys::MAP_TYPE_HASH, 4, size_of::<RuleEntry>(), n, hash, "TIMELINE")?;
    let keys: Vec<u32> = (0..tables.timeline.len() as u32).collect();
    sys::map_fill(timeline.as_fd(), &keys, &tables.timeline).map_err(write("TIMELINE"))?;

    let n = entries(tables.locals.len());
    let locals = make(sys::MAP_TYPE_HASH, 4, size_of::<LocalEntry>(), n, hash, "LOCALS")?;
    let (keys, values): (Vec<_>, Vec<_>) = tables.locals.iter().map(|(k, v)| (k.0, *v)).unzip();
    sys::map_fill(locals.as_fd(), &keys, &values).map_err(write("LOCALS"))?;

    let n = entries(tables.prefixes.len());
    let flags = hash | sys::F_NO_PREALLOC;
    let prefixes = make(sys::MAP_TYPE_LPM_TRIE, size_of::<PrefixKey>(), 4, n, flags, "PREFIXES")?;
    let (keys, values): (Vec<_>, Vec<_>) = tables.prefixes.iter().map(|(k, v)| (*k, v.0)).unzip();
    sys::map_fill(prefixes.as_fd(), &keys, &values).map_err(write("PREFIXES"))?;

    let all = vec![classes, rules, timeline, locals, prefixes];
    for (map, name) in all.iter().zip(OUTER) {
        sys::map_freeze(map.as_fd()).map_err(|e| Error::sys(format!("freeze the map {name}"), e))?;
    }
    Ok(all)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
