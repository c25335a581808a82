//! The cgroup2 tree: where it is mounted, what it holds, and what changes in it.
//!
//! Paths are cgroup paths, as in `/proc/PID/cgroup`: `/system.slice/web.service`, and `/` for the root. Ids are what
//! `bpf_get_current_cgroup_id` and sock_diag say: 64 bits, not reused (fs/kernfs: inode number and generation).

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{CString, OsString};
use std::io::{self, PipeWriter};
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, mem};
use tokio::sync::mpsc;

/// Cgroups kept in mind: eight times the workloads a host may have (a service has children of its own). Reaching it
/// is counted and said; cgroups beyond it fall to their nearest registered ancestor in the kernel.
pub const MAX_CGROUPS: usize = 65_536;

/// Directories below each other; the hooks walk 16, systemd uses at most 8 or so. Ends a walk in a hostile tree.
pub const MAX_DEPTH: usize = 64;

/// Changes in one message: bounds its memory to some hundred kilobytes.
pub const MAX_BATCH: usize = 1_024;

/// Messages waiting for a slow reader. Behind them the kernel's own queue fills (16,384 events), and behind that a
/// rescan finds what was missed, so a slow reader costs delay and never a wrong end state.
pub const MAX_WAITING: usize = 16;

/// How often the tree is read whole where some directories cannot be watched; less often where that would take more
/// than a tenth of the time.
pub const RESCAN_UNWATCHED: Duration = Duration::from_secs(1);

/// How often it is read whole in any case: a net below the events, for some 30 µs per cgroup (debug build).
pub const RESCAN_WATCHED: Duration = Duration::from_secs(60);

/// One read of events: some thousand.
const EVENT_BUFFER: usize = 64 * 1024;

/// `st_nlink` of a directory without directories in it (fs/kernfs/inode.c, `kernfs_refresh_inode`: subdirectories + 2).
/// Most cgroups are leaves with 20 or more files, and reading those costs ten times as much as the stat.
const LINKS_OF_LEAF: u64 = 2;

/// `fid_type` of a kernfs file handle (include/linux/exportfs.h): its 8 bytes are the id.
const FILEID_KERNFS: i32 = 0xfe;

/// Why there is no cgroup2 tree to look at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing to enforce on.
    #[error(
        "cgroup v1 only: no cgroup2 file system is mounted; boot with systemd.unified_cgroup_hierarchy=1, \
             or mount one (`mount -t cgroup2 none /sys/fs/cgroup/unified`)"
    )]
    V1Only,
    /// `ip netns exec` and some containers hide it.
    #[error("no cgroup file system is visible in this mount namespace")]
    NotMounted,
    /// Ids from `stat` and from file handles are not the same number: 32-bit, or an old kernel.
    #[error(
        "cgroup ids are not inode numbers on this machine ({path}: inode {inode}, handle {handle}); needs a 64-bit \
             kernel of 5.5 or later"
    )]
    Ids { path: String, inode: u64, handle: u64 },
    /// Reading failed.
    #[error("{0}: {1}")]
    Io(String, #[source] io::Error),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.display().to_string();
    |error| Error::Io(path, error)
}

/// The cgroup2 mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// For example `/sys/fs/cgroup` or `/sys/fs/cgroup/unified`.
    pub mount: PathBuf,
    /// v1 controllers are mounted too: containers in v1 mode share one v2 cgroup and cannot be told apart.
    pub hybrid: bool,
    /// What of the tree the mount shows; other than `/` means that only a part of this machine is visible.
    pub root: PathBuf,
}

impl Hierarchy {
    /// Finds it, and makes sure that inode numbers are ids.
    pub fn find() -> Result<Self, Error> {
        let path = Path::new("/proc/self/mountinfo");
        let hierarchy = Self::parse(&fs::read(path).map_err(at(path))?)?;
        let inode = id_of(&hierarchy.mount).map_err(at(&hierarchy.mount))?;
        let handle = handle_id_of(&hierarchy.mount).map_err(at(&hierarchy.mount))?;
        if inode != handle {
            return Err(Error::Ids { path: hierarchy.mount.display().to_string(), inode, handle });
        }
        Ok(hierarchy)
    }

