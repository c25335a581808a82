//! Packets by hand through the outer wall (XDP) and through the receiving hook, by `BPF_PROG_TEST_RUN`. Without a context
//! the kernel runs an XDP program as if the frame came in on the loopback device, whose index is 1.

use crate::frames::*;
use crate::memory::{Known, Memory, boot_ns};
use crate::{Options, Tally};
use anyhow::{Result, bail, ensure};
use segfw::datapath::Datapath;
use segfw::datapath::load::Features;
use segfw::host::netns::current_cookie;
use segfw::policy::Tables;
use segfw::policy::compile::testing::{labels, rule, segment};
use segfw::policy::compile::{Clock, compile};
use segfw::policy::host_policy::HostPolicy;
use segfw::policy::tables::Numbers;
use segfw_common::decide::endpoint;
use segfw_common::event::Counter;
use segfw_common::packet::{self, Packet};
use segfw_common::rule::ipproto;
use segfw_common::{
    AddressEntry, CgroupEntry, Decision, Direction, EndpointKey, Flow, FlowKey, FlowValue, Identity, LocalEntry,
    Lookup, OriginKey, Party, Proto, decide, identify,
};
use segfw_tests::scratch::{Scratch, cgroup_id, own_cgroup};

const LOOPBACK: u32 = 1;
/// Cookie of the interface's namespace, as far as the tables say.
const NETNS: u64 = 7;
/// The kernel's answers.
const DROP: u32 = 1;
const PASS: u32 = 2;

/// What the outer wall has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wall {
    Passes,
    Drops,
}
use Wall::{Drops, Passes};

struct Row {
    name: String,
    frame: Vec<u8>,
    expect: Wall,
}

// This host, and who may talk to it.
const HERE: &str = "10.80.0.1";
const HERE6: &str = "fd00:80::1";
const FRIEND: &str = "10.1.2.3";
const FRIEND6: &str = "2001:db8::5";
const STRANGER: &str = "10.9.9.9";
const STRANGER6: &str = "2a00::9";
const REJECTED: &str = "10.2.0.1";
const REJECTED6: &str = "2001:db8:bad::1";

struct Scene {
    tables: Tables,
    known: Known,
    flows: Vec<(FlowKey, FlowValue)>,
    db: Identity,
    watched: Identity,
    /// Cookie of the namespace in which the kernel makes its test sockets, as far as the hook can tell.
    here: u64,
}

