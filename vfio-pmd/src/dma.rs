//! Memory that driver and device share: a memfd (of huge pages where there are some), mapped here and for the device.
//!
//! An island of `unsafe`: the device writes this memory at any time, so it is reached by raw pointers and single volatile
//! accesses, never by references.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::desc::DESC_LEN;
use crate::iova::{IovaSpace, PAGE};
use crate::transport::{DmaRange, Transport};

/// Bytes of a huge page.
const HUGE: u64 = 2 << 20;

/// Memory mapped here and for the device. Dropping it takes it from the device first, then from this process.
pub(crate) struct DmaMemory {
    owner: Arc<dyn Transport>,
    space: Arc<Mutex<IovaSpace>>,
    mapping: Mapping,
    iova: u64,
}

/// A memfd mapped into this process; unmapped on drop.
struct Mapping {
    fd: OwnedFd,
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: plain shared memory; who accesses which part is settled by the rings that own it.
unsafe impl Send for Mapping {}
// SAFETY: as above: all access goes through raw pointers that one ring holds.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this range; pointers into it are held only by owners of the `DmaMemory`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len as usize) };
    }
}

impl Mapping {
    /// Zeroed memory, from huge pages if enough are free.
    fn new(len: u64, name: &CStr) -> io::Result<Mapping> {
        Self::sized(len.next_multiple_of(HUGE), name, libc::MFD_HUGETLB)
            .or_else(|_| Self::sized(len.next_multiple_of(PAGE), name, 0))
    }

    fn sized(len: u64, name: &CStr, flags: libc::c_uint) -> io::Result<Mapping> {
        // SAFETY: `name` is a C string; the call has no other requirement.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain system calls on a descriptor we own; the result is checked.
        let start = unsafe {
            if libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) < 0 {
                return Err(io::Error::last_os_error());
            }
            // Populated now: a page that is missing later would be SIGBUS (huge pages) or a fault in the packet path.
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { fd, start, len })
    }
}

impl DmaMemory {
    /// At least `len` zeroed bytes that the device behind `owner` can access.
    pub(crate) fn new(
        owner: &Arc<dyn Transport>,
        space: &Arc<Mutex<IovaSpace>>,
        len: u64,
        name: &CStr,
    ) -> io::Result<DmaMemory> {
        let mapping = Mapping::new(len, name)?;
        let align = if mapping.len >= HUGE { HUGE } else { PAGE };
        let iova = lock(space).take(mapping.len, align).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                "no IOVA is left for this device",
            )
        })?;
        let mapped = owner.map_dma(&DmaRange {
            fd: mapping.fd.as_fd(),
            offset: 0,
            len: mapping.len,
            iova,
            address: mapping.start.as_ptr() as usize,
        });
        if let Err(error) = mapped {
            lock(space).give_back(iova, mapping.len);
            return Err(error);
        }
        Ok(DmaMemory {
            owner: owner.clone(),
            space: space.clone(),
            mapping,
            iova,
        })
    }

    /// Where `len` bytes from `offset` are: here, and for the device. Panics outside the memory: a mistake in set-up code.
    fn at(&self, offset: u64, len: u64) -> (NonNull<u8>, u64) {
        assert!(
            offset
                .checked_add(len)
                .is_some_and(|end| end <= self.mapping.len),
            "outside DMA memory"
        );
        // SAFETY: just checked to lie inside the mapping.
        let here = unsafe { self.mapping.start.add(offset as usize) };
        (here, self.iova + offset)
    }
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        if let Err(error) = self.owner.unmap_dma(self.iova, self.mapping.len) {
            // The device may still reach these IOVAs: never hand them out again. Our own mapping can go: the kernel holds the
            // pages as long as a device can write them.
            log::error!("{}: DMA unmap failed: {error}", self.owner.name());
            return;
        }
        lock(&self.space).give_back(self.iova, self.mapping.len);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A ring of descriptors and one buffer for each, in one piece of DMA memory.
