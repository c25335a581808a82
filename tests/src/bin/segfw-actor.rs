//! A process that lives where a test puts it and does what the test says, one JSON line at a time.
//!
//! `segfw-actor --cgroup PATH --netns NAME --comm NAME`: enters the cgroup and the network namespace before it does
//! anything else, then reads orders from standard input until it ends.
#![allow(clippy::print_stdout, reason = "answers go to standard output; that is the protocol")]

use anyhow::{Context, Result};
use io_uring::{IoUring, opcode, types};
use libc::{c_int, c_void, socklen_t};
use segfw_tests::proto::{Cmd, Reply, Tally};
use segfw_tests::world::enter_netns;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::{BufRead, Write};
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().with_context(|| format!("{arg} needs a value"))?;
        match arg.as_str() {
            "--cgroup" => std::fs::write(format!("{value}/cgroup.procs"), std::process::id().to_string())
                .with_context(|| format!("entering {value}"))?,
            "--netns" => enter_netns(&value).with_context(|| format!("netns {value}"))?,
            "--comm" => {
                let name = CString::new(value)?;
                nix::sys::prctl::set_name(&name)?;
            }
            _ => anyhow::bail!("unknown option {arg}"),
        }
    }
    let mut actor = Actor::default();
    println!("{{\"ok\":true}}");
    for line in std::io::stdin().lock().lines() {
        let cmd: Cmd = serde_json::from_str(&line?)?;
        let start = Instant::now();
        let mut reply = match actor.obey(cmd) {
            Ok(reply) => Reply { ok: true, ..reply },
            Err(no) => Reply { errno: format!("{:?}", nix::errno::Errno::from_raw(no)), ..Reply::default() },
        };
        reply.us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        println!("{}", serde_json::to_string(&reply)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// The result of an order: an answer or an error number.
type Did = Result<Reply, c_int>;

#[derive(Default)]
struct Actor {
    handles: BTreeMap<u32, OwnedFd>,
    last: u32,
    background: Vec<std::thread::JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    servers: Vec<std::thread::JoinHandle<()>>,
    closed: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
}

fn errno() -> c_int {
    nix::errno::Errno::last_raw()
}

fn check(rc: c_int) -> Result<c_int, c_int> {
    if rc < 0 { Err(errno()) } else { Ok(rc) }
}

fn check_size(rc: isize) -> Result<isize, c_int> {
    if rc < 0 { Err(errno()) } else { Ok(rc) }
}

fn address(text: &str) -> Result<SocketAddr, c_int> {
    text.parse().map_err(|_| libc::EINVAL)
}

/// A socket address as the kernel wants it.
fn raw(addr: SocketAddr) -> (libc::sockaddr_storage, socklen_t) {
    // SAFETY: all zero is a valid sockaddr_storage.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let len = match addr {
        SocketAddr::V4(v4) => {
            let sin = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is larger and at least as aligned as sockaddr_in.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(sin) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            let sin6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(sin6) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, len as socklen_t)
}

fn text_of(storage: &libc::sockaddr_storage) -> String {
    match c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which address it is.
            let sin = unsafe { *(&raw const *storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(sin.sin_addr.s_addr.to_ne_bytes());
            SocketAddr::new(IpAddr::V4(ip), u16::from_be(sin.sin_port)).to_string()
        }
        libc::AF_INET6 => {
            // SAFETY: the family says which address it is.
            let sin = unsafe { *(&raw const *storage).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(sin.sin6_addr.s6_addr);
            SocketAddrV6::new(ip, u16::from_be(sin.sin6_port), 0, sin.sin6_scope_id).to_string()
        }
        _ => String::new(),
    }
}

/// Waits for one of `events`.
fn wait(fd: c_int, events: libc::c_short, ms: u64) -> Result<(), c_int> {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one valid pollfd.
    let n = check(unsafe { libc::poll(&raw mut poll, 1, c_int::try_from(ms).unwrap_or(c_int::MAX)) })?;
    if n == 0 { Err(libc::ETIMEDOUT) } else { Ok(()) }
}

fn so_error(fd: c_int) -> Result<(), c_int> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as socklen_t;
    // SAFETY: value and len are valid for the call.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut value).cast(), &raw mut len) })?;
    if value == 0 { Ok(()) } else { Err(value) }
}

/// The end of a connect that was begun with `began`.
fn connected(fd: c_int, began: Result<c_int, c_int>, ms: u64) -> Did {
    match began {
        Ok(_) => Ok(Reply::default()),
        Err(libc::EINPROGRESS) => {
            wait(fd, libc::POLLOUT, ms)?;
            so_error(fd)?;
            Ok(Reply::default())
        }
        Err(no) => Err(no),
    }
}

fn recv(fd: c_int, ms: u64, into: &mut [u8]) -> Result<(usize, String), c_int> {
    let end = Instant::now() + Duration::from_millis(ms);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        wait(fd, libc::POLLIN, u64::try_from(left.as_millis()).unwrap_or(0))?;
        // SAFETY: all zero is a valid sockaddr_storage.
        let mut from: libc::sockaddr_storage = unsafe { zeroed() };
        let mut len = size_of::<libc::sockaddr_storage>() as socklen_t;
        // SAFETY: the buffer and the address are valid for the lengths given.
        let n = unsafe {
            libc::recvfrom(fd, into.as_mut_ptr().cast(), into.len(), 0, (&raw mut from).cast(), &raw mut len)
        };
        match check_size(n) {
            Ok(n) => return Ok((n.unsigned_abs(), text_of(&from))),
            Err(libc::EAGAIN) => {}
            Err(no) => return Err(no),
        }
    }
}

fn send_to(fd: c_int, data: &[u8], flags: c_int, to: Option<SocketAddr>) -> Result<isize, c_int> {
    let (storage, len) = to.map_or_else(
        // SAFETY: all zero is a valid sockaddr_storage.
        || (unsafe { zeroed() }, 0),
        raw,
    );
    let name = if to.is_some() { (&raw const storage).cast() } else { std::ptr::null() };
    // SAFETY: data and address are valid for the lengths given.
    check_size(unsafe { libc::sendto(fd, data.as_ptr().cast(), data.len(), flags | libc::MSG_NOSIGNAL, name, len) })
}

/// The ones' complement sum of RFC 1071.
fn checksum(data: &[u8]) -> u16 {
    let mut sum: u32 =
        data.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn udp_header(src: SocketAddr, dst: SocketAddr, data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + data.len()).unwrap_or(u16::MAX);
    let mut out = Vec::with_capacity(usize::from(len));
    for word in [src.port(), dst.port(), len, 0] {
        out.extend(word.to_be_bytes());
    }
    out.extend(data);
    out
}

fn ipv4_packet(src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut head = vec![0x45, 0, total[0], total[1], 0x12, 0x34, 0, 0, 64, 17, 0, 0];
    head.extend(src.octets());
    head.extend(dst.octets());
    let sum = checksum(&head).to_be_bytes();
    head[10..12].copy_from_slice(&sum);
    head.extend(payload);
    head
}

fn ifindex() -> Result<u32, c_int> {
    // SAFETY: a literal C string.
    let index = unsafe { libc::if_nametoindex(c"eth0".as_ptr()) };
    if index == 0 { Err(errno()) } else { Ok(index) }
}

fn option(fd: c_int, level: c_int, name: c_int, value: &[u8]) -> Result<c_int, c_int> {
    // SAFETY: value is valid for its length.
    check(unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), value.len() as socklen_t) })
}

