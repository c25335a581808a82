//! Labels and the selectors over them: the characters they may have, and kubectl's selector syntax.
//!
//! `app=payments, tier in (db, cache), !legacy, env != dev, env notin (a, b), key`

use super::host_policy::{Labels, Requirement, Selector};
use super::problem::{Fault, nearest, quote};
use std::collections::{BTreeMap, BTreeSet};

/// Characters of a label value, and of a label key without its prefix: as in Kubernetes.
pub const LABEL_CHARS: usize = 63;
/// Characters of the prefix of a label key (`example.com/` …): as in Kubernetes.
const PREFIX_CHARS: usize = 253;
/// Requirements of one selector. Matching walks them for each workload.
const REQUIREMENTS: usize = 256;

/// Why the text cannot be a label key. Neither `=` nor `,` is allowed, so `k=v,k=v` can be read in one way only.
pub fn check_key(key: &str) -> Result<(), &'static str> {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if prefix.is_some_and(|p| p.len() > PREFIX_CHARS || !is_word(p)) {
        return Err("the prefix of a label key is a domain name of at most 253 characters");
    }
    if name.len() > LABEL_CHARS || !is_word(name) {
        return Err(
            "a label key has 1 to 63 letters, digits, '-', '_' or '.', and begins and ends with a letter or digit",
        );
    }
    Ok(())
}

/// Why the text cannot be a label value. An empty value is one.
pub fn check_value(value: &str) -> Result<(), &'static str> {
    if value.is_empty() || value.len() <= LABEL_CHARS && is_word(value) {
        return Ok(());
    }
    Err("a label value has at most 63 letters, digits, '-', '_' or '.', and begins and ends with a letter or digit")
}

/// Begins and ends with a letter or digit, and has only `-`, `_` and `.` besides.
pub fn is_word(text: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    edge(text.chars().next())
        && edge(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// The selector syntax of kubectl.
pub fn parse(text: &str) -> Result<Selector, Fault> {
    let mut scan = Scan { chars: text.chars().collect(), next: 0 };
    let mut requirements = Vec::new();
    scan.space();
    if scan.peek().is_none() {
        return Err(Fault::new(0, "empty selector", "empty never means all: write any for everybody"));
    }
    loop {
        requirements.push(scan.requirement()?);
        if requirements.len() > REQUIREMENTS {
            return Err(Fault::new(
                scan.next,
                "the selector is too long",
                format!("at most {REQUIREMENTS} requirements"),
            ));
        }
        scan.space();
        match scan.peek() {
            None => return Ok(Selector(requirements)),
            Some(',') => scan.next += 1,
            Some(c) => {
                let what = format!("unexpected {}", quote(&c.to_string()));
                return Err(Fault::new(scan.next, what, "requirements are separated by commas"));
            }
        }
    }
}

struct Scan {
    chars: Vec<char>,
    next: usize,
}

impl Scan {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.next).copied()
    }
    fn space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next += 1;
        }
    }
    /// Skips `text` if it comes next.
    fn eat(&mut self, text: &str) -> bool {
        let found = text.chars().enumerate().all(|(i, c)| self.chars.get(self.next + i) == Some(&c));
        if found {
            self.next += text.chars().count();
        }
        found
    }
    /// Up to the next character that has a meaning of its own; spaces in front are skipped. With its start.
    fn word(&mut self) -> (usize, String) {
        self.space();
        let start = self.next;
        while self.peek().is_some_and(|c| !c.is_whitespace() && !matches!(c, ',' | '(' | ')' | '=' | '!')) {
            self.next += 1;
        }
        (start, self.chars[start..self.next].iter().collect())
    }

    fn key(&mut self) -> Result<String, Fault> {
        let (start, key) = self.word();
        if key.is_empty() {
            let found = self.peek().map_or("the end".to_owned(), |c| quote(&c.to_string()));
            return Err(Fault::new(
                start,
                format!("expected a label key, found {found}"),
                "app=web, tier in (db, cache), !legacy",
            ));
        }
        match check_key(&key) {
            Ok(()) => Ok(key),
            Err(why) => Err(Fault::new(start, format!("bad label key {}", quote(&key)), why)),
        }
    }

    fn value(&mut self) -> Result<String, Fault> {
        let (start, value) = self.word();
        if value == "*" {
            let fault = Fault::new(
                start,
                "\"*\" is not a value here",
                "in selector syntax the bare key means that the label is there",
            );
            return Err(fault.help("write the key alone"));
        }
        match check_value(&value) {
            Ok(()) => Ok(value),
            Err(why) => Err(Fault::new(start, format!("bad label value {}", quote(&value)), why)),
        }
    }

    fn values(&mut self) -> Result<Vec<String>, Fault> {
        self.space();
        let open = self.next;
        if !self.eat("(") {
            return Err(Fault::new(open, "expected \"(\"", "the values of in and notin stand in parentheses"));
        }
        self.space();
        if self.peek() == Some(')') {
            return Err(Fault::new(open, "empty list of values", "empty never means all"));
        }
        let mut values = Vec::new();
        loop {
            values.push(self.value()?);
            self.space();
            if self.eat(")") {
                return Ok(values);
            }
            if !self.eat(",") {
                let found = self.peek().map_or("the end".to_owned(), |c| quote(&c.to_string()));
                return Err(Fault::new(
                    self.next,
                    format!("expected \",\" or \")\", found {found}"),
                    "values are separated by commas",
                ));
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, Fault> {
        self.space();
        if self.eat("!") {
            return Ok(Requirement::NotExists { key: self.key()? });
        }
        let key = self.key()?;
        self.space();
        if self.eat("!=") {
            return Ok(Requirement::NotIn { key, values: vec![self.value()?] });
        }
        if self.eat("==") || self.eat("=") {
            return Ok(Requirement::In { key, values: vec![self.value()?] });
        }
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Requirement::Exists { key });
        }
        let (start, operator) = self.word();
        match operator.as_str() {
            "in" => Ok(Requirement::In { key, values: self.values()? }),
            "notin" => Ok(Requirement::NotIn { key, values: self.values()? }),
            _ => {
                let word =
                    if operator.is_empty() { self.peek().map(String::from).unwrap_or_default() } else { operator };
                let what = format!("unknown operator {}", quote(&word));
                Err(Fault::new(start, what, "known: =, ==, !=, in, notin").meant(nearest(&word, ["in", "notin"])))
            }
        }
    }
}

