//! From "may A talk to B?" to the report of why: the same for the agent and for a policy that is still in a folder.
//! Pure: the caller says who is who, what is in force and what time it is.

use super::report::{
    At, EndReport, EndSpec, Explanation, NearestReport, PendingReport, Question, RuleReport, WithoutReport,
};
use crate::flow::Coded;
use crate::flow::coded::Word;
use crate::policy::compile::compile;
use crate::policy::explain::{self, End, Judged, Judgement, RuleRef, View, Who};
use crate::policy::host_policy::{HostPolicy, Labels, Members, Segment};
use crate::policy::problem::{nearest, quote};
use crate::policy::tables::{IdentityName, Numbers, Tables, canonical};
use ipnet::IpNet;
use segfw_common::rule::ipproto;
use segfw_common::{Action, Addr, Direction, Evidence, Identity, LocalEntry, Proto, Reason, Verdict, control};
use std::borrow::Cow;

/// Names that are listed in a message.
const LISTED: usize = 8;

/// Answers `question` from `tables`, and from `policy` that they were compiled from.
///
/// `find` knows the labels of a workload by its name or by the path of its cgroup. The error is a sentence about the
/// end that is not known, for the person who asked.
pub fn explain(
    tables: &Tables,
    policy: &HostPolicy,
    question: &Question,
    find: &dyn Fn(&str) -> Option<Labels>,
    view: View,
    revision: Option<u64>,
    policy_from: &str,
) -> Result<Explanation, String> {
    let mut notes = Vec::new();
    let source = who(&question.from, tables, policy, find, &mut notes)?;
    let destination = who(&question.to, tables, policy, find, &mut notes)?;
    let tables = with_labels(tables, policy, [&source, &destination], view, &mut notes)?;
    for end in [&question.from, &question.to] {
        note_end(end, &tables, &mut notes);
    }
    let number = question.port.protocol.0;
    let proto = Proto::from_ip(number);
    let asked = explain::Question {
        source: seen(&source, &tables, policy, Evidence::Origin),
        destination: seen(&destination, &tables, policy, Evidence::Endpoint),
        proto,
        port: if proto == Proto::Other { number } else { question.port.port },
    };
    let answer = explain::explain(&tables, policy, &asked, view);
    let ends = [(answer.source, Direction::Egress, &source), (answer.destination, Direction::Ingress, &destination)];
    let mut reports = Vec::new();
    for (judgement, direction, local) in ends {
        let other = match direction {
            Direction::Egress => &question.to,
            Direction::Ingress => &question.from,
        };
        let mut report = to_report(judgement, direction, other, policy);
        grants(&mut report, local, &tables, number, view, &mut notes);
        reports.push(report);
    }
    if source == destination && matches!(source, Who::Labels(_)) {
        notes.push("never denied, whatever the policy says: one workload to itself over loopback".to_owned());
    }
    if (proto, question.port.port) == (Proto::Udp, 67) || (proto, question.port.port) == (Proto::Udp, 547) {
        notes.push(
            "never denied, whatever the policy says: a DHCP client (from port 68 to 67, DHCPv6 546 to 547)".into(),
        );
    }
    for end in [&source, &destination] {
        match (end, proto) {
            (Who::Address(ip), Proto::Icmp) if ip.is_ipv6() => {
                notes.push(format!("there is no such flow: {ip} is IPv6, and icmp is of IPv4 (icmpv6?)"));
            }
            (Who::Address(ip), Proto::Icmpv6) if ip.is_ipv4() => {
                notes.push(format!("there is no such flow: {ip} is IPv4, and icmpv6 is of IPv6 (icmp?)"));
            }
            _ => {}
        }
    }
    let any = |verdict: Verdict| reports.iter().any(|r| r.verdict == Some(verdict.into()));
    let verdict = [Verdict::Denied, Verdict::Audit].into_iter().find(|v| any(*v)).unwrap_or(Verdict::Allowed);
    if reports.iter().all(|r| r.verdict.is_none()) {
        notes.push("nothing is judged at either end, so nothing is refused".to_owned());
    }
    Ok(Explanation {
        question: question.clone(),
        verdict: verdict.into(),
        revision,
        policy_from: policy_from.to_owned(),
        ends: reports,
        notes,
    })
}