impl Scene {
    fn new() -> Result<Self> {
        let mut policy = HostPolicy::default();
        for (name, select) in [("db", "app=db"), ("watched", "app=watched"), ("web", "app=web")] {
            policy.segments.push(segment(name, select));
        }
        policy.segments[1].monitor = true;
        for text in [
            "deny 10.1.66.0/24 -> db tcp/80",
            "reject 10.2.0.0/16,2001:db8:bad::/48 -> db tcp/80 udp/53",
            "allow 10.1.0.0/16,2001:db8::/32 -> db tcp/80 tcp/443 udp/53",
            "allow 10.3.0.0/16 -> db tcp/80 require=origin",
            "allow web -> db tcp/80",
            "allow 10.4.0.0/16 -> db tcp/80 until=2020-01-01T00:00:00Z",
        ] {
            rule(&mut policy, text);
        }
        let local = [labels("app=db"), labels("app=watched"), labels("app=free")];
        let mut numbers = Numbers::default();
        let clock = Clock { wall: "2026-11-02T09:00:00Z".parse().expect("a time"), boot_ns: boot_ns() };
        let tables = compile(&policy, &local, &[labels("app=web")], &mut numbers, clock).expect("compiles");
        let [db, watched, free, web] =
            ["app=db", "app=watched", "app=free", "app=web"].map(|t| numbers.labels(&labels(t)));

        let mut known = Known::default();
        let mut listen = |addr: &str, protocol: u16, port: u16, owner: Identity| {
            let key = EndpointKey { netns: NETNS, addr: addr.parse().expect("an address"), port, protocol, pad: 0 };
            let _ = known.endpoints.insert(key, Party { identity: owner.0, workload: 1 });
        };
        listen("::", ipproto::TCP, 80, db);
        listen(HERE, ipproto::TCP, 443, db);
        listen(HERE6, ipproto::TCP, 443, db);
        listen("0.0.0.0", ipproto::TCP, 8443, db);
        listen("0.0.0.0", ipproto::TCP, 8080, watched);
        listen("::", ipproto::TCP, 9090, free);
        listen("::", ipproto::TCP, 7070, Identity::UNRESOLVED);
        listen("::", ipproto::UDP, 53, db);
        listen("0.0.0.0", ipproto::UDP, 68, db);
        listen("::", ipproto::UDP, 5300, watched);
        listen("::", ipproto::SCTP, 5000, db);
        for (addr, netns) in [(HERE, NETNS), (HERE6, NETNS), ("10.80.0.2", NETNS), ("10.80.0.9", 0), ("10.80.0.10", 8)]
        {
            let entry = AddressEntry { netns, as_destination: Identity::HOST.0, as_source: Identity::UNRESOLVED.0 };
            let _ = known.addresses.insert(addr.parse().expect("an address"), entry);
        }
        let origin = OriginKey {
            netns: 0,
            client: STRANGER.parse().expect("an address"),
            server: HERE.parse().expect("an address"),
            client_port: 1111,
            server_port: 80,
            pad: 0,
        };
        let _ = known.origins.insert(origin, Party { identity: web.0, workload: 2 });
        let flow = |netns, port, idle: u64| {
            let remote = STRANGER.parse().expect("an address");
            let key = FlowKey { netns, remote, remote_port: port, local_port: 53, protocol: ipproto::UDP, pad: 0 };
            let seen = boot_ns().wrapping_sub(idle * 1_000_000_000);
            (key, FlowValue { seen, generation: 1, local: db.0, direction: 1, ..FlowValue::default() })
        };
        let here = if Features::probe().skb_netns { current_cookie()? } else { 0 };
        let flows = vec![flow(NETNS, 2222, 0), flow(here, 2222, 0), flow(NETNS, 3333, 200), flow(here, 3333, 200)];
        Ok(Self { tables, known, flows, db, watched, here })
    }

    /// What the owner of the listener would say of a packet, if there is one.
    fn judged(&self, p: &Packet) -> Option<(Flow, Decision)> {
        let memory = Memory::new(&self.tables, &self.known, 0);
        let owner = endpoint(&memory, NETNS, &p.destination, p.protocol, p.destination_port)?;
        let flow = Flow {
            direction: Direction::Ingress,
            protocol: p.protocol,
            local: Identity(owner.identity),
            workload: owner.workload,
            netns: NETNS,
            local_addr: p.destination,
            remote_addr: p.source,
            local_port: p.destination_port,
            remote_port: p.source_port,
        };
        let peer = identify(&memory, &flow);
        Some((flow, decide(&memory, &flow, &peer)))
    }

    /// What the receiving hook has to say to a socket of `local`.
    fn socket_passes(&self, ip: &[u8], local: Identity) -> bool {
        let memory = Memory::new(&self.tables, &self.known, 0);
        let Ok(p) = packet::parse(ip, 0) else {
            return memory.local(local).is_none_or(|l| l.flags & LocalEntry::MONITOR != 0);
        };
        let reply = match p.protocol {
            ipproto::ICMP => matches!(p.destination_port >> 8, 0 | 3 | 11 | 12),
            ipproto::ICMPV6 => matches!(p.destination_port >> 8, 1..=4 | 129),
            _ => false,
        };
        let live = self.flows.iter().any(|(key, value)| {
            key.netns == self.here
                && key.remote == p.source
                && (key.remote_port, key.local_port, key.protocol) == (p.source_port, p.destination_port, p.protocol)
                && value.local == local.0
                && boot_ns().wrapping_sub(value.seen) < 100_000_000_000
        });
        let flow = Flow {
            direction: Direction::Ingress,
            protocol: p.protocol,
            local,
            workload: 1,
            netns: self.here,
            local_addr: p.destination,
            remote_addr: p.source,
            local_port: p.destination_port,
            remote_port: p.source_port,
        };
        reply || live || decide(&memory, &flow, &identify(&memory, &flow)).passes()
    }
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |name: &str, expect: Wall, frame: Vec<u8>| rows.push(Row { name: name.to_owned(), frame, expect });
    let syn = |port| tcp(1000, port, SYN);

