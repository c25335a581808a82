//! From the folder to the kernel: one revision, taken whole or refused whole.

use super::*;
use crate::policy::compile::Clock;
use crate::policy::{Document, HostSettings, Inventory};
use revision::Basis;

/// A revision that is younger than this when its author names himself is the one he means.
const SEEN_FIRST: Duration = Duration::from_secs(5);

impl Core {
    /// The state of an agent that starts: with what is in force, if anything can be.
    pub(super) fn new(
        config: Config,
        datapath: Arc<Datapath>,
        hierarchy: Hierarchy,
        shared: Arc<Shared>,
        history: Arc<History>,
    ) -> anyhow::Result<Self> {
        let mut core = Self::assemble(config, datapath, hierarchy, shared, history)?;
        core.start();
        Ok(core)
    }

    /// What is known before any revision: the saved state, what the kernel holds, the cgroup tree.
    pub(super) fn assemble(
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
        // The part of the tree that this agent answers for.
        let below = config.cgroup_root.strip_prefix(&hierarchy.mount).unwrap_or(Path::new(""));
        let root = Path::new("/").join(below);
        // Where the state was lost and the history was not, no number is given twice.
        let archive = archive::Archive::new(store.dir());
        saved.revision = saved.revision.max(archive.newest());
        let mut core = Self {
            registry: Registry::new(config.host_labels.clone(), root),
            started_at: Timestamp::now(),
            names: Names { host: config.host.as_str().into(), ..Names::default() },
            config,
            datapath,
            hierarchy,
            archive,
            source: None,
            texts: Memory::default(),
            read: Cache::default(),
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
            aggregated: None,
            flags: 0,
            beat_at: 0,
            closed_until_first: false,
            repairs: VecDeque::new(),
            repaired: 0,
            canary: None,
            checks: None,
            ingress: false,
            tcp_by_conn: false,
            listeners: BTreeSet::new(),
            containers_left_out: 0,
            last_sweep: None,
            unseen: false,
            looked: 0,
        };
        // What an earlier agent registered is what the kernel holds.
        core.cgroups = core.datapath.cgroups()?.into_iter().collect();
        core.addresses = core.datapath.addresses()?.into_iter().collect();
        core.paths = core.datapath.paths()?.into_iter().collect();
        // Closed since the boot, by the early loader or by an agent that is gone.
        core.closed_until_first = core.datapath.host_flags()?
            & !(control::HOST_MONITOR | control::HOST_PART | control::HOST_CONN)
            == control::gone_after(0);
        core.set_flags()?;
        let tree: Vec<Change> =
            core.hierarchy.scan()?.into_iter().map(|(path, id)| Change::Appeared { path, id }).collect();
        core.registry.apply(&tree);
        Ok(core)
    }

    /// What holds for the whole host, and until when if no agent is heard of again.
    pub(super) fn set_flags(&mut self) -> anyhow::Result<()> {
        let absence = &self.config.absence;
        let mut flags = if self.config.monitor { control::HOST_MONITOR } else { 0 };
        flags |= if self.is_part() { control::HOST_PART } else { 0 };
        flags |= if self.tcp_by_conn { control::HOST_CONN } else { 0 };
        let later = proc::boot_ns()?.saturating_add(u64::from(absence.agent_gone_after_seconds) * 1_000_000_000);
        flags |= match absence.agent_gone {
            _ if self.closed_until_first => control::gone_after(0),
            Absent::LastKnownGood => 0,
            Absent::Closed => control::gone_after(later),
            Absent::Open => control::gone_after(later) | control::HOST_GONE_OPEN,
        };
        self.datapath.set_host_flags(flags)?;
        self.flags = flags;
        Ok(())
    }

    /// The first revision: the folder's, else what `absence.beforeFirstRevision` says. After a restart, where the kernel
    /// enforces already, always the last one that was in force here.
    pub(super) fn start(&mut self) {
        let _ = self.reload(false);
        if self.in_force.is_none() {
            self.start_without_folder();
        }
    }

