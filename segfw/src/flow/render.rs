//! Records as text. Every function returns a string with ANSI styles; whoever prints takes them out where they do not
//! belong. Text that came from outside (process names, labels) is cleaned of control characters first.

use super::coded::Coded;
use super::export::{hubble, ocsf};
use super::record::{End, Icmp, Item, Loss, LostIn, Pending, Record, Traffic};
use anstyle::{AnsiColor, Style};
use jiff::Timestamp;
use segfw_common::Verdict;
use std::fmt::Write as _;

/// Passed.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// Refused, broken.
pub const BAD: Style = AnsiColor::Red.on_default().bold();
/// To be looked at.
pub const WARN: Style = AnsiColor::Yellow.on_default();
/// Headings.
pub const HEAD: Style = Style::new().bold();
/// Of less weight.
pub const DIM: Style = Style::new().dimmed();
/// No style.
pub const PLAIN: Style = Style::new();

/// The output formats of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// One line per record, for reading.
    #[default]
    Compact,
    /// Aligned columns.
    Table,
    /// One JSON object per line, for programs.
    Json,
    /// Hubble's JSON, as its exporter writes it; one object per line.
    Jsonpb,
    /// OCSF network activity (class 4001); one object per line.
    Ocsf,
}

/// Text from outside, safe to show in a terminal: control and bidirectional characters are escaped.
pub fn clean(text: &str) -> String {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if hidden(c) { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

/// `text` in `style`, cleaned.
pub fn paint(style: Style, text: &str) -> String {
    format!("{style}{}{style:#}", clean(text))
}

/// The style of a verdict.
pub fn verdict_style(verdict: Coded<Verdict>) -> Style {
    match verdict {
        Coded::Known(Verdict::Allowed) => GOOD,
        Coded::Known(Verdict::Denied) => BAD,
        Coded::Known(Verdict::Audit) | Coded::Unknown(_) => WARN,
    }
}

/// UTC with milliseconds: the same on every host, and sortable.
pub fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// One cell of a table.
pub type Cell = (Style, String);

/// Aligned columns whose widths only grow, so that it can also show a stream.
#[derive(Debug, Default)]
pub struct Columns {
    widths: Vec<usize>,
}

impl Columns {
    /// Begins with a line of headings.
    pub fn with_head(&mut self, head: &[&str], rows: &[Vec<Cell>]) -> String {
        let cells: Vec<Cell> = head.iter().map(|h| (HEAD, (*h).to_owned())).collect();
        self.widen(&cells);
        rows.iter().for_each(|row| self.widen(row));
        let mut out = self.row(&cells);
        rows.iter().for_each(|row| out.push_str(&self.row(row)));
        out
    }

    fn widen(&mut self, row: &[Cell]) {
        self.widths.resize(self.widths.len().max(row.len()), 0);
        for (width, (_, text)) in self.widths.iter_mut().zip(row) {
            *width = (*width).max(clean(text).chars().count());
        }
    }

    /// One line, with its end.
    pub fn row(&mut self, row: &[Cell]) -> String {
        self.widen(row);
        // Nothing behind the last cell that has text.
        let used = row.iter().rposition(|(_, text)| !text.is_empty()).map_or(0, |i| i + 1);
        let mut out = String::new();
        for (i, ((style, text), width)) in row.iter().zip(&self.widths).enumerate().take(used) {
            let text = clean(text);
            let pad = if i + 1 == used { 0 } else { width - text.chars().count() + 2 };
            let _ = write!(out, "{style}{text}{style:#}{:pad$}", "");
        }
        out.push('\n');
        out
    }
}

/// The headings of the table of records.
pub const HEADINGS: [&str; 9] =
    ["TIME", "KIND", "DIRECTION", "SOURCE", "DESTINATION", "PROTOCOL", "VERDICT", "BY", "PROCESS"];

/// Shows a stream of items in one format.
#[derive(Debug)]
pub struct Renderer {
    format: Format,
    columns: Columns,
    begun: bool,
}

impl Renderer {
    /// Begins.
    pub fn new(format: Format) -> Self {
        Self { format, columns: Columns::default(), begun: false }
    }

    /// Lines for a batch of items; a table is aligned over the batch.
    pub fn items<'a>(&mut self, items: impl IntoIterator<Item = &'a Item>) -> String {
        let items: Vec<&Item> = items.into_iter().collect();
        match self.format {
            Format::Compact => items.iter().map(|i| compact(i)).collect(),
            Format::Json => items.iter().map(|i| json(i)).collect(),
            Format::Jsonpb => items.iter().map(|i| format!("{}\n", hubble::line(i))).collect(),
            Format::Ocsf => items.iter().map(|i| format!("{}\n", ocsf::event(i))).collect(),
            Format::Table => {
                let rows: Vec<_> = items.iter().map(|i| row(i)).collect();
                if self.begun {
                    rows.iter().for_each(|r| self.columns.widen(r));
                    return rows.iter().map(|r| self.columns.row(r)).collect();
                }
                self.begun = true;
                self.columns.with_head(&HEADINGS, &rows)
            }
        }
    }
}

/// One JSON line.
pub fn json(item: &Item) -> String {
    // Plain structs with text keys: serde_json has nothing to refuse here.
    serde_json::to_string(item).map(|line| line + "\n").unwrap_or_default()
}

fn address(end: &End) -> String {
    match (end.ip, end.port) {
        (Some(ip), Some(port)) => std::net::SocketAddr::new(ip, port).to_string(),
        (Some(ip), None) => ip.to_string(),
        (None, Some(port)) => format!(":{port}"),
        (None, None) => String::new(),
    }
}

fn end(e: &End) -> String {
    let address = address(e);
    if address.is_empty() { e.name.to_string() } else { format!("{} ({address})", *e.name) }
}

fn protocol(record: &Record) -> String {
    if let Some(family) = &record.family {
        return format!("{} socket", **family);
    }
    match (record.icmp, &record.socket_type) {
        (Some(Icmp { kind, code }), _) => format!("{} {kind}/{code}", record.protocol),
        (None, Some(socket)) => format!("{} {} socket", record.protocol, **socket),
        (None, None) => record.protocol.to_string(),
    }
}

/// Who gave the verdict: `policy/rule`, or the reason where it is not a rule's alone.
fn by(record: &Record) -> String {
    let rule = match (&record.policy, &record.rule) {
        (Some(policy), Some(rule)) => format!("{}/{}", **policy, **rule),
        (None, Some(rule)) => rule.to_string(),
        (_, None) => String::new(),
    };
    let reason = record.reason.to_string();
    let mut by = match (rule.is_empty(), reason == "rule") {
        (true, _) => reason,
        (false, true) => rule,
        (false, false) => format!("{reason} {rule}"),
    };
    if let Some(revision) = record.revision {
        let _ = write!(by, " r{revision}");
    }
    by
}

fn process(record: &Record) -> String {
    let name = record.process.as_deref().unwrap_or_default();
    match (record.pid, &record.workload) {
        (Some(pid), Some(workload)) => format!("{name}[{pid}] {}", **workload),
        (Some(pid), None) => format!("{name}[{pid}]"),
        (None, Some(workload)) => workload.to_string(),
        (None, None) => name.to_owned(),
    }
}

fn verdict(record: &Record) -> String {
    match (record.rejected, record.count) {
        (_, Some(count)) => format!("{} x{count}", record.verdict),
        (true, None) => format!("{} (rejected)", record.verdict),
        (false, None) => record.verdict.to_string(),
    }
}

fn lost(loss: &Loss) -> String {
    let what = match loss.lost_in {
        LostIn::RingBuffer => "lost in the kernel's ring buffer",
        LostIn::Reader => "lost by this reader, it was too slow",
        LostIn::Spool => "not written to disk",
        LostIn::Agent => "not written down before one agent ended and the next began",
    };
    let mut text = format!("{} RECORDS {what}", loss.lost);
    if loss.denials != 0 {
        let _ = write!(text, ", and sums of {} denials", loss.denials);
    }
    if let (Some(after), Some(before)) = (loss.after, loss.before) {
        let _ = write!(text, ", between {} and {}", time(after), time(before));
    }
    if let Some(cpu) = loss.cpu {
        let _ = write!(text, " on CPU {cpu}");
    }
    text
}

fn row(item: &Item) -> Vec<Cell> {
    let record = match item {
        Item::Flow(record) => record,
        // The text stands in the last column: it must not widen another one.
        Item::Lost(loss) => {
            let mut row = vec![(DIM, time(loss.time)), (WARN, "lost".to_owned())];
            row.resize(HEADINGS.len() - 1, (PLAIN, String::new()));
            row.push((WARN, lost(loss)));
            return row;
        }
    };
    let pending = record.pending.as_ref().map(|p| format!(" (pending {})", p.verdict)).unwrap_or_default();
    vec![
        (DIM, time(record.time)),
        (PLAIN, record.kind.to_string()),
        (PLAIN, record.direction.to_string()),
        (PLAIN, end(&record.source)),
        (PLAIN, end(&record.destination)),
        (PLAIN, protocol(record)),
        (verdict_style(record.verdict), verdict(record) + &pending),
        (PLAIN, by(record)),
        (PLAIN, process(record)),
    ]
}

fn compact(item: &Item) -> String {
    let record = match item {
        Item::Flow(record) => record,
        Item::Lost(loss) => {
            return format!("{} {}\n", paint(DIM, &time(loss.time)), paint(WARN, &lost(loss)));
        }
    };
    let mut line = format!(
        "{} {} {} -> {} {} {} {} {}",
        paint(DIM, &time(record.time)),
        clean(&record.host),
        clean(&end(&record.source)),
        clean(&end(&record.destination)),
        clean(&protocol(record)),
        record.direction,
        paint(verdict_style(record.verdict), &verdict(record)),
        clean(&by(record)),
    );
    if record.kind.to_string() != "new" && record.count.is_none() {
        let _ = write!(line, " {}", record.kind);
    }
    if let Some(Pending { verdict, rule, policy }) = &record.pending {
        let by = [policy, rule].into_iter().flatten().map(|t| clean(t)).collect::<Vec<_>>().join("/");
        let _ = write!(line, " pending={} {by}", paint(verdict_style(*verdict), &verdict.to_string()));
        line.truncate(line.trim_end().len());
    }
    if let Some(Traffic { bytes_sent, bytes_received, retransmits, rtt_us, duration_ms, .. }) = record.traffic {
        let _ = write!(line, " sent={bytes_sent} received={bytes_received} ms={duration_ms} rtt_us={rtt_us}");
        if retransmits != 0 {
            let _ = write!(line, " retransmits={retransmits}");
        }
    }
    if let Some(evidence) = record.source.evidence.or(record.destination.evidence) {
        let _ = write!(line, " evidence={evidence}");
    }
    let process = process(record);
    if !process.is_empty() {
        let _ = write!(line, " {}", paint(DIM, &process));
    }
    line.push('\n');
    line
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::flow::record::tests as fixed;
    use crate::flow::record::{enrich, loss};
    use crate::flow::sequence::Gap;
    use expect_test::{Expect, expect};
    use segfw_common::event::EventKind;
    use segfw_common::rule::ipproto;
    use segfw_common::{Addr, Direction, FlowEvent, Reason};

    /// One of each kind.
    pub(crate) fn items() -> Vec<Item> {
        let names = fixed::names();
        let event = fixed::event();
        let close = FlowEvent {
            kind: EventKind::Close as u8,
            bytes_sent: 1_234,
            bytes_received: 56,
            duration: 12_345_678,
            retransmits: 2,
            rtt_us: 180,
            ..event
        };
        let mut comm = [0; 16];
        comm[..8].copy_from_slice(b"\x1b[2Jcurl");
        let out = FlowEvent {
            direction: Direction::Egress as u8,
            remote_addr: Addr::v6([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
            remote: 2,
            remote_port: 443,
            local_port: 0,
            evidence: 0,
            verdict: Verdict::Denied as u8,
            reason: Reason::SegmentDefault as u8,
            rule: 0,
            reject: 1,
            cgroup: 99,
            comm,
            ..event
        };
        let audit = FlowEvent { verdict: Verdict::Audit as u8, pending: 2, pending_rule: 2, generation: 4, ..event };
        let ping = FlowEvent { protocol: ipproto::ICMP, local_port: 8 << 8, remote_port: 0, pid: 0, ..event };
        let raw = FlowEvent {
            kind: EventKind::Socket as u8,
            socket_type: 3,
            local_addr: Addr::UNSPECIFIED,
            remote_addr: Addr::UNSPECIFIED,
            direction: Direction::Egress as u8,
            verdict: Verdict::Denied as u8,
            reason: Reason::ProtocolNotGranted as u8,
            rule: 0,
            remote: 0,
            protocol: 255,
            ..event
        };
        let gap = Gap { cpu: 1, lost: 17, after: event.time, before: event.time + 1_000_000, agents: false };
        let mut items: Vec<_> =
            [event, close, out, audit, ping, raw].iter().map(|e| Item::Flow(Box::new(enrich(e, &names)))).collect();
        items.push(Item::Flow(Box::new(fixed::denials())));
        items.push(Item::Lost(loss(&gap, &names)));
        items
    }

    fn check(format: Format, want: Expect) -> String {
        let text = Renderer::new(format).items(&items());
        want.assert_eq(&anstream::adapter::strip_str(&text).to_string());
        text
    }

    #[test]
    fn table() {
        let _ = check(
            Format::Table,
            expect![[r#"
            TIME                      KIND     DIRECTION  SOURCE                             DESTINATION                           PROTOCOL           VERDICT                 BY                                PROCESS
            2026-11-21T20:59:39.123Z  new      ingress    app=web,tier=api (10.0.0.5:43210)  app=payments,tier=db (10.0.0.9:5432)  tcp                ALLOWED                 payments-db-access/api-to-db r41  postgres[812] postgres
            2026-11-21T20:59:39.123Z  close    ingress    app=web,tier=api (10.0.0.5:43210)  app=payments,tier=db (10.0.0.9:5432)  tcp                ALLOWED                 payments-db-access/api-to-db r41  postgres[812] postgres
            2026-11-21T20:59:39.123Z  new      egress     app=payments,tier=db (10.0.0.9)    world ([2001:db8::1]:443)             tcp                DENIED (rejected)       segment-default r41               \u{1b}[2Jcurl[812]
            2026-11-21T20:59:39.123Z  new      ingress    app=web,tier=api (10.0.0.5:43210)  app=payments,tier=db (10.0.0.9:5432)  tcp                AUDIT (pending DENIED)  payments-db-access/api-to-db      postgres[812] postgres
            2026-11-21T20:59:39.123Z  new      ingress    app=web,tier=api (10.0.0.5)        app=payments,tier=db (10.0.0.9)       icmp 8/0           ALLOWED                 payments-db-access/api-to-db r41  postgres
            2026-11-21T20:59:39.123Z  socket   egress     app=payments,tier=db               unresolved                            ip-255 raw socket  DENIED                  protocol-not-granted r41          postgres[812] postgres
            2026-11-21T20:59:40.000Z  denials  ingress    203.0.113.0/24                     app=payments,tier=db (:5432)          tcp                DENIED x1200            payments-db-access/no-vendor r41
            2026-11-21T20:59:39.124Z  lost                                                                                                                                                                      17 RECORDS lost in the kernel's ring buffer, between 2026-11-21T20:59:39.123Z and 2026-11-21T20:59:39.124Z on CPU 1
        "#]],
        );
    }

    #[test]
    fn compact() {
        let _ = check(
            Format::Compact,
            expect![[r#"
            2026-11-21T20:59:39.123Z node-1 app=web,tier=api (10.0.0.5:43210) -> app=payments,tier=db (10.0.0.9:5432) tcp ingress ALLOWED payments-db-access/api-to-db r41 evidence=origin postgres[812] postgres
            2026-11-21T20:59:39.123Z node-1 app=web,tier=api (10.0.0.5:43210) -> app=payments,tier=db (10.0.0.9:5432) tcp ingress ALLOWED payments-db-access/api-to-db r41 close sent=1234 received=56 ms=12 rtt_us=180 retransmits=2 evidence=origin postgres[812] postgres
            2026-11-21T20:59:39.123Z node-1 app=payments,tier=db (10.0.0.9) -> world ([2001:db8::1]:443) tcp egress DENIED (rejected) segment-default r41 evidence=none \u{1b}[2Jcurl[812]
            2026-11-21T20:59:39.123Z node-1 app=web,tier=api (10.0.0.5:43210) -> app=payments,tier=db (10.0.0.9:5432) tcp ingress AUDIT payments-db-access/api-to-db pending=DENIED payments-db-access/no-vendor evidence=origin postgres[812] postgres
            2026-11-21T20:59:39.123Z node-1 app=web,tier=api (10.0.0.5) -> app=payments,tier=db (10.0.0.9) icmp 8/0 ingress ALLOWED payments-db-access/api-to-db r41 evidence=origin postgres
            2026-11-21T20:59:39.123Z node-1 app=payments,tier=db -> unresolved ip-255 raw socket egress DENIED protocol-not-granted r41 socket postgres[812] postgres
            2026-11-21T20:59:40.000Z node-1 203.0.113.0/24 -> app=payments,tier=db (:5432) tcp ingress DENIED x1200 payments-db-access/no-vendor r41
            2026-11-21T20:59:39.124Z 17 RECORDS lost in the kernel's ring buffer, between 2026-11-21T20:59:39.123Z and 2026-11-21T20:59:39.124Z on CPU 1
        "#]],
        );
    }

    #[test]
    fn compact_in_colour() {
        let text = Renderer::new(Format::Compact).items(&items()[2..4]);
        expect![[r#"
            ^[2m2026-11-21T20:59:39.123Z^[0m node-1 app=payments,tier=db (10.0.0.9) -> world ([2001:db8::1]:443) tcp egress ^[1m^[31mDENIED (rejected)^[0m segment-default r41 evidence=none ^[2m\u{1b}[2Jcurl[812]^[0m
            ^[2m2026-11-21T20:59:39.123Z^[0m node-1 app=web,tier=api (10.0.0.5:43210) -> app=payments,tier=db (10.0.0.9:5432) tcp ingress ^[33mAUDIT^[0m payments-db-access/api-to-db pending=^[1m^[31mDENIED^[0m payments-db-access/no-vendor evidence=origin ^[2mpostgres[812] postgres^[0m
        "#]].assert_eq(&text.replace('\x1b', "^"));
    }

    #[test]
    fn json_is_one_object_per_line() {
        let text = check(
            Format::Json,
            expect![[r#"
            {"time":"2026-11-21T20:59:39.123456789Z","host":"node-1","kind":"new","direction":"ingress","verdict":"ALLOWED","reason":"rule","source":{"ip":"10.0.0.5","port":43210,"identity":256,"name":"app=web,tier=api","labels":{"app":"web","tier":"api"},"segments":["payments-api"],"evidence":"origin"},"destination":{"ip":"10.0.0.9","port":5432,"identity":257,"name":"app=payments,tier=db","labels":{"app":"payments","tier":"db"},"segments":["payments-db"]},"protocol":"tcp","rule":"api-to-db","policy":"payments-db-access","revision":41,"generation":3,"pid":812,"process":"postgres","workload":"postgres","cgroup":"/system.slice/postgresql.service","netns":1,"hook":"cgroup_skb/ingress","cpu":0,"sequence":17}
            {"time":"2026-11-21T20:59:39.123456789Z","host":"node-1","kind":"close","direction":"ingress","verdict":"ALLOWED","reason":"rule","source":{"ip":"10.0.0.5","port":43210,"identity":256,"name":"app=web,tier=api","labels":{"app":"web","tier":"api"},"segments":["payments-api"],"evidence":"origin"},"destination":{"ip":"10.0.0.9","port":5432,"identity":257,"name":"app=payments,tier=db","labels":{"app":"payments","tier":"db"},"segments":["payments-db"]},"protocol":"tcp","rule":"api-to-db","policy":"payments-db-access","revision":41,"generation":3,"pid":812,"process":"postgres","workload":"postgres","cgroup":"/system.slice/postgresql.service","netns":1,"hook":"cgroup_skb/ingress","bytes_sent":1234,"bytes_received":56,"segments_sent":0,"segments_received":0,"retransmits":2,"rtt_us":180,"duration_ms":12,"cpu":0,"sequence":17}
            {"time":"2026-11-21T20:59:39.123456789Z","host":"node-1","kind":"new","direction":"egress","verdict":"DENIED","reason":"segment-default","rejected":true,"source":{"ip":"10.0.0.9","identity":257,"name":"app=payments,tier=db","labels":{"app":"payments","tier":"db"},"segments":["payments-db"]},"destination":{"ip":"2001:db8::1","port":443,"identity":2,"name":"world","evidence":"none"},"protocol":"tcp","revision":41,"generation":3,"pid":812,"process":"\u001b[2Jcurl","cgroup":"id:99","netns":1,"hook":"cgroup_skb/ingress","cpu":0,"sequence":17}
            {"time":"2026-11-21T20:59:39.123456789Z","host":"node-1","kind":"new","direction":"ingress","verdict":"AUDIT","reason":"rule","source":{"ip":"10.0.0.5","port":43210,"identity":256,"name":"app=web,tier=api","labels":{"app":"web","tier":"api"},"segments":["payments-api"],"evidence":"origin"},"destination":{"ip":"10.0.0.9","port":5432,"identity":257,"name":"app=payments,tier=db","labels":{"app":"payments","tier":"db"},"segments":["payments-db"]},"protocol":"tcp","rule":"api-to-db","policy":"payments-db-access","generation":4,"pending":{"verdict":"DENIED","rule":"no-vendor","policy":"payments-db-access"},"pid":812,"process":"postgres","workload":"postgres","cgroup":"/system.slice/postgresql.service","netns":1,"hook":"cgroup_skb/ingress","cpu":0,"sequence":17}
            {"time":"2026-11-21T20:59:39.123456789Z","host":"node-1","kind":"new","direction":"ingress","verdict":"ALLOWED","reason":"rule","source":{"ip":"10.0.0.5","identity":256,"name":"app=web,tier=api","labels":{"app":"web","tier":"api"},"segments":["payments-api"],"evidence":"origin"},"destination":{"ip":"10.0.0.9","identity":257,"name":"app=payments,tier=db","labels":{"app":"payments","tier":"db"},"segments":["payments-db"]},"protocol":"icmp","icmp":{"type":8,"code":0},"rule":"api-to-db","policy":"payments-db-access","revision":41,"generation":3,"process":"postgres","workload":"postgres","cgroup":"/system.slice/postgresql.service","netns":1,"hook":"cgroup_skb/ingress","cpu":0,"sequence":17}
            {"time":"2026-11-21T20:59:39.123456789Z","host":"node-1","kind":"socket","direction":"egress","verdict":"DENIED","reason":"protocol-not-granted","source":{"identity":257,"name":"app=payments,tier=db","labels":{"app":"payments","tier":"db"},"segments":["payments-db"]},"destination":{"identity":0,"name":"unresolved"},"protocol":"ip-255","socket_type":"raw","revision":41,"generation":3,"pid":812,"process":"postgres","workload":"postgres","cgroup":"/system.slice/postgresql.service","netns":1,"hook":"cgroup_skb/ingress","cpu":0,"sequence":17}
            {"time":"2026-11-21T20:59:40Z","host":"node-1","kind":"denials","direction":"ingress","verdict":"DENIED","reason":"rule","source":{"identity":258,"name":"203.0.113.0/24","segments":["vendors"]},"destination":{"port":5432,"identity":257,"name":"app=payments,tier=db","labels":{"app":"payments","tier":"db"},"segments":["payments-db"]},"protocol":"tcp","rule":"no-vendor","policy":"payments-db-access","revision":41,"generation":3,"hook":"cgroup_skb/ingress","count":1200}
            {"time":"2026-11-21T20:59:39.124456789Z","host":"node-1","lost":17,"lost_in":"ring-buffer","cpu":1,"after":"2026-11-21T20:59:39.123456789Z","before":"2026-11-21T20:59:39.124456789Z"}
        "#]],
        );
        assert_eq!(text.lines().count(), items().len());
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn a_table_has_one_head_and_its_columns_only_grow() {
        let mut renderer = Renderer::new(Format::Table);
        let items = items();
        let first = renderer.items(&items[1..2]);
        let second = renderer.items(&items[..1]);
        assert!(first.contains("TIME") && !second.contains("TIME"));
        let column =
            |text: &str| anstream::adapter::strip_str(text.lines().last().unwrap()).to_string().find("app=payments");
        assert_eq!(column(&first), column(&second));
    }

    #[test]
    fn nothing_from_outside_can_move_the_cursor() {
        assert_eq!(clean("a\x1b[2J\r\n\u{202e}é"), "a\\u{1b}[2J\\u{d}\\u{a}\\u{202e}é");
    }
}
