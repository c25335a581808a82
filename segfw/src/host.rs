//! What this machine is: cgroups, network namespaces, addresses, sockets. Facts only: no policy language, no aya.
//!
//! * [`cgroup`]: the cgroup2 tree and its changes. The id of a cgroup is the key that the hooks see.
//! * [`netns`]: every network namespace, its cookie, its addresses, who lives in it; and how to act inside one.
//! * [`sockdiag`]: every socket of a namespace, and how to destroy one.
//! * [`answer`]: RST or port unreachable for an inbound flow that was rejected.
//! * [`runtime`]: container runtimes: which containers there are, their images, names and labels.
//! * [`proc`]: clocks, names of processes, privileges.
//! * [`doctor`]: what this kernel can and cannot do, as plain data.
//!
//! Nothing here prints or decides. Everything blocks for microseconds to milliseconds, except [`cgroup::Watcher::next`]
//! and [`runtime::Runtimes::list`], which are async: call the rest through `spawn_blocking` where a scan of thousands of sockets would hurt.

pub mod answer;
pub mod cgroup;
pub mod doctor;
pub mod netns;
pub mod proc;
pub mod runtime;
pub mod sockdiag;

#[cfg(test)]
mod testing;
