//! What the kernel reports: verdicts with their reasons, events, counters.

use crate::Addr;

/// The answer as users see it.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Verdict {
    /// Passed.
    Allowed = 1,
    /// Refused.
    Denied = 2,
    /// Passed, though enforcement would have refused it: something is in monitor mode.
    Audit = 3,
}

impl Verdict {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "ALLOWED",
            Self::Denied => "DENIED",
            Self::Audit => "AUDIT",
        }
    }
    /// From a raw byte; `None` for a value of a newer layout.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::Allowed,
            2 => Self::Denied,
            3 => Self::Audit,
            _ => return None,
        })
    }
}

/// Why a verdict is what it is.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reason {
    /// The local end is in no segment.
    NoSegment = 0,
    /// A rule decided.
    Rule = 1,
    /// No rule decided; the default of the segment did.
    SegmentDefault = 2,
    /// An allow rule was there, its time is over.
    Expired = 3,
    /// An allow rule is there, its window is not open.
    OutOfSchedule = 4,
    /// The peer is not known yet.
    UnresolvedPeer = 5,
    /// The local workload is not known yet.
    UnresolvedLocal = 6,
    /// The rule demands better evidence of who the peer is; or (egress) the datagram's source address is another's.
    NotAuthenticated = 7,
    /// The segment was not granted this socket type, protocol or address family.
    ProtocolNotGranted = 8,
    /// The packet cannot be read.
    Malformed = 9,
    /// Never denied, by construction (see `segfw status`).
    GoldenRule = 10,
    /// It belongs to a flow that was let through in the other direction.
    Reply = 11,
    /// A live flow that the policy in force no longer allows.
    Revoked = 12,
    /// No policy is loaded.
    NoPolicy = 13,
    /// The kernel had no memory for the state of this socket.
    NoMemory = 14,
    /// No agent has been heard of for too long, and `absence.agentGone` (or, after a boot, `beforeFirstRevision`) says so.
    AgentGone = 15,
}

impl Reason {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Self; 16] = [
        Self::NoSegment,
        Self::Rule,
        Self::SegmentDefault,
        Self::Expired,
        Self::OutOfSchedule,
        Self::UnresolvedPeer,
        Self::UnresolvedLocal,
        Self::NotAuthenticated,
        Self::ProtocolNotGranted,
        Self::Malformed,
        Self::GoldenRule,
        Self::Reply,
        Self::Revoked,
        Self::NoPolicy,
        Self::NoMemory,
        Self::AgentGone,
    ];

    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoSegment => "no-segment",
            Self::Rule => "rule",
            Self::SegmentDefault => "segment-default",
            Self::Expired => "expired",
            Self::OutOfSchedule => "out-of-schedule",
            Self::UnresolvedPeer => "unresolved-peer",
            Self::UnresolvedLocal => "unresolved-local",
            Self::NotAuthenticated => "not-authenticated",
            Self::ProtocolNotGranted => "protocol-not-granted",
            Self::Malformed => "malformed",
            Self::GoldenRule => "golden-rule",
            Self::Reply => "reply",
            Self::Revoked => "revoked",
            Self::NoPolicy => "no-policy",
            Self::NoMemory => "no-memory",
            Self::AgentGone => "agent-gone",
        }
    }

    /// From a raw byte; `None` for a value of a newer layout.
    pub fn from_raw(raw: u8) -> Option<Self> {
        Self::ALL.get(raw as usize).copied()
    }
}

/// What happened.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum EventKind {
    /// A new connection or datagram flow was judged.
    New = 1,
    /// A connection ended; the counts are final.
    Close = 2,
    /// A socket was refused before it had an address.
    Socket = 3,
    /// A live flow was judged again and is no longer allowed.
    Revoked = 4,
    /// A new inbound flow that a `reject` rule refused: user space owes the sender an answer.
    Reject = 5,
}

impl EventKind {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Close => "close",
            Self::Socket => "socket",
            Self::Revoked => "revoked",
            Self::Reject => "reject",
        }
    }
    /// From a raw byte; `None` for a value of a newer layout.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::New,
            2 => Self::Close,
            3 => Self::Socket,
            4 => Self::Revoked,
            5 => Self::Reject,
            _ => return None,
        })
    }
}

