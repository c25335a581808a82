//! The table of what kernels lack catches both surprises: a row that is skipped for no stated reason, and one that runs.

use crate::{Options, Tally};
use anyhow::{Result, ensure};
use segfw_tests::expected::Expected;
use segfw_tests::table::{End, Report};

pub(crate) fn run(_: &Options, tally: &mut Tally) -> Result<()> {
    tally.count("expected: both surprises fail", surprises());
    tally.count("expected: a line without a reason is refused", refused());
    Ok(())
}

fn surprises() -> Result<()> {
    let expected = Expected::parse("# a comment\n5.10,6.1 mptcp  is not built\n7.3 udplite gone\n", "6.1")?;
    let report = |row: &str, end| Report {
        id: 1,
        group: "g".into(),
        row: row.into(),
        port: 1,
        end,
        baseline: None,
        outcome: None,
        note: String::new(),
        ms: 0,
    };
    let mut reports = [
        report("tcp4 egress mptcp by address enforce", End::Skipped),
        report("tcp4 egress mptcp by address enforce", End::Passed),
        report("udplite4 egress udplite by address enforce", End::Skipped),
        report("tcp4 egress any by address enforce", End::Passed),
    ];
    expected.apply(&mut reports);
    let ends: Vec<End> = reports.iter().map(|r| r.end).collect();
    ensure!(ends == [End::Skipped, End::Failed, End::Failed, End::Passed], "{ends:?}");
    Ok(())
}

fn refused() -> Result<()> {
    ensure!(Expected::parse("6.1 mptcp\n", "6.1").is_err(), "no reason, and taken");
    Ok(())
}
