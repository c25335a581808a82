//! What is wrong with the documents, said to the person who must mend them: where, what, why, and the likely repair.

use super::host_policy::Position;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use std::fmt;

/// Problems kept of one file. A broken generator must not drown the reader, nor the memory of the agent.
pub const PROBLEMS_PER_FILE: usize = 1_000;
/// Characters of a name that are shown; the rest is cut off. A scalar may be long, a message must not be.
const SHOWN: usize = 60;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The revision is refused.
    Error,
    /// The revision is taken, unless the caller is strict.
    Warning,
}

impl Severity {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// One thing that is wrong, at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    pub at: Position,
    /// What is wrong, with the word that is wrong in it.
    pub what: String,
    /// The rule that was broken, for people who do not know it by heart.
    pub why: String,
    /// What was probably meant: a whole sentence without a full stop.
    pub help: Option<String>,
}

impl Problem {
    pub fn error(at: Position, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { severity: Severity::Error, at, what: what.into(), why: why.into(), help: None }
    }
    pub fn warning(at: Position, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(at, what, why) }
    }
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
    /// `did you mean "x"?`, if there is an x.
    pub fn meant(mut self, word: Option<&str>) -> Self {
        self.help = word.map(|w| format!("did you mean {}?", quote(w))).or(self.help);
        self
    }
}

/// What is wrong inside a text whose place in a file is not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Characters from the start of the text.
    pub offset: usize,
    pub what: String,
    pub why: String,
    pub help: Option<String>,
}

impl Fault {
    pub fn new(offset: usize, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { offset, what: what.into(), why: why.into(), help: None }
    }
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
    /// `did you mean "x"?`, if there is an x.
    pub fn meant(mut self, word: Option<&str>) -> Self {
        self.help = word.map(|w| format!("did you mean {}?", quote(w))).or(self.help);
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { severity, at, what, why, help } = self;
        // A file name comes from the disk and may hold anything, also what steers a terminal.
        write!(f, "{}:{}:{}: {}: {what} ({why})", printable(&at.file), at.line, at.column, severity.as_str())?;
        match help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { severity, at: Position { file, line, column }, what, why, help } = self;
        let mut s = serializer.serialize_struct("Problem", 7)?;
        s.serialize_field("severity", severity)?;
        s.serialize_field("file", &**file)?;
        s.serialize_field("line", line)?;
        s.serialize_field("column", column)?;
        s.serialize_field("what", what)?;
        s.serialize_field("why", why)?;
        s.serialize_field("help", help)?;
        s.end()
    }
}

/// All problems, sorted by position; equal ones once.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct Problems(Vec<Problem>);

impl Problems {
    pub fn new(mut problems: Vec<Problem>) -> Self {
        problems.sort_by(|a, b| {
            (&a.at, a.severity, &a.what, &a.why, &a.help).cmp(&(&b.at, b.severity, &b.what, &b.why, &b.help))
        });
        problems.dedup();
        Self(problems)
    }
    /// True = the revision must be refused.
    pub fn refuse(&self, strict: bool) -> bool {
        strict && !self.0.is_empty() || self.errors() > 0
    }
    pub fn errors(&self) -> usize {
        self.0.iter().filter(|p| p.severity == Severity::Error).count()
    }
    pub fn warnings(&self) -> usize {
        self.0.len() - self.errors()
    }
    /// `--strict`: what was a warning is an error.
    pub fn strict(mut self) -> Self {
        self.0.iter_mut().for_each(|p| p.severity = Severity::Error);
        self
    }
    pub fn into_vec(self) -> Vec<Problem> {
        self.0
    }
}

impl std::ops::Deref for Problems {
    type Target = [Problem];
    fn deref(&self) -> &[Problem] {
        &self.0
    }
}

/// One problem a line, helps below.
impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|p| writeln!(f, "{p}"))
    }
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if is_unprintable(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Controls steer terminals, and the marks of bidirectional text make a line read other than it is.
fn is_unprintable(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Foreign text in quotes: short, on one line, and unable to steer a terminal.
pub fn quote(text: &str) -> String {
    let mut shown = String::from("\"");
    for (n, c) in text.chars().enumerate() {
        if n == SHOWN {
            shown.push('…');
            break;
        }
        if is_unprintable(c) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown.push('"');
    shown
}

/// The candidate that is nearest to `word`, if it is near enough to have been meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Comparing costs the product of the lengths; nobody mistypes a word of more than this.
    const LONGEST: usize = 64;
    if word.is_empty() || word.len() > LONGEST {
        return None;
    }
    let lower = word.to_lowercase();
    // A third of the letters may be wrong, at least one, at most three.
    let allowed = (word.chars().count() / 3).clamp(1, 3);
    candidates
        .into_iter()
        .filter(|c| c.len() <= LONGEST && c.len().abs_diff(word.len()) <= allowed * 4)
        .filter_map(|c| {
            let distance = strsim::osa_distance(&lower, &c.to_lowercase());
            // Half a word is often meant for the whole: "prio" for "priority".
            let starts = word.len() >= 3 && c.starts_with(word);
            (distance <= allowed || starts).then_some((distance, c))
        })
        .min()
        .map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(line: u32, column: u32) -> Position {
        Position { file: "a.yaml".into(), line, column }
    }

    #[test]
    fn reads_like_a_compiler() {
        let problem =
            Problem::error(at(3, 7), "unknown key \"prioritty\"", "a rule has other keys").meant(Some("priority"));
        assert_eq!(
            problem.to_string(),
            "a.yaml:3:7: error: unknown key \"prioritty\" (a rule has other keys)\n  help: did you mean \"priority\"?"
        );
        let json = serde_json::to_string(&problem).unwrap();
        assert_eq!(
            json,
            r#"{"severity":"error","file":"a.yaml","line":3,"column":7,"what":"unknown key \"prioritty\"","why":"a rule has other keys","help":"did you mean \"priority\"?"}"#
        );
    }

    #[test]
    fn problems_are_sorted_and_said_once() {
        let problem = |line, column| Problem::warning(at(line, column), "w", "y");
        let all = Problems::new(vec![problem(2, 1), problem(10, 1), problem(1, 9), problem(2, 1)]);
        assert_eq!(all.iter().map(|p| (p.at.line, p.at.column)).collect::<Vec<_>>(), [(1, 9), (2, 1), (10, 1)]);
        assert!(!all.refuse(false) && all.refuse(true) && all.clone().strict().errors() == 3);
    }

    #[test]
    fn near_words() {
        let keys = ["priority", "tier", "mode", "rules"];
        for (word, expect) in [
            ("prioritty", Some("priority")),
            ("prio", Some("priority")),
            ("Tier", Some("tier")),
            ("tire", Some("tier")),
            ("mdoe", Some("mode")),
            ("x", None),
            ("", None),
            ("something", None),
        ] {
            assert_eq!(nearest(word, keys), expect, "{word}");
        }
    }

    #[test]
    fn quoting_disarms() {
        assert_eq!(quote("a\u{1b}[31m\u{202e}b"), r#""a\u{1b}[31m\u{202e}b""#);
        assert_eq!(quote(&"x".repeat(100)).chars().count(), SHOWN + 3);
    }
}
