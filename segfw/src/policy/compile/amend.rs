//! A change of a few rules, compiled alone.
//!
//! An entry belongs to a pair of a local and a remote identity and to a direction, and follows from the rules that name
//! both. So a change of rules changes the entries of the pairs that these rules name, and no others: [`amend`] compiles
//! those pairs with all rules that name them, by the same code as [`compile`](super::compile), and says what differs from
//! the tables before. What a change may do beyond that (other prefixes, other label sets, a rule for `any` peers, rules
//! with an end) is left to a compilation from nothing: then the answer is `None`, which is never wrong, only slow.

use super::ends::{Peers, stretches};
use super::*;
use foldhash::{HashSet, HashSetExt as _};

/// More pairs than this are compiled from nothing.
const PAIRS: usize = 4_096;
/// More rules than this that name one of the pairs are compiled from nothing.
const RULES: usize = 16_384;
/// More prefixes than this at an end of a changed rule are compiled from nothing.
const PREFIXES: usize = 1_024;

/// Every port list that a rule with a local end has, and how many such rules have it: what the port classes rest on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortLists(pub(super) HashMap<Vec<PortSpec>, usize>);

impl PortLists {
    fn add(&mut self, list: &[PortSpec]) {
        match self.0.get_mut(list) {
            Some(count) => *count += 1,
            None => drop(self.0.insert(list.to_vec(), 1)),
        }
    }

    /// `None` = it is not there: these are not the lists of that policy.
    fn remove(&mut self, list: &[PortSpec]) -> Option<()> {
        let count = self.0.get_mut(list)?;
        *count -= 1;
        if *count == 0 {
            let _ = self.0.remove(list);
        }
        Some(())
    }

    fn classes(&self) -> Option<(ClassTables, HashMap<&[PortSpec], Ports>)> {
        let lists: Vec<&[PortSpec]> = self.0.keys().map(Vec::as_slice).collect();
        let (tables, ports) = port_classes(&lists).ok()?;
        Some((tables, lists.into_iter().zip(ports).collect()))
    }
}

/// What differs between two tables; `None` in the place of a value = there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amendment {
    pub rules: Vec<(RuleKey, Option<RuleEntry>)>,
    pub locals: Vec<(Identity, LocalEntry)>,
    pub rule_names: Vec<(u32, Option<RuleName>)>,
    /// `None` = as they were.
    pub classes: Option<Vec<Vec<u16>>>,
}

impl Amendment {
    /// The kernel would get the same.
    pub fn is_silent(&self) -> bool {
        let Self { rules, locals, rule_names: _, classes } = self;
        rules.is_empty() && locals.is_empty() && classes.is_none()
    }

    /// Makes the tables say this, and this say what the tables said: done twice it is undone.
    pub fn swap(&mut self, tables: &mut Tables) {
        let Self { rules, locals, rule_names, classes } = self;
        for (key, entry) in rules {
            *entry = match *entry {
                Some(new) => tables.rules.insert(*key, new),
                None => tables.rules.remove(key),
            };
        }
        for (identity, entry) in locals {
            if let Some(held) = tables.locals.get_mut(identity) {
                std::mem::swap(held, entry);
            }
        }
        for (number, name) in rule_names {
            *name = match name.take() {
                Some(new) => tables.rule_names.insert(*number, new),
                None => tables.rule_names.remove(number),
            };
        }
        if let Some(classes) = classes {
            std::mem::swap(&mut tables.classes, classes);
        }
    }
}

/// Who stands at one end of a changed rule.
#[derive(Default)]
struct End {
    /// Then `labels` are those of all local workloads.
    any: bool,
    /// Indices of label sets.
    labels: Vec<u32>,
    prefixes: Vec<(Net, Identity)>,
    world: bool,
    host: bool,
}

/// What is the same before and after.
struct Known<'a> {
    old: &'a HostPolicy,
    tables: &'a Tables,
    local: &'a [Labels],
    /// By index into `local`.
    identities: Vec<Identity>,
    index: LabelIndex<'a>,
}

