//! What the service manager is told (sd_notify(3)): ready, a line on the state, reloading, stopping, and that the agent
//! still works.
//!
//! READY means: what this host declared is in force. That is a revision, proven (published, read back, hooks attached) or
//! taken over from the agent before. Where none can be loaded, and none was ever saved (then `closed` has nobody to close)
//! or `absence.beforeFirstRevision` is `open`, nothing is in force and that is what was declared: the agent is ready as
//! OPEN, so that boot goes on and the folder can be mended.
//!
//! The watchdog is fed by the event loop itself, after it got hold of the state: a loop that waits for a step that never
//! ends, and a state whose owner never lets go of it, both end with a restart of the agent. The kernel enforces meanwhile.

use super::{Agent, Core};
use crate::config::Absent;
use crate::control::report::State;
use sd_notify::NotifyState;
use std::time::Duration;
use tokio::time::{Interval, MissedTickBehavior, interval};

/// How often the line on the state is brought up to date, and the watchdog fed unless it wants to be sooner.
const TELL: Duration = Duration::from_secs(5);
/// Pings in the time after which the service manager loses patience.
const PINGS: u32 = 3;

/// Tells the service manager; without one it does nothing.
pub(super) struct Notifier {
    /// `None`: nobody listens.
    tick: Option<Interval>,
    ready: bool,
    said: String,
}

impl Notifier {
    /// To be made in the event loop's runtime.
    pub(super) fn new() -> Self {
        let tick = std::env::var_os("NOTIFY_SOCKET").map(|_| {
            let period = sd_notify::watchdog_enabled().map_or(TELL, |limit| TELL.min(limit / PINGS));
            let mut tick = interval(period.max(Duration::from_millis(1)));
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            tick
        });
        Self { tick, ready: false, said: String::new() }
    }

    /// The next time [`Notifier::tell`] is to be called; never where nobody listens.
    pub(super) async fn due(&mut self) {
        match &mut self.tick {
            Some(tick) => {
                let _ = tick.tick().await;
            }
            None => std::future::pending().await,
        }
    }

    /// The state as it is, and that the event loop has answered.
    pub(super) fn tell(&mut self, agent: &Agent) {
        if self.tick.is_none() {
            return;
        }
        let (line, ready) = {
            let core = agent.core();
            (core.line(), core.stands())
        };
        let mut states = vec![NotifyState::Watchdog];
        if ready && !self.ready {
            states.push(NotifyState::Ready);
            self.ready = true;
        }
        if line != self.said {
            states.push(NotifyState::Status(&line));
        }
        send(&states);
        self.said = line;
    }

    /// A reload was asked for; [`Notifier::tell`] ends it. MONOTONIC_USEC pairs the two for `Type=notify-reload`.
    pub(super) fn reloading(&mut self) {
        if self.tick.is_none() || !self.ready {
            return;
        }
        self.ready = false;
        match NotifyState::monotonic_usec_now() {
            Ok(now) => send(&[NotifyState::Reloading, now]),
            Err(error) => tracing::warn!("the clock cannot be read, the service manager is not told: {error}"),
        }
    }

    /// The agent ends; enforcement does not.
    pub(super) fn stopping(&self) {
        if self.tick.is_some() {
            send(&[NotifyState::Stopping, NotifyState::Status("stopped; what is pinned stays enforced")]);
        }
    }
}

/// A service manager that does not listen is no reason to stop.
fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("the service manager cannot be told: {error}");
    }
}

impl Core {
    /// Is what this host declared in force?
    fn stands(&self) -> bool {
        let declared_open = self.config.absence.before_first_revision == Absent::Open || self.saved.files.is_empty();
        self.in_force.is_some() || self.attached || declared_open
    }

    /// One line: the state, the revision, and the first thing that is wrong.
    fn line(&self) -> String {
        let state = match self.hooks() {
            Ok(hooks) => self.state(&hooks),
            Err(failure) => return format!("the hooks cannot be read: {failure}"),
        };
        let revision = match &self.in_force {
            Some(f) => format!("revision {} (generation {})", f.revision.number, f.revision.generation),
            None => "no revision".to_owned(),
        };
        let wrong = match &state {
            State::Degraded { reasons } => reasons.first().map(|r| r.what.as_str()),
            State::Open { why } => Some(why.as_str()),
            State::Enforcing | State::Monitor => None,
        };
        let line = match wrong {
            Some(wrong) => format!("{}: {revision}; {wrong}", state.word()),
            None => format!("{}: {revision}", state.word()),
        };
        // The protocol ends a value at the end of the line.
        line.replace('\n', " ")
    }
}
