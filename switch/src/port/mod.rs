//! Where frames enter and leave: the port types.

pub mod call;
pub mod doze;
pub mod ixgbevf;
pub mod mem;
pub mod shared;
pub mod vhost;
