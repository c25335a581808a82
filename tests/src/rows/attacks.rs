//! What an attacker inside a workload would try once connect and sendto are refused.

use super::faults::rfc3339;
use super::{addresses, flow, pair, tcp};
use crate::actor::{Actor, Handle, domain_of, wildcard};
use crate::or_outcome;
use crate::policy::Yaml;
use crate::proto::Cmd;
use crate::table::{
    ENDS, Expect, Family, Group, Outcome, Probe, Proto, Row, Shot, Stage, Where, arrives, exchange, no_socket, refusal,
};
use crate::world::net;
use anyhow::{Result, ensure};
use libc::c_int;
use nix::sys::signal::Signal;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

const OPEN: u16 = 4000;
const SHUT: u16 = 4100;
const AF_SMC: c_int = 43;
/// linux/tcp.h, linux/in.h, linux/in6.h: not in libc.
const TCP_REPAIR: c_int = 19;
const IPV6_ADDRFORM: c_int = 1;
const IPV6_FREEBIND: c_int = 78;
const IP_TRANSPARENT: c_int = 19;

type Try = fn(&mut Stage, &Shot) -> Result<Outcome>;

pub(super) fn groups() -> Vec<Group> {
    vec![egress(), ingress(), spoof(), claims(), source_routes()]
}

fn row(kind: &'static str, run: Try, port: u16, expect: Expect) -> Row {
    Row { probe: Probe::Custom(run), ..tcp(kind, port, expect) }
}

const TWO: &[Family] = &[Family::V4, Family::V6];

fn tidy(stage: &mut Stage, body: impl FnOnce(&mut Stage) -> Result<Outcome>) -> Result<Outcome> {
    let result = body(stage);
    for name in ["cli", "srv"] {
        stage.actor(name).ask(&Cmd::CloseAll)?;
    }
    result
}

fn to(stage: &Stage, shot: &Shot) -> SocketAddr {
    stage.address(shot, "b")
}

fn serve(stage: &mut Stage, shot: &Shot, kind: c_int, port: u16) -> Result<Handle> {
    let all = SocketAddr::new(wildcard(to(stage, shot).ip()), port);
    stage.actor("srv").listen(kind, 0, all, shot.family == Family::Mapped)
}

fn socket(stage: &mut Stage, who: &str, domain: c_int, kind: c_int) -> Result<Handle> {
    Ok(stage.actor(who).must(&Cmd::Socket { domain, kind, proto: 0 })?.h)
}

// ---- Judged at the source.

fn egress() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).segment("srv", &addresses(1), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{OPEN}, udp/{OPEN}, udp/4200-4299"));
    let mut rows = Vec::new();
    let ways: &[(&str, &str, &[Family], Try)] = &[
        ("tcp-disconnect-reconnect", "tcp", TWO, reconnect),
        ("tcp-repair", "tcp", TWO, repair),
        ("addrform-then-sendto", "udp", &[Family::Mapped], addrform_udp),
        ("addrform-then-reconnect", "tcp", &[Family::Mapped], addrform_tcp),
        ("pktinfo-then-sendmsg", "udp", TWO, pktinfo),
    ];
    for (kind, proto, families, run) in ways {
        for family in *families {
            for (port, expect) in [(OPEN, Expect::Open), (SHUT, Expect::Closed)] {
                rows.push(Row { family: *family, proto, ..row(kind, *run, port, expect) });
            }
        }
    }
    for (i, family) in TWO.iter().enumerate() {
        let port = 4200 + u16::try_from(i).unwrap_or(0);
        let made = row("udp-send-without-name-after-revocation", send_after_revocation, port, Expect::Cut);
        rows.push(Row { family: *family, proto: "udp", ..made });
    }
    let made = row("udp-send-after-expiry-agent-stopped", send_after_expiry, 4210, Expect::Closed);
    rows.push(Row { proto: "udp", ..made });
    pair("attacks-egress", "managed/cli", "outside/srv", yaml.0, rows)
}

