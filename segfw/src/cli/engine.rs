//! The only file of the CLI that calls the engines.

use super::CliError;
use crate::agent::early::{self, Early};
use crate::config::Config;
use crate::control::report::{CaseReport, CheckReport, EndSpec, Explanation, Finding, Outcome, PolicyCheck, Question};
use crate::control::{answer, trial};
use crate::datapath::left::{self, Left};
use crate::host::{cgroup, doctor};
use crate::policy::compile::{Clock, CompileProblem, compile};
use crate::policy::document::{Document, Matcher};
use crate::policy::explain::View;
use crate::policy::host_policy::{HostPolicy, Labels};
use crate::policy::load::{LoadError, read_dir_recursive};
use crate::policy::tables::{Numbers, Tables};
use crate::policy::{self, CgroupFacts, HostSettings, Inventory, Problems, Severity, UnitFacts, labels_for};
use jiff::Timestamp;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// `segfw agent`. Ends with SIGTERM or SIGINT.
pub(super) async fn agent(config: Config) -> Result<(), CliError> {
    log();
    crate::agent::run(config, stopped()).await.map_err(|e| CliError::system(format!("{e:#}")))
}

/// The log goes to stderr: `SEGFW_LOG=debug`, or `segfw::agent=debug,info`, for more than info. The journal knows the time.
fn log() {
    use tracing_subscriber::{EnvFilter, fmt};
    let filter = EnvFilter::try_from_env("SEGFW_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails only where a log is installed already.
    let _ = match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => log.with_ansi(false).without_time().try_init(),
        None => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
    };
}

/// `segfw load`.
pub(super) fn load(config: Config) -> Result<Early, CliError> {
    log();
    early::load(config).map_err(|e| CliError::system(format!("{e:#}")))
}

/// SIGTERM or SIGINT.
async fn stopped() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut term), Ok(mut int)) => {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        }
        // Without handlers the signals end the process, which is what an agent may suffer at any time anyway.
        (Err(_), _) | (_, Err(_)) => std::future::pending().await,
    }
}

/// A policy as it is in its folders, with nothing known of any host.
struct Loaded {
    files: usize,
    segments: usize,
    rules: usize,
    workloads: policy::Workloads,
    documents: Vec<Document>,
    policy: HostPolicy,
    /// Sorted by position.
    problems: Problems,
    clock: Clock,
}

impl Loaded {
    /// Reads, parses and resolves; together the folders are one policy. Fails only where there is nothing to read:
    /// what is wrong in the documents is among the problems.
    fn from_dirs(dirs: &[PathBuf], now: Timestamp) -> Result<Self, CliError> {
        let mut files = Vec::new();
        for dir in dirs {
            // With several folders a name alone would not say which file is meant.
            let full = |name: String| match dirs.len() {
                1 => name,
                _ if dir.is_file() => dir.display().to_string(),
                _ => dir.join(name).display().to_string(),
            };
            files.extend(files_of(dir)?.into_iter().map(|(name, text)| (full(name), text)));
        }
        Ok(Self::from_files(&files, now))
    }

    /// As [`Self::from_dirs`], for files that are in memory.
    fn from_files(files: &[(String, String)], now: Timestamp) -> Self {
        // The labels of the Workload documents are known to the resolver; there is no host to see more on.
        let (docs, policy, problems) = policy::read(files, |_| Inventory::default(), &HostSettings::default(), now);
        let (mut segments, mut rules, mut workloads) = (0, 0, Vec::new());
        for doc in &docs {
            match doc {
                Document::Workload(doc) => workloads.push(doc.clone()),
                Document::Segment(_) => segments += 1,
                Document::Policy(doc) => rules += doc.rules.len(),
                Document::Test(_) => {}
            }
        }
        let clock = Clock { wall: now, boot_ns: BOOT };
        let workloads = workloads.into();
        Self { files: files.len(), segments, rules, workloads, documents: docs, policy, problems, clock }
    }

