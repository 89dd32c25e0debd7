//! What the driver asks of the way to its device: registers, DMA mappings, interrupts, a reset.
//!
//! Three things implement it: `vfio` (a device that the kernel's VFIO hands out), `vfio_user` (the same over a
//! socket, served by another process) and a model of the device that lives in this process, for tests. The driver is the same
//! above all three.
//!
//! Threads: everything takes `&self` and may be called from several threads at once. A worker calls only [`Registers::write`]
//! (one tail write per burst) and [`Registers::read`]; the rest belongs to control threads and may block.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::mmio::Bar;

/// Access to 32-bit registers that is not a plain load or store: a message to a server, a call into a model.
pub trait Registers: Send + Sync {
    /// Reads the register at byte `offset` of BAR0. A device that is gone reads as all ones, like on PCI Express.
    fn read(&self, offset: u32) -> u32;

    /// Writes the register at byte `offset` of BAR0. A device that is gone swallows it.
    fn write(&self, offset: u32, value: u32);
}

/// Memory that the device may access: `len` bytes of `fd` from `offset` appear to it at `iova`.
///
/// Offset, length and IOVA are multiples of 4096; the memory can be read and written by the device. Whoever maps keeps the memory
/// until [`Transport::unmap_dma`] returned.
#[derive(Clone, Copy, Debug)]
pub struct DmaRange<'a> {
    /// The file behind the memory, a memfd (of huge pages where there are some).
    pub fd: BorrowedFd<'a>,
    /// Where in the file the memory starts, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The address the device uses.
    pub iova: u64,
    /// Where this process has the memory mapped: kernel VFIO pins pages by that address. Others map `fd` themselves.
    pub address: usize,
}

/// A way to one VF. Dropping it closes the device: DMA mappings end, interrupts are off, and the next open resets.
pub trait Transport: Send + Sync {
    /// Where the device is, for messages: a PCI address or a socket's path.
    fn name(&self) -> String;

    /// Reads configuration space.
    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes configuration space.
    fn write_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()>;

    /// BAR0, the registers. Size as the transport reports it, never from configuration space (a VF's BARs read 0).
    fn registers(self: Arc<Self>) -> io::Result<Bar>;

    /// IOVAs that the device can be given; the driver keeps inside.
    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        vec![0..=(1 << 39) - 1]
    }

    /// Lets the device access memory. Overlapping an existing mapping is an error.
    fn map_dma(&self, range: &DmaRange<'_>) -> io::Result<()>;

    /// Takes back exactly one earlier mapping. When this returns, the device cannot reach the memory any more.
    fn unmap_dma(&self, iova: u64, len: u64) -> io::Result<()>;

    /// MSI-X vectors the device has.
    fn vectors(&self) -> u32;

    /// Vector `i` signals the eventfd `signals[i]`; all others are off. Replaces what was set before; an empty slice turns all off.
    fn set_interrupts(&self, signals: &[Option<BorrowedFd<'_>>]) -> io::Result<()>;

    /// Function-level reset.
    fn reset(&self) -> io::Result<()>;

    /// Lets time pass. A model with a clock of its own moves that clock instead, so that tests take no time.
    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }
}
