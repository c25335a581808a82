//! [`Record`]: what is kept and shown of a flow. Field names are part of the product: scripts read them.

use super::coded::{Coded, Shared, Text, Word};
use super::sequence::Gap;
use crate::policy::host_policy::{Labels, Members, Position, Segment};
use crate::policy::tables::{IdentityName, RuleName, canonical};
use jiff::Timestamp;
use segfw_common::event::{DenialCount, DenialKey, EventKind, Hook};
use segfw_common::rule::ipproto;
use segfw_common::{Action, Addr, Direction, Evidence, FlowEvent, Identity, Proto, Reason, Verdict};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

/// One line of the stream: something that happened, or the exact statement that something is missing here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Item {
    /// Records that are not there. First, because its field `lost` tells the two apart.
    Lost(Loss),
    /// What happened.
    Flow(Box<Record>),
}

impl Item {
    /// When.
    pub fn time(&self) -> Timestamp {
        match self {
            Self::Lost(loss) => loss.time,
            Self::Flow(record) => record.time,
        }
    }
}

/// `lost` records are missing between `after` and `before`. Their verdicts stand and are in the counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// End of the gap.
    pub time: Timestamp,
    /// Where.
    pub host: Text,
    /// Exactly how many.
    pub lost: u64,
    /// Where they were lost.
    pub lost_in: LostIn,
    /// Beside them: refusals that lost sums (`kind: denials`) stood for.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub denials: u64,
    /// The CPU whose events they were, for `ring-buffer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
    /// The record before the gap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Timestamp>,
    /// The record behind the gap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Timestamp>,
}

/// Where records were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LostIn {
    /// The kernel's ring buffer was full: nobody has these records.
    RingBuffer,
    /// This reader was too slow; the agent's history may still have them.
    Reader,
    /// They were not written to disk: it was full, broken or too slow. Memory had them.
    Spool,
    /// Between the last record of one agent on disk and the first of the next: the ring buffer had no room while none
    /// ran, or the agent was killed before it had written them.
    Agent,
}

/// What kind of record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// As the kernel sent it.
    Event(EventKind),
    /// Denials that were counted in the kernel instead of sent one by one.
    Denials,
}

impl Kind {
    /// Number of `Denials`: the kernel has no such event.
    const DENIALS: u8 = 255;
}
impl Word for Kind {
    const WHAT: &'static str = "kind";
    fn word(self) -> &'static str {
        match self {
            Self::Event(kind) => kind.as_str(),
            Self::Denials => "denials",
        }
    }
    fn from_byte(raw: u8) -> Option<Self> {
        if raw == Self::DENIALS { Some(Self::Denials) } else { EventKind::from_raw(raw).map(Self::Event) }
    }
}

/// An IP protocol number, written as a word where there is one, else `ip-47`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Protocol(pub u16);

