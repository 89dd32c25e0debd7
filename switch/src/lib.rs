//! Ringway

pub mod control;
pub mod dataplane;
pub mod virtio;