impl Actor {
    fn keep(&mut self, fd: c_int) -> Reply {
        self.last += 1;
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        self.handles.insert(self.last, unsafe { OwnedFd::from_raw_fd(fd) });
        Reply { h: self.last, ..Reply::default() }
    }

    fn fd(&self, h: u32) -> Result<c_int, c_int> {
        self.handles.get(&h).map(AsRawFd::as_raw_fd).ok_or(libc::EBADF)
    }

    fn dup(&self, h: u32) -> Result<OwnedFd, c_int> {
        let fd = self.handles.get(&h).ok_or(libc::EBADF)?;
        fd.as_fd().try_clone_to_owned().map_err(|e| e.raw_os_error().unwrap_or(libc::EMFILE))
    }

    fn obey(&mut self, cmd: Cmd) -> Did {
        let done = Reply::default();
        match cmd {
            Cmd::Socket { domain, kind, proto } => {
                // SAFETY: no pointers.
                let fd = unsafe { libc::socket(domain, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, proto) };
                Ok(self.keep(check(fd)?))
            }
            Cmd::SetOpt { h, level, name, value } => option(self.fd(h)?, level, name, &value).map(|_| done),
            Cmd::Bind { h, addr } => {
                let (name, len) = raw(address(&addr)?);
                // SAFETY: name is valid for len.
                check(unsafe { libc::bind(self.fd(h)?, (&raw const name).cast(), len) }).map(|_| done)
            }
            Cmd::Listen { h, backlog } => {
                // SAFETY: no pointers.
                check(unsafe { libc::listen(self.fd(h)?, backlog) }).map(|_| done)
            }
            Cmd::Accept { h, ms } => self.accept(h, ms),
            Cmd::Connect { h, addr, ms } => {
                let fd = self.fd(h)?;
                let (name, len) = raw(address(&addr)?);
                // SAFETY: name is valid for len.
                let began = check(unsafe { libc::connect(fd, (&raw const name).cast(), len) });
                connected(fd, began, ms)
            }
            Cmd::Disconnect { h } => {
                // SAFETY: all zero is AF_UNSPEC.
                let name: libc::sockaddr_storage = unsafe { zeroed() };
                let len = size_of::<libc::sockaddr_in>() as socklen_t;
                // SAFETY: name is valid for len.
                check(unsafe { libc::connect(self.fd(h)?, (&raw const name).cast(), len) }).map(|_| done)
            }
            Cmd::Send { h, data, flags } => {
                send_to(self.fd(h)?, data.as_bytes(), flags, None).map(|n| Reply { n: n as i64, ..done })
            }
            Cmd::SendTo { h, addr, data, flags, ms } => {
                let fd = self.fd(h)?;
                match send_to(fd, data.as_bytes(), flags, Some(address(&addr)?)) {
                    Ok(n) if flags & libc::MSG_FASTOPEN == 0 => Ok(Reply { n: n as i64, ..done }),
                    // With fast open the data went with the SYN; whether it was taken is known later.
                    Ok(_) | Err(libc::EINPROGRESS) => connected(fd, Err(libc::EINPROGRESS), ms),
                    Err(no) => Err(no),
                }
            }
            Cmd::SendMmsg { h, list } => self.sendmmsg(h, &list),
            Cmd::Recv { h, ms } => {
                let mut buffer = vec![0; 65536];
                let (n, from) = recv(self.fd(h)?, ms, &mut buffer)?;
                let data = String::from_utf8_lossy(&buffer[..n]).into_owned();
                Ok(Reply { data, from, n: n as i64, ..done })
            }
            Cmd::SoError { h } => so_error(self.fd(h)?).map(|()| done),
            Cmd::LocalAddr { h } => {
                // SAFETY: all zero is a valid sockaddr_storage.
                let mut name: libc::sockaddr_storage = unsafe { zeroed() };
                let mut len = size_of::<libc::sockaddr_storage>() as socklen_t;
                // SAFETY: name is valid for len.
                check(unsafe { libc::getsockname(self.fd(h)?, (&raw mut name).cast(), &raw mut len) })?;
                Ok(Reply { from: text_of(&name), ..done })
            }
            Cmd::UringConnect { h, addr, ms } => {
                let fd = self.fd(h)?;
                let (name, len) = raw(address(&addr)?);
                let entry = opcode::Connect::new(types::Fd(fd), (&raw const name).cast(), len).build();
                let began = uring(&entry);
                connected(fd, began, ms)
            }
            Cmd::UringSend { h, addr, data } => {
                let (mut name, len) = match addr {
                    Some(addr) => raw(address(&addr)?),
                    // SAFETY: all zero is a valid sockaddr_storage.
                    None => (unsafe { zeroed() }, 0),
                };
                let mut bytes = data.into_bytes();
                let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
                // SAFETY: all zero is an empty msghdr.
                let mut message: libc::msghdr = unsafe { zeroed() };
                if len > 0 {
                    message.msg_name = (&raw mut name).cast();
                    message.msg_namelen = len;
                }
                message.msg_iov = &raw mut part;
                message.msg_iovlen = 1;
                let entry = opcode::SendMsg::new(types::Fd(self.fd(h)?), &raw const message).build();
                uring(&entry).map(|n| Reply { n: n.into(), ..done })
            }
            Cmd::RawUdp { h, src, dst, data } => self.raw_udp(h, address(&src)?, address(&dst)?, data.as_bytes()),
            Cmd::Ping { h, addr, ms } => self.ping(h, address(&addr)?, ms),
            Cmd::FdListen { path } => {
                let socket = std::os::unix::net::UnixDatagram::bind(path).map_err(|_| libc::EADDRINUSE)?;
                Ok(self.keep(std::os::fd::IntoRawFd::into_raw_fd(socket)))
            }
            Cmd::SendFd { h, path } => {
                use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
                let socket = std::os::unix::net::UnixDatagram::unbound().map_err(|_| libc::EMFILE)?;
                let fds = [self.fd(h)?];
                let to = UnixAddr::new(path.as_str()).map_err(|e| e as c_int)?;
                let part = [std::io::IoSlice::new(b"x")];
                let control = [ControlMessage::ScmRights(&fds)];
                sendmsg(socket.as_raw_fd(), &part, &control, MsgFlags::empty(), Some(&to)).map_err(|e| e as c_int)?;
                Ok(done)
            }
            Cmd::RecvFd { h, ms } => {
                use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
                let fd = self.fd(h)?;
                wait(fd, libc::POLLIN, ms)?;
                let mut byte = [0; 1];
                let mut part = [std::io::IoSliceMut::new(&mut byte)];
                let mut space = nix::cmsg_space!([c_int; 1]);
                let got = recvmsg::<UnixAddr>(fd, &mut part, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
                    .map_err(|e| e as c_int)?;
                let passed = got.cmsgs().map_err(|e| e as c_int)?.find_map(|c| {
                    if let ControlMessageOwned::ScmRights(fds) = c { fds.first().copied() } else { None }
                });
                Ok(self.keep(passed.ok_or(libc::ENOMSG)?))
            }
            Cmd::Join { h, group } => self.join(h, &group),
            Cmd::MoveCgroup { path } => std::fs::write(format!("{path}/cgroup.procs"), std::process::id().to_string())
                .map(|()| done)
                .map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)),
            Cmd::Unshare => {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).map_err(|e| e as c_int)?;
                loopback_up().map(|()| done)
            }
            Cmd::Enter { netns } => {
                enter_netns(&netns).map(|()| done).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
            }
            Cmd::UnshareUser => {
                use nix::sched::CloneFlags;
                nix::sched::unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(|e| e as c_int)?;
                loopback_up().map(|()| done)
            }
            Cmd::AddAddress { ip } => add_address(ip.parse().map_err(|_| libc::EINVAL)?).map(|()| done),
            Cmd::SendFrom { h, addr, source, data } => {
                let source = source.parse().map_err(|_| libc::EINVAL)?;
                send_from(self.fd(h)?, address(&addr)?, source, data.as_bytes()).map(|()| done)
            }
            Cmd::Connects { addr, n } => {
                let to = address(&addr)?;
                let (mut refused, mut other) = (0, String::new());
                for _ in 0..n {
                    let fd = fresh(to, libc::SOCK_STREAM)?;
                    let (name, len) = raw(to);
                    // SAFETY: name is valid for len.
                    match check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const name).cast(), len) }) {
                        Err(libc::EPERM) => refused += 1,
                        Err(no) if other.is_empty() => other = format!("{:?}", nix::errno::Errno::from_raw(no)),
                        Ok(_) if other.is_empty() => other = "connected".to_owned(),
                        _ => {}
                    }
                }
                Ok(Reply { n: refused, data: other, ..done })
            }
            Cmd::Datagrams { ip, first, ports, sockets } => {
                let ip: IpAddr = ip.parse().map_err(|_| libc::EINVAL)?;
                let (mut sent, mut other) = (0, String::new());
                for _ in 0..sockets {
                    let fd = fresh(SocketAddr::new(ip, first), libc::SOCK_DGRAM)?;
                    for port in 0..ports {
                        let to = Some(SocketAddr::new(ip, first + port));
                        let mut done = send_to(fd.as_raw_fd(), b"x", 0, to);
                        // What was sent before has not left yet.
                        while done == Err(libc::EAGAIN) && wait(fd.as_raw_fd(), libc::POLLOUT, 10_000).is_ok() {
                            done = send_to(fd.as_raw_fd(), b"x", 0, to);
                        }
                        match done {
                            Ok(_) => sent += 1,
                            Err(no) if other.is_empty() => other = format!("{:?}", nix::errno::Errno::from_raw(no)),
                            Err(_) => {}
                        }
                    }
                }
                Ok(Reply { n: sent, data: other, ..done })
            }
            Cmd::Pin { cpu } => {
                let mut set = nix::sched::CpuSet::new();
                set.set(cpu).map_err(|e| e as c_int)?;
                nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)
                    .map(|()| done)
                    .map_err(|e| e as c_int)
            }
            Cmd::Serve { h } => {
                let (listener, closed) = (self.dup(h)?, Arc::clone(&self.closed));
                self.servers.push(std::thread::spawn(move || serve(&listener, &closed)));
                Ok(done)
            }
            Cmd::Chat { h } => {
                let (fd, stop, tally) = (self.dup(h)?, Arc::clone(&self.stop), Arc::clone(&self.tally));
                self.background.push(std::thread::spawn(move || chat(&fd, &stop, &tally)));
                Ok(done)
            }
            Cmd::Retry { addr } => {
                let (to, stop, tally) = (address(&addr)?, Arc::clone(&self.stop), Arc::clone(&self.tally));
                self.background.push(std::thread::spawn(move || retry(to, &stop, &tally)));
                Ok(done)
            }
            Cmd::Tally => {
                self.stop.store(true, Ordering::Relaxed);
                for thread in self.background.drain(..) {
                    let _ = thread.join();
                }
                self.stop.store(false, Ordering::Relaxed);
                let tally = std::mem::take(&mut *self.tally.lock().unwrap_or_else(PoisonError::into_inner));
                Ok(Reply { data: serde_json::to_string(&tally).map_err(|_| libc::EIO)?, ..done })
            }
            Cmd::Write { path, value } => {
                std::fs::write(path, value).map(|()| done).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
            }
            Cmd::Close { h } => self.handles.remove(&h).map(|_| done).ok_or(libc::EBADF),
            Cmd::CloseAll => {
                self.handles.clear();
                self.closed.store(true, Ordering::Relaxed);
                for thread in self.servers.drain(..) {
                    let _ = thread.join();
                }
                self.closed.store(false, Ordering::Relaxed);
                Ok(done)
            }
        }
    }

    fn accept(&mut self, h: u32, ms: u64) -> Did {
        let fd = self.fd(h)?;
        wait(fd, libc::POLLIN, ms)?;
        // SAFETY: all zero is a valid sockaddr_storage.
        let mut name: libc::sockaddr_storage = unsafe { zeroed() };
        let mut len = size_of::<libc::sockaddr_storage>() as socklen_t;
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: name is valid for len.
        let fd = check(unsafe { libc::accept4(fd, (&raw mut name).cast(), &raw mut len, flags) })?;
        Ok(Reply { from: text_of(&name), ..self.keep(fd) })
    }

    fn sendmmsg(&self, h: u32, list: &[(String, String)]) -> Did {
        let mut names = Vec::new();
        let mut parts: Vec<libc::iovec> = Vec::new();
        for (addr, data) in list {
            names.push(raw(address(addr)?));
            parts.push(libc::iovec { iov_base: data.as_ptr().cast_mut().cast::<c_void>(), iov_len: data.len() });
        }
        let mut messages = Vec::new();
        for (name, part) in names.iter_mut().zip(&mut parts) {
            // SAFETY: all zero is an empty mmsghdr.
            let mut message: libc::mmsghdr = unsafe { zeroed() };
            message.msg_hdr.msg_name = (&raw mut name.0).cast();
            message.msg_hdr.msg_namelen = name.1;
            message.msg_hdr.msg_iov = &raw mut *part;
            message.msg_hdr.msg_iovlen = 1;
            messages.push(message);
        }
        // SAFETY: the messages point into vectors that live until the call returns.
        let n = unsafe { libc::sendmmsg(self.fd(h)?, messages.as_mut_ptr(), messages.len() as u32, 0) };
        check(n).map(|n| Reply { n: n.into(), ..Reply::default() })
    }

    fn raw_udp(&self, h: u32, src: SocketAddr, dst: SocketAddr, data: &[u8]) -> Did {
        let fd = self.fd(h)?;
        let datagram = udp_header(src, dst, data);
        let mut domain: c_int = 0;
        let mut len = size_of::<c_int>() as socklen_t;
        // SAFETY: domain and len are valid for the call.
        check(unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_DOMAIN, (&raw mut domain).cast(), &raw mut len)
        })?;
        match (domain, src.ip(), dst.ip()) {
            (libc::AF_PACKET, IpAddr::V4(s), IpAddr::V4(d)) => {
                // To everybody on the link: that saves asking for the neighbour's address.
                let mut frame = vec![0xff; 6];
                frame.extend([2, 0, 0, 0, 0, 1, 8, 0]);
                frame.extend(ipv4_packet(s, d, &datagram));
                // SAFETY: all zero is a valid sockaddr_ll.
                let mut to: libc::sockaddr_ll = unsafe { zeroed() };
                to.sll_family = libc::AF_PACKET as u16;
                to.sll_ifindex = ifindex()? as c_int;
                to.sll_halen = 6;
                to.sll_addr[..6].fill(0xff);
                let size = size_of::<libc::sockaddr_ll>() as socklen_t;
                // SAFETY: frame and address are valid for the lengths given.
                check_size(unsafe {
                    libc::sendto(fd, frame.as_ptr().cast(), frame.len(), 0, (&raw const to).cast(), size)
                })?;
            }
            (libc::AF_INET, IpAddr::V4(s), IpAddr::V4(d)) => {
                send_to(fd, &ipv4_packet(s, d, &datagram), 0, Some(SocketAddr::new(dst.ip(), 0)))?;
            }
            (libc::AF_INET6, ..) => {
                // The kernel fills in the checksum at offset 6.
                option(fd, libc::IPPROTO_IPV6, 7, &6_i32.to_ne_bytes())?;
                send_to(fd, &datagram, 0, Some(SocketAddr::new(dst.ip(), 0)))?;
            }
            _ => return Err(libc::EAFNOSUPPORT),
        }
        Ok(Reply::default())
    }

    fn ping(&self, h: u32, to: SocketAddr, ms: u64) -> Did {
        let fd = self.fd(h)?;
        let kind: u8 = if to.is_ipv4() { 8 } else { 128 };
        let mut echo = vec![kind, 0, 0, 0, 0x5e, 0x6f, 0, 1];
        echo.extend(b"segfw-echo");
        if to.is_ipv4() {
            let sum = checksum(&echo).to_be_bytes();
            echo[2..4].copy_from_slice(&sum);
        }
        send_to(fd, &echo, 0, Some(to))?;
        let end = Instant::now() + Duration::from_millis(ms);
        let mut buffer = [0; 512];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let (n, from) = recv(fd, u64::try_from(left.as_millis()).unwrap_or(0), &mut buffer)?;
            let got = &buffer[..n];
            // A raw socket also sees its own request on loopback, and the IPv4 header.
            let icmp = if got.first().is_some_and(|b| b >> 4 == 4) { got.get(20..).unwrap_or(&[]) } else { got };
            if matches!(icmp.first(), Some(0 | 129)) && icmp.ends_with(b"segfw-echo") {
                return Ok(Reply { from, ..Reply::default() });
            }
        }
    }

    fn join(&self, h: u32, group: &str) -> Did {
        let fd = self.fd(h)?;
        let index = ifindex()?;
        match group.parse().map_err(|_| libc::EINVAL)? {
            IpAddr::V4(ip) => {
                let request = libc::ip_mreqn {
                    imr_multiaddr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                    imr_address: libc::in_addr { s_addr: 0 },
                    imr_ifindex: index as c_int,
                };
                // SAFETY: request is plain data.
                let bytes = unsafe {
                    std::slice::from_raw_parts((&raw const request).cast::<u8>(), size_of::<libc::ip_mreqn>())
                };
                option(fd, libc::IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, bytes)?;
            }
            IpAddr::V6(ip) => {
                let mut bytes = ip.octets().to_vec();
                bytes.extend(index.to_ne_bytes());
                option(fd, libc::IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, &bytes)?;
            }
        }
        Ok(Reply::default())
    }
}