/// What differs if some policies of `old` have other rules, given as the whole of their rules by name (none = the policy is
/// gone). `tables` and `lists` are those of `old`, and `local` the label sets that they were compiled for, with none
/// elsewhere. Also the port lists after it. `None` = that must be found by compiling everything.
pub fn amend(
    (old, ends): (&HostPolicy, &Ends),
    tables: &Tables,
    lists: &PortLists,
    local: &[Labels],
    changed: &BTreeMap<String, Vec<Rule>>,
    numbers: &mut Numbers,
    clock: Clock,
) -> Option<(Amendment, PortLists)> {
    let sides = ends.sides(old.rules.len())?;
    let stretches = stretches(&old.rules, changed.keys().map(String::as_str));
    let before: Vec<&Rule> = stretches.iter().filter_map(|stretch| old.rules.get(stretch.clone())).flatten().collect();
    // All the others, each with its ends.
    let starts = std::iter::once(0).chain(stretches.iter().map(|stretch| stretch.end));
    let others = starts.zip(stretches.iter().map(|stretch| stretch.start).chain([old.rules.len()]));
    let others = others.filter_map(|(first, past)| Some((old.rules.get(first..past)?, sides.get(first..past)?)));
    let others = others.flat_map(|(rules, sides)| rules.iter().zip(sides));
    let (gone, new) = sort_out(&before, changed)?;

    let sets: Vec<&Labels> = local.iter().collect();
    let identities = local.iter().map(|set| known_identity(numbers, &super::super::tables::canonical(set)));
    let identities = identities.collect::<Option<Vec<_>>>()?;
    let known = Known { old, tables, local, identities, index: LabelIndex::new(&sets) };

    // The prefixes that are named stay the same: those of new rules are there, those of gone rules are named elsewhere.
    let mut unnamed: HashSet<Net> = inline_nets(&gone).map(Net::from).collect();
    for net in inline_nets(&new) {
        let _ = known.prefix(net)?;
        let _ = unnamed.remove(&Net::from(net));
    }

    let mut after = lists.clone();
    let mut names = BTreeMap::new();
    let mut pairs = HashSet::new();
    let mut dirty = End::default();
    for rule in &gone {
        let (from, to) = known.plain_ends(rule)?;
        let number = numbers.known_rule(&rule.policy, &rule.name)?;
        if tables.rule_names.contains_key(&number) {
            after.remove(&rule.ports)?;
            let _ = names.insert(number, None);
        }
        known.add_pairs(&from, &to, &mut pairs)?;
        dirty.take(from);
        dirty.take(to);
    }
    for rule in &new {
        let (from, to) = known.plain_ends(rule)?;
        if known.is_enforced(&from) || known.is_enforced(&to) {
            after.add(&rule.ports);
        }
        known.add_pairs(&from, &to, &mut pairs)?;
        dirty.take(from);
        dirty.take(to);
    }
    let (classes, of_list) = after.classes()?;
    if classes != tables.classes {
        // Rules whose ports fall into other classes now.
        let (_, of_list_before) = lists.classes()?;
        let altered: HashSet<&[PortSpec]> = of_list_before
            .iter()
            .filter(|(list, ports)| of_list.get(*list).is_some_and(|p| p != *ports))
            .map(|(l, _)| *l)
            .collect();
        if !altered.is_empty() {
            for rule in old.rules.iter().filter(|r| altered.contains(r.ports.as_slice())) {
                let (from, to) = known.plain_ends(rule)?;
                known.add_pairs(&from, &to, &mut pairs)?;
                dirty.take(from);
                dirty.take(to);
            }
        }
    }
    dirty.tidy();

    // Every rule that names one of these pairs, and nobody else.
    let finder = Finder::new(&known, &dirty);
    let mut rules: Vec<&Rule> = Vec::new();
    for (rule, sides) in others.clone() {
        if finder.may_name(sides.from)
            && finder.may_name(sides.to)
            && finder.names(&rule.from)
            && finder.names(&rule.to)
        {
            rules.push(rule);
        }
    }
    for (rule, sides) in others {
        if unnamed.is_empty() {
            break;
        }
        if sides.from.has(Peers::ADDRESSES) || sides.to.has(Peers::ADDRESSES) {
            for net in inline_nets(&[rule]).map(Net::from) {
                let _ = unnamed.remove(&net);
            }
        }
    }
    for nets in old.segments.iter().filter_map(|s| match &s.members {
        Members::Addresses(nets) => Some(nets),
        Members::Workloads(_) => None,
    }) {
        for net in nets {
            let _ = unnamed.remove(&Net::from(net));
        }
    }
    rules.extend(changed.values().flatten());
    if !unnamed.is_empty() || rules.len() > RULES || rules.iter().any(|r| limited(r)) {
        return None;
    }
    rules.sort_by(|a, b| super::super::resolve::precedence(a).cmp(&super::super::resolve::precedence(b)));

    let part = HostPolicy {
        segments: old.segments.clone(),
        rules: rules.into_iter().cloned().collect(),
        monitor: old.monitor,
    };
    let prefixes: BTreeMap<Net, IpNet> = dirty
        .prefixes
        .iter()
        .map(|(net, identity)| match tables.identities.get(identity) {
            Some(IdentityName::Prefix(ip)) => Some((*net, *ip)),
            Some(IdentityName::Reserved(_) | IdentityName::Labels(_)) | None => None,
        })
        .collect::<Option<_>>()?;
    let of_prefixes: Vec<Identity> = prefixes.values().map(|net| numbers.identity(&net.to_string())).collect();
    let nodes = Nodes::new(local, &[], &prefixes, &of_prefixes, numbers);
    let specs = Specs::new(&part, &nodes);
    let groups = Groups::new(&specs, nodes.all.len());
    let program = Program::new(&part, &specs, &groups, &nodes, numbers, clock);
    let ports: Vec<Ports> = program.port_lists.iter().map(|l| of_list.get(l).cloned()).collect::<Option<_>>()?;
    let here = &known.identities;
    let emitter =
        Emitter { policy: &part, nodes: &nodes, groups: &groups, program: &program, ports: &ports, clock, here };
    let entries = emitter.pairs(&pairs)?;

    let mut amendment = Amendment { classes: (classes != tables.classes).then_some(classes), ..Amendment::default() };
    // Entries more or fewer, by the number of the rule.
    let mut cost: HashMap<u32, i64> = HashMap::new();
    for (local, remote, direction) in &pairs {
        let key = |class, proto| RuleKey { local: *local, remote: *remote, class, proto, direction: *direction as u8 };
        let there = tables.rules.range(key(0, 0)..=RuleKey { direction: u8::MAX, ..key(u16::MAX, u8::MAX) });
        for (key, entry) in there.filter(|(k, _)| k.direction == *direction as u8) {
            if entry.until != 0 {
                return None;
            }
            match entries.get(key) {
                Some(same) if same == entry => continue,
                Some(new) => amendment.rules.push((*key, Some(*new))),
                None => amendment.rules.push((*key, None)),
            }
            named_rules(entry).for_each(|rule| *cost.entry(rule).or_default() -= 1);
        }
    }
    let fresh = entries.iter().filter(|(key, _)| !tables.rules.contains_key(key));
    amendment.rules.extend(fresh.map(|(key, entry)| (*key, Some(*entry))));
    for entry in amendment.rules.iter().filter_map(|(_, entry)| entry.as_ref()) {
        named_rules(entry).for_each(|rule| *cost.entry(rule).or_default() += 1);
    }
    amendment.rules.sort_unstable_by_key(|(key, _)| *key);
    let more = amendment.rules.iter().filter(|(key, _)| !tables.rules.contains_key(key)).count();
    if tables.rules.len() + more > bounds::RULES as usize {
        return None;
    }
    known.levels(&mut amendment);

    // What the numbers mean, and what each rule costs.
    for (rule, prepared) in part.rules.iter().zip(&program.rules).filter_map(|(r, p)| Some((r, p.as_ref()?))) {
        if changed.contains_key(&*rule.policy) {
            let entries = tables.rule_names.get(&prepared.number).map_or(0, |name| name.entries);
            let _ = names.insert(prepared.number, Some(RuleName::of(rule, entries)));
        }
    }
    for (number, change) in cost {
        let name = match names.get_mut(&number) {
            Some(name) => name,
            None => names.entry(number).or_insert_with(|| tables.rule_names.get(&number).cloned()),
        };
        if let Some(name) = name {
            name.entries = usize::try_from(name.entries as i64 + change).unwrap_or(0);
        }
    }
    names.retain(|number, name| tables.rule_names.get(number) != name.as_ref());
    amendment.rule_names = names.into_iter().collect();
    Some((amendment, after))
}