    /// From the text of mountinfo (proc_pid_mountinfo(5)).
    fn parse(mountinfo: &[u8]) -> Result<Self, Error> {
        let mut best: Option<Self> = None;
        let mut v1 = false;
        for line in mountinfo.split(|b| *b == b'\n') {
            let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
            let kind = fields.iter().position(|f| *f == b"-").and_then(|dash| fields.get(dash + 1));
            let (Some(kind), Some(root), Some(mount)) = (kind, fields.get(3), fields.get(4)) else { continue };
            match *kind {
                b"cgroup" => v1 = true,
                b"cgroup2" => {
                    let found = Self { mount: unescape(mount), hybrid: false, root: unescape(root) };
                    // The first that shows the whole tree, else the first.
                    if best.as_ref().is_none_or(|b| b.root != Path::new("/") && found.root == Path::new("/")) {
                        best = Some(found);
                    }
                }
                _ => {}
            }
        }
        match best {
            Some(found) => Ok(Self { hybrid: v1, ..found }),
            None if v1 => Err(Error::V1Only),
            None => Err(Error::NotMounted),
        }
    }

    /// Directory of a cgroup path.
    pub fn directory(&self, cgroup: &Path) -> PathBuf {
        self.mount.join(cgroup.strip_prefix("/").unwrap_or(cgroup))
    }

    /// Every cgroup and its id, without any watch. Cgroups that go away meanwhile are left out.
    pub fn scan(&self) -> Result<BTreeMap<PathBuf, u64>, Error> {
        let mut tree = Tree::new(self.clone(), None, 0);
        tree.reconcile(Path::new("/")).map_err(at(&self.mount))?;
        Ok(tree.known.into_iter().map(|(path, node)| (path, node.id)).collect())
    }
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|d| u8::from_str_radix(str::from_utf8(d).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = &tail[3..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// Id of the cgroup at this directory: its inode number ([`Hierarchy::find`] has checked that they are the same).
pub fn id_of(directory: &Path) -> io::Result<u64> {
    fs::metadata(directory).map(|m| m.ino())
}

/// The same from the file handle, which is where the kernel's documentation says it is.
pub fn handle_id_of(directory: &Path) -> io::Result<u64> {
    /// `struct file_handle` with room for the 8 bytes that kernfs writes.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        id: [u8; 8],
    }
    let path = CString::new(directory.as_os_str().as_bytes())?;
    let mut handle = Handle { bytes: 8, kind: 0, id: [0; 8] };
    let mut mount = 0;
    // SAFETY: `path` ends in NUL; `handle` has the layout of `struct file_handle` with `bytes` bytes behind it.
    let result =
        unsafe { libc::name_to_handle_at(libc::AT_FDCWD, path.as_ptr(), (&raw mut handle).cast(), &raw mut mount, 0) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if handle.kind != FILEID_KERNFS || handle.bytes != 8 {
        return Err(io::Error::other(format!("not a kernfs handle (type {:#x})", handle.kind)));
    }
    Ok(u64::from_ne_bytes(handle.id))
}

/// A systemd unit, by its cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit<'a> {
    /// Such as `web.service`.
    pub name: &'a str,
    /// Number of the user whose manager made it; `None` = the system's.
    pub uid: Option<u32>,
}

/// The unit that a cgroup is: slices from the root on, and then the unit (systemd, `CGROUP_DELEGATION.md`); for a user's
/// manager the same below `user@UID.service`. What lies below a unit is none, whatever its name: a service to which its
/// subtree was delegated, and a container, can make cgroups of any name.
pub fn unit(cgroup: &Path) -> Option<Unit<'_>> {
    let names: Vec<&str> = cgroup.iter().skip(1).map(|n| n.to_str().unwrap_or_default()).collect();
    let ends = |name: &str, end: &str| name.strip_suffix(end).is_some_and(|n| !n.is_empty());
    let mut uid = None;
    for (index, name) in names.iter().enumerate() {
        let last = index + 1 == names.len();
        if ends(name, ".slice") && !last {
            continue;
        }
        let manager = name.strip_prefix("user@").and_then(|n| n.strip_suffix(".service")).and_then(|n| n.parse().ok());
        if !last && uid.is_none() && manager.is_some() {
            uid = manager;
            continue;
        }
        let is_unit = [".service", ".socket", ".scope", ".slice"].iter().any(|end| ends(name, end));
        return (last && is_unit).then_some(Unit { name, uid });
    }
    None
}

/// One change of the tree. A parent appears before its children and goes after them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Is there now.
    Appeared { path: PathBuf, id: u64 },
    /// Is no longer there. The id is never used again; sockets may still carry it.
    Gone { path: PathBuf, id: u64 },
}

