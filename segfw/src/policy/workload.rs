//! Which Workload documents a cgroup belongs to, and which labels that gives it.

use super::container::{ContainerFacts, PodFacts};
use super::document::{LabelGlobs, Matcher, WorkloadDoc};
use super::host_policy::{Labels, Position};
use super::problem::{Problem, quote};
use foldhash::{HashMap, HashMapExt as _};
use std::collections::BTreeMap;

/// Bytes of one glob. A cgroup path has at most 4,096, and no one writes such a pattern.
const GLOB_BYTES: usize = 1_024;

/// A pattern, and what it compiles to. A backslash is itself, since systemd escapes with it (`foo\x2dbar.service`).
#[derive(Clone, Debug)]
pub struct Glob {
    pub text: String,
    /// `None` = it has no wildcard, as most have none: compared as text, and nothing to keep. Every cgroup is tried on every
    /// pattern, so this is what a host with a thousand workloads pays for.
    matcher: Option<globset::GlobMatcher>,
}

/// What has a meaning of its own in a glob.
const WILDCARDS: [char; 6] = ['*', '?', '[', ']', '{', '}'];

impl Glob {
    /// `path`: `*` stops at `/`, `**` does not.
    pub fn new(text: &str, path: bool) -> Result<Self, String> {
        if text.is_empty() {
            return Err("empty never means all: write \"*\"".into());
        }
        if text.len() > GLOB_BYTES {
            return Err(format!("a glob has at most {GLOB_BYTES} bytes"));
        }
        if !text.contains(WILDCARDS) {
            return Ok(Self { text: text.to_owned(), matcher: None });
        }
        let glob = globset::GlobBuilder::new(text)
            .literal_separator(path)
            .backslash_escape(false)
            .build()
            .map_err(|error| error.kind().to_string())?;
        Ok(Self { text: text.to_owned(), matcher: Some(glob.compile_matcher()) })
    }
    pub fn matches(&self, text: &str) -> bool {
        self.matcher.as_ref().map_or(self.text == text, |matcher| matcher.is_match(text))
    }
}

/// What is known of one cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupFacts {
    /// From the root of the cgroup tree, such as `/system.slice/nginx.service`.
    pub path: String,
    /// The systemd unit that the cgroup is.
    pub unit: Option<UnitFacts>,
    /// The container whose cgroup it is, or is in.
    pub container: Option<ContainerFacts>,
    /// The pod whose cgroup it is, or is in; that of the container if `None`.
    pub pod: Option<PodFacts>,
}

impl CgroupFacts {
    /// The pod, by itself or by its container.
    pub fn pod(&self) -> Option<&PodFacts> {
        self.pod.as_ref().or_else(|| self.container.as_ref()?.pod.as_ref())
    }
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
        glob.matches(&self.name) || self.services().iter().flatten().any(|service| glob.matches(service))
    }

    /// Of a socket unit: its service, as a unit and as a template.
    fn services(&self) -> Option<[String; 2]> {
        let socket = self.name.strip_suffix(".socket")?;
        Some([format!("{socket}.service"), format!("{socket}@.service")])
    }
}

/// True where there is no glob, or it matches. What is not known matches nothing, not even `*`.
fn holds(glob: Option<&Glob>, text: &str) -> bool {
    glob.is_none_or(|glob| !text.is_empty() && glob.matches(text))
}

/// Every label is there, with a value that its glob matches.
fn have(globs: &LabelGlobs, labels: &BTreeMap<String, String>) -> bool {
    globs.iter().all(|(key, glob)| labels.get(key).is_some_and(|value| glob.matches(value)))
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
            Matcher::Container { image, name, runtime, labels } => facts.container.as_ref().is_some_and(|c| {
                image.as_ref().is_none_or(|glob| c.image_names().any(|name| glob.matches(name)))
                    && holds(name.as_ref(), &c.name)
                    && runtime.is_none_or(|kind| kind == c.runtime)
                    && have(labels, &c.labels)
            }),
            Matcher::Pod { namespace, name, labels } => facts.pod().is_some_and(|pod| {
                namespace.as_ref().is_none_or(|n| *n == pod.namespace)
                    && holds(name.as_ref(), &pod.name)
                    && have(labels, &pod.labels)
            }),
        })
    }
}

/// Workload documents, and which of them a cgroup must be tried on: every cgroup that is made is looked up, and most of a
/// thousand documents name one unit or one path.
#[derive(Clone, Debug, Default)]
pub struct Workloads {
    docs: Vec<WorkloadDoc>,
    /// Documents by the units and paths that they name without a wildcard.
    by_name: HashMap<String, Vec<usize>>,
    /// Those that name something else.
    others: Vec<usize>,
}

