use crate::policy::{HostPolicy, Tables, explain::View, host_policy::Labels};
pub fn explain(_: &Tables, _: &HostPolicy, _: &super::report::Question, _: &dyn Fn(&str) -> Option<Labels>, _: View, _: Option<u64>, _: &str) -> Result<super::report::Explanation, String> { Err("soon".into()) }
