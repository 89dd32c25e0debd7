//! The packed virtqueue, device side (virtio 1.2 §2.8).
//!
//! Layout, all little-endian: one ring of descriptors, 16 bytes each: u64 address, u32 length, u16 buffer id, u16 flags.
//! The driver makes descriptors available in ring order, the device writes used ones over them. A wrap counter, flipped
//! at each lap, tells new flags from old ones, so a ring of any size works. Event suppression areas: u16 offset and wrap,
//! u16 flags; the driver's in place of the available ring, the device's in place of the used ring.
//!
//! Buffers are completed in the order they were made available: the place of the next one to fetch is also the place of
//! the next one to use. A buffer id is echoed and means nothing here.
#![allow(unsafe_code)] // pointers into a guest's memory, checked once in `new`

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::buffers::{BATCH, BatchFull, Buffers, Chain};
use super::guest_mem::{GuestMem, Hit};
use super::ring::{
    BadSetup, Desc, Lie, RingSetup, Table, Way, feature, flag, full_fence, passed, prefetch_write,
};

/// Largest ring: a place must fit into 15 bits (virtio 1.2 §2.8.10.1).
const SIZE_MAX: u16 = 32768;
/// Descriptors in a cache line of 64 bytes.
const DESCS_PER_LINE: usize = 4;

/// Flags of an event suppression area (§2.8.10), in the upper half of its word.
pub(super) mod event {
    /// Tell me of every buffer.
    pub(in super::super) const ENABLE: u32 = 0;
    /// Tell me of none.
    pub(in super::super) const DISABLE: u32 = 1 << 16;
    /// Tell me when this place is passed.
    pub(in super::super) const AT: u32 = 2 << 16;
}

/// A place in the ring with the wrap counter of its lap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) index: u16,
    pub(super) wrap: bool,
}

impl Place {
    /// From bits 0 to 14 index, bit 15 wrap counter.
    #[inline]
    pub(super) fn of(word: u16) -> Place {
        Place {
            index: word & 0x7fff,
            wrap: word & 0x8000 != 0,
        }
    }

    /// The reverse of `of`.
    #[inline]
    pub(super) fn word(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// `by` descriptors further, at most one lap.
    #[inline]
    pub(super) fn ahead(self, by: u16, size: u16) -> Place {
        let index = u32::from(self.index) + u32::from(by);
        match index.checked_sub(u32::from(size)) {
            Some(index) => Place {
                index: index as u16,
                wrap: !self.wrap,
            },
            None => Place {
                index: index as u16,
                wrap: self.wrap,
            },
        }
    }

    /// The two flags of an available descriptor here.
    #[inline]
    pub(super) fn available(self) -> u16 {
        if self.wrap { flag::AVAIL } else { flag::USED }
    }

    /// The two flags of a used descriptor here.
    #[inline]
    pub(super) fn used(self) -> u16 {
        if self.wrap {
            flag::AVAIL | flag::USED
        } else {
            0
        }
    }
}

/// Does the other side want to be told, after `since` descriptors (at most `size`) up to `new`, says its event area?
#[inline]
pub(super) fn told(area: u32, event_idx: bool, new: Place, since: u16, size: u16) -> bool {
    match area & 0x3_0000 {
        event::DISABLE => false,
        event::AT if event_idx => {
            let at = Place::of(area as u16);
            let lap = if at.wrap == new.wrap { 0 } else { size };
            passed(at.index.wrapping_sub(lap), new.index, since)
        }
        _ => true,
    }
}

/// The flags of a descriptor.
///
/// # Safety
/// `index < table.size`.
#[inline]
unsafe fn flags_at<'a>(table: Table, index: u16) -> &'a AtomicU16 {
    // SAFETY: the caller's promise; the flags are the last two bytes of sixteen. An atomic may be changed by others at any time.
    unsafe { &*table.at(index).add(14).cast::<AtomicU16>() }
}

/// A packed ring, used by one thread at a time.
pub struct PackedRing {
    pub(super) mem: Arc<GuestMem>,
    table: Table,
    /// What the driver wants to be told.
    driver: *const AtomicU32,
    /// What we want to be told.
    device: *const AtomicU32,
    way: Way,
    in_order: bool,
    event_idx: bool,
    indirect: bool,
    /// Next buffer to fetch and to use.
    next: Place,
    /// Descriptors used since `call_wanted` was last asked; at most a lap.
    since: u16,
    hit: Hit,
    /// The last fetch found as many buffers as were asked for.
    plenty: bool,
    /// Ids of the fetched buffers.
    ids: [u16; BATCH],
    /// Descriptors each of them takes in the ring.
    slots: [u16; BATCH],
    /// Each of them takes one.
    alone: bool,
}

// SAFETY: the pointers go into memory that `mem` keeps mapped; the ring is used by one thread at a time (`&mut self`).
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// Checks the setup and takes the ring.
    pub(super) fn new(setup: RingSetup) -> Result<PackedRing, BadSetup> {
        let (size, next) = (setup.size, Place::of(setup.base as u16));
        if size == 0 || size > SIZE_MAX {
            return Err(BadSetup::Size(size));
        }
        // The upper half, the place to use next, is what frontends forget to set: nothing is in flight, so it is the same.
        if next.index >= size {
            return Err(BadSetup::Base(setup.base));
        }
        let first = setup.part(setup.desc, 16 * u64::from(size), 16)?;
        let mut ring = PackedRing {
            table: Table::new(first, size),
            driver: setup.part(setup.avail, 4, 4)?.cast(),
            device: setup.part(setup.used, 4, 4)?.cast(),
            way: setup.way,
            in_order: setup.has(feature::IN_ORDER),
            event_idx: setup.has(feature::EVENT_IDX),
            indirect: setup.has(feature::INDIRECT_DESC),
            next,
            since: 0,
            hit: Hit::default(),
            plenty: false,
            ids: [0; BATCH],
            slots: [0; BATCH],
            alone: true,
            mem: setup.mem,
        };
        ring.disarm();
        Ok(ring)
    }