    // TCP, both families.
    row("SYN of a friend", Passes, v4(FRIEND, HERE, TCP, &syn(80)));
    row("SYN of a stranger", Drops, v4(STRANGER, HERE, TCP, &syn(80)));
    row("SYN of a friend, IPv6", Passes, v6(FRIEND6, HERE6, TCP, &syn(80)));
    row("SYN of a stranger, IPv6", Drops, v6(STRANGER6, HERE6, TCP, &syn(80)));
    row("SYN of a friend to a bound address", Passes, v4(FRIEND, HERE, TCP, &syn(443)));
    row("SYN of a stranger to a bound address", Drops, v4(STRANGER, HERE, TCP, &syn(443)));
    row("SYN of a stranger to a bound address, IPv6", Drops, v6(STRANGER6, HERE6, TCP, &syn(443)));
    row("SYN to the port of a listener on another address", Passes, v4(STRANGER, "10.80.0.2", TCP, &syn(443)));
    row("SYN to an IPv4 wildcard", Drops, v4(FRIEND, HERE, TCP, &syn(8443)));
    row("SYN over IPv6 to an IPv4 wildcard: nobody is there", Passes, v6(FRIEND6, HERE6, TCP, &syn(8443)));
    row("SYN from a denied part of an allowed prefix", Drops, v4("10.1.66.7", HERE, TCP, &syn(80)));
    row("SYN with too little evidence", Drops, v4("10.3.0.1", HERE, TCP, &syn(80)));
    row("SYN under a rule whose time is over", Drops, v4("10.4.0.1", HERE, TCP, &syn(80)));
    row("SYN of a connection whose origin is allowed", Passes, v4(STRANGER, HERE, TCP, &tcp(1111, 80, SYN)));
    row("SYN to an unknown listener", Passes, v4(STRANGER, HERE, TCP, &syn(22)));
    row("SYN to a port that several owners share", Passes, v4(STRANGER, HERE, TCP, &syn(7070)));
    row("SYN to a listener in no segment", Passes, v4(STRANGER, HERE, TCP, &syn(9090)));
    row("SYN to a listener in monitor mode", Passes, v4(STRANGER, HERE, TCP, &syn(8080)));
    row("SYN that a rule rejects: the socket answers", Passes, v4(REJECTED, HERE, TCP, &syn(80)));
    row("SYN that a rule rejects, IPv6", Passes, v6(REJECTED6, HERE6, TCP, &syn(80)));
    row("SYN from this host's own address", Drops, v4("10.80.0.2", HERE, TCP, &syn(80)));
    row("port 0", Passes, v4(STRANGER, HERE, TCP, &syn(0)));
    row("port 65535", Passes, v4(STRANGER, HERE, TCP, &syn(65535)));

    // Where the address is not this namespace's, the frame may be on its way to somebody else.
    row("SYN to be forwarded", Passes, v4(STRANGER, "10.77.0.1", TCP, &syn(80)));
    row("SYN to be forwarded, IPv6", Passes, v6(STRANGER6, "2a00:77::1", TCP, &syn(80)));
    row("SYN to an address of another namespace", Passes, v4(STRANGER, "10.80.0.10", TCP, &syn(80)));
    row("SYN to an address that two namespaces have", Passes, v4(STRANGER, "10.80.0.9", TCP, &syn(80)));
    row("datagram to be forwarded", Passes, v4(STRANGER, "10.77.0.1", UDP, &udp(9, 53)));

    // Flags.
    for (name, flags, expect) in [
        ("SYN|ACK", SYN | ACK, Passes),
        ("ACK of an established connection", ACK, Passes),
        ("PSH|ACK", ACK | 8, Passes),
        ("FIN|ACK", ACK | Packet::FIN, Passes),
        ("RST", Packet::RST, Passes),
        ("SYN|RST", SYN | Packet::RST, Passes),
        ("no flag", 0, Passes),
        ("every flag", 0xff, Passes),
        ("SYN|FIN", SYN | Packet::FIN, Drops),
        ("SYN|ECE|CWR", SYN | 0xc0, Drops),
    ] {
        row(&format!("{name}, of a stranger"), expect, v4(STRANGER, HERE, TCP, &tcp(1000, 80, flags)));
        row(&format!("{name}, of a stranger, IPv6"), expect, v6(STRANGER6, HERE6, TCP, &tcp(1000, 80, flags)));
    }

