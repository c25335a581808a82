//! Ways around a firewall. Each is tried at an allowed and at a denied port, judged at the source and judged at the
//! destination, and each is shown to work without segfw.

use super::{addresses, families, pair, tcp};
use crate::actor::{Handle, domain_of, wildcard};
use crate::or_outcome;
use crate::policy::Yaml;
use crate::proto::Cmd;
use crate::table::{
    ENDS, Expect, Family, Group, Outcome, Probe, Row, Shot, Stage, arrives, exchange, no_socket, refusal,
};
use anyhow::Result;
use libc::c_int;
use std::net::SocketAddr;

/// The one port that policy opens, and the port where nobody listens though it is open.
const OPEN: u16 = 4000;
const OPEN_SILENT: u16 = 4001;
/// Numbers that libc does not name.
const SOCK_DCCP: c_int = 6;
const IPPROTO_DCCP: c_int = 33;
const SOL_DCCP: c_int = 269;
const DCCP_SOCKOPT_SERVICE: c_int = 2;

type Try = fn(&mut Stage, &Shot) -> Result<Outcome>;

/// A way, and what it comes to where segfw judges.
struct Way {
    kind: &'static str,
    proto: &'static str,
    run: Try,
    families: &'static [Family],
    /// At the source, at the allowed port; `None` = the way has no ports that rules tell apart.
    allowed_egress: Option<Expect>,
    denied_egress: Expect,
    allowed_ingress: Option<Expect>,
    denied_ingress: Option<Expect>,
}

const ALL: &[Family] = &[Family::V4, Family::V6, Family::Mapped];
const TWO: &[Family] = &[Family::V4, Family::V6];
const FOUR: &[Family] = &[Family::V4];
const SIX: &[Family] = &[Family::V6];

/// An ordinary way: open at the open port, closed elsewhere.
const fn way(kind: &'static str, proto: &'static str, families: &'static [Family], run: Try) -> Way {
    Way {
        kind,
        proto,
        run,
        families,
        allowed_egress: Some(Expect::Open),
        denied_egress: Expect::Closed,
        allowed_ingress: Some(Expect::Open),
        denied_ingress: Some(Expect::Closed),
    }
}

/// A protocol that the workload was not granted: no socket, at whatever port.
const fn ungranted(kind: &'static str, proto: &'static str, families: &'static [Family], run: Try) -> Way {
    Way {
        allowed_egress: Some(Expect::NoSocket),
        denied_egress: Expect::NoSocket,
        allowed_ingress: Some(Expect::NoSocket),
        denied_ingress: Some(Expect::NoSocket),
        ..way(kind, proto, families, run)
    }
}

/// A socket that only the sender has: refused at the source; at the destination it is a datagram like any other.
const fn crafted(kind: &'static str, families: &'static [Family], run: Try) -> Way {
    Way { allowed_egress: Some(Expect::NoSocket), denied_egress: Expect::NoSocket, ..way(kind, "udp", families, run) }
}

const WAYS: &[Way] = &[
    way("tcp-bound-source-port", "tcp", ALL, bound_source),
    way("udp-reconnect", "udp", ALL, udp_reconnect),
    way("udp-connected-sendto-elsewhere", "udp", ALL, udp_connected_elsewhere),
    way("udp-disconnect-sendto", "udp", TWO, udp_disconnect),
    way("sendmmsg-second-datagram", "udp", ALL, sendmmsg),
    way("msg-fastopen", "tcp", ALL, fastopen),
    way("io-uring-connect", "tcp", ALL, uring_connect),
    way("io-uring-sendmsg", "udp", ALL, uring_send),
    way("io-uring-send-connected", "udp", TWO, uring_send_connected),
    way("data-on-handshake-ack", "tcp", TWO, ack_data),
    way("fragments", "udp", ALL, fragments),
    way("hop-by-hop-options", "udp", SIX, hop_by_hop),
    way("destination-options", "udp", SIX, destination_options),
    way("hop-by-hop-options-tcp", "tcp", SIX, hop_by_hop_tcp),
    way("destination-options-fragments", "udp", SIX, destination_fragments),
    way("ipv4-options", "udp", FOUR, ipv4_options),
    crafted("raw-hdrincl", FOUR, raw_v4),
    crafted("raw-ipv6-udp", SIX, raw_v6),
    Way { allowed_egress: None, denied_egress: Expect::Documented, ..way("packet-socket", "udp", FOUR, packet) },
    Way {
        allowed_egress: Some(Expect::NoSocket),
        denied_egress: Expect::NoSocket,
        // A TCP server answers, so at the destination it is TCP.
        ..way("mptcp", "tcp", TWO, mptcp)
    },
    ungranted("udplite", "udplite", TWO, udplite),
    ungranted("sctp-one-to-one", "sctp", TWO, sctp_stream),
    ungranted("sctp-one-to-many", "sctp", TWO, sctp_many),
    ungranted("dccp", "dccp", TWO, dccp),
    Way { allowed_egress: None, allowed_ingress: Some(Expect::Open), ..way("multicast", "udp", TWO, multicast) },
    Way { allowed_egress: None, ..way("broadcast", "udp", FOUR, broadcast) },
    Way {
        allowed_egress: None,
        denied_egress: Expect::NoSocket,
        allowed_ingress: None,
        denied_ingress: None,
        ..way("ping-socket", "icmp", TWO, ping_dgram)
    },
    Way {
        allowed_egress: None,
        denied_egress: Expect::NoSocket,
        allowed_ingress: None,
        denied_ingress: None,
        ..way("raw-icmp", "icmp", TWO, ping_raw)
    },
];

