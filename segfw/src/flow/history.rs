//! The last records of this host, and live readers of what comes. One reader that is slow holds nobody up: it is told
//! how many records it missed.

use super::Text;
use super::query::Query;
use super::record::{Item, Loss, LostIn};
use jiff::Timestamp;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::broadcast;

/// Records that are kept: some 40 MB at most, an hour at 18 new flows a second. The collector keeps more.
pub const RECORDS: usize = 1 << 16;
/// Records that wait for one live reader. More: the reader is told how many it lost.
pub const WAITING: usize = 1 << 12;

/// Records of this host. Cheap to share.
#[derive(Debug)]
pub struct History {
    host: Text,
    capacity: usize,
    kept: Mutex<Kept>,
    live: broadcast::Sender<Arc<Item>>,
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
        Self { host, capacity: capacity.max(1), kept: Mutex::default(), live }
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
        // Under the lock, so that a reader that begins now gets each item exactly once. No reader is no error.
        let _ = self.live.send(item);
    }

    /// What the query asks for, oldest first.
    pub fn recent(&self, query: &Query) -> Vec<Arc<Item>> {
        query.select(self.kept().items.iter())
    }

    /// What the query asks for, and a reader of what comes after it.
    pub fn follow(&self, query: &Query) -> (Vec<Arc<Item>>, Follower) {
        let kept = self.kept();
        let reader = Follower { live: self.live.subscribe(), host: self.host.clone() };
        // With neither a count nor a time, following begins now, as in Hubble.
        let begins_now = query.last.is_none() && query.first.is_none() && query.since.is_none();
        (if begins_now { Vec::new() } else { query.select(kept.items.iter()) }, reader)
    }

    /// Items kept, and items that made room for newer ones.
    pub fn counts(&self) -> (usize, u64) {
        let kept = self.kept();
        (kept.items.len(), kept.overwritten)
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
}

impl Follower {
    /// The next item, unfiltered; `None` when the history is gone. Safe to cancel.
    pub async fn next(&mut self) -> Option<Arc<Item>> {
        match self.live.recv().await {
            Ok(item) => Some(item),
            Err(broadcast::error::RecvError::Closed) => None,
            Err(broadcast::error::RecvError::Lagged(lost)) => Some(Arc::new(Item::Lost(Loss {
                time: Timestamp::now(),
                host: self.host.clone(),
                lost,
                lost_in: LostIn::Reader,
                cpu: None,
                after: None,
                before: None,
            }))),
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
        assert_eq!(past.iter().filter_map(|i| sequence(i)).collect::<Vec<_>>(), [0]);
        assert_eq!(sequence(&live.next().await.unwrap()), Some(1));
        let (past, _) = history.follow(&Query::default());
        assert!(past.is_empty());
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
