use super::super::oracle::{self, Case, Who};
use super::super::tables::TablesView;
use super::random::{ADDRESSES, PROBES, Rng, World};
use super::testing::{BOOT, WALL, clock, labels, policy, port, segment};
use super::*;
use segfw_common::decide::{Decision, Flow, Peer};
use segfw_common::{Verdict, control, decide};

fn compiled(policy: &HostPolicy, local: &[&str], remote: &[&str]) -> (Tables, Numbers) {
    let sets = |texts: &[&str]| texts.iter().map(|t| labels(t)).collect::<Vec<_>>();
    let mut numbers = Numbers::default();
    let tables = compile(policy, &sets(local), &sets(remote), &mut numbers, clock()).unwrap();
    (tables, numbers)
}

fn identity(tables: &Tables, numbers: &Numbers, who: &Who) -> Identity {
    match who {
        Who::Labels(labels) => {
            // A set that the tables do not know is an identity newer than they are.
            let text = super::super::tables::canonical(labels);
            numbers.identities.get(&text).map_or(Identity(4_000_000), |n| Identity(*n))
        }
        Who::Address(ip) => tables.longest_prefix(&(*ip).into()).unwrap_or(Identity::WORLD),
        Who::Host => Identity::HOST,
        Who::Kernel => Identity::KERNEL,
        Who::Unresolved => Identity::UNRESOLVED,
    }
}

fn ask(tables: &Tables, numbers: &Numbers, case: &Case, evidence: Evidence, host_flags: u64) -> Decision {
    let far = Addr::v4([198, 51, 100, 7]);
    let (local_port, remote_port) = match case.direction {
        Direction::Ingress => (case.port, 40_000),
        Direction::Egress => (40_000, case.port),
    };
    let flow = Flow {
        direction: case.direction,
        protocol: crate::policy::explain::protocol(case.proto, case.port),
        local: identity(tables, numbers, &case.local),
        workload: 0,
        netns: 1,
        local_addr: far,
        remote_addr: far,
        local_port,
        remote_port,
    };
    let peer = Peer { identity: identity(tables, numbers, &case.peer), workload: 0, evidence };
    let now = clock().boot(case.at.as_nanosecond());
    decide(&TablesView { tables, now, host_flags }, &flow, &peer)
}

fn case(local: &str, direction: Direction, peer: Who, port_text: &str) -> Case {
    let p = port(port_text);
    Case { local: Who::Labels(labels(local)), direction, peer, proto: p.proto, port: p.first, at: clock().wall }
}

fn who(text: &str) -> Who {
    Who::Labels(labels(text))
}

// ----------------------------------------------------------------------------------------------------------- examples

#[test]
fn one_rule_two_ends() {
    let policy = policy(&["allow web -> db tcp/5432"]);
    let (tables, numbers) = compiled(&policy, &["app=db"], &["app=web", "app=other"]);
    let verdict = |peer: &str, port: &str| {
        ask(&tables, &numbers, &case("app=db", Direction::Ingress, who(peer), port), Evidence::Origin, 0)
    };
    assert_eq!((verdict("app=web", "tcp/5432").verdict, verdict("app=web", "tcp/5432").rule), (Verdict::Allowed, 1));
    assert_eq!(verdict("app=web", "tcp/5433").reason, Reason::SegmentDefault);
    assert_eq!(verdict("app=other", "tcp/5432").verdict, Verdict::Denied);
    // One entry for the pair; the rest is the unresolved peer's default, by protocol and direction.
    assert_eq!(tables.rules.len() - 16, 1);
    assert_eq!(tables.rule_names[&1].entries, 1);
}

