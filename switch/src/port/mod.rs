//! Where frames enter and leave: the port types.

pub mod doze;
pub mod mem;
pub mod shared;
