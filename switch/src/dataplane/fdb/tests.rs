use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use proptest::prelude::*;

use super::bucket::SLOTS;
use super::*;
use crate::dataplane::eth::Mac;
use crate::dataplane::port_set::Domain;

const BLUE: PortId = PortId(0);
const RED: PortId = PortId(1);

fn settings(capacity: usize) -> FdbSettings {
    FdbSettings {
        capacity,
        reserved_per_port: 8,
        ports_max: 16,
        key: HashKey::from_words(0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03),
    }
}

/// A station of its own for each `n`, unicast, spread like random addresses.
fn key(n: u64) -> Key {
    let mixed = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8;
    Key::new(Domain(1), Mac::from_bits(mixed & !1 | 2))
}

impl Fdb {
    fn hear(&self, key: Key, port: PortId, now: u32) -> Learned {
        self.learn(key, self.hash(key), port, 1, now)
    }

    fn find(&self, key: Key) -> Option<PortId> {
        self.lookup(key, self.hash(key)).map(|station| station.port)
    }

    /// Every count agrees with what is in the buckets, and no station is there twice.
    fn assert_consistent(&self) {
        let mut shares = vec![0; self.shares.len()];
        let mut spilled = vec![0; self.buckets.len()];
        let mut fixed = 0;
        let mut seen = HashSet::new();
        for (index, bucket) in self.buckets.iter().enumerate() {
            for record in bucket
                .claim()
                .expect("nobody is learning")
                .records()
                .into_iter()
                .flatten()
            {
                assert!(seen.insert(record.key), "{:?} twice", Key(record.key));
                shares[usize::from(record.port())] += u32::from(!record.is_static);
                fixed += u64::from(record.is_static);
                let home = self.home(self.hash(Key(record.key)));
                spilled[home] += u16::from(home != index);
            }
        }
        assert_eq!((self.len(), self.stats().fixed), (seen.len(), fixed));
        assert_eq!(
            shares,
            self.shares
                .iter()
                .map(|share| share.stations.load(Relaxed))
                .collect::<Vec<_>>()
        );
        let counted = self
            .buckets
            .iter()
            .map(|bucket| bucket.claim().expect("nobody is learning").spilled());
        assert_eq!(spilled, counted.collect::<Vec<_>>());
    }
}

#[test]
fn a_station_is_found_behind_the_port_it_was_heard_on_and_only_in_its_domain() {
    let fdb = Fdb::new(settings(1000));
    let mac: Mac = "02:00:00:00:00:01".parse().unwrap();
    let (here, there) = (Key::new(Domain(1), mac), Key::new(Domain(2), mac));
    assert_eq!(fdb.find(here), None);
    assert_eq!(fdb.hear(here, BLUE, 0), Learned::New);
    assert_eq!(fdb.find(here), Some(BLUE));
    assert_eq!(fdb.find(there), None);
    assert_eq!(fdb.hear(there, RED, 0), Learned::New);
    assert_eq!((fdb.find(here), fdb.find(there)), (Some(BLUE), Some(RED)));
    assert_eq!((here.domain(), here.mac()), (Domain(1), mac));
}

#[test]
fn a_known_station_is_stamped_once_per_second() {
    let fdb = Fdb::new(settings(1000));
    let heard = [7, 7, 8, 8, 7].map(|now| fdb.hear(key(1), BLUE, now));
    let none_for_a_late_clock = Learned::Known;
    assert_eq!(
        heard,
        [
            Learned::New,
            Learned::Known,
            Learned::Refreshed,
            Learned::Known,
            none_for_a_late_clock
        ]
    );
}

#[test]
fn a_station_that_moves_is_found_behind_its_new_port_and_counted() {
    let fdb = Fdb::new(settings(1000));
    fdb.hear(key(1), BLUE, 0);
    assert_eq!(fdb.hear(key(1), RED, 0), Learned::Moved);
    assert_eq!(fdb.find(key(1)), Some(RED));
    assert_eq!(
        (fdb.len(), fdb.stats().moved, fdb.stats().learned),
        (1, 1, 1)
    );
    fdb.assert_consistent();
}

