//! Forwarding database: behind which port each station (domain and MAC address) was heard last.
//!
//! One table per switch. Workers look up and learn without locks; control adds static stations, removes, flushes and ages.
//!
//! **Form.** A station may live in one of two buckets, chosen by a hash that is keyed anew at each start; a bucket is a cache
//! line with four stations ([`bucket`]). It goes home (into its first bucket) if it can: the second is asked only if the first
//! says that some station of its own lives elsewhere. A station that finds both full pushes one neighbour into that one's
//! second bucket. Every search ends after two buckets, every learning after 18, whatever the MACs are.
//!
//! **Who makes place for whom**, argued from the attack "one port sends 10^7 random source MACs per second":
//! a station is never evicted if it is static, or if its port has no more stations than its reserved share. Of the others
//! in the two buckets go first those that have expired, then the oldest of the port that wants the place (a flood eats
//! itself), then one of a port that has more stations than that port, in the table or in these two buckets. A port below
//! its reserved share rather takes from the rich than from itself, and is let in even if the table is full to its capacity.
//! A port's own stations of this very second stay: a flood that has filled its part of the table is refused by reads alone, and
//! after each refusal the next 15 unseen, so that it costs the worker little more than honest frames.
//!
//! **Bursts from the same station to the same station** are not looked up each time: a [`Path`] says what the table said last, as long
//! as nobody has written to the buckets of the two.
//!
//! **A port number's next owner** never gets frames for stations of the previous one: port and generation are one word in the
//! table, and whoever looks up compares the generation with the port's present one.
//!
//! **Cost**, ns per frame on one Zen 4 core, uniformly random stations, bursts of 32, the making of the keys subtracted
//! (`cargo bench -p ringway-bench --bench fdb`; the rival has three 16-byte entries per line and leaves its loop at the first match):
//!
//! | | 64 | 1 k | 16 k | 128 k | 1 M stations |
//! |---|---|---|---|---|---|
//! | `lookup`, prefetched | 3.0 | 3.0 | 3.0 | 4.4 | 12 |
//! | the same while another core moves and evicts stations | 3.0 | 3.1 | 3.0 | 4.2 | 12 |
//! | `lookup`, not prefetched | 2.7 | 3.3 | 3.7 | 7.0 | 25 |
//! | rival, prefetched | 3.2 | 3.4 | 5.0 | 10.5 | 23 |
//! | rival, not prefetched | 1.7 | 2.2 | 4.8 | 21 | 37 |
//! | `learn`, known and fresh | 3.0 | 3.2 | 3.1 | 4.3 | 12 |
//! | `learn`, flood of new stations into a full table | 15 | 15 | 15 | 15 | 41 |
//!
//! The rival wins as long as nearly every station lies alone in its bucket, so that its branches are guessed right; this form costs
//! the same whatever the stations are.
//!
//! An island of `unsafe`: one prefetch.
#![allow(unsafe_code)]

mod bucket;
mod forget;
mod path;
mod place;
mod station;

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use crossbeam::utils::{Backoff, CachePadded};

use self::bucket::{Bucket, Probe, Record, Seen, probe_both};
pub use self::path::Path;
pub use self::station::{FdbStats, Flush, Key, Learned, StaticError, Station};
use super::port_set::{PORTS_MAX, PortId};

/// The atomics of `bucket`: `model.rs` compiles the same file with loom's.
mod atomics {
    pub(super) use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};
}

const _: () = assert!(size_of::<Bucket>() == 64);

/// Stations a table can be made for.
pub const CAPACITY_MAX: usize = 1_000_000;
/// Ages are exact up to here and stand still beyond: stamps have 16 bits and are compared by sign.
pub const AGE_MAX_SECONDS: u32 = 30_000;
/// Looks at a bucket that is rewritten under our eyes, before the station counts as unknown. Each costs a writer more than us.
const LOOKS_MAX: usize = 64;

/// Where a key is to be found; valid for the table that made it.
#[derive(Clone, Copy, Debug)]
pub struct Hash(u64);

/// The secret that keeps guests from choosing MACs that collide.
#[derive(Clone, Copy)]
pub struct HashKey {
    mask: u64,
    factor: u64,
}

impl HashKey {
    /// A new one: the standard library's SipHash under keys it got from the kernel.
    pub fn random() -> HashKey {
        HashKey::from_words(
            RandomState::new().hash_one(0),
            RandomState::new().hash_one(1),
        )
    }

    /// A known one, for tests that must be repeatable.
    pub fn from_words(mask: u64, factor: u64) -> HashKey {
        HashKey {
            mask,
            factor: factor | 1,
        }
    }
}

/// What a table is made for.
#[derive(Clone)]
pub struct FdbSettings {
    /// Stations it holds; at most [`CAPACITY_MAX`].
    pub capacity: usize,
    /// Stations of each port that no other port can drive out.
    pub reserved_per_port: u32,
    /// Ports have numbers below this.
    pub ports_max: usize,
    /// See [`HashKey`].
    pub key: HashKey,
}