/// `"postgers" is not known`, with what was probably meant, else with what there is.
pub fn not_known<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let mut known: Vec<&str> = known.into_iter().collect();
    known.sort_unstable();
    known.dedup();
    let help = match nearest(name, known.iter().copied()) {
        Some(near) => format!("did you mean {}?", quote(near)),
        None if known.is_empty() => "no workload is known at all".to_owned(),
        None => {
            let more = known.len().saturating_sub(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let listed: Vec<_> = known.iter().take(LISTED).copied().collect();
            format!("known: {}{more}", listed.join(", "))
        }
    };
    format!("{} is not known as a workload; {help}", quote(name))
}

/// The labels of the workload that was meant: a few of its labels are enough if they are nobody else's too.
fn meant(labels: &Labels, tables: &Tables, notes: &mut Vec<String>) -> Result<Labels, String> {
    let known: Vec<&Labels> = tables
        .identities
        .values()
        .filter_map(|name| match name {
            IdentityName::Labels(known) => Some(known),
            IdentityName::Reserved(_) | IdentityName::Prefix(_) => None,
        })
        .filter(|known| labels.iter().all(|(key, value)| known.get(key) == Some(value)))
        .collect();
    match known.as_slice() {
        _ if known.contains(&labels) => Ok(labels.clone()),
        [] => Ok(labels.clone()),
        [one] => {
            notes.push(format!("{} was taken for {}", canonical(labels), canonical(one)));
            Ok((*one).clone())
        }
        many => {
            let listed: Vec<_> = many.iter().take(LISTED).map(|l| canonical(l)).collect();
            let more = if many.len() > LISTED { " and more" } else { "" };
            Err(format!("{} fits several workloads: {}{more}", canonical(labels), listed.join("; ")))
        }
    }
}

fn who(
    end: &EndSpec,
    tables: &Tables,
    policy: &HostPolicy,
    find: &dyn Fn(&str) -> Option<Labels>,
    notes: &mut Vec<String>,
) -> Result<Who, String> {
    Ok(match end {
        EndSpec::Labels(labels) => Who::Labels(meant(labels, tables, notes)?),
        EndSpec::Address(ip) => Who::Address(*ip),
        EndSpec::Range(net) => Who::Address(net.network().to_canonical()),
        EndSpec::World => Who::World,
        EndSpec::Host => Who::Host,
        EndSpec::Unresolved => Who::Unresolved,
        EndSpec::Cgroup(path) => Who::Labels(find(path).ok_or_else(|| {
            format!(
                "{} is no workload: no Workload document matches it; what runs there is asked for as host",
                quote(path)
            )
        })?),
        EndSpec::Workload(name) => match find(name) {
            Some(labels) => Who::Labels(labels),
            None => return Err(no_workload(name, policy, find)),
        },
    })
}

/// What a name that is no workload may have been meant for: a unit without its ending, or a segment.
fn no_workload(name: &str, policy: &HostPolicy, find: &dyn Fn(&str) -> Option<Labels>) -> String {
    let unit = format!("{name}.service");
    if find(&unit).is_some() {
        return format!("{} is not known as a workload; did you mean {}?", quote(name), quote(&unit));
    }
    match policy.segments.iter().find(|s| s.name == name).map(|s| &s.members) {
        Some(Members::Workloads(selector)) => {
            let shown = crate::policy::selector::show(selector);
            format!("{} is a segment, not a workload; ask for the labels of one of its members ({shown})", quote(name))
        }
        Some(Members::Addresses(nets)) => {
            let shown = nets.first().map(ToString::to_string).unwrap_or_default();
            format!("{} is a segment of addresses, not a workload; ask for one of them ({shown})", quote(name))
        }
        None => {
            let near = nearest(name, policy.segments.iter().map(|s| s.name.as_str()));
            let near = near.map(|n| format!(" (a segment has a name like it: {})", quote(n))).unwrap_or_default();
            format!(
                "{} is not known as a workload{near}; see segfw workloads, or ask for labels (app=web)",
                quote(name)
            )
        }
    }
}

