//! Rings in foreign memory; knows no frames and no ports.

pub mod guest_fault;
mod guest_map;
pub mod guest_mem;
pub mod packed;
pub mod ring;
pub mod split;
