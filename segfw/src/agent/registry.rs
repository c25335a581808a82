//! Which cgroup is whose: the tree as it is, and what the policy's Workload documents say of it. Pure.

use crate::host::cgroup::Change;
use crate::host::runtime::{self, Listing};
use crate::policy::document::{Matcher, WorkloadDoc};
use crate::policy::host_policy::Labels;
use crate::policy::tables::Numbers;
use crate::policy::{
    CgroupFacts, Known, Problem, UnitFacts, UserFacts, Workloads, conflicts, labels_for, managed_parents,
};
use segfw_common::state::PathKey;
use segfw_common::{CgroupEntry, Identity, bounds};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

/// What the documents say of a cgroup itself, not of what is above it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Nothing.
    #[default]
    None,
    /// It may be a workload, but what it is has not been learned yet.
    Unresolved,
    /// The names of the documents, and the labels they give together.
    Workload(String, Labels),
}

/// One cgroup of the tree.
#[derive(Clone, Debug)]
struct Node {
    id: u64,
    /// Batch of changes with which it came.
    batch: u64,
    /// Kept, since globs are slow and batches are many.
    standing: Standing,
}

/// Paths of workloads that are gone and may come again. The kernel's table holds two entries for each. Beyond it the one
/// that was seen least recently is forgotten: should it come again, it is unresolved until the agent has seen it.
pub const REMEMBERED: usize = 4_096;

/// The tree, and what it means.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    tree: BTreeMap<PathBuf, Node>,
    /// Shared, since a registry is copied to be tried.
    docs: Arc<Workloads>,
    managed: BTreeSet<PathBuf>,
    host_labels: Labels,
    /// Where the part of the tree begins that the agent answers for: units are looked for below it.
    root: PathBuf,
    /// Paths of workloads that ran here and may run again, and when each was last seen.
    remembered: BTreeMap<PathBuf, u64>,
    tick: u64,
    /// What the container runtimes said last; shared as well.
    containers: Arc<Listing>,
    /// Where runtimes make containers whose path alone does not say so.
    folders: Arc<BTreeSet<String>>,
    /// Do the documents ask what a container is?
    asks: bool,
    /// See [`Self::learn_beginnings`].
    beginnings: Arc<BTreeSet<String>>,
    /// See [`Self::says_otherwise`].
    otherwise: bool,
    /// Batches of changes so far.
    batch: u64,
    /// The batch up to which `containers` is complete.
    listed: u64,
}

impl Registry {
    /// An empty tree, of which the agent answers for what is below `root`.
    pub fn new(host_labels: Labels, root: PathBuf) -> Self {
        Self { host_labels, root, ..Self::default() }
    }

    /// Where the part of the tree begins that the agent answers for.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Labels of every workload of this host.
    pub fn host_labels(&self) -> &Labels {
        &self.host_labels
    }

    /// The same without documents.
    pub fn without_documents(&self) -> Self {
        Self { docs: Arc::default(), managed: BTreeSet::new(), ..self.clone() }
    }

    /// Other documents: every cgroup may mean something else now.
    pub fn set_documents(&mut self, docs: Vec<WorkloadDoc>) {
        self.managed = managed_parents(&docs).into_iter().map(PathBuf::from).collect();
        let asks = |m: &Matcher| matches!(m, Matcher::Container { .. } | Matcher::Pod { .. });
        self.asks = docs.iter().flat_map(|d| &d.matches).any(|m| asks(&m.value));
        self.docs = Arc::new(docs.into());
        self.learn_beginnings();
        let _ = self.look_again(|_| true);
    }

    /// What is known of some cgroups has changed. True if one of them is somebody else now.
    fn look_again(&mut self, which: impl Fn(&Standing) -> bool) -> bool {
        let mut changed = false;
        let mut tree = std::mem::take(&mut self.tree);
        for (path, node) in tree.iter_mut().filter(|(_, node)| which(&node.standing)) {
            let standing = self.look(path, node.batch);
            self.remember(path, &standing);
            changed |= standing != node.standing;
            node.standing = standing;
        }
        self.tree = tree;
        self.otherwise |= changed;
        changed
    }

