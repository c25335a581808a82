//! Runs the `Test` documents of a policy: each case is a question, its answer is the one `segfw policy explain` gives.

use super::answer;
use super::report::{At, CaseReport, EndReport, EndSpec, Finding, Held, Question, Service, Severity};
use crate::flow::record::Protocol;
use crate::policy::compile::{Clock, CompileProblem, compile};
use crate::policy::document::{CaseDoc, CaseEnd, Document, TestDoc};
use crate::policy::explain::{self, View};
use crate::policy::host_policy::{HostPolicy, Labels};
use crate::policy::tables::{Numbers, Tables};
use segfw_common::Verdict;
use std::borrow::Borrow;

/// Every case of every Test, in the order of the documents. `local` are the label sets of the host, `host` the labels of
/// every workload of it. The error is that of [`compile`]: with the workloads that cases name there may be no room.
pub fn run<D: Borrow<Document>>(
    policy: &HostPolicy,
    documents: &[D],
    local: &[Labels],
    host: &Labels,
    clock: Clock,
) -> Result<Vec<CaseReport>, Vec<CompileProblem>> {
    let tests: Vec<&TestDoc> = documents
        .iter()
        .filter_map(|d| match d.borrow() {
            Document::Test(test) => Some(test),
            Document::Workload(_) | Document::Segment(_) | Document::Policy(_) => None,
        })
        .collect();
    if tests.is_empty() {
        return Ok(Vec::new());
    }
    // Labels of a case are all labels of a workload, so each set is compiled as such, whether it runs here or not.
    let mut sets = local.to_vec();
    for case in tests.iter().flat_map(|t| &t.cases) {
        sets.extend([&case.from, &case.to].into_iter().filter_map(|end| labels(end, host)));
    }
    sets.sort();
    sets.dedup();
    let tables = compile(policy, &sets, &[], &mut Numbers::default(), clock)?;
    let ask = |test: &TestDoc, case: &CaseDoc| one(test, case, &tables, policy, host, clock);
    Ok(tests.into_iter().flat_map(|t| t.cases.iter().map(move |c| ask(t, c))).collect())
}

/// Labels of the host lie under those of a workload.
fn labels(end: &CaseEnd, host: &Labels) -> Option<Labels> {
    match end {
        CaseEnd::Labels(labels) => {
            let mut all = host.clone();
            all.extend(labels.clone());
            Some(all)
        }
        CaseEnd::Address(_) | CaseEnd::World | CaseEnd::Host | CaseEnd::Unresolved => None,
    }
}

fn spec(end: &CaseEnd, host: &Labels) -> EndSpec {
    match end {
        CaseEnd::Labels(own) => EndSpec::Labels(labels(end, host).unwrap_or_else(|| own.clone())),
        CaseEnd::Address(ip) => EndSpec::Address(*ip),
        CaseEnd::World => EndSpec::World,
        CaseEnd::Host => EndSpec::Host,
        CaseEnd::Unresolved => EndSpec::Unresolved,
    }
}

fn one(
    test: &TestDoc,
    case: &CaseDoc,
    tables: &Tables,
    policy: &HostPolicy,
    host: &Labels,
    clock: Clock,
) -> CaseReport {
    let port = Service { protocol: Protocol(explain::protocol(case.port.proto, 0)), port: case.port.first };
    let question = Question { from: spec(&case.from, host), to: spec(&case.to, host), port };
    let mut report = CaseReport {
        test: test.meta.name.clone(),
        at: At::from(&case.at),
        expect: if case.allow { "allow" } else { "deny" }.to_owned(),
        by: case.by.as_ref().map(|by| by.value.clone()),
        held: Held::NotAsked,
        found: String::new(),
        question,
    };
    // What a test says does not depend on whether this host only watches.
    let view = View { clock, host_flags: 0 };
    match answer::explain(tables, policy, &report.question, &|_| None, view, None, "test") {
        Err(why) => report.found = why,
        Ok(answer) => {
            let right = (answer.verdict != Verdict::Denied.into()) == case.allow;
            let by = case.by.as_ref().is_none_or(|by| answer.ends.iter().any(|end| decided(end, &by.value)));
            report.held = if right && by { Held::Yes } else { Held::No };
            let ends = answer.ends.iter().filter(|e| e.verdict.is_some()).map(said).collect::<Vec<_>>().join("; ");
            report.found = format!("{}: {ends}", answer.verdict);
        }
    }
    report
}

