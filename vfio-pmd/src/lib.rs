//! Poll-mode driver for the Intel 82599 Virtual Function.

pub mod mmio;
pub mod transport;
