//! Network cards as sysfs tells of them, and the few writes that make VFs and hand them to VFIO.
//!
//! What is to be done is decided first and shown as it is (`--dry-run`): every check, then a list of files and what goes into them.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
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
    /// Those of them that are set up, with a link or without.
    #[serde(skip)]
    up: Vec<String>,
}

/// VFs that an uplink can have.
const VFS: [&str; 6] = [
    "8086:10ed",
    "8086:152e",
    "8086:1515",
    "8086:1565",
    "8086:15a8",
    "8086:15c5",
];
/// Memory that the rings of four queue pairs take, in hugepages.
const RINGS: u64 = 16 << 20;
/// `CAP_IPC_LOCK` (linux/capability.h).
const IPC_LOCK: u32 = 14;

/// One write, or the end of a file of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The file.
    pub file: PathBuf,
    /// What goes into it; none: it is removed.
    pub text: Option<String>,
}

impl Step {
    fn write(file: PathBuf, text: impl Into<String>) -> Step {
        let text = Some(text.into());
        Step { file, text }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.text {
            Some(text) => write!(f, "echo {text} > {}", self.file.display()),
            None => write!(f, "rm {}", self.file.display()),
        }
    }
}

impl Nic {
    /// A VF: of a PF of this host, or handed through to this virtual machine, which sees no PF.
    pub fn is_vf(&self) -> bool {
        self.pf.is_some() || VFS.contains(&&*self.id)
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
    let interfaces: Vec<(String, String)> = names(at.join("net")).into_iter().map(state).collect();
    // A VF without a carrier is "down" and nevertheless somebody's: IFF_UP is what counts.
    let set_up = |name: &String| {
        let flags = text(at.join("net").join(name).join("flags")).unwrap_or_default();
        u32::from_str_radix(flags.trim_start_matches("0x"), 16).is_ok_and(|flags| flags & 1 == 1)
    };
    let up = interfaces
        .iter()
        .filter(|(name, state)| state == "up" || set_up(name))
        .map(|(name, _)| name.clone())
        .collect();
    Some(Nic {
        address: address.to_owned(),
        id: format!("{}:{}", hex("vendor")?, hex("device")?),
        pf: link(at.join("physfn")),
        vfs: number("sriov_totalvfs").map(|most| (number("sriov_numvfs").unwrap_or(0), most)),
        driver: link(at.join("driver")),
        group: link(at.join("iommu_group")),
        node: text(at.join("numa_node")).and_then(|node| node.parse().ok()),
        interfaces,
        up,
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
    let step = |count: u32| Step::write(file.clone(), count.to_string());
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
    if !nic.is_vf() {
        return Err(format!(
            "{address} is no VF: make one with `ringway nic vf create {address} 4`"
        ));
    }
    let Some(group) = &nic.group else {
        return Err(format!(
            "{address} is in no IOMMU group: turn the IOMMU on (intel_iommu=on or amd_iommu=on on the kernel's command line, VT-d in the firmware)"
        ));
    };
    if let Some(name) = nic.up.first() {
        return Err(format!(
            "{address} is in use as {name}, which is up: ip link set {name} down"
        ));
    }
    if !root.join("sys/bus/pci/drivers/vfio-pci").exists() {
        return Err("the driver vfio-pci is not loaded: modprobe vfio-pci".to_owned());
    }
    if let Some((other, driver)) = not_viable(root, address) {
        return Err(format!(
            "IOMMU group {group} of {address} is not viable: {other} in it is bound to {driver}, and VFIO hands out whole groups: \
             unbind it, or put the card into a slot with a group of its own (ACS)"
        ));
    }
    memlock(root)?;
    let mut steps = Vec::new();
    let before = text(devices(root).join(address).join("driver_override"));
    if let Some(before) = before.filter(|text| !matches!(&**text, "" | "(null)" | "vfio-pci")) {
        steps.push(Step::write(kept(root, address), before));
    }
    steps.extend(rebind(root, &nic, "vfio-pci"));
    Ok(steps)
}

/// Whether this process may pin what the rings of a VF take, as a switch started by the same user would have to.
fn memlock(root: &Path) -> Result<(), String> {
    let mine = |file: &str, key: &str| -> Option<String> {
        let all = text(root.join("proc/self").join(file))?;
        let line = all.lines().find_map(|line| line.strip_prefix(key))?;
        Some(line.split_whitespace().next()?.to_owned())
    };
    let capabilities = mine("status", "CapEff:").and_then(|set| u64::from_str_radix(&set, 16).ok());
    if capabilities.is_some_and(|set| set >> IPC_LOCK & 1 == 1) {
        return Ok(());
    }
    let limit = mine("limits", "Max locked memory").and_then(|limit| limit.parse::<u64>().ok());
    match limit {
        Some(bytes) if bytes < RINGS => Err(format!(
            "the memlock limit is {} KiB, and a VF's rings take up to {} KiB that must stay in memory: ulimit -l unlimited (systemd: \
             LimitMEMLOCK=infinity; docker run --ulimit memlock=-1)",
            bytes >> 10,
            RINGS >> 10
        )),
        _ => Ok(()), // unlimited, or unknown
    }
}

/// Another device of the same IOMMU group that a driver of the kernel has, and that driver.
pub(super) fn not_viable(root: &Path, address: &str) -> Option<(String, String)> {
    let members = names(devices(root).join(address).join("iommu_group/devices"));
    let others = members.into_iter().filter(|other| other != address);
    others
        .filter_map(|other| {
            let driver = link(devices(root).join(&other).join("driver"))?;
            Some((other, driver))
        })
        .find(|(_, driver)| !matches!(&**driver, "vfio-pci" | "pcieport"))
}

/// Where the driver override that a device had before is kept.
fn kept(root: &Path, address: &str) -> PathBuf {
    root.join("run/ringway/nic").join(address)
}

/// Whether VFIO has a device, after it was bound.
pub fn bound(root: &Path, address: &str) -> Result<(), String> {
    match find(root, address)?.driver.as_deref() {
        Some("vfio-pci") => Ok(()),
        driver => Err(format!(
            "{address} is bound to {}, not to vfio-pci, although all was done for that: see dmesg",
            driver.unwrap_or("nothing")
        )),
    }
}

/// What gives a device back to the kernel's own driver.
pub fn unbind(root: &Path, address: &str) -> Result<Vec<Step>, String> {
    let nic = find(root, address)?;
    if let Some(other) = nic.driver.as_deref().filter(|driver| *driver != "vfio-pci") {
        return Err(format!(
            "{address} is bound to {other}, not to vfio-pci: nothing to undo"
        ));
    }
    let kept = kept(root, address);
    let before = text(kept.clone());
    let mut steps = rebind(root, &nic, before.as_deref().unwrap_or(""));
    steps.extend(before.map(|_| Step {
        file: kept,
        text: None,
    }));
    Ok(steps)
}

fn rebind(root: &Path, nic: &Nic, driver: &str) -> Vec<Step> {
    let at = devices(root).join(&nic.address);
    let mut steps = vec![Step::write(at.join("driver_override"), driver)];
    if nic.driver.is_some() {
        steps.push(Step::write(at.join("driver/unbind"), &*nic.address));
    }
    steps.push(Step::write(
        root.join("sys/bus/pci/drivers_probe"),
        &*nic.address,
    ));
    steps
}

/// Does it; stops at the first step that fails.
pub fn perform(steps: &[Step]) -> Result<(), String> {
    for step in steps {
        act(step).map_err(|error| {
            let remedy = match error.kind() {
                ErrorKind::PermissionDenied => " (this needs root)",
                ErrorKind::ReadOnlyFilesystem => {
                    " (in a container /sys cannot be written to: do it on the host)"
                }
                ErrorKind::ResourceBusy => " (somebody uses it: a switch, a virtual machine?)",
                _ => "",
            };
            format!("{step}: {error}{remedy}")
        })?;
    }
    Ok(())
}

fn act(step: &Step) -> std::io::Result<()> {
    let Some(text) = &step.text else {
        return fs::remove_file(&step.file);
    };
    // sysfs has all its directories; our own may have to be made.
    if let Some(dir) = step
        .file
        .parent()
        .filter(|dir| dir.ends_with("ringway/nic"))
    {
        fs::create_dir_all(dir)?;
    }
    fs::write(&step.file, format!("{text}\n"))
}

#[cfg(test)]
pub(super) mod tests;
