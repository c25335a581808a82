//! The real agent, started as an administrator would, and asked through its own command line.

use crate::world::{World, making, with_signals};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The gate that every agent of this run must judge inbound TCP with; none = the one it chooses.
static GATE: OnceLock<String> = OnceLock::new();

/// Every agent is told this gate (`skb`, `conn`), and it is an error if it has another. To be called once, before the first.
pub fn demand_gate(name: String) {
    let _ = GATE.set(name);
}

/// How long a revision may take until it is enforced.
const READY: Duration = Duration::from_secs(20);

/// A running agent of one world. Dropping it kills it; what it pinned stays until the world ends.
#[derive(Debug)]
pub struct Agent {
    child: Option<Child>,
    folder: PathBuf,
    pins: PathBuf,
    cgroup_root: PathBuf,
    own_cgroup: PathBuf,
    extra: Vec<String>,
    binary: &'static str,
    /// What the names of the world's namespaces begin with.
    prefix: String,
    /// How long the last [`Self::reload`] took.
    reloaded: Duration,
}

impl Agent {
    fn namespace(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Writes `policy`, starts the agent and waits until it enforces.
    pub fn start(world: &World, policy: &str, extra: &[String]) -> Result<Self> {
        let mut agent = Self::prepare(world, policy, extra)?;
        agent.launch()?;
        Ok(agent)
    }

    /// Writes `policy`; nothing is started yet.
    pub fn prepare(world: &World, policy: &str, extra: &[String]) -> Result<Self> {
        let agent = Self {
            child: None,
            folder: world.folder().to_owned(),
            pins: world.pins().to_owned(),
            cgroup_root: world.managed(),
            own_cgroup: world.cgroup("agent")?,
            extra: extra.to_vec(),
            binary: "segfw",
            prefix: world.netns(""),
            reloaded: Duration::ZERO,
        };
        fs::create_dir_all(agent.folder.join("policy"))?;
        fs::create_dir_all(agent.folder.join("state"))?;
        agent.write(policy)?;
        Ok(agent)
    }

    /// From the next start on another build.
    pub fn use_binary(&mut self, name: &'static str) {
        self.binary = name;
    }

    /// From the next start on other options.
    pub fn use_options(&mut self, extra: &[String]) {
        self.extra = extra.to_vec();
    }

    /// From the next start on for another part of the tree.
    pub fn use_root(&mut self, root: PathBuf) {
        self.cgroup_root = root;
    }

    /// From the next start on in another cgroup: below the managed one, where its own hooks see it.
    pub fn use_cgroup(&mut self, cgroup: PathBuf) {
        self.own_cgroup = cgroup;
    }

    /// Starts the process; also after [`Self::kill`] or [`Self::stop`].
    pub fn launch(&mut self) -> Result<()> {
        self.spawn()?;
        // An agent in host monitor mode is as ready as it gets.
        self.wait_until("enforces", |status| status["state"] == "ENFORCING" || status["state"] == "MONITOR")?;
        if let Some(gate) = GATE.get() {
            let has = &self.status()?["gate"];
            anyhow::ensure!(has["name"] == gate.as_str(), "gate {gate} is demanded, and the agent has {has}");
        }
        Ok(())
    }

    /// Starts the process and does not wait.
    pub fn spawn(&mut self) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log())?;
        let making = making();
        // `--netns=NAME` is ours: the agent runs in that namespace of the world, where its interfaces are.
        let netns = self.extra.iter().find_map(|arg| arg.strip_prefix("--netns=")).map(|name| self.namespace(name));
        let mut command = match netns {
            None => Command::new(crate::binary(self.binary)?),
            Some(name) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{name}")).arg(crate::binary(self.binary)?);
                command
            }
        };
        let child = with_signals(&mut command)
            .arg("agent")
            .arg("--socket")
            .arg(self.socket())
            .arg("--policy")
            .arg(self.folder.join("policy"))
            .arg("--pin-dir")
            .arg(&self.pins)
            .arg("--state-dir")
            .arg(self.folder.join("state"))
            .arg("--cgroup-root")
            .arg(&self.cgroup_root)
            .args(self.extra.iter().filter(|arg| !arg.starts_with("--netns=")))
            .args(GATE.get().into_iter().flat_map(|gate| ["--gate", gate.as_str()]))
            // Not the settings of the machine the test runs on.
            .args(if self.extra.iter().any(|arg| arg == "--config") { &[][..] } else { &["--config", "/dev/null"][..] })
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting segfw agent")?;
        // With the world's other processes, so that its end is theirs.
        fs::write(self.own_cgroup.join("cgroup.procs"), child.id().to_string())?;
        self.child = Some(child);
        drop(making);
        Ok(())
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let child = self.child.as_ref().context("the agent does not run")?;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
        nix::sys::signal::kill(pid, signal).context("signalling the agent")
    }

    /// Of the process; `None` = it does not run.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Folder below which it pins: one folder a layout.
    pub fn pins(&self) -> &std::path::Path {
        &self.pins
    }

    /// Where it keeps what survives it.
    pub fn state_dir(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Replaces the policy and waits until another revision is enforced.
    pub fn reload(&mut self, policy: &str) -> Result<()> {
        let begun = Instant::now();
        let before = digest(&self.status()?);
        self.write(policy)?;
        self.wait_until("has the new revision", |status| status["state"] == "ENFORCING" && digest(status) != before)?;
        self.reloaded = begun.elapsed();
        Ok(())
    }

    /// How long the last [`Self::reload`] took, rounded up, in seconds: what a time in a policy must leave room for.
    pub fn pace(&self) -> u64 {
        self.reloaded.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)
    }

    /// Replaces the policy and does not wait.
    pub fn write(&self, policy: &str) -> Result<()> {
        let folder = self.folder.join("policy");
        // Outside the folder until it is complete: the agent must see one change.
        let draft = self.folder.join("draft");
        fs::write(&draft, policy)?;
        fs::rename(&draft, folder.join("policy.yaml")).context("publishing the policy")
    }

    /// SIGKILL: no chance to tidy up.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// SIGTERM, and the wait for its end.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
            let end = Instant::now() + READY * crate::slowness();
            while child.try_wait()?.is_none() {
                if Instant::now() > end {
                    child.kill()?;
                    bail!("the agent did not end on SIGTERM");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// `segfw status`.
    pub fn status(&self) -> Result<Value> {
        let output = self.cli(&["status", "--output", "json"])?;
        serde_json::from_slice(&output.stdout).with_context(|| explain(&output))
    }

    /// `segfw workloads`.
    pub fn workloads(&self) -> Result<Vec<Value>> {
        self.list(&["workloads", "--output", "json"])
    }

    /// `segfw flows`: the records, oldest first.
    pub fn flows(&self) -> Result<Vec<Value>> {
        self.list(&["flows", "--last", "100000", "--output", "json"])
    }

    /// A verb that prints one value per line, or one list.
    fn list(&self, args: &[&str]) -> Result<Vec<Value>> {
        let output = self.cli(args)?;
        let mut records = Vec::new();
        for value in serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>() {
            let value = value.with_context(|| explain(&output))?;
            if let Value::Array(list) = value {
                records.extend(list);
            } else {
                records.push(value);
            }
        }
        Ok(records)
    }

    /// Any other verb.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        Command::new(crate::binary("segfw")?)
            .arg("--socket")
            .arg(self.socket())
            .args(args)
            .stdin(Stdio::null())
            .output()
            .context("starting segfw")
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// Where its log goes.
    pub fn log(&self) -> PathBuf {
        self.folder.join("agent.log")
    }

    /// Asks for the status until `done`.
    pub fn wait_until(&mut self, what: &str, done: impl Fn(&Value) -> bool) -> Result<()> {
        let end = Instant::now() + READY * crate::slowness();
        let mut last = None;
        while Instant::now() < end {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                self.child = None;
                bail!("the agent ended ({status}) before it {what}:\n{}", self.tail());
            }
            match self.status() {
                Ok(status) if done(&status) => return Ok(()),
                other => last = Some(other),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let last = match last {
            Some(Ok(status)) => status.to_string(),
            Some(Err(e)) => format!("{e:#}"),
            None => String::new(),
        };
        bail!("after {:?} the agent still not {what}; status: {last}\n{}", READY * crate::slowness(), self.tail())
    }

    fn tail(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// The digest of the revision in force, wherever the status keeps it.
pub fn digest(status: &Value) -> Option<String> {
    match status {
        Value::Object(map) => match map.get("digest") {
            Some(Value::String(text)) => Some(text.clone()),
            _ => map.values().find_map(digest),
        },
        Value::Array(list) => list.iter().find_map(digest),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

/// True if some text of the record is exactly `word`: the test does not depend on where a field is.
pub fn mentions(record: &Value, word: &str) -> bool {
    match record {
        Value::String(text) => text == word,
        Value::Number(number) => number.to_string() == word,
        Value::Object(map) => map.values().any(|v| mentions(v, word)),
        Value::Array(list) => list.iter().any(|v| mentions(v, word)),
        Value::Null | Value::Bool(_) => false,
    }
}

fn explain(output: &Output) -> String {
    format!(
        "segfw ({}) said: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stdout).chars().take(300).collect::<String>(),
        String::from_utf8_lossy(&output.stderr).trim()
    )
}
