//! Reports as text with styles, for a person: most important first, what to do beside what is wrong.

mod changes;

pub(super) use changes::{applied, cases, changes, findings, history, support};

use super::Exit;
use crate::agent::early::Early;
use crate::control::report::{
    CheckReport, EndReport, Enforcement, Explanation, Finding, NearestReport, Outcome, PendingReport, PolicyCheck,
    RuleReport, Severity, State, StatusReport, WithoutReport, WorkloadReport,
};
use crate::datapath::left::Left;
use crate::flow::render::{BAD, Cell, Columns, DIM, GOOD, HEAD, PLAIN, WARN, clean, paint, time, verdict_style};
use anstyle::Style;
use jiff::Timestamp;
use segfw_common::{Direction, Evidence, Verdict};
use std::fmt::Write as _;
use std::path::Path;

/// A table with more of its room used than this is worth a look.
const FULL_PERCENT: u64 = 80;
/// Digits of a digest that a person compares.
const DIGEST_DIGITS: usize = 12;
/// Files named on the status screen.
const FILES_SHOWN: usize = 4;

/// Lines of `label  text`.
struct Screen(String);

impl Screen {
    const INDENT: usize = 14;

    /// `text` may carry styles; what comes from outside in it is cleaned already.
    fn line(&mut self, label: &str, text: &str) {
        let width = Self::INDENT - 2;
        let _ = writeln!(self.0, "{}{:pad$}{text}", paint(DIM, label), "", pad = 2 + width.saturating_sub(label.len()));
    }
    fn more(&mut self, text: &str) {
        let _ = writeln!(self.0, "{:indent$}{text}", "", indent = Self::INDENT);
    }
    /// The first with the label, the others below it.
    fn list(&mut self, label: &str, lines: &[String]) {
        for (i, line) in lines.iter().enumerate() {
            if i == 0 { self.line(label, line) } else { self.more(line) }
        }
    }
}

/// `2d 17h`: two units are enough.
fn ago(from: Timestamp, to: Timestamp) -> String {
    let seconds = to.duration_since(from).as_secs().max(0);
    let (d, h, m, s) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, _) => format!("{m}m {s}s"),
        (0, ..) => format!("{h}h {m}m"),
        _ => format!("{d}d {h}h"),
    }
}

/// `1_204` as `1,204`.
fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `n` in `style` if it is not zero.
fn counted(style: Style, n: u64, what: &str) -> String {
    paint(if n == 0 { PLAIN } else { style }, &format!("{} {what}", number(n)))
}

/// 0 where the host is as its administrator wants it.
pub(super) fn status_exit(status: &StatusReport) -> Exit {
    match status.state {
        State::Enforcing | State::Monitor => Exit::Yes,
        State::Degraded { .. } | State::Open { .. } => Exit::No,
    }
}

/// How the early loader ended.
pub(super) fn early(early: &Early, state_dir: &str) -> String {
    match early {
        Early::Loaded { revision, generation } => {
            format!("revision {revision} is in force again (generation {generation})\n")
        }
        Early::InForce { generation } => format!("nothing to do: generation {generation} is in force already\n"),
        Early::NothingSaved => format!("nothing to load: no revision was ever saved in {state_dir}\n"),
        Early::DeclaredOpen => {
            "nothing is loaded: absence.beforeFirstRevision is open; the agent loads its policy folder\n".to_owned()
        }
    }
}

