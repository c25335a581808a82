//! Every command in README.md and docs/ is run, against a real agent, as it stands there.
//!
//! A block that begins with ```` ```sh ```` or ```` ```console ```` holds commands (in the second, lines that begin with
//! `$ `). Behind two spaces and `# ` a command says what to expect: `# -> TEXT` (its output has the text), `# exit code
//! N` (else it must be 0), or both with a comma between. What is not run is in [`NOT_RUN`] with the reason; a command
//! that this file does not know fails the test.
//!
//! Paths of an installed segfw are mapped into the world of the test by [`Place::map`], and `systemctl stop segfw` and
//! its like act on the agent of the test.

use crate::Test;
use anyhow::{Context, Result, bail, ensure};
use segfw_tests::agent::Agent;
use segfw_tests::world::{World, net};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("docs: every command runs", every_command),
        ("docs: links lead somewhere", links),
        ("docs: what is run is read from the pages", reading),
    ]
}

/// How a command may begin that is run in a shell: ours, and what every host has.
const RUN: [&str; 14] =
    ["segfw", "mkdir", "cat", "cp", "sed", "rm", "rmdir", "ls", "sh", "python3", "printf", "tar", "echo", "sleep"];

/// How a command may begin that is not run, and why.
const NOT_RUN: [(&str, &str); 28] = [
    ("tail -F", "follows for ever"),
    ("export", "the test has a PATH of its own"),
    ("segfw agent", "runs until it is stopped; the agent of the test is started like this"),
    ("cargo", "builds the program that is under test"),
    ("git", "needs a repository that is not here"),
    ("systemctl", "there is no systemd in the world of the test (stop, start and restart of segfw are done by hand)"),
    ("systemd-run", "no systemd"),
    ("journalctl", "no systemd"),
    ("apt", "changes the machine"),
    ("apt-get", "changes the machine"),
    ("dpkg", "changes the machine"),
    ("dnf", "changes the machine"),
    ("rpm", "changes the machine"),
    ("zypper", "changes the machine"),
    ("install", "changes the machine"),
    ("mount", "changes the machine"),
    ("sysctl", "changes the machine"),
    ("modprobe", "changes the machine"),
    ("reboot", "changes the machine"),
    ("docker", "not on every machine; other tests have runtimes"),
    ("podman", "not on every machine; other tests have runtimes"),
    ("crictl", "not on every machine; other tests have runtimes"),
    ("kubectl", "no cluster"),
    ("curl", "asks a network, or a port that is not the test's"),
    ("promtool", "not on every machine"),
    ("nft", "shows the rules of this machine"),
    ("sha256sum", "of files that are downloaded"),
    ("gpg", "of files that are downloaded"),
];

/// Pages that this branch may not have: they are written beside it.
const ELSEWHERE: [&str; 3] = ["install.md", "flows.md", "metrics.md"];

