//! One folder in place of another, in one step: whoever reads the path finds the old files or the new ones, never some of
//! both. The new folder is made beside the old one and the two are exchanged, so that the way back is one step as well.

use super::CliError;
use crate::policy::load::FOLDER_DEPTH;
use std::ffi::CString;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Component, Path, PathBuf};

/// Things that are no policy and stay in the folder: more than a person keeps beside one, and `.git` of a small one.
const CARRIED: usize = 65_536;
/// Of a file that was neither in the old folder nor in one that is applied.
const NEW_FILE_MODE: u32 = 0o600;

/// A file of the new folder.
pub(super) struct NewFile {
    /// Relative; folders in it are made.
    pub(super) name: String,
    pub(super) text: String,
    /// Where it comes from; a file that is there already keeps its own.
    pub(super) mode: Option<u32>,
}

/// A folder that is complete and on disk, beside the one it is to replace.
#[derive(Debug)]
pub(super) struct Staged {
    target: PathBuf,
    aside: PathBuf,
    /// Of the folder around both: one replacement at a time.
    _lock: File,
    /// What is at `aside` may be thrown away.
    disposable: bool,
}

impl Staged {
    /// Makes the new folder. Modes and owners of what is there stay; what is no policy file is carried over.
    pub(super) fn new(target: &Path, files: &[NewFile]) -> Result<Self, CliError> {
        let about = |path: &Path, e: &io::Error| CliError::system(format!("{}: {e}", path.display()));
        // A link to the folder stays a link.
        let target = target.canonicalize().map_err(|e| {
            CliError::system(format!(
                "{}: {e}; this is the agent's policy folder: does the agent run in a container?",
                target.display()
            ))
        })?;
        let (Some(around), Some(name)) = (target.parent(), target.file_name().and_then(|n| n.to_str())) else {
            return Err(CliError::system(format!("{}: cannot be replaced", target.display())));
        };
        let lock = File::open(around).map_err(|e| about(around, &e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(CliError::system(format!(
                    "somebody else is replacing {} just now; try again when that is done",
                    target.display()
                )));
            }
            Err(fs::TryLockError::Error(e)) => return Err(about(around, &e)),
        }
        let aside = around.join(format!(".{name}.segfw-new"));
        // Of one that was killed on its way; nobody else holds the lock.
        remove(&aside).map_err(|e| about(&aside, &e))?;
        let staged = Self { target, aside, _lock: lock, disposable: true };
        staged.fill(files).map_err(|(path, e)| {
            let hint = if e.kind() == io::ErrorKind::PermissionDenied { " (try sudo)" } else { "" };
            CliError::system(format!("{}: {e}{hint}; nothing was changed", path.display()))
        })?;
        Ok(staged)
    }

    fn fill(&self, files: &[NewFile]) -> Result<(), (PathBuf, io::Error)> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |e| (path, e)
        };
        let old = fs::metadata(&self.target).map_err(at(&self.target))?;
        make_like(&self.aside, &old).map_err(at(&self.aside))?;
        for NewFile { name, text, mode } in files {
            let relative = Path::new(name);
            // The names come from a folder or from the agent's history; neither may lead out.
            if relative.components().any(|c| !matches!(c, Component::Normal(_))) {
                return Err((relative.to_owned(), io::Error::other("not a name inside a folder")));
            }
            let (path, was) = (self.aside.join(relative), fs::metadata(self.target.join(relative)).ok());
            for folder in relative.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
                let path = self.aside.join(folder);
                if !path.exists() {
                    let like = fs::metadata(self.target.join(folder)).unwrap_or_else(|_| old.clone());
                    make_like(&path, &like).map_err(at(&path))?;
                }
            }
            let mode = was.as_ref().map(Metadata::mode).or(*mode).unwrap_or(NEW_FILE_MODE) & 0o7777;
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path).map_err(at(&path))?;
            file.write_all(text.as_bytes()).map_err(at(&path))?;
            if let Some(was) = was {
                own(&path, &was).map_err(at(&path))?;
            }
            file.set_permissions(fs::Permissions::from_mode(mode)).map_err(at(&path))?;
            file.sync_all().map_err(at(&path))?;
        }
        let mut left = CARRIED;
        carry(&self.target, &self.aside, 0, false, &mut left)?;
        File::open(&self.aside).and_then(|d| d.sync_all()).map_err(at(&self.aside))
    }

    /// Exchanges the two folders. Called again it exchanges them back.
    pub(super) fn exchange(&self) -> Result<(), CliError> {
        let done = exchange(&self.target, &self.aside).and_then(|()| {
            let around = self.target.parent().unwrap_or(Path::new("/"));
            File::open(around)?.sync_all()
        });
        done.map_err(|e| {
            let why = match e.raw_os_error() {
                Some(libc::EBUSY | libc::EXDEV) => {
                    "it is a mount point; write the files into it by other means, the agent follows them"
                }
                Some(libc::EINVAL | libc::ENOSYS) => {
                    "its file system cannot exchange folders; write the files into it by other means, the agent \
                     follows them"
                }
                _ => "nothing was changed",
            };
            CliError::system(format!("{} cannot be replaced: {e}: {why}", self.target.display()))
        })
    }

    /// Keeps what was replaced, beside the folder. Returns where.
    pub(super) fn keep_replaced(mut self) -> io::Result<PathBuf> {
        let mut name = self.target.clone().into_os_string();
        name.push(".replaced");
        let kept = PathBuf::from(name);
        remove(&kept)?;
        fs::rename(&self.aside, &kept)?;
        self.disposable = false;
        Ok(kept)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.disposable {
            // What is left behind the next replacement removes.
            let _ = remove(&self.aside);
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn make_like(path: &Path, like: &Metadata) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)?;
    own(path, like)?;
    fs::set_permissions(path, fs::Permissions::from_mode(like.mode() & 0o7777))
}

