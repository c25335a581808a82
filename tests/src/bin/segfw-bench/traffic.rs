//! The data path, side by side: every peer carries the same traffic, in turns.
//!
//! One thread is client and server, on one CPU: a request and its response are a handful of function calls in the kernel,
//! so a ratio here is the worst case of any network. CPU time is that of this process; a kernel that accounts softirqs
//! apart (`CONFIG_IRQ_TIME_ACCOUNTING`) leaves the receiving half out of it. Wall time has all of it.

use crate::Options;
use crate::peers::{CLIENT_IF, Kind, Peer, Place, SERVER_IF, enter_net};
use crate::result::{Absent, Cost, Results, Spread};
use crate::rules::{OPEN, SHUT, UDP, sentence};
use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, sockopt};
use segfw_tests::scratch::{enter, own_cgroup};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// CPU time of one work with one peer in one round.
const TURN: Duration = Duration::from_millis(60);
/// The same where instructions are counted: an emulated CPU is slow, and every count is the same.
const COUNTED: u32 = 200;
/// A probe that has no answer by then was refused.
const PATIENCE: Duration = Duration::from_millis(500);
/// Bytes that one operation of the stream moves.
const CHUNK: usize = 64 << 10;
/// Frames of a flood that are handed over in one call.
const BURST: usize = 64;

/// Nanoseconds for one operation.
#[derive(Clone, Copy, Debug)]
struct Measured {
    cpu: f64,
    wall: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    Exchange,
    Connection,
    Udp,
    Stream,
    SynFlood,
    UdpFlood,
}

impl Work {
    const ALL: [Self; 6] = [Self::Exchange, Self::Connection, Self::Udp, Self::Stream, Self::SynFlood, Self::UdpFlood];

    fn name(self) -> &'static str {
        match self {
            Self::Exchange => "rr",
            Self::Connection => "crr",
            Self::Udp => "udp",
            Self::Stream => "stream",
            Self::SynFlood => "syn-flood",
            Self::UdpFlood => "udp-flood",
        }
    }

    fn operation(self) -> &'static str {
        match self {
            Self::Exchange => "one byte there and one back on an open TCP connection",
            Self::Connection => "connect, accept, close",
            Self::Udp => "a datagram to one of 64 ports, and its answer",
            Self::Stream => "64 KiB over an open TCP connection",
            Self::SynFlood => "a SYN from a made-up address to a port that is not open to it",
            Self::UdpFlood => "a datagram from a made-up address to a port that is not open to it",
        }
    }

    fn is_flood(self) -> bool {
        matches!(self, Self::SynFlood | Self::UdpFlood)
    }
}

/// Names for `--only`.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    Work::ALL.into_iter().map(Work::name)
}

/// All peers, all works, all sizes.
pub(crate) fn run(options: &Options, results: &mut Results) -> Result<()> {
    let wanted: Vec<Work> = Work::ALL.into_iter().filter(|w| options.wants(w.name())).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    crate::pin(0)?;
    let home = own_cgroup()?;
    let here = std::fs::File::open("/proc/thread-self/ns/net")?;
    let mut done = Ok(());
    for place in [Place::Loopback, Place::Veth] {
        let works: Vec<Work> = wanted.iter().copied().filter(|w| !w.is_flood() || place == Place::Veth).collect();
        if works.is_empty() || !options.places.is_empty() && !options.places.iter().any(|p| p == place.name()) {
            continue;
        }
        for rules in options.sizes() {
            if let Err(error) = one_size(options, results, place, rules, &works) {
                done = Err(error.context(format!("{}, {rules} rules", place.name())));
            }
            enter(&home)?;
            enter_net(&here)?;
            let _ = crate::save(options, results)?;
        }
    }
    crate::unpin()?;
    done
}

