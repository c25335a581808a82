//! Kubernetes' Container Runtime Interface, v1: containerd, CRI-O, cri-dockerd.
//!
//! The messages are the parts of k8s.io/cri-api `runtime/v1/api.proto` that are needed, with its numbers. Lists are
//! taken as bytes and read one by one, so that an answer of millions of empty entries costs no memory.

use super::grpc;
use super::limits::{ALIASES, Answer, CONTAINERS};
use crate::policy::container::{ContainerFacts, Kind, PodFacts, qualified};
use prost::Message;
use std::collections::{BTreeMap, HashMap};
use tonic::Status;
use tonic::transport::Channel;

#[derive(Clone, PartialEq, Message)]
pub(super) struct VersionRequest {
    #[prost(string, tag = "1")]
    version: String,
}
#[derive(Clone, PartialEq, Message)]
pub(super) struct VersionResponse {
    #[prost(string, tag = "2")]
    pub(super) runtime_name: String,
}
#[derive(Clone, PartialEq, Message)]
struct Empty {}
/// `ListContainersResponse`, `ListPodSandboxResponse` and `ListImagesResponse`: each has one list, number 1.
#[derive(Clone, PartialEq, Message)]
pub(super) struct List {
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub(super) items: Vec<Vec<u8>>,
}
#[derive(Clone, PartialEq, Message)]
pub(super) struct Container {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) pod_sandbox_id: String,
    #[prost(message, optional, tag = "3")]
    pub(super) metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "4")]
    pub(super) image: Option<ImageSpec>,
    #[prost(map = "string, string", tag = "8")]
    pub(super) labels: HashMap<String, String>,
    #[prost(string, tag = "10")]
    pub(super) image_id: String,
}
#[derive(Clone, PartialEq, Message)]
pub(super) struct ContainerMetadata {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}
#[derive(Clone, PartialEq, Message)]
pub(super) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub(super) image: String,
    #[prost(string, tag = "18")]
    pub(super) user_specified_image: String,
}
#[derive(Clone, PartialEq, Message)]
pub(super) struct PodSandbox {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(message, optional, tag = "2")]
    pub(super) metadata: Option<PodSandboxMetadata>,
    /// 0 = ready; else the pod was started again, and this is what is left of its former life.
    #[prost(int32, tag = "3")]
    pub(super) state: i32,
    #[prost(map = "string, string", tag = "5")]
    pub(super) labels: HashMap<String, String>,
}
#[derive(Clone, PartialEq, Message)]
pub(super) struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) uid: String,
    #[prost(string, tag = "3")]
    pub(super) namespace: String,
}
#[derive(Clone, PartialEq, Message)]
pub(super) struct Image {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, repeated, tag = "2")]
    pub(super) repo_tags: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    pub(super) repo_digests: Vec<String>,
}

/// Who answers. An error of kind `Unimplemented` means that the socket does not speak CRI.
pub(super) async fn kind(channel: &Channel) -> Result<Result<Kind, String>, Status> {
    let ask = VersionRequest { version: String::new() };
    let VersionResponse { runtime_name } =
        grpc::unary(channel, "/runtime.v1.RuntimeService/Version", None, ask).await?;
    Ok(match runtime_name.as_str() {
        "containerd" => Ok(Kind::Containerd),
        "cri-o" => Ok(Kind::CriO),
        "docker" => Ok(Kind::Docker),
        other => Err(format!(
            "it says that it is {:?}, a runtime whose cgroups segfw cannot tell (known: containerd, cri-o, docker)",
            other.chars().take(64).collect::<String>()
        )),
    })
}

async fn items(channel: &Channel, path: &'static str) -> Result<Vec<Vec<u8>>, String> {
    let list: List = grpc::unary(channel, path, None, Empty {}).await.map_err(|s| grpc::why(&s))?;
    Ok(list.items)
}

/// Reads entries, at most [`CONTAINERS`] of them; the others and broken ones are counted.
fn read<T: Message + Default>(items: &[Vec<u8>], answer: &mut Answer) -> Vec<T> {
    answer.left_out += u64::try_from(items.len().saturating_sub(CONTAINERS)).unwrap_or(u64::MAX);
    let mut read = Vec::new();
    for item in items.iter().take(CONTAINERS) {
        match T::decode(item.as_slice()) {
            Ok(value) => read.push(value),
            Err(_) => answer.left_out += 1,
        }
    }
    read
}

/// Containers and pods, running or not.
pub(super) async fn list(channel: &Channel, kind: Kind, owner: u32, answer: &mut Answer) -> Result<(), String> {
    // Pods first: a container that comes meanwhile is without its pod until the next time, not the other way round.
    let pods = items(channel, "/runtime.v1.RuntimeService/ListPodSandbox").await?;
    let containers = items(channel, "/runtime.v1.RuntimeService/ListContainers").await?;
    let containers: Vec<Container> = read(&containers, answer);
    // Kubelet starts containers by the id of their image, and only newer ones say what the name was.
    let images = if containers.iter().any(|c| image_of(c).starts_with("sha256:")) {
        items(channel, "/runtime.v1.ImageService/ListImages").await?
    } else {
        Vec::new()
    };
    let pods = read(&pods, answer);
    let images = read(&images, answer);
    join(kind, owner, pods, containers, images, answer);
    Ok(())
}

/// The best name in the container's own entry: what the user wrote, what the runtime was told.
fn image_of(container: &Container) -> String {
    let spec = container.image.as_ref();
    let user = spec.map(|s| s.user_specified_image.as_str()).filter(|n| !n.is_empty());
    let given = spec.map(|s| s.image.as_str()).filter(|n| !n.is_empty());
    qualified(user.or(given).unwrap_or(&container.image_id))
}

