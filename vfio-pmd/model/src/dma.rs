//! The memory that a VF may reach: what its owner mapped, and nothing else.
//!
//! An island of `unsafe`: mapped memory belongs to another process, which writes it at any time.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// An access outside what is mapped: an IOMMU would have refused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaFault {
    /// The address the device was given.
    pub iova: u64,
    /// Bytes it was about to touch from there.
    pub len: u64,
    /// The device wanted to write.
    pub write: bool,
}

/// The DMA mappings of one VF.
#[derive(Default)]
pub struct Dma {
    maps: BTreeMap<u64, Map>,
}

struct Map {
    len: u64,
    offset: u64,
    writable: bool,
    /// None: memory that cannot be reached through a file.
    file: Option<Arc<Backing>>,
}

/// A whole file, mapped once however many pieces of it are shown to the device: a guest behind a page-granular IOMMU maps some
/// ten thousand pieces, and a process may have 65530 mappings.
struct Backing {
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: the memory is shared with other processes anyway; it is only touched through raw copies and atomics.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: `open` mapped exactly this, and no `Map` that could lead here is left.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len as usize) };
    }
}

impl Backing {
    /// The mapping of `fd`'s file that some VF has already, or a new one.
    fn open(fd: BorrowedFd<'_>, need: u64) -> io::Result<Arc<Backing>> {
        type Known = BTreeMap<(u64, u64, u64), Weak<Backing>>;
        static KNOWN: Mutex<Known> = Mutex::new(BTreeMap::new());
        let stat = rustix::fs::fstat(fd)?;
        let size = stat.st_size as u64;
        if size < need {
            return Err(io::Error::other(format!(
                "the file has {size} bytes, the mapping ends at {need}"
            )));
        }
        let mut known = KNOWN.lock().unwrap_or_else(|e| e.into_inner());
        known.retain(|_, backing| backing.strong_count() > 0);
        let key = (stat.st_dev, stat.st_ino, size);
        if let Some(backing) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(backing);
        }
        let len = NonZeroUsize::new(size as usize).ok_or(io::ErrorKind::InvalidInput)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new shared mapping at an address of the kernel's choice; nothing of ours lies there.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                len.get(),
                prot,
                MapFlags::SHARED,
                fd,
                0,
            )
        };
        // A file that is only readable can still be read by the device.
        let start = start.or_else(|_| {
            // SAFETY: as above.
            unsafe {
                mmap(
                    std::ptr::null_mut(),
                    len.get(),
                    ProtFlags::READ,
                    MapFlags::SHARED,
                    fd,
                    0,
                )
            }
        })?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let backing = Arc::new(Backing { start, len: size });
        known.insert(key, Arc::downgrade(&backing));
        Ok(backing)
    }
}

