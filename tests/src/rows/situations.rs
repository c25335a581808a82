//! Rows that need a situation of their own: whose defaults, whose mode, which socket came from where, what the agent
//! does meanwhile.

use super::bypass::{ping_dgram, ping_raw};
use super::{addresses, families, flow, pair, tcp};
use crate::actor::{Actor, domain_of, wildcard};
use crate::or_outcome;
use crate::policy::{Yaml, at};
use crate::proto::Cmd;
use crate::table::{
    ENDS, Ends, Expect, Family, Group, Outcome, Probe, Proto, Row, Shot, Stage, Where, exchange, refusal,
};
use crate::world::{Net, net};
use anyhow::Result;
use std::net::{Ipv4Addr, SocketAddr};

const PORT: u16 = 5000;
const OTHER: u16 = 5001;

pub(super) fn groups() -> Vec<Group> {
    vec![
        live("revoke-cut", "cut", revoke_is_cut, Expect::Cut),
        live("revoke-keep", "keep", revoke_is_kept, Expect::Open),
        faults(),
        listeners(),
        sockets(),
        reuseport(),
        syncookies(),
        icmp(),
        prefixes(),
        named_peers(),
        defaults(),
        monitor_segment(),
        monitor_host(),
        two_segments(),
    ]
}

/// The row as a flow between other actors.
fn between(ends: Ends, to: Where, row: Row) -> Row {
    let proto = match row.proto {
        "udp" => Proto::Udp,
        "udpc" => Proto::UdpConnected,
        _ => Proto::Tcp,
    };
    Row { probe: Probe::Flow { ends, proto, to }, ..row }
}

fn custom(run: fn(&mut Stage, &Shot) -> Result<Outcome>, row: Row) -> Row {
    Row { probe: Probe::Custom(run), ..row }
}

/// Both protocols of a row, in v4 and v6.
fn spread(row: &Row) -> Vec<Row> {
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        for proto in [Proto::Tcp, Proto::UdpConnected, Proto::Udp] {
            let probe = match row.probe {
                Probe::Flow { ends, to, .. } => Probe::Flow { ends, proto, to },
                custom @ Probe::Custom(_) => custom,
            };
            rows.push(Row { family, proto: proto.word(), probe, ..row.clone() });
        }
    }
    rows
}

fn ingress(row: Row) -> Row {
    Row { direction: "ingress", ..row }
}

fn outside_to_managed(name: &str, policy: &Yaml, rows: Vec<Row>) -> Group {
    pair(name, "outside/cli", "managed/srv", policy.0.clone(), rows)
}

fn managed_to_outside(name: &str, policy: &Yaml, rows: Vec<Row>) -> Group {
    pair(name, "managed/cli", "outside/srv", policy.0.clone(), rows)
}

// ---- A connection that lives while the policy changes.

fn live(name: &'static str, on_revoke: &str, run: fn(&mut Stage, &Shot) -> Result<Outcome>, expect: Expect) -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", &[&format!("onRevoke: {on_revoke}")]).segment("cli", &addresses(0), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{PORT}-{}", PORT + 20));
    let mut rows = Vec::new();
    for (i, family) in [Family::V4, Family::V6].into_iter().enumerate() {
        let port = PORT + 1 + u16::try_from(i).unwrap_or(0);
        rows.push(Row { family, ..ingress(custom(run, tcp(name, port, expect))) });
    }
    rows.extend(families(&ingress(tcp("allowed-again-after-the-change", PORT, Expect::Open))));
    rows.extend(families(&ingress(tcp("never-allowed", 4900, Expect::Silent))));
    outside_to_managed(name, &yaml, rows)
}

