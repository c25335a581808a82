//! Why a flow passes or not, in words. The answer itself is `segfw_common::decide` on the compiled tables; this module
//! only asks it, and looks in the policy for what a person would want to know next.

use super::compile::{Clock, compile, plain};
use super::host_policy::{HostPolicy, Labels, Members, PeerSpec, PortSpec, Rule, RuleAction, Segment};
use super::tables::{IdentityName, Numbers, RuleName, Tables, TablesView, canonical};
use super::window;
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use segfw_common::decide::{Flow, Peer};
use segfw_common::rule::ipproto;
use segfw_common::{Action, Addr, Decision, Direction, Evidence, Identity, LocalEntry, Proto, Reason, Verdict, decide};
use serde::Serialize;
use std::net::IpAddr;

/// Who stands at an end of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    Labels(Labels),
    /// An address that no workload claims.
    Address(IpAddr),
    /// Any address that neither a workload nor a policy names.
    World,
    Host,
    Unresolved,
}

/// One end of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    pub who: Who,
    /// How the other end knows it; `None` = as the kernel would, were the flow opened now.
    pub evidence: Option<Evidence>,
}

impl From<Who> for End {
    fn from(who: Who) -> Self {
        Self { who, evidence: None }
    }
}

/// "May source talk to destination there?"
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub source: End,
    pub destination: End,
    pub proto: Proto,
    /// Destination port; for ICMP `type << 8 | code`; for other protocols the IP protocol number.
    pub port: u16,
}

/// When the question is asked, and under which control flags.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// One moment on both clocks; the tables may be older.
    pub clock: Clock,
    /// Bits of `control::HOST_*`.
    pub host_flags: u64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Both ends let it pass (an end without judgement does).
    pub passes: bool,
    /// `tcp/5432`.
    pub port: String,
    /// Egress at the source.
    pub source: Judgement,
    /// Ingress at the destination.
    pub destination: Judgement,
}

/// What one end says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "judgement", rename_all = "kebab-case")]
pub enum Judgement {
    /// No agent here: no judgement.
    None { who: String, why: &'static str },
    /// Judged with these tables.
    Judged(Box<Judged>),
}

/// What one end says, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Judged {
    pub direction: &'static str,
    pub verdict: &'static str,
    pub reason: &'static str,
    /// A refusal that is answered.
    pub reject: bool,
    pub rule: Option<RuleRef>,
    /// This end.
    pub local: String,
    /// Segments that this end is in.
    pub segments: Vec<String>,
    /// The other end.
    pub peer: String,
    /// How this end knows the other.
    pub evidence: &'static str,
    /// The same in words.
    pub evidence_means: String,
    /// Monitor rules would have answered otherwise.
    pub pending: Option<Pending>,
    /// The answer holds until then; absent = until the next revision.
    pub until: Option<Timestamp>,
    /// What happens to a live connection once it is refused.
    pub on_revoke: String,
    /// A refusal: the rule that came closest to letting it pass.
    pub nearest: Option<Nearest>,
    /// An allow by a rule: what would be said without that rule.
    pub without: Option<Without>,
}

/// A rule, and where it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleRef {
    pub policy: String,
    pub rule: String,
    pub at: String,
}

/// What monitor rules would have answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pending {
    pub action: &'static str,
    /// Absent = the default.
    pub rule: Option<RuleRef>,
}

/// A rule that would have let the flow pass but for these conditions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Nearest {
    pub rule: RuleRef,
    pub differs: Vec<Differs>,
}

/// One condition that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Differs {
    pub what: What,
    /// In words.
    pub because: String,
}

/// Kinds of conditions, those that are easiest to have got wrong first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    Expired,
    OutOfSchedule,
    Monitor,
    Evidence,
    Order,
    Port,
    Direction,
    Peer,
    Local,
}

/// The answer if the deciding rule were absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Without {
    pub verdict: &'static str,
    pub reason: &'static str,
    /// Absent = the default.
    pub rule: Option<RuleRef>,
}