impl Protocol {
    const NAMED: [u16; 8] = [
        ipproto::TCP,
        ipproto::UDP,
        ipproto::ICMP,
        ipproto::ICMPV6,
        ipproto::SCTP,
        ipproto::UDPLITE,
        ipproto::DCCP,
        ipproto::MPTCP,
    ];
}
impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0, Proto::from_ip(self.0)) {
            (ipproto::MPTCP, _) => f.write_str("mptcp"),
            (number, Proto::Other) => write!(f, "ip-{number}"),
            // A class is told by the low byte; a number that no protocol has is not one of them.
            (number @ 256.., _) => write!(f, "ip-{number}"),
            (_, proto) => f.write_str(proto.as_str()),
        }
    }
}
/// Not a protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a protocol; write tcp, udp, icmp, icmpv6, sctp, udplite, dccp, mptcp, or a number")]
pub struct UnknownProtocol(String);
impl FromStr for Protocol {
    type Err = UnknownProtocol;
    fn from_str(s: &str) -> Result<Self, UnknownProtocol> {
        let word = s.to_ascii_lowercase();
        if let Some(number) = Self::NAMED.into_iter().find(|n| Self(*n).to_string() == word) {
            return Ok(Self(number));
        }
        word.strip_prefix("ip-").unwrap_or(&word).parse().map(Self).map_err(|_| UnknownProtocol(s.to_owned()))
    }
}
impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One thing that happened, with words instead of numbers. A field that does not apply is absent from the JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When, by the wall clock (RFC 3339); taken from the boot clock, so order survives a step of the wall clock.
    pub time: Timestamp,
    /// The host that judged.
    pub host: Text,
    /// `new`, `close`, `socket`, `revoked`, `reject`, or `denials` (a sum, see `count`).
    pub kind: Coded<Kind>,
    /// Which end of the flow this host is: `egress` = source, `ingress` = destination.
    pub direction: Coded<Direction>,
    /// `ALLOWED`, `DENIED`, `AUDIT`.
    pub verdict: Coded<Verdict>,
    /// Why.
    pub reason: Coded<Reason>,
    /// The refusal was answered (reset, unreachable, ECONNREFUSED).
    #[serde(default, skip_serializing_if = "is_false")]
    pub rejected: bool,
    /// Who opened the flow.
    pub source: End,
    /// Who was to answer.
    pub destination: End,
    /// `tcp`, `udp`, ...; `ip-47` where there is no word.
    pub protocol: Protocol,
    /// Type and code, for ICMP and ICMPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<Icmp>,
    /// `stream`, `datagram`, `raw`, ...: for `kind: socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_type: Option<Text>,
    /// `packet`, `vsock`, ...: for `kind: socket`, where the address family was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<Text>,
    /// The deciding rule; absent where none decided. `#17` where the number has no name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<Text>,
    /// The policy of that rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Text>,
    /// The revision that was asked; absent where the generation has no known one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// The revision as the kernel counts it.
    pub generation: u32,
    /// What monitor-mode policies would have said, where it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Pending>,
    /// Process id (thread group) of the caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Name of the calling task. The process chose it: a hint, not a proof.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// The local workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Text>,
    /// Path of the cgroup the local socket was born in; `id:4711` where it has no known path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Text>,
    /// Cookie of the local socket's network namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<u64>,
    /// The hook that spoke.
    pub hook: Coded<Hook>,
    /// What was carried; for `close` of TCP.
    #[serde(flatten)]
    pub traffic: Option<Traffic>,
    /// How many denials `kind: denials` stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// The CPU and its number of the event: a missing number is a lost record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
    /// See `cpu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
}

fn is_false(b: &bool) -> bool {
    !b
}
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// Absent where the socket had no address yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Absent where the protocol has none or none was chosen yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The identity's number.
    pub identity: u32,
    /// The identity in one word: `app=web,tier=api`, `10.0.0.0/8`, `world`.
    pub name: Text,
    /// The labels, where it has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Shared<Labels>>,
    /// The segments it is in.
    #[serde(default, skip_serializing_if = "no_segments")]
    pub segments: Shared<Vec<String>>,
    /// How this identity is known: for the other end only, this end is known for certain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Coded<Evidence>>,
}

fn no_segments(segments: &Shared<Vec<String>>) -> bool {
    segments.is_empty()
}

/// Type and code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Icmp {
    /// As IANA numbers them.
    #[serde(rename = "type")]
    pub kind: u8,
    /// As IANA numbers them.
    pub code: u8,
}

/// The shadow answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pending {
    /// What it would be.
    pub verdict: Coded<Verdict>,
    /// The rule that would decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<Text>,
    /// The policy of that rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Text>,
}

/// The final counts of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Payload bytes that the peer acknowledged.
    pub bytes_sent: u64,
    /// Payload bytes.
    pub bytes_received: u64,
    /// Segments.
    pub segments_sent: u32,
    /// Segments.
    pub segments_received: u32,
    /// Segments sent again.
    pub retransmits: u32,
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u32,
    /// Milliseconds since the flow was let through.
    pub duration_ms: u64,
}

/// Who an identity is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Who {
    /// In one word.
    pub name: Text,
    /// Where it has some.
    pub labels: Option<Shared<Labels>>,
    /// The segments it is in.
    pub segments: Shared<Vec<String>>,
}

/// What a rule's number means.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RuleWords {
    /// `payments-db-access`.
    pub policy: Text,
    /// `api-to-db`.
    pub rule: Text,
    /// Where it is written.
    pub at: Position,
}

