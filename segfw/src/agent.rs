//! The agent: keeps what the kernel enforces equal to what the folder says, and tells what happened.
//!
//! Its death changes nothing in the kernel: programs and maps are pinned, and the next agent takes them over. One task
//! owns the state ([`Core`]); the drain of events and the control socket run beside it.

mod backend;
pub mod export;
pub mod live;
pub mod registry;
pub mod revision;

use crate::config::Config;
use crate::control::report::{self, Finding, Refused, Revision};
use crate::control::{Listener, serve};
use crate::datapath::{Datapath, attach, sys};
use crate::flow::record::{CgroupWords, Names};
use crate::flow::{History, Intake, Item, enrich, history};
use crate::host::cgroup::{Change, Hierarchy, Watcher};
use crate::host::{netns, proc};
use crate::policy::host_policy::Labels;
use crate::policy::tables::{IdentityName, Numbers};
use crate::policy::{HostPolicy, Tables, TablesView};
use anyhow::Context;
use export::Shared;
use jiff::Timestamp;
use live::{Swept, View};
use registry::Registry;
use revision::{Candidate, Files, Saved, Store};
use segfw_common::event::{DenialCount, DenialKey, Hook};
use segfw_common::state::PathKey;
use segfw_common::{Addr, AddressEntry, CgroupEntry, EndpointEntry, EndpointKey, EventKind, FlowEvent, control};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// How often the policy folder is looked at. A change counts once it has been still for one look.
const FOLDER_LOOK: Duration = Duration::from_millis(200);
/// How often addresses, endpoints and live connections are compared with the kernel when nothing seems to happen.
const SURVEY: Duration = Duration::from_secs(15);
/// After a change of the cgroup tree namespaces and addresses follow shortly; they are looked at again so long after.
const SURVEY_SOON: Duration = Duration::from_millis(300);
/// How often aggregated denials are fetched.
const DENIALS: Duration = Duration::from_secs(1);
/// An entry that nothing was added to for so long makes room; much sooner where half of all room is taken.
const DENIAL_IDLE: Duration = Duration::from_secs(60);

/// How long until a timeline that could not be written on is tried again.
const REFRESH_AGAIN: Duration = Duration::from_secs(60);

/// What is in force.
struct InForce {
    revision: Revision,
    files: Files,
    policy: HostPolicy,
    tables: Tables,
}

/// Everything the agent knows. One owner at a time, never across an await.
pub struct Core {
    config: Config,
    started_at: Timestamp,
    datapath: Arc<Datapath>,
    hierarchy: Hierarchy,
    store: Store,
    saved: Saved,
    registry: Registry,
    /// As written to the kernel.
    cgroups: BTreeMap<u64, CgroupEntry>,
    paths: BTreeMap<PathKey, CgroupEntry>,
    /// Registered in the kernel and not in the tree, at the last survey.
    strays: BTreeSet<u64>,
    addresses: BTreeMap<Addr, AddressEntry>,
    in_force: Option<InForce>,
    refused: Option<Refused>,
    /// Things that are not as they should be, by kind.
    troubles: BTreeMap<&'static str, report::Trouble>,
    draining: BTreeMap<u64, u64>,
    names: Names,
    shared: Arc<Shared>,
    history: Arc<History>,
    attached: bool,
    /// Aggregated denials that the history has, by key.
    told: BTreeMap<DenialKey, u64>,
    /// Boot time before which every answer that changes by itself was looked at.
    looked: u64,
}

/// Shared between the tasks.
pub struct Agent {
    core: Mutex<Core>,
    history: Arc<History>,
    counts: Mutex<Option<Arc<crate::control::ControlCounts>>>,
}

impl Agent {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs until `shutdown`. Enforcement stays.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    match proc::ensure_bpffs().context("no BPF file system at /sys/fs/bpf, and none can be mounted")? {
        proc::Bpffs::MountedNow => tracing::warn!("mounted a BPF file system at /sys/fs/bpf"),
        proc::Bpffs::Mounted => {}
    }
    // Before the first reading, so that no change falls between the two.
    let mut folder = Folder::new(&config.policy);
    if proc::ensure_tracefs() {
        tracing::warn!("mounted tracefs at /sys/kernel/tracing");
    }
    let hierarchy = Hierarchy::find()?;
    let listener = Listener::bind(&config.socket)?;
    let mut datapath = Datapath::load(&config.pin_dir)?;
    let ring = datapath.take_events()?;
    let mut watcher = Watcher::start(hierarchy.clone())?;