    /// What was in force last, if there is something and if the settings say so.
    pub(super) fn start_without_folder(&mut self) {
        let after_boot = !self.attached;
        match self.config.absence.before_first_revision {
            Absent::Open if after_boot => {
                tracing::warn!("nothing is enforced before the first revision: absence.beforeFirstRevision is open");
                return;
            }
            Absent::Closed if after_boot => self.closed_until_first = true,
            Absent::Closed | Absent::Open | Absent::LastKnownGood => {}
        }
        if self.saved.files.is_empty() {
            tracing::warn!("no revision was ever in force here: nothing is enforced");
            return;
        }
        if let Err(error) = self.set_flags() {
            tracing::error!("{error:#}");
        }
        tracing::warn!("taking the last revision that was in force");
        let refused = self.refused.take();
        let files = self.saved.files.clone();
        let _ = self.take(files, false);
        self.refused = refused.or(self.refused.take());
    }

    /// Reads the folder and puts it in force, or says why not; then the last revision stays. `advise` = somebody is there to
    /// read what is odd about it, who asked for it: then every file is read.
    pub(super) fn reload(&mut self, advise: bool) -> report::ReloadReport {
        let before = self.in_force.as_ref().map(|f| (f.revision.number, f.revision.digest.clone()));
        let begun = std::time::Instant::now();
        if advise {
            self.texts.doubt();
        }
        let files = crate::policy::load::read_again(&self.config.policy, &mut self.texts);
        tracing::debug!(took = ?begun.elapsed(), "files read");
        let warnings = match files {
            Ok(files) => self.take(files, advise),
            Err(error) => {
                let why = format!("the policy cannot be read: {error}");
                self.refuse(Refused { at: Timestamp::now(), why, problems: Vec::new() });
                Vec::new()
            }
        };
        if self.closed_until_first && self.in_force.is_some() && self.refused.is_none() {
            self.closed_until_first = false;
            if let Err(error) = self.set_flags() {
                tracing::error!("{error:#}");
            }
        }
        let after = self.in_force.as_ref().map(|f| (f.revision.number, f.revision.digest.clone()));
        report::ReloadReport {
            changed: before != after,
            revision: self.in_force.as_ref().map(|f| f.revision.clone()),
            refused: self.refused.clone(),
            warnings,
        }
    }

    pub(super) fn refuse(&mut self, refused: Refused) {
        tracing::error!("revision refused, the last one stays: {}", refused.why);
        for problem in &refused.problems {
            match &problem.at {
                Some(at) => tracing::error!("{at}: {}", problem.message),
                None => tracing::error!("{}", problem.message),
            }
        }
        self.refused = Some(refused);
    }

    /// Builds and publishes files. Returns the warnings, if somebody is there to read them.
    pub(super) fn take(&mut self, files: Files, advise: bool) -> Vec<Finding> {
        let refused = |why: String| Refused { at: Timestamp::now(), why, problems: Vec::new() };
        let clock = match revision::clock() {
            Ok(clock) => clock,
            Err(e) => {
                self.refuse(refused(format!("the clock cannot be read: {e}")));
                return Vec::new();
            }
        };
        let begun = std::time::Instant::now();
        let read = crate::policy::document::parse_again(&files, &mut self.read);
        tracing::debug!(at = ?begun.elapsed(), "parsed");
        let in_force = self.in_force.as_ref().filter(|_| self.attached && read.1.is_empty());
        let change = in_force.and_then(|f| {
            let held = (&f.policy, &f.tables, &f.basis);
            revision::change(&read.0, held, &self.registry, &mut self.saved.numbers, clock)
        });
        tracing::debug!(at = ?begun.elapsed(), alone = change.is_some(), "looked for a change of a few rules");
        if let Some(change) = change {
            if let Err(error) = self.put_change_in_force(files, change, begun) {
                self.refuse(refused(format!("the kernel did not take the revision: {error:#}")));
                return Vec::new();
            }
            return if advise { self.advice(&read.0, clock) } else { Vec::new() };
        }
        let mut numbers = self.saved.numbers.clone();
        let mut registry = self.registry.clone();
        match revision::build_read(files, read, &mut registry, &mut numbers, self.config.monitor, clock) {
            Err(refused) => {
                self.refuse(refused);
                Vec::new()
            }
            Ok(candidate) => {
                let warnings = candidate.warnings.clone();
                match self.put_in_force(candidate, registry, numbers, begun) {
                    Ok(()) => warnings,
                    Err(error) => {
                        self.refuse(refused(format!("the kernel did not take the revision: {error:#}")));
                        Vec::new()
                    }
                }
            }
        }
    }

