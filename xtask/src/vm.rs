//! `cargo xtask vm`: Debian's kernels under QEMU, with this machine's own files as their root.

mod boot;
mod fetch;
mod lock;
pub(crate) mod suites;

use crate::{root, say};
use anyhow::{Context, Result, bail};
use boot::{Share, Variant, ensure_ok};
use std::path::PathBuf;

pub(crate) const HELP: &str = "\
cargo xtask vm fetch [--kernels all|LIST]     kernels, by xtask/kernels.lock, into target/vm (half a GB)
cargo xtask vm lock                           Debian's newest builds of the same lines into xtask/kernels.lock
cargo xtask vm test                           what `cargo xtask test` runs of this: 5.10, 6.1 and the newest, the table in part
cargo xtask test --kernels all|LIST           verifier, gates, conformance table; writes their rows of docs/kernels.md
cargo xtask vm run --kernel K [OPTIONS] -- COMMAND...
    Boots kernel K (5.10, 6.1, ...; oldest, newest, all, or several: --kernel 5.10,6.1) and runs COMMAND in it, with the
    machine's root as its own (read-only; /tmp, /run, /dev and /mnt are the guest's) and the repository as working folder.
    Its output and its exit status are those of this command. /run/vm is shared with the host, writable.
    --variant V     one of the below
    --timeout S     seconds until the guest is ended (180)
    --keep DIR      copy what the command left in /run/vm there";

/// Where packages, kernels and shares are. Not below CARGO_TARGET_DIR: like the tools, they do not depend on the build.
fn folder() -> PathBuf {
    root().join("target/vm")
}

/// How long a guest may take where nothing else was said, in seconds.
const TIMEOUT: u64 = 180;

pub(crate) fn run(args: &[String]) -> Result<()> {
    let (command, rest) = args.split_first().map_or(("help", &[][..]), |(c, rest)| (c.as_str(), rest));
    match command {
        "fetch" => {
            let options = Options::parse(rest)?;
            let names = if options.kernels.is_empty() { vec!["all".to_owned()] } else { options.kernels };
            for ready in fetch::all(&lock::select(&names)?)? {
                say(&format!(
                    "kernel {}: {} in {}",
                    ready.name,
                    ready.release,
                    folder().join(&ready.release).display()
                ));
            }
            Ok(())
        }
        "lock" => lock::renew(),
        "test" => in_part(),
        "run" => run_command(&Options::parse(rest)?),
        "help" | "-h" | "--help" => {
            println!("{HELP}\n\nVariants:");
            for variant in boot::VARIANTS {
                println!("  {:<26}{}", variant.name, variant.what);
            }
            Ok(())
        }
        other => bail!("no command `vm {other}`\n\n{HELP}"),
    }
}

/// What every run of all tests does. Where kernels cannot be had, that is said and counted, and is no failure.
fn in_part() -> Result<()> {
    if let Err(error) = lock::select(&[suites::ALWAYS.to_owned()]).and_then(|kernels| fetch::all(&kernels)) {
        say(&format!("kernels: SKIPPED: {error:#}"));
        println!("0 passed, 0 failed, {} skipped", suites::ALWAYS.split(',').count());
        return Ok(());
    }
    suites::test(suites::ALWAYS, suites::PART, false)
}

/// Removes what interrupted runs left beside the kernels: shares and half-made kernels.
pub(crate) fn clean() {
    for entry in std::fs::read_dir(folder()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let owner = name.strip_prefix("run-").and_then(|rest| rest.split('-').next());
        let owner = owner.or_else(|| name.strip_prefix('.').and_then(|rest| rest.rsplit('-').next()));
        if owner.is_some_and(|pid| pid.parse::<u32>().is_ok() && !std::path::Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

struct Options {
    kernels: Vec<String>,
    variant: Variant,
    timeout: u64,
    keep: Option<PathBuf>,
    command: Vec<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options =
            Self { kernels: Vec::new(), variant: boot::VARIANTS[0], timeout: TIMEOUT, keep: None, command: Vec::new() };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--kernel" | "--kernels" => options.kernels.push(value()?.clone()),
                "--variant" => options.variant = Variant::by_name(value()?)?,
                "--timeout" => options.timeout = value()?.parse().context("--timeout")?,
                "--keep" => options.keep = Some(PathBuf::from(value()?)),
                "--" => {
                    options.command = args.cloned().collect();
                    break;
                }
                other => bail!("unknown option {other}\n\n{HELP}"),
            }
        }
        Ok(options)
    }
}

/// Runs a command in a guest of one kernel; `line` gets each line of its output.
pub(crate) fn run_in(
    kernel: &str,
    variant: &str,
    command: &[String],
    seconds: u64,
    line: &mut dyn FnMut(&str),
) -> Result<()> {
    for kernel in fetch::all(&lock::select(&[kernel.to_owned()])?)? {
        say(&format!("kernel {} ({}), {variant}", kernel.name, kernel.release));
        let share = Share::new(&kernel.name)?;
        let end = boot::boot(&kernel, Variant::by_name(variant)?, &share, command, seconds, line)?;
        ensure_ok(&kernel.name, end)?;
    }
    Ok(())
}

fn run_command(options: &Options) -> Result<()> {
    if options.kernels.is_empty() || options.command.is_empty() {
        bail!("a kernel and a command are needed\n\n{HELP}");
    }
    let mut failures = Vec::new();
    for kernel in fetch::all(&lock::select(&options.kernels)?)? {
        say(&format!("kernel {} ({}), {}", kernel.name, kernel.release, options.variant.name));
        let share = Share::new(&kernel.name)?;
        let end = boot::boot(&kernel, options.variant, &share, &options.command, options.timeout, &mut |line| {
            println!("{line}");
        })?;
        if let Some(keep) = &options.keep {
            let to = keep.join(&kernel.name);
            std::fs::create_dir_all(&to)?;
            crate::run(std::process::Command::new("cp").arg("-a").arg(share.path().join(".")).arg(&to))?;
        }
        if let Err(error) = ensure_ok(&kernel.name, end) {
            failures.push(format!("{error:#}"));
        }
    }
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
}
