//! Workloads as people run them: from their first packet on under their own identity, or refused until it is known.

use crate::Test;
use crate::runtimes::{Podman, Scratch, cgroup_of, need};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use segfw::datapath::sys;
use segfw_common::CgroupEntry;
use segfw_tests::actor::Actor;
use segfw_tests::policy::{CGROUP, Yaml};
use segfw_tests::scene::{OPEN, PATIENCE, SHUT, Scene};
use segfw_tests::world::cgroup2_mount;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) fn tests() -> Vec<Test> {
    vec![("discovery/podman-from-the-first-packet", podman), ("discovery/1000-cgroups-in-a-minute", churn)]
}

/// Tries both ports over and over, and writes down what became of each try.
fn script(to: SocketAddr) -> String {
    let ip = to.ip();
    format!(
        "n=0; while [ $n -lt 3000 ]; do for p in {OPEN} {SHUT}; do \
         if busybox nc -w 1 {ip} $p </dev/null >/dev/null 2>&1; then echo $n $p ok; else echo $n $p no; fi; \
         done; n=$((n+1)); busybox sleep 0.02; done >> /tmp/log"
    )
}

/// Tries that are written in a container's log: (port, stood).
fn tries(log: &Path) -> Vec<(u16, bool)> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let line = |l: &str| {
        let mut words = l.split(' ').skip(1);
        Some((words.next()?.parse().ok()?, words.next()? == "ok"))
    };
    text.lines().filter_map(line).collect()
}

fn podman() -> Result<()> {
    need(&["podman", "runc", "conmon", "tar"])?;
    let mut yaml = Yaml::default();
    yaml.0 += "---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {name: web}\nspec:\n  match: [{container: {name: \"*-web\", image: \"*/sleeper:*\", runtime: podman}}]\n  labels: {app: web}\n";
    yaml.segment("web", "select: {app: web}", &[]).enforced("srv", &[]);
    yaml.allow("open", "web", "srv", &format!("tcp/{OPEN}"));
    let mut scene = Scene::with(&yaml.0)?;
    let scratch = Scratch::new()?;
    let podman = Podman(&scratch);
    podman.import()?;
    let network = format!("ns:/run/netns/{}", scene.world.netns("a"));
    let start = |name: &str, to: SocketAddr| -> Result<std::path::PathBuf> {
        let out = scratch.dir.join(name);
        std::fs::create_dir(&out)?;
        let volume = format!("{}:/tmp", out.display());
        let limits = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000"];
        let name = format!("{}-{name}", scratch.name);
        let args = [&["run", "--detach", "--name", &name, "--network", &network, "--volume", &volume], &limits[..]];
        let command = [IMAGE, "/bin/busybox", "sh", "-c", &script(to)];
        let _ = podman.run(&[&args.concat()[..], &command].concat())?;
        Ok(out.join("log"))
    };
    let stop = |name: &str| podman.run(&["rm", "--force", "--time", "0", &format!("{}-{name}", scratch.name)]);

    // Without segfw both ports answer.
    let log = start("free", scene.server(OPEN))?;
    wait(
        || Ok(tries(&log).contains(&(SHUT, true)) && tries(&log).contains(&(OPEN, true))),
        "both ports without segfw",
    )?;
    let _ = stop("free")?;

    // The whole tree: where Podman really makes its containers.
    let settings = scene.world.folder().join("agent.yaml");
    let storage = scratch.path("root");
    std::fs::write(&settings, format!("runtimes: {{cri: [], docker: [], storage: [\"{storage}\"]}}\n"))?;
    scene.start(&["--config".to_owned(), settings.display().to_string()])?;
    let agent = scene.agent()?;
    agent.stop()?;
    agent.use_root(cgroup2_mount()?);
    agent.launch()?;

    let log = start("a-web", scene.server(OPEN))?;
    wait(|| Ok(tries(&log).iter().filter(|t| **t == (OPEN, true)).count() > 5), "the allowed port")?;
    let seen = tries(&log);
    ensure!(!seen.contains(&(SHUT, true)), "a denied connection stood: {seen:?}");
    let early = seen.iter().position(|t| *t == (OPEN, true)).unwrap_or(0) / 2;
    println!("     allowed from its try number {early} on; of {} tries of the denied port none stood", seen.len() / 2);
    let workloads = scene.agent()?.workloads()?;
    let web = workloads.iter().find(|w| w["cgroup"].as_str().is_some_and(|c| c.contains("/libpod-")));
    let web = web.with_context(|| format!("not listed: {workloads:?}"))?;
    ensure!(web["labels"]["app"] == "web" && web["enforcement"] == "enforced", "{web}");

    // Nobody tells who it is while the agent is stopped: refused, not open.
    scene.agent()?.signal(Signal::SIGSTOP)?;
    let log = start("b-web", scene.server(OPEN))?;
    wait(|| Ok(tries(&log).len() > 20), "tries")?;
    let early = tries(&log);
    scene.agent()?.signal(Signal::SIGCONT)?;
    ensure!(early.iter().all(|(_, stood)| !stood), "a connection of a container that nobody knows stood: {early:?}");
    wait(|| Ok(tries(&log).contains(&(OPEN, true))), "the allowed port after the agent goes on")?;
    ensure!(!tries(&log).contains(&(SHUT, true)), "a denied connection stood");

    // One that no document names is no workload: its own business.
    let log = start("other", scene.server(OPEN))?;
    let name = format!("{}-other", scratch.name);
    let pid = podman.run(&["inspect", "--format", "{{.State.Pid}}", &name])?;
    let cgroup = cgroup_of(&pid)?.display().to_string();
    wait(
        || {
            let all = scene.agent()?.workloads()?;
            Ok(!tries(&log).is_empty() && !all.iter().any(|w| w["cgroup"] == cgroup.as_str()))
        },
        "a container without a document is nobody",
    )?;
    // srv admits web only.
    ensure!(!tries(&log).contains(&(OPEN, true)), "a container without labels came in");
    for name in ["a-web", "b-web", "other"] {
        let _ = stop(name)?;
    }
    wait(
        || Ok(scene.agent()?.workloads()?.iter().all(|w| w["labels"]["app"] != "web")),
        "gone containers are forgotten",
    )
}

