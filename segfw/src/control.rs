//! The agent's local door: a unix socket on which the CLI asks and the agent answers.
//!
//! One connection, one request: a JSON line in, JSON lines out, the last of them `end` or `error`, so that a cut-off
//! answer is never taken for a whole one. Only root and the agent's own user are served, whatever the file modes say.

pub mod answer;
pub mod client;
pub mod report;
pub mod server;
pub mod trial;

pub use client::{Client, ClientError};
pub use server::{Backend, ControlCounts, Listener, serve};

use crate::flow::{Item, Query};
use report::{
    CounterReport, Explanation, PastReport, PlacesReport, PolicyFile, Question, ReloadReport, StatusReport,
    WorkloadReport,
};
use serde::{Deserialize, Serialize};

/// Number of this protocol. CLI and agent are one binary, but an old agent may still run while the CLI is new.
pub const PROTOCOL: u32 = 1;
/// Where the socket is, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/segfw/control.sock";

/// The line that a client sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// [`PROTOCOL`] of the client.
    pub protocol: u32,
    /// What it wants.
    pub request: Request,
}

/// What a client can ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// One [`Response::Status`].
    Status,
    /// One [`Response::Workload`] for each.
    Workloads,
    /// [`Response::Flow`] for each, without end if the query follows.
    Flows(Query),
    /// One [`Response::Explanation`].
    Explain(Question),
    /// One [`Response::Counters`].
    Counters,
    /// Reads the policy folder again: one [`Response::Reloaded`].
    Reload,
    /// As `Reload`, for a caller who has put the files there and says who they are from.
    Take {
        /// For the history: `apply of /root/policy by root`.
        source: String,
    },
    /// Where the agent reads and keeps things: one [`Response::Places`].
    Places,
    /// The revisions that are kept, newest first: one [`Response::Past`] for each.
    Past,
    /// The files of a revision, or of the one in force: one [`Response::File`] for each.
    Files(Option<u64>),
}

/// A line of the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::large_enum_variant, reason = "one at a time, never in a collection that matters")]
pub enum Response {
    /// To [`Request::Status`].
    Status(StatusReport),
    /// To [`Request::Workloads`].
    Workload(WorkloadReport),
    /// To [`Request::Flows`].
    Flow(Item),
    /// To [`Request::Explain`].
    Explanation(Explanation),
    /// To [`Request::Counters`].
    Counters(CounterReport),
    /// To [`Request::Reload`] and [`Request::Take`].
    Reloaded(ReloadReport),
    /// To [`Request::Places`].
    Places(PlacesReport),
    /// To [`Request::Past`].
    Past(PastReport),
    /// To [`Request::Files`].
    File(PolicyFile),
    /// The answer is complete.
    End,
    /// There is no answer, or no more of it.
    Error(Failure),
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For the person who must act.
    pub message: String,
}

/// Kinds of failure; the CLI turns them into exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The request was wrong.
    Input,
    /// The caller may not ask.
    Refused,
    /// Too many others ask.
    Busy,
    /// The agent could not do it.
    System,
}

impl Failure {
    /// The request was wrong.
    pub fn input(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Input, message: message.into() }
    }
    /// The agent could not do it.
    pub fn system(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::System, message: message.into() }
    }
}
