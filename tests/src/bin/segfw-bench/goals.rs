//! What segfw wants to be, beside what it is. A goal missed is shown as missed; no test depends on one.

use crate::result::{Cost, Results};

pub(crate) struct Goal {
    pub(crate) what: &'static str,
    /// In words, with its number.
    pub(crate) measured: String,
    /// `None` = not measured.
    met: Option<bool>,
}

impl Goal {
    pub(crate) fn verdict(&self) -> &'static str {
        match self.met {
            Some(true) => "met",
            Some(false) => "**missed**",
            None => "not measured",
        }
    }
}

/// Hook calls of an exchange: two packets arrive, each at a socket.
const PACKETS: f64 = 2.0;

fn cost<'a>(results: &'a Results, work: &str, peer: &str, rules: Option<u64>) -> Option<&'a Cost> {
    let found = results.costs.iter().filter(|c| c.place == "loopback" && c.work == work && c.peer == peer);
    match rules {
        Some(n) => found.into_iter().find(|c| c.rules == n),
        None => found.min_by_key(|c| c.rules),
    }
}

/// All of them, in the order in which they are promised.
pub(crate) fn all(times: &Results, counts: Option<&Results>) -> Vec<Goal> {
    let mut goals = Vec::new();
    let mut ratio = |what, work: &str, peer: &str, limit: f64, counted: bool| {
        let time = cost(times, work, peer, None).map(|c| c.ratio_of_cpu);
        let count = counts.and_then(|c| cost(c, work, peer, None)).map(|c| c.ratio);
        let mut words = Vec::new();
        words.extend(count.map(|r| format!("{r:.4} (instructions)")));
        words.extend(time.map(|r| format!("{r:.3} (CPU time)")));
        let judged = if counted { count.or(time) } else { time.or(count) };
        goals.push(Goal { what, measured: words.join(", "), met: judged.map(|r| r <= limit) });
    };
    ratio(
        "established TCP exchange, gate conn: at most 1.005 of no firewall (instructions)",
        "rr",
        "segfw-conn",
        1.005,
        true,
    );
    ratio("established TCP exchange, gate skb: at most 1.03 of no firewall", "rr", "segfw-skb", 1.03, false);
    ratio("connect, accept, close, gate skb, logging on: at most 1.05 of no firewall", "crr", "segfw-skb", 1.05, false);
    ratio(
        "connect, accept, close, gate conn, logging on: at most 1.05 of no firewall",
        "crr",
        "segfw-conn",
        1.05,
        false,
    );
    let above = |results: &Results, pick: fn(&Cost) -> f64| {
        let (ours, floor) = (cost(results, "rr", "segfw-skb", None)?, cost(results, "rr", "empty-cgroup-skb", None)?);
        Some((pick(ours) - pick(floor)) / PACKETS)
    };
    let ns = above(times, |c| c.cpu.min);
    let mut words: Vec<String> = ns.map(|n| format!("{n:.1} ns (CPU time)")).into_iter().collect();
    words.extend(counts.and_then(|c| above(c, |c| c.wall.min)).map(|n| format!("{n:.0} instructions")));
    goals.push(Goal {
        what: "gate skb above an empty cgroup_skb program: at most 10 ns per packet",
        measured: words.join(", "),
        met: ns.map(|n| n <= 10.0),
    });
    let over = |results: &Results, pick: fn(&Cost) -> f64| {
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
    words.extend(counts.and_then(|c| over(c, |c| c.ratio)).map(|p| format!("{p:.2} % (instructions)")));
    goals.push(Goal {
        what: "cost of a decision from the smallest to the largest policy: flat within 10 %",
        measured: words.join(", "),
        met: flat.map(|p| p <= 10.0),
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
            met: found.map(|f| f.value.median < limit),
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
            met: found.map(|f| f.value.median < limit),
        });
    }
    let busy =
        times.figures.iter().find(|f| f.work == "agent-cpu" && f.what.starts_with("CPU") && f.what.ends_with("memory"));
    goals.push(Goal {
        what: "agent at 10,000 new connections per second: below 15 % of a core",
        measured: busy
            .map_or(String::new(), |f| format!("{:.1} % of a core (median, records in memory)", f.value.median)),
        met: busy.map(|f| f.value.median < 15.0),
    });
    goals
}
