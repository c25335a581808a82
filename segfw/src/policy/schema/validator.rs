//! For tests: as much of JSON Schema as [`super::json`] uses. A word that it does not know makes everything wrong, so that
//! none is passed over.

use serde_json::Value;

/// Is the value right? `fits` judges a pattern and a text.
pub fn valid(schema: &Value, value: &Value, fits: &dyn Fn(&str, &str) -> bool) -> bool {
    let Some(object) = schema.as_object() else { return schema.as_bool().unwrap_or(false) };
    let list = |of: &Value| of.as_array().cloned().unwrap_or_default();
    let of_list = |of: &Value| list(of).iter().filter(|s| valid(s, value, fits)).count();
    let number = |of: &Value| of.as_u64().unwrap_or(0);
    let is = |name: &Value| match name.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("number") => value.is_number(),
        Some("integer") => value.is_u64(),
        Some("boolean") => value.is_boolean(),
        Some(_) | None => false,
    };
    let items = value.as_array();
    let members = value.as_object();
    object.iter().all(|(word, of)| match word.as_str() {
        "$schema" | "$id" | "title" | "description" | "default" | "then" => true,
        "type" => of.as_array().map_or_else(|| is(of), |names| names.iter().any(is)),
        "enum" => list(of).contains(value),
        "const" => of == value,
        "not" => !valid(of, value, fits),
        "pattern" => value.as_str().is_none_or(|text| of.as_str().is_some_and(|pattern| fits(pattern, text))),
        "minimum" => value.as_u64().is_none_or(|n| n >= number(of)),
        "maximum" => value.as_u64().is_none_or(|n| n <= number(of)),
        "minItems" => items.is_none_or(|l| l.len() as u64 >= number(of)),
        "items" => items.is_none_or(|l| l.iter().all(|v| valid(of, v, fits))),
        "minProperties" => members.is_none_or(|o| o.len() as u64 >= number(of)),
        "maxProperties" => members.is_none_or(|o| o.len() as u64 <= number(of)),
        "required" => members.is_none_or(|o| list(of).iter().all(|k| k.as_str().is_some_and(|k| o.contains_key(k)))),
        "properties" => {
            members.is_none_or(|o| o.iter().all(|(k, v)| of.get(k).is_none_or(|schema| valid(schema, v, fits))))
        }
        "additionalProperties" => members.is_none_or(|o| {
            let known = object.get("properties");
            let other = |k: &str| known.is_none_or(|p| p.get(k).is_none());
            o.iter().filter(|(k, _)| other(k)).all(|(_, v)| valid(of, v, fits))
        }),
        "allOf" => of_list(of) == list(of).len(),
        "anyOf" => of_list(of) > 0,
        "oneOf" => of_list(of) == 1,
        "if" => !valid(of, value, fits) || object.get("then").is_none_or(|then| valid(then, value, fits)),
        _ => false,
    })
}

/// Every document of a text, as an editor sees it: with YAML's own types. `---` stands at the start of a line.
pub fn documents(text: &str) -> Result<Vec<Value>, String> {
    let body = |t: &&str| t.lines().any(|l| !l.trim().is_empty() && !l.trim().starts_with('#'));
    text.split("\n---").filter(body).map(|t| crate::policy::yaml::settings(t.trim_start_matches("---"))).collect()
}
