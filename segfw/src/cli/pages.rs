//! What is made from the command line and from the language itself: schema, reference, completions, manual pages.

use super::{Cli, CliError, Exit, print};
use crate::policy::schema;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(super) struct SchemaArgs {
    /// As a page for people instead of a JSON Schema
    #[arg(long)]
    markdown: bool,
}

#[derive(Debug, Args)]
pub(super) struct CompletionArgs {
    /// For which shell
    shell: Shell,
}

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The folder that the pages are written to
    dir: PathBuf,
}

/// `segfw policy schema`.
pub(super) fn schema(args: &SchemaArgs) -> Result<Exit, CliError> {
    print::out(&match args.markdown {
        true => schema::reference::markdown(),
        false => print::json(&schema::json::schema())?,
    })?;
    Ok(Exit::Yes)
}

/// `segfw completions`.
pub(super) fn completions(args: &CompletionArgs) -> Result<Exit, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "segfw", &mut script);
    print::out(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Yes)
}

/// `segfw man`: one page for the program and one for each verb.
pub(super) fn man(args: &ManArgs) -> Result<Exit, CliError> {
    std::fs::create_dir_all(&args.dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), &args.dir))
        .map_err(|e| CliError::system(format!("{}: {e}", args.dir.display())))?;
    Ok(Exit::Yes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_for_each_verb() {
        let dir = tempfile::tempdir().unwrap();
        let args = ManArgs { dir: dir.path().join("man1") };
        let _ = man(&args).unwrap();
        let read = |name: &str| std::fs::read_to_string(args.dir.join(name)).unwrap();
        assert!(read("segfw-policy-apply.1").contains("segfw policy apply"), "{}", read("segfw-policy-apply.1"));
        assert!(read("segfw-flows.1").contains("hubble observe"));
        assert!(!args.dir.join("segfw-man.1").exists() && !args.dir.join("segfw-help.1").exists());
    }

    #[test]
    fn every_shell_gets_its_script() {
        for shell in <Shell as clap::ValueEnum>::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "segfw", &mut script);
            assert!(String::from_utf8(script).unwrap().contains("rollback"), "{shell}");
        }
    }
}
