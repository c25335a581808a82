//! Which gates stand: gate conn where the kernel lets us, the list of address families, and gate skb wherever something
//! of what is in force needs a call per packet.

use super::*;
use crate::config::GateChoice;
use crate::datapath::attach::INGRESS;
use crate::datapath::guard::Difference;
use crate::datapath::security::{CONN, Check, Door, FAMILY};
use segfw_common::{Listener, LocalEntry};

/// The trouble of a gate that the settings demand and that is not there.
const NO_CONN: &str = "gate";

impl Core {
    /// The security checks, tried out. Once for each agent, and again when the guard finds one that does not answer.
    pub(super) fn attach_checks(&mut self) {
        let conn = match self.config.gate {
            GateChoice::Skb => Err("the settings say gate: skb".to_owned()),
            // What listens now is older than gate conn, which knows listeners by name only.
            GateChoice::Auto | GateChoice::Conn => match self.namespaces() {
                Some(survey) => self.write_listeners(&survey),
                None => Err("listeners cannot be listed: no namespace can".to_owned()),
            },
        };
        let checks = self.datapath.attach_checks(conn);
        match (&checks.conn, self.config.gate) {
            (Err(why), GateChoice::Conn) => {
                let what = format!("the settings say gate: conn, and it is not there: {why}");
                tracing::error!("{what}");
                let action = "see segfw doctor; or write gate: auto";
                let consequence = "gate skb judges instead: the same answers, at a cost per packet";
                let _ = self.troubles.insert(NO_CONN, trouble(&what, consequence, action));
            }
            (Ok(_), _) | (Err(_), GateChoice::Auto | GateChoice::Skb) => {
                let _ = self.troubles.remove(NO_CONN);
            }
        }
        tracing::info!(conn = ?checks.conn, families = ?checks.family, "security checks");
        self.checks = Some(checks);
    }

    /// Listeners that gate conn does not know yet, or knows under a name that is not theirs any more. What was entered here
    /// and is gone is taken out; what the kernel entered it takes out itself.
    pub(super) fn write_listeners(&mut self, survey: &netns::Survey) -> Result<(), String> {
        let part = self.is_part();
        let mut found = BTreeMap::new();
        for namespace in &survey.namespaces {
            live::listeners(namespace, &self.cgroups, part, &mut found)
                .map_err(|e| format!("listeners of namespace {} cannot be listed: {e}", namespace.cookie))?;
        }
        let have: BTreeMap<u64, Listener> = self.datapath.listeners().map_err(|e| e.to_string())?.into_iter().collect();
        let known: BTreeSet<u64> = survey.namespaces.iter().map(|n| n.cookie).collect();
        self.unseen = have.values().any(|listener| listener.netns != 0 && !known.contains(&listener.netns));
        for (cookie, listener) in &found {
            let known = have.get(cookie);
            if known.is_none_or(|h| h.netns == 0 || h.cgroup == 0) {
                self.datapath.set_listener(*cookie, listener).map_err(|e| e.to_string())?;
                if known.is_none() {
                    let _ = self.listeners.insert(*cookie);
                }
            }
        }
        for cookie in self.listeners.iter().filter(|c| !found.contains_key(c)) {
            self.datapath.remove_listener(*cookie).map_err(|e| e.to_string())?;
        }
        self.listeners.retain(|cookie| found.contains_key(cookie));
        Ok(())
    }

    /// Does this agent answer for a part of the cgroup tree only?
    pub(super) fn is_part(&self) -> bool {
        self.config.cgroup_root.strip_prefix(&self.hierarchy.mount).is_ok_and(|rest| !rest.as_os_str().is_empty())
    }

    /// Every packet is judged from now on: before a switch, so that what it revokes is refused from its very moment on and
    /// not only when the sweep comes to it; and where gate conn does not answer.
    pub(super) fn judge_packets(&mut self) -> anyhow::Result<()> {
        let root = std::fs::File::open(&self.config.cgroup_root)?;
        let _ = self.datapath.attach(INGRESS, &root)?;
        self.ingress = true;
        self.tcp_by_conn = false;
        self.set_flags()
    }

    /// The end of that: TCP is left to gate conn where that stands, no rule has an end and no connection drains (ends that the
    /// kernel alone must hold, and an open connection meets no other hook), and the hook is taken away where nothing else
    /// needs it. To be called after a sweep: what was revoked has ended then.
    pub(super) fn settle_packets(&mut self, survey: &netns::Survey) {
        // A sweep that could not see or end everything leaves connections that nothing else refuses.
        let whole = self.last_sweep.is_some() && survey.skipped.is_empty() && !self.unseen;
        let swept = self.config.monitor || whole;
        let endless = self.draining.is_empty() && self.in_force.as_ref().is_some_and(|f| f.deadlines.is_empty());
        let by_conn = swept && self.has_conn() && endless;
        let done = if !by_conn {
            if self.tcp_by_conn || !self.ingress { self.judge_packets() } else { Ok(()) }
        } else {
            self.leave_tcp().and_then(|()| match (self.needs_ingress(survey), self.ingress) {
                (true, false) => self.judge_packets().and_then(|()| self.leave_tcp()),
                (false, true) => {
                    self.ingress = false;
                    self.datapath.drop_hook(INGRESS).map_err(anyhow::Error::from)
                }
                (true, true) | (false, false) => Ok(()),
            })
        };
        if let Err(error) = done {
            tracing::error!("{error:#}");
        }
    }

