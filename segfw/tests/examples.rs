//! The examples in `policies/`: each is a whole policy, without an error or a warning, that a kernel can hold, and each
//! does what its comment and its own Test document say.

use segfw::control::report::Held;
use segfw::control::trial;
use segfw::policy::compile::{Clock, compile};
use segfw::policy::document::Document;
use segfw::policy::host_policy::Labels;
use segfw::policy::tables::Numbers;
use segfw::policy::{HostSettings, Inventory, Problems, read};
use std::path::{Path, PathBuf};

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies");
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("the folder policies")
        .map(|entry| entry.expect("an entry of it").path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    assert!(files.len() >= 8, "{files:?}");
    files
}

#[test]
fn examples_compile_and_do_what_they_say() {
    let mut cases = 0;
    for path in examples() {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# "), "{name}: begins with what it shows");
        // A Tuesday, in no window of any example.
        let clock = Clock { wall: "2026-11-24T18:00:00Z".parse().unwrap(), boot_ns: 1_000_000_000 };
        let (docs, policy, problems) =
            read(&[(name.clone(), text)], |_| Inventory::default(), &HostSettings::default(), clock.wall);
        assert_eq!(problems, Problems::default(), "{problems}");
        let local: Vec<Labels> = docs
            .iter()
            .filter_map(|d| match d {
                Document::Workload(d) => Some(d.labels.clone()),
                Document::Segment(_) | Document::Policy(_) | Document::Test(_) => None,
            })
            .collect();
        let tables = compile(&policy, &local, &[], &mut Numbers::default(), clock).unwrap();
        assert!(!tables.rules.is_empty(), "{name}");
        let all = trial::run(&policy, &docs, &local, &Labels::new(), clock).unwrap();
        for case in &all {
            assert_eq!(case.held, Held::Yes, "{name}:{}: {case:?}", case.at.line);
        }
        cases += all.len();
    }
    assert!(cases >= 10);
}
