//! Packed ring, driver side (virtio 1.2 §2.8).
#![allow(unsafe_code)] // raw pointers into memory that a device writes

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::super::packed::{Place, event, told};
use super::super::ring::{BadSetup, Table, Way, feature, flag};
use super::{DriverSetup, Held, OwnMem, Raw, Used};

/// Offsets of driver area and device area, and the bytes of all: each part on cache lines of its own.
pub(super) fn layout(size: u16) -> (u64, u64, u64) {
    let driver = (16 * u64::from(size)).next_multiple_of(64);
    (driver, driver + 64, driver + 128)
}

pub(super) struct PackedDriver {
    mem: Arc<OwnMem>,
    table: Table,
    driver: *mut u8,
    device: *mut u8,
    way: Way,
    in_order: bool,
    event_idx: bool,
    /// Where the next buffer is made available.
    next: Place,
    /// Where the next used descriptor will be.
    taken: Place,
    /// IN_ORDER: the id of the last buffer of the batch being taken.
    batch: Option<u16>,
    /// Descriptors posted since `kick_wanted` was last asked; at most a lap.
    since: u16,
    free: u16,
    /// The device gave back a kept buffer that it did not have.
    lied: bool,
    /// Buffers in flight.
    flying: u16,
    /// Not IN_ORDER: all ids; those beyond the first `flying` are free.
    ids: Vec<u16>,
    /// Buffers in flight, by id; with IN_ORDER that is the place of their first descriptor.
    held: Vec<Held>,
}

// SAFETY: the pointers go into memory that `mem` keeps mapped; the ring is used by one thread at a time (`&mut self`).
unsafe impl Send for PackedDriver {}

impl PackedDriver {
    pub(super) fn new(setup: DriverSetup) -> Result<PackedDriver, BadSetup> {
        let size = setup.size;
        if size == 0 || size > 32768 {
            return Err(BadSetup::Size(size));
        }
        let (driver, device, bytes) = layout(size);
        let at = setup.mem.ptr(setup.at, bytes);
        let at = at.ok_or(BadSetup::Outside(setup.at))?.as_ptr();
        let has = |feature| setup.features & feature != 0;
        let start = Place {
            index: 0,
            wrap: true,
        };
        let mut ring = PackedDriver {
            table: Table::new(at, size),
            driver: at.wrapping_add(driver as usize),
            device: at.wrapping_add(device as usize),
            way: setup.way,
            in_order: has(feature::IN_ORDER),
            event_idx: has(feature::EVENT_IDX),
            next: start,
            taken: start,
            batch: None,
            since: 0,
            free: size,
            lied: false,
            flying: 0,
            ids: (0..size).collect(),
            held: vec![Held::default(); usize::from(size)],
            mem: setup.mem,
        };
        ring.disarm();
        Ok(ring)
    }

