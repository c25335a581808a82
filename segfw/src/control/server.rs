//! The agent's end of the control socket.

use super::report::{
    CounterReport, Explanation, PastReport, PlacesReport, PolicyFile, Question, ReloadReport, StatusReport,
    WorkloadReport,
};
use super::{Envelope, Failure, FailureKind, PROTOCOL, Request, Response};
use crate::flow::history::Past;
use crate::flow::{History, Item, Query};
use std::fs::{DirBuilder, File, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Connections at a time. More get the answer `busy`: a few screens and scripts, not a fleet.
pub const CONNECTIONS: usize = 32;
/// Bytes of a request: the longest is a query with many filters.
pub const REQUEST_BYTES: u64 = 64 << 10;
/// A client that has not sent its request by then is cut off.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer that is not there by then is an error: nobody waits for ever for a status.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A client that does not read is cut off.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Records that wait between the reader of the files and the client: some 200 KB.
const OLDER_WAITING: usize = 256;
/// Wait after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the agent can say. Answers are built per request; none may block the thread for long.
pub trait Backend: Send + Sync + 'static {
    /// Everything about the agent.
    fn status(&self) -> impl Future<Output = Result<StatusReport, Failure>> + Send;
    /// Every workload of this host.
    fn workloads(&self) -> impl Future<Output = Result<Vec<WorkloadReport>, Failure>> + Send;
    /// The judgement of a flow that need not exist.
    fn explain(&self, question: Question) -> impl Future<Output = Result<Explanation, Failure>> + Send;
    /// Exact counts.
    fn counters(&self) -> impl Future<Output = Result<CounterReport, Failure>> + Send;
    /// Reads the policy folder again.
    fn reload(&self) -> impl Future<Output = Result<ReloadReport, Failure>> + Send;
    /// As [`Self::reload`], with who put the files there.
    fn take(&self, source: String) -> impl Future<Output = Result<ReloadReport, Failure>> + Send;
    /// Where it reads and keeps things.
    fn places(&self) -> impl Future<Output = Result<PlacesReport, Failure>> + Send;
    /// The revisions that are kept, newest first.
    fn past(&self) -> impl Future<Output = Result<Vec<PastReport>, Failure>> + Send;
    /// The files of a revision; `None` = of the one in force.
    fn files(&self, revision: Option<u64>) -> impl Future<Output = Result<Vec<PolicyFile>, Failure>> + Send;
    /// The records; the server filters and follows by itself.
    fn history(&self) -> &History;
}

/// What happened at the door. Part of the status.
#[derive(Debug, Default)]
pub struct ControlCounts {
    /// Requests that got an answer.
    pub served: AtomicU64,
    /// Callers who may not ask.
    pub refused: AtomicU64,
    /// Callers who found too many others.
    pub busy: AtomicU64,
    /// Requests that could not be read: too long, too slow, not JSON.
    pub malformed: AtomicU64,
    /// Readers who stopped reading, or left early.
    pub cut_off: AtomicU64,
}

