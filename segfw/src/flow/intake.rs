//! What the agent's main loop calls for each entry of the ring buffer.

use super::history::History;
use super::record::{Item, Names, enrich, enrich_denials, loss};
use super::{Sequences, decode};
use segfw_common::FlowEvent;
use segfw_common::event::{DenialCount, DenialKey};
use std::sync::Arc;

/// Bytes in, items into the history.
#[derive(Debug)]
pub struct Intake {
    sequences: Sequences,
    history: Arc<History>,
    /// Entries of a wrong size: kernel side and agent are of different layouts.
    pub unreadable: u64,
}

impl Intake {
    /// Feeds `history`.
    pub fn new(history: Arc<History>) -> Self {
        Self { sequences: Sequences::default(), history, unreadable: 0 }
    }

    /// Feeds `history` and goes on where its files end: what is missing in between will be told. `wall_minus_boot` in
    /// nanoseconds; what the files hold of an earlier boot is another count.
    pub fn resume(history: Arc<History>, wall_minus_boot: i128) -> Self {
        let mut sequences = Sequences::default();
        for (cpu, newest) in history.spool().map(|s| s.newest()).into_iter().flatten() {
            if let Ok(boot) = u64::try_from(newest.time.as_nanosecond() - wall_minus_boot) {
                sequences.resume(*cpu, newest.sequence, boot);
            }
        }
        Self { sequences, ..Self::new(history) }
    }

    /// Takes one entry. Returns the event, since some ask for more than to be written down (`Reject`).
    pub fn take(&mut self, data: &[u8], names: &Names) -> Option<FlowEvent> {
        let Ok(event) = decode(data) else {
            self.unreadable += 1;
            return None;
        };
        for gap in self.sequences.observe(&event) {
            self.history.push(Item::Lost(loss(&gap, names)));
        }
        self.history.push(Item::Flow(Box::new(enrich(&event, names))));
        Some(event)
    }

    /// Takes denials that the kernel counted instead of sending: `count` is since the last call for this key.
    pub fn take_denials(&self, key: &DenialKey, count: &DenialCount, generation: u32, names: &Names) {
        if count.count != 0 {
            self.history.push(Item::Flow(Box::new(enrich_denials(key, count, generation, names))));
        }
    }

    /// To be called about once a second with the boot time: gaps of CPUs that fell silent.
    pub fn settle(&mut self, now: u64, names: &Names) {
        for gap in self.sequences.settle(now) {
            self.history.push(Item::Lost(loss(&gap, names)));
        }
    }

    /// Events known to be lost since the agent started.
    pub fn lost(&self) -> u64 {
        self.sequences.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::decode::EVENT_LEN;
    use crate::flow::query::Query;
    use crate::flow::record::tests as fixed;

    /// An event of CPU 0, as bytes: time and number are its first two fields.
    fn bytes(time: u64, sequence: u64) -> [u8; EVENT_LEN] {
        let mut raw = [0; EVENT_LEN];
        raw[..8].copy_from_slice(&time.to_ne_bytes());
        raw[8..16].copy_from_slice(&sequence.to_ne_bytes());
        raw
    }

    #[test]
    fn events_gaps_and_denials_reach_the_history() {
        let history = Arc::new(History::new("h".into(), 10));
        let names = fixed::names();
        let mut intake = Intake::new(Arc::clone(&history));
        assert_eq!(intake.take(&bytes(1, 5), &names).map(|e| e.sequence), Some(5));
        assert_eq!(intake.take(&bytes(2, 8), &names).map(|e| e.sequence), Some(8));
        assert!(intake.take(&[0; 3], &names).is_none());
        intake.settle(u64::MAX, &names);
        let key = DenialKey {
            local: 257,
            remote: 2,
            rule: 0,
            port: 22,
            protocol: 6,
            direction: 0,
            reason: 2,
            hook: 4,
            reject: 0,
        };
        intake.take_denials(&key, &DenialCount { count: 0, last: 9 }, 3, &names);
        intake.take_denials(&key, &DenialCount { count: 4, last: 9 }, 3, &names);
        let what = |item: &Arc<Item>| match &**item {
            Item::Flow(record) => record.count.map_or("flow".to_owned(), |n| format!("denials {n}")),
            Item::Lost(loss) => format!("lost {}", loss.lost),
        };
        let got: Vec<_> = history.recent(&Query::default()).iter().map(what).collect();
        assert_eq!(got, ["flow", "flow", "lost 2", "denials 4"]);
        assert_eq!((intake.lost(), intake.unreadable), (2, 1));
    }
}
