//! Reading packets: bounded, total, the same code in XDP, in cgroup_skb and in the tests.
//!
//! Socket hooks run after reassembly, so a fragment is seen here only in XDP and in packets that a granted raw socket
//! builds by itself. Every loop has a named bound; what goes beyond it is [`ParseError`], never a guess.

use crate::Addr;
use crate::rule::ipproto;

/// Random access to the bytes of a packet. `None` = beyond the end.
pub trait Bytes {
    /// Copies `N` bytes from `offset`.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Bytes for [u8] {
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

/// IPv6 extension headers that are walked before the packet counts as malformed. Linux itself sends at most four.
pub const EXTENSION_HEADERS: u32 = 8;
/// VLAN tags that are unwrapped (802.1ad: two).
pub const VLAN_TAGS: u32 = 2;

/// Bytes read at once: an IPv4 header without options and the ports behind it; of IPv6 all before the destination.
const HEAD: usize = 24;

// Tables and not `match`es: the verifier then follows one unknown byte instead of one path per protocol.
const TERMINAL: u8 = 0;
const GENERIC: u8 = 1;
const ROUTING: u8 = 2;
const FRAGMENT: u8 = 3;
const AUTHENTICATION: u8 = 4;
/// What kind of IPv6 extension header a "next header" value names.
static EXTENSION: [u8; 256] = {
    let mut table = [TERMINAL; 256];
    table[0] = GENERIC; // hop-by-hop (RFC 8200)
    table[60] = GENERIC; // destination options (RFC 8200)
    table[135] = GENERIC; // mobility (RFC 6275)
    table[43] = ROUTING; // RFC 8200; type 0 is forbidden (RFC 5095)
    table[44] = FRAGMENT; // RFC 8200
    table[51] = AUTHENTICATION; // RFC 4302
    table
};
const NO_PORTS: u8 = 0;
const PORTS: u8 = 1;
const PORTS_AND_FLAGS: u8 = 2;
const TYPE_AND_CODE: u8 = 3;
/// What stands at the start of a transport header.
static TRANSPORT: [u8; 256] = {
    let mut table = [NO_PORTS; 256];
    table[ipproto::TCP as usize] = PORTS_AND_FLAGS;
    table[ipproto::UDP as usize] = PORTS;
    table[ipproto::UDPLITE as usize] = PORTS;
    table[ipproto::SCTP as usize] = PORTS;
    table[ipproto::DCCP as usize] = PORTS;
    table[ipproto::ICMP as usize] = TYPE_AND_CODE;
    table[ipproto::ICMPV6 as usize] = TYPE_AND_CODE;
    table
};

/// Why a packet cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ParseError {
    /// Shorter than its headers say.
    Truncated,
    /// A version that is neither 4 nor 6, a header length below its minimum, a type 0 routing header (RFC 5095).
    Invalid,
    /// More extension headers than [`EXTENSION_HEADERS`].
    TooManyHeaders,
}

/// What a policy can judge of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Sequence number of a TCP segment, host order; else 0.
    pub sequence: u32,
    /// IP protocol number of the payload.
    pub protocol: u16,
    /// Host order; for ICMP `type << 8 | code`; 0 where there is none.
    pub source_port: u16,
    /// Host order; for ICMP `type << 8 | code`; 0 where there is none.
    pub destination_port: u16,
    /// Flag byte of a TCP segment (RFC 9293, 3.1); else 0.
    pub tcp_flags: u8,
    /// A fragment that is not the first: it has no ports.
    pub later_fragment: bool,
}

impl Packet {
    /// Nothing read yet.
    pub const EMPTY: Self = Self {
        source: Addr::UNSPECIFIED,
        destination: Addr::UNSPECIFIED,
        sequence: 0,
        protocol: 0,
        source_port: 0,
        destination_port: 0,
        tcp_flags: 0,
        later_fragment: false,
    };
    /// RFC 9293 control bits.
    pub const FIN: u8 = 1;
    /// See `FIN`.
    pub const SYN: u8 = 2;
    /// See `FIN`.
    pub const RST: u8 = 4;
    /// See `FIN`.
    pub const ACK: u8 = 16;