/// Opens a connection, forbids it, looks at it, allows it again.
fn after_revoke(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let dst = stage.address(shot, "b");
    let listener = stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    let cli = stage.actor("cli");
    let h = cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
    or_outcome!(cli.connect(h, dst, 3000)?, refusal);
    or_outcome!(stage.actor("cli").send(h, "before")?, refusal);
    let peer = or_outcome!(stage.actor("srv").accept(listener, 3000)?, refusal);
    or_outcome!(stage.actor("srv").recv(peer, 3000)?, refusal);
    if shot.enforced {
        let closed = stage.policy.replace("action: allow", "action: deny");
        stage.agent()?.reload(&closed)?;
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    // After the cut the first send may still go into the buffer; the answer of the other end is what counts.
    let sent = stage.actor("cli").send(h, "after")?;
    let seen = stage.actor("srv").recv(peer, shot.ms)?;
    let outcome = match (sent, seen) {
        (Ok(()), Ok(got)) if got.data == "after" => Outcome::Open,
        (_, Err(e)) if e.starts_with("ECONN") => Outcome::Cut(e),
        (Err(e), _) if e.starts_with("ECONN") || e == "EPIPE" => Outcome::Cut(e),
        (Ok(()), Err(e)) => refusal(&e),
        (sent, seen) => Outcome::Other(format!("send {sent:?}, receive {seen:?}")),
    };
    for name in ["cli", "srv"] {
        stage.actor(name).ask(&Cmd::CloseAll)?;
    }
    if shot.enforced {
        let open = stage.policy.clone();
        stage.agent()?.reload(&open)?;
    }
    Ok(outcome)
}

fn revoke_is_cut(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    after_revoke(stage, shot)
}

fn revoke_is_kept(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    after_revoke(stage, shot)
}

// ---- The agent is gone, or gets nonsense. The rows run in order; the last one brings it back.

fn faults() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", &[]).segment("cli", &addresses(0), &[]).allow("open", "cli", "srv", &format!("tcp/{PORT}"));
    let row = |kind, run, port, expect| ingress(custom(run, tcp(kind, port, expect)));
    let rows = vec![
        row("bad-policy-keeps-allow", bad_policy, PORT, Expect::Open),
        row("bad-policy-keeps-deny", bad_policy, OTHER, Expect::Silent),
        row("killed-keeps-allow", killed, PORT, Expect::Open),
        row("killed-keeps-deny", killed, OTHER, Expect::Silent),
        row("restarted-keeps-allow", restarted, PORT, Expect::Open),
        row("restarted-keeps-deny", restarted, OTHER, Expect::Silent),
        row("stopped-keeps-allow", stopped, PORT, Expect::Open),
        row("stopped-keeps-deny", stopped, OTHER, Expect::Silent),
        row("started-again-keeps-deny", restarted, OTHER, Expect::Silent),
    ];
    outside_to_managed("faults", &yaml, rows)
}

fn plain(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let result = plain_open(stage, shot);
    for name in ["cli", "srv"] {
        stage.actor(name).ask(&Cmd::CloseAll)?;
    }
    result
}

fn plain_open(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let dst = stage.address(shot, "b");
    let listener = stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    let cli = stage.actor("cli");
    let h = cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
    or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
    exchange(stage, shot, ENDS, listener, h)
}

fn bad_policy(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if shot.enforced {
        stage.agent()?.write("apiVersion: segfw.dev/v1\nkind: Nonsense\n")?;
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    let outcome = plain(stage, shot);
    if shot.enforced {
        let good = stage.policy.clone();
        stage.agent()?.write(&good)?;
    }
    outcome
}

fn killed(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if shot.enforced {
        stage.agent()?.kill()?;
    }
    plain(stage, shot)
}

fn stopped(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if shot.enforced {
        stage.agent()?.stop()?;
    }
    plain(stage, shot)
}

fn restarted(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if shot.enforced {
        stage.agent()?.kill()?;
        stage.agent()?.launch()?;
    }
    plain(stage, shot)
}

// ---- Listeners and connections that are older than the agent.

fn listeners() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", &[]).segment("cli", &addresses(0), &[]).allow(
        "open",
        "cli",
        "srv",
        &format!("tcp/{PORT}-{}", PORT + 9),
    );
    let mut rows = Vec::new();
    for (i, family) in [Family::V4, Family::V6].into_iter().enumerate() {
        let n = u16::try_from(i).unwrap_or(0);
        for (at, old, cut) in [(PORT, Expect::Open, Expect::Open), (PORT + 20, Expect::Silent, Expect::Cut)] {
            let listener = tcp("listener-older-than-agent", at + n, old);
            rows.push(Row { family, prepare: Some(make_listener), ..ingress(custom(old_listener, listener)) });
            let connection = tcp("connection-older-than-agent", at + 2 + n, cut);
            rows.push(Row { family, prepare: Some(make_connection), ..ingress(custom(old_connection, connection)) });
            let moved = tcp("listener-moved-in", at + 4 + n, Expect::Documented);
            rows.push(Row { family, ..ingress(custom(listener_moved, moved)) });
        }
    }
    outside_to_managed("older-than-agent", &yaml, rows)
}

