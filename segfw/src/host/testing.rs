//! Namespaces and cgroups for tests: unique, and removed when dropped, so also on panic.

use super::cgroup::Hierarchy;
use super::netns;
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};

/// True where tests may make namespaces; says so where they may not.
pub(super) fn root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: {test} needs root (network namespaces, cgroups)");
    }
    root
}

pub(super) fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A network namespace that lives as long as this value: nothing but the descriptor holds it.
pub(super) struct Namespace(OwnedFd);

impl Namespace {
    pub(super) fn new() -> Self {
        let fd = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            OwnedFd::from(fs::File::open("/proc/thread-self/ns/net").unwrap())
        });
        let namespace = Self(fd.join().unwrap());
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `ip ARGS` inside.
    pub(super) fn ip(&self, args: &str) {
        let output = self.run(|| Command::new("ip").args(args.split_whitespace()).output().unwrap());
        assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub(super) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        netns::in_netns(&self.0, f).unwrap()
    }

    /// A namespace that can be named as `ip link ... netns PATH`.
    pub(super) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Two namespaces joined by a cable: 192.0.2.1 and 192.0.2.2, 2001:db8::1 and 2001:db8::2.
pub(super) fn pair() -> (Namespace, Namespace) {
    let (a, b) = (Namespace::new(), Namespace::new());
    a.ip(&format!("link add cable type veth peer name cable netns {}", b.path()));
    for (namespace, last) in [(&a, 1), (&b, 2)] {
        namespace.ip(&format!("addr add 192.0.2.{last}/24 dev cable"));
        namespace.ip(&format!("addr add 2001:db8::{last}/64 dev cable nodad"));
        namespace.ip("link set cable up");
    }
    (a, b)
}

/// A cgroup below the cgroup2 root, removed with what is below it.
pub(super) struct Cgroup(pub(super) PathBuf);

impl Cgroup {
    pub(super) fn new(hierarchy: &Hierarchy) -> Self {
        let path = hierarchy.mount.join(unique("segfw-test"));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        fn remove(path: &Path) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    remove(&entry.path());
                }
            }
            let _ = fs::remove_dir(path);
        }
        remove(&self.0);
    }
}

/// A child that is killed and reaped when dropped.
pub(super) struct Killed(pub(super) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
