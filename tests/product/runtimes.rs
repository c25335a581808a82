//! Real container runtimes: what they say, and which cgroups they really use.

use anyhow::{Context, Result, bail, ensure};
use hyper::http::uri::PathAndQuery;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use segfw::config::RuntimeConfig;
use segfw::host::cgroup::Hierarchy;
use segfw::host::runtime::{Listing, Runtimes, path};
use segfw::policy::container::Kind;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};

pub(crate) fn tests() -> Vec<crate::Test> {
    vec![
        ("runtimes: podman without a service, and with one", podman),
        ("runtimes: containers of ctr, where CRI is off; containerd hangs, dies, comes back", ctr),
        ("runtimes: pods by CRI", cri),
    ]
}

/// Starting a daemon on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// The image of all containers, also of pause: `sleep` until it is killed.
const IMAGE: &str = "localhost/segfw-test/sleeper:1.0";
const PAUSE: &str = "segfw.test/pause:1";

/// A folder with a small root file system. What was started with it must be gone before it is dropped; mounts that are
/// left in it are detached.
struct Scratch {
    dir: PathBuf,
    name: String,
}

impl Scratch {
    fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("segfw-rt-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // A socket's path has at most 107 bytes, so not below the target folder.
        let dir = std::env::temp_dir().join(&name);
        let scratch = Self { dir, name };
        let bin = scratch.dir.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        for dir in ["proc", "sys", "dev", "etc", "tmp"] {
            fs::create_dir(scratch.dir.join("rootfs").join(dir))?;
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).exists());
        let Some(busybox) = busybox else { bail!("skipped: no busybox (Debian: busybox-static)") };
        fs::copy(busybox, bin.join("sleep"))?;
        Ok(scratch)
    }
    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for mount in mounts.lines().filter_map(|l| l.split(' ').nth(1)) {
            if Path::new(mount).starts_with(&self.dir) {
                let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A daemon, killed and reaped when dropped.
struct Daemon(Child);
impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn need(programs: &[&str]) -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default();
    for program in programs {
        let there = path.split(':').any(|dir| Path::new(dir).join(program).is_file());
        ensure!(there, "skipped: no {program} on this machine");
    }
    Ok(())
}

fn wait_for(what: &str, mut ready: impl FnMut() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !ready() {
        ensure!(begin.elapsed() < PATIENCE, "{what} does not come");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The cgroup2 path of a process, as the kernel says it.
fn cgroup_of(pid: &str) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).with_context(|| format!("process {pid}"))?;
    text.lines().find_map(|l| l.strip_prefix("0::")).map(PathBuf::from).context("no cgroup2 path")
}

/// Removes empty cgroups, in every hierarchy: runtimes leave the parents of their containers. Own ones are waited for,
/// since helpers (conmon) end a little after their containers.
fn remove_cgroups(own: &[String], shared: &[&str]) {
    let begin = Instant::now();
    let hierarchies = || {
        let v1 = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path());
        v1.chain(Hierarchy::find().ok().map(|h| h.mount))
    };
    loop {
        // The kernel removes them only if they are empty.
        let stay = |path: &str| {
            let full: Vec<_> = hierarchies().map(|h| h.join(path)).filter(|p| p.is_dir()).collect();
            full.iter().filter(|p| fs::remove_dir(p).is_err()).count()
        };
        let left: usize = own.iter().map(|path| stay(path)).sum();
        if left == 0 || begin.elapsed() > Duration::from_secs(5) {
            for path in shared {
                stay(path);
            }
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn listed(runtime: &tokio::runtime::Runtime, runtimes: &mut Runtimes) -> Result<Listing> {
    let begin = Instant::now();
    let listing = runtime.block_on(runtimes.list());
    ensure!(listing.failed.is_empty() && listing.left_out == 0, "{listing:?}");
    println!("  listed {} containers in {:.1} ms", listing.containers.len(), begin.elapsed().as_secs_f64() * 1e3);
    Ok(listing)
}

struct Podman<'a>(&'a Scratch);

impl Podman<'_> {
    fn command(&self) -> Command {
        let scratch = self.0;
        let mut command = Command::new("podman");
        command.args(["--root", &scratch.path("root"), "--runroot", &scratch.path("run"), "--tmpdir"]);
        command.args([&scratch.path("tmp"), "--runtime", "runc", "--cgroup-manager", "cgroupfs"]);
        command.args(["--storage-driver", "vfs", "--events-backend", "none"]);
        command
    }
    fn run(&self, args: &[&str]) -> Result<String> {
        run(self.command().args(args))
    }
    /// The image that everything is run from.
    fn import(&self) -> Result<()> {
        run(Command::new("tar").args(["-C", &self.0.path("rootfs"), "-cf", &self.0.path("rootfs.tar"), "."]))?;
        let change = "CMD [\"/bin/sleep\", \"10000\"]";
        self.run(&["import", "--change", change, &self.0.path("rootfs.tar"), IMAGE]).map(drop)
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all", "--force", "--time", "0"]);
        // `/libpod_parent` stays: it is Podman's own, and other containers' too.
        remove_cgroups(&[format!("{}/conmon", self.0.name), self.0.name.clone()], &[]);
    }
}

fn podman() -> Result<()> {
    need(&["podman", "runc", "conmon", "tar"])?;
    let scratch = Scratch::new()?;
    let podman = Podman(&scratch);
    podman.import()?;
    let name = format!("{}-web", scratch.name);
    let limits = ["--network", "none", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000"];
    let start = |name: &str, more: &[&str]| {
        let args = [&["run", "--detach", "--name", name], &limits[..], more].concat();
        let id = podman.run(&args)?;
        let pid = podman.run(&["inspect", "--format", "{{.State.Pid}}", name])?;
        anyhow::Ok((id, cgroup_of(&pid)?))
    };
    let (id, cgroup) = start(&name, &["--label", "app=shop", "--label", "tier=web", IMAGE])?;
    // Without an image, in a cgroup of its own choice, and gone after it ends: another list in the storage.
    let other = format!("{}-other", scratch.name);
    let parent = format!("/{}", scratch.name);
    let rootfs = scratch.path("rootfs");
    let (_, odd) = start(&other, &["--rm", "--cgroup-parent", &parent, "--rootfs", &rootfs, "/bin/sleep", "10000"])?;
    println!("  podman, cgroupfs: {}", cgroup.display());
    println!("  podman --cgroup-parent: {}", odd.display());

    let found = path::container(&cgroup).with_context(|| format!("{} is not recognised", cgroup.display()))?;
    ensure!((found.runtime, &found.id, found.delegated) == (Some(Kind::Podman), &id, false), "{found:?}");
    let known = path::prefixes().iter().any(|p| cgroup.to_string_lossy().starts_with(p));
    ensure!(known, "{} is under no known prefix", cgroup.display());

    // By the files alone.
    let socket = scratch.dir.join("podman.sock");
    let config = RuntimeConfig {
        cri: vec![scratch.dir.join("absent.sock")],
        docker: vec![socket.clone()],
        storage: vec![scratch.dir.join("root")],
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let mut runtimes = Runtimes::new(&config);
    let listing = listed(&runtime, &mut runtimes)?;
    ensure!(listing.reachable == [scratch.dir.join("root")], "{listing:?}");
    let web = listing.find(&cgroup).context("not found by its cgroup")?;
    ensure!((web.runtime, web.name.as_str(), web.image.as_str()) == (Kind::Podman, &*name, IMAGE), "{web:?}");
    ensure!(web.cgroup.as_deref() == cgroup.to_str() && web.labels.is_empty(), "{web:?}");
    ensure!(listing.find(&odd).is_some_and(|c| c.name == other && c.image.is_empty()), "{listing:?}");

    // With the service, which knows labels; the same channel-less client again and again.
    let uri = format!("unix://{}", socket.display());
    let mut service = podman.command();
    service.args(["system", "service", "--time", "0", &uri]).stdin(Stdio::null()).stderr(Stdio::null());
    let daemon = Daemon(service.spawn()?);
    wait_for("podman's service", || std::os::unix::net::UnixStream::connect(&socket).is_ok())?;
    for _ in 0..3 {
        let listing = listed(&runtime, &mut runtimes)?;
        ensure!(listing.reachable.len() == 2 && listing.containers.len() == 2, "{listing:?}");
        let web = listing.find(&cgroup).context("not found by its cgroup")?;
        ensure!((web.runtime, web.name.as_str(), web.image.as_str()) == (Kind::Podman, &*name, IMAGE), "{web:?}");
        ensure!(web.labels == labels(&[("app", "shop"), ("tier", "web")]), "{web:?}");
        ensure!(web.cgroup.as_deref() == cgroup.to_str(), "{web:?}");
    }
    drop(daemon);
    // A socket that nobody serves is said, and the files go on.
    let listing = runtime.block_on(runtimes.list());
    ensure!(listing.failed.len() == 1 && listing.containers.len() == 2, "{listing:?}");
    podman.run(&["rm", "--all", "--force", "--time", "0"])?;
    let listing = runtime.block_on(runtimes.list());
    ensure!(listing.containers.is_empty(), "{listing:?}");
    Ok(())
}

/// Of the only pod of this process; unique, since it is in the path of cgroups.
fn pod_uid() -> String {
    format!("5e9f0000-0000-4000-8000-{:012x}", std::process::id())
}

/// containerd with its own folders and socket, and the test image in it.
struct Containerd<'a> {
    scratch: &'a Scratch,
    socket: PathBuf,
    daemon: Daemon,
}

impl<'a> Containerd<'a> {
    /// `cri`: with the plugin that Docker's package of containerd turns off.
    fn start(scratch: &'a Scratch, cri: bool) -> Result<Self> {
        let config = scratch.dir.join("containerd.toml");
        let socket = scratch.dir.join("c.sock");
        let at = |name: &str| scratch.path(name);
        let (root, state, cni) = (at("c-root"), at("c-state"), at("cni"));
        fs::create_dir(&cni)?;
        let disabled = if cri { "" } else { "\"io.containerd.grpc.v1.cri\"" };
        fs::write(
            &config,
            format!(
                r#"version = 2
root = "{root}"
state = "{state}"
imports = []
disabled_plugins = [{disabled}]
[grpc]
address = "{socket}"
[ttrpc]
address = "{socket}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
disable_tcp_service = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{cni}"
conf_dir = "{cni}"
"#,
                socket = socket.display(),
            ),
        )?;
        let daemon = Self::daemon(scratch)?;
        let containerd = Self { scratch, socket, daemon };
        containerd.wait()?;
        Ok(containerd)
    }

    fn daemon(scratch: &Scratch) -> Result<Daemon> {
        let log = fs::File::create(scratch.path("containerd.log"))?;
        let mut command = Command::new("containerd");
        command.args(["-c", &scratch.path("containerd.toml")]);
        Ok(Daemon(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?))
    }

    /// Until it answers.
    fn wait(&self) -> Result<()> {
        wait_for("containerd", || self.ctr("default", &["namespaces", "ls"]).is_ok())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.daemon.0.id())?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    fn ctr(&self, namespace: &str, args: &[&str]) -> Result<String> {
        run(Command::new("ctr").arg("-a").arg(&self.socket).args(["-n", namespace]).args(args))
    }

    /// As `image`, made with Podman's help.
    fn import(&self, namespace: &str) -> Result<()> {
        let archive = self.scratch.path("image.tar");
        if !Path::new(&archive).exists() {
            let podman = Podman(self.scratch);
            podman.import()?;
            podman.run(&["save", "--format", "oci-archive", "--output", &archive, IMAGE])?;
        }
        let args = ["images", "import", "--snapshotter", "native", "--index-name", PAUSE, &archive];
        self.ctr(namespace, &args).map(drop)
    }

    fn pid(&self, namespace: &str, container: &str) -> Result<String> {
        let tasks = self.ctr(namespace, &["tasks", "ls"])?;
        let line = tasks.lines().find(|l| l.split_whitespace().next() == Some(container));
        line.and_then(|l| l.split_whitespace().nth(1)).map(str::to_owned).with_context(|| tasks.clone())
    }

    /// Whatever still runs, by containerd first, so that the shims end by themselves.
    fn clean(&self) {
        for namespace in self.ctr("default", &["namespaces", "ls", "-q"]).unwrap_or_default().lines() {
            for task in self.ctr(namespace, &["tasks", "ls", "-q"]).unwrap_or_default().lines() {
                let _ = self.ctr(namespace, &["tasks", "rm", "--force", task]);
            }
            for container in self.ctr(namespace, &["containers", "ls", "-q"]).unwrap_or_default().lines() {
                let _ = self.ctr(namespace, &["containers", "rm", container]);
            }
        }
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        self.clean();
        // A shim that containerd has lost sight of; ours alone name this socket.
        let socket = self.socket.display().to_string();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let args: Vec<&[u8]> = line.split(|b| *b == 0).collect();
            let shim = args.first().is_some_and(|a| a.ends_with(b"containerd-shim-runc-v2"));
            if shim && args.contains(&socket.as_bytes()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        // Of containers, of the pod, and what is above them if nobody else is in it.
        let pod = format!("kubepods/burstable/pod{}", pod_uid());
        remove_cgroups(&[self.scratch.name.clone(), pod], &["kubepods/burstable", "kubepods", "k8s.io"]);
    }
}

fn ctr() -> Result<()> {
    need(&["containerd", "ctr", "runc", "podman", "tar"])?;
    let scratch = Scratch::new()?;
    let mut containerd = Containerd::start(&scratch, false)?;
    let namespace = scratch.name.as_str();
    containerd.import(namespace)?;
    let more = ["run", "--detach", "--snapshotter", "native", "--label", "app=shop", IMAGE, "web"];
    containerd.ctr(namespace, &more)?;
    let rootfs = scratch.path("rootfs");
    containerd.ctr(namespace, &["run", "--detach", "--rootfs", &rootfs, "plain", "/bin/sleep", "10000"])?;
    let cgroup = cgroup_of(&containerd.pid(namespace, "web")?)?;
    let plain = cgroup_of(&containerd.pid(namespace, "plain")?)?;
    println!("  ctr: {} (namespace {namespace})", cgroup.display());
    ensure!(path::container(&cgroup).is_none(), "two names are no proof of a container");

    let config = RuntimeConfig { cri: vec![containerd.socket.clone()], docker: vec![], storage: vec![] };
    let runtime = tokio::runtime::Runtime::new()?;
    let mut runtimes = Runtimes::new(&config);
    for _ in 0..3 {
        let listing = listed(&runtime, &mut runtimes)?;
        let web = listing.find(&cgroup).context("not found by its cgroup")?;
        ensure!((web.runtime, web.name.as_str(), web.image.as_str()) == (Kind::Containerd, "web", IMAGE), "{web:?}");
        ensure!(web.labels.get("app").is_some_and(|v| v == "shop") && web.pod.is_none(), "{web:?}");
        ensure!(listing.find(&plain).is_some_and(|c| c.name == "plain" && c.image.is_empty()), "{listing:?}");
        ensure!(listing.containers.len() == 2, "{listing:?}");
    }
    // One that hangs costs its deadline and no more, and works again when it goes on.
    containerd.signal(Signal::SIGSTOP)?;
    let begin = Instant::now();
    let listing = runtime.block_on(runtimes.list());
    containerd.signal(Signal::SIGCONT)?;
    println!("  hung: {:?} after {:.1} s", listing.failed, begin.elapsed().as_secs_f32());
    ensure!(listing.failed.len() == 1 && begin.elapsed() < Duration::from_secs(4), "{listing:?}");
    ensure!(listed(&runtime, &mut runtimes)?.containers.len() == 2, "after it hung");
    // So does one that was killed and started again; its containers live on.
    containerd.signal(Signal::SIGKILL)?;
    containerd.daemon.0.wait()?;
    let listing = runtime.block_on(runtimes.list());
    println!("  killed: {:?}", listing.failed);
    ensure!(listing.failed.len() == 1, "{listing:?}");
    containerd.daemon = Containerd::daemon(&scratch)?;
    containerd.wait()?;
    ensure!(listed(&runtime, &mut runtimes)?.find(&cgroup).is_some(), "after its restart");
    Ok(())
}

/// The parts of k8s.io/cri-api `runtime/v1/api.proto` that start a pod.
mod api {
    use prost::Message;
    use std::collections::HashMap;

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct RunPodSandboxRequest {
        #[prost(message, optional, tag = "1")]
        pub(super) config: Option<PodSandboxConfig>,
    }
    /// `RunPodSandboxResponse`, `CreateContainerResponse`, and requests that have an id only.
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Id {
        #[prost(string, tag = "1")]
        pub(super) id: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Empty {}
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct PodSandboxConfig {
        #[prost(message, optional, tag = "1")]
        pub(super) metadata: Option<PodSandboxMetadata>,
        #[prost(string, tag = "3")]
        pub(super) log_directory: String,
        #[prost(map = "string, string", tag = "6")]
        pub(super) labels: HashMap<String, String>,
        #[prost(message, optional, tag = "8")]
        pub(super) linux: Option<LinuxPodSandboxConfig>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct PodSandboxMetadata {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(string, tag = "2")]
        pub(super) uid: String,
        #[prost(string, tag = "3")]
        pub(super) namespace: String,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct LinuxPodSandboxConfig {
        #[prost(string, tag = "1")]
        pub(super) cgroup_parent: String,
        #[prost(message, optional, tag = "2")]
        pub(super) security_context: Option<LinuxSandboxSecurityContext>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct LinuxSandboxSecurityContext {
        #[prost(message, optional, tag = "1")]
        pub(super) namespace_options: Option<NamespaceOption>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct NamespaceOption {
        /// 2 = the node's.
        #[prost(int32, tag = "1")]
        pub(super) network: i32,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct CreateContainerRequest {
        #[prost(string, tag = "1")]
        pub(super) pod_sandbox_id: String,
        #[prost(message, optional, tag = "2")]
        pub(super) config: Option<ContainerConfig>,
        #[prost(message, optional, tag = "3")]
        pub(super) sandbox_config: Option<PodSandboxConfig>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ContainerConfig {
        #[prost(message, optional, tag = "1")]
        pub(super) metadata: Option<Id>,
        #[prost(message, optional, tag = "2")]
        pub(super) image: Option<Id>,
        #[prost(map = "string, string", tag = "9")]
        pub(super) labels: HashMap<String, String>,
        #[prost(message, optional, tag = "15")]
        pub(super) linux: Option<LinuxContainerConfig>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct LinuxContainerConfig {
        #[prost(message, optional, tag = "2")]
        pub(super) security_context: Option<LinuxContainerSecurityContext>,
    }
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct LinuxContainerSecurityContext {
        #[prost(message, optional, tag = "3")]
        pub(super) namespace_options: Option<NamespaceOption>,
    }
}

async fn call<Q, A>(channel: &Channel, method: &str, ask: Q) -> Result<A>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let path = PathAndQuery::try_from(format!("/runtime.v1.RuntimeService/{method}"))?;
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await?;
    let codec: tonic_prost::ProstCodec<Q, A> = tonic_prost::ProstCodec::default();
    let answer = grpc.unary(tonic::Request::new(ask), path, codec).await;
    Ok(answer.map_err(|s| anyhow::anyhow!("{method}: {}", s.message()))?.into_inner())
}

fn cri() -> Result<()> {
    need(&["containerd", "ctr", "runc", "podman", "tar"])?;
    let scratch = Scratch::new()?;
    let containerd = Containerd::start(&scratch, true)?;
    let uid = pod_uid();
    let parent = format!("/kubepods/burstable/pod{uid}");
    let runtime = tokio::runtime::Runtime::new()?;
    let channel = {
        let _inside = runtime.enter();
        Endpoint::from_shared(format!("unix:{}", containerd.socket.display()))?.connect_lazy()
    };
    let mut sandbox = None;
    let end = (|| {
        containerd.import("k8s.io")?;
        let strings = |pairs: &[(&str, &str)]| -> HashMap<String, String> { labels(pairs).into_iter().collect() };
        let node = Some(api::NamespaceOption { network: 2 });
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: "db-0".into(),
                uid: uid.clone(),
                namespace: "payments".into(),
            }),
            log_directory: scratch.path("logs"),
            labels: strings(&[("app", "payments-db")]),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: parent.clone(),
                security_context: Some(api::LinuxSandboxSecurityContext { namespace_options: node.clone() }),
            }),
        };
        let ask = api::RunPodSandboxRequest { config: Some(config.clone()) };
        let api::Id { id: pod } = runtime.block_on(call(&channel, "RunPodSandbox", ask))?;
        sandbox = Some(pod.clone());
        // Kubelet gives the id of the image, so the name has to be looked up.
        let images = containerd.ctr("k8s.io", &["images", "ls", "-q"])?;
        let image = images.lines().find(|n| n.starts_with("sha256:")).context("no image id")?;
        let ask = api::CreateContainerRequest {
            pod_sandbox_id: pod.clone(),
            config: Some(api::ContainerConfig {
                metadata: Some(api::Id { id: "postgres".into() }),
                image: Some(api::Id { id: image.to_owned() }),
                labels: strings(&[("io.kubernetes.container.name", "postgres")]),
                linux: Some(api::LinuxContainerConfig {
                    security_context: Some(api::LinuxContainerSecurityContext { namespace_options: node.clone() }),
                }),
            }),
            sandbox_config: Some(config),
        };
        let api::Id { id } = runtime.block_on(call(&channel, "CreateContainer", ask))?;
        let _: api::Empty = runtime.block_on(call(&channel, "StartContainer", api::Id { id: id.clone() }))?;
        let cgroup = cgroup_of(&containerd.pid("k8s.io", &id)?)?;
        let pause = cgroup_of(&containerd.pid("k8s.io", &pod)?)?;
        println!("  CRI, cgroupfs, container: {}", cgroup.display());
        println!("  CRI, cgroupfs, pause:     {}", pause.display());

        let found = path::container(&cgroup).with_context(|| format!("{} is not recognised", cgroup.display()))?;
        ensure!((&found.id, found.pod_uid.as_ref(), found.delegated) == (&id, Some(&uid), false), "{found:?}");
        ensure!(path::pod(Path::new(&parent)).as_ref() == Some(&uid), "the pod's own cgroup");

        // Beside it one that CRI knows nothing of, in its own namespace.
        let rootfs = scratch.path("rootfs");
        containerd.ctr("k8s.io", &["run", "--detach", "--rootfs", &rootfs, &scratch.name, "/bin/sleep", "10000"])?;
        let foreign = cgroup_of(&containerd.pid("k8s.io", &scratch.name)?)?;
        println!("  ctr in k8s.io: {}", foreign.display());

        let config = RuntimeConfig { cri: vec![containerd.socket.clone()], docker: vec![], storage: vec![] };
        let mut runtimes = Runtimes::new(&config);
        for _ in 0..3 {
            let listing = listed(&runtime, &mut runtimes)?;
            ensure!(listing.containers.len() == 3, "{listing:#?}");
            let db = listing.find(&cgroup).context("not found by its cgroup")?;
            ensure!((db.runtime, db.name.as_str(), db.id.as_str()) == (Kind::Containerd, "postgres", &*id), "{db:?}");
            let names: Vec<_> = std::iter::once(&db.image).chain(&db.aliases).collect();
            ensure!(names.iter().any(|n| *n == IMAGE), "{db:?}");
            let pod = db.pod.as_ref().context("without its pod")?;
            ensure!((pod.namespace.as_str(), pod.name.as_str(), &pod.uid) == ("payments", "db-0", &uid), "{pod:?}");
            ensure!(pod.labels == labels(&[("app", "payments-db")]), "{pod:?}");
            ensure!(db.labels.contains_key("io.kubernetes.container.name"), "{db:?}");
            let holder = listing.find(&pause).context("pause is not found")?;
            ensure!(listing.pod(&uid) == Some(pod), "{listing:?}");
            ensure!(holder.name.is_empty() && holder.pod.as_ref() == Some(pod), "{holder:?}");
            ensure!(listing.find(&foreign).is_some_and(|c| c.name == scratch.name && c.pod.is_none()), "{listing:?}");
        }
        Ok(())
    })();
    if let Some(id) = sandbox {
        let _: Result<api::Empty> = runtime.block_on(call(&channel, "StopPodSandbox", api::Id { id: id.clone() }));
        let _: Result<api::Empty> = runtime.block_on(call(&channel, "RemovePodSandbox", api::Id { id }));
    }
    end.with_context(|| {
        let log = fs::read_to_string(scratch.path("containerd.log")).unwrap_or_default();
        let worst: Vec<&str> = log.lines().filter(|l| l.contains("level=error")).collect();
        format!("containerd says: {}", worst.join("\n"))
    })
}
