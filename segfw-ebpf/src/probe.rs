//! The judge behind `BPF_PROG_TEST_RUN`: a question in the packet, the answer in a map.

use crate::judge::{judge, unjudged};
use crate::maps::Kernel;
use crate::stream::Skb;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SkBuffContext;
use segfw_common::packet::Bytes;
use segfw_common::probe::{Answer, Question};

#[btf_map]
static PROBE: Array<Answer, 1> = Array::new();

/// Answers the question that the packet holds. Always 1: nothing depends on the return value.
#[inline(always)]
pub fn answer(ctx: &SkBuffContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let Some(bytes) = skb.bytes::<{ size_of::<Question>() }>(0) else { return 1 };
    // SAFETY: `Question` is `repr(C)` of integers: every pattern of bytes is one.
    let question: Question = unsafe { core::mem::transmute(bytes) };
    let kernel = Kernel::read();
    let flow = question.flow();
    let mut j = unjudged();
    judge(&kernel, &flow, &mut j);
    if let Some(slot) = PROBE.get_ptr_mut(0) {
        // SAFETY: the one value of the map.
        unsafe { *slot = Answer::new(&j.peer, &j.decision) }
    }
    1
}