/// A family that gate conn's list refuses to whom nothing is granted: its TCP is judged all the same. By itself, since a grant
/// attaches a hook per packet.
pub(super) fn other_family() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &["grants: [families]"]).segment("srv", &addresses(1), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{OPEN}"));
    let ports = [(OPEN, Expect::Open), (SHUT, Expect::Closed)];
    let rows =
        ports.map(|(port, expect)| Row { family: Family::V4, proto: "tcp", ..row("smc-over-tcp", smc, port, expect) });
    pair("attacks-family", "managed/cli", "outside/srv", yaml.0, rows.into())
}

fn reconnect(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let first = serve(stage, shot, libc::SOCK_STREAM, 4001)?;
        stage.actor("srv").close(first)?;
        let listener = serve(stage, shot, libc::SOCK_STREAM, shot.port)?;
        if shot.port != OPEN {
            let _ = serve(stage, shot, libc::SOCK_STREAM, OPEN)?;
        }
        let h = socket(stage, "cli", domain_of(dst.ip()), libc::SOCK_STREAM)?;
        let cli = stage.actor("cli");
        or_outcome!(cli.connect(h, SocketAddr::new(dst.ip(), OPEN), shot.ms)?, refusal);
        cli.must(&Cmd::Disconnect { h })?;
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        or_outcome!(cli.send(h, "ping")?, refusal);
        // At the open port the first connection waits there too, dead.
        for _ in 0..2 {
            let peer = or_outcome!(stage.actor("srv").accept(listener, shot.ms)?, refusal);
            if stage.actor("srv").recv(peer, shot.ms)?.is_ok_and(|got| got.data == "ping") {
                return Ok(Outcome::Open);
            }
        }
        Ok(Outcome::Silent)
    })
}

/// `TCP_REPAIR` (needs CAP_NET_ADMIN) makes a connection stand without a SYN. `connect` is called all the same.
fn repair(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let h = socket(stage, "cli", domain_of(dst.ip()), libc::SOCK_STREAM)?;
        let cli = stage.actor("cli");
        cli.option(h, libc::IPPROTO_TCP, TCP_REPAIR, 1)?;
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        Ok(Outcome::Open)
    })
}

/// An IPv6 socket with a mapped peer turns into an IPv4 one.
fn addrform_udp(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let v4 = SocketAddr::new(IpAddr::V4(stage.world.v4("b")), shot.port);
        let receiver = serve(stage, shot, libc::SOCK_DGRAM, shot.port)?;
        let h = socket(stage, "cli", libc::AF_INET6, libc::SOCK_DGRAM)?;
        let cli = stage.actor("cli");
        or_outcome!(cli.connect(h, SocketAddr::new(dst.ip(), OPEN), shot.ms)?, refusal);
        cli.option(h, libc::IPPROTO_IPV6, IPV6_ADDRFORM, libc::AF_INET)?;
        or_outcome!(cli.send_to(h, v4, "ping")?, refusal);
        let got = or_outcome!(stage.actor("srv").recv(receiver, shot.ms)?, refusal);
        Ok(if got.data == "ping" { Outcome::Open } else { Outcome::Other(got.data) })
    })
}

fn addrform_tcp(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let v4 = SocketAddr::new(IpAddr::V4(stage.world.v4("b")), shot.port);
        let _ = serve(stage, shot, libc::SOCK_STREAM, shot.port)?;
        if shot.port != OPEN {
            let _ = serve(stage, shot, libc::SOCK_STREAM, OPEN)?;
        }
        let h = socket(stage, "cli", libc::AF_INET6, libc::SOCK_STREAM)?;
        let cli = stage.actor("cli");
        or_outcome!(cli.connect(h, SocketAddr::new(dst.ip(), OPEN), shot.ms)?, refusal);
        cli.option(h, libc::IPPROTO_IPV6, IPV6_ADDRFORM, libc::AF_INET)?;
        cli.must(&Cmd::Disconnect { h })?;
        or_outcome!(cli.connect(h, v4, shot.ms)?, refusal);
        Ok(Outcome::Open)
    })
}

