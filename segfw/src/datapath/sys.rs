//! bpf(2) calls that aya 0.14 lacks: link update, batches, freezing, inner maps of their own size, inspection.
//!
//! Layouts: `union bpf_attr` in include/uapi/linux/bpf.h. Every file descriptor the kernel hands out here is
//! close-on-exec by itself (`BPF_OBJ_GET`, `BPF_LINK_CREATE`, `BPF_MAP_CREATE` all use `O_CLOEXEC`).

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_CREATE: u32 = 0;
const BPF_MAP_LOOKUP_ELEM: u32 = 1;
const BPF_MAP_UPDATE_ELEM: u32 = 2;
const BPF_MAP_DELETE_ELEM: u32 = 3;
const BPF_MAP_GET_NEXT_KEY: u32 = 4;
const BPF_OBJ_PIN: u32 = 6;
const BPF_OBJ_GET: u32 = 7;
const BPF_PROG_GET_FD_BY_ID: u32 = 13;
const BPF_PROG_QUERY: u32 = 16;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
const BPF_MAP_GET_FD_BY_ID: u32 = 14;
const BPF_MAP_FREEZE: u32 = 22;
const BPF_MAP_LOOKUP_BATCH: u32 = 24;
const BPF_MAP_UPDATE_BATCH: u32 = 26;
const BPF_LINK_CREATE: u32 = 28;
const BPF_LINK_UPDATE: u32 = 29;

/// Map types used for inner maps.
pub const MAP_TYPE_HASH: u32 = 1;
/// See `MAP_TYPE_HASH`.
pub const MAP_TYPE_ARRAY: u32 = 2;
/// See `MAP_TYPE_HASH`.
pub const MAP_TYPE_LPM_TRIE: u32 = 11;
/// `BPF_F_NO_PREALLOC`.
pub const F_NO_PREALLOC: u32 = 1;
/// `BPF_F_RDONLY_PROG`.
pub const F_RDONLY_PROG: u32 = 1 << 7;

/// Entries moved by one batch call: 64 Ki of the largest entry stay below 4 MiB.
const BATCH: usize = 1 << 16;

/// A zeroed `union bpf_attr`, written at fixed offsets.
#[repr(C, align(8))]
struct Attr([u8; 152]);

impl Attr {
    fn new() -> Self {
        Self([0; 152])
    }
    fn u32(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }
    fn u64(mut self, at: usize, value: u64) -> Self {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }
    fn read_u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }
    fn call(&mut self, command: u32) -> io::Result<i64> {
        // SAFETY: the attribute is as long as we say; pointers in it are to live buffers of the callers below.
        let rc = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), self.0.len()) };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
    }
    fn call_fd(&mut self, command: u32) -> io::Result<OwnedFd> {
        let fd = self.call(command)?;
        // SAFETY: the kernel just gave us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

fn fd(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Makes a map.
pub fn map_create(kind: u32, key: usize, value: usize, entries: u32, flags: u32, name: &str) -> io::Result<OwnedFd> {
    let mut attr = Attr::new().u32(0, kind).u32(4, key as u32).u32(8, value as u32).u32(12, entries).u32(16, flags);
    for (slot, byte) in attr.0[28..28 + 15].iter_mut().zip(name.bytes()) {
        *slot = byte;
    }
    attr.call_fd(BPF_MAP_CREATE)
}

/// From now on user space cannot change the map either.
pub fn map_freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    Attr::new().u32(0, fd(map)).call(BPF_MAP_FREEZE).map(drop)
}

/// Writes one entry.
pub fn map_update<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    map_update_raw(map, (&raw const *key).cast(), (&raw const *value).cast())
}

/// Writes one entry whose value is a slice (an array of classes).
pub fn map_update_slice<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, key: &K, value: &[V]) -> io::Result<()> {
    map_update_raw(map, (&raw const *key).cast(), value.as_ptr().cast())
}

fn map_update_raw(map: BorrowedFd<'_>, key: *const u8, value: *const u8) -> io::Result<()> {
    Attr::new().u32(0, fd(map)).u64(8, key as u64).u64(16, value as u64).call(BPF_MAP_UPDATE_ELEM).map(drop)
}

