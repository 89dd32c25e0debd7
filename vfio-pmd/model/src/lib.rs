//! A model of the Intel 82599's Virtual Functions: the device's side of everything `vfio-pmd` drives, and the PF behind it.
//!
//! It is written from the device's description with constants of its own and shares nothing with the driver but the transport trait,
//! so that the two judge one another; and other drivers (Linux's ixgbevf, DPDK's) judge the model, served to a guest by `vf-model`.
//!
//! - `nic`: the device from outside: registers, memory, clock, policy. **Start here**
//! - `port`: what happens inside: requests, the loopback switch, the wire
//! - `vf`: one VF's registers, what reading and writing them does, reset
//! - `rings`: descriptors, received and sent
//! - `mailbox`, `pf`: messages and the PF's answers, by policy tables
//! - `packet`, `rss`: checksums, segmentation, tags, hash
//! - `interrupts`, `dma`, `wire`, `config_space`: vectors, reachable memory, the port's other end, identity
//! - `inject`, `report`: what shall go wrong; what was seen
//! - `in_process`: the transport for a driver in this process
//! - `serve`: a VF per vfio-user socket, for QEMU or a driver elsewhere
//!
//! Not modelled: time (frames move at once, interrupts are not throttled), PCI Express, header split, receive coalescing, IPsec,
//! more than one traffic class, mirroring, rate limits.

mod config_space;
mod dma;
mod in_process;
mod inject;
mod interrupts;
mod mailbox;
mod nic;
mod packet;
mod pf;
mod port;
mod regs;
mod report;
mod rings;
mod rss;
pub mod serve;
mod vf;
mod wire;

pub use dma::{Dma, DmaFault};
pub use in_process::InProcess;
pub use inject::Inject;
pub use nic::{Config, Nic, Pace};
pub use pf::{Api, CastMode, Mac, PfPolicy, VfPolicy, VfState, multicast_hash};
pub use regs::{BAR0_LEN, QUEUES, VECTORS};
pub use report::{Drops, Exchange, Fault, Misuse, Report};
pub use vf::Counters;
pub use wire::{WIRE_FRAME_MAX, Wire};
