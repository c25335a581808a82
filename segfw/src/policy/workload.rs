//! Which Workload documents a cgroup belongs to, and which labels that gives it.

use super::document::{Matcher, WorkloadDoc};
use super::host_policy::{Labels, Position};
use super::problem::{Problem, quote};
use std::collections::BTreeMap;

/// Bytes of one glob. A cgroup path has at most 4,096, and no one writes such a pattern.
const GLOB_BYTES: usize = 1_024;

/// A pattern, and what it compiles to. A backslash is itself, since systemd escapes with it (`foo\x2dbar.service`).
#[derive(Clone, Debug)]
pub struct Glob {
    pub text: String,
    matcher: globset::GlobMatcher,
}

impl Glob {
    /// `path`: `*` stops at `/`, `**` does not.
    pub fn new(text: &str, path: bool) -> Result<Self, String> {
        if text.is_empty() {
            return Err("empty never means all: write \"*\"".into());
        }
        if text.len() > GLOB_BYTES {
            return Err(format!("a glob has at most {GLOB_BYTES} bytes"));
        }
        let glob = globset::GlobBuilder::new(text)
            .literal_separator(path)
            .backslash_escape(false)
            .build()
            .map_err(|error| error.kind().to_string())?;
        Ok(Self { text: text.to_owned(), matcher: glob.compile_matcher() })
    }
    pub fn matches(&self, text: &str) -> bool {
        self.matcher.is_match(text)
    }
}

/// What is known of one cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupFacts {
    /// From the root of the cgroup tree, such as `/system.slice/nginx.service`.
    pub path: String,
    /// The systemd unit that the cgroup is.
    pub unit: Option<UnitFacts>,
}

/// A systemd unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitFacts {
    /// Such as `nginx.service`.
    pub name: String,
    /// Of whose manager; `None` = of the system's.
    pub user: Option<UserFacts>,
}

/// A user with a systemd of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserFacts {
    pub uid: u32,
    /// `None` = the user database does not know the number.
    pub name: Option<String>,
}

impl UnitFacts {
    /// Of the system's manager.
    pub fn system(name: &str) -> Self {
        Self { name: name.to_owned(), user: None }
    }

    /// Does a pattern for services mean this unit? A socket unit is its service: systemd makes the listener in the cgroup
    /// of `foo.socket`, and what `foo.service` accepts from it stays there. With `Accept=yes` the service is a template.
    fn is(&self, glob: &Glob) -> bool {
        if glob.matches(&self.name) {
            return true;
        }
        let Some(socket) = self.name.strip_suffix(".socket") else { return false };
        glob.matches(&format!("{socket}.service")) || glob.matches(&format!("{socket}@.service"))
    }
}

impl WorkloadDoc {
    pub fn is_match(&self, facts: &CgroupFacts) -> bool {
        self.matches.iter().any(|m| match &m.value {
            Matcher::SystemdUnit(glob) => facts.unit.as_ref().is_some_and(|unit| unit.user.is_none() && unit.is(glob)),
            Matcher::SystemdUserUnit { unit: glob, user } => facts.unit.as_ref().is_some_and(|unit| {
                let of = |u: &UserFacts| {
                    user.matches(&u.uid.to_string()) || u.name.as_deref().is_some_and(|n| user.matches(n))
                };
                unit.is(glob) && unit.user.as_ref().is_some_and(of)
            }),
            Matcher::Cgroup(glob) => glob.matches(&facts.path),
            // Containers are not discovered yet; the parser warned.
            Matcher::Container { .. } | Matcher::Pod { .. } => false,
        })
    }
}

/// The documents that match, in the order of their names: independent of files and their order.
fn matching<'d>(docs: &'d [WorkloadDoc], facts: &CgroupFacts) -> Vec<&'d WorkloadDoc> {
    let mut found: Vec<_> = docs.iter().filter(|d| d.is_match(facts)).collect();
    found.sort_by(|a, b| a.meta.name.cmp(&b.meta.name));
    found
}

/// The names of the documents that match (joined with `+`), and the labels they give: over those of the host, and the
/// first name wins where two disagree (see [`conflicts`]). `None` = no workload.
pub fn labels_for(docs: &[WorkloadDoc], facts: &CgroupFacts, host_labels: &Labels) -> Option<(String, Labels)> {
    let found = matching(docs, facts);
    if found.is_empty() {
        return None;
    }
    let mut labels = host_labels.clone();
    // Backwards, so that the first name is written last.
    for doc in found.iter().rev() {
        labels.extend(doc.labels.clone());
    }
    Some((found.iter().map(|d| d.meta.name.as_str()).collect::<Vec<_>>().join("+"), labels))
}

/// Where documents that match the same cgroup disagree about a label.
pub fn conflicts(docs: &[WorkloadDoc], facts: &CgroupFacts) -> Vec<Problem> {
    let mut first: BTreeMap<&str, (&str, &WorkloadDoc)> = BTreeMap::new();
    let mut problems = Vec::new();
    for doc in matching(docs, facts) {
        for (key, value) in &doc.labels {
            let (other, by) = *first.entry(key).or_insert((value, doc));
            if other != value {
                let Position { file, line, column } = &by.meta.at;
                let what = format!(
                    "{} and {} give {} different values of {}",
                    by.meta.name,
                    doc.meta.name,
                    quote(&facts.path),
                    quote(key)
                );
                let why = format!(
                    "{} from {file}:{line}:{column} is in force, not {}: the first name wins",
                    quote(other),
                    quote(value)
                );
                problems.push(Problem::warning(doc.meta.at.clone(), what, why));
            }
        }
    }
    problems
}

