//! A world that most tests of the agent share: a client, a server and a stranger, one policy, and traffic.
//!
//! `cli` (managed, in `a`) may open tcp/5000 of `srv` (managed, in `b`) and nothing else; `ext` (without an agent, in `c`)
//! may open nothing.

use crate::actor::{Actor, domain_of};
use crate::agent::Agent;
use crate::policy::{CGROUP, Yaml};
use crate::proto::{Cmd, Tally};
use crate::world::{World, net};
use anyhow::{Context, Result, bail, ensure};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// May be opened by `cli`.
pub const OPEN: u16 = 5000;
/// May not be opened by anybody.
pub const SHUT: u16 = 5001;
/// How long an attempt may take, in milliseconds.
pub const PATIENCE: u64 = 700;

/// See the module. Fields end in this order: processes before the world.
#[derive(Debug)]
pub struct Scene {
    /// The real agent; `None` = not started yet.
    pub agent: Option<Agent>,
    /// In `managed/cli`.
    pub cli: Actor,
    /// In `managed/srv`.
    pub srv: Actor,
    /// In `outside/ext`.
    pub ext: Actor,
    /// Cgroups, namespaces, folders.
    pub world: World,
    /// What the agent is told.
    pub policy: String,
}

/// The policy of the module's head; `@CGROUP@` stands for the managed path.
pub fn policy() -> Yaml {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).enforced("srv", &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{OPEN}"));
    yaml
}

impl Scene {
    /// Without an agent.
    pub fn new() -> Result<Self> {
        Self::with(&policy().0)
    }

    /// Without an agent, for another policy.
    pub fn with(policy: &str) -> Result<Self> {
        let world = World::new(&[net("a"), net("b"), net("c")])?;
        let cli = Actor::spawn(&world, "cli", "managed/cli", "a")?;
        let mut srv = Actor::spawn(&world, "srv", "managed/srv", "b")?;
        let ext = Actor::spawn(&world, "ext", "outside/ext", "c")?;
        for port in [OPEN, SHUT] {
            let listener = srv.listen_tcp(SocketAddr::new(IpAddr::V4(world.v4("b")), port))?;
            let _ = srv.must(&Cmd::Serve { h: listener })?;
        }
        let policy = policy.replace(CGROUP, &world.managed_path());
        let mut scene = Self { agent: None, cli, srv, ext, world, policy };
        // Without segfw everything goes: what is refused later is refused by it.
        for port in [OPEN, SHUT] {
            let (own, foreign) = (scene.connects(port)?, scene.stranger_connects(port)?);
            ensure!(own && foreign, "tcp/{port} does not work without segfw: {own}, {foreign}");
        }
        Ok(scene)
    }

    /// With an agent that enforces.
    pub fn enforced() -> Result<Self> {
        let mut scene = Self::new()?;
        scene.start(&[])?;
        Ok(scene)
    }

    /// Starts the agent.
    pub fn start(&mut self, extra: &[String]) -> Result<()> {
        self.agent = Some(Agent::start(&self.world, &self.policy, extra)?);
        Ok(())
    }

    /// The agent.
    pub fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().context("the scene has no agent")
    }

    /// The server's address.
    pub fn server(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.world.v4("b")), port)
    }

    /// Does a fresh connection of the client stand?
    pub fn connects(&mut self, port: u16) -> Result<bool> {
        let to = self.server(port);
        fresh(&mut self.cli, to)
    }

    /// The same for the stranger.
    pub fn stranger_connects(&mut self, port: u16) -> Result<bool> {
        let to = self.server(port);
        fresh(&mut self.ext, to)
    }

    /// The policy as it should be: the client's one port, nothing else.
    pub fn as_the_policy_says(&mut self) -> Result<()> {
        let now = (self.connects(OPEN)?, self.connects(SHUT)?, self.stranger_connects(OPEN)?);
        ensure!(now == (true, false, false), "allowed, denied, denied became {now:?}");
        Ok(())
    }

    /// `work` while an open connection talks without a pause and both clients try what is denied; then looks at what became
    /// of them.
    pub fn under_traffic(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<Tally> {
        let (open, shut) = (self.server(OPEN), self.server(SHUT));
        let h = self.cli.must(&Cmd::Socket { domain: domain_of(open.ip()), kind: libc::SOCK_STREAM, proto: 0 })?.h;
        if let Err(errno) = self.cli.connect(h, open, PATIENCE)? {
            bail!("the allowed connection: {errno}");
        }
        let _ = self.cli.must(&Cmd::Chat { h })?;
        let _ = self.cli.must(&Cmd::Retry { addr: shut.to_string() })?;
        let _ = self.ext.must(&Cmd::Retry { addr: open.to_string() })?;
        let worked = work(self);
        let tally = |actor: &mut Actor| -> Result<Tally> { Ok(serde_json::from_str(&actor.must(&Cmd::Tally)?.data)?) };
        let (own, foreign) = (tally(&mut self.cli)?, tally(&mut self.ext)?);
        let _ = self.cli.ask(&Cmd::CloseAll)?;
        let _ = self.ext.ask(&Cmd::CloseAll)?;
        worked?;
        ensure!(own.broken.is_empty(), "the allowed connection broke: {own:?}");
        ensure!(own.stood == 0 && foreign.stood == 0, "a denied connection stood: {own:?}, {foreign:?}");
        ensure!(own.answered > 50 && own.tried > 20 && foreign.tried > 1, "hardly any traffic: {own:?}, {foreign:?}");
        Ok(own)
    }

    /// Asks until it is so.
    pub fn eventually(
        &mut self,
        what: &str,
        within: Duration,
        mut so: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < within {
            if so(self)? {
                return Ok(begun.elapsed());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("not within {within:?}: {what}; status {}", self.agent()?.status().unwrap_or_default())
    }
}

fn fresh(actor: &mut Actor, to: SocketAddr) -> Result<bool> {
    let h = actor.must(&Cmd::Socket { domain: domain_of(to.ip()), kind: libc::SOCK_STREAM, proto: 0 })?.h;
    let stood = actor.connect(h, to, PATIENCE)?.is_ok();
    actor.close(h)?;
    Ok(stood)
}
