//! Bytes of the ring buffer → [`FlowEvent`]. It checks the size and nothing else: a byte that stands for an enumeration
//! stays a byte, so that an event of a newer kernel side is shown as far as it can be read.

use segfw_common::{Addr, FlowEvent};

/// Bytes of one event.
pub const EVENT_LEN: usize = size_of::<FlowEvent>();

/// The bytes are not an event of this layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event has {EVENT_LEN} bytes, this one {got}: kernel side and agent are of different layouts")]
pub struct WrongSize {
    /// Bytes that came.
    pub got: usize,
}

/// Takes fields from the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    /// The length is checked once in [`decode`]; past the end there would be zeros.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((head, tail)) = self.0.split_first_chunk::<N>() else {
            self.0 = &[];
            return [0; N];
        };
        self.0 = tail;
        *head
    }
    fn u8(&mut self) -> u8 {
        u8::from_ne_bytes(self.take())
    }
    fn u16(&mut self) -> u16 {
        u16::from_ne_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }
    fn addr(&mut self) -> Addr {
        Addr::v6(self.take())
    }
}

/// Reads one event. Fields are read in the order in which Rust evaluates a struct expression: as written here, which is
/// the order of the layout (a test compares it with memory).
pub fn decode(data: &[u8]) -> Result<FlowEvent, WrongSize> {
    if data.len() != EVENT_LEN {
        return Err(WrongSize { got: data.len() });
    }
    let mut f = Fields(data);
    Ok(FlowEvent {
        time: f.u64(),
        sequence: f.u64(),
        cgroup: f.u64(),
        netns: f.u64(),
        bytes_sent: f.u64(),
        bytes_received: f.u64(),
        duration: f.u64(),
        local_addr: f.addr(),
        remote_addr: f.addr(),
        local: f.u32(),
        remote: f.u32(),
        rule: f.u32(),
        pending_rule: f.u32(),
        generation: f.u32(),
        pid: f.u32(),
        cpu: f.u32(),
        segments_sent: f.u32(),
        segments_received: f.u32(),
        retransmits: f.u32(),
        rtt_us: f.u32(),
        local_port: f.u16(),
        remote_port: f.u16(),
        protocol: f.u16(),
        kind: f.u8(),
        direction: f.u8(),
        verdict: f.u8(),
        reason: f.u8(),
        pending: f.u8(),
        evidence: f.u8(),
        hook: f.u8(),
        reject: f.u8(),
        socket_type: f.u8(),
        family: f.u8(),
        pad: f.take(),
        comm: f.take(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The event as it lies in memory.
    fn bytes(event: &FlowEvent) -> [u8; EVENT_LEN] {
        // SAFETY: `FlowEvent` is `repr(C)`, integers only, and has no padding (168 = the sum of its fields).
        unsafe { std::mem::transmute(*event) }
    }

    #[test]
    fn fields_are_where_memory_has_them() {
        let raw: [u8; EVENT_LEN] = std::array::from_fn(|i| i as u8);
        let event = decode(&raw).unwrap();
        assert_eq!(bytes(&event), raw);
        assert_eq!(event.local_addr.octets()[0], 56);
        assert_eq!(event.comm[15], 167);
    }

    #[test]
    fn any_other_size_is_refused() {
        for len in [0, 1, EVENT_LEN - 1, EVENT_LEN + 1, 4096] {
            assert_eq!(decode(&vec![0xff; len]), Err(WrongSize { got: len }));
        }
    }
}