/// One operation through a ring of its own.
fn uring(entry: &io_uring::squeue::Entry) -> Result<c_int, c_int> {
    let os = |e: std::io::Error| e.raw_os_error().unwrap_or(libc::EIO);
    let mut ring = IoUring::new(4).map_err(os)?;
    // SAFETY: what the entry points to lives in the caller until this function returns.
    unsafe { ring.submission().push(entry) }.map_err(|_| libc::EBUSY)?;
    // A SYN that is dropped in silence would keep the ring waiting for minutes. The kernel has copied the address by then,
    // and closing the ring ends the request.
    let patience = types::Timespec::new().nsec(700_000_000);
    match ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&patience)) {
        Ok(_) => {}
        Err(e) if e.raw_os_error() == Some(libc::ETIME) => return Err(libc::ETIMEDOUT),
        Err(e) => return Err(os(e)),
    }
    // Having submitted something counts as success of the call, also where the wait ran out.
    let result = ring.completion().next().ok_or(libc::ETIMEDOUT)?.result();
    if result < 0 { Err(-result) } else { Ok(result) }
}

fn loopback_up() -> Result<(), c_int> {
    // A stream, since that is what a segment of TCP sockets alone may have.
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel just gave us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: request is a valid ifreq.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
    Ok(())
}

