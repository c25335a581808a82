//! Policy text for tests. Only what YAML itself needs: the product's own parser must see text, not our types.

use std::fmt::Write;

/// Stands for [`crate::world::World::managed_path`] in a group's policy.
pub const CGROUP: &str = "@CGROUP@";

/// Grows by documents.
#[derive(Clone, Debug, Default)]
pub struct Yaml(pub String);

impl Yaml {
    fn document(&mut self, kind: &str, name: &str, spec: &str) -> &mut Self {
        let _ =
            write!(self.0, "---\napiVersion: segfw.dev/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n{spec}");
        self
    }

    /// The cgroup `<managed>/name` carries `app: name`.
    pub fn workload(&mut self, name: &str) -> &mut Self {
        self.document(
            "Workload",
            name,
            &format!("  match: [{{cgroup: \"{CGROUP}/{name}\"}}]\n  labels: {{app: {name}}}\n"),
        )
    }

    /// The workload `name` and a segment of the same name that holds it; `more` = further keys, one per line.
    pub fn enforced(&mut self, name: &str, more: &[&str]) -> &mut Self {
        self.workload(name);
        self.segment(name, &format!("select: {{app: {name}}}"), more)
    }

    /// A segment with any `select` or `addresses`; both defaults are deny unless `more` says something else.
    pub fn segment(&mut self, name: &str, members: &str, more: &[&str]) -> &mut Self {
        let mut spec = format!("  {members}\n");
        if !more.iter().any(|m| m.starts_with("default:")) && members.starts_with("select") {
            spec += "  default: {ingress: deny, egress: deny}\n";
        }
        for line in more {
            let _ = writeln!(spec, "  {line}");
        }
        self.document("Segment", name, &spec)
    }

    /// A policy of one rule; both have the name `name`.
    pub fn rule(&mut self, name: &str, order: Order, from: &str, to: &str, rest: &str) -> &mut Self {
        let mode = if order.monitor { "  mode: monitor\n" } else { "" };
        let (tier, priority) = (order.tier, order.priority);
        self.document(
            "Policy",
            name,
            &format!(
                "  tier: {tier}\n  priority: {priority}\n{mode}  rules:\n    - {{name: {name}, from: [{from}], to: [{to}], {rest}}}\n"
            ),
        )
    }

    /// An allow rule in the application tier.
    pub fn allow(&mut self, name: &str, from: &str, to: &str, ports: &str) -> &mut Self {
        self.rule(name, APPLICATION, from, to, &format!("ports: [{ports}], action: allow"))
    }
}

/// Where a policy stands in the order.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    pub tier: &'static str,
    pub priority: u16,
    pub monitor: bool,
}

/// The usual place.
pub const APPLICATION: Order = at("application", 100);

/// A place in the order.
pub const fn at(tier: &'static str, priority: u16) -> Order {
    Order { tier, priority, monitor: false }
}

/// As [`at`], but only watched.
pub const fn watched(tier: &'static str, priority: u16) -> Order {
    Order { tier, priority, monitor: true }
}

/// A weekly window that is open now, or one that is closed now and for more than a day on either side.
pub fn schedule(open: bool) -> String {
    const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
    if open {
        return "\"Mon-Sun 00:00-24:00 UTC\"".to_owned();
    }
    let seconds = std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs());
    // 1970-01-01 was a Thursday.
    let today = (seconds / 86400 + 3) % 7;
    let other = DAYS[usize::try_from((today + 3) % 7).unwrap_or(0)];
    format!("\"{other} 08:00-18:00 UTC\"")
}