/// Which hook spoke; for support and for the tests, not for policy.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Hook {
    /// `cgroup/sock_create`.
    SockCreate = 1,
    /// `cgroup/connect4,6`.
    Connect = 2,
    /// `cgroup/sendmsg4,6`.
    Sendmsg = 3,
    /// `cgroup_skb/ingress`.
    Ingress = 4,
    /// `cgroup_skb/egress`.
    Egress = 5,
    /// `sock_ops`.
    SockOps = 6,
    /// XDP.
    Xdp = 7,
    /// The agent's sweep of live connections.
    Sweep = 8,
    /// `inet_conn_request`: gate conn.
    ConnRequest = 9,
    /// `socket_create`: the list of address families.
    SocketFamily = 10,
}

impl Hook {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SockCreate => "sock_create",
            Self::Connect => "connect",
            Self::Sendmsg => "sendmsg",
            Self::Ingress => "cgroup_skb/ingress",
            Self::Egress => "cgroup_skb/egress",
            Self::SockOps => "sock_ops",
            Self::Xdp => "xdp",
            Self::Sweep => "sweep",
            Self::ConnRequest => "inet_conn_request",
            Self::SocketFamily => "socket_create",
        }
    }
    /// From a raw byte; `None` for a value of a newer layout.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::SockCreate,
            2 => Self::Connect,
            3 => Self::Sendmsg,
            4 => Self::Ingress,
            5 => Self::Egress,
            6 => Self::SockOps,
            7 => Self::Xdp,
            8 => Self::Sweep,
            9 => Self::ConnRequest,
            10 => Self::SocketFamily,
            _ => return None,
        })
    }
}

/// One record of the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowEvent {
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub time: u64,
    /// Per CPU, without a gap: a missing number is a lost event.
    pub sequence: u64,
    /// Cgroup the local socket was born in; 0 = not known.
    pub cgroup: u64,
    /// Network namespace cookie of the local socket; 0 = not known.
    pub netns: u64,
    /// At `Close`: payload bytes sent that the peer acknowledged (the kernel counts SYN and FIN too).
    pub bytes_sent: u64,
    /// At `Close`: payload bytes received.
    pub bytes_received: u64,
    /// At `Close`: nanoseconds since the flow was let through.
    pub duration: u64,
    /// This host's end.
    pub local_addr: Addr,
    /// The other end.
    pub remote_addr: Addr,
    /// [`crate::Identity`] of this host's end.
    pub local: u32,
    /// [`crate::Identity`] of the other end.
    pub remote: u32,
    /// The deciding rule; 0 = none.
    pub rule: u32,
    /// The rule of the shadow answer; meaningful if `pending` is not 0.
    pub pending_rule: u32,
    /// The generation that was asked.
    pub generation: u32,
    /// Process id (thread group) of the caller; 0 where the hook runs in no process.
    pub pid: u32,
    /// CPU that wrote the event; with `sequence` it makes a loss visible.
    pub cpu: u32,
    /// At `Close`: segments sent, received, retransmitted.
    pub segments_sent: u32,
    /// See `segments_sent`.
    pub segments_received: u32,
    /// See `segments_sent`.
    pub retransmits: u32,
    /// At `Close`: smoothed round-trip time, microseconds. At `Reject`: the SYN's sequence number.
    pub rtt_us: u32,
    /// Host order; 0 = not chosen yet. For ICMP: `type << 8 | code` of an inbound message.
    pub local_port: u16,
    /// Host order. For ICMP: `type << 8 | code` of an outbound message.
    pub remote_port: u16,
    /// IP protocol number (262 = MPTCP).
    pub protocol: u16,
    /// [`EventKind`].
    pub kind: u8,
    /// [`crate::Direction`].
    pub direction: u8,
    /// [`Verdict`].
    pub verdict: u8,
    /// [`Reason`].
    pub reason: u8,
    /// [`crate::Action`] of the shadow answer; 0 = as enforced.
    pub pending: u8,
    /// [`crate::Evidence`].
    pub evidence: u8,
    /// [`Hook`].
    pub hook: u8,
    /// 1 where the answer was `reject`.
    pub reject: u8,
    /// Socket type (`SOCK_STREAM` ...) at `Socket`; else 0.
    pub socket_type: u8,
    /// Address family (`AF_PACKET` ...) where a family was refused; else 0.
    pub family: u8,
    /// Zero.
    pub pad: [u8; 4],
    /// Name of the calling task, zero-filled.
    pub comm: [u8; 16],
}

const _: () = assert!(size_of::<FlowEvent>() == 168);