/// Removes one entry; `false` = it was not there.
pub fn map_delete<K: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    match Attr::new().u32(0, fd(map)).u64(8, (&raw const *key) as u64).call(BPF_MAP_DELETE_ELEM) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Reads one entry into `value`; `false` = it is not there.
pub fn map_lookup_into<K: aya::Pod>(map: BorrowedFd<'_>, key: &K, value: &mut [u8]) -> io::Result<bool> {
    let mut attr = Attr::new().u32(0, fd(map)).u64(8, (&raw const *key) as u64).u64(16, value.as_mut_ptr() as u64);
    match attr.call(BPF_MAP_LOOKUP_ELEM) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Reads one entry.
pub fn map_lookup<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = vec![0u8; size_of::<V>().next_multiple_of(8)];
    if !map_lookup_into(map, key, &mut value)? {
        return Ok(None);
    }
    // SAFETY: `V` is plain data, and the buffer holds at least its size.
    Ok(Some(unsafe { value.as_ptr().cast::<V>().read_unaligned() }))
}

/// Writes many entries: in batches where the map type has them (hashes from 5.6, tries from 5.13), else one by one.
pub fn map_fill<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> io::Result<()> {
    debug_assert_eq!(keys.len(), values.len());
    for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
        let mut attr = Attr::new()
            .u64(16, keys.as_ptr() as u64)
            .u64(24, values.as_ptr() as u64)
            .u32(32, keys.len() as u32)
            .u32(36, fd(map));
        match attr.call(BPF_MAP_UPDATE_BATCH) {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP) | Some(524)) => {
                for (key, value) in keys.iter().zip(values) {
                    map_update(map, key, value)?;
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads a whole map. It must be frozen or otherwise quiet: what changes meanwhile may be missed.
pub fn map_dump<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, expected: usize) -> io::Result<Vec<(K, V)>> {
    match dump_batch(map, expected) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP) | Some(524)) => dump_walk(map),
        other => other,
    }
}

fn dump_batch<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, expected: usize) -> io::Result<Vec<(K, V)>> {
    // A hash bucket is never split, so the room must hold the fullest one too.
    let mut room = expected.clamp(64, BATCH) + 64;
    let mut all = Vec::with_capacity(expected.min(BATCH));
    let room_for =
        |room: usize| (vec![0u8; room * size_of::<K>()], vec![0u8; room * size_of::<V>().next_multiple_of(8)]);
    let (mut keys, mut values) = room_for(room);
    // The cursor is a bucket number for hashes and a key for tries.
    let mut cursor = vec![0u8; size_of::<K>().max(8)];
    let mut first = true;
    loop {
        let mut next = cursor.clone();
        let mut attr = Attr::new()
            .u64(0, if first { 0 } else { cursor.as_ptr() as u64 })
            .u64(8, next.as_mut_ptr() as u64)
            .u64(16, keys.as_mut_ptr() as u64)
            .u64(24, values.as_mut_ptr() as u64)
            .u32(32, room as u32)
            .u32(36, fd(map));
        let result = attr.call(BPF_MAP_LOOKUP_BATCH);
        let done = match result {
            Ok(_) => false,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => true,
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                (keys, values) = room_for(room);
                continue;
            }
            Err(e) => return Err(e),
        };
        let count = (attr.read_u32(32) as usize).min(room);
        for i in 0..count {
            // SAFETY: both types are plain data; the kernel wrote `count` entries of these sizes. In a batch values lie
            // at their own size, not rounded up.
            unsafe {
                let key = keys.as_ptr().add(i * size_of::<K>()).cast::<K>().read_unaligned();
                let value = values.as_ptr().add(i * size_of::<V>()).cast::<V>().read_unaligned();
                all.push((key, value));
            }
        }
        if done {
            return Ok(all);
        }
        cursor = next;
        first = false;
    }
}

fn dump_walk<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut all = Vec::new();
    for key in map_keys(map)? {
        if let Some(value) = map_lookup(map, &key)? {
            all.push((key, value));
        }
    }
    Ok(all)
}

