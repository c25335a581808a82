//! What an agent is to do, settled once: after [`Config`] there is no default to look up and no `Option` to interpret.
//!
//! [`Settings`] is the file an administrator writes (`/etc/segfw/agent.yaml`), the command line wins over it, and both
//! together with the defaults become a [`Config`].

use crate::policy::host_policy::Labels;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The settings of a packaged agent.
pub const DEFAULT_SETTINGS: &str = "/etc/segfw/agent.yaml";
/// The policy of a packaged agent.
pub const DEFAULT_POLICY: &str = "/etc/segfw/policies";

/// Where programs and maps are pinned, unless told otherwise.
pub const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/segfw";
/// Where the agent keeps what must survive a restart, unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/segfw";

/// One agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The folder with the policy.
    pub policy: PathBuf,
    /// Judge everything, drop nothing.
    pub monitor: bool,
    /// On a BPF file system.
    pub pin_dir: PathBuf,
    /// Numbers, the last known good revision.
    pub state_dir: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// Mount point of the cgroup2 hierarchy.
    pub cgroup_root: PathBuf,
    /// Labels of every workload of this host.
    pub host_labels: Labels,
    /// Interfaces for the outer wall; empty = none.
    pub xdp: Vec<String>,
    /// Which gate judges inbound TCP.
    pub gate: GateChoice,
    /// This host's name in records.
    pub host: String,
    /// What happens when something is not there.
    pub absence: AbsenceConfig,
    /// Where `/metrics`, `/healthz` and `/readyz` are served; `None` = nowhere.
    pub metrics: Option<SocketAddr>,
    /// Flow records on disk; `None` = only those in memory.
    pub spool: Option<SpoolConfig>,
    /// Where container runtimes are asked for images, names and labels.
    pub runtimes: RuntimeConfig,
}

/// Which gate judges inbound TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "camelCase")]
pub enum GateChoice {
    /// Gate conn where the kernel has it and a canary was refused there, else gate skb.
    #[default]
    Auto,
    /// A hook per packet, on every kernel.
    Skb,
    /// Gate conn; where it is not to be had gate skb judges, and `segfw status` says DEGRADED.
    Conn,
}

/// What a host does when something it needs is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Absent {
    /// What was enforced last goes on.
    #[default]
    LastKnownGood,
    /// New connections of enforced workloads are refused, golden rules aside.
    Closed,
    /// New connections pass, and are recorded.
    Open,
}

impl Absent {
    /// The word users see.
    pub fn word(self) -> &'static str {
        match self {
            Self::LastKnownGood => "lastKnownGood",
            Self::Closed => "closed",
            Self::Open => "open",
        }
    }
}

/// The declared behaviours (architecture, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AbsenceConfig {
    /// After a boot, until a revision of the policy folder is in force.
    pub before_first_revision: Absent,
    /// No agent has been heard of for `agent_gone_after_seconds`.
    pub agent_gone: Absent,
    /// An agent that has not been heard of for so long counts as gone. 4 to 86,400.
    #[serde(deserialize_with = "gone_after")]
    pub agent_gone_after_seconds: u32,
}

/// Several restarts and an upgrade fit into it.
pub const AGENT_GONE_AFTER_SECONDS: u32 = 60;

impl Default for AbsenceConfig {
    fn default() -> Self {
        Self {
            before_first_revision: Absent::default(),
            agent_gone: Absent::default(),
            agent_gone_after_seconds: AGENT_GONE_AFTER_SECONDS,
        }
    }
}

/// The agent says four times in that span that it lives, and that is looked at each second.
fn gone_after<'de, D: serde::Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    let seconds = u32::deserialize(from)?;
    match seconds {
        4..=86_400 => Ok(seconds),
        _ => Err(serde::de::Error::custom(format!("{seconds} is not from 4 to 86400 (seconds)"))),
    }
}

/// Flow records on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SpoolConfig {
    /// The folder; absent = `flows` in the state folder.
    pub dir: Option<PathBuf>,
    /// Bytes of all files together; the oldest go first, and are counted.
    pub max_bytes: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
}
impl Default for SpoolConfig {
    fn default() -> Self {
        Self { dir: None, max_bytes: 256 << 20, file_bytes: 16 << 20 }
    }
}

