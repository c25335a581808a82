//! Restart, crash, upgrade and downgrade under traffic: no allowed flow breaks, no denied one passes.

use crate::Test;
use anyhow::{Context, Result, ensure};
use segfw_tests::actor::Actor;
use segfw_tests::agent::Agent;
use segfw_tests::policy::Yaml;
use segfw_tests::proto::Cmd;
use segfw_tests::scene::Scene;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

static LONG: AtomicBool = AtomicBool::new(false);

/// The full counts; without it a tenth, for the time that everybody waits.
pub(crate) fn long() {
    LONG.store(true, Ordering::Relaxed);
}

fn times(full: usize) -> usize {
    if LONG.load(Ordering::Relaxed) { full } else { full / 10 }
}

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("lifecycle/killed-at-random-moments", killed),
        ("lifecycle/upgrade-and-downgrade-of-the-layout", layouts),
        ("lifecycle/restart-with-the-same-layout", restarts),
        ("lifecycle/connected-datagrams-older-than-the-programs", datagrams),
        ("lifecycle/forged-origin-of-what-is-older", forged_origin),
    ]
}

/// The links of the hooks, which must stay the same ones. That of the tracepoint cannot be given another program: a new one
/// takes its place before it goes.
fn links(agent: &Agent) -> Result<Vec<Value>> {
    let status = agent.status()?;
    let hooks = status["hooks"].as_array().context("hooks in the status")?;
    ensure!(!hooks.is_empty() && hooks.iter().all(|h| h["attached"] == true), "not attached: {hooks:?}");
    Ok(hooks.iter().filter(|h| h["name"] != "cgroup_made").map(|h| h["link"].clone()).collect())
}

/// Another policy that allows and denies the same.
fn variant(policy: &str, n: usize) -> String {
    let mut more = Yaml(policy.to_owned());
    more.allow("more", "cli", "srv", &format!("tcp/{}", 6000 + n % 1000));
    more.0
}

/// kill -9 while it starts, loads, fills, switches, attaches and sweeps, each time with another revision waiting.
fn killed() -> Result<()> {
    let mut scene = Scene::enforced()?;
    let before = links(scene.agent()?)?;
    let policy = scene.policy.clone();
    let tally = scene.under_traffic(|scene| {
        let mut seed = UNIX_EPOCH.elapsed()?.subsec_nanos() | 1;
        for n in 0..times(1000) {
            // xorshift
            seed ^= seed << 13;
            seed ^= seed >> 17;
            seed ^= seed << 5;
            let agent = scene.agent()?;
            agent.write(&variant(&policy, n))?;
            std::thread::sleep(Duration::from_millis(u64::from(seed % 350)));
            agent.kill()?;
            agent.spawn()?;
        }
        let agent = scene.agent()?;
        agent.wait_until("enforces after the kills", |s| s["state"] == "ENFORCING")?;
        agent.reload(&policy)
    })?;
    println!("     {} kills, {} answers, {} denied attempts", times(1000), tally.answered, tally.tried);
    let after = links(scene.agent()?)?;
    ensure!(before == after, "links changed: {before:?}, {after:?}");
    scene.as_the_policy_says()
}

/// Between two builds whose maps differ: nothing can be adopted, so both judge until the new one is whole.
fn layouts() -> Result<()> {
    let mut scene = Scene::enforced()?;
    let tally = scene.under_traffic(|scene| {
        for n in 0..2 * times(100) {
            let agent = scene.agent()?;
            // Half of the time the old one is not asked to go, but killed.
            if n % 4 < 2 {
                agent.stop()?
            } else {
                agent.kill()?
            }
            agent.use_binary(if n % 2 == 0 { "segfw-next" } else { "segfw" });
            agent.launch()?;
        }
        Ok(())
    })?;
    println!(
        "     {} upgrades, as many downgrades, {} answers, {} denied attempts",
        times(100),
        tally.answered,
        tally.tried
    );
    let layouts: Vec<_> = std::fs::read_dir(scene.world.pins())?.flatten().map(|e| e.file_name()).collect();
    ensure!(layouts.len() == 1, "more than one layout is left: {layouts:?}");
    scene.as_the_policy_says()
}