/// Is it this rule (`rule` or `policy/rule`) that decided at this end?
fn decided(end: &EndReport, by: &str) -> bool {
    end.rule.as_ref().is_some_and(|r| r.rule == by || format!("{}/{}", r.policy, r.rule) == by)
}

fn said(end: &EndReport) -> String {
    match (&end.rule, &end.default_of) {
        (Some(rule), _) => format!("{} by {}/{} ({})", end.direction, rule.policy, rule.rule, rule.at),
        (None, Some(segment)) => format!("{} by {} of {segment}", end.direction, end.reason),
        (None, None) => format!("{} by {}", end.direction, end.reason),
    }
}

/// What keeps a revision from being taken: cases that fail, and those that cannot be asked.
pub fn findings(cases: &[CaseReport]) -> Vec<Finding> {
    let finding = |case: &CaseReport| {
        let CaseReport { test, at, question, expect, by, held, found } = case;
        let by = by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
        let what = match held {
            Held::Yes => return None,
            Held::No => format!("expected {expect}{by}, but the answer is {found}"),
            Held::NotAsked => format!("cannot be asked: {found}"),
        };
        let asked = format!("{} -> {} {}", question.from, question.to, question.port);
        Some(Finding {
            severity: Severity::Error,
            at: Some(at.clone()),
            message: format!("the test {test} fails: {asked}: {what}"),
            help: Some("segfw policy explain shows why; mend the policy or the test".to_owned()),
        })
    };
    cases.iter().filter_map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{HostSettings, Inventory, read};

    const POLICY: &str = "\
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: db}
spec: {match: [{systemdUnit: db.service}], labels: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: db}
spec: {select: {app: db, zone: eu}, default: {ingress: deny, egress: deny}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: web}
spec: {select: {app: web}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec: {rules: [{name: r, from: [web], to: [db], ports: [tcp/5432], action: allow}]}
---
apiVersion: segfw.dev/v1
kind: Test
metadata: {name: t}
spec:
  cases:
    - {from: {app: web}, to: {app: db}, port: tcp/5432, expect: allow, by: p/r}
    - {from: {app: web}, to: {app: db}, port: tcp/5432, expect: deny}
    - {from: world, to: {app: db}, port: tcp/5432, expect: deny}
    - {from: {app: web}, to: {app: db}, port: tcp/80, expect: deny, by: r}
    - {from: world, to: {app: db}, port: udp/53, expect: deny}
";

    #[test]
    fn three_answers() {
        let clock = Clock { wall: "2026-11-24T18:00:00Z".parse().unwrap(), boot_ns: 1_000_000_000 };
        let files = [("t.yaml".to_owned(), POLICY.to_owned())];
        let (docs, policy, problems) = read(&files, |_| Inventory::default(), &HostSettings::default(), clock.wall);
        assert_eq!(problems.errors(), 0, "{problems}");
        let host = Labels::from([("zone".to_owned(), "eu".to_owned())]);
        let cases = run(&policy, &docs, &[], &host, clock).unwrap();
        let held: Vec<Held> = cases.iter().map(|c| c.held).collect();
        assert_eq!(held, [Held::Yes, Held::No, Held::Yes, Held::No, Held::Yes], "{cases:#?}");
        let findings = findings(&cases);
        assert_eq!(findings.len(), 2);
        assert!(
            findings[0].message.contains("expected deny, but the answer is ALLOWED: egress by no-segment")
                || findings[0].message.contains("by p/r (t.yaml:"),
            "{}",
            findings[0].message
        );
        // Without the label of the host the segment does not hold this workload: nothing is refused.
        let cases = run(&policy, &docs, &[], &Labels::new(), clock).unwrap();
        assert_eq!(cases[2].held, Held::No);
    }
}