/// The keys of a map, one call each.
pub fn map_keys<K: aya::Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<K>> {
    let mut all: Vec<K> = Vec::new();
    loop {
        let mut next = vec![0u8; size_of::<K>()];
        let last = all.last().map_or(0, |key| (&raw const *key) as u64);
        let mut attr = Attr::new().u32(0, fd(map)).u64(8, last).u64(16, next.as_mut_ptr() as u64);
        match attr.call(BPF_MAP_GET_NEXT_KEY) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(all),
            Err(e) => return Err(e),
        }
        // SAFETY: plain data of this size.
        all.push(unsafe { next.as_ptr().cast::<K>().read_unaligned() });
    }
}

/// Puts an inner map into a slot. The call returns after a grace period: no program uses the old one any more
/// (`maybe_wait_bpf_programs`, kernel/bpf/syscall.c).
pub fn outer_set(outer: BorrowedFd<'_>, slot: u32, inner: BorrowedFd<'_>) -> io::Result<()> {
    map_update(outer, &slot, &fd(inner))
}

/// Empties a slot.
pub fn outer_clear(outer: BorrowedFd<'_>, slot: u32) -> io::Result<()> {
    map_delete(outer, &slot).map(drop)
}

/// Number of the inner map in a slot; 0 = empty.
pub fn outer_id(outer: BorrowedFd<'_>, slot: u32) -> io::Result<u32> {
    Ok(map_lookup::<u32, u32>(outer, &slot)?.unwrap_or(0))
}

/// The inner map in a slot; `None` = empty.
pub fn outer_get(outer: BorrowedFd<'_>, slot: u32) -> io::Result<Option<OwnedFd>> {
    match outer_id(outer, slot)? {
        0 => Ok(None),
        id => map_by_id(id).map(Some),
    }
}

/// The map with this number.
pub fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    Attr::new().u32(0, id).call_fd(BPF_MAP_GET_FD_BY_ID)
}

/// Pins an object.
pub fn pin(object: BorrowedFd<'_>, at: &Path) -> io::Result<()> {
    let at = path(at)?;
    Attr::new().u64(0, at.as_ptr() as u64).u32(8, fd(object)).call(BPF_OBJ_PIN).map(drop)
}

/// Opens a pinned object; `None` = nothing is pinned there.
pub fn get(at: &Path) -> io::Result<Option<OwnedFd>> {
    let at = path(at)?;
    match Attr::new().u64(0, at.as_ptr() as u64).call_fd(BPF_OBJ_GET) {
        Ok(object) => Ok(Some(object)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Attaches a program to the event that it was loaded for (`BPF_RAW_TRACEPOINT_OPEN`).
pub fn event_link_create(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const BPF_RAW_TRACEPOINT_OPEN: u32 = 17;
    Attr::new().u32(8, fd(program)).call_fd(BPF_RAW_TRACEPOINT_OPEN)
}

/// Attaches a program: to a cgroup (target = its folder) or an interface (target = its index).
pub fn link_create(program: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    Attr::new().u32(0, fd(program)).u32(4, target).u32(8, attach_type).u32(12, flags).call_fd(BPF_LINK_CREATE)
}

/// Opens a tracepoint by its number in tracefs, for all tasks (perf_event_open(2); the CPU does not matter for BPF).
pub fn tracepoint_open(id: u64) -> io::Result<OwnedFd> {
    const PERF_TYPE_TRACEPOINT: u32 = 2;
    const PERF_FLAG_FD_CLOEXEC: u64 = 8;
    // `struct perf_event_attr` of its first size is enough: type, size, config; the rest zero.
    const SIZE: u32 = 64;
    let attr = Attr::new().u32(0, PERF_TYPE_TRACEPOINT).u32(4, SIZE).u64(8, id);
    let (any_task, cpu, no_group): (i32, i32, i32) = (-1, 0, -1);
    // SAFETY: the attribute is longer than the size it states.
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, attr.0.as_ptr(), any_task, cpu, no_group, PERF_FLAG_FD_CLOEXEC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Puts another program behind a link, atomically for that link.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    Attr::new().u32(0, fd(link)).u32(4, fd(program)).call(BPF_LINK_UPDATE).map(drop)
}

/// Loads a program of the tracing family (BPF LSM, `fmod_ret`) for the kernel function with this BTF number. The error has
/// the end of what the verifier said.
pub fn tracing_load(
    kind: u32,
    attach_type: u32,
    function: u32,
    code: &[Instruction],
    name: &str,
) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: u32 = 5;
    let license = c"GPL";
    let attr = || {
        let mut attr = Attr::new()
            .u32(0, kind)
            .u32(4, code.len() as u32)
            .u64(8, code.as_ptr() as u64)
            .u64(16, license.as_ptr() as u64)
            .u32(68, attach_type)
            .u32(108, function);
        for (slot, byte) in attr.0[48..48 + 15].iter_mut().zip(name.bytes()) {
            *slot = byte;
        }
        attr
    };
    let first = match attr().call_fd(BPF_PROG_LOAD) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EACCES | libc::ENOSPC)) => e,
        other => return other,
    };
    // Refused by the verifier, it seems: once more, with its words.
    let mut log = vec![0u8; 1 << 20];
    let mut attr = attr().u32(24, 1).u32(28, log.len() as u32).u64(32, log.as_mut_ptr() as u64);
    let Err(_) = attr.call_fd(BPF_PROG_LOAD) else { return Err(first) };
    let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
    let said = String::from_utf8_lossy(&log[..end]).into_owned();
    let last: Vec<&str> = said.lines().rev().take(12).collect::<Vec<_>>().into_iter().rev().collect();
    Err(io::Error::new(first.kind(), format!("{first}; the verifier: {}", last.join(" | "))))
}

