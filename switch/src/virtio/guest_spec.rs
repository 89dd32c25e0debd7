//! What a frontend announces as memory, what a port accepts, and every reason to refuse.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::guest_budget::FillBudget;

/// Page size of shmem, in bytes.
pub(super) const PAGE: u64 = 4096;

/// One region as the frontend announced it (vhost-user SET_MEM_TABLE, ADD_MEM_REG).
#[derive(Debug)]
pub struct RegionSpec {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// The region's first address in the frontend, which ring addresses refer to.
    pub uva: u64,
    /// The file it lies in.
    pub fd: OwnedFd,
    /// Where in the file it starts.
    pub offset: u64,
}

/// What a port accepts as memory.
#[derive(Clone, Debug)]
pub struct MapOptions {
    /// Refuse memory of 4 KiB pages, whose recovery after an attack takes up to 0.2 s instead of some ms.
    pub require_hugetlb: bool,
    /// Regions per attachment. More than the 64 we announce is a lie.
    pub max_regions: usize,
    /// Bytes per attachment: our address space (128 TiB) is shared by all guests.
    pub max_bytes: u64,
    /// How much of the guest's untouched memory may be filled on our account (`guest_budget.rs`). Clone the options,
    /// and all attachments of a port draw on one budget.
    ///
    /// Holes under receive buffers are normal for guests without hugepages: DPDK's `--no-huge` touches the head of
    /// each mbuf only, which leaves none for mbufs of 2 KiB but two pages of three for those of 10 KiB. The buffers of
    /// a pool rotate, so in time we meet all of it: the default of [`FILL_BYTES`] covers 8,192 such mbufs.
    pub fill_budget: Arc<FillBudget>,
    /// Arm memory against holes where the kernel can. Off only to test how it goes where it cannot.
    pub arm: bool,
    /// Map the pages that exist at once, rather than by faults of the workers.
    pub prefault: bool,
}

/// The default fill budget, in bytes: 8,192 mbufs of 10 KiB, of which two pages of three are holes.
pub const FILL_BYTES: u64 = 64 << 20;

impl Default for MapOptions {
    fn default() -> MapOptions {
        MapOptions {
            require_hugetlb: false,
            max_regions: 64,
            max_bytes: 256 << 30,
            fill_budget: FillBudget::new(FILL_BYTES),
            arm: true,
            prefault: true,
        }
    }
}

