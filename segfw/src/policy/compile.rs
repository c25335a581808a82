//! From precedence as a list to tables with no precedence left. Pure: the caller says what time it is.
//!
//! # What the tables mean
//!
//! * A **workload identity** is a whole set of labels. A local one is enforced where it is in at least one segment of
//!   workloads; then it has a `LocalEntry`. In several segments: the stricter default of each direction, monitor only
//!   where all of them monitor, unresolved peers let through only where all of them say so, the strictest `onRevoke`,
//!   and the grants of all. Host scope monitor mode is a control flag and not in the tables.
//! * A **rule** `from A to B` gives egress answers on every local identity of A toward B, and ingress answers on every
//!   local identity of B from A. Rules are asked in the given order; `pass` skips what is left of its tier; nothing
//!   matched = the default.
//! * **any** is every identity but the unresolved one. Unresolved peers are matched by `unresolved` only, and have a
//!   default of their own. The unresolved *local* identity is matched by `unresolved` only too: `from: [unresolved]`
//!   is a sentence about what workloads may do before they are known. The kernel's own identity and any identity that
//!   is newer than these tables are matched by `any` only, which is what the `Identity::ANY` entries say.
//! * **Addresses**: each prefix named anywhere is an identity; the longest one that holds an address is the peer; a rule
//!   matches it where one of the rule's prefixes contains the whole of it. `world` is `Identity::WORLD` and each of
//!   these. An IPv4 prefix is the same however it is written (`::ffff:10.0.0.0/104` is `10.0.0.0/8`), but the two
//!   families are different worlds: `::/0` does not match an IPv4 peer.
//! * **Monitor** rules: the enforced answer is the one without them, the pending answer the one with them; it is set
//!   where one of the two lets the flow pass and the other does not.
//! * **Grants implied by rules**: an allow rule (either direction) that names SCTP, UDP-Lite or DCCP grants that socket
//!   type; one at egress that names ICMP or ICMPv6 grants ping sockets. A rule in monitor mode and one whose time is
//!   over grant nothing, and so does one without ports.
//! * **Time**: an answer that depends on `expires` or `schedule` is a chain of parts with boot-time deadlines. What is
//!   too far ahead to hold is answered strictly for good: a limited allow is closed, a limited deny or reject is
//!   active, a limited pass is not. Before that, at `Tables::refresh_at`, the agent compiles again. A refusal by default
//!   where an allow rule would have matched but for its time names that rule (`Expired`, `OutOfSchedule`).
//!
//! # How
//!
//! Identities that stand in exactly the same selectors, segments and address lists are one **group** and get the same
//! answers, so each pair of groups is compiled once. For a local group and direction the rules whose other end is `any`
//! give the base; a remote group is looked at only where a rule names it, and there only in the protocols and port
//! classes that such a rule names. An entry is emitted where the less specific keys would answer differently.

use super::host_policy::{
    HostPolicy, Labels, Members, OnRevoke, PeerSpec, PortSpec, Position, Requirement, Rule, RuleAction,
};
use super::host_policy::{Schedule, Selector, Tier};
use super::tables::{IdentityName, Numbers, RuleName, Tables};
use super::window;
use foldhash::{HashMap, HashMapExt as _};
use ipnet::{IpNet, Ipv4Net};
use jiff::Timestamp;
use segfw_common::rule::{CLASS_ANY, PrefixKey};
use segfw_common::{
    Action, Addr, Direction, Evidence, Identity, LocalEntry, Proto, Reason, RuleEntry, RuleKey, bounds,
};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};

/// One moment on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What a person would call the time.
    pub wall: Timestamp,
    /// `CLOCK_BOOTTIME`, nanoseconds: what the kernel compares deadlines with.
    pub boot_ns: u64,
}

impl Clock {
    /// A wall time as a boot time; never 0, which means "for good", and far away rather than wrapped.
    pub fn boot(&self, wall_ns: i128) -> u64 {
        let boot = i128::from(self.boot_ns) + (wall_ns - self.wall.as_nanosecond());
        u64::try_from(boot.max(1)).unwrap_or(u64::MAX)
    }
}

/// Why a policy cannot be held by this host's kernel tables.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileProblem {
    /// A protocol has more kinds of ports than a class number can say.
    #[error("{} ports fall into {classes} classes, the limit is {limit}", proto.as_str())]
    TooManyClasses { proto: Proto, classes: usize, limit: usize },
    /// A table is too small.
    #[error("{}the policy needs {needed} of {limit} {table}", costliest.as_ref().map(|c| format!("{c} of {limit} {table}; ")).unwrap_or_default())]
    Capacity { table: &'static str, needed: u64, limit: u64, costliest: Option<Costliest> },
}

/// The rule that needs most of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Costliest {
    pub policy: String,
    pub rule: String,
    pub at: Position,
    /// Entries that name this rule.
    pub entries: u64,
}

impl std::fmt::Display for Costliest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { policy, rule, at, entries } = self;
        write!(f, "rule {policy}/{rule} ({}:{}:{}) needs {entries}", at.file, at.line, at.column)
    }
}

/// Named classes are `1..=MAX_CLASSES`; 0 and [`CLASS_ANY`] have meanings of their own.
const MAX_CLASSES: usize = CLASS_ANY as usize - 1;

/// Compiles what one host enforces: `local` are the label sets of its workloads, `remote` those known elsewhere.
pub fn compile(
    policy: &HostPolicy,
    local: &[Labels],
    remote: &[Labels],
    numbers: &mut Numbers,
    clock: Clock,
) -> Result<Tables, Vec<CompileProblem>> {
    compile_whole(policy, local, remote, numbers, clock).map(|(tables, _)| tables)
}

/// [`compile`], and what [`amend`] needs of it.
pub fn compile_whole(
    policy: &HostPolicy,
    local: &[Labels],
    remote: &[Labels],
    numbers: &mut Numbers,
    clock: Clock,
) -> Result<(Tables, PortLists), Vec<CompileProblem>> {
    let mut tables = Tables::default();
    let prefixes = named_prefixes(policy);
    let of_prefixes: Vec<Identity> = prefixes.values().map(|net| numbers.identity(&net.to_string())).collect();
    tables.prefixes = prefix_table(&prefixes, &of_prefixes);
    if tables.prefixes.len() > bounds::PREFIXES as usize {
        return Err(vec![CompileProblem::Capacity {
            table: "prefixes",
            needed: tables.prefixes.len() as u64,
            limit: u64::from(bounds::PREFIXES),
            costliest: most_addresses(policy),
        }]);
    }
    let nodes = Nodes::new(local, remote, &prefixes, &of_prefixes, numbers);
    tables.identities = nodes.names();
    let here: Vec<Identity> = local.iter().map(|labels| numbers.labels(labels)).collect();
    let specs = Specs::new(policy, &nodes);
    let groups = Groups::new(&specs, nodes.all.len());
    let program = Program::new(policy, &specs, &groups, &nodes, numbers, clock);
    let (classes, ports) = port_classes(&program.port_lists)?;
    tables.classes = classes;
    let emitter =
        Emitter { policy, nodes: &nodes, groups: &groups, program: &program, ports: &ports, clock, here: &here };
    Ok((emitter.run(tables)?, program.count_lists()))
}

// ---------------------------------------------------------------------------------------------------------------------
// Addresses

/// A prefix of one family, host bits zero. Sorts so that everything inside a prefix follows it without a gap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Net {
    v6: bool,
    start: u128,
    len: u8,
}