fn make_listener(stage: &mut Stage, shot: &Shot) -> Result<()> {
    let dst = stage.address(shot, "b");
    let h = stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    stage.keep(shot, "listener", h);
    Ok(())
}

fn old_listener(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if !shot.enforced {
        return plain(stage, shot);
    }
    let dst = stage.address(shot, "b");
    let listener = stage.kept(shot, "listener").unwrap_or(0);
    let cli = stage.actor("cli");
    let h = cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
    or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
    exchange(stage, shot, ENDS, listener, h)
}

fn make_connection(stage: &mut Stage, shot: &Shot) -> Result<()> {
    let dst = stage.address(shot, "b");
    make_listener(stage, shot)?;
    let listener = stage.kept(shot, "listener").unwrap_or(0);
    let cli = stage.actor("cli");
    let h = cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
    cli.connect(h, dst, 3000)?.map_err(anyhow::Error::msg)?;
    let peer = stage.actor("srv").accept(listener, 3000)?.map_err(anyhow::Error::msg)?;
    stage.keep(shot, "client", h);
    stage.keep(shot, "peer", peer);
    Ok(())
}

fn old_connection(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if !shot.enforced {
        return plain(stage, shot);
    }
    let (h, peer) = (stage.kept(shot, "client").unwrap_or(0), stage.kept(shot, "peer").unwrap_or(0));
    let sent = stage.actor("cli").send(h, "ping")?;
    Ok(match (sent, stage.actor("srv").recv(peer, shot.ms)?) {
        (Ok(()), Ok(got)) if got.data == "ping" => Outcome::Open,
        (Err(e), _) | (_, Err(e)) if e.starts_with("ECONN") || e == "EPIPE" => Outcome::Cut(e),
        (Ok(()), Err(e)) => refusal(&e),
        (sent, seen) => Outcome::Other(format!("send {sent:?}, receive {seen:?}")),
    })
}

/// A listener made outside, whose process then enters the workload.
fn listener_moved(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let dst = stage.address(shot, "b");
    let mut mover = Actor::spawn(&stage.world, "mover", "outside/mover", "b")?;
    mover.listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    let path = stage.world.cgroup("managed/srv")?.display().to_string();
    mover.must(&Cmd::MoveCgroup { path })?;
    let cli = stage.actor("cli");
    let h = cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
    let tried = cli.connect(h, dst, 700)?;
    cli.close(h)?;
    Ok(tried.map_or_else(|e| refusal(&e), |()| Outcome::Open))
}

// ---- Where a socket comes from.

fn sockets() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).enforced("free", &[]).segment("srv", &addresses(1), &[]);
    yaml.allow("free-may", "free", "srv", &format!("tcp/{PORT}"));
    let row = |kind, run, expect| custom(run, tcp(kind, PORT, expect));
    let mut rows = Vec::new();
    for made in [
        Row { prepare: Some(make_socket), ..row("socket-older-than-agent", old_socket, Expect::Closed) },
        row("fd-passed-to-an-allowed-one", fd_to_free, Expect::Closed),
        row("fd-passed-by-an-allowed-one", fd_from_free, Expect::Documented),
        row("fd-passed-in-from-outside", fd_from_outside, Expect::Documented),
        row("process-moved-keeps-socket", moved_old_socket, Expect::Closed),
        row("process-moved-new-socket", moved_new_socket, Expect::Open),
        row("process-moved-into-denied", moved_into_denied, Expect::Closed),
        row("self-connect", self_connect, Expect::Open),
        row("loopback-within-workload", own_loopback, Expect::Open),
        row("own-netns-loopback", own_netns, Expect::Open),
    ] {
        rows.extend([Family::V4, Family::V6].map(|family| Row { family, ..made.clone() }));
    }
    rows.extend(families(&between(("free", "srv"), Where::Net("b"), tcp("free-allowed", PORT, Expect::Open))));
    rows.extend(families(&tcp("cli-denied", PORT, Expect::Eperm)));
    let mut group = managed_to_outside("origin-of-sockets", &yaml, rows);
    group.actors.push(("free", "managed/free", "a"));
    group.actors.push(("ext", "outside/ext", "a"));
    group
}

