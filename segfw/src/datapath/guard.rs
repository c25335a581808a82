//! Is what we put into the kernel still there? Found, mended, and said.

use super::attach::{CGROUP_MADE, EGRESS, HOOKS, Hook, INGRESS, Outcome, pin_over};
use super::load::PINNED_MAPS;
use super::{Datapath, Error, sys};
use segfw_common::{Identity, SocketState};
use std::fs::File;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Something that was not as we left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// `hook connect4`, `map CGROUPS`.
    pub what: String,
    /// What was found instead.
    pub found: String,
    /// `None` = it is as it should be again; else why not.
    pub left: Option<String>,
}

impl Difference {
    /// What was found, and how mending it went.
    pub fn new(what: impl Into<String>, found: impl Into<String>, mended: Result<(), impl ToString>) -> Self {
        Self { what: what.into(), found: found.into(), left: mended.err().map(|e| e.to_string()) }
    }
}

/// A program of somebody else at one of our places.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// `connect4`.
    pub hook: &'static str,
    /// The kernel's number of the program.
    pub program: u32,
    /// As its author named it.
    pub name: String,
    /// It runs after ours: from kernel 5.18 on it can lift a refusal of `connect` and `sendmsg`.
    pub after_ours: bool,
}

impl Datapath {
    /// Puts programs back that were detached, replaced, or whose pins were removed.
    pub fn mend_hooks(&self, cgroup: &File, ingress: bool, egress: bool) -> Vec<Difference> {
        let hooks = HOOKS.iter().filter(|h| ingress || h.program != INGRESS.program).chain(egress.then_some(&EGRESS));
        hooks.filter_map(|hook| self.mend_hook(*hook, cgroup)).collect()
    }

    fn mend_hook(&self, hook: Hook, cgroup: &File) -> Option<Difference> {
        let pin = self.dir.join(format!("link-{}", hook.program));
        let was = match sys::get(&pin) {
            Ok(None) => "its pin was gone, and the program with it",
            Ok(Some(_)) => "the link was detached",
            Err(_) => "something else was pinned in its place",
        };
        let what = format!("hook {}", hook.program);
        match self.attach(hook, cgroup) {
            Ok(Outcome::Adopted) => None,
            Ok(Outcome::Replaced) => Some(Difference::new(what, "the link ran another program", Ok::<_, Error>(()))),
            Ok(Outcome::Attached | Outcome::Restored) => Some(Difference::new(what, was, Ok::<_, Error>(()))),
            // A file that is no link cannot be opened as one: out of the way with it.
            Err(_) if std::fs::remove_file(&pin).is_ok() => {
                Some(Difference::new(what, was, self.attach(hook, cgroup).map(drop)))
            }
            Err(error) => Some(Difference::new(what, was, Err(error))),
        }
    }

    /// The same for the watch of cgroups being made. True if it had to be put back.
    pub fn mend_cgroup_made(&self) -> Result<bool, Error> {
        let pin = self.dir.join(format!("link-{CGROUP_MADE}"));
        let there = |e| Error::sys(format!("open {}", pin.display()), e);
        let before = sys::get(&pin).map_err(there)?.and_then(|l| sys::link_info(l.as_fd()).ok()).map(|info| info.id);
        self.attach_cgroup_made()?;
        let after = sys::get(&pin).map_err(there)?.and_then(|l| sys::link_info(l.as_fd()).ok()).map(|info| info.id);
        Ok(before != after)
    }

    /// The same for the outer wall of an interface; one that is gone is no difference.
    pub fn mend_xdp(&self, interface: &str) -> Option<Difference> {
        let what = format!("hook outer_wall on {interface}");
        match self.attach_xdp(interface) {
            Ok(Outcome::Adopted) => None,
            Ok(Outcome::Replaced) => Some(Difference::new(what, "the link ran another program", Ok::<_, Error>(()))),
            Ok(Outcome::Attached | Outcome::Restored) => {
                Some(Difference::new(what, "it was detached, or the interface is a new one", Ok::<_, Error>(())))
            }
            Err(error) => {
                tracing::debug!("{what}: {error}");
                None
            }
        }
    }

    /// Puts the pins of our maps back. The maps themselves live as long as we or the programs hold them.
    pub fn mend_pins(&self) -> Vec<Difference> {
        PINNED_MAPS.iter().filter_map(|name| self.mend_pin(name)).collect()
    }

    fn mend_pin(&self, name: &str) -> Option<Difference> {
        let map = self.map(name).ok()?;
        let id = |map: BorrowedFd<'_>| sys::map_info(map).map(|info| info.id);
        let at = self.dir.join(name);
        let found = match sys::get(&at) {
            Ok(Some(there)) => match (id(there.as_fd()), id(map)) {
                (Ok(there), Ok(ours)) if there == ours => return None,
                _ => "another map was pinned in its place",
            },
            Ok(None) => "its pin was gone",
            Err(_) => "something else was pinned in its place",
        };
        let mended = std::fs::create_dir_all(&self.dir).and_then(|()| pin_over(map, &at));
        Some(Difference::new(format!("map {name}"), found, mended))
    }

