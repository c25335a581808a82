//! For tests: what a policy means, said as plainly as possible. It reads the rules as written, one after the other, and
//! shares no code with the compiler; where the two differ, one of them is wrong.

use super::host_policy::{HostPolicy, Labels, Members, PeerSpec, Requirement, Rule, RuleAction, Schedule, Selector};
use ipnet::IpNet;
use jiff::Timestamp;
use segfw_common::{Action, Direction, Evidence, Proto, Reason};
use std::net::IpAddr;

/// Who stands at an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    Labels(Labels),
    /// An address that no workload claims.
    Address(IpAddr),
    Host,
    Kernel,
    Unresolved,
}

/// The meaning of a policy for one flow at one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meaning {
    pub action: Action,
    pub reason: Reason,
    /// Index of the deciding rule.
    pub rule: Option<usize>,
    /// The other answer with the monitor rules enforced, where it lets pass what this one does not or the reverse.
    pub pending: Option<(Action, Option<usize>)>,
    /// The least evidence the answer needs.
    pub require: Evidence,
    pub quiet: bool,
    /// All segments of the local end are in monitor mode.
    pub monitor: bool,
}

/// A flow as one end sees it.
#[derive(Clone, Debug)]
pub struct Case {
    /// `Labels` or `Unresolved`.
    pub local: Who,
    pub direction: Direction,
    pub peer: Who,
    pub proto: Proto,
    pub port: u16,
    pub at: Timestamp,
}

/// `None` = the local end is not enforced.
pub fn meaning(policy: &HostPolicy, case: &Case) -> Option<Meaning> {
    let mut segments = Vec::new();
    for segment in &policy.segments {
        if let (Members::Workloads(selector), Who::Labels(labels)) = (&segment.members, &case.local)
            && selected(selector, labels)
        {
            segments.push(segment);
        }
    }
    let (default_allow, default_reason, monitor);
    match case.local {
        Who::Labels(_) => {
            if segments.is_empty() {
                return None;
            }
            monitor = segments.iter().all(|s| s.monitor);
            if case.peer == Who::Unresolved {
                default_allow = segments.iter().all(|s| s.unresolved_allow);
                default_reason = Reason::UnresolvedPeer;
            } else {
                default_allow = segments.iter().all(|s| match case.direction {
                    Direction::Ingress => s.default_ingress_allow,
                    Direction::Egress => s.default_egress_allow,
                });
                default_reason = Reason::SegmentDefault;
            }
        }
        Who::Unresolved => {
            let strict = |s: &&super::host_policy::Segment| {
                matches!(s.members, Members::Workloads(_)) && !s.monitor && !s.unresolved_allow
            };
            policy.segments.iter().find(strict)?;
            (default_allow, default_reason, monitor) = (false, Reason::UnresolvedLocal, false);
        }
        Who::Address(_) | Who::Host | Who::Kernel => return None,
    }
    let scan = |with_monitor: bool| -> (Action, Reason, Option<usize>) {
        let mut passed_tier = None;
        let mut too_late = None;
        for (i, rule) in policy.rules.iter().enumerate() {
            if rule.monitor && !with_monitor {
                continue;
            }
            if passed_tier == Some(rule.tier) {
                continue;
            }
            if !matches(policy, rule, case) {
                continue;
            }
            let expired = rule.expires.is_some_and(|e| case.at >= e);
            let closed = rule.schedule.as_ref().is_some_and(|s| !open(s, case.at));
            if expired || closed {
                if rule.action == RuleAction::Allow && too_late.is_none() {
                    too_late = Some((if expired { Reason::Expired } else { Reason::OutOfSchedule }, i));
                }
                continue;
            }
            match rule.action {
                RuleAction::Pass => passed_tier = Some(rule.tier),
                RuleAction::Allow => return (Action::Allow, Reason::Rule, Some(i)),
                RuleAction::Deny => return (Action::Deny, Reason::Rule, Some(i)),
                RuleAction::Reject => return (Action::Reject, Reason::Rule, Some(i)),
            }
        }
        match (default_allow, too_late) {
            (true, _) => (Action::Allow, default_reason, None),
            (false, None) => (Action::Deny, default_reason, None),
            (false, Some((reason, i))) => (Action::Deny, reason, Some(i)),
        }
    };
    let (action, reason, rule) = scan(false);
    let (shadow_action, _, shadow_rule) = scan(true);
    let differs = (action == Action::Allow) != (shadow_action == Action::Allow);
    let deciding = rule.filter(|_| action == Action::Allow).and_then(|i| policy.rules.get(i));
    Some(Meaning {
        action,
        reason,
        rule,
        pending: differs.then_some((shadow_action, shadow_rule)),
        require: match (deciding, case.direction) {
            (Some(rule), Direction::Ingress) => rule.require,
            (Some(_), Direction::Egress) | (None, _) => Evidence::None,
        },
        quiet: deciding.is_some_and(|r| !r.log),
        monitor,
    })
}

