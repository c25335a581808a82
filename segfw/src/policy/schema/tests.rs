//! The tree, the parser, the JSON Schema and the committed page say the same.

#![expect(clippy::wildcard_enum_match_arm, reason = "a test that meets another variant fails")]

use super::*;
use crate::policy::Severity;
use crate::policy::document::parse;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// One document as an editor sees it: YAML's own types.
fn editor(document: &str) -> Value {
    crate::policy::yaml::settings(document).unwrap()
}

/// Whether the parser takes it; warnings are none of the schema's business.
fn parses(document: &Value) -> bool {
    // JSON is YAML.
    let (_, problems) = parse(&[("t.yaml".to_owned(), document.to_string())]);
    problems.iter().all(|p| p.severity != Severity::Error)
}

fn valid(schema: &Value, value: &Value) -> bool {
    super::validator::valid(schema, value, &fits)
}

fn fits(pattern: &str, text: &str) -> bool {
    regex_automata::meta::Regex::new(pattern).unwrap().is_match(text)
}

fn examples() -> impl Iterator<Item = (&'static Kind, Value)> {
    KINDS.iter().flat_map(|kind| kind.examples.iter().map(move |e| (kind, editor(e))))
}

/// Something inside a document: the way to it.
type Way = Vec<String>;

fn at<'v>(document: &'v mut Value, way: &[String]) -> &'v mut Value {
    way.iter().fold(document, |value, step| match value {
        Value::Object(map) => map.get_mut(step).unwrap(),
        Value::Array(list) => &mut list[step.parse::<usize>().unwrap()],
        other => panic!("{other}"),
    })
}

