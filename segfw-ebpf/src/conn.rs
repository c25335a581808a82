//! Gate conn: a TCP connection is judged where the kernel would make its request socket (`inet_conn_request`), once for a
//! SYN, and nothing is attached per packet. And the list of address families (`socket_create`).
//!
//! Both programs are loaded as BPF LSM or as `fmod_ret` of the `security_` function of the same name. The arguments are the
//! same; a `fmod_ret` program has no socket storage, so neither uses it: who a listener is stands in `LISTENERS`. Rust has
//! no CO-RE: where the kernel keeps what is read here the loader finds in its BTF and writes into `LAYOUT`.

use crate::Answer;
use crate::datagram::{monitored, refuse_socket};
use crate::emit::{About, loaded};
use crate::judge::{judge, opaque_zero, unjudged};
use crate::maps::{Kernel, cgroup, count, listener};
use crate::socket::{current, unpack};
use crate::stream::{forget, inbound, keep, refused};
use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_probe_read_kernel};
use core::ffi::c_void;
use segfw_common::decide::standing;
use segfw_common::event::{Counter, Hook};
use segfw_common::packet::{self, Bytes, Packet};
use segfw_common::{EventKind, Identity, Listener, LocalEntry, Lookup, Party, Reason, conn, control};

/// Offsets in bytes in structures of the running kernel; see [`conn::Layout`].
#[unsafe(no_mangle)]
static LAYOUT: conn::Layout = conn::Layout { cookie: 0, head: 0, network_header: 0 };

/// An skb before its network header is pulled: read from the kernel's memory, since these programs see no packet.
struct Raw {
    network: u64,
}

impl Bytes for Raw {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        read(self.network.wrapping_add(u64::from(offset)))
    }
}

/// Reads kernel memory; `None` = it is not mapped, or lockdown forbids it.
#[inline(always)]
fn read<const N: usize>(from: u64) -> Option<[u8; N]> {
    let mut out = [0u8; N];
    // SAFETY: `out` has N bytes; the helper checks the source.
    let rc = unsafe { bpf_probe_read_kernel(out.as_mut_ptr().cast(), N as u32, from as *const c_void) };
    if rc == 0 { Some(out) } else { None }
}

/// Finds the IP header of an skb and reads it and the TCP header. Not inlined: a stack frame of its own.
#[inline(never)]
fn parse(skb: u64, out: &mut Packet) -> bool {
    // SAFETY: a plain read that the compiler may not fold, since the loader changes the value.
    let layout = unsafe { core::ptr::read_volatile(&raw const LAYOUT) };
    let head = read::<8>(skb.wrapping_add(u64::from(layout.head)));
    let at = read::<2>(skb.wrapping_add(u64::from(layout.network_header)));
    let readable = match (head, at) {
        (Some(head), Some(at)) => {
            let network = u64::from_ne_bytes(head).wrapping_add(u64::from(u16::from_ne_bytes(at)));
            packet::parse_into(&Raw { network }, 0, out).is_ok()
        }
        _ => false,
    };
    forget(out);
    readable
}

/// Who listens: by its cookie, with the labels its cgroup has now. False = nobody knows.
#[inline(never)]
fn who(sk: u64, out: &mut Listener) -> bool {
    // SAFETY: as above.
    let layout = unsafe { core::ptr::read_volatile(&raw const LAYOUT) };
    let cookie = read::<8>(sk.wrapping_add(u64::from(layout.cookie))).map_or(0, u64::from_ne_bytes);
    let found = listener(cookie);
    let known = found.is_some();
    match found {
        Some(found) => *out = found,
        None => count(Counter::ListenerUnknown as u32),
    }
    if out.cgroup != 0
        && let Some(entry) = cgroup(out.cgroup)
    {
        out.identity = entry.identity;
        out.workload = entry.workload;
    }
    let zero = opaque_zero();
    out.identity ^= zero;
    out.workload ^= zero;
    out.netns ^= u64::from(zero);
    out.cgroup ^= u64::from(zero);
    known
}

