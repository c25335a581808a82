//! placeholder

pub(crate) fn tests() -> Vec<crate::Test> {
    vec![]
}
