//! Rings in foreign memory; knows no frames and no ports.

pub mod buffers;
pub mod driver;
mod guest_budget;
pub mod guest_fault;
mod guest_map;
pub mod guest_mem;
mod guest_poison;
mod guest_spec;
mod guest_uffd;
pub mod net;
pub mod own_mem;
pub mod packed;
pub mod ring;
pub mod split;
#[cfg(test)]
mod tests;
