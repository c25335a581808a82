//! Live sockets: who listens (the inventory of what is older than the agent), and which connections the policy in force
//! no longer allows (the sweep).

use crate::datapath::Datapath;
use crate::host::netns::{Namespace, Survey};
use crate::host::sockdiag::{DestroyError, Diag, Sock, State};
use crate::policy::{Tables, TablesView};
use segfw_common::decide::{Peer, standing};
use segfw_common::{
    Addr, AddressEntry, CgroupEntry, Decision, Direction, EndpointEntry, EndpointKey, Flow, FlowKey, FlowValue,
    Identity, Listener, LocalEntry, Lookup, OriginKey, Party, Peers, Proto, RuleEntry, RuleKey, bounds, decide,
    identify,
};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;

/// Everything `decide` needs, from user space: the tables as computed, the host's maps as the kernel has them.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The generation in force.
    pub tables: TablesView<'a>,
    /// For origins, endpoints and addresses.
    pub datapath: &'a Datapath,
}

impl Lookup for View<'_> {
    fn now(&self) -> u64 {
        self.tables.now()
    }
    fn host_flags(&self) -> u64 {
        self.tables.host_flags()
    }
    fn has_policy(&self) -> bool {
        true
    }
    fn local(&self, identity: Identity) -> Option<LocalEntry> {
        self.tables.local(identity)
    }
    fn class(&self, proto: Proto, port: u16) -> u16 {
        self.tables.class(proto, port)
    }
    fn rule(&self, key: &RuleKey) -> Option<RuleEntry> {
        self.tables.rule(key)
    }
    fn timeline(&self, index: u32) -> Option<RuleEntry> {
        self.tables.timeline(index)
    }
    fn prefix(&self, addr: &Addr) -> Option<Identity> {
        self.tables.prefix(addr)
    }
}

impl Peers for View<'_> {
    fn origin(&self, key: &OriginKey) -> Option<Party> {
        self.datapath.origin(key).ok().flatten()
    }
    fn endpoint(&self, key: &EndpointKey) -> Option<Party> {
        let entry = self.datapath.endpoint(key).ok().flatten()?;
        Some(Party { identity: entry.identity, workload: entry.workload })
    }
    fn address(&self, addr: &Addr) -> Option<AddressEntry> {
        self.datapath.address(addr).ok().flatten()
    }
}

/// A live connection that is no longer allowed.
#[derive(Clone, Debug)]
pub struct Cut {
    /// As its local end sees it.
    pub flow: Flow,
    /// Who the other end is.
    pub peer: Peer,
    /// Why.
    pub decision: Decision,
    /// Cgroup of the local socket.
    pub cgroup: u64,
    /// The kernel's word if it could not be ended; the hooks refuse its packets all the same.
    pub failed: Option<String>,
}

/// What a sweep did.
#[derive(Debug, Default)]
pub struct Swept {
    /// Sockets that were judged.
    pub judged: usize,
    /// Ended.
    pub cut: Vec<Cut>,
    /// Cookies of connections that are being drained: not allowed, but not ended yet. With the boot time of their end.
    pub draining: BTreeMap<u64, u64>,
}

/// Identity of a socket's cgroup.
fn owner(cgroups: &BTreeMap<u64, CgroupEntry>, sock: &Sock) -> Option<(u64, CgroupEntry)> {
    let id = sock.cgroup?;
    let host = CgroupEntry { identity: Identity::HOST.0, ..CgroupEntry::default() };
    Some((id, cgroups.get(&id).copied().unwrap_or(host)))
}

fn parts(address: SocketAddr) -> (Addr, u16) {
    (Addr::from(address.ip()), address.port())
}