/// For pages that speak of a host on which segfw runs already.
const POLICY: &str = "\
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: shop}
spec: {match: [{cgroup: \"/tutorial/web\"}], labels: {app: shop, tier: web}}
---
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: postgres}
spec: {match: [{cgroup: \"/tutorial/db\"}], labels: {app: shop, tier: db}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: shop-db}
spec: {select: {app: shop, tier: db}, default: {ingress: deny, egress: deny}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: shop-db-access}
spec:
  rules:
    - {name: web-to-db, from: [{select: {app: shop, tier: web}}], to: [shop-db], ports: [tcp/5432], action: allow}
";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// README.md and docs/*.md.
fn pages() -> Result<Vec<PathBuf>> {
    let docs = fs::read_dir(root().join("docs"))?;
    let mut pages: Vec<PathBuf> =
        docs.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "md")).collect();
    pages.push(root().join("README.md"));
    pages.sort();
    Ok(pages)
}

/// A command of a page.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    line: usize,
    command: String,
    exit: i32,
    says: Option<String>,
}

fn steps(page: &str) -> Vec<Step> {
    let mut found = Vec::new();
    let mut lines = page.lines().enumerate();
    while let Some((_, line)) = lines.next() {
        let console = line.trim() == "```console";
        if !console && line.trim() != "```sh" {
            continue;
        }
        while let Some((n, line)) = lines.next() {
            let line = line.trim_end();
            if line.trim() == "```" {
                break;
            }
            let line = match line.strip_prefix("$ ") {
                Some(command) => command,
                None if console => continue,
                None => line,
            };
            if line.trim().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            let (command, expected) = line.split_once("  # ").unwrap_or((line, ""));
            let mut command = command.trim().to_owned();
            let end = command.split_once("<<").map(|(_, word)| word.trim().trim_matches(['\'', '"']).to_owned());
            // More lines: a text that follows, or a backslash.
            while end.is_some() || command.ends_with('\\') {
                let Some((_, more)) = lines.next() else { break };
                command.push('\n');
                command.push_str(more);
                if end.as_deref() == Some(more) {
                    break;
                }
            }
            let (mut exit, mut says) = (0, None);
            for part in expected.split(", ") {
                if let Some(text) = part.trim().strip_prefix("-> ") {
                    says = Some(text.to_owned());
                } else if let Some(code) = part.trim().strip_prefix("exit code ") {
                    exit = code.parse().unwrap_or(-1);
                }
            }
            found.push(Step { line: n + 1, command, exit, says });
        }
    }
    found
}

/// The world of one page.
struct Place {
    agent: Agent,
    world: World,
}

impl Place {
    fn new(page: &Path) -> Result<Self> {
        let world = World::new(&[net("host")])?;
        let folder = world.folder().to_owned();
        let work = folder.join("work");
        for dir in [&work, &folder.join("bin"), &folder.join("etc"), &folder.join("usr")] {
            fs::create_dir_all(dir)?;
        }
        std::os::unix::fs::symlink(root().canonicalize()?.join("policies"), work.join("policies"))?;
        for name in ["tutorial/web", "tutorial/db"] {
            world.cgroup(&format!("managed/{name}"))?;
        }
        // These two begin with nothing.
        let tutorial = page.ends_with("first-policy.md") || page.ends_with("README.md");
        let policy = if tutorial { "# Nothing yet.\n".to_owned() } else { map(&world, POLICY) };
        let mut agent = Agent::start(&world, &policy, &["--netns=host".to_owned()])?;
        if !tutorial {
            // So that there is something to go back to.
            agent.reload(&policy.replace("tcp/5432", "tcp/5432, tcp/6432"))?;
        }
        let place = Self { agent, world };
        place.wrapper()?;
        Ok(place)
    }

    /// `segfw` as the pages call it: with the places of this world where the program would take the host's.
    fn wrapper(&self) -> Result<()> {
        let folder = self.world.folder().display();
        let script = format!(
            "#!/bin/sh\ncase \"$1\" in\nuninstall) set -- \"$@\" --config {folder}/etc/agent.yaml --pin-dir {} \
             --state-dir {folder}/state;;\nsupport) set -- \"$@\" --config {folder}/etc/agent.yaml;;\nesac\n\
             exec {} --socket {folder}/agent.sock \"$@\"\n",
            self.world.pins().display(),
            segfw_tests::binary("segfw")?.display(),
        );
        let path = self.world.folder().join("bin/segfw");
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Runs one step. `Ok(false)` = it is among those that are not run.
    fn step(&mut self, step: &Step) -> Result<bool> {
        let command = step.command.strip_prefix("sudo ").unwrap_or(&step.command);
        match command {
            "systemctl stop segfw" => return self.agent.stop().map(|()| true),
            "systemctl start segfw" => return self.agent.launch().map(|()| true),
            "systemctl restart segfw" => {
                self.agent.stop()?;
                return self.agent.launch().map(|()| true);
            }
            _ => {}
        }
        let begins = |with: &str| command == with || command.starts_with(&format!("{with} "));
        if NOT_RUN.iter().any(|(with, _)| begins(with)) {
            return Ok(false);
        }
        if !RUN.iter().any(|with| begins(with)) {
            bail!("this command is neither run nor on the list of those that are not; see tests/product/docs.rs");
        }
        let mut text = map(&self.world, command);
        if !Path::new("/usr/bin/jq").exists()
            && let Some((before, _)) = text.split_once("| jq")
        {
            text = before.to_owned();
        }
        // What follows goes on for ever.
        let follows = begins("segfw flows") && command.split(' ').any(|w| w == "-f");
        let path = format!("{}:{}", self.world.folder().join("bin").display(), std::env::var("PATH")?);
        let mut shell = Command::new("nsenter");
        shell.arg(format!("--net=/run/netns/{}", self.world.netns("host")));
        shell.args(["timeout", if follows { "2" } else { "30" }, "bash", "-c", &text]);
        let output = segfw_tests::world::with_signals(&mut shell)
            .current_dir(self.world.folder().join("work"))
            .env("PATH", path)
            .stdin(Stdio::null())
            .output()?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let exit = if follows { 124 } else { step.exit };
        ensure!(output.status.code() == Some(exit), "{}, not {exit}: {said}", output.status);
        if let Some(text) = &step.says {
            ensure!(said.contains(text.as_str()), "{text:?} is not in: {said}");
        }
        Ok(true)
    }
}

/// Paths of an installed segfw, in the world of the test.
fn map(world: &World, text: &str) -> String {
    let folder = world.folder().display();
    let table = [
        // First: the folder of the world is below it.
        ("/tmp/", format!("{folder}/")),
        ("/etc/segfw/policies", format!("{folder}/policy")),
        ("/etc/segfw", format!("{folder}/etc")),
        ("/etc/bash_completion.d", format!("{folder}/usr")),
        ("/usr/local/share/man/man1", format!("{folder}/usr")),
        ("/var/lib/segfw", format!("{folder}/state")),
        ("/run/segfw/control.sock", format!("{folder}/agent.sock")),
        ("/sys/fs/bpf/segfw", world.pins().display().to_string()),
        ("/sys/fs/cgroup/", format!("{}/", world.managed().display())),
        ("\"/tutorial/", format!("\"{}/tutorial/", world.managed_path())),
    ];
    table.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn every_command() -> Result<()> {
    let (mut run, mut not) = (0, 0);
    let mut wrong = Vec::new();
    for page in pages()? {
        let name = page.strip_prefix(root()).unwrap_or(&page).display().to_string();
        let steps = steps(&fs::read_to_string(&page)?);
        if steps.is_empty() {
            continue;
        }
        let mut place = Place::new(&page).with_context(|| name.clone())?;
        for step in &steps {
            match place.step(step) {
                Ok(true) => run += 1,
                Ok(false) => not += 1,
                Err(e) => wrong.push(format!("{name}:{}: {}\n    {e:#}", step.line, step.command)),
            }
        }
    }
    ensure!(wrong.is_empty(), "{} of {} commands:\n{}", wrong.len(), run + not + wrong.len(), wrong.join("\n"));
    ensure!(run > 30, "only {run} commands were found: are the pages still read rightly?");
    println!("        {run} commands run, {not} not (see NOT_RUN)");
    Ok(())
}

/// Each link to a file of this repository leads to one.
fn links() -> Result<()> {
    let mut wrong = Vec::new();
    for page in pages()? {
        let text = fs::read_to_string(&page)?;
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let elsewhere = ELSEWHERE.iter().any(|name| link.ends_with(name));
            if link.is_empty() || link.contains("://") || elsewhere {
                continue;
            }
            if !page.parent().unwrap_or(Path::new("/")).join(link).exists() {
                wrong.push(format!("{}: {link}", page.display()));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn reading() -> Result<()> {
    let page = "text\n```sh\n# a remark\nsegfw status            # is it well?\ncat > a <<'EOF'\nx:  # -> no\nEOF\n\
                segfw policy check a  # -> not usable, exit code 2\n```\n```text\nsegfw no\n```\n```console\n$ segfw a \\\n  b\nout\n```\n";
    let found: Vec<_> = steps(page).into_iter().map(|s| (s.line, s.command, s.exit, s.says)).collect();
    let want = [
        (4, "segfw status", 0, None),
        (5, "cat > a <<'EOF'\nx:  # -> no\nEOF", 0, None),
        (8, "segfw policy check a", 2, Some("not usable")),
        (14, "segfw a \\\n  b", 0, None),
    ];
    let want: Vec<_> = want
        .into_iter()
        .map(|(l, c, e, s): (_, &str, _, Option<&str>)| (l, c.to_owned(), e, s.map(str::to_owned)))
        .collect();
    ensure!(found == want, "{found:?}");
    Ok(())
}
