//! Programs at the kernel's own security checks: gate conn and the list of address families.
//!
//! A check `X` has two doors: BPF LSM (`bpf_lsm_X`, only where `bpf` is in the kernel's list of LSMs; elsewhere such a
//! program loads, attaches, and is never asked) and `fmod_ret` of `security_X`, which works without it. LSM comes first: a
//! `fmod_ret` program that is interrupted on its CPU by a task that comes to the same program is skipped there (recursion
//! check of kernel/bpf/trampoline.c, 5.12), and skipped means passed. aya 0.14 knows no `fmod_ret`, so both are loaded
//! here, from the object that aya has parsed too and with the maps that aya made.

use super::attach::{Outcome, pin_over};
use super::btf::Btf;
use super::sys::{Instruction, instruction};
use super::{Datapath, Error, sys};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use segfw_common::conn::{AF_UNIX, CANARY_PROTOCOL, Layout};
use segfw_common::{Identity, Listener};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{MutexGuard, PoisonError};

/// The door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// BPF LSM.
    Lsm,
    /// `fmod_ret`.
    FmodRet,
}

impl Door {
    /// `lsm`, `fmod_ret`: as the section of a program would be called.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lsm => "lsm",
            Self::FmodRet => "fmod_ret",
        }
    }

    /// (program type, attach type, beginning of the function's name), from include/uapi/linux/bpf.h.
    const fn kernel(self) -> (u32, u32, &'static str) {
        match self {
            Self::Lsm => (29, 27, "bpf_lsm_"),
            Self::FmodRet => (26, 26, "security_"),
        }
    }
}

/// A security check that a program of ours answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Name of the program, and of the pin.
    pub program: &'static str,
    /// Of the kernel's function, without what stands before it.
    function: &'static str,
    arguments: &'static [&'static str],
}

/// Gate conn.
pub const CONN: Check = Check {
    program: "conn_request",
    function: "inet_conn_request",
    arguments: &["sock *", "sk_buff *", "request_sock *"],
};

/// The list of address families.
pub const FAMILY: Check =
    Check { program: "socket_family", function: "socket_create", arguments: &["int", "int", "int", "int"] };

/// Every check there is.
pub const CHECKS: [Check; 2] = [CONN, FAMILY];

/// What this kernel's BTF says of the structures gate conn reads. `None` = something is not as we know it.
pub fn layout(btf: &Btf) -> Option<Layout> {
    Some(Layout {
        cookie: btf.offset("sock", &["__sk_common", "skc_cookie"], 8)?,
        head: btf.offset("sk_buff", &["head"], 8)?,
        network_header: btf.offset("sk_buff", &["network_header"], 2)?,
    })
}

/// A protocol that nobody else asks for: see [`Door::find`].
const PROBE_PROTOCOL: u32 = 0x5e9e;

impl Door {
    /// The first door through which a refusal reaches a process: a program of a few instructions refuses one protocol that
    /// does not exist. Its own program and not ours: what an earlier agent left must not answer for a door that is shut.
    ///
    /// # Errors
    ///
    /// Why neither works, one line a door.
    pub fn find(btf: &Btf) -> Result<Self, String> {
        let mut why = Vec::new();
        for door in [Self::Lsm, Self::FmodRet] {
            match door.try_out(btf) {
                Ok(true) => return Ok(door),
                Ok(false) => why.push(format!("{}: attached, and never asked", door.as_str())),
                Err(error) => why.push(format!("{}: {error}", door.as_str())),
            }
        }
        Err(why.join("; "))
    }

    fn try_out(self, btf: &Btf) -> io::Result<bool> {
        // r2 = arguments[2] (protocol); r0 = -EPERM; if its low 32 bits are PROBE_PROTOCOL exit; r0 = 0; exit.
        let code = [
            instruction(0x79, 0x12, 16, 0),
            instruction(0xb7, 0, 0, -1),
            instruction(0x16, 2, 1, PROBE_PROTOCOL as i32),
            instruction(0xb7, 0, 0, 0),
            instruction(0x95, 0, 0, 0),
        ];
        let program = self.load(btf, &FAMILY, &code, "segfw_probe")?;
        let _link = sys::tracing_attach(program.as_fd())?;
        Ok(refused(PROBE_PROTOCOL))
    }

    fn load(self, btf: &Btf, check: &Check, code: &[Instruction], name: &str) -> io::Result<OwnedFd> {
        let (kind, attach_type, before) = self.kernel();
        let function = format!("{before}{}", check.function);
        let id = btf.function(&function, check.arguments).ok_or_else(|| {
            io::Error::new(io::ErrorKind::Unsupported, format!("this kernel has no {function} as we know it"))
        })?;
        sys::tracing_load(kind, attach_type, id, code, name)
    }
}