/// Explains one flow at both of its ends.
pub fn explain(tables: &Tables, policy: &HostPolicy, question: &Question, view: View) -> Explanation {
    let asker = Asker { tables, policy, question, view };
    let source = asker.end(Direction::Egress);
    let destination = asker.end(Direction::Ingress);
    let passes = |j: &Judgement| match j {
        Judgement::None { .. } => true,
        Judgement::Judged(j) => j.verdict != Verdict::Denied.as_str(),
    };
    let number = PortSpec { proto: question.proto, first: question.port, last: question.port };
    Explanation { passes: passes(&source) && passes(&destination), port: port_text(&number), source, destination }
}

struct Asker<'a> {
    tables: &'a Tables,
    policy: &'a HostPolicy,
    question: &'a Question,
    view: View,
}

/// Stands for a label set that the tables do not know.
const UNKNOWN: Identity = Identity(u32::MAX);

fn identity(tables: &Tables, who: &Who) -> Identity {
    match who {
        Who::Labels(labels) => tables.identity_of(&IdentityName::Labels(labels.clone())).unwrap_or(UNKNOWN),
        Who::Address(ip) => tables.longest_prefix(&(*ip).into()).unwrap_or(Identity::WORLD),
        Who::World => Identity::WORLD,
        Who::Host => Identity::HOST,
        Who::Unresolved => Identity::UNRESOLVED,
    }
}

impl<'a> Asker<'a> {
    /// (this end, the other)
    fn ends(&self, direction: Direction) -> (&'a End, &'a End) {
        match direction {
            Direction::Egress => (&self.question.source, &self.question.destination),
            Direction::Ingress => (&self.question.destination, &self.question.source),
        }
    }

    fn decide(&self, tables: &Tables, direction: Direction) -> (Decision, Evidence) {
        let (local, peer) = self.ends(direction);
        let peer_identity = identity(tables, &peer.who);
        let evidence = peer.evidence.unwrap_or_else(|| self.usual_evidence(&peer.who, peer_identity, direction));
        let address = |end: &End| match end.who {
            Who::Address(ip) => Addr::from(ip),
            Who::Labels(_) | Who::World | Who::Host | Who::Unresolved => Addr::UNSPECIFIED_V4,
        };
        let (local_port, remote_port) = match direction {
            Direction::Ingress => (self.question.port, 0),
            Direction::Egress => (0, self.question.port),
        };
        let flow = Flow {
            direction,
            protocol: protocol(self.question.proto, self.question.port),
            local: identity(tables, &local.who),
            workload: 0,
            netns: 0,
            local_addr: address(local),
            remote_addr: address(peer),
            local_port,
            remote_port,
        };
        let clock = self.view.clock;
        let view = TablesView { tables, now: clock.boot_ns, host_flags: self.view.host_flags };
        (decide(&view, &flow, &Peer { identity: peer_identity, workload: 0, evidence }), evidence)
    }

    /// What the kernel would know of a peer: our own hooks saw it where it is on this host.
    fn usual_evidence(&self, who: &Who, identity: Identity, direction: Direction) -> Evidence {
        match who {
            Who::Labels(_) if self.tables.locals.contains_key(&identity) => match direction {
                Direction::Ingress => Evidence::Origin,
                Direction::Egress => Evidence::Endpoint,
            },
            Who::Labels(_) | Who::Host | Who::Unresolved => Evidence::Address,
            Who::World => Evidence::None,
            Who::Address(_) if identity == Identity::WORLD => Evidence::None,
            Who::Address(_) => Evidence::Prefix,
        }
    }