impl Net {
    /// The last address.
    fn end(self) -> u128 {
        let width = if self.v6 { 128 } else { 32 };
        let host = width - u32::from(self.len.min(width as u8));
        let span = if host >= 128 { u128::MAX } else { (1u128 << host) - 1 };
        self.start | span
    }
}

impl From<&IpNet> for Net {
    fn from(net: &IpNet) -> Self {
        match plain(net) {
            IpNet::V4(v4) => Self { v6: false, start: u128::from(u32::from(v4.network())), len: v4.prefix_len() },
            IpNet::V6(v6) => Self { v6: true, start: u128::from(v6.network()), len: v6.prefix_len() },
        }
    }
}

/// Host bits zero, and an IPv4 prefix in IPv4 clothes however it was written.
pub(super) fn plain(net: &IpNet) -> IpNet {
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let Some(v4) = v6.network().to_ipv4_mapped()
        && let Ok(v4) = Ipv4Net::new(v4, v6.prefix_len() - 96)
    {
        return IpNet::V4(v4);
    }
    net.trunc()
}

/// Where IPv4 begins in the 16 bytes of an address.
const MAPPED_BITS: u32 = 96;

fn address_lists(policy: &HostPolicy) -> impl Iterator<Item = &Vec<IpNet>> {
    let of_segments = policy.segments.iter().filter_map(|s| match &s.members {
        Members::Addresses(nets) => Some(nets),
        Members::Workloads(_) => None,
    });
    let inline = policy.rules.iter().flat_map(|r| r.from.iter().chain(&r.to)).filter_map(|peer| match peer {
        PeerSpec::Addresses(nets) => Some(nets),
        PeerSpec::Segment(_)
        | PeerSpec::Select(_)
        | PeerSpec::Any
        | PeerSpec::World
        | PeerSpec::Host
        | PeerSpec::Unresolved => None,
    });
    of_segments.chain(inline)
}

fn named_prefixes(policy: &HostPolicy) -> BTreeMap<Net, IpNet> {
    address_lists(policy).flatten().map(|net| (Net::from(net), plain(net))).collect()
}

/// `identities` are those of the prefixes, in their order.
fn prefix_table(prefixes: &BTreeMap<Net, IpNet>, identities: &[Identity]) -> BTreeMap<PrefixKey, Identity> {
    let mut table = Vec::with_capacity(prefixes.len());
    let mut covers_v4 = false;
    for (net, identity) in prefixes.values().zip(identities) {
        let bits = match net {
            IpNet::V4(v4) => MAPPED_BITS + u32::from(v4.prefix_len()),
            IpNet::V6(v6) => {
                covers_v4 |= v6.contains(&Ipv4Addr::UNSPECIFIED.to_ipv6_mapped());
                u32::from(v6.prefix_len())
            }
        };
        table.push((PrefixKey { bits, addr: net.network().into() }, *identity));
    }
    // Built at once: one by one takes several times as long.
    let mut table: BTreeMap<PrefixKey, Identity> = table.into_iter().collect();
    if covers_v4 {
        // The longest-prefix table has one tree for both families; this entry parts them again.
        let v4 = PrefixKey { bits: MAPPED_BITS, addr: Addr::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) };
        let _ = table.entry(v4).or_insert(Identity::WORLD);
    }
    table
}

fn most_addresses(policy: &HostPolicy) -> Option<Costliest> {
    let count = |rule: &Rule| -> usize {
        let of = |peer: &PeerSpec| match peer {
            PeerSpec::Addresses(nets) => nets.len(),
            PeerSpec::Segment(i) => match policy.segments.get(*i).map(|s| &s.members) {
                Some(Members::Addresses(nets)) => nets.len(),
                Some(Members::Workloads(_)) | None => 0,
            },
            PeerSpec::Select(_) | PeerSpec::Any | PeerSpec::World | PeerSpec::Host | PeerSpec::Unresolved => 0,
        };
        rule.from.iter().chain(&rule.to).map(of).sum()
    };
    let rule = policy.rules.iter().rev().max_by_key(|r| count(r))?;
    Some(costliest(rule, count(rule) as u64))
}

fn costliest(rule: &Rule, entries: u64) -> Costliest {
    Costliest { policy: rule.policy.to_string(), rule: rule.name.to_string(), at: rule.at.clone(), entries }
}

// ---------------------------------------------------------------------------------------------------------------------
// Who can be a peer

/// Every identity that these tables know, the unresolved one and the kernel's apart.
struct Nodes<'a> {
    /// Label sets (local ones first), then prefixes in order, then the host, then the world.
    all: Vec<Identity>,
    labels: Vec<&'a Labels>,
    local: usize,
    prefixes: Vec<(Net, IpNet)>,
}

impl<'a> Nodes<'a> {
    /// `of_prefixes` are the identities of the prefixes, in their order.
    fn new(
        local: &'a [Labels],
        remote: &'a [Labels],
        prefixes: &BTreeMap<Net, IpNet>,
        of_prefixes: &[Identity],
        numbers: &mut Numbers,
    ) -> Self {
        let here: BTreeSet<&Labels> = local.iter().collect();
        let elsewhere: BTreeSet<&Labels> = remote.iter().filter(|l| !here.contains(l)).collect();
        let local = here.len();
        let labels: Vec<&Labels> = here.into_iter().chain(elsewhere).collect();
        let prefixes: Vec<(Net, IpNet)> = prefixes.iter().map(|(net, ip)| (*net, *ip)).collect();
        let mut all: Vec<Identity> = labels.iter().map(|l| numbers.labels(l)).collect();
        all.extend(of_prefixes);
        all.extend([Identity::HOST, Identity::WORLD]);
        Self { all, labels, local, prefixes }
    }

    fn first_prefix(&self) -> usize {
        self.labels.len()
    }
    fn host(&self) -> u32 {
        (self.labels.len() + self.prefixes.len()) as u32
    }
    fn world(&self) -> u32 {
        self.host() + 1
    }

    fn names(&self) -> BTreeMap<Identity, IdentityName> {
        let reserved = [
            (Identity::UNRESOLVED, "unresolved"),
            (Identity::HOST, "host"),
            (Identity::WORLD, "world"),
            (Identity::KERNEL, "kernel"),
        ];
        let reserved = reserved.into_iter().map(|(id, name)| (id, IdentityName::Reserved(name)));
        let labels = self.labels.iter().zip(&self.all).map(|(l, id)| (*id, IdentityName::Labels((*l).clone())));
        let of_prefixes = self.prefixes.iter().zip(self.all.iter().skip(self.first_prefix()));
        reserved.chain(labels).chain(of_prefixes.map(|((_, net), id)| (*id, IdentityName::Prefix(*net)))).collect()
    }
}

/// A [`Selector`] as a key of a hash map.
#[derive(PartialEq, Eq)]
struct SelectorKey<'a>(&'a Selector);

impl Hash for SelectorKey<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for requirement in &self.0.0 {
            std::mem::discriminant(requirement).hash(state);
            match requirement {
                Requirement::In { key, values } | Requirement::NotIn { key, values } => (key, values).hash(state),
                Requirement::Exists { key } | Requirement::NotExists { key } => key.hash(state),
            }
        }
    }
}