impl ControlCounts {
    /// Names and values, for [`CounterReport::named`].
    pub fn named(&self) -> [(&'static str, u64); 5] {
        let Self { served, refused, busy, malformed, cut_off } = self;
        [
            ("control-served", served),
            ("control-refused", refused),
            ("control-busy", busy),
            ("control-malformed", malformed),
            ("control-cut-off", cut_off),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

fn count(counter: &AtomicU64) {
    let _ = counter.fetch_add(1, Ordering::Relaxed);
}

/// The socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody listens already.
    #[error("another agent is running: it holds {0}")]
    InUse(PathBuf),
    /// We never remove what we did not make.
    #[error("{0} is there and is not a socket; remove it, or choose another path with --socket")]
    NotASocket(PathBuf),
    /// Others could put a socket of their own there.
    #[error("{path} {problem}; the control socket needs a folder that only its owner can write, such as /run/segfw")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The system said no.
    #[error("cannot open the control socket {path}")]
    Io {
        /// What was being opened.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The open socket. The file goes away with it.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    path: PathBuf,
    /// Held as long as the agent lives: the kernel lets go of it even if the agent is killed.
    _lock: File,
    owner: u32,
    counts: Arc<ControlCounts>,
}

impl Listener {
    /// Opens the socket: folder 0700 (made if absent), socket 0600, a stale socket of a dead agent replaced.
    /// Needs a tokio runtime.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let io = |source| BindError::Io { path: path.to_owned(), source };
        let owner = nix::unistd::geteuid().as_raw();
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io)?;
        let meta = folder.metadata().map_err(io)?;
        let wrong = |problem| Err(BindError::Folder { path: folder.to_owned(), problem });
        if meta.uid() != owner && meta.uid() != 0 {
            return wrong("belongs to another user");
        }
        if meta.mode() & 0o022 != 0 {
            return wrong("can be written by other users");
        }
        // The lock, not the socket, says whether another agent lives: it cannot be stale and has no race.
        let lock_path = with_suffix(path, ".lock");
        let lock = File::options().create(true).write(true).truncate(false).mode(0o600).open(&lock_path).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(BindError::InUse(path.to_owned())),
            Err(std::fs::TryLockError::Error(error)) => return Err(io(error)),
        }
        if path.symlink_metadata().is_ok_and(|m| !m.file_type().is_socket()) {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        // Made under another name and renamed: whoever finds the socket finds it with its mode, and with a listener.
        let fresh = with_suffix(path, ".new");
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        let inner = UnixListener::bind(&fresh).map_err(io)?;
        std::fs::set_permissions(&fresh, Permissions::from_mode(0o600)).map_err(io)?;
        std::fs::rename(&fresh, path).map_err(io)?;
        Ok(Self { inner, path: path.to_owned(), _lock: lock, owner, counts: Arc::default() })
    }

    /// What happened at this door; shared, to be kept before [`serve`] takes the listener.
    pub fn counts(&self) -> Arc<ControlCounts> {
        Arc::clone(&self.counts)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Nothing to do if it is gone already; the next agent replaces it anyway.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Serves until `shutdown`. Every connection's task ends with it.
pub async fn serve<B: Backend>(listener: Listener, backend: Arc<B>, shutdown: impl Future<Output = ()>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut tasks = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let stream = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            accepted = listener.inner.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the control socket could not take a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let counts = Arc::clone(&listener.counts);
        let admitted = match admit(&stream, listener.owner) {
            Err(failure) => {
                count(&counts.refused);
                Err(failure)
            }
            Ok(()) => Arc::clone(&room).try_acquire_owned().map_err(|_| {
                count(&counts.busy);
                Failure { kind: FailureKind::Busy, message: format!("the agent already serves {CONNECTIONS} callers") }
            }),
        };
        match admitted {
            Ok(permit) => {
                let backend = Arc::clone(&backend);
                let _ = tasks.spawn(async move {
                    connection(stream, &*backend, &counts).await;
                    drop(permit);
                });
            }
            Err(failure) => refuse(stream, failure),
        }
    }
    tasks.shutdown().await;
}

/// Root and the agent's own user.
fn may_ask(uid: u32, owner: u32) -> bool {
    uid == 0 || uid == owner
}

/// Asks the kernel who is at the other end.
fn admit(stream: &UnixStream, owner: u32) -> Result<(), Failure> {
    let refused = |message| Failure { kind: FailureKind::Refused, message };
    let peer = stream.peer_cred().map_err(|e| refused(format!("the agent cannot see who you are: {e}")))?;
    if may_ask(peer.uid(), owner) {
        return Ok(());
    }
    tracing::warn!(uid = peer.uid(), pid = peer.pid(), "a caller at the control socket was refused");
    Err(refused(format!("user {} may not talk to the agent; only root and user {owner} may (try sudo)", peer.uid())))
}

/// One line into the empty buffer of a new socket: needs no task and never waits.
fn refuse(stream: UnixStream, failure: Failure) {
    use std::io::Write as _;
    // tokio would first wait to be told that the socket is writable; a new one is.
    if let (Ok(line), Ok(mut stream)) = (serde_json::to_string(&Response::Error(failure)), stream.into_std()) {
        let _ = stream.write_all(format!("{line}\n").as_bytes());
    }
}

/// The caller left or does not read.
struct Gone;

/// Sends lines.
struct Lines<'a> {
    out: tokio::net::unix::WriteHalf<'a>,
    batch: Vec<u8>,
}

impl Lines<'_> {
    /// Bytes that are sent together.
    const BATCH: usize = 64 << 10;

    async fn send(&mut self, response: &Response) -> Result<(), Gone> {
        // Into memory: the only error is a map key that is not text, and there is none.
        serde_json::to_writer(&mut self.batch, response).map_err(|_| Gone)?;
        self.batch.push(b'\n');
        if self.batch.len() >= Self::BATCH { self.flush().await } else { Ok(()) }
    }
    async fn flush(&mut self) -> Result<(), Gone> {
        let sent = timeout(WRITE_TIMEOUT, self.out.write_all(&self.batch)).await;
        self.batch.clear();
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Gone),
        }
    }
}

