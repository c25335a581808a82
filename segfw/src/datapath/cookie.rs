//! The cookie of a network namespace on kernels before 5.14, which have no SO_NETNS_COOKIE: a program of our own at the
//! cgroup of this process tells it whenever this process makes a socket.
//!
//! It judges nothing and is gone with the process: its link is not pinned.

use super::sys;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const PROG_TYPE_CGROUP_SOCK: u32 = 9;
const CGROUP_INET_SOCK_CREATE: u32 = 2;
/// Threads that ask at a time: the agent has a handful.
const THREADS: u32 = 256;

struct Teller {
    /// Thread (as `bpf_get_current_pid_tgid` has it) to cookie.
    cookies: OwnedFd,
    _link: OwnedFd,
    cgroup: PathBuf,
}

static TELLER: Mutex<Option<Teller>> = Mutex::new(None);

/// Cookie of the namespace the calling thread is in; `make_socket` makes an Internet socket there.
pub fn of_thread(cgroup: &Path, make_socket: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<u64> {
    let mut teller = TELLER.lock().unwrap_or_else(PoisonError::into_inner);
    // The process may have been moved since.
    if teller.as_ref().is_none_or(|t| t.cgroup != cgroup) {
        *teller = Some(Teller::new(cgroup)?);
    }
    let Some(teller) = teller.as_ref() else { return Err(io::ErrorKind::NotFound.into()) };
    let _socket = make_socket()?;
    let thread = u64::from(std::process::id()) << 32 | u64::from(nix::unistd::gettid().as_raw() as u32);
    let cookie = sys::map_lookup::<u64, u64>(teller.cookies.as_fd(), &thread)?;
    // Not there: this process has another number where the kernel counts (a PID namespace of its own).
    cookie.filter(|cookie| *cookie != 0).ok_or_else(|| io::ErrorKind::NotFound.into())
}

impl Teller {
    fn new(cgroup: &Path) -> io::Result<Self> {
        let cookies = sys::map_create(sys::MAP_TYPE_HASH, 8, 8, THREADS, 0, "netns_cookies")?;
        let program = sys::program_load(PROG_TYPE_CGROUP_SOCK, CGROUP_INET_SOCK_CREATE, &code(cookies.as_raw_fd()))?;
        let at = File::open(cgroup)?;
        let link = sys::link_create(program.as_fd(), at.as_raw_fd() as u32, CGROUP_INET_SOCK_CREATE, 0)?;
        Ok(Self { cookies, _link: link, cgroup: cgroup.to_owned() })
    }
}

/// `if (pid_tgid >> 32 == ours) cookies[pid_tgid] = bpf_get_netns_cookie(ctx); return 1;`
fn code(map: i32) -> Vec<sys::Instruction> {
    const FN_MAP_UPDATE_ELEM: i32 = 2;
    const PSEUDO_MAP_FD: u8 = 1;
    let ours = std::process::id() as i32;
    let i = sys::instruction;
    vec![
        i(0xbf, 0x16, 0, 0),                         // r6 = r1
        i(0x85, 0, 0, sys::FN_GET_CURRENT_PID_TGID), // r0 = pid_tgid
        i(0x7b, 0x0a, -8, 0),                        // *(u64 *)(fp - 8) = r0
        i(0x77, 0, 0, 32),                           // r0 >>= 32
        i(0x55, 0, 11, ours),                        // if r0 != ours goto end
        i(0xbf, 0x61, 0, 0),                         // r1 = r6
        i(0x85, 0, 0, sys::FN_GET_NETNS_COOKIE),     // r0 = cookie
        i(0x7b, 0x0a, -16, 0),                       // *(u64 *)(fp - 16) = r0
        i(0x18, PSEUDO_MAP_FD << 4 | 1, 0, map),     // r1 = map
        i(0, 0, 0, 0),
        i(0xbf, 0xa2, 0, 0), // r2 = fp
        i(0x07, 2, 0, -8),   // r2 -= 8
        i(0xbf, 0xa3, 0, 0), // r3 = fp
        i(0x07, 3, 0, -16),  // r3 -= 16
        i(0xb7, 4, 0, 0),    // r4 = BPF_ANY
        i(0x85, 0, 0, FN_MAP_UPDATE_ELEM),
        i(0xb7, 0, 0, 1), // end: return 1
        i(0x95, 0, 0, 0),
    ]
}