/// Key under which denials are counted while single events are held back.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DenialKey {
    /// This host's end.
    pub local: u32,
    /// The other end.
    pub remote: u32,
    /// The deciding rule.
    pub rule: u32,
    /// Destination port of the flow, host order.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u16,
    /// [`crate::Direction`].
    pub direction: u8,
    /// [`Reason`].
    pub reason: u8,
    /// [`Hook`].
    pub hook: u8,
    /// 1 where a rule rejects: these got no answer.
    pub reject: u8,
}

/// Denials that were counted instead of sent, per CPU.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DenialCount {
    /// Denials since the entry was made.
    pub count: u64,
    /// Boot nanoseconds of the last one.
    pub last: u64,
}

/// Exact counts of one rule, per CPU: new flows, not packets.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RuleCount {
    /// Flows let through.
    pub allowed: u64,
    /// Refusals.
    pub denied: u64,
    /// Flows let through that enforcement would refuse.
    pub audit: u64,
}

/// Per-CPU counters by index. Those of verdicts come first: see [`Counter::verdict_index`].
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Counter {
    /// Events that found the ring buffer full.
    EventsLost = 128,
    /// Events that reached the ring buffer.
    EventsSent = 129,
    /// Denials that were aggregated instead of sent.
    DenialsAggregated = 130,
    /// Denials that found the aggregation table full too; they are in the verdict counters only.
    DenialsUncounted = 131,
    /// Sockets for which the kernel had no memory for state.
    StorageFailed = 132,
    /// Endpoints that found the table full.
    EndpointsFull = 133,
    /// Rules that found the table of rule counters full.
    RuleCountersFull = 134,
    /// Packets XDP refused in place of a socket.
    XdpDropped = 135,
    /// Packets that could not be read.
    Malformed = 136,
    /// Origins that could not be stored.
    OriginsFull = 137,
    /// Flows that could not be stored.
    FlowsFull = 138,
    /// Listeners that found the table full.
    ListenersFull = 139,
    /// SYNs for a listener that is not in the table: judged as of an unresolved workload.
    ListenerUnknown = 140,
}

impl Counter {
    /// Entries in the counter array.
    pub const LEN: u32 = 160;
    /// Every named counter.
    pub const ALL: [Self; 13] = [
        Self::EventsLost,
        Self::EventsSent,
        Self::DenialsAggregated,
        Self::DenialsUncounted,
        Self::StorageFailed,
        Self::EndpointsFull,
        Self::RuleCountersFull,
        Self::XdpDropped,
        Self::Malformed,
        Self::OriginsFull,
        Self::FlowsFull,
        Self::ListenersFull,
        Self::ListenerUnknown,
    ];

    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EventsLost => "events-lost",
            Self::EventsSent => "events-sent",
            Self::DenialsAggregated => "denials-aggregated",
            Self::DenialsUncounted => "denials-uncounted",
            Self::StorageFailed => "storage-failed",
            Self::EndpointsFull => "endpoints-full",
            Self::RuleCountersFull => "rule-counters-full",
            Self::XdpDropped => "xdp-dropped",
            Self::Malformed => "malformed",
            Self::OriginsFull => "origins-full",
            Self::FlowsFull => "flows-full",
            Self::ListenersFull => "listeners-full",
            Self::ListenerUnknown => "listener-unknown",
        }
    }

    /// Index of the counter of one (reason, verdict): 16 reasons x 4 verdicts x 2 directions.
    #[inline(always)]
    pub const fn verdict_index(reason: u8, verdict: u8, direction: u8) -> u32 {
        ((reason as u32 & 15) << 3) | ((direction as u32 & 1) << 2) | (verdict as u32 & 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_numbers_agree() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
            assert_eq!(Reason::from_raw(i as u8), Some(*reason));
        }
        assert_eq!(Reason::from_raw(Reason::ALL.len() as u8), None);
        for raw in 0..=255u8 {
            if let Some(kind) = EventKind::from_raw(raw) {
                assert_eq!(kind as u8, raw);
            }
            if let Some(verdict) = Verdict::from_raw(raw) {
                assert_eq!(verdict as u8, raw);
            }
            if let Some(hook) = Hook::from_raw(raw) {
                assert_eq!(hook as u8, raw);
            }
        }
    }

    #[test]
    fn counters_do_not_overlap() {
        let top = Counter::verdict_index(15, 3, 1);
        assert!(top < Counter::EventsLost as u32);
        assert!(Counter::ALL.iter().all(|c| (*c as u32) < Counter::LEN));
        assert_ne!(Counter::verdict_index(1, 2, 0), Counter::verdict_index(1, 2, 1));
        assert!(Reason::ALL.len() <= 16);
    }
}