    /// The first segment of a connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.tcp_flags & (Self::SYN | Self::ACK | Self::RST) == Self::SYN
    }
}

/// Offset of the IP header behind an Ethernet header and its VLAN tags; `None` = not IP, nothing to judge.
#[inline(always)]
pub fn ethernet<B: Bytes + ?Sized>(b: &B) -> Option<u32> {
    let mut offset = 12;
    for _ in 0..=VLAN_TAGS {
        let kind = u16::from_be_bytes(b.bytes::<2>(offset)?);
        offset += 2;
        match kind {
            0x0800 | 0x86dd => return Some(offset),
            0x8100 | 0x88a8 => offset += 2,
            _ => return None,
        }
    }
    None
}

/// Reads an IP packet that starts at `offset`.
pub fn parse<B: Bytes + ?Sized>(b: &B, offset: u32) -> Result<Packet, ParseError> {
    let mut packet = Packet::EMPTY;
    parse_into(b, offset, &mut packet).map(|()| packet)
}

/// [`parse`] into the caller's room: an eBPF stack has 512 bytes for all frames together.
#[inline(always)]
pub fn parse_into<B: Bytes + ?Sized>(b: &B, offset: u32, packet: &mut Packet) -> Result<(), ParseError> {
    packet.sequence = 0;
    packet.source_port = 0;
    packet.destination_port = 0;
    packet.tcp_flags = 0;
    packet.later_fragment = false;
    // What nearly every packet has, in one: in the kernel each reading is a call.
    let (head, has_ports) = match b.bytes::<HEAD>(offset) {
        Some(head) => (head, true),
        None => (front(b, offset).ok_or(ParseError::Truncated)?, false),
    };
    let [first, _, _, _, _, _, f0, f1, s0, protocol, s2, s3, v0, v1, v2, v3, d0, d1, d2, d3, p0, p1, p2, p3] = head;
    let at = match first >> 4 {
        4 => {
            let header_len = (first & 15) as u32 * 4;
            if header_len < 20 {
                return Err(ParseError::Invalid);
            }
            packet.protocol = protocol as u16;
            packet.later_fragment = u16::from_be_bytes([f0, f1]) & 0x1fff != 0;
            packet.source = Addr::from_v4_be(u32::from_ne_bytes([v0, v1, v2, v3]));
            packet.destination = Addr::from_v4_be(u32::from_ne_bytes([d0, d1, d2, d3]));
            if has_ports && header_len == 20 && !packet.later_fragment && TRANSPORT[protocol as usize] == PORTS {
                packet.source_port = u16::from_be_bytes([p0, p1]);
                packet.destination_port = u16::from_be_bytes([p2, p3]);
                return Ok(());
            }
            offset + header_len
        }
        6 => {
            let source = [s0, protocol, s2, s3, v0, v1, v2, v3, d0, d1, d2, d3, p0, p1, p2, p3];
            packet.source = Addr::v6(source);
            let destination = b.bytes::<16>(offset + 24).ok_or(ParseError::Truncated)?;
            packet.destination = Addr::v6(destination);
            walk_extensions(b, offset, f0, packet)?
        }
        _ => return Err(ParseError::Invalid),
    };
    if packet.later_fragment {
        return Ok(());
    }
    transport(b, at, packet)
}

/// The start of a packet that is shorter than [`HEAD`]: zeros stand for what is not there.
#[inline(always)]
fn front<B: Bytes + ?Sized>(b: &B, offset: u32) -> Option<[u8; HEAD]> {
    let [a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9] = b.bytes::<20>(offset)?;
    Some([a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, 0, 0, 0, 0])
}