    /// What is odd about the revision in force. It takes longer than a change does, so it comes after it.
    fn advice(&self, documents: &[Arc<Document>], clock: Clock) -> Vec<Finding> {
        let inventory = Inventory { workloads: self.registry.known() };
        let host = HostSettings { monitor: self.config.monitor };
        let (_, problems) = crate::policy::resolve(documents, &inventory, &host, clock.wall);
        let problems = crate::policy::Problems::new(problems);
        problems.iter().map(Finding::from).chain(self.registry.conflicts().iter().map(Finding::from)).collect()
    }

    /// [`Self::put_in_force`] where only a few rules are others: who carries which labels, which hooks are needed and what
    /// changes by itself stays as it is, and the tables in force are amended and not built anew.
    fn put_change_in_force(
        &mut self,
        files: Files,
        change: revision::Change,
        begun: std::time::Instant,
    ) -> anyhow::Result<()> {
        let revision::Change { rules, mut amendment, basis } = change;
        let changed = amendment.rules.len();
        let silent = amendment.is_silent();
        let names = amendment.rule_names.iter().filter_map(|(number, name)| Some((*number, name.as_ref()?)));
        self.names.learn_rules(names);
        self.judge_packets()?;
        let Some(f) = &mut self.in_force else { anyhow::bail!("no revision is in force that could change") };
        amendment.swap(&mut f.tables);
        let active =
            if silent { self.datapath.active() } else { self.datapath.publish_change(&f.tables, &amendment.rules) };
        tracing::debug!(at = ?begun.elapsed(), "published");
        let active = match active {
            Ok(active) => active,
            Err(error) => {
                amendment.swap(&mut f.tables);
                return Err(error.into());
            }
        };
        let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.shared.apply_ns.store(took, std::sync::atomic::Ordering::Relaxed);
        // From here on it is enforced; what follows is for the next agent, and for who reads.
        f.basis.ends.replace_rules(&mut f.policy, rules);
        let Basis { sets, ends, .. } = std::mem::take(&mut f.basis);
        f.basis = Basis { sets, ends, ..basis };
        let digest = crate::policy::digest(&files);
        if digest != f.revision.digest {
            f.revision.number = self.saved.revision + 1;
            f.revision.loaded_at = Timestamp::now();
        }
        f.revision.digest = digest;
        f.revision.generation = active.generation;
        f.revision.files = files.iter().map(|(name, _)| name.clone()).collect();
        let (number, entries) = (f.revision.number, f.tables.rules.len());
        tracing::info!(revision = number, generation = active.generation, entries, changed, "in force");
        f.maps = self.datapath.inner_maps(active)?;
        self.saved.revision = number;
        self.saved.files = files.clone();
        f.files = files;
        let _ = self.names.revisions.insert(active.generation, number);
        self.publish_names();
        // As after any revision, though a change of rules needs no other hooks.
        self.attach()?;
        self.refused = None;
        self.finish();
        Ok(())
    }

    /// What comes after a switch: live connections first, since all else can wait.
    fn finish(&mut self) {
        self.survey();
        self.save();
        self.keep_revision();
        // The next revision waits for no grace period.
        if let Err(error) = self.datapath.settle() {
            tracing::warn!("{error}");
        }
        give_back();
    }