/// What the kernel does while no agent answers.
pub(super) fn unattended(pins: &Path, left: &Result<Vec<Left>, String>) -> String {
    let mut s = Screen(String::new());
    let left = match left {
        Err(why) => {
            s.line("kernel", &paint(WARN, &format!("not known: {}", clean(why))));
            return s.0;
        }
        Ok(left) if left.is_empty() => {
            let what = format!("nothing is pinned below {}: nothing is enforced", pins.display());
            s.line("kernel", &format!("{} {}", paint(BAD, "OPEN"), clean(&what)));
            return s.0;
        }
        Ok(left) => left,
    };
    for Left { layout, generation, attached, missing, gone, monitor } in left {
        let (style, word, meaning) = match (gone.as_deref(), attached.is_empty() || *generation == 0) {
            (_, true) => (BAD, "OPEN", "programs or tables are not there: nothing is enforced"),
            (Some("open"), _) => (BAD, "OPEN", "new flows pass, since the agent is gone (absence.agentGone: open)"),
            (Some(_), _) => (WARN, "CLOSED", "new flows of enforced workloads are refused until an agent runs"),
            (None, _) if *monitor => (WARN, "MONITOR", "everything is judged, nothing is dropped"),
            (None, _) => (WARN, "UNATTENDED", "the kernel goes on with the last revision; no reload, no records"),
        };
        s.line("kernel", &format!("{} {meaning}", paint(style, word)));
        s.line("layout", &format!("{}, generation {generation}", clean(layout)));
        s.line("hooks", &format!("{} attached", attached.len()));
        for hook in missing {
            s.more(&paint(BAD, &format!("not attached: {}", clean(hook))));
        }
    }
    s.0
}

/// Of the newest repairs; `-o json` has more.
const REPAIRS_SHOWN: usize = 4;