fn one_size(options: &Options, results: &mut Results, place: Place, rules: u32, works: &[Work]) -> Result<()> {
    let mut peers = Vec::new();
    for kind in
        Kind::ALL.into_iter().filter(|k| options.peers.is_empty() || *k == Kind::None || options.peers.contains(k))
    {
        let made = Peer::new(kind, place, rules).and_then(|mut peer| {
            peer.attach()?;
            let proven = proof(&peer, rules);
            peer.detach()?;
            proven.map(|()| peer)
        });
        match made {
            Ok(peer) => peers.push(peer),
            Err(error) => {
                let why = format!("{error:#}");
                eprintln!("  {:<22} {:8} {rules:>6} rules: not measured: {why}", kind.name(), place.name());
                results.absent.push(Absent {
                    work: "all".into(),
                    place: place.name().into(),
                    peer: kind.name().into(),
                    rules: rules.into(),
                    why,
                });
            }
        }
    }
    ensure!(peers.first().is_some_and(|p| p.kind == Kind::None), "nothing to compare with");
    // How many operations fit a turn: the first round is not counted either, caches and lazily allocated memory are in it.
    let mut counts = BTreeMap::new();
    for (i, peer) in peers.iter_mut().enumerate() {
        peer.attach()?;
        for work in works.iter().filter(|w| meets(peer, **w)) {
            let measured = perform(peer, *work, if options.instructions { COUNTED } else { 50 })?;
            let fit = (TURN.as_nanos() as f64 / measured.cpu) as u32;
            let _ = counts.insert((i, *work), if options.instructions { COUNTED } else { fit.clamp(20, 20_000) });
        }
        peer.detach()?;
    }
    let mut all: BTreeMap<(Work, usize), Vec<Measured>> = BTreeMap::new();
    for round in 0..options.turns() {
        // Each order in turn, so that none is always the first.
        for at in 0..peers.len() {
            let i = (at + round) % peers.len();
            peers[i].attach()?;
            for work in works.iter().filter(|w| meets(&peers[i], **w)) {
                let measured = perform(&peers[i], *work, counts[&(i, *work)])?;
                all.entry((*work, i)).or_default().push(measured);
            }
            peers[i].detach()?;
        }
        eprint!(".");
    }
    eprintln!();
    for work in works {
        report(options, results, &peers, *work, rules, &counts, &all)?;
    }
    Ok(())
}

/// One kind is there for floods only; gate conn is without a hook per packet where segments have TCP alone.
fn meets(peer: &Peer, work: Work) -> bool {
    (peer.kind != Kind::Sending || work.is_flood())
        && (!peer.kind.is_conn() || !matches!(work, Work::Udp | Work::UdpFlood))
}

fn report(
    options: &Options,
    results: &mut Results,
    peers: &[Peer],
    work: Work,
    rules: u32,
    counts: &BTreeMap<(usize, Work), u32>,
    all: &BTreeMap<(Work, usize), Vec<Measured>>,
) -> Result<()> {
    let spread = |i: usize, pick: fn(&Measured) -> f64| {
        Spread::of(all[&(work, i)].iter().map(pick).collect()).context("no rounds")
    };
    let base = (spread(0, |m| m.cpu)?, spread(0, |m| m.wall)?);
    eprintln!("{}, {}, {rules} rules: {}", work.name(), peers[0].nets.place.name(), work.operation());
    for (i, peer) in peers.iter().enumerate().filter(|(_, p)| meets(p, work)) {
        let (cpu, wall) = (spread(i, |m| m.cpu)?, spread(i, |m| m.wall)?);
        let cost = Cost {
            work: work.name().into(),
            place: peer.nets.place.name().into(),
            peer: peer.kind.name().into(),
            rules: rules.into(),
            operation: work.operation().into(),
            operations_per_round: counts[&(i, work)].into(),
            cpu,
            wall,
            ratio: wall.min / base.1.min,
            ratio_of_medians: wall.median / base.1.median,
            ratio_of_cpu: cpu.min / base.0.min,
        };
        eprintln!(
            "  {:<22} min {:>10.0} ({:.3}x)  median {:>10.0} ({:.3}x)  cpu min {:>10.0} ({:.3}x)",
            cost.peer, wall.min, cost.ratio, wall.median, cost.ratio_of_medians, cpu.min, cost.ratio_of_cpu
        );
        if options.instructions {
            // For `cargo xtask guard`.
            let name = format!("{}/{}/{rules}", work.name(), cost.peer);
            println!("count {name} {:.0}", wall.min);
            println!("count {name}/per-10000-of-none {:.0}", cost.ratio * 10_000.0);
        }
        results.costs.push(cost);
    }
    Ok(())
}