/// What the watcher has met; all counts only grow, except `unwatched`.
#[derive(Debug, Default)]
pub struct Counters {
    /// The kernel's event queue overflowed and the tree was read whole.
    pub overflows: AtomicU64,
    /// The tree was read whole, for whatever reason.
    pub rescans: AtomicU64,
    /// Cgroups without a watch at this moment (`fs.inotify.max_user_watches`); if not 0, changes below them are seen
    /// within [`RESCAN_UNWATCHED`] instead of at once.
    pub unwatched: AtomicU64,
    /// Times a cgroup was left out because of [`MAX_CGROUPS`] or [`MAX_DEPTH`].
    pub refused: AtomicU64,
    /// Reads of the tree that failed; tried again at the next rescan.
    pub errors: AtomicU64,
}

struct Node {
    id: u64,
    /// `None` = could not be watched.
    watch: Option<WatchDescriptor>,
}

/// What is known, and the watches on it.
struct Tree {
    hierarchy: Hierarchy,
    known: BTreeMap<PathBuf, Node>,
    by_watch: HashMap<WatchDescriptor, PathBuf>,
    inotify: Option<Inotify>,
    /// Watches we may have, below the kernel's own limit.
    max_watches: usize,
    unwatched: u64,
    changes: Vec<Change>,
    counters: Arc<Counters>,
}

impl Tree {
    fn new(hierarchy: Hierarchy, inotify: Option<Inotify>, max_watches: usize) -> Self {
        Self {
            hierarchy,
            known: BTreeMap::new(),
            by_watch: HashMap::new(),
            inotify,
            max_watches,
            unwatched: 0,
            changes: Vec::new(),
            counters: Arc::default(),
        }
    }

