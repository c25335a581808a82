//! What is known to run somewhere: the labels a selector can find.

use super::host_policy::Labels;

/// Known workloads. Without any, selectors are compared with the Workload documents alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    pub workloads: Vec<Known>,
}

/// One workload that was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Of the Workload documents that name it.
    pub name: String,
    /// Path from the root of the cgroup tree.
    pub cgroup: String,
    pub labels: Labels,
}
