//! `cargo xtask guard`: instructions of the hot paths, compared with those in the tree.
//!
//! Nothing here is a time: what is counted does not depend on how fast or how busy this machine is. The kernel side is
//! counted in a guest whose clock counts instructions, of one pinned kernel, so that every machine has the same figures;
//! user space by callgrind.

use crate::{cargo, root, run, say, setup, shown, target, vm};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What was counted when it was last accepted.
const FILE: &str = "tests/instructions.txt";
/// The kernel whose figures those are (xtask/kernels.lock has its build).
const KERNEL: &str = "6.12";
/// Seconds for the guest, which needs some fifty on an idle machine.
const TIMEOUT: u64 = 900;
/// Fixed work under callgrind: name, word of `segfw-bench --count`, function between whose begin and end it counts.
const USER: [(&str, &str, &str); 2] = [
    ("user/compile-1000-rules", "compile", "*segfw_bench::count::compile_rules*"),
    ("user/write-10000-events", "events", "*segfw_bench::count::write_events*"),
];

/// One line of the file.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    count: u64,
    /// By how much more it may be, in percent.
    tolerance: f64,
    what: String,
}

type Entries = BTreeMap<String, Entry>;

/// What a new entry gets: beginning and end of its name, tolerance, words. The first one fits all. Tolerances are what three
/// runs differed by, and room for what changes by itself: programs on fixed input 0.5 % (where their maps lie), open
/// connections 0.1 %, new ones 1 % (ports and hash tables are random), user space 0.02 % (`RandomState`). A ratio of
/// 1.002 that grows by 0.3 % is at the goal of gate conn.
const KINDS: [(&str, &str, f64, &str); 10] = [
    ("", "", 1.0, "an exchange on an open loopback connection: both ends, kernel and user space"),
    ("rr/", "/per-10000-of-none", 0.3, "the exchange by that of no firewall, times 10,000"),
    ("crr/", "", 1.5, "connect, accept, close on loopback: both ends, kernel and user space"),
    ("crr/", "/per-10000-of-none", 1.5, "connect, accept, close by that of no firewall, times 10,000"),
    ("program/", "/translated", 2.0, "instructions of the program as the kernel runs it"),
    ("program/", "/walked", 10.0, "instructions that the verifier walked"),
    ("decide/", "", 2.0, "probe_decide: one decision"),
    ("outer-wall/", "", 2.0, "outer_wall: one SYN"),
    ("skb-ingress/", "", 2.0, "skb_ingress: one datagram of an open flow"),
    ("user/", "", 1.0, "user space, by callgrind, unoptimised build"),
];

pub(crate) fn run_guard(args: &[String]) -> Result<()> {
    let accept = match args {
        [] => false,
        [one] if one == "--accept" => true,
        _ => bail!("guard takes --accept and nothing else"),
    };
    let path = root().join(FILE);
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && accept => String::new(),
        other => other.with_context(|| path.display().to_string())?,
    };
    let was = parse(&text)?;
    setup::to_count()?;
    say("building");
    run(cargo().args(["build", "--quiet", "--package", "segfw-tests", "--bin", "segfw-bench"]))?;
    let bench = target().join("debug/segfw-bench");
    // Each takes one processor.
    let (user, kernel) = std::thread::scope(|scope| {
        let user = scope.spawn(|| user(&bench));
        let kernel = kernel(&bench);
        (user.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked"))), kernel)
    });
    let mut is = user.context("counting user space")?;
    is.append(&mut kernel.context("counting the kernel side")?);
    for (name, count) in &is {
        println!("{name:<52} {count:>10}{}", was.get(name).map_or(String::new(), |w| change(w.count, *count)));
    }
    let found = judge(&was, &is);
    for line in found.grown.iter().chain(&found.shrunk) {
        println!("{line}");
    }
    if accept {
        std::fs::write(&path, written(&accepted(&was, &is)))?;
        say(&format!("written: {FILE}. Commit it, with the reason in the message"));
        return Ok(());
    }
    if !found.shrunk.is_empty() {
        say("fewer is good: `cargo xtask guard --accept` and commit the file, so that it stays so");
    }
    ensure!(
        found.grown.is_empty(),
        "{} of {} counts are not what {FILE} allows. If that is meant: `cargo xtask guard --accept`, and commit the file \
         with the reason in the message. If not: `git diff` of segfw-ebpf and segfw-common for the kernel side, \
         callgrind_annotate for user space",
        found.grown.len(),
        is.len()
    );
    say(&format!("{} counts, none above what {FILE} allows", is.len()));
    Ok(())
}

