//! From the folder to tables: one revision, refused whole or taken whole. And what must survive a restart.

use super::registry::Registry;
use crate::control::report::{Finding, Refused};
use crate::control::trial;
use crate::policy::compile::{Amendment, Clock, Ends, PortLists, amend, compile_whole};
use crate::policy::document::{Cache, Document, WorkloadDoc, parse_again};
use crate::policy::host_policy::{Labels, Rule};
use crate::policy::resolve;
use crate::policy::tables::Numbers;
use crate::policy::{self, HostPolicy, HostSettings, Inventory, Problem, Tables};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use crate::policy::load::Files;

/// A revision that passed every test short of the kernel.
pub struct Candidate {
    /// As read.
    pub files: Files,
    /// Digest of the files.
    pub digest: String,
    /// Names resolved.
    pub policy: HostPolicy,
    /// Compiled.
    pub tables: Tables,
    /// What is not wrong but odd.
    pub warnings: Vec<Finding>,
    /// What a change of a few rules is compiled from.
    pub basis: Basis,
}

/// What a revision was compiled from, beside its policy.
#[derive(Default)]
pub struct Basis {
    /// As read.
    pub documents: Vec<Arc<Document>>,
    /// Label sets that the tables know.
    pub sets: Vec<Labels>,
    /// Port lists of its rules.
    pub lists: PortLists,
    /// The ends of its rules.
    pub ends: Ends,
}

/// A revision in which only a few rules are others, compiled alone.
pub struct Change {
    /// By policy: all its rules.
    pub rules: BTreeMap<String, Vec<Rule>>,
    /// What differs in the tables.
    pub amendment: Amendment,
    /// After the change, but for the label sets and the ends of rules.
    pub basis: Basis,
}

/// What these documents change in a revision of which `policy`, `tables` and `basis` are left. `None` = it must be built as
/// a whole: more than a few rules changed, or something is wrong with it. New rules get numbers in any case: a number that
/// is given and not used means nothing, and to copy all of them takes longer than the change.
pub fn change(
    documents: &[Arc<Document>],
    (policy, tables, basis): (&HostPolicy, &Tables, &Basis),
    registry: &Registry,
    numbers: &mut Numbers,
    clock: Clock,
) -> Option<Change> {
    // A timeline that was cut short is to be written on.
    if tables.refresh_at.is_some() || !registry.needs_only(&basis.sets) {
        return None;
    }
    let rules = resolve::changed_rules(policy, &basis.documents, documents)?;
    let held = (policy, &basis.ends);
    let (amendment, lists) = amend(held, tables, &basis.lists, &basis.sets, &rules, numbers, clock)?;
    let basis = Basis { documents: documents.to_vec(), lists, ..Basis::default() };
    Some(Change { rules, amendment, basis })
}

/// The documents that say which processes carry which labels.
pub fn workload_documents<D: Borrow<Document>>(documents: &[D]) -> Vec<WorkloadDoc> {
    let found = documents.iter().filter_map(|d| match d.borrow() {
        Document::Workload(doc) => Some(doc.clone()),
        Document::Segment(_) | Document::Policy(_) | Document::Test(_) => None,
    });
    found.collect()
}

/// Both clocks at one moment.
pub fn clock() -> std::io::Result<Clock> {
    Ok(Clock { boot_ns: crate::host::proc::boot_ns()?, wall: Timestamp::now() })
}

/// Parses, resolves and compiles files against the tree as it is. The registry gets the new documents only if all is well.
/// `read` are the files of the last time: only what differs is parsed.
pub fn build(
    files: Files,
    read: &mut Cache,
    registry: &mut Registry,
    numbers: &mut Numbers,
    monitor: bool,
    clock: Clock,
) -> Result<Candidate, Refused> {
    let read = parse_again(&files, read);
    build_read(files, read, registry, numbers, monitor, clock)
}

/// [`build`] of files whose documents, and the problems with them, are known.
pub fn build_read(
    files: Files,
    (documents, problems): (Vec<Arc<Document>>, Vec<Problem>),
    registry: &mut Registry,
    numbers: &mut Numbers,
    monitor: bool,
    clock: Clock,
) -> Result<Candidate, Refused> {
    let refuse = |why: &str, problems: Vec<Finding>| Refused { at: clock.wall, why: why.to_owned(), problems };
    let mut candidate = registry.without_documents();
    let inventory = |documents: &[Arc<Document>]| {
        candidate.set_documents(workload_documents(documents));
        Inventory { workloads: candidate.known() }
    };
    let (documents, policy, problems) =
        resolve::judged(documents, problems, inventory, &HostSettings { monitor }, clock.wall);
    let mut findings: Vec<Finding> = problems.iter().map(Finding::from).collect();
    findings.extend(candidate.conflicts().iter().map(Finding::from));
    if problems.errors() != 0 {
        return Err(refuse("the policy has errors", findings));
    }
    let mut next = numbers.clone();
    // The label sets of before too: a cgroup that changes hands is known under its old labels until it does.
    let mut sets: BTreeSet<_> = candidate.label_sets().into_iter().collect();
    sets.extend(registry.label_sets());
    let sets: Vec<_> = sets.into_iter().collect();
    let (tables, lists) = compile_whole(&policy, &sets, &[], &mut next, clock)
        .map_err(|problems| refuse("the policy does not fit", problems.iter().map(Finding::from).collect()))?;
    // What must hold is tried on the labels that are here and on those that the cases name.
    let cases = trial::run(&policy, &documents, &sets, registry.host_labels(), clock)
        .map_err(|problems| refuse("the policy does not fit", problems.iter().map(Finding::from).collect()))?;
    let failed = trial::findings(&cases);
    if !failed.is_empty() {
        let why = format!("{} of {} test cases of the policy failed", failed.len(), cases.len());
        return Err(refuse(&why, failed));
    }
    *numbers = next;
    *registry = candidate;
    let digest = policy::digest(&files);
    let basis = Basis { documents, sets, lists, ends: Ends::of(&policy) };
    Ok(Candidate { files, digest, policy, tables, warnings: findings, basis })
}

