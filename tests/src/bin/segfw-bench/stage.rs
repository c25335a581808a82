//! The real agent with a client and a server, both of them this process: sockets belong to the cgroup in which they are
//! made, so one thread can be both ends.

use crate::rules::{self, OPEN, SHUT};
use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, sockopt};
use segfw_tests::agent::Agent;
use segfw_tests::policy::CGROUP;
use segfw_tests::scratch::{enter, own_cgroup};
use segfw_tests::world::World;
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// 100,000 rules are loaded within it, by any agent that is worth measuring.
const PATIENCE: Duration = Duration::from_secs(180);
/// In a network namespace of our own, so nobody has it.
pub(crate) const METRICS: &str = "127.0.0.1:9477";

/// In the order in which it must end: the process leaves the world's cgroups before the world kills who is in them.
pub(crate) struct Stage {
    pub(crate) agent: Agent,
    home: Home,
    pub(crate) world: World,
}

struct Home(PathBuf);

impl Drop for Home {
    fn drop(&mut self) {
        let _ = enter(&self.0);
    }
}

impl Stage {
    /// An agent with the policy of `rules` rules; `settings` = text of an `agent.yaml` (`@FOLDER@` = the world's folder).
    pub(crate) fn new(rules: u32, settings: &str) -> Result<Self> {
        let home = Home(own_cgroup()?);
        let world = World::new(&[])?;
        for name in ["cli", "srv"] {
            let _ = world.cgroup(&format!("managed/{name}"))?;
        }
        let path = world.folder().join("agent.yaml");
        fs::write(&path, settings.replace("@FOLDER@", &world.folder().display().to_string()))?;
        let args = ["--config".to_owned(), path.display().to_string(), "--metrics".to_owned(), METRICS.to_owned()];
        let agent = Agent::prepare(&world, &rules::access(&[OPEN]), &args)?;
        let mut stage = Self { agent, home, world };
        // `prepare` wrote policy.yaml: that is the file which changes.
        for (name, text) in rules::files(rules) {
            stage.write(&name, &text)?;
        }
        stage.start()?;
        Ok(stage)
    }

    /// Starts the agent and waits until it enforces; how long that took.
    pub(crate) fn start(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.agent.spawn()?;
        while !self.agent.status().is_ok_and(|s| s["state"] == "ENFORCING") {
            ensure!(begun.elapsed() < PATIENCE, "the agent does not enforce after {PATIENCE:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        let took = begun.elapsed();
        self.proof()?;
        Ok(took)
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.agent.log()).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// What is measured is enforcement: the open port opens, the shut one does not.
    pub(crate) fn proof(&self) -> Result<()> {
        let listeners = [self.listen(OPEN)?, self.listen(SHUT)?];
        self.as_client()?;
        let (open, shut) = (connect(OPEN)?, connect(SHUT)?);
        drop(listeners);
        ensure!(open && !shut, "the policy is not enforced: the open port {open}, the shut one {shut}");
        Ok(())
    }

    /// From here on sockets are the client's.
    pub(crate) fn as_client(&self) -> Result<()> {
        enter(&self.world.managed().join("cli"))
    }

    /// A listener of the server; afterwards this process is the client.
    pub(crate) fn listen(&self, port: u16) -> Result<TcpListener> {
        enter(&self.world.managed().join("srv"))?;
        let listener = listener(port)?;
        self.as_client()?;
        Ok(listener)
    }

    /// Writes a file of the policy folder, whole.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<()> {
        let draft = self.world.folder().join("draft");
        fs::write(&draft, text.replace(CGROUP, &self.world.managed_path()))?;
        fs::rename(&draft, self.world.folder().join("policy").join(name)).context("publishing the policy")
    }

    /// Gives the client these ports and no others. The moment from which it counts.
    pub(crate) fn allow(&self, ports: &[u16]) -> Result<Instant> {
        self.write("policy.yaml", &rules::access(ports))?;
        Ok(Instant::now())
    }

    /// Waits until a new connection to the listener's port fares so; how long since `begun`.
    pub(crate) fn until(&self, listener: &TcpListener, open: bool, begun: Instant) -> Result<Duration> {
        let port = listener.local_addr()?.port();
        listener.set_nonblocking(true)?;
        while connect(port)? != open {
            // What nobody accepts stays in the queue, closed or not; once that is full a SYN has no answer.
            while listener.accept().is_ok() {}
            if begun.elapsed() > PATIENCE {
                bail!("port {port} is not {} after {PATIENCE:?}: {}", if open { "open" } else { "shut" }, self.log());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let took = begun.elapsed();
        while listener.accept().is_ok() {}
        listener.set_nonblocking(false)?;
        Ok(took)
    }

    /// Microseconds of CPU that the agent's cgroup has used, ended threads included.
    pub(crate) fn agent_cpu_us(&self) -> Result<u64> {
        let text = fs::read_to_string(self.world.cgroup("agent")?.join("cpu.stat"))?;
        let usage = text.lines().find_map(|l| l.strip_prefix("usage_usec ")).context("no usage_usec in cpu.stat")?;
        Ok(usage.parse()?)
    }

    /// A counter of the kernel side, exact.
    pub(crate) fn counter(&self, name: &str) -> Result<u64> {
        let status: Value = self.agent.status()?;
        status["counters"]["named"][name].as_u64().with_context(|| format!("no counter {name} in the status"))
    }

    /// A metric of the agent without labels.
    pub(crate) fn metric(&self, name: &str) -> Result<f64> {
        // The client may not go there.
        enter(&self.home.0)?;
        let stream = TcpStream::connect(METRICS);
        self.as_client()?;
        let mut stream = stream.context("connecting to the agent's metrics")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text)?;
        let value = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no metric {name}"))?.trim().parse()?)
    }
}

/// A listener with room for many.
pub(crate) fn listener(port: u16) -> Result<TcpListener> {
    let socket = stream_socket()?;
    socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    let at = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    socket::bind(socket.as_raw_fd(), &at).with_context(|| format!("binding port {port}"))?;
    socket::listen(&socket, socket::Backlog::new(4096)?)?;
    Ok(TcpListener::from(socket))
}

fn stream_socket() -> Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Connects to a port of loopback and closes again, without a trace; false = refused by policy. Nobody has to accept.
pub(crate) fn connect(port: u16) -> Result<bool> {
    let socket = stream_socket()?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    socket::setsockopt(&socket, sockopt::Linger, &linger)?;
    let to = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    match socket::connect(socket.as_raw_fd(), &to) {
        Ok(()) => Ok(true),
        // What `deny` and `reject` say. ECONNREFUSED is a missing listener, which would be our mistake.
        // ECONNABORTED: the revision came between the first packet and the answer, and the sweep cut it.
        Err(Errno::EPERM | Errno::EACCES | Errno::ECONNABORTED) => Ok(false),
        Err(e) => Err(e).with_context(|| format!("connecting to port {port}")),
    }
}
