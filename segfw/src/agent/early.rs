//! The early loader, `segfw load`: puts the last good revision of the state folder in force and ends. It is what stands
//! between a boot and the agent: pins do not survive a reboot, the state folder does.
//!
//! It needs no policy folder and no network, and takes the very path of the agent ([`Core::start_without_folder`]).

use super::{Absent, Arc, Config, Core, Datapath, Hierarchy, History, Shared, Store, attach, proc, sys};
use crate::datapath::security::CONN;
use anyhow::Context;

/// Records of flows go nowhere here; the agent that comes later reads them from the ring.
const NO_HISTORY: usize = 1;

/// How it ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Early {
    /// A revision of the state folder is in force.
    Loaded {
        /// Its number.
        revision: u64,
        /// The kernel's generation.
        generation: u32,
    },
    /// Something is in force already: this is no boot, and perhaps an agent runs.
    InForce {
        /// The kernel's generation.
        generation: u32,
    },
    /// Nothing was saved, and nothing is declared for that.
    NothingSaved,
    /// `absence.beforeFirstRevision: open`.
    DeclaredOpen,
}

/// Loads, attaches, pins.
pub fn load(mut config: Config) -> anyhow::Result<Early> {
    if config.absence.before_first_revision == Absent::Open {
        return Ok(Early::DeclaredOpen);
    }
    let (saved, damaged) = Store::new(&config.state_dir).load();
    if let Some(why) = damaged {
        anyhow::bail!(
            "no revision can be loaded, this host is open until the agent has one: {why}; the agent writes a new file"
        );
    }
    // Who is enforced is known from a revision only, so without one `closed` closes nothing.
    if saved.is_none_or(|s| s.files.is_empty()) {
        return Ok(Early::NothingSaved);
    }
    let _ = proc::ensure_bpffs().context("no BPF file system at /sys/fs/bpf, and none can be mounted")?;
    let _ = proc::ensure_tracefs();
    // Interfaces come after this; the outer wall is never needed for a verdict, and the agent attaches it.
    config.xdp.clear();
    let hierarchy = Hierarchy::find()?;
    let datapath = Datapath::load(&config.pin_dir)?;
    let active = datapath.active()?;
    if active.generation != 0 && is_attached(&datapath)? {
        return Ok(Early::InForce { generation: active.generation });
    }
    let history = Arc::new(History::new(config.host.as_str().into(), NO_HISTORY));
    let mut core = Core::assemble(config, Arc::new(datapath), hierarchy, Arc::new(Shared::default()), history)?;
    core.start_without_folder();
    match (&core.in_force, &core.refused) {
        (Some(f), _) => Ok(Early::Loaded { revision: f.revision.number, generation: f.revision.generation }),
        (None, Some(refused)) => Err(anyhow::anyhow!("the last good revision cannot be loaded: {}", refused.why)),
        (None, None) => Err(anyhow::anyhow!("the last good revision cannot be loaded")),
    }
}

/// Are all hooks there that every revision needs?
fn is_attached(datapath: &Datapath) -> anyhow::Result<bool> {
    let there = |program: &str| -> anyhow::Result<bool> {
        let pin = datapath.dir.join(format!("link-{program}"));
        Ok(sys::get(&pin).with_context(|| format!("open {}", pin.display()))?.is_some())
    };
    // Of what comes in one of the two gates.
    for hook in attach::HOOKS.iter().filter(|hook| hook.program != attach::INGRESS.program) {
        if !there(hook.program)? {
            return Ok(false);
        }
    }
    Ok(there(attach::INGRESS.program)? || there(CONN.program)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::revision::Saved;

    /// A host where nothing was ever saved; nothing of it needs privilege.
    fn config(dir: &std::path::Path, absent: Absent) -> Config {
        let mut config = Config::new(dir, "/c".into(), "h".to_owned());
        config.state_dir = dir.join("state");
        config.pin_dir = dir.join("pins");
        config.absence.before_first_revision = absent;
        config
    }

    #[test]
    fn without_a_saved_revision_the_declared_absence_holds() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(config(dir.path(), Absent::LastKnownGood)).unwrap(), Early::NothingSaved);
        assert_eq!(load(config(dir.path(), Absent::Open)).unwrap(), Early::DeclaredOpen);
        assert_eq!(load(config(dir.path(), Absent::Closed)).unwrap(), Early::NothingSaved);
        assert!(!dir.path().join("pins").exists());
    }

    #[test]
    fn a_damaged_state_is_an_error_and_not_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        Store::new(&state).save(&Saved { revision: 3, ..Saved::default() }).unwrap();
        std::fs::write(state.join("state.json"), "{").unwrap();
        let error = load(config(dir.path(), Absent::LastKnownGood)).unwrap_err().to_string();
        assert!(error.contains("state.json is damaged"), "{error}");
    }
}
