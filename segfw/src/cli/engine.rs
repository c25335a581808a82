//! SEAM. The only file of the CLI that calls the engines. Each function below is complete but for its call; the call
//! that is meant stands in its comment. Nothing else in `cli` changes when they are linked.

use super::CliError;
use crate::config::Config;
use crate::control::report::{CheckReport, Explanation, PolicyCheck, Question};
use std::path::{Path, PathBuf};

/// Until the engine is linked.
fn not_linked<T>(what: &str) -> Result<T, CliError> {
    Err(CliError::system(format!("{what}: not linked yet")))
}

/// `segfw agent`. Ends with SIGTERM or SIGINT.
pub(super) async fn agent(config: Config) -> Result<(), CliError> {
    crate::agent::run(config, stopped()).await.map_err(|e| CliError::system(format!("{e:#}")))
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

/// `segfw policy check`.
pub(super) fn check(dirs: &[PathBuf]) -> Result<PolicyCheck, CliError> {
    // let files: Vec<(String, String)> = dirs.iter().map(|d| policy::load::read_dir_recursive(d)).collect::<Result<..>>()?.concat();
    // let (docs, mut problems) = policy::document::parse(&files);
    // let resolved = policy::resolve::resolve(...);            // problems.extend(...)
    // let tables = policy::compile::compile(...);              // entries = Some(tables.rules.len())
    // findings: problems.iter().map(|p| Finding { severity, at: Some(At::from(&p.at)), message, help }).collect()
    let _ = dirs;
    not_linked("segfw policy check")
}

/// `segfw policy explain --policy DIR`.
pub(super) fn explain_offline(dir: &Path, question: Question) -> Result<Explanation, CliError> {
    // as `check`; errors in the policy are CliError::usage; then
    // policy::explain::explain(&host_policy, &tables, &question) with `policy_from: dir.display().to_string()`
    let _ = (dir, question);
    not_linked("segfw policy explain --policy")
}

/// `segfw doctor`.
pub(super) fn doctor() -> Result<Vec<CheckReport>, CliError> {
    // Ok(crate::host::doctor::run())
    not_linked("segfw doctor")
}
