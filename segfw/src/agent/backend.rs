//! What the control socket is told.

use super::{Agent, Arc, Core, on_thread, trouble};
use crate::config::{AbsenceConfig, Absent};
use crate::control::report::{
    Absence, AgentReport, CounterReport, Enforcement, Explanation, HookReport, MapReport, Neighbour, PastReport,
    PlacesReport, PolicyFile, Question, ReloadReport, State, StatusReport, Uncovered, VerdictCount, WorkloadCounts,
    WorkloadReport,
};
use crate::control::{Backend, Failure};
use crate::datapath::attach::{EGRESS, INGRESS};
use crate::flow::History;
use crate::policy::host_policy::{Labels, Members};
use jiff::Timestamp;
use segfw_common::event::Counter;
use segfw_common::{ABI_VERSION, Direction, Identity, LocalEntry, Reason, Verdict, bounds, control};
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

impl Backend for Agent {
    async fn status(&self) -> Result<StatusReport, Failure> {
        self.report()
    }

    async fn workloads(&self) -> Result<Vec<WorkloadReport>, Failure> {
        Ok(self.core().workloads())
    }

    async fn explain(&self, question: Question) -> Result<Explanation, Failure> {
        self.core().explain(&question)
    }

    async fn counters(&self) -> Result<CounterReport, Failure> {
        self.count()
    }

    async fn reload(&self) -> Result<ReloadReport, Failure> {
        Ok(self.core().reload(true))
    }

    async fn take(&self, source: String) -> Result<ReloadReport, Failure> {
        Ok(self.core().take_from(source))
    }

    async fn places(&self) -> Result<PlacesReport, Failure> {
        let core = self.core();
        let absolute = |path: &Path| std::path::absolute(path).map_err(system);
        Ok(PlacesReport {
            policy: absolute(&core.config.policy)?,
            state: absolute(&core.config.state_dir)?,
            pins: absolute(&core.config.pin_dir)?,
            cgroup_root: absolute(&core.config.cgroup_root)?,
        })
    }

    async fn past(&self) -> Result<Vec<PastReport>, Failure> {
        let (archive, in_force) = {
            let core = self.core();
            (core.archive.clone(), core.in_force.as_ref().map(|f| f.revision.number))
        };
        on_thread(move || archive.list(in_force)).await.unwrap_or_else(|| Err(system("the history cannot be read")))
    }

    async fn files(&self, revision: Option<u64>) -> Result<Vec<PolicyFile>, Failure> {
        let archive = {
            let core = self.core();
            let in_force = core.in_force.as_ref().filter(|f| revision.is_none_or(|n| n == f.revision.number));
            if let Some(f) = in_force {
                let file =
                    |(name, text): &(String, Arc<str>)| PolicyFile { name: name.clone(), text: text.to_string() };
                return Ok(f.files.iter().map(file).collect());
            }
            core.archive.clone()
        };
        match revision {
            // Nothing is in force: there is nothing to compare with.
            None => Ok(Vec::new()),
            Some(number) => on_thread(move || archive.files(number))
                .await
                .unwrap_or_else(|| Err(system("the revision cannot be read"))),
        }
    }

    fn history(&self) -> &History {
        &self.history
    }
}

impl Agent {
    pub(super) fn report(&self) -> Result<StatusReport, Failure> {
        let mut counters = self.count()?;
        let core = self.core();
        for (name, value) in core.counters_of_agent() {
            let _ = counters.named.insert(name, value);
        }
        core.status(counters)
    }

    fn count(&self) -> Result<CounterReport, Failure> {
        let mut report = self.core().counters()?;
        if let Some(counts) = self.counts.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            for (name, value) in counts.named() {
                let _ = report.named.insert(name.to_owned(), value);
            }
        }
        Ok(report)
    }
}

fn system(error: impl std::fmt::Display) -> Failure {
    Failure::system(error.to_string())
}

impl Core {
    fn counters_of_agent(&self) -> Vec<(String, u64)> {
        let (kept, overwritten) = self.history.counts();
        let spool = self.history.spool().map(|s| s.counts().named()).into_iter().flatten();
        let mut counters: Vec<_> = spool.map(|(name, value)| (name.to_owned(), value)).collect();
        counters.extend([
            ("history-records".to_owned(), kept as u64),
            ("history-overwritten".to_owned(), overwritten),
            ("repairs".to_owned(), self.repaired),
            ("containers-left-out".to_owned(), self.containers_left_out),
            ("history-readers".to_owned(), self.history.readers() as u64),
            ("history-lagged".to_owned(), self.history.lagged()),
            ("rejects-unanswered".to_owned(), self.shared.unanswered.load(Ordering::Relaxed)),
        ]);
        counters
    }