    fn end(&self, direction: Direction) -> Judgement {
        let (local, peer) = self.ends(direction);
        let segments: Vec<&Segment> = self.policy.segments.iter().filter(|s| member(s, &local.who)).collect();
        let none = |why| Judgement::None { who: who_text(&local.who), why };
        match &local.who {
            Who::Address(_) | Who::World => return none("no agent here: an address that no workload claims"),
            Who::Host => return none("processes of no workload are not judged"),
            Who::Labels(_) if segments.is_empty() => (),
            Who::Labels(_) | Who::Unresolved => {
                if !self.tables.locals.contains_key(&identity(self.tables, &local.who)) {
                    return none("not a workload that these tables enforce");
                }
            }
        }
        let (decision, evidence) = self.decide(self.tables, direction);
        let refused = decision.verdict == Verdict::Denied || would_refuse(&decision);
        let entry = self.tables.locals.get(&identity(self.tables, &local.who));
        Judgement::Judged(Box::new(Judged {
            direction: direction.as_str(),
            verdict: decision.verdict.as_str(),
            reason: decision.reason.as_str(),
            reject: decision.reject,
            rule: self.rule(decision.rule),
            local: who_text(&local.who),
            segments: segments.iter().map(|s| s.name.clone()).collect(),
            peer: who_text(&peer.who),
            evidence: evidence.as_str(),
            evidence_means: self.evidence_text(&peer.who, evidence),
            pending: (decision.pending != 0).then(|| Pending {
                action: Action::from_raw(decision.pending).as_str(),
                rule: self.rule(decision.pending_rule),
            }),
            until: (decision.until != 0).then(|| self.wall(decision.until)).flatten(),
            on_revoke: entry.map(on_revoke_text).unwrap_or_default(),
            nearest: if refused { self.nearest(direction, &decision) } else { None },
            without: if refused { None } else { self.without(direction, &decision) },
        }))
    }

    fn wall(&self, boot: u64) -> Option<Timestamp> {
        let ahead = i64::try_from(boot.checked_sub(self.view.clock.boot_ns)?).ok()?;
        self.view.clock.wall.checked_add(SignedDuration::from_nanos(ahead)).ok()
    }

    fn rule(&self, number: u32) -> Option<RuleRef> {
        let RuleName { policy, rule, at, .. } = self.tables.rule_names.get(&number)?;
        Some(RuleRef {
            policy: policy.to_string(),
            rule: rule.to_string(),
            at: format!("{}:{}:{}", at.file, at.line, at.column),
        })
    }

    fn evidence_text(&self, who: &Who, evidence: Evidence) -> String {
        match evidence {
            Evidence::None => "nobody claims the address".into(),
            Evidence::Prefix => {
                let name = self.tables.identities.get(&identity(self.tables, who));
                match name {
                    Some(IdentityName::Prefix(net)) => format!("the longest prefix that a policy names is {net}"),
                    Some(IdentityName::Reserved(_) | IdentityName::Labels(_)) | None => {
                        "a prefix that a policy names".into()
                    }
                }
            }
            Evidence::Address => "the exact address is known".into(),
            Evidence::Endpoint => "a socket on this host owns the address, protocol and port".into(),
            Evidence::Origin => "the hooks of this host saw who opened the flow".into(),
        }
    }

    /// Asks again without the deciding rule: the policy is compiled for this one pair, from the rules that touch it.
    fn without(&self, direction: Direction, decision: &Decision) -> Option<Without> {
        let decided = self.tables.rule_names.get(&decision.rule)?;
        let (local, peer) = self.ends(direction);
        let (source, destination) = (&self.question.source.who, &self.question.destination.who);
        let rules = self.policy.rules.iter().filter(|r| {
            !is(r, decided) && stands(self.policy, &r.from, source) && stands(self.policy, &r.to, destination)
        });
        let policy =
            HostPolicy { segments: self.policy.segments.clone(), rules: rules.cloned().collect(), monitor: false };
        let labels = |end: &End| match &end.who {
            Who::Labels(labels) => vec![labels.clone()],
            Who::Address(_) | Who::World | Who::Host | Who::Unresolved => vec![],
        };
        let tables = compile(&policy, &labels(local), &labels(peer), &mut Numbers::default(), self.view.clock).ok()?;
        let (other, _) = self.decide(&tables, direction);
        let rule = tables.rule_names.get(&other.rule).map(|name| RuleRef {
            policy: name.policy.to_string(),
            rule: name.rule.to_string(),
            at: format!("{}:{}:{}", name.at.file, name.at.line, name.at.column),
        });
        Some(Without { verdict: other.verdict.as_str(), reason: other.reason.as_str(), rule })
    }