fn pktinfo(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let source = stage.address(shot, "a").ip().to_string();
        let receiver = serve(stage, shot, libc::SOCK_DGRAM, shot.port)?;
        let h = socket(stage, "cli", domain_of(dst.ip()), libc::SOCK_DGRAM)?;
        let cmd = Cmd::SendFrom { h, addr: dst.to_string(), source, data: "ping".to_owned() };
        or_outcome!(stage.actor("cli").attempt(&cmd)?, refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

/// Without RDMA an SMC socket speaks TCP, by a kernel socket of its own.
fn smc(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let listener = serve(stage, shot, libc::SOCK_STREAM, shot.port)?;
        let h = or_outcome!(stage.actor("cli").socket(AF_SMC, libc::SOCK_STREAM, 0)?, no_socket);
        or_outcome!(stage.actor("cli").connect(h, dst, shot.ms)?, refusal);
        exchange(stage, shot, ENDS, listener, h)
    })
}

/// A plain `send` meets no hook: the sweep must have ended the socket.
fn send_after_revocation(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let receiver = serve(stage, shot, libc::SOCK_DGRAM, shot.port)?;
        let h = socket(stage, "cli", domain_of(dst.ip()), libc::SOCK_DGRAM)?;
        or_outcome!(stage.actor("cli").connect(h, dst, shot.ms)?, refusal);
        or_outcome!(stage.actor("cli").send(h, "before")?, refusal);
        or_outcome!(stage.actor("srv").recv(receiver, 3000)?, refusal);
        if shot.enforced {
            let closed = stage.policy.replace("udp/4200-4299", "udp/4300");
            stage.agent()?.reload(&closed)?;
            std::thread::sleep(Duration::from_millis(300));
        }
        let sent = stage.actor("cli").send(h, "after")?;
        let again = stage.actor("cli").send(h, "after")?;
        let seen = stage.actor("srv").recv(receiver, shot.ms)?;
        if shot.enforced {
            let open = stage.policy.clone();
            stage.agent()?.reload(&open)?;
        }
        Ok(match (sent.and(again), seen) {
            (_, Ok(got)) if got.data == "after" => Outcome::Open,
            (Err(e), Err(_)) => Outcome::Cut(e),
            (Ok(()), Err(e)) => refusal(&e),
            (sent, seen) => Outcome::Other(format!("send {sent:?}, receive {seen:?}")),
        })
    })
}

/// A plain `send` meets no address hook, and nobody is there to end the socket: the egress hook, which is attached because
/// a rule has an end, refuses it.
fn send_after_expiry(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if shot.enforced {
        let at = std::time::UNIX_EPOCH.elapsed()?.as_secs() + 3;
        let limited = stage.policy.replace("action: allow", &format!("action: allow, expires: {}", rfc3339(at)));
        stage.agent()?.reload(&limited)?;
    }
    let outcome = tidy(stage, |stage| {
        let dst = to(stage, shot);
        let receiver = serve(stage, shot, libc::SOCK_DGRAM, shot.port)?;
        let h = socket(stage, "cli", domain_of(dst.ip()), libc::SOCK_DGRAM)?;
        or_outcome!(stage.actor("cli").connect(h, dst, shot.ms)?, refusal);
        or_outcome!(stage.actor("cli").send(h, "before")?, refusal);
        or_outcome!(stage.actor("srv").recv(receiver, 3000)?, refusal);
        if shot.enforced {
            stage.agent()?.signal(Signal::SIGSTOP)?;
            std::thread::sleep(Duration::from_millis(3500));
        }
        or_outcome!(stage.actor("cli").send(h, "after")?, refusal);
        let seen = or_outcome!(stage.actor("srv").recv(receiver, 500)?, refusal);
        if !shot.enforced {
            return Ok(Outcome::Open);
        }
        stage.agent()?.signal(Signal::SIGCONT)?;
        std::thread::sleep(Duration::from_millis(1000));
        let late = stage.actor("cli").send(h, "late")?;
        ensure!(late.is_err(), "the agent is back, and the socket still sends");
        Ok(if seen.data == "after" { Outcome::Open } else { Outcome::Other(seen.data) })
    });
    if shot.enforced {
        let _ = stage.agent()?.signal(Signal::SIGCONT);
        let open = stage.policy.clone();
        stage.agent()?.reload(&open)?;
    }
    outcome
}

