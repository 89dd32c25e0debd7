//! The split virtqueue, device side (virtio 1.2 §2.7).
//!
//! Layout, all little-endian: descriptor table, 16 bytes each: u64 address, u32 length, u16 flags, u16 next. Available ring:
//! u16 flags, u16 idx, u16 ring[size], u16 used_event. Used ring: u16 flags, u16 idx, {u32 id, u32 len} ring[size],
//! u16 avail_event.
#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::buffers::{BATCH, BatchFull, Buffers, CHAIN_MAX, Chain};
use super::guest_mem::{GuestMem, Hit};
use super::ring::{
    BadSetup, Desc, Lie, RingSetup, Table, Way, feature, flag, full_fence, passed, prefetch_read,
    prefetch_write,
};

/// `avail.flags`: the driver wants no call; `used.flags`: the device wants no kick (virtio 1.2 §2.7.6, §2.7.8).
const NO_NOTIFY: u16 = 1;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Used buffers that [`SplitRing::complete_lazily`] holds back: a sixteenth of the ring, but no more than so many; between two publications up to
/// one less than twice that.
const RESERVE_MOST: u16 = 64;
/// Fewer are no use: DPDK's driver waits until all but 32 of a ring are used.
const RESERVE_LEAST: u16 = 32;

/// A split ring, used by one thread at a time.
pub struct SplitRing {
    pub(super) mem: Arc<GuestMem>,
    table: Table,
    avail: *const u8,
    used: *mut u8,
    size: u16,
    way: Way,
    in_order: bool,
    event_idx: bool,
    indirect: bool,
    /// Next buffer to fetch; buffers are completed in the order they were made available.
    next: u16,
    /// Our `used.idx`: behind `next` by the used buffers that are held back.
    published: u16,
    /// Used buffers that are held back while the driver polls, at least; 0: none ever.
    reserve: u16,
    /// The last fetch met a chain. Its descriptors are many, and a guest may soon be short of them.
    chained: bool,
    /// The guest's `avail.idx` when it was last read.
    seen: u16,
    /// `published` when `call_wanted` was last asked.
    called_at: u16,
    hit: Hit,
    /// The descriptor that the driver will probably use next.
    guess: u16,
    /// Heads of the fetched buffers.
    heads: [u16; BATCH],
}