/// What a cgroup's number means.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CgroupWords {
    /// From the root of the hierarchy.
    pub path: Text,
    /// The workload it belongs to.
    pub workload: Option<Text>,
}

/// Rules by number, in stretches that snapshots share: most revisions change a few rules of very many.
#[derive(Clone, Debug, Default)]
pub struct RuleNames(BTreeMap<u32, Arc<BTreeMap<u32, RuleWords>>>);

impl RuleNames {
    /// Numbers in one stretch.
    const STRETCH: u32 = 256;

    /// The words of a number.
    pub fn get(&self, number: u32) -> Option<&RuleWords> {
        self.0.get(&(number / Self::STRETCH))?.get(&number)
    }

    fn learn(&mut self, number: u32, RuleName { policy, rule, tier: _, at, entries: _ }: &RuleName) {
        if self.get(number).is_some_and(|w| **w.policy == **policy && **w.rule == **rule && w.at == *at) {
            return;
        }
        let words = RuleWords { policy: (&**policy).into(), rule: (&**rule).into(), at: at.clone() };
        let _ = Arc::make_mut(self.0.entry(number / Self::STRETCH).or_default()).insert(number, words);
    }
}

/// What numbers mean at this moment: a plain snapshot that the agent replaces as a whole.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// This host.
    pub host: Text,
    /// By identity. Shared, since a snapshot is taken whenever a cgroup comes or goes.
    pub identities: Arc<BTreeMap<u32, Who>>,
    /// By rule number.
    pub rules: RuleNames,
    /// By cgroup id.
    pub cgroups: BTreeMap<u64, CgroupWords>,
    /// Generation → revision.
    pub revisions: BTreeMap<u32, u64>,
    /// Wall clock minus boot clock, nanoseconds.
    pub wall_minus_boot: i128,
}

impl Names {
    /// Takes over what a compiled policy says its numbers mean. Older numbers stay: events of the last generation may
    /// still come, and counters hold them. `before` = the segments of the last time.
    pub fn learn(
        &mut self,
        identities: &BTreeMap<Identity, IdentityName>,
        rules: &BTreeMap<u32, RuleName>,
        segments: &[Segment],
        before: Option<&[Segment]>,
    ) {
        // A number never means another identity, and who is in which segment follows from both.
        let known = before == Some(segments);
        for (identity, name) in identities {
            if !known || !self.identities.contains_key(&identity.0) {
                let _ = Arc::make_mut(&mut self.identities).insert(identity.0, who(name, segments));
            }
        }
        self.learn_rules(rules.iter().map(|(number, name)| (*number, name)));
    }

    /// Takes over what rule numbers mean.
    pub fn learn_rules<'n>(&mut self, rules: impl Iterator<Item = (u32, &'n RuleName)>) {
        for (number, name) in rules {
            self.rules.learn(number, name);
        }
    }

    /// Wall time of a boot time.
    pub fn wall(&self, boot_ns: u64) -> Timestamp {
        let ns = i128::from(boot_ns).saturating_add(self.wall_minus_boot);
        Timestamp::from_nanosecond(ns).unwrap_or(if ns < 0 { Timestamp::MIN } else { Timestamp::MAX })
    }

    fn end(&self, identity: u32, addr: &Addr, port: Option<u16>, evidence: Option<u8>) -> End {
        let who = self.identities.get(&identity).cloned().unwrap_or_else(|| Who {
            name: reserved(Identity(identity)).map_or_else(|| format!("identity-{identity}").into(), Text::from),
            ..Who::default()
        });
        End {
            ip: (!addr.is_unspecified()).then(|| (*addr).into()),
            port: port.filter(|p| *p != 0),
            identity,
            name: who.name,
            labels: who.labels,
            segments: who.segments,
            evidence: evidence.map(Coded::from_byte),
        }
    }

    /// (rule, policy) of a number; 0 = none.
    fn rule(&self, number: u32) -> (Option<Text>, Option<Text>) {
        match self.rules.get(number) {
            Some(words) => (Some(words.rule.clone()), Some(words.policy.clone())),
            None if number == 0 => (None, None),
            None => (Some(format!("#{number}").into()), None),
        }
    }
}

