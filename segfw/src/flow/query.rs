//! Which records somebody wants to see, in the words of `hubble observe`.
//!
//! The same filter given twice means "either"; different filters must all match; a negated one must not match. Loss
//! marks always match: a reader must know what it does not see.

use super::coded::{Coded, near};
use super::record::{End, Item, Kind, Protocol, Record};
use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use segfw_common::{Direction, Evidence, Reason, Verdict};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::sync::Arc;

/// The filters: name of the flag, what its value is called, what it does.
pub const FLAGS: &[(&str, &str, &str)] = &[
    ("verdict", "VERDICT", "ALLOWED, DENIED or AUDIT (FORWARDED and DROPPED are understood)"),
    ("reason", "REASON", "Why: rule, segment-default, expired, unresolved-peer, revoked, ..."),
    ("kind", "KIND", "new, close, socket, revoked, reject or denials"),
    ("rule", "RULE", "The deciding rule: a name, policy/name, or a pattern with *"),
    ("policy", "POLICY", "The policy of the deciding rule; a pattern with * is understood"),
    ("revision", "N[-N]", "The revision that was asked"),
    ("pending", "VERDICT", "What monitor-mode policies would have said, where it differs"),
    ("direction", "DIRECTION", "ingress or egress, as this host sees it"),
    ("from-label", "LABELS", "Source labels: app=web,tier=api; also key, !key and key!=value"),
    ("to-label", "LABELS", "Destination labels"),
    ("label", "LABELS", "Labels of either end"),
    ("from-identity", "IDENTITY", "Source: world, host, unresolved, or an identity's number"),
    ("to-identity", "IDENTITY", "Destination: see --from-identity"),
    ("identity", "IDENTITY", "Either end: see --from-identity"),
    ("from-segment", "SEGMENT", "Source segment; a pattern with * is understood"),
    ("to-segment", "SEGMENT", "Destination segment"),
    ("segment", "SEGMENT", "Segment of either end"),
    ("from-ip", "IP|CIDR", "Source address or range"),
    ("to-ip", "IP|CIDR", "Destination address or range"),
    ("ip", "IP|CIDR", "Address of either end"),
    ("from-port", "PORT[-PORT]", "Source port or ports"),
    ("to-port", "PORT[-PORT]", "Destination port or ports"),
    ("port", "PORT[-PORT]", "Port of either end"),
    ("protocol", "PROTOCOL", "tcp, udp, icmp, icmpv6, sctp, ... or a number"),
    ("process", "NAME", "Name of the local process; a pattern with * is understood"),
    ("pid", "PID", "Process id of the local process"),
    ("from-workload", "NAME", "Source workload, where it is on this host: see --workload"),
    ("to-workload", "NAME", "Destination workload, where it is on this host: see --workload"),
    ("workload", "NAME", "Local workload, or the path of its cgroup; a pattern with * is understood"),
    ("cgroup", "PATH", "Cgroup of the local process; a pattern with * is understood"),
    ("evidence", "EVIDENCE", "How the other end is known: origin, endpoint, address, prefix or none"),
];

/// A filter that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}: {message}")]
pub struct FilterError {
    flag: String,
    message: String,
}

/// One filter. Stored as it was written; `test` is what it means.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Clause {
    written: Written,
    side: Side,
    test: Test,
}

/// A filter as it goes over the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    flag: String,
    value: String,
    #[serde(default)]
    not: bool,
}

