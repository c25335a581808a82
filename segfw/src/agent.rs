//! The agent: keeps what the kernel enforces equal to what the folder says, and tells what happened.
//!
//! Its death changes nothing in the kernel: programs and maps are pinned, and the next agent takes them over. One task
//! owns the state ([`Core`]); the drain of events and the control socket run beside it.

pub mod archive;
mod backend;
pub mod early;
pub mod export;
mod folder;
mod gate;
mod guard;
mod kernel;
pub mod live;
mod metrics;
mod notify;
pub mod registry;
mod revise;
pub mod revision;
mod survey;

use crate::config::{Absent, Config};
use crate::control::report::{self, Finding, Refused, Revision};
use crate::control::{Listener, serve};
use crate::datapath::guard::Canary;
use crate::datapath::security::Checks;
use crate::datapath::{Datapath, attach, sys};
use crate::flow::record::{CgroupWords, Names};
use crate::flow::{History, Intake, Item, enrich, history};
use crate::host::cgroup::{Change, Hierarchy, Watcher};
use crate::host::runtime::{Listing, Runtimes};
use crate::host::{netns, proc};
use crate::policy::document::Cache;
use crate::policy::load::Memory;
use crate::policy::tables::Numbers;
use crate::policy::{HostPolicy, Tables, TablesView};
use anyhow::Context;
use export::Shared;
use folder::Folder;
use jiff::Timestamp;
use live::{Swept, View};
use registry::Registry;
use revise::needs_egress;
use revision::{Candidate, Files, Saved, Store};
use segfw_common::event::{Counter, DenialCount, DenialKey, Hook};
use segfw_common::state::PathKey;
use segfw_common::{Addr, AddressEntry, CgroupEntry, EndpointEntry, EndpointKey, EventKind, FlowEvent, control};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// How often addresses, endpoints and live connections are compared with the kernel when nothing seems to happen.
const SURVEY: Duration = Duration::from_secs(8);
/// After a change of the cgroup tree namespaces and addresses follow shortly; they are looked at again so long after.
const SURVEY_SOON: Duration = Duration::from_millis(300);
/// How often the kernel is asked whether all is as we left it; less often where that takes more than a [`GUARD_SHARE`]th of
/// the time, but [`GUARD_LATEST`] at the latest.
const GUARD: Duration = Duration::from_secs(2);
/// See [`GUARD`]: an idle agent takes less than a thousandth of a core, and this is half of it.
const GUARD_SHARE: u32 = 2000;
/// See [`GUARD`].
const GUARD_LATEST: Duration = Duration::from_secs(8);
/// While a cgroup waits to be told by a runtime: how soon it is asked again, twice as long each time, up to [`SURVEY`].
const RUNTIMES_AGAIN: Duration = Duration::from_millis(25);
/// How often aggregated denials are fetched.
const DENIALS: Duration = Duration::from_secs(1);
/// The same while there are none: each look wakes an idle host.
const DENIALS_NONE: Duration = Duration::from_secs(2);
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
    /// What a change of a few rules is compiled from.
    basis: revision::Basis,
    /// Boot times at which some answer of the tables changes by itself, ascending.
    deadlines: Vec<u64>,
    /// Numbers of the kernel's maps that hold the tables.
    maps: Vec<u32>,
}