/// The word for a reserved identity.
pub fn reserved(identity: Identity) -> Option<&'static str> {
    Some(match identity {
        Identity::UNRESOLVED => "unresolved",
        Identity::HOST => "host",
        Identity::WORLD => "world",
        Identity::KERNEL => "kernel",
        Identity::ANY => "any",
        Identity(_) => return None,
    })
}

fn who(name: &IdentityName, segments: &[Segment]) -> Who {
    let (text, labels) = match name {
        IdentityName::Reserved(word) => ((*word).to_owned(), None),
        IdentityName::Labels(labels) => (canonical(labels), Some(Shared::new(labels.clone()))),
        IdentityName::Prefix(net) => (net.to_string(), None),
    };
    let is_in = |segment: &&Segment| match (&segment.members, name) {
        (Members::Workloads(selector), IdentityName::Labels(labels)) => selector.matches(labels),
        (Members::Addresses(nets), IdentityName::Prefix(net)) => nets.iter().any(|n| n.contains(net)),
        (Members::Workloads(_) | Members::Addresses(_), _) => false,
    };
    let segments = segments.iter().filter(is_in).map(|s| s.name.clone()).collect();
    Who { name: text.into(), labels, segments: Shared::new(segments) }
}

/// (source, destination) of (this end, the other end).
fn ends(direction: u8, local: End, remote: End) -> (End, End) {
    match Direction::from_raw(direction) {
        // An unknown direction: this end first, as if it were egress.
        Some(Direction::Egress) | None => (local, remote),
        Some(Direction::Ingress) => (remote, local),
    }
}

/// Type and code are in the "port" that names the service: the destination's.
fn icmp(proto: Proto, service: u16) -> Option<Icmp> {
    let [kind, code] = service.to_be_bytes();
    match proto {
        Proto::Icmp | Proto::Icmpv6 => Some(Icmp { kind, code }),
        Proto::Tcp | Proto::Udp | Proto::Sctp | Proto::UdpLite | Proto::Dccp | Proto::Other => None,
    }
}

/// The shadow answer is an action; the unknown stays a number.
fn shadow(pending: u8) -> Coded<Verdict> {
    if pending == Action::Allow as u8 {
        Verdict::Allowed.into()
    } else if pending == Action::Deny as u8 || pending == Action::Reject as u8 {
        Verdict::Denied.into()
    } else {
        Coded::Unknown(pending)
    }
}

/// `SOCK_*` of Linux; the kernel puts flags above the low four bits.
fn socket_type(raw: u8) -> Text {
    match raw {
        1 => "stream".into(),
        2 => "datagram".into(),
        3 => "raw".into(),
        4 => "rdm".into(),
        5 => "seqpacket".into(),
        6 => "dccp".into(),
        10 => "packet".into(),
        other => format!("type-{other}").into(),
    }
}

/// `AF_*` of Linux; 0 = the family was not what was refused.
fn family(raw: u8) -> Option<Text> {
    Some(match raw {
        0 => return None,
        15 => "key".into(),
        17 => "packet".into(),
        21 => "rds".into(),
        29 => "can".into(),
        30 => "tipc".into(),
        31 => "bluetooth".into(),
        38 => "alg".into(),
        40 => "vsock".into(),
        43 => "smc".into(),
        44 => "xdp".into(),
        other => format!("family-{other}").into(),
    })
}

