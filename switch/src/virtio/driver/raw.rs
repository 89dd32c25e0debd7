//! A ring's memory without rules: for guests that lie, and for tests that look.
#![allow(unsafe_code)] // raw pointers into memory that a device writes

use std::marker::PhantomData;
use std::ptr;

use super::super::ring::Table;
use super::OwnMem;

/// A part of a ring: its first byte and its length.
type Part = (*mut u8, usize);

/// Direct access to a ring. What is written here is neither checked nor remembered by the ring. Numbers beyond the ring
/// are taken modulo its size; asking a ring for what its layout does not have is a panic.
pub struct Raw<'a> {
    table: Table,
    avail: Part,
    used: Part,
    mem: PhantomData<&'a OwnMem>,
}

impl<'a> Raw<'a> {
    /// `avail` and `used` are mapped as long as the memory lives.
    pub(super) fn new(_: &'a OwnMem, table: Table, avail: Part, used: Part) -> Raw<'a> {
        Raw {
            table,
            avail,
            used,
            mem: PhantomData,
        }
    }

    fn read<T: Copy>(&self, part: Part, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= part.1, "not in this layout");
        // SAFETY: inside the part, just checked; at a multiple of T's size, as all callers' offsets are.
        unsafe { ptr::read_volatile(part.0.add(offset).cast()) }
    }

    fn write<T: Copy>(&self, part: Part, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= part.1, "not in this layout");
        // SAFETY: as in `read`.
        unsafe { ptr::write_volatile(part.0.add(offset).cast(), value) }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index % self.table.size)
    }

    fn desc_at(&self, index: u16) -> Part {
        // SAFETY: the remainder is below size.
        (unsafe { self.table.at(index % self.table.size) }, 16)
    }

    /// Descriptor `index`: address, length, and the two u16 behind (split: flags, next; packed: id, flags).
    pub fn desc(&self, index: u16) -> (u64, u32, u16, u16) {
        let at = self.desc_at(index);
        (
            self.read(at, 0),
            self.read(at, 8),
            self.read(at, 12),
            self.read(at, 14),
        )
    }

    /// Writes descriptor `index`, the last field last.
    pub fn set_desc(&self, index: u16, (addr, len, third, fourth): (u64, u32, u16, u16)) {
        let at = self.desc_at(index);
        self.write(at, 0, addr);
        self.write(at, 8, len);
        self.write(at, 12, third);
        self.write(at, 14, fourth);
    }

    /// Split: `avail.flags`.
    pub fn set_avail_flags(&self, flags: u16) {
        self.write(self.avail, 0, flags);
    }

    /// Split: `avail.idx`.
    pub fn avail_idx(&self) -> u16 {
        self.read(self.avail, 2)
    }

    /// Split: writes `avail.idx`.
    pub fn set_avail_idx(&self, index: u16) {
        self.write(self.avail, 2, index);
    }

    /// Split: writes entry `slot` of the available ring.
    pub fn set_avail(&self, slot: u16, head: u16) {
        self.write(self.avail, 4 + 2 * self.slot(slot), head);
    }

    /// Split: `used_event`.
    pub fn set_used_event(&self, index: u16) {
        self.write(self.avail, 4 + 2 * usize::from(self.table.size), index);
    }

    /// Split: `used.flags`.
    pub fn used_flags(&self) -> u16 {
        self.read(self.used, 0)
    }

    /// Split: `used.idx`.
    pub fn used_idx(&self) -> u16 {
        self.read(self.used, 2)
    }

    /// Split: writes `used.idx`, which is the device's.
    pub fn set_used_idx(&self, index: u16) {
        self.write(self.used, 2, index);
    }

    /// Split: element `slot` of the used ring: id and length.
    pub fn used(&self, slot: u16) -> (u32, u32) {
        let at = 4 + 8 * self.slot(slot);
        (self.read(self.used, at), self.read(self.used, at + 4))
    }

    /// Split: writes element `slot` of the used ring, which is the device's.
    pub fn set_used(&self, slot: u16, (id, len): (u32, u32)) {
        let at = 4 + 8 * self.slot(slot);
        self.write(self.used, at, id);
        self.write(self.used, at + 4, len);
    }

    /// Split: `avail_event`.
    pub fn avail_event(&self) -> u16 {
        self.read(self.used, 4 + 8 * usize::from(self.table.size))
    }

    /// Packed: the driver's event area, offset and wrap counter in the lower half, flags in the upper.
    pub fn set_driver_event(&self, area: u32) {
        self.write(self.avail, 0, area);
    }

    /// Packed: the device's event area.
    pub fn device_event(&self) -> u32 {
        self.read(self.used, 0)
    }
}
