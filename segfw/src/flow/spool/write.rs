//! The thread that writes. It owns the files; nothing here is waited for by anybody.

use super::files::{self, Named};
use super::{BATCH_BYTES, Counts, Missing, Newest, Place, lock};
use crate::flow::Text;
use crate::flow::line::Lines;
use crate::flow::record::Item;
use jiff::Timestamp;
use std::collections::{BTreeMap, VecDeque};
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Files that are read at the start to learn where each CPU's numbers ended.
const LOOK_BACK: usize = 2;

pub(super) struct Writer {
    place: Place,
    host: Text,
    counts: Arc<Counts>,
    /// What the queue had no room for.
    overflow: Arc<Mutex<Missing>>,
    /// What is to be told by the next loss mark.
    missing: Missing,
    lines: Lines,
    /// Lines that wait.
    batch: Vec<u8>,
    /// What would be missing if the batch were.
    in_batch: Missing,
    open: Option<File>,
    /// In the order of writing; the last one is open.
    files: VecDeque<Named>,
    /// Records ever written here.
    next: u64,
}

impl Writer {
    pub(super) fn new(place: Place, host: Text, counts: Arc<Counts>, overflow: Arc<Mutex<Missing>>) -> Self {
        let (missing, in_batch) = (Missing::default(), Missing::default());
        let (open, files) = (None, VecDeque::new());
        Self {
            place,
            host,
            counts,
            overflow,
            missing,
            lines: Lines::default(),
            batch: Vec::new(),
            in_batch,
            open,
            files,
            next: 0,
        }
    }

    /// Takes over what is there. Returns where each CPU's numbers ended.
    pub(super) fn begin(&mut self) -> BTreeMap<u32, Newest> {
        let opened = self.open();
        self.say(opened);
        let mut newest = BTreeMap::new();
        for file in self.files.iter().rev().take(LOOK_BACK) {
            for (cpu, at) in files::scan(&file.path).map(|s| s.newest).unwrap_or_default() {
                let _ = newest.entry(cpu).or_insert(at);
            }
        }
        newest
    }

    /// One more line of the batch.
    pub(super) fn take(&mut self, item: &Item) {
        self.lines.write(item, &mut self.batch);
        self.in_batch.add(item);
        if self.batch.len() >= BATCH_BYTES.min(self.place.file_bytes as usize / 2) {
            self.flush();
        }
    }

    /// Writes the batch, and before it what is to be told of losses; also tries again where writing did not work.
    pub(super) fn flush(&mut self) {
        let overflow = std::mem::take(&mut *lock(&self.overflow));
        self.missing.merge(overflow);
        let mark = self.missing.mark(&self.host);
        if self.batch.is_empty() && mark.is_none() && self.open.is_some() {
            return;
        }
        let mut text = mark.map(|mark| crate::flow::render::json(&mark).into_bytes()).unwrap_or_default();
        text.append(&mut self.batch);
        let batch = std::mem::take(&mut self.in_batch);
        let written = self.append(&text);
        if written.is_ok() {
            self.next += batch.records;
            let _ = self.counts.written.fetch_add(batch.records, Ordering::Relaxed);
            self.missing = Missing::default();
        } else {
            let _ = self.counts.lost.fetch_add(batch.records, Ordering::Relaxed);
            self.missing.merge(batch);
        }
        self.say(written);
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        // Somebody removed the folder or the file: nobody would find what goes there.
        if self.open.as_ref().is_some_and(|f| f.metadata().map_or(true, |m| m.nlink() == 0)) {
            self.open = None;
        }
        if self.open.is_none() {
            self.open()?;
        }
        let more = text.len() as u64;
        let current = self.files.back().map_or(0, |f| f.bytes);
        if current > 0 && current + more > self.place.file_bytes {
            self.fresh()?;
        }
        self.make_room(more);
        let (Some(file), Some(named)) = (&mut self.open, self.files.back_mut()) else {
            return Err(io::Error::other("no file is open"));
        };
        if let Err(error) = file.write_all(text) {
            // A part may be there. Without it the next line would begin in the middle of one.
            if file.set_len(named.bytes).is_err() {
                self.open = None;
            }
            return Err(error);
        }
        named.bytes += more;
        Ok(())
    }

    /// The folder as it is; the newest file is written on.
    fn open(&mut self) -> io::Result<()> {
        self.open = None;
        DirBuilder::new().recursive(true).mode(0o700).create(&self.place.dir)?;
        self.files = files::list(&self.place.dir)?.into();
        let Some(newest) = self.files.back_mut() else {
            // What was written before is not to be counted again under the same numbers.
            return self.fresh();
        };
        let scan = files::scan(&newest.path)?;
        self.next = newest.first + scan.records;
        let file = File::options().append(true).custom_flags(libc::O_NOFOLLOW).open(&newest.path)?;
        if scan.good < newest.bytes {
            // An agent was killed while it wrote.
            file.set_len(scan.good)?;
            newest.bytes = scan.good;
            let _ = self.counts.torn.fetch_add(1, Ordering::Relaxed);
        }
        self.open = Some(file);
        Ok(())
    }

    /// Goes on in a new file.
    fn fresh(&mut self) -> io::Result<()> {
        let path = self.place.dir.join(files::name(self.next, Timestamp::now()));
        // An empty file of the same number may be left of a try that failed.
        let file = File::options().append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&path)?;
        let bytes = file.metadata()?.len();
        self.files.push_back(Named { path, first: self.next, bytes, modified: None });
        self.open = Some(file);
        Ok(())
    }

    /// The oldest files go until there is room. The one that is open stays.
    fn make_room(&mut self, more: u64) {
        let mut total: u64 = self.files.iter().map(|f| f.bytes).sum();
        while total + more > self.place.max_bytes && self.files.len() > 1 {
            let Some(oldest) = self.files.pop_front() else { return };
            total -= oldest.bytes;
            remove(&oldest.path);
        }
    }

    /// Keeps the counts, and logs a change of fortune once.
    fn say(&mut self, written: io::Result<()>) {
        let set = |counter: &AtomicU64, value: u64| counter.store(value, Ordering::Relaxed);
        let oldest = self.files.front().map_or(self.next, |f| f.first);
        set(&self.counts.dropped, oldest);
        set(&self.counts.kept, self.next.saturating_sub(oldest));
        set(&self.counts.bytes, self.files.iter().map(|f| f.bytes).sum());
        set(&self.counts.files, self.files.len() as u64);
        let mut failing = lock(&self.counts.failing);
        let now = written.err().map(|e| format!("{}: {e}", self.place.dir.display()));
        match (&*failing, &now) {
            (None, Some(why)) => tracing::error!("flow records cannot be written to {why}; the loss is counted"),
            (Some(_), None) => tracing::info!("flow records are written to {} again", self.place.dir.display()),
            (None, None) | (Some(_), Some(_)) => {}
        }
        *failing = now;
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::error!("{} cannot be removed: {error}", path.display());
    }
}
