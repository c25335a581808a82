//! The project's own tooling, in plain Rust so that a checkout and rustup are all that is needed.
#![allow(clippy::print_stdout, reason = "a command-line tool")]

mod checks;
mod clean;
mod dist;
mod guard;
mod setup;
mod totals;
mod vm;

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const HELP: &str = "\
cargo xtask COMMAND

  setup   Install what building and testing needs: rust-src, bpf-linker (into target/tools), and with
          apt-get as root iproute2 and what some tests use (podman, systemd-container, mmdebstrap, ...)
  demo    Three services, one policy, live: allowed, denied, and a connection that is cut (needs root, ~20 s)
  test    All tests; those that load eBPF need root and are named as skipped without it
  bench   segfw beside nftables, iptables and nothing, and what its agent needs (root; half an hour; `bench --quick`)
  guard   Instructions of the hot paths against tests/instructions.txt (`guard --accept` writes it)
  lint    Formatting, clippy on every crate, licences and sources of all dependencies
  ci      lint, test, guard
  dist    Packages into target/dist: deb, rpm, tarball, OCI image, SBOM, SHA256SUMS (--profile dev, --only KIND)
  vm      Debian's kernels under QEMU: `cargo xtask vm help`
  clean   Remove what interrupted test runs left in the kernel, then run cargo clean (target/tools and target/vm stay)

`demo` and `test` run `setup` by themselves. Words after `--` go to the system tests:
  cargo xtask test -- --filter bypass       only these rows
  cargo xtask test -- --baseline-only       what must work without segfw
  cargo xtask test -- --list                the table
  cargo xtask test --kernels all            verifier, gates and table on other kernels, in guests (all, or 5.10,6.1,...);
                                            writes their rows of docs/kernels.md
  cargo xtask test --kernels all --part 1/8 of the table every eighth group from the second on";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = args.split_first().map_or(("help", &[][..]), |(c, rest)| (c.as_str(), rest));
    let result = match command {
        "setup" => setup::run(),
        "demo" => demo(),
        "test" => setup::run().and_then(|()| totals::test(rest.strip_prefix(&["--".to_owned()][..]).unwrap_or(rest))),
        "bench" => bench(rest.strip_prefix(&["--".to_owned()][..]).unwrap_or(rest)),
        "guard" => guard::run_guard(rest),
        "lint" => setup::build_tools().and_then(|()| checks::lint()),
        "ci" => setup::run()
            .and_then(|()| checks::lint())
            .and_then(|()| totals::test(&[]))
            .and_then(|()| guard::run_guard(&[])),
        "dist" => setup::build_tools().and_then(|()| dist::run_all(rest)),
        "vm" => vm::run(rest),
        "clean" => clean::run(),
        "help" | "-h" | "--help" => {
            println!("{HELP}");
            Ok(())
        }
        other => {
            eprintln!("xtask: no command `{other}`\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask {command}: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<()> {
    setup::to_run()?;
    if !is_root() {
        bail!("the demo makes network namespaces and loads eBPF programs: run it as root (sudo -E cargo xtask demo)");
    }
    say("building");
    run(cargo().args(["build", "--quiet", "--package", "segfw", "--package", "segfw-tests", "--bins"]))?;
    // Not through `cargo run`: Ctrl-C must reach the demo, which cleans up, and nobody else.
    run(&mut Command::new(target().join("debug/segfw-demo")))
}

fn bench(args: &[String]) -> Result<()> {
    setup::to_bench()?;
    if !is_root() {
        bail!("the bench makes cgroups and loads eBPF programs: run it as root (sudo -E cargo xtask bench)");
    }
    release()?;
    let bench = target().join("release/segfw-bench");
    if args.iter().any(|a| a == "--instructions") {
        return count(&bench, args);
    }
    run(Command::new(bench).args(args).current_dir(root()))
}

/// What is measured, and what guests run: optimised, as it ships.
pub(crate) fn release() -> Result<()> {
    say("building, release");
    run(cargo().args(["build", "--quiet", "--release", "--package", "segfw", "--package", "segfw-tests"]).args([
        "--bin",
        "segfw",
        "--bin",
        "segfw-bench",
    ]))
}

/// The bench in a guest whose clock counts instructions; what it wrote there goes to `--out`.
fn count(bench: &Path, args: &[String]) -> Result<()> {
    /// Newest of the long-term kernels of `cargo xtask vm`.
    const KERNEL: &str = "6.18";
    /// Seconds: emulated, everything is some fifteen times slower, and others may use this machine.
    const TIMEOUT: &str = "3600";
    let at = args.iter().position(|a| a == "--out");
    let out = root().join(at.and_then(|at| args.get(at + 1)).map_or("target/bench", String::as_str));
    // /run/vm is the folder that guest and host share.
    let mut words = args.to_vec();
    match at {
        Some(at) if at + 1 < words.len() => "/run/vm".clone_into(&mut words[at + 1]),
        Some(_) | None => words.extend(["--out".to_owned(), "/run/vm".to_owned()]),
    }
    let kept = target().join(format!("bench-{}", std::process::id()));
    let text = |path: &Path| path.display().to_string();
    let mut order: Vec<String> =
        ["run", "--kernel", KERNEL, "--variant", "counted", "--timeout", TIMEOUT, "--keep", &text(&kept), "--"]
            .map(str::to_owned)
            .to_vec();
    order.push(text(bench));
    order.append(&mut words);
    let ran = vm::run(&order);
    let found = kept.join(KERNEL).join("instructions.json");
    let copied = if found.is_file() {
        std::fs::create_dir_all(&out)?;
        std::fs::copy(&found, out.join("instructions.json")).map(drop).context("copying the result")
    } else {
        Err(anyhow::anyhow!("the guest wrote no {}", found.display()))
    };
    let _ = std::fs::remove_dir_all(&kept);
    ran.and(copied)?;
    if out.join("bench.json").is_file() {
        run(Command::new(bench).args(["--render", "--out"]).arg(&out))?;
    }
    say(&format!("{}", out.join("instructions.json").display()));
    Ok(())
}

/// The repository, wherever cargo was started.
fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Cargo, in the repository.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() == b"0")
}

/// True if a command of this name can be started.
fn has(name: impl AsRef<OsStr>) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Not every user's PATH holds the administrator's folders; `ip` often is there.
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .any(|folder| folder.join(name.as_ref()).is_file())
}

fn say(text: &str) {
    println!("xtask: {text}");
}

/// Runs to the end; failure is an error that names the command.
fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", shown(command)))?;
    if !status.success() {
        bail!("{}: {status}", shown(command));
    }
    Ok(())
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
