//! Device side against driver side, honest and not.

use std::collections::VecDeque;
use std::sync::Arc;

use super::buffers::{BATCH, Buffers};
use super::driver::{DriverRing, DriverSetup, Used};
use super::guest_mem::{GuestMem, MapOptions, Poison};
use super::own_mem::OwnMem;
use super::ring::{BadSetup, Ring, RingSetup, Way, feature};

mod lazy;
mod liars;
mod litmus;
mod notify;

/// First guest address of every test's memory.
const GPA: u64 = 0x4000_0000;
/// Bytes behind the ring for buffers.
const POOL: u64 = 1 << 20;

/// A ring with both its sides.
struct Pair {
    guest: DriverRing,
    device: Ring,
    buffers: Box<Buffers>,
    features: u64,
    way: Way,
}

impl Pair {
    fn new(size: u16, features: u64, way: Way) -> Pair {
        let mem = OwnMem::new(DriverRing::bytes(size, features) + POOL, GPA, false).unwrap();
        let setup = DriverSetup {
            mem: mem.clone(),
            at: GPA,
            size,
            features,
            way,
        };
        let guest = DriverRing::new(setup).unwrap();
        let device = Ring::new(setup_of(&guest, &[&mem], features, way)).unwrap();
        Pair {
            guest,
            device,
            buffers: Buffers::new(),
            features,
            way,
        }
    }

    /// The device side anew, with another base or after the table changed.
    fn again(&mut self, base: u32, mems: &[&OwnMem]) -> Result<(), BadSetup> {
        let setup = RingSetup {
            base,
            ..setup_of(&self.guest, mems, self.features, self.way)
        };
        self.device = Ring::new(setup)?;
        Ok(())
    }

    fn mem(&self) -> Arc<OwnMem> {
        self.guest.mem().clone()
    }

    /// Guest address of the pool.
    fn pool(&self) -> u64 {
        GPA + self.mem().len() - POOL
    }

    /// Buffer `n` of the pool, 128 bytes.
    fn buffer(&self, n: u64) -> u64 {
        self.pool() + n % 8192 * 128
    }

    /// Where `at` is in the device's mapping, if the whole memory is its first region.
    fn host(&self, at: u64) -> *mut u8 {
        let mem = self.device.mem();
        let ptr = mem.translate_uva(self.mem().uva() + (at - GPA), 1);
        ptr.unwrap().as_ptr()
    }
}

fn setup_of(guest: &DriverRing, mems: &[&OwnMem], features: u64, way: Way) -> RingSetup {
    let regions = mems.iter().map(|mem| mem.region().unwrap()).collect();
    let (poison, options) = (Arc::new(Poison::default()), MapOptions::default());
    let (desc, avail, used) = guest.addresses();
    RingSetup {
        mem: Arc::new(GuestMem::map(regions, &poison, &options).unwrap()),
        size: guest.size(),
        desc,
        avail,
        used,
        base: guest.base(),
        features,
        way,
    }
}

/// All combinations of layout, IN_ORDER and EVENT_IDX.
fn all_features() -> impl Iterator<Item = u64> {
    (0..8).map(|bits| {
        let chosen = [feature::RING_PACKED, feature::IN_ORDER, feature::EVENT_IDX]
            .iter()
            .enumerate()
            .filter(|(i, _)| bits >> i & 1 == 1);
        feature::VERSION_1 | feature::INDIRECT_DESC | chosen.map(|(_, f)| f).sum::<u64>()
    })
}

fn is_packed(features: u64) -> bool {
    features & feature::RING_PACKED != 0
}

/// Features of both layouts, nothing else but INDIRECT.
const PLAIN: [u64; 2] = [
    feature::VERSION_1 | feature::INDIRECT_DESC,
    feature::VERSION_1 | feature::INDIRECT_DESC | feature::RING_PACKED,
];

#[test]
fn frames_cross_rings_of_any_size_far_beyond_the_index_wrap() {
    let packed_too = [1u16, 3, 5, 7, 63, 65, 300, 1000, 32767];
    let any = [2u16, 4, 8, 64, 128, 256, 1024, 4096, 32768];
    for features in all_features() {
        let odd = packed_too.iter().filter(|_| is_packed(features));
        for &size in any.iter().chain(odd) {
            for way in [Way::FromGuest, Way::ToGuest] {
                cross(&mut Pair::new(size, features, way), 66_000);
            }
        }
    }
}

