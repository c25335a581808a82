//! Runs the tests and adds up what they say of themselves.

use crate::{cargo, is_root, say, shown, target};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Totals {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// `args` go to the system tests; `--kernels LIST` runs the guests of these kernels and nothing else.
pub(crate) fn test(args: &[String]) -> Result<()> {
    if let Some((option, rest)) = args.split_first()
        && option == "--kernels"
    {
        let (list, part) = match rest {
            [list] => (list, crate::vm::suites::ALL),
            [list, option, part] if option == "--part" => (list, part.as_str()),
            _ => bail!("--kernels needs one list: all, or 5.10,6.1,... (xtask/kernels.lock); then perhaps --part 1/8"),
        };
        return crate::vm::suites::test(list, part, true);
    }
    let mut totals = Totals::default();
    let mut broken = Vec::new();
    if args.is_empty() {
        say("tests that need no privilege");
        step(cargo().args(["test", "--quiet", "--no-fail-fast"]), &mut totals, &mut broken)?;
    }
    if is_root() {
        say("system tests: the agent, real sockets, this kernel");
    } else {
        say("system tests: SKIPPED, they need root (sudo -E cargo xtask test)");
    }
    crate::run(cargo().args(["build", "--quiet", "--package", "segfw", "--package", "segfw-tests", "--bins"]))?;
    let mut system = cargo();
    system.args(["test", "--quiet", "--package", "segfw-tests", "--test", "system", "--"]).args(args);
    if std::env::var_os("SEGFW_BIN").is_none() {
        system.env("SEGFW_BIN", target().join("debug/segfw"));
    }
    step(&mut system, &mut totals, &mut broken)?;
    if args.is_empty() {
        others(&mut totals, &mut broken)?;
        say("other kernels, in guests");
        // A process of its own, as the other tests: its lines are read as theirs are.
        let mut guests = Command::new(std::env::current_exe().context("the path of xtask")?);
        step(guests.args(["vm", "test"]), &mut totals, &mut broken)?;
    }
    let Totals { passed, failed, skipped } = totals;
    println!();
    for what in &broken {
        println!("failed: {what}");
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 || !broken.is_empty() {
        bail!("{failed} of {} tests failed", passed + failed);
    }
    Ok(())
}

/// Other test targets of the tests crate, if there are any: `--tests` would run the system tests twice.
fn others(totals: &mut Totals, broken: &mut Vec<String>) -> Result<()> {
    let manifest = std::fs::read_to_string(crate::root().join("tests/Cargo.toml"))?;
    let names = manifest.split("[[test]]").skip(1).filter_map(|s| s.split("name = \"").nth(1)?.split('"').next());
    for name in names.filter(|n| *n != "system") {
        say(&format!("tests of {name}"));
        step(cargo().args(["test", "--quiet", "--package", "segfw-tests", "--test", name]), totals, broken)?;
    }
    Ok(())
}

/// Runs a test command, shows its output and reads its summary lines.
fn step(command: &mut Command, totals: &mut Totals, broken: &mut Vec<String>) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", shown(command)))?;
    let out = child.stdout.take().context("stdout of the tests")?;
    let mut sum = Totals::default();
    for line in BufReader::new(out).lines() {
        let line = line?;
        if let Some(found) = summary(&line) {
            sum.add(found);
        }
        println!("{line}");
    }
    let status = child.wait()?;
    if !status.success() {
        broken.push(shown(command));
        // A target that did not build, or died, has counted nothing.
        sum.failed = sum.failed.max(1);
    }
    totals.add(sum);
    Ok(())
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …` of libtest, or our own `3 passed, 0 failed, 1 skipped`.
pub(crate) fn summary(line: &str) -> Option<Totals> {
    let text = match line.strip_prefix("test result: ") {
        Some(rest) => rest.split_once(". ")?.1,
        None if line.ends_with(" skipped") => line,
        None => return None,
    };
    let number = |word: &str| {
        let part = text.split([';', ',']).find(|p| p.trim_end().ends_with(word))?;
        part.split_whitespace().next()?.parse().ok()
    };
    Some(Totals {
        passed: number(" passed")?,
        failed: number(" failed")?,
        skipped: number(" ignored").or_else(|| number(" skipped")).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_summaries() {
        let libtest =
            "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 9 filtered out; finished in 0.1s";
        assert_eq!(summary(libtest), Some(Totals { passed: 3, failed: 1, skipped: 2 }));
        assert_eq!(summary("10 passed, 0 failed, 4 skipped"), Some(Totals { passed: 10, failed: 0, skipped: 4 }));
        assert_eq!(summary("skip 4 tcp4 was skipped"), None);
        assert_eq!(summary("ok 1 passed"), None);
    }
}
