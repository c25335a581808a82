//! One question and one answer as plain data, for the program that is run by `BPF_PROG_TEST_RUN` only.

use crate::decide::Peer;
use crate::{Addr, Decision, Direction, Flow, Identity};

/// A [`Flow`] as bytes: the payload of the test packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// See [`Flow`].
    pub netns: u64,
    /// See [`Flow`].
    pub local_addr: Addr,
    /// See [`Flow`].
    pub remote_addr: Addr,
    /// See [`Flow`].
    pub local: u32,
    /// See [`Flow`].
    pub workload: u32,
    /// See [`Flow`].
    pub local_port: u16,
    /// See [`Flow`].
    pub remote_port: u16,
    /// See [`Flow`].
    pub protocol: u16,
    /// [`Direction`].
    pub direction: u8,
    /// Zero.
    pub pad: u8,
}

impl Question {
    /// The flow that is asked about.
    #[inline(always)]
    pub fn flow(&self) -> Flow {
        Flow {
            direction: if self.direction == Direction::Ingress as u8 { Direction::Ingress } else { Direction::Egress },
            protocol: self.protocol,
            local: Identity(self.local),
            workload: self.workload,
            netns: self.netns,
            local_addr: self.local_addr,
            remote_addr: self.remote_addr,
            local_port: self.local_port,
            remote_port: self.remote_port,
        }
    }
}

impl From<Flow> for Question {
    fn from(flow: Flow) -> Self {
        Self {
            netns: flow.netns,
            local_addr: flow.local_addr,
            remote_addr: flow.remote_addr,
            local: flow.local.0,
            workload: flow.workload,
            local_port: flow.local_port,
            remote_port: flow.remote_port,
            protocol: flow.protocol,
            direction: flow.direction as u8,
            pad: 0,
        }
    }
}

/// Everything `identify` and `decide` say, as bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Answer {
    /// See [`Decision`].
    pub until: u64,
    /// See [`Decision`].
    pub drain_ns: u64,
    /// [`Peer`].
    pub identity: u32,
    /// [`Peer`].
    pub workload: u32,
    /// See [`Decision`].
    pub rule: u32,
    /// See [`Decision`].
    pub pending_rule: u32,
    /// [`crate::Evidence`].
    pub evidence: u8,
    /// [`crate::Verdict`].
    pub verdict: u8,
    /// [`crate::Reason`].
    pub reason: u8,
    /// See [`Decision`].
    pub reject: u8,
    /// See [`Decision`].
    pub quiet: u8,
    /// See [`Decision`].
    pub pending: u8,
    /// Zero.
    pub pad: [u8; 2],
}

impl Answer {
    /// From what was judged.
    #[inline(always)]
    pub fn new(peer: &Peer, decision: &Decision) -> Self {
        Self {
            until: decision.until,
            drain_ns: decision.drain_ns,
            identity: peer.identity.0,
            workload: peer.workload,
            rule: decision.rule,
            pending_rule: decision.pending_rule,
            evidence: peer.evidence as u8,
            verdict: decision.verdict as u8,
            reason: decision.reason as u8,
            reject: decision.reject as u8,
            quiet: decision.quiet as u8,
            pending: decision.pending,
            pad: [0; 2],
        }
    }
}

const _: () = assert!(size_of::<Question>() == 56);
const _: () = assert!(size_of::<Answer>() == 40);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, integers only, no unnamed padding.
    unsafe impl aya::Pod for super::Question {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Answer {}
}
