//! Nanoseconds per lookup and per learnt frame of the forwarding database, with random stations in bursts of 32.
//!
//! `cargo bench -p ringway-bench --bench fdb`. Subtract `keys alone`, which only makes and sums the random keys without a table.
//! `rival` is the other form that was tried: a bucket with its version and three stations of 16 bytes.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ringway::dataplane::eth::Mac;
use ringway::dataplane::fdb::{Fdb, FdbSettings, Hash, Key, Learned};
use ringway::dataplane::port_set::{Domain, PortId};

const BURST: usize = 32;
const STATIONS: [u32; 5] = [64, 1 << 10, 1 << 14, 1 << 17, 1_000_000];
const PORT: PortId = PortId(3);

/// The `n`th station: an address that looks random, without a table that would compete for the cache.
#[inline]
fn key(n: u32) -> Key {
    let mixed = u64::from(n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
    Key::new(Domain(1), Mac::from_bits(mixed & !1))
}

/// Random numbers below `count`, a burst at a time.
struct Picks {
    state: u64,
    count: u64,
}

impl Picks {
    #[inline]
    fn burst(&mut self) -> [Key; BURST] {
        std::array::from_fn(|_| {
            self.state = self
                .state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            key((((self.state >> 32) * self.count) >> 32) as u32)
        })
    }
}

/// Time for `times` calls of `each`, in bursts for which `ahead` was called before.
#[inline]
fn timed<H: Copy>(
    times: u64,
    count: u32,
    seed: u64,
    ahead: impl Fn(Key) -> H,
    each: impl Fn(Key, H) -> u64,
) -> Duration {
    let mut picks = Picks {
        state: seed,
        count: count.into(),
    };
    let mut sum = 0u64;
    let start = Instant::now();
    for _ in 0..times.div_ceil(BURST as u64) {
        let keys = picks.burst();
        let mut hashes = [ahead(keys[0]); BURST];
        for (hash, key) in hashes.iter_mut().zip(&keys) {
            *hash = ahead(*key);
        }
        for (hash, key) in hashes.iter().zip(&keys) {
            sum = sum.wrapping_add(each(*key, *hash));
        }
    }
    black_box(sum);
    start.elapsed()
}

fn filled(count: u32) -> Fdb {
    let capacity = (count as usize).max(65_536);
    let fdb = Fdb::new(FdbSettings {
        capacity,
        ..FdbSettings::default()
    });
    for n in 0..count {
        assert_eq!(
            fdb.learn(key(n), fdb.hash(key(n)), PORT, 1, 0),
            Learned::New
        );
    }
    fdb
}

/// [`timed`] with a table whose cache lines are fetched ahead.
#[inline]
fn prefetched(
    times: u64,
    count: u32,
    seed: u64,
    fdb: &Fdb,
    each: impl Fn(&Fdb, Key, Hash) -> u64,
) -> Duration {
    let ahead = |key| {
        let hash = fdb.hash(key);
        fdb.prefetch(hash);
        hash
    };
    timed(times, count, seed, ahead, |key, hash| each(fdb, key, hash))
}

#[inline]
fn found(fdb: &Fdb, key: Key, hash: Hash) -> u64 {
    fdb.lookup(key, hash)
        .map_or(1 << 40, |station| station.port.0.into())
}

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup");
    for count in STATIONS {
        let fdb = filled(count);
        let mut bench = |name: &str, run: &dyn Fn(u64) -> Duration| {
            group.bench_function(BenchmarkId::new(name, count), |b| b.iter_custom(run));
        };
        bench("keys alone", &|times| {
            timed(times, count, 1, |_| (), |key, ()| key.mac().bits())
        });
        bench("plain", &|times| {
            timed(
                times,
                count,
                1,
                |_| (),
                |key, ()| found(&fdb, key, fdb.hash(key)),
            )
        });
        bench("prefetched", &|times| {
            prefetched(times, count, 1, &fdb, found)
        });
        let rival = rival::Table::filled(count);
        bench("rival plain", &|times| {
            timed(
                times,
                count,
                1,
                |_| (),
                |key, ()| rival.lookup(key, rival.hash(key)),
            )
        });
        bench("rival prefetched", &|times| {
            timed(
                times,
                count,
                1,
                |key| rival.ahead(key),
                |key, hash| rival.lookup(key, hash),
            )
        });
        bench("unknown", &|times| {
            prefetched(times, u32::MAX, 1, &fdb, found)
        });
    }
    group.finish();
}

