//! The last records of this host, and live readers of what comes. One reader that is slow holds nobody up: it is told
//! how many records it missed.

use super::Text;
use super::query::Query;
use super::record::{Item, Loss, LostIn};
use super::spool::{Older, Spool};
use jiff::{SignedDuration, Timestamp};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::broadcast;

/// Records that are kept: some 40 MB at most, an hour at 18 new flows a second. The collector keeps more.
pub const RECORDS: usize = 1 << 16;
/// Records that wait for one live reader. More: the reader is told how many it lost.
pub const WAITING: usize = 1 << 12;
/// Items are nearly in the order of their times: sums of denials and late softirqs are behind by less than this.
const DISORDER: SignedDuration = SignedDuration::from_secs(5);

/// Records of this host. Cheap to share.
#[derive(Debug)]
pub struct History {
    host: Text,
    capacity: usize,
    kept: Mutex<Kept>,
    live: broadcast::Sender<Arc<Item>>,
    spool: Option<Spool>,
    lagged: Arc<AtomicU64>,
}

/// What a query finds that has happened already.
#[derive(Debug)]
pub struct Past {
    /// What memory does not hold any more; to be read first. `None` where memory is enough, or there is no spool.
    pub older: Option<Older>,
    /// From memory, oldest first.
    pub recent: Vec<Arc<Item>>,
}

#[derive(Debug, Default)]
struct Kept {
    items: VecDeque<Arc<Item>>,
    overwritten: u64,
}

impl History {
    /// For the records of `host`; [`RECORDS`] is the capacity in production.
    pub fn new(host: Text, capacity: usize) -> Self {
        let (live, _) = broadcast::channel(WAITING);
        Self { host, capacity: capacity.max(1), kept: Mutex::default(), live, spool: None, lagged: Arc::default() }
    }

    /// The same, with files behind it.
    pub fn spooled(host: Text, capacity: usize, spool: Option<Spool>) -> Self {
        Self { spool, ..Self::new(host, capacity) }
    }

