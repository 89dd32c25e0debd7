//! One region of a guest's memory: the gate its file must pass, and its mapping.
//!
//! The file comes from the guest. A file on FUSE can hang whoever asks it anything, even its size, so the first
//! question is one the kernel answers without the file system: only shmem and hugetlbfs know seals.
#![allow(unsafe_code)] // mmap, madvise, munmap

use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SeekFrom, fcntl_get_seals, fcntl_getfl, fstat, fstatfs, seek};

use super::guest_fault::{Watch, Watched};
use super::guest_poison::Poison;
use super::guest_spec::{MapOptions, MemError, MemoryKind, PAGE, RegionSpec};
use super::guest_uffd::Uffd;

/// Bytes of no man's land on both sides of a mapping: an access of ours that strays by a frame meets SIGSEGV, not
/// another guest.
const GUARD: usize = 64 << 10;
/// Mappings are congruent to their file offset modulo this, so that the kernel can use large pages for shmem too.
const CONGRUENCE: usize = 2 << 20;
/// Bytes per `munmap`. It holds a lock that the repair of another port's memory waits for: 0.3 ms if every 4 KiB page is
/// there. Less would make large sparse mappings slow to leave (64 GiB: 35 ms).
const UNMAP_PIECE: usize = 4 << 20;
/// Bytes per prefault call, which holds the same lock: 0.3 ms if every page must be zeroed first.
const PREFAULT_PIECE: u64 = 1 << 20;
/// Runs of pages prefaulted at most, 2 us each. Beyond, the file is in shreds, and its workers take the faults.
const RUNS_MAX: usize = 1 << 17;

/// What the gate learned about a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gate {
    pub(super) kind: MemoryKind,
    pub(super) page: u64,
    pub(super) inode: (u64, u64),
    /// Bytes of the file, with and without its holes.
    size: u64,
    allocated: u64,
    /// Length of the mapping: the region in whole pages. It starts at the region's offset.
    map_len: u64,
}

/// Refuses everything but a regular, writable, large enough file of memory.
pub(super) fn gate(spec: &RegionSpec, options: &MapOptions) -> Result<Gate, MemError> {
    let gpa = spec.gpa;
    let fd = spec.fd.as_fd();
    // 1. No file system is asked: FUSE, ext4, devices, eventfds, sockets have no seals.
    fcntl_get_seals(fd).map_err(|_| MemError::NotMemory { gpa })?;
    let mode = fcntl_getfl(fd).map_err(|e| MemError::asking(gpa, e))? & OFlags::RWMODE;
    if mode != OFlags::RDWR {
        return Err(MemError::NotWritable { gpa });
    }
    // 2. Shmem or hugetlbfs: answers at once.
    let file_system = fstatfs(fd).map_err(|e| MemError::asking(gpa, e))?;
    let (kind, page) = match file_system.f_type as u64 & 0xffff_ffff {
        0x0102_1994 => (MemoryKind::Shmem, PAGE), // TMPFS_MAGIC; huge pages of tmpfs are the kernel's affair
        0x9584_58f6 => (MemoryKind::Hugetlb, file_system.f_bsize as u64), // HUGETLBFS_MAGIC
        _ => return Err(MemError::NotMemory { gpa }),
    };
    let stat = fstat(fd).map_err(|e| MemError::asking(gpa, e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || !page.is_power_of_two() {
        return Err(MemError::NotMemory { gpa });
    }
    if options.require_hugetlb && kind != MemoryKind::Hugetlb {
        return Err(MemError::HugetlbRequired { gpa });
    }
    // 3. The region within the file, in whole pages.
    let announced = spec
        .offset
        .checked_add(spec.len)
        .ok_or(MemError::Wraps { gpa, len: spec.len })?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if size < announced {
        return Err(MemError::FileTooShort {
            gpa,
            announced,
            size,
        });
    }
    if kind == MemoryKind::Hugetlb && !(spec.offset | spec.len).is_multiple_of(page) {
        return Err(MemError::Misaligned { gpa, page });
    }
    let map_len = spec.len.next_multiple_of(page); // no overflow: `announced` is no more than an i64
    let allocated = u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512);
    Ok(Gate {
        kind,
        page,
        inode: (stat.st_dev, stat.st_ino),
        size,
        allocated,
        map_len,
    })
}

/// One mapping. Its addresses are valid for reads and writes from `new` to `drop`; what they hold, and whether the
/// pages are there, is up to the guest at any time.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Host address of the region's first byte.
    pub(super) host: NonNull<u8>,
    pub(super) armed: bool,
    pub(super) inode: (u64, u64),
    // Dropped in this order: the handler forgets the mapping (its range may belong to somebody else a moment after it is
    // unmapped), it is unmapped, its file is closed. The userfaultfd goes last, with the table: no page is ever
    // unarmed while it is mapped.
    _watch: Watch,
    _reserved: Reservation,
    fd: OwnedFd,
}