/// Directories whose children are claimed by patterns such as `/machine.slice/pg-*`, sorted: a cgroup below one that
/// no document matches is unresolved, never open. The longest directory without a wildcard, and never the root.
pub fn managed_parents(docs: &[WorkloadDoc]) -> Vec<String> {
    let wild = |c: char| matches!(c, '*' | '?' | '[' | '{');
    let mut parents: Vec<String> = docs
        .iter()
        .flat_map(|d| &d.matches)
        .filter_map(|m| match &m.value {
            Matcher::Cgroup(glob) => Some(glob.text.as_str()),
            Matcher::SystemdUnit(_)
            | Matcher::SystemdUserUnit { .. }
            | Matcher::Container { .. }
            | Matcher::Pod { .. } => None,
        })
        .filter(|text| text.rsplit('/').next().is_some_and(|last| last.contains(wild)))
        .filter_map(|text| {
            let first_wild = text.find(wild)?;
            let (parent, _) = text.get(..first_wild)?.rsplit_once('/')?;
            (!parent.is_empty()).then(|| parent.to_owned())
        })
        .collect();
    parents.sort();
    parents.dedup();
    parents
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::document::{Document, parse};

    fn docs(text: &str) -> Vec<WorkloadDoc> {
        let (documents, problems) = parse(&[("w.yaml".into(), text.into())]);
        assert!(problems.is_empty(), "{problems:?}");
        documents
            .into_iter()
            .filter_map(|d| match d {
                Document::Workload(d) => Some(d),
                Document::Segment(_) | Document::Policy(_) | Document::Test(_) => None,
            })
            .collect()
    }
    fn doc(name: &str, matcher: &str, labels: &str) -> String {
        format!(
            "---\n{{apiVersion: segfw.dev/v1, kind: Workload, metadata: {{name: {name}}}, spec: {{match: [{{{matcher}}}], labels: {{{labels}}}}}}}\n"
        )
    }

    #[test]
    fn globs_hit_and_miss() {
        for (matcher, path, unit, hit) in [
            (r#"systemdUnit: "postgresql@*.service""#, "/x", Some("postgresql@15-main.service"), true),
            (r#"systemdUnit: "postgresql@*.service""#, "/x", Some("postgresql.service"), false),
            (r#"systemdUnit: "*""#, "/x", None, false),
            ("systemdUnit: web.service", "/x", Some("web.socket"), true),
            (r#"systemdUnit: "web@*.service""#, "/x", Some("web.socket"), true),
            ("systemdUnit: web.service", "/x", Some("webx.socket"), false),
            ("systemdUserUnit: {unit: web.service, user: root}", "/x", Some("web.service"), false),
            (r#"cgroup: "/machine.slice/pg-*""#, "/machine.slice/pg-1", None, true),
            (r#"cgroup: "/machine.slice/pg-*""#, "/machine.slice/pg-1/child", None, false),
            (r#"cgroup: "/machine.slice/pg-*""#, "/machine.slice/pgx", None, false),
            (r#"cgroup: "/machine.slice/**""#, "/machine.slice/pg-1/child", None, true),
            (r#"cgroup: "/a/**/z""#, "/a/b/c/z", None, true),
            (r#"cgroup: '/system.slice/foo\x2dbar.service'"#, r"/system.slice/foo\x2dbar.service", None, true),
            (r#"cgroup: "/a/{b,c}""#, "/a/c", None, true),
        ] {
            let docs = docs(&doc("w", matcher, "app: w"));
            let facts = CgroupFacts { path: path.into(), unit: unit.map(UnitFacts::system) };
            assert_eq!(labels_for(&docs, &facts, &Labels::new()).is_some(), hit, "{matcher} {path}");
        }
    }

    #[test]
    fn labels_merge_and_the_first_name_wins() {
        let docs =
            docs(&(doc("b", r#"cgroup: "/x/*""#, "app: b, tier: db") + &doc("a", r#"cgroup: "/x/y""#, "app: a")));
        let facts = CgroupFacts { path: "/x/y".into(), unit: None };
        let host = Labels::from([("zone".into(), "eu".into()), ("tier".into(), "host".into())]);
        let (name, labels) = labels_for(&docs, &facts, &host).unwrap();
        assert_eq!(
            (name.as_str(), crate::policy::tables::canonical(&labels)),
            ("a+b", "app=a,tier=db,zone=eu".to_owned())
        );
        let told: Vec<_> = conflicts(&docs, &facts).iter().map(ToString::to_string).collect();
        expect_test::expect![[r#"w.yaml:2:61: warning: a and b give "/x/y" different values of "app" ("a" from w.yaml:4:61 is in force, not "b": the first name wins)"#]].assert_eq(&told.join("\n"));
    }

    #[test]
    fn parents_of_patterns() {
        for (pattern, expect) in [
            ("/machine.slice/pg-*", Some("/machine.slice")),
            ("/machine.slice/**", Some("/machine.slice")),
            ("/kube/*/pod-*", Some("/kube")),
            ("/a/b/[xy]", Some("/a/b")),
            ("/system.slice/nginx.service", None),
            ("/a/*/b", None),
            ("/pg-*", None),
        ] {
            let docs = docs(&doc("w", &format!("cgroup: \"{pattern}\""), "app: w"));
            assert_eq!(managed_parents(&docs).first().map(String::as_str), expect, "{pattern}");
        }
    }
}