/// An event in words. Total: whatever the bytes, there is a record.
pub fn enrich(event: &FlowEvent, names: &Names) -> Record {
    // In full, so that a new field does not compile until it has a meaning.
    let FlowEvent {
        time,
        sequence,
        cgroup,
        netns,
        bytes_sent,
        bytes_received,
        duration,
        local_addr,
        remote_addr,
        local,
        remote,
        rule,
        pending_rule,
        generation,
        pid,
        cpu,
        segments_sent,
        segments_received,
        retransmits,
        rtt_us,
        local_port,
        remote_port,
        protocol,
        kind,
        direction,
        verdict,
        reason,
        pending,
        evidence,
        hook,
        reject,
        socket_type: socket,
        family: of_family,
        pad: _,
        comm,
    } = *event;
    let proto = Proto::from_ip(protocol);
    let kind = Coded::<Kind>::from_byte(kind);
    let is = |wanted: EventKind| kind == Coded::Known(Kind::Event(wanted));
    let port = |p: u16| proto.has_ports().then_some(p);
    let (source, destination) = ends(
        direction,
        names.end(local, &local_addr, port(local_port), None),
        // Before a socket has an address there is no other end to have evidence of.
        names.end(remote, &remote_addr, port(remote_port), (!is(EventKind::Socket)).then_some(evidence)),
    );
    let service = if direction == Direction::Ingress as u8 { local_port } else { remote_port };
    let (rule, policy) = names.rule(rule);
    let process = comm.split(|b| *b == 0).next().unwrap_or_default();
    let words = names.cgroups.get(&cgroup);
    Record {
        time: names.wall(time),
        host: names.host.clone(),
        kind,
        direction: Coded::from_byte(direction),
        verdict: Coded::from_byte(verdict),
        reason: Coded::from_byte(reason),
        rejected: reject != 0,
        source,
        destination,
        protocol: Protocol(protocol),
        icmp: if is(EventKind::Socket) { None } else { icmp(proto, service) },
        socket_type: (is(EventKind::Socket)).then(|| socket_type(socket)),
        family: family(of_family),
        rule,
        policy,
        revision: names.revisions.get(&generation).copied(),
        generation,
        pending: (pending != 0).then(|| {
            let (rule, policy) = names.rule(pending_rule);
            Pending { verdict: shadow(pending), rule, policy }
        }),
        pid: (pid != 0).then_some(pid),
        process: (!process.is_empty()).then(|| String::from_utf8_lossy(process).into_owned()),
        workload: words.and_then(|w| w.workload.clone()),
        cgroup: match words {
            Some(words) => Some(words.path.clone()),
            None => (cgroup != 0).then(|| format!("id:{cgroup}").into()),
        },
        netns: (netns != 0).then_some(netns),
        hook: Coded::from_byte(hook),
        // At `Reject`, `rtt_us` is a sequence number: never shown.
        traffic: is(EventKind::Close).then_some(Traffic {
            bytes_sent,
            bytes_received,
            segments_sent,
            segments_received,
            retransmits,
            rtt_us,
            duration_ms: duration / 1_000_000,
        }),
        count: None,
        // What the agent's sweep says has no number: it never was in the ring.
        cpu: (hook != Hook::Sweep as u8).then_some(cpu),
        sequence: (hook != Hook::Sweep as u8).then_some(sequence),
    }
}

/// Denials that the kernel counted instead of sending them: the count since the last look, of all CPUs together.
/// The kernel keeps neither addresses nor the source port of these.
pub fn enrich_denials(key: &DenialKey, total: &DenialCount, generation: u32, names: &Names) -> Record {
    let DenialKey { local, remote, rule, port, protocol, direction, reason, hook, reject: _ } = *key;
    let proto = Proto::from_ip(protocol);
    let service = proto.has_ports().then_some(port);
    let ingress = direction == Direction::Ingress as u8;
    let (source, destination) = ends(
        direction,
        names.end(local, &Addr::UNSPECIFIED, service.filter(|_| ingress), None),
        names.end(remote, &Addr::UNSPECIFIED, service.filter(|_| !ingress), None),
    );
    let (rule, policy) = names.rule(rule);
    Record {
        time: names.wall(total.last),
        host: names.host.clone(),
        kind: Coded::Known(Kind::Denials),
        direction: Coded::from_byte(direction),
        verdict: Verdict::Denied.into(),
        reason: Coded::from_byte(reason),
        rejected: false,
        source,
        destination,
        protocol: Protocol(protocol),
        icmp: icmp(proto, port),
        socket_type: None,
        family: None,
        rule,
        policy,
        revision: names.revisions.get(&generation).copied(),
        generation,
        pending: None,
        pid: None,
        process: None,
        workload: None,
        cgroup: None,
        netns: None,
        hook: Coded::from_byte(hook),
        traffic: None,
        count: Some(total.count),
        cpu: None,
        sequence: None,
    }
}

