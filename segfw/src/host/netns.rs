//! Network namespaces: which there are, what they are called in the kernel, who and which addresses live in them.
//!
//! Found are namespaces of processes (`/proc/PID/ns/net`) and mounted ones (`/run/netns`, `/run/docker/netns`). Not
//! found: one that only a file descriptor, a socket or a single thread of a process keeps alive. Hooks at the cgroup
//! root still judge what happens there; only the inventory and SOCK_DESTROY do not reach it.

use super::proc;
use crate::datapath::cookie;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io, thread};

/// Where tools mount namespaces that no process may live in: iproute2 and CNI, Docker.
const MOUNT_DIRECTORIES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// Namespaces in one survey: each costs a descriptor for as long as the survey lives. As many as there may be
/// workloads (8,192), each in one of its own.
pub const MAX_NAMESPACES: usize = 8_192;

/// include/uapi/linux/sockios.h: a descriptor of the socket's network namespace.
const SIOCGSKNS: libc::Ioctl = 0x894c;
/// include/uapi/linux/nsfs.h: a descriptor of the user namespace that owns a namespace (4.9).
const NS_GET_USERNS: libc::Ioctl = 0xb701;

/// What goes wrong with namespaces.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not allowed, or the namespace is not one.
    #[error("cannot enter network namespace: {0} (needs CAP_SYS_ADMIN)")]
    Enter(#[source] io::Error),
    /// No thread.
    #[error("cannot start a thread for a network namespace: {0}")]
    Thread(#[source] io::Error),
    /// The kernel is older than 5.14, and a program could not tell either.
    #[error(
        "this kernel has no SO_NETNS_COOKIE (it came with 5.14), and a program of ours at the agent's cgroup did not tell: {0}"
    )]
    NoCookie(String),
    /// `/proc` cannot be read.
    #[error("cannot list network namespaces: {0}")]
    List(#[source] io::Error),
}

/// One network namespace, held open.
#[derive(Debug)]
pub struct Namespace {
    /// `SO_NETNS_COOKIE`, the same as `bpf_get_netns_cookie`: not reused until reboot.
    pub cookie: u64,
    /// Inode number in nsfs, as in `net:[4026531840]`: reused once the namespace has gone.
    pub inode: u64,
    /// Addresses of its interfaces, sorted, without repeats; loopback among them.
    pub addresses: Vec<IpAddr>,
    /// Processes in it, at the time of the survey.
    pub pids: Vec<u32>,
    /// Their cgroups, as paths in the v2 hierarchy (`/system.slice/web.service`). One entry means: this namespace belongs to
    /// one cgroup. Empty for the survey's own namespace, which is everybody's.
    pub cgroups: BTreeSet<String>,
    /// Where it is mounted, if it is.
    pub mounts: Vec<PathBuf>,
    /// The namespace of this process.
    pub own: bool,
    /// Another user namespace owns it: any user may make one like this, and is root in it. Addresses there are what
    /// that user likes to call himself, no evidence of anything.
    pub self_made: bool,
    fd: OwnedFd,
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// All namespaces, and what could not be looked at: an unseen namespace is said, not dropped.
#[derive(Debug, Default)]
pub struct Survey {
    /// By cookie.
    pub namespaces: Vec<Namespace>,
    /// Those that could not be opened or entered, and why. A process that went away meanwhile is not here.
    pub skipped: Vec<(PathBuf, String)>,
}

impl Survey {
    /// The namespace with this cookie.
    pub fn get(&self, cookie: u64) -> Option<&Namespace> {
        self.namespaces.binary_search_by_key(&cookie, |n| n.cookie).ok().map(|i| &self.namespaces[i])
    }

    /// Own addresses: (cookie, address).
    pub fn addresses(&self) -> impl Iterator<Item = (u64, IpAddr)> {
        self.namespaces.iter().flat_map(|n| n.addresses.iter().map(|a| (n.cookie, *a)))
    }
}

/// Runs `f` on a thread of its own inside the namespace and gives back its result; a panic goes on in the caller.
/// The thread ends afterwards, so no thread of a pool is ever left in a foreign namespace. Child processes that `f`
/// starts are born in the namespace.
pub fn in_netns<T: Send>(namespace: impl AsFd, f: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let fd = namespace.as_fd();
    on_thread(move || {
        setns(fd, CloneFlags::CLONE_NEWNET).map_err(|e| Error::Enter(e.into()))?;
        Ok(f())
    })
}

/// [`in_netns`] for the namespace a socket belongs to (`SIOCGSKNS`, 4.9).
pub(super) fn in_netns_of<T: Send>(socket: impl AsFd, f: impl FnOnce() -> T + Send) -> Result<T, Error> {
    // SAFETY: the request takes no argument; a result that is not negative is a new descriptor that nobody else owns.
    let fd = unsafe {
        let fd = libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS);
        if fd < 0 {
            return Err(Error::Enter(io::Error::last_os_error()));
        }
        OwnedFd::from_raw_fd(fd)
    };
    in_netns(fd, f)
}

