//! Small facts from `/proc` and the clocks.

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::statfs;
use nix::time::{ClockId, clock_gettime};
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{fs, io};

/// Where the pinned programs live.
pub const BPFFS: &str = "/sys/fs/bpf";

/// The kernel from which BPF memory is charged to the memory cgroup instead of `RLIMIT_MEMLOCK` (5.11,
/// kernel/bpf/syscall.c).
const MEMCG_ACCOUNTING: (u32, u32) = (5, 11);

/// Name of a process (15 bytes at most), `None` once it has gone.
pub fn comm(pid: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).into_owned())
}

/// Nanoseconds since boot with suspend: the clock of every deadline and time stamp in the kernel tables
/// (`bpf_ktime_get_boot_ns`).
pub fn boot_ns() -> io::Result<u64> {
    Ok(nanoseconds(ClockId::CLOCK_BOOTTIME)?.unsigned_abs())
}

/// Signed, because a wall clock may stand before 1970.
fn nanoseconds(clock: ClockId) -> io::Result<i64> {
    let time = clock_gettime(clock)?;
    Ok(time.tv_sec().saturating_mul(1_000_000_000).saturating_add(time.tv_nsec()))
}

/// How the wall clock stands to the boot clock. Take a new one now and then: NTP and people move the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockMap {
    /// Wall (nanoseconds since 1970) minus boot (nanoseconds).
    wall_minus_boot: i64,
}

impl ClockMap {
    /// Reads boot, wall, boot, and takes the middle: right to half the time of three system calls.
    pub fn now() -> io::Result<Self> {
        let before = nanoseconds(ClockId::CLOCK_BOOTTIME)?;
        let wall = nanoseconds(ClockId::CLOCK_REALTIME)?;
        let after = nanoseconds(ClockId::CLOCK_BOOTTIME)?;
        Ok(Self { wall_minus_boot: wall - (before + (after - before) / 2) })
    }

    /// Wall time of a boot time stamp in nanoseconds.
    pub fn wall(&self, boot_ns: u64) -> SystemTime {
        let ns = i64::try_from(boot_ns).unwrap_or(i64::MAX).saturating_add(self.wall_minus_boot);
        let distance = Duration::from_nanos(ns.unsigned_abs());
        if ns < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
    }

    /// Boot nanoseconds of a wall time; 0 if it lies before boot.
    pub fn boot_ns(&self, wall: SystemTime) -> u64 {
        let ns = match wall.duration_since(UNIX_EPOCH) {
            Ok(after) => i128::try_from(after.as_nanos()).unwrap_or(i128::MAX),
            Err(before) => -i128::try_from(before.duration().as_nanos()).unwrap_or(i128::MAX),
        };
        let boot = ns.saturating_sub(i128::from(self.wall_minus_boot)).max(0);
        u64::try_from(boot).unwrap_or(u64::MAX)
    }
}

/// The running kernel, as `uname -r` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// For example `6.18.44-fc-v595`.
    pub text: String,
    /// Major and minor number.
    pub version: (u32, u32),
}

/// Reads the release of the running kernel.
pub fn release() -> io::Result<Release> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let version = version(&text).ok_or_else(|| io::Error::other(format!("kernel release {text:?} has no number")))?;
    Ok(Release { text, version })
}

fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Capabilities we use, by bit number (include/uapi/linux/capability.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Sockets of others: SOCK_DESTROY, cgroup hooks.
    NetAdmin = 12,
    /// Raw sockets for answers.
    NetRaw = 13,
    /// File descriptors of other processes.
    SysPtrace = 19,
    /// `setns`, mounts; all of bpf(2) before 5.8.
    SysAdmin = 21,
    /// Tracing programs, from 5.8.
    Perfmon = 38,
    /// bpf(2), from 5.8.
    Bpf = 39,
}

impl Capability {
    /// The name the manual pages use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::NetRaw => "CAP_NET_RAW",
            Self::SysPtrace => "CAP_SYS_PTRACE",
            Self::SysAdmin => "CAP_SYS_ADMIN",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
        }
    }
}

/// The effective capabilities of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(u64);

impl Capabilities {
    /// Reads `CapEff`.
    pub fn held() -> io::Result<Self> {
        let status = fs::read_to_string("/proc/thread-self/status")?;
        Self::parse(&status).ok_or_else(|| io::Error::other("/proc/thread-self/status has no CapEff line"))
    }

    fn parse(status: &str) -> Option<Self> {
        let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(mask.trim(), 16).ok().map(Self)
    }

    /// True if held; CAP_SYS_ADMIN contains CAP_BPF and CAP_PERFMON (`bpf_capable()`, include/linux/capability.h).
    pub fn has(self, capability: Capability) -> bool {
        let bit = |c: u64| self.0 & (1 << c) != 0;
        bit(capability as u64)
            || (matches!(capability, Capability::Bpf | Capability::Perfmon) && bit(Capability::SysAdmin as u64))
    }
}

/// What [`ensure_bpffs`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bpffs {
    /// It was there.
    Mounted,
    /// We mounted it.
    MountedNow,
}

/// True if a BPF file system is mounted at `path`.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(statfs::statfs(path)?.filesystem_type() == statfs::BPF_FS_MAGIC)
}

