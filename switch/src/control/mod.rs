//! The slow half: may block, allocate and log; never touches a frame.
//!
//! [`config`] says what is wanted, [`plan`] how to get there from what is, [`state`] what is; [`api`] tells both to the outside.

pub mod api;
pub mod config;
pub mod cpu;
pub mod doctor;
#[cfg(fuzzing)]
pub mod fuzz;
mod keys;
pub mod metrics;
pub mod nic;
mod operate;
mod operator;
mod peer_cred;
pub mod plan;
pub mod port_handle;
pub mod port_state;
pub mod ports;
mod rings;
pub mod sandbox;
pub mod security;
pub mod serve;
mod session;
pub mod socket;
pub mod spec;
pub mod state;
mod status;
pub mod switch;
mod threads;
mod toml_file;
pub mod uplink;
mod uplink_status;
mod vhost_device;
mod vhost_door;
mod vhost_filter;
pub mod vhost_user;
mod wanted;