/// One screen: what is enforced, since when, by which revision, what is wrong, what to do.
pub(super) fn status(status: &StatusReport) -> String {
    // In full, so that a new field does not compile until it has a place.
    let StatusReport {
        at,
        state,
        revision,
        refused,
        gate,
        families,
        hooks,
        xdp,
        maps,
        identities,
        workloads,
        counters,
        lost_events,
        golden_rules,
        uncovered,
        absence,
        repairs,
        neighbours,
        agent,
    } = status;
    let mut s = Screen(String::new());
    let style = match state {
        State::Enforcing => GOOD.bold(),
        State::Monitor => WARN.bold(),
        State::Degraded { .. } | State::Open { .. } => BAD,
    };
    let meaning = match state {
        State::Enforcing => "the policy is enforced".to_owned(),
        State::Monitor => "everything is judged and recorded, nothing is dropped".to_owned(),
        State::Degraded { .. } => "enforced, but not all is as it should be".to_owned(),
        State::Open { why } => format!("nothing is enforced: {}", clean(why)),
    };
    s.line(&clean(&agent.host), &format!("{} {meaning}", paint(style, state.word())));
    if let State::Degraded { reasons } = state {
        for reason in reasons {
            s.more(&format!("{} {}: {}", paint(BAD, "!"), clean(&reason.what), clean(&reason.consequence)));
            s.more(&format!("  do: {}", paint(HEAD, &reason.action)));
        }
    }
    match revision {
        None => s.line("revision", &paint(WARN, "none was ever loaded")),
        Some(r) => {
            let digest: String = r.digest.chars().take(DIGEST_DIGITS).collect();
            s.line(
                "revision",
                &format!(
                    "{} since {} ({} ago), digest {}, generation {}",
                    paint(HEAD, &r.number.to_string()),
                    time(r.loaded_at),
                    ago(r.loaded_at, *at),
                    clean(&digest),
                    r.generation
                ),
            );
            let mut files: Vec<String> = r.files.iter().take(FILES_SHOWN).map(|f| clean(f)).collect();
            if r.files.len() > FILES_SHOWN {
                files.push(format!("and {} more", r.files.len() - FILES_SHOWN));
            }
            s.more(&format!("from {}", files.join(", ")));
        }
    }
    if let Some(refused) = refused {
        let when = format!("{} ({} ago): {}", time(refused.at), ago(refused.at, *at), clean(&refused.why));
        s.line("refused", &paint(BAD, &when));
        for problem in refused.problems.iter().take(FILES_SHOWN) {
            finding(problem).iter().for_each(|line| s.more(line));
        }
        if refused.problems.len() > FILES_SHOWN {
            s.more(&format!("and {} more: segfw status -o json", refused.problems.len() - FILES_SHOWN));
        }
    }
    s.line(
        "workloads",
        &format!(
            "{} enforced, {} monitored, {} in no segment, {}; {} identities",
            number(workloads.enforced),
            number(workloads.monitored),
            number(workloads.no_segment),
            counted(WARN, workloads.unresolved, "unresolved"),
            number(*identities)
        ),
    );
    s.line(
        "flows",
        &format!(
            "{} allowed, {}, {} audit; {}",
            number(counters.of(Verdict::Allowed)),
            counted(BAD, counters.of(Verdict::Denied), "denied"),
            number(counters.of(Verdict::Audit)),
            counted(WARN, *lost_events, "records lost"),
        ),
    );
    let spool = |name: &str| counters.named.get(&format!("spool-{name}")).copied();
    if let (Some(records), Some(bytes), Some(lost), Some(dropped)) =
        (spool("records"), spool("bytes"), spool("lost"), spool("dropped"))
    {
        let gone = if dropped == 0 { String::new() } else { format!(", {} older ones removed", number(dropped)) };
        s.more(&format!(
            "on disk: {} records, {} KiB{gone}; {}",
            number(records),
            number(bytes >> 10),
            counted(WARN, lost, "not written")
        ));
    }
    let mut denied: Vec<_> = counters.verdicts.iter().filter(|c| c.verdict == Verdict::Denied.into()).collect();
    denied.sort_by_key(|c| std::cmp::Reverse(c.count));
    if !denied.is_empty() {
        let text: Vec<_> =
            denied.iter().take(4).map(|c| format!("{} {} {}", number(c.count), c.direction, c.reason)).collect();
        s.more(&format!("denied: {}", text.join(", ")));
    }
    let attached = hooks.iter().filter(|h| h.attached).count();
    let all = if attached == hooks.len() { PLAIN } else { BAD };
    let xdp = if xdp.is_empty() { "none".to_owned() } else { clean(&xdp.join(", ")) };
    s.line("hooks", &format!("{} attached; xdp: {xdp}", paint(all, &format!("{attached} of {}", hooks.len()))));
    for hook in hooks.iter().filter(|h| !h.attached) {
        s.more(&paint(BAD, &format!("not attached: {}", hook.name)));
    }
    for n in neighbours.iter().filter(|n| n.after_ours) {
        let name = if n.name.is_empty() { "without a name" } else { &n.name };
        s.more(&format!("after ours at {}: program {} ({})", n.hook, n.program, clean(name)));
    }
    if !repairs.is_empty() {
        let lines: Vec<_> = repairs
            .iter()
            .rev()
            .take(REPAIRS_SHOWN)
            .map(|r| {
                let end = match &r.left {
                    None => "put right".to_owned(),
                    Some(why) => paint(BAD, &format!("not put right: {}", clean(why))),
                };
                format!("{} ({} ago) {}: {}; {end}", time(r.at), ago(r.at, *at), clean(&r.what), clean(&r.found))
            })
            .collect();
        s.list("tampering", &lines);
    }
    s.line("gate", &format!("{}: {}", clean(&gate.name), clean(&gate.why)));
    s.line("families", &format!("{}: {}", clean(&families.name), clean(&families.why)));
    let full =
        |m: &&crate::control::report::MapReport| m.entries.saturating_mul(100) >= m.max.saturating_mul(FULL_PERCENT);
    let full: Vec<_> = maps
        .iter()
        .filter(full)
        .map(|m| paint(WARN, &format!("{} {} of {}", m.name, number(m.entries), number(m.max))))
        .collect();
    if full.is_empty() {
        s.line("tables", &format!("{}, none above {FULL_PERCENT} %", maps.len()));
    } else {
        s.line("tables", &format!("nearly full: {}", full.join(", ")));
    }
    let trouble: Vec<_> = counters
        .named
        .iter()
        .filter(|(name, n)| {
            **n != 0 && (name.ends_with("-full") || name.ends_with("-failed") || name.ends_with("-uncounted"))
        })
        .map(|(name, n)| paint(WARN, &format!("{name} {}", number(*n))))
        .collect();
    if !trouble.is_empty() {
        s.more(&trouble.join(", "));
    }
    let join = |parts: Vec<String>| parts.join("; ");
    s.line("never denied", &join(golden_rules.iter().map(|g| clean(g)).collect()));
    let lines: Vec<_> = uncovered.iter().map(|u| format!("{}: {}", clean(&u.what), clean(&u.consequence))).collect();
    s.list("not covered", &lines);
    s.line("absence", &join(absence.iter().map(|a| format!("{}: {}", clean(&a.when), clean(&a.behaviour))).collect()));
    s.line(
        "agent",
        &format!(
            "pid {}, up {}, version {}, layout {}, kernel {}",
            agent.pid,
            ago(agent.started_at, *at),
            clean(&agent.version),
            agent.abi,
            clean(&agent.kernel)
        ),
    );
    s.0
}

