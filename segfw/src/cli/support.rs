//! `segfw support`: one file with what somebody needs who is to help, without secrets. It is made from what there is: an
//! agent that does not answer is one more fact.

use super::{CliError, Exit, ask, change, engine, print, redact};
use crate::config::{self, Settings};
use crate::control::{Client, ClientError, Request, Response};
use crate::datapath::seen;
use crate::flow::Query;
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Flow records that are taken.
const FLOWS: usize = 1_000;
/// Bytes of one file of the host that are taken.
const HOST_FILE_BYTES: usize = 256 << 10;
/// Bytes of policy files that are taken: enough for what a person can look through.
const POLICY_BYTES: usize = 16 << 20;

/// Facts of the machine, as its own files tell them.
const HOST_FILES: [&str; 14] = [
    "/etc/os-release",
    "/proc/version",
    "/proc/cmdline",
    "/proc/uptime",
    "/proc/meminfo",
    "/proc/self/mountinfo",
    "/proc/sys/net/core/bpf_jit_enable",
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/net/ipv4/tcp_early_demux",
    "/proc/net/ip_tables_names",
    "/proc/modules",
    "/sys/kernel/security/lsm",
    "/sys/kernel/security/lockdown",
    "/sys/fs/cgroup/cgroup.controllers",
];

#[derive(Debug, Args)]
pub(super) struct SupportArgs {
    /// Where it is written [default: segfw-support-HOST-TIME.tar.gz in this folder]
    file: Option<PathBuf>,
    /// The settings of the agent
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_SETTINGS)]
    config: PathBuf,
}

/// The files of the bundle.
#[derive(Default)]
struct Bundle {
    files: Vec<(String, String)>,
    /// What could not be had, and why.
    missing: Vec<(String, String)>,
}

impl Bundle {
    fn text(&mut self, name: &str, text: &str) {
        self.files.push((name.to_owned(), redact::text(text)));
    }

    fn json<T: Serialize>(&mut self, name: &str, value: &T) -> Result<(), CliError> {
        let mut value = serde_json::to_value(value).map_err(CliError::system)?;
        redact::json(&mut value);
        self.files.push((name.to_owned(), print::json(&value)?));
        Ok(())
    }

    /// One value a line.
    fn lines<T: Serialize>(&mut self, name: &str, values: &[T]) -> Result<(), CliError> {
        let mut text = String::new();
        for value in values {
            let mut value: Value = serde_json::to_value(value).map_err(CliError::system)?;
            redact::json(&mut value);
            text += &print::json_line(&value)?;
        }
        self.files.push((name.to_owned(), text));
        Ok(())
    }

    fn lacks(&mut self, name: &str, why: impl ToString) {
        self.missing.push((name.to_owned(), why.to_string()));
    }

    /// What came, or why it did not.
    fn take<T: Serialize>(&mut self, name: &str, value: Result<T, CliError>) -> Result<(), CliError> {
        match value {
            Ok(value) => self.json(name, &value),
            Err(error) => {
                self.lacks(name, error.message);
                Ok(())
            }
        }
    }
}

/// `segfw support`.
pub(super) async fn support(socket: &Path, args: SupportArgs) -> Result<Exit, CliError> {
    let SupportArgs { file, config } = args;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let now = Timestamp::now();
    let stem = format!("segfw-support-{}-{}", host.trim(), now.strftime("%Y%m%dT%H%M%SZ"));
    let path = file.unwrap_or_else(|| PathBuf::from(format!("{stem}.tar.gz")));
    let mut bundle = Bundle::default();

    print::progress("asking the agent ...");
    let folder = agent(socket, &mut bundle).await?;
    print::progress("looking at the host ...");
    bundle.lines("doctor.json", &engine::doctor()?)?;
    settings(&config, folder, &mut bundle);
    match seen::programs() {
        Ok(programs) => bundle.lines("kernel/programs.json", &programs)?,
        Err(error) => bundle.lacks("kernel/programs.json", error),
    }
    bundle.lines("kernel/links.json", &seen::links())?;
    for file in HOST_FILES {
        let name = format!("host{file}");
        match std::fs::read(file) {
            Ok(bytes) => {
                let bytes = bytes.get(..HOST_FILE_BYTES).unwrap_or(&bytes);
                bundle.text(&name, &String::from_utf8_lossy(bytes));
            }
            Err(e) => bundle.lacks(&name, e),
        }
    }
    print::progress("writing ...");
    readme(&mut bundle, now);
    let written = write(&path, &stem, &bundle, now)
        .map_err(|e| CliError::system(format!("{} cannot be written: {e}", path.display())));
    print::progress_ends();
    written?;
    print::out(&super::show::support(&path, &bundle.files, &bundle.missing))?;
    Ok(Exit::Yes)
}

