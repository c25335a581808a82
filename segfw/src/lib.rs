//! segfw in user space, in reading order: intent goes down (`policy` → `datapath`), facts come up (`datapath` → `flow`).
//!
//! * [`policy`]: pure. YAML text in, plain tables out. No I/O, no clock of its own.
//! * [`flow`]: pure. Kernel events in, records with words out.
//! * [`host`]: what this machine is: cgroups, namespaces, addresses, sockets.
//! * [`datapath`]: the only module that names aya; every bpf(2) call is made there.
//! * [`agent`]: owns the tasks; [`control`] is its door; [`cli`] is the only place that prints.

pub mod agent;
pub mod cli;
pub mod config;
pub mod control;
pub mod datapath;
pub mod flow;
pub mod host;
pub mod policy;
