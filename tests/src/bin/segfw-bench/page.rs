//! The page and the plots, made of the JSON alone.

use crate::goals;
use crate::peers::Kind;
use crate::result::{Cost, Results};
use anyhow::{Context, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// File of a run on the machine as it is.
pub(crate) const TIMES: &str = "bench.json";
/// File of a run in a guest that counts instructions.
pub(crate) const COUNTS: &str = "instructions.json";

/// The policy whose figures stand in the first plot and table, where it was measured.
const USUAL: u64 = 1_000;
const WORKS: [(&str, &str); 4] = [
    ("rr", "request and response"),
    ("crr", "connect, accept, close"),
    ("udp", "datagram and answer"),
    ("stream", "stream, 64 KiB"),
];
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const OURS_QUIET: RGBColor = RGBColor(0x7f, 0xb3, 0xdd);
const FLOOR: RGBColor = RGBColor(0x9a, 0xa5, 0xb1);
const OTHERS: RGBColor = RGBColor(0xd6, 0x8a, 0x3c);
const INK: RGBColor = RGBColor(0x22, 0x2b, 0x36);
const FAINT: RGBColor = RGBColor(0xd5, 0xda, 0xe0);

/// Writes README.md and the plots beside the JSON files in `dir`.
pub(crate) fn render(dir: &Path) -> Result<()> {
    let read = |name: &str| -> Result<Option<Results>> {
        match fs::read(dir.join(name)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| name.to_owned()),
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("{name} is of another version")).map(Some)
            }
        }
    };
    let times = read(TIMES)?.with_context(|| format!("{} is missing", dir.join(TIMES).display()))?;
    let counts = read(COUNTS)?;
    for place in ["loopback", "veth"] {
        if !of(&times, place, usual(&times)).is_empty() {
            ratios(&times, place, &dir.join(format!("ratio-{place}.svg")))?;
            growth(&times, place, &dir.join(format!("rules-{place}.svg")))?;
        }
    }
    fs::write(dir.join("README.md"), page(&times, counts.as_ref())?)?;
    Ok(())
}

/// The size for what shows one size.
fn usual(results: &Results) -> u64 {
    let mut sizes: Vec<u64> = results.costs.iter().map(|c| c.rules).collect();
    sizes.sort_unstable();
    if sizes.contains(&USUAL) { USUAL } else { sizes.first().copied().unwrap_or(USUAL) }
}

fn of<'a>(results: &'a Results, place: &str, rules: u64) -> Vec<&'a Cost> {
    results.costs.iter().filter(|c| c.place == place && c.rules == rules).collect()
}

fn colour(peer: &str) -> RGBColor {
    match peer {
        "segfw-skb-quiet" | "segfw-conn-quiet" => OURS_QUIET,
        p if p.starts_with("segfw") => OURS,
        "none" | "none-again" | "empty-cgroup-skb" => FLOOR,
        _ => OTHERS,
    }
}

fn font(size: i32, at: HPos) -> TextStyle<'static> {
    let style = ("sans-serif", size).into_font().color(&INK);
    style.pos(Pos::new(at, VPos::Center))
}

