//! What the compiler writes and the kernel looks up: a total function with no precedence left.

use crate::{Evidence, Identity, bounds};

/// Which end this host is judging for.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Direction {
    /// The local workload is the destination.
    Ingress = 0,
    /// The local workload is the source.
    Egress = 1,
}

impl Direction {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
    /// From a raw byte; `None` for a value of a newer layout.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::Ingress,
            1 => Self::Egress,
            _ => return None,
        })
    }
}

/// The protocols a policy can tell apart. Each has a table of port classes.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Proto {
    /// TCP, and MPTCP where it is granted.
    Tcp = 0,
    /// UDP.
    Udp = 1,
    /// ICMP; the "port" is `type << 8 | code`.
    Icmp = 2,
    /// ICMPv6; the "port" is `type << 8 | code`.
    Icmpv6 = 3,
    /// SCTP.
    Sctp = 4,
    /// UDP-Lite.
    UdpLite = 5,
    /// DCCP.
    Dccp = 6,
    /// Every other protocol; the "port" is the IP protocol number.
    Other = 7,
}

/// IP protocol numbers (IANA, "Assigned Internet Protocol Numbers"), and Linux's own number for MPTCP.
#[allow(missing_docs, reason = "the names say it")]
pub mod ipproto {
    pub const ICMP: u16 = 1;
    pub const TCP: u16 = 6;
    pub const UDP: u16 = 17;
    pub const DCCP: u16 = 33;
    pub const ICMPV6: u16 = 58;
    pub const SCTP: u16 = 132;
    pub const UDPLITE: u16 = 136;
    pub const MPTCP: u16 = 262;
}

impl Proto {
    /// Tables of port classes in one generation.
    pub const COUNT: u32 = 8;
    /// Every protocol, in the order of their numbers.
    pub const ALL: [Self; 8] =
        [Self::Tcp, Self::Udp, Self::Icmp, Self::Icmpv6, Self::Sctp, Self::UdpLite, Self::Dccp, Self::Other];

    /// From an IP protocol number. A table and not a `match`: the verifier then has one unknown byte to follow instead of
    /// one path per protocol. MPTCP (262) lands on TCP, as its number was chosen to (include/uapi/linux/in.h).
    #[inline(always)]
    pub fn from_ip(protocol: u16) -> Self {
        // SAFETY: the table holds values of this enum only (`every_protocol_has_a_class` checks all 256).
        unsafe { core::mem::transmute::<u8, Self>(BY_IP_PROTOCOL[(protocol & 0xff) as usize]) }
    }

    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Icmpv6 => "icmpv6",
            Self::Sctp => "sctp",
            Self::UdpLite => "udplite",
            Self::Dccp => "dccp",
            Self::Other => "other",
        }
    }

    /// From a raw byte; `None` for a value of a newer layout.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::Tcp,
            1 => Self::Udp,
            2 => Self::Icmp,
            3 => Self::Icmpv6,
            4 => Self::Sctp,
            5 => Self::UdpLite,
            6 => Self::Dccp,
            7 => Self::Other,
            _ => return None,
        })
    }

    /// True where the two numbers in front of the payload are ports.
    #[inline(always)]
    pub const fn has_ports(self) -> bool {
        match self {
            Self::Tcp | Self::Udp | Self::Sctp | Self::UdpLite | Self::Dccp => true,
            Self::Icmp | Self::Icmpv6 | Self::Other => false,
        }
    }
}

static BY_IP_PROTOCOL: [u8; 256] = {
    let mut table = [Proto::Other as u8; 256];
    table[ipproto::TCP as usize] = Proto::Tcp as u8;
    table[ipproto::UDP as usize] = Proto::Udp as u8;
    table[ipproto::ICMP as usize] = Proto::Icmp as u8;
    table[ipproto::ICMPV6 as usize] = Proto::Icmpv6 as u8;
    table[ipproto::SCTP as usize] = Proto::Sctp as u8;
    table[ipproto::UDPLITE as usize] = Proto::UdpLite as u8;
    table[ipproto::DCCP as usize] = Proto::Dccp as u8;
    table
};

/// What an entry says.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Action {
    /// Pass.
    Allow = 1,
    /// Drop: silent at ingress, EPERM at egress.
    Deny = 2,
    /// Drop and answer: reset or port unreachable at ingress, ECONNREFUSED at egress.
    Reject = 3,
}