/// Is a local socket of this protocol refused as a security check does (EPERM), and not as the kernel itself does?
fn refused(protocol: u32) -> bool {
    // SAFETY: a plain call; a descriptor that comes back, against all that is known of protocols, is closed.
    let fd = unsafe { libc::socket(AF_UNIX as i32, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol as i32) };
    if fd < 0 {
        return io::Error::last_os_error().raw_os_error() == Some(libc::EPERM);
    }
    // SAFETY: ours, and used no more.
    let _ = unsafe { libc::close(fd) };
    false
}

impl Datapath {
    /// Loads and attaches the program of a check, in place of one that an earlier agent left: links of this kind take no
    /// other program, so the new one is pinned first. Whether the kernel asks it is for [`Datapath::asks`] to say.
    fn attach_check(&self, check: Check, door: Door, btf: &Btf) -> Result<Outcome, Error> {
        let describe = |what: &str| format!("{what} {} ({})", check.program, door.as_str());
        let code = self
            .security
            .get(check.program)
            .ok_or_else(|| Error::Missing { kind: "program", name: check.program.to_owned() })?;
        let program =
            door.load(btf, &check, code, check.program).map_err(|e| Error::sys(describe("load the program"), e))?;
        let link = sys::tracing_attach(program.as_fd()).map_err(|e| Error::sys(describe("attach"), e))?;
        let pin = self.dir.join(format!("link-{}", check.program));
        let was = sys::get(&pin).is_ok_and(|link| link.is_some());
        pin_over(link.as_fd(), &pin).map_err(|e| Error::sys(describe("pin the link of"), e))?;
        let _ = self.checks().insert(check.program, program);
        Ok(if was { Outcome::Replaced } else { Outcome::Attached })
    }

    /// Takes the program of a check away: it was attached and the kernel does not ask it, or the settings say so.
    pub fn drop_check(&self, check: Check) -> Result<(), Error> {
        let _ = self.checks().remove(check.program);
        self.unpin(check.program)
    }

    fn checks(&self) -> MutexGuard<'_, BTreeMap<&'static str, OwnedFd>> {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The check's program as the kernel has it; `None` = it is not attached.
    pub fn check_info(&self, check: Check) -> Option<sys::ProgramInfo> {
        self.checks().get(check.program).and_then(|p| sys::program_info(p.as_fd()).ok())
    }

    /// Is the check's own program behind its pinned link?
    pub fn has_check(&self, check: Check) -> bool {
        let Some(ours) = self.check_info(check) else { return false };
        let link = sys::get(&self.dir.join(format!("link-{}", check.program))).ok().flatten();
        link.and_then(|link| sys::link_info(link.as_fd()).ok()).is_some_and(|info| info.program == ours.id)
    }

    /// The canary: does the program of the check refuse what every policy refuses, and (gate conn) let through what none
    /// does? `None` = cannot be tried here (no loopback).
    pub fn asks(&self, check: Check) -> Option<Result<(), String>> {
        if check == FAMILY {
            let why = "a local socket of a protocol that is refused to everybody met only the kernel's own refusal";
            return Some(if refused(CANARY_PROTOCOL) { Ok(()) } else { Err(why.to_owned()) });
        }
        self.conn_canary()
    }
}

impl Datapath {
    /// Two listeners of ours on loopback: one that is the canary's, which is refused always, and one of whom no policy
    /// speaks. To every other hook both are the latter.
    fn conn_canary(&self) -> Option<Result<(), String>> {
        let refused = self.knock(Identity::CANARY)?;
        let passed = self.knock(Identity::CANARY_OPEN)?;
        // Over loopback a handshake is over when `connect` returns, but where the machine is busy and leaves packets to
        // ksoftirqd. They go in turn: once the second came through, the first was decided.
        passed.wait();
        Some(match (refused.is_connected(), passed.is_connected()) {
            (false, true) => Ok(()),
            (true, _) => Err("a connection on loopback to a listener that is always refused was made".to_owned()),
            (false, false) => Err("no connection on loopback is made, not even to a listener of nobody".to_owned()),
        })
    }

    /// Begins a connection to a listener of this identity.
    fn knock(&self, listens: Identity) -> Option<Knock<'_>> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
        let listeners = self.map("LISTENERS").ok()?;
        let listener = TcpListener::bind("127.0.0.1:0").ok()?;
        self.mark(listener.as_fd(), Identity::CANARY_OPEN).ok()?;
        let cookie = socket_cookie(listener.as_fd()).ok()?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let client = socket(AddressFamily::Inet, SockType::Stream, flags, None).ok()?;
        self.mark(client.as_fd(), Identity::CANARY_OPEN).ok()?;
        let to = SockaddrStorage::from(listener.local_addr().ok()?);
        let entry = Listener { identity: listens.0, ..Listener::default() };
        sys::map_update(listeners, &cookie, &entry).ok()?;
        let knock = Knock { client, _listener: listener, listeners, cookie };
        match connect(knock.client.as_raw_fd(), &to) {
            Ok(()) | Err(nix::Error::EINPROGRESS) => Some(knock),
            Err(_) => None,
        }
    }
}