/// One panel for each work, one bar for each peer: how many times the cost of no firewall.
fn ratios(results: &Results, place: &str, path: &Path) -> Result<()> {
    const NAMES: i32 = 190;
    const ROW: i32 = 26;
    const PANEL: i32 = 215;
    const HEAD: i32 = 92;
    let rules = usual(results);
    let rows = of(results, place, rules);
    let peers: Vec<&str> = Kind::ALL
        .iter()
        .map(|k| k.name())
        .filter(|p| *p != "none" && rows.iter().any(|c| c.peer == *p && c.work != "syn-flood" && c.work != "udp-flood"))
        .collect();
    let works: Vec<_> = WORKS.iter().filter(|(w, _)| rows.iter().any(|c| c.work == *w)).collect();
    let (width, height) = (NAMES + PANEL * works.len() as i32 + 20, HEAD + ROW * peers.len() as i32 + 40);
    let root = SVGBackend::new(path, (width as u32, height as u32)).into_drawing_area();
    root.fill(&WHITE).map_err(drawing)?;
    let text = |words: &str, at: (i32, i32), size: i32, side: HPos| -> Result<()> {
        root.draw(&Text::new(words.to_owned(), at, font(size, side))).map_err(drawing)
    };
    text(&format!("CPU cost, in units of no firewall: {place}, {rules} rules"), (14, 22), 18, HPos::Left)?;
    text(
        "1.00 = as without a firewall; shorter is better; grey band = noise (no firewall against itself)",
        (14, 44),
        12,
        HPos::Left,
    )?;
    for (i, peer) in peers.iter().enumerate() {
        text(peer, (NAMES - 12, HEAD + ROW * i as i32 + ROW / 2), 13, HPos::Right)?;
    }
    for (w, (work, words)) in works.iter().enumerate() {
        let (left, width) = (NAMES + PANEL * w as i32, PANEL - 62);
        let find = |peer: &str| rows.iter().find(|c| c.work == *work && c.peer == peer);
        let top = peers.iter().filter_map(|p| find(p)).map(|c| c.ratio_of_cpu).fold(1.1, f64::max).min(CUT);
        let x = |ratio: f64| left + ((ratio.min(CUT) / top) * f64::from(width)) as i32;
        text(words, (left, HEAD - 18), 13, HPos::Left)?;
        let bottom = HEAD + ROW * peers.len() as i32;
        let noise = find("none-again").map_or(0.0, |c| (c.ratio_of_cpu - 1.0).abs());
        let band =
            Rectangle::new([(x(1.0 - noise), HEAD - 4), (x(1.0 + noise).max(x(1.0) + 1), bottom + 4)], FAINT.filled());
        root.draw(&band).map_err(drawing)?;
        for (i, peer) in peers.iter().enumerate() {
            let (from, to) = (HEAD + ROW * i as i32 + 5, HEAD + ROW * (i as i32 + 1) - 5);
            let Some(cost) = find(peer) else {
                text("not measured", (left + 4, (from + to) / 2), 11, HPos::Left)?;
                continue;
            };
            let bar = Rectangle::new([(left, from), (x(cost.ratio_of_cpu), to)], colour(peer).filled());
            root.draw(&bar).map_err(drawing)?;
            let beyond = if cost.ratio_of_cpu > CUT { " (cut)" } else { "" };
            text(
                &format!("{:.2}{beyond}", cost.ratio_of_cpu),
                (x(cost.ratio_of_cpu) + 5, (from + to) / 2),
                12,
                HPos::Left,
            )?;
        }
        let line = PathElement::new(vec![(x(1.0), HEAD - 4), (x(1.0), bottom + 4)], INK.stroke_width(1));
        root.draw(&line).map_err(drawing)?;
    }
    let foot = format!(
        "{}, {}, {}; minima of {} rounds in turns",
        results.machine.kernel,
        results.machine.cpu,
        results.machine.runs.last().map_or("", |r| &r.date),
        rows.first().map_or(0, |c| c.cpu.rounds)
    );
    text(&foot, (14, height - 16), 11, HPos::Left)?;
    root.present().map_err(drawing)
}

/// Bars end here; the number says how far they would go.
const CUT: f64 = 4.0;

/// Cost of a connection over the number of rules.
fn growth(results: &Results, place: &str, path: &Path) -> Result<()> {
    let costs: Vec<&Cost> = results.costs.iter().filter(|c| c.place == place && c.work == "crr").collect();
    let mut sizes: Vec<u64> = costs.iter().map(|c| c.rules).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let (Some(first), Some(last)) = (sizes.first(), sizes.last()) else { return Ok(()) };
    if first == last {
        return Ok(());
    }
    let micros = |c: &Cost| c.cpu.min / 1e3;
    let (low, high) = costs.iter().fold((f64::MAX, 0.0f64), |(l, h), c| (l.min(micros(c)), h.max(micros(c))));
    let root = SVGBackend::new(path, (900, 460)).into_drawing_area();
    root.fill(&WHITE).map_err(drawing)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(
            format!("CPU cost of a connection over the size of the policy: {place}"),
            ("sans-serif", 18).into_font().color(&INK),
        )
        .margin(14)
        .margin_right(210)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d((*first as f64..*last as f64).log_scale(), (low * 0.8..high * 1.3).log_scale())
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .x_desc("rules in the policy")
        .y_desc("microseconds per connection (log)")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .light_line_style(WHITE)
        .bold_line_style(FAINT)
        .label_style(("sans-serif", 12).into_font().color(&INK))
        .draw()
        .map_err(drawing)?;
    let mut labels: Vec<(f64, &str, RGBColor)> = Vec::new();
    for kind in Kind::ALL {
        let peer = kind.name();
        let points: Vec<(f64, f64)> = sizes
            .iter()
            .filter_map(|s| costs.iter().find(|c| c.rules == *s && c.peer == peer))
            .map(|c| (c.rules as f64, micros(c)))
            .collect();
        let Some(end) = points.last().copied() else { continue };
        // One line says what these three are.
        if kind == Kind::Again || kind == Kind::EmptySkb {
            continue;
        }
        let colour = if kind == Kind::None { INK } else { colour(peer) };
        chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2))).map_err(drawing)?;
        chart.draw_series(points.iter().map(|p| Circle::new(*p, 3, colour.filled()))).map_err(drawing)?;
        labels.push((end.1, peer, colour));
    }
    // Names at the ends of the lines, apart from each other.
    labels.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut free = 0;
    for (value, peer, colour) in labels {
        let (x, y) = chart.backend_coord(&(*last as f64, value));
        let at = y.max(free);
        free = at + 15;
        let style = ("sans-serif", 12).into_font().color(&colour).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw(&PathElement::new(vec![(x + 3, y), (x + 14, at)], colour.stroke_width(1))).map_err(drawing)?;
        root.draw(&Text::new(format!("{peer}  {value:.0} us"), (x + 18, at), style)).map_err(drawing)?;
    }
    root.present().map_err(drawing)
}

fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!("drawing: {error}")
}

fn page(times: &Results, counts: Option<&Results>) -> Result<String> {
    let mut t = String::from("# Benchmark\n\nGenerated by `cargo xtask bench` from [bench.json](bench.json)");
    if counts.is_some() {
        t += " and [instructions.json](instructions.json)";
    }
    t += ": do not edit. Every ratio is to the same machine with no firewall, in the same run, in turns.\n\n";
    let m = &times.machine;
    writeln!(t, "| | |\n| --- | --- |")?;
    for run in &m.runs {
        let what = if run.options.is_empty() { "everything".to_owned() } else { format!("`{}`", run.options) };
        writeln!(
            t,
            "| run | {}, commit {}, {what}; load averages before and after: {} |",
            run.date,
            run.commit,
            run.load.join(" and ")
        )?;
    }
    writeln!(t, "| kernel, processor | {}, {} x {} |", m.kernel, m.cpus, m.cpu)?;
    writeln!(t, "| mitigations | {} |", m.mitigations.join("; "))?;
    writeln!(t, "| versions | {} |", m.versions.join("; "))?;
    writeln!(
        t,
        "| build | {} |",
        if m.release_build { "release" } else { "**not optimised**: user space figures mean nothing" }
    )?;
    writeln!(t, "| noise | {} |", noise(times))?;
    if let Some(c) = counts {
        writeln!(
            t,
            "| instructions | Linux {} in QEMU, one emulated processor, `-icount shift=0`, mitigations off; noise {} |",
            c.machine.kernel,
            noise(c)
        )?;
    }
    t += "\nA load average above zero before a run means that others used the machine: then trust ratios of CPU time and instructions, and no wall time.\n";
    t += "\n## Goals\n\n| goal | measured | |\n| --- | --- | --- |\n";
    for goal in goals::all(times, counts) {
        writeln!(t, "| {} | {} | {} |", goal.what, goal.measured, goal.verdict())?;
    }
    t += "\n## Side by side\n\n";
    for place in ["loopback", "veth"] {
        if of(times, place, usual(times)).is_empty() {
            continue;
        }
        writeln!(t, "![{place}](ratio-{place}.svg)\n")?;
        if times.costs.iter().any(|c| c.place == place && c.work == "crr" && c.rules != usual(times)) {
            writeln!(t, "![{place}, rules](rules-{place}.svg)\n")?;
        }
    }
    t += "Peers, all with the same sentences and both directions judged:\n\n";
    for kind in Kind::ALL {
        writeln!(t, "* `{}`: {}", kind.name(), kind.words())?;
    }
    t += "\nEach was asked the same questions before it was timed: TCP and UDP to an open and to a shut port, and over veth a SYN from an address of the policy and from one beside it. ";
    t += "CPU = of the one thread that is client and server, softirqs included where the kernel does not account them apart; wall = from begin to end, other users of the machine included.\n";
    costs(&mut t, times, "ns")?;
    if let Some(counts) = counts {
        t += "\n## Instructions\n\nThe same in a guest whose clock counts instructions: no caches, no mitigations, nearly no noise.\n";
        costs(&mut t, counts, "instructions")?;
    }
    t += "\n## The agent\n\n| work | what | size | minimum | median | maximum | unit | rounds |\n| --- | --- | ---: | ---: | ---: | ---: | --- | ---: |\n";
    for f in &times.figures {
        let number = |v: f64| if v.abs() >= 1000.0 || v.fract() == 0.0 { format!("{v:.0}") } else { format!("{v:.2}") };
        let size = if f.size == 0 { String::new() } else { f.size.to_string() };
        writeln!(
            t,
            "| {} | {} | {size} | {} | {} | {} | {} | {} |",
            f.work,
            f.what,
            number(f.value.min),
            number(f.value.median),
            number(f.value.max),
            f.unit,
            f.value.rounds
        )?;
    }
    let absent: Vec<_> = times
        .absent
        .iter()
        .map(|a| ("here", a))
        .chain(counts.iter().flat_map(|c| c.absent.iter().map(|a| ("in the guest", a))))
        .collect();
    if !absent.is_empty() {
        t += "\n## Not measured\n\n| where | peer | place | rules | why |\n| --- | --- | --- | ---: | --- |\n";
        for (at, a) in absent {
            writeln!(t, "| {at} | {} | {} | {} | {} |", a.peer, a.place, a.rules, a.why.replace('|', "/"))?;
        }
    }
    for failed in times.failed.iter().chain(counts.iter().flat_map(|c| &c.failed)) {
        writeln!(t, "\n**Failed:** {failed}")?;
    }
    t += "\n## Again\n\n```sh\ncargo xtask bench --out docs/bench                  # as root; half an hour on a quiet machine\ncargo xtask bench --instructions --out docs/bench   # in a guest (cargo xtask vm)\ncargo xtask bench --quick --only crr --peers nftables,segfw-skb\ncargo xtask bench help\n```\n";
    Ok(t)
}

