//! Documents to [`HostPolicy`]: names looked up, defaults settled, rules in order of precedence; and the warnings that
//! need all documents at once.

use super::document::{At, CaseDoc, Document, PeerDoc, PolicyDoc, RuleDoc, SegmentDoc, TestDoc, WorkloadDoc};
use super::host_policy::{
    HostPolicy, Labels, Members, PeerSpec, PortSpec, Position, Requirement, Rule, RuleAction, Segment, Selector, Tier,
};
use super::inventory::Inventory;
use super::problem::{Problem, Problems, Severity, nearest, quote};
use super::selector;
use foldhash::{HashMap, HashMapExt as _, HashSet, HashSetExt as _};
use ipnet::IpNet;
use jiff::Timestamp;
use segfw_common::{Evidence, Proto};
use sha2::{Digest, Sha256};
use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Comparisons spent on each kind of advice (near misses, shadowed rules). Advice is worth about a second, even where
/// the documents are hostile; when it is used up, a warning says that there is no more.
const ADVICE: usize = 4_000_000;

/// Words compared for suggestions: some ten typing errors among a few thousand names.
const NEAR: usize = 50_000;
/// Errors told, and warnings told: more would drown the reader.
const TOLD: usize = 10_000;

/// What the host says about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostSettings {
    /// Judge and log everything, enforce nothing.
    pub monitor: bool,
}

/// The policy of this host, and every problem, sorted. With an error among the problems the policy must not be used.
pub fn resolve<D: Borrow<Document>>(
    docs: &[D],
    inventory: &Inventory,
    host: &HostSettings,
    now: Timestamp,
) -> (HostPolicy, Vec<Problem>) {
    let mut sorted: Vec<&Document> = docs.iter().map(Borrow::borrow).collect();
    sorted.sort_by(|a, b| (&a.meta().name, &a.meta().at).cmp(&(&b.meta().name, &b.meta().at)));
    let (mut workloads, mut segments, mut policies, mut tests) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for doc in sorted {
        match doc {
            Document::Workload(d) => workloads.push(d),
            Document::Segment(d) => segments.push(d),
            Document::Policy(d) => policies.push(d),
            Document::Test(d) => tests.push(d),
        }
    }
    let mut work = Resolver {
        index: segments.iter().enumerate().map(|(i, d)| (d.meta.name.as_str(), i)).collect(),
        mentioned: HashSet::new(),
        near: HashMap::new(),
        budget: NEAR,
        problems: Told::default(),
    };
    let mut policy = HostPolicy {
        segments: segments.iter().copied().map(segment).collect(),
        rules: Vec::new(),
        monitor: host.monitor,
    };
    policy.rules.reserve_exact(policies.iter().map(|doc| doc.rules.len()).sum());
    for doc in &policies {
        let name = doc.meta.name.as_str().into();
        policy.rules.extend(doc.rules.iter().filter_map(|rule| work.rule(doc, &name, rule)));
    }
    policy.rules.sort_by(|a, b| precedence(a).cmp(&precedence(b)));

    for doc in &policies {
        if doc.monitor {
            let what = format!("the policy {} has only monitor rules", quote(&doc.meta.name));
            work.problems.push(Problem::warning(
                doc.meta.at.clone(),
                what,
                "they are judged and logged, never enforced",
            ));
        }
        for expires in doc.rules.iter().filter_map(|r| r.expires.as_ref()).filter(|e| e.value <= now) {
            let what = format!("the rule expired at {}", expires.value);
            work.problems.push(Problem::warning(expires.at.clone(), what, "it matches nothing any more"));
        }
    }
    for (_, doc) in segments.iter().enumerate().filter(|(i, _)| !work.mentioned.contains(i)) {
        let what = format!("no rule mentions the segment {}", quote(&doc.meta.name));
        work.problems.push(Problem::warning(doc.meta.at.clone(), what, "only its default is in force"));
    }
    for doc in &policies {
        for rule in &doc.rules {
            ends(rule, &segments, &work.index, &mut work.problems);
        }
    }
    tests_name_rules(&tests, &policy.rules, &mut work.problems);
    unmatched_selectors(&workloads, &segments, &policies, inventory, &mut work.problems);
    shadowed(&policy, &mut work.problems);
    (policy, work.problems.into_sorted())
}

