//! The verbs that change what is in force, and those that show what would change: `apply`, `rollback`, `diff`, `history`,
//! `test`.
//!
//! `apply` and `rollback` are one path: check everything, show the difference, ask, exchange the agent's policy folder in
//! one step, wait for the agent's answer, and exchange back what it refuses.

use super::replace::{NewFile, Staged};
use super::{CliError, Exit, Output, another_question, ask, engine, print, show};
use crate::control::report::{
    CaseReport, Finding, Held, PastReport, PlacesReport, PolicyCheck, PolicyFile, Refused, ReloadReport, Revision,
    Severity, StatusReport,
};
use crate::control::{Client, ClientError, Failure, FailureKind, Request, Response, trial};
use crate::policy::difference::{DocumentChange, difference};
use crate::policy::plan;
use crate::policy::tables::Tables;
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a revision may take that the agent did not answer for in time: the largest policies compile in seconds.
const IN_FORCE: Duration = Duration::from_secs(120);
/// How often the agent is asked meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(super) struct ApplyArgs {
    /// Folders (or files) with policies; together they are the new policy
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
pub(super) struct RollbackArgs {
    /// The revision to put back [default: the one before]
    revision: Option<u64>,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
struct How {
    /// Show what would change, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Output format
    #[arg(short, long, default_value = "table")]
    output: Output,
}

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// A revision by its number, or a folder
    #[arg(value_name = "REVISION|DIR")]
    first: Option<String>,
    /// The same; left out, the first is compared with what is in force
    #[arg(value_name = "REVISION|DIR")]
    second: Option<String>,
    /// Output format
    #[arg(short, long, default_value = "table")]
    output: Output,
}

#[derive(Debug, Args)]
pub(super) struct TestArgs {
    /// Folders with policies; together they are one policy
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Output format
    #[arg(short, long, default_value = "table")]
    output: Output,
}

/// What would change.
#[derive(Debug, Serialize)]
pub(super) struct ChangeReport {
    /// What is compared, in words: `revision 6`.
    pub(super) from: String,
    /// With what.
    pub(super) to: String,
    /// Documents, in the order of their kinds.
    pub(super) documents: Vec<DocumentChange>,
    /// Table entries before; absent where that policy cannot be compiled.
    pub(super) entries_before: Option<usize>,
    /// Table entries after.
    pub(super) entries_after: Option<usize>,
    /// The same, entry by entry.
    pub(super) tables: plan::Diff,
}

impl ChangeReport {
    fn new(from: &Side, to: &Side) -> Self {
        let none = Tables::default();
        let tables = plan::diff(from.tables.as_ref().unwrap_or(&none), to.tables.as_ref().unwrap_or(&none));
        let entries = |side: &Side| side.tables.as_ref().map(|t| t.rules.len());
        Self {
            from: from.name.clone(),
            to: to.name.clone(),
            documents: difference(&from.files, &to.files),
            entries_before: entries(from),
            entries_after: entries(to),
            tables,
        }
    }

    /// Would anybody notice?
    pub(super) fn is_empty(&self) -> bool {
        self.documents.is_empty() && self.tables.is_empty()
    }
}

/// A policy that is compared.
struct Side {
    name: String,
    files: Vec<(String, String)>,
    tables: Option<Tables>,
}

impl Side {
    fn new(name: String, files: Vec<(String, String)>, now: Timestamp) -> (Self, PolicyCheck) {
        let (check, tables) = engine::examine_files(&files, now);
        (Self { name, files, tables }, check)
    }
}

/// What became of an apply, for programs.
#[derive(Debug, Serialize)]
pub(super) struct ApplyReport {
    /// Is it in force now (or was it already)?
    pub(super) applied: bool,
    /// What changed, or would.
    pub(super) changes: ChangeReport,
    /// Warnings of the check.
    pub(super) findings: Vec<Finding>,
    /// What is in force now; absent after `--dry-run`.
    pub(super) revision: Option<Revision>,
    /// Why the agent refused it.
    pub(super) refused: Option<Refused>,
}

/// What the agent says of itself, as far as it matters here.
struct InForce {
    places: PlacesReport,
    revision: Option<Revision>,
    files: Vec<(String, String)>,
}

impl InForce {
    async fn ask(socket: &Path) -> Result<Self, CliError> {
        let Response::Places(places) = ask(socket, Request::Places).await? else { return Err(another_question()) };
        let status = status(socket).await?;
        Ok(Self { places, revision: status.revision, files: files(socket, None).await? })
    }
    fn name(&self) -> String {
        self.revision.as_ref().map_or_else(|| "nothing".to_owned(), |r| format!("revision {}", r.number))
    }
}

