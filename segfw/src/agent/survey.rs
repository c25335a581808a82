//! What happens by itself: addresses, endpoints and live connections change, rules end, denials add up.

use super::kernel::NO_WALL;
use super::*;

/// Connections are judged again after so long even if nothing that a verdict rests on changed: for what no hook saw.
const SWEEP_ANYWAY: Duration = Duration::from_secs(60);

/// A sweep that saw everything and ended what had to end.
pub(super) struct Sweep {
    generation: u32,
    namespaces: BTreeSet<u64>,
    /// Boot nanoseconds.
    at: u64,
}

impl Core {
    /// Before hooks judge for the first time: who has which address and port, and who opened what is older than they are.
    /// Without it every connection that is open now would be of nobody until the first survey, and refused meanwhile.
    pub(super) fn look_around(&mut self) {
        let Some(survey) = self.namespaces() else { return };
        let want = self.addresses_of(&survey);
        let done = self
            .write_addresses(want)
            .and_then(|_| self.write_endpoints(&survey))
            .and_then(|()| self.write_origins(&survey).map(drop))
            .and_then(|()| self.write_datagram_flows(&survey));
        if let Err(error) = done {
            tracing::error!("{error:#}");
        }
    }

    /// Connections that were opened while the hooks were being attached. True if there were any.
    pub(super) fn look_back(&mut self) -> bool {
        let written = self.namespaces().map_or(Ok(false), |survey| self.write_origins(&survey));
        written.inspect_err(|error| tracing::error!("{error:#}")).unwrap_or(false)
    }

    fn write_origins(&mut self, survey: &netns::Survey) -> anyhow::Result<bool> {
        let mut found = BTreeMap::new();
        for namespace in &survey.namespaces {
            if let Err(error) =
                live::origins(namespace, &self.cgroups, |addr| self.addresses.contains_key(addr), &mut found)
            {
                tracing::warn!("namespace {}: {error}", namespace.cookie);
            }
        }
        let mut written = false;
        for (key, party) in &found {
            if self.datapath.origin(key)?.is_none() {
                self.datapath.set_origin(key, party)?;
                written = true;
            }
        }
        Ok(written)
    }

    fn write_datagram_flows(&self, survey: &netns::Survey) -> anyhow::Result<()> {
        let now = proc::boot_ns()?;
        let mut found = BTreeMap::new();
        for namespace in &survey.namespaces {
            if let Err(error) = live::datagram_flows(namespace, &self.cgroups, now, &mut found) {
                tracing::warn!("namespace {}: {error}", namespace.cookie);
            }
        }
        for (key, value) in &found {
            self.datapath.set_flow(key, value)?;
        }
        Ok(())
    }

    /// The namespaces that are ours, with their addresses; what cannot be looked into is a trouble.
    pub(super) fn namespaces(&mut self) -> Option<netns::Survey> {
        match netns::survey() {
            Ok(mut survey) => {
                survey.namespaces.retain(|n| self.is_ours(n));
                let _ = self.troubles.remove("survey");
                Some(survey)
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
                None
            }
        }
    }

    fn addresses_of(&self, survey: &netns::Survey) -> BTreeMap<Addr, AddressEntry> {
        let by_path: BTreeMap<String, u64> =
            self.registry.words().into_iter().map(|(id, (path, _))| (path, id)).collect();
        let identity_of = |path: &str| {
            by_path.get(path).and_then(|id| self.cgroups.get(id)).map_or(segfw_common::Identity::HOST.0, |e| e.identity)
        };
        live::addresses(survey, identity_of)
    }

    /// Compares addresses, endpoints and live connections with the kernel.
    pub(super) fn survey(&mut self) {
        self.looked = proc::boot_ns().unwrap_or(0);
        if self.troubles.contains_key(NO_WALL) {
            self.attach_walls();
        }
        let Some(survey) = self.namespaces() else { return };
        let want = self.addresses_of(&survey);
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
        if self.has_conn()
            && let Err(error) = self.write_listeners(&survey)
        {
            tracing::error!("{error}");
        }
        if self.attached {
            self.settle_packets(&survey);
        }
        self.publish_names();
    }

    /// With `--cgroup-root` below the mount the agent answers for that part of the tree only: a namespace in which no
    /// process of it lives is somebody else's, and its addresses are addresses like any other.
    pub(super) fn is_ours(&self, namespace: &netns::Namespace) -> bool {
        let Ok(root) = self.config.cgroup_root.strip_prefix(&self.hierarchy.mount) else { return true };
        root.as_os_str().is_empty()
            || namespace.own
            || namespace.cgroups.iter().any(|path| Path::new(path.trim_start_matches('/')).starts_with(root))
    }

