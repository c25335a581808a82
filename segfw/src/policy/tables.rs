//! The compiled policy: sorted, plain, counted. `datapath` writes it into maps; `decide` can also read it here.

use super::host_policy::{Labels, Position};
use ipnet::IpNet;
use segfw_common::rule::PrefixKey;
use segfw_common::{Identity, LocalEntry, RuleEntry, RuleKey};
use std::collections::BTreeMap;

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
    pub policy: String,
    pub rule: String,
    pub tier: super::host_policy::Tier,
    pub at: Position,
    /// Entries of `rules` that name this rule: what it costs.
    pub entries: usize,
}

/// Numbers for identities and rules. Once given, a number keeps its meaning as long as the pinned maps live, since
/// sockets and counters hold it; the agent therefore stores this beside the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Numbers {
    /// Canonical text (`app=web,tier=api`, `10.0.0.0/8`) → number, from `Identity::FIRST_DYNAMIC`.
    pub identities: BTreeMap<String, u32>,
    /// `policy/rule` → number, from 1.
    pub rules: BTreeMap<String, u32>,
}

impl Numbers {
    pub fn identity(&mut self, canonical: &str) -> Identity {
        Identity(number(&mut self.identities, canonical, Identity::FIRST_DYNAMIC))
    }
    pub fn labels(&mut self, labels: &Labels) -> Identity {
        self.identity(&canonical(labels))
    }
    pub fn rule(&mut self, policy: &str, rule: &str) -> u32 {
        number(&mut self.rules, &format!("{policy}/{rule}"), 1)
    }
}

fn number(map: &mut BTreeMap<String, u32>, key: &str, first: u32) -> u32 {
    if let Some(n) = map.get(key) {
        return *n;
    }
    // Numbers are never reused, so the count is the next one.
    let n = first + map.len() as u32;
    let _ = map.insert(key.to_owned(), n);
    n
}

/// `k=v,k=v`, sorted by key.
pub fn canonical(labels: &Labels) -> String {
    labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
}

impl Tables {
    /// Digest of everything the kernel gets. (Placeholder until the compiler's own lands.)
    pub fn digest(&self) -> [u8; 32] {
        use sha2::Digest;
        sha2::Sha256::digest(format!(
            "{:?}{:?}{:?}{:?}{:?}",
            self.rules, self.timeline, self.locals, self.prefixes, self.classes
        ))
        .into()
    }
}
