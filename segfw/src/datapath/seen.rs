//! Every BPF program and link of this machine, ours or not, as the kernel lists them: for a support bundle, where the
//! question often is who else is at the hooks.

use super::Error;
use serde::Serialize;

/// Objects that are listed; a busy host has some hundreds.
const LISTED: usize = 10_000;

/// A program.
#[derive(Debug, Serialize)]
pub struct Program {
    /// The kernel's number.
    pub id: u32,
    /// At most 15 characters.
    pub name: String,
    /// `bpf_prog_type`.
    pub kind: u32,
    /// Hash of the instructions, hexadecimal.
    pub tag: String,
    /// Who loaded it.
    pub uid: Option<u32>,
}

/// A link.
#[derive(Debug, Serialize)]
pub struct Link {
    /// The kernel's number.
    pub id: u32,
    /// Of the program behind it.
    pub program: u32,
    /// `Cgroup`, `Xdp`; empty where this build does not know it.
    pub kind: String,
}

/// Every program.
pub fn programs() -> Result<Vec<Program>, Error> {
    let list = |source| Error::Program { name: "(list)".to_owned(), source: Box::new(source) };
    aya::programs::loaded_programs()
        .take(LISTED)
        .map(|program| {
            let program = program.map_err(list)?;
            Ok(Program {
                id: program.id(),
                name: program.name_as_str().unwrap_or_default().to_owned(),
                kind: program.program_type() as u32,
                // As bpftool writes it.
                tag: program.tag().to_ne_bytes().iter().map(|b| format!("{b:02x}")).collect(),
                uid: program.created_by_uid(),
            })
        })
        .collect()
}

/// Every link. One that goes while we look is left out.
pub fn links() -> Vec<Link> {
    aya::programs::loaded_links()
        .take(LISTED)
        .flatten()
        .map(|link| Link {
            id: link.id(),
            program: link.program_id(),
            kind: link.link_type().map(|kind| format!("{kind:?}")).unwrap_or_default(),
        })
        .collect()
}
