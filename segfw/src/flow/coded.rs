//! Two small helpers of records: an enumeration whose unknown values stay visible, and text that many records share.

use segfw_common::event::Hook;
use segfw_common::{Direction, Evidence, Reason, Verdict};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

/// An enumeration that the kernel sends as a byte and users see as a word.
pub trait Word: Copy + PartialEq + 'static {
    /// What it is, for messages: `verdict`, `reason`.
    const WHAT: &'static str;
    /// The word users see.
    fn word(self) -> &'static str;
    /// From the kernel's byte.
    fn from_byte(raw: u8) -> Option<Self>;
    /// Every value. Bytes are dense and small, so this is how to find them.
    fn all() -> impl Iterator<Item = Self> {
        (0..=u8::MAX).filter_map(Self::from_byte)
    }
}

macro_rules! word {
    ($($t:ty, $what:literal, $as_str:expr;)*) => { $(
        impl Word for $t {
            const WHAT: &'static str = $what;
            fn word(self) -> &'static str {
                self.as_str()
            }
            fn from_byte(raw: u8) -> Option<Self> {
                Self::from_raw(raw)
            }
        }
    )* };
}
word! {
    Verdict, "verdict", as_str;
    Reason, "reason", as_str;
    Direction, "direction", as_str;
    Evidence, "evidence", as_str;
    Hook, "hook", as_str;
}

/// A byte from the kernel: a value we know, or the number as it came (written `unknown-17`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Coded<T> {
    /// A value of this layout.
    Known(T),
    /// A value of a newer or of a broken layout.
    Unknown(u8),
}

impl<T: Word> Coded<T> {
    /// Never fails: what is not known stays a number.
    pub fn from_byte(raw: u8) -> Self {
        T::from_byte(raw).map_or(Self::Unknown(raw), Self::Known)
    }
    /// The value, if it is one of this layout.
    pub fn known(self) -> Option<T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unknown(_) => None,
        }
    }
}

impl<T: Word> fmt::Display for Coded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(value) => f.pad(value.word()),
            Self::Unknown(raw) => f.pad(&format!("unknown-{raw}")),
        }
    }
}
impl<T: Word> fmt::Debug for Coded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl<T: Word> From<T> for Coded<T> {
    fn from(value: T) -> Self {
        Self::Known(value)
    }
}

/// A word that is none of an enumeration's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is not a {what}{hint}; there are: {all}")]
pub struct UnknownWord {
    what: &'static str,
    word: String,
    hint: String,
    all: String,
}

impl<T: Word> FromStr for Coded<T> {
    type Err = UnknownWord;
    /// Upper and lower case are the same here, `_` and `-` too.
    fn from_str(s: &str) -> Result<Self, UnknownWord> {
        let wanted = s.replace('_', "-").to_ascii_lowercase();
        if let Some(value) = T::all().find(|v| {
            v.word().to_ascii_lowercase() == wanted.replace('-', "_") || v.word().eq_ignore_ascii_case(&wanted)
        }) {
            return Ok(Self::Known(value));
        }
        if let Some(raw) = wanted.strip_prefix("unknown-").and_then(|n| n.parse().ok()) {
            return Ok(Self::from_byte(raw));
        }
        Err(UnknownWord {
            what: T::WHAT,
            word: s.to_owned(),
            hint: near(&wanted, T::all().map(Word::word)).map(|w| format!(" (did you mean {w}?)")).unwrap_or_default(),
            all: T::all().map(Word::word).collect::<Vec<_>>().join(", "),
        })
    }
}

/// The word that was probably meant.
pub(crate) fn near<'a>(wanted: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    words
        .map(|w| (strsim::damerau_levenshtein(&w.to_ascii_lowercase(), &wanted.to_ascii_lowercase()), w))
        .filter(|(distance, w)| *distance <= 1 + w.len() / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, w)| w)
}

impl<T: Word> Serialize for Coded<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
impl<'de, T: Word> Deserialize<'de> for Coded<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let word = String::deserialize(d)?;
        word.parse().map_err(serde::de::Error::custom)
    }
}

/// A value that many records share.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Shared<T>(Arc<T>);
/// Text that many records share.
pub type Text = Shared<String>;

impl<T> Shared<T> {
    /// Shares `value`.
    pub fn new(value: T) -> Self {
        Self(Arc::new(value))
    }
}
impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::new(text.to_owned())
    }
}
impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}
impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}
impl<T: fmt::Display> fmt::Display for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl<T: fmt::Debug> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl<T: Serialize> Serialize for Shared<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(s)
    }
}
impl<'de, T: Deserialize<'de>> Deserialize<'de> for Shared<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        T::deserialize(d).map(Self::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_they_are_written() {
        for raw in 0..=u8::MAX {
            let verdict = Coded::<Verdict>::from_byte(raw);
            assert_eq!(verdict.to_string().parse(), Ok(verdict));
            let hook = Coded::<Hook>::from_byte(raw);
            assert_eq!(hook.to_string().parse(), Ok(hook));
            let reason = Coded::<Reason>::from_byte(raw);
            assert_eq!(reason.to_string().parse(), Ok(reason));
        }
        assert_eq!("denied".parse(), Ok(Coded::Known(Verdict::Denied)));
        assert_eq!("SEGMENT_DEFAULT".parse(), Ok(Coded::Known(Reason::SegmentDefault)));
    }

    #[test]
    fn a_wrong_word_gets_a_suggestion() {
        let error = "DENYED".parse::<Coded<Verdict>>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"DENYED\" is not a verdict (did you mean DENIED?); there are: ALLOWED, DENIED, AUDIT"
        );
    }
}