pub(super) fn groups() -> Vec<Group> {
    let mut groups = Vec::new();
    for (direction, cli, srv) in [("egress", "managed/cli", "outside/srv"), ("ingress", "outside/cli", "managed/srv")] {
        let mut yaml = Yaml::default();
        if direction == "egress" {
            yaml.enforced("cli", &[]).segment("srv", &addresses(1), &[]);
        } else {
            yaml.enforced("srv", &[]).segment("cli", &addresses(0), &[]);
        }
        yaml.allow("open", "cli", "srv", &format!("tcp/{OPEN}-{OPEN_SILENT}, udp/{OPEN}-{OPEN_SILENT}"));
        for half in [true, false] {
            let rows = rows(direction, half);
            let name = format!("bypass-{direction}-{}", if half { "ip" } else { "rare" });
            groups.push(Group {
                sysctls: vec![("ipv4/tcp_fastopen", "519")],
                ..pair(name, cli, srv, yaml.0.clone(), rows)
            });
        }
    }
    groups
}

fn rows(direction: &'static str, first_half: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for (i, way) in WAYS.iter().enumerate() {
        let plain = matches!(way.proto, "tcp" | "udp") && way.allowed_egress == Some(Expect::Open);
        if plain != first_half {
            continue;
        }
        let denied_port = 4100 + u16::try_from(i).unwrap_or(0);
        let (allowed, denied) = if direction == "egress" {
            (way.allowed_egress, Some(way.denied_egress))
        } else {
            (way.allowed_ingress, way.denied_ingress)
        };
        for family in way.families {
            for (port, expect) in [(OPEN, allowed), (denied_port, denied)] {
                if let Some(expect) = expect {
                    let row = Row::new(way.kind, port, Probe::Custom(way.run), expect);
                    rows.push(Row { family: *family, proto: way.proto, direction, ..row });
                }
            }
        }
    }
    for row in
        families(&Row { direction, proto: "udp", ..tcp("icmp-error-comes-through", OPEN_SILENT, Expect::Related) })
    {
        rows.push(Row { probe: Probe::Custom(related), baseline: Expect::Related, ..row });
    }
    // Neighbours that are plain, so that each group has both.
    for row in families(&Row { direction, ..tcp("plain-allowed", OPEN, Expect::Open) }) {
        rows.push(row);
    }
    for row in families(&Row { direction, ..tcp("plain-denied", 4099, Expect::Closed) }) {
        rows.push(row);
    }
    if !first_half && direction == "egress" {
        let vsock = Row::new("vsock-socket", 4098, Probe::Custom(vsock), Expect::Documented);
        rows.push(Row { family: Family::None, proto: "vsock", ..vsock });
    }
    rows
}

/// Closes what the body opened at both ends.
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

/// A socket of `srv` that waits at the port of the shot.
fn serve(stage: &mut Stage, shot: &Shot, kind: c_int) -> Result<Handle> {
    serve_at(stage, shot, kind, shot.port)
}

fn serve_at(stage: &mut Stage, shot: &Shot, kind: c_int, port: u16) -> Result<Handle> {
    let all = SocketAddr::new(wildcard(to(stage, shot).ip()), port);
    stage.actor("srv").listen(kind, 0, all, shot.family == Family::Mapped)
}