fn on_thread<T: Send>(f: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    thread::scope(|scope| {
        let handle = thread::Builder::new().name("netns".into()).spawn_scoped(scope, f).map_err(Error::Thread)?;
        handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Cookie of the namespace the calling thread is in.
pub fn current_cookie() -> Result<u64, Error> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .or_else(|_| socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None))
        .map_err(|e| Error::Enter(e.into()))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `length` live through the call, and `length` is the size of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { cookie_by_program() }
}

/// [`current_cookie`] before 5.14.
fn cookie_by_program() -> Result<u64, Error> {
    let unknown = |what: String| Error::NoCookie(what);
    let hierarchy = super::cgroup::Hierarchy::find().map_err(|e| unknown(e.to_string()))?;
    let text = fs::read_to_string("/proc/self/cgroup").map_err(|e| unknown(e.to_string()))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.ok_or_else(|| unknown("this process is in no cgroup v2".to_owned()))?;
    cookie::of_thread(&hierarchy.mount.join(path), || {
        socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).map_err(io::Error::from)
    })
    .map_err(|e| unknown(e.to_string()))
}

/// Addresses in the namespace the calling thread is in.
pub fn current_addresses() -> io::Result<Vec<IpAddr>> {
    let mut addresses: Vec<IpAddr> = nix::ifaddrs::getifaddrs()?
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// Every namespace of this machine. Costs a `readlink` per process, a read for those in other namespaces than ours, and one
/// `setns` per namespace.
pub fn survey() -> Result<Survey, Error> {
    let mut survey = Survey::default();
    let found = find(&mut survey.skipped)?;
    // One thread for all of them: it changes namespace as often as it likes and then ends.
    on_thread(move || {
        for (inode, found) in found {
            let Found { fd, pids, cgroups, mounts, own } = found;
            let first = mounts.first().cloned().or_else(|| pids.first().map(|pid| ns_path(*pid))).unwrap_or_default();
            if let Err(error) = setns(&fd, CloneFlags::CLONE_NEWNET) {
                survey.skipped.push((first, Error::Enter(error.into()).to_string()));
                continue;
            }
            let cookie = current_cookie()?;
            match current_addresses() {
                Ok(addresses) => {
                    let self_made = !own && self_made(&fd);
                    survey.namespaces.push(Namespace {
                        cookie,
                        inode,
                        addresses,
                        pids,
                        cgroups,
                        mounts,
                        own,
                        self_made,
                        fd,
                    })
                }
                Err(error) => survey.skipped.push((first, format!("cannot list addresses: {error}"))),
            }
        }
        survey.namespaces.sort_unstable_by_key(|n| n.cookie);
        Ok(survey)
    })
}

/// Does another user namespace than ours own this one? In doubt, yes.
fn self_made(namespace: &OwnedFd) -> bool {
    // SAFETY: the request takes no argument; a result that is not negative is a new descriptor that nobody else owns.
    let owner = unsafe {
        let fd = libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS);
        if fd < 0 {
            return true;
        }
        File::from(OwnedFd::from_raw_fd(fd))
    };
    let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|m| m.ino());
    let ours = inode(fs::metadata("/proc/self/ns/user"));
    ours.is_none() || inode(owner.metadata()) != ours
}

struct Found {
    fd: OwnedFd,
    pids: Vec<u32>,
    cgroups: BTreeSet<String>,
    mounts: Vec<PathBuf>,
    own: bool,
}

fn ns_path(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// Namespaces by inode number.
fn find(skipped: &mut Vec<(PathBuf, String)>) -> Result<HashMap<u64, Found>, Error> {
    let mut found: HashMap<u64, Found> = HashMap::new();
    let own = Path::new("/proc/thread-self/ns/net");
    let (inode, fd) = open(own).map_err(Error::List)?;
    found.insert(inode, Found { fd, pids: vec![], cgroups: BTreeSet::new(), mounts: vec![], own: true });

    for pid in proc::pids().map_err(Error::List)? {
        let path = ns_path(pid);
        // `readlink` is cheaper than `open`, and a zombie has no namespace any more.
        let inode = match fs::read_link(&path) {
            Ok(link) => link.to_str().and_then(|l| l.strip_prefix("net:[")?.strip_suffix(']')?.parse::<u64>().ok()),
            Err(error) => {
                note(skipped, path, &error);
                continue;
            }
        };
        let Some(inode) = inode else { continue };
        let inode = if found.contains_key(&inode) {
            inode
        } else if found.len() >= MAX_NAMESPACES {
            skipped.push((path, format!("more than {MAX_NAMESPACES} network namespaces")));
            continue;
        } else {
            match open(&path) {
                // The inode of what was opened: the process may have moved since.
                Ok((inode, fd)) => {
                    let new = || Found { fd, pids: vec![], cgroups: BTreeSet::new(), mounts: vec![], own: false };
                    found.entry(inode).or_insert_with(new);
                    inode
                }
                Err(error) => {
                    note(skipped, path, &error);
                    continue;
                }
            }
        };
        if let Some(namespace) = found.get_mut(&inode) {
            namespace.pids.push(pid);
            // Most processes live there, and nobody asks whose it is.
            if !namespace.own {
                namespace.cgroups.extend(proc::cgroup_of(pid));
            }
        }
    }
    for entry in MOUNT_DIRECTORIES.iter().flat_map(|d| fs::read_dir(d).into_iter().flatten().flatten()) {
        let path = entry.path();
        match open(&path) {
            Ok((inode, fd)) => {
                if found.len() >= MAX_NAMESPACES && !found.contains_key(&inode) {
                    skipped.push((path, format!("more than {MAX_NAMESPACES} network namespaces")));
                    continue;
                }
                let new = || Found { fd, pids: vec![], cgroups: BTreeSet::new(), mounts: vec![], own: false };
                found.entry(inode).or_insert_with(new).mounts.push(path);
            }
            Err(error) => note(skipped, path, &error),
        }
    }
    Ok(found)
}

/// A process that has gone is no news; everything else is a namespace that we do not see.
fn note(skipped: &mut Vec<(PathBuf, String)>, path: PathBuf, error: &io::Error) {
    if error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ESRCH) {
        skipped.push((path, error.to_string()));
    }
}

