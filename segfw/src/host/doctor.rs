//! What this machine can and cannot do, before anything is enforced. Plain data; whoever prints it is elsewhere.

use super::cgroup::{self, Hierarchy};
use super::netns;
use super::proc::{self, Capabilities, Capability};
use super::sockdiag::{DestroyError, Diag, Sock};
use crate::config::RuntimeConfig;
use crate::datapath::load::Features;
use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::{fmt, fs};

/// The oldest kernel this program is made for; `docs/kernels.md` is what was tested.
pub const OLDEST_KERNEL: (u32, u32) = (5, 10);

/// Watches one user may have before the cgroup watcher can be expected to run out: one per cgroup.
pub const FEW_WATCHES: u64 = 8_192;

/// How serious it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing to do.
    Ok,
    /// Works, with a gap that `consequence` names.
    Warn,
    /// Cannot enforce.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Short and stable, for scripts: `kernel`, `cgroup2`, `sock-destroy`.
    pub name: &'static str,
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What it means for the policy; empty if ok.
    pub consequence: String,
    /// What to do about it; empty if there is nothing to do.
    pub remedy: String,
}

impl Check {
    fn ok(name: &'static str, what: impl fmt::Display) -> Self {
        Self { name, level: Level::Ok, what: what.to_string(), consequence: String::new(), remedy: String::new() }
    }

    fn bad(name: &'static str, level: Level, what: impl fmt::Display, consequence: &str, remedy: &str) -> Self {
        Self { name, level, what: what.to_string(), consequence: consequence.into(), remedy: remedy.into() }
    }
}

/// Every check, in the order of a sensible reading. Changes nothing but one listener of its own on loopback.
pub fn checks() -> Vec<Check> {
    let mut checks = vec![kernel(), btf(), cgroup2(), cgroup_root(), bpffs()];
    checks.extend(capabilities());
    checks.extend([
        jit(),
        helpers(),
        netns_cookie(),
        sock_destroy(),
        sock_inventory(),
        families(),
        watches(),
        tracefs(),
        runtimes(),
    ]);
    checks
}

/// What an agent cannot do without; empty = it can start. One call, no probe with side effects.
pub fn required() -> Vec<Check> {
    let mut checks = vec![kernel(), cgroup2()];
    checks.extend(capabilities());
    checks.retain(|check| check.level == Level::Fail);
    checks
}

/// The worst level; [`Level::Ok`] if there is none.
pub fn worst(checks: &[Check]) -> Level {
    checks.iter().map(|c| c.level).max().unwrap_or(Level::Ok)
}

fn kernel() -> Check {
    kernel_is(proc::release())
}

fn kernel_is(release: io::Result<proc::Release>) -> Check {
    const NAME: &str = "kernel";
    match release {
        Ok(release) if release.version >= OLDEST_KERNEL => Check::ok(NAME, release.text),
        Ok(release) => Check::bad(
            NAME,
            Level::Fail,
            format!("{} is older than {}.{}", release.text, OLDEST_KERNEL.0, OLDEST_KERNEL.1),
            "programs will not load",
            "install a newer kernel",
        ),
        Err(error) => Check::bad(NAME, Level::Fail, error, "not known whether programs will load", "mount /proc"),
    }
}

fn btf() -> Check {
    const NAME: &str = "btf";
    let path = Path::new("/sys/kernel/btf/vmlinux");
    match fs::metadata(path) {
        Ok(_) => Check::ok(NAME, path.display()),
        Err(error) => Check::bad(
            NAME,
            Level::Warn,
            format!("{}: {error}", path.display()),
            "no BPF LSM and no fmod_ret gates: ingress is judged per packet, and the family allowlist is missing",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF",
        ),
    }
}

