//! Records in the words of others: one pure function per convention. Our own record stays the truth; what a convention
//! has no place for is left out, or put where it allows additions.

pub mod hubble;
pub mod ocsf;

#[cfg(test)]
pub(crate) mod tests;