fn make_socket(stage: &mut Stage, shot: &Shot) -> Result<()> {
    let domain = domain_of(stage.address(shot, "b").ip());
    let h = stage.actor("cli").must(&Cmd::Socket { domain, kind: libc::SOCK_STREAM, proto: 0 })?.h;
    stage.keep(shot, "client", h);
    Ok(())
}

fn old_socket(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if stage.kept(shot, "client").is_none() {
        return plain(stage, shot);
    }
    let h = stage.kept(shot, "client").unwrap_or(0);
    let listener = server(stage, shot)?;
    let dst = stage.address(shot, "b");
    let tried = stage.actor("cli").connect(h, dst, shot.ms)?;
    stage.actor("srv").close(listener)?;
    Ok(tried.map_or_else(|e| refusal(&e), |()| Outcome::Open))
}

fn server(stage: &mut Stage, shot: &Shot) -> Result<u32> {
    let dst = stage.address(shot, "b");
    stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))
}

/// `maker` makes a socket, `user` gets it and connects.
fn passed(stage: &mut Stage, shot: &Shot, maker: &str, user: &str) -> Result<Outcome> {
    let listener = server(stage, shot)?;
    let dst = stage.address(shot, "b");
    let phase = if shot.enforced { "e" } else { "b" };
    let path = stage.world.folder().join(format!("fd{}{phase}", shot.row)).display().to_string();
    let domain = domain_of(dst.ip());
    let h = stage.actor(maker).must(&Cmd::Socket { domain, kind: libc::SOCK_STREAM, proto: 0 })?.h;
    let inbox = stage.actor(user).must(&Cmd::FdListen { path: path.clone() })?.h;
    stage.actor(maker).must(&Cmd::SendFd { h, path })?;
    let got = stage.actor(user).must(&Cmd::RecvFd { h: inbox, ms: 1000 })?.h;
    let tried = stage.actor(user).connect(got, dst, shot.ms)?;
    for name in [maker, user] {
        stage.actor(name).ask(&Cmd::CloseAll)?;
    }
    stage.actor("srv").close(listener)?;
    Ok(tried.map_or_else(|e| refusal(&e), |()| Outcome::Open))
}

fn fd_to_free(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    // Not `cli` itself, which keeps a socket for another row.
    with_temporary(stage, shot, "managed/cli", "free")
}

fn fd_from_free(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    passed(stage, shot, "free", "ext")
}

fn fd_from_outside(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let mut user = Actor::spawn(&stage.world, "user", "managed/cli", "a")?;
    let listener = server(stage, shot)?;
    let dst = stage.address(shot, "b");
    let tried = hand_over(stage, shot, "ext", &mut user, dst)?;
    stage.actor("srv").close(listener)?;
    Ok(tried)
}

fn hand_over(stage: &mut Stage, shot: &Shot, maker: &str, user: &mut Actor, dst: SocketAddr) -> Result<Outcome> {
    let phase = if shot.enforced { "e" } else { "b" };
    let path = stage.world.folder().join(format!("fd{}{phase}", shot.row)).display().to_string();
    let domain = domain_of(dst.ip());
    let h = stage.actor(maker).must(&Cmd::Socket { domain, kind: libc::SOCK_STREAM, proto: 0 })?.h;
    let inbox = user.must(&Cmd::FdListen { path: path.clone() })?.h;
    stage.actor(maker).must(&Cmd::SendFd { h, path })?;
    let got = user.must(&Cmd::RecvFd { h: inbox, ms: 1000 })?.h;
    stage.actor(maker).close(h)?;
    Ok(user.connect(got, dst, shot.ms)?.map_or_else(|e| refusal(&e), |()| Outcome::Open))
}

