//! The examples in `policies/`: each is a whole policy, without an error or a warning, that a kernel can hold, and each
//! does what its comment and its own Test document say.

use segfw::control::answer;
use segfw::control::report::{EndSpec, Question, Service};
use segfw::policy::compile::{Clock, compile};
use segfw::policy::document::{CaseEnd, Document};
use segfw::policy::explain::View;
use segfw::policy::host_policy::Labels;
use segfw::policy::tables::Numbers;
use segfw::policy::{HostSettings, Inventory, Problems, read};
use segfw_common::{Proto, Verdict};
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
        for doc in &docs {
            let Document::Test(test) = doc else { continue };
            for case in &test.cases {
                let end = |end: &CaseEnd| match end {
                    CaseEnd::Labels(labels) => EndSpec::Labels(labels.clone()),
                    CaseEnd::Address(ip) => EndSpec::Address(*ip),
                    CaseEnd::World => EndSpec::World,
                    CaseEnd::Host => EndSpec::Host,
                    CaseEnd::Unresolved => EndSpec::Unresolved,
                };
                assert_eq!(case.port.proto, Proto::Tcp, "the examples ask for no other");
                let port: Service = format!("tcp/{}", case.port.first).parse().unwrap();
                let question = Question { from: end(&case.from), to: end(&case.to), port };
                let view = View { clock, host_flags: 0 };
                let answer = answer::explain(&tables, &policy, &question, &|_| None, view, None, &name).unwrap();
                let about = format!("{}: {answer:?}", case.at.line);
                assert_eq!(answer.verdict != Verdict::Denied.into(), case.allow, "{name}:{about}");
                if let Some(by) = &case.by {
                    assert!(
                        answer.ends.iter().any(|e| e.rule.as_ref().is_some_and(|r| r.rule == by.value)),
                        "{name}:{about}"
                    );
                }
                cases += 1;
            }
        }
    }
    assert!(cases >= 10);
}
