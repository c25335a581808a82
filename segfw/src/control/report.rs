//! What the agent reports of itself: plain data, the same for the table on the screen and for `-o json`.

use crate::flow::Coded;
use crate::flow::record::Protocol;
use crate::policy::compile::CompileProblem;
use crate::policy::host_policy::{Labels, Position};
use crate::policy::problem::{self, Problem};
use ipnet::IpNet;
use jiff::Timestamp;
use segfw_common::{Direction, Evidence, Reason, Verdict};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// Where something is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct At {
    /// Relative to the policy folder.
    pub file: String,
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
}
impl From<&Position> for At {
    fn from(Position { file, line, column }: &Position) -> Self {
        Self { file: file.to_string(), line: *line, column: *column }
    }
}
impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// Something that is not as it should be, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// What is so.
    pub what: String,
    /// What follows from it.
    pub consequence: String,
    /// What to do.
    pub action: String,
}

/// The one word for the whole agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "UPPERCASE")]
pub enum State {
    /// Everything the policy says is enforced.
    Enforcing,
    /// Enforced, but not all of it, or not with the revision that is wanted.
    Degraded {
        /// Never empty.
        reasons: Vec<Trouble>,
    },
    /// Everything is judged, nothing is dropped: the host is in monitor mode.
    Monitor,
    /// Nothing is enforced.
    Open {
        /// Why.
        why: String,
    },
}

impl State {
    /// The word users see.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Enforcing => "ENFORCING",
            Self::Degraded { .. } => "DEGRADED",
            Self::Monitor => "MONITOR",
            Self::Open { .. } => "OPEN",
        }
    }
}

/// A revision in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Counts up on this host, or at the controller.
    pub number: u64,
    /// SHA-256 of the tables, hexadecimal.
    pub digest: String,
    /// The revision as the kernel counts it.
    pub generation: u32,
    /// Since when.
    pub loaded_at: Timestamp,
    /// The files it was read from.
    pub files: Vec<String>,
}

/// A revision that was wanted and refused; the one in force stayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// When.
    pub at: Timestamp,
    /// Why, in one sentence.
    pub why: String,
    /// All problems.
    pub problems: Vec<Finding>,
}

/// A problem or a warning in a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// Where, if it is at one place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<At>,
    /// What.
    pub message: String,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl From<&Problem> for Finding {
    fn from(Problem { severity, at, what, why, help }: &Problem) -> Self {
        let severity = match severity {
            problem::Severity::Error => Severity::Error,
            problem::Severity::Warning => Severity::Warning,
        };
        Self { severity, at: Some(at.into()), message: format!("{what} ({why})"), help: help.clone() }
    }
}
impl From<&CompileProblem> for Finding {
    fn from(problem: &CompileProblem) -> Self {
        let (at, help) = match problem {
            CompileProblem::TooManyClasses { .. } => (None, "name fewer different ports and ranges of this protocol"),
            CompileProblem::Capacity { costliest, .. } => (
                costliest.as_ref().map(|c| At::from(&c.at)),
                "write the rule for fewer peers or ports, or split the policy by host",
            ),
        };
        Self { severity: Severity::Error, at, message: problem.to_string(), help: Some(help.to_owned()) }
    }
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The policy cannot be used.
    Error,
    /// Probably not what was meant; an error with `--strict`.
    Warning,
}

/// The gate for inbound TCP, and why this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// `skb`, `conn`.
    pub name: String,
    /// Why.
    pub why: String,
}

/// One program at its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookReport {
    /// `cgroup/connect4`.
    pub name: String,
    /// Is it attached?
    pub attached: bool,
    /// The kernel's number of the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<u32>,
    /// The kernel's number of the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<u32>,
    /// Instructions after the verifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instructions: Option<u32>,
}

/// How full a table is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapReport {
    /// `RULES`.
    pub name: String,
    /// In use.
    pub entries: u64,
    /// There is room for.
    pub max: u64,
}

/// Workloads by how they are treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadCounts {
    /// In a segment that is enforced.
    pub enforced: u64,
    /// In a segment that is in monitor mode.
    pub monitored: u64,
    /// In no segment: not enforced.
    pub no_segment: u64,
    /// Labels not known yet.
    pub unresolved: u64,
}