/// The tables, or such as they would be if the label sets that they do not know were workloads of this host.
fn with_labels<'t>(
    tables: &'t Tables,
    policy: &HostPolicy,
    ends: [&Who; 2],
    view: View,
    notes: &mut Vec<String>,
) -> Result<Cow<'t, Tables>, String> {
    let (mut local, mut remote, mut new) = (Vec::new(), Vec::new(), Vec::new());
    for end in ends {
        let Who::Labels(labels) = end else { continue };
        let list = match tables.identity_of(&IdentityName::Labels(labels.clone())) {
            None if new.contains(labels) => continue,
            None => {
                notes.push(format!("no workload here has exactly {}; answered as if one had", canonical(labels)));
                new.push(labels.clone());
                &mut local
            }
            Some(identity) if tables.locals.contains_key(&identity) => &mut local,
            Some(_) => &mut remote,
        };
        list.push(labels.clone());
    }
    if new.is_empty() {
        return Ok(Cow::Borrowed(tables));
    }
    // Two label sets: small, whatever the policy.
    let compiled = compile(policy, &local, &remote, &mut Numbers::default(), view.clock);
    compiled.map(Cow::Owned).map_err(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
}

/// How the other end knows this one. A workload in no segment is not in the tables of those that are enforced, but the
/// hooks see it all the same; one that is in a segment and not enforced is of another host.
fn seen(who: &Who, tables: &Tables, policy: &HostPolicy, here: Evidence) -> End {
    let Who::Labels(labels) = who else { return who.clone().into() };
    let segments = policy.segments.iter().map(|s| &s.members);
    let in_segment = segments.into_iter().any(|m| matches!(m, Members::Workloads(s) if s.matches(labels)));
    let enforced =
        tables.identity_of(&IdentityName::Labels(labels.clone())).is_some_and(|i| tables.locals.contains_key(&i));
    End { who: who.clone(), evidence: (enforced || !in_segment).then_some(here) }
}

/// What a reader should know about how an end was understood.
fn note_end(end: &EndSpec, tables: &Tables, notes: &mut Vec<String>) {
    let named = || {
        tables.identities.values().filter_map(|name| match name {
            IdentityName::Prefix(net) => Some(net),
            IdentityName::Reserved(_) | IdentityName::Labels(_) => None,
        })
    };
    match end {
        EndSpec::World => {
            let whole = named().filter(|n| n.prefix_len() == 0).map(ToString::to_string).collect::<Vec<_>>();
            notes.push("world: an address that no workload has and that no policy names".to_owned());
            if !whole.is_empty() {
                notes.push(format!("a policy names {}: ask for an address to hear of that", whole.join(" and ")));
            }
        }
        EndSpec::Range(net) => {
            let first = net.network();
            let mut note = format!("{net} was asked for as its first address, {first}");
            let inside: Vec<_> = named()
                .filter(|n| n.prefix_len() > net.prefix_len() && net.contains(&n.network()))
                .map(IpNet::to_string)
                .collect();
            if !inside.is_empty() {
                let shown: Vec<_> = inside.iter().take(LISTED).cloned().collect();
                let more = if inside.len() > LISTED { ", ..." } else { "" };
                note += &format!("; the answer may differ inside {}{more}", shown.join(", "));
            }
            notes.push(note);
        }
        EndSpec::Address(ip) if tables.longest_prefix(&Addr::from(*ip)).is_none() => {
            notes.push(format!("no policy names a prefix with {ip}: it is world"));
        }
        EndSpec::Address(_)
        | EndSpec::Labels(_)
        | EndSpec::Workload(_)
        | EndSpec::Cgroup(_)
        | EndSpec::Host
        | EndSpec::Unresolved => {}
    }
}