/// A socket for this destination.
fn fresh(to: SocketAddr, kind: c_int) -> Result<OwnedFd, c_int> {
    let domain = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends back what comes, for every connection.
fn serve(listener: &OwnedFd, closed: &AtomicBool) {
    while !closed.load(Ordering::Relaxed) {
        if wait(listener.as_raw_fd(), libc::POLLIN, 20).is_err() {
            continue;
        }
        // SAFETY: no address is asked for.
        let fd = unsafe {
            libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
        };
        if fd < 0 {
            continue;
        }
        // SAFETY: the kernel just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((n, _)) = recv(fd.as_raw_fd(), 600_000, &mut buffer) {
                if n == 0 || send_to(fd.as_raw_fd(), &buffer[..n], 0, None).is_err() {
                    break;
                }
            }
        });
    }
}

/// One request, one answer, and again. An answer that takes ten seconds counts as a break.
fn chat(fd: &OwnedFd, stop: &AtomicBool, tally: &Mutex<Tally>) {
    let mut buffer = [0; 64];
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let result =
            send_to(fd.as_raw_fd(), b"request", 0, None).and_then(|_| recv(fd.as_raw_fd(), 10_000, &mut buffer));
        let took = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.longest_us = tally.longest_us.max(took);
        match result {
            Ok((n, _)) if n > 0 => tally.answered += 1,
            Ok(_) => tally.broken = "the other end closed".to_owned(),
            Err(no) => tally.broken = format!("{:?}", nix::errno::Errno::from_raw(no)),
        }
        if !tally.broken.is_empty() {
            break;
        }
        drop(tally);
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn retry(to: SocketAddr, stop: &AtomicBool, tally: &Mutex<Tally>) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(fd) = fresh(to, libc::SOCK_STREAM) else { continue };
        let (name, len) = raw(to);
        // SAFETY: name is valid for len.
        let began = check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const name).cast(), len) });
        let stood = connected(fd.as_raw_fd(), began, 20).is_ok();
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.tried += 1;
        tally.stood += u64::from(stood);
        drop(tally);
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn add_address(ip: IpAddr) -> Result<(), c_int> {
    let domain = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(domain, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel just gave us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match ip {
        IpAddr::V4(_) => {
            // SAFETY: all zero is a valid ifreq.
            let mut request: libc::ifreq = unsafe { zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(b"lo:1") {
                *to = *from as libc::c_char;
            }
            let (name, _) = raw(SocketAddr::new(ip, 0));
            // SAFETY: a sockaddr_in is as long as a sockaddr, and lies at the start of the storage.
            request.ifr_ifru.ifru_addr = unsafe { *(&raw const name).cast::<libc::sockaddr>() };
            // SAFETY: request is a valid ifreq.
            check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) })?;
        }
        IpAddr::V6(v6) => {
            /// `struct in6_ifreq` of linux/ipv6.h.
            #[repr(C)]
            struct Request {
                addr: [u8; 16],
                prefix: u32,
                index: c_int,
            }
            let request = Request { addr: v6.octets(), prefix: 128, index: 1 };
            // SAFETY: request is a valid in6_ifreq.
            check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) })?;
        }
    }
    Ok(())
}

fn send_from(fd: c_int, to: SocketAddr, source: IpAddr, data: &[u8]) -> Result<(), c_int> {
    use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
    let part = [std::io::IoSlice::new(data)];
    let to = SockaddrStorage::from(to);
    let sent = match source {
        IpAddr::V4(ip) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            sendmsg(fd, &part, &[ControlMessage::Ipv4PacketInfo(&info)], MsgFlags::empty(), Some(&to))
        }
        IpAddr::V6(ip) => {
            let info = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: ip.octets() }, ipi6_ifindex: 0 };
            sendmsg(fd, &part, &[ControlMessage::Ipv6PacketInfo(&info)], MsgFlags::empty(), Some(&to))
        }
    };
    sent.map(drop).map_err(|e| e as c_int)
}
