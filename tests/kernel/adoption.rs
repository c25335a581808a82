use crate::{Options, Tally};
pub(crate) fn run(_: &Options, _: &mut Tally) -> anyhow::Result<()> {
    Ok(())
}
