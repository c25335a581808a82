//! What must hold while something is broken: the agent killed, stopped or misled, its disk full, its events too many.

use super::{addresses, families, pair, tcp};
use crate::actor::{Actor, domain_of, wildcard};
use crate::agent::{Agent, digest, mentions};
use crate::or_outcome;
use crate::policy::Yaml;
use crate::proto::{Cmd, Tally};
use crate::table::{ENDS, Expect, Family, Group, Outcome, Probe, Row, Shot, Stage, Where, exchange, refusal};
use crate::world::{cgroup2_mount, net};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant, UNIX_EPOCH};

const PORT: u16 = 5000;
const OTHER: u16 = 5001;

pub(super) fn groups() -> Vec<Group> {
    vec![chaos(), churn(), pressure(), disk(), drain(), expires(), unresolved(), unresolved_peers()]
}

fn row(kind: &'static str, run: fn(&mut Stage, &Shot) -> Result<Outcome>, port: u16, expect: Expect) -> Row {
    Row { probe: Probe::Custom(run), ..tcp(kind, port, expect) }
}

fn ingress(row: Row) -> Row {
    Row { direction: "ingress", ..row }
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// A connection of `cli` to a fresh listener of `srv`: the ends of both.
fn connection(stage: &mut Stage, shot: &Shot) -> Result<std::result::Result<(u32, u32), Outcome>> {
    let dst = stage.address(shot, "b");
    let listener = stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    let cli = stage.actor("cli");
    let h = cli.must(&Cmd::Socket { domain: domain_of(dst.ip()), kind: libc::SOCK_STREAM, proto: 0 })?.h;
    if let Err(errno) = cli.connect(h, dst, shot.ms)? {
        return Ok(Err(refusal(&errno)));
    }
    let accepted = stage.actor("srv").accept(listener, shot.ms)?;
    Ok(accepted.map(|peer| (h, peer)).map_err(|e| refusal(&e)))
}

/// One word from `cli` to `srv` over a connection that stands.
fn says(stage: &mut Stage, (h, peer): (u32, u32), word: &str, ms: u64) -> Result<Outcome> {
    let cut = |e: &str| e.starts_with("ECONN") || e == "EPIPE";
    let sent = stage.actor("cli").send(h, word)?;
    Ok(match (sent, stage.actor("srv").recv(peer, ms)?) {
        (Ok(()), Ok(got)) if got.data == word => Outcome::Open,
        (Err(e), _) | (_, Err(e)) if cut(&e) => Outcome::Cut(e),
        (Ok(()), Err(e)) => refusal(&e),
        (sent, seen) => Outcome::Other(format!("send {sent:?}, receive {seen:?}")),
    })
}

/// A whole flow over fresh sockets.
fn plain(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let outcome = (|| {
        let dst = stage.address(shot, "b");
        let listener = stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
        let cli = stage.actor("cli");
        let h = cli.must(&Cmd::Socket { domain: domain_of(dst.ip()), kind: libc::SOCK_STREAM, proto: 0 })?.h;
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        exchange(stage, shot, ENDS, listener, h)
    })();
    tidy(stage)?;
    outcome
}

fn tidy(stage: &mut Stage) -> Result<()> {
    for name in ["cli", "srv"] {
        stage.actor(name).ask(&Cmd::CloseAll)?;
    }
    Ok(())
}

// ---- A workload whose labels are not known yet.

fn unresolved() -> Group {
    let mut yaml = Yaml::default();
    yaml.0 += &format!(
        "---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {{name: pod}}\nspec:\n  match: [{{cgroup: \"{}/pods/*\"}}]\n  labels: {{app: pod}}\n",
        crate::policy::CGROUP
    );
    yaml.segment("pod", "select: {app: pod}", &[]).segment("peer", &addresses(0), &[]);
    yaml.allow("out", "pod", "peer", "tcp/5000");
    yaml.allow("in", "peer", "pod", "tcp/5010");
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        for made in [
            row("labels-not-known-yet-egress", new_pod_calls, 5000, Expect::Eperm),
            ingress(row("labels-not-known-yet-ingress", new_pod_listens, 5010, Expect::Silent)),
            row("labels-known-egress", known_pod_calls, 5000, Expect::Open),
            row("labels-known-egress-denied", known_pod_calls, 5002, Expect::Eperm),
            ingress(row("labels-known-ingress", known_pod_listens, 5010, Expect::Open)),
            ingress(row("labels-known-ingress-denied", known_pod_listens, 5012, Expect::Silent)),
        ] {
            rows.push(Row { family, evidence: "cgroup", ..made });
        }
    }
    let mut group = pair("unresolved-local", "outside/cli", "managed/pods/first", yaml.0, rows);
    group.actors[1].2 = "b";
    group
}

