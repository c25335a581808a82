//! Container runtimes: which containers this host has, and what their runtimes say of them.
//!
//! * [`path`]: which container or pod a cgroup path names.
//! * `cri`, `containerd`, `docker`, `storage`: how runtimes are asked.
//! * [`limits`]: how much they may say.
//!
//! Facts come from the runtime only, never from the container, and a runtime speaks about its own containers only:
//! Docker's answer cannot name one of containerd's, and a user's rootless runtime none outside of the user's slice.
//! [`Listing::find`] puts both sides together.

use crate::config::RuntimeConfig;
use crate::policy::container::{ContainerFacts, Kind, PodFacts};
use limits::{Answer, DEADLINE};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::task::JoinSet;
use tonic::transport::Channel;

mod containerd;
mod cri;
mod docker;
mod grpc;
pub mod limits;
pub mod path;
mod storage;

/// The runtimes of this host. Channels and what was read of files are kept between calls.
#[derive(Debug)]
pub struct Runtimes {
    config: RuntimeConfig,
    /// One per entry of the settings; fewer after a call that was not finished.
    sources: Vec<Source>,
}

/// One socket or folder.
#[derive(Debug)]
struct Source {
    place: PathBuf,
    way: Way,
}

/// How it is asked.
#[derive(Debug)]
enum Way {
    /// The channel, once it was needed.
    Cri(Option<Channel>),
    Docker,
    Storage(storage::Storage),
}

/// What all runtimes said.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Every container, running or not, in a fixed order. What several sources say of one is joined: the first of
    /// CRI sockets, Docker sockets and folders wins, and the later ones add what it did not know.
    pub containers: Vec<ContainerFacts>,
    /// Sockets and folders that answered.
    pub reachable: Vec<PathBuf>,
    /// Those that are there but did not answer as they should, and why. Their containers are not in the list, which
    /// does not mean that they are gone: what they said before stays true.
    pub failed: Vec<(PathBuf, String)>,
    /// Containers, labels and texts that were above a limit, or unusable.
    pub left_out: u64,
    index: Index,
}

/// Positions in the list.
#[derive(Clone, Debug, Default)]
struct Index {
    by_cgroup: HashMap<(u32, String), usize>,
    by_id: HashMap<(u32, String), Vec<usize>>,
    /// Of root's runtimes: Kubernetes has no others.
    by_pod: HashMap<String, usize>,
}

impl Runtimes {
    /// Asks nobody yet.
    pub fn new(config: &RuntimeConfig) -> Self {
        Self { config: config.clone(), sources: sources(config) }
    }

    /// Asks all runtimes at the same time, each for at most [`DEADLINE`]. Sockets and folders that are not there are
    /// passed over: the runtime is not installed. Safe to drop
    /// half-way: then the next call opens its channels again.
    pub async fn list(&mut self) -> Listing {
        let mut asked = std::mem::take(&mut self.sources);
        if asked.len() != self.config.cri.len() + self.config.docker.len() + self.config.storage.len() {
            asked = sources(&self.config);
        }
        let mut tasks = JoinSet::new();
        let mut seen = Vec::new();
        let mut places = Vec::new();
        let mut listing = Listing::default();
        let mut idle = Vec::new();
        for (n, source) in asked.into_iter().enumerate() {
            places.push(source.place.clone());
            match fs::metadata(&source.place) {
                // Podman's socket may be Docker's too, by a symbolic link.
                Ok(meta) if seen.contains(&(meta.dev(), meta.ino())) => idle.push((n, source)),
                Ok(meta) => {
                    seen.push((meta.dev(), meta.ino()));
                    tasks.spawn(async move {
                        let (source, end) = source.ask(meta.uid()).await;
                        (n, source, end)
                    });
                }
                Err(error) => {
                    if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
                        listing.failed.push((source.place.clone(), error.to_string()));
                    }
                    idle.push((n, source));
                }
            }
        }
        let mut answers = Vec::new();
        while let Some(end) = tasks.join_next().await {
            // A task that panicked is a fault of ours; all sources are made anew next time.
            match end {
                Ok((n, source, end)) => {
                    answers.push((n, end));
                    idle.push((n, source));
                }
                Err(error) => tracing::error!(%error, "asking a container runtime"),
            }
        }
        idle.sort_by_key(|(n, _)| *n);
        self.sources = idle.into_iter().map(|(_, source)| source).collect();
        // In the order of the settings, whoever was faster.
        answers.sort_by_key(|(n, _)| *n);
        let mut all = Vec::new();
        for (n, end) in answers {
            let place = places.get(n).cloned().unwrap_or_default();
            match end {
                Ok(answer) => {
                    listing.reachable.push(place);
                    listing.left_out += answer.left_out;
                    all.extend(answer.containers);
                }
                Err(why) => listing.failed.push((place, why)),
            }
        }
        listing.take(all);
        listing
    }
}