#[derive(PartialEq, Eq, Hash)]
enum SpecKey<'a> {
    Select(SelectorKey<'a>),
    Addresses(&'a [IpNet]),
    World,
    Host,
}

/// One end of a rule.
#[derive(Default)]
struct Side {
    any: bool,
    unresolved: bool,
    /// Numbers of specs, ascending, each once.
    specs: Vec<u32>,
}

/// Every distinct way in which the policy names peers. Spec `i` below the number of segments is segment `i`.
struct Specs {
    /// Nodes of each spec, ascending.
    members: Vec<Vec<u32>>,
    from: Vec<Side>,
    to: Vec<Side>,
}

impl Specs {
    fn new(policy: &HostPolicy, nodes: &Nodes<'_>) -> Self {
        let index = LabelIndex::new(&nodes.labels);
        let mut members: Vec<Vec<u32>> = Vec::with_capacity(policy.segments.len());
        for segment in &policy.segments {
            members.push(match &segment.members {
                Members::Workloads(selector) => index.select(selector),
                Members::Addresses(nets) => within(nodes, nets),
            });
        }
        let mut known: HashMap<SpecKey<'_>, u32> = HashMap::new();
        let mut side = |peers| Self::side(peers, policy.segments.len(), &mut known, &mut members, &index, nodes);
        let rules = policy.rules.len();
        let (mut from, mut to) = (Vec::with_capacity(rules), Vec::with_capacity(rules));
        for rule in &policy.rules {
            from.push(side(&rule.from));
            to.push(side(&rule.to));
        }
        Self { members, from, to }
    }

    fn side<'a>(
        peers: &'a [PeerSpec],
        segments: usize,
        known: &mut HashMap<SpecKey<'a>, u32>,
        members: &mut Vec<Vec<u32>>,
        index: &LabelIndex<'_>,
        nodes: &Nodes<'_>,
    ) -> Side {
        let mut side = Side::default();
        for peer in peers {
            let key = match peer {
                PeerSpec::Any => {
                    side.any = true;
                    continue;
                }
                PeerSpec::Unresolved => {
                    side.unresolved = true;
                    continue;
                }
                PeerSpec::Segment(i) => {
                    if *i < segments {
                        side.specs.push(*i as u32);
                    }
                    continue;
                }
                PeerSpec::Select(selector) => SpecKey::Select(SelectorKey(selector)),
                PeerSpec::Addresses(nets) => SpecKey::Addresses(nets),
                PeerSpec::World => SpecKey::World,
                PeerSpec::Host => SpecKey::Host,
            };
            let spec = known.get(&key).copied().unwrap_or_else(|| {
                let spec = members.len() as u32;
                members.push(match &key {
                    SpecKey::Select(SelectorKey(selector)) => index.select(selector),
                    SpecKey::Addresses(nets) => within(nodes, nets),
                    SpecKey::World => (nodes.first_prefix() as u32..nodes.host()).chain([nodes.world()]).collect(),
                    SpecKey::Host => vec![nodes.host()],
                });
                let _ = known.insert(key, spec);
                spec
            });
            side.specs.push(spec);
        }
        side.specs.sort_unstable();
        side.specs.dedup();
        side
    }
}

/// The prefix identities that lie within one of `nets`.
fn within(nodes: &Nodes<'_>, nets: &[IpNet]) -> Vec<u32> {
    let mut found = Vec::new();
    for net in nets.iter().map(Net::from) {
        let last = Net { start: net.end(), len: u8::MAX, ..net };
        let (first, past) =
            (nodes.prefixes.partition_point(|p| p.0 < net), nodes.prefixes.partition_point(|p| p.0 <= last));
        found.extend((first..past).map(|i| (nodes.first_prefix() + i) as u32));
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Which label sets have a label, so that a selector looks at few of them.
struct LabelIndex<'a> {
    labels: &'a [&'a Labels],
    by_value: HashMap<(&'a str, &'a str), Vec<u32>>,
    by_key: HashMap<&'a str, Vec<u32>>,
}