/// [`parse`](super::document::parse) and [`resolve`] together. While documents cannot be read, the advice about what is
/// missing would be wrong (the rule with the mistake is the one that mentions the segment), so it waits. Which cgroup
/// carries which labels follows from the documents, hence the inventory is asked for once they are read.
pub fn read<T: AsRef<str> + Sync>(
    files: &[(String, T)],
    inventory: impl FnOnce(&[Document]) -> Inventory,
    host: &HostSettings,
    now: Timestamp,
) -> (Vec<Document>, HostPolicy, Problems) {
    let (docs, problems) = super::document::parse(files);
    judged(docs, problems, inventory, host, now)
}

/// The second half of [`read`]: documents that were read to a policy.
pub fn judged<D: Borrow<Document>>(
    docs: Vec<D>,
    mut problems: Vec<Problem>,
    inventory: impl FnOnce(&[D]) -> Inventory,
    host: &HostSettings,
    now: Timestamp,
) -> (Vec<D>, HostPolicy, Problems) {
    let (policy, mut more) = resolve(&docs, &inventory(&docs), host, now);
    if problems.iter().any(|p| p.severity == Severity::Error) {
        more.retain(|p| p.severity == Severity::Error);
    }
    problems.extend(more);
    (docs, policy, Problems::new(problems))
}

/// Rules are asked in this order.
pub(super) fn precedence(r: &Rule) -> (Tier, u16, u8, &str, u32) {
    (r.tier, r.priority, r.action.rank(), &r.policy, r.index)
}

fn segment(doc: &SegmentDoc) -> Segment {
    let SegmentDoc {
        meta,
        members,
        default_ingress_allow,
        default_egress_allow,
        monitor,
        unresolved_allow,
        on_revoke,
        grants,
        tcp_only,
    } = doc;
    Segment {
        name: meta.name.clone(),
        owner: meta.owner.clone(),
        // Written wrongly, and said so: nobody, rather than everybody, should a caller forget to look.
        members: members.as_ref().map_or_else(
            || Members::Workloads(Selector(vec![Requirement::In { key: String::new(), values: Vec::new() }])),
            |m| m.value.clone(),
        ),
        default_ingress_allow: *default_ingress_allow,
        default_egress_allow: *default_egress_allow,
        monitor: *monitor,
        unresolved_allow: *unresolved_allow,
        on_revoke: *on_revoke,
        grants: *grants,
        tcp_only: *tcp_only,
        at: meta.at.clone(),
    }
}

/// What a change of documents does to a resolved policy: the rules, in full, of each policy whose document is another one
/// (none = it is gone). `None` = more than rules changed, or the whole must be resolved to say what is wrong with it.
pub fn changed_rules(
    policy: &HostPolicy,
    before: &[Arc<Document>],
    now: &[Arc<Document>],
) -> Option<BTreeMap<String, Vec<Rule>>> {
    let (old, new): (HashSet<_>, HashSet<_>) =
        (before.iter().map(Arc::as_ptr).collect(), now.iter().map(Arc::as_ptr).collect());
    let of_policy = |doc: &'_ Arc<Document>| match &**doc {
        Document::Policy(doc) => Some(doc.meta.name.clone()),
        Document::Workload(_) | Document::Segment(_) | Document::Test(_) => None,
    };
    // Tests ask the whole policy.
    if now.iter().any(|doc| matches!(**doc, Document::Test(_))) {
        return None;
    }
    let mut changed = BTreeMap::new();
    for doc in before.iter().filter(|doc| !new.contains(&Arc::as_ptr(doc))) {
        let _ = changed.insert(of_policy(doc)?, Vec::new());
    }
    let added: Vec<_> = now.iter().filter(|doc| !old.contains(&Arc::as_ptr(doc))).collect();
    let mut work = Resolver {
        index: policy.segments.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect(),
        mentioned: HashSet::new(),
        near: HashMap::new(),
        budget: 0,
        problems: Told::default(),
    };
    for doc in added {
        let Document::Policy(doc) = &**doc else { return None };
        let name = doc.meta.name.as_str().into();
        let rules = doc.rules.iter().map(|rule| {
            // What the kernel answers by itself is judged with the segments at hand.
            let icmp = rule.ports.iter().any(|p| matches!(p.value.proto, Proto::Icmp | Proto::Icmpv6));
            if icmp { None } else { work.rule(doc, &name, rule) }
        });
        let rules = rules.collect::<Option<Vec<_>>>()?;
        let _ = changed.insert(doc.meta.name.clone(), rules);
    }
    Some(changed)
}

