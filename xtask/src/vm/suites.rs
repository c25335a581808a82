//! What runs in guests: every program through the kernel's verifier, the gates, then the conformance table against the real
//! agent, under gate conn and under gate skb: with the same answers.

use super::boot::{self, End, Share};
use super::{fetch, folder, lock};
use crate::{cargo, root, say, target};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

/// Kernels that every run of all tests boots: the oldest, the one that differs most from both ends, and the newest.
pub(crate) const ALWAYS: &str = "oldest,6.1,newest";
/// Of the table they run every 32nd group from the 18th on: the whole takes a guest too long for every change. These are
/// prefixes with all of the matrix, and relabelling, each with a policy and an agent of its own. `--kernels` runs all of it, with
/// `--part 1/8` also rare protocols and origins, in some four minutes a guest.
pub(crate) const PART: &str = "17/32";
/// All of the table.
pub(crate) const ALL: &str = "0/1";
/// Tests of the gates that every run of all tests has in its guests; `--kernels` runs all of them.
const GATES: &str = "gate/conn-alone gate/families";
/// What the part leaves out and only gate conn shows: connections that drain without an agent. The oldest guest has it too.
const DRAINS: &str = "revoke-drain";
/// Groups at a time in a guest of two processors: waiting is most of what they do.
const JOBS: usize = 6;
/// How long a guest may take for the whole table and for the part, in seconds.
const WHOLE: u64 = 3600;
const PARTLY: u64 = 1200;
/// Where the README holds the table of kernels, and the file that the runs write.
const BEGIN: &str = "<!-- kernels: written by `cargo xtask test --kernels` -->";
const END: &str = "<!-- end of kernels -->";
const TABLE: &str = "docs/kernels.md";

/// What a guest said.
#[derive(Debug, Default)]
struct Told {
    facts: BTreeMap<String, String>,
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Suites that said their totals and passed something: one whose filter names nothing any more proves nothing.
    suites: usize,
    /// Why rows were skipped, as `tests/kernels.expected` says it.
    why: Vec<String>,
}

impl Told {
    fn line(&mut self, line: &str) {
        if let Some((name, value)) = line.strip_prefix("fact ").and_then(|l| l.split_once(' ')) {
            let _ = self.facts.insert(name.to_owned(), value.to_owned());
        } else if let Some(totals) = crate::totals::summary(line) {
            self.passed += totals.passed;
            self.failed += totals.failed;
            self.skipped += totals.skipped;
            self.suites += usize::from(totals.passed > 0);
        } else if let Some(why) = line.strip_prefix("skipped: ").filter(|why| !self.why.iter().any(|w| w == why)) {
            self.why.push(why.to_owned());
        }
    }
}