#[test]
fn a_port_numbers_next_owner_does_not_inherit_stations() {
    let fdb = Fdb::new(settings(1000));
    let hash = fdb.hash(key(1));
    fdb.learn(key(1), hash, BLUE, 1, 0);
    assert_eq!(
        fdb.lookup(key(1), hash).unwrap().generation,
        1,
        "the reader compares it"
    );
    assert_eq!(fdb.learn(key(1), hash, BLUE, 2, 0), Learned::New);
    assert_eq!(fdb.lookup(key(1), hash).unwrap().generation, 2);
    fdb.assert_consistent();
}

#[test]
fn group_addresses_and_zero_are_no_stations() {
    let fdb = Fdb::new(settings(1000));
    for mac in [
        "00:00:00:00:00:00",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
    ] {
        for domain in [Domain(0), Domain(u16::MAX)] {
            let key = Key::new(domain, mac.parse().unwrap());
            assert_eq!(fdb.find(key), None);
            assert_eq!(fdb.hear(key, BLUE, 0), Learned::Full);
            assert_eq!(fdb.add_static(key, BLUE, 1), Err(StaticError::NotAStation));
            assert_eq!(fdb.find(key), None);
        }
    }
    assert_eq!(
        fdb.add_static(key(1), PortId(16), 1),
        Err(StaticError::NoSuchPort)
    );
    assert!(fdb.is_empty());
}

#[test]
fn static_stations_outlast_moves_ages_floods_and_flushes_but_not_their_port() {
    let fdb = Fdb::with_buckets(settings(64), 16);
    fdb.hear(key(1), RED, 0);
    fdb.add_static(key(1), BLUE, 1).unwrap();
    assert_eq!(fdb.hear(key(1), RED, 0), Learned::Static);
    assert_eq!(fdb.hear(key(1), BLUE, 0), Learned::Known);
    for n in 2..10_000 {
        fdb.hear(key(n), RED, 0);
    }
    fdb.age(20_000, 300);
    for flush in [Flush::All, Flush::Port(BLUE), Flush::Domain(Domain(1))] {
        fdb.flush(flush);
    }
    let hash = fdb.hash(key(1));
    assert_eq!(
        fdb.lookup(key(1), hash),
        Some(Station {
            port: BLUE,
            generation: 1,
            is_static: true
        })
    );
    assert_eq!(fdb.flush(Flush::Gone(RED)), 0);
    assert_eq!(fdb.flush(Flush::Gone(BLUE)), 1);
    assert!(fdb.is_empty());
    fdb.assert_consistent();
}

#[test]
fn static_stations_fill_the_table_and_the_next_is_refused() {
    let fdb = Fdb::with_buckets(settings(48), 16);
    for n in 0..1000 {
        fdb.hear(key(n + 1000), RED, 0);
    }
    let placed = (0..100)
        .take_while(|&n| fdb.add_static(key(n), BLUE, 1).is_ok())
        .count();
    assert!((24..=48).contains(&placed), "{placed}");
    assert!((0..placed as u64).all(|n| fdb.find(key(n)) == Some(BLUE)));
    fdb.assert_consistent();
}

#[test]
fn as_many_random_addresses_as_the_capacity_fit() {
    // 655,360 is the fullest a table can be: 62.5 % of its slots.
    for capacity in [1000, 65_536, 655_360, 1_000_000] {
        let fdb = Fdb::new(settings(capacity));
        (0..capacity as u64).for_each(|n| _ = fdb.hear(key(n), BLUE, 0));
        let found = (0..capacity as u64)
            .filter(|&n| fdb.find(key(n)).is_some())
            .count();
        assert!(
            found >= capacity - capacity / 100_000,
            "{found} of {capacity}"
        );
        fdb.assert_consistent();
    }
}

#[test]
fn two_thirds_of_the_slots_are_filled_before_a_station_finds_no_place() {
    let (buckets, slots) = (1 << 14, SLOTS << 14);
    let fdb = Fdb::with_buckets(
        FdbSettings {
            reserved_per_port: u32::MAX,
            ..settings(slots)
        },
        buckets,
    );
    let ports = |n: u64| PortId((n % 16) as u16);
    let placed = (0..)
        .take_while(|&n| fdb.hear(key(n), ports(n), 0) == Learned::New && fdb.stats().evicted == 0)
        .count();
    assert!(placed > slots * 2 / 3, "{placed} of {slots}");
    fdb.assert_consistent();
}

