//! The language from outside: text in, problems and host policy out.

use super::host_policy::{Members, OnRevoke, PeerSpec, RuleAction, Tier};
use super::{HostPolicy, HostSettings, Inventory, Problems, digest, fuzz_yaml, parse, resolve, yaml};
use expect_test::{Expect, expect};
use jiff::Timestamp;
use proptest::prelude::*;
use segfw_common::{Evidence, LocalEntry};
use std::time::{Duration, Instant};

fn file(text: &str) -> Vec<(String, String)> {
    vec![("a.yaml".to_owned(), text.to_owned())]
}

fn whole(files: &[(String, String)]) -> (HostPolicy, Problems) {
    let (documents, mut problems) = parse(files);
    let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    let (policy, more) = resolve(&documents, &Inventory::default(), &HostSettings::default(), now);
    problems.extend(more);
    (policy, Problems::new(problems))
}

/// What the parser alone says.
#[track_caller]
fn parsed(text: &str, expect: Expect) {
    expect.assert_eq(&Problems::new(parse(&file(text)).1).to_string());
}

/// What parser and resolver say together.
#[track_caller]
fn resolved(text: &str, expect: Expect) {
    expect.assert_eq(&whole(&file(text)).1.to_string());
}

#[test]
fn unknown_key() {
    parsed(
        r#"a: b
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: web, owenr: x}
spec: {select: {app: web}, whenUnresloved: deny}
"#,
        expect![[r#"
            a.yaml:1:1: error: unknown key "a" (a document has apiVersion, kind, metadata, spec)
            a.yaml:4:23: error: unknown key "owenr" (metadata has name, owner, description, labels)
              help: did you mean "owner"?
            a.yaml:5:28: error: unknown key "whenUnresloved" (the spec of a Segment has select, addresses, default, mode, whenUnresolved, onRevoke, grants, sockets)
              help: did you mean "whenUnresolved"?
        "#]],
    );
}

#[test]
fn every_mistake_of_a_document_at_once() {
    parsed(
        r#"apiVersion: segfw.dev/v2
kind: Segmnet
metadata: {name: -web}
spec: {}
"#,
        expect![[r#"
            a.yaml:1:13: error: unknown apiVersion "segfw.dev/v2" (this program reads one version)
              help: write segfw.dev/v1
            a.yaml:2:7: error: unknown kind "Segmnet" (known: Workload, Segment, Policy, Test)
              help: did you mean "Segment"?
            a.yaml:3:18: error: bad name "-web" (a name has 1 to 63 letters, digits, '-', '_' or '.', and begins and ends with a letter or digit)
        "#]],
    );
}

#[test]
fn wrong_types() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  tier: [application]
  priority: high
  mode: audit
  rules:
    - {from: web, to: {select: {app: x}}, action: alow, ports: tcp/80, log: all}
    - just text
"#,
        expect![[r#"
            a.yaml:5:9: error: tier is a list (expected one of emergency, security, platform, application, baseline)
            a.yaml:6:13: error: bad priority "high" (a priority is a number from 0 to 1000, lower first)
            a.yaml:7:9: error: unknown mode "audit" (known: enforce, monitor)
            a.yaml:9:14: error: from is the text "web" (expected a list such as [web])
              help: write [web]
            a.yaml:9:23: error: to is a map (expected a list such as [web])
            a.yaml:9:51: error: unknown action "alow" (known: allow, deny, reject, pass)
              help: did you mean "allow"?
            a.yaml:9:64: error: ports is the text "tcp/80" (expected a list such as [tcp/443])
              help: write [tcp/80]
            a.yaml:9:77: error: unknown log "all" (known: new, none)
            a.yaml:10:7: error: a rule is the text "just text" (expected a map)
        "#]],
    );
}

#[test]
fn missing_keys() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Policy
metadata: {}
spec:
  rules:
    - {name: r}
"#,
        expect![[r#"
            a.yaml:3:11: error: metadata has no name (it must be there)
            a.yaml:6:7: error: a rule has no action (it must be there)
            a.yaml:6:7: error: a rule has no from (it must be there)
            a.yaml:6:7: error: a rule has no to (it must be there)
        "#]],
    );
}

#[test]
fn duplicate_keys() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: web}
spec:
  select: {app: web, app: db}
  mode: enforce
  mode: monitor
"#,
        expect![[r#"
            a.yaml:5:22: error: duplicate key "app" (it was given in line 5 already)
            a.yaml:7:3: error: duplicate key "mode" (it was given in line 6 already)
        "#]],
    );
}

#[test]
fn ports() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  rules:
    - {from: [any], to: [any], action: deny, ports: [tcp/90-80, tcp/0, tpc/1, "icmp/echo-requets", 443, udp/99999]}
"#,
        expect![[r#"
            a.yaml:6:58: error: the port range 90-80 is turned round (the lower port comes first)
              help: write tcp/80-90
            a.yaml:6:69: error: bad port "0" (a port is a number from 1 to 65535)
            a.yaml:6:72: error: unknown protocol "tpc" (known: tcp, udp, icmp, icmpv6, sctp, udplite, dccp)
              help: did you mean "tcp"?
            a.yaml:6:85: error: unknown icmp type "echo-requets" (a type is a name such as echo-request or a number from 0 to 255)
              help: did you mean "echo-request"?
            a.yaml:6:100: error: unknown protocol "443" (known: tcp, udp, icmp, icmpv6, sctp, udplite, dccp)
              help: a port needs its protocol: tcp/443
            a.yaml:6:109: error: bad port "99999" (a port is a number from 1 to 65535)
        "#]],
    );
}

#[test]
fn prefixes() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: net}
spec:
  addresses: [10.1.2.3/8, 10.0.0.0/33, "2001:db8::1/32", "::ffff:10.0.0.0/104", host.example, 192.0.2.7]
"#,
        expect![[r#"
            a.yaml:5:15: error: the prefix "10.1.2.3/8" has host bits set (it says two things at once)
              help: write 10.0.0.0/8 or 10.1.2.3/32
            a.yaml:5:27: error: bad prefix "10.0.0.0/33" (a prefix reads 203.0.113.0/24 or 2001:db8::/32)
            a.yaml:5:40: error: the prefix "2001:db8::1/32" has host bits set (it says two things at once)
              help: write 2001:db8::/32 or 2001:db8::1/128
            a.yaml:5:58: error: the prefix "::ffff:10.0.0.0/104" is IPv4 in IPv6 clothes (both are one address here)
              help: write 10.0.0.0/8
            a.yaml:5:81: error: bad prefix "host.example" (a prefix reads 203.0.113.0/24 or 2001:db8::/32)
        "#]],
    );
}

#[test]
fn empty_means_nothing() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  rules:
    - {from: [], to: [{select: {}}], ports: [], action: allow}
    - {from: [{}], to: [{select: ""}], ports: , action: allow}
    - {from: [{select: {app: []}}], to: [{addresses: []}], action: allow}
"#,
        expect![[r#"
            a.yaml:6:14: error: from is an empty list (empty never means all)
              help: write [any] for everybody
            a.yaml:6:32: error: empty selector (empty never means all)
              help: write any in a rule for everybody
            a.yaml:6:45: error: ports is an empty list (empty never means all)
              help: leave ports out for every protocol and port
            a.yaml:7:15: error: empty peer (empty never means all: write any)
            a.yaml:7:35: error: empty selector (empty never means all: write any for everybody)
            a.yaml:7:45: error: ports has no value (expected a list such as [tcp/443])
            a.yaml:8:30: error: a list of label values is an empty list (empty never means all)
            a.yaml:8:54: error: addresses is an empty list (empty never means all)
        "#]],
    );
}

#[test]
fn priority_bounds() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec: {priority: 1001, rules: [{from: [any], to: [any], action: deny}]}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: q}
spec: {priority: -1, rules: [{from: [any], to: [any], action: deny}]}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: r}
spec: {priority: 010, rules: [{from: [any], to: [any], action: deny}]}
"#,
        expect![[r#"
            a.yaml:4:18: error: bad priority "1001" (a priority is a number from 0 to 1000, lower first)
            a.yaml:9:18: error: bad priority "-1" (a priority is a number from 0 to 1000, lower first)
            a.yaml:14:18: error: bad priority "010" (a priority is a number from 0 to 1000, lower first)
        "#]],
    );
}