// ---- Judged at the destination.

fn ingress() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", &[]).workload("free").segment("cli", &addresses(0), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{OPEN}"));
    yaml.allow("out", "srv", "cli", &format!("tcp/{OPEN}"));
    let mut rows = Vec::new();
    for family in TWO {
        for (port, expect) in [(OPEN, Expect::Open), (SHUT, Expect::Silent)] {
            for (kind, run) in
                [("listen-after-connect", listen_after_connect as Try), ("accept-after-move", accept_after_move)]
            {
                rows.push(Row { family: *family, direction: "ingress", ..row(kind, run, port, expect) });
            }
        }
        let listen = row("simultaneous-open", simultaneous, SHUT, Expect::Eperm);
        rows.push(Row { family: *family, ..listen });
        rows.push(Row { family: *family, ..row("simultaneous-open", simultaneous, OPEN, Expect::Open) });
    }
    pair("attacks-ingress", "outside/cli", "managed/srv", yaml.0, rows)
}

/// The socket of `srv` connects to where it may, is dissolved and listens: no verdict of its first life may count.
fn listen_after_connect(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (here, there) = (to(stage, shot), SocketAddr::new(stage.address(shot, "a").ip(), OPEN));
        stage.actor("cli").listen_tcp(SocketAddr::new(wildcard(there.ip()), OPEN))?;
        let h = socket(stage, "srv", domain_of(here.ip()), libc::SOCK_STREAM)?;
        let srv = stage.actor("srv");
        srv.option(h, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        srv.must(&Cmd::Bind { h, addr: SocketAddr::new(wildcard(here.ip()), shot.port).to_string() })?;
        or_outcome!(srv.connect(h, there, 3000)?, |e: &str| Outcome::Other(format!("the way out: {e}")));
        srv.must(&Cmd::Disconnect { h })?;
        // Disconnecting keeps a port that was bound.
        srv.must(&Cmd::Listen { h, backlog: 8 })?;
        let local = srv.must(&Cmd::LocalAddr { h })?.from;
        ensure!(local.ends_with(&format!(":{}", shot.port)), "it listens at {local}");
        let client = socket(stage, "cli", domain_of(here.ip()), libc::SOCK_STREAM)?;
        or_outcome!(stage.actor("cli").connect(client, here, shot.ms)?, refusal);
        exchange(stage, shot, ENDS, h, client)
    })
}

/// The listener's process leaves for a cgroup that no segment holds, and accepts there.
fn accept_after_move(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let mut mover = Actor::spawn(&stage.world, "mover", "managed/srv", "b")?;
    let dst = to(stage, shot);
    let listener = mover.listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    let path = stage.world.cgroup("managed/free")?.display().to_string();
    mover.must(&Cmd::MoveCgroup { path })?;
    tidy(stage, |stage| {
        let h = socket(stage, "cli", domain_of(dst.ip()), libc::SOCK_STREAM)?;
        let cli = stage.actor("cli");
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        or_outcome!(cli.send(h, "ping")?, refusal);
        let peer = or_outcome!(mover.accept(listener, shot.ms)?, refusal);
        let got = or_outcome!(mover.recv(peer, shot.ms)?, refusal);
        Ok(if got.data == "ping" { Outcome::Open } else { Outcome::Other(got.data) })
    })
}