/// The rules that are gone, and those that are new; a rule that says something else is both. `None` = two rules have
/// changed places.
fn sort_out<'a>(
    before: &[&'a Rule],
    changed: &'a BTreeMap<String, Vec<Rule>>,
) -> Option<(Vec<&'a Rule>, Vec<&'a Rule>)> {
    let mut known: HashMap<(&str, &str), &Rule> = before.iter().map(|r| ((&*r.policy, &*r.name), *r)).collect();
    if known.len() != before.len() {
        return None;
    }
    let (mut gone, mut new) = (Vec::new(), Vec::new());
    for rules in changed.values() {
        let mut last = None;
        for rule in rules {
            match known.remove(&(&*rule.policy, &*rule.name)) {
                Some(old) if says_the_same(old, rule) => {
                    if last.replace(old.index).is_some_and(|last| last >= old.index) {
                        return None;
                    }
                }
                Some(old) => {
                    gone.push(old);
                    new.push(rule);
                }
                None => new.push(rule),
            }
        }
    }
    gone.extend(known.into_values());
    Some((gone, new))
}

/// But for its place.
fn says_the_same(a: &Rule, b: &Rule) -> bool {
    let Rule {
        policy,
        name,
        tier,
        priority,
        index: _,
        from,
        to,
        ports,
        action,
        monitor,
        require,
        expires,
        schedule,
        log,
        at: _,
    } = a;
    *policy == b.policy
        && *name == b.name
        && *tier == b.tier
        && *priority == b.priority
        && *from == b.from
        && *to == b.to
        && *ports == b.ports
        && *action == b.action
        && *monitor == b.monitor
        && *require == b.require
        && *expires == b.expires
        && *schedule == b.schedule
        && *log == b.log
}

