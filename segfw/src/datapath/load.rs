//! The eBPF object: its maps, opened from their pins or made, and its programs, checked by this kernel's verifier.

use super::attach::{CGROUP_MADE, CGROUP_MADE_BY_TYPE};
use super::btf::Btf;
use super::security;
use super::sys::Instruction;
use super::{Error, sys};
use aya::maps::Map;
use aya::programs::{BtfTracePoint, CgroupSkb, CgroupSock, CgroupSockAddr, Program, SockOps, TracePoint, Xdp};
use aya::{Ebpf, EbpfLoader};
use segfw_common::ABI_VERSION;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// The object that build.rs made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/segfw-ebpf"));

/// Maps that outlive the agent, by name.
pub const PINNED_MAPS: [&str; 22] = [
    "CLASSES",
    "RULES",
    "TIMELINE",
    "LOCALS",
    "HOSTS",
    "PREFIXES",
    "CONTROL",
    "CGROUPS",
    "PATHS",
    "ADDRESSES",
    "XDP_NETNS",
    "ENDPOINTS",
    "LISTENERS",
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

/// What this kernel offers to programs beyond what 5.10 has. Each is a constant for the verifier, so that what is not
/// there is never called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `bpf_set_retval` in hooks of system calls (5.18): a `reject` reads as ECONNREFUSED and not as EPERM.
    pub set_retval: bool,
    /// `bpf_get_netns_cookie` in cgroup_skb programs (6.15 upstream).
    pub skb_netns: bool,
    /// How `sock_ops` programs learn which process connects.
    pub sock_ops_process: ProcessBy,
    /// How the kernel side learns of a new cgroup.
    pub cgroup_made: MadeBy,
}

/// See [`Features::sock_ops_process`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessBy {
    /// Not at all: records of connections that may go name no process.
    Nothing,
    /// Helpers (6.18).
    Helpers,
    /// The kernel's own `task_struct`.
    Task,
}

/// See [`Features::cgroup_made`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadeBy {
    /// Not at all: programs may not read the kernel's memory (lockdown), or there is no BTF below 6.1.
    Nothing,
    /// The tracepoint (6.1: programs at tracepoints may add to maps).
    Event,
    /// The arguments of the tracepoint, by the kernel's own types.
    Types,
}

/// Fields of the kernel that programs read where there is no helper: constant of the object, structure, field, bytes.
pub(super) const FIELDS: [(&str, &str, &str, u32); 6] = [
    ("TASK_TGID", "task_struct", "tgid", 4),
    ("TASK_COMM", "task_struct", "comm", 16),
    ("CGROUP_ROOT", "cgroup", "root", 8),
    ("CGROUP_KN", "cgroup", "kn", 8),
    ("ROOT_HIERARCHY", "cgroup_root", "hierarchy_id", 4),
    ("KN_ID", "kernfs_node", "id", 8),
];

impl Features {
    /// Asks this kernel.
    pub fn probe() -> Self {
        use sys::{FN_GET_CURRENT_COMM, FN_GET_CURRENT_PID_TGID, FN_GET_CURRENT_TASK, FN_GET_NETNS_COOKIE};
        raise_memlock();
        let sock_ops = |helpers: &[i32]| sys::has_helpers(sys::PROG_TYPE_SOCK_OPS, helpers);
        let types = std::path::Path::new("/sys/kernel/btf/vmlinux").exists();
        Self {
            set_retval: kernel_at_least(5, 18),
            skb_netns: sys::has_helpers(sys::PROG_TYPE_CGROUP_SKB, &[FN_GET_NETNS_COOKIE]),
            sock_ops_process: if sock_ops(&[FN_GET_CURRENT_PID_TGID, FN_GET_CURRENT_COMM]) {
                ProcessBy::Helpers
            } else if types && sock_ops(&[FN_GET_CURRENT_TASK, sys::FN_PROBE_READ_KERNEL]) {
                ProcessBy::Task
            } else {
                ProcessBy::Nothing
            },
            cgroup_made: if !sys::has_helpers(sys::PROG_TYPE_TRACEPOINT, &[sys::FN_PROBE_READ_KERNEL]) {
                MadeBy::Nothing
            } else if kernel_at_least(6, 1) {
                MadeBy::Event
            } else if types {
                MadeBy::Types
            } else {
                MadeBy::Nothing
            },
        }
    }

