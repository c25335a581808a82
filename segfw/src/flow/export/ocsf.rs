//! OCSF Network Activity (class 4001) with the profile `security_control`.

use crate::flow::Coded;
use crate::flow::record::{End, Item, Kind, Loss, LostIn, Protocol, Record};
use segfw_common::event::EventKind;
use segfw_common::{Direction, Verdict};
use serde_json::{Map, Value, json};

/// The schema that these events follow.
pub const VERSION: &str = "1.9.0";
const CLASS: u32 = 4001;

/// One event, without its end.
pub fn event(item: &Item) -> Value {
    match item {
        Item::Flow(record) => activity(record),
        Item::Lost(loss) => lost(loss),
    }
}

/// Number and caption.
type Named = (u32, &'static str);

fn activity_of(record: &Record) -> Named {
    const OPEN: Named = (1, "Open");
    const CLOSE: Named = (2, "Close");
    const RESET: Named = (3, "Reset");
    const REFUSE: Named = (5, "Refuse");
    let denied = record.verdict == Verdict::Denied.into();
    match record.kind {
        Coded::Known(Kind::Event(EventKind::Close)) => CLOSE,
        Coded::Known(Kind::Event(EventKind::Revoked)) if denied => RESET,
        Coded::Known(Kind::Event(_) | Kind::Denials) if denied => REFUSE,
        Coded::Known(Kind::Event(_) | Kind::Denials) => OPEN,
        Coded::Unknown(_) => (99, "Other"),
    }
}

/// Action and disposition. AUDIT: seen, recorded, let through.
fn control(record: &Record) -> (Named, Named) {
    match (record.verdict, record.rejected) {
        (Coded::Known(Verdict::Allowed), _) => ((1, "Allowed"), (1, "Allowed")),
        (Coded::Known(Verdict::Denied), true) => ((2, "Denied"), (25, "Rejected")),
        (Coded::Known(Verdict::Denied), false) => ((2, "Denied"), (2, "Blocked")),
        (Coded::Known(Verdict::Audit), _) => ((3, "Observed"), (17, "Logged")),
        (Coded::Unknown(_), _) => ((0, "Unknown"), (0, "Unknown")),
    }
}

fn severity(record: &Record) -> Named {
    match record.verdict {
        Coded::Known(Verdict::Denied) => (2, "Low"),
        Coded::Known(Verdict::Allowed | Verdict::Audit) => (1, "Informational"),
        Coded::Unknown(_) => (0, "Unknown"),
    }
}

fn metadata(uid: Option<String>) -> Value {
    let mut metadata = json!({
        "version": VERSION,
        "product": {"name": "segfw", "vendor_name": "segfw", "version": env!("CARGO_PKG_VERSION")},
        "profiles": ["security_control"],
    });
    if let Some(uid) = uid {
        metadata["uid"] = json!(uid);
    }
    metadata
}

fn activity(record: &Record) -> Value {
    let (activity, action_disposition, severity) = (activity_of(record), control(record), severity(record));
    let (action, disposition) = action_disposition;
    let uid = super::uid(record);
    let mut event = json!({
        "activity_id": activity.0,
        "activity_name": activity.1,
        "category_uid": 4,
        "category_name": "Network Activity",
        "class_uid": CLASS,
        "class_name": "Network Activity",
        "type_uid": CLASS * 100 + activity.0,
        "type_name": format!("Network Activity: {}", activity.1),
        "severity_id": severity.0,
        "severity": severity.1,
        "time": record.time.as_millisecond(),
        "metadata": metadata(uid),
        "action_id": action.0,
        "action": action.1,
        "disposition_id": disposition.0,
        "disposition": disposition.1,
        "status_detail": record.reason.to_string(),
        "src_endpoint": endpoint(&record.source),
        "dst_endpoint": endpoint(&record.destination),
        "connection_info": connection(record),
        "device": {"hostname": record.host, "type_id": 1, "type": "Server"},
    });
    let mut put = |key: &str, value: Value| event[key] = value;
    match record.direction {
        Coded::Known(Direction::Egress) => put("observation_point_id", json!(1)),
        Coded::Known(Direction::Ingress) => put("observation_point_id", json!(2)),
        Coded::Unknown(_) => put("observation_point_id", json!(0)),
    }
    if let Some(count) = record.count {
        put("count", json!(count));
    }
    if let Some(traffic) = record.traffic {
        // "In" and "out" are of the source, as OCSF has them.
        let (sent, received) = (traffic.bytes_sent, traffic.bytes_received);
        let (out, back) =
            if record.direction == Direction::Ingress.into() { (received, sent) } else { (sent, received) };
        let (sent, received) = (traffic.segments_sent, traffic.segments_received);
        let packets = if record.direction == Direction::Ingress.into() { (received, sent) } else { (sent, received) };
        put(
            "traffic",
            json!({
                "bytes_out": out, "bytes_in": back, "bytes": out.saturating_add(back),
                "packets_out": packets.0, "packets_in": packets.1,
                "packets": u64::from(packets.0) + u64::from(packets.1),
            }),
        );
        put("duration", json!(traffic.duration_ms));
        let start = record.time.as_millisecond().saturating_sub(i64::try_from(traffic.duration_ms).unwrap_or(i64::MAX));
        put("start_time", json!(start));
        put("end_time", json!(record.time.as_millisecond()));
    }
    let (policy, rule) = super::decider(record);
    if let Some(rule) = rule {
        put("firewall_rule", json!({"name": rule, "uid": uid_of(policy.map(|p| &**p), rule)}));
    }
    if let Some(policy) = policy {
        // What is only watched is not applied.
        let applied = record.verdict != Verdict::Audit.into();
        let mut value = json!({"name": policy, "uid": policy, "is_applied": applied});
        if let Some(revision) = record.revision {
            value["version"] = json!(revision.to_string());
        }
        put("policy", value);
    }
    if record.process.is_some() || record.pid.is_some() {
        let mut process = Map::new();
        if let Some(name) = &record.process {
            let _ = process.insert("name".to_owned(), json!(name));
        }
        if let Some(pid) = record.pid {
            let _ = process.insert("pid".to_owned(), json!(pid));
        }
        put("actor", json!({"process": process}));
    }
    put("unmapped", unmapped(record));
    event
}

/// A rule's name is unique in its policy only.
fn uid_of(policy: Option<&String>, rule: &str) -> String {
    policy.map_or_else(|| rule.to_owned(), |policy| format!("{policy}/{rule}"))
}

fn endpoint(end: &End) -> Value {
    let mut endpoint = json!({"name": end.name, "uid": end.identity.to_string()});
    if let Some(ip) = end.ip {
        endpoint["ip"] = json!(ip);
    }
    if let Some(port) = end.port {
        endpoint["port"] = json!(port);
    }
    endpoint
}

fn connection(record: &Record) -> Value {
    let Protocol(number) = record.protocol;
    let (direction, word) = match record.direction {
        Coded::Known(Direction::Ingress) => (1, "Inbound"),
        Coded::Known(Direction::Egress) => (2, "Outbound"),
        Coded::Unknown(_) => (0, "Unknown"),
    };
    let mut info = json!({
        "protocol_num": number,
        "protocol_name": record.protocol.to_string(),
        "direction_id": direction,
        "direction": word,
    });
    if let Some(ip) = record.source.ip.or(record.destination.ip) {
        info["protocol_ver_id"] = json!(if ip.is_ipv4() { 4 } else { 6 });
    }
    info
}

/// Endpoints of this class have no place for labels, nor the event for the shadow answer.
fn unmapped(record: &Record) -> Value {
    let side = |end: &End| {
        let mut side = Map::new();
        if let Some(labels) = &end.labels {
            let _ = side.insert("labels".to_owned(), json!(labels));
        }
        if !end.segments.is_empty() {
            let _ = side.insert("segments".to_owned(), json!(end.segments));
        }
        if let Some(evidence) = end.evidence {
            let _ = side.insert("evidence".to_owned(), json!(evidence));
        }
        Value::Object(side)
    };
    let mut all = json!({
        "kind": record.kind,
        "hook": record.hook,
        "generation": record.generation,
        "source": side(&record.source),
        "destination": side(&record.destination),
    });
    let mut put = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            all[key] = value;
        }
    };
    put("icmp", record.icmp.map(|icmp| json!(icmp)));
    put("socket_type", record.socket_type.as_ref().map(|t| json!(t)));
    put("pending", record.pending.as_ref().map(|p| json!(p)));
    put("workload", record.workload.as_ref().map(|w| json!(w)));
    put("cgroup", record.cgroup.as_ref().map(|c| json!(c)));
    put("netns", record.netns.map(|n| json!(n)));
    put("retransmits", record.traffic.map(|t| json!(t.retransmits)));
    put("rtt_us", record.traffic.map(|t| json!(t.rtt_us)));
    all
}

