//! The only module that names aya, and the only door to bpf(2).
//!
//! * [`load`]: the object, its maps (opened from their pins or made), its programs.
//! * [`attach`]: links, pinned; the pin is their only owner. There is no detach outside [`attach::remove`].
//! * [`generation`]: fills a generation, proves it by reading it back, switches.
//! * [`security`]: gate conn and the list of address families, as BPF LSM or `fmod_ret`; [`btf`]: what they read.
//! * [`sys`]: the few calls aya 0.14 lacks.

pub mod attach;
pub mod btf;
pub mod cookie;
pub mod generation;
pub mod guard;
pub mod host_maps;
pub mod left;
pub mod load;
pub mod security;
pub mod seen;
pub mod sys;

pub use load::Datapath;

/// What the kernel refused, with what we were doing and what it may mean.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or a folder of ours.
    #[error("{what} {path}: {source}")]
    Io { what: &'static str, path: String, source: std::io::Error },
    /// A bpf(2) call.
    #[error("{what}: {source}")]
    Sys { what: String, source: std::io::Error },
    /// The object or a program of it.
    #[error("cannot load the eBPF programs: {0}")]
    Load(#[from] aya::EbpfError),
    /// The verifier, or a missing feature.
    #[error("the kernel does not take the program {name}: {source}")]
    Program { name: String, source: Box<aya::programs::ProgramError> },
    /// The object and this module disagree: a bug.
    #[error("the eBPF object has no {kind} {name}: this build is broken")]
    Missing { kind: &'static str, name: String },
    /// What was read back of a new map is not what was written.
    #[error("the map {map} should hold {want}, the kernel says {have}; the revision was not put in force")]
    ReadBack { map: &'static str, want: String, have: String },
}

impl Error {
    /// A bpf(2) call that failed with the current errno.
    pub(crate) fn sys(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Sys { what: what.into(), source }
    }
}
