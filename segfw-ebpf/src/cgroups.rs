//! A workload is known from its first socket on, whether an agent runs or not: a cgroup whose path the agent has named
//! gets its identity in the moment it is made, before any process can be in it. One below a beginning that the agent has
//! named (where containers are made, where a pattern applies) is unresolved until the agent has seen it.

use crate::maps::register_cgroup;
use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel_str;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TracePointContext;
use segfw_common::state::PathKey;

// Fields of the event cgroup:cgroup_mkdir, the same from 5.10 to 7.2 (include/trace/events/cgroup.h); the loader compares
// them with the running kernel's own description.
const ROOT: usize = 8;
const ID: usize = 16;
const PATH: usize = 24;

/// `cgroup:cgroup_mkdir`.
#[inline(always)]
pub fn made(ctx: &TracePointContext) {
    // SAFETY: fixed offsets of this event.
    let (Ok(root), Ok(id), Ok(location)) =
        (unsafe { ctx.read_at::<i32>(ROOT) }, unsafe { ctx.read_at::<u64>(ID) }, unsafe { ctx.read_at::<u32>(PATH) })
    else {
        return;
    };
    // Hierarchy 0 is cgroup v2; v1 hierarchies raise the same event.
    if root != 0 {
        return;
    }
    let mut path = [0; PathKey::LEN];
    // SAFETY: `__data_loc`: the low half is the offset of the string in the event. The helper writes at most LEN bytes,
    // the last of them zero: a path that is too long matches no whole path, since the agent registers only shorter ones.
    let length = unsafe {
        let text = ctx.as_ptr().cast::<u8>().add((location & 0xffff) as usize);
        bpf_probe_read_kernel_str(path.as_mut_ptr().cast(), PathKey::LEN as u32, text.cast())
    };
    if length > 1 {
        register_cgroup(&Key::new(8 * PathKey::LEN as u32, path), id);
    }
}