impl<'a> LabelIndex<'a> {
    fn new(labels: &'a [&'a Labels]) -> Self {
        let mut index = Self { labels, by_value: HashMap::new(), by_key: HashMap::new() };
        for (i, set) in labels.iter().enumerate() {
            for (key, value) in *set {
                index.by_value.entry((key, value)).or_default().push(i as u32);
                index.by_key.entry(key).or_default().push(i as u32);
            }
        }
        index
    }

    fn select(&self, selector: &Selector) -> Vec<u32> {
        let mut fewest: Option<Vec<&Vec<u32>>> = None;
        let size = |lists: &Vec<&Vec<u32>>| lists.iter().map(|l| l.len()).sum::<usize>();
        for requirement in &selector.0 {
            let lists: Vec<&Vec<u32>> = match requirement {
                Requirement::In { key, values } => {
                    values.iter().filter_map(|v| self.by_value.get(&(key.as_str(), v.as_str()))).collect()
                }
                Requirement::Exists { key } => self.by_key.get(key.as_str()).into_iter().collect(),
                Requirement::NotIn { .. } | Requirement::NotExists { .. } => continue,
            };
            if fewest.as_ref().is_none_or(|f| size(&lists) < size(f)) {
                fewest = Some(lists);
            }
        }
        let matches = |i: &u32| self.labels.get(*i as usize).is_some_and(|l| selector.matches(l));
        let mut found: Vec<u32> = match fewest {
            Some(lists) => lists.into_iter().flatten().copied().filter(matches).collect(),
            None => (0..self.labels.len() as u32).filter(matches).collect(),
        };
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// Nodes that no spec tells apart.
struct Groups {
    all: Vec<Group>,
    /// Groups of each spec, ascending.
    of_spec: Vec<Vec<u32>>,
}

struct Group {
    /// Ascending.
    specs: Vec<u32>,
    /// Ascending.
    nodes: Vec<u32>,
}

impl Groups {
    fn new(specs: &Specs, nodes: usize) -> Self {
        let mut of_node: Vec<Vec<u32>> = vec![Vec::new(); nodes];
        for (spec, members) in specs.members.iter().enumerate() {
            for node in members {
                of_node[*node as usize].push(spec as u32);
            }
        }
        let mut known: HashMap<Vec<u32>, u32> = HashMap::new();
        let mut all: Vec<Group> = Vec::new();
        for (node, specs) in of_node.into_iter().enumerate() {
            let group = known.get(&specs).copied().unwrap_or_else(|| {
                let group = all.len() as u32;
                all.push(Group { specs: specs.clone(), nodes: Vec::new() });
                let _ = known.insert(specs, group);
                group
            });
            all[group as usize].nodes.push(node as u32);
        }
        let mut of_spec = vec![Vec::new(); specs.members.len()];
        for (i, group) in all.iter().enumerate() {
            for spec in &group.specs {
                of_spec[*spec as usize].push(i as u32);
            }
        }
        Self { all, of_spec }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rules

/// What is true of a time-limited rule at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Active,
    Expired,
    Closed,
}

/// When a rule is active, from `clock.wall` on, as far as is known. Times are wall nanoseconds.
struct Timing {
    /// Ascending.
    boundaries: Vec<i128>,
    /// One more than `boundaries`.
    states: Vec<State>,
    /// Nothing is known from here on; `None` = the last state holds for good.
    horizon: Option<i128>,
    scheduled: bool,
}

impl Timing {
    fn new(rule: &Rule, schedule: Option<&window::Boundaries>, clock: Clock) -> Self {
        let open = |open: bool| if open { State::Active } else { State::Closed };
        let mut timing = match schedule {
            None => Self { boundaries: vec![], states: vec![State::Active], horizon: None, scheduled: false },
            Some(known) => Self {
                boundaries: known.at.iter().map(|t| t.as_nanosecond()).collect(),
                states: (0..=known.at.len()).map(|i| open(known.open ^ (i % 2 == 1))).collect(),
                horizon: known.horizon.map(|t| t.as_nanosecond()),
                scheduled: true,
            },
        };
        if let Some(expires) = rule.expires.map(|t| t.as_nanosecond()) {
            if expires <= clock.wall.as_nanosecond() {
                return Self { boundaries: vec![], states: vec![State::Expired], horizon: None, ..timing };
            }
            if timing.horizon.is_none_or(|horizon| expires <= horizon) {
                let before = timing.boundaries.partition_point(|b| *b < expires);
                timing.boundaries.truncate(before);
                timing.states.truncate(before + 1);
                timing.boundaries.push(expires);
                timing.states.push(State::Expired);
                timing.horizon = None;
            }
        }
        timing
    }

    /// Before the horizon.
    fn at(&self, t: i128) -> State {
        let i = self.boundaries.partition_point(|b| *b <= t);
        self.states.get(i).or(self.states.last()).copied().unwrap_or(State::Expired)
    }

    /// The strict state for all time from `horizon` on.
    fn strict(&self, horizon: i128, action: RuleAction) -> State {
        if self.horizon.is_none() && self.boundaries.last().is_none_or(|b| *b <= horizon) {
            return self.at(horizon);
        }
        match action {
            RuleAction::Deny | RuleAction::Reject => State::Active,
            RuleAction::Allow | RuleAction::Pass if self.scheduled => State::Closed,
            RuleAction::Allow | RuleAction::Pass => State::Expired,
        }
    }
}

/// A rule as the evaluation reads it.
struct Prepared {
    number: u32,
    action: RuleAction,
    tier: Tier,
    monitor: bool,
    /// Flags of an allow entry, by direction.
    flags: [u8; 2],
    ports: u32,
    timing: Option<Timing>,
}

/// The rules that touch a local group in one direction.
struct Touch {
    group: u32,
    direction: Direction,
    /// Those that name it, ascending: in order of precedence. The rules for `any` come on top.
    named: Vec<u32>,
}

/// The unresolved identity as a local end: no group holds it.
const UNRESOLVED_GROUP: u32 = u32::MAX;

struct Program<'a> {
    specs: &'a Specs,
    /// By the index of the rule; `None` = it touches nothing local.
    rules: Vec<Option<Prepared>>,
    /// Distinct port lists.
    port_lists: Vec<&'a [PortSpec]>,
    touches: Vec<Touch>,
    /// Rules whose local end is `any`, by direction.
    any: [Vec<u32>; 2],
}

impl<'a> Program<'a> {
    fn new(
        policy: &'a HostPolicy,
        specs: &'a Specs,
        groups: &Groups,
        nodes: &Nodes<'_>,
        numbers: &mut Numbers,
        clock: Clock,
    ) -> Self {
        let mut touches = Vec::new();
        let mut any = [Vec::new(), Vec::new()];
        for direction in [Direction::Ingress, Direction::Egress] {
            let sides = match direction {
                Direction::Ingress => &specs.to,
                Direction::Egress => &specs.from,
            };
            let mut of_spec: Vec<Vec<u32>> = vec![Vec::new(); specs.members.len()];
            let (mut of_any, mut of_unresolved) = (Vec::new(), Vec::new());
            for (rule, side) in sides.iter().enumerate() {
                let rule = rule as u32;
                for spec in &side.specs {
                    of_spec[*spec as usize].push(rule);
                }
                if side.any {
                    of_any.push(rule);
                }
                if side.unresolved {
                    of_unresolved.push(rule);
                }
            }
            for (i, group) in groups.all.iter().enumerate() {
                if !enforced(policy, group, nodes) {
                    continue;
                }
                let mut named: Vec<u32> = group.specs.iter().flat_map(|s| &of_spec[*s as usize]).copied().collect();
                named.sort_unstable();
                named.dedup();
                touches.push(Touch { group: i as u32, direction, named });
            }
            if denies_unresolved(policy) {
                touches.push(Touch { group: UNRESOLVED_GROUP, direction, named: of_unresolved });
            }
            any[direction as usize] = of_any;
        }
        let mut program =
            Self { specs, rules: Vec::with_capacity(policy.rules.len()), port_lists: Vec::new(), touches, any };
        program.prepare(policy, numbers, clock);
        program
    }

    fn prepare(&mut self, policy: &'a HostPolicy, numbers: &mut Numbers, clock: Clock) {
        let mut relevant = vec![false; policy.rules.len()];
        let known = self.touches.iter().any(|t| t.group != UNRESOLVED_GROUP);
        let for_any = self.any.iter().flatten().filter(|_| known);
        for rule in self.touches.iter().flat_map(|t| &t.named).chain(for_any) {
            relevant[*rule as usize] = true;
        }
        let mut known_ports: HashMap<&[PortSpec], u32> = HashMap::new();
        let mut known_windows: HashMap<&str, Vec<(&Schedule, window::Boundaries)>> = HashMap::new();
        for (rule, relevant) in policy.rules.iter().zip(relevant) {
            if !relevant {
                self.rules.push(None);
                continue;
            }
            let ports = *known_ports.entry(&rule.ports).or_insert_with(|| {
                self.port_lists.push(&rule.ports);
                self.port_lists.len() as u32 - 1
            });
            let schedule = rule.schedule.as_ref().map(|schedule| {
                let same_text = known_windows.entry(&schedule.text).or_default();
                let known =
                    same_text.iter().position(|(s, _)| s.windows == schedule.windows && s.zone == schedule.zone);
                let known = known.unwrap_or_else(|| {
                    let count = 2 * bounds::TIMELINE_HOPS as usize;
                    same_text.push((schedule, window::next_boundaries(schedule, clock.wall, count)));
                    same_text.len() - 1
                });
                &same_text[known].1
            });
            let limited = rule.expires.is_some() || schedule.is_some();
            let timing = limited.then(|| Timing::new(rule, schedule, clock)).filter(|t| {
                // Open around the clock and never over: not limited.
                !(t.boundaries.is_empty() && t.horizon.is_none() && t.states == [State::Active])
            });
            let quiet = if rule.log { 0 } else { RuleEntry::NO_LOG };
            let demand = match rule.require {
                Evidence::None => 0,
                e @ (Evidence::Prefix | Evidence::Address | Evidence::Endpoint | Evidence::Origin) => {
                    RuleEntry::demand(e)
                }
            };
            self.rules.push(Some(Prepared {
                number: numbers.rule(&rule.policy, &rule.name),
                action: rule.action,
                tier: rule.tier,
                monitor: rule.monitor,
                flags: [quiet | demand, quiet],
                ports,
                timing,
            }));
        }
    }

    /// Every rule that touches a local group, in order of precedence.
    fn rules_of(&self, touch: &Touch) -> Vec<u32> {
        let mut rules = touch.named.clone();
        if touch.group != UNRESOLVED_GROUP {
            rules.extend(&self.any[touch.direction as usize]);
            rules.sort_unstable();
            rules.dedup();
        }
        rules
    }

    fn rule(&self, index: u32) -> Option<&Prepared> {
        self.rules.get(index as usize).and_then(Option::as_ref)
    }

    /// Every port list, and how many rules have it.
    fn count_lists(&self) -> PortLists {
        let mut count = vec![0; self.port_lists.len()];
        for rule in self.rules.iter().flatten() {
            count[rule.ports as usize] += 1;
        }
        PortLists(self.port_lists.iter().map(|list| list.to_vec()).zip(count).collect())
    }
}

/// The class tables, and each port list in classes. A class is numbered by its lowest port, so that the number of one does
/// not depend on what other rules name; see [`class_numbers`].
fn port_classes(lists: &[&[PortSpec]]) -> Result<(ClassTables, Vec<Ports>), Vec<CompileProblem>> {
    let mut ports: Vec<Ports> = Vec::with_capacity(lists.len());
    // By protocol: the edges of every list, as (first port, the list's sign).
    let mut edges: Vec<Vec<(u32, u128)>> = vec![Vec::new(); Proto::COUNT as usize];
    let mut ranges: Vec<Vec<(u8, u32, u32)>> = Vec::with_capacity(lists.len());
    for (i, list) in lists.iter().enumerate() {
        let (mut whole, mut parts) = (if list.is_empty() { u8::MAX } else { 0 }, Vec::new());
        let mut named = 0u8;
        for proto in Proto::ALL {
            let merged = merge_ranges(list.iter().filter(|p| p.proto == proto));
            if !merged.is_empty() {
                named |= 1 << proto as u8;
            }
            if merged == [(0, 1 << 16)] {
                whole |= 1 << proto as u8;
                continue;
            }
            for (first, past) in merged {
                let sign = sign(i as u64);
                edges[proto as usize].extend([(first, sign), (past, sign)]);
                parts.push((proto as u8, first, past));
            }
        }
        ports.push(Ports { whole, named, classes: Vec::new() });
        ranges.push(parts);
    }
    let mut tables = Vec::new();
    // By protocol: the stretches of ports between two edges, as (first port, class).
    let mut stretches: Vec<Vec<(u32, u16)>> = Vec::new();
    let mut problems = Vec::new();
    for (proto, mut edges) in Proto::ALL.into_iter().zip(edges) {
        edges.sort_unstable();
        let mut table = vec![0u16; 1 << 16];
        let mut of_proto = Vec::new();
        // A stretch is known by the exclusive or of the 128-bit signs of the lists that name it: equal sets have
        // equal sums, and two of at most 2^16 sums meet by chance once in 2^96 policies.
        let mut known: HashMap<u128, usize> = HashMap::from_iter([(0, 0)]);
        // By class, 0 left out: its lowest port.
        let mut lowest: Vec<u32> = Vec::new();
        let mut sum = 0u128;
        for run in edges.chunk_by(|a, b| a.0 == b.0) {
            let Some((first, _)) = run.first().copied() else { continue };
            for (_, sign) in run {
                sum ^= sign;
            }
            let fresh = known.len();
            let class = *known.entry(sum).or_insert(fresh);
            if class > lowest.len() {
                lowest.push(first);
            }
            of_proto.push((first, class));
        }
        if lowest.len() > MAX_CLASSES {
            problems.push(CompileProblem::TooManyClasses { proto, classes: lowest.len(), limit: MAX_CLASSES });
            continue;
        }
        let numbers = class_numbers(&lowest);
        let number = |class: usize| class.checked_sub(1).and_then(|i| numbers.get(i)).copied().unwrap_or(0);
        let of_proto: Vec<(u32, u16)> = of_proto.into_iter().map(|(first, class)| (first, number(class))).collect();
        for (i, (first, class)) in of_proto.iter().enumerate() {
            let past = of_proto.get(i + 1).map_or(1 << 16, |next| next.0) as usize;
            if let Some(stretch) = table.get_mut(*first as usize..past) {
                stretch.fill(*class);
            }
        }
        tables.push(table);
        stretches.push(of_proto);
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    for (ports, ranges) in ports.iter_mut().zip(ranges) {
        for (proto, first, past) in ranges {
            let stretches = &stretches[proto as usize];
            let from = stretches.partition_point(|s| s.0 < first);
            let inside = stretches.iter().skip(from).take_while(|s| s.0 < past);
            ports.classes.extend(inside.map(|s| (proto, s.1)));
        }
        ports.classes.sort_unstable();
        ports.classes.dedup();
    }
    Ok((tables, ports))
}

/// A class has the number of its lowest port. 0 and [`CLASS_ANY`] have meanings of their own: a class that begins at one of
/// these two ports has the highest number that no other class has. `lowest` ascends and has at most [`MAX_CLASSES`].
fn class_numbers(lowest: &[u32]) -> Vec<u16> {
    let ordinary = |port: u32| port != 0 && port != u32::from(CLASS_ANY);
    let mut free = (1..CLASS_ANY).rev().filter(|n| lowest.binary_search(&u32::from(*n)).is_err());
    lowest.iter().map(|port| if ordinary(*port) { *port as u16 } else { free.next().unwrap_or(1) }).collect()
}

/// By protocol: 65,536 classes each.
type ClassTables = Vec<Vec<u16>>;

/// A port list in classes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ports {
    /// Bit per protocol: every port of it.
    whole: u8,
    /// Bit per protocol: it is named.
    named: u8,
    /// (protocol, class), ascending; none of a protocol that is whole.
    classes: Vec<(u8, u16)>,
}

/// Half-open, ascending, without overlap.
fn merge_ranges<'p>(ports: impl Iterator<Item = &'p PortSpec>) -> Vec<(u32, u32)> {
    let mut ranges: Vec<(u32, u32)> =
        ports.filter(|p| p.first <= p.last).map(|p| (u32::from(p.first), u32::from(p.last) + 1)).collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
    for (first, past) in ranges {
        match merged.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(past),
            Some(_) | None => merged.push((first, past)),
        }
    }
    merged
}