    pub(super) fn write_addresses(&mut self, want: BTreeMap<Addr, AddressEntry>) -> anyhow::Result<bool> {
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
    pub(super) fn write_endpoints(&mut self, survey: &netns::Survey) -> anyhow::Result<()> {
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
    pub(super) fn sweep(&mut self, survey: &netns::Survey) {
        let Some(f) = &self.in_force else { return };
        if self.config.monitor {
            return;
        }
        let now = proc::boot_ns().unwrap_or(0);
        let generation = f.revision.generation;
        let namespaces: BTreeSet<u64> = survey.namespaces.iter().map(|n| n.cookie).collect();
        // Whatever a verdict rests on raises the generation: where nothing did, no rule ended and no drain is under way, the
        // answers would be the same. A dump looks at every place of the kernel's table of connections.
        if let Some(last) = &self.last_sweep
            && last.generation == generation
            && last.namespaces == namespaces
            && self.draining.is_empty()
            && now.saturating_sub(last.at) < SWEEP_ANYWAY.as_nanos() as u64
            && live::next_deadline(&f.deadlines, last.at).is_none_or(|at| at > now)
        {
            return;
        }
        let mut whole = true;
        let view = View { tables: TablesView { tables: &f.tables, now, host_flags: 0 }, datapath: &self.datapath };
        let mut swept = Swept::default();
        for namespace in &survey.namespaces {
            if let Err(error) = live::sweep(namespace, &view, &self.cgroups, &self.draining, &mut swept) {
                tracing::warn!("sweep of namespace {}: {error}", namespace.cookie);
                whole = false;
            }
        }
        self.draining = swept.draining;
        for cut in swept.cut {
            whole &= cut.failed.is_none();
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
        if whole {
            let _ = self.troubles.remove("sweep");
        }
        self.last_sweep = whole.then_some(Sweep { generation, namespaces, at: now });
    }

    /// How long until something happens by itself: the end of a rule, of a window, of a drain.
    pub(super) fn deadline(&self) -> Duration {
        let now = proc::boot_ns().unwrap_or(0);
        let in_force = self.in_force.as_ref();
        // One that passed while something else was under way, or while the agent was stopped, is due now.
        let next = in_force.and_then(|f| live::next_deadline(&f.deadlines, self.looked));
        let refresh = in_force.and_then(|f| f.tables.refresh_at);
        let drain = self.draining.values().min().copied();
        let next = [next, refresh, drain].into_iter().flatten().min().unwrap_or(u64::MAX);
        // The kernel's own check is exact; a little later is early enough to end what it already refuses.
        Duration::from_nanos(next.saturating_sub(now)).min(SURVEY) + Duration::from_millis(5)
    }

    /// A deadline passed: connections end, timelines are written on.
    pub(super) fn time_passes(&mut self) {
        let now = proc::boot_ns().unwrap_or(0);
        let stale = self.in_force.as_ref().is_some_and(|f| f.tables.refresh_at.is_some_and(|at| now >= at));
        if stale && let Some(files) = self.in_force.as_ref().map(|f| f.files.clone()) {
            let _ = self.take(files, false);
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

    /// Until the next [`Self::fetch_denials`].
    pub(super) fn denials_pause(&self) -> Duration {
        // Where somebody waits for a sign of life it is given with the same tick.
        let is_awaited = self.config.absence.agent_gone != Absent::LastKnownGood;
        if self.told.is_empty() && !is_awaited { DENIALS_NONE } else { DENIALS }
    }

    /// Tells what was added since the last look. An entry stays in the kernel while it is in use: taking it out between
    /// two denials would lose those that come between the reading and the removal. An agent that takes over tells what
    /// it finds, since it does not know what the one before had told.
    pub(super) fn fetch_denials(&mut self) {
        let generation = self.in_force.as_ref().map_or(0, |f| f.revision.generation);
        // The counter first: what is added after it was read is seen at the next look.
        let counted = self.datapath.counter(Counter::DenialsAggregated as u32).and_then(|aggregated| {
            // An empty table is the usual case, and reading it means to walk all of it.
            let nothing = self.told.is_empty() && self.aggregated == Some(aggregated);
            Ok((aggregated, if nothing { Vec::new() } else { self.datapath.denials()? }))
        });
        let all = match counted {
            Ok((aggregated, all)) => {
                self.aggregated = Some(aggregated);
                all
            }
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
        family: 0,
        pad: [0; 4],
        comm: [0; 16],
    }
}