/// A process in a cgroup that is new. `known`: the agent sees it; else it is stopped until the process has acted.
fn new_pod(stage: &mut Stage, shot: &Shot, known: bool, calls: bool) -> Result<Outcome> {
    let stopped = shot.enforced && !known;
    if stopped {
        stage.agent()?.signal(Signal::SIGSTOP)?;
    }
    let name = format!("managed/pods/p{}{}", shot.row, u8::from(shot.enforced));
    let mut pod = Actor::spawn(&stage.world, "pod", &name, "b")?;
    if shot.enforced && known {
        pause(2000);
    }
    let outcome = pod_flow(stage, shot, &mut pod, calls, shot.ms);
    stage.actor("cli").ask(&Cmd::CloseAll)?;
    pod.ask(&Cmd::CloseAll)?;
    if stopped {
        stage.agent()?.signal(Signal::SIGCONT)?;
        // The cgroup itself may have had no name yet when the record was written.
        let address = stage.address(shot, if calls { "a" } else { "b" }).ip().to_string();
        stage.agent()?.wait_until("answers again", |_| true)?;
        pause(1500);
        let records = stage.agent()?.flows()?;
        let told = records.iter().any(|r| {
            mentions(r, "unresolved-local") && mentions(r, &shot.port.to_string()) && mentions(r, address.as_str())
        });
        ensure!(told, "no record gives unresolved-local as the reason: {records:?}");
        // Known by now: what the policy allows passes, with the same process.
        let later = pod_flow(stage, shot, &mut pod, calls, 3000);
        stage.actor("cli").ask(&Cmd::CloseAll)?;
        ensure!(matches!(later, Ok(Outcome::Open)), "still not open when the labels are known: {later:?}");
    }
    outcome
}

/// The pod calls `cli` or the other way round.
fn pod_flow(stage: &mut Stage, shot: &Shot, pod: &mut Actor, calls: bool, ms: u64) -> Result<Outcome> {
    let dst = stage.address(shot, if calls { "a" } else { "b" });
    let all = SocketAddr::new(wildcard(dst.ip()), shot.port);
    let socket = Cmd::Socket { domain: domain_of(dst.ip()), kind: libc::SOCK_STREAM, proto: 0 };
    let peer = stage.actor("cli");
    let (caller, called) = if calls { (pod, peer) } else { (peer, pod) };
    let listener = called.listen_tcp(all)?;
    let h = caller.must(&socket)?.h;
    or_outcome!(caller.connect(h, dst, ms)?, refusal);
    or_outcome!(caller.send(h, "ping")?, refusal);
    let accepted = or_outcome!(called.accept(listener, ms)?, refusal);
    or_outcome!(called.recv(accepted, ms)?, refusal);
    Ok(Outcome::Open)
}

fn new_pod_calls(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    new_pod(stage, shot, false, true)
}
fn new_pod_listens(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    new_pod(stage, shot, false, false)
}
fn known_pod_calls(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    new_pod(stage, shot, true, true)
}
fn known_pod_listens(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    new_pod(stage, shot, true, false)
}

/// A peer that nothing tells: two identities share its namespace, and its socket never bound a port.
fn unresolved_peers() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &["default: {ingress: deny, egress: allow}"]);
    yaml.enforced("srv", &[]).enforced("lax", &["whenUnresolved: allow"]).enforced("strict", &["whenUnresolved: deny"]);
    yaml.workload("mate");
    yaml.allow("to-srv", "cli", "srv", "udp/5000");
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        for (to, kind, proto, expect) in [
            ("lax", "unresolved-peer-allowed", "udpc", Expect::Open),
            ("strict", "unresolved-peer-denied", "udpc", Expect::Silent),
            ("srv", "unresolved-peer-denied-by-default", "udpc", Expect::Silent),
            ("srv", "the-same-peer-resolved", "udp", Expect::Open),
            ("lax", "known-peer-is-not-unresolved", "udp", Expect::Silent),
        ] {
            let net = if to == "srv" {
                "b"
            } else if to == "lax" {
                "c"
            } else {
                "d"
            };
            let speak = if proto == "udp" { crate::table::Proto::Udp } else { crate::table::Proto::UdpConnected };
            let probe = Probe::Flow { ends: ("cli", to), proto: speak, to: Where::Net(net) };
            rows.push(ingress(Row { family, proto, ..Row::new(kind, 5000, probe, expect) }));
        }
    }
    Group {
        nets: vec![net("a"), net("b"), net("c"), net("d")],
        actors: vec![
            ("cli", "managed/cli", "a"),
            ("mate", "managed/mate", "a"),
            ("srv", "managed/srv", "b"),
            ("lax", "managed/lax", "c"),
            ("strict", "managed/strict", "d"),
        ],
        ..pair("unresolved-peers", "", "", yaml.0, rows)
    }
}

// ---- Live connections and time.

fn ranged(name: &str, srv: &[&str], mut rows: Vec<Row>) -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", srv).segment("cli", &addresses(0), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{PORT}-{}", PORT + 20));
    rows.push(ingress(tcp("never-allowed", 4900, Expect::Silent)));
    rows.push(ingress(tcp("allowed-again", PORT, Expect::Open)));
    pair(name, "outside/cli", "managed/srv", yaml.0, rows)
}

fn drain() -> Group {
    let mut rows = Vec::new();
    for (i, family) in [Family::V4, Family::V6].into_iter().enumerate() {
        let i = u16::try_from(i).unwrap_or(0);
        rows.push(Row { family, ..ingress(row("revoke-drain-2s", drains, PORT + 1 + i, Expect::Cut)) });
        rows.push(Row {
            family,
            ..ingress(row("revoke-drain-agent-stopped", drains_alone, PORT + 3 + i, Expect::Silent))
        });
    }
    ranged("revoke-drain", &["onRevoke: {drain: 2s}"], rows)
}

fn drains(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    drain_with(stage, shot, false)
}
fn drains_alone(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    drain_with(stage, shot, true)
}