/// Both ends connect, nobody listens. Their SYNs are made to cross: until both have sent one, each end takes the other
/// for somebody who is not there (a neighbour with a wrong address), and the kernels repeat them after a second.
fn simultaneous(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let here = SocketAddr::new(to(stage, shot).ip(), 4500 + u16::from(shot.enforced));
    let there = SocketAddr::new(stage.address(shot, "a").ip(), shot.port);
    let neighbours = [(stage.world.netns("a"), here.ip()), (stage.world.netns("b"), there.ip())];
    let ip = |action: &str, more: &[&str]| -> Result<()> {
        for (netns, addr) in &neighbours {
            let addr = addr.to_string();
            let status = std::process::Command::new("ip")
                .args(["-n", netns, "neigh", action, &addr, "dev", "eth0"])
                .args(more)
                .status()?;
            ensure!(status.success(), "ip neigh {action} {addr}");
        }
        Ok(())
    };
    tidy(stage, |stage| {
        let mut ends = Vec::new();
        for (who, own) in [("srv", here), ("cli", there)] {
            let h = socket(stage, who, domain_of(own.ip()), libc::SOCK_STREAM)?;
            let actor = stage.actor(who);
            actor.option(h, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
            let linger = vec![1, 0, 0, 0, 0, 0, 0, 0];
            actor.must(&Cmd::SetOpt { h, level: libc::SOL_SOCKET, name: libc::SO_LINGER, value: linger })?;
            actor.must(&Cmd::Bind { h, addr: own.to_string() })?;
            ends.push(h);
        }
        ip("replace", &["lladdr", "02:00:00:00:00:99", "nud", "permanent"])?;
        let called = (stage.actor("srv").connect(ends[0], there, 0)?, stage.actor("cli").connect(ends[1], here, 0)?);
        ip("del", &[])?;
        for tried in [called.0, called.1] {
            // Our own patience is none; the kernel goes on trying.
            if let Err(errno) = tried
                && errno != "ETIMEDOUT"
            {
                return Ok(refusal(&errno));
            }
        }
        std::thread::sleep(Duration::from_millis(2500));
        or_outcome!(stage.actor("cli").send(ends[1], "ping")?, refusal);
        let got = or_outcome!(stage.actor("srv").recv(ends[0], shot.ms)?, refusal);
        Ok(if got.data == "ping" { Outcome::Open } else { Outcome::Other(got.data) })
    })
}

// ---- A source address of somebody else on this host.

fn spoof() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).enforced("srv", &[]);
    yaml.enforced("thief", &["default: {ingress: deny, egress: allow}"]);
    yaml.allow("open", "cli", "srv", "tcp/4000, udp/4000");
    yaml.segment("remote", "addresses: [\"fd00:80::99/128\"]", &[]).allow("remote", "remote", "srv", "udp/4001");
    let mut rows = Vec::new();
    let remote = row("source-of-a-remote-host-freebind", spoof_remote, 4001, Expect::Documented);
    rows.push(Row { family: Family::V6, proto: "udp", direction: "ingress", ..remote });
    let ways: &[(&str, Family, Try)] = &[
        ("source-of-another-transparent", Family::V4, spoof_transparent),
        ("source-of-another-transparent", Family::V6, spoof_transparent),
        ("source-of-another-freebind", Family::V6, spoof_freebind),
        ("source-of-another-connected", Family::V6, spoof_connected),
        ("source-of-another-connected", Family::V4, spoof_connected),
        ("source-of-another-pktinfo", Family::V6, spoof_pktinfo),
        ("source-of-another-pktinfo", Family::V4, spoof_pktinfo),
    ];
    for (kind, family, run) in ways {
        let made = row(kind, *run, OPEN, Expect::Closed);
        rows.push(Row { family: *family, proto: "udp", direction: "ingress", ..made });
    }
    for family in TWO {
        for proto in [Proto::Tcp, Proto::UdpConnected, Proto::Udp] {
            for (who, kind, expect) in
                [("cli", "whose-address-it-is", Expect::Open), ("thief", "thief-under-its-own", Expect::Silent)]
            {
                let made = flow(kind, proto, OPEN, expect);
                let probe = Probe::Flow { ends: (who, "srv"), proto, to: Where::Net("b") };
                rows.push(Row { family: *family, direction: "ingress", probe, ..made });
            }
        }
    }
    let mut group = pair("spoofed-source", "managed/cli", "managed/srv", yaml.0, rows);
    group.nets.push(net("c"));
    group.actors.push(("thief", "managed/thief", "c"));
    group
}

/// How the thief names its source.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Name {
    Bind,
    BindConnect,
    Pktinfo,
}