/// What happens when something is not there: `closed`, `lastKnownGood` or `open`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absence {
    /// `agent gone`, `controller gone`, `before the first revision`.
    pub when: String,
    /// What happens then.
    pub behaviour: String,
}

/// Something in the kernel was not as the agent had left it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repair {
    /// When it was found.
    pub at: Timestamp,
    /// `hook connect4`, `map CGROUPS`.
    pub what: String,
    /// What was found instead.
    pub found: String,
    /// Why it is still so; absent = it is as it should be again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<String>,
}

/// A program of somebody else at one of our places.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// `connect4`.
    pub hook: String,
    /// The kernel's number of the program.
    pub program: u32,
    /// As its author named it.
    pub name: String,
    /// It runs after ours and can lift a refusal of `connect` and `sendmsg`.
    pub after_ours: bool,
}

/// A way around the firewall that this host does not close.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uncovered {
    /// `packet sockets`.
    pub what: String,
    /// What somebody can do with it.
    pub consequence: String,
}

/// The agent process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentReport {
    /// Process id.
    pub pid: u32,
    /// Version of the binary.
    pub version: String,
    /// Layout of the maps.
    pub abi: u32,
    /// Since when it runs.
    pub started_at: Timestamp,
    /// This host's name.
    pub host: String,
    /// Kernel release.
    pub kernel: String,
}

/// Everything an administrator needs at 3 a.m.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// When this was true.
    pub at: Timestamp,
    /// The one word.
    #[serde(flatten)]
    pub state: State,
    /// What is in force; absent where nothing ever was.
    pub revision: Option<Revision>,
    /// The last revision that was refused, if none was accepted since.
    pub refused: Option<Refused>,
    /// The gate for inbound TCP.
    pub gate: Gate,
    /// The list of address families: `listed`, or `open` and why.
    pub families: Gate,
    /// Programs.
    pub hooks: Vec<HookReport>,
    /// Interfaces with the outer wall.
    pub xdp: Vec<String>,
    /// Tables.
    pub maps: Vec<MapReport>,
    /// Identities that have a number.
    pub identities: u64,
    /// Workloads on this host.
    pub workloads: WorkloadCounts,
    /// Exact counts.
    pub counters: CounterReport,
    /// Records lost since the agent started (verdicts are never lost).
    pub lost_events: u64,
    /// What is never denied.
    pub golden_rules: Vec<String>,
    /// What is not covered.
    pub uncovered: Vec<Uncovered>,
    /// What happens when something is not there.
    pub absence: Vec<Absence>,
    /// What was found changed in the kernel, the newest last.
    #[serde(default)]
    pub repairs: Vec<Repair>,
    /// Programs of others where ours sit.
    #[serde(default)]
    pub neighbours: Vec<Neighbour>,
    /// The process.
    pub agent: AgentReport,
}

/// Exact counts since the maps were made: of flows, not of packets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterReport {
    /// Per verdict, reason and direction; zeros are left out.
    pub verdicts: Vec<VerdictCount>,
    /// Named counters of the kernel side and of the agent, zeros included.
    pub named: BTreeMap<String, u64>,
}

impl CounterReport {
    /// Sum of a verdict.
    pub fn of(&self, verdict: Verdict) -> u64 {
        self.verdicts.iter().filter(|c| c.verdict == verdict.into()).map(|c| c.count).sum()
    }
}

/// One count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictCount {
    /// The answer.
    pub verdict: Coded<Verdict>,
    /// Why.
    pub reason: Coded<Reason>,
    /// For which end.
    pub direction: Coded<Direction>,
    /// How many flows.
    pub count: u64,
}

/// One workload on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadReport {
    /// `postgresql@16-main.service`.
    pub name: String,
    /// Path from the root of the hierarchy.
    pub cgroup: String,
    /// Number of the identity.
    pub identity: u32,
    /// Labels; empty where unresolved.
    pub labels: Labels,
    /// The segments it is in.
    pub segments: Vec<String>,
    /// How it is treated.
    pub enforcement: Enforcement,
    /// Where the labels are from: `Workload postgres`, `unit`, `pod`, `host`.
    pub labels_from: Vec<String>,
}