/// `k=v,k=v` of a requirement, for messages.
pub fn show(selector: &Selector) -> String {
    let one = |r: &Requirement| match r {
        Requirement::In { key, values } if values.len() == 1 => format!("{key}={}", values.concat()),
        Requirement::In { key, values } => format!("{key} in ({})", values.join(", ")),
        Requirement::NotIn { key, values } if values.len() == 1 => format!("{key}!={}", values.concat()),
        Requirement::NotIn { key, values } => format!("{key} notin ({})", values.join(", ")),
        Requirement::Exists { key } => key.clone(),
        Requirement::NotExists { key } => format!("!{key}"),
    };
    selector.0.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The label sets that exist somewhere.
pub struct Carried<'l> {
    sets: Vec<&'l Labels>,
    /// Values by key.
    values: BTreeMap<&'l str, BTreeSet<&'l str>>,
}

impl<'l> Carried<'l> {
    pub fn new(sets: impl IntoIterator<Item = &'l Labels>) -> Self {
        let sets: BTreeSet<&Labels> = sets.into_iter().collect();
        let mut values: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (key, value) in sets.iter().flat_map(|labels| labels.iter()) {
            let _ = values.entry(key).or_default().insert(value);
        }
        Self { sets: sets.into_iter().collect(), values }
    }

