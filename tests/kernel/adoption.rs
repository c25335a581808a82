//! An agent that starts anew takes over what is attached; what is attached outlives every agent.

use crate::{Options, Tally};
use anyhow::{Context, Result, bail, ensure};
use segfw::datapath::attach::{self, CGROUP_MADE, EGRESS, HOOKS, Outcome};
use segfw::datapath::{Datapath, sys};
use segfw_tests::scratch::{Scratch, cgroup_id};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

type Step = (&'static str, fn(&mut Stage) -> Result<()>);

pub(crate) fn run(_: &Options, tally: &mut Tally) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut stage = Stage::new(&scratch)?;
    let steps: [Step; 7] = [
        ("the first agent attaches", Stage::attaches),
        ("the same agent adopts its own links", Stage::adopts),
        ("the second agent puts its programs behind the same links", Stage::replaces),
        ("links outlive both agents", Stage::outlives),
        ("the third agent finds links, maps and counters", Stage::finds),
        ("remove ends all", Stage::removes),
        ("another layout goes when ours is attached, not before", Stage::changes_layout),
    ];
    for (what, step) in steps {
        // Each stands on the one before.
        let result = step(&mut stage);
        let failed = result.is_err();
        tally.count(format!("adoption: {what}"), result);
        if failed {
            break;
        }
    }
    Ok(())
}

struct Stage {
    pins: std::path::PathBuf,
    cgroup: File,
    cgroup_id: u64,
    agents: Vec<Datapath>,
    links: Vec<u32>,
}

impl Stage {
    fn new(scratch: &Scratch) -> Result<Self> {
        let path = scratch.cgroup("")?;
        let cgroup_id = cgroup_id(&path)?;
        let pins = scratch.pins().to_owned();
        Ok(Self { agents: vec![Datapath::load(&pins)?], pins, cgroup: File::open(path)?, cgroup_id, links: vec![] })
    }

    fn attach(&self, agent: &Datapath, want: Outcome) -> Result<Vec<u32>> {
        for hook in HOOKS.iter().chain([&EGRESS]) {
            let got = agent.attach(*hook, &self.cgroup)?;
            ensure!(got == want, "{}: {got:?}", hook.program);
        }
        let mut ids = Vec::new();
        // The event of new cgroups is the whole machine's; `system` has it.
        for state in agent.links()?.into_iter().filter(|l| l.name != CGROUP_MADE) {
            let link = state.link.with_context(|| format!("{} has no link", state.name))?;
            let program = sys::program_info(agent.program(&state.name)?)?;
            ensure!(link.program == program.id, "{}: another program is behind the link", state.name);
            ensure!(link.cgroup == self.cgroup_id, "{}: cgroup {}", state.name, link.cgroup);
            ids.push(link.id);
        }
        Ok(ids)
    }

    fn attaches(&mut self) -> Result<()> {
        let agent = &self.agents[0];
        let mut sizes: Vec<(u32, u32, &str)> = Vec::new();
        for name in agent.programs() {
            let info = sys::program_info(agent.program(name)?)?;
            sizes.push((info.instructions, info.verified, name));
        }
        sizes.sort_unstable();
        sizes.reverse();
        let text: Vec<_> = sizes.iter().map(|(n, walked, name)| format!("{name} {n} ({walked})")).collect();
        println!("adoption: instructions (walked by the verifier): {}", text.join(", "));
        self.links = self.attach(agent, Outcome::Attached)?;
        Ok(())
    }

    fn adopts(&mut self) -> Result<()> {
        let links = self.attach(&self.agents[0], Outcome::Adopted)?;
        ensure!(links == self.links, "{:?}, then {links:?}", self.links);
        Ok(())
    }

    fn replaces(&mut self) -> Result<()> {
        let second = Datapath::load(&self.pins)?;
        let links = self.attach(&second, Outcome::Replaced)?;
        ensure!(links == self.links, "{:?}, then {links:?}", self.links);
        let links = self.attach(&second, Outcome::Adopted)?;
        ensure!(links == self.links, "{:?}, then {links:?}", self.links);
        // The same maps, not copies.
        for map in ["CONTROL", "ENDPOINTS", "SOCKETS", "EVENTS"] {
            let id = |agent: &Datapath| -> Result<u32> { Ok(sys::map_info(agent.map(map)?)?.id) };
            ensure!(id(&second)? == id(&self.agents[0])?, "{map} is another map");
        }
        self.agents.push(second);
        Ok(())
    }

