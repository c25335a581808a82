//! The documents as a person wrote them: four kinds, each value checked by itself, every problem at once.
//!
//! What needs a second document to judge (is there such a segment?) is the business of `resolve`.

use super::container::Kind;
use super::host_policy::{
    Labels, Members, OnRevoke, PortSpec, Position, Requirement, RuleAction, Schedule, Selector, Tier,
};
use super::problem::{Fault, PROBLEMS_PER_FILE, Problem, nearest, quote};
use super::schema::{self, Map};
use super::selector::{LABEL_CHARS, check_key, check_value, is_word};
use super::workload::Glob;
use super::yaml::{self, Node, Text, Value};
use super::{ports, schedule, selector};
use foldhash::{HashMap, HashMapExt as _};
use ipnet::IpNet;
use jiff::Timestamp;
use segfw_common::{Evidence, LocalEntry};
use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

/// The only version of the language.
pub const API_VERSION: &str = "segfw.dev/v1";
/// Names that stand for ends of their own, so no segment can have them.
pub const RESERVED: [&str; 4] = ["any", "world", "host", "unresolved"];
/// Of a policy that names none, so that one can be put before and behind it.
pub const DEFAULT_PRIORITY: u16 = 500;
pub(super) const LAST_PRIORITY: u16 = 1000;
/// Longest time that revoked connections may live on (seconds): thirty days.
const DRAIN_S_MAX: u64 = 30 * 86_400;
/// Matchers of one Workload. Each is a pattern to compile, and to try on every new cgroup.
const MATCHERS: usize = 1_024;

/// Bytes of the key of a container's label: what a Kubernetes label may have, `prefix/name`.
const LABEL_KEY_BYTES: usize = 253 + 1 + LABEL_CHARS;

pub(super) const TIERS: [(&str, Tier); 5] = [
    ("emergency", Tier::Emergency),
    ("security", Tier::Security),
    ("platform", Tier::Platform),
    ("application", Tier::Application),
    ("baseline", Tier::Baseline),
];
pub(super) const ACTIONS: [(&str, RuleAction); 4] = [
    ("allow", RuleAction::Allow),
    ("deny", RuleAction::Deny),
    ("reject", RuleAction::Reject),
    ("pass", RuleAction::Pass),
];
pub(super) const MODES: [(&str, bool); 2] = [("enforce", false), ("monitor", true)];
/// True = TCP alone.
pub(super) const SOCKETS: [(&str, bool); 2] = [("tcp-udp", false), ("tcp", true)];
pub(super) const DENY_ALLOW: [(&str, bool); 2] = [("deny", false), ("allow", true)];
pub(super) const LOGS: [(&str, bool); 2] = [("new", true), ("none", false)];
pub(super) const IDENTITIES: [(&str, Evidence); 2] =
    [("exact", Evidence::Address), ("authenticated", Evidence::Origin)];
pub(super) const GRANTS: [(&str, u32); 9] = [
    ("ping", LocalEntry::GRANT_PING),
    ("raw", LocalEntry::GRANT_RAW),
    ("sctp", LocalEntry::GRANT_SCTP),
    ("udplite", LocalEntry::GRANT_UDPLITE),
    ("dccp", LocalEntry::GRANT_DCCP),
    ("mptcp", LocalEntry::GRANT_MPTCP),
    ("packet", LocalEntry::GRANT_PACKET),
    ("vsock", LocalEntry::GRANT_VSOCK),
    ("families", LocalEntry::GRANT_FAMILIES),
];

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At<T> {
    pub value: T,
    pub at: Position,
}

#[derive(Clone, Debug)]
pub enum Document {
    Workload(WorkloadDoc),
    Segment(SegmentDoc),
    Policy(PolicyDoc),
    Test(TestDoc),
}

