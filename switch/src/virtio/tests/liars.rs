//! Guests that break the rules: each lie has its name, and none is a panic, an endless walk or a wrong pointer.

use super::super::buffers::{CHAIN_MAX, Fault, PIECES_MAX};
use super::super::ring::{Lie, flag};
use super::*;

const BOTH: [Way; 2] = [Way::FromGuest, Way::ToGuest];

/// WRITE if the ring needs it.
fn dir(way: Way) -> u16 {
    match way {
        Way::FromGuest => 0,
        Way::ToGuest => flag::WRITE,
    }
}

/// A split ring of eight whose first available head is `head`.
fn split(way: Way, head: u16) -> Pair {
    let pair = Pair::new(8, PLAIN[0], way);
    pair.guest.raw().set_avail(0, head);
    pair.guest.raw().set_avail_idx(1);
    pair
}

/// A packed ring of eight.
fn packed(way: Way) -> Pair {
    Pair::new(8, PLAIN[1], way)
}

impl Pair {
    fn fetch(&mut self) -> Result<usize, Lie> {
        self.device.fetch(&mut self.buffers, BATCH)
    }

    /// What became of the only buffer.
    fn fault(&mut self) -> Option<Fault> {
        assert_eq!(self.fetch(), Ok(1));
        let fault = self.buffers.fault(0);
        self.device.complete(1, &[]);
        assert_eq!(self.fetch(), Ok(0), "the ring goes on behind it");
        fault
    }

    /// Writes descriptor `index` of an indirect table at `table`.
    fn table_desc(&self, table: u64, index: u64, (addr, len, third, fourth): (u64, u32, u16, u16)) {
        let mut desc = addr.to_le_bytes().to_vec();
        desc.extend(len.to_le_bytes());
        desc.extend(third.to_le_bytes());
        desc.extend(fourth.to_le_bytes());
        assert!(self.mem().write(table + 16 * index, &desc));
    }
}

#[test]
fn an_available_index_beyond_the_ring_or_backwards_is_a_lie() {
    for way in BOTH {
        for jump in [9u16, 10, 1000, 32768, 0xffff] {
            let mut pair = Pair::new(8, PLAIN[0], way);
            pair.guest.raw().set_avail_idx(jump);
            let lie = Lie::AvailIdx {
                pending: jump,
                size: 8,
            };
            assert_eq!(pair.fetch(), Err(lie));
            assert_eq!(pair.fetch(), Err(lie), "and stays one");
        }
        let mut pair = Pair::new(8, PLAIN[0], way);
        pair.guest.raw().set_avail_idx(8);
        for slot in 0..8 {
            pair.guest
                .raw()
                .set_desc(slot, (pair.pool(), 64, dir(way), 0));
        }
        assert_eq!(pair.fetch(), Ok(8), "a full ring is none");
        pair.device.complete(8, &[]);
        pair.guest.raw().set_avail_idx(7);
        assert!(matches!(
            pair.fetch(),
            Err(Lie::AvailIdx {
                pending: 0xffff,
                ..
            })
        ));
    }
}

#[test]
fn a_head_or_next_beyond_the_table_is_a_lie() {
    for way in BOTH {
        for index in [8u16, 9, 0x8000, 0xffff] {
            let lie = Err(Lie::Index { index, size: 8 });
            assert_eq!(split(way, index).fetch(), lie);
            let mut pair = split(way, 0);
            let flags = dir(way) | flag::NEXT;
            pair.guest
                .raw()
                .set_desc(0, (pair.pool(), 64, flags, index));
            assert_eq!(pair.fetch(), lie);
        }
    }
}

#[test]
fn chains_that_loop_are_lies_however_long_the_loop() {
    for way in BOTH {
        for len in [0, 64] {
            for cycle in 1..=8u16 {
                let mut pair = split(way, 0);
                for index in 0..cycle {
                    let next = (index + 1) % cycle;
                    let desc = (pair.pool(), len, dir(way) | flag::NEXT, next);
                    pair.guest.raw().set_desc(index, desc);
                }
                assert_eq!(pair.fetch(), Err(Lie::Loop));
            }
            // Packed: a chain without end around the ring.
            let mut pair = packed(way);
            for index in 0..8 {
                let flags = dir(way) | flag::NEXT | flag::AVAIL;
                pair.guest
                    .raw()
                    .set_desc(index, (pair.pool(), len, 0, flags));
            }
            assert_eq!(pair.fetch(), Err(Lie::Loop));
        }
    }
}