/// How long a canary's connection may take, in ms: less than the second after which its SYN would be sent again.
const KNOCK: u16 = 500;

/// A connection that was begun, with its listener and the listener's entry in `LISTENERS`; all go with it.
struct Knock<'a> {
    client: OwnedFd,
    _listener: TcpListener,
    listeners: BorrowedFd<'a>,
    cookie: u64,
}

impl Knock<'_> {
    /// Waits until it is made, but no longer than [`KNOCK`].
    fn wait(&self) {
        let _ = poll(&mut [PollFd::new(self.client.as_fd(), PollFlags::POLLOUT)], PollTimeout::from(KNOCK));
    }

    fn is_connected(&self) -> bool {
        nix::sys::socket::getpeername::<nix::sys::socket::SockaddrStorage>(self.client.as_raw_fd()).is_ok()
    }
}

impl Drop for Knock<'_> {
    fn drop(&mut self) {
        let _ = sys::map_delete(self.listeners, &self.cookie);
    }
}

/// `SO_COOKIE`: the kernel's own number of a socket.
fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer has the length that is given.
    let rc = unsafe {
        let to = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_COOKIE, to, &raw mut length)
    };
    if rc == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// What stands at the security checks, each with the door or why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checks {
    /// Gate conn.
    pub conn: Result<Door, String>,
    /// The list of address families.
    pub family: Result<Door, String>,
}

impl Datapath {
    /// Attaches the programs of the checks, and keeps those that the canary finds at work. `conn` is an error where gate conn
    /// is not wanted, or may not be: then nothing of it stays.
    pub fn attach_checks(&self, conn: Result<(), String>) -> Checks {
        let btf = Btf::of_kernel().map_err(|e| format!("no BTF: {e}"));
        let door = btf.as_ref().map_err(Clone::clone).and_then(Door::find);
        let conn = conn.and_then(|()| match &btf {
            Ok(btf) if layout(btf).is_none() => {
                Err("this kernel keeps sockets otherwise than gate conn knows".to_owned())
            }
            _ => Ok(()),
        });
        let one = |check: Check, wanted: Result<(), String>| -> Result<Door, String> {
            let done = wanted.and_then(|()| door.clone()).and_then(|door| {
                let btf = btf.as_ref().map_err(Clone::clone)?;
                let _ = self.attach_check(check, door, btf).map_err(|e| e.to_string())?;
                let untried = || "it could not be tried out: no loopback here".to_owned();
                self.asks(check).ok_or_else(untried)?.map(|()| door)
            });
            if done.is_err()
                && let Err(error) = self.drop_check(check)
            {
                tracing::error!("{error}");
            }
            done
        };
        Checks { conn: one(CONN, conn), family: one(FAMILY, Ok(())) }
    }
}

/// The instructions of the checks' programs, relocated to the maps that aya made (`maps`: name to descriptor).
pub(super) fn instructions(
    object: &[u8],
    maps: &HashMap<String, i32>,
) -> Result<BTreeMap<&'static str, Vec<Instruction>>, Error> {
    let broken = |what: String| Error::Missing { kind: "program for a security check:", name: what };
    let mut object = aya_obj::Object::parse(object).map_err(|e| broken(e.to_string()))?;
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    let own = std::mem::take(&mut object.maps);
    if let Some(unknown) = own.keys().find(|name| !maps.contains_key(*name)) {
        return Err(Error::Missing { kind: "map", name: unknown.clone() });
    }
    let known = own.iter().map(|(name, map)| (name.as_str(), maps.get(name).copied().unwrap_or(-1), map));
    object.relocate_maps(known, &sections).map_err(|e| broken(e.to_string()))?;
    object.relocate_calls(&sections).map_err(|e| broken(e.to_string()))?;
    let mut all = BTreeMap::new();
    for check in CHECKS {
        let program = object.programs.get(check.program).ok_or_else(|| broken(check.program.to_owned()))?;
        let function = object.functions.get(&program.function_key()).ok_or_else(|| broken(check.program.to_owned()))?;
        // SAFETY: `struct bpf_insn` is eight bytes of plain data.
        let code = function.instructions.iter().map(|i| unsafe { std::mem::transmute::<_, Instruction>(*i) }).collect();
        let _ = all.insert(check.program, code);
    }
    Ok(all)
}
