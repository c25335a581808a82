//! How much a runtime may say: an answer costs bounded time and memory, whoever gives it.

use crate::policy::container::ContainerFacts;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::time::Duration;

/// For everything that one socket or folder is asked in one turn. A healthy runtime needs milliseconds; a hung one
/// must not delay what others say.
pub const DEADLINE: Duration = Duration::from_secs(2);

/// Bytes of one answer, of all messages of one stream, or of one file. Ten thousand containers with a kilobyte of
/// labels each fit, and containerd sends no larger message itself.
pub const ANSWER_BYTES: usize = 16 << 20;

/// Containers of one socket or folder, and images with several names: as many as the workloads of a host. More are
/// counted in [`super::Listing::left_out`].
pub const CONTAINERS: usize = 8_192;

/// Bytes of a name, an image, a path or the value of a label. Longer is "not known" and counted: image builders write
/// kilobytes of JSON into labels, which no matcher is for.
pub const TEXT_BYTES: usize = 1_024;

/// Labels of one container or pod.
pub const LABELS: usize = 256;

/// Other names of one image.
pub const ALIASES: usize = 16;

/// What one socket or folder said.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) containers: Vec<ContainerFacts>,
    /// Entries and texts above a limit, or unusable.
    pub(super) left_out: u64,
}

impl Answer {
    /// False when there is no room left, which is counted.
    pub(super) fn room(&mut self) -> bool {
        let room = self.containers.len() < CONTAINERS;
        self.left_out += u64::from(!room);
        room
    }

    /// The text, or nothing if it is too long or has control characters (it is shown on terminals).
    pub(super) fn text(&mut self, text: String) -> String {
        if text.len() > TEXT_BYTES || text.chars().any(char::is_control) {
            self.left_out += 1;
            return String::new();
        }
        text
    }

    pub(super) fn labels(&mut self, given: impl IntoIterator<Item = (String, String)>) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        // In order, so that the same ones are left out each time.
        for (key, value) in given.into_iter().collect::<BTreeMap<_, _>>() {
            let good = |t: &str| t.len() <= TEXT_BYTES && !t.chars().any(char::is_control);
            if labels.len() < LABELS && !key.is_empty() && good(&key) && good(&value) {
                labels.insert(key, value);
            } else {
                self.left_out += 1;
            }
        }
        labels
    }
}

/// A JSON list of which at most [`CONTAINERS`] entries are kept.
pub(super) struct Bounded<T> {
    pub(super) items: Vec<T>,
    pub(super) left_out: u64,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Bounded<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct List<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
            type Value = Bounded<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of containers")
            }
            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Bounded { items: Vec::new(), left_out: 0 })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut kept = Bounded { items: Vec::new(), left_out: 0 };
                while kept.items.len() < CONTAINERS {
                    match list.next_element()? {
                        Some(item) => kept.items.push(item),
                        None => return Ok(kept),
                    }
                }
                while list.next_element::<IgnoredAny>()?.is_some() {
                    kept.left_out += 1;
                }
                Ok(kept)
            }
        }
        from.deserialize_any(List(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_cut_and_counted() {
        let text = format!("[{}1]", "1,".repeat(CONTAINERS + 2));
        let list: Bounded<u8> = serde_json::from_str(&text).unwrap();
        assert_eq!((list.items.len(), list.left_out), (CONTAINERS, 3));
        let none: Bounded<u8> = serde_json::from_str("null").unwrap();
        assert!(none.items.is_empty());
        assert!(serde_json::from_str::<Bounded<u8>>("{}").is_err());
        // Deeper than serde_json goes: an error, no overflow of the stack.
        assert!(serde_json::from_str::<Bounded<IgnoredAny>>(&"[".repeat(1 << 20)).is_err());
    }

    #[test]
    fn texts_and_labels_are_cut_and_counted() {
        let mut answer = Answer::default();
        assert_eq!(answer.text("a".repeat(TEXT_BYTES)).len(), TEXT_BYTES);
        assert_eq!(answer.left_out, 0);
        assert_eq!(answer.text("a".repeat(TEXT_BYTES + 1)), "");
        assert_eq!(answer.text("\u{1b}[2J".into()), "");
        let many = (0..LABELS + 5).map(|n| (format!("{n:04}"), "x".to_owned()));
        assert_eq!(answer.labels(many).len(), LABELS);
        let odd = [("", "x".to_owned()), ("a", "x\ny".to_owned()), ("b", "y".repeat(TEXT_BYTES + 1)), ("c", "".into())];
        assert_eq!(answer.labels(odd.map(|(k, v)| (k.to_owned(), v))).len(), 1);
        assert_eq!(answer.left_out, 2 + 5 + 3);
    }
}