struct Resolver<'d> {
    index: HashMap<&'d str, usize>,
    mentioned: HashSet<usize>,
    /// Suggestions for names that were asked for before.
    near: HashMap<String, Option<String>>,
    /// Words that may still be compared for suggestions.
    budget: usize,
    problems: Told,
}

/// The problems of one resolution, bounded.
#[derive(Default)]
struct Told {
    problems: Vec<Problem>,
    errors: usize,
    warnings: usize,
}

impl Told {
    fn push(&mut self, problem: Problem) {
        let count = match problem.severity {
            Severity::Error => &mut self.errors,
            Severity::Warning => &mut self.warnings,
        };
        *count += 1;
        if *count <= TOLD {
            self.problems.push(problem);
        }
    }

    fn into_sorted(self) -> Vec<Problem> {
        let untold = self.errors.max(self.warnings).saturating_sub(TOLD);
        let mut sorted = Problems::new(self.problems).into_vec();
        if untold > 0
            && let Some(last) = sorted.last()
        {
            let why = format!("at most {TOLD} errors and {TOLD} warnings are shown");
            sorted.push(Problem::warning(last.at.clone(), "there are more problems", why));
        }
        sorted
    }
}

impl Resolver<'_> {
    /// `policy_name` is in the document too; here it is shared by all rules.
    fn rule(&mut self, policy: &PolicyDoc, policy_name: &Arc<str>, doc: &RuleDoc) -> Option<Rule> {
        let RuleDoc { name, index, from, to, ports, action, require, expires, schedule, log, at } = doc;
        let (from, to) = (self.peers(from), self.peers(to));
        Some(Rule {
            policy: Arc::clone(policy_name),
            name: Arc::clone(name),
            tier: policy.tier,
            priority: policy.priority,
            index: *index,
            from: from?,
            to: to?,
            ports: ports.iter().map(|p| p.value).collect(),
            action: *action,
            monitor: policy.monitor,
            require: *require,
            expires: expires.as_ref().map(|e| e.value),
            schedule: schedule.clone(),
            log: *log,
            at: at.clone(),
        })
    }

    fn peers(&mut self, peers: &[At<PeerDoc>]) -> Option<Vec<PeerSpec>> {
        let found: Vec<PeerSpec> = peers.iter().filter_map(|p| self.peer(p)).collect();
        (found.len() == peers.len()).then_some(found)
    }

    fn peer(&mut self, peer: &At<PeerDoc>) -> Option<PeerSpec> {
        Some(match &peer.value {
            PeerDoc::Any => PeerSpec::Any,
            PeerDoc::World => PeerSpec::World,
            PeerDoc::Host => PeerSpec::Host,
            PeerDoc::Unresolved => PeerSpec::Unresolved,
            PeerDoc::Select(selector) => PeerSpec::Select(selector.clone()),
            PeerDoc::Addresses(nets) => PeerSpec::Addresses(nets.clone()),
            PeerDoc::Named(name) => match self.index.get(name.as_str()) {
                Some(i) => {
                    let _ = self.mentioned.insert(*i);
                    PeerSpec::Segment(*i)
                }
                None => {
                    let what = format!("segment {} is not defined", quote(name));
                    let near = self.near(name);
                    let why = "a rule names segments, or any, world, host, unresolved";
                    self.problems.push(Problem::error(peer.at.clone(), what, why).meant(near.as_deref()));
                    return None;
                }
            },
        })
    }

    fn near(&mut self, name: &str) -> Option<String> {
        if let Some(near) = self.near.get(name) {
            return near.clone();
        }
        self.budget = self.budget.saturating_sub(self.index.len());
        if self.budget == 0 {
            return None;
        }
        let near = nearest(name, self.index.keys().copied().chain(super::document::RESERVED)).map(str::to_owned);
        let _ = self.near.insert(name.to_owned(), near.clone());
        near
    }
}

