//! Counters and events. A full buffer costs an event, never a packet; what is lost is counted.

use crate::judge::Judgement;
use crate::maps::{self, budget, count, count_denial, count_rule, now};
use aya_ebpf::bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::generated::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_task, bpf_get_smp_processor_id,
    bpf_probe_read_kernel,
};
use core::ffi::c_void;
use segfw_common::event::{Counter, DenialKey, Hook};
use segfw_common::{EventKind, Flow, FlowEvent, Verdict, bounds};

/// What an event needs besides the flow and the answer.
#[derive(Clone, Copy)]
pub struct About {
    pub kind: EventKind,
    pub hook: Hook,
    pub socket_type: u8,
    /// Address family, where that is what was judged.
    pub family: u8,
    pub generation: u32,
    /// Sequence number of a SYN that a rule rejects.
    pub sequence: u32,
    pub cgroup: u64,
}

/// Which process acts, as far as a hook may ask. A constant at each call and an argument of its own: the verifier must know
/// it in the callee, or it refuses helpers that the program will never call.
pub type Process = u64;
/// The hook does not run in the process that acts.
pub const NOBODY: Process = 0;
/// It does, and every kernel lets it ask.
pub const CALLER: Process = 1;
/// It does, and is `sock_ops`, which may ask from 6.18 on.
pub const CALLER_OF_SOCK_OPS: Process = 2;

/// How `sock_ops` programs learn of the process that acts: 0 = they do not, 1 = by helpers, 2 = from `task_struct`, whose
/// layout is in the next two. Set by the loader, constants for the verifier.
#[unsafe(no_mangle)]
static SOCK_OPS_PROCESS: u32 = 1;
/// Offset of `task_struct.tgid`.
#[unsafe(no_mangle)]
static TASK_TGID: u32 = 0;
/// Offset of `task_struct.comm`.
#[unsafe(no_mangle)]
static TASK_COMM: u32 = 0;

/// A constant that the loader may have changed, so the compiler may not fold it.
#[inline(always)]
pub fn loaded(constant: &'static u32) -> u32 {
    // SAFETY: a plain read.
    unsafe { core::ptr::read_volatile(constant) }
}

/// Writes which process acts.
#[inline(always)]
fn name_process(e: &mut FlowEvent, process: Process) {
    let how = if process == CALLER_OF_SOCK_OPS { loaded(&SOCK_OPS_PROCESS) } else { process as u32 };
    if how == 1 {
        // SAFETY: `comm` is 16 bytes of the reserved record.
        unsafe {
            e.pid = (bpf_get_current_pid_tgid() >> 32) as u32;
            let _ = bpf_get_current_comm(e.comm.as_mut_ptr().cast(), 16);
        }
    } else if how == 2 {
        // SAFETY: `pid` and `comm` are 4 and 16 bytes of the reserved record; the helper checks the address it reads.
        unsafe {
            let task = bpf_get_current_task();
            let (tgid, comm) = (task + u64::from(loaded(&TASK_TGID)), task + u64::from(loaded(&TASK_COMM)));
            let _ = bpf_probe_read_kernel((&raw mut e.pid).cast(), 4, tgid as *const c_void);
            let _ = bpf_probe_read_kernel(e.comm.as_mut_ptr().cast(), 16, comm as *const c_void);
        }
    }
}

/// Counts a judged flow, and reports it unless that would be one denial too many or the rule is quiet.
#[inline(always)]
pub fn report(about: &About, flow: &Flow, j: &Judgement, process: Process) {
    report_at(about, flow, j, process, 0);
}

/// The same, where the caller knows the time; 0 = it does not. To ask costs as much as a look-up.
#[inline(never)]
pub fn report_at(about: &About, flow: &Flow, j: &Judgement, process: Process, time: u64) {
    if flow.local.is_canary() {
        return;
    }
    let verdict = j.decision.verdict;
    count(Counter::verdict_index(j.decision.reason as u8, verdict as u8, flow.direction as u8));
    count_rule(j.decision.rule, verdict as u8);
    let denied = !j.decision.passes();
    if j.decision.quiet && !denied && j.decision.pending == 0 {
        return;
    }
    let time = if time == 0 { now() } else { time };
    if denied && over_budget(time) {
        let key = DenialKey {
            local: flow.local.0,
            remote: j.peer.identity.0,
            rule: j.decision.rule,
            port: flow.service(),
            protocol: flow.protocol,
            direction: flow.direction as u8,
            reason: j.decision.reason as u8,
            hook: about.hook as u8,
            reject: j.decision.reject as u8,
        };
        count_denial(&key, time);
        return;
    }
    write(about, flow, j, process, time);
}