    /// What this kernel cannot do for us, each with what that means. Nothing here lets a flow pass that a policy refuses.
    pub fn less(self) -> Vec<(&'static str, &'static str)> {
        let all = [
            (
                self.set_retval,
                "`reject` at the sender (this kernel has no bpf_set_retval; it came with 5.18)",
                "a rejected connect or send fails with EPERM and not with ECONNREFUSED",
            ),
            (
                self.skb_netns,
                "the namespace of packets (cgroup_skb programs may not call bpf_get_netns_cookie here; 6.15 brought it)",
                "a socket that is older than the programs knows its peers on loopback only once its process has used it; until \
                 then they are unresolved, which is refused",
            ),
            (
                self.sock_ops_process != ProcessBy::Nothing,
                "who connects (sock_ops programs may not ask here)",
                "records of TCP connections that were allowed name no process; those of refused ones do",
            ),
            (
                self.cgroup_made != MadeBy::Nothing,
                "new cgroups (programs may not read the kernel's memory here: lockdown=confidentiality, or no BTF below 6.1)",
                "a workload that starts counts as host until the agent has seen it, and for good while no agent runs",
            ),
        ];
        all.into_iter().filter(|(there, ..)| !there).map(|(_, what, means)| (what, means)).collect()
    }

    /// The constants of the object.
    fn globals(self) -> Vec<(&'static str, u32)> {
        let by = match self.sock_ops_process {
            ProcessBy::Nothing => 0,
            ProcessBy::Helpers => 1,
            ProcessBy::Task => 2,
        };
        let mut globals = vec![
            ("HAS_SET_RETVAL", u32::from(self.set_retval)),
            ("HAS_SKB_NETNS", u32::from(self.skb_netns)),
            ("SOCK_OPS_PROCESS", by),
        ];
        // Some five megabytes, so only where something rests on it.
        if (self.sock_ops_process == ProcessBy::Task || self.cgroup_made == MadeBy::Types)
            && let Ok(btf) = Btf::of_kernel()
        {
            let offset = |(constant, structure, field, size)| Some((constant, btf.offset(structure, &[field], size)?));
            globals.extend(FIELDS.into_iter().filter_map(offset));
        }
        globals
    }

    /// Whether a program of the object is used here.
    fn uses(self, program: &str) -> bool {
        match program {
            CGROUP_MADE => self.cgroup_made == MadeBy::Event,
            CGROUP_MADE_BY_TYPE => self.cgroup_made == MadeBy::Types,
            _ => true,
        }
    }
}

fn loader<'a>(globals: &'a [(&'static str, u32)]) -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    for (name, value) in globals {
        let _ = loader.override_global(name, value, true);
    }
    loader
}

/// A program by name, and what became of it.
#[doc(hidden)]
pub type Verified = (String, Result<sys::ProgramInfo, Error>);

/// Loads each program by itself, with maps that nobody else has, and says what the verifier said of it. For tests of kernels.
#[doc(hidden)]
pub fn verify(features: Features) -> Result<Vec<Verified>, Error> {
    raise_memlock();
    let globals = features.globals();
    let mut ebpf = loader(&globals).load(OBJECT)?;
    let mut all = Vec::new();
    let wanted = |name: &str, program: &Program| features.uses(name) && !matches!(program, Program::Lsm(_));
    for (name, program) in ebpf.programs_mut().filter(|(name, program)| wanted(name, program)) {
        let loaded = load_program(program)
            .and_then(|()| Ok(sys::program_info(program.fd()?.as_fd())))
            .map_err(|source| Error::Program { name: name.to_owned(), source: Box::new(source) })
            .and_then(|info| info.map_err(|e| Error::sys(format!("read the program {name}"), e)));
        all.push((name.to_owned(), loaded));
    }
    Ok(all)
}