///
/// Buffer `i` belongs to descriptor `i` for good: frames are lent and copied within a turn, so no pool is needed.
/// Positions run free; a slot is a position modulo the ring's size.
pub(crate) struct Ring {
    descs: NonNull<u64>,
    buffers: NonNull<u8>,
    buffers_iova: u64,
    descs_iova: u64,
    mask: u32,
    _memory: DmaMemory,
}

// SAFETY: the ring is the only holder of the pointers into its memory, and accesses are volatile; it may move between threads.
unsafe impl Send for Ring {}

impl Ring {
    /// From one buffer to the next: 33 cache lines, an odd number, so that the first lines of neighbouring frames fall into
    /// different sets of the first-level cache. At a distance of 2048 they would share two sets of 64.
    pub(crate) const STRIDE: u64 = 2112;
    /// Descriptors in a cache line.
    pub(crate) const PER_LINE: u32 = 4;
    /// Bytes that the device uses of a buffer.
    pub(crate) const BUFFER: u32 = 2048;

    /// `size` descriptors, a power of two.
    pub(crate) fn new(
        owner: &Arc<dyn Transport>,
        space: &Arc<Mutex<IovaSpace>>,
        size: u32,
        name: &CStr,
    ) -> io::Result<Ring> {
        assert!(size.is_power_of_two() && size >= 64, "ring size {size}");
        let table = u64::from(size) * DESC_LEN as u64;
        let buffers = u64::from(size) * Self::STRIDE;
        let memory = DmaMemory::new(owner, space, table + buffers, name)?;
        let (descs, descs_iova) = memory.at(0, table);
        let (buffers, buffers_iova) = memory.at(table, buffers);
        Ok(Ring {
            descs: descs.cast(),
            buffers,
            buffers_iova,
            descs_iova,
            mask: size - 1,
            _memory: memory,
        })
    }

    /// Descriptors.
    #[inline]
    pub(crate) fn size(&self) -> u32 {
        self.mask + 1
    }

    /// The slot of a free-running position.
    #[inline]
    pub(crate) fn slot(&self, position: u32) -> u32 {
        position & self.mask
    }

    /// Bytes of the descriptor table.
    pub(crate) fn table_len(&self) -> u32 {
        self.size() * DESC_LEN as u32
    }

    /// Where the device finds the table.
    pub(crate) fn table_iova(&self) -> u64 {
        self.descs_iova
    }

    /// Where the device finds the buffer of `position`.
    #[inline]
    pub(crate) fn buffer_iova(&self, position: u32) -> u64 {
        self.buffers_iova + u64::from(self.slot(position)) * Self::STRIDE
    }

    /// The first `len` bytes of the buffer of `position`, to read from.
    #[inline]
    pub(crate) fn piece(&self, position: u32, len: u32) -> Piece<'_> {
        Piece {
            at: self.buffer(position),
            len: len.min(Self::BUFFER),
            ring: PhantomData,
        }
    }

    /// The first `len` bytes of the buffer of `position`, to write to.
    #[inline]
    pub(crate) fn space(&self, position: u32, len: u32) -> Room<'_> {
        Room {
            at: self.buffer(position),
            len: len.min(Self::BUFFER),
            ring: PhantomData,
        }
    }

    /// The buffer of `position`: `STRIDE` bytes.
    #[inline]
    fn buffer(&self, position: u32) -> *mut u8 {
        let offset = self.slot(position) as usize * Self::STRIDE as usize;
        // SAFETY: `slot < size`, and `new` took `size * STRIDE` bytes from `buffers` on.
        unsafe { self.buffers.as_ptr().add(offset) }
    }

    /// Reads the second quadword of the descriptor at `position`, once.
    #[inline]
    pub(crate) fn high(&self, position: u32) -> u64 {
        let at = self.slot(position) as usize * 2 + 1;
        // SAFETY: `slot < size`, and `new` took `size` descriptors of two quadwords from `descs` on; aligned by the mapping.
        u64::from_le(unsafe { self.descs.as_ptr().add(at).read_volatile() })
    }

    /// Writes the descriptor at `position`. The device looks at it only once the tail register says so.
    #[inline]
    pub(crate) fn set(&self, position: u32, low: u64, high: u64) {
        let at = self.slot(position) as usize * 2;
        // SAFETY: as in `high`.
        unsafe {
            self.descs.as_ptr().add(at).write_volatile(low.to_le());
            self.descs.as_ptr().add(at + 1).write_volatile(high.to_le());
        }
    }

    /// Asks for the first line of the buffer at `position`, to read it.
    #[inline]
    pub(crate) fn prefetch(&self, position: u32) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch accesses nothing; the address is inside the ring's memory anyway.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.buffer(position).cast_const().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = position;
    }

    /// Asks for the line of the descriptor at `position`, to read and then to write it; once per line when called for one position
    /// after the other.
    #[inline]
    pub(crate) fn own(&self, position: u32) {
        if !position.is_multiple_of(Self::PER_LINE) {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `slot < size`, so the address lies in the table (`new`). PREFETCHW never faults; processors without it treat it as
        // a no-op.
        unsafe {
            let at = self.descs.as_ptr().add(self.slot(position) as usize * 2);
            core::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
        }
    }
}