    /// The allow rule with the fewest conditions that do not hold.
    fn nearest(&self, direction: Direction, decision: &Decision) -> Option<Nearest> {
        let name = self.tables.rule_names.get(&decision.rule);
        // A refusal by a rule, as opposed to one by default that names a rule whose time is over.
        let by_rule = decision.reason == Reason::Rule;
        let decided = name.filter(|_| by_rule).and_then(|n| self.policy.rules.iter().position(|r| is(r, n)));
        let mut best: Option<(usize, Vec<Differs>)> = None;
        for (i, rule) in self.policy.rules.iter().enumerate() {
            if rule.action != RuleAction::Allow {
                continue;
            }
            let Some(differs) = self.differs(rule, i, direction, decided, decision) else { continue };
            let rank = |d: &[Differs]| (d.len(), d.iter().map(|d| d.what).collect::<Vec<_>>());
            if !differs.is_empty() && best.as_ref().is_none_or(|(_, b)| rank(&differs) < rank(b)) {
                best = Some((i, differs));
            }
        }
        let (i, differs) = best?;
        Some(Nearest { rule: rule_ref(self.policy.rules.get(i)?), differs })
    }

    /// `None` = the rule is about two other ends altogether.
    fn differs(
        &self,
        rule: &Rule,
        index: usize,
        direction: Direction,
        decided: Option<usize>,
        decision: &Decision,
    ) -> Option<Vec<Differs>> {
        let q = self.question;
        let mut differs = Vec::new();
        let differ = |list: &mut Vec<Differs>, what, because: String| list.push(Differs { what, because });
        let from = stands(self.policy, &rule.from, &q.source.who);
        let to = stands(self.policy, &rule.to, &q.destination.who);
        if !from || !to {
            let reversed =
                stands(self.policy, &rule.from, &q.destination.who) && stands(self.policy, &rule.to, &q.source.who);
            let (local, peer) = match direction {
                Direction::Ingress => (to, from),
                Direction::Egress => (from, to),
            };
            let (this, other) = self.ends(direction);
            match (reversed, local, peer) {
                (true, _, _) => differ(&mut differs, What::Direction, "the rule allows the other direction".into()),
                (false, true, false) => {
                    differ(&mut differs, What::Peer, format!("the rule does not name {}", who_text(&other.who)))
                }
                (false, false, true) => {
                    differ(&mut differs, What::Local, format!("the rule does not name {}", who_text(&this.who)))
                }
                (false, _, _) => return None,
            }
        }
        if !(rule.ports.is_empty()
            || rule.ports.iter().any(|p| p.proto == q.proto && (p.first..=p.last).contains(&q.port)))
        {
            let ports: Vec<String> = rule.ports.iter().map(port_text).collect();
            differ(&mut differs, What::Port, format!("the rule is about {}", ports.join(", ")));
        }
        if let Some(expires) = rule.expires.filter(|e| *e <= self.view.clock.wall) {
            differ(&mut differs, What::Expired, format!("the rule expired at {expires}"));
        }
        if let Some(schedule) = rule.schedule.as_ref().filter(|s| !window::is_open(s, self.view.clock.wall)) {
            differ(&mut differs, What::OutOfSchedule, format!("the rule holds {}", schedule.text));
        }
        if rule.monitor {
            differ(&mut differs, What::Monitor, "the policy is in monitor mode".into());
        }
        match (decided, self.policy.rules.get(decided.unwrap_or(usize::MAX))) {
            (Some(at), Some(other)) if at < index => {
                let order = format!(
                    "{}/{} comes first (tier {}, priority {})",
                    other.policy,
                    other.name,
                    other.tier.as_str(),
                    other.priority
                );
                differ(&mut differs, What::Order, order);
            }
            _ => (),
        }
        let (_, other) = self.ends(direction);
        if decision.reason == Reason::NotAuthenticated
            && self.tables.rule_names.get(&decision.rule).is_some_and(|n| is(rule, n))
        {
            let because = format!("the rule needs evidence of {}: {}", who_text(&other.who), rule.require.as_str());
            differ(&mut differs, What::Evidence, because);
        }
        if differs.is_empty() {
            // Everything holds and yet it did not decide: an earlier `pass` skips the rest of its tier.
            differ(&mut differs, What::Order, format!("an earlier pass skips tier {}", rule.tier.as_str()));
        }
        differs.sort_by_key(|d| d.what);
        Some(differs)
    }
}