    // UDP.
    row("datagram of a friend", Passes, v4(FRIEND, HERE, UDP, &udp(9, 53)));
    row("datagram of a stranger", Drops, v4(STRANGER, HERE, UDP, &udp(9, 53)));
    row("datagram of a friend, IPv6", Passes, v6(FRIEND6, HERE6, UDP, &udp(9, 53)));
    row("datagram of a stranger, IPv6", Drops, v6(STRANGER6, HERE6, UDP, &udp(9, 53)));
    row("datagram in a live flow", Passes, v4(STRANGER, HERE, UDP, &udp(2222, 53)));
    row("datagram in a flow that was idle for too long", Drops, v4(STRANGER, HERE, UDP, &udp(3333, 53)));
    row("datagram beside a live flow", Drops, v4(STRANGER, HERE, UDP, &udp(2223, 53)));
    row("datagram that a rule rejects", Passes, v4(REJECTED, HERE, UDP, &udp(9, 53)));
    row("datagram to an unknown socket", Passes, v4(STRANGER, HERE, UDP, &udp(9, 5353)));
    row("datagram to a socket in monitor mode", Passes, v4(STRANGER, HERE, UDP, &udp(9, 5300)));
    row(
        "datagram from this host's own address: the socket's to judge",
        Passes,
        v4("10.80.0.2", HERE, UDP, &udp(9, 53)),
    );
    row("DHCP", Passes, v4(STRANGER, HERE, UDP, &udp(67, 68)));
    row("almost DHCP", Drops, v4(STRANGER, HERE, UDP, &udp(66, 68)));
    row("datagram to a port on which only TCP listens", Passes, v4(STRANGER, HERE, UDP, &udp(9, 80)));

    // Below IP.
    let denied = v4(STRANGER, HERE, TCP, &syn(80));
    let denied6 = v6(STRANGER6, HERE6, TCP, &syn(80));
    row("VLAN", Drops, tagged(&denied, &[0x8100]));
    row("VLAN of a friend", Passes, tagged(&v4(FRIEND, HERE, TCP, &syn(80)), &[0x8100]));
    row("VLAN, IPv6", Drops, tagged(&denied6, &[0x8100]));
    row("QinQ", Drops, tagged(&denied, &[0x88a8, 0x8100]));
    row("QinQ, IPv6", Drops, tagged(&denied6, &[0x88a8, 0x8100]));
    row("three VLAN tags", Passes, tagged(&denied, &[0x8100, 0x8100, 0x8100]));
    row("three VLAN tags, IPv6", Passes, tagged(&denied6, &[0x88a8, 0x8100, 0x8100]));
    row("the old QinQ type", Passes, tagged(&denied, &[0x9100, 0x8100]));
    row(
        "ARP",
        Passes,
        ethernet(0x0806, &[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 9, 9, 9, 0, 0, 0, 0, 0, 0, 10, 80, 0, 1]),
    );
    row("unknown type", Passes, ethernet(0x88b5, &denied[14..]));
    row("802.3 length instead of a type", Passes, ethernet(60, &denied[14..]));
    row("nothing behind the Ethernet header", Passes, ethernet(0x0800, &[]));
    row("IPv4 under the type of IPv6", Drops, ethernet(0x86dd, &denied[14..]));

