//! Capabilities, and the promise to gain none.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What root keeps: to give sockets to their owners, to reach and make sockets in directories of others, and to pin memory for a
/// device beyond RLIMIT_MEMLOCK.
pub(super) const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::IPC_LOCK);

/// Gives up all others, for good.
pub(super) fn drop_capabilities() -> Result<(), String> {
    let say = |error: Errno| error.to_string();
    let have = capabilities(None).map_err(say)?;
    if have.permitted.contains(CapabilitySet::SETPCAP) {
        for number in 0..64 {
            let one = CapabilitySet::from_bits_retain(1 << number);
            if KEPT.contains(one) {
                continue;
            }
            match remove_capability_from_bounding_set(one) {
                Ok(()) => {}
                Err(Errno::INVAL) => break, // the kernel has no more
                Err(error) => return Err(say(error)),
            }
        }
    }
    let _ = clear_ambient_capability_set(); // Linux 4.3; empty unless somebody filled it for us
    let kept = have.permitted & KEPT;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(say)
}

/// execve(2) gains nothing from here on; also what lets everybody filter his own calls.
pub(super) fn no_new_privileges() -> Result<(), String> {
    set_no_new_privs(true).map_err(|error| error.to_string())
}