/// The policy is in force: what it allows passes, what it does not allow does not. The same questions to every peer.
fn proof(peer: &Peer, rules: u32) -> Result<()> {
    let ends = Ends::new(peer)?;
    let expected = [true, peer.kind.open(), !peer.kind.is_conn(), peer.kind.open()];
    let got = [ends.tcp_passes(OPEN)?, ends.tcp_passes(SHUT)?, ends.udp_passes(UDP.0)?, ends.udp_passes(UDP.1 + 1)?];
    ensure!(
        got == expected,
        "it does not enforce the policy: TCP to the open and the shut port, UDP to the open and the shut port: {got:?} instead of {expected:?}"
    );
    // One of the many sentences, and one that is not among them. Loopback has no strangers.
    if peer.nets.place == Place::Veth && peer.kind != Kind::Sending {
        let (source, port) = sentence(rules / 3);
        let stranger = Ipv4Addr::from(u32::from(source) + 1);
        let got = [syn_arrives(peer, source, port)?, syn_arrives(peer, stranger, port)?];
        let expected = [true, peer.kind.open()];
        ensure!(
            got == expected,
            "a SYN from {source} (rule {}) and from {stranger} (no rule) to port {port}: {got:?} instead of {expected:?}",
            rules / 3
        );
    }
    Ok(())
}

/// Makes sockets of either end.
struct Ends<'a>(&'a Peer);

impl<'a> Ends<'a> {
    fn new(peer: &'a Peer) -> Result<Self> {
        Ok(Self(peer))
    }

    /// From here on sockets are the server's.
    fn server(&self) -> Result<()> {
        enter_net(&self.0.nets.server)?;
        enter(&self.0.server)
    }

    /// From here on sockets are the client's.
    fn client(&self) -> Result<()> {
        enter_net(&self.0.nets.client)?;
        enter(&self.0.client)
    }

    fn to(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.0.nets.to, port))
    }

    /// Listens as the server; the client's turn afterwards.
    fn listen(&self, port: u16) -> Result<TcpListener> {
        self.server()?;
        let listener = tcp()?;
        socket::setsockopt(&listener, sockopt::ReuseAddr, &true)?;
        let at = SockaddrIn::from(SocketAddrV4::new(self.0.nets.to, port));
        socket::bind(listener.as_raw_fd(), &at).with_context(|| format!("binding port {port}"))?;
        socket::listen(&listener, socket::Backlog::new(1024)?)?;
        self.client()?;
        Ok(TcpListener::from(listener))
    }

    fn pair(&self, listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
        let there = TcpStream::connect(self.to(OPEN))?;
        let (here, _) = listener.accept()?;
        there.set_nodelay(true)?;
        here.set_nodelay(true)?;
        Ok((there, here))
    }

    fn tcp_passes(&self, port: u16) -> Result<bool> {
        let _listener = self.listen(port)?;
        match TcpStream::connect_timeout(&self.to(port), PATIENCE) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::TimedOut || e.kind() == ErrorKind::PermissionDenied => Ok(false),
            Err(e) => Err(e).with_context(|| format!("connecting to port {port}")),
        }
    }

    fn udp_passes(&self, port: u16) -> Result<bool> {
        self.server()?;
        let here = match UdpSocket::bind(self.to(port)) {
            Ok(socket) => socket,
            Err(e) if e.kind() == ErrorKind::PermissionDenied => return Ok(false),
            Err(e) => return Err(e).with_context(|| format!("a datagram socket at port {port}")),
        };
        self.client()?;
        let there = UdpSocket::bind((self.0.nets.from, 0))?;
        match there.send_to(b"?", self.to(port)) {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::PermissionDenied => return Ok(false),
            Err(e) => return Err(e).with_context(|| format!("sending to port {port}")),
        }
        here.set_read_timeout(Some(PATIENCE))?;
        let mut byte = [0];
        let Ok((_, from)) = here.recv_from(&mut byte) else { return Ok(false) };
        let _ = here.send_to(b"!", from)?;
        there.set_read_timeout(Some(PATIENCE))?;
        Ok(there.recv_from(&mut byte).is_ok())
    }
}