/// No class is for what is missing: a base event.
fn lost(loss: &Loss) -> Value {
    let place = match loss.lost_in {
        LostIn::RingBuffer => "in the kernel's ring buffer",
        LostIn::Reader => "by this reader",
        LostIn::Spool => "on the way to disk",
        LostIn::Agent => "between two agents",
    };
    json!({
        "activity_id": 99,
        "activity_name": "Records lost",
        "category_uid": 0,
        "class_uid": 0,
        "type_uid": 99,
        "severity_id": 3,
        "severity": "Medium",
        "time": loss.time.as_millisecond(),
        "metadata": metadata(None),
        "count": loss.lost,
        "message": format!("{} flow records were lost {place}; their verdicts stand and are counted", loss.lost),
        "device": {"hostname": loss.host, "type_id": 1, "type": "Server"},
        "unmapped": loss,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::export::tests::golden;

    #[test]
    fn every_kind() {
        golden(event, "src/flow/export/ocsf.jsonl");
    }

    #[test]
    fn every_event_has_what_the_schema_requires() {
        for item in crate::flow::render::tests::items() {
            let event = event(&item);
            for key in ["activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"] {
                assert!(!event[key].is_null(), "{key}: {event}");
            }
            assert_eq!(
                event["type_uid"].as_u64().unwrap(),
                event["class_uid"].as_u64().unwrap() * 100 + event["activity_id"].as_u64().unwrap()
            );
        }
    }
}