    let shared = Arc::new(Shared::default());
    let history = Arc::new(History::new(config.host.as_str().into(), history::RECORDS));
    let core = Core::new(config, Arc::new(datapath), hierarchy, Arc::clone(&shared), Arc::clone(&history))?;
    let agent = Arc::new(Agent { core: Mutex::new(core), history: Arc::clone(&history), counts: Mutex::default() });
    *agent.counts.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener.counts());

    let (answers, waiting) = mpsc::channel(export::ANSWERS_WAITING);
    let answerer = {
        let shared = Arc::clone(&shared);
        std::thread::Builder::new().name("answers".into()).spawn(move || export::answer(waiting, &shared))?
    };
    let drain = tokio::spawn(export::drain(ring, Intake::new(Arc::clone(&history)), Arc::clone(&shared), answers));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let door = {
        let mut stopped = stopped.clone();
        tokio::spawn(serve(listener, Arc::clone(&agent), async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }))
    };

    let mut hangup = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?;
    let mut look = tokio::time::interval(FOLDER_LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut denials = tokio::time::interval(DENIALS);
    denials.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut survey_at = tokio::time::Instant::now() + SURVEY;
    tokio::pin!(shutdown);
    tokio::pin!(drain);
    let ended = loop {
        let deadline = agent.core().deadline();
        tokio::select! {
            () = &mut shutdown => break Ok(()),
            result = &mut drain => break match result {
                Ok(Ok(())) => Err(anyhow::anyhow!("the drain of events ended")),
                Ok(Err(e)) => Err(anyhow::Error::from(e).context("cannot read events")),
                Err(e) => Err(anyhow::Error::from(e).context("the drain of events failed")),
            },
            changes = watcher.next() => match changes {
                Some(changes) => {
                    let agent = Arc::clone(&agent);
                    on_thread(move || agent.core().tree(&changes)).await;
                    survey_at = survey_at.min(tokio::time::Instant::now() + SURVEY_SOON);
                }
                None => break Err(anyhow::anyhow!("the watch of the cgroup tree ended")),
            },
            _ = hangup.recv() => {
                let agent = Arc::clone(&agent);
                let _ = on_thread(move || agent.core().reload()).await;
            }
            _ = look.tick() => {
                if folder.changed() {
                    let agent = Arc::clone(&agent);
                    let _ = on_thread(move || agent.core().reload()).await;
                }
            }
            _ = denials.tick() => agent.core().fetch_denials(),
            () = tokio::time::sleep_until(survey_at) => {
                let agent = Arc::clone(&agent);
                on_thread(move || agent.core().survey()).await;
                survey_at = tokio::time::Instant::now() + SURVEY;
            }
            () = tokio::time::sleep(deadline) => {
                let agent = Arc::clone(&agent);
                on_thread(move || agent.core().time_passes()).await;
            }
        }
    };
    drain.abort();
    let _ = stop.send(true);
    let _ = door.await;
    drop(answerer);
    ended
}

/// Runs work that blocks (bpf(2), /proc, other namespaces) beside the event loop.
async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::error!("a step of the agent failed, the state in the kernel is as it was: {error}");
            None
        }
    }
}

/// Whether the policy folder changed: names, sizes, times and inode numbers of its files.
struct Folder {
    path: std::path::PathBuf,
    seen: Vec<(std::path::PathBuf, u64, i64, i64, u64)>,
    moving: bool,
}

impl Folder {
    fn new(path: &Path) -> Self {
        let mut folder = Self { path: path.to_owned(), seen: Vec::new(), moving: false };
        folder.seen = folder.look();
        folder
    }
    fn look(&self) -> Vec<(std::path::PathBuf, u64, i64, i64, u64)> {
        let mut all = Vec::new();
        let mut stack = vec![(self.path.clone(), 0)];
        while let Some((path, depth)) = stack.pop() {
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            if meta.is_dir() && depth <= crate::policy::load::FOLDER_DEPTH {
                for entry in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                    stack.push((entry.path(), depth + 1));
                }
            }
            all.push((path, meta.size(), meta.mtime(), meta.mtime_nsec(), meta.ino()));
        }
        all.sort();
        all
    }
    /// True once after a change, when it has been still for one look: an editor writes in several steps.
    fn changed(&mut self) -> bool {
        let now = self.look();
        let same = now == self.seen;
        let settled = same && self.moving;
        self.moving = !same;
        self.seen = now;
        settled
    }
}