    /// Do the documents ask what a container is?
    pub fn wants_containers(&self) -> bool {
        self.asks
    }

    /// Do the documents ask for containers, and no runtime was asked yet?
    pub fn never_listed(&self) -> bool {
        self.listed == 0 && self.wants_containers()
    }

    /// To be taken before the runtimes are asked, and given to [`Self::set_containers`] with the answer.
    pub fn batch(&self) -> u64 {
        self.batch
    }

    /// What the runtimes said when everything up to `batch` was in the tree. A runtime that did not answer keeps the
    /// containers it told of before, as long as their cgroups are there. True if some cgroup is somebody else now.
    pub fn set_containers(&mut self, batch: u64, listing: Listing) -> bool {
        let mut all = listing.containers;
        if !listing.failed.is_empty() {
            let told: BTreeSet<String> = all.iter().map(|c| c.id.clone()).collect();
            let live: BTreeSet<String> =
                self.tree.keys().filter_map(|path| self.containers.find(path)).map(|c| c.id.clone()).collect();
            let kept = self.containers.containers.iter().filter(|c| !told.contains(&c.id) && live.contains(&c.id));
            all.extend(kept.cloned());
        }
        let listing = Listing::of(all);
        let same = listing.containers == self.containers.containers;
        if !same {
            self.containers = Arc::new(listing);
            self.folders = Arc::new(self.container_folders());
            self.learn_beginnings();
        }
        self.listed = batch;
        // Most answers are the same again: then only what waits is worth a look.
        self.look_again(|standing| !same || *standing == Standing::Unresolved)
    }

    /// Has anything changed that [`Self::label_sets`] or [`Self::paths`] speaks of, since [`Self::was_told`]? Most cgroups
    /// that come and go are nobody's, and both take long where there are many documents.
    pub fn says_otherwise(&self) -> bool {
        self.otherwise
    }

    /// The kernel holds what is said now.
    pub fn was_told(&mut self) {
        self.otherwise = false;
    }

    /// Takes note of what happened in the tree.
    pub fn apply(&mut self, changes: &[Change]) {
        self.batch += 1;
        for change in changes {
            match change {
                Change::Appeared { path, id } => {
                    let standing = self.look(path, self.batch);
                    self.otherwise |= standing != Standing::None || self.is_below_a_beginning(path);
                    self.remember(path, &standing);
                    let _ = self.tree.insert(path.clone(), Node { id: *id, batch: self.batch, standing });
                }
                Change::Gone { path, .. } => {
                    let gone = self.tree.remove(path);
                    let was_somebody = gone.is_some_and(|node| node.standing != Standing::None);
                    self.otherwise |= was_somebody || self.is_below_a_beginning(path);
                }
            }
        }
    }

    fn remember(&mut self, path: &Path, standing: &Standing) {
        // A container never comes again under its path.
        if !matches!(standing, Standing::Workload(..)) || self.containers.find(path).is_some() {
            return;
        }
        self.tick += 1;
        let _ = self.remembered.insert(path.to_owned(), self.tick);
        if self.remembered.len() > REMEMBERED {
            // Those that live are in the tree anyway.
            let oldest = self.remembered.iter().min_by_key(|(_, tick)| **tick).map(|(path, _)| path.clone());
            let _ = oldest.and_then(|path| self.remembered.remove(&path));
        }
    }

    /// What the documents say of one cgroup itself.
    pub fn standing(&self, path: &Path) -> Standing {
        match self.tree.get(path) {
            Some(node) => node.standing.clone(),
            // Looked at when the runtimes were asked last: it is not there.
            None => self.look(path, 0),
        }
    }

    fn look(&self, path: &Path, batch: u64) -> Standing {
        match labels_for(&self.docs, &self.facts(path), &self.host_labels) {
            Some((name, labels)) => Standing::Workload(name, labels),
            None if self.waits(path, batch) => Standing::Unresolved,
            None => Standing::None,
        }
    }

