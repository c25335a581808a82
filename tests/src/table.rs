//! The conformance table: rows as data, and the runner that gives each row a verdict.
//!
//! A row is judged twice. First without segfw: its connection must work, else a later "closed" would say nothing.
//! Then with the agent and the policy of its group. Rows that need the same policy form a group: one world, one
//! agent, one publish. A group must hold both a row that stays open and one that closes, so that neither an agent
//! that lets everything through nor one that stops everything can pass.

use crate::actor::{Actor, Handle, domain_of, wildcard};
use crate::agent::{Agent, mentions};
use crate::policy::CGROUP;
use crate::proto::Cmd;
use crate::world::{Net, World};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Patience where the answer must come.
const SURE: u64 = 3000;
/// Patience where silence is expected.
const SILENT: u64 = 500;

/// Which addresses the client uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    V4,
    V6,
    /// An AF_INET6 socket and `::ffff:a.b.c.d`.
    Mapped,
    /// The row is not about addresses.
    None,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "4",
            Self::V6 => "6",
            Self::Mapped => "m",
            Self::None => "",
        })
    }
}

/// How the client speaks in a [`Probe::Flow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    Tcp,
    /// `connect`, then `send`.
    UdpConnected,
    /// `sendto`.
    Udp,
}

impl Proto {
    /// For the row's line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::UdpConnected => "udpc",
            Self::Udp => "udp",
        }
    }
}

/// What a probe saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "detail")]
pub enum Outcome {
    /// Bytes went there and, where there is an answer, came back.
    Open,
    /// The system call failed at once with EPERM or EACCES.
    Eperm,
    /// Refused by the network: ECONNREFUSED and its kin.
    Refused(String),
    /// Nothing came of it in time.
    Silent,
    /// The socket itself was refused.
    NoSocket(String),
    /// A live connection ended with this error.
    Cut(String),
    /// This kernel cannot do it: the row is skipped.
    Missing(String),
    /// Something that no row expects.
    Other(String),
}

/// What a row demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    Open,
    /// Closed in whatever way.
    Closed,
    /// Closed by the source: EPERM at once.
    Eperm,
    /// Closed by the destination: silence.
    Silent,
    /// Closed with a word: refused by the network, or EPERM at the source.
    Reject,
    /// The socket is not made.
    NoSocket,
    /// The live connection ends with an error.
    Cut,
    /// ECONNREFUSED, with and without segfw: the news of a closed port must come through.
    Related,
    /// Not covered, as documented: open or closed, the row only records which.
    Documented,
}

impl Expect {
    fn met_by(self, outcome: &Outcome) -> bool {
        use Outcome as O;
        let closed = matches!(outcome, O::Eperm | O::Silent | O::NoSocket(_) | O::Refused(_) | O::Cut(_));
        match self {
            Self::Open => *outcome == O::Open,
            Self::Closed => closed,
            Self::Eperm => *outcome == O::Eperm,
            Self::Silent => *outcome == O::Silent,
            Self::Reject => matches!(outcome, O::Eperm | O::Refused(_)),
            Self::NoSocket => matches!(outcome, O::NoSocket(_)),
            Self::Cut => matches!(outcome, O::Cut(_)),
            Self::Related => matches!(outcome, O::Refused(_)),
            Self::Documented => closed || *outcome == O::Open,
        }
    }

    /// For the rule that each group has both.
    fn opens(self) -> bool {
        matches!(self, Self::Open | Self::Related)
    }

    fn closes(self) -> bool {
        matches!(self, Self::Closed | Self::Eperm | Self::Silent | Self::Reject | Self::NoSocket | Self::Cut)
    }
}

/// What a row does.
#[derive(Clone, Copy, Debug)]
pub enum Probe {
    /// The first actor talks to a fresh socket of the second one.
    Flow { ends: Ends, proto: Proto, to: Where },
    /// Anything else.
    Custom(fn(&mut Stage, &Shot) -> Result<Outcome>),
}