impl From<Vec<WorkloadDoc>> for Workloads {
    fn from(docs: Vec<WorkloadDoc>) -> Self {
        let (mut by_name, mut others) = (HashMap::<String, Vec<usize>>::new(), Vec::new());
        for (i, doc) in docs.iter().enumerate() {
            let names: Option<Vec<&str>> = doc.matches.iter().map(|m| m.value.literal()).collect();
            match names {
                Some(names) => names.into_iter().for_each(|name| by_name.entry(name.to_owned()).or_default().push(i)),
                None => others.push(i),
            }
        }
        Self { docs, by_name, others }
    }
}

impl std::ops::Deref for Workloads {
    type Target = [WorkloadDoc];
    fn deref(&self) -> &Self::Target {
        &self.docs
    }
}

impl Workloads {
    /// The documents that match, in the order of their names: independent of files and their order.
    fn matching(&self, facts: &CgroupFacts) -> Vec<&WorkloadDoc> {
        let mut tried = self.others.clone();
        let mut named = |name: &str| tried.extend(self.by_name.get(name).into_iter().flatten());
        named(&facts.path);
        if let Some(unit) = &facts.unit {
            named(&unit.name);
            unit.services().iter().flatten().for_each(|service| named(service));
        }
        tried.sort_unstable();
        tried.dedup();
        let mut found: Vec<_> = tried.into_iter().map(|i| &self.docs[i]).filter(|d| d.is_match(facts)).collect();
        found.sort_by(|a, b| a.meta.name.cmp(&b.meta.name));
        found
    }
}

impl Matcher {
    /// The unit or path without which it cannot match; `None` = it is a pattern, or about something else.
    fn literal(&self) -> Option<&str> {
        match self {
            Self::SystemdUnit(glob) | Self::SystemdUserUnit { unit: glob, .. } | Self::Cgroup(glob) => {
                glob.matcher.is_none().then_some(&glob.text)
            }
            Self::Container { .. } | Self::Pod { .. } => None,
        }
    }
}