impl TryFrom<Written> for Clause {
    type Error = FilterError;
    fn try_from(Written { flag, value, not }: Written) -> Result<Self, FilterError> {
        Self::parse(&flag, &value, not)
    }
}
impl From<Clause> for Written {
    fn from(clause: Clause) -> Self {
        clause.written
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    From,
    To,
    Either,
}

#[derive(Clone, Debug, PartialEq)]
enum Test {
    Verdict(Coded<Verdict>),
    Reason(Coded<Reason>),
    Kind(Coded<Kind>),
    Rule(String),
    Policy(String),
    Direction(Coded<Direction>),
    Labels(Vec<LabelTest>),
    Identity(String),
    Segment(String),
    Ip(IpNet),
    Port(u16, u16),
    Protocol(Protocol),
    Process(String),
    Pid(u32),
    Workload(String),
    Cgroup(String),
    Revision(u64, u64),
    Pending(Coded<Verdict>),
    Evidence(Coded<Evidence>),
}

#[derive(Clone, Debug, PartialEq)]
enum LabelTest {
    Is(String, String),
    IsNot(String, String),
    Has(String),
    HasNot(String),
}

impl Clause {
    /// A filter as written on the command line, without the dashes.
    pub fn parse(flag: &str, value: &str, not: bool) -> Result<Self, FilterError> {
        let error = |message: String| FilterError { flag: flag.to_owned(), message };
        let (side, what) = match flag.split_once('-') {
            Some(("from", what)) => (Side::From, what),
            Some(("to", what)) => (Side::To, what),
            _ => (Side::Either, flag),
        };
        let name = || if value.is_empty() { Err(error("the value is empty".to_owned())) } else { Ok(value.to_owned()) };
        let has_sides = matches!(what, "label" | "identity" | "segment" | "ip" | "port" | "workload");
        let test = match what {
            _ if side != Side::Either && !has_sides => return Err(no_such_flag(flag)),
            "verdict" => Test::Verdict(verdict(value).map_err(error)?),
            "pending" => Test::Pending(verdict(value).map_err(error)?),
            "evidence" => Test::Evidence(value.parse().map_err(|e| error(format!("{e}")))?),
            "pid" => {
                Test::Pid(value.trim().parse().map_err(|_| error(format!("{value:?} is not the number of a process")))?)
            }
            "revision" => {
                let (first, last) = range(value)
                    .ok_or_else(|| error(format!("{value:?} is neither a revision nor a range like 41-43")))?;
                Test::Revision(first, last)
            }
            "cgroup" => Test::Cgroup(name()?),
            "reason" => Test::Reason(value.parse().map_err(|e| error(format!("{e}")))?),
            "kind" => Test::Kind(value.parse().map_err(|e| error(format!("{e}")))?),
            "rule" => Test::Rule(name()?),
            "policy" => Test::Policy(name()?),
            "direction" => Test::Direction(value.parse().map_err(|e| error(format!("{e}")))?),
            "label" => Test::Labels(labels(value).map_err(error)?),
            "identity" => Test::Identity(name()?),
            "segment" => Test::Segment(name()?),
            "ip" => Test::Ip(
                net(value)
                    .ok_or_else(|| error(format!("{value:?} is neither an address nor a range like 10.0.0.0/8")))?,
            ),
            "port" => {
                let (first, last) = range(value)
                    .ok_or_else(|| error(format!("{value:?} is neither a port nor a range like 6000-6010")))?;
                Test::Port(first, last)
            }
            "protocol" => Test::Protocol(value.parse().map_err(|e| error(format!("{e}")))?),
            "process" => Test::Process(name()?),
            "workload" => Test::Workload(name()?),
            _ => return Err(no_such_flag(flag)),
        };
        Ok(Self { written: Written { flag: flag.to_owned(), value: value.to_owned(), not }, side, test })
    }

