//! Ringway

pub mod control;
pub mod dataplane;