/// Judges every live connection of a namespace and ends those that must end.
pub fn sweep(
    namespace: &Namespace,
    view: &View<'_>,
    cgroups: &BTreeMap<u64, CgroupEntry>,
    draining: &BTreeMap<u64, u64>,
    swept: &mut Swept,
) -> Result<(), crate::host::sockdiag::Error> {
    let mut diag = Diag::open(namespace)?;
    let mut socks = Vec::new();
    for protocol in [Sock::TCP, Sock::UDP] {
        for v6 in [false, true] {
            socks.extend(diag.inet(v6, protocol)?);
        }
    }
    let listeners: HashSet<(u16, u16)> =
        socks.iter().filter(|s| s.state == State::Listen).map(|s| (s.protocol, s.canonical().0.port())).collect();
    let mut doomed: Vec<(&Sock, Cut)> = Vec::new();
    for sock in &socks {
        let connected = match sock.protocol {
            Sock::TCP => is_connected(sock),
            _ => sock.remote.port() != 0,
        };
        let Some((cgroup, entry)) = owner(cgroups, sock).filter(|_| connected) else { continue };
        if standing(view, Identity(entry.identity)).is_none() {
            continue;
        }
        swept.judged += 1;
        let (local, remote) = sock.canonical();
        let ((local_addr, local_port), (remote_addr, remote_port)) = (parts(local), parts(remote));
        let inbound = listeners.contains(&(sock.protocol, local_port));
        let mut flow = Flow {
            direction: if inbound { Direction::Ingress } else { Direction::Egress },
            protocol: sock.protocol,
            local: Identity(entry.identity),
            workload: entry.workload,
            netns: namespace.cookie,
            local_addr,
            remote_addr,
            local_port,
            remote_port,
        };
        let peer = identify(view, &flow);
        let decision = decide(view, &flow, &peer);
        if decision.passes() {
            continue;
        }
        // A connected UDP socket may also answer somebody who was let in.
        if sock.protocol == Sock::UDP {
            flow.direction = Direction::Ingress;
            let peer = identify(view, &flow);
            if decide(view, &flow, &peer).passes() {
                continue;
            }
            flow.direction = Direction::Egress;
        }
        if decision.drain_ns == u64::MAX {
            continue;
        }
        if decision.drain_ns != 0 {
            let end = draining.get(&sock.cookie).copied().unwrap_or(view.now().saturating_add(decision.drain_ns));
            if view.now() < end {
                let _ = swept.draining.insert(sock.cookie, end);
                continue;
            }
        }
        doomed.push((sock, Cut { flow, peer, decision, cgroup, failed: None }));
    }
    let results = diag.destroy_all(doomed.iter().map(|(sock, _)| *sock));
    for ((_, mut cut), result) in doomed.into_iter().zip(results) {
        match result {
            // It ended by itself meanwhile, or was never there: the wish is fulfilled.
            Ok(()) | Err(DestroyError::Gone) => {}
            Err(error) => cut.failed = Some(error.to_string()),
        }
        swept.cut.push(cut);
    }
    Ok(())
}

/// Endpoints of a namespace as the kernel has them now: TCP listeners and bound UDP sockets.
pub fn endpoints(
    namespace: &Namespace,
    cgroups: &BTreeMap<u64, CgroupEntry>,
    found: &mut BTreeMap<EndpointKey, EndpointEntry>,
) -> Result<(), crate::host::sockdiag::Error> {
    let mut diag = Diag::open(namespace)?;
    for protocol in [Sock::TCP, Sock::UDP, Sock::UDPLITE] {
        for v6 in [false, true] {
            let socks = match if protocol == Sock::TCP { diag.listeners(v6) } else { diag.inet(v6, protocol) } {
                Ok(socks) => socks,
                // A protocol this kernel does not have has no sockets.
                Err(_) if protocol == Sock::UDPLITE => continue,
                Err(e) => return Err(e),
            };
            for sock in socks {
                if protocol == Sock::TCP && sock.state != State::Listen {
                    continue;
                }
                let Some((_, entry)) = owner(cgroups, &sock) else { continue };
                let (addr, port) = parts(sock.canonical().0);
                let key = EndpointKey { netns: namespace.cookie, addr, port, protocol, pad: 0 };
                let one = EndpointEntry { identity: entry.identity, workload: entry.workload, sockets: 1 };
                let _ = found
                    .entry(key)
                    .and_modify(|e| {
                        e.sockets += 1;
                        if e.identity != entry.identity {
                            e.identity = Identity::UNRESOLVED.0;
                            e.workload = 0;
                        } else if e.workload != entry.workload {
                            e.workload = 0;
                        }
                    })
                    .or_insert(one);
            }
        }
    }
    Ok(())
}

