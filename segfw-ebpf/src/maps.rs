//! Every map, with its bound and who writes it; and the tables behind `decide` as the kernel sees them.
//!
//! Maps of one generation are slots of arrays of maps, filled and frozen before `CONTROL` names the slot. The programs
//! cannot write them (`BPF_F_RDONLY_PROG`).

use aya_ebpf::bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type};
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use aya_ebpf::helpers::generated::{bpf_ktime_get_boot_ns, bpf_sk_storage_get};
use aya_ebpf::macros::btf_map;
use aya_ebpf::maps::lpm_trie::Key;
use core::ffi::c_void;
use segfw_common::event::{Counter, DenialCount, DenialKey, RuleCount};
use segfw_common::rule::Proto;
use segfw_common::state::PathKey;
use segfw_common::{
    Addr, AddressEntry, CgroupEntry, EndpointEntry, EndpointKey, FlowEvent, FlowKey, FlowValue, Identity, Listener,
    LocalEntry, Lookup, OriginKey, Party, Peers, RuleEntry, RuleKey, SocketState, bounds, control,
};

/// `BPF_F_RDONLY_PROG` (include/uapi/linux/bpf.h): programs read, only user space writes, until it freezes the map.
const RDONLY_PROG: usize = 1 << 7;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const SLOTS: usize = bounds::SLOTS as usize;
const SHARDS: u32 = bounds::RULE_SHARDS;

/// A [`RuleEntry`] as words. Kernels from 5.15 to 6.1 look into the type of a value for timers, and what they note where the
/// type is a structure without one differs from what they note where no type is known: then they take none of the agent's
/// maps, which have no types, into a slot.
type RuleWords = [u64; size_of::<RuleEntry>() / 8];
/// A [`LocalEntry`] in the same way.
type LocalWords = [u64; size_of::<LocalEntry>() / 8];
const _: () = assert!(size_of::<RuleEntry>().is_multiple_of(8) && size_of::<LocalEntry>().is_multiple_of(8));

/// The entry that a value of words holds.
#[inline(always)]
fn entry<T: Copy, const N: usize>(words: &[u64; N]) -> T {
    const { assert!(size_of::<T>() == 8 * N && align_of::<T>() <= 8) };
    // SAFETY: as long as `T`, which is plain data that the agent wrote.
    unsafe { words.as_ptr().cast::<T>().read() }
}

// ---- one generation; written by the agent, frozen before use -------------------------------------------------------
// The inner sizes are those of the template: the agent creates each inner map with the size the revision needs.

/// Port classes: one value of 65,536 classes per protocol, so a look-up is an index and nothing else.
#[btf_map]
static CLASSES: ArrayOfMaps<Array<[u16; 65536], { Proto::COUNT as usize }, RDONLY_PROG>, SLOTS> = ArrayOfMaps::new();
#[btf_map]
static RULES: ArrayOfMaps<HashMap<RuleKey, RuleWords, 1, RDONLY_PROG>, { SLOTS * SHARDS as usize }> =
    ArrayOfMaps::new();
#[btf_map]
static TIMELINE: ArrayOfMaps<HashMap<u32, RuleWords, 1, RDONLY_PROG>, SLOTS> = ArrayOfMaps::new();
#[btf_map]
static LOCALS: ArrayOfMaps<HashMap<u32, LocalWords, 1, RDONLY_PROG>, SLOTS> = ArrayOfMaps::new();
/// Prefixes that are one address: most of a fleet's, and a trie of them is deep.
#[btf_map]
static HOSTS: ArrayOfMaps<HashMap<Addr, u32, 1, RDONLY_PROG>, SLOTS> = ArrayOfMaps::new();
/// All other prefixes.
#[btf_map]
static PREFIXES: ArrayOfMaps<LpmTrie<Addr, u32, 1, { RDONLY_PROG | NO_PREALLOC }>, SLOTS> = ArrayOfMaps::new();