/// The names of the documents that match (joined with `+`), and the labels they give: over those of the host, and the
/// first name wins where two disagree (see [`conflicts`]). `None` = no workload.
pub fn labels_for(docs: &Workloads, facts: &CgroupFacts, host_labels: &Labels) -> Option<(String, Labels)> {
    let found = docs.matching(facts);
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
pub fn conflicts(docs: &Workloads, facts: &CgroupFacts) -> Vec<Problem> {
    let mut first: BTreeMap<&str, (&str, &WorkloadDoc)> = BTreeMap::new();
    let mut problems = Vec::new();
    for doc in docs.matching(facts) {
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
    use crate::policy::container::Kind;
    use crate::policy::document::{Document, parse};

    fn docs(text: &str) -> Workloads {
        let (documents, problems) = parse(&[("w.yaml".into(), text)]);
        assert!(problems.is_empty(), "{problems:?}");
        let workloads = documents.into_iter().filter_map(|d| match d {
            Document::Workload(d) => Some(d),
            Document::Segment(_) | Document::Policy(_) | Document::Test(_) => None,
        });
        workloads.collect::<Vec<_>>().into()
    }
    fn doc(name: &str, matcher: &str, labels: &str) -> String {
        format!(
            "---\n{{apiVersion: segfw.dev/v1, kind: Workload, metadata: {{name: {name}}}, spec: {{match: [{{{matcher}}}], labels: {{{labels}}}}}}}\n"
        )
    }

    #[test]
    fn a_pattern_without_wildcards_is_its_text() {
        let texts =
            ["nginx.service", "/a.slice/b.service", r"foo\x2dbar.service", "a,b", "!a", "a-b", "ä", "/a//b/", "."];
        for path in [false, true] {
            for text in texts {
                assert!(Glob::new(text, path).unwrap().matcher.is_none());
                let mut real = globset::GlobBuilder::new(text);
                let real = real.literal_separator(path).backslash_escape(false).build().unwrap().compile_matcher();
                for other in texts.iter().map(|t| t.to_string()).chain(texts.map(|t| format!("{t}x"))) {
                    assert_eq!(Glob::new(text, path).unwrap().matches(&other), real.is_match(&other), "{text} {other}");
                }
            }
        }
        for text in ["*", "a?", "[ab]", "{a,b}"] {
            assert!(Glob::new(text, false).unwrap().matcher.is_some(), "{text}");
        }
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
            let facts = CgroupFacts { path: path.into(), unit: unit.map(UnitFacts::system), ..CgroupFacts::default() };
            assert_eq!(labels_for(&docs, &facts, &Labels::new()).is_some(), hit, "{matcher} {path}");
        }
    }

    #[test]
    fn a_document_that_is_not_tried_does_not_match() {
        let matchers = [
            "systemdUnit: web.service",
            "systemdUnit: web@.service",
            "systemdUnit: web.socket",
            r#"systemdUnit: "we*.service""#,
            "systemdUserUnit: {unit: web.service, user: '7'}",
            "cgroup: /a/web.service",
            r#"cgroup: "/a/*""#,
            r#"container: {name: "*"}"#,
            // One of two is a pattern.
            r#"cgroup: /b}, {cgroup: "/c*""#,
            "cgroup: /b}, {systemdUnit: db.service",
        ];
        let text: String = matchers.iter().enumerate().map(|(i, m)| doc(&format!("w{i:02}"), m, "app: w")).collect();
        let docs = docs(&text);
        let user = |uid| Some(UserFacts { uid, name: None });
        let mut hits = 0;
        for path in ["/a/web.service", "/b", "/c1", "/x"] {
            for unit in ["web.service", "web.socket", "web@.service", "web@1.service", "wex.service", "db.socket", ""] {
                for user in [None, user(7), user(8)] {
                    let unit = (!unit.is_empty()).then(|| UnitFacts { name: unit.to_owned(), user });
                    let facts = CgroupFacts { path: path.into(), unit, ..CgroupFacts::default() };
                    let names = |docs: Vec<&WorkloadDoc>| docs.iter().map(|d| d.meta.name.clone()).collect::<Vec<_>>();
                    let all = names(docs.iter().filter(|d| d.is_match(&facts)).collect());
                    assert_eq!(names(docs.matching(&facts)), all, "{facts:?}");
                    hits += all.len();
                }
            }
        }
        assert!(hits > 80, "{hits}");
    }

    #[test]
    fn containers_and_pods_hit_and_miss() {
        let mut container = ContainerFacts::new(Kind::Docker, "1".into(), 0);
        container.name = "shop-db-1".into();
        container.image = "docker.io/library/postgres:16".into();
        container.aliases = vec!["corp.example/pg:1".into()];
        container.labels = [("com.docker.compose.service", "db"), ("note", "a b"), ("flag", "")]
            .map(|(k, v)| (k.into(), v.into()))
            .into();
        let pod = PodFacts {
            namespace: "payments".into(),
            name: "db-0".into(),
            uid: "u".into(),
            labels: [("app".into(), "payments-db".into())].into(),
        };
        let in_pod = ContainerFacts {
            name: "db".into(),
            pod: Some(pod.clone()),
            ..ContainerFacts::new(Kind::Containerd, "2".into(), 0)
        };
        let docker = CgroupFacts { container: Some(container), ..CgroupFacts::default() };
        let kube = CgroupFacts { container: Some(in_pod), ..CgroupFacts::default() };
        let slice = CgroupFacts { pod: Some(pod), ..CgroupFacts::default() };
        // Who is matched: the container of Docker, the one in a pod, the pod's own cgroup.
        for (matcher, hits) in [
            (r#"container: {image: "*/postgres:*"}"#, [true, false, false]),
            (r#"container: {image: "postgres:16"}"#, [true, false, false]),
            (r#"container: {image: "postgres"}"#, [false, false, false]),
            (r#"container: {image: "library/postgres:16"}"#, [false, false, false]),
            (r#"container: {image: "corp.example/*"}"#, [true, false, false]),
            // The image of the other is not known.
            (r#"container: {image: "*"}"#, [true, false, false]),
            (r#"container: {name: "*"}"#, [true, true, false]),
            (r#"container: {name: "shop-db-[0-9]"}"#, [true, false, false]),
            (r#"container: {name: "shop-db-[0-9]", image: "*/mysql:*"}"#, [false, false, false]),
            (r#"container: {runtime: docker}"#, [true, false, false]),
            (r#"container: {runtime: containerd}"#, [false, true, false]),
            (r#"container: {labels: {com.docker.compose.service: db}}"#, [true, false, false]),
            (r#"container: {labels: {note: "a *", flag: "*"}}"#, [true, false, false]),
            (r#"container: {labels: {note: "a *", absent: "*"}}"#, [false, false, false]),
            // A label of the pod is none of its container.
            (r#"container: {labels: {app: payments-db}}"#, [false, false, false]),
            (r#"pod: {namespace: payments}"#, [false, true, true]),
            (r#"pod: {namespace: payments, labels: {app: payments-*}}"#, [false, true, true]),
            (r#"pod: {namespace: payment}"#, [false, false, false]),
            (r#"pod: {name: "db-*"}"#, [false, true, true]),
            (r#"pod: {name: "db-*", labels: {app: web}}"#, [false, false, false]),
        ] {
            let docs = docs(&doc("w", matcher, "app: w"));
            let found = [&docker, &kube, &slice].map(|f| labels_for(&docs, f, &Labels::new()).is_some());
            assert_eq!(found, hits, "{matcher}");
            assert!(labels_for(&docs, &CgroupFacts::default(), &Labels::new()).is_none());
        }
    }

    #[test]
    fn labels_merge_and_the_first_name_wins() {
        let docs =
            docs(&(doc("b", r#"cgroup: "/x/*""#, "app: b, tier: db") + &doc("a", r#"cgroup: "/x/y""#, "app: a")));
        let facts = CgroupFacts { path: "/x/y".into(), ..CgroupFacts::default() };
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