    /// Makes what is known of `path`, and of all below it, equal to what is there; idempotent, so events may come
    /// late, twice, or about something that has been replaced since.
    fn reconcile(&mut self, path: &Path) -> io::Result<()> {
        let directory = self.hierarchy.directory(path);
        let Some(mut metadata) = self.there(path, fs::metadata(&directory))? else { return Ok(()) };
        let id = metadata.ino();
        if self.known.get(path).is_some_and(|node| node.id != id) {
            self.forget(path);
        }
        if !self.known.contains_key(path) {
            // A late event about a child whose parent has been replaced since: the new parent's own event, or the next
            // rescan, brings the child with it.
            if path.parent().is_some_and(|parent| !self.known.contains_key(parent)) {
                return Ok(());
            }
            if self.known.len() >= MAX_CGROUPS || path.components().count() > MAX_DEPTH {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            self.known.insert(path.to_owned(), Node { id, watch: None });
            self.unwatched += 1;
            self.changes.push(Change::Appeared { path: path.to_owned(), id });
        }
        // Watch first, read second: what is created in between is read, or reported, or both.
        if self.watch(path, &directory)? {
            let Some(now) = self.there(path, fs::metadata(&directory))? else { return Ok(()) };
            metadata = now;
        }
        let mut children = BTreeSet::new();
        if metadata.nlink() != LINKS_OF_LEAF {
            let Some(entries) = self.there(path, fs::read_dir(&directory))? else { return Ok(()) };
            for entry in entries {
                match entry {
                    // kernfs gives the type with the name: no stat.
                    Ok(entry) if entry.file_type().is_ok_and(|t| t.is_dir()) => {
                        children.insert(path.join(entry.file_name()));
                    }
                    Ok(_) => {}
                    Err(error) if gone(&error) => break,
                    Err(error) => return Err(error),
                }
            }
        }
        let is_lost = |p: &&PathBuf| p.parent() == Some(path) && !children.contains(*p);
        let lost: Vec<PathBuf> = self.below(path).filter(is_lost).cloned().collect();
        for child in lost {
            self.forget(&child);
        }
        // One that cannot be read does not hide its siblings.
        children.into_iter().map(|child| self.reconcile(&child)).fold(Ok(()), Result::and)
    }

    /// Known paths strictly below `path`: a path sorts before all below it, component by component.
    fn below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a PathBuf> {
        let from = (Bound::Excluded(path), Bound::Unbounded);
        self.known.range::<Path, _>(from).map(|(p, _)| p).take_while(move |p| p.starts_with(path))
    }

    /// `None` if the cgroup has gone; then it is forgotten.
    fn there<T>(&mut self, path: &Path, result: io::Result<T>) -> io::Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if gone(&error) => {
                self.forget(path);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Sets a watch where there is none; true if it has.
    fn watch(&mut self, path: &Path, directory: &Path) -> io::Result<bool> {
        let Some(inotify) = &self.inotify else { return Ok(false) };
        let Some(node) = self.known.get_mut(path) else { return Ok(false) };
        if node.watch.is_some() || self.by_watch.len() >= self.max_watches {
            return Ok(false);
        }
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE | WatchMask::ONLYDIR;
        match inotify.watches().add(directory, mask) {
            Ok(watch) => {
                node.watch = Some(watch.clone());
                self.unwatched -= 1;
                self.by_watch.insert(watch, path.to_owned());
                Ok(true)
            }
            // ENOSPC: the user has no watch left. The directory stays unwatched; the caller reads the tree instead.
            Err(error) if gone(&error) || error.raw_os_error() == Some(libc::ENOSPC) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Drops `path` and all below it, children first.
    fn forget(&mut self, path: &Path) {
        let mut paths: Vec<PathBuf> = self.below(path).cloned().collect();
        paths.insert(0, path.to_owned());
        for path in paths.into_iter().rev() {
            let Some(node) = self.known.remove(&path) else { continue };
            match node.watch {
                Some(watch) => {
                    self.by_watch.remove(&watch);
                    // The kernel has removed the watch with the directory; if it has not, this does.
                    if let Some(inotify) = &self.inotify {
                        let _ = inotify.watches().remove(watch);
                    }
                }
                None => self.unwatched -= 1,
            }
            self.changes.push(Change::Gone { path, id: node.id });
        }
    }

    /// Reads all waiting events; true if the kernel had to drop some.
    fn read_events(&mut self, dirty: &mut BTreeSet<PathBuf>) -> io::Result<bool> {
        let mut buffer = [0; EVENT_BUFFER];
        let mut overflow = false;
        let Some(inotify) = &mut self.inotify else { return Ok(false) };
        let events = match inotify.read_events(&mut buffer) {
            Ok(events) => events,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        for event in events {
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                overflow = true;
            } else if event.mask.contains(EventMask::ISDIR)
                && let (Some(path), Some(name)) = (self.by_watch.get(&event.wd), event.name)
            {
                dirty.insert(path.join(name));
            }
        }
        Ok(overflow)
    }
}

/// `ENODEV` is what kernfs says of a directory that was removed while it was open.
fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENOTDIR))
}

/// Follows the tree from a thread of its own. The first message is the tree as it is. Dropping ends the thread.
#[derive(Debug)]
pub struct Watcher {
    changes: mpsc::Receiver<Vec<Change>>,
    counters: Arc<Counters>,
    /// Closing it wakes the thread up.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Begins. A cgroup that lives shorter than the thread needs to look is never reported: the kernel's
    /// nearest-registered-ancestor rule is for those.
    pub fn start(hierarchy: Hierarchy) -> Result<Self, Error> {
        let inotify = Inotify::init()
            .inspect_err(|error| tracing::warn!(%error, "no inotify instance (see fs.inotify.max_user_instances)"));
        Self::with(hierarchy, inotify.ok(), MAX_CGROUPS)
    }