impl Core {
    fn new(
        config: Config,
        datapath: Arc<Datapath>,
        hierarchy: Hierarchy,
        shared: Arc<Shared>,
        history: Arc<History>,
    ) -> anyhow::Result<Self> {
        let store = Store::new(&config.state_dir);
        let (saved, damaged) = store.load();
        let maps = sys::map_info(datapath.map("CONTROL")?).map(|i| i.id).context("read CONTROL")?;
        let active = datapath.active()?;
        let mut troubles = BTreeMap::new();
        if let Some(why) = damaged {
            let _ = troubles.insert(
                "state",
                trouble(
                    &why,
                    "counters and live connections of the last agent may show other rules",
                    "remove the file; a new one is written",
                ),
            );
        }
        let mut saved = saved.unwrap_or_default();
        if saved.maps != maps {
            // These maps were made since (after a boot), or by an agent whose state is gone. Numbers start anew; where
            // sockets may still hold old ones, above all that can be in use.
            saved.numbers = Numbers::default();
            if active.generation != 0 {
                let _ = troubles.insert(
                    "numbers",
                    trouble(
                        "the state of the agent before this one is gone",
                        "its rule counters have no names",
                        "nothing; it heals with time",
                    ),
                );
                saved.numbers.skip(u32::MAX / 4, proc::boot_ns().unwrap_or(0));
            }
        }
        saved.maps = maps;
        let mut core = Self {
            registry: Registry::new(config.host_labels.clone()),
            started_at: Timestamp::now(),
            names: Names { host: config.host.as_str().into(), ..Names::default() },
            config,
            datapath,
            hierarchy,
            store,
            saved,
            cgroups: BTreeMap::new(),
            paths: BTreeMap::new(),
            strays: BTreeSet::new(),
            addresses: BTreeMap::new(),
            in_force: None,
            refused: None,
            troubles,
            draining: BTreeMap::new(),
            shared,
            history,
            attached: active.generation != 0,
            told: BTreeMap::new(),
            looked: 0,
        };
        // What an earlier agent registered is what the kernel holds.
        core.cgroups = core.datapath.cgroups()?.into_iter().collect();
        core.addresses = core.datapath.addresses()?.into_iter().collect();
        core.paths = core.datapath.paths()?.into_iter().collect();
        core.set_flags()?;
        let tree: Vec<Change> =
            core.hierarchy.scan()?.into_iter().map(|(path, id)| Change::Appeared { path, id }).collect();
        core.registry.apply(&tree);
        core.start();
        Ok(core)
    }

    fn set_flags(&self) -> anyhow::Result<()> {
        let flags = if self.config.monitor { control::HOST_MONITOR } else { 0 };
        Ok(self.datapath.set_host_flags(flags)?)
    }

    /// The first revision: the folder's, else the last one that was in force here.
    fn start(&mut self) {
        let _ = self.reload();
        if self.in_force.is_none() && !self.saved.files.is_empty() {
            let files = self.saved.files.clone();
            tracing::warn!("the policy folder has no revision that can be used: taking the last one that was in force");
            let refused = self.refused.take();
            let _ = self.take(files);
            self.refused = refused.or(self.refused.take());
        }
    }

    /// Reads the folder and puts it in force, or says why not; then the last revision stays.
    fn reload(&mut self) -> report::ReloadReport {
        let before = self.in_force.as_ref().map(|f| (f.revision.number, f.revision.digest.clone()));
        let warnings = match crate::policy::read_dir_recursive(&self.config.policy) {
            Ok(files) => self.take(files),
            Err(error) => {
                let why = format!("the policy cannot be read: {error}");
                self.refuse(Refused { at: Timestamp::now(), why, problems: Vec::new() });
                Vec::new()
            }
        };
        let after = self.in_force.as_ref().map(|f| (f.revision.number, f.revision.digest.clone()));
        report::ReloadReport {
            changed: before != after,
            revision: self.in_force.as_ref().map(|f| f.revision.clone()),
            refused: self.refused.clone(),
            warnings,
        }
    }

