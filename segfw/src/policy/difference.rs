//! What a person would say has changed between two policies: documents, rules, values. Order and layout are no change.

use super::yaml::{self, Node, Value};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What became of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Became {
    Added,
    Removed,
    Changed,
}

impl Became {
    /// As in a unified diff; `~` for what was there and is different.
    pub const fn sign(self) -> char {
        match self {
            Self::Added => '+',
            Self::Removed => '-',
            Self::Changed => '~',
        }
    }
}

/// A document that is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentChange {
    pub became: Became,
    /// `Policy`.
    pub kind: String,
    pub name: String,
    /// Where it is, or was: `shop.yaml:12`.
    pub at: String,
    /// What changed in it; of one that is new or gone, its parts.
    pub parts: Vec<PartChange>,
}

/// A value that is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartChange {
    pub became: Became,
    /// `rules.web-to-db.ports`.
    pub path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// A document without its layout: the values of `metadata` and `spec` by their paths.
type Parts = BTreeMap<String, String>;
/// By kind and name.
type Documents = BTreeMap<(String, String), (String, Parts)>;

/// Compares two sets of files. Documents that cannot be read are passed over: who compares has checked them.
pub fn difference(before: &[(String, String)], after: &[(String, String)]) -> Vec<DocumentChange> {
    let (old, new) = (documents(before), documents(after));
    let mut keys: Vec<&(String, String)> = old.keys().chain(new.keys()).collect();
    // In the order in which a policy is understood.
    let rank = |kind: &str| super::schema::KINDS.iter().position(|k| k.name == kind);
    keys.sort_by(|a, b| (rank(&a.0), a).cmp(&(rank(&b.0), b)));
    keys.dedup();
    let nothing = Parts::new();
    let mut changes = Vec::new();
    for key in keys {
        let (became, at, parts) = match (old.get(key), new.get(key)) {
            (Some((_, old)), Some((at, new))) => (Became::Changed, at, parts(old, new)),
            (None, Some((at, new))) => (Became::Added, at, parts(&nothing, new)),
            (Some((at, old)), None) => (Became::Removed, at, parts(old, &nothing)),
            (None, None) => continue,
        };
        if became != Became::Changed || !parts.is_empty() {
            let (kind, name) = key.clone();
            changes.push(DocumentChange { became, kind, name, at: at.clone(), parts });
        }
    }
    changes
}

fn parts(old: &Parts, new: &Parts) -> Vec<PartChange> {
    let mut paths: Vec<&String> = old.keys().chain(new.keys()).collect();
    paths.sort();
    paths.dedup();
    let change = |path: &String| {
        let (before, after) = (old.get(path).cloned(), new.get(path).cloned());
        let became = match (&before, &after) {
            (None, _) => Became::Added,
            (_, None) => Became::Removed,
            (Some(before), Some(after)) if before == after => return None,
            (Some(_), Some(_)) => Became::Changed,
        };
        Some(PartChange { became, path: path.clone(), before, after })
    };
    paths.into_iter().filter_map(change).collect()
}

fn documents(files: &[(String, String)]) -> Documents {
    let mut found = Documents::new();
    for (file, text) in files {
        yaml::read(&file.as_str().into(), text, &mut Vec::new(), |root, _| {
            let (Some(kind), Some(meta)) = (get(&root, "kind").and_then(text_of), get(&root, "metadata")) else {
                return;
            };
            let Some(name) = get(meta, "name").and_then(text_of) else { return };
            let mut parts = Parts::new();
            for (key, value) in entries(meta).filter(|(key, _)| *key != "name") {
                let _ = parts.insert(format!("metadata.{key}"), show(value));
            }
            if let Some(spec) = get(&root, "spec") {
                take(spec, &mut parts);
            }
            let at = format!("{file}:{}", root.line);
            let _ = found.insert((kind.to_owned(), name.to_owned()), (at, parts));
        });
    }
    found
}

