//! The language as a JSON Schema (draft 2020-12), for editors. It accepts every right document; what needs a second
//! document, or a calendar, only `segfw policy check` can say.

use super::{DOCUMENT, Field, KINDS, Map, Presence, Shape, Type};
use serde_json::{Value, json};

/// Where the schema says it is; nothing is fetched from there.
pub const ID: &str = "https://segfw.dev/schema/v1.json";

/// The whole schema. One document of a file at a time, as editors check YAML.
pub fn schema() -> Value {
    let mut root = map(&DOCUMENT);
    let per_kind: Vec<Value> = KINDS
        .iter()
        .map(|kind| {
            json!({
                "if": {"properties": {"kind": {"const": kind.name}}, "required": ["kind"]},
                "then": {"description": kind.doc, "properties": {"spec": map(kind.spec)}},
            })
        })
        .collect();
    let about = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        "title": "segfw policy",
        "description": "A document of a segfw policy. `segfw policy schema` prints this.",
        "allOf": per_kind,
    });
    if let (Value::Object(root), Value::Object(about)) = (&mut root, about) {
        root.extend(about);
        // The kinds say what stands in it.
        if let Some(Value::Object(properties)) = root.get_mut("properties") {
            let _ = properties.insert("spec".to_owned(), json!({"type": "object"}));
        }
    }
    root
}

fn map(map: &Map) -> Value {
    let properties: serde_json::Map<String, Value> = map.fields.iter().map(|f| (f.key.to_owned(), field(f))).collect();
    let required: Vec<&str> = map.fields.iter().filter(|f| f.presence == Presence::Required).map(|f| f.key).collect();
    let mut schema = json!({"type": "object", "additionalProperties": false, "properties": properties});
    let Some(object) = schema.as_object_mut() else { return schema };
    if !required.is_empty() {
        let _ = object.insert("required".into(), json!(required));
    }
    match map.shape {
        Shape::Free => {}
        Shape::One => {
            let _ = object.insert("minProperties".into(), json!(1));
            let _ = object.insert("maxProperties".into(), json!(1));
        }
        Shape::Some => {
            let _ = object.insert("minProperties".into(), json!(1));
        }
        Shape::Or(first, alone) => {
            let either = json!([{"required": [first]}, {"required": [alone], "maxProperties": 1}]);
            let _ = object.insert("oneOf".into(), either);
        }
    }
    schema
}

fn field(field: &Field) -> Value {
    let mut schema = value(&field.value);
    if let Value::Object(object) = &mut schema {
        let _ = object.insert("description".into(), json!(field.doc));
        // Only a default that could be written: "every protocol and port" is none.
        if let (Presence::Default(default), Type::Words(words)) = (field.presence, field.value)
            && words.contains(&default)
        {
            let _ = object.insert("default".into(), json!(default));
        }
    }
    schema
}

/// What an editor takes for a number or a truth value is text here.
fn scalar() -> Value {
    json!(["string", "number", "boolean"])
}

fn value(of: &Type) -> Value {
    match of {
        Type::Text => json!({"type": scalar()}),
        Type::Form(form) => json!({"type": scalar(), "pattern": form.pattern}),
        Type::Number(first, last) => json!({"type": "integer", "minimum": first, "maximum": last}),
        Type::Words(words) => json!({"enum": words}),
        Type::List(of) => json!({"type": "array", "minItems": 1, "items": value(of)}),
        Type::Map(of) => map(of),
        Type::Labels | Type::LabelGlobs => {
            json!({"type": "object", "minProperties": 1, "additionalProperties": {"type": scalar()}})
        }
        Type::LabelSelector => json!({
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "anyOf": [
                    {"type": scalar()},
                    {"type": "array", "minItems": 1, "items": {"type": scalar()}},
                ],
            },
        }),
        Type::Either(all) => json!({"anyOf": all.iter().map(value).collect::<Vec<_>>()}),
        Type::Refused => json!({"not": {}}),
    }
}