    fn with(hierarchy: Hierarchy, inotify: Option<Inotify>, max_watches: usize) -> Result<Self, Error> {
        let io = |error| Error::Io("thread that follows cgroups".into(), error);
        let (stopped, stop) = io::pipe().map_err(io)?;
        let (sender, changes) = mpsc::channel(MAX_WAITING);
        let tree = Tree::new(hierarchy, inotify, max_watches);
        let counters = Arc::clone(&tree.counters);
        let run = move || follow(tree, &sender, stopped.as_fd());
        let thread = thread::Builder::new().name("cgroups".into()).spawn(run).map_err(io)?;
        Ok(Self { changes, counters, stop: Some(stop), thread: Some(thread) })
    }

    /// The next changes, in order; `None` if the thread has ended, which only a failed poll makes it do. Safe to use in
    /// `select!`.
    pub async fn next(&mut self) -> Option<Vec<Change>> {
        self.changes.recv().await
    }

    /// What the watcher has met so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.changes.close();
        // The thread may be waiting for room in the channel: `close` alone lets it go on.
        while self.changes.try_recv().is_ok() {}
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread. Ends when the reader has gone.
fn follow(mut tree: Tree, sender: &mpsc::Sender<Vec<Change>>, stopped: BorrowedFd<'_>) {
    let mut dirty = BTreeSet::from([PathBuf::from("/")]);
    let mut last_rescan = Instant::now();
    // What the last rescan took.
    let mut cost = Duration::ZERO;
    let mut said = 0;
    loop {
        let whole = dirty.contains(Path::new("/"));
        if whole {
            dirty = BTreeSet::from([PathBuf::from("/")]);
            last_rescan = Instant::now();
            tree.counters.rescans.fetch_add(1, Ordering::Relaxed);
        }
        for path in mem::take(&mut dirty) {
            if let Err(error) = tree.reconcile(&path) {
                tree.counters.errors.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(cgroup = %path.display(), %error, "cannot read cgroup; tried again at the next rescan");
            }
        }
        if whole {
            cost = last_rescan.elapsed();
        }
        tree.counters.unwatched.store(tree.unwatched, Ordering::Relaxed);
        if (said == 0) != (tree.unwatched == 0) {
            if tree.unwatched > 0 {
                tracing::warn!(
                    unwatched = tree.unwatched,
                    every = ?RESCAN_UNWATCHED,
                    "not every cgroup can be watched (raise fs.inotify.max_user_watches, max_user_instances); \
                     the tree is read whole instead"
                );
            } else {
                tracing::info!("every cgroup is watched again");
            }
        }
        said = tree.unwatched;
        let mut changes = mem::take(&mut tree.changes).into_iter();
        loop {
            let batch: Vec<Change> = changes.by_ref().take(MAX_BATCH).collect();
            if batch.is_empty() {
                break;
            }
            if sender.blocking_send(batch).is_err() {
                return;
            }
        }

        let interval = if tree.unwatched > 0 { RESCAN_UNWATCHED.max(cost * 10) } else { RESCAN_WATCHED };
        let left = interval.saturating_sub(last_rescan.elapsed());
        let mut fds = vec![PollFd::new(stopped, PollFlags::POLLIN)];
        fds.extend(tree.inotify.iter().map(|inotify| PollFd::new(inotify.as_fd(), PollFlags::POLLIN)));
        // Rounded up, or the last millisecond would be a busy loop.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "cgroups are no longer followed");
                return;
            }
        }
        if fds[0].any().unwrap_or(true) {
            return;
        }
        match tree.read_events(&mut dirty) {
            Ok(false) => {}
            Ok(true) => {
                tree.counters.overflows.fetch_add(1, Ordering::Relaxed);
                dirty.insert("/".into());
            }
            Err(error) => {
                tracing::error!(%error, "cannot read cgroup events");
                dirty.insert("/".into());
                // No busy loop on an error that stays.
                thread::sleep(RESCAN_UNWATCHED);
            }
        }
        if last_rescan.elapsed() >= interval {
            dirty.insert("/".into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, Cgroup};
    use super::*;

    fn check_mounts(text: &str, expected: Result<(&str, bool, &str), &str>) {
        let found = Hierarchy::parse(text.as_bytes());
        match expected {
            Ok((mount, hybrid, root)) => {
                assert_eq!(found.unwrap(), Hierarchy { mount: mount.into(), hybrid, root: root.into() }, "{text}");
            }
            Err(start) => {
                let message = found.unwrap_err().to_string();
                assert!(message.starts_with(start), "{message}");
            }
        }
    }

    #[test]
    fn mounts() {
        check_mounts(
            "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n",
            Ok(("/sys/fs/cgroup", false, "/")),
        );
        check_mounts(
            "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            Ok(("/sys/fs/cgroup/unified", true, "/")),
        );
        check_mounts("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", Err("cgroup v1 only: "));
        check_mounts("21 1 0:2 / /proc rw - proc proc rw\n", Err("no cgroup file system"));
        check_mounts(
            "1 1 0:2 /pod /a\\040b rw - cgroup2 none rw\n\
             2 1 0:2 / /c rw - cgroup2 none rw\n3 1 0:2 / /d rw - cgroup2 none rw\n",
            Ok(("/c", false, "/")),
        );
        check_mounts("1 1 0:2 /pod /a\\040b rw - cgroup2 none rw\n", Ok(("/a b", false, "/pod")));
    }

    #[test]
    fn units() {
        for (path, expected) in [
            ("/system.slice/web.service", Some(("web.service", None))),
            ("/system.slice/web.socket", Some(("web.socket", None))),
            ("/system.slice/system-pg.slice/pg@1.service", Some(("pg@1.service", None))),
            ("/init.scope", Some(("init.scope", None))),
            ("/system.slice", Some(("system.slice", None))),
            ("/system.slice/web.service/workers/7", None),
            // Somebody's own cgroup with the name of another's unit.
            ("/system.slice/web.service/sshd.service", None),
            ("/system.slice/docker-0123.scope/system.slice/sshd.service", None),
            ("/user.slice/user-0.slice/session-1.scope", Some(("session-1.scope", None))),
            ("/user.slice/user-7.slice/user@7.service", Some(("user@7.service", None))),
            ("/user.slice/user-7.slice/user@7.service/app.slice/web.service", Some(("web.service", Some(7)))),
            ("/user.slice/user-7.slice/user@7.service/init.scope", Some(("init.scope", Some(7)))),
            ("/user.slice/user-7.slice/user@7.service/app.slice/web.service/sshd.service", None),
            ("/user.slice/user-7.slice/user@7.service/app.slice/user@0.service/sshd.service", None),
            ("/kubepods.slice/pod1", None),
            ("/docker/0123", None),
            ("/a/.service", None),
            ("/", None),
        ] {
            let found = unit(Path::new(path)).map(|u| (u.name, u.uid));
            assert_eq!(found, expected, "{path}");
        }
    }

    /// The tree below `within`, walked the plain way.
    fn walk(hierarchy: &Hierarchy, within: &Path, found: &mut BTreeMap<PathBuf, u64>) {
        let directory = hierarchy.directory(within);
        let Ok(id) = id_of(&directory) else { return };
        found.insert(within.to_owned(), id);
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().unwrap().is_dir() {
                walk(hierarchy, &within.join(entry.file_name()), found);
            }
        }
    }