/// Walks IPv6 extension headers, of which the fixed header names the `first`; the offset of what follows them.
#[inline(always)]
fn walk_extensions<B: Bytes + ?Sized>(b: &B, offset: u32, first: u8, packet: &mut Packet) -> Result<u32, ParseError> {
    let mut next = first;
    let mut at = offset + 40;
    for _ in 0..EXTENSION_HEADERS {
        let kind = EXTENSION[next as usize];
        if kind == TERMINAL {
            break;
        }
        let [following, words, third, low] = b.bytes::<4>(at).ok_or(ParseError::Truncated)?;
        next = following;
        at += match kind {
            // Counts in words of 4 bytes, less 2.
            AUTHENTICATION => (words as u32 + 2) * 4,
            FRAGMENT => {
                packet.later_fragment = u16::from_be_bytes([third, low]) & 0xfff8 != 0;
                8
            }
            ROUTING if third == 0 => return Err(ParseError::Invalid),
            // Counts in words of 8 bytes, less 1.
            _ => (words as u32 + 1) * 8,
        };
        // What follows a later fragment's header is payload, whatever it says.
        if packet.later_fragment {
            packet.protocol = next as u16;
            return Ok(at);
        }
    }
    if EXTENSION[next as usize] != TERMINAL {
        return Err(ParseError::TooManyHeaders);
    }
    packet.protocol = next as u16;
    Ok(at)
}

#[inline(always)]
fn transport<B: Bytes + ?Sized>(b: &B, at: u32, packet: &mut Packet) -> Result<(), ParseError> {
    let kind = TRANSPORT[(packet.protocol & 0xff) as usize];
    if kind == NO_PORTS {
        return Ok(());
    }
    if kind == TYPE_AND_CODE {
        let pair = u16::from_be_bytes(b.bytes::<2>(at).ok_or(ParseError::Truncated)?);
        packet.source_port = pair;
        packet.destination_port = pair;
        return Ok(());
    }
    let ports;
    if kind == PORTS_AND_FLAGS {
        let [p0, p1, p2, p3, q0, q1, q2, q3, _, _, _, _, _, flags] = b.bytes::<14>(at).ok_or(ParseError::Truncated)?;
        ports = [p0, p1, p2, p3];
        packet.sequence = u32::from_be_bytes([q0, q1, q2, q3]);
        packet.tcp_flags = flags;
    } else {
        ports = b.bytes::<4>(at).ok_or(ParseError::Truncated)?;
    }
    let [s0, s1, d0, d1] = ports;
    packet.source_port = u16::from_be_bytes([s0, s1]);
    packet.destination_port = u16::from_be_bytes([d0, d1]);
    Ok(())
}