/// It has an end: its answers depend on when they are compiled.
fn limited(rule: &Rule) -> bool {
    rule.expires.is_some() || rule.schedule.is_some()
}

fn inline_nets<'r>(rules: &[&'r Rule]) -> impl Iterator<Item = &'r IpNet> {
    let peers = rules.iter().flat_map(|r| r.from.iter().chain(&r.to)).collect::<Vec<_>>().into_iter();
    peers.flat_map(|peer| match peer {
        PeerSpec::Addresses(nets) => nets.as_slice(),
        PeerSpec::Segment(_)
        | PeerSpec::Select(_)
        | PeerSpec::Any
        | PeerSpec::World
        | PeerSpec::Host
        | PeerSpec::Unresolved => &[],
    })
}

fn known_identity(numbers: &Numbers, canonical: &str) -> Option<Identity> {
    numbers.identities.get(canonical).copied().map(Identity)
}

impl End {
    fn take(&mut self, other: Self) {
        self.labels.extend(other.labels);
        self.prefixes.extend(other.prefixes);
        self.world |= other.world;
        self.host |= other.host;
        self.any |= other.any;
    }

    fn tidy(&mut self) {
        self.labels.sort_unstable();
        self.labels.dedup();
        self.prefixes.sort_unstable();
        self.prefixes.dedup();
    }
}