/// How a workload is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Enforcement {
    /// The policy holds.
    Enforced,
    /// Judged, nothing is dropped.
    Monitored,
    /// In no segment.
    NoSegment,
    /// Labels not known yet.
    Unresolved,
}

impl Enforcement {
    /// The word users see.
    pub fn word(self) -> &'static str {
        match self {
            Self::Enforced => "enforced",
            Self::Monitored => "monitored",
            Self::NoSegment => "no-segment",
            Self::Unresolved => "unresolved",
        }
    }
}

/// The answer to a reload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadReport {
    /// Was anything different?
    pub changed: bool,
    /// What is in force now.
    pub revision: Option<Revision>,
    /// Why the new one was refused, if it was.
    pub refused: Option<Refused>,
    /// Warnings.
    pub warnings: Vec<Finding>,
}

/// Where an agent reads and keeps things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacesReport {
    /// The policy folder, absolute.
    pub policy: PathBuf,
    /// What survives a restart.
    pub state: PathBuf,
    /// Programs and maps.
    pub pins: PathBuf,
    /// The part of the cgroup tree that it enforces.
    pub cgroup_root: PathBuf,
}

/// A revision that was in force here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastReport {
    /// Counts up on this host.
    pub number: u64,
    /// Is it the one that is enforced now?
    pub in_force: bool,
    /// Since when it was; absent where it is damaged.
    pub since: Option<Timestamp>,
    /// SHA-256 of the files, hexadecimal.
    pub digest: String,
    /// Who put it in force: `apply of /root/policy by root`.
    pub source: String,
    /// How many files.
    pub files: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Why it cannot be put back, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

/// Whether a case of a Test held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Held {
    /// The policy says what the case says.
    Yes,
    /// It says something else.
    No,
    /// There is no such flow, or no answer.
    NotAsked,
}

/// One case of a Test, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaseReport {
    /// The name of the document.
    pub test: String,
    /// Where the case is written.
    pub at: At,
    /// What it asks.
    pub question: Question,
    /// `allow` or `deny`.
    pub expect: String,
    /// The rule that must decide.
    pub by: Option<String>,
    /// The outcome.
    pub held: Held,
    /// The answer in words, or why there is none.
    pub found: String,
}

/// A file of a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyFile {
    /// Relative to the policy folder.
    pub name: String,
    /// As it was read.
    pub text: String,
}

/// May A open a connection to B?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Who opens.
    pub from: EndSpec,
    /// Who answers.
    pub to: EndSpec,
    /// The service.
    pub port: Service,
}

/// An end as a person names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EndSpec {
    /// `app=web,tier=api`.
    Labels(Labels),
    /// `postgres`, `postgresql@16-main.service`.
    Workload(String),
    /// `/system.slice/postgresql.service`.
    Cgroup(String),
    /// `10.0.0.5`.
    Address(IpAddr),
    /// `203.0.113.0/24`.
    Range(IpNet),
    /// An address nobody claims.
    World,
    /// Processes of no workload.
    Host,
    /// A peer that is not known yet.
    Unresolved,
}

/// Not an end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an end of a flow; write labels (app=web,tier=api), a workload, a cgroup (/system.slice/x.service), an address, world, host or unresolved"
)]
pub struct NotAnEnd(String);

impl FromStr for EndSpec {
    type Err = NotAnEnd;
    fn from_str(s: &str) -> Result<Self, NotAnEnd> {
        let wrong = || NotAnEnd(s.to_owned());
        let s = s.trim();
        Ok(match s {
            "" => return Err(wrong()),
            "world" => Self::World,
            "host" => Self::Host,
            "unresolved" => Self::Unresolved,
            _ => {
                if let Ok(ip) = s.parse::<IpAddr>() {
                    Self::Address(ip.to_canonical())
                } else if let Ok(net) = s.parse() {
                    Self::Range(net)
                } else if s.starts_with('/') {
                    Self::Cgroup(s.to_owned())
                } else if s.contains('=') {
                    let pair = |part: &str| {
                        let (k, v) = part.split_once('=')?;
                        let (k, v) = (k.trim(), v.trim());
                        (!k.is_empty() && !v.is_empty()).then(|| (k.to_owned(), v.to_owned()))
                    };
                    Self::Labels(s.split(',').map(pair).collect::<Option<_>>().ok_or_else(wrong)?)
                } else {
                    Self::Workload(s.to_owned())
                }
            }
        })
    }
}
impl fmt::Display for EndSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Labels(labels) => f.write_str(&crate::policy::tables::canonical(labels)),
            Self::Workload(text) | Self::Cgroup(text) => f.write_str(text),
            Self::Address(ip) => ip.fmt(f),
            Self::Range(net) => net.fmt(f),
            Self::World => f.write_str("world"),
            Self::Host => f.write_str("host"),
            Self::Unresolved => f.write_str("unresolved"),
        }
    }
}
impl TryFrom<String> for EndSpec {
    type Error = NotAnEnd;
    fn try_from(s: String) -> Result<Self, NotAnEnd> {
        s.parse()
    }
}
impl From<EndSpec> for String {
    fn from(end: EndSpec) -> Self {
        end.to_string()
    }
}

