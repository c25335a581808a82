//! A world: a cgroup subtree and network namespaces with names of their own, and the promise that nothing of it is
//! left behind, whether the run ends well, panics, or is interrupted.
//!
//! ```text
//!  <cgroup2>/segfw-test-<id>/           network: one bridge in st<id>-br, one veth pair to each namespace
//!    managed/      --cgroup-root          st<id>-a  eth0 10.80.0.11/16  fd00:80::11/64
//!      <workload>/ …                      st<id>-b  eth0 10.80.0.12/16  fd00:80::12/64  …
//!    outside/      peers without an agent
//!    agent/        the agent itself
//! ```

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// How every cgroup, folder and pin folder of ours begins.
const PREFIX: &str = "segfw-test-";
const NETNS: &str = "/run/netns";
const BPFFS: &str = "/sys/fs/bpf";

/// What a world leaves behind if nobody removes it.
#[derive(Clone, Debug)]
struct Traces {
    cgroup: PathBuf,
    netns: Vec<String>,
    folder: PathBuf,
    pins: PathBuf,
}

static LIVE: Mutex<BTreeMap<String, Traces>> = Mutex::new(BTreeMap::new());

/// Held for reading while something is made that [`clean_up_on_signals`] must find: it waits for that to be complete,
/// and lets nothing be made afterwards.
static MAKING: RwLock<()> = RwLock::new(());

/// See [`MAKING`]. Not to be taken twice by one thread.
pub(crate) fn making() -> RwLockReadGuard<'static, ()> {
    MAKING.read().unwrap_or_else(PoisonError::into_inner)
}

fn live() -> MutexGuard<'static, BTreeMap<String, Traces>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One network namespace of a world.
#[derive(Clone, Copy, Debug)]
pub struct Net {
    /// A short name, unique in its world.
    pub name: &'static str,
    /// More IPv4 addresses, with the prefix length 16; each also gets fd00:80::x:y for its last two bytes.
    pub extra: &'static [Ipv4Addr],
}

/// A namespace with its standard addresses only.
pub const fn net(name: &'static str) -> Net {
    Net { name, extra: &[] }
}

/// See the module.
#[derive(Debug)]
pub struct World {
    id: String,
    traces: Traces,
    nets: Vec<Net>,
}

