//! Which cgroup is whose: the tree as it is, and what the policy's Workload documents say of it. Pure.

use crate::host::cgroup::Change;
use crate::policy::document::{Matcher, WorkloadDoc};
use crate::policy::host_policy::Labels;
use crate::policy::tables::Numbers;
use crate::policy::{CgroupFacts, Known, Problem, conflicts, labels_for, managed_parents};
use segfw_common::state::PathKey;
use segfw_common::{CgroupEntry, Identity, bounds};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A cgroup that a Workload document names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Of the documents that name it.
    pub name: String,
    /// Path from the root of the hierarchy.
    pub cgroup: String,
    /// Kernel's number of the cgroup.
    pub id: u64,
    /// Its labels.
    pub labels: Labels,
}

/// One cgroup of the tree.
#[derive(Clone, Debug)]
struct Node {
    id: u64,
    /// Names and labels that the documents give to the cgroup itself; kept, since globs are slow and batches are many.
    named: Option<(String, Labels)>,
}

/// The tree, and what it means.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    tree: BTreeMap<PathBuf, Node>,
    docs: Vec<WorkloadDoc>,
    managed: BTreeSet<PathBuf>,
    host_labels: Labels,
    /// Paths of workloads that ran here and may run again.
    remembered: BTreeSet<PathBuf>,
}

impl Registry {
    /// An empty tree.
    pub fn new(host_labels: Labels) -> Self {
        Self { host_labels, ..Self::default() }
    }

    /// Labels of every workload of this host.
    pub fn host_labels(&self) -> &Labels {
        &self.host_labels
    }

    /// A copy of another registry's tree.
    pub fn take_tree(&mut self, other: &Self) {
        self.tree = other.tree.clone();
        self.remembered = other.remembered.clone();
    }

    /// Other documents: every cgroup may mean something else now.
    pub fn set_documents(&mut self, docs: Vec<WorkloadDoc>) {
        self.managed = managed_parents(&docs).into_iter().map(PathBuf::from).collect();
        self.docs = docs;
        let mut tree = std::mem::take(&mut self.tree);
        for (path, node) in &mut tree {
            node.named = self.look(path);
            if node.named.is_some() {
                let _ = self.remembered.insert(path.clone());
            }
        }
        self.tree = tree;
    }

    /// Takes note of what happened in the tree.
    pub fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Appeared { path, id } => {
                    let node = Node { id: *id, named: self.look(path) };
                    if node.named.is_some() {
                        let _ = self.remembered.insert(path.clone());
                    }
                    let _ = self.tree.insert(path.clone(), node);
                }
                Change::Gone { path, .. } => {
                    let _ = self.tree.remove(path);
                }
            }
        }
    }

    /// What the documents say of one cgroup itself, not of what is above it.
    pub fn named(&self, path: &Path) -> Option<(String, Labels)> {
        match self.tree.get(path) {
            Some(node) => node.named.clone(),
            None => self.look(path),
        }
    }

    fn look(&self, path: &Path) -> Option<(String, Labels)> {
        labels_for(&self.docs, &facts(path), &self.host_labels)
    }

    /// Documents that disagree about a cgroup of this tree.
    pub fn conflicts(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> =
            self.tree.keys().flat_map(|path| conflicts(&self.docs, &facts(path))).collect();
        problems.dedup();
        problems
    }

    /// Every workload, by path.
    pub fn workloads(&self) -> Vec<Workload> {
        let found = self.tree.iter().filter_map(|(path, node)| {
            let (name, labels) = node.named.clone()?;
            Some(Workload { name, cgroup: path.to_string_lossy().into_owned(), id: node.id, labels })
        });
        found.collect()
    }

    /// The workload that a cgroup belongs to: its own, or that of the nearest cgroup above it.
    pub fn owner(&self, path: &Path) -> Option<(PathBuf, String, Labels)> {
        path.ancestors().find_map(|at| self.named(at).map(|(name, labels)| (at.to_owned(), name, labels)))
    }

    /// Label sets the compiler must know: those of workloads that run, and those that a single document would give to
    /// one that starts, so that it is enforced under its own labels at once.
    pub fn label_sets(&self) -> Vec<Labels> {
        let mut sets: BTreeSet<Labels> = self.workloads().into_iter().map(|w| w.labels).collect();
        for doc in &self.docs {
            let mut labels = self.host_labels.clone();
            labels.extend(doc.labels.clone());
            let _ = sets.insert(labels);
        }
        sets.into_iter().collect()
    }

    /// What the resolver is told of this host.
    pub fn known(&self) -> Vec<Known> {
        self.workloads().into_iter().map(|w| Known { name: w.name, cgroup: w.cgroup, labels: w.labels }).collect()
    }

    /// What the kernel is to know of every cgroup, by id. All cgroups are in it, also those of no workload: one that is
    /// missing is one that the agent has not seen yet.
    pub fn entries(&self, numbers: &mut Numbers) -> BTreeMap<u64, CgroupEntry> {
        let mut by_path: BTreeMap<&Path, CgroupEntry> = BTreeMap::new();
        let mut entries = BTreeMap::new();
        // In the order of paths a parent comes before its children.
        for (path, Node { id, named }) in &self.tree {
            let (identity, workload) = match named {
                // The low half of a cgroup id is its inode number: unique among those that live.
                Some((_, labels)) => (numbers.labels(labels).0, *id as u32),
                None => match path.parent().and_then(|p| by_path.get(p)) {
                    Some(parent) => (parent.identity, parent.workload),
                    None => (Identity::HOST.0, 0),
                },
            };
            let flags = if self.managed.contains(path) { CgroupEntry::MANAGED } else { 0 };
            let entry = CgroupEntry { identity, workload, flags, pad: 0 };
            let _ = by_path.insert(path, entry);
            let _ = entries.insert(*id, entry);
        }
        entries
    }

    /// What a cgroup will be that is made while nobody looks: every path that was a workload here, and every path that a
    /// document names without a wildcard.
    pub fn paths(&self, numbers: &mut Numbers) -> BTreeMap<PathKey, CgroupEntry> {
        let exact = self.docs.iter().flat_map(|d| &d.matches).filter_map(|m| match &m.value {
            // Where systemd puts a system unit that names no slice.
            Matcher::SystemdUnit(glob) => Some(format!("/system.slice/{}", glob.text)),
            Matcher::Cgroup(glob) => Some(glob.text.clone()),
            Matcher::Container { .. } | Matcher::Pod { .. } => None,
        });
        let exact = exact.filter(|text| !text.contains(['*', '?', '[', '{'])).map(PathBuf::from);
        let all: BTreeSet<PathBuf> = self.remembered.iter().cloned().chain(exact).collect();
        let entry = |path: PathBuf| {
            let (_, labels) = self.named(&path)?;
            let flags = if self.managed.contains(&path) { CgroupEntry::MANAGED } else { 0 };
            let entry = CgroupEntry { identity: numbers.labels(&labels).0, workload: 0, flags, pad: 0 };
            Some((PathKey::new(path.as_os_str().as_encoded_bytes())?, entry))
        };
        all.into_iter().filter_map(entry).take(bounds::PATHS as usize).collect()
    }

    /// Paths by id, and the workload each belongs to.
    pub fn words(&self) -> BTreeMap<u64, (String, Option<String>)> {
        let mut owners: BTreeMap<&Path, Option<String>> = BTreeMap::new();
        let mut words = BTreeMap::new();
        for (path, Node { id, named }) in &self.tree {
            let own = named.as_ref().map(|(name, _)| name.clone());
            let owner = own.or_else(|| path.parent().and_then(|p| owners.get(p)).cloned().flatten());
            let _ = owners.insert(path, owner.clone());
            let _ = words.insert(*id, (path.to_string_lossy().into_owned(), owner));
        }
        words
    }

    /// Cgroups in the tree.
    pub fn len(&self) -> usize {
        self.tree.len()
    }

    /// Is the tree unknown yet?
    pub fn is_empty(&self) -> bool {
        self.tree.is_empty()
    }
}