/// What kind of memory a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// memfd or tmpfs: pages of 4 KiB.
    Shmem,
    /// Hugepages, by memfd or hugetlbfs.
    Hugetlb,
}

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemError {
    /// The file is neither shmem nor hugetlbfs.
    #[error(
        "memory region {gpa:#x}: its file is no shared memory; let the container use a memfd, tmpfs or hugetlbfs"
    )]
    NotMemory {
        /// The region's guest address.
        gpa: u64,
    },
    /// The file was opened for reading only.
    #[error(
        "memory region {gpa:#x}: its file is not open for writing; let the container open it read-write"
    )]
    NotWritable {
        /// The region's guest address.
        gpa: u64,
    },
    /// 4 KiB pages on a port that demands hugepages.
    #[error(
        "memory region {gpa:#x}: the port demands hugepages; give the container hugepages (no --no-huge), \
         or drop the demand from the port"
    )]
    HugetlbRequired {
        /// The region's guest address.
        gpa: u64,
    },
    /// The file ends before the region does.
    #[error(
        "memory region {gpa:#x}: needs {announced} bytes of its file, which has {size}; \
         let the container size its memory before it attaches"
    )]
    FileTooShort {
        /// The region's guest address.
        gpa: u64,
        /// Where the region ends in the file.
        announced: u64,
        /// What the file has.
        size: u64,
    },
    /// An address, offset or length is no multiple of the page size.
    #[error(
        "memory region {gpa:#x}: address, offset or length is no multiple of the page size {page}; \
         let the container announce whole pages"
    )]
    Misaligned {
        /// The region's guest address.
        gpa: u64,
        /// The page size.
        page: u64,
    },
    /// A region without length.
    #[error(
        "memory region {gpa:#x}: has no length; let the container announce only memory that exists"
    )]
    Empty {
        /// The region's guest address.
        gpa: u64,
    },
    /// A region beyond the end of an address space.
    #[error(
        "memory region {gpa:#x}: {len} bytes reach beyond the last address; the frontend is at fault"
    )]
    Wraps {
        /// The region's guest address.
        gpa: u64,
        /// Its length.
        len: u64,
    },
    /// Two regions overlap.
    #[error(
        "memory regions {first:#x} and {second:#x} overlap in {space} addresses; the frontend is at fault"
    )]
    Overlap {
        /// The one's guest address.
        first: u64,
        /// The other's.
        second: u64,
        /// "guest" or "frontend".
        space: &'static str,
    },
    /// More regions than the port takes.
    #[error(
        "{count} memory regions, at most {max} are taken; start the container's DPDK with --single-file-segments"
    )]
    TooManyRegions {
        /// How many there were.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// More memory than the port takes.
    #[error(
        "memory of {bytes} bytes, at most {max} are taken; give the container less, or raise the port's limit"
    )]
    TooLarge {
        /// How much there was.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// REM_MEM_REG for a region that is not in the table.
    #[error("no memory region {gpa:#x} of {len} bytes to remove; the frontend is at fault")]
    NoSuchRegion {
        /// The guest address named.
        gpa: u64,
        /// The length named.
        len: u64,
    },
    /// The table of all mappings is full.
    #[error(
        "too many memory regions on all ports together; start containers with --single-file-segments"
    )]
    TooManyMappings,
    /// The kernel refused the mapping.
    #[error(
        "memory region {gpa:#x}: mapping {len} bytes: {source}; see `ringway doctor` for the limits of this host"
    )]
    MapFailed {
        /// The region's guest address.
        gpa: u64,
        /// Its length.
        len: u64,
        /// The kernel's word.
        source: io::Error,
    },
    /// The kernel refused a question about the file.
    #[error(
        "memory region {gpa:#x}: asking about its file: {source}; let the container pass an open file"
    )]
    Asking {
        /// The region's guest address.
        gpa: u64,
        /// The kernel's word.
        source: io::Error,
    },
}

impl MemError {
    pub(super) fn asking(gpa: u64, errno: rustix::io::Errno) -> MemError {
        MemError::Asking {
            gpa,
            source: errno.into(),
        }
    }
}

/// What can be said of a region without its file.
pub(super) fn check_shape(spec: &RegionSpec) -> Result<(), MemError> {
    let RegionSpec {
        gpa,
        len,
        uva,
        offset,
        ..
    } = *spec;
    if len == 0 {
        return Err(MemError::Empty { gpa });
    }
    // Ring code relies on it: an address the guest aligned is aligned in our address space too.
    if !(gpa | uva | offset).is_multiple_of(PAGE) {
        return Err(MemError::Misaligned { gpa, page: PAGE });
    }
    // File offsets are signed.
    let file_end = offset
        .checked_add(len)
        .filter(|end| i64::try_from(*end).is_ok());
    if [gpa.checked_add(len), uva.checked_add(len), file_end].contains(&None) {
        return Err(MemError::Wraps { gpa, len });
    }
    Ok(())
}

/// Refuses regions that overlap in guest or in frontend addresses. `all`: (gpa, uva, len), wraps excluded.
pub(super) fn check_overlaps(all: impl Iterator<Item = (u64, u64, u64)>) -> Result<(), MemError> {
    let mut all: Vec<_> = all.collect();
    all.sort_unstable_by_key(|r| r.0);
    if let Some(w) = all.windows(2).find(|w| w[1].0 - w[0].0 < w[0].2) {
        return Err(MemError::Overlap {
            first: w[0].0,
            second: w[1].0,
            space: "guest",
        });
    }
    all.sort_unstable_by_key(|r| r.1);
    if let Some(w) = all.windows(2).find(|w| w[1].1 - w[0].1 < w[0].2) {
        return Err(MemError::Overlap {
            first: w[0].0,
            second: w[1].0,
            space: "frontend",
        });
    }
    Ok(())
}
