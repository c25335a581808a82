//! State the hooks keep: who owns a cgroup, an address, an endpoint, a socket, a datagram flow.

use crate::{Addr, Identity};

/// Value of the cgroup registry; the key is the cgroup v2 id (`u64`, the directory's inode number).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CgroupEntry {
    /// Identity of sockets born in this cgroup and in those below it that are not registered.
    pub identity: u32,
    /// Number of the workload (one cgroup tree); 0 = none.
    pub workload: u32,
    /// [`CgroupEntry::MANAGED`].
    pub flags: u32,
    /// Zero.
    pub pad: u32,
}

impl CgroupEntry {
    /// Cgroups below this one that are not registered are unresolved, not this identity.
    pub const MANAGED: u32 = 1;
    /// In the table of paths: a cgroup made there belongs to what is above it, and is not registered.
    pub const INHERIT: u32 = 2;
}

/// Key of the table of paths (a longest-prefix trie): a path from the root of the cgroup v2 hierarchy, or the beginning of
/// paths, zero-filled. A whole path includes its final zero, so it wins over every beginning.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PathKey {
    /// Bits of `bytes` that count.
    pub bits: u32,
    /// Ends with at least one zero.
    pub bytes: [u8; Self::LEN],
}

impl PathKey {
    /// Room for a path and its final zero: a quarter of a BPF stack. Units fit; containers have longer paths, which are
    /// new with each start and so are known by their beginnings only.
    pub const LEN: usize = 128;

    /// This very path. `None` = too long (126 bytes are not: one more than fits would look like a cut-off one).
    pub fn new(path: &[u8]) -> Option<Self> {
        if path.len() > Self::LEN - 2 {
            return None;
        }
        Some(Self::of(path, path.len() + 1))
    }

    /// Every path that begins so, without an own entry or a longer beginning. `None` = too long.
    pub fn beginning(text: &[u8]) -> Option<Self> {
        if text.len() > Self::LEN - 2 {
            return None;
        }
        Some(Self::of(text, text.len()))
    }

    fn of(text: &[u8], count: usize) -> Self {
        let mut bytes = [0; Self::LEN];
        for (to, from) in bytes.iter_mut().zip(text) {
            *to = *from;
        }
        Self { bits: 8 * count as u32, bytes }
    }
}

/// One end of a flow: which labels, which cgroup tree.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Party {
    /// [`Identity`].
    pub identity: u32,
    /// Number of the workload; 0 = none.
    pub workload: u32,
}

/// Value of the table of this host's own addresses.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AddressEntry {
    /// Cookie of the network namespace that has the address; 0 = several have it.
    pub netns: u64,
    /// Who is there when no socket is known to listen: `host`, one workload, or unresolved.
    pub as_destination: u32,
    /// Who sends from there when no hook of ours saw the sender: one workload, or unresolved.
    pub as_source: u32,
}

/// Key of the table of local sockets that listen or that sent a datagram.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EndpointKey {
    /// Network namespace cookie.
    pub netns: u64,
    /// The bound address, or the wildcard of its family.
    pub addr: Addr,
    /// Host order.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u16,
    /// Zero.
    pub pad: u32,
}

/// Value of the endpoint table.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EndpointEntry {
    /// [`Identity`] of the owner; unresolved where owners of several identities share the port.
    pub identity: u32,
    /// Number of the workload; 0 = none or several.
    pub workload: u32,
    /// Sockets that share the endpoint.
    pub sockets: u64,
}

/// Value of the table of TCP listeners; the key is the socket cookie (`SO_COOKIE`). Gate conn runs in programs that have no
/// socket storage, so who a listener is stands here as well.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Listener {
    /// Network namespace cookie; 0 = not known.
    pub netns: u64,
    /// Cgroup the socket was born in; 0 = not known.
    pub cgroup: u64,
    /// [`Identity`] of the owner, should the cgroup not be registered (any more).
    pub identity: u32,
    /// Number of the workload; 0 = none.
    pub workload: u32,
}

/// Key of the table of local TCP connections, from the client's side.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OriginKey {
    /// Network namespace cookie if the addresses are loopback (each namespace has its own), else 0.
    pub netns: u64,
    /// Source.
    pub client: Addr,
    /// Destination.
    pub server: Addr,
    /// Host order.
    pub client_port: u16,
    /// Host order.
    pub server_port: u16,
    /// Zero.
    pub pad: u32,
}

/// Key of a datagram flow (UDP, and granted protocols without connections), from the local socket's side.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FlowKey {
    /// Network namespace cookie.
    pub netns: u64,
    /// The other end.
    pub remote: Addr,
    /// Host order.
    pub remote_port: u16,
    /// Host order.
    pub local_port: u16,
    /// IP protocol number.
    pub protocol: u16,
    /// Zero.
    pub pad: u16,
}

