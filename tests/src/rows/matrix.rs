//! Family × protocol × kind of rule × evidence and direction.

use super::addresses;
use crate::policy::{APPLICATION, Order, Yaml, at, schedule, watched};
use crate::table::{ENDS, Expect, Family, Group, Probe, Proto, Row, Where};
use crate::world::net;

/// What a kind of rule must do to a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Result {
    Open,
    Closed,
    Reject,
}

/// A kind of rule: the policies it needs, the port that is tried, and what must come of it. `first` to `last` are
/// the ports of its rules, and `tried` the port of the probe, all relative to the kind's own base port.
struct Kind {
    name: &'static str,
    policies: &'static [(Order, &'static str)],
    first: u16,
    last: u16,
    tried: u16,
    result: Result,
    /// Which of its policies decides; none = the default.
    by: Option<usize>,
}

const fn kind(name: &'static str, policies: &'static [(Order, &'static str)], result: Result, by: usize) -> Kind {
    Kind { name, policies, first: 0, last: 0, tried: 0, result, by: Some(by) }
}

const fn by_default(name: &'static str, policies: &'static [(Order, &'static str)], result: Result) -> Kind {
    Kind { name, policies, first: 0, last: 0, tried: 0, result, by: None }
}

const ALLOW: (Order, &str) = (APPLICATION, "action: allow");

const KINDS: &[Kind] = &[
    kind("allow", &[ALLOW], Result::Open, 0),
    kind("deny", &[(APPLICATION, "action: deny")], Result::Closed, 0),
    kind("reject", &[(APPLICATION, "action: reject")], Result::Reject, 0),
    by_default("default", &[], Result::Closed),
    kind("pass-to-allow", &[(at("security", 10), "action: pass"), ALLOW], Result::Open, 1),
    kind(
        "pass-skips-its-tier",
        &[(at("security", 10), "action: pass"), (at("security", 20), "action: deny"), ALLOW],
        Result::Open,
        2,
    ),
    by_default("pass-to-default", &[(at("security", 10), "action: pass")], Result::Closed),
    kind("tier-deny-first", &[(at("security", 900), "action: deny"), ALLOW], Result::Closed, 0),
    kind(
        "tier-allow-first",
        &[(at("emergency", 900), "action: allow"), (at("security", 1), "action: deny")],
        Result::Open,
        0,
    ),
    kind(
        "tier-baseline-last",
        &[(at("platform", 900), "action: allow"), (at("baseline", 1), "action: deny")],
        Result::Open,
        0,
    ),
    kind(
        "priority-allow-first",
        &[(at("application", 10), "action: allow"), (at("application", 20), "action: deny")],
        Result::Open,
        0,
    ),
    kind(
        "priority-deny-first",
        &[(at("application", 20), "action: allow"), (at("application", 10), "action: deny")],
        Result::Closed,
        1,
    ),
    kind("equal-deny-wins", &[ALLOW, (APPLICATION, "action: deny")], Result::Closed, 1),
    Kind { first: 1, last: 3, tried: 1, ..kind("range-first", &[ALLOW], Result::Open, 0) },
    Kind { first: 1, last: 3, tried: 3, ..kind("range-last", &[ALLOW], Result::Open, 0) },
    Kind { first: 1, last: 3, tried: 0, ..by_default("range-below", &[ALLOW], Result::Closed) },
    Kind { first: 1, last: 3, tried: 4, ..by_default("range-above", &[ALLOW], Result::Closed) },
    Kind {
        first: 0,
        last: 4,
        tried: 2,
        ..kind("range-hole", &[ALLOW, (at("security", 1), "action: deny, ports: @MIDDLE@")], Result::Closed, 1)
    },
    kind("any", &[(APPLICATION, "action: allow, @ANY@")], Result::Open, 0),
    by_default("expired", &[(APPLICATION, "action: allow, expires: 2020-01-01T00:00:00Z")], Result::Closed),
    kind("not-expired", &[(APPLICATION, "action: allow, expires: 2099-01-01T00:00:00Z")], Result::Open, 0),
    by_default("schedule-closed", &[(APPLICATION, "action: allow, schedule: @CLOSED@")], Result::Closed),
    kind("schedule-open", &[(APPLICATION, "action: allow, schedule: @OPEN@")], Result::Open, 0),
    kind("monitor-deny", &[(watched("security", 10), "action: deny"), ALLOW], Result::Open, 1),
    by_default("monitor-allow", &[(watched("security", 10), "action: allow")], Result::Closed),
    by_default("other-protocol", &[(APPLICATION, "action: allow, @OTHER@")], Result::Closed),
];

/// How the two ends know each other, and who judges.
struct Case {
    evidence: &'static str,
    direction: &'static str,
    cli: (&'static str, &'static str),
    srv: (&'static str, &'static str),
    to: Where,
}

const INSIDE: [&str; 2] = ["managed/cli", "managed/srv"];
const CASES: &[Case] = &[
    Case { evidence: "endpoint", direction: "both", cli: (INSIDE[0], "a"), srv: (INSIDE[1], "a"), to: Where::Loopback },
    Case { evidence: "origin", direction: "both", cli: (INSIDE[0], "a"), srv: (INSIDE[1], "b"), to: Where::Net("b") },
    Case {
        evidence: "address",
        direction: "egress",
        cli: (INSIDE[0], "a"),
        srv: ("outside/srv", "b"),
        to: Where::Net("b"),
    },
    Case {
        evidence: "address",
        direction: "ingress",
        cli: ("outside/cli", "a"),
        srv: (INSIDE[1], "b"),
        to: Where::Net("b"),
    },
    Case {
        evidence: "prefix",
        direction: "egress",
        cli: (INSIDE[0], "a"),
        srv: ("outside/srv", "b"),
        to: Where::Net("b"),
    },
    Case {
        evidence: "prefix",
        direction: "ingress",
        cli: ("outside/cli", "a"),
        srv: (INSIDE[1], "b"),
        to: Where::Net("b"),
    },
];

/// The base port of a kind; below every ephemeral range.
fn base(index: usize) -> u16 {
    2000 + 10 * u16::try_from(index).unwrap_or(0)
}

pub(super) fn groups() -> Vec<Group> {
    let mut groups = Vec::new();
    for case in CASES {
        for family in [Family::V4, Family::V6, Family::Mapped] {
            groups.push(group(case, family));
        }
    }
    groups
}

fn group(case: &Case, family: Family) -> Group {
    let mut rows = Vec::new();
    for (i, kind) in KINDS.iter().enumerate() {
        for proto in [Proto::Tcp, Proto::UdpConnected, Proto::Udp] {
            rows.push(row(case, family, kind, proto, base(i)));
        }
    }
    Group {
        name: format!("matrix-{}-{}-{}", case.evidence, case.direction, family_word(family)),
        nets: vec![net("a"), net("b")],
        actors: vec![("cli", case.cli.0, case.cli.1), ("srv", case.srv.0, case.srv.1)],
        policy: policy(case),
        agent_args: Vec::new(),
        sysctls: Vec::new(),
        rows,
    }
}

fn family_word(family: Family) -> &'static str {
    match family {
        Family::V4 => "v4",
        Family::V6 => "v6",
        Family::Mapped => "mapped",
        Family::None => "none",
    }
}

fn row(case: &Case, family: Family, kind: &Kind, proto: Proto, base: u16) -> Row {
    let closed = match case.direction {
        "egress" => Expect::Eperm,
        "ingress" => Expect::Silent,
        _ => Expect::Closed,
    };
    let expect = match kind.result {
        Result::Open => Expect::Open,
        Result::Closed => closed,
        // A refusal of a datagram may have no word.
        Result::Reject if proto == Proto::Tcp => Expect::Reject,
        Result::Reject => Expect::Closed,
    };
    let probe = Probe::Flow { ends: ENDS, proto, to: case.to };
    let tried = if kind.name == "other-protocol" && proto != Proto::Tcp { 1 } else { kind.tried };
    Row {
        family,
        proto: proto.word(),
        direction: case.direction,
        evidence: case.evidence,
        mode: if kind.name.starts_with("monitor") { "monitor-policy" } else { "enforce" },
        rule: kind.by.map(|by| format!("{}-{by}", kind.name)),
        ..Row::new(kind.name, base + tried, probe, expect)
    }
}

fn policy(case: &Case) -> String {
    let mut yaml = Yaml::default();
    for (i, (name, place)) in [("cli", case.cli.0), ("srv", case.srv.0)].into_iter().enumerate() {
        if place.starts_with("managed/") {
            yaml.enforced(name, &[]);
        } else if case.evidence == "prefix" {
            yaml.segment(name, "addresses: [10.80.0.0/24, fd00:80::/64]", &[]);
        } else {
            yaml.segment(name, &addresses(u8::try_from(i).unwrap_or(0)), &[]);
        }
    }
    for (i, kind) in KINDS.iter().enumerate() {
        let base = base(i);
        let range = |proto: &str| match (base + kind.first, base + kind.last) {
            (a, b) if a == b => format!("{proto}/{a}"),
            (a, b) => format!("{proto}/{a}-{b}"),
        };
        let both = format!("ports: [{}, {}]", range("tcp"), range("udp"));
        for (n, (order, text)) in kind.policies.iter().enumerate() {
            let name = format!("{}-{n}", kind.name);
            let text = text.replace("@CLOSED@", &schedule(false)).replace("@OPEN@", &schedule(true));
            if let Some(action) = text.strip_suffix(", @ANY@") {
                yaml.rule(&name, *order, "any", "any", &format!("{both}, {action}"));
            } else if let Some(action) = text.strip_suffix(", @OTHER@") {
                // Each port is open for the protocol that is not tried there.
                let ports = format!("ports: [udp/{base}, tcp/{}]", base + 1);
                yaml.rule(&name, *order, "cli", "srv", &format!("{ports}, {action}"));
            } else if let Some(action) = text.strip_suffix(", ports: @MIDDLE@") {
                let middle = base + kind.tried;
                let ports = format!("ports: [tcp/{middle}, udp/{middle}]");
                yaml.rule(&name, *order, "cli", "srv", &format!("{ports}, {action}"));
            } else {
                yaml.rule(&name, *order, "cli", "srv", &format!("{both}, {text}"));
            }
        }
    }
    yaml.0
}