/// Opens a namespace file; a file that is not on nsfs (an unmounted leftover in `/run/netns`) is an error.
fn open(path: &Path) -> io::Result<(u64, OwnedFd)> {
    let file = File::open(path)?;
    if nix::sys::statfs::fstatfs(&file)?.filesystem_type() != nix::sys::statfs::NSFS_MAGIC {
        return Err(io::Error::other("not a namespace: nothing is mounted on this file"));
    }
    Ok((file.metadata()?.ino(), file.into()))
}

#[cfg(test)]
mod tests {
    use super::super::cgroup::Hierarchy;
    use super::super::testing::{self, Killed};
    use super::*;
    use std::process::Command;

    #[test]
    fn closures_run_inside_and_the_caller_stays_outside() {
        if !testing::root("closures_run_inside_and_the_caller_stays_outside") {
            return;
        }
        let outside = current_cookie().unwrap();
        let namespace = testing::Namespace::new();
        namespace.ip("addr add 192.0.2.77/32 dev lo");
        let (inside, addresses) = namespace.run(|| (current_cookie().unwrap(), current_addresses().unwrap()));
        assert_ne!(inside, outside);
        assert_eq!(current_cookie().unwrap(), outside);
        let expected: Vec<IpAddr> = ["127.0.0.1", "192.0.2.77", "::1"].iter().map(|a| a.parse().unwrap()).collect();
        assert_eq!(addresses, expected);
        let panicked = std::panic::catch_unwind(|| in_netns(&namespace, || panic!("inside")));
        assert!(panicked.is_err());
    }

    #[test]
    fn survey_finds_processes_and_mounts() {
        if !testing::root("survey_finds_processes_and_mounts") {
            return;
        }
        struct Named(String);
        impl Drop for Named {
            fn drop(&mut self) {
                let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
            }
        }
        let named = Named(testing::unique("segfw"));
        assert!(Command::new("ip").args(["netns", "add", &named.0]).status().unwrap().success());
        let namespace = testing::Namespace::new();
        namespace.ip("addr add 2001:db8::77/128 dev lo nodad");
        let cgroup = testing::Cgroup::new(&Hierarchy::find().unwrap());
        // Dropped, and so reaped, before its cgroup.
        let child = Killed(namespace.run(|| Command::new("sleep").arg("60").spawn().unwrap()));
        let cookie = namespace.run(|| current_cookie().unwrap());
        fs::write(cgroup.0.join("cgroup.procs"), child.0.id().to_string()).unwrap();

        let survey = survey().unwrap();
        let own: Vec<_> = survey.namespaces.iter().filter(|n| n.own).collect();
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].cookie, current_cookie().unwrap());
        assert!(own[0].pids.contains(&std::process::id()) && own[0].cgroups.is_empty());

        let found = survey.get(cookie).unwrap();
        assert_eq!(found.pids, [child.0.id()]);
        let name = Path::new("/").join(cgroup.0.file_name().unwrap());
        assert_eq!(found.cgroups.iter().map(Path::new).collect::<Vec<_>>(), [&name]);
        assert!(survey.addresses().any(|a| a == (cookie, "2001:db8::77".parse().unwrap())));
        assert_eq!(in_netns(found, || current_cookie().unwrap()).unwrap(), cookie);

        let mounted: Vec<_> =
            survey.namespaces.iter().filter(|n| n.mounts.iter().any(|m| m.ends_with(&named.0))).collect();
        assert_eq!(mounted.len(), 1);
        assert!(mounted[0].pids.is_empty() && mounted[0].cgroups.is_empty());
    }
}