#[test]
fn a_flood_of_addresses_drives_out_only_its_own() {
    let fdb = Fdb::new(FdbSettings {
        reserved_per_port: 64,
        ..settings(4096)
    });
    let victims: Vec<_> = (0..15 * 64u64)
        .map(|n| (key(n), PortId((n % 15 + 1) as u16)))
        .collect();
    for &(key, port) in &victims {
        assert_eq!(fdb.hear(key, port, 0), Learned::New);
    }
    for n in 0..300_000 {
        fdb.hear(key(n + 1_000_000), BLUE, n as u32 / 100_000);
    }
    for &(key, port) in &victims {
        assert_eq!(fdb.find(key), Some(port));
    }
    assert_eq!(fdb.len(), 4096);
    fdb.assert_consistent();
}

#[test]
fn a_port_below_its_reserved_share_is_let_into_a_table_full_of_somebody_elses() {
    let fdb = Fdb::new(FdbSettings {
        reserved_per_port: 64,
        ..settings(4096)
    });
    for n in 0..100_000 {
        fdb.hear(key(n + 1_000_000), BLUE, 0);
    }
    for n in 0..15 * 64 {
        assert_eq!(
            fdb.hear(key(n), PortId((n % 15 + 1) as u16), 0),
            Learned::New
        );
        fdb.hear(key(n + 2_000_000), BLUE, 0);
    }
    assert!((0..15 * 64).all(|n| fdb.find(key(n)).is_some()));
    assert!(fdb.len() <= 4096 + 64, "{}", fdb.len());
    fdb.assert_consistent();
}

#[test]
fn a_station_can_move_to_a_port_that_has_flooded_the_table() {
    let fdb = Fdb::new(settings(4096));
    fdb.hear(key(1), RED, 0);
    for n in 0..100_000 {
        fdb.hear(key(n + 1_000_000), BLUE, 0);
    }
    assert_eq!(
        fdb.hear(key(2), BLUE, 0),
        Learned::Full,
        "the table is full"
    );
    assert_eq!(fdb.hear(key(1), BLUE, 0), Learned::Moved);
    assert_eq!(fdb.find(key(1)), Some(BLUE));
}

#[test]
fn two_floods_share_the_table() {
    let fdb = Fdb::new(settings(4096));
    for n in 0..10_000 {
        fdb.hear(key(n), BLUE, 0);
    }
    for n in 0..100_000 {
        fdb.hear(key(n + 1_000_000), RED, 0);
        fdb.hear(key(n + 2_000_000), BLUE, 0);
    }
    let share = fdb.shares[usize::from(RED.0)].stations.load(Relaxed);
    assert!((1200..=2896).contains(&share), "{share} of 4096");
}

#[test]
fn expired_stations_make_place_first_even_reserved_ones() {
    let fdb = Fdb::with_buckets(settings(8), 2);
    for n in 0..4 {
        fdb.hear(key(n), RED, 0);
        fdb.hear(key(n + 10), BLUE, 250);
    }
    fdb.age(299, 300);
    for n in 20..24 {
        assert_eq!(fdb.hear(key(n), BLUE, 300), Learned::New);
    }
    assert!(
        (10..14)
            .chain(20..24)
            .all(|n| fdb.find(key(n)) == Some(BLUE))
    );
    fdb.assert_consistent();
}

#[test]
fn stations_age_across_the_wrap_of_the_clock() {
    for start in [0, 65_400, u32::MAX - 100] {
        let fdb = Fdb::new(settings(1000));
        let at = |seconds: u32| start.wrapping_add(seconds);
        fdb.hear(key(1), BLUE, at(0));
        fdb.hear(key(2), BLUE, at(0));
        fdb.hear(key(2), BLUE, at(200));
        assert_eq!(fdb.age(at(299), 300), 0);
        assert_eq!(fdb.age(at(300), 300), 1);
        assert_eq!((fdb.find(key(1)), fdb.find(key(2))), (None, Some(BLUE)));
        assert_eq!(fdb.age(at(500), 300), 1);
        assert_eq!(fdb.stats().aged, 2);
    }
}

