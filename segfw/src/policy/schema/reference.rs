//! The language as a page for people: `docs/policy-reference.md`.

use super::{DOCUMENT, Field, KINDS, METADATA, Map, Presence, Shape, Type};
use std::fmt::Write;

const HEAD: &str = "\
# Policy reference

<!-- Made from segfw/src/policy/schema.rs. After a change there: segfw policy schema --markdown > docs/policy-reference.md -->

Every key of every kind of document, as this version reads it. What the words mean, and how rules are ordered, is in
[policy.md](policy.md). The same as a JSON Schema, for editors: `segfw policy schema`.

A list or map that is written has something in it: empty never means all. An unknown key is an error.
";

/// The page.
pub fn markdown() -> String {
    let mut page = HEAD.to_owned();
    page += "\n## Every document\n\n";
    table(&mut page, &DOCUMENT, "");
    page += "\nThe keys of `metadata`:\n\n";
    table(&mut page, &METADATA, "metadata.");
    for kind in &KINDS {
        let _ = write!(page, "\n## {}\n\n{}\n", kind.name, kind.doc);
        for example in kind.examples {
            let _ = write!(page, "\n```yaml\n{example}```\n");
        }
        page += "\n";
        table(&mut page, kind.spec, "");
    }
    page
}

fn table(page: &mut String, map: &Map, prefix: &str) {
    *page += "| key | value | if left out | meaning |\n| --- | --- | --- | --- |\n";
    rows(page, map, prefix);
}

fn rows(page: &mut String, map: &Map, prefix: &str) {
    for field in map.fields {
        let path = format!("{prefix}{}", field.key);
        let absent = match field.presence {
            Presence::Required => "required".to_owned(),
            Presence::Optional => absent(map, field).to_owned(),
            Presence::Default(word) if word.contains(' ') || word == "never" || word == "always" => word.to_owned(),
            Presence::Default(word) => format!("`{word}`"),
        };
        let _ = writeln!(
            page,
            "| `{path}` | {} | {absent} | {} |",
            shown(&field.value).replace('|', "\\|"),
            field.doc.replace('|', "\\|")
        );
        // The specs have tables of their own, and so has metadata.
        if !std::ptr::eq(map, &DOCUMENT) {
            below(page, &field.value, &path);
        }
    }
}

/// What a key that may be left out is then.
fn absent(map: &Map, field: &Field) -> &'static str {
    match map.shape {
        Shape::One => "one of them",
        Shape::Some => "one at least",
        Shape::Or(first, alone) if field.key == first || field.key == alone => "one of the two",
        Shape::Free | Shape::Or(..) => "",
    }
}

fn below(page: &mut String, of: &Type, path: &str) {
    match of {
        Type::Map(map) => rows(page, map, &format!("{path}.")),
        Type::List(of) => below(page, of, &format!("{path}[]")),
        Type::Either(all) => all.iter().for_each(|of| below(page, of, path)),
        Type::Text
        | Type::Form(_)
        | Type::Number(..)
        | Type::Words(_)
        | Type::Labels
        | Type::LabelGlobs
        | Type::LabelSelector
        | Type::Refused => {}
    }
}

fn shown(of: &Type) -> String {
    match of {
        Type::Text => "text".to_owned(),
        Type::Form(form) => form.name.to_owned(),
        Type::Number(first, last) => format!("{first} to {last}"),
        Type::Words(words) => words.iter().map(|w| format!("`{w}`")).collect::<Vec<_>>().join(", "),
        Type::List(of) => format!("list of: {}", shown(of)),
        Type::Map(_) => "map".to_owned(),
        Type::Labels => "labels".to_owned(),
        Type::LabelGlobs => "map of label to glob".to_owned(),
        Type::LabelSelector => "map of labels".to_owned(),
        Type::Either(all) => all.iter().map(shown).collect::<Vec<_>>().join(", or "),
        Type::Refused => "-".to_owned(),
    }
}
