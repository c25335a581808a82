//! When the policy folder is to be read: soon after a change that is complete, never in the middle of one.
//!
//! inotify tells at once; a look at every file's size, times and number finds what it does not tell: changes on a network
//! file system, behind a link, or where the kernel has no watch left.
//!
//! * A file, folder or link that was **renamed into its place** is whole: it counts as soon as no other change follows for
//!   [`BURST`], since several renames may belong together.
//! * **Any other change** may be one step of several (an editor moves the old file away, makes a new one and fills it):
//!   it counts after [`SETTLE`] without another, and a file that was written to counts once its writer has closed it, or
//!   has been still for [`WRITER`].

use crate::policy::load::{FOLDER_DEPTH, Stamp};
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io::{self, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Stillness after a rename: what a loop of `mv` needs from one file to the next.
const BURST: Duration = Duration::from_millis(3);
/// Stillness after any other change: from the steps of one editor or `cp -r` to the next, on a busy machine.
const SETTLE: Duration = Duration::from_millis(100);
/// A file that its writer leaves open and alone for so long counts as written.
const WRITER: Duration = Duration::from_secs(2);
/// How often the folder is looked at where inotify watches it.
const LOOK: Duration = Duration::from_secs(2);
/// How often where it does not.
const LOOK_UNWATCHED: Duration = Duration::from_millis(200);
/// A look may take this part of the time...
const LOOK_SHARE: u32 = 1_000;
/// ... but comes at least so often.
const LOOK_LATEST: Duration = Duration::from_secs(30);
/// One event with the longest name is 272 bytes.
const EVENT_BUFFER: usize = 16 << 10;

/// Follows the folder from a thread of its own. Dropping ends the thread.
pub(super) struct Folder {
    changes: mpsc::Receiver<()>,
    /// Closing it wakes the thread up.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Folder {
    /// What changes from now on is told.
    pub(super) fn follow(path: &Path) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        // One is enough: whoever reads the folder reads all of it.
        let (tell, changes) = mpsc::channel(1);
        let mut watch = Watch::new(path);
        watch.look();
        let run = move || watch.run(&tell, stopped.as_fd());
        let thread = thread::Builder::new().name("folder".into()).spawn(run)?;
        Ok(Self { changes, stop: Some(stop), thread: Some(thread) })
    }

    /// The folder is to be read; `None` = the thread has ended, which only a failed poll makes it do.
    pub(super) async fn changed(&mut self) -> Option<()> {
        self.changes.recv().await
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Of one file or folder: what `load::Stamp` has of it too, so that what is seen here is read again there.
type Seen = (PathBuf, Stamp);

struct Watch {
    path: PathBuf,
    inotify: Option<Inotify>,
    /// Watched folders. Events of the folder above the policy concern one name in it.
    folders: HashMap<WatchDescriptor, Option<OsString>>,
    watched: HashSet<(PathBuf, u64)>,
    seen: Vec<Seen>,
    pending: Pending,
    looked: Instant,
    /// What the last look took.
    cost: Duration,
}

impl Watch {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            inotify: None,
            folders: HashMap::new(),
            watched: HashSet::new(),
            seen: Vec::new(),
            pending: Pending::default(),
            looked: Instant::now(),
            cost: Duration::ZERO,
        }
    }

    /// True if something is not as it was at the last look.
    fn look(&mut self) -> bool {
        let begun = Instant::now();
        let (mut all, mut folders) = (Vec::new(), Vec::new());
        let mut stack = vec![(self.path.clone(), 0)];
        while let Some((path, depth)) = stack.pop() {
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            if meta.is_dir() && depth <= FOLDER_DEPTH {
                folders.push((path.clone(), meta.ino()));
                for entry in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                    stack.push((entry.path(), depth + 1));
                }
            }
            all.push((path, Stamp::of(&meta)));
        }
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        self.watch(&folders);
        let changed = self.seen != all;
        self.seen = all;
        self.looked = Instant::now();
        self.cost = begun.elapsed();
        changed
    }

    /// Watches these folders and the one above them, anew if they are others than before.
    fn watch(&mut self, folders: &[(PathBuf, u64)]) {
        if !folders.is_empty()
            && self.inotify.is_some()
            && folders.iter().cloned().collect::<HashSet<_>>() == self.watched
        {
            return;
        }
        (self.inotify, self.folders, self.watched) = (None, HashMap::new(), folders.iter().cloned().collect());
        let Ok(inotify) = Inotify::init() else { return };
        let mask = WatchMask::MOVE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::MOVE_SELF
            | WatchMask::DELETE_SELF;
        for (folder, _) in folders {
            // No watch left, or gone meanwhile: then looking is all there is.
            let Ok(id) = inotify.watches().add(folder, mask) else { return };
            let _ = self.folders.insert(id, None);
        }
        // A link is followed to where the policy lies; that it leads elsewhere now is found by looking.
        if let (Some(above), Some(name)) = (self.path.parent(), self.path.file_name()) {
            let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
            if let Ok(id) = inotify.watches().add(above, WatchMask::MOVE | WatchMask::CREATE | WatchMask::CLOSE_WRITE) {
                let _ = self.folders.entry(id).or_insert_with(|| Some(name.to_owned()));
            }
        }
        self.inotify = Some(inotify);
    }

    fn run(mut self, tell: &mpsc::Sender<()>, stopped: BorrowedFd<'_>) {
        loop {
            let now = Instant::now();
            let every = if self.inotify.is_some() { LOOK } else { LOOK_UNWATCHED };
            let mut look_at = self.looked + (self.cost * LOOK_SHARE).clamp(every, LOOK_LATEST);
            let due = self.pending.due();
            if due.is_some_and(|due| due <= now) {
                self.pending = Pending::default();
                // From here on a change is one more, so what is there now is noted before anybody reads.
                let _ = self.look();
                match tell.try_send(()) {
                    // One that waits will find this change too.
                    Ok(()) | Err(mpsc::error::TrySendError::Full(())) => {}
                    Err(mpsc::error::TrySendError::Closed(())) => return,
                }
                continue;
            }
            if look_at <= now {
                if self.look() {
                    self.pending.saw(Step::Other, now);
                }
                continue;
            }
            if let Some(due) = due {
                look_at = look_at.min(due);
            }
            let left = look_at.saturating_duration_since(now);
            // Rounded up, or the last millisecond would be a busy loop.
            let timeout = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
            let mut fds = vec![PollFd::new(stopped, PollFlags::POLLIN)];
            fds.extend(self.inotify.iter().map(|inotify| PollFd::new(inotify.as_fd(), PollFlags::POLLIN)));
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the policy folder is no longer followed");
                    return;
                }
            }
            if fds[0].any().unwrap_or(true) {
                return;
            }
            self.read_events();
        }
    }

    fn read_events(&mut self) {
        let mut buffer = [0; EVENT_BUFFER];
        let Some(inotify) = &mut self.inotify else { return };
        let now = Instant::now();
        match inotify.read_events(&mut buffer) {
            Ok(events) => {
                for event in events {
                    let of = match self.folders.get(&event.wd) {
                        Some(Some(only)) if event.name != Some(only.as_os_str()) => continue,
                        Some(_) => event.name,
                        // Lost events, or of a watch that ended with its folder.
                        None => None,
                    };
                    if let Some(step) = step(event.mask, of, &event.wd) {
                        self.pending.saw(step, now);
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Looking finds what cannot be read here.
            Err(_) => self.inotify = None,
        }
    }
}

/// What an event says of a change; `None` = it concerns no policy.
fn step(mask: EventMask, name: Option<&OsStr>, folder: &WatchDescriptor) -> Option<Step> {
    let Some(name) = name else { return Some(Step::Other) };
    let text = name.to_string_lossy();
    let policy = (text.ends_with(".yaml") || text.ends_with(".yml")) && !text.starts_with('.');
    let file = || (folder.clone(), name.to_owned());
    let moved_in = mask.contains(EventMask::MOVED_TO);
    // A link that leads to another folder, as Kubernetes swaps the `..data` of its volumes.
    if moved_in && text == "..data" {
        return Some(Step::Whole);
    }
    if mask.contains(EventMask::ISDIR) {
        let shown = !text.starts_with('.');
        return shown.then_some(if moved_in { Step::Whole } else { Step::Other });
    }
    if !policy {
        // The policy itself may be a file, or a link, of any name; a link to a folder has none that ends in .yaml.
        return (mask.intersects(EventMask::MOVED_TO | EventMask::CREATE) && !text.contains('.'))
            .then_some(Step::Other);
    }
    Some(match () {
        () if moved_in => Step::Whole,
        () if mask.contains(EventMask::MODIFY) => Step::Written(file()),
        () if mask.contains(EventMask::CLOSE_WRITE) => Step::Closed(file()),
        () => Step::Other,
    })
}

type File = (WatchDescriptor, OsString);

/// One change.
enum Step {
    /// Somebody put something whole in its place.
    Whole,
    /// Somebody writes into a file.
    Written(File),
    /// A writer closed a file.
    Closed(File),
    /// Anything else.
    Other,
}

/// Changes that were not read yet.
#[derive(Default)]
struct Pending {
    /// When the last one happened.
    last: Option<Instant>,
    /// One of them may be a step of several.
    steps: bool,
    /// Files with an open writer, and when each was written to last.
    open: HashMap<File, Instant>,
}

impl Pending {
    fn saw(&mut self, step: Step, now: Instant) {
        self.last = Some(now);
        match step {
            Step::Whole => {}
            Step::Other => self.steps = true,
            Step::Written(file) => {
                self.steps = true;
                let _ = self.open.insert(file, now);
            }
            Step::Closed(file) => {
                self.steps = true;
                let _ = self.open.remove(&file);
            }
        }
    }

    /// When the folder is to be read, if nothing happens until then.
    fn due(&self) -> Option<Instant> {
        let still = self.last? + if self.steps { SETTLE } else { BURST };
        let written = self.open.values().max().map(|last| *last + WRITER);
        Some(written.map_or(still, |written| written.max(still)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events that `act` causes, up to when the folder is to be read: `due` after the last of them.
    fn due(act: impl FnOnce(&Path)) -> Option<Duration> {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("policy");
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        std::fs::write(folder.join("a.yaml"), "a").unwrap();
        std::fs::write(dir.path().join("draft"), "b").unwrap();
        let mut watch = Watch::new(&folder);
        assert!(watch.look() && !watch.look());
        act(&folder);
        watch.read_events();
        watch.pending.due().map(|at| at - watch.pending.last.unwrap())
    }

    #[test]
    fn what_is_renamed_into_place_is_whole() {
        let draft = |folder: &Path| folder.parent().unwrap().join("draft");
        assert_eq!(due(|f| std::fs::rename(draft(f), f.join("a.yaml")).unwrap()), Some(BURST));
        assert_eq!(due(|f| std::fs::rename(draft(f), f.join("sub/b.yml")).unwrap()), Some(BURST));
        // A folder of another name takes the place of this one.
        let swap = |f: &Path| {
            std::fs::create_dir(f.with_file_name("new")).unwrap();
            std::fs::rename(f, f.with_file_name("old")).unwrap();
            std::fs::rename(f.with_file_name("new"), f).unwrap();
        };
        assert_eq!(due(swap), Some(SETTLE));
        assert_eq!(due(|f| std::os::unix::fs::symlink("x", f.join("..tmp")).unwrap()), None);
        let data = |f: &Path| {
            std::os::unix::fs::symlink("x", f.join("..data_tmp")).unwrap();
            std::fs::rename(f.join("..data_tmp"), f.join("..data")).unwrap();
        };
        assert_eq!(due(data), Some(BURST));
    }

    #[test]
    fn what_is_written_counts_when_it_is_closed() {
        use std::io::Write;
        let mut open = None;
        assert_eq!(
            due(|f| {
                let mut file = std::fs::File::create(f.join("a.yaml")).unwrap();
                file.write_all(b"half").unwrap();
                open = Some(file);
            }),
            Some(WRITER)
        );
        assert_eq!(due(|f| std::fs::write(f.join("a.yaml"), "whole").unwrap()), Some(SETTLE));
        assert_eq!(due(|f| std::fs::remove_file(f.join("a.yaml")).unwrap()), Some(SETTLE));
        // An editor moves the old file away first: without it the policy would be another.
        assert_eq!(due(|f| std::fs::rename(f.join("a.yaml"), f.join("a.yaml~")).unwrap()), Some(SETTLE));
        assert_eq!(due(|f| std::fs::write(f.join(".a.yaml.swp"), "x").unwrap()), None);
        assert_eq!(due(|f| std::fs::write(f.join("notes.txt"), "x").unwrap()), None);
        assert_eq!(due(|f| std::fs::create_dir(f.join("more")).unwrap()), Some(SETTLE));
    }

    #[test]
    fn one_step_of_several_delays_what_is_whole() {
        let now = Instant::now();
        let mut pending = Pending::default();
        assert!(pending.due().is_none());
        pending.saw(Step::Whole, now);
        assert_eq!(pending.due(), Some(now + BURST));
        pending.saw(Step::Other, now);
        pending.saw(Step::Whole, now + BURST);
        assert_eq!(pending.due(), Some(now + BURST + SETTLE));
    }

    #[test]
    fn looking_finds_a_change_of_the_same_size_and_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        let write = |text: &str| {
            std::fs::write(&path, text).unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
            Stamp::of(&std::fs::metadata(&path).unwrap())
        };
        let before = write("one");
        let mut watch = Watch::new(dir.path());
        assert!(watch.look() && !watch.look());
        // Until the clock of the file system has ticked.
        while write("two") == before {}
        assert!(watch.look() && !watch.look());
    }

    #[test]
    fn looking_finds_what_no_event_tells() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("one")).unwrap();
        std::fs::create_dir(dir.path().join("two")).unwrap();
        let policy = dir.path().join("policy");
        std::os::unix::fs::symlink("one", &policy).unwrap();
        let mut watch = Watch::new(&policy);
        assert!(watch.look() && !watch.look());
        std::fs::remove_file(&policy).unwrap();
        std::os::unix::fs::symlink("two", &policy).unwrap();
        assert!(watch.look() && !watch.look());
        // And what is in the new place is watched.
        watch.read_events();
        watch.pending = Pending::default();
        std::fs::write(dir.path().join("two/a.yaml"), "a").unwrap();
        watch.read_events();
        assert!(watch.pending.due().is_some());
    }

    #[tokio::test]
    async fn a_change_is_told_and_dropping_ends_the_thread() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("draft"), "a").unwrap();
        let policy = dir.path().join("policy");
        std::fs::create_dir(&policy).unwrap();
        let mut folder = Folder::follow(&policy).unwrap();
        std::fs::rename(dir.path().join("draft"), policy.join("a.yaml")).unwrap();
        assert_eq!(folder.changed().await, Some(()));
    }
}