/// Runs the suites on the kernels; `part` = which groups of the table. One line of totals per kernel, as the other tests print.
pub(crate) fn test(names: &str, part: &str, write: bool) -> Result<()> {
    let kernels = fetch::all(&lock::select(&[names.to_owned()])?)?;
    let oldest = lock::select(&["oldest".to_owned()])?.first().map(|k| k.name.clone()).unwrap_or_default();
    let [kernel_tests, system_tests, product_tests] = build()?;
    let mut lost = Vec::new();
    let mut rows = Vec::new();
    for kernel in &kernels {
        say(&format!("kernel {} ({})", kernel.name, kernel.release));
        let share = Share::new(&kernel.name)?;
        let table = |gate: &str, json: &str, which: &str| {
            format!(
                "{} --expected tests/kernels.expected --kernel {} --jobs {JOBS} --gate {gate} --json /run/vm/{json}.json {which}",
                system_tests.display(),
                kernel.name
            )
        };
        let gates = if part == ALL { "gate/" } else { GATES };
        let mut suites = vec![
            format!("{} verifier", kernel_tests.display()),
            format!("{} {gates}", product_tests.display()),
            table("conn", "conn", &format!("--part {part}")),
        ];
        // The machine's own kernel has run all of it under gate skb: of the others the oldest shows what differs, if anything.
        if part != PART || kernel.name == oldest {
            suites.push(table("skb", "skb", &format!("--part {part} --same-as /run/vm/conn.json")));
        }
        if part == PART && kernel.name == oldest {
            suites.push(table("conn", "drains", DRAINS));
        }
        // All run, whatever the first ones say.
        let script = format!(
            "export SEGFW_BIN={}/release/segfw; s=0; {} || s=1; exit $s",
            target().display(),
            suites.join(" || s=1; ")
        );
        let command = ["sh".to_owned(), "-c".to_owned(), script];
        let mut told = Told::default();
        let seconds = if part == ALL { WHOLE } else { PARTLY };
        let end = boot::boot(kernel, boot::VARIANTS[0], &share, &command, seconds, &mut |line| {
            told.line(line);
            // Rows that passed would be two thousand lines a kernel.
            if !line.starts_with("ok ") && !line.starts_with("verifier: ") && crate::totals::summary(line).is_none() {
                println!("{line}");
            }
        })?;
        let results = folder().join("results");
        fs::create_dir_all(&results)?;
        for gate in ["conn", "skb"] {
            let _ = fs::copy(
                share.path().join(format!("{gate}.json")),
                results.join(format!("{}-{gate}.json", kernel.name)),
            );
        }
        if end == End::Lost || told.suites < suites.len() {
            lost.push(kernel.name.clone());
            told.failed += 1;
        }
        println!("{} passed, {} failed, {} skipped", told.passed, told.failed, told.skipped);
        rows.push(row(&kernel.name, &kernel.release, &told, part));
    }
    if write && lost.is_empty() {
        write_table(&rows)?;
    }
    ensure!(lost.is_empty(), "guests in which a suite did not come to its end, or passed nothing: {}", lost.join(", "));
    Ok(())
}

/// The test binaries of the kernel and of the system tests, and the programs they start.
fn build() -> Result<[PathBuf; 3]> {
    // An emulated processor takes twice as long for an agent that is not optimised; the guard needs that build anyway.
    crate::release()?;
    crate::run(cargo().args(["build", "--quiet", "--package", "segfw", "--package", "segfw-tests", "--bins"]))?;
    let output = cargo()
        .args(["test", "--quiet", "--no-run", "--message-format=json", "--package", "segfw-tests"])
        .args(["--test", "kernel", "--test", "system", "--test", "product"])
        .stderr(Stdio::inherit())
        .output()
        .context("cargo test --no-run")?;
    ensure!(output.status.success(), "the tests do not build");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let find = |name: &str| -> Result<PathBuf> {
        let mark = format!("\"kind\":[\"test\"],\"crate_types\":[\"bin\"],\"name\":\"{name}\"");
        let line = text.lines().find(|l| l.contains(&mark)).with_context(|| format!("cargo built no test {name}"))?;
        let path = line.split("\"executable\":\"").nth(1).and_then(|rest| rest.split('"').next());
        path.map(PathBuf::from).with_context(|| format!("cargo names no file for the test {name}"))
    };
    Ok([find("kernel")?, find("system")?, find("product")?])
}

/// A kernel's row of the table.
fn row(name: &str, release: &str, told: &Told, part: &str) -> String {
    let fact = |name: &str| told.facts.get(name).map_or("?", String::as_str);
    let why = if told.why.is_empty() { String::new() } else { format!(" ({})", told.why.join("; ")) };
    let part = if part == ALL { "all" } else { part };
    format!(
        "| {name} | {release} | {} ({}) | {} | {} | {} | {} | {} | {} | {part} | {} | {} | {}{why} |\n",
        fact("programs"),
        fact("walked"),
        fact("gate"),
        fact("families"),
        fact("reject"),
        fact("process"),
        fact("new-cgroups"),
        fact("packet-namespace"),
        told.passed,
        told.failed,
        told.skipped
    )
}

