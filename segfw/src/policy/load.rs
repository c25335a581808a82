//! The one place of `policy` that reads files: a folder, as names and texts for `document::parse`.

use super::yaml::{DOCUMENTS, FILE_BYTES, TOTAL_BYTES};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Folders inside folders; also bounds what links can do.
pub const FOLDER_DEPTH: usize = 16;
/// Entries of all folders together: a file for each document that is allowed, and as much again of other things.
const ENTRIES: usize = 2 * DOCUMENTS;

/// Why a folder cannot be read. Nothing is read in part: half a policy is another policy.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{path}: {source}", path = .path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: not UTF-8 (at byte {offset}); policies are UTF-8 text", path = .path.display())]
    NotUtf8 { path: PathBuf, offset: usize },
    #[error("{path}: the name is not UTF-8", path = .path.display())]
    Name { path: PathBuf },
    #[error("{path}: larger than {FILE_BYTES} bytes", path = .path.display())]
    FileTooLarge { path: PathBuf },
    #[error("{path}: this file and those before it are larger than {TOTAL_BYTES} bytes", path = .path.display())]
    TotalTooLarge { path: PathBuf },
    #[error("{path}: folders are nested deeper than {FOLDER_DEPTH}", path = .path.display())]
    TooDeep { path: PathBuf },
    #[error("{path}: more than {ENTRIES} directory entries", path = .path.display())]
    TooMany { path: PathBuf },
    #[error("{path}: this folder was read already: a link leads back to it", path = .path.display())]
    Loop { path: PathBuf },
    #[error("{path}: not a regular file", path = .path.display())]
    NotAFile { path: PathBuf },
}

/// Files as they were read: name relative to the folder, and text. Where a text did not change, it is the same one.
pub type Files = Vec<(String, Arc<str>)>;

/// All `*.yaml` and `*.yml` below `dir` (or the one file that `dir` is), in the order of their names relative to it.
/// Names that begin with a dot are passed over: so the `..data` of a Kubernetes volume is not read twice.
pub fn read_dir_recursive(dir: &Path) -> Result<Vec<(String, String)>, LoadError> {
    walk(dir, &mut |path, _| Ok(read(path)?.1))
}

/// As [`read_dir_recursive`], and reads only what is not known to be as it was.
pub fn read_again(dir: &Path, memory: &mut Memory) -> Result<Files, LoadError> {
    let mut now = HashMap::new();
    let files = walk(dir, &mut |path, meta| {
        let known = memory.0.get(path);
        let read = match known.filter(|k| k.settled && k.stamp == Stamp::of(meta)) {
            Some(known) => known.clone(),
            None => Remembered::read(path, known.map(|k| &k.text))?,
        };
        let text = Arc::clone(&read.text);
        let _ = now.insert(path.to_owned(), read);
        Ok(text)
    })?;
    // What is not there any more is forgotten.
    memory.0 = now;
    Ok(files)
}

/// The files that were read last, by path. As git does, a file is taken for unchanged that has the device, number, size
/// and times that it had: whoever writes to it cannot keep the time of its last change (`ctime`).
///
/// That holds where the kernel of this host keeps the times ([`KEEPS_TIMES`]); on any other file system, so on all network
/// file systems and FUSE, whose times are a cache of what somebody else says, every file is read every time. And it holds
/// once the file was left alone for [`SETTLED`] before it was read; what is younger is read again. One way round it is
/// left: who maps a file into memory and keeps writing to a page of it changes the time with the first write alone, until
/// the page is written back; inotify does not tell of that either. A reload that somebody asks for reads everything
/// ([`Memory::doubt`]).
#[derive(Debug, Default)]
pub struct Memory(HashMap<PathBuf, Remembered>);

impl Memory {
    /// The next reading reads every file.
    pub fn doubt(&mut self) {
        self.0.values_mut().for_each(|known| known.settled = false);
    }
}

/// A file that was changed a moment before it was read may be changed again within the same tick of the file system's
/// clock, and show the same time. Ticks are 1 s on ext3 and at most 10 ms elsewhere; twice the longest.
const SETTLED: Duration = Duration::from_secs(2);

/// File systems on which every write sets `ctime` by the clock of this kernel. ext2 and ext3 have the number of ext4.
const KEEPS_TIMES: [FsType; 5] = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, F2FS_SUPER_MAGIC, TMPFS_MAGIC];