    /// Applies batches until the part below `within` equals what is there.
    async fn settle(watcher: &mut Watcher, seen: &mut BTreeMap<PathBuf, u64>, hierarchy: &Hierarchy, within: &Path) {
        let part = |map: &BTreeMap<PathBuf, u64>| -> BTreeMap<PathBuf, u64> {
            map.iter().filter(|(p, _)| p.starts_with(within)).map(|(p, id)| (p.clone(), *id)).collect()
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Ok(batch) = tokio::time::timeout(Duration::from_millis(50), watcher.next()).await {
                for change in batch.unwrap() {
                    match change {
                        Change::Appeared { path, id } => {
                            let parent = path.parent().is_none_or(|p| seen.contains_key(p));
                            assert!(parent, "{} before its parent", path.display());
                            assert_eq!(seen.insert(path, id), None);
                        }
                        Change::Gone { path, id } => assert_eq!(seen.remove(&path), Some(id)),
                    }
                }
            } else {
                let mut fresh = BTreeMap::new();
                walk(hierarchy, within, &mut fresh);
                if part(seen) == fresh {
                    assert_eq!(part(&hierarchy.scan().unwrap()), fresh);
                    return;
                }
                assert!(Instant::now() < deadline, "seen {:?}, there {fresh:?}", part(seen));
            }
        }
    }