fn drain_with(stage: &mut Stage, shot: &Shot, stopped: bool) -> Result<Outcome> {
    for _ in 0..TRIES {
        let outcome = drained(stage, shot, stopped);
        tidy(stage)?;
        if shot.enforced {
            let open = stage.policy.clone();
            stage.agent()?.reload(&open)?;
        }
        if let Some(outcome) = outcome? {
            return Ok(outcome);
        }
    }
    bail!("{TRIES} revisions took more than half of the time in their own policies")
}

/// How often a row with a time in its policy begins anew where the revision took too much of it.
const TRIES: u32 = 3;

/// `None` = the revision took so long that nothing can be said.
fn drained(stage: &mut Stage, shot: &Shot, stopped: bool) -> Result<Option<Outcome>> {
    let ends = match connection(stage, shot)? {
        Ok(ends) => ends,
        Err(outcome) => return Ok(Some(outcome)),
    };
    if !shot.enforced {
        return says(stage, ends, "word", shot.ms).map(Some);
    }
    ensure!(says(stage, ends, "before", 3000)? == Outcome::Open, "the connection does not work");
    let seconds = 1 + stage.agent()?.pace() * 3;
    let drain = Duration::from_secs(seconds);
    let closed =
        stage.policy.replace("action: allow", "action: deny").replace("drain: 2s", &format!("drain: {seconds}s"));
    let asked = Instant::now();
    stage.agent()?.reload(&closed)?;
    // The packet that starts the kernel's own drain; the sweep has started the agent's.
    let within = says(stage, ends, "within", 1000)?;
    let started = Instant::now();
    if started - asked > drain / 2 {
        return Ok(None);
    }
    ensure!(within == Outcome::Open, "cut at once in spite of the drain");
    if stopped {
        stage.agent()?.signal(Signal::SIGSTOP)?;
    }
    // The switch, from which the drain counts, was between `asked` and `started`.
    let slack = Duration::from_millis(600) * crate::slowness();
    let (mut outcome, mut lived) = (Outcome::Open, Duration::ZERO);
    while outcome == Outcome::Open && started.elapsed() < drain + 2 * slack {
        pause(50);
        let sent = started.elapsed();
        outcome = says(stage, ends, "still", 500)?;
        if outcome == Outcome::Open {
            lived = sent;
        }
    }
    let ended = asked.elapsed();
    if stopped {
        stage.agent()?.signal(Signal::SIGCONT)?;
    } else if outcome == Outcome::Silent {
        // The kernel stops the packets a moment before the agent ends the socket.
        pause(500 * u64::from(crate::slowness()));
        outcome = says(stage, ends, "gone", 500)?;
    }
    ensure!(ended >= drain, "a drain of {drain:?} was over {ended:?} after the revision was asked for");
    ensure!(lived <= drain + slack, "with a drain of {drain:?} it lived for {lived:?} after the revision");
    Ok(Some(outcome))
}

fn expires() -> Group {
    let rows = vec![
        ingress(row("expires-is-cut", expiry_cut, PORT + 1, Expect::Cut)),
        ingress(row("expires-agent-stopped-stalls", expiry_stopped, PORT + 2, Expect::Silent)),
        ingress(row("expires-agent-stopped-refuses-new", expiry_stopped_new, PORT + 3, Expect::Silent)),
        ingress(row("expires-agent-killed-refuses-new", expiry_killed_new, PORT + 4, Expect::Silent)),
        ingress(row("expires-agent-killed-stalls", expiry_killed, PORT + 5, Expect::Silent)),
    ];
    let rows = rows.into_iter().flat_map(|r| [Family::V4, Family::V6].map(|family| Row { family, ..r.clone() }));
    ranged("expires", &[], rows.collect())
}

