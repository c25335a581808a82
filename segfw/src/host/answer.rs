//! The answer to an inbound flow that a rule rejects: a TCP reset or a port unreachable, so that the peer fails at once
//! instead of waiting. Sent from the namespace and the very address the peer wrote to, so nothing is spoofed.
//!
//! The packets leave through raw sockets of this process: its own cgroup must be allowed raw sockets and egress of
//! TCP resets and ICMP errors by the hooks. An answer is a courtesy: one that is not sent is counted, never an error of
//! the policy.

use super::netns::{self, Namespace};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Answers per second, over all namespaces. What the kernel itself allows for ICMP (`icmp_msgs_per_sec`): enough for
/// every mistaken client, no help for a flood.
pub const ANSWERS_PER_SECOND: u32 = 1_000;

/// Namespaces with sockets kept open, at most two each; beyond it the longest unused is closed. A socket keeps its
/// namespace alive: call [`Answerer::retain`] after each survey.
pub const MAX_OPEN: usize = 256;

/// Hops: as the kernel's own answers (`ip_default_ttl`).
const HOPS: u8 = 64;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const IPV4_HEADER: usize = 20;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
/// RST and ACK (RFC 9293, 3.1).
const RST_ACK: u8 = 0x14;

/// Why a flow was not answered.
#[derive(Debug, thiserror::Error)]
pub enum NotAnswered {
    /// More than [`ANSWERS_PER_SECOND`].
    #[error("more than {ANSWERS_PER_SECOND} answers per second")]
    TooMany,
    /// Not unicast, of two families, or without a port: RFC 1122, 3.2.2 forbids an answer.
    #[error("{local} and {remote} are not the ends of a flow that may be answered")]
    Unsuitable { local: SocketAddr, remote: SocketAddr },
    /// No socket in the namespace.
    #[error(transparent)]
    Netns(#[from] netns::Error),
    /// The kernel would not send it.
    #[error("cannot send: {0}")]
    Send(#[source] io::Error),
}

/// What became of all requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub answered: u64,
    /// Over the rate limit.
    pub limited: u64,
    /// Multicast, broadcast, unspecified, port 0.
    pub unsuitable: u64,
    /// No socket, or the kernel refused.
    pub failed: u64,
}

#[derive(Debug)]
struct Sockets {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
    /// Number of the request that used them last.
    used: u64,
}

/// Sends answers; owns one raw socket per namespace and family.
#[derive(Debug)]
pub struct Answerer {
    sockets: HashMap<u64, Sockets>,
    bucket: Bucket,
    counts: Counts,
    requests: u64,
}

impl Default for Answerer {
    fn default() -> Self {
        Self::new(ANSWERS_PER_SECOND)
    }
}

impl Answerer {
    /// With a limit in answers per second; the burst is as large as the limit.
    pub fn new(per_second: u32) -> Self {
        Self {
            sockets: HashMap::new(),
            bucket: Bucket::new(per_second, Instant::now()),
            counts: Counts::default(),
            requests: 0,
        }
    }

    /// Answers a SYN with RST|ACK: the peer's `connect` fails with `ECONNREFUSED`. `seq` is the SYN's sequence number
    /// in host order; `local` is where it was sent to. A link-local `remote` needs its scope id.
    pub fn reset(
        &mut self,
        namespace: &Namespace,
        local: SocketAddr,
        remote: SocketAddr,
        seq: u32,
    ) -> Result<(), NotAnswered> {
        self.answer(namespace.cookie, namespace, local, remote, |ends| reset_packet(ends, seq))
    }

