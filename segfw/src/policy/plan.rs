//! What would change if these tables became those: for a person to read before `apply`.

use super::tables::{IdentityName, Tables, canonical};
use segfw_common::rule::CLASS_ANY;
use segfw_common::{Action, Direction, Identity, Proto, RuleEntry, RuleKey};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The difference between two generations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Diff {
    /// Entries that only the new tables have.
    pub added: Vec<Change>,
    /// Entries that only the old tables have.
    pub removed: Vec<Change>,
    /// Entries with another answer.
    pub changed: Vec<Change>,
    /// Local identities that are newly enforced, no longer enforced, or have another default, mode or grant.
    pub locals: Vec<String>,
    pub prefixes_added: usize,
    pub prefixes_removed: usize,
}

/// One entry, in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    pub direction: &'static str,
    pub local: String,
    pub remote: String,
    pub ports: String,
    /// `allow by p/r`; absent where there is no entry.
    pub before: Option<String>,
    pub after: Option<String>,
}

/// Compares two generations. Classes are compared by the ports they hold, since their numbers mean nothing across
/// generations; rules by name, since the two may have been compiled with other numbers; and a deadline alone is no
/// difference, since a schedule compiled at another time is cut elsewhere.
pub fn diff(have: &Tables, want: &Tables) -> Diff {
    let mut diff = Diff::default();
    let (old, new) = (Named::new(have), Named::new(want));
    let keys: BTreeSet<&Key> = old.entries.keys().chain(new.entries.keys()).collect();
    for key in keys {
        let (before, after) = (old.entries.get(key), new.entries.get(key));
        if before == after {
            continue;
        }
        let change = || Change {
            direction: key.0.as_str(),
            local: key.1.clone(),
            remote: key.2.clone(),
            ports: key.3.clone(),
            before: before.cloned(),
            after: after.cloned(),
        };
        match (before, after) {
            (None, _) => diff.added.push(change()),
            (_, None) => diff.removed.push(change()),
            (Some(_), Some(_)) => diff.changed.push(change()),
        }
    }
    let names: BTreeSet<&String> = old.locals.keys().chain(new.locals.keys()).collect();
    for name in names {
        match (old.locals.get(name), new.locals.get(name)) {
            (None, Some(after)) => diff.locals.push(format!("{name}: newly enforced ({after})")),
            (Some(_), None) => diff.locals.push(format!("{name}: no longer enforced")),
            (Some(before), Some(after)) if before != after => diff.locals.push(format!("{name}: {before} → {after}")),
            _ => (),
        }
    }
    diff.prefixes_added = want.prefixes.keys().filter(|k| !have.prefixes.contains_key(k)).count();
    diff.prefixes_removed = have.prefixes.keys().filter(|k| !want.prefixes.contains_key(k)).count();
    diff
}

impl Diff {
    /// Nothing would change.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (added, removed, changed) = (self.added.len(), self.removed.len(), self.changed.len());
        writeln!(f, "{added} entries added, {removed} removed, {changed} changed")?;
        if self.prefixes_added + self.prefixes_removed > 0 {
            writeln!(f, "{} prefixes added, {} removed", self.prefixes_added, self.prefixes_removed)?;
        }
        for local in &self.locals {
            writeln!(f, "  {local}")?;
        }
        for (sign, list) in [('+', &self.added), ('-', &self.removed), ('~', &self.changed)] {
            for Change { direction, local, remote, ports, before, after } in list {
                let (source, destination) = if *direction == "egress" { (local, remote) } else { (remote, local) };
                let answer = [before, after].into_iter().flatten().cloned().collect::<Vec<_>>().join(" → ");
                writeln!(f, "{sign} {direction} {source} → {destination} {ports}: {answer}")?;
            }
        }
        Ok(())
    }
}

/// Direction, local, remote, ports.
type Key = (Direction, String, String, String);

/// Tables with names in place of numbers.
struct Named {
    entries: BTreeMap<Key, String>,
    locals: BTreeMap<String, String>,
}

impl Named {
    fn new(tables: &Tables) -> Self {
        let ports = port_names(tables);
        let entries = tables.rules.iter().map(|(key, entry)| (named_key(tables, &ports, key), answer(tables, entry)));
        // One that is open is not enforced: for a reader it is not there.
        let enforced = tables
            .locals
            .iter()
            .filter(|(id, l)| l.flags & segfw_common::LocalEntry::OPEN == 0 && **id != Identity::UNRESOLVED);
        let locals = enforced.map(|(id, local)| {
            let [ingress, egress] = local.default.map(|a| Action::from_raw(a).as_str());
            // The bits above the mode only say which kinds of keys occur.
            let mut text = format!("ingress {ingress}, egress {egress}");
            if local.flags & segfw_common::LocalEntry::MONITOR != 0 {
                text.push_str(", monitored only");
            }
            if local.grants != 0 {
                text.push_str(&format!(", grants {:#x}", local.grants));
            }
            if local.drain_ns != 0 {
                text.push_str(&format!(", on revoke {} s of drain", local.drain_ns / 1_000_000_000));
            }
            (identity_name(tables, *id), text)
        });
        Self { entries: entries.collect(), locals: locals.collect() }
    }
}