/// Posts, fetches, completes and takes in bursts of changing length until `frames` came back, each one checked.
fn cross(pair: &mut Pair, frames: u64) {
    let (mut posted, mut back) = (0u64, 0u64);
    let mut out = [Used::default(); BATCH];
    let len = |n: u64| 100 + n as u32 % 28;
    for turn in 0.. {
        let burst = 1 + turn * 7 % 61;
        let new: Vec<_> = (posted..posted + burst)
            .map(|n| (pair.buffer(n), len(n)))
            .collect();
        posted += pair.guest.post(&new) as u64;
        let count = pair.device.fetch(&mut pair.buffers, BATCH).unwrap();
        assert_eq!(count, pair.device.fetch(&mut pair.buffers, BATCH).unwrap());
        assert_eq!(count as u64, (posted - back).min(BATCH as u64));
        // Not all of them: the rest comes first in the next turn.
        let done = count.min(1 + turn as usize * 5 % BATCH);
        for i in 0..done {
            let (n, buffer) = (back + i as u64, pair.buffers.buffer(i));
            assert_eq!(buffer.at, pair.host(pair.buffer(n)));
            assert_eq!((buffer.len, pair.buffers.fault(i)), (len(n), None));
        }
        let written: Vec<u32> = (0..done).map(|i| pair.buffers.buffer(i).len / 2).collect();
        pair.device.complete(done, &written);
        assert_eq!(pair.guest.take(&mut out), done);
        for (n, used) in (back..).zip(&out[..done]) {
            assert_eq!(used.addr, pair.buffer(n));
            let wrote = if pair.way == Way::ToGuest {
                len(n) / 2
            } else {
                0
            };
            assert!(used.len == wrote || pair.way == Way::FromGuest);
        }
        back += done as u64;
        if back >= frames {
            return;
        }
    }
}

#[test]
fn chains_and_tables_arrive_piece_by_piece_in_both_directions() {
    for features in all_features() {
        for way in [Way::FromGuest, Way::ToGuest] {
            for size in [8u16, 16, 64] {
                chains(&mut Pair::new(size, features, way));
            }
        }
    }
}

/// Buffers of one to five pieces, as chains and tables in turn, until they wrapped many times.
fn chains(pair: &mut Pair) {
    let table = pair.pool() + POOL - 4096;
    let mut waiting: VecDeque<Vec<(u64, u32)>> = VecDeque::new();
    let (mut posted, mut back) = (0u64, 0u64);
    while back < 2000 {
        loop {
            let count = 1 + posted % 5;
            let pieces: Vec<_> = (0..count)
                .map(|i| (pair.buffer(posted * 5 + i), 1 + (posted + i) as u32 % 100))
                .collect();
            let fits = if posted.is_multiple_of(3) {
                // Each table in flight has its own place.
                pair.guest.post_indirect(table + posted % 32 * 80, &pieces)
            } else {
                pair.guest.post_chain(&pieces)
            };
            if !fits {
                break;
            }
            waiting.push_back(pieces);
            posted += 1;
        }
        let count = pair.device.fetch(&mut pair.buffers, BATCH).unwrap();
        let done = count.min(1 + posted as usize % 7);
        for i in 0..done {
            let buffer = pair.buffers.buffer(i);
            let pieces = waiting.pop_front().unwrap();
            assert_eq!(pair.buffers.fault(i), None);
            if pieces.len() == 1 {
                assert!(pair.buffers.pieces(i).is_empty());
                assert_eq!(
                    (buffer.at, buffer.len),
                    (pair.host(pieces[0].0), pieces[0].1)
                );
                continue;
            }
            let got = pair.buffers.pieces(i);
            let got: Vec<_> = got.iter().map(|p| (p.at, p.len)).collect();
            let want: Vec<_> = pieces.iter().map(|p| (pair.host(p.0), p.1)).collect();
            assert_eq!(got, want);
        }
        pair.device.complete(done, &vec![9; done]);
        back += pair.guest.reclaim() as u64;
    }
}