impl Document {
    pub fn meta(&self) -> &Metadata {
        match self {
            Self::Workload(d) => &d.meta,
            Self::Segment(d) => &d.meta,
            Self::Policy(d) => &d.meta,
            Self::Test(d) => &d.meta,
        }
    }
    /// The word after `kind:`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Workload(_) => "Workload",
            Self::Segment(_) => "Segment",
            Self::Policy(_) => "Policy",
            Self::Test(_) => "Test",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Metadata {
    /// Unique within its kind.
    pub name: String,
    pub owner: Option<String>,
    pub description: Option<String>,
    pub labels: Labels,
    /// Of the name.
    pub at: Position,
}

/// Which processes carry which labels.
#[derive(Clone, Debug)]
pub struct WorkloadDoc {
    pub meta: Metadata,
    /// Any of them.
    pub matches: Vec<At<Matcher>>,
    pub labels: Labels,
}

#[derive(Clone, Debug)]
pub enum Matcher {
    /// A unit of the system's manager.
    SystemdUnit(Glob),
    /// A unit of a user's manager. The user is named, since each can give their units any name.
    SystemdUserUnit { unit: Glob, user: Glob },
    /// The path of the cgroup from its root, beginning with `/`.
    Cgroup(Glob),
    /// At least one of them is there, and all that are there hold.
    Container { image: Option<Glob>, name: Option<Glob>, runtime: Option<Kind>, labels: LabelGlobs },
    /// At least one of them is there, and all that are there hold.
    Pod { namespace: Option<String>, name: Option<Glob>, labels: LabelGlobs },
}

/// Labels that a container or pod must have, each with a value that the glob matches.
pub type LabelGlobs = Vec<(String, Glob)>;

#[derive(Clone, Debug)]
pub struct SegmentDoc {
    pub meta: Metadata,
    /// `None` = it was written, but wrongly, and that has been said.
    pub members: Option<At<Members>>,
    pub default_ingress_allow: bool,
    pub default_egress_allow: bool,
    pub monitor: bool,
    pub unresolved_allow: bool,
    pub on_revoke: OnRevoke,
    pub grants: u32,
    /// No UDP sockets.
    pub tcp_only: bool,
}

#[derive(Clone, Debug)]
pub struct PolicyDoc {
    pub meta: Metadata,
    pub tier: Tier,
    pub priority: u16,
    pub monitor: bool,
    /// Only those without a mistake.
    pub rules: Vec<RuleDoc>,
}

#[derive(Clone, Debug)]
pub struct RuleDoc {
    pub name: Arc<str>,
    /// Position in its policy, from 0.
    pub index: u32,
    pub from: Vec<At<PeerDoc>>,
    pub to: Vec<At<PeerDoc>>,
    /// Empty = every protocol and port.
    pub ports: Vec<At<PortSpec>>,
    pub action: RuleAction,
    pub require: Evidence,
    pub expires: Option<At<Timestamp>>,
    pub schedule: Option<Schedule>,
    pub log: bool,
    pub at: Position,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerDoc {
    /// Of a segment, not looked up yet.
    Named(String),
    Select(Selector),
    Addresses(Vec<IpNet>),
    Any,
    World,
    Host,
    Unresolved,
}

/// What the policy must say about some connections.
#[derive(Clone, Debug)]
pub struct TestDoc {
    pub meta: Metadata,
    pub cases: Vec<CaseDoc>,
}

#[derive(Clone, Debug)]
pub struct CaseDoc {
    pub from: CaseEnd,
    pub to: CaseEnd,
    /// One port: `first` is `last`.
    pub port: PortSpec,
    /// True = allowed.
    pub allow: bool,
    /// The rule that must decide: `rule` or `policy/rule`.
    pub by: Option<At<String>>,
    pub at: Position,
}

/// One end of a connection in a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaseEnd {
    Labels(Labels),
    Address(IpAddr),
    World,
    Host,
    Unresolved,
}

/// Text to documents. All problems at once; the order of the files has no meaning.
pub fn parse<T: AsRef<str> + Sync>(files: &[(String, T)]) -> (Vec<Document>, Vec<Problem>) {
    let (files, problems) = that_fit(files);
    let parsed = parse_files(&files, |_| None);
    let (documents, problems) = whole(&parsed, problems);
    drop(parsed);
    // Nobody else has them any more.
    (documents.into_iter().map(Arc::unwrap_or_clone).collect(), problems)
}

/// What files said when they were read last, so that a change of one file costs the reading of one file. Holds what the
/// last call of [`parse_again`] was given, and no more.
#[derive(Debug, Default)]
pub struct Cache(HashMap<String, (Arc<str>, Arc<Parsed>)>);

/// One file, read by itself.
#[derive(Debug)]
struct Parsed {
    /// In the order of the text; where each begins, and `None` = it has mistakes.
    documents: Vec<(Position, Option<Arc<Document>>)>,
    problems: Vec<Problem>,
}

impl Parsed {
    fn new(file: &str, text: &str) -> Self {
        let file: Arc<str> = file.into();
        let (mut documents, mut problems) = (Vec::new(), Vec::new());
        yaml::read(&file, text, &mut problems, |root, problems| {
            if matches!(root.value, Value::Nothing) {
                return;
            }
            let at = root.at(&file);
            // What will not be counted need not be understood.
            let document = (documents.len() < yaml::DOCUMENTS).then(|| Reader::new(&file, problems).document(&root));
            documents.push((at, document.flatten().map(Arc::new)));
        });
        documents.shrink_to_fit();
        Self { documents, problems }
    }
}

/// Bytes of text that are worth a thread: below it, starting one takes longer than reading.
const WORTH_A_THREAD: usize = 1 << 20;
/// Threads that read at most: the host has other work, and beyond these what follows takes most of the time.
const THREADS: usize = 8;

/// As [`parse`], and reads only what is not as it was in `cache`. A text that is the same one is not even compared.
pub fn parse_again(files: &[(String, Arc<str>)], cache: &mut Cache) -> (Vec<Arc<Document>>, Vec<Problem>) {
    let (files, problems) = that_fit(files);
    let before = std::mem::take(&mut cache.0);
    let parsed = parse_files(&files, |(name, text)| {
        let (known, parsed) = before.get(name)?;
        (Arc::ptr_eq(known, text) || known == text).then(|| Arc::clone(parsed))
    });
    let read = whole(&parsed, problems);
    cache.0 = files.iter().zip(parsed).map(|((name, text), p)| (name.clone(), (Arc::clone(text), p))).collect();
    read
}

/// The files in the order of their names, as many as may be read.
fn that_fit<T: AsRef<str>>(files: &[(String, T)]) -> (Vec<&(String, T)>, Vec<Problem>) {
    let mut sorted: Vec<&(String, T)> = files.iter().collect();
    sorted.sort_by(|a, b| (&a.0, a.1.as_ref()).cmp(&(&b.0, b.1.as_ref())));
    let mut problems = Vec::new();
    let mut bytes = 0usize;
    let fits = sorted.iter().take_while(|(_, text)| {
        bytes = bytes.saturating_add(text.as_ref().len());
        bytes <= yaml::TOTAL_BYTES
    });
    let read = fits.count();
    if let Some((file, _)) = sorted.get(read) {
        let why = format!("all files together have at most {} bytes", yaml::TOTAL_BYTES);
        let start = Position { file: file.as_str().into(), line: 1, column: 1 };
        problems.push(Problem::error(start, "this file and those after it are not read", why));
    }
    sorted.truncate(read);
    (sorted, problems)
}

/// Documents and problems of all files, in their order.
fn whole(files: &[Arc<Parsed>], mut problems: Vec<Problem>) -> (Vec<Arc<Document>>, Vec<Problem>) {
    let mut documents = Vec::new();
    let mut names: HashMap<(&'static str, &str), &Position> = HashMap::new();
    let mut count = 0usize;
    for file in files {
        problems.extend(file.problems.iter().cloned());
        for (at, document) in &file.documents {
            count += 1;
            if count > yaml::DOCUMENTS {
                if count == yaml::DOCUMENTS + 1 {
                    let why = format!("all files together have at most {} documents", yaml::DOCUMENTS);
                    problems.push(Problem::error(at.clone(), "this document and those after it are not read", why));
                }
                continue;
            }
            let Some(document) = document else { continue };
            let meta = document.meta();
            match names.entry((document.kind(), meta.name.as_str())) {
                std::collections::hash_map::Entry::Vacant(entry) => {
                    let _ = entry.insert(&meta.at);
                    documents.push(Arc::clone(document));
                }
                std::collections::hash_map::Entry::Occupied(first) => {
                    let Position { file, line, column } = first.get();
                    let what = format!("two {} documents have the name {}", document.kind(), quote(&meta.name));
                    let why = format!("the first is at {file}:{line}:{column}");
                    problems.push(Problem::error(meta.at.clone(), what, why));
                }
            }
        }
    }
    (documents, problems)
}

/// Each file by itself, in the given order, on as many threads as there are processors. `known` = it was read before.
fn parse_files<T: AsRef<str> + Sync>(
    files: &[&(String, T)],
    known: impl Fn(&(String, T)) -> Option<Arc<Parsed>>,
) -> Vec<Arc<Parsed>> {
    let mut all: Vec<Option<Arc<Parsed>>> = files.iter().map(|file| known(file)).collect();
    let unknown: Vec<(usize, &(String, T))> =
        files.iter().copied().enumerate().filter(|(i, _)| all.get(*i).is_some_and(Option::is_none)).collect();
    let bytes: usize = unknown.iter().map(|(_, (_, text))| text.as_ref().len()).sum();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    for (i, parsed) in parse_each(&unknown, processors.min(THREADS).min(bytes / WORTH_A_THREAD)) {
        if let Some(place) = all.get_mut(i) {
            *place = Some(Arc::new(parsed));
        }
    }
    all.into_iter().flatten().collect()
}

/// Each file by itself, in any order; 0 threads = by the caller alone, as 1.
fn parse_each<T: AsRef<str> + Sync>(files: &[(usize, &(String, T))], threads: usize) -> Vec<(usize, Parsed)> {
    // Files differ in size: each thread takes the next one that nobody has taken.
    let next = std::sync::atomic::AtomicUsize::new(0);
    let take = || {
        let mut taken = Vec::new();
        loop {
            let place = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some((i, (name, text))) = files.get(place) else { return taken };
            taken.push((*i, Parsed::new(name, text.as_ref())));
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(take)).collect();
        let mut all = take();
        for other in others {
            match other.join() {
                Ok(taken) => all.extend(taken),
                // Not swallowed: half of the files would be another policy.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

/// Entry of the fuzzer: reads, resolves, and must neither panic nor take long, whatever the bytes.
pub fn fuzz_yaml(data: &[u8]) {
    let text = String::from_utf8_lossy(data).into_owned();
    let (documents, problems) = parse(&[("fuzz.yaml".to_owned(), text)]);
    let (policy, more) = super::resolve::resolve(
        &documents,
        &super::Inventory::default(),
        &super::HostSettings::default(),
        Timestamp::UNIX_EPOCH,
    );
    let _ = super::Problems::new(problems.into_iter().chain(more).collect()).to_string();
    let _ = format!("{policy:?}");
}

/// A map whose keys have been checked.
struct Fields<'n> {
    node: &'n Node<'n>,
    what: &'static str,
    entries: Vec<Entry<'n>>,
}

/// A key, the node that it is, and its value.
type Entry<'n> = (&'n Text<'n>, &'n Node<'n>, &'n Node<'n>);

/// Keys of a map that are compared with each other one by one.
const COMPARED: usize = 16;

impl<'n> Fields<'n> {
    fn get(&self, key: &str) -> Option<&'n Node<'n>> {
        self.entries.iter().find(|(text, _, _)| text.text == key).map(|(_, _, value)| *value)
    }
}

/// Typed readers over the tree. Each gives `None` after it has said what is wrong, so that the caller reads on.
struct Reader<'r> {
    file: &'r Arc<str>,
    problems: &'r mut Vec<Problem>,
    /// Problems that may still be told of this document.
    left: usize,
    /// The last one that is not told any more.
    untold: Option<Problem>,
}

impl<'r> Reader<'r> {
    fn new(file: &'r Arc<str>, problems: &'r mut Vec<Problem>) -> Self {
        Self { file, problems, left: PROBLEMS_PER_FILE, untold: None }
    }

    fn tell(&mut self, problem: Problem) -> &mut Problem {
        if self.left == 0 {
            return self.untold.insert(problem);
        }
        self.left -= 1;
        let index = self.problems.len();
        self.problems.push(problem);
        &mut self.problems[index]
    }

    fn say(&mut self, node: &Node<'_>, what: impl Into<String>, why: impl Into<String>) -> &mut Problem {
        self.tell(Problem::error(node.at(self.file), what, why))
    }

    fn say_inside(&mut self, node: &Node<'_>, text: &Text<'_>, fault: Fault) {
        let _ = self.tell(yaml::inside(&node.at(self.file), text, fault));
    }

    /// The value is not what it must be.
    fn not(&mut self, node: &Node<'_>, what: &str, expected: &str) {
        let found = match &node.value {
            Value::Broken => return,
            Value::Nothing => {
                let _ = self.say(node, format!("{what} has no value"), format!("expected {expected}"));
                return;
            }
            Value::Text(t) => format!("the text {}", quote(&t.text)),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        };
        let _ = self.say(node, format!("{what} is {found}"), format!("expected {expected}"));
    }

    fn text<'n>(&mut self, node: &'n Node<'n>, what: &str, expected: &str) -> Option<&'n Text<'n>> {
        match &node.value {
            Value::Text(text) => Some(text),
            Value::List(_) | Value::Map(_) | Value::Nothing | Value::Broken => {
                self.not(node, what, expected);
                None
            }
        }
    }

    /// A list with something in it.
    fn list<'n>(&mut self, node: &'n Node<'n>, what: &str, expected: &str) -> Option<&'n [Node<'n>]> {
        match &node.value {
            Value::List(items) if items.is_empty() => {
                let problem = self.say(node, format!("{what} is an empty list"), "empty never means all");
                problem.help = match what {
                    "ports" => Some("leave ports out for every protocol and port".to_owned()),
                    "from" | "to" => Some("write [any] for everybody".to_owned()),
                    _ => None,
                };
                None
            }
            Value::List(items) => Some(items),
            Value::Text(text) => {
                let shown = quote(&text.text);
                let problem = self.say(node, format!("{what} is the text {shown}"), format!("expected {expected}"));
                problem.help = Some(format!("write [{}]", shown.trim_matches('"')));
                None
            }
            Value::Map(_) | Value::Nothing | Value::Broken => {
                self.not(node, what, expected);
                None
            }
        }
    }

    /// A map whose keys are all text and different.
    fn entries<'n>(&mut self, node: &'n Node<'n>, what: &str) -> Option<Vec<Entry<'n>>> {
        let Value::Map(entries) = &node.value else {
            self.not(node, what, "a map");
            return None;
        };
        // Most maps have a few keys: then to compare them costs less than a table of them.
        let mut many: Option<HashMap<&str, u32>> = (entries.len() > COMPARED).then(HashMap::new);
        let mut found: Vec<Entry<'n>> = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            if self.left == 0 {
                break;
            }
            let Value::Text(text) = &key.value else {
                self.not(key, "a key", "text; quotes help where it is meant");
                continue;
            };
            let before = match &many {
                None => found.iter().find(|(other, _, _)| other.text == text.text).map(|(_, other, _)| other.line),
                Some(lines) => lines.get(&*text.text).copied(),
            };
            if text.text == "<<" {
                let _ =
                    self.say(key, "merge keys (<<) are not supported", "what is in force must be written where it is");
            } else if let Some(line) = before {
                let why = format!("it was given in line {line} already");
                let _ = self.say(key, format!("duplicate key {}", quote(&text.text)), why);
            } else {
                if let Some(lines) = &mut many {
                    let _ = lines.insert(&text.text, key.line);
                }
                found.push((text, key, value));
            }
        }
        Some(found)
    }

    /// A map with the keys that the language has for it.
    fn fields<'n>(&mut self, node: &'n Node<'n>, map: &'static Map) -> Option<Fields<'n>> {
        let what = map.what;
        let mut entries = self.entries(node, what)?;
        entries.retain(|(text, key, _)| {
            let known = map.field(&text.text).is_some();
            if !known {
                let near = nearest(&text.text, map.keys()).map(|k| format!("did you mean {}?", quote(k)));
                let why = format!("{what} has {}", map.list());
                self.say(key, format!("unknown key {}", quote(&text.text)), why).help = near;
            }
            known
        });
        Some(Fields { node, what, entries })
    }

    fn required<'n>(&mut self, fields: &Fields<'n>, key: &str) -> Option<&'n Node<'n>> {
        let found = fields.get(key);
        if found.is_none() {
            let _ = self.say(fields.node, format!("{} has no {key}", fields.what), "it must be there");
        }
        found
    }

    fn word<T: Copy>(&mut self, node: &Node<'_>, what: &str, words: &[(&'static str, T)]) -> Option<T> {
        if let Value::Text(text) = &node.value
            && let Some((_, value)) = words.iter().find(|(w, _)| *w == text.text)
        {
            return Some(*value);
        }
        let known = words.iter().map(|(w, _)| *w).collect::<Vec<_>>().join(", ");
        let text = self.text(node, what, &format!("one of {known}"))?;
        {
            let near =
                nearest(&text.text, words.iter().map(|(w, _)| *w)).map(|w| format!("did you mean {}?", quote(w)));
            self.say(node, format!("unknown {what} {}", quote(&text.text)), format!("known: {known}")).help = near;
        }
        None
    }

    /// The word of an optional key: `None` only after a mistake.
    fn word_or<T: Copy>(
        &mut self,
        fields: &Fields<'_>,
        key: &'static str,
        words: &[(&'static str, T)],
        default: T,
    ) -> Option<T> {
        fields.get(key).map_or(Some(default), |node| self.word(node, key, words))
    }

    fn name<'n>(&mut self, node: &'n Node<'n>, what: &str) -> Option<&'n str> {
        let text = &*self.text(node, what, "a name")?.text;
        if text.len() > LABEL_CHARS || !is_word(text) {
            let why = "a name has 1 to 63 letters, digits, '-', '_' or '.', and begins and ends with a letter or digit";
            let _ = self.say(node, format!("bad {what} {}", quote(text)), why);
            return None;
        }
        Some(text)
    }

    fn document(&mut self, root: &Node<'_>) -> Option<Document> {
        const KINDS: [(&str, &str); 4] =
            [("Workload", "Workload"), ("Segment", "Segment"), ("Policy", "Policy"), ("Test", "Test")];
        let fields = self.fields(root, &schema::DOCUMENT)?;
        if let Some(node) = self.required(&fields, "apiVersion")
            && let Some(text) = self.text(node, "apiVersion", API_VERSION)
            && text.text != API_VERSION
        {
            let near = Some(format!("write {API_VERSION}"));
            self.say(node, format!("unknown apiVersion {}", quote(&text.text)), "this program reads one version")
                .help = near;
        }
        let kind = self.required(&fields, "kind").and_then(|node| self.word(node, "kind", &KINDS));
        let meta = self.required(&fields, "metadata").and_then(|node| self.metadata(node));
        let spec = self.required(&fields, "spec");
        let (kind, spec) = (kind?, spec?);
        if kind == "Segment"
            && let Some(meta) = &meta
            && RESERVED.contains(&meta.name.as_str())
        {
            let what = format!("the name {} is reserved", quote(&meta.name));
            let _ = self.tell(Problem::error(
                meta.at.clone(),
                what,
                "any, world, host and unresolved have meanings of their own",
            ));
        }
        // The body is read even where the name is wrong, so that its problems are told too.
        let meta_or = meta.clone().unwrap_or_else(|| Metadata {
            name: String::new(),
            owner: None,
            description: None,
            labels: Labels::new(),
            at: root.at(self.file),
        });
        let document = match kind {
            "Workload" => self.workload(spec, meta_or).map(Document::Workload),
            "Segment" => self.segment(spec, meta_or).map(Document::Segment),
            "Policy" => self.policy(spec, meta_or).map(Document::Policy),
            _ => self.test(spec, meta_or).map(Document::Test),
        };
        meta.and(document)
    }

    fn metadata(&mut self, node: &Node<'_>) -> Option<Metadata> {
        let fields = self.fields(node, &schema::METADATA)?;
        let owner = fields.get("owner").and_then(|n| self.text(n, "owner", "text")).map(|t| t.text.to_string());
        let description =
            fields.get("description").and_then(|n| self.text(n, "description", "text")).map(|t| t.text.to_string());
        let labels = fields.get("labels").and_then(|n| self.labels(n, "labels")).unwrap_or_default();
        let name = self.required(&fields, "name")?;
        Some(Metadata { at: name.at(self.file), name: self.name(name, "name")?.to_owned(), owner, description, labels })
    }

    fn label_key(&mut self, node: &Node<'_>, text: &Text<'_>) -> Option<String> {
        match check_key(&text.text) {
            Ok(()) => Some(text.text.to_string()),
            Err(why) => {
                let _ = self.say(node, format!("bad label key {}", quote(&text.text)), why);
                None
            }
        }
    }

    fn label_value(&mut self, node: &Node<'_>) -> Option<String> {
        let text = self.text(node, "a label value", "text; an empty value is written \"\"")?;
        match check_value(&text.text) {
            Ok(()) => Some(text.text.to_string()),
            Err(why) => {
                let _ = self.say(node, format!("bad label value {}", quote(&text.text)), why);
                None
            }
        }
    }

    /// At least one label.
    fn labels(&mut self, node: &Node<'_>, what: &str) -> Option<Labels> {
        let entries = self.entries(node, what)?;
        if entries.is_empty() {
            let _ = self.say(node, format!("{what} is an empty map"), "empty never means all");
            return None;
        }
        let count = entries.len();
        let labels: Labels = entries
            .into_iter()
            .filter_map(|(text, key, value)| {
                let (key, value) = (self.label_key(key, text), self.label_value(value));
                Some((key?, value?))
            })
            .collect();
        (labels.len() == count).then_some(labels)
    }

    fn selector(&mut self, node: &Node<'_>) -> Option<Selector> {
        if let Value::Text(text) = &node.value {
            return match selector::parse(&text.text) {
                Ok(selector) => Some(selector),
                Err(fault) => {
                    self.say_inside(node, text, fault);
                    None
                }
            };
        }
        let before = self.problems.len();
        let entries = self.entries(node, "select")?;
        if entries.is_empty() {
            if self.problems.len() == before {
                self.say(node, "empty selector", "empty never means all").help =
                    Some("write any in a rule for everybody".into());
            }
            return None;
        }
        let mut requirements = Vec::new();
        for (text, key, value) in entries {
            let key = self.label_key(key, text);
            let requirement = match &value.value {
                Value::Text(t) if t.text == "*" => key.map(|key| Requirement::Exists { key }),
                Value::List(_) => self.list(value, "a list of label values", "a list").and_then(|items| {
                    let values: Vec<String> = items.iter().filter_map(|item| self.label_value(item)).collect();
                    (values.len() == items.len()).then_some(())?;
                    Some(Requirement::In { key: key?, values })
                }),
                Value::Text(_) | Value::Map(_) | Value::Nothing | Value::Broken => {
                    self.label_value(value).and_then(|value| Some(Requirement::In { key: key?, values: vec![value] }))
                }
            };
            requirements.extend(requirement);
        }
        (self.problems.len() == before).then_some(Selector(requirements))
    }

    fn addresses(&mut self, node: &Node<'_>) -> Option<Vec<IpNet>> {
        let items = self.list(node, "addresses", "a list of prefixes such as 203.0.113.0/24")?;
        let nets: Vec<IpNet> = items.iter().filter_map(|item| self.prefix(item)).collect();
        (nets.len() == items.len()).then_some(nets)
    }

    fn prefix(&mut self, node: &Node<'_>) -> Option<IpNet> {
        let text = &self.text(node, "an address", "a prefix such as 203.0.113.0/24")?.text;
        let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
        let Some(net) = net else {
            let _ =
                self.say(node, format!("bad prefix {}", quote(text)), "a prefix reads 203.0.113.0/24 or 2001:db8::/32");
            return None;
        };
        if let IpNet::V6(v6) = net
            && let Some(v4) = v6.addr().to_ipv4_mapped()
            && let Some(length) = v6.prefix_len().checked_sub(96)
        {
            let problem = self.say(
                node,
                format!("the prefix {} is IPv4 in IPv6 clothes", quote(text)),
                "both are one address here",
            );
            problem.help = Some(format!("write {v4}/{length}"));
            return None;
        }
        if net != net.trunc() {
            let problem =
                self.say(node, format!("the prefix {} has host bits set", quote(text)), "it says two things at once");
            problem.help = Some(format!("write {} or {}", net.trunc(), IpNet::from(net.addr())));
            return None;
        }
        Some(net)
    }

    fn workload(&mut self, spec: &Node<'_>, meta: Metadata) -> Option<WorkloadDoc> {
        let fields = self.fields(spec, &schema::WORKLOAD)?;
        let matches = self.required(&fields, "match").and_then(|node| {
            let items = self.list(node, "match", "a list of matchers")?;
            if items.len() > MATCHERS {
                let _ = self.say(
                    node,
                    format!("match has {} matchers", items.len()),
                    format!("at most {MATCHERS} are allowed"),
                );
                return None;
            }
            let matches: Vec<_> = items.iter().filter_map(|item| self.matcher(item)).collect();
            (matches.len() == items.len()).then_some(matches)
        });
        let labels = self.required(&fields, "labels").and_then(|node| self.labels(node, "labels"));
        Some(WorkloadDoc { meta, matches: matches?, labels: labels? })
    }

    fn matcher(&mut self, node: &Node<'_>) -> Option<At<Matcher>> {
        let fields = self.fields(node, &schema::MATCHER)?;
        let [(key, _, value)] = fields.entries.as_slice() else {
            let why = format!("each has exactly one of {}", schema::MATCHER.list());
            if !fields.entries.is_empty() || matches!(&node.value, Value::Map(m) if m.is_empty()) {
                let _ = self.say(node, format!("a matcher has {} keys", fields.entries.len()), why);
            }
            return None;
        };
        let value = match &*key.text {
            "systemdUnit" => Matcher::SystemdUnit(self.glob(value, "systemdUnit", false)?),
            "systemdUserUnit" => {
                let fields = self.fields(value, &schema::USER_UNIT)?;
                let unit = self.required(&fields, "unit").and_then(|n| self.glob(n, "unit", false));
                let user = self.required(&fields, "user").and_then(|n| self.glob(n, "user", false));
                Matcher::SystemdUserUnit { unit: unit?, user: user? }
            }
            "cgroup" => {
                let glob = self.glob(value, "cgroup", true)?;
                if !glob.text.starts_with('/') {
                    let fix = format!("write {}", quote(&format!("/{}", glob.text)));
                    self.say(
                        value,
                        format!("the cgroup {} does not begin with /", quote(&glob.text)),
                        "paths are from the root of the cgroup tree",
                    )
                    .help = Some(fix);
                    return None;
                }
                Matcher::Cgroup(glob)
            }
            "container" => self.container(value)?,
            _ => self.pod(value)?,
        };
        Some(At { value, at: node.at(self.file) })
    }

    fn container(&mut self, node: &Node<'_>) -> Option<Matcher> {
        let fields = self.fields(node, &schema::CONTAINER)?;
        if fields.entries.is_empty() {
            let why = format!("it has at least one of {}", schema::CONTAINER.list());
            let _ = self.say(node, "container says nothing", why);
            return None;
        }
        // All four before any of them may end it, so that every mistake is said.
        let image = fields.get("image").map(|n| self.glob(n, "image", false));
        let name = fields.get("name").map(|n| self.glob(n, "name", false));
        let runtime = fields.get("runtime").map(|n| self.word(n, "runtime", &Kind::WORDS));
        let labels = fields.get("labels").map(|n| self.label_globs(n));
        Some(Matcher::Container {
            image: image.map_or(Some(None), |i| i.map(Some))?,
            name: name.map_or(Some(None), |n| n.map(Some))?,
            runtime: runtime.map_or(Some(None), |r| r.map(Some))?,
            labels: labels.unwrap_or(Some(LabelGlobs::new()))?,
        })
    }

    fn pod(&mut self, node: &Node<'_>) -> Option<Matcher> {
        let fields = self.fields(node, &schema::POD)?;
        if fields.entries.is_empty() {
            let why = format!("it has at least one of {}", schema::POD.list());
            let _ = self.say(node, "pod says nothing", why);
            return None;
        }
        let namespace = fields.get("namespace").map(|n| self.name(n, "namespace").map(str::to_owned));
        let name = fields.get("name").map(|n| self.glob(n, "name", false));
        let labels = fields.get("labels").map(|n| self.label_globs(n));
        Some(Matcher::Pod {
            namespace: namespace.map_or(Some(None), |n| n.map(Some))?,
            name: name.map_or(Some(None), |n| n.map(Some))?,
            labels: labels.unwrap_or(Some(LabelGlobs::new()))?,
        })
    }

    /// Labels of containers and pods: those of containers may have any key, and values are globs.
    fn label_globs(&mut self, node: &Node<'_>) -> Option<LabelGlobs> {
        let entries = self.entries(node, "labels")?;
        if entries.is_empty() {
            let _ = self.say(node, "labels is an empty map", "empty never means all");
            return None;
        }
        let count = entries.len();
        let globs: LabelGlobs = entries
            .into_iter()
            .filter_map(|(text, key, value)| {
                let long = text.text.is_empty() || text.text.len() > LABEL_KEY_BYTES;
                if long {
                    let why = format!("the label of a container has 1 to {LABEL_KEY_BYTES} bytes");
                    let _ = self.say(key, "bad label key", why);
                }
                let glob = self.glob(value, "a label value", false);
                (!long).then_some((text.text.to_string(), glob?))
            })
            .collect();
        (globs.len() == count).then_some(globs)
    }

    fn glob(&mut self, node: &Node<'_>, what: &str, path: bool) -> Option<Glob> {
        let text = self.text(node, what, "a glob")?;
        match Glob::new(&text.text, path) {
            Ok(glob) => Some(glob),
            Err(why) => {
                let _ = self.say(node, format!("bad glob {}", quote(&text.text)), why);
                None
            }
        }
    }

    fn segment(&mut self, spec: &Node<'_>, meta: Metadata) -> Option<SegmentDoc> {
        let fields = self.fields(spec, &schema::SEGMENT)?;
        let members = match (fields.get("select"), fields.get("addresses")) {
            (Some(node), None) => {
                self.selector(node).map(|s| At { value: Members::Workloads(s), at: node.at(self.file) })
            }
            (None, Some(node)) => {
                for (Text { text: key, .. }, _, node) in
                    fields.entries.iter().filter(|(key, _, _)| key.text != "addresses")
                {
                    let _ = self.say(
                        node,
                        format!("{key} has no meaning here"),
                        "nothing is enforced at peers that run no agent",
                    );
                }
                self.addresses(node).map(|a| At { value: Members::Addresses(a), at: node.at(self.file) })
            }
            (Some(_), Some(node)) => {
                let _ =
                    self.say(node, "a segment has select and addresses", "it is a set of workloads or of addresses");
                None
            }
            (None, None) => {
                self.say(spec, "a segment has no members", "it has select or addresses").help = None;
                None
            }
        };
        let (mut default_ingress_allow, mut default_egress_allow) = (false, true);
        if let Some(node) = fields.get("default")
            && let Some(default) = self.fields(node, &schema::DEFAULTS)
        {
            default_ingress_allow =
                self.word_or(&default, "ingress", &DENY_ALLOW, default_ingress_allow).unwrap_or_default();
            default_egress_allow =
                self.word_or(&default, "egress", &DENY_ALLOW, default_egress_allow).unwrap_or_default();
        }
        let monitor = self.word_or(&fields, "mode", &MODES, false).unwrap_or_default();
        let unresolved_allow = self.word_or(&fields, "whenUnresolved", &DENY_ALLOW, false).unwrap_or_default();
        let on_revoke =
            fields.get("onRevoke").map_or(Some(OnRevoke::Cut), |n| self.on_revoke(n)).unwrap_or(OnRevoke::Cut);
        let grants = fields.get("grants").map_or(0, |node| {
            let items = self.list(node, "grants", "a list of socket types").unwrap_or_default();
            items.iter().filter_map(|item| self.word(item, "grant", &GRANTS)).fold(0, |all, bit| all | bit)
        });
        let tcp_only = self.word_or(&fields, "sockets", &SOCKETS, false).unwrap_or_default();
        Some(SegmentDoc {
            meta,
            members,
            default_ingress_allow,
            default_egress_allow,
            monitor,
            unresolved_allow,
            on_revoke,
            grants,
            tcp_only,
        })
    }

    fn on_revoke(&mut self, node: &Node<'_>) -> Option<OnRevoke> {
        const EXPECTED: &str = "cut, keep or {drain: 10m}";
        if let Value::Map(_) = node.value {
            let fields = self.fields(node, &schema::ON_REVOKE)?;
            let drain = self.required(&fields, "drain")?;
            let text = self.text(drain, "drain", "a duration such as 10m")?;
            return self.duration(drain, text, &text.text);
        }
        let text = self.text(node, "onRevoke", EXPECTED)?;
        match &*text.text {
            "cut" => Some(OnRevoke::Cut),
            "keep" => Some(OnRevoke::Keep),
            other => match other.strip_prefix("drain:") {
                Some(time) => self.duration(node, text, time.trim()),
                None => {
                    let near = match nearest(other, ["cut", "keep", "drain"]) {
                        Some("drain") => Some("write {drain: 10m}".to_owned()),
                        near => near.map(|w| format!("did you mean {}?", quote(w))),
                    };
                    self.say(node, format!("unknown onRevoke {}", quote(other)), format!("known: {EXPECTED}")).help =
                        near;
                    None
                }
            },
        }
    }

    fn duration(&mut self, node: &Node<'_>, _: &Text<'_>, text: &str) -> Option<OnRevoke> {
        match seconds(text).filter(|s| (1..=DRAIN_S_MAX).contains(s)) {
            Some(s) => Some(OnRevoke::Drain(s * 1_000_000_000)),
            None => {
                let _ = self.say(
                    node,
                    format!("bad duration {}", quote(text)),
                    "a duration reads 90s, 10m, 1h30m, from 1s to 30d",
                );
                None
            }
        }
    }

    fn policy(&mut self, spec: &Node<'_>, meta: Metadata) -> Option<PolicyDoc> {
        let fields = self.fields(spec, &schema::POLICY)?;
        let tier = self.word_or(&fields, "tier", &TIERS, Tier::Application).unwrap_or(Tier::Application);
        let priority =
            fields.get("priority").map_or(Some(DEFAULT_PRIORITY), |n| self.priority(n)).unwrap_or(DEFAULT_PRIORITY);
        let monitor = self.word_or(&fields, "mode", &MODES, false).unwrap_or_default();
        let items =
            self.required(&fields, "rules").and_then(|n| self.list(n, "rules", "a list of rules")).unwrap_or_default();
        let mut names: HashMap<Cow<'_, str>, u32> = HashMap::with_capacity(items.len());
        let mut rules = Vec::with_capacity(items.len());
        for (node, index) in items.iter().zip(0u32..) {
            // What nobody is told need not be found: suggestions are dear.
            if self.left == 0 {
                break;
            }
            let before = self.problems.len();
            let Some((name, rule)) = self.rule(node, index) else { continue };
            match names.get(&name) {
                None => {
                    let _ = names.insert(name, node.line);
                }
                Some(line) => {
                    let what = format!("there are two rules with the name {}", quote(&name));
                    let why = format!("the first begins in line {line}; flows and counters name rules");
                    let _ = self.say(node, what, why);
                }
            }
            if self.problems.len() == before {
                rules.extend(rule);
            }
        }
        Some(PolicyDoc { meta, tier, priority, monitor, rules })
    }

    fn priority(&mut self, node: &Node<'_>) -> Option<u16> {
        let text = &self.text(node, "priority", "a number from 0 to 1000")?.text;
        let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        let number = text.parse::<u16>().ok().filter(|n| plain && *n <= LAST_PRIORITY);
        if number.is_none() {
            let _ = self.say(
                node,
                format!("bad priority {}", quote(text)),
                "a priority is a number from 0 to 1000, lower first",
            );
        }
        number
    }

    /// The name, even where the rest is wrong, for the search of duplicates.
    fn rule<'n>(&mut self, node: &'n Node<'n>, index: u32) -> Option<(Cow<'n, str>, Option<RuleDoc>)> {
        let fields = self.fields(node, &schema::RULES)?;
        let name = fields.get("name").map_or_else(
            || Some(Cow::Owned(format!("rule-{}", index.saturating_add(1)))),
            |n| self.name(n, "rule name").map(Cow::Borrowed),
        )?;
        let from = self.required(&fields, "from").and_then(|n| self.peers(n, "from"));
        let to = self.required(&fields, "to").and_then(|n| self.peers(n, "to"));
        let ports = fields.get("ports").map_or(Some(Vec::new()), |n| {
            let items = self.list(n, "ports", "a list such as [tcp/443]")?;
            let ports: Vec<_> =
                items.iter().filter_map(|i| Some(At { value: self.port(i)?, at: i.at(self.file) })).collect();
            (ports.len() == items.len()).then_some(ports)
        });
        let action = self.required(&fields, "action").and_then(|n| self.word(n, "action", &ACTIONS));
        let require = fields.get("require").map_or(Some(Evidence::None), |n| self.require(n, action));
        let expires = match fields.get("expires") {
            None => Some(None),
            Some(n) => self.timestamp(n).map(|value| Some(At { value, at: n.at(self.file) })),
        };
        let schedule = match fields.get("schedule") {
            None => Some(None),
            Some(n) => self.schedule(n).map(Some),
        };
        let log = self.word_or(&fields, "log", &LOGS, true);
        let at = node.at(self.file);
        let rule = || {
            Some(RuleDoc {
                name: (*name).into(),
                index,
                from: from?,
                to: to?,
                ports: ports?,
                action: action?,
                require: require?,
                expires: expires?,
                schedule: schedule?,
                log: log?,
                at,
            })
        };
        let rule = rule();
        Some((name, rule))
    }

    fn require(&mut self, node: &Node<'_>, action: Option<RuleAction>) -> Option<Evidence> {
        let fields = self.fields(node, &schema::REQUIRE)?;
        if let Some(posture) = fields.get("posture") {
            let _ = self.say(
                posture,
                "posture is not supported by this version",
                "a demand that nobody checks would be a false promise",
            );
        }
        let identity = fields.get("identity").map(|n| self.word(n, "identity", &IDENTITIES));
        if fields.entries.is_empty() {
            let _ = self.say(node, "require demands nothing", "it has identity: exact or authenticated");
        }
        if action.is_some_and(|a| a != RuleAction::Allow) {
            let _ = self.say(node, "require has no meaning here", "it is what an allow demands of the peer");
        }
        identity?
    }

    fn timestamp(&mut self, node: &Node<'_>) -> Option<Timestamp> {
        let text = &self.text(node, "expires", "a time such as 2026-12-24T18:00:00Z")?.text;
        match text.parse() {
            Ok(time) => Some(time),
            Err(_) => {
                let problem = self.say(
                    node,
                    format!("bad time {}", quote(text)),
                    "a time reads 2026-12-24T18:00:00Z or with an offset, +01:00 (RFC 3339)",
                );
                // The commonest slip: no zone at all.
                problem.help =
                    format!("{text}Z").parse::<Timestamp>().ok().map(|t| format!("write {t} if UTC was meant"));
                None
            }
        }
    }

    fn schedule(&mut self, node: &Node<'_>) -> Option<Schedule> {
        let text = self.text(node, "schedule", "\"Mon-Fri 08:00-18:00 Europe/Amsterdam\"")?;
        match schedule::parse(&text.text) {
            Ok(schedule) => Some(schedule),
            Err(fault) => {
                self.say_inside(node, text, fault);
                None
            }
        }
    }

    fn port(&mut self, node: &Node<'_>) -> Option<PortSpec> {
        let text = self.text(node, "a port", "text such as tcp/443")?;
        match ports::parse(&text.text) {
            Ok(spec) => Some(spec),
            Err(fault) => {
                self.say_inside(node, text, fault);
                None
            }
        }
    }

    fn peers(&mut self, node: &Node<'_>, what: &str) -> Option<Vec<At<PeerDoc>>> {
        let items = self.list(node, what, "a list such as [web]")?;
        let peers: Vec<_> =
            items.iter().filter_map(|item| Some(At { value: self.peer(item)?, at: item.at(self.file) })).collect();
        (peers.len() == items.len()).then_some(peers)
    }

    fn peer(&mut self, node: &Node<'_>) -> Option<PeerDoc> {
        match &node.value {
            Value::Text(text) => Some(match &*text.text {
                "any" => PeerDoc::Any,
                "world" => PeerDoc::World,
                "host" => PeerDoc::Host,
                "unresolved" => PeerDoc::Unresolved,
                _ if text.text.parse::<IpNet>().is_ok() || text.text.parse::<IpAddr>().is_ok() => {
                    let shown = quote(&text.text);
                    let problem = self.say(
                        node,
                        format!("the peer {shown} is an address"),
                        "a bare word is the name of a segment",
                    );
                    problem.help = Some(format!("write {{addresses: [{}]}}", shown.trim_matches('"')));
                    return None;
                }
                _ => PeerDoc::Named(self.name(node, "segment name")?.to_owned()),
            }),
            Value::Map(_) => {
                let fields = self.fields(node, &schema::PEER)?;
                match (fields.get("select"), fields.get("addresses")) {
                    (Some(n), None) => self.selector(n).map(PeerDoc::Select),
                    (None, Some(n)) => self.addresses(n).map(PeerDoc::Addresses),
                    (Some(_), Some(_)) => {
                        let _ =
                            self.say(node, "a peer has select and addresses", "it has one of them; write two peers");
                        None
                    }
                    (None, None) => {
                        if matches!(&node.value, Value::Map(m) if m.is_empty()) {
                            let _ = self.say(node, "empty peer", "empty never means all: write any");
                        }
                        None
                    }
                }
            }
            Value::List(_) | Value::Nothing | Value::Broken => {
                self.not(node, "a peer", "the name of a segment, {select: ...}, {addresses: ...}, any, world or host");
                None
            }
        }
    }

    fn test(&mut self, spec: &Node<'_>, meta: Metadata) -> Option<TestDoc> {
        let fields = self.fields(spec, &schema::TEST)?;
        let cases = self.required(&fields, "cases")?;
        let items = self.list(cases, "cases", "a list of cases")?;
        let cases = items.iter().filter_map(|item| self.case(item)).collect();
        Some(TestDoc { meta, cases })
    }

    fn case(&mut self, node: &Node<'_>) -> Option<CaseDoc> {
        let fields = self.fields(node, &schema::CASE)?;
        let from = self.required(&fields, "from").and_then(|n| self.case_end(n, "from"));
        let to = self.required(&fields, "to").and_then(|n| self.case_end(n, "to"));
        let port = self.required(&fields, "port").and_then(|n| self.one_port(n));
        let allow = self.required(&fields, "expect").and_then(|n| self.word(n, "expect", &DENY_ALLOW));
        let by = match fields.get("by") {
            None => Some(None),
            Some(n) => self
                .text(n, "by", "the name of a rule")
                .map(|t| Some(At { value: t.text.to_string(), at: n.at(self.file) })),
        };
        Some(CaseDoc { from: from?, to: to?, port: port?, allow: allow?, by: by?, at: node.at(self.file) })
    }

    fn one_port(&mut self, node: &Node<'_>) -> Option<PortSpec> {
        let spec = self.port(node)?;
        let PortSpec { proto, first, last } = spec;
        // A type without a code: the code is nearly always 0.
        let icmp = matches!(proto, segfw_common::Proto::Icmp | segfw_common::Proto::Icmpv6);
        if first == last || icmp && last - first == 255 {
            return Some(PortSpec { last: first, ..spec });
        }
        let _ = self.say(node, format!("{} is more than one port", ports::show(&spec)), "a case is one connection");
        None
    }

    fn case_end(&mut self, node: &Node<'_>, what: &str) -> Option<CaseEnd> {
        let Value::Text(text) = &node.value else { return self.labels(node, what).map(CaseEnd::Labels) };
        match &*text.text {
            "world" => Some(CaseEnd::World),
            "host" => Some(CaseEnd::Host),
            "unresolved" => Some(CaseEnd::Unresolved),
            other => {
                let address = other.parse().ok().map(CaseEnd::Address);
                if address.is_none() {
                    let why = "an end is {label: value, ...}, an address, world, host or unresolved";
                    let near =
                        nearest(other, ["world", "host", "unresolved"]).map(|w| format!("did you mean {}?", quote(w)));
                    self.say(node, format!("unknown end {}", quote(other)), why).help = near;
                }
                address
            }
        }
    }
}