/// A table, or a sentence where there are none.
pub(super) fn workloads(workloads: &[WorkloadReport]) -> String {
    if workloads.is_empty() {
        return "No workload is known on this host.\n".to_owned();
    }
    let row = |w: &WorkloadReport| -> Vec<Cell> {
        let style = match w.enforcement {
            Enforcement::Enforced => GOOD,
            Enforcement::Monitored | Enforcement::Unresolved => WARN,
            Enforcement::NoSegment => DIM,
        };
        let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        vec![
            (PLAIN, w.name.clone()),
            (style, w.enforcement.word().to_owned()),
            (PLAIN, or_dash(w.segments.join(","))),
            (PLAIN, or_dash(crate::policy::tables::canonical(&w.labels))),
            (DIM, or_dash(w.labels_from.join(", "))),
            (DIM, w.cgroup.clone()),
        ]
    };
    let rows: Vec<_> = workloads.iter().map(row).collect();
    Columns::default().with_head(&["WORKLOAD", "TREATED", "SEGMENTS", "LABELS", "LABELS FROM", "CGROUP"], &rows)
}

fn rule(rule: &RuleReport) -> String {
    let RuleReport { policy, rule, tier, action, at } = rule;
    format!(
        "{} ({} {}, tier {}) at {}",
        paint(HEAD, &format!("{policy}/{rule}")),
        clean(action),
        "rule",
        clean(tier),
        clean(&at.to_string())
    )
}

/// Who decides what at each end, and why.
pub(super) fn explanation(explanation: &Explanation) -> String {
    let Explanation { question, verdict, revision, policy_from, ends, notes } = explanation;
    let mut s = Screen(String::new());
    let ask = format!("{} -> {} {}", question.from, question.to, question.port);
    let _ = writeln!(s.0, "{} {}", paint(verdict_style(*verdict).bold(), &verdict.to_string()), clean(&ask));
    let from = if policy_from == "agent" {
        "in force on this host".to_owned()
    } else {
        format!("read from {}", clean(policy_from))
    };
    match revision {
        Some(revision) => s.line("revision", &format!("{revision}, {from}")),
        None => s.line("policy", &from),
    }
    for end in ends {
        s.0.push('\n');
        show_end(&mut s, end);
    }
    if !notes.is_empty() {
        s.0.push('\n');
        s.list("note", &notes.iter().map(|n| clean(n)).collect::<Vec<_>>());
    }
    s.0
}

fn show_end(s: &mut Screen, end: &EndReport) {
    let EndReport {
        direction,
        local,
        segments,
        peer,
        evidence,
        evidence_means,
        verdict,
        reason,
        not_judged,
        rule: by,
        default_of,
        pending,
        until,
        nearest,
        without,
        on_revoke,
        golden,
    } = end;
    let place = match direction.known() {
        Some(Direction::Egress) => "at the source",
        Some(Direction::Ingress) => "at the destination",
        None => "at an end",
    };
    let said = match verdict {
        Some(verdict) => paint(verdict_style(*verdict), &verdict.to_string()),
        None => paint(DIM, "not judged"),
    };
    let _ = writeln!(s.0, "{} {place}: {said}", paint(HEAD, &direction.to_string()));
    if let Some(why) = not_judged {
        // Who the other end is does not matter where nobody asks.
        s.line("  who", &clean(local));
        s.line("  because", &clean(why));
        return;
    }
    let segments = if segments.is_empty() { "in no segment".to_owned() } else { format!("in {}", segments.join(", ")) };
    s.line("  who", &format!("{}, {}", clean(local), clean(&segments)));
    let means = if evidence_means.is_empty() { String::new() } else { format!(": {}", clean(evidence_means)) };
    let known =
        if evidence.known() == Some(Evidence::None) { "not known".to_owned() } else { format!("known by {evidence}") };
    s.line("  peer", &format!("{}, {known}{means}", clean(peer)));
    let because = match (by, default_of) {
        (Some(by), _) if reason.to_string() == "rule" => rule(by),
        (Some(by), _) => format!("{reason}: {}", rule(by)),
        (None, Some(segment)) => format!("{reason} of {}: no rule matches", clean(segment)),
        (None, None) => reason.to_string(),
    };
    s.line("  because", &because);
    if let Some(golden) = golden {
        s.line("  golden", &clean(golden));
    }
    if let Some(NearestReport { rule: near, why_not }) = nearest {
        s.line("  nearest", &rule(near));
        s.more(&format!("does not match: {}", clean(why_not)));
    }
    if let Some(PendingReport { verdict, rule: by }) = pending {
        let by = by.as_ref().map(|r| format!(" by {}", rule(r))).unwrap_or_default();
        s.line("  pending", &format!("{}{by}", paint(verdict_style(*verdict), &verdict.to_string())));
    }
    if let Some(until) = until {
        s.line("  until", &time(*until));
    }
    if let Some(WithoutReport { verdict, reason, rule: by }) = without {
        let by = by.as_ref().map_or_else(|| reason.to_string(), |r| format!("by {}", rule(r)));
        s.line("  without", &format!("that rule: {} {by}", paint(verdict_style(*verdict), &verdict.to_string())));
    }
    if let Some(on_revoke) = on_revoke {
        s.line("  on revoke", &format!("live connections: {}", clean(on_revoke)));
    }
}

