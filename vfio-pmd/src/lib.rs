//! Poll-mode driver for the Virtual Functions of Intel's 82599 (ixgbe) family, usable alone.
//!
//! # Use
//!
//! [`transport`] is a way to a device: `vfio` (the kernel's VFIO) or `vfio_user` (a socket). [`device::Vf`]
//! opens it, agrees with the PF and starts queues; [`rx::RxQueue`] lends the frames of a burst, [`tx::TxQueue`] takes copies. One
//! control thread holds the `Vf` and looks after link and PF; queues move to the threads that poll them. `examples/forward.rs` is
//! the manual.
//!
//! # Map
//!
//! - `device`: open, reset, agree, start, link. `mailbox`: what VF and PF say to each other. `stats`: counters that wrap.
//! - `rx`, `tx`: the two directions of the packet path; `desc`: descriptors as words; `dma`: rings, buffers, memory; `iova`: the
//!   addresses the device sees.
//! - `transport`: the trait. `mmio`: registers. `regs`: their names.
//!
//! # Deliberately absent
//!
//! Threads, a packet pool, allocation after start, interrupts as the normal case, and any word of the switch that uses it.

pub mod desc;
pub mod device;
mod dma;
pub mod error;
pub mod iova;
pub mod mailbox;
pub mod mmio;
pub mod regs;
pub mod rx;
mod stats;
pub mod transport;
pub mod tx;
pub mod vfio;
pub mod vfio_user;

pub use device::{Health, Options, QueuePair, Vf};
pub use dma::{Piece, Room};
pub use error::{Error, Result};
pub use stats::Statistics;