/// 128 well-mixed bits for a number (splitmix64, twice).
fn sign(n: u64) -> u128 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let step = 0x9e37_79b9_7f4a_7c15u64;
    let high = mix((2 * n + 1).wrapping_mul(step));
    let low = mix((2 * n + 2).wrapping_mul(step));
    u128::from(high) << 64 | u128::from(low)
}

/// Is a group of local workloads in a segment of workloads?
fn enforced(policy: &HostPolicy, group: &Group, nodes: &Nodes<'_>) -> bool {
    group.nodes.first().is_some_and(|n| (*n as usize) < nodes.local) && segments_of(policy, group).next().is_some()
}

fn segments_of<'p>(policy: &'p HostPolicy, group: &Group) -> impl Iterator<Item = &'p super::host_policy::Segment> {
    let segments = group.specs.iter().filter_map(|s| policy.segments.get(*s as usize));
    segments.filter(|s| matches!(s.members, Members::Workloads(_)))
}

/// Local workloads that are not known yet are denied where one enforced segment might claim them.
fn denies_unresolved(policy: &HostPolicy) -> bool {
    policy.segments.iter().any(|s| matches!(s.members, Members::Workloads(_)) && !s.monitor && !s.unresolved_allow)
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers

/// What is said at one moment, or where nothing else is said.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Outcome {
    action: Action,
    reason: Reason,
    rule: u32,
    flags: u8,
}

impl Outcome {
    fn default(allow: bool, reason: Reason) -> Self {
        Self { action: if allow { Action::Allow } else { Action::Deny }, reason, rule: 0, flags: 0 }
    }
    fn entry(self) -> RuleEntry {
        RuleEntry {
            until: 0,
            rule: self.rule,
            pending_rule: 0,
            next: 0,
            action: self.action as u8,
            reason: self.reason as u8,
            pending: 0,
            flags: self.flags,
        }
    }
    fn passes(self) -> bool {
        matches!(self.action, Action::Allow)
    }
}

#[derive(Clone, Copy)]
enum When {
    At(i128),
    /// For good, from this time on.
    Strict(i128),
}

/// (protocol, class or `CLASS_ANY`, rule), ascending: the rules of one pair, ready to be read by class.
type Keyed = Vec<(u8, u16, u32)>;

/// The rules of one protocol and class.
fn run(keyed: &Keyed, proto: Proto, class: u16) -> &[(u8, u16, u32)] {
    let key = (proto as u8, class);
    let first = keyed.partition_point(|k| (k.0, k.1) < key);
    let len = keyed.get(first..).map_or(0, |rest| rest.partition_point(|k| (k.0, k.1) == key));
    keyed.get(first..first + len).unwrap_or_default()
}

