//! The judgement, nothing else: who the peer is ([`identify`]) and what the policy says ([`decide`]).
//!
//! Called by every hook, by the tests, by the sweep and by `segfw policy explain`. It reads tables through two small
//! traits, compares nothing that the compiler could have compared, and keeps no state.

use crate::rule::{Action, CLASS_ANY, Direction, LocalEntry, Proto, RuleEntry, RuleKey};
use crate::state::{AddressEntry, EndpointKey, OriginKey, Party};
use crate::{Addr, Evidence, Identity, Reason, Verdict, bounds, control};

/// The tables of one generation.
pub trait Lookup {
    /// `CLOCK_BOOTTIME` in nanoseconds. Asked only where a rule has a deadline.
    fn now(&self) -> u64;
    /// Bits of `control::HOST_*`.
    fn host_flags(&self) -> u64;
    /// False where no policy was ever loaded.
    fn has_policy(&self) -> bool;
    /// What is true of a local identity as a whole; `None` = it is in no segment.
    fn local(&self, identity: Identity) -> Option<LocalEntry>;
    /// Class of a destination port.
    fn class(&self, proto: Proto, port: u16) -> u16;
    /// The answer to a key.
    fn rule(&self, key: &RuleKey) -> Option<RuleEntry>;
    /// Part `index` of the timeline (0-based).
    fn timeline(&self, index: u32) -> Option<RuleEntry>;
    /// Identity of the longest prefix that the policy names.
    fn prefix(&self, addr: &Addr) -> Option<Identity>;
}

/// What the hooks and the agent know of this host's own sockets and addresses.
pub trait Peers {
    /// Who opened this local TCP connection.
    fn origin(&self, key: &OriginKey) -> Option<Party>;
    /// Who owns this local socket.
    fn endpoint(&self, key: &EndpointKey) -> Option<Party>;
    /// Whether an address is this host's own.
    fn address(&self, addr: &Addr) -> Option<AddressEntry>;
}

/// A flow as its local end sees it.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Is the local end the source or the destination of the connection?
    pub direction: Direction,
    /// IP protocol number (262 = MPTCP).
    pub protocol: u16,
    /// Identity of the local workload.
    pub local: Identity,
    /// Number of the local workload; 0 = none.
    pub workload: u32,
    /// Network namespace cookie of the local socket.
    pub netns: u64,
    /// This end.
    pub local_addr: Addr,
    /// The other end.
    pub remote_addr: Addr,
    /// Host order; for inbound ICMP `type << 8 | code`.
    pub local_port: u16,
    /// Host order; for outbound ICMP `type << 8 | code`.
    pub remote_port: u16,
}

impl Flow {
    /// The port that names the service: the destination's.
    #[inline(always)]
    pub const fn service(&self) -> u16 {
        match self.direction {
            Direction::Ingress => self.local_port,
            Direction::Egress => self.remote_port,
        }
    }
}

/// The other end, and how we know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Who.
    pub identity: Identity,
    /// Number of the workload; 0 = none or not known.
    pub workload: u32,
    /// How we know.
    pub evidence: Evidence,
}

/// The judgement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The verdict.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// A refusal that is answered.
    pub reject: bool,
    /// An allowed flow is not to be logged.
    pub quiet: bool,
    /// The deciding rule; 0 = none.
    pub rule: u32,
    /// [`Action`] of the shadow answer as a byte; 0 = as enforced.
    pub pending: u8,
    /// Rule of the shadow answer.
    pub pending_rule: u32,
    /// The verdict holds before this time (boot nanoseconds); 0 = until the next generation.
    pub until: u64,
    /// How long a live flow goes on after this answer turned to a refusal (nanoseconds).
    pub drain_ns: u64,
}

impl Decision {
    /// A verdict that no rule gave.
    #[inline(always)]
    pub const fn plain(verdict: Verdict, reason: Reason) -> Self {
        Self {
            verdict,
            reason,
            reject: false,
            quiet: false,
            rule: 0,
            pending: 0,
            pending_rule: 0,
            until: 0,
            drain_ns: 0,
        }
    }
    /// Does the packet go on?
    #[inline(always)]
    pub const fn passes(&self) -> bool {
        match self.verdict {
            Verdict::Allowed | Verdict::Audit => true,
            Verdict::Denied => false,
        }
    }
}