    /// Does the filter match, `not` aside?
    fn hits(&self, record: &Record) -> bool {
        let Record { source, destination, .. } = record;
        let ends = |test: &dyn Fn(&End) -> bool| match self.side {
            Side::From => test(source),
            Side::To => test(destination),
            Side::Either => test(source) || test(destination),
        };
        let like = |pattern: &str, text: &Option<super::Text>| text.as_ref().is_some_and(|t| glob(pattern, t));
        match &self.test {
            Test::Verdict(verdict) => record.verdict == *verdict,
            Test::Reason(reason) => record.reason == *reason,
            Test::Kind(kind) => record.kind == *kind,
            Test::Direction(direction) => record.direction == *direction,
            Test::Protocol(protocol) => record.protocol == *protocol,
            Test::Policy(pattern) => like(pattern, &record.policy),
            Test::Rule(pattern) => match pattern.split_once('/') {
                Some((policy, rule)) => like(policy, &record.policy) && like(rule, &record.rule),
                None => like(pattern, &record.rule),
            },
            Test::Process(pattern) => record.process.as_ref().is_some_and(|p| glob(pattern, p)),
            Test::Pid(pid) => record.pid == Some(*pid),
            Test::Cgroup(pattern) => like(pattern, &record.cgroup),
            Test::Revision(first, last) => record.revision.is_some_and(|r| (*first..=*last).contains(&r)),
            Test::Pending(verdict) => record.pending.as_ref().is_some_and(|p| p.verdict == *verdict),
            Test::Evidence(evidence) => ends(&|end| end.evidence == Some(*evidence)),
            // Of the other end no more than its labels is known.
            Test::Workload(pattern) => {
                let local = match self.side {
                    Side::From => record.direction == Direction::Egress.into(),
                    Side::To => record.direction == Direction::Ingress.into(),
                    Side::Either => true,
                };
                local && (like(pattern, &record.workload) || like(pattern, &record.cgroup))
            }
            Test::Labels(tests) => ends(&|end| tests.iter().all(|t| t.holds(end))),
            Test::Identity(name) => ends(&|end| *name == end.identity.to_string() || *name == *end.name),
            Test::Segment(pattern) => ends(&|end| end.segments.iter().any(|s| glob(pattern, s))),
            Test::Ip(net) => ends(&|end| end.ip.is_some_and(|ip| net.contains(&ip))),
            Test::Port(first, last) => ends(&|end| end.port.is_some_and(|p| (*first..=*last).contains(&p))),
        }
    }
}

impl LabelTest {
    fn holds(&self, end: &End) -> bool {
        let get = |key: &str| end.labels.as_ref().and_then(|labels| labels.get(key));
        match self {
            Self::Is(key, value) => get(key).is_some_and(|v| glob(value, v)),
            // As in kubectl: also true where the key is absent.
            Self::IsNot(key, value) => get(key).is_none_or(|v| !glob(value, v)),
            Self::Has(key) => get(key).is_some(),
            Self::HasNot(key) => get(key).is_none(),
        }
    }
}

fn no_such_flag(flag: &str) -> FilterError {
    let hint = near(flag, FLAGS.iter().map(|f| f.0)).map(|f| format!("; did you mean --{f}?")).unwrap_or_default();
    FilterError { flag: flag.to_owned(), message: format!("there is no such filter{hint}") }
}

fn labels(value: &str) -> Result<Vec<LabelTest>, String> {
    let key = |key: &str| {
        if key.trim().is_empty() {
            Err(format!("{value:?} has an empty label; write key=value, key!=value, key or !key, with commas between"))
        } else {
            Ok(key.trim().to_owned())
        }
    };
    let one = |part: &str| {
        Ok(if let Some((k, v)) = part.split_once("!=") {
            LabelTest::IsNot(key(k)?, v.trim().to_owned())
        } else if let Some((k, v)) = part.split_once("==").or_else(|| part.split_once('=')) {
            LabelTest::Is(key(k)?, v.trim().to_owned())
        } else if let Some(k) = part.trim().strip_prefix('!') {
            LabelTest::HasNot(key(k)?)
        } else {
            LabelTest::Has(key(part)?)
        })
    };
    value.split(',').map(one).collect()
}

fn net(value: &str) -> Option<IpNet> {
    // An IPv4 address is one address, however it is written.
    value.parse().ok().or_else(|| value.parse::<IpAddr>().ok().map(|ip| IpNet::from(ip.to_canonical())))
}

/// Hubble's words are understood.
fn verdict(value: &str) -> Result<Coded<Verdict>, String> {
    match value.to_ascii_uppercase().as_str() {
        "FORWARDED" => Ok(Verdict::Allowed.into()),
        "DROPPED" => Ok(Verdict::Denied.into()),
        _ => value.parse().map_err(|e| format!("{e}")),
    }
}

/// `5432` or `6000-6010`.
fn range<N: std::str::FromStr + PartialOrd>(value: &str) -> Option<(N, N)> {
    let (first, last) = value.split_once('-').unwrap_or((value, value));
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first <= last).then_some((first, last))
}