fn sources(config: &RuntimeConfig) -> Vec<Source> {
    let cri = config.cri.iter().map(|place| (place, Way::Cri(None)));
    let docker = config.docker.iter().map(|place| (place, Way::Docker));
    let storage = config.storage.iter().map(|place| (place, Way::Storage(storage::Storage::new(place.clone()))));
    let all = cri.chain(docker).chain(storage);
    all.map(|(place, way)| Source { place: place.clone(), way }).collect()
}

impl Source {
    async fn ask(self, owner: u32) -> (Self, Result<Answer, String>) {
        let late = || format!("no answer within {} s", DEADLINE.as_secs());
        let Self { place, way } = self;
        match way {
            Way::Cri(channel) => {
                let channel = match channel.map_or_else(|| grpc::channel(&place), Ok) {
                    Ok(channel) => channel,
                    Err(why) => return (Self { place, way: Way::Cri(None) }, Err(why)),
                };
                let end = tokio::time::timeout(DEADLINE, ask_cri(&channel, owner)).await;
                let end = end.unwrap_or_else(|_| Err(late()));
                // Whatever state it is in after a failure, the next call begins with a fresh one.
                let channel = end.is_ok().then_some(channel);
                (Self { place, way: Way::Cri(channel) }, end)
            }
            Way::Docker => {
                let mut answer = Answer::default();
                let end = tokio::time::timeout(DEADLINE, docker::list(&place, owner, &mut answer)).await;
                let end = end.unwrap_or_else(|_| Err(late())).map(|_| answer);
                (Self { place, way }, end)
            }
            Way::Storage(mut storage) => {
                // Files cannot be left half-way; they are bounded in number and bytes.
                let work = tokio::task::spawn_blocking(move || {
                    let mut answer = Answer::default();
                    let end = storage.list(owner, &mut answer).map(|()| answer);
                    (storage, end)
                });
                match tokio::time::timeout(DEADLINE, work).await {
                    Ok(Ok((storage, end))) => (Self { place, way: Way::Storage(storage) }, end),
                    Ok(Err(error)) => (Self::anew(place), Err(error.to_string())),
                    Err(_) => (Self::anew(place), Err(late())),
                }
            }
        }
    }

    fn anew(root: PathBuf) -> Self {
        Self { way: Way::Storage(storage::Storage::new(root.clone())), place: root }
    }
}

async fn ask_cri(channel: &Channel, owner: u32) -> Result<Answer, String> {
    let mut answer = Answer::default();
    match cri::kind(channel).await {
        Ok(kind) => {
            let kind = kind?;
            cri::list(channel, kind, owner, &mut answer).await?;
            if kind == Kind::Containerd {
                containerd::list(channel, owner, &mut answer).await?;
            }
        }
        // As Docker packages containerd: `disabled_plugins = ["cri"]`.
        Err(status) if grpc::is_unimplemented(&status) => containerd::list(channel, owner, &mut answer).await?,
        Err(status) => return Err(grpc::why(&status)),
    }
    Ok(answer)
}