/// What only the agent knows. Returns its policy folder.
async fn agent(socket: &Path, bundle: &mut Bundle) -> Result<Option<PathBuf>, CliError> {
    match Client::connect(socket).await {
        Err(
            error @ (ClientError::Absent(_) | ClientError::Dead(_) | ClientError::Forbidden(_) | ClientError::Hangs(_)),
        )
        | Err(error @ (ClientError::Io { .. } | ClientError::Incomplete | ClientError::NotUnderstood(_)))
        | Err(error @ ClientError::Failed(_)) => {
            bundle.text("no-agent.txt", &format!("The agent did not answer: {error}\n"));
            bundle.lacks("status, workloads, counters, flows, history", "the agent did not answer (no-agent.txt)");
            return Ok(None);
        }
        Ok(client) => drop(client),
    }
    let mut folder = None;
    for (name, request) in
        [("status.json", Request::Status), ("counters.json", Request::Counters), ("places.json", Request::Places)]
    {
        let answer = ask(socket, request).await;
        if let Ok(Response::Places(places)) = &answer {
            folder = Some(places.policy.clone());
        }
        bundle.take(name, answer)?;
    }
    for (name, request) in [
        ("workloads.json", Request::Workloads),
        ("flows.json", Request::Flows(Query { last: Some(FLOWS), ..Query::default() })),
    ] {
        match all(socket, request).await {
            Ok(lines) => bundle.lines(name, &lines)?,
            Err(error) => bundle.lacks(name, error.message),
        }
    }
    match change::past(socket).await {
        Ok(past) => bundle.lines("history.json", &past)?,
        Err(error) => bundle.lacks("history.json", error.message),
    }
    match change::files(socket, None).await {
        Ok(files) => policy("in-force", &files, bundle),
        Err(error) => bundle.lacks("policy/in-force", error.message),
    }
    Ok(folder)
}

async fn all(socket: &Path, request: Request) -> Result<Vec<Response>, CliError> {
    let mut answer = Client::connect(socket).await?.ask(request).await?;
    let mut lines = Vec::new();
    while let Some(line) = answer.next().await? {
        lines.push(line);
    }
    Ok(lines)
}

fn policy(which: &str, files: &[(String, String)], bundle: &mut Bundle) {
    let mut left = POLICY_BYTES;
    for (name, text) in files {
        let name = format!("policy/{which}/{}", name.replace("..", "__"));
        match left.checked_sub(text.len()) {
            Some(rest) => {
                left = rest;
                bundle.text(&name, text);
            }
            None => bundle.lacks(&name, format!("the bundle takes {POLICY_BYTES} bytes of policies")),
        }
    }
}

/// The settings, and the policy folder as it is on disk, which need not be what is in force.
fn settings(path: &Path, folder: Option<PathBuf>, bundle: &mut Bundle) {
    match std::fs::read_to_string(path) {
        Ok(text) => bundle.text("settings/agent.yaml", &text),
        Err(e) => bundle.lacks("settings/agent.yaml", format!("{}: {e}", path.display())),
    }
    let folder =
        folder.or_else(|| Settings::read(path).ok()?.policy).unwrap_or_else(|| PathBuf::from(config::DEFAULT_POLICY));
    match crate::policy::read_dir_recursive(&folder) {
        Ok(files) => policy("on-disk", &files, bundle),
        Err(error) => bundle.lacks("policy/on-disk", error),
    }
}

fn readme(bundle: &mut Bundle, now: Timestamp) {
    let mut text = format!(
        "segfw {} support bundle, {now}\n\n\
         Values whose keys look like secrets (token, password, key and so on) were taken out, also in comments and\n\
         descriptions, and so were keys in PEM form and users in URLs. No environment of any process is in it.\n\
         Addresses, names of hosts, units and labels are in it. Look through it before you send it.\n\nIn it:\n",
        env!("CARGO_PKG_VERSION")
    );
    for (name, body) in &bundle.files {
        text += &format!("  {name}  {} bytes\n", body.len());
    }
    if !bundle.missing.is_empty() {
        text += "\nNot in it:\n";
    }
    for (name, why) in &bundle.missing {
        text += &format!("  {name}: {why}\n");
    }
    bundle.files.insert(0, ("README.txt".to_owned(), redact::text(&text)));
}

/// Mode 0600, and never over a file that is there.
fn write(path: &Path, stem: &str, bundle: &Bundle, now: Timestamp) -> std::io::Result<()> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(file, flate2::Compression::default()));
    for (name, text) in &bundle.files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(u64::try_from(now.as_second()).unwrap_or(0));
        tar.append_data(&mut header, format!("{stem}/{name}"), text.as_bytes())?;
    }
    let mut file = tar.into_inner()?.finish()?;
    file.flush()?;
    file.sync_all()
}