/// Everything the agent knows. One owner at a time, never across an await.
pub struct Core {
    config: Config,
    started_at: Timestamp,
    datapath: Arc<Datapath>,
    hierarchy: Hierarchy,
    store: Store,
    saved: Saved,
    archive: archive::Archive,
    /// Who put the files there that are being read; `None` = somebody changed the folder.
    source: Option<String>,
    /// The files that were read last.
    texts: Memory,
    /// What they said.
    read: Cache,
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
    /// Denials that were aggregated, at the last look; `None` before the first.
    aggregated: Option<u64>,
    /// Flags of the host as we wrote them.
    flags: u64,
    /// Boot time of the next sign of life.
    beat_at: u64,
    /// After a boot with `absence.beforeFirstRevision: closed`, until the folder's revision is in force.
    closed_until_first: bool,
    /// What was found changed in the kernel; the newest last.
    repairs: VecDeque<report::Repair>,
    /// All that ever were.
    repaired: u64,
    canary: Option<Canary>,
    /// What stands at the kernel's security checks; `None` = not tried yet.
    checks: Option<Checks>,
    /// `cgroup_skb/ingress` is attached.
    ingress: bool,
    /// TCP passes `cgroup_skb/ingress` unseen, since gate conn judges it.
    tcp_by_conn: bool,
    /// Cookies of listeners that the inventory entered.
    listeners: BTreeSet<u64>,
    /// A socket listens in a namespace that no survey finds.
    unseen: bool,
    /// Containers and labels that a runtime told of and that were above a limit.
    containers_left_out: u64,
    /// The last one that was whole; `None` = the next survey sweeps in any case.
    last_sweep: Option<survey::Sweep>,
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
    let missing = crate::host::doctor::required();
    if !missing.is_empty() {
        let all = missing.iter().map(|c| format!("{}: {} ({}; {})", c.name, c.what, c.consequence, c.remedy));
        anyhow::bail!("this host cannot be enforced:\n  {}", all.collect::<Vec<_>>().join("\n  "));
    }
    match proc::ensure_bpffs().context("no BPF file system at /sys/fs/bpf, and none can be mounted")? {
        proc::Bpffs::MountedNow => tracing::warn!("mounted a BPF file system at /sys/fs/bpf"),
        proc::Bpffs::Mounted => {}
    }
    // Before the first reading, so that no change falls between the two.
    let mut folder = Folder::follow(&config.policy).context("the policy folder cannot be followed")?;
    if proc::ensure_tracefs() {
        tracing::warn!("mounted tracefs at /sys/kernel/tracing");
    }
    let hierarchy = Hierarchy::find()?;
    let listener = Listener::bind(&config.socket)?;
    let mut datapath = Datapath::load(&config.pin_dir)?;
    let ring = datapath.take_events()?;
    let mut watcher = Watcher::start(hierarchy.clone())?;

