//! Folders of containers/storage, where Podman and CRI-O keep their containers whether a service runs or not.
//!
//! What they tell: id, name, image, of CRI-O also the pod, and the cgroup from the OCI specification beside it. What
//! they do not: **labels**. Podman's are in libpod's own database, which is not read here (its form changes between
//! versions); CRI-O's are among the annotations of the OCI specification, together with those that users of Kubernetes
//! choose, so nothing is taken from there. Both come with the service: Podman's API socket, CRI-O's CRI socket.

use super::containerd::Spec;
use super::limits::{ANSWER_BYTES, Answer, Bounded};
use super::path::is_id;
use crate::policy::container::{ContainerFacts, Kind, PodFacts, qualified};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Lists of one driver's folder: containers that survive a boot, and those that do not (`--rm`, CRI-O).
const LISTS: [&str; 2] = ["containers.json", "volatile-containers.json"];

/// Drivers' folders in one root (`overlay-containers`, `vfs-containers`); more than one or two means something else.
const DRIVERS: usize = 16;

/// Bytes of one OCI specification: some ten kilobytes, more with hundreds of mounts.
const SPEC_BYTES: u64 = 1 << 20;

#[derive(Deserialize)]
struct Stored {
    id: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    #[serde(default)]
    image: Option<String>,
    /// JSON in JSON, by whoever made the container.
    #[serde(default)]
    metadata: Option<String>,
}

/// libpod's and CRI-O's in one.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Metadata {
    image_name: Option<String>,
    name: Option<String>,
    /// CRI-O only, as all below.
    pod_id: Option<String>,
    pod_name: Option<String>,
    metadata_name: Option<String>,
    uid: Option<String>,
    namespace: Option<String>,
    /// The container is the pod's own.
    pod: Option<bool>,
}

/// One root, and what was read of it before.
#[derive(Debug)]
pub(super) struct Storage {
    root: PathBuf,
    /// Cgroups of specifications, by file; read again when the file is another one.
    specs: HashMap<PathBuf, (Stamp, Option<String>)>,
}

/// Tells one version of a file from another: inode, bytes, change time.
type Stamp = (u64, u64, i64, i64);

impl Storage {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, specs: HashMap::new() }
    }

    /// Reads the lists. Blocks for some milliseconds at a thousand containers.
    pub(super) fn list(&mut self, owner: u32, answer: &mut Answer) -> Result<(), String> {
        let said = |path: &Path, e: io::Error| format!("{}: {e}", path.display());
        let mut folders: Vec<PathBuf> = fs::read_dir(&self.root)
            .map_err(|e| said(&self.root, e))?
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.ends_with("-containers")))
            .collect();
        folders.sort();
        let mut seen = HashMap::new();
        for folder in folders.iter().take(DRIVERS) {
            for list in LISTS {
                let path = folder.join(list);
                let text = match read(&path, ANSWER_BYTES as u64) {
                    Ok(text) => text,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(said(&path, e)),
                };
                let stored: Bounded<Stored> =
                    serde_json::from_slice(&text).map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
                answer.left_out += stored.left_out;
                for container in stored.items {
                    if answer.room() {
                        self.add(folder, container, owner, answer, &mut seen);
                    }
                }
            }
        }
        self.specs = seen;
        Ok(())
    }

    fn add(
        &mut self,
        folder: &Path,
        stored: Stored,
        owner: u32,
        answer: &mut Answer,
        seen: &mut HashMap<PathBuf, (Stamp, Option<String>)>,
    ) {
        // It becomes part of a path below.
        if !is_id(&stored.id) {
            answer.left_out += 1;
            return;
        }
        // Buildah's and others' are no containers that run: they have no metadata of this form.
        let metadata = stored.metadata.as_deref().unwrap_or_default();
        let Ok(metadata) = serde_json::from_str::<Metadata>(metadata) else { return };
        let is_crio = metadata.pod_id.is_some() || metadata.pod_name.is_some();
        let kind = if is_crio { Kind::CriO } else { Kind::Podman };
        let spec = folder.join(&stored.id).join("userdata/config.json");
        let mut facts = ContainerFacts::new(kind, stored.id, owner);
        let first = stored.names.unwrap_or_default().into_iter().next();
        let name = match (is_crio, metadata.pod) {
            (true, Some(true)) => None,
            (true, _) => metadata.metadata_name,
            (false, _) => metadata.name.or(first),
        };
        facts.name = answer.text(name.unwrap_or_default());
        let image = metadata.image_name.filter(|n| !n.is_empty()).or(stored.image).unwrap_or_default();
        // The image of a pod's own container is no workload's.
        facts.image = if metadata.pod == Some(true) { String::new() } else { answer.text(qualified(&image)) };
        if is_crio {
            facts.pod = Some(PodFacts {
                namespace: answer.text(metadata.namespace.unwrap_or_default()),
                name: answer.text(metadata.pod_name.unwrap_or_default()),
                uid: answer.text(metadata.uid.unwrap_or_default()),
                ..PodFacts::default()
            });
        }
        let cgroup = self.cgroup(&spec, seen).map(|path| answer.text(path));
        facts.cgroup = cgroup.filter(|path| !path.is_empty());
        answer.containers.push(facts);
    }

    /// The cgroup in an OCI specification: read once, since it is 10 kilobytes that do not change.
    fn cgroup(&mut self, path: &Path, seen: &mut HashMap<PathBuf, (Stamp, Option<String>)>) -> Option<String> {
        let meta = fs::symlink_metadata(path).ok()?;
        let stamp = (meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec());
        let known = self.specs.remove(path).filter(|(s, _)| *s == stamp);
        let (_, cgroup) = seen.entry(path.to_owned()).or_insert(match known {
            Some(known) => known,
            None => (stamp, read(path, SPEC_BYTES).ok().and_then(|json| Spec::cgroup(&json))),
        });
        cgroup.clone()
    }
}

