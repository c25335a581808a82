//! The CLI's end of the control socket.

use super::{Envelope, Failure, PROTOCOL, Request, Response};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// Bytes of one line of an answer; the longest is a status with all its tables and problems.
pub const LINE_BYTES: u64 = 16 << 20;
/// A connection to a local socket is made at once, or the agent hangs.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The agent cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No socket.
    #[error(
        "no agent is running: {0} does not exist; start it with `segfw agent --policy DIR`, or name its socket with --socket"
    )]
    Absent(PathBuf),
    /// A socket without a listener.
    #[error(
        "no agent is running: {0} was left behind by one that was killed (what it had loaded is still enforced); start it with `segfw agent --policy DIR`"
    )]
    Dead(PathBuf),
    /// Not root.
    #[error("{0} is for root and for the agent's own user; try sudo")]
    Forbidden(PathBuf),
    /// It listens and does nothing.
    #[error("the agent at {0} does not take connections; see `journalctl -u segfw`")]
    Hangs(PathBuf),
    /// The system said no.
    #[error("cannot talk to the agent at {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The agent died while it answered.
    #[error("the agent ended the connection before its answer was complete; see `journalctl -u segfw`")]
    Incomplete,
    /// Another version?
    #[error("the agent's answer is not understood: {0}; are CLI and agent of the same version?")]
    NotUnderstood(String),
    /// The agent said no.
    #[error("{0}")]
    Failed(#[from] Failure),
}

/// One connection, good for one request.
#[derive(Debug)]
pub struct Client {
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
    path: PathBuf,
}

impl Client {
    /// Connects to the agent.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let owned = || path.to_owned();
        let stream = match timeout(CONNECT_TIMEOUT, UnixStream::connect(path)).await {
            Err(_) => return Err(ClientError::Hangs(owned())),
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => {
                let is = |kind| source.kind() == kind;
                return Err(if is(io::ErrorKind::NotFound) {
                    ClientError::Absent(owned())
                } else if is(io::ErrorKind::ConnectionRefused) {
                    ClientError::Dead(owned())
                } else if is(io::ErrorKind::PermissionDenied) {
                    ClientError::Forbidden(owned())
                } else {
                    ClientError::Io { path: owned(), source }
                });
            }
        };
        let (read, write) = stream.into_split();
        Ok(Self { read: BufReader::new(read), write, path: owned() })
    }

    /// Sends the request. The answer is read with [`Answer::next`].
    pub async fn ask(mut self, request: Request) -> Result<Answer, ClientError> {
        let io = |source| ClientError::Io { path: self.path.clone(), source };
        let envelope = Envelope { protocol: PROTOCOL, request };
        let line = serde_json::to_string(&envelope).map_err(|e| ClientError::NotUnderstood(e.to_string()))? + "\n";
        match self.write.write_all(line.as_bytes()).await {
            // An agent that refuses us may have hung up before it read: its reason is still there to be read.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(io(error)),
            Ok(()) | Err(_) => {}
        }
        Ok(Answer { client: self, line: Vec::new() })
    }

    /// Asks for something that has exactly one line.
    pub async fn ask_one(self, request: Request) -> Result<Response, ClientError> {
        let mut answer = self.ask(request).await?;
        let first = answer.next().await?.ok_or(ClientError::Incomplete)?;
        match answer.next().await? {
            None => Ok(first),
            Some(_) => Err(ClientError::NotUnderstood("more than one line".to_owned())),
        }
    }
}

/// The lines of an answer.
#[derive(Debug)]
pub struct Answer {
    client: Client,
    /// What a cancelled `next` had read already.
    line: Vec<u8>,
}

impl Answer {
    /// The next line; `None` when the answer is complete. Safe to cancel.
    pub async fn next(&mut self) -> Result<Option<Response>, ClientError> {
        let room = LINE_BYTES.saturating_sub(self.line.len() as u64);
        let mut bounded = (&mut self.client.read).take(room);
        match bounded.read_until(b'\n', &mut self.line).await {
            Ok(_) => {}
            // The agent hung up with our request unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(ClientError::Incomplete),
            Err(source) => return Err(ClientError::Io { path: self.client.path.clone(), source }),
        }
        if !self.line.ends_with(b"\n") {
            return Err(if self.line.len() as u64 >= LINE_BYTES {
                ClientError::NotUnderstood(format!("a line of more than {LINE_BYTES} bytes"))
            } else {
                ClientError::Incomplete
            });
        }
        let line = std::mem::take(&mut self.line);
        match serde_json::from_slice(&line) {
            Err(error) => Err(ClientError::NotUnderstood(error.to_string())),
            Ok(Response::End) => Ok(None),
            Ok(Response::Error(failure)) => Err(failure.into()),
            Ok(response) => Ok(Some(response)),
        }
    }

    /// True where lines are waiting, so that a batch can be shown together.
    pub fn has_more(&self) -> bool {
        self.client.read.buffer().contains(&b'\n')
    }
}
