//! What an uplink needs: an IOMMU, VFIO, and leave to use both.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Check, Host};
use crate::control::nic;

/// `CAP_DAC_OVERRIDE` (linux/capability.h).
const DAC_OVERRIDE: u32 = 1;
const GAIN: &str = "an uplink: a VF of the network card, driven by Ringway itself";

/// Whether there is a network card that could be an uplink.
fn wanted(host: &Host<'_>) -> bool {
    let cards = nic::list(host.root);
    cards.iter().any(|card| card.is_vf() || card.vfs.is_some())
}

fn entries(path: &Path) -> usize {
    fs::read_dir(path).map_or(0, Iterator::count)
}

pub(super) fn iommu(host: &Host<'_>) -> Check {
    let name = "IOMMU";
    let groups = entries(&host.root.join("sys/kernel/iommu_groups"));
    if groups > 0 {
        return Check::ok(name, format!("{groups} groups"));
    }
    if !wanted(host) {
        return Check::ok(name, "off, and no network card here has VFs");
    }
    let repair = host.boot_with("intel_iommu=on iommu=pt");
    Check::advice(
        name,
        "off, or not in the firmware (VT-d, AMD-Vi)",
        GAIN,
        repair,
    )
}

pub(super) fn groups(host: &Host<'_>) -> Check {
    let name = "IOMMU groups of VFs";
    let cards = nic::list(host.root);
    let vfs: Vec<_> = cards.iter().filter(|card| card.is_vf()).collect();
    for vf in &vfs {
        let Some(group) = &vf.group else { continue };
        if let Some((other, driver)) = nic::not_viable(host.root, &vf.address) {
            return Check::advice(
                name,
                format!(
                    "group {group} of {} is not viable: {other} in it is bound to {driver}",
                    vf.address
                ),
                GAIN,
                format!(
                    "echo {other} > /sys/bus/pci/devices/{other}/driver/unbind, or a slot with a group of its own"
                ),
            );
        }
    }
    Check::ok(name, format!("{} VFs, none shares a group", vfs.len()))
}

pub(super) fn vfio(host: &Host<'_>) -> Check {
    let name = "VFIO";
    if !wanted(host) {
        return Check::ok(name, "not needed: no network card here has VFs");
    }
    let dir = host.root.join("dev/vfio");
    if !host.root.join("sys/bus/pci/drivers/vfio-pci").exists() || !dir.join("vfio").exists() {
        return Check::advice(name, "not loaded", GAIN, "modprobe vfio-pci");
    }
    let groups = fs::read_dir(&dir).into_iter().flatten().flatten();
    let mut files: Vec<_> = groups.map(|file| file.path()).collect();
    files.sort();
    let status = host.text("proc/self/status").unwrap_or_default();
    for file in files
        .iter()
        .filter(|file| file.is_file() || is_device(file))
    {
        let may = fs::metadata(file).is_ok_and(|file| allowed(&file, &status));
        if !may {
            let shown = Path::new("/dev/vfio").join(file.file_name().unwrap_or_default());
            let uid = id(&status, "Uid:").unwrap_or(0);
            return Check::advice(
                name,
                format!("{} may not be used by user {uid}", shown.display()),
                GAIN,
                format!("chown {uid} {0} (docker run --device {0})", shown.display()),
            );
        }
    }
    Check::ok(
        name,
        format!(
            "loaded, {} groups handed to it",
            files.len().saturating_sub(1)
        ),
    )
}

fn is_device(file: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::metadata(file).is_ok_and(|file| file.file_type().is_char_device())
}