#[test]
fn a_station_that_is_silent_for_days_does_not_grow_young() {
    let fdb = Fdb::new(settings(1000));
    fdb.hear(key(1), BLUE, 0);
    let shown = |now| {
        let mut age = None;
        fdb.for_each(now, |_, _, seconds| age = Some(seconds));
        age
    };
    for now in (0..300_000).step_by(1000) {
        assert_eq!(fdb.age(now, 0), 0);
        assert_eq!(shown(now), Some(now.min(AGE_MAX_SECONDS)));
    }
    assert_eq!(fdb.age(300_000, u32::MAX), 1);
}

#[test]
fn a_writer_that_is_descheduled_hides_no_known_station() {
    let fdb = Fdb::with_buckets(settings(8), 2);
    (0..6).for_each(|n| assert_eq!(fdb.hear(key(n), BLUE, 0), Learned::New));
    let claims: Vec<_> = fdb
        .buckets
        .iter()
        .map(|bucket| bucket.claim().unwrap())
        .collect();
    for n in 0..6 {
        assert_eq!(fdb.find(key(n)), Some(BLUE));
        assert_eq!(fdb.hear(key(n), BLUE, 1), Learned::Refreshed);
        assert_eq!(fdb.hear(key(n), RED, 1), Learned::Busy);
    }
    assert_eq!(fdb.hear(key(7), BLUE, 1), Learned::Busy);
    drop(claims);
    assert_eq!(fdb.hear(key(7), BLUE, 1), Learned::New);
}

/// What a station's generation must be behind `port`: a torn read mixes those of two stations or two ports.
fn proof(key: Key, port: PortId) -> u16 {
    let mixed = (key.mac().bits() ^ u64::from(port.0) << 50).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 48) as u16
}

#[test]
fn readers_never_see_a_place_that_was_never_stored_nor_miss_a_station_that_stays() {
    // Two buckets, so that everything happens to everybody: moves, evictions, pushes from home to the second bucket.
    let fdb = Fdb::with_buckets(
        FdbSettings {
            reserved_per_port: 0,
            ..settings(8)
        },
        2,
    );
    let stays = key(1_000_000);
    fdb.add_static(stays, RED, proof(stays, RED)).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..400_000u64 {
                let key = key(n * 7 % 23);
                let port = PortId((n / 23 % 3) as u16);
                fdb.learn(
                    key,
                    fdb.hash(key),
                    port,
                    proof(key, port),
                    (n / 1000) as u32,
                );
                if n.is_multiple_of(41) {
                    fdb.remove(key);
                }
            }
            done.store(true, Relaxed);
        });
        let mut hits = 0;
        for n in 0.. {
            let key = key(n % 23);
            if let Some(station) = fdb.lookup(key, fdb.hash(key)) {
                assert_eq!(
                    station.generation,
                    proof(key, station.port),
                    "{key:?} {station:?}"
                );
                hits += 1;
            }
            assert!(
                fdb.lookup(stays, fdb.hash(stays))
                    .is_some_and(|station| station.is_static)
            );
            if done.load(Relaxed) {
                break;
            }
        }
        assert!(hits > 0);
    });
    fdb.assert_consistent();
}

#[test]
fn two_learners_and_a_sweeper_leave_a_consistent_table() {
    let fdb = Fdb::with_buckets(
        FdbSettings {
            reserved_per_port: 2,
            ..settings(96)
        },
        32,
    );
    std::thread::scope(|scope| {
        for port in 0..2 {
            let fdb = &fdb;
            scope.spawn(move || {
                for n in 0..200_000u64 {
                    fdb.hear(
                        key(n * 31 % 157 + n % 3 * 1000),
                        PortId(port),
                        (n / 500) as u32,
                    );
                }
            });
        }
        for n in 0..300u32 {
            fdb.flush(if n.is_multiple_of(2) {
                Flush::Port(BLUE)
            } else {
                Flush::Domain(Domain(1))
            });
            fdb.age(n, 10);
        }
    });
    fdb.assert_consistent();
}