    fn refuse(&mut self, refused: Refused) {
        tracing::error!("revision refused, the last one stays: {}", refused.why);
        for problem in &refused.problems {
            match &problem.at {
                Some(at) => tracing::error!("{at}: {}", problem.message),
                None => tracing::error!("{}", problem.message),
            }
        }
        self.refused = Some(refused);
    }

    /// Builds and publishes files. Returns the warnings.
    fn take(&mut self, files: Files) -> Vec<Finding> {
        let refused = |why: String| Refused { at: Timestamp::now(), why, problems: Vec::new() };
        let clock = match revision::clock() {
            Ok(clock) => clock,
            Err(e) => {
                self.refuse(refused(format!("the clock cannot be read: {e}")));
                return Vec::new();
            }
        };
        let mut numbers = self.saved.numbers.clone();
        let mut registry = self.registry.clone();
        match revision::build(files, &mut registry, &mut numbers, self.config.monitor, clock) {
            Err(refused) => {
                self.refuse(refused);
                Vec::new()
            }
            Ok(candidate) => {
                let warnings = candidate.warnings.clone();
                match self.put_in_force(candidate, registry, numbers) {
                    Ok(()) => warnings,
                    Err(error) => {
                        self.refuse(refused(format!("the kernel did not take the revision: {error:#}")));
                        Vec::new()
                    }
                }
            }
        }
    }

    /// Plan, then apply. The order opens no hole and breaks nothing that old and new both allow: the new tables know the
    /// label sets of before and after; they are switched as a whole, and only then do cgroups change hands. If the switch
    /// fails nothing has changed. On a new host hooks come last.
    fn put_in_force(&mut self, candidate: Candidate, registry: Registry, numbers: Numbers) -> anyhow::Result<()> {
        let Candidate { files, digest, policy, tables, warnings: _ } = candidate;
        let digest_of_tables = tables.digest();
        let same = match &self.in_force {
            Some(f) => f.tables.digest() == digest_of_tables,
            // What an earlier agent left is taken over as it is if it says the same.
            None => self.holds(&digest_of_tables)?,
        };
        self.saved.numbers = numbers;
        let egress = needs_egress(&tables);
        let number = match &self.in_force {
            Some(f) if f.revision.digest == digest => f.revision.number,
            None if self.saved.revision != 0 && crate::policy::digest(&self.saved.files) == digest => {
                self.saved.revision
            }
            Some(_) | None => self.saved.revision + 1,
        };
        // What numbers mean is known before anything can carry them.
        self.names.learn(&tables.identities, &tables.rule_names, &policy.segments);
        if egress && self.attached {
            self.attach_egress()?;
        }
        let active = if same { self.datapath.active()? } else { self.datapath.publish(&tables)? };
        self.registry = registry;
        let relabelled = self.write_cgroups()?;
        let active = if relabelled { self.datapath.touch()? } else { active };
        let _ = self.names.revisions.insert(active.generation, number);
        self.publish_names();
        self.attach()?;
        if egress {
            self.attach_egress()?;
        } else {
            self.datapath.drop_egress()?;
        }
        let changed = number != self.saved.revision;
        self.saved.revision = number;
        self.saved.files = files.clone();
        let names: Vec<String> = files.iter().map(|(name, _)| name.clone()).collect();
        let loaded_at = match &self.in_force {
            Some(f) if !changed => f.revision.loaded_at,
            Some(_) | None => Timestamp::now(),
        };
        let revision = Revision { number, digest, generation: active.generation, loaded_at, files: names };
        tracing::info!(revision = number, generation = active.generation, entries = tables.rules.len(), "in force");
        self.in_force = Some(InForce { revision, files, policy, tables });
        self.refused = None;
        self.save();
        self.survey();
        Ok(())
    }

    /// Does the kernel hold these very tables already?
    fn holds(&self, digest: &[u8; 32]) -> anyhow::Result<bool> {
        let active = self.datapath.active()?;
        Ok(active.generation != 0
            && self.datapath.read_back(active.slot).is_ok_and(|tables| tables.digest() == *digest))
    }