/// Mounts a BPF file system at [`BPFFS`] unless there is one. Needs CAP_SYS_ADMIN to mount. The caller says
/// [`Bpffs::MountedNow`] aloud: pins in it die with this mount namespace if that is not the host's.
pub fn ensure_bpffs() -> io::Result<Bpffs> {
    let path = Path::new(BPFFS);
    if is_bpffs(path)? {
        return Ok(Bpffs::Mounted);
    }
    let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=700"))?;
    Ok(Bpffs::MountedNow)
}

/// Mounts tracefs at its usual place unless it is there; true if it was mounted now. A refusal is no error here: whoever
/// needs an event finds out, and says what follows.
pub fn ensure_tracefs() -> bool {
    let path = Path::new("/sys/kernel/tracing");
    if path.join("events").is_dir() {
        return false;
    }
    let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV | nix::mount::MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("tracefs"), path, Some("tracefs"), flags, None::<&str>).is_ok()
}

/// Lifts `RLIMIT_MEMLOCK` on kernels that charge maps to it; true if it was lifted.
pub fn raise_memlock() -> io::Result<bool> {
    if release()?.version >= MEMCG_ACCOUNTING {
        return Ok(false);
    }
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
    Ok(true)
}

/// The numeric directories of `/proc`: processes that live at this moment.
pub fn pids() -> io::Result<Vec<u32>> {
    Ok(fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Path of a process's cgroup in the v2 hierarchy, as `0::` says it: relative to the reader's cgroup namespace.
/// `None` once the process has gone. A removed cgroup's ` (deleted)` is cut off.
pub fn cgroup_of(pid: u32) -> Option<String> {
    cgroup_line(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

fn cgroup_line(text: &str) -> Option<String> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(path.strip_suffix(" (deleted)").unwrap_or(path).to_owned())
}

/// Which processes hold these sockets, by inode number: for packet and raw sockets, whose dump names no cgroup.
/// Reads every descriptor of every process (about 1 µs each): for an inventory, not for a loop.
pub fn socket_owners(inodes: &HashSet<u32>) -> io::Result<HashMap<u32, Vec<u32>>> {
    let mut owners: HashMap<u32, Vec<u32>> = HashMap::new();
    if inodes.is_empty() {
        return Ok(owners);
    }
    for pid in pids()? {
        let mut held = HashSet::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let inode = fs::read_link(entry.path())
                .ok()
                .and_then(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u32>().ok());
            if let Some(inode) = inode.filter(|inode| inodes.contains(inode))
                && held.insert(inode)
            {
                owners.entry(inode).or_default().push(pid);
            }
        }
    }
    Ok(owners)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn own_name_and_release() {
        assert!(comm(std::process::id()).is_some_and(|name| !name.is_empty()));
        assert_eq!(comm(u32::MAX), None);
        assert!(release().unwrap().version >= (4, 0));
        assert_eq!(version("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(version("5.10-rc1"), Some((5, 10)));
        assert_eq!(version("linux"), None);
    }

    #[test]
    fn clocks_round_trip() {
        let map = ClockMap::now().unwrap();
        let boot = boot_ns().unwrap();
        let wall = map.wall(boot);
        assert!(wall.duration_since(SystemTime::now()).unwrap_or_else(|e| e.duration()) < Duration::from_millis(100));
        assert_eq!(map.boot_ns(wall), boot);
        assert_eq!(map.boot_ns(UNIX_EPOCH), 0);
        let odd = ClockMap { wall_minus_boot: -5_000_000_000 };
        assert_eq!(odd.wall(2_000_000_000), UNIX_EPOCH - Duration::from_secs(3));
        assert_eq!(odd.boot_ns(UNIX_EPOCH - Duration::from_secs(3)), 2_000_000_000);
    }

    #[test]
    fn capability_bits() {
        let caps = |mask: &str| Capabilities::parse(&format!("Name:\tx\nCapEff:\t{mask}\n")).unwrap();
        assert!(caps("0000000000001000").has(Capability::NetAdmin));
        assert!(!caps("0000000000001000").has(Capability::NetRaw));
        assert!(caps("0000008000000000").has(Capability::Bpf));
        assert!(caps("0000000000200000").has(Capability::Bpf), "CAP_SYS_ADMIN contains it");
        assert!(Capabilities::held().is_ok());
    }

    #[test]
    fn cgroup_lines() {
        assert_eq!(cgroup_line("4:memory:/x\n0::/a/b.service\n").as_deref(), Some("/a/b.service"));
        assert_eq!(cgroup_line("0::/gone (deleted)\n").as_deref(), Some("/gone"));
        assert_eq!(cgroup_line("4:memory:/x\n"), None);
    }

    #[test]
    fn finds_the_owner_of_a_socket() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let inode = nix::sys::stat::fstat(&socket).unwrap().st_ino as u32;
        assert!(socket.as_raw_fd() >= 0);
        let owners = socket_owners(&HashSet::from([inode])).unwrap();
        assert_eq!(owners.get(&inode), Some(&vec![std::process::id()]));
    }

    #[test]
    fn bpffs_is_mounted_where_we_may() {
        if super::super::testing::root("bpffs_is_mounted_where_we_may") {
            // In a mount namespace of its own, so that the host keeps what it has.
            std::thread::spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
                let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
                nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
                nix::mount::mount(Some("none"), BPFFS, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
                    .unwrap();
                assert_eq!(ensure_bpffs().unwrap(), Bpffs::MountedNow);
                assert_eq!(ensure_bpffs().unwrap(), Bpffs::Mounted);
            })
            .join()
            .unwrap();
        }
    }
}
