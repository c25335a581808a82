//! What somebody changed in the kernel behind our back: found, mended, told. Root wins in the end; but not in silence.

use super::*;
use crate::datapath::generation::Active;
use crate::datapath::guard::Difference;

/// Repairs that `segfw status` lists; all are counted and logged.
const REPAIRS_KEPT: usize = 32;

impl Core {
    /// Compares everything that we own in the kernel with what we wrote there.
    pub(super) fn guard(&mut self) {
        if self.in_force.is_none() {
            return;
        }
        let mut found = Vec::new();
        match std::fs::File::open(&self.config.cgroup_root) {
            Ok(root) => found.extend(self.guard_hooks(&root)),
            Err(error) => tracing::error!("{}: {error}", self.config.cgroup_root.display()),
        }
        found.extend(self.datapath.mend_pins());
        match self.guard_tables().and_then(|mut all| {
            all.extend(self.guard_host_maps()?);
            Ok(all)
        }) {
            Ok(more) => found.extend(more),
            Err(error) => tracing::error!("the kernel's tables cannot be compared with ours: {error:#}"),
        }
        for difference in found {
            self.tell(difference);
        }
        self.ask_canaries();
    }

    /// A sign of life, where somebody waits for one: four in the time after which the agent counts as gone.
    pub(super) fn beat(&mut self) {
        let now = proc::boot_ns().unwrap_or(0);
        let pause = u64::from(self.config.absence.agent_gone_after_seconds) * 1_000_000_000 / 4;
        if self.config.absence.agent_gone == Absent::LastKnownGood || now < self.beat_at {
            return;
        }
        self.beat_at = now + pause;
        if let Err(error) = self.set_flags() {
            tracing::error!("{error:#}");
        }
    }

    fn guard_hooks(&self, root: &std::fs::File) -> Vec<Difference> {
        let egress = self.in_force.as_ref().is_some_and(|f| needs_egress(&f.tables));
        let mut found = self.datapath.mend_hooks(root, egress);
        match self.datapath.mend_cgroup_made() {
            // Where there is no tracefs that is a trouble of its own, said at the start.
            Ok(true) if !self.troubles.contains_key("tracepoint") => {
                found.push(Difference::new("hook cgroup_made", "its pin was gone, or the link", Ok::<_, String>(())));
            }
            Ok(_) | Err(_) => {}
        }
        for interface in &self.config.xdp {
            if let Some(difference) = self.datapath.mend_xdp(interface) {
                found.push(difference);
            }
        }
        found
    }

    /// The generation in force, and the flags of the host.
    fn guard_tables(&mut self) -> anyhow::Result<Vec<Difference>> {
        let mut found = Vec::new();
        let flags = self.datapath.host_flags()?;
        if flags != self.flags {
            let what = format!("{flags:#x} instead of {:#x}", self.flags);
            found.push(Difference::new(
                "map CONTROL, flags of the host",
                what,
                self.datapath.set_host_flags(self.flags),
            ));
        }
        let active = self.datapath.active()?;
        let Some(f) = &mut self.in_force else { return Ok(found) };
        let ours = f.revision.generation;
        let maps = self.datapath.inner_maps(active.slot)?;
        if maps != f.maps {
            let slot = (0..segfw_common::bounds::SLOTS)
                .find(|slot| self.datapath.inner_maps(*slot).is_ok_and(|maps| maps == f.maps));
            let (what, mended) = match slot {
                // The word was turned to another slot; ours is whole.
                Some(slot) => (
                    format!("generation {} in slot {}, which is not ours", active.generation, active.slot),
                    self.datapath.restore_active(Active { generation: active.generation.max(ours), slot }),
                ),
                None => ("other tables".to_owned(), self.datapath.publish(&f.tables)),
            };
            if let Ok(active) = &mended {
                f.revision.generation = active.generation;
                f.maps = self.datapath.inner_maps(active.slot)?;
                let _ = self.names.revisions.insert(active.generation, f.revision.number);
            }
            found.push(Difference::new("map CONTROL, tables in force", what, mended.map(drop)));
        } else if active.generation != ours {
            let what = format!("generation {} instead of {ours}", active.generation);
            let newer = Active { generation: active.generation.max(ours), slot: active.slot };
            let mended = self.datapath.restore_active(newer);
            if let Ok(active) = &mended {
                f.revision.generation = active.generation;
                let _ = self.names.revisions.insert(active.generation, f.revision.number);
            }
            found.push(Difference::new("map CONTROL, generation in force", what, mended.map(drop)));
        }
        Ok(found)
    }