#[test]
fn a_path_is_recalled_for_its_two_stations_within_its_second() {
    let fdb = Fdb::new(settings(1000));
    let (from, to, other) = (key(1), key(2), key(3));
    assert!(fdb.path(from, to, BLUE, 1, 7).is_none(), "both are unknown");
    fdb.hear(from, BLUE, 7);
    assert!(fdb.path(from, to, BLUE, 1, 7).is_none(), "the receiver is");
    fdb.hear(to, RED, 7);
    assert!(fdb.path(from, to, RED, 1, 7).is_none(), "it has moved");
    assert!(fdb.path(from, to, BLUE, 2, 7).is_none(), "the next owner");
    let path = fdb.path(from, to, BLUE, 1, 7).unwrap();
    assert_eq!(path.station().port, RED);
    assert_eq!(fdb.recall(&path, from, to, 7), Some(path.station()));
    for (from, to) in [(from, other), (other, to), (to, from)] {
        assert_eq!(fdb.recall(&path, from, to, 7), None);
    }
    assert_eq!(fdb.recall(&path, from, to, 8), None, "its stamp is due");
    assert_eq!((fdb.age(20, 13), fdb.len()), (2, 0), "heard at 7, both");
}

#[test]
fn a_path_stamps_its_sender_and_no_other() {
    let fdb = Fdb::new(settings(1000));
    fdb.hear(key(1), BLUE, 7);
    fdb.hear(key(2), RED, 7);
    assert!(fdb.path(key(1), key(2), BLUE, 1, 9).is_some());
    let mut ages = HashMap::new();
    fdb.for_each(10, |key, _, age| assert!(ages.insert(key, age).is_none()));
    assert_eq!(ages, HashMap::from([(key(1), 1), (key(2), 3)]));
}

