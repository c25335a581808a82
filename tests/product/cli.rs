//! The verbs that change a host, against a real agent: apply, history, rollback, diff, support, uninstall.

use crate::Test;
use anyhow::{Context, Result, ensure};
use segfw_tests::agent::{Agent, digest};
use segfw_tests::policy::{CGROUP, Yaml};
use segfw_tests::world::World;
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("cli: apply, history, diff, rollback", apply_and_back),
        ("cli: what the agent refuses is put back", refused_is_put_back),
        ("cli: a wrong policy changes nothing", wrong_changes_nothing),
        ("cli: a person is asked", a_person_is_asked),
        ("cli: the history survives, and says what is damaged", history_survives),
        ("cli: a folder that was edited is kept", an_edited_folder_is_kept),
        ("cli: support has everything but secrets", support),
        ("cli: uninstall keeps or opens", uninstall),
        ("cli: the policies of the system tests fit the schema", schema),
    ]
}

/// An agent and its world.
struct Room {
    agent: Agent,
    world: World,
}

impl Room {
    fn new(policy: &str, extra: &[&str]) -> Result<Self> {
        let world = World::new(&[])?;
        let extra: Vec<String> = extra.iter().map(|s| (*s).to_owned()).collect();
        let agent = Agent::start(&world, &policy.replace(CGROUP, &world.managed_path()), &extra)?;
        Ok(Self { agent, world })
    }

    /// The agent's policy folder.
    fn policy(&self) -> PathBuf {
        self.world.folder().join("policy")
    }

    /// A folder with one policy file.
    fn folder(&self, name: &str, policy: &str) -> Result<String> {
        let dir = self.world.folder().join(name);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("policy.yaml"), policy.replace(CGROUP, &self.world.managed_path()))?;
        Ok(dir.display().to_string())
    }

    /// Runs a verb that must end with this exit code; returns what it said.
    fn say(&self, args: &[&str], exit: i32) -> Result<String> {
        let output = self.agent.cli(args)?;
        let said = text(&output);
        ensure!(output.status.code() == Some(exit), "segfw {}: {}, not {exit}:\n{said}", args.join(" "), output.status);
        Ok(said)
    }

    fn json(&self, args: &[&str]) -> Result<Vec<Value>> {
        let output = self.agent.cli(args)?;
        let values = serde_json::Deserializer::from_slice(&output.stdout).into_iter();
        values.collect::<Result<_, _>>().with_context(|| text(&output))
    }

    /// Number and digest of the revision in force.
    fn revision(&self) -> Result<(u64, String)> {
        let status = self.agent.status()?;
        let number = status["revision"]["number"].as_u64().context("no revision")?;
        Ok((number, digest(&status).context("no digest")?))
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn has(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.contains(word), "{word:?} is not in:\n{text}");
    }
    Ok(())
}