/// A temporary actor in `cgroup` makes the socket, `user` connects it.
fn with_temporary(stage: &mut Stage, shot: &Shot, cgroup: &str, user: &str) -> Result<Outcome> {
    let mut maker = Actor::spawn(&stage.world, "maker", cgroup, "a")?;
    let listener = server(stage, shot)?;
    let dst = stage.address(shot, "b");
    let phase = if shot.enforced { "e" } else { "b" };
    let path = stage.world.folder().join(format!("fd{}{phase}", shot.row)).display().to_string();
    let domain = domain_of(dst.ip());
    let h = maker.must(&Cmd::Socket { domain, kind: libc::SOCK_STREAM, proto: 0 })?.h;
    let inbox = stage.actor(user).must(&Cmd::FdListen { path: path.clone() })?.h;
    maker.must(&Cmd::SendFd { h, path })?;
    let got = stage.actor(user).must(&Cmd::RecvFd { h: inbox, ms: 1000 })?.h;
    let tried = stage.actor(user).connect(got, dst, shot.ms)?;
    stage.actor(user).ask(&Cmd::CloseAll)?;
    stage.actor("srv").close(listener)?;
    Ok(tried.map_or_else(|e| refusal(&e), |()| Outcome::Open))
}

/// A process that makes a socket in one cgroup, or after it went to another one, and connects there.
fn moved(stage: &mut Stage, shot: &Shot, from: &str, to: &str, before: bool) -> Result<Outcome> {
    let mut mover = Actor::spawn(&stage.world, "mover", from, "a")?;
    let listener = server(stage, shot)?;
    let dst = stage.address(shot, "b");
    let socket = Cmd::Socket { domain: domain_of(dst.ip()), kind: libc::SOCK_STREAM, proto: 0 };
    let path = stage.world.cgroup(to)?.display().to_string();
    let h = if before {
        let h = mover.must(&socket)?.h;
        mover.must(&Cmd::MoveCgroup { path })?;
        h
    } else {
        mover.must(&Cmd::MoveCgroup { path })?;
        mover.must(&socket)?.h
    };
    let tried = mover.connect(h, dst, shot.ms)?;
    stage.actor("srv").close(listener)?;
    Ok(tried.map_or_else(|e| refusal(&e), |()| Outcome::Open))
}

fn moved_old_socket(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    moved(stage, shot, "managed/cli", "managed/free", true)
}

fn moved_new_socket(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    moved(stage, shot, "managed/cli", "managed/free", false)
}

fn moved_into_denied(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    moved(stage, shot, "managed/free", "managed/cli", false)
}

/// A TCP socket that connects to itself: simultaneous open, no listener.
/// Over loopback, where a workload may talk to itself: the socket meets itself on its own port.
fn self_connect(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let mut own = Actor::spawn(&stage.world, "self", "managed/cli", "a")?;
    let ip = if shot.family == Family::V6 { "::1".parse()? } else { Ipv4Addr::LOCALHOST.into() };
    let addr = SocketAddr::new(ip, shot.port + if shot.enforced { 1 } else { 2 });
    let domain = domain_of(addr.ip());
    let h = own.must(&Cmd::Socket { domain, kind: libc::SOCK_STREAM, proto: 0 })?.h;
    own.must(&Cmd::Bind { h, addr: addr.to_string() })?;
    or_outcome!(own.connect(h, addr, shot.ms)?, refusal);
    or_outcome!(own.send(h, "me")?, refusal);
    let got = or_outcome!(own.recv(h, shot.ms)?, refusal);
    Ok(if got.data == "me" { Outcome::Open } else { Outcome::Other(got.data) })
}

fn loopback(own: &mut Actor, shot: &Shot) -> Result<Outcome> {
    let ip = if shot.family == Family::V6 { "::1".parse()? } else { Ipv4Addr::LOCALHOST.into() };
    let addr = SocketAddr::new(ip, shot.port);
    let listener = own.listen_tcp(addr)?;
    let h = own.must(&Cmd::Socket { domain: domain_of(ip), kind: libc::SOCK_STREAM, proto: 0 })?.h;
    or_outcome!(own.connect(h, addr, shot.ms)?, refusal);
    let peer = or_outcome!(own.accept(listener, shot.ms)?, refusal);
    or_outcome!(own.send(h, "ping")?, refusal);
    let got = or_outcome!(own.recv(peer, shot.ms)?, refusal);
    Ok(if got.data == "ping" { Outcome::Open } else { Outcome::Other(got.data) })
}

fn own_loopback(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let mut own = Actor::spawn(&stage.world, "own", "managed/cli", "a")?;
    loopback(&mut own, shot)
}

fn own_netns(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let mut own = Actor::spawn(&stage.world, "own", "managed/cli", "a")?;
    own.must(&Cmd::Unshare)?;
    loopback(&mut own, shot)
}

// ---- One port, two listeners, two identities.