fn identity_name(tables: &Tables, identity: Identity) -> String {
    match tables.identities.get(&identity) {
        Some(IdentityName::Reserved(name)) => (*name).to_owned(),
        Some(IdentityName::Labels(labels)) => canonical(labels),
        Some(IdentityName::Prefix(net)) => net.to_string(),
        None if identity == Identity::ANY => "any".into(),
        None => format!("#{}", identity.0),
    }
}

fn named_key(tables: &Tables, ports: &BTreeMap<(u8, u16), String>, key: &RuleKey) -> Key {
    let proto = Proto::from_raw(key.proto).unwrap_or(Proto::Other).as_str();
    let ports = match key.class {
        CLASS_ANY => proto.to_owned(),
        class => {
            let named = ports.get(&(key.proto, class)).map_or("", String::as_str);
            format!("{proto}/{named}")
        }
    };
    let direction = Direction::from_raw(key.direction).unwrap_or(Direction::Egress);
    (direction, identity_name(tables, key.local), identity_name(tables, key.remote), ports)
}

/// The ports of each class: `80,443,6000-6010`.
fn port_names(tables: &Tables) -> BTreeMap<(u8, u16), String> {
    let mut names: BTreeMap<(u8, u16), String> = BTreeMap::new();
    for (proto, classes) in tables.classes.iter().enumerate() {
        let mut first = 0usize;
        for stretch in classes.chunk_by(|a, b| a == b) {
            let last = first + stretch.len() - 1;
            let name = names.entry((proto as u8, stretch.first().copied().unwrap_or(0))).or_default();
            if !name.is_empty() {
                name.push(',');
            }
            name.push_str(&if first == last { format!("{first}") } else { format!("{first}-{last}") });
            first = last + 1;
        }
    }
    names
}

fn answer(tables: &Tables, entry: &RuleEntry) -> String {
    let mut text = String::new();
    let mut part = Some(*entry);
    let name =
        |rule: u32| tables.rule_names.get(&rule).map_or("default".into(), |n| format!("{}/{}", n.policy, n.rule));
    // A chain is at most this long; a broken one must not hang us.
    for _ in 0..=segfw_common::bounds::TIMELINE_HOPS {
        let Some(entry) = part else { break };
        if !text.is_empty() {
            text.push_str(", then ");
        }
        text.push_str(&format!("{} by {}", Action::from_raw(entry.action).as_str(), name(entry.rule)));
        if entry.pending != 0 {
            text.push_str(&format!(
                " (pending {} by {})",
                Action::from_raw(entry.pending).as_str(),
                name(entry.pending_rule)
            ));
        }
        if entry.demanded() != 0 {
            let evidence =
                segfw_common::Evidence::from_raw(entry.demanded()).map_or("?", segfw_common::Evidence::as_str);
            text.push_str(&format!(" requiring {evidence}"));
        }
        if entry.flags & RuleEntry::NO_LOG != 0 {
            text.push_str(" unlogged");
        }
        part = entry.next.checked_sub(1).and_then(|i| tables.timeline.get(i as usize)).copied();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::compile::testing::{clock, labels, policy};
    use super::super::{compile::compile, tables::Numbers};
    use super::*;

    fn tables(rules: &[&str]) -> Tables {
        compile(&policy(rules), &[labels("app=db")], &[labels("app=web")], &mut Numbers::default(), clock()).unwrap()
    }

    #[test]
    fn one_port_more_and_one_answer_changed() {
        let have = tables(&["allow web -> db tcp/5432", "allow web -> db tcp/80"]);
        assert!(diff(&have, &have).is_empty());
        let want = tables(&["allow web -> db tcp/5432", "deny web -> db tcp/80", "allow web -> db tcp/443"]);
        let diff = diff(&have, &want);
        assert_eq!((diff.added.len(), diff.removed.len(), diff.changed.len()), (1, 0, 1));
        let text = diff.to_string();
        assert!(text.contains("+ ingress app=web → app=db tcp/443: allow by p/r2"), "{text}");
        assert!(text.contains("~ ingress app=web → app=db tcp/80: allow by p/r1 → deny by p/r1"), "{text}");
    }
}
