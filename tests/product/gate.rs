//! Gate conn and the list of address families, by themselves and in turn with the hook per packet. They need programs at
//! the kernel's security checks: where the kernel takes none (as on the development machines) these tests are skipped, and
//! `cargo xtask vm` runs them on the kernels that do.

use super::{Test, skip};
use anyhow::{Context, Result, bail, ensure};
use segfw_tests::agent::Agent;
use segfw_tests::policy::Yaml;
use segfw_tests::proto::Cmd;
use segfw_tests::scene::{OPEN, PATIENCE, Scene};
use serde_json::Value;
use std::time::Duration;

/// The guard looks every 2 to 8 s; in an emulated guest all takes its time.
const SOON: Duration = Duration::from_secs(40);

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("gate/conn-alone", conn_alone),
        ("gate/conn-beside-packets", beside_packets),
        ("gate/revocation", revocation),
        ("gate/older-listener", older_listener),
        ("gate/hidden-namespace", hidden_namespace),
        ("gate/without-an-agent", without_an_agent),
        ("gate/tampered", tampered),
        ("gate/families", families),
        ("gate/skb-by-settings", skb_by_settings),
        ("gate/tcp-sockets-only", tcp_sockets_only),
    ]
}

/// As the scene's, for segments that have TCP sockets alone.
fn tcp_only() -> Yaml {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &["sockets: tcp"]).enforced("srv", &["sockets: tcp"]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{OPEN}"));
    yaml
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Names of the hooks that are attached.
fn hooks(agent: &Agent) -> Result<Vec<String>> {
    let status = agent.status()?;
    let hooks = status["hooks"].as_array().context("hooks in the status")?;
    Ok(hooks.iter().filter(|h| h["attached"] == true).map(|h| text(&h["name"]).to_owned()).collect())
}

/// True once nothing is attached per packet and gate conn stands.
fn is_conn_alone(scene: &mut Scene) -> Result<bool> {
    let agent = scene.agent()?;
    Ok(agent.status()?["gate"]["name"] == "conn" && !hooks(agent)?.iter().any(|h| h == "skb_ingress"))
}

/// An agent whose kernel has gate conn. `None` = it has none.
fn with_conn(policy: &Yaml) -> Result<Option<Scene>> {
    let mut scene = Scene::with(&policy.0)?;
    scene.start(&[])?;
    let status = scene.agent()?.status()?;
    println!("fact gate {} ({})", text(&status["gate"]["name"]), door(&status["gate"]));
    println!("fact families {} ({})", text(&status["families"]["name"]), door(&status["families"]));
    Ok((status["gate"]["name"] == "conn").then_some(scene))
}

/// `lsm`, `fmod_ret`, or why neither.
fn door(gate: &Value) -> &str {
    let why = text(&gate["why"]);
    ["lsm", "fmod_ret"].into_iter().find(|door| why.contains(&format!(" by {door}"))).unwrap_or(why)
}

/// The same, where nothing is attached per packet.
fn alone() -> Result<Option<Scene>> {
    let Some(mut scene) = with_conn(&tcp_only())? else { return Ok(None) };
    let _ = scene.eventually("nothing is attached per packet", SOON, is_conn_alone)?;
    Ok(Some(scene))
}

/// Where the kernel takes no programs at its security checks. Every kernel of the matrix takes them.
fn none() -> Result<()> {
    const WHY: &str = "this kernel takes no programs at its security checks";
    if std::env::var_os("SEGFW_VM").is_some() {
        bail!("in a guest: {WHY}");
    }
    skip(WHY)
}

/// A connection of the client that stays open.
fn connect(scene: &mut Scene) -> Result<u32> {
    let to = scene.server(OPEN);
    let h = scene.cli.must(&Cmd::Socket { domain: libc::AF_INET, kind: libc::SOCK_STREAM, proto: 0 })?.h;
    scene.cli.connect(h, to, PATIENCE)?.map_err(|e| anyhow::anyhow!("the allowed connection: {e}"))?;
    Ok(h)
}

/// Does the server answer on it?
fn talks(scene: &mut Scene, h: u32) -> Result<bool> {
    Ok(scene.cli.send(h, "hello")?.is_ok() && scene.cli.recv(h, PATIENCE)?.is_ok_and(|echo| echo.data == "hello"))
}

fn conn_alone() -> Result<()> {
    let Some(mut scene) = alone()? else { return none() };
    scene.as_the_policy_says()?;
    let h = connect(&mut scene)?;
    ensure!(talks(&mut scene, h)?, "no answer on an allowed connection");
    let flows = scene.agent()?.cli(&["flows", "-o", "json", "--verdict", "denied"])?;
    let flows = String::from_utf8_lossy(&flows.stdout).into_owned();
    ensure!(flows.contains("\"hook\":\"inet_conn_request\""), "no denial by gate conn is on record: {flows}");
    // The kernel's own word on what is attached per packet.
    let pins: Vec<_> =
        std::fs::read_dir(scene.agent()?.pins())?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    let links = pins.iter().flat_map(std::fs::read_dir).flatten().flatten().map(|e| e.file_name());
    let links: Vec<String> = links.map(|n| n.to_string_lossy().into_owned()).collect();
    ensure!(links.iter().any(|l| l == "link-conn_request"), "gate conn is not pinned: {links:?}");
    ensure!(!links.iter().any(|l| l.contains("skb")), "a hook per packet is pinned: {links:?}");
    Ok(())
}

/// Segments that may have UDP: the hook per packet is there, and TCP is gate conn's all the same.
fn beside_packets() -> Result<()> {
    let Some(mut scene) = with_conn(&segfw_tests::scene::policy())? else { return none() };
    let _ = scene.eventually("TCP is left to gate conn", SOON, |scene| {
        Ok(text(&scene.agent()?.status()?["gate"]["why"]).contains("all but TCP"))
    })?;
    ensure!(hooks(scene.agent()?)?.iter().any(|h| h == "skb_ingress"), "UDP has no gate");
    scene.as_the_policy_says()?;
    let flows = scene.agent()?.cli(&["flows", "-o", "json", "--verdict", "denied"])?;
    ensure!(String::from_utf8_lossy(&flows.stdout).contains("\"hook\":\"inet_conn_request\""), "gate skb refused it");
    Ok(())
}

/// What is revoked ends, and what is not goes on, though nothing is attached per packet.
fn revocation() -> Result<()> {
    let Some(mut scene) = alone()? else { return none() };
    let h = connect(&mut scene)?;
    ensure!(talks(&mut scene, h)?, "no answer on an allowed connection");
    let allowed = scene.policy.clone();
    let mut other = Yaml(allowed.clone());
    other.allow("more", "cli", "srv", "tcp/6000");
    scene.agent()?.reload(&other.0)?;
    ensure!(talks(&mut scene, h)?, "what old and new policy allow was cut");
    scene.agent()?.reload(&allowed.replace(&format!("tcp/{OPEN}"), "tcp/6000"))?;
    let _ = scene.eventually("the revoked connection ends", SOON, |scene| Ok(!talks(scene, h)?))?;
    ensure!(!scene.connects(OPEN)?, "a revoked port was connected");
    scene.agent()?.reload(&allowed)?;
    scene.as_the_policy_says()?;
    let _ = scene.eventually("nothing is attached per packet again", SOON, is_conn_alone)?;
    Ok(())
}

/// The scene's listeners are older than the agent: gate conn must know them by name before it judges.
fn older_listener() -> Result<()> {
    let Some(mut scene) = alone()? else { return none() };
    scene.as_the_policy_says()?;
    let unknown = |scene: &mut Scene| -> Result<u64> {
        scene.agent()?.status()?["counters"]["named"]["listener-unknown"].as_u64().context("no counter")
    };
    // SYNs of others on this machine may be for listeners that are none of ours: counted, and let pass.
    let before = unknown(&mut scene)?;
    scene.as_the_policy_says()?;
    println!("SYNs for unknown listeners: {before}, then {}", unknown(&mut scene)?);
    Ok(())
}

/// Somebody listens in a namespace that no process is in and no mount holds: no sweep would end what is accepted there, so
/// packets are judged for as long as it is so.
fn hidden_namespace() -> Result<()> {
    let Some(mut scene) = alone()? else { return none() };
    let _ = scene.cli.must(&Cmd::Unshare)?;
    let h = scene.cli.listen_tcp("127.0.0.1:7000".parse()?)?;
    let _ = scene.cli.must(&Cmd::Enter { netns: scene.world.netns("a") })?;
    let judged = |scene: &mut Scene| Ok(hooks(scene.agent()?)?.iter().any(|hook| hook == "skb_ingress"));
    let _ = scene.eventually("packets are judged", SOON, judged)?;
    scene.cli.close(h)?;
    let _ = scene.eventually("nothing is attached per packet", SOON, is_conn_alone)?;
    scene.as_the_policy_says()
}

/// Killed, and started again: the gate is the kernel's.
fn without_an_agent() -> Result<()> {
    let Some(mut scene) = alone()? else { return none() };
    let h = connect(&mut scene)?;
    scene.agent()?.kill()?;
    scene.as_the_policy_says()?;
    ensure!(talks(&mut scene, h)?, "the open connection broke");
    scene.agent()?.launch()?;
    ensure!(talks(&mut scene, h)?, "the open connection broke as the agent came back");
    let _ = scene.eventually("nothing is attached per packet again", SOON, is_conn_alone)?;
    scene.as_the_policy_says()
}

/// A pin of a security check is removed: the other gate judges until it is back.
fn tampered() -> Result<()> {
    let Some(mut scene) = alone()? else { return none() };
    for check in ["conn_request", "socket_family"] {
        let folder = std::fs::read_dir(scene.agent()?.pins())?.next().context("no layout is pinned")??.path();
        std::fs::remove_file(folder.join(format!("link-{check}")))?;
        let _ = scene.eventually(&format!("{check} is put back"), SOON, |scene| {
            let status = scene.agent()?.status()?;
            let repairs = status["repairs"].as_array().cloned().unwrap_or_default();
            Ok(repairs.iter().any(|r| text(&r["what"]).contains(check) && r["left"].is_null()))
        })?;
        ensure!(folder.join(format!("link-{check}")).exists(), "{check} is not pinned");
    }
    let _ = scene.eventually("nothing is attached per packet again", SOON, is_conn_alone)?;
    scene.as_the_policy_says()
}

/// Packet sockets and others: everybody's without a policy, nobody's that is enforced, unless granted.
fn families() -> Result<()> {
    const PACKET: Cmd = Cmd::Socket { domain: libc::AF_PACKET, kind: libc::SOCK_RAW, proto: 0 };
    const NETLINK: Cmd = Cmd::Socket { domain: libc::AF_NETLINK, kind: libc::SOCK_RAW, proto: 0 };
    const LOCAL: Cmd = Cmd::Socket { domain: libc::AF_UNIX, kind: libc::SOCK_STREAM, proto: 0 };
    let mut policy = Yaml::default();
    policy.enforced("cli", &[]).enforced("srv", &["grants: [packet]"]);
    policy.allow("open", "cli", "srv", &format!("tcp/{OPEN}"));
    let mut scene = Scene::with(&policy.0)?;
    let _ = scene.cli.must(&PACKET).context("without segfw")?;
    scene.start(&[])?;
    if scene.agent()?.status()?["families"]["name"] != "listed" {
        return none();
    }
    let refused = scene.cli.ask(&PACKET)?;
    ensure!(!refused.ok && refused.errno == "EPERM", "cli: {refused:?}");
    let _ = scene.srv.must(&PACKET).context("granted")?;
    let _ = scene.ext.must(&PACKET).context("in no segment")?;
    for usual in [NETLINK, LOCAL] {
        let _ = scene.cli.must(&usual).context("a family that everybody may use")?;
    }
    let flows = scene.agent()?.cli(&["flows", "-o", "json", "--verdict", "denied"])?;
    let flows = String::from_utf8_lossy(&flows.stdout).into_owned();
    ensure!(flows.contains("\"family\":\"packet\""), "the refusal is not on record: {flows}");
    Ok(())
}

/// On every kernel.
fn skb_by_settings() -> Result<()> {
    let mut scene = Scene::with(&tcp_only().0)?;
    scene.start(&["--gate".to_owned(), "skb".to_owned()])?;
    let status = scene.agent()?.status()?;
    ensure!(status["gate"]["name"] == "skb", "{}", status["gate"]);
    ensure!(hooks(scene.agent()?)?.iter().any(|h| h == "skb_ingress"), "{}", status["hooks"]);
    scene.as_the_policy_says()
}

/// On every kernel, with either gate: a segment of TCP sockets alone makes no others, its neighbour does.
fn tcp_sockets_only() -> Result<()> {
    const UDP: Cmd = Cmd::Socket { domain: libc::AF_INET, kind: libc::SOCK_DGRAM, proto: 0 };
    let mut policy = Yaml::default();
    policy.enforced("cli", &["sockets: tcp"]).enforced("srv", &[]);
    policy.allow("open", "cli", "srv", &format!("tcp/{OPEN}"));
    let mut scene = Scene::with(&policy.0)?;
    let _ = scene.cli.must(&UDP).context("without segfw")?;
    scene.start(&[])?;
    let refused = scene.cli.ask(&UDP)?;
    ensure!(!refused.ok && refused.errno == "EPERM", "cli: {refused:?}");
    let _ = scene.srv.must(&UDP).context("the neighbour")?;
    scene.as_the_policy_says()
}