#[test]
fn a_chain_is_followed_so_far_and_no_further() {
    for features in PLAIN {
        for way in BOTH {
            for (count, outcome) in [
                (PIECES_MAX, Ok(None)),
                (PIECES_MAX + 1, Ok(Some(Fault::TooManyPieces))),
                (usize::from(CHAIN_MAX), Ok(Some(Fault::TooManyPieces))),
                (usize::from(CHAIN_MAX) + 1, Err(Lie::Loop)),
                (1024, Err(Lie::Loop)),
            ] {
                let mut pair = Pair::new(1024, features, way);
                let pieces: Vec<_> = (0..count as u64).map(|n| (pair.buffer(n), 1)).collect();
                assert!(pair.guest.post_chain(&pieces));
                let got = pair.fetch().map(|_| pair.buffers.fault(0));
                assert_eq!(got, outcome);
                let mut pair = Pair::new(2, features, way);
                let table = pair.pool() + POOL / 2;
                assert!(pair.guest.post_indirect(table, &pieces));
                let got = pair.fetch().map(|_| pair.buffers.fault(0));
                assert_eq!(got, outcome);
            }
        }
    }
}

#[test]
fn many_long_chains_make_many_turns_not_a_long_one() {
    for features in PLAIN {
        let mut pair = Pair::new(32768, features, Way::FromGuest);
        let pieces: Vec<_> = (0..100).map(|n| (pair.buffer(n), 1)).collect();
        let short: Vec<_> = pieces[..40].to_vec();
        let mut posted = 0;
        while pair.guest.post_chain(&pieces) && pair.guest.post_chain(&short) {
            posted += 2;
        }
        let (mut back, mut whole) = (0, 0);
        while back < posted {
            let count = pair.fetch().unwrap();
            assert!((1..=13).contains(&count), "{count} chains in one turn");
            for index in 0..count {
                whole += usize::from(pair.buffers.fault(index).is_none());
            }
            pair.device.complete(count, &[]);
            back += count;
        }
        assert_eq!(whole, posted / 2);
        assert!(pair.guest.reclaim() >= posted);
    }
}

#[test]
fn malformed_indirect_tables_are_lies() {
    for features in PLAIN {
        for way in BOTH {
            let is_packed = is_packed(features);
            let place = |pair: &Pair, addr: u64, len: u32, flags: u16| {
                let raw = pair.guest.raw();
                if is_packed {
                    raw.set_desc(0, (addr, len, 0, flags | flag::AVAIL));
                } else {
                    raw.set_desc(0, (addr, len, flags, 1));
                    raw.set_avail_idx(1);
                }
            };
            let lie = |addr: Option<u64>, len, flags| {
                let mut pair = Pair::new(8, features, way);
                let at = addr.unwrap_or(pair.pool());
                place(&pair, at, len, flags);
                pair.fetch()
            };
            // Length 0, odd, outside, beyond the end, wrapping; chained on.
            for len in [0, 1, 15, 17, 40, 4095] {
                assert_eq!(lie(None, len, flag::INDIRECT), Err(Lie::Indirect), "{len}");
            }
            for (addr, len) in [(0, 16), (GPA - 8, 16), (GPA, 1 << 30), (u64::MAX - 7, 16)] {
                assert_eq!(lie(Some(addr), len, flag::INDIRECT), Err(Lie::Indirect));
            }
            assert_eq!(
                lie(None, 16, flag::INDIRECT | flag::NEXT),
                Err(Lie::Indirect)
            );
            // Nested.
            let mut pair = Pair::new(8, features, way);
            let table = pair.pool();
            let (third, fourth) = if is_packed {
                (0, dir(way) | flag::INDIRECT)
            } else {
                (dir(way) | flag::INDIRECT, 0)
            };
            pair.table_desc(table, 0, (table, 16, third, fourth));
            place(&pair, table, 16, flag::INDIRECT);
            assert_eq!(pair.fetch(), Err(Lie::Indirect));
            // Not negotiated.
            let mut pair = Pair::new(8, features & !feature::INDIRECT_DESC, way);
            place(&pair, pair.pool(), 16, flag::INDIRECT);
            assert_eq!(pair.fetch(), Err(Lie::Indirect));
        }
    }
}

#[test]
fn an_indirect_table_that_points_out_of_itself_or_loops_is_a_lie() {
    for way in BOTH {
        for (next, lie) in [(2, Lie::Indirect), (0xffff, Lie::Indirect), (0, Lie::Loop)] {
            let mut pair = split(way, 0);
            // At an odd address: tables need no alignment.
            let table = pair.pool() + 3;
            let (at, flags) = (pair.buffer(9), dir(way) | flag::NEXT);
            pair.table_desc(table, 0, (at, 64, flags, 1));
            pair.table_desc(table, 1, (at, 64, flags, next));
            pair.guest.raw().set_desc(0, (table, 32, flag::INDIRECT, 0));
            assert_eq!(pair.fetch(), Err(lie));
        }
    }
}

