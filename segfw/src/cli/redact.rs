//! Takes secrets out of what is to be sent to somebody else. Rather too much than too little: a line that was cut can be
//! asked for, one that was sent cannot be taken back.

use serde_json::Value;

/// What stands in place of what was taken out.
pub(super) const REMOVED: &str = "[removed]";

/// A key is secret if one of its words is one of these: `apiKey`, `DB_PASSWORD`, `x-auth-token`.
const SECRET: [&str; 26] = [
    "secret",
    "secrets",
    "token",
    "tokens",
    "password",
    "passwords",
    "passwd",
    "pwd",
    "pass",
    "passphrase",
    "key",
    "keys",
    "apikey",
    "credential",
    "credentials",
    "auth",
    "authorization",
    "cookie",
    "cookies",
    "session",
    "bearer",
    "private",
    "signature",
    "psk",
    "pin",
    "environment",
];

/// Words of a key: `dbPassword-2` is db, password, 2.
fn is_secret(key: &str) -> bool {
    let mut words = vec![String::new()];
    let mut lower = false;
    for c in key.chars() {
        if !c.is_alphanumeric() || (c.is_uppercase() && lower) {
            words.push(String::new());
        }
        lower = c.is_lowercase() || c.is_numeric();
        if let Some(word) = words.last_mut()
            && c.is_alphanumeric()
        {
            word.extend(c.to_lowercase());
        }
    }
    words.iter().any(|word| SECRET.contains(&word.trim_end_matches(char::is_numeric)))
}

/// Text line by line: YAML, settings, logs. What stands behind a secret key goes, to the end of the line and with all
/// lines that belong to it.
pub(super) fn text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Lines that are indented deeper than this belong to a value that was taken out.
    let mut inside: Option<(usize, bool)> = None;
    let mut pem = false;
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        let body = line.trim_start();
        if pem || body.contains("-----BEGIN ") {
            if !pem {
                out.push_str(REMOVED);
                out.push('\n');
            }
            pem = !body.contains("-----END ");
            continue;
        }
        if let Some((outer, list)) = inside {
            // A list may stand at the indent of its key, where the key has no other value.
            if body.is_empty() || indent > outer || (list && indent == outer && body.starts_with("- ")) {
                continue;
            }
            inside = None;
        }
        match secret_at(line) {
            Some(end) => {
                out.push_str(line.get(..end).unwrap_or_default());
                out.push(' ');
                out.push_str(REMOVED);
                // `- token: x`: the value belongs to the key, whose column is behind the dash.
                inside = Some((indent, line.get(end..).is_none_or(|rest| rest.trim().is_empty())));
            }
            None => out.push_str(&userinfo(line)),
        }
        out.push('\n');
    }
    out
}

/// Where the first secret key of a line ends, its `:` or `=` included.
fn secret_at(line: &str) -> Option<usize> {
    let word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    line.char_indices()
        .filter(|(_, c)| matches!(c, ':' | '='))
        .find_map(|(at, _)| {
            let before = line.get(..at)?.trim_end().trim_end_matches(['"', '\'']);
            let start =
                before.rfind(|c| !word(c)).map_or(0, |i| i + before[i..].chars().next().map_or(1, char::len_utf8));
            let value = line.get(at + 1..)?;
            // `://` is no key; neither is a time.
            (!value.starts_with("//") && is_secret(&before[start..])).then_some(at + 1)
        })
        .or_else(|| line.find("Bearer ").map(|at| at + "Bearer".len()))
}

/// `://user:password@host` without what stands before the host.
fn userinfo(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("://") {
        out.push_str(before);
        out.push_str("://");
        let end = after.find(|c: char| c.is_whitespace() || matches!(c, '/' | '"' | '\'')).unwrap_or(after.len());
        rest = match after[..end].rfind('@') {
            Some(at) => {
                out.push_str(REMOVED);
                &after[at..]
            }
            None => after,
        };
    }
    out.push_str(rest);
    out
}

/// A report: values of secret keys go, and texts are treated as [`text`].
pub(super) fn json(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                // Counts and flags hide nothing.
                if is_secret(key) && !matches!(value, Value::Number(_) | Value::Bool(_) | Value::Null) {
                    *value = Value::String(REMOVED.to_owned());
                } else {
                    json(value);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(json),
        Value::String(s) => {
            let clean = text(s);
            *s = clean.trim_end_matches('\n').to_owned();
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn keys() {
        for secret in ["token", "API_KEY", "apiKey", "db.password", "x-auth-token", "passwd", "Secret2", "dbPassword"] {
            assert!(is_secret(secret), "{secret}");
        }
        for plain in ["monkey", "tokenizer", "author", "name", "keyed", "ports", "compass"] {
            assert!(!is_secret(plain), "{plain}");
        }
    }

    #[test]
    fn secrets_go_and_the_rest_stays() {
        let given = "\
metadata:
  name: shop   # owner: team-shop
  description: \"the token: abc-planted-1 opens it\"
  password: |
    planted-2
      planted-3

  labels: {app: shop, api_key: planted-4}
spec:
  tokens:
  - planted-5
  - planted-6
  url: https://user:planted-7@example.org/x?y
  at: 2026-01-01T00:00:00Z
# DB_PASSWORD=planted-8
header: Authorization: Bearer planted-9
x: Bearer planted-10
-----BEGIN PRIVATE KEY-----
planted-11
-----END PRIVATE KEY-----
- secret:
    a: planted-12
  other: kept
";
        let clean = text(given);
        assert!(!clean.contains("planted"), "{clean}");
        expect![[r#"
            metadata:
              name: shop   # owner: team-shop
              description: "the token: [removed]
              password: [removed]
              labels: {app: shop, api_key: [removed]
            spec:
              tokens: [removed]
              url: https://[removed]@example.org/x?y
              at: 2026-01-01T00:00:00Z
            # DB_PASSWORD= [removed]
            header: Authorization: [removed]
            x: Bearer [removed]
            [removed]
            - secret: [removed]
        "#]]
        .assert_eq(&clean);
    }

    #[test]
    fn reports() {
        let mut value = serde_json::json!({
            "labels": {"app": "shop", "token": "planted"},
            "message": "unknown key; password: planted",
            "keys": 7,
            "list": ["a", "secret=planted"],
        });
        json(&mut value);
        let shown = value.to_string();
        assert!(!shown.contains("planted") && shown.contains("shop") && shown.contains("\"keys\":7"), "{shown}");
    }
}
