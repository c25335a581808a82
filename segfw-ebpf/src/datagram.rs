//! What has no connection the kernel keeps: UDP, and the protocols a segment must be granted. A flow table takes the
//! place of the connection, so that replies belong to it. Also here: the birth, the name and the end of every socket.

use crate::Answer;
use crate::emit::{About, CALLER, NOBODY, report};
use crate::judge::{Judgement, Live, blur, cached, judge, live, opaque_zero, remember, unjudged};
use crate::maps::{
    Kernel, flow as find_flow, now, register_endpoint, socket_state, socket_state_or_new, store_flow,
    unregister_endpoint,
};
use crate::socket::{current, of_process, refresh, source_addr, unpack};
use crate::stream::{blur_addr, named, read};
use aya_ebpf::bindings::{__sk_buff, BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_addr, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_fullsock, bpf_sk_lookup_udp, bpf_sk_release};
use aya_ebpf::programs::{SkBuffContext, SockAddrContext, SockContext};
use segfw_common::decide::{Peer, standing};
use segfw_common::event::Hook;
use segfw_common::packet::Packet;
use segfw_common::rule::ipproto;
use segfw_common::{
    Addr, Decision, Direction, EndpointKey, EventKind, Evidence, Flow, FlowKey, FlowValue, Identity, LocalEntry,
    Lookup, Party, Peers, Reason, SocketState, Verdict, bounds, control,
};

const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const SOCK_RAW: u32 = 3;

/// From an answer to what the caller is told.
#[inline(always)]
pub fn refusal(j: &Judgement) -> Answer {
    if j.decision.passes() {
        Answer::Pass
    } else if j.decision.reject {
        Answer::RefuseLoudly
    } else {
        Answer::Refuse
    }
}

/// A packet that cannot be read: refused where a policy is enforced, none of our business elsewhere.
#[inline(always)]
pub fn unreadable(kernel: &Kernel, state: &SocketState) -> Answer {
    match standing(kernel, state.local()).map(|(_, local)| local) {
        Some(local) if !monitored(kernel, &local) => Answer::Refuse,
        Some(_) | None => Answer::Pass,
    }
}

#[inline(always)]
pub fn monitored(kernel: &Kernel, local: &LocalEntry) -> bool {
    local.flags & LocalEntry::MONITOR != 0 || kernel.host_flags() & control::HOST_MONITOR != 0
}

/// `sock_create`: who is it, and may it have this type of socket?
#[inline(always)]
pub fn create(ctx: &SockContext) -> Answer {
    let sk = ctx.sock;
    // SAFETY: the program's context.
    let (kind, protocol) = unsafe { ((*sk).type_, (*sk).protocol as u16) };
    let kernel = Kernel::read();
    // SAFETY: the program's context.
    let netns = unsafe { bpf_get_netns_cookie(sk.cast()) };
    let mut cgroup = 0;
    let party = unpack(current(&mut cgroup));
    let stored = match socket_state_or_new(sk.cast()) {
        Some(state) => {
            state.netns = netns;
            state.protocol = protocol;
            state.cgroup = cgroup;
            state.identity = party.identity;
            state.workload = party.workload;
            state.flags = SocketState::CREATED;
            true
        }
        None => false,
    };
    let ordinary =
        (kind == SOCK_STREAM && protocol == ipproto::TCP) || (kind == SOCK_DGRAM && protocol == ipproto::UDP);
    if ordinary && stored && kind == SOCK_STREAM {
        return Answer::Pass;
    }
    let Some((_, local)) = standing(&kernel, Identity(party.identity)) else { return Answer::Pass };
    if ordinary && stored && local.flags & LocalEntry::TCP_ONLY == 0 {
        return Answer::Pass;
    }
    let reason = if !stored {
        Reason::NoMemory
    } else if local.grants & grant(kind, protocol) != 0 {
        return Answer::Pass;
    } else {
        Reason::ProtocolNotGranted
    };
    let about = About {
        kind: EventKind::Socket,
        hook: Hook::SockCreate,
        socket_type: kind as u8,
        family: 0,
        generation: kernel.generation,
        sequence: 0,
        cgroup,
    };
    refuse_socket(&kernel, &local, party, netns, protocol, &about, reason)
}