/// Container runtimes of this host. A socket or folder that is not there is no error: the runtime is not installed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RuntimeConfig {
    /// Sockets that speak CRI v1 (and containerd's own API, where it is containerd).
    pub cri: Vec<PathBuf>,
    /// Sockets that speak Docker's API (Docker, and Podman's service).
    pub docker: Vec<PathBuf>,
    /// Folders of containers/storage (Podman and CRI-O, with or without a service).
    pub storage: Vec<PathBuf>,
}
impl Default for RuntimeConfig {
    fn default() -> Self {
        let paths = |all: &[&str]| all.iter().map(PathBuf::from).collect();
        Self {
            cri: paths(&["/run/containerd/containerd.sock", "/run/crio/crio.sock"]),
            docker: paths(&["/run/docker.sock", "/run/podman/podman.sock"]),
            storage: paths(&["/var/lib/containers/storage"]),
        }
    }
}

/// What removing the package does with a host that enforces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OnRemove {
    /// Asked on a terminal; without one the package stays as it is and says why.
    #[default]
    Ask,
    /// Enforcement stays in the kernel until the next boot.
    Keep,
    /// The host is opened.
    Open,
}

/// `/etc/segfw/agent.yaml`. Every key is optional; an unknown one is an error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// The folder with the policy.
    pub policy: Option<PathBuf>,
    /// Judge and record everything, drop nothing.
    pub monitor: bool,
    /// Where programs and maps are pinned.
    pub pin_dir: Option<PathBuf>,
    /// What must survive a restart.
    pub state_dir: Option<PathBuf>,
    /// Mount point of the cgroup2 hierarchy.
    pub cgroup_root: Option<PathBuf>,
    /// This host's name in records; absent = the kernel's.
    pub host: Option<String>,
    /// Labels of every workload of this host.
    pub host_labels: BTreeMap<String, String>,
    /// Interfaces with the outer wall.
    pub xdp: Vec<String>,
    /// Which gate judges inbound TCP.
    pub gate: GateChoice,
    /// What happens when something is not there.
    pub absence: AbsenceConfig,
    /// What removing the package does.
    pub on_remove: OnRemove,
    /// Metrics and health.
    pub metrics: MetricsSettings,
    /// Flow records.
    pub flows: FlowSettings,
    /// Container runtimes.
    pub runtimes: RuntimeConfig,
}

/// `metrics:` of the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MetricsSettings {
    /// Address and port, on loopback unless something in front of it decides who may read; absent = nowhere.
    pub listen: Option<SocketAddr>,
}

/// `flows:` of the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FlowSettings {
    /// Records on disk; absent = only those in memory.
    pub spool: Option<SpoolConfig>,
}

impl Settings {
    /// Reads a file. The error names file, line and column.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let wrong = |why: String| ConfigError::Settings(path.display().to_string(), why);
        let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
        if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(Self::default());
        }
        crate::policy::yaml::settings(&text).map_err(wrong)
    }
}

/// An agent cannot be configured like this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not `key=value`.
    #[error("--host-label {0:?} is not key=value")]
    Label(String),
    /// Two values for one key.
    #[error("--host-label {0} is given twice")]
    LabelTwice(String),
    /// The settings file.
    #[error("{0}: {1}")]
    Settings(String, String),
    /// The old hierarchies only: containers share one cgroup of the new one there.
    #[error("{}", crate::host::cgroup::Error::V1Only)]
    V1Only,
    /// No hierarchy.
    #[error(
        "no cgroup2 file system is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup) or name it with --cgroup-root"
    )]
    NoCgroup2,
}

/// Labels as given, one `key=value` each.
pub fn host_labels(given: &[String]) -> Result<Labels, ConfigError> {
    let mut labels = Labels::new();
    for text in given {
        let wrong = || ConfigError::Label(text.clone());
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        if key.is_empty() || value.is_empty() || text.contains(',') || text.contains(char::is_whitespace) {
            return Err(wrong());
        }
        if labels.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(ConfigError::LabelTwice(key.to_owned()));
        }
    }
    Ok(labels)
}

