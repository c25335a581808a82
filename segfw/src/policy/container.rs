//! What a container runtime says of a container: plain data, and the names of images.
//!
//! All of it is the runtime's word, never the container's. It is not more than that: labels of Docker and Podman
//! include those that the author of the image wrote into it, and whoever may start containers chooses name and labels.

use std::collections::BTreeMap;

/// A kind of container runtime, as it appears in the names of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// containerd, by CRI or by its own API (`ctr`, `nerdctl`).
    Containerd,
    /// CRI-O.
    CriO,
    /// Docker Engine.
    Docker,
    /// Podman.
    Podman,
}

impl Kind {
    /// Every kind and its word in `container: {runtime: ...}`.
    pub const WORDS: [(&'static str, Self); 4] =
        [("containerd", Self::Containerd), ("cri-o", Self::CriO), ("docker", Self::Docker), ("podman", Self::Podman)];

    /// The word users see.
    pub fn word(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::CriO => "cri-o",
            Self::Docker => "docker",
            Self::Podman => "podman",
        }
    }
}

/// What a runtime says of one container. Empty text is "not known", and matches nothing, not even `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerFacts {
    /// As the runtime numbers it: 64 hexadecimal digits, or any name in containerd's own API.
    pub id: String,
    /// Whose container it is.
    pub runtime: Kind,
    /// Its name: of a container in a pod the one in the pod's specification; empty for the container that only holds
    /// a pod's namespaces ("pause").
    pub name: String,
    /// Fully qualified ([`qualified`]): `docker.io/library/nginx:1.25`, or `sha256:<id>` where the name is not known.
    pub image: String,
    /// Other names of the same image, qualified: where a runtime knows a container's image by its id only, and the
    /// image has several names.
    pub aliases: Vec<String>,
    /// Labels. None are known of containers that are only read from containers/storage.
    pub labels: BTreeMap<String, String>,
    /// The Kubernetes pod it is part of.
    pub pod: Option<PodFacts>,
    /// Path of its cgroup from the root, where the runtime tells it.
    pub cgroup: Option<String>,
    /// User id that owns the socket or folder that said this: 0, or the user of a rootless runtime, who can speak of
    /// cgroups in his own slice only.
    pub owner: u32,
}

/// What a runtime says of a Kubernetes pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// With dashes: `2fc932ce-fdcc-454b-97bd-aadfdeb4c340`, or 32 digits of a static pod.
    pub uid: String,
    /// The pod's labels; none are known from containers/storage.
    pub labels: BTreeMap<String, String>,
}

impl ContainerFacts {
    /// Nothing known but who it is.
    pub fn new(runtime: Kind, id: String, owner: u32) -> Self {
        Self {
            id,
            runtime,
            name: String::new(),
            image: String::new(),
            aliases: Vec::new(),
            labels: BTreeMap::new(),
            pod: None,
            cgroup: None,
            owner,
        }
    }

    /// Every name that an `image:` glob may match: the qualified ones, and for Docker Hub the short ones too. No short
    /// name is the qualified name of another image, since those begin with a host.
    pub fn image_names(&self) -> impl Iterator<Item = &str> {
        let all = std::iter::once(&self.image).chain(&self.aliases).filter(|n| !n.is_empty());
        all.flat_map(|name| std::iter::once(name.as_str()).chain(short(name)))
    }
}

/// The name of an image in full, as Docker and containerd normalise it: `nginx` is `docker.io/library/nginx:latest`,
/// `a/b@sha256:...` is `docker.io/a/b@sha256:...`. Ids of images become `sha256:<id>`; empty stays empty.
pub fn qualified(name: &str) -> String {
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    if name.is_empty() || hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return if name.is_empty() { String::new() } else { format!("sha256:{hex}") };
    }
    let (path, digest) = name.split_once('@').map_or((name, None), |(path, digest)| (path, Some(digest)));
    let host = path.split_once('/').filter(|(host, _)| host.contains(['.', ':']) || *host == "localhost");
    let (host, rest) = host.unwrap_or(("docker.io", path));
    let host = if host == "index.docker.io" { "docker.io" } else { host };
    let library = if host == "docker.io" && !rest.contains('/') { "library/" } else { "" };
    let tagged = rest.rsplit('/').next().is_some_and(|last| last.contains(':'));
    let tag = if tagged || digest.is_some() { "" } else { ":latest" };
    let digest = digest.map(|d| format!("@{d}")).unwrap_or_default();
    format!("{host}/{library}{rest}{tag}{digest}")
}

/// What people write for an image of Docker Hub: `nginx:1.25`, `bitnami/redis:7`.
fn short(qualified: &str) -> Option<&str> {
    let rest = qualified.strip_prefix("docker.io/")?;
    Some(rest.strip_prefix("library/").unwrap_or(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_have_one_full_name() {
        let id = "89eeb1753be1f6a64e37a883c0a2951b5603b00751992a1c3a5583c64171315d";
        for (given, full, also) in [
            ("nginx", "docker.io/library/nginx:latest", Some("nginx:latest")),
            ("nginx:1.25", "docker.io/library/nginx:1.25", Some("nginx:1.25")),
            ("bitnami/redis:7", "docker.io/bitnami/redis:7", Some("bitnami/redis:7")),
            ("docker.io/nginx:1", "docker.io/library/nginx:1", Some("nginx:1")),
            ("index.docker.io/library/nginx:1", "docker.io/library/nginx:1", Some("nginx:1")),
            ("quay.io/a/b", "quay.io/a/b:latest", None),
            ("localhost/x:1", "localhost/x:1", None),
            ("localhost:5000/x", "localhost:5000/x:latest", None),
            ("r:5000/a/x:2", "r:5000/a/x:2", None),
            ("nginx@sha256:ab", "docker.io/library/nginx@sha256:ab", Some("nginx@sha256:ab")),
            ("nginx:1@sha256:ab", "docker.io/library/nginx:1@sha256:ab", Some("nginx:1@sha256:ab")),
            (id, &format!("sha256:{id}"), None),
            (&format!("sha256:{id}"), &format!("sha256:{id}"), None),
        ] {
            assert_eq!(qualified(given), full);
            assert_eq!(qualified(full), full, "twice is once");
            assert_eq!(short(full), also);
        }
        assert_eq!(qualified(""), "");
    }
}
