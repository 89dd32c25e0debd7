//! One cache line of the forwarding database: four stations that are read without locks.
//!
//! A reader takes the head, looks, and takes the head again: equal heads mean that no slot that was valid has changed
//! meanwhile. A writer claims the bucket by a bit of the head, and takes the valid bit from a slot before it writes there:
//! a reader therefore needs nobody's permission and waits for nobody, and a writer that is descheduled in the middle
//! hides one slot, not four.
//!
//! `model.rs` has loom try all orders in which two threads can meet here.

use std::hint::select_unpredictable;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::atomics::{AtomicU16, AtomicU32, AtomicU64, fence};

/// Stations of a bucket: what a cache line holds next to its head.
pub(super) const SLOTS: usize = 4;

// The head, from the lowest bit: valid slots, static slots, claimed, how many stations live away from here, version.
const VALID: u64 = 1;
const STATIC: u64 = 1 << 4;
const CLAIMED: u64 = 1 << 8;
const SPILLED: u64 = 1 << 16;
const VERSION: u64 = 1 << 32;

/// Times a writer has claimed the bucket (modulo 2^32), which slots hold stations, who is spilled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Head(u64);

impl Head {
    #[inline]
    fn is_valid(self, slot: usize) -> bool {
        self.0 & (VALID << slot) != 0
    }

    #[inline]
    fn is_static(self, slot: usize) -> bool {
        self.0 & (STATIC << slot) != 0
    }

    /// Stations that have this bucket as their home and live in their second one.
    #[inline]
    fn spilled(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// A station as a slot holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Record {
    /// Domain and MAC.
    pub(super) key: u64,
    /// Generation << 16 | port: one word, so that nobody ever sees the port of one owner with the generation of another.
    pub(super) station: u32,
    /// Low half of the coarse clock when the station was last heard.
    pub(super) stamp: u16,
    /// Set by the operator: neither moved nor aged nor evicted.
    pub(super) is_static: bool,
}

impl Record {
    pub(super) fn port(&self) -> u16 {
        self.station as u16
    }
}

/// A station where it was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Seen {
    /// Its slot.
    pub(super) slot: usize,
    /// See [`Record`].
    pub(super) station: u32,
    /// See [`Record`].
    pub(super) is_static: bool,
}

/// What a look into a bucket gave.
pub(super) enum Probe {
    /// Here it is.
    Hit(Seen),
    /// Not here, and in its second bucket only if `spilled`.
    Miss {
        /// The second bucket must be asked.
        spilled: bool,
    },
    /// A writer was quicker: look again.
    Torn,
}

/// Looks for `key` in its home and, if need be, in its second bucket.
pub(super) fn probe_both<'a>(home: &'a Bucket, away: &'a Bucket, key: u64) -> (&'a Bucket, Probe) {
    match home.probe(key) {
        Probe::Miss { spilled: true } => (away, away.probe(key)),
        found => (home, found),
    }
}

/// Four stations, a cache line.
///
/// Threads: `probe` and `touch` by anybody at any time; all else through a [`Claim`], one at a time.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Bucket {
    head: AtomicU64,
    stamps: [AtomicU16; SLOTS],
    stations: [AtomicU32; SLOTS],
    keys: [AtomicU64; SLOTS],
}

impl Bucket {
    /// Looks for `key`.
    #[inline]
    pub(super) fn probe(&self, key: u64) -> Probe {
        // Acquire: pairs with the Release of `Claim::drop`: what we read below is at least as new as this head.
        let head = Head(self.head.load(Acquire));
        let slot = self.slot_of(key);
        let hit = self.keys[slot % SLOTS].load(Relaxed) == key && head.is_valid(slot);
        let station = self.stations[slot % SLOTS].load(Relaxed);
        // Acquire: pairs with the Release fences of `Claim`: if one of the loads above saw a writer's store, the next load sees the
        // head that this writer had left before it.
        fence(Acquire);
        if self.head.load(Relaxed) != head.0 {
            Probe::Torn
        } else if hit {
            Probe::Hit(Seen {
                slot,
                station,
                is_static: head.is_static(slot),
            })
        } else {
            Probe::Miss {
                spilled: head.spilled() > 0,
            }
        }
    }