async fn status(socket: &Path) -> Result<StatusReport, CliError> {
    let Response::Status(status) = ask(socket, Request::Status).await? else { return Err(another_question()) };
    Ok(status)
}

/// The files of a revision, or of the one in force.
pub(super) async fn files(socket: &Path, revision: Option<u64>) -> Result<Vec<(String, String)>, CliError> {
    let mut answer = Client::connect(socket).await?.ask(Request::Files(revision)).await?;
    let mut files = Vec::new();
    while let Some(response) = answer.next().await? {
        let Response::File(PolicyFile { name, text }) = response else { return Err(another_question()) };
        files.push((name, text));
    }
    Ok(files)
}

/// The revisions that the agent keeps, newest first.
pub(super) async fn past(socket: &Path) -> Result<Vec<PastReport>, CliError> {
    let mut answer = Client::connect(socket).await?.ask(Request::Past).await?;
    let mut all = Vec::new();
    while let Some(response) = answer.next().await? {
        let Response::Past(past) = response else { return Err(another_question()) };
        all.push(past);
    }
    Ok(all)
}

/// `segfw policy history`.
pub(super) async fn history(socket: &Path, output: Output) -> Result<Exit, CliError> {
    let all = past(socket).await?;
    print::out(&match output {
        Output::Json => all.iter().map(print::json_line).collect::<Result<String, _>>()?,
        Output::Table => show::history(&all),
    })?;
    Ok(Exit::Yes)
}

/// `segfw policy apply`.
pub(super) async fn apply(socket: &Path, args: ApplyArgs) -> Result<Exit, CliError> {
    let ApplyArgs { dirs, how } = args;
    let mut new = Vec::new();
    let several = dirs.len() > 1;
    for (n, dir) in dirs.iter().enumerate() {
        let below = dir.canonicalize().unwrap_or_else(|_| dir.clone());
        let folder = below.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
        for (name, text) in engine::files_of(dir)? {
            let path = if dir.is_file() { dir.clone() } else { dir.join(&name) };
            let mode = std::fs::metadata(path).ok().map(|m| m.mode());
            // Several folders may have a file of the same name: each becomes a folder of the new one.
            let name = if several && !dir.is_file() { format!("{folder}/{name}") } else { name };
            if new.iter().any(|file: &NewFile| file.name == name) {
                return Err(CliError::usage(format!(
                    "{}: {name} was there already, in a folder before argument {}; give folders of different names",
                    dir.display(),
                    n + 1
                )));
            }
            new.push(NewFile { name, text, mode });
        }
    }
    new.sort_by(|a, b| a.name.cmp(&b.name));
    let shown: Vec<String> = dirs.iter().map(|d| d.display().to_string()).collect();
    let absolute: Vec<String> =
        dirs.iter().map(|d| d.canonicalize().unwrap_or_else(|_| d.clone()).display().to_string()).collect();
    let source = format!("apply of {}", absolute.join(", "));
    put(socket, new, &shown.join(", "), &source, &how).await
}

/// `segfw policy rollback`.
pub(super) async fn rollback(socket: &Path, args: RollbackArgs) -> Result<Exit, CliError> {
    let RollbackArgs { revision, how } = args;
    let number = match revision {
        Some(number) => number,
        None => before(&past(socket).await?)?,
    };
    let file = |(name, text)| NewFile { name, text, mode: None };
    let new: Vec<NewFile> = files(socket, Some(number)).await?.into_iter().map(file).collect();
    let name = format!("revision {number}");
    put(socket, new, &name, &format!("rollback to {name}"), &how).await
}

/// The newest whole revision that is not what is in force.
fn before(all: &[PastReport]) -> Result<u64, CliError> {
    let now = all.iter().find(|p| p.in_force);
    let other =
        |p: &&PastReport| p.damaged.is_none() && now.is_none_or(|now| p.number < now.number && p.digest != now.digest);
    all.iter().find(other).map(|p| p.number).ok_or_else(|| {
        CliError::usage("there is no revision before the one in force; segfw policy history lists what is kept")
    })
}

/// Who types: the history says it.
fn user() -> String {
    if let Ok(name) = std::env::var("SUDO_USER") {
        return name;
    }
    let uid = nix::unistd::getuid();
    nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| format!("uid {uid}"), |u| u.name)
}

