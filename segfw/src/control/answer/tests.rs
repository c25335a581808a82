use super::*;
use crate::policy::compile::testing::{clock, labels, policy, rule};
use expect_test::{Expect, expect};
use segfw_common::control::HOST_MONITOR;

const VIEW: fn(u64) -> View = |host_flags| View { clock: clock(), host_flags };

/// Label sets web, db and none are of this host; `web.service` and `/web` are the first.
fn ask_view(policy: &HostPolicy, question: &str, view: View) -> Result<Explanation, String> {
    let local = [labels("app=web"), labels("app=db"), labels("app=none")];
    let tables = compile(policy, &local, &[], &mut Numbers::default(), view.clock).unwrap();
    let find = |name: &str| ["web.service", "/web"].contains(&name).then(|| labels("app=web"));
    let mut words = question.split(' ');
    let mut word = || words.next().unwrap();
    let question =
        Question { from: word().parse().unwrap(), to: word().parse().unwrap(), port: word().parse().unwrap() };
    explain(&tables, policy, &question, &find, view, Some(7), "agent")
}

fn ask(rules: &[&str], question: &str) -> Result<Explanation, String> {
    ask_view(&policy(rules), question, VIEW(0))
}

/// `verdict | egress verdict, reason, rule | ingress … | notes`.
#[track_caller]
fn check(rules: &[&str], question: &str, expect: Expect) {
    let text = match ask(rules, question) {
        Err(error) => error,
        Ok(e) => {
            let end = |e: &EndReport| {
                let rule = e.rule.as_ref().map(|r| format!(" {} {}", r.action, r.rule)).unwrap_or_default();
                let of = e.default_of.as_ref().map(|d| format!(" of {d}")).unwrap_or_default();
                match (&e.verdict, &e.not_judged) {
                    (Some(verdict), None) => format!("{verdict} {}{of}{rule}", e.reason),
                    (None, Some(why)) => why.clone(),
                    other => panic!("{other:?}"),
                }
            };
            let ends: Vec<_> = e.ends.iter().map(end).collect();
            format!("{} | {}\n{}", e.verdict, ends.join(" | "), e.notes.join("\n")).trim_end().to_owned()
        }
    };
    expect.assert_eq(&text);
}

#[test]
fn both_ends_are_reported_with_all_that_is_known() {
    let e = ask(&["allow web -> db tcp/5432 until=2026-11-02T10:00:00Z"], "web.service app=db tcp/5432").unwrap();
    assert_eq!((e.revision, e.policy_from.as_str(), e.verdict), (Some(7), "agent", Verdict::Allowed.into()));
    let [egress, ingress] = e.ends.as_slice() else { panic!("{e:?}") };
    assert_eq!((egress.direction, egress.local.as_str()), (Direction::Egress.into(), "app=web"));
    let rule = ingress.rule.as_ref().unwrap();
    assert_eq!(
        (rule.tier.as_str(), rule.action.as_str(), rule.at.to_string().as_str()),
        ("application", "allow", "web.yaml:1:5")
    );
    assert_eq!(ingress.evidence, Evidence::Origin.into());
    assert_eq!(ingress.evidence_means, "the hooks of this host saw who opened the flow");
    assert_eq!(ingress.until, Some("2026-11-02T10:00:00Z".parse().unwrap()));
    assert_eq!(ingress.without.as_ref().unwrap().verdict, Verdict::Denied.into());
    assert_eq!(ingress.on_revoke.as_deref(), Some("cut"));
    let json = serde_json::to_string(&e).unwrap();
    assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap(), e);
}

#[test]
fn a_refusal_names_the_default_and_the_nearest_rule() {
    let rules = ["allow web -> db tcp/5432"];
    check(
        &rules,
        "/web app=db tcp/80",
        expect!["DENIED | ALLOWED segment-default of web | DENIED segment-default of db"],
    );
    let e = ask(&rules, "app=web app=db tcp/80").unwrap();
    let nearest = e.ends[1].nearest.as_ref().unwrap();
    assert_eq!((nearest.rule.rule.as_str(), nearest.why_not.as_str()), ("r0", "the rule is about tcp/5432"));
    check(
        &rules,
        "unresolved app=db tcp/5432",
        expect!["DENIED | DENIED unresolved-local | DENIED unresolved-peer of db"],
    );
}