// SAFETY: the pointers go into memory that `mem` keeps mapped; the ring is used by one thread at a time (`&mut self`).
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// Checks the setup and takes the ring.
    pub(super) fn new(setup: RingSetup) -> Result<SplitRing, BadSetup> {
        let size = u64::from(setup.size);
        if !setup.size.is_power_of_two() || size > 32768 {
            return Err(BadSetup::Size(setup.size));
        }
        let mut ring = SplitRing {
            table: Table::new(setup.part(setup.desc, 16 * size, 16)?, setup.size),
            avail: setup.part(setup.avail, 6 + 2 * size, 2)?,
            used: setup.part(setup.used, 6 + 8 * size, 4)?,
            size: setup.size,
            way: setup.way,
            in_order: setup.has(feature::IN_ORDER),
            event_idx: setup.has(feature::EVENT_IDX),
            indirect: setup.has(feature::INDIRECT_DESC),
            next: setup.base as u16,
            published: setup.base as u16,
            reserve: reserve(&setup),
            chained: false,
            seen: setup.base as u16,
            called_at: setup.base as u16,
            hit: Hit::default(),
            guess: 0,
            heads: [0; BATCH],
            mem: setup.mem,
        };
        // A virtio_user frontend that reconnects says base 0 but does not reset its rings: what the guest believes to have
        // got back is `used.idx`, so go on there. Frames in flight then may be sent twice or lost, the ring is sound.
        let used = ring.used_idx().load(Ordering::Relaxed);
        if used != ring.next {
            (ring.next, ring.seen, ring.called_at) = (used, used, used);
            ring.published = used;
        }
        ring.disarm();
        Ok(ring)
    }

    fn mask(&self) -> u16 {
        self.size - 1
    }

    /// The u16 at `offset` of the available ring.
    #[inline]
    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset.is_multiple_of(2) && offset < 6 + 2 * usize::from(self.size));
        // SAFETY: `new` checked that 6 + 2·size bytes are mapped at `avail` and 2-aligned; offsets are flags (0), idx (2),
        // 4 + 2·(masked index), used_event (4 + 2·size). An atomic may be changed by others at any time.
        unsafe { &*self.avail.add(offset).cast::<AtomicU16>() }
    }

    /// The u16 at `offset` of the used ring.
    #[inline]
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset.is_multiple_of(2) && offset < 6 + 8 * usize::from(self.size));
        // SAFETY: as in `avail_u16`: 6 + 8·size bytes at `used`; offsets are flags (0), idx (2), avail_event (4 + 8·size).
        unsafe { &*self.used.add(offset).cast::<AtomicU16>() }
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.used_u16(2)
    }

    /// See [`super::ring::Ring::fetch`].
    #[inline]
    pub(super) fn fetch(&mut self, buffers: &mut Buffers, most: usize) -> Result<usize, Lie> {
        let most = most.min(BATCH);
        let mut pending = self.seen.wrapping_sub(self.next);
        if usize::from(pending) < most {
            // Acquire: pairs with the guest's Release store of avail.idx (§2.7.13.3): what it announces is written.
            let idx = self.avail_u16(2).load(Ordering::Acquire);
            pending = idx.wrapping_sub(self.next);
            if pending > self.size {
                return Err(Lie::AvailIdx {
                    pending,
                    size: self.size,
                });
            }
            self.seen = idx;
        }
        let count = usize::from(pending).min(most);
        if count == 0 {
            return Ok(0);
        }
        // 1. Heads; the descriptors' lines are on their way.
        self.expect_descriptors(count);
        if self.way == Way::ToGuest {
            // The next burst's heads.
            let later = usize::from(self.next.wrapping_add(BATCH as u16) & self.mask());
            prefetch_read(self.avail.wrapping_add(4 + 2 * later));
            self.own_used_elements(count);
        }
        self.take_heads(count)?;
        // 2. Descriptors.
        buffers.begin();
        self.chained = false;
        let mut done = 0;
        loop {
            done += self.take_plain(buffers, done..count);
            if done == count || !self.take_odd(buffers, done)? {
                return Ok(done);
            }
            done += 1;
        }
    }

    /// Reads the next `count` heads, and starts to fetch their descriptors.
    #[inline]
    fn take_heads(&mut self, count: usize) -> Result<(), Lie> {
        let (avail, table) = (self.avail, self.table);
        let (size, mask, mut next) = (self.size, self.mask(), self.next);
        for place in self.heads.iter_mut().take(count) {
            // SAFETY: masked, so this is one of the ring's `size` entries; see `avail_u16`.
            let entry = unsafe {
                &*avail
                    .add(4 + 2 * usize::from(next & mask))
                    .cast::<AtomicU16>()
            };
            let head = entry.load(Ordering::Relaxed);
            if head >= size {
                return Err(Lie::Index { index: head, size });
            }
            *place = head;
            // SAFETY: `head < size`, just checked.
            prefetch_read(unsafe { table.at(head) });
            next = next.wrapping_add(1);
        }
        Ok(())
    }

    /// Makes buffers of descriptors that stand alone and lie in the region used last, up to the first that does not; returns how many.
    /// A loop that calls nothing: all it needs stays in registers.
    #[inline]
    fn take_plain(&self, buffers: &mut Buffers, range: Range<usize>) -> usize {
        let (table, mask, window) = (self.table, self.mask(), self.mem.window(&self.hit));
        let (way, plain) = (self.way, self.way.plain());
        let heads = self.heads.get(range.clone()).unwrap_or(&[]);
        let places = buffers.places(range);
        let mut count = 0;
        for (place, head) in places.iter_mut().zip(heads) {
            // SAFETY: `head < size`, checked above, and again by the mask in case the processor guesses (Spectre).
            let desc = unsafe { table.read(head & mask) };
            if desc.third != plain || !place.put(&window, &desc, way) {
                break;
            }
            count += 1;
        }
        count
    }

    /// Makes buffer `index` of any other descriptor, read anew; false if this fetch ends before it.
    #[cold]
    fn take_odd(&mut self, buffers: &mut Buffers, index: usize) -> Result<bool, Lie> {
        let (head, mask) = (self.heads[index % BATCH], self.mask());
        // SAFETY: `head < size`, and masked, as in `take_plain`.
        let desc = unsafe { self.table.read(head & mask) };
        if desc.third == self.way.plain() {
            buffers.put(index, &self.mem, &mut self.hit, &desc, self.way);
            return Ok(true);
        }
        Ok(!buffers.walked_enough() && self.chain(buffers, index, desc)?.is_ok())
    }

    /// Most drivers use descriptors in turn: these are probably the next ones, and need not wait for the available ring.
    #[inline]
    fn expect_descriptors(&self, count: usize) {
        for index in (0..count).step_by(LINE / 16) {
            let guess = self.guess.wrapping_add(index as u16) & self.mask();
            // SAFETY: masked, so `guess < size`.
            prefetch_read(unsafe { self.table.at(guess) });
        }
    }

    /// The lines of the used elements that `use_up` is going to write.
    #[inline]
    fn own_used_elements(&self, count: usize) {
        for index in (0..count + 7).step_by(LINE / 8) {
            let slot = self.next.wrapping_add(index as u16) & self.mask();
            prefetch_write(self.used.wrapping_add(4 + 8 * usize::from(slot)));
        }
    }

    /// Walks a chain or an indirect table (§2.7.5.1, §2.7.5.3). Every step is counted: a chain cannot be longer than its table.
    #[cold]
    fn chain(
        &mut self,
        buffers: &mut Buffers,
        index: usize,
        first: Desc,
    ) -> Result<Result<(), BatchFull>, Lie> {
        let (table, indirect) = (self.table, self.indirect);
        let mut chain = Chain::new(buffers, &self.mem, &mut self.hit, self.way);
        let mut desc = first;
        for _ in 0..table.size.min(CHAIN_MAX) {
            let flags = desc.third;
            if flags & flag::INDIRECT != 0 {
                if !indirect || flags & flag::NEXT != 0 {
                    return Err(Lie::Indirect);
                }
                walk_indirect(&mut chain, &desc)?;
                return Ok(chain.end(index));
            }
            chain.add(desc.addr, desc.len, flags)?;
            if flags & flag::NEXT == 0 {
                return Ok(chain.end(index));
            }
            if desc.fourth >= table.size {
                return Err(Lie::Index {
                    index: desc.fourth,
                    size: table.size,
                });
            }
            self.chained = true;
            // SAFETY: `fourth < size`, just checked.
            desc = unsafe { table.read(desc.fourth & (table.size - 1)) };
        }
        Err(Lie::Loop)
    }

    /// See [`super::ring::Ring::complete`].
    #[inline]
    pub(super) fn complete(&mut self, count: usize, written: &[u32]) {
        self.use_up(count, written);
        self.publish(self.next);
    }

    /// See [`super::ring::Ring::complete_lazily`].
    #[inline]
    pub(super) fn complete_lazily(&mut self, count: usize) {
        self.use_up(count, &[]);
        if self.reserve == 0 || self.chained {
            self.publish(self.next);
        } else if self.held() >= 2 * self.reserve {
            self.publish(self.next.wrapping_sub(self.reserve));
        }
    }

    /// Used buffers that the guest was not told of yet.
    #[inline]
    pub(super) fn held(&self) -> u16 {
        self.next.wrapping_sub(self.published)
    }

    /// See [`super::ring::Ring::settle`].
    #[inline]
    pub(super) fn settle(&mut self) {
        self.publish(self.next);
    }

    /// See [`super::ring::Ring::hold_none`].
    pub(super) fn hold_none(&mut self) {
        self.reserve = 0;
    }

    /// Consumes the first `count` fetched buffers.
    #[inline]
    fn use_up(&mut self, count: usize, written: &[u32]) {
        if count == 0 {
            return;
        }
        debug_assert!(count <= BATCH);
        let count = count.min(BATCH).min(usize::from(self.size));
        if !self.one_for_all() {
            let slot = usize::from(self.next & self.mask());
            let first = count.min(usize::from(self.size) - slot);
            self.put_used(slot, 0..first, written);
            self.put_used(0, first..count, written);
        }
        self.next = self.next.wrapping_add(count as u16);
        self.guess = self.heads[(count - 1) % BATCH].wrapping_add(1);
    }

    /// One used element stands for all that are published at a time: the last buffer's, in the first slot (§2.7.9).
    #[inline]
    fn one_for_all(&self) -> bool {
        self.in_order && self.way == Way::FromGuest
    }

    /// Tells the guest of the used buffers up to `end`.
    #[inline]
    fn publish(&mut self, end: u16) {
        if end == self.published {
            return;
        }
        if self.one_for_all() {
            // Read anew, for the guest alone: it stands there until the guest knows that the buffer is used.
            let last = 4 + 2 * usize::from(end.wrapping_sub(1) & self.mask());
            let head = self.avail_u16(last).load(Ordering::Relaxed);
            self.put_element(self.published, head);
        }
        self.published = end;
        // Release: pairs with the guest's Acquire load of used.idx (§2.7.14): elements and buffers are written.
        self.used_idx().store(end, Ordering::Release);
    }

    /// Writes the used element that belongs at index `at`.
    #[inline]
    fn put_element(&mut self, at: u16, head: u16) {
        let slot = usize::from(at & self.mask());
        // SAFETY: masked, so this is one of the `size` elements mapped at `used`, which is 4-aligned.
        unsafe {
            let element = self.used.add(4 + 8 * slot).cast::<u64>();
            ptr::write_unaligned(element, u64::from(head));
        }
    }

    /// Writes the used elements of some buffers one behind the other, beginning at `slot`: so several go with one store.
    #[inline]
    fn put_used(&mut self, slot: usize, buffers: Range<usize>, written: &[u32]) {
        let written = written.get(buffers.start..).unwrap_or(&[]);
        let heads = self.heads.get(buffers).unwrap_or(&[]);
        let (with, without) = heads.split_at(heads.len().min(written.len()));
        debug_assert!(slot + heads.len() <= usize::from(self.size));
        // SAFETY: `use_up` asks for no more elements than there are from `slot` to the ring's end; 4 + 8·size bytes are mapped
        // at `used`, which is 4-aligned, so the pair is written as one possibly unaligned u64.
        unsafe {
            let mut at = self.used.add(4 + 8 * slot).cast::<u64>();
            for (head, len) in with.iter().zip(written) {
                ptr::write_unaligned(at, u64::from(*head) | u64::from(*len) << 32);
                at = at.add(1);
            }
            for head in without {
                ptr::write_unaligned(at, u64::from(*head));
                at = at.add(1);
            }
        }
    }

    /// See [`super::ring::Ring::call_wanted`].
    #[inline]
    pub(super) fn call_wanted(&mut self) -> bool {
        let (old, new) = (self.called_at, self.next);
        if old == new {
            return false;
        }
        // SeqCst: orders our store of used.idx before the load of what the guest wants; pairs with the guest's fence between
        // storing that and looking at used.idx again (§2.7.7.1, §2.7.10).
        full_fence();
        let wanted = if self.event_idx {
            let event = self
                .avail_u16(4 + 2 * usize::from(self.size))
                .load(Ordering::Relaxed);
            passed(event, new, new.wrapping_sub(old))
        } else {
            self.avail_u16(0).load(Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted {
            self.publish(new); // nothing is held back from a guest that waits
        }
        self.called_at = self.published;
        wanted
    }

    /// See [`super::ring::Ring::arm`].
    pub(super) fn arm(&mut self) -> bool {
        if self.event_idx {
            self.used_u16(4 + 8 * usize::from(self.size))
                .store(self.next, Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        // SeqCst: orders the wish before the last look; pairs with the guest's fence between avail.idx and reading the wish (§2.7.10).
        fence(Ordering::SeqCst);
        self.avail_u16(2).load(Ordering::Relaxed) != self.next
    }

    /// See [`super::ring::Ring::disarm`].
    pub(super) fn disarm(&mut self) {
        if !self.event_idx {
            self.used_u16(0).store(NO_NOTIFY, Ordering::Relaxed);
        }
        // With EVENT_IDX a stale avail_event means: no kick until the index has gone once around.
    }

    /// See [`super::ring::Ring::base`].
    pub(super) fn base(&self) -> u32 {
        u32::from(self.next)
    }
}

/// How many used buffers a ring holds back: none where the guest says of which one it wants to be told, or has none to spare.
fn reserve(setup: &RingSetup) -> u16 {
    let spare = (setup.size / 16).min(RESERVE_MOST);
    let told = setup.way == Way::ToGuest || setup.has(feature::EVENT_IDX);
    if told || spare < RESERVE_LEAST {
        0
    } else {
        spare
    }
}

/// An indirect table ends its chain, is not nested, and its `next` stay inside it (§2.7.5.3.1).
fn walk_indirect(chain: &mut Chain<'_>, table: &Desc) -> Result<(), Lie> {
    let (first, count) = chain.table(table.addr, table.len)?;
    let mut index = 0;
    for _ in 0..count {
        // SAFETY: `index < count`, and `table` found count·16 bytes mapped at `first`.
        let desc = unsafe { Desc::read_anywhere(first.add(16 * index)) };
        if desc.third & flag::INDIRECT != 0 {
            return Err(Lie::Indirect);
        }
        chain.add(desc.addr, desc.len, desc.third)?;
        if desc.third & flag::NEXT == 0 {
            return Ok(());
        }
        index = usize::from(desc.fourth);
        if index >= count {
            return Err(Lie::Indirect);
        }
    }
    Err(Lie::Loop)
}