impl World {
    /// Builds a world with these namespaces.
    pub fn new(nets: &[Net]) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "network namespaces and cgroups need root");
        let id = format!("{}r{}", std::process::id(), random()?);
        let traces = Traces {
            cgroup: cgroup2_mount()?.join(format!("{PREFIX}{id}")),
            netns: std::iter::once("br").chain(nets.iter().map(|n| n.name)).map(|n| format!("st{id}-{n}")).collect(),
            folder: std::env::temp_dir().join(format!("{PREFIX}{id}")),
            pins: Path::new(BPFFS).join(format!("{PREFIX}{id}")),
        };
        let _making = making();
        live().insert(id.clone(), traces.clone());
        let world = Self { id, traces, nets: nets.to_vec() };
        world.build().with_context(|| format!("building the world {}", world.id))?;
        Ok(world)
    }

    fn build(&self) -> Result<()> {
        for name in ["managed", "outside", "agent"] {
            fs::create_dir_all(self.traces.cgroup.join(name))?;
        }
        fs::create_dir_all(&self.traces.folder)?;
        for name in &self.traces.netns {
            run(Command::new("ip").args(["netns", "add", name]))?;
            in_netns(name, || {
                fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?;
                fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
                // Rows wait for ICMP errors; the kernel's thrift with them is not under test.
                fs::write("/proc/sys/net/ipv4/icmp_ratelimit", "0")?;
                fs::write("/proc/sys/net/ipv6/icmp/ratelimit", "0")?;
                Ok(())
            })?;
        }
        let bridge = self.netns("br");
        let mut here =
            String::from("link set lo up\nlink add br0 type bridge stp_state 0 mcast_snooping 0\nlink set br0 up\n");
        for (i, net) in self.nets.iter().enumerate() {
            here += &format!("link add p{i} type veth peer name eth0 netns {}\n", self.netns(net.name));
            here += &format!("link set p{i} master br0 up\n");
        }
        batch(&bridge, &here)?;
        for net in &self.nets {
            let mut there = String::from("link set lo up\nlink set eth0 up\n");
            there += &format!("addr add {}/16 brd 10.80.255.255 dev eth0\n", self.v4(net.name));
            there += &format!("addr add {}/64 dev eth0 nodad\n", self.v6(net.name));
            for ip in net.extra {
                there += &format!("addr add {ip}/16 dev eth0\naddr add {}/64 dev eth0 nodad\n", twin(*ip));
            }
            // Multicast and unclaimed addresses need a way out.
            there += "route add default dev eth0\n";
            batch(&self.netns(net.name), &there)?;
        }
        Ok(())
    }

    /// The unique part of all names of this world.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The full name of a namespace.
    pub fn netns(&self, name: &str) -> String {
        format!("st{}-{name}", self.id)
    }

    fn index(&self, name: &str) -> u8 {
        let at = self.nets.iter().position(|n| n.name == name);
        u8::try_from(at.unwrap_or_else(|| panic!("no namespace {name} in this world"))).expect("few namespaces")
    }

    /// The IPv4 address of a namespace.
    pub fn v4(&self, name: &str) -> Ipv4Addr {
        v4_of(self.index(name))
    }

    /// The IPv6 address of a namespace.
    pub fn v6(&self, name: &str) -> Ipv6Addr {
        v6_of(self.index(name))
    }

    /// A cgroup of this world, made if need be: `managed/web`, `outside/peer`.
    pub fn cgroup(&self, path: &str) -> Result<PathBuf> {
        let full = self.traces.cgroup.join(path);
        fs::create_dir_all(&full).with_context(|| format!("making the cgroup {}", full.display()))?;
        Ok(full)
    }

    /// Where the agent attaches its programs.
    pub fn managed(&self) -> PathBuf {
        self.traces.cgroup.join("managed")
    }

    /// The managed root as `/proc/PID/cgroup` writes it.
    pub fn managed_path(&self) -> String {
        format!("/{PREFIX}{}/managed", self.id)
    }

    /// A folder that ends with the world.
    pub fn folder(&self) -> &Path {
        &self.traces.folder
    }

    /// A bpffs folder that ends with the world, and with it what is pinned there. Not made here.
    pub fn pins(&self) -> &Path {
        &self.traces.pins
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let traces = live().remove(&self.id);
        if let Some(traces) = traces {
            traces.remove();
        }
    }
}

impl Traces {
    fn remove(&self) {
        // Each step is tried, whatever became of the one before.
        end_cgroup(&self.cgroup);
        for name in &self.netns {
            end_netns(name);
        }
        end_tree(&self.pins);
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The address of the namespace at `index`.
pub const fn v4_of(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 80, 0, 11 + index)
}

/// The address of the namespace at `index`.
pub const fn v6_of(index: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x80, 0, 0, 0, 0, 0, 0x11 + index as u16)
}

/// The IPv6 address that goes with an extra IPv4 address.
pub const fn twin(ip: Ipv4Addr) -> Ipv6Addr {
    let [_, _, c, d] = ip.octets();
    Ipv6Addr::new(0xfd00, 0x80, 0, 0, 0, 0, 0x100 + c as u16, d as u16)
}

/// Where cgroup v2 is mounted, hybrid hosts included.
pub fn cgroup2_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines() {
        if let Some((left, right)) = line.split_once(" - ")
            && right.starts_with("cgroup2 ")
            && let Some(path) = left.split(' ').nth(4)
        {
            return Ok(PathBuf::from(path));
        }
    }
    anyhow::bail!("no cgroup2 mount in /proc/self/mountinfo")
}

