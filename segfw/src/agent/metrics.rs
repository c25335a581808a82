//! `/metrics`, `/healthz` and `/readyz`. Every name is documented in `docs/metrics.md`; a test compares the two.
//!
//! All labels are bounded by this program, none by the number of workloads, rules or peers.

use super::{Agent, export, trouble};
use crate::control::Failure;
use crate::control::report::{State, StatusReport};
use crate::host::proc;
use axum::Router;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use segfw_common::{Direction, Reason, Verdict};
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep, timeout};

/// Connections at a time: some scrapers and probes. More wait in the kernel's queue.
const CONNECTIONS: usize = 16;
/// A connection ends after so long, whatever it does, so that silent ones do not fill the room. Scrapers come again.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);
/// An event loop that has not come round for so long does not live. It does so every 200 ms, but while it takes a
/// revision: the largest take some ten seconds.
const ALIVE: Duration = Duration::from_secs(60);
/// An answer that is not there by then is 503. Prometheus gives up after 10 s.
const ANSWER: Duration = Duration::from_secs(8);
/// Wait before an address that is taken is tried again, and after a failed accept.
const AGAIN: Duration = Duration::from_secs(2);

/// What the pages are made of.
#[derive(Clone, Debug)]
struct Facts {
    status: StatusReport,
    /// Kinds of trouble.
    troubles: Vec<&'static str>,
    /// Seconds; `None` = no revision was put in force by this agent.
    apply: Option<f64>,
}

#[derive(Clone)]
struct Pages {
    agent: Arc<Agent>,
    /// Not behind the lock of the agent's state: that may be what hangs.
    shared: Arc<export::Shared>,
    /// One answer is made at a time: it asks the kernel.
    turn: Arc<Mutex<()>>,
}

/// Serves until it is aborted. An address that cannot be had is a trouble, not an end: enforcement does not need it.
pub(super) async fn serve(at: SocketAddr, agent: Arc<Agent>, shared: Arc<export::Shared>) {
    let inner = loop {
        match TcpListener::bind(at).await {
            Ok(inner) => break inner,
            Err(error) => {
                let what = format!("metrics cannot be served at {at}: {error}");
                if !agent.core().troubles.contains_key("metrics") {
                    tracing::error!("{what}");
                }
                let words = trouble(&what, "nobody is warned by them", "free the port, or choose another one");
                let _ = agent.core().troubles.insert("metrics", words);
                sleep(AGAIN).await;
            }
        }
    };
    let _ = agent.core().troubles.remove("metrics");
    let pages = Pages { agent, shared, turn: Arc::default() };
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(pages);
    let listener = Limited { inner, room: Arc::new(Semaphore::new(CONNECTIONS)) };
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!("metrics are no longer served: {error}");
    }
}

async fn metrics(Shared(pages): Shared<Pages>, headers: HeaderMap) -> Response {
    let open = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("application/openmetrics-text"));
    match pages.facts().await {
        Err(failure) => unavailable(&failure.message),
        Ok(facts) => match openmetrics(facts) {
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
            Ok(text) if open => {
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                ([(header::CONTENT_TYPE, kind)], text).into_response()
            }
            Ok(text) => {
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], classic(&text)).into_response()
            }
        },
    }
}

/// Is the agent's loop alive?
async fn healthz(Shared(pages): Shared<Pages>) -> Response {
    let now = proc::boot_ns().unwrap_or(0);
    let age = Duration::from_nanos(now.saturating_sub(pages.shared.beat.load(Ordering::Relaxed)));
    if age < ALIVE {
        return "alive\n".into_response();
    }
    unavailable(&format!("the agent's loop has not come round for {} s; what is loaded stays in force", age.as_secs()))
}

/// Is what the policy says in force?
async fn readyz(Shared(pages): Shared<Pages>) -> Response {
    let facts = match pages.facts().await {
        Ok(facts) => facts,
        Err(failure) => return unavailable(&failure.message),
    };
    match ready(&facts.status) {
        Ok(text) => text.into_response(),
        Err(why) => unavailable(&why),
    }
}

fn ready(status: &StatusReport) -> Result<String, String> {
    match (&status.state, &status.revision) {
        (State::Open { why }, _) => Err(format!("OPEN: {why}")),
        (_, None) => Err("no revision is in force".to_owned()),
        (state, Some(revision)) => Ok(format!("{}: revision {}\n", state.word(), revision.number)),
    }
}

fn unavailable(why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response()
}