#[test]
fn the_two_families_stay_apart() {
    let policy =
        policy(&["allow ::/0 -> db tcp/1", "allow ::ffff:10.0.0.0/104 -> db tcp/2", "allow 2001:db8::/32 -> db tcp/3"]);
    let (tables, numbers) = compiled(&policy, &["app=db"], &[]);
    let allowed = |ip: &str, port: &str| {
        let c = case("app=db", Direction::Ingress, Who::Address(ip.parse().unwrap()), port);
        ask(&tables, &numbers, &c, Evidence::Prefix, 0).verdict == Verdict::Allowed
    };
    assert!(allowed("2001:db8::1", "tcp/1") && allowed("2001:db8::1", "tcp/3") && allowed("9::1", "tcp/1"));
    assert!(!allowed("9::1", "tcp/3") && !allowed("192.0.2.1", "tcp/1") && !allowed("10.1.2.3", "tcp/1"));
    assert!(allowed("10.1.2.3", "tcp/2"));
    assert_eq!(tables.longest_prefix(&"192.0.2.1".parse().unwrap()), Some(Identity::WORLD));
}

#[test]
fn time_is_held_by_the_tables() {
    let mut policy = policy(&["allow web -> db tcp/1 until=2026-11-02T10:00:00Z", "allow web -> db tcp/2"]);
    policy.rules[1].schedule = Some(Schedule {
        text: "Mon 08:00-18:00 UTC".into(),
        zone: jiff::tz::TimeZone::UTC,
        windows: vec![(1, 8 * 3600, 18 * 3600)],
    });
    let (tables, numbers) = compiled(&policy, &["app=db"], &["app=web"]);
    let at = |port: &str, t: &str| {
        let c = Case { at: t.parse().unwrap(), ..case("app=db", Direction::Ingress, who("app=web"), port) };
        let d = ask(&tables, &numbers, &c, Evidence::Origin, 0);
        (d.verdict, d.reason, d.rule)
    };
    assert_eq!(at("tcp/1", "2026-11-02T09:59:59Z"), (Verdict::Allowed, Reason::Rule, 1));
    assert_eq!(at("tcp/1", "2026-11-02T10:00:00Z"), (Verdict::Denied, Reason::Expired, 1));
    assert_eq!(at("tcp/2", "2026-11-02T17:59:59Z"), (Verdict::Allowed, Reason::Rule, 2));
    assert_eq!(at("tcp/2", "2026-11-02T18:00:00Z"), (Verdict::Denied, Reason::OutOfSchedule, 2));
    assert_eq!(at("tcp/2", "2026-11-09T08:00:00Z"), (Verdict::Allowed, Reason::Rule, 2));
    // Beyond the horizon: closed for good, and the agent is told in time.
    assert_eq!(at("tcp/2", "2027-11-01T09:00:00Z"), (Verdict::Denied, Reason::OutOfSchedule, 2));
    let refresh = tables.refresh_at.unwrap();
    assert!(
        refresh > BOOT && refresh < clock().boot("2027-01-01T00:00:00Z".parse::<Timestamp>().unwrap().as_nanosecond())
    );
    assert!(tables.timeline.len() <= 2 + bounds::TIMELINE_HOPS as usize);
}

#[test]
fn a_limited_deny_stays_beyond_the_horizon() {
    let mut policy = policy(&["deny web -> db", "allow web -> db"]);
    policy.rules[0].schedule = Some(Schedule {
        text: "s".into(),
        zone: jiff::tz::TimeZone::UTC,
        windows: (1..=7).map(|d| (d, 60, 120)).collect(),
    });
    let (tables, numbers) = compiled(&policy, &["app=db"], &["app=web"]);
    let base = case("app=db", Direction::Ingress, who("app=web"), "tcp/1");
    let at =
        |t: &str| ask(&tables, &numbers, &Case { at: t.parse().unwrap(), ..base.clone() }, Evidence::Origin, 0).verdict;
    assert_eq!(at(WALL), Verdict::Allowed);
    assert_eq!(at("2026-11-03T00:01:30Z"), Verdict::Denied);
    assert_eq!(at("2030-01-01T12:00:00Z"), Verdict::Denied);
}