/// The one path of every change.
async fn put(socket: &Path, new: Vec<NewFile>, name: &str, source: &str, how: &How) -> Result<Exit, CliError> {
    let now = Timestamp::now();
    let files: Vec<(String, String)> = new.iter().map(|f| (f.name.clone(), f.text.clone())).collect();
    print::progress(&format!("checking {name} ..."));
    let (to, check) = Side::new(name.to_owned(), files, now);
    let cases = engine::test_files(&to.files, now);
    print::progress_ends();
    let errors = check.findings.iter().any(|f| f.severity == Severity::Error);
    if errors {
        return report_check(&check, how.output, Exit::Usage);
    }
    let failed = match cases {
        Ok(cases) => trial::findings(&cases),
        Err(check) => return report_check(&check, how.output, Exit::Usage),
    };
    if !failed.is_empty() {
        let check = PolicyCheck { findings: failed, ..check };
        return report_check(&check, how.output, Exit::No);
    }
    let agent = InForce::ask(socket).await?;
    let (from, _) = Side::new(agent.name(), agent.files.clone(), now);
    let changes = ChangeReport::new(&from, &to);
    let mut report = ApplyReport { applied: false, changes, findings: check.findings, revision: None, refused: None };
    let digest = crate::policy::digest(&to.files);
    let same = agent.revision.as_ref().is_some_and(|r| r.digest == digest);
    if how.output == Output::Table {
        print::out(&show::findings(&report.findings))?;
        print::out(&show::changes(&report.changes))?;
    }
    if how.dry_run {
        if how.output == Output::Json {
            print::out(&print::json(&report)?)?;
        }
        return Ok(Exit::Yes);
    }
    if !same && !how.yes && how.output == Output::Table && print::interactive() {
        let answer = print::ask(&format!("Put {name} in force on this host? [y/N]"))?;
        if !matches!(answer.as_str(), "y" | "yes") {
            print::note("nothing was changed");
            return Ok(Exit::No);
        }
    }
    let source = format!("{source} by {}", user());
    let outcome = exchange(socket, &agent, &new, &digest, &source).await?;
    report.applied = outcome.refused.is_none();
    (report.revision, report.refused) = (outcome.revision, outcome.refused);
    print::out(&match how.output {
        Output::Json => print::json(&report)?,
        Output::Table => show::applied(&report, same),
    })?;
    Ok(if report.applied { Exit::Yes } else { Exit::No })
}

fn report_check(check: &PolicyCheck, output: Output, exit: Exit) -> Result<Exit, CliError> {
    print::out(&match output {
        Output::Json => print::json(check)?,
        Output::Table => show::check(check),
    })?;
    Ok(exit)
}

/// Exchanges the folder, has the agent read it, and exchanges back what it refuses.
async fn exchange(
    socket: &Path,
    agent: &InForce,
    new: &[NewFile],
    digest: &str,
    source: &str,
) -> Result<ReloadReport, CliError> {
    let folder = &agent.places.policy;
    let there = crate::policy::read_dir_recursive(folder).ok();
    if there.as_ref().is_some_and(|files| crate::policy::digest(files) == digest) {
        // The folder says it already: applied in place, or edited there.
        return take(socket, digest, source).await;
    }
    let staged = Staged::new(folder, new)?;
    staged.exchange()?;
    let outcome = match take(socket, digest, source).await {
        Ok(outcome) => outcome,
        Err(error) => {
            // The agent has not said no; the folder is whole, and it is what was asked for.
            return Err(CliError {
                message: format!(
                    "{}\nthe new policy is in {}; the agent takes it, or says in segfw status why not",
                    error.message,
                    folder.display()
                ),
                ..error
            });
        }
    };
    if outcome.refused.is_some() {
        staged.exchange()?;
        // What was there need not have been in force: the agent says of it what it said before.
        let before = crate::policy::digest(&there.unwrap_or_default());
        if let Err(error) = take(socket, &before, "put back").await {
            print::note(&format!("the old files are back, but: {}", error.message));
        }
    } else if there.is_none_or(|files| crate::policy::digest(&files) != crate::policy::digest(&agent.files)) {
        // Somebody had edited it and it was never in force, so no revision holds it.
        match staged.keep_replaced() {
            Ok(kept) => print::note(&format!(
                "the folder held something else than what was in force; it is kept as {}",
                kept.display()
            )),
            Err(e) => print::note(&format!("what the folder held before could not be kept: {e}")),
        }
    }
    Ok(outcome)
}