/// A UDP pair: the receiver at the port, the sender fresh.
fn udp_pair(stage: &mut Stage, shot: &Shot) -> Result<(Handle, Handle)> {
    let receiver = serve(stage, shot, libc::SOCK_DGRAM)?;
    let domain = domain_of(to(stage, shot).ip());
    let h = stage.actor("cli").must(&Cmd::Socket { domain, kind: libc::SOCK_DGRAM, proto: 0 })?.h;
    Ok((receiver, h))
}

fn tcp_pair(stage: &mut Stage, shot: &Shot) -> Result<(Handle, Handle)> {
    let listener = serve(stage, shot, libc::SOCK_STREAM)?;
    let domain = domain_of(to(stage, shot).ip());
    let h = stage.actor("cli").must(&Cmd::Socket { domain, kind: libc::SOCK_STREAM, proto: 0 })?.h;
    Ok((listener, h))
}

fn bound_source(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (listener, h) = tcp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        cli.option(h, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        // The open port as source must not open anything; another one in the next run, for TIME_WAIT.
        let port = if shot.enforced { OPEN } else { OPEN_SILENT };
        cli.must(&Cmd::Bind { h, addr: SocketAddr::new(wildcard(dst.ip()), port).to_string() })?;
        cli.must(&Cmd::SetOpt {
            h,
            level: libc::SOL_SOCKET,
            name: libc::SO_LINGER,
            value: vec![1, 0, 0, 0, 0, 0, 0, 0],
        })?;
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        exchange(stage, shot, ENDS, listener, h)
    })
}

fn udp_reconnect(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        or_outcome!(cli.connect(h, SocketAddr::new(dst.ip(), OPEN), shot.ms)?, refusal);
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        or_outcome!(cli.send(h, "ping")?, refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

fn udp_connected_elsewhere(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        or_outcome!(cli.connect(h, SocketAddr::new(dst.ip(), OPEN_SILENT), shot.ms)?, refusal);
        or_outcome!(cli.send_to(h, dst, "ping")?, refusal);
        // No way back: the sender's socket only hears its own peer.
        let got = or_outcome!(stage.actor("srv").recv(receiver, shot.ms)?, refusal);
        Ok(if got.data == "ping" { Outcome::Open } else { Outcome::Other(got.data) })
    })
}

fn udp_disconnect(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        or_outcome!(cli.connect(h, SocketAddr::new(dst.ip(), OPEN), shot.ms)?, refusal);
        cli.must(&Cmd::Disconnect { h })?;
        or_outcome!(cli.send_to(h, dst, "ping")?, refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

fn sendmmsg(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let first = SocketAddr::new(dst.ip(), OPEN_SILENT);
        let list = vec![(first.to_string(), "first".to_owned()), (dst.to_string(), "ping".to_owned())];
        or_outcome!(stage.actor("cli").attempt(&Cmd::SendMmsg { h, list })?, refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

fn fastopen(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (listener, h) = tcp_pair(stage, shot)?;
        let dst = to(stage, shot);
        stage.actor("srv").option(listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)?;
        let cmd =
            Cmd::SendTo { h, addr: dst.to_string(), data: "ping".to_owned(), flags: libc::MSG_FASTOPEN, ms: shot.ms };
        or_outcome!(stage.actor("cli").attempt(&cmd)?, refusal);
        let srv = stage.actor("srv");
        let peer = or_outcome!(srv.accept(listener, shot.ms)?, refusal);
        let got = or_outcome!(srv.recv(peer, shot.ms)?, refusal);
        Ok(if got.data == "ping" { Outcome::Open } else { Outcome::Other(got.data) })
    })
}

fn uring_connect(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (listener, h) = tcp_pair(stage, shot)?;
        let cmd = Cmd::UringConnect { h, addr: to(stage, shot).to_string(), ms: shot.ms };
        or_outcome!(stage.actor("cli").attempt(&cmd)?, uring_refusal);
        exchange(stage, shot, ENDS, listener, h)
    })
}

