//! What changed, what would, and what was: revisions and their differences.

use super::{Screen, ago, finding, number};
use crate::cli::change::{ApplyReport, ChangeReport};
use crate::control::report::{CaseReport, Finding, Held, PastReport};
use crate::flow::render::{BAD, Cell, Columns, DIM, GOOD, HEAD, PLAIN, WARN, clean, paint, time};
use crate::policy::difference::{Became, DocumentChange, PartChange};
use anstyle::Style;
use jiff::Timestamp;
use std::fmt::Write as _;

/// Changes of documents that are shown in full; a new host has hundreds, and nobody reads them.
const DOCUMENTS_SHOWN: usize = 50;
/// Values of one document.
const PARTS_SHOWN: usize = 20;
/// Workloads whose treatment changes.
const LOCALS_SHOWN: usize = 10;

fn style(became: Became) -> Style {
    match became {
        Became::Added => GOOD,
        Became::Removed => BAD,
        Became::Changed => WARN,
    }
}

fn plural(n: usize, what: &str) -> String {
    format!("{} {what}{}", number(n as u64), if n == 1 { "" } else { "s" })
}

/// Every finding on its lines.
pub(in crate::cli) fn findings(findings: &[Finding]) -> String {
    findings.iter().flat_map(finding).map(|line| line + "\n").collect()
}

/// A diff for reading: documents first, then what they mean for the tables.
pub(in crate::cli) fn changes(report: &ChangeReport) -> String {
    let ChangeReport { from, to, documents, entries_before, entries_after, tables } = report;
    let mut out = String::new();
    if report.is_empty() {
        let _ = writeln!(out, "{} from {} to {}", paint(GOOD, "no difference"), clean(from), clean(to));
        return out;
    }
    let _ = writeln!(out, "from {} to {}:", paint(HEAD, from), paint(HEAD, to));
    for change in documents.iter().take(DOCUMENTS_SHOWN) {
        document(&mut out, change);
    }
    if documents.len() > DOCUMENTS_SHOWN {
        let _ = writeln!(out, "  and {} more documents: -o json", number((documents.len() - DOCUMENTS_SHOWN) as u64));
    }
    let count = |became| documents.iter().filter(|d| d.became == became).count();
    let rules = |became| {
        let whole = |p: &&PartChange| p.became == became && p.path.starts_with("rules.") && p.path.ends_with(".action");
        documents.iter().flat_map(|d| &d.parts).filter(whole).count()
    };
    let mut s = Screen(out);
    s.line(
        "documents",
        &format!(
            "{} added, {} removed, {} changed",
            count(Became::Added),
            count(Became::Removed),
            count(Became::Changed)
        ),
    );
    s.line("rules", &format!("{} added, {} removed", rules(Became::Added), rules(Became::Removed)));
    let entries = |n: &Option<usize>| n.map_or_else(|| "?".to_owned(), |n| number(n as u64));
    s.line(
        "table entries",
        &format!(
            "{} -> {} ({} added, {} removed, {} with another answer)",
            entries(entries_before),
            entries(entries_after),
            number(tables.added.len() as u64),
            number(tables.removed.len() as u64),
            number(tables.changed.len() as u64)
        ),
    );
    for (n, local) in tables.locals.iter().enumerate() {
        if n == LOCALS_SHOWN {
            s.more(&format!("and {} more", tables.locals.len() - LOCALS_SHOWN));
            break;
        }
        if n == 0 { s.line("workloads", &clean(local)) } else { s.more(&clean(local)) }
    }
    s.0
}

fn document(out: &mut String, change: &DocumentChange) {
    let DocumentChange { became, kind, name, at, parts } = change;
    let head = format!("{} {kind} {name}", became.sign());
    let _ = writeln!(out, "{}  {}", paint(style(*became), &head), paint(DIM, at));
    let mut rule = "";
    for (n, PartChange { became, path, before, after }) in parts.iter().enumerate() {
        if n == PARTS_SHOWN {
            let _ = writeln!(out, "    and {} more: -o json", parts.len() - PARTS_SHOWN);
            break;
        }
        // A rule is a thing of its own: its values stand below its name.
        let (of, key) = match path.strip_prefix("rules.").and_then(|p| p.rsplit_once('.')) {
            Some((of, key)) => (of, key),
            None => ("", path.as_str()),
        };
        if !of.is_empty() && of != rule {
            let _ = writeln!(out, "    rule {}", clean(of));
        }
        rule = of;
        let value = match (before, after) {
            (Some(before), Some(after)) => format!("{} -> {}", clean(before), clean(after)),
            (Some(one), None) | (None, Some(one)) => clean(one),
            (None, None) => String::new(),
        };
        let indent = if of.is_empty() { 4 } else { 6 };
        let sign = paint(style(*became), &became.sign().to_string());
        let _ = writeln!(out, "{:indent$}{sign} {}: {value}", "", clean(key));
    }
}