    // IPv4 headers.
    for words in [1u8, 5, 10] {
        let options = vec![1; usize::from(words) * 4];
        row(&format!("{words} words of options"), Drops, v4_with(STRANGER, HERE, TCP, 0, &options, &syn(80)));
    }
    row("options of a friend", Passes, v4_with(FRIEND, HERE, TCP, 0, &[1; 40], &syn(80)));
    for ihl in 0..5u8 {
        let mut frame = denied.clone();
        frame[14] = 0x40 | ihl;
        row(&format!("IHL {ihl}"), Passes, frame);
    }
    for version in [0u8, 5, 7, 15] {
        let mut frame = denied.clone();
        frame[14] = version << 4 | 5;
        row(&format!("version {version}"), Passes, frame);
    }
    row("first fragment", Drops, v4_with(STRANGER, HERE, TCP, 0x2000, &[], &syn(80)));
    row("first fragment of a friend", Passes, v4_with(FRIEND, HERE, TCP, 0x2000, &[], &syn(80)));
    row("later fragment", Passes, v4_with(STRANGER, HERE, TCP, 0x2003, &[], &syn(80)));
    row("last fragment", Passes, v4_with(STRANGER, HERE, TCP, 0x0010, &[], &syn(80)));
    row("don't fragment", Drops, v4_with(STRANGER, HERE, TCP, 0x4000, &[], &syn(80)));
    row("the reserved bit", Drops, v4_with(STRANGER, HERE, TCP, 0x8000, &[], &syn(80)));
    row("first fragment, UDP", Drops, v4_with(STRANGER, HERE, UDP, 0x2000, &[], &udp(9, 53)));
    row("later fragment, UDP", Passes, v4_with(STRANGER, HERE, UDP, 0x2001, &[], &udp(9, 53)));
    row(
        "a first fragment that ends before the flags",
        Passes,
        v4_with(STRANGER, HERE, TCP, 0x2000, &[], &syn(80)[..8]),
    );
    row("multicast", Passes, v4(STRANGER, "224.0.0.251", UDP, &udp(9, 53)));
    row("broadcast", Passes, v4(STRANGER, "255.255.255.255", UDP, &udp(9, 53)));
    row("ICMP echo", Passes, v4(STRANGER, HERE, 1, &[8, 0, 0, 0, 0, 1, 0, 1]));
    row("SCTP", Passes, v4(STRANGER, HERE, 132, &udp(9, 5000)));
    row("IPv6 in IPv4", Passes, v4(STRANGER, HERE, 41, &denied6[14..]));
    row("GRE", Passes, v4(STRANGER, HERE, 47, &[0, 0, 8, 0]));

    // IPv6 headers.
    for (name, header) in [
        ("hop-by-hop", HOP_BY_HOP),
        ("destination options", DESTINATION),
        ("mobility", MOBILITY),
        ("routing type 4", ROUTING),
        ("authentication", AUTHENTICATION),
        ("first fragment", FIRST_FRAGMENT),
        ("atomic fragment", ATOMIC_FRAGMENT),
    ] {
        row(&format!("{name} header"), Drops, v6_with(STRANGER6, HERE6, &[header], TCP, &syn(80)));
        row(&format!("{name} header of a friend"), Passes, v6_with(FRIEND6, HERE6, &[header], TCP, &syn(80)));
        row(&format!("{name} header, UDP"), Drops, v6_with(STRANGER6, HERE6, &[header], UDP, &udp(9, 53)));
        row(&format!("{name} header, ACK"), Passes, v6_with(STRANGER6, HERE6, &[header], TCP, &tcp(1000, 80, ACK)));
    }
    row("later fragment header", Passes, v6_with(STRANGER6, HERE6, &[LATER_FRAGMENT], TCP, &syn(80)));
    row("routing type 0 header", Passes, v6_with(STRANGER6, HERE6, &[ROUTING_0], TCP, &syn(80)));
    let mixed = [HOP_BY_HOP, DESTINATION, ROUTING, ATOMIC_FRAGMENT, AUTHENTICATION, DESTINATION];
    row("six different headers", Drops, v6_with(STRANGER6, HERE6, &mixed, TCP, &syn(80)));
    row("eight headers", Drops, v6_with(STRANGER6, HERE6, &[DESTINATION; 8], TCP, &syn(80)));
    row("nine headers", Passes, v6_with(STRANGER6, HERE6, &[DESTINATION; 9], TCP, &syn(80)));
    row(
        "a header longer than the packet",
        Passes,
        v6_with(STRANGER6, HERE6, &[(60, &[255, 1, 4, 0, 0, 0, 0])], TCP, &syn(80)),
    );
    row("no next header", Passes, v6(STRANGER6, HERE6, 59, &syn(80)));
    row("ESP", Passes, v6(STRANGER6, HERE6, 50, &syn(80)));
    row("neighbour solicitation", Passes, v6(STRANGER6, HERE6, 58, &[135, 0, 0, 0, 0, 0, 0, 0]));
    row("IPv6 multicast", Passes, v6(STRANGER6, "ff02::fb", UDP, &udp(9, 53)));
    row("a mapped source is the IPv4 one: friend", Passes, v6("::ffff:10.1.2.3", HERE6, TCP, &syn(80)));
    row("a mapped source is the IPv4 one: stranger", Drops, v6("::ffff:10.9.9.9", HERE6, TCP, &syn(80)));
    row("a mapped destination is the IPv4 one", Drops, v6("::ffff:10.9.9.9", "::ffff:10.80.0.1", TCP, &syn(80)));
    row("a source that only looks mapped", Drops, v6("::fffe:10.1.2.3", HERE6, TCP, &syn(80)));
    row("a source that is compatible, not mapped", Drops, v6("::10.1.2.3", HERE6, TCP, &syn(80)));
    rows
}