fn uring_send(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let addr = Some(to(stage, shot).to_string());
        or_outcome!(stage.actor("cli").attempt(&Cmd::UringSend { h, addr, data: "ping".to_owned() })?, uring_refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

fn uring_send_connected(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        let connect = Cmd::UringConnect { h, addr: dst.to_string(), ms: shot.ms };
        or_outcome!(cli.attempt(&connect)?, uring_refusal);
        or_outcome!(cli.attempt(&Cmd::UringSend { h, addr: None, data: "ping".to_owned() })?, uring_refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

/// Some machines switch io_uring off (`kernel.io_uring_disabled`).
fn uring_refusal(errno: &str) -> Outcome {
    if errno == "ENOSYS" { Outcome::Missing("io_uring".to_owned()) } else { refusal(errno) }
}

fn ack_data(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (listener, h) = tcp_pair(stage, shot)?;
        let dst = to(stage, shot);
        // Without quick ACKs the third packet of the handshake waits for the first data.
        stage.actor("cli").option(h, libc::IPPROTO_TCP, libc::TCP_QUICKACK, 0)?;
        or_outcome!(stage.actor("cli").connect(h, dst, shot.ms)?, refusal);
        exchange(stage, shot, ENDS, listener, h)
    })
}

fn fragments(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        or_outcome!(stage.actor("cli").send_to(h, dst, &"x".repeat(4000))?, refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

/// An options header of 8 bytes that holds only padding.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

fn with_header(stage: &mut Stage, shot: &Shot, name: c_int, data: &str) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        cli.must(&Cmd::SetOpt { h, level: libc::IPPROTO_IPV6, name, value: PADDING.to_vec() })?;
        or_outcome!(cli.send_to(h, dst, data)?, refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

fn hop_by_hop(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    with_header(stage, shot, libc::IPV6_HOPOPTS, "ping")
}

fn destination_options(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    with_header(stage, shot, libc::IPV6_DSTOPTS, "ping")
}

fn destination_fragments(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    with_header(stage, shot, libc::IPV6_DSTOPTS, &"x".repeat(4000))
}

fn hop_by_hop_tcp(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (listener, h) = tcp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        let name = libc::IPV6_HOPOPTS;
        cli.must(&Cmd::SetOpt { h, level: libc::IPPROTO_IPV6, name, value: PADDING.to_vec() })?;
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        exchange(stage, shot, ENDS, listener, h)
    })
}

fn ipv4_options(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        // Record route with room for three hops, then end of list.
        let mut value = vec![7, 15, 4];
        value.resize(16, 0);
        cli.must(&Cmd::SetOpt { h, level: libc::IPPROTO_IP, name: libc::IP_OPTIONS, value })?;
        or_outcome!(cli.send_to(h, dst, "ping")?, refusal);
        arrives(stage, shot, ENDS, receiver, h)
    })
}

/// A datagram made by hand, from an ordinary UDP port of the client, so that the answer finds its way.
fn by_hand(stage: &mut Stage, shot: &Shot, domain: c_int, proto: c_int) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, back) = udp_pair(stage, shot)?;
        let dst = to(stage, shot);
        let src = SocketAddr::new(stage.address(shot, "a").ip(), 4050);
        let cli = stage.actor("cli");
        cli.must(&Cmd::Bind { h: back, addr: src.to_string() })?;
        let h = or_outcome!(cli.socket(domain, libc::SOCK_RAW, proto)?, no_socket);
        let cmd = Cmd::RawUdp { h, src: src.to_string(), dst: dst.to_string(), data: "ping".to_owned() };
        or_outcome!(cli.attempt(&cmd)?, refusal);
        arrives(stage, shot, ENDS, receiver, back)
    })
}

fn raw_v4(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    by_hand(stage, shot, libc::AF_INET, libc::IPPROTO_RAW)
}

fn raw_v6(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    by_hand(stage, shot, libc::AF_INET6, libc::IPPROTO_UDP)
}

fn packet(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    by_hand(stage, shot, libc::AF_PACKET, 0)
}

fn vsock(stage: &mut Stage, _: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        or_outcome!(stage.actor("cli").socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?, no_socket);
        Ok(Outcome::Open)
    })
}