/// Two actors: who calls, and who is called.
pub type Ends = (&'static str, &'static str);

/// The ends of most rows.
pub const ENDS: Ends = ("cli", "srv");

/// The destination of a flow.
#[derive(Clone, Copy, Debug)]
pub enum Where {
    Loopback,
    Net(&'static str),
    /// An extra address of the server, given as IPv4; IPv6 uses its [`crate::world::twin`].
    Extra(Ipv4Addr),
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// From 1, in the order of the table.
    pub id: usize,
    pub family: Family,
    /// `tcp`, `udp`, `icmp`, …
    pub proto: &'static str,
    /// `egress` = judged at the source, `ingress` = at the destination, `both`.
    pub direction: &'static str,
    /// What kind of rule, or which bypass.
    pub kind: &'static str,
    /// How the peer is known.
    pub evidence: &'static str,
    /// `enforce`, `monitor-policy`, `monitor-segment`, `monitor-host`.
    pub mode: &'static str,
    pub port: u16,
    /// Between the baseline and the start of the agent.
    pub prepare: Option<fn(&mut Stage, &Shot) -> Result<()>>,
    pub probe: Probe,
    /// What it sees without segfw.
    pub baseline: Expect,
    pub expect: Expect,
    /// The rule that the flow record must name.
    pub rule: Option<String>,
}

impl Row {
    /// A row with the usual answers; fields are changed with struct update syntax.
    pub fn new(kind: &'static str, port: u16, probe: Probe, expect: Expect) -> Self {
        Self {
            id: 0,
            family: Family::V4,
            proto: "tcp",
            direction: "egress",
            kind,
            evidence: "address",
            mode: "enforce",
            port,
            prepare: None,
            probe,
            baseline: Expect::Open,
            expect,
            rule: None,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { proto, family, direction, kind, evidence, mode, .. } = self;
        write!(f, "{proto}{family} {direction} {kind} by {evidence} {mode}")
    }
}

/// Rows that one policy serves.
#[derive(Clone, Debug)]
pub struct Group {
    pub name: String,
    pub nets: Vec<Net>,
    /// Name, cgroup, namespace.
    pub actors: Vec<(&'static str, &'static str, &'static str)>,
    pub policy: String,
    pub agent_args: Vec<String>,
    /// sysctls of every namespace.
    pub sysctls: Vec<(&'static str, &'static str)>,
    pub rows: Vec<Row>,
}

/// Where a row's probe runs.
#[derive(Debug)]
pub struct Stage {
    pub world: World,
    pub agent: Option<Agent>,
    /// The policy as published.
    pub policy: String,
    actors: BTreeMap<&'static str, Actor>,
    kept: BTreeMap<(usize, &'static str), Handle>,
}

/// One performance of a row.
#[derive(Clone, Copy, Debug)]
pub struct Shot {
    pub row: usize,
    pub family: Family,
    pub port: u16,
    /// How long to wait for what may never come.
    pub ms: u64,
    /// False in the baseline.
    pub enforced: bool,
}

impl Stage {
    /// Ends an actor: its process is gone when this returns.
    pub fn end(&mut self, name: &str) {
        drop(self.actors.remove(name));
    }

    /// Puts an actor in the place of one that was ended.
    pub fn put(&mut self, name: &'static str, actor: Actor) {
        let _ = self.actors.insert(name, actor);
    }

    /// An actor of the group.
    pub fn actor(&mut self, name: &str) -> &mut Actor {
        self.actors.get_mut(name).unwrap_or_else(|| panic!("no actor {name} in this group"))
    }

    /// A handle that outlives the probe, by row and name.
    pub fn keep(&mut self, shot: &Shot, name: &'static str, h: Handle) {
        self.kept.insert((shot.row, name), h);
    }

    /// What [`Self::keep`] kept.
    pub fn kept(&self, shot: &Shot, name: &'static str) -> Option<Handle> {
        self.kept.get(&(shot.row, name)).copied()
    }

