//! A guest's memory: the table of its regions, and the only way from a guest address to a pointer.
//!
//! The frontend announces regions, each a piece of a file with its guest address (GPA: what descriptors hold) and its
//! address in the frontend (UVA: what ring addresses hold). Nothing of it is believed: `guest_spec.rs` checks the
//! shape of a table, `guest_map.rs` has the gate a file must pass, [`GuestMem::translate`] checks every range on every access, and `guest_fault.rs` deals with memory
//! that vanishes later.
//!
//! A table never changes. A changed table is a new `GuestMem`; mappings that stay are shared, so host addresses stay.
#![allow(unsafe_code)] // pointer arithmetic inside a checked region

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use super::guest_budget::FillBudget;
use super::guest_map::{Mapping, gate};
pub use super::guest_poison::{Poison, PoisonCause};
pub use super::guest_spec::{FILL_BYTES, MapOptions, MemError, MemoryKind, RegionSpec};
use super::guest_spec::{check_overlaps, check_shape};
use super::guest_uffd::Uffd;
pub use super::guest_uffd::can_arm;

const _: () = assert!(
    size_of::<usize>() == 8,
    "guest memory is mapped whole: 64-bit hosts only"
);

/// One region of a table, for people and for checks across ports.
#[derive(Clone, Debug)]
pub struct Region {
    gpa: u64,
    len: u64,
    uva: u64,
    page: u64,
    kind: MemoryKind,
    mapping: Arc<Mapping>,
}

impl Region {
    /// First guest physical address.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes; never 0.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// First address in the frontend.
    #[must_use]
    pub fn uva(&self) -> u64 {
        self.uva
    }

    /// Page size in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page
    }

    /// Shmem or hugetlb.
    #[must_use]
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// Whether a hole raises a signal instead of being allocated on our account.
    #[must_use]
    pub fn armed(&self) -> bool {
        self.mapping.armed
    }

    /// Device and inode of its file.
    #[must_use]
    pub fn inode(&self) -> (u64, u64) {
        self.mapping.inode
    }

    /// Its file.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.mapping.fd().as_fd()
    }

    fn last(&self) -> u64 {
        self.gpa + (self.len - 1) // no wrap: checked in `check_shape`
    }
}

/// What `translate` needs of a region, packed: a search touches few lines.
#[derive(Clone, Copy, Debug)]
struct Span {
    first: u64,
    len: u64,
    host: NonNull<u8>,
}

/// The region a queue used last, private to that queue. Starts empty; belongs to one table, which it remembers, so
/// that one left over from an older table only misses.
#[derive(Clone, Copy, Debug)]
pub struct Hit {
    first: u64,
    len: u64,
    host: NonNull<u8>,
    table: u64,
}

// SAFETY: the pointer is only handed out by `translate` of the very table that made it.
unsafe impl Send for Hit {}

impl Default for Hit {
    fn default() -> Hit {
        Hit {
            first: 0,
            len: 0,
            host: NonNull::dangling(),
            table: 0,
        }
    }
}

/// One region of a guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    first: u64,
    /// 0 if there is none.
    len: u64,
    host: NonNull<u8>,
    table: PhantomData<&'a GuestMem>,
}

impl Window<'_> {
    /// As [`GuestMem::translate`] if the bytes lie in this region and are not none: what is true of nearly all. Besides: the
    /// mapped bytes from there to the end of the region, at most `u32::MAX`.
    #[inline]
    #[must_use]
    pub fn translate(&self, gpa: u64, len: u32) -> Option<(NonNull<u8>, u32)> {
        let at = gpa.wrapping_sub(self.first);
        let room = self.len.wrapping_sub(at);
        // One branch: `&` rather than `&&`. The second test means something only if the first holds. A length of 0 is no less than any.
        if (at < self.len) & (u64::from(len).wrapping_sub(1) < room) {
            // SAFETY: `at < self.len`, and this is a region of a table that is borrowed, mapped for `self.len` bytes.
            let host = unsafe { self.host.add(at as usize) };
            return Some((host, u32::try_from(room).unwrap_or(u32::MAX)));
        }
        None
    }
}

