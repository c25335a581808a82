//! A Debian with a systemd of its own, booted by systemd-nspawn: its cgroup tree, network and bpffs are its own, so what
//! is attached and pinned in it touches nobody else, and ends with it.
//!
//! The root is made once by mmdebstrap and kept in target/tools. Names begin with [`PREFIX`] and the process id; what a
//! killed run left is swept by the next.

use anyhow::{Context, Result, bail};
use segfw_tests::world::cgroup2_mount;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How every machine, its cgroups and its folder begin.
const PREFIX: &str = "segfw-pk-";
/// Where the folders of machines are: on a disk, since a root is some 250 MB.
const FOLDER: &str = "/var/tmp";
/// The packages of the root beside Debian's minimum.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,iproute2,procps,python3-minimal";
const SUITE: &str = "bookworm";
/// The hierarchy in which systemd keeps its processes on hybrid hosts; nspawn looks there too.
const V1: &str = "/sys/fs/cgroup/systemd";
const BOOT: Duration = Duration::from_secs(90);
/// What PID 1 does by itself outside of containers, in which it refuses a mount unit for it.
const BPFFS: &str = "[Unit]\nDefaultDependencies=no\nBefore=local-fs.target\n[Service]\nType=oneshot\nRemainAfterExit=yes\n\
    ExecStart=/bin/sh -c 'mkdir -p /sys/fs/bpf && mount -t bpf -o mode=700,nosuid,nodev,noexec bpf /sys/fs/bpf'\n";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Why no machine can be booted here.
pub(crate) fn missing() -> Option<String> {
    let tools = ["systemd-nspawn", "mmdebstrap", "nsenter", "tar", "dpkg-deb"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |name: &str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    let tool = tools.into_iter().find(|tool| !has(tool))?;
    Some(format!("no {tool} (cargo xtask setup installs it on Debian)"))
}

/// The repository.
pub(crate) fn repository() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// The root as a tar, made if need be. `Err` in the inner result: why it cannot be made here.
pub(crate) fn tarball() -> Result<Result<PathBuf, String>> {
    let folder = repository().join("target/tools/roots");
    let done = folder.join(format!("{SUITE}.tar"));
    if done.is_file() {
        return Ok(Ok(done));
    }
    fs::create_dir_all(&folder)?;
    let draft = folder.join(format!("{SUITE}.{}.tar", std::process::id()));
    let output = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", &format!("--include={PACKAGES}"), SUITE])
        .arg(&draft)
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        let _ = fs::remove_file(&draft);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return Ok(Err(format!("mmdebstrap: {}", text.lines().last().unwrap_or("failed"))));
    }
    fs::rename(&draft, &done)?;
    Ok(Ok(done))
}

/// See the module.
pub(crate) struct Machine {
    name: String,
    folder: PathBuf,
    child: Option<Child>,
}

impl Machine {
    /// Unpacks a root; nothing runs yet.
    pub(crate) fn new(tarball: &Path) -> Result<Self> {
        sweep()?;
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let machine = Self { folder: Path::new(FOLDER).join(&name), name, child: None };
        fs::create_dir_all(machine.root())?;
        let unpacked = Command::new("tar")
            .args(["--extract", "--numeric-owner", "--file"])
            .arg(tarball)
            .arg("--directory")
            .arg(machine.root())
            .status()?;
        anyhow::ensure!(unpacked.success(), "{} cannot be unpacked: remove it, it is made anew", tarball.display());
        machine.write("etc/hostname", &machine.name)?;
        machine.write("etc/systemd/system/bpffs.service", BPFFS)?;
        machine.write("etc/systemd/system/local-fs.target.d/bpffs.conf", "[Unit]\nRequires=bpffs.service\n")?;
        Ok(machine)
    }

    fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// A path of the machine, as seen from here.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    /// Writes a file; its folder is made.
    pub(crate) fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.path(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    fn cgroups(&self) -> Result<Vec<PathBuf>> {
        let mut all = vec![cgroup2_mount()?.join(&self.name)];
        if Path::new(V1).join("cgroup.procs").is_file() {
            all.push(Path::new(V1).join(&self.name));
        }
        Ok(all)
    }

    /// Boots it and waits until systemd is done.
    pub(crate) fn boot(&mut self) -> Result<()> {
        let cgroups = self.cgroups()?;
        for cgroup in &cgroups {
            fs::create_dir_all(cgroup).with_context(|| cgroup.display().to_string())?;
        }
        // nspawn puts the machine below the cgroup it is in itself.
        let join: String = cgroups.iter().map(|c| format!("echo $$ > {}/cgroup.procs && ", c.display())).collect();
        let log = fs::File::create(self.folder.join("console.log"))?;
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("{join} exec \"$@\""))
            .args(["sh", "systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--private-network"])
            .args(["--capability=all", "--system-call-filter=bpf perf_event_open", "--link-journal=no"])
            .args(["--console=pipe", "--machine", &self.name, "--directory"])
            .arg(self.root())
            .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")
            .env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        segfw_tests::world::with_signals(&mut command);
        // SAFETY: prctl is a plain call. A machine does not outlive the tests, and nspawn takes its PID 1 along.
        unsafe {
            command.pre_exec(|| {
                let _ = libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        self.child = Some(command.spawn().context("systemd-nspawn")?);
        let until = Instant::now() + BOOT;
        loop {
            if let Ok(state) = self.sh("systemctl is-system-running || true")
                && ["running", "degraded"].contains(&state.as_str())
            {
                return Ok(());
            }
            let ended = match &mut self.child {
                Some(child) => child.try_wait()?,
                None => None,
            };
            if ended.is_some() || Instant::now() > until {
                let log = fs::read_to_string(self.folder.join("console.log")).unwrap_or_default();
                bail!("the machine does not boot: {}", log.lines().rev().take(5).collect::<Vec<_>>().join(" / "));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Ends it as a power cut does. The root stays.
    pub(crate) fn power_off(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            let _ = child.wait()?;
        }
        for cgroup in self.cgroups()? {
            remove_cgroup(&cgroup)?;
        }
        Ok(())
    }

    /// PID 1, as seen from here.
    fn leader(&self) -> Result<String> {
        let scope = cgroup2_mount()?.join(&self.name).join("payload/init.scope/cgroup.procs");
        let text = fs::read_to_string(&scope).with_context(|| scope.display().to_string())?;
        text.lines().next().map(str::to_owned).context("the machine does not run")
    }

    /// Runs a script in the machine and returns what it printed, on either channel; no success is an error that holds it.
    /// The script is in none of the machine's cgroups: traffic is for units.
    pub(crate) fn sh(&self, script: &str) -> Result<String> {
        let output = Command::new("nsenter")
            .args(["--target", &self.leader()?, "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"])
            .args(["env", "--ignore-environment", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C"])
            .args(["XDG_RUNTIME_DIR=/run/user/0", "sh", "-c", &format!("exec 2>&1; {script}")])
            .stdin(Stdio::null())
            .output()
            .context("nsenter")?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        anyhow::ensure!(output.status.success(), "`{script}`: {}: {text}", output.status);
        Ok(text)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(e) = self.power_off() {
            eprintln!("{}: {e:#}", self.name);
        }
        if let Err(e) = fs::remove_dir_all(&self.folder) {
            eprintln!("{}: {e}", self.folder.display());
        }
    }
}

/// Kills what is in it and takes it away.
fn remove_cgroup(cgroup: &Path) -> Result<()> {
    let _ = fs::write(cgroup.join("cgroup.kill"), "1");
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let Err(error) = remove_tree(cgroup) else { return Ok(()) };
        if Instant::now() > until {
            return Err(error).with_context(|| cgroup.display().to_string());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn remove_tree(cgroup: &Path) -> std::io::Result<()> {
    if !cgroup.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

/// Removes what runs that were killed left: their machines died with them.
fn sweep() -> Result<()> {
    let mut folders = vec![PathBuf::from(FOLDER), cgroup2_mount()?];
    if Path::new(V1).is_dir() {
        folders.push(V1.into());
    }
    for folder in folders {
        for entry in fs::read_dir(&folder)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).map(str::to_owned);
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let removed = match folder == Path::new(FOLDER) {
                    true => fs::remove_dir_all(entry.path()).map_err(Into::into),
                    false => remove_cgroup(&entry.path()),
                };
                removed.with_context(|| entry.path().display().to_string())?;
            }
        }
    }
    Ok(())
}
