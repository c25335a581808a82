//! The table itself: [`all`] makes every row from the matrix and from the list of bypasses.

mod attacks;
mod bypass;
mod changes;
mod faults;
mod matrix;
mod situations;

use crate::table::{ENDS, Expect, Family, Group, Probe, Proto, Row, Where};
use crate::world::{net, v4_of, v6_of};

/// Every group, the slowest first: that makes a parallel run short.
pub fn all() -> Vec<Group> {
    let mut groups = faults::groups();
    groups.extend(bypass::groups());
    groups.extend(attacks::groups());
    groups.extend(changes::groups());
    groups.extend(situations::groups());
    groups.extend(matrix::groups());
    // Behind all others: guests that run a part of the table count groups from the first.
    groups.push(attacks::other_family());
    groups
}

/// Namespaces `a` and `b`, `cli` in the first, `srv` in the second (both in these cgroups).
fn pair(name: impl Into<String>, cli: &'static str, srv: &'static str, policy: String, rows: Vec<Row>) -> Group {
    Group {
        name: name.into(),
        nets: vec![net("a"), net("b")],
        actors: vec![("cli", cli, "a"), ("srv", srv, "b")],
        policy,
        agent_args: Vec::new(),
        sysctls: Vec::new(),
        rows,
    }
}

/// `addresses: [...]` with both addresses of the namespace at `index`.
fn addresses(index: u8) -> String {
    format!("addresses: [{}/32, {}/128]", v4_of(index), v6_of(index))
}

/// A TCP flow of `cli` to `srv` in `b`.
fn tcp(kind: &'static str, port: u16, expect: Expect) -> Row {
    flow(kind, Proto::Tcp, port, expect)
}

/// A flow of `cli` to `srv` in `b`.
fn flow(kind: &'static str, proto: Proto, port: u16, expect: Expect) -> Row {
    let probe = Probe::Flow { ends: ENDS, proto, to: Where::Net("b") };
    Row { proto: proto.word(), ..Row::new(kind, port, probe, expect) }
}

/// The row in each family.
fn families(row: &Row) -> impl Iterator<Item = Row> {
    [Family::V4, Family::V6, Family::Mapped].map(|family| Row { family, ..row.clone() }).into_iter()
}
