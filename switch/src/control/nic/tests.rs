//! On a sysfs tree of our own.

use std::os::unix::fs::symlink;

use super::*;

const PF: &str = "0000:81:00.0";
pub(in crate::control) const VF: &str = "0000:81:10.0";

/// A host with an 82599, one VF of it in group 41 under ixgbevf, and a disk.
pub(in crate::control) fn host() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let sys = dir.path().join("sys/bus/pci");
    let write = |path: &str, text: &str| {
        let path = sys.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    for (address, class, id) in [
        (PF, "0x020000", "0x10fb"),
        (VF, "0x020000", "0x10ed"),
        ("0000:00:1f.2", "0x010601", "0x2922"),
    ] {
        write(&format!("devices/{address}/class"), class);
        write(&format!("devices/{address}/vendor"), "0x8086\n");
        write(&format!("devices/{address}/device"), id);
        write(&format!("devices/{address}/numa_node"), "1\n");
        write(&format!("devices/{address}/driver_override"), "(null)\n");
    }
    write(&format!("devices/{PF}/sriov_totalvfs"), "63\n");
    write(&format!("devices/{PF}/sriov_numvfs"), "1\n");
    write(&format!("devices/{PF}/net/eth0/operstate"), "up\n");
    write(&format!("devices/{VF}/net/eth1/operstate"), "down\n");
    write("drivers_probe", "");
    write("drivers/ixgbe/unbind", "");
    write("drivers/ixgbevf/unbind", "");
    write("drivers/vfio-pci/unbind", "");
    write("groups/41/devices/0000:81:10.0", "");
    let at = |path: String| sys.join(path);
    symlink("../../drivers/ixgbe", at(format!("devices/{PF}/driver"))).unwrap();
    symlink("../../drivers/ixgbevf", at(format!("devices/{VF}/driver"))).unwrap();
    symlink("../../groups/41", at(format!("devices/{VF}/iommu_group"))).unwrap();
    symlink(format!("../{PF}"), at(format!("devices/{VF}/physfn"))).unwrap();
    dir
}

fn shown(steps: Vec<Step>, root: &Path) -> Vec<String> {
    let root = format!("{}/", root.display());
    steps
        .iter()
        .map(|step| step.to_string().replace(&root, "/"))
        .collect()
}

#[test]
fn lists_network_cards_and_nothing_else() {
    let host = host();
    let cards = list(host.path());
    assert_eq!(
        cards
            .iter()
            .map(|nic| nic.address.as_str())
            .collect::<Vec<_>>(),
        [PF, VF]
    );
    assert_eq!(
        (cards[0].vfs, cards[0].pf.as_deref()),
        (Some((1, 63)), None)
    );
    assert_eq!(cards[1].pf.as_deref(), Some(PF));
    assert_eq!(cards[1].id, "8086:10ed");
    assert_eq!(
        (cards[1].group.as_deref(), cards[1].node),
        (Some("41"), Some(1))
    );
    assert_eq!(
        cards[1].interfaces,
        [("eth1".to_owned(), "down".to_owned())]
    );
    assert!(list(Path::new("/nowhere")).is_empty());
}

#[test]
fn binds_in_three_writes_and_gives_back_in_three() {
    let host = host();
    let steps = bind(host.path(), VF).unwrap();
    perform(&steps).unwrap();
    assert_eq!(
        shown(steps, host.path()),
        [
            "echo vfio-pci > /sys/bus/pci/devices/0000:81:10.0/driver_override",
            "echo 0000:81:10.0 > /sys/bus/pci/devices/0000:81:10.0/driver/unbind",
            "echo 0000:81:10.0 > /sys/bus/pci/drivers_probe",
        ]
    );
    let driver = host.path().join(format!("sys/bus/pci/devices/{VF}/driver"));
    fs::remove_file(&driver).unwrap();
    symlink("../../drivers/vfio-pci", &driver).unwrap();
    assert_eq!(bind(host.path(), VF), Ok(Vec::new()));
    let back = shown(unbind(host.path(), VF).unwrap(), host.path());
    assert_eq!(
        back[0],
        "echo  > /sys/bus/pci/devices/0000:81:10.0/driver_override"
    );
    assert_eq!(back.len(), 3);
}

