//! The records of this host on disk: what [`super::History`] gets is also appended to files, so that it survives the
//! agent and reaches further back than memory. The one part of `flow` that does I/O and reads a clock.
//!
//! Nobody waits for the disk: items go through a bounded queue to a thread of their own. What the queue has no room for,
//! and what cannot be written (disk full, read-only, EIO), is counted, and a loss mark says so in the files as soon as
//! writing works again. So a reader of the files can prove: records + what the loss marks say = the kernel's counters.
//!
//! A file is JSON lines, as `segfw flows -o json` writes them. Its name holds how many records were written to this spool
//! before it: names sort in the order of writing whatever the wall clock does, and the difference of two names is the
//! number of records in a file.

mod files;
mod read;
mod write;

pub use read::Older;

use super::Text;
use super::record::{Item, Loss, LostIn};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use write::Writer;

/// Items that wait for the writer: most of what a full ring buffer can pour out at once. More: lost and counted. So many
/// cost little, since memory has them anyway: less than [`super::history::RECORDS`] by more than a batch holds, so that
/// what is not written yet is always in memory too.
pub const WAITING: usize = super::history::RECORDS - (1 << 12);
/// Items that are taken from the queue before the clock is asked.
const TOGETHER: usize = 256;
/// What has waited so long is written. No fsync: a crash of the machine may cost what the kernel had not written back.
pub const FLUSH: Duration = Duration::from_secs(1);
/// Bytes that are written together at most, but for one longer line.
pub const BATCH_BYTES: usize = 256 << 10;
/// A file is never meant to be smaller than this, nor all files together than four times as much.
pub const LEAST_FILE_BYTES: u64 = 64 << 10;
/// How long the beginning and the end of the agent wait for a disk that does not answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where, and how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder; made with mode 0700 if it is not there.
    pub dir: PathBuf,
    /// Bytes of all files.
    pub max_bytes: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
}

impl Place {
    /// Sizes that work: at least four files, so that making room never costs more than a quarter.
    fn settled(self) -> Self {
        let max_bytes = self.max_bytes.max(4 * LEAST_FILE_BYTES);
        Self { max_bytes, file_bytes: self.file_bytes.clamp(LEAST_FILE_BYTES, max_bytes / 4), ..self }
    }
}

/// What became of the records.
#[derive(Debug, Default)]
pub struct Counts {
    /// Written since this agent started.
    pub written: AtomicU64,
    /// Never written: no room in the queue, or the disk refused.
    pub lost: AtomicU64,
    /// Written once and gone with the oldest files, over the life of the folder.
    pub dropped: AtomicU64,
    /// In the files now.
    pub kept: AtomicU64,
    /// Bytes of all files now.
    pub bytes: AtomicU64,
    /// Files now.
    pub files: AtomicU64,
    /// Lines that were cut off, as by the death of an agent, and were removed.
    pub torn: AtomicU64,
    /// Why writing does not work at the moment.
    failing: Mutex<Option<String>>,
}

impl Counts {
    /// Names and values, for the status.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        let Self { written, lost, dropped, kept, bytes, files, torn, failing: _ } = self;
        [
            ("spool-written", written),
            ("spool-lost", lost),
            ("spool-dropped", dropped),
            ("spool-records", kept),
            ("spool-bytes", bytes),
            ("spool-files", files),
            ("spool-torn", torn),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }

    /// Why writing does not work at the moment; `None` = it does.
    pub fn failing(&self) -> Option<String> {
        lock(&self.failing).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is whole between any two statements of ours.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What could not be written, as the next loss mark will say it.
#[derive(Debug, Default)]
struct Missing {
    /// Records of any kind.
    records: u64,
    /// Numbered events, and what lost loss marks stood for.
    lost: u64,
    /// Denials that lost sums stood for.
    denials: u64,
    first: Option<Timestamp>,
    last: Option<Timestamp>,
}

impl Missing {
    fn add(&mut self, item: &Item) {
        match item {
            Item::Lost(loss) => {
                self.lost = self.lost.saturating_add(loss.lost);
                self.denials = self.denials.saturating_add(loss.denials);
            }
            Item::Flow(record) => {
                self.records += 1;
                self.lost += u64::from(record.sequence.is_some());
                self.denials = self.denials.saturating_add(record.count.unwrap_or(0));
            }
        }
        let _ = self.first.get_or_insert(item.time());
        self.last = Some(item.time());
    }

    fn merge(&mut self, other: Self) {
        self.records += other.records;
        self.lost = self.lost.saturating_add(other.lost);
        self.denials = self.denials.saturating_add(other.denials);
        self.first = self.first.or(other.first);
        self.last = other.last.or(self.last);
    }

    /// The mark; `None` where nothing is missing.
    fn mark(&self, host: &Text) -> Option<Item> {
        let last = self.last?;
        Some(Item::Lost(Loss {
            time: last,
            host: host.clone(),
            lost: self.lost,
            lost_in: LostIn::Spool,
            denials: self.denials,
            cpu: None,
            after: self.first,
            before: self.last,
        }))
    }
}

enum Order {
    Item(Arc<Item>),
    /// Write what there is, and say so.
    Flush(SyncSender<()>),
}

/// See the module.
#[derive(Debug)]
pub struct Spool {
    orders: SyncSender<Order>,
    counts: Arc<Counts>,
    overflow: Arc<Mutex<Missing>>,
    dir: PathBuf,
    newest: BTreeMap<u32, Newest>,
}

/// The newest numbered record of a CPU in the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newest {
    /// Its number.
    pub sequence: u64,
    /// Its time.
    pub time: Timestamp,
}

impl Spool {
    /// Begins. A folder that cannot be used is no error: it is tried again, and what is lost meanwhile is counted.
    pub fn start(place: Place, host: Text) -> std::io::Result<Self> {
        let place = place.settled();
        let (orders, waiting) = sync_channel::<Order>(WAITING);
        let (counts, overflow) = (Arc::<Counts>::default(), Arc::<Mutex<Missing>>::default());
        let dir = place.dir.clone();
        let mut writer = Writer::new(place, host, Arc::clone(&counts), Arc::clone(&overflow));
        let (begun, beginning) = sync_channel(1);
        let run = move || {
            let _ = begun.send(writer.begin());
            let mut due: Option<Instant> = None;
            loop {
                let wait = due.map_or(FLUSH, |due| due.saturating_duration_since(Instant::now()));
                match waiting.recv_timeout(wait) {
                    Ok(Order::Item(item)) => {
                        writer.take(&item);
                        let mut asked = None;
                        for _ in 0..TOGETHER {
                            match waiting.try_recv() {
                                Ok(Order::Item(item)) => writer.take(&item),
                                Ok(Order::Flush(done)) => {
                                    asked = Some(done);
                                    break;
                                }
                                Err(_) => break,
                            }
                        }
                        // Not only when the queue is empty: under a flood it never is.
                        let now = Instant::now();
                        if asked.is_some() || *due.get_or_insert(now + FLUSH) <= now {
                            writer.flush();
                            due = None;
                        }
                        if let Some(done) = asked {
                            let _ = done.try_send(());
                        }
                    }
                    Ok(Order::Flush(done)) => {
                        writer.flush();
                        due = None;
                        let _ = done.try_send(());
                    }
                    Err(RecvTimeoutError::Timeout) => {
                        writer.flush();
                        due = None;
                    }
                    Err(RecvTimeoutError::Disconnected) => return writer.flush(),
                }
            }
        };
        let _detached = std::thread::Builder::new().name("spool".into()).spawn(run)?;
        // Before the first new record: who reads on must know where the last agent ended. A disk that does not answer
        // holds up nothing that matters; then nothing is known of the last agent.
        let newest = beginning.recv_timeout(PATIENCE).unwrap_or_default();
        Ok(Self { orders, counts, overflow, dir, newest })
    }

    /// Hands an item over; never waits.
    pub(super) fn push(&self, item: &Arc<Item>) {
        match self.orders.try_send(Order::Item(Arc::clone(item))) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                lock(&self.overflow).add(item);
                if matches!(**item, Item::Flow(_)) {
                    let _ = self.counts.lost.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// Writes what waits; gives up after two seconds. For the end of the agent. Blocks.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        let end = Instant::now() + PATIENCE;
        let mut order = Order::Flush(done);
        while let Err(TrySendError::Full(back)) = self.orders.try_send(order) {
            if Instant::now() > end {
                return;
            }
            order = back;
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = wait.recv_timeout(end.saturating_duration_since(Instant::now()));
    }

    /// What became of the records.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the last agent ended, by CPU; of the two newest files.
    pub fn newest(&self) -> &BTreeMap<u32, Newest> {
        &self.newest
    }
}

#[cfg(test)]
mod tests;