    fn relative(hierarchy: &Hierarchy, directory: &Path) -> PathBuf {
        Path::new("/").join(directory.strip_prefix(&hierarchy.mount).unwrap())
    }

    #[test]
    fn ids_agree() {
        if !testing::root("ids_agree") {
            return;
        }
        let hierarchy = Hierarchy::find().unwrap();
        let cgroup = Cgroup::new(&hierarchy);
        assert_eq!(id_of(&cgroup.0).unwrap(), handle_id_of(&cgroup.0).unwrap());
        assert_eq!(hierarchy.scan().unwrap()[&relative(&hierarchy, &cgroup.0)], id_of(&cgroup.0).unwrap());
        assert!(handle_id_of(Path::new("/sys/fs/cgroup/no such")).is_err());
    }

    #[tokio::test]
    async fn keeps_up_with_short_lived_cgroups() {
        if !testing::root("keeps_up_with_short_lived_cgroups") {
            return;
        }
        let hierarchy = Hierarchy::find().unwrap();
        let cgroup = Cgroup::new(&hierarchy);
        let within = relative(&hierarchy, &cgroup.0);
        let mut watcher = Watcher::start(hierarchy.clone()).unwrap();
        let mut seen = BTreeMap::new();
        let directory = cgroup.0.clone();
        let maker = thread::spawn(move || {
            for n in 0..200 {
                // Created and populated at once: the race between the watch and the child.
                let deep = directory.join(format!("a{n}.slice/b/c.service"));
                fs::create_dir_all(&deep).unwrap();
                if n % 3 != 0 {
                    for path in deep.ancestors().take(3) {
                        fs::remove_dir(path).unwrap();
                    }
                }
                // Same names, other cgroups.
                for _ in 0..if n % 3 == 0 { 0 } else { n % 4 } {
                    fs::create_dir_all(&deep).unwrap();
                    for path in deep.ancestors().take(3) {
                        fs::remove_dir(path).unwrap();
                    }
                }
                if n % 6 == 1 {
                    fs::create_dir_all(&deep).unwrap();
                }
            }
        });
        maker.join().unwrap();
        settle(&mut watcher, &mut seen, &hierarchy, &within).await;
        assert!(seen.keys().filter(|p| p.starts_with(&within)).count() > 100 * 3);
        assert_eq!(watcher.counters().unwatched.load(Ordering::Relaxed), 0);
        assert_eq!(watcher.counters().errors.load(Ordering::Relaxed), 0);

        // At once, not at the next rescan.
        let begin = Instant::now();
        fs::create_dir(cgroup.0.join("a0.slice/b/d")).unwrap();
        let batch = watcher.next().await.unwrap();
        let [Change::Appeared { path, id }] = &batch[..] else { panic!("{batch:?}") };
        assert_eq!(path, &within.join("a0.slice/b/d"));
        seen.insert(path.clone(), *id);
        assert!(begin.elapsed() < Duration::from_millis(500));

        let path = cgroup.0.clone();
        drop(cgroup);
        assert!(!path.exists());
        settle(&mut watcher, &mut seen, &hierarchy, &within).await;
    }