/// A gap in words.
pub fn loss(gap: &Gap, names: &Names) -> Loss {
    let Gap { cpu, lost, after, before, agents } = *gap;
    Loss {
        time: names.wall(before),
        host: names.host.clone(),
        lost,
        lost_in: if agents { LostIn::Agent } else { LostIn::RingBuffer },
        denials: 0,
        cpu: Some(cpu),
        after: Some(names.wall(after)),
        before: Some(names.wall(before)),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::flow::decode::{EVENT_LEN, decode};
    use crate::policy::host_policy::{OnRevoke, Requirement, Selector, Tier};

    fn segment(name: &str, members: Members) -> Segment {
        Segment {
            name: name.to_owned(),
            owner: None,
            members,
            default_ingress_allow: false,
            default_egress_allow: true,
            monitor: false,
            unresolved_allow: false,
            on_revoke: OnRevoke::Cut,
            grants: 0,
            tcp_only: false,
            at: Position::default(),
        }
    }

    /// What fixed test data calls its numbers.
    pub(crate) fn names() -> Names {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let select = |key: &str, value: &str| {
            Members::Workloads(Selector(vec![Requirement::In { key: key.to_owned(), values: vec![value.to_owned()] }]))
        };
        let mut names = Names {
            host: "node-1".into(),
            // Boot at 2026-11-21T20:00:00Z.
            wall_minus_boot: 1_795_291_200_000_000_000,
            ..Names::default()
        };
        let identities = BTreeMap::from([
            (Identity(256), IdentityName::Labels(labels(&[("app", "web"), ("tier", "api")]))),
            (Identity(257), IdentityName::Labels(labels(&[("app", "payments"), ("tier", "db")]))),
            (Identity(258), IdentityName::Prefix("203.0.113.0/24".parse().unwrap())),
        ]);
        let rule = |rule: &str, line| RuleName {
            policy: "payments-db-access".into(),
            rule: rule.into(),
            tier: Tier::Application,
            at: Position { file: "payments.yaml".into(), line, column: 7 },
            entries: 1,
        };
        let rules = BTreeMap::from([(1, rule("api-to-db", 14)), (2, rule("no-vendor", 21))]);
        let segments = [
            segment("payments-db", select("tier", "db")),
            segment("payments-api", select("tier", "api")),
            segment("vendors", Members::Addresses(vec!["203.0.112.0/20".parse().unwrap()])),
        ];
        names.learn(&identities, &rules, &segments, None);
        let words = CgroupWords { path: "/system.slice/postgresql.service".into(), workload: Some("postgres".into()) };
        let _ = names.cgroups.insert(4711, words);
        let _ = names.revisions.insert(3, 41);
        names
    }

    /// web 10.0.0.5:43210 → this host's database 10.0.0.9:5432, let through by rule 1.
    pub(crate) fn event() -> FlowEvent {
        let mut comm = [0; 16];
        comm[..8].copy_from_slice(b"postgres");
        FlowEvent {
            time: 3_579_123_456_789,
            sequence: 17,
            cgroup: 4711,
            netns: 1,
            local_addr: Addr::v4([10, 0, 0, 9]),
            remote_addr: Addr::v4([10, 0, 0, 5]),
            local: 257,
            remote: 256,
            rule: 1,
            generation: 3,
            pid: 812,
            local_port: 5432,
            remote_port: 43210,
            protocol: ipproto::TCP,
            kind: EventKind::New as u8,
            direction: Direction::Ingress as u8,
            verdict: Verdict::Allowed as u8,
            reason: Reason::Rule as u8,
            evidence: Evidence::Origin as u8,
            hook: Hook::Ingress as u8,
            comm,
            ..decode(&[0; EVENT_LEN]).unwrap()
        }
    }

    /// The vendors' network is refused, `count` times.
    pub(crate) fn denials() -> Record {
        let key = DenialKey {
            local: 257,
            remote: 258,
            rule: 2,
            port: 5432,
            protocol: ipproto::TCP,
            direction: 0,
            reason: 1,
            hook: 4,
            reject: 0,
        };
        enrich_denials(&key, &DenialCount { count: 1200, last: 3_580_000_000_000 }, 3, &names())
    }

    #[test]
    fn json_has_stable_names() {
        let record = enrich(&event(), &names());
        expect_test::expect![[r#"
            {
              "time": "2026-11-21T20:59:39.123456789Z",
              "host": "node-1",
              "kind": "new",
              "direction": "ingress",
              "verdict": "ALLOWED",
              "reason": "rule",
              "source": {
                "ip": "10.0.0.5",
                "port": 43210,
                "identity": 256,
                "name": "app=web,tier=api",
                "labels": {
                  "app": "web",
                  "tier": "api"
                },
                "segments": [
                  "payments-api"
                ],
                "evidence": "origin"
              },
              "destination": {
                "ip": "10.0.0.9",
                "port": 5432,
                "identity": 257,
                "name": "app=payments,tier=db",
                "labels": {
                  "app": "payments",
                  "tier": "db"
                },
                "segments": [
                  "payments-db"
                ]
              },
              "protocol": "tcp",
              "rule": "api-to-db",
              "policy": "payments-db-access",
              "revision": 41,
              "generation": 3,
              "pid": 812,
              "process": "postgres",
              "workload": "postgres",
              "cgroup": "/system.slice/postgresql.service",
              "netns": 1,
              "hook": "cgroup_skb/ingress",
              "cpu": 0,
              "sequence": 17
            }"#]]
        .assert_eq(&serde_json::to_string_pretty(&record).unwrap());
    }

    #[test]
    fn items_survive_the_wire() {
        let names = names();
        let close = FlowEvent { kind: EventKind::Close as u8, bytes_sent: 9, rtt_us: 80, ..event() };
        let odd = FlowEvent {
            kind: 99,
            verdict: 77,
            reason: 200,
            direction: 9,
            hook: 0,
            pending: 8,
            pending_rule: 5,
            remote: 9_999,
            rule: 123,
            cgroup: 5,
            protocol: 47,
            ..event()
        };
        let gap = Gap { cpu: 1, lost: 3, after: 5, before: u64::MAX, agents: false };
        let items = [
            Item::Flow(Box::new(enrich(&event(), &names))),
            Item::Flow(Box::new(enrich(&close, &names))),
            Item::Flow(Box::new(enrich(&odd, &names))),
            Item::Flow(Box::new(denials())),
            Item::Lost(loss(&gap, &names)),
        ];
        for item in items {
            let line = serde_json::to_string(&item).unwrap();
            assert_eq!(serde_json::from_str::<Item>(&line).unwrap(), item, "{line}");
        }
        let odd = enrich(&odd, &names);
        assert_eq!((odd.verdict, odd.kind, odd.reason), (Coded::Unknown(77), Coded::Unknown(99), Coded::Unknown(200)));
        assert_eq!(odd.rule.unwrap().as_str(), "#123");
        assert_eq!(odd.cgroup.unwrap().as_str(), "id:5");
        assert_eq!(odd.destination.name.as_str(), "identity-9999");
        assert_eq!(odd.pending.unwrap().verdict, Coded::Unknown(8));
        assert_eq!(odd.protocol.to_string(), "ip-47");
    }

    #[test]
    fn the_local_end_is_the_source_at_egress() {
        let event = FlowEvent { direction: Direction::Egress as u8, ..event() };
        let record = enrich(&event, &names());
        assert_eq!(record.source.port, Some(5432));
        assert_eq!(record.source.evidence, None);
        assert_eq!(record.destination.evidence, Some(Evidence::Origin.into()));
    }

    #[test]
    fn icmp_has_type_and_code_and_no_ports() {
        let event = FlowEvent { protocol: ipproto::ICMP, local_port: 8 << 8 | 3, remote_port: 0, ..event() };
        let record = enrich(&event, &names());
        assert_eq!(record.icmp, Some(Icmp { kind: 8, code: 3 }));
        assert_eq!((record.source.port, record.destination.port), (None, None));
    }

    #[test]
    fn a_prefix_inside_a_segment_is_in_it() {
        assert_eq!(*denials().source.segments, ["vendors"]);
        assert_eq!(denials().destination.port, Some(5432));
    }

    #[test]
    fn no_time_is_out_of_range() {
        let names = Names { wall_minus_boot: i128::MAX, ..Names::default() };
        assert_eq!(names.wall(u64::MAX), Timestamp::MAX);
        let names = Names { wall_minus_boot: i128::MIN, ..Names::default() };
        assert_eq!(names.wall(0), Timestamp::MIN);
    }
}
