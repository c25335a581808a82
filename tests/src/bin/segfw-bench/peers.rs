//! Who is compared: every peer gets the same sentences (`rules`), written as somebody who knows the peer would write them.
//!
//! Both ends are judged: what a client may open and what a server lets in, as segfw does. A peer of netfilter has
//! namespaces of its own with its rules loaded once; one of BPF is attached for its turn.

use crate::control;
use crate::rules::{self, OPEN, UDP};
use anyhow::{Context, Result, bail, ensure};
use segfw::datapath::attach::{HOOKS, INGRESS};
use segfw::datapath::{Datapath, sys};
use segfw::host::netns::current_cookie;
use segfw_common::{Addr, AddressEntry, CgroupEntry, Identity, control as control_word};
use segfw_tests::scratch::{Scratch, cgroup_id};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What is in force during a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    None,
    /// The same as `None`: what the two differ by is noise.
    Again,
    /// Floods only: frames that the other side throws away at once, for they are for somebody else.
    Sending,
    Nft,
    Legacy,
    LegacySet,
    IptNft,
    IptNftSet,
    EmptySkb,
    Skb,
    SkbQuiet,
    SkbXdp,
    Conn,
    ConnQuiet,
}

impl Kind {
    pub(crate) const ALL: [Self; 14] = [
        Self::None,
        Self::Again,
        Self::Sending,
        Self::Nft,
        Self::Legacy,
        Self::LegacySet,
        Self::IptNft,
        Self::IptNftSet,
        Self::EmptySkb,
        Self::Skb,
        Self::SkbQuiet,
        Self::SkbXdp,
        Self::Conn,
        Self::ConnQuiet,
    ];

    /// As `--peers` and the JSON name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Again => "none-again",
            Self::Sending => "sending-alone",
            Self::Nft => "nftables",
            Self::Legacy => "iptables-legacy",
            Self::LegacySet => "iptables-legacy-ipset",
            Self::IptNft => "iptables-nft",
            Self::IptNftSet => "iptables-nft-ipset",
            Self::EmptySkb => "empty-cgroup-skb",
            Self::Skb => "segfw-skb",
            Self::SkbQuiet => "segfw-skb-quiet",
            Self::SkbXdp => "segfw-skb-xdp",
            Self::Conn => "segfw-conn",
            Self::ConnQuiet => "segfw-conn-quiet",
        }
    }

    /// For readers of the page.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::None => "no firewall",
            Self::Again => "no firewall, measured a second time: the difference is noise",
            Self::Sending => "no firewall, and frames for somebody else: what a flood costs who sends it",
            Self::Nft => "nftables: conntrack, verdict maps, sets of address and port, both directions",
            Self::Legacy => "iptables-legacy: conntrack, one rule per sentence; the one that matches is in the middle",
            Self::LegacySet => "iptables-legacy: conntrack, one hash:ip,port set",
            Self::IptNft => "iptables-nft: conntrack, one rule per sentence; the one that matches is in the middle",
            Self::IptNftSet => "iptables-nft: conntrack, one hash:ip,port set",
            Self::EmptySkb => "an empty cgroup_skb program at ingress: the least that such a hook costs",
            Self::Skb => "segfw, gate skb, every flow logged",
            Self::SkbQuiet => "segfw, gate skb, allowed flows not logged",
            // drivers/net/veth.c, veth_xdp_set: no NETIF_F_GSO_SOFTWARE at the peer of an interface with a program.
            Self::SkbXdp => {
                "segfw, gate skb, logged, with the outer wall (XDP) on the server's interface; native XDP takes segmentation \
                 offload from a veth pair, whatever the program does: see the stream"
            }
            Self::Conn => "segfw, gate conn, every flow logged",
            Self::ConnQuiet => "segfw, gate conn, allowed flows not logged",
        }
    }

    pub(crate) fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == name)
    }

    fn is_netfilter(self) -> bool {
        matches!(self, Self::Nft | Self::Legacy | Self::LegacySet | Self::IptNft | Self::IptNftSet)
    }

    /// Nothing is attached per packet, and segments have TCP alone.
    pub(crate) fn is_conn(self) -> bool {
        matches!(self, Self::Conn | Self::ConnQuiet)
    }

    /// Nothing is refused.
    pub(crate) fn open(self) -> bool {
        matches!(self, Self::None | Self::Again | Self::Sending | Self::EmptySkb)
    }
}

/// Where traffic runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Loopback,
    Veth,
}

impl Place {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Veth => "veth",
        }
    }
}

/// The network of one peer: one namespace or two. They end with this value.
pub(crate) struct Nets {
    pub(crate) client: File,
    pub(crate) server: File,
    pub(crate) from: Ipv4Addr,
    pub(crate) to: Ipv4Addr,
    pub(crate) place: Place,
}