    pub(super) fn addresses(&self) -> (u64, u64, u64) {
        // SAFETY: a ring has at least one descriptor.
        let first = unsafe { self.table.at(0) };
        let uva = |at: *mut u8| at.addr() as u64;
        (uva(first), uva(self.driver), uva(self.device))
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.taken.word()) * 0x1_0001
    }

    pub(super) fn size(&self) -> u16 {
        self.table.size
    }

    #[inline]
    pub(super) fn free(&self) -> u16 {
        self.free
    }

    pub(super) fn raw(&self) -> Raw<'_> {
        Raw::new(&self.mem, self.table, (self.driver, 4), (self.device, 4))
    }

    /// The second half of the descriptor at `place`: length, id, flags.
    #[inline]
    fn word(&self, place: Place) -> &AtomicU64 {
        // SAFETY: every place comes from `ahead`, so `index < size`; a descriptor is aligned to 16.
        unsafe { &*self.table.at(place.index).add(8).cast::<AtomicU64>() }
    }

    #[inline]
    fn flags(&self, place: Place) -> &AtomicU16 {
        // SAFETY: as in `word`.
        unsafe { &*self.table.at(place.index).add(14).cast::<AtomicU16>() }
    }

    fn area(&self, at: *mut u8) -> &AtomicU32 {
        // SAFETY: one of the two areas, four mapped bytes, aligned to 64.
        unsafe { &*at.cast::<AtomicU32>() }
    }

    /// An id for a buffer whose first descriptor is at `place`, when `used` ids are. The caller knows that there is one.
    #[inline]
    fn id(&self, place: Place, used: u16) -> u16 {
        if self.in_order {
            place.index
        } else {
            self.ids[usize::from(used)]
        }
    }

    /// Writes a descriptor's address, and returns its second half.
    #[inline]
    fn half(&self, place: Place, (addr, len): (u64, u32), id: u16, flags: u16) -> u64 {
        // SAFETY: as in `word`.
        unsafe { ptr::write_volatile(self.table.at(place.index).cast::<u64>(), addr) };
        let flags = flags | place.available() | self.direction();
        u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48
    }

    #[inline]
    fn direction(&self) -> u16 {
        match self.way {
            Way::ToGuest => flag::WRITE,
            Way::FromGuest => 0,
        }
    }

    #[inline]
    fn posted(&mut self, to: Place, descs: u16, buffers: u16) {
        self.next = to;
        self.free -= descs;
        self.flying += buffers;
        self.since = self.since.saturating_add(descs).min(self.table.size);
    }

    #[inline]
    pub(super) fn post(&mut self, buffers: &[(u64, u32)]) -> usize {
        let count = buffers.len().min(usize::from(self.free));
        let size = self.table.size;
        let (first, mut place, mut head, mut flying) = (self.next, self.next, 0, self.flying);
        for (index, &buffer) in buffers[..count].iter().enumerate() {
            let id = self.id(place, flying);
            flying += 1;
            let word = self.half(place, buffer, id, 0);
            self.held[usize::from(id)] = Held {
                addr: buffer.0,
                descs: 1,
            };
            if index == 0 {
                head = word;
            } else {
                self.word(place).store(word, Ordering::Relaxed);
            }
            place = place.ahead(1, size);
        }
        if count > 0 {
            // Release: pairs with the device's Acquire load of the flags (§2.8.16). The first one last: the device sees all or none.
            self.word(first).store(head, Ordering::Release);
            self.posted(place, count as u16, count as u16);
        }
        count
    }

    /// See [`super::DriverRing::post_kept`]: the device wrote over the descriptors, so they are written anew.
    #[inline]
    pub(super) fn post_kept(&mut self, count: usize, buffer: impl Fn(usize) -> (u16, u64, u32)) {
        assert!(count <= usize::from(self.free), "no room for {count}");
        if count == 0 {
            return;
        }
        let size = self.table.size;
        let (first, mut place, mut head) = (self.next, self.next, 0);
        for index in 0..count {
            let (id, addr, len) = buffer(index);
            let word = self.half(place, (addr, len), id, 0);
            if index == 0 {
                head = word;
            } else {
                self.word(place).store(word, Ordering::Relaxed);
            }
            place = place.ahead(1, size);
        }
        // Release: as in `post`.
        self.word(first).store(head, Ordering::Release);
        self.posted(place, count as u16, count as u16);
    }

    /// See [`super::DriverRing::take_kept`].
    #[inline]
    pub(super) fn take_kept(&mut self, out: &mut [(u16, u32)]) -> usize {
        let (mut place, size) = (self.taken, self.table.size);
        let mut count = 0;
        for out in out {
            let Some((id, len)) = self.next_used(place) else {
                break;
            };
            if id >= size {
                self.lied = true;
                break;
            }
            place = place.ahead(1, size);
            *out = (id, len);
            count += 1;
        }
        if self.given_back(place, count) {
            usize::from(count)
        } else {
            0
        }
    }

    /// See [`super::DriverRing::reclaim_kept`].
    #[inline]
    pub(super) fn reclaim_kept(&mut self) {
        let size = self.table.size;
        // One used descriptor stands for all buffers up to the one it names (§2.8.9).
        while let Some((last, _)) = self.used(self.taken) {
            if last >= size {
                self.lied = true;
                return;
            }
            let index = self.taken.index;
            let more = if last >= index {
                last - index
            } else {
                last + (size - index)
            };
            if !self.given_back(self.taken.ahead(more + 1, size), more + 1) {
                return;
            }
        }
    }

    /// See [`super::DriverRing::lied`].
    #[inline]
    pub(super) fn lied(&self) -> bool {
        self.lied
    }

    /// False if the device did not have so many.
    #[inline]
    fn given_back(&mut self, taken: Place, count: u16) -> bool {
        if count > self.table.size - self.free {
            self.lied = true;
            return false;
        }
        self.taken = taken;
        self.free += count;
        self.flying -= count;
        true
    }

    pub(super) fn post_chain(&mut self, pieces: &[(u64, u32)]) -> bool {
        if pieces.len() > usize::from(self.free) {
            return false;
        }
        let (first, mut place, mut head) = (self.next, self.next, 0);
        let id = self.id(first, self.flying);
        for (index, &piece) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            // The id counts in the last descriptor only (§2.8.6): elsewhere it is garbage on purpose.
            let (id, more) = if last { (id, 0) } else { (!id, flag::NEXT) };
            let word = self.half(place, piece, id, more);
            if index == 0 {
                head = word;
            } else {
                self.word(place).store(word, Ordering::Relaxed);
            }
            place = place.ahead(1, self.table.size);
        }
        let descs = pieces.len() as u16;
        let addr = pieces[0].0;
        self.held[usize::from(id)] = Held { addr, descs };
        // Release: as in `post`.
        self.word(first).store(head, Ordering::Release);
        self.posted(place, descs, 1);
        true
    }

    pub(super) fn post_indirect(&mut self, table: u64, pieces: &[(u64, u32)]) -> bool {
        if self.free == 0 {
            return false;
        }
        for (index, &(addr, len)) in pieces.iter().enumerate() {
            let mut desc = [0; 16];
            desc[..8].copy_from_slice(&addr.to_le_bytes());
            desc[8..12].copy_from_slice(&len.to_le_bytes());
            desc[14..].copy_from_slice(&self.direction().to_le_bytes());
            self.mem.write(table + 16 * index as u64, &desc);
        }
        let first = self.next;
        let id = self.id(first, self.flying);
        let addr = pieces[0].0;
        self.held[usize::from(id)] = Held { addr, descs: 1 };
        let len = 16 * pieces.len() as u32;
        let word = self.half(first, (table, len), id, flag::INDIRECT);
        // Release: as in `post`.
        self.word(first).store(word, Ordering::Release);
        self.posted(first.ahead(1, self.table.size), 1, 1);
        true
    }

    /// Id and length of the used descriptor at `place`, if there is one.
    #[inline]
    fn used(&self, place: Place) -> Option<(u16, u32)> {
        // Acquire: pairs with the device's Release store of the flags (§2.8.17): id, length and buffer are written.
        let flags = self.flags(place).load(Ordering::Acquire);
        if flags & (flag::AVAIL | flag::USED) != place.used() {
            return None;
        }
        let word = self.word(place).load(Ordering::Relaxed);
        let len = if flags & flag::WRITE != 0 {
            word as u32
        } else {
            0
        };
        Some(((word >> 32) as u16, len))
    }

    /// The next buffer that came back, at `place`.
    #[inline]
    fn next_used(&mut self, place: Place) -> Option<(u16, u32)> {
        if !self.in_order || self.way == Way::ToGuest {
            return self.used(place);
        }
        // One used descriptor may stand for a batch and has the last buffer's id (§2.8.9).
        let last = match self.batch {
            Some(last) => last,
            None => self.used(place)?.0,
        };
        let id = place.index;
        self.batch = (id != last).then_some(last);
        Some((id, 0))
    }

    #[inline]
    pub(super) fn take(&mut self, out: &mut [Used]) -> usize {
        let (mut place, mut free, mut flying) = (self.taken, self.free, self.flying);
        let mut count = 0;
        for used in out {
            let Some((id, len)) = self.next_used(place) else {
                break;
            };
            let held = std::mem::take(&mut self.held[usize::from(id)]);
            assert!(held.descs > 0, "device used buffer {id}, not in flight");
            place = place.ahead(held.descs, self.table.size);
            free += held.descs;
            flying -= 1;
            if !self.in_order {
                self.ids[usize::from(flying)] = id;
            }
            *used = Used {
                addr: held.addr,
                len,
                id,
                buffers: 1,
            };
            count += 1;
        }
        (self.taken, self.free, self.flying) = (place, free, flying);
        count
    }

    #[inline]
    pub(super) fn reclaim(&mut self) -> usize {
        let (mut some, mut count) = ([Used::default(); 64], 0);
        loop {
            match self.take(&mut some) {
                0 => return count,
                more => count += more,
            }
        }
    }

    #[inline]
    pub(super) fn kick_wanted(&mut self) -> bool {
        let since = std::mem::take(&mut self.since);
        if since == 0 {
            return false;
        }
        // SeqCst: orders our flags before the load of what the device wants; pairs with the device's fence in `arm`.
        fence(Ordering::SeqCst);
        let area = self.area(self.device).load(Ordering::Relaxed);
        told(area, self.event_idx, self.next, since, self.table.size)
    }

    pub(super) fn arm(&mut self) -> bool {
        let wish = if self.event_idx {
            event::AT | u32::from(self.taken.word())
        } else {
            event::ENABLE
        };
        self.area(self.driver).store(wish, Ordering::Relaxed);
        // SeqCst: orders the wish before the last look; pairs with the device's fence in `call_wanted`.
        fence(Ordering::SeqCst);
        self.batch.is_some() || self.used(self.taken).is_some()
    }

    pub(super) fn disarm(&mut self) {
        self.area(self.driver)
            .store(event::DISABLE, Ordering::Relaxed);
    }
}