/// Calls `see` for each map of the tree that the value has, with the way to it.
fn walk(of: &Type, value: &Value, way: &Way, see: &mut dyn FnMut(&'static Map, &Value, &Way)) {
    let step = |name: &str| way.iter().cloned().chain([name.to_owned()]).collect::<Way>();
    match (of, value) {
        (Type::Map(map), Value::Object(object)) => {
            see(map, value, way);
            for field in map.fields {
                if let Some(value) = object.get(field.key) {
                    walk(&field.value, value, &step(field.key), see);
                }
            }
        }
        (Type::List(of), Value::Array(list)) => {
            list.iter().enumerate().for_each(|(i, value)| walk(of, value, &step(&i.to_string()), see));
        }
        (Type::Either(all), value) => all.iter().for_each(|of| walk(of, value, way, see)),
        _ => {}
    }
}

/// Every map of every example, as (document, map, way).
fn maps() -> Vec<(Value, &'static Map, Way)> {
    let mut found = Vec::new();
    for (kind, document) in examples() {
        let mut see = |map: &'static Map, _: &Value, way: &Way| found.push((document.clone(), map, way.clone()));
        see(&DOCUMENT, &document, &Way::new());
        walk(&Type::Map(&METADATA), &document["metadata"], &vec!["metadata".into()], &mut see);
        walk(&Type::Map(kind.spec), &document["spec"], &vec!["spec".into()], &mut see);
    }
    found
}

/// Parser and schema must both take it, or both refuse it.
#[track_caller]
fn both(document: &Value, accepted: bool, about: &str) {
    assert_eq!(parses(document), accepted, "parser, {about}: {document}");
    static SCHEMA: std::sync::LazyLock<Value> = std::sync::LazyLock::new(json::schema);
    assert_eq!(valid(&SCHEMA, document), accepted, "schema, {about}: {document}");
}

#[test]
fn the_examples_are_right_and_have_every_key() {
    let mut seen = BTreeSet::new();
    for (mut document, map, way) in maps() {
        both(&document, true, "example");
        let value = at(&mut document, &way).as_object().unwrap();
        seen.extend(value.keys().map(|key| (map.what, key.clone())));
    }
    let mut maps_of_tree: Vec<&'static Map> = vec![&DOCUMENT, &METADATA];
    fn collect(of: &Type, all: &mut Vec<&'static Map>) {
        match of {
            Type::Map(map) => {
                all.push(map);
                map.fields.iter().for_each(|f| collect(&f.value, all));
            }
            Type::List(of) => collect(of, all),
            Type::Either(of) => of.iter().for_each(|of| collect(of, all)),
            _ => {}
        }
    }
    KINDS.iter().for_each(|kind| collect(&Type::Map(kind.spec), &mut maps_of_tree));
    for map in maps_of_tree {
        for field in map.fields.iter().filter(|f| !matches!(f.value, Type::Refused)) {
            assert!(seen.contains(&(map.what, field.key.to_owned())), "no example has {} of {}", field.key, map.what);
        }
    }
}

/// Were a key of the tree not read by the parser, nonsense behind it would pass.
#[test]
fn each_key_is_read() {
    for (document, map, way) in maps() {
        let present: Vec<String> = at(&mut document.clone(), &way).as_object().unwrap().keys().cloned().collect();
        for key in present {
            let mut wrong = document.clone();
            at(&mut wrong, &way)[&key] = json!([[]]);
            both(&wrong, false, &format!("nonsense behind {key} of {}", map.what));
        }
    }
}

#[test]
fn unknown_missing_and_wrong_words_fail_in_both() {
    let mut tried = 0;
    for (document, map, way) in maps() {
        let mut unknown = document.clone();
        at(&mut unknown, &way)["zzz"] = json!("x");
        both(&unknown, false, &format!("unknown key in {}", map.what));
        for field in map.fields {
            let mut wrong = document.clone();
            let Some(object) = at(&mut wrong, &way).as_object_mut() else { continue };
            if field.presence == Presence::Required {
                let _ = object.remove(field.key).unwrap();
                both(&wrong, false, &format!("{} of {} is missing", field.key, map.what));
                tried += 1;
            } else if object.contains_key(field.key) && matches!(field.value, Type::Words(_)) {
                let _ = object.insert(field.key.into(), json!("zzz"));
                both(&wrong, false, &format!("a wrong word for {} of {}", field.key, map.what));
                tried += 1;
            }
        }
    }
    assert!(tried > 25, "{tried}");
    let mut posture = examples().find(|(k, _)| k.name == "Policy").unwrap().1;
    posture["spec"]["rules"][0]["require"] = json!({"posture": "healthy"});
    both(&posture, false, "posture");
    let mut two = examples().find(|(k, _)| k.name == "Workload").unwrap().1;
    two["spec"]["match"][0]["cgroup"] = json!("/a");
    both(&two, false, "two matchers in one");
}

/// Each word of the tree is one that the parser knows.
#[test]
fn every_word_is_known_to_the_parser() {
    for (document, map, way) in maps() {
        for field in map.fields {
            let Type::Words(words) = field.value else { continue };
            if std::ptr::eq(map, &DOCUMENT) {
                continue;
            }
            for word in words {
                let mut other = document.clone();
                at(&mut other, &way)[field.key] = json!(word);
                // A demand has no meaning beside another action than allow, which is no question of words.
                if field.key == "action"
                    && let Some(rule) = at(&mut other, &way).as_object_mut()
                {
                    let _ = rule.remove("require");
                }
                // Beside addresses no other key may stand.
                if at(&mut other, &way).get("addresses").is_none() {
                    both(&other, true, &format!("{word} for {} of {}", field.key, map.what));
                }
            }
        }
    }
}

#[test]
fn the_policies_of_this_repository_are_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let schema = json::schema();
    let mut count = 0;
    for folder in ["policies", "policies/demo"] {
        for (name, text) in crate::policy::read_dir_recursive(&root.join(folder)).unwrap() {
            for document in super::validator::documents(&text).unwrap() {
                assert!(valid(&schema, &document), "{folder}/{name}: {document}");
                count += 1;
            }
        }
    }
    assert!(count > 30, "{count}");
}

#[test]
fn the_page_is_the_one_in_docs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policy-reference.md");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == reference::markdown(),
        "{} is not what policy::schema says; run: segfw policy schema --markdown > docs/policy-reference.md",
        path.display()
    );
}