/// Takes the calling thread into a network namespace.
pub fn enter_netns(name: &str) -> std::io::Result<()> {
    let ns = fs::File::open(Path::new(NETNS).join(name))?;
    Ok(nix::sched::setns(&ns, nix::sched::CloneFlags::CLONE_NEWNET)?)
}

/// Runs `work` on a thread of its own inside a network namespace; the caller stays where it is.
pub fn in_netns<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            enter_netns(name).with_context(|| format!("entering netns {name}"))?;
            work()
        });
        inside.join().unwrap_or_else(|_| anyhow::bail!("the work in netns {name} panicked"))
    })
}

/// Removes what runs that are dead have left. A run is dead when no process has the number in its names.
pub fn sweep_stale() -> usize {
    let mut swept = crate::scratch::sweep_stale();
    let mut visit = |folder: &Path, prefix: &str, end: &dyn Fn(&Path)| {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(rest) = name.to_str().and_then(|n| n.strip_prefix(prefix)) else {
                continue;
            };
            let Some((pid, _)) = rest.split_once('r') else {
                continue;
            };
            if pid.parse::<u32>().is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                end(&entry.path());
                swept += 1;
            }
        }
    };
    if let Ok(mount) = cgroup2_mount() {
        visit(&mount, PREFIX, &end_cgroup);
    }
    visit(Path::new(NETNS), "st", &|p| end_netns(&p.file_name().unwrap_or_default().to_string_lossy()));
    visit(Path::new(BPFFS), PREFIX, &end_tree);
    visit(&std::env::temp_dir(), PREFIX, &end_tree);
    swept
}

/// Makes SIGINT, SIGTERM and SIGHUP remove every world of this process before it ends. Call it first in `main`:
/// threads that exist already would not have the signals blocked.
pub fn clean_up_on_signals() -> Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    std::thread::spawn(move || {
        let signal = set.wait();
        // Both are held to the end.
        let _making = MAKING.write().unwrap_or_else(PoisonError::into_inner);
        let worlds = live();
        eprintln!("\ninterrupted: removing {} world(s)", worlds.len());
        for traces in worlds.values() {
            traces.remove();
        }
        std::process::exit(128 + signal.map_or(2, |s| s as i32));
    });
    Ok(())
}

/// Lets a child take the signals that [`clean_up_on_signals`] blocks here: it would inherit that.
pub fn with_signals(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;
    // SAFETY: pthread_sigmask is async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(|| {
            nix::sys::signal::SigSet::empty().thread_set_mask()?;
            Ok(())
        })
    }
}

fn end_cgroup(path: &Path) {
    let end = Instant::now() + Duration::from_secs(3);
    while path.exists() && Instant::now() < end {
        if fs::write(path.join("cgroup.kill"), "1").is_err() {
            kill_all(path);
        }
        remove_folders(path);
        if path.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    if path.exists() {
        eprintln!("left behind: {}", path.display());
    }
}

/// Below Linux 5.14, which brought `cgroup.kill`.
fn kill_all(path: &Path) {
    let procs = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    for pid in procs.lines().filter_map(|l| l.parse().ok()) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            kill_all(&entry.path());
        }
    }
}

/// The files of a cgroup cannot be removed and need not be.
fn remove_folders(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_folders(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

fn end_tree(path: &Path) {
    let _ = fs::remove_dir_all(path);
}

fn end_netns(name: &str) {
    let path = Path::new(NETNS).join(name);
    let _ = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
    let _ = fs::remove_file(&path);
}

fn random() -> Result<String> {
    let mut bytes = [0; 2];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:02x}{:02x}", bytes[0], bytes[1]))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Many `ip` commands in one process.
fn batch(netns: &str, commands: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", netns, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting ip (package iproute2)")?;
    child.stdin.take().context("stdin of ip")?.write_all(commands.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "ip -n {netns}: {}\n{commands}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