fn tcp() -> Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// The server's socket is made in the server's cgroup and namespace, everything else in the client's.
fn perform(peer: &Peer, work: Work, count: u32) -> Result<Measured> {
    let ends = Ends::new(peer)?;
    match work {
        Work::Exchange => {
            let listener = ends.listen(OPEN)?;
            let (mut there, mut here) = ends.pair(&listener)?;
            let mut byte = [7];
            measure(count, || {
                there.write_all(&byte)?;
                here.read_exact(&mut byte)?;
                here.write_all(&byte)?;
                Ok(there.read_exact(&mut byte)?)
            })
        }
        Work::Connection => {
            let listener = ends.listen(OPEN)?;
            let to = ends.to(OPEN);
            measure(count, || {
                let there = TcpStream::connect(to)?;
                let (here, _) = listener.accept()?;
                drop((there, here));
                Ok(())
            })
        }
        Work::Udp => {
            ends.server()?;
            let servers: Vec<UdpSocket> =
                (UDP.0..=UDP.1).map(|port| UdpSocket::bind(ends.to(port))).collect::<Result<_, _>>()?;
            ends.client()?;
            let client = UdpSocket::bind((peer.nets.from, 0))?;
            for socket in servers.iter().chain([&client]) {
                // A datagram that a firewall lost must not hang the bench.
                socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            }
            let (mut byte, mut next) = ([7], 0);
            measure(count, || {
                let server = &servers[next];
                let _ = client.send_to(&byte, ends.to(UDP.0 + next as u16))?;
                let (_, from) = server.recv_from(&mut byte)?;
                let _ = server.send_to(&byte, from)?;
                let _ = client.recv_from(&mut byte)?;
                next = (next + 1) % servers.len();
                Ok(())
            })
        }
        Work::Stream => {
            let listener = ends.listen(OPEN)?;
            let (mut there, mut here) = ends.pair(&listener)?;
            there.set_nonblocking(true)?;
            here.set_nonblocking(true)?;
            let (data, mut room) = (vec![7u8; CHUNK], vec![0u8; CHUNK]);
            measure(count, || {
                let (mut sent, mut got) = (0, 0);
                while got < CHUNK {
                    match there.write(&data[sent..]) {
                        Ok(n) => sent += n,
                        Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                        Err(e) => return Err(e.into()),
                    }
                    match here.read(&mut room) {
                        Ok(0) => bail!("the connection ended"),
                        Ok(n) => got += n,
                        // Sent and not here yet: in a queue that only another context empties.
                        Err(e) if e.kind() == ErrorKind::WouldBlock => {
                            let _ =
                                poll(&mut [PollFd::new(here.as_fd(), PollFlags::POLLIN)], PollTimeout::from(100u8))?;
                        }
                        Err(e) => return Err(e.into()),
                    }
                }
                Ok(())
            })
        }
        Work::SynFlood => {
            let _listener = ends.listen(SHUT)?;
            flood(peer, libc::IPPROTO_TCP as u8, count)
        }
        Work::UdpFlood => {
            ends.server()?;
            let _socket = UdpSocket::bind(ends.to(SHUT))?;
            flood(peer, libc::IPPROTO_UDP as u8, count)
        }
    }
}

