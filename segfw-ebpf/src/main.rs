//! The eBPF programs of segfw: every entry point, and the one match from an answer to what the kernel does.
#![no_std]
#![no_main]
// The whole crate is built with RUSTC_BOOTSTRAP for `-Z build-std=core`; the one feature is for `maps::add`.
#![feature(core_intrinsics)]
#![allow(clippy::needless_borrows_for_generic_args, reason = "keys by reference: no copies on a stack of 512 bytes")]
#![allow(unreachable_pub, reason = "modules of one binary: nothing is reachable from outside")]
#![expect(internal_features, reason = "core::sync::atomic has no read-modify-write on bpfel-unknown-none")]

mod cgroups;
mod conn;
mod datagram;
mod emit;
mod judge;
mod maps;
mod outer;
mod probe;
mod socket;
mod stream;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::helpers::generated::bpf_set_retval;
use aya_ebpf::macros::{btf_tracepoint, cgroup_skb, cgroup_sock, cgroup_sock_addr, lsm, sock_ops, tracepoint, xdp};
use aya_ebpf::programs::{
    BtfTracePointContext, LsmContext, SkBuffContext, SockAddrContext, SockContext, SockOpsContext, TracePointContext,
    XdpContext,
};

/// What a hook wants done; why is in the event it sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Pass,
    Refuse,
    /// Refuse, and tell the caller `ECONNREFUSED`.
    RefuseLoudly,
}

/// 1 where this kernel has `bpf_set_retval` in cgroup hooks (5.18); set by the loader, a constant for the verifier.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 1;

/// The one place where an answer becomes a return value of a cgroup hook: 1 = go on, 0 = drop or EPERM.
#[inline(always)]
fn cgroup_verdict(answer: Answer) -> i32 {
    match answer {
        Answer::Pass => 1,
        Answer::Refuse | Answer::RefuseLoudly => 0,
    }
}

/// The same for hooks that run in the calling process, where a refusal has an error number.
#[inline(always)]
fn syscall_verdict(answer: Answer) -> i32 {
    // SAFETY: a plain read that the compiler may not fold, since the loader changes the value.
    let has_retval = unsafe { core::ptr::read_volatile(&raw const HAS_SET_RETVAL) } != 0;
    if answer == Answer::RefuseLoudly && has_retval {
        const ECONNREFUSED: i32 = 111;
        // SAFETY: no pointers.
        let _ = unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    cgroup_verdict(answer)
}

/// The same for hooks of the kernel's own security checks: 0 = go on, an error number = refuse.
#[inline(always)]
fn security_verdict(answer: Answer) -> i32 {
    const EPERM: i32 = 1;
    match answer {
        Answer::Pass => 0,
        Answer::Refuse | Answer::RefuseLoudly => -EPERM,
    }
}

/// A cgroup is being made: is it a workload by its path?
#[tracepoint(category = "cgroup", name = "cgroup_mkdir")]
fn cgroup_made(ctx: TracePointContext) -> u32 {
    cgroups::made(&ctx);
    0
}

/// The same, for kernels below 6.1.
#[btf_tracepoint(function = "cgroup_mkdir")]
fn cgroup_made_by_type(ctx: BtfTracePointContext) -> i32 {
    cgroups::made_by_type(&ctx);
    0
}

/// Every socket a process makes: who is it, and is it a type its segment may have?
#[cgroup_sock(sock_create)]
fn sock_create(ctx: SockContext) -> i32 {
    cgroup_verdict(datagram::create(&ctx))
}

/// The last descriptor of a socket is closed: its endpoint goes.
#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    datagram::release(&ctx);
    1
}

/// A datagram socket got its port by `bind`.
#[cgroup_sock(post_bind4)]
fn post_bind4(ctx: SockContext) -> i32 {
    datagram::bound(&ctx, false);
    1
}

/// See `post_bind4`.
#[cgroup_sock(post_bind6)]
fn post_bind6(ctx: SockContext) -> i32 {
    datagram::bound(&ctx, true);
    1
}

/// TCP and connected UDP, on the way out.
#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    syscall_verdict(stream::connect(&ctx, false))
}

/// See `connect4`; mapped addresses come here too.
#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    syscall_verdict(stream::connect(&ctx, true))
}

/// Datagrams that carry their destination.
#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    syscall_verdict(datagram::send(&ctx, false))
}

/// See `sendmsg4`.
#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    syscall_verdict(datagram::send(&ctx, true))
}

/// Gate skb: everything a socket receives.
#[cgroup_skb(ingress)]
fn skb_ingress(ctx: SkBuffContext) -> i32 {
    cgroup_verdict(stream::ingress(&ctx))
}

/// What has no connect hook, on the way out; attached only where such sockets are granted.
#[cgroup_skb(egress)]
fn skb_egress(ctx: SkBuffContext) -> i32 {
    cgroup_verdict(datagram::egress(&ctx))
}

/// Life of a TCP connection: origin, listener, child, end.
#[sock_ops]
fn tcp_life(ctx: SockOpsContext) -> u32 {
    stream::life(&ctx);
    1
}

/// Gate conn: a SYN has reached a listener.
#[lsm(hook = "inet_conn_request")]
fn conn_request(ctx: LsmContext) -> i32 {
    security_verdict(conn::request(ctx.arg(0), ctx.arg(1)))
}

/// A process asks for a socket, of whatever family.
#[lsm(hook = "socket_create")]
fn socket_family(ctx: LsmContext) -> i32 {
    security_verdict(conn::family(ctx.arg(0), ctx.arg(1), ctx.arg(2), ctx.arg(3)))
}

/// The outer wall: what the sockets would refuse anyway, refused before it costs a buffer.
#[xdp]
fn outer_wall(ctx: XdpContext) -> u32 {
    match outer::judge_frame(&ctx) {
        Answer::Pass => XDP_PASS,
        Answer::Refuse | Answer::RefuseLoudly => XDP_DROP,
    }
}

/// Not attached anywhere: answers a question from user space through `BPF_PROG_TEST_RUN`, so that a test can show that
/// kernel and user space judge alike.
#[cgroup_skb(ingress)]
fn probe_decide(ctx: SkBuffContext) -> i32 {
    probe::answer(&ctx)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lets only GPL-compatible programs call the helpers used here.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