impl Default for FdbSettings {
    fn default() -> FdbSettings {
        FdbSettings {
            capacity: 65_536,
            reserved_per_port: 64,
            ports_max: PORTS_MAX,
            key: HashKey::random(),
        }
    }
}

/// The table.
///
/// Threads: all may call all. `hash`, `prefetch`, `lookup` and `learn` are for workers: they neither wait nor spin longer than
/// their bounds. The rest is for control: it waits for workers that are learning in the same bucket.
pub struct Fdb {
    buckets: Box<[Bucket]>,
    key: HashKey,
    capacity: usize,
    reserved_per_port: AtomicU32,
    shares: Box<[Share]>,
    /// The last ageing time asked for; 0 = never.
    max_age: AtomicU32,
    load: CachePadded<Load>,
}

/// A port's part of the table.
#[derive(Default)]
struct Share {
    /// Stations learnt there.
    stations: AtomicU32,
    /// New stations that are refused unseen.
    unseen: AtomicU32,
}

/// What changes when stations come and go.
#[derive(Default)]
struct Load {
    len: AtomicUsize,
    hand: AtomicUsize,
    pushed: AtomicUsize,
    learned: AtomicU64,
    moved: AtomicU64,
    evicted: AtomicU64,
    refused: AtomicU64,
    aged: AtomicU64,
    fixed: AtomicU64,
}

// Counters order nothing: Relaxed.
fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// Seconds since `stamp`; 0 if it seems to lie ahead, for workers see the clock move at different moments.
fn age_of(stamp: u16, now: u32) -> u16 {
    ((now as u16).wrapping_sub(stamp) as i16).max(0) as u16
}

impl Fdb {
    /// An empty table with all the memory it will ever need: at least 1.6 slots per station, for the first station that
    /// finds no place comes at 69 % of the slots; 2 MiB for 65,536 stations, 32 MiB for 1,000,000.
    pub fn new(settings: FdbSettings) -> Fdb {
        let buckets = (settings.capacity * 2 / 5).next_power_of_two();
        Fdb::with_buckets(settings, buckets.max(64))
    }

    fn with_buckets(settings: FdbSettings, buckets: usize) -> Fdb {
        assert!(
            (1..=CAPACITY_MAX).contains(&settings.capacity),
            "the configuration is checked before"
        );
        assert!(settings.ports_max <= 1 << 16 && buckets.is_power_of_two() && buckets >= 2);
        Fdb {
            buckets: (0..buckets).map(|_| Bucket::default()).collect(),
            key: settings.key,
            capacity: settings.capacity,
            reserved_per_port: settings.reserved_per_port.into(),
            shares: (0..settings.ports_max).map(|_| Share::default()).collect(),
            max_age: AtomicU32::new(0),
            load: CachePadded::default(),
        }
    }

    /// One multiplication, folded.
    #[inline]
    pub fn hash(&self, key: Key) -> Hash {
        let product = u128::from(key.0 ^ self.key.mask) * u128::from(self.key.factor);
        Hash(product as u64 ^ (product >> 64) as u64)
    }

    /// Starts to fetch what `lookup` and `learn` will need.
    #[inline]
    pub fn prefetch(&self, hash: Hash) {
        prefetch(self.bucket(self.home(hash)));
    }

    /// Where the station is, if known.
    #[inline]
    pub fn lookup(&self, key: Key, hash: Hash) -> Option<Station> {
        match self.bucket(self.home(hash)).probe(key.0) {
            Probe::Hit(seen) => Some(station(seen)),
            Probe::Miss { spilled: false } => None,
            _ => self.look_again(key, hash).map(|(_, seen)| station(seen)),
        }
    }

    /// A frame came from this station. Costs only reads if that is no news.
    #[inline]
    pub fn learn(&self, key: Key, hash: Hash, port: PortId, generation: u16, now: u32) -> Learned {
        let home = self.bucket(self.home(hash));
        let place = place_word(port, generation);
        match home.probe(key.0) {
            Probe::Hit(seen) if seen.station == place => refresh(home, seen.slot, now),
            _ => self.learn_news(key, hash, place, now),
        }
    }

    /// The same if it is known there, else nothing and false.
    #[inline]
    pub fn heard_again(
        &self,
        key: Key,
        hash: Hash,
        port: PortId,
        generation: u16,
        now: u32,
    ) -> bool {
        let home = self.bucket(self.home(hash));
        let place = place_word(port, generation);
        match home.probe(key.0) {
            Probe::Hit(seen) if seen.station == place => {
                refresh(home, seen.slot, now);
                true
            }
            _ => false,
        }
    }

    /// Stations learnt from a port.
    pub fn stations_of(&self, port: PortId) -> u32 {
        let share = self.shares.get(usize::from(port.0));
        share.map_or(0, |share| share.stations.load(Relaxed))
    }