/// Frames from the client's interface to the server's, each from another address. On a veth pair the thread that sends
/// also does the receiver's work, so the time of a call is that of sending and refusing.
fn flood(peer: &Peer, protocol: u8, count: u32) -> Result<Measured> {
    enter_net(&peer.nets.server)?;
    let mut hardware = mac(SERVER_IF)?;
    if peer.kind == Kind::Sending {
        hardware[5] ^= 1;
    }
    enter_net(&peer.nets.client)?;
    enter(&peer.client)?;
    let index = nix::net::if_::if_nametoindex(CLIENT_IF)?;
    let socket = packet_socket()?;
    let mut at = link(index, &hardware);
    let mut frames: Vec<Vec<u8>> = (0..BURST).map(|_| frame(&hardware, peer.nets.to, SHUT, protocol)).collect();
    let mut seed = 1u32;
    let bursts = count.div_ceil(BURST as u32);
    let measured = measure(bursts, || {
        let mut parts: Vec<libc::iovec> = Vec::with_capacity(BURST);
        for frame in &mut frames {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // 198.18/15 is set apart for benchmarks.
            come_from(frame, Ipv4Addr::from(0xc612_0000 | seed >> 15), 1_024 + (seed % 60_000) as u16);
            parts.push(libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() });
        }
        // SAFETY: all zeros is valid.
        let mut messages: Vec<libc::mmsghdr> = vec![unsafe { std::mem::zeroed() }; BURST];
        for (message, part) in messages.iter_mut().zip(&mut parts) {
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_name = (&raw mut at).cast();
            message.msg_hdr.msg_namelen = size_of_val(&at) as u32;
        }
        let mut sent = 0;
        while sent < BURST {
            // SAFETY: everything that the headers point to lives to the end of this block.
            let n =
                unsafe { libc::sendmmsg(socket.as_raw_fd(), messages[sent..].as_mut_ptr(), (BURST - sent) as u32, 0) };
            match n {
                n if n > 0 => sent += n as usize,
                _ if [Errno::ENOBUFS, Errno::EAGAIN].contains(&Errno::last()) => {}
                _ => bail!("sending frames: {}", std::io::Error::last_os_error()),
            }
        }
        Ok(())
    })?;
    let each = |burst: f64| burst / BURST as f64;
    Ok(Measured { cpu: each(measured.cpu), wall: each(measured.wall) })
}

fn packet_socket() -> Result<OwnedFd> {
    // SAFETY: plain numbers; the descriptor is ours.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    ensure!(raw >= 0, "a packet socket: {}", std::io::Error::last_os_error());
    // SAFETY: just made.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Where frames go out, and to whom.
fn link(index: u32, hardware: &[u8; 6]) -> libc::sockaddr_ll {
    // SAFETY: all zeros is valid.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = libc::AF_PACKET as u16;
    at.sll_ifindex = index as i32;
    at.sll_protocol = (libc::ETH_P_IP as u16).to_be();
    at.sll_halen = 6;
    at.sll_addr[..6].copy_from_slice(hardware);
    at
}

/// Whether a SYN from an address that is not ours reaches a listener of the server: then the kernel holds a request for
/// it, which `/proc/net/tcp` shows as SYN_RECV.
fn syn_arrives(peer: &Peer, source: Ipv4Addr, port: u16) -> Result<bool> {
    const SYN_RECV: &str = "03";
    const FROM_PORT: u16 = 40_000;
    let ends = Ends::new(peer)?;
    let _listener = ends.listen(port)?;
    enter_net(&peer.nets.server)?;
    let hardware = mac(SERVER_IF)?;
    ends.client()?;
    let at = link(nix::net::if_::if_nametoindex(CLIENT_IF)?, &hardware);
    let mut syn = frame(&hardware, peer.nets.to, port, libc::IPPROTO_TCP as u8);
    come_from(&mut syn, source, FROM_PORT);
    let socket = packet_socket()?;
    // SAFETY: frame and address live to the end of the call.
    let sent = unsafe {
        let (data, to) = (syn.as_ptr().cast(), (&raw const at).cast());
        libc::sendto(socket.as_raw_fd(), data, syn.len(), 0, to, size_of_val(&at) as u32)
    };
    ensure!(sent == syn.len() as isize, "sending a SYN: {}", std::io::Error::last_os_error());
    std::thread::sleep(Duration::from_millis(20));
    enter_net(&peer.nets.server)?;
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
    let local = format!(":{port:04X}");
    // As the kernel writes it there: the address as one number of this machine's byte order.
    let remote = format!("{:08X}:{FROM_PORT:04X}", u32::from_ne_bytes(source.octets()));
    Ok(table.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let ours = words.next().is_some_and(|l| l.ends_with(&local)) && words.next() == Some(&remote);
        ours && words.next() == Some(SYN_RECV)
    }))
}