/// A protocol and its destination port: `tcp/5432`; `icmp/8` or `icmp/8/0` (type and code); `ip-47` alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Service {
    /// The protocol.
    pub protocol: Protocol,
    /// For ICMP `type << 8 | code`; for protocols without ports 0.
    pub port: u16,
}

/// Not a service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a protocol and port; write tcp/5432, udp/53, icmp/8 (a type) or sctp/3868")]
pub struct NotAService(String);

impl FromStr for Service {
    type Err = NotAService;
    fn from_str(s: &str) -> Result<Self, NotAService> {
        use segfw_common::Proto;
        let wrong = || NotAService(s.to_owned());
        let (protocol, rest) = s.split_once('/').map_or((s, None), |(p, r)| (p, Some(r)));
        let protocol: Protocol = protocol.trim().parse().map_err(|_| wrong())?;
        let port = match (Proto::from_ip(protocol.0), rest) {
            (Proto::Icmp | Proto::Icmpv6, Some(rest)) => {
                let (kind, code) = rest.split_once('/').unwrap_or((rest, "0"));
                let kind = if kind == "echo-request" { echo(protocol) } else { kind.parse().map_err(|_| wrong())? };
                u16::from_be_bytes([kind, code.parse().map_err(|_| wrong())?])
            }
            // A number alone is more often a port whose protocol was forgotten.
            (Proto::Other, None) if s.starts_with("ip-") => 0,
            (Proto::Other, _) | (_, None) => return Err(wrong()),
            (Proto::Tcp | Proto::Udp | Proto::Sctp | Proto::UdpLite | Proto::Dccp, Some(port)) => {
                port.parse().ok().filter(|p| *p != 0).ok_or_else(wrong)?
            }
        };
        Ok(Self { protocol, port })
    }
}
/// Type of an echo request.
fn echo(protocol: Protocol) -> u8 {
    if protocol.0 == segfw_common::rule::ipproto::ICMP { 8 } else { 128 }
}
impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use segfw_common::Proto;
        let [kind, code] = self.port.to_be_bytes();
        match Proto::from_ip(self.protocol.0) {
            Proto::Icmp | Proto::Icmpv6 if code == 0 => write!(f, "{}/{kind}", self.protocol),
            Proto::Icmp | Proto::Icmpv6 => write!(f, "{}/{kind}/{code}", self.protocol),
            Proto::Other => self.protocol.fmt(f),
            Proto::Tcp | Proto::Udp | Proto::Sctp | Proto::UdpLite | Proto::Dccp => {
                write!(f, "{}/{}", self.protocol, self.port)
            }
        }
    }
}
impl TryFrom<String> for Service {
    type Error = NotAService;
    fn try_from(s: String) -> Result<Self, NotAService> {
        s.parse()
    }
}
impl From<Service> for String {
    fn from(service: Service) -> Self {
        service.to_string()
    }
}

/// A rule and where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleReport {
    /// Its policy.
    pub policy: String,
    /// Its name.
    pub rule: String,
    /// `application`.
    pub tier: String,
    /// `allow`, `deny`, `reject`.
    pub action: String,
    /// Where it is written.
    pub at: At,
}