    /// The address of a namespace in the family of the shot; a mapped one is written as such.
    pub fn address(&self, shot: &Shot, net: &str) -> SocketAddr {
        in_family(shot.family, self.world.v4(net), self.world.v6(net), shot.port)
    }

    /// The running agent.
    pub fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().context("no agent runs in this phase")
    }
}

fn in_family(family: Family, v4: Ipv4Addr, v6: Ipv6Addr, port: u16) -> SocketAddr {
    let ip = match family {
        Family::V4 | Family::None => IpAddr::V4(v4),
        Family::V6 => IpAddr::V6(v6),
        Family::Mapped => IpAddr::V6(v4.to_ipv6_mapped()),
    };
    SocketAddr::new(ip, port)
}

/// What an error of `connect` or `send` means.
pub fn refusal(errno: &str) -> Outcome {
    match errno {
        "EPERM" | "EACCES" => Outcome::Eperm,
        "ETIMEDOUT" => Outcome::Silent,
        "ECONNREFUSED" | "ECONNRESET" | "EHOSTUNREACH" | "ENETUNREACH" => Outcome::Refused(errno.to_owned()),
        _ => Outcome::Other(errno.to_owned()),
    }
}

/// What an error of `socket` means.
pub fn no_socket(errno: &str) -> Outcome {
    match errno {
        "EPERM" | "EACCES" => Outcome::NoSocket(errno.to_owned()),
        "EPROTONOSUPPORT" | "EAFNOSUPPORT" | "ESOCKTNOSUPPORT" | "ENOPROTOOPT" => Outcome::Missing(errno.to_owned()),
        _ => Outcome::Other(errno.to_owned()),
    }
}

/// Returns early with the outcome of a refusal.
#[macro_export]
macro_rules! or_outcome {
    ($tried:expr, $meaning:expr) => {
        match $tried {
            Ok(value) => value,
            Err(errno) => return Ok($meaning(&errno)),
        }
    };
}

/// A whole exchange over fresh sockets, closed afterwards.
fn flow(stage: &mut Stage, shot: &Shot, ends: Ends, proto: Proto, to: Where) -> Result<Outcome> {
    let dst = match to {
        Where::Loopback => in_family(shot.family, Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, shot.port),
        Where::Net(net) => stage.address(shot, net),
        Where::Extra(ip) => in_family(shot.family, ip, crate::world::twin(ip), shot.port),
    };
    // A datagram's answer must come from the address that was asked; only binding sees to that.
    let bound = matches!(to, Where::Extra(_));
    let at = if bound { dst } else { SocketAddr::new(wildcard(dst.ip()), dst.port()) };
    let result = match proto {
        Proto::Tcp => tcp_flow(stage, shot, ends, dst),
        Proto::UdpConnected => udp_flow(stage, shot, ends, dst, at, true),
        Proto::Udp => udp_flow(stage, shot, ends, dst, at, false),
    };
    for name in [ends.0, ends.1] {
        stage.actor(name).ask(&Cmd::CloseAll)?;
    }
    result
}

fn tcp_flow(stage: &mut Stage, shot: &Shot, ends: Ends, dst: SocketAddr) -> Result<Outcome> {
    let all = SocketAddr::new(wildcard(dst.ip()), dst.port());
    let listener = stage.actor(ends.1).listen(libc::SOCK_STREAM, 0, all, shot.family == Family::Mapped)?;
    let cli = stage.actor(ends.0);
    let h = or_outcome!(cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?, no_socket);
    or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
    exchange(stage, shot, ends, listener, h)
}

/// Data both ways over a connection that stands: `listener` is of the second end, `h` of the first.
pub fn exchange(stage: &mut Stage, shot: &Shot, ends: Ends, listener: Handle, h: Handle) -> Result<Outcome> {
    or_outcome!(stage.actor(ends.0).send(h, "ping")?, refusal);
    let srv = stage.actor(ends.1);
    let peer = or_outcome!(srv.accept(listener, shot.ms)?, refusal);
    or_outcome!(srv.recv(peer, shot.ms)?, refusal);
    or_outcome!(srv.send(peer, "pong")?, refusal);
    let got = or_outcome!(stage.actor(ends.0).recv(h, shot.ms)?, refusal);
    Ok(if got.data == "pong" { Outcome::Open } else { Outcome::Other(format!("read {:?}", got.data)) })
}

fn udp_flow(
    stage: &mut Stage,
    shot: &Shot,
    ends: Ends,
    dst: SocketAddr,
    at: SocketAddr,
    connected: bool,
) -> Result<Outcome> {
    let receiver = stage.actor(ends.1).listen(libc::SOCK_DGRAM, 0, at, shot.family == Family::Mapped)?;
    let cli = stage.actor(ends.0);
    let h = or_outcome!(cli.socket(domain_of(dst.ip()), libc::SOCK_DGRAM, 0)?, no_socket);
    if connected {
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        or_outcome!(cli.send(h, "ping")?, refusal);
    } else {
        or_outcome!(cli.send_to(h, dst, "ping")?, refusal);
    }
    arrives(stage, shot, ends, receiver, h)
}

/// True if a datagram reached `receiver` of the second end and the answer came back to `h` of the first.
pub fn arrives(stage: &mut Stage, shot: &Shot, ends: Ends, receiver: Handle, h: Handle) -> Result<Outcome> {
    let srv = stage.actor(ends.1);
    let got = or_outcome!(srv.recv(receiver, shot.ms)?, refusal);
    let from = got.from.parse().with_context(|| format!("the sender's address {:?}", got.from))?;
    or_outcome!(srv.send_to(receiver, from, "pong")?, refusal);
    let back = or_outcome!(stage.actor(ends.0).recv(h, shot.ms)?, refusal);
    Ok(if back.data == "pong" { Outcome::Open } else { Outcome::Other(format!("read {:?}", back.data)) })
}

/// How a run is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only what works without an agent.
    pub baseline_only: bool,
    /// Rows whose line or group contains this.
    pub filter: Option<String>,
    /// Groups at a time.
    pub jobs: usize,
    /// The flow records must name the rule of each row that has one.
    pub check_rules: bool,
}

/// How a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    Passed,
    Failed,
    Skipped,
}

/// One line of the result file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub id: usize,
    pub group: String,
    pub row: String,
    pub port: u16,
    pub end: End,
    pub baseline: Option<Outcome>,
    pub outcome: Option<Outcome>,
    pub note: String,
    pub ms: u128,
}

