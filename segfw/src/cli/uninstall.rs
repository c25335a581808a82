//! `segfw uninstall`: what becomes of a host that enforces when segfw goes. Called by package scripts, and by hand.

use super::{CliError, Exit, print};
use crate::config::{self, OnRemove, Settings};
use crate::control::{Client, ClientError};
use crate::datapath::attach;
use clap::Args;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(super) struct UninstallArgs {
    /// What is enforced stays in force until the next boot
    #[arg(long, conflicts_with = "open")]
    keep: bool,
    /// Programs and maps are removed: nothing is enforced any more
    #[arg(long)]
    open: bool,
    /// Remove the state too: numbers, history, flow records
    #[arg(long)]
    purge: bool,
    /// Do not ask. Without --open it is --keep, or what onRemove of the settings says
    #[arg(short, long)]
    yes: bool,
    /// The settings of the agent
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_SETTINGS)]
    config: PathBuf,
    /// Where programs and maps are pinned [default: the settings', or /sys/fs/bpf/segfw]
    #[arg(long, value_name = "PATH")]
    pin_dir: Option<PathBuf>,
    /// Where the state is [default: the settings', or /var/lib/segfw]
    #[arg(long, value_name = "PATH")]
    state_dir: Option<PathBuf>,
}

/// `segfw uninstall`.
pub(super) async fn uninstall(socket: &Path, args: UninstallArgs) -> Result<Exit, CliError> {
    let UninstallArgs { keep, open, purge, yes, config, pin_dir, state_dir } = args;
    let settings = match Settings::read(&config) {
        Ok(settings) => settings,
        Err(_) if !config.exists() => Settings::default(),
        // A host is not opened, and no state removed, at places that were only guessed.
        Err(error) => return Err(CliError::usage(format!("{error}; mend it, or name another file with --config"))),
    };
    let pins = pin_dir.or(settings.pin_dir).unwrap_or_else(|| config::DEFAULT_PIN_DIR.into());
    let state = state_dir.or(settings.state_dir).unwrap_or_else(|| config::DEFAULT_STATE_DIR.into());
    // The settings are the administrator's word; what is typed wins over it.
    let (open, decided) = match (keep, open, settings.on_remove) {
        (true, ..) => (false, yes),
        (_, true, _) => (true, yes),
        (.., OnRemove::Keep) => (false, true),
        (.., OnRemove::Open) => (true, true),
        (.., OnRemove::Ask) => (false, yes),
    };
    let enforces = enforces(&pins);
    let open = match decided {
        true => open,
        false if print::interactive() => match choose(&pins, enforces, keep, open, purge)? {
            Some(open) => open,
            None => {
                print::note("nothing was changed");
                return Ok(Exit::No);
            }
        },
        false => {
            return Err(CliError::usage(
                "there is no terminal to ask on; say --keep --yes (enforced until the next boot) or --open --yes \
                 (nothing is enforced any more), or set onRemove in the settings",
            ));
        }
    };
    if open || purge {
        agent_is_gone(socket).await?;
    }
    let mut said = String::new();
    if open {
        attach::remove(&pins).map_err(|e| {
            let hint = if e.kind() == std::io::ErrorKind::PermissionDenied { " (try sudo)" } else { "" };
            CliError::system(format!("{}: {e}{hint}; programs may still be in force", pins.display()))
        })?;
        said += &match enforces {
            true => format!(
                "open: the programs below {} are removed; segfw enforces nothing on this host any more\n",
                pins.display()
            ),
            false => {
                format!("open: nothing was pinned below {}; segfw enforces nothing on this host\n", pins.display())
            }
        };
    } else if enforces {
        said += &format!(
            "kept: the programs below {0} stay in force until the next boot; nobody follows changes of workloads or \
             policies\nto open the host before that: rm {0}/*/link-* && rm -r {0}\n",
            pins.display()
        );
    } else {
        said += &format!("nothing is pinned below {}: segfw enforces nothing on this host\n", pins.display());
    }
    if purge {
        match std::fs::remove_dir_all(&state) {
            Ok(()) => said += &format!("removed {}\n", state.display()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(CliError::system(format!("{said}{}: {e}", state.display()))),
        }
    } else if state.exists() {
        said += &format!("kept {} (--purge removes it)\n", state.display());
    }
    print::out(&said)?;
    Ok(Exit::Yes)
}

/// Is there a link below the pins?
fn enforces(pins: &Path) -> bool {
    let layouts = std::fs::read_dir(pins).into_iter().flatten().flatten();
    let mut names = layouts.flat_map(|l| std::fs::read_dir(l.path()).into_iter().flatten().flatten());
    names.any(|e| e.file_name().to_string_lossy().starts_with("link-"))
}

/// Asks a person. `None` = leave everything as it is.
fn choose(pins: &Path, enforces: bool, keep: bool, open: bool, purge: bool) -> Result<Option<bool>, CliError> {
    let more = if purge { " The state is removed too." } else { "" };
    if keep || open || !enforces {
        let what = if open {
            format!("Remove the programs below {}, so that nothing is enforced any more?{more}", pins.display())
        } else if enforces {
            format!("Leave the programs below {} in force until the next boot?{more}", pins.display())
        } else {
            format!("Nothing is pinned below {}. Go on?{more}", pins.display())
        };
        let answer = print::ask(&format!("{what} [y/N]"))?;
        return Ok(matches!(answer.as_str(), "y" | "yes").then_some(open));
    }
    let question = format!(
        "segfw enforces a policy on this host (programs below {}).\n  \
         keep    it stays in force until the next boot, and follows no changes\n  \
         open    it is removed: every connection is allowed from now on\n  \
         cancel  nothing is done{more}\nWhat shall become of it? [KEEP/open/cancel]",
        pins.display()
    );
    Ok(match print::ask(&question)?.as_str() {
        "" | "keep" => Some(false),
        "open" => Some(true),
        _ => None,
    })
}

/// An agent that lives would attach everything again, and writes into the state.
async fn agent_is_gone(socket: &Path) -> Result<(), CliError> {
    match Client::connect(socket).await {
        Err(ClientError::Absent(_) | ClientError::Dead(_)) => Ok(()),
        Err(error @ (ClientError::Forbidden(_) | ClientError::Hangs(_) | ClientError::Io { .. })) => {
            Err(CliError::system(format!("cannot tell whether an agent is running: {error}")))
        }
        Ok(_) | Err(ClientError::Incomplete | ClientError::NotUnderstood(_) | ClientError::Failed(_)) => {
            Err(CliError::system(format!(
                "an agent answers on {}; stop it first: systemctl stop segfw (or end the process), then try again",
                socket.display()
            )))
        }
    }
}