    fn save(&mut self) {
        match self.store.save(&self.saved) {
            Ok(()) => {
                let _ = self.troubles.remove("save");
            }
            Err(e) => {
                let what = format!("the state cannot be written to {}: {e}", self.config.state_dir.display());
                tracing::error!("{what}");
                let _ = self.troubles.insert(
                    "save",
                    trouble(
                        &what,
                        "enforcement goes on; after a reboot an older revision would be in force first",
                        "make room, or repair the file system",
                    ),
                );
            }
        }
    }

    fn publish_names(&mut self) {
        self.names.wall_minus_boot = wall_minus_boot();
        self.names.cgroups = self
            .registry
            .words()
            .into_iter()
            .map(|(id, (path, workload))| {
                (id, CgroupWords { path: path.as_str().into(), workload: workload.map(|w| w.as_str().into()) })
            })
            .collect();
        self.shared.set_names(self.names.clone());
    }

    /// Makes the kernel's registry equal to ours. True if a cgroup that was there now is somebody else.
    fn write_cgroups(&mut self) -> anyhow::Result<bool> {
        let want = self.registry.entries(&mut self.saved.numbers);
        let mut relabelled = false;
        let mut full = 0;
        for (id, entry) in &want {
            let have = self.cgroups.get(id);
            if have == Some(entry) {
                continue;
            }
            match self.datapath.set_cgroup(*id, entry) {
                Ok(()) => {
                    // One that is new to us may have made sockets already, as what it was taken for.
                    relabelled |= match have {
                        Some(have) => have.identity != entry.identity || have.workload != entry.workload,
                        None => entry.workload != 0,
                    };
                    let _ = self.cgroups.insert(*id, *entry);
                }
                Err(error) => {
                    full += 1;
                    tracing::error!("{error}");
                }
            }
        }
        full += self.write_paths()?;
        let gone: Vec<u64> = self.cgroups.keys().filter(|id| !want.contains_key(id)).copied().collect();
        for id in gone {
            let _ = self.datapath.remove_cgroup(id)?;
            let _ = self.cgroups.remove(&id);
        }
        if full == 0 {
            let _ = self.troubles.remove("cgroups");
        } else {
            let what = format!("{full} cgroups do not fit into the registry of {}", segfw_common::bounds::CGROUPS);
            let _ = self.troubles.insert(
                "cgroups",
                trouble(&what, "they are enforced as the nearest cgroup above them", "fewer cgroups on this host"),
            );
        }
        Ok(relabelled)
    }

    /// Makes the table of paths equal to ours. Returns how many did not fit.
    fn write_paths(&mut self) -> anyhow::Result<usize> {
        let want = self.registry.paths(&mut self.saved.numbers);
        for path in self.paths.keys().filter(|p| !want.contains_key(p)) {
            let _ = self.datapath.remove_path(path)?;
        }
        let mut full = 0;
        for (path, entry) in &want {
            if self.paths.get(path) != Some(entry)
                && let Err(error) = self.datapath.set_path(path, entry)
            {
                full += 1;
                tracing::error!("{error}");
            }
        }
        self.paths = want;
        Ok(full)
    }

    /// Takes cgroups out of the registry that the kernel entered and that were gone before we saw them. One that was
    /// missing in the tree at two surveys is gone.
    fn forget_strays(&mut self) -> anyhow::Result<()> {
        let known = self.datapath.cgroups()?;
        let strays: BTreeSet<u64> =
            known.into_iter().map(|(id, _)| id).filter(|id| !self.cgroups.contains_key(id)).collect();
        for id in strays.intersection(&self.strays) {
            let _ = self.datapath.remove_cgroup(*id)?;
        }
        self.strays = strays;
        Ok(())
    }

