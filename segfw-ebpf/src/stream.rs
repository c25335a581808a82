//! TCP: judged at `connect`, at the SYN, and again when the policy changes. Nothing per packet but one comparison.

use crate::Answer;
use crate::datagram;
use crate::emit::{About, CALLER, CALLER_OF_SOCK_OPS, NOBODY, begin, describe, report, report_at, submit};
use crate::judge::{Judgement, Live, blur, cached, judge, live, opaque_zero, recall, remember, unjudged};
use crate::maps::{
    Kernel, forget_listener, forget_origin, last_handshake, now, register_endpoint, socket_state, socket_state_or_new,
    store_listener, store_origin, unregister_endpoint,
};
use crate::socket::{AF_INET6, of_process, refresh, resolve_skb, source_addr};
use aya_ebpf::bindings::{
    __sk_buff, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, bpf_sock, bpf_sock_addr, bpf_sock_ops,
};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_fullsock, bpf_skb_load_bytes, bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::programs::{SkBuffContext, SockAddrContext, SockOpsContext};
use core::mem::MaybeUninit;
use segfw_common::decide::origin_key;
use segfw_common::event::{Counter, Hook};
use segfw_common::packet::{self, Bytes, Packet};
use segfw_common::rule::ipproto;
use segfw_common::{
    Addr, Direction, EndpointKey, EventKind, Flow, Identity, Listener, Lookup, Party, SocketState, Verdict, control,
};

const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
const SOCK_DGRAM: u32 = 2;

/// The bytes of an skb, from its IP header on.
pub struct Skb(pub *mut __sk_buff);

impl Bytes for Skb {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // Not zeroed first: the helper writes all of it, zeros if it fails.
        let mut out = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: `out` has N bytes; the helper checks the packet's end.
        let rc = unsafe { bpf_skb_load_bytes(self.0.cast(), offset, out.as_mut_ptr().cast(), N as u32) };
        // SAFETY: the helper wrote N bytes.
        if rc == 0 { Some(unsafe { out.assume_init() }) } else { None }
    }
}

/// Reads the packet of an skb. Not inlined: one copy, a stack frame of its own.
#[inline(never)]
pub fn read(skb: *mut __sk_buff, out: &mut Packet) -> bool {
    let readable = packet::parse_into(&Skb(skb), 0, out).is_ok();
    if !readable {
        crate::maps::count(Counter::Malformed as u32);
    }
    forget(out);
    readable
}

/// Makes all packets look alike to the verifier (see `opaque_zero`).
#[inline(always)]
pub fn forget(packet: &mut Packet) {
    let zero = opaque_zero();
    blur_addr(&mut packet.source, zero);
    blur_addr(&mut packet.destination, zero);
    packet.sequence ^= zero;
    packet.protocol ^= zero as u16;
    packet.source_port ^= zero as u16;
    packet.destination_port ^= zero as u16;
    packet.tcp_flags ^= zero as u8;
    blur(&mut packet.later_fragment, zero);
}

/// The same for one address.
#[inline(always)]
pub fn blur_addr(addr: &mut Addr, zero: u32) {
    let Addr([a, b, c, d]) = addr;
    *a ^= zero;
    *b ^= zero;
    *c ^= zero;
    *d ^= zero;
}

/// The address and port a process named in `connect` or `sendmsg`.
#[inline(always)]
pub fn named(ctx: *const bpf_sock_addr, v6: bool) -> (Addr, u16) {
    // SAFETY: the program's context; words are read one by one, as the verifier wants.
    unsafe {
        let port = u16::from_be((*ctx).user_port as u16);
        let mut addr = if v6 {
            let w = &raw const (*ctx).user_ip6;
            let w = w.cast::<u32>();
            Addr::from_v6_be([
                w.read_volatile(),
                w.add(1).read_volatile(),
                w.add(2).read_volatile(),
                w.add(3).read_volatile(),
            ])
        } else {
            Addr::from_v4_be((*ctx).user_ip4)
        };
        blur_addr(&mut addr, opaque_zero());
        (addr, port)
    }
}

