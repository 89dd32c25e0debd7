//! The fast half: what happens to a frame. Knows no sockets, no rings, no files.

pub mod clock;
pub mod counters;
pub mod eth;
pub mod fdb;
pub mod frame;
pub mod guard;
pub mod mailbox;
pub mod port_set;
pub mod queue;
mod schedule;
pub mod worker;
