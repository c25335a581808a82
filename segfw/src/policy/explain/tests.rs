use super::super::compile::testing::{clock, labels, policy};
use super::*;

fn who(text: &str) -> End {
    match text.parse() {
        Ok(ip) => Who::Address(ip).into(),
        Err(_) => Who::Labels(labels(text)).into(),
    }
}

fn ask(policy: &HostPolicy, source: &str, destination: &str, port: u16) -> Explanation {
    let local = [labels("app=web"), labels("app=db"), labels("app=none")];
    let tables = compile(policy, &local, &[], &mut Numbers::default(), clock()).unwrap();
    let question = Question { source: who(source), destination: who(destination), proto: Proto::Tcp, port };
    explain(&tables, policy, &question, View { clock: clock(), host_flags: 0 })
}

fn judged(judgement: &Judgement) -> &Judged {
    match judgement {
        Judgement::Judged(judged) => judged,
        Judgement::None { who, why } => panic!("{who}: {why}"),
    }
}

/// Rule and kinds of conditions of the nearest rule at the destination.
fn nearest(rules: &[&str], source: &str, port: u16) -> (String, Vec<What>) {
    let e = ask(&policy(rules), source, "app=db", port);
    assert!(!e.passes, "{e:?}");
    let nearest = judged(&e.destination).nearest.as_ref().expect("a nearest rule");
    (nearest.rule.rule.clone(), nearest.differs.iter().map(|d| d.what).collect())
}

#[test]
fn an_allow_says_what_holds_without_it() {
    let e = ask(&policy(&["allow web -> db tcp/5432", "reject any -> db"]), "app=web", "app=db", 5432);
    assert!(e.passes);
    let (source, destination) = (judged(&e.source), judged(&e.destination));
    assert_eq!(
        (source.rule.as_ref().unwrap().rule.as_str(), source.segments.as_slice()),
        ("r0", &["web".to_owned()][..])
    );
    assert_eq!((destination.verdict, destination.reason, destination.evidence), ("ALLOWED", "rule", "origin"));
    let without = destination.without.as_ref().unwrap();
    assert_eq!((without.verdict, without.rule.as_ref().unwrap().rule.as_str()), ("DENIED", "r1"));
    assert_eq!(destination.rule.as_ref().unwrap().at, "web.yaml:1:5");
    assert!(serde_json::to_string(&e).unwrap().contains(r#""judgement":"judged""#));
}

#[test]
fn the_nearest_rule_and_what_it_lacks() {
    assert_eq!(
        nearest(&["allow web -> db tcp/5432", "allow db -> web"], "app=web", 80),
        ("r0".into(), vec![What::Port])
    );
    assert_eq!(nearest(&["allow db -> web"], "app=web", 80), ("r0".into(), vec![What::Direction]));
    assert_eq!(nearest(&["allow web -> db tcp/80"], "app=none", 80), ("r0".into(), vec![What::Peer]));
    assert_eq!(nearest(&["deny any -> db", "allow web -> db"], "app=web", 80), ("r1".into(), vec![What::Order]));
    assert_eq!(nearest(&["allow web -> db monitor"], "app=web", 80), ("r0".into(), vec![What::Monitor]));
    assert_eq!(
        nearest(&["allow web -> db until=2026-11-01T00:00:00Z", "allow web -> db tcp/5432"], "app=web", 80),
        ("r0".into(), vec![What::Expired])
    );
    assert_eq!(nearest(&["pass web -> db", "allow web -> db"], "app=web", 80), ("r1".into(), vec![What::Order]));
    assert_eq!(nearest(&["allow 10.0.0.0/8 -> db"], "192.0.2.1", 80), ("r0".into(), vec![What::Peer]));
}

#[test]
fn evidence_and_ends_without_an_agent() {
    let policy = policy(&["allow 10.0.0.0/8 -> db require=exact"]);
    let e = ask(&policy, "10.1.2.3", "app=db", 80);
    assert!(matches!(e.source, Judgement::None { .. }));
    let d = judged(&e.destination);
    assert_eq!((d.reason, d.evidence), ("not-authenticated", "prefix"));
    assert_eq!(d.nearest.as_ref().unwrap().differs[0].what, What::Evidence);
    assert_eq!(d.evidence_means, "the longest prefix that a policy names is 10.0.0.0/8");
    let e = ask(&policy, "app=db", "app=none", 80);
    assert_eq!(judged(&e.destination).reason, "no-segment");
    assert!(e.passes);
}

#[test]
fn a_pending_answer_and_a_deadline() {
    let e = ask(
        &policy(&["allow web -> db until=2026-11-02T10:00:00Z", "deny web -> db monitor tier=baseline"]),
        "app=web",
        "app=db",
        80,
    );
    let d = judged(&e.destination);
    assert_eq!(d.until, Some("2026-11-02T10:00:00Z".parse().unwrap()));
    let e = ask(&policy(&["deny web -> db monitor", "allow web -> db"]), "app=web", "app=db", 80);
    let d = judged(&e.destination);
    assert_eq!((d.verdict, d.pending.as_ref().unwrap().action), ("AUDIT", "deny"));
    assert_eq!(d.pending.as_ref().unwrap().rule.as_ref().unwrap().rule, "r0");
}