/// Gives it the owner of another one; only root can, and only where that is somebody else it matters.
fn own(path: &Path, like: &Metadata) -> io::Result<()> {
    let now = fs::symlink_metadata(path)?;
    if (now.uid(), now.gid()) == (like.uid(), like.gid()) {
        return Ok(());
    }
    chown(path, Some(like.uid()), Some(like.gid()))
}

/// Is it what the agent reads? (`policy::load` has the same rule.)
fn is_policy(name: &str) -> bool {
    !name.starts_with('.') && (name.ends_with(".yaml") || name.ends_with(".yml"))
}

/// Takes over what is no policy: notes, `.git`. Files by hard links, so that a large one costs nothing.
fn carry(from: &Path, to: &Path, depth: usize, hidden: bool, left: &mut usize) -> Result<(), (PathBuf, io::Error)> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |e| (path, e)
    };
    if depth > FOLDER_DEPTH {
        return Err((from.to_owned(), io::Error::other(format!("folders are nested deeper than {FOLDER_DEPTH}"))));
    }
    for entry in fs::read_dir(from).map_err(at(from))? {
        let entry = entry.map_err(at(from))?;
        let (path, new) = (entry.path(), to.join(entry.file_name()));
        *left = left
            .checked_sub(1)
            .ok_or_else(|| (from.to_owned(), io::Error::other(format!("more than {CARRIED} entries"))))?;
        let meta = fs::symlink_metadata(&path).map_err(at(&path))?;
        // Inside a hidden folder nothing is a policy.
        let hidden = hidden || entry.file_name().as_bytes().starts_with(b".");
        // A link to a folder is read as that folder.
        let linked = meta.is_symlink() && fs::metadata(&path).is_ok_and(|m| m.is_dir());
        if meta.is_dir() {
            // One that held nothing but policies that are gone goes too.
            let made = !new.exists();
            if made {
                make_like(&new, &meta).map_err(at(&new))?;
            }
            carry(&path, &new, depth + 1, hidden, left)?;
            if made && !hidden {
                let _ = fs::remove_dir(&new);
            }
        } else if !hidden && (linked || entry.file_name().to_str().is_none_or(is_policy)) {
            // Replaced, or gone.
        } else if meta.is_symlink() {
            symlink(fs::read_link(&path).map_err(at(&path))?, &new).map_err(at(&new))?;
        } else {
            fs::hard_link(&path, &new).map_err(at(&new))?;
        }
    }
    Ok(())
}

fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
    let (a, b) = (text(a)?, text(b)?);
    // SAFETY: both are NUL-terminated and live through the call; no descriptor is passed on. The system call itself,
    // since musl has no function for it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(name: &str, text: &str) -> NewFile {
        NewFile { name: name.into(), text: text.into(), mode: Some(0o644) }
    }
    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn replaced_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("policies");
        let at = |name: &str| target.join(name);
        fs::create_dir_all(at("sub")).unwrap();
        fs::create_dir_all(at("gone")).unwrap();
        fs::create_dir_all(at(".git/objects")).unwrap();
        for (name, text) in [
            ("a.yaml", "old"),
            ("b.yaml", "old"),
            ("gone/c.yml", "old"),
            ("notes.txt", "mine"),
            ("sub/README", "mine"),
            (".git/objects/x.yaml", "git"),
        ] {
            fs::write(at(name), text).unwrap();
        }
        fs::set_permissions(&target, fs::Permissions::from_mode(0o750)).unwrap();
        fs::set_permissions(at("a.yaml"), fs::Permissions::from_mode(0o640)).unwrap();
        let link = dir.path().join("link");
        symlink(&target, &link).unwrap();
        let staged = Staged::new(&link, &[new("a.yaml", "new"), new("new/d.yaml", "new")]).unwrap();
        assert_eq!(fs::read_to_string(at("a.yaml")).unwrap(), "old", "nothing happens before the exchange");
        let error = Staged::new(&target, &[]).unwrap_err();
        assert!(error.message.contains("somebody else is replacing"), "{}", error.message);
        staged.exchange().unwrap();
        assert!(link.is_symlink());
        let read = |name: &str| fs::read_to_string(at(name)).ok();
        assert_eq!((read("a.yaml").as_deref(), read("new/d.yaml").as_deref()), (Some("new"), Some("new")));
        assert_eq!((read("b.yaml"), at("gone").exists()), (None, false));
        assert_eq!((read("notes.txt").as_deref(), read("sub/README").as_deref()), (Some("mine"), Some("mine")));
        assert_eq!(read(".git/objects/x.yaml").as_deref(), Some("git"));
        assert_eq!((mode(&target), mode(&at("a.yaml")), mode(&at("new/d.yaml"))), (0o750, 0o640, 0o644));
        staged.exchange().unwrap();
        assert_eq!((read("a.yaml").as_deref(), read("gone/c.yml").as_deref()), (Some("old"), Some("old")));
        staged.exchange().unwrap();
        let kept = staged.keep_replaced().unwrap();
        assert_eq!(fs::read_to_string(kept.join("b.yaml")).unwrap(), "old");
        let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["link", "policies", "policies.replaced"]);
    }

    #[test]
    fn names_do_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("policies");
        fs::create_dir(&target).unwrap();
        for name in ["../x.yaml", "/tmp/x.yaml", "a/../../x.yaml"] {
            assert!(Staged::new(&target, &[new(name, "")]).unwrap_err().message.contains("not a name inside"));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