fn percent(was: u64, is: u64) -> f64 {
    // In this order, so that a whole percent is one.
    (is as f64 - was as f64) * 100.0 / was.max(1) as f64
}

fn change(was: u64, is: u64) -> String {
    if was == is { String::new() } else { format!("  ({:+.2} %)", percent(was, is)) }
}

#[derive(Debug, Default, PartialEq)]
struct Found {
    grown: Vec<String>,
    shrunk: Vec<String>,
}

fn judge(was: &Entries, is: &BTreeMap<String, u64>) -> Found {
    let mut found = Found::default();
    for (name, count) in is {
        let Some(entry) = was.get(name) else {
            found.grown.push(format!("NEW {name}: is {count}, and {FILE} does not have it"));
            continue;
        };
        let by = percent(entry.count, *count);
        let words = |word: &str| {
            format!(
                "{word} {name}: was {}, is {count} ({by:+.2} %, tolerance {} %): {}",
                entry.count, entry.tolerance, entry.what
            )
        };
        if by > entry.tolerance {
            found.grown.push(words("GROWN"));
        } else if -by > entry.tolerance {
            found.shrunk.push(words("SHRUNK"));
        }
    }
    // What nobody counts any more is guarded no more.
    for (name, entry) in was.iter().filter(|(name, _)| !is.contains_key(*name)) {
        found.grown.push(format!("GONE {name}: was {}, and was not counted", entry.count));
    }
    found
}

/// Only what left its tolerance is replaced: otherwise small steps would add up unseen.
fn accepted(was: &Entries, is: &BTreeMap<String, u64>) -> Entries {
    let entry = |name: &String, count: u64| match was.get(name) {
        Some(old) if percent(old.count, count).abs() <= old.tolerance => old.clone(),
        Some(old) => Entry { count, ..old.clone() },
        None => {
            let kind = KINDS.iter().filter(|(begin, end, ..)| name.starts_with(begin) && name.ends_with(end));
            // The longest beginning and end say most.
            let (_, _, tolerance, what) =
                kind.max_by_key(|(begin, end, ..)| begin.len() + end.len()).unwrap_or(&KINDS[0]);
            Entry { count, tolerance: *tolerance, what: (*what).to_owned() }
        }
    };
    is.iter().map(|(name, count)| (name.clone(), entry(name, *count))).collect()
}

fn parse(text: &str) -> Result<Entries> {
    let mut entries = Entries::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.is_empty() && !l.starts_with('#')) {
        let one = || -> Option<(String, Entry)> {
            let mut words = line.split_whitespace();
            let (name, count) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
            let tolerance = words.next()?.strip_suffix('%')?.parse().ok()?;
            Some((name, Entry { count, tolerance, what: words.collect::<Vec<_>>().join(" ") }))
        };
        let (name, entry) =
            one().with_context(|| format!("{FILE}:{}: not `NAME COUNT TOLERANCE% WHAT`: {line}", i + 1))?;
        ensure!(entries.insert(name.clone(), entry).is_none(), "{FILE}:{}: {name} is there twice", i + 1);
    }
    Ok(entries)
}

fn written(entries: &Entries) -> String {
    let mut text = HEAD.to_owned();
    for (name, entry) in entries {
        text += &format!("{name:<52} {:>10} {:>4}%  {}\n", entry.count, entry.tolerance, entry.what);
    }
    text
}

const HEAD: &str = "\
# Instructions of the hot paths: name, count, by how much more it may be, what it is. `cargo xtask guard` compares and
# `cargo xtask guard --accept` writes what left its tolerance; see ARCHITECTURE.md for what is counted how.
";

