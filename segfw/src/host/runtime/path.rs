//! Which container or pod a cgroup path names. Pure.
//!
//! Drivers name cgroups in two ways: systemd (`cri-containerd-<id>.scope` in a slice) and cgroupfs (`/docker/<id>`).
//! A name alone is no proof: whoever owns a delegated part of the tree (a user's systemd, a privileged container, a
//! service with `Delegate=yes`) makes cgroups of any name in it. [`ContainerPath::delegated`] and
//! [`ContainerPath::user`] say so, and [`super::Listing::find`] heeds them.

use crate::policy::container::Kind;
use std::path::Path;

/// What a cgroup path says of the container it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPath {
    /// `None` = the path does not say: cgroupfs in a pod, where containerd and cri-dockerd use the bare id.
    pub runtime: Option<Kind>,
    /// 64 hexadecimal digits.
    pub id: String,
    /// Of the nearest pod above, with dashes.
    pub pod_uid: Option<String>,
    /// Part of a tree whose owner may make cgroups of any name.
    pub delegated: bool,
    /// In the slice of this user: a rootless runtime.
    pub user: Option<u32>,
}

/// Hexadecimal digits of an id, in all runtimes but containerd's own API.
const ID_DIGITS: usize = 64;

/// Services in whose own cgroup runtimes put containers where the cgroup driver of kubelet and runtime disagree
/// (`…/containerd.service/kubepods-podUID.slice:cri-containerd:ID`). They run as root.
const RUNTIME_SERVICES: [&str; 9] = [
    "containerd.service",
    "cri-docker.service",
    "crio.service",
    "docker.service",
    "k3s-agent.service",
    "k3s.service",
    "kubelet.service",
    "rke2-agent.service",
    "rke2-server.service",
];

/// Plain folders of the known drivers. Any other may be a container's by another name (LXC: `/lxc.payload.x`).
const FOLDERS: [&str; 6] = ["besteffort", "burstable", "docker", "kubelet", "kubepods", "libpod_parent"];

/// Names before the id: systemd scopes (then with `.scope`), and cgroupfs.
const SCOPES: [(&str, Kind); 5] = [
    ("cri-containerd-", Kind::Containerd),
    ("nerdctl-", Kind::Containerd),
    ("crio-", Kind::CriO),
    ("docker-", Kind::Docker),
    ("libpod-", Kind::Podman),
];

/// The same in `slice:prefix:id`, which is what a cgroupfs driver makes of systemd's notation.
const COLONS: [(&str, Kind); 5] = [
    ("cri-containerd", Kind::Containerd),
    ("nerdctl", Kind::Containerd),
    ("crio", Kind::CriO),
    ("docker", Kind::Docker),
    ("libpod", Kind::Podman),
];

/// Beginnings of paths under which the known drivers make containers: a new cgroup there that no runtime has told of
/// yet is unresolved, never open. Compared as text, so a name may go on behind them. Not here: containerd's namespaces
/// (`/default/`), which are any name, and `libpod-payload-` in the unit of a Quadlet.
pub fn prefixes() -> &'static [&'static str] {
    &[
        "/docker/",
        "/kubepods.slice/",
        "/kubepods/",
        "/kubelet.slice/",
        "/kubelet/",
        "/libpod_parent/libpod-",
        "/machine.slice/libpod-",
        "/machine.slice/machine-libpod_pod_",
        "/system.slice/cri-containerd-",
        "/system.slice/crio-",
        "/system.slice/docker-",
        "/system.slice/nerdctl-",
        "/system.slice/containerd.service/kubepods",
    ]
}

/// What all runtimes but containerd's own API use for an id.
pub(super) fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A path component that is a container's by its own name. `conmon` has other names: no digits follow the prefix.
fn named(component: &str) -> Option<(Kind, &str)> {
    if let Some((slice, rest)) = component.split_once(':') {
        let (prefix, id) = rest.split_once(':')?;
        let (_, kind) = COLONS.iter().find(|(p, _)| *p == prefix)?;
        return (slice.ends_with(".slice") && is_id(id)).then_some((*kind, id));
    }
    if let Some(id) = component.strip_prefix("libpod-payload-") {
        return is_id(id).then_some((Kind::Podman, id));
    }
    let (kind, rest) = SCOPES.iter().find_map(|(p, kind)| Some((*kind, component.strip_prefix(p)?)))?;
    let id = rest.strip_suffix(".scope").unwrap_or(rest);
    // Of the cgroupfs driver only CRI-O and Podman have a prefix.
    let known = id.len() != rest.len() || matches!(kind, Kind::CriO | Kind::Podman);
    (known && is_id(id)).then_some((kind, id))
}

