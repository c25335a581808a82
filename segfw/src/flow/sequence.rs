//! What is missing: every event has a number per CPU without a gap, so a number that never comes is a lost event.
//!
//! Order in the ring is not exactly order of numbers: a softirq may take the next number and write its event while a
//! process still stands between its own number and its own write. So a gap counts only after [`GRACE_NS`].

use segfw_common::FlowEvent;
use std::collections::BTreeMap;

/// How long a missing number may still come (boot nanoseconds): softirqs hold a process up for milliseconds.
pub const GRACE_NS: u64 = 200_000_000;
/// Gaps of one CPU that are waited for. More: the oldest counts at once.
pub const OPEN_GAPS: usize = 256;

/// Events that never came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The CPU that wrote them.
    pub cpu: u32,
    /// Exactly how many.
    pub lost: u64,
    /// Boot nanoseconds of the event before the gap.
    pub after: u64,
    /// Boot nanoseconds of the event behind the gap.
    pub before: u64,
    /// Between the last event that another agent wrote down and the first that this one saw.
    pub agents: bool,
}

#[derive(Debug)]
struct Open {
    /// Missing numbers: from, and up to but not including.
    from: u64,
    to: u64,
    after: u64,
    before: u64,
    agents: bool,
}

#[derive(Debug)]
struct Cpu {
    next: u64,
    newest: u64,
    open: Vec<Open>,
    /// Nothing was seen yet; `next` is where another agent ended.
    resumed: bool,
}

/// The state of all CPUs.
#[derive(Debug, Default)]
pub struct Sequences {
    cpus: BTreeMap<u32, Cpu>,
    /// Events known to be lost.
    pub lost: u64,
    /// Numbers that began again: the kernel side was loaded anew.
    pub restarts: u64,
    /// Events that came after they had been counted as lost.
    pub late: u64,
}

impl Sequences {
    /// Another agent ended on this CPU with event `number` at boot time `time`: what lies between that and the first
    /// event that comes is missing.
    pub fn resume(&mut self, cpu: u32, number: u64, time: u64) {
        let at = Cpu { next: number.saturating_add(1), newest: time, open: Vec::new(), resumed: true };
        let _ = self.cpus.insert(cpu, at);
    }

    /// Takes note of an event; returns the gaps that are certain by now (nearly always none).
    pub fn observe(&mut self, event: &FlowEvent) -> Vec<Gap> {
        let (number, time) = (event.sequence, event.time);
        let mut certain = Vec::new();
        let Some(cpu) = self.cpus.get_mut(&event.cpu) else {
            // The first event we see of this CPU: nothing can be said about those before it.
            let next = number.saturating_add(1);
            let _ = self.cpus.insert(event.cpu, Cpu { next, newest: time, open: Vec::new(), resumed: false });
            return certain;
        };
        let agents = std::mem::take(&mut cpu.resumed);
        if number == cpu.next {
            cpu.next = number.saturating_add(1);
        } else if number > cpu.next {
            cpu.open.push(Open { from: cpu.next, to: number, after: cpu.newest, before: time, agents });
            cpu.next = number.saturating_add(1);
            if cpu.open.len() > OPEN_GAPS {
                let open = cpu.open.remove(0);
                certain.push(gap(event.cpu, &open));
            }
        } else if let Some(i) = cpu.open.iter().position(|g| (g.from..g.to).contains(&number)) {
            let Open { from, to, after, before, agents } = cpu.open.remove(i);
            let part = |from, to| Open { from, to, after, before, agents };
            let rest = [part(from, number), part(number + 1, to)];
            for (n, part) in rest.into_iter().filter(|g| g.from < g.to).enumerate() {
                cpu.open.insert(i + n, part);
            }
        } else if time < cpu.newest {
            self.late += 1;
        } else {
            certain.extend(cpu.open.drain(..).map(|g| gap(event.cpu, &g)));
            cpu.next = number.saturating_add(1);
            self.restarts += 1;
        }
        cpu.newest = cpu.newest.max(time);
        settle(event.cpu, cpu, time, &mut certain);
        self.lost = certain.iter().fold(self.lost, |sum, g| sum.saturating_add(g.lost));
        certain
    }

