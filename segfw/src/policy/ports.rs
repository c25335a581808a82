//! `tcp/5432`, `udp/6000-6010`, `icmp/echo-request`, `tcp` … to [`PortSpec`].

use super::host_policy::PortSpec;
use super::problem::{Fault, nearest, quote};
use segfw_common::Proto;

/// What may stand in front of the slash.
const PROTOCOLS: [(&str, Proto); 7] = [
    ("tcp", Proto::Tcp),
    ("udp", Proto::Udp),
    ("icmp", Proto::Icmp),
    ("icmpv6", Proto::Icmpv6),
    ("sctp", Proto::Sctp),
    ("udplite", Proto::UdpLite),
    ("dccp", Proto::Dccp),
];

/// IANA, "Internet Control Message Protocol (ICMP) Parameters".
const ICMP_TYPES: [(&str, u8); 11] = [
    ("echo-reply", 0),
    ("destination-unreachable", 3),
    ("source-quench", 4),
    ("redirect", 5),
    ("echo-request", 8),
    ("router-advertisement", 9),
    ("router-solicitation", 10),
    ("time-exceeded", 11),
    ("parameter-problem", 12),
    ("timestamp-request", 13),
    ("timestamp-reply", 14),
];

/// IANA, "Internet Control Message Protocol version 6 (ICMPv6) Parameters".
const ICMPV6_TYPES: [(&str, u8); 15] = [
    ("destination-unreachable", 1),
    ("packet-too-big", 2),
    ("time-exceeded", 3),
    ("parameter-problem", 4),
    ("echo-request", 128),
    ("echo-reply", 129),
    ("multicast-listener-query", 130),
    ("multicast-listener-report", 131),
    ("multicast-listener-done", 132),
    ("router-solicitation", 133),
    ("router-advertisement", 134),
    ("neighbor-solicitation", 135),
    ("neighbor-advertisement", 136),
    ("redirect", 137),
    ("multicast-listener-report-v2", 143),
];

/// One entry of `ports:`.
pub fn parse(text: &str) -> Result<PortSpec, Fault> {
    let (word, rest) = match text.split_once('/') {
        Some((word, rest)) => (word, Some(rest)),
        None => (text, None),
    };
    let Some((_, proto)) = PROTOCOLS.iter().find(|(name, _)| *name == word) else {
        let fault = Fault::new(
            0,
            format!("unknown protocol {}", quote(word)),
            "known: tcp, udp, icmp, icmpv6, sctp, udplite, dccp",
        );
        // A bare number or range is nearly always meant for TCP.
        let digits = rest.is_none() && word.starts_with(|c: char| c.is_ascii_digit());
        return Err(if digits {
            fault.help(format!("a port needs its protocol: tcp/{}", word.chars().take(11).collect::<String>()))
        } else if word == "icmp6" || word == "ipv6-icmp" {
            fault.meant(Some("icmpv6"))
        } else {
            fault.meant(nearest(word, PROTOCOLS.map(|(name, _)| name)))
        });
    };
    let proto = *proto;
    let Some(rest) = rest else { return Ok(PortSpec { proto, first: 0, last: u16::MAX }) };
    let offset = word.len() + 1;
    match proto {
        Proto::Icmp => icmp(proto, rest, offset, &ICMP_TYPES),
        Proto::Icmpv6 => icmp(proto, rest, offset, &ICMPV6_TYPES),
        Proto::Tcp | Proto::Udp | Proto::Sctp | Proto::UdpLite | Proto::Dccp | Proto::Other => {
            let (first, last) = match rest.split_once('-') {
                None => {
                    let port = port(rest, offset)?;
                    (port, port)
                }
                Some((first, last)) => (port(first, offset)?, port(last, offset + first.len() + 1)?),
            };
            if first > last {
                let fault = Fault::new(
                    offset,
                    format!("the port range {first}-{last} is turned round"),
                    "the lower port comes first",
                );
                return Err(fault.help(format!("write {word}/{last}-{first}")));
            }
            Ok(PortSpec { proto, first, last })
        }
    }
}

fn port(text: &str, offset: usize) -> Result<u16, Fault> {
    number(text).filter(|n| *n != 0).ok_or_else(|| {
        let fault = Fault::new(offset, format!("bad port {}", quote(text)), "a port is a number from 1 to 65535");
        if text == "*" { fault.help("all ports of a protocol are its bare name: tcp") } else { fault }
    })
}

/// Decimal digits only: `+5`, ` 5` and `0x5` are mistakes, and so is `05`, which elsewhere means another number.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