#[test]
fn what_cannot_be_bound_is_refused_with_the_remedy() {
    let host = host();
    let sys = host.path().join("sys/bus/pci");
    let why = |address| bind(host.path(), address).unwrap_err();
    assert!(why("0000:00:1f.2").contains("is no network card"));
    assert!(why(PF).contains("is no VF"));
    assert!(
        unbind(host.path(), VF)
            .unwrap_err()
            .contains("bound to ixgbevf")
    );
    fs::write(sys.join(format!("devices/{VF}/net/eth1/operstate")), "up\n").unwrap();
    assert!(why(VF).contains("ip link set eth1 down"));
    fs::write(
        sys.join(format!("devices/{VF}/net/eth1/operstate")),
        "down\n",
    )
    .unwrap();
    let flags = sys.join(format!("devices/{VF}/net/eth1/flags"));
    fs::write(&flags, "0x1003\n").unwrap(); // no carrier, and somebody's all the same
    assert!(why(VF).contains("ip link set eth1 down"));
    fs::write(&flags, "0x1002\n").unwrap();
    fs::write(sys.join(format!("groups/41/devices/{PF}")), "").unwrap();
    assert!(why(VF).contains("is not viable: 0000:81:00.0 in it is bound to ixgbe"));
    fs::remove_dir_all(sys.join("drivers/vfio-pci")).unwrap();
    assert!(why(VF).contains("modprobe vfio-pci"));
    fs::remove_file(sys.join(format!("devices/{VF}/iommu_group"))).unwrap();
    assert!(why(VF).contains("intel_iommu=on"));
}

#[test]
fn a_driver_override_of_before_comes_back() {
    let host = host();
    let at = |name: &str| host.path().join(format!("sys/bus/pci/devices/{VF}/{name}"));
    fs::write(at("driver_override"), "my-driver\n").unwrap();
    let steps = bind(host.path(), VF).unwrap();
    assert_eq!(
        shown(steps.clone(), host.path())[0],
        "echo my-driver > /run/ringway/nic/0000:81:10.0"
    );
    perform(&steps).unwrap();
    assert_eq!(
        fs::read_to_string(at("driver_override")).unwrap(),
        "vfio-pci\n"
    );
    assert!(
        bound(host.path(), VF)
            .unwrap_err()
            .contains("bound to ixgbevf")
    );
    fs::remove_file(at("driver")).unwrap();
    symlink("../../drivers/vfio-pci", at("driver")).unwrap();
    bound(host.path(), VF).unwrap();
    // Bound already: what was kept stays as it is.
    assert_eq!(bind(host.path(), VF), Ok(Vec::new()));
    let back = unbind(host.path(), VF).unwrap();
    let told = shown(back.clone(), host.path());
    assert_eq!(
        (told[0].as_str(), told.last().unwrap().as_str()),
        (
            "echo my-driver > /sys/bus/pci/devices/0000:81:10.0/driver_override",
            "rm /run/ringway/nic/0000:81:10.0"
        )
    );
    perform(&back).unwrap();
    assert_eq!(
        fs::read_to_string(at("driver_override")).unwrap(),
        "my-driver\n"
    );
    assert_eq!(unbind(host.path(), VF).unwrap().len(), 3);
}

#[test]
fn a_memlock_limit_too_small_for_the_rings_is_said_before_anything_is_bound() {
    let host = host();
    let own = host.path().join("proc/self");
    fs::create_dir_all(&own).unwrap();
    let set = |file: &str, text: &str| fs::write(own.join(file), text).unwrap();
    set(
        "limits",
        "Max locked memory         8388608              8388608              bytes\n",
    );
    set("status", "CapEff:\t0000000000000000\n");
    let why = bind(host.path(), VF).unwrap_err();
    assert!(
        why.contains("memlock limit is 8192 KiB") && why.contains("ulimit -l unlimited"),
        "{why}"
    );
    // Root's capability outweighs the limit.
    set("status", "CapEff:\t0000000000004000\n");
    assert_eq!(bind(host.path(), VF).unwrap().len(), 3);
    set("status", "CapEff:\t0000000000000000\n");
    set(
        "limits",
        "Max locked memory         unlimited            unlimited            bytes\n",
    );
    assert_eq!(bind(host.path(), VF).unwrap().len(), 3);
}

#[test]
fn what_may_not_be_written_is_said_with_the_remedy() {
    let nowhere = |text: &str| vec![Step::write(PathBuf::from(text), "1")];
    // Nobody, root included, writes there.
    let why = perform(&nowhere("/proc/version")).unwrap_err();
    assert!(why.contains("echo 1 > /proc/version: "), "{why}");
    let why = perform(&nowhere("/sys/bus/pci/no such file")).unwrap_err();
    assert!(why.contains("(os error"), "{why}");
}

#[test]
fn vfs_are_made_from_none_and_never_pulled_from_under_their_users() {
    let host = host();
    let make = |pf, count| create_vfs(host.path(), pf, count);
    assert_eq!(make("eth0", 1), Ok(Vec::new()));
    assert!(make(PF, 4).unwrap_err().contains("has 1 VFs"));
    assert!(
        make("eth0", 64)
            .unwrap_err()
            .contains("can have 63 VFs, not 64")
    );
    assert!(make("eth1", 2).unwrap_err().contains("can have no VFs"));
    assert!(make("eth9", 2).unwrap_err().contains("nic list"));
    let steps = make("eth0", 0).unwrap();
    perform(&steps).unwrap();
    assert_eq!(make("eth0", 4).unwrap()[0].text.as_deref(), Some("4"));
    fs::remove_dir_all(host.path().join("sys")).unwrap();
    assert!(perform(&steps).unwrap_err().contains("echo 0 > "));
}