/// A piece of a frame, in memory that the device writes: nothing but copying from it makes sense.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    at: *const u8,
    len: u32,
    ring: PhantomData<&'a Ring>,
}

impl Piece<'_> {
    /// Its first byte. [`Piece::readable`] bytes can be read there while the burst is lent.
    #[inline]
    pub fn as_ptr(&self) -> *const u8 {
        self.at
    }

    /// Bytes of the frame in this piece.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// True if the device put nothing here.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that can be read from its start on: the whole buffer.
    #[inline]
    pub fn readable(&self) -> u32 {
        Ring::BUFFER
    }

    /// Copies as much of the piece as `to` takes; says how much.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let len = to.len().min(self.len as usize);
        // SAFETY: `len <= self.len <= BUFFER`, the buffer's bytes, which the ring keeps while it is borrowed; `to` is ours.
        unsafe { std::ptr::copy_nonoverlapping(self.at, to.as_mut_ptr(), len) };
        len
    }
}

/// Where (a piece of) a frame goes: memory that the device will read.
pub struct Room<'a> {
    at: *mut u8,
    len: u32,
    ring: PhantomData<&'a Ring>,
}

impl Room<'_> {
    /// Its first byte; [`Room::len`] bytes can be written there.
    #[inline]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.at
    }

    /// Bytes wanted here.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// True if nothing is wanted.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes `bytes` from `at` on, as far as they fit.
    #[inline]
    pub fn write(&mut self, at: u32, bytes: &[u8]) {
        let len = bytes.len().min(self.len.saturating_sub(at) as usize);
        // SAFETY: `at + len <= self.len <= BUFFER` unless `len` is 0, the bytes of the buffer, which the ring keeps while it is
        // borrowed; a slice never lies in DMA memory.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.at.add(at.min(self.len) as usize),
                len,
            );
        }
    }

    /// Writes up to `len` bytes of `piece`, from its byte `skip` on, to byte `at`; says how many there were.
    #[inline]
    pub(crate) fn copy(&mut self, at: u32, piece: &Piece<'_>, skip: u32, len: u32) -> u32 {
        let len = len
            .min(self.len.saturating_sub(at))
            .min(piece.len.saturating_sub(skip));
        if len > 0 {
            // SAFETY: both ranges were just cut to their buffers, which belong to different descriptors or rings; should they be
            // the same, `copy` allows it.
            unsafe {
                std::ptr::copy(
                    piece.at.add(skip as usize),
                    self.at.add(at as usize),
                    len as usize,
                );
            }
        }
        len
    }

    /// Zeros from byte `from` to the end.
    pub(crate) fn clear_from(&mut self, from: u32) {
        let from = from.min(self.len);
        // SAFETY: `from <= self.len <= BUFFER`.
        unsafe { std::ptr::write_bytes(self.at.add(from as usize), 0, (self.len - from) as usize) };
    }
}
