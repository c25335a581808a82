//! The tables of the host itself: cgroups, addresses, endpoints; and the counters.

use super::{Datapath, Error, sys};
use segfw_common::event::{Counter, DenialCount, DenialKey, RuleCount};
use segfw_common::state::PathKey;
use segfw_common::{
    Addr, AddressEntry, CgroupEntry, EndpointEntry, EndpointKey, FlowKey, FlowValue, Listener, OriginKey, Party,
};
use std::collections::BTreeMap;

/// Counters of all CPUs, added up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By index; see [`Counter`].
    pub by_index: Vec<u64>,
    /// By rule number; 0 = no rule.
    pub by_rule: BTreeMap<u32, RuleCount>,
}

impl Counters {
    /// A named counter.
    pub fn get(&self, counter: Counter) -> u64 {
        self.by_index.get(counter as usize).copied().unwrap_or(0)
    }
}

impl Datapath {
    /// Registers or relabels a cgroup.
    pub fn set_cgroup(&self, id: u64, entry: &CgroupEntry) -> Result<(), Error> {
        sys::map_update(self.map("CGROUPS")?, &id, entry).map_err(|e| Error::sys(format!("register cgroup {id}"), e))
    }

    /// Forgets a cgroup that is gone.
    pub fn remove_cgroup(&self, id: u64) -> Result<bool, Error> {
        sys::map_delete(self.map("CGROUPS")?, &id).map_err(|e| Error::sys(format!("forget cgroup {id}"), e))
    }

    /// Every registered cgroup.
    pub fn cgroups(&self) -> Result<Vec<(u64, CgroupEntry)>, Error> {
        sys::map_dump(self.map("CGROUPS")?, 1024).map_err(|e| Error::sys("read CGROUPS", e))
    }

    /// Says what a cgroup of this path will be.
    pub fn set_path(&self, path: &PathKey, entry: &CgroupEntry) -> Result<(), Error> {
        sys::map_update(self.map("PATHS")?, path, entry).map_err(|e| Error::sys("enter a path of a workload", e))
    }

    /// A cgroup of this path is nothing special any more.
    pub fn remove_path(&self, path: &PathKey) -> Result<bool, Error> {
        sys::map_delete(self.map("PATHS")?, path).map_err(|e| Error::sys("forget a path of a workload", e))
    }

    /// Every known path.
    pub fn paths(&self) -> Result<Vec<(PathKey, CgroupEntry)>, Error> {
        sys::map_dump(self.map("PATHS")?, 256).map_err(|e| Error::sys("read PATHS", e))
    }

    /// Writes what is known of one of this host's addresses.
    pub fn set_address(&self, addr: &Addr, entry: &AddressEntry) -> Result<(), Error> {
        sys::map_update(self.map("ADDRESSES")?, addr, entry).map_err(|e| Error::sys(format!("enter address {addr}"), e))
    }

    /// Forgets an address that this host no longer has.
    pub fn remove_address(&self, addr: &Addr) -> Result<bool, Error> {
        sys::map_delete(self.map("ADDRESSES")?, addr).map_err(|e| Error::sys(format!("forget address {addr}"), e))
    }

    /// What is known of one address.
    pub fn address(&self, addr: &Addr) -> Result<Option<AddressEntry>, Error> {
        sys::map_lookup(self.map("ADDRESSES")?, addr).map_err(|e| Error::sys("read ADDRESSES", e))
    }

    /// Every address of this host.
    pub fn addresses(&self) -> Result<Vec<(Addr, AddressEntry)>, Error> {
        sys::map_dump(self.map("ADDRESSES")?, 256).map_err(|e| Error::sys("read ADDRESSES", e))
    }

    /// Enters a listener that the inventory found, by its cookie.
    pub fn set_listener(&self, cookie: u64, listener: &Listener) -> Result<(), Error> {
        sys::map_update(self.map("LISTENERS")?, &cookie, listener).map_err(|e| Error::sys("enter a listener", e))
    }

    /// Forgets a listener.
    pub fn remove_listener(&self, cookie: u64) -> Result<bool, Error> {
        sys::map_delete(self.map("LISTENERS")?, &cookie).map_err(|e| Error::sys("forget a listener", e))
    }

    /// Every known listener, by cookie.
    pub fn listeners(&self) -> Result<Vec<(u64, Listener)>, Error> {
        sys::map_dump(self.map("LISTENERS")?, 256).map_err(|e| Error::sys("read LISTENERS", e))
    }

    /// Enters an endpoint that the inventory found.
    pub fn set_endpoint(&self, key: &EndpointKey, entry: &EndpointEntry) -> Result<(), Error> {
        sys::map_update(self.map("ENDPOINTS")?, key, entry).map_err(|e| Error::sys("enter an endpoint", e))
    }

    /// One endpoint.
    pub fn endpoint(&self, key: &EndpointKey) -> Result<Option<EndpointEntry>, Error> {
        sys::map_lookup(self.map("ENDPOINTS")?, key).map_err(|e| Error::sys("read ENDPOINTS", e))
    }

    /// Forgets an endpoint that no socket has.
    pub fn remove_endpoint(&self, key: &EndpointKey) -> Result<bool, Error> {
        sys::map_delete(self.map("ENDPOINTS")?, key).map_err(|e| Error::sys("forget an endpoint", e))
    }