    /// Programs of others at our places of this cgroup.
    pub fn neighbours(&self, cgroup: &File) -> Vec<Neighbour> {
        let mut found = Vec::new();
        for hook in HOOKS.iter().chain([&EGRESS]) {
            let Ok(ids) = sys::programs_at(cgroup.as_fd(), hook.attach_type) else { continue };
            let ours = self
                .program(hook.program)
                .and_then(|p| sys::program_info(p).map_err(|e| Error::sys("read a program", e)).map(|info| info.id));
            let at = ours.ok().and_then(|ours| ids.iter().position(|id| *id == ours));
            for (index, id) in ids.iter().enumerate().filter(|(index, _)| Some(*index) != at) {
                let name = sys::program_name(*id).unwrap_or_default();
                // Another agent of ours, for another part of the tree, or of another layout.
                found.push(Neighbour {
                    hook: hook.program,
                    program: *id,
                    name,
                    after_ours: at.is_some_and(|at| index > at),
                });
            }
        }
        found
    }

    /// Asks the hooks themselves: each must refuse a socket that every policy refuses. Returns those that did not. Only
    /// where a policy is in force and the host is not in monitor mode.
    pub fn canaries(&self, ingress: bool, pair: &mut Option<Canary>) -> Vec<(&'static str, String)> {
        let mut failed = Vec::new();
        for (hook, address) in [("connect4", "127.0.0.1:9"), ("connect6", "[::1]:9")] {
            if let Some(Err(why)) = self.connects(address) {
                failed.push((hook, why));
            }
        }
        for (hook, address) in [("sendmsg4", "127.0.0.1:9"), ("sendmsg6", "[::1]:9")] {
            if let Some(Err(why)) = self.sends(address) {
                failed.push((hook, why));
            }
        }
        if !ingress {
            *pair = None;
            return failed;
        }
        if pair.is_none() {
            *pair = self.canary_pair();
        }
        if let Some(Err(why)) = pair.as_ref().and_then(Canary::receives) {
            failed.push(("skb_ingress", why));
        }
        failed
    }

    /// Makes a socket a canary's.
    pub(super) fn mark(&self, socket: BorrowedFd<'_>, identity: Identity) -> io::Result<()> {
        let state = SocketState { identity: identity.0, ..SocketState::default() };
        sys::map_update(self.map("SOCKETS").map_err(io::Error::other)?, &socket.as_raw_fd(), &state)
    }

    /// `None` = cannot be tried here (no such address family, no loopback).
    fn connects(&self, to: &str) -> Option<Result<(), String>> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
        let to: SocketAddr = to.parse().ok()?;
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(family, SockType::Stream, flags, None).ok()?;
        self.mark(socket.as_fd(), Identity::CANARY).ok()?;
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
            Err(nix::Error::EPERM) => Some(Ok(())),
            Err(nix::Error::EADDRNOTAVAIL | nix::Error::ENETUNREACH | nix::Error::EAFNOSUPPORT) => None,
            Err(error) => Some(Err(format!("connect to {to} came as far as \"{error}\""))),
            Ok(()) => Some(Err(format!("connect to {to} was let through"))),
        }
    }

    fn sends(&self, to: &str) -> Option<Result<(), String>> {
        let to: SocketAddr = to.parse().ok()?;
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).ok()?;
        self.mark(socket.as_fd(), Identity::CANARY).ok()?;
        match socket.send_to(b"canary", to) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Some(Ok(())),
            Err(_) => None,
            Ok(_) => Some(Err(format!("a datagram to {to} was let through"))),
        }
    }

    /// `None` = this namespace has no loopback that works.
    fn canary_pair(&self) -> Option<Canary> {
        let receiver = UdpSocket::bind("127.0.0.1:0").ok()?;
        let sender = UdpSocket::bind("127.0.0.1:0").ok()?;
        receiver.set_nonblocking(true).ok()?;
        sender.connect(receiver.local_addr().ok()?).ok()?;
        // First without the mark: else silence would prove nothing.
        sender.send(b"canary").ok()?;
        receiver.recv(&mut [0; 8]).ok()?;
        self.mark(receiver.as_fd(), Identity::CANARY).ok()?;
        Some(Canary { sender, receiver })
    }
}

/// Two sockets of ours on loopback. They are kept, since the sender is a process like any other, and a new flow of it each
/// time would be a record each time.
#[derive(Debug)]
pub struct Canary {
    sender: UdpSocket,
    receiver: UdpSocket,
}

impl Canary {
    /// Loopback delivers within `send`: what has not arrived then was dropped.
    fn receives(&self) -> Option<Result<(), String>> {
        self.sender.send(b"canary").ok()?;
        match self.receiver.recv(&mut [0; 8]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(Ok(())),
            Err(_) => None,
            Ok(_) => Some(Err("a datagram on loopback was delivered".to_owned())),
        }
    }
}