/// Entry for fuzzers: whatever the bytes, no panic, and what is read lies within them.
pub fn fuzz_packet(data: &[u8]) {
    let _ = parse(data, 0);
    if let Some(at) = ethernet(data) {
        let _ = parse(data, at);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    fn v6(next: u8, rest: &[u8]) -> Vec<u8> {
        let mut p = std::vec![0x60, 0, 0, 0, 0, 0, next, 64];
        p.extend_from_slice(&[0; 15]);
        p.push(1);
        p.extend_from_slice(&[0; 15]);
        p.push(2);
        p.extend_from_slice(rest);
        p
    }
    const UDP: [u8; 8] = [0x30, 0x39, 0, 53, 0, 8, 0, 0];

    #[test]
    fn ports_behind_every_extension_header() {
        for (kind, header) in [
            (0u8, std::vec![17u8, 0, 0, 0, 0, 0, 0, 0]),
            (60, std::vec![17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (43, std::vec![17, 0, 4, 0, 0, 0, 0, 0]),
            (44, std::vec![17, 0, 0, 1, 0, 0, 0, 0]),
            (51, std::vec![17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ] {
            let mut rest = header;
            rest.extend_from_slice(&UDP);
            let p = parse(&v6(kind, &rest)[..], 0).unwrap();
            assert_eq!((p.protocol, p.source_port, p.destination_port), (17, 12345, 53), "header {kind}");
        }
    }

    #[test]
    fn later_fragments_have_no_ports_and_routing_type_0_is_refused() {
        let mut rest = std::vec![17u8, 0, 0, 8, 0, 0, 0, 0];
        rest.extend_from_slice(&UDP);
        let p = parse(&v6(44, &rest)[..], 0).unwrap();
        assert!(p.later_fragment && p.destination_port == 0 && p.protocol == 17);
        assert_eq!(parse(&v6(43, &[17, 0, 0, 0, 0, 0, 0, 0])[..], 0), Err(ParseError::Invalid));
    }

    #[test]
    fn too_many_headers_is_an_error_not_a_guess() {
        let rest: Vec<u8> = std::iter::repeat_n([0u8, 0, 0, 0, 0, 0, 0, 0], 9).flatten().chain(UDP).collect();
        assert_eq!(parse(&v6(0, &rest)[..], 0), Err(ParseError::TooManyHeaders));
    }

    #[test]
    fn ipv4_options_move_the_ports() {
        let mut p = std::vec![0x46u8, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1];
        p.extend_from_slice(&[0x1f, 0x90, 0, 80, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, 2]);
        let packet = parse(&p[..], 0).unwrap();
        assert_eq!((packet.source_port, packet.destination_port, packet.sequence), (8080, 80, 7));
        assert!(packet.opens());
        p[0] = 0x44;
        assert_eq!(parse(&p[..], 0), Err(ParseError::Invalid));
    }

    #[test]
    fn every_length_of_a_valid_packet_is_handled() {
        let mut whole = v6(0, &[60, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0]);
        whole.extend_from_slice(&UDP);
        for end in 0..whole.len() {
            let result = parse(&whole[..end], 0);
            assert!(end >= whole.len() - 4 || result == Err(ParseError::Truncated), "{end}: {result:?}");
        }
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..200_000 {
            let mut data = [0u8; 96];
            for chunk in data.chunks_mut(8) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                chunk.copy_from_slice(&x.to_le_bytes());
            }
            data[0] = if x & 1 == 0 { 0x45 } else { 0x60 };
            fuzz_packet(&data[..(x % 97) as usize]);
        }
    }

    /// Inputs that once broke something, or might: each file is one frame. What is read lies within the bytes, so more
    /// of them behind the end change nothing.
    #[test]
    fn replayed() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/replayed/packet");
        let mut count = 0;
        for file in std::fs::read_dir(dir).unwrap() {
            let path = file.unwrap().path();
            let data = std::fs::read(&path).unwrap();
            for start in [0, 14, 18, 22].into_iter().filter(|s| *s <= data.len()) {
                fuzz_packet(&data[start..]);
                if let Ok(packet) = parse(&data[..], start as u32) {
                    let mut longer = data.clone();
                    longer.extend_from_slice(&[0xa5; 64]);
                    assert_eq!(parse(&longer[..], start as u32), Ok(packet), "{}", path.display());
                }
            }
            count += 1;
        }
        assert!(count >= 20, "{count} inputs in {dir}");
    }

    #[test]
    fn vlan_tags_are_unwrapped_up_to_the_bound() {
        let mut frame = std::vec![0u8; 12];
        frame.extend_from_slice(&[0x88, 0xa8, 0, 1, 0x81, 0, 0, 2, 0x86, 0xdd]);
        assert_eq!(ethernet(&frame[..]), Some(22));
        let mut three = std::vec![0u8; 12];
        three.extend_from_slice(&[0x81, 0, 0, 1, 0x81, 0, 0, 1, 0x81, 0, 0, 2, 0x86, 0xdd]);
        assert_eq!(ethernet(&three[..]), None);
        assert_eq!(ethernet(&[0u8; 14][..]), None);
    }
}