    /// Answers a datagram with port unreachable: a connected UDP socket gets `ECONNREFUSED`.
    pub fn unreachable(
        &mut self,
        namespace: &Namespace,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Result<(), NotAnswered> {
        self.answer(namespace.cookie, namespace, local, remote, unreachable_packet)
    }

    /// Closes the sockets of all namespaces but these (by cookie), so that the rest can end.
    pub fn retain(&mut self, live: &BTreeSet<u64>) {
        self.sockets.retain(|cookie, _| live.contains(cookie));
    }

    /// What became of all requests so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn answer(
        &mut self,
        cookie: u64,
        namespace: impl AsFd,
        local: SocketAddr,
        remote: SocketAddr,
        packet: impl FnOnce(Ends) -> Vec<u8>,
    ) -> Result<(), NotAnswered> {
        let Some(ends) = Ends::new(local, remote) else {
            self.counts.unsuitable += 1;
            return Err(NotAnswered::Unsuitable { local, remote });
        };
        if !self.bucket.take(Instant::now()) {
            self.counts.limited += 1;
            return Err(NotAnswered::TooMany);
        }
        let result = self.send(cookie, namespace, ends, &packet(ends));
        match result {
            Ok(()) => self.counts.answered += 1,
            Err(_) => self.counts.failed += 1,
        }
        result
    }