    /// The flags of the descriptor at `place`.
    #[inline]
    fn flags(&self, place: Place) -> &AtomicU16 {
        // SAFETY: every place is made by `new` or `ahead`, so `index < size`.
        unsafe { flags_at(self.table, place.index) }
    }

    /// The flags of an available descriptor that stands alone.
    #[inline]
    fn plain(&self, place: Place) -> u16 {
        place.available() | self.way.plain()
    }

    /// The event areas: the driver's, ours.
    fn areas(&self) -> (&AtomicU32, &AtomicU32) {
        // SAFETY: `new` found four mapped bytes, 4-aligned, at each. An atomic may be changed by others at any time.
        unsafe { (&*self.driver, &*self.device) }
    }

    /// See [`super::ring::Ring::fetch`].
    #[inline]
    pub(super) fn fetch(&mut self, buffers: &mut Buffers, most: usize) -> Result<usize, Lie> {
        let size = self.table.size;
        buffers.begin();
        self.alone = true;
        let most = most.min(BATCH).min(usize::from(size));
        if self.way == Way::ToGuest {
            self.look_ahead(most as u16);
        }
        // A lap at most: no descriptor is fetched twice. Nothing beyond an available descriptor is prefetched: that would
        // steal the line the driver is writing (168 instead of 102 cycles a frame).
        let (mut place, mut left, mut done) = (self.next, size, 0);
        while done < most && left > 0 {
            let run = (most - done).min(usize::from(left.min(size - place.index)));
            let mut slots = self.take_plain(buffers, done..done + run, place);
            done += usize::from(slots);
            if slots == 0 {
                slots = self.take_odd(buffers, done, place, left)?;
                if slots == 0 {
                    return Ok(done);
                }
                done += 1;
            }
            place = place.ahead(slots, size);
            left -= slots;
        }
        self.plenty = left > 0;
        Ok(done)
    }

    /// Makes buffers of available descriptors that stand alone and lie in the region used last, from `first` on, up to the first that
    /// does not; returns how many. The ring ends no earlier than `range`. A loop that calls nothing: all it needs stays in registers.
    #[inline]
    fn take_plain(&mut self, buffers: &mut Buffers, range: Range<usize>, first: Place) -> u16 {
        let (table, way, plain) = (self.table, self.way, self.plain(first));
        let window = self.mem.window(&self.hit);
        let (Some(ids), Some(slots)) = (
            self.ids.get_mut(range.clone()),
            self.slots.get_mut(range.clone()),
        ) else {
            return 0; // `range` ends at `BATCH`, or before
        };
        slots.fill(1);
        let mut at = first.index;
        for (buffer, id) in buffers.places(range).iter_mut().zip(ids) {
            // SAFETY: `fetch` asks for no more than there are before the ring's end: `at < size`.
            let (flags, desc) = unsafe {
                // Acquire: pairs with the driver's Release store of the flags (§2.8.16): the descriptor, and all of its chain, is written.
                let flags = flags_at(table, at).load(Ordering::Acquire);
                (flags, table.read(at))
            };
            if flags != plain || !buffer.put(&window, &desc, way) {
                break;
            }
            *id = desc.third;
            at += 1;
        }
        at - first.index
    }