    fn attach(&mut self) -> anyhow::Result<()> {
        let root = std::fs::File::open(&self.config.cgroup_root)
            .with_context(|| format!("cannot open {}", self.config.cgroup_root.display()))?;
        for hook in attach::HOOKS {
            let outcome = self.datapath.attach(hook, &root)?;
            tracing::debug!("{}: {outcome:?}", hook.program);
        }
        for interface in self.config.xdp.clone() {
            let index =
                nix::net::if_::if_nametoindex(interface.as_str()).with_context(|| format!("interface {interface}"))?;
            self.datapath.set_xdp_netns(index, netns::current_cookie()?)?;
            let _ = self.datapath.attach_xdp(&interface)?;
        }
        self.attached = true;
        match self.datapath.attach_cgroup_made() {
            Ok(()) => {
                let _ = self.troubles.remove("tracepoint");
            }
            Err(error) => {
                let _ = self.troubles.insert("tracepoint", trouble(&format!("new cgroups are not seen by the kernel: {error}"), "a workload that starts counts as host until the agent has seen it, and for good while no agent runs", "mount tracefs at /sys/kernel/tracing; grant CAP_PERFMON"));
            }
        }
        for layout in attach::remove_other_layouts(&self.config.pin_dir, &self.datapath.dir)? {
            tracing::warn!("removed the programs of another layout, now that ours are attached: {}", layout.display());
        }
        Ok(())
    }

    fn attach_egress(&mut self) -> anyhow::Result<()> {
        let root = std::fs::File::open(&self.config.cgroup_root)?;
        let _ = self.datapath.attach(attach::EGRESS, &root)?;
        Ok(())
    }

    /// The cgroup tree changed.
    fn tree(&mut self, changes: &[Change]) {
        self.registry.apply(changes);
        let sets = self.registry.label_sets();
        let new = match &self.in_force {
            Some(f) => {
                let known: BTreeSet<&Labels> = f
                    .tables
                    .identities
                    .values()
                    .filter_map(|name| match name {
                        IdentityName::Labels(labels) => Some(labels),
                        IdentityName::Reserved(_) | IdentityName::Prefix(_) => None,
                    })
                    .collect();
                sets.iter().any(|labels| !known.contains(labels))
            }
            None => false,
        };
        if new {
            // Labels that no table knows yet (several documents on one cgroup): the tables come first.
            if let Some(files) = self.in_force.as_ref().map(|f| f.files.clone()) {
                let _ = self.take(files);
            }
            return;
        }
        match self.write_cgroups() {
            Ok(relabelled) => {
                if relabelled {
                    self.touch();
                }
            }
            Err(error) => tracing::error!("{error:#}"),
        }
        self.publish_names();
    }

    /// Who is who has changed: cached verdicts are asked again.
    fn touch(&mut self) {
        match self.datapath.touch() {
            Ok(active) => {
                if let Some(f) = &mut self.in_force {
                    f.revision.generation = active.generation;
                    let _ = self.names.revisions.insert(active.generation, f.revision.number);
                }
            }
            Err(error) => tracing::error!("{error}"),
        }
    }

    /// Compares addresses, endpoints and live connections with the kernel.
    fn survey(&mut self) {
        self.looked = proc::boot_ns().unwrap_or(0);
        let survey = match netns::survey() {
            Ok(mut survey) => {
                survey.namespaces.retain(|n| self.is_ours(n));
                let _ = self.troubles.remove("survey");
                survey
            }
            Err(error) => {
                let _ = self.troubles.insert(
                    "survey",
                    trouble(
                        &error.to_string(),
                        "addresses and listeners of this host may be out of date; live connections are cut late",
                        "see segfw doctor",
                    ),
                );
                return;
            }
        };
        let by_path: BTreeMap<String, u64> =
            self.registry.words().into_iter().map(|(id, (path, _))| (path, id)).collect();
        let identity_of = |path: &str| {
            by_path.get(path).and_then(|id| self.cgroups.get(id)).map_or(segfw_common::Identity::HOST.0, |e| e.identity)
        };
        let want = live::addresses(&survey, identity_of);
        match self.write_addresses(want) {
            Ok(true) => self.touch(),
            Ok(false) => {}
            Err(error) => tracing::error!("{error:#}"),
        }
        if let Err(error) = self.forget_strays() {
            tracing::error!("{error:#}");
        }
        if let Err(error) = self.write_endpoints(&survey) {
            tracing::error!("{error:#}");
        }
        self.sweep(&survey);
        self.publish_names();
    }

