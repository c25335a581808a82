//! From Debian's packages to what QEMU boots: `vmlinuz` and a small initramfs per kernel, in `target/vm`.

use super::folder;
use super::lock::{self, Kernel, Lists, Package};
use crate::setup::run_quietly;
use crate::{has, is_root, run, say};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a guest loads, in this order, each with what it depends on. What a kernel has built in, or has not, yields nothing.
/// Nothing is loaded by itself in a guest: without the `*_diag` modules there is no inventory of sockets.
const MODULES: [&str; 53] = [
    // What others ask the kernel for by name and nobody loads here (`softdep`).
    "crc32c_generic",
    "crc32c_intel",
    "hmac",
    "sha1_generic",
    "sha256_generic",
    "9pnet_virtio",
    "9p",
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "virtio_net",
    "virtio_blk",
    "overlay",
    "veth",
    "dummy",
    "bridge",
    "tun",
    "vxlan",
    "macvlan",
    "ipvlan",
    "nf_tables",
    "nft_ct",
    "nft_compat",
    "ip_tables",
    "iptable_filter",
    "xt_conntrack",
    "xt_tcpudp",
    "xt_set",
    "ip_set_hash_ipport",
    "sch_ingress",
    "cls_bpf",
    "sctp",
    "dccp",
    "dccp_ipv4",
    "dccp_ipv6",
    "smc",
    "mptcp",
    "l2tp_ip",
    "l2tp_ip6",
    "vsock",
    "vsock_loopback",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "sctp_diag",
    "dccp_diag",
    "smc_diag",
    "mptcp_diag",
    "packet_diag",
    "vsock_diag",
    "unix_diag",
    "netlink_diag",
];

/// The commands that `INIT` uses: links to busybox in the initramfs.
const APPLETS: [&str; 9] = ["sh", "mount", "mkdir", "insmod", "cat", "echo", "sleep", "switch_root", "umount"];

/// First process of a guest, in the initramfs: modules, then this machine's own root as the guest's, read-only, with what
/// must be writable on memory. `switch_root` and not `chroot`: a process in a chroot may make no user namespace.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
for m in $(cat /modlist); do insmod /lib/modules/$m 2>/dev/null || echo "INSMOD-FAIL $m"; done
opts=trans=virtio,version=9p2000.L,msize=262144
mount -t 9p -o ro,cache=loose,$opts root /newroot || { echo "no 9p root"; echo o >/proc/sysrq-trigger; sleep 60; }
umount /dev; umount /sys; umount /proc
cd /newroot
mount -t proc p proc; mount -t sysfs s sys; mount -t devtmpfs d dev
for d in run tmp var/tmp mnt; do mount -t tmpfs -o mode=1777 t $d; done
mkdir -p dev/shm dev/pts run/lock run/netns run/vm
mount -t tmpfs t dev/shm; mount -t devpts p dev/pts
mount -t 9p -o cache=none,$opts share run/vm
exec switch_root /newroot /bin/sh /run/vm/boot.sh
"#;

/// Everything a guest needs, made if it is not there.
pub(super) fn all(kernels: &[Kernel]) -> Result<Vec<Ready>> {
    tools()?;
    kernels.iter().map(kernel).collect()
}

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub(super) struct Ready {
    pub(super) name: String,
    pub(super) release: String,
    pub(super) vmlinuz: PathBuf,
    pub(super) initramfs: PathBuf,
}