    /// Makes buffer `index` of any other available descriptor; returns the descriptors it takes, 0 if this fetch ends before it.
    #[inline]
    fn take_odd(
        &mut self,
        buffers: &mut Buffers,
        index: usize,
        place: Place,
        left: u16,
    ) -> Result<u16, Lie> {
        // Acquire: as in `take_plain`.
        let flags = self.flags(place).load(Ordering::Acquire);
        if flags & (flag::AVAIL | flag::USED) != place.available() {
            return Ok(0);
        }
        self.take_chain(buffers, index, (place, flags), left)
    }

    /// The same for one that is available. It is read anew: what `take_plain` saw of it is forgotten.
    #[cold]
    fn take_chain(
        &mut self,
        buffers: &mut Buffers,
        index: usize,
        (place, flags): (Place, u16),
        left: u16,
    ) -> Result<u16, Lie> {
        // SAFETY: as in `flags`.
        let desc = unsafe { self.table.read(place.index) };
        let (slots, id) = if flags == self.plain(place) {
            buffers.put(index, &self.mem, &mut self.hit, &desc, self.way);
            (1, desc.third)
        } else if buffers.walked_enough() {
            return Ok(0);
        } else {
            let (Ok(()), slots, id) = self.chain(buffers, index, (place, flags, desc), left)?
            else {
                return Ok(0);
            };
            (slots, id)
        };
        self.alone &= slots == 1;
        self.ids[index % BATCH] = id;
        self.slots[index % BATCH] = slots;
        Ok(slots)
    }

    /// Buffers for reception are there long before they are needed, and the driver writes new ones a lap ahead of us: while there
    /// are plenty, the descriptors of the batch after this one are taken for writing. In a transmit ring this would steal the
    /// lines that the driver is writing.
    #[inline]
    fn look_ahead(&mut self, most: u16) {
        const BATCH_SLOTS: u16 = BATCH as u16;
        if !std::mem::take(&mut self.plenty) || self.table.size < 4 * BATCH_SLOTS {
            return;
        }
        for index in (most..most + BATCH_SLOTS).step_by(DESCS_PER_LINE) {
            let place = self.next.ahead(index, self.table.size);
            // SAFETY: `ahead` keeps `index < size`.
            prefetch_write(unsafe { self.table.at(place.index) });
        }
    }

    /// Walks a chain (§2.8.6), at most `left` descriptors. Returns the buffer, the slots it takes and its id.
    #[cold]
    fn chain(
        &mut self,
        buffers: &mut Buffers,
        index: usize,
        (mut place, mut flags, mut desc): (Place, u16, Desc),
        left: u16,
    ) -> Result<(Result<(), BatchFull>, u16, u16), Lie> {
        let (table, indirect) = (self.table, self.indirect);
        let mut chain = Chain::new(buffers, &self.mem, &mut self.hit, self.way);
        for slots in 1..=left {
            if flags & flag::INDIRECT != 0 {
                // Only alone: a chain may not go on to a table here, nor from one (§2.8.19).
                if !indirect || flags & flag::NEXT != 0 || slots != 1 {
                    return Err(Lie::Indirect);
                }
                walk_indirect(&mut chain, &desc, self.way)?;
                return Ok((chain.end(index), slots, desc.third));
            }
            chain.add(desc.addr, desc.len, flags)?;
            if flags & flag::NEXT == 0 {
                return Ok((chain.end(index), slots, desc.third));
            }
            place = place.ahead(1, table.size);
            // SAFETY: `ahead` keeps `index < size`.
            desc = unsafe { table.read(place.index) };
            // What follows the first descriptor was written before it (§2.8.21): its flags need no order of their own.
            flags = desc.fourth;
        }
        Err(Lie::Loop)
    }

    /// See [`super::ring::Ring::complete`].
    #[inline]
    pub(super) fn complete(&mut self, count: usize, written: &[u32]) {
        debug_assert!(count <= BATCH);
        let count = count.min(BATCH);
        if count == 0 {
            return;
        }
        let (size, first) = (self.table.size, self.next);
        // With IN_ORDER one element stands for the batch, in the first one's place and with the last one's id (§2.8.9).
        let batch = self.in_order && self.way == Way::FromGuest;
        let (place, used) = if self.alone {
            let lap = count.min(usize::from(size - first.index));
            if !batch {
                self.put_run(first.ahead(1, size), 1..lap, written);
                self.put_run(first.ahead(lap as u16, size), lap..count, written);
            }
            (first.ahead(count as u16, size), count as u16)
        } else {
            self.put_chains(count, batch, written)
        };
        // The first one last: its flags show the whole batch at once. Release: pairs with the driver's Acquire load of the flags.
        let (id, len) = match batch {
            true => (self.ids[(count - 1) % BATCH], 0),
            false => (self.ids[0], written.first().copied().unwrap_or(0)),
        };
        self.put_used(first, id, len, Ordering::Release);
        self.next = place;
        self.since = self.since.saturating_add(used).min(size);
    }

