//! Items as lines of JSON, for the spool: byte for byte what serde_json makes of them (a test compares), in a third of the
//! time. A busy agent spends most of its time here.

use super::coded::{Coded, Text, Word};
use super::record::{End, Item, Pending, Protocol, Record, Traffic};
use crate::policy::host_policy::Labels;
use jiff::Timestamp;
use std::io::Write;
use std::net::IpAddr;

/// Writes lines; remembers the second of the last one, since the next is most likely in the same.
#[derive(Debug, Default)]
pub struct Lines {
    second: Option<i64>,
    /// `2026-11-02T09:00:00`.
    date: String,
}

impl Lines {
    /// One item and a line feed.
    pub fn write(&mut self, item: &Item, out: &mut Vec<u8>) {
        match item {
            Item::Flow(record) => self.record(record, out),
            // Rare. Plain structs with text keys: serde_json has nothing to refuse here.
            Item::Lost(loss) => drop(serde_json::to_writer(&mut *out, loss)),
        }
        out.push(b'\n');
    }

    fn record(&mut self, record: &Record, out: &mut Vec<u8>) {
        // In full, so that a new field does not compile until it is written.
        let Record {
            time,
            host,
            kind,
            direction,
            verdict,
            reason,
            rejected,
            source,
            destination,
            protocol,
            icmp,
            socket_type,
            family,
            rule,
            policy,
            revision,
            generation,
            pending,
            pid,
            process,
            workload,
            cgroup,
            netns,
            hook,
            traffic,
            count,
            cpu,
            sequence,
        } = record;
        out.extend_from_slice(b"{\"time\":\"");
        self.time(*time, out);
        out.extend_from_slice(b"\",\"host\":");
        text(host, out);
        word(b",\"kind\":", *kind, out);
        word(b",\"direction\":", *direction, out);
        word(b",\"verdict\":", *verdict, out);
        word(b",\"reason\":", *reason, out);
        if *rejected {
            out.extend_from_slice(b",\"rejected\":true");
        }
        out.extend_from_slice(b",\"source\":");
        end(source, out);
        out.extend_from_slice(b",\"destination\":");
        end(destination, out);
        out.extend_from_slice(b",\"protocol\":\"");
        show_protocol(*protocol, out);
        out.push(b'"');
        if let Some(icmp) = icmp {
            number(b",\"icmp\":{\"type\":", icmp.kind.into(), out);
            number(b",\"code\":", icmp.code.into(), out);
            out.push(b'}');
        }
        named(b",\"socket_type\":", socket_type.as_ref(), out);
        named(b",\"family\":", family.as_ref(), out);
        named(b",\"rule\":", rule.as_ref(), out);
        named(b",\"policy\":", policy.as_ref(), out);
        counted(b",\"revision\":", *revision, out);
        number(b",\"generation\":", (*generation).into(), out);
        if let Some(Pending { verdict, rule, policy }) = pending {
            word(b",\"pending\":{\"verdict\":", *verdict, out);
            named(b",\"rule\":", rule.as_ref(), out);
            named(b",\"policy\":", policy.as_ref(), out);
            out.push(b'}');
        }
        counted(b",\"pid\":", pid.map(u64::from), out);
        if let Some(process) = process {
            out.extend_from_slice(b",\"process\":");
            text(process, out);
        }
        named(b",\"workload\":", workload.as_ref(), out);
        named(b",\"cgroup\":", cgroup.as_ref(), out);
        counted(b",\"netns\":", *netns, out);
        word(b",\"hook\":", *hook, out);
        if let Some(traffic) = traffic {
            let Traffic {
                bytes_sent,
                bytes_received,
                segments_sent,
                segments_received,
                retransmits,
                rtt_us,
                duration_ms,
            } = *traffic;
            number(b",\"bytes_sent\":", bytes_sent, out);
            number(b",\"bytes_received\":", bytes_received, out);
            number(b",\"segments_sent\":", segments_sent.into(), out);
            number(b",\"segments_received\":", segments_received.into(), out);
            number(b",\"retransmits\":", retransmits.into(), out);
            number(b",\"rtt_us\":", rtt_us.into(), out);
            number(b",\"duration_ms\":", duration_ms, out);
        }
        counted(b",\"count\":", *count, out);
        counted(b",\"cpu\":", cpu.map(u64::from), out);
        counted(b",\"sequence\":", *sequence, out);
        out.push(b'}');
    }

