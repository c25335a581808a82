//! Root changes what we own in the kernel: found within ten seconds, put right, told with what differed.

use crate::Test;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use segfw::datapath::load::layout_dir;
use segfw::datapath::sys;
use segfw_common::state::PathKey;
use segfw_common::{ABI_VERSION, CgroupEntry, Identity, control};
use segfw_tests::scene::Scene;
use serde_json::Value;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What the issue allows.
const FOUND: Duration = Duration::from_secs(10);

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("tamper/pin-of-a-hook-removed", pin_removed),
        ("tamper/link-detached", link_detached),
        ("tamper/program-replaced", program_replaced),
        ("tamper/all-pins-removed", all_pins),
        ("tamper/map-entry-edited", entry_edited),
        ("tamper/path-planted", path_planted),
        ("tamper/control-word-edited", control_edited),
        ("tamper/tables-swapped", tables_swapped),
        ("tamper/verdict-undone-by-another-program", verdict_undone),
    ]
}

fn dir(scene: &Scene) -> PathBuf {
    layout_dir(scene.world.pins(), ABI_VERSION)
}

fn open(scene: &Scene, pin: &str) -> Result<OwnedFd> {
    sys::get(&dir(scene).join(pin))?.with_context(|| format!("{pin} is not pinned"))
}

fn cgroup_id(scene: &Scene, path: &str) -> Result<u64> {
    Ok(std::fs::metadata(scene.world.managed().join(path))?.ino())
}

/// Does `harm`, shows with `harmed` that it is one, and waits until it is repaired and told under `what`. The agent is stopped
/// meanwhile: it could be faster than the look, and the kernel takes a moment to let go of what was removed.
fn repaired(
    scene: &mut Scene,
    what: &str,
    harm: impl FnOnce(&mut Scene) -> Result<()>,
    harmed: impl Fn(&mut Scene) -> Result<bool>,
) -> Result<()> {
    scene.as_the_policy_says()?;
    scene.agent()?.signal(Signal::SIGSTOP)?;
    harm(scene)?;
    let begun = Instant::now();
    while !harmed(scene)? {
        ensure!(begun.elapsed() < FOUND, "the harm had no effect, so its repair proves nothing");
        std::thread::sleep(Duration::from_millis(50));
    }
    scene.agent()?.signal(Signal::SIGCONT)?;
    let took = scene.eventually(&format!("{what} is told"), FOUND, |scene| {
        let status = scene.agent()?.status()?;
        let repairs = status["repairs"].as_array().context("repairs in the status")?;
        Ok(repairs.iter().any(|r| r["what"].as_str().is_some_and(|w| w.contains(what)) && r["left"].is_null()))
    })?;
    println!("     {what}: found and put right within {:.1} s", took.as_secs_f32());
    scene.as_the_policy_says()?;
    let status = scene.agent()?.status()?;
    ensure!(status["state"] == "ENFORCING", "{}", status["reasons"]);
    ensure!(status["counters"]["named"]["repairs"].as_u64() > Some(0), "not counted");
    Ok(())
}

fn pin_removed() -> Result<()> {
    let mut scene = Scene::enforced()?;
    repaired(
        &mut scene,
        "hook connect4",
        |s| Ok(std::fs::remove_file(dir(s).join("link-connect4"))?),
        |s| s.connects(segfw_tests::scene::SHUT).map(|_| !dir(s).join("link-connect4").exists()),
    )
}

/// `BPF_LINK_DETACH`: the pin stays and holds a link that is attached to nothing.
fn link_detached() -> Result<()> {
    let mut scene = Scene::enforced()?;
    repaired(
        &mut scene,
        "hook skb_ingress",
        |s| {
            const BPF_LINK_DETACH: u32 = 34;
            let link = open(s, "link-skb_ingress")?;
            let attr = [link.as_raw_fd() as u32, 0, 0, 0];
            // SAFETY: the attribute of this command is one descriptor.
            let rc = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, attr.as_ptr(), size_of_val(&attr)) };
            ensure!(rc == 0, "{}", std::io::Error::last_os_error());
            Ok(())
        },
        |s| s.stranger_connects(segfw_tests::scene::OPEN),
    )
}

fn program_replaced() -> Result<()> {
    let mut scene = Scene::enforced()?;
    repaired(
        &mut scene,
        "hook connect4",
        |s| {
            let pass = pass_program(&[])?;
            Ok(sys::link_update(open(s, "link-connect4")?.as_fd(), pass.as_fd())?)
        },
        // The ingress gate refuses what the egress gate lets through: silence instead of EPERM.
        |_| Ok(true),
    )
}

fn all_pins() -> Result<()> {
    let mut scene = Scene::enforced()?;
    repaired(
        &mut scene,
        "map CGROUPS",
        |s| {
            for pin in std::fs::read_dir(dir(s))? {
                std::fs::remove_file(pin?.path())?;
            }
            Ok(())
        },
        |s| s.stranger_connects(segfw_tests::scene::OPEN),
    )?;
    // Whole again: the next agent adopts.
    let agent = scene.agent()?;
    agent.kill()?;
    agent.launch()?;
    scene.as_the_policy_says()
}