/// `connect`: egress TCP, connected UDP, ping.
#[inline(always)]
pub fn connect(ctx: &SockAddrContext, v6: bool) -> Answer {
    let raw = ctx.sock_addr;
    // SAFETY: the program's context.
    let (sk, kind, protocol) = unsafe { ((*raw).__bindgen_anon_1.sk, (*raw).type_, (*raw).protocol as u16) };
    if sk.is_null() {
        return Answer::Pass;
    }
    let kernel = Kernel::read();
    // SAFETY: the program's context.
    let netns = unsafe { bpf_get_netns_cookie(raw.cast()) };
    let (remote_addr, mut remote_port) = named(raw, v6);
    let datagram = kind == SOCK_DGRAM;
    if protocol == ipproto::ICMP {
        remote_port = 8 << 8;
    } else if protocol == ipproto::ICMPV6 {
        remote_port = 128 << 8;
    }
    // SAFETY: `sk` is a socket pointer of the context.
    let (local_addr, local_port) = unsafe { (source_addr(sk), (*sk).src_port as u16) };
    let mut flow = Flow {
        direction: Direction::Egress,
        protocol,
        local: Identity::UNRESOLVED,
        workload: 0,
        netns,
        local_addr,
        remote_addr,
        local_port,
        remote_port,
    };
    let Some(state) = of_process(sk.cast(), netns, protocol) else {
        return datagram::without_state(&kernel, &mut flow, Hook::Connect);
    };
    if state.generation != kernel.generation {
        refresh(state);
    }
    flow.local = state.local();
    flow.workload = state.workload;
    let mut j = unjudged();
    if datagram && datagram::borrows(&kernel, state, &source_addr(sk)) {
        datagram::refuse_source(&kernel, state, &mut j);
    } else {
        judge(&kernel, &flow, &mut j);
    }
    remember(state, kernel.generation, &j);
    state.direction = Direction::Egress as u8;
    state.remote_addr = remote_addr;
    state.remote_port = remote_port;
    state.drain = 0;
    state.flags &= !SocketState::LOGGED;
    if datagram {
        state.flags |= SocketState::CONNECTED;
    }
    // A TCP connection that may go is reported with its final addresses, when the SYN leaves.
    if datagram || !j.decision.passes() {
        let about = About {
            kind: EventKind::New,
            hook: Hook::Connect,
            socket_type: 0,
            family: 0,
            generation: kernel.generation,
            sequence: 0,
            cgroup: state.cgroup,
        };
        report(&about, &flow, &j, CALLER);
    }
    if datagram && j.decision.passes() {
        // SAFETY: as above.
        datagram::ensure_registered(state, local_addr, local_port);
    }
    datagram::refusal(&j)
}

/// `cgroup_skb/ingress`, all protocols: the cached answer, or the road to a new one.
#[inline(always)]
pub fn ingress(ctx: &SkBuffContext) -> Answer {
    let skb = ctx.skb.skb;
    // SAFETY: the program's context.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return Answer::Pass;
    }
    let kernel = Kernel::read();
    if kernel.host_flags() & control::HOST_CONN != 0 {
        // SAFETY: a socket pointer of the context; the helper returns null for request and time-wait sockets.
        let full = unsafe { bpf_sk_fullsock(sk) };
        // SAFETY: checked for null.
        if full.is_null() || unsafe { (*full).protocol } == u32::from(ipproto::TCP) {
            return Answer::Pass;
        }
    }
    let state = socket_state(sk.cast());
    // SAFETY: checked for null above.
    let tcp_state = unsafe { (*sk).state };
    if let Some(state) = &state
        && tcp_state != TCP_LISTEN
    {
        // Nearly every segment there is ends here.
        if state.passes == kernel.generation && kernel.generation != 0 {
            return Answer::Pass;
        }
        if state.protocol == ipproto::TCP && cached(state, kernel.generation) {
            return Answer::Pass;
        }
    }
    // SAFETY: a socket pointer of the context; the helper returns null for request and time-wait sockets.
    let full = unsafe { bpf_sk_fullsock(sk) };
    if full.is_null() {
        return Answer::Pass;
    }
    // SAFETY: checked for null above.
    let protocol = unsafe { (*full).protocol as u16 };
    let state = match state {
        Some(state) => Some(state),
        None => adopt(skb, full, protocol),
    };
    let Some(state) = state else {
        return Answer::Refuse;
    };
    if protocol != ipproto::TCP {
        // SAFETY: checked for null above.
        return datagram::ingress(skb, unsafe { &*full }, state);
    }
    // Each reads the tables in force anew: what it would take over here costs room on the stack.
    if tcp_state == TCP_LISTEN { handshake(skb, state) } else { alive(skb, state) }
}