    /// The files, if there are some.
    pub fn spool(&self) -> Option<&Spool> {
        self.spool.as_ref()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // A panic elsewhere leaves the deque whole: each step of ours is one push or pop.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an item and hands it to the readers.
    pub fn push(&self, item: Item) {
        let item = Arc::new(item);
        let mut kept = self.kept();
        if kept.items.len() == self.capacity {
            let _ = kept.items.pop_front();
            kept.overwritten += 1;
        }
        kept.items.push_back(Arc::clone(&item));
        // Both under the lock, so that the files have the same order, and a reader that begins now gets each item exactly
        // once. No reader is no error.
        if let Some(spool) = &self.spool {
            spool.push(&item);
        }
        let _ = self.live.send(item);
    }

    /// What the query asks for, oldest first.
    pub fn recent(&self, query: &Query) -> Vec<Arc<Item>> {
        query.select(self.kept().items.iter())
    }

    /// What the query asks for, in memory and beyond it.
    pub fn past(&self, query: &Query) -> Past {
        let memory: Vec<_> = self.kept().items.iter().cloned().collect();
        self.beyond(query, &memory)
    }

    /// What the query asks for, and a reader of what comes after it.
    pub fn follow(&self, query: &Query) -> (Past, Follower) {
        let kept = self.kept();
        let reader =
            Follower { live: self.live.subscribe(), host: self.host.clone(), lagged: Arc::clone(&self.lagged) };
        let memory: Vec<_> = kept.items.iter().cloned().collect();
        drop(kept);
        // With neither a count nor a time, following begins now, as in Hubble.
        let begins_now = query.last.is_none() && query.first.is_none() && query.since.is_none();
        if begins_now {
            return (Past { older: None, recent: Vec::new() }, reader);
        }
        (self.beyond(query, &memory), reader)
    }

    fn beyond(&self, query: &Query, memory: &[Arc<Item>]) -> Past {
        let recent = query.select(memory.iter());
        let found = recent.iter().filter(|i| matches!(***i, Item::Flow(_))).count();
        let enough = match (query.first, query.last) {
            (None, Some(last)) => found >= last,
            (Some(_), _) | (None, None) => false,
        };
        let reaches = |since: Timestamp| memory.first().is_some_and(|oldest| oldest.time() + DISORDER < since);
        let older = match &self.spool {
            Some(spool) if !enough && !query.since.is_some_and(reaches) => {
                Some(Older::new(spool.dir().to_owned(), query, memory, found))
            }
            Some(_) | None => None,
        };
        Past { older, recent }
    }

    /// Items kept, and items that made room for newer ones.
    pub fn counts(&self) -> (usize, u64) {
        let kept = self.kept();
        (kept.items.len(), kept.overwritten)
    }

    /// Records that readers were too slow for.
    pub fn lagged(&self) -> u64 {
        self.lagged.load(Ordering::Relaxed)
    }

    /// Live readers.
    pub fn readers(&self) -> usize {
        self.live.receiver_count()
    }
}

/// A live reader.
#[derive(Debug)]
pub struct Follower {
    live: broadcast::Receiver<Arc<Item>>,
    host: Text,
    lagged: Arc<AtomicU64>,
}

impl Follower {
    /// The next item, unfiltered; `None` when the history is gone. Safe to cancel.
    pub async fn next(&mut self) -> Option<Arc<Item>> {
        match self.live.recv().await {
            Ok(item) => Some(item),
            Err(broadcast::error::RecvError::Closed) => None,
            Err(broadcast::error::RecvError::Lagged(lost)) => {
                let _ = self.lagged.fetch_add(lost, Ordering::Relaxed);
                Some(Arc::new(Item::Lost(Loss {
                    time: Timestamp::now(),
                    host: self.host.clone(),
                    lost,
                    lost_in: LostIn::Reader,
                    denials: 0,
                    cpu: None,
                    after: None,
                    before: None,
                })))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::record::{enrich, tests as fixed};

    fn item(sequence: u64) -> Item {
        let mut event = fixed::event();
        event.sequence = sequence;
        Item::Flow(Box::new(enrich(&event, &fixed::names())))
    }
    fn sequence(item: &Item) -> Option<u64> {
        match item {
            Item::Flow(record) => record.sequence,
            Item::Lost(_) => None,
        }
    }

    #[test]
    fn the_oldest_makes_room() {
        let history = History::new("h".into(), 3);
        for n in 0..5 {
            history.push(item(n));
        }
        let got: Vec<_> = history.recent(&Query::default()).iter().filter_map(|i| sequence(i)).collect();
        assert_eq!(got, [2, 3, 4]);
        assert_eq!(history.counts(), (3, 2));
    }

    #[tokio::test]
    async fn a_follower_sees_each_item_once() {
        let history = History::new("h".into(), 10);
        history.push(item(0));
        let (past, mut live) = history.follow(&Query { last: Some(5), ..Query::default() });
        history.push(item(1));
        assert_eq!(past.recent.iter().filter_map(|i| sequence(i)).collect::<Vec<_>>(), [0]);
        assert_eq!(sequence(&live.next().await.unwrap()), Some(1));
        let (past, _) = history.follow(&Query::default());
        assert!(past.recent.is_empty());
        drop(history);
        assert!(live.next().await.is_none());
    }

    #[tokio::test]
    async fn a_slow_follower_is_told_what_it_lost() {
        let history = History::new("h".into(), 1);
        let (_, mut live) = history.follow(&Query::default());
        for n in 0..WAITING as u64 + 7 {
            history.push(item(n));
        }
        let Item::Lost(loss) = &*live.next().await.unwrap() else { panic!("no loss") };
        assert_eq!((loss.lost, loss.lost_in), (7, LostIn::Reader));
        assert_eq!(sequence(&live.next().await.unwrap()), Some(7));
    }
}