/// The head of the table.
const HEAD: &str = "| kernel | tested build | programs loaded (most instructions walked) | gate for inbound TCP | list of address \
                    families | `reject` reads as | who connects, in records of allowed TCP | new cgroups known by | sockets older \
                    than the agent know their namespace from the first packet | part of the conformance table, under gate conn and \
                    under gate skb | tests passed | failed | rows skipped |\n\
                    | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";

/// The table with these rows in place of older ones of the same kernels: each row stands for one run. In the order of `kernels`,
/// and of those alone.
fn merged(table: &str, rows: &[String], kernels: &[String]) -> String {
    let row_of = |kernel: &String| {
        let begin = format!("| {kernel} |");
        rows.iter().map(|row| row.trim_end()).chain(table.lines()).find(|row| row.starts_with(&begin))
    };
    let rows: String = kernels.iter().filter_map(row_of).map(|row| format!("{row}\n")).collect();
    format!("{HEAD}{rows}")
}

fn write_table(rows: &[String]) -> Result<()> {
    let kernels: Vec<String> = lock::select(&["all".to_owned()])?.into_iter().map(|k| k.name).collect();
    let mut table = None;
    for file in [TABLE, "README.md"] {
        let path = root().join(file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let Some((before, between, after)) = parts(&text) else { bail!("{file} has no {BEGIN}") };
        let table = table.get_or_insert_with(|| merged(between, rows, &kernels));
        fs::write(&path, format!("{before}{BEGIN}\n{table}{END}{after}"))?;
    }
    say(&format!("written: {TABLE}, and the same in README.md"));
    Ok(())
}

/// What is before, between and after the marks.
fn parts(text: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (between, after) = rest.split_once(END)?;
    Some((before, between, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The README prints the very table that the runs wrote.
    #[test]
    fn the_readme_has_the_table_of_the_runs() {
        let read = |name: &str| fs::read_to_string(root().join(name)).expect(name);
        let (table, readme) = (read(TABLE), read("README.md"));
        let ours = parts(&table).expect("docs/kernels.md has a table").1;
        let theirs = parts(&readme).expect("README.md has a table of kernels").1;
        assert!(ours == theirs, "README.md and {TABLE} differ: `cargo xtask test --kernels` writes both");
    }

    #[test]
    fn a_run_replaces_the_rows_of_its_kernels() {
        let kernels = ["5.10", "6.1", "7.3"].map(str::to_owned);
        let old = "| kernel | x |\n| --- | --- |\n| 5.10 | old |\n| 6.1 | old |\n| 6.6 | no longer there |\n";
        let new = merged(old, &["| 7.3 | new |\n".to_owned(), "| 6.1 | new |\n".to_owned()], &kernels);
        assert_eq!(new, format!("{HEAD}| 5.10 | old |\n| 6.1 | new |\n| 7.3 | new |\n"));
    }

    #[test]
    fn a_guest_is_understood() {
        let mut told = Told::default();
        let said = "fact programs 14\nskip 155 tcp4 egress mptcp [bypass]: EPROTO\nskipped: not built\nskipped: not built\nskipped: gone\n\
                    14 passed, 0 failed, 0 skipped\nok 1 a [b]\n8 passed, 1 failed, 2 skipped\n\
                    0 passed, 0 failed, 0 skipped";
        said.lines().for_each(|line| told.line(line));
        assert_eq!((told.passed, told.failed, told.skipped, told.suites), (22, 1, 2, 2));
        let row = row("6.1", "6.1.0", &told, "1/8");
        assert!(row.starts_with("| 6.1 | 6.1.0 | 14 (?) | ?"), "{row}");
        assert!(row.ends_with("| 1/8 | 22 | 1 | 2 (not built; gone) |\n"), "{row}");
    }
}