    /// Cgroups, paths and addresses. Cgroups that the hooks entered by themselves are not ours yet.
    fn guard_host_maps(&mut self) -> anyhow::Result<Vec<Difference>> {
        let mut found = Vec::new();
        let have: BTreeMap<u64, CgroupEntry> = self.datapath.cgroups()?.into_iter().collect();
        for (id, entry) in &self.cgroups {
            if have.get(id) != Some(entry) {
                let what = have.get(id).map_or("no entry".to_owned(), |h| {
                    format!("identity {} instead of {}", h.identity, entry.identity)
                });
                let mended = self.datapath.set_cgroup(*id, entry);
                found.push(Difference::new(format!("map CGROUPS, cgroup {id}"), what, mended));
            }
        }
        let have: BTreeMap<PathKey, CgroupEntry> = self.datapath.paths()?.into_iter().collect();
        for key in have.keys().chain(self.paths.keys()).collect::<BTreeSet<_>>() {
            let (is, should) = (have.get(key), self.paths.get(key));
            if is != should {
                let mended = match should {
                    Some(entry) => self.datapath.set_path(key, entry),
                    None => self.datapath.remove_path(key).map(drop),
                };
                let bytes = key.bytes.split(|b| *b == 0).next().unwrap_or_default();
                let what = format!("map PATHS, {}", String::from_utf8_lossy(bytes));
                found.push(Difference::new(what, changed(is.is_some(), should.is_some()), mended));
            }
        }
        let have: BTreeMap<Addr, AddressEntry> = self.datapath.addresses()?.into_iter().collect();
        for key in have.keys().chain(self.addresses.keys()).collect::<BTreeSet<_>>() {
            let (is, should) = (have.get(key), self.addresses.get(key));
            if is != should {
                let mended = match should {
                    Some(entry) => self.datapath.set_address(key, entry),
                    None => self.datapath.remove_address(key).map(drop),
                };
                let what = format!("map ADDRESSES, {key}");
                found.push(Difference::new(what, changed(is.is_some(), should.is_some()), mended));
            }
        }
        // Whatever was judged by a wrong entry is judged again.
        if !found.is_empty() {
            self.touch();
        }
        Ok(found)
    }

    fn tell(&mut self, Difference { what, found, left }: Difference) {
        match &left {
            None => tracing::warn!("somebody changed {what}: {found}; it is as it should be again"),
            Some(why) => tracing::error!("somebody changed {what}: {found}; it could not be mended: {why}"),
        }
        self.repaired += 1;
        if self.repairs.len() == REPAIRS_KEPT {
            let _ = self.repairs.pop_front();
        }
        self.repairs.push_back(report::Repair { at: Timestamp::now(), what, found, left });
    }

    /// Do the hooks still refuse? Another program may lift what ours refuse.
    fn ask_canaries(&mut self) {
        // In monitor mode nothing is refused; and hooks below the root do not see an agent that runs beside them.
        let root = self.registry.root();
        let inside = || proc::cgroup_of(std::process::id()).is_some_and(|own| Path::new(&own).starts_with(root));
        if self.config.monitor || !inside() {
            return;
        }
        let datapath = Arc::clone(&self.datapath);
        let failed = datapath.canaries(&mut self.canary);
        if failed.is_empty() {
            if self.troubles.remove("canary").is_some() {
                tracing::warn!("the hooks refuse again what they must refuse");
            }
            return;
        }
        let what: Vec<String> = failed.iter().map(|(hook, why)| format!("{hook}: {why}")).collect();
        let what = format!("a hook does not refuse what it must: {}", what.join("; "));
        if !self.troubles.contains_key("canary") {
            tracing::error!("{what}");
            self.tell(Difference::new("verdicts", what.clone(), Err("found out by trying; the cause is not ours")));
        }
        let consequence = "connections that the policy refuses can be made";
        let action = "segfw status lists programs of others at our hooks (neighbours): find out who attached them";
        let _ = self.troubles.insert("canary", trouble(&what, consequence, action));
    }
}

fn changed(is: bool, should: bool) -> &'static str {
    match (is, should) {
        (true, false) => "an entry that nobody wrote",
        (false, true) => "no entry",
        (_, _) => "another value",
    }
}
