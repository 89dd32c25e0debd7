//! A device that the kernel's VFIO hands out; every ioctl of the crate.
//!
//! [`Type1`] is the way to an IOMMU's mappings by groups and containers; [`VfioPci`] needs of it only a device's descriptor, map
//! and unmap, so that iommufd can stand beside it.
//!
//! Everything ends with its descriptor: a killed process leaves no mapping, no interrupt, and a device that the kernel resets.
//!
//! An island of `unsafe`: ioctls with structures, and the registers' mapping.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{File, OpenOptions, read_link};
use std::io;
use std::mem::size_of;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use vfio_bindings::bindings::vfio as abi;

use crate::mmio::Bar;
use crate::regs;
use crate::transport::{DmaRange, Transport};

/// Number of a VFIO request: `_IO(';', 100 + n)`, without size or direction.
const fn request(n: u32) -> libc::Ioctl {
    ((abi::VFIO_TYPE as u32) << 8 | (abi::VFIO_BASE + n)) as libc::Ioctl
}
const GET_API_VERSION: libc::Ioctl = request(0);
const CHECK_EXTENSION: libc::Ioctl = request(1);
const SET_IOMMU: libc::Ioctl = request(2);
const GROUP_GET_STATUS: libc::Ioctl = request(3);
const GROUP_SET_CONTAINER: libc::Ioctl = request(4);
const GROUP_GET_DEVICE_FD: libc::Ioctl = request(6);
const DEVICE_GET_REGION_INFO: libc::Ioctl = request(8);
const DEVICE_GET_IRQ_INFO: libc::Ioctl = request(9);
const DEVICE_SET_IRQS: libc::Ioctl = request(10);
const DEVICE_RESET: libc::Ioctl = request(11);
const IOMMU_GET_INFO: libc::Ioctl = request(12);
const IOMMU_MAP_DMA: libc::Ioctl = request(13);
const IOMMU_UNMAP_DMA: libc::Ioctl = request(14);

/// Command register in configuration space: memory space and bus master.
const COMMAND: u64 = 4;
const COMMAND_ON: u16 = 0x6;
/// MSI-X vectors that are ever set at once.
const VECTORS_MAX: usize = 8;

/// The structures of the ABI as this file passes them.
///
/// # Safety
/// Plain integers, laid out as the kernel expects for the request it is used with.
unsafe trait Argument: Sized {}
// SAFETY: generated from the kernel's header.
unsafe impl Argument for abi::vfio_group_status {}
// SAFETY: as above.
unsafe impl Argument for abi::vfio_region_info {}
// SAFETY: as above.
unsafe impl Argument for abi::vfio_irq_info {}
// SAFETY: as above.
unsafe impl Argument for abi::vfio_iommu_type1_dma_map {}
// SAFETY: as above.
unsafe impl Argument for abi::vfio_iommu_type1_dma_unmap {}
// SAFETY: the head of `vfio_irq_set`, and as many descriptors as its `count` says at most.
unsafe impl Argument for IrqSet {}
// SAFETY: integers; `argsz` says how many bytes there are.
unsafe impl Argument for IommuInfo {}

/// `vfio_irq_set` with room for descriptors.
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    fds: [RawFd; VECTORS_MAX],
}

/// `vfio_iommu_type1_info` with room for its capabilities.
#[repr(C, align(8))]
struct IommuInfo {
    argsz: u32,
    flags: u32,
    page_sizes: u64,
    cap_offset: u32,
    pad: u32,
    caps: [u8; IOMMU_CAPS],
}
const IOMMU_CAPS: usize = 4096 - 24;
const _: () = assert!(size_of::<IommuInfo>() == 4096);