    fn counters(&self) -> Result<CounterReport, Failure> {
        let counters = self.datapath.counters().map_err(system)?;
        let mut report = CounterReport::default();
        for direction in [Direction::Ingress, Direction::Egress] {
            for reason in Reason::ALL {
                for verdict in [Verdict::Allowed, Verdict::Denied, Verdict::Audit] {
                    let index = Counter::verdict_index(reason as u8, verdict as u8, direction as u8);
                    let count = counters.by_index.get(index as usize).copied().unwrap_or(0);
                    if count != 0 {
                        let (verdict, reason, direction) = (verdict.into(), reason.into(), direction.into());
                        report.verdicts.push(VerdictCount { verdict, reason, direction, count });
                    }
                }
            }
        }
        for counter in Counter::ALL {
            let _ = report.named.insert(counter.as_str().to_owned(), counters.get(counter));
        }
        Ok(report)
    }

    /// Every hook that is needed, as the kernel has it now.
    pub(super) fn hooks(&self) -> Result<Vec<HookReport>, Failure> {
        let links = self.datapath.links().map_err(system)?;
        let egress = self.in_force.as_ref().is_some_and(|f| super::needs_egress(&f.tables, &f.deadlines));
        Ok(links
            .iter()
            .filter(|l| l.name != EGRESS.program || egress || l.link.is_some())
            .filter(|l| l.name != INGRESS.program || self.ingress || l.link.is_some())
            .map(|l| HookReport {
                name: l.name.clone(),
                attached: l.link.is_some_and(|i| i.cgroup != 0),
                link: l.link.map(|i| i.id),
                program: l.link.map(|i| i.program),
                instructions: Some(l.instructions),
            })
            .collect())
    }

    /// The one word for the whole agent, and why.
    pub(super) fn state(&self, hooks: &[HookReport]) -> State {
        let mut reasons: Vec<_> = self.troubles.values().cloned().collect();
        let missing: Vec<&str> = hooks.iter().filter(|h| !h.attached).map(|h| h.name.as_str()).collect();
        if self.in_force.is_some() && !missing.is_empty() {
            reasons.push(trouble(
                &format!("not attached: {}", missing.join(", ")),
                "what these hooks judge passes unjudged",
                "the agent puts them back within seconds; if not, see its log",
            ));
        }
        if let Some(why) = self.history.spool().and_then(|spool| spool.counts().failing()) {
            reasons.push(trouble(
                &format!("flow records are not written to disk: {why}"),
                "enforcement goes on; records are lost beyond those in memory, and counted",
                "make room, or repair the file system; writing goes on by itself",
            ));
        }
        if let Some(refused) = &self.refused {
            reasons.push(trouble(
                &format!("the newest revision was refused: {}", refused.why),
                "the last good revision is still enforced",
                "segfw policy check shows every problem",
            ));
        }
        if self.in_force.is_none() && !self.attached {
            let why = self.refused.as_ref().map_or("no policy was ever loaded", |r| r.why.as_str()).to_owned();
            State::Open { why }
        } else if self.config.monitor {
            State::Monitor
        } else if reasons.is_empty() {
            State::Enforcing
        } else {
            State::Degraded { reasons }
        }
    }

