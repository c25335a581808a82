//! Links: made once, pinned at once, owned by the pin alone.
//!
//! The agent keeps no descriptor of a link, so neither its death nor a forked child changes what is attached. A newer
//! build puts its programs behind the existing links (`BPF_LINK_UPDATE`); it never detaches first.

use super::load::MadeBy;
use super::{Datapath, Error, sys};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// One place where a program sits.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    /// Name of the program, and of the pin.
    pub program: &'static str,
    /// `enum bpf_attach_type`.
    pub attach_type: u32,
}

/// The order in which hooks are attached: first those that only learn who is who, then those that refuse. In between a
/// new host is as open as it was before; an enforcing one already has them all.
pub const HOOKS: [Hook; 10] = [
    Hook { program: "tcp_life", attach_type: 3 },
    Hook { program: "sock_release", attach_type: 34 },
    Hook { program: "post_bind4", attach_type: 12 },
    Hook { program: "post_bind6", attach_type: 13 },
    Hook { program: "sock_create", attach_type: 2 },
    Hook { program: "connect4", attach_type: 10 },
    Hook { program: "connect6", attach_type: 11 },
    Hook { program: "sendmsg4", attach_type: 14 },
    Hook { program: "sendmsg6", attach_type: 15 },
    INGRESS,
];

/// Gate skb, and what judges all that is no TCP: a call for each packet that comes in. The last of [`HOOKS`], and
/// the one that need not be there: not on hosts with gate conn where nothing else needs it (see `agent::gate`).
pub const INGRESS: Hook = Hook { program: "skb_ingress", attach_type: 0 };

/// Attached only while some segment holds a grant or some rule has an end: it costs a call per packet.
pub const EGRESS: Hook = Hook { program: "skb_egress", attach_type: 1 };

/// Watches cgroups being made. Not a cgroup hook: a tracepoint, which needs tracefs to be found.
pub const CGROUP_MADE: &str = "cgroup_made";
/// The program that stands in for it below 6.1; its link is pinned under the same name.
pub(super) const CGROUP_MADE_BY_TYPE: &str = "cgroup_made_by_type";

/// Where tracefs describes the event that [`CGROUP_MADE`] needs.
const EVENT: &str = "/sys/kernel/tracing/events/cgroup/cgroup_mkdir";
/// Fields the program reads, as the kernel must describe them.
const EVENT_FIELDS: [&str; 3] = [
    "field:int root;\toffset:8;\tsize:4;",
    "field:u64 id;\toffset:16;\tsize:8;",
    "field:__data_loc char[] path;\toffset:24;\tsize:4;",
];

const BPF_PERF_EVENT: u32 = 41;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// What `attach` did with a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There was no link.
    Attached,
    /// The link was there with this very program.
    Adopted,
    /// The link was there and now runs this build's program.
    Replaced,
    /// A link was pinned, but it was detached or sat elsewhere: a new one took its place.
    Restored,
}

/// A pinned link as it is in the kernel.
#[derive(Clone, Debug)]
pub struct LinkState {
    /// Name of the program and the pin.
    pub name: String,
    /// The link; `None` = there is no pin.
    pub link: Option<sys::LinkInfo>,
    /// Instructions of this build's program.
    pub instructions: u32,
    /// Instructions the verifier walked.
    pub verified: u32,
}

impl Datapath {
    /// Attaches a hook to a cgroup, or takes over the link that is pinned.
    pub fn attach(&self, hook: Hook, cgroup: &File) -> Result<Outcome, Error> {
        let pin = self.dir.join(format!("link-{}", hook.program));
        let program = self.program(hook.program)?;
        let describe = |what: &str| format!("{what} {} (attach type {})", hook.program, hook.attach_type);
        let mut outcome = Outcome::Attached;
        if let Some(link) = sys::get(&pin).map_err(|e| Error::sys(describe("open the link of"), e))? {
            let here = cgroup.metadata().map_err(|e| Error::sys(describe("read the cgroup for"), e))?.ino();
            if sys::link_info(link.as_fd()).is_ok_and(|info| info.cgroup == here) {
                return self.adopt(link.as_fd(), hook.program);
            }
            outcome = Outcome::Restored;
        }
        let link = sys::link_create(program, cgroup.as_raw_fd() as u32, hook.attach_type, 0).map_err(|e| {
            let hint = match e.raw_os_error() {
                Some(libc::EPERM) => {
                    ": a program that does not share (not BPF_F_ALLOW_MULTI) sits here or above, or CAP_NET_ADMIN is missing"
                }
                Some(libc::E2BIG) => ": 64 programs are attached here already, the kernel's limit",
                Some(_) | None => "",
            };
            Error::sys(format!("{}{hint}", describe("attach")), e)
        })?;
        pin_over(link.as_fd(), &pin).map_err(|e| Error::sys(describe("pin the link of"), e))?;
        Ok(outcome)
    }