    /// Adds a static station, or makes a known one static. A port's static stations go with it ([`Flush::Gone`]).
    pub fn add_static(&self, key: Key, port: PortId, generation: u16) -> Result<(), StaticError> {
        if key.mac().is_zero() || key.mac().is_multicast() {
            return Err(StaticError::NotAStation);
        }
        if usize::from(port.0) >= self.shares.len() {
            return Err(StaticError::NoSuchPort);
        }
        let station = place_word(port, generation);
        let new = Record {
            key: key.0,
            station,
            stamp: 0,
            is_static: true,
        };
        let backoff = Backoff::new();
        loop {
            match self.settle(new, 0) {
                Learned::Busy => backoff.snooze(),
                Learned::Full => return Err(StaticError::Full),
                _ => return Ok(()),
            }
        }
    }

    /// Shows every station with the seconds since it was heard (0 for static ones). What comes, goes or moves meanwhile
    /// may be missing or appear twice.
    pub fn for_each(&self, now: u32, mut show: impl FnMut(Key, Station, u32)) {
        for bucket in &self.buckets {
            for record in bucket.glance().into_iter().flatten() {
                if let Probe::Hit(seen) = bucket.probe(record.key) {
                    let age = if seen.is_static {
                        0
                    } else {
                        age_of(record.stamp, now)
                    };
                    show(Key(record.key), station(seen), age.into());
                }
            }
        }
    }

    /// Stations it was made for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Changes how many stations of each port no other port can drive out.
    pub fn set_reserved(&self, stations_per_port: u32) {
        self.reserved_per_port.store(stations_per_port, Relaxed);
    }

    /// Stations in the table.
    pub fn len(&self) -> usize {
        self.load.len.load(Relaxed)
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What has happened so far.
    pub fn stats(&self) -> FdbStats {
        let load = &self.load;
        FdbStats {
            learned: load.learned.load(Relaxed),
            moved: load.moved.load(Relaxed),
            evicted: load.evicted.load(Relaxed),
            refused: load.refused.load(Relaxed),
            aged: load.aged.load(Relaxed),
            fixed: load.fixed.load(Relaxed),
        }
    }

    /// The bucket of this number; numbers beyond the table begin again.
    #[inline]
    fn bucket(&self, number: usize) -> &Bucket {
        // SAFETY: `new` asserted that the number of buckets is a power of two: what this mask leaves is below it.
        unsafe {
            self.buckets
                .get_unchecked(number & (self.buckets.len() - 1))
        }
    }

    /// A station's first bucket.
    #[inline]
    fn home(&self, hash: Hash) -> usize {
        hash.0 as usize & (self.buckets.len() - 1)
    }

    /// Its second one, never the same.
    fn away(&self, hash: Hash) -> usize {
        let away = (hash.0 >> 32) as usize & (self.buckets.len() - 1);
        if away == self.home(hash) {
            away ^ 1
        } else {
            away
        }
    }

    #[cold]
    #[inline(never)]
    fn look_again(&self, key: Key, hash: Hash) -> Option<(&Bucket, Seen)> {
        let (home, away) = (self.bucket(self.home(hash)), self.bucket(self.away(hash)));
        for _ in 0..LOOKS_MAX {
            match probe_both(home, away, key.0) {
                (bucket, Probe::Hit(seen)) => return Some((bucket, seen)),
                (_, Probe::Miss { .. }) => return None,
                (_, Probe::Torn) => std::hint::spin_loop(),
            }
        }
        None
    }

    #[cold]
    #[inline(never)]
    fn learn_news(&self, key: Key, hash: Hash, station: u32, now: u32) -> Learned {
        let seen = self.look_again(key, hash);
        if let Some((bucket, seen)) = seen
            && seen.station == station
        {
            return refresh(bucket, seen.slot, now);
        }
        let new = Record {
            key: key.0,
            station,
            stamp: now as u16,
            is_static: false,
        };
        let known_port = usize::from(new.port()) < self.shares.len();
        debug_assert!(known_port, "control hands out port numbers below ports_max");
        if !known_port || key.mac().is_zero() || key.mac().is_multicast() {
            return Learned::Full;
        }
        // A station that moves needs no place.
        if seen.is_none() && self.is_hopeless(&new, now) {
            return self.refuse();
        }
        self.settle(new, now)
    }
}

/// The station is known: one store at most, and only when the clock has moved.
#[inline]
fn refresh(bucket: &Bucket, slot: usize, now: u32) -> Learned {
    if age_of(bucket.stamp(slot), now) == 0 {
        return Learned::Known;
    }
    bucket.touch(slot, now as u16);
    Learned::Refreshed
}

/// Where a station is, as a bucket holds it; see [`station`].
#[inline]
fn place_word(port: PortId, generation: u16) -> u32 {
    u32::from(generation) << 16 | u32::from(port.0)
}

#[inline]
fn station(seen: Seen) -> Station {
    let (port, generation) = (seen.station as u16, (seen.station >> 16) as u16);
    Station {
        port: PortId(port),
        generation,
        is_static: seen.is_static,
    }
}

/// Asks for the cache line of `bucket`.
#[inline]
fn prefetch(bucket: &Bucket) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 needs SSE, which every x86-64 has; it reads nothing and cannot fault.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(bucket).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bucket;
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