    /// What every writer changes, before and after: a `probe` after this finds the same as long as this is the same. (The version
    /// comes around after 2^32 claims: no such answer may be kept for longer than seconds.)
    #[inline]
    pub(super) fn head(&self) -> Head {
        // Relaxed: the `probe` after it acquires this head or a newer one. Who compares it later acts on nothing else that is here.
        Head(self.head.load(Relaxed))
    }

    /// The slot where `key` is if it is here at all. Without a branch: which slot it is nobody can predict, and a wrong guess
    /// costs more than three comparisons.
    #[inline]
    fn slot_of(&self, key: u64) -> usize {
        let mut slot = 0;
        for other in 1..SLOTS {
            let here = self.keys[other].load(Relaxed) == key;
            slot = select_unpredictable(here, other, slot);
        }
        slot
    }

    /// When the station in `slot` was heard, if nobody else took the slot since `probe`.
    #[inline]
    pub(super) fn stamp(&self, slot: usize) -> u16 {
        self.stamps[slot % SLOTS].load(Relaxed)
    }

    /// Notes when the station in `slot` was heard. Somebody else may have taken the slot since `probe`: it then looks
    /// fresher than it is, for one ageing time.
    #[inline]
    pub(super) fn touch(&self, slot: usize, stamp: u16) {
        self.stamps[slot % SLOTS].store(stamp, Relaxed);
    }

    /// Takes the right to write here, if nobody else has it.
    pub(super) fn claim(&self) -> Option<Claim<'_>> {
        let head = self.head.load(Relaxed);
        if head & CLAIMED != 0 {
            return None;
        }
        // Acquire: pairs with the Release of the last `Claim::drop`: we write on what that writer left.
        self.head
            .compare_exchange(head, head | CLAIMED, Acquire, Relaxed)
            .ok()?;
        Some(Claim {
            bucket: self,
            shown: head & SLOT_BITS,
            wanted: head & SLOT_BITS,
        })
    }

    /// All that is here; may be torn: to be checked under a claim or by `probe`.
    pub(super) fn glance(&self) -> [Option<Record>; SLOTS] {
        let head = Head(self.head.load(Relaxed)); // Relaxed: no more than a hint.
        let held = |slot| self.record(slot, head.is_static(slot));
        std::array::from_fn(|slot| head.is_valid(slot).then(|| held(slot)))
    }

    /// The opposite of [`Claim::spill`], after the station is gone; by anybody.
    pub(super) fn unspill(&self) {
        self.head.fetch_sub(SPILLED, Relaxed); // Relaxed: a reader that sees it late asks one bucket too many.
    }

    fn record(&self, slot: usize, is_static: bool) -> Record {
        Record {
            key: self.keys[slot % SLOTS].load(Relaxed),
            station: self.stations[slot % SLOTS].load(Relaxed),
            stamp: self.stamps[slot % SLOTS].load(Relaxed),
            is_static,
        }
    }
}

const SLOT_BITS: u64 = 0xf * (VALID | STATIC);

/// The right to write to a bucket, given back on drop.
pub(super) struct Claim<'a> {
    bucket: &'a Bucket,
    /// Valid and static slots in the head now.
    shown: u64,
    /// The same when the claim ends.
    wanted: u64,
}