#[derive(Clone, Debug)]
struct Remembered {
    /// From before it was read.
    stamp: Stamp,
    text: Arc<str>,
    /// A change since would show in the stamp.
    settled: bool,
}

impl Remembered {
    /// `before` is its text at the last reading, which stays if it is the same.
    fn read(path: &Path, before: Option<&Arc<str>>) -> Result<Self, LoadError> {
        let begun = SystemTime::now();
        let (file, text) = read(path)?;
        let stamp = Stamp::of(&file.meta);
        let settled = KEEPS_TIMES.contains(&file.system) && stamp.is_older_than(begun);
        let text = before.filter(|before| ***before == *text).map_or_else(|| text.as_str().into(), Arc::clone);
        Ok(Self { stamp, text, settled })
    }
}

/// What changes with the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    number: u64,
    size: u64,
    /// Of the content and of anything; seconds and nanoseconds since 1970.
    times: [(i64, i64); 2],
}

impl Stamp {
    /// Of a file or folder, as it was asked for.
    pub fn of(meta: &fs::Metadata) -> Self {
        Self {
            device: meta.dev(),
            number: meta.ino(),
            size: meta.size(),
            times: [(meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec())],
        }
    }

    /// By [`SETTLED`] at least.
    fn is_older_than(&self, moment: SystemTime) -> bool {
        let Some(latest) = moment.checked_sub(SETTLED).and_then(|t| t.duration_since(UNIX_EPOCH).ok()) else {
            return false;
        };
        let latest = (i64::try_from(latest.as_secs()).unwrap_or(i64::MAX), i64::from(latest.subsec_nanos()));
        self.times.iter().all(|time| *time < latest)
    }
}

/// What a file was when it was opened.
struct Opened {
    meta: fs::Metadata,
    system: FsType,
}

/// One file, whole.
fn read(path: &Path) -> Result<(Opened, String), LoadError> {
    let about = |source| LoadError::Io { path: path.to_owned(), source };
    let mut file = fs::File::open(path).map_err(about)?;
    let meta = file.metadata().map_err(about)?;
    let system = fstatfs(&file).map_err(|errno| about(errno.into()))?.filesystem_type();
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0).min(FILE_BYTES) + 1);
    // Read with a bound, since the size may change after it was asked for.
    let _ = (&mut file).take(FILE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(about)?;
    if bytes.len() > FILE_BYTES {
        return Err(LoadError::FileTooLarge { path: path.to_owned() });
    }
    let text = String::from_utf8(bytes)
        .map_err(|e| LoadError::NotUtf8 { path: path.to_owned(), offset: e.utf8_error().valid_up_to() })?;
    Ok((Opened { meta, system }, text))
}

fn walk<T: AsRef<str>>(dir: &Path, read: &mut Read<'_, T>) -> Result<Vec<(String, T)>, LoadError> {
    let mut walk = Walk { read, files: Vec::new(), seen: HashSet::new(), bytes: 0, entries: 0 };
    let meta = fs::metadata(dir).map_err(|source| LoadError::Io { path: dir.to_owned(), source })?;
    if meta.is_dir() {
        walk.folder(dir, "", 0)?;
    } else {
        let name = dir.file_name().unwrap_or(dir.as_os_str()).to_str();
        walk.file(dir, name.ok_or_else(|| LoadError::Name { path: dir.to_owned() })?.to_owned(), &meta)?;
    }
    walk.files.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(walk.files)
}

/// Gives the text of a file that is a regular one.
type Read<'r, T> = dyn FnMut(&Path, &fs::Metadata) -> Result<T, LoadError> + 'r;

struct Walk<'r, 'w, T> {
    read: &'w mut Read<'r, T>,
    files: Vec<(String, T)>,
    /// Folders by their real path.
    seen: HashSet<PathBuf>,
    bytes: usize,
    entries: usize,
}