/// `inet_conn_request(sk, skb, request)`. With SYN cookies it is asked again at the ACK: the same answer, since it follows
/// from the addresses alone.
#[inline(always)]
pub fn request(sk: u64, skb: u64) -> Answer {
    let kernel = Kernel::read();
    let mut local = Listener { netns: 0, cgroup: 0, identity: Identity::UNRESOLVED.0, workload: 0 };
    if !who(sk, &mut local) && kernel.host_flags() & control::HOST_PART != 0 {
        return Answer::Pass;
    }
    // Whatever the policy says, and also where none is in force.
    if local.identity == Identity::CANARY.0 {
        return Answer::Refuse;
    }
    let mut packet = Packet::EMPTY;
    if !parse(skb, &mut packet) {
        count(Counter::Malformed as u32);
        return match standing(&kernel, Identity(local.identity)) {
            Some((_, entry)) if !monitored(&kernel, &entry) => Answer::Refuse,
            Some(_) | None => Answer::Pass,
        };
    }
    let flow = inbound(&packet, Identity(local.identity), local.workload, local.netns);
    let mut j = unjudged();
    judge(&kernel, &flow, &mut j);
    // What passes is reported by `sock_ops`, once the handshake is over.
    if j.decision.passes() {
        if packet.opens() {
            keep(&flow, kernel.generation, packet.sequence, &j);
        }
        return Answer::Pass;
    }
    refused(&kernel, &packet, &flow, &j, Hook::ConnRequest, local.cgroup)
}

/// 1 where a security check may ask for the ancestors of the caller's cgroup (5.16); set by the loader, a constant for the
/// verifier.
#[unsafe(no_mangle)]
static CHECKS_KNOW_ANCESTORS: u32 = 1;

/// Who asks for a socket. Without the ancestors a cgroup that is not registered is unresolved, until the agent has seen it.
#[inline(always)]
fn caller(own: &mut u64) -> Party {
    if loaded(&CHECKS_KNOW_ANCESTORS) != 0 {
        return unpack(current(own));
    }
    // SAFETY: a helper without pointers.
    *own = unsafe { bpf_get_current_cgroup_id() };
    match cgroup(*own) {
        Some(entry) => Party { identity: entry.identity, workload: entry.workload },
        None => Party { identity: Identity::UNRESOLVED.0, workload: 0 },
    }
}

/// `socket_create(family, type, protocol, kern)`: an allowlist. The families that pass are those other hooks judge (IPv4,
/// IPv6), and those that stay on this host (local, netlink).
#[inline(always)]
pub fn family(family: u32, kind: u32, protocol: u32, kern: u32) -> Answer {
    if family == conn::AF_UNIX && protocol == conn::CANARY_PROTOCOL {
        return Answer::Refuse;
    }
    if kern != 0 || family < 32 && conn::JUDGED_FAMILIES & (1 << family) != 0 {
        return Answer::Pass;
    }
    let kernel = Kernel::read();
    let mut own = 0;
    let party = caller(&mut own);
    if party.identity <= Identity::HOST.0 && kernel.host_flags() & control::HOST_PART != 0 {
        return Answer::Pass;
    }
    let Some((_, local)) = standing(&kernel, Identity(party.identity)) else { return Answer::Pass };
    let grant = match family {
        conn::AF_PACKET => LocalEntry::GRANT_PACKET,
        conn::AF_VSOCK => LocalEntry::GRANT_VSOCK,
        _ => LocalEntry::GRANT_FAMILIES,
    };
    if local.grants & grant != 0 {
        return Answer::Pass;
    }
    let about = About {
        kind: EventKind::Socket,
        hook: Hook::SocketFamily,
        socket_type: kind as u8,
        family: family as u8,
        generation: kernel.generation,
        sequence: 0,
        cgroup: own,
    };
    refuse_socket(&kernel, &local, party, 0, 0, &about, Reason::ProtocolNotGranted)
}
