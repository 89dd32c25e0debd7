//! Landlock: which files can be touched.

use std::fs;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
};

use super::kernel::landlock_abi;

/// The newest version whose rights are asked for; an older kernel gives what it has.
const NEWEST: ABI = ABI::V6;
/// Read by checks, by names of owners, by the list of CPUs.
const READ: [&str; 5] = [
    "/proc",
    "/sys",
    "/etc/passwd",
    "/etc/group",
    "/etc/localtime",
];
/// Devices: what calls of guests are completed to, and NICs.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/vfio", "/dev/iommu"];

/// Gives up all files but these. Returns the version in force.
pub(super) fn restrict(socket_dirs: &[PathBuf], readable: &[PathBuf]) -> Result<u32, String> {
    let abi = landlock_abi()
        .ok_or("this kernel has none (Linux 5.13), or was booted without it (lsm=)")?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let sockets = AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::MakeDir | AccessFs::RemoveFile;
    let device = read | AccessFs::WriteFile | AccessFs::IoctlDev;
    let pages = device | AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Truncate;
    let ruled = || -> Result<RulesetStatus, landlock::RulesetError> {
        let rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(scopes())?
            .create()?
            .add_rules(path_beneath_rules(READ, read))?
            .add_rules(path_beneath_rules(readable, read))?
            .add_rules(path_beneath_rules(socket_dirs, sockets))?
            .add_rules(path_beneath_rules(DEVICES, device))?
            .add_rules(path_beneath_rules(hugetlbfs(), pages))?;
        Ok(rules.restrict_self()?.ruleset)
    };
    match ruled().map_err(|error| error.to_string())? {
        RulesetStatus::NotEnforced => Err("the kernel did not enforce it".to_owned()),
        _ => Ok(abi.min(NEWEST as u32)),
    }
}

/// Signals and abstract sockets of others, unless systemd is to be told through one.
fn scopes() -> BitFlags<Scope> {
    let told_through = std::env::var_os("NOTIFY_SOCKET").unwrap_or_default();
    if told_through.as_encoded_bytes().starts_with(b"@") {
        Scope::Signal.into()
    } else {
        Scope::Signal | Scope::AbstractUnixSocket
    }
}

/// Where hugepages are mounted.
fn hugetlbfs() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    let huge = mounts.filter(|fields| fields.get(2) == Some(&"hugetlbfs"));
    huge.map(|fields| Path::new(fields[1]).to_owned()).collect()
}