/// A socket that is older than the agent, or that the kernel made for itself: resolved on first sight.
#[inline(always)]
pub fn adopt<'a>(skb: *mut __sk_buff, sk: *mut bpf_sock, protocol: u16) -> Option<&'a mut SocketState> {
    let state = socket_state_or_new(sk.cast())?;
    state.protocol = protocol;
    resolve_skb(skb, state);
    Some(state)
}

/// A SYN, or the ACK that ends a handshake (and may carry data): both show the listener, both get the same answer,
/// since it follows from the addresses alone. Not inlined: the frames of a chain of calls share 512 bytes, and kernels below
/// 6.3 round each up to 32.
#[inline(never)]
fn handshake(skb: *mut __sk_buff, state: &mut SocketState) -> Answer {
    let kernel = Kernel::read();
    // A listener's own answer stays "none": the number says only for which generation its cgroup was looked up.
    if state.generation != kernel.generation {
        refresh(state);
        state.generation = kernel.generation;
    }
    let mut packet = Packet::EMPTY;
    if !read(skb, &mut packet) {
        return datagram::unreadable(&kernel, state);
    }
    let flow = inbound(&packet, state.local(), state.workload, state.netns);
    // The ACK has the number after the SYN's.
    if answered(state, &flow, kernel.generation, packet.sequence.wrapping_sub(1)).is_some() {
        return Answer::Pass;
    }
    let mut j = unjudged();
    judge(&kernel, &flow, &mut j);
    if j.decision.passes() {
        if packet.opens() {
            keep(&flow, kernel.generation, packet.sequence, &j);
        }
        return Answer::Pass;
    }
    refused(&kernel, &packet, &flow, &j, Hook::Ingress, state.cgroup)
}

/// A segment for a listener, as its local end sees it.
#[inline(always)]
pub fn inbound(packet: &Packet, local: Identity, workload: u32, netns: u64) -> Flow {
    Flow {
        direction: Direction::Ingress,
        protocol: ipproto::TCP,
        local,
        workload,
        netns,
        local_addr: packet.destination,
        remote_addr: packet.source,
        local_port: packet.destination_port,
        remote_port: packet.source_port,
    }
}

/// A listener is not to see this segment. Only of a SYN it is told: what follows one belongs to it.
#[inline(always)]
pub fn refused(kernel: &Kernel, packet: &Packet, flow: &Flow, j: &Judgement, hook: Hook, cgroup: u64) -> Answer {
    if packet.opens() {
        let about = About {
            kind: if j.decision.reject { EventKind::Reject } else { EventKind::New },
            hook,
            socket_type: 0,
            family: 0,
            generation: kernel.generation,
            sequence: packet.sequence,
            cgroup,
        };
        report(&about, flow, j, NOBODY);
    }
    Answer::Refuse
}

/// 1 where no two softirqs take turns on a CPU, as they do under PREEMPT_RT; set by the loader, a constant for the verifier.
#[unsafe(no_mangle)]
static SOFTIRQ_ALONE: u32 = 1;

/// Keeps the answer to a SYN for the rest of its handshake.
#[inline(always)]
pub fn keep(flow: &Flow, generation: u32, sequence: u32, j: &Judgement) {
    // SAFETY: a plain read that the compiler may not fold, since the loader changes the value.
    if unsafe { core::ptr::read_volatile(&raw const SOFTIRQ_ALONE) } == 0 {
        return;
    }
    let Some(kept) = last_handshake() else { return };
    let answer = &mut kept.answer;
    answer.netns = flow.netns;
    answer.local_addr = flow.local_addr;
    answer.remote_addr = flow.remote_addr;
    answer.local_port = flow.local_port;
    answer.remote_port = flow.remote_port;
    answer.identity = flow.local.0;
    answer.workload = flow.workload;
    answer.protocol = ipproto::TCP;
    remember(answer, generation, j);
    kept.sequence = sequence;
}

/// The answer to the SYN with this number, if it is the last one that came to this CPU, was judged for the same owner of the
/// listener in this generation, and let it pass with no end.
#[inline(always)]
fn answered<'a>(state: &SocketState, flow: &Flow, generation: u32, sequence: u32) -> Option<&'a SocketState> {
    let kept = last_handshake()?;
    let answer = &kept.answer;
    let same = kept.sequence == sequence
        && answer.passes == generation
        && generation != 0
        && answer.netns == state.netns
        && answer.identity == state.identity
        && answer.workload == state.workload
        && answer.remote_port == flow.remote_port
        && answer.local_port == flow.local_port
        && answer.remote_addr == flow.remote_addr
        && answer.local_addr == flow.local_addr;
    if same { Some(answer) } else { None }
}

