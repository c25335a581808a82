//! The package in a real systemd: what installing, upgrading, removing and purging do to traffic, and what the units do
//! when the agent hangs, when systemd starts itself anew, and at boot.

use crate::Test;
use crate::machine::{Machine, missing, repository, tarball};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Every test of this module.
pub(crate) fn tests() -> Vec<Test> {
    vec![("package: install, upgrade, remove, purge", life), ("package: systemd units", units)]
}

/// What both versions say they are.
const NEXT: &str = "9.9.9";
const SOON: Duration = Duration::from_secs(20);
const DB: u16 = 5432;

/// `client` may talk to `db`; nobody else may. `soon` starts before segfw does, `mine` is a unit of a user, `started` is
/// opened by systemd and started by the first who connects.
const POLICY: &str = "\
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: db}
spec: {match: [{systemdUnit: db.service}, {systemdUnit: soon.service}, {systemdUnit: started.service},
  {systemdUserUnit: {unit: mine.service, user: '0'}}], labels: {app: db}}
---
apiVersion: segfw.dev/v1
kind: Workload
metadata: {name: client}
spec: {match: [{systemdUnit: client.service}, {systemdUnit: live.service}], labels: {app: client}}
---
apiVersion: segfw.dev/v1
kind: Segment
metadata: {name: db}
spec: {select: {app: db}, default: {ingress: deny, egress: deny}}
---
apiVersion: segfw.dev/v1
kind: Policy
metadata: {name: db-access}
spec:
  rules:
    - {name: client-to-db, from: [{select: {app: client}}], to: [db], ports: [tcp], action: allow}
";

/// Echoes on a port.
const SERVER: &str = "\
import socket, sys, threading
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(64)
def serve(c):
    while True:
        d = c.recv(64)
        if not d: return
        c.sendall(d)
while True:
    threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";
/// Echoes on the socket that systemd opened.
const STARTED: &str = "\
import socket
s = socket.socket(fileno=3)
while True:
    c = s.accept()[0]; c.sendall(c.recv(64)); c.close()
";
/// One question: prints OK, or ERR and why.
const ASK: &str = "\
import socket, sys
s = socket.socket(); s.settimeout(1)
try:
    s.connect(('127.0.0.1', int(sys.argv[1]))); s.sendall(b'x'); print('OK' if s.recv(1) == b'x' else 'ERR end')
except OSError as e: print('ERR', e)
";
/// One connection that lives, with a question every 50 ms; counts answers and the longest wait, in ms.
const LIVE: &str = "\
import socket, sys, time
s = socket.socket(); s.settimeout(10); s.connect(('127.0.0.1', int(sys.argv[1])))
n = worst = 0
while True:
    t = time.monotonic(); s.sendall(b'x'); assert s.recv(1) == b'x'
    n += 1; worst = max(worst, int((time.monotonic() - t) * 1000))
    open('/run/live.new', 'w').write(f'{n} {worst}'); __import__('os').rename('/run/live.new', '/run/live')
    time.sleep(0.05)
";
/// Tries what is denied, over and over; counts tries and passes.
const DENIED: &str = "\
import socket, sys, os
n = passed = 0
while True:
    s = socket.socket(); s.settimeout(0.1)
    try: s.connect(('127.0.0.1', int(sys.argv[1]))); passed += 1
    except OSError: pass
    s.close(); n += 1
    open('/run/denied.new', 'w').write(f'{n} {passed}'); os.rename('/run/denied.new', '/run/denied')
";