fn reuseport() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", &[]).enforced("thief", &[]).segment("cli", &addresses(0), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{PORT}"));
    let rows = [Family::V4, Family::V6]
        .into_iter()
        .flat_map(|family| {
            [
                custom(thief_gets, tcp("reuseport-thief", PORT, Expect::Closed)),
                custom(owner_gets, tcp("reuseport-owner", PORT, Expect::Open)),
            ]
            .map(|row| Row { family, ..ingress(row) })
        })
        .collect();
    let mut group = outside_to_managed("reuseport", &yaml, rows);
    group.actors.push(("thief", "managed/thief", "b"));
    group
}

/// Whether `who` gets one of many connections to a shared port.
fn shared_port(stage: &mut Stage, shot: &Shot, who: &str) -> Result<Outcome> {
    let dst = stage.address(shot, "b");
    let all = SocketAddr::new(wildcard(dst.ip()), shot.port).to_string();
    let mut listeners = Vec::new();
    for name in ["srv", "thief"] {
        let actor = stage.actor(name);
        let h = actor.must(&Cmd::Socket { domain: domain_of(dst.ip()), kind: libc::SOCK_STREAM, proto: 0 })?.h;
        actor.option(h, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        actor.option(h, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        actor.must(&Cmd::Bind { h, addr: all.clone() })?;
        actor.must(&Cmd::Listen { h, backlog: 64 })?;
        listeners.push((name, h));
    }
    let mut got = false;
    for _ in 0..24 {
        let cli = stage.actor("cli");
        let h = cli.must(&Cmd::Socket { domain: domain_of(dst.ip()), kind: libc::SOCK_STREAM, proto: 0 })?.h;
        let _ = cli.connect(h, dst, 60)?;
        cli.close(h)?;
        let listener = listeners.iter().find(|l| l.0 == who).map_or(0, |l| l.1);
        if stage.actor(who).accept(listener, 5)?.is_ok() {
            got = true;
            break;
        }
    }
    for name in ["cli", "srv", "thief"] {
        stage.actor(name).ask(&Cmd::CloseAll)?;
    }
    Ok(if got { Outcome::Open } else { Outcome::Silent })
}

fn thief_gets(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    shared_port(stage, shot, "thief")
}

fn owner_gets(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    shared_port(stage, shot, "srv")
}

fn syncookies() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", &[]).segment("cli", &addresses(0), &[]).allow("open", "cli", "srv", &format!("tcp/{PORT}"));
    let mut rows: Vec<Row> = families(&ingress(tcp("syn-cookies-allowed", PORT, Expect::Open))).collect();
    rows.extend(families(&ingress(tcp("syn-cookies-denied", OTHER, Expect::Silent))));
    Group { sysctls: vec![("ipv4/tcp_syncookies", "2")], ..outside_to_managed("syn-cookies", &yaml, rows) }
}

// ---- ICMP, judged at the source.

fn icmp() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).segment("srv", &addresses(1), &[]);
    yaml.allow("may-ping", "cli", "srv", "icmp/echo-request, icmpv6/echo-request");
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        for (kind, run) in
            [("ping-socket-granted", ping_dgram as fn(&mut Stage, &Shot) -> _), ("raw-icmp-granted", ping_raw)]
        {
            rows.push(Row { family, proto: "icmp", ..custom(run, tcp(kind, 0, Expect::Open)) });
        }
        rows.push(Row { family, proto: "icmp", ..custom(ping_elsewhere, tcp("ping-elsewhere", 0, Expect::Closed)) });
        rows.push(Row { family, ..tcp("tcp-beside-ping", PORT, Expect::Eperm) });
    }
    let mut group = managed_to_outside("icmp", &yaml, rows);
    group.nets.push(net("c"));
    group
}

fn ping_elsewhere(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let dst = SocketAddr::new(stage.address(shot, "c").ip(), 0);
    let proto = if dst.is_ipv4() { libc::IPPROTO_ICMP } else { libc::IPPROTO_ICMPV6 };
    let cli = stage.actor("cli");
    let h = or_outcome!(cli.socket(domain_of(dst.ip()), libc::SOCK_DGRAM, proto)?, crate::table::no_socket);
    let tried = cli.attempt(&Cmd::Ping { h, addr: dst.to_string(), ms: shot.ms })?;
    cli.close(h)?;
    Ok(tried.map_or_else(|e| refusal(&e), |_| Outcome::Open))
}