#[test]
fn a_chain_may_end_in_a_table_in_a_split_ring_only() {
    let mut pair = split(Way::FromGuest, 0);
    let table = pair.buffer(50);
    let raw = pair.guest.raw();
    raw.set_desc(0, (pair.buffer(1), 12, flag::NEXT, 5));
    raw.set_desc(5, (table, 32, flag::INDIRECT, 0));
    pair.table_desc(table, 0, (pair.buffer(2), 20, flag::NEXT, 1));
    pair.table_desc(table, 1, (pair.buffer(3), 30, 0, 0));
    assert_eq!(pair.fetch(), Ok(1));
    let pieces = pair.buffers.pieces(0);
    assert_eq!(
        pieces.iter().map(|p| p.len).collect::<Vec<_>>(),
        [12, 20, 30]
    );

    let mut pair = packed(Way::FromGuest);
    let raw = pair.guest.raw();
    raw.set_desc(0, (pair.buffer(1), 12, 0, flag::NEXT | flag::AVAIL));
    raw.set_desc(1, (table, 32, 0, flag::INDIRECT | flag::AVAIL));
    assert_eq!(pair.fetch(), Err(Lie::Indirect));
}

#[test]
fn the_wrong_direction_is_a_lie_alone_chained_and_in_a_table() {
    for features in PLAIN {
        for way in BOTH {
            let other = match way {
                Way::FromGuest => Way::ToGuest,
                Way::ToGuest => Way::FromGuest,
            };
            for shape in 0..3 {
                let mut pair = Pair::new(8, features, other);
                let mem = pair.mem();
                pair.device = Ring::new(setup_of(&pair.guest, &[&mem], features, way)).unwrap();
                let pieces = [(pair.buffer(0), 64), (pair.buffer(1), 64)];
                let table = pair.buffer(2);
                match shape {
                    0 => assert_eq!(pair.guest.post(&pieces), 2),
                    1 => assert!(pair.guest.post_chain(&pieces)),
                    _ => assert!(pair.guest.post_indirect(table, &pieces)),
                }
                // DPDK sets WRITE in the tables of packed transmit rings: reading what may be written harms nobody.
                let dpdk = shape == 2 && is_packed(features) && way == Way::FromGuest;
                let want = if dpdk { Ok(1) } else { Err(Lie::Direction) };
                assert_eq!(pair.fetch(), want);
            }
        }
    }
}

#[test]
fn addresses_outside_memory_are_faults_and_the_ring_goes_on() {
    for features in PLAIN {
        for way in BOTH {
            for (addr, len) in [
                (0, 64),
                (GPA - 1, 64),
                (GPA - 64, 64),
                (u64::MAX, 1),
                (u64::MAX - 63, 64),
                (u64::MAX - 10, 64),
                (GPA, u32::MAX),
                (0, 0),
                (u64::MAX, 0),
            ] {
                let mut pair = Pair::new(8, features, way);
                pair.guest.post(&[(addr, len)]);
                assert_eq!(pair.fault(), Some(Fault::BadAddress), "{addr:#x}+{len}");
                let mut pair = Pair::new(8, features, way);
                let chain = [
                    (pair.buffer(0), 64),
                    (addr, len.max(1)),
                    (pair.buffer(1), 64),
                ];
                pair.guest.post_chain(&chain);
                assert_eq!(pair.fault(), Some(Fault::BadAddress), "{addr:#x}+{len}");
            }
        }
    }
}

#[test]
fn a_buffer_fits_exactly_into_its_region_and_never_crosses_into_the_next() {
    for features in PLAIN {
        for way in BOTH {
            let mut pair = Pair::new(8, features, way);
            let mem = pair.mem();
            let end = GPA + mem.len();
            // A second region right behind the first one.
            let next = OwnMem::new(4096, end, false).unwrap();
            pair.again(pair.device.base(), &[&mem, &next]).unwrap();
            for (addr, len, room) in [
                (end - 64, 64, Some(64)),
                (end - 1, 1, Some(1)),
                (end - 64, 65, None),
                (end - 1, 2, None),
                (end, 4096, Some(4096)),
                (end + 4095, 1, Some(1)),
                (end + 4095, 2, None),
                (end + 4096, 1, None),
                (GPA, 64, Some(mem.len() as u32)),
            ] {
                pair.guest.post(&[(addr, len)]);
                assert_eq!(pair.fetch(), Ok(1));
                let whole = pair.buffers.fault(0).is_none();
                let got = whole.then(|| pair.buffers.buffer(0).room);
                assert_eq!(got, room, "{addr:#x}+{len}");
                pair.device.complete(1, &[]);
                assert_eq!(pair.guest.reclaim(), 1);
            }
        }
    }
}

