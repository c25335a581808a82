//! The one place of `policy` that reads files: a folder, as names and texts for `document::parse`.

use super::yaml::{DOCUMENTS, FILE_BYTES, TOTAL_BYTES};
use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

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

/// All `*.yaml` and `*.yml` below `dir` (or the one file that `dir` is), in the order of their names relative to it.
/// Names that begin with a dot are passed over: so the `..data` of a Kubernetes volume is not read twice.
pub fn read_dir_recursive(dir: &Path) -> Result<Vec<(String, String)>, LoadError> {
    let mut walk = Walk { files: Vec::new(), seen: HashSet::new(), bytes: 0, entries: 0 };
    let about = |source| LoadError::Io { path: dir.to_owned(), source };
    if fs::metadata(dir).map_err(about)?.is_dir() {
        walk.folder(dir, "", 0)?;
    } else {
        let name = dir.file_name().unwrap_or(dir.as_os_str()).to_str();
        walk.file(dir, name.ok_or_else(|| LoadError::Name { path: dir.to_owned() })?.to_owned())?;
    }
    walk.files.sort();
    Ok(walk.files)
}

struct Walk {
    files: Vec<(String, String)>,
    /// Folders by their real path.
    seen: HashSet<PathBuf>,
    bytes: usize,
    entries: usize,
}

impl Walk {
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
                Ok(_) if wanted => self.file(&path, relative)?,
                Ok(_) => {}
                // A link to nowhere that is no policy is no business of ours.
                Err(source) if wanted => return Err(LoadError::Io { path, source }),
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, name: String) -> Result<(), LoadError> {
        let about = |source| LoadError::Io { path: path.to_owned(), source };
        // Asked before it is opened: to open a pipe would wait for ever.
        if !fs::metadata(path).map_err(about)?.is_file() {
            return Err(LoadError::NotAFile { path: path.to_owned() });
        }
        let mut bytes = Vec::new();
        // Read with a bound, since the size may change after it was asked for.
        let _ =
            fs::File::open(path).map_err(about)?.take(FILE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(about)?;
        if bytes.len() > FILE_BYTES {
            return Err(LoadError::FileTooLarge { path: path.to_owned() });
        }
        self.bytes += bytes.len();
        if self.bytes > TOTAL_BYTES {
            return Err(LoadError::TotalTooLarge { path: path.to_owned() });
        }
        let text = String::from_utf8(bytes)
            .map_err(|e| LoadError::NotUtf8 { path: path.to_owned(), offset: e.utf8_error().valid_up_to() })?;
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
}