/// A word of `policy::explain` as the value it came from.
fn coded<T: Word>(word: &str) -> Coded<T> {
    word.parse().unwrap_or(Coded::Unknown(u8::MAX))
}

/// One end of an explanation as it is reported. `other` is the other end as it was asked for.
pub fn to_report(judgement: Judgement, direction: Direction, other: &EndSpec, policy: &HostPolicy) -> EndReport {
    match judgement {
        Judgement::None { who, why } => EndReport {
            direction: direction.into(),
            local: who,
            segments: Vec::new(),
            peer: other.to_string(),
            evidence: Evidence::None.into(),
            evidence_means: String::new(),
            verdict: None,
            reason: Reason::NoSegment.into(),
            not_judged: Some(why.to_owned()),
            rule: None,
            default_of: None,
            pending: None,
            until: None,
            nearest: None,
            without: None,
            on_revoke: None,
            golden: None,
        },
        Judgement::Judged(judged) => judged_report(*judged, direction, policy),
    }
}

fn judged_report(judged: Judged, direction: Direction, policy: &HostPolicy) -> EndReport {
    let Judged {
        direction: _,
        verdict,
        reason,
        reject: _, // the action of the rule says so
        rule,
        local,
        segments,
        peer,
        evidence,
        evidence_means,
        pending,
        until,
        on_revoke,
        nearest,
        without,
    } = judged;
    let (verdict, reason) = (coded::<Verdict>(verdict), coded::<Reason>(reason));
    let judged = reason != Reason::NoSegment.into();
    let report = |r: &RuleRef| rule_report(r, policy);
    let default_of = match reason.known() {
        Some(Reason::SegmentDefault) => default_of(&segments, policy, |s| match direction {
            Direction::Ingress => s.default_ingress_allow,
            Direction::Egress => s.default_egress_allow,
        }),
        Some(Reason::UnresolvedPeer) => default_of(&segments, policy, |s| s.unresolved_allow),
        Some(_) | None => None,
    };
    EndReport {
        direction: direction.into(),
        local,
        segments,
        peer,
        evidence: coded(evidence),
        evidence_means,
        verdict: judged.then_some(verdict),
        reason,
        not_judged: (!judged).then(|| "in no segment: nothing is enforced here".to_owned()),
        rule: rule.as_ref().map(report),
        default_of,
        pending: pending.map(|p| PendingReport {
            verdict: if p.action == Action::Allow.as_str() { Verdict::Allowed } else { Verdict::Denied }.into(),
            rule: p.rule.as_ref().map(report),
        }),
        until,
        nearest: nearest.map(|n| NearestReport {
            rule: report(&n.rule),
            why_not: n.differs.into_iter().map(|d| d.because).collect::<Vec<_>>().join("; "),
        }),
        without: without.map(|w| WithoutReport {
            verdict: coded(w.verdict),
            reason: coded(w.reason),
            rule: w.rule.as_ref().map(report),
        }),
        on_revoke: (judged && !on_revoke.is_empty()).then_some(on_revoke),
        // A question has neither a source port nor a workload of its own: those golden rules that depend on them are notes.
        golden: (reason == Reason::GoldenRule.into()).then(|| "never denied, by construction".to_owned()),
    }
}