/// Tells of a socket that a process may not have, and refuses it unless the policy only watches.
#[inline(always)]
pub fn refuse_socket(
    kernel: &Kernel,
    local: &LocalEntry,
    party: Party,
    netns: u64,
    protocol: u16,
    about: &About,
    reason: Reason,
) -> Answer {
    let verdict = if monitored(kernel, local) { Verdict::Audit } else { Verdict::Denied };
    let flow = Flow {
        direction: Direction::Egress,
        protocol,
        local: Identity(party.identity),
        workload: party.workload,
        netns,
        local_addr: Addr::UNSPECIFIED,
        remote_addr: Addr::UNSPECIFIED,
        local_port: 0,
        remote_port: 0,
    };
    let j = Judgement {
        peer: Peer { identity: Identity::UNRESOLVED, workload: 0, evidence: Evidence::None },
        decision: Decision::plain(verdict, reason),
    };
    report(about, &flow, &j, CALLER);
    refusal(&j)
}

/// Which grants open a socket type. An allowlist: what is not named here needs the raw grant.
#[inline(always)]
fn grant(kind: u32, protocol: u16) -> u32 {
    match protocol {
        ipproto::ICMP | ipproto::ICMPV6 => LocalEntry::GRANT_PING | LocalEntry::GRANT_RAW,
        ipproto::SCTP if kind != SOCK_RAW => LocalEntry::GRANT_SCTP,
        ipproto::UDPLITE if kind != SOCK_RAW => LocalEntry::GRANT_UDPLITE,
        ipproto::DCCP if kind != SOCK_RAW => LocalEntry::GRANT_DCCP,
        ipproto::MPTCP if kind != SOCK_RAW => LocalEntry::GRANT_MPTCP,
        _ => LocalEntry::GRANT_RAW,
    }
}

/// `sock_release`: the endpoint of a datagram socket goes with it. (That of a listener goes in `sock_ops`.)
#[inline(always)]
pub fn release(ctx: &SockContext) {
    if let Some(state) = socket_state(ctx.sock.cast())
        && state.flags & SocketState::REGISTERED != 0
        && state.protocol != ipproto::TCP
    {
        let key = EndpointKey {
            netns: state.netns,
            addr: state.local_addr,
            port: state.local_port,
            protocol: state.protocol,
            pad: 0,
        };
        unregister_endpoint(&key);
        state.flags &= !SocketState::REGISTERED;
    }
}

/// `post_bind`: the port of a datagram socket is known. A TCP socket is nobody's endpoint before it listens.
/// Each family's hook may read the address of its own family only.
#[inline(always)]
pub fn bound(ctx: &SockContext, v6: bool) {
    let sk = ctx.sock;
    if let Some(state) = socket_state(sk.cast())
        && (state.protocol == ipproto::UDP || state.protocol == ipproto::UDPLITE)
    {
        // SAFETY: the program's context; words are read one by one, as the verifier wants.
        let (addr, port) = unsafe {
            let port = (*sk).src_port as u16;
            let addr = if v6 {
                let w = (&raw const (*sk).src_ip6).cast::<u32>();
                Addr::from_v6_be([
                    w.read_volatile(),
                    w.add(1).read_volatile(),
                    w.add(2).read_volatile(),
                    w.add(3).read_volatile(),
                ])
            } else {
                Addr::from_v4_be((*sk).src_ip4)
            };
            (addr, port)
        };
        ensure_registered(state, addr, port);
    }
}

/// Enters a datagram socket into the endpoint table once its port is known: its peers on this host then know who it is.
#[inline(always)]
pub fn ensure_registered(state: &mut SocketState, addr: Addr, port: u16) {
    if port == 0 || state.flags & SocketState::REGISTERED != 0 {
        return;
    }
    state.local_addr = addr;
    state.local_port = port;
    let key = EndpointKey { netns: state.netns, addr, port, protocol: state.protocol, pad: 0 };
    if register_endpoint(&key, Party { identity: state.identity, workload: state.workload }) {
        state.flags |= SocketState::REGISTERED;
    }
}