    fn send(&mut self, cookie: u64, namespace: impl AsFd, ends: Ends, packet: &[u8]) -> Result<(), NotAnswered> {
        self.requests += 1;
        if !self.sockets.contains_key(&cookie) && self.sockets.len() >= MAX_OPEN {
            let oldest = self.sockets.iter().min_by_key(|(_, s)| s.used).map(|(cookie, _)| *cookie);
            oldest.and_then(|cookie| self.sockets.remove(&cookie));
        }
        let sockets = self.sockets.entry(cookie).or_insert(Sockets { v4: None, v6: None, used: 0 });
        sockets.used = self.requests;
        let (slot, family) = match ends {
            Ends::V4 { .. } => (&mut sockets.v4, AddressFamily::Inet),
            Ends::V6 { .. } => (&mut sockets.v6, AddressFamily::Inet6),
        };
        let socket = match slot {
            Some(socket) => socket,
            None => slot.insert(netns::in_netns(namespace, || raw_socket(family))?.map_err(NotAnswered::send)?),
        };
        let fd = socket.as_raw_fd();
        let sent = match ends {
            Ends::V4 { remote, .. } => {
                sendto(fd, packet, &SockaddrIn::from(SocketAddrV4::new(*remote.ip(), 0)), MsgFlags::MSG_DONTWAIT)
            }
            // Port 0: the protocol of the socket (net/ipv6/raw.c, `rawv6_sendmsg`).
            Ends::V6 { remote, .. } => {
                let to = SocketAddrV6::new(*remote.ip(), 0, 0, remote.scope_id());
                sendto(fd, packet, &SockaddrIn6::from(to), MsgFlags::MSG_DONTWAIT)
            }
        };
        sent.map(|_| ()).map_err(NotAnswered::send)
    }
}

impl NotAnswered {
    fn send(errno: Errno) -> Self {
        Self::Send(errno.into())
    }
}

/// `IPPROTO_RAW` in either family: sends only, and the packet brings its own IP header (net/ipv4/af_inet.c and
/// net/ipv6/af_inet6.c set `hdrincl`).
fn raw_socket(family: AddressFamily) -> Result<OwnedFd, Errno> {
    socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
}

/// Two ends of one family, unicast, with ports; mapped addresses are IPv4.
#[derive(Clone, Copy, Debug)]
enum Ends {
    V4 { local: SocketAddrV4, remote: SocketAddrV4 },
    V6 { local: SocketAddrV6, remote: SocketAddrV6 },
}

impl Ends {
    fn new(local: SocketAddr, remote: SocketAddr) -> Option<Self> {
        let canonical = |a: SocketAddr| match (a.ip().to_canonical(), a) {
            (IpAddr::V4(v4), _) => SocketAddr::V4(SocketAddrV4::new(v4, a.port())),
            (IpAddr::V6(_), a) => a,
        };
        let unicast = |a: SocketAddr| {
            let ip = a.ip();
            a.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && ip != IpAddr::V4(Ipv4Addr::BROADCAST)
        };
        let (local, remote) = (canonical(local), canonical(remote));
        match (local, remote) {
            _ if !unicast(local) || !unicast(remote) => None,
            (SocketAddr::V4(local), SocketAddr::V4(remote)) => Some(Self::V4 { local, remote }),
            (SocketAddr::V6(local), SocketAddr::V6(remote)) => Some(Self::V6 { local, remote }),
            (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => None,
        }
    }

    fn ports(self) -> (u16, u16) {
        match self {
            Self::V4 { local, remote } => (local.port(), remote.port()),
            Self::V6 { local, remote } => (local.port(), remote.port()),
        }
    }

    /// An IP header from local to remote and the payload; `checksum_at` is where in the payload the checksum over
    /// pseudo header and payload belongs.
    fn packet(self, protocol: u8, mut payload: Vec<u8>, checksum_at: usize) -> Vec<u8> {
        let mut sum = Sum::default();
        // ICMP of version 4 alone has no pseudo header.
        if protocol != ICMP {
            match self {
                Self::V4 { local, remote } => sum.add(&local.ip().octets()).add(&remote.ip().octets()),
                Self::V6 { local, remote } => sum.add(&local.ip().octets()).add(&remote.ip().octets()),
            };
            sum.add(&(payload.len() as u32).to_be_bytes()).add(&u32::from(protocol).to_be_bytes());
        }
        sum.add(&payload);
        payload[checksum_at..checksum_at + 2].copy_from_slice(&sum.finish());
        let mut packet = match self {
            Self::V4 { local, remote } => ipv4_header(*local.ip(), *remote.ip(), protocol, payload.len()),
            Self::V6 { local, remote } => ipv6_header(*local.ip(), *remote.ip(), protocol, payload.len()),
        };
        packet.append(&mut payload);
        packet
    }
}

/// RFC 9293, 3.10.7.1: to a SYN, sequence 0 and acknowledgement of the SYN.
fn reset_packet(ends: Ends, seq: u32) -> Vec<u8> {
    let (local, remote) = ends.ports();
    let mut tcp = Vec::with_capacity(TCP_HEADER);
    tcp.extend(local.to_be_bytes());
    tcp.extend(remote.to_be_bytes());
    tcp.extend(0_u32.to_be_bytes());
    tcp.extend(seq.wrapping_add(1).to_be_bytes());
    tcp.extend([((TCP_HEADER / 4) << 4) as u8, RST_ACK]);
    // Window, checksum, urgent pointer.
    tcp.extend([0; 6]);
    ends.packet(TCP, tcp, 16)
}

/// RFC 792 type 3 code 3, RFC 4443 type 1 code 4; behind it the datagram's IP and UDP headers, rebuilt: the peer's
/// kernel reads addresses and ports in them and nothing else.
fn unreachable_packet(ends: Ends) -> Vec<u8> {
    let (local, remote) = ends.ports();
    let (kind, mut icmp, original) = match ends {
        Ends::V4 { local, remote } => (ICMP, vec![3, 3], ipv4_header(*remote.ip(), *local.ip(), UDP, UDP_HEADER)),
        Ends::V6 { local, remote } => (ICMPV6, vec![1, 4], ipv6_header(*remote.ip(), *local.ip(), UDP, UDP_HEADER)),
    };
    // Checksum, unused.
    icmp.extend([0; 6]);
    icmp.extend(original);
    icmp.extend(remote.to_be_bytes());
    icmp.extend(local.to_be_bytes());
    icmp.extend((UDP_HEADER as u16).to_be_bytes());
    icmp.extend([0; 2]);
    ends.packet(kind, icmp, 2)
}

/// RFC 791, without options, not to be fragmented.
fn ipv4_header(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: usize) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend(((IPV4_HEADER + payload) as u16).to_be_bytes());
    header.extend([0, 0, 0x40, 0, HOPS, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let mut sum = Sum::default();
    sum.add(&header);
    header[10..12].copy_from_slice(&sum.finish());
    header
}

/// RFC 8200, without extension headers.
fn ipv6_header(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: usize) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0];
    header.extend((payload as u16).to_be_bytes());
    header.extend([next, HOPS]);
    header.extend(from.octets());
    header.extend(to.octets());
    header
}

/// The Internet checksum (RFC 1071). Every part but the last must be of even length.
#[derive(Default)]
struct Sum(u32);

impl Sum {
    fn add(&mut self, bytes: &[u8]) -> &mut Self {
        for pair in bytes.chunks(2) {
            self.0 += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        self
    }

    /// In network order.
    fn finish(&self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        (!(sum as u16)).to_be_bytes()
    }
}

/// A token bucket; tokens are answers, `filled` is when it was last looked at.
#[derive(Debug)]
struct Bucket {
    per_second: u32,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn new(per_second: u32, now: Instant) -> Self {
        Self { per_second, tokens: f64::from(per_second), filled: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let passed: Duration = now.saturating_duration_since(self.filled);
        self.filled = now;
        let rate = f64::from(self.per_second);
        self.tokens = (self.tokens + passed.as_secs_f64() * rate).min(rate);
        let taken = self.tokens >= 1.0;
        if taken {
            self.tokens -= 1.0;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::FromRawFd;
    use std::thread;

    /// The socket takes part in look-ups but nothing ever reaches it, as if a hook dropped it all.
    fn drop_everything(socket: impl AsFd) {
        // `BPF_RET | BPF_K`, 0: keep no byte.
        let mut code = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 };
        let program = libc::sock_fprog { len: 1, filter: &raw mut code };
        // SAFETY: `program` points to one instruction; the kernel copies both.
        let result = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        assert_eq!(result, 0);
    }

    /// A packet socket that gives IP packets of every interface.
    fn sniffer() -> OwnedFd {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no pointers; the descriptor is new and nobody else owns it.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, i32::from(all));
            assert!(fd >= 0);
            OwnedFd::from_raw_fd(fd)
        };
        let wait = nix::sys::time::TimeVal::new(5, 0);
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &wait).unwrap();
        fd
    }

