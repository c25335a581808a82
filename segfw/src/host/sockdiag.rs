//! The sockets of a network namespace, and how to destroy one: `NETLINK_SOCK_DIAG`.
//!
//! Own code on purpose: `netlink-packet-sock-diag` 0.5 knows neither the cgroup attribute, nor raw, packet or vsock
//! sockets, and allocates several times per socket. Layouts are those of include/uapi/linux/{inet_diag,packet_diag,
//! vm_sockets_diag,sock_diag,netlink}.h; numbers are in host order unless a comment says otherwise.

use super::netns;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_REQ_PROTOCOL: u16 = 3;
const INET_DIAG_PROTOCOL: u16 = 10;
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_CGROUP_ID: u16 = 21;
const PACKET_SHOW_INFO: u32 = 1;
const PACKET_DIAG_INFO: u16 = 0;
const PACKET_DIAG_UID: u16 = 5;

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_req_v2` and `struct inet_diag_req_raw`.
const INET_REQUEST: usize = 56;
/// `struct inet_diag_sockid`.
const SOCKET_ID: usize = 48;
/// `struct inet_diag_msg`.
const INET_MESSAGE: usize = 4 + SOCKET_ID + 20;
/// `struct packet_diag_msg`.
const PACKET_MESSAGE: usize = 16;
/// `struct vsock_diag_msg`.
const VSOCK_MESSAGE: usize = 32;

/// One receive: the kernel fills dump messages up to 32 KiB (af_netlink.c, `netlink_recvmsg`), so this always fits.
const RECEIVE_BUFFER: usize = 64 * 1024;

/// Sockets in one dump: 1,048,576 of about 150 bytes. More is an error, not a silent cut.
pub const MAX_SOCKETS: usize = 1 << 20;

/// Requests in one datagram. Each is answered by one of about 1 KiB of kernel memory: 128 stay below the smallest
/// usual receive buffer (212,992 bytes).
const DESTROY_BATCH: usize = 128;

/// The kernel answers at once; a socket that stays silent must not hang the sweep.
const ANSWER_SECONDS_MAX: i64 = 5;

/// Protocols an inventory asks for; what the kernel has no diag module for is in [`Inventory::missing`].
const PROTOCOLS: [u16; 6] = [Sock::TCP, Sock::UDP, Sock::UDPLITE, Sock::SCTP, Sock::DCCP, Sock::MPTCP];

/// What goes wrong with a dump.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No diag module for this: nothing can be said about such sockets.
    #[error("the kernel cannot list {0} sockets (no diag module)")]
    Unsupported(What),
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] netns::Error),
    /// Anything else.
    #[error("sock_diag: {0}")]
    Io(#[from] io::Error),
    /// A kernel that speaks otherwise than its headers.
    #[error("sock_diag: message cut short")]
    Malformed,
    /// A table that is not ours to hold.
    #[error("more than {MAX_SOCKETS} sockets in one network namespace")]
    TooMany,
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Why a socket lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestroyError {
    /// `ENOENT`: it is closed already, or the address now belongs to another socket (the cookie differs). As a rule
    /// that is what one wanted.
    #[error("no such socket any more")]
    Gone,
    /// `EOPNOTSUPP`: kernel without `CONFIG_INET_DIAG_DESTROY`, or a kind of socket that cannot be destroyed (packet,
    /// vsock, MPTCP itself: destroy its subflows).
    #[error("this kernel cannot destroy such sockets (CONFIG_INET_DIAG_DESTROY is not set, or not for this protocol)")]
    Unsupported,
    /// `EPERM`.
    #[error("not permitted (needs CAP_NET_ADMIN in the user namespace that owns the network namespace)")]
    NotPermitted,
    /// Read from `/proc/net/raw`: no cookie, so nothing to name it by.
    #[error("the socket has no cookie (kernel without CONFIG_INET_RAW_DIAG)")]
    NoCookie,
    /// No answer within five seconds.
    #[error("the kernel did not answer")]
    NoAnswer,
    /// Anything else, by errno.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Other(i32),
}

impl DestroyError {
    fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOENT => Self::Gone,
            libc::EOPNOTSUPP => Self::Unsupported,
            libc::EPERM => Self::NotPermitted,
            libc::EAGAIN => Self::NoAnswer,
            other => Self::Other(other),
        }
    }
}

/// What a dump asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// IPv4 or IPv6 (`AF_INET`, `AF_INET6`), and the IP protocol number (262 = MPTCP). 255 = all raw sockets.
    Inet { v6: bool, protocol: u16 },
    /// `AF_PACKET`: frames past every cgroup hook.
    Packet,
    /// `AF_VSOCK`: to hypervisor or guests.
    Vsock,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet { v6, protocol } => {
                let name = match *protocol {
                    Sock::TCP => "TCP",
                    Sock::UDP => "UDP",
                    Sock::UDPLITE => "UDP-Lite",
                    Sock::SCTP => "SCTP",
                    Sock::DCCP => "DCCP",
                    Sock::MPTCP => "MPTCP",
                    Sock::RAW => "raw",
                    other => return write!(f, "IP protocol {other} ({})", if *v6 { "IPv6" } else { "IPv4" }),
                };
                write!(f, "{name} ({})", if *v6 { "IPv6" } else { "IPv4" })
            }
            Self::Packet => f.write_str("packet"),
            Self::Vsock => f.write_str("vsock"),
        }
    }
}

/// TCP's states (include/net/tcp_states.h); UDP and raw sockets use two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Established,
    SynSent,
    /// A request that has no socket of its own yet.
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    /// Not connected (UDP, raw), or bound and not yet anything (TCP).
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    /// A number this program does not know.
    Other(u8),
}

impl State {
    const fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::Established,
            2 => Self::SynSent,
            3 | 12 => Self::SynReceived,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 | 13 => Self::Close,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            other => Self::Other(other),
        }
    }
}

/// One internet socket.
#[derive(Clone, PartialEq, Eq)]
pub struct Sock {
    /// IP protocol number, 262 = MPTCP. Of a raw socket: the protocol it was opened for.
    pub protocol: u16,
    /// `SOCK_RAW`.
    pub raw: bool,
    /// True = `AF_INET6`. Such a socket may talk IPv4: then its addresses are mapped.
    pub v6: bool,
    /// An `AF_INET6` socket that refuses IPv4 (`IPV6_V6ONLY`); known for listening and unconnected sockets only.
    pub v6only: bool,
    pub state: State,
    /// As the kernel has it: mapped addresses stay mapped. [`Sock::canonical`] unmaps.
    pub local: SocketAddr,
    /// Unspecified and port 0 if not connected.
    pub remote: SocketAddr,
    /// Bound interface, 0 = none.
    pub interface: u32,
    /// `SO_COOKIE`, the same as `bpf_get_socket_cookie`; 0 = not known.
    pub cookie: u64,
    /// 0 for what has no file: requests, TIME_WAIT, connections nobody accepted yet.
    pub inode: u32,
    /// Effective user of the creator.
    pub uid: u32,
    /// Cgroup v2 it was born in. `None` for requests and TIME_WAIT, and below 5.8.
    pub cgroup: Option<u64>,
    /// `struct inet_diag_sockid` as it came: goes back unchanged to destroy it.
    id: [u8; SOCKET_ID],
}

impl Sock {
    pub const TCP: u16 = 6;
    pub const UDP: u16 = 17;
    pub const DCCP: u16 = 33;
    pub const SCTP: u16 = 132;
    pub const UDPLITE: u16 = 136;
    /// `IPPROTO_RAW`: in a request, all raw sockets.
    pub const RAW: u16 = 255;
    pub const MPTCP: u16 = 262;

    /// Local and remote end with mapped addresses written as IPv4, as the hooks see them. The wildcard `::` of a
    /// socket that also takes IPv4 stays `::`.
    pub fn canonical(&self) -> (SocketAddr, SocketAddr) {
        let canonical = |a: SocketAddr| match a.ip().to_canonical() {
            IpAddr::V4(v4) => SocketAddr::from((v4, a.port())),
            IpAddr::V6(_) => a,
        };
        (canonical(self.local), canonical(self.remote))
    }

    fn parse(message: &[u8], asked: u16) -> Result<Self, Error> {
        let (fixed, attributes) = message.split_at_checked(INET_MESSAGE).ok_or(Error::Malformed)?;
        let id: [u8; SOCKET_ID] = array(fixed, 4)?;
        let v6 = i32::from(fixed[0]) == libc::AF_INET6;
        let address = |at: usize, port: usize| -> Result<SocketAddr, Error> {
            let port = u16::from_be_bytes(array(&id, port)?);
            Ok(if v6 {
                SocketAddr::from((Ipv6Addr::from(array::<16>(&id, at)?), port))
            } else {
                SocketAddr::from((Ipv4Addr::from(array::<4>(&id, at)?), port))
            })
        };
        let mut sock = Self {
            protocol: asked,
            raw: asked == Self::RAW,
            v6,
            v6only: false,
            state: State::from_raw(fixed[1]),
            local: address(4, 0)?,
            remote: address(20, 2)?,
            interface: u32_at(&id, 36)?,
            cookie: u64::from(u32_at(&id, 40)?) | u64::from(u32_at(&id, 44)?) << 32,
            uid: u32_at(fixed, 64)?,
            inode: u32_at(fixed, 68)?,
            cgroup: None,
            id,
        };
        for (kind, value) in Attributes(attributes) {
            match kind {
                INET_DIAG_CGROUP_ID => sock.cgroup = array(value, 0).map(u64::from_ne_bytes).ok(),
                INET_DIAG_SKV6ONLY => sock.v6only = value.first().is_some_and(|v| *v != 0),
                INET_DIAG_PROTOCOL if sock.raw => sock.protocol = value.first().copied().map_or(asked, u16::from),
                _ => {}
            }
        }
        Ok(sock)
    }
}

impl fmt::Debug for Sock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            protocol,
            raw,
            v6: _,
            v6only: _,
            state,
            local,
            remote,
            interface: _,
            cookie,
            inode,
            uid,
            cgroup,
            id: _,
        } = self;
        let raw = if *raw { "raw " } else { "" };
        write!(
            f,
            "{raw}{protocol} {local} -> {remote} {state:?} cookie {cookie} inode {inode} uid {uid} cgroup {cgroup:?}"
        )
    }
}

/// One packet socket. Its cgroup is not told: [`super::proc::socket_owners`] finds the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketSock {
    /// `SOCK_RAW` (3), `SOCK_DGRAM` (2) or `SOCK_PACKET` (10).
    pub kind: u8,
    /// EtherType, host order; 3 = all; 0 = sends only.
    pub ethertype: u16,
    /// Bound interface, 0 = any.
    pub interface: u32,
    pub cookie: u64,
    pub inode: u32,
    /// User of the opener, if told.
    pub uid: Option<u32>,
}

/// One vsock socket. The dump is of the whole machine, not of one namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockSock {
    pub state: State,
    /// Context id and port.
    pub local: (u32, u32),
    /// Context id and port.
    pub remote: (u32, u32),
    pub inode: u32,
    pub cookie: u64,
}

/// All sockets of one namespace that could be listed.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    pub inet: Vec<Sock>,
    pub packet: Vec<PacketSock>,
    pub vsock: Vec<VsockSock>,
    /// What the kernel cannot list; such sockets may exist and are not here. Raw ones are then read from
    /// `/proc/net/raw` (without cookie and cgroup) and not in this list.
    pub missing: Vec<What>,
}

/// A `NETLINK_SOCK_DIAG` socket of one namespace. It keeps the namespace alive: do not store it.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Diag {
    /// Opens one in the given namespace.
    pub fn open(namespace: impl AsFd) -> Result<Self, Error> {
        netns::in_netns(namespace, Self::open_here)?
    }

    /// Opens one in the namespace of the calling thread.
    pub fn open_here() -> Result<Self, Error> {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
        // Only the kernel (port 0) may answer.
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_SECONDS_MAX, 0))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_BUFFER] })
    }

    /// Internet sockets of one family and protocol, in every state.
    pub fn inet(&mut self, v6: bool, protocol: u16) -> Result<Vec<Sock>, Error> {
        self.inet_in(v6, protocol, u32::MAX)
    }

    /// TCP sockets of one family that listen: the kernel then leaves out its table of connections, which has hundreds of
    /// thousands of places to look at however few are taken.
    pub fn listeners(&mut self, v6: bool) -> Result<Vec<Sock>, Error> {
        self.inet_in(v6, Sock::TCP, 1 << LISTEN)
    }

    fn inet_in(&mut self, v6: bool, protocol: u16, states: u32) -> Result<Vec<Sock>, Error> {
        let what = What::Inet { v6, protocol };
        let mut request = inet_request(v6, protocol, 0, &[0; SOCKET_ID]);
        request[STATES..STATES + 4].copy_from_slice(&states.to_ne_bytes());
        let mut found = Vec::new();
        self.dump(what, &request, |message| {
            if found.len() >= MAX_SOCKETS {
                return Err(Error::TooMany);
            }
            found.push(Sock::parse(message, protocol)?);
            Ok(())
        })?;
        Ok(found)
    }

    /// Packet sockets.
    pub fn packet(&mut self) -> Result<Vec<PacketSock>, Error> {
        let mut request = [0; 20];
        request[0] = libc::AF_PACKET as u8;
        request[8..12].copy_from_slice(&PACKET_SHOW_INFO.to_ne_bytes());
        let mut found = Vec::new();
        self.dump(What::Packet, &request, |message| {
            if found.len() >= MAX_SOCKETS {
                return Err(Error::TooMany);
            }
            found.push(parse_packet(message)?);
            Ok(())
        })?;
        Ok(found)
    }

    /// Vsock sockets.
    pub fn vsock(&mut self) -> Result<Vec<VsockSock>, Error> {
        let mut request = [0; 24];
        request[0] = libc::AF_VSOCK as u8;
        request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        let mut found = Vec::new();
        self.dump(What::Vsock, &request, |message| {
            if found.len() >= MAX_SOCKETS {
                return Err(Error::TooMany);
            }
            found.push(parse_vsock(message)?);
            Ok(())
        })?;
        Ok(found)
    }

    /// Everything. An error only where a dump failed that the kernel does offer.
    pub fn inventory(&mut self) -> Result<Inventory, Error> {
        let mut inventory = Inventory::default();
        for v6 in [false, true] {
            for protocol in PROTOCOLS {
                if let Some(mut found) = offered(self.inet(v6, protocol), &mut inventory.missing)? {
                    inventory.inet.append(&mut found);
                }
            }
            match self.inet(v6, Sock::RAW) {
                Ok(mut found) => inventory.inet.append(&mut found),
                Err(Error::Unsupported(what)) => match netns::in_netns_of(&self.socket, || raw_from_proc(v6)) {
                    Ok(Ok(mut found)) => inventory.inet.append(&mut found),
                    Ok(Err(_)) | Err(_) => inventory.missing.push(what),
                },
                Err(error) => return Err(error),
            }
        }
        inventory.packet = offered(self.packet(), &mut inventory.missing)?.unwrap_or_default();
        inventory.vsock = offered(self.vsock(), &mut inventory.missing)?.unwrap_or_default();
        Ok(inventory)
    }

    /// Destroys one socket: the application sees `ECONNABORTED`, the peer a RST (established TCP). Of a listener the
    /// children that nobody accepted yet go with it. Cookie and addresses must both match, so never another one dies.
    /// Of UDP only connected sockets are worth it: an unconnected one gets an error, and may lose a port that it did
    /// not bind explicitly (net/ipv4/udp.c, `udp_abort`); change the verdict instead.
    pub fn destroy(&mut self, sock: &Sock) -> Result<(), DestroyError> {
        self.destroy_all(std::slice::from_ref(sock)).pop().unwrap_or(Err(DestroyError::NoAnswer))
    }

    /// Destroys many; the results are in the order of the sockets.
    pub fn destroy_all<'a>(&mut self, socks: impl IntoIterator<Item = &'a Sock>) -> Vec<Result<(), DestroyError>> {
        let socks: Vec<&Sock> = socks.into_iter().collect();
        let mut results = Vec::with_capacity(socks.len());
        for batch in socks.chunks(DESTROY_BATCH) {
            let mut batch_results = vec![Err(DestroyError::NoAnswer); batch.len()];
            if let Err(errno) = self.destroy_batch(batch, &mut batch_results) {
                // Those that were answered keep their answer.
                for result in batch_results.iter_mut().filter(|r| **r == Err(DestroyError::NoAnswer)) {
                    *result = Err(DestroyError::from_errno(errno as i32));
                }
            }
            results.append(&mut batch_results);
        }
        results
    }

    fn destroy_batch(&mut self, socks: &[&Sock], results: &mut [Result<(), DestroyError>]) -> Result<(), Errno> {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let first = self.sequence.wrapping_add(1);
        let mut out = Vec::with_capacity(socks.len() * (HEADER + INET_REQUEST + 8));
        let mut waiting = 0;
        for (sock, result) in socks.iter().zip(results.iter_mut()) {
            self.sequence = self.sequence.wrapping_add(1);
            if sock.cookie == 0 {
                *result = Err(DestroyError::NoCookie);
                continue;
            }
            let request = if sock.raw {
                inet_request(sock.v6, Sock::RAW, sock.protocol as u8, &sock.id)
            } else {
                inet_request(sock.v6, sock.protocol, 0, &sock.id)
            };
            frame(&mut out, SOCK_DESTROY, flags, self.sequence, &request);
            waiting += 1;
        }
        if waiting == 0 {
            return Ok(());
        }
        send(self.socket.as_raw_fd(), &out, MsgFlags::empty())?;
        while waiting > 0 {
            let length = retry(|| recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()))?;
            for message in Messages(self.buffer.get(..length).unwrap_or_default()) {
                let Some(result) = results.get_mut(message.sequence.wrapping_sub(first) as usize) else { continue };
                if i32::from(message.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                *result = match message.errno() {
                    0 => Ok(()),
                    errno => Err(DestroyError::from_errno(errno)),
                };
                waiting -= 1;
            }
        }
        Ok(())
    }

    /// Sends one dump request and gives every message's payload to `each`, without copying it.
    fn dump(
        &mut self,
        what: What,
        request: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut out = Vec::with_capacity(HEADER + request.len());
        frame(&mut out, SOCK_DIAG_BY_FAMILY, (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16, self.sequence, request);
        send(self.socket.as_raw_fd(), &out, MsgFlags::empty())?;
        // The first error; the rest of the dump is read all the same, so that the socket can be used again.
        let mut failed = None;
        loop {
            let length = retry(|| recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC))?;
            let Some(bytes) = self.buffer.get(..length) else { return Err(Error::Malformed) };
            for message in Messages(bytes).filter(|m| m.sequence == self.sequence) {
                match i32::from(message.kind) {
                    kind @ (libc::NLMSG_DONE | libc::NLMSG_ERROR) => {
                        return match (failed, message.errno()) {
                            (Some(error), _) => Err(error),
                            (None, 0) => Ok(()),
                            // No module for the family or the protocol: ENOENT, or EINVAL from MPTCP-less kernels.
                            (None, libc::ENOENT | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => {
                                Err(Error::Unsupported(what))
                            }
                            (None, libc::EINVAL) if kind == libc::NLMSG_ERROR => Err(Error::Unsupported(what)),
                            (None, errno) => Err(io::Error::from_raw_os_error(errno).into()),
                        };
                    }
                    _ if failed.is_none() => failed = each(message.payload).err(),
                    _ => {}
                }
            }
        }
    }
}

/// Destroys one socket in a namespace.
pub fn destroy(namespace: impl AsFd, sock: &Sock) -> Result<(), DestroyError> {
    let mut diag = Diag::open(namespace).map_err(|error| match error {
        Error::Io(error) => DestroyError::from_errno(error.raw_os_error().unwrap_or(0)),
        Error::Netns(_) => DestroyError::NotPermitted,
        Error::Unsupported(_) => DestroyError::Unsupported,
        Error::Malformed | Error::TooMany => DestroyError::NoAnswer,
    })?;
    diag.destroy(sock)
}

/// `None` and a note for what the kernel does not offer.
fn offered<T>(result: Result<T, Error>, missing: &mut Vec<What>) -> Result<Option<T>, Error> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Error::Unsupported(what)) => {
            missing.push(what);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Raw sockets of the calling thread's namespace, for kernels without `CONFIG_INET_RAW_DIAG`. The port column holds
/// the protocol (net/ipv4/raw.c, `raw_sock_seq_show`).
fn raw_from_proc(v6: bool) -> io::Result<Vec<Sock>> {
    let text = fs::read_to_string(if v6 { "/proc/thread-self/net/raw6" } else { "/proc/thread-self/net/raw" })?;
    Ok(text.lines().skip(1).take(MAX_SOCKETS).filter_map(|line| parse_raw_line(line, v6)).collect())
}

fn parse_raw_line(line: &str, v6: bool) -> Option<Sock> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let end = |field: &str| -> Option<(IpAddr, u16)> {
        let (address, port) = field.split_once(':')?;
        // Words of 32 bits, each printed in host order.
        let words: Option<Vec<[u8; 4]>> = (0..address.len() / 8)
            .map(|i| u32::from_str_radix(address.get(i * 8..i * 8 + 8)?, 16).ok().map(u32::to_ne_bytes))
            .collect();
        let bytes = words?.concat();
        let ip = if v6 {
            IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)
        } else {
            IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)
        };
        Some((ip, u16::from_str_radix(port, 16).ok()?))
    };
    let (local, protocol) = end(fields.get(1)?)?;
    let (remote, _) = end(fields.get(2)?)?;
    Some(Sock {
        protocol,
        raw: true,
        v6,
        v6only: false,
        state: State::from_raw(u8::from_str_radix(fields.get(3)?, 16).ok()?),
        local: SocketAddr::from((local, 0)),
        remote: SocketAddr::from((remote, 0)),
        interface: 0,
        cookie: 0,
        inode: fields.get(9)?.parse().ok()?,
        uid: fields.get(7)?.parse().ok()?,
        cgroup: None,
        id: [0; SOCKET_ID],
    })
}

fn parse_packet(message: &[u8]) -> Result<PacketSock, Error> {
    let (fixed, attributes) = message.split_at_checked(PACKET_MESSAGE).ok_or(Error::Malformed)?;
    let mut sock = PacketSock {
        kind: fixed[1],
        ethertype: u16::from_ne_bytes(array(fixed, 2)?),
        interface: 0,
        cookie: u64::from(u32_at(fixed, 8)?) | u64::from(u32_at(fixed, 12)?) << 32,
        inode: u32_at(fixed, 4)?,
        uid: None,
    };
    for (kind, value) in Attributes(attributes) {
        match kind {
            PACKET_DIAG_INFO => sock.interface = u32_at(value, 0)?,
            PACKET_DIAG_UID => sock.uid = u32_at(value, 0).ok(),
            _ => {}
        }
    }
    Ok(sock)
}

fn parse_vsock(message: &[u8]) -> Result<VsockSock, Error> {
    let fixed = message.get(..VSOCK_MESSAGE).ok_or(Error::Malformed)?;
    Ok(VsockSock {
        state: State::from_raw(fixed[2]),
        local: (u32_at(fixed, 4)?, u32_at(fixed, 8)?),
        remote: (u32_at(fixed, 12)?, u32_at(fixed, 16)?),
        inode: u32_at(fixed, 20)?,
        cookie: u64::from(u32_at(fixed, 24)?) | u64::from(u32_at(fixed, 28)?) << 32,
    })
}

/// `struct inet_diag_req_v2`, or `inet_diag_req_raw` with the protocol a raw socket was opened for. Protocols above 255
/// go as an attribute behind it (5.9).
/// Where a request says which states it asks for: one bit per TCP state.
const STATES: usize = 4;
/// `TCP_LISTEN` (include/net/tcp_states.h).
const LISTEN: u32 = 10;

fn inet_request(v6: bool, protocol: u16, raw_protocol: u8, id: &[u8; SOCKET_ID]) -> Vec<u8> {
    let mut out = Vec::with_capacity(INET_REQUEST + 8);
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    let short = u8::try_from(protocol).unwrap_or(Sock::RAW as u8);
    out.extend_from_slice(&[family as u8, short, 0, raw_protocol]);
    out.extend_from_slice(&u32::MAX.to_ne_bytes());
    out.extend_from_slice(id);
    if protocol > 255 {
        out.extend_from_slice(&8_u16.to_ne_bytes());
        out.extend_from_slice(&INET_DIAG_REQ_PROTOCOL.to_ne_bytes());
        out.extend_from_slice(&u32::from(protocol).to_ne_bytes());
    }
    out
}

/// Appends one netlink message. All our payloads are multiples of 4, so no padding.
fn frame(out: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, payload: &[u8]) {
    out.extend_from_slice(&((HEADER + payload.len()) as u32).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&sequence.to_ne_bytes());
    out.extend_from_slice(&0_u32.to_ne_bytes());
    out.extend_from_slice(payload);
}

struct Message<'a> {
    kind: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Message<'_> {
    /// Of `NLMSG_ERROR` and `NLMSG_DONE`: the errno, positive; 0 = success.
    fn errno(&self) -> i32 {
        array(self.payload, 0).map_or(0, |bytes| i32::from_ne_bytes(bytes).saturating_neg())
    }
}

/// Netlink messages in a datagram; ends at the first that is cut short.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;
    fn next(&mut self) -> Option<Self::Item> {
        let length = u32_at(self.0, 0).ok()? as usize;
        let payload = self.0.get(HEADER..length)?;
        let message =
            Message { kind: u16::from_ne_bytes(array(self.0, 4).ok()?), sequence: u32_at(self.0, 8).ok()?, payload };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

/// Attributes (type without flags, value) behind a message; ends at the first that is cut short.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);
    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(array(self.0, 0).ok()?));
        let kind = u16::from_ne_bytes(array(self.0, 2).ok()?) & libc::NLA_TYPE_MASK as u16;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Error> {
    bytes.get(at..at + N).and_then(|b| b.try_into().ok()).ok_or(Error::Malformed)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Error> {
    array(bytes, at).map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::super::{cgroup, proc};
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::path::Path;
    use std::time::Instant;

    fn raw_socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
        // SAFETY: no pointers; a result that is not negative is a new descriptor that nobody else owns.
        unsafe {
            let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(std::os::fd::FromRawFd::from_raw_fd(fd)) }
        }
    }

    fn cookie_of(socket: impl AsFd) -> u64 {
        let mut cookie = 0_u64;
        let mut length = 8;
        // SAFETY: both live through the call, and 8 is the size of `cookie`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        cookie
    }

    fn connected(address: &str) -> (TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        (listener, client, server)
    }

    fn find(socks: &[Sock], cookie: u64) -> &Sock {
        socks.iter().find(|s| s.cookie == cookie).unwrap_or_else(|| panic!("no cookie {cookie} in {socks:#?}"))
    }

    #[test]
    fn inventory_names_every_kind_of_socket() {
        if !testing::root("inventory_names_every_kind_of_socket") {
            return;
        }
        let own = proc::cgroup_of(std::process::id()).unwrap();
        let own = cgroup::id_of(&cgroup::Hierarchy::find().unwrap().directory(Path::new(&own))).unwrap();
        let namespace = testing::Namespace::new();
        let (listener, client, server) = namespace.run(|| connected("127.0.0.1:0"));
        let dual = namespace.run(|| TcpListener::bind("[::]:0").unwrap());
        let port = dual.local_addr().unwrap().port();
        let mapped = namespace.run(|| TcpStream::connect(("127.0.0.1", port)).unwrap());
        let (mapped_server, _) = dual.accept().unwrap();
        let udp = namespace.run(|| UdpSocket::bind("[::1]:0").unwrap());
        udp.connect("[::1]:9").unwrap();
        let raw = namespace.run(|| raw_socket(libc::AF_INET, libc::SOCK_RAW, 89).unwrap());
        let packet = namespace.run(|| raw_socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(3_u16.to_be())).unwrap());
        let mptcp = namespace.run(|| {
            let socket = raw_socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP).ok()?;
            let address = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
            nix::sys::socket::bind(socket.as_raw_fd(), &address).unwrap();
            nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
            Some(socket)
        });

        let inventory = Diag::open(&namespace).unwrap().inventory().unwrap();
        println!(
            "not listed by this kernel: {}",
            inventory.missing.iter().map(What::to_string).collect::<Vec<_>>().join(", ")
        );
        let inet = &inventory.inet;
        let found = find(inet, cookie_of(&listener));
        assert_eq!((found.protocol, found.state, found.cgroup), (Sock::TCP, State::Listen, Some(own)));
        assert_eq!(found.local, listener.local_addr().unwrap());
        let found = find(inet, cookie_of(&client));
        assert_eq!((found.local, found.remote), (client.local_addr().unwrap(), client.peer_addr().unwrap()));
        assert_eq!((found.state, found.v6, found.cgroup), (State::Established, false, Some(own)));
        assert_eq!(u64::from(found.inode), nix::sys::stat::fstat(&client).unwrap().st_ino);
        assert_eq!(find(inet, cookie_of(&server)).cgroup, Some(own));
        assert!(!find(inet, cookie_of(&dual)).v6only);

        let found = find(inet, cookie_of(&mapped_server));
        assert!(found.v6 && found.local.is_ipv6());
        assert_eq!(found.canonical(), (mapped.peer_addr().unwrap(), mapped.local_addr().unwrap()));
        let found = find(inet, cookie_of(&udp));
        assert_eq!((found.protocol, found.remote.port(), found.cgroup), (Sock::UDP, 9, Some(own)));

        let inode = nix::sys::stat::fstat(&raw).unwrap().st_ino;
        let found = inet.iter().find(|s| u64::from(s.inode) == inode).unwrap();
        assert!(found.raw && !found.v6);
        assert_eq!(found.protocol, 89);
        let [found] = &inventory.packet[..] else { panic!("{:?}", inventory.packet) };
        assert_eq!((found.cookie, found.kind, found.ethertype), (cookie_of(&packet), 3, 3));
        assert_eq!(found.uid, Some(0));
        if let Some(mptcp) = mptcp {
            assert_eq!(find(inet, cookie_of(&mptcp)).protocol, Sock::MPTCP);
        }
    }

    #[test]
    fn destroyed_connections_end_at_both_sides() {
        if !testing::root("destroyed_connections_end_at_both_sides") {
            return;
        }
        let namespace = testing::Namespace::new();
        for (bind, v6) in [("127.0.0.1:0", false), ("[::1]:0", true), ("[::ffff:127.0.0.1]:0", true)] {
            let (_listener, mut client, mut server) = namespace.run(|| connected(bind));
            let mut diag = Diag::open(&namespace).unwrap();
            let sock = find(&diag.inet(v6, Sock::TCP).unwrap(), cookie_of(&server)).clone();
            let mut stranger = sock.clone();
            stranger.id[40] ^= 1;
            assert_eq!(diag.destroy(&stranger), Err(DestroyError::Gone), "another cookie");
            server.write_all(b"alive").unwrap();
            client.read_exact(&mut [0; 5]).unwrap();

            assert_eq!(diag.destroy(&sock), Ok(()), "{bind}");
            assert_eq!(server.read(&mut [0]).unwrap_err().raw_os_error(), Some(libc::ECONNABORTED));
            assert_eq!(client.read(&mut [0]).unwrap_err().raw_os_error(), Some(libc::ECONNRESET));
            assert_eq!(destroy(&namespace, &sock), Err(DestroyError::Gone));
        }
    }

    #[test]
    fn destroys_listeners_and_connected_udp() {
        if !testing::root("destroys_listeners_and_connected_udp") {
            return;
        }
        let namespace = testing::Namespace::new();
        let mut diag = Diag::open(&namespace).unwrap();
        let (listener, udp) = namespace.run(|| {
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            udp.connect("127.0.0.1:9").unwrap();
            (TcpListener::bind("[::]:0").unwrap(), udp)
        });
        let mut socks = diag.inet(true, Sock::TCP).unwrap();
        socks.append(&mut diag.inet(false, Sock::UDP).unwrap());
        let all = [find(&socks, cookie_of(&listener)), find(&socks, cookie_of(&udp))];
        assert_eq!(diag.destroy_all(all), [Ok(()), Ok(())]);
        assert!(listener.accept().is_err());
        assert_eq!(udp.recv(&mut [0]).unwrap_err().raw_os_error(), Some(libc::ECONNABORTED));
    }

    #[test]
    fn thousands_in_milliseconds() {
        if !testing::root("thousands_in_milliseconds") {
            return;
        }
        let namespace = testing::Namespace::new();
        let (sockets, connections) = namespace.run(|| {
            let sockets: Vec<_> = (0..4_000).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
            let connections: Vec<_> = (0..300).map(|_| connected("127.0.0.1:0")).collect();
            (sockets, connections)
        });
        let mut diag = Diag::open(&namespace).unwrap();
        let begin = Instant::now();
        let found = diag.inet(false, Sock::UDP).unwrap();
        println!("{} sockets listed in {:?}", found.len(), begin.elapsed());
        assert_eq!(found.len(), sockets.len());

        let found = diag.inet(false, Sock::TCP).unwrap();
        let servers: Vec<&Sock> = connections.iter().map(|(_, _, server)| find(&found, cookie_of(server))).collect();
        let begin = Instant::now();
        let results = diag.destroy_all(servers.iter().copied());
        println!("{} connections destroyed in {:?}", results.len(), begin.elapsed());
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        assert!(diag.destroy_all(servers).iter().all(|r| *r == Err(DestroyError::Gone)));
    }

    #[test]
    fn a_user_without_rights_is_told_so() {
        if !testing::root("a_user_without_rights_is_told_so") {
            return;
        }
        let namespace = testing::Namespace::new();
        let listener = namespace.run(|| TcpListener::bind("127.0.0.1:0").unwrap());
        let result = namespace.run(|| {
            let mut diag = Diag::open_here().unwrap();
            let found = diag.inet(false, Sock::TCP).unwrap();
            // SAFETY: plain numbers; the raw call changes this thread only, which ends with the closure.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, 65_534, -1) }, 0);
            let mut diag = Diag::open_here().unwrap();
            diag.destroy(find(&found, cookie_of(&listener)))
        });
        assert_eq!(result, Err(DestroyError::NotPermitted));
    }

    #[test]
    fn reads_proc_net_raw() {
        let line =
            "  89: 0100007F:0059 00000000:0000 07 00000000:00000000 00:00000000 00000000     7        0 4711 2 0 0";
        let sock = parse_raw_line(line, false).unwrap();
        assert_eq!((sock.protocol, sock.inode, sock.uid, sock.state), (89, 4_711, 7, State::Close));
        #[cfg(target_endian = "little")]
        assert_eq!(sock.local.ip(), Ipv4Addr::LOCALHOST);
        let line = "  58: 00000000000000000000000001000000:003A \
             00000000000000000000000000000000:0000 07 0:0 00:0 0 0 0 12 2 0 0";
        let sock = parse_raw_line(line, true).unwrap();
        assert_eq!(sock.protocol, 58);
        #[cfg(target_endian = "little")]
        assert_eq!(sock.local.ip(), Ipv6Addr::LOCALHOST);
        assert!(parse_raw_line("  58: 00", true).is_none());
        assert!(parse_raw_line("", false).is_none());
    }

    #[test]
    fn short_messages_are_errors_not_panics() {
        let mut message = vec![libc::AF_INET6 as u8, 10, 0, 0];
        message.extend(0..68);
        message.extend(12_u16.to_ne_bytes());
        message.extend(INET_DIAG_CGROUP_ID.to_ne_bytes());
        message.extend(77_u64.to_ne_bytes());
        let sock = Sock::parse(&message, Sock::TCP).unwrap();
        assert_eq!((sock.cgroup, sock.state, sock.local.port()), (Some(77), State::Listen, 0x0001));
        assert_eq!(sock.remote.port(), 0x0203);
        assert_eq!(sock.local.ip().to_string(), "405:607:809:a0b:c0d:e0f:1011:1213");
        for length in 0..INET_MESSAGE {
            assert!(matches!(Sock::parse(&message[..length], Sock::TCP), Err(Error::Malformed)));
        }
        for length in INET_MESSAGE..message.len() {
            assert_eq!(Sock::parse(&message[..length], Sock::TCP).unwrap().cgroup, None);
        }
        assert!(parse_packet(&message[..15]).is_err());
        assert!(parse_vsock(&message[..31]).is_err());
        let vsock = parse_vsock(&message[4..36]).unwrap();
        assert_eq!(vsock.local, (u32::from_ne_bytes([4, 5, 6, 7]), u32::from_ne_bytes([8, 9, 10, 11])));

        let mut framed = Vec::new();
        frame(&mut framed, 2, 0, 5, &(-libc::EPERM).to_ne_bytes());
        frame(&mut framed, 20, 0, 6, &[1, 2, 3, 4]);
        let all: Vec<_> = Messages(&framed).map(|m| (m.kind, m.sequence, m.errno())).collect();
        assert_eq!(all[0], (2, 5, libc::EPERM));
        assert_eq!(all.len(), 2);
        for length in 0..framed.len() {
            assert!(Messages(&framed[..length]).count() < 2);
        }
        // A length of zero must not loop.
        assert_eq!(Messages(&[0; 64]).count(), 0);
        assert_eq!(Attributes(&[0; 64]).count(), 0);
    }
}