#[test]
fn empty_links_are_skipped_and_a_buffer_of_nothing_is_empty() {
    for features in PLAIN {
        let mut pair = Pair::new(8, features, Way::FromGuest);
        let at = pair.buffer(0);
        pair.guest
            .post_chain(&[(at, 0), (at, 12), (at, 0), (at, 60)]);
        pair.guest.post_chain(&[(at, 0), (at, 0)]);
        pair.guest.post(&[(at, 0)]);
        assert_eq!(pair.fetch(), Ok(3));
        let lens: Vec<_> = pair.buffers.pieces(0).iter().map(|p| p.len).collect();
        assert_eq!((lens, pair.buffers.buffer(0).len), (vec![12, 60], 0));
        for index in [1, 2] {
            assert_eq!(pair.buffers.buffer(index).len, 0);
            assert!(pair.buffers.pieces(index).is_empty());
            assert_eq!(pair.buffers.fault(index), None);
        }
    }
}

#[test]
fn one_bad_buffer_in_a_batch_is_the_only_one_that_suffers() {
    for features in PLAIN {
        for bad in 0..4u64 {
            let mut pair = Pair::new(8, features, Way::FromGuest);
            let new: Vec<_> = (0..4)
                .map(|n| (if n == bad { 0 } else { pair.buffer(n) }, 64))
                .collect();
            pair.guest.post(&new);
            assert_eq!(pair.fetch(), Ok(4));
            for n in 0..4 {
                let fault = pair.buffers.fault(n as usize);
                assert_eq!(fault, (n == bad).then_some(Fault::BadAddress));
            }
            pair.device.complete(4, &[]);
            assert_eq!(pair.guest.reclaim(), 4);
        }
    }
}

#[test]
fn a_packed_id_is_echoed_whatever_it_is() {
    for id in [8u16, 0x8000, 0xffff, 0, 0] {
        let mut pair = packed(Way::ToGuest);
        let (at, flags) = (pair.buffer(0), flag::AVAIL | flag::WRITE);
        for slot in 0..3 {
            pair.guest.raw().set_desc(slot, (at, 64, id, flags));
        }
        assert_eq!(pair.fetch(), Ok(3));
        pair.device.complete(3, &[12, 13, 14]);
        for slot in 0..3 {
            let (_, len, got, _) = pair.guest.raw().desc(slot);
            assert_eq!((len, got), (12 + u32::from(slot), id));
        }
    }
}

#[test]
fn packed_flags_of_another_lap_make_nothing_available() {
    for flags in [0, flag::USED, flag::AVAIL | flag::USED] {
        let mut pair = packed(Way::FromGuest);
        for slot in 0..8 {
            pair.guest
                .raw()
                .set_desc(slot, (pair.buffer(0), 64, 0, flags));
        }
        assert_eq!(pair.fetch(), Ok(0));
        assert!(!pair.device.arm());
    }
    // All of a lap at once: eight are fetched, never a ninth, however the flags stand.
    let mut pair = packed(Way::FromGuest);
    for turn in 0..5 {
        let flags = if turn % 2 == 0 {
            flag::AVAIL
        } else {
            flag::USED
        };
        for slot in 0..8 {
            pair.guest
                .raw()
                .set_desc(slot, (pair.buffer(0), 64, 0, flags));
        }
        assert_eq!(pair.fetch(), Ok(8));
        pair.device.complete(8, &[]);
    }
}

#[test]
fn what_a_guest_writes_into_the_used_ring_changes_nothing() {
    let mut pair = split(Way::FromGuest, 0);
    pair.guest.raw().set_desc(0, (pair.buffer(0), 64, 0, 0));
    pair.guest.raw().set_used_idx(0x7777);
    pair.guest.raw().set_used(0, (u32::MAX, u32::MAX));
    assert_eq!(pair.fetch(), Ok(1));
    pair.device.complete(1, &[]);
    let raw = pair.guest.raw();
    assert_eq!((raw.used_idx(), raw.used(0)), (1, (0, 0)));
    assert_eq!(pair.device.base(), 1);
}

#[test]
fn a_lie_in_the_middle_of_a_batch_ends_the_ring_before_anything_is_given_back() {
    let mut pair = Pair::new(8, PLAIN[0], Way::FromGuest);
    let new: Vec<_> = (0..4).map(|n| (pair.buffer(n), 64)).collect();
    pair.guest.post(&new);
    pair.guest.raw().set_avail(2, 8);
    assert_eq!(pair.fetch(), Err(Lie::Index { index: 8, size: 8 }));
    assert_eq!(pair.guest.reclaim(), 0);
}
