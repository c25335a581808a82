//! Random policies, for the property tests here and for those that ask the kernel the same questions.
#![allow(clippy::unwrap_used, reason = "only tests call it")]

use super::super::host_policy::Segment;
use super::testing::{clock, segment};
use super::*;

/// splitmix64: small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    pub fn pick<'t, T>(&mut self, from: &'t [T]) -> &'t T {
        &from[self.below(from.len())]
    }
}

/// A policy, and who is known on this host and elsewhere.
#[derive(Clone, Debug)]
pub struct World {
    pub policy: HostPolicy,
    pub local: Vec<Labels>,
    pub remote: Vec<Labels>,
}

const NETS: [&str; 16] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "10.1.2.99/24",
    "192.0.2.0/25",
    "192.0.2.128/25",
    "::/0",
    "2001:db8::/32",
    "2001:db8:1::/48",
    "2001:db8:1::7/128",
    "::ffff:10.1.0.0/112",
    "::ffff:0:0/96",
    "::/64",
    "::ffff:0:0/90",
];
/// Addresses in and around the prefixes of these policies.
pub const ADDRESSES: [&str; 14] = [
    "10.1.2.3",
    "10.1.2.4",
    "10.1.3.4",
    "10.9.9.9",
    "192.0.2.1",
    "192.0.2.200",
    "8.8.8.8",
    "2001:db8:1::7",
    "2001:db8:1::8",
    "2001:db8:2::1",
    "2a00::1",
    "::5",
    "::ffff:8.8.8.8",
    "::fffe:0:1",
];
const PORTS: [(u16, u16); 12] = [
    (80, 80),
    (443, 443),
    (80, 443),
    (1, 1023),
    (0, 65_535),
    (1, 65_535),
    (0, 0),
    (5432, 5432),
    (6000, 6010),
    (2048, 2303),
    (65_535, 65_535),
    (443, 6005),
];
/// Ports in and around the ranges of these policies.
pub const PROBES: [u16; 16] = [0, 1, 79, 80, 81, 442, 443, 444, 1023, 1024, 2048, 2303, 5432, 6005, 6006, 65_535];

impl World {
    pub fn new(rng: &mut Rng) -> Self {
        let mut sets = Vec::new();
        for app in ["web", "db", "cache", ""] {
            for env in ["prod", "dev", ""] {
                let mut set = Labels::new();
                for (key, value) in [("app", app), ("env", env)] {
                    if !value.is_empty() {
                        set.insert(key.into(), value.into());
                    }
                }
                if rng.one_in(6) {
                    set.insert("legacy".into(), "1".into());
                }
                sets.push(set);
            }
        }
        let (mut local, mut remote) = (Vec::new(), Vec::new());
        for set in sets {
            match rng.below(4) {
                0 => local.push(set),
                1 => remote.push(set),
                2 => {
                    local.push(set.clone());
                    remote.push(set);
                }
                _ => (),
            }
        }
        let mut policy = HostPolicy::default();
        for i in 0..1 + rng.below(4) {
            let name = format!("s{i}");
            let members = if rng.one_in(4) { Members::Addresses(nets(rng)) } else { Members::Workloads(selector(rng)) };
            policy.segments.push(Segment {
                members,
                default_ingress_allow: rng.one_in(3),
                default_egress_allow: rng.one_in(2),
                monitor: rng.one_in(6),
                unresolved_allow: rng.one_in(3),
                on_revoke: *rng.pick(&[OnRevoke::Cut, OnRevoke::Cut, OnRevoke::Drain(7_000_000_000), OnRevoke::Keep]),
                tcp_only: false,
                grants: *rng.pick(&[0, 0, LocalEntry::GRANT_PING, LocalEntry::GRANT_RAW | LocalEntry::GRANT_SCTP]),
                ..segment(&name, "")
            });
        }
        let most = if rng.one_in(4) { 30 } else { 9 };
        for i in 0..rng.below(most) {
            let rule = random_rule(rng, &policy, i as u32);
            policy.rules.push(rule);
        }
        policy.rules.sort_by_key(|r| (r.tier, r.priority, r.action.rank(), r.index));
        Self { policy, local, remote }
    }