    fn status(&self, counters: CounterReport) -> Result<StatusReport, Failure> {
        let hooks = self.hooks()?;
        let state = self.state(&hooks);
        let tables = self.in_force.as_ref().map(|f| &f.tables);
        let size = |n: Option<usize>| n.unwrap_or(0) as u64;
        let map = |name: &str, entries: u64, max: u32| MapReport { name: name.to_owned(), entries, max: max.into() };
        let endpoints = self.datapath.endpoints().map(|e| e.len()).unwrap_or(0) as u64;
        let maps = vec![
            map("RULES", size(tables.map(|t| t.rules.len())), bounds::RULES),
            map("PREFIXES", size(tables.map(|t| t.prefixes.len())), bounds::PREFIXES),
            map("TIMELINE", size(tables.map(|t| t.timeline.len())), bounds::TIMELINE),
            map("LOCALS", size(tables.map(|t| t.locals.len())), bounds::LOCALS),
            map("CGROUPS", self.cgroups.len() as u64, bounds::CGROUPS),
            map("ADDRESSES", self.addresses.len() as u64, bounds::ADDRESSES),
            map("ENDPOINTS", endpoints, bounds::ENDPOINTS),
        ];
        let mut workloads = WorkloadCounts::default();
        for workload in self.workloads() {
            match workload.enforcement {
                Enforcement::Enforced => workloads.enforced += 1,
                Enforcement::Monitored => workloads.monitored += 1,
                Enforcement::NoSegment => workloads.no_segment += 1,
                Enforcement::Unresolved => workloads.unresolved += 1,
            }
        }
        Ok(StatusReport {
            at: Timestamp::now(),
            state,
            revision: self.in_force.as_ref().map(|f| f.revision.clone()),
            refused: self.refused.clone(),
            gate: self.gate(),
            families: self.families(),
            hooks,
            xdp: self.config.xdp.clone(),
            maps,
            identities: self.saved.numbers.identities.len() as u64,
            workloads,
            counters,
            lost_events: self.shared.lost.load(Ordering::Relaxed),
            golden_rules: GOLDEN.iter().map(|s| (*s).to_owned()).collect(),
            uncovered: UNCOVERED
                .into_iter()
                .filter(|(what, _)| {
                    !(FAMILIES.contains(what) && self.checks.as_ref().is_some_and(|c| c.family.is_ok()))
                })
                .chain(self.datapath.features.less())
                .map(|(what, consequence)| Uncovered {
                    what: (*what).to_owned(),
                    consequence: (*consequence).to_owned(),
                })
                .collect(),
            absence: absence(&self.config.absence),
            repairs: self.repairs.iter().cloned().collect(),
            neighbours: self.neighbours(),
            agent: AgentReport {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                abi: ABI_VERSION,
                started_at: self.started_at,
                host: self.config.host.clone(),
                kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            },
        })
    }

    /// Programs of others where ours sit.
    fn neighbours(&self) -> Vec<Neighbour> {
        let Ok(root) = std::fs::File::open(&self.config.cgroup_root) else { return Vec::new() };
        let all = self.datapath.neighbours(&root).into_iter();
        all.map(|n| Neighbour { hook: n.hook.to_owned(), program: n.program, name: n.name, after_ours: n.after_ours })
            .collect()
    }

    fn segments_of(&self, labels: &Labels) -> Vec<String> {
        let segments = self.in_force.iter().flat_map(|f| &f.policy.segments);
        let inside = segments.filter(|s| match &s.members {
            Members::Workloads(selector) => selector.matches(labels),
            Members::Addresses(_) => false,
        });
        inside.map(|s| s.name.clone()).collect()
    }

    fn workloads(&self) -> Vec<WorkloadReport> {
        let report = |w: super::registry::Workload| {
            let identity = self.cgroups.get(&w.id).map_or(Identity::UNRESOLVED.0, |e| e.identity);
            let local = self.in_force.as_ref().and_then(|f| f.tables.locals.get(&Identity(identity)));
            let enforcement = match local {
                None => Enforcement::Unresolved,
                Some(l) if l.flags & LocalEntry::OPEN != 0 => Enforcement::NoSegment,
                Some(l) if self.config.monitor || l.flags & LocalEntry::MONITOR != 0 => Enforcement::Monitored,
                Some(_) => Enforcement::Enforced,
            };
            let name = Path::new(&w.cgroup).file_name().map_or(w.cgroup.clone(), |n| n.to_string_lossy().into_owned());
            let mut labels_from: Vec<String> = w.name.split('+').map(|n| format!("Workload {n}")).collect();
            if !self.config.host_labels.is_empty() {
                labels_from.push("host".to_owned());
            }
            WorkloadReport {
                name,
                segments: self.segments_of(&w.labels),
                cgroup: w.cgroup,
                identity,
                labels: w.labels,
                enforcement,
                labels_from,
            }
        };
        let unresolved = self.registry.unresolved().map(|(path, _)| WorkloadReport {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            cgroup: path.to_string_lossy().into_owned(),
            identity: Identity::UNRESOLVED.0,
            labels: Labels::new(),
            segments: Vec::new(),
            enforcement: Enforcement::Unresolved,
            labels_from: Vec::new(),
        });
        self.registry.workloads().into_iter().map(report).chain(unresolved).collect()
    }