/// The named classes of one protocol, ascending.
fn classes(keyed: &Keyed, proto: Proto) -> impl Iterator<Item = u16> {
    let first = keyed.partition_point(|k| k.0 < proto as u8);
    let of_proto = keyed.iter().skip(first).take_while(move |k| k.0 == proto as u8 && k.1 != CLASS_ANY);
    let mut last = None;
    of_proto.map(|k| k.1).filter(move |class| last.replace(*class) != Some(*class))
}

/// Merges a few ascending lists of rules.
struct InOrder<'k>([&'k [(u8, u16, u32)]; 4]);

impl Iterator for InOrder<'_> {
    type Item = u32;
    fn next(&mut self) -> Option<u32> {
        let heads = self.0.iter().enumerate().filter_map(|(i, list)| list.first().map(|k| (k.2, i)));
        let (rule, list) = heads.min()?;
        self.0[list] = self.0[list].get(1..).unwrap_or_default();
        Some(rule)
    }
}

struct Emitter<'a> {
    policy: &'a HostPolicy,
    nodes: &'a Nodes<'a>,
    groups: &'a Groups,
    program: &'a Program<'a>,
    ports: &'a [Ports],
    clock: Clock,
    /// Label sets of this host.
    here: &'a [Identity],
}

/// What grows while entries are emitted.
#[derive(Default)]
struct Output {
    rules: Vec<(RuleKey, RuleEntry)>,
    needed: u64,
    timeline: Vec<RuleEntry>,
    known: HashMap<RuleEntry, u32>,
    /// Entries that name a rule, by its number.
    cost: HashMap<u32, u64>,
    timeline_cost: HashMap<u32, u64>,
    horizon: Option<i128>,
}

/// Answers for one local group in one direction while its remote groups are compiled.
struct Base {
    direction: Direction,
    /// Local identities.
    locals: Vec<Identity>,
    default: Outcome,
    /// Rules whose other end is `any`.
    any: Keyed,
    /// Answer of (any, any class), by protocol.
    whole: [RuleEntry; 8],
    /// Answers of (any, class).
    by_class: HashMap<(u8, u16), RuleEntry>,
    /// Bits of `LocalEntry::level`.
    levels: u32,
}

impl Base {
    /// What the kernel answers where the peer has no key of its own.
    fn fall_through(&self, proto: Proto, class: u16) -> RuleEntry {
        let known = self.by_class.get(&(proto as u8, class)).copied();
        known.unwrap_or(self.whole[proto as usize])
    }
}

