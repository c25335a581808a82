//! One boot of one kernel: QEMU, its console, and what became of the command.

use super::fetch::Ready;
use super::folder;
use crate::root;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// How long KVM may take for a boot that does nothing, in seconds. Emulated it takes 8 to 20: slower than that is no KVM.
const KVM_TRIAL: u64 = 20;
const KVM: &str = "kvm";
/// Any processor, every CPU of the guest a thread.
const TCG: &str = "tcg,thread=multi";
/// How many times longer tests wait in an emulated guest (see `segfw_tests::slowness`). A single thread is some 15 times
/// slower than hardware, but what is waited for is mostly short.
const EMULATED_SLOWNESS: u32 = 5;
/// Memory of a guest, MiB.
const MEMORY: &str = "2048";
/// Line that a guest prints when its command begins.
const BEGIN: &str = "SEGFW-VM-BEGIN";

/// What differs from how Debian boots the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variant {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    /// Added to the kernel's command line.
    append: &'static str,
    /// Run by the guest's shell before the command.
    script: &'static str,
    /// Virtual time is the number of instructions: emulation on one processor.
    counted: bool,
}

/// The first one is what is meant when none is named.
pub(super) const VARIANTS: [Variant; 9] = [
    Variant { name: "default", what: "BPF LSM on, JIT on", append: LSM_BPF, script: "", counted: false },
    Variant {
        name: "no-lsm",
        what: "the BPF LSM is not in the list (5.10's own default)",
        append: LSM_PLAIN,
        script: "",
        counted: false,
    },
    Variant {
        name: "lockdown-integrity",
        what: "kernel lockdown, integrity",
        append: "lsm=landlock,lockdown,yama,integrity,apparmor,bpf lockdown=integrity",
        script: "",
        counted: false,
    },
    Variant {
        name: "lockdown-confidentiality",
        what: "kernel lockdown, confidentiality",
        append: "lsm=landlock,lockdown,yama,integrity,apparmor,bpf lockdown=confidentiality",
        script: "",
        counted: false,
    },
    Variant {
        name: "jit-harden",
        what: "net.core.bpf_jit_harden=2",
        append: LSM_BPF,
        script: "echo 2 >/proc/sys/net/core/bpf_jit_harden",
        counted: false,
    },
    Variant {
        name: "no-jit",
        what: "net.core.bpf_jit_enable=0",
        append: LSM_BPF,
        script: "echo 0 >/proc/sys/net/core/bpf_jit_enable",
        counted: false,
    },
    Variant {
        name: "memlock",
        what: "ulimit -l 64 (below 5.11 BPF memory counts against it)",
        append: LSM_BPF,
        script: "ulimit -l 64",
        counted: false,
    },
    Variant {
        name: "one-cpu",
        what: "one processor",
        append: "maxcpus=1 lsm=landlock,lockdown,yama,integrity,apparmor,bpf",
        script: "",
        counted: false,
    },
    Variant {
        name: "counted",
        what: "one processor whose clock counts instructions: one is a nanosecond (QEMU -icount shift=0)",
        append: LSM_BPF,
        script: "",
        counted: true,
    },
];
const LSM_BPF: &str = "lsm=landlock,lockdown,yama,integrity,apparmor,bpf";
const LSM_PLAIN: &str = "lsm=landlock,lockdown,yama,apparmor";

impl Variant {
    pub(super) fn by_name(name: &str) -> Result<Self> {
        let names = || VARIANTS.map(|v| v.name).join(", ");
        VARIANTS
            .into_iter()
            .find(|v| v.name == name)
            .with_context(|| format!("no variant {name}: there are {}", names()))
    }
}

/// How a command in a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The command's exit status; the guest shut down in order.
    Exit(u8),
    /// No orderly end: the kernel panicked, hung or was too slow.
    Lost,
}

/// A folder that guest and host share, at `/run/vm` in the guest. It ends with this value.
#[derive(Debug)]
pub(super) struct Share(PathBuf);