fn policy(ports: &str) -> String {
    let mut yaml = Yaml::default();
    yaml.enforced("web", &[]).enforced("db", &[]).allow("web-to-db", "web", "db", ports);
    yaml.0
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn apply_and_back() -> Result<()> {
    let room = Room::new(&policy("tcp/5432"), &[])?;
    let first = room.revision()?;
    // Things of an administrator, which must stay.
    fs::write(room.policy().join("notes.txt"), "mine")?;
    fs::set_permissions(room.policy().join("policy.yaml"), fs::Permissions::from_mode(0o640))?;
    let new = room.folder("new", &policy("tcp/5432, tcp/6432"))?;

    let said = room.say(&["policy", "apply", &new, "--dry-run"], 0)?;
    has(&said, &["~ Policy web-to-db", "~ ports: [tcp/5432] -> [tcp/5432, tcp/6432]", "table entries"])?;
    ensure!(room.revision()? == first, "--dry-run changed something");
    room.say(&["policy", "diff", &new], 1)?;

    let said = room.say(&["policy", "apply", &new], 0)?;
    has(&said, &["in force: revision 2", "segfw policy rollback"])?;
    let second = room.revision()?;
    ensure!(second.0 == 2 && second.1 != first.1, "{second:?}");
    let file = room.policy().join("policy.yaml");
    ensure!(read(&file)?.contains("tcp/6432"));
    ensure!(fs::metadata(&file)?.permissions().mode() & 0o777 == 0o640, "the mode has changed");
    ensure!(read(&room.policy().join("notes.txt"))? == "mine");
    room.say(&["policy", "diff", &new], 0)?;
    has(&room.say(&["policy", "apply", &new], 0)?, &["no difference", "already in force: revision 2"])?;

    let past = room.json(&["policy", "history", "-o", "json"])?;
    ensure!(past.len() == 2 && past[0]["number"] == 2 && past[0]["in_force"] == true, "{past:?}");
    let source = past[0]["source"].as_str().unwrap_or_default();
    ensure!(source.starts_with(&format!("apply of {new} by ")), "{source}");
    has(&room.say(&["policy", "history"], 0)?, &["REVISION", "in force", "the folder changed"])?;

    has(&room.say(&["policy", "diff"], 1)?, &["from revision 1 to revision 2"])?;
    has(&room.say(&["policy", "rollback", "--dry-run"], 0)?, &["from revision 2 to revision 1"])?;
    has(&room.say(&["policy", "rollback", "--yes"], 0)?, &["in force: revision 3"])?;
    let third = room.revision()?;
    ensure!(third == (3, first.1.clone()), "{third:?} {first:?}");
    ensure!(!read(&file)?.contains("tcp/6432"));
    has(&room.say(&["policy", "history"], 0)?, &["rollback to revision 1 by "])?;
    // Again: back to where we were.
    room.say(&["policy", "rollback", "--yes"], 0)?;
    ensure!(room.revision()? == (4, second.1));
    let report = room.json(&["policy", "rollback", "1", "--yes", "-o", "json"])?;
    ensure!(report[0]["applied"] == true && report[0]["revision"]["number"] == 5, "{report:?}");
    has(&room.say(&["policy", "rollback", "77", "--yes"], 2)?, &["revision 77 is not kept here"])?;
    // Nothing is left beside the folder.
    let left: Vec<_> = fs::read_dir(room.world.folder())?.flatten().map(|e| e.file_name()).collect();
    ensure!(!left.iter().any(|n| n.to_string_lossy().contains("segfw-new")), "{left:?}");
    Ok(())
}

/// The check of the command line knows no labels of this host; the agent does.
fn refused_is_put_back() -> Result<()> {
    let room = Room::new(&policy("tcp/5432"), &["--host-label=zone=a"])?;
    let first = room.revision()?;
    let mut yaml = Yaml::default();
    yaml.workload("web").segment("here", "select: {app: web, zone: a}", &[]);
    yaml.0 += "---\napiVersion: segfw.dev/v1\nkind: Test\nmetadata: {name: open}\nspec:\n  cases:\n  \
               - {from: world, to: {app: web}, port: tcp/80, expect: allow}\n";
    let new = room.folder("new", &yaml.0)?;
    let before = read(&room.policy().join("policy.yaml"))?;
    room.say(&["policy", "test", &new], 0)?;
    let said = room.say(&["policy", "apply", &new], 1)?;
    has(
        &said,
        &[
            "refused by the agent: 1 of 1 test cases of the policy failed",
            "expected allow, but the answer is DENIED",
            "revision 1 is still in force; the policy folder is as it was",
        ],
    )?;
    ensure!(read(&room.policy().join("policy.yaml"))? == before, "the folder was not put back");
    ensure!(room.revision()? == first);
    let status = room.agent.status()?;
    ensure!(status["state"] == "ENFORCING" && status["refused"].is_null(), "{status}");
    Ok(())
}

fn wrong_changes_nothing() -> Result<()> {
    let room = Room::new(&policy("tcp/5432"), &[])?;
    let first = room.revision()?;
    let wrong = room.folder("wrong", &policy("tcp/5432").replace("ports:", "prots:"))?;
    has(
        &room.say(&["policy", "apply", &wrong], 2)?,
        &["unknown key \"prots\"", "did you mean \"ports\"?", "not usable"],
    )?;
    let mut failing = policy("tcp/5432");
    failing += "---\napiVersion: segfw.dev/v1\nkind: Test\nmetadata: {name: closed}\nspec:\n  cases:\n  \
                - {from: {app: web}, to: {app: db}, port: tcp/5432, expect: deny}\n  \
                - {from: world, to: {app: db}, port: tcp/5432, expect: deny}\n";
    let failing = room.folder("failing", &failing)?;
    has(&room.say(&["policy", "apply", &failing], 1)?, &["the test closed fails", "ALLOWED"])?;
    has(&room.say(&["policy", "test", &failing], 1)?, &["FAILS", "holds", "1 of 2 cases hold"])?;
    room.say(&["policy", "apply", "/does/not/exist"], 2)?;
    ensure!(room.revision()? == first);
    ensure!(room.json(&["policy", "history", "-o", "json"])?.len() == 1);
    Ok(())
}

/// Runs a verb on a terminal, types `answer`, and returns the exit code and what was on the screen.
fn on_a_terminal(room: &Room, args: &[&str], answer: &str) -> Result<(Option<i32>, String)> {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: both pointers are to live ints; the other arguments may be null.
    let made = unsafe {
        libc::openpty(&mut master, &mut slave, std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut())
    };
    ensure!(made == 0, "openpty: {}", std::io::Error::last_os_error());
    // SAFETY: openpty has just made both, and nobody else owns them.
    let (mut master, slave) = unsafe { (fs::File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    let socket = room.world.folder().join("agent.sock");
    let mut child = Command::new(segfw_tests::binary("segfw")?)
        .arg("--socket")
        .arg(socket)
        .args(args)
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave)
        .spawn()?;
    master.write_all(answer.as_bytes())?;
    let mut screen = Vec::new();
    // The end of a terminal whose other side is closed is an error, EIO.
    let _ = master.read_to_end(&mut screen);
    Ok((child.wait()?.code(), String::from_utf8_lossy(&screen).into_owned()))
}

fn a_person_is_asked() -> Result<()> {
    let mut room = Room::new(&policy("tcp/1"), &[])?;
    let first = room.revision()?;
    let new = room.folder("new", &policy("tcp/2"))?;
    for no in ["n\n", "\n"] {
        let (exit, screen) = on_a_terminal(&room, &["policy", "apply", &new], no)?;
        has(&screen, &["[y/N]", "nothing was changed"])?;
        ensure!(exit == Some(1) && room.revision()? == first, "{exit:?} {screen}");
    }
    let (exit, screen) = on_a_terminal(&room, &["policy", "apply", &new], "y\n")?;
    ensure!(exit == Some(0) && room.revision()?.0 == 2, "{exit:?} {screen}");
    room.agent.stop()?;
    let pins = room.world.pins().to_owned();
    let pin_dir = pins.display().to_string();
    let args = ["uninstall", "--config", "/dev/null", "--pin-dir", &pin_dir, "--state-dir", "/does/not/exist"];
    let (exit, screen) = on_a_terminal(&room, &args, "cancel\n")?;
    ensure!(exit == Some(1) && pins.exists(), "{exit:?} {screen}");
    has(&screen, &["[KEEP/open/cancel]"])?;
    let (exit, screen) = on_a_terminal(&room, &args, "\n")?;
    ensure!(exit == Some(0) && pins.exists(), "{exit:?} {screen}");
    let (exit, screen) = on_a_terminal(&room, &args, "open\n")?;
    ensure!(exit == Some(0) && !pins.exists(), "{exit:?} {screen}");
    Ok(())
}

fn history_survives() -> Result<()> {
    let mut room = Room::new(&policy("tcp/1"), &[])?;
    for port in [2, 3] {
        let new = room.folder("new", &policy(&format!("tcp/{port}")))?;
        room.say(&["policy", "apply", &new, "--yes"], 0)?;
    }
    room.agent.kill()?;
    let kept = room.agent.state_dir().join("revisions/0000000002.json");
    let whole = read(&kept)?;
    fs::write(&kept, &whole[..whole.len() / 2])?;
    room.agent.launch()?;
    let past = room.json(&["policy", "history", "-o", "json"])?;
    ensure!(past.len() == 3 && past[1]["damaged"].is_string() && past[2]["damaged"].is_null(), "{past:?}");
    has(&room.say(&["policy", "history"], 0)?, &["damaged"])?;
    has(&room.say(&["policy", "rollback", "2", "--yes"], 3)?, &["revision 2 is damaged"])?;
    // The default passes over it.
    has(&room.say(&["policy", "rollback", "--yes"], 0)?, &["in force: revision 4"])?;
    ensure!(read(&room.policy().join("policy.yaml"))?.contains("tcp/1"));
    Ok(())
}

fn an_edited_folder_is_kept() -> Result<()> {
    let mut room = Room::new(&policy("tcp/1"), &[])?;
    room.agent.write("kind: nonsense\n")?;
    room.agent.wait_until("refuses", |status| status["state"] == "DEGRADED")?;
    let new = room.folder("new", &policy("tcp/2"))?;
    let said = room.say(&["policy", "apply", &new], 0)?;
    has(&said, &["the folder held something else than what was in force"])?;
    ensure!(read(&room.world.folder().join("policy.replaced/policy.yaml"))?.contains("nonsense"));
    ensure!(room.agent.status()?["state"] == "ENFORCING");
    Ok(())
}

/// The files of a bundle, by their names without the folder.
fn unpack(bundle: &Path) -> Result<Vec<(String, String)>> {
    let dir = tempfile::tempdir()?;
    let tar = Command::new("tar").arg("-xzf").arg(bundle).arg("-C").arg(dir.path()).status()?;
    ensure!(tar.success(), "tar: {tar}");
    let mut files = Vec::new();
    let mut stack = vec![dir.path().to_owned()];
    while let Some(path) = stack.pop() {
        if path.is_dir() {
            stack.extend(fs::read_dir(&path)?.flatten().map(|e| e.path()));
        } else {
            let name: PathBuf = path.strip_prefix(dir.path())?.components().skip(1).collect();
            files.push((name.display().to_string(), read(&path)?));
        }
    }
    Ok(files)
}

fn support() -> Result<()> {
    let secret = "planted-7f3a";
    let noted = policy("tcp/5432").replace(
        "metadata: {name: web}",
        &format!("metadata: {{name: web, owner: shop, description: \"token: {secret}\"}}"),
    );
    let mut room = Room::new(&format!("# password={secret}\n{noted}"), &[])?;
    let settings = room.world.folder().join("agent.yaml");
    fs::write(&settings, format!("host: node-1\nhostLabels:\n  zone: eu\n  apiKey: {secret}\n"))?;
    let settings = settings.display().to_string();
    let path = room.world.folder().join("bundle.tar.gz");
    let name = path.display().to_string();
    let said = room.say(&["support", &name, "--config", &settings], 0)?;
    has(&said, &["status.json", "policy/in-force/policy.yaml", "kernel/programs.json", "look through it"])?;
    ensure!(fs::metadata(&path)?.permissions().mode() & 0o777 == 0o600);
    let files = unpack(&path)?;
    for (file, body) in &files {
        ensure!(!body.contains(secret), "{file} has the secret:\n{body}");
    }
    for (file, word) in [
        ("status.json", "ENFORCING"),
        ("workloads.json", ""),
        ("doctor.json", "cgroup2"),
        ("counters.json", "named"),
        ("flows.json", ""),
        ("history.json", "digest"),
        ("policy/in-force/policy.yaml", "owner: shop"),
        ("policy/on-disk/policy.yaml", "web-to-db"),
        ("settings/agent.yaml", "zone: eu"),
        ("kernel/programs.json", "connect4"),
        ("kernel/links.json", "Cgroup"),
        ("host/proc/version", "Linux"),
        ("README.txt", "Not in it:"),
    ] {
        let (_, body) = files.iter().find(|(n, _)| n == file).with_context(|| format!("no {file} in {files:?}"))?;
        ensure!(body.contains(word), "{file}: {body}");
    }
    // Never over a file that is there.
    room.say(&["support", &name], 3)?;
    room.agent.kill()?;
    let path = room.world.folder().join("dead.tar.gz");
    has(&room.say(&["support", &path.display().to_string(), "--config", &settings], 0)?, &["no-agent.txt"])?;
    let files = unpack(&path)?;
    let (_, why) = files.iter().find(|(n, _)| n == "no-agent.txt").context("no-agent.txt")?;
    has(why, &["no agent is running"])?;
    ensure!(files.iter().any(|(n, _)| n == "doctor.json") && !files.iter().any(|(_, b)| b.contains(secret)));
    Ok(())
}

fn uninstall() -> Result<()> {
    let mut room = Room::new(&policy("tcp/5432"), &[])?;
    let (pins, state) = (room.world.pins().to_owned(), room.agent.state_dir());
    let (pin_dir, state_dir) = (pins.display().to_string(), state.display().to_string());
    let places = ["--config", "/dev/null", "--pin-dir", &pin_dir, "--state-dir", &state_dir];
    let with = |words: &[&'static str]| [&["uninstall"], words, &places[..]].concat();
    has(&room.say(&with(&["--open"]), 2)?, &["there is no terminal to ask on", "--keep --yes"])?;
    has(&room.say(&with(&[]), 2)?, &["onRemove"])?;
    has(&room.say(&with(&["--open", "--yes"]), 3)?, &["an agent answers on", "systemctl stop segfw"])?;
    ensure!(pins.exists());
    room.agent.stop()?;
    has(&room.say(&with(&["--yes"]), 0)?, &["kept: the programs below", "until the next boot", "kept "])?;
    ensure!(pins.exists() && state.exists());
    has(
        &room.say(&with(&["--open", "--yes"]), 0)?,
        &["segfw enforces nothing on this host any more", "--purge removes it"],
    )?;
    ensure!(!pins.exists() && state.exists(), "the pins are still there");
    has(&room.say(&with(&["--open", "--purge", "--yes"]), 0)?, &["nothing was pinned", "removed"])?;
    ensure!(!state.exists());
    // The administrator's word in the settings needs no other.
    let settings = room.world.folder().join("agent.yaml");
    fs::write(&settings, "onRemove: keep\n")?;
    let settings = settings.display().to_string();
    room.say(&["uninstall", "--config", &settings, "--pin-dir", &pin_dir, "--state-dir", &state_dir], 0)?;
    fs::write(&settings, "onRemov: keep\n")?;
    room.say(&["uninstall", "--yes", "--config", &settings, "--pin-dir", &pin_dir, "--state-dir", &state_dir], 2)?;
    Ok(())
}

/// What the agent takes in the table of the system tests, an editor must not underline.
fn schema() -> Result<()> {
    use segfw::policy::schema::{json, validator};
    let schema = json::schema();
    let mut count = 0;
    for group in segfw_tests::rows::all() {
        for document in validator::documents(&group.policy.replace(CGROUP, "/x")).map_err(anyhow::Error::msg)? {
            // Patterns are tried by the unit tests.
            ensure!(validator::valid(&schema, &document, &|_, _| true), "{}: {document}", group.name);
            count += 1;
        }
    }
    ensure!(count > 500, "only {count} documents");
    Ok(())
}