/// Value of a datagram flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowValue {
    /// Boot nanoseconds of the last datagram.
    pub seen: u64,
    /// The verdict holds before this time; 0 = for good.
    pub until: u64,
    /// Generation that judged.
    pub generation: u32,
    /// Identity of the local socket: a reply never reaches another one that shares the port.
    pub local: u32,
    /// [`crate::Direction`] in which the flow was opened.
    pub direction: u8,
    /// Zero.
    pub pad: [u8; 7],
}

/// What we know of a socket, in its storage. Accepted sockets begin as a copy of their listener's.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SocketState {
    /// Network namespace cookie.
    pub netns: u64,
    /// Cgroup the socket was born in, exactly; 0 = not known.
    pub cgroup: u64,
    /// The cached verdict holds before this time; 0 = for good.
    pub until: u64,
    /// Boot nanoseconds at which the flow was let through.
    pub started: u64,
    /// A live flow that is no longer allowed goes on until then; 0 = no such case.
    pub drain: u64,
    /// The other end of the cached verdict.
    pub remote_addr: Addr,
    /// This end of the cached verdict.
    pub local_addr: Addr,
    /// [`Identity`] of the workload.
    pub identity: u32,
    /// Number of the workload.
    pub workload: u32,
    /// Generation in which segments of this TCP connection pass without another look; 0 = none. Set where the cached verdict
    /// passes and has no end.
    pub passes: u32,
    /// Generation of the cached verdict; 0 = none.
    pub generation: u32,
    /// Identity of the peer.
    pub remote: u32,
    /// The deciding rule.
    pub rule: u32,
    /// Host order.
    pub remote_port: u16,
    /// Host order.
    pub local_port: u16,
    /// IP protocol number (262 = MPTCP).
    pub protocol: u16,
    /// [`crate::Verdict`] of the cached answer; 0 = none.
    pub verdict: u8,
    /// [`crate::Direction`] of the cached answer.
    pub direction: u8,
    /// [`crate::Evidence`] of the cached answer.
    pub evidence: u8,
    /// [`crate::Reason`] of the cached answer.
    pub reason: u8,
    /// `REGISTERED`, `LOGGED`, `NO_LOG`, `CONNECTED`, `CREATED`.
    pub flags: u8,
    /// [`crate::Action`] of the shadow answer.
    pub pending: u8,
    /// Rule of the shadow answer.
    pub pending_rule: u32,
}

impl SocketState {
    /// The socket is in the endpoint table under (`netns`, `local_addr`, `local_port`).
    pub const REGISTERED: u8 = 1;
    /// The new flow was reported, so its end will be too.
    pub const LOGGED: u8 = 2;
    /// The deciding rule says `log: none`.
    pub const NO_LOG: u8 = 4;
    /// A datagram socket that was connected: its peer stays its peer, whomever else it writes to.
    pub const CONNECTED: u8 = 8;
    /// A process made the socket, not the kernel for itself.
    pub const CREATED: u8 = 16;

    /// The identity as a type.
    #[inline(always)]
    pub const fn local(&self) -> Identity {
        Identity(self.identity)
    }
}

const _: () = assert!(size_of::<CgroupEntry>() == 16);
const _: () = assert!(size_of::<PathKey>() == 132);
const _: () = assert!(size_of::<AddressEntry>() == 16);
const _: () = assert!(size_of::<EndpointKey>() == 32);
const _: () = assert!(size_of::<EndpointEntry>() == 16);
const _: () = assert!(size_of::<Listener>() == 24);
const _: () = assert!(size_of::<OriginKey>() == 48);
const _: () = assert!(size_of::<FlowKey>() == 32);
const _: () = assert!(size_of::<FlowValue>() == 32);
const _: () = assert!(size_of::<SocketState>() == 112);

#[cfg(feature = "user")]
mod pod {
    use super::*;
    use crate::event::{DenialCount, DenialKey, RuleCount};
    use crate::rule::{LocalEntry, PrefixKey, RuleEntry, RuleKey};
    macro_rules! pod {
        ($($t:ty),*) => { $(
            // SAFETY: `repr(C)`, integers only, no padding that is not a named field.
            unsafe impl aya::Pod for $t {}
        )* };
    }
    pod!(
        CgroupEntry,
        PathKey,
        Party,
        AddressEntry,
        EndpointKey,
        EndpointEntry,
        Listener,
        OriginKey,
        FlowKey,
        FlowValue,
        SocketState,
        RuleKey,
        RuleEntry,
        LocalEntry,
        PrefixKey,
        DenialKey,
        DenialCount,
        RuleCount,
        Addr
    );
}
