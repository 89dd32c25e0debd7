//! The forwarding database against a map: a station is where it was last learnt, or unknown; never anywhere else.
#![no_main]

use std::collections::HashMap;

use ringway::dataplane::eth::Mac;
use ringway::dataplane::fdb::{Fdb, FdbSettings, Flush, Key, Learned};
use ringway::dataplane::port_set::{Domain, PortId};

/// What the map knows of a station: port, its owner, static or not.
type Place = (u16, u16, bool);

fn check(fdb: &Fdb, model: &HashMap<u64, Place>, number: u64) {
    let key = key(number);
    let found = fdb.lookup(key, fdb.hash(key));
    let place = found.map(|station| (station.port.0, station.generation, station.is_static));
    match (place, model.get(&number)) {
        (None, Some((_, _, true))) => panic!("a static station is gone"),
        (None, _) => {}
        (place, known) => assert_eq!(place, known.copied(), "station {number}"),
    }
}

/// Few enough to meet again, many enough to fill the table.
fn key(number: u64) -> Key {
    let bytes = number.to_le_bytes();
    let mac = Mac::from_bytes([2, bytes[0], bytes[1], 0, 0, 1]);
    Key::new(Domain((number >> 16) as u16 % 2), mac)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let fdb = Fdb::new(FdbSettings {
        capacity: 128,
        reserved_per_port: 4,
        ports_max: 8,
        ..FdbSettings::default()
    });
    let (mut model, mut now) = (HashMap::<u64, Place>::new(), 1u32);
    let mut paths = Vec::new();
    for step in data.chunks_exact(4) {
        let number =
            u64::from(step[1]) | u64::from(step[2] & 1) << 8 | u64::from(step[2] >> 7) << 16;
        let (port, owner) = (u16::from(step[3] & 7), u16::from(step[3] >> 6));
        let key = key(number);
        match step[0] {
            0..=149 => match fdb.learn(key, fdb.hash(key), PortId(port), owner, now) {
                Learned::New | Learned::Moved | Learned::Known | Learned::Refreshed => {
                    // A static station stays one, where it is.
                    let fixed = model.get(&number).is_some_and(|place| place.2);
                    model.insert(number, (port, owner, fixed));
                }
                Learned::Static => assert!(model.get(&number).is_some_and(|place| place.2)),
                Learned::Full | Learned::Busy => {}
            },
            150..=189 => check(&fdb, &model, number),
            190..=199 => {
                let to = self::key(u64::from(step[3]));
                let path = fdb.path(key, to, PortId(port), owner, now);
                paths.extend(path.map(|path| (number, (port, owner), u64::from(step[3]), path)));
            }
            200..=209 => {
                if fdb.add_static(key, PortId(port), owner).is_ok() {
                    model.insert(number, (port, owner, true));
                }
            }
            210..=219 => {
                fdb.remove(key);
                model.remove(&number);
                check(&fdb, &model, number);
            }
            220..=224 => {
                fdb.flush(Flush::Port(PortId(port)));
                model.retain(|_, place| place.2 || place.0 != port);
            }
            225..=229 => {
                fdb.flush(Flush::Gone(PortId(port)));
                model.retain(|_, place| place.0 != port);
            }
            230..=232 => {
                fdb.flush(Flush::All);
                model.retain(|_, place| place.2);
            }
            233..=235 => fdb.set_reserved(u32::from(step[1]) % 32),
            236..=245 => now += u32::from(step[1]),
            _ => {
                fdb.age(now, u32::from(step[1]));
            }
        }
        check(&fdb, &model, number);
        for (from, heard, to, path) in &paths {
            if let Some(station) = fdb.recall(path, self::key(*from), self::key(*to), now) {
                let place = (station.port.0, station.generation, station.is_static);
                assert_eq!(model.get(to), Some(&place), "the path's receiver");
                let sender = model.get(from).map(|place| (place.0, place.1));
                assert_eq!(sender, Some(*heard), "the path's sender");
            }
        }
    }
    assert!(fdb.len() <= fdb.capacity());
    let mut count = 0;
    fdb.for_each(now, |_, _, _| count += 1);
    assert_eq!(
        count,
        fdb.len(),
        "the table does not know how many it holds"
    );
});
