//! containerd's own API: containers that CRI does not list (`ctr`, `nerdctl`, and everything where the CRI plugin is
//! off). Docker's containers are in it too, in the namespace `moby`, but without name and image: Docker's API tells.
//!
//! The messages are the parts of `api/services/{namespaces,containers}/v1` that are needed, with their numbers.

use super::limits::{ANSWER_BYTES, Answer};
use super::{grpc, path};
use crate::policy::container::{ContainerFacts, Kind, qualified};
use prost::Message;
use serde::Deserialize;
use std::collections::HashMap;
use tonic::transport::Channel;

/// containerd's namespaces that are asked; the rest is counted. People have a handful.
const NAMESPACES: usize = 64;

/// Where Docker Engine keeps its containers.
const DOCKERS: [&str; 2] = ["moby", "plugins.moby"];

/// Leaves out what CRI has said already.
const NOT_CRI: &str = "labels.\"io.cri-containerd.kind\"!=container,labels.\"io.cri-containerd.kind\"!=sandbox";

/// Where nerdctl keeps the name; the id is a number.
const NERDCTL_NAME: &str = "nerdctl/name";

#[derive(Clone, PartialEq, Message)]
struct ListNamespacesRequest {}
#[derive(Clone, PartialEq, Message)]
struct ListNamespacesResponse {
    #[prost(message, repeated, tag = "1")]
    namespaces: Vec<Namespace>,
}
#[derive(Clone, PartialEq, Message)]
struct Namespace {
    #[prost(string, tag = "1")]
    name: String,
}
#[derive(Clone, PartialEq, Message)]
struct ListContainersRequest {
    /// Any of them.
    #[prost(string, repeated, tag = "1")]
    filters: Vec<String>,
}
/// One message of the stream.
#[derive(Clone, PartialEq, Message)]
struct ListContainerMessage {
    #[prost(message, optional, tag = "1")]
    container: Option<Container>,
}
#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(map = "string, string", tag = "2")]
    labels: HashMap<String, String>,
    #[prost(string, tag = "3")]
    image: String,
    #[prost(message, optional, tag = "5")]
    spec: Option<Any>,
}
/// `google.protobuf.Any`; of an OCI specification the value is JSON.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// The one field that is needed of an OCI specification.
#[derive(Deserialize)]
pub(super) struct Spec {
    #[serde(default)]
    linux: Option<Linux>,
}
#[derive(Deserialize)]
struct Linux {
    #[serde(default, rename = "cgroupsPath")]
    cgroups_path: Option<String>,
}

impl Spec {
    /// The cgroup of a container by the JSON of its specification.
    pub(super) fn cgroup(json: &[u8]) -> Option<String> {
        let spec: Self = serde_json::from_slice(json).ok()?;
        path::of_spec(&spec.linux?.cgroups_path?)
    }
}

/// Containers of every namespace.
pub(super) async fn list(channel: &Channel, owner: u32, answer: &mut Answer) -> Result<(), String> {
    let ListNamespacesResponse { namespaces } =
        grpc::unary(channel, "/containerd.services.namespaces.v1.Namespaces/List", None, ListNamespacesRequest {})
            .await
            .map_err(|s| grpc::why(&s))?;
    answer.left_out += u64::try_from(namespaces.len().saturating_sub(NAMESPACES)).unwrap_or(u64::MAX);
    let mut bytes = 0usize;
    for Namespace { name } in namespaces.into_iter().take(NAMESPACES) {
        if DOCKERS.contains(&name.as_str()) {
            continue;
        }
        let ask = ListContainersRequest { filters: vec![NOT_CRI.to_owned()] };
        let mut stream = grpc::stream::<_, ListContainerMessage>(
            channel,
            "/containerd.services.containers.v1.Containers/ListStream",
            Some(&name),
            ask,
        )
        .await
        .map_err(|s| format!("namespace {name:?}: {}", grpc::why(&s)))?;
        loop {
            let next = stream.message().await.map_err(|s| format!("namespace {name:?}: {}", grpc::why(&s)))?;
            let Some(message) = next else { break };
            bytes = bytes.saturating_add(message.encoded_len());
            if bytes > ANSWER_BYTES {
                return Err(format!("its containers are more than {ANSWER_BYTES} bytes"));
            }
            if let Some(container) = message.container
                && answer.room()
            {
                add(container, owner, answer);
            }
        }
    }
    Ok(())
}

fn add(container: Container, owner: u32, answer: &mut Answer) {
    let id = answer.text(container.id);
    if id.is_empty() {
        return;
    }
    let labels = answer.labels(container.labels);
    // `ctr` has no names beside ids.
    let name = labels.get(NERDCTL_NAME).cloned().unwrap_or_else(|| id.clone());
    let image = answer.text(qualified(&container.image));
    let cgroup = container.spec.and_then(|spec| Spec::cgroup(&spec.value));
    let cgroup = cgroup.map(|path| answer.text(path)).filter(|path| !path.is_empty());
    let facts = ContainerFacts::new(Kind::Containerd, id, owner);
    answer.containers.push(ContainerFacts { name, image, labels, cgroup, ..facts });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_of_ctr_and_nerdctl() {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let spec = |json: &str| Some(Any { value: json.into() });
        let mut answer = Answer::default();
        let ctr = Container {
            id: "ctr-one".into(),
            labels: labels(&[("app", "shop")]),
            image: "docker.io/library/nginx:1".into(),
            spec: spec(r#"{"ociVersion":"1.0.2","linux":{"cgroupsPath":"/default/ctr-one"}}"#),
        };
        let nerdctl = Container {
            id: "a".repeat(64),
            labels: labels(&[("nerdctl/name", "web")]),
            image: String::new(),
            spec: spec(r#"{"linux":{"cgroupsPath":"system.slice:nerdctl:x"}}"#),
        };
        let broken = Container { id: "b".into(), spec: spec("{"), ..Container::default() };
        for container in [ctr, nerdctl, broken, Container::default()] {
            add(container, 0, &mut answer);
        }
        let seen: Vec<_> =
            answer.containers.iter().map(|c| (c.name.as_str(), c.image.as_str(), c.cgroup.as_deref())).collect();
        assert_eq!(
            seen,
            [
                ("ctr-one", "docker.io/library/nginx:1", Some("/default/ctr-one")),
                ("web", "", Some("/system.slice/nerdctl-x.scope")),
                ("b", "", None),
            ]
        );
    }
}