/// Has this CPU sent its share of single denials in this second?
#[inline(always)]
fn over_budget(time: u64) -> bool {
    let Some(budget) = budget() else { return false };
    let second = time / 1_000_000_000;
    if budget.second != second {
        budget.second = second;
        budget.denials = 0;
    }
    budget.denials += 1;
    budget.denials > bounds::DENIAL_EVENTS_PER_S
}

/// Writes one event with no counts of bytes.
#[inline(always)]
fn write(about: &About, flow: &Flow, j: &Judgement, process: Process, time: u64) {
    let Some(event) = begin(time) else { return };
    // SAFETY: reserved and zeroed by `begin`.
    let e = unsafe { &mut *event };
    describe(e, flow);
    e.cgroup = about.cgroup;
    e.remote = j.peer.identity.0;
    e.rule = j.decision.rule;
    e.pending_rule = j.decision.pending_rule;
    e.generation = about.generation;
    e.rtt_us = about.sequence;
    e.kind = about.kind as u8;
    e.verdict = j.decision.verdict as u8;
    e.reason = j.decision.reason as u8;
    e.pending = j.decision.pending;
    e.evidence = j.peer.evidence as u8;
    e.hook = about.hook as u8;
    e.reject = (j.decision.reject && matches!(j.decision.verdict, Verdict::Denied)) as u8;
    e.socket_type = about.socket_type;
    e.family = about.family;
    name_process(e, process);
    // A rejected flow waits for its answer.
    submit(event, matches!(about.kind, EventKind::Reject));
}

/// The part of an event that the flow itself tells.
#[inline(always)]
pub fn describe(e: &mut FlowEvent, flow: &Flow) {
    e.netns = flow.netns;
    e.local_addr = flow.local_addr;
    e.remote_addr = flow.remote_addr;
    e.local = flow.local.0;
    e.local_port = flow.local_port;
    e.remote_port = flow.remote_port;
    e.protocol = flow.protocol;
    e.direction = flow.direction as u8;
}

/// Reserves a zeroed event with its time and number. `None` = the buffer is full; the number is used up, so the gap shows.
#[inline(always)]
pub fn begin(time: u64) -> Option<*mut FlowEvent> {
    let budget = budget()?;
    // Read once: a softirq that takes the next number between here and the end must not make this one look lost.
    let sequence = budget.sequence + 1;
    budget.sequence = sequence;
    let Some(mut entry) = maps::events().reserve(0) else {
        count(Counter::EventsLost as u32);
        return None;
    };
    count(Counter::EventsSent as u32);
    let event: *mut FlowEvent = entry.as_mut_ptr();
    // SAFETY: the ring buffer gave 168 writable bytes; zero is valid for every field.
    unsafe {
        let words = event.cast::<u64>();
        let mut i = 0;
        while i < size_of::<FlowEvent>() / 8 {
            words.add(i).write_volatile(0);
            i += 1;
        }
        (*event).time = time;
        (*event).sequence = sequence;
        (*event).cpu = bpf_get_smp_processor_id() as u32;
    }
    Some(event)
}

/// Hands a reserved event to user space, which is woken if it has heard nothing of this CPU for a while, or `at_once`.
#[inline(always)]
pub fn submit(event: *mut FlowEvent, at_once: bool) {
    // SAFETY: as above.
    let time = unsafe { (*event).time };
    let mut flag = BPF_RB_NO_WAKEUP;
    if at_once || wake_due(time) {
        flag = BPF_RB_FORCE_WAKEUP;
    }
    // SAFETY: `event` came from `begin` and is submitted once.
    unsafe { aya_ebpf::helpers::generated::bpf_ringbuf_submit(event.cast(), u64::from(flag)) }
}

/// Is this the event to wake the agent for? Woken, it looks again by itself for longer than [`bounds::WAKE_NS`]: so no event
/// waits for longer than that (`agent::export`).
#[inline(always)]
fn wake_due(time: u64) -> bool {
    let Some(budget) = budget() else { return true };
    budget.unwoken += 1;
    // A softirq in between may wake too: once more than needed.
    let due = time.wrapping_sub(budget.woken) >= bounds::WAKE_NS || budget.unwoken >= u64::from(bounds::WAKE_EVENTS);
    if due {
        budget.woken = time;
        budget.unwoken = 0;
    }
    due
}