    /// With `--cgroup-root` below the mount the agent answers for that part of the tree only: a namespace in which no
    /// process of it lives is somebody else's, and its addresses are addresses like any other.
    fn is_ours(&self, namespace: &netns::Namespace) -> bool {
        let Ok(root) = self.config.cgroup_root.strip_prefix(&self.hierarchy.mount) else { return true };
        root.as_os_str().is_empty()
            || namespace.own
            || namespace.cgroups.iter().any(|path| Path::new(path.trim_start_matches('/')).starts_with(root))
    }

    fn write_addresses(&mut self, want: BTreeMap<Addr, AddressEntry>) -> anyhow::Result<bool> {
        let mut changed = false;
        for (addr, entry) in &want {
            if self.addresses.get(addr) != Some(entry) {
                self.datapath.set_address(addr, entry)?;
                changed = true;
            }
        }
        for addr in self.addresses.keys().filter(|a| !want.contains_key(a)) {
            let _ = self.datapath.remove_address(addr)?;
            changed = true;
        }
        self.addresses = want;
        Ok(changed)
    }

    /// Enters what is older than the hooks, takes out what no socket has any more, and mends owners that changed.
    fn write_endpoints(&mut self, survey: &netns::Survey) -> anyhow::Result<()> {
        let have: BTreeMap<EndpointKey, EndpointEntry> = self.datapath.endpoints()?.into_iter().collect();
        let mut want = BTreeMap::new();
        for namespace in &survey.namespaces {
            if let Err(error) = live::endpoints(namespace, &self.cgroups, &mut want) {
                tracing::warn!("namespace {}: {error}", namespace.cookie);
                return Ok(());
            }
        }
        for (key, entry) in &want {
            let differs = have.get(key).is_none_or(|h| h.identity != entry.identity || h.workload != entry.workload);
            if differs {
                self.datapath.set_endpoint(key, entry)?;
            }
        }
        // An entry that was there before the dump began and is in no dump has no socket.
        for key in have.keys().filter(|k| !want.contains_key(k)) {
            let _ = self.datapath.remove_endpoint(key)?;
        }
        Ok(())
    }

    /// Ends live connections that the policy in force no longer allows, and writes down by which rule.
    fn sweep(&mut self, survey: &netns::Survey) {
        let Some(f) = &self.in_force else { return };
        if self.config.monitor {
            return;
        }
        let now = proc::boot_ns().unwrap_or(0);
        let view = View { tables: TablesView { tables: &f.tables, now, host_flags: 0 }, datapath: &self.datapath };
        let mut swept = Swept::default();
        for namespace in &survey.namespaces {
            if let Err(error) = live::sweep(namespace, &view, &self.cgroups, &self.draining, &mut swept) {
                tracing::warn!("sweep of namespace {}: {error}", namespace.cookie);
            }
        }
        let generation = f.revision.generation;
        self.draining = swept.draining;
        for cut in swept.cut {
            let event = revoked(&cut, now, generation);
            self.history.push(Item::Flow(Box::new(enrich(&event, &self.names))));
            if let Some(why) = cut.failed {
                let what = format!("a live connection that is no longer allowed could not be ended: {why}");
                tracing::warn!("{what}");
                let _ = self.troubles.insert(
                    "sweep",
                    trouble(&what, "its packets are refused, but it stays open on both ends", "see segfw doctor"),
                );
            }
        }
    }

    /// How long until something happens by itself: the end of a rule, of a window, of a drain.
    fn deadline(&self) -> Duration {
        let now = proc::boot_ns().unwrap_or(0);
        let tables = self.in_force.as_ref().map(|f| &f.tables);
        // One that passed while something else was under way, or while the agent was stopped, is due now.
        let next = tables.and_then(|t| live::next_deadline(t, self.looked));
        let refresh = tables.and_then(|t| t.refresh_at);
        let drain = self.draining.values().min().copied();
        let next = [next, refresh, drain].into_iter().flatten().min().unwrap_or(u64::MAX);
        // The kernel's own check is exact; a little later is early enough to end what it already refuses.
        Duration::from_nanos(next.saturating_sub(now)).min(SURVEY) + Duration::from_millis(5)
    }