/// TCP listeners of a namespace, by cookie. With `part` only those of cgroups that are ours.
pub fn listeners(
    namespace: &Namespace,
    cgroups: &BTreeMap<u64, CgroupEntry>,
    part: bool,
    found: &mut BTreeMap<u64, Listener>,
) -> Result<(), crate::host::sockdiag::Error> {
    let mut diag = Diag::open(namespace)?;
    for v6 in [false, true] {
        for sock in diag.inet(v6, Sock::TCP)?.iter().filter(|s| s.state == State::Listen) {
            let Some((cgroup, entry)) = owner(cgroups, sock) else { continue };
            if part && !cgroups.contains_key(&cgroup) {
                continue;
            }
            let (identity, workload) = (entry.identity, entry.workload);
            let _ = found.insert(sock.cookie, Listener { netns: namespace.cookie, cgroup, identity, workload });
        }
    }
    Ok(())
}

/// Has a workload that the policy enforces a socket for datagrams, or a raw one, in this namespace?
pub fn has_datagrams(
    namespace: &Namespace,
    view: &View<'_>,
    cgroups: &BTreeMap<u64, CgroupEntry>,
) -> Result<bool, crate::host::sockdiag::Error> {
    let mut diag = Diag::open(namespace)?;
    let enforced =
        |sock: &Sock| owner(cgroups, sock).is_some_and(|(_, entry)| standing(view, Identity(entry.identity)).is_some());
    for (protocol, must) in [(Sock::UDP, true), (Sock::UDPLITE, false), (Sock::RAW, false)] {
        for v6 in [false, true] {
            match diag.inet(v6, protocol) {
                Ok(socks) if socks.iter().any(enforced) => return Ok(true),
                Ok(_) => {}
                Err(error) if must => return Err(error),
                // A kernel that cannot list them: the grant for such sockets alone keeps the hook.
                Err(_) => {}
            }
        }
    }
    Ok(false)
}

/// Who opened the connections within this host that are older than the hooks: what `tcp_life` would have written. Only ends
/// that opened, and only towards addresses for which `is_local` holds: nobody else is asked for an origin.
pub fn origins(
    namespace: &Namespace,
    cgroups: &BTreeMap<u64, CgroupEntry>,
    is_local: impl Fn(&Addr) -> bool,
    found: &mut BTreeMap<OriginKey, Party>,
) -> Result<(), crate::host::sockdiag::Error> {
    let mut diag = Diag::open(namespace)?;
    let mut socks = diag.inet(false, Sock::TCP)?;
    socks.extend(diag.inet(true, Sock::TCP)?);
    let listeners: HashSet<u16> =
        socks.iter().filter(|s| s.state == State::Listen).map(|s| s.canonical().0.port()).collect();
    for sock in socks.iter().filter(|s| is_connected(s)) {
        let Some((_, entry)) = owner(cgroups, sock) else { continue };
        let (local, remote) = sock.canonical();
        let ((client, client_port), (server, server_port)) = (parts(local), parts(remote));
        if listeners.contains(&client_port) || !(server.is_loopback() || is_local(&server)) {
            continue;
        }
        // Addresses in a namespace that somebody made for himself are whatever he likes (see `addresses`).
        if namespace.self_made && !server.is_loopback() {
            continue;
        }
        let netns = if server.is_loopback() { namespace.cookie } else { 0 };
        let key = OriginKey { netns, client, server, client_port, server_port, pad: 0 };
        let _ = found.insert(key, Party { identity: entry.identity, workload: entry.workload });
        if found.len() == bounds::ORIGINS as usize {
            break;
        }
    }
    Ok(())
}