/// The memory of one attachment.
///
/// Immutable, `Send` and `Sync`: each queue holds it by `Arc`, any thread may translate. It must be *dropped* on a
/// control thread (it unmaps and closes), after every queue gave its `Arc` back.
#[derive(Debug)]
pub struct GuestMem {
    /// Unlike that of any other table of this process; never 0.
    id: u64,
    /// By GPA.
    spans: Box<[Span]>,
    /// In the same order.
    regions: Box<[Region]>,
    poison: Arc<Poison>,
    uffd: Option<Arc<Uffd>>,
    options: MapOptions,
}

// SAFETY: `spans` holds addresses of mappings that `regions` keeps alive; translating reads only our own, immutable data.
unsafe impl Send for GuestMem {}
// SAFETY: as above.
unsafe impl Sync for GuestMem {}

impl GuestMem {
    /// Checks and maps a whole table; all or nothing. On a control thread: it may take milliseconds per GiB.
    pub fn map(
        specs: Vec<RegionSpec>,
        poison: &Arc<Poison>,
        options: &MapOptions,
    ) -> Result<GuestMem, MemError> {
        options.fill_budget.renew();
        let uffd = if options.arm {
            Uffd::new().map(Arc::new)
        } else {
            None
        };
        let empty = GuestMem::with_regions(Vec::new(), Arc::clone(poison), uffd, options.clone());
        empty.extended(specs)
    }

    /// The same table with one region more (ADD_MEM_REG). What was mapped stays where it is.
    pub fn with_added(&self, spec: RegionSpec) -> Result<GuestMem, MemError> {
        self.extended(vec![spec])
    }

    /// The same table without a region, named as it was announced (REM_MEM_REG). It is unmapped when the last table
    /// that holds it is dropped.
    pub fn with_removed(&self, gpa: u64, len: u64, uva: u64) -> Result<GuestMem, MemError> {
        let named = |r: &&Region| (r.gpa, r.len, r.uva) == (gpa, len, uva);
        if !self.regions.iter().any(|r| named(&r)) {
            return Err(MemError::NoSuchRegion { gpa, len });
        }
        Ok(self.derived(self.regions.iter().filter(|r| !named(r)).cloned().collect()))
    }

    /// The flag of the attachment this memory belongs to.
    #[must_use]
    pub fn poison(&self) -> &Arc<Poison> {
        &self.poison
    }

    /// The host address of guest addresses `gpa` to `gpa + len - 1`, if one region holds them all. With length 0: of
    /// `gpa`, if a region holds it.
    ///
    /// The pointer is good for raw reads and writes of `len` bytes as long as this table is held. It points to memory
    /// that others write at any time: no reference may be made of it.
    #[inline]
    #[must_use]
    pub fn translate(&self, hit: &mut Hit, gpa: u64, len: u32) -> Option<NonNull<u8>> {
        let again = self.window(hit).translate(gpa, len);
        again.map_or_else(|| self.translate_miss(hit, gpa, len), |(at, _)| Some(at))
    }