/// A point of time as RFC 3339 writes it.
pub(super) fn rfc3339(seconds: u64) -> String {
    // Civil from days (Howard Hinnant's algorithm); after 1970 nothing is negative.
    let (days, rest) = (seconds / 86400 + 719_468, seconds % 86400);
    let (era, doe) = (days / 146_097, days % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Lives,
    Stops,
    Dies,
}

fn expiry(stage: &mut Stage, shot: &Shot, then: Then, fresh: bool) -> Result<Outcome> {
    if !shot.enforced {
        return plain(stage, shot);
    }
    for _ in 0..TRIES {
        let mut acted = false;
        let result = expired(stage, shot, then, fresh, &mut acted);
        match then {
            Then::Stops if acted => stage.agent()?.signal(Signal::SIGCONT)?,
            Then::Dies if acted => stage.agent()?.launch()?,
            Then::Lives | Then::Stops | Then::Dies => {}
        }
        tidy(stage)?;
        let open = stage.policy.clone();
        stage.agent()?.reload(&open)?;
        if let Some(outcome) = result? {
            return Ok(outcome);
        }
    }
    bail!("{TRIES} revisions took more than half of the time in their own policies")
}

/// `None` = the revision took so long that nothing can be said. `acted` = the agent was stopped or killed.
fn expired(stage: &mut Stage, shot: &Shot, then: Then, fresh: bool, acted: &mut bool) -> Result<Option<Outcome>> {
    let pace = stage.agent()?.pace();
    let at = UNIX_EPOCH.elapsed()?.as_secs() + 2 + pace * 3;
    let end = UNIX_EPOCH + Duration::from_secs(at);
    let left = || end.duration_since(std::time::SystemTime::now()).unwrap_or_default();
    let limited = stage.policy.replace("action: allow", &format!("action: allow, expires: {}", rfc3339(at)));
    stage.agent()?.reload(&limited)?;
    let ends = connection(stage, &Shot { ms: 2000, ..*shot })?;
    let before = match &ends {
        Ok(ends) => says(stage, *ends, "before", 1000)?,
        Err(outcome) => outcome.clone(),
    };
    if left() < Duration::from_millis(500) {
        return Ok(None);
    }
    let Ok(ends) = ends else { bail!("not open before its time is over: {before:?}") };
    ensure!(before == Outcome::Open, "the connection does not work: {before:?}");
    match then {
        Then::Lives => {}
        Then::Stops => stage.agent()?.signal(Signal::SIGSTOP)?,
        Then::Dies => stage.agent()?.kill()?,
    }
    *acted = true;
    std::thread::sleep(left());
    pause(if then == Then::Lives { 500 * u64::from(crate::slowness()) } else { 20 });
    if fresh {
        let dst = stage.address(shot, "b");
        let cli = stage.actor("cli");
        let h = cli.must(&Cmd::Socket { domain: domain_of(dst.ip()), kind: libc::SOCK_STREAM, proto: 0 })?.h;
        // The listener still stands.
        return Ok(Some(cli.connect(h, dst, shot.ms)?.map_or_else(|e| refusal(&e), |()| Outcome::Open)));
    }
    says(stage, ends, "after", 700).map(Some)
}

fn expiry_cut(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    expiry(stage, shot, Then::Lives, false)
}
fn expiry_stopped(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    expiry(stage, shot, Then::Stops, false)
}
fn expiry_stopped_new(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    expiry(stage, shot, Then::Stops, true)
}
fn expiry_killed_new(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    expiry(stage, shot, Then::Dies, true)
}
fn expiry_killed(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    expiry(stage, shot, Then::Dies, false)
}

// ---- Kills, restarts and reloads under traffic. Rows run in order.

fn chaos() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).enforced("srv", &[]).segment("ext", &addresses(2), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{PORT}"));
    yaml.rule("never", crate::policy::APPLICATION, "ext", "srv", &format!("ports: [tcp/{}], action: deny", PORT + 1));
    let rows = vec![
        row("40-kills-under-traffic", kills, PORT, Expect::Open),
        row("50-reloads-under-traffic", reloads, PORT, Expect::Open),
        row("restart-adopts-links", adopts, PORT, Expect::Open),
        row("bad-revision-between-good-ones", bad_between, PORT, Expect::Open),
        row("policy-over-capacity-is-refused", over_capacity, PORT, Expect::Open),
        row("sighup-reloads", sighup, PORT, Expect::Open),
        row("agent-gone-enforcement-stays", gone, PORT, Expect::Open),
        tcp("denied-egress", OTHER, Expect::Eperm),
        Row {
            probe: Probe::Flow { ends: ("ext", "srv"), proto: crate::table::Proto::Tcp, to: Where::Net("b") },
            ..ingress(tcp("denied-ingress", OTHER, Expect::Silent))
        },
    ];
    let mut group = pair("kills-and-reloads", "managed/cli", "managed/srv", yaml.0, rows);
    group.nets.push(net("c"));
    group.actors.push(("ext", "outside/ext", "c"));
    group
}

/// Another policy that allows and denies the same.
fn variant(policy: &str, n: usize) -> String {
    let mut more = Yaml(policy.to_owned());
    let port = 6000 + n % 1000;
    more.allow("more", "cli", "srv", &format!("tcp/{port}"));
    more.0
}

/// How long the traffic goes on after the work.
const TRAFFIC_AFTER: Duration = Duration::from_secs(2);

/// `work` while an open connection talks without a pause and two clients try what is denied.
fn under_traffic(stage: &mut Stage, shot: &Shot, work: impl FnOnce(&mut Stage) -> Result<()>) -> Result<Outcome> {
    let dst = stage.address(shot, "b");
    let all = wildcard(dst.ip());
    let srv = stage.actor("srv");
    let listener = srv.listen_tcp(SocketAddr::new(all, shot.port))?;
    srv.must(&Cmd::Serve { h: listener })?;
    let _ = srv.listen_tcp(SocketAddr::new(all, OTHER))?;
    let cli = stage.actor("cli");
    let h = cli.must(&Cmd::Socket { domain: domain_of(dst.ip()), kind: libc::SOCK_STREAM, proto: 0 })?.h;
    or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
    cli.must(&Cmd::Chat { h })?;
    let denied = SocketAddr::new(dst.ip(), OTHER).to_string();
    if shot.enforced {
        cli.must(&Cmd::Retry { addr: denied.clone() })?;
        stage.actor("ext").must(&Cmd::Retry { addr: denied })?;
    }
    let worked = work(stage);
    // A revision is in force within milliseconds; the client that meets silence needs about two seconds for its attempts.
    std::thread::sleep(TRAFFIC_AFTER);
    let tally = |actor: &mut Actor| -> Result<Tally> { Ok(serde_json::from_str(&actor.must(&Cmd::Tally)?.data)?) };
    let (own, foreign) = (tally(stage.actor("cli"))?, tally(stage.actor("ext"))?);
    tidy(stage)?;
    worked?;
    if !own.broken.is_empty() {
        return Ok(Outcome::Cut(format!("{own:?}")));
    }
    ensure!(own.stood == 0 && foreign.stood == 0, "a denied connection stood: {own:?}, {foreign:?}");
    ensure!(own.answered > 50 / u64::from(crate::slowness()), "hardly any traffic: {own:?}");
    ensure!(!shot.enforced || (own.tried > 50 && foreign.tried > 10), "hardly any attempts: {own:?}, {foreign:?}");
    Ok(Outcome::Open)
}