/// An audited flow whose enforced answer is a refusal.
fn would_refuse(decision: &Decision) -> bool {
    decision.verdict == Verdict::Audit && decision.pending <= Action::Allow as u8
}

fn is(rule: &Rule, name: &RuleName) -> bool {
    rule.name == name.rule && rule.policy == name.policy
}

fn rule_ref(rule: &Rule) -> RuleRef {
    let at = format!("{}:{}:{}", rule.at.file, rule.at.line, rule.at.column);
    RuleRef { policy: rule.policy.to_string(), rule: rule.name.to_string(), at }
}

fn member(segment: &Segment, who: &Who) -> bool {
    match (&segment.members, who) {
        (Members::Workloads(selector), Who::Labels(labels)) => selector.matches(labels),
        (Members::Addresses(nets), Who::Address(ip)) => holds(nets, *ip),
        (Members::Workloads(_) | Members::Addresses(_), _) => false,
    }
}

fn stands(policy: &HostPolicy, peers: &[PeerSpec], who: &Who) -> bool {
    peers.iter().any(|peer| match (peer, who) {
        (PeerSpec::Any, who) => *who != Who::Unresolved,
        (PeerSpec::Unresolved, who) => *who == Who::Unresolved,
        (PeerSpec::Host, who) => *who == Who::Host,
        (PeerSpec::World, who) => matches!(who, Who::Address(_) | Who::World),
        (PeerSpec::Segment(i), who) => policy.segments.get(*i).is_some_and(|s| member(s, who)),
        (PeerSpec::Select(selector), Who::Labels(labels)) => selector.matches(labels),
        (PeerSpec::Addresses(nets), Who::Address(ip)) => holds(nets, *ip),
        (PeerSpec::Select(_) | PeerSpec::Addresses(_), _) => false,
    })
}

fn holds(nets: &[IpNet], ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    nets.iter().any(|net| plain(net).contains(&ip))
}

fn who_text(who: &Who) -> String {
    match who {
        Who::Labels(labels) => canonical(labels),
        Who::Address(ip) => ip.to_string(),
        Who::World => "world".into(),
        Who::Host => "host".into(),
        Who::Unresolved => "unresolved".into(),
    }
}

fn port_text(port: &PortSpec) -> String {
    let PortSpec { proto, first, last } = *port;
    let name = proto.as_str();
    if first == 0 && last == u16::MAX {
        return name.to_owned();
    }
    match (proto, first == last) {
        (Proto::Icmp | Proto::Icmpv6, true) => format!("{name}/{}:{}", first >> 8, first & 255),
        // One type with every code.
        (Proto::Icmp | Proto::Icmpv6, false) if first & 255 == 0 && last == first | 255 => {
            format!("{name}/{}", first >> 8)
        }
        (_, true) => format!("{name}/{first}"),
        (_, false) => format!("{name}/{first}-{last}"),
    }
}

fn on_revoke_text(local: &LocalEntry) -> String {
    match local.drain_ns {
        0 => "cut".into(),
        u64::MAX => "keep".into(),
        ns => format!("drain: {}s", ns / 1_000_000_000),
    }
}

/// IP protocol number; `other` for what the language has no word for.
pub(crate) fn protocol(proto: Proto, other: u16) -> u16 {
    match proto {
        Proto::Tcp => ipproto::TCP,
        Proto::Udp => ipproto::UDP,
        Proto::Icmp => ipproto::ICMP,
        Proto::Icmpv6 => ipproto::ICMPV6,
        Proto::Sctp => ipproto::SCTP,
        Proto::UdpLite => ipproto::UDPLITE,
        Proto::Dccp => ipproto::DCCP,
        Proto::Other => other,
    }
}

#[cfg(test)]
mod tests;
