//! Who stands at the ends of each rule, in a few bytes a rule: to find the rules that name one of a few peers among
//! 100,000, and to put others in their place, without touching all of them.

use crate::policy::host_policy::{HostPolicy, PeerSpec, Rule, Tier};
use crate::policy::resolve::precedence;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Both ends of each rule of a policy, in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends(Vec<Sides>);

/// The ends of one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sides {
    pub(super) from: Peers,
    pub(super) to: Peers,
}

/// The peers at one end: bits for their kinds, and the segment if there is exactly one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Peers(u32);

impl Peers {
    pub(super) const ANY: u32 = 1 << 31;
    pub(super) const WORLD: u32 = 1 << 30;
    pub(super) const HOST: u32 = 1 << 29;
    pub(super) const SELECT: u32 = 1 << 28;
    pub(super) const ADDRESSES: u32 = 1 << 27;
    /// Segments that have no room here.
    pub(super) const SEGMENTS: u32 = 1 << 26;
    /// 1 + the index of a segment; 0 = none. There are at most `yaml::DOCUMENTS`.
    const SEGMENT: u32 = Self::SEGMENTS - 1;

    fn of(peers: &[PeerSpec]) -> Self {
        let mut all = 0;
        for peer in peers {
            all |= match peer {
                PeerSpec::Any => Self::ANY,
                PeerSpec::World => Self::WORLD,
                PeerSpec::Host => Self::HOST,
                PeerSpec::Select(_) => Self::SELECT,
                PeerSpec::Addresses(_) => Self::ADDRESSES,
                PeerSpec::Unresolved => 0,
                PeerSpec::Segment(i) => match u32::try_from(*i + 1) {
                    Ok(number) if number <= Self::SEGMENT && all & Self::SEGMENT == 0 => number,
                    Ok(_) | Err(_) => Self::SEGMENTS,
                },
            };
        }
        Self(all)
    }

    /// One of these kinds is there.
    pub(super) fn has(self, kinds: u32) -> bool {
        self.0 & kinds != 0
    }

    /// The segment that is named; further ones are said by [`Self::SEGMENTS`].
    pub(super) fn segment(self) -> Option<usize> {
        (self.0 & Self::SEGMENT).checked_sub(1).map(|i| i as usize)
    }
}

impl Sides {
    fn of(rule: &Rule) -> Self {
        Self { from: Peers::of(&rule.from), to: Peers::of(&rule.to) }
    }
}

/// Rules in order of precedence that are asked one after the other, and nothing between them but rules of policies by name.
type Rank = (Tier, u16, u8);

fn rank(rule: &Rule) -> Rank {
    let (tier, priority, rank, _, _) = precedence(rule);
    (tier, priority, rank)
}

/// Where the rules of each policy are: one stretch for each rank. The ranks are few, so they are found by leaps.
pub(super) fn stretches<'p>(rules: &[Rule], policies: impl Iterator<Item = &'p str> + Clone) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut first = 0;
    while let Some(rest) = rules.get(first..).filter(|rest| !rest.is_empty()) {
        let of_rank = rest.first().map(rank);
        let length = rest.partition_point(|rule| Some(rank(rule)) <= of_rank);
        let of_rank = rest.get(..length).unwrap_or_default();
        for name in policies.clone() {
            let begin = of_rank.partition_point(|rule| *rule.policy < *name);
            let end = of_rank.partition_point(|rule| *rule.policy <= *name);
            found.extend((begin < end).then_some(first + begin..first + end));
        }
        first += length;
    }
    found.sort_unstable_by_key(|stretch| stretch.start);
    found
}

impl Ends {
    /// Of a resolved policy.
    pub fn of(policy: &HostPolicy) -> Self {
        Self(policy.rules.iter().map(Sides::of).collect())
    }

    /// `None` = these are not the ends of so many rules.
    pub(super) fn sides(&self, rules: usize) -> Option<&[Sides]> {
        (self.0.len() == rules).then_some(self.0.as_slice())
    }

    /// Puts the rules of these policies, each in the order of its document, in the place of those that they had.
    pub fn replace_rules(&mut self, policy: &mut HostPolicy, changed: BTreeMap<String, Vec<Rule>>) {
        for (name, rules) in changed {
            let mut new: BTreeMap<Rank, Vec<Rule>> = BTreeMap::new();
            for rule in rules {
                new.entry(rank(&rule)).or_default().push(rule);
            }
            let old = stretches(&policy.rules, std::iter::once(name.as_str()));
            let had = old.iter().filter_map(|stretch| policy.rules.get(stretch.start)).map(rank);
            let ranks: BTreeSet<Rank> = had.chain(new.keys().copied()).collect();
            for of_rank in ranks {
                let key = |rule: &Rule| (rank(rule), *rule.policy < *name);
                // What is before this policy in its rank sorts first.
                let begin = policy.rules.partition_point(|rule| {
                    let (rank, before) = key(rule);
                    rank < of_rank || rank == of_rank && before
                });
                let length = policy.rules.get(begin..).unwrap_or_default();
                let length = length.partition_point(|rule| rank(rule) == of_rank && *rule.policy == *name);
                let rules = new.remove(&of_rank).unwrap_or_default();
                drop(self.0.splice(begin..begin + length, rules.iter().map(Sides::of)));
                drop(policy.rules.splice(begin..begin + length, rules));
            }
        }
    }
}