fn facts(path: &Path) -> CgroupFacts {
    CgroupFacts {
        path: path.to_string_lossy().into_owned(),
        unit: crate::host::cgroup::unit(path).map(str::to_owned),
        ..CgroupFacts::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(yaml: &str, tree: &[(&str, u64)]) -> Registry {
        let (docs, problems) = crate::policy::parse(&[("t.yaml".to_owned(), yaml.to_owned())]);
        assert!(problems.is_empty(), "{problems:?}");
        let mut registry = Registry::new(Labels::from([("zone".to_owned(), "a".to_owned())]));
        registry.set_documents(super::super::revision::workload_documents(&docs));
        let changes: Vec<Change> =
            tree.iter().map(|(path, id)| Change::Appeared { path: PathBuf::from(path), id: *id }).collect();
        registry.apply(&changes);
        registry
    }

    const DOCS: &str = "apiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {name: web}\nspec:\n  match: [{systemdUnit: nginx.service}]\n  labels: {app: web}\n---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {name: pg}\nspec:\n  match: [{cgroup: /machine.slice/pg-*}]\n  labels: {app: db}\n";

    #[test]
    fn nearest_ancestor_managed_parent_and_host() {
        let registry = registry(
            DOCS,
            &[
                ("/", 1),
                ("/machine.slice", 2),
                ("/machine.slice/other", 3),
                ("/machine.slice/pg-1", 4),
                ("/machine.slice/pg-1/worker", 5),
                ("/system.slice", 6),
                ("/system.slice/nginx.service", 7),
            ],
        );
        let mut numbers = Numbers::default();
        let entries = registry.entries(&mut numbers);
        let web = registry.named(Path::new("/system.slice/nginx.service")).unwrap().1;
        assert_eq!(web.get("zone").map(String::as_str), Some("a"), "host labels apply");
        assert_eq!(entries[&7].identity, numbers.labels(&web).0);
        assert_eq!(entries[&7].workload, 7);
        assert_eq!((entries[&5].identity, entries[&5].workload), (entries[&4].identity, 4), "a child belongs to it");
        assert_ne!(entries[&4].identity, entries[&7].identity);
        assert_eq!(entries[&3].identity, Identity::HOST.0, "looked at, and no workload");
        assert_eq!(entries[&2].flags, CgroupEntry::MANAGED);
        assert_eq!(entries[&6].flags, 0);
        assert_eq!(registry.words()[&5], ("/machine.slice/pg-1/worker".to_owned(), Some("pg".to_owned())));
        assert_eq!(registry.label_sets().len(), 2);
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let mut registry = registry(DOCS, &[("/", 1), ("/machine.slice", 2), ("/machine.slice/pg-1", 4)]);
        assert_eq!(registry.workloads().len(), 1);
        registry.apply(&[Change::Gone { path: "/machine.slice/pg-1".into(), id: 4 }]);
        assert!(registry.workloads().is_empty());
        assert!(!registry.entries(&mut Numbers::default()).contains_key(&4));
    }
}