impl Emitter<'_> {
    fn run(&self, mut tables: Tables) -> Result<Tables, Vec<CompileProblem>> {
        let mut out = Output::default();
        let mut scratch: Vec<Vec<u32>> = vec![Vec::new(); self.groups.all.len()];
        for touch in &self.program.touches {
            let rules = self.program.rules_of(touch);
            let mut local = self.local_entry(touch, &rules);
            let base = self.touch(touch, &rules, &mut local, &mut out, &mut scratch);
            for identity in base.locals {
                let entry = tables.locals.entry(identity).or_insert(local);
                entry.flags |= local.flags;
                entry.grants |= local.grants;
            }
        }
        // Known, and in no segment: that is said, since a workload the tables do not know at all is held to be unresolved.
        for identity in self.here {
            let _ = tables
                .locals
                .entry(*identity)
                .or_insert(LocalEntry { flags: LocalEntry::OPEN, ..LocalEntry::default() });
        }
        // Who is not known yet may turn out to be in any segment: no UDP socket where none may have one.
        let known =
            tables.locals.iter().filter(|(id, l)| **id != Identity::UNRESOLVED && l.flags & LocalEntry::OPEN == 0);
        let flags = known.map(|(_, l)| l.flags).reduce(|all, flags| all & flags).unwrap_or(0);
        if flags & LocalEntry::TCP_ONLY != 0
            && let Some(unresolved) = tables.locals.get_mut(&Identity::UNRESOLVED)
        {
            unresolved.flags |= LocalEntry::TCP_ONLY;
        }
        let refuse = LocalEntry {
            default: [Action::Deny as u8; 2],
            default_reason: Reason::SegmentDefault as u8,
            ..LocalEntry::default()
        };
        let _ = tables.locals.insert(Identity::CANARY, refuse);
        self.check(&tables, &out)?;
        if let Some(horizon) = out.horizon {
            // Half way: late enough to be rare, early enough for an agent that is down for a while.
            let now = self.clock.boot_ns;
            tables.refresh_at = Some(now + (self.clock.boot(horizon).saturating_sub(now)) / 2);
        }
        let named = self.policy.rules.iter().zip(&self.program.rules).filter_map(|(r, p)| Some((r, p.as_ref()?)));
        let named = named.map(|(rule, prepared)| {
            let entries = out.cost.get(&prepared.number).copied().unwrap_or(0) as usize;
            (prepared.number, RuleName::of(rule, entries))
        });
        // Of rules with one number, which a policy without mistakes has not, the first gives the name: the last one here.
        tables.rule_names = named.rev().collect();
        out.rules.sort_unstable_by_key(|r| r.0);
        tables.rules = out.rules.into_iter().collect();
        tables.timeline = out.timeline;
        Ok(tables)
    }

    fn check(&self, tables: &Tables, out: &Output) -> Result<(), Vec<CompileProblem>> {
        let most = |cost: &HashMap<u32, u64>| {
            let (number, entries) = cost.iter().max_by_key(|(number, entries)| (**entries, u32::MAX - **number))?;
            let of_number = |p: &Option<Prepared>| p.as_ref().is_some_and(|p| p.number == *number);
            let rule = self.policy.rules.get(self.program.rules.iter().position(of_number)?)?;
            Some(costliest(rule, *entries))
        };
        let counts = [
            ("rule entries", out.needed, bounds::RULES, most(&out.cost)),
            ("timeline entries", out.timeline.len() as u64, bounds::TIMELINE, most(&out.timeline_cost)),
            ("local identities", tables.locals.len() as u64, bounds::LOCALS, None),
        ];
        let over = counts.into_iter().filter(|(_, needed, limit, _)| *needed > u64::from(*limit));
        let problems: Vec<_> = over
            .map(|(table, needed, limit, costliest)| CompileProblem::Capacity {
                table,
                needed,
                limit: u64::from(limit),
                costliest,
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// Without the levels.
    fn local_entry(&self, touch: &Touch, rules: &[u32]) -> LocalEntry {
        let deny = Action::Deny as u8;
        let mut entry =
            LocalEntry { default: [deny, deny], grants: self.grants(touch.direction, rules), ..LocalEntry::default() };
        let Some(group) = self.groups.all.get(touch.group as usize) else {
            entry.default_reason = Reason::UnresolvedLocal as u8;
            return entry;
        };
        let drain = |on_revoke| match on_revoke {
            OnRevoke::Cut => 0,
            OnRevoke::Drain(ns) => ns,
            OnRevoke::Keep => u64::MAX,
        };
        let action = |allow: bool| if allow { Action::Allow as u8 } else { deny };
        let segments = || segments_of(self.policy, group);
        entry.default_reason = Reason::SegmentDefault as u8;
        entry.drain_ns = segments().map(|s| drain(s.on_revoke)).min().unwrap_or(0);
        entry.default[Direction::Ingress as usize] = action(segments().all(|s| s.default_ingress_allow));
        entry.default[Direction::Egress as usize] = action(segments().all(|s| s.default_egress_allow));
        entry.flags = if segments().all(|s| s.monitor) { LocalEntry::MONITOR } else { 0 };
        entry.flags |= if segments().any(|s| s.tcp_only) { LocalEntry::TCP_ONLY } else { 0 };
        entry.grants |= segments().fold(0, |grants, s| grants | s.grants);
        entry
    }

    fn grants(&self, direction: Direction, rules: &[u32]) -> u32 {
        let mut grants = 0;
        for rule in rules.iter().filter_map(|r| self.program.rule(*r)) {
            let over = rule.timing.as_ref().is_some_and(|t| t.boundaries.is_empty() && t.states == [State::Expired]);
            if !matches!(rule.action, RuleAction::Allow) || rule.monitor || over {
                continue;
            }
            let named = self.ports.get(rule.ports as usize).map_or(0, |p| p.named);
            for proto in Proto::ALL.into_iter().filter(|p| named & (1 << *p as u8) != 0) {
                grants |= match (proto, direction) {
                    (Proto::Sctp, _) => LocalEntry::GRANT_SCTP,
                    (Proto::UdpLite, _) => LocalEntry::GRANT_UDPLITE,
                    (Proto::Dccp, _) => LocalEntry::GRANT_DCCP,
                    (Proto::Icmp | Proto::Icmpv6, Direction::Egress) => LocalEntry::GRANT_PING,
                    (Proto::Icmp | Proto::Icmpv6, Direction::Ingress) => 0,
                    (Proto::Tcp | Proto::Udp | Proto::Other, _) => 0,
                };
            }
        }
        grants
    }

    fn touch(
        &self,
        touch: &Touch,
        rules: &[u32],
        local: &mut LocalEntry,
        out: &mut Output,
        scratch: &mut [Vec<u32>],
    ) -> Base {
        let direction = touch.direction;
        let group = self.groups.all.get(touch.group as usize);
        let locals = match group {
            None => vec![Identity::UNRESOLVED],
            Some(g) => {
                let here = g.nodes.iter().filter(|n| (**n as usize) < self.nodes.local);
                here.map(|n| self.nodes.all[*n as usize]).collect()
            }
        };
        let reason = Reason::from_raw(local.default_reason).unwrap_or(Reason::SegmentDefault);
        let allow = local.default[direction as usize] == Action::Allow as u8;
        let default = Outcome::default(allow, reason);

        // Sort the rules by who is at the other end.
        let (mut any, mut unresolved, mut named) = (Vec::new(), Vec::new(), Vec::new());
        for rule in rules {
            let side = match direction {
                Direction::Ingress => &self.program.specs.from[*rule as usize],
                Direction::Egress => &self.program.specs.to[*rule as usize],
            };
            if side.unresolved {
                unresolved.push(*rule);
            }
            if side.any {
                any.push(*rule);
                continue;
            }
            for spec in &side.specs {
                for group in &self.groups.of_spec[*spec as usize] {
                    let rules = &mut scratch[*group as usize];
                    if rules.is_empty() {
                        named.push(*group);
                    }
                    if rules.last() != Some(rule) {
                        rules.push(*rule);
                    }
                }
            }
        }
        named.sort_unstable();

        let mut base = Base {
            direction,
            locals,
            default,
            any: self.keyed(&any),
            whole: [default.entry(); 8],
            by_class: HashMap::new(),
            levels: 0,
        };
        self.base(&mut base, out);
        for group in named {
            let rules = std::mem::take(&mut scratch[group as usize]);
            let identities: Vec<Identity> =
                self.groups.all[group as usize].nodes.iter().map(|n| self.nodes.all[*n as usize]).collect();
            self.peer(&mut base, &identities, &self.keyed(&rules), None, out);
        }
        let of_unresolved = match group {
            None => default,
            Some(g) => {
                let allow = segments_of(self.policy, g).all(|s| s.unresolved_allow);
                Outcome::default(allow, Reason::UnresolvedPeer)
            }
        };
        self.peer(&mut base, &[Identity::UNRESOLVED], &self.keyed(&unresolved), Some(of_unresolved), out);
        local.flags |= base.levels;
        base
    }

    fn keyed(&self, rules: &[u32]) -> Keyed {
        let mut keyed = Vec::new();
        for rule in rules {
            let Some(ports) = self.program.rule(*rule).and_then(|p| self.ports.get(p.ports as usize)) else { continue };
            let whole = (0..8u8).filter(|p| ports.whole & (1 << p) != 0);
            keyed.extend(whole.map(|p| (p, CLASS_ANY, *rule)));
            keyed.extend(ports.classes.iter().map(|(p, class)| (*p, *class, *rule)));
        }
        keyed.sort_unstable();
        keyed
    }

    /// The entries for every peer that has none of its own.
    fn base(&self, base: &mut Base, out: &mut Output) {
        for proto in Proto::ALL {
            let whole_rules = run(&base.any, proto, CLASS_ANY);
            let whole = self.answer([whole_rules, &[], &[], &[]], base, None, out);
            base.whole[proto as usize] = whole;
            let by_class: Vec<(u16, RuleEntry)> = classes(&base.any, proto)
                .map(|class| {
                    (class, self.answer([whole_rules, run(&base.any, proto, class), &[], &[]], base, None, out))
                })
                .collect();
            if whole != base.default.entry() {
                emit(base, &[Identity::ANY], proto, CLASS_ANY, whole, out);
            }
            for (class, answer) in by_class {
                if answer != whole {
                    let _ = base.by_class.insert((proto as u8, class), answer);
                    emit(base, &[Identity::ANY], proto, class, answer, out);
                }
            }
        }
    }

    /// The entries for one group of peers. `apart` = the rules for `any` do not hold for them, and this is their default.
    fn peer(&self, base: &mut Base, peers: &[Identity], own: &Keyed, apart: Option<Outcome>, out: &mut Output) {
        let nothing = Keyed::new();
        for proto in Proto::ALL {
            let own_whole = run(own, proto, CLASS_ANY);
            let answer = |class: u16, base: &Base, out: &mut Output| {
                let any = if apart.is_some() { &nothing } else { &base.any };
                let (any_class, own_class) = match class {
                    CLASS_ANY => (&[][..], &[][..]),
                    _ => (run(any, proto, class), run(own, proto, class)),
                };
                self.answer([run(any, proto, CLASS_ANY), any_class, own_whole, own_class], base, apart, out)
            };
            if apart.is_none() && own_whole.is_empty() {
                // Only the classes that these rules name can differ from what everybody gets.
                let named: Vec<u16> = classes(own, proto).collect();
                for class in named {
                    let entry = answer(class, base, out);
                    if entry != base.fall_through(proto, class) {
                        emit(base, peers, proto, class, entry, out);
                    }
                }
                continue;
            }
            let whole = answer(CLASS_ANY, base, out);
            let stop = whole != base.whole[proto as usize];
            if stop {
                emit(base, peers, proto, CLASS_ANY, whole, out);
            }
            let mut named: Vec<u16> = classes(own, proto).chain(classes(&base.any, proto)).collect();
            named.sort_unstable();
            named.dedup();
            for class in named {
                let entry = answer(class, base, out);
                if entry != (if stop { whole } else { base.fall_through(proto, class) }) {
                    emit(base, peers, proto, class, entry, out);
                }
            }
        }
    }

    /// The answer of an ordered list of rules, now and later.
    fn answer(
        &self,
        lists: [&[(u8, u16, u32)]; 4],
        base: &Base,
        apart: Option<Outcome>,
        out: &mut Output,
    ) -> RuleEntry {
        let fallback = apart.unwrap_or(base.default);
        let mut rules: Vec<&Prepared> = Vec::new();
        let (mut limited, mut passed) = (false, None);
        for rule in InOrder(lists).filter_map(|r| self.program.rule(r)) {
            rules.push(rule);
            limited |= rule.timing.is_some();
            match rule.action {
                RuleAction::Pass => passed = Some(rule.tier),
                // Nothing after this rule can matter, unless it may be skipped.
                RuleAction::Allow | RuleAction::Deny | RuleAction::Reject => {
                    if rule.timing.is_none() && !rule.monitor && passed != Some(rule.tier) {
                        break;
                    }
                }
            }
        }
        let now = self.clock.wall.as_nanosecond();
        if !limited {
            return entry_at(&rules, When::At(now), base.direction, fallback);
        }
        self.over_time(&rules, base.direction, fallback, out)
    }

    fn over_time(&self, rules: &[&Prepared], direction: Direction, fallback: Outcome, out: &mut Output) -> RuleEntry {
        let most = bounds::TIMELINE_HOPS as usize;
        let timings = || rules.iter().filter_map(|r| r.timing.as_ref());
        let known = timings().filter_map(|t| t.horizon).min();
        // (until, answer); `None` = for good.
        let mut parts: Vec<(Option<i128>, RuleEntry)> = Vec::new();
        let mut t = self.clock.wall.as_nanosecond();
        let mut cut = None;
        loop {
            if known.is_some_and(|known| t >= known) {
                cut = Some(t);
                break;
            }
            let entry = entry_at(rules, When::At(t), direction, fallback);
            let next =
                timings().filter_map(|x| x.boundaries.get(x.boundaries.partition_point(|b| *b <= t))).min().copied();
            let until = match (next, known) {
                (Some(next), Some(known)) => Some(next.min(known)),
                (next, known) => next.or(known),
            };
            match parts.last_mut() {
                Some(last) if last.1 == entry => last.0 = until,
                Some(_) | None => {
                    if parts.len() == most {
                        // The last part is for good, so it can only be the strict answer.
                        let _ = parts.pop();
                        cut = parts.last().and_then(|p| p.0);
                        break;
                    }
                    parts.push((until, entry));
                }
            }
            match until {
                Some(until) => t = until,
                None => break,
            }
        }
        if parts.len() == most && parts.last().is_some_and(|p| p.0.is_some()) {
            let _ = parts.pop();
            cut = parts.last().and_then(|p| p.0);
        }
        if let Some(horizon) = cut {
            parts.push((None, entry_at(rules, When::Strict(horizon), direction, fallback)));
            out.horizon = Some(out.horizon.map_or(horizon, |h| h.min(horizon)));
            if let [.., before, last] = parts.as_mut_slice()
                && before.1 == last.1
            {
                before.0 = None;
                let _ = parts.pop();
            }
        }
        let mut first = fallback.entry();
        let mut next = 0;
        for (i, (until, entry)) in parts.into_iter().enumerate().rev() {
            first = RuleEntry { until: until.map_or(0, |t| self.clock.boot(t)), next, ..entry };
            if i > 0 {
                next = out.part(first);
            }
        }
        first
    }
}

impl Output {
    /// Index + 1 of a part of the timeline; equal parts, and so equal tails, are stored once.
    fn part(&mut self, entry: RuleEntry) -> u32 {
        if let Some(number) = self.known.get(&entry) {
            return *number;
        }
        self.timeline.push(entry);
        let number = self.timeline.len() as u32;
        let _ = self.known.insert(entry, number);
        for rule in named_rules(&entry) {
            *self.timeline_cost.entry(rule).or_default() += 1;
        }
        number
    }

    /// Rules that an entry names, now or later.
    fn rules_of(&self, entry: &RuleEntry) -> Vec<u32> {
        let mut rules: Vec<u32> = named_rules(entry).collect();
        let mut next = entry.next;
        while let Some(part) = next.checked_sub(1).and_then(|i| self.timeline.get(i as usize)) {
            rules.extend(named_rules(part));
            next = part.next;
        }
        rules.sort_unstable();
        rules.dedup();
        rules
    }
}

fn named_rules(entry: &RuleEntry) -> impl Iterator<Item = u32> + use<> {
    let pending = if entry.pending == 0 { 0 } else { entry.pending_rule };
    let rules = if pending == entry.rule { [entry.rule, 0] } else { [entry.rule, pending] };
    rules.into_iter().filter(|r| *r != 0)
}

fn emit(base: &mut Base, peers: &[Identity], proto: Proto, class: u16, entry: RuleEntry, out: &mut Output) {
    let any_peer = peers == [Identity::ANY];
    base.levels |= LocalEntry::level(base.direction, any_peer, class == CLASS_ANY);
    let count = base.locals.len() as u64 * peers.len() as u64;
    out.needed += count;
    for rule in out.rules_of(&entry) {
        *out.cost.entry(rule).or_default() += count;
    }
    if out.needed > u64::from(bounds::RULES) {
        // Refused already; go on counting, so that the message is exact.
        return;
    }
    for local in &base.locals {
        let key = |remote: &Identity| RuleKey {
            local: *local,
            remote: *remote,
            class,
            proto: proto as u8,
            direction: base.direction as u8,
        };
        out.rules.extend(peers.iter().map(|remote| (key(remote), entry)));
    }
}

/// Both answers at one moment.
fn entry_at(rules: &[&Prepared], when: When, direction: Direction, fallback: Outcome) -> RuleEntry {
    let enforced = judge(rules, when, direction, fallback, false);
    let mut entry = enforced.entry();
    if rules.iter().any(|r| r.monitor) {
        let all = judge(rules, when, direction, fallback, true);
        if all.passes() != enforced.passes() {
            entry.pending = all.action as u8;
            entry.pending_rule = all.rule;
        }
    }
    entry
}

/// The first rule that matches decides.
fn judge(rules: &[&Prepared], when: When, direction: Direction, fallback: Outcome, with_monitor: bool) -> Outcome {
    let (mut passed, mut missed) = (None, None);
    for rule in rules {
        if passed == Some(rule.tier) || (rule.monitor && !with_monitor) {
            continue;
        }
        let state = match (&rule.timing, when) {
            (None, _) => State::Active,
            (Some(timing), When::At(t)) => timing.at(t),
            (Some(timing), When::Strict(horizon)) => timing.strict(horizon, rule.action),
        };
        let action = match (rule.action, state) {
            (RuleAction::Allow, State::Expired) => {
                let _ = missed.get_or_insert((Reason::Expired, rule.number));
                continue;
            }
            (RuleAction::Allow, State::Closed) => {
                let _ = missed.get_or_insert((Reason::OutOfSchedule, rule.number));
                continue;
            }
            (_, State::Expired | State::Closed) => continue,
            (RuleAction::Pass, State::Active) => {
                passed = Some(rule.tier);
                continue;
            }
            (RuleAction::Allow, State::Active) => Action::Allow,
            (RuleAction::Deny, State::Active) => Action::Deny,
            (RuleAction::Reject, State::Active) => Action::Reject,
        };
        let flags = if matches!(action, Action::Allow) { rule.flags[direction as usize] } else { 0 };
        return Outcome { action, reason: Reason::Rule, rule: rule.number, flags };
    }
    match missed {
        Some((reason, rule)) if !fallback.passes() => Outcome { action: Action::Deny, reason, rule, flags: 0 },
        Some(_) | None => fallback,
    }
}

pub mod amend;
pub mod ends;
pub use amend::{Amendment, PortLists, amend};
pub use ends::Ends;
#[doc(hidden)]
pub mod random;
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod tests;
