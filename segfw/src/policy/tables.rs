//! The compiled policy: sorted, plain, counted. `datapath` writes it into maps; `decide` can also read it here.

use super::host_policy::{Labels, Position, Rule};
use foldhash::HashMap;
use ipnet::IpNet;
use segfw_common::rule::PrefixKey;
use segfw_common::{Addr, Identity, LocalEntry, Lookup, Proto, RuleEntry, RuleKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::sync::Arc;

/// One generation as plain data. Equal input gives equal tables, to the byte.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    pub rules: BTreeMap<RuleKey, RuleEntry>,
    pub timeline: Vec<RuleEntry>,
    pub locals: BTreeMap<Identity, LocalEntry>,
    pub prefixes: BTreeMap<PrefixKey, Identity>,
    /// By `Proto as usize`: 65,536 classes each.
    pub classes: Vec<Vec<u16>>,
    /// What the numbers mean; never written to the kernel.
    pub identities: BTreeMap<Identity, IdentityName>,
    pub rule_names: BTreeMap<u32, RuleName>,
    /// The next boot time (ns) at which the compiler should be asked again, because a timeline was cut short.
    pub refresh_at: Option<u64>,
}

/// What an identity stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IdentityName {
    Reserved(&'static str),
    Labels(Labels),
    Prefix(IpNet),
}

/// Who wrote a rule, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleName {
    pub policy: Arc<str>,
    pub rule: Arc<str>,
    pub tier: super::host_policy::Tier,
    pub at: Position,
    /// Entries of `rules` that name this rule: what it costs.
    pub entries: usize,
}

impl RuleName {
    /// Of a rule that so many entries name.
    pub fn of(rule: &Rule, entries: usize) -> Self {
        Self {
            policy: Arc::clone(&rule.policy),
            rule: Arc::clone(&rule.name),
            tier: rule.tier,
            at: rule.at.clone(),
            entries,
        }
    }
}

/// Numbers for identities and rules. Once given, a number keeps its meaning as long as the pinned maps live, since
/// sockets and counters hold it; the agent therefore stores this beside the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    /// Canonical text (`app=web,tier=api`, `10.0.0.0/8`) → number, from `Identity::FIRST_DYNAMIC`.
    pub identities: Given,
    /// `policy/rule` → number, from 1.
    pub rules: Given,
    /// Added to both; see [`Numbers::skip`].
    #[serde(default)]
    base: u32,
}

/// Numbers by text. Copies share it until one of them gets a new number: most revisions are tried and given none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given(Arc<HashMap<String, u32>>);

impl std::ops::Deref for Given {
    type Target = HashMap<String, u32>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Serialize for Given {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Given {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        HashMap::deserialize(deserializer).map(|map| Self(Arc::new(map)))
    }
}

impl Numbers {
    /// Starts behind every number that may be in use: `room` apart, at a place that depends on `salt` (the boot time),
    /// for the case that the meaning of the old numbers is lost while sockets still hold them.
    pub fn skip(&mut self, room: u32, salt: u64) {
        self.base = (room as u64 + salt % u64::from(room)) as u32;
    }

    pub fn identity(&mut self, canonical: &str) -> Identity {
        Identity(number(&mut self.identities, canonical, Identity::FIRST_DYNAMIC + self.base))
    }
    pub fn labels(&mut self, labels: &Labels) -> Identity {
        self.identity(&canonical(labels))
    }
    /// The number of a rule that has one.
    pub fn known_rule(&self, policy: &str, rule: &str) -> Option<u32> {
        self.rules.get(&rule_key(policy, rule)).copied()
    }
    pub fn rule(&mut self, policy: &str, rule: &str) -> u32 {
        number(&mut self.rules, &rule_key(policy, rule), 1 + self.base)
    }
}

/// `policy/rule`.
fn rule_key(policy: &str, rule: &str) -> String {
    [policy, "/", rule].concat()
}

fn number(map: &mut Given, key: &str, first: u32) -> u32 {
    if let Some(n) = map.get(key) {
        return *n;
    }
    // Numbers are never reused, so the count is the next one.
    let n = first + map.len() as u32;
    let _ = Arc::make_mut(&mut map.0).insert(key.to_owned(), n);
    n
}

/// `k=v,k=v`, sorted by key.
pub fn canonical(labels: &Labels) -> String {
    labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
}

impl Tables {
    /// A digest of everything the kernel gets, and of nothing else: what is read back from the maps gives the same.
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = Digest::new();
        digest.section(b"rules", self.rules.len());
        for (key, entry) in &self.rules {
            digest.key(key);
            digest.entry(entry);
        }
        digest.section(b"timeline", self.timeline.len());
        for entry in &self.timeline {
            digest.entry(entry);
        }
        digest.section(b"locals", self.locals.len());
        for (identity, local) in &self.locals {
            let LocalEntry { drain_ns, flags, grants, default, default_reason, pad: _ } = local;
            digest.put(&identity.0.to_le_bytes());
            digest.put(&drain_ns.to_le_bytes());
            digest.put(&flags.to_le_bytes());
            digest.put(&grants.to_le_bytes());
            digest.put(&[default[0], default[1], *default_reason]);
        }
        digest.section(b"prefixes", self.prefixes.len());
        for (PrefixKey { bits, addr }, identity) in &self.prefixes {
            digest.put(&bits.to_le_bytes());
            digest.put(&addr.octets());
            digest.put(&identity.0.to_le_bytes());
        }
        digest.section(b"classes", self.classes.len());
        for class in self.classes.iter().flatten() {
            digest.put(&class.to_le_bytes());
        }
        digest.finish()
    }