/// QEMU and what unpacks packages. Installed where it is missing, as root with apt-get.
fn tools() -> Result<()> {
    const NEEDED: [(&str, &str); 7] = [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("depmod", "kmod"),
        ("cpio", "cpio"),
        ("xz", "xz-utils"),
        ("zstd", "zstd"),
        ("timeout", "coreutils"),
    ];
    let missing: Vec<&str> = NEEDED.iter().filter(|(command, _)| !has(command)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !is_root() || !has("apt-get") {
        bail!("missing, and needed to boot kernels (Debian's names): {list}");
    }
    say(&format!("installing {list} (apt-get)"));
    let install = |options: &[String], extra: &[&str]| -> Result<()> {
        let mut command = Command::new("apt-get");
        command.args(options).args(["install", "-y", "-qq", "--no-install-recommends"]).args(extra).args(&missing);
        run(command.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(Stdio::null()))
    };
    // Debian 12 with qemu-utils of its backports refuses its own QEMU: both must be of one version.
    let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if os.contains("VERSION_CODENAME=bookworm") && missing.contains(&"qemu-system-x86") {
        let lists = Lists::update()?;
        return install(&lists.options(), &["-t", "bookworm-backports"]);
    }
    run_quietly(Command::new("apt-get").args(["update", "-qq"]));
    install(&[], &[])
}

fn kernel(kernel: &Kernel) -> Result<Ready> {
    if let Some(ready) = made(kernel) {
        return Ok(ready);
    }
    let mut of_lock = kernel.clone();
    if let Err(error) = kernel.packages.iter().try_for_each(fetch) {
        // Debian keeps superseded builds for a while only. Its own signature vouches for the successor.
        say(&format!("{} {}: {error:#}", kernel.name, kernel.release));
        of_lock = Lists::update()?.successor(kernel)?;
        say(&format!(
            "NOTE: taking {} for kernel {}, by Debian's signature; `cargo xtask vm lock` renews the list in the tree",
            of_lock.release, kernel.name
        ));
        if let Some(ready) = made(&of_lock) {
            return Ok(ready);
        }
        of_lock.packages.iter().try_for_each(fetch)?;
    }
    say(&format!("unpacking kernel {} ({})", of_lock.name, of_lock.release));
    unpack(&of_lock).with_context(|| format!("kernel {}", of_lock.release))?;
    made(&of_lock).with_context(|| format!("kernel {} was not made", of_lock.release))
}

/// What the made files depend on.
fn stamp(kernel: &Kernel) -> String {
    let hashes: Vec<&str> = kernel.packages.iter().map(|p| p.sha256.as_str()).collect();
    format!("{}\n{}\n{}\n{INIT}", hashes.join(" "), MODULES.join(" "), APPLETS.join(" "))
}

fn made(kernel: &Kernel) -> Option<Ready> {
    let dir = folder().join(&kernel.release);
    let same = fs::read_to_string(dir.join("stamp")).is_ok_and(|text| text == stamp(kernel));
    same.then(|| Ready {
        name: kernel.name.clone(),
        release: kernel.release.clone(),
        vmlinuz: dir.join("vmlinuz"),
        initramfs: dir.join("initramfs.gz"),
    })
}

fn deb(package: &Package) -> PathBuf {
    folder().join("debs").join(package.file())
}

/// Downloads a package; apt compares the hash and uses this machine's proxy.
fn fetch(package: &Package) -> Result<()> {
    let file = deb(package);
    fs::create_dir_all(folder().join("debs"))?;
    if file.is_file() && sha256(&file)? == package.sha256 {
        return Ok(());
    }
    let uri = format!("{}{}", lock::mirror(), package.path);
    say(&format!("fetching {uri}"));
    // Under another name until it is whole: two runs at once may both fetch it.
    let draft = file.with_extension(format!("{}", std::process::id()));
    let fetched = run(Command::new("/usr/lib/apt/apt-helper")
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download-file", &uri])
        .arg(&draft)
        .arg(format!("SHA256:{}", package.sha256)));
    let whole = fetched.and_then(|()| sha256(&draft)).and_then(|sum| {
        ensure!(sum == package.sha256, "{uri} has the sha256 {sum}, expected {}", package.sha256);
        Ok(fs::rename(&draft, &file)?)
    });
    if whole.is_err() {
        let _ = fs::remove_file(&draft);
    }
    whole
}

fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(file).output().context("sha256sum")?;
    ensure!(output.status.success(), "sha256sum {}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

/// A folder that ends with this value.
struct Draft(PathBuf);

impl Draft {
    fn new(name: &str) -> Result<Self> {
        let dir = folder().join(format!(".{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self(dir))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn unpack(kernel: &Kernel) -> Result<()> {
    let release = &kernel.release;
    let draft = Draft::new(release)?;
    let (all, out) = (draft.0.join("all"), draft.0.join("out"));
    for package in &kernel.packages {
        run(Command::new("dpkg-deb").arg("-x").arg(deb(package)).arg(&all))?;
    }
    // Below /usr from 6.12 on; depmod and modprobe look below /lib.
    let modules = all.join("lib/modules").join(release);
    if !modules.is_dir() {
        fs::create_dir_all(all.join("lib/modules"))?;
        fs::rename(all.join("usr/lib/modules").join(release), &modules).context("the package has no modules")?;
    }
    fs::create_dir_all(&out)?;
    let vmlinuz = [all.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
    let vmlinuz = vmlinuz.iter().find(|p| p.is_file()).context("the package has no vmlinuz")?;
    fs::copy(vmlinuz, out.join("vmlinuz"))?;
    if !modules.join("modules.dep").is_file() {
        // Warns of lists that the packages of 7.x do not have; what it makes of the rest is looked at below.
        run(Command::new("depmod").arg("-b").arg(&all).arg(release).stderr(Stdio::null()))?;
    }
    initramfs(&modules, &draft.0.join("root"), &out.join("initramfs.gz"))?;
    fs::write(out.join("stamp"), stamp(kernel))?;
    let to = folder().join(release);
    let _ = fs::remove_dir_all(&to);
    // Another run may have been quicker: then the same is there.
    match fs::rename(&out, &to) {
        Err(_) if made(kernel).is_some() => Ok(()),
        other => other.with_context(|| to.display().to_string()),
    }
}

/// Files of the modules in the order in which they are to be loaded, from `modules.dep`.
fn load_order(dep: &str) -> Vec<String> {
    let name = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split(".ko").next().unwrap_or(file).replace('-', "_")
    };
    let mut order: Vec<String> = Vec::new();
    for wanted in MODULES {
        let line = dep.lines().find(|l| l.split_once(':').is_some_and(|(path, _)| name(path) == wanted));
        let Some((path, needs)) = line.and_then(|l| l.split_once(':')) else { continue };
        // The file lists what is needed last first.
        for file in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|have| have == file) {
                order.push(file.to_owned());
            }
        }
    }
    order
}

fn initramfs(modules: &Path, tree: &Path, out: &Path) -> Result<()> {
    for dir in ["bin", "proc", "sys", "dev", "newroot", "lib/modules"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].iter().map(Path::new).find(|p| p.is_file());
    fs::copy(busybox.context("busybox (package busybox-static)")?, tree.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    let dep = fs::read_to_string(modules.join("modules.dep")).context("modules.dep")?;
    let mut list = String::new();
    for file in load_order(&dep) {
        let from = modules.join(&file);
        let name = file.rsplit('/').next().unwrap_or(&file);
        let (plain, unpack) = match name.rsplit_once('.') {
            Some((plain, "xz")) => (plain, Some("xz")),
            Some((plain, "zst")) => (plain, Some("zstd")),
            _ => (name, None),
        };
        let to = tree.join("lib/modules").join(plain);
        match unpack {
            None => drop(fs::copy(&from, &to).with_context(|| from.display().to_string())?),
            Some(tool) => {
                run(Command::new(tool).arg("-dcq").arg(&from).stdout(fs::File::create(&to)?))?;
            }
        }
        list += &format!("{plain}\n");
    }
    fs::write(tree.join("modlist"), list)?;
    fs::write(tree.join("init"), INIT)?;
    fs::set_permissions(tree.join("init"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let pack = "find . | cpio -o -H newc --quiet | gzip -1";
    run(Command::new("sh").args(["-c", pack]).current_dir(tree).stdout(fs::File::create(out)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dep = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/fscache/fscache.ko\n\
                   kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko kernel/drivers/virtio/virtio_ring.ko\n\
                   kernel/net/sctp/sctp-diag.ko:\n";
        assert_eq!(
            load_order(dep),
            [
                "kernel/drivers/virtio/virtio_ring.ko",
                "kernel/net/9p/9pnet.ko",
                "kernel/net/9p/9pnet_virtio.ko.xz",
                "kernel/fs/fscache/fscache.ko",
                "kernel/fs/9p/9p.ko",
                "kernel/net/sctp/sctp-diag.ko",
            ]
        );
    }
}