/// Calls the kernel with a structure.
fn call<T: Argument>(fd: &File, request: libc::Ioctl, argument: &mut T) -> io::Result<i32> {
    // SAFETY: `T` is a structure of the ABI for its request (each call below pairs them), exclusively borrowed, and its `argsz` is
    // at most its size.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

/// Calls the kernel with a number, or none.
fn call_number(fd: &File, request: libc::Ioctl, number: u64) -> io::Result<i32> {
    // SAFETY: the requests used with this take no pointer.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, number) })
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// An error with a sentence in front that says what to do.
fn explain(error: &io::Error, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn other(what: String) -> io::Error {
    io::Error::other(what)
}

/// An IOMMU group in a container of its own (the older of VFIO's two interfaces).
struct Type1 {
    container: File,
    group: File,
}

impl Type1 {
    /// Opens the group of the device at `address`; `devices` is where the device files are (`/dev/vfio`).
    fn open(address: &str, sysfs: &Path, devices: &Path) -> io::Result<Type1> {
        let device = sysfs.join(address);
        if !device.exists() {
            return Err(other(format!("no PCI device {address}")));
        }
        let group = read_link(device.join("iommu_group")).map_err(|error| {
            explain(
                &error,
                format!("{address} is in no IOMMU group (is the IOMMU on: intel_iommu=on, amd_iommu=on?)"),
            )
        })?;
        let group = group.file_name().unwrap_or_default().to_owned();
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let container = open(&devices.join("vfio"))
            .map_err(|error| explain(&error, "/dev/vfio/vfio (modprobe vfio-pci)"))?;
        if call_number(&container, GET_API_VERSION, 0)? != abi::VFIO_API_VERSION as i32 {
            return Err(other("an unknown version of VFIO".into()));
        }
        if call_number(
            &container,
            CHECK_EXTENSION,
            u64::from(abi::VFIO_TYPE1v2_IOMMU),
        )? != 1
        {
            return Err(other("no type 1 IOMMU (modprobe vfio_iommu_type1)".into()));
        }
        let path = devices.join(&group);
        let group = open(&path).map_err(|error| {
            let remedy = match error.raw_os_error() {
                Some(libc::EBUSY) => "another process uses this group",
                Some(libc::EACCES | libc::EPERM) => "no permission: chown the file to this user",
                _ => "bind the device to vfio-pci (ringway nic bind)",
            };
            explain(&error, format!("{}: {remedy}", path.display()))
        })?;
        let mut status = abi::vfio_group_status {
            argsz: size_of::<abi::vfio_group_status>() as u32,
            flags: 0,
        };
        call(&group, GROUP_GET_STATUS, &mut status)?;
        if status.flags & abi::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(other(format!(
                "IOMMU group {} is not viable: other devices in it are bound to kernel drivers",
                path.display()
            )));
        }
        let mut fd = container.as_raw_fd();
        // SAFETY: SET_CONTAINER takes a pointer to a descriptor.
        checked(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &raw mut fd) })
            .map_err(|error| explain(&error, "joining the container"))?;
        call_number(&container, SET_IOMMU, u64::from(abi::VFIO_TYPE1v2_IOMMU))
            .map_err(|error| explain(&error, "turning on the IOMMU (vfio_iommu_type1)"))?;
        Ok(Type1 { container, group })
    }

    fn device(&self, address: &str) -> io::Result<File> {
        let name = CString::new(address)?;
        // SAFETY: GET_DEVICE_FD takes a C string.
        let fd = checked(unsafe {
            libc::ioctl(self.group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr())
        })
        .map_err(|error| explain(&error, format!("{address} is not bound to vfio-pci")))?;
        // SAFETY: the kernel just made this descriptor for us.
        Ok(unsafe { File::from_raw_fd(fd) })
    }

    fn map(&self, range: &DmaRange<'_>) -> io::Result<()> {
        let mut map = abi::vfio_iommu_type1_dma_map {
            argsz: size_of::<abi::vfio_iommu_type1_dma_map>() as u32,
            flags: abi::VFIO_DMA_MAP_FLAG_READ | abi::VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: range.address as u64,
            iova: range.iova,
            size: range.len,
        };
        match call(&self.container, IOMMU_MAP_DMA, &mut map) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => Err(explain(
                &error,
                format!(
                    "the memlock limit is too low for {} MiB (ulimit -l; LimitMEMLOCK=)",
                    range.len >> 20
                ),
            )),
            Err(error) => Err(error),
        }
    }

    fn unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        let mut unmap = abi::vfio_iommu_type1_dma_unmap {
            argsz: size_of::<abi::vfio_iommu_type1_dma_unmap>() as u32,
            flags: 0,
            iova,
            size: len,
            data: Default::default(),
        };
        call(&self.container, IOMMU_UNMAP_DMA, &mut unmap)?;
        if unmap.size == len {
            return Ok(());
        }
        Err(other(format!("{} of {len} bytes were mapped", unmap.size)))
    }

    /// What the IOMMU can map, without holes such as the MSI window; a guess of one page table if it does not say.
    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        let mut info = IommuInfo {
            argsz: size_of::<IommuInfo>() as u32,
            flags: 0,
            page_sizes: 0,
            cap_offset: 0,
            pad: 0,
            caps: [0; IOMMU_CAPS],
        };
        let ranges = match call(&self.container, IOMMU_GET_INFO, &mut info) {
            Ok(_) if info.flags & abi::VFIO_IOMMU_INFO_CAPS != 0 => {
                ranges_of(&info.caps, info.cap_offset)
            }
            _ => Vec::new(),
        };
        if ranges.is_empty() {
            // Below the MSI window, on every machine.
            return vec![0..=0xFEDF_FFFF];
        }
        ranges
    }
}