// ---- the host; written by the agent --------------------------------------------------------------------------------

#[btf_map]
static CONTROL: Array<u64, { control::LEN as usize }, RDONLY_PROG> = Array::new();
#[btf_map]
static CGROUPS: HashMap<u64, CgroupEntry, { bounds::CGROUPS as usize }, NO_PREALLOC> = HashMap::new();
/// What a cgroup of this path, or of a path that begins so, will be, should it be made.
#[btf_map]
static PATHS: LpmTrie<[u8; PathKey::LEN], CgroupEntry, { bounds::PATHS as usize }, { RDONLY_PROG | NO_PREALLOC }> =
    LpmTrie::new();
#[btf_map]
static ADDRESSES: HashMap<Addr, AddressEntry, { bounds::ADDRESSES as usize }, { RDONLY_PROG | NO_PREALLOC }> =
    HashMap::new();
/// Interface index → network namespace cookie, for XDP, which cannot ask.
#[btf_map]
static XDP_NETNS: HashMap<u32, u64, 256, RDONLY_PROG> = HashMap::new();

// ---- flows; written here, ENDPOINTS also by the agent's inventory --------------------------------------------------

#[btf_map]
static ENDPOINTS: HashMap<EndpointKey, EndpointEntry, { bounds::ENDPOINTS as usize }, NO_PREALLOC> = HashMap::new();
/// By socket cookie. What `ENDPOINTS` cannot say: which of the sockets that share an address a SYN is for.
#[btf_map]
static LISTENERS: HashMap<u64, Listener, { bounds::LISTENERS as usize }, NO_PREALLOC> = HashMap::new();
#[btf_map]
static ORIGINS: LruHashMap<OriginKey, Party, { bounds::ORIGINS as usize }> = LruHashMap::new();
#[btf_map]
static FLOWS: LruHashMap<FlowKey, FlowValue, { bounds::FLOWS as usize }> = LruHashMap::new();

// ---- facts; read by the agent --------------------------------------------------------------------------------------

#[btf_map]
static EVENTS: RingBuf<FlowEvent, { bounds::RING_BYTES as usize }> = RingBuf::new();
#[btf_map]
static COUNTERS: PerCpuArray<u64, { Counter::LEN as usize }> = PerCpuArray::new();
#[btf_map]
static RULE_COUNTERS: PerCpuHashMap<u32, RuleCount, { bounds::RULE_COUNTERS as usize }, NO_PREALLOC> =
    PerCpuHashMap::new();
#[btf_map]
static DENIALS: PerCpuHashMap<DenialKey, DenialCount, { bounds::DENIALS as usize }, NO_PREALLOC> = PerCpuHashMap::new();

/// Per CPU: event sequence, the budget of single denial events in the current second, and wake-ups.
#[repr(C)]
pub struct Budget {
    pub sequence: u64,
    pub second: u64,
    pub denials: u64,
    /// Boot nanoseconds of the last event of this CPU that woke the agent.
    pub woken: u64,
    /// Events since then.
    pub unwoken: u64,
}
#[btf_map]
static BUDGET: PerCpuArray<Budget, 1> = PerCpuArray::new();

/// Per CPU: the answer to the last SYN that a listener was allowed to see, so that the ACK and the child of the same
/// handshake, which nearly always come to the same CPU, need no second judgement. See `stream::handshake` and
/// `conn::request`.
#[repr(C)]
pub struct Handshake {
    /// As the child's storage will have it.
    pub answer: SocketState,
    /// Sequence number of the SYN: it makes this one handshake and no other with the same addresses.
    pub sequence: u32,
    pad: u32,
}
#[btf_map]
static HANDSHAKE: PerCpuArray<Handshake, 1> = PerCpuArray::new();

