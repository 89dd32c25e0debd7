//! Ringway

pub mod cli;
pub mod control;
pub mod dataplane;
pub mod guest;
pub mod port;
pub mod virtio;