/// Finds the IOVA ranges among the capabilities, which begin 24 bytes into the structure.
fn ranges_of(caps: &[u8], first: u32) -> Vec<RangeInclusive<u64>> {
    const HEAD: usize = 24;
    let bytes = |at: usize, len: usize| {
        at.checked_sub(HEAD)
            .and_then(|at| caps.get(at..at.checked_add(len)?))
            .unwrap_or(&[])
    };
    let u64_at = |at| bytes(at, 8).try_into().map_or(0, u64::from_ne_bytes);
    let u32_at = |at| bytes(at, 4).try_into().map_or(0, u32::from_ne_bytes);
    let mut at = first as usize;
    // A chain of capabilities is short; a loop in it ends here.
    for _ in 0..16 {
        let id = u32_at(at) & 0xFFFF;
        if id == abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
            let count = (u32_at(at + 8) as usize).min(IOMMU_CAPS / 16);
            return (0..count)
                .map(|index| (u64_at(at + 16 + 16 * index), u64_at(at + 24 + 16 * index)))
                .filter(|(start, end)| end > start)
                .map(|(start, end)| start..=end)
                .collect();
        }
        at = u32_at(at + 4) as usize;
        if at == 0 {
            break;
        }
    }
    Vec::new()
}

/// A VF that is bound to `vfio-pci`. Fields are dropped in order: the device before its group and container.
pub struct VfioPci {
    address: String,
    device: File,
    config: u64,
    vectors: u32,
    iommu: Type1,
}

impl VfioPci {
    /// Opens the VF at a PCI address such as `0000:81:10.0`.
    pub fn open(address: &str) -> io::Result<Arc<VfioPci>> {
        let iommu = Type1::open(
            address,
            Path::new("/sys/bus/pci/devices"),
            Path::new("/dev/vfio"),
        )?;
        let device = iommu.device(address)?;
        let bar0 = region(&device, abi::VFIO_PCI_BAR0_REGION_INDEX)?;
        if bar0.size < regs::BAR0_LEN {
            return Err(other(format!(
                "BAR0 has {} bytes, a VF has {}",
                bar0.size,
                regs::BAR0_LEN
            )));
        }
        let config = region(&device, abi::VFIO_PCI_CONFIG_REGION_INDEX)?.offset;
        let mut irqs = abi::vfio_irq_info {
            argsz: size_of::<abi::vfio_irq_info>() as u32,
            flags: 0,
            index: abi::VFIO_PCI_MSIX_IRQ_INDEX,
            count: 0,
        };
        call(&device, DEVICE_GET_IRQ_INFO, &mut irqs)?;
        let pci = VfioPci {
            address: address.into(),
            device,
            config,
            vectors: irqs.count.min(VECTORS_MAX as u32),
            iommu,
        };
        pci.turn_on()?;
        Ok(Arc::new(pci))
    }

    /// Lets the device master the bus. VFIO leaves that to its user.
    fn turn_on(&self) -> io::Result<()> {
        let mut command = [0; 2];
        self.device
            .read_exact_at(&mut command, self.config + COMMAND)?;
        let command = u16::from_le_bytes(command) | COMMAND_ON;
        self.device
            .write_all_at(&command.to_le_bytes(), self.config + COMMAND)
    }
}

fn region(device: &File, index: u32) -> io::Result<abi::vfio_region_info> {
    let mut info = abi::vfio_region_info {
        argsz: size_of::<abi::vfio_region_info>() as u32,
        flags: 0,
        index,
        cap_offset: 0,
        size: 0,
        offset: 0,
    };
    call(device, DEVICE_GET_REGION_INFO, &mut info)?;
    Ok(info)
}