/// Who is at the other end: strongest evidence first.
#[inline(always)]
pub fn identify<T: Lookup + Peers>(t: &T, flow: &Flow) -> Peer {
    let loopback = flow.remote_addr.is_loopback();
    // Not an `Option`: the verifier refuses to spill the undefined half of a `None`.
    let (is_own, own) = match if loopback { None } else { t.address(&flow.remote_addr) } {
        Some(entry) => (true, entry),
        None => (false, AddressEntry { netns: 0, as_destination: 0, as_source: 0 }),
    };
    match flow.direction {
        Direction::Ingress if Proto::from_ip(flow.protocol) as u8 == Proto::Tcp as u8 => {
            // Where several namespaces have the address, the tuple may be that of another one's connection.
            let told_apart = !is_own || own.netns != 0;
            if told_apart && let Some(party) = t.origin(&origin_key(flow)) {
                return Peer {
                    identity: Identity(party.identity),
                    workload: party.workload,
                    evidence: Evidence::Origin,
                };
            }
        }
        Direction::Ingress | Direction::Egress => {
            let netns = if loopback { flow.netns } else { own.netns };
            if netns != 0
                && let Some(party) = endpoint(t, netns, &flow.remote_addr, flow.protocol, flow.remote_port)
            {
                let evidence = match flow.direction {
                    Direction::Ingress => Evidence::Origin,
                    Direction::Egress => Evidence::Endpoint,
                };
                return Peer { identity: Identity(party.identity), workload: party.workload, evidence };
            }
        }
    }
    let itself = flow.local_addr.is_unspecified() || flow.local_addr == flow.remote_addr;
    if loopback && itself && flow.local_port == flow.remote_port && flow.direction as u8 == Direction::Egress as u8 {
        // A socket that connects to its own address and port meets itself: nobody else can have that endpoint.
        return Peer { identity: flow.local, workload: flow.workload, evidence: Evidence::Endpoint };
    }
    if loopback {
        // Nobody listens there: the kernel will say so. But a sender on this host that no hook of ours saw is unknown.
        let identity = match flow.direction {
            Direction::Ingress => Identity::UNRESOLVED,
            Direction::Egress => Identity::HOST,
        };
        return Peer { identity, workload: 0, evidence: Evidence::Address };
    }
    if is_own {
        let identity = match flow.direction {
            Direction::Ingress => own.as_source,
            Direction::Egress => own.as_destination,
        };
        return Peer { identity: Identity(identity), workload: 0, evidence: Evidence::Address };
    }
    match t.prefix(&flow.remote_addr) {
        Some(identity) => Peer { identity, workload: 0, evidence: Evidence::Prefix },
        None => Peer { identity: Identity::WORLD, workload: 0, evidence: Evidence::None },
    }
}

/// The key under which a client's hooks stored the origin of this connection.
#[inline(always)]
pub fn origin_key(flow: &Flow) -> OriginKey {
    let (client, client_port, server, server_port) = match flow.direction {
        Direction::Ingress => (flow.remote_addr, flow.remote_port, flow.local_addr, flow.local_port),
        Direction::Egress => (flow.local_addr, flow.local_port, flow.remote_addr, flow.remote_port),
    };
    let netns = if server.is_loopback() { flow.netns } else { 0 };
    OriginKey { netns, client, server, client_port, server_port, pad: 0 }
}

/// The local socket that is bound to an address and port: exactly, else by the wildcard of its family, else (IPv4)
/// by the wildcard of IPv6, which takes both.
#[inline(always)]
pub fn endpoint<P: Peers>(t: &P, netns: u64, addr: &Addr, protocol: u16, port: u16) -> Option<Party> {
    let mut key = EndpointKey { netns, addr: *addr, port, protocol, pad: 0 };
    if let Some(party) = t.endpoint(&key) {
        return Some(party);
    }
    key.addr = addr.any_of_family();
    if let Some(party) = t.endpoint(&key) {
        return Some(party);
    }
    if addr.is_v4() {
        key.addr = Addr::UNSPECIFIED;
        return t.endpoint(&key);
    }
    None
}

/// What is never denied, whatever the policy says. `segfw status` lists these.
#[inline(always)]
fn golden(flow: &Flow, peer: &Peer) -> bool {
    // One workload talking to itself over loopback.
    if flow.workload != 0 && flow.workload == peer.workload && flow.remote_addr.is_loopback() {
        return true;
    }
    // DHCP client (RFC 2131, 4.1) and DHCPv6 client (RFC 8415, 7.2). The kernel's own neighbour discovery is not asked
    // about at all: its sockets are no workload's (see the egress hook).
    if Proto::from_ip(flow.protocol) as u8 != Proto::Udp as u8 {
        return false;
    }
    let (client, server) = (flow.local_port, flow.remote_port);
    if flow.remote_addr.is_v4() { client == 68 && server == 67 } else { client == 546 && server == 547 }
}

/// Under which identity a local end is judged, and what is true of it; `None` = it is not enforced.
///
/// A workload that the tables do not know is one whose labels are newer than they are: it is judged as unresolved, so
/// that neither order of "register the cgroup" and "switch the tables" opens a hole.
#[inline(always)]
pub fn standing<T: Lookup>(t: &T, identity: Identity) -> Option<(Identity, LocalEntry)> {
    match t.local(identity) {
        Some(local) if local.flags & LocalEntry::OPEN != 0 => None,
        Some(local) => Some((identity, local)),
        None if identity.0 >= Identity::FIRST_DYNAMIC => {
            t.local(Identity::UNRESOLVED).map(|local| (Identity::UNRESOLVED, local))
        }
        None => None,
    }
}