fn entry_edited() -> Result<()> {
    let mut scene = Scene::enforced()?;
    let id = cgroup_id(&scene, "srv")?;
    repaired(
        &mut scene,
        &format!("map CGROUPS, cgroup {id}"),
        |s| {
            let host = CgroupEntry { identity: Identity::HOST.0, ..CgroupEntry::default() };
            Ok(sys::map_update(open(s, "CGROUPS")?.as_fd(), &id, &host)?)
        },
        move |s| {
            let entry: Option<CgroupEntry> = sys::map_lookup(open(s, "CGROUPS")?.as_fd(), &id)?;
            Ok(entry.is_some_and(|entry| entry.identity == Identity::HOST.0))
        },
    )
}

fn path_planted() -> Result<()> {
    let mut scene = Scene::enforced()?;
    let path = format!("{}/srv", scene.world.managed_path());
    let key = PathKey::new(path.as_bytes()).context("a short path")?;
    repaired(
        &mut scene,
        "map PATHS",
        |s| {
            let host = CgroupEntry { identity: Identity::HOST.0, ..CgroupEntry::default() };
            Ok(sys::map_update(open(s, "PATHS")?.as_fd(), &key, &host)?)
        },
        |_| Ok(true),
    )
}

/// Monitor mode by the back door.
fn control_edited() -> Result<()> {
    let mut scene = Scene::enforced()?;
    repaired(
        &mut scene,
        "flags of the host",
        |s| Ok(sys::map_update(open(s, "CONTROL")?.as_fd(), &control::FLAGS, &control::HOST_MONITOR)?),
        |s| s.connects(segfw_tests::scene::SHUT),
    )
}

/// The word that names the slot in force is turned to an empty one.
fn tables_swapped() -> Result<()> {
    let mut scene = Scene::enforced()?;
    repaired(
        &mut scene,
        "tables in force",
        |s| {
            let map = open(s, "CONTROL")?;
            let word: u64 = sys::map_lookup(map.as_fd(), &control::ACTIVE)?.context("CONTROL")?;
            let other = (word + (1 << 32)) & !3 | ((word + 2) & 3);
            Ok(sys::map_update(map.as_fd(), &control::ACTIVE, &other)?)
        },
        |_| Ok(true),
    )
}

/// A program that runs after ours and lifts the refusal (`bpf_set_retval(0)`): it cannot be removed, since it is not ours,
/// but it cannot hide.
fn verdict_undone() -> Result<()> {
    let mut scene = Scene::enforced()?;
    // The canary is judged by the hooks only where they see it.
    let inside = scene.world.cgroup("managed/agent")?;
    let agent = scene.agent()?;
    agent.stop()?;
    agent.use_cgroup(inside);
    agent.launch()?;
    scene.as_the_policy_says()?;
    // mov r1, 0; call bpf_set_retval
    let lift = pass_program(&[[0xb7, 1, 0, 0, 0, 0, 0, 0], [0x85, 0, 0, 0, 187, 0, 0, 0]])?;
    let root = std::fs::File::open(scene.world.managed())?;
    let link = sys::link_create(lift.as_fd(), root.as_raw_fd() as u32, CONNECT4, 0)?;
    let state = |status: &Value| status["reasons"].to_string().contains("connect4: connect to 127.0.0.1");
    let took = scene.eventually("the canary is heard", FOUND, |s| Ok(state(&s.agent()?.status()?)))?;
    println!("     a verdict that was undone: told after {:.1} s", took.as_secs_f32());
    let status = scene.agent()?.status()?;
    let neighbours = status["neighbours"].as_array().context("neighbours")?;
    ensure!(neighbours.iter().any(|n| n["hook"] == "connect4" && n["after_ours"] == true), "{neighbours:?}");
    drop(link);
    let _ = scene.eventually("all is well again", FOUND, |s| Ok(s.agent()?.status()?["state"] == "ENFORCING"))?;
    scene.as_the_policy_says()
}

/// `BPF_CGROUP_INET4_CONNECT`.
const CONNECT4: u32 = 10;

/// A `connect4` program that does `first` and passes.
fn pass_program(first: &[[u8; 8]]) -> Result<OwnedFd> {
    const BPF_PROG_LOAD: u32 = 5;
    const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
    let mut code = first.to_vec();
    // r0 = 1; exit
    code.extend([[0xb7, 0, 0, 0, 1, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]]);
    let license = c"GPL";
    let mut attr = [0u8; 128];
    let mut put = |at: usize, bytes: &[u8]| attr[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &BPF_PROG_TYPE_CGROUP_SOCK_ADDR.to_ne_bytes());
    put(4, &(code.len() as u32).to_ne_bytes());
    put(8, &(code.as_ptr() as u64).to_ne_bytes());
    put(16, &(license.as_ptr() as u64).to_ne_bytes());
    put(48, b"lifts\0");
    put(68, &CONNECT4.to_ne_bytes());
    // SAFETY: `union bpf_attr` for this command; the pointers in it live as long as the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, attr.as_ptr(), attr.len()) };
    ensure!(fd >= 0, "loading a program: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