/// A segment of a connection whose cached answer is missing, of an older generation, past its time, or a refusal.
#[inline(never)]
fn alive(skb: *mut __sk_buff, state: &mut SocketState) -> Answer {
    let kernel = Kernel::read();
    if state.generation == kernel.generation && state.verdict == Verdict::Denied as u8 {
        return Answer::Refuse;
    }
    refresh(state);
    let mut packet = Packet::EMPTY;
    if !read(skb, &mut packet) {
        return datagram::unreadable(&kernel, state);
    }
    let known = state.verdict != 0;
    let mut flow = Flow {
        direction: if state.direction == Direction::Egress as u8 && known {
            Direction::Egress
        } else {
            Direction::Ingress
        },
        protocol: ipproto::TCP,
        local: state.local(),
        workload: state.workload,
        netns: state.netns,
        local_addr: packet.destination,
        remote_addr: packet.source,
        local_port: packet.destination_port,
        remote_port: packet.source_port,
    };
    let mut j = unjudged();
    judge(&kernel, &flow, &mut j);
    if !known && !j.decision.passes() {
        // Older than the agent: nobody saw which end opened it. It goes on if either reading allows it; the agent's
        // inventory knows the listeners and cuts what should not be.
        flow.direction = Direction::Egress;
        judge(&kernel, &flow, &mut j);
    }
    state.direction = flow.direction as u8;
    match live(state, kernel.generation, &mut j) {
        Live::Goes => Answer::Pass,
        Live::Ended => Answer::Refuse,
        Live::EndsNow => {
            let about = About {
                kind: EventKind::Revoked,
                hook: Hook::Ingress,
                socket_type: 0,
                family: 0,
                generation: kernel.generation,
                sequence: 0,
                cgroup: state.cgroup,
            };
            report(&about, &flow, &j, NOBODY);
            Answer::Refuse
        }
    }
}

/// A flow whose time is over, or that was refused since: judged by what its socket remembers, for the egress hook.
#[inline(always)]
pub fn outlived(state: &mut SocketState, kernel: &Kernel) -> Answer {
    if state.verdict == 0 || (state.until == 0 && state.verdict != Verdict::Denied as u8) {
        return Answer::Pass;
    }
    if state.verdict != Verdict::Denied as u8 && now() < state.until {
        return Answer::Pass;
    }
    if state.verdict == Verdict::Denied as u8 && state.generation == kernel.generation {
        return Answer::Refuse;
    }
    refresh(state);
    let flow = Flow {
        direction: if state.direction == Direction::Egress as u8 { Direction::Egress } else { Direction::Ingress },
        protocol: state.protocol,
        local: state.local(),
        workload: state.workload,
        netns: state.netns,
        local_addr: state.local_addr,
        remote_addr: state.remote_addr,
        local_port: state.local_port,
        remote_port: state.remote_port,
    };
    let mut j = unjudged();
    judge(kernel, &flow, &mut j);
    match live(state, kernel.generation, &mut j) {
        Live::Goes => Answer::Pass,
        Live::Ended => Answer::Refuse,
        Live::EndsNow => {
            let about = About {
                kind: EventKind::Revoked,
                hook: Hook::Egress,
                socket_type: 0,
                family: 0,
                generation: kernel.generation,
                sequence: 0,
                cgroup: state.cgroup,
            };
            report(&about, &flow, &j, NOBODY);
            Answer::Refuse
        }
    }
}

/// `sock_ops`.
#[inline(always)]
pub fn life(ctx: &SockOpsContext) {
    let ops = ctx.ops;
    // SAFETY: the program's context.
    let op = unsafe { (*ops).op };
    match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB => leaves(ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ops),
        BPF_SOCK_OPS_TCP_LISTEN_CB => listens(ops),
        BPF_SOCK_OPS_STATE_CB => {
            // SAFETY: as above; arguments are (old state, new state).
            let (old, new) = unsafe { ((*ops).__bindgen_anon_1.args[0], (*ops).__bindgen_anon_1.args[1]) };
            if new == TCP_CLOSE {
                ends(ops, old == TCP_LISTEN);
            }
        }
        _ => {}
    }
}