/// What became of an apply, in two lines.
pub(in crate::cli) fn applied(report: &ApplyReport, same: bool) -> String {
    let mut out = String::new();
    let revision = report.revision.as_ref();
    if let Some(refused) = &report.refused {
        let _ = writeln!(out, "{}: {}", paint(BAD, "refused by the agent"), clean(&refused.why));
        out += &findings(&refused.problems);
        let stays = revision.map_or_else(
            || "nothing is in force, as before".to_owned(),
            |r| format!("revision {} is still in force", r.number),
        );
        let _ = writeln!(out, "{stays}; the policy folder is as it was");
        return out;
    }
    if let Some(r) = revision {
        let word = if same { "already in force" } else { "in force" };
        let _ = writeln!(
            out,
            "{}: revision {}, generation {}, {}",
            paint(GOOD, word),
            paint(HEAD, &r.number.to_string()),
            r.generation,
            plural(r.files.len(), "file")
        );
        if !same {
            let _ = writeln!(out, "back to what was before: {}", paint(HEAD, "segfw policy rollback"));
        }
    }
    out
}

/// Newest first.
pub(in crate::cli) fn history(all: &[PastReport]) -> String {
    if all.is_empty() {
        return "No revision is kept yet.\n".to_owned();
    }
    let now = Timestamp::now();
    let row = |p: &PastReport| -> Vec<Cell> {
        let PastReport { number: n, in_force, since, digest, source, files, bytes, damaged } = p;
        let mark = if *in_force { (GOOD, "in force".to_owned()) } else { (PLAIN, String::new()) };
        let Some(since) = since else {
            let why = damaged.as_deref().unwrap_or("damaged");
            return vec![
                (HEAD, n.to_string()),
                (BAD, "damaged".to_owned()),
                (PLAIN, "-".to_owned()),
                (PLAIN, "-".to_owned()),
                (PLAIN, "-".to_owned()),
                (PLAIN, why.to_owned()),
            ];
        };
        vec![
            (HEAD, n.to_string()),
            mark,
            (PLAIN, format!("{} ({} ago)", time(*since), ago(*since, now))),
            (DIM, digest.chars().take(12).collect()),
            (PLAIN, format!("{}, {}", plural(*files, "file"), plural(usize::try_from(*bytes).unwrap_or(0), "byte"))),
            (PLAIN, source.clone()),
        ]
    };
    let rows: Vec<Vec<Cell>> = all.iter().map(row).collect();
    Columns::default().with_head(&["REVISION", "", "SINCE", "DIGEST", "SIZE", "FROM"], &rows)
}

/// Each case on a line, then the sum.
pub(in crate::cli) fn cases(all: &[CaseReport]) -> String {
    let mut out = String::new();
    let mut test = "";
    for CaseReport { test: of, at, question, expect, by, held, found } in all {
        if of != test {
            let _ = writeln!(out, "{}", paint(HEAD, of));
            test = of;
        }
        let (style, word) = match held {
            Held::Yes => (GOOD, "holds"),
            Held::No => (BAD, "FAILS"),
            Held::NotAsked => (BAD, "cannot be asked"),
        };
        let by = by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
        let asked = format!("{} -> {} {}: {expect}{by}", question.from, question.to, question.port);
        let _ = writeln!(out, "  {} {}", paint(style, word), clean(&asked));
        if *held != Held::Yes {
            let _ = writeln!(out, "        at {}: {}", clean(&at.to_string()), clean(found));
        }
    }
    let bad = all.iter().filter(|c| c.held != Held::Yes).count();
    let (style, word) = if bad == 0 { (GOOD, "good") } else { (BAD, "not good") };
    let text = if all.is_empty() {
        "no Test document in it".to_owned()
    } else {
        format!("{} of {} hold", number((all.len() - bad) as u64), plural(all.len(), "case"))
    };
    let _ = writeln!(out, "{}: {text}", paint(style, word));
    out
}

/// What is in a support bundle, and what is not.
pub(in crate::cli) fn support(
    path: &std::path::Path,
    files: &[(String, String)],
    missing: &[(String, String)],
) -> String {
    let row = |(name, text): &(String, String)| -> Vec<Cell> {
        vec![(PLAIN, format!("  {name}")), (DIM, plural(text.len(), "byte"))]
    };
    let rows: Vec<Vec<Cell>> = files.iter().map(row).collect();
    let mut columns = Columns::default();
    // For the widths alone: there is no head.
    let _ = columns.with_head(&[], &rows);
    let mut out: String = rows.iter().map(|row| columns.row(row)).collect();
    for (name, why) in missing {
        let _ = writeln!(out, "  {} {}: {}", paint(WARN, "without"), clean(name), clean(why));
    }
    let _ = writeln!(
        out,
        "written to {} (mode 0600); secrets were taken out, addresses and labels were not: look through it before you \
         send it",
        paint(HEAD, &path.display().to_string())
    );
    out
}