    fn adopt(&self, link: BorrowedFd<'_>, name: &str) -> Result<Outcome, Error> {
        let describe = |what: &str| format!("{what} {name}");
        let program = self.program(name)?;
        let have = sys::link_info(link).map_err(|e| Error::sys(describe("read the link of"), e))?;
        let want = sys::program_info(program).map_err(|e| Error::sys(describe("read the program"), e))?;
        if have.program == want.id {
            return Ok(Outcome::Adopted);
        }
        sys::link_update(link, program).map_err(|e| Error::sys(describe("replace the program of"), e))?;
        Ok(Outcome::Replaced)
    }

    /// Attaches the outer wall to an interface of the agent's own network namespace, native mode only.
    pub fn attach_xdp(&self, interface: &str) -> Result<Outcome, Error> {
        let pin = self.dir.join(format!("link-xdp-{interface}"));
        let index = nix::net::if_::if_nametoindex(interface)
            .map_err(|e| Error::sys(format!("interface {interface}"), std::io::Error::from(e)))?;
        let mut outcome = Outcome::Attached;
        if let Some(link) = sys::get(&pin).map_err(|e| Error::sys(format!("open the XDP link of {interface}"), e))? {
            // For a link of this kind the kernel says the interface where it says the cgroup of others; 0 = it is gone.
            if sys::link_info(link.as_fd()).is_ok_and(|info| info.cgroup as u32 == index) {
                return self.adopt(link.as_fd(), "outer_wall");
            }
            outcome = Outcome::Restored;
        }
        let link = sys::link_create(self.program("outer_wall")?, index, BPF_XDP, XDP_FLAGS_DRV_MODE)
            .map_err(|e| Error::sys(format!("attach XDP to {interface} (native mode)"), e))?;
        pin_over(link.as_fd(), &pin).map_err(|e| Error::sys(format!("pin the XDP link of {interface}"), e))?;
        Ok(outcome)
    }

    /// Attaches the watch of cgroups being made. A link of this kind cannot be given another program, so the new one is
    /// pinned beside the old one before that goes: for a moment both write the same.
    pub fn attach_cgroup_made(&self) -> Result<(), Error> {
        let event = |what: &str, e| Error::sys(format!("{what} {EVENT}"), e);
        let pin = self.dir.join(format!("link-{CGROUP_MADE}"));
        let program = self.program(self.watch_of_cgroups()?)?;
        let ours = sys::program_info(program).map_err(|e| event("read the program for", e))?.id;
        if let Some(link) = sys::get(&pin).map_err(|e| event("open the link to", e))?
            && sys::link_info(link.as_fd()).is_ok_and(|info| info.program == ours)
        {
            return Ok(());
        }
        if self.features.cgroup_made == MadeBy::Types {
            let link = sys::event_link_create(program).map_err(|e| event("attach to", e))?;
            return pin_over(link.as_fd(), &pin).map_err(|e| event("pin the link to", e));
        }
        let read = |file: &str| std::fs::read_to_string(format!("{EVENT}/{file}"));
        let format = read("format").map_err(|e| event("no tracefs, or a kernel without", e))?;
        if let Some(field) = EVENT_FIELDS.iter().find(|field| !format.contains(*field)) {
            let what = format!("this kernel describes the event otherwise ({field:?} is missing):");
            return Err(event(&what, std::io::ErrorKind::Unsupported.into()));
        }
        let id = read("id").map_err(|e| event("read", e))?;
        let id = id.trim().parse().map_err(|_| event("read", std::io::ErrorKind::InvalidData.into()))?;
        let perf = sys::tracepoint_open(id).map_err(|e| event("open", e))?;
        let link =
            sys::link_create(program, perf.as_raw_fd() as u32, BPF_PERF_EVENT, 0).map_err(|e| event("attach to", e))?;
        pin_over(link.as_fd(), &pin).map_err(|e| event("pin the link to", e))
    }