#[test]
fn a_transmit_batch_in_order_is_given_back_by_one_element() {
    for features in PLAIN.map(|f| f | feature::IN_ORDER) {
        let mut pair = Pair::new(64, features, Way::FromGuest);
        let new: Vec<_> = (0..40).map(|n| (pair.buffer(n), 64)).collect();
        assert_eq!(pair.guest.post(&new), 40);
        let before = pair.guest.raw().desc(1);
        assert_eq!(pair.device.fetch(&mut pair.buffers, BATCH), Ok(40));
        pair.device.complete(40, &[]);
        let raw = pair.guest.raw();
        if is_packed(features) {
            let (_, len, id, flags) = raw.desc(0);
            assert_eq!((len, id, flags & 0x8080), (0, 39, 0x8080));
            assert_eq!(raw.desc(1), before, "the others are skipped");
        } else {
            assert_eq!((raw.used(0), raw.used_idx()), ((39, 0), 40));
            assert_eq!(raw.used(1), (0, 0), "the others are skipped");
        }
        assert_eq!(pair.guest.reclaim(), 40);
    }
}

#[test]
fn receive_buffers_are_given_back_one_by_one_even_in_order() {
    for features in PLAIN.map(|f| f | feature::IN_ORDER) {
        let mut pair = Pair::new(8, features, Way::ToGuest);
        let new: Vec<_> = (0..8).map(|n| (pair.buffer(n), 128)).collect();
        pair.guest.post(&new);
        assert_eq!(pair.device.fetch(&mut pair.buffers, BATCH), Ok(8));
        pair.device.complete(3, &[76, 0, 90]);
        let raw = pair.guest.raw();
        for (slot, len) in [(0, 76), (1, 0), (2, 90)] {
            if is_packed(features) {
                let (_, got, id, flags) = raw.desc(slot);
                let wrote = if len > 0 { 2 } else { 0 };
                assert_eq!((got, id, flags), (len, slot, 0x8080 | wrote));
            } else {
                assert_eq!(raw.used(slot), (u32::from(slot), len));
            }
        }
    }
}

#[test]
fn a_mergeable_frame_is_taken_whole_even_where_the_burst_ends() {
    let features = PLAIN[0] | feature::MRG_RXBUF;
    let mut pair = Pair::new(16, features, Way::ToGuest);
    let new: Vec<_> = (0..16).map(|n| (pair.buffer(n), 128)).collect();
    pair.guest.post(&new);
    assert_eq!(pair.device.fetch(&mut pair.buffers, BATCH), Ok(16));
    let mem = pair.mem();
    for (first, buffers) in [(0, 1), (1, 3), (4, 4), (8, 1)] {
        assert!(mem.write(pair.buffer(first), &super::net::header(buffers)));
    }
    pair.device.complete(9, &[128; 9]);
    let mut out = [Used::default(); 6];
    assert_eq!(pair.guest.take_frames(&mut out), 4);
    assert_eq!(
        out[..4].iter().map(|u| u.buffers).collect::<Vec<_>>(),
        [1, 3, 0, 0]
    );
    assert_eq!(pair.guest.take_frames(&mut out), 5);
    assert_eq!(
        out[..5].iter().map(|u| u.buffers).collect::<Vec<_>>(),
        [4, 0, 0, 0, 1]
    );
    assert_eq!(out[4].addr, pair.buffer(8));
    assert_eq!(pair.guest.take_frames(&mut out), 0);
}

#[test]
fn a_ring_goes_on_where_it_was_after_moving_to_another_owner() {
    for features in all_features() {
        let mut pair = Pair::new(8, features, Way::FromGuest);
        for n in 0..100 {
            pair.guest.post(&[(pair.buffer(n), 64)]);
            let base = pair.device.base();
            let mem = pair.mem();
            pair.again(base, &[&mem]).unwrap();
            assert_eq!(pair.device.fetch(&mut pair.buffers, BATCH), Ok(1));
            assert_eq!(pair.buffers.buffer(0).at, pair.host(pair.buffer(n)));
            pair.device.complete(1, &[]);
            assert_eq!(pair.guest.reclaim(), 1);
        }
        if is_packed(features) {
            assert_eq!(pair.device.base(), 0x8004_8004, "twelve laps and four");
        } else {
            assert_eq!(pair.device.base(), 100);
        }
    }
}

#[test]
fn a_split_ring_that_says_base_zero_goes_on_at_the_used_index() {
    let mut pair = Pair::new(8, PLAIN[0], Way::FromGuest);
    for n in 0..13 {
        pair.guest.post(&[(pair.buffer(n), 64)]);
        pair.device.fetch(&mut pair.buffers, BATCH).unwrap();
        pair.device.complete(1, &[]);
        assert_eq!(pair.guest.reclaim(), 1);
    }
    let mem = pair.mem();
    pair.again(0, &[&mem]).unwrap();
    assert_eq!(pair.device.base(), 13);
    pair.guest.post(&[(pair.buffer(13), 64)]);
    assert_eq!(pair.device.fetch(&mut pair.buffers, BATCH), Ok(1));
}