impl Known<'_> {
    /// The identity of a prefix that the tables have.
    fn prefix(&self, net: &IpNet) -> Option<Identity> {
        let net = plain(net);
        let bits = match net {
            IpNet::V4(v4) => MAPPED_BITS + u32::from(v4.prefix_len()),
            IpNet::V6(v6) => u32::from(v6.prefix_len()),
        };
        let found = self.tables.prefixes.get(&PrefixKey { bits, addr: net.network().into() }).copied()?;
        (found != Identity::WORLD).then_some(found)
    }

    /// Every prefix of the tables within one; `None` = more than [`PREFIXES`].
    fn within(&self, net: &IpNet) -> Option<Vec<(Net, Identity)>> {
        let net = plain(net);
        let (first, last, least) = match net {
            IpNet::V4(v4) => (
                IpAddr::from(v4.network().to_ipv6_mapped()),
                v4.broadcast().to_ipv6_mapped().into(),
                MAPPED_BITS + u32::from(v4.prefix_len()),
            ),
            IpNet::V6(v6) => (IpAddr::from(v6.network()), v6.broadcast().into(), u32::from(v6.prefix_len())),
        };
        let mut found = Vec::new();
        for bits in least..=128 {
            let key = |addr: IpAddr| PrefixKey { bits, addr: Addr::from(addr) };
            for (_, identity) in self.tables.prefixes.range(key(first)..=key(last)) {
                let Some(IdentityName::Prefix(ip)) = self.tables.identities.get(identity) else { continue };
                // One of the other family lies within `::/0` as far as its bits go.
                if matches!(ip, IpNet::V4(_)) == matches!(net, IpNet::V4(_)) {
                    found.push((Net::from(ip), *identity));
                }
            }
            if found.len() > PREFIXES {
                return None;
            }
        }
        Some(found)
    }

    /// Both ends of a rule that is simple enough.
    fn plain_ends(&self, rule: &Rule) -> Option<(End, End)> {
        // What such a protocol grants is a property of the local identity as a whole.
        let grants = |p: &PortSpec| !matches!(p.proto, Proto::Tcp | Proto::Udp | Proto::Other);
        if limited(rule) || rule.ports.iter().any(grants) {
            return None;
        }
        Some((self.end(&rule.from)?, self.end(&rule.to)?))
    }

    fn end(&self, peers: &[PeerSpec]) -> Option<End> {
        let mut end = End::default();
        for peer in peers {
            match peer {
                PeerSpec::Any => end.any = true,
                PeerSpec::Unresolved => return None,
                PeerSpec::World => {
                    end.world = true;
                    if self.tables.prefixes.len() > PREFIXES {
                        return None;
                    }
                    let all = self.tables.identities.iter().filter_map(|(identity, name)| match name {
                        IdentityName::Prefix(ip) => Some((Net::from(ip), *identity)),
                        IdentityName::Reserved(_) | IdentityName::Labels(_) => None,
                    });
                    end.prefixes.extend(all);
                }
                PeerSpec::Host => end.host = true,
                PeerSpec::Select(selector) => end.labels.extend(self.index.select(selector)),
                PeerSpec::Addresses(nets) => self.add_nets(&mut end, nets)?,
                PeerSpec::Segment(i) => match &self.old.segments.get(*i)?.members {
                    Members::Workloads(selector) => end.labels.extend(self.index.select(selector)),
                    Members::Addresses(nets) => self.add_nets(&mut end, nets)?,
                },
            }
        }
        if end.any {
            end.labels = (0..self.local.len() as u32).collect();
        }
        end.tidy();
        Some(end)
    }

    fn add_nets(&self, end: &mut End, nets: &[IpNet]) -> Option<()> {
        for net in nets {
            end.prefixes.extend(self.within(net)?);
            if end.prefixes.len() > PREFIXES {
                return None;
            }
        }
        Some(())
    }

    /// Local identities of an end that is enforced.
    fn enforced(&self, end: &End) -> Vec<Identity> {
        let identities = end.labels.iter().filter_map(|i| self.identities.get(*i as usize).copied());
        let is = |i: &Identity| self.tables.locals.get(i).is_some_and(|l| l.flags & LocalEntry::OPEN == 0);
        identities.filter(is).collect()
    }

    fn is_enforced(&self, end: &End) -> bool {
        !self.enforced(end).is_empty()
    }

    /// The pairs that a rule between these ends is about.
    fn add_pairs(&self, from: &End, to: &End, pairs: &mut HashSet<(Identity, Identity, Direction)>) -> Option<()> {
        for (here, there, direction) in [(from, to, Direction::Egress), (to, from, Direction::Ingress)] {
            let locals = self.enforced(here);
            if locals.is_empty() {
                continue;
            }
            // A rule for any peer has to do with every pair.
            if there.any {
                return None;
            }
            let mut remotes: Vec<Identity> = there.prefixes.iter().map(|(_, identity)| *identity).collect();
            remotes.extend(there.labels.iter().filter_map(|i| self.identities.get(*i as usize).copied()));
            remotes.extend(there.world.then_some(Identity::WORLD));
            remotes.extend(there.host.then_some(Identity::HOST));
            if pairs.len() + locals.len() * remotes.len() > PAIRS {
                return None;
            }
            pairs.extend(locals.iter().flat_map(|l| remotes.iter().map(|r| (*l, *r, direction))));
        }
        Some(())
    }

    /// Which kinds of keys the changed local identities have now.
    fn levels(&self, amendment: &mut Amendment) {
        const LEVELS: u32 = 0xff << 8;
        let level = |key: &RuleKey| {
            let direction = Direction::from_raw(key.direction).unwrap_or(Direction::Egress);
            LocalEntry::level(direction, key.remote == Identity::ANY, key.class == CLASS_ANY)
        };
        for of_local in amendment.rules.chunk_by(|a, b| a.0.local == b.0.local) {
            let Some(identity) = of_local.first().map(|(key, _)| key.local) else { continue };
            let Some(entry) = self.tables.locals.get(&identity).copied() else { continue };
            let gone: HashSet<&RuleKey> = of_local.iter().filter(|(_, e)| e.is_none()).map(|(key, _)| key).collect();
            let mut flags = of_local.iter().filter(|(_, e)| e.is_some()).fold(0, |all, (key, _)| all | level(key));
            if gone.is_empty() {
                flags |= entry.flags & LEVELS;
            } else {
                let least = RuleKey { local: identity, remote: Identity(0), class: 0, proto: 0, direction: 0 };
                let mine = self.tables.rules.range(least..).map(|(key, _)| key).take_while(|k| k.local == identity);
                for key in mine.filter(|key| !gone.contains(key)) {
                    flags |= level(key);
                    if flags & entry.flags & LEVELS == entry.flags & LEVELS {
                        break;
                    }
                }
            }
            let flags = entry.flags & !LEVELS | flags;
            if flags != entry.flags {
                amendment.locals.push((identity, LocalEntry { flags, ..entry }));
            }
        }
    }
}