fn links(agent: &Agent) -> Result<Vec<Value>> {
    let status = agent.status()?;
    let hooks = status["hooks"].as_array().context("hooks in the status")?;
    ensure!(!hooks.is_empty() && hooks.iter().all(|h| h["attached"] == true), "not attached: {hooks:?}");
    // The link to the event of new cgroups cannot be given another program: a new one takes its place before it goes.
    Ok(hooks.iter().filter(|h| h["name"] != "cgroup_made").map(|h| h["link"].clone()).collect())
}

fn quiet(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    under_traffic(stage, shot, |_| {
        pause(300);
        Ok(())
    })
}

fn kills(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if !shot.enforced {
        return quiet(stage, shot);
    }
    let before = links(stage.agent()?)?;
    let outcome = under_traffic(stage, shot, |stage| {
        let mut seed = UNIX_EPOCH.elapsed()?.subsec_nanos() | 1;
        let policy = stage.policy.clone();
        for n in 0..44 {
            // xorshift
            seed ^= seed << 13;
            seed ^= seed >> 17;
            seed ^= seed << 5;
            let agent = stage.agent()?;
            agent.write(&variant(&policy, n))?;
            pause(u64::from(seed % 350));
            agent.kill()?;
            agent.write(&variant(&policy, n + 500))?;
            agent.spawn()?;
        }
        let agent = stage.agent()?;
        agent.wait_until("enforces after the kills", |s| s["state"] == "ENFORCING")?;
        agent.reload(&policy)
    });
    let after = links(stage.agent()?)?;
    ensure!(before == after, "links changed: {before:?}, {after:?}");
    outcome
}

fn reloads(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if !shot.enforced {
        return quiet(stage, shot);
    }
    under_traffic(stage, shot, |stage| {
        let policy = stage.policy.clone();
        for n in 0..50 {
            let agent = stage.agent()?;
            let before = digest(&agent.status()?);
            agent.write(&variant(&policy, n))?;
            // At once, and again by the look at the folder.
            agent.signal(Signal::SIGHUP)?;
            agent.wait_until("took the revision", |s| s["state"] == "ENFORCING" && digest(s) != before)?;
        }
        stage.agent()?.reload(&policy)
    })
}

fn adopts(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if !shot.enforced {
        return quiet(stage, shot);
    }
    let before = links(stage.agent()?)?;
    let outcome = under_traffic(stage, shot, |stage| {
        for _ in 0..3 {
            stage.agent()?.stop()?;
            pause(100);
            stage.agent()?.launch()?;
        }
        Ok(())
    });
    let after = links(stage.agent()?)?;
    ensure!(before == after, "links changed: {before:?}, {after:?}");
    outcome
}

fn bad_between(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let unknown_key = "apiVersion: segfw.dev/v1\nkind: Segment\nmetadata: {name: x}\nspec: {selct: {}}\n".to_owned();
    refused_between(stage, shot, &[("kind: [unclosed".to_owned(), ""), (unknown_key, "selct")])
}

/// More rule entries than a generation holds: 1,100 identities that may go to 1,000 prefixes.
fn over_capacity(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let mut yaml = Yaml(stage.policy.clone());
    for i in 0..1100 {
        yaml.0 += &format!(
            "---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {{name: w{i}}}\nspec:\n  match: [{{cgroup: /nowhere/w{i}}}]\n  labels: {{app: many, n: w{i}}}\n"
        );
    }
    let prefixes: Vec<String> = (0..1000).map(|i| format!("10.{}.{}.0/24", 100 + i / 250, i % 250)).collect();
    yaml.segment("many", "select: {app: many}", &[]).segment(
        "far",
        &format!("addresses: [{}]", prefixes.join(", ")),
        &[],
    );
    yaml.allow("too-much", "many", "far", "tcp/443");
    refused_between(stage, shot, &[(yaml.0, "rule too-much/too-much"), (String::from("x"), "")])
}

/// Each of `bad` is refused with `word` among the reasons, and changes nothing.
fn refused_between(stage: &mut Stage, shot: &Shot, bad: &[(String, &str)]) -> Result<Outcome> {
    if !shot.enforced {
        return quiet(stage, shot);
    }
    under_traffic(stage, shot, |stage| {
        let policy = stage.policy.clone();
        let agent = stage.agent()?;
        let before = digest(&agent.status()?);
        ensure!(before.is_some(), "no digest");
        for (bad, word) in bad {
            agent.write(bad)?;
            agent.wait_until("is degraded by a bad revision", |s| s["state"] == "DEGRADED")?;
            let status = agent.status()?;
            ensure!(digest(&status) == before, "another revision is in force");
            let (reasons, refused) = (status["reasons"].to_string(), status["refused"].to_string());
            ensure!(reasons.contains("the newest revision was refused"), "no reason: {reasons}");
            ensure!(refused.contains(word), "no {word:?} in {refused}");
            let over = refused.contains("of 1048576 rule entries");
            ensure!(over == (bad.len() > 100_000), "capacity: {refused}");
            agent.write(&policy)?;
            agent.wait_until("enforces again", |s| s["state"] == "ENFORCING")?;
            ensure!(digest(&agent.status()?) == before, "the good revision has another digest");
        }
        Ok(())
    })
}