/// A regular file of at most so many bytes; nothing that could block or lead elsewhere, since the folder may be a
/// user's.
fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file: File = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "11558bf73e5b03c81679876c6399d678bd8d4f7ef16e1f1523f148043d97e1f8";
    const B: &str = "3762054140a25f7465a4c8792ce4d5e3809adc1508e1ea3d18fdb8cf9c933d92";
    const C: &str = "7be92808767a667f35c8505cbf40d14e931ef6db5b0210329cf193b15ba9d605";

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn podman_and_crio() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("overlay-containers");
        // As Podman 4.3.1 writes it.
        let podman = serde_json::json!([{
            "id": A, "names": ["web"], "image": "89ee", "layer": "a041", "created": "2026-11-22T00:01:46Z",
            "metadata": r#"{"image-name":"docker.io/library/nginx:1.25","image-id":"89ee","name":"web","created-at":1}"#,
            "flags": {"MountLabel": "", "ProcessLabel": ""}}, {"id": "../x", "metadata": "{}"}]);
        write(folder.join("containers.json"), &podman.to_string());
        let crio = |pod: bool| {
            let name = if pod { "" } else { "db" };
            format!(
                r#"{{"pod-name":"db-0","pod-id":"{C}","image-name":"quay.io/pg:16","image-id":"1","name":"k8s_db",
                    "metadata-name":"{name}","uid":"u1","namespace":"pay","attempt":0,"created-at":1,"pod":{pod}}}"#
            )
        };
        let crio = serde_json::json!([{"id": B, "names": null, "metadata": crio(false)},
            {"id": C, "metadata": crio(true)}, {"id": A, "names": ["working"], "metadata": "not json"}]);
        write(folder.join("volatile-containers.json"), &crio.to_string());
        let spec = folder.join(A).join("userdata/config.json");
        write(spec.clone(), r#"{"linux":{"cgroupsPath":"machine.slice:libpod:x"}}"#);

        let mut storage = Storage::new(root.path().to_owned());
        for turn in 0..3 {
            let mut answer = Answer::default();
            storage.list(0, &mut answer).unwrap();
            let [web, db, pause] = &answer.containers[..] else { panic!("{answer:?}") };
            assert_eq!((web.runtime, web.name.as_str()), (Kind::Podman, "web"));
            assert_eq!((web.image.as_str(), &web.pod), ("docker.io/library/nginx:1.25", &None));
            let last = if turn < 2 { "x" } else { "yy" };
            assert_eq!(web.cgroup, Some(format!("/machine.slice/libpod-{last}.scope")));
            assert_eq!((db.runtime, db.name.as_str(), db.image.as_str()), (Kind::CriO, "db", "quay.io/pg:16"));
            assert_eq!(db.pod.as_ref().map(|p| (p.namespace.as_str(), p.uid.as_str())), Some(("pay", "u1")));
            assert_eq!((pause.name.as_str(), pause.image.as_str(), pause.pod.is_some()), ("", "", true));
            assert_eq!(answer.left_out, 1, "../x");
            if turn == 1 {
                write(spec.clone(), r#"{"linux":{"cgroupsPath":"machine.slice:libpod:yy"}}"#);
            }
        }
    }

    #[test]
    fn hostile_folders() {
        let root = tempfile::tempdir().unwrap();
        let list = root.path().join("vfs-containers/containers.json");
        let ends = || Storage::new(root.path().to_owned()).list(0, &mut Answer::default());
        fs::create_dir_all(list.parent().unwrap()).unwrap();
        assert_eq!(ends(), Ok(()), "nothing there yet");
        nix::unistd::mkfifo(&list, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(ends().unwrap_err().ends_with("not a regular file"));
        fs::remove_file(&list).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", &list).unwrap();
        assert!(ends().is_err());
        fs::remove_file(&list).unwrap();
        File::create(&list).unwrap().set_len(ANSWER_BYTES as u64 + 1).unwrap();
        assert!(ends().unwrap_err().contains("more than"));
        fs::write(&list, "{").unwrap();
        assert!(ends().unwrap_err().contains("cannot be read"));
    }
}
