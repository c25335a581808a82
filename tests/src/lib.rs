//! The harness of the system tests and of the demo: worlds of cgroups and network namespaces, actors that live in
//! them, the real agent, and the table of rows that are judged with all three.

pub mod actor;
pub mod agent;
pub mod expected;
pub mod policy;
pub mod proto;
pub mod rows;
pub mod scene;
pub mod scratch;
pub mod table;
pub mod world;

use anyhow::{Context, Result, bail};
use std::path::PathBuf;

/// How many times slower than hardware this machine is: 1, or what `SEGFW_TEST_SLOWNESS` says. `cargo xtask vm` sets it for
/// emulated guests. Whoever waits for something that must come waits so much longer; no expectation changes.
pub fn slowness() -> u32 {
    static SLOWNESS: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *SLOWNESS.get_or_init(|| {
        std::env::var("SEGFW_TEST_SLOWNESS").ok().and_then(|text| text.parse().ok()).filter(|n| *n > 0).unwrap_or(1)
    })
}

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