    /// As a host would compile it on which each Workload document has a workload.
    fn compile(&self) -> Result<Tables, Vec<CompileProblem>> {
        let local: Vec<Labels> = self.workloads.iter().map(|d| d.labels.clone()).collect();
        compile(&self.policy, &local, &[], &mut Numbers::default(), self.clock)
    }

    fn findings(&self) -> Vec<Finding> {
        self.problems.iter().map(Finding::from).collect()
    }

    /// The labels of a workload: by the name of its document, of a systemd unit, or by the path of a cgroup.
    fn find(&self, name: &str) -> Option<Labels> {
        let labels = |facts: &CgroupFacts| labels_for(&self.workloads, facts, &Labels::new()).map(|(_, labels)| labels);
        if name.starts_with('/') {
            return labels(&crate::agent::registry::facts(Path::new(name), Path::new("/")));
        }
        if let Some(doc) = self.workloads.iter().find(|d| d.meta.name == name) {
            return Some(doc.labels.clone());
        }
        // Without an ending it is no unit, and a glob such as "*" would take any word for one.
        let path = unit_cgroup(name);
        let _ = cgroup::unit(Path::new(&path))?;
        labels(&CgroupFacts { path, unit: Some(UnitFacts::system(name)), ..CgroupFacts::default() })
    }

    /// What a name could have been meant for.
    fn names(&self) -> impl Iterator<Item = &str> {
        self.workloads.iter().flat_map(|d| {
            let units = d.matches.iter().filter_map(|m| match &m.value {
                Matcher::SystemdUnit(glob) => Some(glob.text.as_str()),
                Matcher::SystemdUserUnit { .. }
                | Matcher::Cgroup(_)
                | Matcher::Container { .. }
                | Matcher::Pod { .. } => None,
            });
            std::iter::once(d.meta.name.as_str()).chain(units)
        })
    }
}

/// Boot time of a host that is imagined: a day, so that nothing is before it.
const BOOT: u64 = 86_400_000_000_000;

/// Where systemd puts a unit of the system: instances of a template have a slice of their own.
fn unit_cgroup(unit: &str) -> String {
    match unit.split_once('@') {
        Some((template, _)) if !template.is_empty() && unit.ends_with(".service") => {
            let slice = template.replace('-', r"\x2d");
            format!("/system.slice/system-{slice}.slice/{unit}")
        }
        Some(_) | None => format!("/system.slice/{unit}"),
    }
}

fn load_error(dir: &Path, error: &LoadError) -> CliError {
    match error {
        LoadError::Io { path, source } if source.kind() == ErrorKind::NotFound && path == dir => {
            CliError::usage(format!("{}: no such file or folder", dir.display()))
        }
        // Not what is there, but whether it may be read.
        LoadError::Io { source, .. } if source.kind() != ErrorKind::NotFound => CliError::system(error),
        LoadError::Io { .. }
        | LoadError::NotUtf8 { .. }
        | LoadError::Name { .. }
        | LoadError::FileTooLarge { .. }
        | LoadError::TotalTooLarge { .. }
        | LoadError::TooDeep { .. }
        | LoadError::TooMany { .. }
        | LoadError::Loop { .. }
        | LoadError::NotAFile { .. } => CliError::usage(error),
    }
}

/// The policy files below a folder, or the one file.
pub(super) fn files_of(dir: &Path) -> Result<Vec<(String, String)>, CliError> {
    let found = read_dir_recursive(dir).map_err(|e| load_error(dir, &e))?;
    if found.is_empty() {
        return Err(CliError::usage(format!("{}: no *.yaml or *.yml file in it", dir.display())));
    }
    Ok(found)
}

/// What an agent that is gone has left in the kernel, or why that is not known.
pub(super) fn left(pins: &Path) -> Result<Vec<Left>, String> {
    let now = crate::host::proc::boot_ns().map_err(|e| e.to_string())?;
    left::left(pins, now).map_err(|e| format!("{}: {e}", pins.display()))
}

/// `segfw policy check`.
pub(super) fn check(dirs: &[PathBuf]) -> Result<PolicyCheck, CliError> {
    Ok(examine(Loaded::from_dirs(dirs, Timestamp::now())?).0)
}

