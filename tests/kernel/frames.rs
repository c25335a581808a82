//! Ethernet frames by hand. Checksums are left out: no program here looks at them.

use segfw_common::Addr;
use segfw_common::packet::Packet;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

pub(crate) const SYN: u8 = Packet::SYN;
pub(crate) const ACK: u8 = Packet::ACK;

/// An address as text, IPv4 as it is; `raw` keeps an IPv4-mapped address in 16 bytes.
fn octets(text: &str, raw: bool) -> Vec<u8> {
    let addr: Addr = text.parse().expect("an address");
    let all = addr.octets();
    if addr.is_v4() && !raw { all[12..].to_vec() } else { all.to_vec() }
}

pub(crate) fn ethernet(kind: u16, rest: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(rest);
    frame
}

/// Puts VLAN tags between the addresses and the type.
pub(crate) fn tagged(frame: &[u8], tags: &[u16]) -> Vec<u8> {
    let mut out = frame[..12].to_vec();
    for (i, kind) in tags.iter().enumerate() {
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(i as u16 + 5).to_be_bytes());
    }
    out.extend_from_slice(&frame[12..]);
    out
}

pub(crate) fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut out = [from.to_be_bytes(), to.to_be_bytes()].concat();
    out.extend_from_slice(&[0, 0, 0, 9, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    out
}

pub(crate) fn udp(from: u16, to: u16) -> Vec<u8> {
    let mut out = [from.to_be_bytes(), to.to_be_bytes()].concat();
    out.extend_from_slice(&[0, 12, 0, 0]);
    out.extend_from_slice(b"data");
    out
}

/// IPv4 with a fragment field and options (a multiple of 4 bytes).
pub(crate) fn v4_with(from: &str, to: &str, protocol: u8, fragment: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = (20 + options.len() + payload.len()) as u16;
    let mut out = vec![0x45 + options.len() as u8 / 4, 0];
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&[0x12, 0x34]);
    out.extend_from_slice(&fragment.to_be_bytes());
    out.extend_from_slice(&[64, protocol, 0, 0]);
    out.extend_from_slice(&octets(from, false));
    out.extend_from_slice(&octets(to, false));
    out.extend_from_slice(options);
    out.extend_from_slice(payload);
    ethernet(0x0800, &out)
}

pub(crate) fn v4(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    v4_with(from, to, protocol, 0, &[], payload)
}

/// IPv6 with extension headers: (kind, bytes of the header from its second byte on).
pub(crate) fn v6_with(from: &str, to: &str, extensions: &[(u8, &[u8])], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut rest = Vec::new();
    let mut kinds: Vec<u8> = extensions.iter().map(|(kind, _)| *kind).collect();
    kinds.push(protocol);
    for (i, (_, body)) in extensions.iter().enumerate() {
        rest.push(kinds[i + 1]);
        rest.extend_from_slice(body);
    }
    rest.extend_from_slice(payload);
    let mut out = vec![0x60, 0, 0, 0];
    out.extend_from_slice(&(rest.len() as u16).to_be_bytes());
    out.extend_from_slice(&[kinds[0], 64]);
    out.extend_from_slice(&octets(from, true));
    out.extend_from_slice(&octets(to, true));
    out.extend_from_slice(&rest);
    ethernet(0x86dd, &out)
}

pub(crate) fn v6(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    v6_with(from, to, &[], protocol, payload)
}

pub(crate) const HOP_BY_HOP: (u8, &[u8]) = (0, &[0, 1, 4, 0, 0, 0, 0]);
pub(crate) const DESTINATION: (u8, &[u8]) = (60, &[1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
pub(crate) const MOBILITY: (u8, &[u8]) = (135, &[0, 0, 0, 0, 0, 0, 0]);
/// Type 4: segment routing.
pub(crate) const ROUTING: (u8, &[u8]) = (43, &[0, 4, 0, 0, 0, 0, 0]);
pub(crate) const ROUTING_0: (u8, &[u8]) = (43, &[0, 0, 0, 0, 0, 0, 0]);
pub(crate) const FIRST_FRAGMENT: (u8, &[u8]) = (44, &[0, 0, 1, 0, 0, 0, 7]);
pub(crate) const ATOMIC_FRAGMENT: (u8, &[u8]) = (44, &[0, 0, 0, 0, 0, 0, 7]);
pub(crate) const LATER_FRAGMENT: (u8, &[u8]) = (44, &[0, 1, 0x41, 0, 0, 0, 7]);
pub(crate) const AUTHENTICATION: (u8, &[u8]) = (51, &[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]);
