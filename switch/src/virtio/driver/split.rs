//! Split ring, driver side (virtio 1.2 §2.7).
#![allow(unsafe_code)] // raw pointers into memory that a device writes

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::super::ring::{BadSetup, Table, Way, feature, flag, passed};
use super::{DriverSetup, Held, OwnMem, Raw, Used};

/// The wish not to be told, in `avail.flags` and `used.flags` (§2.7.6, §2.7.8).
const NO_NOTIFY: u16 = 1;

/// Offsets of available ring and used ring, and the bytes of all: each part on cache lines of its own.
pub(super) fn layout(size: u16) -> (u64, u64, u64) {
    let size = u64::from(size);
    let avail = (16 * size).next_multiple_of(64);
    let used = (avail + 6 + 2 * size).next_multiple_of(64);
    (avail, used, (used + 6 + 8 * size).next_multiple_of(64))
}

pub(super) struct SplitDriver {
    mem: Arc<OwnMem>,
    table: Table,
    avail: *mut u8,
    used: *mut u8,
    way: Way,
    in_order: bool,
    event_idx: bool,
    /// Next `avail.idx`.
    next: u16,
    /// Next used element to look at.
    taken: u16,
    /// `next` when `kick_wanted` was last asked.
    kicked_at: u16,
    free: u16,
    /// IN_ORDER: the next descriptor; they are used in table order (§2.7.9).
    desc: u16,
    /// Not IN_ORDER: the first `free` are the free descriptors.
    ids: Vec<u16>,
    /// Buffers in flight, by head.
    held: Vec<Held>,
    /// Heads, by slot of the available ring.
    heads: Vec<u16>,
    /// The next descriptor of each chain in flight.
    links: Vec<u16>,
    /// Chains in flight.
    chains: u32,
    /// The device gave back a kept buffer that it did not have.
    lied: bool,
}

// SAFETY: the pointers go into memory that `mem` keeps mapped; the ring is used by one thread at a time (`&mut self`).
unsafe impl Send for SplitDriver {}

impl SplitDriver {
    pub(super) fn new(setup: DriverSetup) -> Result<SplitDriver, BadSetup> {
        let size = setup.size;
        if !size.is_power_of_two() || size > 32768 {
            return Err(BadSetup::Size(size));
        }
        let (avail, used, bytes) = layout(size);
        let at = setup.mem.ptr(setup.at, bytes);
        let at = at.ok_or(BadSetup::Outside(setup.at))?.as_ptr();
        let has = |feature| setup.features & feature != 0;
        let mut ring = SplitDriver {
            table: Table::new(at, size),
            avail: at.wrapping_add(avail as usize),
            used: at.wrapping_add(used as usize),
            way: setup.way,
            in_order: has(feature::IN_ORDER),
            event_idx: has(feature::EVENT_IDX),
            next: 0,
            taken: 0,
            kicked_at: 0,
            free: size,
            desc: 0,
            ids: (0..size).rev().collect(),
            held: vec![Held::default(); usize::from(size)],
            heads: vec![0; usize::from(size)],
            links: vec![0; usize::from(size)],
            chains: 0,
            lied: false,
            mem: setup.mem,
        };
        ring.disarm();
        Ok(ring)
    }