    /// The region used last, for a loop that keeps it in registers.
    #[inline]
    #[must_use]
    pub fn window(&self, hit: &Hit) -> Window<'_> {
        Window {
            first: hit.first,
            len: if hit.table == self.id { hit.len } else { 0 },
            host: hit.host,
            table: PhantomData,
        }
    }

    #[inline(never)]
    fn translate_miss(&self, hit: &mut Hit, gpa: u64, len: u32) -> Option<NonNull<u8>> {
        let span = self.span_of(gpa)?;
        let at = gpa - span.first;
        if at >= span.len || u64::from(len) > span.len - at {
            return None;
        }
        *hit = Hit {
            first: span.first,
            len: span.len,
            host: span.host,
            table: self.id,
        };
        // SAFETY: `at < span.len`, the bytes mapped at `span.host`.
        Some(unsafe { span.host.add(at as usize) })
    }

    /// The last region that starts at or before `gpa`.
    #[inline]
    fn span_of(&self, gpa: u64) -> Option<&Span> {
        // Counting has no branch to mispredict. 8 regions is what DPDK sends at most.
        let at_or_before = if self.spans.len() <= 8 {
            self.spans.iter().map(|s| usize::from(s.first <= gpa)).sum()
        } else {
            self.spans.partition_point(|s| s.first <= gpa)
        };
        self.spans.get(at_or_before.checked_sub(1)?)
    }

    /// The host address of `len` bytes at a frontend address, as ring addresses are given. Whole range in one region.
    #[must_use]
    pub fn translate_uva(&self, uva: u64, len: u64) -> Option<NonNull<u8>> {
        self.regions.iter().find_map(|r| {
            let at = uva.wrapping_sub(r.uva);
            // SAFETY: `at < r.len`, the bytes mapped at `host`.
            (at < r.len && len <= r.len - at).then(|| unsafe { r.mapping.host.add(at as usize) })
        })
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = &Region> {
        self.regions.iter()
    }

    /// Device and inode of each region's file. The same on ports of different peers means that one reads the other's
    /// frames.
    pub fn inodes(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions.iter().map(Region::inode)
    }

    /// Whether every region is armed against holes.
    #[must_use]
    pub fn armed(&self) -> bool {
        self.regions.iter().all(Region::armed)
    }

    /// Maps `specs` beside what is there.
    fn extended(&self, specs: Vec<RegionSpec>) -> Result<GuestMem, MemError> {
        // 1. The shape of the table, before any file is asked.
        self.check_count(&specs)?;
        for spec in &specs {
            check_shape(spec)?;
        }
        check_overlaps(
            self.regions
                .iter()
                .map(|r| (r.gpa, r.uva, r.len))
                .chain(specs.iter().map(|s| (s.gpa, s.uva, s.len))),
        )?;
        // 2. The files.
        let gates = specs
            .iter()
            .map(|spec| gate(spec, &self.options))
            .collect::<Result<Vec<_>, _>>()?;
        // 3. The mappings. An error unmaps those already made.
        let mut regions = self.regions.to_vec();
        for (spec, gate) in specs.into_iter().zip(gates) {
            let RegionSpec { gpa, len, uva, .. } = spec;
            let uffd = self.uffd.as_ref();
            let mapping = Mapping::new(spec, &gate, &self.poison, uffd, &self.options)?;
            let (page, kind, mapping) = (gate.page, gate.kind, Arc::new(mapping));
            regions.push(Region {
                gpa,
                len,
                uva,
                page,
                kind,
                mapping,
            });
        }
        Ok(self.derived(regions))
    }

    fn check_count(&self, specs: &[RegionSpec]) -> Result<(), MemError> {
        let (count, max) = (self.regions.len() + specs.len(), self.options.max_regions);
        if count > max {
            return Err(MemError::TooManyRegions { count, max });
        }
        let lens = self
            .regions
            .iter()
            .map(|r| r.len)
            .chain(specs.iter().map(|s| s.len));
        let bytes = lens.fold(0, u64::saturating_add);
        let max = self.options.max_bytes;
        if bytes > max {
            return Err(MemError::TooLarge { bytes, max });
        }
        Ok(())
    }

    fn derived(&self, regions: Vec<Region>) -> GuestMem {
        let (poison, uffd) = (Arc::clone(&self.poison), self.uffd.clone());
        GuestMem::with_regions(regions, poison, uffd, self.options.clone())
    }

    fn with_regions(
        mut regions: Vec<Region>,
        poison: Arc<Poison>,
        uffd: Option<Arc<Uffd>>,
        options: MapOptions,
    ) -> GuestMem {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        regions.sort_by_key(|r| r.gpa);
        debug_assert!(regions.windows(2).all(|w| w[0].last() < w[1].gpa));
        let spans = regions
            .iter()
            .map(|r| Span {
                first: r.gpa,
                len: r.len,
                host: r.mapping.host,
            })
            .collect();
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        GuestMem {
            id,
            spans,
            regions: regions.into(),
            poison,
            uffd,
            options,
        }
    }
}