/// `sendmsg` with a destination.
#[inline(always)]
pub fn send(ctx: &SockAddrContext, v6: bool) -> Answer {
    let raw = ctx.sock_addr;
    // SAFETY: the program's context.
    let (sk, protocol) = unsafe { ((*raw).__bindgen_anon_1.sk, (*raw).protocol as u16) };
    if sk.is_null() {
        return Answer::Pass;
    }
    let kernel = Kernel::read();
    let (remote_addr, remote_port) = named(raw, v6);
    // SAFETY: the program's context.
    let netns = unsafe { bpf_get_netns_cookie(raw.cast()) };
    let Some(state) = of_process(sk.cast(), netns, protocol) else {
        let mut flow = Flow {
            direction: Direction::Egress,
            protocol,
            local: Identity::UNRESOLVED,
            workload: 0,
            netns,
            local_addr: Addr::UNSPECIFIED,
            remote_addr,
            local_port: 0,
            remote_port,
        };
        return without_state(&kernel, &mut flow, Hook::Sendmsg);
    };
    // SAFETY: `sk` is a socket pointer of the context.
    unsafe { ensure_registered(state, source_addr(sk), (*sk).src_port as u16) };
    // The bound source, or the one that comes with this datagram (IP_PKTINFO).
    let borrowed = borrows(&kernel, state, &source_named(raw, v6));
    outbound(&kernel, state, protocol, remote_addr, remote_port, Hook::Sendmsg, borrowed)
}

/// The source address of a `sendmsg`; unspecified = the kernel will choose one.
#[inline(always)]
fn source_named(ctx: *const bpf_sock_addr, v6: bool) -> Addr {
    // SAFETY: the program's context; words are read one by one, as the verifier wants.
    let mut addr = unsafe {
        if v6 {
            let w = (&raw const (*ctx).msg_src_ip6).cast::<u32>();
            Addr::from_v6_be([
                w.read_volatile(),
                w.add(1).read_volatile(),
                w.add(2).read_volatile(),
                w.add(3).read_volatile(),
            ])
        } else {
            Addr::from_v4_be((*ctx).msg_src_ip4)
        }
    };
    blur_addr(&mut addr, opaque_zero());
    addr
}

/// Does a workload send from an address that another namespace of this host has? Whoever is judged by that address would
/// answer for it. IPv6 asks no capability for this, IPv4 asks for CAP_NET_ADMIN. A connection is told by its origin;
/// a datagram has none. What is in no segment (a proxy of the host that speaks for its containers) may.
#[inline(never)]
pub fn borrows(kernel: &Kernel, state: &SocketState, source: &Addr) -> bool {
    // Nearly always the choice is the kernel's: nothing to look up.
    if *source == source.any_of_family() {
        return false;
    }
    match kernel.address(source) {
        Some(entry) if entry.netns != 0 && entry.netns != state.netns => kernel.local(state.local()).is_some(),
        Some(_) | None => false,
    }
}

/// The answer that [`borrows`] asks for. Not inlined, as `judge::what`.
#[inline(never)]
pub fn refuse_source(kernel: &Kernel, state: &SocketState, j: &mut Judgement) {
    j.decision.reason = Reason::NotAuthenticated;
    if let Some(local) = kernel.local(state.local())
        && monitored(kernel, &local)
    {
        j.decision.verdict = Verdict::Audit;
    }
    let zero = opaque_zero();
    blur(&mut j.decision.reason, zero);
    blur(&mut j.decision.verdict, zero);
}

/// The kernel had no memory to remember this socket: the flow is judged each time, for the task that acts.
#[inline(always)]
pub fn without_state(kernel: &Kernel, flow: &mut Flow, hook: Hook) -> Answer {
    let mut cgroup = 0;
    let party = unpack(current(&mut cgroup));
    flow.local = Identity(party.identity);
    flow.workload = party.workload;
    let mut j = unjudged();
    judge(kernel, flow, &mut j);
    let about = About {
        kind: EventKind::New,
        hook,
        socket_type: 0,
        family: 0,
        generation: kernel.generation,
        sequence: 0,
        cgroup,
    };
    report(&about, flow, &j, CALLER);
    refusal(&j)
}