/// Interface of either end of the pair.
pub(crate) const CLIENT_IF: &str = "bench0";
/// See [`CLIENT_IF`].
pub(crate) const SERVER_IF: &str = "bench1";

impl Nets {
    fn new(place: Place) -> Result<Self> {
        let client = namespace()?;
        let (server, from, to) = match place {
            Place::Loopback => (client.try_clone()?, Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST),
            Place::Veth => (namespace()?, Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)),
        };
        let nets = Self { client, server, from, to, place };
        if place == Place::Veth {
            let there = format!("/proc/{}/fd/{}", std::process::id(), nets.server.as_raw_fd());
            enter_net(&nets.client)?;
            ip(&["link", "add", CLIENT_IF, "type", "veth", "peer", "name", SERVER_IF, "netns", &there])?;
            ip(&["addr", "add", &format!("{from}/24"), "dev", CLIENT_IF])?;
            ip(&["link", "set", CLIENT_IF, "up"])?;
            enter_net(&nets.server)?;
            ip(&["addr", "add", &format!("{to}/24"), "dev", SERVER_IF])?;
            ip(&["link", "set", SERVER_IF, "up"])?;
            // Floods come from made-up addresses; they are to reach the firewall.
            ip(&["route", "add", "default", "dev", SERVER_IF])?;
            for (net, link) in [(&nets.client, CLIENT_IF), (&nets.server, SERVER_IF)] {
                enter_net(net)?;
                wait_for(link)?;
            }
        }
        Ok(nets)
    }

    /// Both, or the one there is.
    fn each(&self) -> Vec<&File> {
        match self.place {
            Place::Loopback => vec![&self.server],
            Place::Veth => vec![&self.server, &self.client],
        }
    }
}