fn cgroup2() -> Check {
    const NAME: &str = "cgroup2";
    match Hierarchy::find() {
        Ok(hierarchy) if hierarchy.hybrid => Check::bad(
            NAME,
            Level::Warn,
            format!("hybrid: cgroup2 at {}, beside v1 controllers", hierarchy.mount.display()),
            "containers in cgroup v1 mode share one v2 cgroup and cannot be told apart; systemd units can",
            "boot with systemd.unified_cgroup_hierarchy=1, and use a runtime that supports cgroup v2",
        ),
        Ok(hierarchy) => Check::ok(NAME, format!("unified, at {}", hierarchy.mount.display())),
        Err(error @ cgroup::Error::V1Only) => Check::bad(
            NAME,
            Level::Fail,
            error,
            "nothing to attach to: no workload can be told from another",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
        Err(error @ (cgroup::Error::NotMounted | cgroup::Error::Io(..))) => Check::bad(
            NAME,
            Level::Fail,
            error,
            "nothing to attach to",
            "run in the host's mount namespace, or give the container the host's /sys/fs/cgroup",
        ),
        Err(error @ cgroup::Error::Ids { .. }) => Check::bad(
            NAME,
            Level::Fail,
            error,
            "workloads would get the identity of others",
            "use a 64-bit kernel from 5.10 on",
        ),
    }
}

/// In a container, with a private cgroup namespace, the visible root is not the machine's: its id is 1 only there
/// (kernfs numbers from 1).
fn cgroup_root() -> Check {
    const NAME: &str = "cgroup-root";
    const CONSEQUENCE: &str = "workloads outside this part of the tree are neither seen nor policed";
    const REMEDY: &str = "run in the host's cgroup namespace, with the host's /sys/fs/cgroup";
    let Ok(hierarchy) = Hierarchy::find() else {
        return Check::bad(NAME, Level::Fail, "no cgroup2", "nothing to attach to", "see cgroup2");
    };
    match cgroup::id_of(&hierarchy.mount) {
        Ok(1) => Check::ok(NAME, "the whole tree"),
        Ok(id) => Check::bad(
            NAME,
            Level::Fail,
            format!("{} shows cgroup {id} ({}), not the root", hierarchy.mount.display(), hierarchy.root.display()),
            CONSEQUENCE,
            REMEDY,
        ),
        Err(error) => Check::bad(NAME, Level::Fail, error, CONSEQUENCE, REMEDY),
    }
}

fn bpffs() -> Check {
    const NAME: &str = "bpffs";
    let (what, remedy) = match proc::is_bpffs(Path::new(proc::BPFFS)) {
        Ok(true) => return Check::ok(NAME, format!("mounted at {}", proc::BPFFS)),
        Ok(false) => (format!("nothing is mounted at {}", proc::BPFFS), "none needed: the agent mounts it when it may"),
        Err(error) => (format!("{}: {error}", proc::BPFFS), "use a kernel with CONFIG_BPF_SYSCALL and mount /sys"),
    };
    Check::bad(NAME, Level::Warn, what, "enforcement could not outlive the agent: nothing can be pinned", remedy)
}

fn capabilities() -> Vec<Check> {
    let held = match Capabilities::held() {
        Ok(held) => held,
        Err(error) => {
            let consequence = "not known whether anything can be enforced";
            return vec![Check::bad("capabilities", Level::Fail, error, consequence, "mount /proc")];
        }
    };
    [
        (Capability::Bpf, Level::Fail, "no program or map can be loaded"),
        (Capability::Perfmon, Level::Fail, "programs that read kernel memory or trace will not load"),
        (Capability::NetAdmin, Level::Fail, "no hook can be attached, no connection cut"),
        (
            Capability::SysAdmin,
            Level::Fail,
            "no revision can be loaded (its tables are opened by id), other network namespaces cannot be entered",
        ),
        (Capability::SysPtrace, Level::Warn, "namespaces of processes of other users cannot be opened"),
        (Capability::NetRaw, Level::Warn, "rules with action reject drop silently"),
    ]
    .into_iter()
    .map(|(capability, level, consequence)| {
        let name = capability.name();
        // The older, wider one includes what was split off from it in 5.8.
        let wider = matches!(capability, Capability::Bpf | Capability::Perfmon) && held.has(Capability::SysAdmin);
        if held.has(capability) {
            Check::ok(name, "held")
        } else if wider {
            Check::ok(name, "included in CAP_SYS_ADMIN")
        } else {
            Check::bad(name, level, "not held", consequence, "run as root, or with AmbientCapabilities=")
        }
    })
    .collect()
}

fn jit() -> Check {
    const NAME: &str = "jit";
    let path = "/proc/sys/net/core/bpf_jit_enable";
    match fs::read_to_string(path) {
        Ok(text) if text.trim() == "0" => Check::bad(
            NAME,
            Level::Warn,
            "net.core.bpf_jit_enable = 0",
            "programs are interpreted: every packet and connection costs several times as much",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Ok(text) => Check::ok(NAME, format!("net.core.bpf_jit_enable = {}", text.trim())),
        // Not there in other namespaces than the first, nor with CONFIG_BPF_JIT_ALWAYS_ON on some kernels.
        Err(error) => Check::ok(NAME, format!("not known ({path}: {error})")),
    }
}

/// What programs may call here: asked of the verifier, which needs the right to load some.
fn helpers() -> Check {
    const NAME: &str = "helpers";
    let may = Capabilities::held().is_ok_and(|held| held.has(Capability::SysAdmin) || held.has(Capability::Bpf));
    if !may {
        return Check::ok(NAME, "not asked: that needs CAP_BPF");
    }
    let less = Features::probe().less();
    if less.is_empty() {
        return Check::ok(NAME, "programs may call all they can use");
    }
    let (what, consequence): (Vec<_>, Vec<_>) = less.into_iter().unzip();
    let remedy = "none needed: this is a matter of the kernel's version; docs/kernels.md says what each has";
    Check::bad(NAME, Level::Warn, format!("less of: {}", what.join("; ")), &consequence.join("; "), remedy)
}

fn netns_cookie() -> Check {
    const NAME: &str = "netns-cookie";
    match netns::current_cookie() {
        Ok(cookie) => Check::ok(NAME, format!("namespaces can be told apart (this one is {cookie})")),
        Err(error) => Check::bad(
            NAME,
            Level::Warn,
            error,
            "which address and listener is in which namespace is not known: peers on this host count as unresolved",
            "use a kernel from 5.14 on, or let nothing at the agent's cgroup refuse further programs",
        ),
    }
}

fn sock_destroy() -> Check {
    const NAME: &str = "sock-destroy";
    let consequence = "connections that a new revision forbids are not cut: they stall at their next packet";
    match probe_destroy() {
        Ok(()) => Check::ok(NAME, "a listener of our own was destroyed"),
        Err(Probe::Destroy(error @ DestroyError::NotPermitted)) => {
            Check::bad(NAME, Level::Warn, error, consequence, "run with CAP_NET_ADMIN")
        }
        Err(Probe::Destroy(error)) => {
            Check::bad(NAME, Level::Warn, error, consequence, "use a kernel with CONFIG_INET_DIAG_DESTROY")
        }
        Err(Probe::Other(error)) => {
            Check::bad(NAME, Level::Warn, error, consequence, "use a kernel with CONFIG_INET_DIAG and loopback")
        }
    }
}

enum Probe {
    Destroy(DestroyError),
    Other(String),
}

fn probe_destroy() -> Result<(), Probe> {
    let other = |error: &dyn fmt::Display| Probe::Other(error.to_string());
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| other(&e))?;
    let address = listener.local_addr().map_err(|e| other(&e))?;
    let mut diag = Diag::open_here().map_err(|e| other(&e))?;
    let socks = diag.inet(false, Sock::TCP).map_err(|e| other(&e))?;
    let is_ours = |s: &&Sock| s.local == address && s.remote.port() == 0;
    let ours = socks.iter().find(is_ours).ok_or_else(|| other(&"our own listener is not listed"))?;
    diag.destroy(ours).map_err(Probe::Destroy)?;
    // Believe the effect, not the answer.
    listener.set_nonblocking(true).map_err(|e| other(&e))?;
    match listener.accept() {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Ok(()),
        _ => Err(other(&"the kernel says destroyed, but the listener lives")),
    }
}

fn sock_inventory() -> Check {
    const NAME: &str = "sock-inventory";
    let consequence = "sockets of these kinds that are older than the agent are neither seen nor judged";
    let inventory = Diag::open_here().and_then(|mut diag| diag.inventory());
    match inventory {
        Ok(inventory) if inventory.missing.is_empty() => Check::ok(NAME, "every kind of socket can be listed"),
        Ok(inventory) => {
            let missing: Vec<String> = inventory.missing.iter().map(ToString::to_string).collect();
            let what = format!("cannot be listed: {}", missing.join(", "));
            let remedy =
                "none needed where the kernel has no such sockets; else load its diag modules (sctp_diag, vsock_diag)";
            Check::bad(NAME, Level::Warn, what, consequence, remedy)
        }
        Err(error) => Check::bad(NAME, Level::Warn, error, consequence, "use a kernel with CONFIG_INET_DIAG"),
    }
}

/// A constant, until there is a hook for it.
fn families() -> Check {
    Check::bad(
        "families",
        Level::Warn,
        "packet (AF_PACKET) and vsock sockets are uncovered: needs BPF LSM or fmod_ret allowlist, not in this version",
        "a process with CAP_NET_RAW can send frames past every rule, and any process can reach the hypervisor by vsock",
        "take CAP_NET_RAW from workloads; set RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK in units",
    )
}

fn watches() -> Check {
    const NAME: &str = "inotify";
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/fs/inotify/{name}")).ok()?.trim().parse::<u64>().ok();
    let (Some(watches), Some(instances)) = (read("max_user_watches"), read("max_user_instances")) else {
        let what = "/proc/sys/fs/inotify cannot be read";
        return Check::bad(
            NAME,
            Level::Warn,
            what,
            "new cgroups may be found late",
            "use a kernel with CONFIG_INOTIFY_USER",
        );
    };
    let what = format!("max_user_watches = {watches}, max_user_instances = {instances}");
    if watches < FEW_WATCHES || instances == 0 {
        let consequence =
            "once they are used up, new cgroups are found by reading the tree every second instead of at once";
        return Check::bad(NAME, Level::Warn, what, consequence, "sysctl -w fs.inotify.max_user_watches=65536");
    }
    Check::ok(NAME, what)
}

/// Where the kernel describes the event of a new cgroup.
fn tracefs() -> Check {
    const NAME: &str = "tracefs";
    let event = "/sys/kernel/tracing/events/cgroup/cgroup_mkdir/id";
    match fs::metadata(event) {
        Ok(_) => Check::ok(NAME, "new cgroups can be seen by the kernel side"),
        Err(error) => Check::bad(
            NAME,
            Level::Warn,
            format!("{event}: {error}"),
            "a workload that starts counts as host until the agent has seen it, and for good while no agent runs",
            "mount -t tracefs tracefs /sys/kernel/tracing (the agent does it when it may)",
        ),
    }
}

/// Container runtimes at their usual places. What the settings name elsewhere is the agent's to say.
fn runtimes() -> Check {
    const NAME: &str = "runtimes";
    let RuntimeConfig { cri, docker, storage } = RuntimeConfig::default();
    let there: Vec<String> = cri
        .iter()
        .chain(&docker)
        .chain(&storage)
        .filter(|path| path.exists())
        .map(|path| path.display().to_string())
        .collect();
    match there.is_empty() {
        true => Check::ok(NAME, "no container runtime at the usual places"),
        false => Check::ok(NAME, there.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    #[test]
    fn every_check_is_complete() {
        let checks = checks();
        for check in &checks {
            println!("{:?} {}: {} | {} | {}", check.level, check.name, check.what, check.consequence, check.remedy);
            assert!(!check.what.is_empty());
            assert_eq!(check.level == Level::Ok, check.consequence.is_empty(), "{}", check.name);
            assert_eq!(check.level == Level::Ok, check.remedy.is_empty(), "{}", check.name);
        }
        let mut names: Vec<_> = checks.iter().map(|c| c.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), checks.len(), "names are for scripts");
        assert_eq!(worst(&[]), Level::Ok);
        assert!(worst(&checks) >= Level::Warn, "families are always a warning");
    }

    #[test]
    fn a_kernel_that_is_too_old_is_said() {
        let release = |text: &str, version| Ok(proc::Release { text: text.to_owned(), version });
        let old = kernel_is(release("4.19.0-27-amd64", (4, 19)));
        assert_eq!((old.level, old.what.as_str()), (Level::Fail, "4.19.0-27-amd64 is older than 5.10"));
        assert_eq!(kernel_is(release("5.10.0", (5, 10))).level, Level::Ok);
    }

    #[test]
    fn this_machine_can_destroy() {
        if testing::root("this_machine_can_destroy") {
            assert_eq!(sock_destroy().level, Level::Ok, "{:?}", sock_destroy());
        }
    }
}
