//! From what a person wrote to what the kernel looks up. Pure: no file, no socket, no clock, no kernel.
//!
//! `document` (YAML as written, with positions) → `resolve` → [`HostPolicy`] → `compile` → [`Tables`].
//! The one exception is `load`, which reads a folder into memory for `document`.

pub mod compile;
pub mod container;
pub mod difference;
pub mod document;
pub mod explain;
pub mod host_policy;
pub mod inventory;
pub mod load;
#[doc(hidden)]
pub mod oracle;
pub mod plan;
pub mod ports;
pub mod problem;
pub mod resolve;
pub mod schedule;
pub mod schema;
pub mod selector;
pub mod tables;
pub mod window;
pub mod workload;
pub mod yaml;

pub use container::{ContainerFacts, PodFacts};
pub use document::{Document, fuzz_yaml, parse};
pub use host_policy::HostPolicy;
pub use inventory::{Inventory, Known};
pub use load::read_dir_recursive;
pub use problem::{Problem, Problems, Severity};
pub use resolve::{HostSettings, digest, read, resolve};
pub use tables::{Tables, TablesView};
pub use workload::{CgroupFacts, UnitFacts, UserFacts, Workloads, conflicts, labels_for, managed_parents};

#[cfg(test)]
mod tests;