/// Frames that are dropped whole, and the least length at which they can be.
fn cuts() -> Vec<(&'static str, Vec<u8>, usize)> {
    let syn = tcp(1000, 80, SYN);
    let three = [HOP_BY_HOP, ROUTING, DESTINATION];
    let least = |ip: usize, transport: usize| 14 + ip + transport;
    vec![
        ("TCP over IPv4", v4(STRANGER, HERE, TCP, &syn), least(20, 14)),
        ("TCP over IPv4 with options", v4_with(STRANGER, HERE, TCP, 0, &[1; 12], &syn), least(32, 14)),
        ("UDP over IPv4", v4(STRANGER, HERE, UDP, &udp(9, 53)), least(20, 4)),
        ("TCP over IPv6", v6(STRANGER6, HERE6, TCP, &syn), least(40, 14)),
        ("UDP over IPv6", v6(STRANGER6, HERE6, UDP, &udp(9, 53)), least(40, 4)),
        ("TCP behind three headers", v6_with(STRANGER6, HERE6, &three, TCP, &syn), least(40 + 8 + 8 + 16, 14)),
        ("TCP in QinQ", tagged(&v4(STRANGER, HERE, TCP, &syn), &[0x88a8, 0x8100]), 8 + least(20, 14)),
    ]
}

pub(crate) fn run(_: &Options, tally: &mut Tally) -> Result<()> {
    let scratch = Scratch::new()?;
    let datapath = Datapath::load(scratch.pins())?;
    let scene = Scene::new()?;
    let rows = rows();

    // As long as something is missing, everything passes.
    let denied = v4(STRANGER, HERE, TCP, &tcp(1000, 80, SYN));
    let passes = |what: &str| -> Result<()> {
        let got = datapath.test_run("outer_wall", &denied)?;
        ensure!(got == PASS, "{what}: {got}");
        Ok(())
    };
    scene.known.enter(&datapath)?;
    datapath.set_xdp_netns(LOOPBACK, NETNS)?;
    tally.count("wall: no policy, all passes", passes("no policy"));
    let _ = datapath.publish(&scene.tables)?;
    datapath.set_xdp_netns(LOOPBACK, NETNS + 1)?;
    tally.count("wall: another namespace, no listener, all passes", passes("no listener"));
    datapath.set_xdp_netns(LOOPBACK, NETNS)?;
    for (key, value) in &scene.flows {
        let value = FlowValue { generation: datapath.active()?.generation, ..*value };
        datapath.set_flow(key, &value)?;
    }

    let before = datapath.counters()?.get(Counter::XdpDropped);
    let mut dropped = 0;
    for row in &rows {
        dropped += u64::from(row.expect == Drops);
        tally.count(format!("wall: {}", row.name), wall(&datapath, &scene, row));
    }
    for (name, frame, least) in cuts() {
        let result = (14..=frame.len()).try_for_each(|length| {
            let got = datapath.test_run("outer_wall", &frame[..length])?;
            dropped += u64::from(length >= least);
            ensure!(got == if length >= least { DROP } else { PASS }, "cut after {length} bytes: {got}");
            Ok(())
        });
        tally.count(format!("wall: {name}, cut everywhere"), result);
    }
    let after = datapath.counters()?.get(Counter::XdpDropped);
    let counted = if after - before == dropped { Ok(()) } else { Err(anyhow::anyhow!("{}", after - before)) };
    tally.count(format!("wall: {dropped} frames counted as dropped"), counted);

    receiving(&datapath, &scene, &rows, tally)?;
    println!("packets: {} rows, {} frames dropped by the wall", rows.len(), dropped);
    Ok(())
}