impl<T: AsRef<str>> Walk<'_, '_, T> {
    fn folder(&mut self, path: &Path, prefix: &str, depth: usize) -> Result<(), LoadError> {
        let about = |source| LoadError::Io { path: path.to_owned(), source };
        if depth > FOLDER_DEPTH {
            return Err(LoadError::TooDeep { path: path.to_owned() });
        }
        if !self.seen.insert(fs::canonicalize(path).map_err(about)?) {
            return Err(LoadError::Loop { path: path.to_owned() });
        }
        for entry in fs::read_dir(path).map_err(about)? {
            let path = entry.map_err(about)?.path();
            self.entries += 1;
            if self.entries > ENTRIES {
                return Err(LoadError::TooMany { path });
            }
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return Err(LoadError::Name { path }) };
            if name.starts_with('.') {
                continue;
            }
            let wanted = name.ends_with(".yaml") || name.ends_with(".yml");
            let relative = format!("{prefix}{name}");
            match fs::metadata(&path) {
                Ok(meta) if meta.is_dir() => self.folder(&path, &format!("{relative}/"), depth + 1)?,
                Ok(meta) if wanted => self.file(&path, relative, &meta)?,
                Ok(_) => {}
                // A link to nowhere that is no policy is no business of ours.
                Err(source) if wanted => return Err(LoadError::Io { path, source }),
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, name: String, meta: &fs::Metadata) -> Result<(), LoadError> {
        // Asked before it is opened: to open a pipe would wait for ever.
        if !meta.is_file() {
            return Err(LoadError::NotAFile { path: path.to_owned() });
        }
        let text = (self.read)(path, meta)?;
        self.bytes += text.as_ref().len();
        if self.bytes > TOTAL_BYTES {
            return Err(LoadError::TotalTooLarge { path: path.to_owned() });
        }
        self.files.push((name, text));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_folder_in_name_order() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        fs::create_dir(at("..data")).unwrap();
        for (name, text) in
            [("b.yaml", "b"), ("a.yml", "a"), ("sub/c.yaml", "c"), ("..data/d.yaml", "d"), ("notes.txt", "n")]
        {
            fs::write(at(name), text).unwrap();
        }
        symlink(at("..data/d.yaml"), at("d.yaml")).unwrap();
        let names =
            |dir: &Path| read_dir_recursive(dir).unwrap().into_iter().map(|(n, t)| n + "=" + &t).collect::<Vec<_>>();
        assert_eq!(names(dir.path()), ["a.yml=a", "b.yaml=b", "d.yaml=d", "sub/c.yaml=c"]);
        assert_eq!(names(&at("b.yaml")), ["b.yaml=b"]);
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let error = |make: &dyn Fn(&Path)| {
            let dir = tempfile::tempdir().unwrap();
            make(dir.path());
            let text = read_dir_recursive(dir.path()).unwrap_err().to_string();
            text.replace(&dir.path().display().to_string(), "DIR")
        };
        assert_eq!(
            error(&|d| fs::write(d.join("a.yaml"), b"ab\xff").unwrap()),
            "DIR/a.yaml: not UTF-8 (at byte 2); policies are UTF-8 text"
        );
        assert_eq!(
            error(&|d| symlink(d, d.join("loop")).unwrap()),
            "DIR/loop: this folder was read already: a link leads back to it"
        );
        assert_eq!(
            error(&|d| symlink("nowhere", d.join("a.yaml")).unwrap()),
            "DIR/a.yaml: No such file or directory (os error 2)"
        );
        assert_eq!(
            error(&|d| fs::write(d.join("a.yaml"), vec![b' '; FILE_BYTES + 1]).unwrap()),
            "DIR/a.yaml: larger than 10485760 bytes"
        );
        assert_eq!(error(&|d| symlink("/dev/zero", d.join("a.yaml")).unwrap()), "DIR/a.yaml: not a regular file");
    }

    /// Names, texts, and which of them are the very texts of `before`.
    fn kept<'f>(before: &Files, now: &'f Files) -> Vec<(&'f str, &'f str, bool)> {
        let is = |text: &Arc<str>| before.iter().any(|(_, old)| Arc::ptr_eq(old, text));
        now.iter().map(|(name, text)| (name.as_str(), &**text, is(text))).collect()
    }

    /// As if all that is remembered had been read when it had been left alone for long.
    fn age(memory: &mut Memory) {
        memory.0.values_mut().for_each(|known| known.settled = true);
    }

