//! What a fresh machine lacks. Says what it installs, and what it cannot.

use crate::{cargo, has, is_root, root, say};
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The one that produces what our loader takes.
const BPF_LINKER: &str = "0.10.3";

/// A command, and the Debian package that brings it.
type Package = (&'static str, &'static str);
/// What the demo, the benchmark and every system test use.
const NAMESPACES: Package = ("ip", "iproute2");
/// What some tests use: programs that people run beside segfw, started for real.
const BESIDE: [Package; 10] = [
    ("busybox", "busybox-static"),
    ("podman", "podman"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("buildah", "buildah"),
    ("systemd-nspawn", "systemd-container"),
    ("mmdebstrap", "mmdebstrap"),
    ("prometheus", "prometheus"),
    ("rpm", "rpm"),
    ("man", "man-db"),
];

/// Counts instructions of user space.
const COUNTER: Package = ("valgrind", "valgrind");

/// What the benchmark compares with.
const PEERS: [Package; 4] = [
    ("nft", "nftables"),
    ("iptables-legacy-restore", "iptables"),
    ("iptables-nft-restore", "iptables"),
    ("ipset", "ipset"),
];

/// True if it ran and was content.
pub(crate) fn run_quietly(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// Everything that building and testing needs.
pub(crate) fn run() -> Result<()> {
    build_tools()?;
    packages(&[&[NAMESPACES][..], &BESIDE].concat())
}

/// What building and running the demo needs.
pub(crate) fn to_run() -> Result<()> {
    build_tools()?;
    packages(&[NAMESPACES])
}

/// What building and running the benchmark needs.
pub(crate) fn to_bench() -> Result<()> {
    build_tools()?;
    packages(&[&[NAMESPACES][..], &PEERS].concat())
}

/// What counting instructions needs beside a guest (`vm::fetch` sees to that).
pub(crate) fn to_count() -> Result<()> {
    build_tools()?;
    packages(&[NAMESPACES, COUNTER])?;
    anyhow::ensure!(has(COUNTER.0), "there is no {}: install the package {} (Debian's name)", COUNTER.0, COUNTER.1);
    Ok(())
}

/// What building needs.
pub(crate) fn build_tools() -> Result<()> {
    rust_src()?;
    let linker = tool("bpf-linker");
    if version(&linker).as_deref() != Some(BPF_LINKER) {
        install("bpf-linker", BPF_LINKER, &[])?;
    }
    Ok(())
}

/// eBPF is built with `-Z build-std=core`, which compiles `core` from its sources.
fn rust_src() -> Result<()> {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).current_dir(root()).output().context("rustc")?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot.stdout).trim());
    if sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
        return Ok(());
    }
    say("installing rust-src (rustup component add)");
    if !has("rustup") {
        bail!("rust-src is missing and there is no rustup: install your distribution's Rust source package");
    }
    crate::run(Command::new("rustup").args(["component", "add", "rust-src"]).current_dir(root()))
}

/// Where `cargo xtask` keeps its tools. Not below CARGO_TARGET_DIR: .cargo/config.toml names the linker there.
pub(crate) fn tool(name: &str) -> PathBuf {
    root().join("target/tools/bin").join(name)
}

fn version(path: &PathBuf) -> Option<String> {
    let output = Command::new(path).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout).split_whitespace().nth(1).map(str::to_owned)
}

/// Into target/tools, with the dependencies that its author tested.
pub(crate) fn install(name: &str, version: &str, options: &[&str]) -> Result<()> {
    say(&format!("installing {name} {version} into target/tools (some minutes, once)"));
    let mut command = cargo();
    command.args(["install", name, "--locked", "--force", "--root"]).arg(root().join("target/tools"));
    // A folder of its own, kept between attempts but not in the way of ours.
    command.arg("--target-dir").arg(root().join("target/tools/build"));
    command.args(["--version", version]).args(options);
    // Not `--quiet`: minutes of silence look like a hang.
    crate::run(&mut command)?;
    let _ = std::fs::remove_dir_all(root().join("target/tools/build"));
    Ok(())
}

/// Distribution packages, only where their command is missing: all in one go.
fn packages(wanted: &[Package]) -> Result<()> {
    let missing: Vec<&str> = wanted.iter().filter(|(command, _)| !has(command)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !is_root() {
        say(&format!("missing, and some system tests need it (Debian's names): {list}"));
        return Ok(());
    }
    if has("apt-get") {
        say(&format!("installing {list} (apt-get)"));
        run_quietly(Command::new("apt-get").args(["update", "-qq"]));
        let install = |packages: &[&str]| {
            crate::run(
                Command::new("apt-get")
                    .args(["install", "-y", "-qq", "--no-install-recommends"])
                    .args(packages)
                    .env("DEBIAN_FRONTEND", "noninteractive")
                    .stdin(Stdio::null()),
            )
        };
        // Only the first is needed by every test; those that need another are skipped, and say so.
        if let Err(error) = install(&missing) {
            say(&format!("not all could be installed: {error:#}"));
            return if has("ip") { Ok(()) } else { install(&["iproute2"]) };
        }
        Ok(())
    } else if has("ip") {
        say(&format!("missing, and there is no apt-get; tests that need it are skipped (Debian's names): {list}"));
        Ok(())
    } else if has("dnf") {
        say("installing iproute (dnf)");
        crate::run(Command::new("dnf").args(["install", "-y", "-q", "iproute"]).stdin(Stdio::null()))
    } else {
        bail!("the command `ip` is missing, and neither apt-get nor dnf is here to install it")
    }
}