fn sighup(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if !shot.enforced {
        return quiet(stage, shot);
    }
    under_traffic(stage, shot, |stage| {
        let policy = stage.policy.clone();
        let agent = stage.agent()?;
        let before = digest(&agent.status()?);
        agent.write(&variant(&policy, 3))?;
        agent.signal(Signal::SIGHUP)?;
        agent.wait_until("took the revision", |s| digest(s) != before)?;
        agent.reload(&policy)
    })
}

fn gone(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if !shot.enforced {
        return quiet(stage, shot);
    }
    let outcome = under_traffic(stage, shot, |stage| {
        stage.agent()?.kill()?;
        pause(2000);
        Ok(())
    });
    let fresh = plain(stage, shot);
    stage.agent()?.launch()?;
    ensure!(matches!(fresh, Ok(Outcome::Open)), "an allowed flow does not start without the agent: {fresh:?}");
    outcome
}

// ---- The state folder.

fn disk() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", &[]).segment("cli", &addresses(0), &[]).allow("open", "cli", "srv", &format!("tcp/{PORT}"));
    let mut rows = Vec::new();
    for (kind, run) in [
        ("state-lost", state_lost as fn(&mut Stage, &Shot) -> _),
        ("state-corrupt", state_corrupt),
        ("state-full", state_full),
        ("state-read-only", state_read_only),
        ("state-folder-is-a-file", state_is_a_file),
    ] {
        rows.push(ingress(row(kind, run, PORT, Expect::Open)));
        rows.push(ingress(row(kind, run, OTHER, Expect::Silent)));
    }
    pair("state-folder", "outside/cli", "managed/srv", yaml.0, rows)
}

/// Breaks the folder while the agent is away, brings it back, looks, and mends.
fn broken_state(
    stage: &mut Stage,
    shot: &Shot,
    breaks: impl FnOnce(&Path) -> Result<()>,
    mends: impl FnOnce(&Path) -> Result<()>,
    trouble: &str,
) -> Result<Outcome> {
    if !shot.enforced {
        return plain(stage, shot);
    }
    let dir = stage.agent()?.state_dir();
    stage.agent()?.kill()?;
    let result = (|| {
        breaks(&dir)?;
        // The enforcement is there before the agent is.
        let without = plain(stage, shot)?;
        let agent = stage.agent()?;
        agent.spawn()?;
        agent.wait_until("is up", |s| s["state"] == "DEGRADED" || s["state"] == "ENFORCING")?;
        let status = agent.status()?;
        ensure!(status["state"] == "DEGRADED", "it says {} though the state folder is broken", status["state"]);
        ensure!(status.to_string().contains(trouble), "no {trouble:?} in {status}");
        let with = plain(stage, shot)?;
        ensure!(with == without, "{without:?} without the agent, {with:?} with it");
        Ok(with)
    })();
    stage.agent()?.kill()?;
    mends(&dir)?;
    let agent = stage.agent()?;
    agent.spawn()?;
    agent.wait_until("is up again", |s| s["state"] == "DEGRADED" || s["state"] == "ENFORCING")?;
    // It may have missed the state of the one before; what it writes now is whole.
    agent.kill()?;
    agent.launch()?;
    result
}

fn nothing(_: &Path) -> Result<()> {
    Ok(())
}

fn state_lost(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let lose = |dir: &Path| std::fs::remove_dir_all(dir).context("removing the state");
    broken_state(stage, shot, lose, nothing, "the state of the agent before this one is gone")
}

fn state_corrupt(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let corrupt = |dir: &Path| std::fs::write(dir.join("state.json"), "{\"maps\": 1, \"num").context("corrupting");
    broken_state(stage, shot, corrupt, nothing, "is damaged")
}

fn over(dir: &Path, readonly: bool) -> Result<()> {
    use nix::mount::{MsFlags, mount};
    let flags = if readonly { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some("size=1m")).context("mounting a tmpfs")?;
    if !readonly {
        let mut all = vec![0_u8; 1 << 20];
        // As much as goes in.
        while !all.is_empty() && std::fs::write(dir.join("ballast"), &all).is_err() {
            all.truncate(all.len() - 4096);
        }
    }
    Ok(())
}

fn bare(dir: &Path) -> Result<()> {
    nix::mount::umount2(dir, nix::mount::MntFlags::MNT_DETACH).context("unmounting the tmpfs")
}

fn state_full(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    broken_state(stage, shot, |dir| over(dir, false), bare, "the state cannot be written")
}

fn state_read_only(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    broken_state(stage, shot, |dir| over(dir, true), bare, "the state cannot be written")
}

fn state_is_a_file(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let breaks = |dir: &Path| {
        std::fs::remove_dir_all(dir)?;
        std::fs::write(dir, "no folder").context("putting a file there")
    };
    let mends = |dir: &Path| std::fs::remove_file(dir).context("removing the file");
    broken_state(stage, shot, breaks, mends, "the state cannot be written")
}

// ---- Too much to tell.