/// A datagram on its way out: to the last destination, in a known flow, or a new flow to judge.
#[inline(always)]
fn outbound(
    kernel: &Kernel,
    state: &mut SocketState,
    protocol: u16,
    remote_addr: Addr,
    remote_port: u16,
    hook: Hook,
    borrowed: bool,
) -> Answer {
    if !borrowed
        && cached(state, kernel.generation)
        && state.direction == Direction::Egress as u8
        && state.remote_port == remote_port
        && state.remote_addr == remote_addr
    {
        return Answer::Pass;
    }
    if state.generation != kernel.generation {
        refresh(state);
    }
    let mut flow = Flow {
        direction: Direction::Egress,
        protocol,
        local: state.local(),
        workload: state.workload,
        netns: state.netns,
        local_addr: Addr::UNSPECIFIED,
        remote_addr,
        local_port: state.local_port,
        remote_port,
    };
    let mut j = unjudged();
    let mut known = Known::No;
    if borrowed {
        refuse_source(kernel, state, &mut j);
    } else {
        known = follow(kernel, &mut flow, &mut j);
        if known == Known::Yes {
            return Answer::Pass;
        }
        flow.direction = Direction::Egress;
        judge(kernel, &flow, &mut j);
    }
    if j.decision.passes() {
        open(kernel, &flow, &j);
        if state.flags & SocketState::CONNECTED == 0 {
            remember(state, kernel.generation, &j);
            state.direction = Direction::Egress as u8;
            state.remote_addr = remote_addr;
            state.remote_port = remote_port;
        }
        if known == Known::Stale {
            return Answer::Pass;
        }
    }
    let about = About {
        kind: EventKind::New,
        hook,
        socket_type: 0,
        family: 0,
        generation: kernel.generation,
        sequence: 0,
        cgroup: state.cgroup,
    };
    report(&about, &flow, &j, if hook as u8 == Hook::Sendmsg as u8 { CALLER } else { NOBODY });
    refusal(&j)
}

/// What the flow table says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Judged in this generation, and alive.
    Yes,
    /// Judged in an older generation; the direction it was opened in no longer allows it, or another must be judged.
    Stale,
    No,
}

#[inline(always)]
fn flow_key(flow: &Flow) -> FlowKey {
    FlowKey {
        netns: flow.netns,
        remote: flow.remote_addr,
        // For ICMP the type and code: one type that was let through opens no other.
        remote_port: flow.remote_port,
        local_port: if is_icmp(flow.protocol) { 0 } else { flow.local_port },
        protocol: flow.protocol,
        pad: 0,
    }
}

#[inline(always)]
fn is_icmp(protocol: u16) -> bool {
    protocol == ipproto::ICMP || protocol == ipproto::ICMPV6
}

/// Is the datagram part of a flow that was let through, in either direction?
#[inline(never)]
fn follow(kernel: &Kernel, flow: &mut Flow, j: &mut Judgement) -> Known {
    let key = flow_key(flow);
    let Some(value) = find_flow(&key) else { return Known::No };
    let time = now();
    if value.local != flow.local.0 || time.wrapping_sub(value.seen) > bounds::FLOW_IDLE_NS {
        return Known::No;
    }
    if value.generation != kernel.generation || (value.until != 0 && time >= value.until) {
        let asked = flow.direction as u8;
        if value.direction == asked {
            return Known::Stale;
        }
        // It was opened the other way round: judge it as it was opened.
        let (local_port, remote_port) = (flow.local_port, flow.remote_port);
        flow.direction =
            if value.direction == Direction::Egress as u8 { Direction::Egress } else { Direction::Ingress };
        judge(kernel, flow, j);
        if !j.decision.passes() {
            return Known::No;
        }
        flow.local_port = local_port;
        flow.remote_port = remote_port;
        value.generation = kernel.generation;
        value.until = j.decision.until;
    }
    value.seen = time;
    Known::Yes
}

