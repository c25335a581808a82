//! Records in the words of others: one pure function per convention. Our own record stays the truth; what a convention
//! has no place for is left out, or put where it allows additions.

pub mod hubble;
pub mod ocsf;

use super::coded::Text;
use super::record::Record;
use segfw_common::Verdict;

/// What tells a record from every other one, also over boots, after which the kernel's numbers begin again. `None` for
/// what has no number.
fn uid(record: &Record) -> Option<String> {
    let (cpu, sequence) = record.cpu.zip(record.sequence)?;
    Some(format!("{}-{}-{cpu}-{sequence}", *record.host, record.time.as_nanosecond()))
}

/// (policy, rule) that stands for the verdict. AUDIT speaks of what enforcement would have said: a rule of a policy that is
/// only watched, or the rule that decided while the segment or the host is in monitor mode.
fn decider(record: &Record) -> (Option<&Text>, Option<&Text>) {
    match &record.pending {
        Some(pending) if record.verdict == Verdict::Audit.into() && pending.verdict == Verdict::Denied.into() => {
            (pending.policy.as_ref(), pending.rule.as_ref())
        }
        Some(_) | None => (record.policy.as_ref(), record.rule.as_ref()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
