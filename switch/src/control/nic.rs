//! Network cards as sysfs tells of them, and the few writes that make VFs and hand them to VFIO.
//!
//! What is to be done is decided first and shown as it is (`--dry-run`): every check, then a list of files and what goes into them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// One network card, or one VF of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Nic {
    /// PCI address.
    pub address: String,
    /// PCI vendor and device.
    pub id: String,
    /// The PF it belongs to, for a VF.
    pub pf: Option<String>,
    /// VFs it has, of how many it could have; for a PF.
    pub vfs: Option<(u32, u32)>,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// Its IOMMU group; none: no IOMMU.
    pub group: Option<String>,
    /// Its NUMA node.
    pub node: Option<i32>,
    /// The kernel's interfaces and their states.
    pub interfaces: Vec<(String, String)>,
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The file.
    pub file: PathBuf,
    /// What goes into it.
    pub text: String,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "echo {} > {}", self.text, self.file.display())
    }
}

fn devices(root: &Path) -> PathBuf {
    root.join("sys/bus/pci/devices")
}

fn text(path: PathBuf) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn link(path: PathBuf) -> Option<String> {
    Some(
        fs::read_link(path)
            .ok()?
            .file_name()?
            .to_string_lossy()
            .into_owned(),
    )
}

fn names(path: PathBuf) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// All network cards, by address.
pub fn list(root: &Path) -> Vec<Nic> {
    let all = names(devices(root));
    all.iter()
        .filter_map(|address| read(root, address))
        .collect()
}

/// A network card; none if there is no such device, or it is none.
fn read(root: &Path, address: &str) -> Option<Nic> {
    let at = devices(root).join(address);
    if !text(at.join("class"))?.starts_with("0x02") {
        return None;
    }
    let hex = |name| text(at.join(name)).map(|id| id.trim_start_matches("0x").to_owned());
    let number = |name| text(at.join(name)).and_then(|count| count.parse::<u32>().ok());
    let state = |name: String| {
        let state = text(at.join("net").join(&name).join("operstate")).unwrap_or_default();
        (name, state)
    };
    Some(Nic {
        address: address.to_owned(),
        id: format!("{}:{}", hex("vendor")?, hex("device")?),
        pf: link(at.join("physfn")),
        vfs: number("sriov_totalvfs").map(|most| (number("sriov_numvfs").unwrap_or(0), most)),
        driver: link(at.join("driver")),
        group: link(at.join("iommu_group")),
        node: text(at.join("numa_node")).and_then(|node| node.parse().ok()),
        interfaces: names(at.join("net")).into_iter().map(state).collect(),
    })
}

fn find(root: &Path, address: &str) -> Result<Nic, String> {
    read(root, address).ok_or_else(|| {
        format!("{address} is no network card of this host: `ringway nic list` shows them")
    })
}

/// What makes `count` VFs of a PF, which is named by its interface or its address.
pub fn create_vfs(root: &Path, pf: &str, count: u32) -> Result<Vec<Step>, String> {
    let cards = list(root);
    let nic = cards
        .iter()
        .find(|nic| nic.address == pf || nic.interfaces.iter().any(|(name, _)| name == pf))
        .ok_or_else(|| {
            format!("{pf} is no network card of this host: `ringway nic list` shows them")
        })?;
    let Some((now, most)) = nic.vfs else {
        return Err(format!(
            "{pf} can have no VFs (no SR-IOV, or off in the firmware)"
        ));
    };
    if count > most {
        return Err(format!("{pf} can have {most} VFs, not {count}"));
    }
    if now == count {
        return Ok(Vec::new());
    }
    let file = devices(root).join(&nic.address).join("sriov_numvfs");
    let step = |count: u32| Step {
        file: file.clone(),
        text: count.to_string(),
    };
    if now > 0 && count > 0 {
        return Err(format!(
            "{pf} has {now} VFs, and their number changes only from or to 0, which takes them away from whoever uses them: \
             `ringway nic vf create {pf} 0` first"
        ));
    }
    Ok(vec![step(count)])
}

/// What hands a VF to VFIO.
pub fn bind(root: &Path, address: &str) -> Result<Vec<Step>, String> {
    let nic = find(root, address)?;
    if nic.driver.as_deref() == Some("vfio-pci") {
        return Ok(Vec::new());
    }
    if nic.pf.is_none() {
        return Err(format!(
            "{address} is no VF: make one with `ringway nic vf create {address} 4`"
        ));
    }
    let Some(group) = &nic.group else {
        return Err(format!(
            "{address} is in no IOMMU group: turn the IOMMU on (intel_iommu=on or amd_iommu=on on the kernel's command line, VT-d in the firmware)"
        ));
    };
    if let Some((name, _)) = nic.interfaces.iter().find(|(_, state)| state == "up") {
        return Err(format!(
            "{address} is in use as {name}, which is up: ip link set {name} down"
        ));
    }
    if !root.join("sys/bus/pci/drivers/vfio-pci").exists() {
        return Err("the driver vfio-pci is not loaded: modprobe vfio-pci".to_owned());
    }
    let members = devices(root).join(address).join("iommu_group/devices");
    for other in names(members).iter().filter(|other| *other != address) {
        let driver = link(devices(root).join(other).join("driver"));
        if let Some(driver) = driver.filter(|driver| !matches!(&**driver, "vfio-pci" | "pcieport"))
        {
            return Err(format!(
                "IOMMU group {group} of {address} is not viable: {other} in it is bound to {driver}"
            ));
        }
    }
    Ok(rebind(root, &nic, "vfio-pci"))
}

/// What gives a device back to the kernel's own driver.
pub fn unbind(root: &Path, address: &str) -> Result<Vec<Step>, String> {
    let nic = find(root, address)?;
    match nic.driver.as_deref() {
        Some("vfio-pci") => Ok(rebind(root, &nic, "")),
        Some(other) => Err(format!(
            "{address} is bound to {other}, not to vfio-pci: nothing to undo"
        )),
        None => Ok(rebind(root, &nic, "")),
    }
}

fn rebind(root: &Path, nic: &Nic, driver: &str) -> Vec<Step> {
    let at = devices(root).join(&nic.address);
    let step = |file: PathBuf, text: &str| Step {
        file,
        text: text.to_owned(),
    };
    let mut steps = vec![step(at.join("driver_override"), driver)];
    if nic.driver.is_some() {
        steps.push(step(at.join("driver/unbind"), &nic.address));
    }
    steps.push(step(root.join("sys/bus/pci/drivers_probe"), &nic.address));
    steps
}

/// Does it; stops at the first step that fails.
pub fn perform(steps: &[Step]) -> Result<(), String> {
    for step in steps {
        fs::write(&step.file, format!("{}\n", step.text)).map_err(|error| {
            let remedy = match error.kind() {
                std::io::ErrorKind::PermissionDenied => " (this needs root)",
                _ => "",
            };
            format!("{step}: {error}{remedy}")
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