    /// As jiff writes it: the fraction without its last zeros.
    fn time(&mut self, time: Timestamp, out: &mut Vec<u8>) {
        let (second, mut fraction) = (time.as_second(), time.subsec_nanosecond());
        if second < 0 || fraction < 0 {
            show(time, out);
            return;
        }
        if self.second != Some(second) {
            let whole = Timestamp::from_second(second).unwrap_or(time).to_string();
            self.date = whole.trim_end_matches('Z').to_owned();
            self.second = Some(second);
        }
        out.extend_from_slice(self.date.as_bytes());
        if fraction != 0 {
            let mut digits = *b".000000000";
            for digit in digits[1..].iter_mut().rev() {
                *digit += (fraction % 10) as u8;
                fraction /= 10;
            }
            let zeros = digits.iter().rev().take_while(|d| **d == b'0').count();
            out.extend_from_slice(&digits[..digits.len() - zeros]);
        }
        out.push(b'Z');
    }
}

fn end(end: &End, out: &mut Vec<u8>) {
    let End { ip, port, identity, name, labels, segments, evidence } = end;
    out.push(b'{');
    if let Some(ip) = ip {
        out.extend_from_slice(b"\"ip\":\"");
        match ip {
            IpAddr::V4(v4) => {
                for (i, octet) in v4.octets().into_iter().enumerate() {
                    digits(if i == 0 { b"" } else { b"." }, octet.into(), out);
                }
            }
            IpAddr::V6(v6) => show(v6, out),
        }
        out.extend_from_slice(b"\",");
    }
    if let Some(port) = port {
        digits(b"\"port\":", (*port).into(), out);
        out.push(b',');
    }
    digits(b"\"identity\":", (*identity).into(), out);
    out.extend_from_slice(b",\"name\":");
    text(name, out);
    if let Some(labels) = labels {
        out.extend_from_slice(b",\"labels\":{");
        let labels: &Labels = labels;
        for (i, (key, value)) in labels.iter().enumerate() {
            if i != 0 {
                out.push(b',');
            }
            text(key, out);
            out.push(b':');
            text(value, out);
        }
        out.push(b'}');
    }
    if !segments.is_empty() {
        out.extend_from_slice(b",\"segments\":[");
        for (i, segment) in segments.iter().enumerate() {
            if i != 0 {
                out.push(b',');
            }
            text(segment, out);
        }
        out.push(b']');
    }
    if let Some(evidence) = evidence {
        word(b",\"evidence\":", *evidence, out);
    }
    out.push(b'}');
}

/// Words of ours need no escape.
fn word<T: Word>(key: &[u8], value: Coded<T>, out: &mut Vec<u8>) {
    out.extend_from_slice(key);
    out.push(b'"');
    match value {
        Coded::Known(value) => out.extend_from_slice(value.word().as_bytes()),
        Coded::Unknown(_) => show(value, out),
    }
    out.push(b'"');
}

fn named(key: &[u8], value: Option<&Text>, out: &mut Vec<u8>) {
    if let Some(value) = value {
        out.extend_from_slice(key);
        text(value, out);
    }
}

fn counted(key: &[u8], value: Option<u64>, out: &mut Vec<u8>) {
    if let Some(value) = value {
        number(key, value, out);
    }
}

fn number(key: &[u8], value: u64, out: &mut Vec<u8>) {
    digits(key, value, out);
}