    /// Every endpoint. Hooks write meanwhile, so one may be missed or seen twice.
    pub fn endpoints(&self) -> Result<Vec<(EndpointKey, EndpointEntry)>, Error> {
        sys::map_dump(self.map("ENDPOINTS")?, 1024).map_err(|e| Error::sys("read ENDPOINTS", e))
    }

    /// Who opened a local connection.
    pub fn origin(&self, key: &OriginKey) -> Result<Option<Party>, Error> {
        sys::map_lookup(self.map("ORIGINS")?, key).map_err(|e| Error::sys("read ORIGINS", e))
    }

    /// Enters who opened a local connection; the hooks do this themselves.
    pub fn set_origin(&self, key: &OriginKey, party: &Party) -> Result<(), Error> {
        sys::map_update(self.map("ORIGINS")?, key, party).map_err(|e| Error::sys("enter an origin", e))
    }

    /// Forgets who opened a local connection.
    pub fn remove_origin(&self, key: &OriginKey) -> Result<bool, Error> {
        sys::map_delete(self.map("ORIGINS")?, key).map_err(|e| Error::sys("forget an origin", e))
    }

    /// Enters a datagram flow; the hooks do this themselves.
    pub fn set_flow(&self, key: &FlowKey, value: &FlowValue) -> Result<(), Error> {
        sys::map_update(self.map("FLOWS")?, key, value).map_err(|e| Error::sys("enter a flow", e))
    }

    /// Forgets a datagram flow.
    pub fn remove_flow(&self, key: &FlowKey) -> Result<bool, Error> {
        sys::map_delete(self.map("FLOWS")?, key).map_err(|e| Error::sys("forget a flow", e))
    }

    /// Tells XDP which network namespace an interface is in.
    pub fn set_xdp_netns(&self, index: u32, cookie: u64) -> Result<(), Error> {
        sys::map_update(self.map("XDP_NETNS")?, &index, &cookie).map_err(|e| Error::sys("write XDP_NETNS", e))
    }

    /// All counters, added over CPUs.
    pub fn counters(&self) -> Result<Counters, Error> {
        let cpus = possible_cpus();
        let mut counters = Counters::default();
        for index in 0..Counter::LEN {
            counters.by_index.push(self.counter(index)?);
        }
        for rule in self.keys::<u32>("RULE_COUNTERS")? {
            let mut bytes = vec![0u8; cpus * size_of::<RuleCount>()];
            if sys::map_lookup_into(self.map("RULE_COUNTERS")?, &rule, &mut bytes)
                .map_err(|e| Error::sys("read RULE_COUNTERS", e))?
            {
                let mut sum = RuleCount::default();
                for cpu in words(&bytes).chunks_exact(3) {
                    sum.allowed += cpu[0];
                    sum.denied += cpu[1];
                    sum.audit += cpu[2];
                }
                let _ = counters.by_rule.insert(rule, sum);
            }
        }
        Ok(counters)
    }

    /// One counter, summed over all processors.
    pub fn counter(&self, index: u32) -> Result<u64, Error> {
        let mut bytes = vec![0u8; possible_cpus() * 8];
        let _ = sys::map_lookup_into(self.map("COUNTERS")?, &index, &mut bytes)
            .map_err(|e| Error::sys("read COUNTERS", e))?;
        Ok(words(&bytes).iter().sum())
    }

    /// Denials that are aggregated, each counted since its entry was made. Reading takes nothing out, so nothing that is
    /// added meanwhile is lost.
    pub fn denials(&self) -> Result<Vec<(DenialKey, DenialCount)>, Error> {
        let mut all = Vec::new();
        for key in self.keys::<DenialKey>("DENIALS")? {
            if let Some(count) = self.denial(&key)? {
                all.push((key, count));
            }
        }
        Ok(all)
    }

    fn denial(&self, key: &DenialKey) -> Result<Option<DenialCount>, Error> {
        let mut bytes = vec![0u8; possible_cpus() * size_of::<DenialCount>()];
        if !sys::map_lookup_into(self.map("DENIALS")?, key, &mut bytes).map_err(|e| Error::sys("read DENIALS", e))? {
            return Ok(None);
        }
        let mut sum = DenialCount::default();
        for cpu in words(&bytes).chunks_exact(2) {
            sum.count += cpu[0];
            sum.last = sum.last.max(cpu[1]);
        }
        Ok(Some(sum))
    }

    /// Makes room: takes out an entry that nothing was added to for a while.
    pub fn forget_denial(&self, key: &DenialKey) -> Result<(), Error> {
        let _ = sys::map_delete(self.map("DENIALS")?, key).map_err(|e| Error::sys("empty DENIALS", e))?;
        Ok(())
    }

    /// The keys of a per-CPU map.
    fn keys<K: aya::Pod>(&self, name: &str) -> Result<Vec<K>, Error> {
        sys::map_keys(self.map(name)?).map_err(|e| Error::sys(format!("read the keys of {name}"), e))
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|c| u64::from_ne_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]])).collect()
}

/// CPUs the kernel keeps per-CPU values for (`/sys/devices/system/cpu/possible`), at least 1.
fn possible_cpus() -> usize {
    aya::util::nr_cpus().unwrap_or(1)
}
