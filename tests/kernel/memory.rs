//! What the kernel's maps hold, once more in memory: `decide` in user space over the same tables and the same peers.

use anyhow::Result;
use segfw::datapath::{Datapath, sys};
use segfw::policy::{Tables, TablesView};
use segfw_common::probe::{Answer, Question};
use segfw_common::{
    Addr, AddressEntry, EndpointEntry, EndpointKey, Flow, Identity, LocalEntry, Lookup, OriginKey, Party, Peers, Proto,
    RuleEntry, RuleKey, decide, identify,
};
use std::collections::BTreeMap;

/// Origins, endpoints and addresses.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub(crate) origins: BTreeMap<OriginKey, Party>,
    pub(crate) endpoints: BTreeMap<EndpointKey, Party>,
    pub(crate) addresses: BTreeMap<Addr, AddressEntry>,
}

impl Known {
    /// Writes everything into the kernel.
    pub(crate) fn enter(&self, datapath: &Datapath) -> Result<()> {
        for (key, party) in &self.origins {
            datapath.set_origin(key, party)?;
        }
        for (key, party) in &self.endpoints {
            let entry = EndpointEntry { identity: party.identity, workload: party.workload, sockets: 1 };
            datapath.set_endpoint(key, &entry)?;
        }
        for (addr, entry) in &self.addresses {
            datapath.set_address(addr, entry)?;
        }
        Ok(())
    }

    /// Takes everything out again.
    pub(crate) fn leave(&self, datapath: &Datapath) -> Result<()> {
        for key in self.origins.keys() {
            let _ = datapath.remove_origin(key)?;
        }
        for key in self.endpoints.keys() {
            let _ = datapath.remove_endpoint(key)?;
        }
        for addr in self.addresses.keys() {
            let _ = datapath.remove_address(addr)?;
        }
        Ok(())
    }
}

/// Everything that `identify` and `decide` ask.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a> {
    pub(crate) view: TablesView<'a>,
    pub(crate) known: &'a Known,
}

impl<'a> Memory<'a> {
    pub(crate) fn new(tables: &'a Tables, known: &'a Known, host_flags: u64) -> Self {
        Self { view: TablesView { tables, now: boot_ns(), host_flags }, known }
    }

    /// What the probe has to say.
    pub(crate) fn answer(&self, flow: &Flow) -> Answer {
        let peer = identify(self, flow);
        Answer::new(&peer, &decide(self, flow, &peer))
    }
}

impl Lookup for Memory<'_> {
    fn now(&self) -> u64 {
        self.view.now()
    }
    fn host_flags(&self) -> u64 {
        self.view.host_flags()
    }
    fn has_policy(&self) -> bool {
        true
    }
    fn local(&self, identity: Identity) -> Option<LocalEntry> {
        self.view.local(identity)
    }
    fn class(&self, proto: Proto, port: u16) -> u16 {
        self.view.class(proto, port)
    }
    fn rule(&self, key: &RuleKey) -> Option<RuleEntry> {
        self.view.rule(key)
    }
    fn timeline(&self, index: u32) -> Option<RuleEntry> {
        self.view.timeline(index)
    }
    fn prefix(&self, addr: &Addr) -> Option<Identity> {
        self.view.prefix(addr)
    }
}

impl Peers for Memory<'_> {
    fn origin(&self, key: &OriginKey) -> Option<Party> {
        self.known.origins.get(key).copied()
    }
    fn endpoint(&self, key: &EndpointKey) -> Option<Party> {
        self.known.endpoints.get(key).copied()
    }
    fn address(&self, addr: &Addr) -> Option<AddressEntry> {
        self.known.addresses.get(addr).copied()
    }
}

/// Asks the kernel.
pub(crate) fn probe(datapath: &Datapath, flow: &Flow) -> Result<Answer> {
    // No program writes this, so an answer that was not given cannot look like one.
    let blank = Answer { until: u64::MAX, drain_ns: 77, identity: u32::MAX, verdict: 99, ..Answer::default() };
    sys::map_update(datapath.map("PROBE")?, &0u32, &blank)?;
    ask(datapath, flow)
}

/// [`probe`] without the precaution.
pub(crate) fn ask(datapath: &Datapath, flow: &Flow) -> Result<Answer> {
    let question = Question::from(*flow);
    // An Ethernet header, which the kernel takes off, and the question.
    let mut packet = [0u8; 14 + size_of::<Question>()];
    // SAFETY: `Question` is plain data without padding.
    let bytes: [u8; size_of::<Question>()] = unsafe { std::mem::transmute(question) };
    packet[14..].copy_from_slice(&bytes);
    let returned = datapath.test_run("probe_decide", &packet)?;
    anyhow::ensure!(returned == 1, "probe_decide returned {returned}");
    let answer = sys::map_lookup::<u32, Answer>(datapath.map("PROBE")?, &0)?;
    answer.ok_or_else(|| anyhow::anyhow!("PROBE is empty"))
}

/// `CLOCK_BOOTTIME`.
pub(crate) fn boot_ns() -> u64 {
    let t = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("every Linux has it");
    t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64
}
