//! Records that are older than memory, read from the files in one stream: however much there is, one line at a time.

use super::files;
use crate::flow::query::Query;
use crate::flow::record::{Item, Record};
use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A file is left out by its times only if they are this far off: the wall clock may have been set.
const SLACK: Duration = Duration::from_secs(600);

/// What a query asks for beyond memory.
#[derive(Debug)]
pub struct Older {
    dir: PathBuf,
    query: Query,
    /// What memory has: the files are read up to the first line of it.
    known: HashSet<u64>,
    /// Of `last`: what memory could not give.
    newest: Option<usize>,
}

impl Older {
    /// `memory` is what the history holds, `found` the records of it that match.
    pub(in crate::flow) fn new(dir: PathBuf, query: &Query, memory: &[Arc<Item>], found: usize) -> Self {
        let newest = query.last.filter(|_| query.first.is_none()).map(|last| last.saturating_sub(found));
        Self { dir, query: query.clone(), known: memory.iter().map(|item| key(item)).collect(), newest }
    }

    /// Hands over what matches, oldest first, until there is no more or `each` says false. Blocks. Lines that are no
    /// records are passed over, and told at the end: `(records and marks handed over, unreadable lines)`.
    pub fn read(&self, mut each: impl FnMut(Item) -> bool) -> std::io::Result<(usize, usize)> {
        let mut paths = self.paths()?;
        let mut skip = 0;
        if let Some(wanted) = self.newest {
            // Twice over the files instead of all that matches in memory.
            let mut found = 0;
            let mut begin = paths.len();
            while begin > 0 && found < wanted {
                begin -= 1;
                let _ = self.file(&paths[begin], &mut |item| {
                    found += usize::from(matches!(item, Item::Flow(_)));
                    true
                })?;
            }
            paths.drain(..begin);
            skip = found.saturating_sub(wanted);
        }
        let (mut handed, mut unreadable, mut records) = (0, 0, 0);
        let first = self.query.first.unwrap_or(usize::MAX);
        for path in &paths {
            let (wrong, over) = self.file(path, &mut |item| {
                if matches!(item, Item::Flow(_)) {
                    if skip > 0 {
                        skip -= 1;
                        return true;
                    }
                    records += 1;
                } else if skip > 0 {
                    return true;
                }
                handed += 1;
                each(item) && records < first
            })?;
            unreadable += wrong;
            if over {
                break;
            }
        }
        Ok((handed, unreadable))
    }

    /// The files that can hold something, in the order of writing.
    fn paths(&self) -> std::io::Result<Vec<PathBuf>> {
        let since = self.query.since.and_then(|at| SystemTime::from(at).checked_sub(SLACK));
        let may = |file: &files::Named| match (since, file.modified) {
            (Some(since), Some(modified)) => modified >= since,
            _ => true,
        };
        match files::list(&self.dir) {
            Ok(found) => Ok(found.into_iter().filter(may).map(|f| f.path).collect()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// What matches in one file. Returns how many lines were unreadable, and whether memory begins here, or `each` has
    /// had enough.
    fn file(&self, path: &Path, each: &mut dyn FnMut(Item) -> bool) -> std::io::Result<(usize, bool)> {
        let (mut wrong, mut over) = (0, false);
        let read = files::lines(path, |line| {
            let Some(item) = parse(line) else {
                wrong += 1;
                return true;
            };
            over = self.known.contains(&key(&item)) || (self.query.matches(&item) && !each(item));
            !over
        });
        match read {
            Ok(_) => Ok((wrong, over)),
            // It made room for newer ones while we read.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok((wrong, over)),
            Err(error) => Err(error),
        }
    }
}

/// One line. The kind is looked at first: reading an untagged enumeration would build each value twice. No text of a
/// record can hold the key, since its quotes are escaped there.
fn parse(line: &[u8]) -> Option<Item> {
    const LOST: &[u8] = b"\"lost_in\":";
    if line.windows(LOST.len()).any(|w| w == LOST) {
        return serde_json::from_slice(line).ok().map(Item::Lost);
    }
    serde_json::from_slice::<Record>(line).ok().map(|record| Item::Flow(Box::new(record)))
}

/// What tells an item from every other one.
fn key(item: &Item) -> u64 {
    let mut hash = DefaultHasher::new();
    match item {
        Item::Flow(record) => {
            let Record { time, cpu, sequence, source, destination, count, rule, generation, .. } = &**record;
            (time, cpu, sequence, count, rule, generation).hash(&mut hash);
            (source.identity, source.ip, source.port, destination.identity, destination.port).hash(&mut hash);
        }
        Item::Lost(loss) => (loss.time, loss.lost, loss.cpu, loss.denials, loss.before).hash(&mut hash),
    }
    hash.finish()
}