#[inline(always)]
fn ends_of(ops: *const bpf_sock_ops) -> (Addr, Addr, u16, u16) {
    // SAFETY: the program's context; word by word.
    unsafe {
        let local_port = (*ops).local_port as u16;
        let remote_port = u32::from_be((*ops).remote_port) as u16;
        if (*ops).family == AF_INET6 {
            let l = (&raw const (*ops).local_ip6).cast::<u32>();
            let r = (&raw const (*ops).remote_ip6).cast::<u32>();
            (
                Addr::from_v6_be([
                    l.read_volatile(),
                    l.add(1).read_volatile(),
                    l.add(2).read_volatile(),
                    l.add(3).read_volatile(),
                ]),
                Addr::from_v6_be([
                    r.read_volatile(),
                    r.add(1).read_volatile(),
                    r.add(2).read_volatile(),
                    r.add(3).read_volatile(),
                ]),
                local_port,
                remote_port,
            )
        } else {
            (Addr::from_v4_be((*ops).local_ip4), Addr::from_v4_be((*ops).remote_ip4), local_port, remote_port)
        }
    }
}

/// The full set of callbacks: children inherit their listener's, so it is always set whole.
#[inline(always)]
fn watch(ops: *mut bpf_sock_ops) {
    // SAFETY: the program's context.
    let _ = unsafe { bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32) };
}

#[inline(always)]
fn state_of<'a>(ops: *mut bpf_sock_ops) -> Option<&'a mut SocketState> {
    // SAFETY: the program's context.
    let sk = unsafe { (*ops).__bindgen_anon_2.sk };
    if sk.is_null() { None } else { socket_state(sk.cast()) }
}

/// The SYN is about to leave, and every address is final.
#[inline(always)]
fn leaves(ops: *mut bpf_sock_ops) {
    let Some(state) = state_of(ops) else { return };
    watch(ops);
    let kernel = Kernel::read();
    let (local_addr, remote_addr, local_port, remote_port) = ends_of(ops);
    let flow = Flow {
        direction: Direction::Egress,
        protocol: ipproto::TCP,
        local: state.local(),
        workload: state.workload,
        netns: state.netns,
        local_addr,
        remote_addr,
        local_port,
        remote_port,
    };
    store_origin(&origin_key(&flow), &Party { identity: state.identity, workload: state.workload });
    let mut j = unjudged();
    let unchanged = state.passes == kernel.generation
        && kernel.generation != 0
        && state.direction == Direction::Egress as u8
        && state.remote_port == remote_port
        && state.remote_addr == remote_addr
        // Who connects to its own port may have met itself, which nobody knew before the port was chosen.
        && local_port != remote_port;
    if unchanged {
        recall(state, &mut j);
    } else {
        // Another program may have rewritten the address after our `connect` hook. This hook cannot refuse, but the stored
        // answer stops what comes back.
        judge(&kernel, &flow, &mut j);
        remember(state, kernel.generation, &j);
    }
    state.direction = Direction::Egress as u8;
    state.local_addr = local_addr;
    state.remote_addr = remote_addr;
    state.local_port = local_port;
    state.remote_port = remote_port;
    let time = now();
    state.started = time;
    state.flags |= SocketState::LOGGED;
    let about = About {
        kind: EventKind::New,
        hook: Hook::SockOps,
        socket_type: 0,
        family: 0,
        generation: kernel.generation,
        sequence: 0,
        cgroup: state.cgroup,
    };
    report_at(&about, &flow, &j, CALLER_OF_SOCK_OPS, time);
}

/// A child of a listener: its own answer, under its own addresses.
#[inline(always)]
fn accepted(ops: *mut bpf_sock_ops) {
    let Some(state) = state_of(ops) else { return };
    watch(ops);
    let kernel = Kernel::read();
    let (local_addr, remote_addr, local_port, remote_port) = ends_of(ops);
    // Both ends called at once (simultaneous open): the kernel says "passive" of the caller's own socket, whose SYN was
    // judged. A listener's child never looks like this: `listens` takes the answer off the listener.
    if state.verdict != 0
        && state.flags & SocketState::LOGGED != 0
        && state.direction == Direction::Egress as u8
        && state.remote_port == remote_port
        && state.remote_addr == remote_addr
    {
        return;
    }
    if state.generation != kernel.generation {
        refresh(state);
    }
    let flow = Flow {
        direction: Direction::Ingress,
        protocol: ipproto::TCP,
        local: state.local(),
        workload: state.workload,
        netns: state.netns,
        local_addr,
        remote_addr,
        local_port,
        remote_port,
    };
    let mut j = unjudged();
    state.flags = SocketState::LOGGED;
    state.drain = 0;
    // SAFETY: the program's context. Behind the SYN, unless data came with it: then nothing is kept under that number.
    let sequence = unsafe { (*ops).rcv_nxt }.wrapping_sub(1);
    match answered(state, &flow, kernel.generation, sequence) {
        Some(answer) => recall(answer, &mut j),
        None => judge(&kernel, &flow, &mut j),
    }
    remember(state, kernel.generation, &j);
    state.direction = Direction::Ingress as u8;
    state.local_addr = local_addr;
    state.remote_addr = remote_addr;
    state.local_port = local_port;
    state.remote_port = remote_port;
    let time = now();
    state.started = time;
    let about = About {
        kind: EventKind::New,
        hook: Hook::SockOps,
        socket_type: 0,
        family: 0,
        generation: kernel.generation,
        sequence: 0,
        cgroup: state.cgroup,
    };
    report_at(&about, &flow, &j, NOBODY, time);
}

