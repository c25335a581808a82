//! One policy of any size, in segfw's language. `n` rules let `n` addresses of 10/8 reach the server, each on one port of
//! 1,000; one more rule lets the client in. The other peers get the same sentences (`peers`).

use std::fmt::Write;
use std::net::Ipv4Addr;

/// The one rule of the probe and of all timed traffic.
pub(crate) const OPEN: u16 = 5432;
/// Nobody may.
pub(crate) const SHUT: u16 = 5433;
/// What a changed rule opens and shuts.
pub(crate) const CHANGED: u16 = 5434;
/// Rules in one file: a parser takes a file as a whole, a person does not write more.
const PER_FILE: u32 = 1_000;

/// Address and port of rule `i`.
pub(crate) fn sentence(i: u32) -> (Ipv4Addr, u16) {
    (Ipv4Addr::from(0x0a00_0000 + 2 * i + 1), 10_000 + (i % 1_000) as u16)
}

/// Files, each with its name. `@CGROUP@` stands for the managed path.
pub(crate) fn files(n: u32) -> Vec<(String, String)> {
    let mut files = vec![("base.yaml".to_owned(), base())];
    for first in (0..n).step_by(PER_FILE as usize) {
        let mut text = format!(
            "apiVersion: segfw.dev/v1\nkind: Policy\nmetadata: {{name: bulk-{first}}}\nspec:\n  tier: application\n  rules:\n"
        );
        for i in first..n.min(first + PER_FILE) {
            let (addr, port) = sentence(i);
            let _ = writeln!(
                text,
                "    - {{name: r{i}, from: [{{addresses: [{addr}]}}], to: [srv], ports: [tcp/{port}], action: allow}}"
            );
        }
        files.push((format!("bulk-{first:06}.yaml"), text));
    }
    files
}

/// Client, server, and the rule between them.
fn base() -> String {
    let mut text = String::new();
    for app in ["cli", "srv"] {
        let _ = write!(
            text,
            "---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {{name: {app}}}\nspec:\n  match: [{{cgroup: \"@CGROUP@/{app}\"}}]\n  labels: {{app: {app}}}\n\
             ---\napiVersion: segfw.dev/v1\nkind: Segment\nmetadata: {{name: {app}}}\nspec:\n  select: {{app: {app}}}\n  default: {{ingress: deny, egress: deny}}\n"
        );
    }
    text
}

/// The file that a change rewrites: the ports on which the client may reach the server.
pub(crate) fn access(ports: &[u16]) -> String {
    let mut text =
        "apiVersion: segfw.dev/v1\nkind: Policy\nmetadata: {name: access}\nspec:\n  tier: application\n  rules:\n"
            .to_owned();
    for port in ports {
        let _ = writeln!(
            text,
            "    - {{name: cli-to-srv-{port}, from: [cli], to: [srv], ports: [tcp/{port}], action: allow}}"
        );
    }
    text
}

/// First and last of the UDP ports on which the client may reach the server.
pub(crate) const UDP: (u16, u16) = (6_000, 6_063);

/// What timed traffic needs: one TCP port, and the UDP ports.
pub(crate) fn traffic(quiet: bool) -> String {
    let log = if quiet { "none" } else { "new" };
    let (first, last) = UDP;
    format!(
        "apiVersion: segfw.dev/v1\nkind: Policy\nmetadata: {{name: traffic}}\nspec:\n  tier: application\n  rules:\n    \
         - {{name: traffic, from: [cli], to: [srv], ports: [tcp/{OPEN}, udp/{first}-{last}], action: allow, log: {log}}}\n"
    )
}

/// The same files with segments that have TCP alone: what gate conn needs to be without a hook per packet.
pub(crate) fn tcp_alone(text: &str) -> String {
    text.replace("\n  default: {ingress", "\n  sockets: tcp\n  default: {ingress")
}
