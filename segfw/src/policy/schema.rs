//! The policy language as data: which kinds there are, which keys each has, what stands behind a key.
//!
//! The one description. The parser takes its lists of keys from here (`document::Reader::fields`), the JSON Schema for
//! editors ([`json`]) and the reference for people ([`reference`]) are made from it, so the three cannot differ. A new
//! key is one line here, and the code of `document` that reads it; a test fails if either is missing.

pub mod json;
pub mod reference;
#[doc(hidden)]
pub mod validator;

use super::container;
use super::document::{
    ACTIONS, API_VERSION, DEFAULT_PRIORITY, DENY_ALLOW, GRANTS, IDENTITIES, LAST_PRIORITY, LOGS, MODES, SOCKETS, TIERS,
};

/// What may stand behind a key.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    /// Any text; numbers, `yes` and `no` are text too.
    Text,
    /// Text of a form of its own.
    Form(&'static Form),
    /// A whole number, both ends included.
    Number(u16, u16),
    /// One of these words.
    Words(&'static [&'static str]),
    /// A list with at least one element.
    List(&'static Type),
    /// A map with these keys and no others.
    Map(&'static Map),
    /// At least one label: key and value are text.
    Labels,
    /// At least one label of a container: any key, and a glob.
    LabelGlobs,
    /// A selector as a map: a value, a list of values, or `"*"`.
    LabelSelector,
    /// One of these.
    Either(&'static [Type]),
    /// Known, so that the message is a good one; never accepted.
    Refused,
}

/// A small language inside a text.
#[derive(Debug)]
pub struct Form {
    /// Its name in the reference.
    pub name: &'static str,
    /// A regular expression (ECMA-262) that every right text fits; some wrong ones fit it too.
    pub pattern: &'static str,
}

/// How the keys of a map depend on each other, beside those that are required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Not at all.
    Free,
    /// Exactly one of all keys.
    One,
    /// At least one of all keys.
    Some,
    /// Either a key of the first list, or the second key alone.
    Or(&'static str, &'static str),
}

/// A map with known keys.
#[derive(Debug)]
pub struct Map {
    /// As messages name it: `a rule`.
    pub what: &'static str,
    /// Its keys, in the order of the reference.
    pub fields: &'static [Field],
    /// What holds between them.
    pub shape: Shape,
}

impl Map {
    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &'static str> {
        self.fields.iter().map(|f| f.key)
    }
    /// All keys in one text: `select, addresses`.
    pub fn list(&self) -> String {
        self.keys().collect::<Vec<_>>().join(", ")
    }
    /// One key.
    pub fn field(&self, key: &str) -> Option<&'static Field> {
        self.fields.iter().find(|f| f.key == key)
    }
}

/// A key of a map.
#[derive(Debug)]
pub struct Field {
    /// As it is written.
    pub key: &'static str,
    /// What stands behind it.
    pub value: Type,
    /// Whether it must be there, and what holds where it is not.
    pub presence: Presence,
    /// Its meaning, for the reference and for editors. One sentence or two.
    pub doc: &'static str,
}

/// What holds where a key is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is a mistake.
    Required,
    /// Nothing.
    Optional,
    /// As if this were written.
    Default(&'static str),
}

/// A kind of document.
#[derive(Debug)]
pub struct Kind {
    /// The word after `kind:`.
    pub name: &'static str,
    /// What it is for: one sentence.
    pub doc: &'static str,
    /// Its `spec`.
    pub spec: &'static Map,
    /// Whole documents that together have every key (a test says so).
    pub examples: &'static [&'static str],
}