/// Makes a failure of each row that passed and saw something else than the row of that number in `others`, and of each that is
/// not there: with another gate, on the same kernel, every answer must be the same. A cut is a cut: which end notices first, the
/// one whose socket was ended (ECONNABORTED) or its peer (ECONNRESET), is chance.
pub fn compare(reports: &mut [Report], others: &[Report]) {
    let is_cut = |r: &Report| matches!(r.outcome, Some(Outcome::Cut(_)));
    for report in reports.iter_mut().filter(|r| r.end == End::Passed) {
        match others.iter().find(|o| o.id == report.id) {
            Some(other) if other.outcome == report.outcome || is_cut(other) && is_cut(report) => {}
            Some(other) => {
                report.end = End::Failed;
                report.note = format!("saw {:?}, and the other run saw {:?}", report.outcome, other.outcome);
            }
            None => {
                report.end = End::Failed;
                report.note = "the other run has no such row".to_owned();
            }
        }
    }
}

/// Numbers the rows, then takes those that the filter asks for.
pub fn select(mut groups: Vec<Group>, filter: Option<&str>) -> Vec<Group> {
    let mut id = 0;
    for group in &mut groups {
        for row in &mut group.rows {
            id += 1;
            row.id = id;
        }
        if let Some(text) = filter
            && !group.name.contains(text)
        {
            group.rows.retain(|r| r.to_string().contains(text) || r.id.to_string() == text);
        }
    }
    groups.retain(|g| !g.rows.is_empty());
    groups
}