/// The other core learns all the time: each frame is from one of 1000 stations that move to and fro.
fn lookup_while_learning(c: &mut Criterion) {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let (Some(here), Some(there)) = (cores.last(), cores.first()) else {
        return;
    };
    core_affinity::set_for_current(*here);
    let mut group = c.benchmark_group("lookup while another core learns");
    for count in STATIONS {
        let fdb = filled(count);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                core_affinity::set_for_current(*there);
                for n in 0.. {
                    let key = key((1 << 30) + n % 1000);
                    fdb.learn(key, fdb.hash(key), PortId((n / 1000 % 2) as u16), 1, 0);
                    if done.load(Relaxed) {
                        break;
                    }
                }
            });
            group.bench_function(BenchmarkId::new("prefetched", count), |b| {
                b.iter_custom(|times| prefetched(times, count, 1, &fdb, found));
            });
            done.store(true, Relaxed);
        });
    }
    group.finish();
}

fn learn(c: &mut Criterion) {
    let mut group = c.benchmark_group("learn");
    for count in STATIONS {
        let fdb = filled(count);
        let hear = |fdb: &Fdb, key, hash| fdb.learn(key, hash, PORT, 1, 0) as u64;
        group.bench_function(BenchmarkId::new("known", count), |b| {
            b.iter_custom(|times| prefetched(times, count, 1, &fdb, hear));
        });
        // Each frame carries a source nobody has seen: what a flood costs the worker once the table is full.
        prefetched(u64::from(count) * 4 + 65_536 * 4, u32::MAX, 3, &fdb, hear);
        let mut seed = 5;
        group.bench_function(BenchmarkId::new("flood", count), |b| {
            b.iter_custom(|times| {
                seed += 2;
                prefetched(times, u32::MAX, seed, &fdb, hear)
            });
        });
    }
    group.finish();
}

/// The form that lost: 3 entries of 16 bytes and a version per cache line, compared one after the other.
mod rival {
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*, fence};

    use super::{Key, PORT, key};

    #[derive(Default)]
    #[repr(align(64))]
    struct Bucket {
        version: AtomicU32,
        stamps: [AtomicU32; 3],
        entries: [(AtomicU64, AtomicU64); 3],
    }

    pub(super) struct Table {
        buckets: Box<[Bucket]>,
    }

    impl Table {
        /// As many slots as [`super::Fdb`] takes, rounded up to a power of two of buckets.
        pub(super) fn filled(count: u32) -> Table {
            let buckets = (count.max(65_536) as usize * 8 / 5 / 3).next_power_of_two();
            let table = Table {
                buckets: (0..buckets).map(|_| Bucket::default()).collect(),
            };
            for n in 0..count {
                let spots = table.pair(table.hash(key(n)));
                let free = |b: &Bucket| b.entries.iter().filter(|e| e.0.load(Relaxed) == 0).count();
                let emptier = if free(spots[0]) >= free(spots[1]) {
                    spots[0]
                } else {
                    spots[1]
                };
                if let Some(entry) = emptier.entries.iter().find(|e| e.0.load(Relaxed) == 0) {
                    entry.1.store(PORT.0.into(), Relaxed);
                    entry.0.store(bits(key(n)), Relaxed);
                    emptier.stamps[0].store(1, Relaxed);
                }
            }
            table
        }

        #[inline]
        pub(super) fn hash(&self, key: Key) -> u64 {
            let product = u128::from(bits(key) ^ 0x2545_f491_4f6c_dd1d) * 0xd1b5_4a32_d192_ed03;
            product as u64 ^ (product >> 64) as u64
        }

        #[inline]
        fn pair(&self, hash: u64) -> [&Bucket; 2] {
            let mask = self.buckets.len() - 1;
            [
                &self.buckets[hash as usize & mask],
                &self.buckets[(hash >> 32) as usize & mask],
            ]
        }

        /// Hashes and fetches both buckets.
        #[inline]
        pub(super) fn ahead(&self, key: Key) -> u64 {
            let hash = self.hash(key);
            for bucket in self.pair(hash) {
                super::fetch(bucket);
            }
            hash
        }

        #[inline]
        pub(super) fn lookup(&self, key: Key, hash: u64) -> u64 {
            for bucket in self.pair(hash) {
                loop {
                    let version = bucket.version.load(Acquire);
                    let hit = bucket
                        .entries
                        .iter()
                        .find(|entry| entry.0.load(Relaxed) == bits(key));
                    let value = hit.map(|entry| entry.1.load(Relaxed));
                    fence(Acquire);
                    if version & 1 == 0 && bucket.version.load(Relaxed) == version {
                        match value {
                            Some(value) => return value,
                            None => break,
                        }
                    }
                }
            }
            1 << 40
        }
    }

    #[inline]
    fn bits(key: Key) -> u64 {
        u64::from(key.domain().0) << 48 | key.mac().bits()
    }
}

/// Asks for a cache line.
#[inline]
#[allow(unsafe_code)] // one instruction
fn fetch<T>(line: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 reads nothing and cannot fault.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600)).sample_size(20);
    targets = lookup, lookup_while_learning, learn
}
criterion_main!(benches);