    #[tokio::test]
    async fn reads_the_tree_where_watches_run_out() {
        if !testing::root("reads_the_tree_where_watches_run_out") {
            return;
        }
        let hierarchy = Hierarchy::find().unwrap();
        let cgroup = Cgroup::new(&hierarchy);
        let within = relative(&hierarchy, &cgroup.0);
        for inotify in [Inotify::init().ok(), None] {
            let mut watcher = Watcher::with(hierarchy.clone(), inotify, 1).unwrap();
            let mut seen = BTreeMap::new();
            settle(&mut watcher, &mut seen, &hierarchy, &within).await;
            assert!(watcher.counters().unwatched.load(Ordering::Relaxed) >= 1);
            fs::create_dir_all(cgroup.0.join("x/y")).unwrap();
            settle(&mut watcher, &mut seen, &hierarchy, &within).await;
            assert!(seen.contains_key(&within.join("x/y")));
            fs::remove_dir(cgroup.0.join("x/y")).unwrap();
            settle(&mut watcher, &mut seen, &hierarchy, &within).await;
            assert!(!seen.contains_key(&within.join("x/y")));
        }
    }

    #[tokio::test]
    async fn an_overflowing_queue_is_healed_by_a_rescan() {
        if !testing::root("an_overflowing_queue_is_healed_by_a_rescan") {
            return;
        }
        let hierarchy = Hierarchy::find().unwrap();
        let cgroup = Cgroup::new(&hierarchy);
        let within = relative(&hierarchy, &cgroup.0);
        let mut tree = Tree::new(hierarchy.clone(), Some(Inotify::init().unwrap()), MAX_CGROUPS);
        tree.reconcile(Path::new("/")).unwrap();
        // Two events per name, names never alike twice in a row, so that the kernel does not merge them.
        let limit: usize =
            fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
        for n in 0..limit / 2 + 10 {
            let path = cgroup.0.join(if n % 2 == 0 { "even" } else { "odd" });
            fs::create_dir(&path).unwrap();
            fs::remove_dir(&path).unwrap();
        }
        fs::create_dir(cgroup.0.join("missed")).unwrap();
        let mut dirty = BTreeSet::new();
        let mut overflow = false;
        for _ in 0..1_000 {
            overflow |= tree.read_events(&mut dirty).unwrap();
        }
        assert!(overflow);
        assert!(!dirty.contains(&within.join("missed")));
        tree.reconcile(&within).unwrap();
        assert!(tree.known.contains_key(&within.join("missed")));
    }

    #[tokio::test]
    async fn stops_while_nobody_reads() {
        if !testing::root("stops_while_nobody_reads") {
            return;
        }
        let begin = Instant::now();
        drop(Watcher::start(Hierarchy::find().unwrap()).unwrap());
        assert!(begin.elapsed() < Duration::from_secs(2));
    }
}
