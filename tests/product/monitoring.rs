//! Metrics and health, read by the real Prometheus; its rules and our dashboard against what it has scraped.

use crate::scene::{OPEN, SHUT, Scene, free_port, until};
use crate::{Test, skip};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub(crate) fn tests() -> Vec<Test> {
    vec![
        ("metrics: health and readiness say what is so", health),
        ("metrics: promtool accepts the page and the rules", promtool),
        ("metrics: prometheus scrapes, the rules load, every panel has data", prometheus),
    ]
}

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

fn installed(name: &str) -> bool {
    Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// A plain GET: (status, body).
fn get(port: u16, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}

fn scene(settings: &str) -> Result<(Scene, u16)> {
    let port = free_port()?;
    let scene = Scene::new(settings, &["--metrics".to_owned(), format!("127.0.0.1:{port}")])?;
    let _ = until("the page is served", 10, || Ok(get(port, "/healthz").ok()))?;
    Ok((scene, port))
}

const SETTINGS: &str = "flows: {spool: {dir: \"@FOLDER@/flows\"}}\n";

fn health() -> Result<()> {
    let (mut scene, port) = scene("")?;
    ensure!(get(port, "/healthz")?.0 == 200, "not alive");
    let (status, body) = get(port, "/readyz")?;
    ensure!(status == 200 && body.starts_with("ENFORCING: revision 1"), "{status} {body}");
    ensure!(get(port, "/other")?.0 == 404, "a page that is not there");
    // A revision that is refused leaves the last one in force: ready, and said.
    scene.agent.write("kind: Nonsense\n")?;
    scene.agent.wait_until("refused", |status| status["state"] == "DEGRADED")?;
    let (status, body) = get(port, "/readyz")?;
    ensure!(status == 200 && body.starts_with("DEGRADED"), "{status} {body}");
    let page = get(port, "/metrics")?.1;
    for line in [
        "segfw_policy_refused 1.0",
        "segfw_policy_revision{state=\"applied\"} 1.0",
        "segfw_policy_revision{state=\"wanted\"} 2.0",
        "segfw_state{state=\"DEGRADED\"} 1.0",
        "segfw_troubles{kind=\"refused\"} 1.0",
    ] {
        ensure!(page.lines().any(|l| l == line), "no {line} in\n{page}");
    }
    // Silent callers fill the room and are not served; those that are done make room.
    let silent: Vec<_> = (0..16).map(|_| TcpStream::connect(("127.0.0.1", port))).collect::<Result<_, _>>()?;
    scene.connect(OPEN, 1)?;
    drop(silent);
    ensure!(until("there is room again", 10, || Ok(get(port, "/healthz").ok()))?.0 == 200, "not alive");
    // An agent with nothing in force is not ready.
    drop(scene);
    open_host()
}

/// A policy that is wrong from the start.
fn open_host() -> Result<()> {
    let port = free_port()?;
    let world = segfw_tests::world::World::new(&[])?;
    let args = ["--metrics".to_owned(), format!("127.0.0.1:{port}")];
    let mut agent = segfw_tests::agent::Agent::prepare(&world, "kind: Nonsense\n", &args)?;
    agent.spawn()?;
    let body = until("it says why it is not ready", 15, || {
        let (status, body) = get(port, "/readyz")?;
        Ok((status == 503).then_some(body))
    })?;
    ensure!(body.starts_with("OPEN: "), "{body}");
    ensure!(get(port, "/healthz")?.0 == 200, "OPEN is alive all the same");
    Ok(())
}

fn promtool() -> Result<()> {
    if !installed("promtool") {
        return skip("no promtool here (Debian: package prometheus)");
    }
    let run = |args: &[&str], input: Option<&str>| -> Result<String> {
        let mut child = Command::new("promtool")
            .args(args)
            .current_dir(deploy("prometheus"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("stdin")?.write_all(input.unwrap_or_default().as_bytes())?;
        let output = child.wait_with_output()?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "promtool {args:?}: {said}");
        Ok(said)
    };
    let _ = run(&["check", "rules", "segfw.rules.yaml"], None)?;
    let _ = run(&["test", "rules", "segfw.rules.test.yaml"], None)?;
    let (mut scene, port) = scene(SETTINGS)?;
    scene.connect(OPEN, 3)?;
    let page = get(port, "/metrics")?.1;
    let said = run(&["check", "metrics"], Some(&page))?;
    ensure!(said.trim().is_empty(), "promtool has remarks: {said}");
    Ok(())
}

/// A Prometheus that scrapes one agent every second.
struct Prometheus {
    child: Child,
    port: u16,
    _data: tempfile::TempDir,
}

impl Prometheus {
    fn start(target: u16) -> Result<Self> {
        let data = tempfile::tempdir()?;
        let port = free_port()?;
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
             rule_files: [\"{}\"]\n\
             scrape_configs: [{{job_name: segfw, static_configs: [{{targets: [\"127.0.0.1:{target}\"]}}]}}]\n",
            deploy("prometheus/segfw.rules.yaml").canonicalize()?.display()
        );
        let path = data.path().join("prometheus.yml");
        std::fs::write(&path, config)?;
        let mut command = Command::new("prometheus");
        let child = segfw_tests::world::with_signals(&mut command)
            .arg(format!("--config.file={}", path.display()))
            .arg(format!("--storage.tsdb.path={}", data.path().join("tsdb").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(data.path().join("log"))?)
            .spawn()
            .context("starting prometheus")?;
        let mut prometheus = Self { child, port, _data: data };
        until("prometheus is ready", 30, || {
            if let Some(status) = prometheus.child.try_wait()? {
                bail!("prometheus ended: {status}");
            }
            Ok(get(port, "/-/ready").ok().filter(|(status, _)| *status == 200))
        })?;
        Ok(prometheus)
    }

    fn api(&self, path: &str) -> Result<Value> {
        let (status, body) = get(self.port, path)?;
        let body: Value = serde_json::from_str(&body).with_context(|| format!("{path}: {status} {body}"))?;
        ensure!(body["status"] == "success", "{path}: {body}");
        Ok(body["data"].clone())
    }

    /// The vector that an expression gives now.
    fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let data = self.api(&format!("/api/v1/query?query={}", escape(expression)))?;
        Ok(data["result"].as_array().cloned().unwrap_or_default())
    }

    fn number(&self, expression: &str) -> Result<f64> {
        let found = self.query(expression)?;
        let value = found.first().and_then(|v| v["value"][1].as_str()).with_context(|| expression.to_owned())?;
        Ok(value.parse()?)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn escape(text: &str) -> String {
    text.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

/// Every expression of the dashboard, as Grafana would send it.
fn expressions() -> Result<Vec<(String, String)>> {
    let text = std::fs::read_to_string(deploy("grafana/segfw.json"))?;
    let dashboard: Value = serde_json::from_str(&text).context("deploy/grafana/segfw.json")?;
    let mut all = Vec::new();
    for panel in dashboard["panels"].as_array().context("no panels")? {
        let title = panel["title"].as_str().context("a panel without a title")?;
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().with_context(|| format!("{title} has no expr"))?;
            let expression = expression.replace("$__rate_interval", "10s").replace("$instance", ".*");
            all.push((title.to_owned(), expression));
        }
    }
    ensure!(all.len() >= 12, "only {} expressions", all.len());
    Ok(all)
}

fn prometheus() -> Result<()> {
    if !installed("prometheus") {
        return skip("no prometheus here (Debian: package prometheus)");
    }
    let (mut scene, port) = scene(SETTINGS)?;
    let prometheus = Prometheus::start(port)?;
    until("the agent is up", 20, || Ok((prometheus.number("up{job=\"segfw\"}")? == 1.0).then_some(())))?;
    let of = |verdict: &str| format!("sum(segfw_verdicts_total{{verdict=\"{verdict}\"}})");
    let allowed = prometheus.number(&of("ALLOWED"))?;
    let denied = prometheus.number(&of("DENIED"))?;
    scene.connect(OPEN, 10)?;
    scene.connect(SHUT, 7)?;
    until("the counters have moved", 20, || {
        // Both ends of an allowed flow are of this host.
        let (a, d) = (prometheus.number(&of("ALLOWED"))?, prometheus.number(&of("DENIED"))?);
        Ok((a >= allowed + 20.0 && d == denied + 7.0).then_some(()))
    })?;
    ensure!(prometheus.number("segfw_state{state=\"ENFORCING\"}")? == 1.0, "not ENFORCING");
    ensure!(prometheus.number("sum(segfw_hook_attached == 0) or vector(0)")? == 0.0, "a hook is missing");
    let kernel = scene.counter("events-sent")? as f64;
    until("events are counted", 20, || Ok((prometheus.number("segfw_events_total")? >= kernel).then_some(())))?;
    // The rules.
    let groups = prometheus.api("/api/v1/rules")?["groups"].clone();
    let rules: Vec<Value> =
        groups.as_array().context("groups")?.iter().flat_map(|g| g["rules"].as_array().cloned()).flatten().collect();
    ensure!(rules.len() >= 8, "{} rules", rules.len());
    for rule in &rules {
        until("the rule is evaluated", 20, || {
            let groups = prometheus.api("/api/v1/rules")?["groups"].clone();
            let all: Vec<Value> = groups
                .as_array()
                .context("groups")?
                .iter()
                .flat_map(|g| g["rules"].as_array().cloned())
                .flatten()
                .collect();
            Ok(all.iter().find(|r| r["name"] == rule["name"]).filter(|r| r["health"] == "ok").map(drop))
        })
        .with_context(|| rule["name"].to_string())?;
        for key in ["summary", "description"] {
            ensure!(rule["annotations"][key].is_string(), "{} has no {key}", rule["name"]);
        }
        ensure!(rule["state"] == "inactive", "{} is {} on a healthy host", rule["name"], rule["state"]);
    }
    // The dashboard. A rate needs two scrapes, and something that happens between them.
    let expressions = expressions()?;
    for (title, expression) in &expressions {
        until(&format!("panel {title:?} has data: {expression}"), 20, || {
            scene.connect(OPEN, 1)?;
            let data = prometheus.query(expression)?;
            Ok((!data.is_empty()).then_some(()))
        })?;
    }
    println!("        {} rules, {} dashboard expressions", rules.len(), expressions.len());
    Ok(())
}