/// Socket storage with `BPF_F_CLONE`: aya-ebpf's own type has no flags and takes one context only.
#[repr(C)]
pub struct SocketStorage {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const SocketState,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}
// SAFETY: placeholder pointers that the loader patches; never dereferenced.
unsafe impl Sync for SocketStorage {}
#[btf_map]
static SOCKETS: SocketStorage = SocketStorage {
    r#type: core::ptr::null(),
    key: core::ptr::null(),
    value: core::ptr::null(),
    max_entries: core::ptr::null(),
    map_flags: core::ptr::null(),
};

/// The state of a socket; `None` = none yet.
#[inline(always)]
pub fn socket_state<'a>(sk: *mut c_void) -> Option<&'a mut SocketState> {
    // SAFETY: `sk` is a socket pointer from the context; the helper returns null or this socket's own value.
    unsafe {
        bpf_sk_storage_get(core::ptr::from_ref(&SOCKETS).cast_mut().cast(), sk, core::ptr::null_mut(), 0)
            .cast::<SocketState>()
            .as_mut()
    }
}

/// The state of a socket, made if there is none; `None` = the kernel has no memory for it (optmem), which is never an allow.
#[inline(always)]
pub fn socket_state_or_new<'a>(sk: *mut c_void) -> Option<&'a mut SocketState> {
    // SAFETY: as above.
    let state = unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(&SOCKETS).cast_mut().cast(),
            sk,
            core::ptr::null_mut(),
            BPF_SK_STORAGE_GET_F_CREATE as u64,
        )
        .cast::<SocketState>()
        .as_mut()
    };
    if state.is_none() {
        count(Counter::StorageFailed as u32);
    }
    state
}

/// Raises a per-CPU counter.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's own slot; but a softirq may count between our load and store, so it is one instruction.
        add(unsafe { &mut *counter }, 1);
    }
}

#[inline(always)]
pub fn budget<'a>() -> Option<&'a mut Budget> {
    // SAFETY: this CPU's own slot.
    BUDGET.get_ptr_mut(0).map(|p| unsafe { &mut *p })
}

#[inline(always)]
pub fn last_handshake<'a>() -> Option<&'a mut Handshake> {
    // SAFETY: this CPU's own slot.
    HANDSHAKE.get_ptr_mut(0).map(|p| unsafe { &mut *p })
}

#[inline(always)]
pub fn events() -> &'static RingBuf<FlowEvent, { bounds::RING_BYTES as usize }> {
    &EVENTS
}

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Counts a flow under its rule.
#[inline(always)]
pub fn count_rule(rule: u32, verdict: u8) {
    let mut key = rule;
    let mut found = RULE_COUNTERS.get_ptr_mut(&key);
    if found.is_none() {
        let zero = RuleCount { allowed: 0, denied: 0, audit: 0 };
        if RULE_COUNTERS.insert(&key, &zero, 1).is_err() && RULE_COUNTERS.get_ptr_mut(&key).is_none() {
            count(Counter::RuleCountersFull as u32);
            key = 0;
        }
        found = RULE_COUNTERS.get_ptr_mut(&key);
    }
    if let Some(counts) = found {
        // SAFETY: this CPU's own slot.
        let counts = unsafe { &mut *counts };
        match verdict {
            1 => add(&mut counts.allowed, 1),
            2 => add(&mut counts.denied, 1),
            _ => add(&mut counts.audit, 1),
        }
    }
}

/// Counts a denial that is not sent as an event of its own.
#[inline(always)]
pub fn count_denial(key: &DenialKey, now: u64) {
    let mut found = DENIALS.get_ptr_mut(key);
    if found.is_none() {
        let zero = DenialCount { count: 0, last: 0 };
        let _ = DENIALS.insert(key, &zero, 1);
        found = DENIALS.get_ptr_mut(key);
    }
    match found {
        Some(value) => {
            // SAFETY: this CPU's own slot.
            let value = unsafe { &mut *value };
            add(&mut value.count, 1);
            value.last = now;
            count(Counter::DenialsAggregated as u32);
        }
        None => count(Counter::DenialsUncounted as u32),
    }
}