#[test]
fn times() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  rules:
    - {from: [any], to: [any], action: allow, expires: 2026-12-24T18:00:00}
    - {from: [any], to: [any], action: allow, expires: tomorrow}
    - {from: [any], to: [any], action: allow, schedule: "Mon-Fri 08:00-18:00 Europe/Amstredam"}
    - {from: [any], to: [any], action: allow, schedule: Mon-Fry 08:00-18:00 UTC}
    - {from: [any], to: [any], action: allow, schedule: Mon 25:00-26:00 UTC}
"#,
        expect![[r#"
            a.yaml:6:56: error: bad time "2026-12-24T18:00:00" (a time reads 2026-12-24T18:00:00Z or with an offset, +01:00 (RFC 3339))
              help: write 2026-12-24T18:00:00Z if UTC was meant
            a.yaml:7:56: error: bad time "tomorrow" (a time reads 2026-12-24T18:00:00Z or with an offset, +01:00 (RFC 3339))
            a.yaml:8:78: error: unknown time zone "Europe/Amstredam" (a zone has its name in the IANA database)
              help: did you mean "Europe/Amsterdam"?
            a.yaml:9:57: error: unknown day "Fry" (Mon, Tue, Wed, Thu, Fri, Sat, Sun, or daily)
              help: did you mean "Fri"?
            a.yaml:10:61: error: bad time "25:00" (a time reads HH:MM, from 00:00 to 24:00)
        "#]],
    );
}

#[test]
fn selector_columns() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: web}
spec:
  select: "app=payments, tier on (db)"
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: db}
spec:
  select: app=payments, tier in ()
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: esc}
spec:
  select: "app=\x41, !"
"#,
        expect![[r#"
            a.yaml:5:31: error: unknown operator "on" (known: =, ==, !=, in, notin)
              help: did you mean "in"?
            a.yaml:11:33: error: empty list of values (empty never means all)
            a.yaml:17:11: error: expected a label key, found the end (app=web, tier in (db, cache), !legacy)
        "#]],
    );
}

#[test]
fn reserved_names() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: world}
spec: {select: {app: web}}
"#,
        expect![[r#"
            a.yaml:3:18: error: the name "world" is reserved (any, world, host and unresolved have meanings of their own)
        "#]],
    );
}

#[test]
fn duplicate_names() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: web}
spec: {select: {app: web}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: web}
spec: {rules: [{from: [any], to: [web], action: deny}, {name: rule-1, from: [any], to: [web], action: allow}]}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: web}
spec: {select: {app: db}}
"#,
        expect![[r#"
            a.yaml:9:56: error: there are two rules with the name "rule-1" (the first begins in line 9; flows and counters name rules)
            a.yaml:13:18: error: two Segment documents have the name "web" (the first is at a.yaml:3:18)
        "#]],
    );
}