/// The effective id in a line of `proc/self/status`.
fn id(status: &str, key: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Whether the process of this `proc/self/status` may read and write a file.
fn allowed(file: &Metadata, status: &str) -> bool {
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
    let capabilities = line("CapEff:").and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    if capabilities.is_some_and(|set| set >> DAC_OVERRIDE & 1 == 1) {
        return true;
    }
    let groups = line("Groups:").unwrap_or_default().split_whitespace();
    let mut groups = groups
        .filter_map(|group| group.parse().ok())
        .chain(id(status, "Gid:"));
    let shift = if id(status, "Uid:").is_none_or(|uid| uid == file.uid()) {
        6
    } else if groups.any(|group: u32| group == file.gid()) {
        3
    } else {
        0
    };
    file.mode() >> shift & 6 == 6
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::{Verdict, examine};
    use super::*;
    use crate::control::nic::tests::{VF, host};

    /// The three checks, in a host whose processes are user 1000's.
    fn look(root: &Path) -> [Check; 3] {
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        };
        write(
            "proc/self/status",
            "Uid:\t1000\t1000\t1000\t1000\nGid:\t1000\t1000\t1000\t1000\nGroups:\t5 1000\nCapEff:\t0000000000000000\n",
        );
        let found = examine(root, &[]);
        ["IOMMU", "IOMMU groups of VFs", "VFIO"].map(|name| {
            found
                .iter()
                .find(|check| check.name == name)
                .expect("looked at")
                .clone()
        })
    }

    fn repair(check: &Check) -> &str {
        assert_eq!(check.verdict, Verdict::Advice, "{check:?}");
        check.repair.as_deref().unwrap_or_default()
    }

    #[test]
    fn a_host_without_such_a_card_needs_nothing() {
        let bare = tempfile::tempdir().expect("a directory");
        assert!(
            look(bare.path())
                .iter()
                .all(|check| check.verdict == Verdict::Ok)
        );
    }

    #[test]
    fn what_an_uplink_lacks_is_named_in_the_order_of_its_repair() {
        let tree = host();
        let root = tree.path();
        let [iommu, groups, vfio] = look(root);
        assert!(repair(&iommu).contains("intel_iommu=on"), "{iommu:?}");
        assert_eq!(groups.verdict, Verdict::Ok);
        assert_eq!(repair(&vfio), "modprobe vfio-pci");
        // It is on, and the module loaded; the group's file is root's alone.
        fs::create_dir_all(root.join("sys/kernel/iommu_groups/41")).expect("made");
        fs::create_dir_all(root.join("dev/vfio")).expect("made");
        for (name, mode) in [("vfio", 0o666), ("41", 0o600)] {
            let file = root.join("dev/vfio").join(name);
            fs::write(&file, "").expect("written");
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("set");
        }
        let [iommu, _, vfio] = look(root);
        assert_eq!(iommu.verdict, Verdict::Ok);
        if rustix::process::getuid().as_raw() != 1000 {
            assert!(
                repair(&vfio).contains("chown 1000 /dev/vfio/41"),
                "{vfio:?}"
            );
        }
        let file = root.join("dev/vfio/41");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).expect("set");
        let [.., vfio] = look(root);
        assert_eq!(
            (vfio.verdict, vfio.found.as_str()),
            (Verdict::Ok, "loaded, 1 groups handed to it")
        );
        // Somebody else in the group.
        fs::write(root.join("sys/bus/pci/groups/41/devices/0000:81:00.0"), "").expect("written");
        let [_, groups, _] = look(root);
        assert!(
            groups.found.contains(VF) && groups.found.contains("bound to ixgbe"),
            "{groups:?}"
        );
        assert!(repair(&groups).contains("0000:81:00.0/driver/unbind"));
    }

    #[test]
    fn a_capability_or_a_group_opens_a_file_as_well_as_its_owner() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let set = |mode| {
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).expect("set");
            fs::metadata(file.path()).expect("there")
        };
        let owner = set(0o600);
        let who = |uid: u32, gid: u32, set: &str| {
            format!("Uid:\t{uid}\t{uid}\nGid:\t{gid}\t{gid}\nGroups:\t\nCapEff:\t{set}\n")
        };
        let stranger = owner.uid() + 1;
        assert!(allowed(&owner, &who(owner.uid(), 7, "0")));
        assert!(!allowed(&owner, &who(stranger, owner.gid(), "0")));
        assert!(allowed(&owner, &who(stranger, 7, "2")));
        assert!(allowed(&set(0o060), &who(stranger, owner.gid(), "0")));
        assert!(!allowed(&set(0o040), &who(stranger, owner.gid(), "0")));
    }
}
