//! From the folder to tables: one revision, refused whole or taken whole. And what must survive a restart.

use super::registry::Registry;
use crate::control::report::{Finding, Refused};
use crate::policy::compile::{Clock, compile};
use crate::policy::document::{Document, WorkloadDoc};
use crate::policy::tables::Numbers;
use crate::policy::{self, HostPolicy, HostSettings, Inventory, Tables};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Files as they were read: name relative to the folder, and text.
pub type Files = Vec<(String, String)>;

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
}

/// The documents that say which processes carry which labels.
pub fn workload_documents(documents: &[Document]) -> Vec<WorkloadDoc> {
    let found = documents.iter().filter_map(|d| match d {
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
pub fn build(
    files: Files,
    registry: &mut Registry,
    numbers: &mut Numbers,
    monitor: bool,
    clock: Clock,
) -> Result<Candidate, Refused> {
    let refuse = |why: &str, problems: Vec<Finding>| Refused { at: clock.wall, why: why.to_owned(), problems };
    let mut trial = registry.without_documents();
    let inventory = |documents: &[Document]| {
        trial.set_documents(workload_documents(documents));
        Inventory { workloads: trial.known() }
    };
    let (_, policy, problems) = policy::read(&files, inventory, &HostSettings { monitor }, clock.wall);
    let mut findings: Vec<Finding> = problems.iter().map(Finding::from).collect();
    findings.extend(trial.conflicts().iter().map(Finding::from));
    if problems.errors() != 0 {
        return Err(refuse("the policy has errors", findings));
    }
    let mut next = numbers.clone();
    // The label sets of before too: a cgroup that changes hands is known under its old labels until it does.
    let mut sets: BTreeSet<_> = trial.label_sets().into_iter().collect();
    sets.extend(registry.label_sets());
    let sets: Vec<_> = sets.into_iter().collect();
    let tables = compile(&policy, &sets, &[], &mut next, clock)
        .map_err(|problems| refuse("the policy does not fit", problems.iter().map(Finding::from).collect()))?;
    *numbers = next;
    *registry = trial;
    let digest = policy::digest(&files);
    Ok(Candidate { files, digest, policy, tables, warnings: findings })
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
        use std::io::Write;
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
        let dir = self.path.parent().unwrap_or(Path::new("."));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let aside = self.path.with_extension("new");
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(&serde_json::to_vec(saved)?)?;
        file.sync_all()?;
        std::fs::rename(&aside, &self.path)?;
        std::fs::File::open(dir)?.sync_all()
    }
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
    fn a_bad_revision_leaves_registry_and_numbers_alone() {
        let good = "apiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {name: web}\nspec:\n  match: [{systemdUnit: nginx.service}]\n  labels: {app: web}\n";
        let clock = Clock { wall: "2026-01-01T00:00:00Z".parse().unwrap(), boot_ns: 1 };
        let (mut registry, mut numbers) = (Registry::default(), Numbers::default());
        let _ = build(vec![("a.yaml".into(), good.into())], &mut registry, &mut numbers, false, clock).ok().unwrap();
        let before = (registry.label_sets(), numbers.clone());
        let bad = good.replace("labels:", "lables:");
        let refused = build(vec![("a.yaml".into(), bad)], &mut registry, &mut numbers, false, clock).err().unwrap();
        assert_eq!(refused.why, "the policy has errors");
        assert!(
            refused.problems.iter().any(|p| p.help.as_deref().is_some_and(|h| h.contains("labels"))),
            "{refused:?}"
        );
        assert_eq!(before, (registry.label_sets(), numbers));
    }
}