/// The segments whose default decided: the strict ones where there are any, since they win.
fn default_of(segments: &[String], policy: &HostPolicy, allows: impl Fn(&Segment) -> bool) -> Option<String> {
    let own = || policy.segments.iter().filter(|s| segments.contains(&s.name));
    let strict = own().any(|s| !allows(s));
    let names: Vec<_> = own().filter(|s| allows(s) != strict).map(|s| s.name.as_str()).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

fn rule_report(rule: &RuleRef, policy: &HostPolicy) -> RuleReport {
    let found = policy.rules.iter().find(|r| *r.name == *rule.rule && *r.policy == *rule.policy);
    let unknown = || "unknown".to_owned();
    RuleReport {
        policy: rule.policy.clone(),
        rule: rule.rule.clone(),
        tier: found.map_or_else(unknown, |r| r.tier.as_str().to_owned()),
        action: found.map_or_else(unknown, |r| r.action.as_str().to_owned()),
        // Absent only if the tables were compiled from another policy; the text still says where.
        at: found.map_or_else(|| At { file: rule.at.clone(), line: 0, column: 0 }, |r| At::from(&r.at)),
    }
}

/// What a workload must be granted before it can have a socket of this protocol: any of these bits, and the word for
/// `grants:`.
fn needed(protocol: u16, direction: Direction) -> Option<(u32, &'static str)> {
    match (protocol, direction) {
        (ipproto::TCP | ipproto::UDP, _) => None,
        // The kernel answers, no socket is needed; and a server that has no MPTCP answers with TCP.
        (ipproto::ICMP | ipproto::ICMPV6 | ipproto::MPTCP, Direction::Ingress) => None,
        (ipproto::ICMP | ipproto::ICMPV6, Direction::Egress) => {
            Some((LocalEntry::GRANT_PING | LocalEntry::GRANT_RAW, "ping"))
        }
        (ipproto::MPTCP, Direction::Egress) => Some((LocalEntry::GRANT_MPTCP, "mptcp")),
        (ipproto::SCTP, _) => Some((LocalEntry::GRANT_SCTP, "sctp")),
        (ipproto::UDPLITE, _) => Some((LocalEntry::GRANT_UDPLITE, "udplite")),
        (ipproto::DCCP, _) => Some((LocalEntry::GRANT_DCCP, "dccp")),
        _ => Some((LocalEntry::GRANT_RAW, "raw")),
    }
}

/// A socket that cannot be created sends nothing, whatever the rules say.
fn grants(report: &mut EndReport, local: &Who, tables: &Tables, protocol: u16, view: View, notes: &mut Vec<String>) {
    let Some(direction) = report.direction.known() else { return };
    let identity = match local {
        Who::Labels(labels) => tables.identity_of(&IdentityName::Labels(labels.clone())),
        Who::Unresolved => Some(Identity::UNRESOLVED),
        Who::Address(_) | Who::World | Who::Host => None,
    };
    let Some(entry) = identity.and_then(|i| tables.locals.get(&i)) else { return };
    let Some((_, word)) = needed(protocol, direction).filter(|(bits, _)| entry.grants & bits == 0) else { return };
    // What a golden rule lets out the kernel sends by itself, without a socket of the workload.
    let settled = [None, Some(Verdict::Denied.into())].contains(&report.verdict);
    if settled || report.reason == Reason::GoldenRule.into() {
        return;
    }
    let monitored = entry.flags & LocalEntry::MONITOR != 0 || view.host_flags & control::HOST_MONITOR != 0;
    report.verdict = Some(if monitored { Verdict::Audit } else { Verdict::Denied }.into());
    report.reason = Reason::ProtocolNotGranted.into();
    (report.rule, report.default_of, report.without, report.until) = (None, None, None, None);
    let segment = report.segments.first().map(|s| format!(" {s}")).unwrap_or_default();
    let also = match word {
        "sctp" | "udplite" | "dccp" => format!(", or an allow rule of its own that names {word}"),
        "ping" => ", or an allow rule from it that names icmp or icmpv6".to_owned(),
        _ => String::new(),
    };
    notes.push(format!(
        "{} may not have {word} sockets; what grants them: `grants: [{word}]` in its segment{segment}{also}",
        report.local
    ));
}

#[cfg(test)]
mod tests;
