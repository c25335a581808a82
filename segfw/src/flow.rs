//! Facts come up: the kernel's events become records with words, are kept for a while, filtered and shown. Pure but for
//! `spool`: no file, no socket, no kernel; a number it has no name for stays visible as a number.
//!
//! `decode` (bytes → event) → `sequence` (what is missing) → `record` (event → [`Record`]) → `history` (kept, followed)
//! and `spool` (on disk) → `query` (which of them) → `render` and `export` (as text; `line` is the spool's
//! own). `intake` does the first four for the agent's main loop.

pub mod coded;
pub mod decode;
pub mod export;
pub mod fuzz;
pub mod history;
pub mod intake;
pub mod line;
pub mod query;
pub mod record;
pub mod render;
pub mod sequence;
pub mod spool;

pub use coded::{Coded, Shared, Text};
pub use decode::decode;
pub use history::History;
pub use intake::Intake;
pub use query::{Filter, Query};
pub use record::{Item, Loss, Names, Record, enrich};
pub use sequence::Sequences;
