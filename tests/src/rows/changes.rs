//! Rows about change: a reload under a connected datagram socket, other labels on a running workload, a cgroup that is
//! made anew while no agent runs; and the outer wall, which needs an agent in the namespace of its interface.

use super::{addresses, families, flow, pair, tcp};
use crate::actor::{Actor, domain_of, wildcard};
use crate::or_outcome;
use crate::policy::Yaml;
use crate::table::{Expect, Family, Group, Outcome, Probe, Proto, Row, Shot, Stage, refusal};
use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

const PORT: u16 = 5000;
const OTHER: u16 = 5001;

pub(super) fn groups() -> Vec<Group> {
    vec![relabel(), remade(), reload(), outer_wall()]
}

fn custom(run: fn(&mut Stage, &Shot) -> Result<Outcome>, row: Row) -> Row {
    Row { probe: Probe::Custom(run), ..row }
}

fn client(name: &str, rows: Vec<Row>) -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("cli", &[]).segment("srv", &addresses(1), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{PORT}, udp/{PORT}"));
    pair(name, "managed/cli", "outside/srv", yaml.0, rows)
}

// ---- Other labels on a running workload.

fn relabel() -> Group {
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        rows.push(Row { family, ..custom(no_window, tcp("relabelled-denied-all-the-while", OTHER, Expect::Eperm)) });
        rows.push(Row { family, ..custom(no_gap, tcp("relabelled-allowed-all-the-while", PORT, Expect::Open)) });
    }
    client("relabel", rows)
}

/// Connects again and again while the labels of the client change three times. What every attempt gave.
fn while_relabelling(stage: &mut Stage, shot: &Shot) -> Result<Vec<Outcome>> {
    let dst = stage.address(shot, "b");
    let listener = stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    let mut seen = Vec::new();
    for round in 0..3 {
        if shot.enforced {
            let extra = format!("labels: {{round: r{round}, app: cli}}");
            let policy = stage.policy.replace("labels: {app: cli}", &extra);
            stage.agent()?.write(&policy)?;
        }
        let end = Instant::now() + Duration::from_millis(if shot.enforced { 900 } else { 10 });
        while Instant::now() < end {
            let cli = stage.actor("cli");
            let h = cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
            let outcome = match cli.connect(h, dst, shot.ms)? {
                Ok(()) => Outcome::Open,
                Err(e) => refusal(&e),
            };
            cli.close(h)?;
            if outcome == Outcome::Open {
                let srv = stage.actor("srv");
                if let Ok(peer) = srv.accept(listener, shot.ms)? {
                    srv.close(peer)?;
                }
            }
            seen.push(outcome);
        }
    }
    for name in ["cli", "srv"] {
        stage.actor(name).ask(&crate::proto::Cmd::CloseAll)?;
    }
    if shot.enforced {
        let policy = stage.policy.clone();
        stage.agent()?.write(&policy)?;
        std::thread::sleep(Duration::from_millis(900));
    }
    Ok(seen)
}

fn all_alike(seen: Vec<Outcome>) -> Outcome {
    let first = seen.first().cloned().unwrap_or(Outcome::Silent);
    match seen.iter().position(|o| *o != first) {
        None => first,
        Some(at) => Outcome::Other(format!("{first:?}, and at attempt {at} of {} {:?}", seen.len(), seen[at])),
    }
}

fn no_window(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    while_relabelling(stage, shot).map(all_alike)
}

fn no_gap(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    while_relabelling(stage, shot).map(all_alike)
}

// ---- A unit is restarted while no agent runs.

fn remade() -> Group {
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        rows.push(Row { family, ..custom(made_anew, tcp("remade-without-agent-denied", OTHER, Expect::Eperm)) });
        rows.push(Row { family, ..custom(made_anew, tcp("remade-without-agent-allowed", PORT, Expect::Open)) });
    }
    let mut group = client("remade", rows);
    group.policy = group.policy.replace("/cli\"}]", "/{cli,again}\"}]");
    group.actors.push(("again", "managed/again", "a"));
    group
}

/// The agent is killed, the cgroup removed and made again, and its first process connects at once.
fn made_anew(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let dst = stage.address(shot, "b");
    let listener = stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    if shot.enforced {
        stage.agent()?.kill()?;
    }
    let cgroup = stage.world.cgroup("managed/again")?;
    stage.end("again");
    let end = Instant::now() + Duration::from_secs(3);
    while std::fs::remove_dir(&cgroup).is_err() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    anyhow::ensure!(!cgroup.exists(), "the cgroup is still in use");
    let mut again =
        Actor::spawn(&stage.world, "again", "managed/again", "a").context("the process that starts again")?;
    let h = again.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
    let result = again.connect(h, dst, shot.ms)?;
    stage.actor("srv").close(listener)?;
    stage.put("again", again);
    if shot.enforced {
        stage.agent()?.launch()?;
    }
    or_outcome!(result, refusal);
    Ok(Outcome::Open)
}