    pub fn compile(&self) -> (Tables, Numbers) {
        let mut numbers = Numbers::default();
        let tables = compile(&self.policy, &self.local, &self.remote, &mut numbers, clock()).unwrap();
        (tables, numbers)
    }
}

fn nets(rng: &mut Rng) -> Vec<IpNet> {
    (0..1 + rng.below(3)).map(|_| rng.pick(&NETS).parse().unwrap()).collect()
}

fn selector(rng: &mut Rng) -> Selector {
    let requirement = |rng: &mut Rng| {
        let key = (*rng.pick(&["app", "env", "legacy"])).to_owned();
        let values =
            (0..1 + rng.below(2)).map(|_| (*rng.pick(&["web", "db", "cache", "prod", "dev"])).to_owned()).collect();
        match rng.below(6) {
            0..=2 => Requirement::In { key, values },
            3 => Requirement::NotIn { key, values },
            4 => Requirement::Exists { key },
            _ => Requirement::NotExists { key },
        }
    };
    Selector((0..1 + rng.below(2)).map(|_| requirement(rng)).collect())
}

pub fn random_rule(rng: &mut Rng, policy: &HostPolicy, index: u32) -> Rule {
    let peers = |rng: &mut Rng| {
        (0..1 + rng.below(2))
            .map(|_| match rng.below(9) {
                0 if rng.one_in(2) => PeerSpec::Any,
                0..=3 => PeerSpec::Segment(rng.below(policy.segments.len())),
                4 => PeerSpec::Select(selector(rng)),
                5 => PeerSpec::Addresses(nets(rng)),
                6 => PeerSpec::Any,
                7 => PeerSpec::World,
                _ if rng.one_in(2) => PeerSpec::Host,
                _ => PeerSpec::Unresolved,
            })
            .collect::<Vec<_>>()
    };
    let protos = [Proto::Tcp, Proto::Tcp, Proto::Tcp, Proto::Udp, Proto::Icmp, Proto::Icmpv6, Proto::Sctp, Proto::Dccp];
    let count = rng.below(4) * rng.below(2);
    let ports = (0..count)
        .map(|_| {
            let (first, last) = *rng.pick(&PORTS);
            PortSpec { proto: *rng.pick(&protos), first, last }
        })
        .collect();
    type Windows = [(u8, u32, u32)];
    let schedules: [(&str, &Windows); 4] = [
        ("Europe/Amsterdam", &[(1, 36_000, 39_600), (2, 0, 86_400)]),
        ("UTC", &[(1, 33_000, 43_200), (3, 100, 200)]),
        ("America/New_York", &[(7, 0, 86_400), (1, 0, 21_600)]),
        (
            "Asia/Tokyo",
            &[
                (1, 0, 86_400),
                (2, 0, 86_400),
                (3, 0, 86_400),
                (4, 0, 86_400),
                (5, 0, 86_400),
                (6, 0, 86_400),
                (7, 0, 86_400),
            ],
        ),
    ];
    let schedule = rng.one_in(6).then(|| {
        let (zone, windows) = *rng.pick(&schedules);
        Schedule { text: zone.into(), zone: jiff::tz::TimeZone::get(zone).unwrap(), windows: windows.to_vec() }
    });
    let tiers = [Tier::Emergency, Tier::Security, Tier::Platform, Tier::Application, Tier::Baseline];
    let mut expiries = vec![None; 12];
    let times = ["2026-11-02T08:00:00Z", "2026-11-02T09:00:00Z", "2026-11-02T09:20:00Z", "2026-11-03T00:00:00Z"];
    expiries.extend(times.map(|t| Some(t.parse::<Timestamp>().unwrap())));
    Rule {
        policy: "p".into(),
        name: format!("r{index}").into(),
        tier: *rng.pick(&tiers[..1 + (index as usize % 5)]),
        priority: rng.below(2) as u16,
        index,
        from: peers(rng),
        to: peers(rng),
        ports,
        action: *rng.pick(&[
            RuleAction::Allow,
            RuleAction::Allow,
            RuleAction::Deny,
            RuleAction::Reject,
            RuleAction::Pass,
        ]),
        monitor: rng.one_in(5),
        require: if rng.one_in(6) { Evidence::Origin } else { Evidence::None },
        expires: *rng.pick(&expiries),
        schedule,
        log: !rng.one_in(5),
        at: Position::default(),
    }
}
