//! What a test says to an actor and what it hears back: one JSON value per line each way.

use serde::{Deserialize, Serialize};

/// One order. Close to the system calls on purpose: what a row does must be readable in the row.
/// `h` is a handle that an earlier answer gave.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Cmd {
    /// `socket(2)`, non-blocking.
    Socket { domain: i32, kind: i32, proto: i32 },
    /// `setsockopt(2)` with raw bytes.
    SetOpt { h: u32, level: i32, name: i32, value: Vec<u8> },
    /// `bind(2)`.
    Bind { h: u32, addr: String },
    /// `listen(2)`.
    Listen { h: u32, backlog: i32 },
    /// `accept(2)`; the answer has a new handle and the peer.
    Accept { h: u32, ms: u64 },
    /// `connect(2)`, then waits until it is decided.
    Connect { h: u32, addr: String, ms: u64 },
    /// `connect(2)` to nowhere (`AF_UNSPEC`): what dissolves the association of a UDP socket.
    Disconnect { h: u32 },
    /// `send(2)`.
    Send { h: u32, data: String, flags: i32 },
    /// `sendto(2)`; with `MSG_FASTOPEN` waits until the connection is decided.
    SendTo { h: u32, addr: String, data: String, flags: i32, ms: u64 },
    /// `sendmmsg(2)`: all datagrams in one call; `n` of the answer = how many went out.
    SendMmsg { h: u32, list: Vec<(String, String)> },
    /// `recvfrom(2)`.
    Recv { h: u32, ms: u64 },
    /// `SO_ERROR`.
    SoError { h: u32 },
    /// The local address.
    LocalAddr { h: u32 },
    /// `IORING_OP_CONNECT`.
    UringConnect { h: u32, addr: String, ms: u64 },
    /// `IORING_OP_SENDMSG`, with a destination if there is one.
    UringSend { h: u32, addr: Option<String>, data: String },
    /// A UDP datagram made by hand: by a raw IPv4 (HDRINCL), a raw IPv6 or a packet socket.
    RawUdp { h: u32, src: String, dst: String, data: String },
    /// ICMP echo by a ping or raw socket; `ok` = the reply came.
    Ping { h: u32, addr: String, ms: u64 },
    /// Binds a Unix datagram socket for [`Cmd::RecvFd`].
    FdListen { path: String },
    /// `SCM_RIGHTS`, out.
    SendFd { h: u32, path: String },
    /// `SCM_RIGHTS`, in; the answer has a new handle.
    RecvFd { h: u32, ms: u64 },
    /// Joins a multicast group on `eth0`.
    Join { h: u32, group: String },
    /// Writes its process id to `cgroup.procs` there.
    MoveCgroup { path: String },
    /// `unshare(CLONE_NEWNET)` and loopback up.
    Unshare,
    /// `setns` into a namespace of `/run/netns`.
    Enter { netns: String },
    /// `unshare(CLONE_NEWUSER | CLONE_NEWNET)` and loopback up, as any user may.
    UnshareUser,
    /// Gives `lo` one more address.
    AddAddress { ip: String },
    /// `sendmsg(2)` with `IP_PKTINFO` or `IPV6_PKTINFO`: the datagram is to leave from `source`.
    SendFrom { h: u32, addr: String, source: String, data: String },
    /// Connects `n` fresh TCP sockets, one after the other, and closes them; `n` of the answer = how many got EPERM,
    /// `data` = the first other outcome.
    Connects { addr: String, n: u32 },
    /// One datagram to each of `ports` from each of `sockets` fresh sockets; `n` of the answer = how many went out.
    Datagrams { ip: String, first: u16, ports: u16, sockets: u16 },
    /// From now on runs on this CPU only.
    Pin { cpu: usize },
    /// Accepts on a listener and sends back what comes, in the background, until [`Cmd::CloseAll`].
    Serve { h: u32 },
    /// In the background: a request and its answer over and over on a connection. See [`Cmd::Tally`].
    Chat { h: u32 },
    /// In the background: connects fresh sockets over and over. See [`Cmd::Tally`].
    Retry { addr: String },
    /// Ends `Chat` and `Retry`; the answer's `data` is a [`Tally`].
    Tally,
    /// Writes a file, for sysctls of the own network namespace.
    Write { path: String, value: String },
    /// `close(2)`.
    Close { h: u32 },
    /// Closes all handles.
    CloseAll,
}

/// One answer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// It worked.
    pub ok: bool,
    /// The name of the error, if not: `EPERM`, …; `ETIMEDOUT` also when our own patience ended.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub errno: String,
    /// A new handle.
    #[serde(default)]
    pub h: u32,
    /// What was received.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub data: String,
    /// From whom, or the own address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub from: String,
    /// A count.
    #[serde(default)]
    pub n: i64,
    /// How long it took, in microseconds.
    #[serde(default)]
    pub us: u64,
}

/// What happened in the background.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Requests that were answered.
    pub answered: u64,
    /// The longest wait for an answer, in microseconds.
    pub longest_us: u64,
    /// How the conversation broke, if it did.
    pub broken: String,
    /// Connects that were tried.
    pub tried: u64,
    /// Those that stood.
    pub stood: u64,
}
