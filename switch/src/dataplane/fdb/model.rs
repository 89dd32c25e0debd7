//! Loom runs the bucket's code through every order in which a reader and a writer can meet, weak memory included.
//!
//! Part of `cargo test`. [`every_order_in_the_bucket_is_needed`] takes one order after the other out of the source and demands that a
//! model fails. So does, each alone: a slot written without `hide` or cleared without its fence, no `spill` in `push_on`.

use std::cell::Cell;
use std::panic::catch_unwind;

use loom::sync::Arc;
use loom::thread;

use self::bucket::{Bucket, Probe, Record, probe_both};

thread_local! {
    /// The line of `bucket.rs` whose order is weakened; loom runs all threads of a model on the thread of its test.
    static WEAK: Cell<u32> = const { Cell::new(0) };
}

mod atomics {
    //! Loom's atomics, with the orders of one line of the caller left out.
    use std::panic::Location;

    use loom::sync::atomic::{self, Ordering};

    use super::WEAK;

    #[track_caller]
    fn is_weak() -> bool {
        Location::caller().line() == WEAK.get()
    }

    #[track_caller]
    fn order(order: Ordering) -> Ordering {
        if is_weak() { Ordering::Relaxed } else { order }
    }

    #[track_caller]
    pub(super) fn fence(order: Ordering) {
        if !is_weak() {
            atomic::fence(order);
        }
    }

    macro_rules! weakened {
        ($($name:ident: $of:ty),+) => {$(
            #[derive(Default)]
            pub(super) struct $name(atomic::$name);

            #[allow(dead_code)] // not each type has each of them
            impl $name {
                #[track_caller]
                pub(super) fn load(&self, at: Ordering) -> $of {
                    self.0.load(order(at))
                }
                #[track_caller]
                pub(super) fn store(&self, value: $of, at: Ordering) {
                    self.0.store(value, order(at));
                }
                #[track_caller]
                pub(super) fn compare_exchange(&self, old: $of, new: $of, at: Ordering, not: Ordering) -> Result<$of, $of> {
                    self.0.compare_exchange(old, new, order(at), not)
                }
                #[track_caller]
                pub(super) fn fetch_and(&self, value: $of, at: Ordering) -> $of {
                    self.0.fetch_and(value, order(at))
                }
                #[track_caller]
                pub(super) fn fetch_add(&self, value: $of, at: Ordering) -> $of {
                    self.0.fetch_add(value, order(at))
                }
                #[track_caller]
                pub(super) fn fetch_sub(&self, value: $of, at: Ordering) -> $of {
                    self.0.fetch_sub(value, order(at))
                }
            }
        )+};
    }

    weakened!(AtomicU16: u16, AtomicU32: u32, AtomicU64: u64);
}

#[allow(dead_code, clippy::duplicate_mod)] // the same file with other atomics; the table uses more of it
#[path = "bucket.rs"]
mod bucket;

/// A station whose place and key prove each other.
fn record(key: u64, move_number: u32) -> Record {
    Record {
        key,
        station: key as u32 * 100 + move_number,
        stamp: 0,
        is_static: false,
    }
}

fn put(bucket: &Bucket, slot: usize, record: Record) {
    bucket.claim().expect("one writer").put(slot, record);
}

/// Station 1, in `slot`, moves meanwhile.
fn moving(bucket: &Arc<Bucket>, slot: usize) -> thread::JoinHandle<()> {
    let bucket = Arc::clone(bucket);
    thread::spawn(move || {
        bucket
            .claim()
            .expect("one writer")
            .relocate(slot, record(1, 1).station, 0);
    })
}

/// The place of `key`, checked; `Err` if a writer was quicker.
fn place(bucket: &Bucket, key: u64) -> Result<Option<u32>, ()> {
    match bucket.probe(key) {
        Probe::Hit(found) => {
            assert_eq!(
                u64::from(found.station / 100),
                key,
                "the place of another station"
            );
            Ok(Some(found.station % 100))
        }
        Probe::Miss { .. } => Ok(None),
        Probe::Torn => Err(()),
    }
}

fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(model);
}

#[test]
fn a_reader_never_gets_the_place_of_the_station_that_was_or_comes() {
    explore(|| {
        let bucket = Arc::new(Bucket::default());
        put(&bucket, 0, record(1, 0));
        let writer = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || put(&bucket, 0, record(2, 0)))
        };
        let new = place(&bucket, 2);
        let old = place(&bucket, 1);
        assert!(
            !(new == Ok(Some(0)) && old == Ok(Some(0))),
            "both in one slot"
        );
        writer.join().unwrap();
        assert_eq!(
            (place(&bucket, 1), place(&bucket, 2)),
            (Ok(None), Ok(Some(0)))
        );
    });
}

#[test]
fn a_slot_that_is_emptied_filled_and_moved_gives_each_station_its_own_place() {
    explore(|| {
        let bucket = Arc::new(Bucket::default());
        put(&bucket, 3, record(1, 0));
        let writer = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || {
                bucket.claim().expect("one writer").clear(3);
                put(&bucket, 3, record(2, 0));
                bucket
                    .claim()
                    .expect("one writer")
                    .relocate(3, record(2, 1).station, 0);
            })
        };
        let _ = place(&bucket, 0); // the key of an empty slot
        let _ = place(&bucket, 1);
        writer.join().unwrap();
        assert_eq!(
            (place(&bucket, 1), place(&bucket, 2)),
            (Ok(None), Ok(Some(1)))
        );
    });
}