fn join(
    kind: Kind,
    owner: u32,
    mut sandboxes: Vec<PodSandbox>,
    containers: Vec<Container>,
    images: Vec<Image>,
    answer: &mut Answer,
) {
    let names: HashMap<String, Vec<String>> = images
        .into_iter()
        .map(|image| {
            let mut names: Vec<String> = image.repo_tags.iter().map(|n| qualified(n)).collect();
            if names.is_empty() {
                names = image.repo_digests.iter().map(|n| qualified(n)).collect();
            }
            names.sort();
            names.dedup();
            (qualified(&image.id), names)
        })
        .collect();
    // Those that live first: the first with a pod's uid is what is known of the pod.
    sandboxes.sort_by(|a, b| (a.state != 0, &a.id).cmp(&(b.state != 0, &b.id)));
    let mut pods = BTreeMap::new();
    for sandbox in sandboxes {
        let Some(metadata) = sandbox.metadata else {
            answer.left_out += 1;
            continue;
        };
        let pod = PodFacts {
            namespace: answer.text(metadata.namespace),
            name: answer.text(metadata.name),
            uid: answer.text(metadata.uid),
            labels: answer.labels(sandbox.labels),
        };
        // The container that holds a pod's namespaces is in no list of containers, but has a cgroup of its own.
        let id = answer.text(sandbox.id.clone());
        if !id.is_empty() && answer.room() {
            let holder = ContainerFacts { pod: Some(pod.clone()), ..ContainerFacts::new(kind, id, owner) };
            answer.containers.push(holder);
        }
        pods.insert(sandbox.id, pod);
    }
    for container in containers {
        if !answer.room() {
            continue;
        }
        let image = image_of(&container);
        let mut facts = ContainerFacts::new(kind, answer.text(container.id), owner);
        if facts.id.is_empty() {
            continue;
        }
        let mut known = names.get(&image).cloned().unwrap_or_default().into_iter();
        facts.image = answer.text(known.next().unwrap_or(image));
        for alias in known.by_ref().take(ALIASES) {
            facts.aliases.push(answer.text(alias));
        }
        answer.left_out += u64::try_from(known.count()).unwrap_or(u64::MAX);
        facts.name = answer.text(container.metadata.map(|m| m.name).unwrap_or_default());
        facts.labels = answer.labels(container.labels);
        facts.pod = pods.get(&container.pod_sandbox_id).cloned();
        answer.containers.push(facts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }
    fn spec(image: &str, user: &str) -> Option<ImageSpec> {
        Some(ImageSpec { image: image.into(), user_specified_image: user.into() })
    }

    #[test]
    fn pods_and_images_are_joined() {
        let id = format!("sha256:{}", "8".repeat(64));
        let sandbox = |id: &str, name: &str, state| PodSandbox {
            id: id.into(),
            metadata: Some(PodSandboxMetadata { name: name.into(), uid: "u1".into(), namespace: "pay".into() }),
            state,
            labels: map(&[("app", "db")]),
        };
        let sandboxes = vec![sandbox("s0", "db-old", 1), PodSandbox::default(), sandbox("s1", "db-0", 0)];
        let container = |n: &str, image| Container {
            id: n.into(),
            pod_sandbox_id: "s1".into(),
            metadata: Some(ContainerMetadata { name: n.into() }),
            image,
            labels: map(&[("l", n)]),
            image_id: String::new(),
        };
        let containers = vec![
            container("a", spec(&id, "")),
            container("b", spec(&id, "reg.example/pg:16")),
            container("c", spec("redis", "")),
            Container { pod_sandbox_id: "gone".into(), ..container("d", None) },
            Container::default(),
        ];
        let image = Image {
            id: id.clone(),
            repo_tags: vec!["docker.io/library/postgres:16".into(), "corp.example/pg:1".into()],
            repo_digests: vec![],
        };
        let mut answer = Answer::default();
        join(Kind::Containerd, 0, sandboxes, containers, vec![image], &mut answer);
        let seen: Vec<_> = answer
            .containers
            .iter()
            .map(|c| (c.id.as_str(), c.image.as_str(), c.aliases.len(), c.pod.as_ref().map(|p| p.name.as_str())))
            .collect();
        assert_eq!(
            seen,
            [
                ("s1", "", 0, Some("db-0")),
                ("s0", "", 0, Some("db-old")),
                ("a", "corp.example/pg:1", 1, Some("db-0")),
                ("b", "reg.example/pg:16", 0, Some("db-0")),
                ("c", "docker.io/library/redis:latest", 0, Some("db-0")),
                ("d", "", 0, None),
            ]
        );
        assert_eq!(answer.containers[2].aliases, ["docker.io/library/postgres:16"]);
        assert_eq!(answer.left_out, 1, "the pod without metadata");
    }

    #[test]
    fn hostile_lists_are_cut_and_counted() {
        let mut items = vec![vec![0xff; 9]; 3];
        items.extend(vec![Vec::new(); CONTAINERS]);
        let mut answer = Answer::default();
        let containers: Vec<Container> = read(&items, &mut answer);
        assert_eq!((containers.len(), answer.left_out), (CONTAINERS - 3, 6));
        join(Kind::CriO, 0, Vec::new(), containers, Vec::new(), &mut answer);
        assert!(answer.containers.is_empty(), "without an id there is nothing to find them by");
    }
}