/// The container that this component of a path is, given the one above it.
fn component<'a>(parent: &str, name: &'a str) -> Option<(Option<Kind>, &'a str)> {
    if let Some((kind, id)) = named(name) {
        return Some((Some(kind), id));
    }
    match parent {
        _ if !is_id(name) => None,
        "docker" => Some((Some(Kind::Docker), name)),
        _ if parent.strip_prefix("pod").is_some_and(is_uid) => Some((None, name)),
        _ => None,
    }
}

fn is_uid(text: &str) -> bool {
    (32..=36).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

/// The pod that this component is, given the one above it.
fn pod_uid(parent: &str, name: &str) -> Option<String> {
    let slice = name.split_once(':').map_or(name, |(slice, _)| slice);
    let uid = if let Some(slice) = slice.strip_suffix(".slice") {
        // The uid has no dashes here, since systemd nests slices by them.
        let (before, uid) = slice.rsplit_once("-pod")?;
        let class = before.strip_suffix("-burstable").or_else(|| before.strip_suffix("-besteffort")).unwrap_or(before);
        if class.rsplit('-').next() != Some("kubepods") {
            return None;
        }
        uid.replace('_', "-")
    } else {
        if !matches!(parent, "kubepods" | "burstable" | "besteffort") {
            return None;
        }
        name.strip_prefix("pod")?.to_owned()
    };
    is_uid(&uid).then_some(uid)
}

/// Components of an absolute path; none of text that is not UTF-8, which no driver writes.
fn components(path: &Path) -> Vec<&str> {
    path.to_str().map(|p| p.split('/').filter(|c| !c.is_empty()).collect()).unwrap_or_default()
}

/// The container whose own cgroup this is. Cgroups below a container's (`init.scope`, `container`) are none: the
/// nearest registered ancestor is the caller's business.
pub fn container(path: &Path) -> Option<ContainerPath> {
    let all = components(path);
    let (name, above) = all.split_last()?;
    let (runtime, id) = component(above.last().copied().unwrap_or(""), name)?;
    // `slice:prefix:id` carries the pod in its own name.
    let pod_uid = pod_uid("", name)
        .or_else(|| (0..above.len()).rev().find_map(|i| pod_uid(if i == 0 { "" } else { above[i - 1] }, above[i])));
    Some(ContainerPath { runtime, id: id.to_owned(), pod_uid, delegated: is_delegated(above), user: user(path) })
}

/// The uid of the Kubernetes pod whose own cgroup this is, with dashes.
pub fn pod(path: &Path) -> Option<String> {
    let all = components(path);
    let (name, above) = all.split_last()?;
    if name.contains(':') || is_delegated(above) {
        return None;
    }
    pod_uid(above.last().copied().unwrap_or(""), name)
}

/// The user in whose slice the path is.
pub(super) fn user(path: &Path) -> Option<u32> {
    let all = components(path);
    let ["user.slice", slice, ..] = all.as_slice() else { return None };
    slice.strip_prefix("user-")?.strip_suffix(".slice")?.parse().ok()
}

/// The owner of one of these cgroups may make any name in it. Only slices, folders of known drivers and the services of
/// runtimes are surely root's.
fn is_delegated(above: &[&str]) -> bool {
    !above.iter().enumerate().all(|(i, name)| {
        let parent = if i == 0 { "" } else { above[i - 1] };
        let roots = name.ends_with(".slice")
            || FOLDERS.contains(name)
            || RUNTIME_SERVICES.contains(name)
            || pod_uid(parent, name).is_some();
        roots && component(parent, name).is_none()
    })
}

/// The cgroup path that `linux.cgroupsPath` of an OCI specification means: an absolute path, or systemd's
/// `slice:prefix:name`. `None` where it depends on the runtime's own cgroup.
pub fn of_spec(text: &str) -> Option<String> {
    if text.starts_with('/') {
        let clean = !text.split('/').any(|c| c == ".." || c == ".");
        return (clean && text.len() > 1).then(|| text.trim_end_matches('/').to_owned());
    }
    let mut parts = text.split(':');
    let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || name.is_empty() || text.contains('/') {
        return None;
    }
    // As runc: without a slice it is the system's.
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let unit = match (prefix, name.ends_with(".slice")) {
        (_, true) => name.to_owned(),
        ("", false) => format!("{name}.scope"),
        (prefix, false) => format!("{prefix}-{name}.scope"),
    };
    Some(format!("{}/{unit}", slice_path(slice)?))
}

/// `a-b.slice` is in `a.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(String::new());
    }
    let mut path = String::new();
    let mut so_far = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !so_far.is_empty() {
            so_far.push('-');
        }
        so_far.push_str(part);
        path.push_str(&format!("/{so_far}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "7be92808767a667f35c8505cbf40d14e931ef6db5b0210329cf193b15ba9d605";
    const B: &str = "0ba8ac17e4e7a31fb82279503552fe94e64bab4745bf6fd2ff231e7c8ca8bed0";
    const UID: &str = "2fc932ce-fdcc-454b-97bd-aadfdeb4c340";

    /// `A`, `B` and the uid in a template; the uid also with `_`.
    fn fill(template: &str) -> String {
        template.replace("{A}", A).replace("{B}", B).replace("{UID}", UID).replace("{U_D}", &UID.replace('-', "_"))
    }

    #[test]
    fn containers() {
        use Kind::{Containerd, CriO, Docker, Podman};
        // Path, runtime, with a pod, delegated, user. The id is A.
        for (path, runtime, pod, delegated, user) in [
            // systemd driver
            ("/system.slice/docker-{A}.scope", Some(Docker), false, false, None),
            ("/system.slice/nerdctl-{A}.scope", Some(Containerd), false, false, None),
            ("/system.slice/cri-containerd-{A}.scope", Some(Containerd), false, false, None),
            ("/machine.slice/libpod-{A}.scope", Some(Podman), false, false, None),
            ("/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope", Some(Podman), false, false, None),
            (
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{U_D}.slice/cri-containerd-{A}.scope",
                Some(Containerd),
                true,
                false,
                None,
            ),
            ("/kubepods.slice/kubepods-pod{U_D}.slice/crio-{A}.scope", Some(CriO), true, false, None),
            (
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{U_D}.slice/docker-{A}.scope",
                Some(Docker),
                true,
                false,
                None,
            ),
            // cgroupfs driver
            ("/docker/{A}", Some(Docker), false, false, None),
            ("/kubepods/burstable/pod{UID}/{A}", None, true, false, None),
            ("/kubepods/pod{UID}/{A}", None, true, false, None),
            ("/kubepods/besteffort/pod{UID}/crio-{A}", Some(CriO), true, false, None),
            ("/libpod_parent/libpod-{A}", Some(Podman), false, false, None),
            // the runtime's own cgroup
            (
                "/system.slice/containerd.service/kubepods-burstable-pod{U_D}.slice:cri-containerd:{A}",
                Some(Containerd),
                true,
                false,
                None,
            ),
            // k3s, rke2
            (
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{U_D}.slice/cri-containerd-{A}.scope",
                Some(Containerd),
                true,
                false,
                None,
            ),
            // Quadlet: the service may make any name
            ("/system.slice/web.service/libpod-payload-{A}", Some(Podman), false, true, None),
            // rootless
            (
                "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope",
                Some(Podman),
                false,
                true,
                Some(1000),
            ),
            (
                "/user.slice/user-1001.slice/user@1001.service/app.slice/docker-{A}.scope",
                Some(Docker),
                false,
                true,
                Some(1001),
            ),
            // kind and Docker in Docker
            (
                "/system.slice/docker-{B}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                 kubelet-kubepods-burstable-pod{U_D}.slice/cri-containerd-{A}.scope",
                Some(Containerd),
                true,
                true,
                None,
            ),
            ("/docker/{B}/kubelet/kubepods/burstable/pod{UID}/{A}", None, true, true, None),
            ("/docker/{B}/docker/{A}", Some(Docker), false, true, None),
            ("/system.slice/evil.service/docker/{A}", Some(Docker), false, true, None),
            ("/lxc.payload.x/docker/{A}", Some(Docker), false, true, None),
            ("/lxc/docker/docker/{A}", Some(Docker), false, true, None),
        ] {
            let path = fill(path);
            let found = container(Path::new(&path));
            let pod_uid = pod.then(|| UID.to_owned());
            let expected = ContainerPath { runtime, id: A.into(), pod_uid, delegated, user };
            assert_eq!(found, Some(expected), "{path}");
        }
    }

    #[test]
    fn no_containers() {
        for path in [
            "/",
            "",
            "/docker",
            "/docker/short",
            "/docker/buildkit/{A}",
            "/{A}",
            "/default/{A}",
            "/default/ctr-one",
            "/machine.slice/libpod-conmon-{A}.scope",
            "/kubepods.slice/kubepods-pod{U_D}.slice/crio-conmon-{A}.scope",
            "/libpod_parent/conmon",
            "/machine.slice/libpod-{A}.scope/container",
            "/machine.slice/libpod-{A}.scope/init.scope",
            "/system.slice/docker-{A}.scope/system.slice/nginx.service",
            "/system.slice/docker.service",
            "/system.slice/docker-{A}",
            "/system.slice/docker-ABCDEF.scope",
            "/system.slice/x:cri-containerd:{A}",
            "/kubepods/burstable/pod{UID}",
            "/system.slice/web.service/supervisor",
        ] {
            let path = fill(path);
            assert_eq!(container(Path::new(&path)), None, "{path}");
        }
    }

    #[test]
    fn pods() {
        for (path, expected) in [
            ("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{U_D}.slice", true),
            ("/kubepods.slice/kubepods-pod{U_D}.slice", true),
            ("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{U_D}.slice", true),
            ("/kubepods/pod{UID}", true),
            ("/kubepods/besteffort/pod{UID}", true),
            ("/kubepods/burstable", false),
            ("/kubepods.slice/kubepods-burstable.slice", false),
            ("/kubepods/pod{UID}/{A}", false),
            ("/pod{UID}", false),
            ("/system.slice/podman.service", false),
            ("/system.slice/my-pod{U_D}.slice", false),
            ("/docker/{B}/kubepods/pod{UID}", false),
            ("/system.slice/evil.service/kubepods/pod{UID}", false),
            ("/lxc.payload.x/kubepods/pod{UID}", false),
        ] {
            let path = fill(path);
            assert_eq!(pod(Path::new(&path)), expected.then(|| UID.to_owned()), "{path}");
        }
        let fixed = "36b6d6be73b1065af369b3985edafa09";
        let path = format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{fixed}.slice");
        assert_eq!(pod(Path::new(&path)).as_deref(), Some(fixed));
    }

    #[test]
    fn specifications() {
        for (text, expected) in [
            ("/default/ctr-one", Some("/default/ctr-one")),
            ("/a/b/", Some("/a/b")),
            ("system.slice:docker:x", Some("/system.slice/docker-x.scope")),
            (":libpod:x", Some("/system.slice/libpod-x.scope")),
            (
                "kubepods-burstable-pod1_2.slice:cri-containerd:x",
                Some("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-x.scope"),
            ),
            ("-.slice:p:x", Some("/p-x.scope")),
            ("a.slice::x", Some("/a.slice/x.scope")),
            ("a--b.slice:p:x", None),
            ("relative/x", None),
            ("/a/../b", None),
            ("/", None),
            ("", None),
            ("a:b", None),
            ("a.slice:b:c:d", None),
        ] {
            assert_eq!(of_spec(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn known_drivers_are_under_the_prefixes() {
        for path in [
            "/docker/{A}",
            "/system.slice/docker-{A}.scope",
            "/kubepods/pod{UID}/{A}",
            "/kubepods.slice/kubepods-pod{U_D}.slice/crio-{A}.scope",
            "/libpod_parent/libpod-{A}",
            "/machine.slice/libpod-{A}.scope",
        ] {
            let path = fill(path);
            assert!(prefixes().iter().any(|p| path.starts_with(p)), "{path}");
        }
        // But not their helpers outside of a pod.
        assert!(!prefixes().iter().any(|p| "/libpod_parent/conmon".starts_with(p)));
    }
}