/// Fixed work of user space under callgrind.
fn user(bench: &Path) -> Result<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for (name, work, function) in USER {
        say(&format!("callgrind: {work}"));
        let out = Scrap(target().join(format!("guard-{}-{work}.callgrind", std::process::id())));
        let mut command = Command::new("valgrind");
        command.args(["--quiet", "--tool=callgrind", "--collect-atstart=no"]);
        command.arg(format!("--toggle-collect={function}")).arg(format!("--callgrind-out-file={}", out.0.display()));
        command.arg(bench).args(["--count", work]).stdin(Stdio::null());
        run(&mut command)?;
        let text = std::fs::read_to_string(&out.0).with_context(|| out.0.display().to_string())?;
        let total = text.lines().find_map(|l| l.strip_prefix("totals: ")?.trim().parse().ok());
        let total: u64 = total.with_context(|| format!("{}: no totals in what callgrind wrote", shown(&command)))?;
        ensure!(total > 0, "callgrind found no function {function}");
        let _ = counts.insert(name.to_owned(), total);
    }
    Ok(counts)
}

/// A file that goes with this value.
struct Scrap(PathBuf);

impl Drop for Scrap {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The kernel side, in the guest: programs on fixed input, then exchanges and connections on loopback beside no firewall.
fn kernel(bench: &Path) -> Result<BTreeMap<String, u64>> {
    let bench = bench.display();
    let script = format!(
        "{bench} --count programs && {bench} --instructions --only rr,crr --peers segfw-skb,segfw-conn --sizes 10 --out /run/vm"
    );
    let mut counts = BTreeMap::new();
    let command = ["sh".to_owned(), "-c".to_owned(), script];
    let mut said = Vec::new();
    let ended = vm::run_in(KERNEL, "counted", &command, TIMEOUT, &mut |line| {
        let found =
            line.strip_prefix("count ").and_then(|l| l.split_once(' ')).and_then(|(n, c)| Some((n, c.parse().ok()?)));
        match found {
            Some((name, count)) => drop(counts.insert(name.to_owned(), count)),
            None => said.push(line.to_owned()),
        }
    });
    if ended.is_err() {
        said.iter().for_each(|line| println!("{line}"));
    }
    ended?;
    // Its own ratio to itself says nothing.
    counts.retain(|name: &String, _| !name.contains("/none/10/"));
    for needed in ["rr/segfw-conn/10", "rr/segfw-skb/10", "crr/segfw-conn/10", "crr/segfw-skb/10", "decide/by-label/10"]
    {
        ensure!(counts.contains_key(needed), "the guest has not counted {needed}:\n{}", said.join("\n"));
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Entries {
        parse(text).expect("parses")
    }

    fn counts(all: &[(&str, u64)]) -> BTreeMap<String, u64> {
        all.iter().map(|(n, c)| ((*n).to_owned(), *c)).collect()
    }

    #[test]
    fn growth_fails_and_shrinking_is_told() {
        let was = file("# words\na 1000 1% what a is\nb 1000 1% b\nc 1000 0.5% c\nd 5 1% d\n");
        let found = judge(&was, &counts(&[("a", 1010), ("b", 1011), ("c", 994), ("e", 1)]));
        let begins =
            |lines: &[String]| lines.iter().map(|l| l.split(':').next().expect("one").to_owned()).collect::<Vec<_>>();
        assert_eq!(begins(&found.grown), ["GROWN b", "NEW e", "GONE d"]);
        assert_eq!(begins(&found.shrunk), ["SHRUNK c"]);
        assert!(found.grown[0].contains("was 1000, is 1011 (+1.10 %, tolerance 1 %)"), "{}", found.grown[0]);
    }

    #[test]
    fn accepting_leaves_what_is_within_its_tolerance() {
        let was = file("a 1000 1% what a is\nb 1000 1% b\ngone 1 1% g\n");
        let now = accepted(&was, &counts(&[("a", 1009), ("b", 2000), ("program/x/walked", 7), ("rr/none/10", 3)]));
        let text = written(&now);
        assert_eq!(file(&text), now);
        let short: Vec<_> = now.iter().map(|(n, e)| (n.as_str(), e.count, e.tolerance)).collect();
        assert_eq!(short, [("a", 1000, 1.0), ("b", 2000, 1.0), ("program/x/walked", 7, 10.0), ("rr/none/10", 3, 1.0)]);
    }

    #[test]
    fn a_broken_line_is_named() {
        assert!(parse("a 1 1% x\na b c\n").expect_err("broken").to_string().contains(":2: not"));
        assert!(parse("a 1 1% x\na 1 1% x\n").expect_err("twice").to_string().contains("twice"));
    }
}