/// Finds the rules that name one of a few peers.
struct Finder<'a> {
    known: &'a Known<'a>,
    dirty: &'a End,
    /// By the index of the segment.
    segments: Vec<bool>,
}

impl<'a> Finder<'a> {
    fn new(known: &'a Known<'a>, dirty: &'a End) -> Self {
        let mut finder = Self { known, dirty, segments: Vec::new() };
        let all = known.old.segments.iter().map(|s| match &s.members {
            Members::Workloads(selector) => finder.selects(selector),
            Members::Addresses(nets) => finder.holds(nets),
        });
        finder.segments = all.collect();
        finder
    }

    fn selects(&self, selector: &Selector) -> bool {
        self.dirty.labels.iter().any(|i| self.known.local.get(*i as usize).is_some_and(|l| selector.matches(l)))
    }

    fn holds(&self, nets: &[IpNet]) -> bool {
        !self.dirty.prefixes.is_empty()
            && nets.iter().map(Net::from).any(|net| {
                self.dirty.prefixes.iter().any(|(p, _)| p.v6 == net.v6 && net.start <= p.start && p.end() <= net.end())
            })
    }

    /// False = [`Self::names`] is false for these peers. Says it without the rule at hand.
    fn may_name(&self, peers: Peers) -> bool {
        peers.has(Peers::ANY | Peers::SEGMENTS)
            || peers.segment().is_some_and(|i| self.segments.get(i).copied().unwrap_or(true))
            || peers.has(Peers::SELECT) && !self.dirty.labels.is_empty()
            || peers.has(Peers::ADDRESSES | Peers::WORLD) && !self.dirty.prefixes.is_empty()
            || peers.has(Peers::WORLD) && self.dirty.world
            || peers.has(Peers::HOST) && self.dirty.host
    }

