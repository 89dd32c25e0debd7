//! Ringway

pub mod control;
pub mod dataplane;
pub mod port;
pub mod virtio;
