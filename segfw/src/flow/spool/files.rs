//! The files of a spool: names, and what a file holds.

use super::Newest;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const PREFIX: &str = "flows-";
const SUFFIX: &str = ".jsonl";
/// Longer lines are no records of ours: the longest fields are names and labels, of some kilobytes together.
const LINE_BYTES: usize = 1 << 20;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) path: PathBuf,
    /// Records written to this spool before it.
    pub(super) first: u64,
    pub(super) bytes: u64,
    pub(super) modified: Option<SystemTime>,
}

/// `flows-00000000000000000042-20261121T205939Z.jsonl`.
pub(super) fn name(first: u64, at: Timestamp) -> String {
    format!("{PREFIX}{first:020}-{}{SUFFIX}", at.strftime("%Y%m%dT%H%M%SZ"))
}

fn first(name: &str) -> Option<u64> {
    let rest = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    let (number, _) = rest.split_once('-')?;
    (number.len() == 20).then(|| number.parse().ok()).flatten()
}

/// The files in the order of writing. Others in the folder are left alone.
pub(super) fn list(dir: &Path) -> io::Result<Vec<Named>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let file_name = entry.file_name();
        let Some(first) = file_name.to_str().and_then(first) else { continue };
        // A file that went away since, or that is no file, is none of ours any more.
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_file() {
            found.push(Named { path: entry.path(), first, bytes: meta.len(), modified: meta.modified().ok() });
        }
    }
    found.sort_by(|a, b| a.path.file_name().cmp(&b.path.file_name()));
    Ok(found)
}

/// Calls `each` for every whole line, without its end; ends early where that says false. What follows the last line end
/// is not a line. Returns the bytes of all whole lines that were seen.
pub(super) fn lines(path: &Path, mut each: impl FnMut(&[u8]) -> bool) -> io::Result<u64> {
    let mut file = BufReader::with_capacity(64 << 10, File::open(path)?);
    let (mut read, mut good, mut line, mut too_long) = (0, 0, Vec::new(), false);
    loop {
        let part = file.fill_buf()?;
        if part.is_empty() {
            return Ok(good);
        }
        let end = part.iter().position(|b| *b == b'\n');
        let used = end.map_or(part.len(), |at| at + 1);
        too_long |= line.len() + used > LINE_BYTES;
        if too_long {
            // Shown to the caller as an empty line, which is no record either.
            line.clear();
        } else {
            line.extend_from_slice(part.get(..end.unwrap_or(used)).unwrap_or_default());
        }
        file.consume(used);
        read += used as u64;
        if end.is_some() {
            good = read;
            if !each(&line) {
                return Ok(good);
            }
            line.clear();
            too_long = false;
        }
    }
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) records: u64,
    /// Up to the last line end.
    pub(super) good: u64,
    pub(super) newest: BTreeMap<u32, Newest>,
}

/// The little of a line that tells what it is.
#[derive(serde::Deserialize)]
struct Head {
    time: Timestamp,
    cpu: Option<u32>,
    sequence: Option<u64>,
    lost: Option<u64>,
}

/// Reads a whole file.
pub(super) fn scan(path: &Path) -> io::Result<Scan> {
    let mut scan = Scan::default();
    let mut newest = BTreeMap::new();
    let mut records = 0;
    scan.good = lines(path, |line| {
        match serde_json::from_slice::<Head>(line) {
            Ok(Head { lost: Some(_), .. }) => {}
            Ok(Head { time, cpu, sequence, lost: None }) => {
                records += 1;
                if let (Some(cpu), Some(sequence)) = (cpu, sequence) {
                    let at = newest.entry(cpu).or_insert(Newest { sequence, time });
                    // The ring is nearly in order. A number that began again (new maps) is newer all the same.
                    if sequence > at.sequence || time > at.time {
                        *at = Newest { sequence, time };
                    }
                }
            }
            // It was written as one record.
            Err(_) => records += 1,
        }
        true
    })?;
    (scan.records, scan.newest) = (records, newest);
    Ok(scan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_number_and_are_read_again() {
        let at: Timestamp = "2026-11-21T20:59:39.5Z".parse().unwrap();
        assert_eq!(name(42, at), "flows-00000000000000000042-20261121T205939Z.jsonl");
        assert_eq!(first(&name(42, at)), Some(42));
        for other in
            ["flows-42-x.jsonl", "flows-00000000000000000042.jsonl", "notes.txt", "flows-00000000000000000042-x"]
        {
            assert_eq!(first(other), None, "{other}");
        }
        assert!(name(9, at) < name(10, "2026-11-20T00:00:00Z".parse().unwrap()));
    }

    #[test]
    fn only_whole_lines_are_lines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let long = "x".repeat(LINE_BYTES + 9);
        std::fs::write(file.path(), format!("a\n\n{long}\nb\ntorn")).unwrap();
        let mut got = Vec::new();
        let good = lines(file.path(), |line| {
            got.push(line.len());
            true
        })
        .unwrap();
        assert_eq!(got, [1, 0, 0, 1]);
        assert_eq!(good, (2 + 1 + long.len() + 1 + 2) as u64);
    }
}