    #[test]
    fn a_changed_file_among_unchanged_ones() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, text) in [("a.yaml", "a"), ("b.yaml", "b"), ("c.yaml", "c")] {
            fs::write(at(name), text).unwrap();
        }
        let mut memory = Memory::default();
        let first = read_again(dir.path(), &mut memory).unwrap();
        age(&mut memory);
        fs::write(at("new"), "B").unwrap();
        fs::rename(at("new"), at("b.yaml")).unwrap();
        fs::remove_file(at("c.yaml")).unwrap();
        fs::write(at("d.yaml"), "d").unwrap();
        let now = read_again(dir.path(), &mut memory).unwrap();
        assert_eq!(kept(&first, &now), [("a.yaml", "a", true), ("b.yaml", "B", false), ("d.yaml", "d", false)]);
        assert_eq!(memory.0.len(), 3, "{memory:?}");
    }

    #[test]
    fn what_is_young_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        fs::write(&path, "one").unwrap();
        let mut memory = Memory::default();
        let first = read_again(dir.path(), &mut memory).unwrap();
        assert!(!memory.0[&path].settled);
        // Another text, as if written within the same tick of the clock: all that is remembered of the file agrees.
        fs::write(&path, "two").unwrap();
        let meta = fs::metadata(&path).unwrap();
        memory.0.get_mut(&path).unwrap().stamp = Stamp::of(&meta);
        let now = read_again(dir.path(), &mut memory).unwrap();
        assert_eq!(kept(&first, &now), [("a.yaml", "two", false)]);
        // It would be missed if it were believed.
        memory.0.get_mut(&path).unwrap().text = "one".into();
        age(&mut memory);
        assert_eq!(&*read_again(dir.path(), &mut memory).unwrap()[0].1, "one");
        memory.doubt();
        assert_eq!(&*read_again(dir.path(), &mut memory).unwrap()[0].1, "two");
        // The same text is the same one, though it was read again.
        let last = read_again(dir.path(), &mut memory).unwrap();
        memory.doubt();
        assert_eq!(kept(&last, &read_again(dir.path(), &mut memory).unwrap()), [("a.yaml", "two", true)]);
    }

    #[test]
    fn a_change_of_the_same_size_and_time_shows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        let write = |path: &Path, text: &str| {
            fs::write(path, text).unwrap();
            fs::File::options().write(true).open(path).unwrap().set_modified(UNIX_EPOCH + SETTLED).unwrap();
        };
        let mut memory = Memory::default();
        let mut read = || {
            let files = read_again(dir.path(), &mut memory).unwrap();
            age(&mut memory);
            files[0].1.to_string()
        };
        write(&path, "one");
        assert_eq!(read(), "one");
        // In place: the time of the last change of anything is another one, as soon as the clock has ticked.
        let before = Stamp::of(&fs::metadata(&path).unwrap());
        while {
            write(&path, "two");
            Stamp::of(&fs::metadata(&path).unwrap()) == before
        } {}
        let after = Stamp::of(&fs::metadata(&path).unwrap());
        assert_eq!((before.size, before.times[0], before.number), (after.size, after.times[0], after.number));
        assert_eq!(read(), "two");
        // Another file in its place.
        write(&dir.path().join("aside"), "six");
        fs::rename(dir.path().join("aside"), &path).unwrap();
        assert_eq!(read(), "six");
        // The same name leads elsewhere.
        write(&dir.path().join("aside"), "ten");
        fs::remove_file(&path).unwrap();
        symlink("aside", &path).unwrap();
        assert_eq!(read(), "ten");
    }

    #[test]
    fn only_what_was_left_alone_is_older() {
        let stamp = |mtime: u64, ctime: u64| Stamp {
            device: 0,
            number: 0,
            size: 0,
            times: [mtime, ctime].map(|ns| ((ns / 1_000_000_000) as i64, (ns % 1_000_000_000) as i64)),
        };
        let (moment, settled) = (5_000_000_000, SETTLED.as_nanos() as u64);
        let older = |mtime, ctime| stamp(mtime, ctime).is_older_than(UNIX_EPOCH + Duration::from_nanos(moment));
        let (old, young) = (moment - settled - 1, moment - settled);
        assert!(older(old, old) && older(0, old));
        assert!(!older(young, old) && !older(old, young) && !older(old, moment + settled), "from the future");
        assert!(!stamp(0, 0).is_older_than(UNIX_EPOCH));
    }
}