impl Share {
    pub(super) fn new(kernel: &str) -> Result<Self> {
        let dir = folder().join(format!("run-{}-{kernel}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Self(dir))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What the guest runs on this machine's root: mounts, the command, its status, the end.
fn script(accelerator: &str, variant: Variant, command: &[String]) -> String {
    let words: Vec<String> = command.iter().map(|w| quoted(w)).collect();
    format!(
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TMPDIR=/tmp SEGFW_TEST_SLOWNESS={}
mount -t bpf b /sys/fs/bpf; mount -t cgroup2 c /sys/fs/cgroup; mount -t securityfs s /sys/kernel/security
mount -t tracefs t /sys/kernel/tracing
ip link set lo up
# A checkout below a folder that the guest has for itself, such as /tmp, lies under that mount.
[ -e {repo}/Cargo.toml ] || {{ mkdir -p /run/root {repo}; mount --bind / /run/root; mount --bind /run/root{repo} {repo}; }}
cd {repo}
{}
echo; echo \"{BEGIN} $(uname -r)\"
( exec {} ) </dev/null 2>&1
rc=$?; echo; echo \"RC=$rc\"
echo DONE
sync; echo o >/proc/sysrq-trigger; sleep 60
",
        if accelerator == KVM { 1 } else { EMULATED_SLOWNESS },
        variant.script,
        words.join(" "),
        repo = quoted(&root().display().to_string()),
    )
}

/// The accelerator for all guests of this run: KVM where a guest boots with it, else emulation.
fn accelerator(kernel: &Ready) -> &'static str {
    static CHOSEN: OnceLock<&str> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        if !Path::new("/dev/kvm").exists() {
            return TCG;
        }
        // That the device is there means little: under some clouds it hangs, or is slower than emulation. Asked once a boot
        // of this machine.
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let memo = folder().join("kvm");
        let known = fs::read_to_string(&memo).unwrap_or_default();
        let works = match known.trim().split_once(' ') {
            Some((of, answer)) if of == boot.trim() => answer == "works",
            _ => {
                let works = Share::new("kvm-trial").is_ok_and(|share| {
                    let command = ["true".to_owned()];
                    let ended = boot_with(KVM, kernel, VARIANTS[0], &share, &command, KVM_TRIAL, &mut |_| ());
                    ended.is_ok_and(|end| end == End::Exit(0))
                });
                let _ = fs::write(&memo, format!("{} {}", boot.trim(), if works { "works" } else { "does not work" }));
                works
            }
        };
        crate::say(match works {
            true => "guests run with KVM",
            false => "guests are emulated: /dev/kvm is there, and a guest does not boot with it",
        });
        if works { KVM } else { TCG }
    })
}

/// Boots a kernel and runs a command in it; `line` gets each line of its output.
pub(super) fn boot(
    kernel: &Ready,
    variant: Variant,
    share: &Share,
    command: &[String],
    seconds: u64,
    line: &mut dyn FnMut(&str),
) -> Result<End> {
    let accelerator = if variant.counted { "tcg,thread=single" } else { accelerator(kernel) };
    boot_with(accelerator, kernel, variant, share, command, seconds, line)
}

fn boot_with(
    accelerator: &str,
    kernel: &Ready,
    variant: Variant,
    share: &Share,
    command: &[String],
    seconds: u64,
    line: &mut dyn FnMut(&str),
) -> Result<End> {
    fs::write(share.path().join("boot.sh"), script(accelerator, variant, command))?;
    // Not in the background: Ctrl-C must reach QEMU. And no guest outlives who waits for it, however that one ended.
    let mut qemu = Command::new("setpriv");
    qemu.args([
        "--pdeathsig",
        "TERM",
        "timeout",
        "--foreground",
        "-k",
        "5",
        &seconds.to_string(),
        "qemu-system-x86_64",
    ]);
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-nographic",
        "-M",
        "q35,usb=off",
        "-accel",
        accelerator,
    ]);
    if variant.counted {
        qemu.args(["-icount", "shift=0,sleep=off"]);
    }
    qemu.args([
        "-cpu",
        "max",
        "-smp",
        if variant.counted { "1" } else { "2" },
        "-m",
        MEMORY,
        "-serial",
        "stdio",
        "-device",
        "virtio-rng-pci",
    ]);
    // The machine's root, read-only, and the share.
    qemu.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
    qemu.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root", "-fsdev"]);
    qemu.arg(format!("local,id=share,path={},security_model=none", share.path().display()));
    qemu.args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]);
    qemu.arg("-kernel").arg(&kernel.vmlinuz).arg("-initrd").arg(&kernel.initramfs).arg("-append").arg(format!(
        "console=ttyS0,115200 panic=-1 loglevel=4 rdinit=/init tsc=reliable mitigations=off audit=0 {}",
        variant.append
    ));
    let errors = share.path().join("qemu.log");
    let mut child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&errors)?)
        .spawn()
        .context("starting qemu-system-x86_64")?;
    let console = child.stdout.take().context("the console")?;
    let read = follow(BufReader::new(console), line);
    let status = child.wait()?;
    let (end, early) = read?;
    if end == End::Lost {
        // What was said before the command began tells why it never did.
        early.iter().for_each(|text| line(text));
        fs::read_to_string(&errors).unwrap_or_default().lines().for_each(&mut *line);
        // 124 and 137: timeout(1).
        if matches!(status.code(), Some(124 | 137)) {
            line(&format!("the guest was ended after {seconds} s"));
        }
    }
    Ok(end)
}