    /// Waits for a SYN to this port: source port and sequence number.
    fn next_syn(sniffer: &OwnedFd, port: u16) -> (u16, u32) {
        let mut packet = [0; 256];
        loop {
            let length = nix::sys::socket::recv(sniffer.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
            let (protocol, header) = if packet[0] >> 4 == 4 { (packet[9], 20) } else { (packet[6], 40) };
            let tcp = &packet[header..];
            let number = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
            if length >= header + 20 && protocol == TCP && number(2) == port && tcp[13] & 0x12 == 0x02 {
                return (number(0), u32::from_be_bytes(tcp[4..8].try_into().unwrap()));
            }
        }
    }

    fn check(server: &testing::Namespace, client: &testing::Namespace, address: &str) {
        let ip: IpAddr = address.parse().unwrap();
        let cookie = server.run(|| netns::current_cookie().unwrap());
        let mut answerer = Answerer::default();

        let (listener, sniffer) = server.run(|| (TcpListener::bind((ip, 0)).unwrap(), sniffer()));
        drop_everything(&listener);
        let local = listener.local_addr().unwrap();
        thread::scope(|scope| {
            let connect = scope.spawn(|| {
                client.run(|| TcpStream::connect_timeout(&local, Duration::from_secs(10))).unwrap_err().kind()
            });
            let (port, seq) = next_syn(&sniffer, local.port());
            // From here: a new cable may swallow the first SYN while the neighbour is looked up.
            let begin = Instant::now();
            // The peer's address: the other end of the cable, or the same machine.
            let peer = if ip.is_loopback() {
                address.to_owned()
            } else {
                address.replace(".2.2", ".2.1").replace("::2", "::1")
            };
            let remote = SocketAddr::new(peer.parse().unwrap(), port);
            answerer.answer(cookie, server, local, remote, |ends| reset_packet(ends, seq.wrapping_add(7))).unwrap();
            thread::sleep(Duration::from_millis(20));
            assert!(!connect.is_finished(), "a wrong sequence number must not end it");
            answerer.answer(cookie, server, local, remote, |ends| reset_packet(ends, seq)).unwrap();
            assert_eq!(connect.join().unwrap(), io::ErrorKind::ConnectionRefused, "{address}");
            let elapsed = begin.elapsed();
            assert!(elapsed < Duration::from_millis(900), "{address} after {elapsed:?}, not before the first retry");
        });

        let receiver = server.run(|| UdpSocket::bind((ip, 0)).unwrap());
        drop_everything(&receiver);
        let any = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let sender = client.run(|| UdpSocket::bind(any).unwrap());
        sender.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        sender.send(b"hello").unwrap();
        let (local, remote) = (receiver.local_addr().unwrap(), sender.local_addr().unwrap());
        answerer.answer(cookie, server, local, remote, unreachable_packet).unwrap();
        assert_eq!(sender.recv(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{address}");

        assert_eq!(answerer.counts(), Counts { answered: 3, ..Counts::default() });
        assert_eq!(answerer.sockets.len(), 1);
        answerer.retain(&BTreeSet::new());
        assert!(answerer.sockets.is_empty());
    }

    #[test]
    fn the_peer_fails_at_once() {
        if !testing::root("the_peer_fails_at_once") {
            return;
        }
        let (client, server) = testing::pair();
        check(&server, &client, "192.0.2.2");
        check(&server, &client, "2001:db8::2");
        check(&server, &server, "127.0.0.1");
        check(&server, &server, "::1");
    }

    #[test]
    fn packets_by_the_book() {
        let ends = |local: &str, remote: &str| Ends::new(local.parse().unwrap(), remote.parse().unwrap()).unwrap();
        let sum = |parts: &[&[u8]]| {
            parts
                .iter()
                .fold(Sum::default(), |mut sum, part| {
                    sum.add(part);
                    sum
                })
                .finish()
        };

        let packet = reset_packet(ends("192.0.2.2:443", "[::ffff:192.0.2.1]:40000"), u32::MAX);
        assert_eq!(packet.len(), 40);
        assert_eq!(sum(&[&packet[..20]]), [0, 0], "IP header");
        assert_eq!(sum(&[&packet[12..20], &[0, 6, 0, 20], &packet[20..]]), [0, 0], "TCP");
        assert_eq!(packet[28..32], [0; 4], "acknowledges u32::MAX + 1");
        assert_eq!(packet[20..24], [1, 187, 0x9c, 0x40]);

        let packet = unreachable_packet(ends("192.0.2.2:53", "192.0.2.1:40000"));
        assert_eq!(packet.len(), 56);
        assert_eq!(packet[20..22], [3, 3]);
        assert_eq!(sum(&[&packet[20..]]), [0, 0], "ICMP");
        assert_eq!(packet[40..48], [192, 0, 2, 1, 192, 0, 2, 2], "embedded: from the peer to us");
        assert_eq!(packet[48..52], [0x9c, 0x40, 0, 53]);

        let packet = unreachable_packet(ends("[2001:db8::2]:53", "[2001:db8::1]:40000"));
        assert_eq!(packet.len(), 40 + 8 + 40 + 8);
        assert_eq!(packet[40..42], [1, 4]);
        assert_eq!(sum(&[&packet[8..40], &[0, 56, 0, 58], &packet[40..]]), [0, 0], "ICMPv6");
    }

    #[test]
    fn only_unicast_flows_are_answered() {
        for (local, remote, expected) in [
            ("192.0.2.2:1", "192.0.2.1:2", true),
            ("[::ffff:192.0.2.2]:1", "192.0.2.1:2", true),
            ("[2001:db8::2]:1", "[fe80::1%3]:2", true),
            ("192.0.2.2:1", "[2001:db8::1]:2", false),
            ("192.0.2.2:0", "192.0.2.1:2", false),
            ("192.0.2.2:1", "192.0.2.1:0", false),
            ("255.255.255.255:1", "192.0.2.1:2", false),
            ("239.1.1.1:1", "192.0.2.1:2", false),
            ("[ff02::1]:1", "[2001:db8::1]:2", false),
            ("192.0.2.2:1", "0.0.0.0:2", false),
        ] {
            let ends = Ends::new(local.parse().unwrap(), remote.parse().unwrap());
            assert_eq!(ends.is_some(), expected, "{local} {remote}");
        }
    }

    #[test]
    fn a_flood_is_not_answered() {
        let begin = Instant::now();
        let mut bucket = Bucket::new(10, begin);
        assert_eq!((0..100).filter(|_| bucket.take(begin)).count(), 10);
        let later = begin + Duration::from_millis(350);
        assert_eq!((0..100).filter(|_| bucket.take(later)).count(), 3);
        let much_later = begin + Duration::from_secs(3_600);
        assert_eq!((0..100).filter(|_| bucket.take(much_later)).count(), 10);
        assert!(!bucket.take(begin), "a clock that stands still gives nothing");
    }
}