    /// A deadline passed: connections end, timelines are written on.
    fn time_passes(&mut self) {
        let now = proc::boot_ns().unwrap_or(0);
        let stale = self.in_force.as_ref().is_some_and(|f| f.tables.refresh_at.is_some_and(|at| now >= at));
        if stale && let Some(files) = self.in_force.as_ref().map(|f| f.files.clone()) {
            let _ = self.take(files);
            // Refused: what is in force goes on to its strict end. Not asked again at once, but not given up either.
            if let Some(f) = &mut self.in_force
                && f.tables.refresh_at.is_some_and(|at| now >= at)
            {
                f.tables.refresh_at = Some(now.saturating_add(REFRESH_AGAIN.as_nanos() as u64));
            }
            return;
        }
        self.survey();
    }

    /// Tells what was added since the last look. An entry stays in the kernel while it is in use: taking it out between
    /// two denials would lose those that come between the reading and the removal. An agent that takes over tells what
    /// it finds, since it does not know what the one before had told.
    fn fetch_denials(&mut self) {
        let generation = self.in_force.as_ref().map_or(0, |f| f.revision.generation);
        let all = match self.datapath.denials() {
            Ok(all) => all,
            Err(error) => {
                tracing::error!("{error}");
                return;
            }
        };
        let now = proc::boot_ns().unwrap_or(0);
        let idle = if all.len() < segfw_common::bounds::DENIALS as usize / 2 { DENIAL_IDLE } else { DENIALS * 2 };
        let intake = Intake::new(Arc::clone(&self.history));
        let mut told = BTreeMap::new();
        for (key, count) in all {
            let before = self.told.get(&key).copied().unwrap_or(0);
            // Less than before: the entry is a new one.
            let new = count.count.checked_sub(before).unwrap_or(count.count);
            intake.take_denials(&key, &DenialCount { count: new, ..count }, generation, &self.names);
            if key.reject != 0 {
                let _ = self.shared.unanswered.fetch_add(new, std::sync::atomic::Ordering::Relaxed);
            }
            if new == 0 && now.saturating_sub(count.last) > idle.as_nanos() as u64 {
                match self.datapath.forget_denial(&key) {
                    Ok(()) => continue,
                    Err(error) => tracing::error!("{error}"),
                }
            }
            let _ = told.insert(key, count.count);
        }
        self.told = told;
    }
}

/// The egress hook costs a call per packet. It sits there while some segment holds a grant (such sockets have no connect
/// hook), and while some rule has an end (then the kernel alone must be able to end live flows).
pub(crate) fn needs_egress(tables: &Tables) -> bool {
    tables.locals.values().any(|l| l.grants != 0) || tables.rules.values().any(|e| e.until != 0)
}

/// The record of a connection that the sweep ended.
fn revoked(cut: &live::Cut, now: u64, generation: u32) -> FlowEvent {
    FlowEvent {
        time: now,
        sequence: 0,
        cgroup: cut.cgroup,
        netns: cut.flow.netns,
        bytes_sent: 0,
        bytes_received: 0,
        duration: 0,
        local_addr: cut.flow.local_addr,
        remote_addr: cut.flow.remote_addr,
        local: cut.flow.local.0,
        remote: cut.peer.identity.0,
        rule: cut.decision.rule,
        pending_rule: cut.decision.pending_rule,
        generation,
        pid: 0,
        cpu: 0,
        segments_sent: 0,
        segments_received: 0,
        retransmits: 0,
        rtt_us: 0,
        local_port: cut.flow.local_port,
        remote_port: cut.flow.remote_port,
        protocol: cut.flow.protocol,
        kind: EventKind::Revoked as u8,
        direction: cut.flow.direction as u8,
        verdict: cut.decision.verdict as u8,
        reason: cut.decision.reason as u8,
        pending: cut.decision.pending,
        evidence: cut.peer.evidence as u8,
        hook: Hook::Sweep as u8,
        reject: 0,
        socket_type: 0,
        pad: [0; 5],
        comm: [0; 16],
    }
}

fn trouble(what: &str, consequence: &str, action: &str) -> report::Trouble {
    report::Trouble { what: what.to_owned(), consequence: consequence.to_owned(), action: action.to_owned() }
}

fn wall_minus_boot() -> i128 {
    let boot = i128::from(proc::boot_ns().unwrap_or(0));
    Timestamp::now().as_nanosecond() - boot
}