/// The first cgroup2 mount of the whole hierarchy in the text of `/proc/self/mountinfo` (proc(5)): on hybrid hosts it is
/// not `/sys/fs/cgroup`.
pub fn cgroup2_root(mountinfo: &str) -> Result<PathBuf, ConfigError> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (root == "/" && after.split(' ').next() == Some("cgroup2")).then(|| PathBuf::from(unescape(point)))
    };
    let v1 = || mountinfo.lines().any(|line| line.contains(" - cgroup "));
    mountinfo.lines().find_map(mount).ok_or_else(|| if v1() { ConfigError::V1Only } else { ConfigError::NoCgroup2 })
}

/// Space, tab, newline and backslash are written as `\040` and so on.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

impl Config {
    /// Everything as usual, for a policy in `policy`. The caller knows the machine.
    pub fn new(policy: &Path, cgroup_root: PathBuf, host: String) -> Self {
        Self {
            policy: policy.to_owned(),
            monitor: false,
            pin_dir: DEFAULT_PIN_DIR.into(),
            state_dir: DEFAULT_STATE_DIR.into(),
            socket: crate::control::DEFAULT_SOCKET.into(),
            cgroup_root,
            host_labels: Labels::new(),
            xdp: Vec::new(),
            gate: GateChoice::default(),
            host,
            absence: AbsenceConfig::default(),
            metrics: None,
            spool: None,
            runtimes: RuntimeConfig::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        let labels = |given: &[&str]| host_labels(&given.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_eq!(labels(&["zone=a", "rack=7=b"]).unwrap()["rack"], "7=b");
        for wrong in ["zone", "=a", "zone=", "a=b,c=d", "a=b c"] {
            assert_eq!(labels(&[wrong]), Err(ConfigError::Label(wrong.to_owned())));
        }
        assert_eq!(labels(&["a=1", "a=2"]).unwrap_err().to_string(), "--host-label a is given twice");
    }

    /// Every key is in the packaged file, set or as a comment, and the file is read as what it says.
    #[test]
    fn the_packaged_settings() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/etc/agent.yaml");
        let settings = Settings::read(&path).unwrap();
        assert_eq!(settings.policy.as_deref(), Some(Path::new(DEFAULT_POLICY)));
        assert_eq!(settings.flows.spool, Some(SpoolConfig::default()));
        assert!(settings.metrics.listen.is_some_and(|at| at.ip().is_loopback()));
        assert_eq!(
            Settings {
                policy: None,
                flows: FlowSettings::default(),
                metrics: MetricsSettings::default(),
                ..settings.clone()
            },
            Settings::default()
        );
        let text = std::fs::read_to_string(&path).unwrap();
        fn keys(value: &serde_json::Value, text: &str) {
            for (key, value) in value.as_object().into_iter().flatten() {
                assert!(text.contains(&format!("{key}:")), "{key} is missing");
                keys(value, text);
            }
        }
        keys(&serde_json::to_value(&settings).unwrap(), &text);
        // What is a comment there is right where it is taken in.
        let all: String = text
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.trim_start().split(' ').next().is_some_and(|w| w.ends_with(':')) => {
                    format!("{rest}\n")
                }
                _ if line.starts_with('#') => String::new(),
                _ => format!("{line}\n"),
            })
            .collect();
        let _: Settings = crate::policy::yaml::settings(&all).unwrap_or_else(|e| panic!("{e}\n{all}"));
    }

    #[test]
    fn cgroup2_is_found_where_it_is() {
        let hybrid = "25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      26 25 0:23 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
                      27 25 0:24 /sub /mnt/part rw - cgroup2 cgroup2 rw\n\
                      28 25 0:24 / /sys/fs/cgroup/uni\\040fied rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_root(hybrid).unwrap(), Path::new("/sys/fs/cgroup/uni fied"));
        assert_eq!(cgroup2_root("garbage\n\n - cgroup2"), Err(ConfigError::NoCgroup2));
    }
}