/// What the agent keeps on disk. The numbers belong to the pinned maps: `maps` is the id of one of them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Saved {
    /// Kernel's id of the map CONTROL when this was written.
    pub maps: u32,
    /// Meaning of the numbers that sockets and counters hold.
    pub numbers: Numbers,
    /// Counts up with each revision in force.
    pub revision: u64,
    /// The last revision in force: used where the folder has none that is whole.
    pub files: Files,
}

/// Where the state is.
pub struct Store {
    path: PathBuf,
}

impl Store {
    /// In `dir`, which is made when something is saved (mode 0700). A folder that cannot be used keeps nobody from
    /// starting: after a boot that would leave the host open.
    pub fn new(dir: &Path) -> Self {
        Self { path: dir.join("state.json") }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// What was saved; `None` = nothing, or nothing that can be read (then it is said why).
    pub fn load(&self) -> (Option<Saved>, Option<String>) {
        match std::fs::read(&self.path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => (None, None),
            Err(e) => (None, Some(format!("{}: {e}", self.path.display()))),
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(saved) => (Some(saved), None),
                Err(e) => (None, Some(format!("{} is damaged: {e}", self.path.display()))),
            },
        }
    }

    /// Writes aside, flushes, renames, flushes the folder: after a power cut the old or the new state is there, whole.
    pub fn save(&self, saved: &Saved) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = self.dir();
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let aside = self.path.with_extension("new");
        write_whole(&aside, saved)?;
        std::fs::rename(&aside, &self.path)?;
        std::fs::File::open(dir)?.sync_all()
    }
}

/// Bytes that are written at once.
const WRITE: usize = 1 << 16;

/// Writes a value as JSON, piece by piece (it is as large as the policy), and flushes it to the disk. Mode 0600.
pub(super) fn write_whole(path: &Path, value: &impl Serialize) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let mut out = std::io::BufWriter::with_capacity(WRITE, file);
    serde_json::to_writer(&mut out, value)?;
    out.into_inner()?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_state_is_said_and_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert!(matches!(store.load(), (None, None)));
        let mut saved = Saved { revision: 7, ..Saved::default() };
        let _ = saved.numbers.rule("p", "r");
        store.save(&saved).unwrap();
        assert_eq!(store.load().0.unwrap().revision, 7);
        let whole = std::fs::read(&store.path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&store.path, &whole[..cut]).unwrap();
            let (saved, why) = store.load();
            assert!(saved.is_none() && why.is_some(), "cut at {cut}");
        }
    }

    #[test]
    fn a_revision_whose_tests_fail_is_refused() {
        let text = |expect: &str| {
            format!(
                "apiVersion: segfw.dev/v1\nkind: Segment\nmetadata: {{name: web}}\nspec: {{select: {{app: web}}}}\n---\n\
                 apiVersion: segfw.dev/v1\nkind: Test\nmetadata: {{name: closed}}\nspec:\n  cases:\n  \
                 - {{from: world, to: {{app: web}}, port: tcp/80, expect: {expect}}}\n"
            )
        };
        let clock = Clock { wall: "2026-01-01T00:00:00Z".parse().unwrap(), boot_ns: 1 };
        let mut numbers = Numbers::default();
        let mut read = Cache::default();
        let mut take = |expect| {
            let files = vec![("a.yaml".into(), text(expect).into())];
            build(files, &mut read, &mut Registry::default(), &mut numbers, false, clock)
        };
        assert!(take("deny").is_ok());
        let refused = take("allow").err().unwrap();
        assert_eq!(refused.why, "1 of 1 test cases of the policy failed");
        let said = &refused.problems[0];
        assert!(said.message.contains("expected allow, but the answer is DENIED: ingress by segment-default of web"));
        assert_eq!(said.at.as_ref().map(|at| at.line), Some(11), "{said:?}");
    }

    #[test]
    fn a_bad_revision_leaves_registry_and_numbers_alone() {
        let good = "apiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {name: web}\nspec:\n  match: [{systemdUnit: nginx.service}]\n  labels: {app: web}\n";
        let clock = Clock { wall: "2026-01-01T00:00:00Z".parse().unwrap(), boot_ns: 1 };
        let (mut registry, mut numbers) = (Registry::default(), Numbers::default());
        let mut read = Cache::default();
        let _ = build(vec![("a.yaml".into(), good.into())], &mut read, &mut registry, &mut numbers, false, clock)
            .ok()
            .unwrap();
        let before = (registry.label_sets(), numbers.clone());
        let bad = good.replace("labels:", "lables:");
        let refused = build(vec![("a.yaml".into(), bad.into())], &mut read, &mut registry, &mut numbers, false, clock)
            .err()
            .unwrap();
        assert_eq!(refused.why, "the policy has errors");
        assert!(
            refused.problems.iter().any(|p| p.help.as_deref().is_some_and(|h| h.contains("labels"))),
            "{refused:?}"
        );
        assert_eq!(before, (registry.label_sets(), numbers));
    }
}