impl Transport for VfioPci {
    fn name(&self) -> String {
        self.address.clone()
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> io::Result<()> {
        self.device
            .read_exact_at(bytes, self.config + u64::from(offset))
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        self.device
            .write_all_at(bytes, self.config + u64::from(offset))
    }

    fn registers(self: Arc<Self>) -> io::Result<Bar> {
        let bar0 = region(&self.device, abi::VFIO_PCI_BAR0_REGION_INDEX)?;
        if bar0.flags & abi::VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Err(other("BAR0 cannot be mapped".into()));
        }
        // SAFETY: a fresh mapping of a region of the device; the result is checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bar0.size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                self.device.as_raw_fd(),
                bar0.offset as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a whole mapping of the registers that was just made, and is handed over.
        Ok(unsafe { Bar::mapped(start, bar0.size as usize) })
    }

    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.iommu.iova_ranges()
    }

    fn map_dma(&self, range: &DmaRange<'_>) -> io::Result<()> {
        self.iommu.map(range)
    }

    fn unmap_dma(&self, iova: u64, len: u64) -> io::Result<()> {
        self.iommu.unmap(iova, len)
    }

    fn vectors(&self) -> u32 {
        self.vectors
    }

    /// All vectors at once: kernels before 6.5 cannot add one later.
    fn set_interrupts(&self, signals: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        let count = signals.len().min(VECTORS_MAX);
        let mut set = IrqSet {
            argsz: 20,
            flags: abi::VFIO_IRQ_SET_DATA_NONE | abi::VFIO_IRQ_SET_ACTION_TRIGGER,
            index: abi::VFIO_PCI_MSIX_IRQ_INDEX,
            start: 0,
            count: 0,
            fds: [-1; VECTORS_MAX],
        };
        if count > 0 {
            set.argsz += (count * size_of::<RawFd>()) as u32;
            set.flags = abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
            set.count = count as u32;
            for (slot, signal) in set.fds.iter_mut().zip(signals) {
                *slot = signal.map_or(-1, |fd| fd.as_raw_fd());
            }
        }
        call(&self.device, DEVICE_SET_IRQS, &mut set).map(drop)
    }

    fn reset(&self) -> io::Result<()> {
        match call_number(&self.device, DEVICE_RESET, 0) {
            Ok(_) => self.turn_on(),
            // A device without function-level reset: the VF's own reset has to do.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cap(id: u16, next: u32, ranges: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(id.to_ne_bytes());
        bytes.extend(1u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes.extend((ranges.len() as u32).to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        for (start, end) in ranges {
            bytes.extend(start.to_ne_bytes());
            bytes.extend(end.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn iova_ranges_are_found_behind_other_capabilities() {
        let mut caps = cap(3, 24 + 16, &[]);
        caps.extend(cap(1, 0, &[(0, 0xFEDF_FFFF), (0xFEF0_0000, u64::MAX)]));
        let ranges = ranges_of(&caps, 24);
        assert_eq!(ranges, vec![0..=0xFEDF_FFFF, 0xFEF0_0000..=u64::MAX]);
    }

    #[test]
    fn broken_capabilities_end_the_search() {
        assert!(ranges_of(&[], 24).is_empty());
        assert!(ranges_of(&cap(3, 24, &[]), 24).is_empty());
        assert!(ranges_of(&cap(3, u32::MAX, &[]), 24).is_empty());
        assert!(ranges_of(&cap(3, 5, &[]), 24).is_empty());
        let mut lying = cap(1, 0, &[(1 << 20, 1 << 30)]);
        lying[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(ranges_of(&lying, 24), vec![1 << 20..=1 << 30]);
    }

    #[test]
    fn a_device_that_is_not_there_or_has_no_iommu_is_a_sentence() {
        let dir = std::env::temp_dir().join(format!("vfio-pmd-{}", std::process::id()));
        let open = |name: &str| {
            Type1::open(name, &dir, Path::new("/nowhere"))
                .err()
                .unwrap()
        };
        std::fs::create_dir_all(dir.join("0000:00:01.0")).unwrap();
        let missing = open("0000:00:02.0").to_string();
        let without = open("0000:00:01.0").to_string();
        std::os::unix::fs::symlink("../groups/7", dir.join("0000:00:01.0/iommu_group")).unwrap();
        let no_vfio = open("0000:00:01.0").to_string();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(missing, "no PCI device 0000:00:02.0");
        assert!(without.contains("is in no IOMMU group"), "{without}");
        assert!(no_vfio.contains("modprobe vfio-pci"), "{no_vfio}");
    }
}