fn digits(before: &[u8], mut value: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(before);
    // u64::MAX has 20 digits.
    let mut buffer = [0; 20];
    let mut at = buffer.len();
    loop {
        at -= 1;
        buffer[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(&buffer[at..]);
}

fn text(text: &str, out: &mut Vec<u8>) {
    if text.bytes().any(|b| b < b' ' || b == b'"' || b == b'\\') {
        drop(serde_json::to_writer(out, text));
        return;
    }
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
}

fn show_protocol(protocol: Protocol, out: &mut Vec<u8>) {
    match protocol.0 {
        segfw_common::rule::ipproto::TCP => out.extend_from_slice(b"tcp"),
        segfw_common::rule::ipproto::UDP => out.extend_from_slice(b"udp"),
        _ => show(protocol, out),
    }
}

fn show(value: impl std::fmt::Display, out: &mut Vec<u8>) {
    // Writing into memory does not fail.
    let _ = write!(out, "{value}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::decode::EVENT_LEN;
    use crate::flow::record::{enrich, enrich_denials, loss, tests as fixed};
    use crate::flow::sequence::Gap;
    use crate::flow::{Names, decode};
    use proptest::prelude::*;
    use segfw_common::event::{DenialCount, DenialKey};

    /// Numbers with names in half of the cases, and a name that has to be escaped.
    fn names() -> Names {
        let mut names = fixed::names();
        for who in std::sync::Arc::make_mut(&mut names.identities).values_mut() {
            if who.name.len() % 2 == 0 {
                who.name = "a \"quoted\" name\n".into();
            }
        }
        names
    }

    fn check(lines: &mut Lines, item: &Item) {
        let mut got = Vec::new();
        lines.write(item, &mut got);
        let want = serde_json::to_string(item).unwrap() + "\n";
        assert_eq!(String::from_utf8(got).unwrap(), want);
    }

    proptest! {
        #[test]
        fn lines_are_what_serde_makes(
            raw in prop::array::uniform32(any::<u8>()),
            more in prop::collection::vec(any::<u8>(), EVENT_LEN),
            time in any::<u32>(),
            small in any::<bool>(),
        ) {
            let names = names();
            let mut bytes = more;
            bytes[..32].copy_from_slice(&raw);
            let mut event = decode(&bytes).unwrap();
            if small {
                // As the kernel sends them: known codes, identities and rules that have names, a time of this century.
                event.time = u64::from(time) << 20;
                event.kind = 1 + event.kind % 5;
                event.direction %= 2;
                event.verdict = 1 + event.verdict % 3;
                event.protocol %= 64;
                event.pending %= 4;
                event.local = names.identities.keys().nth(event.local as usize % names.identities.len()).copied().unwrap();
                event.remote %= 6;
                event.rule = (0..u32::from(u8::MAX)).find(|n| names.rules.get(*n).is_some()).unwrap_or(0);
            }
            let mut lines = Lines::default();
            check(&mut lines, &Item::Flow(Box::new(enrich(&event, &names))));
            // The same second again, and another.
            event.time = event.time.wrapping_add(1_000);
            check(&mut lines, &Item::Flow(Box::new(enrich(&event, &names))));
            event.time = event.time.wrapping_add(1_500_000_000);
            check(&mut lines, &Item::Flow(Box::new(enrich(&event, &names))));
        }
    }

    #[test]
    fn sums_and_losses_too() {
        let names = names();
        let key = DenialKey {
            local: 257,
            remote: 2,
            rule: 0,
            port: 22,
            protocol: 6,
            direction: 0,
            reason: 2,
            hook: 4,
            reject: 0,
        };
        let mut lines = Lines::default();
        let sum = enrich_denials(&key, &DenialCount { count: 7, last: 9 }, 3, &names);
        check(&mut lines, &Item::Flow(Box::new(sum)));
        let gap = Gap { cpu: 1, lost: 7, after: 1, before: 1_000_000_000, agents: true };
        check(&mut lines, &Item::Lost(loss(&gap, &names)));
    }
}