impl Pages {
    async fn facts(&self) -> Result<Facts, Failure> {
        let late = || Failure::system(format!("the agent had no answer within {ANSWER:?}"));
        let made = async {
            // Kept until the answer is there, also if nobody waits for it any more.
            let turn = Arc::clone(&self.turn).lock_owned().await;
            let agent = Arc::clone(&self.agent);
            let made = move || {
                let facts = agent.facts();
                drop(turn);
                facts
            };
            tokio::task::spawn_blocking(made).await.unwrap_or_else(|e| Err(Failure::system(e.to_string())))
        };
        timeout(ANSWER, made).await.unwrap_or_else(|_| Err(late()))
    }
}

impl Agent {
    fn facts(&self) -> Result<Facts, Failure> {
        let status = self.report()?;
        let core = self.core();
        let mut troubles: Vec<&'static str> = core.troubles.keys().copied().collect();
        let failing = core.history.spool().and_then(|spool| spool.counts().failing());
        troubles.extend(failing.map(|_| "spool"));
        troubles.extend(status.refused.as_ref().map(|_| "refused"));
        let missing = status.revision.is_some() && status.hooks.iter().any(|hook| !hook.attached);
        troubles.extend(missing.then_some("hooks"));
        let apply_ns = core.shared.apply_ns.load(Ordering::Relaxed);
        let apply = (apply_ns != 0).then(|| Duration::from_nanos(apply_ns).as_secs_f64());
        Ok(Facts { status, troubles, apply })
    }
}

/// Counters and gauges of [`StatusReport::counters`] that are metrics of their own: name there, name here, help.
const COUNTERS: [(&str, &str, &str); 13] = [
    ("events-sent", "events", "Events that the kernel handed over"),
    ("denials-aggregated", "denials_aggregated", "Denials that were counted by key instead of sent one by one"),
    ("denials-uncounted", "denials_uncounted", "Denials that are in the verdict counters only"),
    ("storage-failed", "socket_storage_failed", "Sockets for which the kernel had no memory for state"),
    ("xdp-dropped", "xdp_refused", "Packets that XDP refused in place of a socket"),
    ("malformed", "packets_malformed", "Packets that could not be read"),
    ("rejects-unanswered", "rejects_unanswered", "Rejected flows that got no answer"),
    ("repairs", "repairs", "Things in the kernel that were not as the agent had left them"),
    ("containers-left-out", "containers_left_out", "Containers and labels of runtimes that were above a limit"),
    ("history-overwritten", "history_overwritten", "Records in memory that made room for newer ones"),
    ("spool-written", "flow_spool_written", "Records written to disk since the agent started"),
    (
        "spool-dropped",
        "flow_spool_dropped",
        "Records on disk that went with the oldest files, over the life of the folder",
    ),
    ("spool-torn", "flow_spool_torn", "Lines that the death of an agent had cut off"),
];
const GAUGES: [(&str, &str, &str); 5] = [
    ("history-records", "history_records", "Records in memory"),
    ("history-readers", "history_readers", "Live readers of records"),
    ("spool-records", "flow_spool_records", "Records on disk"),
    ("spool-bytes", "flow_spool_bytes", "Bytes of flow records on disk"),
    ("spool-files", "flow_spool_files", "Files of flow records on disk"),
];
/// Where records are lost.
const STAGES: [(&str, &str); 3] = [("events-lost", "kernel"), ("history-lagged", "reader"), ("spool-lost", "spool")];
/// Tables that refused an entry.
const FULL: [(&str, &str); 4] = [
    ("endpoints-full", "endpoints"),
    ("rule-counters-full", "rule_counters"),
    ("origins-full", "origins"),
    ("flows-full", "flows"),
];
const CONTROL: [(&str, &str); 5] = [
    ("control-served", "served"),
    ("control-refused", "refused"),
    ("control-busy", "busy"),
    ("control-malformed", "malformed"),
    ("control-cut-off", "cut_off"),
];
const STATES: [&str; 4] = ["ENFORCING", "DEGRADED", "MONITOR", "OPEN"];
/// Shown with 0 too; others only while they last.
const TROUBLES: [&str; 6] = ["canary", "hooks", "refused", "runtimes", "save", "spool"];

type Labels<'a> = Vec<(&'static str, &'a str)>;

/// Writes families of metrics.
struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn gauge<'l>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (Labels<'l>, f64)>,
    ) -> Result<(), fmt::Error> {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            if labels.is_empty() {
                family.encode_gauge(&value)?;
            } else {
                family.encode_family(&labels)?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }

    fn counter<'l>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (Labels<'l>, u64)>,
    ) -> Result<(), fmt::Error> {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            if labels.is_empty() {
                family.encode_counter::<NoLabelSet, u64, u64>(&value, None)?;
            } else {
                family.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, u64>(&value, None)?;
            }
        }
        Ok(())
    }
}

impl Collector for Facts {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let out = &mut Out(encoder);
        self.state(out)?;
        self.policy(out)?;
        self.flows(out)?;
        self.tables(out)
    }
}