    /// Would the kernel get the same? What [`Self::digest`] covers, compared entry by entry.
    pub fn say_the_same(&self, other: &Self) -> bool {
        self.rules == other.rules
            && self.timeline == other.timeline
            && self.locals == other.locals
            && self.prefixes == other.prefixes
            && self.classes == other.classes
    }

    /// The number of a label set or prefix, where these tables know it.
    pub fn identity_of(&self, name: &IdentityName) -> Option<Identity> {
        self.identities.iter().find(|(_, n)| *n == name).map(|(id, _)| *id)
    }

    /// Identity of the longest prefix that holds an address.
    pub fn longest_prefix(&self, addr: &Addr) -> Option<Identity> {
        let whole = u128::from_be_bytes(addr.octets());
        let mut bits = 128;
        loop {
            let mask = if bits == 0 { 0 } else { u128::MAX << (128 - bits) };
            let masked = PrefixKey { bits, addr: Addr::v6((whole & mask).to_be_bytes()) };
            let (below, identity) = self.prefixes.range(..=masked).next_back()?;
            if *below == masked {
                return Some(*identity);
            }
            // Skip the lengths that nobody uses.
            bits = if below.bits < bits { below.bits } else { bits.checked_sub(1)? };
        }
    }
}

/// Hashing a few bytes at a time costs more than hashing them.
struct Digest {
    sha: Sha256,
    buffer: Vec<u8>,
}

impl Digest {
    const CHUNK: usize = 1 << 14;

    fn new() -> Self {
        Self { sha: Sha256::new(), buffer: Vec::with_capacity(Self::CHUNK + 64) }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= Self::CHUNK {
            self.sha.update(&self.buffer);
            self.buffer.clear();
        }
    }
    fn section(&mut self, name: &[u8], len: usize) {
        self.put(name);
        self.put(&(len as u64).to_le_bytes());
    }
    fn key(&mut self, key: &RuleKey) {
        let RuleKey { local, remote, class, proto, direction } = key;
        self.put(&local.0.to_le_bytes());
        self.put(&remote.0.to_le_bytes());
        self.put(&class.to_le_bytes());
        self.put(&[*proto, *direction]);
    }
    fn entry(&mut self, entry: &RuleEntry) {
        let RuleEntry { until, rule, pending_rule, next, action, reason, pending, flags } = entry;
        self.put(&until.to_le_bytes());
        self.put(&rule.to_le_bytes());
        self.put(&pending_rule.to_le_bytes());
        self.put(&next.to_le_bytes());
        self.put(&[*action, *reason, *pending, *flags]);
    }
    fn finish(mut self) -> [u8; 32] {
        self.sha.update(&self.buffer);
        self.sha.finalize().into()
    }
}

/// Tables at a moment, for `segfw_common::decide` in user space.
#[derive(Clone, Copy, Debug)]
pub struct TablesView<'a> {
    pub tables: &'a Tables,
    /// Boot nanoseconds.
    pub now: u64,
    /// Bits of `control::HOST_*`.
    pub host_flags: u64,
}

impl Lookup for TablesView<'_> {
    fn now(&self) -> u64 {
        self.now
    }
    fn host_flags(&self) -> u64 {
        self.host_flags
    }
    fn has_policy(&self) -> bool {
        true
    }
    fn local(&self, identity: Identity) -> Option<LocalEntry> {
        self.tables.locals.get(&identity).copied()
    }
    fn class(&self, proto: Proto, port: u16) -> u16 {
        let of_proto = self.tables.classes.get(proto as usize);
        of_proto.and_then(|c| c.get(usize::from(port))).copied().unwrap_or(0)
    }
    fn rule(&self, key: &RuleKey) -> Option<RuleEntry> {
        self.tables.rules.get(key).copied()
    }
    fn timeline(&self, index: u32) -> Option<RuleEntry> {
        self.tables.timeline.get(index as usize).copied()
    }
    fn prefix(&self, addr: &Addr) -> Option<Identity> {
        self.tables.longest_prefix(addr)
    }
}
