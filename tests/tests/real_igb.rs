//! The driver's way over kernel VFIO on a device that is not ours: the VF of an 82576, in QEMU's `igb`, behind an emulated IOMMU.

use std::time::Duration;

use anyhow::{Result, ensure};
use testkit::require;
use testkit::vf::{self, Kernel, Machine};

const COMMAND: Duration = Duration::from_secs(120);

#[test]
#[ignore = "real peer: run by tests/run"]
fn registers_memory_and_reset_of_a_foreign_vf_are_as_promised() -> Result<()> {
    require!(vf::available());
    let arguments = [
        ["-netdev", "hubport,id=h0,hubid=0"],
        ["-device", "pcie-root-port,id=rp0,chassis=1"],
        ["-device", "igb,netdev=h0,bus=rp0"],
    ];
    let machine = Machine {
        kernel: Kernel::Old,
        sockets: Vec::new(),
        iommu: true,
        modules: vec!["vfio", "igb"],
        programs: vec![vf::binary("vfio-probe")?],
        others: Vec::new(),
        arguments: arguments.concat().iter().map(|&a| a.to_owned()).collect(),
        script: "mkfifo /tmp/in\nsleep 100000 >/tmp/in &".to_owned(),
    };
    let mut guest = machine.boot()?;
    guest.command(
        "pf=$(readlink -f /sys/class/net/eth0/device); echo 0 >$pf/sriov_drivers_autoprobe; echo 2 >$pf/sriov_numvfs; \
         vf=$(basename $(readlink -f $pf/virtfn0)); d=/sys/bus/pci/devices/$vf; ip link set eth0 up; \
         grep 0x10ca $d/device && readlink $d/iommu_group",
        COMMAND,
    )?;
    // Not bound to vfio-pci: a sentence.
    let text = guest.command("! vfio-probe $vf 2>&1", COMMAND)?;
    ensure!(text.contains("bind the device to vfio-pci"), "{text}");
    guest.command(
        "echo vfio-pci >$d/driver_override; echo $vf >/sys/bus/pci/drivers_probe; ls -l $d/driver | grep vfio-pci",
        COMMAND,
    )?;
    let text = guest.command("vfio-probe $vf 2>&1", COMMAND)?;
    ensure!(text.contains("all is well"), "{text}");
    // Killed with memory mapped and interrupts on: the next one finds a device as new.
    guest.command(
        "vfio-probe $vf hold </tmp/in >/tmp/out 2>&1 & for i in $(seq 100); do grep -q holds /tmp/out && break; sleep 0.1; done; \
         cat /tmp/out; grep holds /tmp/out && kill -9 $(pidof vfio-probe) && sleep 0.5; ! pidof vfio-probe",
        COMMAND,
    )?;
    let text = guest.command("vfio-probe $vf 2>&1", COMMAND)?;
    ensure!(text.contains("all is well"), "{text}");
    Ok(())
}
