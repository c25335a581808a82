//! A small language for policies in tests.
#![allow(clippy::unwrap_used, reason = "only tests call it")]

use super::super::host_policy::Segment;
use super::*;

/// `app=web,tier=api`; `""` = none.
pub fn labels(text: &str) -> Labels {
    text.split(',').filter_map(|kv| kv.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

pub fn segment(name: &str, select: &str) -> Segment {
    let requirement = |(key, value): (String, String)| Requirement::In { key, values: vec![value] };
    Segment {
        name: name.into(),
        owner: None,
        members: Members::Workloads(Selector(labels(select).into_iter().map(requirement).collect())),
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

pub fn port(text: &str) -> PortSpec {
    let (proto, ports) = text.split_once('/').unwrap();
    let proto = *Proto::ALL.iter().find(|p| p.as_str() == proto).unwrap();
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    PortSpec { proto, first: first.parse().unwrap(), last: last.parse().unwrap() }
}

pub fn peer(policy: &HostPolicy, text: &str) -> PeerSpec {
    match text {
        "any" => PeerSpec::Any,
        "world" => PeerSpec::World,
        "host" => PeerSpec::Host,
        "unresolved" => PeerSpec::Unresolved,
        _ => match policy.segments.iter().position(|s| s.name == text) {
            Some(i) => PeerSpec::Segment(i),
            None => PeerSpec::Addresses(vec![text.parse().unwrap()]),
        },
    }
}

/// `allow web -> db,10.0.0.0/8 tcp/5432 udp/53 tier=baseline monitor quiet until=<time>`; segments must exist.
pub fn rule(policy: &mut HostPolicy, text: &str) {
    let mut words = text.split_whitespace();
    let action = match words.next().unwrap() {
        "allow" => RuleAction::Allow,
        "deny" => RuleAction::Deny,
        "reject" => RuleAction::Reject,
        "pass" => RuleAction::Pass,
        other => panic!("{other}"),
    };
    let from = words.next().unwrap().split(',').map(|p| peer(policy, p)).collect();
    assert_eq!(words.next(), Some("->"));
    let to = words.next().unwrap().split(',').map(|p| peer(policy, p)).collect();
    let index = policy.rules.len() as u32;
    let mut rule = Rule {
        policy: "p".into(),
        name: format!("r{index}").into(),
        tier: Tier::Application,
        priority: 100,
        index,
        from,
        to,
        ports: vec![],
        action,
        monitor: false,
        require: Evidence::None,
        expires: None,
        schedule: None,
        log: true,
        at: Position { file: "web.yaml".into(), line: index + 1, column: 5 },
    };
    for word in words {
        match word.split_once('=') {
            None if word == "monitor" => rule.monitor = true,
            None if word == "quiet" => rule.log = false,
            None => rule.ports.push(port(word)),
            Some(("until", t)) => rule.expires = Some(t.parse().unwrap()),
            Some(("tier", t)) => {
                let tiers = [Tier::Emergency, Tier::Security, Tier::Platform, Tier::Application, Tier::Baseline];
                rule.tier = *tiers.iter().find(|x| format!("{x:?}").to_lowercase() == t).unwrap();
            }
            Some(("require", _)) => rule.require = Evidence::Origin,
            Some(other) => panic!("{other:?}"),
        }
    }
    policy.rules.push(rule);
}

/// Segments `web` and `db` by label `app`, and these rules.
pub fn policy(rules: &[&str]) -> HostPolicy {
    let mut policy =
        HostPolicy { segments: vec![segment("web", "app=web"), segment("db", "app=db")], ..Default::default() };
    for text in rules {
        rule(&mut policy, text);
    }
    policy
}

pub const WALL: &str = "2026-11-02T09:00:00Z";
pub const BOOT: u64 = 5_000_000_000;

pub fn clock() -> Clock {
    Clock { wall: WALL.parse().unwrap(), boot_ns: BOOT }
}
