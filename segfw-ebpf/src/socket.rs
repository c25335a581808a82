//! Whose socket is it: identity from the cgroup the socket was born in, kept in socket storage.

use crate::maps::{cgroup, socket_state, socket_state_or_new};
use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::generated::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_skb_ancestor_cgroup_id,
    bpf_skb_cgroup_id,
};
use core::ffi::c_void;
use segfw_common::{Addr, CgroupEntry, Identity, Party, SocketState, bounds};

/// `AF_INET6`.
pub const AF_INET6: u32 = 10;

/// Identity of the nearest registered cgroup among `own` and its ancestors.
#[inline(always)]
fn resolve(own: u64, ancestor: impl Fn(i32) -> u64) -> Party {
    if let Some(entry) = cgroup(own) {
        return Party { identity: entry.identity, workload: entry.workload };
    }
    let mut level = bounds::CGROUP_DEPTH as i32;
    while level > 0 {
        level -= 1;
        let id = ancestor(level);
        if id != 0
            && id != own
            && let Some(entry) = cgroup(id)
        {
            if entry.flags & CgroupEntry::MANAGED != 0 {
                return Party { identity: Identity::UNRESOLVED.0, workload: 0 };
            }
            return Party { identity: entry.identity, workload: entry.workload };
        }
    }
    Party { identity: Identity::HOST.0, workload: 0 }
}

/// Who the task that acts is, and the id of its cgroup.
#[inline(never)]
pub fn current(own: &mut u64) -> u64 {
    // SAFETY: helpers without pointers.
    let id = unsafe { bpf_get_current_cgroup_id() };
    *own = id;
    // SAFETY: as above.
    let party = resolve(id, |level| unsafe { bpf_get_current_ancestor_cgroup_id(level) });
    // One word: a BPF function returns no more.
    u64::from(party.workload) << 32 | u64::from(party.identity)
}

/// The party that `current` packed.
#[inline(always)]
pub fn unpack(word: u64) -> Party {
    Party { identity: word as u32, workload: (word >> 32) as u32 }
}

/// Writes who owns the socket into its state, from the task that acts (it is the one that makes the socket).
#[inline(always)]
pub fn resolve_current(state: &mut SocketState) {
    let mut own = 0;
    let party = unpack(current(&mut own));
    state.cgroup = own;
    state.identity = party.identity;
    state.workload = party.workload;
}

/// 1 where cgroup_skb programs may call `bpf_get_netns_cookie`; set by the loader, a constant for the verifier.
#[unsafe(no_mangle)]
static HAS_SKB_NETNS: u32 = 1;

/// Writes who owns the socket of a packet into its state, and where the socket is. Without the latter (older kernels) a
/// socket that is older than the agent does not know its peers on loopback until its process uses it.
#[inline(never)]
pub fn resolve_skb(skb: *mut __sk_buff, state: &mut SocketState) {
    // SAFETY: `skb` is the program's context.
    let own = unsafe { bpf_skb_cgroup_id(skb) };
    // SAFETY: as above.
    let party = resolve(own, |level| unsafe { bpf_skb_ancestor_cgroup_id(skb, level) });
    // SAFETY: a plain read that the compiler may not fold, since the loader changes the value.
    if state.netns == 0 && unsafe { core::ptr::read_volatile(&raw const HAS_SKB_NETNS) } != 0 {
        // SAFETY: `skb` is the program's context.
        state.netns = unsafe { bpf_get_netns_cookie(skb.cast()) };
    }
    state.cgroup = own;
    state.identity = party.identity;
    state.workload = party.workload;
}

/// Looks the birth cgroup up again: its labels, or the fact that it is known at all, may be new in this generation.
/// A cgroup that was registered through an ancestor keeps what it has; the agent registers descendants too.
#[inline(always)]
pub fn refresh(state: &mut SocketState) {
    if state.cgroup != 0
        && let Some(entry) = cgroup(state.cgroup)
    {
        state.identity = entry.identity;
        state.workload = entry.workload;
    }
}

/// The state of a socket that a process acts on; one that is older than the agent is resolved now.
#[inline(always)]
pub fn of_process<'a>(sk: *mut c_void, netns: u64, protocol: u16) -> Option<&'a mut SocketState> {
    if let Some(state) = socket_state(sk) {
        if state.netns == 0 {
            state.netns = netns;
        }
        return Some(state);
    }
    let state = socket_state_or_new(sk)?;
    state.netns = netns;
    state.protocol = protocol;
    resolve_current(state);
    Some(state)
}

/// The bound address of a socket.
#[inline(always)]
pub fn source_addr(sk: *const bpf_sock) -> Addr {
    // SAFETY: a socket pointer of the context. Both families are read, whichever it is: a load in each branch would be
    // merged into one with a computed offset, which the verifier refuses.
    let (v4, v6) = unsafe {
        let w = (&raw const (*sk).src_ip6).cast::<u32>();
        let v6 = [w.read_volatile(), w.add(1).read_volatile(), w.add(2).read_volatile(), w.add(3).read_volatile()];
        ((&raw const (*sk).src_ip4).read_volatile(), v6)
    };
    // SAFETY: as above.
    if unsafe { (*sk).family } == AF_INET6 { Addr::from_v6_be(v6) } else { Addr::from_v4_be(v4) }
}
