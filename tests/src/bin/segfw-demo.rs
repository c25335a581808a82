//! `cargo xtask demo`: three services, one policy, and what becomes of their connections. About ten seconds.
#![allow(clippy::print_stdout, reason = "the demo is what it prints")]

use anyhow::{Context, Result, bail};
use segfw_tests::actor::{Actor, Handle};
use segfw_tests::agent::{Agent, mentions};
use segfw_tests::world::{World, clean_up_on_signals, net, sweep_stale};
use serde_json::Value;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

const RULE: &str = "api-to-db";

fn main() -> Result<()> {
    clean_up_on_signals()?;
    sweep_stale();
    if std::env::args().any(|a| a == "--sweep") {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("the demo makes network namespaces and loads eBPF programs: run it as root");
    }
    Demo::new()?.play()
}

/// Words in colour, on a terminal that wants it.
struct Paint(bool);

impl Paint {
    fn new() -> Self {
        Self(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    }

    fn wear(&self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

struct Demo {
    paint: Paint,
    web: Actor,
    api: Actor,
    db: Actor,
    // Last: it goes when the actors have gone.
    world: World,
}

impl Demo {
    fn new() -> Result<Self> {
        let world = World::new(&[net("web"), net("api"), net("db")])?;
        let actor = |name: &str| Actor::spawn(&world, name, &format!("managed/{name}"), name);
        Ok(Self { paint: Paint::new(), web: actor("web")?, api: actor("api")?, db: actor("db")?, world })
    }

    fn play(mut self) -> Result<()> {
        let start = Instant::now();
        let api = SocketAddr::new(self.world.v4("api").into(), 8080);
        let db = SocketAddr::new(self.world.v4("db").into(), 5432);
        self.title("1. Three services, each a process in its own cgroup and network namespace");
        let (api_waits, db_waits) = (self.api.listen_tcp(api)?, self.db.listen_tcp(db)?);
        println!("   web  pid {:<7} {}", self.web.pid(), self.world.v4("web"));
        println!("   api  pid {:<7} {api}", self.api.pid());
        println!("   db   pid {:<7} {db}", self.db.pid());

        self.title("2. Without segfw everybody reaches everybody");
        for (from, to, addr) in [("web", "api", api), ("api", "db", db), ("web", "db", db)] {
            self.show(None, from, to, addr)?;
        }
        self.drain(api_waits, db_waits)?;

        self.title("3. The policy, in policies/demo/: web -> api tcp/8080, api -> db tcp/5432, nothing else");
        let policy = policy()?;
        let before = Instant::now();
        let mut agent = Agent::start(&self.world, &policy, &[])?;
        println!("   agent started; enforcing after {} ms", before.elapsed().as_millis());

        self.title("4. The same connections, and the rule that decided each");
        for (from, to, addr) in [("web", "api", api), ("api", "db", db), ("web", "db", db)] {
            self.show(Some(&agent), from, to, addr)?;
        }
        let back = SocketAddr::new(api.ip(), 22);
        self.show(Some(&agent), "db", "api", back)?;
        self.drain(api_waits, db_waits)?;

        self.title("5. An open connection from api to db, and a policy that no longer allows it");
        let h = self.api.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
        self.api.connect(h, db, 2000)?.map_err(anyhow::Error::msg).context("api -> db")?;
        let peer = self.db.accept(db_waits, 2000)?.map_err(anyhow::Error::msg)?;
        println!("   api asks, db answers: {}", self.query(h, peer)?);
        println!("   now the rule {RULE} is taken out of the policy, while the connection is open ...");
        let before = Instant::now();
        agent.reload(&without(&policy)?)?;
        println!("   the new revision is in force after {} ms", before.elapsed().as_millis());
        self.show_cut(h, before)?;
        self.show(Some(&agent), "api", "db", db)?;

        self.title("6. Cleaning up");
        agent.stop()?;
        drop(agent);
        drop(self);
        println!(
            "   processes, namespaces, cgroups and eBPF programs are gone ({:.1} s in all)",
            start.elapsed().as_secs_f32()
        );
        Ok(())
    }

    fn title(&self, text: &str) {
        println!("\n{}", self.paint.wear("1", text));
    }

    fn actor(&mut self, name: &str) -> &mut Actor {
        match name {
            "web" => &mut self.web,
            "api" => &mut self.api,
            _ => &mut self.db,
        }
    }

    /// Tries a connection and says what came of it, and why.
    fn show(&mut self, agent: Option<&Agent>, from: &str, to: &str, addr: SocketAddr) -> Result<()> {
        let actor = self.actor(from);
        let h = actor.socket(libc::AF_INET, libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
        let before = Instant::now();
        let tried = actor.connect(h, addr, 1500)?;
        let took = before.elapsed();
        actor.close(h)?;
        let verdict = match &tried {
            Ok(()) => self.paint.wear("32", "ALLOWED"),
            Err(_) => self.paint.wear("31", "DENIED "),
        };
        let felt = match &tried {
            Ok(()) => "connected".to_owned(),
            Err(errno) => format!("{errno} after {:.1} ms", took.as_secs_f32() * 1000.0),
        };
        let why = agent.map_or(String::new(), |agent| {
            format!("  {}", why(agent, addr.port(), if tried.is_ok() { "ALLOWED" } else { "DENIED" }))
        });
        println!("   {from:>3} -> {to:<3} tcp/{:<5} {verdict}  {felt:<24}{why}", addr.port());
        Ok(())
    }

    /// Takes what waits to be accepted, so that later connections are the next in line.
    fn drain(&mut self, api: Handle, db: Handle) -> Result<()> {
        while let Ok(h) = self.api.accept(api, 20)? {
            self.api.close(h)?;
        }
        while let Ok(h) = self.db.accept(db, 20)? {
            self.db.close(h)?;
        }
        Ok(())
    }

    fn query(&mut self, h: Handle, peer: Handle) -> Result<String> {
        let told = anyhow::Error::msg;
        self.api.send(h, "SELECT 1")?.map_err(told)?;
        let asked = self.db.recv(peer, 2000)?.map_err(told)?.data;
        self.db.send(peer, "1 row")?.map_err(told)?;
        let answer = self.api.recv(h, 2000)?.map_err(told)?.data;
        Ok(format!("{asked} -> {answer}"))
    }

    fn show_cut(&mut self, h: Handle, since: Instant) -> Result<()> {
        let got = self.api.recv(h, 3000)?;
        let ms = since.elapsed().as_millis();
        match got {
            Err(errno) if errno != "ETIMEDOUT" => {
                let cut = self.paint.wear("33", "CUT");
                println!("   {cut}: the open connection ended with {errno}, {ms} ms after the change");
            }
            other => bail!("the open connection was not cut: {other:?}"),
        }
        Ok(())
    }
}

/// The files of policies/demo as one text.
fn policy() -> Result<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies/demo");
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .with_context(|| folder.display().to_string())?
        .map(|e| e.map(|e| e.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    let texts = files.iter().map(std::fs::read_to_string).collect::<Result<Vec<_>, _>>()?;
    Ok(texts.join("---\n"))
}

/// The same without the rule for the database.
fn without(policy: &str) -> Result<String> {
    let (before, _) = policy.split_once(&format!("    - name: {RULE}")).context("the demo's policy has changed")?;
    Ok(before.to_owned())
}

/// What the flow log says about the newest connection to this port. Records come a moment after the fact.
fn why(agent: &Agent, port: u16, verdict: &str) -> String {
    let port = port.to_string();
    let end = Instant::now() + Duration::from_secs(2);
    loop {
        let records = agent.flows().unwrap_or_default();
        let found = records.iter().rev().find(|r| mentions(r, &port) && mentions(r, verdict));
        if let Some(record) = found {
            return match (field(record, "rule"), field(record, "reason")) {
                (Some(rule), _) => format!("rule {rule}"),
                (None, Some(reason)) => reason,
                (None, None) => record.to_string(),
            };
        }
        if Instant::now() > end {
            return "(no flow record)".to_owned();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The first text of that name, wherever it is.
fn field(record: &Value, name: &str) -> Option<String> {
    match record {
        Value::Object(map) => match map.get(name) {
            Some(Value::String(text)) if !text.is_empty() => Some(text.clone()),
            Some(Value::Object(inner)) => inner.get("name").and_then(Value::as_str).map(str::to_owned),
            _ => map.values().find_map(|v| field(v, name)),
        },
        Value::Array(list) => list.iter().find_map(|v| field(v, name)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}