/// Datagram flows of connected sockets that are older than the hooks: `send` meets none of them, so the answers would be new
/// flows for ever. Of no generation: the first answer has the flow judged as it was opened.
pub fn datagram_flows(
    namespace: &Namespace,
    cgroups: &BTreeMap<u64, CgroupEntry>,
    now: u64,
    found: &mut BTreeMap<FlowKey, FlowValue>,
) -> Result<(), crate::host::sockdiag::Error> {
    let mut diag = Diag::open(namespace)?;
    let mut socks = diag.inet(false, Sock::UDP)?;
    socks.extend(diag.inet(true, Sock::UDP)?);
    for sock in socks.iter().filter(|s| s.remote.port() != 0) {
        let Some((_, entry)) = owner(cgroups, sock) else { continue };
        let (local, remote) = sock.canonical();
        let ((_, local_port), (remote, remote_port)) = (parts(local), parts(remote));
        let key = FlowKey { netns: namespace.cookie, remote, remote_port, local_port, protocol: Sock::UDP, pad: 0 };
        let direction = Direction::Egress as u8;
        let value = FlowValue { seen: now, local: entry.identity, direction, ..FlowValue::default() };
        let _ = found.insert(key, value);
        if found.len() == bounds::FLOWS as usize {
            break;
        }
    }
    Ok(())
}

/// A TCP socket with two ends, both alive.
fn is_connected(sock: &Sock) -> bool {
    !matches!(sock.state, State::Listen | State::TimeWait | State::Close | State::SynReceived)
}

/// Addresses of all namespaces, and who can be told by the address alone.
pub fn addresses(survey: &Survey, identity_of: impl Fn(&str) -> u32) -> BTreeMap<Addr, AddressEntry> {
    let mut all: BTreeMap<Addr, AddressEntry> = BTreeMap::new();
    // A workload that gives itself the address of its database in a namespace of its own is not that database.
    for namespace in survey.namespaces.iter().filter(|n| !n.self_made) {
        // In the host's own namespace anybody may be behind an address; where nobody listens, it is the host.
        let identities: BTreeSet<u32> = namespace.cgroups.iter().map(|path| identity_of(path)).collect();
        let alone = if identities.len() == 1 { identities.first().copied() } else { None };
        let (as_destination, as_source) = if namespace.own {
            (Identity::HOST.0, Identity::UNRESOLVED.0)
        } else {
            let identity = alone.unwrap_or(Identity::UNRESOLVED.0);
            (identity, identity)
        };
        for ip in &namespace.addresses {
            let addr = Addr::from(*ip);
            if addr.is_loopback() {
                continue;
            }
            let one = AddressEntry { netns: namespace.cookie, as_destination, as_source };
            let _ = all
                .entry(addr)
                // Two namespaces have it (every namespace may use the same private range): nobody can be told by it.
                .and_modify(|e| {
                    *e = AddressEntry {
                        netns: 0,
                        as_destination: Identity::UNRESOLVED.0,
                        as_source: Identity::UNRESOLVED.0,
                    }
                })
                .or_insert(one);
        }
    }
    all
}

/// Boot times at which some answer of these tables changes by itself, ascending, each once.
pub fn deadlines(tables: &Tables) -> Vec<u64> {
    let entries = tables.rules.values().chain(&tables.timeline);
    let mut all: Vec<u64> = entries.map(|e| e.until).filter(|until| *until != 0).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The first of them after `looked`.
pub fn next_deadline(deadlines: &[u64], looked: u64) -> Option<u64> {
    deadlines.get(deadlines.partition_point(|at| *at <= looked)).copied()
}