    fn names(&self, peers: &[PeerSpec]) -> bool {
        peers.iter().any(|peer| match peer {
            PeerSpec::Any => true,
            PeerSpec::Segment(i) => self.segments.get(*i).copied().unwrap_or(true),
            PeerSpec::Select(selector) => self.selects(selector),
            PeerSpec::Addresses(nets) => self.holds(nets),
            PeerSpec::World => self.dirty.world || !self.dirty.prefixes.is_empty(),
            PeerSpec::Host => self.dirty.host,
            PeerSpec::Unresolved => false,
        })
    }
}

impl Emitter<'_> {
    /// The entries of these pairs alone; `None` = some answer has an end.
    fn pairs(&self, pairs: &HashSet<(Identity, Identity, Direction)>) -> Option<BTreeMap<RuleKey, RuleEntry>> {
        let asked: HashSet<(Identity, Direction)> =
            pairs.iter().map(|(local, _, direction)| (*local, *direction)).collect();
        let mut out = Output::default();
        let mut scratch: Vec<Vec<u32>> = vec![Vec::new(); self.groups.all.len()];
        for touch in &self.program.touches {
            let Some(group) = self.groups.all.get(touch.group as usize) else { continue };
            let mut here = group.nodes.iter().filter(|n| (**n as usize) < self.nodes.local);
            if !here.any(|n| asked.contains(&(self.nodes.all[*n as usize], touch.direction))) {
                continue;
            }
            let rules = self.program.rules_of(touch);
            let mut local = self.local_entry(touch, &rules);
            let _ = self.touch(touch, &rules, &mut local, &mut out, &mut scratch);
        }
        if !out.timeline.is_empty() || out.horizon.is_some() || out.needed > u64::from(bounds::RULES) {
            return None;
        }
        let wanted = |key: &RuleKey| {
            let direction = Direction::from_raw(key.direction)?;
            pairs.contains(&(key.local, key.remote, direction)).then_some(())
        };
        Some(out.rules.into_iter().filter(|(key, _)| wanted(key).is_some()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::{Rng, World, random_rule};
    use super::super::testing::clock;
    use super::*;
    use crate::policy::resolve::precedence;

    const FIRST: u64 = 0;
    const LAST: u64 = 120;

    /// What most policies are made of; with everything else hardly a change could be compiled alone.
    fn plain(rule: &mut Rule, rng: &mut Rng) {
        (rule.expires, rule.schedule) = (None, None);
        for port in &mut rule.ports {
            port.proto = *rng.pick(&[Proto::Tcp, Proto::Udp]);
        }
        for peer in rule.from.iter_mut().chain(&mut rule.to) {
            if matches!(peer, PeerSpec::Any | PeerSpec::Unresolved) && !rng.one_in(10) {
                *peer = PeerSpec::Segment(0);
            }
        }
    }

    /// Other rules for one policy: some gone, some with another answer, some new, seldom in another order.
    fn another(rng: &mut Rng, policy: &HostPolicy, name: &str, fresh: &mut u32, simple: bool) -> Vec<Rule> {
        let mut rules: Vec<Rule> = policy.rules.iter().filter(|r| *r.policy == *name).cloned().collect();
        rules.sort_by_key(|r| r.index);
        rules.retain(|_| !rng.one_in(6));
        for rule in &mut rules {
            if rng.one_in(5) {
                let other = random_rule(rng, policy, rule.index);
                match rng.below(4) {
                    0 => rule.action = other.action,
                    1 => rule.ports = other.ports,
                    2 => rule.to = other.to,
                    _ => rule.log = !rule.log,
                }
            }
        }
        for _ in 0..rng.below(3) {
            *fresh += 1;
            let rule =
                Rule { name: format!("n{fresh}").into(), policy: name.into(), ..random_rule(rng, policy, *fresh) };
            rules.insert(rng.below(rules.len() + 1), rule);
        }
        if rng.one_in(12) && rules.len() > 1 {
            rules.swap(0, 1);
        }
        for (index, rule) in rules.iter_mut().enumerate() {
            (rule.index, rule.at.line) = (index as u32, index as u32 + 1);
            if simple {
                plain(rule, rng);
            }
        }
        rules
    }

    #[test]
    fn a_change_compiled_alone_is_as_if_all_were_compiled_anew() {
        let (mut alone, mut anew, mut loud) = (0, 0, 0);
        for run in FIRST..LAST {
            let mut rng = Rng(run << 20);
            let world = World::new(&mut rng);
            let simple = !rng.one_in(4);
            let sets: BTreeSet<Labels> = world.local.into_iter().chain(world.remote).collect();
            let sets: Vec<Labels> = sets.into_iter().collect();
            let mut policy = world.policy;
            for rule in &mut policy.rules {
                rule.policy = format!("p{}", rule.index % 3).into();
                if simple {
                    plain(rule, &mut rng);
                }
            }
            policy.rules.sort_by(|a, b| precedence(a).cmp(&precedence(b)));
            let (mut numbers, mut fresh) = (Numbers::default(), 0);
            let (mut tables, mut lists) = compile_whole(&policy, &sets, &[], &mut numbers, clock()).unwrap();
            let mut ends = Ends::of(&policy);
            for _ in 0..8 {
                let name = format!("p{}", rng.below(4));
                let rules = another(&mut rng, &policy, &name, &mut fresh, simple);
                let changed = BTreeMap::from([(name, rules)]);
                let mut given = numbers.clone();
                let amended = amend((&policy, &ends), &tables, &lists, &sets, &changed, &mut given, clock());
                let mut expected: Vec<Rule> =
                    policy.rules.iter().filter(|r| !changed.contains_key(&*r.policy)).cloned().collect();
                expected.extend(changed.values().flatten().cloned());
                expected.sort_by(|a, b| precedence(a).cmp(&precedence(b)));
                ends.replace_rules(&mut policy, changed);
                assert_eq!(format!("{:?}", policy.rules), format!("{expected:?}"), "run {run}");
                assert!(ends == Ends::of(&policy), "run {run}");
                if amended.is_some() {
                    numbers = given;
                }
                let (want, want_lists) = compile_whole(&policy, &sets, &[], &mut numbers, clock()).unwrap();
                match amended {
                    None => anew += 1,
                    Some((mut amendment, after)) => {
                        alone += 1;
                        loud += usize::from(!amendment.is_silent());
                        let before = (tables.digest(), tables.rule_names.clone());
                        amendment.swap(&mut tables);
                        // The same but for the places of parts in the timeline.
                        let differs = crate::policy::plan::diff(&tables, &want);
                        assert!(differs.is_empty(), "run {run}\n{differs}\n{:#?}", policy.rules);
                        assert!(!want.timeline.is_empty() || tables.rules == want.rules, "run {run}");
                        assert_eq!(tables.rules.len(), want.rules.len());
                        assert_eq!(tables.locals, want.locals, "run {run}");
                        assert_eq!(tables.prefixes, want.prefixes, "run {run}");
                        assert!(tables.classes == want.classes, "run {run}");
                        assert_eq!(tables.identities, want.identities, "run {run}");
                        assert_eq!(tables.rule_names, want.rule_names, "run {run}");
                        assert_eq!(after, want_lists, "run {run}");
                        amendment.swap(&mut tables);
                        assert!(before == (tables.digest(), tables.rule_names.clone()), "run {run}");
                    }
                }
                (tables, lists) = (want, want_lists);
            }
        }
        println!("{alone} changes compiled alone, {loud} of them with other tables, {anew} not");
        assert!(alone > 150 && loud > 60 && anew > 30, "{alone} {loud} {anew}");
    }
}