/// `file:line:column: severity: message`, as editors and terminals make links of it; what to do is a line of its own.
fn finding(finding: &Finding) -> Vec<String> {
    let Finding { severity, at, message, help } = finding;
    let severity = match severity {
        Severity::Error => paint(BAD, "error"),
        Severity::Warning => paint(WARN, "warning"),
    };
    let at = at.as_ref().map(|at| format!("{}: ", clean(&at.to_string()))).unwrap_or_default();
    let first = format!("{at}{severity}: {}", clean(message));
    std::iter::once(first).chain(help.as_ref().map(|h| format!("  help: {}", paint(HEAD, h)))).collect()
}

/// All problems, then one line with the sum.
pub(super) fn check(check: &PolicyCheck) -> String {
    let PolicyCheck { files, segments, rules, entries, findings } = check;
    let mut out: String = findings.iter().flat_map(finding).map(|line| line + "\n").collect();
    let errors = findings.iter().filter(|f| f.severity == Severity::Error).count();
    let warnings = findings.len() - errors;
    let (style, word) = if errors > 0 { (BAD, "not usable") } else { (GOOD, "good") };
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let entries = entries.map(|n| format!(", {} table entries", number(n as u64))).unwrap_or_default();
    let _ = writeln!(
        out,
        "{}: {}, {}; {}, {}, {}{entries}",
        paint(style, word),
        plural(errors, "error"),
        plural(warnings, "warning"),
        plural(*files, "file"),
        plural(*segments, "segment"),
        plural(*rules, "rule"),
    );
    out
}