    /// Plan, then apply. The order opens no hole and breaks nothing that old and new both allow: the new tables know the
    /// label sets of before and after; they are switched as a whole, and only then do cgroups change hands. If the switch
    /// fails nothing has changed. On a new host hooks come last.
    pub(super) fn put_in_force(
        &mut self,
        candidate: Candidate,
        registry: Registry,
        numbers: Numbers,
        begun: std::time::Instant,
    ) -> anyhow::Result<()> {
        let Candidate { files, digest, policy, tables, warnings: _, basis } = candidate;
        let same = match &self.in_force {
            Some(f) => f.tables.say_the_same(&tables),
            // What an earlier agent left is taken over as it is if it says the same.
            None => self.datapath.holds(&tables).unwrap_or(false),
        };
        self.saved.numbers = numbers;
        let deadlines = live::deadlines(&tables);
        let egress = needs_egress(&tables, &deadlines);
        let number = match &self.in_force {
            Some(f) if f.revision.digest == digest => f.revision.number,
            None if self.saved.revision != 0 && crate::policy::digest(&self.saved.files) == digest => {
                self.saved.revision
            }
            Some(_) | None => self.saved.revision + 1,
        };
        // What numbers mean is known before anything can carry them.
        let before = self.in_force.as_ref().map(|f| f.policy.segments.as_slice());
        self.names.learn(&tables.identities, &tables.rule_names, &policy.segments, before);
        if self.attached {
            // What the switch revokes is refused from its very moment on, and not only when the sweep comes to it.
            self.judge_packets()?;
            if egress {
                self.attach_egress()?;
            }
        }
        let active = if same { self.datapath.active()? } else { self.datapath.publish(&tables)? };
        self.registry = registry;
        let relabelled = self.write_cgroups()?;
        let active = if relabelled { self.datapath.touch()? } else { active };
        // From here on it is enforced, unless hooks are missing; what follows is for the next agent, and for who reads.
        let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.shared.apply_ns.store(took, std::sync::atomic::Ordering::Relaxed);
        let _ = self.names.revisions.insert(active.generation, number);
        self.publish_names();
        let first = !self.attached;
        if first {
            self.look_around();
        }
        self.attach()?;
        let active = if first && self.look_back() { self.datapath.touch()? } else { active };
        let _ = self.names.revisions.insert(active.generation, number);
        if egress {
            self.attach_egress()?;
        } else {
            self.datapath.drop_hook(attach::EGRESS)?;
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
        let maps = self.datapath.inner_maps(active)?;
        self.in_force = Some(InForce { revision, files, policy, tables, basis, deadlines, maps });
        self.refused = None;
        self.finish();
        Ok(())
    }

    pub(super) fn save(&mut self) {
        let saved = self.store.save(&self.saved);
        let what = format!("the state cannot be written to {}", self.config.state_dir.display());
        self.written("save", &what, "after a reboot an older revision would be in force first", saved);
    }

    /// Keeps the files of the revision in force, so that they can be put back.
    fn keep_revision(&mut self) {
        let Some(f) = &self.in_force else { return };
        let number = f.revision.number;
        if self.archive.has(number) {
            return;
        }
        let source = self.source.as_deref().unwrap_or(archive::FOLDER);
        let kept = self.archive.keep(number, &f.revision.digest, f.revision.loaded_at, source, &f.files);
        let what = format!("revision {number} cannot be kept in {}", self.config.state_dir.display());
        self.written("history", &what, "there is no way back to this revision", kept);
    }

    /// A trouble of the state folder comes, or goes.
    fn written(&mut self, kind: &'static str, what: &str, consequence: &str, outcome: std::io::Result<()>) {
        let Err(error) = outcome else {
            let _ = self.troubles.remove(kind);
            return;
        };
        let what = format!("{what}: {error}");
        tracing::error!("{what}");
        let consequence = format!("enforcement goes on; {consequence}");
        let _ = self.troubles.insert(kind, trouble(&what, &consequence, "make room, or repair the file system"));
    }

    /// As `reload`, for files that somebody has put there who says who they are from.
    pub(super) fn take_from(&mut self, source: String) -> report::ReloadReport {
        self.source = Some(source.clone());
        let report = self.reload(true);
        self.source = None;
        // The watch of the folder may have been quicker than the caller.
        if !report.changed
            && let Some(revision) = &report.revision
            && revision.loaded_at + SEEN_FIRST > Timestamp::now()
            && let Err(e) = self.archive.attribute(revision.number, &source)
        {
            tracing::warn!("the history does not say who revision {} is from: {e}", revision.number);
        }
        report
    }

    pub(super) fn publish_names(&mut self) {
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
}

/// The egress hook costs a call per packet. It sits there while some segment holds a grant (such sockets have no connect
/// hook), and while some rule has an end (then the kernel alone must be able to end live flows).
pub(crate) fn needs_egress(tables: &Tables, deadlines: &[u64]) -> bool {
    tables.locals.values().any(|l| l.grants != 0) || !deadlines.is_empty()
}

/// Building a revision needs several times the memory of the result. What is free again goes back to the host now, and not
/// when the allocator comes by it.
fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: touches free memory only.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Nanoseconds.
pub(super) fn wall_minus_boot() -> i128 {
    let boot = i128::from(proc::boot_ns().unwrap_or(0));
    Timestamp::now().as_nanosecond() - boot
}
