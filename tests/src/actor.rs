//! The test's side of a `segfw-actor` process.

use crate::proto::{Cmd, Reply};
use crate::world::{World, making, with_signals};
use anyhow::{Context, Result, ensure};
use libc::c_int;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A number of a socket inside an actor.
pub type Handle = u32;

/// A refused system call of the actor: the name of its error. What most rows are about, so it is a value.
pub type Tried<T> = std::result::Result<T, String>;

/// A process in a cgroup and a namespace. It ends when this is dropped.
#[derive(Debug)]
pub struct Actor {
    name: String,
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Actor {
    /// Starts one in `cgroup` (as [`World::cgroup`] takes it) and in the namespace `net`.
    pub fn spawn(world: &World, name: &str, cgroup: &str, net: &str) -> Result<Self> {
        let _making = making();
        let mut command = Command::new(crate::binary("segfw-actor")?);
        let mut child = with_signals(&mut command)
            .arg("--cgroup")
            .arg(world.cgroup(cgroup)?)
            .args(["--netns", &world.netns(net), "--comm", name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting segfw-actor")?;
        let to = child.stdin.take();
        let from = BufReader::new(child.stdout.take().context("stdout of the actor")?);
        let mut actor = Self { name: name.to_owned(), child, to, from };
        actor.answer()?;
        Ok(actor)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends one order and reads the answer. An error here means that the actor is gone.
    pub fn ask(&mut self, cmd: &Cmd) -> Result<Reply> {
        let mut line = serde_json::to_vec(cmd)?;
        line.push(b'\n');
        let to = self.to.as_mut().context("stdin of the actor")?;
        to.write_all(&line).with_context(|| format!("the actor {} is gone", self.name))?;
        self.answer().with_context(|| format!("{cmd:?}"))
    }

    fn answer(&mut self) -> Result<Reply> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the actor {} ended", self.name);
        Ok(serde_json::from_str(&line)?)
    }

    /// As [`Self::ask`]; a refusal by the kernel is the inner error.
    pub fn attempt(&mut self, cmd: &Cmd) -> Result<Tried<Reply>> {
        let reply = self.ask(cmd)?;
        Ok(if reply.ok { Ok(reply) } else { Err(reply.errno) })
    }

    /// For steps that must work.
    pub fn must(&mut self, cmd: &Cmd) -> Result<Reply> {
        let reply = self.ask(cmd)?;
        ensure!(reply.ok, "{}: {cmd:?}: {}", self.name, reply.errno);
        Ok(reply)
    }

    /// A socket.
    pub fn socket(&mut self, domain: c_int, kind: c_int, proto: c_int) -> Result<Tried<Handle>> {
        Ok(self.attempt(&Cmd::Socket { domain, kind, proto })?.map(|r| r.h))
    }

    /// A socket option that is an int.
    pub fn option(&mut self, h: Handle, level: c_int, name: c_int, value: c_int) -> Result<()> {
        self.must(&Cmd::SetOpt { h, level, name, value: value.to_ne_bytes().to_vec() })?;
        Ok(())
    }

    /// A socket bound to `addr`, with SO_REUSEADDR, and dual-stack if `dual`; a stream socket also listens.
    pub fn listen(&mut self, kind: c_int, proto: c_int, addr: SocketAddr, dual: bool) -> Result<Handle> {
        let domain = domain_of(addr.ip());
        let h = self.must(&Cmd::Socket { domain, kind, proto })?.h;
        self.option(h, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        if addr.is_ipv6() {
            self.option(h, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, c_int::from(!dual))?;
        }
        self.must(&Cmd::Bind { h, addr: addr.to_string() })?;
        if kind == libc::SOCK_STREAM {
            self.must(&Cmd::Listen { h, backlog: 64 })?;
        }
        Ok(h)
    }

    /// A plain TCP listener.
    pub fn listen_tcp(&mut self, addr: SocketAddr) -> Result<Handle> {
        self.listen(libc::SOCK_STREAM, 0, addr, false)
    }

    /// A plain UDP socket that waits for datagrams.
    pub fn listen_udp(&mut self, addr: SocketAddr) -> Result<Handle> {
        self.listen(libc::SOCK_DGRAM, 0, addr, false)
    }

    /// Connects.
    pub fn connect(&mut self, h: Handle, addr: SocketAddr, ms: u64) -> Result<Tried<()>> {
        Ok(self.attempt(&Cmd::Connect { h, addr: addr.to_string(), ms })?.map(drop))
    }

    /// Accepts.
    pub fn accept(&mut self, h: Handle, ms: u64) -> Result<Tried<Handle>> {
        Ok(self.attempt(&Cmd::Accept { h, ms })?.map(|r| r.h))
    }

    /// Sends on a connected socket.
    pub fn send(&mut self, h: Handle, data: &str) -> Result<Tried<()>> {
        Ok(self.attempt(&Cmd::Send { h, data: data.to_owned(), flags: 0 })?.map(drop))
    }

    /// Sends one datagram.
    pub fn send_to(&mut self, h: Handle, addr: SocketAddr, data: &str) -> Result<Tried<()>> {
        let cmd = Cmd::SendTo { h, addr: addr.to_string(), data: data.to_owned(), flags: 0, ms: 0 };
        Ok(self.attempt(&cmd)?.map(drop))
    }

    /// Receives.
    pub fn recv(&mut self, h: Handle, ms: u64) -> Result<Tried<Reply>> {
        self.attempt(&Cmd::Recv { h, ms })
    }

    /// Closes; a handle that is closed already is no error.
    pub fn close(&mut self, h: Handle) -> Result<()> {
        self.ask(&Cmd::Close { h })?;
        Ok(())
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.to = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `AF_INET` or `AF_INET6`.
pub fn domain_of(ip: IpAddr) -> c_int {
    if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// The wildcard address of the same family.
pub fn wildcard(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}