    fn outlives(&mut self) -> Result<()> {
        self.agents.clear();
        for hook in HOOKS.iter().chain([&EGRESS]) {
            let pin = segfw::datapath::load::layout_dir(Path::new(&self.pins), segfw_common::ABI_VERSION)
                .join(format!("link-{}", hook.program));
            let link = sys::get(&pin)?.with_context(|| format!("{} is gone", pin.display()))?;
            let info = sys::link_info(link.as_fd())?;
            ensure!(self.links.contains(&info.id) && info.cgroup == self.cgroup_id, "{info:?}");
        }
        Ok(())
    }

    fn finds(&mut self) -> Result<()> {
        let third = Datapath::load(&self.pins)?;
        let links = self.attach(&third, Outcome::Replaced)?;
        ensure!(links == self.links, "{:?}, then {links:?}", self.links);
        third.drop_hook(EGRESS)?;
        let left: Vec<_> = third.links()?.into_iter().filter(|l| l.link.is_none()).map(|l| l.name).collect();
        ensure!(left == [EGRESS.program, CGROUP_MADE], "without a link: {left:?}");
        let gone = self.links.pop().context("links")?;
        ensure!(!exists(gone)?, "the egress link is still there");
        self.agents.push(third);
        Ok(())
    }

    fn removes(&mut self) -> Result<()> {
        for link in &self.links {
            ensure!(exists(*link)?, "link {link} ended too early");
        }
        // With an agent still there: it holds programs and maps, never links.
        attach::remove(&self.pins)?;
        ensure!(!self.pins.exists(), "{} is still there", self.pins.display());
        for link in &self.links {
            ensure!(!exists(*link)?, "link {link} is still there");
        }
        attach::remove(&self.pins)?;
        Ok(())
    }

    /// An agent of an older layout left its programs; a newer one attaches its own beside them before they go.
    fn changes_layout(&mut self) -> Result<()> {
        let attached = |dir: &Path| -> Result<usize> {
            let mut links = 0;
            for hook in HOOKS {
                if let Some(link) = sys::get(&dir.join(format!("link-{}", hook.program)))? {
                    links += usize::from(sys::link_info(link.as_fd())?.cgroup == self.cgroup_id);
                }
            }
            Ok(links)
        };
        let older = Datapath::load_as(&self.pins, 0)?;
        for hook in HOOKS {
            let _ = older.attach(hook, &self.cgroup)?;
        }
        let before = older.dir.clone();
        drop(older);
        let newer = Datapath::load(&self.pins)?;
        ensure!(newer.dir != before, "both layouts share {}", before.display());
        for hook in HOOKS {
            let outcome = newer.attach(hook, &self.cgroup)?;
            ensure!(outcome == Outcome::Attached, "{}: {outcome:?} a link of another layout", hook.program);
        }
        ensure!(attached(&before)? == HOOKS.len() && attached(&newer.dir)? == HOOKS.len(), "not both are attached");
        let removed = attach::remove_other_layouts(&self.pins, &newer.dir)?;
        ensure!(removed == [before.clone()], "removed {removed:?}");
        ensure!(!before.exists() && attached(&newer.dir)? == HOOKS.len(), "ours did not stay");
        attach::remove(&self.pins)?;
        Ok(())
    }
}

/// Does the kernel have a link of this number? Links are ended by a worker, so not at once.
fn exists(link: u32) -> Result<bool> {
    const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
    for _ in 0..100 {
        let mut attr = [0u32; 16];
        attr[0] = link;
        // SAFETY: the attribute is as long as we say, and holds no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_GET_FD_BY_ID, attr.as_mut_ptr(), size_of_val(&attr)) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::ENOENT) {
                return Ok(false);
            }
            bail!(error);
        }
        // SAFETY: the kernel just gave us this descriptor.
        drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd as i32) });
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
    Ok(true)
}