/// The answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// What was asked.
    pub question: Question,
    /// The whole answer: both ends must let the flow through.
    pub verdict: Coded<Verdict>,
    /// The revision that was asked; absent offline.
    pub revision: Option<u64>,
    /// Where the policy was read: a folder, or `agent`.
    pub policy_from: String,
    /// Egress at the source, then ingress at the destination.
    pub ends: Vec<EndReport>,
    /// What a reader should know besides: assumptions, golden rules that might apply.
    pub notes: Vec<String>,
}

/// The judgement at one end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndReport {
    /// `egress` = at the source.
    pub direction: Coded<Direction>,
    /// The identity judged for, in one word.
    pub local: String,
    /// Its segments.
    pub segments: Vec<String>,
    /// The other end as this one sees it.
    pub peer: String,
    /// How it knows.
    pub evidence: Coded<Evidence>,
    /// The same in words.
    #[serde(default)]
    pub evidence_means: String,
    /// The answer; absent where this end has no agent or is in no segment.
    pub verdict: Option<Coded<Verdict>>,
    /// Why.
    pub reason: Coded<Reason>,
    /// Why there is no answer, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_judged: Option<String>,
    /// The deciding rule.
    pub rule: Option<RuleReport>,
    /// The segment whose default decided.
    pub default_of: Option<String>,
    /// What monitor-mode policies would say, where it differs.
    pub pending: Option<PendingReport>,
    /// The verdict holds until then.
    pub until: Option<Timestamp>,
    /// A refusal: the rule that came nearest to letting it pass.
    pub nearest: Option<NearestReport>,
    /// An allow by a rule: the answer if that rule were not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without: Option<WithoutReport>,
    /// What happens to live connections once they are refused: `cut`, `drain: 600s`, `keep`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_revoke: Option<String>,
    /// The golden rule that applies.
    pub golden: Option<String>,
}

/// A shadow answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingReport {
    /// What it would be.
    pub verdict: Coded<Verdict>,
    /// By which rule.
    pub rule: Option<RuleReport>,
}

/// The answer if the deciding rule were not there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WithoutReport {
    /// What it would be.
    pub verdict: Coded<Verdict>,
    /// Why.
    pub reason: Coded<Reason>,
    /// By which rule; absent = the default.
    pub rule: Option<RuleReport>,
}

/// A rule that nearly matched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NearestReport {
    /// The rule.
    pub rule: RuleReport,
    /// What does not match.
    pub why_not: String,
}

/// One question of `segfw doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// `cgroup2 is mounted`.
    pub name: String,
    /// How it went.
    pub outcome: Outcome,
    /// What was found.
    pub found: String,
    /// What it means for the policy; empty where all is well.
    #[serde(default)]
    pub consequence: String,
    /// What to do; empty where nothing is to be done.
    pub action: String,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Good,
    /// segfw works, with less.
    Less,
    /// segfw does not work here.
    Bad,
}