/// More changes than the kernel walks: exact up to the horizon, refused after it, and the agent is told before it.
#[test]
fn a_timeline_that_is_too_long_ends_strictly() {
    let start: Timestamp = WALL.parse().unwrap();
    let after = |minutes: i64| start + jiff::SignedDuration::from_mins(minutes);
    // Minute by minute: deny, allow, deny, allow ...
    let texts: Vec<String> = (0..40)
        .map(|i| format!("{} web -> db tcp/1 until={}", ["deny", "allow"][i % 2], after(i as i64 + 1)))
        .chain(["allow web -> db".into()])
        .collect();
    let policy = policy(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let (tables, numbers) = compiled(&policy, &["app=db"], &["app=web"]);
    let base = case("app=db", Direction::Ingress, who("app=web"), "tcp/1");
    let parts = bounds::TIMELINE_HOPS as i64;
    for minute in 0..60 {
        let case = Case { at: after(minute), ..base.clone() };
        let d = ask(&tables, &numbers, &case, Evidence::Origin, 0);
        if minute < parts - 1 {
            let want = expected(&policy, &numbers, &case, Evidence::Origin, false);
            assert_eq!(Decision { until: 0, drain_ns: 0, ..d }, want, "minute {minute}");
        } else {
            // The limited denies stay; the last allow, which has no limit, comes after them.
            assert_eq!((d.verdict, d.until), (Verdict::Denied, 0), "minute {minute}");
        }
    }
    assert_eq!(tables.timeline.len() as i64, parts - 1);
    assert!(tables.refresh_at.unwrap() < clock().boot(after(parts - 1).as_nanosecond()));
}

#[test]
fn a_demand_is_made_at_ingress_only() {
    let policy = policy(&["allow web -> db require=origin quiet"]);
    let (tables, _) = compiled(&policy, &["app=db", "app=web"], &[]);
    let by_rule: Vec<_> = tables.rules.iter().filter(|(_, e)| e.rule == 1).collect();
    assert_eq!(by_rule.len(), 16);
    for (key, entry) in by_rule {
        let demand = if key.direction == Direction::Ingress as u8 { RuleEntry::demand(Evidence::Origin) } else { 0 };
        assert_eq!(entry.flags, demand | RuleEntry::NO_LOG);
    }
}

#[test]
fn segments_combine_strictly() {
    let mut policy = policy(&["allow db -> any icmp/2048-2303", "allow any -> db sctp/9", "allow any -> db"]);
    policy.segments.push(segment("all-db", "app=db"));
    policy.segments[1].default_ingress_allow = true;
    policy.segments[1].monitor = true;
    policy.segments[1].on_revoke = OnRevoke::Keep;
    policy.segments[2].on_revoke = OnRevoke::Drain(7);
    policy.segments[2].grants = LocalEntry::GRANT_MPTCP;
    let (tables, numbers) = compiled(&policy, &["app=db", "app=none"], &[]);
    let db = tables.locals[&Identity(numbers.identities["app=db"])];
    assert_eq!(db.default, [Action::Deny as u8, Action::Allow as u8]);
    assert_eq!(db.flags & LocalEntry::MONITOR, 0);
    assert_eq!(db.drain_ns, 7);
    assert_eq!(db.grants, LocalEntry::GRANT_MPTCP | LocalEntry::GRANT_PING | LocalEntry::GRANT_SCTP);
    assert_eq!(tables.locals[&Identity(numbers.identities["app=none"])].flags, LocalEntry::OPEN);
    assert_eq!(tables.locals[&Identity::UNRESOLVED].default_reason, Reason::UnresolvedLocal as u8);
}

#[test]
fn ports_that_no_rule_tells_apart_share_a_class() {
    let policy = policy(&["allow web -> db tcp/1-10 tcp/80", "deny any -> db tcp/5", "allow web -> db tcp/0-65535"]);
    let (tables, _) = compiled(&policy, &["app=db"], &["app=web"]);
    let tcp = &tables.classes[Proto::Tcp as usize];
    assert_eq!((tcp[0], tcp[11], tcp[65_535]), (0, 0, 0));
    assert_eq!((tcp[1], tcp[10], tcp[80]), (1, 1, 1));
    assert_eq!(tcp[5], 5);
    assert!(tables.classes[Proto::Udp as usize].iter().all(|c| *c == 0));
}

#[test]
fn too_many_classes_is_a_problem() {
    let texts: Vec<String> = (0..=u16::MAX).map(|p| format!("allow web -> db tcp/{p}")).collect();
    let policy = policy(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let problems = compile(&policy, &[labels("app=db")], &[], &mut Numbers::default(), clock()).unwrap_err();
    assert_eq!(problems[0].to_string(), "tcp ports fall into 65536 classes, the limit is 65534");
}

#[test]
fn capacity_is_counted_exactly() {
    let mut policy = policy(&["allow web -> db tcp/1"]);
    policy.segments = vec![segment("web", "web=y"), segment("db", "db=y")];
    let local: Vec<_> = (0..40).map(|i| labels(&format!("db=y,i={i}"))).collect();
    let remote: Vec<_> = (0..30_000).map(|i| labels(&format!("web=y,i={i}"))).collect();
    let problems = compile(&policy, &local, &remote, &mut Numbers::default(), clock()).unwrap_err();
    assert_eq!(
        problems[0].to_string(),
        "rule p/r0 (web.yaml:1:5) needs 1200000 of 1048576 rule entries; the policy needs 1200640 of 1048576 rule entries"
    );
}

#[test]
fn equal_input_gives_equal_tables() {
    let mut rng = Rng(11);
    for _ in 0..50 {
        let world = World::new(&mut rng);
        let a = world.compile();
        let b = world.compile();
        assert_eq!(a.0.digest(), b.0.digest());
        assert_eq!(a.0.rules, b.0.rules);
        let copy = Tables {
            rules: a.0.rules.clone(),
            timeline: a.0.timeline.clone(),
            locals: a.0.locals.clone(),
            prefixes: a.0.prefixes.clone(),
            classes: a.0.classes.clone(),
            ..Tables::default()
        };
        assert_eq!(copy.digest(), a.0.digest());
    }
}

// --------------------------------------------------------------------------------- the compiler against the oracle

fn random_case(rng: &mut Rng, world: &World) -> Case {
    let labels = |rng: &mut Rng, world: &World| {
        let n = rng.below(world.local.len() + world.remote.len() + 1);
        let known = world.local.get(n).or_else(|| world.remote.get(n - world.local.len())).cloned();
        // Or a set that no rule can have seen: matched by `any` alone.
        known.map_or(Who::Kernel, Who::Labels)
    };
    let in_segment = |labels: &&Labels| {
        world.policy.segments.iter().any(|s| match &s.members {
            Members::Workloads(selector) => selector.matches(labels),
            Members::Addresses(_) => false,
        })
    };
    let enforced: Vec<&Labels> = world.local.iter().filter(in_segment).collect();
    let local = match rng.below(12) {
        0 => Who::Unresolved,
        1 if !world.local.is_empty() => Who::Labels(rng.pick(&world.local).clone()),
        _ if enforced.is_empty() => Who::Unresolved,
        _ => Who::Labels((*rng.pick(&enforced)).clone()),
    };
    let peer = match rng.below(9) {
        0..=3 => labels(rng, world),
        4..=6 => Who::Address(rng.pick(&ADDRESSES).parse().unwrap()),
        7 if rng.one_in(2) => Who::Host,
        7 => Who::Kernel,
        _ => Who::Unresolved,
    };
    let proto = if rng.one_in(2) { Proto::Tcp } else { *rng.pick(&Proto::ALL) };
    let port = match (proto == Proto::Other, rng.one_in(4)) {
        (true, _) => *rng.pick(&[2, 47, 50, 89, 103]),
        (false, true) => rng.word() as u16,
        (false, false) => *rng.pick(&PROBES),
    };
    let times = [
        WALL,
        WALL,
        "2026-11-02T09:00:01Z",
        "2026-11-02T09:19:59.999999999Z",
        "2026-11-02T09:20:00Z",
        "2026-11-02T10:00:00Z",
        "2026-11-02T11:30:00Z",
        "2026-11-02T12:00:00Z",
        "2026-11-03T00:00:00Z",
        "2026-11-04T00:02:00Z",
        "2026-11-08T05:00:00Z",
        "2026-11-09T09:30:00Z",
    ];
    let direction = *rng.pick(&[Direction::Ingress, Direction::Egress]);
    Case { local, direction, peer, proto, port, at: rng.pick(&times).parse().unwrap() }
}

/// What `decide` must say, from what the oracle says.
fn expected(policy: &HostPolicy, numbers: &Numbers, case: &Case, evidence: Evidence, host_monitor: bool) -> Decision {
    let Some(m) = oracle::meaning(policy, case) else {
        return Decision::plain(Verdict::Allowed, Reason::NoSegment);
    };
    let number = |rule: Option<usize>| rule.map_or(0, |i| numbers.rules[&format!("p/{}", policy.rules[i].name)]);
    let lacking = m.action == Action::Allow && evidence < m.require;
    let (action, reason) = if lacking { (Action::Deny, Reason::NotAuthenticated) } else { (m.action, m.reason) };
    let refused = action != Action::Allow;
    let shadow_refused = m.pending.is_some_and(|p| p.0 != Action::Allow);
    let verdict = match (refused, m.monitor || host_monitor, shadow_refused) {
        (true, false, _) => Verdict::Denied,
        (true, true, _) | (false, _, true) => Verdict::Audit,
        (false, _, false) => Verdict::Allowed,
    };
    Decision {
        reject: action == Action::Reject,
        quiet: m.quiet && !refused,
        rule: number(m.rule),
        pending: m.pending.map_or(0, |p| p.0 as u8),
        pending_rule: m.pending.map_or(0, |p| number(p.1)),
        ..Decision::plain(verdict, reason)
    }
}

fn differs(
    policy: &HostPolicy,
    world: &World,
    case: &Case,
    evidence: Evidence,
    flags: u64,
) -> Option<(Decision, Decision)> {
    let mut numbers = Numbers::default();
    let tables = compile(policy, &world.local, &world.remote, &mut numbers, clock()).unwrap();
    mismatch(policy, &tables, &numbers, case, evidence, flags)
}

fn mismatch(
    policy: &HostPolicy,
    tables: &Tables,
    numbers: &Numbers,
    case: &Case,
    evidence: Evidence,
    flags: u64,
) -> Option<(Decision, Decision)> {
    if tables.refresh_at.is_some_and(|r| clock().boot(case.at.as_nanosecond()) >= r) {
        return None;
    }
    let got = ask(tables, numbers, case, evidence, flags);
    let want = expected(policy, numbers, case, evidence, flags & control::HOST_MONITOR != 0);
    (Decision { until: 0, drain_ns: 0, ..got } != want).then_some((got, want))
}

#[test]
fn the_tables_say_what_the_rules_mean() {
    let runs: u64 = std::env::var("SEGFW_POLICIES").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    let seed: u64 = std::env::var("SEGFW_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(20_261_102);
    let (mut asked, mut judged, mut timed) = (0u64, [0u64; 3], 0);
    for run in 0..runs {
        let mut rng = Rng(seed.wrapping_add(run << 20));
        let world = World::new(&mut rng);
        let (tables, numbers) = world.compile();
        timed += u64::from(!tables.timeline.is_empty());
        for _ in 0..150 {
            let case = random_case(&mut rng, &world);
            let evidence = *rng.pick(&[Evidence::None, Evidence::Address, Evidence::Origin]);
            let flags = if rng.one_in(10) { control::HOST_MONITOR } else { 0 };
            asked += 1;
            let d = ask(&tables, &numbers, &case, evidence, flags);
            judged[d.verdict as usize - 1] += u64::from(d.reason == Reason::Rule);
            if mismatch(&world.policy, &tables, &numbers, &case, evidence, flags).is_none() {
                continue;
            }
            // Drop rules one by one as long as the two still differ.
            let mut policy = world.policy.clone();
            let mut i = 0;
            while i < policy.rules.len() {
                let mut less = policy.clone();
                let _ = less.rules.remove(i);
                if differs(&less, &world, &case, evidence, flags).is_some() {
                    policy = less;
                } else {
                    i += 1;
                }
            }
            let (got, want) = differs(&policy, &world, &case, evidence, flags).unwrap();
            panic!(
                "run {run}\n{:#?}\n{:#?}\nlocal {:?}\nremote {:?}\n{case:?} {evidence:?}\ngot  {got:?}\nwant {want:?}",
                policy.segments, policy.rules, world.local, world.remote
            );
        }
    }
    println!("{asked} flows, {judged:?} decided by a rule, {timed} policies with a timeline");
    assert!(asked < 10_000 || judged.iter().all(|n| *n > 100));
}

// --------------------------------------------------------------------------------------------------------- entry count

/// No entry may be left out, and none is superfluous: without it the answer to its own key would be another.
#[test]
fn every_entry_says_something_new() {
    for run in 0..200 {
        let mut rng = Rng(run << 32);
        let world = World::new(&mut rng);
        let (tables, _) = world.compile();
        for (key, entry) in &tables.rules {
            let local = tables.locals[&key.local];
            let fall = fall_through(&tables, &local, key);
            assert_ne!(fall, *entry, "run {run} {key:?}");
        }
    }
}

fn fall_through(tables: &Tables, local: &LocalEntry, key: &RuleKey) -> RuleEntry {
    let (any, class) = (Identity::ANY, CLASS_ANY);
    let keys = [RuleKey { class, ..*key }, RuleKey { remote: any, ..*key }, RuleKey { remote: any, class, ..*key }];
    let less: Vec<RuleKey> = match (key.remote == any, key.class == class) {
        (false, false) => keys.to_vec(),
        (true, false) | (false, true) => keys[2..].to_vec(),
        (true, true) => vec![],
    };
    let found = less.iter().find_map(|k| tables.rules.get(k).copied());
    found.unwrap_or(RuleEntry {
        until: 0,
        rule: 0,
        pending_rule: 0,
        next: 0,
        action: local.default[key.direction as usize],
        reason: local.default_reason,
        pending: 0,
        flags: 0,
    })
}

// --------------------------------------------------------------------------------------------------------------- speed

/// `cargo test --release -p segfw compile_times -- --ignored --nocapture`
#[test]
#[ignore = "prints times"]
fn compile_times() {
    for (rules, apps, locals, remotes) in [
        (1_000, 100, 20, 2_000),
        (10_000, 1_000, 100, 20_000),
        (100_000, 5_000, 100, 60_000),
        (100_000, 100, 100, 300),
        (100_000, 100, 100, 1_000),
    ] {
        let mut rng = Rng(1);
        let mut policy = HostPolicy::default();
        for app in 0..apps {
            policy.segments.push(segment(&format!("s{app}"), &format!("app=a{app}")));
        }
        for i in 0..rules {
            let text = format!(
                "{} s{} -> s{} tcp/{}",
                rng.pick(&["allow", "allow", "allow", "deny"]),
                rng.below(apps),
                rng.below(apps),
                1 + rng.below(500)
            );
            rule_fast(&mut policy, &text, i);
        }
        let sets = |n: usize, from: usize| {
            (from..from + n).map(|i| labels(&format!("app=a{},i={i}", i % apps))).collect::<Vec<_>>()
        };
        let (local, remote) = (sets(locals, 0), sets(remotes, 1_000_000));
        let mut numbers = Numbers::default();
        let start = std::time::Instant::now();
        let result = compile(&policy, &local, &remote, &mut numbers, clock());
        let took = start.elapsed();
        let start = std::time::Instant::now();
        match result {
            Ok(tables) => {
                let digest = tables.digest();
                println!(
                    "{rules} rules, {apps} segments, {locals} local, {remotes} remote: {took:?}, {} entries, digest {:?} {:02x}",
                    tables.rules.len(),
                    start.elapsed(),
                    digest[0]
                );
            }
            Err(problems) => println!("{rules} rules, {apps} segments: {took:?}, refused: {}", problems[0]),
        }
    }
}

/// Rules with inline selectors, addresses, `any`, schedules: what indexes badly.
#[test]
#[ignore = "prints times"]
fn compile_times_of_odd_policies() {
    let sets = |n: usize, from: usize| -> Vec<Labels> {
        (from..from + n).map(|i| labels(&format!("app=a{},env=e{},i={i}", i % 1000, i % 3))).collect()
    };
    let (local, remote) = (sets(100, 0), sets(60_000, 1_000_000));
    for kind in ["select", "address", "any", "no ports", "schedule"] {
        let mut rng = Rng(3);
        let mut policy = HostPolicy::default();
        for app in 0..1000 {
            policy.segments.push(segment(&format!("s{app}"), &format!("app=a{app}")));
        }
        for i in 0..100_000 {
            rule_fast(&mut policy, &format!("allow s0 -> s{} tcp/{}", rng.below(1000), 1 + rng.below(500)), i);
            let rule = policy.rules.last_mut().unwrap();
            let requirement = |key: &str, value: String| Requirement::In { key: key.into(), values: vec![value] };
            rule.from = match kind {
                "select" => vec![PeerSpec::Select(Selector(vec![
                    requirement("env", format!("e{}", rng.below(3))),
                    requirement("i", format!("{}", 1_000_000 + rng.below(60_000))),
                ]))],
                "address" => vec![PeerSpec::Addresses(vec![
                    format!("10.{}.{}.{}/{}", i >> 16, i >> 8 & 255, i & 255, 20 + rng.below(13)).parse().unwrap(),
                ])],
                "any" => vec![PeerSpec::Any],
                _ => vec![PeerSpec::Segment(rng.below(1000))],
            };
            if kind == "no ports" {
                rule.ports.clear();
            }
            if kind == "schedule" {
                rule.schedule = Some(Schedule {
                    text: format!("{}", i % 50),
                    zone: jiff::tz::TimeZone::UTC,
                    windows: vec![(1, 60 * (i as u32 % 50), 80_000), (3, 100, 200)],
                });
            }
        }
        let start = std::time::Instant::now();
        let result = compile(&policy, &local, &remote, &mut Numbers::default(), clock());
        let took = start.elapsed();
        match result {
            Ok(t) => println!(
                "{kind}: {took:?}, {} entries, {} parts, {} prefixes",
                t.rules.len(),
                t.timeline.len(),
                t.prefixes.len()
            ),
            Err(problems) => println!("{kind}: {took:?}, refused: {problems:?}"),
        }
    }
}

/// As `rule`, for segments named `s<index>`.
fn rule_fast(policy: &mut HostPolicy, text: &str, i: usize) {
    let mut words = text.split_whitespace();
    let (action, from, _, to, p) = (
        words.next().unwrap(),
        words.next().unwrap(),
        words.next().unwrap(),
        words.next().unwrap(),
        words.next().unwrap(),
    );
    let index = |s: &str| PeerSpec::Segment(s[1..].parse().unwrap());
    policy.rules.push(Rule {
        policy: "p".into(),
        name: format!("r{i}").into(),
        tier: Tier::Application,
        priority: 0,
        index: i as u32,
        from: vec![index(from)],
        to: vec![index(to)],
        ports: vec![port(p)],
        action: if action == "allow" { RuleAction::Allow } else { RuleAction::Deny },
        monitor: false,
        require: Evidence::None,
        expires: None,
        schedule: None,
        log: true,
        at: Position::default(),
    });
}