impl Facts {
    fn named(&self, name: &str) -> Option<u64> {
        self.status.counters.named.get(name).copied()
    }

    fn state(&self, out: &mut Out<'_>) -> Result<(), fmt::Error> {
        let StatusReport { state, agent, hooks, .. } = &self.status;
        let abi = agent.abi.to_string();
        let build = vec![("version", agent.version.as_str()), ("abi", abi.as_str()), ("kernel", agent.kernel.as_str())];
        out.gauge("build_info", "Version, layout of the maps, kernel; always 1", [(build, 1.0)])?;
        let start = agent.started_at.as_millisecond() as f64 / 1000.0;
        out.gauge("agent_start_time_seconds", "Unix time at which the agent started", [(vec![], start)])?;
        let one = |word: &'static str| (vec![("state", word)], f64::from(u8::from(state.word() == word)));
        out.gauge("state", "1 for the state the agent is in", STATES.map(one))?;
        let mut kinds: Vec<&str> = TROUBLES.into_iter().chain(self.troubles.iter().copied()).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let one = |kind| (vec![("kind", kind)], f64::from(u8::from(self.troubles.contains(&kind))));
        out.gauge("troubles", "1 while something is not as it should be", kinds.into_iter().map(one))?;
        let attached =
            hooks.iter().map(|hook| (vec![("hook", hook.name.as_str())], f64::from(u8::from(hook.attached))));
        out.gauge("hook_attached", "1 where the program is at its place", attached)?;
        let requests = CONTROL.map(|(name, word)| (vec![("outcome", word)], self.named(name).unwrap_or(0)));
        out.counter("control_requests", "Callers at the control socket", requests)
    }

    fn policy(&self, out: &mut Out<'_>) -> Result<(), fmt::Error> {
        let StatusReport { revision, refused, workloads, identities, .. } = &self.status;
        let applied = revision.as_ref().map_or(0, |r| r.number) as f64;
        let refused = f64::from(u8::from(refused.is_some()));
        // A refused revision has no number: it would have been the next one.
        let rows = [(vec![("state", "applied")], applied), (vec![("state", "wanted")], applied + refused)];
        out.gauge("policy_revision", "The revision in force, and the one the policy folder asks for", rows)?;
        out.gauge("policy_refused", "1 while the newest content of the policy folder is refused", [(vec![], refused)])?;
        if let Some(seconds) = self.apply {
            let help = "Seconds that the newest revision took from its files to being in force";
            out.gauge("policy_apply_seconds", help, [(vec![], seconds)])?;
        }
        let counts = [
            ("enforced", workloads.enforced),
            ("monitored", workloads.monitored),
            ("no-segment", workloads.no_segment),
            ("unresolved", workloads.unresolved),
        ];
        let rows = counts.map(|(word, n)| (vec![("enforcement", word)], n as f64));
        out.gauge("workloads", "Workloads of this host by how they are treated", rows)?;
        out.gauge("identities", "Identities that have a number", [(vec![], *identities as f64)])
    }

    fn flows(&self, out: &mut Out<'_>) -> Result<(), fmt::Error> {
        let verdicts = &self.status.counters.verdicts;
        let mut rows = Vec::new();
        // Zeros too: a rate needs to see where a count began.
        for direction in [Direction::Ingress, Direction::Egress] {
            for verdict in [Verdict::Allowed, Verdict::Denied, Verdict::Audit] {
                for reason in Reason::ALL {
                    let is = |c: &&crate::control::report::VerdictCount| {
                        (c.verdict, c.reason, c.direction) == (verdict.into(), reason.into(), direction.into())
                    };
                    let labels = vec![
                        ("verdict", verdict.as_str()),
                        ("direction", direction.as_str()),
                        ("reason", reason.as_str()),
                    ];
                    rows.push((labels, verdicts.iter().find(is).map_or(0, |c| c.count)));
                }
            }
        }
        out.counter("verdicts", "Judged flows, not packets", rows)?;
        let rows = STAGES.into_iter().filter_map(|(name, stage)| Some((vec![("stage", stage)], self.named(name)?)));
        out.counter("events_lost", "Records lost; their verdicts stand and are counted", rows)?;
        for (name, metric, help) in COUNTERS {
            if let Some(value) = self.named(name) {
                out.counter(metric, help, [(vec![], value)])?;
            }
        }
        for (name, metric, help) in GAUGES {
            if let Some(value) = self.named(name) {
                out.gauge(metric, help, [(vec![], value as f64)])?;
            }
        }
        Ok(())
    }

