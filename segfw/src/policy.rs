//! From what a person wrote to what the kernel looks up. Pure: no file, no socket, no clock, no kernel.
//!
//! `document` (YAML as written, with positions) → `resolve` → [`HostPolicy`] → `compile` → [`Tables`].

pub mod host_policy;
pub mod ports;
pub mod problem;
pub mod schedule;
pub mod selector;
pub mod tables;
pub mod yaml;

pub use host_policy::HostPolicy;
pub use tables::Tables;