/// Runs all groups and prints a line per row as it ends.
#[allow(clippy::print_stdout, reason = "the lines are the result")]
pub fn run(groups: Vec<Group>, options: &Options) -> Vec<Report> {
    let queue = Mutex::new(VecDeque::from(groups));
    let reports = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(group) = next else { break };
                    run_group(&group, options, &|report| {
                        println!("{}", line(&report));
                        reports.lock().unwrap_or_else(PoisonError::into_inner).push(report);
                    });
                }
            });
        }
    });
    let mut reports = reports.into_inner().unwrap_or_else(PoisonError::into_inner);
    reports.sort_by_key(|r| r.id);
    reports
}

fn line(report: &Report) -> String {
    let word = match report.end {
        End::Passed => "ok  ",
        End::Failed => "FAIL",
        End::Skipped => "skip",
    };
    let note = if report.note.is_empty() { String::new() } else { format!(": {}", report.note) };
    format!("{word} {} {} [{}]{note}", report.id, report.row, report.group)
}

fn run_group(group: &Group, options: &Options, done: &(dyn Fn(Report) + Sync)) {
    let report = |row: &Row| Report {
        id: row.id,
        group: group.name.clone(),
        row: row.to_string(),
        port: row.port,
        end: End::Passed,
        baseline: None,
        outcome: None,
        note: String::new(),
        ms: 0,
    };
    let mut reports: Vec<Report> = group.rows.iter().map(report).collect();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| perform(group, options, &mut reports)))
        .unwrap_or_else(|_| Err(anyhow::anyhow!("the test panicked")));
    if let Err(e) = result {
        // Whatever broke the group broke each row that has no verdict yet.
        for report in reports.iter_mut().filter(|r| r.end == End::Passed && !finished(r, options)) {
            report.end = End::Failed;
            report.note = format!("{e:#}");
        }
    }
    reports.into_iter().for_each(done);
}

fn finished(report: &Report, options: &Options) -> bool {
    if options.baseline_only { report.baseline.is_some() } else { report.outcome.is_some() }
}

fn perform(group: &Group, options: &Options, reports: &mut [Report]) -> Result<()> {
    let (opens, closes) = (group.rows.iter().any(|r| r.expect.opens()), group.rows.iter().any(|r| r.expect.closes()));
    anyhow::ensure!(
        options.filter.is_some() || (opens && closes),
        "the group {} needs a row that stays open and one that closes",
        group.name
    );
    let world = World::new(&group.nets)?;
    for net in &group.nets {
        let sysctls = group.sysctls.clone();
        crate::world::in_netns(&world.netns(net.name), move || {
            for (path, value) in sysctls {
                std::fs::write(format!("/proc/sys/net/{path}"), value).with_context(|| format!("sysctl {path}"))?;
            }
            Ok(())
        })?;
    }
    let mut actors = BTreeMap::new();
    for (name, cgroup, net) in &group.actors {
        actors.insert(*name, Actor::spawn(&world, name, cgroup, net)?);
    }
    let policy = group.policy.replace(CGROUP, &world.managed_path());
    let mut stage = Stage { world, agent: None, policy, actors, kept: BTreeMap::new() };

    for (row, report) in group.rows.iter().zip(&mut *reports) {
        shoot(&mut stage, row, report, false);
    }
    if options.baseline_only {
        return Ok(());
    }
    for (row, report) in group.rows.iter().zip(&mut *reports) {
        if let (Some(prepare), End::Passed) = (row.prepare, report.end) {
            prepare(&mut stage, &shot_of(row, true)).with_context(|| format!("preparing row {}", row.id))?;
        }
    }
    let policy = stage.policy.clone();
    stage.agent = Some(Agent::start(&stage.world, &policy, &group.agent_args)?);
    for (row, report) in group.rows.iter().zip(&mut *reports) {
        if report.end == End::Passed {
            shoot(&mut stage, row, report, true);
        }
    }
    if options.check_rules {
        check_rules(&mut stage, group, reports)?;
    }
    if let Some(agent) = &mut stage.agent {
        agent.stop()?;
    }
    Ok(())
}

