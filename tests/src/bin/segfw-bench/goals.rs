//! What segfw wants to be, beside what it is. A goal missed is shown as missed; no test depends on one.

use crate::result::{Cost, Results, Spread};

pub(crate) struct Goal {
    pub(crate) what: &'static str,
    /// In words, with its number.
    pub(crate) measured: String,
    met: Met,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Met {
    Yes,
    No,
    /// No firewall differs from itself by more than what is between the figure and the goal.
    Noise,
    Unknown,
}

impl Met {
    fn of(value: Option<f64>, limit: f64, noise: f64) -> Self {
        match value {
            None => Self::Unknown,
            Some(v) if (v - limit).abs() < noise => Self::Noise,
            Some(v) if v <= limit => Self::Yes,
            Some(_) => Self::No,
        }
    }
}

impl Goal {
    pub(crate) fn verdict(&self) -> &'static str {
        match self.met {
            Met::Yes => "met",
            Met::No => "**missed**",
            Met::Noise => "too close to the noise to say",
            Met::Unknown => "not measured",
        }
    }
}

/// Hook calls of an exchange: two packets arrive, each at a socket.
const PACKETS: f64 = 2.0;

type Pick = fn(&Cost) -> f64;

/// The median over all sizes of policy, on loopback: what is measured with each size is one more measurement of the same.
fn middle(results: &Results, work: &str, peer: &str, pick: Pick) -> Option<f64> {
    let of = |c: &&Cost| c.place == "loopback" && c.work == work && c.peer == peer;
    Spread::of(results.costs.iter().filter(of).map(pick).collect()).map(|s| s.median)
}

/// How far no firewall is from itself, the worst of all sizes.
fn noise(results: &Results, work: &str, pick: Pick) -> f64 {
    let of = |c: &&Cost| c.place == "loopback" && c.work == work && c.peer == "none-again";
    results.costs.iter().filter(of).map(|c| (pick(c) - 1.0).abs()).fold(0.0, f64::max)
}