fn icmp(proto: Proto, text: &str, offset: usize, names: &[(&str, u8)]) -> Result<PortSpec, Fault> {
    let (kind, code) = match text.split_once('/') {
        Some((kind, code)) => (kind, Some(code)),
        None => (text, None),
    };
    let named = names.iter().find(|(name, _)| *name == kind).map(|(_, n)| *n);
    let Some(number_of_kind) = named.or_else(|| number::<u8>(kind)) else {
        let what = format!("unknown {} type {}", proto.as_str(), quote(kind));
        return Err(Fault::new(offset, what, "a type is a name such as echo-request or a number from 0 to 255")
            .meant(nearest(kind, names.iter().map(|(name, _)| *name))));
    };
    let base = u16::from(number_of_kind) << 8;
    match code {
        None => Ok(PortSpec { proto, first: base, last: base | 255 }),
        Some(code) => match number::<u8>(code) {
            Some(code) => Ok(PortSpec { proto, first: base | u16::from(code), last: base | u16::from(code) }),
            None => {
                let what = format!("bad {} code {}", proto.as_str(), quote(code));
                Err(Fault::new(offset + kind.len() + 1, what, "a code is a number from 0 to 255"))
            }
        },
    }
}

/// As a person would write it.
pub fn show(spec: &PortSpec) -> String {
    let PortSpec { proto, first, last } = *spec;
    let word = proto.as_str();
    if (first, last) == (0, u16::MAX) {
        return word.to_owned();
    }
    let names: &[(&str, u8)] = match proto {
        Proto::Icmp => &ICMP_TYPES,
        Proto::Icmpv6 => &ICMPV6_TYPES,
        Proto::Tcp | Proto::Udp | Proto::Sctp | Proto::UdpLite | Proto::Dccp | Proto::Other => {
            return if first == last { format!("{word}/{first}") } else { format!("{word}/{first}-{last}") };
        }
    };
    let kind = first >> 8;
    let name = names
        .iter()
        .find(|(_, n)| u16::from(*n) == kind)
        .map_or_else(|| kind.to_string(), |(name, _)| (*name).to_owned());
    if first == last { format!("{word}/{name}/{}", first & 255) } else { format!("{word}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good() {
        for (text, proto, first, last) in [
            ("tcp/5432", Proto::Tcp, 5432, 5432),
            ("tcp/6000-6010", Proto::Tcp, 6000, 6010),
            ("tcp/1-65535", Proto::Tcp, 1, 65535),
            ("udp/53", Proto::Udp, 53, 53),
            ("sctp/3868", Proto::Sctp, 3868, 3868),
            ("udplite/7", Proto::UdpLite, 7, 7),
            ("dccp/8-9", Proto::Dccp, 8, 9),
            ("tcp", Proto::Tcp, 0, 65535),
            ("icmp", Proto::Icmp, 0, 65535),
            ("icmp/echo-request", Proto::Icmp, 0x800, 0x8ff),
            ("icmp/3", Proto::Icmp, 0x300, 0x3ff),
            ("icmp/3/1", Proto::Icmp, 0x301, 0x301),
            ("icmp/destination-unreachable/4", Proto::Icmp, 0x304, 0x304),
            ("icmpv6/echo-request", Proto::Icmpv6, 0x8000, 0x80ff),
            ("icmpv6/packet-too-big", Proto::Icmpv6, 0x200, 0x2ff),
        ] {
            let spec = PortSpec { proto, first, last };
            assert_eq!(parse(text), Ok(spec), "{text}");
            assert_eq!(parse(&show(&spec)), Ok(spec), "{text} shown");
        }
    }

    #[test]
    fn bad() {
        for (text, offset, what, help) in [
            ("tpc/5432", 0, r#"unknown protocol "tpc""#, Some(r#"did you mean "tcp"?"#)),
            ("5432", 0, r#"unknown protocol "5432""#, Some("a port needs its protocol: tcp/5432")),
            ("icmp6/1", 0, r#"unknown protocol "icmp6""#, Some(r#"did you mean "icmpv6"?"#)),
            ("TCP/1", 0, r#"unknown protocol "TCP""#, Some(r#"did you mean "tcp"?"#)),
            ("", 0, r#"unknown protocol """#, None),
            ("tcp/", 4, r#"bad port """#, None),
            ("tcp/0", 4, r#"bad port "0""#, None),
            ("tcp/65536", 4, r#"bad port "65536""#, None),
            ("tcp/08", 4, r#"bad port "08""#, None),
            ("tcp/+8", 4, r#"bad port "+8""#, None),
            ("tcp/*", 4, r#"bad port "*""#, Some("all ports of a protocol are its bare name: tcp")),
            ("tcp/80-x", 7, r#"bad port "x""#, None),
            ("tcp/443-80", 4, "the port range 443-80 is turned round", Some("write tcp/80-443")),
            ("icmp/echo-requset", 5, r#"unknown icmp type "echo-requset""#, Some(r#"did you mean "echo-request"?"#)),
            ("icmp/256", 5, r#"unknown icmp type "256""#, None),
            ("icmpv6/3/x", 9, r#"bad icmpv6 code "x""#, None),
        ] {
            let fault = parse(text).unwrap_err();
            assert_eq!((fault.offset, fault.what.as_str(), fault.help.as_deref()), (offset, what, help), "{text}");
        }
    }
}