/// Reads the console to its end: what the command says goes to `line`; what came before it is returned.
fn follow(mut console: impl BufRead, line: &mut dyn FnMut(&str)) -> Result<(End, Vec<String>)> {
    let (mut early, mut begun, mut code, mut done) = (Vec::new(), false, None, false);
    loop {
        let mut bytes = Vec::new();
        // Not text by promise: firmware and dying kernels write what they like.
        if console.read_until(b'\n', &mut bytes)? == 0 {
            break;
        }
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let text = text.trim_end_matches('\n');
        match text {
            _ if text.contains(BEGIN) => begun = true,
            _ if !begun => early.push(text.to_owned()),
            "DONE" => done = true,
            _ => match text.strip_prefix("RC=").map(str::parse::<u8>) {
                Some(Ok(number)) => code = Some(number),
                _ if done => {}
                _ => line(text),
            },
        }
    }
    let end = match (done, code) {
        (true, Some(code)) => End::Exit(code),
        _ => End::Lost,
    };
    Ok((end, if begun { Vec::new() } else { early }))
}

/// The exit status that stands for an end.
pub(super) fn ensure_ok(kernel: &str, end: End) -> Result<()> {
    match end {
        End::Exit(0) => Ok(()),
        End::Exit(code) => bail!("kernel {kernel}: the command ended with status {code}"),
        End::Lost => bail!("kernel {kernel}: the guest did not come to its end (no DONE on its console)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(console: &str) -> (End, Vec<String>, Vec<String>) {
        let mut lines = Vec::new();
        let (end, early) = follow(console.as_bytes(), &mut |l| lines.push(l.to_owned())).expect("reads");
        (end, lines, early)
    }

    #[test]
    fn an_end_needs_both_lines() {
        let good = "firmware\r\n\x1b[0mSEGFW-VM-BEGIN 6.1\r\nhello\r\n\r\nRC=3\r\nDONE\r\n[1.0] reboot: Power down\r\n";
        assert_eq!(told(good), (End::Exit(3), vec!["hello".to_owned(), String::new()], vec![]));
        let panic = "SEGFW-VM-BEGIN 6.1\nhello\nRC=0\nKernel panic\n";
        assert_eq!(told(panic).0, End::Lost);
        assert_eq!(told("SEGFW-VM-BEGIN 6.1\nDONE\n").0, End::Lost);
        let early = told("no 9p root\n");
        assert_eq!((early.0, early.2), (End::Lost, vec!["no 9p root".to_owned()]));
    }

    #[test]
    fn words_reach_the_guest_as_they_are() {
        let text = script(KVM, VARIANTS[0], &["echo".to_owned(), "it's $HOME".to_owned()]);
        assert!(text.contains(r"( exec 'echo' 'it'\''s $HOME' )"), "{text}");
    }
}
