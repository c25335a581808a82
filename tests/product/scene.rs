//! Two services, one policy: `cli` may reach `srv` on [`OPEN`], and nothing else. What the tests here have in common.

use anyhow::{Context, Result, ensure};
use segfw_tests::actor::Actor;
use segfw_tests::agent::Agent;
use segfw_tests::policy::{CGROUP, Yaml};
use segfw_tests::proto::Cmd;
use segfw_tests::world::{World, net};
use serde_json::Value;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Allowed.
pub(crate) const OPEN: u16 = 8080;
/// Refused.
pub(crate) const SHUT: u16 = 8081;

/// In the order in which they must end.
pub(crate) struct Scene {
    pub(crate) agent: Agent,
    pub(crate) cli: Actor,
    _srv: Actor,
    pub(crate) world: World,
}

impl Scene {
    /// `settings`: text of an `agent.yaml`; `extra`: more words for the command line.
    pub(crate) fn new(settings: &str, extra: &[String]) -> Result<Self> {
        let world = World::new(&[net("a"), net("b")])?;
        let cli = Actor::spawn(&world, "cli", "managed/cli", "a")?;
        let mut srv = Actor::spawn(&world, "srv", "managed/srv", "b")?;
        let mut policy = Yaml::default();
        policy.enforced("cli", &[]).enforced("srv", &[]).allow("cli-to-srv", "cli", "srv", &format!("tcp/{OPEN}"));
        let policy = policy.0.replace(CGROUP, &world.managed_path());
        for port in [OPEN, SHUT] {
            let h = srv.listen_tcp(SocketAddr::new(world.v4("b").into(), port))?;
            srv.must(&Cmd::Serve { h })?;
        }
        let path = world.folder().join("agent.yaml");
        std::fs::write(&path, settings.replace("@FOLDER@", &world.folder().display().to_string()))?;
        let mut args = vec!["--config".to_owned(), path.display().to_string()];
        args.extend_from_slice(extra);
        let agent = Agent::start(&world, &policy, &args)?;
        Ok(Self { agent, cli, _srv: srv, world })
    }

    /// Where flow records are, for settings with `dir: @FOLDER@/flows`.
    pub(crate) fn flows_dir(&self) -> PathBuf {
        self.world.folder().join("flows")
    }

    /// Connects `times` times; every one must end as it should.
    pub(crate) fn connect(&mut self, port: u16, times: usize) -> Result<()> {
        let to = SocketAddr::new(self.world.v4("b").into(), port);
        for _ in 0..times {
            let h = self.cli.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
            let tried = self.cli.connect(h, to, 2000)?;
            self.cli.close(h)?;
            ensure!(tried.is_ok() == (port == OPEN), "to port {port}: {tried:?}");
        }
        Ok(())
    }

    /// `segfw flows` with these words, as JSON.
    pub(crate) fn flows(&self, words: &[&str]) -> Result<Vec<Value>> {
        let output = self.agent.cli(&[&["flows", "-o", "json"], words].concat())?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout)?;
        text.lines().map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
    }

    /// A named counter of the status.
    pub(crate) fn counter(&self, name: &str) -> Result<u64> {
        let status = self.agent.status()?;
        status["counters"]["named"][name].as_u64().with_context(|| format!("no counter {name}"))
    }
}

/// A port of this machine that nobody has at the moment.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Asks until it is so.
pub(crate) fn until<T>(what: &str, seconds: u64, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        let asked = ask();
        match asked {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > end => anyhow::bail!("after {seconds} s still not: {what}"),
            Err(e) if Instant::now() > end => return Err(e.context(format!("after {seconds} s: {what}"))),
            Ok(None) | Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
