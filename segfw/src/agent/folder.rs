//! Whether the policy folder changed.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Whether the policy folder changed: names, sizes, times and inode numbers of its files.
pub(super) struct Folder {
    path: std::path::PathBuf,
    seen: Vec<(std::path::PathBuf, u64, i64, i64, u64)>,
    moving: bool,
}

impl Folder {
    pub(super) fn new(path: &Path) -> Self {
        let mut folder = Self { path: path.to_owned(), seen: Vec::new(), moving: false };
        folder.seen = folder.look();
        folder
    }
    fn look(&self) -> Vec<(std::path::PathBuf, u64, i64, i64, u64)> {
        let mut all = Vec::new();
        let mut stack = vec![(self.path.clone(), 0)];
        while let Some((path, depth)) = stack.pop() {
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            if meta.is_dir() && depth <= crate::policy::load::FOLDER_DEPTH {
                for entry in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                    stack.push((entry.path(), depth + 1));
                }
            }
            all.push((path, meta.size(), meta.mtime(), meta.mtime_nsec(), meta.ino()));
        }
        all.sort();
        all
    }
    /// True once after a change, when it has been still for one look: an editor writes in several steps.
    pub(super) fn changed(&mut self) -> bool {
        let now = self.look();
        let same = now == self.seen;
        let settled = same && self.moving;
        self.moving = !same;
        self.seen = now;
        settled
    }
}