#[test]
fn a_station_that_moves_is_always_there() {
    explore(|| {
        let bucket = Arc::new(Bucket::default());
        put(&bucket, 1, record(1, 0));
        let writer = moving(&bucket, 1);
        let first = place(&bucket, 1);
        let second = place(&bucket, 1);
        assert!(first != Ok(None) && second != Ok(None));
        assert!(
            !(first == Ok(Some(1)) && second == Ok(Some(0))),
            "back to where it was"
        );
        writer.join().unwrap();
        assert_eq!(place(&bucket, 1), Ok(Some(1)));
    });
}

#[test]
fn a_station_that_is_pushed_to_its_second_bucket_is_met_in_one_of_the_two() {
    explore(|| {
        let pair = Arc::new([Bucket::default(), Bucket::default()]);
        put(&pair[0], 0, record(1, 0));
        let writer = {
            let pair = Arc::clone(&pair);
            thread::spawn(move || {
                let mut home = pair[0].claim().expect("one writer");
                home.push_on(0, &pair[1])
                    .expect("the second bucket is empty");
                home.put(0, record(2, 0));
            })
        };
        let _ = place(&pair[1], 3); // Loom tells points in time apart by the operations around them.
        match probe_both(&pair[0], &pair[1], 1) {
            (_, Probe::Hit(found)) => assert_eq!(found.station, record(1, 0).station),
            (_, Probe::Miss { .. }) => panic!("met nowhere"),
            (_, Probe::Torn) => {}
        }
        writer.join().unwrap();
        assert!(matches!(
            probe_both(&pair[0], &pair[1], 1),
            (_, Probe::Hit(..))
        ));
    });
}

#[test]
fn what_was_found_under_a_head_that_is_still_the_same_is_still_true() {
    explore(|| {
        let bucket = Arc::new(Bucket::default());
        put(&bucket, 1, record(1, 0));
        let writer = moving(&bucket, 1);
        let head = bucket.head();
        let found = place(&bucket, 1);
        writer.join().unwrap();
        if head == bucket.head() && found != Err(()) {
            assert_eq!(found, Ok(Some(1)), "the station has moved");
        }
    });
}

#[test]
fn a_station_placed_by_one_writer_and_moved_by_another_does_not_lend_its_place_to_the_one_before() {
    explore(|| {
        let bucket = Arc::new(Bucket::default());
        put(&bucket, 0, record(1, 0));
        let writers = [
            |bucket: &Bucket| bucket.claim().map(|mut claim| claim.put(0, record(2, 0))),
            |bucket: &Bucket| {
                let mut claim = bucket.claim()?;
                let (slot, _) = claim.find(2)?;
                claim.relocate(slot, record(2, 1).station, 0);
                Some(())
            },
        ];
        let writers = writers.map(|write| {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || write(&bucket))
        });
        let _ = place(&bucket, 1);
        for writer in writers {
            writer.join().unwrap();
        }
    });
}

#[test]
fn two_writers_leave_what_one_of_them_wrote_and_all_that_both_counted() {
    explore(|| {
        let bucket = Arc::new(Bucket::default());
        let writers = [1, 2].map(|key| {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || {
                let Some(mut claim) = bucket.claim() else {
                    return false;
                };
                for record in claim.records().into_iter().flatten() {
                    assert_eq!(
                        u64::from(record.station / 100),
                        record.key,
                        "half of what the other wrote"
                    );
                }
                claim.spill();
                let slot = claim.free().expect("four slots");
                claim.put(slot, record(key, 0));
                true
            })
        });
        let wrote = writers.map(|writer| writer.join().unwrap());
        for (key, wrote) in [1, 2].into_iter().zip(wrote) {
            assert_eq!(place(&bucket, key), Ok(wrote.then_some(0)));
        }
        let claim = bucket.claim().expect("all claims are given back");
        assert_eq!(
            usize::from(claim.spilled()),
            wrote.into_iter().filter(|wrote| *wrote).count()
        );
    });
}

/// Lines of the source that name an order.
fn orders() -> Vec<(u32, &'static str)> {
    let lines = include_str!("bucket.rs").lines().zip(1u32..);
    let code = lines.map(|(line, number)| (number, line.split("//").next().unwrap_or("").trim()));
    let named = |line: &str| line.contains("Acquire") || line.contains("Release");
    code.filter(|(_, line)| named(line) && !line.starts_with("use "))
        .collect()
}

#[test]
fn every_order_in_the_bucket_is_needed() {
    const MODELS: [fn(); 6] = [
        a_reader_never_gets_the_place_of_the_station_that_was_or_comes,
        a_station_that_moves_is_always_there,
        a_slot_that_is_emptied_filled_and_moved_gives_each_station_its_own_place,
        two_writers_leave_what_one_of_them_wrote_and_all_that_both_counted,
        a_station_that_is_pushed_to_its_second_bucket_is_met_in_one_of_the_two,
        a_station_placed_by_one_writer_and_moved_by_another_does_not_lend_its_place_to_the_one_before,
    ];
    let orders = orders();
    assert!(orders.len() >= 8, "{orders:?}");
    let mut unneeded = Vec::new();
    for (line, code) in orders {
        WEAK.set(line);
        let caught = MODELS.iter().position(|model| catch_unwind(model).is_err());
        WEAK.set(0);
        println!("{line}: {code}: caught by model {caught:?}");
        if caught.is_none() {
            unneeded.push((line, code));
        }
    }
    assert!(unneeded.is_empty(), "no model fails without {unneeded:?}");
}
