//! What a reviewer should not have to look for.

use crate::setup::{install, run_quietly, tool};
use crate::{cargo, has, run, say};
use anyhow::{Result, bail};
use std::process::Command;

/// Fixed, so that a lint does not change by itself.
const CARGO_DENY: &str = "0.20.2";

pub(crate) fn lint() -> Result<()> {
    say("cargo fmt --check");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    say("clippy, user space");
    run(cargo().args([
        "clippy",
        "--quiet",
        "--workspace",
        "--exclude",
        "segfw-ebpf",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    say("clippy, eBPF");
    run(cargo()
        // Lets the stable compiler take -Z.
        .env("RUSTC_BOOTSTRAP", "1")
        .args(["clippy", "--quiet", "--package", "segfw-ebpf", "--target", "bpfel-unknown-none"])
        .args(["-Z", "build-std=core", "--", "-D", "warnings"]))?;
    deny()
}

fn deny() -> Result<()> {
    let own = tool("cargo-deny");
    let program = if own.is_file() {
        own
    } else if has("cargo-deny") {
        "cargo-deny".into()
    } else {
        // It reads some hundred manifests once: to optimise it takes longer.
        install("cargo-deny", CARGO_DENY, &["--debug"])?;
        own
    };
    let deny = |which: &[&str]| {
        let mut command = Command::new(&program);
        command.current_dir(crate::root()).args(["--log-level", "error", "check"]).args(which);
        command
    };
    say("cargo deny: licences, bans, sources");
    run(&mut deny(&["licenses", "bans", "sources"]))?;
    // Advisories live in a git repository that not every machine reaches. Without it nothing is known, which is
    // not the same as "no advisories": say so.
    let mut fetch = Command::new(&program);
    fetch.current_dir(crate::root()).args(["fetch", "db"]).env("GIT_TERMINAL_PROMPT", "0");
    if run_quietly(&mut fetch) || has_advisories() {
        say("cargo deny: advisories");
        if let Err(e) = run(deny(&["advisories"]).arg("--disable-fetch")) {
            bail!("a dependency has an advisory: {e:#}");
        }
    } else {
        say("NOT CHECKED: security advisories (the RustSec database cannot be fetched from here)");
    }
    Ok(())
}

/// True if an earlier fetch left a database; an old one is better than none.
fn has_advisories() -> bool {
    let home = std::env::var_os("CARGO_HOME").map(std::path::PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|h| std::path::Path::new(&h).join(".cargo")));
    let folders = home.and_then(|h| std::fs::read_dir(h.join("advisory-dbs")).ok());
    folders.into_iter().flatten().flatten().any(|e| e.path().join("crates").is_dir())
}