#[test]
fn a_device_that_gives_back_what_it_does_not_have_is_noticed_where_buffers_are_kept() {
    for features in [0, feature::RING_PACKED] {
        let mem = OwnMem::new(1 << 16, 1 << 30, false).unwrap();
        let setup = DriverSetup {
            mem: mem.clone(),
            at: mem.gpa(),
            size: 8,
            features: feature::VERSION_1 | features,
            way: Way::ToGuest,
        };
        let mut ring = DriverRing::new(setup).unwrap();
        let buffer = |id: u16| (mem.gpa() + 8192 + 64 * u64::from(id), 64);
        (0..4).for_each(|id| ring.keep(id, buffer(id)));
        ring.post_kept(4, |id| (id as u16, buffer(id as u16).0, 64));
        assert_eq!((ring.free(), ring.lied()), (4, false));
        let mut taken = [(0, 0); 8];
        assert_eq!(ring.take_kept(&mut taken), 0);
        if features == 0 {
            ring.raw().set_used(0, (2, 64));
            ring.raw().set_used_idx(1);
            assert_eq!((ring.take_kept(&mut taken), taken[0]), (1, (2, 64)));
            assert!(!ring.lied());
            ring.raw().set_used(1, (8, 64)); // there are 0 to 7
            ring.raw().set_used_idx(2);
        } else {
            // Used in the first lap: both flags set; the id is beyond the ring.
            let word = 64u64 | 8 << 32 | 0x8080 << 48;
            mem.write(mem.gpa() + 8, &word.to_le_bytes());
        }
        assert_eq!(ring.take_kept(&mut taken), 0);
        assert!(ring.lied());
    }
}

#[test]
fn a_ring_is_refused_if_size_place_or_base_are_not_allowed() {
    let new = |features, change: fn(&mut RingSetup)| {
        let pair = Pair::new(8, features, Way::FromGuest);
        let mem = pair.mem();
        let mut setup = setup_of(&pair.guest, &[&mem], features, Way::FromGuest);
        change(&mut setup);
        Ring::new(setup).err()
    };
    let [split, packed] = PLAIN;
    for size in [0, 3, 300, 32769, 65535] {
        let mut setup = setup_of(
            &Pair::new(8, split, Way::FromGuest).guest,
            &[&OwnMem::new(4096, GPA, false).unwrap()],
            split,
            Way::FromGuest,
        );
        setup.size = size;
        assert_eq!(Ring::new(setup).err(), Some(BadSetup::Size(size)));
    }
    assert_eq!(new(packed, |s| s.size = 0), Some(BadSetup::Size(0)));
    assert_eq!(new(packed, |s| s.size = 32769), Some(BadSetup::Size(32769)));
    assert_eq!(new(packed, |s| s.base = 8), Some(BadSetup::Base(8)));
    assert_eq!(new(packed, |s| s.base = 0x8007), None);
    for features in PLAIN {
        assert!(matches!(
            new(features, |s| s.desc += 8),
            Some(BadSetup::Align(_))
        ));
        assert!(matches!(
            new(features, |s| s.used += 2),
            Some(BadSetup::Align(_))
        ));
        assert!(matches!(
            new(features, |s| s.avail += 1),
            Some(BadSetup::Align(_))
        ));
        for part in [0, u64::MAX - 15, 0xffff_8000_0000_0000] {
            let mut setup = {
                let pair = Pair::new(8, features, Way::FromGuest);
                setup_of(&pair.guest, &[&pair.mem()], features, Way::FromGuest)
            };
            setup.desc = part;
            assert_eq!(Ring::new(setup).err(), Some(BadSetup::Outside(part)));
        }
        // The last descriptor ends with the memory, or one descriptor beyond it.
        let pair = Pair::new(8, features, Way::FromGuest);
        let mem = pair.mem();
        for (beyond, outcome) in [(0, None), (16, Some(()))] {
            let mut setup = setup_of(&pair.guest, &[&mem], features, Way::FromGuest);
            setup.desc = mem.uva() + mem.len() - 128 + beyond;
            assert_eq!(Ring::new(setup).err().map(|_| ()), outcome);
        }
    }
}