/// `*` stands for any text, `?` for one character. Time is at most the product of the lengths.
fn glob(pattern: &str, text: &str) -> bool {
    let (mut p, mut t) = (pattern.chars(), text.chars());
    // Where to go on when a character does not match: the pattern behind the last star, and the text it has not eaten.
    let mut star = None;
    loop {
        let unread = t.clone();
        match (p.next(), t.next()) {
            (Some('*'), _) => {
                star = Some((p.clone(), unread.clone()));
                t = unread;
            }
            (None, None) => return true,
            (Some(a), Some(b)) if a == b || a == '?' => {}
            _ => {
                let Some((behind, mut rest)) = star.take() else { return false };
                // The star eats one character more.
                if rest.next().is_none() {
                    return false;
                }
                (p, t) = (behind.clone(), rest.clone());
                star = Some((behind, rest));
            }
        }
    }
}

/// All filters together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Filter(pub Vec<Clause>);

impl Filter {
    /// Does a record pass?
    pub fn matches(&self, record: &Record) -> bool {
        self.0.iter().all(|clause| {
            if clause.written.not {
                !clause.hits(record)
            } else {
                // Either of those with the same flag.
                self.0.iter().any(|c| !c.written.not && c.written.flag == clause.written.flag && c.hits(record))
            }
        })
    }
}

/// What a reader asks the history for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Query {
    /// Which records.
    pub filter: Filter,
    /// Not older.
    pub since: Option<Timestamp>,
    /// Not newer.
    pub until: Option<Timestamp>,
    /// The newest `last` of those that match.
    pub last: Option<usize>,
    /// The oldest `first` of those that match.
    pub first: Option<usize>,
    /// Go on with what comes.
    pub follow: bool,
}

impl Query {
    /// Does an item pass filter and times?
    pub fn matches(&self, item: &Item) -> bool {
        let time = item.time();
        self.since.is_none_or(|since| time >= since)
            && self.until.is_none_or(|until| time <= until)
            && match item {
                Item::Lost(_) => true,
                Item::Flow(record) => self.filter.matches(record),
            }
    }

    /// The items that match, in their order; `first` and `last` count records, not loss marks.
    pub fn select<'a>(&self, items: impl DoubleEndedIterator<Item = &'a Arc<Item>>) -> Vec<Arc<Item>> {
        let limit = self.first.or(self.last).unwrap_or(usize::MAX);
        let mut records = 0;
        let mut enough = |item: &Arc<Item>| {
            if records == limit {
                return false;
            }
            records += usize::from(matches!(**item, Item::Flow(_)));
            true
        };
        let mut found: Vec<_>;
        if self.first.is_some() {
            found = items.filter(|i| self.matches(i)).take_while(|i| enough(i)).cloned().collect();
        } else {
            found = items.rev().filter(|i| self.matches(i)).take_while(|i| enough(i)).cloned().collect();
            found.reverse();
        }
        found
    }
}

/// A time that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a time; write how long ago (5m, 2h30m, 1d) or when (2026-11-21T20:00:00Z)")]
pub struct NotATime(String);