/// The .deb of this checkout, and the same as another version.
fn packages(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let made = Command::new(cargo)
        .args(["run", "--quiet", "--package", "xtask", "--", "dist", "--profile", "dev", "--only", "deb"])
        .current_dir(repository())
        .output()?;
    ensure!(made.status.success(), "cargo xtask dist: {}", String::from_utf8_lossy(&made.stderr).trim());
    let out = repository().join("target/dist/dev");
    let first = fs::read_dir(&out)?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "deb"))
        .with_context(|| format!("no .deb in {}", out.display()))?;
    let (tree, next) = (folder.join("tree"), folder.join("next.deb"));
    let deb = |args: &[&std::ffi::OsStr]| -> Result<()> {
        let output = Command::new("dpkg-deb").args(args).output()?;
        ensure!(output.status.success(), "dpkg-deb: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    };
    deb(&["-R".as_ref(), first.as_ref(), tree.as_ref()])?;
    let control = fs::read_to_string(tree.join("DEBIAN/control"))?;
    let lines =
        control.lines().map(|l| if l.starts_with("Version:") { format!("Version: {NEXT}") } else { l.to_owned() });
    fs::write(tree.join("DEBIAN/control"), lines.map(|l| l + "\n").collect::<String>())?;
    deb(&["-Zgzip".as_ref(), "-b".as_ref(), tree.as_ref(), next.as_ref()])?;
    Ok((first, next))
}

/// A booted machine with both packages in /root, the scripts, and `db` running. `None`: it was said why not.
fn machine() -> Result<Result<Machine, String>> {
    if let Some(why) = missing() {
        return Ok(Err(why));
    }
    let tarball = match tarball()? {
        Ok(tarball) => tarball,
        Err(why) => return Ok(Err(why)),
    };
    let folder = tempfile::tempdir()?;
    let (first, next) = packages(folder.path())?;
    let mut machine = Machine::new(&tarball)?;
    let _ = fs::copy(first, machine.path("root/first.deb"))?;
    let _ = fs::copy(next, machine.path("root/next.deb"))?;
    for (name, text) in [("server", SERVER), ("started", STARTED), ("ask", ASK), ("live", LIVE), ("denied", DENIED)] {
        machine.write(&format!("usr/local/lib/{name}.py"), text)?;
    }
    for (name, script, port) in [("db", "server", DB), ("live", "live", DB), ("denied", "denied", DB)] {
        let unit = format!("[Service]\nExecStart=/usr/bin/python3 /usr/local/lib/{script}.py {port}\n");
        machine.write(&format!("etc/systemd/system/{name}.service"), &unit)?;
    }
    machine.boot()?;
    let _ = machine.sh("systemctl start db.service")?;
    Ok(Ok(machine))
}

impl Machine {
    /// A question to a port from a unit of its own.
    fn ask(&self, unit: &str, port: u16) -> Result<String> {
        let ask = format!("systemd-run --quiet --pipe --wait --unit={unit} python3 /usr/local/lib/ask.py {port}");
        self.sh(&ask)
    }

    fn install(&self, package: &str) -> Result<String> {
        self.sh(&format!("DEBIAN_FRONTEND=noninteractive dpkg --install /root/{package}.deb"))
    }

    fn status(&self) -> Result<Value> {
        let text = self.sh("segfw status --output json || true")?;
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    /// Two numbers of a file in /run.
    fn counts(&self, name: &str) -> Result<(u64, u64)> {
        let text = self.sh(&format!("cat /run/{name}"))?;
        let mut numbers = text.split(' ').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(a)), Some(Ok(b))) => Ok((a, b)),
            _ => bail!("/run/{name}: {text:?}"),
        }
    }

    /// The policy is in force, and proven so: what it allows passes, what it does not does not.
    fn proves_enforcement(&self, when: &str) -> Result<()> {
        let (client, other) = (self.ask("client", DB)?, self.ask("other", DB)?);
        ensure!(client == "OK", "{when}: client to db should pass: {client}");
        ensure!(other.starts_with("ERR"), "{when}: other to db should not pass: {other}");
        Ok(())
    }

    /// The same without an agent, where `live.service` runs since before. Not by a new unit that is allowed: the machine
    /// is in a cgroup namespace, in which the kernel's paths of new cgroups are not ours, so it would count as host.
    fn goes_on(&self, when: &str) -> Result<()> {
        let other = self.ask("other", DB)?;
        ensure!(other.starts_with("ERR"), "{when}: other to db should not pass: {other}");
        let before = self.counts("live")?.0;
        wait("the live connection goes on", || Ok(self.counts("live")?.0 > before + 5)).context(when.to_owned())?;
        let (tries, passed) = self.counts("denied")?;
        ensure!(passed == 0, "{when}: {passed} of {tries} denied connections passed");
        Ok(())
    }

    /// Installs the first version with [`POLICY`] and waits until it is in force.
    fn enforces(&self) -> Result<()> {
        let open = self.ask("other", DB)?;
        ensure!(open == "OK", "without segfw all should pass: {open}");
        let said = self.install("first")?;
        ensure!(self.sh("systemctl is-active segfw.service")? == "active", "after installing: {said}");
        self.write("etc/segfw/policies/policy.yaml", POLICY)?;
        wait("the policy is in force", || {
            let status = self.status()?;
            Ok(status["state"] == "ENFORCING" && status["revision"]["files"][0] == "policy.yaml")
        })?;
        self.proves_enforcement("installed")
    }

    /// Link ids by hook. Not the tracepoint: its link cannot take another program and is replaced by each agent.
    fn links(&self) -> Result<Vec<(String, u64)>> {
        let status = self.status()?;
        let hooks = status["hooks"].as_array().context("hooks")?;
        let links = hooks.iter().filter(|h| h["name"] != "cgroup_made");
        Ok(links.filter_map(|h| Some((h["name"].as_str()?.to_owned(), h["link"].as_u64()?))).collect())
    }
}

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + SOON;
    loop {
        let last = done();
        if matches!(last, Ok(true)) {
            return Ok(());
        }
        if Instant::now() > until {
            return match last {
                Ok(_) => Err(anyhow::anyhow!("not within {} s: {what}", SOON.as_secs())),
                Err(error) => Err(error.context(format!("not within {} s: {what}", SOON.as_secs()))),
            };
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn life() -> Result<()> {
    let machine = match machine()? {
        Ok(machine) => machine,
        Err(why) => return crate::skip(why.to_string()),
    };
    machine.enforces()?;

    // An upgrade, under a connection that lives and one that is refused all the time.
    let _ = machine.sh("systemctl start live.service denied.service")?;
    wait("both are under way", || Ok(machine.counts("live")?.0 > 5 && machine.counts("denied")?.0 > 5))?;
    let (links, agent) = (machine.links()?, machine.status()?["agent"]["pid"].clone());
    let before = (machine.counts("live")?.0, machine.counts("denied")?.0);
    let _ = machine.install("next")?;
    let version = machine.sh("dpkg-query --show --showformat='${Version}' segfw")?;
    ensure!(version == NEXT, "the upgrade is not there: {version}");
    ensure!(machine.status()?["agent"]["pid"] != agent, "the upgrade did not restart the agent");
    wait(
        "both go on",
        || Ok(machine.counts("live")?.0 > before.0 + 20 && machine.counts("denied")?.0 > before.1 + 10),
    )?;
    ensure!(machine.links()? == links, "an upgrade made new links: {links:?}");
    let (answers, worst) = machine.counts("live")?;
    let (tries, passed) = machine.counts("denied")?;
    ensure!(passed == 0, "{passed} of {tries} denied connections passed");
    ensure!(worst < 2_000, "the live connection waited {worst} ms for one of {answers} answers");
    machine.proves_enforcement("upgraded")?;

    // Without a terminal a host is not opened.
    let said = machine.sh("DEBIAN_FRONTEND=noninteractive dpkg --remove segfw")?;
    ensure!(said.contains("STILL ENFORCED") && said.contains("rm /sys/fs/bpf/segfw"), "removing said: {said}");
    let _ = machine.sh("! systemctl is-active segfw.service && ! test -e /usr/bin/segfw")?;
    machine.goes_on("removed")?;

    // Back again, by itself: with its settings, its policy, its pins.
    let _ = machine.install("next")?;
    wait("it enforces again", || Ok(machine.status()?["state"] == "ENFORCING"))?;
    machine.proves_enforcement("installed again")?;

    // Opened, because it is written so.
    let _ = machine.sh("sed -i 's/^onRemove:.*/onRemove: open/' /etc/segfw/agent.yaml")?;
    let said = machine.sh("DEBIAN_FRONTEND=noninteractive dpkg --purge segfw")?;
    ensure!(said.contains("this host is open"), "purging said: {said}");
    let open = machine.ask("other", DB)?;
    ensure!(open == "OK", "purged with onRemove: open, and still refused: {open}");
    let left = machine.sh("ls -d /etc/segfw /var/lib/segfw /run/segfw /sys/fs/bpf/segfw 2>/dev/null || true")?;
    ensure!(left.is_empty(), "the purge left {left}");
    let units = machine.sh("find /etc/systemd/system -name 'segfw*'")?;
    ensure!(units.is_empty(), "the purge left {units}");
    Ok(())
}

fn units() -> Result<()> {
    let mut machine = match machine()? {
        Ok(machine) => machine,
        Err(why) => return crate::skip(why.to_string()),
    };
    machine.enforces()?;
    let line = machine.sh("systemctl show segfw.service --property=StatusText --value")?;
    ensure!(line.starts_with("ENFORCING: revision ") || line.contains("revision 1 "), "STATUS is {line:?}");
    let _ = machine.sh("systemctl reload segfw.service && systemctl is-active segfw.service")?;
    let exposure = machine.sh("systemd-analyze security --no-pager segfw.service | tail -n 1")?;
    let figure: f64 = exposure.split_whitespace().find_map(|w| w.parse().ok()).context(exposure.clone())?;
    ensure!(figure <= 4.0, "{exposure}");

    // A socket that systemd opens, in the cgroup of the .socket unit.
    machine.write("etc/systemd/system/started.socket", "[Socket]\nListenStream=127.0.0.1:7003\n")?;
    let service = "[Service]\nExecStart=/usr/bin/python3 /usr/local/lib/started.py\n";
    machine.write("etc/systemd/system/started.service", service)?;
    let _ = machine.sh("systemctl daemon-reload && systemctl start started.socket")?;
    wait("the socket answers", || Ok(machine.ask("client", 7003)? == "OK"))?;
    let other = machine.ask("other", 7003)?;
    ensure!(other.starts_with("ERR"), "a socket of systemd's is not enforced: {other}");

    // A unit of a user.
    let _ = machine.sh("systemctl start user@0.service && systemd-run --user --quiet --unit=mine python3 /usr/local/lib/server.py 7001")?;
    wait("the user's unit listens", || Ok(machine.ask("client", 7001)? == "OK"))?;
    // In this cgroup namespace the kernel knows no paths, so a new cgroup counts as host until the agent has seen it.
    wait("the agent sees the user's unit", || Ok(machine.sh("segfw workloads")?.contains("app.slice/mine.service")))?;
    let other = machine.ask("other", 7001)?;
    ensure!(other.starts_with("ERR"), "a user's unit is not enforced: {other}");

    // An agent that hangs is replaced; nothing passes meanwhile.
    machine.write("etc/systemd/system/segfw.service.d/watchdog.conf", "[Service]\nWatchdogSec=3s\n")?;
    let _ = machine.sh(
        "systemctl daemon-reload && systemctl restart segfw.service && systemctl start live.service denied.service",
    )?;
    wait("both are under way", || Ok(machine.counts("live")?.0 > 5 && machine.counts("denied")?.0 > 5))?;
    let links = machine.links()?;
    let _ = machine.sh("kill -STOP $(systemctl show segfw.service --property=MainPID --value)")?;
    machine.goes_on("with an agent that is stopped")?;
    wait("the watchdog has replaced the agent", || {
        let restarts = machine.sh("systemctl show segfw.service --property=NRestarts --value")?;
        Ok(restarts != "0" && machine.status()?["state"] == "ENFORCING")
    })?;
    let journal = machine.sh("journalctl --unit=segfw.service --output=cat --no-pager")?;
    ensure!(journal.contains("Watchdog timeout"), "restarted for another reason: {journal}");
    ensure!(machine.links()? == links, "the watchdog's restart made new links");
    ensure!(machine.sh("systemctl is-active live.service")? == "active", "the live connection ended");

    let _ = machine.sh("systemctl daemon-reexec")?;
    machine.proves_enforcement("after daemon-reexec")?;
    ensure!(machine.links()? == links, "daemon-reexec changed the links");
    machine.goes_on("after daemon-reexec")?;

    // Boot without an agent: the early loader alone, before the network.
    machine.write(
        "etc/systemd/system/soon.service",
        "[Unit]\nDefaultDependencies=no\nAfter=local-fs.target\nBefore=segfw-early.service\n[Service]\n\
         ExecStart=/usr/bin/python3 /usr/local/lib/server.py 7002\n[Install]\nWantedBy=sysinit.target\n",
    )?;
    let _ = machine.sh("systemctl enable soon.service && systemctl mask segfw.service && sync")?;
    machine.power_off()?;
    machine.boot()?;
    let _ = machine.sh("systemctl is-active segfw-early.service soon.service network-pre.target")?;
    let entered = |unit: &str| -> Result<u64> {
        let show = format!("systemctl show {unit} --property=ActiveEnterTimestampMonotonic --value");
        machine.sh(&show)?.parse().with_context(|| unit.to_owned())
    };
    ensure!(entered("segfw-early.service")? <= entered("network-pre.target")?, "the network did not wait");
    let (client, other) = (machine.ask("client", 7002)?, machine.ask("other", 7002)?);
    ensure!(other.starts_with("ERR"), "after boot, without an agent, other to soon passed: {other} (client: {client})");
    let _ = machine.sh("systemctl unmask segfw.service && systemctl start segfw.service db.service")?;
    machine.proves_enforcement("after boot, with an agent")?;

    // Nothing to load and nothing saved: boot is not held up, and it is said what that means.
    let _ = machine.sh(
        "systemctl stop segfw.service && rm -rf /sys/fs/bpf/segfw /var/lib/segfw/* && echo 'kind: Nonsense' > /etc/segfw/policies/policy.yaml",
    )?;
    let start = Instant::now();
    let _ = machine.sh("systemctl start segfw.service && systemctl is-active segfw.service")?;
    ensure!(start.elapsed() < Duration::from_secs(10), "an agent with nothing to load held up its start");
    let line = machine.sh("systemctl show segfw.service --property=StatusText --value")?;
    ensure!(line.starts_with("OPEN: no revision"), "STATUS is {line:?}");
    let said = machine.sh("segfw load --pin-dir /sys/fs/bpf/nobody")?;
    ensure!(said.contains("nothing to load"), "{said}");
    Ok(())
}