    /// The gaps that are certain at boot time `now`. To be called now and then, for CPUs that fell silent.
    pub fn settle(&mut self, now: u64) -> Vec<Gap> {
        let mut certain = Vec::new();
        for (number, cpu) in &mut self.cpus {
            settle(*number, cpu, now, &mut certain);
        }
        self.lost = certain.iter().fold(self.lost, |sum, g| sum.saturating_add(g.lost));
        certain
    }
}

fn settle(number: u32, cpu: &mut Cpu, now: u64, certain: &mut Vec<Gap>) {
    cpu.open.retain(|open| {
        let over = now.saturating_sub(open.before) >= GRACE_NS;
        if over {
            certain.push(gap(number, open));
        }
        !over
    });
}

fn gap(cpu: u32, open: &Open) -> Gap {
    Gap { cpu, lost: open.to - open.from, after: open.after, before: open.before, agents: open.agents }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::decode::{EVENT_LEN, decode};

    fn event(cpu: u32, sequence: u64, time: u64) -> FlowEvent {
        FlowEvent { cpu, sequence, time, ..decode(&[0; EVENT_LEN]).unwrap() }
    }

    /// (cpu, sequence, time) in, (cpu, lost, after, before) out.
    fn check(events: &[(u32, u64, u64)], want: &[(u32, u64, u64, u64)]) -> Sequences {
        let mut s = Sequences::default();
        let mut got = Vec::new();
        for (cpu, sequence, time) in events {
            got.extend(s.observe(&event(*cpu, *sequence, *time)));
        }
        got.extend(s.settle(u64::MAX));
        let got: Vec<_> = got.iter().map(|g| (g.cpu, g.lost, g.after, g.before)).collect();
        assert_eq!(got, want);
        assert_eq!(s.lost, want.iter().map(|w| w.1).sum::<u64>());
        s
    }

    #[test]
    fn gaps_are_exact_and_per_cpu() {
        let _ = check(&[(0, 7, 10), (0, 8, 20), (1, 3, 21), (0, 9, 30)], &[]);
        let _ = check(&[(0, 7, 10), (1, 1, 11), (0, 10, 20), (1, 2, 21), (0, 11, 30)], &[(0, 2, 10, 20)]);
    }

    #[test]
    fn a_number_that_comes_late_is_not_lost() {
        let _ = check(&[(0, 1, 1), (0, 5, 5), (0, 2, 2), (0, 4, 4), (0, 3, 3)], &[]);
        let _ = check(&[(0, 1, 1), (0, 5, 5), (0, 3, 3)], &[(0, 1, 1, 5), (0, 1, 1, 5)]);
        let s = check(&[(0, 1, 1), (0, 3, 3), (0, 4, 3 + GRACE_NS), (0, 2, 2)], &[(0, 1, 1, 3)]);
        assert_eq!((s.late, s.restarts), (1, 0));
    }

    #[test]
    fn a_restart_is_not_a_loss() {
        let s = check(&[(0, 900, 1), (0, 0, 2), (0, 1, 3)], &[]);
        assert_eq!((s.late, s.restarts), (0, 1));
    }

    #[test]
    fn what_lies_between_two_agents_is_missing() {
        let mut s = Sequences::default();
        s.resume(0, 7, 10);
        s.resume(1, 7, 10);
        s.resume(2, 7, 10);
        // One goes on without a gap, one with a gap, one began again: other maps.
        for (cpu, number) in [(0, 8), (1, 11), (2, 0), (1, 13)] {
            assert_eq!(s.observe(&event(cpu, number, 20)), []);
        }
        let got: Vec<_> = s.settle(u64::MAX).iter().map(|g| (g.cpu, g.lost, g.agents)).collect();
        assert_eq!(got, [(1, 3, true), (1, 1, false)]);
        assert_eq!((s.lost, s.restarts), (4, 1));
    }

    #[test]
    fn the_open_gaps_are_bounded() {
        let mut s = Sequences::default();
        for n in 0..10_000 {
            let _ = s.observe(&event(0, n * 2, n));
        }
        assert!(s.cpus[&0].open.len() <= OPEN_GAPS);
        let _ = s.settle(u64::MAX);
        assert_eq!(s.lost, 9_999);
        for n in [u64::MAX - 1, u64::MAX, u64::MAX, 0] {
            let _ = s.observe(&event(0, n, 20_000));
        }
    }
}