#[test]
fn segments() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: a}
spec: {select: {app: a}, addresses: [10.0.0.0/8]}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: b}
spec: {default: {ingress: allow, ingres: deny}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: c}
spec: {addresses: [10.0.0.0/8], mode: monitor}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: d}
spec: {select: {app: d}, onRevoke: drane, grants: [pign, sctp], whenUnresolved: no}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: e}
spec: {select: {app: e}, onRevoke: {drain: 10 minutes}}
"#,
        expect![[r#"
            a.yaml:4:37: error: a segment has select and addresses (it is a set of workloads or of addresses)
            a.yaml:9:7: error: a segment has no members (it has select or addresses)
            a.yaml:9:34: error: unknown key "ingres" (default has ingress, egress)
              help: did you mean "ingress"?
            a.yaml:14:39: error: mode has no meaning here (nothing is enforced at peers that run no agent)
            a.yaml:19:36: error: unknown onRevoke "drane" (known: cut, keep or {drain: 10m})
            a.yaml:19:52: error: unknown grant "pign" (known: ping, raw, sctp, udplite, dccp, mptcp, packet, vsock, families)
              help: did you mean "ping"?
            a.yaml:19:81: error: unknown whenUnresolved "no" (known: deny, allow)
            a.yaml:24:44: error: bad duration "10 minutes" (a duration reads 90s, 10m, 1h30m, from 1s to 30d)
        "#]],
    );
}

#[test]
fn requirements() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  rules:
    - {from: [any], to: [any], action: allow, require: {posture: healthy}}
    - {from: [any], to: [any], action: deny, require: {identity: exact}}
    - {from: [any], to: [any], action: allow, require: {identity: strong}}
    - {from: [any], to: [any], action: allow, require: {}}
"#,
        expect![[r#"
            a.yaml:6:66: error: posture is not supported by this version (a demand that nobody checks would be a false promise)
            a.yaml:7:55: error: require has no meaning here (it is what an allow demands of the peer)
            a.yaml:8:67: error: unknown identity "strong" (known: exact, authenticated)
            a.yaml:9:56: error: require demands nothing (it has identity: exact or authenticated)
        "#]],
    );
}

#[test]
fn workloads() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: a}
spec:
  match:
    - systemdUnit: "a["
    - cgroup: system.slice/x
    - {}
    - {cgroup: /x, systemdUnit: x}
    - container: {}
    - container: {image: "*/postgres:*"}
    - pod: {namespace: payments, labels: {app: db}}
    - podd: {}
    - container: {image: "", runtime: dockr, labels: {}}
    - container: {labels: {"any key: at all": "v*", "": "["}}
    - pod: {}
    - pod: {namespace: "a*", labels: {app: ""}, image: x}
  labels: {app: "a,b=c", "k=v": x}
---
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: b}
spec: {match: [], labels: {}}
"#,
        expect![[r#"
            a.yaml:6:20: error: bad glob "a[" (unclosed character class; missing ']')
            a.yaml:7:15: error: the cgroup "system.slice/x" does not begin with / (paths are from the root of the cgroup tree)
              help: write "/system.slice/x"
            a.yaml:8:7: error: a matcher has 0 keys (each has exactly one of systemdUnit, systemdUserUnit, cgroup, container, pod)
            a.yaml:9:7: error: a matcher has 2 keys (each has exactly one of systemdUnit, systemdUserUnit, cgroup, container, pod)
            a.yaml:10:18: error: container says nothing (it has at least one of image, name, runtime, labels)
            a.yaml:13:7: error: unknown key "podd" (a matcher has systemdUnit, systemdUserUnit, cgroup, container, pod)
              help: did you mean "pod"?
            a.yaml:14:26: error: bad glob "" (empty never means all: write "*")
            a.yaml:14:39: error: unknown runtime "dockr" (known: containerd, cri-o, docker, podman)
              help: did you mean "docker"?
            a.yaml:14:54: error: labels is an empty map (empty never means all)
            a.yaml:15:53: error: bad label key (the label of a container has 1 to 317 bytes)
            a.yaml:15:57: error: bad glob "[" (unclosed character class; missing ']')
            a.yaml:16:12: error: pod says nothing (it has at least one of namespace, name, labels)
            a.yaml:17:24: error: bad namespace "a*" (a name has 1 to 63 letters, digits, '-', '_' or '.', and begins and ends with a letter or digit)
            a.yaml:17:44: error: bad glob "" (empty never means all: write "*")
            a.yaml:17:49: error: unknown key "image" (pod has namespace, name, labels)
            a.yaml:18:17: error: bad label value "a,b=c" (a label value has at most 63 letters, digits, '-', '_' or '.', and begins and ends with a letter or digit)
            a.yaml:18:26: error: bad label key "k=v" (a label key has 1 to 63 letters, digits, '-', '_' or '.', and begins and ends with a letter or digit)
            a.yaml:23:15: error: match is an empty list (empty never means all)
            a.yaml:23:27: error: labels is an empty map (empty never means all)
        "#]],
    );
}

#[test]
fn peers() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  rules:
    - {from: [10.0.0.0/8], to: [[any]], action: deny}
    - {from: [{select: {a: b}, addresses: [10.0.0.0/8]}], to: [{selekt: {a: b}}, ~], action: deny}