    /// The program that watches cgroups being made on this kernel.
    fn watch_of_cgroups(&self) -> Result<&'static str, Error> {
        match self.features.cgroup_made {
            MadeBy::Event => Ok(CGROUP_MADE),
            MadeBy::Types => Ok(CGROUP_MADE_BY_TYPE),
            MadeBy::Nothing => {
                let what = "programs may not read the kernel's memory here (lockdown=confidentiality), or it tells no types (BTF)";
                Err(Error::sys(what, std::io::ErrorKind::Unsupported.into()))
            }
        }
    }

    /// Takes a hook away: [`EGRESS`] or [`INGRESS`], while nothing in force needs it, so nothing is left that it would
    /// have judged. With [`Datapath::drop_check`] the one place besides [`remove`] that ends a link.
    pub fn drop_hook(&self, hook: Hook) -> Result<(), Error> {
        self.unpin(hook.program)
    }

    pub(super) fn unpin(&self, program: &str) -> Result<(), Error> {
        let pin = self.dir.join(format!("link-{program}"));
        match std::fs::remove_file(&pin) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(Error::Io { what: "cannot remove", path: pin.display().to_string(), source }),
        }
    }

    /// Every pinned link as the kernel has it now.
    pub fn links(&self) -> Result<Vec<LinkState>, Error> {
        let mut states = Vec::new();
        for hook in HOOKS.iter().chain([&EGRESS]) {
            let pin = self.dir.join(format!("link-{}", hook.program));
            let link = match sys::get(&pin).map_err(|e| Error::sys(format!("open {}", pin.display()), e))? {
                Some(link) => sys::link_info(link.as_fd()).ok(),
                None => None,
            };
            let info = sys::program_info(self.program(hook.program)?)
                .map_err(|e| Error::sys(format!("read the program {}", hook.program), e))?;
            states.push(LinkState {
                name: hook.program.to_owned(),
                link,
                instructions: info.instructions,
                verified: info.verified,
            });
        }
        let pin = self.dir.join(format!("link-{CGROUP_MADE}"));
        let link = sys::get(&pin).map_err(|e| Error::sys(format!("open {}", pin.display()), e))?;
        // Where nothing watches there is nothing to tell of.
        let Ok(watch) = self.watch_of_cgroups() else { return Ok(states) };
        let info =
            sys::program_info(self.program(watch)?).map_err(|e| Error::sys(format!("read the program {watch}"), e))?;
        states.push(LinkState {
            name: CGROUP_MADE.to_owned(),
            // A link to an event has no cgroup; 1 says that it is attached.
            link: link.and_then(|l| sys::link_info(l.as_fd()).ok()).map(|i| sys::LinkInfo { cgroup: 1, ..i }),
            instructions: info.instructions,
            verified: info.verified,
        });
        Ok(states)
    }
}

/// Pins an object in the place of whatever is pinned there: beside it first, so that there is no moment without one.
pub(super) fn pin_over(object: BorrowedFd<'_>, at: &Path) -> std::io::Result<()> {
    let mut aside = at.as_os_str().to_owned();
    aside.push("-new");
    let aside = Path::new(&aside);
    match std::fs::remove_file(aside) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    sys::pin(object, aside)?;
    std::fs::rename(aside, at)
}

/// Removes every pin below `pin_dir`: the links go with them, and nothing is enforced any more. For uninstall and tests.
pub fn remove(pin_dir: &Path) -> std::io::Result<()> {
    if !pin_dir.exists() {
        return Ok(());
    }
    for layout in std::fs::read_dir(pin_dir)? {
        remove_layout(&layout?.path())?;
    }
    std::fs::remove_dir(pin_dir)
}

/// Removes the programs and maps of other layouts, which an older or newer build left: to be called when this build's own
/// programs are attached. Until then both judge, and what either refuses is refused. Returns what was removed.
pub fn remove_other_layouts(pin_dir: &Path, keep: &Path) -> std::io::Result<Vec<std::path::PathBuf>> {
    let mut removed = Vec::new();
    for layout in std::fs::read_dir(pin_dir)? {
        let layout = layout?.path();
        if layout != keep {
            remove_layout(&layout)?;
            removed.push(layout);
        }
    }
    Ok(removed)
}

fn remove_layout(layout: &Path) -> std::io::Result<()> {
    // Links first: a map without its pin lives on as long as an attached program uses it.
    let mut entries: Vec<_> = std::fs::read_dir(layout)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(|e| !e.file_name().to_string_lossy().starts_with("link-"));
    for entry in entries {
        std::fs::remove_file(entry.path())?;
    }
    std::fs::remove_dir(layout)
}