/// Enters a flow that was let through.
#[inline(always)]
fn open(kernel: &Kernel, flow: &Flow, j: &Judgement) {
    let key = flow_key(flow);
    let value = FlowValue {
        seen: now(),
        until: j.decision.until,
        generation: kernel.generation,
        local: flow.local.0,
        direction: flow.direction as u8,
        pad: [0; 7],
    };
    store_flow(&key, &value);
}

/// ICMP messages that answer or report on something: echo replies and errors (RFC 792, RFC 4443). The kernel hands them
/// to a socket that was granted ICMP; what they answer was judged on its way out.
#[inline(always)]
fn answers(protocol: u16, kind: u16) -> bool {
    match protocol {
        ipproto::ICMP => matches!(kind >> 8, 0 | 3 | 11 | 12),
        ipproto::ICMPV6 => matches!(kind >> 8, 1..=4 | 129),
        _ => false,
    }
}

/// `cgroup_skb/ingress` for all that is not TCP.
#[inline(never)]
pub fn ingress(skb: *mut __sk_buff, sk: &bpf_sock, state: &mut SocketState) -> Answer {
    let kernel = Kernel::read();
    // The packet's room on the stack is free again once the flow is known.
    let mut flow = {
        let mut packet = Packet::EMPTY;
        if !read(skb, &mut packet) {
            return unreadable(&kernel, state);
        }
        if answers(packet.protocol, packet.destination_port) {
            return Answer::Pass;
        }
        Flow {
            direction: Direction::Ingress,
            protocol: packet.protocol,
            local: state.local(),
            workload: state.workload,
            netns: state.netns,
            local_addr: packet.destination,
            remote_addr: packet.source,
            local_port: packet.destination_port,
            remote_port: packet.source_port,
        }
    };
    if cached(state, kernel.generation)
        && state.direction == Direction::Egress as u8
        && state.remote_port == flow.remote_port
        && state.remote_addr == flow.remote_addr
    {
        return Answer::Pass;
    }
    if state.generation != kernel.generation {
        refresh(state);
        flow.local = state.local();
        flow.workload = state.workload;
    }
    let mut j = unjudged();
    // From the peer that this socket asked: the answer to the question belongs to it, judged as the question was.
    if state.verdict != 0
        && state.direction == Direction::Egress as u8
        && state.remote_port == flow.remote_port
        && state.remote_addr == flow.remote_addr
    {
        flow.direction = Direction::Egress;
        judge(&kernel, &flow, &mut j);
        match live(state, kernel.generation, &mut j) {
            Live::Goes => return Answer::Pass,
            Live::EndsNow | Live::Ended => flow.direction = Direction::Ingress,
        }
    }
    let known = follow(&kernel, &mut flow, &mut j);
    if known == Known::Yes {
        return Answer::Pass;
    }
    flow.direction = Direction::Ingress;
    if flow.protocol == ipproto::UDP && sk.state != 0 {
        introduce(skb, &kernel, &flow);
    }
    judge(&kernel, &flow, &mut j);
    if j.decision.passes() {
        open(&kernel, &flow, &j);
        if known == Known::Stale {
            return Answer::Pass;
        }
    }
    let about = About {
        kind: if j.decision.reject && !j.decision.passes() { EventKind::Reject } else { EventKind::New },
        hook: Hook::Ingress,
        socket_type: 0,
        family: 0,
        generation: kernel.generation,
        sequence: 0,
        cgroup: state.cgroup,
    };
    report(&about, &flow, &j, NOBODY);
    refusal(&j)
}