async fn connection<B: Backend>(mut stream: UnixStream, backend: &B, counts: &ControlCounts) {
    let (read, write) = stream.split();
    let mut read = BufReader::new(read);
    let mut lines = Lines { out: write, batch: Vec::new() };
    let answered = match request(&mut read).await {
        Ok(request) => answer(request, &mut read, &mut lines, backend).await,
        Err(failure) => {
            count(&counts.malformed);
            lines.send(&Response::Error(failure)).await
        }
    };
    match answered {
        Ok(()) if lines.flush().await.is_ok() => count(&counts.served),
        Ok(()) | Err(Gone) => count(&counts.cut_off),
    }
}

type Reader<'a> = BufReader<tokio::net::unix::ReadHalf<'a>>;

async fn request(read: &mut Reader<'_>) -> Result<Request, Failure> {
    let mut line = Vec::new();
    let mut bounded = read.take(REQUEST_BYTES);
    match timeout(REQUEST_TIMEOUT, bounded.read_until(b'\n', &mut line)).await {
        Err(_) => return Err(Failure::input(format!("no request within {REQUEST_TIMEOUT:?}"))),
        Ok(Err(error)) => return Err(Failure::input(format!("the request cannot be read: {error}"))),
        Ok(Ok(_)) if !line.ends_with(b"\n") => {
            return Err(Failure::input(format!("a request is one line of at most {REQUEST_BYTES} bytes")));
        }
        Ok(Ok(_)) => {}
    }
    // The protocol first: a request of another version need not be readable.
    #[derive(serde::Deserialize)]
    struct Version {
        protocol: u32,
    }
    match serde_json::from_slice::<Version>(&line) {
        Ok(Version { protocol: PROTOCOL }) => {}
        Ok(Version { protocol }) => {
            let message = format!(
                "this segfw speaks protocol {protocol}, the running agent {PROTOCOL} ({}); restart the agent with the new binary",
                env!("CARGO_PKG_VERSION")
            );
            return Err(Failure::input(message));
        }
        Err(error) => return Err(Failure::input(format!("the request is not understood: {error}"))),
    }
    serde_json::from_slice::<Envelope>(&line)
        .map(|envelope| envelope.request)
        .map_err(|error| Failure::input(format!("the request is not understood: {error}")))
}

async fn answer<B: Backend>(
    request: Request,
    read: &mut Reader<'_>,
    lines: &mut Lines<'_>,
    backend: &B,
) -> Result<(), Gone> {
    let one = async {
        Ok(vec![match request {
            Request::Status => Response::Status(backend.status().await?),
            Request::Explain(question) => Response::Explanation(backend.explain(question).await?),
            Request::Counters => Response::Counters(backend.counters().await?),
            Request::Reload => Response::Reloaded(backend.reload().await?),
            Request::Take { source } => Response::Reloaded(backend.take(source).await?),
            Request::Places => Response::Places(backend.places().await?),
            Request::Past => return Ok((backend.past().await?.into_iter().map(Response::Past).collect(), None)),
            Request::Files(revision) => {
                return Ok((backend.files(revision).await?.into_iter().map(Response::File).collect(), None));
            }
            Request::Workloads => {
                return Ok((backend.workloads().await?.into_iter().map(Response::Workload).collect(), None));
            }
            Request::Flows(query) => return Ok((Vec::new(), Some(query))),
        }])
        .map(|responses| (responses, None))
    };
    let answered: Result<(Vec<Response>, Option<Query>), Failure> = match timeout(ANSWER_TIMEOUT, one).await {
        Ok(answered) => answered,
        Err(_) => Err(Failure::system(format!("the agent had no answer within {ANSWER_TIMEOUT:?}"))),
    };
    match answered {
        Err(failure) => return lines.send(&Response::Error(failure)).await,
        Ok((responses, None)) => {
            for response in &responses {
                lines.send(response).await?;
            }
        }
        Ok((_, Some(query))) => flows(&query, read, lines, backend.history()).await?,
    }
    lines.send(&Response::End).await
}

