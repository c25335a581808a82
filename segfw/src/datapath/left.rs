//! What an agent that is gone has left in the kernel: read from its pins alone, without loading anything.

use super::attach::{EGRESS, HOOKS, INGRESS};
use super::security::{CHECKS, CONN};
use super::sys;
use segfw_common::control;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// One layout below the pin folder; more than one only in the middle of an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// `v2`.
    pub layout: String,
    /// The kernel's number of the revision in force; 0 = none.
    pub generation: u32,
    /// Hooks that are attached, by name.
    pub attached: Vec<String>,
    /// Hooks that should be and are not.
    pub missing: Vec<String>,
    /// `absence.agentGone` took effect: new flows are refused (`closed`) or pass (`open`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone: Option<String>,
    /// Judged, and nothing dropped.
    pub monitor: bool,
}

impl Left {
    /// Does the kernel enforce by itself?
    pub fn enforces(&self) -> bool {
        self.generation != 0 && !self.attached.is_empty() && !self.monitor
    }
}

/// Everything below `pin_dir`, at boot time `now` (nanoseconds). No folder, no layouts. An error where it may not be read.
pub fn left(pin_dir: &Path, now: u64) -> io::Result<Vec<Left>> {
    let folder = match std::fs::read_dir(pin_dir) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut all = Vec::new();
    for layout in folder {
        let layout = layout?;
        all.push(one(&layout.path(), layout.file_name().to_string_lossy().into_owned(), now)?);
    }
    all.sort_by(|a, b| a.layout.cmp(&b.layout));
    Ok(all)
}

fn one(dir: &Path, layout: String, now: u64) -> io::Result<Left> {
    let (mut attached, mut missing) = (Vec::new(), Vec::new());
    let hooks = HOOKS.iter().chain([&EGRESS]).map(|hook| hook.program);
    for program in hooks.chain(CHECKS.iter().map(|check| check.program)) {
        let link = sys::get(&dir.join(format!("link-{program}")))?;
        // A link to a security check has no cgroup; another number stands in that place, and it is not 0.
        let there = link.is_some_and(|link| sys::link_info(link.as_fd()).is_ok_and(|info| info.cgroup != 0));
        if there {
            attached.push(program.to_owned());
        } else if program != INGRESS.program && HOOKS.iter().any(|hook| hook.program == program) {
            missing.push(program.to_owned());
        }
    }
    // One of the two gates.
    if !attached.iter().any(|p| p == INGRESS.program || p == CONN.program) {
        missing.push(INGRESS.program.to_owned());
    }
    let (active, flags) = match sys::get(&dir.join("CONTROL"))? {
        Some(map) => {
            let word = |index: u32| sys::map_lookup::<u32, u64>(map.as_fd(), &index).map(Option::unwrap_or_default);
            (word(control::ACTIVE)?, word(control::FLAGS)?)
        }
        None => (0, 0),
    };
    let after = flags >> control::GONE_SHIFT;
    let is_gone = after != 0 && now >> control::GONE_UNIT >= after;
    let word = if flags & control::HOST_GONE_OPEN != 0 { "open" } else { "closed" };
    Ok(Left {
        layout,
        generation: (active >> 32) as u32,
        attached,
        missing,
        gone: is_gone.then(|| word.to_owned()),
        monitor: flags & control::HOST_MONITOR != 0,
    })
}