fn wall(datapath: &Datapath, scene: &Scene, row: &Row) -> Result<()> {
    let got = datapath.test_run("outer_wall", &row.frame)?;
    let want = if row.expect == Drops { DROP } else { PASS };
    // Never more than the socket would: only what is denied, and not rejected.
    let parsed = packet::ethernet(&row.frame[..]).and_then(|at| packet::parse(&row.frame[..], at).ok());
    if got == DROP {
        let Some(p) = parsed else { bail!("dropped, though nobody can read it") };
        let Some((flow, decision)) = scene.judged(&p) else { bail!("dropped, though nobody listens") };
        ensure!(!decision.passes() && !decision.reject, "dropped, but the socket says {decision:?} to {flow:?}");
    }
    ensure!(got == want, "got {got}, want {want}; {parsed:?}");
    Ok(())
}

/// The receiving hook gets a socket that the kernel made for the test: of no protocol, in this process's cgroup. It is
/// judged like a datagram socket of whoever owns that cgroup.
fn receiving(datapath: &Datapath, scene: &Scene, rows: &[Row], tally: &mut Tally) -> Result<()> {
    let cgroup = cgroup_id(&own_cgroup()?)?;
    let malformed = || -> Result<u64> { Ok(datapath.counters()?.get(Counter::Malformed)) };
    let before = malformed()?;
    let mut unreadable = 0;
    let mut seen = [0; 2];
    for (who, identity) in [("db", scene.db), ("watched", scene.watched), ("host", Identity::HOST)] {
        datapath.set_cgroup(cgroup, &CgroupEntry { identity: identity.0, workload: 1, flags: 0, pad: 0 })?;
        for row in rows {
            // Tags are off before a socket sees a packet, and what is not IP never comes to one.
            let Some(at) = packet::ethernet(&row.frame[..]) else { continue };
            let ip = &row.frame[at as usize..];
            let mut frame = row.frame[..12].to_vec();
            frame.extend_from_slice(&row.frame[at as usize - 2..at as usize]);
            frame.extend_from_slice(ip);
            // The kernel does not run a program on an empty packet, or on one without a whole IP header.
            if ip.len() < 20 {
                continue;
            }
            unreadable += u64::from(packet::parse(ip, 0).is_err());
            let want = scene.socket_passes(ip, identity);
            let result = datapath.test_run("skb_ingress", &frame).map_err(anyhow::Error::from).and_then(|got| {
                ensure!(got == u32::from(want), "got {got}, user space says {want}; {:?}", packet::parse(ip, 0));
                // The wall is never stricter than the socket.
                ensure!(
                    identity != scene.db || row.expect == Passes || got == 0,
                    "the wall drops it, the socket takes it"
                );
                Ok(())
            });
            seen[usize::from(want)] += 1;
            forget_flow(datapath, scene.here, ip)?;
            tally.count(format!("socket of {who}: {}", row.name), result);
        }
    }
    let _ = datapath.remove_cgroup(cgroup)?;
    let found = malformed()? - before;
    let counted = if found == unreadable { Ok(()) } else { Err(anyhow::anyhow!("{found}")) };
    tally.count(format!("socket: {unreadable} packets counted as malformed"), counted);
    ensure!(seen.iter().all(|n| *n > 50), "{seen:?}");
    println!("packets: {} at the receiving hook, {} refused, {} passed", seen[0] + seen[1], seen[0], seen[1]);
    Ok(())
}

/// A packet that is let through opens a flow; the next row must not find it.
fn forget_flow(datapath: &Datapath, netns: u64, ip: &[u8]) -> Result<()> {
    let Ok(p) = packet::parse(ip, 0) else { return Ok(()) };
    let (remote_port, local_port) = match Proto::from_ip(p.protocol) {
        Proto::Icmp | Proto::Icmpv6 => (0, 0),
        Proto::Tcp | Proto::Udp | Proto::Sctp | Proto::UdpLite | Proto::Dccp | Proto::Other => {
            (p.source_port, p.destination_port)
        }
    };
    if (remote_port, p.protocol) == (2222, ipproto::UDP) {
        return Ok(());
    }
    let key = FlowKey { netns, remote: p.source, remote_port, local_port, protocol: p.protocol, pad: 0 };
    let _ = datapath.remove_flow(&key)?;
    Ok(())
}