/// All of them, in the order in which they are promised.
pub(crate) fn all(times: &Results, counts: Option<&Results>) -> Vec<Goal> {
    let mut goals = Vec::new();
    // Instructions decide where they were counted; caches and mitigations are in the times only, which stand beside them.
    let mut ratio = |what, work: &str, peer: &str, limit: f64| {
        let time = middle(times, work, peer, |c| c.ratio_of_cpu);
        let count = counts.and_then(|c| middle(c, work, peer, |c| c.ratio));
        let mut words = Vec::new();
        words.extend(count.map(|r| format!("{r:.4} (instructions)")));
        words.extend(time.map(|r| format!("{r:.3} (CPU time)")));
        let met = match (count, counts) {
            (Some(_), Some(counts)) => Met::of(count, limit, noise(counts, work, |c| c.ratio)),
            _ => Met::of(time, limit, noise(times, work, |c| c.ratio_of_cpu)),
        };
        goals.push(Goal { what, measured: words.join(", "), met });
    };
    ratio(
        "established TCP exchange, gate conn: at most 1.005 of no firewall (instructions)",
        "rr",
        "segfw-conn",
        1.005,
    );
    ratio("established TCP exchange, gate skb: at most 1.03 of no firewall", "rr", "segfw-skb", 1.03);
    ratio("connect, accept, close, gate skb, logging on: at most 1.05 of no firewall", "crr", "segfw-skb", 1.05);
    ratio("connect, accept, close, gate conn, logging on: at most 1.05 of no firewall", "crr", "segfw-conn", 1.05);
    let above = |results: &Results, pick: Pick| {
        let floor = middle(results, "rr", "empty-cgroup-skb", pick)?;
        Some((middle(results, "rr", "segfw-skb", pick)? - floor) / PACKETS)
    };
    let ns = above(times, |c| c.cpu.min);
    // The same two percent of an exchange are tens of nanoseconds.
    let unsure =
        noise(times, "rr", |c| c.ratio_of_cpu) * middle(times, "rr", "none", |c| c.cpu.min).unwrap_or(0.0) / PACKETS;
    let mut words: Vec<String> =
        ns.map(|n| format!("{n:.1} ns (CPU time, noise {unsure:.0} ns)")).into_iter().collect();
    words.extend(counts.and_then(|c| above(c, |c| c.wall.min)).map(|n| format!("{n:.0} instructions")));
    goals.push(Goal {
        what: "gate skb above an empty cgroup_skb program: at most 10 ns per packet",
        measured: words.join(", "),
        met: Met::of(ns, 10.0, unsure),
    });
    let over = |results: &Results, pick: Pick| {
        let all: Vec<f64> = results
            .costs
            .iter()
            .filter(|c| c.place == "loopback" && c.work == "crr" && c.peer == "segfw-skb")
            .map(pick)
            .collect();
        let (low, high) = all.iter().fold((f64::MAX, 0.0f64), |(l, h), v| (l.min(*v), h.max(*v)));
        (all.len() > 1).then_some((high / low - 1.0) * 100.0)
    };
    // The ratio, not the time: sizes are measured one after the other, and the machine is not the same all the time.
    let flat = over(times, |c| c.ratio_of_cpu);
    let mut words: Vec<String> = flat.map(|p| format!("{p:.1} % (CPU time)")).into_iter().collect();
    let counted = counts.and_then(|c| Some((over(c, |c| c.ratio)?, noise(c, "crr", |c| c.ratio) * 100.0)));
    words.extend(counted.map(|(p, _)| format!("{p:.2} % (instructions)")));
    goals.push(Goal {
        what: "cost of a decision from the smallest to the largest policy: flat within 10 %",
        measured: words.join(", "),
        met: match counted {
            Some((percent, unsure)) => Met::of(Some(percent), 10.0, unsure),
            None => Met::of(flat, 10.0, noise(times, "crr", |c| c.ratio_of_cpu) * 100.0),
        },
    });
    let mut figure = |goal, work: &str, what: &str, limit: f64| {
        let found = times.figures.iter().filter(|f| f.work == work && f.what.starts_with(what));
        // The largest size is the one that is promised.
        let found = found.max_by_key(|f| f.size);
        goals.push(Goal {
            what: goal,
            measured: found.map_or(String::new(), |f| {
                let size = if f.size == 0 { String::new() } else { format!(", size {}", f.size) };
                format!("{:.2} {} (median{size})", f.value.median, f.unit)
            }),
            met: Met::of(found.map(|f| f.value.median), limit, 0.0),
        });
    };
    figure(
        "parse and compile 100,000 rules: below 1 s",
        "compile",
        "parse + resolve + compile, rules by address",
        1_000.0,
    );
    figure("publish 100,000 entries: below 200 ms", "publish", "publish", 200.0);
    figure(
        "one-rule change among 100,000: below 20 ms from the file to enforced",
        "change",
        "file changed to rule enforced (a connection opens)",
        20.0,
    );
    figure(
        "sweep of 10,000 live connections: below 500 ms",
        "sweep",
        "new connections refused to the last live one cut",
        500.0,
    );
    let idle =
        |what: &str| times.figures.iter().filter(|f| f.work == "memory" && f.what == what).min_by_key(|f| f.size);
    for (goal, what, limit) in [
        ("agent, idle: below 30 MiB", "agent, resident, after its first revision", 30.0),
        ("agent, idle: below 0.1 % of a core", "agent, CPU while nothing happens", 0.1),
    ] {
        let found = idle(what);
        goals.push(Goal {
            what: goal,
            measured: found.map_or(String::new(), |f| format!("{:.2} {} ({} rules)", f.value.median, f.unit, f.size)),
            met: Met::of(found.map(|f| f.value.median), limit, 0.0),
        });
    }
    let busy =
        times.figures.iter().find(|f| f.work == "agent-cpu" && f.what.starts_with("CPU") && f.what.ends_with("memory"));
    goals.push(Goal {
        what: "agent at 10,000 new connections per second: below 15 % of a core",
        measured: busy
            .map_or(String::new(), |f| format!("{:.1} % of a core (median, records in memory)", f.value.median)),
        met: Met::of(busy.map(|f| f.value.median), 15.0, 0.0),
    });
    goals
}