/// A protocol with sockets of its own at both ends.
fn rare(stage: &mut Stage, shot: &Shot, kind: c_int, proto: c_int, connect: bool) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let domain = domain_of(dst.ip());
        let srv = stage.actor("srv");
        let receiver = or_outcome!(srv.socket(domain, kind, proto)?, no_socket);
        if proto == IPPROTO_DCCP {
            srv.option(receiver, SOL_DCCP, DCCP_SOCKOPT_SERVICE, 1)?;
        }
        srv.must(&Cmd::Bind { h: receiver, addr: SocketAddr::new(wildcard(dst.ip()), shot.port).to_string() })?;
        if kind != libc::SOCK_DGRAM {
            srv.must(&Cmd::Listen { h: receiver, backlog: 8 })?;
        }
        let cli = stage.actor("cli");
        let h = or_outcome!(cli.socket(domain, kind, proto)?, no_socket);
        if proto == IPPROTO_DCCP {
            cli.option(h, SOL_DCCP, DCCP_SOCKOPT_SERVICE, 1)?;
        }
        if connect {
            or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
            or_outcome!(cli.send(h, "ping")?, refusal);
        } else {
            or_outcome!(cli.send_to(h, dst, "ping")?, refusal);
        }
        let srv = stage.actor("srv");
        let at = if connect && kind != libc::SOCK_DGRAM {
            or_outcome!(srv.accept(receiver, shot.ms)?, refusal)
        } else {
            receiver
        };
        let got = or_outcome!(srv.recv(at, shot.ms)?, refusal);
        Ok(if got.data == "ping" { Outcome::Open } else { Outcome::Other(got.data) })
    })
}

fn udplite(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    rare(stage, shot, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE, true)
}

fn sctp_stream(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    rare(stage, shot, libc::SOCK_STREAM, libc::IPPROTO_SCTP, true)
}

fn sctp_many(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    rare(stage, shot, libc::SOCK_SEQPACKET, libc::IPPROTO_SCTP, false)
}

fn dccp(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    rare(stage, shot, SOCK_DCCP, IPPROTO_DCCP, true)
}

fn mptcp(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let listener = serve(stage, shot, libc::SOCK_STREAM)?;
        let dst = to(stage, shot);
        let cli = stage.actor("cli");
        let h = or_outcome!(cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, libc::IPPROTO_MPTCP)?, no_socket);
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        exchange(stage, shot, ENDS, listener, h)
    })
}

/// One datagram to many: there is no answer to wait for.
fn to_many(stage: &mut Stage, shot: &Shot, dst: &str, join: Option<&str>) -> Result<Outcome> {
    tidy(stage, |stage| {
        let (receiver, h) = udp_pair(stage, shot)?;
        if let Some(group) = join {
            stage.actor("srv").must(&Cmd::Join { h: receiver, group: group.to_owned() })?;
        }
        let cli = stage.actor("cli");
        cli.option(h, libc::SOL_SOCKET, libc::SO_BROADCAST, 1)?;
        let dst = format!("{dst}:{}", shot.port).parse()?;
        or_outcome!(cli.send_to(h, dst, "ping")?, refusal);
        let got = or_outcome!(stage.actor("srv").recv(receiver, shot.ms)?, refusal);
        Ok(if got.data == "ping" { Outcome::Open } else { Outcome::Other(got.data) })
    })
}

fn multicast(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    if shot.family == Family::V6 {
        to_many(stage, shot, "[ff0e::5e6f]", Some("ff0e::5e6f"))
    } else {
        to_many(stage, shot, "239.80.1.1", Some("239.80.1.1"))
    }
}

fn broadcast(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    to_many(stage, shot, "10.80.255.255", None)
}

fn ping(stage: &mut Stage, shot: &Shot, kind: c_int) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = SocketAddr::new(to(stage, shot).ip(), 0);
        let proto = if dst.is_ipv4() { libc::IPPROTO_ICMP } else { libc::IPPROTO_ICMPV6 };
        let cli = stage.actor("cli");
        let h = or_outcome!(cli.socket(domain_of(dst.ip()), kind, proto)?, no_socket);
        or_outcome!(cli.attempt(&Cmd::Ping { h, addr: dst.to_string(), ms: shot.ms })?, refusal);
        Ok(Outcome::Open)
    })
}

pub(super) fn ping_dgram(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    ping(stage, shot, libc::SOCK_DGRAM)
}

pub(super) fn ping_raw(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    ping(stage, shot, libc::SOCK_RAW)
}

/// Nobody listens: the kernel there says so, and the sender must hear it.
fn related(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    tidy(stage, |stage| {
        let dst = to(stage, shot);
        let domain = domain_of(dst.ip());
        let cli = stage.actor("cli");
        let h = cli.must(&Cmd::Socket { domain, kind: libc::SOCK_DGRAM, proto: 0 })?.h;
        or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
        or_outcome!(cli.send(h, "ping")?, refusal);
        let got = or_outcome!(cli.recv(h, shot.ms)?, refusal);
        Ok(Outcome::Other(format!("an answer from a closed port: {}", got.data)))
    })
}