impl Action {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Reject => "reject",
        }
    }
    /// From a raw byte. An unknown value reads as `Deny`: what we do not understand we do not let through.
    #[inline(always)]
    pub const fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::Allow,
            3 => Self::Reject,
            _ => Self::Deny,
        }
    }
}

/// The class that stands for "every port that has no entry of its own". Class 0 holds the ports no rule names.
pub const CLASS_ANY: u16 = u16::MAX;

/// One sentence of the compiled policy. `decide` looks up at most four keys, most telling first:
/// (remote, class), (remote, any), (any, class), (any, any).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RuleKey {
    /// Identity of the local workload.
    pub local: Identity,
    /// Identity of the peer, or [`Identity::ANY`].
    pub remote: Identity,
    /// Port class of the connection's destination port, or [`CLASS_ANY`].
    pub class: u16,
    /// [`Proto`] as a byte.
    pub proto: u8,
    /// [`Direction`] as a byte.
    pub direction: u8,
}

impl RuleKey {
    /// Which of `2^bits` maps holds this key; `bits` is at most that of [`bounds::RULE_SHARDS`].
    #[inline(always)]
    pub const fn shard(&self, bits: u32) -> u32 {
        // The high bits of products with odd numbers depend on all bits below (Knuth, TAOCP 6.4): numbers that are given in
        // turn, as identities are, spread evenly.
        let mixed = self.local.0.wrapping_mul(0x9e37_79b1)
            ^ self.remote.0.wrapping_mul(0x85eb_ca77)
            ^ (self.class as u32).wrapping_mul(0xc2b2_ae3d);
        (((mixed as u64) << (bits & 31)) >> 32) as u32 & (bounds::RULE_SHARDS - 1)
    }
}

/// The answer to a [`RuleKey`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RuleEntry {
    /// The answer holds before this time (boot nanoseconds); then `next` does. 0 = for good.
    pub until: u64,
    /// The deciding rule; 0 = none, the default of the segment.
    pub rule: u32,
    /// The rule that would have decided with monitor-mode policies enforced; meaningful if `pending` is not 0.
    pub pending_rule: u32,
    /// Index + 1 of the part that follows in the timeline; 0 = none.
    pub next: u32,
    /// [`Action`] as a byte.
    pub action: u8,
    /// [`crate::Reason`] as a byte.
    pub reason: u8,
    /// [`Action`] of the shadow answer, 0 where it is the same as `action`.
    pub pending: u8,
    /// Bit 0: do not log an allowed flow. Bits 4 to 6: the least [`Evidence`] an allow needs at ingress.
    pub flags: u8,
}

impl RuleEntry {
    /// Do not log allowed flows.
    pub const NO_LOG: u8 = 1;

    /// The flag bits that demand `evidence`.
    pub const fn demand(evidence: Evidence) -> u8 {
        (evidence as u8) << 4
    }
    /// The least evidence an allow needs, as a raw [`Evidence`].
    #[inline(always)]
    pub const fn demanded(&self) -> u8 {
        (self.flags >> 4) & 7
    }
}

/// What is true of one local identity as a whole. A workload without an entry is one that these tables do not know yet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LocalEntry {
    /// How long a live connection that is no longer allowed goes on (nanoseconds): 0 = cut, `u64::MAX` = keep.
    pub drain_ns: u64,
    /// `MONITOR`, `OPEN`, and one bit per direction and kind of key that occurs (see [`LocalEntry::level`]).
    pub flags: u32,
    /// Bits of `GRANT_*`: the socket types this identity may create besides TCP streams and (not if `TCP_ONLY`) UDP
    /// datagrams.
    pub grants: u32,
    /// [`Action`] where no entry decides, by [`Direction`].
    pub default: [u8; 2],
    /// [`crate::Reason`] that goes with the default.
    pub default_reason: u8,
    /// Zero.
    pub pad: [u8; 5],
}