/// Sends what has happened already: what is beyond memory first, as it is read. Returns how many records that were.
async fn past(past: Past, query: &Query, lines: &mut Lines<'_>) -> Result<usize, Gone> {
    let mut records = 0;
    if let Some(older) = past.older {
        let (to, mut from) = tokio::sync::mpsc::channel(OLDER_WAITING);
        let reader = tokio::task::spawn_blocking(move || older.read(|item| to.blocking_send(item).is_ok()));
        while let Some(item) = from.recv().await {
            records += usize::from(matches!(item, Item::Flow(_)));
            lines.send(&Response::Flow(item)).await?;
        }
        match reader.await {
            Ok(Ok((_, 0))) => {}
            Ok(Ok((_, unreadable))) => tracing::warn!(unreadable, "lines of the flow spool are no records"),
            Ok(Err(error)) => tracing::error!("the flow spool cannot be read: {error}"),
            Err(error) => tracing::error!("reading the flow spool failed: {error}"),
        }
    }
    for item in past.recent {
        if query.first.is_some_and(|first| records >= first) {
            break;
        }
        records += usize::from(matches!(*item, Item::Flow(_)));
        lines.send(&Response::Flow(Item::clone(&item))).await?;
    }
    Ok(records)
}

async fn flows(query: &Query, read: &mut Reader<'_>, lines: &mut Lines<'_>, history: &History) -> Result<(), Gone> {
    if !query.follow {
        return past(history.past(query), query, lines).await.map(drop);
    }
    let (before, mut live) = history.follow(query);
    let mut records = past(before, query, lines).await?;
    lines.flush().await?;
    let mut byte = [0; 1];
    // `--first N -f` ends after N records.
    while query.first.is_none_or(|first| records < first) {
        tokio::select! {
            // A follower says nothing more: what can be read is its end.
            _ = read.read(&mut byte) => return Err(Gone),
            item = live.next() => match item {
                None => break,
                Some(item) if query.matches(&item) => {
                    records += usize::from(matches!(*item, Item::Flow(_)));
                    lines.send(&Response::Flow(Item::clone(&item))).await?;
                    lines.flush().await?;
                }
                Some(item) if query.until.is_some_and(|until| item.time() > until) => break,
                Some(_) => {}
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::client::{Client, ClientError};
    use crate::control::report::tests as fixed;
    use crate::flow::query::{Clause, Filter};
    use crate::flow::record::{enrich, tests as flows};
    use std::sync::atomic::AtomicBool;
    use tokio::sync::oneshot;

    struct Fake {
        history: History,
        hangs: AtomicBool,
    }

    impl Backend for Fake {
        async fn status(&self) -> Result<StatusReport, Failure> {
            if self.hangs.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
            Ok(fixed::status())
        }
        async fn workloads(&self) -> Result<Vec<WorkloadReport>, Failure> {
            Ok(fixed::workloads())
        }
        async fn explain(&self, question: Question) -> Result<Explanation, Failure> {
            if question.to == "nobody".parse().unwrap() {
                return Err(Failure::input("no workload is called nobody"));
            }
            Ok(fixed::explanation())
        }
        async fn counters(&self) -> Result<CounterReport, Failure> {
            Ok(fixed::status().counters)
        }
        async fn reload(&self) -> Result<ReloadReport, Failure> {
            Err(Failure::system("no"))
        }
        async fn take(&self, _: String) -> Result<ReloadReport, Failure> {
            Err(Failure::system("no"))
        }
        async fn places(&self) -> Result<PlacesReport, Failure> {
            Err(Failure::system("no"))
        }
        async fn past(&self) -> Result<Vec<PastReport>, Failure> {
            Ok(Vec::new())
        }
        async fn files(&self, _: Option<u64>) -> Result<Vec<PolicyFile>, Failure> {
            Ok(vec![PolicyFile { name: "a.yaml".into(), text: "kind: Policy\n".into() }])
        }
        fn history(&self) -> &History {
            &self.history
        }
    }

    struct Running {
        path: PathBuf,
        fake: Arc<Fake>,
        counts: Arc<ControlCounts>,
        stop: oneshot::Sender<()>,
        task: tokio::task::JoinHandle<()>,
        dir: tempfile::TempDir,
    }

    impl Running {
        fn start(owner: Option<u32>) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("run/control.sock");
            let mut listener = Listener::bind(&path).unwrap();
            listener.owner = owner.unwrap_or(listener.owner);
            let counts = listener.counts();
            let fake = Arc::new(Fake { history: History::new("h".into(), 100), hangs: AtomicBool::new(false) });
            let (stop, stopped) = oneshot::channel();
            let shutdown = async {
                let _ = stopped.await;
            };
            let task = tokio::spawn(serve(listener, Arc::clone(&fake), shutdown));
            Self { path, fake, counts, stop, task, dir }
        }
        async fn ask(&self, request: Request) -> Result<Response, ClientError> {
            Client::connect(&self.path).await?.ask_one(request).await
        }
        fn count(&self, name: &str) -> u64 {
            self.counts.named().iter().find(|c| c.0 == name).unwrap().1
        }
        /// Waits for a counter: it is raised after the client has its answer.
        async fn counted(&self, name: &str, want: u64) {
            while self.count(name) != want {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    fn push(fake: &Fake, sequence: u64, port: u16) {
        let mut event = flows::event();
        (event.sequence, event.local_port) = (sequence, port);
        fake.history.push(Item::Flow(Box::new(enrich(&event, &flows::names()))));
    }
    fn sequence(response: Option<Response>) -> Option<u64> {
        match response {
            Some(Response::Flow(Item::Flow(record))) => record.sequence,
            _ => None,
        }
    }

    #[tokio::test]
    async fn questions_get_answers() {
        let agent = Running::start(None);
        assert_eq!(agent.ask(Request::Status).await.unwrap(), Response::Status(fixed::status()));
        let question = fixed::explanation().question;
        let answer = agent.ask(Request::Explain(question.clone())).await.unwrap();
        assert_eq!(answer, Response::Explanation(fixed::explanation()));
        let wrong = Question { to: "nobody".parse().unwrap(), ..question };
        let error = agent.ask(Request::Explain(wrong)).await.unwrap_err();
        assert_eq!(error.to_string(), "no workload is called nobody");
        assert!(
            matches!(agent.ask(Request::Reload).await, Err(ClientError::Failed(f)) if f.kind == FailureKind::System)
        );
        let mut workloads = Client::connect(&agent.path).await.unwrap().ask(Request::Workloads).await.unwrap();
        let mut names = Vec::new();
        while let Some(Response::Workload(workload)) = workloads.next().await.unwrap() {
            names.push(workload.name);
        }
        assert_eq!(names.len(), fixed::workloads().len());
        let mut files = Client::connect(&agent.path).await.unwrap().ask(Request::Files(None)).await.unwrap();
        let first = files.next().await.unwrap();
        assert!(matches!(&first, Some(Response::File(f)) if f.name == "a.yaml"), "{first:?}");
        assert_eq!(files.next().await.unwrap(), None);
        agent.counted("control-served", 6).await;
    }

    #[tokio::test]
    async fn flows_are_filtered_and_followed() {
        let agent = Running::start(None);
        for n in 0..5 {
            push(&agent.fake, n, 5432);
        }
        let filter = Filter(vec![Clause::parse("to-port", "5432", false).unwrap()]);
        let query = Query { filter, last: Some(2), follow: true, ..Query::default() };
        let mut answer = Client::connect(&agent.path).await.unwrap().ask(Request::Flows(query.clone())).await.unwrap();
        assert_eq!(sequence(answer.next().await.unwrap()), Some(3));
        assert_eq!(sequence(answer.next().await.unwrap()), Some(4));
        push(&agent.fake, 5, 1);
        push(&agent.fake, 6, 5432);
        assert_eq!(sequence(answer.next().await.unwrap()), Some(6));
        // A reader that leaves is noticed although nothing happens.
        drop(answer);
        agent.counted("control-cut-off", 1).await;
        assert_eq!(agent.fake.history.readers(), 0);
        let once = Query { follow: false, ..query };
        let mut answer = Client::connect(&agent.path).await.unwrap().ask(Request::Flows(once)).await.unwrap();
        assert_eq!(sequence(answer.next().await.unwrap()), Some(4));
        assert_eq!(sequence(answer.next().await.unwrap()), Some(6));
        assert_eq!(answer.next().await.unwrap(), None);
    }

    #[test]
    fn who_may_ask() {
        assert!(may_ask(0, 0) && may_ask(0, 990) && may_ask(990, 990));
        assert!(!may_ask(1000, 0) && !may_ask(1000, 990) && !may_ask(u32::MAX, 0));
    }

    #[tokio::test]
    async fn only_root_and_the_owner_are_served() {
        let me = nix::unistd::geteuid().as_raw();
        let agent = Running::start(Some(me.wrapping_add(1)));
        let answer = agent.ask(Request::Status).await;
        if me == 0 {
            assert!(answer.is_ok());
            let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
            assert_eq!((mode(&agent.path), mode(agent.path.parent().unwrap())), (0o600, 0o700));
        } else {
            assert!(matches!(answer, Err(ClientError::Failed(f)) if f.kind == FailureKind::Refused));
            assert_eq!(agent.count("control-refused"), 1);
        }
    }

    #[tokio::test]
    async fn nonsense_gets_a_reason() {
        let agent = Running::start(None);
        let rows: [(&[u8], &str); 4] = [
            (b"GET / HTTP/1.1\n", "the request is not understood"),
            (b"{\"protocol\":1,\"request\":\"fly\"}\n", "unknown variant `fly`"),
            (b"{\"protocol\":99,\"request\":{\"new\":1}}\n", "speaks protocol 99"),
            (&[b'x'; REQUEST_BYTES as usize + 1], "one line of at most 65536 bytes"),
        ];
        for (n, (request, want)) in rows.into_iter().enumerate() {
            let mut stream = UnixStream::connect(&agent.path).await.unwrap();
            stream.write_all(request).await.unwrap();
            let mut answer = String::new();
            let _ = BufReader::new(stream).read_line(&mut answer).await;
            assert!(answer.contains(want), "{answer}");
            agent.counted("control-malformed", n as u64 + 1).await;
        }
    }

    #[tokio::test]
    async fn the_door_does_not_let_everybody_in_at_once() {
        let agent = Running::start(None);
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(UnixStream::connect(&agent.path).await.unwrap());
        }
        let error = agent.ask(Request::Status).await.unwrap_err();
        assert_eq!(error.to_string(), "the agent already serves 32 callers");
        assert_eq!(agent.count("control-busy"), 1);
        drop(silent);
        agent.counted("control-malformed", CONNECTIONS as u64).await;
        assert!(agent.ask(Request::Status).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let agent = Running::start(None);
        agent.fake.hangs.store(true, Ordering::Relaxed);
        let error = agent.ask(Request::Status).await.unwrap_err();
        assert_eq!(error.to_string(), "the agent had no answer within 30s");
        let mut silent = UnixStream::connect(&agent.path).await.unwrap();
        let mut answer = String::new();
        let _ = silent.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("no request within 5s"), "{answer}");
    }

    #[tokio::test]
    async fn shutdown_ends_everything_and_removes_the_socket() {
        let agent = Running::start(None);
        let follow = Query { follow: true, ..Query::default() };
        let mut answer = Client::connect(&agent.path).await.unwrap().ask(Request::Flows(follow)).await.unwrap();
        agent.stop.send(()).unwrap();
        agent.task.await.unwrap();
        assert!(matches!(answer.next().await, Err(ClientError::Incomplete)));
        assert!(!agent.path.exists());
        let error = Client::connect(&agent.path).await.unwrap_err().to_string();
        assert!(
            error.starts_with("no agent is running: ") && error.contains("does not exist; start it with"),
            "{error}"
        );
        drop(agent.dir);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        // As an agent leaves it that was killed.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(matches!(Client::connect(&path).await, Err(ClientError::Dead(_))));
        let listener = Listener::bind(&path).unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert_eq!(error.to_string(), format!("another agent is running: it holds {}", path.display()));
        drop(listener);
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(Listener::bind(&path), Err(BindError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn a_folder_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, Permissions::from_mode(0o1777)).unwrap();
        let error = Listener::bind(&open.join("control.sock")).unwrap_err().to_string();
        assert!(error.contains("can be written by other users"), "{error}");
    }
}