"#,
        expect![[r#"
            a.yaml:6:15: error: the peer "10.0.0.0/8" is an address (a bare word is the name of a segment)
              help: write {addresses: [10.0.0.0/8]}
            a.yaml:6:33: error: a peer is a list (expected the name of a segment, {select: ...}, {addresses: ...}, any, world or host)
            a.yaml:7:15: error: a peer has select and addresses (it has one of them; write two peers)
            a.yaml:7:65: error: unknown key "selekt" (a peer has select, addresses)
              help: did you mean "select"?
            a.yaml:7:82: error: a peer has no value (expected the name of a segment, {select: ...}, {addresses: ...}, any, world or host)
        "#]],
    );
}

#[test]
fn tests_are_checked() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Test
metadata: {name: t}
spec:
  cases:
    - {from: {app: web}, to: wrold, port: tcp/1-2, expect: maybe}
    - {from: {app: web}, to: 192.0.2.1, port: tcp, expect: deny, because: x}
    - {from: {app: web}, to: {app: db}, port: icmp/echo-request, expect: allow, by: nobody}
"#,
        expect![[r#"
            a.yaml:6:30: error: unknown end "wrold" (an end is {label: value, ...}, an address, world, host or unresolved)
              help: did you mean "world"?
            a.yaml:6:43: error: tcp/1-2 is more than one port (a case is one connection)
            a.yaml:6:60: error: unknown expect "maybe" (known: deny, allow)
            a.yaml:7:47: error: tcp is more than one port (a case is one connection)
            a.yaml:7:66: error: unknown key "because" (a case has from, to, port, expect, by)
        "#]],
    );
}

