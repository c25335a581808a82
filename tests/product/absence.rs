//! Something that segfw needs is not there: each case has a declared behaviour, a message, and shows in the status.

use crate::Test;
use anyhow::{Context, Result, ensure};
use segfw_tests::scene::{OPEN, SHUT, Scene};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("absence/agent-gone-last-known-good", gone_last_known_good),
        ("absence/agent-gone-closed", gone_closed),
        ("absence/agent-gone-open", gone_open),
        ("absence/boot-last-known-good", boot_last_known_good),
        ("absence/boot-closed", boot_closed),
        ("absence/boot-open", boot_open),
        ("absence/bad-revision", bad_revision),
        ("absence/no-bpffs", no_bpffs),
        ("absence/cgroup-v1-only", v1_only),
        ("absence/capability-missing", no_capability),
        ("absence/memory-short", memory_short),
        ("absence/unknown-setting", unknown_setting),
    ]
}

/// Settings for the agent of a scene.
fn settings(scene: &Scene, yaml: &str) -> Result<Vec<String>> {
    let path = scene.world.folder().join("agent.yaml");
    std::fs::write(&path, yaml)?;
    Ok(vec!["--config".to_owned(), path.display().to_string()])
}

fn with_settings(yaml: &str) -> Result<Scene> {
    let mut scene = Scene::new()?;
    let options = settings(&scene, yaml)?;
    scene.start(&options)?;
    scene.as_the_policy_says()?;
    Ok(scene)
}

fn declared(scene: &mut Scene, when: &str) -> Result<String> {
    let status = scene.agent()?.status()?;
    let all = status["absence"].as_array().context("absence in the status")?;
    let found = all.iter().find(|a| a["when"] == when).with_context(|| format!("{when}: {all:?}"))?;
    Ok(found["behaviour"].as_str().unwrap_or_default().to_owned())
}

/// What a reboot does to segfw: every pin is gone, and so are programs and maps.
fn boot(scene: &mut Scene) -> Result<()> {
    scene.agent()?.stop()?;
    segfw::datapath::attach::remove(scene.world.pins())?;
    // Links end a little later than their pins.
    let end = Instant::now() + Duration::from_secs(5);
    while !scene.connects(SHUT)? {
        ensure!(Instant::now() < end, "still enforced without pins");
    }
    Ok(())
}

fn gone_last_known_good() -> Result<()> {
    let mut scene = with_settings("absence: {agentGone: lastKnownGood, agentGoneAfterSeconds: 4}\n")?;
    ensure!(declared(&mut scene, "agent gone")?.starts_with("lastKnownGood"));
    scene.agent()?.kill()?;
    std::thread::sleep(Duration::from_secs(6));
    scene.as_the_policy_says()?;
    unattended(&mut scene, "UNATTENDED")
}

/// `segfw status` without an agent says what the kernel does.
fn unattended(scene: &mut Scene, word: &str) -> Result<()> {
    let pins = scene.world.pins().display().to_string();
    let output = scene.agent()?.cli(&["status", "--pin-dir", &pins])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(3) && text.contains(word) && text.contains("attached"), "{output:?}");
    let output = scene.agent()?.cli(&["status", "--pin-dir", &pins, "-o", "json"])?;
    let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(status["state"] == "UNATTENDED" && status["kernel"][0]["generation"].as_u64() > Some(0), "{status}");
    Ok(())
}

fn gone_closed() -> Result<()> {
    let mut scene = with_settings("absence: {agentGone: closed, agentGoneAfterSeconds: 4}\n")?;
    ensure!(declared(&mut scene, "agent gone")?.starts_with("closed"));
    // While it lives, it stays open for what the policy allows, however long.
    std::thread::sleep(Duration::from_secs(6));
    scene.as_the_policy_says()?;
    scene.agent()?.kill()?;
    scene.as_the_policy_says()?;
    std::thread::sleep(Duration::from_secs(6));
    ensure!(!scene.connects(OPEN)?, "an allowed connection stood although the agent is gone");
    unattended(&mut scene, "CLOSED")?;
    scene.agent()?.launch()?;
    scene.as_the_policy_says()?;
    let flows = scene.agent()?.cli(&["flows", "--reason", "agent-gone", "-o", "json"])?;
    ensure!(!flows.stdout.is_empty(), "no record says agent-gone");
    Ok(())
}