/// A connected UDP socket that never bound a port shows it to no hook of ours. When its datagram arrives on this host,
/// the socket is looked up from the other side and entered into the endpoint table.
#[inline(never)]
fn introduce(skb: *mut __sk_buff, kernel: &Kernel, flow: &Flow) {
    if !flow.remote_addr.is_loopback() {
        match kernel.address(&flow.remote_addr) {
            Some(entry) if entry.netns == flow.netns => {}
            Some(_) | None => return,
        }
    }
    if segfw_common::decide::endpoint(kernel, flow.netns, &flow.remote_addr, ipproto::UDP, flow.remote_port).is_some() {
        return;
    }
    // From the view of the sender's socket the datagram's destination is the peer.
    let (sport, dport) = (flow.local_port.to_be(), flow.remote_port.to_be());
    let mut words = [0u32; 9];
    let length = if flow.remote_addr.is_v4() {
        words[0] = flow.local_addr.0[3];
        words[1] = flow.remote_addr.0[3];
        words[2] = u32::from(sport) | u32::from(dport) << 16;
        12
    } else {
        words[0] = flow.local_addr.0[0];
        words[1] = flow.local_addr.0[1];
        words[2] = flow.local_addr.0[2];
        words[3] = flow.local_addr.0[3];
        words[4] = flow.remote_addr.0[0];
        words[5] = flow.remote_addr.0[1];
        words[6] = flow.remote_addr.0[2];
        words[7] = flow.remote_addr.0[3];
        words[8] = u32::from(sport) | u32::from(dport) << 16;
        36
    };
    let current: i32 = BPF_F_CURRENT_NETNS;
    // SAFETY: `words` holds a `bpf_sock_tuple` of `length` bytes; the socket is released below on every path.
    unsafe {
        let found = bpf_sk_lookup_udp(
            skb.cast(),
            words.as_mut_ptr().cast::<bpf_sock_tuple>(),
            length,
            current as i64 as u64,
            0,
        );
        if found.is_null() {
            return;
        }
        if let Some(state) = socket_state(found.cast()) {
            ensure_registered(state, source_addr(found), (*found).src_port as u16);
        }
        let _ = bpf_sk_release(found.cast());
    }
}

/// TCP and UDP on their way out were judged when they were opened; here their time may end, with nobody but the kernel
/// awake. A reset goes out always: it is how the peer learns that the connection is over.
#[inline(always)]
fn ordinary(skb: *mut __sk_buff, sk: *mut core::ffi::c_void, kernel: &Kernel, protocol: u16) -> Answer {
    let Some(state) = socket_state(sk) else { return Answer::Pass };
    if crate::stream::outlived(state, kernel) == Answer::Pass {
        return Answer::Pass;
    }
    if protocol == ipproto::TCP {
        let mut packet = Packet::EMPTY;
        if read(skb, &mut packet) && packet.tcp_flags & Packet::RST != 0 {
            return Answer::Pass;
        }
    }
    Answer::Refuse
}

/// `cgroup_skb/egress`: what a granted socket sends, packet by packet.
#[inline(always)]
pub fn egress(ctx: &SkBuffContext) -> Answer {
    let skb = ctx.skb.skb;
    // SAFETY: the program's context.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return Answer::Pass;
    }
    // SAFETY: a socket pointer of the context.
    let full = unsafe { bpf_sk_fullsock(sk) };
    if full.is_null() {
        return Answer::Pass;
    }
    // SAFETY: checked for null above.
    let (kind, protocol) = unsafe { ((*full).type_, (*full).protocol as u16) };
    let kernel = Kernel::read();
    if kind != SOCK_RAW && (protocol == ipproto::TCP || protocol == ipproto::UDP) {
        return ordinary(skb, sk.cast(), &kernel, protocol);
    }
    let state = match socket_state(sk.cast()) {
        Some(state) => state,
        None => match crate::stream::adopt(skb, full, protocol) {
            Some(state) => state,
            None => return Answer::Refuse,
        },
    };
    let mut packet = Packet::EMPTY;
    if !read(skb, &mut packet) {
        return unreadable(&kernel, state);
    }
    // Neighbour discovery (RFC 4861, types 133 to 137) of the kernel itself, from a control socket that no process made.
    if state.flags & SocketState::CREATED == 0
        && packet.protocol == ipproto::ICMPV6
        && matches!(packet.destination_port >> 8, 133..=137)
    {
        return Answer::Pass;
    }
    // A raw socket may build any fragment it likes: one without ports cannot be judged.
    if packet.later_fragment {
        return unreadable(&kernel, state);
    }
    if !is_icmp(packet.protocol) {
        state.local_port = packet.source_port;
    }
    outbound(&kernel, state, packet.protocol, packet.destination, packet.destination_port, Hook::Egress, false)
}