impl Listing {
    /// Of containers that were listed elsewhere, for example in a test.
    pub fn of(containers: Vec<ContainerFacts>) -> Self {
        let mut listing = Self::default();
        listing.take(containers);
        listing
    }

    /// Joins what is said of the same container, and makes the index.
    fn take(&mut self, all: Vec<ContainerFacts>) {
        for mut facts in all {
            // A user's runtime has no say about cgroups outside of his slice.
            let beyond = |path: &String| facts.owner != 0 && path::user(Path::new(path)) != Some(facts.owner);
            if facts.cgroup.as_ref().is_some_and(beyond) {
                facts.cgroup = None;
                self.left_out += 1;
            }
            // Other ids are names, which several namespaces of containerd may use.
            let unique = path::is_id(&facts.id);
            let key = (facts.owner, facts.id.clone());
            let same = self.index.by_id.get(&key).into_iter().flatten().copied().find(|n| {
                let other = self.containers.get(*n);
                other.is_some_and(|o| o.runtime == facts.runtime && (unique || o.cgroup == facts.cgroup))
            });
            let n = same.unwrap_or(self.containers.len());
            match self.containers.get_mut(n) {
                Some(known) => add(known, facts),
                None => {
                    self.index.by_id.entry(key).or_default().push(n);
                    self.containers.push(facts);
                }
            }
            let Some(facts) = self.containers.get(n) else { continue };
            if let Some(cgroup) = &facts.cgroup {
                self.index.by_cgroup.entry((facts.owner, cgroup.clone())).or_insert(n);
            }
            if let Some(pod) = facts.pod.as_ref().filter(|pod| facts.owner == 0 && !pod.uid.is_empty()) {
                self.index.by_pod.entry(pod.uid.clone()).or_insert(n);
            }
        }
    }

    /// The container whose own cgroup this is. Cgroups below it belong to it, but are not found: the nearest
    /// registered ancestor is the caller's business.
    ///
    /// Where the path is in a tree whose owner may make cgroups of any name (another container, a service with
    /// `Delegate=yes`, a folder that no known driver makes), the name proves nothing: there a container is found only if its runtime named that very path.
    pub fn find(&self, path: &Path) -> Option<&ContainerFacts> {
        let user = path::user(path);
        let owner = user.unwrap_or(0);
        let named = path.to_str().and_then(|p| self.index.by_cgroup.get(&(owner, p.to_owned())));
        if let Some(n) = named {
            return self.containers.get(*n);
        }
        let found = path::container(path)?;
        // All of a user's slice is his, and so is what his runtimes say.
        if found.delegated && user.is_none() {
            return None;
        }
        let fits = |facts: &&ContainerFacts| match found.runtime {
            Some(runtime) => facts.runtime == runtime,
            None => matches!(facts.runtime, Kind::Containerd | Kind::Docker),
        };
        let same = self.index.by_id.get(&(owner, found.id.clone())).into_iter().flatten();
        same.filter_map(|n| self.containers.get(*n)).find(fits)
    }

    /// The pod with this uid ([`path::pod`] gives it), for the pod's own cgroup.
    pub fn pod(&self, uid: &str) -> Option<&PodFacts> {
        let n = self.index.by_pod.get(uid)?;
        self.containers.get(*n)?.pod.as_ref()
    }
}

/// What another source knows more of the same container.
fn add(known: &mut ContainerFacts, more: ContainerFacts) {
    let or = |a: &mut String, b: String| {
        if a.is_empty() {
            *a = b;
        }
    };
    or(&mut known.name, more.name);
    or(&mut known.image, more.image);
    if known.aliases.is_empty() {
        known.aliases = more.aliases;
    }
    if known.labels.is_empty() {
        known.labels = more.labels;
    }
    known.pod = known.pod.take().or(more.pod);
    known.cgroup = known.cgroup.take().or(more.cgroup);
}

#[cfg(test)]
mod tests;