/// Attaches a program of the tracing family to the function it was loaded for (all kernels from 5.7 on take this call).
pub fn tracing_attach(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const BPF_RAW_TRACEPOINT_OPEN: u32 = 17;
    Attr::new().u32(8, fd(program)).call_fd(BPF_RAW_TRACEPOINT_OPEN)
}

/// What a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Link id.
    pub id: u32,
    /// Program id.
    pub program: u32,
    /// Cgroup id, where it is a cgroup link; 0 = the cgroup is gone.
    pub cgroup: u64,
}

fn info(object: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<()> {
    Attr::new()
        .u32(0, fd(object))
        .u32(4, into.len() as u32)
        .u64(8, into.as_mut_ptr() as u64)
        .call(BPF_OBJ_GET_INFO_BY_FD)
        .map(drop)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// `struct bpf_link_info`.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut raw = [0u8; 64];
    info(link, &mut raw)?;
    Ok(LinkInfo {
        id: word(&raw, 4),
        program: word(&raw, 8),
        cgroup: u64::from(word(&raw, 16)) | u64::from(word(&raw, 20)) << 32,
    })
}

/// What a program is (`struct bpf_prog_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Program id.
    pub id: u32,
    /// Hash of the instructions.
    pub tag: [u8; 8],
    /// Instructions after the verifier's rewriting.
    pub instructions: u32,
    /// Instructions the verifier walked through (5.16+).
    pub verified: u32,
}

/// Reads what the kernel says of a program.
pub fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    let mut raw = [0u8; 232];
    info(program, &mut raw)?;
    let mut tag = [0u8; 8];
    tag.copy_from_slice(&raw[8..16]);
    Ok(ProgramInfo { id: word(&raw, 4), tag, instructions: word(&raw, 20) / 8, verified: word(&raw, 216) })
}

/// Numbers of the programs that sit at one place of a cgroup itself, in the order in which they run. At most 64, the
/// kernel's limit.
pub fn programs_at(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; 64];
    let mut attr =
        Attr::new().u32(0, fd(cgroup)).u32(4, attach_type).u64(16, ids.as_mut_ptr() as u64).u32(24, ids.len() as u32);
    let _ = attr.call(BPF_PROG_QUERY)?;
    Ok(ids.iter().take(attr.read_u32(24) as usize).copied().collect())
}

/// Name of a program (`bpf_prog_info.name`), as its author gave it.
pub fn program_name(id: u32) -> io::Result<String> {
    let program = Attr::new().u32(0, id).call_fd(BPF_PROG_GET_FD_BY_ID)?;
    let mut raw = [0u8; 232];
    info(program.as_fd(), &mut raw)?;
    let name = &raw[64..80];
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}

/// What a map is (`struct bpf_map_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// Map id.
    pub id: u32,
    /// Most entries it holds.
    pub max_entries: u32,
}

