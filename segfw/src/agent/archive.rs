//! The revisions that were in force here, with their files: what `segfw policy history` lists and `rollback` puts back.

use crate::control::Failure;
use crate::control::report::{PastReport, PolicyFile};
use crate::policy::{self, load::Files};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Revisions that are kept. A month of daily changes; who needs more keeps the folder in git.
pub const REVISIONS: usize = 32;
/// Bytes of all of them: two of the largest policies that an agent reads.
pub const BYTES: u64 = 2 * policy::yaml::TOTAL_BYTES as u64;
/// However large they are: the one in force and the one before, without which there is no way back.
const AT_LEAST: usize = 2;
/// Characters of a source that are kept.
const SOURCE_CHARS: usize = 200;
/// What the history says where nobody said who changed the folder.
pub const FOLDER: &str = "the folder changed";

/// One revision on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Kept<F> {
    number: u64,
    digest: String,
    at: Timestamp,
    source: String,
    files: F,
}

/// A folder with one file for each revision.
#[derive(Clone, Debug)]
pub struct Archive {
    dir: PathBuf,
}

impl Archive {
    /// In the state folder; made when something is kept.
    pub fn new(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("revisions") }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:010}.json"))
    }

    /// The highest number that was ever kept and is still there; 0 = none.
    pub fn newest(&self) -> u64 {
        self.numbers().ok().and_then(|all| all.first().map(|(number, _)| *number)).unwrap_or(0)
    }

    /// Is this revision kept, whole or not?
    pub fn has(&self, number: u64) -> bool {
        self.path(number).exists()
    }

    /// Keeps a revision, and lets the oldest go. Written aside, flushed and renamed: there is never half of one.
    pub fn keep(
        &self,
        number: u64,
        digest: &str,
        at: Timestamp,
        source: &str,
        files: &[(String, Arc<str>)],
    ) -> io::Result<()> {
        let source: String = source.chars().filter(|c| !c.is_control()).take(SOURCE_CHARS).collect();
        let kept = Kept { number, digest: digest.to_owned(), at, source, files };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let aside = self.dir.join("new");
        super::revision::write_whole(&aside, &kept)?;
        std::fs::rename(&aside, self.path(number))?;
        std::fs::File::open(&self.dir)?.sync_all()?;
        self.thin()
    }

    /// Says who a revision is from, where only a change of the folder was seen.
    pub fn attribute(&self, number: u64, source: &str) -> io::Result<()> {
        match self.read(number) {
            Ok(kept) if kept.source == FOLDER => self.keep(number, &kept.digest, kept.at, source, &kept.files),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn thin(&self) -> io::Result<()> {
        let mut bytes = 0;
        for (n, (number, size)) in self.numbers()?.into_iter().enumerate() {
            bytes += size;
            if n >= AT_LEAST && (n >= REVISIONS || bytes > BYTES) {
                std::fs::remove_file(self.path(number))?;
            }
        }
        Ok(())
    }

    /// Numbers and sizes, newest first.
    fn numbers(&self) -> io::Result<Vec<(u64, u64)>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(|n| n.strip_suffix(".json")?.parse().ok()) else { continue };
            found.push((number, entry.metadata()?.len()));
        }
        found.sort_unstable_by_key(|(number, _)| std::cmp::Reverse(*number));
        Ok(found)
    }

    /// A revision that is whole, or why it is not.
    fn read(&self, number: u64) -> Result<Kept<Files>, String> {
        let bytes = std::fs::read(self.path(number)).map_err(|e| e.to_string())?;
        let kept: Kept<Files> = serde_json::from_slice(&bytes).map_err(|e| format!("not readable: {e}"))?;
        if kept.number != number {
            return Err(format!("it says that it is revision {}", kept.number));
        }
        if policy::digest(&kept.files) != kept.digest {
            return Err("its files do not have the digest that was written down".to_owned());
        }
        Ok(kept)
    }

    /// All of them, newest first; damaged ones say so.
    pub fn list(&self, in_force: Option<u64>) -> Result<Vec<PastReport>, Failure> {
        let numbers = self.numbers().map_err(|e| Failure::system(format!("{}: {e}", self.dir.display())))?;
        let report = |(number, size): (u64, u64)| {
            let in_force = in_force == Some(number);
            let (kept, damaged) = match self.read(number) {
                Ok(kept) => (Some(kept), None),
                Err(why) => (None, Some(format!("{}: {why}", self.path(number).display()))),
            };
            let bytes = kept.as_ref().map_or(size, |k| k.files.iter().map(|(_, text)| text.len() as u64).sum());
            PastReport {
                number,
                in_force,
                bytes,
                damaged,
                files: kept.as_ref().map_or(0, |k| k.files.len()),
                since: kept.as_ref().map(|k| k.at),
                digest: kept.as_ref().map(|k| k.digest.clone()).unwrap_or_default(),
                source: kept.map(|k| k.source).unwrap_or_default(),
            }
        };
        Ok(numbers.into_iter().map(report).collect())
    }

    /// The files of one.
    pub fn files(&self, number: u64) -> Result<Vec<PolicyFile>, Failure> {
        if !self.has(number) {
            return Err(Failure::input(format!("revision {number} is not kept here; see segfw policy history")));
        }
        let kept = self.read(number).map_err(|why| {
            Failure::system(format!("revision {number} is damaged ({}: {why})", self.path(number).display()))
        })?;
        Ok(kept.files.into_iter().map(|(name, text)| PolicyFile { name, text: text.to_string() }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(text: &str) -> Files {
        vec![("a.yaml".to_owned(), text.into())]
    }

    fn keep(archive: &Archive, number: u64, source: &str, files: &Files) {
        archive.keep(number, &policy::digest(files), Timestamp::UNIX_EPOCH, source, files).unwrap();
    }

    #[test]
    fn the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::new(dir.path());
        assert!(archive.list(None).unwrap().is_empty());
        for n in 1..=REVISIONS as u64 + 3 {
            keep(&archive, n, "me\x1b[31m", &files(&n.to_string()));
        }
        let list = archive.list(Some(35)).unwrap();
        assert_eq!((list.len(), list[0].number, list[31].number), (REVISIONS, 35, 4));
        assert_eq!(archive.newest(), 35);
        assert!(list[0].in_force && !list[1].in_force && list[0].source == "me[31m", "{:?}", list[0]);
        assert_eq!(archive.files(35).unwrap()[0].text, "35");
        assert!(archive.files(1).unwrap_err().message.contains("not kept here"));
        keep(&archive, 36, FOLDER, &files("x"));
        archive.attribute(36, "apply").unwrap();
        archive.attribute(35, "apply").unwrap();
        let list = archive.list(None).unwrap();
        assert_eq!((list[0].source.as_str(), list[1].source.as_str()), ("apply", "me[31m"));
    }

    #[test]
    fn bytes_are_bounded_and_a_way_back_stays() {
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::new(dir.path());
        for n in 1..=4 {
            keep(&archive, n, "me", &files("x"));
        }
        // Sparse: its size counts, not its blocks.
        std::fs::File::options().write(true).open(archive.path(4)).unwrap().set_len(BYTES + 1).unwrap();
        archive.thin().unwrap();
        assert_eq!(archive.numbers().unwrap().iter().map(|n| n.0).collect::<Vec<_>>(), [4, 3]);
    }

    #[test]
    fn a_damaged_one_is_said_and_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::new(dir.path());
        keep(&archive, 1, "me", &files("x"));
        keep(&archive, 2, "me", &files("y"));
        let whole = std::fs::read_to_string(archive.path(2)).unwrap();
        for broken in [whole.replace("\"y\"", "\"z\""), whole[..whole.len() / 2].to_owned(), String::new()] {
            std::fs::write(archive.path(2), broken).unwrap();
            let list = archive.list(None).unwrap();
            assert!(list[0].damaged.is_some() && list[1].damaged.is_none(), "{list:?}");
            assert!(archive.files(2).unwrap_err().message.contains("damaged"));
            assert_eq!(archive.files(1).unwrap()[0].text, "x");
        }
    }
}
