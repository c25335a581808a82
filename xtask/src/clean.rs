//! Back to a fresh checkout, with the tools kept: they take minutes to build and do not change.

use crate::{cargo, is_root, say, target};
use anyhow::Result;
use std::process::Command;

fn sweep() {
    let demo = target().join("debug/segfw-demo");
    if is_root() && demo.is_file() {
        // Its first act is the sweep; with this option also its last one.
        let _ = crate::run(Command::new(demo).arg("--sweep"));
    }
}

fn packages() -> Result<()> {
    let mut command = cargo();
    command.arg("clean");
    for package in ["segfw", "segfw-common", "segfw-tests"] {
        command.args(["--package", package]);
    }
    crate::run(&mut command)
}

pub(crate) fn run() -> Result<()> {
    sweep();
    crate::vm::clean();
    packages()?;
    say(
        "clean (target/tools, kernels in target/vm and the dependencies' builds are kept; `cargo clean` removes them too)",
    );
    Ok(())
}