#[test]
fn a_path_is_void_after_any_news_of_its_stations() {
    let news: [fn(&Fdb); 8] = [
        |fdb| assert_eq!(fdb.hear(key(1), RED, 7), Learned::Moved),
        |fdb| assert_eq!(fdb.hear(key(2), BLUE, 7), Learned::Moved),
        |fdb| assert!(fdb.remove(key(1))),
        |fdb| assert!(fdb.remove(key(2))),
        |fdb| assert_eq!(fdb.flush(Flush::Port(BLUE)), 1),
        |fdb| assert_eq!(fdb.flush(Flush::Gone(RED)), 1),
        |fdb| fdb.add_static(key(1), RED, 1).unwrap(),
        |fdb| fdb.add_static(key(2), RED, 1).unwrap(),
    ];
    for (number, news) in news.into_iter().enumerate() {
        let fdb = Fdb::new(settings(1000));
        fdb.hear(key(1), BLUE, 7);
        fdb.hear(key(2), RED, 7);
        let path = fdb.path(key(1), key(2), BLUE, 1, 7).unwrap();
        news(&fdb);
        assert_eq!(fdb.recall(&path, key(1), key(2), 7), None, "{number}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Hear(u64, u16),
    Frame(u64, u64),
    Pin(u64, u16),
    Remove(u64),
    Tick(u32),
    Age(u32),
    Flush(Flush),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (station, port) = (0..60u64, 0..4u16);
    let flush = prop_oneof![
        Just(Flush::All),
        (0..4u16).prop_map(|port| Flush::Port(PortId(port))),
        (0..3u16).prop_map(|domain| Flush::Domain(Domain(domain))),
        (0..4u16).prop_map(|port| Flush::Gone(PortId(port))),
    ];
    let step = prop_oneof![
        20 => (station.clone(), port.clone()).prop_map(|(n, port)| Step::Hear(n, port)),
        10 => (station.clone(), station.clone()).prop_map(|(from, to)| Step::Frame(from, to)),
        1 => (station.clone(), port).prop_map(|(n, port)| Step::Pin(n, port)),
        2 => station.prop_map(Step::Remove),
        4 => (0..200u32).prop_map(Step::Tick),
        1 => (1..1000u32).prop_map(Step::Age),
        1 => flush.prop_map(Step::Flush),
    ];
    prop::collection::vec(step, 1..400)
}

proptest! {
    /// 60 stations in 24 buckets' slots: pushes happen, evictions do not.
    #[test]
    fn the_table_does_what_a_hash_map_does(steps in steps(), mut now in any::<u32>()) {
        let fdb = Fdb::with_buckets(settings(128), 32);
        let mut model: HashMap<Key, (Station, u32)> = HashMap::new();
        let mut paths = Vec::new();
        let key = |n: u64| Key::new(Domain((n % 3) as u16), key(n).mac());
        for step in steps {
            match step {
                Step::Hear(n, port) => {
                    let heard = Station { port: PortId(port), generation: 7, is_static: false };
                    let told = fdb.learn(key(n), fdb.hash(key(n)), heard.port, 7, now);
                    let expected = match model.get(&key(n)) {
                        None => Learned::New,
                        Some((old, stamp)) if old.port == heard.port && (old.is_static || *stamp == now) => Learned::Known,
                        Some((old, _)) if old.is_static => Learned::Static,
                        Some((old, _)) if old.port == heard.port => Learned::Refreshed,
                        Some(_) => Learned::Moved,
                    };
                    let same = told == expected || expected == Learned::Known && told == Learned::Refreshed;
                    prop_assert!(same, "{told:?}, not {expected:?}");
                    model.entry(key(n)).and_modify(|old| if !old.0.is_static { *old = (heard, now) }).or_insert((heard, now));
                }
                Step::Frame(from, to) => {
                    let Some((heard, stamp)) = model.get_mut(&key(from)) else { continue };
                    if !heard.is_static {
                        *stamp = now;
                    }
                    fdb.learn(key(from), fdb.hash(key(from)), heard.port, 7, now);
                    paths.extend(fdb.path(key(from), key(to), heard.port, 7, now).map(|path| (from, *heard, to, path)));
                }
                Step::Pin(n, port) => {
                    fdb.add_static(key(n), PortId(port), 7).unwrap();
                    model.insert(key(n), (Station { port: PortId(port), generation: 7, is_static: true }, now));
                }
                Step::Remove(n) => prop_assert_eq!(fdb.remove(key(n)), model.remove(&key(n)).is_some()),
                Step::Tick(seconds) => now = now.wrapping_add(seconds),
                Step::Age(most) => {
                    let before = model.len();
                    model.retain(|_, (station, stamp)| station.is_static || now.wrapping_sub(*stamp) < most);
                    prop_assert_eq!(fdb.age(now, most), before - model.len());
                }
                Step::Flush(what) => {
                    let before = model.len();
                    model.retain(|key, (station, _)| match what {
                        Flush::All => station.is_static,
                        Flush::Port(port) => station.is_static || station.port != port,
                        Flush::Domain(domain) => station.is_static || key.domain() != domain,
                        Flush::Gone(port) => station.port != port,
                    });
                    prop_assert_eq!(fdb.flush(what), before - model.len());
                }
            }
            for n in 0..60 {
                let found = fdb.lookup(key(n), fdb.hash(key(n)));
                prop_assert_eq!(found, model.get(&key(n)).map(|(station, _)| *station));
            }
            // A path that is recalled is what both look-ups would say, and its sender's stamp is not due.
            for (from, heard, to, path) in &paths {
                if let Some(station) = fdb.recall(path, key(*from), key(*to), now) {
                    prop_assert_eq!(model.get(&key(*to)).map(|(station, _)| *station), Some(station));
                    let sender = model.get(&key(*from)).copied();
                    prop_assert!(sender.is_some_and(|sender| sender.0 == *heard && (heard.is_static || sender.1 == now)));
                }
            }
        }
        let mut shown = HashMap::new();
        fdb.for_each(now, |key, station, age| assert!(shown.insert(key, (station, age)).is_none()));
        let expected: HashMap<_, _> = model
            .iter()
            .map(|(key, (station, stamp))| (*key, (*station, if station.is_static { 0 } else { now.wrapping_sub(*stamp) })))
            .collect();
        prop_assert_eq!(shown, expected);
        fdb.assert_consistent();
    }
}
