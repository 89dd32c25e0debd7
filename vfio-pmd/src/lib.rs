//! Poll-mode driver for the Intel 82599 Virtual Function.