/// What a rule names at its ends: is anybody there who can enforce it?
fn ends(rule: &RuleDoc, segments: &[&SegmentDoc], index: &HashMap<&str, usize>, problems: &mut Told) {
    let workload = |peer: &At<PeerDoc>| match &peer.value {
        PeerDoc::Select(_) => true,
        // A name that is not defined or not well defined was reported; it is taken for what is usual.
        PeerDoc::Named(name) => index
            .get(name.as_str())
            .and_then(|i| segments.get(*i)?.members.as_ref())
            .is_none_or(|m| matches!(m.value, Members::Workloads(_))),
        PeerDoc::Addresses(_) | PeerDoc::Any | PeerDoc::World | PeerDoc::Host | PeerDoc::Unresolved => false,
    };
    let anybody = |peers: &[At<PeerDoc>]| peers.iter().any(|p| p.value == PeerDoc::Any || workload(p));
    if !anybody(&rule.from) && !anybody(&rule.to) {
        let what = format!("the rule {} is never enforced", quote(&rule.name));
        problems.push(Problem::warning(
            rule.at.clone(),
            what,
            "no workload is at either end, and judgements are made at workloads",
        ));
        return;
    }
    let icmp = rule.ports.iter().find(|p| matches!(p.value.proto, Proto::Icmp | Proto::Icmpv6));
    let Some(icmp) = icmp.filter(|_| anybody(&rule.to)) else { return };
    const KERNEL: &str =
        "the kernel answers ICMP before any hook of a workload sees it, so only the sending end is judged";
    let shown = super::ports::show(&icmp.value);
    if !rule.from.iter().any(workload) {
        let what = format!("{shown} of the rule {} cannot be enforced: no workload sends it", quote(&rule.name));
        let help = "name the sending workloads in from, or control inbound ICMP with the host firewall";
        problems.push(Problem::error(icmp.at.clone(), what, KERNEL).help(help));
    } else {
        let what = format!("{shown} of the rule {} is enforced at the sending end only", quote(&rule.name));
        problems.push(Problem::warning(icmp.at.clone(), what, KERNEL));
    }
}

/// `by:` must name a rule that exists, else the test could only fail in a puzzling way.
fn tests_name_rules(tests: &[&TestDoc], rules: &[Rule], problems: &mut Told) {
    // Most policies have no such test, and all names of all rules are many.
    if !tests.iter().flat_map(|t| &t.cases).any(|case| case.by.is_some()) {
        return;
    }
    let mut known: BTreeSet<String> = rules.iter().map(|r| r.name.to_string()).collect();
    known.extend(rules.iter().map(|r| format!("{}/{}", r.policy, r.name)));
    let mut budget = NEAR;
    for CaseDoc { by, .. } in tests.iter().flat_map(|t| &t.cases) {
        let Some(by) = by.as_ref().filter(|by| !known.contains(&by.value)) else { continue };
        budget = budget.saturating_sub(known.len());
        let near = if budget == 0 { None } else { nearest(&by.value, known.iter().map(String::as_str)) };
        let what = format!("rule {} is not defined", quote(&by.value));
        problems.push(
            Problem::error(by.at.clone(), what, "by names the rule that must decide: rule or policy/rule").meant(near),
        );
    }
}