// ---- A reload under a connected datagram socket.

fn reload() -> Group {
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        let row = flow("answer-after-a-reload", Proto::UdpConnected, PORT, Expect::Open);
        rows.push(Row { family, ..custom(answer_after_reload, row) });
        rows.push(Row { family, ..flow("never-allowed", Proto::UdpConnected, OTHER, Expect::Eperm) });
    }
    client("reload-connected-udp", rows)
}

/// The client asks, the policy changes in another place, the server answers: the answer belongs to the question.
fn answer_after_reload(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let dst = stage.address(shot, "b");
    let listener = stage.actor("srv").listen_udp(dst)?;
    let cli = stage.actor("cli");
    let h = cli.socket(domain_of(dst.ip()), libc::SOCK_DGRAM, 0)?.map_err(anyhow::Error::msg)?;
    or_outcome!(cli.connect(h, dst, shot.ms)?, refusal);
    or_outcome!(cli.send(h, "question")?, refusal);
    let asked = or_outcome!(stage.actor("srv").recv(listener, 3000)?, refusal);
    let from: SocketAddr = asked.from.parse().context("the client's address")?;
    if shot.enforced {
        let other = stage.policy.replace(&format!("udp/{PORT}"), &format!("udp/{PORT}, udp/{}", shot.port + 900));
        stage.agent()?.reload(&other)?;
    }
    or_outcome!(stage.actor("srv").send_to(listener, from, "answer")?, refusal);
    let got = stage.actor("cli").recv(h, shot.ms)?;
    if shot.enforced {
        let policy = stage.policy.clone();
        stage.agent()?.reload(&policy)?;
    }
    for name in ["cli", "srv"] {
        stage.actor(name).ask(&crate::proto::Cmd::CloseAll)?;
    }
    let got = or_outcome!(got, refusal);
    Ok(if got.data == "answer" { Outcome::Open } else { Outcome::Other(got.data) })
}

// ---- The outer wall.

fn outer_wall() -> Group {
    let mut yaml = Yaml::default();
    yaml.enforced("srv", &[]).segment("cli", &addresses(0), &[]);
    yaml.allow("open", "cli", "srv", &format!("tcp/{PORT}, udp/{PORT}"));
    yaml.rule("loud", crate::policy::at("application", 50), "cli", "srv", "ports: [tcp/5002], action: reject");
    let mut rows = Vec::new();
    let ingress = |row: Row| Row { direction: "ingress", ..row };
    for proto in [Proto::Tcp, Proto::Udp, Proto::UdpConnected] {
        rows.extend(families(&ingress(flow("wall-allowed", proto, PORT, Expect::Open))));
        rows.extend(families(&ingress(flow("wall-denied", proto, OTHER, Expect::Silent))));
    }
    rows.extend(families(&ingress(tcp("wall-leaves-reject-to-the-socket", 5002, Expect::Reject))));
    for family in [Family::V4, Family::V6] {
        rows.push(Row {
            family,
            ..ingress(custom(dropped_outside, tcp("wall-drops-before-the-socket", 5003, Expect::Silent)))
        });
    }
    Group {
        // The wall stands in the agent's own namespace.
        agent_args: vec!["--netns=b".into(), "--xdp".into(), "eth0".into()],
        ..pair("outer-wall", "outside/cli", "managed/srv", yaml.0, rows)
    }
}

/// A refused SYN is counted by XDP: it never came to the socket.
fn dropped_outside(stage: &mut Stage, shot: &Shot) -> Result<Outcome> {
    let dst = stage.address(shot, "b");
    let listener = stage.actor("srv").listen_tcp(SocketAddr::new(wildcard(dst.ip()), shot.port))?;
    let dropped = |stage: &mut Stage| -> Result<u64> {
        if !shot.enforced {
            return Ok(0);
        }
        let status = stage.agent()?.status()?;
        status["counters"]["named"]["xdp-dropped"].as_u64().context("no counter xdp-dropped in the status")
    };
    let before = dropped(stage)?;
    let cli = stage.actor("cli");
    let h = cli.socket(domain_of(dst.ip()), libc::SOCK_STREAM, 0)?.map_err(anyhow::Error::msg)?;
    let result = cli.connect(h, dst, shot.ms)?;
    cli.close(h)?;
    stage.actor("srv").close(listener)?;
    let outcome = result.map_or_else(|e| refusal(&e), |()| Outcome::Open);
    if outcome != Outcome::Silent {
        return Ok(outcome);
    }
    let after = dropped(stage)?;
    Ok(if after > before {
        Outcome::Silent
    } else {
        Outcome::Other(format!("refused, but not by the wall ({before} then {after})"))
    })
}
