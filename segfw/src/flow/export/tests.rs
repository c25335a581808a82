//! Golden files: one of each kind of record, in each convention.

use crate::flow::record::Item;
use serde_json::Value;

/// Compares one line per item with the file; `UPDATE_EXPECT=1` writes it.
pub(crate) fn golden(export: fn(&Item) -> Value, file: &str) {
    let lines: String = crate::flow::render::tests::items().iter().map(|item| format!("{}\n", export(item))).collect();
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    expect_test::expect_file![path].assert_eq(&lines);
}