/// The values of a spec. Rules are known by their names; every other list is one value.
fn take(spec: &Node<'_>, parts: &mut Parts) {
    for (key, value) in entries(spec) {
        let Value::List(items) = &value.value else {
            let _ = parts.insert(key.to_owned(), show(value));
            continue;
        };
        if key == "cases" {
            for (index, case) in items.iter().enumerate() {
                let _ = parts.insert(format!("cases.{}", index + 1), show(case));
            }
            continue;
        }
        if key != "rules" {
            // Elements in their order: it has no meaning, but a person sees that somebody moved them.
            let _ = parts.insert(key.to_owned(), show(value));
            continue;
        }
        for (index, rule) in items.iter().enumerate() {
            let name = get(rule, "name").and_then(text_of).map_or_else(|| format!("rule-{}", index + 1), str::to_owned);
            for (field, value) in entries(rule).filter(|(field, _)| *field != "name") {
                let _ = parts.insert(format!("rules.{name}.{field}"), show(value));
            }
        }
    }
}

fn entries<'n>(node: &'n Node<'n>) -> impl Iterator<Item = (&'n str, &'n Node<'n>)> {
    let entries = match &node.value {
        Value::Map(entries) => entries.as_slice(),
        Value::Text(_) | Value::List(_) | Value::Nothing | Value::Broken => &[],
    };
    entries.iter().filter_map(|(key, value)| Some((text_of(key)?, value)))
}

fn get<'n>(node: &'n Node<'n>, key: &str) -> Option<&'n Node<'n>> {
    entries(node).find(|(k, _)| *k == key).map(|(_, value)| value)
}

fn text_of<'n>(node: &'n Node<'_>) -> Option<&'n str> {
    match &node.value {
        Value::Text(text) => Some(&text.text),
        Value::List(_) | Value::Map(_) | Value::Nothing | Value::Broken => None,
    }
}

/// As flow YAML, keys sorted.
fn show(node: &Node<'_>) -> String {
    match &node.value {
        Value::Text(text) => text.text.clone().into_owned(),
        Value::List(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(", ")),
        Value::Map(_) => {
            let mut all: Vec<String> = entries(node).map(|(key, value)| format!("{key}: {}", show(value))).collect();
            all.sort();
            format!("{{{}}}", all.join(", "))
        }
        Value::Nothing | Value::Broken => "null".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(text: &str) -> Vec<(String, String)> {
        vec![("a.yaml".to_owned(), text.to_owned())]
    }

    #[test]
    fn what_changed_is_named() {
        let old = files(
            "kind: Policy\nmetadata: {name: p, owner: me}\nspec:\n  priority: 100\n  rules:\n  - {name: a, from: [x], to: [y], ports: [tcp/1], action: allow}\n  - {from: [x], to: [y], action: deny}\n---\nkind: Segment\nmetadata: {name: x}\nspec: {select: {app: x}}\n",
        );
        // Moved, laid out otherwise, with a comment: the same.
        let same = files(
            "kind: Segment\nspec:\n  select:\n    app: x\nmetadata: {name: x}\n---\nmetadata: {owner: me, name: p}\nkind: Policy # yes\nspec:\n  rules:\n  - {action: allow, name: a, from: [x], to: [y], ports: [tcp/1]}\n  - {from: [x], to: [y], action: deny}\n  priority: 100\n",
        );
        assert_eq!(difference(&old, &same), []);
        let new = files(
            "kind: Policy\nmetadata: {name: p, owner: me}\nspec:\n  priority: 100\n  rules:\n  - {name: a, from: [x], to: [y], ports: [tcp/1, tcp/2], action: allow}\n---\nkind: Segment\nmetadata: {name: z}\nspec: {select: {app: z}}\n",
        );
        let said: Vec<String> = difference(&old, &new)
            .iter()
            .flat_map(|d| {
                let part = |p: &PartChange| format!("  {} {} {:?} {:?}", p.became.sign(), p.path, p.before, p.after);
                std::iter::once(format!("{} {} {} {}", d.became.sign(), d.kind, d.name, d.at))
                    .chain(d.parts.iter().map(part))
                    .collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(
            said,
            [
                "- Segment x a.yaml:9",
                "  - select Some(\"{app: x}\") None",
                "+ Segment z a.yaml:8",
                "  + select None Some(\"{app: z}\")",
                "~ Policy p a.yaml:1",
                "  ~ rules.a.ports Some(\"[tcp/1]\") Some(\"[tcp/1, tcp/2]\")",
                "  - rules.rule-2.action Some(\"deny\") None",
                "  - rules.rule-2.from Some(\"[x]\") None",
                "  - rules.rule-2.to Some(\"[y]\") None",
            ]
        );
    }
}