#[test]
fn yaml_itself() {
    parsed(
        r#"a: [1, 2
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: web}
spec: {select: {ap: !!int 3}, mode: *missing}
---
%YAML 1.1
---
x: y
"#,
        expect![[r#"
            a.yaml:1:4: error: this is not YAML (unclosed bracket '[')
            a.yaml:6:27: error: a value has the tag "tag:yaml.org,2002:int" (tags have no meaning in policies)
            a.yaml:6:37: error: there is no anchor "&missing" (an alias needs an anchor before it, in the same document; text that begins with * needs quotes)
            a.yaml:8:1: error: this is not YAML (YAML directives are disallowed)
            a.yaml:10:1: error: a document has no apiVersion (it must be there)
            a.yaml:10:1: error: a document has no kind (it must be there)
            a.yaml:10:1: error: a document has no metadata (it must be there)
            a.yaml:10:1: error: a document has no spec (it must be there)
            a.yaml:10:1: error: unknown key "x" (a document has apiVersion, kind, metadata, spec)
        "#]],
    );
}

#[test]
fn merge_keys_and_cycles() {
    parsed(
        r#"apiVersion: segfw.dev/v1
kind: Segment
metadata: &m {name: web, <<: *m}
spec: {select: {app: web}}
"#,
        expect![[r#"
            a.yaml:3:26: error: merge keys (<<) are not supported (what is in force must be written where it is)
            a.yaml:3:30: error: an alias stands inside the value it names (it would never end)
        "#]],
    );
}

#[test]
fn not_a_map() {
    parsed(
        r#"- a
---
just text
---
~
---
{[a]: b}
"#,
        expect![[r#"
            a.yaml:1:1: error: a document is a list (expected a map)
            a.yaml:3:1: error: a document is the text "just text" (expected a map)
            a.yaml:7:1: error: a document has no apiVersion (it must be there)
            a.yaml:7:1: error: a document has no kind (it must be there)
            a.yaml:7:1: error: a document has no metadata (it must be there)
            a.yaml:7:1: error: a document has no spec (it must be there)
            a.yaml:7:2: error: a key is a list (expected text; quotes help where it is meant)
        "#]],
    );
}

#[test]
fn unknown_segment() {
    resolved(
        r#"apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: payments-db}
spec: {select: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: db}
spec: {match: [{cgroup: /db}], labels: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec: {rules: [{from: [payment-db, wrold, nothing-like-it], to: [payments-db], action: deny}]}
"#,
        expect![[r#"
            a.yaml:14:24: error: segment "payment-db" is not defined (a rule names segments, or any, world, host, unresolved)
              help: did you mean "payments-db"?
            a.yaml:14:36: error: segment "wrold" is not defined (a rule names segments, or any, world, host, unresolved)
              help: did you mean "world"?
            a.yaml:14:43: error: segment "nothing-like-it" is not defined (a rule names segments, or any, world, host, unresolved)
        "#]],
    );
}

#[test]
fn near_misses_of_labels() {
    resolved(
        r#"apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: db}
spec: {match: [{cgroup: /db}], labels: {app: payments, tier: db}}
---
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: web}
spec: {match: [{cgroup: /web}], labels: {app: web, tier: front}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  rules:
    - from: [{select: {app: paymnets}}, {select: {teir: db}}, {select: {app: web, tier: db}}, {select: "app, tier=front"}]
      to: [any]
      action: deny
"#,
        expect![[r#"
            a.yaml:16:14: warning: nothing carries "app=paymnets" (compared with the Workload documents and the inventory)
              help: did you mean "app=payments"?
            a.yaml:16:41: warning: nothing carries the label "teir" (compared with the Workload documents and the inventory)
              help: did you mean "tier"?
            a.yaml:16:63: warning: the selector "app=web, tier=db" matches nothing (compared with the Workload documents and the inventory)
        "#]],
    );
}

#[test]
fn advice() {
    resolved(
        r#"apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: db}
spec: {match: [{cgroup: /db}], labels: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: lonely}
spec: {select: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: office}
spec: {addresses: [192.0.2.0/24]}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: trial}
spec: {mode: monitor, rules: [{from: [any], to: [any], action: deny}]}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  rules:
    - {from: [office], to: [world, host], action: allow}
    - {from: [any], to: [any], action: allow, expires: 2026-01-01T00:00:00Z}
    - {from: [any], to: [any], action: allow, expires: 2026-01-01T00:00:01Z}
"#,
        expect![[r#"
            a.yaml:8:18: warning: no rule mentions the segment "lonely" (only its default is in force)
            a.yaml:18:18: warning: the policy "trial" has only monitor rules (they are judged and logged, never enforced)
            a.yaml:26:7: warning: the rule "rule-1" is never enforced (no workload is at either end, and judgements are made at workloads)
            a.yaml:27:56: warning: the rule expired at 2026-01-01T00:00:00Z (it matches nothing any more)
        "#]],
    );
}

#[test]
fn icmp() {
    resolved(
        r#"apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: db}
spec: {match: [{cgroup: /db}], labels: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: db}
spec: {select: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: p}
spec:
  rules:
    - {name: in, from: [world], to: [db], action: deny, ports: [tcp/1, icmp/echo-request]}
    - {name: any-in, from: [any], to: [any], action: deny, ports: [icmpv6]}
    - {name: both, from: [db], to: [db], action: allow, ports: [icmp/3/1]}
    - {name: out, from: [db], to: [world], action: allow, ports: [icmp]}
    - {name: every, from: [world], to: [db], action: deny, ports: [tcp/2]}
"#,
        expect![[r#"
            a.yaml:16:72: error: icmp/echo-request of the rule "in" cannot be enforced: no workload sends it (the kernel answers ICMP before any hook of a workload sees it, so only the sending end is judged)
              help: name the sending workloads in from, or control inbound ICMP with the host firewall
            a.yaml:17:68: error: icmpv6 of the rule "any-in" cannot be enforced: no workload sends it (the kernel answers ICMP before any hook of a workload sees it, so only the sending end is judged)
              help: name the sending workloads in from, or control inbound ICMP with the host firewall
            a.yaml:18:65: warning: icmp/destination-unreachable/1 of the rule "both" is enforced at the sending end only (the kernel answers ICMP before any hook of a workload sees it, so only the sending end is judged)
        "#]],
    );
}

#[test]
fn shadows() {
    resolved(
        r#"apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: db}
spec: {match: [{cgroup: /db}], labels: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: db}
spec: {select: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: first}
spec:
  priority: 1
  rules:
    - {name: wide, from: [any], to: [db], action: deny, ports: [tcp/1-1000]}
    - {name: net, from: [{addresses: [10.0.0.0/8]}], to: [db], action: allow, ports: [udp]}
    - {name: soon, from: [any], to: [db], action: allow, expires: 2027-01-01T00:00:00Z}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: second}
spec:
  priority: 2
  rules:
    - {name: inside, from: [world], to: [db], action: allow, ports: [tcp/22, tcp/80-90]}
    - {name: outside, from: [world], to: [db], action: allow, ports: [tcp/22, tcp/1001]}
    - {name: all-ports, from: [world], to: [db], action: allow}
    - {name: net, from: [{addresses: [10.1.0.0/16]}], to: [{select: {app: db}}], action: allow, ports: [udp/53]}
    - {name: wider-net, from: [{addresses: [0.0.0.0/0]}], to: [db], action: allow, ports: [udp/53]}
"#,
        expect![[r#"
            a.yaml:27:7: warning: the rule "inside" can never be reached (first/wide at a.yaml:17:7 decides all that it matches)
            a.yaml:30:7: warning: the rule "net" can never be reached (first/net at a.yaml:18:7 decides all that it matches)
        "#]],
    );
}

#[test]
fn a_pass_leads_past_its_tier() {
    resolved(
        r#"apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: db}
spec: {match: [{cgroup: /db}], labels: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: first}
spec:
  tier: security
  rules:
    - {name: let-on, from: [any], to: [any], action: pass, ports: [tcp/22]}
    - {name: wall, from: [any], to: [any], action: allow}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: second}
spec:
  rules:
    - {name: later, from: [any], to: [any], action: deny, ports: [tcp/22]}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: third}
spec:
  tier: security
  priority: 900
  rules:
    - {name: same-tier, from: [any], to: [any], action: deny, ports: [tcp/22]}
"#,
        expect![[r#"
            a.yaml:29:7: warning: the rule "same-tier" can never be reached (first/wall at a.yaml:13:7 decides all that it matches)
        "#]],
    );
}

/// The examples of the language description, as one file.
const EXAMPLE: &str = r#"
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: postgres}
spec:
  match:
    - systemdUnit: "postgresql@*.service"
    - cgroup: "/machine.slice/pg-*"
  labels: {app: payments, tier: db, enabled: no, version: 1.0, mode: 0644}
---
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: api}
spec: {match: [{systemdUnit: api.service}], labels: {app: payments, tier: api}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: payments-db, owner: team-payments, description: "The database", labels: {a: b}}
spec:
  select: {app: payments, tier: [db, cache], version: "*"}
  default: {ingress: deny, egress: allow}
  mode: monitor
  whenUnresolved: allow
  onRevoke: {drain: 10m}
  grants: [ping, sctp]
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: payments-api}
spec: {select: "app=payments, tier in (api), !legacy"}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: office}
spec: {addresses: [203.0.113.0/24, 2001:db8::/32, 192.0.2.7]}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: payments-db-access}
spec:
  tier: application
  priority: 100
  mode: enforce
  rules:
    - name: api-to-db
      from: [payments-api]
      to: [payments-db]
      ports: [tcp/5432, tcp/6000-6010, udp/53, sctp/3868]
      action: allow
      require: {identity: authenticated}
      expires: 2026-12-24T18:00:00+01:00
      schedule: "Mon-Fri 08:00-18:00 Europe/Amsterdam"
      log: none
    - {from: [office], to: [payments-db], action: reject}
    - {from: [any], to: [payments-db], ports: &web [tcp/80], action: pass}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: first}
spec: {tier: emergency, priority: 1000, rules: [{from: [unresolved], to: [payments-api], action: deny}]}
---
apiVersion: segfw.dev/v1
kind: Test
metadata: {name: db-is-closed}
spec:
  cases:
    - {from: {app: web}, to: {app: payments, tier: db}, port: tcp/5432, expect: deny}
    - {from: {app: payments, tier: api}, to: {app: payments, tier: db}, port: tcp/5432, expect: allow, by: api-to-db}
"#;

#[test]
fn the_example_means_what_it_says() {
    let (policy, problems) = whole(&file(EXAMPLE));
    assert_eq!(problems.to_string(), "");
    let names: Vec<_> = policy.segments.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["office", "payments-api", "payments-db"]);
    let db = &policy.segments[2];
    assert_eq!(db.owner.as_deref(), Some("team-payments"));
    assert!(!db.default_ingress_allow && db.default_egress_allow && db.monitor && db.unresolved_allow);
    assert_eq!(
        (db.on_revoke, db.grants),
        (OnRevoke::Drain(600_000_000_000), LocalEntry::GRANT_PING | LocalEntry::GRANT_SCTP)
    );
    assert_eq!((db.at.line, db.at.column), (18, 18));
    let api = &policy.segments[1];
    assert!(!api.default_ingress_allow && api.default_egress_allow && !api.monitor && !api.unresolved_allow);
    assert_eq!((api.on_revoke, api.grants), (OnRevoke::Cut, 0));
    assert!(
        matches!(&policy.segments[0].members, Members::Addresses(nets) if nets.len() == 3 && nets[2].prefix_len() == 32)
    );

    let order: Vec<_> = policy.rules.iter().map(|r| (r.tier, &*r.name, r.action)).collect();
    assert_eq!(
        order,
        [
            (Tier::Emergency, "rule-1", RuleAction::Deny),
            (Tier::Application, "rule-2", RuleAction::Reject),
            (Tier::Application, "rule-3", RuleAction::Pass),
            (Tier::Application, "api-to-db", RuleAction::Allow),
        ]
    );
    let rule = &policy.rules[3];
    assert!(
        matches!(rule.from.as_slice(), [PeerSpec::Segment(1)]) && matches!(rule.to.as_slice(), [PeerSpec::Segment(2)])
    );
    assert_eq!((rule.require, rule.log, rule.ports.len()), (Evidence::Origin, false, 4));
    assert_eq!(rule.expires.unwrap().to_string(), "2026-12-24T17:00:00Z");
    assert_eq!(rule.schedule.as_ref().unwrap().windows.len(), 5);
}

#[test]
fn text_stays_text() {
    let (documents, _) = parse(&file(EXAMPLE));
    let super::Document::Workload(doc) = &documents[0] else { panic!() };
    assert_eq!(super::tables::canonical(&doc.labels), "app=payments,enabled=no,mode=0644,tier=db,version=1.0");
}

#[test]
fn a_byte_order_mark_is_passed_over() {
    assert_eq!(whole(&file(&format!("\u{feff}{EXAMPLE}"))).1.to_string(), "");
}

#[test]
fn the_digest_does_not_know_the_order_of_files() {
    let one = [("a".to_owned(), "x".to_owned()), ("b".to_owned(), "y".to_owned())];
    let other = [one[1].clone(), one[0].clone()];
    assert_eq!(digest(&one), digest(&other));
    assert_eq!(digest::<&str>(&[]), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_ne!(digest(&one), digest(&[("a".to_owned(), "xb".to_owned()), ("".to_owned(), "y".to_owned())]));
}

/// Input that means harm: the first words said about it, and how long that may take.
#[test]
fn hostile_input_is_refused_in_time() {
    let lol = |width: usize| {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..9 {
            text += &format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); width].join(", "));
        }
        text
    };
    let big = "x".repeat(yaml::SCALAR_BYTES);
    let mut wrong = Vec::new();
    for (name, text, expect) in [
        (
            "billion laughs",
            lol(10),
            "a.yaml:5:25: error: the document is too large; the file is not read further (anchors",
        ),
        (
            "quadratic laughs",
            format!("a: &a {}\nb: [{}]\n", "y".repeat(60_000), "*a, ".repeat(100_000)),
            "a.yaml:2:69: error: the document is too large; the file is not read further (anchors",
        ),
        ("deep flow", "[".repeat(1 << 20), "a.yaml:1:65: error: this is not YAML ("),
        ("deep map", "{a: ".repeat(1 << 20), "a.yaml:1:257: error: this is not YAML ("),
        (
            "deep block",
            (0..2_000).map(|i| format!("{}a:\n", " ".repeat(i))).collect(),
            "a.yaml:65:65: error: this is not YAML (",
        ),
        ("deep lists", "- ".repeat(1 << 18), "a.yaml:1:129: error: this is not YAML ("),
        (
            "deep alias",
            format!("a: &a {}{}\nb: {}*a{}\n", "[".repeat(40), "]".repeat(40), "[".repeat(40), "]".repeat(40)),
            "a.yaml:2:44: error: the document is too large; the file is not read further (an alias nests",
        ),
        (
            "long scalar",
            format!("a: {big}x\n"),
            "a.yaml:1:4: error: the document is too large; the file is not read further (a value of 65537 bytes",
        ),
        ("long file", " ".repeat(yaml::FILE_BYTES + 1), "a.yaml:1:1: error: the file has 10485761 bytes"),
        ("long list", format!("a: [{}]", "a,".repeat(5_000_000)), "a.yaml:1:"),
        ("many keys", (0..200_000).map(|i| format!("k{i}: v\n")).collect(), "a.yaml:1:1: error: unknown key"),
        ("many documents", "---\na\n".repeat(300_000), "a.yaml:2:1: error: a document is the text \"a\""),
        ("many broken documents", "---\n[\n".repeat(300_000), "a.yaml:"),
        ("many anchors", (0..100_000).map(|i| format!("- &a{i} x\n")).collect(), "a.yaml:"),
        ("NUL", format!("{EXAMPLE}\u{0}kind: x"), "a.yaml:69:1: error: the file has a NUL byte"),
        ("quotes", "\"".repeat(1 << 20), "a.yaml:1:"),
        ("colons", ": ".repeat(1 << 20), "a.yaml:1:"),
        ("questions", "? ".repeat(1 << 20), "a.yaml:1:"),
        ("commas", format!("[{}", ",".repeat(1 << 20)), "a.yaml:1:"),
        ("percent", "%".repeat(1 << 20), "a.yaml:1:"),
        ("tabs", "\t".repeat(1 << 20), ""),
        ("ampersands", "&a ".repeat(1 << 18), "a.yaml:1:"),
        ("bangs", "!".repeat(1 << 20), "a.yaml:1:"),
        ("block scalar", format!("a: |\n{}", "  x\n".repeat(1 << 20)), "a.yaml:2:3: error: the document is too large"),
        ("long key", format!("? {big}\n: x\n"), "a.yaml:1:1: error: a document has no apiVersion"),
    ] {
        let start = Instant::now();
        let problems = whole(&file(&text)).1;
        let took = start.elapsed();
        let said = problems.to_string();
        if !said.starts_with(expect) || said.is_empty() != expect.is_empty() {
            wrong.push(format!("{name}: {}", said.chars().take(160).collect::<String>()));
        }
        assert!(problems.len() <= super::problem::PROBLEMS_PER_FILE + 2, "{name}: {} problems", problems.len());
        // Ten times what it may take in a release build: this one is not optimized, and others use the machine too.
        assert!(took < Duration::from_secs(10), "{name} took {took:?}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Documents in good form that cost much to advise on.
#[test]
fn advice_has_a_bound() {
    const HEAD: &str = "apiVersion: segfw.dev/v1\nmetadata: {name: x}\nkind: Policy\nspec:\n  rules:\n";
    let rules = |rule: &dyn Fn(usize) -> String, n: usize| {
        HEAD.to_owned() + &(0..n).map(|i| format!("    - {{{}}}\n", rule(i))).collect::<String>()
    };
    let long = "x".repeat(50);
    let segments: String = (0..5_000)
        .map(|i| format!("--- {{apiVersion: segfw.dev/v1, kind: Segment, metadata: {{name: {long}{i}}}, spec: {{select: {{k{i}: v}}}}}}\n"))
        .collect();
    let workloads: String = (0..5_000)
        .map(|i| format!("--- {{apiVersion: segfw.dev/v1, kind: Workload, metadata: {{name: {long}{i}}}, spec: {{match: [{{cgroup: /a{i}/*}}], labels: {{{long}{i}: v}}}}}}\n"))
        .collect();
    for (name, text) in [
        ("shadows", rules(&|i| format!("from: [any], to: [any], ports: [tcp/{}], action: deny", i + 1), 20_000)),
        (
            "passes",
            rules(
                &|i| {
                    format!(
                        "from: [any], to: [any], ports: [tcp/{}], action: {}",
                        i + 1,
                        if i % 2 == 0 { "pass" } else { "deny" }
                    )
                },
                20_000,
            ),
        ),
        (
            "expiring",
            rules(&|_| "from: [any], to: [any], action: allow, expires: 2030-01-01T00:00:00Z".to_owned(), 20_000),
        ),
        (
            "unknown segments",
            segments.clone() + "---\n" + &rules(&|i| format!("from: [{long}y{i}], to: [any], action: deny"), 20_000),
        ),
        (
            "bad zones",
            rules(
                &|i| format!("from: [any], to: [any], action: allow, schedule: Mon 08:00-09:00 Europa/Amsterdan{i}"),
                20_000,
            ),
        ),
        ("selectors", segments + &workloads),
    ] {
        let start = Instant::now();
        let problems = whole(&file(&text)).1;
        let took = start.elapsed();
        assert!(problems.len() <= 20_001, "{name}: {} problems", problems.len());
        assert!(took < Duration::from_secs(20), "{name} took {took:?}");
    }
}

#[test]
fn columns_count_characters() {
    parsed(
        "apiVersion: segfw.dev/v1\nkind: Segment\nmetadata: {description: \"äöü€😀\", naem: x}\nspec: {select: \"app=wéb\"}\n",
        expect![[r#"
            a.yaml:3:11: error: metadata has no name (it must be there)
            a.yaml:3:34: error: unknown key "naem" (metadata has name, owner, description, labels)
              help: did you mean "name"?
            a.yaml:4:21: error: bad label value "wéb" (a label value has at most 63 letters, digits, '-', '_' or '.', and begins and ends with a letter or digit)
        "#]],
    );
}

#[test]
fn all_files_together_have_a_bound() {
    let files: Vec<_> =
        (0..8).map(|i| (format!("{i}.yaml"), format!("#{}", " ".repeat(yaml::FILE_BYTES - 1)))).collect();
    let said = whole(&files).1.to_string();
    assert!(said.starts_with("6.yaml:1:1: error: this file and those after it are not read"), "{said}");
}

#[test]
fn no_more_documents_than_the_bound() {
    let text: String = (0..=yaml::DOCUMENTS).map(|i| format!("--- {{apiVersion: segfw.dev/v1, kind: Segment, metadata: {{name: s{i}}}, spec: {{addresses: [10.0.0.0/8]}}}}\n")).collect();
    let (documents, problems) = parse(&file(&text));
    assert_eq!((documents.len(), problems.len()), (yaml::DOCUMENTS, 1));
    assert!(
        problems[0].to_string().starts_with("a.yaml:65537:5: error: this document and those after it are not read"),
        "{}",
        problems[0]
    );
}

/// Everything that ever failed, and what looks as if it might.
#[test]
fn replay() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/replayed/yaml");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let start = Instant::now();
        fuzz_yaml(&std::fs::read(&path).unwrap());
        assert!(start.elapsed() < Duration::from_secs(10), "{}", path.display());
        count += 1;
    }
    assert!(count >= 20, "{count} inputs in {folder}");
}

fn documents_of_example() -> Vec<(String, String)> {
    EXAMPLE.split("---\n").enumerate().map(|(i, text)| (format!("{i}.yaml"), text.to_owned())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes of the example changed, removed, repeated.
    #[test]
    fn mutants_do_not_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..12)) {
        let mut bytes = EXAMPLE.as_bytes().to_vec();
        const MARKS: &[u8] = b"[]{}:,-?&*!|>'\"%@`#\n \t~<=\0\xff()/";
        for (at, byte, how) in changes {
            let i = at.index(bytes.len());
            match how {
                0 => bytes[i] = MARKS[usize::from(byte) % MARKS.len()],
                1 => bytes.insert(i, MARKS[usize::from(byte) % MARKS.len()]),
                2 => drop(bytes.drain(i..(i + usize::from(byte)).min(bytes.len() - 1).max(i))),
                _ => bytes[i] = byte,
            }
        }
        fuzz_yaml(&bytes);
    }

    #[test]
    fn small_languages_do_not_panic(text in "[ -~é\u{1f600}]{0,40}") {
        let _ = super::selector::parse(&text);
        let _ = super::ports::parse(&text);
        let _ = super::schedule::parse(&text);
        let _ = super::workload::Glob::new(&text, true);
        fuzz_yaml(text.as_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_order_of_files_has_no_meaning(files in Just(documents_of_example()).prop_shuffle()) {
        let (expect, _) = whole(&documents_of_example());
        let (policy, problems) = whole(&files);
        prop_assert_eq!(problems.to_string(), "");
        prop_assert_eq!(format!("{policy:?}"), format!("{expect:?}"));
    }
}

#[test]
fn what_was_read_before_is_as_if_it_were_read_now() {
    use super::document::{Cache, parse_again};
    use super::load::Files;
    let segment = |name: &str, padding: usize| {
        let comment = "# padding\n".repeat(padding);
        format!(
            "apiVersion: segfw.dev/v1\nkind: Segment\nmetadata: {{name: {name}}}\nspec: {{select: {{app: {name}}}}}\n{comment}"
        )
    };
    // Enough bytes for several threads; a duplicate name; a mistake.
    let mut files: Files = (0..40).map(|i| (format!("{i:02}.yaml"), segment(&format!("s{i}"), 8_000).into())).collect();
    files.push(("twice.yaml".into(), segment("s7", 0).into()));
    files.push(("wrong.yaml".into(), segment("x", 0).replace("select", "selcet").into()));
    let mut cache = Cache::default();
    let mut same = |files: &Files| {
        let (documents, problems) = parse_again(files, &mut cache);
        let (want, expected) = parse(files);
        assert_eq!(format!("{documents:?}"), format!("{want:?}"));
        assert_eq!(format!("{problems:?}"), format!("{expected:?}"));
        (documents.len(), problems.len())
    };
    let (documents, problems) = same(&files);
    assert_eq!(documents, 41);
    assert!(problems >= 2, "{problems}");
    assert_eq!(same(&files), (documents, problems));
    // Texts that are equal, and not the same ones.
    for (_, text) in &mut files {
        *text = text.to_string().into();
    }
    assert_eq!(same(&files), (documents, problems));
    // Another text, another name for a text, one less, one more: the duplicate is the other one now.
    files[3].1 = segment("other", 2).into();
    files[7].0 = "zz.yaml".into();
    let _ = files.remove(12);
    files.push(("new.yaml".into(), segment("s12", 0).into()));
    assert_eq!(same(&files), (documents, problems));
    // A mistake is mended, and comes again.
    let mended = files.iter().position(|f| f.0 == "wrong.yaml").unwrap();
    let wrong = std::mem::replace(&mut files[mended].1, segment("x", 0).into());
    assert!(same(&files).1 < problems);
    files[mended].1 = wrong;
    assert_eq!(same(&files), (documents, problems));
}
