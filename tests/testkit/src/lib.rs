//! Shared pieces of the tests and benchmarks: real peers, and the rules under which tests may skip.
//!
//! - `assets`: kernel and image, made once
//! - `docker`: containers, under a daemon of their own
//! - `ovs`: OVS-DPDK
//! - `process`: a child with a deadline on every wait, which never outlives its test
//! - `qemu`: virtual machines
//! - `ringway`: the program under test
//! - `skip`: `require!` and `skip!`, loud skips
//! - `testpmd`: a real DPDK client or backend
//! - `vf`: the model of a VF in a process, and guests that have such VFs

pub mod assets;
pub mod docker;
pub mod ovs;
pub mod process;
pub mod qemu;
pub mod ringway;
pub mod skip;
pub mod testpmd;
pub mod topology;
pub mod vf;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Lets every user into a folder and onto the sockets in it, as a container with its own uid needs.
pub fn open_to_all(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        std::fs::set_permissions(entry?.path(), std::fs::Permissions::from_mode(0o666))?;
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777))
}