/// The registered entry of a cgroup.
#[inline(always)]
pub fn cgroup(id: u64) -> Option<CgroupEntry> {
    // SAFETY: the value is copied at once; entries are freed after a grace period (NO_PREALLOC).
    unsafe { CGROUPS.get(&id).copied() }
}

/// Registers a new cgroup as what the agent said a cgroup of this path would be.
#[inline(always)]
pub fn register_cgroup(path: &Key<[u8; PathKey::LEN]>, id: u64) {
    if let Some(entry) = PATHS.get(path).copied() {
        // The low half of a cgroup id is its inode number: unique among those that live. What is no workload has no number.
        if entry.flags & CgroupEntry::INHERIT != 0 {
            return;
        }
        let workload = if entry.identity < Identity::FIRST_DYNAMIC { 0 } else { id as u32 };
        let entry = CgroupEntry { workload, ..entry };
        let _ = CGROUPS.insert(&id, &entry, 0);
    }
}

#[inline(always)]
pub fn xdp_netns(ifindex: u32) -> Option<u64> {
    // SAFETY: as above.
    unsafe { XDP_NETNS.get(&ifindex).copied() }
}

#[inline(always)]
pub fn flow<'a>(key: &FlowKey) -> Option<&'a mut FlowValue> {
    // SAFETY: an evicted LRU entry may be reused while we look at it; every reader checks `local` and `generation`,
    // and what it then writes is a time stamp.
    FLOWS.get_ptr_mut(key).map(|p| unsafe { &mut *p })
}

#[inline(always)]
pub fn store_flow(key: &FlowKey, value: &FlowValue) {
    if FLOWS.insert(key, value, 0).is_err() {
        count(Counter::FlowsFull as u32);
    }
}

#[inline(always)]
pub fn store_origin(key: &OriginKey, party: &Party) {
    if ORIGINS.insert(key, party, 0).is_err() {
        count(Counter::OriginsFull as u32);
    }
}

#[inline(always)]
pub fn forget_origin(key: &OriginKey) {
    let _ = ORIGINS.remove(key);
}

/// Enters a local socket into the endpoint table. Owners of two identities make the endpoint unresolved.
#[inline(always)]
pub fn register_endpoint(key: &EndpointKey, party: Party) -> bool {
    if let Some(entry) = ENDPOINTS.get_ptr_mut(key) {
        // SAFETY: freed after a grace period (NO_PREALLOC); fields are words.
        let entry = unsafe { &mut *entry };
        if entry.identity != party.identity {
            entry.identity = Identity::UNRESOLVED.0;
            entry.workload = 0;
        } else if entry.workload != party.workload {
            entry.workload = 0;
        }
        add(&mut entry.sockets, 1);
        return true;
    }
    let entry = EndpointEntry { identity: party.identity, workload: party.workload, sockets: 1 };
    if ENDPOINTS.insert(key, &entry, 0).is_err() {
        count(Counter::EndpointsFull as u32);
        return false;
    }
    true
}

/// Takes a local socket out of the endpoint table; the last one takes the entry with it.
#[inline(always)]
pub fn unregister_endpoint(key: &EndpointKey) {
    if let Some(entry) = ENDPOINTS.get_ptr_mut(key) {
        // SAFETY: as above.
        let entry = unsafe { &mut *entry };
        if entry.sockets <= 1 {
            let _ = ENDPOINTS.remove(key);
        } else {
            add(&mut entry.sockets, u64::MAX);
        }
    }
}

/// The listener of this cookie.
#[inline(always)]
pub fn listener(cookie: u64) -> Option<Listener> {
    // SAFETY: copied at once; freed after a grace period (NO_PREALLOC).
    unsafe { LISTENERS.get(&cookie).copied() }
}

#[inline(always)]
pub fn store_listener(cookie: u64, listener: &Listener) {
    if LISTENERS.insert(&cookie, listener, 0).is_err() {
        count(Counter::ListenersFull as u32);
    }
}