fn pressure() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).segment("srv", &addresses(1), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{PORT}, udp/1024-65535"));
    let rows = vec![
        row("ring-full", ring_full, PORT, Expect::Open),
        row("denials-are-all-told", denial_flood, OTHER, Expect::Eperm),
        tcp("allowed", PORT, Expect::Open),
        tcp("denied", OTHER, Expect::Eperm),
    ];
    pair("pressure", "managed/cli", "outside/srv", yaml.0, rows)
}

fn named(status: &Value, name: &str) -> Result<u64> {
    status["counters"]["named"][name].as_u64().with_context(|| format!("the counter {name}"))
}

/// Waits until no event is under way.
fn settled(agent: &Agent) -> Result<Value> {
    let mut last = agent.status()?;
    for _ in 0..40 {
        pause(1200);
        let now = agent.status()?;
        let same = ["events-sent", "history-records", "history-overwritten", "denials-aggregated"]
            .iter()
            .all(|n| now["counters"]["named"][n] == last["counters"]["named"][n]);
        if same && now["lost_events"] == last["lost_events"] {
            return Ok(now);
        }
        last = now;
    }
    bail!("events go on and on")
}

const FLOOD: u64 = 120_000;

fn ring_full(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if !shot.enforced {
        return plain(stage, shot);
    }
    let ip = stage.world.v4("b").to_string();
    let cpus = std::thread::available_parallelism()?.get();
    // One event from each CPU, so that the agent knows where each CPU's numbers stand.
    let each_cpu = |stage: &mut Stage, first: u16| -> Result<()> {
        for cpu in 0..cpus {
            let mut one = Actor::spawn(&stage.world, "one", "managed/cli", "a")?;
            if one.ask(&Cmd::Pin { cpu })?.ok {
                one.must(&Cmd::Datagrams { ip: ip.clone(), first, ports: 1, sockets: 1 })?;
            }
        }
        Ok(())
    };
    each_cpu(stage, 2000)?;
    let before = settled(stage.agent()?)?;
    stage.agent()?.signal(Signal::SIGSTOP)?;
    let flood = Cmd::Datagrams { ip: ip.clone(), first: 5000, ports: 60_000, sockets: 2 };
    let sent = stage.actor("cli").must(&flood)?;
    // The ring is full now. Verdicts do not depend on it.
    let allowed = plain(stage, shot);
    let denied = plain(stage, &Shot { port: OTHER, ms: 500, ..*shot });
    stage.agent()?.signal(Signal::SIGCONT)?;
    let allowed = allowed?;
    ensure!(sent.n == FLOOD as i64 && sent.data.is_empty(), "sent {} of {FLOOD}: {}", sent.n, sent.data);
    ensure!(denied? == Outcome::Eperm, "with a full ring a denied flow was not refused");
    stage.agent()?.wait_until("answers again", |_| true)?;
    pause(1000);
    each_cpu(stage, 2001)?;
    let after = settled(stage.agent()?)?;
    let grown = |name: &str| Ok::<_, anyhow::Error>(named(&after, name)? - named(&before, name)?);
    let (written, lost) = (grown("events-sent")?, grown("events-lost")?);
    let known = after["lost_events"].as_u64().context("lost_events")? - before["lost_events"].as_u64().unwrap_or(0);
    ensure!(lost > 10_000, "the ring was not full: {lost} lost, {written} written");
    ensure!(known == lost, "the agent knows of {known} lost events, the kernel of {lost}");
    let taken = grown("history-records")? + grown("history-overwritten")?;
    let gaps = stage.agent()?.flows()?.iter().filter(|r| r.get("lost").is_some()).count() as u64;
    ensure!(taken == written + gaps, "{taken} records of {written} events and {gaps} gaps");
    // One event per flow: 120,000 of the flood, one per CPU, an allowed and a denied TCP flow, the former's end.
    ensure!(written + lost >= FLOOD, "{written} written and {lost} lost of {FLOOD}");
    Ok(allowed)
}

fn denied(status: &Value) -> u64 {
    let list = status["counters"]["verdicts"].as_array().cloned().unwrap_or_default();
    list.iter().filter(|v| mentions(v, "DENIED")).filter_map(|v| v["count"].as_u64()).sum()
}

fn denial_flood(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    const EACH: u32 = 1_000;
    const ROUNDS: u32 = 60;
    if !shot.enforced {
        return plain(stage, shot);
    }
    // A fresh history: what was told before is not of interest.
    stage.agent()?.stop()?;
    stage.agent()?.launch()?;
    let before = settled(stage.agent()?)?;
    let told = |agent: &Agent| -> Result<u64> {
        let records = agent.flows()?;
        let of = records.iter().filter(|r| r["verdict"] == "DENIED");
        Ok(of.map(|r| r["count"].as_u64().unwrap_or(1)).sum())
    };
    let told_before = told(stage.agent()?)?;
    let addr = stage.address(shot, "b").to_string();
    let mut refused = 0;
    for _ in 0..ROUNDS {
        // Spread over some seconds, so that the agent fetches sums while they grow.
        let reply = stage.actor("cli").must(&Cmd::Connects { addr: addr.clone(), n: EACH })?;
        ensure!(reply.data.is_empty(), "one of the denied connects: {}", reply.data);
        refused += reply.n;
        pause(20);
    }
    ensure!(refused == i64::from(EACH * ROUNDS), "{refused} refused");
    let after = settled(stage.agent()?)?;
    let counted = denied(&after) - denied(&before);
    ensure!(counted == u64::from(EACH * ROUNDS), "the counter says {counted}");
    ensure!(named(&after, "denials-aggregated")? > named(&before, "denials-aggregated")?, "nothing was aggregated");
    ensure!(named(&after, "denials-uncounted")? == 0, "uncounted denials");
    let records = told(stage.agent()?)? - told_before;
    ensure!(records == counted, "records tell of {records} denials, the counter of {counted}");
    plain(stage, shot)
}

