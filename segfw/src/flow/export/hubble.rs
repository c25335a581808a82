//! Hubble's flows, in the envelope of its exporter (`{"flow": …, "node_name": …, "time": …}`) and in the JSON of its
//! protocol buffers: names in snake case, 64-bit numbers as text. So readers and policy generators that exist work.

use crate::flow::Coded;
use crate::flow::record::{End, Icmp, Item, Kind, Loss, LostIn, Protocol, Record};
use segfw_common::event::EventKind;
use segfw_common::rule::ipproto;
use segfw_common::{Direction, Reason, Verdict};
use serde_json::{Map, Value, json};

/// `flow.DropReason`: no rule allowed it.
const POLICY_DENIED: (u32, &str) = (133, "POLICY_DENIED");
/// A rule denied it.
const POLICY_DENY: (u32, &str) = (181, "POLICY_DENY");
/// `monitor api.MessageType*`: which kind of event a flow was made from.
const EVENT_DROP: u32 = 1;
const EVENT_TRACE: u32 = 4;
const EVENT_POLICY_VERDICT: u32 = 5;

/// One line of the exporter, without its end.
pub fn line(item: &Item) -> Value {
    match item {
        Item::Flow(record) => json!({
            "flow": flow(record),
            "node_name": record.host,
            "time": record.time,
        }),
        Item::Lost(loss) => json!({
            "lost_events": lost(loss),
            "node_name": loss.host,
            "time": loss.time,
        }),
    }
}

/// FORWARDED, DROPPED, AUDIT.
fn verdict(verdict: Coded<Verdict>) -> &'static str {
    match verdict {
        Coded::Known(Verdict::Allowed) => "FORWARDED",
        Coded::Known(Verdict::Denied) => "DROPPED",
        Coded::Known(Verdict::Audit) => "AUDIT",
        Coded::Unknown(_) => "VERDICT_UNKNOWN",
    }
}

fn flow(record: &Record) -> Value {
    let mut flow = Map::new();
    let mut put = |key: &str, value: Value| drop(flow.insert(key.to_owned(), value));
    put("time", json!(record.time));
    if let Some(uid) = super::uid(record) {
        put("uuid", json!(uid));
    }
    put("emitter", json!({"name": "segfw", "version": env!("CARGO_PKG_VERSION")}));
    put("verdict", json!(verdict(record.verdict)));
    let denied = record.verdict == Verdict::Denied.into();
    if denied {
        // A rule that denies, against nothing that allows.
        let (number, word) = if record.reason == Reason::Rule.into() { POLICY_DENY } else { POLICY_DENIED };
        put("drop_reason", json!(number));
        put("drop_reason_desc", json!(word));
    }
    if let Some(ip) = ip(record) {
        put("IP", ip);
    }
    if let Some(l4) = l4(record) {
        put("l4", l4);
    }
    put("source", endpoint(record, &record.source, record.direction == Direction::Egress.into()));
    put("destination", endpoint(record, &record.destination, record.direction == Direction::Ingress.into()));
    put("Type", json!("L3_L4"));
    put("node_name", json!(record.host));
    let closed = record.kind == Coded::Known(Kind::Event(EventKind::Close));
    let event = if denied { EVENT_DROP } else { EVENT_POLICY_VERDICT };
    put("event_type", json!({"type": if closed { EVENT_TRACE } else { event }}));
    match record.direction {
        Coded::Known(Direction::Ingress) => put("traffic_direction", json!("INGRESS")),
        Coded::Known(Direction::Egress) => put("traffic_direction", json!("EGRESS")),
        Coded::Unknown(_) => {}
    }
    put("is_reply", json!(false));
    if let Some((key, value)) = policy(record) {
        put(key, value);
    }
    put("Summary", json!(summary(record)));
    Value::Object(flow)
}

fn ip(record: &Record) -> Option<Value> {
    let (source, destination) = (record.source.ip, record.destination.ip);
    let version = match source.or(destination)? {
        std::net::IpAddr::V4(_) => "IPv4",
        std::net::IpAddr::V6(_) => "IPv6",
    };
    let text = |ip: Option<std::net::IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
    Some(json!({"source": text(source), "destination": text(destination), "ipVersion": version}))
}