/// Has the agent read its folder, and waits until these files are in force or refused.
async fn take(socket: &Path, digest: &str, source: &str) -> Result<ReloadReport, CliError> {
    print::progress("waiting for the agent ...");
    let start = Instant::now();
    let asked = Timestamp::now();
    let answer = match Client::connect(socket).await {
        Ok(client) => client.ask_one(Request::Take { source: source.to_owned() }).await,
        Err(error) => Err(error),
    };
    let slow = matches!(&answer, Err(ClientError::Failed(Failure { kind: FailureKind::System, .. })));
    let report = match answer {
        Ok(Response::Reloaded(report)) => report,
        Ok(_) => return Err(another_question()),
        Err(error) if !slow => {
            print::progress_ends();
            return Err(error.into());
        }
        // It is at work: it will say in its status how that ended.
        Err(_) => loop {
            let status = status(socket).await?;
            let ours = status.revision.as_ref().is_some_and(|r| r.digest == digest);
            let refused = status.refused.clone().filter(|r| r.at >= asked);
            if ours || refused.is_some() {
                break ReloadReport { changed: ours, revision: status.revision, refused, warnings: Vec::new() };
            }
            if start.elapsed() > IN_FORCE {
                print::progress_ends();
                return Err(CliError::system(format!("the agent has not taken the revision within {IN_FORCE:?}")));
            }
            print::progress(&format!("waiting for the agent, {} s ...", start.elapsed().as_secs()));
            tokio::time::sleep(ASK_AGAIN).await;
        },
    };
    print::progress_ends();
    if report.refused.is_none() && report.revision.as_ref().is_none_or(|r| r.digest != digest) {
        return Err(CliError::system(
            "the agent read other files than these: somebody else changes its policy folder; see segfw status",
        ));
    }
    Ok(report)
}

/// `segfw policy diff`.
pub(super) async fn diff(socket: &Path, args: DiffArgs) -> Result<Exit, CliError> {
    let DiffArgs { first, second, output } = args;
    let now = Timestamp::now();
    let (from, to) = match (first, second) {
        (Some(first), Some(second)) => (side(socket, &first, now).await?, side(socket, &second, now).await?),
        // A folder is what may come; a revision is what was.
        (Some(one), None) => {
            let agent = InForce::ask(socket).await?;
            let (current, _) = Side::new(agent.name(), agent.files, now);
            let other = side(socket, &one, now).await?;
            if one.parse::<u64>().is_ok() { (other, current) } else { (current, other) }
        }
        (None, _) => {
            let agent = InForce::ask(socket).await?;
            let (current, _) = Side::new(agent.name(), agent.files, now);
            let number = before(&past(socket).await?)?;
            (side(socket, &number.to_string(), now).await?, current)
        }
    };
    let report = ChangeReport::new(&from, &to);
    print::out(&match output {
        Output::Json => print::json(&report)?,
        Output::Table => show::changes(&report),
    })?;
    Ok(if report.is_empty() { Exit::Yes } else { Exit::No })
}

async fn side(socket: &Path, what: &str, now: Timestamp) -> Result<Side, CliError> {
    if let Ok(number) = what.parse::<u64>() {
        return Ok(Side::new(format!("revision {number}"), files(socket, Some(number)).await?, now).0);
    }
    let (side, check) = Side::new(what.to_owned(), engine::files_of(Path::new(what))?, now);
    if side.tables.is_none() {
        let lines: Vec<String> = check
            .findings
            .iter()
            .filter(|f| f.severity == Severity::Error)
            .map(|f| f.at.as_ref().map(|at| format!("{at}: ")).unwrap_or_default() + &f.message)
            .collect();
        return Err(CliError::usage(format!("{what}: not usable\n{}", lines.join("\n"))));
    }
    Ok(side)
}

/// `segfw policy test`.
pub(super) fn test(args: &TestArgs) -> Result<Exit, CliError> {
    let cases: Vec<CaseReport> = match engine::test(&args.dirs)? {
        Ok(cases) => cases,
        Err(check) => return report_check(&check, args.output, Exit::Usage),
    };
    print::out(&match args.output {
        Output::Json => cases.iter().map(print::json_line).collect::<Result<String, _>>()?,
        Output::Table => show::cases(&cases),
    })?;
    Ok(if cases.iter().all(|c| c.held == Held::Yes) { Exit::Yes } else { Exit::No })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_revision_before() {
        let past = |number, digest: &str, in_force| PastReport {
            number,
            in_force,
            since: None,
            digest: digest.to_owned(),
            source: String::new(),
            files: 1,
            bytes: 1,
            damaged: (digest == "damaged").then(|| "why".to_owned()),
        };
        let all = [
            past(9, "x", false),
            past(5, "a", true),
            past(4, "damaged", false),
            past(3, "a", false),
            past(2, "b", false),
        ];
        assert_eq!(before(&all).unwrap(), 2);
        assert_eq!(before(&all[1..4]).unwrap_err().exit, Exit::Usage);
    }
}
