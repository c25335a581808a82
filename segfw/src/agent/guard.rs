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

    fn guard_hooks(&mut self, root: &std::fs::File) -> Vec<Difference> {
        let egress = self.in_force.as_ref().is_some_and(|f| needs_egress(&f.tables, &f.deadlines));
        let mut found = self.datapath.mend_hooks(root, self.ingress, egress);
        found.extend(self.guard_checks());
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
        let Some(f) = &self.in_force else { return Ok(found) };
        let (active, ours) = (self.datapath.active()?, f.revision.generation);
        let restore =
            |place: Active| self.datapath.restore_active(Active { generation: active.generation.max(ours), ..place });
        let (what, was, mended) = if self.datapath.inner_maps(active)? != f.maps {
            // The word may have been turned to another slot while ours is whole.
            let (was, mended) = match self.datapath.find(&f.maps) {
                Some(place) => {
                    let was = format!("generation {} in slot {}, which is not ours", active.generation, active.slot);
                    (was, restore(place))
                }
                None => ("other tables".to_owned(), self.datapath.publish(&f.tables)),
            };
            ("tables in force", was, mended)
        } else if active.generation != ours {
            ("generation in force", format!("generation {} instead of {ours}", active.generation), restore(active))
        } else {
            return Ok(found);
        };
        if let Ok(active) = &mended {
            let maps = self.datapath.inner_maps(*active)?;
            self.now_is(*active);
            if let Some(f) = &mut self.in_force {
                f.maps = maps;
            }
        }
        found.push(Difference::new(format!("map CONTROL, {what}"), was, mended.map(drop)));
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
        let path = |key: &PathKey| {
            let bytes = key.bytes.split(|b| *b == 0).next().unwrap_or_default();
            format!("map PATHS, {}", String::from_utf8_lossy(bytes))
        };
        let have = self.datapath.paths()?.into_iter().collect();
        found.extend(mend(&have, &self.paths, path, |key, should| match should {
            Some(entry) => self.datapath.set_path(key, entry),
            None => self.datapath.remove_path(key).map(drop),
        }));
        let have = self.datapath.addresses()?.into_iter().collect();
        found.extend(mend(
            &have,
            &self.addresses,
            |addr| format!("map ADDRESSES, {addr}"),
            |addr, should| match should {
                Some(entry) => self.datapath.set_address(addr, entry),
                None => self.datapath.remove_address(addr).map(drop),
            },
        ));
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
        // Connections may have been made past the hooks.
        self.last_sweep = None;
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
        let failed = datapath.canaries(self.ingress, &mut self.canary);
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

/// Makes a table that nobody but us writes equal to what it should be.
fn mend<K: Ord, V: PartialEq>(
    have: &BTreeMap<K, V>,
    want: &BTreeMap<K, V>,
    name: impl Fn(&K) -> String,
    set: impl Fn(&K, Option<&V>) -> Result<(), crate::datapath::Error>,
) -> Vec<Difference> {
    let keys: BTreeSet<&K> = have.keys().chain(want.keys()).collect();
    let differ = keys.into_iter().map(|key| (key, have.get(key), want.get(key))).filter(|(_, is, should)| is != should);
    differ
        .map(|(key, is, should)| {
            let found = match (is, should) {
                (Some(_), None) => "an entry that nobody wrote",
                (None, _) => "no entry",
                (Some(_), Some(_)) => "another value",
            };
            Difference::new(name(key), found, set(key, should))
        })
        .collect()
}