// ---- Cgroups come and go.

fn churn() -> Group {
    let mut yaml = Yaml::default();
    for (name, port) in [("even", PORT), ("odd", OTHER)] {
        yaml.0 += &format!(
            "---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {{name: {name}}}\nspec:\n  match: [{{cgroup: \"{}/churn/{name}-*\"}}]\n  labels: {{app: {name}}}\n",
            crate::policy::CGROUP
        );
        yaml.segment(name, &format!("select: {{app: {name}}}"), &[]);
        yaml.allow(&format!("{name}-may"), name, "srv", &format!("tcp/{port}"));
    }
    yaml.segment("srv", &addresses(1), &[]).enforced("cli", &[]).allow("cli-may", "cli", "srv", &format!("tcp/{PORT}"));
    let mut rows = vec![row("340-cgroups-come-and-go", come_and_go, PORT, Expect::Open)];
    rows.extend(families(&tcp("allowed-beside-the-churn", PORT, Expect::Open)));
    rows.extend(families(&tcp("denied-beside-the-churn", OTHER, Expect::Eperm)));
    let mut group = pair("cgroup-churn", "managed/cli", "outside/srv", yaml.0, rows);
    group.actors.push(("even", "managed/churn/even-0", "a"));
    group
}

fn folders(path: &Path) -> u64 {
    let inside = std::fs::read_dir(path).into_iter().flatten().flatten();
    1 + inside.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| folders(&e.path())).sum::<u64>()
}

fn come_and_go(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let rounds = if shot.enforced { 340 } else { 4 };
    let pace = Duration::from_millis(60);
    let base = stage.address(shot, "b");
    let all = wildcard(base.ip());
    let mut first_try = 0;
    for port in [PORT, OTHER] {
        let srv = stage.actor("srv");
        let h = srv.listen_tcp(SocketAddr::new(all, port))?;
        srv.must(&Cmd::Serve { h })?;
    }
    let start = Instant::now();
    let mut slowest = Duration::ZERO;
    for n in 0..rounds {
        let (kind, good, bad) = if n % 2 == 0 { ("even", PORT, OTHER) } else { ("odd", OTHER, PORT) };
        let path = format!("managed/churn/{kind}-{n}x");
        let mut short = Actor::spawn(&stage.world, "short", &path, "a")?;
        let born = Instant::now();
        let socket = Cmd::Socket { domain: domain_of(base.ip()), kind: libc::SOCK_STREAM, proto: 0 };
        let mut tries = 0;
        loop {
            // Denied before, while and after the labels become known.
            if shot.enforced {
                let h = short.must(&socket)?.h;
                let wrong = short.connect(h, SocketAddr::new(base.ip(), bad), 1000)?;
                ensure!(wrong.as_ref().is_err_and(|e| e == "EPERM"), "{path} to {bad}: {wrong:?}");
            }
            let h = short.must(&socket)?.h;
            let right = short.connect(h, SocketAddr::new(base.ip(), good), 3000)?;
            tries += 1;
            match right {
                Ok(()) => break,
                // Not known yet: a cgroup below a managed parent.
                Err(e) if e == "EPERM" && born.elapsed() < Duration::from_secs(2) * crate::slowness() => pause(5),
                Err(e) => bail!("{path} to {good}: {e} after {:?}", born.elapsed()),
            }
        }
        first_try += u32::from(tries == 1);
        slowest = slowest.max(born.elapsed());
        drop(short);
        let full = stage.world.cgroup(&path)?;
        let gone = Instant::now();
        while let Err(e) = std::fs::remove_dir(&full) {
            ensure!(gone.elapsed() < Duration::from_secs(2) * crate::slowness(), "removing {}: {e}", full.display());
            pause(1);
        }
        if shot.enforced {
            std::thread::sleep((pace * (n + 1)).saturating_sub(start.elapsed()));
        }
    }
    tidy(stage)?;
    if shot.enforced {
        eprintln!(
            "cgroup churn: {rounds} in {:?}, known at the first try {first_try}, slowest {slowest:?}",
            start.elapsed()
        );
        let mount = cgroup2_mount()?;
        let agent = stage.agent()?;
        agent.wait_until("knows the tree as it is", |status| {
            let maps = status["maps"].as_array().cloned().unwrap_or_default();
            let entries = maps.iter().find(|m| m["name"] == "CGROUPS").and_then(|m| m["entries"].as_u64());
            entries == Some(folders(&mount))
        })?;
        let workloads = agent.workloads()?;
        ensure!(!workloads.is_empty(), "no workloads at all");
        let stale = workloads.iter().find(|w| w["cgroup"].as_str().is_none_or(|path| path.ends_with('x')));
        ensure!(stale.is_none(), "a workload that is gone: {stale:?}");
    }
    Ok(Outcome::Open)
}
