//! What the agent writes to the kernel beside the tables: who is who, and the hooks.

use super::*;
use crate::datapath::generation::Active;

/// The trouble of [`Core::attach_walls`].
pub(super) const NO_WALL: &str = "xdp";

impl Core {
    /// Makes the kernel's registry equal to ours. True if a cgroup that was there now is somebody else.
    pub(super) fn write_cgroups(&mut self) -> anyhow::Result<bool> {
        let want = self.registry.entries(&mut self.saved.numbers);
        let paths = self.registry.says_otherwise().then(|| self.registry.paths(&mut self.saved.numbers));
        // Somebody who judges by the tables of before must not meet the labels of after: those tables do not know them.
        if (want != self.cgroups || paths.as_ref().is_some_and(|paths| *paths != self.paths))
            && let Err(error) = self.datapath.settle()
        {
            tracing::warn!("{error}");
        }
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
        if let Some(paths) = paths {
            let left_out = self.write_paths(paths)?;
            full += left_out;
            // What did not fit is tried again with the next change of the tree.
            if left_out == 0 {
                self.registry.was_told();
            }
        }
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
    fn write_paths(&mut self, want: BTreeMap<PathKey, CgroupEntry>) -> anyhow::Result<usize> {
        for path in self.paths.keys().filter(|p| !want.contains_key(p)) {
            let _ = self.datapath.remove_path(path)?;
        }
        let before = want.len();
        let mut want = want;
        want.retain(|path, entry| match self.paths.get(path) == Some(entry) {
            true => true,
            false => self.datapath.set_path(path, entry).inspect_err(|error| tracing::error!("{error}")).is_ok(),
        });
        let full = before - want.len();
        self.paths = want;
        Ok(full)
    }

    /// Takes cgroups out of the registry that the kernel entered and that were gone before we saw them. One that was
    /// missing in the tree at two surveys is gone.
    pub(super) fn forget_strays(&mut self) -> anyhow::Result<()> {
        let known = self.datapath.cgroups()?;
        let strays: BTreeSet<u64> =
            known.into_iter().map(|(id, _)| id).filter(|id| !self.cgroups.contains_key(id)).collect();
        for id in strays.intersection(&self.strays) {
            let _ = self.datapath.remove_cgroup(*id)?;
        }
        self.strays = strays;
        Ok(())
    }

    pub(super) fn attach(&mut self) -> anyhow::Result<()> {
        let root = std::fs::File::open(&self.config.cgroup_root)
            .with_context(|| format!("cannot open {}", self.config.cgroup_root.display()))?;
        for hook in attach::HOOKS {
            let outcome = self.datapath.attach(hook, &root)?;
            tracing::debug!("{}: {outcome:?}", hook.program);
        }
        self.ingress = true;
        self.attached = true;
        if self.checks.is_none() {
            self.attach_checks();
        }
        self.attach_walls();
        match self.datapath.attach_cgroup_made() {
            Ok(()) => {
                let _ = self.troubles.remove("tracepoint");
            }
            Err(error) => {
                let _ = self.troubles.insert("tracepoint", trouble(&format!("new cgroups are not seen by the kernel: {error}"), "a workload that starts counts as host until the agent has seen it, and for good while no agent runs", "mount tracefs at /sys/kernel/tracing (below 6.1: BTF); grant CAP_PERFMON; no lockdown=confidentiality"));
            }
        }
        for layout in attach::remove_other_layouts(&self.config.pin_dir, &self.datapath.dir)? {
            tracing::warn!("removed the programs of another layout, now that ours are attached: {}", layout.display());
        }
        Ok(())
    }

    /// The outer wall. No verdict needs it, so an interface that is not there, as before the network at boot, is a
    /// trouble and not the end of a revision; each survey tries again.
    pub(super) fn attach_walls(&mut self) {
        let attach = |interface: &String| -> anyhow::Result<()> {
            let index =
                nix::net::if_::if_nametoindex(interface.as_str()).with_context(|| format!("interface {interface}"))?;
            self.datapath.set_xdp_netns(index, netns::current_cookie()?)?;
            let _ = self.datapath.attach_xdp(interface)?;
            Ok(())
        };
        let failed: Vec<String> =
            self.config.xdp.iter().filter_map(|i| attach(i).err()).map(|e| format!("{e:#}")).collect();
        if failed.is_empty() {
            let _ = self.troubles.remove(NO_WALL);
        } else {
            let what = format!("no outer wall: {}", failed.join("; "));
            let action = "nothing if the interface comes later: it is tried again; else take it out of xdp:";
            let _ = self.troubles.insert(NO_WALL, trouble(&what, "the sockets enforce without it", action));
        }
    }

    pub(super) fn attach_egress(&mut self) -> anyhow::Result<()> {
        let root = std::fs::File::open(&self.config.cgroup_root)?;
        let _ = self.datapath.attach(attach::EGRESS, &root)?;
        Ok(())
    }

    /// The cgroup tree changed. True if container runtimes are to be asked what is new in it.
    pub(super) fn tree(&mut self, changes: &[Change]) -> bool {
        self.registry.apply(changes);
        self.relabel();
        let appeared = changes.iter().any(|change| matches!(change, Change::Appeared { .. }));
        appeared && self.registry.wants_containers()
    }

    /// What the container runtimes said, asked when everything up to `batch` was in the tree. True if they are to be asked
    /// again soon: some cgroup is still not known.
    pub(super) fn containers(&mut self, batch: u64, listing: Listing) -> bool {
        self.containers_left_out += listing.left_out;
        if listing.failed.is_empty() {
            let _ = self.troubles.remove("runtimes");
        } else {
            let all: Vec<String> = listing.failed.iter().map(|(at, why)| format!("{}: {why}", at.display())).collect();
            let what = format!("a container runtime did not answer: {}", all.join("; "));
            let consequence = "containers that it made since are unresolved; those it told of before stay who they are";
            let _ = self.troubles.insert(
                "runtimes",
                trouble(&what, consequence, "start it again, or take its socket out of the settings (runtimes)"),
            );
        }
        if self.registry.set_containers(batch, listing) {
            self.relabel();
        }
        self.registry.unresolved().next().is_some()
    }

    /// Somebody may be somebody else now: the kernel is told.
    fn relabel(&mut self) {
        let is_new = |f: &InForce| self.registry.says_otherwise() && !self.registry.needs_only(&f.basis.sets);
        let new = self.in_force.as_ref().is_some_and(is_new);
        if new {
            // Labels that no table knows yet (several documents on one cgroup): the tables come first.
            if let Some(files) = self.in_force.as_ref().map(|f| f.files.clone()) {
                let _ = self.take(files, false);
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
    pub(super) fn touch(&mut self) {
        match self.datapath.touch() {
            Ok(active) => self.now_is(active),
            Err(error) => tracing::error!("{error}"),
        }
    }

    /// The revision in force has another number in the kernel.
    pub(super) fn now_is(&mut self, active: Active) {
        if let Some(f) = &mut self.in_force {
            f.revision.generation = active.generation;
            let _ = self.names.revisions.insert(active.generation, f.revision.number);
        }
    }
}
