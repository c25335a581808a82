//! What the figures are of: kernel, processor, mitigations, versions, and who else was busy.

use crate::Options;
use crate::result::{Machine, Run};
use std::fs;
use std::process::Command;

/// Everything but what only the end of the run knows.
pub(crate) fn describe(options: &Options) -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or_default();
    let line = |program: &str, args: &[&str]| -> Option<String> {
        let output = Command::new(program).args(args).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.trim().to_owned()).filter(|_| output.status.success())
    };
    let tools = [
        ("nft", &["--version"][..]),
        ("iptables-legacy", &["--version"]),
        ("iptables-nft", &["--version"]),
        ("ipset", &["--version"]),
        ("rustc", &["--version"]),
    ];
    let mut mitigations = Vec::new();
    for entry in fs::read_dir("/sys/devices/system/cpu/vulnerabilities").into_iter().flatten().flatten() {
        let state = read(&entry.path().display().to_string());
        if state != "Not affected" {
            mitigations.push(format!("{}: {state}", entry.file_name().to_string_lossy()));
        }
    }
    mitigations.sort();
    let commit = line("git", &["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let dirty = line("git", &["status", "--porcelain", "--untracked-files=no"]).is_some();
    let run = Run {
        date: line("date", &["-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_default(),
        commit: if dirty { format!("{commit} with changes") } else { commit },
        options: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        load: vec![load()],
    };
    Machine {
        kernel: read("/proc/sys/kernel/osrelease"),
        cpu: cpu.trim_start_matches([' ', '\t', ':']).to_owned(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        mitigations,
        versions: tools.iter().filter_map(|(program, args)| line(program, args)).collect(),
        release_build: !cfg!(debug_assertions),
        instructions: options.instructions,
        runs: vec![run],
    }
}

/// Load averages: what others did on this machine meanwhile is in the figures too.
pub(crate) fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}
