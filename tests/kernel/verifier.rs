//! Every program through this kernel's verifier, with each thing that a kernel may lack taken away as well.

use crate::{Options, Tally};
use anyhow::{Result, anyhow};
use segfw::datapath::load::{Features, MadeBy, ProcessBy, verify};

/// Instructions that a kernel walks through for one program at most (`BPF_COMPLEXITY_LIMIT_INSNS`).
const WALKED: u32 = 1_000_000;

pub(crate) fn run(_: &Options, tally: &mut Tally) -> Result<()> {
    let here = Features::probe();
    facts(here);
    let mut sets = vec![("as probed", here)];
    if here.set_retval {
        sets.push(("without bpf_set_retval", Features { set_retval: false, ..here }));
    }
    if here.skb_netns {
        sets.push(("without the namespace of packets", Features { skb_netns: false, ..here }));
    }
    if here.sock_ops_process != ProcessBy::Nothing {
        sets.push(("without the name of who connects", Features { sock_ops_process: ProcessBy::Nothing, ..here }));
    }
    // What older kernels use is loaded on newer ones too: it must not rot.
    if here.sock_ops_process == ProcessBy::Helpers {
        sets.push(("with who connects from task_struct", Features { sock_ops_process: ProcessBy::Task, ..here }));
    }
    if here.cgroup_made == MadeBy::Event {
        sets.push(("with new cgroups by type", Features { cgroup_made: MadeBy::Types, ..here }));
    }
    let (mut programs, mut walked) = (0, 0);
    for (what, features) in sets {
        for (program, result) in verify(features)? {
            let result = match result {
                Ok(info) => {
                    if features == here {
                        programs += 1;
                        walked = walked.max(info.verified);
                    }
                    println!("verifier: {program} {what}: {} xlated, {} walked", info.instructions, info.verified);
                    // 0 below 5.16, which does not say.
                    if info.verified < WALKED / 2 { Ok(()) } else { Err(anyhow!("too near the limit: {info:?}")) }
                }
                Err(error) => Err(anyhow!("{}", ending(&error.to_string()))),
            };
            tally.count(format!("{program} {what}"), result);
        }
    }
    println!("fact programs {programs}");
    println!("fact walked {}", if walked == 0 { "not told".to_owned() } else { walked.to_string() });
    Ok(())
}

/// What the programs use here, for the table of kernels that `cargo xtask` writes.
fn facts(here: Features) {
    println!("fact reject {}", if here.set_retval { "ECONNREFUSED" } else { "EPERM" });
    println!("fact packet-namespace {}", if here.skb_netns { "yes" } else { "no" });
    let process = match here.sock_ops_process {
        ProcessBy::Helpers => "helpers",
        ProcessBy::Task => "task_struct",
        ProcessBy::Nothing => "no",
    };
    println!("fact process {process}");
    let made = match here.cgroup_made {
        MadeBy::Event => "tracepoint",
        MadeBy::Types => "BTF tracepoint",
        MadeBy::Nothing => "no",
    };
    println!("fact new-cgroups {made}");
}

/// The last words of a verifier, which may have said a million lines.
fn ending(log: &str) -> String {
    const LINES: usize = 16;
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
