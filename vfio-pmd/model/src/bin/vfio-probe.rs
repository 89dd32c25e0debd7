//! `vfio-probe`: the driver's way over kernel VFIO, step by step, on a device that is no 82599: the VF of an 82576, which QEMU has.
//!
//! What only an 82599 could answer is the model's business; here registers, configuration space, memory, interrupts' set-up and the reset of
//! a device that neither we nor the model's authors wrote must do what the transport promises.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_pmd::transport::{DmaRange, Transport};
use vfio_pmd::vfio::VfioPci;
use vfio_pmd::{Options, Vf};

// Registers of the 82576's VF (Linux igbvf: regs.h).
const IVAR: u32 = 0x1700;
const IVAR_VALID: u32 = 0x80;
const RXDCTL: u32 = 0x2828;
const RXDCTL_ENABLE: u32 = 1 << 25;

const PAGE: u64 = 4096;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let address = arguments
        .first()
        .context("usage: vfio-probe ADDRESS [hold]")?;
    let device = VfioPci::open(address).context("opening")?;
    identity(&*device)?;
    only_one_user(address)?;
    registers(&device)?;
    interrupts(&device)?;
    memory(&*device)?;
    reset(&device)?;
    if arguments.get(1).is_some_and(|word| word == "hold") {
        // Ends by a signal: interrupts on, memory mapped.
        interrupts(&device)?;
        let held = Page::map(&*device, 0x10_0000)?;
        println!("holds");
        std::io::stdin().read_to_end(&mut Vec::new())?;
        drop(held);
    }
    // No 82599: a sentence, and nothing is left.
    let refused = Vf::open(device, &Options::default()).err();
    let sentence = refused.context("taken for an 82599")?.to_string();
    ensure!(sentence.contains("10ca"), "{sentence}");
    println!("refused: {sentence}");
    VfioPci::open(address).context("opening again")?;
    println!("all is well");
    Ok(())
}

fn identity(device: &dyn Transport) -> Result<()> {
    let mut ids = [0; 4];
    device.read_config(0, &mut ids)?;
    ensure!(ids == [0x86, 0x80, 0xca, 0x10], "{ids:02x?}");
    let mut command = [0; 2];
    device.read_config(4, &mut command)?;
    ensure!(
        command[0] & 6 == 6,
        "memory and bus master are off: {command:02x?}"
    );
    ensure!(device.vectors() == 3, "{} vectors", device.vectors());
    ensure!(!device.iova_ranges().is_empty());
    println!(
        "{}: {} vectors, IOVAs {:x?}",
        device.name(),
        device.vectors(),
        device.iova_ranges()
    );
    Ok(())
}

fn only_one_user(address: &str) -> Result<()> {
    let second = VfioPci::open(address).err().context("opened twice")?;
    ensure!(second.to_string().contains("another process"), "{second}");
    Ok(())
}

/// A register, written and read through the mapping.
fn registers(device: &Arc<VfioPci>) -> Result<()> {
    let bar = Arc::clone(device).registers()?;
    for value in [IVAR_VALID | 1, IVAR_VALID] {
        bar.write(IVAR, value);
        ensure!(bar.read(IVAR) == value, "IVAR {:x}", bar.read(IVAR));
    }
    Ok(())
}

/// All vectors at once, fewer, none. (That interrupts arrive is tested with the model's VF: QEMU's sends none when EICS asks for one.)
fn interrupts(device: &VfioPci) -> Result<()> {
    let signals = (0..3)
        .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))
        .collect::<Result<Vec<OwnedFd>, _>>()?;
    let given: Vec<_> = signals.iter().map(|fd| Some(fd.as_fd())).collect();
    for some in [&given[..], &given[..1], &[], &given[..]] {
        device
            .set_interrupts(some)
            .with_context(|| format!("{} vectors", some.len()))?;
    }
    println!("interrupts are set up");
    Ok(())
}

/// A page of memory that a device can reach.
struct Page<'a> {
    device: &'a dyn Transport,
    iova: u64,
    _here: Vec<u8>,
}

impl<'a> Page<'a> {
    fn map(device: &'a dyn Transport, iova: u64) -> std::io::Result<Page<'a>> {
        let fd = memfd_create("probe", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, PAGE)?;
        // Kernel VFIO pins what is at the address; any whole page of this process will do.
        let here = vec![0u8; 2 * PAGE as usize];
        let address = (here.as_ptr() as usize).next_multiple_of(PAGE as usize);
        device.map_dma(&DmaRange {
            fd: fd.as_fd(),
            offset: 0,
            len: PAGE,
            iova,
            address,
        })?;
        Ok(Page {
            device,
            iova,
            _here: here,
        })
    }
}

impl Drop for Page<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.device.unmap_dma(self.iova, PAGE) {
            eprintln!("unmapping: {error}");
        }
    }
}

fn memory(device: &dyn Transport) -> Result<()> {
    let page = Page::map(device, 0x10_0000).context("mapping")?;
    ensure!(
        Page::map(device, 0x10_0000).is_err(),
        "mapped over a mapping"
    );
    ensure!(
        device.unmap_dma(0x20_0000, PAGE).is_err(),
        "unmapped what was not mapped"
    );
    drop(page);
    ensure!(device.unmap_dma(0x10_0000, PAGE).is_err(), "unmapped twice");
    drop(Page::map(device, 0x10_0000).context("mapping again")?);
    println!("memory comes and goes");
    Ok(())
}

fn reset(device: &Arc<VfioPci>) -> Result<()> {
    let bar = Arc::clone(device).registers()?;
    bar.write(RXDCTL, RXDCTL_ENABLE);
    ensure!(
        bar.read(RXDCTL) & RXDCTL_ENABLE != 0,
        "a queue that does not start"
    );
    device.reset().context("reset")?;
    ensure!(
        bar.read(RXDCTL) & RXDCTL_ENABLE == 0,
        "a reset left a queue running"
    );
    println!("reset");
    let mut command = [0; 2];
    device.read_config(4, &mut command)?;
    ensure!(command[0] & 6 == 6, "off after the reset: {command:02x?}");
    Ok(())
}
