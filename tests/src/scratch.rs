//! What a test of the datapath alone needs: a pin folder and a cgroup of its own, gone when it ends, however it ends.

use crate::world::cgroup2_mount;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How every pin folder and cgroup of ours begins; then follow the process id and a number.
const PREFIX: &str = "segfw-kt-";
const BPFFS: &str = "/sys/fs/bpf";

static LIVE: Mutex<Vec<Traces>> = Mutex::new(Vec::new());
static NEXT: AtomicU32 = AtomicU32::new(0);

fn live() -> MutexGuard<'static, Vec<Traces>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Traces {
    pins: PathBuf,
    cgroup: PathBuf,
    /// Where this process was before.
    home: PathBuf,
}

/// See the module.
#[derive(Debug)]
pub struct Scratch(Traces);

impl Scratch {
    /// Chooses the names; nothing is made yet.
    pub fn new() -> Result<Self> {
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mount = cgroup2_mount()?;
        let traces = Traces { pins: Path::new(BPFFS).join(&name), cgroup: mount.join(&name), home: own_cgroup()? };
        live().push(traces.clone());
        Ok(Self(traces))
    }

    /// A bpffs folder, not made here.
    pub fn pins(&self) -> &Path {
        &self.0.pins
    }

    /// A cgroup, made if need be; `""` = the top one.
    pub fn cgroup(&self, path: &str) -> Result<PathBuf> {
        let full = if path.is_empty() { self.0.cgroup.clone() } else { self.0.cgroup.join(path) };
        // Held, so that a signal does not clean up before this.
        let _live = live();
        fs::create_dir_all(&full).with_context(|| format!("making the cgroup {}", full.display()))?;
        Ok(full)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut live = live();
        live.retain(|t| *t != self.0);
        self.0.remove();
    }
}

impl Traces {
    fn remove(&self) {
        end_pins(&self.pins);
        if self.cgroup.exists() {
            let _ = enter(&self.home);
            end_cgroup(&self.cgroup);
        }
    }
}

/// Moves this process into a cgroup: the sockets it makes from now on belong there.
pub fn enter(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("entering {}", cgroup.display()))
}

/// The cgroup of this process.
pub fn own_cgroup() -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    match text.lines().find_map(|l| l.strip_prefix("0::/")) {
        Some(path) => Ok(cgroup2_mount()?.join(path)),
        None => bail!("this process is in no cgroup v2"),
    }
}

/// The number by which the kernel knows a cgroup.
pub fn cgroup_id(cgroup: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(cgroup)?.ino())
}

fn end_pins(pins: &Path) {
    let _ = segfw::datapath::attach::remove(pins);
    let _ = fs::remove_dir_all(pins);
}

fn end_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            end_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

/// Removes what runs that are dead have left; how much it was.
pub fn sweep_stale() -> usize {
    let mut swept = 0;
    let mut visit = |folder: &Path, end: fn(&Path)| {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let rest = name.to_str().and_then(|n| n.strip_prefix(PREFIX)).and_then(|n| n.split_once('-'));
            let Some(pid) = rest.and_then(|(pid, _)| pid.parse::<u32>().ok()) else { continue };
            if !Path::new(&format!("/proc/{pid}")).exists() {
                end(&entry.path());
                swept += 1;
            }
        }
    };
    visit(Path::new(BPFFS), end_pins);
    if let Ok(mount) = cgroup2_mount() {
        visit(&mount, end_cgroup);
    }
    swept
}

/// Makes SIGINT, SIGTERM and SIGHUP remove everything before the process ends. Call it first in `main`: threads that
/// exist already would not have the signals blocked.
pub fn clean_up_on_signals() -> Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    let _ = std::thread::spawn(move || {
        let signal = set.wait();
        // Held to the end: nothing is made any more.
        let live = live();
        eprintln!("\ninterrupted: cleaning up");
        for traces in live.iter() {
            traces.remove();
        }
        std::process::exit(128 + signal.map_or(2, |s| s as i32));
    });
    Ok(())
}
