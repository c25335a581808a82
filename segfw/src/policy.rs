//! From what a person wrote to what the kernel looks up. Pure: no file, no socket, no clock, no kernel.
//!
//! `document` (YAML as written, with positions) → `resolve` → [`HostPolicy`] → `compile` → [`Tables`].

pub mod compile;
pub mod explain;
pub mod host_policy;
#[doc(hidden)]
pub mod oracle;
pub mod plan;
pub mod tables;
pub mod window;

pub use host_policy::HostPolicy;
pub use tables::{Tables, TablesView};
