//! A workload is known from its first socket on, whether an agent runs or not: a cgroup whose path the agent has named
//! gets its identity in the moment it is made, before any process can be in it. One below a beginning that the agent has
//! named (where containers are made, where a pattern applies) is unresolved until the agent has seen it.

use crate::emit::loaded;
use crate::maps::register_cgroup;
use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_probe_read_kernel_str};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::{BtfTracePointContext, TracePointContext};
use core::ffi::c_void;
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
    // SAFETY: `__data_loc`: the low half is the offset of the string in the event.
    let text = unsafe { ctx.as_ptr().cast::<u8>().add((location & 0xffff) as usize) };
    register(id, text.cast());
}

// Where the kernel keeps what the event tells, in bytes; set by the loader from the kernel's own types.
/// `cgroup.root`.
#[unsafe(no_mangle)]
static CGROUP_ROOT: u32 = 0;
/// `cgroup.kn`.
#[unsafe(no_mangle)]
static CGROUP_KN: u32 = 0;
/// `cgroup_root.hierarchy_id`.
#[unsafe(no_mangle)]
static ROOT_HIERARCHY: u32 = 0;
/// `kernfs_node.id`.
#[unsafe(no_mangle)]
static KN_ID: u32 = 0;

/// The same by the arguments of the event (`struct cgroup *`, `const char *path`), for kernels that have no pinned link to
/// an event (below 5.15) or call it unsafe that such a program adds to a map (below 6.1).
#[inline(always)]
pub fn made_by_type(ctx: &BtfTracePointContext) {
    let cgroup = ctx.arg::<*const c_void>(0) as u64;
    let path = ctx.arg::<*const c_void>(1);
    let (root, node) = (word(cgroup, &CGROUP_ROOT), word(cgroup, &CGROUP_KN));
    // Half a word: the hierarchy is an `int`.
    if root == 0 || node == 0 || word(root, &ROOT_HIERARCHY) as u32 != 0 {
        return;
    }
    let id = word(node, &KN_ID);
    if id != 0 {
        register(id, path);
    }
}

/// Eight bytes of a kernel object; 0 = they cannot be read.
#[inline(always)]
fn word(object: u64, offset: &'static u32) -> u64 {
    let mut word = 0u64;
    // SAFETY: the helper checks the address it reads, and writes zero where it cannot.
    unsafe {
        let _ = bpf_probe_read_kernel((&raw mut word).cast(), 8, (object + u64::from(loaded(offset))) as *const c_void);
    }
    word
}

#[inline(always)]
fn register(id: u64, text: *const c_void) {
    let mut path = [0; PathKey::LEN];
    // SAFETY: The helper writes at most LEN bytes, the last of them zero: a path that is too long matches no whole path,
    // since the agent registers only shorter ones.
    let length = unsafe { bpf_probe_read_kernel_str(path.as_mut_ptr().cast(), PathKey::LEN as u32, text) };
    if length > 1 {
        register_cgroup(&Key::new(8 * PathKey::LEN as u32, path), id);
    }
}