/// Selectors that find nothing among the labels that exist.
fn unmatched_selectors(
    workloads: &[&WorkloadDoc],
    segments: &[&SegmentDoc],
    policies: &[&PolicyDoc],
    inventory: &Inventory,
    problems: &mut Told,
) {
    let seen = inventory.workloads.iter().map(|k| &k.labels);
    let known = selector::Carried::new(workloads.iter().map(|d| &d.labels).chain(seen));
    let mut selectors: Vec<(&Selector, &Position)> = Vec::new();
    for members in segments.iter().filter_map(|d| d.members.as_ref()) {
        if let Members::Workloads(selector) = &members.value {
            selectors.push((selector, &members.at));
        }
    }
    for peer in policies.iter().flat_map(|d| &d.rules).flat_map(|r| r.from.iter().chain(&r.to)) {
        if let PeerDoc::Select(selector) = &peer.value {
            selectors.push((selector, &peer.at));
        }
    }
    let mut answers: BTreeMap<String, Option<(String, Option<String>)>> = BTreeMap::new();
    let (mut spent, mut near) = (0usize, NEAR);
    for (selector, at) in selectors {
        let text = selector::show(selector);
        if !answers.contains_key(&text) {
            spent = spent.saturating_add((known.len() + 1) * (selector.0.len() + 1));
            if spent > ADVICE {
                problems.push(no_more_advice(at, "selectors that match nothing"));
                return;
            }
            let answer = known.unmatched(selector, &mut near).filter(|_| !together(selector, workloads, &mut spent));
            let _ = answers.insert(text.clone(), answer);
        }
        if let Some(Some((what, help))) = answers.get(&text) {
            let why = "compared with the Workload documents and the inventory";
            problems.push(Problem { help: help.clone(), ..Problem::warning(at.clone(), what, why) });
        }
    }
}

/// Whether two Workload documents that do not contradict each other give a workload the labels together.
fn together(selector: &Selector, workloads: &[&WorkloadDoc], spent: &mut usize) -> bool {
    let partly: Vec<&Labels> = workloads
        .iter()
        .map(|d| &d.labels)
        .filter(|labels| {
            selector.0.iter().any(|r| match r {
                Requirement::In { key, values } => labels.get(key).is_some_and(|v| values.contains(v)),
                Requirement::Exists { key } => labels.contains_key(key),
                Requirement::NotIn { .. } | Requirement::NotExists { .. } => false,
            })
        })
        .collect();
    for (i, a) in partly.iter().enumerate() {
        for b in partly.iter().skip(i + 1) {
            *spent += 1;
            if *spent > ADVICE {
                return true;
            }
            if a.iter().all(|(k, v)| b.get(k).is_none_or(|other| other == v)) {
                let both: Labels = a.iter().chain(b.iter()).map(|(k, v)| (k.clone(), v.clone())).collect();
                if selector.matches(&both) {
                    return true;
                }
            }
        }
    }
    false
}

fn no_more_advice(at: &Position, about: &str) -> Problem {
    let why = format!("the documents are too large for more than {ADVICE} comparisons");
    Problem::warning(at.clone(), format!("{about} are not looked for from here on"), why)
}

/// Rules that an earlier rule leaves nothing to decide.
fn shadowed(policy: &HostPolicy, problems: &mut Told) {
    let mut budget = ADVICE;
    // Earlier rules that always decide, and whether a pass comes before them in their tier: what passes is judged
    // further on, so it goes past them into a later tier.
    let mut deciding: Vec<(&Rule, bool)> = Vec::new();
    let mut passes: HashSet<Tier> = HashSet::new();
    for late in &policy.rules {
        let by = deciding.iter().find(|(early, passed_by)| {
            (early.tier == late.tier || !passed_by) && covers(policy, early, late, &mut budget)
        });
        if budget == 0 {
            problems.push(no_more_advice(&late.at, "shadowed rules"));
            return;
        }
        if let Some((early, _)) = by {
            let Position { file, line, column } = &early.at;
            let what = format!("the rule {} can never be reached", quote(&late.name));
            let why = format!("{}/{} at {file}:{line}:{column} decides all that it matches", early.policy, early.name);
            problems.push(Problem::warning(late.at.clone(), what, why));
        }
        if late.action == RuleAction::Pass {
            let _ = passes.insert(late.tier);
        } else if always_decides(late) {
            deciding.push((late, passes.contains(&late.tier)));
        }
    }
}

fn always_decides(rule: &Rule) -> bool {
    !rule.monitor && rule.expires.is_none() && rule.schedule.is_none() && rule.require == Evidence::None
}

/// Whether `early` matches whatever `late` matches, as far as the text shows it.
fn covers(policy: &HostPolicy, early: &Rule, late: &Rule, budget: &mut usize) -> bool {
    let port = |l: &PortSpec| early.ports.iter().any(|e| e.proto == l.proto && e.first <= l.first && l.last <= e.last);
    let mut peers = |early: &[PeerSpec], late: &[PeerSpec]| {
        late.iter().all(|l| {
            early.iter().any(|e| {
                *budget = budget.saturating_sub(1);
                *budget > 0 && covers_peer(policy, e, l, budget)
            })
        })
    };
    peers(&early.from, &late.from)
        && peers(&early.to, &late.to)
        && (early.ports.is_empty() || !late.ports.is_empty() && late.ports.iter().all(port))
}

