//! The harness of the system tests and of the demo: worlds of cgroups and network namespaces, actors that live in
//! them, the real agent, and the table of rows that are judged with all three.

pub mod actor;
pub mod agent;
pub mod policy;
pub mod proto;
pub mod rows;
pub mod scene;
pub mod scratch;
pub mod table;
pub mod world;

use anyhow::{Context, Result, bail};
use std::path::PathBuf;

/// The path of a binary of this workspace: beside the running one, or one folder up for a test binary.
/// `SEGFW_BIN` names another `segfw`.
pub fn binary(name: &str) -> Result<PathBuf> {
    if name == "segfw"
        && let Some(path) = std::env::var_os("SEGFW_BIN")
    {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe().context("the path of this process")?;
    let folders = own.ancestors().skip(1).take(2);
    for folder in folders {
        let candidate = folder.join(name);
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!("no binary `{name}` beside {}: run `cargo build -p segfw -p segfw-tests` first", own.display())
}