/// `5m` = five minutes before `now`; else a time of RFC 3339.
pub fn time(text: &str, now: Timestamp) -> Result<Timestamp, NotATime> {
    let wrong = || NotATime(text.to_owned());
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    // Days are always of 24 hours here.
    let (days, rest) = match text.trim().split_once('d') {
        Some((days, rest)) => (days.trim().parse::<i64>().map_err(|_| wrong())?, rest.trim()),
        None => (0, text.trim()),
    };
    let ago = if rest.is_empty() && days > 0 { SignedDuration::ZERO } else { rest.parse().map_err(|_| wrong())? };
    let ago = days
        .checked_mul(24)
        .and_then(|h| h.checked_mul(3600))
        .and_then(|s| ago.checked_add(SignedDuration::from_secs(s)));
    now.checked_sub(ago.ok_or_else(wrong)?).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::record::{enrich, loss, tests as fixed};
    use crate::flow::sequence::Gap;
    use segfw_common::FlowEvent;

    /// Filters as on the command line; `!` in front of the flag negates.
    fn filter(words: &[(&str, &str)]) -> Result<Filter, FilterError> {
        let one =
            |(flag, value): &(&str, &str)| Clause::parse(flag.trim_start_matches('!'), value, flag.starts_with('!'));
        words.iter().map(one).collect::<Result<_, _>>().map(Filter)
    }

    /// Each filter hits the fixed record or not.
    #[test]
    fn each_filter_hits_and_misses() {
        let record = enrich(&fixed::event(), &fixed::names());
        let rows: &[(&str, &str, &str)] = &[
            ("verdict", "ALLOWED", "DENIED"),
            ("verdict", "forwarded", "dropped"),
            ("reason", "rule", "segment-default"),
            ("kind", "new", "denials"),
            ("rule", "api-to-db", "api-to-d"),
            ("rule", "payments-*/api-*", "other/api-to-db"),
            ("policy", "*-db-*", "db"),
            ("direction", "ingress", "egress"),
            ("from-label", "app=web,tier=api", "app=web,tier=db"),
            ("from-label", "app=w*", "app=*x"),
            ("from-label", "!zone,tier!=db", "!app"),
            ("to-label", "tier", "zone"),
            ("to-label", "tier==db", "app!=payments"),
            ("label", "app=payments", "app=none"),
            ("from-identity", "256", "257"),
            ("identity", "app=payments,tier=db", "world"),
            ("to-segment", "payments-db", "payments-api"),
            ("segment", "payments-a*", "x"),
            ("from-ip", "10.0.0.5", "10.0.0.9"),
            ("to-ip", "10.0.0.8/30", "10.0.0.4/30"),
            ("ip", "::ffff:10.0.0.9", "::1"),
            ("from-port", "43000-44000", "5432"),
            ("to-port", "5432", "5431"),
            ("port", "43210", "1-100"),
            ("protocol", "TCP", "17"),
            ("process", "post*", "curl"),
            ("pid", "812", "813"),
            ("revision", "41", "40"),
            ("revision", "1-41", "42-50"),
            ("to-workload", "postgres", "nginx"),
            ("cgroup", "/system.slice/*", "postgres"),
            ("evidence", "origin", "none"),
            ("workload", "postgres", "nginx"),
            ("workload", "/system.slice/*", "/user.slice/*"),
        ];
        for (flag, hit, miss) in rows {
            assert!(filter(&[(flag, hit)]).unwrap().matches(&record), "--{flag} {hit}");
            assert!(!filter(&[(flag, miss)]).unwrap().matches(&record), "--{flag} {miss}");
            let not = format!("!{flag}");
            assert!(!filter(&[(&not, hit)]).unwrap().matches(&record), "--not --{flag} {hit}");
            assert!(filter(&[(&not, miss)]).unwrap().matches(&record), "--not --{flag} {miss}");
            assert!(filter(&[(flag, hit), (flag, miss)]).unwrap().matches(&record), "either of --{flag}");
        }
        assert_eq!(
            FLAGS.iter().filter(|f| !rows.iter().any(|r| r.0 == f.0)).map(|f| f.0).collect::<Vec<_>>(),
            ["pending", "to-identity", "from-segment", "from-workload"]
        );
        // The local end of this record is its destination.
        assert!(!filter(&[("from-workload", "postgres")]).unwrap().matches(&record));
        let shadow = FlowEvent { pending: 2, pending_rule: 2, ..fixed::event() };
        let shadow = enrich(&shadow, &fixed::names());
        assert!(filter(&[("pending", "DROPPED")]).unwrap().matches(&shadow));
        assert!(!filter(&[("pending", "DENIED")]).unwrap().matches(&record));
        assert!(!filter(&[("verdict", "ALLOWED"), ("port", "1")]).unwrap().matches(&record));
    }

    #[test]
    fn every_flag_is_understood_and_survives_the_wire() {
        for (flag, ..) in FLAGS {
            let value = match flag.rsplit('-').next().unwrap() {
                "verdict" | "pending" => "AUDIT",
                "pid" | "revision" => "812",
                "evidence" => "origin",
                "reason" => "rule",
                "kind" => "close",
                "direction" => "egress",
                "ip" => "2001:db8::/32",
                "port" => "5432",
                "protocol" => "udp",
                _ => "x",
            };
            let clause = Clause::parse(flag, value, true).unwrap();
            let json = serde_json::to_string(&clause).unwrap();
            assert_eq!(json, format!(r#"{{"flag":"{flag}","value":"{value}","not":true}}"#));
            assert_eq!(serde_json::from_str::<Clause>(&json).unwrap(), clause);
        }
    }

    #[test]
    fn errors_say_what_to_write() {
        let rows = [
            ("verdict", "DENY", "--verdict: \"DENY\" is not a verdict; there are: ALLOWED, DENIED, AUDIT"),
            ("from-prt", "1", "--from-prt: there is no such filter; did you mean --from-port?"),
            ("from-verdict", "DENIED", "--from-verdict: there is no such filter"),
            ("port", "70000", "--port: \"70000\" is neither a port nor a range like 6000-6010"),
            ("port", "9-3", "--port: \"9-3\" is neither a port nor a range like 6000-6010"),
            ("ip", "10.0.0", "--ip: \"10.0.0\" is neither an address nor a range like 10.0.0.0/8"),
            (
                "label",
                "app=web,",
                "--label: \"app=web,\" has an empty label; write key=value, key!=value, key or !key, with commas between",
            ),
            ("rule", "", "--rule: the value is empty"),
        ];
        for (flag, value, want) in rows {
            let got = Clause::parse(flag, value, false).unwrap_err().to_string();
            assert!(got.starts_with(want), "{got}");
        }
    }

    #[test]
    fn patterns() {
        for (pattern, text, want) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b-", false),
            ("?", "ä", true),
            ("?", "", false),
            ("*b", "abab", true),
            ("a**", "a", true),
            ("*a", "b", false),
        ] {
            assert_eq!(glob(pattern, text), want, "{pattern} {text}");
        }
        assert!(!glob(&"*a".repeat(200), &"a".repeat(199)));
    }

    #[test]
    fn first_and_last_count_records_and_keep_order() {
        let names = fixed::names();
        let lost = Arc::new(Item::Lost(loss(&Gap { cpu: 0, lost: 1, after: 0, before: 1, agents: false }, &names)));
        let mut items: Vec<_> = (0..4)
            .map(|n| {
                let mut event = fixed::event();
                event.sequence = n;
                event.time += n * 1_000_000_000;
                Arc::new(Item::Flow(Box::new(enrich(&event, &names))))
            })
            .collect();
        items.insert(2, lost);
        let numbers = |query: &Query| -> Vec<String> {
            let show = |i: &Arc<Item>| match &**i {
                Item::Flow(r) => r.sequence.unwrap().to_string(),
                Item::Lost(_) => "lost".to_owned(),
            };
            query.select(items.iter()).iter().map(show).collect()
        };
        assert_eq!(numbers(&Query { last: Some(3), ..Query::default() }), ["1", "lost", "2", "3"]);
        assert_eq!(numbers(&Query { first: Some(2), ..Query::default() }), ["0", "1"]);
        let since = Some("2026-11-21T20:59:41Z".parse().unwrap());
        assert_eq!(numbers(&Query { since, ..Query::default() }), ["2", "3"]);
        assert_eq!(numbers(&Query { until: since, last: Some(1), ..Query::default() }), ["1", "lost"]);
    }

    #[test]
    fn times() {
        let now: Timestamp = "2026-11-21T20:00:00Z".parse().unwrap();
        for (text, want) in [
            ("5m", "2026-11-21T19:55:00Z"),
            ("2h30m", "2026-11-21T17:30:00Z"),
            ("1d", "2026-11-20T20:00:00Z"),
            ("1d 1h", "2026-11-20T19:00:00Z"),
            ("2026-11-21T18:00:00+02:00", "2026-11-21T16:00:00Z"),
        ] {
            assert_eq!(time(text, now).unwrap().to_string(), want);
        }
        for text in ["", "x", "d", "5", "999999999999999999d", "yesterday"] {
            assert!(time(text, now).is_err(), "{text}");
        }
    }
}