    /// May this be a container, or a pod, of which no runtime has told yet?
    fn waits(&self, path: &Path, batch: u64) -> bool {
        if !self.wants_containers() {
            return false;
        }
        let looks_like_one = match (runtime::path::container(path), runtime::path::pod(path)) {
            // Of a tree whose owner can make any name: what is above it speaks for it.
            (Some(container), _) if container.delegated => false,
            (Some(_), _) => self.containers.find(path).is_none(),
            (None, Some(uid)) => self.containers.pod(&uid).is_none(),
            (None, None) => false,
        };
        // Where containers may have any name, each new cgroup waits for one answer of the runtimes.
        looks_like_one || (batch > self.listed && self.folders().any(|b| begins(path, b)))
    }

    /// Folders in which every new cgroup waits for the runtimes: containerd's namespace `default`, and those of containers
    /// that are known.
    fn folders(&self) -> impl Iterator<Item = &str> {
        self.folders.iter().map(String::as_str).chain(["/default/"])
    }

    /// Where runtimes make containers whose path alone does not say so: the folders of those that are known.
    fn container_folders(&self) -> BTreeSet<String> {
        let plain = |path: &&Path| runtime::path::container(path).is_none_or(|found| found.delegated);
        let known = self.containers.containers.iter().filter_map(|c| Some(Path::new(c.cgroup.as_deref()?)));
        let folders = known
            .filter(plain)
            .filter_map(Path::parent)
            .filter(|parent| parent.components().count() > 1 && parent.extension().is_none_or(|end| end != "slice"));
        folders.map(|p| format!("{}/", p.display())).collect()
    }

    fn facts(&self, path: &Path) -> CgroupFacts {
        CgroupFacts {
            container: self.containers.find(path).cloned(),
            pod: runtime::path::pod(path).and_then(|uid| self.containers.pod(&uid)).cloned(),
            ..facts(path, &self.root)
        }
    }

    /// Documents that disagree about a cgroup of this tree.
    pub fn conflicts(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> =
            self.tree.keys().flat_map(|path| conflicts(&self.docs, &self.facts(path))).collect();
        problems.dedup();
        problems
    }

    /// Every workload, by path.
    pub fn workloads(&self) -> Vec<Workload> {
        let found = self.tree.iter().filter_map(|(path, node)| {
            let Standing::Workload(name, labels) = node.standing.clone() else { return None };
            Some(Workload { name, cgroup: path.to_string_lossy().into_owned(), id: node.id, labels })
        });
        found.collect()
    }

    /// Cgroups that wait to be learned, by path.
    pub fn unresolved(&self) -> impl Iterator<Item = (&Path, u64)> {
        let waiting = self.tree.iter().filter(|(_, node)| node.standing == Standing::Unresolved);
        waiting.map(|(path, node)| (path.as_path(), node.id))
    }

    /// The workload that a cgroup belongs to: its own, or that of the nearest cgroup above it.
    pub fn owner(&self, path: &Path) -> Option<(PathBuf, String, Labels)> {
        path.ancestors().find_map(|at| match self.standing(at) {
            Standing::Workload(name, labels) => Some((at.to_owned(), name, labels)),
            Standing::Unresolved | Standing::None => None,
        })
    }

    /// Label sets the compiler must know: those of workloads that run, and those that a single document would give to
    /// one that starts, so that it is enforced under its own labels at once.
    pub fn label_sets(&self) -> Vec<Labels> {
        let mut sets: BTreeSet<Labels> = self.workloads().into_iter().map(|w| w.labels).collect();
        for doc in self.docs.iter() {
            let mut labels = self.host_labels.clone();
            labels.extend(doc.labels.clone());
            let _ = sets.insert(labels);
        }
        sets.into_iter().collect()
    }