fn mac(interface: &str) -> Result<[u8; 6]> {
    let text = std::process::Command::new("ip").args(["-o", "link", "show", interface]).output()?.stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    let word = text.split("link/ether ").nth(1).and_then(|t| t.split(' ').next()).context("no hardware address")?;
    let bytes: Vec<u8> = word.split(':').map(|b| u8::from_str_radix(b, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("{word} is no hardware address"))
}

/// Offsets in a frame.
const IP: usize = 14;
const L4: usize = IP + 20;

/// A frame with a SYN or a datagram of no bytes, without its source and checksums.
pub(crate) fn frame(hardware: &[u8; 6], to: Ipv4Addr, port: u16, protocol: u8) -> Vec<u8> {
    let length = if protocol == libc::IPPROTO_TCP as u8 { 20 } else { 8 };
    let mut f = vec![0u8; L4 + length];
    f[..6].copy_from_slice(hardware);
    f[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    f[12..14].copy_from_slice(&(libc::ETH_P_IP as u16).to_be_bytes());
    f[IP] = 0x45;
    f[IP + 2..IP + 4].copy_from_slice(&((20 + length) as u16).to_be_bytes());
    f[IP + 8] = 64;
    f[IP + 9] = protocol;
    f[IP + 16..IP + 20].copy_from_slice(&to.octets());
    f[L4 + 2..L4 + 4].copy_from_slice(&port.to_be_bytes());
    if protocol == libc::IPPROTO_TCP as u8 {
        // Header of five words; SYN; some window.
        f[L4 + 12] = 0x50;
        f[L4 + 13] = 0x02;
        f[L4 + 14..L4 + 16].copy_from_slice(&64_000u16.to_be_bytes());
    } else {
        f[L4 + 4..L4 + 6].copy_from_slice(&8u16.to_be_bytes());
    }
    f
}

/// Gives a frame a source and the checksums that go with it.
pub(crate) fn come_from(f: &mut [u8], source: Ipv4Addr, port: u16) {
    f[IP + 12..IP + 16].copy_from_slice(&source.octets());
    f[L4..L4 + 2].copy_from_slice(&port.to_be_bytes());
    f[IP + 10..IP + 12].fill(0);
    let header = checksum(0, &f[IP..L4]);
    f[IP + 10..IP + 12].copy_from_slice(&header.to_be_bytes());
    // A datagram may do without; a segment may not.
    if f[IP + 9] == libc::IPPROTO_TCP as u8 {
        f[L4 + 16..L4 + 18].fill(0);
        let pseudo = u32::from(f[IP + 9]) + (f.len() - L4) as u32 + words(&f[IP + 12..L4]);
        let sum = checksum(pseudo, &f[L4..]);
        f[L4 + 16..L4 + 18].copy_from_slice(&sum.to_be_bytes());
    }
}

fn words(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w.get(1).copied().unwrap_or(0)]))).sum()
}

fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = start + words(bytes);
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn measure(count: u32, mut operation: impl FnMut() -> Result<()>) -> Result<Measured> {
    // To the nanosecond; getrusage is up to date to a tick.
    let cpu = || -> Result<f64> {
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        Ok(time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64)
    };
    let (start, start_cpu) = (Instant::now(), cpu()?);
    for _ in 0..count {
        operation()?;
    }
    let (wall, cpu) = (start.elapsed().as_nanos() as f64, cpu()? - start_cpu);
    Ok(Measured { cpu: cpu / f64::from(count), wall: wall / f64::from(count) })
}