#[inline(always)]
pub fn forget_listener(cookie: u64) {
    let _ = LISTENERS.remove(&cookie);
}

/// Adds to a word that other CPUs add to as well.
#[inline(always)]
fn add(word: &mut u64, by: u64) {
    // `core`'s atomics have no read-modify-write on this target. The old value is not used, so this is one XADD, which
    // every level of BPF has.
    // SAFETY: an aligned word of a map value.
    let _ =
        unsafe { core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(word, by) };
}

/// The tables in force at one moment: read once at program start, then used for the whole program.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Generation; 0 = no policy yet.
    pub generation: u32,
    slot: u32,
    /// The rules are in `2^bits` maps.
    bits: u32,
}

impl Kernel {
    #[inline(always)]
    pub fn read() -> Self {
        let active = CONTROL.get(control::ACTIVE).copied().unwrap_or(0);
        let (generation, place) = ((active >> 32) as u32, active as u32);
        let slot = place & (bounds::SLOTS - 1);
        Self { generation, slot, bits: place >> control::SHARDS_SHIFT & 31 }
    }
}

impl Lookup for Kernel {
    #[inline(always)]
    fn now(&self) -> u64 {
        now()
    }
    #[inline(always)]
    fn host_flags(&self) -> u64 {
        CONTROL.get(control::FLAGS).copied().unwrap_or(0)
    }
    #[inline(always)]
    fn has_policy(&self) -> bool {
        self.generation != 0
    }
    #[inline(always)]
    fn local(&self, identity: Identity) -> Option<LocalEntry> {
        let map = LOCALS.get(self.slot)?;
        // SAFETY: frozen map.
        unsafe { map.get(&identity.0).map(entry) }
    }
    #[inline(always)]
    fn class(&self, proto: Proto, port: u16) -> u16 {
        match CLASSES.get_value(self.slot, &(proto as u32)) {
            Some(classes) => classes[port as usize],
            None => 0,
        }
    }
    #[inline(always)]
    fn rule(&self, key: &RuleKey) -> Option<RuleEntry> {
        let map = RULES.get(self.slot * SHARDS + key.shard(self.bits))?;
        // SAFETY: frozen map.
        unsafe { map.get(key).map(entry) }
    }
    #[inline(always)]
    fn timeline(&self, index: u32) -> Option<RuleEntry> {
        let map = TIMELINE.get(self.slot)?;
        // SAFETY: frozen map.
        unsafe { map.get(&index).map(entry) }
    }
    #[inline(always)]
    fn prefix(&self, addr: &Addr) -> Option<Identity> {
        // SAFETY: frozen map.
        if let Some(identity) = HOSTS.get(self.slot).and_then(|map| unsafe { map.get(addr) }) {
            return Some(Identity(*identity));
        }
        let map = PREFIXES.get(self.slot)?;
        // The same layout as `rule::PrefixKey`.
        let key = Key::new(128, *addr);
        map.get(&key).copied().map(Identity)
    }
}

impl Peers for Kernel {
    #[inline(always)]
    fn origin(&self, key: &OriginKey) -> Option<Party> {
        // SAFETY: copied at once; an LRU entry that is reused under us holds another full key's party only for the
        // length of this copy, and the SYN it belongs to is being retried.
        unsafe { ORIGINS.get(key).copied() }
    }
    #[inline(always)]
    fn endpoint(&self, key: &EndpointKey) -> Option<Party> {
        // SAFETY: freed after a grace period (NO_PREALLOC).
        unsafe { ENDPOINTS.get(key).map(|e| Party { identity: e.identity, workload: e.workload }) }
    }
    #[inline(always)]
    fn address(&self, addr: &Addr) -> Option<AddressEntry> {
        // SAFETY: freed after a grace period (NO_PREALLOC).
        unsafe { ADDRESSES.get(addr).copied() }
    }
}