/// What `check` says of files, and their tables if they can be compiled.
pub(super) fn examine_files(files: &[(String, String)], now: Timestamp) -> (PolicyCheck, Option<Tables>) {
    examine(Loaded::from_files(files, now))
}

fn examine(loaded: Loaded) -> (PolicyCheck, Option<Tables>) {
    let mut findings = loaded.findings();
    let mut tables = None;
    if !loaded.problems.refuse(false) {
        match loaded.compile() {
            Ok(compiled) => tables = Some(compiled),
            Err(problems) => findings.extend(problems.iter().map(Finding::from)),
        }
    }
    let Loaded { files, segments, rules, .. } = loaded;
    let entries = tables.as_ref().map(|t| t.rules.len());
    (PolicyCheck { files, segments, rules, entries, findings }, tables)
}

/// `segfw policy test`: every case, or the check that says why nothing can be asked.
pub(super) fn test(dirs: &[PathBuf]) -> Result<Result<Vec<CaseReport>, PolicyCheck>, CliError> {
    Ok(try_cases(Loaded::from_dirs(dirs, Timestamp::now())?))
}

/// As [`test`], for files that are in memory.
pub(super) fn test_files(files: &[(String, String)], now: Timestamp) -> Result<Vec<CaseReport>, PolicyCheck> {
    try_cases(Loaded::from_files(files, now))
}

fn try_cases(loaded: Loaded) -> Result<Vec<CaseReport>, PolicyCheck> {
    if loaded.problems.refuse(false) {
        return Err(examine(loaded).0);
    }
    let local: Vec<Labels> = loaded.workloads.iter().map(|d| d.labels.clone()).collect();
    match trial::run(&loaded.policy, &loaded.documents, &local, &Labels::new(), loaded.clock) {
        Ok(cases) => Ok(cases),
        Err(problems) => {
            let mut check = examine(loaded).0;
            check.findings = problems.iter().map(Finding::from).collect();
            Err(check)
        }
    }
}

/// `segfw policy explain --policy DIR`.
pub(super) fn explain_offline(dir: &Path, question: Question) -> Result<Explanation, CliError> {
    let loaded = Loaded::from_dirs(&[dir.to_owned()], Timestamp::now())?;
    let unusable = |errors: Vec<String>| {
        let count = errors.len();
        let s = if count == 1 { "" } else { "s" };
        CliError::usage(format!("{}: not usable, {count} error{s}\n{}", dir.display(), errors.join("\n")))
    };
    let errors: Vec<String> =
        loaded.problems.iter().filter(|p| p.severity == Severity::Error).map(ToString::to_string).collect();
    if !errors.is_empty() {
        return Err(unusable(errors));
    }
    let tables = loaded.compile().map_err(|all| unusable(all.iter().map(ToString::to_string).collect()))?;
    let find = |name: &str| loaded.find(name);
    for end in [&question.from, &question.to] {
        // A segment's name has a better answer than a near miss.
        if let EndSpec::Workload(name) = end
            && find(name).is_none()
            && !loaded.policy.segments.iter().any(|s| s.name == *name)
        {
            return Err(CliError::usage(answer::not_known(name, loaded.names())));
        }
    }
    let view = View { clock: loaded.clock, host_flags: 0 };
    let from = dir.display().to_string();
    answer::explain(&tables, &loaded.policy, &question, &find, view, None, &from).map_err(CliError::usage)
}

/// `segfw doctor`.
pub(super) fn doctor() -> Result<Vec<CheckReport>, CliError> {
    let report = |doctor::Check { name, level, what, consequence, remedy }| CheckReport {
        name: String::from(name),
        outcome: match level {
            doctor::Level::Ok => Outcome::Good,
            doctor::Level::Warn => Outcome::Less,
            doctor::Level::Fail => Outcome::Bad,
        },
        found: what,
        consequence,
        action: remedy,
    };
    Ok(doctor::checks().into_iter().map(report).collect())
}
