//! The eBPF object: its maps, opened from their pins or made, and its programs, checked by this kernel's verifier.

use super::{Error, sys};
use aya::programs::{CgroupSkb, CgroupSock, CgroupSockAddr, Program, SockOps, TracePoint, Xdp};
use aya::{Ebpf, EbpfLoader};
use segfw_common::ABI_VERSION;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

/// The object that build.rs made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/segfw-ebpf"));

/// Maps that outlive the agent, by name.
pub const PINNED_MAPS: [&str; 20] = [
    "CLASSES",
    "RULES",
    "TIMELINE",
    "LOCALS",
    "PREFIXES",
    "CONTROL",
    "CGROUPS",
    "PATHS",
    "ADDRESSES",
    "XDP_NETNS",
    "ENDPOINTS",
    "ORIGINS",
    "FLOWS",
    "EVENTS",
    "COUNTERS",
    "RULE_COUNTERS",
    "DENIALS",
    "SOCKETS",
    "PROBE",
    // Numbers of events go on where the last agent's programs stopped.
    "BUDGET",
];

static LATER: AtomicU32 = AtomicU32::new(0);

/// Makes this process a build with a later layout, for tests of upgrade and downgrade.
#[doc(hidden)]
pub fn pretend_later_layout() {
    LATER.store(1, Ordering::Relaxed);
}

/// The programs and maps of this build in the kernel. Dropping it detaches nothing: links belong to their pins.
pub struct Datapath {
    ebpf: Ebpf,
    maps: BTreeMap<&'static str, OwnedFd>,
    pub(super) next: Mutex<super::generation::Next>,
    /// Folder of the pins of this layout.
    pub dir: PathBuf,
}

/// Folder of one layout below the pin folder: an agent never opens maps of another layout.
pub fn layout_dir(pin_dir: &Path, abi: u32) -> PathBuf {
    pin_dir.join(format!("v{abi}"))
}

impl Datapath {
    /// Opens or makes all maps below `pin_dir` and loads all programs. Nothing is attached yet.
    pub fn load(pin_dir: &Path) -> Result<Self, Error> {
        Self::load_as(pin_dir, ABI_VERSION + LATER.load(Ordering::Relaxed))
    }

    /// [`Datapath::load`] under another layout number, for tests of the change from one layout to the next.
    #[doc(hidden)]
    pub fn load_as(pin_dir: &Path, abi: u32) -> Result<Self, Error> {
        let dir = layout_dir(pin_dir, abi);
        make_dir(pin_dir)?;
        make_dir(&dir)?;
        raise_memlock();
        let retval: u32 = u32::from(kernel_at_least(5, 18));
        let mut loader = EbpfLoader::new();
        let skb_netns = u32::from(sys::skb_knows_netns());
        let _ = loader.override_global("HAS_SET_RETVAL", &retval, true);
        let _ = loader.override_global("HAS_SKB_NETNS", &skb_netns, true);
        for name in PINNED_MAPS {
            let _ = loader.map_pin_path(name, dir.join(name));
        }
        let mut ebpf = loader.load(OBJECT)?;
        for (name, program) in ebpf.programs_mut() {
            let name = name.to_owned();
            load_program(program).map_err(|source| Error::Program { name, source: Box::new(source) })?;
        }
        let mut maps = BTreeMap::new();
        for name in PINNED_MAPS {
            let missing = || Error::Missing { kind: "map", name: name.to_owned() };
            let map = sys::get(&dir.join(name)).map_err(|e| Error::sys(format!("open the map {name}"), e))?;
            let _ = maps.insert(name, map.ok_or_else(missing)?);
        }
        Ok(Self { ebpf, maps, next: Mutex::default(), dir })
    }

    /// A map by name.
    pub fn map(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        self.maps.get(name).map(AsFd::as_fd).ok_or_else(|| Error::Missing { kind: "map", name: name.to_owned() })
    }

    /// A loaded program by name.
    pub fn program(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        let missing = || Error::Missing { kind: "program", name: name.to_owned() };
        let program = self.ebpf.program(name).ok_or_else(missing)?;
        program.fd().map(AsFd::as_fd).map_err(|_| missing())
    }

    /// Names of all programs.
    pub fn programs(&self) -> impl Iterator<Item = &str> {
        self.ebpf.programs().map(|(name, _)| name)
    }

    /// The ring buffer of events; can be taken once.
    pub fn take_events(&mut self) -> Result<aya::maps::RingBuf<aya::maps::MapData>, Error> {
        let missing = || Error::Missing { kind: "map", name: "EVENTS".to_owned() };
        let map = self.ebpf.take_map("EVENTS").ok_or_else(missing)?;
        aya::maps::RingBuf::try_from(map).map_err(|_| missing())
    }

    /// Runs a program on a packet without attaching it; `input` starts with an Ethernet header.
    pub fn test_run(&self, program: &str, input: &[u8]) -> Result<u32, Error> {
        sys::test_run(self.program(program)?, input).map_err(|e| Error::sys(format!("test run of {program}"), e))
    }
}

fn load_program(program: &mut Program) -> Result<(), aya::programs::ProgramError> {
    if let Ok(p) = <&mut CgroupSkb>::try_from(&mut *program) {
        return p.load();
    }
    if let Ok(p) = <&mut CgroupSock>::try_from(&mut *program) {
        return p.load();
    }
    if let Ok(p) = <&mut CgroupSockAddr>::try_from(&mut *program) {
        return p.load();
    }
    if let Ok(p) = <&mut SockOps>::try_from(&mut *program) {
        return p.load();
    }
    if let Ok(p) = <&mut TracePoint>::try_from(&mut *program) {
        return p.load();
    }
    <&mut Xdp>::try_from(program)?.load()
}

/// A folder of ours on bpffs, mode 0700: who can open a pin can change what is enforced.
fn make_dir(dir: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(dir);
    made.map_err(|source| Error::Io { what: "cannot make the pin folder", path: dir.display().to_string(), source })
}

/// Below 5.11 BPF memory counts against RLIMIT_MEMLOCK, and the default of 64 KiB makes every map fail with EPERM.
fn raise_memlock() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a plain call. Newer kernels do not need it, so a refusal is no error.
    let _ = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
}

/// Is the running kernel at least this release?
pub fn kernel_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).filter_map(|p| p.parse::<u32>().ok());
    let have = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    have >= (major, minor)
}