/// What the thief does to its socket, and how it sends.
fn spoofed(stage: &mut Stage, shot: &Shot, option: (c_int, c_int), name: Name) -> Result<Outcome> {
    let source = stage.address(shot, "a").ip();
    spoofed_as(stage, shot, option, name, source)
}

fn spoofed_as(stage: &mut Stage, shot: &Shot, option: (c_int, c_int), name: Name, source: IpAddr) -> Result<Outcome> {
    let dst = to(stage, shot);
    let result = tidy(stage, |stage| {
        let receiver = serve(stage, shot, libc::SOCK_DGRAM, shot.port)?;
        let h = socket(stage, "thief", domain_of(dst.ip()), libc::SOCK_DGRAM)?;
        let thief = stage.actor("thief");
        thief.option(h, option.0, option.1, 1)?;
        if name == Name::Pktinfo {
            let cmd = Cmd::SendFrom { h, addr: dst.to_string(), source: source.to_string(), data: "stolen".to_owned() };
            or_outcome!(thief.attempt(&cmd)?, refusal);
        } else {
            or_outcome!(thief.attempt(&Cmd::Bind { h, addr: SocketAddr::new(source, 0).to_string() })?, refusal);
            if name == Name::BindConnect {
                or_outcome!(thief.connect(h, dst, shot.ms)?, refusal);
                or_outcome!(thief.send(h, "stolen")?, refusal);
            } else {
                or_outcome!(thief.send_to(h, dst, "stolen")?, refusal);
            }
        }
        let got = or_outcome!(stage.actor("srv").recv(receiver, shot.ms)?, refusal);
        Ok(if got.data == "stolen" { Outcome::Open } else { Outcome::Other(got.data) })
    });
    stage.actor("thief").ask(&Cmd::CloseAll)?;
    result
}

fn transparent(shot: &Shot) -> (c_int, c_int) {
    if shot.family == Family::V6 {
        (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT)
    } else {
        (libc::IPPROTO_IP, IP_TRANSPARENT)
    }
}

/// Needs CAP_NET_ADMIN.
fn spoof_transparent(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    spoofed(stage, shot, transparent(shot), Name::Bind)
}

/// IPv6 asks for no capability.
fn spoof_freebind(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    spoofed(stage, shot, (libc::IPPROTO_IPV6, IPV6_FREEBIND), Name::Bind)
}

/// Nobody on this host has the address, so nobody here can say whose it is.
fn spoof_remote(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    spoofed_as(stage, shot, (libc::IPPROTO_IPV6, IPV6_FREEBIND), Name::Bind, "fd00:80::99".parse()?)
}

/// The least that each family asks for.
fn least(shot: &Shot) -> (c_int, c_int) {
    if shot.family == Family::V6 { (libc::IPPROTO_IPV6, IPV6_FREEBIND) } else { transparent(shot) }
}

fn spoof_connected(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    spoofed(stage, shot, least(shot), Name::BindConnect)
}

fn spoof_pktinfo(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    spoofed(stage, shot, least(shot), Name::Pktinfo)
}

// ---- An address that a workload gives itself, in a namespace of its own.

fn claims() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).segment("srv", &addresses(1), &[]);
    yaml.allow("among-themselves", "cli", "cli", "tcp/1-65535, udp/1-65535");
    yaml.allow("open", "cli", "srv", &format!("tcp/{OPEN}"));
    let mut rows = Vec::new();
    for family in TWO {
        rows.push(Row { family: *family, ..tcp("before-the-claim", OPEN, Expect::Open) });
        rows.push(Row { family: *family, ..tcp("before-the-claim", SHUT, Expect::Eperm) });
    }
    for family in TWO {
        rows.push(Row { family: *family, ..row("peer-address-claimed-in-own-netns", claimed, SHUT, Expect::Eperm) });
        rows.push(Row { family: *family, ..row("peer-address-claimed-in-own-netns", claimed, OPEN, Expect::Open) });
    }
    pair("claimed-address", "managed/cli", "outside/srv", yaml.0, rows)
}

