//! Facts come up: events become records, and inbound flows that a rule rejects get their answer.

use crate::config::{Config, SpoolConfig};
use crate::flow::spool::{Place, Spool};
use crate::flow::{Intake, Names};
use crate::host::answer::Answerer;
use crate::host::netns::{self, Survey};
use aya::maps::{MapData, RingBuf};
use segfw_common::event::Hook;
use segfw_common::{Direction, EventKind, FlowEvent, Verdict};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

/// Rejected flows that wait for their answer. More: not answered, which is what `deny` would have done; counted.
pub const ANSWERS_WAITING: usize = 1024;
/// How often gaps in the numbers are looked at, while there are events.
const SETTLE: Duration = Duration::from_secs(1);
/// A namespace that is not known is looked for at most this often.
const SURVEY_PAUSE: Duration = Duration::from_secs(1);

/// What the drain shares with the rest of the agent.
#[derive(Debug, Default)]
pub struct Shared {
    /// What numbers mean; replaced as a whole.
    pub names: RwLock<Arc<Names>>,
    /// Events lost between kernel and history.
    pub lost: AtomicU64,
    /// Rejected flows that got no answer.
    pub unanswered: AtomicU64,
    /// Boot nanoseconds at which the event loop last came round; 0 = not yet.
    pub beat: AtomicU64,
    /// Nanoseconds that the newest revision took from its files to being in force; 0 = none was put in force yet.
    pub apply_ns: AtomicU64,
    /// A connection was made that is to be ended: see [`slipped`].
    pub sweep: tokio::sync::Notify,
}

/// The files behind the history, if there are to be some.
pub fn spool(config: &Config) -> std::io::Result<Option<Spool>> {
    let Some(SpoolConfig { dir, max_bytes, file_bytes }) = config.spool.clone() else { return Ok(None) };
    let dir = dir.unwrap_or_else(|| config.state_dir.join("flows"));
    Spool::start(Place { dir, max_bytes, file_bytes }, config.host.as_str().into()).map(Some)
}

impl Shared {
    /// The names at this moment.
    pub fn names(&self) -> Arc<Names> {
        Arc::clone(&self.names.read().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
    /// The event loop came round.
    pub fn beat(&self) {
        self.beat.store(crate::host::proc::boot_ns().unwrap_or(0), Ordering::Relaxed);
    }
    /// Other names from now on.
    pub fn set_names(&self, names: Names) {
        *self.names.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(names);
    }
}

/// How often the ring is looked at while events come. A CPU wakes us for its first event only
/// ([`segfw_common::bounds::WAKE_NS`]); what follows waits no longer than this.
const LOOK: Duration = Duration::from_millis(50);
/// The looking goes on for so long after the last wake-up or find: every event that came without a wake-up is behind one that
/// woke us less than `WAKE_NS` before, so a look that much later sees the last of them.
const LOOK_ON: Duration = Duration::from_nanos(2 * segfw_common::bounds::WAKE_NS);

/// Drains the ring buffer for as long as the agent lives. An idle agent is not woken at all, a busy one every [`LOOK`].
pub async fn drain(
    ring: RingBuf<MapData>,
    mut intake: Intake,
    shared: Arc<Shared>,
    answers: mpsc::Sender<FlowEvent>,
) -> std::io::Result<()> {
    // SAFETY: the ring owns its map's descriptor, always the same one, and lives inside the AsyncFd until that is dropped.
    let mut ring = unsafe { AsyncFd::register_with_interest(ring, tokio::io::Interest::READABLE) }
        .map_err(|e| std::io::Error::other(e.to_string()))?;
    // What an agent before us left, and what came before we listened.
    let mut look_until = tokio::time::Instant::now() + LOOK_ON;
    // Gaps are told once they are certain; without new events there are none.
    let mut settle_at = None;
    loop {
        let now = tokio::time::Instant::now();
        let next = if now < look_until { Some(now + LOOK) } else { settle_at };
        let woken = tokio::select! {
            ready = ring.readable_mut() => {
                ready?.clear_ready();
                true
            }
            () = tokio::time::sleep_until(next.unwrap_or(now)), if next.is_some() => false,
        };
        let names = shared.names();
        let mut found = false;
        while let Some(item) = ring.get_mut().next() {
            found = true;
            let Some(event) = intake.take(&item, &names) else { continue };
            if slipped(&event) {
                shared.sweep.notify_one();
            }
            if EventKind::from_raw(event.kind) == Some(EventKind::Reject) && answers.try_send(event).is_err() {
                let _ = shared.unanswered.fetch_add(1, Ordering::Relaxed);
            }
        }
        let now = tokio::time::Instant::now();
        if found || woken {
            look_until = now + LOOK_ON;
            settle_at = settle_at.or(Some(now + SETTLE));
        }
        if settle_at.is_some_and(|at| at <= now) {
            intake.settle(crate::host::proc::boot_ns()?, &names);
            // Once more after the last event: a gap is certain only a while later.
            settle_at = (now < look_until).then_some(now + SETTLE);
        }
        shared.lost.store(intake.lost(), Ordering::Relaxed);
    }
}

/// A connection that was made though the policy refuses it: its SYN came before a switch of the policy and its last ACK
/// after. Where no hook sees its packets the sweep ends it.
fn slipped(event: &FlowEvent) -> bool {
    event.kind == EventKind::New as u8
        && event.hook == Hook::SockOps as u8
        && event.direction == Direction::Ingress as u8
        && event.verdict == Verdict::Denied as u8
}

/// Answers rejected flows: a reset or a port unreachable, from the namespace that refused them. On a thread of its own,
/// since it enters namespaces; ends when the sender does.
pub fn answer(mut waiting: mpsc::Receiver<FlowEvent>, shared: &Shared) {
    let mut answerer = Answerer::default();
    let mut survey: Option<(Instant, Survey)> = None;
    while let Some(event) = waiting.blocking_recv() {
        let known = |s: &Option<(Instant, Survey)>| s.as_ref().is_some_and(|(_, s)| s.get(event.netns).is_some());
        let old = survey.as_ref().is_none_or(|(at, _)| at.elapsed() > SURVEY_PAUSE);
        if !known(&survey) && old {
            survey = netns::survey().ok().map(|s| (Instant::now(), s));
            if let Some((_, survey)) = &survey {
                answerer.retain(&survey.namespaces.iter().map(|n| n.cookie).collect());
            }
        }
        let namespace = survey.as_ref().and_then(|(_, s)| s.get(event.netns));
        let answered = match namespace {
            None => false,
            Some(namespace) => {
                let local = SocketAddr::new(IpAddr::from(event.local_addr), event.local_port);
                let remote = SocketAddr::new(IpAddr::from(event.remote_addr), event.remote_port);
                if event.protocol == segfw_common::rule::ipproto::TCP {
                    answerer.reset(namespace, local, remote, event.rtt_us).is_ok()
                } else {
                    answerer.unreachable(namespace, local, remote).is_ok()
                }
            }
        };
        if !answered {
            let _ = shared.unanswered.fetch_add(1, Ordering::Relaxed);
        }
    }
}