/// The answer of `segfw policy check`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyCheck {
    /// Files read.
    pub files: usize,
    /// Segments defined.
    pub segments: usize,
    /// Rules defined.
    pub rules: usize,
    /// Entries in the kernel's tables on this host, if it could be compiled.
    pub entries: Option<usize>,
    /// Errors and warnings, in the order of files and lines.
    pub findings: Vec<Finding>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn stamp(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    pub(crate) fn rule() -> RuleReport {
        RuleReport {
            policy: "payments-db-access".to_owned(),
            rule: "api-to-db".to_owned(),
            tier: "application".to_owned(),
            action: "allow".to_owned(),
            at: At { file: "payments.yaml".to_owned(), line: 14, column: 7 },
        }
    }

    pub(crate) fn refused() -> Refused {
        Refused {
            at: stamp("2026-11-21T02:58:00Z"),
            why: "1 error in 1 of 3 files".to_owned(),
            problems: vec![Finding {
                severity: Severity::Error,
                at: Some(At { file: "web-to-db.yaml".to_owned(), line: 14, column: 11 }),
                message: "segment \"payment-db\" is not defined".to_owned(),
                help: Some("did you mean \"payments-db\"?".to_owned()),
            }],
        }
    }

    pub(crate) fn status() -> StatusReport {
        let hook = |name: &str, attached| HookReport {
            name: name.to_owned(),
            attached,
            link: attached.then_some(12),
            program: Some(77),
            instructions: Some(1432),
        };
        let count = |verdict: Verdict, reason: Reason, direction: Direction, count| VerdictCount {
            verdict: verdict.into(),
            reason: reason.into(),
            direction: direction.into(),
            count,
        };
        StatusReport {
            at: stamp("2026-11-21T03:00:00Z"),
            state: State::Enforcing,
            revision: Some(Revision {
                number: 41,
                digest: "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08".to_owned(),
                generation: 3,
                loaded_at: stamp("2026-11-18T09:30:00Z"),
                files: vec!["payments.yaml".to_owned(), "web.yaml".to_owned()],
            }),
            refused: None,
            gate: Gate { name: "skb".to_owned(), why: "works on every supported kernel".to_owned() },
            families: Gate { name: "open".to_owned(), why: "no BTF".to_owned() },
            hooks: vec![hook("cgroup/connect4", true), hook("cgroup_skb/ingress", true)],
            xdp: vec!["eth0".to_owned()],
            maps: vec![
                MapReport { name: "RULES".to_owned(), entries: 1204, max: 1 << 20 },
                MapReport { name: "ENDPOINTS".to_owned(), entries: 61_000, max: 1 << 16 },
            ],
            identities: 37,
            workloads: WorkloadCounts { enforced: 12, monitored: 2, no_segment: 30, unresolved: 0 },
            counters: CounterReport {
                verdicts: vec![
                    count(Verdict::Allowed, Reason::Rule, Direction::Ingress, 120_345),
                    count(Verdict::Denied, Reason::SegmentDefault, Direction::Ingress, 17),
                    count(Verdict::Denied, Reason::Rule, Direction::Egress, 3),
                ],
                named: BTreeMap::from([("events-lost".to_owned(), 0), ("endpoints-full".to_owned(), 4)]),
            },
            lost_events: 0,
            golden_rules: vec!["one workload to itself over loopback".to_owned(), "DHCP client".to_owned()],
            uncovered: vec![Uncovered {
                what: "packet sockets".to_owned(),
                consequence: "a process with CAP_NET_RAW can send and read frames past every hook".to_owned(),
            }],
            absence: vec![Absence { when: "agent gone".to_owned(), behaviour: "lastKnownGood".to_owned() }],
            repairs: Vec::new(),
            neighbours: Vec::new(),
            agent: AgentReport {
                pid: 812,
                version: "0.1.0".to_owned(),
                abi: 1,
                started_at: stamp("2026-11-18T09:29:58Z"),
                host: "node-1".to_owned(),
                kernel: "6.12.0".to_owned(),
            },
        }
    }

    /// The same with all that can be wrong.
    pub(crate) fn degraded() -> StatusReport {
        let mut status = status();
        status.state = State::Degraded {
            reasons: vec![
                Trouble {
                    what: "the wanted revision was refused".to_owned(),
                    consequence: "revision 41 stays in force".to_owned(),
                    action: "correct web-to-db.yaml:14:11, then `segfw policy check /etc/segfw/policies`".to_owned(),
                },
                Trouble {
                    what: "cgroup_skb/ingress is not attached".to_owned(),
                    consequence: "inbound flows are not judged".to_owned(),
                    action: "systemctl restart segfw".to_owned(),
                },
            ],
        };
        status.refused = Some(refused());
        status.hooks[1].attached = false;
        status.lost_events = 9;
        status.workloads.unresolved = 1;
        status
    }

    pub(crate) fn workloads() -> Vec<WorkloadReport> {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        vec![
            WorkloadReport {
                name: "postgresql@16-main.service".to_owned(),
                cgroup: "/system.slice/postgresql@16-main.service".to_owned(),
                identity: 257,
                labels: labels(&[("app", "payments"), ("tier", "db")]),
                segments: vec!["payments-db".to_owned()],
                enforcement: Enforcement::Enforced,
                labels_from: vec!["Workload postgres".to_owned()],
            },
            WorkloadReport {
                name: "cron.service".to_owned(),
                cgroup: "/system.slice/cron.service".to_owned(),
                identity: 258,
                labels: labels(&[("unit", "cron.service")]),
                segments: Vec::new(),
                enforcement: Enforcement::NoSegment,
                labels_from: vec!["unit".to_owned()],
            },
        ]
    }

    pub(crate) fn explanation() -> Explanation {
        Explanation {
            question: Question {
                from: "app=web".parse().unwrap(),
                to: "app=payments,tier=db".parse().unwrap(),
                port: "tcp/5432".parse().unwrap(),
            },
            verdict: Verdict::Denied.into(),
            revision: Some(41),
            policy_from: "agent".to_owned(),
            ends: vec![
                EndReport {
                    direction: Direction::Egress.into(),
                    local: "app=web".to_owned(),
                    segments: Vec::new(),
                    peer: "app=payments,tier=db".to_owned(),
                    evidence: Evidence::Endpoint.into(),
                    evidence_means: "a socket on this host owns the address, protocol and port".to_owned(),
                    verdict: None,
                    reason: Reason::NoSegment.into(),
                    not_judged: Some("in no segment: nothing is enforced here".to_owned()),
                    rule: None,
                    default_of: None,
                    pending: None,
                    until: None,
                    nearest: None,
                    without: None,
                    on_revoke: None,
                    golden: None,
                },
                EndReport {
                    direction: Direction::Ingress.into(),
                    local: "app=payments,tier=db".to_owned(),
                    segments: vec!["payments-db".to_owned()],
                    peer: "app=web".to_owned(),
                    evidence: Evidence::Origin.into(),
                    evidence_means: "the hooks of this host saw who opened the flow".to_owned(),
                    verdict: Some(Verdict::Denied.into()),
                    reason: Reason::SegmentDefault.into(),
                    not_judged: None,
                    rule: None,
                    default_of: Some("payments-db".to_owned()),
                    pending: Some(PendingReport { verdict: Verdict::Allowed.into(), rule: Some(rule()) }),
                    until: None,
                    nearest: Some(NearestReport {
                        rule: rule(),
                        why_not: "source is not in segment payments-api (app=web lacks tier=api)".to_owned(),
                    }),
                    without: None,
                    on_revoke: Some("cut".to_owned()),
                    golden: None,
                },
            ],
            notes: vec![
                "never denied: one workload to itself over loopback, neighbour discovery, DHCP client".to_owned(),
            ],
        }
    }

    /// The same question with the right answer.
    pub(crate) fn allowed() -> Explanation {
        let mut explanation = explanation();
        explanation.verdict = Verdict::Allowed.into();
        let end = &mut explanation.ends[1];
        end.verdict = Some(Verdict::Allowed.into());
        end.reason = Reason::Rule.into();
        (end.rule, end.default_of, end.pending, end.nearest) = (Some(rule()), None, None, None);
        end.until = Some(stamp("2026-12-24T18:00:00Z"));
        end.without =
            Some(WithoutReport { verdict: Verdict::Denied.into(), reason: Reason::SegmentDefault.into(), rule: None });
        explanation
    }

    #[test]
    fn ends_and_services_are_read_as_they_are_written() {
        for text in [
            "app=web,tier=api",
            "postgres",
            "/system.slice/x.service",
            "10.0.0.5",
            "203.0.113.0/24",
            "2001:db8::1",
            "world",
            "host",
            "unresolved",
        ] {
            let end: EndSpec = text.parse().unwrap();
            assert_eq!(end.to_string(), text);
            assert!(!matches!((text.contains('='), &end), (false, EndSpec::Labels(_))));
        }
        assert_eq!("::ffff:10.0.0.5".parse(), Ok(EndSpec::Address("10.0.0.5".parse().unwrap())));
        for text in ["", "app=", "=web", "app=web,", "app=web,tier"] {
            assert!(text.parse::<EndSpec>().is_err(), "{text}");
        }
        for text in ["tcp/5432", "mptcp/1", "icmp/8", "icmpv6/1/4", "ip-47"] {
            assert_eq!(text.parse::<Service>().unwrap().to_string(), text);
        }
        assert_eq!("icmpv6/echo-request".parse::<Service>().unwrap().port, 128 << 8);
        for text in ["tcp", "5432", "tcp/0", "tcp/65536", "icmp/256", "tcp/x", "gre/1", "47/1"] {
            assert!(text.parse::<Service>().is_err(), "{text}");
        }
    }
}