    /// Writes used descriptors of some buffers one behind the other; they end before the ring does.
    #[inline]
    fn put_run(&self, first: Place, buffers: Range<usize>, written: &[u32]) {
        let ids = self.ids.get(buffers.clone()).unwrap_or(&[]);
        let written = written.get(buffers).unwrap_or(&[]);
        let (with, without) = ids.split_at(ids.len().min(written.len()));
        let mut place = first;
        for (id, len) in with.iter().zip(written) {
            self.put_used(place, *id, *len, Ordering::Relaxed);
            place.index += 1;
        }
        for id in without {
            self.put_used(place, *id, 0, Ordering::Relaxed);
            place.index += 1;
        }
    }

    /// Writes used descriptors of all buffers but the first, where some take several; returns the next place, and how many they take.
    #[cold]
    fn put_chains(&self, count: usize, batch: bool, written: &[u32]) -> (Place, u16) {
        let size = self.table.size;
        let mut place = self.next.ahead(self.slots[0], size);
        let mut used = self.slots[0];
        for index in 1..count {
            if !batch {
                let len = written.get(index).copied().unwrap_or(0);
                self.put_used(place, self.ids[index % BATCH], len, Ordering::Relaxed);
            }
            place = place.ahead(self.slots[index % BATCH], size);
            used = used.saturating_add(self.slots[index % BATCH]);
        }
        (place, used)
    }

    /// Writes length, id and flags of a used descriptor as one word: nobody sees the flags without the rest.
    #[inline]
    fn put_used(&self, place: Place, id: u16, len: u32, order: Ordering) {
        // The length counts only if the device says that it wrote (§2.8.8).
        let wrote = if len == 0 { 0 } else { flag::WRITE };
        let word = u64::from(len) | u64::from(id) << 32 | u64::from(place.used() | wrote) << 48;
        // SAFETY: as in `flags`; the second half of a descriptor is 8-aligned.
        unsafe { &*self.table.at(place.index).add(8).cast::<AtomicU64>() }.store(word, order);
    }

    /// See [`super::ring::Ring::call_wanted`].
    #[inline]
    pub(super) fn call_wanted(&mut self) -> bool {
        let since = std::mem::take(&mut self.since);
        if since == 0 {
            return false;
        }
        // SeqCst: orders our used flags before the load of what the driver wants; pairs with the driver's fence between
        // storing that and looking at the flags again (§2.8.21.3.1).
        full_fence();
        let area = self.areas().0.load(Ordering::Relaxed);
        told(area, self.event_idx, self.next, since, self.table.size)
    }

    /// See [`super::ring::Ring::arm`].
    pub(super) fn arm(&mut self) -> bool {
        let wish = if self.event_idx {
            event::AT | u32::from(self.next.word())
        } else {
            event::ENABLE
        };
        self.areas().1.store(wish, Ordering::Relaxed);
        // SeqCst: orders the wish before the last look; pairs with the driver's fence between flags and reading the wish.
        fence(Ordering::SeqCst);
        let flags = self.flags(self.next).load(Ordering::Relaxed);
        flags & (flag::AVAIL | flag::USED) == self.next.available()
    }

    /// See [`super::ring::Ring::disarm`].
    pub(super) fn disarm(&mut self) {
        self.areas().1.store(event::DISABLE, Ordering::Relaxed);
    }

    /// See [`super::ring::Ring::base`]: the same place in both halves.
    pub(super) fn base(&self) -> u32 {
        u32::from(self.next.word()) * 0x1_0001
    }
}

/// An indirect table is as long as its length says: its descriptors need no NEXT, and of their flags only WRITE means
/// something (§2.8.7). DPDK leaves WRITE set on what is to be read, and NEXT from other frames: only a receive ring's
/// flags can be believed.
fn walk_indirect(chain: &mut Chain<'_>, table: &Desc, way: Way) -> Result<(), Lie> {
    let (first, count) = chain.table(table.addr, table.len)?;
    for index in 0..count {
        // SAFETY: `index < count`, and `table` found count·16 bytes mapped at `first`.
        let desc = unsafe { Desc::read_anywhere(first.add(16 * index)) };
        if desc.fourth & flag::INDIRECT != 0 {
            return Err(Lie::Indirect);
        }
        let flags = match way {
            Way::FromGuest => 0,
            Way::ToGuest => desc.fourth,
        };
        chain.add(desc.addr, desc.len, flags)?;
    }
    Ok(())
}
