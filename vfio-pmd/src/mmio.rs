//! BAR0 as checked 32-bit registers: the only memory-mapped I/O of the crate.
//!
//! An island of `unsafe`: a mapped BAR is a raw pointer into the device.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{
    Ordering::{Acquire, Release},
    fence,
};

use crate::transport::Registers;

/// What a register reads as when the device is gone (PCI Express completes a read without an answer with all ones).
pub const GONE: u32 = u32::MAX;

/// The registers of a VF. Clones are the same registers; the mapping lives as long as one of them.
///
/// Threads: a register access is one load or one store and may come from any thread. Which thread may touch which register is
/// settled above: a queue's tail belongs to whoever holds that queue.
#[derive(Clone)]
pub struct Bar(Access);

#[derive(Clone)]
enum Access {
    Mapped(Arc<Mapping>),
    Called(Arc<dyn Registers>),
}

/// Registers mapped into this process; unmapped on drop.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is shared device memory that is only touched by single volatile 32-bit accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above; the device orders concurrent accesses.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `Bar::mapped` took over exactly this mapping, and the last owner of the `Arc` is going away.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

impl Bar {
    /// Registers behind calls.
    pub fn called(registers: Arc<dyn Registers>) -> Bar {
        Bar(Access::Called(registers))
    }

    /// Registers mapped with `mmap`; this takes the mapping over and undoes it when the last clone is dropped.
    ///
    /// # Safety
    /// `start..start + len` is a whole `mmap`ed region of device registers, page-aligned, and nobody else unmaps it.
    pub unsafe fn mapped(start: NonNull<u8>, len: usize) -> Bar {
        Bar(Access::Mapped(Arc::new(Mapping { start, len })))
    }

    /// Reads a register. What the device wrote to memory before is visible after it.
    #[inline]
    pub fn read(&self, offset: u32) -> u32 {
        match &self.0 {
            Access::Mapped(map) => {
                let Some(at) = map.register(offset) else {
                    debug_assert!(false, "register {offset:#x} outside BAR0");
                    return GONE;
                };
                // SAFETY: `register` checked that four aligned bytes lie inside the mapping, which `map` keeps alive.
                let value = unsafe { at.read_volatile() };
                // Acquire: a read pushes the device's earlier posted writes ahead of it (PCIe ordering); loads stay behind.
                fence(Acquire);
                value
            }
            Access::Called(registers) => registers.read(offset),
        }
    }

    /// Writes a register. What this thread wrote to memory before is visible to the device that sees the write.
    #[inline]
    pub fn write(&self, offset: u32, value: u32) {
        match &self.0 {
            Access::Mapped(map) => {
                let Some(at) = map.register(offset) else {
                    debug_assert!(false, "register {offset:#x} outside BAR0");
                    return;
                };
                // Release: descriptors are written before the tail that shows them to the device (82599 §7.1.9). On x86 stores to
                // write-back memory are not passed by a later store to uncached memory.
                fence(Release);
                // SAFETY: as in `read`.
                unsafe { at.write_volatile(value) };
            }
            Access::Called(registers) => {
                fence(Release);
                registers.write(offset, value);
            }
        }
    }

    /// Changes bits of a register that only one thread writes.
    pub fn modify(&self, offset: u32, clear: u32, set: u32) {
        self.write(offset, self.read(offset) & !clear | set);
    }
}

impl Mapping {
    #[inline]
    fn register(&self, offset: u32) -> Option<*mut u32> {
        let offset = offset as usize;
        // SAFETY: `offset + 4 <= len`, so the pointer stays inside the mapping.
        (offset.is_multiple_of(4) && offset + 4 <= self.len)
            .then(|| unsafe { self.start.as_ptr().add(offset).cast::<u32>() })
    }
}