    let shared = Arc::new(Shared::default());
    let history = Arc::new(History::spooled(config.host.as_str().into(), history::RECORDS, export::spool(&config)?));
    let pages = config.metrics;
    let core = Core::new(config, Arc::new(datapath), hierarchy, Arc::clone(&shared), Arc::clone(&history))?;
    let agent = Arc::new(Agent { core: Mutex::new(core), history: Arc::clone(&history), counts: Mutex::default() });
    *agent.counts.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener.counts());

    let (answers, waiting) = mpsc::channel(export::ANSWERS_WAITING);
    let answerer = {
        let shared = Arc::clone(&shared);
        std::thread::Builder::new().name("answers".into()).spawn(move || export::answer(waiting, &shared))?
    };
    let intake = Intake::resume(Arc::clone(&history), revise::wall_minus_boot());
    let drain = tokio::spawn(export::drain(ring, intake, Arc::clone(&shared), answers));
    let pages = pages.map(|at| tokio::spawn(metrics::serve(at, Arc::clone(&agent), Arc::clone(&shared))));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let door = {
        let mut stopped = stopped.clone();
        tokio::spawn(serve(listener, Arc::clone(&agent), async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }))
    };

    let mut hangup = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?;
    let mut denials_at = tokio::time::Instant::now();
    let mut survey_at = tokio::time::Instant::now() + SURVEY;
    let mut notifier = notify::Notifier::new();
    let mut runtimes = Runtimes::new(&agent.core().config.runtimes);
    let (ask, mut asked) = mpsc::channel::<u64>(1);
    let (told, mut listings) = mpsc::channel(1);
    let inventory = tokio::spawn(async move {
        while let Some(batch) = asked.recv().await {
            if told.send((batch, runtimes.list().await)).await.is_err() {
                return;
            }
        }
    });
    let mut ask_at = tokio::time::Instant::now();
    let mut ask_pause = RUNTIMES_AGAIN;
    let mut guard_at = tokio::time::Instant::now() + GUARD;
    tokio::pin!(shutdown);
    tokio::pin!(drain);
    let ended = loop {
        shared.beat();
        let deadline = agent.core().deadline();
        tokio::select! {
            () = &mut shutdown => break Ok(()),
            result = &mut drain => break match result {
                Ok(Ok(())) => Err(anyhow::anyhow!("the drain of events ended")),
                Ok(Err(e)) => Err(anyhow::Error::from(e).context("cannot read events")),
                Err(e) => Err(anyhow::Error::from(e).context("the drain of events failed")),
            },
            () = shared.sweep.notified() => {
                // Nothing that a verdict rests on has changed, and yet there is something to end.
                agent.core().last_sweep = None;
                survey_at = tokio::time::Instant::now();
            }
            changes = watcher.next() => match changes {
                Some(changes) => {
                    let agent = Arc::clone(&agent);
                    if on_thread(move || agent.core().tree(&changes)).await == Some(true) {
                        ask_at = tokio::time::Instant::now();
                        ask_pause = RUNTIMES_AGAIN;
                    }
                    survey_at = survey_at.min(tokio::time::Instant::now() + SURVEY_SOON);
                }
                None => break Err(anyhow::anyhow!("the watch of the cgroup tree ended")),
            },
            _ = hangup.recv() => {
                notifier.reloading();
                let core = Arc::clone(&agent);
                let reload = move || {
                    let mut core = core.core();
                    core.texts.doubt();
                    core.reload(false)
                };
                let _ = on_thread(reload).await;
                notifier.tell(&agent);
            }
            () = notifier.due() => notifier.tell(&agent),
            changed = folder.changed() => match changed {
                Some(()) => {
                    let agent = Arc::clone(&agent);
                    let _ = on_thread(move || agent.core().reload(false)).await;
                }
                None => break Err(anyhow::anyhow!("the watch of the policy folder ended")),
            },
            () = tokio::time::sleep_until(denials_at) => {
                let mut core = agent.core();
                core.beat();
                core.fetch_denials();
                denials_at = tokio::time::Instant::now() + core.denials_pause();
                // A policy that asks for containers for the first time does not wait for the next look.
                if core.registry.never_listed() {
                    ask_at = tokio::time::Instant::now();
                }
            }
            () = tokio::time::sleep_until(ask_at) => {
                let (wanted, batch) = { let core = agent.core(); (core.registry.wants_containers(), core.registry.batch()) };
                // One question at a time; while the answer is out the next one waits.
                if wanted {
                    let _ = ask.try_send(batch);
                }
                ask_at = tokio::time::Instant::now() + SURVEY;
            }
            Some((batch, listing)) = listings.recv() => {
                let agent = Arc::clone(&agent);
                let now = tokio::time::Instant::now();
                if on_thread(move || agent.core().containers(batch, listing)).await == Some(true) {
                    ask_at = ask_at.min(now + ask_pause);
                    ask_pause = (ask_pause * 2).min(SURVEY);
                }
            }
            () = tokio::time::sleep_until(guard_at) => {
                let agent = Arc::clone(&agent);
                let begun = tokio::time::Instant::now();
                on_thread(move || agent.core().guard()).await;
                guard_at = begun + (begun.elapsed() * GUARD_SHARE).clamp(GUARD, GUARD_LATEST);
            }
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
    notifier.stopping();
    drain.abort();
    inventory.abort();
    let _ = stop.send(true);
    let _ = door.await;
    if let Some(pages) = pages {
        pages.abort();
    }
    let _ = on_thread(move || history.spool().map(|spool| spool.flush())).await;
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

fn trouble(what: &str, consequence: &str, action: &str) -> report::Trouble {
    report::Trouble { what: what.to_owned(), consequence: consequence.to_owned(), action: action.to_owned() }
}
