//! The one call from a flow to an answer: who is the peer, what does the policy say.

use crate::maps::{Kernel, now};
use segfw_common::decide::Peer;
use segfw_common::rule::ipproto;
use segfw_common::{Decision, Flow, SocketState, Verdict, decide, identify};

/// An answer and what it rests on.
#[derive(Clone, Copy)]
pub struct Judgement {
    pub peer: Peer,
    pub decision: Decision,
}

/// Judges a flow.
#[inline(always)]
pub fn judge(kernel: &Kernel, flow: &Flow, out: &mut Judgement) {
    who(kernel, flow, &mut out.peer);
    what(kernel, flow, out);
}

/// Not inlined, as `what`: one copy of the look-ups per program, and stack frames that are gone when it returns (all
/// frames together have 512 bytes).
#[inline(never)]
fn who(kernel: &Kernel, flow: &Flow, out: &mut Peer) {
    let peer = identify(kernel, flow);
    let zero = opaque_zero();
    out.identity.0 = peer.identity.0 ^ zero;
    out.workload = peer.workload ^ zero;
    out.evidence = peer.evidence;
    blur(&mut out.evidence, zero);
}

#[inline(never)]
fn what(kernel: &Kernel, flow: &Flow, out: &mut Judgement) {
    let d = decide(kernel, flow, &out.peer);
    let zero = opaque_zero();
    let to = &mut out.decision;
    to.until = d.until ^ u64::from(zero);
    to.drain_ns = d.drain_ns ^ u64::from(zero);
    to.rule = d.rule ^ zero;
    to.pending_rule = d.pending_rule ^ zero;
    to.pending = d.pending ^ zero as u8;
    to.verdict = d.verdict;
    blur(&mut to.verdict, zero);
    to.reason = d.reason;
    blur(&mut to.reason, zero);
    to.reject = d.reject;
    blur(&mut to.reject, zero);
    to.quiet = d.quiet;
    blur(&mut to.quiet, zero);
}

/// A zero the verifier does not know to be one.
///
/// Without it each path through the look-ups leaves other constants behind, and the verifier walks all that follows once
/// for each of them. A value that was combined with this one is "some number" to it: the paths become one.
#[inline(always)]
pub fn opaque_zero() -> u32 {
    static mut OPAQUE: u32 = 0;
    // SAFETY: never written; volatile, so that the compiler does not know either.
    unsafe { core::ptr::read_volatile(&raw const OPAQUE) }
}

/// Combines a one-byte enum or bool with the opaque zero, which leaves it as it is.
#[inline(always)]
pub fn blur<T>(byte: &mut T, zero: u32) {
    const { assert!(size_of::<T>() == 1) };
    let raw = (&raw mut *byte).cast::<u8>();
    // SAFETY: one byte, and `x ^ 0` is `x`, so it stays a valid value.
    unsafe { raw.write_volatile(raw.read_volatile() ^ zero as u8) }
}

/// Room for an answer; what stands here is a refusal until `judge` has written.
#[inline(always)]
pub fn unjudged() -> Judgement {
    Judgement {
        peer: Peer {
            identity: segfw_common::Identity::UNRESOLVED,
            workload: 0,
            evidence: segfw_common::Evidence::None,
        },
        decision: Decision::plain(Verdict::Denied, segfw_common::Reason::NoPolicy),
    }
}

/// What became of a live flow that was judged again.
pub enum Live {
    /// Goes on; the answer is to be stored.
    Goes,
    /// It is no longer allowed and was not reported before.
    EndsNow,
    /// It is no longer allowed, as was said before.
    Ended,
}

/// Applies `onRevoke` to a live flow: a refusal may be put off (`drain`) or never come (`keep`).
#[inline(always)]
pub fn live(state: &mut SocketState, generation: u32, j: &mut Judgement) -> Live {
    if !j.decision.passes() {
        let drain = j.decision.drain_ns;
        if drain == u64::MAX {
            j.decision.verdict = Verdict::Allowed;
            j.decision.until = 0;
        } else if drain != 0 {
            let at = now();
            if state.drain == 0 {
                state.drain = at.saturating_add(drain);
            }
            if at < state.drain {
                j.decision.verdict = Verdict::Allowed;
                j.decision.until = state.drain;
            }
        }
    } else {
        state.drain = 0;
    }
    let first = state.verdict != Verdict::Denied as u8;
    remember(state, generation, j);
    if j.decision.passes() {
        Live::Goes
    } else if first {
        Live::EndsNow
    } else {
        Live::Ended
    }
}

/// Caches an answer on its socket.
#[inline(always)]
pub fn remember(state: &mut SocketState, generation: u32, j: &Judgement) {
    state.until = j.decision.until;
    state.generation = generation;
    let lasting = j.decision.passes() && j.decision.until == 0 && state.protocol == ipproto::TCP;
    state.passes = if lasting { generation } else { 0 };
    state.remote = j.peer.identity.0;
    state.rule = j.decision.rule;
    state.verdict = j.decision.verdict as u8;
    state.evidence = j.peer.evidence as u8;
    state.reason = j.decision.reason as u8;
    state.pending = j.decision.pending;
    state.pending_rule = j.decision.pending_rule;
    state.flags = if j.decision.quiet { state.flags | SocketState::NO_LOG } else { state.flags & !SocketState::NO_LOG };
}

/// The stored answer again, as [`judge`] gave it. Only for one that passes, so there is nothing to reject.
#[inline(always)]
pub fn recall(state: &SocketState, j: &mut Judgement) {
    j.peer.identity.0 = state.remote;
    j.decision.rule = state.rule;
    j.decision.pending = state.pending;
    j.decision.pending_rule = state.pending_rule;
    j.decision.quiet = state.flags & SocketState::NO_LOG != 0;
    // SAFETY: `remember` took the three bytes from these very types.
    unsafe {
        put(&mut j.peer.evidence, state.evidence);
        put(&mut j.decision.verdict, state.verdict);
        put(&mut j.decision.reason, state.reason);
    }
}

/// # Safety
///
/// `raw` is a value of `T`.
#[inline(always)]
unsafe fn put<T>(to: &mut T, raw: u8) {
    const { assert!(size_of::<T>() == 1) };
    // SAFETY: one byte, and a value of this type as the caller says.
    unsafe { (&raw mut *to).cast::<u8>().write_volatile(raw) }
}

/// Is the cached answer still good, and a pass?
#[inline(always)]
pub fn cached(state: &SocketState, generation: u32) -> bool {
    state.generation == generation
        && state.verdict != 0
        && state.verdict != Verdict::Denied as u8
        && (state.until == 0 || now() < state.until)
}