    /// Different sets: what one question may cost.
    pub fn len(&self) -> usize {
        self.sets.len()
    }
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// What stands in the way of this selector: `None` if at least one set matches. Gives what is wrong, and the
    /// nearest label that exists; `budget` is how many words may still be compared for that.
    pub fn unmatched(&self, selector: &Selector, budget: &mut usize) -> Option<(String, Option<String>)> {
        let mut take = |words: usize| {
            *budget = budget.saturating_sub(words);
            *budget > 0
        };
        let meant = |label: &str| format!("did you mean {}?", quote(label));
        for requirement in &selector.0 {
            let (key, values) = match requirement {
                Requirement::In { key, values } => (key, values.as_slice()),
                Requirement::Exists { key } => (key, &[][..]),
                Requirement::NotIn { .. } | Requirement::NotExists { .. } => continue,
            };
            let Some(carried) = self.values.get(key.as_str()) else {
                let keys = self.values.keys().copied().filter(|_| take(1));
                return Some((format!("nothing carries the label {}", quote(key)), nearest(key, keys).map(meant)));
            };
            if !values.is_empty() && !values.iter().any(|v| carried.contains(v.as_str())) {
                let what = format!("nothing carries {}", quote(&show(&Selector(vec![requirement.clone()]))));
                let near = values.iter().find_map(|v| nearest(v, carried.iter().copied().filter(|_| take(1))));
                return Some((what, near.map(|v| meant(&format!("{key}={v}")))));
            }
        }
        let matched = self.sets.iter().any(|labels| selector.matches(labels));
        (!matched).then(|| (format!("the selector {} matches nothing", quote(&show(selector))), None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn kubectl_syntax() {
        let web = labels(&[("app", "web"), ("tier", "front"), ("env", "dev")]);
        for (text, shown, matches) in [
            ("app=web", "app=web", true),
            ("app == web", "app=web", true),
            ("app=db", "app=db", false),
            ("app!=web", "app!=web", false),
            ("app != db,legacy!=yes", "app!=db, legacy!=yes", true),
            ("tier in (front, back)", "tier in (front, back)", true),
            ("tier in (back)", "tier=back", false),
            ("tier notin (a,b)", "tier notin (a, b)", true),
            ("missing notin (a)", "missing!=a", true),
            ("app", "app", true),
            ("!app", "!app", false),
            (" ! legacy , app ", "!legacy, app", true),
            ("in in (in)", "in=in", false),
            ("example.com/team=x", "example.com/team=x", false),
            ("app=", "app=", false),
        ] {
            let selector = parse(text).unwrap_or_else(|f| panic!("{text}: {f:?}"));
            assert_eq!((show(&selector).as_str(), selector.matches(&web)), (shown, matches), "{text}");
            assert_eq!(parse(&show(&selector)), Ok(selector), "{text} shown");
        }
    }

    #[test]
    fn faults_have_columns() {
        for (text, offset, what) in [
            ("", 0, "empty selector"),
            ("  ", 0, "empty selector"),
            ("app=web,", 8, "expected a label key, found the end"),
            (",app", 0, "expected a label key, found \",\""),
            ("app=web tier=db", 8, "unexpected \"t\""),
            ("app=a=b", 5, "unexpected \"=\""),
            ("tier on (db)", 5, "unknown operator \"on\""),
            ("tier in db", 8, "expected \"(\""),
            ("tier in ()", 8, "empty list of values"),
            ("tier in (db", 11, "expected \",\" or \")\", found the end"),
            ("tier in (d b)", 11, "expected \",\" or \")\", found \"b\""),
            ("a_=b", 0, "bad label key \"a_\""),
            ("äpp=b", 0, "bad label key \"äpp\""),
            ("ä, b=c", 0, "bad label key \"ä\""),
            ("app=w\u{1b}b", 4, "bad label value \"w\\u{1b}b\""),
            ("app=*", 4, "\"*\" is not a value here"),
            ("!", 1, "expected a label key, found the end"),
            ("a (b)", 2, "unknown operator \"(\""),
        ] {
            let fault = parse(text).unwrap_err();
            assert_eq!((fault.offset, fault.what.as_str()), (offset, what), "{text}");
        }
    }

    #[test]
    fn near_misses() {
        let known = [labels(&[("app", "payments"), ("tier", "db")]), labels(&[("app", "web")])];
        for (text, expect) in [
            ("app=web", None),
            ("app=wbe", Some(("nothing carries \"app=wbe\"", Some("did you mean \"app=web\"?")))),
            ("ap=web", Some(("nothing carries the label \"ap\"", Some("did you mean \"app\"?")))),
            ("app=web,tier=db", Some(("the selector \"app=web, tier=db\" matches nothing", None))),
        ] {
            let found = Carried::new(&known).unmatched(&parse(text).unwrap(), &mut 1_000);
            assert_eq!(found.as_ref().map(|(a, b)| (a.as_str(), b.as_deref())), expect, "{text}");
        }
    }
}