    fn leave_tcp(&mut self) -> anyhow::Result<()> {
        if self.tcp_by_conn {
            return Ok(());
        }
        self.tcp_by_conn = true;
        self.set_flags()
    }

    fn needs_ingress(&self, survey: &netns::Survey) -> bool {
        let Some(f) = &self.in_force else { return true };
        if needs_ingress(&f.tables) {
            return true;
        }
        // Datagram sockets from before their segment was tcpOnly; if they cannot be listed they are held to be there.
        let view = View { tables: TablesView { tables: &f.tables, now: 0, host_flags: 0 }, datapath: &self.datapath };
        survey.namespaces.iter().any(|n| live::has_datagrams(n, &view, &self.cgroups).unwrap_or(true))
    }

    /// Is gate conn at work?
    pub(super) fn has_conn(&self) -> bool {
        self.checks.as_ref().is_some_and(|checks| checks.conn.is_ok())
    }

    /// Are the checks' programs still behind their links, and still asked? One that is not is attached again.
    pub(super) fn guard_checks(&mut self) -> Vec<Difference> {
        let Some(checks) = self.checks.clone() else { return Vec::new() };
        let stands = |check: Check, was: &Result<Door, String>| -> Result<(), String> {
            match was {
                Ok(_) if !self.datapath.has_check(check) => Err("its pin was gone, or the link".to_owned()),
                Ok(_) => self.datapath.asks(check).unwrap_or(Ok(())),
                Err(_) => Ok(()),
            }
        };
        let all = [(CONN, stands(CONN, &checks.conn)), (FAMILY, stands(FAMILY, &checks.family))];
        let lost: Vec<(Check, String)> = all.into_iter().filter_map(|(check, was)| Some((check, was.err()?))).collect();
        if lost.is_empty() {
            return Vec::new();
        }
        // Until it is known that they are back the other gate judges.
        let mended = self.judge_packets().map_err(|e| format!("{e:#}"));
        self.attach_checks();
        let now = self.checks.clone();
        let of = |check: Check| match (&now, check == CONN) {
            (Some(now), true) => now.conn.clone().map(drop),
            (Some(now), false) => now.family.clone().map(drop),
            (None, _) => Ok(()),
        };
        lost.into_iter()
            .map(|(check, found)| {
                let mended = mended.clone().and_then(|()| of(check));
                Difference::new(format!("hook {}", check.program), found, mended)
            })
            .collect()
    }

    /// What `segfw status` says of the gate.
    pub(super) fn gate(&self) -> report::Gate {
        let (name, why) = match self.checks.as_ref().map(|c| &c.conn) {
            Some(Ok(door)) if !self.ingress => {
                ("conn", format!("inet_conn_request by {}; nothing is attached per packet", door.as_str()))
            }
            Some(Ok(door)) => {
                let (door, what) = (door.as_str(), if self.tcp_by_conn { "all but TCP" } else { "every packet" });
                (
                    "conn",
                    format!(
                        "inet_conn_request by {door}; cgroup_skb/ingress sees {what}, since {}",
                        self.why_packets()
                    ),
                )
            }
            Some(Err(why)) => ("skb", format!("cgroup_skb/ingress; no gate conn: {why}")),
            None => ("skb", "cgroup_skb/ingress".to_owned()),
        };
        report::Gate { name: name.to_owned(), why }
    }

    fn why_packets(&self) -> &'static str {
        match &self.in_force {
            Some(f) if !f.deadlines.is_empty() => "a rule has an end",
            Some(f) if needs_ingress(&f.tables) => "not every segment is `sockets: tcp`",
            Some(_) if self.tcp_by_conn => "a datagram socket from before is left",
            Some(_) | None => "live connections are being looked at",
        }
    }

    /// What `segfw status` says of the list of address families.
    pub(super) fn families(&self) -> report::Gate {
        let (name, why) = match self.checks.as_ref().map(|c| &c.family) {
            Some(Ok(door)) => ("listed", format!("socket_create by {}", door.as_str())),
            Some(Err(why)) => ("open", why.clone()),
            None => ("open", "no policy was in force yet".to_owned()),
        };
        report::Gate { name: name.to_owned(), why }
    }
}

/// Does something besides TCP come in that must be judged? A segment may have UDP sockets, or others whose packets no other
/// hook sees come in; in monitor mode its datagrams are to be recorded.
pub(crate) fn needs_ingress(tables: &Tables) -> bool {
    let packets = |l: &LocalEntry| {
        l.flags & LocalEntry::TCP_ONLY == 0
            || l.flags & LocalEntry::MONITOR != 0
            || l.grants & LocalEntry::GRANTS_BY_PACKET != 0
    };
    let judged = tables.locals.iter().filter(|(id, l)| !id.is_canary() && l.flags & LocalEntry::OPEN == 0);
    judged.map(|(_, l)| l).any(packets)
}