/// Reads what the kernel says of a map.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut raw = [0u8; 104];
    info(map, &mut raw)?;
    Ok(MapInfo { id: word(&raw, 4), max_entries: word(&raw, 16) })
}

/// Program types (`enum bpf_prog_type`) that [`has_helpers`] is asked about.
pub const PROG_TYPE_CGROUP_SKB: u32 = 8;
/// See [`PROG_TYPE_CGROUP_SKB`].
pub const PROG_TYPE_SOCK_OPS: u32 = 13;
/// See [`PROG_TYPE_CGROUP_SKB`].
pub const PROG_TYPE_TRACEPOINT: u32 = 5;
/// `bpf_get_current_pid_tgid`.
pub const FN_GET_CURRENT_PID_TGID: i32 = 14;
/// `bpf_get_current_comm`.
pub const FN_GET_CURRENT_COMM: i32 = 16;
/// `bpf_get_current_task`.
pub const FN_GET_CURRENT_TASK: i32 = 35;
/// `bpf_probe_read_kernel`.
pub const FN_PROBE_READ_KERNEL: i32 = 113;
/// `bpf_get_netns_cookie`.
pub const FN_GET_NETNS_COOKIE: i32 = 122;

/// Whether programs of a type may call these helpers here. Asked of the verifier and not of the version: helpers came to
/// each type at another time, distributions bring them to older kernels, and lockdown takes some away.
pub fn has_helpers(program_type: u32, helpers: &[i32]) -> bool {
    // r6 = the context.
    let mut code = vec![instruction(0xbf, 0x16, 0, 0)];
    for helper in helpers {
        match *helper {
            // (context)
            FN_GET_NETNS_COOKIE => code.push(instruction(0xbf, 0x61, 0, 0)),
            // (16 bytes of the stack, their number, any address)
            FN_GET_CURRENT_COMM | FN_PROBE_READ_KERNEL => code.extend([
                instruction(0xbf, 0xa1, 0, 0),
                instruction(0x07, 1, 0, -16),
                instruction(0xb7, 2, 0, 16),
                instruction(0xb7, 3, 0, 0),
            ]),
            _ => {}
        }
        code.push(instruction(0x85, 0, 0, *helper));
    }
    // return 1
    code.extend([instruction(0xb7, 0, 0, 1), instruction(0x95, 0, 0, 0)]);
    program_load(program_type, 0, &code).is_ok()
}

/// `struct bpf_insn`.
pub type Instruction = [u8; 8];

/// An instruction; `registers` = source << 4 | destination.
pub fn instruction(op: u8, registers: u8, offset: i16, value: i32) -> Instruction {
    let ([o0, o1], [v0, v1, v2, v3]) = (offset.to_ne_bytes(), value.to_ne_bytes());
    [op, registers, o0, o1, v0, v1, v2, v3]
}

/// Loads a program that was written by hand.
pub fn program_load(kind: u32, attach_type: u32, code: &[Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: u32 = 5;
    let license = c"GPL";
    Attr::new()
        .u32(0, kind)
        .u32(4, code.len() as u32)
        .u64(8, code.as_ptr() as u64)
        .u64(16, license.as_ptr() as u64)
        .u32(68, attach_type)
        .call_fd(BPF_PROG_LOAD)
}

/// Runs a program once on `input` (`BPF_PROG_TEST_RUN`); its return value.
pub fn test_run(program: BorrowedFd<'_>, input: &[u8]) -> io::Result<u32> {
    Ok(test_runs(program, input, 1)?.0)
}

/// Runs a program `repeat` times on `input`; its last return value, and the mean of the nanoseconds.
pub fn test_runs(program: BorrowedFd<'_>, input: &[u8], repeat: u32) -> io::Result<(u32, u32)> {
    const BPF_PROG_TEST_RUN: u32 = 10;
    let mut attr =
        Attr::new().u32(0, fd(program)).u32(8, input.len() as u32).u64(16, input.as_ptr() as u64).u32(32, repeat);
    let _ = attr.call(BPF_PROG_TEST_RUN)?;
    Ok((attr.read_u32(4), attr.read_u32(36)))
}