/// As in `runtimes`.
const IMAGE: &str = "localhost/segfw-test/sleeper:1.0";

fn wait(mut so: impl FnMut() -> Result<bool>, what: &str) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    while !so()? {
        ensure!(Instant::now() < end, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// What a busy node does: no stale entry, no wrong identity.
fn churn() -> Result<()> {
    let mut yaml = Yaml::default();
    yaml.0 += &format!(
        "---\napiVersion: segfw.dev/v1\nkind: Workload\nmetadata: {{name: pod}}\nspec:\n  match: [{{cgroup: \"{CGROUP}/pods/*\"}}]\n  labels: {{app: pod}}\n"
    );
    yaml.segment("pod", "select: {app: pod}", &[]).enforced("srv", &[]).enforced("cli", &[]);
    yaml.allow("open", "pod", "srv", &format!("tcp/{OPEN}"));
    yaml.allow("own", "cli", "srv", &format!("tcp/{OPEN}"));
    let mut scene = Scene::with(&yaml.0)?;
    let _ = scene.world.cgroup("managed/pods")?;
    scene.start(&[])?;
    scene.as_the_policy_says()?;
    let entries = |scene: &mut Scene| -> Result<u64> {
        let status = scene.agent()?.status()?;
        let maps = status["maps"].as_array().context("maps")?;
        maps.iter().find(|m| m["name"] == "CGROUPS").and_then(|m| m["entries"].as_u64()).context("CGROUPS")
    };
    let before = entries(&mut scene)?;
    let begun = Instant::now();
    let mut late = Duration::ZERO;
    for n in 0..1000 {
        let path = scene.world.managed().join(format!("pods/p{n}"));
        std::fs::create_dir(&path)?;
        if n % 25 == 0 {
            let mut pod = Actor::spawn(&scene.world, "pod", &format!("managed/pods/p{n}"), "a")?;
            let start = Instant::now();
            let mut connects = |port: u16| -> Result<bool> {
                let to = scene.server(port);
                let h = pod.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?.map_err(|e| anyhow::anyhow!(e))?;
                let stood = pod.connect(h, to, PATIENCE)?.is_ok();
                pod.close(h)?;
                Ok(stood)
            };
            loop {
                ensure!(!connects(SHUT)?, "pod {n} was let through to a denied port");
                if connects(OPEN)? {
                    break;
                }
                ensure!(start.elapsed() < Duration::from_secs(5), "pod {n} is still not known");
            }
            late = late.max(start.elapsed());
        }
        // A thousand in a minute, not in a second: each lives long enough to be seen, and some shorter.
        std::thread::sleep(Duration::from_millis(n % 40));
        wait(|| Ok(std::fs::remove_dir(&path).is_ok()), "an empty cgroup can be removed")?;
    }
    let took = begun.elapsed();
    println!(
        "     1,000 cgroups in {:.1} s; the slowest of 40 was known after {} ms",
        took.as_secs_f32(),
        late.as_millis()
    );
    ensure!(took < Duration::from_secs(60), "1,000 cgroups took {took:?}");
    // Two surveys, for those that the kernel entered and we never saw.
    let _ = scene.eventually("no stale entry", Duration::from_secs(40), |scene| Ok(entries(scene)? == before))?;
    let status = scene.agent()?.status()?;
    ensure!(status["state"] == "ENFORCING", "{}", status["reasons"]);
    // What the hooks enter by themselves is no tampering.
    ensure!(status["repairs"] == serde_json::json!([]), "{}", status["repairs"]);
    let pin = segfw::datapath::load::layout_dir(scene.world.pins(), segfw_common::ABI_VERSION).join("CGROUPS");
    let map = sys::get(&pin)?.context("CGROUPS")?;
    let _ = scene.eventually("the kernel has no stale entry", Duration::from_secs(40), |_| {
        let all: Vec<(u64, CgroupEntry)> = sys::map_dump(map.as_fd(), 1024)?;
        Ok(all.len() as u64 == before)
    })?;
    scene.as_the_policy_says()
}