/// `send` on a connected socket meets no hook, so nobody but the agent can tell new programs that its answers were asked for.
fn datagrams() -> Result<()> {
    const PORT: u16 = 5300;
    let mut yaml = segfw_tests::scene::policy();
    yaml.allow("udp", "cli", "srv", &format!("udp/{PORT}"));
    let mut scene = Scene::with(&yaml.0)?;
    let to = std::net::SocketAddr::new(scene.server(PORT).ip(), PORT);
    let server = scene.srv.listen_udp(to)?;
    let h = scene.cli.must(&Cmd::Socket { domain: libc::AF_INET, kind: libc::SOCK_DGRAM, proto: 0 })?.h;
    scene.cli.connect(h, to, 500)?.map_err(|e| anyhow::anyhow!(e))?;
    let talks = |scene: &mut Scene, when: &str| -> Result<()> {
        scene.cli.send(h, "ask")?.map_err(|e| anyhow::anyhow!("{when}: the question: {e}"))?;
        let asked = scene.srv.recv(server, 1000)?.map_err(|e| anyhow::anyhow!("{when}: the question: {e}"))?;
        let from: std::net::SocketAddr = asked.from.parse()?;
        scene.srv.send_to(server, from, "answer")?.map_err(|e| anyhow::anyhow!("{when}: the answer: {e}"))?;
        let got = scene.cli.recv(h, 1000)?.map_err(|e| anyhow::anyhow!("{when}: the answer: {e}"))?;
        ensure!(got.data == "answer", "{when}: {got:?}");
        Ok(())
    };
    talks(&mut scene, "without segfw")?;
    scene.start(&[])?;
    talks(&mut scene, "older than the agent")?;
    for binary in ["segfw-next", "segfw"] {
        let agent = scene.agent()?;
        agent.kill()?;
        agent.use_binary(binary);
        agent.launch()?;
        talks(&mut scene, "older than the layout")?;
    }
    // Its neighbour, without a rule.
    let other = std::net::SocketAddr::new(to.ip(), PORT + 1);
    let h = scene.cli.must(&Cmd::Socket { domain: libc::AF_INET, kind: libc::SOCK_DGRAM, proto: 0 })?.h;
    ensure!(scene.cli.connect(h, other, 500)?.is_err(), "a denied port was connected");
    Ok(())
}

/// The agent enters who opened what is open before the hooks judge. Somebody whose own namespace has the addresses and ports
/// of that connection, too, must not be taken for its client.
fn forged_origin() -> Result<()> {
    let mut scene = Scene::new()?;
    let to = scene.server(segfw_tests::scene::OPEN);
    let client = std::net::SocketAddr::new(scene.world.v4("a").into(), 40_001);
    let connect = |actor: &mut Actor| -> Result<u32> {
        let h = actor.must(&Cmd::Socket { domain: libc::AF_INET, kind: libc::SOCK_STREAM, proto: 0 })?.h;
        let _ = actor.must(&Cmd::Bind { h, addr: client.to_string() })?;
        actor.connect(h, to, 500)?.map_err(|e| anyhow::anyhow!(e))?;
        Ok(h)
    };
    let h = connect(&mut scene.cli)?;
    let _ = scene.ext.must(&Cmd::UnshareUser)?;
    for ip in [client.ip(), to.ip()] {
        let _ = scene.ext.must(&Cmd::AddAddress { ip: ip.to_string() })?;
    }
    let _ = scene.ext.listen_tcp(to)?;
    let _ = connect(&mut scene.ext)?;
    scene.start(&[])?;
    for word in ["one", "two", "three"] {
        scene.cli.send(h, word)?.map_err(|e| anyhow::anyhow!("{word}: {e}"))?;
        let echo = scene.cli.recv(h, 1500)?.map_err(|e| anyhow::anyhow!("{word} comes not back: {e}"))?;
        ensure!(echo.data == word, "{echo:?}");
    }
    ensure!(!scene.connects(segfw_tests::scene::SHUT)?, "a denied port was connected");
    Ok(())
}

/// Between two starts with one layout: programs are replaced behind their links, maps stay.
fn restarts() -> Result<()> {
    let mut scene = Scene::enforced()?;
    let before = links(scene.agent()?)?;
    let generation = |scene: &mut Scene| -> Result<Value> { Ok(scene.agent()?.status()?["revision"].clone()) };
    let revision = generation(&mut scene)?;
    scene.under_traffic(|scene| {
        for _ in 0..times(100) {
            let agent = scene.agent()?;
            agent.stop()?;
            agent.launch()?;
        }
        Ok(())
    })?;
    ensure!(before == links(scene.agent()?)?, "links changed");
    let now = generation(&mut scene)?;
    ensure!(now["number"] == revision["number"], "the same files became another revision: {revision} {now}");
    scene.as_the_policy_says()
}
