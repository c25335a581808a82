//! The outer wall: XDP refuses what the sockets would refuse anyway, before it costs a buffer. Never needed for
//! correctness: whatever is in doubt goes on to the socket.

use crate::Answer;
use crate::emit::{About, NOBODY, report};
use crate::judge::{judge, unjudged};
use crate::maps::{Kernel, count, flow as find_flow, now, xdp_netns};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::programs::XdpContext;
use segfw_common::decide::endpoint;
use segfw_common::event::{Counter, Hook};
use segfw_common::packet::{self, Bytes, Packet};
use segfw_common::rule::ipproto;
use segfw_common::{Direction, EventKind, Evidence, Flow, FlowKey, Identity, Peers, bounds};

struct Frame(*mut xdp_md);

/// Headers lie within this many bytes of a frame, or it is the socket's to judge: the verifier needs a bound.
const HEADERS: u32 = 0xfff;

impl Bytes for Frame {
    // Not `bpf_xdp_load_bytes`, which came with 5.18. Programs without `xdp.frags` get whole frames only.
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if offset > HEADERS {
            return None;
        }
        // SAFETY: the program's context. Volatile: each look at the frame has its own comparison with its end.
        let (start, end) =
            unsafe { ((&raw const (*self.0).data).read_volatile(), (&raw const (*self.0).data_end).read_volatile()) };
        let at = start as usize + (offset & HEADERS) as usize;
        // Through memory: else one byte's comparison becomes `at >= end`, of which verifiers before 7 learn nothing.
        if core::hint::black_box(at + N) > end as usize {
            return None;
        }
        // SAFETY: the frame holds N bytes from here, as the line above compared. A frame need not be aligned.
        Some(unsafe { (at as *const [u8; N]).read_unaligned() })
    }
}

/// Reads a frame. Not inlined: a stack frame of its own.
#[inline(never)]
fn read(ctx: *mut xdp_md, out: &mut Packet) -> bool {
    let frame = Frame(ctx);
    let Some(at) = packet::ethernet(&frame) else { return false };
    let readable = packet::parse_into(&frame, at, out).is_ok();
    crate::stream::forget(out);
    readable
}

/// New TCP connections and datagrams toward a known local socket, judged as that socket would.
#[inline(always)]
pub fn judge_frame(ctx: &XdpContext) -> Answer {
    // SAFETY: the program's context.
    let Some(netns) = xdp_netns(unsafe { (*ctx.ctx).ingress_ifindex }) else { return Answer::Pass };
    let mut packet = Packet::EMPTY;
    // A frame that cannot be read is the stack's to drop.
    if !read(ctx.ctx, &mut packet) {
        return Answer::Pass;
    }
    if packet.later_fragment || packet.destination.is_multicast() {
        return Answer::Pass;
    }
    match packet.protocol {
        ipproto::TCP if packet.opens() => {}
        ipproto::UDP => {
            let key = FlowKey {
                netns,
                remote: packet.source,
                remote_port: packet.source_port,
                local_port: packet.destination_port,
                protocol: ipproto::UDP,
                pad: 0,
            };
            // A live flow, in whichever direction and of whichever generation: the socket knows.
            if let Some(value) = find_flow(&key)
                && now().wrapping_sub(value.seen) <= bounds::FLOW_IDLE_NS
            {
                return Answer::Pass;
            }
        }
        _ => return Answer::Pass,
    }
    let kernel = Kernel::read();
    // A wildcard listener has the port on every address of its namespace, and on no other: what is to be forwarded or
    // bridged is somebody else's.
    match kernel.address(&packet.destination) {
        Some(entry) if entry.netns == netns => {}
        Some(_) | None => return Answer::Pass,
    }
    let Some(owner) = endpoint(&kernel, netns, &packet.destination, packet.protocol, packet.destination_port) else {
        return Answer::Pass;
    };
    // Several owners share the port: the kernel has yet to choose the socket.
    if owner.identity == Identity::UNRESOLVED.0 {
        return Answer::Pass;
    }
    let flow = Flow {
        direction: Direction::Ingress,
        protocol: packet.protocol,
        local: Identity(owner.identity),
        workload: owner.workload,
        netns,
        local_addr: packet.destination,
        remote_addr: packet.source,
        local_port: packet.destination_port,
        remote_port: packet.source_port,
    };
    let mut j = unjudged();
    judge(&kernel, &flow, &mut j);
    // A `reject` is answered from the socket. A connected UDP socket knows its peer, this hook does not: a datagram from
    // this host's own side is the socket's to judge too.
    if j.decision.passes()
        || j.decision.reject
        || j.peer.evidence as u8 >= Evidence::Address as u8 && packet.protocol == ipproto::UDP
    {
        return Answer::Pass;
    }
    count(Counter::XdpDropped as u32);
    let about = About {
        kind: EventKind::New,
        hook: Hook::Xdp,
        socket_type: 0,
        family: 0,
        generation: kernel.generation,
        sequence: 0,
        cgroup: 0,
    };
    report(&about, &flow, &j, NOBODY);
    Answer::Refuse
}
