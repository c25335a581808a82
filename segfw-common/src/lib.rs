//! The kernel ABI of segfw on one page, and the one decision function.
//!
//! Everything here is plain data with a fixed layout, or a pure function over it. It is compiled twice: into the
//! eBPF programs (`segfw-ebpf`) and into user space (`segfw`). It must not know where it runs: no allocation, no
//! floating point, no panicking path, no syscall, no kernel helper.
//!
//! Byte order: addresses are kept as they are on the wire (big-endian bytes); ports and every other number are in
//! host order. Times are nanoseconds of `CLOCK_BOOTTIME`, so a step of the wall clock never moves a deadline.
#![cfg_attr(not(test), no_std)]

pub mod addr;
pub mod conn;
pub mod decide;
pub mod event;
pub mod identity;
pub mod packet;
pub mod probe;
pub mod rule;
pub mod state;

pub use addr::Addr;
pub use decide::{Decision, Flow, Lookup, Peers, decide, identify};
pub use event::{EventKind, FlowEvent, Reason, Verdict};
pub use identity::{Evidence, Identity};
pub use rule::{Action, Direction, LocalEntry, Proto, RuleEntry, RuleKey};
pub use state::{
    AddressEntry, CgroupEntry, EndpointEntry, EndpointKey, FlowKey, FlowValue, Listener, OriginKey, Party, SocketState,
};

/// Number of this layout. It is part of the pin path: an agent never opens maps of another layout.
/// Raise it with every change to a type in this crate that a map holds.
pub const ABI_VERSION: u32 = 4;

/// Bounds of the kernel side. Reaching one is counted (see [`event::Counter`]) and has the behaviour named here.
pub mod bounds {
    /// Rule entries in one generation. The compiler refuses a revision that needs more.
    pub const RULES: u32 = 1 << 20;
    /// Prefixes in one generation. The compiler refuses a revision that needs more.
    pub const PREFIXES: u32 = 1 << 20;
    /// Later parts of time-limited rules in one generation. The compiler refuses a revision that needs more.
    pub const TIMELINE: u32 = 1 << 16;
    /// Identities that are local to this host and enforced. One entry each.
    pub const LOCALS: u32 = 1 << 13;
    /// Cgroups that are registered (workloads, their descendants, managed parents). Full: the workload is not
    /// enforced under its own name but as its nearest registered ancestor, and the agent reports it.
    pub const CGROUPS: u32 = 1 << 16;
    /// Paths, and beginnings of paths, of cgroups that are known before they are made. Full: such a cgroup counts as its
    /// nearest registered ancestor until the agent sees it, and the agent reports it.
    pub const PATHS: u32 = 1 << 14;
    /// Cgroup levels walked to find the nearest registered ancestor.
    pub const CGROUP_DEPTH: u32 = 16;
    /// Local TCP connections whose origin is known. LRU: the oldest is forgotten, its SYN is long gone.
    pub const ORIGINS: u32 = 1 << 16;
    /// Local sockets that listen or that sent a datagram. Full: counted, the peer counts as unknown.
    pub const ENDPOINTS: u32 = 1 << 16;
    /// TCP listeners, by cookie, for gate conn. Full: counted, and what connects to such a listener is refused.
    pub const LISTENERS: u32 = 1 << 16;
    /// Addresses of this host and of its network namespaces.
    pub const ADDRESSES: u32 = 1 << 16;
    /// Datagram flows. LRU: a reply to a forgotten flow is judged as a new flow, without state.
    pub const FLOWS: u32 = 1 << 18;
    /// Bytes of the ring buffer for events: some 23,000, half a second at 10,000 connections a second that are seen from both
    /// ends. Full: the event is lost and counted, the verdict stands. The agent has it twice in its address space (so an
    /// event that wraps is in one piece), and the kernel counts both as its memory.
    pub const RING_BYTES: u32 = 4 << 20;
    /// Parts of a rule's timeline that `decide` walks: eight daily windows ahead. After the last part the
    /// compiler puts the strict answer.
    pub const TIMELINE_HOPS: u32 = 16;
    /// Slots for generations: the active one, the next one, and room for one that is being read.
    pub const SLOTS: u32 = 4;
    /// Most maps among which the rules of a generation are divided, by [`crate::RuleKey::shard`]: what a change of one rule
    /// makes anew is one of them. A power of two.
    pub const RULE_SHARDS: u32 = 256;
    /// Rules that have counters of their own. Full: counted under rule 0.
    pub const RULE_COUNTERS: u32 = 1 << 17;
    /// Different denials that are counted while single events are held back.
    pub const DENIALS: u32 = 1 << 14;
    /// A datagram flow that was idle for this long is over (nanoseconds): as conntrack's udp_timeout_stream.
    pub const FLOW_IDLE_NS: u64 = 180_000_000_000;
    /// Denial events a CPU may send in a second before it aggregates.
    pub const DENIAL_EVENTS_PER_S: u64 = 256;
    /// A CPU wakes the agent for its first event after so long (nanoseconds); for those that follow sooner the agent looks by
    /// itself. A wake-up per event would cost more than the event.
    pub const WAKE_NS: u64 = 100_000_000;
    /// Events of a CPU after which the agent is woken in any case: an eighth of the ring.
    pub const WAKE_EVENTS: u32 = RING_BYTES / 8 / 176;
}

/// Indices into the `CONTROL` array (one `u64` each).
pub mod control {
    /// `generation << 32 | bits << 8 | slot`: one word, so a reader never sees one without the others. The rules are in
    /// `2^bits` maps. 0 = no policy yet.
    /// The generation rises with each revision, and with each change of the cgroup registry or of this host's
    /// addresses (the slot then stays): whatever a verdict rested on, a new number makes it stale.
    pub const ACTIVE: u32 = 0;
    /// Where `bits` begins in the word of [`ACTIVE`].
    pub const SHARDS_SHIFT: u32 = 8;
    /// Bits of `HOST_*`.
    pub const FLAGS: u32 = 1;
    /// Entries in the array.
    pub const LEN: u32 = 4;

    /// Host scope monitor mode: judge everything, drop nothing.
    pub const HOST_MONITOR: u64 = 1;
    /// What becomes of new flows of enforced workloads when the agent is gone: they pass. Without this bit: refused.
    pub const HOST_GONE_OPEN: u64 = 2;
    /// The agent answers for a part of the cgroup tree (`--cgroup-root`): listeners it does not know, and processes of
    /// no workload, are somebody else's.
    pub const HOST_PART: u64 = 4;
    /// Gate conn judges TCP: `cgroup_skb/ingress` lets it pass unseen. Not set while connections are being revoked.
    pub const HOST_CONN: u64 = 8;
    /// From this bit on the word says when the agent counts as gone: boot nanoseconds in units of `2^GONE_UNIT`
    /// (about a millisecond), rounded up; 0 = never (`lastKnownGood`). One word, so nobody reads half of it.
    pub const GONE_SHIFT: u32 = 8;
    /// See [`GONE_SHIFT`].
    pub const GONE_UNIT: u32 = 20;

    /// The part of the word that says when the agent counts as gone.
    pub const fn gone_after(boot_ns: u64) -> u64 {
        ((boot_ns >> GONE_UNIT) + 1) << GONE_SHIFT
    }
}
