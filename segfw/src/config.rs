//! What an agent is to do, settled once: after [`Config`] there is no default to look up and no `Option` to interpret.

use crate::policy::host_policy::Labels;
use std::path::{Path, PathBuf};

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
    /// This host's name in records.
    pub host: String,
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
    mountinfo.lines().find_map(mount).ok_or(ConfigError::NoCgroup2)
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
            host,
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