// SAFETY: the addresses are plain numbers to everybody but those who dereference them, under the rules of foreign
// memory; mapping and unmapping are not bound to a thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method changes anything through `&self`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps, arms, watches and prefaults what passed the gate.
    pub(super) fn new(
        spec: RegionSpec,
        gate: &Gate,
        poison: &Arc<Poison>,
        uffd: Option<&Arc<Uffd>>,
        options: &MapOptions,
    ) -> Result<Mapping, MemError> {
        let failed = |source: io::Error| MemError::MapFailed {
            gpa: spec.gpa,
            len: spec.len,
            source,
        };
        let (len, page) = (gate.map_len as usize, gate.page as usize);
        let reserved = Reservation::new(len, spec.offset as usize, page).map_err(failed)?;
        reserved.map_file(&spec.fd, spec.offset).map_err(failed)?;
        let start = reserved.start();
        let uffd = uffd.filter(|uffd| uffd.arm(start, len)).cloned();
        let armed = uffd.is_some();
        let watched = Watched {
            start,
            len,
            granule: page,
            file: (spec.fd.as_raw_fd(), spec.offset),
            poison: Arc::clone(poison),
            budget: Arc::clone(&options.fill_budget),
            uffd,
        };
        let watch = Watch::new(watched).ok_or(MemError::TooManyMappings)?;
        if options.prefault {
            prefault(start, &spec.fd, spec.offset, gate, armed);
        }
        let host = NonNull::new(start as *mut u8)
            .ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        let fd = spec.fd;
        Ok(Mapping {
            host,
            armed,
            inode: gate.inode,
            _watch: watch,
            _reserved: reserved,
            fd,
        })
    }

    /// The file behind it.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

/// A range of our address space with guards on both sides.
#[derive(Debug)]
struct Reservation {
    /// First byte behind the lower guard.
    body: usize,
    body_len: usize,
    piece: usize,
}

impl Reservation {
    fn new(len: usize, offset: usize, page: usize) -> io::Result<Reservation> {
        let align = page.max(CONGRUENCE);
        let slack = 2 * align + 2 * GUARD;
        let total = len.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(ptr::null_mut(), total, libc::PROT_NONE, none, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = at as usize;
        let body = (at + GUARD).next_multiple_of(align) + offset % align;
        let end = body + len + GUARD;
        // Give back what alignment did not need. At most two `align` minus one: within `slack`.
        unmap(at, body - GUARD - at);
        unmap(end, at + total - end);
        Ok(Reservation {
            body,
            body_len: len,
            piece: UNMAP_PIECE.next_multiple_of(page),
        })
    }

    fn start(&self) -> usize {
        self.body
    }

    fn map_file(&self, fd: &OwnedFd, offset: u64) -> io::Result<()> {
        // NORESERVE: for hugetlb, else holes of the file would be reserved on our account.
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: replaces exactly the body of this reservation, which nobody uses yet.
        let at = unsafe {
            let body = self.body as *mut libc::c_void;
            libc::mmap(body, self.body_len, prot, flags, fd.as_raw_fd(), offset)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Guests' memory has no place in our cores. Best effort: nothing depends on it.
        // SAFETY: the body just mapped.
        unsafe { libc::madvise(at, self.body_len, libc::MADV_DONTDUMP) };
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        unmap(self.body - GUARD, GUARD);
        let mut at = 0;
        while at < self.body_len {
            let len = self.piece.min(self.body_len - at);
            unmap(self.body + at, len);
            at += len;
        }
        unmap(self.body + self.body_len, GUARD);
    }
}

/// Unmaps a range of a reservation.
fn unmap(start: usize, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: only called by `Reservation` for its own range, when nobody uses it: before it is handed out, or in drop.
    let done = unsafe { libc::munmap(start as *mut libc::c_void, len) };
    debug_assert_eq!(done, 0, "munmap: {}", io::Error::last_os_error());
}

/// Maps the pages that exist, so that no worker takes the first fault. Allocates nothing: a file may be one large hole.
/// Failures cost a fault later and are no reason to refuse.
fn prefault(start: usize, fd: &OwnedFd, offset: u64, gate: &Gate, armed: bool) {
    if gate.allocated == 0 {
        return;
    }
    let all = 0..gate.map_len;
    let whole = gate.allocated >= gate.size;
    match gate.kind {
        // POPULATE_READ maps shmem writable too: the kernel tracks no first write there.
        MemoryKind::Shmem if whole => {
            populate(start, all, PREFAULT_PIECE, libc::MADV_POPULATE_READ)
        }
        MemoryKind::Shmem => {
            for run in data_runs(fd, offset..offset + gate.map_len).take(RUNS_MAX) {
                let run = run.start - offset..run.end - offset;
                populate(start, run, PREFAULT_PIECE, libc::MADV_POPULATE_READ);
            }
        }
        // Armed, a hole (all of a hugepage) is refused with EFAULT. Unarmed, it would be allocated.
        MemoryKind::Hugetlb if whole || armed => {
            populate(start, all, gate.page, libc::MADV_POPULATE_WRITE);
        }
        MemoryKind::Hugetlb => {}
    }
}

/// The parts of `range` of a file of shmem that are there. This moves the position of the file, which is shared with
/// the guest and means nothing to memory; `mincore` takes 35 ns for each page that is not there, and tells the truth
/// only to those who may open the file.
fn data_runs(fd: &OwnedFd, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    iter::from_fn(move || {
        let start = seek(fd, SeekFrom::Data(at))
            .ok()
            .filter(|at| *at < range.end)?;
        at = seek(fd, SeekFrom::Hole(start)).ok()?.min(range.end);
        (at > start).then(|| start / PAGE * PAGE..at.next_multiple_of(PAGE))
    })
}

/// Populates a range of the mapping at `start`, in pieces. Best effort.
fn populate(start: usize, range: Range<u64>, piece: u64, advice: libc::c_int) {
    for at in range.clone().step_by(piece as usize) {
        let len = piece.min(range.end - at) as usize;
        // SAFETY: a range of our mapping; populating changes no byte of it.
        unsafe { libc::madvise((start + at as usize) as *mut libc::c_void, len, advice) };
    }
}