    fn tables(&self, out: &mut Out<'_>) -> Result<(), fmt::Error> {
        let maps = &self.status.maps;
        let rows = maps.iter().map(|map| (vec![("map", map.name.as_str())], map.entries as f64));
        out.gauge("bpf_map_entries", "Entries in use", rows)?;
        let rows = maps.iter().map(|map| (vec![("map", map.name.as_str())], map.max as f64));
        out.gauge("bpf_map_max_entries", "Entries there is room for", rows)?;
        let rows = FULL.map(|(name, table)| (vec![("table", table)], self.named(name).unwrap_or(0)));
        out.counter("table_full", "Entries that found a table of the kernel side full", rows)
    }
}

/// The page, as OpenMetrics 1.0.
fn openmetrics(facts: Facts) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("segfw");
    registry.register_collector(Box::new(facts));
    let mut page = String::new();
    text::encode(&mut page, &registry)?;
    Ok(page)
}

/// The page, as Prometheus' own older format: there the name of a counter has its `_total` in the comments too.
fn classic(page: &str) -> String {
    let counters: Vec<&str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let line = |line: &str| {
        let named = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
        match named.and_then(|rest| rest.split_once(' ')) {
            Some((name, rest)) if counters.contains(&name) => {
                let word = line.get(..7).unwrap_or_default();
                format!("{word}{name}_total {rest}\n")
            }
            _ if line == "# EOF" => String::new(),
            _ => format!("{line}\n"),
        }
    };
    page.lines().map(line).collect()
}

/// A listener that lets so many in at a time.
struct Limited {
    inner: TcpListener,
    room: Arc<Semaphore>,
}

impl axum::serve::Listener for Limited {
    type Io = Guest;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guest, SocketAddr) {
        loop {
            // Never closed.
            let Ok(permit) = Arc::clone(&self.room).acquire_owned().await else { continue };
            match self.inner.accept().await {
                Ok((stream, from)) => {
                    return (Guest { stream, end: Box::pin(sleep(CONNECTION_LIFE)), _permit: permit }, from);
                }
                Err(error) => {
                    tracing::warn!(%error, "the metrics listener could not take a connection");
                    sleep(AGAIN).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}

/// A connection that ends.
struct Guest {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for Guest {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_write(cx, data)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::tests as fixed;
    use std::collections::BTreeSet;

    /// With everything that can be there.
    fn facts() -> Facts {
        let mut status = fixed::status();
        let known = COUNTERS.iter().chain(&GAUGES).map(|c| c.0).chain(STAGES.iter().chain(&FULL).map(|c| c.0));
        for name in known {
            let _ = status.counters.named.entry(name.to_owned()).or_insert(7);
        }
        Facts { status, troubles: vec!["cgroups"], apply: Some(0.25) }
    }

    fn names(page: &str) -> BTreeSet<String> {
        page.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).map(str::to_owned).collect()
    }

    #[test]
    fn every_metric_is_documented_and_every_documented_one_is_there() {
        let page = classic(&openmetrics(facts()).unwrap());
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md")).unwrap();
        let documented: BTreeSet<String> = text
            .lines()
            .filter_map(|l| l.strip_prefix("| `segfw_")?.split(['`', '{']).next())
            .map(|n| format!("segfw_{n}"))
            .collect();
        assert_eq!(names(&page), documented);
    }

    #[test]
    fn both_formats_say_the_same() {
        let open = openmetrics(facts()).unwrap();
        let page = classic(&open);
        assert!(open.ends_with("# EOF\n") && !page.contains("EOF"));
        assert!(open.contains("# TYPE segfw_verdicts counter\n"));
        assert!(page.contains("# TYPE segfw_verdicts_total counter\n"));
        for line in [
            "segfw_policy_apply_seconds 0.25",
            "segfw_troubles{kind=\"cgroups\"} 1.0",
            "segfw_troubles{kind=\"hooks\"} 0.0",
            "segfw_events_lost_total{stage=\"spool\"} 7",
        ] {
            assert!(open.contains(line) && page.contains(line), "{line}\n{page}");
        }
        let values = |text: &str| text.lines().filter(|l| !l.starts_with('#')).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(values(&open), values(&page));
    }

    #[test]
    fn labels_are_bounded() {
        let page = classic(&openmetrics(facts()).unwrap());
        let series = page.lines().filter(|l| !l.starts_with('#')).count();
        // 90 of them are verdicts.
        assert!(series < 200, "{series} series");
    }

    #[test]
    fn ready_is_a_revision_in_force() {
        let mut status = fixed::status();
        assert!(ready(&status).unwrap().ends_with(": revision 41\n"), "{:?}", ready(&status));
        status.revision = None;
        assert_eq!(ready(&status).unwrap_err(), "no revision is in force");
        status.state = State::Open { why: "no policy was ever loaded".to_owned() };
        assert_eq!(ready(&status).unwrap_err(), "OPEN: no policy was ever loaded");
    }
}