    pub(super) fn addresses(&self) -> (u64, u64, u64) {
        // SAFETY: a table has at least one descriptor.
        let first = unsafe { self.table.at(0) };
        let uva = |at: *mut u8| at.addr() as u64;
        (uva(first), uva(self.avail), uva(self.used))
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.used_u16(2).load(Ordering::Relaxed))
    }

    pub(super) fn size(&self) -> u16 {
        self.table.size
    }

    #[inline]
    pub(super) fn free(&self) -> u16 {
        self.free
    }

    pub(super) fn raw(&self) -> Raw<'_> {
        let size = usize::from(self.table.size);
        let (avail, used) = ((self.avail, 6 + 2 * size), (self.used, 6 + 8 * size));
        Raw::new(&self.mem, self.table, avail, used)
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.table.size - 1))
    }

    #[inline]
    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `layout` made 6 + 2·size bytes at `avail`; offsets are 0, 2, 4 + 2·slot, 4 + 2·size.
        unsafe { &*self.avail.add(offset).cast::<AtomicU16>() }
    }

    #[inline]
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `layout` made 6 + 8·size bytes at `used`; offsets are 0, 2, 4 + 8·size.
        unsafe { &*self.used.add(offset).cast::<AtomicU16>() }
    }

    /// A free descriptor. The caller knows that there is one.
    fn grab(&mut self) -> u16 {
        self.free -= 1;
        if self.in_order {
            let id = self.slot(self.desc) as u16;
            self.desc = self.desc.wrapping_add(1);
            id
        } else {
            self.ids[usize::from(self.free)]
        }
    }

    #[inline]
    fn put_desc(table: Table, index: u16, (addr, len): (u64, u32), flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        // SAFETY: `index` is a free descriptor's: below size.
        unsafe {
            let at = table.at(index).cast::<u64>();
            ptr::write_volatile(at, addr);
            ptr::write_volatile(at.add(1), rest);
        }
    }

    /// Puts a head into `slot` of the available ring, not yet published.
    #[inline]
    fn put_head(&mut self, slot: usize, head: u16, held: Held) {
        // With IN_ORDER and no chains it is there since the last lap: the line stays in the device's cache.
        let entry = self.avail_u16(4 + 2 * slot);
        if entry.load(Ordering::Relaxed) != head {
            entry.store(head, Ordering::Relaxed);
        }
        self.heads[slot] = head;
        self.held[usize::from(head)] = held;
    }

    /// Puts the head of a chain or table into the available ring and publishes it.
    fn put_one(&mut self, head: u16, held: Held) {
        self.put_head(self.slot(self.next), head, held);
        self.next = self.next.wrapping_add(1);
        self.publish();
    }

    #[inline]
    fn publish(&self) {
        // Release: pairs with the device's Acquire load of avail.idx (§2.7.13.3): heads and descriptors are written.
        self.avail_u16(2).store(self.next, Ordering::Release);
    }

    #[inline]
    fn direction(&self) -> u16 {
        match self.way {
            Way::ToGuest => flag::WRITE,
            Way::FromGuest => 0,
        }
    }

    #[inline]
    pub(super) fn post(&mut self, buffers: &[(u64, u32)]) -> usize {
        let count = buffers.len().min(usize::from(self.free));
        if count == 0 {
            return 0;
        }
        // The indices in registers: kept in memory, a halfword's store in front of a wider load stalls every frame.
        let (table, mask, flags) = (self.table, self.table.size - 1, self.direction());
        let (in_order, mut next, mut desc, mut free) =
            (self.in_order, self.next, self.desc, self.free);
        for &buffer in &buffers[..count] {
            free -= 1;
            let id = if in_order {
                desc & mask
            } else {
                self.ids[usize::from(free)]
            };
            desc = desc.wrapping_add(1);
            Self::put_desc(table, id, buffer, flags, 0);
            let held = Held {
                addr: buffer.0,
                descs: 1,
            };
            self.put_head(usize::from(next & mask), id, held);
            next = next.wrapping_add(1);
        }
        (self.next, self.desc, self.free) = (next, desc, free);
        self.publish();
        count
    }

    /// Writes descriptor `id`, which the device does not have.
    #[inline]
    pub(super) fn keep(&mut self, id: u16, buffer: (u64, u32)) {
        assert!(id < self.table.size, "descriptor {id} in a smaller table");
        Self::put_desc(self.table, id, buffer, self.direction(), 0);
    }

    /// See [`super::DriverRing::post_kept`]: descriptors stay as they are, and so do most entries of the available ring.
    #[inline]
    pub(super) fn post_kept(&mut self, count: usize, buffer: impl Fn(usize) -> (u16, u64, u32)) {
        assert!(count <= usize::from(self.free), "no room for {count}");
        if count == 0 {
            return;
        }
        let mut next = self.next;
        for index in 0..count {
            let entry = self.avail_u16(4 + 2 * self.slot(next));
            let id = buffer(index).0;
            if entry.load(Ordering::Relaxed) != id {
                entry.store(id, Ordering::Relaxed);
            }
            next = next.wrapping_add(1);
        }
        self.next = next;
        self.free -= count as u16;
        self.publish();
    }

    /// See [`super::DriverRing::take_kept`].
    #[inline]
    pub(super) fn take_kept(&mut self, out: &mut [(u16, u32)]) -> usize {
        let count = usize::from(self.waiting()).min(out.len());
        let (whole, size) = (self.in_order && self.way == Way::FromGuest, self.table.size);
        let taken = self.taken;
        for (index, out) in out[..count].iter_mut().enumerate() {
            let slot = self.slot(taken.wrapping_add(index as u16));
            *out = if whole {
                (slot as u16, 0) // in order, and in a ring of kept buffers: entry and descriptor have one number
            } else {
                let (id, len) = self.element(slot);
                if id >= u32::from(size) {
                    self.lied = true;
                    return 0;
                }
                (id as u16, len)
            };
        }
        if self.given_back(count as u16) {
            count
        } else {
            0
        }
    }

    /// See [`super::DriverRing::reclaim_kept`].
    #[inline]
    pub(super) fn reclaim_kept(&mut self) {
        self.given_back(self.waiting());
    }

    /// See [`super::DriverRing::lied`].
    #[inline]
    pub(super) fn lied(&self) -> bool {
        self.lied
    }

    /// False if the device did not have so many.
    #[inline]
    fn given_back(&mut self, count: u16) -> bool {
        if count > self.table.size - self.free {
            self.lied = true;
            return false;
        }
        self.taken = self.taken.wrapping_add(count);
        self.free += count;
        true
    }

    pub(super) fn post_chain(&mut self, pieces: &[(u64, u32)]) -> bool {
        if pieces.len() > usize::from(self.free) {
            return false;
        }
        let ids: Vec<u16> = pieces.iter().map(|_| self.grab()).collect();
        for (index, &piece) in pieces.iter().enumerate() {
            let next = ids.get(index + 1).copied();
            let more = if next.is_some() { flag::NEXT } else { 0 };
            let next = next.unwrap_or_default();
            self.links[usize::from(ids[index])] = next;
            Self::put_desc(self.table, ids[index], piece, self.direction() | more, next);
        }
        self.chains += u32::from(ids.len() > 1);
        let (addr, descs) = (pieces[0].0, ids.len() as u16);
        self.put_one(ids[0], Held { addr, descs });
        true
    }

    pub(super) fn post_indirect(&mut self, table: u64, pieces: &[(u64, u32)]) -> bool {
        if self.free == 0 {
            return false;
        }
        for (index, &(addr, len)) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let flags = self.direction() | if last { 0 } else { flag::NEXT };
            let mut desc = [0; 16];
            desc[..8].copy_from_slice(&addr.to_le_bytes());
            desc[8..12].copy_from_slice(&len.to_le_bytes());
            desc[12..14].copy_from_slice(&flags.to_le_bytes());
            desc[14..].copy_from_slice(&(index as u16 + 1).to_le_bytes());
            self.mem.write(table + 16 * index as u64, &desc);
        }
        let id = self.grab();
        let len = 16 * pieces.len() as u32;
        Self::put_desc(self.table, id, (table, len), flag::INDIRECT, 0);
        let addr = pieces[0].0;
        self.put_one(id, Held { addr, descs: 1 });
        true
    }

    /// Buffers the device has given back and we have not taken.
    #[inline]
    fn waiting(&self) -> u16 {
        // Acquire: pairs with the device's Release store of used.idx (§2.7.14): elements and buffers are written.
        let used = self.used_u16(2).load(Ordering::Acquire);
        used.wrapping_sub(self.taken)
    }

    /// The used element of `slot`: id and length.
    #[inline]
    fn element(&self, slot: usize) -> (u32, u32) {
        // SAFETY: slot < size, and the used ring has size elements of 8 bytes behind 4; it is 4-aligned.
        unsafe {
            let at = self.used.add(4 + 8 * slot).cast::<u32>();
            (ptr::read_volatile(at), ptr::read_volatile(at.add(1)))
        }
    }

    /// Makes a buffer's descriptors free; returns its address.
    #[inline]
    fn release(&mut self, head: u16, free: &mut u16) -> u64 {
        let held = std::mem::take(&mut self.held[usize::from(head)]);
        assert!(held.descs > 0, "device used buffer {head}, not in flight");
        if held.descs > 1 {
            self.release_links(head, held.descs, free);
        }
        if !self.in_order {
            self.ids[usize::from(*free)] = head;
        }
        *free += 1;
        held.addr
    }

    /// Makes the further descriptors of a chain free.
    #[cold]
    fn release_links(&mut self, head: u16, descs: u16, free: &mut u16) {
        self.chains -= 1;
        let mut id = head;
        for _ in 1..descs {
            id = self.links[usize::from(id)];
            if !self.in_order {
                self.ids[usize::from(*free)] = id;
            }
            *free += 1;
        }
    }

    #[inline]
    pub(super) fn take(&mut self, out: &mut [Used]) -> usize {
        let count = usize::from(self.waiting()).min(out.len());
        let (mut taken, mut free) = (self.taken, self.free);
        let whole = self.in_order && self.way == Way::FromGuest;
        for used in &mut out[..count] {
            let slot = self.slot(taken);
            let (id, len) = if whole {
                (self.heads[slot], 0) // the device need not write every element
            } else {
                let (id, len) = self.element(slot);
                (id as u16, len)
            };
            let addr = self.release(id, &mut free);
            taken = taken.wrapping_add(1);
            *used = Used {
                addr,
                len,
                id,
                buffers: 1,
            };
        }
        (self.taken, self.free) = (taken, free);
        count
    }

    #[inline]
    pub(super) fn reclaim(&mut self) -> usize {
        if self.in_order && self.way == Way::FromGuest && self.chains == 0 {
            let count = self.waiting();
            self.taken = self.taken.wrapping_add(count);
            self.free += count;
            assert!(self.free <= self.table.size, "device used too many buffers");
            return usize::from(count);
        }
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
        let since = self.next.wrapping_sub(self.kicked_at);
        self.kicked_at = self.next;
        if since == 0 {
            return false;
        }
        // SeqCst: orders avail.idx before the load of what the device wants; pairs with the device's fence in `arm` (§2.7.10).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.used_u16(4 + 8 * usize::from(self.table.size));
            passed(event.load(Ordering::Relaxed), self.next, since)
        } else {
            self.used_u16(0).load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    pub(super) fn arm(&mut self) -> bool {
        if self.event_idx {
            let event = self.avail_u16(4 + 2 * usize::from(self.table.size));
            event.store(self.taken, Ordering::Relaxed);
        } else {
            self.avail_u16(0).store(0, Ordering::Relaxed);
        }
        // SeqCst: orders the wish before the last look; pairs with the device's fence in `call_wanted` (§2.7.7.1).
        fence(Ordering::SeqCst);
        self.waiting() != 0
    }

    pub(super) fn disarm(&mut self) {
        if self.event_idx {
            // One behind: passed when the index has gone once around.
            let event = self.avail_u16(4 + 2 * usize::from(self.table.size));
            event.store(self.taken.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.avail_u16(0).store(NO_NOTIFY, Ordering::Relaxed);
        }
    }
}