fn shot_of(row: &Row, enforced: bool) -> Shot {
    let expect = if enforced { row.expect } else { row.baseline };
    let slow = u64::from(crate::slowness());
    // Silence is waited for in most rows; twice is enough for what would come.
    let ms = if expect.opens() { SURE * slow } else { SILENT * slow.min(2) };
    Shot { row: row.id, family: row.family, port: row.port, ms, enforced }
}

fn shoot(stage: &mut Stage, row: &Row, report: &mut Report, enforced: bool) {
    let shot = shot_of(row, enforced);
    let expect = if enforced { row.expect } else { row.baseline };
    let start = Instant::now();
    let outcome = match row.probe {
        Probe::Flow { ends, proto, to } => flow(stage, &shot, ends, proto, to),
        Probe::Custom(probe) => probe(stage, &shot),
    }
    .unwrap_or_else(|e| Outcome::Other(format!("{e:#}")));
    report.ms += start.elapsed().as_millis();
    if let Outcome::Missing(what) = &outcome {
        report.end = End::Skipped;
        report.note = format!("this kernel has no such thing ({what})");
    } else if !expect.met_by(&outcome) {
        let phase = if enforced { "with segfw" } else { "without segfw" };
        report.end = End::Failed;
        report.note = format!("{phase}: expected {expect:?}, saw {outcome:?}");
    } else if expect == Expect::Documented {
        report.note = format!("not covered, as documented; seen: {outcome:?}");
    }
    if enforced {
        report.outcome = Some(outcome);
    } else {
        report.baseline = Some(outcome);
    }
}

/// Looks for each row's rule in the flow records with its port.
fn check_rules(stage: &mut Stage, group: &Group, reports: &mut [Report]) -> Result<()> {
    let records = stage.agent()?.flows()?;
    for (row, report) in group.rows.iter().zip(reports) {
        let Some(rule) = &row.rule else { continue };
        let port = row.port.to_string();
        if report.end == End::Passed && !records.iter().any(|r| mentions(r, &port) && mentions(r, rule)) {
            report.end = End::Failed;
            report.note = format!("no flow record with port {port} names the rule {rule}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(id: usize, outcome: Outcome) -> Report {
        Report {
            id,
            group: "g".to_owned(),
            row: "r".to_owned(),
            port: 1,
            end: End::Passed,
            baseline: None,
            outcome: Some(outcome),
            note: String::new(),
            ms: 0,
        }
    }

    #[test]
    fn another_answer_fails_and_so_does_a_row_that_is_not_there() {
        let cut = |errno: &str| Outcome::Cut(errno.to_owned());
        let others =
            [seen(1, Outcome::Silent), seen(2, Outcome::Silent), seen(4, cut("ECONNRESET")), seen(5, cut("EPIPE"))];
        let mut reports = [
            seen(1, Outcome::Silent),
            seen(2, Outcome::Refused("reset".to_owned())),
            seen(3, Outcome::Open),
            seen(4, cut("ECONNABORTED")),
            seen(5, Outcome::Open),
        ];
        compare(&mut reports, &others);
        use End::{Failed, Passed};
        assert_eq!(reports.each_ref().map(|r| r.end), [Passed, Failed, Failed, Passed, Failed]);
        let text = serde_json::to_string(&reports).expect("reports are JSON");
        let read: Vec<Report> = serde_json::from_str(&text).expect("and can be read back");
        assert_eq!(read[1].outcome, reports[1].outcome);
    }
}