const fn required(key: &'static str, value: Type, doc: &'static str) -> Field {
    Field { key, value, presence: Presence::Required, doc }
}
const fn optional(key: &'static str, value: Type, doc: &'static str) -> Field {
    Field { key, value, presence: Presence::Optional, doc }
}
const fn default(key: &'static str, value: Type, default: &'static str, doc: &'static str) -> Field {
    Field { key, value, presence: Presence::Default(default), doc }
}
/// The words of a table of the parser.
const fn words<T, const N: usize>(table: &[(&'static str, T); N]) -> [&'static str; N] {
    let mut words = [""; N];
    let mut i = 0;
    while i < N {
        words[i] = table[i].0;
        i += 1;
    }
    words
}

const RUNTIME: Type = Type::Words(&words(&container::Kind::WORDS));
const TIER: Type = Type::Words(&words(&TIERS));
const ACTION: Type = Type::Words(&words(&ACTIONS));
const MODE: Type = Type::Words(&words(&MODES));
const VERDICT: Type = Type::Words(&words(&DENY_ALLOW));
const LOG: Type = Type::Words(&words(&LOGS));
const IDENTITY: Type = Type::Words(&words(&IDENTITIES));
const SOCKETS_WORDS: Type = Type::Words(&words(&SOCKETS));
const GRANT: Type = Type::Words(&words(&GRANTS));

static NAME: Form = Form { name: "name", pattern: "^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$" };
static GLOB: Form = Form { name: "glob", pattern: "^.+$" };
static PATH: Form = Form { name: "glob over a path", pattern: "^/.*$" };
static SELECTOR: Form = Form { name: "selector as kubectl writes it", pattern: "^.+$" };
static PREFIX: Form = Form { name: "prefix or address", pattern: "^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$" };
static ADDRESS: Form = Form { name: "address", pattern: "^[0-9A-Fa-f:.]*[:.][0-9A-Fa-f:.]*$" };
static DURATION: Form = Form { name: "duration from 1s to 30d", pattern: "^([0-9]+[smhd])+$" };
static DRAIN: Form = Form { name: "drain: and a duration", pattern: "^drain:\\s*([0-9]+[smhd])+\\s*$" };
static TIME: Form = Form { name: "RFC 3339 time with a zone", pattern: "^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ].+$" };
static WINDOWS: Form =
    Form { name: "windows and a time zone", pattern: "^.*[0-9]{2}:[0-9]{2}-[0-9]{2}:[0-9]{2}.* .+$" };
static RULE: Form = Form { name: "rule, or policy/rule", pattern: "^[^/]+(/[^/]+)?$" };
static PORT: Form = Form { name: "port", pattern: "^(tcp|udp|icmp|icmpv6|sctp|udplite|dccp)(/[a-z0-9-]+(/[0-9]+)?)?$" };
static ONE_PORT: Form =
    Form { name: "one port", pattern: "^(tcp|udp|icmp|icmpv6|sctp|udplite|dccp)(/[a-z0-9-]+(/[0-9]+)?)$" };

/// What every document has.
pub static DOCUMENT: Map = Map {
    what: "a document",
    shape: Shape::Free,
    fields: &[
        required("apiVersion", Type::Words(&[API_VERSION]), "The version of the language."),
        required("kind", Type::Words(&["Workload", "Segment", "Policy", "Test"]), "What the document says."),
        required("metadata", Type::Map(&METADATA), "Its name, and notes for people."),
        required("spec", Type::Map(&ANY_SPEC), "What it says; the keys depend on the kind."),
    ],
};

/// The spec of a document whose kind is not known.
static ANY_SPEC: Map = Map { what: "a spec", shape: Shape::Free, fields: &[] };

/// `metadata`.
pub static METADATA: Map = Map {
    what: "metadata",
    shape: Shape::Free,
    fields: &[
        required("name", Type::Form(&NAME), "Unique within its kind: 1 to 63 letters, digits, `-`, `_`, `.`."),
        optional("owner", Type::Text, "Who answers for it."),
        optional("description", Type::Text, "Why it is there."),
        optional("labels", Type::Labels, "For your own tools; they select nothing."),
    ],
};

/// The spec of a Workload.
pub static WORKLOAD: Map = Map {
    what: "the spec of a Workload",
    shape: Shape::Free,
    fields: &[
        required("match", Type::List(&Type::Map(&MATCHER)), "Any of them matches. At most 1,024."),
        required("labels", Type::Labels, "What the processes carry from then on."),
    ],
};

/// An element of `match`. A new matcher is one line here, and an arm of `document::Reader::matcher`.
pub static MATCHER: Map = Map {
    what: "a matcher",
    shape: Shape::One,
    fields: &[
        optional(
            "systemdUnit",
            Type::Form(&GLOB),
            "A unit of the system's manager, by name. `foo.service` means `foo.socket` too. What a unit makes below its own \
             cgroup belongs to it, whatever its name.",
        ),
        optional("systemdUserUnit", Type::Map(&USER_UNIT), "A unit of a user's own manager."),
        optional(
            "cgroup",
            Type::Form(&PATH),
            "The path from the root of the cgroup tree; `*` stops at `/`, `**` does not.",
        ),
        optional(
            "container",
            Type::Map(&CONTAINER),
            "A container, as its runtime describes it; unresolved until the runtime has.",
        ),
        optional(
            "pod",
            Type::Map(&POD),
            "A pod, as the container runtime (CRI) describes it; unresolved until it has.",
        ),
    ],
};

/// `systemdUserUnit` of a matcher.
pub static USER_UNIT: Map = Map {
    what: "systemdUserUnit",
    shape: Shape::Free,
    fields: &[
        required("unit", Type::Form(&GLOB), "The name of the unit."),
        required(
            "user",
            Type::Form(&GLOB),
            "Name or number of the user. Required, since every user can give their units any name.",
        ),
    ],
};

/// `container` of a matcher.
pub static CONTAINER: Map = Map {
    what: "container",
    shape: Shape::Some,
    fields: &[
        optional("image", Type::Form(&GLOB), "The image as the runtime names it."),
        optional("name", Type::Form(&GLOB), "The name of the container."),
        optional("runtime", RUNTIME, "Which runtime made it."),
        optional(
            "labels",
            Type::LabelGlobs,
            "Labels that it has, all of them. Mind that an image can bring labels along.",
        ),
    ],
};

/// `pod` of a matcher.
pub static POD: Map = Map {
    what: "pod",
    shape: Shape::Some,
    fields: &[
        optional("namespace", Type::Form(&NAME), "Its Kubernetes namespace."),
        optional("name", Type::Form(&GLOB), "Its name."),
        optional("labels", Type::LabelGlobs, "Labels that it has, all of them."),
    ],
};

const SELECT: Type = Type::Either(&[Type::LabelSelector, Type::Form(&SELECTOR)]);
const ADDRESSES: Type = Type::List(&Type::Form(&PREFIX));

/// The spec of a Segment.
pub static SEGMENT: Map = Map {
    what: "the spec of a Segment",
    shape: Shape::Or("select", "addresses"),
    fields: &[
        optional(
            "select",
            SELECT,
            "The workloads in it: a map (all must match, a list is any of, `\"*\"` is has-key) or text: \
             `\"app=shop, tier in (db, cache), env != dev, !legacy\"`.",
        ),
        optional("addresses", ADDRESSES, "Instead of `select`: peers without an agent. No other key stands beside it."),
        optional("default", Type::Map(&DEFAULTS), "What no rule decides."),
        default("mode", MODE, "enforce", "`monitor`: judged, recorded as AUDIT, never dropped."),
        default("whenUnresolved", VERDICT, "deny", "What holds for peers that are not known yet."),
        default(
            "onRevoke",
            Type::Either(&[Type::Words(&["cut", "keep"]), Type::Map(&ON_REVOKE), Type::Form(&DRAIN)]),
            "cut",
            "What becomes of a live connection that is no longer allowed.",
        ),
        optional(
            "grants",
            Type::List(&GRANT),
            "Socket types that are allowed beside TCP and UDP; `packet`, `vsock` and `families` (all others) are address families, which no rule speaks of.",
        ),
        default(
            "sockets",
            SOCKETS_WORDS,
            "tcp-udp",
            "What may be had without a grant. `tcp`: UDP sockets are refused when they are made; where every segment of a host \
             says so, gate conn needs nothing per packet.",
        ),
    ],
};

/// `default` of a Segment.
pub static DEFAULTS: Map = Map {
    what: "default",
    shape: Shape::Free,
    fields: &[
        default("ingress", VERDICT, "deny", "What comes in."),
        default("egress", VERDICT, "allow", "What goes out."),
    ],
};

/// `onRevoke` of a Segment, as a map.
pub static ON_REVOKE: Map = Map {
    what: "onRevoke",
    shape: Shape::Free,
    fields: &[required("drain", Type::Form(&DURATION), "It may go on for so long: 90s, 10m, 1h30m.")],
};

/// The spec of a Policy.
pub static POLICY: Map = Map {
    what: "the spec of a Policy",
    shape: Shape::Free,
    fields: &[
        default("tier", TIER, "application", "Tiers are asked in this order."),
        default(
            "priority",
            Type::Number(0, LAST_PRIORITY),
            // `the_default_priority_is_said` compares.
            "500",
            "Within a tier; lower first.",
        ),
        default("mode", MODE, "enforce", "`monitor`: its rules give the pending answer of flow records only."),
        required("rules", Type::List(&Type::Map(&RULES)), "Their order matters only where all else is equal."),
    ],
};
const _: () = assert!(DEFAULT_PRIORITY == 500, "the tree above says 500");

const PEERS: Type = Type::List(&Type::Either(&[Type::Form(&NAME), Type::Map(&PEER)]));

/// A rule of a Policy.
pub static RULES: Map = Map {
    what: "a rule",
    shape: Shape::Free,
    fields: &[
        default("name", Type::Form(&NAME), "rule-N", "Unique in its policy; flows and counters name it."),
        required("from", PEERS, "Who opens: names of segments, `any`, `world`, `host`, `unresolved`, or a peer."),
        required("to", PEERS, "Who answers: as `from`."),
        default(
            "ports",
            Type::List(&Type::Form(&PORT)),
            "every protocol and port",
            "`tcp/5432`, `tcp/6000-6010`, `udp`, `icmp/echo-request`, `icmp/3/4`, `sctp/3868`.",
        ),
        required(
            "action",
            ACTION,
            "`deny`: silent inbound, EPERM outbound. `reject`: reset or port unreachable inbound, ECONNREFUSED \
             outbound. `pass`: skip the rest of this tier.",
        ),
        optional("require", Type::Map(&REQUIRE), "What an `allow` demands of its peer, at ingress."),
        default("expires", Type::Form(&TIME), "never", "The rule ends by itself; held by the kernel."),
        default(
            "schedule",
            Type::Form(&WINDOWS),
            "always",
            "`\"Mon-Fri 08:00-18:00; Sat,Sun 10:00-12:00 Europe/Amsterdam\"`.",
        ),
        default("log", LOG, "new", "`none`: allowed flows are not recorded; refusals always are."),
    ],
};

/// A peer of a rule that is not a name.
pub static PEER: Map = Map {
    what: "a peer",
    shape: Shape::One,
    fields: &[
        optional("select", SELECT, "Workloads by labels, as in a Segment."),
        optional("addresses", ADDRESSES, "Prefixes; the longest one named anywhere says who an address is."),
    ],
};

/// `require` of a rule.
pub static REQUIRE: Map = Map {
    what: "require",
    shape: Shape::Some,
    fields: &[
        optional(
            "identity",
            IDENTITY,
            "`exact`: by an address of this host or better. `authenticated`: the hooks of this host saw the sender.",
        ),
        optional("posture", Type::Refused, "Refused: this version cannot check it."),
    ],
};

/// The spec of a Test.
pub static TEST: Map = Map {
    what: "the spec of a Test",
    shape: Shape::Free,
    fields: &[required("cases", Type::List(&Type::Map(&CASE)), "Each is one connection and the answer it must get.")],
};

const END: Type = Type::Either(&[Type::Labels, Type::Words(&["world", "host", "unresolved"]), Type::Form(&ADDRESS)]);

/// A case of a Test.
pub static CASE: Map = Map {
    what: "a case",
    shape: Shape::Free,
    fields: &[
        required("from", END, "Who opens: all labels of a workload, an address, `world`, `host`, `unresolved`."),
        required("to", END, "Who answers."),
        required("port", Type::Form(&ONE_PORT), "One protocol and port."),
        required("expect", VERDICT, "The answer of both ends together."),
        optional("by", Type::Form(&RULE), "The rule that must decide at one of the ends: `rule` or `policy/rule`."),
    ],
};

/// Every kind.
pub static KINDS: [Kind; 4] = [
    Kind {
        name: "Workload",
        doc: "Which processes carry which labels.",
        spec: &WORKLOAD,
        examples: &["\
apiVersion: segfw.dev/v1
kind: Workload
metadata:
  name: postgres
  owner: team-shop
  description: the database of the shop, all instances
  labels: {cost-centre: 4711}
spec:
  match:
    - systemdUnit: \"postgresql@*.service\"
    - cgroup: \"/machine.slice/pg-*\"
    - systemdUserUnit: {unit: pg-dev.service, user: alice}
    - container: {image: \"*/postgres:*\", name: \"pg-*\", runtime: podman, labels: {tier: db}}
    - pod: {namespace: payments, name: \"payments-db-*\", labels: {app: payments-db}}
  labels: {app: shop, tier: db}
"],
    },
    Kind {
        name: "Segment",
        doc: "Who is enforced: a named set of workloads, or of addresses as a peer.",
        spec: &SEGMENT,
        examples: &[
            "\
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: shop-db}
spec:
  select: {app: shop, tier: [db, cache], managed: \"*\"}
  default: {ingress: deny, egress: allow}
  mode: enforce
  whenUnresolved: deny
  onRevoke: {drain: 10m}
  grants: [ping]
  sockets: tcp-udp
",
            "\
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: office}
spec:
  addresses: [203.0.113.0/24, \"2001:db8::/32\"]
",
        ],
    },
    Kind {
        name: "Policy",
        doc: "Who may open which connection.",
        spec: &POLICY,
        examples: &["\
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: shop-db-access}
spec:
  tier: application
  priority: 100
  mode: enforce
  rules:
    - name: web-to-db
      from: [shop-web]
      to: [shop-db]
      ports: [tcp/5432, tcp/6000-6010]
      action: allow
      require: {identity: authenticated}
      log: new
    - name: maintenance
      from: [{addresses: [203.0.113.7]}, {select: \"app=backup\"}]
      to: [shop-db]
      action: allow
      schedule: \"Mon-Fri 08:00-18:00 Europe/Amsterdam\"
      expires: 2027-12-24T18:00:00Z
"],
    },
    Kind {
        name: "Test",
        doc: "What must hold. `segfw policy test` runs it, and the agent refuses a revision that fails.",
        spec: &TEST,
        examples: &["\
apiVersion: segfw.dev/v1
kind: Test
metadata: {name: db-is-closed}
spec:
  cases:
    - {from: world, to: {app: shop, tier: db}, port: tcp/5432, expect: deny}
    - {from: {app: shop, tier: web}, to: {app: shop, tier: db}, port: tcp/5432, expect: allow, by: web-to-db}
"],
    },
];

/// The kind of this name.
pub fn kind(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|k| k.name == name)
}

#[cfg(test)]
mod tests;