impl LocalEntry {
    /// Judge, log as AUDIT, drop nothing.
    pub const MONITOR: u32 = 1;
    /// The identity is known and in no segment: not enforced.
    pub const OPEN: u32 = 2;
    /// UDP sockets are refused when they are made, as every type is that was not granted.
    pub const TCP_ONLY: u32 = 4;
    /// ICMP and ICMPv6 datagram sockets ("ping sockets"), and raw sockets of these two protocols.
    pub const GRANT_PING: u32 = 1;
    /// Raw sockets of every protocol; each packet is judged at egress.
    pub const GRANT_RAW: u32 = 2;
    /// SCTP.
    pub const GRANT_SCTP: u32 = 4;
    /// UDP-Lite.
    pub const GRANT_UDPLITE: u32 = 8;
    /// DCCP.
    pub const GRANT_DCCP: u32 = 16;
    /// MPTCP: subflows are judged as TCP connections.
    pub const GRANT_MPTCP: u32 = 32;
    /// Packet sockets (`AF_PACKET`). No hook judges what they send.
    pub const GRANT_PACKET: u32 = 64;
    /// Sockets to the hypervisor and its guests (`AF_VSOCK`). No hook judges what they send.
    pub const GRANT_VSOCK: u32 = 128;
    /// Every address family besides IPv4, IPv6, local, netlink and the two above. No hook judges what they send.
    pub const GRANT_FAMILIES: u32 = 256;
    /// Those whose packets come in through `cgroup_skb/ingress` and no other gate.
    pub const GRANTS_BY_PACKET: u32 =
        Self::GRANT_PING | Self::GRANT_RAW | Self::GRANT_SCTP | Self::GRANT_UDPLITE | Self::GRANT_DCCP;

    /// The flag bit that says: this identity has keys of this kind.
    #[inline(always)]
    pub const fn level(direction: Direction, remote_any: bool, class_any: bool) -> u32 {
        1 << (8 + 4 * direction as u32 + 2 * remote_any as u32 + class_any as u32)
    }
}

/// Key of the longest-prefix table; `bits` counts from the start of the 16 bytes, so `10.0.0.0/8` has 104.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PrefixKey {
    /// 0..=128.
    pub bits: u32,
    /// The prefix, host bits zero.
    pub addr: crate::Addr,
}

const _: () = assert!(size_of::<RuleKey>() == 12);
const _: () = assert!(size_of::<RuleEntry>() == 24);
const _: () = assert!(size_of::<LocalEntry>() == 24);
const _: () = assert!(size_of::<PrefixKey>() == 20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_protocol_has_a_class() {
        for protocol in 0..=255u16 {
            let raw = BY_IP_PROTOCOL[protocol as usize];
            assert_eq!(Proto::from_raw(raw).map(|p| p as u8), Some(raw));
            let expected = match protocol {
                ipproto::TCP => Proto::Tcp,
                ipproto::UDP => Proto::Udp,
                ipproto::ICMP => Proto::Icmp,
                ipproto::ICMPV6 => Proto::Icmpv6,
                ipproto::SCTP => Proto::Sctp,
                ipproto::UDPLITE => Proto::UdpLite,
                ipproto::DCCP => Proto::Dccp,
                _ => Proto::Other,
            };
            assert_eq!(Proto::from_ip(protocol), expected);
        }
        assert_eq!(Proto::from_ip(ipproto::MPTCP), Proto::Tcp);
        for (i, proto) in Proto::ALL.iter().enumerate() {
            assert_eq!(*proto as usize, i);
        }
    }

    #[test]
    fn keys_spread_over_the_shards() {
        let key = |local: u32, remote: u32, class: u16| RuleKey {
            local: Identity(local),
            remote: Identity(remote),
            class,
            proto: 0,
            direction: 0,
        };
        let any = Identity::ANY.0;
        let shapes: [&dyn Fn(u32) -> RuleKey; 5] = [
            &|i| key(256 + i, any, 80),
            &|i| key(256, 256 + i, CLASS_ANY),
            &|i| key(256, any, i as u16),
            &|i| key(256 + i % 64, 256 + i / 64, 443),
            &|i| key(256 + i, 257 + i, CLASS_ANY),
        ];
        for (shape, make) in shapes.iter().enumerate() {
            for bits in [0, 4, bounds::RULE_SHARDS.trailing_zeros()] {
                let mut shards = vec![0; 1 << bits];
                (0..1 << 16).for_each(|i| shards[make(i).shard(bits) as usize] += 1);
                let mean = (1 << 16) >> bits;
                assert!(shards.iter().all(|n| (mean / 2..=mean * 2).contains(n)), "shape {shape}: {shards:?}");
            }
        }
    }
}