    /// Are all label sets among these, in ascending order?
    pub fn needs_only(&self, sets: &[Labels]) -> bool {
        let is_there = |set: &Labels| sets.binary_search(set).is_ok();
        if !self.host_labels.is_empty() {
            return self.label_sets().iter().all(is_there);
        }
        // What a document gives is then what it says.
        self.docs.iter().all(|doc| is_there(&doc.labels)) && self.workloads().iter().all(|w| is_there(&w.labels))
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
        for (path, Node { id, standing, .. }) in &self.tree {
            let (identity, workload) = match standing {
                // The low half of a cgroup id is its inode number: unique among those that live.
                Standing::Workload(_, labels) => (numbers.labels(labels).0, *id as u32),
                Standing::Unresolved => (Identity::UNRESOLVED.0, 0),
                Standing::None => match path.parent().and_then(|p| by_path.get(p)) {
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

    /// What a cgroup will be that is made while nobody looks:
    ///
    /// * a path that was a workload here, or that a document names without a wildcard: that workload;
    /// * a path that begins as a pattern does: unresolved, until the agent has seen it;
    /// * a path that was seen and is no workload: what it was; and what is made below a known cgroup belongs to that.
    ///
    /// In the order of their weight, for the table is bounded.
    pub fn paths(&self, numbers: &mut Numbers) -> BTreeMap<PathKey, CgroupEntry> {
        let entry = |identity: Identity, flags| CgroupEntry { identity: identity.0, workload: 0, flags, pad: 0 };
        let flags = |path: &Path| if self.managed.contains(path) { CgroupEntry::MANAGED } else { 0 };
        let bytes = |path: &Path| path.as_os_str().as_encoded_bytes().to_vec();
        let below = |path: &Path| self.is_below_a_beginning(path);
        let mut all: Vec<(PathKey, CgroupEntry)> = Vec::new();
        all.extend(
            self.beginnings
                .iter()
                .filter_map(|b| Some((PathKey::beginning(b.as_bytes())?, entry(Identity::UNRESOLVED, 0)))),
        );
        let living = self.tree.iter().filter(|(_, node)| matches!(node.standing, Standing::Workload(..)));
        let living = living.map(|(path, _)| path.clone());
        let named: BTreeSet<PathBuf> = self.remembered.keys().cloned().chain(self.exact()).chain(living).collect();
        for path in &named {
            if let Standing::Workload(_, labels) = self.standing(path) {
                let identity = numbers.labels(&labels);
                all.extend(PathKey::new(&bytes(path)).map(|key| (key, entry(identity, flags(path)))));
            }
        }
        let inherit = |path: &Path| {
            let key = PathKey::beginning(&[bytes(path), b"/".to_vec()].concat())?;
            Some((key, entry(Identity::HOST, CgroupEntry::INHERIT)))
        };
        all.extend(named.iter().filter(|path| below(path)).filter_map(|path| inherit(path)));
        let others = self.tree.iter().filter(|(path, node)| node.standing == Standing::None && below(path));
        for (path, _) in others {
            // The nearest workload above it, if there is one, speaks for it: then nothing is to be registered.
            let of = if self.owner(path).is_some() { CgroupEntry::INHERIT } else { flags(path) };
            all.extend(PathKey::new(&bytes(path)).map(|key| (key, entry(Identity::HOST, of))));
            all.extend(inherit(path));
        }
        let mut table = BTreeMap::new();
        for (key, entry) in all {
            if table.len() == bounds::PATHS as usize {
                break;
            }
            let _ = table.entry(key).or_insert(entry);
        }
        table
    }

    /// Paths that documents name without a wildcard. Units: where systemd puts one that names no slice.
    fn exact(&self) -> impl Iterator<Item = PathBuf> {
        let texts = self.docs.iter().flat_map(|d| &d.matches).flat_map(|m| match &m.value {
            Matcher::SystemdUnit(glob) => {
                let socket = glob.text.strip_suffix(".service").map(|name| format!("{name}.socket"));
                let unit = |name: String| self.root.join("system.slice").join(name);
                [Some(unit(glob.text.clone())), socket.map(unit)].into_iter().flatten().collect()
            }
            Matcher::Cgroup(glob) => vec![PathBuf::from(&glob.text)],
            Matcher::SystemdUserUnit { .. } | Matcher::Container { .. } | Matcher::Pod { .. } => Vec::new(),
        });
        texts.filter(|path| !path.to_string_lossy().contains(WILD))
    }

    fn is_below_a_beginning(&self, path: &Path) -> bool {
        self.beginnings.iter().any(|b| begins(path, b))
    }

    /// How the paths begin that patterns are about: a cgroup that is made there is no host process. To be called where
    /// documents or folders are others.
    fn learn_beginnings(&mut self) {
        let literal = |text: &str| text.find(WILD).and_then(|wild| text.get(..wild)).map(str::to_owned);
        let below = |folder: &str, rest: &str| format!("{}/{rest}", self.root.join(folder).display());
        let found = self.docs.iter().flat_map(|d| &d.matches).filter_map(|m| match &m.value {
            Matcher::Cgroup(glob) => literal(&glob.text),
            Matcher::SystemdUnit(glob) => literal(&glob.text).map(|name| match name.split_once('@') {
                // Instances of a template have a slice of their own.
                Some((template, _)) => {
                    below("system.slice", &format!("system-{}.slice/{name}", template.replace('-', r"\x2d")))
                }
                None => below("system.slice", &name),
            }),
            // A pattern of users would take in every login.
            Matcher::SystemdUserUnit { user, .. } => {
                user_id(&user.text).map(|uid| below("user.slice", &format!("user-{uid}.slice/user@{uid}.service/")))
            }
            Matcher::Container { .. } | Matcher::Pod { .. } => None,
        });
        // A pattern that begins with a wildcard would make every cgroup there unresolved, system services among them.
        let found = found.filter(|text| text.trim_matches('/').contains('/'));
        let containers: BTreeSet<String> = match self.wants_containers() {
            true => runtime::path::prefixes().iter().copied().chain(self.folders()).map(str::to_owned).collect(),
            false => BTreeSet::new(),
        };
        self.beginnings = Arc::new(found.chain(containers).collect());
        self.otherwise = true;
    }

    /// Paths by id, and the workload each belongs to.
    pub fn words(&self) -> BTreeMap<u64, (String, Option<String>)> {
        let mut owners: BTreeMap<&Path, Option<String>> = BTreeMap::new();
        let mut words = BTreeMap::new();
        for (path, Node { id, standing, .. }) in &self.tree {
            let own = match standing {
                Standing::Workload(name, _) => Some(name.clone()),
                Standing::Unresolved | Standing::None => None,
            };
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

/// As text: the beginning may end within a name.
fn begins(path: &Path, beginning: &str) -> bool {
    path.as_os_str().as_encoded_bytes().starts_with(beginning.as_bytes())
}

/// What begins a pattern's variable part.
const WILD: [char; 4] = ['*', '?', '[', '{'];

/// What a path alone says of a cgroup. Units are looked for below `root`.
pub fn facts(path: &Path, root: &Path) -> CgroupFacts {
    let inside = path.strip_prefix(root).ok().map(|p| Path::new("/").join(p));
    let unit = inside.as_deref().and_then(crate::host::cgroup::unit).map(|unit| UnitFacts {
        name: unit.name.to_owned(),
        user: unit.uid.map(|uid| UserFacts { uid, name: user_name(uid) }),
    });
    CgroupFacts { path: path.to_string_lossy().into_owned(), unit, ..CgroupFacts::default() }
}

/// Number of a user: written so, or from the user database.
fn user_id(text: &str) -> Option<u32> {
    let named = || nix::unistd::User::from_name(text).ok().flatten().map(|user| user.uid.as_raw());
    text.parse().ok().or_else(named)
}

/// From the user database; asked for every unit of a user's manager, which is seldom.
fn user_name(uid: u32) -> Option<String> {
    nix::unistd::User::from_uid(uid.into()).ok().flatten().map(|user| user.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(yaml: &str, tree: &[(&str, u64)]) -> Registry {
        let (docs, problems) = crate::policy::parse(&[("t.yaml".to_owned(), yaml.to_owned())]);
        assert!(problems.is_empty(), "{problems:?}");
        let mut registry = Registry::new(Labels::from([("zone".to_owned(), "a".to_owned())]), "/".into());
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
        let Standing::Workload(_, web) = registry.standing(Path::new("/system.slice/nginx.service")) else { panic!() };
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

    /// What the kernel would make of a new cgroup: the longest entry that its path begins with.
    fn made(paths: &BTreeMap<PathKey, CgroupEntry>, path: &str) -> Option<CgroupEntry> {
        let mut text = path.as_bytes().to_vec();
        text.push(0);
        let fits = |key: &PathKey| text.starts_with(&key.bytes[..key.bits as usize / 8]);
        let best = paths.iter().filter(|(key, _)| fits(key)).max_by_key(|(key, _)| key.bits);
        best.map(|(_, entry)| *entry).filter(|entry| entry.flags & CgroupEntry::INHERIT == 0)
    }

    #[test]
    fn a_cgroup_that_is_made_while_nobody_looks() {
        let docs = "apiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {name: web}\nspec:\n  match: [{systemdUnit: nginx.service}, {systemdUnit: 'app-x@*.service'}, {cgroup: '/machine.slice/pg-*'}, {cgroup: '/*'}, {systemdUserUnit: {unit: sync.service, user: '7'}}]\n  labels: {app: web}\n";
        let mut registry = registry(
            docs,
            &[
                ("/", 1),
                ("/machine.slice", 2),
                ("/machine.slice/other", 3),
                ("/machine.slice/pg-1", 4),
                ("/machine.slice/pg-1/w", 5),
            ],
        );
        let mut numbers = Numbers::default();
        let Standing::Workload(_, web) = registry.standing(Path::new("/machine.slice/pg-1")) else { panic!() };
        let web = numbers.labels(&web).0;
        let identity = |paths: &_, path: &str| made(paths, path).map(|entry| entry.identity);
        let paths = registry.paths(&mut numbers);
        for (path, want) in [
            ("/system.slice/nginx.service", Some(web)),
            ("/system.slice/nginx.socket", Some(web)),
            ("/system.slice/nginx.service/worker", None),
            (r"/system.slice/system-app\x2dx.slice/app-x@1.service", Some(Identity::UNRESOLVED.0)),
            ("/system.slice/other.service", None),
            ("/machine.slice/pg-1", Some(web)),
            ("/machine.slice/pg-1/x", None),
            ("/machine.slice/pg-2", Some(Identity::UNRESOLVED.0)),
            ("/machine.slice/other", None),
            ("/user.slice/user-7.slice/user@7.service/app.slice/x.service", Some(Identity::UNRESOLVED.0)),
            ("/user.slice/user-8.slice/user@8.service/app.slice/x.service", None),
        ] {
            assert_eq!(identity(&paths, path), want, "{path}");
        }
        registry.apply(&[Change::Gone { path: "/machine.slice/pg-1".into(), id: 4 }]);
        assert_eq!(identity(&registry.paths(&mut numbers), "/machine.slice/pg-1"), Some(web), "remembered");
        for id in 0..2 * REMEMBERED as u64 {
            let path = PathBuf::from(format!("/machine.slice/pg-x{id}"));
            registry.apply(&[Change::Appeared { path: path.clone(), id: id + 9 }, Change::Gone { path, id: id + 9 }]);
        }
        assert_eq!(registry.remembered.len(), REMEMBERED);
        assert_eq!(identity(&registry.paths(&mut numbers), "/machine.slice/pg-1"), Some(Identity::UNRESOLVED.0));
    }

    #[test]
    fn who_is_nobody_changes_nothing_that_is_said() {
        let mut registry = registry(DOCS, &[("/", 1), ("/machine.slice", 2)]);
        let mut numbers = Numbers::default();
        let appeared = |path: &str| Change::Appeared { path: path.into(), id: 9 };
        let gone = |path: &str| Change::Gone { path: path.into(), id: 9 };
        let mut told = (registry.paths(&mut numbers), registry.label_sets());
        registry.was_told();
        let mut otherwise = Vec::new();
        for path in ["/system.slice", "/system.slice/other.service", "/machine.slice/x", "/machine.slice/pg-1/y"]
            .into_iter()
            .chain(["/system.slice/nginx.service", "/machine.slice/pg-1", "/machine.slice/pg-"])
        {
            for change in [appeared(path), gone(path)] {
                registry.apply(&[change]);
                let now = (registry.paths(&mut numbers), registry.label_sets());
                assert!(registry.says_otherwise() || now == told, "{path}");
                otherwise.push(registry.says_otherwise());
                registry.was_told();
                told = now;
            }
        }
        assert_eq!(otherwise, [[false; 6].as_slice(), &[true; 8]].concat());
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