    fn explain(&self, question: &Question) -> Result<Explanation, Failure> {
        let f = self.in_force.as_ref().ok_or_else(|| Failure::system("no revision is in force"))?;
        let find = |name: &str| -> Option<Labels> {
            if name.starts_with('/') {
                return self.registry.owner(Path::new(name)).map(|(_, _, labels)| labels);
            }
            let workloads = self.registry.workloads();
            let by_unit = |w: &&super::registry::Workload| Path::new(&w.cgroup).file_name().is_some_and(|f| f == name);
            workloads
                .iter()
                .find(by_unit)
                .or_else(|| workloads.iter().find(|w| w.name == name))
                .map(|w| w.labels.clone())
        };
        let host_flags = if self.config.monitor { control::HOST_MONITOR } else { 0 };
        let clock = super::revision::clock().map_err(system)?;
        let view = crate::policy::explain::View { clock, host_flags };
        crate::control::answer::explain(&f.tables, &f.policy, question, &find, view, Some(f.revision.number), "agent")
            .map_err(Failure::input)
    }
}

/// What `decide` never refuses.
const GOLDEN: [&str; 3] = [
    "loopback within one workload",
    "DHCP client (udp 68→67, udp 546→547)",
    "the kernel's own neighbour discovery (ICMPv6 types 133 to 137)",
];

/// Of [`UNCOVERED`]: covered by the list of address families, where that is at work.
const FAMILIES: [&str; 2] = ["packet sockets (AF_PACKET, AF_XDP)", "vsock (AF_VSOCK)"];

/// What the hooks of this version do not see (threats-and-faults, O1 and O15).
const UNCOVERED: [(&str, &str); 9] = [
    (
        "workloads that start at a path nobody has named, while no agent runs",
        "paths that ran here before, and those that a document names without a wildcard, are known to the kernel; others \
         count as host, or below a managed parent as unresolved, until an agent has seen them",
    ),
    (
        "datagrams of a connected socket that never bound a port, between namespaces of this host",
        "the sender counts as unresolved if its namespace holds several workloads, until the next survey",
    ),
    (
        "packet sockets (AF_PACKET, AF_XDP)",
        "a process with CAP_NET_RAW can send any frame, unjudged; a peer with segfw still judges it on arrival",
    ),
    ("vsock (AF_VSOCK)", "a guest and its host can talk, unjudged"),
    (
        "socket activation",
        "a listener that a .socket unit opened before the policy named its service counts as host until that unit is restarted",
    ),
    ("unix sockets", "a process can ask another one to connect for it; the other one's own policy applies"),
    (
        "inbound ICMP echo",
        "the kernel answers it before any socket; rules that would have to refuse it are refused at compile time",
    ),
    (
        "source routes (IPv4 LSRR and SSRR, IPv6 routing header)",
        "a datagram for an allowed destination can be sent by way of a host that is not; it can read it, not answer",
    ),
    (
        "source addresses that are not this host's (IPV6_FREEBIND, IP_TRANSPARENT)",
        "a workload can send a datagram under a foreign address; a receiver, here or elsewhere, that knows its peer by prefix believes it",
    ),
];

/// What happens when something is not there, as the settings say.
fn absence(config: &AbsenceConfig) -> Vec<Absence> {
    let gone = match config.agent_gone {
        Absent::LastKnownGood => {
            "lastKnownGood: programs and maps are pinned and go on; no reload, no records, no answers to rejects"
                .to_owned()
        }
        Absent::Closed => format!(
            "closed: {} s after the last sign of life new flows of enforced workloads are refused (reason agent-gone)",
            config.agent_gone_after_seconds
        ),
        Absent::Open => format!(
            "open: {} s after the last sign of life new flows of enforced workloads pass (reason agent-gone)",
            config.agent_gone_after_seconds
        ),
    };
    let first = match config.before_first_revision {
        Absent::LastKnownGood => {
            "lastKnownGood: the last revision that was in force, as soon as segfw-early or the agent starts"
        }
        Absent::Closed => {
            "closed: workloads of the last revision get no new flows (reason agent-gone) until one of the folder is in force"
        }
        Absent::Open => "open: nothing is enforced until a revision of the folder is in force",
    };
    [
        ("agent gone", gone),
        ("before the first revision after boot", first.to_owned()),
        ("controller gone", "no controller in this version".to_owned()),
    ]
    .into_iter()
    .map(|(when, behaviour)| Absence { when: when.to_owned(), behaviour })
    .collect()
}