/// What is missing comes with what to do.
pub(super) fn doctor(checks: &[CheckReport]) -> String {
    let mut out = String::new();
    let mut columns = Columns::default();
    let row = |c: &CheckReport| -> Vec<Cell> {
        let (style, word) = match c.outcome {
            Outcome::Good => (GOOD, "good"),
            Outcome::Less => (WARN, "less"),
            Outcome::Bad => (BAD, "BAD"),
        };
        vec![(style, word.to_owned()), (PLAIN, c.name.clone()), (DIM, c.found.clone())]
    };
    // Widths first, then the lines with their advice.
    let rows: Vec<_> = checks.iter().map(row).collect();
    let _ = columns.with_head(&[], &rows);
    for (check, row) in checks.iter().zip(&rows) {
        out.push_str(&columns.row(row));
        if !check.consequence.is_empty() {
            let _ = writeln!(out, "      so: {}", clean(&check.consequence));
        }
        if !check.action.is_empty() {
            let _ = writeln!(out, "      do: {}", paint(HEAD, &check.action));
        }
    }
    let bad = checks.iter().filter(|c| c.outcome == Outcome::Bad).count();
    let less = checks.iter().filter(|c| c.outcome == Outcome::Less).count();
    let verdict = match (bad, less) {
        (0, 0) => paint(GOOD, "segfw can run here."),
        (0, n) => paint(WARN, &format!("segfw can run here, with less in {n} respect(s).")),
        (n, _) => paint(BAD, &format!("segfw cannot run here: {n} of {} checks failed.", checks.len())),
    };
    let _ = writeln!(out, "{verdict}");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::{At, tests as fixed};
    use expect_test::{Expect, expect};

    /// Without styles.
    fn check_plain(text: &str, want: Expect) {
        want.assert_eq(&anstream::adapter::strip_str(text).to_string());
    }
    /// With styles, escape characters made visible.
    fn check_colour(text: &str, want: Expect) {
        want.assert_eq(&text.replace('\x1b', "^"));
    }

    #[test]
    fn status_when_all_is_well() {
        check_plain(
            &status(&fixed::status()),
            expect![[r#"
                node-1        ENFORCING the policy is enforced
                revision      41 since 2026-11-18T09:30:00.000Z (2d 17h ago), digest 9f86d081884c, generation 3
                              from payments.yaml, web.yaml
                workloads     12 enforced, 2 monitored, 30 in no segment, 0 unresolved; 37 identities
                flows         120,345 allowed, 20 denied, 0 audit; 0 records lost
                              denied: 17 ingress segment-default, 3 egress rule
                hooks         2 of 2 attached; xdp: eth0
                gate          skb: works on every supported kernel
                families      open: no BTF
                tables        nearly full: ENDPOINTS 61,000 of 65,536
                              endpoints-full 4
                never denied  one workload to itself over loopback; DHCP client
                not covered   packet sockets: a process with CAP_NET_RAW can send and read frames past every hook
                absence       agent gone: lastKnownGood
                agent         pid 812, up 2d 17h, version 0.1.0, layout 1, kernel 6.12.0
            "#]],
        );
        assert_eq!(status_exit(&fixed::status()), Exit::Yes);
    }

    #[test]
    fn status_at_3_a_m() {
        let text = status(&fixed::degraded());
        check_plain(
            &text,
            expect![[r#"
                node-1        DEGRADED enforced, but not all is as it should be
                              ! the wanted revision was refused: revision 41 stays in force
                                do: correct web-to-db.yaml:14:11, then `segfw policy check /etc/segfw/policies`
                              ! cgroup_skb/ingress is not attached: inbound flows are not judged
                                do: systemctl restart segfw
                revision      41 since 2026-11-18T09:30:00.000Z (2d 17h ago), digest 9f86d081884c, generation 3
                              from payments.yaml, web.yaml
                refused       2026-11-21T02:58:00.000Z (2m 0s ago): 1 error in 1 of 3 files
                              web-to-db.yaml:14:11: error: segment "payment-db" is not defined
                                help: did you mean "payments-db"?
                workloads     12 enforced, 2 monitored, 30 in no segment, 1 unresolved; 37 identities
                flows         120,345 allowed, 20 denied, 0 audit; 9 records lost
                              denied: 17 ingress segment-default, 3 egress rule
                hooks         1 of 2 attached; xdp: eth0
                              not attached: cgroup_skb/ingress
                gate          skb: works on every supported kernel
                families      open: no BTF
                tables        nearly full: ENDPOINTS 61,000 of 65,536
                              endpoints-full 4
                never denied  one workload to itself over loopback; DHCP client
                not covered   packet sockets: a process with CAP_NET_RAW can send and read frames past every hook
                absence       agent gone: lastKnownGood
                agent         pid 812, up 2d 17h, version 0.1.0, layout 1, kernel 6.12.0
            "#]],
        );
        assert!(text.lines().count() <= 30, "more than one screen");
        assert_eq!(status_exit(&fixed::degraded()), Exit::No);
    }

    #[test]
    fn status_in_colour() {
        let text = status(&fixed::degraded());
        check_colour(
            &text.lines().take(6).collect::<Vec<_>>().join("\n"),
            expect![[r#"
            ^[2mnode-1^[0m        ^[1m^[31mDEGRADED^[0m enforced, but not all is as it should be
                          ^[1m^[31m!^[0m the wanted revision was refused: revision 41 stays in force
                            do: ^[1mcorrect web-to-db.yaml:14:11, then `segfw policy check /etc/segfw/policies`^[0m
                          ^[1m^[31m!^[0m cgroup_skb/ingress is not attached: inbound flows are not judged
                            do: ^[1msystemctl restart segfw^[0m
            ^[2mrevision^[0m      ^[1m41^[0m since 2026-11-18T09:30:00.000Z (2d 17h ago), digest 9f86d081884c, generation 3"#]],
        );
    }

    #[test]
    fn status_of_an_open_host() {
        let mut open = fixed::status();
        open.state = State::Open { why: "no policy was ever loaded".to_owned() };
        open.revision = None;
        let text = status(&open);
        check_plain(
            &text.lines().take(2).collect::<Vec<_>>().join("\n"),
            expect![[r#"
            node-1        OPEN nothing is enforced: no policy was ever loaded
            revision      none was ever loaded"#]],
        );
        assert_eq!(status_exit(&open), Exit::No);
    }

    #[test]
    fn status_as_json() {
        let json = serde_json::to_string(&fixed::degraded()).unwrap();
        assert!(json.starts_with(r#"{"at":"2026-11-21T03:00:00Z","state":"DEGRADED","reasons":[{"what":"#), "{json}");
        assert_eq!(serde_json::from_str::<StatusReport>(&json).unwrap(), fixed::degraded());
    }

    #[test]
    fn workloads_as_a_table() {
        check_plain(
            &workloads(&fixed::workloads()),
            expect![[r#"
            WORKLOAD                    TREATED     SEGMENTS     LABELS                LABELS FROM        CGROUP
            postgresql@16-main.service  enforced    payments-db  app=payments,tier=db  Workload postgres  /system.slice/postgresql@16-main.service
            cron.service                no-segment  -            unit=cron.service     unit               /system.slice/cron.service
        "#]],
        );
        check_plain(
            &workloads(&[]),
            expect![[r#"
            No workload is known on this host.
        "#]],
        );
    }

    #[test]
    fn explanation_of_a_refusal() {
        check_plain(
            &explanation(&fixed::explanation()),
            expect![[r#"
                DENIED app=web -> app=payments,tier=db tcp/5432
                revision      41, in force on this host

                egress at the source: not judged
                  who         app=web
                  because     in no segment: nothing is enforced here

                ingress at the destination: DENIED
                  who         app=payments,tier=db, in payments-db
                  peer        app=web, known by origin: the hooks of this host saw who opened the flow
                  because     segment-default of payments-db: no rule matches
                  nearest     payments-db-access/api-to-db (allow rule, tier application) at payments.yaml:14:7
                              does not match: source is not in segment payments-api (app=web lacks tier=api)
                  pending     ALLOWED by payments-db-access/api-to-db (allow rule, tier application) at payments.yaml:14:7
                  on revoke   live connections: cut

                note          never denied: one workload to itself over loopback, neighbour discovery, DHCP client
            "#]],
        );
    }

    #[test]
    fn explanation_of_an_allowed_flow() {
        check_plain(
            &explanation(&fixed::allowed()),
            expect![[r#"
                ALLOWED app=web -> app=payments,tier=db tcp/5432
                revision      41, in force on this host

                egress at the source: not judged
                  who         app=web
                  because     in no segment: nothing is enforced here

                ingress at the destination: ALLOWED
                  who         app=payments,tier=db, in payments-db
                  peer        app=web, known by origin: the hooks of this host saw who opened the flow
                  because     payments-db-access/api-to-db (allow rule, tier application) at payments.yaml:14:7
                  until       2026-12-24T18:00:00.000Z
                  without     that rule: DENIED segment-default
                  on revoke   live connections: cut

                note          never denied: one workload to itself over loopback, neighbour discovery, DHCP client
            "#]],
        );
    }

    #[test]
    fn explanation_in_colour() {
        check_colour(
            &explanation(&fixed::allowed()),
            expect![[r#"
                ^[1m^[32mALLOWED^[0m app=web -> app=payments,tier=db tcp/5432
                ^[2mrevision^[0m      41, in force on this host

                ^[1megress^[0m at the source: ^[2mnot judged^[0m
                ^[2m  who^[0m         app=web
                ^[2m  because^[0m     in no segment: nothing is enforced here

                ^[1mingress^[0m at the destination: ^[32mALLOWED^[0m
                ^[2m  who^[0m         app=payments,tier=db, in payments-db
                ^[2m  peer^[0m        app=web, known by origin: the hooks of this host saw who opened the flow
                ^[2m  because^[0m     ^[1mpayments-db-access/api-to-db^[0m (allow rule, tier application) at payments.yaml:14:7
                ^[2m  until^[0m       2026-12-24T18:00:00.000Z
                ^[2m  without^[0m     that rule: ^[1m^[31mDENIED^[0m segment-default
                ^[2m  on revoke^[0m   live connections: cut

                ^[2mnote^[0m          never denied: one workload to itself over loopback, neighbour discovery, DHCP client
            "#]],
        );
    }

    #[test]
    fn explanation_as_json() {
        let json = serde_json::to_string(&fixed::explanation()).unwrap();
        assert!(
            json.starts_with(
                r#"{"question":{"from":"app=web","to":"app=payments,tier=db","port":"tcp/5432"},"verdict":"DENIED","#
            ),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap(), fixed::explanation());
    }

    #[test]
    fn policy_check() {
        let mut findings = fixed::refused().problems;
        findings.push(Finding {
            severity: Severity::Warning,
            at: Some(At { file: "web.yaml".to_owned(), line: 3, column: 1 }),
            message: "segment \"web\" selects no workload of this host".to_owned(),
            help: None,
        });
        let report = PolicyCheck { files: 3, segments: 4, rules: 1, entries: None, findings };
        check_plain(
            &check(&report),
            expect![[r#"
                web-to-db.yaml:14:11: error: segment "payment-db" is not defined
                  help: did you mean "payments-db"?
                web.yaml:3:1: warning: segment "web" selects no workload of this host
                not usable: 1 error, 1 warning; 3 files, 4 segments, 1 rule
            "#]],
        );
        let good = PolicyCheck { entries: Some(1204), findings: Vec::new(), ..report };
        check_plain(
            &check(&good),
            expect![[r#"
            good: 0 errors, 0 warnings; 3 files, 4 segments, 1 rule, 1,204 table entries
        "#]],
        );
    }

    #[test]
    fn doctor_says_what_to_do() {
        let check = |name: &str, outcome, found: &str, action: &str| CheckReport {
            name: name.to_owned(),
            outcome,
            found: found.to_owned(),
            consequence: if outcome == Outcome::Good { "" } else { "less is enforced" }.to_owned(),
            action: action.to_owned(),
        };
        let checks = [
            check("cgroup2 is mounted", Outcome::Good, "/sys/fs/cgroup", ""),
            check("BPF file system", Outcome::Bad, "not mounted", "mount -t bpf bpf /sys/fs/bpf"),
            check("BPF LSM", Outcome::Less, "bpf is not in lsm=", "add bpf to lsm= on the kernel command line"),
        ];
        check_plain(
            &doctor(&checks),
            expect![[r#"
                good  cgroup2 is mounted  /sys/fs/cgroup
                BAD   BPF file system     not mounted
                      so: less is enforced
                      do: mount -t bpf bpf /sys/fs/bpf
                less  BPF LSM             bpf is not in lsm=
                      so: less is enforced
                      do: add bpf to lsm= on the kernel command line
                segfw cannot run here: 1 of 3 checks failed.
            "#]],
        );
    }

    #[test]
    fn numbers_and_times() {
        for (n, want) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(number(n), want);
        }
        let at = |s: i64| Timestamp::from_second(s).unwrap();
        for (s, want) in [(-5, "0s"), (59, "59s"), (61, "1m 1s"), (3661, "1h 1m"), (90_000, "1d 1h")] {
            assert_eq!(ago(at(0), at(s)), want);
        }
    }

    #[test]
    fn nothing_from_outside_moves_the_cursor() {
        let mut evil = fixed::workloads();
        evil[0].name = "\x1b[2J".to_owned();
        assert!(!anstream::adapter::strip_str(&workloads(&evil)).to_string().contains('\x1b'));
        assert!(workloads(&evil).contains("\\u{1b}[2J"));
    }
}
