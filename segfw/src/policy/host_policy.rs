//! What one host must enforce: names resolved, defaults filled in, precedence still as a list.

use ipnet::IpNet;
use jiff::Timestamp;
use segfw_common::Evidence;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A set of labels. Sorted, so that equal sets have equal text and equal digests.
pub type Labels = BTreeMap<String, String>;

/// Where something was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    /// As given to the loader, relative to the policy folder.
    pub file: Arc<str>,
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
}

/// The whole policy of one host.
#[derive(Clone, Debug, Default)]
pub struct HostPolicy {
    /// By name.
    pub segments: Vec<Segment>,
    /// In order of precedence: tier, priority, action (deny and reject, pass, allow), policy name, position.
    pub rules: Vec<Rule>,
    /// Host scope monitor mode.
    pub monitor: bool,
}

/// A named set of workloads or of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub name: String,
    pub owner: Option<String>,
    pub members: Members,
    /// True = allow where no rule decides.
    pub default_ingress_allow: bool,
    /// True = allow where no rule decides.
    pub default_egress_allow: bool,
    pub monitor: bool,
    /// True = peers that are not known yet are let through.
    pub unresolved_allow: bool,
    pub on_revoke: OnRevoke,
    /// Bits of `LocalEntry::GRANT_*`, as written; the compiler adds what egress rules imply.
    pub grants: u32,
    /// UDP sockets are refused when they are made.
    pub tcp_only: bool,
    pub at: Position,
}

/// Who is in a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Members {
    Workloads(Selector),
    Addresses(Vec<IpNet>),
}

/// What happens to live connections that are no longer allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRevoke {
    Cut,
    /// Nanoseconds.
    Drain(u64),
    Keep,
}

/// All requirements must hold. No requirement at all never happens: the parser refuses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector(pub Vec<Requirement>);

/// kubectl's set-based requirements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    In {
        key: String,
        values: Vec<String>,
    },
    /// Also true where the key is absent, as in kubectl.
    NotIn {
        key: String,
        values: Vec<String>,
    },
    Exists {
        key: String,
    },
    NotExists {
        key: String,
    },
}

impl Selector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|r| match r {
            Requirement::In { key, values } => labels.get(key).is_some_and(|v| values.contains(v)),
            Requirement::NotIn { key, values } => labels.get(key).is_none_or(|v| !values.contains(v)),
            Requirement::Exists { key } => labels.contains_key(key),
            Requirement::NotExists { key } => !labels.contains_key(key),
        })
    }
}

/// One sentence about two ends.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Shared by all its rules.
    pub policy: Arc<str>,
    pub name: Arc<str>,
    pub tier: Tier,
    /// 0..=1000, lower first.
    pub priority: u16,
    /// Position in its policy, from 0.
    pub index: u32,
    pub from: Vec<PeerSpec>,
    pub to: Vec<PeerSpec>,
    /// Empty = every protocol and port.
    pub ports: Vec<PortSpec>,
    pub action: RuleAction,
    /// The policy is in monitor mode: judged as pending, never enforced.
    pub monitor: bool,
    /// The least evidence an allow needs at ingress; `Evidence::None` = no demand.
    pub require: Evidence,
    pub expires: Option<Timestamp>,
    pub schedule: Option<Schedule>,
    /// False = allowed flows are not logged.
    pub log: bool,
    pub at: Position,
}

/// Who can stand at an end of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerSpec {
    /// Index into `HostPolicy::segments`.
    Segment(usize),
    Select(Selector),
    Addresses(Vec<IpNet>),
    Any,
    World,
    Host,
    Unresolved,
}

/// Evaluated in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    Emergency,
    Security,
    Platform,
    Application,
    Baseline,
}

impl Tier {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Emergency => "emergency",
            Self::Security => "security",
            Self::Platform => "platform",
            Self::Application => "application",
            Self::Baseline => "baseline",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleAction {
    Deny,
    Reject,
    Pass,
    Allow,
}

impl RuleAction {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Reject => "reject",
            Self::Pass => "pass",
            Self::Allow => "allow",
        }
    }
    /// Rank at equal priority: deny and reject before pass before allow.
    pub fn rank(self) -> u8 {
        match self {
            Self::Deny | Self::Reject => 0,
            Self::Pass => 1,
            Self::Allow => 2,
        }
    }
}

/// Destination ports of one protocol. For ICMP the number is `type << 8 | code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortSpec {
    pub proto: segfw_common::Proto,
    pub first: u16,
    /// Inclusive.
    pub last: u16,
}

/// Weekly windows in a time zone; `windows` is never empty and each window is within one day.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// As written.
    pub text: String,
    pub zone: jiff::tz::TimeZone,
    /// (weekday 1 = Monday .. 7 = Sunday, start, end) in seconds of local time; a window over midnight is two.
    pub windows: Vec<(u8, u32, u32)>,
}