fn l4(record: &Record) -> Option<Value> {
    let (source, destination) = (record.source.port.unwrap_or(0), record.destination.port.unwrap_or(0));
    let ports = json!({"source_port": source, "destination_port": destination});
    let icmp = |icmp: Option<Icmp>| icmp.map(|Icmp { kind, code }| json!({"type": kind, "code": code}));
    match record.protocol {
        Protocol(ipproto::TCP | ipproto::MPTCP) => {
            let mut tcp = ports;
            let flag = match record.kind {
                Coded::Known(Kind::Event(EventKind::New | EventKind::Reject)) => Some("SYN"),
                Coded::Known(Kind::Event(EventKind::Close)) => Some("FIN"),
                Coded::Known(Kind::Event(EventKind::Socket | EventKind::Revoked) | Kind::Denials)
                | Coded::Unknown(_) => None,
            };
            if let Some(flag) = flag {
                tcp["flags"] = json!({flag: true});
            }
            Some(json!({"TCP": tcp}))
        }
        Protocol(ipproto::UDP) => Some(json!({"UDP": ports})),
        Protocol(ipproto::SCTP) => Some(json!({"SCTP": ports})),
        Protocol(ipproto::ICMP) => Some(json!({"ICMPv4": icmp(record.icmp)?})),
        Protocol(ipproto::ICMPV6) => Some(json!({"ICMPv6": icmp(record.icmp)?})),
        // Hubble has no others.
        Protocol(_) => None,
    }
}

/// Labels have a source in front, as Cilium's: `reserved:world`, `segfw:app=web`.
fn endpoint(record: &Record, end: &End, local: bool) -> Value {
    let labels: Vec<String> = match &end.labels {
        Some(labels) => labels.iter().map(|(key, value)| format!("segfw:{key}={value}")).collect(),
        None if end.identity < segfw_common::Identity::FIRST_DYNAMIC => vec![format!("reserved:{}", *end.name)],
        None => vec![format!("cidr:{}", *end.name)],
    };
    let mut endpoint = json!({"identity": end.identity, "labels": labels});
    if let Some(workload) = record.workload.as_ref().filter(|_| local) {
        endpoint["workloads"] = json!([{"name": workload, "kind": "Workload"}]);
    }
    endpoint
}

/// Which rule said so, for which direction.
fn policy(record: &Record) -> Option<(&'static str, Value)> {
    let (Some(policy), Some(rule)) = super::decider(record) else { return None };
    let key = match (record.direction, record.verdict) {
        (Coded::Known(Direction::Ingress), Coded::Known(Verdict::Allowed)) => "ingress_allowed_by",
        (Coded::Known(Direction::Egress), Coded::Known(Verdict::Allowed)) => "egress_allowed_by",
        (Coded::Known(Direction::Ingress), Coded::Known(Verdict::Denied | Verdict::Audit)) => "ingress_denied_by",
        (Coded::Known(Direction::Egress), Coded::Known(Verdict::Denied | Verdict::Audit)) => "egress_denied_by",
        (Coded::Unknown(_), _) | (_, Coded::Unknown(_)) => return None,
    };
    let mut by = json!({"name": policy, "labels": [format!("segfw:rule={}", **rule)], "kind": "Policy"});
    if let Some(revision) = record.revision {
        by["revision"] = json!(revision.to_string());
    }
    Some((key, json!([by])))
}

/// What Hubble has no field for.
fn summary(record: &Record) -> String {
    let mut words = vec![record.kind.to_string(), record.reason.to_string()];
    words.extend(record.count.map(|count| format!("count={count}")));
    words.extend(record.pending.as_ref().map(|p| format!("pending={}", p.verdict)));
    words.extend(record.process.as_ref().map(|p| format!("process={p}")));
    words.extend(record.pid.map(|pid| format!("pid={pid}")));
    words.join(" ")
}

fn lost(loss: &Loss) -> Value {
    let source = match loss.lost_in {
        LostIn::RingBuffer | LostIn::Agent => "PERF_EVENT_RING_BUFFER",
        LostIn::Reader => "HUBBLE_RING_BUFFER",
        LostIn::Spool => "OBSERVER_EVENTS_QUEUE",
    };
    let mut lost = json!({"source": source, "num_events_lost": loss.lost.to_string()});
    if let Some(cpu) = loss.cpu {
        lost["cpu"] = json!(cpu);
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::export::tests::golden;

    #[test]
    fn every_kind() {
        golden(line, "src/flow/export/hubble.jsonl");
    }
}
