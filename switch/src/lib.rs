//! Ringway

pub mod dataplane;