/// No firewall against itself.
fn noise(results: &Results) -> String {
    let again: Vec<&Cost> =
        results.costs.iter().filter(|c| c.peer == "none-again" && !c.work.ends_with("flood")).collect();
    if again.is_empty() {
        return "not measured".to_owned();
    }
    let worst = |pick: fn(&Cost) -> f64| again.iter().map(|c| (pick(c) - 1.0).abs() * 100.0).fold(0.0, f64::max);
    let middle = |pick: fn(&Cost) -> f64| {
        let mut all: Vec<f64> = again.iter().map(|c| (pick(c) - 1.0).abs() * 100.0).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    format!(
        "no firewall against itself, minima: CPU {:.1} % (median of all rows), {:.1} % (worst row); wall {:.1} %, {:.1} %; medians of wall {:.1} %, {:.1} %",
        middle(|c| c.ratio_of_cpu),
        worst(|c| c.ratio_of_cpu),
        middle(|c| c.ratio),
        worst(|c| c.ratio),
        middle(|c| c.ratio_of_medians),
        worst(|c| c.ratio_of_medians)
    )
}

/// One table for each work and place: peers down, sizes across.
fn costs(t: &mut String, results: &Results, unit: &str) -> Result<()> {
    let mut tables: Vec<(&str, &str)> = Vec::new();
    for c in &results.costs {
        if !tables.contains(&(&c.place, &c.work)) {
            tables.push((&c.place, &c.work));
        }
    }
    for (place, work) in tables {
        let rows: Vec<&Cost> = results.costs.iter().filter(|c| c.place == place && c.work == work).collect();
        let mut sizes: Vec<u64> = rows.iter().map(|c| c.rules).collect();
        sizes.sort_unstable();
        sizes.dedup();
        writeln!(t, "\n### {work}, {place}: {}\n", rows[0].operation)?;
        let head: String = sizes.iter().map(|s| format!(" {s} rules: {unit} (ratio; wall, medians) |")).collect();
        writeln!(t, "| peer |{head}\n| --- |{}", " ---: |".repeat(sizes.len()))?;
        for kind in Kind::ALL {
            if !rows.iter().any(|c| c.peer == kind.name()) {
                continue;
            }
            write!(t, "| {} |", kind.name())?;
            for size in &sizes {
                match rows.iter().find(|c| c.peer == kind.name() && c.rules == *size) {
                    // Under -icount wall is what counts: CPU time is a tick's guess.
                    Some(c) if results.machine.instructions => {
                        write!(t, " {:.0} (**{:.4}**; {:.4}) |", c.wall.min, c.ratio, c.ratio_of_medians)?
                    }
                    Some(c) => write!(t, " {:.0} (**{:.3}**; {:.3}) |", c.cpu.min, c.ratio_of_cpu, c.ratio_of_medians)?,
                    None => write!(t, " |")?,
                }
            }
            t.push('\n');
        }
    }
    Ok(())
}