/// `1h30m` in seconds.
fn seconds(text: &str) -> Option<u64> {
    let mut total = 0u64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let unit = match rest.as_bytes().get(digits)? {
            b's' => 1,
            b'm' => 60,
            b'h' => 3_600,
            b'd' => 86_400,
            _ => return None,
        };
        total = total.checked_add(rest.get(..digits)?.parse::<u64>().ok()?.checked_mul(unit)?)?;
        rest = rest.get(digits + 1..)?;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_read_what_one_reads() {
        let text = |i: usize| {
            let spec = if i.is_multiple_of(3) { "selcet" } else { "select" };
            format!(
                "apiVersion: segfw.dev/v1\nkind: Segment\nmetadata: {{name: s{i}}}\nspec: {{{spec}: {{app: a{i}}}}}\n"
            )
        };
        let files: Vec<(String, String)> = (0..50).map(|i| (format!("{i:02}.yaml"), text(i))).collect();
        let all: Vec<(usize, &(String, String))> = files.iter().enumerate().collect();
        let read = |threads: usize| {
            let mut read = parse_each(&all, threads);
            read.sort_by_key(|(i, _)| *i);
            format!("{read:?}")
        };
        let one = read(1);
        assert!(one.contains("selcet") && one.contains("\"s49\""), "{one}");
        for threads in [0, 2, 7] {
            assert_eq!(read(threads), one);
        }
    }

    #[test]
    fn a_map_with_many_keys_and_one_with_few_find_what_is_twice() {
        for keys in [2, COMPARED, COMPARED + 1, 4 * COMPARED] {
            let labels: String = (0..keys).map(|i| format!("    k{i}: v\n")).collect();
            let text = format!(
                "apiVersion: segfw.dev/v1\nkind: Segment\nmetadata:\n  name: s\n  labels:\n{labels}    k1: w\nspec: {{select: {{a: b}}}}\n"
            );
            let (_, problems) = parse(&[("a.yaml".to_owned(), text)]);
            let told: Vec<String> = problems.iter().map(ToString::to_string).collect();
            let want = format!("a.yaml:{}:5: error: duplicate key \"k1\" (it was given in line 7 already)", 6 + keys);
            assert_eq!(told, [want]);
        }
    }
}