// ---- Overlapping prefixes.

const NEAR: [Ipv4Addr; 3] = [Ipv4Addr::new(10, 80, 5, 1), Ipv4Addr::new(10, 80, 5, 9), Ipv4Addr::new(10, 80, 6, 1)];
static NETS: [Net; 2] = [net("a"), Net { name: "b", extra: &NEAR }];

fn prefixes() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]);
    yaml.segment("wide", "addresses: [10.80.0.0/16, fd00:80::/64]", &[]);
    yaml.segment("middle", "addresses: [10.80.5.0/24, \"fd00:80::105:0/112\"]", &[]);
    yaml.segment("one", "addresses: [10.80.5.9/32, \"fd00:80::105:9/128\"]", &[]);
    let ports = |n: u16| format!("ports: [tcp/{n}, udp/{n}]");
    // 5000: the wide prefix denies after the middle one allows; the single address is denied first of all.
    yaml.rule("wide-deny", at("application", 300), "cli", "wide", &format!("{}, action: deny", ports(PORT)));
    yaml.rule("middle-allow", at("application", 200), "cli", "middle", &format!("{}, action: allow", ports(PORT)));
    yaml.rule("one-deny", at("application", 100), "cli", "one", &format!("{}, action: deny", ports(PORT)));
    // 5001: the wide prefix allows; what lies inside has that rule too.
    yaml.rule("wide-allow", at("application", 300), "cli", "wide", &format!("{}, action: allow", ports(OTHER)));
    let row =
        |kind, to, port, expect| Row { evidence: "prefix", ..between(ENDS, Where::Extra(to), tcp(kind, port, expect)) };
    let mut rows = Vec::new();
    for made in [
        row("prefix-middle-allows", NEAR[0], PORT, Expect::Open),
        row("prefix-one-denies", NEAR[1], PORT, Expect::Eperm),
        row("prefix-wide-denies", NEAR[2], PORT, Expect::Eperm),
        row("prefix-middle-inherits", NEAR[0], OTHER, Expect::Open),
        row("prefix-one-inherits", NEAR[1], OTHER, Expect::Open),
        row("prefix-wide-allows", NEAR[2], OTHER, Expect::Open),
    ] {
        rows.extend(spread(&made));
    }
    Group { nets: NETS.to_vec(), ..managed_to_outside("prefixes", &yaml, rows) }
}

// ---- any, world, host.

fn named_peers() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).enforced("srv", &[]);
    yaml.allow("to-world", "cli", "world", "tcp/5000, udp/5000");
    yaml.allow("from-host", "host", "srv", "tcp/5010, udp/5010");
    yaml.allow("from-world", "world", "srv", "tcp/5020, udp/5020");
    yaml.allow("from-any", "any", "srv", "tcp/5030, udp/5030");
    let mut rows = Vec::new();
    for (ends, to, made) in [
        (("cli", "ext"), "c", tcp("world-allowed", 5000, Expect::Open)),
        (("cli", "ext"), "c", tcp("world-denied", 5001, Expect::Eperm)),
        (("cli", "srv"), "b", tcp("a-workload-is-not-world", 5000, Expect::Closed)),
        (("host", "srv"), "b", ingress(tcp("host-allowed", 5010, Expect::Open))),
        (("host", "srv"), "b", ingress(tcp("host-denied", 5011, Expect::Silent))),
        (("ext", "srv"), "b", ingress(tcp("world-is-not-host", 5010, Expect::Silent))),
        (("ext", "srv"), "b", ingress(tcp("from-world-allowed", 5020, Expect::Open))),
        (("host", "srv"), "b", ingress(tcp("host-is-not-world", 5020, Expect::Silent))),
        (("host", "srv"), "b", ingress(tcp("any-host", 5030, Expect::Open))),
        (("ext", "srv"), "b", ingress(tcp("any-world", 5030, Expect::Open))),
    ] {
        rows.extend(spread(&between(ends, Where::Net(to), made)));
    }
    // Documented: a connected UDP socket that never bound a port shows it to no hook on its way out, and here the
    // address tells nobody either. It counts as unresolved until the next inventory finds the socket.
    let limit = "connected-udp-from-a-shared-namespace-is-unresolved-until-the-inventory";
    for family in [Family::V4, Family::V6] {
        for (proto, expect) in
            [(Proto::UdpConnected, Expect::Silent), (Proto::Udp, Expect::Open), (Proto::Tcp, Expect::Open)]
        {
            let kind = if expect == Expect::Silent { limit } else { "the-same-where-the-port-is-known" };
            let row = Row { family, ..ingress(flow(kind, proto, 5010, expect)) };
            rows.push(between(("mate", "srv"), Where::Net("b"), row));
        }
    }
    Group {
        nets: vec![net("a"), net("b"), net("c"), net("d")],
        actors: vec![
            ("cli", "managed/cli", "a"),
            ("mate", "managed/plain", "a"),
            ("srv", "managed/srv", "b"),
            ("host", "managed/plain", "d"),
            ("ext", "outside/ext", "c"),
        ],
        ..pair("named-peers", "", "", yaml.0, rows)
    }
}