impl Dma {
    /// Shows `len` bytes of `fd` from `offset` to the device at `iova`.
    pub fn map(
        &mut self,
        fd: impl AsFd,
        offset: u64,
        len: u64,
        iova: u64,
        writable: bool,
    ) -> io::Result<()> {
        let bad = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what.to_owned()));
        if len == 0 || !(offset | len | iova).is_multiple_of(4096) {
            return bad("offset, length and IOVA must be multiples of 4096");
        }
        let (Some(end), Some(need)) = (iova.checked_add(len), offset.checked_add(len)) else {
            return bad("the range wraps");
        };
        let below = self.maps.range(..end).next_back();
        if below.is_some_and(|(at, map)| at + map.len > iova) {
            return bad("overlaps an existing mapping");
        }
        let file = Some(Backing::open(fd.as_fd(), need)?);
        self.maps.insert(
            iova,
            Map {
                len,
                offset,
                writable,
                file,
            },
        );
        Ok(())
    }

    /// Notes a mapping of memory that has no file, like a ROM: an access to it is a fault.
    pub(crate) fn map_out_of_reach(&mut self, iova: u64, len: u64) {
        let end = iova.saturating_add(len);
        let below = self.maps.range(..end).next_back();
        if below.is_none_or(|(at, map)| at + map.len <= iova) {
            let map = Map {
                len,
                offset: 0,
                writable: false,
                file: None,
            };
            self.maps.insert(iova, map);
        }
    }

    /// Takes back every mapping inside the range; false if there was none or one reaches out of it.
    pub fn unmap(&mut self, iova: u64, len: u64) -> bool {
        let Some(end) = iova.checked_add(len) else {
            return false;
        };
        let inside: Vec<u64> = self.maps.range(iova..end).map(|(at, _)| *at).collect();
        let whole = inside
            .last()
            .is_some_and(|at| self.maps.get(at).is_some_and(|map| at + map.len <= end));
        if whole {
            inside.iter().for_each(|at| {
                self.maps.remove(at);
            });
        }
        whole
    }

    /// A mapping reaches into the range without lying in it: only a part of it would go.
    pub(crate) fn cuts(&self, iova: u64, len: u64) -> bool {
        let end = iova.saturating_add(len);
        let reaches = |at: u64| {
            let map = self.maps.range(..at).next_back();
            map.is_some_and(|(start, map)| start + map.len > at)
        };
        reaches(iova) || reaches(end)
    }

    /// Takes everything back.
    pub fn clear(&mut self) {
        self.maps.clear();
    }

    /// Mappings there are.
    pub fn len(&self) -> usize {
        self.maps.len()
    }

    /// Nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.maps.is_empty()
    }

    /// The piece of memory from `iova` to the end of its mapping, at most `len` bytes.
    fn piece(&self, iova: u64, len: u64, write: bool) -> Option<(*mut u8, u64)> {
        let (at, map) = self.maps.range(..=iova).next_back()?;
        let into = iova - at;
        if into >= map.len || (write && !map.writable) {
            return None;
        }
        let file = map.file.as_ref()?;
        let from = map.offset + into;
        debug_assert!(from < file.len);
        // SAFETY: `map` checked that `offset + map.len` lies inside the file's mapping, and `into < map.len`.
        let start = unsafe { file.start.as_ptr().add(from as usize) };
        Some((start, (map.len - into).min(len)))
    }

    /// Calls `each` with every piece of the range. A range may cross adjacent mappings; a hole in it is a fault before anything is touched.
    fn pieces(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        mut each: impl FnMut(*mut u8, usize),
    ) -> Result<(), DmaFault> {
        let fault = DmaFault {
            iova,
            len: len as u64,
            write,
        };
        if let Some((start, whole)) = self.piece(iova, len as u64, write)
            && whole == len as u64
        {
            each(start, len);
            return Ok(());
        }
        for touch in [false, true] {
            let mut done = 0;
            while done < len as u64 {
                let at = iova.checked_add(done).ok_or(fault)?;
                let (start, part) = self.piece(at, len as u64 - done, write).ok_or(fault)?;
                if touch {
                    each(start, part as usize);
                }
                done += part;
            }
        }
        Ok(())
    }

    /// Reads.
    pub fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        let mut done = 0;
        self.pieces(iova, into.len(), false, |start, part| {
            // SAFETY: `piece` found `part` mapped bytes at `start`; `done + part <= into.len()` as the parts add up to it. Whoever
            // writes them meanwhile makes the copy stale, no more.
            unsafe { std::ptr::copy_nonoverlapping(start, into.as_mut_ptr().add(done), part) };
            done += part;
        })
    }

    /// Writes.
    pub fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault> {
        let mut done = 0;
        self.pieces(iova, from.len(), true, |start, part| {
            // SAFETY: as in `read`.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(done), start, part) };
            done += part;
        })
    }

    /// The 8-byte words of the descriptor at `iova`, which is a multiple of 16 and so lies in one mapping.
    pub(crate) fn descriptor(&self, iova: u64) -> Result<[u64; 2], DmaFault> {
        let mut words = [0; 2];
        self.pieces(iova, 16, false, |start, _| {
            let at = start.cast::<u64>();
            debug_assert!(at.is_aligned());
            // SAFETY: 16 mapped bytes at a multiple of 16: mappings start at pages (`map`) and `iova` is a multiple of 16. The driver
            // writes them with stores of its own, hence atomics.
            words = unsafe {
                [at, at.add(1)].map(|word| AtomicU64::from_ptr(word).load(Ordering::Acquire))
            };
        })?;
        Ok(words)
    }

    /// Writes a descriptor back; the second word, which says that it is done, last.
    pub(crate) fn write_back(&self, iova: u64, words: [u64; 2]) -> Result<(), DmaFault> {
        self.pieces(iova, 16, true, |start, _| {
            let at = start.cast::<u64>();
            // SAFETY: as in `descriptor`. Release: whoever sees the second word sees the frame and the first.
            unsafe {
                AtomicU64::from_ptr(at).store(words[0], Ordering::Relaxed);
                AtomicU64::from_ptr(at.add(1)).store(words[1], Ordering::Release);
            }
        })
    }

    /// Stores a 32-bit word at a multiple of 4.
    pub(crate) fn store_word(&self, iova: u64, word: u32) -> Result<(), DmaFault> {
        self.pieces(iova, 4, true, |start, _| {
            // SAFETY: four mapped bytes at a multiple of 4 (callers mask the address). Release: as in `write_back`.
            unsafe { AtomicU32::from_ptr(start.cast()).store(word, Ordering::Release) };
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memory(pages: u64) -> std::os::fd::OwnedFd {
        let fd = memfd_create("dma", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, pages * 4096).unwrap();
        fd
    }

    #[test]
    fn an_access_crosses_adjacent_mappings_and_stops_at_a_hole() {
        let fd = memory(4);
        let mut dma = Dma::default();
        dma.map(&fd, 4096, 4096, 0x10000, true).unwrap();
        dma.map(&fd, 0, 4096, 0x11000, true).unwrap();
        dma.write(0x10ffe, &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        dma.read(0x10ffe, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
        // The second page of the file comes first at the device.
        dma.map(&fd, 0, 4096, 0x20000, true).unwrap();
        dma.read(0x20000, &mut back[..2]).unwrap();
        assert_eq!(back[..2], [3, 4]);
        let fault = dma.write(0x11ffe, &[9; 4]).unwrap_err();
        assert_eq!((fault.iova, fault.len, fault.write), (0x11ffe, 4, true));
        dma.read(0x11ffe, &mut back[..2]).unwrap();
        assert_eq!(back[..2], [0, 0], "half of a refused write arrived");
    }

    #[test]
    fn what_was_unmapped_or_never_writable_is_out_of_reach() {
        let fd = memory(2);
        let mut dma = Dma::default();
        dma.map(&fd, 0, 8192, 0, false).unwrap();
        assert!(dma.read(0, &mut [0; 8]).is_ok());
        assert!(dma.write(0, &[0; 8]).is_err());
        assert!(!dma.unmap(0, 4096), "half of a mapping cannot go");
        assert!(dma.cuts(0, 4096) && dma.cuts(4096, 1 << 40));
        assert!(!dma.cuts(0, 8192) && !dma.cuts(8192, 1 << 40) && !dma.cuts(0, 1 << 40));
        assert!(dma.unmap(0, 8192) && dma.is_empty());
        assert!(dma.read(0, &mut [0; 1]).is_err());
        assert!(dma.read(u64::MAX - 2, &mut [0; 8]).is_err());
    }

    #[test]
    fn overlaps_and_ranges_beyond_the_file_are_refused() {
        let fd = memory(2);
        let mut dma = Dma::default();
        dma.map(&fd, 0, 8192, 0x4000, true).unwrap();
        for iova in [0x3000, 0x4000, 0x5000] {
            assert!(dma.map(&fd, 0, 8192, iova, true).is_err(), "{iova:#x}");
        }
        assert!(dma.map(&fd, 4096, 8192, 0x8000, true).is_err());
        assert!(dma.map(&fd, 0, 100, 0x8000, true).is_err());
        assert!(dma.map(&fd, 0, 4096, u64::MAX - 4095, true).is_err());
    }
}
