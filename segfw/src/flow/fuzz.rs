//! What the fuzzer calls: bytes → event → record → text. Nothing may panic, whatever the bytes.

use super::record::{Item, Names, enrich, loss};
use super::render::{Format, Renderer};
use super::{Sequences, decode};

/// Reads `data` as one event after the other and shows what came of it. Any panic is a bug. Returns how many characters
/// were shown, so that no compiler removes the work.
pub fn fuzz_event(data: &[u8]) -> usize {
    let names = Names::default();
    let mut sequences = Sequences::default();
    let mut items = Vec::new();
    for chunk in data.chunks(super::decode::EVENT_LEN) {
        let Ok(event) = decode(chunk) else { continue };
        items.extend(sequences.observe(&event).iter().map(|gap| Item::Lost(loss(gap, &names))));
        items.push(Item::Flow(Box::new(enrich(&event, &names))));
    }
    items.extend(sequences.settle(u64::MAX).iter().map(|gap| Item::Lost(loss(gap, &names))));
    [Format::Compact, Format::Table, Format::Json, Format::Jsonpb, Format::Ocsf]
        .map(|f| Renderer::new(f).items(&items).len())
        .iter()
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::decode::EVENT_LEN;
    use proptest::prelude::*;

    /// Inputs that once broke something, or might: each file is one input.
    #[test]
    fn replayed() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/replayed/event");
        let files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()).collect();
        assert!(!files.is_empty(), "{dir} is empty");
        for file in files {
            let _ = fuzz_event(&std::fs::read(file).unwrap());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn random(data in prop::collection::vec(any::<u8>(), 0..4 * EVENT_LEN)) {
            let _ = fuzz_event(&data);
        }

        /// What we show of a random event can be read again, and has no control character in it.
        #[test]
        fn random_events_survive_the_wire(raw in prop::collection::vec(any::<u8>(), EVENT_LEN..=EVENT_LEN)) {
            let item = Item::Flow(Box::new(enrich(&decode(&raw).unwrap(), &Names::default())));
            let json = serde_json::to_string(&item).unwrap();
            prop_assert_eq!(serde_json::from_str::<Item>(&json).unwrap(), item.clone());
            let text = Renderer::new(Format::Compact).items([&item]);
            let plain = anstream::adapter::strip_str(&text).to_string();
            prop_assert!(plain.trim_end_matches('\n').chars().all(|c| !c.is_control()), "{plain:?}");
        }
    }
}