/// The programs and maps of this build in the kernel. Dropping it detaches nothing: links belong to their pins.
pub struct Datapath {
    ebpf: Ebpf,
    pub(super) maps: BTreeMap<&'static str, Arc<OwnedFd>>,
    /// Programs of the security checks, not loaded yet, and those that are.
    pub(super) security: BTreeMap<&'static str, Vec<Instruction>>,
    pub(super) checks: Mutex<BTreeMap<&'static str, OwnedFd>>,
    pub(super) held: Mutex<super::generation::Held>,
    /// Folder of the pins of this layout.
    pub dir: PathBuf,
    /// What the programs use of this kernel.
    pub features: Features,
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
        let features = Features::probe();
        let globals = features.globals();
        let mut loader = loader(&globals);
        let layout = Btf::of_kernel().ok().and_then(|btf| security::layout(&btf)).unwrap_or_default();
        let _ = loader.override_global("LAYOUT", &layout, true);
        let ancestors = u32::from(kernel_at_least(5, 16));
        let _ = loader.override_global("CHECKS_KNOW_ANCESTORS", &ancestors, true);
        let softirq_alone = u32::from(!preempt_rt());
        let _ = loader.override_global("SOFTIRQ_ALONE", &softirq_alone, true);
        for name in PINNED_MAPS {
            let _ = loader.map_pin_path(name, dir.join(name));
        }
        let mut ebpf = loader.load(OBJECT)?;
        // Those of the security checks are loaded when it is known through which door.
        let wanted = |name: &str, program: &Program| features.uses(name) && !matches!(program, Program::Lsm(_));
        for (name, program) in ebpf.programs_mut().filter(|(name, program)| wanted(name, program)) {
            let name = name.to_owned();
            load_program(program).map_err(|source| Error::Program { name, source: Box::new(source) })?;
        }
        let mut maps = BTreeMap::new();
        for name in PINNED_MAPS {
            let missing = || Error::Missing { kind: "map", name: name.to_owned() };
            let map = sys::get(&dir.join(name)).map_err(|e| Error::sys(format!("open the map {name}"), e))?;
            let _ = maps.insert(name, Arc::new(map.ok_or_else(missing)?));
        }
        // Data sections, and what is not pinned.
        let sections = ebpf.maps().filter_map(|(name, map)| {
            let (Map::Array(data) | Map::PerCpuArray(data)) = map else { return None };
            Some((name.to_owned(), data.fd().as_fd().as_raw_fd()))
        });
        let pinned = maps.iter().map(|(name, map)| ((*name).to_owned(), map.as_raw_fd()));
        let security = security::instructions(OBJECT, &sections.chain(pinned).collect())?;
        Ok(Self { ebpf, maps, security, checks: Mutex::default(), held: Mutex::default(), dir, features })
    }

    /// A map by name.
    pub fn map(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        self.maps.get(name).map(|map| map.as_fd()).ok_or_else(|| Error::Missing { kind: "map", name: name.to_owned() })
    }

    /// A loaded program by name.
    pub fn program(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        let missing = || Error::Missing { kind: "program", name: name.to_owned() };
        let program = self.ebpf.program(name).ok_or_else(missing)?;
        program.fd().map(AsFd::as_fd).map_err(|_| missing())
    }

    /// Names of the programs that are loaded; those of the security checks are loaded apart.
    pub fn programs(&self) -> impl Iterator<Item = &str> {
        self.ebpf.programs().filter(|(_, p)| p.fd().is_ok()).map(|(name, _)| name)
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
    if let Ok(p) = <&mut BtfTracePoint>::try_from(&mut *program) {
        let btf = aya::Btf::from_sys_fs()?;
        return p.load("cgroup_mkdir", &btf);
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

/// Does one softirq interrupt another on a CPU? Where that cannot be read: perhaps.
fn preempt_rt() -> bool {
    let version = std::fs::read_to_string("/proc/sys/kernel/version").unwrap_or_else(|_| "PREEMPT_RT".to_owned());
    version.contains("PREEMPT_RT") || version.contains("PREEMPT RT")
}

/// Is the running kernel at least this release?
pub fn kernel_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).filter_map(|p| p.parse::<u32>().ok());
    let have = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    have >= (major, minor)
}