#[test]
fn world_and_ranges_are_said_to_be_what_they_are() {
    let rules = ["allow world -> db tcp/5432", "deny 10.1.0.0/16 -> db"];
    check(
        &rules,
        "world app=db tcp/5432",
        expect![[r#"
        ALLOWED | no agent here: an address that no workload claims | ALLOWED rule allow r0
        world: an address that no workload has and that no policy names"#]],
    );
    check(
        &["deny 0.0.0.0/0 -> db"],
        "world app=db tcp/5432",
        expect![[r#"
        DENIED | no agent here: an address that no workload claims | DENIED segment-default of db
        world: an address that no workload has and that no policy names
        a policy names 0.0.0.0/0: ask for an address to hear of that"#]],
    );
    check(
        &rules,
        "10.0.0.0/8 app=db tcp/5432",
        expect![[r#"
        ALLOWED | no agent here: an address that no workload claims | ALLOWED rule allow r0
        10.0.0.0/8 was asked for as its first address, 10.0.0.0; the answer may differ inside 10.1.0.0/16"#]],
    );
    check(
        &rules,
        "192.0.2.1 app=db tcp/5432",
        expect![[r#"
        ALLOWED | no agent here: an address that no workload claims | ALLOWED rule allow r0
        no policy names a prefix with 192.0.2.1: it is world"#]],
    );
    check(
        &rules,
        "10.1.2.3 host tcp/5432",
        expect![[r#"
        ALLOWED | no agent here: an address that no workload claims | processes of no workload are not judged
        nothing is judged at either end, so nothing is refused"#]],
    );
}

#[test]
fn labels_that_nobody_has_are_imagined() {
    let rules = ["allow web -> db tcp/5432"];
    check(
        &rules,
        "app=web,zone=eu app=db tcp/5432",
        expect![[r#"
        ALLOWED | ALLOWED rule allow r0 | ALLOWED rule allow r0
        no workload here has exactly app=web,zone=eu; answered as if one had"#]],
    );
    check(
        &rules,
        "app=new app=new tcp/1",
        expect![[r#"
        ALLOWED | in no segment: nothing is enforced here | in no segment: nothing is enforced here
        no workload here has exactly app=new; answered as if one had
        never denied, whatever the policy says: one workload to itself over loopback
        nothing is judged at either end, so nothing is refused"#]],
    );
}

#[test]
fn a_workload_in_no_segment_is_seen_by_the_hooks() {
    let e = ask(&["allow any -> db tcp/5432 require=exact"], "app=none app=db tcp/5432").unwrap();
    assert_eq!((e.verdict, e.ends[1].evidence), (Verdict::Allowed.into(), Evidence::Origin.into()));
}

#[test]
fn names_that_are_not_known() {
    check(&[], "web app=db tcp/1", expect![[r#""web" is not known as a workload; did you mean "web.service"?"#]]);
    check(
        &[],
        "db app=db tcp/1",
        expect![[r#""db" is a segment, not a workload; ask for the labels of one of its members (app=db)"#]],
    );
    check(
        &[],
        "dbs app=db tcp/1",
        expect![[
            r#""dbs" is not known as a workload (a segment has a name like it: "db"); see segfw workloads, or ask for labels (app=web)"#
        ]],
    );
    check(
        &[],
        "/x app=db tcp/1",
        expect![[r#""/x" is no workload: no Workload document matches it; what runs there is asked for as host"#]],
    );
    assert_eq!(
        not_known("postgers", ["web", "postgres"]),
        "\"postgers\" is not known as a workload; did you mean \"postgres\"?"
    );
    assert_eq!(not_known("x", ["web", "web", "db"]), "\"x\" is not known as a workload; known: db, web");
    assert_eq!(not_known("x", []), "\"x\" is not known as a workload; no workload is known at all");
}

#[test]
fn a_socket_that_was_not_granted_sends_nothing() {
    check(
        &["allow any -> any"],
        "app=web app=db sctp/5000",
        expect![[r#"
        DENIED | DENIED protocol-not-granted | DENIED protocol-not-granted
        app=web may not have sctp sockets; what grants them: `grants: [sctp]` in its segment web, or an allow rule of its own that names sctp
        app=db may not have sctp sockets; what grants them: `grants: [sctp]` in its segment db, or an allow rule of its own that names sctp"#]],
    );
    check(
        &["allow web -> db sctp/5000"],
        "app=web app=db sctp/5000",
        expect!["ALLOWED | ALLOWED rule allow r0 | ALLOWED rule allow r0"],
    );
    check(
        &[],
        "app=web 192.0.2.1 mptcp/443",
        expect![[r#"
        DENIED | DENIED protocol-not-granted | no agent here: an address that no workload claims
        no policy names a prefix with 192.0.2.1: it is world
        app=web may not have mptcp sockets; what grants them: `grants: [mptcp]` in its segment web"#]],
    );
    let e = ask_view(&policy(&[]), "app=web 192.0.2.1 sctp/1", VIEW(HOST_MONITOR)).unwrap();
    assert_eq!((e.verdict, e.ends[0].reason), (Verdict::Audit.into(), Reason::ProtocolNotGranted.into()));
}

#[test]
fn golden_rules_are_named() {
    let mut strict = policy(&[]);
    strict.segments[0].default_egress_allow = false;
    rule(&mut strict, "deny any -> any monitor");
    let e = ask_view(&strict, "app=web 192.0.2.1 udp/67", VIEW(0)).unwrap();
    assert!(e.notes.iter().any(|n| n.contains("DHCP")), "{:?}", e.notes);
}