impl Claim<'_> {
    /// Where `key` is.
    pub(super) fn find(&self, key: u64) -> Option<(usize, Record)> {
        (0..SLOTS)
            .find_map(|slot| Some((slot, self.record(slot).filter(|record| record.key == key)?)))
    }

    /// True if this is the claim on `bucket`.
    pub(super) fn is_of(&self, bucket: &Bucket) -> bool {
        std::ptr::eq(self.bucket, bucket)
    }

    /// What is in `slot`.
    pub(super) fn record(&self, slot: usize) -> Option<Record> {
        let slots = Head(self.wanted);
        slots
            .is_valid(slot)
            .then(|| self.bucket.record(slot, slots.is_static(slot)))
    }

    /// All that is here.
    pub(super) fn records(&self) -> [Option<Record>; SLOTS] {
        std::array::from_fn(|slot| self.record(slot))
    }

    /// A slot without a station.
    pub(super) fn free(&self) -> Option<usize> {
        (0..SLOTS).find(|&slot| !Head(self.wanted).is_valid(slot))
    }

    /// Stations at home here that live in their second bucket.
    pub(super) fn spilled(&self) -> u16 {
        Head(self.bucket.head.load(Relaxed)).spilled()
    }

    /// False if the count of spilled stations is at its end: only MACs chosen with the hash key in hand bring it there.
    pub(super) fn can_spill(&self) -> bool {
        self.spilled() < u16::MAX
    }

    /// Counts a station that has its home here and goes to its second bucket; before it is written there, for whoever removes it
    /// there counts down.
    pub(super) fn spill(&self) {
        // Relaxed: readers get it with the head they take anyway, our next Release covers it.
        self.bucket.head.fetch_add(SPILLED, Relaxed);
    }

    /// Copies the station in `slot`, at home here, to its second bucket, if there is a place. It stays visible here until its slot is
    /// written over. Only in this direction: a reader asks home first, so that it meets the station in one of the two.
    pub(super) fn push_on(&self, slot: usize, second: &Bucket) -> Option<()> {
        let record = self.record(slot)?;
        let mut second = second.claim()?;
        let free = second.free()?;
        self.spill();
        second.put(free, record);
        Some(())
    }

    /// Writes a station over whatever is in `slot`.
    pub(super) fn put(&mut self, slot: usize, record: Record) {
        self.hide(slot);
        // Release: pairs with the Acquire fence of `probe`: who sees one of these stores sees that the head has changed.
        fence(Release);
        self.bucket.keys[slot % SLOTS].store(record.key, Relaxed);
        self.bucket.stations[slot % SLOTS].store(record.station, Relaxed);
        self.bucket.stamps[slot % SLOTS].store(record.stamp, Relaxed);
        self.wanted |= VALID << slot | if record.is_static { STATIC << slot } else { 0 };
    }

    /// Takes `slot` from the readers.
    fn hide(&mut self, slot: usize) {
        let bits = (VALID | STATIC) << slot;
        self.wanted &= !bits;
        if self.shown & bits != 0 {
            self.shown &= !bits;
            // Release: pairs with the Acquire of `probe`: who misses a station here that was pushed on finds it in its second bucket.
            self.bucket.head.fetch_and(!bits, Release);
        }
    }

    /// The station in `slot` is now heard elsewhere. It stays visible: readers see the old place or the new one.
    pub(super) fn relocate(&mut self, slot: usize, station: u32, stamp: u16) {
        fence(Release); // Release: as in `put`, for a reader whose head is from before this slot got its present key.
        self.bucket.stations[slot % SLOTS].store(station, Relaxed);
        self.bucket.stamps[slot % SLOTS].store(stamp, Relaxed);
    }

    /// The station in `slot` is static from now on. For a moment readers see its new place without the flag.
    pub(super) fn pin(&mut self, slot: usize) {
        self.wanted |= STATIC << slot;
    }

    /// Forgets the station in `slot`, its key too: `slot_of` must not find an empty slot first.
    pub(super) fn clear(&mut self, slot: usize) {
        self.hide(slot);
        fence(Release); // Release: as in `put`.
        self.bucket.keys[slot % SLOTS].store(0, Relaxed);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let slots = self.wanted.wrapping_sub(self.shown);
        // An addition, because others count spilled stations in the same word. Release: pairs with the Acquire of `probe` and `claim`.
        self.bucket
            .head
            .fetch_add(slots.wrapping_add(VERSION - CLAIMED), Release);
    }
}