fn matches(policy: &HostPolicy, rule: &Rule, case: &Case) -> bool {
    let (source, destination) = match case.direction {
        Direction::Ingress => (&case.peer, &case.local),
        Direction::Egress => (&case.local, &case.peer),
    };
    let port = rule.ports.is_empty()
        || rule.ports.iter().any(|p| p.proto == case.proto && p.first <= case.port && case.port <= p.last);
    port && stands(policy, &rule.from, source) && stands(policy, &rule.to, destination)
}

fn stands(policy: &HostPolicy, peers: &[PeerSpec], who: &Who) -> bool {
    peers.iter().any(|peer| match (peer, who) {
        (PeerSpec::Any, who) => *who != Who::Unresolved,
        (PeerSpec::Unresolved, who) => *who == Who::Unresolved,
        (PeerSpec::Host, who) => *who == Who::Host,
        (PeerSpec::World, who) => matches!(who, Who::Address(_)),
        (PeerSpec::Select(selector), Who::Labels(labels)) => selected(selector, labels),
        (PeerSpec::Addresses(nets), Who::Address(ip)) => nets.iter().any(|n| holds(n, *ip)),
        (PeerSpec::Segment(i), who) => match (policy.segments.get(*i).map(|s| &s.members), who) {
            (Some(Members::Workloads(selector)), Who::Labels(labels)) => selected(selector, labels),
            (Some(Members::Addresses(nets)), Who::Address(ip)) => nets.iter().any(|n| holds(n, *ip)),
            _ => false,
        },
        (PeerSpec::Select(_) | PeerSpec::Addresses(_), _) => false,
    })
}

/// The family counts; an IPv4 address or prefix is one however it is written.
fn holds(net: &IpNet, ip: IpAddr) -> bool {
    let bits = |ip: IpAddr| match ip.to_canonical() {
        IpAddr::V4(v4) => (false, u128::from(u32::from(v4)) << 96),
        IpAddr::V6(v6) => (true, u128::from(v6)),
    };
    let (mut net_v6, mut net_bits) = bits(net.addr());
    let mut len = u32::from(net.prefix_len());
    if let IpAddr::V6(v6) = net.addr() {
        if net_v6 || len >= 96 {
            len -= if net_v6 { 0 } else { 96 };
        } else {
            // Written with an IPv4-mapped address but shorter than that: an IPv6 prefix all the same.
            (net_v6, net_bits) = (true, u128::from(v6));
        }
    }
    let (v6, ip_bits) = bits(ip);
    v6 == net_v6 && (len == 0 || (net_bits ^ ip_bits) >> (128 - len) == 0)
}

fn selected(selector: &Selector, labels: &Labels) -> bool {
    selector.0.iter().all(|requirement| match requirement {
        Requirement::In { key, values } => labels.get(key).is_some_and(|have| values.iter().any(|v| v == have)),
        Requirement::NotIn { key, values } => !labels.get(key).is_some_and(|have| values.iter().any(|v| v == have)),
        Requirement::Exists { key } => labels.get(key).is_some(),
        Requirement::NotExists { key } => labels.get(key).is_none(),
    })
}

/// The clock on the wall of the zone shows a time inside a window.
fn open(schedule: &Schedule, at: Timestamp) -> bool {
    let local = at.to_zoned(schedule.zone.clone());
    let seconds = i64::from(local.hour()) * 3600 + i64::from(local.minute()) * 60 + i64::from(local.second());
    let in_window = |w: &(u8, u32, u32)| {
        i64::from(w.0) == i64::from(local.weekday().to_monday_one_offset())
            && i64::from(w.1) <= seconds
            && seconds < i64::from(w.2)
    };
    schedule.windows.iter().any(in_window)
}
