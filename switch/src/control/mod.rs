//! The slow half: may block, allocate and log; never touches a frame.
//!
//! [`config`] says what is wanted, [`plan`] how to get there from what is, [`state`] what is; [`api`] tells both to the outside.

pub mod api;
pub mod config;
pub mod cpu;
mod keys;
pub mod metrics;
pub mod plan;
pub mod serve;
pub mod socket;
pub mod spec;
pub mod state;
mod wanted;