fn gone_open() -> Result<()> {
    let mut scene = with_settings("absence: {agentGone: open, agentGoneAfterSeconds: 4}\n")?;
    ensure!(declared(&mut scene, "agent gone")?.starts_with("open"));
    scene.agent()?.kill()?;
    scene.as_the_policy_says()?;
    std::thread::sleep(Duration::from_secs(6));
    ensure!(scene.connects(SHUT)?, "a denied connection did not stand although the settings say open");
    unattended(&mut scene, "OPEN")?;
    scene.agent()?.launch()?;
    scene.as_the_policy_says()
}

/// A folder that cannot be used, right after a boot.
fn break_folder(scene: &mut Scene) -> Result<()> {
    scene.agent()?.write("kind: Nonsense\n")
}

fn boot_last_known_good() -> Result<()> {
    let mut scene = with_settings("absence: {beforeFirstRevision: lastKnownGood}\n")?;
    boot(&mut scene)?;
    break_folder(&mut scene)?;
    let agent = scene.agent()?;
    agent.spawn()?;
    agent.wait_until("says that the folder is bad", |s| s["state"] == "DEGRADED" && !s["refused"].is_null())?;
    scene.as_the_policy_says()
}

fn boot_closed() -> Result<()> {
    let mut scene = with_settings("absence: {beforeFirstRevision: closed}\n")?;
    boot(&mut scene)?;
    break_folder(&mut scene)?;
    let agent = scene.agent()?;
    agent.spawn()?;
    agent.wait_until("says that the folder is bad", |s| s["state"] == "DEGRADED" && !s["refused"].is_null())?;
    ensure!(!scene.connects(OPEN)?, "an allowed connection stood before the first revision");
    // Also the next agent knows that this host waits.
    let agent = scene.agent()?;
    agent.kill()?;
    agent.spawn()?;
    agent.wait_until("says so again", |s| s["state"] == "DEGRADED")?;
    ensure!(!scene.connects(OPEN)?, "a restart opened what waits for its first revision");
    let policy = scene.policy.clone();
    let agent = scene.agent()?;
    agent.write(&policy)?;
    agent.wait_until("has a revision", |s| s["state"] == "ENFORCING")?;
    scene.as_the_policy_says()
}

fn boot_open() -> Result<()> {
    let mut scene = with_settings("absence: {beforeFirstRevision: open}\n")?;
    boot(&mut scene)?;
    break_folder(&mut scene)?;
    let agent = scene.agent()?;
    agent.spawn()?;
    agent.wait_until("is open", |s| s["state"] == "OPEN")?;
    ensure!(scene.connects(SHUT)?, "refused although nothing is in force");
    let policy = scene.policy.clone();
    let agent = scene.agent()?;
    agent.write(&policy)?;
    agent.wait_until("has a revision", |s| s["state"] == "ENFORCING")?;
    scene.as_the_policy_says()
}

fn bad_revision() -> Result<()> {
    let mut scene = Scene::enforced()?;
    break_folder(&mut scene)?;
    scene.agent()?.wait_until("refuses", |s| s["state"] == "DEGRADED" && !s["refused"]["problems"].is_null())?;
    let text = String::from_utf8(scene.agent()?.cli(&["status"])?.stdout)?;
    ensure!(text.contains("policy.yaml:1:"), "the status does not say where: {text}");
    scene.as_the_policy_says()
}

/// A shell in a mount namespace of its own, as an administrator's odd machine.
fn elsewhere(script: &str, scene: &Scene) -> Result<Output> {
    let segfw = segfw_tests::binary("segfw")?;
    let folder = scene.world.folder();
    std::fs::create_dir_all(folder.join("policy"))?;
    let agent = format!(
        "timeout 5 {} agent --config /dev/null --policy {}/policy --state-dir {}/state --socket {}/s",
        segfw.display(),
        folder.display(),
        folder.display(),
        folder.display()
    );
    let script = script.replace("AGENT", &agent);
    Ok(Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .stdin(Stdio::null())
        .output()?)
}

fn says(output: &Output, words: &[&str]) -> Result<()> {
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    for word in words {
        ensure!(text.contains(word), "{word:?} is not in: {text}");
    }
    Ok(())
}