/// A listener: its endpoint is known from now on, and no answer of an earlier life of the socket is left on it.
#[inline(always)]
fn listens(ops: *mut bpf_sock_ops) {
    // A socket that was made before the hooks were is entered by the agent's inventory.
    let Some(state) = state_of(ops) else { return };
    watch(ops);
    // SAFETY: the program's context.
    let cookie = unsafe { bpf_get_socket_cookie(ops.cast()) };
    let listener =
        Listener { netns: state.netns, cgroup: state.cgroup, identity: state.identity, workload: state.workload };
    store_listener(cookie, &listener);
    let (local_addr, _, local_port, _) = ends_of(ops);
    state.verdict = 0;
    state.generation = 0;
    state.passes = 0;
    if state.flags & SocketState::REGISTERED != 0 {
        return;
    }
    state.local_addr = local_addr;
    state.local_port = local_port;
    let key = EndpointKey { netns: state.netns, addr: local_addr, port: local_port, protocol: ipproto::TCP, pad: 0 };
    if register_endpoint(&key, Party { identity: state.identity, workload: state.workload }) {
        state.flags = SocketState::REGISTERED;
    }
}

/// The end of a connection or of a listener.
#[inline(always)]
fn ends(ops: *mut bpf_sock_ops, listener: bool) {
    let Some(state) = state_of(ops) else { return };
    // A child that dies before it is accepted still carries its listener's mark: only the listener itself signs off.
    if listener && state.flags & SocketState::REGISTERED == 0 {
        return;
    }
    if listener {
        // SAFETY: the program's context.
        forget_listener(unsafe { bpf_get_socket_cookie(ops.cast()) });
        let key = EndpointKey {
            netns: state.netns,
            addr: state.local_addr,
            port: state.local_port,
            protocol: ipproto::TCP,
            pad: 0,
        };
        unregister_endpoint(&key);
        state.flags &= !SocketState::REGISTERED;
        return;
    }
    if state.flags & SocketState::LOGGED == 0 {
        return;
    }
    state.flags &= !SocketState::LOGGED;
    let flow = Flow {
        direction: if state.direction == Direction::Egress as u8 { Direction::Egress } else { Direction::Ingress },
        protocol: ipproto::TCP,
        local: state.local(),
        workload: state.workload,
        netns: state.netns,
        local_addr: state.local_addr,
        remote_addr: state.remote_addr,
        local_port: state.local_port,
        remote_port: state.remote_port,
    };
    if matches!(flow.direction, Direction::Egress) {
        forget_origin(&origin_key(&flow));
    }
    if state.flags & SocketState::NO_LOG != 0 || state.local().is_canary() {
        return;
    }
    let time = now();
    let Some(event) = begin(time) else { return };
    // SAFETY: reserved and zeroed by `begin`; `ops` is the program's context.
    unsafe {
        let e = &mut *event;
        describe(e, &flow);
        e.cgroup = state.cgroup;
        e.remote = state.remote;
        e.rule = state.rule;
        e.pending_rule = state.pending_rule;
        e.generation = state.generation;
        e.kind = EventKind::Close as u8;
        e.verdict = state.verdict;
        e.reason = state.reason;
        e.pending = state.pending;
        e.evidence = state.evidence;
        e.hook = Hook::SockOps as u8;
        e.duration = time.wrapping_sub(state.started);
        e.bytes_sent = (*ops).bytes_acked;
        e.bytes_received = (*ops).bytes_received;
        e.segments_sent = (*ops).segs_out;
        e.segments_received = (*ops).segs_in;
        e.retransmits = (*ops).total_retrans;
        e.rtt_us = (*ops).srtt_us >> 3;
    }
    submit(event, false);
}