/// Until the link forwards. The kernel activates it from a work queue, up to a second after `up` (net/core/link_watch.c); what
/// is sent before is dropped.
fn wait_for(link: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let said = Command::new("ip").args(["-o", "link", "show", "dev", link]).output().context("starting ip")?.stdout;
        let said = String::from_utf8_lossy(&said);
        if said.contains("state UP") && !said.contains("qdisc noop ") {
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(10), "{link} does not come up: {said}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Makes a network namespace without a name; this thread is in it afterwards.
fn namespace() -> Result<File> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare")?;
    ip(&["link", "set", "lo", "up"])?;
    for (file, value) in [
        ("ipv4/ip_local_port_range", "16000 64999"),
        ("ipv4/tcp_tw_reuse", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
    ] {
        std::fs::write(format!("/proc/sys/net/{file}"), value).with_context(|| file.to_owned())?;
    }
    File::open("/proc/thread-self/ns/net").context("the namespace just made")
}

/// This thread into a namespace.
pub(crate) fn enter_net(net: &File) -> Result<()> {
    nix::sched::setns(net, nix::sched::CloneFlags::CLONE_NEWNET).context("setns")
}

fn ip(args: &[&str]) -> Result<()> {
    run("ip", args, "")
}

/// Runs a command in this thread's namespace with this on stdin.
fn run(program: &str, args: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let mut stdin = child.stdin.take().context("stdin")?;
    // A program that gives up early has said why on stderr; the broken pipe says nothing more.
    let wrote = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = errors.lines().filter(|l| !l.starts_with('#')).take(2).collect();
    ensure!(output.status.success(), "{program} {}: {}", args.join(" "), said.join("; "));
    wrote.with_context(|| format!("writing to {program}"))
}

/// One peer, ready.
pub(crate) struct Peer {
    pub(crate) kind: Kind,
    pub(crate) nets: Nets,
    pub(crate) client: PathBuf,
    pub(crate) server: PathBuf,
    segfw: Option<Segfw>,
    empty: Option<OwnedFd>,
    attached: Option<OwnedFd>,
    top: File,
    // Last: it goes when everything that uses it has gone.
    _scratch: Scratch,
}

struct Segfw {
    datapath: Datapath,
    events: aya::maps::RingBuf<aya::maps::MapData>,
    xdp: bool,
}

impl Peer {
    /// Loads everything but attaches nothing of BPF yet. An error says why this peer is not measured.
    pub(crate) fn new(kind: Kind, place: Place, n: u32) -> Result<Self> {
        if kind == Kind::SkbXdp && place == Place::Loopback {
            bail!("the loopback device has no native XDP");
        }
        let nets = Nets::new(place)?;
        let scratch = Scratch::new()?;
        let (client, server) = (scratch.cgroup("client")?, scratch.cgroup("server")?);
        let top = File::open(scratch.cgroup("")?)?;
        if kind.is_netfilter() {
            for net in nets.each() {
                enter_net(net)?;
                netfilter(kind, &nets, n)?;
            }
        }
        let mut peer =
            Self { kind, nets, client, server, segfw: None, empty: None, attached: None, top, _scratch: scratch };
        match kind {
            Kind::EmptySkb => peer.empty = Some(empty_hook()?),
            Kind::Skb | Kind::SkbQuiet | Kind::SkbXdp | Kind::Conn | Kind::ConnQuiet => {
                peer.segfw = Some(peer.load(n)?)
            }
            Kind::None
            | Kind::Again
            | Kind::Sending
            | Kind::Nft
            | Kind::Legacy
            | Kind::LegacySet
            | Kind::IptNft
            | Kind::IptNftSet => {}
        }
        Ok(peer)
    }

    fn load(&self, n: u32) -> Result<Segfw> {
        let mut datapath = Datapath::load(self._scratch.pins())?;
        let events = datapath.take_events()?;
        let mut files = rules::files(n);
        files.push(("access.yaml".to_owned(), rules::traffic(matches!(self.kind, Kind::SkbQuiet | Kind::ConnQuiet))));
        for (_, text) in &mut files {
            *text = text.replace(segfw_tests::policy::CGROUP, "/bench");
            if self.kind.is_conn() {
                *text = rules::tcp_alone(text);
            }
        }
        let built = control::build(&files, 2)?;
        ensure!(built.tables.rules.len() >= n as usize, "{n} rules became {} entries", built.tables.rules.len());
        let _ = datapath.publish(&built.tables)?;
        if self.kind.is_conn() {
            // Its hook is asked for every connection of the machine: what is not ours passes.
            datapath.set_host_flags(control_word::HOST_PART | control_word::HOST_CONN)?;
        }
        let mut numbers = built.numbers;
        // What the agent would find out: which cgroup is who, and which address is where.
        let identities: Vec<Identity> = built.local.iter().map(|set| numbers.labels(set)).collect();
        for (i, (path, identity)) in [&self.client, &self.server].into_iter().zip(&identities).enumerate() {
            let entry = CgroupEntry { identity: identity.0, workload: i as u32 + 1, flags: 0, pad: 0 };
            datapath.set_cgroup(cgroup_id(path)?, &entry)?;
        }
        if self.nets.place == Place::Veth {
            for (net, addr, identity) in
                [(&self.nets.client, self.nets.from, identities[0]), (&self.nets.server, self.nets.to, identities[1])]
            {
                enter_net(net)?;
                let entry =
                    AddressEntry { netns: current_cookie()?, as_destination: identity.0, as_source: identity.0 };
                datapath.set_address(&Addr::from(std::net::IpAddr::V4(addr)), &entry)?;
            }
        }
        Ok(Segfw { datapath, events, xdp: self.kind == Kind::SkbXdp })
    }

    /// Begins this peer's turn.
    pub(crate) fn attach(&mut self) -> Result<()> {
        if let Some(empty) = &self.empty {
            self.attached = Some(sys::link_create(empty.as_fd(), self.top.as_raw_fd() as u32, 0, 0)?);
        }
        if let Some(segfw) = &self.segfw {
            for hook in HOOKS.into_iter().filter(|h| !self.kind.is_conn() || h.program != INGRESS.program) {
                let _ = segfw.datapath.attach(hook, &self.top)?;
            }
            if self.kind.is_conn() {
                // Its canary is a connection on loopback.
                enter_net(&self.nets.server)?;
                let checks = segfw.datapath.attach_checks(Ok(()));
                ensure!(checks.conn.is_ok(), "no gate conn here: {:?}", checks.conn);
            }
            if segfw.xdp {
                enter_net(&self.nets.server)?;
                let index = nix::net::if_::if_nametoindex(SERVER_IF)?;
                segfw.datapath.set_xdp_netns(index, current_cookie()?)?;
                let _ = segfw.datapath.attach_xdp(SERVER_IF)?;
            }
        }
        Ok(())
    }

    /// Ends it. Events are taken out between the rounds, not in them.
    pub(crate) fn detach(&mut self) -> Result<()> {
        self.attached = None;
        let Some(segfw) = &mut self.segfw else { return Ok(()) };
        for entry in std::fs::read_dir(&segfw.datapath.dir)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("link-") {
                std::fs::remove_file(entry.path())?;
            }
        }
        while segfw.events.next().is_some() {}
        // A worker of the kernel ends the links, a little later: until then half of the hooks would judge the next round.
        std::thread::sleep(std::time::Duration::from_millis(100));
        Ok(())
    }
}

/// The rules of a netfilter peer into this thread's namespace. The same for client and server: what the one may send is
/// what the other lets in.
fn netfilter(kind: Kind, nets: &Nets, n: u32) -> Result<()> {
    let (from, to) = (nets.from, nets.to);
    let (udp_first, udp_last) = UDP;
    match kind {
        Kind::Nft => run("nft", &["-f", "-"], &nft(from, to, n)),
        Kind::Legacy | Kind::IptNft | Kind::LegacySet | Kind::IptNftSet => {
            let set = matches!(kind, Kind::LegacySet | Kind::IptNftSet);
            let mut text = String::from("*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT DROP [0:0]\n");
            for chain in ["INPUT", "OUTPUT"] {
                let _ = writeln!(text, "-A {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT");
                let _ = writeln!(text, "-A {chain} -m conntrack --ctstate INVALID -j DROP");
            }
            if set {
                let mut members = String::from("create allowed hash:ip,port hashsize 131072 maxelem 262144\n");
                for i in 0..n {
                    let (addr, port) = rules::sentence(i);
                    let _ = writeln!(members, "add allowed {addr},tcp:{port}");
                }
                let _ = writeln!(members, "add allowed {from},tcp:{OPEN}");
                run("ipset", &["restore"], &members)?;
                let _ = writeln!(text, "-A INPUT -m set --match-set allowed src,dst -j ACCEPT");
            } else {
                let bulk = |text: &mut String, of: std::ops::Range<u32>| {
                    for i in of {
                        let (addr, port) = rules::sentence(i);
                        let _ = writeln!(text, "-A INPUT -s {addr}/32 -p tcp -m tcp --dport {port} -j ACCEPT");
                    }
                };
                bulk(&mut text, 0..n / 2);
                let _ = writeln!(text, "-A INPUT -s {from}/32 -p tcp -m tcp --dport {OPEN} -j ACCEPT");
                bulk(&mut text, n / 2..n);
            }
            for (chain, side) in [("INPUT", "-s"), ("OUTPUT", "-d")] {
                let addr = if side == "-s" { from } else { to };
                let _ = writeln!(
                    text,
                    "-A {chain} {side} {addr}/32 -p udp -m udp --dport {udp_first}:{udp_last} -j ACCEPT"
                );
            }
            let _ = writeln!(text, "-A OUTPUT -d {to}/32 -p tcp -m tcp --dport {OPEN} -j ACCEPT\nCOMMIT");
            let legacy = matches!(kind, Kind::Legacy | Kind::LegacySet);
            let program = if legacy { "iptables-legacy-restore" } else { "iptables-nft-restore" };
            run(program, &["-w"], &text)
        }
        Kind::None
        | Kind::Again
        | Kind::Sending
        | Kind::EmptySkb
        | Kind::Skb
        | Kind::SkbQuiet
        | Kind::SkbXdp
        | Kind::Conn
        | Kind::ConnQuiet => Ok(()),
    }
}

fn nft(from: Ipv4Addr, to: Ipv4Addr, n: u32) -> String {
    let (udp_first, udp_last) = UDP;
    let mut elements = format!("{from} . {OPEN}");
    for i in 0..n {
        let (addr, port) = rules::sentence(i);
        let _ = write!(elements, ", {addr} . {port}");
    }
    format!(
        "table inet bench {{
  set clients {{ type ipv4_addr . inet_service; elements = {{ {elements} }} }}
  set servers {{ type ipv4_addr . inet_service; elements = {{ {to} . {OPEN} }} }}
  chain new_in {{ ip saddr . tcp dport @clients accept; }}
  chain new_out {{ ip daddr . tcp dport @servers accept; }}
  chain input {{ type filter hook input priority filter; policy drop;
    ct state vmap {{ established : accept, related : accept, invalid : drop }}
    meta l4proto tcp jump new_in
    ip saddr {from} udp dport {udp_first}-{udp_last} accept
  }}
  chain output {{ type filter hook output priority filter; policy drop;
    ct state vmap {{ established : accept, related : accept, invalid : drop }}
    meta l4proto tcp jump new_out
    ip daddr {to} udp dport {udp_first}-{udp_last} accept
  }}
}}
"
    )
}

/// `return 1`, as a program for `cgroup_skb`.
fn empty_hook() -> Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
    // r0 = 1; exit (struct bpf_insn, include/uapi/linux/bpf.h).
    let code: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let license = c"GPL";
    let mut attr = [0u64; 16];
    attr[0] = u64::from(BPF_PROG_TYPE_CGROUP_SKB) | 2 << 32;
    attr[1] = code.as_ptr() as u64;
    attr[2] = license.as_ptr() as u64;
    // SAFETY: the attribute is as long as we say; the pointers in it are to live buffers.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, attr.as_mut_ptr(), size_of_val(&attr)) };
    if fd < 0 {
        bail!("the empty program: {}", std::io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