fn no_bpffs() -> Result<()> {
    let scene = Scene::new()?;
    let pins = "/sys/fs/bpf/segfw-test-own";
    // Unmounted: the agent mounts it, and says so.
    let output =
        elsewhere(&format!("umount -l /sys/fs/bpf && AGENT --pin-dir {pins}; mountpoint /sys/fs/bpf"), &scene)?;
    says(&output, &["mounted a BPF file system at /sys/fs/bpf"])?;
    ensure!(output.status.success(), "not mounted afterwards: {output:?}");
    // It may not: refused, and the message says what to do.
    let script = format!(
        "umount -l /sys/fs/bpf && setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin AGENT --pin-dir {pins}"
    );
    let output = elsewhere(&script, &scene)?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    says(&output, &["CAP_SYS_ADMIN", "not held"])
}

fn v1_only() -> Result<()> {
    let scene = Scene::new()?;
    let mount = segfw_tests::world::cgroup2_mount()?;
    let hybrid = std::fs::read_to_string("/proc/self/mountinfo")?.contains(" - cgroup ");
    let output =
        elsewhere(&format!("umount -l {} && AGENT --pin-dir /sys/fs/bpf/segfw-test-v1", mount.display()), &scene)?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    let word = if hybrid { "cgroup v1 only" } else { "no cgroup" };
    says(&output, &[word])
}

fn no_capability() -> Result<()> {
    let scene = Scene::new()?;
    for (capability, word) in [("bpf", "CAP_BPF"), ("net_admin", "CAP_NET_ADMIN"), ("perfmon", "CAP_PERFMON")] {
        // CAP_SYS_ADMIN stands for the others in the kernel, so it goes too.
        let script = format!(
            "exec setpriv --bounding-set=-{capability},-sys_admin --inh-caps=-{capability},-sys_admin AGENT --pin-dir /sys/fs/bpf/segfw-test-cap"
        );
        let output = elsewhere(&script, &scene)?;
        ensure!(output.status.code() == Some(3), "{word}: {output:?}");
        says(&output, &[word, "not held"])?;
    }
    Ok(())
}

/// Too little memory for a new generation: what is in force stays, and the agent that was killed for it comes back.
fn memory_short() -> Result<()> {
    let group = PathBuf::from("/sys/fs/cgroup/memory");
    if !group.join("memory.limit_in_bytes").exists() {
        return crate::skip("this machine has no cgroup v1 memory controller, and its v2 tree has none to hand out");
    }
    let mut scene = Scene::enforced()?;
    let group = group.join(format!("segfw-test-{}", scene.world.id()));
    std::fs::create_dir(&group)?;
    let _end = End(group.clone());
    let pid = scene.agent()?.pid().context("pid")?;
    std::fs::write(group.join("cgroup.procs"), pid.to_string())?;
    let usage: u64 = std::fs::read_to_string(group.join("memory.usage_in_bytes"))?.trim().parse()?;
    std::fs::write(group.join("memory.limit_in_bytes"), (usage + (24 << 20)).to_string())?;
    let mut big = segfw_tests::policy::Yaml(scene.policy.clone());
    for n in 0..40 {
        let addresses: Vec<String> = (0..250).map(|i| format!("10.{}.{}.0/24", 100 + n, i)).collect();
        big.segment(&format!("net{n}"), &format!("addresses: [{}]", addresses.join(", ")), &[]);
        big.allow(&format!("to{n}"), "cli", &format!("net{n}"), "tcp/1-2000");
    }
    let before = scene.agent()?.status()?["revision"]["number"].clone();
    scene.agent()?.write(&big.0)?;
    std::thread::sleep(Duration::from_secs(4));
    scene.as_the_policy_says().context("while memory is short")?;
    // Alive and refusing, or killed by the kernel; in no case half a revision.
    let alive = scene.agent()?.status();
    println!("     the agent {}", if alive.is_ok() { "lived" } else { "was killed for it" });
    let policy = scene.policy.clone();
    let agent = scene.agent()?;
    agent.kill()?;
    agent.write(&policy)?;
    agent.launch()?;
    let after = agent.status()?["revision"]["number"].clone();
    ensure!(after.as_u64() >= before.as_u64(), "{before} {after}");
    scene.as_the_policy_says()
}

/// A folder of cgroups that goes with its test.
struct End(PathBuf);
impl Drop for End {
    fn drop(&mut self) {
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn unknown_setting() -> Result<()> {
    let scene = Scene::new()?;
    let path = scene.world.folder().join("bad.yaml");
    std::fs::write(&path, "absence:\n  agentGon: open\n")?;
    let output = Command::new(segfw_tests::binary("segfw")?).args(["agent", "--config"]).arg(&path).output()?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    says(&output, &["bad.yaml", "agentGon", "line 2"])
}