// ---- Defaults and no segment at all.

fn defaults() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &["default: {ingress: deny, egress: allow}"]).segment("srv", &addresses(1), &[]);
    yaml.workload("free");
    yaml.rule("not-there", at("application", 100), "cli", "srv", "ports: [tcp/5001, udp/5001], action: deny");
    let mut rows = spread(&tcp("default-allow", PORT, Expect::Open));
    rows.extend(spread(&tcp("deny-over-default-allow", OTHER, Expect::Eperm)));
    rows.extend(spread(&between(("free", "srv"), Where::Net("b"), tcp("in-no-segment", OTHER, Expect::Open))));
    let mut group = managed_to_outside("defaults", &yaml, rows);
    group.actors.push(("free", "managed/free", "a"));
    group
}

fn two_segments() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &["default: {ingress: deny, egress: allow}"]).segment("srv", &addresses(1), &[]);
    yaml.segment("strict", "select: {app: cli}", &[]);
    yaml.allow("strict-may", "strict", "srv", "tcp/5000, udp/5000");
    yaml.allow("cli-may", "cli", "srv", "tcp/5002, udp/5002");
    let mut rows = spread(&tcp("rule-of-one-segment", PORT, Expect::Open));
    rows.extend(spread(&tcp("rule-of-the-other", 5002, Expect::Open)));
    rows.extend(spread(&tcp("stricter-default", OTHER, Expect::Eperm)));
    managed_to_outside("two-segments", &yaml, rows)
}

// ---- Monitor mode.

fn monitored(name: &'static str, mode: &'static str, watched: &[&str]) -> (Yaml, Vec<Row>) {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", watched).enforced("strict", &[]).segment("srv", &addresses(1), &[]);
    yaml.rule("no", at("application", 100), "cli, strict", "srv", "ports: [tcp/5001, udp/5001], action: deny");
    let mut rows = Vec::new();
    for made in [tcp("deny-is-only-watched", OTHER, Expect::Open), tcp("default-is-only-watched", PORT, Expect::Open)] {
        rows.extend(spread(&Row { mode, ..made }));
    }
    let _ = name;
    (yaml, rows)
}

fn monitor_segment() -> Group {
    let (yaml, mut rows) = monitored("monitor-segment", "monitor-segment", &["mode: monitor"]);
    rows.extend(spread(&between(
        ("strict", "srv"),
        Where::Net("b"),
        tcp("neighbour-is-enforced", OTHER, Expect::Eperm),
    )));
    let mut group = managed_to_outside("monitor-segment", &yaml, rows);
    group.actors.push(("strict", "managed/strict", "a"));
    group
}

/// The whole host only watches, until it is told otherwise: then the same rows close.
fn monitor_host() -> Group {
    let (yaml, mut rows) = monitored("monitor-host", "monitor-host", &[]);
    let row = flow("enforced-after-monitor", Proto::Tcp, OTHER, Expect::Eperm);
    rows.push(custom(leave_monitor, row));
    Group { agent_args: vec!["--monitor".into()], ..managed_to_outside("monitor-host", &yaml, rows) }
}

fn leave_monitor(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if shot.enforced {
        let policy = stage.policy.clone();
        stage.agent()?.stop()?;
        stage.agent = None;
        stage.agent = Some(crate::agent::Agent::start(&stage.world, &policy, &[])?);
    }
    plain(stage, shot)
}