/// Any user may make a user namespace with a network namespace, and give `lo` there the address of the forbidden peer:
/// policy that lets the workload talk to its own kind must not let it talk to that peer.
fn claimed(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let dst = to(stage, shot);
    let mut claimant = Actor::spawn(&stage.world, "claimant", "managed/cli", "a")?;
    if let Err(errno) = claimant.attempt(&Cmd::UnshareUser)? {
        return Ok(Outcome::Missing(format!("user namespaces: {errno}")));
    }
    claimant.must(&Cmd::AddAddress { ip: dst.ip().to_string() })?;
    if shot.enforced {
        // A change of the tree brings the inventory forward.
        let path = stage.world.cgroup(&format!("managed/cli/c{}", shot.row))?;
        std::thread::sleep(Duration::from_millis(1500));
        std::fs::remove_dir(path)?;
    }
    tidy(stage, |stage| {
        let listener = serve(stage, shot, libc::SOCK_STREAM, shot.port)?;
        let h = socket(stage, "cli", domain_of(dst.ip()), libc::SOCK_STREAM)?;
        or_outcome!(stage.actor("cli").connect(h, dst, shot.ms)?, refusal);
        exchange(stage, shot, ENDS, listener, h)
    })
}

// ---- Routes that the sender writes into the packet.

fn source_routes() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).segment("far", &addresses(2), &[]);
    yaml.allow("open", "cli", "far", &format!("udp/{OPEN}"));
    let mut rows = Vec::new();
    for family in TWO {
        let made = row("source-route-by-way-of-a-forbidden-host", by_way_of, OPEN, Expect::Documented);
        rows.push(Row { family: *family, proto: "udp", ..made });
        let plain = |to, expect| {
            let probe = Probe::Flow {
                ends: ("cli", to),
                proto: Proto::Udp,
                to: Where::Net(if to == "far" { "c" } else { "b" }),
            };
            Row { family: *family, probe, ..flow("without-a-route", Proto::Udp, OPEN, expect) }
        };
        rows.extend([plain("far", Expect::Open), plain("srv", Expect::Eperm)]);
    }
    let mut group = pair("source-routes", "managed/cli", "outside/srv", yaml.0, rows);
    group.nets.push(net("c"));
    group.actors.push(("far", "outside/far", "c"));
    group
}

/// The datagram is for `far`, which is allowed, and its options send it to `srv` first, which is not. `srv` reads what
/// comes by on its link: it does not want to deliver, only to know.
fn by_way_of(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let (via, dst) = (to(stage, shot), stage.address(shot, "c"));
    tidy(stage, |stage| {
        let ethertype: u16 = if dst.is_ipv4() { 0x0800 } else { 0x86dd };
        let sniff = stage.actor("srv").must(&Cmd::Socket {
            domain: libc::AF_PACKET,
            kind: libc::SOCK_DGRAM,
            proto: c_int::from(ethertype.to_be()),
        })?;
        let h = socket(stage, "cli", domain_of(dst.ip()), libc::SOCK_DGRAM)?;
        let (level, name, value) = match via.ip() {
            IpAddr::V4(ip) => {
                // Loose source route: type, length, pointer, one hop; end of list.
                let mut value = vec![131, 7, 4];
                value.extend(ip.octets());
                value.push(0);
                (libc::IPPROTO_IP, libc::IP_OPTIONS, value)
            }
            IpAddr::V6(ip) => {
                // Segment routing header: two segments, the last of which the kernel fills in.
                let mut value = vec![0, 4, 4, 1, 1, 0, 0, 0];
                value.extend([0; 16]);
                value.extend(ip.octets());
                (libc::IPPROTO_IPV6, libc::IPV6_RTHDR, value)
            }
        };
        let cli = stage.actor("cli");
        or_outcome!(cli.attempt(&Cmd::SetOpt { h, level, name, value })?, refusal);
        or_outcome!(cli.send_to(h, dst, "by-a-long-way")?, refusal);
        for _ in 0..50 {
            let got = or_outcome!(stage.actor("srv").recv(sniff.h, shot.ms)?, refusal);
            if got.data.contains("by-a-long-way") {
                return Ok(Outcome::Open);
            }
        }
        Ok(Outcome::Silent)
    })
}