/// What the policy says. Total: every flow gets an answer and a reason.
#[inline(always)]
pub fn decide<T: Lookup>(t: &T, flow: &Flow, peer: &Peer) -> Decision {
    if !t.has_policy() {
        return Decision::plain(Verdict::Allowed, Reason::NoPolicy);
    }
    let Some((identity, local)) = standing(t, flow.local) else {
        return Decision::plain(Verdict::Allowed, Reason::NoSegment);
    };
    if golden(flow, peer) {
        return Decision::plain(Verdict::Allowed, Reason::GoldenRule);
    }
    let host = t.host_flags();
    let gone_after = host >> control::GONE_SHIFT;
    if gone_after != 0 && t.now() >> control::GONE_UNIT >= gone_after {
        let verdict = if host & (control::HOST_GONE_OPEN | control::HOST_MONITOR) != 0 {
            Verdict::Allowed
        } else {
            Verdict::Denied
        };
        return Decision::plain(verdict, Reason::AgentGone);
    }
    let mut entry = match find(t, &local, identity, flow, peer) {
        Some(entry) => entry,
        None => RuleEntry {
            until: 0,
            rule: 0,
            pending_rule: 0,
            next: 0,
            // Not an index: the verifier takes no computed offset into the stack.
            action: match flow.direction {
                Direction::Ingress => local.default[0],
                Direction::Egress => local.default[1],
            },
            reason: local.default_reason,
            pending: 0,
            flags: 0,
        },
    };
    if entry.until != 0 {
        entry = in_force(t, entry);
    }
    let mut action = Action::from_raw(entry.action);
    let mut reason = entry.reason;
    if action as u8 == Action::Allow as u8
        && flow.direction as u8 == Direction::Ingress as u8
        && (peer.evidence as u8) < entry.demanded()
    {
        action = Action::Deny;
        reason = Reason::NotAuthenticated as u8;
    }
    let monitor = local.flags & LocalEntry::MONITOR != 0 || host & control::HOST_MONITOR != 0;
    let refused = action as u8 != Action::Allow as u8;
    let shadow_refused = entry.pending > Action::Allow as u8;
    let verdict = if refused && !monitor {
        Verdict::Denied
    } else if refused || shadow_refused {
        Verdict::Audit
    } else {
        Verdict::Allowed
    };
    Decision {
        verdict,
        reason: reason_from_raw(reason),
        reject: action as u8 == Action::Reject as u8,
        // A refusal is always told.
        quiet: entry.flags & RuleEntry::NO_LOG != 0 && !refused,
        rule: entry.rule,
        pending: entry.pending,
        pending_rule: entry.pending_rule,
        until: entry.until,
        drain_ns: local.drain_ns,
    }
}

/// The part of a time-limited answer that is in force now. A timeline that ends too early denies.
#[inline(always)]
fn in_force<T: Lookup>(t: &T, first: RuleEntry) -> RuleEntry {
    let now = t.now();
    let mut entry = first;
    for _ in 0..bounds::TIMELINE_HOPS {
        if entry.until == 0 || now < entry.until {
            return entry;
        }
        match entry.next.checked_sub(1) {
            Some(index) => match t.timeline(index) {
                Some(next) => entry = next,
                None => break,
            },
            None => break,
        }
    }
    if entry.until == 0 || now < entry.until {
        return entry;
    }
    RuleEntry { until: 0, action: Action::Deny as u8, reason: Reason::Expired as u8, next: 0, pending: 0, ..entry }
}

/// The first of the four keys that has an entry; those that this identity never uses are not asked.
#[inline(always)]
fn find<T: Lookup>(t: &T, local: &LocalEntry, identity: Identity, flow: &Flow, peer: &Peer) -> Option<RuleEntry> {
    let proto = Proto::from_ip(flow.protocol);
    let has = |remote_any, class_any| local.flags & LocalEntry::level(flow.direction, remote_any, class_any) != 0;
    let port = if proto as u8 == Proto::Other as u8 { flow.protocol } else { flow.service() };
    let class = if has(false, false) || has(true, false) { t.class(proto, port) } else { CLASS_ANY };
    let mut key =
        RuleKey { local: identity, remote: peer.identity, class, proto: proto as u8, direction: flow.direction as u8 };
    if has(false, false)
        && let Some(entry) = t.rule(&key)
    {
        return Some(entry);
    }
    if has(false, true) {
        key.class = CLASS_ANY;
        if let Some(entry) = t.rule(&key) {
            return Some(entry);
        }
    }
    key.remote = Identity::ANY;
    if has(true, false) {
        key.class = class;
        if let Some(entry) = t.rule(&key) {
            return Some(entry);
        }
    }
    if has(true, true) {
        key.class = CLASS_ANY;
        return t.rule(&key);
    }
    None
}

/// An unknown value reads as `rule`.
#[inline(always)]
fn reason_from_raw(raw: u8) -> Reason {
    if (raw as usize) < Reason::ALL.len() {
        // SAFETY: `repr(u8)` with the values 0..15, without a gap (`words_and_numbers_agree` checks it). A `match` would
        // give the verifier one path per reason.
        unsafe { core::mem::transmute::<u8, Reason>(raw) }
    } else {
        Reason::Rule
    }
}
