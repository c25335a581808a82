//! What was measured, as data: the JSON file, and what the page and the plots are made of.

use serde::{Deserialize, Serialize};

/// Several measurements of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
    /// How many.
    pub(crate) rounds: usize,
}

impl Spread {
    /// `None` = nothing was measured.
    pub(crate) fn of(mut all: Vec<f64>) -> Option<Self> {
        all.sort_by(f64::total_cmp);
        let (min, max) = (*all.first()?, *all.last()?);
        let median = (all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2.0;
        Some(Self { min, median, max, rounds: all.len() })
    }
}

/// Something that has no peer: a step of the agent, a size, a count.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// As `--only` names it.
    pub(crate) work: String,
    /// What it is, in words.
    pub(crate) what: String,
    /// Rules, connections or workloads; 0 = no size.
    pub(crate) size: u64,
    /// `ms`, `MiB`, `% of a core`, `1/s`, `count`.
    pub(crate) unit: String,
    pub(crate) value: Spread,
}

/// The cost of one work with one peer, at one place and size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Cost {
    pub(crate) work: String,
    /// `loopback` or `veth`.
    pub(crate) place: String,
    pub(crate) peer: String,
    /// Rules and addresses in the policy.
    pub(crate) rules: u64,
    /// What one operation is.
    pub(crate) operation: String,
    pub(crate) operations_per_round: u64,
    /// Nanoseconds of this process for one operation; under `-icount` instructions.
    pub(crate) cpu: Spread,
    /// Nanoseconds from begin to end for one operation; under `-icount` instructions.
    pub(crate) wall: Spread,
    /// Minimum of `wall` by that of no firewall, in the same rounds.
    pub(crate) ratio: f64,
    /// Median of `wall` by that of no firewall.
    pub(crate) ratio_of_medians: f64,
    /// Minimum of `cpu` by that of no firewall.
    pub(crate) ratio_of_cpu: f64,
}

/// A peer that could not be measured, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Absent {
    pub(crate) work: String,
    pub(crate) place: String,
    pub(crate) peer: String,
    pub(crate) rules: u64,
    pub(crate) why: String,
}

/// Where it was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    /// From /sys/devices/system/cpu/vulnerabilities, those that are affected.
    pub(crate) mitigations: Vec<String>,
    /// Of the peers' tools.
    pub(crate) versions: Vec<String>,
    /// False = the figures of segfw's user space are those of an unoptimised build.
    pub(crate) release_build: bool,
    /// Figures are instructions and not nanoseconds (QEMU `-icount shift=0`).
    pub(crate) instructions: bool,
    /// The runs that the figures are from, the newest last.
    #[serde(default)]
    pub(crate) runs: Vec<Run>,
}

/// One run of the bench.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) date: String,
    pub(crate) commit: String,
    /// What was asked for; empty = everything.
    pub(crate) options: String,
    /// Load averages before and after: others use this machine too.
    pub(crate) load: Vec<String>,
}

/// One file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    pub(crate) costs: Vec<Cost>,
    pub(crate) absent: Vec<Absent>,
    pub(crate) figures: Vec<Figure>,
    /// Works that ended with an error.
    pub(crate) failed: Vec<String>,
}

impl Results {
    /// Takes over from an earlier run what this one did not measure. A work is always of one run, whole.
    pub(crate) fn keep_from(&mut self, earlier: Self) {
        let mut runs = earlier.machine.runs;
        runs.append(&mut self.machine.runs);
        self.machine.runs = runs;
        let again =
            |work: &str| self.costs.iter().any(|c| c.work == work) || self.figures.iter().any(|f| f.work == work);
        let costs: Vec<_> = earlier.costs.into_iter().filter(|c| !again(&c.work)).collect();
        let figures: Vec<_> = earlier.figures.into_iter().filter(|f| !again(&f.work)).collect();
        let failed: Vec<_> =
            earlier.failed.into_iter().filter(|f| !again(f.split(':').next().unwrap_or_default())).collect();
        if self.costs.is_empty() {
            self.absent = earlier.absent;
        }
        self.costs.extend(costs);
        self.figures.extend(figures);
        self.failed.extend(failed);
    }

    /// Adds a figure and shows it.
    pub(crate) fn figure(&mut self, work: &str, what: &str, size: u64, unit: &str, samples: Vec<f64>) {
        let Some(value) = Spread::of(samples) else { return };
        eprintln!(
            "  {work:10} {what:58} {size:>7}  min {:>10.3}  median {:>10.3} {unit}  ({} rounds)",
            value.min, value.median, value.rounds
        );
        self.figures.push(Figure { work: work.into(), what: what.into(), size, unit: unit.into(), value });
    }
}