fn covers_peer(policy: &HostPolicy, early: &PeerSpec, late: &PeerSpec, budget: &mut usize) -> bool {
    if let (Some(early), Some(late)) = (addresses(policy, early), addresses(policy, late)) {
        return late.iter().all(|l| {
            early.iter().any(|e| {
                *budget = budget.saturating_sub(1);
                *budget > 0 && contains(e, l)
            })
        });
    }
    match (early, late) {
        // Who is not known yet has a declared verdict of its own, so it is not taken for covered.
        (PeerSpec::Any, other) => !matches!(other, PeerSpec::Unresolved),
        (PeerSpec::Segment(a), PeerSpec::Segment(b)) => a == b,
        (PeerSpec::World, PeerSpec::World)
        | (PeerSpec::Host, PeerSpec::Host)
        | (PeerSpec::Unresolved, PeerSpec::Unresolved) => true,
        (PeerSpec::Select(_) | PeerSpec::Segment(_), PeerSpec::Select(_) | PeerSpec::Segment(_)) => {
            selector_of(policy, early).is_some_and(|e| Some(e) == selector_of(policy, late))
        }
        _ => false,
    }
}

/// As `IpNet::contains`, in a third of the time: this is asked up to [`ADVICE`] times.
fn contains(outer: &IpNet, inner: &IpNet) -> bool {
    match (outer, inner) {
        (IpNet::V4(outer), IpNet::V4(inner)) => {
            let differ = u64::from(u32::from(outer.addr()) ^ u32::from(inner.addr()));
            outer.prefix_len() <= inner.prefix_len() && differ >> (32 - outer.prefix_len()) == 0
        }
        (IpNet::V4(_) | IpNet::V6(_), IpNet::V4(_) | IpNet::V6(_)) => outer.contains(inner),
    }
}

fn addresses<'p>(policy: &'p HostPolicy, peer: &'p PeerSpec) -> Option<&'p [IpNet]> {
    match peer {
        PeerSpec::Addresses(nets) => Some(nets),
        PeerSpec::Segment(i) => match &policy.segments.get(*i)?.members {
            Members::Addresses(nets) => Some(nets),
            Members::Workloads(_) => None,
        },
        PeerSpec::Select(_) | PeerSpec::Any | PeerSpec::World | PeerSpec::Host | PeerSpec::Unresolved => None,
    }
}

fn selector_of<'p>(policy: &'p HostPolicy, peer: &'p PeerSpec) -> Option<&'p Selector> {
    match peer {
        PeerSpec::Select(selector) => Some(selector),
        PeerSpec::Segment(i) => match &policy.segments.get(*i)?.members {
            Members::Workloads(selector) => Some(selector),
            Members::Addresses(_) => None,
        },
        PeerSpec::Addresses(_) | PeerSpec::Any | PeerSpec::World | PeerSpec::Host | PeerSpec::Unresolved => None,
    }
}

/// SHA-256 over names and texts in the order of the names, in hex. Lengths go first, so no text can pass for a name.
pub fn digest<T: AsRef<str>>(files: &[(String, T)]) -> String {
    let mut sorted: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_ref())).collect();
    sorted.sort_unstable();
    let mut hash = Sha256::new();
    for (name, text) in sorted {
        for part in [name, text] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part.as_bytes());
        }
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_contains_what() {
        let nets = [
            "0.0.0.0/0",
            "10.0.0.0/8",
            "10.128.0.0/9",
            "10.1.2.3/32",
            "10.1.2.2/31",
            "10.1.2.3/31",
            "11.0.0.0/8",
            "::/0",
            "2001:db8::/32",
        ];
        let nets: Vec<IpNet> = nets.iter().map(|net| net.parse().unwrap()).collect();
        for outer in &nets {
            for inner in &nets {
                assert_eq!(contains(outer, inner), outer.contains(inner), "{outer} {inner}");
            }
        }
    }
}
