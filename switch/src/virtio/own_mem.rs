//! Memory of our own that a device maps too: the whole memory of a guest that lives in this process.
#![allow(unsafe_code)] // maps a file, and copies in and out of memory a device writes

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use super::guest_mem::RegionSpec;

/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;
/// Bytes of a page.
const PAGE: u64 = 4096;

/// A memfd, mapped, with a guest address.
///
/// Any thread may use it; it is raw memory that a device may write at any time, so it hands out pointers and copies,
/// never references.
#[derive(Debug)]
pub struct OwnMem {
    file: OwnedFd,
    at: NonNull<u8>,
    len: u64,
    gpa: u64,
}

// SAFETY: the mapping is plain memory without an owner thread; it goes when the last user drops it.
unsafe impl Send for OwnMem {}
// SAFETY: as above; all access is through raw pointers.
unsafe impl Sync for OwnMem {}

impl OwnMem {
    /// `len` zero bytes (rounded up to pages), present from the start, that the guest calls `gpa` and following.
    pub fn new(len: u64, gpa: u64, hugepages: bool) -> io::Result<Arc<OwnMem>> {
        let (page, flags) = if hugepages {
            (HUGE_PAGE, MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)
        } else {
            (PAGE, MemfdFlags::CLOEXEC)
        };
        let len = len.max(1).next_multiple_of(page);
        let file = rustix::fs::memfd_create("ringway-guest", flags)?;
        rustix::fs::ftruncate(&file, len)?;
        // SAFETY: a new mapping at an address the kernel chooses replaces nothing.
        let at = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                &file,
                0,
            )?
        };
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(OwnMem { file, at, len, gpa }))
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Its first guest address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Its first address in this process, which is what a vhost-user frontend names its ring addresses by.
    pub fn uva(&self) -> u64 {
        self.at.as_ptr().addr() as u64
    }

    /// The whole of it as a region, as a frontend announces it.
    pub fn region(&self) -> io::Result<RegionSpec> {
        Ok(RegionSpec {
            gpa: self.gpa,
            len: self.len,
            uva: self.uva(),
            fd: self.file.try_clone()?,
            offset: 0,
        })
    }

    /// The address here of `len` bytes at guest address `gpa`, if they are all inside.
    #[inline]
    pub fn ptr(&self, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        let offset = gpa.wrapping_sub(self.gpa);
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // SAFETY: `offset <= len`, the bytes mapped at `at`.
        Some(unsafe { self.at.add(offset as usize) })
    }

    /// Copies `bytes` to guest address `gpa`; false (and nothing is written) if they do not fit there.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        let Some(to) = self.ptr(gpa, bytes.len() as u64) else {
            return false;
        };
        // SAFETY: `ptr` found room for them; a private slice does not overlap the mapping.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        true
    }

    /// Copies from guest address `gpa` to `bytes`; false (and nothing is read) if that is not all inside.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        let Some(from) = self.ptr(gpa, bytes.len() as u64) else {
            return false;
        };
        // SAFETY: `ptr` found them inside; a private slice does not overlap the mapping.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
        true
    }
}

impl Drop for OwnMem {
    fn drop(&mut self) {
        // SAFETY: `new` mapped it, and nobody can have a pointer into it any more without an `Arc` of this.
        // An error could only mean that it is not mapped.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len as usize) };
    }
}
